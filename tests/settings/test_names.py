"""Names become import paths for the parser, and import paths become names in what is saved."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import EntryPoint

import pytest

from qratk.components import REGISTRIES
from qratk.core.errors import PluginError, UnknownComponentError
from qratk.quantizers.sets import quantizer_set
from qratk.registry import Registry
from qratk.settings import names
from qratk.settings.recipe import defaults

RANDOM = "qratk.searchers.random.RandomSearch"
NSGA2 = "qratk.searchers.nsga2.NSGA2"
TEXT = names.DATA_CLASSES["TextData"]


@pytest.mark.parametrize("slot", names.SLOTS)
def test_every_slot_of_the_search_takes_every_name_of_its_registry(slot):
    registry = REGISTRIES[names.SLOTS[slot]]
    for name in registry.names():
        assert names.resolve_section({slot: name}) == {slot: registry.class_path(name)}


def test_name_inside_class_path_is_resolved_and_options_stay():
    given = {"class_path": "nsga2", "init_args": {"population": 20}}
    assert names.resolve_component("searchers", given) == {"class_path": NSGA2, "init_args": {"population": 20}}


def test_lists_are_resolved_item_by_item():
    resolved = names.resolve_component("mutations", ["sensitivity", {"class_path": "coupled"}])
    registry = REGISTRIES["mutations"]
    assert resolved == [registry.class_path("sensitivity"), {"class_path": registry.class_path("coupled")}]


def test_import_paths_and_partial_options_stay_as_they_are():
    for given in ("my_package.Searcher", {"init_args": {"population": 3}}, None):
        assert names.resolve_component("searchers", given) == given


def test_only_components_are_touched():
    document = {"searcher": "random", "search": {"name": "random"}, "trainer": {"logger": {"class_path": "CSVLogger"}}}
    assert names.resolve_document(document) == document


def test_data_module_is_resolved_by_its_class_name():
    given = {"data": {"class_path": "TextData", "init_args": {"train": "a.jsonl"}}}
    path = names.DATA_CLASSES["TextData"]
    assert names.resolve_document(given)["data"] == {"class_path": path, "init_args": {"train": "a.jsonl"}}
    assert names.resolve_document({"data": "my_module.MyData"}) == {"data": "my_module.MyData"}


def test_members_of_a_data_module_are_resolved_and_named():
    def document(class_path):
        member = {"class_path": class_path, "init_args": {"train": "a.jsonl"}}
        tasks = {"one": {"data": class_path, "items": 2}, "two": {"data": member}}
        return {"init_args": {"train": [{"data": member, "weight": 2}], "validation": tasks}}

    suite = names.DATA_CLASSES["SuiteData"]
    named, resolved = ({"class_path": path, **document(of)} for path, of in (("SuiteData", "TextData"), (suite, TEXT)))
    assert names.resolve_document({"data": named}) == {"data": resolved}
    assert names.named_document({"data": resolved}) == {"data": named}
    assert names.named_document({"data": document(TEXT)}) == {"data": document("TextData")}
    assert names.resolve_arguments([f"--data={json.dumps(named)}"]) == [f"--data={json.dumps(resolved)}"]


@pytest.mark.parametrize(("name", "path"), names.DATA_CLASSES.items())
def test_every_data_module_is_where_its_name_says(name, path):
    module, _, class_name = path.rpartition(".")
    assert class_name == name
    assert hasattr(importlib.import_module(module), name)


def test_document_below_a_command_name_is_resolved():
    document = {"search": {"search": {"searcher": "random"}, "model": {}}}
    assert names.resolve_document(document, ("search",))["search"]["search"] == {"searcher": RANDOM}


def test_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownComponentError, match=r"'nsga3'; known are .*nsga2.*Did you mean 'nsga2'\?"):
        names.resolve_section({"searcher": "nsga3"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--search.searcher=random"], [f"--search.searcher={RANDOM}"]),
        (["--search.searcher", "random"], ["--search.searcher", RANDOM]),
        (["--search.searcher.class_path=random"], [f"--search.searcher.class_path={RANDOM}"]),
        (["--search.searcher.help", "random"], ["--search.searcher.help", RANDOM]),
        (["--search.searcher.population=20"], ["--search.searcher.population=20"]),
        (["--search.name=random", "--searcher=random"], ["--search.name=random", "--searcher=random"]),
        (["--search.searcher.help", "--x"], ["--search.searcher.help", "--x"]),
        (["--data=TextData"], [f"--data={TEXT}"]),
        (["--data", "TextData"], ["--data", TEXT]),
        (["--data.class_path", "qratk.former.TextData"], ["--data.class_path", TEXT]),
        (["--data.train=TextData"], ["--data.train=TextData"]),
    ],
)
def test_arguments_are_resolved(given, expected):
    assert names.resolve_arguments(given) == expected
    assert names.resolve_arguments(expected) == expected


def test_inline_lists_and_mappings_of_arguments_are_resolved():
    given = ["--search.mutations=[uniform]", "--search={searcher: random}"]
    first, second = (json.loads(text.partition("=")[2]) for text in names.resolve_arguments(given))
    assert first == [REGISTRIES["mutations"].class_path("uniform")]
    assert second == {"searcher": RANDOM}


def test_file_named_by_an_argument_is_resolved(tmp_path):
    path = tmp_path / "searcher.yaml"
    path.write_text("class_path: random\ninit_args: {offspring: 3}\n")
    (argument,) = names.resolve_arguments([f"--search.searcher={path}"])
    assert json.loads(argument.partition("=")[2]) == {"class_path": RANDOM, "init_args": {"offspring": 3}}


def with_entry_point(monkeypatch, value: str) -> None:
    """Replace the searchers by one third-party name."""
    registry: Registry = Registry("searchers", "GlobalSearcher")
    registry._plugins = {"third": EntryPoint("third", value, "qratk.searchers")}
    monkeypatch.setitem(REGISTRIES, "searchers", registry)


def test_third_party_name_resolves_to_its_class(monkeypatch):
    with_entry_point(monkeypatch, "qratk.searchers.random:RandomSearch")
    monkeypatch.setattr("qratk.searchers.random.RandomSearch.component_name", "random")
    assert names.resolve_component("searchers", "third") == RANDOM


def test_broken_plugin_names_where_it_comes_from(monkeypatch):
    with_entry_point(monkeypatch, "no_such_package:Searcher")
    with pytest.raises(PluginError, match="no_such_package"):
        names.resolve_component("searchers", "third")


def test_defaults_are_the_published_recipe():
    found = defaults()
    assert set(found) == set(names.SLOTS)
    assert found["searcher"] == {"class_path": NSGA2}
    assert len(found["mutations"]) == 2


def test_option_hint_lists_options_and_the_nearest():
    assert "offspring" in names.option_hint(RANDOM, "ofspring")
    assert names.option_hint(RANDOM, "ofspring").endswith("Did you mean 'offspring'?")


def test_an_adapter_with_options_is_no_class_for_the_parser_and_is_one_again_in_files():
    given = {"model": {"model": "m", "adapter": {"class_path": "cut", "init_args": {"width": 8}}}}
    resolved = names.resolve_document(given)
    assert resolved["model"]["adapter"] == {"cut": {"width": 8}}
    assert names.named_document(resolved) == given
    assert names.resolve_document(names.named_document(resolved)) == resolved
    bare = {"model": {"adapter": {"class_path": "qratk.adapters.cut.Cut"}}}
    assert names.named_document(names.resolve_document(bare))["model"]["adapter"] == {
        "class_path": "cut",
        "init_args": {},
    }
    for other in ("lora", {"class_path": "cut", "width": 3}, {"cut": {}, "lora": {}}, {}):
        assert names.resolve_document({"model": {"adapter": other}}) == {"model": {"adapter": other}}


def test_an_adapter_with_options_on_the_command_line():
    assert names.resolve_arguments(["--model.adapter", "{class_path: cut, init_args: {width: 8}}"]) == [
        "--model.adapter",
        json.dumps({"cut": {"width": 8}}),
    ]
    assert names.resolve_arguments(["--model.adapter=lora"]) == ["--model.adapter=lora"]


def test_a_set_of_quantisers_is_kept_as_what_it_stands_for():
    document = names.resolve_document({"model": {"quantizers": "portable"}, "search": {}})
    assert document["model"]["quantizers"] == quantizer_set("portable")
    assert names.named_document(document) == document
    other = {"model": {"quantizers": "portabel"}, "search": {}}
    assert names.resolve_document(other) == other  # the module says what is wrong with it
    (argument,) = names.resolve_arguments(["--model.quantizers=portable"])
    assert json.loads(argument.partition("=")[2])["4"]["class_path"] == "affine"
    assert names.resolve_arguments(["--model.quantizers={4: affine}"]) == ["--model.quantizers={4: affine}"]


def test_a_setting_that_python_cannot_name_is_renamed_for_the_parser_and_back():
    document = names.resolve_document({"search": {"for": "vllm"}})
    assert document == {"search": {"client": "vllm"}}
    assert names.named_document(document) == {"search": {"for": "vllm"}}
    assert names.resolve_arguments(["--search.for=vllm", "--search.for", "vllm", "--search.former=1"]) == [
        "--search.client=vllm",
        "--search.client",
        "vllm",
        "--search.former=1",
    ]
