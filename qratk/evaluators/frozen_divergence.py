"""Evaluation whose lowest rung trains nothing: the divergence of the frozen quantised model from the full one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, DataError
from qratk.core.evaluation import Evaluation, Request
from qratk.evaluators.base import EvaluationContext, evaluators
from qratk.evaluators.finetune import FineTuneEvaluator, OutOfMemory, Trained

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["labelled", "all"]
Stored = Literal["float32", "float16"]

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class _Target:
    """What the full-precision model says of a calibration batch.

    `positions` (P,) are flat indices b * T + t, `sequence` (P,) the sequence that each belongs to, counted over all
    batches, `log_probabilities` (P, V) lie on the CPU.
    """

    batch: Mapping[str, Tensor]
    positions: Tensor
    sequence: Tensor
    log_probabilities: Tensor


@evaluators.register("frozen_divergence")
class FrozenDivergenceEvaluator(FineTuneEvaluator):
    """Scores frozen quantised weights at the lowest rung, and fine-tunes from step 0 at the higher ones.

    At the lowest rung the score is minus the Jensen-Shannon divergence, in nats, between the next-token distributions
    of the quantised model without adapters and of the full-precision one, averaged over positions of the calibration
    batches: the proxy by which AMQ searches bit-widths (Lee et al. 2025, arXiv:2509.12019). It takes no optimiser step
    and leaves no checkpoint, whatever number the rung has, and depends on the bits alone: configurations that differ in
    rank share one score, computed once. There is one outcome a sequence, and their mean is the score.

    Log-probabilities of the full-precision model are computed once, before its weights are released, and stay in main
    memory: positions * vocabulary * 4 bytes (2 with `stored: float16`), so 0.6 GiB for 1,024 positions and 151,936
    tokens. `max_positions` bounds them.

    Args:
        calibration_batches: training batches that divergence, and importance, are measured on.
        calibration_batch_size: sequences in each of them.
        positions: those that predict a labelled token, or "all" that predict a token.
        max_positions: at most as many positions, evenly spaced among those there are; null for all of them.
        stored: type of the stored log-probabilities.
        keep_optimizer, cohort: as for `finetune`, at the higher rungs.
    """

    def __init__(
        self,
        calibration_batches: int = 8,
        calibration_batch_size: int = 8,
        positions: Positions = "labelled",
        max_positions: int | None = 4096,
        stored: Stored = "float32",
        keep_optimizer: bool = False,
        cohort: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(calibration_batches, calibration_batch_size, keep_optimizer, cohort)
        if positions not in get_args(Positions) or stored not in get_args(Stored):
            raise ConfigurationError(
                f"positions must be one of {get_args(Positions)} and stored one of {get_args(Stored)}, got "
                f"{positions!r} and {stored!r}"
            )
        if max_positions is not None and max_positions < 1:
            raise ConfigurationError(f"max_positions must be at least 1, or null for all, got {max_positions}")
        self.positions: Positions = positions
        self.max_positions = max_positions
        self.stored: Stored = stored

    def open(self, context: EvaluationContext) -> None:
        """Load model and data; raises `ConfigurationError` for a ladder of one rung, where nothing would be trained."""
        if len(context.ladder.steps) < 2:
            raise ConfigurationError(
                "the evaluator 'frozen_divergence' trains nothing at the lowest rung, and the steps "
                f"{list(context.ladder.steps)} have no other; put a rung before them, as in [1, 900]"
            )
        super().open(context)
        self._targets: list[_Target] | None = None
        self._scores: dict[tuple[int, ...], Trained] = {}

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """At the lowest rung one by one, above it as for fine-tuning."""
        for proxy, together in groupby(requests, key=lambda request: self._is_proxy(request.steps)):
            if proxy:
                yield from ((request,) for request in together)
            else:
                yield from super().groups(list(together))

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """As for fine-tuning; of an evaluation at the lowest rung, metrics of the model without adapters."""
        if self._is_proxy(evaluation.steps):
            evaluation = replace(evaluation, configuration=_bare(evaluation.configuration))
        return super().test(evaluation)

    def _is_proxy(self, steps: int) -> bool:
        return steps == self.context.ladder.lowest

    def _outcomes(self, configurations: Sequence[Configuration], steps: int) -> list[Trained | str] | OutOfMemory:
        if not self._is_proxy(steps):
            return super()._outcomes(configurations, steps)
        return self._caught(lambda: [self._divergence(configuration) for configuration in configurations])

    def _evaluation(
        self, configuration: Configuration, steps: int, outcome: Trained | str | OutOfMemory, seconds: float
    ) -> Evaluation:
        evaluation = super()._evaluation(configuration, steps, outcome, seconds)
        return replace(evaluation, checkpoint=None) if self._is_proxy(steps) else evaluation

    # The proxy

    def _prepare(self) -> None:
        self._build_bank()
        if self._targets is None:  # the last moment at which there are full-precision weights
            self._targets = self._reference_targets()
        super()._prepare()

    def _reference_targets(self) -> list[_Target]:
        import torch

        batches = self.data.calibration_batches(self.calibration_batches, self.calibration_batch_size)
        chosen = self._chosen_positions(batches)
        self.module.backbone.activate(Configuration.uniform(16, 0, len(self.shapes)), seed=self.module.options.seed)
        dtype, first, targets = getattr(torch, self.stored), 0, []
        for batch, positions in zip(batches, chosen, strict=True):
            sequence = first + positions // batch["input_ids"].shape[1]
            first += len(batch["input_ids"])
            if len(positions):
                logits = self._frozen_logits(batch, positions)
                log_probabilities = torch.empty(logits.shape, dtype=dtype)
                for rows in _chunks(logits):
                    log_probabilities[rows] = logits[rows].float().log_softmax(1).to("cpu", dtype)
                targets.append(_Target(batch, positions, sequence, log_probabilities))
        return targets

    def _chosen_positions(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Flat indices of the positions that count, for each batch."""
        import torch

        found = [_positions(batch, self.positions) for batch in batches]
        total = sum(map(len, found))
        if not total:
            raise DataError(
                f"the {len(batches)} calibration batches have no {self.positions} position to compare models at; "
                "give more of them, or positions='all'"
            )
        kept = torch.ones(total, dtype=torch.bool)
        if self.max_positions is not None and total > self.max_positions:
            kept[:] = False
            kept[torch.arange(self.max_positions) * total // self.max_positions] = True
        parts = torch.split(kept, [len(positions) for positions in found])
        return [positions[part] for positions, part in zip(found, parts, strict=True)]

    def _frozen_logits(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Logits of the active weights at some positions, (P, V), without dropout."""
        import torch

        from qratk.backbone.logits import labelled_logits

        model = self.module.backbone.model
        placed = {name: tensor.to(self.device) for name, tensor in batch.items()}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return labelled_logits(model, placed, positions.to(self.device))
        finally:
            model.train(training)

    def _divergence(self, configuration: Configuration) -> Trained:
        """Minus the mean divergence of the frozen weights, and the share of each sequence in it."""
        if configuration.bits not in self._scores:
            self._activate(_bare(configuration))
            self._scores[configuration.bits] = self._measured()
        return self._scores[configuration.bits]

    def _measured(self) -> Trained:
        assert self._targets is not None
        divergences, sequences = [], []
        for target in self._targets:
            logits = self._frozen_logits(target.batch, target.positions)
            for rows in _chunks(logits):
                reference = target.log_probabilities[rows].to(logits.device)
                found = jensen_shannon(logits[rows].float().log_softmax(1), reference.float())
                divergences.append(found.double().cpu().numpy())
            sequences.append(target.sequence.numpy())
        values, owner = np.concatenate(divergences), np.concatenate(sequences)
        sums = np.bincount(owner, values)[np.unique(owner)]
        # A sequence counts by its positions, so that the plain mean over sequences is the mean over positions.
        outcomes = -sums * (len(sums) / len(values))
        return Trained(float(outcomes.mean()), tuple(outcomes.tolist()))


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of pairs of distributions, (P,) in nats, from 0 to ln 2 (Lin 1991, Eq. 4.1).

    `p` and `q` are natural log-probabilities, (P, V); symmetric.
    """
    import math

    import torch

    middle = torch.logaddexp(p, q) - math.log(2.0)
    terms = [part.exp() * (part - middle).masked_fill(part.isneginf(), 0.0) for part in (p, q)]
    return (0.5 * (terms[0] + terms[1]).sum(1)).clamp(min=0.0)  # rounding makes -1e-8 of nothing


def _positions(batch: Mapping[str, Tensor], kind: Positions) -> Tensor:
    """Flat indices b * T + t, (P,), of the positions that predict a labelled token, or any token."""
    from qratk.backbone.logits import IGNORE, targets_of

    labels = batch["labels"] if kind == "labelled" else batch["input_ids"].masked_fill(
        batch["attention_mask"] == 0, IGNORE
    )  # fmt: skip
    return targets_of(labels)[0]


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _bare(configuration: Configuration) -> Configuration:
    """The same bits without adapters."""
    return Configuration.of(configuration.bits, [0] * len(configuration))
