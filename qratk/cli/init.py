"""`qratk init`: a commented starting configuration for a model and data; needs no torch and loads no weights."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qratk.compare.grid import BudgetChoice
from qratk.core.errors import ConfigurationError, DataError
from qratk.data.forms import FORMS, recognised
from qratk.data.sources import Row, read_rows

_CHARACTERS_A_TOKEN: Final = 3  # of English it is about 4: rather too long than cut off
_LENGTHS: Final = (64, 128, 256, 512, 1024, 2048)
_RANKS: Final = (4, 8, 16)


@dataclass(frozen=True)
class DataChoice:
    """The data module that rows fit, what a row of theirs looks like, and figures of them."""

    module: str
    form: str
    rows: int
    longest: int  # characters

    @classmethod
    def of(cls, rows: Sequence[Row]) -> DataChoice:
        """What fits these rows; raises `DataError` where nothing does."""
        fields = set(rows[0].data)
        longest = max(_characters(row.data) for row in rows)
        if {"choices", "label"} <= fields:
            form = '{"question": ..., "choices": [...], "label": 0}'
            return cls("MultipleChoiceData", form, len(rows), longest)
        if any(known.fits(fields) for known in FORMS.values()):
            return cls("InstructionData", recognised(rows[0]).example, len(rows), longest)
        if "text" in fields:
            return cls("TextData", '{"text": ...}', len(rows), longest)
        known = ", ".join(form.needed() for form in FORMS.values())
        raise DataError(
            f"{rows[0].where}: no data module takes rows of {', '.join(sorted(fields))}: they need `choices` and "
            f"`label`, `text`, or the fields of a form: {known}"
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit a model and rows."""

    max_length: int
    batch_size: int
    ranks: tuple[int, ...]
    steps: tuple[int, int, int]

    @classmethod
    def of(cls, config: Mapping[str, Any], data: DataChoice) -> Sizes:
        """Sizes for a model's configuration, as far as it is known."""
        tokens = data.longest // _CHARACTERS_A_TOKEN + 16  # the template adds a few
        most = config.get("max_position_embeddings") or _LENGTHS[-1]
        length = min(next((n for n in _LENGTHS if n >= tokens), _LENGTHS[-1]), most)
        batch = max(1, min(8, 4096 // length, data.rows // 4))
        ranks = tuple(rank for rank in _RANKS if rank <= config.get("hidden_size", _RANKS[-1])) or (1,)
        highest = max(9, min(900, 3 * data.rows // batch) // 9 * 9)  # three passes over the rows at most
        return cls(length, batch, ranks, (highest // 9, highest // 3, highest))


def init(arguments: Sequence[str]) -> int:
    """Exit status of `qratk init`: a new file, or an error where it is there already."""
    given = _parser().parse_args(arguments)
    path = Path(given.output)
    if path.exists():
        raise ConfigurationError(f"{path} is there already; give another name with -o, or move it away")
    rows = read_rows(given.data, "train")
    if not rows:
        raise DataError(f"{given.data} holds no rows")
    data = DataChoice.of(rows)
    sizes = Sizes.of(_model_config(given.model), data)
    budget = BudgetChoice(like=(4, sizes.ranks[-1])) if given.budget is None else BudgetChoice.parse(given.budget)
    text = document(given.model, given.data, data, sizes, budget, validation=given.validation, test=given.test)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    name = shlex.quote(str(path))
    print(f"{path}: {data.rows} rows for {data.module}, at most {sizes.max_length} tokens\nNext:")
    print(f"  qratk data --config {name}     # rows as the model will see them, and what of them is learnt")
    print(f"  qratk plan --config {name}     # bytes and time, before any weights are loaded")
    print(f"  qratk search --config {name}")
    return 0


def document(
    model: str,
    train: str,
    data: DataChoice,
    sizes: Sizes,
    budget: BudgetChoice,
    *,
    validation: str | None = None,
    test: str | None = None,
) -> str:
    """The configuration as commented YAML."""
    held_out = (
        f"    validation: {json.dumps(validation)} # scores that the search goes by"
        if validation
        else "    validation_fraction: 0.1 # rows of `train` that are held out for scores; or give `validation: FILE`"
    )
    tested = (
        f"    test: {json.dumps(test)} # looked at once, after the search"
        if test
        else "    # test: FILE # rows that are looked at once, after the search; then set `search.test: true`"
    )
    limit = (
        f"  like: {list(budget.like)} # the budget: what uniform {budget.like[0]} bit, rank {budget.like[1]} takes; or "
        "`limit: 5.5GiB`"
        if budget.like is not None
        else f"  limit: {budget.limit} # the budget; or `like: [4, 16]`, what uniform 4 bit, rank 16 takes"
    )
    lines = [
        "# A search of bits and ranks. Every setting can be overridden on the command line by its path, as in",
        "# --search.limit=5GiB; `qratk search --print_config` shows all of them with their defaults.",
        "model:",
        f"  model: {json.dumps(model)} # a Hugging Face name or a local folder",
        "  learning_rate: 2.0e-4 # of a fit; the search tries those of `search.shared`",
        "  adapter: cut # trained at rank 16, cut to each layer's own; or `lora`, trained at that rank",
        "  init: loftq # adapters begin with what quantisation left out; `default` begins at zero",
        "  schedule: cosine",
        "",
        "data:",
        f"  class_path: {data.module}",
        "  init_args:",
        f"    train: {json.dumps(train)} # rows such as {data.form}",
        held_out,
        tested,
        f"    batch_size: {sizes.batch_size}",
        f"    max_length: {sizes.max_length} # tokens of a row; fewer need less memory",
        "",
        "search:",
        "  bits: [2, 4, 8] # choices of each layer's weights",
        f"  ranks: {list(sizes.ranks)} # choices of each layer's adapter",
        "  shared: {learning_rate: [1.0e-4, 2.0e-4, 4.0e-4, 8.0e-4]} # searched beside them, one value for all layers",
        "  seeds: 8 # of data order and adapters, which the search picks from, too",
        "  merge: 12 # trainings at most, averaged into the answer's adapter where that scores better",
        limit,
        "  scope: storage # what the budget counts: storage, or the training or serving peak",
        f"  steps: {list(sizes.steps)} # optimiser steps of a short, a middle and a full evaluation",
        f"  test: {'true' if test else 'false'}",
        "",
        "trainer:",
        "  gradient_clip_val: 1.0 # any option of Lightning's Trainer stands here",
    ]
    return "\n".join(lines) + "\n"


def _characters(data: Mapping[str, Any]) -> int:
    """Characters of all texts of a row, however deep."""
    return sum(_text_length(value) for value in data.values())


def _text_length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return _characters(value)
    return sum(map(_text_length, value)) if isinstance(value, list | tuple) else 0


def _model_config(model: str) -> dict[str, Any]:
    """The configuration of a local model; empty for a hub name. Raises `ConfigurationError`."""
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "~", "/")):
            raise ConfigurationError(f"the model {model!r} is no folder; give one, or a Hugging Face name")
        return {}
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as the configuration of a model: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} is no configuration of a model: it holds {type(found).__name__}")
    inner = found.get("text_config")
    return {**found, **inner} if isinstance(inner, dict) else found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("qratk init", description="Write a commented configuration to start from.")
    parser.add_argument("--model", required=True, help="Hugging Face name or local folder")
    parser.add_argument("--data", required=True, help="rows to train on: a .json, .jsonl, .csv or .parquet file")
    parser.add_argument("--validation", help="rows to score on; by default a tenth of the data")
    parser.add_argument("--test", help="rows that are looked at once, after the search")
    parser.add_argument("--budget", help="a size such as 5.5GiB, or '[bits, rank]'; default: [4, largest rank]")
    parser.add_argument("-o", "--output", default="my.yaml", help="file to write (default my.yaml)")
    return parser
