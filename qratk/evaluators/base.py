"""The contract of evaluators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, FidelityLadder, Member, Request
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.registry import Registry

if TYPE_CHECKING:
    from lightning import Trainer

    from qratk.data.base import TaskData
    from qratk.estimators.base import ImportanceEstimator
    from qratk.training.module import FineTuneModule


def _just_decide(key: str, decide: Callable[[], Any]) -> Any:
    return decide()


def _nothing(key: str) -> Any:
    return None


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluator may use: where to write, the rungs, the seed, and the Lightning objects of the command.

    `trainer` makes a Trainer from keyword arguments. `reference_bits` and `reference_ranks` are those of uniform
    references that will be measured after the search; `say` tells a person something, such as a fallback. `decided`
    returns what was decided under a key, as plain data: in a new run directory what its second argument returns, in a
    resumed one what was recorded. `recorded` returns what was decided under a key, or None. `workers` is how many
    groups of requests are measured at the same time. `measured` returns what the journal holds by now.
    """

    run_dir: Path
    ladder: FidelityLadder
    seed: int
    module: FineTuneModule | None = None
    datamodule: TaskData | None = None
    trainer: Callable[..., Trainer] | None = None
    reference_bits: tuple[int, ...] = ()
    say: Callable[[str], None] = print
    decided: Callable[[str, Callable[[], Any]], Any] = _just_decide
    reference_ranks: tuple[int, ...] = ()
    recorded: Callable[[str], Any] = _nothing
    workers: int = 1
    measured: Callable[[], Iterable[Evaluation]] = tuple


class Evaluator(ABC):
    """Fine-tunes and scores configurations.

    The loop calls `open`, `memory_model` and `importance`, then `groups`, and has an executor call `evaluate` for each.
    """

    @abstractmethod
    def open(self, context: EvaluationContext) -> None:
        """Load what is needed."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[LayerShape, ...]:
        """The layers, in model order."""

    def check_shared(self, ladder: SharedLadder) -> None:
        """Raise `ConfigurationError` for a setting, or a value of one, that configurations cannot be scored with.

        Called without a model, before anything else. By default bits and ranks are all that an evaluator knows.
        """
        name = getattr(self, "component_name", type(self).__name__)
        raise ConfigurationError(
            f"cannot be a shared setting with the evaluator {name!r}, which scores bits and ranks alone; leave it out, "
            "or use the evaluator 'finetune'"
        )

    @property
    def replicates(self) -> bool:
        """Whether the `replicate` of a request is honoured: fresh seeds for each, of whatever is drawn in a training.

        By default not: a search that confirms its answer with fresh seeds is then refused before it begins.
        """
        return False

    @property
    def proxy(self) -> str:
        """What the lowest rung scores by in place of a training, in words for figures; "" where it trains.

        Where there is such a proxy, shared settings decide nothing at that rung: the search asks there for
        configurations without them, and tunes those that go up.
        """
        return ""

    @property
    def shared_runs(self) -> int:
        """Full runs (T_S steps) that are trained for all candidates together, beside those of each; 0 by default."""
        return 0

    def training(self, configuration: Configuration) -> str:
        """Digest of what is trained for a configuration, as `Evaluation.training` will say; after `open`."""
        return configuration.digest

    @abstractmethod
    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """Exact bytes over a space of these layers; called before anything is measured."""

    def footprint(self, configuration: Configuration) -> Footprint:
        """Exact bytes of a configuration, on or off the ladders of the search."""
        names = tuple(shape.name for shape in self.shapes)
        space = SearchSpace(tuple(sorted(set(configuration.bits))), tuple(sorted(set(configuration.ranks))), names)
        return self.memory_model(space).footprint(configuration)

    @abstractmethod
    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> NDArray[np.float64]:
        """Raw layer scores, (L,)."""

    def importances(self, asked: Sequence[ImportanceEstimator], space: SearchSpace) -> Sequence[NDArray[np.float64]]:
        """Raw layer scores of each estimator, as of `importance`, for evaluators that measure them at once."""
        return [self.importance(estimator, space) for estimator in asked]

    def importance_by_rung(
        self, estimator: ImportanceEstimator, space: SearchSpace, knob: Knob
    ) -> NDArray[np.float64] | None:
        """What each rung of a knob's ladder costs or brings each layer, (L, rungs); None where a score tells all."""
        return None

    @abstractmethod
    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Evaluations in the order of the requests of one group, measured at once and not cut any further.

        A group has one number of steps. It is one of those that `groups` makes, or what is left of one, or a single
        request. A candidate measured at a lower rung continues from its checkpoint, bit-identical to not having
        stopped. An evaluation has the `replicate` of its request. A failure is returned with its reason: as "failed"
        where it is the candidate's (loss not finite), as "lost" where it is the machine's (out of memory).
        """

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """The requests, in order, in groups that `evaluate` measures at once and that are recorded at once.

        Those that have a training in common may join the first of them, and those that the context says are `measured`
        may be left out. The next group is cut when it is asked for, once those before are measured. Without the first
        group, the others must come out the same: a resumed search asks for the rest. By default each request stands
        alone.
        """
        for request in requests:
            yield (request,)

    @abstractmethod
    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """Scores on test data of a measured evaluation, from its checkpoint; called only after the search."""

    @property
    def merges(self) -> bool:
        """Whether `merged` can be asked for; after `open`."""
        return False

    def merged(self, evaluation: Evaluation, members: Sequence[Member]) -> Evaluation:
        """What was measured of a configuration, measured again with the mean of these trainings as its adapters.

        The evaluation's own training is one of them, and all have as many steps and their checkpoints; nothing is
        trained. A failure is returned with its reason, as of `evaluate`.
        """
        raise NotImplementedError("this evaluator says that it does not merge")

    def save_adapter(self, evaluation: Evaluation, directory: Path) -> bool:
        """Write the adapter that an evaluation scored as a PEFT folder; False, and nothing, where there is none."""
        return False

    def prepare_test(self) -> bool:
        """Read the test data, so that errors come before the first step; False when there are none. After `open`."""
        return True

    @abstractmethod
    def discard(self, evaluation: Evaluation) -> None:
        """Delete the checkpoint of an evaluation that will not be continued or reported."""

    @property
    @abstractmethod
    def item_weights(self) -> tuple[float, ...] | None:
        """Weight of each validation item in the score; None when all are equal."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Digests of whatever decides the scores (weights, data, options): a run is resumed only on equal ones."""


evaluators: Registry[Evaluator] = Registry("evaluators", "Evaluator")
