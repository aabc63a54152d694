"""For tests of strategies, ours and yours: a toy problem without torch, and a contract suite for every open set.

Subclass the suite of a kind and override its `make` fixture; pytest is needed for the suites only:

    from qratk.testing import RepairContract

    class TestMyRepair(RepairContract):
        @pytest.fixture
        def make(self):
            return MyRepair
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qratk.testing.toy import ToyEvaluator, ToyLandscape, toy_problem

if TYPE_CHECKING:
    from qratk.testing._evaluator_contract import EvaluatorContract
    from qratk.testing._executor_contract import ExecutorContract
    from qratk.testing._torch_adapters import AdapterContract
    from qratk.testing._torch_contracts import (
        VOCABULARY,
        EstimatorContract,
        ExporterContract,
        QuantizerContract,
        tiny_batches,
    )
    from qratk.testing._torch_starts import StartContract
    from qratk.testing.contracts import (
        CASES,
        LADDER,
        CrossoverContract,
        MutationContract,
        RefinerContract,
        RepairContract,
        SearcherContract,
        SurrogateContract,
        default_proposer,
        failed,
        promoted,
    )
    from qratk.testing.reporter_contract import ReporterContract

__all__ = [
    "CASES",
    "LADDER",
    "VOCABULARY",
    "AdapterContract",
    "CrossoverContract",
    "EstimatorContract",
    "EvaluatorContract",
    "ExecutorContract",
    "ExporterContract",
    "MutationContract",
    "QuantizerContract",
    "RefinerContract",
    "RepairContract",
    "ReporterContract",
    "SearcherContract",
    "StartContract",
    "SurrogateContract",
    "ToyEvaluator",
    "ToyLandscape",
    "default_proposer",
    "failed",
    "promoted",
    "tiny_batches",
    "toy_problem",
]

_WITH_TORCH = ("VOCABULARY", "EstimatorContract", "ExporterContract", "QuantizerContract", "tiny_batches")
_APART = {
    **dict.fromkeys(_WITH_TORCH, "_torch_contracts"),
    "AdapterContract": "_torch_adapters",
    "EvaluatorContract": "_evaluator_contract",
    "ExecutorContract": "_executor_contract",
    "ReporterContract": "reporter_contract",
    "StartContract": "_torch_starts",
}
"""Modules of suites that need torch, or whole searches: the others stay without them."""


def __getattr__(name: str) -> Any:
    """The contract suites and their helpers, imported when first asked for, with pytest's readable assertions."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    module = _APART.get(name, "contracts")
    pytest.register_assert_rewrite(f"{__name__}.{module}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
