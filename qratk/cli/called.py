"""A search from Python, in the run folder that the command would make of the same settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qratk.cli.blueprint import SettingsBlueprint, built_from
from qratk.cli.search import fit_config, save_config
from qratk.cli.trainer import SearchTrainer, check_options
from qratk.core.errors import CommandLineError, ConfigurationError
from qratk.core.result import SearchResult
from qratk.core.secrets import without_secrets
from qratk.data.base import TaskData
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.multi import Reporters
from qratk.settings.description import Description, described
from qratk.settings.identity import deciding
from qratk.settings.recipe import autoqra
from qratk.training.module import FineTuneModule


def search(
    module: FineTuneModule,
    datamodule: TaskData,
    *,
    run_dir: str | Path,
    trainer: Mapping[str, Any] | None = None,
    reporters: Sequence[str | Mapping[str, Any] | Reporter] | None = None,
    **settings: Any,
) -> SearchResult:
    """What a search of bits and ranks found; the same call on the same `run_dir` goes on.

    Args:
        module, datamodule: model and data; the search sets the configuration.
        run_dir: folder of the run. Its `config.yaml` says the same as the call, for `qratk search` and for processes
            beside this one; there is none where an argument is an object that no file can hold.
        trainer: options of Lightning's Trainer.
        reporters: who is told, by name, as {name: options} or as objects; by default those of the command.
        settings: of the search, as `autoqra` takes them.

    Raises `ConfigurationError`, `RunDirectoryError`, `InfeasibleBudgetError`, or `SearchError` when nothing could be
    measured.
    """
    given = settings if reporters is None else {**settings, "reporters": reporters}
    loop, folder, options = autoqra(**given), Path(run_dir), dict(trainer or {})
    call = _called(described(module, datamodule, options, settings), options)
    if call.blueprint is not None:
        save_config(call.config, folder)
    reporter = Reporters(loop.reporters)
    reporter.open(Destination(folder, fit_config(call.config, steps=loop.ladder.highest)))
    with closing(reporter):
        return call.trainer.search(
            module,
            datamodule,
            loop,
            run_dir=folder,
            reporter=reporter,
            config=deciding(call.config),
            blueprint=call.blueprint,
        )


@dataclass(frozen=True)
class _Call:
    """All settings of a call, without secrets, what builds the same elsewhere (None where no file can), the trainer."""

    config: dict[str, Any]
    blueprint: SettingsBlueprint | None
    trainer: SearchTrainer


def _called(description: Description, options: Mapping[str, Any]) -> _Call:
    if description.unwritable:
        check_options(options)
        trainer = SearchTrainer(**{"use_distributed_sampler": False, **options})
        return _Call(without_secrets(description.document), None, trainer)
    try:
        built = built_from(description.document)
    except CommandLineError as error:
        raise ConfigurationError(error.message) from error
    config = built.resolved()
    return _Call(config, SettingsBlueprint(config), cast(SearchTrainer, built.trainer))
