"""Data modules: instruction tuning, multiple choice, plain text. Nothing heavy is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.data.instruction import InstructionData
    from qratk.data.lm_eval import evaluate_lm_eval, write_task
    from qratk.data.lm_eval_data import LmEvalData
    from qratk.data.multiple_choice import MultipleChoiceData
    from qratk.data.sampler import StepSampler
    from qratk.data.scoring import Scorer
    from qratk.data.suite import SuiteData
    from qratk.data.suite_members import SuiteTask, TrainingSource
    from qratk.data.text import TextData

_MODULES = {
    "InstructionData": "instruction",
    "LmEvalData": "lm_eval_data",
    "MultipleChoiceData": "multiple_choice",
    "Scorer": "scoring",
    "StepSampler": "sampler",
    "SuiteData": "suite",
    "SuiteTask": "suite_members",
    "TaskData": "base",
    "TextData": "text",
    "TrainingSource": "suite_members",
    "evaluate_lm_eval": "lm_eval",
    "write_task": "lm_eval",
}

__all__ = [
    "InstructionData", "LmEvalData", "MultipleChoiceData", "Scorer", "StepSampler", "SuiteData", "SuiteTask",
    "TaskData", "TextData", "TrainingSource", "evaluate_lm_eval", "write_task",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The exported object, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The exported names."""
    return list(__all__)
