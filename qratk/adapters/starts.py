"""Adapters that begin as the best low-rank approximation of what quantisation took away: LoftQ and LQ-LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qratk.bank.gradients import BatchSize, per_sequence, stream
from qratk.bank.linear import Packed
from qratk.bank.table import Chosen
from qratk.core.errors import ConfigurationError
from qratk.quantizers.base import PackedBytes, Quantizer

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.lora import AdapterOptions
    from qratk.bank.linear import BankLinear

BLOCK = 16
"""Components are computed so many at a time, whatever is asked for: so that they do not depend on that to the bit."""

_ZERO = 1e-10  # singular values under this share of the largest are rounding
_LEAST_WEIGHT = 1e-3  # of the mean weight: what no sequence moved still counts for something


@dataclass(frozen=True)
class Factors:
    """First values of an adapter before scaling: b @ a, pooled inputs expanded, approximates a residual.

    a: (R, d_in / group), b: (d_out, R), float32 on the CPU, largest component first. A component of zeros says that
    the residual has none left.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Components that were computed, R."""
        return self.a.shape[0]

    @property
    def used(self) -> Tensor:
        """Which components are there, (R,) bool."""
        return self.b.any(dim=0)

    def covers(self, rank: int) -> bool:
        """Whether all of the components up to this rank are known."""
        return rank <= self.rank or not bool(self.used[-1])


@dataclass(frozen=True)
class Weighting:
    """What an error in a projection's weight costs: rows (d_out,) and columns (d_in,), positive float64 on the CPU."""

    rows: Tensor
    columns: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the values, shortened."""
        content = torch.cat([self.rows, self.columns]).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def low_rank(residual: Tensor, rank: int, *, weighting: Weighting | None = None, group: int = 1) -> Factors:
    """Factors that minimise ||D_rows (residual - b a) D_columns||_F over all of this rank.

    By the singular values of D_rows residual D_columns, whose square roots go to both sides, as in PEFT's LoftQ and in
    LQ-LoRA (Guo et al. 2023, arXiv:2311.12023, section 3.2); without weights this is the singular value decomposition
    of the residual (Li et al. 2023, arXiv:2310.08659, Eq. 7). With `group` inputs pooled into one (QA-LoRA) a is
    constrained to equal columns within a group, and the minimum is still exact: the pooling matrix, made orthonormal in
    the weighted inputs, goes to the right of the residual. The decomposition is that of the smaller Gram matrix in
    float64. Signs are fixed: the largest entry of each column of b is positive.
    """
    d_in = residual.shape[1]
    matrix = residual.detach().double()
    rows = columns = None
    if weighting is not None:
        rows, columns = weighting.rows.to(matrix.device), weighting.columns.to(matrix.device)
        matrix = matrix * rows[:, None] * columns.square()
    norms = matrix.new_full((d_in // group,), float(group)) if columns is None else pooled(columns.square(), group)
    matrix = pooled(matrix, group) / norms.sqrt()
    count = -(-rank // BLOCK) * BLOCK
    left, right = _components(matrix, count)
    right = right / norms.sqrt()
    left = left if rows is None else left / rows[:, None]
    sign = torch.gather(left, 0, left.abs().argmax(dim=0, keepdim=True)).sign()[0]
    return Factors((right * sign[:, None])[:rank].float().cpu(), (left * sign)[:, :rank].float().cpu().contiguous())


def _components(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # (m, count) and (count, n), each with the square roots of the singular values; zeros where there are none.
    m, n = matrix.shape
    if m > n:
        right, left = _components(matrix.T, count)
        return left.T, right.T
    left, right = matrix.new_zeros(m, count), matrix.new_zeros(count, n)
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    largest = 0.0
    for first in range(0, min(count, m), BLOCK):
        block = matrix.new_zeros(m, BLOCK)
        own = vectors[:, first : first + BLOCK]
        block[:, : own.shape[1]] = own
        product = block.T @ matrix
        values = torch.linalg.vector_norm(product, dim=1)
        largest = largest or float(values.max())
        roots = torch.where(values > _ZERO * largest, values, torch.zeros_like(values)).sqrt()
        left[:, first : first + BLOCK] = block * roots
        right[first : first + BLOCK] = torch.where(roots[:, None] > 0, product / roots[:, None], 0.0)
    return left, right


def pooled(x: Tensor, group: int) -> Tensor:
    """Sums of x (..., d) over groups of neighbours, (..., d / group)."""
    return x if group == 1 else x.reshape(*x.shape[:-1], -1, group).sum(dim=-1)


def expanded(a: Tensor, group: int) -> Tensor:
    """First matrix (r, d_in) that does to the inputs what a pooled one (r, d_in / group) does to their sums."""
    return a if group == 1 else a.repeat_interleave(group, dim=-1)


def alternated(
    weight: Tensor,
    chosen: Chosen,
    rank: int,
    iterations: int,
    *,
    first: Packed,
    weighting: Weighting | None = None,
    group: int = 1,
) -> tuple[Packed, Factors]:
    """Packed weight and factors after Q <- q(W - B A) and B, A <- low rank of W - Q in turn (LoftQ, Algorithm 1).

    `first` is the quantised W itself, where the alternation begins. With a weighting (LQ-LoRA, Algorithm 1) it ends as
    soon as the weighted error rises, with what was there before; without one after all iterations, as in PEFT.
    """
    weight = weight.float()
    best: tuple[Packed, Factors] | None = None
    lowest = float("inf")
    packed = first
    for iteration in range(iterations):
        if iteration:
            assert best is not None
            packed = chosen.quantizer.quantize((weight - _product(best[1], group, weight)).contiguous(), chosen.bits)
        residual = weight - chosen.quantizer.dequantize(packed, _shape(weight), chosen.bits, torch.float32)
        factors = low_rank(residual, rank, weighting=weighting, group=group)
        if weighting is not None:
            error = _weighted_norm(residual - _product(factors, group, weight), weighting)
            if error > lowest:
                break
            lowest = error
        best = packed, factors
    assert best is not None
    return best


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])


def _product(factors: Factors, group: int, like: Tensor) -> Tensor:
    return factors.b.to(like.device) @ expanded(factors.a.to(like.device), group)


def _weighted_norm(error: Tensor, weighting: Weighting) -> float:
    rows, columns = weighting.rows.to(error.device), weighting.columns.to(error.device)
    return float(torch.linalg.vector_norm(error.double() * rows[:, None] * columns))


def fisher_weightings(
    model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
) -> dict[str, Weighting]:
    """Weights of the rows and columns of every projection: square roots of the means of the Fisher diagonal.

    The diagonal is the mean over sequences of squared gradients; its row and column means are summed up as the backward
    pass runs, and one gradient of one projection exists at a time. (LQ-LoRA's text takes the means of square roots, its
    code the square roots of means, which its authors found better.) Weights under a thousandth of their mean are raised
    to that; a projection that no token reached has equal weights.
    """
    means = {
        name: (torch.zeros(p.out_features, dtype=torch.float64), torch.zeros(p.in_features, dtype=torch.float64))
        for name, p in projections.items()
    }

    def visit(name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        x, grad = per_sequence(x, grad, name, size.sequences)
        rows, columns = means[name]
        for inputs, gradients in zip(x, grad, strict=True):
            squared = (gradients.float().T @ inputs.float()).square_()
            rows += squared.mean(dim=1, dtype=torch.float64).cpu()
            columns += squared.mean(dim=0, dtype=torch.float64).cpu()

    sizes = stream(model, projections, batches, visit)
    count = sum(size.labelled for size in sizes)
    return {name: Weighting(_weights(rows / count), _weights(cols / count)) for name, (rows, cols) in means.items()}


def _weights(means: Tensor) -> Tensor:
    weights = means.sqrt()
    mean = float(weights.mean())
    return weights.clamp(min=_LEAST_WEIGHT * mean) if mean > 0 else torch.ones_like(weights)


# What a store keeps of a projection

_A, _B = "initial_a", "initial_b"


@dataclass(frozen=True)
class InitialPart:
    """In the place of a `Chosen`: the factors of a projection and, where that is quantised anew, its packed weight.

    `weighting` is the digest of its weighting, `packed` that of a packed weight that calibration decides too.
    """

    chosen: Chosen
    options: AdapterOptions
    rank: int
    weighting: str = ""
    packed: str = ""

    @property
    def quantizer(self) -> Quantizer:
        """What packs the weight."""
        return self.chosen.quantizer

    @property
    def bits(self) -> int:
        """What it packs at."""
        return self.chosen.bits

    def check(self) -> None:
        """Raise `ConfigurationError` where the weight would have to be packed anew by what calibration fits."""
        if self.repacked and getattr(self.quantizer, "calibrated", False):
            raise ConfigurationError(
                f"init_iterations={self.options.init_iterations} would pack weights anew without calibration, which "
                f"{type(self.quantizer).__name__} needs; give init_iterations=1 or another quantizer"
            )

    @property
    def repacked(self) -> bool:
        """Whether the weight is quantised anew for this rank."""
        return self.options.init_iterations > 1

    def __str__(self) -> str:
        options = self.options
        times, group = options.init_iterations, options.input_group
        about = f"initial 1: {options.init}, rank {self.rank}, iterations {times}, groups of {group}"
        return f"{self.chosen}; {about}, weights {self.weighting or 'equal'}{', of ' * bool(self.packed)}{self.packed}"

    def packed_bytes(self, shape: tuple[int, int]) -> PackedBytes:
        """Bytes of the factors, as metadata, and of the packed weight."""
        factors = 4 * self.rank * (shape[0] + shape[1] // self.options.input_group)
        own = self.chosen.packed_bytes(shape) if self.repacked else PackedBytes(0, 0)
        return PackedBytes(own.weights, own.metadata + factors)

    def build(self, bank: BankLinear, bits: int, weighting: Weighting | None) -> Packed:
        """The tensors that are kept, from the bank's reference and its packed weight."""
        packed, factors = alternated(
            bank.reference,
            self.chosen,
            self.rank,
            self.options.init_iterations,
            first=bank.require(bits).packed,
            weighting=weighting,
            group=self.options.input_group,
        )
        return {**(packed if self.repacked else {}), _A: factors.a, _B: factors.b}


def divided(tensors: Packed) -> tuple[Packed, Factors]:
    """The packed weight, empty where that is the bank's own, and the factors."""
    packed = {key: value for key, value in tensors.items() if key not in (_A, _B)}
    return packed, Factors(tensors[_A], tensors[_B])
