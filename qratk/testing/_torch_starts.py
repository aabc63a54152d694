"""The contract suite of starts: first values of adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qratk.adapters.matrices.factors import Directions, Factors, Told, Weighting, expanded
from qratk.adapters.starts.base import Residual, Start
from qratk.bank.table import Chosen
from qratk.quantizers.base import Moments, quantizers

_SHAPE, _BITS, _RANK = (48, 64), 4, 6


def some_residual(start: Start, *, group: int = 1) -> Residual:
    """A random weight packed at 4 bits, with what the start asks of calibration batches."""
    weight = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    chosen = Chosen(quantizers.create("nf4"), _BITS)
    told = _told(start) if start.weighted else None
    packed = chosen.quantizer.quantize(weight, _BITS)
    return Residual(weight, packed, chosen, group, told, _moments() if start.calibrated else None)


def _moments() -> Moments:
    x = torch.randn(256, _SHAPE[1], generator=torch.Generator().manual_seed(1))
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def _told(start: Start) -> Told:
    if not start.approximates:
        inputs = torch.randn(2 * _SHAPE[1], _SHAPE[1], generator=torch.Generator().manual_seed(1))
        _, values, rows = torch.linalg.svd(inputs, full_matrices=False)
        return Directions(rows, values.square())
    rows, columns = (torch.ones(size, dtype=torch.float64) for size in _SHAPE)
    return Weighting(rows, columns)


class StartContract:
    """What every start promises. Override the fixture `make`: it returns what builds a new one."""

    @pytest.fixture
    def make(self) -> Callable[[], Start]:
        """A callable that builds the start under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.mark.parametrize("group", [1, 4])
    def test_factors_have_the_shapes_of_an_adapter(self, make: Callable[[], Start], group: int) -> None:
        start = make()
        _, factors = start.begin(some_residual(start, group=group), _RANK, 1)
        assert factors.covers(_RANK)
        assert factors.a.shape == (factors.rank, _SHAPE[1] // group)
        assert factors.b.shape == (_SHAPE[0], factors.rank)
        assert factors.a.dtype == factors.b.dtype == torch.float32

    def test_one_round_keeps_the_packed_weight_of_the_bank(self, make: Callable[[], Start]) -> None:
        start = make()
        residual = some_residual(start)
        packed, _ = start.begin(residual, _RANK, 1)
        assert packed.keys() == residual.packed.keys()
        assert all(torch.equal(tensor, residual.packed[name]) for name, tensor in packed.items())

    @pytest.mark.parametrize("iterations", [1, 3])
    def test_the_weight_is_met_better_or_left_as_it_is(self, make: Callable[[], Start], iterations: int) -> None:
        start = make()
        residual = some_residual(start)
        packed, factors = start.begin(residual, _RANK, iterations)
        if not start.approximates:
            assert not factors.b.any()
            assert factors.used[:_RANK].all()
            return
        assert missing(residual, packed, factors) < missing(residual, residual.packed, None)

    def test_same_residual_gives_the_same_factors(self, make: Callable[[], Start]) -> None:
        start = make()
        (_, first), (_, again) = (start.begin(some_residual(start), _RANK, 2) for _ in range(2))
        assert torch.equal(first.a, again.a)
        assert torch.equal(first.b, again.b)

    def test_unweighted_starts_ask_for_no_weighting(self, make: Callable[[], Start]) -> None:
        start = make()
        assert start.weighted or not start.weightings(torch.nn.Identity(), {}, [])


def missing(residual: Residual, packed: dict[str, torch.Tensor], factors: Factors | None) -> float:
    """Norm of what packed weight and factors leave of the weight."""
    quantised = residual.chosen.quantizer.dequantize(packed, _SHAPE, _BITS, torch.float32)
    left = residual.weight - quantised
    if factors is not None:
        left = left - factors.b @ expanded(factors.a, residual.group)
    return float(torch.linalg.vector_norm(left))
