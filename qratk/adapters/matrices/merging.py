"""Pairs of several trainings averaged into one of a given rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qratk.adapters.matrices.directions import directions
from qratk.adapters.options import AdapterOptions

_A, _B = ".lora_A.weight", ".lora_B.weight"


def mean_of_pairs(
    members: Sequence[tuple[Mapping[str, Tensor], AdapterOptions]], ranks: Mapping[str, int], options: AdapterOptions
) -> dict[str, Tensor]:
    """Masters of the mean of what the members' pairs add to each projection, by singular values cut to these ranks.

    Members are masters by name with the options that they were trained with; one without a pair at a projection adds
    nothing there. Pairs come out scaled as `options` say: A (r, d_in) and B (d_out, r), float32 on the CPU.
    """
    merged: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        pairs = [(state[name + _A], state[name + _B], own) for state, own in members if name + _A in state]
        if not rank or not pairs:
            continue
        a = torch.cat([first.float().cpu() for first, _, _ in pairs])
        shares = [second.float().cpu() * (own.scaling(len(first)) / len(members)) for first, second, own in pairs]
        kept_a, kept_b = directions(a, torch.cat(shares, dim=1)).first(rank)
        lacking = rank - len(kept_a)
        merged[name + _A] = torch.nn.functional.pad(kept_a, (0, 0, 0, lacking))
        merged[name + _B] = torch.nn.functional.pad(kept_b, (0, lacking)) / options.scaling(rank)
    return merged
