"""Every file in configs/ is parsed, and its model, data and search are built."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert {"autoqra.yaml", "quickstart.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_parsed_and_built(path, monkeypatch):
    from qratk.backbone.module import FineTuneModule
    from qratk.cli import QratkCLI
    from qratk.data.base import TaskData
    from qratk.loop import SearchLoop

    built = []
    monkeypatch.setattr(QratkCLI, "search", lambda self, model, datamodule: built.append((model, datamodule, self)))
    QratkCLI("search", ["--config", str(path)])
    ((model, datamodule, cli),) = built
    assert isinstance(model, FineTuneModule)
    assert isinstance(datamodule, TaskData)
    assert isinstance(cli._loop(), SearchLoop)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_states_a_budget(path):
    import yaml

    search = yaml.safe_load(path.read_text())["search"]
    assert {"like", "limit", "max_average_bits"} & set(search)
