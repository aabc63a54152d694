"""Which candidates of a rung go on to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypedDict

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Candidate, Evaluation, History, SurrogateQuality
from qratk.core.pareto import fronts
from qratk.core.problem import Problem
from qratk.loop.settings import SearchSettings


class Promotion(TypedDict):
    """A decision, as plain data: configurations that go on, best first, and how the surrogate that said so stood."""

    configurations: list[str]
    trusted: bool
    quality: dict[str, float] | None


@dataclass(frozen=True)
class Trust:
    """How the surrogate stood in a generation: its quality at the first promotion that has one."""

    quality: SurrogateQuality | None = None
    used: bool = False

    def after(self, decision: Promotion) -> Trust:
        """The same once a quality is known, else that of the promotion."""
        if self.quality is not None or decision["quality"] is None:
            return self
        figures = decision["quality"]
        quality = SurrogateQuality(
            int(figures["pairs"]), figures["spearman"], figures["pearson"], figures["low_fidelity_spearman"]
        )
        return Trust(quality, decision["trusted"])


def promote(
    settings: SearchSettings, problem: Problem, history: History, candidates: Sequence[Candidate], low: int, size: int
) -> Promotion:
    """The best `size` of the candidates at a rung: by the surrogate while it is trusted, else by the measured score."""
    surrogate = settings.surrogate
    surrogate.fit(problem, history, low=low, high=settings.ladder.highest)
    ran = [e for e in (history.get(c.configuration, low) for c in candidates) if e and e.ok]
    merit = [e.score for e in ran]
    if surrogate.trusted:
        merit = [guess.mean for guess in surrogate.predict(problem, ran)]
    return {
        "configurations": [str(c) for c in _ordered(settings, problem, ran, merit)[:size]],
        "trusted": surrogate.trusted,
        "quality": None if surrogate.quality is None else asdict(surrogate.quality),
    }


def going(decision: Promotion, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that a decision names, in its order."""
    chosen = {text: position for position, text in enumerate(decision["configurations"])}
    named = [c for c in candidates if str(c.configuration) in chosen]
    return sorted(named, key=lambda c: chosen[str(c.configuration)])


def _ordered(
    settings: SearchSettings, problem: Problem, ran: Sequence[Evaluation], merit: Sequence[float]
) -> list[Configuration]:
    """Configurations by what promotion goes by, merit in place of the score; ties go to fewer bytes."""
    if settings.promote_by == "front":
        guesses = [replace(e, score=m) for e, m in zip(ran, merit, strict=True)]
        return [e.configuration for front in fronts(guesses, settings.scope) for e in front]
    order = sorted(range(len(ran)), key=lambda i: (-merit[i], problem.bytes(ran[i].configuration), i))
    return [ran[i].configuration for i in order]
