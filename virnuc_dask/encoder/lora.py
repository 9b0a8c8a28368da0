"""LoRA adapters saved by PEFT: small changes to the weights of a base model.

Sources: Hu et al. 2021, arXiv:2106.09685; rank-stabilised LoRA, arXiv:2312.03732; DoRA,
arXiv:2402.09353; PEFT's ``tuners/lora``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virnuc_dask.encoder.huggingface import EMBEDDING, TOKENS, UNUSED, fair_esm_name, read_tensors
from virnuc_dask.encoder.memory import give_back_pages
from virnuc_dask.encoder.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_files

# The group is a tensor's name within the base model's trunk.
_TRUNK = re.compile(r"(?:^|\.)((?:encoder|embeddings)\..+)$")
_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
# Settings that `Update.applied` handles, or that merging does not depend on. Each version of PEFT
# adds settings. An unknown one is refused unless it is off.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Initialisations that do not change the base model.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Update:
    """Change of one weight matrix.

    Attributes
    ----------
    down : Tensor, shape (rank, in)
    up : Tensor, shape (out, rank)
    scale : float
    magnitude : Tensor, shape (out,), optional
        Euclidean norm of each row after the change (DoRA).
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None

    def applied(self, weight: Tensor) -> Tensor:
        """The changed matrix, float32, shape (out, in)."""
        changed: Tensor = weight.float() + (self.up.float() @ self.down.float()) * self.scale
        if self.magnitude is None:
            return changed
        magnitude = self.magnitude.float().flatten()
        changed *= (magnitude / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return changed


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes that an adapter makes. Names are those of fair-esm's files.

    Attributes
    ----------
    updates : dict of str to Update
    replaced : dict of str to Tensor
        Weights that replace the base model's, such as biases.
    left_out : tuple of str
        Tensors outside ESM-2, such as a classifier's.
    """

    updates: dict[str, Update]
    replaced: dict[str, Tensor]
    left_out: tuple[str, ...]

    def check(self, base: dict[str, Tensor]) -> None:
        """Check that the adapter fits this base model.

        Raises
        ------
        ValueError
            The adapter's tensors do not fit each other, or the base model has no such weight or
            one of another shape.
        """
        for name, tensor in self.parts().items():
            if not tensor.is_floating_point():
                raise ValueError(f"the adapter's {name} is {tensor.dtype}, not floating-point")
        shapes = {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        for name, update in self.updates.items():
            rank, into = update.down.shape
            out, other = update.up.shape
            if rank != other or (update.magnitude is not None and update.magnitude.numel() != out):
                raise ValueError(f"the shapes of the adapter's parts of {name} do not match")
            shapes[name] = (out, into)
        for name, shape in shapes.items():
            if name not in base or tuple(base[name].shape) != shape:
                raise ValueError(f"the adapter is for another base model: {name} {shape}")

    def merged(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """The base model's weights after the changes. Changed ones are in memory, as float32."""
        changed = base | self.replaced
        for name, update in self.updates.items():
            weight = changed[name]
            changed[name] = update.applied(weight)
            give_back_pages(weight)
        return changed

    def parts(self) -> dict[str, Tensor]:
        """All tensors that merging depends on, by name."""
        parts = dict(self.replaced)
        for name, update in self.updates.items():
            parts[f"{name} down"], parts[f"{name} up"] = update.down, update.up
            parts[f"{name} scale"] = torch.tensor(update.scale)
            if update.magnitude is not None:
                parts[f"{name} magnitude"] = update.magnitude
        return parts


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter. No code from it is run.

    Raises
    ------
    ValueError
        The adapter is not LoRA, or changes more than matrices and biases.
    OSError, safetensors.SafetensorError, KeyError
        Files are missing or damaged.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    _check_config(config)
    files = adapter_files(folder)[1:]
    if not files:
        raise ValueError(f"the adapter has neither {' nor '.join(ADAPTER_WEIGHTS)}")
    parts: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    replaced: dict[str, Tensor] = {}
    left_out, trunks = [], set()
    for name, tensor in read_tensors(files[0]).items():
        own = name.removeprefix("base_model.model.")
        in_trunk = _TRUNK.search(own)
        if in_trunk is None:
            if not own.removeprefix("esm.").startswith(UNUSED):
                left_out.append(own)
            continue
        trunks.add(own[: in_trunk.start(1)])
        if match := _PARTS.fullmatch(in_trunk[1]):
            target = fair_esm_name(f"{match[1]}.weight")
            parts.setdefault(str(target), {})[match[2]] = tensor
            modules[str(target)] = own[: in_trunk.start(1)] + match[1]
        elif ".lora_" in own:
            raise ValueError(f"the adapter has {own}, which cannot be merged")
        elif renamed := fair_esm_name(in_trunk[1].replace(".base_layer.", ".")):
            # The vocabulary may be padded, as in the base model.
            replaced[renamed] = tensor[:TOKENS] if renamed == EMBEDDING else tensor
    if len(trunks) != 1:
        raise ValueError(
            f"the adapter changes {len(trunks)} ESM-2 models; it has {', '.join(left_out[:3])}"
        )
    updates = {}
    required = {"lora_A", "lora_B"}
    if config.get("use_dora"):
        required.add("lora_magnitude_vector")
    for target, stored in parts.items():
        if stored.keys() != required:
            raise ValueError(
                f"the adapter has {', '.join(sorted(stored))} for {modules[target]},"
                f" not {', '.join(sorted(required))}"
            )
        down, up = stored["lora_A"], stored["lora_B"]
        scale = _scale(config, modules[target], down.shape[0])
        updates[target] = Update(down, up, scale, stored.get("lora_magnitude_vector"))
    return Adapter(updates, replaced, tuple(left_out))


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ValueError(f"the adapter is of the kind {kind!r}; only LoRA can be merged")
    for name in config.keys() - _KNOWN:
        if config[name]:
            raise ValueError(
                f"{ADAPTER_CONFIG} has {name} {config[name]!r}, which cannot be merged"
            )
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{ADAPTER_CONFIG} has init_lora_weights {config['init_lora_weights']!r}, which changes"
            " the base model; merge the adapter with PEFT, and save the result"
        )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        # PEFT accepts any regular expression. One from an untrusted file may run for ever.
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise ValueError(
                f"{ADAPTER_CONFIG} has the alpha_pattern {pattern!r}, not a module's name"
            )
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
