"""Several kinds of rows at once: a mixture to train on, and a suite of tasks to be judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast, final

from qratk.core.errors import DataError
from qratk.core.resolution import TaskItems
from qratk.data.attached import DEFAULT_LENGTH
from qratk.data.base import TaskData
from qratk.data.encoding import Encoded
from qratk.data.identity import counts
from qratk.data.order import Mixture
from qratk.data.sampler import StepSampler
from qratk.data.sources import Row
from qratk.data.splits import SPLITS, Item, Split, SplitOptions
from qratk.data.suite_members import SuiteTask, TrainingSource, checked_sources, checked_tasks, require_apart, told
from qratk.data.suite_scorer import ScoredTask, SuiteScorer
from qratk.data.suite_splits import Member, SuiteItem, SuiteSplits


@final
class SuiteData(TaskData):
    """Training rows of several sources, each of its own kind, and a score over several named tasks.

    The score is the weighted mean of a figure between 0 and 1 of each task; rows in two splits stay in test, or else in
    validation. `docs/suite.md` has an example.

    Args:
        train: sources, each {data, weight, items}: `train` of a data module of any kind.
        validation: tasks by name, each {data, metric, weight, items, shots, examples, description,
            fewshot_delimiter}: `validation` of a data module of any kind.
        test: as `validation`, of `test` of the data modules.
        batch_size: rows of a training micro-batch; that of the members does not count.
        eval_batch_size: as in `TaskData`, for rows of all tasks together.
        max_length: as in `TaskData`; a member may have a shorter one.
        seed: of subsamples, examples and training order.
        num_workers: as in `TaskData`.
        share_prompts: as in `TaskData`.
    """

    holds_others = True

    def __init__(
        self,
        train: list[TrainingSource] | None = None,
        *,
        validation: dict[str, SuiteTask] | None = None,
        test: dict[str, SuiteTask] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        share_prompts: bool = True,
    ) -> None:
        self.training_sources = checked_sources(train)
        self.tasks: Mapping[Split, Mapping[str, SuiteTask]] = {
            "train": {},
            "validation": checked_tasks(validation, "validation"),
            "test": checked_tasks(test, "test"),
        }
        if not (train or validation or test):
            raise DataError("an empty suite: give sources to `train`, and tasks to `validation` and `test`")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            seed=seed,
            num_workers=num_workers,
            share_prompts=share_prompts,
        )
        for member in self.members:
            member.data.join(max_length=max_length, carves=member.split == "validation")

    def _split(self, options: SplitOptions) -> SuiteSplits:
        splits = SuiteSplits(self.training_sources, self.tasks, seed=options.seed)
        self.members = splits.members
        longest = DEFAULT_LENGTH if self.asked_length is None else self.asked_length
        require_apart({member.place: member.data for member in self.members}, max_length=longest)
        return splits

    def parse(self, row: Row) -> Any:
        """Raises DataError: rows belong to members, which read them."""
        raise DataError(f"{row.where}: a suite has no rows of its own; its members read theirs")

    def fields_used(self) -> frozenset[str]:
        """Fields that any member uses."""
        return frozenset(name for member in self.members for name in member.data.fields_used())

    @property
    def prediction_split(self) -> Split:
        """The split that `predict` works on."""
        return "test" if self.tasks["test"] else "validation"

    def _attach_members(self) -> None:
        attached = self.attached
        for member in self.members:
            member.data.attach(attached.tokenizer, context_length=attached.context_length)

    def _of(self, split: Split) -> Iterator[tuple[int, str, TaskData]]:
        """Number, place and data of each member of a split."""
        for number, member in enumerate(self.members):
            if member.split == split:
                yield number, member.place, member.data

    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to train on of items of any sources, source by source."""
        self._attach_members()
        for first, member, own in self._grouped(items):
            with told(member.place):
                for row in member.data.encode_training(own):
                    yield replace(row, item=row.item + first)

    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to score of items of any tasks, task by task."""
        self._attach_members()
        for first, member, own in self._grouped(items):
            with told(member.place):
                for row in member.data.encode_scoring(own):
                    yield replace(row, item=row.item + first)

    def _grouped(self, items: Sequence[Item]) -> Iterator[tuple[int, Member, list[Item]]]:
        """Stretches of one member's items: the index of the first, the member, and the items as it has them."""
        first = 0
        for number, group in groupby(cast("Sequence[SuiteItem]", items), key=lambda item: item.member):
            own: list[Item] = [item.content for item in group]
            yield first, self.members[number], own
            first += len(own)

    def training_rows(self) -> tuple[Encoded, ...]:
        """Encoded rows of all sources, source by source. Raises DataError for a source with nothing to learn."""
        rows = super().training_rows()
        sizes = self._sizes(rows)
        for number, place, data in self._of("train"):
            if not sizes[number]:
                raise DataError(f"{place}: no row has anything to learn within max_length {data.max_length}: raise it")
        return rows

    def scoring_rows(self, split: Split) -> tuple[Encoded, ...]:
        """Encoded rows to score of all tasks, task by task."""
        if (split, False) not in self._encoded:
            first, rows = 0, []
            self.items(split)  # each task has those of its items that are left to it
            self._attach_members()
            for _, place, data in self._of(split):
                with told(place):
                    rows += [replace(row, item=row.item + first) for row in data.scoring_rows(split)]
                first += len(data.items(split))
            for name, task in self.tasks[split].items():
                with told(f"{split}.{name}"):
                    task.data.require_figure(task.figure, split)
            self._encoded[split, False] = tuple(rows)
        return self._encoded[split, False]

    def _sizes(self, rows: Sequence[Encoded]) -> Counter[int]:
        """Training rows of each member by its number."""
        items = cast("Sequence[SuiteItem]", self.items("train"))
        return Counter(items[row.item].member for row in rows)

    @property
    def mixture(self) -> Mixture | None:
        """How the sources are mixed; None where no source has a weight: each row then counts alike."""
        sizes = self._sizes(self.training_rows())
        return self._mixed([sizes[number] for number, *_ in self._of("train")])

    def _mixed(self, sizes: Sequence[int]) -> Mixture | None:
        weights = tuple(source.weight for source in self.training_sources if source.weight is not None)
        return Mixture(tuple(sizes), weights) if weights else None

    def sample(self, split: Split, count: int) -> Sequence[Item]:
        """Items as the first batches have them; items to score from all tasks, by how many these have."""
        items = self.items(split)
        if split != "train":
            size = min(count, len(items))
            return [items[index * len(items) // size] for index in range(size)]
        sizes = [len(data.items("train")) for *_, data in self._of("train")]
        sampler = StepSampler(len(items), min(count, len(items)), self.seed, mixture=self._mixed(sizes))
        return [items[index] for index in sampler.batch(0)]

    def scorer(self, split: Split = "validation") -> SuiteScorer:
        """Scorer of all tasks of a split."""
        self.scoring_rows(split)
        tasks = self.tasks[split].items()
        scored = [ScoredTask(name, task.data.scorer(split), task.figure, task.weight) for name, task in tasks]
        return SuiteScorer(scored, self._wanted(split, self.rung))

    def _wanted(self, split: Split, rung: int | None) -> list[bool] | None:
        """Of each item whether it is scored at a rung; None where all are."""
        if split != "validation" or rung is None:
            return None
        self.items(split)
        ranks, wanted = cast(SuiteSplits, self._splits).ranks, []
        for name, task in self.tasks[split].items():
            most = task.items_at(rung)
            wanted += [most is None or rank < most for rank in ranks[f"{split}.{name}"]]
        return None if all(wanted) else wanted

    def chosen_rows(self, split: Split) -> tuple[int, ...] | None:
        """Indices of the rows that are scored at the `rung`; None where all are."""
        wanted = self._wanted(split, self.rung)
        if wanted is None:
            return None
        return tuple(index for index, row in enumerate(self.scoring_rows(split)) if wanted[row.item])

    def groups(self, split: Split) -> tuple[int, ...] | None:
        """Of each item a number of its task and of the examples that this shows; -1 where it shows none."""
        self.items(split)
        shown = cast(SuiteSplits, self._splits).examples
        places: dict[tuple[int, int], int] = {}
        found: list[int] = []
        for number, place, data in self._of(split):
            own = data.groups(split) or (0 if shown.get(place) else -1,) * len(data.items(split))
            found += [-1 if group < 0 else places.setdefault((number, group), len(places)) for group in own]
        return tuple(found) if places else None

    def shares_prompts(self, split: Split) -> bool:
        """Whether prompts of a split are computed once for several rows, if the model allows it."""
        return super().shares_prompts(split) or (self._batches.share_prompts and self.groups(split) is not None)

    def scored_share(self, rung: int | None) -> float:
        """Share of the validation items that is scored at a rung; None is the highest."""
        wanted = self._wanted("validation", rung)
        return 1.0 if wanted is None else sum(wanted) / len(wanted)

    def examples(self, split: Split, task: str) -> tuple[Item, ...]:
        """Items that are shown before those of a task, in their order; none without `shots`."""
        self.items(split)
        return cast(SuiteSplits, self._splits).examples.get(f"{split}.{task}", ())

    def judged(self, rung: int | None) -> tuple[TaskItems, ...]:
        """The tasks of validation, with how many items they have at a rung; None is the highest."""
        sizes, tasks = dict(self.strata("validation")), self.tasks["validation"].items()
        return tuple(TaskItems(name, min(sizes[name], t.items_at(rung) or sizes[name]), t.weight) for name, t in tasks)

    def strata(self, split: Split = "validation") -> tuple[tuple[str, int], ...]:
        """Names of the tasks of a split, and how many items each has."""
        self.items(split)
        return tuple((name, len(task.data.items(split))) for name, task in self.tasks[split].items())

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...]:
        """The weight of an item's task, shared out among the task's items as its figure weighs them: evenly, but for
        groups of tasks that count alike."""
        found: list[float] = []
        for (_, size), task in zip(self.strata(stage), self.tasks[stage].values(), strict=True):
            weights = task.data.figure_weights(stage, task.figure) or (1.0,) * size
            found += [task.weight * weight / sum(weights) for weight in weights]
        return tuple(found)

    def options(self) -> Mapping[str, Any]:
        """What sources and tasks are and how they count, in plain data."""
        self._attach_members()
        splits = cast(SuiteSplits, self._splits)
        _ = splits.items  # examples are drawn with them
        trained = [(_told(s.data), None if s.weight is None else float(s.weight)) for s in self.training_sources]
        scored = {
            f"{split}.{name}": (
                _told(task.data), task.figure, float(task.weight), task.description, task.fewshot_delimiter,
                task.items if isinstance(task.items, list | tuple) else None,
                [item.key for item in splits.examples.get(f"{split}.{name}", ())],
            )
            for split, tasks in self.tasks.items() for name, task in tasks.items()
        }  # fmt: skip
        return {"sources": trained, "tasks": scored}

    def parts(self, split: Split) -> Mapping[str, TaskData]:
        """Sources or tasks of a split by their places."""
        self.items(split)  # each has those of its items that are left to it
        return {place: data for _, place, data in self._of(split)}

    def forms(self, split: Split) -> dict[str, int]:
        """Items of a split by the form of their rows, the most common form first."""
        found: Counter[str] = Counter()
        for _, _, data in self._of(split):
            found.update(data.forms(split))
        return dict(found.most_common())

    def describe(self) -> dict[str, Any]:
        """As of all data, and `members`: the same counts by place, such as `train[0]` and `validation.arc_easy`."""
        found = super().describe()
        members: dict[str, dict[str, Any]] = {}
        for split in filter(self.has, SPLITS):
            items, rows = cast("Sequence[SuiteItem]", self.items(split)), self.rows(split)
            for number, place, data in self._of(split):
                own = [row for row in rows if items[row.item].member == number]
                members[place] = counts(data.items(split), own, data.forms(split))
        return {**found, "members": members}


def _told(data: TaskData) -> tuple[str, Mapping[str, Any], int]:
    """What decides a member's tokens and figures."""
    return type(data).__name__, data.options(), data.max_length
