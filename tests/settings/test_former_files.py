"""What was saved before components were saved by name is read: import paths of files that may have moved since."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from qratk.__main__ import main
from qratk.components import REGISTRIES
from qratk.registry import Registry
from qratk.settings import names
from qratk.settings.identity import comparable

FORMER = Path(__file__).parent / "former"
"""`config.yaml` and the journal (as SQL) of a search on the toy problem that was interrupted after 16 evaluations."""

PATHS: dict[str, dict[str, str]] = {
    "estimators": {
        "activation_error.ActivationError": "activation_error", "fisher_residual.FisherResidual": "fisher_residual",
        "gradient_norm.GradientNorm": "gradient_norm", "gradient_spectrum.GradientSpectrum": "gradient_spectrum",
        "hessian_trace.HessianTrace": "hessian_trace", "quantization_error.QuantizationError": "quantization_error",
        "uniform.Uniform": "uniform",
    },
    "mutations": {
        "coupled.MemoryBalancedCoupled": "coupled", "crossover_block.BlockCrossover": "crossover_block",
        "crossover_uniform.UniformCrossover": "crossover_uniform", "sensitivity.SensitivityGuided": "sensitivity",
        "swap.LevelSwitch": "swap", "uniform.UniformEdit": "uniform",
    },
    "repairs": {
        "greedy.GreedyDowngrade": "greedy", "optimal.OptimalDowngrade": "optimal",
        "reject.RejectInfeasible": "reject", "stochastic.StochasticDowngrade": "stochastic",
    },
    "surrogates": {
        "boosted_trees.BoostedTrees": "boosted_trees", "huber.HuberRegression": "huber",
        "gaussian_process.GaussianProcessRegression": "gaussian_process", "network.SmallNetwork": "network",
        "none.NoSurrogate": "none",
    },
    "searchers": {
        "ageing_evolution.AgeingEvolution": "ageing_evolution", "bohb.BOHB": "bohb",
        "decoupled.Decoupled": "decoupled", "fixed.FixedConfigurations": "fixed", "hyperband.Hyperband": "hyperband",
        "nsga2.NSGA2": "nsga2", "random.RandomSearch": "random",
    },
    "refiners": {
        "cocabo.CoCaBO": "cocabo", "hill_climb.HillClimb": "hill_climb", "none.NoRefiner": "none",
        "trust_region.TrustRegion": "trust_region", "turbo.Turbo": "turbo",
    },
    "quantizers": {
        "awq.AWQQuantizer": "awq", "gptq.GPTQQuantizer": "gptq", "hqq.HQQQuantizer": "hqq",
        "int8.Int8Quantizer": "int8", "nf4.NF4Quantizer": "nf4", "none.NoQuantizer": "none",
    },
    "evaluators": {
        "finetune.FineTuneEvaluator": "finetune", "frozen_divergence.FrozenDivergenceEvaluator": "frozen_divergence",
        "simulated.SimulatedEvaluator": "simulated",
    },
    "data": {
        "instruction.InstructionData": "InstructionData", "multiple_choice.MultipleChoiceData": "MultipleChoiceData",
        "text.TextData": "TextData",
    },
}  # fmt: skip
"""Every import path below `qratk.<kind>` that files of before hold, with the name that it stands for."""

KNOWN = [(kind, f"qratk.{kind}.{path}", name) for kind, paths in PATHS.items() for path, name in paths.items()]
KNOWN.append(("data", "qratk.embedded.datamodule.EmbeddedData", "EmbeddedData"))


@pytest.mark.parametrize(("kind", "path", "name"), KNOWN, ids=[path for _, path, _ in KNOWN])
def test_former_path_stands_for_its_name_wherever_the_class_is_by_now(kind: str, path: str, name: str) -> None:
    elsewhere = f"qratk.moved.deeper.{path.rpartition('.')[2]}"
    today = names.class_path(kind, name)
    for given in (path, elsewhere, today, name):
        assert names.registered_name(kind, given) == name
        assert names.class_path(kind, given) == today


@pytest.mark.parametrize("kind", REGISTRIES)
def test_class_names_of_an_open_set_differ_so_that_each_means_one_component(kind: str) -> None:
    known = [names.class_path(kind, name) for name in REGISTRIES[kind].names()]
    short = [(path.partition(".")[0], path.rpartition(".")[2]) for path in known]
    assert len(set(short)) == len(short)


def test_class_of_a_plugin_goes_by_its_name_also_when_its_file_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("searchers", "GlobalSearcher")
    registry._plugins = {"third": EntryPoint("third", "third_party.now.here:Searcher", "qratk.searchers")}
    monkeypatch.setitem(REGISTRIES, "searchers", registry)
    assert names.registered_name("searchers", "third_party.before.Searcher") == "third"
    assert names.registered_name("searchers", "fourth_party.Searcher") == "fourth_party.Searcher"


def test_class_of_a_user_stays_an_import_path_even_when_it_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("searchers", "GlobalSearcher")
    monkeypatch.setitem(REGISTRIES, "searchers", registry)
    mine = type("Mine", (), {"__module__": "strategies"})
    registry.register("mine")(mine)  # another process does not know it before its module is imported
    assert names.registered_name("searchers", "strategies.Mine") == "strategies.Mine"


def test_component_within_the_options_of_another_is_found_where_it_is_by_now() -> None:
    inner = {"class_path": "qratk.repairs.former.GreedyDowngrade", "init_args": {"epsilon": 0.2}}
    given = {"search": {"searcher": {"class_path": "my.Searcher", "init_args": {"repair": inner}}}}
    expected = {"class_path": names.class_path("repairs", "greedy"), "init_args": {"epsilon": 0.2}}
    for convert in (names.resolve_document, names.named_document):
        assert convert(given)["search"]["searcher"]["init_args"] == {"repair": expected}


def test_saved_document_holds_names_and_resolves_to_what_it_was() -> None:
    given = yaml.safe_load((FORMER / "config.yaml").read_text(encoding="utf-8"))
    named = names.named_document(given)
    assert paths_in(given) > paths_in(named) == {"qratk.testing.toy.ToyEvaluator"}  # a class without a name
    assert names.named_document(named) == named
    assert names.named_document(names.resolve_document(named)) == named
    assert names.resolve_document(named) == names.resolve_document(given)


def test_settings_of_a_former_journal_compare_equal_to_those_of_today() -> None:
    former = {
        "search.searcher.class_path": "qratk.searchers.nsga2.NSGA2", "search.searcher.init_args.population": 4,
        "search.mutations": [{"class_path": "qratk.mutations.coupled.MemoryBalancedCoupled"}],
        "model.quantizers.4": "hqq", "model.quantizers.2.class_path": "qratk.quantizers.hqq.HQQQuantizer",
        "model.bank_dir": "x", "lm_eval.tasks": [], "data.class_path": "qratk.data.text.TextData",
        "search.patterns.mlp": [4, 8], "search.patterns.mlp.up": [2, 8], "search.refiner.init_args": {},
    }  # fmt: skip
    assert comparable(former) == {
        "search.searcher.class_path": "nsga2", "search.searcher.init_args.population": 4,
        "search.mutations": [{"class_path": "coupled"}], "model.quantizers.4": "hqq",
        "model.quantizers.2.class_path": "hqq", "data.class_path": "TextData",
        "search.patterns.mlp": [4, 8], "search.patterns.mlp.up": [2, 8],
    }  # fmt: skip


@pytest.fixture
def former_run(tmp_path: Path) -> Path:
    """A run directory of before that was interrupted."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(FORMER / "config.yaml", run)
    with closing(sqlite3.connect(run / "journal.sqlite")) as database:
        database.executescript((FORMER / "journal.sql").read_text(encoding="utf-8"))
    return run


def test_run_directory_of_before_goes_on_and_ends_as_it_would_have(former_run: Path) -> None:
    """Measured before names were saved: the whole search, by the version that left this journal."""
    assert main(["search", "--config", str(former_run / "config.yaml"), "--run_dir", str(former_run)]) == 0
    best = json.loads((former_run / "result.json").read_text(encoding="utf-8"))["best"]
    assert (best["configuration"], best["score"]) == ("2:16*2 4:8 8:16", 0.06845629493919833)
    assert (former_run / "evaluations.csv").read_text(encoding="utf-8").count("\n") == 1 + 33


def test_what_a_new_run_saves_holds_no_import_path(former_run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    shorter = ["--search.refiner.max_evaluations=1", "--search.generations=1"]
    assert main(["search", "--config", str(former_run / "config.yaml"), "--run_dir", str(new), *shorter]) == 0
    known = {"qratk.testing.toy.ToyEvaluator"}  # a class without a name
    for name in ("config.yaml", "best.yaml"):
        assert paths_in(yaml.safe_load((new / name).read_text(encoding="utf-8"))) == known
    with closing(sqlite3.connect(new / "journal.sqlite")) as database:
        held = [text for row in database.execute("SELECT key, value FROM meta") for text in row]
        held += [text for row in database.execute("SELECT key, value FROM decisions") for text in row]
    assert {text for text in held if "qratk." in text} == {json.dumps(path) for path in known}


def paths_in(value: Any) -> set[str]:
    """All texts of plain data that begin as import paths of the project do."""
    if isinstance(value, dict):
        return {path for item in value.values() for path in paths_in(item)}
    if isinstance(value, list):
        return {path for item in value for path in paths_in(item)}
    return {value} if isinstance(value, str) and value.startswith("qratk.") else set()
