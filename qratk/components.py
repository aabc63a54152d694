"""The table of all open sets."""

from __future__ import annotations

from typing import Any

from qratk.adapters.base import adapters
from qratk.adapters.starts.base import starts
from qratk.estimators.base import estimators
from qratk.evaluators.base import evaluators
from qratk.executors.base import executors
from qratk.exporters.base import exporters
from qratk.mutations.base import mutations
from qratk.quantizers.base import quantizers
from qratk.refiners.base import refiners
from qratk.registry import Registry
from qratk.repairs.base import repairs
from qratk.reporters.base import reporters
from qratk.searchers.base import searchers
from qratk.surrogates.base import surrogates

REGISTRIES: dict[str, Registry[Any]] = {
    registry.kind: registry
    for registry in (
        estimators,
        mutations,
        repairs,
        surrogates,
        searchers,
        refiners,
        quantizers,
        adapters,
        starts,
        evaluators,
        executors,
        exporters,
        reporters,
    )
}
