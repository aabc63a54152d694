"""MLX's form for mlx-lm: codes with a scale and a lowest value a group, bits by layer, and the adapter beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters._grids import (
    ADAPTER,
    CURE,
    holds,
    refuse_dora,
    require_bits,
    rounded_to,
    scale_dtype,
    written_dense,
    written_tensors,
)
from qratk.exporters.base import EXACT, Exporter, Holding, Serving, exporters, grid_of, has_adapter, plain_lora

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.exporters.base import Packing, Wanted
    from qratk.quantizers.base import AffineGrid

MlxType = Literal["auto", "float16", "bfloat16", "float32"]
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapters.safetensors"
_GROUPS: Final = (128, 64, 32)
_FAMILIES: Final = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@exporters.register("mlx")
class MlxExporter(Exporter):
    """A folder for `mlx_lm`: w = scale * code + lowest value, for each group of 32, 64 or 128 weights of a row.

    The lowest value is -zero * scale, rounded to the type of the model (to float16 .05 % of it, to float32 hardly);
    where zero points are a power of two, as symmetric ones are, nothing is rounded. mlx-lm knows one rank and one scale
    of adapters: they are padded to the largest rank, with the scale in B, over the projections that have one.

    Args:
        dtype: type of scales, lowest values, embeddings and 16-bit layers; "auto" is that of the scales where they have
            16 bits, and float16 otherwise. In float32 nothing is rounded, and mlx computes in float32.
        dense_bits: write layers of this many bits or more in `dtype`; 0 for none but those of 16.
    """

    clients: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mlx": {}}

    def __init__(self, dtype: MlxType = "auto", dense_bits: int = 0) -> None:
        if dtype not in get_args(MlxType):
            raise ConfigurationError(f"dtype must be one of {get_args(MlxType)}, got {dtype!r}")
        require_bits(dense_bits)
        self.dtype, self.dense_bits = dtype, dense_bits

    @property
    def takes(self) -> str:
        """mlx-lm."""
        return "mlx-lm"

    @property
    def holds(self) -> Holding:
        """Affine codes."""
        return Holding(
            "affine, affine_gptq, gptq, hqq, int8 at 2, 3, 4 and 8 bits in groups of 32, 64 or 128 (int8 of a row), "
            "and 16; others refused; Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3",
            "LoRA (not DoRA), padded to one rank with the scale in B, as mlx-lm knows one for all",
            "codes exactly; lowest values of groups, unless symmetric, to rounding of the type; with --dtype float32 "
            "nothing is rounded",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of exact weights, or of what is rounded to the type."""
        dtype = self._dtype(backbone)
        for tensor in backbone.fixed_tensors().values():
            if not holds(dtype, tensor):
                return rounded_to(dtype)
        for name, bank in backbone.banks.items():
            grid = self._grid(name, bank)
            exact = (
                holds(dtype, bank.dequantized(bank.active, rank=bank.active_rank))
                if grid is None
                else holds(dtype, grid.scale) and holds(dtype, _lowest(grid))
            )
            if not exact or (bank.bias is not None and not holds(dtype, bank.bias)):
                return rounded_to(dtype)
        return EXACT

    def check(self, backbone: Backbone) -> None:
        """Raise `QuantizationError` or `UnsupportedModelError` for what mlx-lm has no layout of."""
        family = backbone.config.model_type
        if family not in _FAMILIES:
            raise UnsupportedModelError(
                f"how mlx-lm names and turns weights of the family {family!r} is not known here, but of {_FAMILIES}; "
                "export 'dense' and 'recipe', and convert with mlx_lm.convert and its quant_predicate"
            )
        refuse_dora(backbone, "mlx-lm")
        if all(self._grid(name, bank) is None for name, bank in backbone.banks.items()):
            raise QuantizationError("every layer would be written in 16 bits; export 'dense', which mlx-lm reads")
        self._dtype(backbone)

    def serving(self, wanted: Wanted) -> Serving:
        """Grids, groups and adapters, and the model's family."""
        refused = [*plain_lora(wanted, "mlx-lm")]
        refused += [text for packing in wanted.packings if (text := self._unserved(packing))]
        family = None if wanted.backbone is None else wanted.backbone.config.model_type
        if family is not None and family not in _FAMILIES:
            refused.append(f"how mlx-lm names weights of the family {family!r} is not known here, but of {_FAMILIES}")
        return Serving(tuple(refused), ("adapters are padded to the largest rank",))

    def _unserved(self, packing: Packing) -> str:
        """Why projections that are packed in a way are not served; empty when they are."""
        if written_dense(packing.bits, self.dense_bits):
            return ""
        if packing.form is None:
            return f"{packing} has no scales and zero points by groups of a row: give model.quantizers: portable"
        size = packing.group_size
        if size is not None and all(size % group for group in _GROUPS):
            return (
                f"{packing} has groups of {size} weights, and mlx takes 32, 64 and 128: give the quantiser another size"
            )
        return ""

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What the adapter takes."""
        if not has_adapter(backbone):
            return ()
        ranks = [rank for name in backbone.banks if (rank := backbone.adapters.rank(name))]
        return [
            f"the adapter lies in {ADAPTER} (mlx_lm: --adapter-path), padded to rank {max(ranks)}: mlx-lm knows one "
            f"rank for all, and the mean is {sum(ranks) / len(ranks):.1f}"
        ]

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write projection by projection."""
        import torch

        from qratk.exporters._folder import active_pairs, write_description
        from qratk.exporters._shards import write_shards

        dtype = self._dtype(backbone)
        modules: dict[str, dict[str, int]] = {}
        for name, bank in backbone.banks.items():
            if (grid := self._grid(name, bank)) is not None:
                modules[name] = {"group_size": grid.group_size, "bits": grid.bits}

        def packing(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]] | None:
            grid = self._grid(name, bank)
            return None if grid is None else _packed(name, grid, dtype)

        with torch.no_grad():
            write_shards(written_tensors(backbone, dtype, packing), directory)
        settings = {**next(iter(modules.values())), "mode": "affine", **modules}
        write_description(backbone, directory, dtype=dtype, more={"quantization": settings})
        if pairs := active_pairs(backbone):
            _write_adapter(pairs, directory / ADAPTER, layers=int(backbone.config.num_hidden_layers))

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """The folder, unpacked as mlx does, with the adapter as mlx-lm reads it."""
        from transformers import AutoConfig

        from qratk.exporters._mlx_reader import read_mlx, read_mlx_adapter
        from qratk.exporters._reading import reading_model

        adapter = directory / ADAPTER
        pairs = read_mlx_adapter(adapter) if adapter.exists() else {}
        config = AutoConfig.from_pretrained(directory)
        del config.quantization
        return reading_model(backbone, config, read_mlx(directory), pairs=pairs)

    def _dtype(self, backbone: Backbone) -> torch.dtype:
        import torch

        if self.dtype != "auto":
            found: torch.dtype = getattr(torch, self.dtype)
            return found
        narrow = [n for n, b in backbone.banks.items() if (g := self._grid(n, b)) and g.scale.element_size() == 2]
        return scale_dtype(backbone, narrow) if narrow else torch.float16

    def _grid(self, name: str, bank: BankLinear) -> AffineGrid | None:
        """Codes in groups of a size that mlx has; None for 16 bits. Raises `QuantizationError` where there is none."""
        variant = bank.require(bank.active, bank.active_rank)
        if written_dense(variant.bits, self.dense_bits):
            return None
        grid = grid_of(bank)
        # The groups of a grid may hold several of mlx's, which then have equal scales.
        size = None if grid is None else next((s for s in _GROUPS if grid.group_size % s == 0), None)
        if grid is None or size is None:
            quantizer = variant.quantizer.component_name or type(variant.quantizer).__name__
            raise QuantizationError(
                f"{name}: {quantizer} at {variant.bits} bits has no scales and zero points in groups of 32, 64 or 128 "
                f"weights of a row, as mlx holds; {CURE}"
                + ("" if variant.bits < 8 else ", or give --dense-bits 8 to write such layers in 16 bits")
            )
        times = grid.group_size // size
        if times == 1:
            return grid
        return replace(grid, scale=grid.scale.repeat_interleave(times, 1), zero=grid.zero.repeat_interleave(times, 1))


def _lowest(grid: AffineGrid) -> torch.Tensor:
    """What code 0 stands for, (d_out, groups) float32."""
    return -grid.zero.float() * grid.scale.float()


def _packed(name: str, grid: AffineGrid, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a projection: codes as a stream along the row in words of 32 bits, low bits first."""
    import torch

    from qratk.quantizers.bitstream import pack_words

    yield f"{name}.weight", pack_words(grid.codes, grid.bits).view(torch.uint32)
    yield f"{name}.scales", grid.scale.to(dtype)
    yield f"{name}.biases", _lowest(grid).to(dtype)


def _write_adapter(pairs: Mapping[str, Any], directory: Path, *, layers: int) -> None:
    """Write adapters of one rank as mlx-lm has them: A (d_in, rank) and B (rank, d_out), and a scale of 1."""
    from safetensors.torch import save_file

    from qratk.adapters.matrices.folder import padded

    same, tensors = padded(pairs), {}
    for name, pair in same.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = pair.a.t().contiguous(), pair.b.t().contiguous()
    directory.mkdir()
    save_file(tensors, directory / ADAPTER_TENSORS, metadata={"format": "mlx"})
    settings = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": next(iter(same.values())).rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": list(same),
        },
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
