"""Settings laid over settings, as the command line merges two files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both, those of `over` first; a component of another class replaces the old one with its options."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping) and _has_names(value):  # a component by its name
            old = {"class_path": old}
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_class(old, value):
            merged[key] = laid_over(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _has_names(value: Mapping[Any, Any]) -> bool:
    """Whether the keys are names of options, not bit-widths, which quantisers are given by."""
    return not any(str(key).isdigit() for key in value)


def _same_class(old: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    before = old.get("class_path")
    return bool(value.get("class_path", before) == before)
