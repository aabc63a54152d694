"""Builds what the candidates of a search share: packed weights, first values of adapters, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qratk.core.space import SearchSpace

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule


class Preparation:
    """Builds the bank when it is first needed, and says its notes once.

    Args:
        module: whose backbone it is.
        data: for starts of adapters that depend on data.
        reference_bits: bits that are needed besides those of the search.
        reference_ranks: ranks, too.
        say: is told the backbone's notes, and of files of the bank.
    """

    def __init__(
        self,
        module: FineTuneModule,
        data: TaskData,
        *,
        reference_bits: tuple[int, ...],
        reference_ranks: tuple[int, ...],
        say: Callable[[str], None],
    ) -> None:
        self._module, self._data, self._say = module, data, say
        self._bits, self._ranks = reference_bits, reference_ranks
        self._before_release: list[Callable[[], None]] = []
        self._announced: set[str] = set()

    def before_release(self, action: Callable[[], None]) -> None:
        """Have something done once, at the last moment at which there are full-precision weights."""
        self._before_release.append(action)

    def build(self, space: SearchSpace) -> None:
        """Build what is missing of the bank for a space; the full-precision weights stay."""
        backbone = self._module.backbone
        backbone.say = self._say
        bits = sorted({*space.bits, *self._bits})
        backbone.build_bank(bits)
        ranks = sorted({*space.ranks, *self._ranks})
        self._module.build_initial([(b, r) for b in bits for r in ranks], self._data)
        self._announce()

    def finish(self, space: SearchSpace) -> None:
        """Build what is missing, and drop the full-precision weights."""
        self.build(space)
        while self._before_release:
            self._before_release[0]()
            self._before_release.pop(0)  # only once it came to an end: memory may run out
        self._module.backbone.release_reference()

    def _announce(self) -> None:
        for note in self._module.backbone.notes:
            if note not in self._announced:
                self._say(note)
                self._announced.add(note)
