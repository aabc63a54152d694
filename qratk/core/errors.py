"""What a user can do wrong, as exceptions: each message says what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QratkError(Exception):
    """Base of every error that a user can cause and cure."""


@dataclass(frozen=True)
class Problem:
    """An option, by its name within its section or object, and what is wrong with it."""

    option: str
    text: str


class ConfigurationError(QratkError, ValueError):
    """A configuration, ladder or option has a value outside what is allowed; `problems` tell each where they can."""

    def __init__(self, *arguments: object, problems: Sequence[Problem] = ()) -> None:
        super().__init__(*arguments)
        self.problems = tuple(problems)


class InfeasibleBudgetError(QratkError, ValueError):
    """Not even the smallest configuration of the search space fits the budget."""


class RejectedConfigurationError(QratkError, ValueError):
    """A repair policy declined to mend an infeasible configuration; propose another one."""


class UnknownComponentError(QratkError, LookupError):
    """No strategy is registered under the given name."""


class DuplicateComponentError(QratkError, ValueError):
    """Two owners registered the same name."""


class PluginError(QratkError, ImportError):
    """A third-party package announced a component that cannot be loaded."""


class UnsupportedModelError(QratkError, ValueError):
    """The blocks or projections of a model could not be found."""


class QuantizationError(QratkError, ValueError):
    """A quantiser cannot take a weight of the given shape or values."""


class DataError(QratkError, ValueError):
    """A data file is missing, empty or has rows of the wrong form."""


class RunDirectoryError(QratkError, ValueError):
    """A run directory belongs to another configuration, or is in use."""


class SearchError(QratkError, RuntimeError):
    """The search cannot go on: for example every evaluation failed."""


class ExportError(QratkError, RuntimeError):
    """What was exported differs from what was scored."""


class CommandLineError(SystemExit):
    """A command line that cannot be read: exit status 2; whoever raises it has printed the message."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message
