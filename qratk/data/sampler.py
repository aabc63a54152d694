"""Which items make up micro-batch k of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from qratk.core.errors import DataError
from qratk.data.order import Endless, Mixed, Mixture


class StepSampler(Sampler[list[int]]):
    """Batches of item indices, where micro-batch k of the whole run is a pure function of (seed, k).

    A run that stopped anywhere continues with `start=k` as if it had never stopped. The items are an endless
    concatenation of permutations, one an epoch, each from its own generator; the last short batch of an epoch is
    completed from the next permutation, so that no item is ever skipped. With a `mixture`, they are its sources' items
    in the order of `Mixed`, by weight. A pass over the sampler begins `done()`
    micro-batches after `start`: those that were trained on already, in however many passes. It is endless unless
    `length` says how many batches an epoch of the Trainer has. With several replicas, replica `rank` takes batches
    `rank, rank + replicas, ...` of the same sequence, and counts its own.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        *,
        length: int | None = None,
        rank: int = 0,
        replicas: int = 1,
        done: Callable[[], int] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        if num_items < 1 or batch_size < 1 or start < 0:
            raise DataError(
                f"a sampler needs at least one item, a batch size of at least 1 and a start of at least 0; "
                f"got {num_items}, {batch_size} and {start}"
            )
        self.num_items, self.batch_size, self.seed, self.start = num_items, batch_size, seed, start
        self.length, self.rank, self.replicas, self.done = length, rank, replicas, done
        self.mixture = mixture
        self._order = Endless(num_items, seed) if mixture is None else Mixed(mixture, seed)

    def batch(self, k: int) -> list[int]:
        """Indices of micro-batch k, `batch_size` of them."""
        return self._order.take(k * self.batch_size, self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + (self.done() if self.done is not None else 0)
        count = 0
        while self.length is None or count < self.length:
            yield self.batch((first + count) * self.replicas + self.rank)
            count += 1

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("this sampler is endless: give the Trainer max_steps")
        return self.length
