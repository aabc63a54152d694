"""Settings are laid over settings as the command line lays one file over another."""

from __future__ import annotations

import copy

from qratk.settings.merge import laid_over


def test_a_component_of_another_class_brings_its_own_options():
    base = {"searcher": {"class_path": "nsga2", "init_args": {"population": 9}}, "bits": [2, 4]}
    same = laid_over(base, {"searcher": {"class_path": "nsga2", "init_args": {"offspring": 3}}})
    other = laid_over(base, {"searcher": {"class_path": "random", "init_args": {"offspring": 3}}})
    plain = laid_over(base, {"searcher": {"init_args": {"offspring": 3}}, "bits": [4]})
    assert same["searcher"]["init_args"] == {"population": 9, "offspring": 3}
    assert other["searcher"]["init_args"] == {"offspring": 3}
    assert plain == {
        "searcher": {"class_path": "nsga2", "init_args": {"population": 9, "offspring": 3}},
        "bits": [4],
    }


def test_what_is_laid_over_changes_neither_of_the_two():
    base, over = {"a": {"b": [1]}}, {"a": {"c": [2]}}
    before = copy.deepcopy((base, over))
    merged = laid_over(base, over)
    merged["a"]["b"].append(3)
    merged["a"]["c"].append(3)
    assert (base, over) == before


def test_options_are_laid_over_a_component_that_was_given_by_its_name_alone():
    merged = laid_over({"searcher": "random", "repair": "greedy"}, {"searcher": {"offspring": 3}, "repair": "reject"})
    assert merged == {"searcher": {"class_path": "random", "offspring": 3}, "repair": "reject"}


def test_quantisers_by_bits_take_the_place_of_a_set_by_its_name():
    merged = laid_over({"quantizers": "portable"}, {"quantizers": {4: "nf4"}})
    assert merged == {"quantizers": {4: "nf4"}}
    assert laid_over(merged, {"quantizers": "portable"}) == {"quantizers": "portable"}
