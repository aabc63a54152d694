"""An Optuna study in memory, built from a history; the only module that imports Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from qratk import KNOBS, Configuration, ConfigurationError, History, Problem
from qratk_optuna import standings

if TYPE_CHECKING:
    from qratk_optuna import OptunaSearch

CLASSES = {
    "tpe": "TPESampler",
    "cmaes": "CmaEsSampler",
    "random": "RandomSampler",
    "nsga2": "NSGAIISampler",
    "gp": "GPSampler",
}
# Attributes that CMA-ES and NSGA-II need to find again which of their generations a trial belongs to.
NOTED = (":generation", "x_for_tell")
OPTIMISER = ":optimizer:"  # CMA-ES keeps its optimiser, as text, in attributes with this in their names


def make_sampler(name: str, options: Mapping[str, Any], *, offspring: int, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler; raises `ConfigurationError` when it is unknown or does not take the options."""
    if name not in CLASSES:
        raise ConfigurationError(f"optuna: the sampler must be one of {sorted(CLASSES)}, got {name!r}")
    defaults: dict[str, Any] = {}
    if name == "tpe":
        defaults = {"multivariate": False}  # of two knobs a layer, a joint density learns less in a few hundred trials
    elif name == "cmaes":
        defaults = {"popsize": max(4, offspring), "warn_independent_sampling": False, "n_startup_trials": 0}
    elif name == "gp":
        defaults = {"warn_independent_sampling": False}
    elif name == "nsga2":
        defaults = {"population_size": max(2, offspring)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            sampler: optuna.samplers.BaseSampler = getattr(optuna.samplers, CLASSES[name])(
                **{**defaults, **options}, seed=seed
            )
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"optuna: {CLASSES[name]} does not take sampler_options {dict(options)}: {error}"
            ) from error
    return sampler


class Board:
    """A study with a trial for each configuration of the history, and the suggestions of one generation.

    Args:
        searcher: its options.
        problem: the problem.
        history: all that was measured.
        notes: what `notes` held after earlier generations.
        seed: the sampler's seed.
    """

    def __init__(
        self,
        searcher: OptunaSearch,
        problem: Problem,
        history: History,
        notes: Mapping[str, Mapping[str, Any]],
        *,
        seed: int,
    ) -> None:
        self.searcher = searcher
        self.problem = problem
        self.history = history
        self.notes: dict[str, dict[str, Any]] = {text: dict(held) for text, held in notes.items()}
        self.seed = seed
        self._places: dict[str, tuple[int, int]] = {}
        self._shared_places: dict[str, int] = {}
        self._distributions = self._all_distributions()
        self._last: dict[str, Any] = {}
        self._quiet = ExitStack()

    def __enter__(self) -> Board:
        """The study, ready to be asked; Optuna says nothing until it is left."""
        self._quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._quiet.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        both = self.searcher.two_objectives
        self._study = optuna.create_study(
            sampler=self._sampler(), directions=["maximize", "minimize"] if both else ["maximize"]
        )
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let Optuna speak again."""
        self._quiet.close()

    def suggest(self) -> Configuration:
        """What the sampler draws next, feasible or not."""
        trial = self._asked()
        self._last = dict(trial.system_attrs)
        return self._configuration(trial.params)

    def run(self, configuration: Configuration) -> None:
        """Note that a configuration is being measured on account of the last suggestion."""
        noted = {key: value for key, value in self._last.items() if key.endswith(NOTED)}
        if noted:
            self.notes[str(configuration)] = noted
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=self._parameters(configuration),
                distributions=self._distributions,
                system_attrs=noted,
            )
        )

    def _sampler(self) -> optuna.samplers.BaseSampler:
        options, offspring = self.searcher.sampler_options, self.searcher.offspring
        # The cmaes library takes two dimensions at least.
        name = "random" if self.searcher.sampler == "cmaes" and len(self._distributions) < 2 else self.searcher.sampler
        return make_sampler(name, options if name == self.searcher.sampler else {}, offspring=offspring, seed=self.seed)

    def _all_distributions(self) -> dict[str, BaseDistribution]:
        """A distribution for each knob of each layer that leaves a choice, by name."""
        found: dict[str, BaseDistribution] = {}
        for layer in range(self.problem.num_layers):
            for column, knob in enumerate(KNOBS):
                rungs = len(self.problem.space.ladder(knob))
                if rungs > 1:
                    ordinal = self.searcher.encoding == "ordinal"
                    name = f"{knob}.{layer:04d}"
                    self._places[name] = (layer, column)
                    found[name] = (
                        IntDistribution(0, rungs - 1) if ordinal else CategoricalDistribution(tuple(range(rungs)))
                    )
        for place, ladder in enumerate(self.problem.space.shared):
            rungs = len(ladder.values)
            if rungs > 1:
                self._shared_places[f"shared.{ladder.name}"] = place
                # CMA-ES knows no categories: to it, names are in the order given.
                ordinal = ladder.ordinal or self.searcher.sampler == "cmaes"
                found[f"shared.{ladder.name}"] = (
                    IntDistribution(0, rungs - 1) if ordinal else CategoricalDistribution(tuple(range(rungs)))
                )
        return found

    def _configuration(self, parameters: Mapping[str, int]) -> Configuration:
        indices = np.zeros((self.problem.num_layers, len(KNOBS)), dtype=np.int64)
        shared = np.zeros(len(self.problem.space.shared), dtype=np.int64)
        for name, index in parameters.items():
            if name in self._shared_places:
                shared[self._shared_places[name]] = index
            else:
                indices[self._places[name]] = index
        return self.problem.space.from_indices(indices, self.problem.space.shared_at(shared))

    def _parameters(self, configuration: Configuration) -> dict[str, int]:
        indices = self.problem.space.indices(configuration)
        shared = self.problem.space.shared_indices(configuration)
        return {
            name: int(shared[self._shared_places[name]] if name in self._shared_places else indices[self._places[name]])
            for name in self._distributions
        }

    def _fill(self) -> None:
        """A finished trial for each configuration measured; CMA-ES is led through its generations one by one."""
        values = standings(self.problem, self.history)
        generations: dict[int, list[Configuration]] = {}
        for configuration in values:
            noted = self.notes.get(str(configuration), {})
            generations.setdefault(int(noted.get("cma:generation", -1)), []).append(configuration)
        for number in sorted(generations):
            carried = self._optimiser() if number > 0 else {}
            for configuration in generations[number]:
                self._add(configuration, values[configuration], carried)

    def _optimiser(self) -> dict[str, Any]:
        """What CMA-ES notes once it has learnt from the trials added so far: its optimiser, in memory only."""
        return {key: value for key, value in self._asked().system_attrs.items() if OPTIMISER in key}

    def _asked(self) -> FrozenTrial:
        """A trial that the sampler suggested, closed as failed: `run` puts what comes of it in its place."""
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return self._study.get_trials(deepcopy=False)[trial.number]

    def _add(self, configuration: Configuration, value: float, carried: Mapping[str, Any]) -> None:
        size = self.problem.bytes(configuration) / self.problem.budget.limit_bytes
        self._study.add_trial(
            create_trial(
                values=[value, size] if self.searcher.two_objectives else [value],
                params=self._parameters(configuration),
                distributions=self._distributions,
                system_attrs={**self.notes.get(str(configuration), {}), **carried},
            )
        )
