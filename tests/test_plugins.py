"""The example package in plugins/, once installed, is a component like any other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml

from qratk.core.errors import ConfigurationError
from qratk.estimators.base import ImportanceEstimator, estimators
from qratk.registry import Registry
from qratk.testing import EstimatorContract

PACKAGE, NAME = "qratk-layer-position", "depth_prior"


def is_installed() -> bool:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not is_installed(),
    reason=f"{PACKAGE} is not installed: pip install --no-deps --no-build-isolation -e plugins/{PACKAGE}",
)


def test_plugin_is_listed_beside_the_built_in_ones() -> None:
    assert {NAME, "fisher_residual", "uniform"} <= set(estimators.names())


def test_plugin_names_the_package_that_it_comes_from() -> None:
    assert estimators.owner(NAME) == PACKAGE
    assert estimators.owner("uniform") == "qratk"


def test_plugin_is_chosen_by_its_name() -> None:
    estimator = estimators.create(NAME, last=2.0)
    assert isinstance(estimator, ImportanceEstimator)
    assert estimators.class_path(NAME) == "qratk_layer_position.DepthPrior"


def test_options_of_the_plugin_are_known_and_checked() -> None:
    assert [option.name for option in estimators.options(NAME)] == ["first", "last", "middle", "power"]
    with pytest.raises(ConfigurationError, match="Did you mean 'power'"):
        estimators.create(NAME, powr=2.0)


def test_listing_names_does_not_import_the_plugin() -> None:
    code = (
        "import sys; from qratk.estimators.base import estimators; "
        f"assert {NAME!r} in estimators.names(); assert 'qratk_layer_position' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry_made_anew_finds_it_too() -> None:
    registry: Registry[ImportanceEstimator] = Registry("estimators", "ImportanceEstimator")
    assert NAME in registry


class TestPluginContract(EstimatorContract):
    @pytest.fixture
    def make(self) -> Callable[[], ImportanceEstimator]:
        return lambda: estimators.create(NAME)


def test_plugin_is_chosen_from_yaml_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loop that a command would build holds the plugin's estimator with the options of the file."""
    from qratk.__main__ import main

    (tmp_path / "recipe.yaml").write_text(
        "model: {model: embedded}\ndata: EmbeddedData\n"
        "search: {like: [4, 8], bits_importance: {class_path: depth_prior, init_args: {last: 3.0}}}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["search", "--config", str(tmp_path / "recipe.yaml"), "--print_config"])
    assert stop.value.code in (0, None)
    chosen = yaml.safe_load(capsys.readouterr().out)["search"]["bits_importance"]
    assert chosen["class_path"] == NAME
    assert chosen["init_args"]["last"] == 3.0
