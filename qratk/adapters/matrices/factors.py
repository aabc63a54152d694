"""Low-rank factors of a residual, the best there are under a weighting, also where inputs are pooled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
"""Components are computed so many at a time, whatever is asked for: so that they do not depend on that to the bit."""

_ZERO = 1e-10  # singular values under this share of the largest are rounding


@dataclass(frozen=True)
class Factors:
    """First values of an adapter before scaling: b @ a, pooled inputs expanded, approximates a residual.

    a: (R, d_in / group), b: (d_out, R), float32 on the CPU, largest component first. A component of zeros says that
    the residual has none left; one of which b alone is zeros has no effect at first, and a is its direction.
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
        return self.a.any(dim=1) | self.b.any(dim=0)

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


@dataclass(frozen=True)
class Directions:
    """Directions that the inputs of a projection vary in: rows (R, d_in), orthonormal, and variances (R,), falling.

    Both are float32 on the CPU; there are no rows where there were no inputs.
    """

    rows: Tensor
    variances: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the values, shortened."""
        content = torch.cat([self.rows.flatten(), self.variances]).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


Told = Weighting | Directions
"""What calibration batches say of a projection, for starts that ask."""


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
    left, right = components(matrix, count)
    right = right / norms.sqrt()
    left = left if rows is None else left / rows[:, None]
    sign = torch.gather(left, 0, left.abs().argmax(dim=0, keepdim=True)).sign()[0]
    return Factors((right * sign[:, None])[:rank].float().cpu(), (left * sign)[:, :rank].float().cpu().contiguous())


def components(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of a matrix (m, n), as (m, count) and (count, n), each times the square roots of the values.

    Largest first, `count` a multiple of `BLOCK`; zeros where there are none.
    """
    m, n = matrix.shape
    if m > n:
        right, left = components(matrix.T, count)
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
