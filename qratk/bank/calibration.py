"""What calibration sequences say of the inputs of a model's projections, gathered by forward passes alone."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qratk.bank.passes import undisturbed
from qratk.core.errors import DataError, UnsupportedModelError
from qratk.core.memory import parse_bytes
from qratk.core.work import counted
from qratk.quantizers.base import Moments

VERSION = 1  # of what is gathered and how: part of the digest

Visit = Callable[[str, Tensor], None]
"""Called with a module's name and its inputs (tokens, d_in), padding left out: one object for modules that share it."""


class Calibration:
    """Moments of the inputs of projections, gathered when they are asked for, for some layers at a time.

    The model must multiply by its full-precision weights whenever moments are asked for. Those of as many layers are
    gathered in one go through the batches as `memory` allows, always of one; asking in the order of the layers goes
    through the batches once for each such part. Projections that share an input share its moments.

    Args:
        model: the model.
        layers: names and projections of each layer, in model order.
        batches: input_ids and attention_mask of the calibration sequences.
        memory: bytes of moments held at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Mapping[str, nn.Module]],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        memory: str | int = "4GiB",
    ) -> None:
        self._model, self._layers, self._memory = model, tuple(layers), parse_bytes(memory)
        self._batches = tuple({key: batch[key].cpu() for key in ("input_ids", "attention_mask")} for batch in batches)
        self._layer_of = {name: index for index, layer in enumerate(self._layers) for name in layer}
        self._held: dict[str, Moments] = {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the sequences, hexadecimal; padding counts, as it may change rounding."""
        hasher = hashlib.sha256(f"calibration {VERSION}".encode())
        for batch in self._batches:
            for key, tensor in sorted(batch.items()):
                hasher.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def moments(self, name: str) -> Moments:
        """Moments of a projection's inputs, on its device. Raises `DataError` when there are no tokens."""
        if name not in self._held:
            self.release()
            self._held = gather(self._model, self._chunk(self._layer_of[name]), self._batches)
        return self._held[name]

    def release(self) -> None:
        """Let go of the moments; they are gathered again when they are asked for."""
        self._held = {}

    def _chunk(self, index: int) -> dict[str, nn.Module]:
        chunk: dict[str, nn.Module] = {}
        held = 0
        for layer in self._layers[index:]:
            size = sum(4 * int(getattr(module, "in_features", 0)) ** 2 for module in layer.values())
            if chunk and held + size > self._memory:
                break
            chunk |= layer
            held += size
        return chunk


@dataclass
class _Sums:
    second: Tensor
    magnitude: Tensor
    mean: Tensor
    tokens: int = 0


def gather(model: nn.Module, modules: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Moments]:
    """Moments of the inputs of linear modules, by name; accumulated in float32."""
    sums: dict[str, _Sums] = {}
    leaders: dict[str, str] = {}
    last: tuple[Tensor, str] | None = None

    def visit(name: str, x: Tensor) -> None:
        nonlocal last
        shared = last is not None and last[0] is x
        leader = leaders.setdefault(name, last[1] if shared and last is not None else name)
        if shared and last is not None and leader == last[1]:
            return
        if leader != name:
            raise UnsupportedModelError(
                f"the inputs of {name!r} are those of {leader!r} in some batches, not in others"
            )
        last = x, name
        _add(sums, name, x.float())

    stream_inputs(model, modules, batches, visit)
    means = {leader: _mean(total) for leader, total in sums.items()}
    # An expert that no token reached has nothing.
    return {name: means[leaders[name]] if name in leaders else _nothing(module) for name, module in modules.items()}


def _add(sums: dict[str, _Sums], name: str, x: Tensor) -> None:
    if name not in sums:
        d_in = x.shape[-1]
        sums[name] = _Sums(
            torch.zeros(d_in, d_in, device=x.device),
            torch.zeros(d_in, device=x.device),
            torch.zeros(d_in, device=x.device),
        )
    sums[name].second.addmm_(x.T, x)
    sums[name].magnitude.add_(x.abs().sum(dim=0))
    sums[name].mean.add_(x.sum(dim=0))
    sums[name].tokens += len(x)


def _mean(sums: _Sums) -> Moments:
    tokens = max(1, sums.tokens)
    return Moments(sums.second.div_(tokens), sums.magnitude.div_(tokens), sums.tokens, sums.mean.div_(tokens))


def _nothing(module: Any) -> Moments:
    d_in, device = module.in_features, module.device
    nothing = torch.zeros(d_in, device=device)
    return Moments(torch.zeros(d_in, d_in, device=device), nothing, 0, nothing.clone())


def stream_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]], visit: Visit
) -> int:
    """Tokens of all batches but padding; `visit` has been called once for each module and batch.

    Passes are in evaluation mode, without gradients; neither hooks, training modes nor the random state are left
    changed. The output embedding is not multiplied by. Raises `DataError` when there is no token.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    tokens = 0
    for batch in counted("inputs of calibration batches", batches):
        mask = batch["attention_mask"].to(device)
        tokens += int(mask.bool().sum())
        with undisturbed(model), _hooked(modules, mask.bool(), visit), _without_head(model), torch.no_grad():
            model(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
    if not tokens:
        raise DataError(f"none of the {len(batches)} calibration batches has a token that is not padding")
    return tokens


def unpadded(x: Tensor, mask: Tensor, name: str) -> Tensor:
    """Rows (tokens, d_in) of a module's inputs (B, T, d_in), or flattened ones, where the mask (B, T) is true.

    Raises `UnsupportedModelError` when there is padding and rows cannot be told apart, as in experts of a mixture.
    """
    rows = x.flatten(0, -2)
    if bool(mask.all()):
        return rows
    if len(rows) == mask.numel() and (x.dim() == 3 or x.is_contiguous()):
        return rows[mask.flatten()]
    raise UnsupportedModelError(
        f"the inputs of {name!r}, {tuple(x.shape)}, are not those of {tuple(mask.shape)} tokens, so padding cannot be "
        "left out; calibrate with a batch size of 1"
    )


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], mask: Tensor, visit: Visit) -> Iterator[None]:
    last: tuple[Tensor, Tensor] | None = None

    def follow(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal last
            if last is None or last[0] is not inputs[0]:
                last = inputs[0], unpadded(inputs[0].detach(), mask.to(inputs[0].device), name)
            visit(name, last[1])

        return hook

    handles = [module.register_forward_pre_hook(follow(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[None]:
    """Context in which the output embedding sees one position: its product is as large as the vocabulary."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][..., -1:, :], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
