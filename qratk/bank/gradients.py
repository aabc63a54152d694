"""What the gradient of a frozen weight is made of, handed over layer by layer while a backward pass runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qratk.bank.passes import undisturbed
from qratk.core.errors import DataError, UnsupportedModelError
from qratk.core.work import counted

if TYPE_CHECKING:
    from qratk.bank.linear import BankLinear


_SMALL: Final = 1 << 22  # logits of a batch


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
    for batch in counted("gradients of calibration batches", batches):
        labelled = int((batch["labels"][:, 1:] != -100).any(dim=1).sum())
        if labelled == 0:
            continue
        size = BatchSize(len(batch["labels"]), labelled)
        with undisturbed(model), _hooked(modules, visit, size):
            torch.autograd.grad(*sequence_loss(model, batch))
        sizes.append(size)
    if not sizes:
        raise DataError(
            f"none of the {len(batches)} batches for importance has a labelled token; every label is -100. "
            "Check the prompt template and the maximal length, which may cut the answers off"
        )
    return tuple(sizes)


def mean_gradients(
    model: nn.Module,
    projections: Sequence[tuple[str, BankLinear]],
    batches: Sequence[dict[str, Any]],
    limit_bytes: int,
) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients (d_out, d_in) of the weights, averaged over batches, each the mean over its sequences.

    As many are held at a time as `limit_bytes` of float32 allow, and the batches are gone through once for each such
    chunk. An expert that no token reached has none. Raises `DataError` when nothing is labelled.
    """
    for chunk in gradient_chunks(projections, limit_bytes):
        gradients = _chunk_gradients(model, chunk, batches)
        yield from ((name, gradients[name]) for name in chunk if name in gradients)


def gradient_chunks(projections: Sequence[tuple[str, BankLinear]], limit_bytes: int) -> Iterator[dict[str, BankLinear]]:
    """Consecutive projections whose float32 gradients fit together; one projection always fits."""
    chunk: dict[str, BankLinear] = {}
    held = 0
    for name, projection in projections:
        size = 4 * projection.shape[0] * projection.shape[1]
        if chunk and held + size > limit_bytes:
            yield chunk
            chunk, held = {}, 0
        chunk[name] = projection
        held += size
    if chunk:
        yield chunk


def _chunk_gradients(
    model: nn.Module, projections: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    gathered = GradientSums()
    sizes = stream(model, projections, batches, gathered.visit)
    return gathered.means(sizes)


class GradientSums:
    """Float32 gradients of weights, added up over batches: `visit` is for `stream`.

    Where activations are in bfloat16, so is the product of a batch, with sums in float32 inside it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def visit(self, name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        """Add a batch's gradient, the mean over its sequences."""
        kind = torch.bfloat16 if x.dtype == grad.dtype == torch.bfloat16 else torch.float32
        gradient = grad.flatten(0, -2).to(kind).T @ x.flatten(0, -2).to(kind)
        if name not in self._sums:
            self._sums[name] = torch.zeros(gradient.shape, device=gradient.device)
        self._sums[name].add_(gradient, alpha=1.0 / size.labelled)

    def means(self, sizes: Sequence[BatchSize]) -> dict[str, Tensor]:
        """Means over the batches by name, in the memory of the sums, which are gone."""
        found, self._sums = self._sums, {}
        return {name: gradient.div_(len(sizes)) for name, gradient in found.items()}


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


def sequence_loss(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum over sequences of the mean loss of each one's labelled tokens, and the embeddings to differentiate it by."""
    table = model.get_input_embeddings()
    device = table.weight.device
    with torch.no_grad():
        embeddings = table(batch["input_ids"].to(device)).detach()
    embeddings.requires_grad_()
    with torch.enable_grad():
        mask = batch["attention_mask"].to(device)
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = batch["labels"].to(device)[:, 1:]
        labelled = labels != -100
        if logits.numel() <= _SMALL:
            by_row = cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
        else:  # most logits predict nothing
            losses = cross_entropy(logits[labelled].float(), labels[labelled], reduction="none")
            by_row = torch.zeros(labels.shape, device=device).index_put((labelled,), losses)
        return (by_row.sum(dim=1) / labelled.sum(dim=1).clamp(min=1)).sum(), embeddings


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
