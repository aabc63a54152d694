"""The embedded default: where its model lies, and its data set as files."""

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import get_args

from qratk.embedded.world import Split, fine_tuning_rows, make_world


def model_directory() -> Path:
    """The folder of the embedded model, as `AutoModelForCausalLM.from_pretrained` wants it."""
    return Path(str(files("qratk.embedded").joinpath("model")))


def write_dataset(directory: Path | str, seed: int = 0) -> dict[str, Path]:
    """The paths of the files written: train, validation and test, one JSON object a line."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for split in get_args(Split):
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text(_text(split, seed), encoding="utf-8")
    return paths


@lru_cache(maxsize=6)
def _text(split: Split, seed: int) -> str:
    """A split's rows as lines of JSON: under a megabyte, made once for all data modules of a process."""
    return "".join(f"{json.dumps(row.as_dict())}\n" for row in fine_tuning_rows(make_world(), split, seed))
