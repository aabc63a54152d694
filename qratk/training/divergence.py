"""The divergence of frozen quantised weights from the full-precision ones, at positions of some batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qratk.backbone.logits import IGNORE, labelled_logits, targets_of
from qratk.core.configuration import Configuration
from qratk.core.errors import DataError
from qratk.training.measuring import Trained
from qratk.training.module import FineTuneModule

_CHUNK_BYTES = 1 << 26

Kind = Literal["labelled", "all"]


@dataclass(frozen=True)
class Target:
    """What the full-precision model says of a batch.

    `positions` (P,) are flat indices b * T + t, `sequence` (P,) the sequence that each belongs to, counted over all
    batches, `log_probabilities` (P, V) lie on the CPU.
    """

    batch: Mapping[str, Tensor]
    positions: Tensor
    sequence: Tensor
    log_probabilities: Tensor


class FrozenDivergence:
    """Scores of frozen weights, one for equal bits.

    Args:
        module: whose weights are compared with themselves at full precision.
        device: where the model lies.
        batches: what it is asked about, on any device.
        kind: positions that predict a labelled token, or all that predict one.
        most: at most as many positions, evenly spaced among those there are; None for all of them.
        dtype: of the stored log-probabilities.
    """

    def __init__(
        self,
        module: FineTuneModule,
        device: torch.device,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        kind: Kind,
        most: int | None,
        dtype: torch.dtype,
    ) -> None:
        self._module, self._device, self._dtype = module, device, dtype
        self._batches, self._kind, self._most = batches, kind, most
        self.targets: tuple[Target, ...] = ()
        self._scores: dict[tuple[int, ...], Trained] = {}

    def take_targets(self) -> None:
        """Ask the full-precision model, which must still be there; raises `DataError` where there is no position."""
        positions = chosen_positions(self._batches, self._kind, self._most)
        backbone = self._module.backbone
        backbone.activate(Configuration.uniform(16, 0, len(backbone.layers)), seed=self._module.options.seed)
        first, targets = 0, []
        for batch, chosen in zip(self._batches, positions, strict=True):
            sequence = first + chosen // batch["input_ids"].shape[1]
            first += len(batch["input_ids"])
            if len(chosen):
                targets.append(Target(batch, chosen, sequence, self._log_probabilities(batch, chosen)))
        self.targets = tuple(targets)

    def score(self, configuration: Configuration) -> Trained:
        """Minus the mean divergence of a configuration's bits, and the share of each sequence in it."""
        if configuration.bits not in self._scores:
            bits = configuration.bits
            self._module.activate(Configuration.of(bits, [0] * len(bits)))
            self._scores[configuration.bits] = self._measured()
        return self._scores[configuration.bits]

    def _log_probabilities(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        logits = self._logits(batch, positions)
        found = torch.empty(logits.shape, dtype=self._dtype)
        for rows in _chunks(logits):
            found[rows] = logits[rows].float().log_softmax(1).to("cpu", self._dtype)
        return found

    def _measured(self) -> Trained:
        divergences, sequences = [], []
        for target in self.targets:
            logits = self._logits(target.batch, target.positions)
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

    def _logits(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Logits of the active weights at some positions, (P, V), without dropout."""
        model = self._module.backbone.model
        placed = {name: tensor.to(self._device) for name, tensor in batch.items()}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return labelled_logits(model, placed, positions.to(self._device))
        finally:
            model.train(training)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of pairs of distributions, (P,) in nats, from 0 to ln 2 (Lin 1991, Eq. 4.1).

    `p` and `q` are natural log-probabilities, (P, V); symmetric.
    """
    middle = torch.logaddexp(p, q) - math.log(2.0)
    terms = [part.exp() * (part - middle).masked_fill(part.isneginf(), 0.0) for part in (p, q)]
    return (0.5 * (terms[0] + terms[1]).sum(1)).clamp(min=0.0)  # rounding makes -1e-8 of nothing


def chosen_positions(batches: Sequence[Mapping[str, Tensor]], kind: Kind, most: int | None) -> list[Tensor]:
    """Flat indices b * T + t of the positions that count, for each batch; at most `most`, evenly spaced.

    Raises `DataError` where there are none.
    """
    found = [_positions(batch, kind) for batch in batches]
    total = sum(map(len, found))
    if not total:
        raise DataError(
            f"the {len(batches)} calibration batches have no {kind} position to compare models at; "
            "give more of them, or positions='all'"
        )
    kept = torch.ones(total, dtype=torch.bool)
    if most is not None and total > most:
        kept[:] = False
        kept[torch.arange(most) * total // most] = True
    parts = torch.split(kept, [len(positions) for positions in found])
    return [positions[part] for positions, part in zip(found, parts, strict=True)]


def _positions(batch: Mapping[str, Tensor], kind: Kind) -> Tensor:
    """Flat indices b * T + t, (P,), of the positions that predict a labelled token, or any token."""
    labels = batch["labels"] if kind == "labelled" else batch["input_ids"].masked_fill(
        batch["attention_mask"] == 0, IGNORE
    )  # fmt: skip
    return targets_of(labels)[0]


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
