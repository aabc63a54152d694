"""The settings of a search as a blueprint: another process builds model, data, trainer and evaluator from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml

from qratk.cli.application import SearchingCLI, find_local_classes
from qratk.cli.trainer import SearchTrainer
from qratk.data.base import TaskData
from qratk.executors.base import Equipment
from qratk.training.module import FineTuneModule


@dataclass(frozen=True)
class SettingsBlueprint:
    """Settings of `qratk search` as plain data, without secrets: libraries read theirs from the environment."""

    settings: dict[str, Any]

    def build(self) -> Equipment:
        """What the command builds of the same settings, but for the search itself."""
        built = built_from(self.settings)
        trainer = cast(SearchTrainer, built.trainer)
        return Equipment(built.loop.evaluator, built.model, built.datamodule, trainer.another)


def built_from(settings: Mapping[str, Any]) -> SearchingCLI:
    """Model, data, trainer and search of settings, as `qratk search` builds them; raises what the command does."""
    find_local_classes()
    return _BuildingCLI(["--config", yaml.safe_dump(dict(settings), allow_unicode=True)])


class _BuildingCLI(SearchingCLI):
    """Builds all that a search needs and runs nothing."""

    command = "search"

    def search(self, model: FineTuneModule, datamodule: TaskData) -> None:
        """Nothing: what was built is taken from outside."""
