"""The score of a suite: the weighted mean of its tasks' figures, each by the task's own scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qratk.data.scoring import Scorer


@dataclass(frozen=True)
class ScoredTask:
    """A task's scorer, the figure of it that counts, and the weight that it has."""

    name: str
    scorer: Scorer
    figure: str
    weight: float


class SuiteScorer(Scorer):
    """Scores rows of several tasks, one task behind the other.

    The score is the weighted mean of one figure of each task, all between 0 and 1. `<task>/score` is that figure, and
    all that the task's own scorer says is `<task>/<figure>`. Over some of the rows it is of the tasks that they are of.
    """

    def __init__(self, tasks: Sequence[ScoredTask], wanted: Sequence[bool] | None = None) -> None:
        """`wanted` says of each item whether it is to be scored, where not all are."""
        items: list[int] = []
        self._ends: list[tuple[int, int]] = []  # of rows and of items
        total = 0
        for task in tasks:
            items += (task.scorer.items + total).tolist()
            total += task.scorer.num_items
            self._ends.append((len(items), total))
        super().__init__(items, total, max((task.scorer.width for task in tasks), default=0))
        self._tasks = tuple(tasks)
        self.needs_greedy = any(task.scorer.needs_greedy for task in tasks)
        self.wanted = None if wanted is None else torch.tensor(wanted)

    def _parts(self) -> list[tuple[ScoredTask, slice]]:
        """Each task, its scorer with what was seen of its rows, and the place of its items."""
        parts = []
        first_row = first_item = 0
        for task, (row, item) in zip(self._tasks, self._ends, strict=True):
            for name in ("log_likelihood", "tokens", "seen", "greedy"):
                setattr(task.scorer, name, getattr(self, name)[first_row:row].cpu())
            if task.scorer.width:
                task.scorer.values = self.values[first_row:row, : task.scorer.width].cpu()
            parts.append((task, slice(first_item, item)))
            first_row, first_item = row, item
        return parts

    def stopped(self, row: int, tokens: Sequence[int]) -> bool:
        """Whether the text of a row is over, as its task says."""
        scorer, own = self._of_row(row)
        return scorer.stopped(own, tokens)

    def text_values(self, row: int, tokens: Sequence[int]) -> Sequence[float]:
        """Figures of the text of a row, those of its task."""
        scorer, own = self._of_row(row)
        return scorer.text_values(own, tokens)

    def _of_row(self, row: int) -> tuple[Scorer, int]:
        """The scorer of the task that a row is of, and the row's number there."""
        first = 0
        for task, (end, _) in zip(self._tasks, self._ends, strict=True):
            if row < end:
                return task.scorer, row - first
            first = end
        raise IndexError(row)

    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        weights: list[float] = []
        for task, place in self._parts():
            done = complete[place]
            if not bool(done.any()):
                continue
            own[f"{task.name}/score"] = task.scorer.mean_figure(task.figure, done)
            weights.append(task.weight)
            figures = task.scorer._figures(done)
            others |= {f"{task.name}/{name}": value for name, value in figures.items() if name != "score"}
        weight = torch.tensor(weights, dtype=torch.float64)
        score = (torch.stack(list(own.values())).double() * weight).sum() / weight.sum()
        return {"score": score, **own, **others}

    def _outcomes(self) -> Tensor:
        return torch.cat([task.scorer.item_figure(task.figure) for task, _ in self._parts()])

    def _exact(self) -> Tensor:
        return torch.cat([task.scorer._exact() for task, _ in self._parts()])
