"""The reporters that `qratk search` uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qratk.reporting.base import Reporter
from qratk.reporting.files import RunFiles
from qratk.reporting.multi import Reporters
from qratk.reporting.pictures import Pictures
from qratk.reporting.tensorboard import TensorBoardReporter
from qratk.reporting.terminal import TerminalReporter
from qratk.run import files


def standard_reporters(
    run_dir: str | Path,
    *,
    fit_config: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
    plain: bool | None = None,
    pictures: bool = True,
    tensorboard: bool = True,
) -> Reporters:
    """Files, pictures and TensorBoard in a run directory, then the terminal, whose summary names what they wrote."""
    folder = Path(run_dir)
    reporters: list[Reporter] = [RunFiles(folder, fit_config=fit_config)]
    if pictures:
        reporters.append(Pictures(folder))
    if tensorboard:
        reporters.append(TensorBoardReporter(folder / files.TENSORBOARD))
    return Reporters([*reporters, TerminalReporter(stream, plain, run_dir=folder)])
