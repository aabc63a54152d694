"""Every recipe in `configs` can be laid over a base and does what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qratk.core.result import SearchResult
from qratk.reporters.multi import Reporters
from qratk.settings.merge import laid_over
from qratk.settings.recipe import from_section
from qratk.settings.sweeps import read_sweeps

CONFIGS = Path(__file__).parents[2] / "configs"
ABLATIONS = sorted(CONFIGS.glob("ablations/*.yaml"))
SWEEPS = CONFIGS / "sweeps" / "one_factor.yaml"
BASELINES = sorted(CONFIGS.glob("baselines/*.yaml"))
SMALL: dict[str, Any] = {
    "generations": 1,
    "max_evaluations": 3,
    "steps": [10, 30],
    "evaluator": {"init_args": {"num_layers": 5}},
}


def section(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["search"]


def searched(folder: Path, over: dict[str, Any]) -> SearchResult:
    base = section(CONFIGS / "simulated.yaml")
    return from_section(laid_over(laid_over(base, over), SMALL)).run(run_dir=folder, reporter=Reporters([]), config={})


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_searches_the_simulated_landscape(path, tmp_path):
    over = section(path)
    assert over["name"] == path.stem
    result = searched(tmp_path, over)
    assert result.plan.problem.feasible(result.best.configuration)


def sweep_values():
    """Every value of the sweeps; all but the first of each setting are slow."""
    seen = set()
    for swept in read_sweeps(SWEEPS):
        marks = [pytest.mark.slow] if swept.point.setting in seen else []
        seen.add(swept.point.setting)
        yield pytest.param(swept, id=swept.point.name, marks=marks)


@pytest.mark.parametrize("swept", list(sweep_values()))
def test_value_of_a_sweep_searches_the_simulated_landscape(swept, tmp_path):
    result = searched(tmp_path, swept.document["search"])
    assert result.plan.name == swept.point.name


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_baseline_measures_something_and_nothing_beside_it(path):
    over = section(path)
    base = section(CONFIGS / "quickstart.yaml")
    loop = from_section(laid_over(base, over))
    assert loop.planned_evaluations(baselines=2)[loop.ladder.highest] >= 1
    assert not loop.references  # they are references themselves


def test_bits_only_and_ranks_only_leave_the_other_knob_alone(tmp_path):
    bits = searched(tmp_path / "b", section(CONFIGS / "ablations" / "bits_only.yaml"))
    ranks = searched(tmp_path / "r", section(CONFIGS / "ablations" / "ranks_only.yaml"))
    assert {rank for e in bits.history for rank in e.configuration.ranks} == {8}
    assert {b for e in ranks.history for b in e.configuration.bits} == {4}


def test_without_multi_fidelity_everything_runs_to_the_end(tmp_path):
    result = searched(tmp_path, section(CONFIGS / "ablations" / "no_multi_fidelity.yaml"))
    assert {e.steps for e in result.history} == {30}


OTHERS = [path for path in BASELINES if path.stem != "autoqra_rslora"] + [
    CONFIGS / "ablations" / "as_published.yaml",
    *sorted(CONFIGS.parent.glob("plugins/*/*.yaml")),
]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_what_is_no_variant_of_the_default_takes_none_of_its_choices(path):
    given = yaml.safe_load(path.read_text())
    assert {"adapter", "init"} <= set(given["model"])
    assert {"seeds", "merge"} <= set(given["search"])
