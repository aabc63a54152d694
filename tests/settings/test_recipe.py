"""The default recipe from Python: names, options and objects."""

from __future__ import annotations

import pytest

from qratk.core import ConfigurationError, UnknownComponentError
from qratk.repairs.reject import RejectInfeasible
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator


def test_the_recipe_is_the_published_one_unless_told_otherwise() -> None:
    loop = autoqra(like=[4, 8])
    names = {slot: type(getattr(loop, slot)).component_name for slot in ("searcher", "refiner", "surrogate", "repair")}
    assert names == {"searcher": "nsga2", "refiner": "trust_region", "surrogate": "huber", "repair": "greedy"}
    assert [type(m).component_name for m in loop.mutations] == ["sensitivity", "coupled"]
    assert type(loop.bits_importance).component_name == "fisher_residual"


def test_a_component_is_given_by_name_by_options_or_as_an_object() -> None:
    evaluator, repair = ToyEvaluator(num_layers=2), RejectInfeasible()
    loop = autoqra(
        evaluator=evaluator, repair=repair, refiner="none", searcher={"nsga2": {"offspring": 7}}, mutations=["uniform"]
    )
    assert loop.evaluator is evaluator
    assert loop.repair is repair
    assert loop.searcher.generation_size == 7
    assert len(loop.mutations) == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownComponentError, match="Did you mean 'nsga2'"):
        autoqra(searcher="nsga")
    with pytest.raises(ConfigurationError, match="no option 'populatoin'"):
        autoqra(searcher={"nsga2": {"populatoin": 3}})
    with pytest.raises(ConfigurationError, match="name: options"):
        autoqra(searcher={"nsga2": {}, "random": {}})


@pytest.mark.parametrize(
    ("slot", "given"),
    [("mutations", {"sensitivity": {"gamma": 3.0}}), ("mutations", "sensitivity"), ("reporters", {"files": {}})],
)
def test_a_single_component_where_a_list_is_wanted_is_refused(slot: str, given: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"{slot} must be a list, as in"):
        autoqra(like=[4, 8], **{slot: given})
