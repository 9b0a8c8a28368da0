"""Weights: every way in, no code run from any of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS
from models import (
    Malicious,
    checkpoint_data,
    random_network,
    random_sequences,
    save_network,
    upstream_mean,
)

from virnuc_dask.encoder import digests, weights
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.weight_files import weights_at_hand
from virnuc_dask.encoder.weights import (
    Checkpoint,
    describe,
    hashing,
    load_checkpoint,
)
from virnuc_dask.errors import InputError, ModelError
from virnuc_dask.runtime import events, prepare
from virnuc_dask.runtime.embed import get_encoder
from virnuc_dask.settings import Settings

DEMO_SHA256 = "129ce4726f6c6e07dad3f6144b3cc14977f7d3741b5620ae94edbb1de8cf17f2"


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = checkpoint_data(random_network(2, 32, 2))
    data["extra"] = Malicious(canary)
    for name, write in (("zip.pt", torch.save), ("bare.pt", _bare_pickle)):
        write(data, tmp_path / name)
        with pytest.raises(ModelError, match="refused"):
            load_checkpoint(str(tmp_path / name))
        assert not canary.exists()
    # The trap is live: reading it carelessly springs it.
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert canary.exists()


def _bare_pickle(data: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(data["extra"]))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", b"PK\x03\x04 broken", bytes(1000), b"\x80\x02."],
)
def test_a_file_that_is_no_checkpoint_is_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.pt"):
        load_checkpoint(str(path))


@pytest.mark.parametrize(
    "data", [{}, [1, 2], {"model": {}}, {"cfg": {"model": {}}, "model": {}}, torch.zeros(3), 7]
)
def test_a_torch_file_of_something_else_is_a_clear_error(data: Any, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"model\.pt"):
        load_checkpoint(str(tmp_path / "model.pt"))


def test_a_truncated_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    path = Path(save_network(random_network(2, 32, 2), tmp_path / "model.pt"))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ModelError, match=r"model\.pt"):
        load_checkpoint(str(path))


def test_a_checkpoint_without_a_layer_is_a_clear_error(tmp_path: Path) -> None:
    data = checkpoint_data(random_network(2, 32, 2))
    del data["model"]["encoder.sentence_encoder.layers.1.fc1.weight"]
    torch.save(data, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"layers\.1\.fc1\.weight"):
        load_encoder(str(tmp_path / "model.pt"))


def test_an_unknown_name_says_which_are_known() -> None:
    with pytest.raises(ModelError, match="Hugging Face directory, nor one of demo, esm2_t6_8M"):
        load_checkpoint("esm2_t7")


@pytest.mark.parametrize("name", ["esm1b_t33_650M_UR50S", "esm1v_t33_650M_UR90S_1"])
def test_other_models_of_fair_esm_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=rf"'{name}': only ESM-2 is supported: esm2_t6_8M"):
        load_checkpoint(name)


def test_the_old_file_format_is_read(tmp_path: Path) -> None:
    network = random_network(2, 32, 2)
    torch.save(checkpoint_data(network), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new = save_network(network, tmp_path / "new.pt")
    assert load_checkpoint(str(tmp_path / "old.pt")).sha256() == load_checkpoint(new).sha256()


def test_the_digest_is_of_what_an_embedding_depends_on(tmp_path: Path) -> None:
    network = random_network(2, 32, 2)
    published = checkpoint_data(network)
    plain = {**published, "model": dict(network.state_dict())}  # with contact head, no prefixes
    other_head = checkpoint_data(network)
    other_head["model"]["encoder.lm_head.bias"] = torch.ones(40)
    unscaled = checkpoint_data(network)
    unscaled["cfg"]["model"].token_dropout = False
    other = checkpoint_data(network)
    name = "encoder.sentence_encoder.layers.1.fc2.bias"
    other["model"][name] = other["model"][name] + 1e-6
    digests = []
    for number, data in enumerate((published, plain, other_head, other, unscaled)):
        torch.save(data, tmp_path / f"{number}.pt")
        digests.append(load_checkpoint(str(tmp_path / f"{number}.pt")).sha256())
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[2:])) == 3


def test_a_name_is_read_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    network = random_network(2, 320, 20)
    assert not weights_at_hand("esm2_t6_8M_UR50D")
    save_network(network, folder / "esm2_t6_8M_UR50D.pt")
    assert weights_at_hand("esm2_t6_8M_UR50D")
    sequences = random_sequences([30])
    found = load_encoder("esm2_t6_8M_UR50D").encode(sequences)
    assert np.allclose(found, upstream_mean(network, sequences), atol=1e-4)


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_URL", "http://127.0.0.1:9/{}.pt")  # refuses, for real
    with pytest.raises(
        ModelError, match=r"to .*esm2_t6_8M_UR50D\.pt .*put the file there.*--model demo"
    ):
        load_checkpoint("esm2_t6_8M_UR50D")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_download_goes_into_the_cache_under_upstreams_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    save_network(random_network(2, 320, 20), served / "esm2_t6_8M_UR50D.pt")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=served,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(weights, "_URL", f"http://127.0.0.1:{port}/{{}}.pt")
        checkpoint = load_checkpoint("esm2_t6_8M_UR50D")
    finally:
        server.kill()
        server.wait()
    assert checkpoint.dimension == 320
    assert (tmp_path / "home/hub/checkpoints/esm2_t6_8M_UR50D.pt").is_file()


def test_a_download_that_breaks_off_is_no_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch takes a connection that ends early for the end of the file; so is half a file here.
    half = tmp_path / "esm2_t6_8M_UR50D.pt"
    save_network(random_network(2, 320, 20), half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "_URL", f"file://{tmp_path}/{{}}.pt")
    with pytest.raises(ModelError, match="cannot download"):
        load_checkpoint("esm2_t6_8M_UR50D")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_demo_weights_never_change() -> None:
    assert describe(load_checkpoint("demo")).weights_sha256 == DEMO_SHA256


# --- the digest, made beside other work ---


def test_a_digest_is_the_same_beside_other_work(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_network(random_network(2, 32, 4), tmp_path / "model.pt"))
    with hashing(checkpoint) as digest:
        assert digest.result() == describe(checkpoint).weights_sha256
    assert describe(checkpoint, hashed=False).weights_sha256 == ""


def test_a_digest_that_nobody_wants_any_more_is_given_up() -> None:
    checkpoint = load_checkpoint("demo")
    given_up = threading.Event()
    given_up.set()
    assert checkpoint.sha256(given_up) == ""
    kept: list[Any] = []

    def leave() -> None:
        with hashing(_Endless("demo", {})) as digest:
            kept.append(digest)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert kept[0].result(timeout=0) == "given up"


class _Endless(Checkpoint):
    """Weights so large that only giving up ends the hashing."""

    def sha256(self, given_up: threading.Event | None = None) -> str:
        assert given_up
        assert given_up.wait(60)
        return "given up"


def test_input_is_read_while_weights_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the largest models that takes minutes: what is wrong with an input is said before."""
    model = save_network(random_network(2, 32, 4), tmp_path / "model.pt")
    expected = load_checkpoint(model).sha256()
    monkeypatch.setattr(digests, "recall", lambda _files: None)
    monkeypatch.setattr(prepare, "_PROMPT_S", 0.0)
    has_read, own_sha256 = threading.Event(), Checkpoint.sha256
    seen: list[events.Event] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.Reading):
            has_read.set()

    def sha256_afterwards(self: Checkpoint, given_up: threading.Event | None = None) -> str:
        assert has_read.wait(60)
        return own_sha256(self, given_up)

    monkeypatch.setattr(Checkpoint, "sha256", sha256_afterwards)
    for _ in range(2):  # making the store, and comparing it
        has_read.clear()
        seen.clear()
        store, spec = prepare.prepare(VIRAL_PROTEINS, tmp_path / "a.zarr", Settings(model), listen)
        kinds = [type(event) for event in seen]
        assert kinds == [events.Reading, events.ModelChosen, events.InputRead]
        assert store.identity.weights_sha256 == spec.weights_sha256 == expected
        (chosen,) = (event for event in seen if isinstance(event, events.ModelChosen))
        assert chosen.model == spec
    bad = tmp_path / "bad.faa"
    bad.write_text("no header\n")
    monkeypatch.setattr(Checkpoint, "sha256", _Endless.sha256)
    with pytest.raises(InputError):
        prepare.prepare(bad, tmp_path / "b.zarr", Settings(model), listen)
    assert not (tmp_path / "b.zarr").exists()


def test_a_model_of_another_shape_is_refused_for_its_weights(tmp_path: Path) -> None:
    path = save_network(random_network(2, 32, 4), tmp_path / "model.pt")
    spec = describe(load_checkpoint("demo"))
    with pytest.raises(ModelError, match="this worker has weights"):
        get_encoder(replace(spec, reference=path, repr_layer=2))
