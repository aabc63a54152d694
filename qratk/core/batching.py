"""Where to cut rows of different lengths into batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCH_COST = 256.0
"""What a pass through a model costs beside its tokens, in tokens: calls of operations, and dequantising weights."""


def cheapest_cuts(lengths: Sequence[int], *, budget: int, most: int, overhead: float = BATCH_COST) -> list[slice]:
    """Slices of rows that get shorter and shorter, one a batch, that cost least in all.

    A batch costs its tokens, padding included, of which there are at most `budget` unless it is one row, and `overhead`
    tokens. It has at most `most` rows. (Shortest path: the best way on from each row, from the last one back.)
    """
    count = len(lengths)
    best = np.zeros(count + 1)
    following = np.zeros(count, dtype=np.int64)
    for first in range(count - 1, -1, -1):
        number = np.arange(1, 1 + min(most, max(1, budget // lengths[first]), count - first))
        cost = best[first + number] + number * lengths[first] + overhead
        chosen = int(cost.argmin())
        best[first], following[first] = cost[chosen], first + number[chosen]
    cuts = []
    first = 0
    while first < count:
        cuts.append(slice(first, int(following[first])))
        first = int(following[first])
    return cuts
