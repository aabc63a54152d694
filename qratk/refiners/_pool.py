"""Candidate pools: the repaired neighbourhood of a centre, enumerated or sampled (Eq. 14, 15)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, unique
from qratk.core.space import SearchSpace
from qratk.mutations.proposer import Proposer


def ball_size(space: SearchSpace, centre: Configuration, radius: int) -> int:
    """Number of configurations within `radius` atomic edits of a centre, the centre among them.

    It is the sum of the first coefficients of a product of one polynomial a coordinate, whose k-th coefficient is
    the number of rungs k steps away.
    """
    counts = [1] + [0] * radius  # counts[d]: configurations at distance d; Python integers never overflow
    for index, rungs in _coordinates(space, centre):
        ways = [1] + [int(index - k >= 0) + int(index + k < rungs) for k in range(1, radius + 1)]
        counts = [sum(counts[d - k] * ways[k] for k in range(d + 1)) for d in range(radius + 1)]
    return sum(counts)


def ball(space: SearchSpace, centre: Configuration, radius: int) -> Iterator[Configuration]:
    """All configurations within `radius` atomic edits of a centre but itself, each once (Eq. 14)."""
    coordinates = _coordinates(space, centre)

    def walk(start: int, left: int, indices: list[int]) -> Iterator[Configuration]:
        for column in range(start, len(coordinates)):
            origin, rungs = coordinates[column]
            for rung in range(max(0, origin - left), min(rungs, origin + left + 1)):
                if rung == origin:
                    continue
                indices[column] = rung
                yield space.from_indices(np.asarray(indices).reshape(-1, 2))
                yield from walk(column + 1, left - abs(rung - origin), indices)
            indices[column] = origin

    return walk(0, radius, [index for index, _ in coordinates])


def sampled_ball(
    proposer: Proposer, centre: Configuration, radius: int, *, size: int, rng: np.random.Generator
) -> Iterator[Configuration]:
    """At most `size` different configurations of the ball, by chains of the proposer's guided operators.

    A chain of edits goes on until it would leave the ball; each configuration on its way is a member, so that
    numbers of edits from 1 to the radius come up alike.
    """
    problem, operators = proposer.problem, proposer.mutations
    seen = {centre}
    parent, edits = centre, 0
    for _ in range(2 * size):
        child = operators[int(rng.integers(len(operators)))].mutate(problem, parent, rng)
        edits += 1
        left_the_ball = _distance(problem.space, centre, child) > radius
        if not left_the_ball and child not in seen:
            seen.add(child)
            yield child
            if len(seen) > size:
                return
        # As many edits as the radius at most: coupled or reversed ones must not make a walk without end.
        parent, edits = (centre, 0) if left_the_ball or edits == radius else (child, edits)


def pool(
    proposer: Proposer,
    centre: Configuration,
    radius: int,
    *,
    size: int,
    excluded: Collection[Configuration],
    rng: np.random.Generator,
) -> tuple[Configuration, ...]:
    """Feasible configurations to choose from around a centre, without repeats and excluded ones (Eq. 15).

    The ball is enumerated when it holds at most `size` configurations. As in the paper, it is the ball before repair
    that respects the radius: what repair takes away to fit the budget comes on top.
    """
    space = proposer.problem.space
    small = ball_size(space, centre, radius) - 1 <= size
    members = ball(space, centre, radius) if small else sampled_ball(proposer, centre, radius, size=size, rng=rng)
    repaired = (proposer.repaired(member) for member in members)
    return unique(member for member in repaired if member is not None and member not in excluded)


def embed(space: SearchSpace, configurations: Sequence[Configuration]) -> NDArray[np.float64]:
    """Standardised ordinal embedding of each configuration, (N, 2L): `SearchSpace.embed` for many at once."""
    halves = []
    for values, ladder in (
        ([c.bits for c in configurations], space.bits),
        ([c.ranks for c in configurations], space.ranks),
    ):
        rungs = np.arange(len(ladder), dtype=np.float64)
        indices = np.searchsorted(np.asarray(ladder), np.asarray(values).reshape(-1, space.num_layers))
        halves.append((indices - rungs.mean()) / (rungs.std() or 1.0))
    return np.concatenate(halves, axis=1)


def _coordinates(space: SearchSpace, centre: Configuration) -> list[tuple[int, int]]:
    """Index and number of rungs of every knob, layer by layer: bits, rank, bits, rank..."""
    lengths = (len(space.bits), len(space.ranks))
    return [(int(index), lengths[column]) for row in space.indices(centre) for column, index in enumerate(row)]


def _distance(space: SearchSpace, a: Configuration, b: Configuration) -> int:
    """Atomic distance, quick where most layers are equal."""
    changed = [(x, y) for x, y in zip(a.layers, b.layers, strict=True) if x != y]
    bits, ranks = space.bits.index, space.ranks.index
    return sum(abs(bits(x.bits) - bits(y.bits)) + abs(ranks(x.rank) - ranks(y.rank)) for x, y in changed)
