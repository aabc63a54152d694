"""Which searches a comparison stands for."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from qratk.compare.grid import COMPARED, BudgetChoice, Grid, Recipe, read_compared
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.settings.sweeps import SweepPoint


@pytest.fixture
def files(tmp_path):
    """A base and three recipes."""
    documents = {
        "base": {"model": {"model": "embedded"}, "search": {"name": "full", "like": [4, 8]}},
        "random": {"search": {"searcher": "random"}},
        "lora": {"search": {"like": [16, 16]}},
        "capped": {"search": {"max_average_bits": 4}},
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return {name: tmp_path / f"{name}.yaml" for name in documents}


def grid(files, *names, budgets=(), seeds=(0,), folder="out", **options):
    return Grid.of(
        files["base"].parent / folder, [files["base"]], [files[name] for name in names], budgets, seeds, **options
    )


@pytest.mark.parametrize(
    ("text", "label", "document"),
    [
        ("[4, 16]", "like-4-16", {"like": [4, 16], "limit": None}),
        ("300KiB", "300KiB", {"like": None, "limit": "300KiB"}),
        ("5.5 GiB", "5.5GiB", {"like": None, "limit": "5.5GiB"}),
    ],
)
def test_budget_is_a_pair_or_a_size(text, label, document):
    budget = BudgetChoice.parse(text)
    assert budget.label == label
    assert budget.document == {"search": document}


@pytest.mark.parametrize("text", ["[4]", "lots", "4:16", "[a, b]", "0KiB"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigurationError, match="a pair"):
        BudgetChoice.parse(text)


def test_command_lays_budget_over_base_and_recipe_over_both(files):
    made = grid(files, "random", budgets=["[4, 16]"], seeds=[3], base=False, extra=["--search.generations=2"])
    (cell,) = made.cells
    made.prepare()
    budget = made.folder / "budgets" / "like-4-16.yaml"
    assert made.arguments(cell) == [
        *("--config", str(files["base"]), "--search.generations=2"),
        *("--config", str(budget), "--config", str(files["random"])),
        *("--seed_everything=3", "--model.seed=3", "--data.seed=3", "--search.seed=3"),
        *("--run_dir", str(made.folder / "random" / "like-4-16" / "3")),
    ]
    assert yaml.safe_load(budget.read_text()) == {"search": {"like": [4, 16], "limit": None}}


def test_base_is_a_recipe_without_an_overlay(files):
    (cell,) = grid(files).cells
    assert cell.recipe.name == "full"
    assert cell.folder.parts[-3:] == ("full", "own", "0")
    assert grid(files).arguments(cell).count("--config") == 1


def test_recipe_with_a_budget_of_its_own_runs_once_and_forgets_the_others(files):
    made = grid(files, "lora", "capped", budgets=["[4, 16]", "1MiB"], base=False)
    assert [(cell.recipe.name, cell.label) for cell in made.cells] == [
        ("lora", "own"), ("capped", "like-4-16"), ("capped", "1MiB"),
    ]  # fmt: skip
    made.prepare()
    forgotten = yaml.safe_load((made.folder / "budgets" / "own.yaml").read_text())
    assert forgotten == {"search": {"like": None, "limit": None}}
    assert made.identity(made.cells[0])["settings"]["search"]["like"] == [16, 16]


def test_seeds_go_first_so_that_an_interrupted_comparison_is_one_of_fewer_seeds(files):
    cells = grid(files, "random", seeds=[0, 1]).cells
    assert [(cell.seed, cell.recipe.name) for cell in cells] == [
        (0, "full"), (0, "random"), (1, "full"), (1, "random"),
    ]  # fmt: skip


def test_duplicates_are_errors(files, tmp_path):
    other = tmp_path / "more" / "random.yaml"
    other.parent.mkdir()
    other.write_text("search: {searcher: random}")
    with pytest.raises(ConfigurationError, match="two recipes are called 'random'"):
        Grid.of(tmp_path / "out", [files["base"]], [files["random"], other], [], [0])
    with pytest.raises(ConfigurationError, match="two budgets are called 'like-4-8'"):
        grid(files, budgets=["[4, 8]", "[4,8]"])
    with pytest.raises(ConfigurationError, match="two seeds"):
        grid(files, seeds=[1, 1])


def test_cell_with_other_settings_is_refused_before_anything_runs(files):
    grid(files, "random").prepare()
    files["random"].write_text("search: {searcher: nsga2}")
    with pytest.raises(RunDirectoryError, match=r"  search.searcher: random there, nsga2 now"):
        grid(files, "random").prepare()


def test_cell_is_the_same_however_the_model_is_held(files):
    grid(files).prepare()
    grid(files, extra=["--model.dense_cache=off"]).prepare()
    with pytest.raises(RunDirectoryError, match=r"  model.rank"):
        grid(files, extra=["--model.rank=3"]).prepare()


def test_search_of_another_command_is_not_taken_over(files):
    made = grid(files)
    (cell,) = made.cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "result.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="did not begin"):
        made.prepare()


def test_what_was_compared_grows_with_later_commands(files):
    grid(files, "random").prepare()
    grid(files, "lora", budgets=["[4, 16]"], base=False).prepare()
    compared = read_compared(files["base"].parent / "out")
    assert list(compared.recipes) == ["full", "random", "lora"]
    assert compared.budgets == ("own", "like-4-16")
    assert compared.base == "full"


def test_states_of_a_cell(files):
    made = grid(files)
    (cell,) = made.cells
    made.prepare()
    states = [cell.state]
    for name in ("journal.sqlite", "failure.json", "result.json"):
        (cell.folder / name).write_text("")
        states.append(cell.state)
    assert states == ["new", "begun", "failed", "finished"]


@pytest.mark.parametrize("text", ["- 1", "search: 3", "a: ["])
def test_recipe_that_holds_no_settings_is_told(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"wrong\.yaml"):
        Recipe.read(path)


def test_cell_is_the_same_whether_a_component_goes_by_its_name_or_by_its_import_path(files):
    grid(files, "random").prepare()
    files["random"].write_text("search: {searcher: qratk.searchers.random.RandomSearch}")
    grid(files, "random").prepare()


def test_each_value_of_a_sweep_is_a_recipe_named_by_setting_and_value(files, tmp_path):
    sweep = tmp_path / "mine.yaml"
    sweep.write_text("alpha: [0.5]\nsearcher.nsga2.offspring: [3, 9]\nrefiner: [{low: {refiner: none}}]\n")
    made = Grid.of(tmp_path / "out", [files["base"]], [], [], [0], sweeps=[sweep], base=False)
    made.prepare()
    assert [recipe.name for recipe in made.recipes] == [
        "sweep-alpha-0.5", "sweep-offspring-3", "sweep-offspring-9", "sweep-refiner-low"
    ]  # fmt: skip
    path = made.recipes[1].path
    expected = {"name": "sweep-offspring-3", "searcher": {"class_path": "nsga2", "init_args": {"offspring": 3}}}
    assert yaml.safe_load(path.read_text()) == {"search": expected}
    assert str(path) in made.arguments(made.cells[1])
    kept = {name: entry.sweep for name, entry in read_compared(tmp_path / "out").recipes.items()}
    assert kept["sweep-offspring-3"] == SweepPoint("searcher.nsga2.offspring", "3")
    assert kept["sweep-refiner-low"] == SweepPoint("refiner", "low")


def test_name_of_a_recipe_says_nothing_of_a_sweep_but_in_comparisons_of_before(files):
    files["sweep-alpha-0.5"] = files["random"].with_name("sweep-alpha-0.5.yaml")
    files["sweep-alpha-0.5"].write_text("search: {alpha: 0.5}")
    grid(files, "sweep-alpha-0.5").prepare()
    path = files["base"].parent / "out" / COMPARED
    assert read_compared(path.parent).recipes["sweep-alpha-0.5"].sweep is None
    before = json.loads(path.read_text())
    del before["version"]
    for entry in before["recipes"].values():
        del entry["sweep"]
    path.write_text(json.dumps(before))
    assert read_compared(path.parent).recipes["sweep-alpha-0.5"].sweep == SweepPoint("alpha", "0.5")
    assert read_compared(path.parent).recipes["full"].sweep is None


@pytest.mark.parametrize("text", ["alpha: 3", "alpha: []", "model.rank: [1]", "a: [1, 1]", "refiner: [{low: 3}]"])
def test_file_that_is_no_sweep_is_refused(files, tmp_path, text):
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(text)
    with pytest.raises(ConfigurationError, match=r"mine\.yaml"):
        Grid.of(tmp_path / "out", [files["base"]], [], [], [0], sweeps=[sweep])


def test_full_runs_to_spend_lie_over_every_recipe_too(files):
    made = grid(files, "random", runs=24.0)
    made.prepare()
    assert yaml.safe_load((made.folder / "tune.yaml").read_text()) == {"search": {"full_runs": 24.0}}
    assert all(made.arguments(cell)[-7:].count(str(made.folder / "tune.yaml")) == 1 for cell in made.cells)
    with pytest.raises(RunDirectoryError, match=r"search\.full_runs: 24\.0 there, 30\.0 now"):
        grid(files, "random", runs=30.0).prepare()


def test_what_is_tuned_lies_over_every_recipe_and_is_part_of_what_a_cell_is(files):
    files["tuned"] = files["base"].parent / "tuned.yaml"
    files["tuned"].write_text(yaml.safe_dump({"search": {"shared": {"learning_rate": [0.5], "rslora": [True]}}}))
    made = grid(files, "tuned", tune="{learning_rate: [1e-3, 1e-2]}")
    made.prepare()
    assert yaml.safe_load((made.folder / "tune.yaml").read_text()) == {
        "search": {"shared": {"learning_rate": [0.001, 0.01]}}
    }
    base, tuned = made.cells
    for cell in (base, tuned):
        arguments = made.arguments(cell)
        configs = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
        assert configs[-1] == str(made.folder / "tune.yaml")
    assert made.identity(base)["settings"]["search"]["shared"] == {"learning_rate": [0.001, 0.01]}
    assert made.identity(tuned)["settings"]["search"]["shared"] == {"learning_rate": [0.001, 0.01], "rslora": [True]}
    with pytest.raises(RunDirectoryError, match="other settings"):
        grid(files, "tuned", tune="{learning_rate: [1e-3]}").prepare()
    with pytest.raises(RunDirectoryError, match="other settings"):
        grid(files, "tuned").prepare()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate", "a mapping of settings to their values"),
        ("{learning_rate: 1e-3}", "a mapping of settings to their values"),
        ("{learning_rat: [1e-3]}", "learning_rat: is no option .* Did you mean 'learning_rate'"),
        ("{learning_rate: [1e-2, 1e-3]}", "must be an ascending ladder"),
        ("{weight_decay: [-1]}", "weight_decay must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_runs(files, text, said):
    with pytest.raises(ConfigurationError, match=said):
        grid(files, tune=text)
