"""Which figure of n validation items ranks configurations as their test accuracy does.

    python benchmarks/score.py measure --data DIR --cache FOLDER [--studies deep12/trec ...]
    python benchmarks/score.py tables --cache FOLDER --csv FILE

`measure` trains configurations (bits x ranks x learning rates, and random mixed ones) of several models, and scores all
rows of a large validation pool and of the test split once. The log-likelihood, tokens and characters of every row are
kept in FOLDER, a file a configuration, so that it can be stopped and run again.

`tables` draws n items of the pool, with replacement, again and again, and computes every figure of `ChoiceScorer` on
them: its rank correlation (Spearman's rho, Kendall's tau-b) with the accuracy on all test items, over the
configurations of a seed, and the regret: how far the test accuracy of the configuration that it puts first lies below
the best one. A temperature is fitted anew to each draw.
"""

from __future__ import annotations

from common import quiet, table

# isort: split
import argparse
import csv
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray

from qratk.backbone.logits import labelled_logits, replicate, target_log_likelihood
from qratk.core.configuration import Configuration
from qratk.core.correlation import spearman
from qratk.core.evaluation import FidelityLadder
from qratk.core.space import SearchSpace
from qratk.data.choice_figures import CHOICE_FIGURES, ChoiceScore, Compared, ComparedChoices
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.data.splits import Split
from qratk.data.temperature import among_choices
from qratk.embedded import model_directory, write_dataset
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.cohort import Cohort
from qratk.training.cohort_module import CohortModule
from qratk.training.module import FineTuneModule
from qratk.training.trainers import quiet_lightning

SPLITS: tuple[Split, ...] = ("validation", "test")

# What is trained


@dataclass(frozen=True)
class Study:
    """A model and a task, and how its configurations are trained; `pool` and `test` are items that are scored."""

    model: str
    task: str
    rates: tuple[float, ...]
    steps: int = 30
    batch_size: int = 16
    bits: tuple[int, ...] = (2, 4, 8, 16)
    ranks: tuple[int, ...] = (4, 16)
    mixed: int = 8
    at_most: int = 12
    seeds: tuple[int, ...] = (0,)
    pool: int = 300
    test: int = 300
    together: int = 8

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.model}/{self.task}"

    def trainings(self, layers: int, seed: int) -> list[tuple[Configuration, float]]:
        """Configurations with their learning rates: uniform ones at every rate, mixed ones at one each."""
        draw = random.Random(f"{self.name} {seed}")
        uniform = [Configuration.uniform(b, r, layers) for b in self.bits for r in self.ranks]
        found = [(configuration, rate) for configuration in uniform for rate in self.rates]
        for _ in range(self.mixed):
            mixed = Configuration.of(draw.choices(self.bits[-3:], k=layers), draw.choices(self.ranks, k=layers))
            found.append((mixed, draw.choice(self.rates)))
        draw.shuffle(found)
        return found[: self.at_most]


SMALL = (1e-3, 5e-3, 2e-2)
LARGE = (3e-4, 1e-3, 3e-3)
STUDIES = (
    Study("embedded", "own", SMALL, steps=40, at_most=32, pool=1200, test=600),
    Study("stories260k", "trec", SMALL, at_most=16, seeds=(0, 1), pool=500, test=500),
    Study("stories260k", "stories_lower_cloze", SMALL),
    Study("deep12", "trec", SMALL),
    Study("deep12", "stories_lower_cloze", SMALL),
    Study("babyllama105", "stories_cloze", SMALL),
    Study(
        "smollm2", "arc_easy", LARGE, steps=15, batch_size=8, bits=(4, 8, 16), mixed=8, at_most=24,
        seeds=(0, 1, 2), pool=400, test=500, together=1,
    ),
    Study(
        "smollm2", "trec", LARGE, steps=18, batch_size=8, bits=(4, 8, 16), mixed=8, at_most=24,
        seeds=(0, 1, 2), pool=400, test=500, together=1,
    ),
)  # fmt: skip


# Measuring


@dataclass(frozen=True)
class Places:
    """Folders: of models and data sets, of SmolLM2, and of what is kept; and where it is measured."""

    data: Path | None
    smollm2: Path | None
    cache: Path
    accelerator: str = "cpu"

    def model(self, study: Study) -> str:
        """Folder of a study's model."""
        if study.model == "embedded":
            return str(model_directory())
        folder = self.smollm2 if study.model == "smollm2" else self.data and self.data / "models" / study.model
        if folder is None:
            raise SystemExit(f"{study.name}: give --data and --smollm2")
        return str(folder)

    def files(self, study: Study) -> dict[str, Any]:
        """Files of a study's data, by split; without a validation file it is taken off the training rows."""
        if study.model == "embedded":
            return self._embedded()
        if self.data is None:
            raise SystemExit(f"{study.name}: give --data")
        folder = self.data / "datasets" / study.task
        test = next(path for path in (folder / "test.jsonl", folder / "dev.jsonl") if path.exists())
        return {"train": str(folder / "train.jsonl"), "test": str(test), "validation_items": study.pool}

    def _embedded(self) -> dict[str, Any]:
        # The validation rows of several seeds: one seed has too few.
        made = [write_dataset(self.cache / "embedded-data" / str(seed), seed) for seed in range(4)]
        rows = {json.dumps({**json.loads(line), "id": ""}): None for m in made for line in m["validation"].open()}
        pool = self.cache / "embedded-data" / "pool.jsonl"
        pool.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return {"train": str(made[0]["train"]), "validation": str(pool), "test": str(made[0]["test"])}

    def of(self, study: Study, seed: int) -> Path:
        """Folder of what was measured in a study with a seed."""
        return self.cache / study.model / study.task / str(seed)


def measure(study: Study, seed: int, places: Places) -> None:
    """Train and score what is missing of a study."""
    folder = places.of(study, seed)
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = _opened(study, seed, places)
    parts, layers = evaluator.parts, len(evaluator.shapes)
    wanted = study.trainings(layers, seed)
    missing = [training for training in wanted if not _file(folder, *training).exists()]
    if not missing:
        return
    parts.preparation.finish(evaluator.space)
    _ = parts.module.shared_length
    _write(folder / "items.npz", _items(parts.data))
    while missing:
        rate = missing[0][1]
        group = [configuration for configuration, r in missing if r == rate][: study.together]
        missing = [training for training in missing if training not in [(one, rate) for one in group]]
        parts.module.options = replace(parts.module.options, learning_rate=rate)
        began = time.monotonic()
        for configuration, values in zip(group, _trained(parts, group, study.steps), strict=True):
            about = {"configuration": str(configuration), "rate": rate}
            _write(_file(folder, configuration, rate), {**about, **values})
        spent = time.monotonic() - began
        print(f"{study.name} seed {seed} rate {rate:g}: {len(group)} in {spent:.0f} s, as {group[0]}", flush=True)


def _opened(study: Study, seed: int, places: Places) -> FineTuneEvaluator:
    module = FineTuneModule(
        places.model(study), learning_rate=study.rates[0], warmup_steps=4, schedule="linear", seed=seed,
        schedule_steps=study.steps, bank_dir=str(places.cache / "banks"),
    )  # fmt: skip
    data = MultipleChoiceData(
        **places.files(study), batch_size=study.batch_size, eval_batch_size=8 * study.batch_size, seed=seed,
        max_validation_items=study.pool, max_test_items=study.test,
    )  # fmt: skip
    trainer = partial(Trainer, gradient_clip_val=1.0, accelerator=places.accelerator, devices=1)
    evaluator = FineTuneEvaluator()
    ladder = FidelityLadder((study.steps,))
    evaluator.open(
        EvaluationContext(places.of(study, seed), ladder, seed, module, data, trainer, (), lambda text: None)
    )
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace(study.bits, study.ranks, names))
    data.setup("test")
    return evaluator


def _trained(parts: Any, configurations: Sequence[Configuration], steps: int) -> list[dict[str, Any]]:
    """Log-likelihood of every row of both splits, for each configuration after its training."""
    count, data = len(configurations), parts.data
    cohort = Cohort.of(parts.module.backbone, configurations, seed=parts.module.options.seed)
    with cohort.installed(), quiet_lightning():
        together = CohortModule(parts.module, cohort)
        trainer = parts.trainers.training(steps)
        data.start_batch = 0
        together.train()
        trainer.fit(together, datamodule=data)
        together.eval()
        with torch.no_grad(), cohort.stored_precision():
            found = {split: _scored(parts, split, count) for split in SPLITS}
    return [{split: values[member] for split, values in found.items()} for member in range(count)]


def _scored(parts: Any, split: Split, count: int) -> np.ndarray[Any, Any]:
    """Log-likelihoods of the rows of a split, (count, rows)."""
    rows = torch.zeros(count, len(parts.data.scoring_rows(split)))
    device = parts.trainers.training(1).strategy.root_device
    parts.module.backbone.model.to(device)  # a trainer leaves it on the CPU
    for batch in parts.data.scoring_batches(split, shared_length=parts.module.shared_length):
        whole = move_data_to_device(replicate(batch, count), device)
        values, _ = target_log_likelihood(labelled_logits(parts.module.backbone.model, whole), whole)
        rows[:, batch["row"]] = values.view(count, -1).float().cpu()
    return np.asarray(rows.numpy())


def _items(data: MultipleChoiceData) -> dict[str, Any]:
    """Item, tokens and characters of each row, and the right choice of each item, by split."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        rows, choices = data.scoring_rows(split), [data.choices(item) for item in data.items(split)]
        found[f"{split}_item"] = [row.item for row in rows]
        found[f"{split}_tokens"] = [int(np.sum(row.labelled)) for row in rows]
        found[f"{split}_characters"] = [len(text) for choice in choices for text in choice.texts]
        found[f"{split}_label"] = [choice.label for choice in choices]
    return found


def _file(folder: Path, configuration: Configuration, rate: float) -> Path:
    return folder / f"{configuration.digest[:16]}-{rate:g}.npz"


def _write(path: Path, values: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **values)
    part.replace(path)


# Judging


SIZES = (50, 200, 800)
DRAWS = 200
TRUTHS: tuple[ChoiceScore, ...] = ("acc", "acc_norm")
GRID = np.geomspace(1e-3, 1e3, 151)
"""Inverse temperatures, 10 % apart, of which a fitted figure of a draw takes the best; likelihoods are within 1."""
COLUMNS = (
    "model", "task", "seed", "configurations", "truth", "items", "figure", "spearman", "spearman_low", "spearman_high",
    "kendall", "kendall_low", "kendall_high", "regret", "regret_low", "regret_high", "random_regret",
)  # fmt: skip
Array = NDArray[np.float64]


def judged(folder: Path, seed: int) -> list[dict[str, Any]]:
    """How well each figure of n items ranks the configurations in a folder, a row for each, as `COLUMNS`."""
    about = np.load(folder / "items.npz")
    files = sorted(path for path in folder.glob("*.npz") if path.name != "items.npz")
    found = [np.load(path) for path in files]
    found = [one for one in found if all(np.isfinite(one[split]).all() for split in SPLITS)]
    choices = [_choices(one["validation"], about, "validation") for one in found]
    pool = {name: [_by_item(name, one) for one in choices] for name in CHOICE_FIGURES}
    tests = [_choices(one["test"], about, "test") for one in found]
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        draw = np.random.default_rng([seed, size]).multinomial(
            size, np.full(len(about["validation_label"]), 1 / len(about["validation_label"])), size=DRAWS
        )  # (draws, items), how often each item is drawn
        scores = {name: np.stack([_drawn(one, draw) for one in pool[name]], axis=1) for name in CHOICE_FIGURES}
        for truth in TRUTHS:
            accuracy = np.array([float(CHOICE_FIGURES[truth](one).mean()) for one in tests])
            given = {"seed": seed, "configurations": len(found), "truth": truth, "items": size}
            rows += [{**given, "figure": name, **_agreement(scores[name], accuracy)} for name in CHOICE_FIGURES]
    return rows


def _choices(values: Array, about: Any, split: str) -> ComparedChoices:
    items = about[f"{split}_item"]
    counts = np.bincount(items)
    place = np.arange(len(items)) - (np.cumsum(counts) - counts)[items]
    right = torch.tensor(about[f"{split}_label"])

    def compared(divided: Array) -> Compared:
        table = np.full((len(counts), counts.max()), -np.inf)
        table[items, place] = divided
        return Compared(torch.tensor(table), right)

    kinds = (1.0, about[f"{split}_tokens"], about[f"{split}_characters"])
    plain, per_token, per_char = (compared(values.astype(np.float64) / by) for by in kinds)
    return ComparedChoices(plain, per_token, per_char)


@dataclass(frozen=True)
class ByItem:
    """A figure of each item at each temperature, (items, temperatures), and what the temperature is chosen by."""

    outcomes: Array
    any_choice: Array | None = None


def _by_item(name: ChoiceScore, choices: ComparedChoices) -> ByItem:
    """A figure of each item; "fitted" ones at each temperature of the grid, and at infinity."""
    if not name.endswith("_fitted"):
        return ByItem(CHOICE_FIGURES[name](choices).numpy()[:, None])
    kind = name.removeprefix("log_likelihood").removesuffix("_fitted").strip("_") or "plain"
    compared: Compared = getattr(choices, kind)
    there = compared.values > -torch.inf
    count = there.sum(1, keepdim=True)
    centred = compared.values - torch.where(there, compared.values, 0.0).sum(1, keepdim=True) / count
    values = torch.where(there, centred / centred[there].abs().max(), -torch.inf)
    of_right, of_any = [], []
    for inverse in (0.0, *GRID):
        each = among_choices(values, float(inverse))
        of_right.append(each.gather(1, compared.right[:, None]).squeeze(1).numpy())
        of_any.append((torch.where(there, each, 0.0).sum(1) / count.squeeze(1)).numpy())
    return ByItem(np.stack(of_right, axis=1), np.stack(of_any, axis=1))


def _drawn(by_item: ByItem, draw: NDArray[np.int64]) -> Array:
    """The figure of each draw, (draws,); the temperature is fitted to each, as `Compared.fitted` does."""
    size = draw.sum(1)
    of_right = draw @ by_item.outcomes  # (draws, temperatures)
    if by_item.any_choice is None:
        return np.asarray(of_right[:, 0] / size)
    best = (of_right + draw @ by_item.any_choice / size[:, None]).argmax(1)
    return np.asarray(of_right[np.arange(len(draw)), best] / size)


def _agreement(scores: Array, accuracy: Array) -> dict[str, float]:
    """Of the scores (draws, configurations) of a figure with the test accuracy (configurations,), over the draws."""
    regret = accuracy.max() - accuracy
    first = scores == scores.max(1, keepdims=True)  # of several that are first, one is picked at random
    figures = {
        "spearman": np.nan_to_num([spearman(one, accuracy) for one in scores]),
        "kendall": np.nan_to_num([_kendall(one, accuracy) for one in scores]),
        "regret": (first * regret).sum(1) / first.sum(1),
    }
    found = {}
    for name, values in figures.items():
        low, high = np.quantile(values, (0.025, 0.975))
        found |= {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
    return {**found, "random_regret": float(regret.mean())}


def _kendall(a: Array, b: Array) -> float:
    """Kendall's tau-b."""
    x, y = (np.sign(values[:, None] - values[None]) for values in (a, b))
    norm = float(np.sqrt((x != 0).sum() * (y != 0).sum()))
    return float((x * y).sum()) / norm if norm else 0.0


def tables(given: Sequence[Study], places: Places, path: Path | None) -> str:
    """Markdown tables over the studies, and a CSV with a row for each study, seed, size and figure."""
    rows: list[dict[str, Any]] = []
    for study in given:
        for seed in study.seeds:
            folder = places.of(study, seed)
            if len(list(folder.glob("*.npz"))) > MINIMUM:
                rows += [{"model": study.model, "task": study.task, **row} for row in judged(folder, seed)]
    if path is not None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return "\n\n".join([_overall(rows), *(_by_study(rows, truth) for truth in TRUTHS)])


MINIMUM = 5
"""Configurations that a study must have."""


def _mean(rows: Sequence[dict[str, Any]], name: str, **only: Any) -> float:
    """Mean over the studies, each by the mean of its seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if all(row[key] == value for key, value in only.items()):
            values.setdefault(f"{row['model']}/{row['task']}", []).append(row[name])
    return float(np.mean([np.mean(one) for one in values.values()]))


def _overall(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["figure", *(f"{what}, n = {size}" for what in ("Spearman", "Kendall", "regret") for size in SIZES)]
    lines = []
    for figure in CHOICE_FIGURES:
        cells = [
            f"{_mean(rows, name, truth='acc', items=size, figure=figure):.3f}"
            for name in ("spearman", "kendall", "regret")
            for size in SIZES
        ]
        lines.append([f"`{figure}`", *cells])
    return table(heads, lines)


def _by_study(rows: Sequence[dict[str, Any]], truth: str) -> str:
    studies = dict.fromkeys((row["model"], row["task"]) for row in rows)
    heads = [f"Spearman with {truth}", "n", *(f"`{figure}`" for figure in CHOICE_FIGURES)]
    lines = []
    for model, task in studies:
        for size in SIZES:
            only = {"model": model, "task": task, "items": size, "truth": truth}
            cells = [f"{_mean(rows, 'spearman', figure=figure, **only):.2f}" for figure in CHOICE_FIGURES]
            lines.append([f"{model}, {task}", str(size), *cells])
    return table(heads, lines)


def chosen(names: Sequence[str] | None) -> Iterator[Study]:
    """The studies of these names, in that order; all without."""
    known = {study.name: study for study in STUDIES}
    for name in names or known:
        if name not in known:
            raise SystemExit(f"there is no study {name}; there are {', '.join(known)}")
        yield known[name]


def main() -> None:
    """One of the two."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("measure", "tables"))
    options.add_argument("--data", type=Path, help="directory with models/NAME and datasets/NAME/*.jsonl")
    options.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M-Instruct")
    options.add_argument("--cache", type=Path, required=True, help="directory for what is measured")
    options.add_argument("--studies", nargs="+", help="as in deep12/trec; all by default")
    options.add_argument("--seeds", nargs="+", type=int, help="of `measure`; by default those of each study")
    options.add_argument("--together", type=int, help="configurations side by side; by default those of each study")
    options.add_argument("--accelerator", default="cpu", help="as of Lightning's Trainer")
    options.add_argument("--csv", type=Path, help="file for every figure of `tables`")
    given = options.parse_args()
    torch.set_num_threads(1)
    quiet()
    places = Places(given.data, given.smollm2, given.cache, given.accelerator)
    studies = list(chosen(given.studies))
    if given.together is not None:
        studies = [replace(study, together=given.together) for study in studies]
    if given.what == "tables":
        print(tables(studies, places, given.csv))
        return
    for study in studies:
        for seed in given.seeds or study.seeds:
            measure(study, seed, places)


if __name__ == "__main__":
    main()
