"""`qratk search`: the search, or its continuation."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import yaml

from qratk.cli.application import SearchingCLI, run
from qratk.cli.blueprint import SettingsBlueprint
from qratk.cli.trainer import SearchTrainer
from qratk.core.errors import SearchError
from qratk.data.base import TaskData
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.multi import Reporters
from qratk.run import files
from qratk.run.atomic import write_atomically
from qratk.settings.identity import deciding
from qratk.training.module import FineTuneModule


class SearchCommand(SearchingCLI):
    """Runs a search, and tells `reporters` of it in place of those of its settings, if any are given."""

    command = "search"

    def __init__(self, arguments: Sequence[str] = (), *, reporters: Sequence[Reporter] | None = None) -> None:
        self._reporters = reporters
        super().__init__(arguments)

    def search(self, model: FineTuneModule, datamodule: TaskData) -> None:
        """Run the search, or continue it."""
        loop = self.loop
        loop.require_served(model)  # before there is a folder of the run
        run_dir = choose_run_dir(self.settings.run_dir, name=loop.name)
        config = self.resolved()
        save_config(config, run_dir)
        reporter = Reporters(loop.reporters if self._reporters is None else self._reporters)
        reporter.open(Destination(run_dir, fit_config(config, steps=loop.ladder.highest)))
        go_on = shlex.join(["qratk", "search", "--config", str(run_dir / files.CONFIG), "--run_dir", str(run_dir)])
        with resumable(go_on), closing(reporter):
            cast(SearchTrainer, self.trainer).search(
                model,
                datamodule,
                loop,
                run_dir=run_dir,
                reporter=reporter,
                config=deciding(config),
                blueprint=SettingsBlueprint(config),
            )


def search(arguments: Sequence[str], *, reporters: Sequence[Reporter] | None = None) -> int:
    """Exit status of `qratk search`; `reporters` as for `SearchCommand`."""
    return run(partial(SearchCommand, reporters=reporters), arguments)


def choose_run_dir(given: str | None, *, name: str) -> Path:
    """The folder that was asked for, or a new `runs/<time>-<name>`."""
    if given:
        return Path(given)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    tries = (Path("runs") / (stem + (f"-{n}" if n else "")) for n in range(1000))
    return next(path for path in tries if not path.exists())


def save_config(config: dict[str, Any], run_dir: Path) -> None:
    """Write `config.yaml` of a run; one that is there stays, for what was measured belongs to it."""
    path = run_dir / files.CONFIG
    if path.exists():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def fit_config(config: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """What `best.yaml` holds besides the configuration: a fit of as many steps as the search's highest rung."""
    trainer = {**config.get("trainer", {})}
    if trainer.get("max_steps") in (None, -1):
        trainer["max_steps"] = steps
    return {**config, "trainer": trainer}


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Context in which Ctrl-C ends with status 130 and the command that goes on.

    Lightning turns a KeyboardInterrupt inside a fit into a SystemExit, so the signal itself is remembered.
    """
    interrupted = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if not interrupted and isinstance(stop, SystemExit):
            raise SearchError(
                f"something in the search asked the process to exit (SystemExit({stop.code!r})) before there was a "
                f"result; to go on: {command}"
            ) from stop
        print(f"interrupted; to go on: {command}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)
