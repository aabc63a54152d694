"""Joint search of per-layer bit-widths and LoRA ranks under a memory budget (AutoQRA).

These are the public names, for users in Python and for plugins; everything else may move. Importing this package is
cheap: a name is imported when it is first asked for, and nothing heavy before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qratk import testing as testing
    from qratk.adapters.base import AdapterMethod as AdapterMethod
    from qratk.adapters.base import Adapters as Adapters
    from qratk.adapters.matrices.drawing import initial_a as initial_a
    from qratk.adapters.options import AdapterOptions as AdapterOptions
    from qratk.backbone.backbone import Backbone as Backbone
    from qratk.backbone.logits import training_losses as training_losses
    from qratk.bank.linear import BankLinear as BankLinear
    from qratk.components import REGISTRIES as REGISTRIES
    from qratk.core.configuration import KNOBS as KNOBS
    from qratk.core.configuration import Configuration as Configuration
    from qratk.core.configuration import LayerChoice as LayerChoice
    from qratk.core.errors import ConfigurationError as ConfigurationError
    from qratk.core.errors import QratkError as QratkError
    from qratk.core.errors import SearchError as SearchError
    from qratk.core.evaluation import Candidate as Candidate
    from qratk.core.evaluation import Evaluation as Evaluation
    from qratk.core.evaluation import FidelityLadder as FidelityLadder
    from qratk.core.evaluation import History as History
    from qratk.core.evaluation import Request as Request
    from qratk.core.memory import resolve_budget as resolve_budget
    from qratk.core.problem import Importance as Importance
    from qratk.core.problem import Problem as Problem
    from qratk.core.result import GenerationSummary as GenerationSummary
    from qratk.core.result import Progress as Progress
    from qratk.core.result import Record as Record
    from qratk.core.result import RefinementSummary as RefinementSummary
    from qratk.core.result import SearchPlan as SearchPlan
    from qratk.core.result import SearchResult as SearchResult
    from qratk.core.space import SearchSpace as SearchSpace
    from qratk.data.base import TaskData as TaskData
    from qratk.data.instruction import InstructionData as InstructionData
    from qratk.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
    from qratk.data.text import TextData as TextData
    from qratk.embedded.datamodule import EmbeddedData as EmbeddedData
    from qratk.estimators.base import ImportanceEstimator as ImportanceEstimator
    from qratk.evaluators.base import EvaluationContext as EvaluationContext
    from qratk.evaluators.base import Evaluator as Evaluator
    from qratk.evaluators.finetune import FineTuneEvaluator as FineTuneEvaluator
    from qratk.exporters.base import Exporter as Exporter
    from qratk.exporters.native import native_model as native_model
    from qratk.loop import SearchLoop as SearchLoop
    from qratk.mutations.base import MutationOperator as MutationOperator
    from qratk.mutations.proposer import Proposer as Proposer
    from qratk.quantizers.base import PackedBytes as PackedBytes
    from qratk.quantizers.base import PackedLayer as PackedLayer
    from qratk.quantizers.base import Quantizer as Quantizer
    from qratk.refiners.base import LocalRefiner as LocalRefiner
    from qratk.repairs.base import RepairPolicy as RepairPolicy
    from qratk.reporters.base import Destination as Destination
    from qratk.reporters.base import Reporter as Reporter
    from qratk.reporters.standard import standard_reporters as standard_reporters
    from qratk.run.run import Run as Run
    from qratk.searchers.base import GlobalSearcher as GlobalSearcher
    from qratk.searchers.generations import GenerationSearcher as GenerationSearcher
    from qratk.settings.recipe import autoqra as autoqra
    from qratk.surrogates.base import PromotionSurrogate as PromotionSurrogate
    from qratk.training.module import FineTuneModule as FineTuneModule

__version__ = "0.1.0"

_HOMES = {
    "qratk.adapters.base": ("AdapterMethod", "Adapters"),
    "qratk.adapters.matrices.drawing": ("initial_a",),
    "qratk.adapters.options": ("AdapterOptions",),
    "qratk.backbone.backbone": ("Backbone",),
    "qratk.backbone.logits": ("training_losses",),
    "qratk.bank.linear": ("BankLinear",),
    "qratk.components": ("REGISTRIES",),
    "qratk.core.configuration": ("KNOBS", "Configuration", "LayerChoice"),
    "qratk.core.errors": ("ConfigurationError", "QratkError", "SearchError"),
    "qratk.core.evaluation": ("Candidate", "Evaluation", "FidelityLadder", "History", "Request"),
    "qratk.core.memory": ("resolve_budget",),
    "qratk.core.problem": ("Importance", "Problem"),
    "qratk.core.result": (
        "GenerationSummary",
        "Progress",
        "Record",
        "RefinementSummary",
        "SearchPlan",
        "SearchResult",
    ),
    "qratk.core.space": ("SearchSpace",),
    "qratk.data.base": ("TaskData",),
    "qratk.data.instruction": ("InstructionData",),
    "qratk.data.multiple_choice": ("MultipleChoiceData",),
    "qratk.data.text": ("TextData",),
    "qratk.embedded.datamodule": ("EmbeddedData",),
    "qratk.estimators.base": ("ImportanceEstimator",),
    "qratk.evaluators.base": ("EvaluationContext", "Evaluator"),
    "qratk.evaluators.finetune": ("FineTuneEvaluator",),
    "qratk.exporters.base": ("Exporter",),
    "qratk.exporters.native": ("native_model",),
    "qratk.loop": ("SearchLoop",),
    "qratk.mutations.base": ("MutationOperator",),
    "qratk.mutations.proposer": ("Proposer",),
    "qratk.quantizers.base": ("PackedBytes", "PackedLayer", "Quantizer"),
    "qratk.settings.recipe": ("autoqra",),
    "qratk.refiners.base": ("LocalRefiner",),
    "qratk.repairs.base": ("RepairPolicy",),
    "qratk.reporters.base": ("Destination", "Reporter"),
    "qratk.reporters.standard": ("standard_reporters",),
    "qratk.run.run": ("Run",),
    "qratk.searchers.base": ("GlobalSearcher",),
    "qratk.searchers.generations": ("GenerationSearcher",),
    "qratk.surrogates.base": ("PromotionSurrogate",),
    "qratk.training.module": ("FineTuneModule",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", "testing", *_HOME]  # all of them are strings


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("qratk.testing")
    if name not in _HOME:
        raise AttributeError(f"module 'qratk' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
