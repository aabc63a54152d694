"""Time to quality: our search against Optuna's TPE over bits and ranks by layer, until both have the same score.

    python benchmarks/time_to_quality.py run   --out DIR [--model M] [--data DIR] [--device cuda|cpu] [--max-seconds S]
    python benchmarks/time_to_quality.py table --out DIR

`run` does ours, then the script that people write today, each for every seed: a trial of the script loads the model,
quantises it layer by layer (bitsandbytes at 4 and 8 bits, HQQ at 2 and 3), attaches LoRA by PEFT's `rank_pattern`,
trains it by transformers' Trainer to the highest rung, and scores it. The objective is the score on the validation
items, the constraint are the bytes of the budget, by Optuna's own `constraints_func`.

Ours is the shipped recipe: adapters trained wide and cut, LoftQ's start, seeds of data order and adapters searched, and
trainings averaged at the end. Both have the same rows, batch size, learning rate, schedule, clipping, compute dtype,
validation items, score, space and budget. Ours pays for loading, the bank, importance, decisions and all it writes. The
script is treated kindly: one process, so that imports are not charged; rows are tokenised before its clock starts; a
configuration over the budget costs it nothing but the asking; its first trial is the uniform configuration that the
budget is named by; it is scored by the library's scorer, choice by choice. There is no clock on imports on either side.

A line a measurement is written to DIR/{ours,script}-SEED.jsonl, with the full runs trained and the seconds so far. The
same command goes on where it was stopped; `--max-seconds` and `--trials` stop a side of a seed. `table` may be asked
for at any time. A score counts when it was measured at the highest rung and fits the budget.
"""

from __future__ import annotations

from common import CLOCKS, prepared, quiet, silent, table

# isort: split
import argparse
import io
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from qratk.core import Configuration
from qratk.core.errors import QratkError
from qratk.core.evaluation import FidelityLadder
from qratk.core.memory import Budget, MemoryModel
from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.shared import Shared
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter

SIDES = ("ours", "script")
STAGES = ("load", "quantise", "attach", "train", "score")
ASKED = 5000  # configurations that the script may ask for in vain before one fits


# What is compared


@dataclass(frozen=True)
class Task:
    """One model, one task and one space, for one seed."""

    module: Mapping[str, Any]
    data: Mapping[str, Any]
    search: Mapping[str, Any]
    clip: float
    device: str
    dtype: str
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a log is tied to."""
        return {
            "module": dict(self.module), "data": dict(self.data), "search": dict(self.search), "clip": self.clip,
            "device": self.device, "dtype": self.dtype, "seed": self.seed,
        }  # fmt: skip

    def make_module(self) -> Any:
        """A new FineTuneModule."""
        from qratk.training.module import FineTuneModule

        return FineTuneModule(**{"seed": self.seed, "compute_dtype": self.dtype, **self.module})

    def make_data(self) -> Any:
        """New data."""
        from qratk.data.multiple_choice import MultipleChoiceData

        return MultipleChoiceData(**{"seed": self.seed, **self.data})

    def make_loop(self) -> Any:
        """A search by the classes' own defaults but for what was given."""
        from qratk.settings.recipe import autoqra

        return autoqra(**{"seed": self.seed, "test": False, **self.search})

    def as_shipped(self) -> Task:
        """This task with what `configs/autoqra.yaml` says of adapters, seeds and averaging, but for what was given."""
        from qratk.cli import shipped

        recipe = yaml.safe_load(Path(shipped.configuration("autoqra")).read_text())
        module = {name: recipe["model"][name] for name in ("adapter", "init")}
        search = {name: recipe["search"][name] for name in ("seeds", "merge")}
        return replace(self, module={**module, **self.module}, search={**search, **self.search})


class Timeline:
    """Measurements of one side and seed, in a file of JSON lines that a later session goes on with.

    Raises `SystemExit` where the file is of other settings.
    """

    def __init__(self, path: Path, side: str, task: Task, *, max_seconds: float, clock: str) -> None:
        self.path, self.max_seconds, self.clock = path, max_seconds, clock
        identity = json.loads(json.dumps({"side": side, **task.identity}, default=str))
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [identity]
        if lines[0] != identity:
            raise SystemExit(f"{path} was begun with other settings: give those again, or another --out")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n")
        self.lines = lines[1:]
        self._before = {name: self.lines[-1][name] if self.lines else 0.0 for name in CLOCKS}
        self._began = {name: now() for name, now in CLOCKS.items()}

    @property
    def elapsed(self) -> dict[str, float]:
        """Seconds so far by clock, those of earlier sessions too."""
        return {name: self._before[name] + now() - self._began[name] for name, now in CLOCKS.items()}

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.elapsed[self.clock] >= self.max_seconds

    def add(self, **measurement: Any) -> None:
        """Write a line."""
        line = {**measurement, **{name: round(value, 3) for name, value in self.elapsed.items()}}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        score, runs = line["score"], line["runs"]
        print(f"{self.path.stem}: {runs:.2f} runs, {line[self.clock]:.1f} s: {score:.4f} at {line['steps']} steps, "
              f"{line['configuration']}", flush=True)  # fmt: skip


# Ours


class TimeIsUpError(Exception):
    """The search was stopped by the clock."""


class Writer(Reporter):
    """Adds every evaluation of a search to a timeline, and stops the search when the time is up."""

    essential = True

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._known = len(timeline.lines)
        self._top = 0
        self._limit: Budget | None = None
        self._trained: dict[tuple[str, int], int] = {}
        self._steps = 0

    def open(self, destination: Destination) -> None:
        """Nothing to open."""

    def started(self, plan: SearchPlan) -> None:
        """Take the highest rung and the budget."""
        self._top, self._limit = plan.ladder.highest, plan.problem.budget

    def evaluated(self, record: Record, progress: Progress) -> None:
        """Write the evaluation, unless an earlier session did; raises `TimeIsUpError`."""
        evaluation = record.evaluation
        training = (evaluation.training, evaluation.replicate)
        before = self._trained.get(training, 0)
        self._steps += max(0, evaluation.steps - before)
        self._trained[training] = max(before, evaluation.steps)
        if record.index < self._known:
            return
        assert self._limit is not None
        size = evaluation.footprint.bytes(self._limit.scope)
        fits, decides = (
            size <= self._limit.limit_bytes,
            record.candidate.phase != "reference" and not evaluation.replicate,
        )
        self._timeline.add(
            configuration=str(evaluation.configuration),
            steps=evaluation.steps,
            score=evaluation.score if evaluation.ok else float("-inf"),
            bytes=size,
            fits=fits,
            counts=evaluation.ok and evaluation.steps == self._top and fits and decides,
            runs=self._steps / self._top,
            phase=record.candidate.phase,
        )
        if self._timeline.over:
            raise TimeIsUpError

    def message(self, text: str) -> None:
        """Not shown."""

    def working(self, work: Work) -> None:
        """Not shown."""

    def progress(self, progress: Progress) -> None:
        """Not shown."""

    def generation(self, summary: GenerationSummary) -> None:
        """Not written."""

    def refinement(self, summary: RefinementSummary) -> None:
        """Not written."""

    def finished(self, result: SearchResult) -> None:
        """Write the mean of several trainings where that is the answer: it took no step of training."""
        best = result.best
        if not best.merged or any(line["phase"] == "merge" for line in self._timeline.lines):
            return
        assert self._limit is not None
        self._timeline.add(
            configuration=f"{best.configuration}, mean of {len(best.merged)} trainings",
            steps=best.steps,
            score=best.score,
            bytes=best.footprint.bytes(self._limit.scope),
            fits=True,
            counts=True,
            runs=self._steps / self._top,
            phase="merge",
        )

    def close(self) -> None:
        """Nothing to close."""


def ours(task: Task, timeline: Timeline, folder: Path) -> None:
    """A search of ours until its end or that of the time."""
    from lightning import Trainer

    from qratk.reporters.files import RunFiles
    from qratk.reporters.multi import Reporters
    from qratk.reporters.pictures import Pictures
    from qratk.reporters.tensorboard import TensorBoardReporter
    from qratk.reporters.terminal import TerminalReporter

    os.environ["QRATK_CACHE"] = str(folder / "banks")  # none is found ready-made
    told = [RunFiles(), Pictures(), TensorBoardReporter(), TerminalReporter.to(io.StringIO(), True), Writer(timeline)]
    reporter = Reporters(told)
    reporter.open(Destination(folder))
    accelerator = "gpu" if task.device == "cuda" else "cpu"
    try:
        task.make_loop().run(
            run_dir=folder,
            reporter=reporter,
            config=task.identity,
            module=task.make_module(),
            datamodule=task.make_data(),
            trainer=partial(Trainer, gradient_clip_val=task.clip, accelerator=accelerator, devices=1),
        )
    except TimeIsUpError:
        pass
    finally:
        reporter.close()


# The script


@dataclass
class Script:
    """What a person writes: one function that makes, trains and scores a configuration, and a study over it."""

    task: Task
    folder: Path
    spent: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})

    def __post_init__(self) -> None:
        """Rows, bytes and the budget: before the clock starts."""
        from whole_search import InOrder

        from qratk.training.building import context_length

        loop, module = self.task.make_loop(), self.task.make_module()
        backbone = module.load_backbone(weights=False)
        self.top: int = FidelityLadder(tuple(loop.steps)).highest
        self.data = self.task.make_data()
        self.data.attach(backbone.tokenizer, context_length=context_length(backbone.config))
        self.data.setup("fit")
        self.options = module.options
        self.rows = InOrder(self.data, self.top)
        self.batches = self.data.scoring_batches("validation")
        self.names = tuple(shape.name for shape in backbone.shapes)
        self.memory, self.budget = self._posed(loop, backbone)
        self.bits, self.ranks = list(map(int, loop.bits)), list(map(int, loop.ranks))
        self.rates = next((list(ladder.values) for ladder in loop.shared_ladders), [])
        if [ladder.name for ladder in loop.shared_ladders] not in ([], ["learning_rate"]):
            raise SystemExit("the script varies bits, ranks and the learning rate: leave other shared settings out")
        self.first = tuple(loop.like) if loop.like else (min(self.bits), min(self.ranks))

    def _posed(self, loop: Any, backbone: Any) -> tuple[MemoryModel, Budget]:
        from qratk.peaks.foretold import memory_model

        model = partial(
            memory_model, backbone, batch_size=self.data.batch_size, sequence_length=self.data.max_length,
            gradient_checkpointing=self.options.gradient_checkpointing, trace=loop.scope == "training",
        )  # fmt: skip
        posed: tuple[MemoryModel, Budget] = loop.pose(self.names, model)
        return posed

    def score(self, configuration: Configuration, shared: Shared) -> float:
        """The validation score after training to the highest rung."""
        import rivals
        from transformers import AutoModelForCausalLM, set_seed

        options, dtype, device = self.options.with_shared(shared), getattr(torch, self.task.dtype), self.task.device
        clock, marks = CLOCKS["wall"], []

        def mark() -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append(clock())

        set_seed(self.task.seed)
        mark()
        model = AutoModelForCausalLM.from_pretrained(_path(options.model), dtype=dtype)
        mark()
        names = rivals.projections(model)
        rivals.quantise(model, configuration.bits, dtype=dtype, device=device)
        mark()
        on_device: Any = model.to(device)  # type: ignore[arg-type]
        model = rivals.lora(on_device, names, configuration.ranks)
        mark()
        self._train(model, options)
        mark()
        score = self._scored(model)
        mark()
        for stage, begin, end in zip(STAGES, marks[:-1], marks[1:], strict=True):
            self.spent[stage].append(end - begin)
        return score

    def _train(self, model: Any, options: Any) -> None:
        from transformers import Trainer, TrainingArguments

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        from qratk.training.optimisation import learning_rate_factor

        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.top, options.warmup_steps, options.schedule)
        )
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"), max_steps=self.top, max_grad_norm=self.task.clip,
            per_device_train_batch_size=self.data.batch_size,  save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, use_cpu=self.task.device == "cpu", seed=self.task.seed,
        )  # fmt: skip
        trainer = InOrder(
            model=model, args=arguments, train_dataset=self.rows, data_collator=self.rows.collate,
            optimizers=(optimizer, scheduler),
        )  # fmt: skip
        with silent():
            trainer.train()

    def _scored(self, model: Any) -> float:
        from qratk.backbone.logits import labelled_logits, target_log_likelihood

        scorer = self.data.scorer("validation").to(self.task.device)
        model.eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":  # in evaluation some processors take another way, or fail
                module.train()
        with torch.inference_mode():
            for batch in self.batches:
                moved = {name: value.to(self.task.device) for name, value in batch.items()}
                scorer.update(moved, *target_log_likelihood(labelled_logits(model, moved), moved))
        return float(scorer.compute()["score"])

    def asked(self, trial: Any) -> tuple[Configuration, Shared]:
        """The configuration of a trial, and its learning rate where that is searched."""
        bits = [trial.suggest_categorical(f"bits{i}", self.bits) for i in range(len(self.names))]
        ranks = [trial.suggest_categorical(f"rank{i}", self.ranks) for i in range(len(self.names))]
        rate = trial.suggest_categorical("learning_rate", self.rates) if self.rates else None
        return Configuration.of(bits, ranks), () if rate is None else (("learning_rate", rate),)

    def excess(self, configuration: Configuration) -> float:
        """Bytes over the budget, relatively; not positive where it fits."""
        return self.bytes(configuration) / self.budget.limit_bytes - 1

    def bytes(self, configuration: Configuration) -> int:
        """Bytes that the budget limits."""
        return self.memory.bytes(configuration, self.budget.scope)


def script(task: Task, timeline: Timeline, folder: Path, prepared: Script, trials: int) -> None:
    """A study until so many trials were trained, or the time is up."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    begun = len(timeline.lines)
    sampler = optuna.samplers.TPESampler(
        seed=task.seed + begun, constraints_func=lambda trial: (trial.user_attrs["excess"],)
    )
    study = optuna.create_study(
        study_name="study", storage=storage, sampler=sampler, direction="maximize", load_if_exists=True
    )
    if not begun:
        bits, rank = prepared.first
        layers, rate = range(len(prepared.names)), prepared.options.learning_rate
        first = {f"bits{i}": bits for i in layers} | {f"rank{i}": rank for i in layers}
        study.enqueue_trial(first | ({"learning_rate": rate} if rate in prepared.rates else {}))
    while len(timeline.lines) < trials and not timeline.over:
        trial, configuration, shared = _fitting(study, prepared)
        try:
            score = prepared.score(configuration, shared)
        except torch.OutOfMemoryError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        study.tell(trial, score)
        timeline.add(
            configuration=str(configuration.with_shared(dict(shared))),
            steps=prepared.top,
            score=score,
            bytes=prepared.bytes(configuration),
            fits=True,
            counts=True,
            runs=float(len(timeline.lines) + 1),
            asked=trial.number + 1,
            stages={stage: round(times[-1], 3) for stage, times in prepared.spent.items()},
        )


def _fitting(study: Any, prepared: Script) -> tuple[Any, Configuration, Shared]:
    """The next trial whose configuration fits; those that do not are told as such, and not trained."""
    import optuna

    for _ in range(ASKED):
        trial = study.ask()
        configuration, shared = prepared.asked(trial)
        excess = prepared.excess(configuration)
        trial.set_user_attr("excess", excess)
        if excess <= 0:
            return trial, configuration, shared
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    raise SystemExit(f"none of {ASKED} configurations that the sampler asked for fits the budget")


# The table


@dataclass(frozen=True)
class Course:
    """How the best score of one side and seed went."""

    lines: Sequence[Mapping[str, Any]]
    clock: str

    @property
    def best(self) -> float:
        """The best score that counts."""
        return max((line["score"] for line in self.lines if line["counts"]), default=float("-inf"))

    @property
    def trained(self) -> int:
        """Configurations at the highest rung."""
        return sum(line["counts"] for line in self.lines)

    @property
    def total(self) -> tuple[float, float]:
        """Full runs and seconds in all."""
        return (self.lines[-1]["runs"], self.lines[-1][self.clock]) if self.lines else (0.0, 0.0)

    def until(self, target: float) -> tuple[float, float] | None:
        """Full runs and seconds until a score is reached; None where it never was."""
        for line in self.lines:
            if line["counts"] and line["score"] >= target:
                return line["runs"], line[self.clock]
        return None


def courses(out: Path, clock: str) -> dict[int, dict[str, Course]]:
    """Both sides by seed, of the seeds that have both."""
    found: dict[int, dict[str, Course]] = {}
    for side in SIDES:
        for path in sorted(out.glob(f"{side}-*.jsonl")):
            identity, *lines = [json.loads(line) for line in path.read_text().splitlines()]
            found.setdefault(identity["seed"], {})[side] = Course(lines, clock)
    return {
        seed: sides
        for seed, sides in sorted(found.items())
        if len(sides) == len(SIDES) and all(course.trained for course in sides.values())
    }


def report(out: Path, clock: str) -> dict[str, Any]:
    """Print the tables; the figures as plain data."""
    found = courses(out, clock)
    if not found:
        raise SystemExit(f"{out} holds no seed with a score of both sides: `run` comes first")
    rows = [
        [str(seed), side, str(course.trained), f"{course.total[0]:.1f}", f"{course.total[1]:.0f}", f"{course.best:.4f}"]
        for seed, sides in found.items()
        for side, course in sides.items()
    ]
    print(table(["seed", "side", "at the highest rung", "full runs", f"seconds ({clock})", "best score"], rows))
    rows, results = [], {}
    for name in SIDES:
        ratios: list[tuple[float, float, bool]] = []
        for seed, sides in found.items():
            target = sides[name].best
            reached = {side: sides[side].until(target) for side in SIDES}
            cells = [str(seed), f"best of {name}, {target:.4f}"]
            for side in SIDES:
                spent, mark = reached[side] or sides[side].total, "" if reached[side] else "> "
                cells += [f"{mark}{spent[0]:.2f}", f"{mark}{spent[1]:.1f}"]
            (runs, seconds), (their_runs, their_seconds) = (reached[s] or sides[s].total for s in SIDES)
            bound = ">" if not reached["script"] else "<" if not reached["ours"] else ""
            cells += [f"{bound} {their_runs / runs:.1f}".strip(), f"{bound} {their_seconds / seconds:.1f}".strip()]
            ratios.append((their_runs / runs, their_seconds / seconds, not bound))
            rows.append(cells)
        results[f"best of {name}"] = {
            "runs": statistics.median(r for r, _, _ in ratios), "seconds": statistics.median(s for _, s, _ in ratios),
            "bounds": sum(not exact for *_, exact in ratios),
        }  # fmt: skip
    heads = ["seed", "target", "ours, runs", "s", "script, runs", "s", "script / ours, runs", "seconds"]
    print(table(heads, rows))
    for name, figures in results.items():
        bounds = f", of which {figures['bounds']} bounds" if figures["bounds"] else ""
        print(f"until the {name}: {figures['runs']:.1f} times the runs (target 10), {figures['seconds']:.1f} times the "
              f"seconds (target 15), medians of {len(found)} seeds{bounds}")  # fmt: skip
    return results


# The command line


def _path(model: str) -> str:
    from qratk.embedded import model_directory

    return str(model_directory()) if model == "embedded" else os.path.expanduser(model)


def files(given: argparse.Namespace) -> dict[str, str]:
    """Rows by split."""
    if given.data is not None:
        return {split: str(given.data / f"{split}.jsonl") for split in ("train", "test")}
    from qratk.embedded import write_dataset

    return {split: str(path) for split, path in write_dataset(given.out / "embedded").items()}


def tasks(given: argparse.Namespace) -> Iterator[Task]:
    """One for each seed. `--set` comes last, over everything."""
    from transformers import AutoConfig

    from qratk.backbone.loading import dtype_name, resolve_dtype

    model: dict[str, Any] = {"model": given.model, "learning_rate": given.learning_rate, "warmup_steps": given.warmup}
    data: dict[str, Any] = {**files(given), "batch_size": given.batch_size, "eval_batch_size": given.eval_batch_size}
    if given.data is not None:
        data |= {"validation_items": given.items}
    else:
        data |= {"max_validation_items": given.items}
    search: dict[str, Any] = {
        "bits": given.bits, "ranks": given.ranks, "like": given.like, "steps": given.steps, "references": []
    }  # fmt: skip
    sections = {"model": model, "data": data, "search": search}
    for text in given.set:
        key, equals, value = text.partition("=")
        section, dot, option = key.partition(".")
        if not (equals and dot and section in sections):
            raise SystemExit(f"--set takes SECTION.OPTION=VALUE with one of {', '.join(sections)}, not {text!r}")
        sections[section][option] = yaml.safe_load(value)
    stored = getattr(AutoConfig.from_pretrained(_path(given.model)), "dtype", None) or torch.float32
    automatic = resolve_dtype("auto", stored=stored) if given.device == "cuda" else torch.float32
    dtype = dtype_name(automatic) if given.dtype == "auto" else given.dtype
    for seed in given.seeds:
        yield Task(model, data, search, given.clip, given.device, dtype, seed)


def run(given: argparse.Namespace) -> None:
    """Both sides, seed by seed."""
    if given.threads:
        torch.set_num_threads(given.threads)
    for task in tasks(given):
        for side in given.sides:
            folder = given.out / f"{side}-{task.seed}"
            prepared_script = Script(task, folder) if side == "script" else None  # its clock starts afterwards
            timeline = Timeline(
                given.out / f"{side}-{task.seed}.jsonl", side, task, max_seconds=given.max_seconds, clock=given.clock
            )
            if prepared_script is None:
                ours(task.as_shipped(), timeline, folder)
            else:
                script(task, timeline, folder, prepared_script, given.trials)


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("action", choices=("run", "table"))
    made.add_argument("--out", type=Path, required=True, help="folder of the logs and of what both sides write")
    made.add_argument("--model", default="embedded", help="Hugging Face directory")
    made.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of multiple choice")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="auto", help="of both sides: bfloat16 on CUDA, float32 on CPU by default")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    made.add_argument("--trials", type=int, default=1000, help="of the script, those that are trained")
    made.add_argument("--max-seconds", type=float, default=float("inf"), help="of a side of a seed, by --clock")
    made.add_argument("--clock", choices=sorted(CLOCKS), help="wall on CUDA, cpu elsewhere, by default")
    made.add_argument("--threads", type=int, help="of torch; 1 by default")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    made.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    made.add_argument("--like", type=int, nargs=2, default=[4, 8])
    made.add_argument("--steps", type=int, nargs="+", default=[10, 30], help="rungs; the script trains to the highest")
    made.add_argument("--learning-rate", type=float, default=3e-3)
    made.add_argument("--warmup", type=int, default=5)
    made.add_argument("--clip", type=float, default=1.0)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--eval-batch-size", type=int, default=64)
    made.add_argument("--items", type=int, default=100, help="validation items")
    made.add_argument("--set", nargs="+", default=[], metavar="SECTION.OPTION=VALUE",
                      help="any option of model, data or search, as in search.generations=4")  # fmt: skip
    made.add_argument("--json", type=Path, help="file for the results of `table`")
    return made


def main() -> None:
    """Run, or print the table."""
    given = prepared(options())
    quiet()
    given.clock = given.clock or ("wall" if given.device == "cuda" else "cpu")
    if given.action == "run":
        try:
            run(given)
        except QratkError as error:
            raise SystemExit(str(error)) from error
    results = report(given.out, given.clock) if given.action == "table" or set(given.sides) == set(SIDES) else {}
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
