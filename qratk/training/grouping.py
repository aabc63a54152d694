"""Which candidates are trained side by side: those that continue from the same rung, in cohorts that fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation, Request
from qratk.core.shared import REPLICATE, Setting
from qratk.training.rungs import itself


@dataclass(frozen=True)
class CohortLimits:
    """What keeps candidates from being trained side by side.

    Attributes:
        refusal: why the adapter method cannot be, in words; empty when it can.
        scaled_gradients: whether a scaler of gradients is in use, which is common to all candidates.
        dropout: whether there is any, whose draws are common to all, and which a rank of 0 leaves out.
    """

    refusal: str = ""
    scaled_gradients: bool = False
    dropout: bool = False

    def keeps_alone(self, configurations: Sequence[Configuration]) -> bool:
        """Whether these must be trained one after another."""
        bare = any(0 in configuration.ranks for configuration in configurations)
        dropout = self.dropout or any(c.settings.get("lora_dropout", 0) for c in configurations)
        return self.scaled_gradients or (dropout and bare)


class Grouping:
    """Cuts requests into groups that are measured at once.

    Args:
        wanted: candidates side by side, or "auto" for as many as `fastest` says.
        limits: what keeps candidates apart.
        begins_at: steps after which a candidate's training to so many steps continues.
        fastest: measures the fastest size of a cohort of such configurations.
        decided: what was decided under a key before, or else what its second argument returns, which it keeps.
        recorded: what was decided under a key, by any process and also before a resume, or None.
        say: is told why candidates are trained otherwise than asked for.
        trained: the configuration that is trained for one.
        measured: what is in the journal by now.
    """

    def __init__(
        self,
        wanted: int | Literal["auto"],
        limits: CohortLimits,
        *,
        begins_at: Callable[[Configuration, int], int],
        fastest: Callable[[Sequence[Configuration]], int],
        decided: Callable[[str, Callable[[], Any]], Any],
        recorded: Callable[[str], Any],
        say: Callable[[str], None],
        trained: Callable[[Configuration], Configuration] = itself,
        measured: Callable[[], Iterable[Evaluation]] = tuple,
    ) -> None:
        self._trained, self._measured = trained, measured
        self._wanted: int | Literal["auto"] = wanted
        self._limits = limits
        self._begins_at, self._measure_fastest, self._say = begins_at, fastest, say
        self._decided, self._recorded = decided, recorded
        self._fastest: int | None = None
        self._fitting = sys.maxsize  # candidates side by side, once more of them did not fit into memory
        self._explained = False

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Requests of a replicate that continue from one rung, with one dropout, in cohorts of nearly equal size.

        What is trained alike is together. A training that the journal holds is there to be scored, so that the requests
        for it are kept apart.
        """
        measured = [e for e in self._measured() if e.trained_as is not None]
        done = {(e.trained_as, e.steps, e.replicate) for e in measured if e.ok}
        told = {(e.configuration, e.steps, e.replicate) for e in measured}
        for _, together in groupby(requests, key=self._apart):
            there: list[list[Request]] = []
            trainings: dict[Configuration, list[Request]] = {}
            for request in together:
                training = self._trained(request.configuration)
                if (request.configuration, request.steps, request.replicate) in told:
                    continue
                if (training.digest, request.steps, request.replicate) in done:
                    there.append([request])
                else:
                    trainings.setdefault(training, []).append(request)
            yield from self._cut(there)
            yield from self._cut(list(trainings.values()))

    def _cut(self, rest: Sequence[Sequence[Request]]) -> Iterator[Sequence[Request]]:
        """Groups of so many trainings, with all that is asked of each."""
        while rest:
            # The same for the rest of a list as for the whole: a resumed search asks for the rest.
            size = -(-len(rest) // -(-len(rest) // self.largest([own[0].configuration for own in rest])))
            yield list(chain.from_iterable(rest[:size]))
            rest = rest[size:]

    def _apart(self, request: Request) -> tuple[int, int, int, Setting | None, Setting | None]:
        configuration, steps, replicate = request.configuration, request.steps, request.replicate
        begins_at = 0 if replicate else self._begins_at(configuration, steps)  # a replicate has the one rung
        settings = configuration.settings
        return steps, replicate, begins_at, settings.get("lora_dropout"), settings.get(REPLICATE)

    def largest(self, configurations: Sequence[Configuration]) -> int:
        """How many of these to train side by side, at most."""
        if self._limits.refusal:
            self._explain_alone()
            return 1
        if len(configurations) == 1 or self._limits.keeps_alone(configurations):
            return 1
        if self._wanted != "auto":
            return self._within_memory(self._wanted)
        if self._fastest is None:
            self._fastest = int(self._decided("cohort", lambda: self._measure_fastest(configurations)))
        return self._within_memory(self._fastest)

    def halved(self, count: int) -> int:
        """How many go on side by side after so many did not fit into memory, then and later."""
        self._fitting = int(self._decided(f"cohort/{count}", lambda: (count + 1) // 2))
        self._say(
            f"{count} candidates side by side do not fit into memory; going on with {self._fitting}. "
            f"Set --search.evaluator.cohort={self._fitting} to begin there."
        )
        return self._fitting

    def _within_memory(self, size: int) -> int:
        """At most so many side by side that memory did not run out."""
        halves = (self._recorded(f"cohort/{count}") for count in range(2, size + 1))
        return min([size, self._fitting, *(int(half) for half in halves if half is not None)])

    def _explain_alone(self) -> None:
        if self._wanted != 1 and not self._explained:
            self._say(f"Candidates are trained one by one: {self._limits.refusal}.")
        self._explained = True
