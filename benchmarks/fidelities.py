"""What can stand for a full training run: rank correlation and regret, by the steps that it takes.

    python benchmarks/fidelities.py measure --cache FOLDER [--studies embedded] [--data DIR] [--smollm2 FOLDER] ...
    python benchmarks/fidelities.py table --cache FOLDER [--csv FILE]

Configurations under one budget, the bytes of uniform 4 bits and rank 8: half are the first generation of the default
search, half random ones close to the budget. Each is trained in full from several seeds (of data order and adapters;
the validation items stay). Then what is cheaper is measured on the same configurations:

- rung: the validation score after fewer steps of the same training;
- loss: minus the mean training loss of these steps; all see the same batches, so that differences to a reference
  configuration rank them alike;
- annealed: the score of a training that is as short and has its whole schedule;
- once, once any: adapters trained once at the largest rank, while each step draws one configuration under the budget
  (any: without one), its ranks nested; all are scored with the first rows of these adapters, without training;
- uniform's adapters: those of one plain run at 4 bits and the largest rank, cut to the ranks by singular values;
- then: either of these two trained on, each configuration by itself, for the last steps of the schedule;
- untrained, divergence, autoquantize, ranks, bits: no training at all;
- top k: all to the lowest rung, the k best of them to the end.

Children, one or two edits away from a configuration trained in full, begin with its adapters: `inherited`.

A fidelity of one seed is compared with the full runs of the same seed, and with their mean over the other seeds, which
is also what a full run itself is compared with: whatever has that correlation is as good as a full run. Regret is how
far the mean over other seeds of the configuration that is put first lies below the best one. Cost is optimiser steps in
full runs for each configuration, scoring apart.

`measure` keeps a file for each kind and seed in FOLDER and goes on where it was stopped; `--minutes` begins nothing new
after that time.
"""

from __future__ import annotations

from common import quiet, table

# isort: split
import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from numpy.typing import NDArray
from torch import Tensor

from qratk.adapters.matrices.directions import directions
from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration, unique
from qratk.core.correlation import ranks, spearman
from qratk.core.evaluation import FidelityLadder, History
from qratk.core.memory import resolve_budget
from qratk.core.problem import Importance, Problem
from qratk.core.space import SearchSpace
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.embedded import model_directory, write_dataset
from qratk.estimators.base import estimators
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.mutations.base import mutations
from qratk.mutations.proposer import Proposer
from qratk.repairs.base import repairs
from qratk.searchers.base import searchers
from qratk.searchers.sampling import random_downgrade
from qratk.training.cohort import Cohort
from qratk.training.cohort_module import CohortModule
from qratk.training.continuation import Continuation
from qratk.training.divergence import FrozenDivergence
from qratk.training.state import TrainingState
from qratk.training.trainers import in_place, quiet_lightning

Figures = dict[str, float]
Row = dict[str, Any]
Array = NDArray[np.float64]
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Study:
    """A model and a task, and how its configurations are trained: `rungs` are shares of `steps`, in eighths."""

    name: str
    module: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: int
    bits: tuple[int, ...] = (2, 4, 8)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    candidates: int = 32
    parents: int = 5
    children: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    together: int = 8
    rungs: tuple[int, ...] = (1, 2, 3)
    finishing: tuple[int, ...] = (1, 2)
    supernets: tuple[int, ...] = (1, 2, 4)
    figure: str = "log_likelihood"

    def share(self, eighths: int) -> int:
        """So many eighths of the steps."""
        return max(1, round(self.steps * eighths / 8))


STUDIES = (
    Study(
        "embedded", {"learning_rate": 5e-3, "warmup_steps": 4, "schedule": "linear"},
        {"batch_size": 16, "eval_batch_size": 128, "max_validation_items": 160}, steps=40,
    ),
    Study(
        "deep12", {"learning_rate": 1e-2, "warmup_steps": 5},
        {"validation_items": 80, "batch_size": 16, "eval_batch_size": 96}, steps=30, ranks=(4, 8, 16),
    ),
    Study(
        "smollm2", {"learning_rate": 3e-3, "warmup_steps": 4, "schedule": "linear"},
        {"validation_items": 100, "batch_size": 8, "eval_batch_size": 64}, steps=30, bits=(3, 4, 8), candidates=14,
        children=0, parents=0, seeds=(0, 1), together=1, rungs=(1, 3), finishing=(), supernets=(1,),
        figure="prob_per_token",
    ),
)  # fmt: skip


# Training


class Told(CohortModule):
    """A cohort that keeps the losses of its steps."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.losses: list[list[float]] = []

    def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The losses, kept."""
        losses = super().candidate_losses(batch)
        self.losses.append(losses.detach().float().cpu().tolist())
        return losses


@dataclass
class Course:
    """What came of one training: losses of its steps, scores at its rungs, states where they were asked for."""

    losses: list[float] = field(default_factory=list)
    scores: dict[int, Figures] = field(default_factory=dict)
    states: dict[int, TrainingState] = field(default_factory=dict)


class RandomSubnets(Callback):
    """Each step trains one drawn configuration: its bits, and the first rows of adapters of the largest rank."""

    def __init__(self, draw: Callable[[], Configuration]) -> None:
        self.draw = draw
        self._whole: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Switch the weights, and hide the rows beyond the ranks: both sides are 0, so that neither has a gradient."""
        chosen, backbone = self.draw(), pl_module.backbone
        parameters = dict(backbone.trainable_parameters())
        for layer, choice in zip(backbone.layers, chosen.layers, strict=True):
            for name, bank in layer.modules:
                bank.activate(choice.bits)
                a, b = parameters[name + A], parameters[name + B]
                for part in (a.data[choice.rank :], b.data[:, choice.rank :]):
                    self._whole.append((part, part.clone()))
                    part.zero_()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Bring the hidden rows back."""
        for part, values in self._whole:
            part.copy_(values)
        self._whole = []


@dataclass
class Lab:
    """An open evaluator of a study, and what trains and scores with it."""

    study: Study
    given: argparse.Namespace
    evaluator: FineTuneEvaluator = field(default_factory=FineTuneEvaluator)

    def __post_init__(self) -> None:
        study, cache = self.study, self.given.cache
        module_options, data = {**study.module, "bank_dir": str(cache / "banks")}, self._data()
        from qratk.training.module import FineTuneModule

        module = FineTuneModule(self._model(), schedule_steps=study.steps, **module_options)
        accelerator = {"cuda": "gpu"}.get(self.given.device, self.given.device)
        trainer = partial(Trainer, gradient_clip_val=1.0, accelerator=accelerator, devices=1)
        ladder = FidelityLadder((study.share(1), study.steps))
        self.evaluator.open(
            EvaluationContext(cache / study.name, ladder, 0, module, data, trainer, say=lambda text: None)
        )
        self.parts = self.evaluator.parts
        names = tuple(shape.name for shape in self.evaluator.shapes)
        self.space = SearchSpace(study.bits, study.ranks, names)
        self.memory = self.evaluator.memory_model(self.space)
        _ = self.parts.module.shared_length

    def _model(self) -> str:
        if self.study.name == "embedded":
            return str(model_directory())
        if self.study.name == "smollm2":
            return str(self.given.smollm2)
        return str(self.given.data / "models" / self.study.name)

    def _data(self) -> MultipleChoiceData:
        if self.study.name == "embedded":
            files = {split: str(path) for split, path in write_dataset(self.given.cache / "embedded-data").items()}
        else:
            folder = self.given.data / "datasets" / "trec"
            files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        return MultipleChoiceData(**files, **self.study.data, score=self.study.figure)  # type: ignore[arg-type]

    @property
    def backbone(self) -> Backbone:
        """The model."""
        return self.parts.module.backbone

    def finish(self) -> None:
        """Build the bank and drop the full-precision weights."""
        self.parts.preparation.finish(self.space)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Context in which data order and adapters have the seeds of a replicate."""
        with self.parts.replicated(Configuration.uniform(4, 8, 1), seed):
            yield

    def cohort(self, members: Sequence[Configuration]) -> Cohort:
        """Candidates side by side."""
        return Cohort.of(self.backbone, members, seed=self.parts.module.options.seed)

    def climb(
        self, members: Sequence[Configuration], rungs: Sequence[int], *, states: Sequence[TrainingState] = (),
        keep: Sequence[int] = (), schedule: int | None = None,
    ) -> list[Course]:  # fmt: skip
        """Train side by side from rung to rung, scoring at each; from states, all of as many steps, where given."""
        module, courses, done = self.parts.module, [Course() for _ in members], states[0].steps if states else 0
        before, module.schedule_steps = module.schedule_steps, schedule or module.schedule_steps
        cohort = self.cohort(members)
        try:
            with cohort.installed(), quiet_lightning():
                for rung in rungs:
                    together = Told(module, cohort, states)
                    with in_place(together):
                        if rung > done:
                            self._fit(together, done, rung)
                            states = together.training_states()
                        self.parts.trainers.scoring().validate(together, datamodule=self.parts.data, verbose=False)
                    done = rung
                    for k, course in enumerate(courses):
                        course.losses += [losses[k] for losses in together.losses]
                        course.scores[rung] = together.scores[k][0]
                        if rung in keep:
                            course.states[rung] = states[k]
        finally:
            module.schedule_steps = before
        return courses

    def _fit(self, together: CohortModule, done: int, steps: int) -> None:
        trainer = self.parts.trainers.training(steps - done)
        self.parts.data.start_batch = done
        together.train()
        trainer.fit(together, datamodule=self.parts.data)

    def supernet(self, steps: int, draw: Callable[[], Configuration]) -> TrainingState:
        """Adapters of the largest rank after so many steps, each on a configuration that is drawn."""
        module, data = self.parts.module, self.parts.data
        module.activate(Configuration.uniform(self.space.bits[-1], self.space.ranks[-1], self.space.num_layers))
        before, module.schedule_steps = module.schedule_steps, steps
        trainer = self.parts.trainers.training(steps)
        trainer.callbacks.append(RandomSubnets(draw))  # type: ignore[attr-defined]
        module.continuation = Continuation()
        data.start_batch = 0
        try:
            with in_place(module), quiet_lightning():
                module.train()
                trainer.fit(module, datamodule=data)
            return module.training_state()
        finally:
            module.schedule_steps = before

    @cached_property
    def problem(self) -> Problem:
        """The budget, and importance as by default; to be asked for before `finish`."""
        scores = {
            knob: tuple(self.evaluator.importance(estimators.create(name), self.space).tolist())
            for knob, name in (("bits", "fisher_residual"), ("rank", "gradient_spectrum"))
        }
        budget = resolve_budget(self.memory, like=(4, 8))
        return Problem(self.evaluator.shapes, self.memory, budget, Importance(**scores))

    @cached_property
    def proposer(self) -> Proposer:
        """As by default."""
        operators = [mutations.create(name) for name in ("sensitivity", "coupled")]
        return Proposer(self.problem, operators, repairs.create("greedy"))

    def candidates(self) -> tuple[Configuration, ...]:
        """Half the first generation of a default search, half random ones that take at least 95 % of the budget."""
        count, rng = self.study.candidates, np.random.default_rng(0)
        searcher = searchers.create("nsga2", offspring=count // 2)
        searcher.begin(self.proposer, FidelityLadder((self.study.share(1), self.study.steps)))
        found = [one.configuration for one in searcher.ask(History(), rng)]
        uniform = Configuration.uniform(4, 8, self.space.num_layers)
        found = list(unique([uniform, *found]))[: max(1, count // 2)]
        while len(found) < count:
            drawn = self.near_budget(rng)
            if drawn not in found:
                found.append(drawn)
        return tuple(found)

    def near_budget(self, rng: np.random.Generator) -> Configuration:
        """Random configuration that takes at least 95 % of the budget."""
        while True:
            drawn = random_downgrade(self.problem, self.space.random(rng), rng)
            if self.problem.bytes(drawn) >= 0.95 * self.problem.budget.limit_bytes:
                return drawn

    def children(self, parents: Sequence[Configuration], count: int) -> list[tuple[Configuration, Configuration]]:
        """Pairs of a parent and a child one or two edits away, as many of each parent."""
        rng, found = np.random.default_rng(1), dict[Configuration, Configuration]()
        while len(found) < count:
            parent = parents[len(found) % len(parents)]
            varied = self.proposer.vary(parent, rng, edits=int(rng.integers(1, 3)))
            if varied is not None and varied[0] not in (*parents, *found):
                found[varied[0]] = parent
        return [(parent, child) for child, parent in found.items()]


# Adapters of one configuration in another


def nested(state: TrainingState, layers: Backbone, configuration: Configuration, steps: int) -> TrainingState:
    """The first rows of wide adapters, as a state of so many steps without moments."""
    adapter = {}
    for layer, choice in zip(layers.layers, configuration.layers, strict=True):
        for name, _ in layer.modules:
            adapter[name + A] = state.adapter[name + A][: choice.rank].clone()
            adapter[name + B] = state.adapter[name + B][:, : choice.rank].clone()
    return TrainingState(steps, adapter, {}, state.random, state.device_random)


def inherited(
    state: TrainingState, fresh: Mapping[str, Tensor], layers: Backbone, configuration: Configuration, steps: int
) -> TrainingState:
    """A parent's adapters at the ranks of a child: cut by singular values, or grown by fresh rows without effect.

    Moments go along where the rank stays, and are 0 elsewhere.
    """
    adapter, moments = {}, {}
    for layer, choice in zip(layers.layers, configuration.layers, strict=True):
        for name, _ in layer.modules:
            a, b = state.adapter[name + A], state.adapter[name + B]
            if choice.rank < len(a):
                a, b = directions(a, b).first(choice.rank)
            elif choice.rank > len(a):
                a = torch.cat([a, fresh[name + A][len(a) :]])
                b = torch.cat([b, torch.zeros(len(b), choice.rank - b.shape[1])], dim=1)
            adapter |= {name + A: a.clone(), name + B: b.clone()}
            for side in (A, B):
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    value = state.optimizer.get(f"{name}{side}/{key}")
                    if value is not None:
                        same = not value.dim() or value.shape == adapter[name + side].shape
                        moments[f"{name}{side}/{key}"] = value if same else torch.zeros_like(adapter[name + side])
    return TrainingState(steps, adapter, moments, state.random, state.device_random)


# Measuring


@dataclass
class Kept:
    """What was measured of a kind, in a file."""

    path: Path

    def __post_init__(self) -> None:
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep more of it."""
        self.values |= found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values), encoding="utf-8")
        part.replace(self.path)

    def missing(self, names: Sequence[str], at_once: int) -> Iterator[list[str]]:
        """What is not there yet, in groups."""
        rest = [name for name in names if name not in self.values]
        yield from (rest[first : first + at_once] for first in range(0, len(rest), at_once))


@dataclass
class Session:
    """Measures a study, kind by kind, until its time is up."""

    lab: Lab
    folder: Path
    late: Callable[[], bool]
    began: float = field(default_factory=time.monotonic)

    def kept(self, kind: str, seed: int) -> Kept:
        """What is there of a kind."""
        return Kept(self.folder / f"{kind}-{seed}.json")

    def say(self, text: str) -> None:
        """With the time that has passed."""
        print(f"{time.monotonic() - self.began:7.0f} s  {self.lab.study.name}: {text}", flush=True)

    def untrained(self) -> None:
        """What takes no training; also draws the configurations, for which the full-precision weights must be there."""
        lab, kept = self.lab, self.kept("untrained", 0)
        if "candidates" in kept.values:
            _ = lab.problem  # needs the full-precision weights
            lab.finish()
            return
        candidates, children = lab.candidates(), list[tuple[Configuration, Configuration]]()
        costs = lab.evaluator.importance_by_rung(estimators.create("autoquantize"), lab.space, "bits")
        assert costs is not None
        batches = lab.parts.data.calibration_batches(8, 8)
        frozen = FrozenDivergence(
            lab.parts.module, lab.parts.device, batches, kind="labelled", most=4096, dtype=torch.float32
        )
        frozen.take_targets()
        lab.finish()
        rows = {}
        for one in candidates:
            divergence = frozen.score(one).score
            untrained = lab.parts.alone.scored().figures
            cost = sum(costs[layer, lab.space.bits.index(bits)] for layer, bits in enumerate(one.bits))
            rows[str(one)] = {
                "divergence": divergence, "untrained": dict(untrained), "autoquantize": -float(cost),
                "ranks": statistics.fmean(one.ranks), "bits": lab.memory.average_bits(one),
                "bytes": lab.problem.bytes(one),
            }  # fmt: skip
        if lab.study.children:
            children = lab.children(candidates[: lab.study.parents], lab.study.children)
        pairs = [(str(parent), str(child)) for parent, child in children]
        kept.add({"rows": rows, "children": pairs, "candidates": [str(one) for one in candidates]})
        self.say("untrained figures")

    def runs(self, seed: int) -> None:
        """Full runs, with the score at every rung."""
        study, kept = self.lab.study, self.kept("runs", seed)
        rungs = [*map(study.share, study.rungs), study.steps]
        for group in kept.missing(self.kept("untrained", 0).values["candidates"], study.together):
            if self.late():
                return
            courses = self.lab.climb([Configuration.from_text(text) for text in group], rungs)
            kept.add({text: {"losses": c.losses, "scores": c.scores} for text, c in zip(group, courses, strict=True)})
            self.say(f"seed {seed}, {len(kept.values)} full runs")

    def annealed(self, seed: int) -> None:
        """Short runs with whole schedules."""
        study, kept = self.lab.study, self.kept("annealed", seed)
        for group in kept.missing(self.kept("untrained", 0).values["candidates"], study.together):
            if self.late():
                return
            members = [Configuration.from_text(text) for text in group]
            found: list[dict[int, Figures]] = [{} for _ in group]
            for steps in map(study.share, study.rungs):
                for own, course in zip(found, self.lab.climb(members, [steps], schedule=steps), strict=True):
                    own |= course.scores
            kept.add(dict(zip(group, found, strict=True)))
            self.say(f"seed {seed}, {len(kept.values)} annealed")

    def once(self, seed: int) -> None:
        """One training for all, of several kinds, and then a few steps of each configuration's own."""
        lab, study, given, kept = self.lab, self.lab.study, self.lab.given, self.kept("once", seed)
        names = self.kept("untrained", 0).values["candidates"]
        rng = np.random.default_rng([seed, 2])
        wide = Configuration.uniform(4, lab.space.ranks[-1], lab.space.num_layers)
        near, anything = partial(lab.near_budget, rng), partial(lab.space.random, rng)

        def uniform() -> TrainingState:
            return lab.climb([wide], [study.steps], keep=[study.steps])[0].states[study.steps]

        made: dict[str, tuple[float, Callable[[], TrainingState]]] = {
            **{
                f"once, {many} full run{'s' * (many > 1)}": (
                    many, lambda many=many: lab.supernet(many * study.steps, near)
                )
                for many in study.supernets
            },
            "once any, 1 full run": (1, lambda: lab.supernet(study.steps, anything)),
            "uniform's adapters": (1, uniform),
        }  # fmt: skip
        for kind, (runs, make) in made.items():
            if self.late():
                return
            if kind in kept.values or (given.once and kind not in given.once):
                continue
            state = make()
            at = [study.steps] + [study.steps - study.share(n) for n in study.finishing if runs == 1]
            found = {text: dict[int, Figures]() for text in names}
            for begin in at:
                for first in range(0, len(names), study.together):
                    group = names[first : first + study.together]
                    members = [Configuration.from_text(text) for text in group]
                    if kind == "uniform's adapters":
                        states = [inherited(state, {}, lab.backbone, one, begin) for one in members]
                        states = [replace(one, optimizer={}) for one in states]
                    else:
                        states = [nested(state, lab.backbone, one, begin) for one in members]
                    for text, course in zip(group, lab.climb(members, [study.steps], states=states), strict=True):
                        found[text][study.steps - begin] = course.scores[study.steps]
            kept.add({kind: {"runs": runs, "scores": found}})
            self.say(f"seed {seed}, {kind}")

    def children(self, seed: int) -> None:
        """Children trained in full, and from what their parents had learnt."""
        lab, study, kept = self.lab, self.lab.study, self.kept("children", seed)
        pairs = self.kept("untrained", 0).values["children"]
        parent_of = {child: parent for parent, child in pairs}
        branches = [study.steps - study.share(n) for n in study.finishing]
        groups = list(kept.missing(list(parent_of), study.together))
        if not groups or self.late():
            return
        parents = list(dict.fromkeys(Configuration.from_text(parent) for parent, _ in pairs))
        rungs = sorted({*branches, study.steps})
        courses = dict(zip(parents, lab.climb(parents, rungs, keep=rungs), strict=True))
        for group in groups:
            if self.late():
                return
            members = [Configuration.from_text(text) for text in group]
            own = [courses[Configuration.from_text(parent_of[text])] for text in group]
            full = lab.climb(members, [*map(study.share, study.rungs), study.steps])
            cohort = lab.cohort(members)
            fresh = [cohort.state(k) for k in range(len(members))]
            rows: list[dict[str, Any]] = [
                {"parent": parent_of[text], "parent_scores": parent.scores, "losses": run.losses, "scores": run.scores,
                 "branched": {}, "finished": {}}
                for text, parent, run in zip(group, own, full, strict=True)
            ]  # fmt: skip
            for begin in (study.steps, *branches):
                for how, at in (("branched", begin), ("finished", study.steps)):
                    if how == "finished" and begin == study.steps:
                        continue
                    states = [
                        inherited(parent.states[at], first, lab.backbone, one, begin)
                        for parent, first, one in zip(own, fresh, members, strict=True)
                    ]
                    if how == "finished":
                        states = [replace(one, optimizer={}) for one in states]
                    for row, course in zip(rows, lab.climb(members, [study.steps], states=states), strict=True):
                        row[how][study.steps - begin] = course.scores[study.steps]
            kept.add(dict(zip(group, rows, strict=True)))
            self.say(f"seed {seed}, {len(kept.values)} children")


KINDS = ("runs", "annealed", "once", "children")


def measure(given: argparse.Namespace) -> None:
    """Measure what is missing."""
    began = time.monotonic()

    def late() -> bool:
        return given.minutes is not None and time.monotonic() - began > 60 * given.minutes

    for study in STUDIES:
        if study.name not in given.studies:
            continue
        session = Session(Lab(study, given), given.cache / study.name, late)
        session.untrained()
        for seed in study.seeds if given.seeds is None else given.seeds:
            for kind in given.kinds:
                with session.lab.seeded(seed):
                    getattr(session, kind)(seed)


# Judging


COLUMNS = (
    "model", "score", "of", "fidelity", "own_steps", "cost", "configurations", "seeds", "same_seed", "other_seeds",
    "low", "high", "regret", "spread",
)  # fmt: skip
DRAWS = 500
BySeed = Callable[[int], Array]
"""Values of a fidelity, (configurations,), measured with a seed; larger is better."""


@dataclass(frozen=True)
class Judge:
    """Compares fidelities with full runs: `full` is (seeds, configurations), `about` is common to all rows."""

    full: Array
    about: Mapping[str, Any]

    def row(self, name: str, cost: float, values: BySeed, own_steps: int = 0) -> Row:
        """Rank correlations and regret, means over the seeds."""
        seeds = range(self.about.get("measured", len(self.full)))
        found = np.array([values(seed) for seed in seeds])
        truths = np.array([self.truth(seed) for seed in seeds])
        picks = [(truth.max() - truth[value.argmax()]) for value, truth in zip(found, truths, strict=True)]
        draws = np.random.default_rng(0).integers(found.shape[1], size=(DRAWS, found.shape[1]))
        resampled = [self._mean(found[:, draw], truths[:, draw]) for draw in draws]
        low, high = np.nanquantile(resampled, (0.025, 0.975))
        return {
            **{key: self.about[key] for key in COLUMNS[:3]}, "fidelity": name,
            "own_steps": own_steps, "cost": cost, "configurations": found.shape[1],
            "seeds": len(found), "same_seed": self._mean(found, self.full[: len(found)]),
            "other_seeds": self._mean(found, truths),
            "low": float(low), "high": float(high), "regret": float(np.mean(picks)),
            "spread": float(truths.std(axis=1).mean()),
        }  # fmt: skip

    def truth(self, seed: int) -> Array:
        """Mean of the full runs over the other seeds; of one seed, that."""
        others = [k for k in range(len(self.full)) if k != seed] or [seed]
        return np.asarray(self.full[others].mean(axis=0))

    @staticmethod
    def _mean(values: Array, truths: Array) -> float:
        return float(np.nanmean([spearman(value, truth) for value, truth in zip(values, truths, strict=True)]))


def judged(study: Study, folder: Path, figure: str) -> list[Row]:
    """A row for each fidelity of a study, by a figure of the scores."""
    untrained = Kept(folder / "untrained-0.json").values
    if not untrained:
        return []
    kinds = {kind: [Kept(folder / f"{kind}-{seed}.json").values for seed in study.seeds] for kind in KINDS}
    about = {"model": study.name, "score": figure}
    rows = _of_candidates(study, figure, untrained, kinds, {**about, "of": "candidates"})
    return rows + _of_children(study, figure, kinds["children"], {**about, "of": "children"})


def _complete(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    """Seeds of which everything is there."""
    return next((k for k, own in enumerate(found) if any(name not in own for name in names)), len(found))


def _of(found: Sequence[Mapping[str, Any]], names: Sequence[str], *path: str) -> BySeed:
    """What lies at a path in what was measured of each name."""

    def values(seed: int) -> Array:
        rows: list[Any] = [found[seed][name] for name in names]
        for key in path:
            rows = [row[key] for row in rows]
        return np.array(rows, dtype=np.float64)

    return values


def _losses(runs: Sequence[Mapping[str, Any]], names: Sequence[str], first: int, last: int) -> BySeed:
    """Minus the mean loss of the steps from one to another."""
    return lambda seed: -np.array([statistics.fmean(runs[seed][name]["losses"][first:last]) for name in names])


def _of_candidates(
    study: Study, figure: str, untrained: Mapping[str, Any], kinds: Mapping[str, Any], about: Mapping[str, Any]
) -> list[Row]:
    names, runs, end = untrained["candidates"], kinds["runs"], study.steps
    seeds = _complete(runs, names)
    if not seeds:
        return []
    full = _of(runs, names, "scores", str(end), figure)
    judge = Judge(np.array([full(seed) for seed in range(seeds)]), about)
    rows = [judge.row("full run", 1.0, full, end)]
    same = [untrained["rows"]] * seeds
    for label, path in (
        ("untrained", ("untrained", figure)), ("divergence", ("divergence",)), ("autoquantize", ("autoquantize",)),
        ("mean rank", ("ranks",)), ("average bits", ("bits",)),
    ):  # fmt: skip
        rows.append(judge.row(label, 0.0, _of(same, names, *path)))
    for steps in map(study.share, study.rungs):
        rows += _at_rung(judge, study, runs, names, steps, figure)
    if _complete(kinds["annealed"], names) >= seeds:
        for steps in map(study.share, study.rungs):
            rows.append(judge.row("annealed", steps / end, _of(kinds["annealed"], names, str(steps), figure), steps))
    for kind in kinds["once"][0]:
        seen = min(seeds, _complete(kinds["once"], [kind]))
        trained = [own[kind]["scores"] for own in kinds["once"][:seen]]
        partly = Judge(judge.full, {**about, "measured": seen})
        for own in sorted({int(steps) for name in names for steps in trained[0][name]}):
            label = f"{kind}, then own steps" if own else kind
            cost = kinds["once"][0][kind]["runs"] / len(names) + own / end
            rows.append(partly.row(label, cost, _of(trained, names, str(own), figure), own))
    return rows


def _at_rung(
    judge: Judge, study: Study, runs: Sequence[Mapping[str, Any]], names: Sequence[str], steps: int, figure: str
) -> list[Row]:
    """A rung by score, by loss and by both, and what comes of the k best continued."""
    end = study.steps
    score, loss = _of(runs, names, "scores", str(steps), figure), _losses(runs, names, 0, steps)
    ways: dict[str, BySeed] = {
        "rung": score,
        "loss": loss,
        "loss, later half": _losses(runs, names, steps // 2, steps),
        "rung and loss": lambda seed: ranks(score(seed)) + ranks(loss(seed)),
    }
    rows = [judge.row(name, steps / end, values, steps) for name, values in ways.items()]
    if figure != "prob_per_token":
        other = _of(runs, names, "scores", str(steps), "prob_per_token")
        rows.append(judge.row("rung by prob_per_token", steps / end, other, steps))
    for k in (1, 3, 5):
        for name in ("rung", "loss"):

            def continued(seed: int, k: int = k, values: BySeed = ways[name]) -> Array:
                best, kept = ranks(values(seed)), np.argsort(-values(seed), kind="stable")[:k]
                best[kept] = len(best) + ranks(judge.full[seed][kept])
                return best

            cost = (len(names) * steps + k * (end - steps)) / (len(names) * end)
            rows.append(judge.row(f"{name}, then top {k}", cost, continued, steps))
    return rows


def _of_children(study: Study, figure: str, found: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[Row]:
    names, end = list(found[0]), study.steps
    seeds = _complete(found, names) if names else 0
    if not seeds:
        return []
    full = _of(found, names, "scores", str(end), figure)
    judge = Judge(np.array([full(seed) for seed in range(seeds)]), about)
    rows = [
        judge.row("full run", 1.0, full, end),
        judge.row("parent's score", 0.0, _of(found, names, "parent_scores", str(end), figure)),
    ]
    for steps in map(study.share, study.rungs):
        rows.append(judge.row("rung", steps / end, _of(found, names, "scores", str(steps), figure), steps))
        rows.append(judge.row("loss", steps / end, _losses(found, names, 0, steps), steps))
    for key, told in (("branched", "inherited, parent's way branched"), ("finished", "inherited, finished again")):
        for own in sorted(map(int, found[0][names[0]][key])):
            label = told if own else "inherited"
            rows.append(judge.row(label, own / end, _of(found, names, key, str(own), figure), own))
    return rows


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a table for each model, score and kind of configurations."""
    heads = ["fidelity", "own steps", "cost", "same seed", "other seeds", "interval", "regret"]
    groups: dict[tuple[Any, ...], list[list[str]]] = {}
    for row in rows:
        line = [
            row["fidelity"], str(row["own_steps"]), f"{row['cost']:.3f}", f"{row['same_seed']:.2f}",
            f"{row['other_seeds']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", f"{row['regret']:.3f}",
        ]  # fmt: skip
        key = tuple(row[name] for name in ("model", "of", "score", "configurations", "seeds", "spread"))
        groups.setdefault(key, []).append(line)
    return "\n\n".join(
        f"{model}, {count} {of}, {seeds} seeds, {score} (standard deviation {spread:.3f})\n\n{table(heads, lines)}"
        for (model, of, score, count, seeds, spread), lines in groups.items()
    )


def main() -> None:
    """Measure, or tell what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("--cache", type=Path, required=True, help="folder of what was measured")
    parser.add_argument("--studies", nargs="+", default=["embedded"], choices=[study.name for study in STUDIES])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--once", nargs="+", help="of the kind once, these alone, by the names in the table")
    parser.add_argument("--seeds", nargs="+", type=int, help="where not those of the study")
    parser.add_argument("--data", type=Path, help="folder with models/deep12 and datasets/trec/{train,test}.jsonl")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--all", action="store_true", help="print other scores too")
    parser.add_argument("--csv", type=Path, help="file for every figure")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if given.what == "measure":
        measure(given)
        return
    figures = {study.name: dict.fromkeys((study.figure, "prob_per_token", "log_likelihood")) for study in STUDIES}
    rows = [
        row
        for study in STUDIES
        for figure in figures[study.name]
        for row in judged(study, given.cache / study.name, figure)
    ]
    print(told([row for row in rows if given.all or row["score"] == next(iter(figures[row["model"]]))]))
    if given.csv is not None:
        with given.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(
                {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows
            )


if __name__ == "__main__":
    main()
