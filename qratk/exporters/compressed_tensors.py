"""compressed-tensors' `pack-quantized` form: the codes as they were scored, for vLLM and transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, get_args

from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters._grids import (
    ADAPTER,
    CURE,
    read_folder,
    refuse_dora,
    require_bits,
    require_named_files,
    rounding,
    scale_dtype,
    write_folder,
    written_dense,
)
from qratk.exporters.base import Exporter, Holding, Serving, exporters, grid_of, has_adapter, plain_lora

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.exporters.base import Packing, Wanted

Client = Literal["vllm", "vllm-cpu", "transformers"]
_GROUPS: Final = (32, 64, 128)  # that vLLM's kernels multiply by


@exporters.register("compressed-tensors")
class CompressedTensorsExporter(Exporter):
    """A Hugging Face folder of packed codes, with bits by layer, and the adapter for PEFT beside it in `adapter`.

    A group of layers of equal bits, group size and symmetry is a group of `config_groups`, whose targets are the names
    of the projections; 16-bit layers are in none. 3-bit codes go in a container of 4 bits: the readers' releases
    differ in how they pack 3 (compressed-tensors 0.17 has ten in a word, others a stream).

    Args:
        client: what will read it. "vllm" and "vllm-cpu" multiply q, k and v, and gate and up, at once, so that these
            must share bits and groups. "vllm-cpu" has kernels for 4 bits alone: codes of 2 go in a container of 4, and
            8-bit layers are written in 16 bits. "transformers" takes every projection by itself.
        dense_bits: write layers of this many bits or more in 16 bits; 0 for none but those of 16.
        pad: one rank for all projections of the adapter, with the scale in B.
    """

    clients: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: {"client": name} for name in get_args(Client)}

    def __init__(self, client: Client = "vllm", dense_bits: int = 0, pad: bool = False) -> None:
        if client not in get_args(Client):
            raise ConfigurationError(f"client must be one of {get_args(Client)}, got {client!r}")
        require_bits(dense_bits)
        self.client, self.dense_bits, self.pad = client, dense_bits, pad

    @property
    def takes(self) -> str:
        """vLLM and transformers."""
        return "vLLM, and transformers with compressed-tensors 0.17"

    @property
    def holds(self) -> Holding:
        """Affine codes with whole zero points."""
        return Holding(
            "affine, affine_gptq, gptq at 2, 3 (in 4), 4 and 8 bits, and 16: the very codes; others refused",
            "LoRA (not DoRA), as a PEFT folder beside it, a rank for each projection; with --pad one rank",
            "codes, scales and zero points exactly; what is in 16 bits, to rounding",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of exact weights, or of the type of scales where what has 16 bits is rounded to it."""
        schemes = self._schemes(backbone)
        return rounding(backbone, _dtype(backbone, schemes), {name: s is None for name, s in schemes.items()})

    def _schemes(self, backbone: Backbone) -> dict[str, Scheme | None]:
        return {name: self._scheme(name, bank) for name, bank in backbone.banks.items()}

    def check(self, backbone: Backbone) -> None:
        """Raise `QratkError` for codes or a model that the form cannot hold, or that the client cannot multiply by."""
        require_named_files(backbone)
        refuse_dora(backbone, "vLLM")
        if turned := _turned(backbone):
            raise UnsupportedModelError(f"{turned}; export 'gptq' or 'dense'")
        schemes = self._schemes(backbone)
        if not any(schemes.values()):
            raise QuantizationError("every layer would be written in 16 bits; export 'dense'")
        _dtype(backbone, schemes)
        if self.client != "transformers":
            _check_fused(schemes)

    def serving(self, wanted: Wanted) -> Serving:
        """Granularity, grids, groups and adapters, and the names of the model's files."""
        from qratk.exporters._folder import is_converted

        refused = list(plain_lora(wanted, self.client))
        if self.client != "transformers" and wanted.granularity == "linear":
            refused.append(
                f"{self.client} multiplies by q, k and v, and by gate and up, at once, and model.granularity: linear "
                "gives them bits of their own: give fused, sublayer or block"
            )
        refused += [text for packing in wanted.packings if (text := self._unserved(packing))]
        scales = {packing.form.scale_dtype for packing in wanted.packings if packing.form is not None}
        if len(scales) > 1:
            refused.append(
                f"scales are of several types ({', '.join(sorted(scales))}), and a served model has one: give all "
                "quantisers the same metadata_dtype"
            )
        if wanted.backbone is not None and is_converted(wanted.backbone):
            refused.append(f"files of {type(wanted.backbone.base).__name__} are not named as its projections")
        if wanted.backbone is not None and (turned := _turned(wanted.backbone)):
            refused.append(turned)
        small, cpu = [b for b in wanted.quantizers if b < 4], self.client == "vllm-cpu"
        noted = [f"{b}-bit codes take 4 bits" for b in small if cpu or b == 3]
        noted += [f"{b}-bit layers are written in 16 bits" for b in wanted.quantizers if cpu and 4 < b < 16]
        return Serving(tuple(refused), tuple(noted))

    def _unserved(self, packing: Packing) -> str:
        """Why projections that are packed in a way are not served; empty when they are."""
        if packing.bits >= 16 or (self.client == "vllm-cpu" and packing.bits > 4):
            return ""
        form, size = packing.form, packing.group_size
        if form is None or not form.whole or form.scale_dtype == "float32":
            return (
                f"{packing} has no 16-bit scales with whole zero points in groups of a row: give model.quantizers: "
                "portable"
            )
        if self.client != "transformers" and size is not None and size not in _GROUPS:
            return (
                f"{packing} has groups of {size} weights, and {self.client} takes {', '.join(map(str, _GROUPS))}: give "
                "the quantiser group_size: 64, or 32 where rows do not divide by 64"
            )
        if self.client == "vllm-cpu" and packing.shape is not None and any(side % 32 for side in packing.shape):
            d_out, d_in = packing.shape
            return f"{packing} is {d_out} x {d_in}, and vLLM's 4-bit kernel for CPUs takes sides that divide by 32"
        return ""

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What it takes to be read."""
        dtype = _dtype(backbone, self._schemes(backbone))
        name = str(dtype).removeprefix("torch.")
        notes = [f"scales are {name}: serve with --dtype {name}, another one rounds them"]
        if has_adapter(backbone):
            largest = max(backbone.adapters.rank(n) for n in backbone.banks)
            notes.append(f"the adapter lies in {ADAPTER}; its largest rank is {largest} (vLLM: --max-lora-rank)")
        return notes

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write projection by projection."""
        schemes = self._schemes(backbone)
        dtype = _dtype(backbone, schemes)

        def packing(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]] | None:
            scheme = schemes[name]
            return None if scheme is None else _packed(name, bank, scheme)

        write_folder(backbone, directory, dtype, packing, _settings(schemes), pad=self.pad)

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """The folder, unpacked as compressed-tensors does, with the adapter beside it."""
        from qratk.exporters._compressed_reader import read_compressed

        packed = [name for name, scheme in self._schemes(backbone).items() if scheme is not None]
        return read_folder(backbone, directory, read_compressed(directory), packed)

    def _scheme(self, name: str, bank: BankLinear) -> Scheme | None:
        """How a projection is packed; None for 16 bits. Raises `QuantizationError` where it cannot be."""
        variant = bank.require(bank.active, bank.active_rank)
        if written_dense(variant.bits, self.dense_bits):
            return None
        if self.client == "vllm-cpu" and variant.bits > 4:
            return None
        grid = grid_of(bank)
        quantizer = variant.quantizer.component_name or type(variant.quantizer).__name__
        if grid is None or not grid.whole or grid.scale.element_size() != 2:
            raise QuantizationError(
                f"{name}: {quantizer} at {variant.bits} bits has no 16-bit scales with whole zero points in groups of "
                f"a row, as compressed-tensors holds; {CURE}"
                + ("" if variant.bits < 8 else ", or give --dense-bits 8 to write such layers in 16 bits")
            )
        d_out, d_in = bank.shape
        container = 4 if variant.bits == 3 or self.client == "vllm-cpu" else variant.bits
        if self.client == "vllm-cpu" and (d_out % 32 or d_in % 32 or grid.group_size % 2):
            raise QuantizationError(
                f"{name}: vLLM's 4-bit kernel for CPUs takes sides that divide by 32 and even groups, not {d_out} x "
                f"{d_in} in groups of {grid.group_size}; export 'dense'"
            )
        return Scheme(container, grid.group_size, grid.symmetric and container == variant.bits)


class Scheme(NamedTuple):
    """How a projection is packed: bits of the container, size of a group, and whether there are no zero points."""

    bits: int
    group_size: int
    symmetric: bool


def _dtype(backbone: Backbone, schemes: Mapping[str, Scheme | None]) -> torch.dtype:
    return scale_dtype(backbone, (name for name, scheme in schemes.items() if scheme is not None))


def _check_fused(schemes: Mapping[str, Scheme | None]) -> None:
    """Raise `QuantizationError` where projections that are multiplied at once are packed in different ways."""
    from qratk.backbone.fused import fused_groups

    for first, *others in fused_groups(schemes).values():
        for other in others:
            if schemes[other] != schemes[first]:
                raise QuantizationError(
                    f"{first} and {other} are packed in different ways ({_told(schemes[first])}, "
                    f"{_told(schemes[other])}), and vLLM multiplies by both at once; search with model.granularity: "
                    "fused, sublayer or block, or give --client transformers"
                )


def _turned(backbone: Backbone) -> str:
    """Why a model like GPT-2 cannot be held, whose projections are `Conv1D` of transformers; empty for others."""
    from qratk.exporters._skeleton import is_turned

    name = next(filter(is_turned(backbone), backbone.banks), None)
    return "" if name is None else f"{name} is a Conv1D, and compressed-tensors packs nn.Linear alone"


def _told(scheme: Scheme | None) -> str:
    return "16 bits" if scheme is None else f"{scheme.bits} bits in groups of {scheme.group_size}"


def _packed(name: str, bank: BankLinear, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a projection: unsigned codes and zero points, from which the form's offset cancels.

    A symmetric weight has no zero points stored: they are the offset itself, half of the range.
    """
    import torch

    from qratk.quantizers.bitstream import pack_words

    grid = grid_of(bank)
    assert grid is not None
    yield f"{name}.weight_packed", pack_words(grid.codes, scheme.bits)
    yield f"{name}.weight_scale", grid.scale
    yield f"{name}.weight_shape", torch.tensor(bank.shape, dtype=torch.int64)
    if not scheme.symmetric:
        zero = grid.zero.to(torch.uint8)
        yield f"{name}.weight_zero_point", pack_words(zero.t().contiguous(), scheme.bits).t().contiguous()


def _settings(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            groups.setdefault(scheme, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, (scheme, names) in enumerate(sorted(groups.items()))
        },
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
