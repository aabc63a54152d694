"""What calibration sequences say of the inputs of a model's projections, gathered by forward passes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qratk.core.errors import DataError, UnsupportedModelError

Visit = Callable[[str, Tensor], None]
"""Called with a module's name and its inputs (tokens, d_in), padding left out."""


def stream_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]], visit: Visit
) -> int:
    """Tokens of all batches but padding; `visit` has been called once for each module and batch.

    Passes are in evaluation mode, without gradients; neither hooks, training modes nor the random state are left
    changed. The output embedding is not multiplied by. Raises `DataError` when there is no token.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    tokens = 0
    for batch in batches:
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
    def follow(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            visit(name, unpadded(inputs[0].detach(), mask.to(inputs[0].device), name))

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


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with the random state and every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True
