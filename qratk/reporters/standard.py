"""The reporters that `qratk search` uses unless it is told others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qratk.reporters.base import Destination, Reporter
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.reporters.pictures import Pictures
from qratk.reporters.tensorboard import TensorBoardReporter
from qratk.reporters.terminal import TerminalReporter


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
    chosen: list[Reporter] = [RunFiles()]
    if pictures:
        chosen.append(Pictures())
    if tensorboard:
        chosen.append(TensorBoardReporter())
    chosen.append(TerminalReporter(plain) if stream is None else TerminalReporter.to(stream, plain))
    made = Reporters(chosen)
    made.open(Destination(Path(run_dir), fit_config or {}))
    return made
