"""LoRA adapters: merged as PEFT merges them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS
from models import (
    random_network,
    random_sequences,
    relative_error,
    save_huggingface,
    save_network,
    transformers_mean,
)
from safetensors.torch import load, save_file

import virnuc_dask
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.weight_files import published_part
from virnuc_dask.encoder.weights import load_checkpoint
from virnuc_dask.errors import ModelError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.display import _notice
from virnuc_dask.runtime.plan import plan
from virnuc_dask.settings import Settings

SEQUENCES = random_sequences([1, 17, 60, 200])
ALL_LINEAR = ["query", "key", "value", "dense"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_huggingface(random_network(3, 64, 4), tmp_path_factory.mktemp("base")))


def adapt(base: Path, folder: Path, kind: str = "EsmModel", **settings: Any) -> Any:
    """Save an adapter whose every part differs from nothing, and give PEFT's model."""
    import peft
    import transformers

    torch.manual_seed(1)
    network = getattr(transformers, kind).from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]} | settings
    model = peft.get_peft_model(network, peft.LoraConfig(**options))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def beside(base: Path, folder: Path) -> str:
    """An adapter's directory, with its base model in it."""
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def by_peft(model: Any) -> np.ndarray[Any, Any]:
    """What its model makes of the sequences, merged by itself."""
    network = model.merge_and_unload()
    return transformers_mean(getattr(network, "esm", network).eval(), SEQUENCES)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "EsmForSequenceClassification", "task_type": "SEQ_CLS"},
        {"target_modules": ALL_LINEAR, "r": 3},
        {"use_rslora": True},
        {"use_dora": True, "target_modules": ALL_LINEAR},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.attention.self.query": 32}},
        {"modules_to_save": ["LayerNorm"]},
    ],
    ids=str,
)
@pytest.mark.sweep
def test_an_adapter_is_merged_as_peft_does(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    expected = by_peft(adapt(base, tmp_path, **settings))
    reference = beside(base, tmp_path)
    assert published_part(reference) is None  # nothing is to be downloaded
    encoder, plain = load_encoder(reference), load_encoder(str(base))
    assert relative_error(encoder.encode(SEQUENCES), expected) < 1e-5
    assert relative_error(plain.encode(SEQUENCES), expected) > 1e-3
    assert encoder.spec.weights_sha256 != plain.spec.weights_sha256
    heads = {name.split(".")[0] for name in load_checkpoint(reference).left_out}
    assert heads == ({"classifier"} if "kind" in settings else set())


def test_an_embedding_that_is_saved_too_may_be_padded(base: Path, tmp_path: Path) -> None:
    import transformers

    padded = tmp_path / "padded"
    network = transformers.EsmModel.from_pretrained(base)
    network.resize_token_embeddings(33, pad_to_multiple_of=64)
    network.save_pretrained(padded)
    settings = {"modules_to_save": ["word_embeddings"]}
    expected = by_peft(adapt(padded, tmp_path / "adapter", **settings))
    encoder = load_encoder(beside(padded, tmp_path / "adapter"))
    assert relative_error(encoder.encode(SEQUENCES), expected) < 1e-5


def test_the_digest_is_of_all_that_is_merged(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path)
    reference = beside(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load((tmp_path / "adapter_model.safetensors").read_bytes())
    name = sorted(tensors)[-1]
    digests = {load_checkpoint(reference).sha256()}
    save_file(tensors | {name: tensors[name] + 1e-6}, tmp_path / "adapter_model.safetensors")
    digests.add(load_checkpoint(reference).sha256())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    digests.add(load_checkpoint(reference).sha256())
    (tmp_path / "adapter_config.json").unlink()
    digests.add(load_checkpoint(reference).sha256())
    assert len(digests) == 4
    assert load_checkpoint(str(base)).sha256() in digests


def test_an_adapter_of_older_versions_is_read(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path)
    reference = beside(base, tmp_path)
    expected = load_checkpoint(reference).sha256()
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load(file.read_bytes()), tmp_path / "adapter_model.bin")
    file.unlink()
    assert load_checkpoint(reference).sha256() == expected


@pytest.mark.slow
def test_a_published_base_is_taken_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is looked up; a path is never followed, for an adapter may be a stranger's."""
    network = random_network(6, 320, 20)
    here = Path(save_huggingface(network, tmp_path / "base"))
    expected = by_peft(adapt(here, tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    with pytest.raises(ModelError, match=r"base model, '/.*beside it"):
        load_checkpoint(str(tmp_path / "adapter"))
    named = {"base_model_name_or_path": "facebook/esm2_t6_8M_UR50D"}
    file.write_text(json.dumps(config | named))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("config.json", "README.md"):  # as such repositories often have
        (tmp_path / "adapter" / name).write_text((here / "config.json").read_text())
    assert published_part(str(tmp_path / "adapter")) == "esm2_t6_8M_UR50D"
    planned = plan(VIRAL_PROTEINS, Settings(model=str(tmp_path / "adapter")))  # no download
    assert (planned.is_measured, planned.embedding_bytes) == (False, 300 * 320 * 4)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    save_network(network, tmp_path / "hub" / "checkpoints" / "esm2_t6_8M_UR50D.pt")
    encoder = load_encoder(str(tmp_path / "adapter"))
    assert relative_error(encoder.encode(SEQUENCES), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3'; only LoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "damaged"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"use_something_of_the_future": True}, "use_something_of_the_future True"),
        ({"use_dora": True}, "the adapter has lora_A, lora_B for"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    change: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    adapt(base, tmp_path)
    reference = beside(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message) as caught:
        load_checkpoint(reference)
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = Path(save_huggingface(random_network(3, 32, 4), tmp_path / "other"))
    adapt(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="for another base model: layers"):
        load_checkpoint(beside(other, tmp_path / "adapter"))


def first(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return next(name for name in tensors if name.endswith(f"{kind}.weight"))


def without(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if name != first(tensors, kind)}


def other_trunk(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A second ESM-2 beside the first, whose names are the same from some point on."""
    return tensors | {name.replace("encoder", "other.encoder", 1): t for name, t in tensors.items()}


def fair_esms_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("encoder.layer", "layers"): t for name, t in tensors.items()}


def with_another(name: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors | {f"base_model.model.{name}": tensor}


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: without(tensors, "lora_A"), r"the adapter has lora_B for encoder\.layer"),
        (lambda tensors: without(tensors, "lora_B"), r"the adapter has lora_A for encoder\.layer"),
        (
            lambda tensors: tensors | {first(tensors, "lora_A"): torch.ones(3, 64)},
            "parts of layers.* do not match",
        ),
        (
            lambda tensors: tensors | {first(tensors, "lora_A"): torch.ones(4, 64).long()},
            r"down is torch\.int64, not floating-point",
        ),
        (other_trunk, "changes 2 ESM-2 models"),
        (fair_esms_names, r"changes 0 ESM-2 models; it has layers\.0"),
        (with_another(f"{QUERY}.odd", torch.ones(2)), r"another base model: layers\.0\.\S+\.odd"),
        (
            with_another("embeddings.word_embeddings.lora_embedding_A", torch.ones(4, 33)),
            "word_embeddings.lora_embedding_A, which cannot",
        ),
        (
            with_another(f"{QUERY}.lora_magnitude_vector", torch.ones(64)),
            "lora_magnitude_vector for",
        ),
    ],
)
def test_an_adapter_that_is_odd_is_refused(
    change: Any, message: str, base: Path, tmp_path: Path
) -> None:
    adapt(base, tmp_path)
    reference = beside(base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    changed = {name: tensor.clone() for name, tensor in change(load(file.read_bytes())).items()}
    save_file(changed, file)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(reference)


def test_an_adapter_without_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path)
    reference = beside(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match=r"neither adapter_model\.safetensors nor"):
        load_checkpoint(reference)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize("stem", ["adapter_model", "pytorch_model"])
def test_a_strangers_pickle_runs_nothing(
    stem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    adapt(base, folder)
    reference = beside(base, folder)
    healthy = {"adapter_model": "adapter_model", "pytorch_model": "model"}[stem]
    (folder / f"{healthy}.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Canary()}, folder / f"{stem}.bin")
    with pytest.raises(ModelError, match="refused"):
        load_checkpoint(reference)
    assert not (tmp_path / "canary").exists()
    torch.load(folder / f"{stem}.bin", weights_only=False)
    assert (tmp_path / "canary").exists()  # it would have sung


def test_a_run_says_what_it_leaves_out_and_workers_merge_too(
    base: Path, tmp_path: Path, client: Any
) -> None:
    adapt(base, tmp_path / "a", kind="EsmForSequenceClassification", task_type="SEQ_CLS")
    reference = beside(base, tmp_path / "a")
    inputs = tmp_path / "in.faa"
    inputs.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(SEQUENCES)))
    seen: list[Any] = []
    summary = virnuc_dask.run(
        inputs, tmp_path / "out.zarr", model=reference, client=client, listener=seen.append
    )
    assert summary.exit_code == 0
    (read,) = (event for event in seen if isinstance(event, events.ModelChosen))
    assert list(_notice(read)) == [
        f"model: {reference}, weights {summary.model.weights_sha256[:12]}, layer 3, mean pooling,"
        " float32 on cpu",
        f"note: the LoRA adapter in {reference} is merged with its base model",
        f"note: {reference} also holds 4 tensors that ESM-2 does not have (classifier); ignored",
    ]
    expected = load_encoder(reference).encode(SEQUENCES)
    found = virnuc_dask.open_store(tmp_path / "out.zarr").embedding.values
    assert relative_error(found, expected) < 1e-5
