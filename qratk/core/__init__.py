"""The vocabulary: configurations, space, bytes, problem, evaluations, fronts. Standard library and numpy only."""

from qratk.core.configuration import KNOBS, Configuration, Knob, LayerChoice, unique
from qratk.core.errors import (
    ConfigurationError,
    DataError,
    DuplicateComponentError,
    InfeasibleBudgetError,
    PluginError,
    QratkError,
    QuantizationError,
    RejectedConfigurationError,
    RunDirectoryError,
    SearchError,
    UnknownComponentError,
    UnsupportedModelError,
)
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History, Prediction, Request, SurrogateQuality
from qratk.core.memory import (
    SCOPES,
    Budget,
    Footprint,
    LayerBytes,
    LayerShape,
    MemoryModel,
    PeakBytes,
    Scope,
    format_bytes,
    parse_bytes,
    resolve_budget,
)
from qratk.core.pareto import ParetoFront, hypervolume_2d
from qratk.core.problem import Importance, Problem, min_max
from qratk.core.shared import Shared, SharedLadder
from qratk.core.space import SearchSpace
from qratk.core.utility import Utility

__all__ = [
    "KNOBS",
    "SCOPES",
    "Budget",
    "Candidate",
    "Configuration",
    "ConfigurationError",
    "DataError",
    "DuplicateComponentError",
    "Evaluation",
    "FidelityLadder",
    "Footprint",
    "History",
    "Importance",
    "InfeasibleBudgetError",
    "Knob",
    "LayerBytes",
    "LayerChoice",
    "LayerShape",
    "MemoryModel",
    "ParetoFront",
    "PeakBytes",
    "PluginError",
    "Prediction",
    "Problem",
    "QratkError",
    "QuantizationError",
    "RejectedConfigurationError",
    "Request",
    "RunDirectoryError",
    "Scope",
    "SearchError",
    "SearchSpace",
    "Shared",
    "SharedLadder",
    "SurrogateQuality",
    "UnknownComponentError",
    "UnsupportedModelError",
    "Utility",
    "format_bytes",
    "hypervolume_2d",
    "min_max",
    "parse_bytes",
    "resolve_budget",
    "unique",
]
