"""Evaluation by real fine-tuning: one Lightning Trainer a rung, on the shared bank of quantised weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, Member, Request
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.estimators.base import ImportanceEstimator, estimate_together
from qratk.evaluators._outcomes import Measured, OutOfMemory, caught, free_memory
from qratk.evaluators.base import EvaluationContext, Evaluator, evaluators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.evaluators._finetuning import FineTuning
    from qratk.training.grouping import Grouping
    from qratk.training.measuring import Failed, Trained
    from qratk.training.module import FineTuneModule


@evaluators.register("finetune")
class FineTuneEvaluator(Evaluator):
    """Trains the adapters of a configuration for the asked steps and scores them on validation data.

    Every candidate sees the same batches in the same order, starts from the same nested adapter weights, and
    continues from rung to rung bit-identically. Scores are of the adapters as stored, in 16 bits.

    Candidates that continue from the same rung are trained side by side in one pass, `cohort` of them: faster where
    steps are short, and each is trained as it would be alone, but for the order of additions (1e-5 of a loss).

    Args:
        calibration_batches: training batches that importance is estimated on.
        calibration_batch_size: sequences in each of them.
        keep_optimizer: whether the optimiser's state is kept after the last rung too.
        cohort: candidates trained side by side; 1 is one after another, "auto" tries 1, 2, 4, ... for two steps each
            and takes what is fastest, within half of the memory that is free.
    """

    def __init__(
        self,
        calibration_batches: int = 8,
        calibration_batch_size: int = 8,
        keep_optimizer: bool = False,
        cohort: int | Literal["auto"] = "auto",
    ) -> None:
        if calibration_batches < 1 or calibration_batch_size < 1:
            raise ConfigurationError(
                "calibration_batches and calibration_batch_size must be at least 1, got "
                f"{calibration_batches} and {calibration_batch_size}"
            )
        if cohort != "auto" and (not isinstance(cohort, int) or cohort < 1):
            raise ConfigurationError(f"cohort must be 'auto' or at least 1, got {cohort!r}")
        self.cohort: int | Literal["auto"] = cohort
        self.calibration_batches = calibration_batches
        self.calibration_batch_size = calibration_batch_size
        self.keep_optimizer = keep_optimizer
        self._parts: FineTuning | None = None
        self._grouping: Grouping | None = None
        self._space: SearchSpace | None = None

    def open(self, context: EvaluationContext) -> None:
        """Load model and data. `context.trainer` makes a Trainer from keyword arguments; the default is Lightning's."""
        from qratk.evaluators._finetuning import FineTuning
        from qratk.training.grouping import Grouping

        parts = self._parts = FineTuning.of(context, keep_optimizer=self.keep_optimizer)
        self._grouping = Grouping(
            self.cohort,
            parts.limits,
            begins_at=parts.rungs.begins_at,
            fastest=self._fastest_cohort,
            decided=context.decided,
            recorded=context.recorded,
            say=context.say,
            trained=parts.rungs.trained,
            measured=context.measured,
        )

    @property
    def parts(self) -> FineTuning:
        """What it measures with; `open` comes first."""
        assert self._parts is not None, "open comes first"
        return self._parts

    @property
    def grouping(self) -> Grouping:
        """What is measured at once; `open` comes first."""
        assert self._grouping is not None, "open comes first"
        return self._grouping

    @property
    def space(self) -> SearchSpace:
        """The space that `memory_model` was asked for last, whose bank is built."""
        assert self._space is not None, "memory_model comes first"
        return self._space

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The backbone's layers."""
        return self.parts.module.backbone.shapes

    def check_shared(self, ladder: SharedLadder) -> None:
        """Options of the module that change neither bytes nor packed weights: `qratk.training.options.SHAREABLE`."""
        from qratk.training.options import check_shared

        check_shared(ladder)

    @property
    def replicates(self) -> bool:
        """A replicate has fresh seeds of the order of the training rows, of adapters and of dropout."""
        return True

    def training(self, configuration: Configuration) -> str:
        """Digest of the configuration that is trained for this one."""
        return self.parts.rungs.trained(configuration).digest

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """Exact bytes; the peaks are for the datamodule's batch size and length.

        Raises `ConfigurationError` for shared settings that the module cannot have.
        """
        self.parts.module.require_shared(space.shared)
        self._space = space
        return self.parts.footprints.model(space)

    def footprint(self, configuration: Configuration) -> Footprint:
        """Exact bytes of a configuration, on or off the ladders of the space."""
        return self.parts.footprints.of(configuration, self.space)

    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> NDArray[np.float64]:
        """Raw layer scores on training batches, before the full-precision weights are dropped."""
        module, batches = self._observed(space)
        return np.asarray(estimator.estimate(module, batches, lowest_bits=space.bits[0]), dtype=np.float64)

    def importances(self, asked: Sequence[ImportanceEstimator], space: SearchSpace) -> Sequence[NDArray[np.float64]]:
        """Raw layer scores of each estimator, in one pass over the batches for those that can share it."""
        module, batches = self._observed(space)
        found = estimate_together(asked, module, batches, lowest_bits=space.bits[0])
        return [np.asarray(scores, dtype=np.float64) for scores in found]

    def importance_by_rung(
        self, estimator: ImportanceEstimator, space: SearchSpace, knob: Knob
    ) -> NDArray[np.float64] | None:
        """What each rung means to each layer, (L, rungs), on the same batches; None where the estimator has no say."""
        if type(estimator).by_rung is ImportanceEstimator.by_rung:
            return None
        module, batches = self._observed(space)
        found = estimator.by_rung(module, batches, ladder=space.ladder(knob))
        return None if found is None else np.asarray(found, dtype=np.float64)

    def _observed(self, space: SearchSpace) -> tuple[FineTuneModule, list[dict[str, Tensor]]]:
        """The module at full precision without adapters, its bank built, and batches that importance is measured on."""
        module = self.parts.module
        self.parts.preparation.build(self.space)
        module.backbone.activate(Configuration.uniform(16, 0, space.num_layers), seed=module.options.seed)
        return module, self.parts.calibration_batches(self.calibration_batches, self.calibration_batch_size)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Requests of one replicate that continue from the same rung, in cohorts of nearly equal size."""
        return self.grouping.groups(requests)

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Evaluations of a group, which is trained side by side as far as memory allows; one training, once."""
        if len({self.parts.rungs.trained(request.configuration) for request in group}) == 1:
            return [evaluation for each in group for evaluation in self._evaluate([each])]
        return self._evaluate(group)

    def _evaluate(self, group: Sequence[Request]) -> list[Evaluation]:
        began = time.monotonic()
        with self.parts.scored_at(group[0].steps):
            outcomes = caught(lambda: self._outcomes(group))
        if isinstance(outcomes, OutOfMemory):
            free_memory(self.parts.module)
            if len(group) > 1:
                half = self.grouping.halved(len(group))
                return self._evaluate(group[:half]) + self._evaluate(group[half:])
        found = [outcomes] if isinstance(outcomes, OutOfMemory) else outcomes
        seconds = (time.monotonic() - began) / len(group)
        return [
            self._measured(request, seconds).evaluation(outcome) for request, outcome in zip(group, found, strict=True)
        ]

    def _outcomes(self, group: Sequence[Request]) -> Sequence[Trained | Failed]:
        self.parts.preparation.finish(self.space)
        configurations, steps = [request.configuration for request in group], group[0].steps
        with self.parts.replicated(group[0].configuration, group[0].replicate) as parts:
            if len(group) > 1:
                return parts.side_by_side.measured(configurations, steps)
            return [parts.alone.measured(configurations[0], steps)]

    def _measured(self, request: Request, seconds: float) -> Measured:
        configuration, steps = request.configuration, request.steps
        return Measured(
            configuration,
            steps,
            self.footprint(configuration),
            seconds,
            self.parts.checkpoint(configuration, steps, request.replicate),
            self.parts.trained_as(configuration),
            request.replicate,
        )

    def _fastest_cohort(self, configurations: Sequence[Configuration]) -> int:
        self.parts.preparation.finish(self.space)
        adapted = [configuration for configuration in configurations if any(configuration.ranks)]
        if not adapted:
            return 1
        footprints = [self.footprint(configuration) for configuration in adapted]
        return self.parts.fastest_cohort(adapted, footprints, asked=len(configurations))

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """Metrics on test data of the configuration as it was at the evaluation's steps."""
        self.parts.preparation.finish(self.space)
        if evaluation.merged:
            self._put_merged(evaluation)
            return self.parts.alone.tested()
        with self.parts.replicated(evaluation.configuration, evaluation.replicate) as parts:
            parts.alone.train(evaluation.configuration, evaluation.steps)
            return parts.alone.tested()

    @property
    def merges(self) -> bool:
        """Whether the adapters can be averaged."""
        return self.parts.module.backbone.adapters.method.merges

    def merged(self, evaluation: Evaluation, members: Sequence[Member]) -> Evaluation:
        """The score of the mean of what the members' adapters add to each projection, cut to the configured ranks.

        Weights of several fine-tunings of one model averaged are often better than each of them (model soups,
        Wortsman et al. 2022, arXiv:2203.05482).
        """
        self.parts.preparation.finish(self.space)
        began = time.monotonic()

        def outcomes() -> Sequence[Trained | Failed]:
            from qratk.training.measuring import Failed

            states = [self._state(member, evaluation.steps) for member in members]
            kept = [state for state in states if state is not None]
            if len(kept) < len(states):
                return [Failed("the checkpoint of a training was deleted")]
            self._put_mean(evaluation.configuration, members, kept)
            return [self.parts.alone.scored()]

        scored = caught(outcomes)
        if isinstance(scored, OutOfMemory):
            free_memory(self.parts.module)
        found = scored if isinstance(scored, OutOfMemory) else scored[0]
        measured = self._measured(Request(Candidate(evaluation.configuration, "merged"), evaluation.steps), 0.0)
        measured = replace(measured, seconds=time.monotonic() - began, replicate=evaluation.replicate)
        return replace(measured.evaluation(found), merged=tuple(members), checkpoint=None)

    def _put_mean(
        self, configuration: Configuration, members: Sequence[Member], states: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Leave the module on a configuration, with the mean of the members' masters for its adapters."""
        from qratk.adapters.matrices.merging import mean_of_pairs

        backbone = self.parts.module.backbone
        trained = backbone.adapters.method.trained(configuration)
        ranks = {
            name: choice.rank
            for layer, choice in zip(backbone.layers, trained.layers, strict=True)
            for name, _ in layer.modules
        }
        options = (backbone.adapter_options(member.configuration) for member in members)
        mean = mean_of_pairs(list(zip(states, options, strict=True)), ranks, backbone.adapter_options(configuration))
        self.parts.alone.put(configuration, mean)
        self.parts.alone.observe()

    def _put_merged(self, evaluation: Evaluation) -> None:
        """Leave the module as a mean was scored; a training whose checkpoint is gone is made again."""
        states = [self._masters(member, evaluation.steps) for member in evaluation.merged]
        self._put_mean(evaluation.configuration, evaluation.merged, states)

    def _masters(self, member: Member, steps: int) -> Mapping[str, Tensor]:
        """The masters of a training after so many steps."""
        state = self._state(member, steps)
        if state is not None:
            return state
        with self.parts.replicated(member.configuration, member.replicate) as parts:
            parts.alone.train(member.configuration, steps)
            return parts.module.backbone.adapter_state()

    def _state(self, member: Member, steps: int) -> Mapping[str, Tensor] | None:
        """The masters of a training after so many steps; None where they were not kept, or are damaged."""
        done, state = self.parts.rungs.of_replicate(member.replicate).latest(member.configuration, steps)
        return state.adapter if state is not None and done == steps else None

    def save_adapter(self, evaluation: Evaluation, directory: Path) -> bool:
        """Write the adapter, of one training or the mean of several, in the stored type."""
        if not any(evaluation.configuration.ranks):
            return False
        self.parts.preparation.finish(self.space)
        with self.parts.replicated(evaluation.configuration, evaluation.replicate) as parts:
            if evaluation.merged:
                self._put_merged(evaluation)
            else:
                parts.alone.train(evaluation.configuration, evaluation.steps)
            parts.module.save_adapter(directory)
        return True

    def prepare_test(self) -> bool:
        """Read and encode the test split; False when the data have none."""
        self.parts.data.setup("test")
        return self.parts.data.has("test")

    def discard(self, evaluation: Evaluation) -> None:
        """Delete a checkpoint; one that is gone already is no error."""
        rungs = self.parts.rungs.of_replicate(evaluation.replicate)
        rungs.discard(evaluation.configuration, evaluation.steps)

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """Those of the validation items."""
        return self.parts.data.item_weights("validation")

    def fingerprint(self) -> dict[str, str]:
        """Digests of the model with its quantisers, and of the data."""
        return {"model": self.parts.module.backbone.digest(), "data": self.parts.data.fingerprint()}
