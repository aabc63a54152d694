"""Every file in configs/ is parsed, alone or laid over a base, and its model, data and search are built."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest

from qratk.components import REGISTRIES

ROOT = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(ROOT.glob("*.yaml"))
OVERLAYS = [("quickstart.yaml", path) for path in sorted(ROOT.glob("baselines/*.yaml"))] + [
    ("simulated.yaml", path) for path in sorted(ROOT.glob("ablations/*.yaml"))
]
OF_PLUGINS = sorted((ROOT.parent / "plugins").glob("*/*.yaml"))


def test_there_are_configs():
    assert {"autoqra.yaml", "quickstart.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_parsed_and_built(path, monkeypatch):
    build([path], monkeypatch)


@pytest.mark.parametrize(("base", "path"), OVERLAYS, ids=lambda given: Path(given).name)
def test_recipe_is_parsed_over_its_base(base, path, monkeypatch):
    loop = build([ROOT / base, path], monkeypatch)
    assert loop.name == path.stem


@pytest.mark.parametrize("path", sorted(ROOT.glob("targets/*.yaml")), ids=lambda path: path.name)
def test_target_is_laid_over_a_base_by_its_name_and_changes_the_model_alone(path, monkeypatch):
    base = build([ROOT / "quickstart.yaml"], monkeypatch)
    loop = build([ROOT / "quickstart.yaml", path.stem], monkeypatch)
    assert loop.name == base.name
    assert (loop.bits, loop.ranks, loop.steps, loop.like) == (base.bits, base.ranks, base.steps, base.like)


@pytest.mark.parametrize("path", OF_PLUGINS, ids=lambda path: path.name)
def test_recipe_of_a_plugin_is_parsed_and_built(path, monkeypatch):
    package = path.parent.name
    if not any(distribution.name == package for distribution in distributions()):
        pytest.skip(f"{package} is not installed: pip install --no-deps -e plugins/{package}")
    assert build([ROOT / "quickstart.yaml", path], monkeypatch).name == path.stem


def build(paths, monkeypatch):
    """The search loop that the command line builds of some files."""
    from qratk.cli.search import SearchCommand
    from qratk.data.base import TaskData
    from qratk.loop import SearchLoop
    from qratk.training.module import FineTuneModule

    built = []
    monkeypatch.setattr(
        SearchCommand, "search", lambda self, model, datamodule: built.append((model, datamodule, self))
    )
    SearchCommand([word for path in paths for word in ("--config", str(path))])
    ((model, datamodule, cli),) = built
    assert isinstance(model, FineTuneModule)
    assert isinstance(datamodule, TaskData)
    loop = cli.loop
    assert isinstance(loop, SearchLoop)
    return loop


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_states_a_budget(path):
    import yaml

    search = yaml.safe_load(path.read_text())["search"]
    assert {"like", "limit", "max_average_bits"} & set(search)


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_strategy_is_in_the_list_of_strategies(kind):
    text = (Path(__file__).parents[1] / "docs" / "strategies.md").read_text()
    words = set(re.findall(r"[a-z0-9_-]+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert set(REGISTRIES[kind].names()) <= words
