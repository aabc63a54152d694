"""What was written, read again and compared with the model that it was made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qratk.core.work import counted

if TYPE_CHECKING:
    import torch

    from qratk.backbone.backbone import Backbone
    from qratk.exporters.base import Exporter


@dataclass(frozen=True)
class SelfCheck:
    """How far what was written is from the model, in float32, on texts that the model itself writes.

    Attributes:
        largest: the largest difference of two logits.
        share: root of the mean squared difference, as a share of the standard deviation of the model's own logits
            about the mean of their position. It judges: at single positions, such as those that take all attention,
            rounding alone may come to several logits.
        agreement: share of positions at which both find the same token likeliest.
        positions: how many there are.
        divergence: mean KL divergence of the next token's distribution from the model's own, nats.
        tolerance: what the share may be.
    """

    largest: float
    share: float
    agreement: float
    positions: int
    tolerance: float
    divergence: float

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding."""
        return math.isfinite(self.largest) and self.share <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.largest:.2g}, mean one {self.share:.2g} of their spread (allowed "
            f"{self.tolerance:g}), KL divergence {self.divergence:.1g}, same first token at "
            f"{round(self.agreement * self.positions)} of {self.positions} positions"
        )


def self_check(
    exporter: Exporter, backbone: Backbone, directory: Path, *, texts: int = 4, length: int = 24
) -> SelfCheck | None:
    """The check of a folder that an exporter wrote of what is active; None where its form cannot be read again.

    Both models compute in float32 with the adapters as stored, whatever the compute type: a smaller one has rounding
    of its own. The texts begin with a random token each and go on as the model draws them, with a seed.
    """
    import torch

    model = exporter.reload(backbone, directory)
    if model is None:
        return None
    with torch.no_grad(), in_float32(backbone):
        tokens = _own_texts(backbone, texts, length)
        ours = backbone.model(input_ids=tokens, use_cache=False).logits.float()
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
    difference, spread = theirs - ours, ours - ours.mean(-1, keepdim=True)
    share = float((difference.square().mean() / spread.square().mean()).sqrt())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return SelfCheck(
        float(difference.abs().amax()),
        share,
        agreement,
        tokens.numel(),
        exporter.tolerance(backbone),
        divergence(ours, theirs),
    )


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL(ours || theirs) over positions of logits (..., vocabulary), nats; in float64, for it is small."""
    p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


@contextmanager
def in_float32(backbone: Backbone) -> Iterator[None]:
    """Context of evaluation in float32, with the adapters as stored."""
    import torch

    model = backbone.model
    training = model.training
    narrow = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    for parameter, values in narrow:
        parameter.data = values.float()
    model.eval()
    try:
        with backbone.stored_precision():
            yield
    finally:
        model.train(training)
        for parameter, values in narrow:
            parameter.data = values


def _own_texts(backbone: Backbone, texts: int, length: int) -> torch.Tensor:
    """Tokens (texts, length)."""
    import torch

    device = next(iter(backbone.fixed_tensors().values())).device
    generator = torch.Generator().manual_seed(0)
    count = int(backbone.base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tokens = torch.randint(count, (texts, 1), generator=generator)
    for _ in counted("writing texts for the self-check", range(length - 1)):
        logits = backbone.model(input_ids=tokens.to(device), use_cache=False).logits[:, -1].float().cpu()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return tokens.to(device)
