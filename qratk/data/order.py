"""Endless orders of training rows, in which any stretch can be asked for: of one source, and of several mixed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite, lcm
from typing import Final

import torch

from qratk.core.errors import DataError

_BLOCK: Final = 256  # rows over which a mixture keeps its shares, at least
_LARGEST_BLOCK: Final = 1 << 20


class Endless:
    """Permutations of items one behind the other, one an epoch, each from its own generator."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items, self.seed = num_items, seed
        self._cached: tuple[int, torch.Tensor] | None = None

    def permutation(self, epoch: int) -> torch.Tensor:
        """Order of the items in an epoch, (num_items,)."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, seeded_permutation(self.num_items, self.seed, epoch))
        return self._cached[1]

    def take(self, first: int, count: int) -> list[int]:
        """Indices of `count` items from place `first` of the order on."""
        indices: list[int] = []
        epoch, offset = divmod(first, self.num_items)
        while len(indices) < count:
            missing = count - len(indices)
            indices += self.permutation(epoch)[offset : offset + missing].tolist()
            epoch, offset = epoch + 1, 0
        return indices


def seeded_permutation(size: int, seed: int, number: int) -> torch.Tensor:
    """Order of `size` things, (size,): the one with this number under a seed."""
    # Odd multipliers keep (seed, number) pairs apart; torch has no seed sequences.
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % (1 << 63)
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed))


@dataclass(frozen=True)
class Mixture:
    """How rows of several sources are mixed: the number of rows of each, in order, and its weight.

    Raises DataError for a weight that is not above 0, or next to nothing beside the others.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for weight in self.weights:
            if not (isfinite(weight) and weight > 0):
                raise DataError(f"a weight in a mixture must be above 0, got {weight}")
        if sum(self.weights) > _LARGEST_BLOCK * min(self.weights):
            raise DataError(f"weight {min(self.weights)} is next to nothing beside the others: leave that source out")

    @property
    def shares(self) -> tuple[int, ...]:
        """The weights as whole numbers of the same ratios."""
        exact = [Fraction(str(weight)) for weight in self.weights]  # .1 is a tenth
        scale = lcm(*(value.denominator for value in exact))
        return tuple(int(value * scale) for value in exact)

    def __str__(self) -> str:
        return " + ".join(f"{size} x {weight:g}" for size, weight in zip(self.sizes, self.weights, strict=True))


class Mixed:
    """Sources mixed by their weights, each in an endless order of its own.

    Rows come in blocks, in which every source has its share to within one row, at places drawn by seed; over any number
    of whole blocks together it has it to within one row, too. So place n is a function of seed and n, whatever was
    asked for before, and no row of a source comes again before all others of it came.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.seed = seed
        shares = mixture.shares
        self._ends = [sum(shares[: index + 1]) for index in range(len(shares))]  # cumulated
        self._size = max(_BLOCK, -(-self._ends[-1] // min(shares)))  # a block has a row of every source
        self._sources = [Endless(size, seed + 0x9E37 * (index + 1)) for index, size in enumerate(mixture.sizes)]
        self._offsets = [sum(mixture.sizes[:index]) for index in range(len(shares))]
        self._cached: tuple[int, list[int]] | None = None

    def take(self, first: int, count: int) -> list[int]:
        """Indices of `count` rows, counted through all sources, from place `first` of the order on."""
        indices: list[int] = []
        block, offset = divmod(first, self._size)
        while len(indices) < count:
            indices += self._block(block)[offset : offset + count - len(indices)]
            block, offset = block + 1, 0
        return indices

    def _block(self, number: int) -> list[int]:
        if self._cached is None or self._cached[0] != number:
            begins, ends = self._used(number), self._used(number + 1)
            used = [end - begin for begin, end in zip(begins, ends, strict=True)]
            labels = [source for source, count in enumerate(used) for _ in range(count)]
            rows = [
                iter(source.take(begin, count))
                for source, begin, count in zip(self._sources, begins, used, strict=True)
            ]
            drawn = [labels[place] for place in seeded_permutation(len(labels), self.seed, number).tolist()]
            self._cached = (number, [self._offsets[source] + next(rows[source]) for source in drawn])
        return self._cached[1]

    def _used(self, blocks: int) -> list[int]:
        """Rows of each source in so many blocks."""
        upto = [0, *(blocks * self._size * end // self._ends[-1] for end in self._ends)]
        return [after - before for before, after in pairwise(upto)]
