"""`qratk validate`: the score on the validation data."""

from __future__ import annotations

from collections.abc import Sequence

from qratk.cli.application import QratkCLI, run


class ValidateCommand(QratkCLI):
    """Lightning's validate."""

    command = "validate"


def validate(arguments: Sequence[str]) -> int:
    """Exit status of `qratk validate`."""
    return run(ValidateCommand, arguments)
