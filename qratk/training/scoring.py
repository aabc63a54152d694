"""A pass over scoring batches: the adapters as they are stored, and a scorer for each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qratk.backbone.logits import labelled_logits, replicate, target_greedy, target_log_likelihood
from qratk.data.generation import Prefix, end_ids, generate

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.data.scoring import Scorer
    from qratk.data.splits import Split


class Scoring:
    """Scores one candidate or several on the same batches, from `begin` to `end`."""

    def __init__(self) -> None:
        self._scorers: tuple[Scorer, ...] = ()
        self._stored = ExitStack()
        self._prefix = Prefix()

    def begin(
        self,
        data: TaskData,
        split: Split,
        device: torch.device,
        stored_precision: AbstractContextManager[None],
        *,
        count: int = 1,
    ) -> None:
        """Take a scorer for each of `count` candidates, and round the adapters to what is stored."""
        self._scorers = tuple(data.scorer(split).to(device) for _ in range(count))
        self._stored.enter_context(stored_precision)
        self._prefix = Prefix()

    def score(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Score a batch for every candidate in the model: by likelihoods, or by what is generated from prompts."""
        if "most" in batch:
            self._generate(model, batch)
            return
        count = len(self._scorers)
        whole = replicate(batch, count) if count > 1 else batch
        logits = labelled_logits(model, whole)
        likelihoods, tokens = (part.view(count, -1) for part in target_log_likelihood(logits, whole))
        greedy = target_greedy(logits, whole).view(count, -1) if self._scorers[0].needs_greedy else None
        for index, scorer in enumerate(self._scorers):
            scorer.update(batch, likelihoods[index], tokens[index], None if greedy is None else greedy[index])

    def _generate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        rows, one = batch["row"].tolist(), self._scorers[0]
        found = generate(
            model, batch["input_ids"], batch["attention_mask"], most=batch["most"].tolist(), ends=end_ids(model),
            stopped=lambda prompt, tokens: one.stopped(rows[prompt], tokens), candidates=len(self._scorers),
            prefix=batch.get("prefix"), kept=self._prefix,
        )  # fmt: skip
        for index, scorer in enumerate(self._scorers):
            scorer.update(batch, texts=found[index * len(rows) : (index + 1) * len(rows)])

    def end(self) -> tuple[Scorer, ...]:
        """The scorers, with all that they saw; the adapters are as before."""
        self._stored.close()
        scorers, self._scorers = self._scorers, ()
        self._prefix = Prefix()
        return scorers


def outcomes_of(scorer: Scorer) -> tuple[float, ...]:
    """Outcome of each item."""
    return tuple(scorer.outcomes().double().cpu().tolist())


def metrics_of(scorer: Scorer) -> dict[str, float]:
    """Figures by name, among them "score", in single precision as Lightning logs them."""
    return {name: float(value.float()) for name, value in scorer.compute().items()}
