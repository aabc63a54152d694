"""The LightningModule of a cohort: what `FineTuneModule` does for one configuration, for several in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from qratk.backbone.logits import training_losses
from qratk.core.errors import ConfigurationError
from qratk.training.accumulation import TokenWeighting
from qratk.training.cohort import Cohort
from qratk.training.failure import not_finite
from qratk.training.module import FineTuneModule
from qratk.training.observing import observe
from qratk.training.optimisation import MemberSteps, place_steps
from qratk.training.options import FineTuneOptions
from qratk.training.precision import require_precision
from qratk.training.scoring import Scoring, metrics_of, outcomes_of
from qratk.training.state import TrainingState, device_random_state, set_random_state


class CohortModule(LightningModule):
    """Trains and scores the candidates of a cohort on the same batches; to be used while it is `installed`.

    Losses, gradient clipping and AdamW's state are each candidate's own, so that each is trained as it would be alone,
    up to the order of additions. A candidate whose loss is not finite harms no other.

    Args:
        module: what is trained, with its options.
        cohort: the candidates.
        states: where each of them continues, all after the same number of steps; none to begin.

    Attributes:
        failures: why a candidate failed, by its index.
        scores: of the last validation, for each candidate the metrics by name and the outcome of each item.
    """

    def __init__(self, module: FineTuneModule, cohort: Cohort, states: Sequence[TrainingState] = ()) -> None:
        super().__init__()
        if states and (len(states) != len(cohort) or len({state.steps for state in states}) != 1):
            raise ConfigurationError("the candidates of a cohort must continue after the same number of steps")
        self._module = (module,)  # not a submodule: only the model in use is
        self.model = module.backbone.model
        self.cohort = cohort
        self.states = tuple(states)
        self.failures: dict[int, str] = {}
        self.scores: tuple[tuple[dict[str, float], tuple[float, ...]], ...] = ()
        self._scoring = Scoring()
        for member, state in enumerate(self.states):
            cohort.load_state(member, state.adapter)

    @property
    def module(self) -> FineTuneModule:
        """What is trained, for one candidate."""
        return self._module[0]

    @property
    def shared_length(self) -> int:
        """As of the module; it must have been asked for before the cohort was installed."""
        return self.module.shared_length

    @property
    def first_step(self) -> int:
        """Optimiser steps that were done before."""
        return self.states[0].steps if self.states else 0

    def setup(self, stage: str) -> None:
        """Raise `ConfigurationError` where Lightning would cast the adapters."""
        require_precision(self.trainer)

    def on_train_start(self) -> None:
        """Set the random state, as for one candidate."""
        self._weighting = TokenWeighting(self.trainer)
        torch.manual_seed(self.module.options.training_seed)  # of every device
        if self.states:
            set_random_state(self.states[0].random, self.states[0].device_random, self.device)

    def on_train_end(self) -> None:
        """Take what decides how the adapters are stored."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        count = self.module.backbone.adapters.method.observed_batches
        observe(self.cohort, self.model, data, count, device=self.device, candidates=len(self.cohort))

    def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the labelled tokens for each candidate, (K,), in nats."""
        size, cost = len(self.cohort), self.module.pass_cost
        if cost is not None and not self.cohort.dropout:  # its draws must be those of a candidate alone
            cost /= size
        return training_losses(self.model, batch, size, overhead=cost)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the losses, whose gradient is each candidate's own."""
        losses = self.candidate_losses(batch)
        if not torch.isfinite(losses).all():
            for member, loss in enumerate(losses.tolist()):
                if not torch.isfinite(losses[member]):
                    self.failures.setdefault(member, not_finite(loss, self.first_step + self.global_step))
        return self._weighting.weighted(losses.sum(), batch["labels"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Bring the gradients to means over the tokens of the step."""
        self._weighting.finish(parameter for _, parameter in self.cohort.parameters())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the stacked adapters, continued where the rung ended, and each candidate's own schedule."""
        module, parameters = self.module, [p for _, p in self.cohort.parameters()]
        options = [module.options.with_shared(configuration.shared) for configuration in self.cohort.configurations]
        if len({_stepping(own) for own in options}) == 1:
            optimizer = module.make_optimizer(parameters, self.trainer, options[0])
            self._continue(optimizer)
            schedule = module.make_schedule(optimizer, self.trainer, self.first_step, options[0])
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        total = module.total_steps(self.trainer)
        steps = MemberSteps(parameters, options, rate_factor=module.rate_factor, start=self.first_step, total=total)
        optimizer = steps.attached(precision=str(self.trainer.precision))
        self._continue(optimizer)
        return {"optimizer": optimizer}

    def _continue(self, optimizer: Optimizer) -> None:
        self.cohort.load_moments(optimizer, [state.optimizer for state in self.states])
        place_steps(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each candidate by itself."""
        if gradient_clip_val:
            self.cohort.clip_gradients(float(gradient_clip_val), str(gradient_clip_algorithm or "norm"))

    def training_states(self) -> list[TrainingState]:
        """What continuing each candidate needs, copied to the CPU; to be called right after `Trainer.fit`."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        steps, random = self.first_step + self.global_step, torch.get_rng_state()
        device_random = device_random_state(self.device)
        return [
            TrainingState(
                steps,
                {name: value.cpu() for name, value in self.cohort.state(member).items()},
                self.cohort.moments(optimizer, member),
                random,
                device_random,
            )
            for member in range(len(self.cohort))
        ]

    # Scoring

    def on_validation_epoch_start(self) -> None:
        """Round the adapters to what is stored."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stored = self.cohort.stored_precision()
        self._scoring.begin(data, "validation", self.device, stored, count=len(self.cohort))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a batch for every candidate."""
        self._scoring.score(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        """Keep the scores in `scores`."""
        self.scores = tuple((metrics_of(scorer), outcomes_of(scorer)) for scorer in self._scoring.end())


def _stepping(options: FineTuneOptions) -> tuple[float, float, int, str]:
    """What of the options decides an optimiser's step and may differ between candidates."""
    return options.learning_rate, options.weight_decay, options.warmup_steps, options.schedule
