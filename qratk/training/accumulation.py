"""Token weighting: gradients of micro-batches and replicas add up to that of one large batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qratk.backbone.logits import labelled_tokens

if TYPE_CHECKING:
    from lightning import Trainer

_UNIT = 1024  # tokens: keeps weighted losses near their size, as 16-bit gradients want them


class TokenWeighting:
    """Makes an optimiser step's gradient that of the mean over all its labelled tokens.

    Lightning averages the losses of `accumulate_grad_batches` micro-batches, and replicas average their gradients:
    means of means, in which a token of a short answer counts more than one of a long one. Here each loss is weighted
    with its labelled tokens before the backward pass, and gradients are divided by all tokens of the step after it.
    Where a step is one micro-batch of one replica nothing is done, so that its numbers are those of the plain mean.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._micro_batches, self._replicas = int(trainer.accumulate_grad_batches), int(trainer.world_size)
        self._strategy = trainer.strategy
        self._tokens = 0

    @property
    def needed(self) -> bool:
        """Whether a step has several parts."""
        return self._micro_batches * self._replicas > 1

    def weighted(self, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss of a micro-batch, a scalar, weighted with the labelled tokens in its labels (B, T)."""
        if not self.needed:
            return loss
        tokens = labelled_tokens(labels)
        self._tokens += tokens
        return loss * (tokens / _UNIT)

    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Bring the gradients of a whole step to the mean over its tokens; to be called before clipping."""
        if not self.needed:
            return
        total, self._tokens = self._everywhere(self._tokens), 0
        factor = _UNIT * self._micro_batches * self._replicas / max(1, total)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _everywhere(self, tokens: int) -> int:
        if self._replicas == 1:
            return tokens
        counted = torch.tensor(tokens, dtype=torch.int64, device=self._strategy.root_device)
        return int(self._strategy.reduce(counted, reduce_op="sum"))
