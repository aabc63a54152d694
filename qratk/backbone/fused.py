"""Projections that servers multiply by at once: what they join, and so what must be packed alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

FUSED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("query", "key", "value"),
    "wqkv": ("wq", "wk", "wv"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "c_fc_01": ("c_fc_0", "c_fc_1"),
}
"""Joint name of projections of one module that read the same input, as vLLM's `packed_modules_mapping` has them."""

_JOINT: Final = {part: joint for joint, parts in FUSED.items() for part in parts}
_EXPERT: Final = re.compile(r"(?P<experts>(?:.*\.)?experts)\.\d+(?:\..*)?")


def fused_groups(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Projections by what serves them: those that are joined under their joint name, others alone under their own.

    All experts of a mixture are one group, under the name of the list: servers pack them in one way and multiply by
    all of them in one kernel. What the model holds joined already is one projection. Groups are in the order of their
    first members.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_joint_name(name), []).append(name)
    return {
        joint if len(members) > 1 or _EXPERT.fullmatch(members[0]) else members[0]: tuple(members)
        for joint, members in groups.items()
    }


def _joint_name(name: str) -> str:
    """Name of the group of a projection by its qualified name."""
    if match := _EXPERT.fullmatch(name):
        return match["experts"]
    parent, _, own = name.rpartition(".")
    joint = _JOINT.get(own, own)
    return f"{parent}.{joint}" if parent else joint
