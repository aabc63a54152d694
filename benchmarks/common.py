"""What the benchmarks share: one thread, clocks, interleaved repeats, tables, results as JSON."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import gc
import importlib.metadata
import json
import logging
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qratk.core import Evaluation, Request
    from qratk.evaluators.base import Evaluator

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "lightning", "lm_eval", "accelerate", "botorch")
Run = Callable[[], Any]


# Command line and results


def parser(document: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help="directory with models/NAME and datasets/NAME/{train,test}.jsonl")
    made.add_argument("--repeats", type=int, default=repeats, help="interleaved repeats of everything that is compared")
    made.add_argument("--json", type=Path, help="file for the results")
    made.add_argument(
        "--clock", choices=sorted(CLOCKS), default="cpu", help="cpu: of this process; right on busy machines"
    )
    return made


def prepared(document: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed options, with torch on one thread and the libraries quiet."""
    given = document.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    quiet()
    return given


def quiet() -> None:
    """Silence notes that say nothing about the figures."""
    warnings.filterwarnings("ignore")
    chatty = ("transformers", "datasets", "lm_eval", "accelerate", "bitsandbytes")
    for name in ("lightning.pytorch", "lightning.fabric", *chatty):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers.utils.logging

    notes: Any = transformers.utils.logging
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    datasets.disable_progress_bars()


def environment() -> dict[str, Any]:
    """Versions, processor and threads, for the record."""
    import torch

    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def finish(given: argparse.Namespace, name: str, results: Mapping[str, Any]) -> None:
    """Write the results where they were asked for."""
    if given.json is not None:
        document = {"benchmark": name, "environment": environment(), "clock": given.clock, "results": results}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=2, default=str) + "\n")


# Measuring


def seconds(run: Run, clock: str = "cpu") -> float:
    """Seconds that a call takes."""
    now = CLOCKS[clock]
    began = now()
    run()
    return now() - began


def interleaved(runs: Mapping[str, Run], *, repeats: int, clock: str, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, A B C A B C ...: what is compared sees the same state of the machine."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            gc.collect()
            spent = seconds(run, clock)
            if repeat >= warm_up:
                found[name].append(spent)
    return found


def paired_ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratio of each pair of one repeat."""
    return [a / b for a, b in zip(over, under, strict=True)]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size by least squares: 1 is linear growth."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


@contextmanager
def silent() -> Iterator[None]:
    """Without what libraries print: progress bars, summaries."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


# Evaluations


def in_groups(evaluator: Evaluator, asked: Sequence[Request]) -> list[Evaluation]:
    """Evaluations of requests, group by group as a search has them."""
    return [evaluation for group in evaluator.groups(asked) for evaluation in evaluator.evaluate(group)]


# Text


def spread(values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> str:
    """Median and range, as in '1.31 (1.20 to 1.44)'."""
    scaled = [value * scale for value in values]
    return f"{statistics.median(scaled):.{digits}f} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def verdict(name: str, values: Sequence[float], *, at_most: float | None = None, at_least: float | None = None) -> str:
    """One line: the median against its target."""
    median = statistics.median(values)
    met = (at_most is None or median <= at_most) and (at_least is None or median >= at_least)
    target = f"at most {at_most}" if at_most is not None else f"at least {at_least}"
    return f"{name}: {spread(values)}, target {target}: {'met' if met else 'MISSED'}"


# Models and data


@dataclass(frozen=True)
class Subject:
    """A model directory with a multiple-choice task, and how it is fine-tuned."""

    name: str
    model: str
    files: Mapping[str, Any]  # of MultipleChoiceData, by split
    module: Mapping[str, Any]  # of FineTuneModule
    data: Mapping[str, Any]  # of MultipleChoiceData
    search: Mapping[str, Any]  # of SearchLoop
    clip: float = 1.0

    def make_module(self, **options: Any) -> Any:
        """A new FineTuneModule."""
        from qratk.training.module import FineTuneModule

        return FineTuneModule(self.model, **{**self.module, **options})

    def make_data(self, **options: Any) -> Any:
        """A new MultipleChoiceData."""
        from qratk.data.multiple_choice import MultipleChoiceData

        return MultipleChoiceData(**self.files, **{**self.data, **options})


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that is deleted afterwards; banks are kept there too, so that none is found ready-made."""
    with tempfile.TemporaryDirectory(prefix="qratk-benchmark-", ignore_cleanup_errors=True) as folder:
        os.environ["QRATK_CACHE"] = str(Path(folder) / "banks")
        yield Path(folder)


def subject(given: argparse.Namespace, folder: Path, name: str = "deep12") -> Subject:
    """TREC on a 12-layer (deep12) or 5-layer (stories260k) model of --data; without it the embedded 12-layer model."""
    if given.data is None or name == "embedded":
        return embedded(folder)
    files = {split: str(given.data / "datasets" / "trec" / f"{split}.jsonl") for split in ("train", "test")}
    return Subject(
        f"{name}, TREC",
        str(given.data / "models" / name),
        files,
        {"learning_rate": 1e-2, "warmup_steps": 5},
        {"validation_items": 100, "batch_size": 16, "eval_batch_size": 96, "score": "acc", "max_test_items": 100},
        {"bits": [2, 3, 4, 8], "ranks": [2, 4, 8, 16], "like": [4, 8], "steps": [15, 60], "generations": 2,
         "high_fidelity_candidates": 3, "searcher": {"nsga2": {"offspring": 8}},
         "refiner": {"trust_region": {"max_evaluations": 6}}},
    )  # fmt: skip


def embedded(folder: Path) -> Subject:
    """The embedded model and its data, as in the quickstart."""
    from qratk.embedded import model_directory, write_dataset

    return Subject(
        "embedded, its own task",
        str(model_directory()),
        {split: str(path) for split, path in write_dataset(folder / "embedded").items()},
        {"learning_rate": 5e-3, "warmup_steps": 4, "schedule": "linear"},
        {"batch_size": 16, "eval_batch_size": 128, "max_validation_items": 160},
        {"bits": [2, 4, 8], "ranks": [2, 4, 8, 16], "like": [4, 8], "steps": [15, 40], "generations": 2,
         "high_fidelity_candidates": 3, "searcher": {"nsga2": {"population": 20, "offspring": 8}},
         "refiner": {"trust_region": {"max_evaluations": 4}}},
    )  # fmt: skip


def random_llama(*, layers: int, width: int, vocabulary: int = 1024, seed: int = 0, **options: Any) -> Any:
    """A random Llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4 // 64 * 64,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": 2048,
        **options,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **settings))
