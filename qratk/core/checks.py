"""Checks of options that are told all at once, each by the name of its option."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qratk.core.errors import ConfigurationError, Problem


class Checks:
    """Collects what is wrong with the options of one object, and raises it as one error.

    checks = Checks()
    checks.require(rate > 0, "rate", rate, "must be positive")
    checks.finish()
    """

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def require(self, holds: bool, option: str, given: object, expected: str) -> None:
        """Note that an option is wrong unless the condition holds; `expected` says what it must be."""
        if not holds:
            self.note(option, f"{expected}, got {given!r}")

    def note(self, option: str, text: str) -> None:
        """Note that an option is wrong, in words."""
        self._problems.append(Problem(option, text))

    def at_least(self, smallest: float, **options: float | None) -> None:
        """Note each option that is neither None nor a finite number of at least `smallest`."""
        for name, value in options.items():
            holds = value is None or (math.isfinite(value) and value >= smallest)
            self.require(holds, name, value, f"must be at least {smallest:g}")

    def finish(self) -> None:
        """Raise `ConfigurationError` with all that was noted; nothing when all is right."""
        if self._problems:
            raise configuration_error(self._problems)


def configuration_error(problems: Iterable[Problem]) -> ConfigurationError:
    """One error that tells several problems."""
    found = tuple(problems)
    return ConfigurationError("; ".join(f"{problem.option} {problem.text}" for problem in found), problems=found)
