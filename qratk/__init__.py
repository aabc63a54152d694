"""Joint search of per-layer bit-widths and LoRA ranks under a memory budget (AutoQRA).

These are the public names, for users in Python and for plugins; everything else may move. Importing this package is
cheap: a name is imported when it is first asked for, and nothing heavy before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qratk.exporters.registration import announce

if TYPE_CHECKING:
    from qratk import testing as testing
    from qratk.adapters.base import AdapterMethod as AdapterMethod
    from qratk.adapters.base import Adapters as Adapters
    from qratk.adapters.base import AfterStep as AfterStep
    from qratk.adapters.base import Way as Way
    from qratk.adapters.matrices.drawing import initial_a as initial_a
    from qratk.adapters.matrices.factors import Directions as Directions
    from qratk.adapters.matrices.factors import Factors as Factors
    from qratk.adapters.matrices.factors import Weighting as Weighting
    from qratk.adapters.options import AdapterOptions as AdapterOptions
    from qratk.adapters.starts.base import Residual as Residual
    from qratk.adapters.starts.base import Start as Start
    from qratk.backbone.backbone import Backbone as Backbone
    from qratk.backbone.logits import training_losses as training_losses
    from qratk.bank.gradients import BatchSize as BatchSize
    from qratk.bank.linear import BankLinear as BankLinear
    from qratk.bank.linear import Packed as Packed
    from qratk.bank.table import Chosen as Chosen
    from qratk.cli.called import search as search
    from qratk.components import REGISTRIES as REGISTRIES
    from qratk.core.configuration import KNOBS as KNOBS
    from qratk.core.configuration import Configuration as Configuration
    from qratk.core.configuration import Knob as Knob
    from qratk.core.configuration import LayerChoice as LayerChoice
    from qratk.core.errors import ConfigurationError as ConfigurationError
    from qratk.core.errors import DataError as DataError
    from qratk.core.errors import ExportError as ExportError
    from qratk.core.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from qratk.core.errors import QratkError as QratkError
    from qratk.core.errors import QuantizationError as QuantizationError
    from qratk.core.errors import RejectedConfigurationError as RejectedConfigurationError
    from qratk.core.errors import RunDirectoryError as RunDirectoryError
    from qratk.core.errors import SearchError as SearchError
    from qratk.core.evaluation import Candidate as Candidate
    from qratk.core.evaluation import Evaluation as Evaluation
    from qratk.core.evaluation import FidelityLadder as FidelityLadder
    from qratk.core.evaluation import History as History
    from qratk.core.evaluation import Member as Member
    from qratk.core.evaluation import Prediction as Prediction
    from qratk.core.evaluation import Request as Request
    from qratk.core.evaluation import SurrogateQuality as SurrogateQuality
    from qratk.core.intact import require_intact as require_intact
    from qratk.core.memory import Budget as Budget
    from qratk.core.memory import Footprint as Footprint
    from qratk.core.memory import LayerBytes as LayerBytes
    from qratk.core.memory import LayerShape as LayerShape
    from qratk.core.memory import MemoryModel as MemoryModel
    from qratk.core.memory import PeakBytes as PeakBytes
    from qratk.core.memory import resolve_budget as resolve_budget
    from qratk.core.problem import Importance as Importance
    from qratk.core.problem import Problem as Problem
    from qratk.core.result import GenerationSummary as GenerationSummary
    from qratk.core.result import Progress as Progress
    from qratk.core.result import Record as Record
    from qratk.core.result import RefinementSummary as RefinementSummary
    from qratk.core.result import SearchPlan as SearchPlan
    from qratk.core.result import SearchResult as SearchResult
    from qratk.core.shared import SharedLadder as SharedLadder
    from qratk.core.space import SearchSpace as SearchSpace
    from qratk.core.utility import Utility as Utility
    from qratk.core.work import Work as Work
    from qratk.data.base import TaskData as TaskData
    from qratk.data.instruction import InstructionData as InstructionData
    from qratk.data.lm_eval_data import LmEvalData as LmEvalData
    from qratk.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
    from qratk.data.suite import SuiteData as SuiteData
    from qratk.data.text import TextData as TextData
    from qratk.embedded.datamodule import EmbeddedData as EmbeddedData
    from qratk.estimators.base import Gathering as Gathering
    from qratk.estimators.base import ImportanceEstimator as ImportanceEstimator
    from qratk.estimators.base import Measured as Measured
    from qratk.evaluators.base import EvaluationContext as EvaluationContext
    from qratk.evaluators.base import Evaluator as Evaluator
    from qratk.evaluators.finetune import FineTuneEvaluator as FineTuneEvaluator
    from qratk.executors.base import Blueprint as Blueprint
    from qratk.executors.base import Equipment as Equipment
    from qratk.executors.base import Executor as Executor
    from qratk.executors.base import Group as Group
    from qratk.exporters.base import Exporter as Exporter
    from qratk.exporters.base import Holding as Holding
    from qratk.exporters.base import Packing as Packing
    from qratk.exporters.base import Serving as Serving
    from qratk.exporters.base import Wanted as Wanted
    from qratk.exporters.native import native_model as native_model
    from qratk.exporters.packed import load_quantized as load_quantized
    from qratk.loop import SearchLoop as SearchLoop
    from qratk.mutations.base import CrossoverOperator as CrossoverOperator
    from qratk.mutations.base import MutationOperator as MutationOperator
    from qratk.mutations.proposer import Proposer as Proposer
    from qratk.quantizers.base import AffineGrid as AffineGrid
    from qratk.quantizers.base import GridForm as GridForm
    from qratk.quantizers.base import Moments as Moments
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
    from qratk.searchers.brackets import BracketSearcher as BracketSearcher
    from qratk.searchers.generations import GenerationSearcher as GenerationSearcher
    from qratk.settings.recipe import autoqra as autoqra
    from qratk.surrogates.base import PromotionSurrogate as PromotionSurrogate
    from qratk.training.module import FineTuneModule as FineTuneModule

__version__ = "0.1.0"

announce()  # transformers can load our folders; nothing is imported for that

_HOMES = {
    "qratk.adapters.base": (
        "AdapterMethod",
        "Adapters",
        "AfterStep",
        "Way",
    ),
    "qratk.adapters.matrices.drawing": ("initial_a",),
    "qratk.adapters.matrices.factors": (
        "Directions",
        "Factors",
        "Weighting",
    ),
    "qratk.adapters.options": ("AdapterOptions",),
    "qratk.adapters.starts.base": (
        "Residual",
        "Start",
    ),
    "qratk.backbone.backbone": ("Backbone",),
    "qratk.backbone.logits": ("training_losses",),
    "qratk.bank.gradients": ("BatchSize",),
    "qratk.bank.linear": (
        "BankLinear",
        "Packed",
    ),
    "qratk.bank.table": ("Chosen",),
    "qratk.cli.called": ("search",),
    "qratk.components": ("REGISTRIES",),
    "qratk.core.configuration": (
        "KNOBS",
        "Configuration",
        "Knob",
        "LayerChoice",
    ),
    "qratk.core.errors": (
        "ConfigurationError",
        "DataError",
        "ExportError",
        "InfeasibleBudgetError",
        "QratkError",
        "QuantizationError",
        "RejectedConfigurationError",
        "RunDirectoryError",
        "SearchError",
    ),
    "qratk.core.evaluation": (
        "Candidate",
        "Evaluation",
        "FidelityLadder",
        "History",
        "Member",
        "Prediction",
        "Request",
        "SurrogateQuality",
    ),
    "qratk.core.intact": ("require_intact",),
    "qratk.core.memory": (
        "Budget",
        "Footprint",
        "LayerBytes",
        "LayerShape",
        "MemoryModel",
        "PeakBytes",
        "resolve_budget",
    ),
    "qratk.core.problem": (
        "Importance",
        "Problem",
    ),
    "qratk.core.result": (
        "GenerationSummary",
        "Progress",
        "Record",
        "RefinementSummary",
        "SearchPlan",
        "SearchResult",
    ),
    "qratk.core.shared": ("SharedLadder",),
    "qratk.core.space": ("SearchSpace",),
    "qratk.core.utility": ("Utility",),
    "qratk.core.work": ("Work",),
    "qratk.data.base": ("TaskData",),
    "qratk.data.instruction": ("InstructionData",),
    "qratk.data.lm_eval_data": ("LmEvalData",),
    "qratk.data.multiple_choice": ("MultipleChoiceData",),
    "qratk.data.suite": ("SuiteData",),
    "qratk.data.text": ("TextData",),
    "qratk.embedded.datamodule": ("EmbeddedData",),
    "qratk.estimators.base": (
        "Gathering",
        "ImportanceEstimator",
        "Measured",
    ),
    "qratk.evaluators.base": (
        "EvaluationContext",
        "Evaluator",
    ),
    "qratk.evaluators.finetune": ("FineTuneEvaluator",),
    "qratk.executors.base": (
        "Blueprint",
        "Equipment",
        "Executor",
        "Group",
    ),
    "qratk.exporters.base": (
        "Exporter",
        "Holding",
        "Packing",
        "Serving",
        "Wanted",
    ),
    "qratk.exporters.native": ("native_model",),
    "qratk.exporters.packed": ("load_quantized",),
    "qratk.loop": ("SearchLoop",),
    "qratk.mutations.base": (
        "CrossoverOperator",
        "MutationOperator",
    ),
    "qratk.mutations.proposer": ("Proposer",),
    "qratk.quantizers.base": (
        "AffineGrid",
        "GridForm",
        "Moments",
        "PackedBytes",
        "PackedLayer",
        "Quantizer",
    ),
    "qratk.refiners.base": ("LocalRefiner",),
    "qratk.repairs.base": ("RepairPolicy",),
    "qratk.reporters.base": (
        "Destination",
        "Reporter",
    ),
    "qratk.reporters.standard": ("standard_reporters",),
    "qratk.run.run": ("Run",),
    "qratk.searchers.base": ("GlobalSearcher",),
    "qratk.searchers.brackets": ("BracketSearcher",),
    "qratk.searchers.generations": ("GenerationSearcher",),
    "qratk.settings.recipe": ("autoqra",),
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
