"""Candidate pools: the repaired neighbourhood of a centre, enumerated or sampled (Eq. 14, 15)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

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
    for coordinate in _coordinates(space, centre):
        ways = [len(coordinate.at(k)) for k in range(radius + 1)]
        counts = [sum(counts[d - k] * ways[k] for k in range(d + 1)) for d in range(radius + 1)]
    return sum(counts)


def ball(space: SearchSpace, centre: Configuration, radius: int) -> Iterator[Configuration]:
    """All configurations within `radius` atomic edits of a centre but itself, each once (Eq. 14)."""
    coordinates = _coordinates(space, centre)
    knobs = 2 * space.num_layers

    def walk(start: int, left: int, indices: list[int]) -> Iterator[Configuration]:
        for column in range(start, len(coordinates)):
            coordinate = coordinates[column]
            for rung, distance in coordinate.within(left):
                indices[column] = rung
                choices = np.asarray(indices[:knobs]).reshape(-1, 2)
                yield space.from_indices(choices, space.shared_at(indices[knobs:]))
                yield from walk(column + 1, left - distance, indices)
            indices[column] = coordinate.origin

    return walk(0, radius, [coordinate.origin for coordinate in coordinates])


def sampled_ball(
    proposer: Proposer, centre: Configuration, radius: int, *, size: int, rng: np.random.Generator
) -> Iterator[Configuration]:
    """At most `size` different configurations of the ball, by chains of the proposer's guided operators.

    A chain of edits goes on until it would leave the ball; each configuration on its way is a member, so that
    numbers of edits from 1 to the radius come up alike.
    """
    problem, operators = proposer.problem, proposer.operators
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
    """Standardised embedding of each configuration, (N, 2L + ...): `SearchSpace.embed` for many at once."""
    halves = []
    for values, ladder in (
        ([c.bits for c in configurations], space.bits),
        ([c.ranks for c in configurations], space.ranks),
    ):
        rungs = np.arange(len(ladder), dtype=np.float64)
        indices = np.searchsorted(np.asarray(ladder), np.asarray(values).reshape(-1, space.num_layers))
        halves.append((indices - rungs.mean()) / (rungs.std() or 1.0))
    if space.shared:
        halves.append(np.array([space.embed_shared(c) for c in configurations]))
    return np.concatenate(halves, axis=1)


@dataclass(frozen=True)
class _Coordinate:
    """A knob of a layer, or a setting: where the centre is among so many values, in an order or in none."""

    origin: int
    size: int
    ordinal: bool

    def at(self, distance: int) -> list[int]:
        """Values at a distance, ascending."""
        if not self.ordinal and distance:
            return [value for value in range(self.size) if value != self.origin] if distance == 1 else []
        return [v for v in dict.fromkeys((self.origin - distance, self.origin + distance)) if 0 <= v < self.size]

    def within(self, distance: int) -> Iterator[tuple[int, int]]:
        """Other values up to a distance, ascending, with their distances."""
        found = [(value, step) for step in range(1, distance + 1) for value in self.at(step)]
        return iter(sorted(found))


def _coordinates(space: SearchSpace, centre: Configuration) -> list[_Coordinate]:
    """Every knob, layer by layer (bits, rank, bits, rank...), then every setting."""
    lengths = (len(space.bits), len(space.ranks))
    knobs = [
        _Coordinate(int(i), lengths[column], True) for row in space.indices(centre) for column, i in enumerate(row)
    ]
    places = zip(space.shared, space.shared_indices(centre), strict=True)
    return knobs + [_Coordinate(int(place), len(ladder.values), ladder.ordinal) for ladder, place in places]


def _distance(space: SearchSpace, a: Configuration, b: Configuration) -> int:
    """Atomic distance, quick where most layers are equal."""
    changed = [(x, y) for x, y in zip(a.layers, b.layers, strict=True) if x != y]
    bits, ranks = space.bits.index, space.ranks.index
    apart = sum(abs(bits(x.bits) - bits(y.bits)) + abs(ranks(x.rank) - ranks(y.rank)) for x, y in changed)
    return apart + space.shared_distance(a, b)
