"""Second derivatives of the loss along random directions of frozen weights, without a dense gradient or Hessian."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qratk.bank.gradients import sequence_loss
from qratk.bank.linear import BankLinear
from qratk.bank.passes import undisturbed
from qratk.core.errors import DataError

Dense = Callable[[torch.dtype], Tensor]


class FrozenMatmul(torch.autograd.Function):
    """x W^T, or x W, of a constant W made anew whenever it is needed; differentiable any number of times in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Dense, transposed: bool) -> Tensor:
        """Product of x (..., d_in) with the transpose of `dense(dtype)`, (d_out, d_in), or with it untransposed."""
        ctx.dense, ctx.transposed = dense, transposed
        weight = dense(x.dtype)
        return x @ (weight.T if transposed else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        """The same function of the gradient with the other orientation."""
        function: Any = FrozenMatmul
        return function.apply(grad, ctx.dense, not ctx.transposed), None, None


def directional_curvatures(
    model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]], *, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """For each projection and seed v^T (H v), the part of one Hutchinson sample that belongs to its weight.

    H is the Hessian, in the weights of all projections at once, of the mean over labelled sequences of the loss; v is
    ±1 and drawn by `rademacher`. The expectation is the trace of the projection's own block, for the others' parts
    have none. With W + s V in place of W and one number s a projection, it is the sum of a row of the second
    derivatives by s, which a double backward pass gives without any tensor of the size of a weight besides V. Attention
    is computed by plain matrix products meanwhile, since fused kernels have one derivative.

    Raises `DataError` when no token is labelled.
    """
    totals = {name: [0.0] * len(seeds) for name in projections}
    labelled = 0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).any(dim=1).sum())
        labelled += count
        for index, seed in enumerate(seeds if count else ()):
            for name, value in _sample(model, projections, batch, seed).items():
                totals[name][index] += value
    if not labelled:
        raise DataError(
            f"none of the {len(batches)} batches for importance has a labelled token; every label is -100. "
            "Check the prompt template and the maximal length, which may cut the answers off"
        )
    return {name: [value / labelled for value in values] for name, values in totals.items()}


def rademacher(shape: tuple[int, int], seed: int, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """±1, (d_out, d_in), the same on every device for the same seed and number of the projection."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % (1 << 63))
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).to(device)
    return signs.to(dtype).mul_(2).sub_(1)


def _sample(
    model: nn.Module, projections: Mapping[str, BankLinear], batch: dict[str, Any], seed: int
) -> dict[str, float]:
    steps = {
        name: torch.zeros((), dtype=torch.float32, device=bank.device, requires_grad=True)
        for name, bank in projections.items()
    }
    with (
        undisturbed(model),
        _shifted(model, projections, steps, seed),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        loss, _ = sequence_loss(model, batch)
        leaves = list(steps.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        first = [g for g in gradients if g is not None]  # an expert that no token reached has none
        second = torch.autograd.grad(
            torch.stack([g.to(first[0].device) for g in first]).sum(), leaves, allow_unused=True
        )
    return {name: 0.0 if value is None else float(value) for name, value in zip(steps, second, strict=True)}


@contextlib.contextmanager
def _shifted(
    model: nn.Module, projections: Mapping[str, BankLinear], steps: Mapping[str, Tensor], seed: int
) -> Iterator[None]:
    """Context in which the projections multiply by W + s V, and every bank layer can be differentiated twice."""
    banks: list[Any] = [module for module in model.modules() if isinstance(module, BankLinear)]
    for bank in banks:
        bank.forward = partial(_multiply, bank)
    for index, (name, projection) in enumerate(projections.items()):
        shifted: Any = projection
        shifted.forward = partial(_shift, projection, steps[name], seed, index)
    try:
        yield
    finally:
        for bank in banks:
            del bank.forward


def _multiply(bank: BankLinear, x: Tensor) -> Tensor:
    active = bank.active
    out = _frozen_matmul(x, lambda dtype: bank.dense_weight(active, dtype))
    return out if bank.bias is None else out + bank.bias.to(x.dtype)


def _shift(bank: BankLinear, step: Tensor, seed: int, index: int, x: Tensor) -> Tensor:
    shape, device = bank.shape, x.device
    along = _frozen_matmul(x, lambda dtype: rademacher(shape, seed, index, dtype, device))
    return _multiply(bank, x) + step.to(x.dtype) * along


def _frozen_matmul(x: Tensor, dense: Dense) -> Tensor:
    function: Any = FrozenMatmul
    out: Tensor = function.apply(x, dense, True)
    return out
