"""Fronts and hypervolume for the two objectives: larger score, fewer bytes (Eq. 27-28)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qratk.core.evaluation import Evaluation
from qratk.core.memory import Scope


def hypervolume_2d(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that the points (both coordinates minimised) dominate within the reference corner (Eq. 27)."""
    inside = sorted((x, y) for x, y in points if x < reference[0] and y < reference[1])
    area, ceiling = 0.0, reference[1]
    for x, y in inside:
        if y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


@dataclass(frozen=True)
class ParetoFront:
    """Measured evaluations, none dominated by another, by ascending bytes."""

    evaluations: tuple[Evaluation, ...]
    scope: Scope = "storage"

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation], scope: Scope = "storage") -> ParetoFront:
        """Front of the successful evaluations; of equal ones the first measured stays."""
        ordered = sorted((e for e in evaluations if e.ok), key=lambda e: (e.footprint.bytes(scope), -e.score))
        front: list[Evaluation] = []
        for evaluation in ordered:
            if not front or evaluation.score > front[-1].score:
                front.append(evaluation)
        return cls(tuple(front), scope)

    def hypervolume(self, reference: tuple[float, float], limit_bytes: int) -> float:
        """Dominated area; the axes are the negated score and the bytes as a fraction of the budget.

        `reference` is (negated score, fraction of the budget), fixed after the first generation.
        """
        points = [(-e.score, e.footprint.bytes(self.scope) / limit_bytes) for e in self.evaluations]
        return hypervolume_2d(points, reference)

    def __len__(self) -> int:
        return len(self.evaluations)


def fronts(evaluations: Sequence[Evaluation], scope: Scope = "storage") -> Iterator[tuple[Evaluation, ...]]:
    """The successful evaluations front by front, each by descending score: the second is what the first dominates."""
    left = [evaluation for evaluation in evaluations if evaluation.ok]
    while left:
        front = ParetoFront.of(left, scope).evaluations[::-1]
        yield front
        taken = {id(evaluation) for evaluation in front}
        left = [evaluation for evaluation in left if id(evaluation) not in taken]
