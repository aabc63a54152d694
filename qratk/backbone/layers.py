"""What is a layer: the transformer blocks of a causal language model and their target projections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from qratk.backbone.fused import fused_groups
from qratk.bank.linear import BankLinear
from qratk.core.errors import ConfigurationError, UnsupportedModelError
from qratk.core.memory import LayerShape

Granularity = Literal["block", "sublayer", "fused", "linear"]


@dataclass(frozen=True)
class TargetLayer:
    """One searched layer: its name, its bytes, and its projections as (qualified name, module), in model order."""

    name: str
    shape: LayerShape
    modules: tuple[tuple[str, BankLinear], ...]


@dataclass(frozen=True)
class LayerNames:
    """A layer before its modules are replaced: its name and the qualified names of its projections."""

    name: str
    projections: tuple[str, ...]


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear map that the bank can replace: `nn.Linear`, or GPT-2's transposed `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True)
class Coverage:
    """How many of the blocks' matrix weights the bank holds, and which it cannot: names, the block's number as *."""

    banked: int
    total: int
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.banked:,} of {self.total:,} weights of the blocks are in the bank; left as they are, neither "
            f"quantised nor adapted: {', '.join(self.left) or 'none'}"
        )


def coverage(model: nn.Module) -> Coverage:
    """Coverage of a model whose target projections are in the bank; biases and norms, which are vectors, do not count.

    Projections that `target_modules` leaves out are not in `left`: whoever named the others knows.
    """
    prefix, blocks = find_blocks(model)
    banked = total = 0
    left: dict[str, None] = {}
    for block in blocks:
        for local, module in block.named_modules():
            for name, tensor in module.named_parameters(local, recurse=False):
                total += tensor.numel() if tensor.dim() > 1 else 0
                if tensor.dim() > 1 and not is_projection(module):
                    left[f"{prefix}.*.{name}"] = None
            if isinstance(module, BankLinear):
                held = math.prod(module.shape)
                banked, total = banked + held, total + held
    return Coverage(banked, total, tuple(left))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, which stores its weight as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Qualified name and module list of the transformer blocks.

    They are the longest outermost `ModuleList` whose members are of one class and hold linear maps; the experts of a
    mixture lie inside a block, so they are no outermost list. Raises `UnsupportedModelError`.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in _outermost_lists(model, ""):
        if _are_blocks(module) and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise UnsupportedModelError(
            f"no transformer blocks were found in {type(model).__name__}: looked for a torch ModuleList whose members "
            "are of one class and contain nn.Linear or Conv1D modules, as in 'model.layers' of a Llama. "
            "Models of another build are not supported."
        )
    return best


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _are_blocks(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and any(is_projection(m) for m in modules[0].modules())


def find_layers(
    model: nn.Module, *, granularity: Granularity = "block", target_modules: str | Sequence[str] = "all"
) -> tuple[LayerNames, ...]:
    """Layers in model order.

    Args:
        model: a causal language model whose projections are still plain.
        granularity: "block" (all projections of a block), "sublayer" (attention and feed-forward apart; projections
            that lie directly in a block form its feed-forward), "fused" (what servers multiply by at once: q, k and v;
            gate and up; all experts of a mixture; others by themselves), or "linear" (each projection by itself).
        target_modules: "all", or names of projections relative to their block or a tail of them, such as "q_proj".

    Raises:
        ConfigurationError: a name matches no projection, or the granularity is unknown.
        UnsupportedModelError: no blocks were found.
    """
    if granularity not in get_args(Granularity):
        raise ConfigurationError(f"granularity must be one of {get_args(Granularity)}, got {granularity!r}")
    prefix, blocks = find_blocks(model)
    wanted = None if target_modules == "all" else tuple(_as_list(target_modules))
    _check_targets(blocks, wanted)
    layers: list[LayerNames] = []
    for index, block in enumerate(blocks):
        block_name = f"{prefix}.{index}"
        projections = [
            local for local, module in block.named_modules() if is_projection(module) and _is_wanted(local, wanted)
        ]
        for local in projections:
            _check_projection(f"{block_name}.{local}", block.get_submodule(local))
        layers += _layers(block_name, projections, granularity)
    return tuple(layers)


def _check_projection(name: str, module: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a module that does not multiply by a plain weight of floating point."""
    weight = module.weight
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2):
        raise UnsupportedModelError(
            f"{name!r} is a {kind}, whose weight is packed already ({getattr(weight, 'dtype', 'no tensor')}); the bank "
            "packs full-precision weights itself: give the model before it was quantised"
        )
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        raise UnsupportedModelError(
            f"{name!r} is a {kind}, which does not multiply as torch's nn.Linear does, so that the bank cannot stand "
            "for it; name other projections as target_modules"
        )


def _as_list(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _layers(block_name: str, projections: Sequence[str], granularity: Granularity) -> Iterator[LayerNames]:
    """Layers of a block whose projections have these names within it."""
    groups: dict[str, tuple[str, ...]] = {}
    if granularity == "fused":
        groups = {f".{name}": members for name, members in fused_groups(projections).items()}
    else:
        for local in projections:
            group = _group(local, granularity)
            groups[group] = (*groups.get(group, ()), local)
    for group, members in groups.items():
        yield LayerNames(f"{block_name}{group}", tuple(f"{block_name}.{local}" for local in members))


def _group(local: str, granularity: Granularity) -> str:
    """What follows the name of the block in that of a projection's layer."""
    if granularity == "block":
        return ""
    if granularity == "linear":
        return f".{local}"
    head, _, tail = local.partition(".")
    return f".{head}" if tail else ".feed_forward"


def _is_wanted(local: str, wanted: tuple[str, ...] | None) -> bool:
    return wanted is None or any(local == name or local.endswith(f".{name}") for name in wanted)


def _check_targets(blocks: nn.ModuleList, wanted: tuple[str, ...] | None) -> None:
    known = sorted({local for block in blocks for local, m in block.named_modules() if is_projection(m)})
    for name in wanted or ():
        if not any(_is_wanted(local, (name,)) for local in known):
            raise ConfigurationError(
                f"target_modules: {name!r} matches no projection of the blocks; their projections are {known}"
            )
    if wanted is not None and not wanted:
        raise ConfigurationError(f"target_modules is empty; give 'all' or some of {known}")
