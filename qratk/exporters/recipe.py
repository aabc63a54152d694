"""Bits and ranks alone, in the words of other tools, for whoever quantises or trains with these."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qratk.core.errors import ConfigurationError, UnsupportedModelError
from qratk.exporters.base import Exporter, Holding, exporters, grid_of, has_adapter

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone

PEFT, START, AXOLOTL = "peft.json", "start", "axolotl.yaml"
LLAMA, MLX, AUTO_ROUND = "llama_tensor_types.txt", "mlx_predicate.py", "auto_round.json"
_LLAMA_TYPES: Final = {2: "q2_k", 3: "q3_k", 4: "q4_k", 8: "q8_0", 16: "bf16"}
_GROUPS: Final = (32, 64, 128)
_PREDICATE: Final = '''"""Bits by layer for `mlx_lm.convert(..., quantize=True, quant_predicate=quant_predicate)`."""

BITS = {bits}


def quant_predicate(path, module, config=None):
    """Bits and size of groups of a module; False where it stays as it is."""
    return BITS.get(path, False)
'''


@exporters.register("recipe")
class RecipeExporter(Exporter):
    """Bits and ranks by layer for other trainers and quantisers: what they make is another model than was scored.

    `peft.json` (options of PEFT's `LoraConfig`), `start` (an adapter of these ranks without effect yet, for trainers
    that go on from one), `axolotl.yaml` (which does), `llama_tensor_types.txt` (`llama-quantize --tensor-type-file`),
    `mlx_predicate.py`, `auto_round.json` (`layer_config`).

    Args:
        seed: of the matrices A in `start`.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @property
    def takes(self) -> str:
        """Trainers and quantisers."""
        return "PEFT, Axolotl, llama-quantize, mlx-lm and auto-round, which quantise and train anew"

    @property
    def holds(self) -> Holding:
        """Bits and ranks."""
        return Holding(
            "bits by layer, of every quantiser; no weights",
            "ranks and scales by projection; no trained weights",
            "nothing: other codes, and a training of its own",
        )

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigurationError` where one of the tools has no such bits."""
        for name, bank in backbone.banks.items():
            bits = bank.require(bank.active, bank.active_rank).bits
            if bits not in _LLAMA_TYPES:
                raise ConfigurationError(f"{name} has {bits} bits, and a recipe tells {tuple(_LLAMA_TYPES)}")

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What is left out."""
        notes = []
        if not has_adapter(backbone):
            notes.append("every layer has rank 0, so that there is nothing for trainers")
        if self._tensor_types(backbone) is None:
            notes.append(f"{LLAMA} is left out: no names of llama.cpp are known here for this family")
        return notes

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write the files."""
        bits = {n: bank.require(bank.active, bank.active_rank).bits for n, bank in backbone.banks.items()}
        groups = {name: _group(backbone, name) for name in backbone.banks}
        packed = {name: {"group_size": groups[name], "bits": b} for name, b in bits.items() if b < 16}
        (directory / MLX).write_text(_PREDICATE.format(bits=_literal(packed)), encoding="utf-8")
        symmetric = {name: _symmetric(backbone, name) for name in backbone.banks}
        layers = {
            name: {"bits": 16} if b >= 16 else {"bits": b, "group_size": groups[name], "sym": symmetric[name]}
            for name, b in bits.items()
        }
        _write_json(directory / AUTO_ROUND, layers)
        if (types := self._tensor_types(backbone)) is not None:
            (directory / LLAMA).write_text("".join(f"{line}\n" for line in types), encoding="utf-8")
        if has_adapter(backbone):
            self._write_training(backbone, directory)

    def _write_training(self, backbone: Backbone, directory: Path) -> None:
        import yaml

        from qratk.adapters.matrices.drawing import initial_weights
        from qratk.adapters.matrices.factors import expanded
        from qratk.adapters.matrices.layers import write

        config, options = backbone.adapters.peft_config(), backbone.adapters.options
        config.use_dora = False
        told: dict[str, Any] = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "target_modules": sorted(config.target_modules or ()),
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        _write_json(directory / PEFT, told)
        tensors = {}
        for name, bank in backbone.banks.items():
            if rank := backbone.adapters.rank(name):
                a, b = initial_weights(name, bank.shape, rank, options, seed=self.seed, factors=None)
                tensors[f"{name}.lora_A.weight"] = expanded(a, options.input_group).to(options.torch_dtype)
                tensors[f"{name}.lora_B.weight"] = b.to(options.torch_dtype)
        write(directory / START, tensors, config)
        model = str(getattr(backbone.config, "_name_or_path", "") or "MODEL")
        document = {
            "base_model": model,
            "adapter": "lora",
            "lora_model_dir": f"./{START}",  # Axolotl has no patterns of ranks, and goes on from an adapter that has
            "lora_r": config.r,
            "lora_alpha": int(config.lora_alpha),
            "lora_dropout": config.lora_dropout,
            "lora_target_modules": sorted({name.rpartition(".")[2] for name in told["target_modules"]}),
        }
        (directory / AXOLOTL).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")

    def _tensor_types(self, backbone: Backbone) -> list[str] | None:
        """Lines of a pattern and a type each; None for a family whose names are not known."""
        from qratk.exporters._gguf_architecture import architecture_of

        try:
            architecture = architecture_of(backbone.config)
            names = {name: architecture.tensor_name(f"{name}.weight") for name in backbone.banks}
        except UnsupportedModelError:
            return None
        return [
            f"^{re.escape(names[name])}$={_LLAMA_TYPES[bank.require(bank.active, bank.active_rank).bits]}"
            for name, bank in backbone.banks.items()
        ]


def _group(backbone: Backbone, name: str) -> int:
    """The size of groups that other tools know, nearest to that of a projection's codes; 64 where there is none."""
    grid = grid_of(backbone.banks[name])
    size = 64 if grid is None else grid.group_size
    return min(_GROUPS, key=lambda group: abs(group - size))


def _symmetric(backbone: Backbone, name: str) -> bool:
    grid = grid_of(backbone.banks[name])
    return grid is not None and grid.symmetric


def _literal(values: Mapping[str, Mapping[str, int]]) -> str:
    lines = [f"    {json.dumps(name)}: {json.dumps(value)},\n" for name, value in values.items()]
    return "{\n" + "".join(lines) + "}"


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
