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
    from qratk.testing._torch_contracts import EstimatorContract, QuantizerContract
    from qratk.testing.contracts import (
        CrossoverContract,
        MutationContract,
        RefinerContract,
        RepairContract,
        SearcherContract,
        SurrogateContract,
    )

__all__ = [
    "CrossoverContract",
    "EstimatorContract",
    "MutationContract",
    "QuantizerContract",
    "RefinerContract",
    "RepairContract",
    "SearcherContract",
    "SurrogateContract",
    "ToyEvaluator",
    "ToyLandscape",
    "toy_problem",
]


def __getattr__(name: str) -> Any:
    """The contract suites, imported when first asked for, with pytest's readable assertions."""
    if not name.endswith("Contract") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # Apart, so that suites without torch stay without it.
    module = "_torch_contracts" if name in ("EstimatorContract", "QuantizerContract") else "contracts"
    pytest.register_assert_rewrite(f"{__name__}.{module}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
