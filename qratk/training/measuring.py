"""Trains candidates to a rung and scores them there: one alone, or several side by side in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from qratk.core.configuration import Configuration
from qratk.training.cohort import Cohort
from qratk.training.cohort_module import CohortModule
from qratk.training.continuation import Continuation
from qratk.training.observing import observe
from qratk.training.rungs import Rungs
from qratk.training.trainers import QuietTrainers, in_place

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule
    from qratk.training.state import TrainingState


@dataclass(frozen=True)
class Trained:
    """What came of a training: the validation score, the outcome of each item, and all figures by name."""

    score: float
    outcomes: tuple[float, ...]
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: Mapping[str, float], outcomes: tuple[float, ...]) -> Trained:
        """What metrics of validation data say, the score among them; figures that are not finite are left out."""
        figures = {name: float(value) for name, value in metrics.items() if name != "score" and isfinite(value)}
        return cls(float(metrics["score"]), outcomes, figures)


@dataclass(frozen=True)
class Failed:
    """Why a candidate has no score: the reason is its own, such as a loss that is not finite."""

    reason: str


@dataclass(frozen=True)
class Alone:
    """Measures one candidate at a time, in the module itself; the bank must be built."""

    module: FineTuneModule
    data: TaskData
    trainers: QuietTrainers
    rungs: Rungs

    def measured(self, configuration: Configuration, steps: int) -> Trained:
        """Score after `steps` optimiser steps; raises `NonFiniteLossError`."""
        self.train(configuration, steps)
        return self.scored()

    def scored(self) -> Trained:
        """Score of the module as it is."""
        with in_place(self.module):
            metrics = self.trainers.scoring().validate(self.module, datamodule=self.data, verbose=False)[0]
        return Trained.of(_unprefixed(metrics, "validation"), self.module.last_outcomes)

    def tested(self) -> dict[str, float]:
        """Metrics on test data of the module as it is."""
        with in_place(self.module):
            metrics = self.trainers.scoring().test(self.module, datamodule=self.data, verbose=False)[0]
        return _unprefixed(metrics, "test")

    def tested_with(self, configuration: Configuration, adapter: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics on test data of a configuration with these masters, named and shaped as it has them."""
        self.put(configuration, adapter)
        return self.tested()

    def put(self, configuration: Configuration, adapter: Mapping[str, Tensor]) -> None:
        """Leave the module on a configuration with these masters."""
        self.module.activate(configuration)
        self.module.backbone.load_adapter_state(adapter)

    def observe(self) -> None:
        """Have the adapters, as they are, take from training batches what decides how they are stored."""
        backbone = self.module.backbone
        count = backbone.adapters.method.observed_batches
        observe(backbone.adapters, backbone.model, self.data, count, device=backbone.model.device)

    def train(self, configuration: Configuration, steps: int) -> None:
        """Leave the module as it is after `steps` optimiser steps on a configuration, and that in a checkpoint."""
        module = self.module
        module.activate(configuration)
        done, state = self.rungs.latest(configuration, steps)
        if state is not None:
            module.backbone.load_adapter_state(state.adapter)
        if done == steps or not any(configuration.ranks):
            return
        trainer = self.trainers.training(steps - done)
        module.continuation = Continuation(state)
        self.data.start_batch = done * trainer.accumulate_grad_batches
        with in_place(module):
            trainer.fit(module, datamodule=self.data)
        self.rungs.save(configuration, steps, module.training_state())
        module.continuation = Continuation()


Scores = tuple[Mapping[str, float], tuple[float, ...]]
"""Metrics of validation data by name, and the outcome of each item."""


class SideBySide:
    """Measures several candidates at once; the bank must be built."""

    def __init__(self, module: FineTuneModule, data: TaskData, trainers: QuietTrainers, rungs: Rungs) -> None:
        self._module, self._data, self._trainers, self._rungs = module, data, trainers, rungs
        self._tried_sharing = False

    def measured(self, configurations: Sequence[Configuration], steps: int) -> list[Trained | Failed]:
        """What came of each configuration after `steps` optimiser steps; what is trained alike is trained once."""
        trainings = [self._rungs.trained(configuration) for configuration in configurations]
        apart = list(dict.fromkeys(trainings))
        members = [configurations[trainings.index(training)] for training in apart]
        done, states = self._rungs.common(members, steps)
        cohort = Cohort.of(self._module.backbone, members, seed=self._module.options.training_seed)
        self._try_sharing(configurations[0])
        together = CohortModule(self._module, cohort, states)
        with cohort.installed(), in_place(together):
            train = done < steps and bool(cohort.parameters())
            if train:
                self._train(together, done, steps)
                states = together.training_states()
            scores = self._scores(together) if len(members) == len(configurations) else ()
        for member, configuration in enumerate(members):
            if train and member not in together.failures:
                self._rungs.save(configuration, steps, states[member])
        places = [apart.index(training) for training in trainings]
        if not scores:
            own = [states[place] for place in places] if states else []
            scores = self._scores_of(configurations, own, size=len(members))
        return [
            Failed(f"NonFiniteLossError: {together.failures[place]}")
            if place in together.failures
            else Trained.of(*score)
            for place, score in zip(places, scores, strict=True)
        ]

    def scored(
        self, configurations: Sequence[Configuration], adapters: Sequence[Mapping[str, Tensor]]
    ) -> list[Trained | Failed]:
        """Scores of configurations with these masters, named and shaped as each of them has them; nothing is kept."""
        cohort = Cohort.of(self._module.backbone, configurations, seed=self._module.options.training_seed)
        for member, adapter in enumerate(adapters):
            cohort.load_state(member, adapter)
        self._try_sharing(configurations[0])
        together = CohortModule(self._module, cohort)
        with cohort.installed(), in_place(together):
            return [Trained.of(*score) for score in self._scores(together)]

    def _scores(self, together: CohortModule) -> tuple[Scores, ...]:
        self._trainers.scoring().validate(together, datamodule=self._data, verbose=False)
        return together.scores

    def _scores_of(
        self, configurations: Sequence[Configuration], states: Sequence[TrainingState], *, size: int
    ) -> tuple[Scores, ...]:
        """Scores of configurations of which several share a state, so many side by side."""
        scores: tuple[Scores, ...] = ()
        for start in range(0, len(configurations), size):
            part = slice(start, start + size)
            cohort = Cohort.of(self._module.backbone, configurations[part], seed=self._module.options.training_seed)
            together = CohortModule(self._module, cohort, states[part])
            with cohort.installed(), in_place(together):
                scores += self._scores(together)
        return scores

    def _train(self, together: CohortModule, done: int, steps: int) -> None:
        trainer = self._trainers.training(steps - done)
        self._data.start_batch = done * trainer.accumulate_grad_batches
        together.train()
        trainer.fit(together, datamodule=self._data)

    def _try_sharing(self, configuration: Configuration) -> None:
        # The module tries its model once, when it is first asked, and that must not be while a cohort is in it.
        if not self._tried_sharing and self._data.shares_prompts("validation"):
            self._module.activate(configuration)
            _ = self._module.shared_length
        self._tried_sharing = True


def _unprefixed(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    return {name.removeprefix(f"{split}/"): float(value) for name, value in metrics.items()}
