"""`qratk data`: what the rows come to with the model's tokenizer, before any weights are loaded."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from qratk.cli.application import QratkCLI, run
from qratk.core.errors import DataError
from qratk.core.logs import only_errors
from qratk.core.text import visible
from qratk.data.base import TaskData
from qratk.data.report import DataReport, PartReport, Piece, ShownItem, ShownRow, prompt_of
from qratk.data.splits import SPLITS, Split
from qratk.training.module import FineTuneModule

_LEARNT: Final = "\x1b[1;32m"
_SPECIAL: Final = "\x1b[36m"
_ASIDE: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"
_SIDE: Final = "  | "
_ABREAST: Final = 4  # parts in one table


class DataCommand(QratkCLI):
    """Prints what the data are."""

    command = "data"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: nothing is trained."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        self.show(self.model, self.datamodule)

    def show(self, model: FineTuneModule, datamodule: TaskData) -> None:
        """Print figures of each split, and rows."""
        attached = model.load_tokenizer()
        datamodule.attach(attached.tokenizer, context_length=attached.context_length)
        with only_errors("qratk.data"):  # the rest is told among the notes
            report = DataReport(datamodule)
            splits = _asked(self.settings.split, report.splits)
            document = report.as_dict()
            examples = [each for split in splits for each in report.examples(split, self.settings.rows).items()]
        if self.settings.json:
            rows = {name: [asdict(item) for item in items] for name, items in examples}
            print(json.dumps({**document, "examples": rows}, indent=2))
            return
        style = Style(colours(self.settings.color), self.settings.characters)
        figures = report.figures()
        lines = [*as_lines(document, figures), *rows_as_lines(examples, figures, style)]
        print_text("\n".join(lines))


def data(arguments: Sequence[str]) -> int:
    """Exit status of `qratk data`."""
    return run(DataCommand, arguments)


@dataclass(frozen=True)
class Style:
    """How rows are shown: in colours or by brackets, and at most so many characters of a stretch, where 0 is all."""

    colours: bool = False
    characters: int = 800

    def piece(self, piece: Piece) -> str:
        """The text of a stretch; brackets say what is learnt where colours do not."""
        text = visible(self._shortened(piece.text), lines=True)
        if not self.colours:
            return text
        colour = (_LEARNT if piece.learnt else "") + (_SPECIAL if piece.special else "")
        # A colour ends with each line: what stands beside it has none.
        return "\n".join(f"{colour}{line}{_PLAIN}" if line and colour else line for line in text.split("\n"))

    def row(self, pieces: Sequence[Piece]) -> str:
        """The text of several stretches."""
        text, before = "", False
        for piece in pieces:
            if not self.colours and piece.learnt != before:
                text += "⟦" if piece.learnt else "⟧"
            text, before = text + self.piece(piece), piece.learnt
        return text + ("⟧" if before and not self.colours else "")

    def aside(self, text: str) -> str:
        """What is no text of a row."""
        return f"{_ASIDE}{text}{_PLAIN}" if self.colours else text

    def _shortened(self, text: str) -> str:
        if not self.characters or len(text) <= self.characters:
            return text
        head, tail = -(-2 * self.characters // 3), self.characters // 3
        left_out = len(text) - head - tail
        return f"{text[:head]} [... {left_out:,} characters ...] {text[len(text) - tail :]}"


def as_lines(document: Mapping[str, Any], figures: Mapping[str, PartReport]) -> Iterator[str]:
    """Where data come from, tables of their figures, and notes."""
    width = max(10, *map(len, figures))
    yield f"{'data':<{width}}  {document['class']}, rows of at most {document['max_length']:,} tokens"
    for name, report in figures.items():
        held_out = ", held out of the training data" if report.held_out else ""
        sources = _listed({visible(source): count for source, count in report.sources.items()})
        yield f"{name:<{width}}  {sources}{held_out}"
    names = list(figures)
    for first in range(0, len(names), _ABREAST):
        yield ""
        yield from _table({name: figures[name] for name in names[first : first + _ABREAST]})
    yield ""
    ends = sum((Counter(report.ends) for report in figures.values()), Counter[str]())
    told = _listed({visible(name) or "no special token": count for name, count in ends.most_common()})
    end = document["end_of_sequence"]
    yield f"{'ends':<{width}}  {told}; the tokenizer's end of sequence is {visible(end) if end else 'none'}"
    for note in document["notes"]:
        yield f"{'note':<{width}}  {visible(note)}"


def rows_as_lines(
    examples: Sequence[tuple[str, Sequence[ShownItem]]], figures: Mapping[str, PartReport], style: Style
) -> Iterator[str]:
    """Items of parts, each under the place where it stands."""
    for name, items in examples:
        learnt = "learnt" if figures[name].split == "train" else "scored"
        for item in items:
            row = item.rows[0]
            tokens = f"{row.tokens:,} tokens, {row.learnt:,} {learnt}{', cut' * row.cut}"
            choices = f"; {len(item.rows)} choices" if row.right is not None else ""
            yield ""
            yield style.aside(f"{name}: {visible(item.where)} ({tokens}{choices})")
            text = "\n".join(_item(item.rows, style)).removesuffix("\n")
            yield from (f"{style.aside(_SIDE)}{line}" for line in text.split("\n"))


def _item(rows: Sequence[ShownRow], style: Style) -> Iterator[str]:
    """The rows of an item; a prompt that all begin with stands once above them."""
    if len(rows) == 1:
        yield style.row(rows[0].pieces)
        return
    prompt = prompt_of(rows)
    if prompt:
        yield style.row(prompt)
    for row in rows:
        mark = "" if row.right is None else "right  " if row.right else "       "
        yield mark + style.row(row.pieces[len(prompt) :])


def _table(figures: Mapping[str, PartReport]) -> Iterator[str]:
    count: Callable[[int], str] = "{:,}".format
    lines: list[tuple[str, Callable[[PartReport], str]]] = [
        ("items", lambda r: count(r.items)),
        ("forms", lambda r: _listed(r.forms)),
        ("rows", lambda r: count(r.rows)),
        ("tokens", lambda r: count(r.all_tokens)),
        ("tokens of a row: least", lambda r: count(r.tokens.least)),
        ("  median", lambda r: count(r.tokens.median)),
        ("  95 %", lambda r: count(r.tokens.p95)),
        ("  most", lambda r: count(r.tokens.most)),
        ("rows cut", lambda r: f"{count(r.cut)} ({r.cut / (r.rows + r.without):.1%})" if r.cut else "0"),
        ("learnt or scored", lambda r: f"{count(r.all_learnt)} ({r.all_learnt / r.all_tokens:.1%})"),
        ("  cut off", lambda r: f"{r.learnt_cut_off:.1%}" if r.cut else "0"),
        ("  of a row: least", lambda r: count(r.learnt.least)),
        ("    median", lambda r: count(r.learnt.median)),
        ("    most", lambda r: count(r.learnt.most)),
    ]
    if any(report.without for report in figures.values()):
        lines.append(("left out: nothing to learn", lambda r: count(r.without)))
    body = [("", *figures)] + [(name, *(show(report) for report in figures.values())) for name, show in lines]
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
    for first, *rest in body:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _listed(counts: Mapping[str, int]) -> str:
    """Names, with their counts where there are several."""
    return ", ".join(name if len(counts) == 1 else f"{name} ({count:,})" for name, count in counts.items())


def _asked(split: str | None, there: Sequence[Split]) -> tuple[Split, ...]:
    """The splits whose rows are shown. Raises DataError for one that there is not."""
    if split == "all":
        return tuple(there)
    if split is None:
        return tuple(there[:1])
    found = tuple(known for known in SPLITS if known == split and known in there)
    if not found:
        raise DataError(f"there is no {split} data: give the option `{split}`, or one of --split={', '.join(there)}")
    return found


def colours(asked: str) -> bool:
    """Whether to colour what is printed: as asked, else on a terminal that takes colours from who wants them."""
    if asked != "auto":
        return asked == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_text(text: str) -> None:
    """Print a text; characters that standard output cannot encode, by their escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
