"""A PEFT folder of LoRA or DoRA as matrices with their factors, by PEFT's rules."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from qratk.adapters.base import Adapters

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Pair:
    """What an adapter does to the weight of a projection.

    Attributes:
        a: (rank, d_in), as stored.
        b: (d_out, rank), as stored.
        scaling: factor of B A.
        magnitude: (d_out,), the lengths of the rows of the sum (DoRA); None for none.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Its rank."""
        return len(self.a)

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The adapted weight (d_out, d_in) float32."""
        adapted = weight.float() + self.scaling * (self.b.float() @ self.a.float()).to(weight.device)
        if self.magnitude is None:
            return adapted
        scale = self.magnitude.float().to(weight.device) / torch.linalg.vector_norm(adapted, dim=1)
        rescaled: torch.Tensor = scale[:, None] * adapted
        return rescaled


def read_pairs(folder: Path) -> dict[str, Pair]:
    """Pairs by the qualified name of their projection."""
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = {name.removeprefix(PREFIX): t for name, t in load_file(folder / TENSORS).items()}
    found: dict[str, Pair] = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        projection = name.removesuffix(".lora_A.weight")
        magnitude = tensors.get(f"{projection}.lora_magnitude_vector")
        found[projection] = Pair(a, tensors[f"{projection}.lora_B.weight"], _scaling(config, projection), magnitude)
    return found


def put_pairs(adapters: Adapters, pairs: Mapping[str, Pair]) -> None:
    """Give adapters, of LoRA or DoRA, the matrices of a folder, each at its own rank, and none where there are none.

    Raises `ConfigurationError` for a projection that is not there, or a factor that is not that of the options.
    """
    group, state = adapters.options.input_group, {}
    if unknown := sorted(pairs.keys() - adapters.banks.keys()):
        raise ConfigurationError(f"the adapter is of another model: it has no projection {unknown[0]!r}")
    for name in adapters.banks:
        pair = pairs.get(name)
        adapters.reset(name, 0 if pair is None else pair.rank, seed=0)
        if pair is None:
            continue
        expected = adapters.options.scaling(pair.rank)
        if not math.isclose(pair.scaling, expected, rel_tol=1e-6):
            raise ConfigurationError(
                f"the adapter of {name!r} has the factor {pair.scaling:g}, and the settings say {expected:g}: they "
                "are of another training; give the settings that it was trained with"
            )
        state[f"{name}.lora_A.weight"] = pair.a[:, ::group].float()
        state[f"{name}.lora_B.weight"] = pair.b.float()
        if pair.magnitude is not None:
            state[f"{name}.lora_magnitude_vector.weight"] = pair.magnitude.float()
    adapters.load(state)


def padded(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs at the largest rank of them, with zeros, and with their factors in B, so that all have factor 1.

    A factor that is a power of two changes exponents alone; for any other, B is in float32.
    """
    rank = max(pair.rank for pair in pairs.values())
    found = {}
    for name, pair in pairs.items():
        lacking = rank - pair.rank
        exact = math.frexp(pair.scaling)[0] == 0.5
        b = pair.b.float() * pair.scaling
        b = b.to(pair.b.dtype) if exact else b
        a = torch.nn.functional.pad(pair.a, (0, 0, 0, lacking))
        found[name] = Pair(a, torch.nn.functional.pad(b, (0, lacking)), 1.0, pair.magnitude)
    return found


def write_padded(folder: Path, target: Path, *, base: str | None) -> None:
    """Write a PEFT folder anew with one rank for all projections; `base` names the model that it belongs on."""
    from safetensors.torch import save_file

    pairs = padded(read_pairs(folder))
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rank = next(iter(pairs.values())).rank
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    if base is not None:
        config["base_model_name_or_path"] = base
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
        if pair.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / TENSORS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def name_base(folder: Path, base: str) -> None:
    """Say in a PEFT folder which model it belongs on."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scaling(config: dict[str, Any], projection: str) -> float:
    from peft.utils.other import get_pattern_key

    def pattern(which: str, default: float) -> float:
        patterns: dict[str, float] = config.get(which) or {}
        return patterns.get(get_pattern_key(list(patterns), projection), default)

    rank, alpha = pattern("rank_pattern", config["r"]), pattern("alpha_pattern", config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
