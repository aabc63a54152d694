"""Evaluation whose lowest rung scores every configuration with adapters that were trained once, for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import MemoryModel
from qratk.core.space import SearchSpace
from qratk.evaluators._outcomes import Measured
from qratk.evaluators.base import EvaluationContext, evaluators
from qratk.evaluators.finetune import FineTuneEvaluator

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.adapters.matrices.directions import Directions
    from qratk.evaluators._finetuning import FineTuning
    from qratk.training.measuring import Failed, Trained

_A, _B = ".lora_A.weight", ".lora_B.weight"


@evaluators.register("shared_adapters")
class SharedAdaptersEvaluator(FineTuneEvaluator):
    """Scores quantised weights with shared adapters at the lowest rung, and fine-tunes from step 0 at the higher ones.

    One uniform configuration is trained in full. At the lowest rung a candidate has its bits and, in each projection,
    those adapters cut to its rank by singular values; it is scored on validation data as after a training of its own.
    That takes no optimiser step of a candidate, whatever number the rung has, and leaves no checkpoint: the cost is one
    full run, which effort counts, and a scoring for each. Weight sharing as in one-shot search of architectures (Bender
    et al. 2018, "Understanding and Simplifying One-Shot Architecture Search"; Cai et al. 2020, arXiv:1908.09791), but
    with one plain training: training random configurations by turns ranked no better (docs/fidelities.md).

    Args:
        bits: of the uniform configuration, a rung of the search's; null is the middle one, the upper of two.
        rank: of it; null is the highest of the search's. Where a candidate has a higher one, the rest stays without
            effect.
        calibration_batches, calibration_batch_size, keep_optimizer, cohort: as for `finetune`.
    """

    def __init__(
        self,
        bits: int | None = None,
        rank: int | None = None,
        calibration_batches: int = 8,
        calibration_batch_size: int = 8,
        keep_optimizer: bool = False,
        cohort: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(calibration_batches, calibration_batch_size, keep_optimizer, cohort)
        if rank is not None and rank < 1:
            raise ConfigurationError(f"rank must be at least 1, or null for the highest of the search, got {rank}")
        self.bits, self.rank = bits, rank
        self._trained: dict[int, Mapping[str, Directions]] = {}  # by replicate

    def open(self, context: EvaluationContext) -> None:
        """Load model and data.

        Raises `ConfigurationError` for a ladder of one rung, where no candidate would be trained, and for adapters that
        are no plain pair of matrices, or are cut anyway.
        """
        if len(context.ladder.steps) < 2:
            raise ConfigurationError(
                "the evaluator 'shared_adapters' trains no candidate at the lowest rung, and the steps "
                f"{list(context.ladder.steps)} have no other; put a rung before them, as in [1, 900]"
            )
        super().open(context)
        self._trained = {}
        method = self.parts.module.backbone.adapters.method
        if method.shares_trainings or method.refusal("side by side"):
            raise ConfigurationError(
                f"the evaluator 'shared_adapters' cuts plain LoRA, and the adapters are {method.component_name!r}; "
                "give adapter='lora', or the evaluator 'finetune'"
            )

    @property
    def proxy(self) -> str:
        """No candidate is trained at the lowest rung."""
        return "score with shared adapters"

    @property
    def shared_runs(self) -> int:
        """The one training."""
        return 1

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """As for fine-tuning; raises `ConfigurationError` where the bits to train at are off the ladder, too."""
        memory = super().memory_model(space)
        _ = self.uniform
        return memory

    @property
    def uniform(self) -> Configuration:
        """The configuration that is trained for all; raises `ConfigurationError` where its bits are off the ladder."""
        space = self.space
        bits = space.bits[len(space.bits) // 2] if self.bits is None else self.bits
        if bits not in space.bits:
            raise ConfigurationError(f"search.evaluator.bits must be one of {list(space.bits)}, got {bits}")
        rank = space.ranks[-1] if self.rank is None else self.rank
        return Configuration.uniform(bits, rank, space.num_layers)

    @contextmanager
    def _adapted(
        self, replicate: int, configurations: Sequence[Configuration]
    ) -> Iterator[tuple[FineTuning, list[dict[str, Tensor]]]]:
        """Context with the parts of a replicate and the shared adapters as each configuration has them."""
        self.parts.preparation.finish(self.space)
        with self.parts.replicated(self.uniform, replicate) as parts:
            if replicate not in self._trained:
                self._trained[replicate] = self._train(parts)
            yield parts, [self._cut(self._trained[replicate], configuration) for configuration in configurations]

    def _train(self, parts: FineTuning) -> Mapping[str, Directions]:
        """Singular directions of the uniform configuration's adapters, by projection."""
        from qratk.adapters.matrices.directions import directions
        from qratk.training.failure import NonFiniteLossError

        uniform, steps, backbone = self.uniform, parts.context.ladder.highest, parts.module.backbone
        parts.context.say(f"{uniform} is trained for {steps} steps, for all candidates together")
        try:
            parts.alone.train(uniform, steps)
        except NonFiniteLossError as error:
            raise ConfigurationError(
                f"the training of {uniform}, whose adapters all candidates share, failed: {error}; give a lower "
                "learning rate, or use the evaluator 'finetune'"
            ) from error
        state = backbone.adapter_state()
        return {name: directions(state[name + _A], state[name + _B]) for name in backbone.banks if name + _A in state}

    def _cut(self, trained: Mapping[str, Directions], configuration: Configuration) -> dict[str, Tensor]:
        """Masters of a configuration: the weightiest directions, and zeros where it has more rank than there are."""
        from torch.nn.functional import pad

        backbone, uniform = self.parts.module.backbone, self.uniform
        masters: dict[str, Tensor] = {}
        scaling = backbone.adapter_options(uniform).scaling(uniform.ranks[0]) if trained else 1.0
        options = backbone.adapter_options(configuration)
        for layer, choice in zip(backbone.layers, configuration.layers, strict=True):
            for name, _ in layer.modules if choice.rank else ():
                a, b = trained[name].first(choice.rank)
                missing = choice.rank - len(a)
                masters[name + _A] = pad(a, (0, 0, 0, missing))
                masters[name + _B] = pad(b, (0, missing)) * (scaling / options.scaling(choice.rank))
        return masters

    def _is_shared(self, steps: int) -> bool:
        return steps == self.parts.context.ladder.lowest

    def _outcomes(self, group: Sequence[Request]) -> Sequence[Trained | Failed]:
        if not self._is_shared(group[0].steps):
            return super()._outcomes(group)
        configurations = [request.configuration for request in group]
        with self._adapted(group[0].replicate, configurations) as (parts, adapters):
            return parts.side_by_side.scored(configurations, adapters)

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """As for fine-tuning; of an evaluation at the lowest rung, with the shared adapters."""
        if not self._is_shared(evaluation.steps):
            return super().test(evaluation)
        with self._adapted(evaluation.replicate, [evaluation.configuration]) as (parts, (adapter,)):
            return parts.alone.tested_with(evaluation.configuration, adapter)

    def discard(self, evaluation: Evaluation) -> None:
        """As for fine-tuning; at the lowest rung there is nothing to delete."""
        if not self._is_shared(evaluation.steps):
            super().discard(evaluation)

    def _measured(self, request: Request, seconds: float) -> Measured:
        measured = super()._measured(request, seconds)
        return replace(measured, checkpoint=None) if self._is_shared(request.steps) else measured
