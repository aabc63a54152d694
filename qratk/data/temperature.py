"""The temperature at which the log-likelihoods of choices, compared among each other, tell most of the right one."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_ITERATIONS: Final = 60
_TOLERANCE: Final = 1e-10  # of the inverse temperature, relative


def among_choices(log_likelihood: Tensor, inverse_temperature: float = 1.0) -> Tensor:
    """Log-probability of each choice of each item, (items, choices); -inf where there is no choice, as given."""
    present = log_likelihood > -torch.inf
    return torch.where(present, log_likelihood * inverse_temperature, log_likelihood).log_softmax(1)


def fitted_inverse_temperature(log_likelihood: Tensor, right: Tensor) -> float:
    """The b >= 0 with the most likely right choices when the log-likelihoods are multiplied by it.

    Maximises the mean over items of log softmax(b z) at the right choice, which is concave in b, by Newton's method
    between bounds (Guo et al. 2017, arXiv:1706.04599, Sec. 4.2). One more observation counts too, spread evenly over
    the items: there every choice is right in equal shares. So b stays finite where every item is right, and is drawn
    towards 0 where there are few items. b times z does not depend on the scale of z.

    Args:
        log_likelihood: z, (items, choices) in double precision, -inf where an item has no such choice.
        right: index of the right choice, (items,).
    """
    present = log_likelihood > -torch.inf
    count = present.sum(1, keepdim=True)
    centred = torch.where(present, log_likelihood, 0.0)
    centred = torch.where(present, centred - centred.sum(1, keepdim=True) / count, 0.0)
    scale = float(centred.abs().max())
    if not scale > 0 or not torch.isfinite(centred).all():
        return 1.0
    values = torch.where(present, centred / scale, -torch.inf)
    share = len(right) / (len(right) + 1)  # of the right choice; the mean over choices is 0
    wanted = share * float(centred.gather(1, right[:, None]).mean()) / scale
    return _root(values, wanted) / scale


def _root(values: Tensor, wanted: float) -> float:
    """The b >= 0 at which the mean expected value of `values` under softmax(b values) is `wanted`; 0 if below that."""
    finite = torch.where(values > -torch.inf, values, 0.0)

    def expected(b: float) -> tuple[float, float]:
        probability = among_choices(values, b).exp()
        mean = (probability * finite).sum(1, keepdim=True)
        return float(mean.mean()), float((probability * (finite - mean).square()).sum(1).mean())

    if wanted <= expected(0.0)[0]:
        return 0.0
    low, high = 0.0, 1.0
    while expected(high)[0] < wanted:
        low, high = high, 2 * high
    b = high
    for _ in range(_ITERATIONS):
        mean, slope = expected(b)
        low, high = (b, high) if mean < wanted else (low, b)
        step = b - (mean - wanted) / slope if slope > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - b) <= _TOLERANCE * b:
            return following
        b = following
    return b
