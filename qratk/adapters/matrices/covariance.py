"""Low-rank factors of a residual, the best there are for the outputs: in the metric of the inputs' second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from qratk.adapters.matrices.factors import BLOCK, Factors, components, expanded, pooled
from qratk.core.errors import QuantizationError

DAMPING = 0.01
"""Share of the mean diagonal of the second moment that is added to the diagonal, as GPTQ does."""


def low_rank_for_inputs(residual: Tensor, rank: int, second: Tensor, *, group: int = 1) -> Factors:
    """Factors that minimise E ||(residual - b a) x||^2 over all of this rank, of the second moment E[x x^T].

    CLoQ (Deng et al. 2025, arXiv:2501.18475), where R R^T is the damped second moment and residual R = U S V^T: b is U
    and a is S V^T R^-1, the authors' split of the product. Any root R gives the same product; theirs is that of an
    eigendecomposition, this one Cholesky's. With `group` inputs pooled into one the second moment is that of their
    sums, the residual is first projected onto them, and the minimum is still exact. Signs are fixed: the largest entry
    of each column of b is positive. Raises `QuantizationError` for what is no second moment.
    """
    moment = damped(second.to(residual.device).double())
    matrix = residual.detach().double() @ moment
    matrix, sums = pooled(matrix, group), pooled(pooled(moment, group).T, group)
    root, failed = torch.linalg.cholesky_ex(sums)
    if bool(failed):
        raise QuantizationError(
            f"the second moment of the inputs, {tuple(second.shape)}, is not positive semi-definite, or not finite"
        )
    left, right = components(torch.linalg.solve_triangular(root, matrix.T, upper=False).T, -(-rank // BLOCK) * BLOCK)
    norms = torch.linalg.vector_norm(left, dim=0)  # roots of the singular values
    b = torch.where(norms > 0, left / norms, 0.0)
    # By blocks, as components are: what is computed must not depend on the rank to the bit.
    blocks = (right * norms[:, None]).split(BLOCK)
    a = torch.cat([torch.linalg.solve_triangular(root, rows, upper=False, left=False) for rows in blocks])
    sign = torch.gather(b, 0, b.abs().argmax(dim=0, keepdim=True)).sign()[0]
    return Factors((a * sign[:, None])[:rank].float().cpu(), (b * sign)[:, :rank].float().cpu().contiguous())


def output_error(error: Tensor, second: Tensor) -> float:
    """E ||error x||^2 of an error in a weight (d_out, d_in), with the damped second moment of the inputs."""
    dense = error.double()
    return float(((dense @ damped(second.to(error.device).double())) * dense).sum())


def damped(second: Tensor) -> Tensor:
    """The second moment with more on its diagonal; of inputs that no token reached, the identity."""
    mean = float(second.diagonal().mean())
    return second + (DAMPING * mean or 1.0) * torch.eye(len(second), dtype=second.dtype, device=second.device)


def product(factors: Factors, group: int, like: Tensor) -> Tensor:
    """b a, (d_out, d_in), where another tensor lies."""
    return factors.b.to(like.device) @ expanded(factors.a.to(like.device), group)
