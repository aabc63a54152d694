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
from qratk.training.rungs import Rungs
from qratk.training.trainers import QuietTrainers, in_place

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule


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

    def tested(self, configuration: Configuration, steps: int) -> dict[str, float]:
        """Metrics on test data after `steps` optimiser steps."""
        self.train(configuration, steps)
        with in_place(self.module):
            metrics = self.trainers.scoring().test(self.module, datamodule=self.data, verbose=False)[0]
        return _unprefixed(metrics, "test")

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


class SideBySide:
    """Measures several candidates at once; the bank must be built."""

    def __init__(self, module: FineTuneModule, data: TaskData, trainers: QuietTrainers, rungs: Rungs) -> None:
        self._module, self._data, self._trainers, self._rungs = module, data, trainers, rungs
        self._tried_sharing = False

    def measured(self, configurations: Sequence[Configuration], steps: int) -> list[Trained | Failed]:
        """What came of each configuration after `steps` optimiser steps."""
        done, states = self._rungs.common(configurations, steps)
        cohort = Cohort.of(self._module.backbone, configurations, seed=self._module.options.seed)
        self._try_sharing(configurations[0])
        together = CohortModule(self._module, cohort, states)
        with cohort.installed(), in_place(together):
            train = done < steps and bool(cohort.parameters())
            if train:
                self._train(together, done, steps)
                states = together.training_states()
            self._trainers.scoring().validate(together, datamodule=self._data, verbose=False)
        found: list[Trained | Failed] = []
        for member, configuration in enumerate(configurations):
            if member in together.failures:
                found.append(Failed(f"NonFiniteLossError: {together.failures[member]}"))
                continue
            if train:
                self._rungs.save(configuration, steps, states[member])
            found.append(Trained.of(*together.scores[member]))
        return found

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
