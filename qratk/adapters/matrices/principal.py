"""The directions that the inputs of projections vary in: principal components of calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from qratk.adapters.matrices.factors import Directions, Factors, pooled
from qratk.bank.calibration import Calibration
from qratk.quantizers.base import Moments

MOST: Final = 128
"""Directions that are kept of a projection."""


def variances(
    model: nn.Module, projections: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Names, and the variances of the inputs along all their principal directions, (d_in,) float64, falling."""
    held: tuple[Moments, Tensor] | None = None
    for name, moments in _moments(model, projections, batches):
        if held is None or held[0] is not moments:  # projections that share an input share its moments
            held = moments, torch.linalg.eigvalsh(_covariance(moments)).flip(0).clamp(min=0.0).cpu()
        yield name, held[1]


def principal_directions(
    model: nn.Module, projections: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Directions]:
    """The `MOST` leading principal directions of the inputs of every projection, about their mean.

    The largest entry of each is positive. Those that inputs do not vary in are left out.
    """
    found: dict[str, Directions] = {}
    held: tuple[Moments, Directions] | None = None
    for name, moments in _moments(model, projections, batches):
        if held is None or held[0] is not moments:
            held = moments, _leading(_covariance(moments))
        found[name] = held[1]
    return found


def directed(directions: Directions, rank: int, group: int) -> Tensor:
    """First matrix of an adapter of this rank, (rank, d_in / group): the directions of its inputs, then zeros.

    Where inputs are pooled, those of the sums, as far as the directions that are kept tell.
    """
    rows = directions.rows
    if group > 1 and len(rows):
        scaled = pooled(directions.rows * directions.variances.sqrt()[:, None], group)
        rows = _signed(torch.linalg.svd(scaled, full_matrices=False).Vh)
    first = rows.new_zeros(rank, rows.shape[1])
    first[: len(rows)] = rows[:rank]
    return first


def without_effect(first: Tensor, d_out: int) -> Factors:
    """Factors whose first matrix is given and whose second one is zero."""
    return Factors(first, torch.zeros(d_out, len(first)))


def _moments(
    model: nn.Module, projections: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Moments]]:
    calibration = Calibration(model, [{name: module} for name, module in projections.items()], batches)
    yield from ((name, calibration.moments(name)) for name in projections)


def _covariance(moments: Moments) -> Tensor:
    assert moments.mean is not None  # `Calibration` gathers it
    mean = moments.mean.double()
    return moments.second.double() - mean[:, None] * mean


def _leading(covariance: Tensor) -> Directions:
    values, vectors = torch.linalg.eigh(covariance)
    values, rows = values.flip(0)[:MOST], vectors.T.flip(0)[:MOST]
    kept = values > 1e-10 * values[:1].clamp(min=1e-300)
    return Directions(_signed(rows[kept]).float().cpu().contiguous(), values[kept].float().cpu())


def _signed(rows: Tensor) -> Tensor:
    """Rows with a positive largest entry."""
    return rows * torch.gather(rows, 1, rows.abs().argmax(dim=1, keepdim=True)).sign()
