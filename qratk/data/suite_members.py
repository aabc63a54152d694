"""What a suite is made of: sources to train on, and named tasks to be judged by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite
from typing import Any, Final, cast

from qratk.core.errors import DataError
from qratk.core.text import nearest
from qratk.data.base import TaskData
from qratk.data.splits import Split, require_at_least
from qratk.data.task import ShotStyle

# The command line finds mistakes by parsing parts, which then must not be refused for want of another part.
_MISSING: Final = cast(TaskData, None)
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class TrainingSource:
    """Rows to train on.

    Args:
        data: the rows, `train` of any data module; its `validation` and `test` are not used.
        weight: expected share of the rows of a batch, relative to the other sources: 1 where another source has one,
            the number of rows where none has.
        items: rows at most, drawn by seed.
    """

    data: TaskData = _MISSING
    weight: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class SuiteTask:
    """Rows to be judged by.

    Args:
        data: the rows, `validation` or `test` of any data module, by where the task stands.
        metric: figure of the task in the score, between 0 and 1: acc, acc_norm, prob, prob_per_token or prob_per_char
            of choices, token_prob of texts and answers; by default the data's `score`, or else its first.
        weight: of the task in the score, relative to the other tasks.
        items: rows at most, drawn by seed; of validation also a list, how many at each rung of a search from the lowest
            on, of which those of a lower rung are a part of those of a higher one.
        shots: examples shown before each item, the same for all.
        examples: file that they are drawn from; by default the training rows of `data`.
        description: text before the examples.
        fewshot_delimiter: text behind each example.
    """

    data: TaskData = _MISSING
    metric: str | None = None
    weight: float = 1.0
    items: int | list[int] | None = None
    shots: int = 0
    examples: str | list[str] | None = None
    description: str = ""
    fewshot_delimiter: str = "\n\n"

    @property
    def figure(self) -> str:
        """Name of the figure that counts."""
        return self.metric or _first_choice(self.data)

    @property
    def most_items(self) -> int | None:
        """Rows at most: at the highest rung."""
        return self.items[-1] if isinstance(self.items, list | tuple) else self.items

    def items_at(self, rung: int | None) -> int | None:
        """Rows at most at a rung; None is the highest one."""
        if rung is None or not isinstance(self.items, list | tuple):
            return self.most_items
        return self.items[min(rung, len(self.items) - 1)]

    @property
    def style(self) -> ShotStyle:
        """How examples are shown."""
        return ShotStyle(self.description, self.fewshot_delimiter)


def _first_choice(data: TaskData) -> str:
    return str(getattr(data, "score", None) or next(iter(data.metrics), ""))


@contextmanager
def told(place: str) -> Iterator[None]:
    """Context in which errors about data name the part of the suite that they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def checked_sources(given: Any) -> tuple[TrainingSource, ...]:
    """The sources, which may be given as mappings. Raises DataError for what cannot be."""
    if given is not None and (isinstance(given, str | Mapping) or not isinstance(given, Sequence)):
        raise DataError(f"train must be a list of sources, each {{data, weight, items}}; got {given!r:.200}")
    sources = tuple(_made(TrainingSource, source, f"train[{index}]") for index, source in enumerate(given or ()))
    for index, source in enumerate(sources):
        with told(f"train[{index}]"):
            _check_member(source.data, source.items, 1.0 if source.weight is None else source.weight)
            if source.data.sources["train"] is None:
                raise DataError("a source to train on needs the option `train` of its data")
    weighted = any(source.weight is not None for source in sources)
    return tuple(replace(s, weight=1.0) if weighted and s.weight is None else s for s in sources)


def checked_tasks(given: Any, split: Split) -> dict[str, SuiteTask]:
    """The tasks of a split by name, which may be given as mappings. Raises DataError for what cannot be."""
    if given is not None and not isinstance(given, Mapping):
        raise DataError(f"{split} must name tasks, {{name: {{data: ..., metric: ...}}}}; got {given!r:.200}")
    tasks = {name: _made(SuiteTask, task, f"{split}.{name}") for name, task in (given or {}).items()}
    for name, task in tasks.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DataError(f"{split}: a task's name is made of letters, digits, _ and -; got {name!r}")
        with told(f"{split}.{name}"):
            _check_task(task, split)
    return tasks


def _made(kind: type[Any], given: Any, place: str) -> Any:
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise DataError(f"{place} must hold {{data: ..., ...}}; got {given!r:.200}")
    known = list(kind.__dataclass_fields__)
    for option in given:
        if option not in known:
            raise DataError(f"{place}: unknown option {option!r}; known are {', '.join(known)}{nearest(option, known)}")
    return kind(**given)


def _check_member(data: Any, items: int | Sequence[int] | None, weight: float) -> None:
    if data is _MISSING:
        raise DataError("there is no `data`: give the data module that the rows come from")
    if not isinstance(data, TaskData):
        raise DataError(f"`data` must be a data module, got {data!r:.200}")
    if data.holds_others:
        raise DataError(f"{type(data).__name__} cannot be a part of a suite: give its sources and tasks to that one")
    for size in [items] if isinstance(items, int) else items or ():
        require_at_least("items", size, 1)
    if not (isfinite(weight) and weight > 0):
        raise DataError(f"weight must be above 0, got {weight}; leave out what is not to count")


def _check_task(task: SuiteTask, split: Split) -> None:
    data = task.data
    _check_member(data, task.items, task.weight)
    if not data.metrics:
        raise DataError(
            f"{type(data).__name__} has no figure between 0 and 1, so that it cannot be one of several tasks"
        )
    if task.figure not in data.metrics:
        said = "metric" if task.metric is not None else "the data's `score`, without a `metric`,"
        raise DataError(
            f"{said} must be one of {', '.join(data.metrics)}, which lie between 0 and 1, so that no task outweighs "
            f"the others by its unit; got {task.figure!r}" + nearest(task.figure, data.metrics)
        )
    if isinstance(task.items, list | tuple):
        if split != "validation":
            raise DataError(f"a number of items for each rung is for validation: give one number, got {task.items}")
        if not task.items or any(after < before for before, after in pairwise(task.items)):
            raise DataError(f"items for each rung must not become fewer, as in [50, 200]; got {task.items}")
    given, carved = data.sources[split], split == "validation" and data.sources["train"] is not None
    if given is None and not carved:
        also = " (or `train`, of which a part is taken)" if split == "validation" else ""
        raise DataError(f"the task needs the option `{split}` of its data{also}")
    if data.shots_option is not None and (task.shots or task.examples is not None or task.description):
        raise DataError(
            f"{type(data).__name__} shows its task's own examples and description: leave out `shots`, `examples` and "
            f"`description`, and give `{data.shots_option}` to the data"
        )
    require_at_least("shots", task.shots, 0)
    if task.shots and task.examples is None and data.sources["train"] is None:
        raise DataError(f"{task.shots} shots need rows to draw them from: give `examples`, or `train` of the data")
    if not task.shots and task.examples is not None:
        raise DataError("`examples` are given, but `shots` is 0: give the number of examples to show")


def require_apart(places: Mapping[str, TaskData], *, max_length: int) -> None:
    """Raise DataError for a data module in two places, or with longer rows than the suite's."""
    seen: dict[int, str] = {}
    for place, data in places.items():
        if id(data) in seen:
            raise DataError(f"{seen[id(data)]} and {place} are one data module: give each its own")
        seen[id(data)] = place
        if data.asked_length is not None and data.asked_length > max_length:
            raise DataError(f"{place}: max_length {data.asked_length} is above the suite's, {max_length}: raise that")
