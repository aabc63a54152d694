"""Singular directions of a trained pair of matrices, and which of many to keep within a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """b @ a as a sum of directions, the weightiest first: b (d_out, k), a (k, d_in), float32 on the CPU; values (k,).

    The first r of them are the best pair of rank r in the metric that they were found in, and the squares of the other
    values add up to its squared error.
    """

    a: Tensor
    b: Tensor
    values: NDArray[np.float64]

    @property
    def cost(self) -> int:
        """Numbers that one direction is stored as."""
        return self.a.shape[1] + self.b.shape[0]

    def first(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) of the weightiest directions."""
        return self.a[:rank], self.b[:, :rank]


def directions(a: Tensor, b: Tensor, moment: Tensor | None = None) -> Directions:
    """Directions of the outputs b a x of a pair a (W, d_in), b (d_out, W), that lose as little on average as can be.

    `moment`, (W, W), is the mean of z z^T over inputs, up to a factor, where z = a x; without it, or where no input
    ever came, inputs count as white: E = a a^T, the plain decomposition of b a. With E = L L^T and b L = U S V^T, the
    best update of rank r is U_r U_r^T b a, so that L is never inverted and may be singular (the metric of SVD-LLM, Wang
    et al. 2024, arXiv:2403.07378, for a product instead of a weight). A direction's length is shared out evenly between
    a and b. Numbers that are not finite come back as NaN.
    """
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    seen = moment is not None and bool(moment.any())
    gram = moment.detach().double().cpu() if moment is not None and seen else a @ a.T
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (a, b, gram)):
        nothing = torch.full((len(a),), torch.nan)
        return Directions(a.mul(torch.nan).float(), b.mul(torch.nan).float(), nothing.double().numpy())
    weights, vectors = torch.linalg.eigh(gram)
    left, values, _ = torch.linalg.svd(b @ (vectors * weights.clamp(min=0.0).sqrt()), full_matrices=False)
    left = left * torch.where(torch.gather(left, 0, left.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0)
    right = left.T @ b @ a
    root = torch.linalg.vector_norm(right, dim=1).sqrt()
    right = torch.where(root[:, None] > 0, right / root[:, None], 0.0)
    if moment is not None and not seen:
        values = torch.zeros_like(values)
    return Directions(right.float(), (left * root).float().contiguous(), values.numpy())


def dealt(found: Sequence[Directions], costs: Sequence[int], limit: int) -> list[int]:
    """How many directions of each to keep within so many bytes: by squared value for each byte, greedily.

    `costs` are bytes of a direction of each.

    A direction that does not fit is passed over, and with it the smaller ones of the same pair. What is lost against
    the best choice is less than one direction.
    """
    density = np.concatenate([np.nan_to_num(each.values) ** 2 / cost for each, cost in zip(found, costs, strict=True)])
    owner = np.repeat(np.arange(len(found)), [len(each.values) for each in found])
    ranks = [0] * len(found)
    for entry in np.argsort(-density, kind="stable"):
        index = int(owner[entry])
        if costs[index] <= limit:
            ranks[index] += 1
            limit -= costs[index]
    return ranks
