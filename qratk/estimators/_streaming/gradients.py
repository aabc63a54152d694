"""What the gradient of a frozen weight is made of, handed over layer by layer while a backward pass runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qratk.core.errors import DataError, UnsupportedModelError


@dataclass(frozen=True)
class BatchSize:
    """Sequences of a batch, and those of them with a labelled token: the others have no loss."""

    sequences: int
    labelled: int


Visit = Callable[[str, Tensor, Tensor, BatchSize], None]
"""Called with a module's name, its inputs (..., d_in), the loss's gradient of its outputs (..., d_out), the batch."""


def stream(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]], visit: Visit
) -> tuple[BatchSize, ...]:
    """Sizes of the batches that have a loss; `visit` has been called once for each module and such batch.

    The loss is the sum over sequences of the mean negative log-likelihood of a sequence's labelled tokens, so that
    each sequence's part of a gradient is its own. Padding and tokens without a label have no part in it. Weights stay
    frozen: only the embeddings are differentiated, no `grad` is written, and neither hooks, training mode nor the
    random state are left changed. Raises `DataError` when no token is labelled.
    """
    sizes = []
    for batch in batches:
        labelled = int((batch["labels"][:, 1:] != -100).any(dim=1).sum())
        if labelled == 0:
            continue
        size = BatchSize(len(batch["labels"]), labelled)
        with _undisturbed(model), _hooked(modules, visit, size):
            torch.autograd.grad(*_loss(model, batch))
        sizes.append(size)
    if not sizes:
        raise DataError(
            f"none of the {len(batches)} batches for importance has a labelled token; every label is -100. "
            "Check the prompt template and the maximal length, which may cut the answers off"
        )
    return tuple(sizes)


def per_sequence(x: Tensor, grad: Tensor, name: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, d_in) and gradients (B, T, d_out), from a module that may have flattened its tokens.

    Raises `UnsupportedModelError` when rows cannot be told apart by sequence, as in the experts of a mixture.
    """
    if x.dim() == 3 and x.shape[0] == batch_size:
        return x, grad
    rows = x.shape[:-1].numel()
    if batch_size == 1 or (x.dim() == 2 and rows % batch_size == 0 and rows // batch_size > 0 and x.is_contiguous()):
        return x.reshape(batch_size, -1, x.shape[-1]), grad.reshape(batch_size, -1, grad.shape[-1])
    raise UnsupportedModelError(
        f"the inputs of {name!r}, {tuple(x.shape)}, cannot be split into {batch_size} sequences; "
        "estimate importance with a batch size of 1"
    )


def _loss(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and the embeddings that it is differentiated by."""
    table = model.get_input_embeddings()
    device = table.weight.device
    with torch.no_grad():
        embeddings = table(batch["input_ids"].to(device)).detach()
    embeddings.requires_grad_()
    with torch.enable_grad():
        mask = batch["attention_mask"].to(device)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = batch["labels"].to(device)[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
        labelled = (labels != -100).sum(dim=1)
        return (losses.sum(dim=1) / labelled.clamp(min=1)).sum(), embeddings


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], visit: Visit, size: BatchSize) -> Iterator[None]:
    def follow(name: str) -> Callable[..., None]:
        def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if not output.requires_grad:  # the first of two passes under gradient checkpointing
                return
            x = inputs[0].detach()

            def backward_hook(grad: Tensor) -> None:  # a returned tensor would replace the gradient
                with torch.no_grad():
                    visit(name, x, grad, size)

            output.register_hook(backward_hook)

        return forward_hook

    handles = [module.register_forward_hook(follow(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with the random state and every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True
