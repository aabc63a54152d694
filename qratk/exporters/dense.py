"""A plain dense model with the adapters merged into the dequantised weights."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from qratk.core.errors import ConfigurationError
from qratk.core.work import counted
from qratk.exporters.base import EXACT, Exporter, Holding, exporters

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.folder import Pair
    from qratk.backbone.backbone import Backbone

Dense = Literal["bfloat16", "float16", "float32"]
ROUNDED: Final[Mapping[Dense, float]] = {"bfloat16": 0.1, "float16": 0.02, "float32": EXACT}
"""Tolerances of weights that are rounded to a type."""
_ROOM: Final = 8  # float16 must hold so many times the largest number that was seen in the model


@exporters.register("dense")
class DenseExporter(Exporter):
    """A Hugging Face folder of merged weights, with its tokenizer.

    The memory that quantisation saved is lost, and logits agree to rounding only. float16 is much nearer than bfloat16
    (on SmolLM2-135M a KL divergence of 3e-6 against 7e-3), as long as nothing overflows in it.

    Args:
        dtype: type of the weights; "auto" is float16 where it holds the weights and, with room to spare, what the
            model computes on a few tokens, and bfloat16 otherwise.
        base: leave the adapters out: the dequantised base alone, for adapters beside it.
    """

    def __init__(self, dtype: Literal["auto"] | Dense = "auto", base: bool = False) -> None:
        if dtype != "auto" and dtype not in get_args(Dense):
            raise ConfigurationError(f"dtype must be 'auto' or one of {get_args(Dense)}, got {dtype!r}")
        self.dtype, self.base = dtype, base
        self._written: tuple[Any, Dense] | None = None  # a weak reference to the last backbone, and what it got

    @property
    def takes(self) -> str:
        """Whatever reads a Hugging Face model."""
        return "transformers and whatever else reads a Hugging Face model"

    @property
    def holds(self) -> Holding:
        """Everything, in more bytes."""
        return Holding(
            "every quantiser, as 16-bit or 32-bit weights",
            "every method, merged; with --base left out",
            "rounding of the weights: to float16 .05 %, to bfloat16 (where float16 overflows) .4 %, to float32 none",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """What rounding may come to: the whole model is rounded, so that errors add up."""
        return ROUNDED[self.chosen(backbone)]

    def chosen(self, backbone: Backbone) -> Dense:
        """The type of the weights of what is active."""
        if self.dtype != "auto":
            return self.dtype
        if self._written is not None and self._written[0]() is backbone:
            return self._written[1]
        return "float16" if _fits_float16(backbone) else "bfloat16"

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What the type is, and what is lost by it."""
        merged = "without adapters" if self.base else "merged"
        lost = (
            "nothing is lost" if (dtype := self.chosen(backbone)) == "float32" else "the self-check says what it loses"
        )
        return [f"weights are {dtype}, {merged}: {lost}"]

    def check(self, backbone: Backbone) -> None:
        """Every configuration can be merged."""

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Merge and write, projection by projection unless the family's files are made by transformers alone."""
        import torch

        from qratk.exporters._folder import is_converted, write_description
        from qratk.exporters._shards import write_shards

        self._written = None
        self._written = (weakref.ref(backbone), self.chosen(backbone))
        dtype = getattr(torch, self._written[1])
        if is_converted(backbone):
            merged_model(backbone, dtype=dtype, base=self.base).save_pretrained(directory)
        else:
            with backbone.stored_precision(), torch.no_grad():
                write_shards(dense_tensors(backbone, dtype, base=self.base), directory)
        write_description(backbone, directory, dtype=dtype)

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module | None:
        """The folder, with the adapters beside where they were left out."""
        from qratk.exporters._folder import active_pairs

        pairs = active_pairs(backbone) if self.base else {}
        return self.read(backbone, directory, pairs=pairs)

    def read(self, backbone: Backbone, directory: Path, *, pairs: Mapping[str, Pair]) -> nn.Module | None:
        """A model of the folder with adapters; None where the family's files are not named as its modules."""
        from transformers import AutoConfig

        from qratk.exporters._folder import is_converted
        from qratk.exporters._reading import reading_model
        from qratk.exporters._shards import read_shards

        if is_converted(backbone):
            return None
        return reading_model(backbone, AutoConfig.from_pretrained(directory), read_shards(directory), pairs=pairs)


def _fits_float16(backbone: Backbone) -> bool:
    """Whether float16 holds every weight, and what modules give out, `_ROOM` times over, for a few random tokens."""
    import torch

    limit = torch.finfo(torch.float16).max
    with backbone.stored_precision(), torch.no_grad():
        for _, tensor in dense_tensors(backbone, torch.float32):
            if tensor.is_floating_point() and not float(tensor.abs().amax()) < limit:
                return False
        return _ROOM * _largest_output(backbone) < limit


def _largest_output(backbone: Backbone) -> float:
    """The largest magnitude that a module of the model gives out on a text of random tokens; infinite for none."""
    import torch

    found = [0.0]

    def look(module: nn.Module, given: Any, made: Any) -> None:
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel():
            largest = float(made.abs().amax())
            found.append(largest if math.isfinite(largest) else math.inf)

    count = int(backbone.base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tokens = torch.randint(count, (2, 16), generator=torch.Generator().manual_seed(0))
    handles = [module.register_forward_hook(look) for module in backbone.base.modules()]
    training = backbone.model.training
    try:
        backbone.model.eval()
        backbone.model(input_ids=tokens.to(next(iter(backbone.fixed_tensors().values())).device), use_cache=False)
    finally:
        backbone.model.train(training)
        for handle in handles:
            handle.remove()
    return max(found)


def dense_tensors(backbone: Backbone, dtype: torch.dtype, *, base: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all weights of the active configuration, one after another, rounded to a type.

    A projection is W + scaling * B A, summed in float32 of the adapters as they are, or W alone for the `base`.
    """
    import torch

    from qratk.exporters._skeleton import is_turned

    for name, tensor in backbone.fixed_tensors().items():
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    turned = is_turned(backbone)
    for name, bank in counted("writing weights", backbone.banks.items(), len(backbone.banks)):
        with torch.no_grad():
            weight = bank.dequantized(bank.active, rank=bank.active_rank)
            if not base:
                weight = weight + backbone.adapters.delta(name)
        yield f"{name}.weight", (weight.t() if turned(name) else weight).to(dtype).contiguous()
        if bank.bias is not None:
            yield f"{name}.bias", bank.bias.to(dtype)


def merged_model(backbone: Backbone, *, dtype: torch.dtype | None = None, base: bool = False) -> PreTrainedModel:
    """Plain Hugging Face model of the active configuration: W + scaling * B A, for tools that take dense weights.

    The sums are made in float32 from the adapters as stored, then rounded to `dtype` (default: the compute dtype). The
    memory that quantisation saved is lost, and logits agree to rounding only. `base` leaves the adapters out.
    """
    import torch

    from qratk.exporters._skeleton import empty_like, fill

    if backbone.configuration is None:
        raise ConfigurationError("no configuration is active; call `backbone.activate` first")
    dtype = dtype or backbone.compute_dtype
    model = empty_like(backbone)
    with backbone.stored_precision(), torch.no_grad():
        fill(model, dict(dense_tensors(backbone, dtype, base=base)))
    return model
