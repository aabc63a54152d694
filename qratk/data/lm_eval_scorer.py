"""Scores items of an lm-eval task: by its own metrics, and by how likely the right choices are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, compress
from typing import Any, Final

import torch
from torch import Tensor

from qratk.core.errors import DataError
from qratk.core.text import nearest
from qratk.data.choice_figures import CHOICE_FIGURES, UNIT_FIGURES
from qratk.data.generation import StopSequences
from qratk.data.lm_eval_task import Document, HarnessGroup, HarnessTask
from qratk.data.scoring import ChoiceScorer, LikelihoodScorer, Scorer
from qratk.data.suite_scorer import ScoredTask, SuiteScorer

AUTO: Final = "auto"


class LmEvalScorer(Scorer):
    """lm-eval's metrics of a task, item by item and over all, from the log-likelihoods of its requests.

    Of choices with one right one there are also the figures of `ChoiceScorer`, of continuations those of
    `LikelihoodScorer`: unlike an accuracy they tell of two models which is nearer to being right.
    """

    def __init__(
        self, task: HarnessTask, documents: Sequence[Document], items: Sequence[int], score: str, tokenizer: Any
    ) -> None:
        """`items` holds the item of each row. Raises DataError for a score that the task does not have."""
        super().__init__(items, len(documents), len(task.text_figures) if task.generates else 0)
        self._tokenizer = tokenizer
        self._stop = StopSequences(tokenizer, task.until) if task.generates else None
        self._documents = tuple(documents)
        counts = torch.bincount(self.items, minlength=len(documents)).tolist()
        self._starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        self._counts = counts
        self._task = task
        self._right: list[tuple[int, ...]] = []
        self._liked: tuple[Scorer, Tensor] | None = None  # not a submodule, and the rows that it is of
        self._put_likelihoods()
        self.needs_greedy = task.needs_greedy
        self.score = self._known(score)

    def _put_likelihoods(self) -> None:
        """Have a scorer of likelihoods, where what is right is known and one."""
        task = self._task
        if task.own_results or task.generates:
            return
        if task.output_type == "loglikelihood":
            self._liked = (LikelihoodScorer(self.items.tolist(), self.num_items), torch.arange(len(self.items)))
            return
        choices = [task.choices(document) for document in self._documents]
        self._right = [task.right(document) for document in self._documents]
        if any(len(right) > 1 for right in self._right):
            return
        rows = [start + k for start, own in zip(self._starts, choices, strict=True) for k in range(len(own))]
        owners = [index for index, own in enumerate(choices) for _ in own]
        lengths = [len(text) for own in choices for text in own]
        labels = [right[0] for right in self._right]
        self._liked = (ChoiceScorer(owners, labels, lengths, score="prob_per_token"), torch.tensor(rows))

    def require_figure(self, name: str) -> None:
        """Raise DataError for what is no figure of the task's items."""
        self._known(name)

    def _known(self, name: str) -> str:
        """The figure of that name, the task's own first choice for `auto`."""
        if self._task.generates:
            name = next((full for full in self._task.text_figures if full.partition(",")[0] == name), name)
        if name == AUTO:
            first = [*self._smooth[:1], *self._bounded]
            if not first:
                raise DataError(f"task {self._task.name} has no metric that is a mean over items; it cannot be a score")
            return first[0]
        return required(name, self.figure_names(), f"task {self._task.name}")

    @property
    def _bounded(self) -> list[str]:
        task = self._task
        return list(task.text_figures) if task.generates else [name for name in task.metrics if task.bounded(name)]

    def figure_names(self) -> list[str]:
        """Figures that are a mean over items."""
        return list(dict.fromkeys([*self._bounded, *self._smooth, *(CHOICE_FIGURES if self._of_choices else ())]))

    @property
    def _of_choices(self) -> bool:
        return self._liked is not None and isinstance(self._liked[0], ChoiceScorer)

    @property
    def _smooth(self) -> list[str]:
        """Figures between 0 and 1 that are made of likelihoods, the best to search by first."""
        if self._liked is None:
            return []
        return ["prob_per_token", *UNIT_FIGURES] if self._of_choices else ["token_prob"]

    def _likelihoods(self) -> Scorer:
        """The scorer of likelihoods, with what was seen."""
        assert self._liked is not None
        scorer, rows = self._liked
        for name in ("log_likelihood", "tokens", "seen", "greedy"):
            setattr(scorer, name, getattr(self, name).cpu()[rows])
        return scorer

    def stopped(self, row: int, tokens: Sequence[int]) -> bool:
        """Whether one of the texts has come that end a text of the task."""
        return self._stop is not None and self._stop(tokens)

    def text_values(self, row: int, tokens: Sequence[int]) -> Sequence[float]:
        """The task's metrics of a row's text."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return self._task.text_values(self._documents[int(self.items[row])], text)

    def _results(self, admitted: Sequence[bool]) -> list[dict[str, Any]]:
        """What the task says of each of the items that are admitted."""
        if self._task.generates:
            means = (self.values.cpu().double() / self.seen.cpu().clamp(min=1)[:, None]).tolist()
            return [dict(zip(self._task.text_figures, own, strict=True)) for own in compress(means, admitted)]
        values = self._row_values()[0].tolist()
        greedy = (self.greedy.cpu() > 0).tolist()
        places = zip(self._documents, self._starts, self._counts, strict=True)
        return [
            self._task.results(document, [(values[row], greedy[row]) for row in range(start, start + count)])
            for document, start, count in compress(places, admitted)
        ]

    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        figures = {} if self._liked is None else self._likelihoods()._figures(complete)
        results = self._results(complete.tolist())
        for metric in dict.fromkeys(name for result in results for name in result):
            value = self._task.aggregated(metric, [result[metric] for result in results if metric in result])
            figures[metric] = torch.tensor(value, dtype=torch.float64)
        figures.pop("score", None)
        return {"score": self._of_items(self.score, results, complete).mean(), **figures}

    def _outcomes(self) -> Tensor:
        every = torch.ones(self.num_items, dtype=torch.bool)
        return self._of_items(self.score, None, every)

    def item_figure(self, name: str) -> Tensor:
        """A metric or figure between 0 and 1 of each item; "auto" is the score."""
        name = self._known(name)
        if name in CHOICE_FIGURES and name not in UNIT_FIGURES:
            return super().item_figure(name)
        return self._of_items(name, None, torch.ones(self.num_items, dtype=torch.bool))

    def _of_items(self, name: str, results: list[dict[str, Any]] | None, admitted: Tensor) -> Tensor:
        """A figure of each of the items that are admitted."""
        if name in CHOICE_FIGURES and self._of_choices:
            scorer = self._likelihoods()
            assert isinstance(scorer, ChoiceScorer)
            scorer.score = name  # type: ignore[assignment]
            # One of them is fitted to the items in view.
            return CHOICE_FIGURES[scorer.score](scorer._compared(admitted))
        if name == "token_prob" and self._liked is not None:
            return self._likelihoods().item_figure(name)[admitted]
        results = self._results(admitted.tolist()) if results is None else results
        values = torch.tensor([float(result[name]) for result in results], dtype=torch.float64)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise DataError(
                f"task {self._task.name}: {name} of an item is {float(values.max())}, not between 0 and 1; choose "
                f"another metric"
            )
        return values

    def _exact(self) -> Tensor:
        greedy = (self.greedy.cpu() > 0).tolist()
        rights = self._right or [tuple(range(count)) for count in self._counts]
        found = [any(greedy[start + k] for k in right) for start, right in zip(self._starts, rights, strict=True)]
        return torch.tensor(found)


def required(name: str, known: Sequence[str], of: str) -> str:
    """The name of a figure. Raises DataError where it is none of those known."""
    if name not in known:
        raise DataError(
            f"{of} has no figure {name!r} that is a mean over items; it has {', '.join(known)}{nearest(name, known)}"
        )
    return name


class GroupScorer(SuiteScorer):
    """Scores a group of lm-eval's tasks, whose figures are made of those of its tasks as the group says: by how many
    documents each has, or of all alike.

    A figure of which the group says nothing is the mean over items. Figures of tasks, and of groups in the group, are
    `<name>/<figure>`.
    """

    def __init__(self, group: HarnessGroup, scorers: Sequence[LmEvalScorer], score: str) -> None:
        """Raises DataError for a score that not all tasks have."""
        self._group = group
        super().__init__([ScoredTask(scorer._task.name, scorer, scorer.score, 1.0) for scorer in scorers])
        self._own = group.weighings[0]
        tasks = [scorer._task for scorer in scorers]
        self._metrics = {task.name: task.text_figures if task.generates else task.metrics for task in tasks}
        self.score = self._known(score)

    def require_figure(self, name: str) -> None:
        """Raise DataError for what is no figure of all tasks of the group."""
        self._known(name)

    def _known(self, name: str) -> str:
        scorers = [task.scorer for task in self._tasks]
        assert all(isinstance(scorer, LmEvalScorer) for scorer in scorers)
        each = [scorer.figure_names() for scorer in scorers if isinstance(scorer, LmEvalScorer)]
        common = [figure for figure in each[0] if all(figure in names for names in each)]
        if name == AUTO:
            smooth = [figure for figure in ("prob_per_token", "token_prob") if figure in common]
            told = [figure for figure in common if self._own.by_size(figure) is not None]
            if not smooth + told:
                raise DataError(f"tasks of the group {self._group.name} have no figure in common: name a `score`")
            return (smooth + told)[0]
        full = [figure for figure in common if figure.partition(",")[0] == name]
        return required(name if name in common or not full else full[0], common, f"the group {self._group.name}")

    def _alike(self, figure: str) -> bool:
        """Whether all tasks count alike in a figure."""
        return self._own.by_size(figure) is False

    def weights(self, figure: str) -> tuple[float, ...] | None:
        """Weight of each item in a figure; None where all are alike."""
        if not self._alike(self._known(figure)):
            return None
        return tuple(1 / task.scorer.num_items for task in self._tasks for _ in range(task.scorer.num_items))

    def item_figure(self, name: str) -> Tensor:
        """A figure between 0 and 1 of each item, that of its task; "auto" is the score."""
        name = self.score if name == AUTO else self._known(name)
        return torch.cat([task.scorer.item_figure(name) for task, _ in self._parts()])

    def mean_figure(self, name: str, admitted: Tensor) -> Tensor:
        """A figure over the items that are admitted, as the group weighs tasks."""
        name = self.score if name == AUTO else self._known(name)
        values = self.item_figure(name)
        if not self._alike(name):
            return values[admitted].mean()
        parts = [(values[place], admitted[place]) for _, place in self._parts()]
        return torch.stack([own[done].mean() for own, done in parts if bool(done.any())]).mean()

    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        own: dict[str, dict[str, Tensor]] = {}
        sizes: dict[str, int] = {}
        for task, place in self._parts():
            done = complete[place]
            if bool(done.any()):
                own[task.name], sizes[task.name] = task.scorer._figures(done), int(done.sum())
        figures = {"score": self.mean_figure(self.score, complete)}
        for weighing in self._group.weighings:
            prefix = "" if weighing is self._own else f"{weighing.name}/"
            names = [name for name in weighing.tasks if name in own]
            for figure in dict.fromkeys(figure for name in names for figure in own[name] if figure != "score"):
                by_size = weighing.by_size(figure)
                having = [name for name in names if figure in own[name] and figure in self._metrics[name]]
                if by_size is not None and having:
                    counts = torch.tensor([float(sizes[name]) if by_size else 1.0 for name in having]).double()
                    values = torch.stack([own[name][figure].double() for name in having])
                    figures[f"{prefix}{figure}"] = (values * counts).sum() / counts.sum()
        others = {f"{name}/{figure}": value for name, found in own.items() for figure, value in found.items()}
        return {**figures, **{name: value for name, value in others.items() if not name.endswith("/score")}}

    def _outcomes(self) -> Tensor:
        return self.item_figure(self.score)
