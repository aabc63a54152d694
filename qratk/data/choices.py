"""Multiple choice: the right choice is learnt, and choices are scored by likelihood as lm-eval does."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from qratk.core.errors import DataError
from qratk.data.base import TaskData
from qratk.data.choice_figures import CHOICE_FIGURES, UNIT_FIGURES, ChoiceScore
from qratk.data.encoding import Encoded, PairEncoder
from qratk.data.prompt import Prompt
from qratk.data.scoring import ChoiceScorer
from qratk.data.sources import Row, shown
from qratk.data.splits import SPLITS, Item, Split
from qratk.data.task import ShotStyle

_BLANK = re.compile(r"(?<!\w)_(?!\w)")
DEFAULT_PROMPT = "{{ [context, question] | select | join('\\n') }}"


def _listed(choices: Any) -> tuple[Any, Sequence[Any]]:
    """Choices and their own labels, where they have some: ARC's {"text": [...], "label": ["A", ...]} on the hub."""
    if isinstance(choices, Mapping) and isinstance(choices.get("label"), list | tuple) and choices["label"]:
        return choices.get("text"), choices["label"]
    return choices, ()


def _check_choices(row: Row, choices: Any, keys: Sequence[Any]) -> None:
    """Raise DataError unless these are different texts, with a label each if any has one."""
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise row.error(f"needs `choices`, a list of at least two texts; got {shown(choices)}")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise row.error(f"has a choice that is empty or no text: {shown(choices)}")
    if len(set(choices)) < len(choices):
        raise row.error(f"has a choice twice, of which only one can be right: {shown(choices)}")
    if not keys:
        return
    if not all(isinstance(key, str | int) for key in keys) or len(keys) != len(choices):
        raise row.error(f"has {len(choices)} choices with the labels {shown(keys)}; give one text or number for each")
    if len(set(keys)) < len(keys):
        raise row.error(f"has a label twice among those of its choices: {shown(keys)}")


def _label(row: Row, number: int, keys: Sequence[Any]) -> int:
    """Index of the right choice."""
    label = row.data.get("label")
    if keys:
        index = next((i for i, key in enumerate(keys) if type(key) is type(label) and key == label), None)
        if index is None:
            raise row.error(f"needs `label`, one of its choices' labels {shown(keys)}; got {shown(label)}")
        return index
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < number:
        raise row.error(f"needs `label`, an index from 0 to {number - 1}; got {shown(label)}")
    return label


@dataclass(frozen=True)
class Choices:
    """Pairs of (context, continuation), one a choice; the text lm-eval measures each choice by; the right index."""

    pairs: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]
    label: int


class ChoiceData(TaskData):
    """Rows of context and question, choices, and label; a leaf says where rows come from, and which options it has.

    Args:
        train: As in `TaskData`, whose other options apply too.
        prompt: Jinja template of the prompt over the row's fields, lm-eval's `doc_to_text`.
        target_delimiter: What stands between prompt and choice.
        blank: Whether each choice is put in the place of `_`, as in `MultipleChoiceData`.
        score: What a search maximises, as in `MultipleChoiceData`.

    Raises DataError for a `blank` or a `score` that there is not.
    """

    metrics = tuple(UNIT_FIGURES)

    @abstractmethod
    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        prompt: str = DEFAULT_PROMPT,
        target_delimiter: str = " ",
        blank: Literal["auto", "substitute", "none"] = "auto",
        score: ChoiceScore = "prob_per_token",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, **kwargs)
        if blank not in ("auto", "substitute", "none"):
            raise DataError(f"blank must be auto, substitute or none, got {blank!r}")
        if score not in CHOICE_FIGURES:
            raise DataError(f"score must be one of {', '.join(CHOICE_FIGURES)}; got {score!r}")
        self.prompt, self.target_delimiter, self.blank, self.score = prompt, target_delimiter, blank, score

    def options(self) -> Mapping[str, Any]:
        """Prompt, delimiter, blank and score."""
        names = ("prompt", "target_delimiter", "blank", "score")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def _prompt(self) -> Prompt:
        return Prompt(self.prompt)

    def parse(self, row: Row) -> tuple[str, tuple[str, ...], int]:
        """Rendered prompt, choices and the index of the right one."""
        from jinja2 import TemplateError

        fields = {**row.data, "context": row.text("context", default=""), "question": row.text("question", default="")}
        choices, keys = _listed(row.data.get("choices"))
        _check_choices(row, choices, keys)
        prompt = self._prompt  # a mistake in the template itself is no mistake of the row
        try:
            text = prompt.render(fields)
        except (TemplateError, DataError) as error:
            raise row.error(f"does not fit the prompt template: {error}") from error
        except Exception as error:  # whatever its expressions can raise
            raise row.error(f"does not fit the prompt template: {type(error).__name__}: {error}") from error
        return text, tuple(choices), _label(row, len(choices), keys)

    def form_of(self, content: Any) -> str:
        """All rows have choices."""
        return "choices"

    def fields_used(self) -> frozenset[str]:
        """Fields that choices come from, and those that the prompt asks for."""
        return frozenset(("context", "question", "choices", "label")) | self._prompt.fields

    @cached_property
    def substitutes(self) -> bool:
        """Whether choices are put in the place of a blank."""
        if self.blank != "auto":
            return self.blank == "substitute"
        return all(_BLANK.search(item.content[0]) for split in SPLITS if self.has(split) for item in self.items(split))

    def choices(self, item: Item) -> Choices:
        """What lm-eval would score of an item. Raises DataError when a blank is missing."""
        prompt, choices, label = item.content
        if self.substitutes:
            found = self._around_blank(prompt, choices, label, item.where)
        else:
            found = Choices(tuple((prompt, self.target_delimiter + choice) for choice in choices), choices, label)
        if not item.before:
            return found
        before: str = item.before
        return replace(found, pairs=tuple((before + context, rest) for context, rest in found.pairs))

    def behind(self, items: Sequence[Item], examples: Sequence[Item], style: ShotStyle) -> Sequence[Item]:
        """Items behind examples with their right choices, in lm-eval's form."""
        shown = ["".join(chosen.pairs[chosen.label]) for chosen in map(self.choices, examples)]
        before = style.description + "".join(text + style.delimiter for text in shown)
        return [replace(item, before=before) for item in items]

    def narrow(self, split: Split, items: Sequence[Item]) -> None:
        """As for all data; whether choices are put in the place of a blank does not depend on which items are left."""
        _ = self.substitutes
        super().narrow(split, items)

    def _around_blank(self, prompt: str, choices: tuple[str, ...], label: int, where: str) -> Choices:
        found = _BLANK.search(prompt)
        if found is None:
            raise DataError(f"{where}: there is no blank `_` to put the choices in; set blank to none")
        head, tail = prompt[: found.start()], prompt[found.end() :].strip()
        if not tail:
            raise DataError(f"{where}: nothing follows the blank, so there is nothing to score; set blank to none")
        contexts = tuple(head + choice for choice in choices)
        return Choices(tuple((context, self.target_delimiter + tail) for context in contexts), contexts, label)

    def right_row(self, item: Item) -> int:
        """The right choice's."""
        return self.choices(item).label

    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """The right choice after its prompt; only the choice is learnt."""
        chosen = [self.choices(item) for item in items]
        yield from self._encode([c.pairs[c.label] for c in chosen], range(len(items)), items)

    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Every choice after its prompt."""
        pairs: list[tuple[str, str]] = []
        owners: list[int] = []
        for index, item in enumerate(items):
            pairs += self.choices(item).pairs
            owners += [index] * (len(pairs) - len(owners))
        yield from self._encode(pairs, owners, items)

    def _encode(
        self, pairs: Sequence[tuple[str, str]], owners: Sequence[int], items: Sequence[Item]
    ) -> Iterator[Encoded]:
        def empty(owner: int) -> DataError:
            return DataError(f"{items[owner].where}: a choice adds no token to its prompt; change the delimiter")

        return PairEncoder(self.tokenizer).rows(pairs, owners, limit=self.max_length, empty=empty)

    def scorer(self, split: Split = "validation") -> ChoiceScorer:
        """Scorer of all figures of choices."""
        chosen = [self.choices(item) for item in self.items(split)]
        lengths = [len(text) for c in chosen for text in c.texts]
        owners = [row.item for row in self.scoring_rows(split)]
        return ChoiceScorer(owners, [c.label for c in chosen], lengths, score=self.score)
