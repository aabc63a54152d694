"""A task of lm-eval as data: its own prompts, examples and metrics, scored within a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final, final

from qratk.core.errors import DataError
from qratk.data.base import TaskData
from qratk.data.choice_figures import CHOICE_FIGURES, UNIT_FIGURES
from qratk.data.encoding import Encoded, PairEncoder, encoded
from qratk.data.lm_eval_scorer import AUTO, GroupScorer, LmEvalScorer
from qratk.data.lm_eval_task import (
    FEWSHOT_SEED,
    ChatPrompt,
    HarnessGroup,
    HarnessTask,
    document_of,
    load_harness,
)
from qratk.data.sources import Row, Source, content_key
from qratk.data.splits import Item, Split, SplitOptions, Splits, permutation, require_at_least

_METRICS: Final = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@final
class LmEvalData(TaskData):
    """An lm-eval task: `output_type` multiple_choice and loglikelihood, by log-likelihoods, and generate_until, by the
    text that the model goes on with, the likeliest token each time. Or a group of such tasks (MMLU), whose figures are
    made of those of its tasks as it says, and recorded beside them.

    Prompts, examples and metrics are made by lm-eval; figures are equal to those of its own run over the same items.

    Args:
        task: name of the task or group: lm-eval's own, or one in `task_folders`.
        task_folders: folders of tasks in YAML.
        data_files: files of rows in JSON by the names of their splits, as in {train: a.jsonl, test: b.jsonl}, in the
            place of the data set that the task names; with the fields that the task's templates ask for.
        max_gen_toks: tokens of a generated text at most; null means what the task says, or else lm-eval's default.
        num_fewshot: examples before each item; null means what the task says.
        fewshot_seed: by which the task's own sampler draws them; the default is that of lm-eval's command line.
        apply_chat_template: put prompts through the tokenizer's chat template, as lm-eval's option of that name does.
        fewshot_as_multiturn: show examples as earlier turns of the chat; false puts all into one message. Null means
            true with a chat template, as on lm-eval's command line.
        train: split of the task's data set whose right answers are trained on, without examples; null means none.
        validation: split of the task's data set; `auto` is the one that the task calls so. Where the task has no other
            for test, `auto` of both shares its documents out by the seed: `validation_items` (or
            `validation_fraction`) of them for validation, the others for test. Null means none, or with `train` as many
            taken off that.
        test: as `validation`; `auto` is the split that lm-eval evaluates.
        score: what a search maximises: one of the task's metrics that are a mean over items, or a score of
            `MultipleChoiceData`, or `token_prob`; `auto` is `prob_per_token` of choices, `token_prob` of continuations,
            and the task's first metric of generated text, or where it makes results by a function of its own.

    The other options of `TaskData` apply too, but for `rename`. Raises DataError for options that cannot be.
    """

    shots_option = "num_fewshot"
    metrics = (AUTO, *dict.fromkeys((*_METRICS, *UNIT_FIGURES, "token_prob")))

    def __init__(
        self,
        task: str,
        *,
        task_folders: list[str] | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        max_gen_toks: int | None = None,
        num_fewshot: int | None = None,
        fewshot_seed: int = FEWSHOT_SEED,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool | None = None,
        train: str | None = None,
        validation: str | None = AUTO,
        test: str | None = AUTO,
        score: str = AUTO,
        **kwargs: Any,
    ) -> None:
        if not isinstance(task, str) or not task:
            raise DataError(f"task must be the name of one lm-eval task, got {task!r:.80}")
        require_at_least("num_fewshot", 0 if num_fewshot is None else num_fewshot, 0)
        if fewshot_as_multiturn and not apply_chat_template:
            raise DataError("fewshot_as_multiturn is of chats: set apply_chat_template too, or leave it out")
        if not isinstance(score, str) or not score:
            raise DataError(f"score must be the name of a figure, got {score!r:.80}")
        if score not in (*self.metrics, *CHOICE_FIGURES):  # one that only the task knows: checked when it is loaded
            self.metrics = (*self.metrics, score)
        named = [split for split in (train, validation, test) if split not in (None, AUTO)]
        if len(set(named)) < len(named):
            raise DataError(
                f"train, validation and test must be different splits of the task's data, got {train}, {validation} "
                f"and {test}; without `validation` and `test` one split of a task is shared out by the seed"
            )
        if kwargs.get("rename"):
            raise DataError("rows of lm-eval tasks are read by the task's own templates: `rename` does not apply")
        if max_gen_toks is not None:
            require_at_least("max_gen_toks", max_gen_toks, 1)
        self.task, self.task_folders = task, tuple(task_folders or ())
        self.data_files, self.max_gen_toks = dict(data_files or {}), max_gen_toks
        self.num_fewshot, self.fewshot_seed, self.score = num_fewshot, fewshot_seed, score
        self.apply_chat_template = apply_chat_template
        self.fewshot_as_multiturn = apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn
        super().__init__(train, validation=validation, test=test, **kwargs)

    def _split(self, options: SplitOptions) -> LmEvalSplits:
        return LmEvalSplits(options, self)

    @cached_property
    def harness(self) -> HarnessTask | HarnessGroup:
        """The task or group, loaded when it is first asked for. Raises DataError."""
        return load_harness(
            self.task,
            self.task_folders,
            num_fewshot=self.num_fewshot,
            seed=self.fewshot_seed,
            data_files=self._present_files(),
            max_gen_toks=self.max_gen_toks,
        )

    @property
    def _chat(self) -> ChatPrompt | None:
        """What prompts are put through, of the tokenizer that is attached."""
        return ChatPrompt(self.tokenizer, multiturn=self.fewshot_as_multiturn) if self.apply_chat_template else None

    def _present_files(self) -> dict[str, str | list[str]]:
        """The files of rows, which must be there: `datasets` says less clearly what is missing."""
        for path in (
            one for given in self.data_files.values() for one in ([given] if isinstance(given, str) else given)
        ):
            if not Path(path).expanduser().is_file():
                raise DataError(
                    f"data_files of task {self.task}: there is no file {path}; relative paths start at {Path.cwd()}"
                )
        return self.data_files

    def parse(self, row: Row) -> Any:
        """Raises DataError: documents are the task's own."""
        raise DataError(f"{row.where}: {type(self).__name__} has the documents of task {self.task}, and no other rows")

    def form_of(self, content: Any) -> str:
        """What the task asks of a model."""
        return f"lm-eval {content.task.output_type}"

    def fields_used(self) -> frozenset[str]:
        """None by name: the task's templates read documents."""
        return frozenset()

    def right_row(self, item: Item) -> int | None:
        """The first right choice's."""
        document = document_of(item)
        if document.task.output_type != "multiple_choice" or document.task.own_results:
            return None
        return document.task.right(document)[0]

    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """The right choice, or the continuation, after its prompt without examples; only that is learnt."""
        pairs, chat = [], self._chat
        for item in items:
            document = document_of(item)
            task = document.task
            if task.generates:
                prompt = task.prompt(document, shots=False, chat=chat)
                pairs.append((prompt, task.answer(document, chat=chat)))
                continue
            made = task.pairs(document, shots=False, chat=chat)
            chosen = task.right(document)[0] if task.output_type == "multiple_choice" else 0
            pairs.append(made[chosen])
        yield from self._encode(pairs, range(len(items)), items)

    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Every request that lm-eval would make."""
        first = 0
        for task, group in groupby(items, key=lambda item: document_of(item).task):
            own = list(group)
            rows = self._encode_prompts(task, own) if task.generates else self._encode_pairs(task, own)
            yield from (replace(row, item=row.item + first) for row in rows)
            first += len(own)

    def _encode_pairs(self, task: HarnessTask, items: Sequence[Item]) -> Iterator[Encoded]:
        pairs: list[tuple[str, str]] = []
        owners: list[int] = []
        chat = self._chat
        for index, item in enumerate(items):
            pairs += task.pairs(document_of(item), chat=chat)
            owners += [index] * (len(pairs) - len(owners))
        yield from self._encode(pairs, owners, items)

    def _encode(
        self, pairs: Sequence[tuple[str, str]], owners: Sequence[int], items: Sequence[Item]
    ) -> Iterator[Encoded]:
        def empty(owner: int) -> DataError:
            return DataError(f"{items[owner].where}: an answer adds no token to its prompt, and cannot be scored")

        return PairEncoder(self.tokenizer).rows(pairs, owners, limit=self.max_length, empty=empty)

    def _encode_prompts(self, task: HarnessTask, items: Sequence[Item]) -> Iterator[Encoded]:
        most, chat = task.most_tokens, self._chat
        limit = self.max_length - most
        if limit < 1:
            raise DataError(
                f"task {task.name} generates up to {most} tokens, which leaves no room for prompts within max_length "
                f"{self.max_length}: raise it"
            )
        prompts = PairEncoder(self.tokenizer).prompts([task.prompt(document_of(item), chat=chat) for item in items])
        for index, prompt in enumerate(prompts):
            row = encoded(prompt[-limit:], [False] * min(len(prompt), limit), truncated=len(prompt) > limit, item=index)
            yield replace(row, generates=most)

    def scoring_rows(self, split: Split) -> tuple[Encoded, ...]:
        """Encoded rows to score. Raises DataError too for a score that the task does not have."""
        missing = (split, False) not in self._encoded
        rows = super().scoring_rows(split)
        if missing:
            self._scorer(split, rows)
        return rows

    def groups(self, split: Split) -> tuple[int, ...] | None:
        """Of each item a number that those have in common that are shown the same examples; None where each has its
        own."""
        numbers: dict[tuple[int, ...], int] = {}
        documents = [document_of(item) for item in self.items(split)]
        shown = [tuple(map(id, document.task.examples(document))) for document in documents]
        found = tuple(numbers.setdefault(examples, len(numbers)) if examples else -1 for examples in shown)
        return found if len(numbers) < sum(number >= 0 for number in found) else None

    def shares_prompts(self, split: Split) -> bool:
        """Whether prompts of a split are computed once for several rows, if the model allows it."""
        return super().shares_prompts(split) or (self._batches.share_prompts and self.groups(split) is not None)

    def scorer(self, split: Split = "validation") -> LmEvalScorer | GroupScorer:
        """Scorer of the task's metrics."""
        return self._scorer(split, self.scoring_rows(split))

    def require_figure(self, name: str, split: Split) -> None:
        """Raise DataError for a figure that the task does not have."""
        self.scorer(split).require_figure(name)

    def _scorer(self, split: Split, rows: Sequence[Encoded]) -> LmEvalScorer | GroupScorer:
        documents = [document_of(item) for item in self.items(split)]
        owners = [row.item for row in rows]
        if isinstance(self.harness, HarnessTask):
            return LmEvalScorer(self.harness, documents, owners, self.score, self.tokenizer)
        scorers = []
        for task, numbers in groupby(range(len(documents)), key=lambda number: documents[number].task):
            own = list(numbers)
            items = [owner - own[0] for owner in owners if own[0] <= owner <= own[-1]]
            scorers.append(LmEvalScorer(task, [documents[n] for n in own], items, AUTO, self.tokenizer))
        return GroupScorer(self.harness, scorers, self.score)

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...] | None:
        """Weight of each item in the score: all alike, but in a group whose tasks count alike."""
        return self.figure_weights(stage, self.score)

    def figure_weights(self, split: Split, figure: str) -> tuple[float, ...] | None:
        """Weight of each item in a figure; None where all are alike."""
        scorer = self.scorer(split)
        return scorer.weights(figure) if isinstance(scorer, GroupScorer) else None

    def options(self) -> Mapping[str, Any]:
        """Task, examples and score."""
        harness = self.harness
        pool = [content_key(document) for document in harness.example_pool()]
        found = {
            "task": self.task,
            "shots": (harness.shots, self.fewshot_seed, content_key(pool)),
            "score": self.score,
            "config": harness.identity(),
            **({} if self.max_gen_toks is None else {"max_gen_toks": self.max_gen_toks}),
        }
        return {**found, "multiturn": self.fewshot_as_multiturn} if self.apply_chat_template else found


class LmEvalSplits(Splits):
    """Documents of a task by split, disjoint in content."""

    def __init__(self, options: SplitOptions, data: LmEvalData) -> None:
        super().__init__(options, data)
        self._data = data

    def _read(self, split: Split) -> list[Item]:
        place = self._places[split]
        if place is None:
            return []
        items = self._items_of(place)
        if self._shared is None or split == "train":
            return items
        number = self._number_held_out(len(items))
        order = permutation(len(items), seed=self.options.seed, purpose="carve").tolist()
        chosen = set(order[:number])
        return [item for index, item in enumerate(items) if (index in chosen) == (split == "validation")]

    @cached_property
    def _places(self) -> dict[Split, str | None]:
        """Names that the data set has for the splits."""
        harness, asked = self._data.harness, self.options.sources
        test = harness.evaluated_split if asked["test"] == AUTO else asked["test"]
        validation = harness.own_split("validation") if asked["validation"] == AUTO else asked["validation"]
        if validation is None and asked["validation"] == AUTO:
            validation = test  # which is all that there is
        if asked["validation"] == AUTO and validation == test and asked["test"] != AUTO:
            validation = None  # all was asked for as test
        if asked["test"] == AUTO and validation == test and asked["validation"] not in (AUTO, None):
            test = None
        return {"train": self._named(asked["train"]), "validation": self._named(validation), "test": self._named(test)}

    def _named(self, split: Source | None) -> str | None:
        return None if split is None else str(split)

    @cached_property
    def _shared(self) -> str | None:
        """The split that is both validation and test, and is shared out; None where these are two."""
        places = self._places
        shared = places["validation"] if places["validation"] == places["test"] else None
        if shared is not None:
            size = len(self._data.harness.documents(shared))
            number = self._number_held_out(size)
            self._note(
                f"task {self._data.task} has no split but {shared!r} for validation and test: {number} of its {size} "
                f"documents, by the seed, are validation, the others test; `validation` and `test` name other splits"
            )
        return shared

    def _number_held_out(self, size: int) -> int:
        options = self.options
        number = options.validation_items or max(1, round(options.validation_fraction * size))
        if number >= size:
            raise DataError(
                f"cannot take {number} validation items off {size} documents of task {self._data.task}: lower "
                f"validation_items, or name another split"
            )
        return number

    def _items_of(self, place: str) -> list[Item]:
        harness = self._data.harness
        found = []
        for document in harness.documents(place):
            key = content_key(document.fields)
            found.append(Item(document, key, document.task.where(document), key if self.options.row_keys else ""))
        if harness.examples_from(place):
            self._note(
                f"task {self._data.task} draws its examples from the documents of {place!r}, which are scored too"
            )
        return found

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
