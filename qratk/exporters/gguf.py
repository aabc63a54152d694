"""GGUF for llama.cpp and Ollama: a type for each tensor by the bits of its layer, the adapter in a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters._grids import require_bits, written_dense
from qratk.exporters.base import EXACT, Exporter, Holding, Serving, exporters, grid_of, has_adapter, plain_lora

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.adapters.matrices.folder import Pair
    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.exporters._gguf_architecture import Architecture
    from qratk.exporters._gguf_blocks import Kind
    from qratk.exporters._gguf_file import Entry, Value
    from qratk.exporters.base import Packing as Way
    from qratk.exporters.base import Wanted
    from qratk.quantizers.base import AffineGrid

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
_ROUNDED: Final = 0.02  # a whole model of weights in float16
_CURE: Final = "search with quantisers that servers read (model.quantizers: portable)"


@exporters.register("gguf")
class GgufExporter(Exporter):
    """`model.gguf`, `adapter.gguf` for `--lora`, and a `Modelfile` for Ollama.

    Codes keep their values, in the smallest type that holds them and their zero points: Q4_0 where all lie within 8 of
    the zero point (2 and 3 bits, or symmetric 4), Q4_1 at 4 bits, Q8_0 at 8. In Q4_1 the lowest value of a group,
    -zero * scale, is rounded to float16 (.02 % of it); `exact` takes Q5_0 there, which rounds nothing where scales are
    float16. Embeddings and 16-bit layers keep their 16 bits, norms are in float32. The adapter has a rank for each
    projection, in float32.

    Args:
        exact: 4-bit codes with zero points in 5 bits, by which their weights are exact.
        dense_bits: write layers of this many bits or more in float16; 0 for none but those of 16.
        pre_tokenizer: llama.cpp's name for what cuts texts before byte pairs are joined; "auto" goes by the patterns of
            the tokenizer.
    """

    clients: ClassVar[Mapping[str, Mapping[str, Any]]] = {"llama.cpp": {}, "ollama": {}}

    def __init__(self, exact: bool = False, dense_bits: int = 0, pre_tokenizer: str = "auto") -> None:
        require_bits(dense_bits)
        self.exact, self.dense_bits, self.pre_tokenizer = exact, dense_bits, pre_tokenizer

    @property
    def takes(self) -> str:
        """llama.cpp and Ollama."""
        return "llama.cpp and Ollama"

    @property
    def holds(self) -> Holding:
        """Affine codes."""
        return Holding(
            "affine, affine_gptq, gptq, hqq at 2, 3 and 4 bits; 8 bits symmetric or int8; 16; others with "
            "--dense-bits; Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3",
            "LoRA (not DoRA), a rank for each projection, in a file of its own",
            "codes exactly; at 4 bits lowest values are rounded to float16, with --exact not; llama.cpp's kernels for "
            "CPUs round activations to 8 bits",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of exact weights, or of rounding to float16."""
        rounded = any(self._packing(name, bank).rounds for name, bank in backbone.banks.items())
        matrices = (tensor for tensor in backbone.fixed_tensors().values() if tensor.dim() > 1)
        return _ROUNDED if rounded or not all(_narrow(tensor) is not None for tensor in matrices) else EXACT

    def check(self, backbone: Backbone) -> None:
        """Raise `QuantizationError` or `UnsupportedModelError` for what llama.cpp has no layout of."""
        from qratk.exporters._gguf_architecture import architecture_of
        from qratk.exporters._gguf_tokenizer import tokenizer_metadata

        architecture = architecture_of(backbone.config)
        for name in backbone.fixed_tensors():
            architecture.tensor_name(name)
        for name, bank in backbone.banks.items():
            architecture.tensor_name(f"{name}.weight")
            self._packing(name, bank)
        tokenizer_metadata(backbone.tokenizer, int(backbone.config.vocab_size), pre_tokenizer=self.pre_tokenizer)
        if has_adapter(backbone) and backbone.adapters.peft_config().use_dora:
            raise ConfigurationError("llama.cpp takes no DoRA; export 'dense', which merges it, and convert that")

    def serving(self, wanted: Wanted) -> Serving:
        """Grids, groups and adapters, and the model's family."""
        from qratk.exporters._gguf_architecture import architecture_of

        refused = [*plain_lora(wanted, "llama.cpp")]
        refused += [text for packing in wanted.packings if (text := self._unserved(packing))]
        if wanted.backbone is not None:
            try:
                architecture = architecture_of(wanted.backbone.config)
                for name in wanted.backbone.banks:
                    architecture.tensor_name(f"{name}.weight")
            except UnsupportedModelError as error:
                refused.append(str(error))
        small = [bits for bits in wanted.quantizers if bits < 4]
        return Serving(tuple(refused), tuple(f"{bits}-bit codes take 4 bits and a half" for bits in small))

    def _unserved(self, packing: Way) -> str:
        """Why no type of llama.cpp's holds projections that are packed in a way; empty when one does."""
        from qratk.exporters._gguf_blocks import BLOCK

        if written_dense(packing.bits, self.dense_bits):
            return ""
        form, size = packing.form, packing.group_size
        cure = "give model.quantizers: portable"
        if form is None:
            return f"{packing} has no scales and zero points by groups of a row: {cure}"
        if size is not None and size % BLOCK:
            return f"{packing} has groups of {size} weights, no whole number of llama.cpp's blocks of {BLOCK}: {cure}"
        if packing.bits > 4 and not (form.whole and form.symmetric):
            return f"{packing} has codes further than 128 from their zero points, which Q8_0 does not hold: {cure}"
        return ""

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """Types by count, and what the tokenizer lacks."""
        kinds: dict[str, int] = {}
        for name, bank in backbone.banks.items():
            kind = self._packing(name, bank).kind.name
            kinds[kind] = kinds.get(kind, 0) + 1
        notes = ["projections by type: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))]
        if backbone.tokenizer is None:
            notes.append("there is no tokenizer, so that the file takes and gives numbers of tokens alone")
        return notes

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write tensor by tensor."""
        from qratk.exporters._folder import active_pairs
        from qratk.exporters._gguf_architecture import architecture_of, model_metadata
        from qratk.exporters._gguf_file import write_gguf
        from qratk.exporters._gguf_tokenizer import tokenizer_metadata

        config, architecture = backbone.config, architecture_of(backbone.config)
        name = Path(str(getattr(config, "_name_or_path", "") or type(backbone.base).__name__)).name
        metadata = {
            **model_metadata(config, architecture, name),
            **tokenizer_metadata(backbone.tokenizer, int(config.vocab_size), pre_tokenizer=self.pre_tokenizer),
        }
        write_gguf(directory / MODEL, metadata, self._entries(backbone, architecture))
        lines = [f"FROM ./{MODEL}"]
        if pairs := active_pairs(backbone):
            told: dict[str, Value] = {
                "general.architecture": architecture.name,
                "general.type": "adapter",
                "general.name": f"{name}-adapter",
                "adapter.type": "lora",
                "adapter.lora.alpha": 0.0,  # so that the scale is the client's alone: that of training is in B
            }
            write_gguf(directory / ADAPTER, told, _adapter_entries(pairs, config, architecture))
            lines.append(f"ADAPTER ./{ADAPTER}")
        (directory / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """Both files, by the rules of llama.cpp."""
        from qratk.exporters._gguf_reader import read_adapter, read_model
        from qratk.exporters._reading import reading_model

        config, tensors = read_model(directory / MODEL, backbone.config)
        adapter = directory / ADAPTER
        return reading_model(backbone, config, tensors, pairs=read_adapter(adapter, config) if adapter.exists() else {})

    def _entries(self, backbone: Backbone, architecture: Architecture) -> dict[str, Entry]:
        """What goes into the model's file, in the order of the model."""
        from qratk.exporters._gguf_architecture import ROPE, rope_factors
        from qratk.exporters._gguf_file import Entry

        config = backbone.config
        found: dict[str, Entry] = {}
        for name, tensor in backbone.fixed_tensors().items():
            vector = tensor.dim() == 1
            norm = vector and name.endswith("norm.weight")
            value = tensor.float() + architecture.norm_offset if norm else tensor
            found[architecture.tensor_name(name)] = _plain(value, wide=vector)
        if (factors := rope_factors(config)) is not None:
            found[ROPE] = _plain(factors, wide=True)
        for name, bank in backbone.banks.items():
            heads, packing = architecture.heads(name, config), self._packing(name, bank)
            order = _row_order(bank.shape[0], heads)
            found[architecture.tensor_name(f"{name}.weight")] = Entry(
                packing.kind, bank.shape, partial(packing.content, order)
            )
            if bank.bias is not None:
                found[architecture.tensor_name(f"{name}.bias")] = _plain(bank.bias.float().cpu()[order], wide=True)
        return found

    def _packing(self, name: str, bank: BankLinear) -> Packing:
        """How a projection is written; raises `QuantizationError` where it cannot be."""
        from qratk.exporters._gguf_blocks import BF16, BLOCK, F16, Q4_1

        variant = bank.require(bank.active, bank.active_rank)
        dense = partial(bank.dequantized, bank.active, rank=bank.active_rank)
        if variant.bits >= 16:
            stored = next(iter(variant.packed.values())).dtype
            return Packing(BF16 if str(stored) == "torch.bfloat16" else F16, dense)
        if self.dense_bits and variant.bits >= self.dense_bits:
            return Packing(F16, dense, rounds=True)
        quantizer = variant.quantizer.component_name or type(variant.quantizer).__name__
        otherwise = f"{_CURE}, or give --dense-bits {variant.bits} to write such layers in float16"
        grid = grid_of(bank)
        if grid is None:
            raise QuantizationError(
                f"{name}: {quantizer} has no scales and zero points by groups of a row, as llama.cpp's types do; "
                f"{otherwise}"
            )
        if grid.group_size % BLOCK:
            raise QuantizationError(
                f"{name}: groups of {grid.group_size} weights are no whole number of llama.cpp's blocks of {BLOCK}; "
                f"search with group_size: {BLOCK} and sides that divide by it, or give --dense-bits {variant.bits} to "
                "write such layers in float16"
            )
        kind = _kind(grid, exact=self.exact)
        if kind is None:
            raise QuantizationError(
                f"{name}: {quantizer} at {variant.bits} bits has codes further than 128 from their zero points, which "
                f"Q8_0 does not hold; {otherwise}"
            )
        rounds = kind is Q4_1 or not bool((grid.scale.half().float() == grid.scale.float()).all())
        return Packing(kind, lambda: grid_of(bank), rounds=rounds)


@dataclass(frozen=True, eq=False)
class Packing:
    """A type, what gives the weight (d_out, d_in), dense or on its grid, and whether that is rounded."""

    kind: Kind
    weight: Callable[[], torch.Tensor | AffineGrid | None]
    rounds: bool = False

    def content(self, order: torch.Tensor) -> bytes:
        """Bytes of the weight with its rows in an order, (d_out,)."""
        import torch

        weight = self.weight()
        assert weight is not None
        if isinstance(weight, torch.Tensor):
            return _numbers(weight.cpu()[order], self.kind)
        return _blocks(weight, order, self.kind)


def _kind(grid: AffineGrid, *, exact: bool) -> Kind | None:
    """The smallest type that holds codes and zero points of a grid; None where there is none."""
    from qratk.exporters._gguf_blocks import Q4_0, Q4_1, Q5_0, Q8_0

    if grid.whole:
        codes = grid.codes.reshape(*grid.scale.shape, -1).amin(-1), grid.codes.reshape(*grid.scale.shape, -1).amax(-1)
        lowest, highest = (int(found) for found in ((codes[0] - grid.zero).min(), (codes[1] - grid.zero).max()))
        if lowest >= -8 and highest <= 7:
            return Q4_0
        if grid.bits > 4:
            return Q8_0 if lowest >= -128 and highest <= 127 else None
        return Q5_0 if exact else Q4_1
    return Q4_1 if grid.bits <= 4 else None


def _blocks(grid: AffineGrid, order: torch.Tensor, kind: Kind) -> bytes:
    """Bytes of codes with rows in an order."""
    from qratk.exporters import _gguf_blocks as blocks

    device = grid.codes.device
    order = order.to(device)
    groups = grid.group_size // blocks.BLOCK
    codes = grid.codes[order].reshape(-1, blocks.BLOCK).cpu().numpy().astype("int16")
    scale, zero = (
        t.float()[order].repeat_interleave(groups, 1).flatten().cpu().numpy() for t in (grid.scale, grid.zero)
    )
    if kind is blocks.Q4_1:
        return blocks.pack_q4_1(codes, scale, -zero * scale)
    distance = codes - zero.astype("int16")[:, None]
    if kind is blocks.Q8_0:
        return blocks.pack_q8_0(distance, scale)
    return blocks.pack_q4_0(distance + 8, scale) if kind is blocks.Q4_0 else blocks.pack_q5_0(distance + 16, scale)


def _narrow(tensor: torch.Tensor) -> torch.dtype | None:
    """The 16-bit type that holds the values of a tensor; None where neither does."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == dtype or bool((tensor.to(dtype).float() == tensor.float()).all()):
            return dtype
    return None


def _plain(tensor: torch.Tensor, *, wide: bool) -> Entry:
    """A tensor in float32, or in the 16-bit type that holds its values: bfloat16, or else float16."""
    import torch

    from qratk.exporters._gguf_blocks import BF16, F16, F32
    from qratk.exporters._gguf_file import Entry

    kind = F32 if wide else BF16 if _narrow(tensor) == torch.bfloat16 else F16
    return Entry(kind, tuple(tensor.shape), partial(_numbers, tensor, kind))


def _numbers(tensor: torch.Tensor, kind: Kind) -> bytes:
    import torch

    from qratk.exporters._gguf_blocks import BF16, F16

    tensor = tensor.detach().cpu()
    if kind is BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return tensor.float().numpy().astype("<f2" if kind is F16 else "<f4").tobytes()


def _row_order(rows: int, heads: int | None) -> torch.Tensor:
    """Rows of the checkpoint in the order of the file."""
    import torch

    from qratk.exporters._gguf_architecture import permuted

    order = torch.arange(rows)
    return order if heads is None else permuted(order, heads)


def _adapter_entries(pairs: Mapping[str, Pair], config: Any, architecture: Architecture) -> dict[str, Entry]:
    """A and B in float32, the scale in B."""
    found: dict[str, Entry] = {}
    for name, pair in pairs.items():
        weight = architecture.tensor_name(f"{name}.weight")
        b = (pair.b.float() * pair.scaling)[_row_order(len(pair.b), architecture.heads(name, config))]
        found[f"{weight}.lora_a"] = _plain(pair.a, wide=True)
        found[f"{weight}.lora_b"] = _plain(b, wide=True)
    return found
