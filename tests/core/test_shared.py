"""Shared settings of a configuration: one text for equal settings, ladders of numbers and of names."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.shared import SharedLadder, shared_ladders

TEXT = "4:8*3 2:16 | learning_rate=0.0004 rslora=true schedule=linear warmup_steps=4"


def test_text_with_settings_reads_back() -> None:
    configuration = Configuration.from_text(TEXT)
    assert str(configuration) == TEXT
    assert configuration.bits == (4, 4, 4, 2)
    assert configuration.settings == {
        "learning_rate": 0.0004, "rslora": True, "schedule": "linear", "warmup_steps": 4,
    }  # fmt: skip


@pytest.mark.parametrize("value", [1e-5, 1e-4, 0.1, 3, -2, 1e20, 123456789.125, True, False, "lq_lora", "a.b-c"])
def test_every_value_survives_text_and_yaml(value: float | bool | str) -> None:
    configuration = Configuration.uniform(4, 8, 2).with_shared({"option": value})
    text = yaml.safe_load(yaml.safe_dump({"configuration": str(configuration)}))["configuration"]
    assert Configuration.from_text(text) == configuration
    assert type(Configuration.from_text(text).settings["option"]) is type(configuration.settings["option"])
    assert yaml.safe_load(f"configuration: {configuration}") == {"configuration": str(configuration)}


def test_equal_settings_have_one_text_and_one_digest() -> None:
    layers = Configuration.uniform(4, 8, 3).layers
    first = Configuration(layers, (("rslora", True), ("learning_rate", 1.0)))
    second = Configuration(layers, (("learning_rate", 1), ("rslora", True)))
    assert (first, str(first), first.digest, hash(first)) == (second, str(second), second.digest, hash(second))


def test_without_settings_nothing_is_other_than_the_layers_alone() -> None:
    bare = Configuration.uniform(4, 8, 3)
    assert str(bare) == "4:8*3"
    assert hash(bare) == hash(bare.layers)
    assert bare.digest == hashlib.sha256(b"4:8*3").hexdigest()[:16]
    assert sorted([bare, Configuration.uniform(2, 8, 3)]) == [Configuration.uniform(2, 8, 3), bare]


def test_settings_tell_configurations_apart_and_stay_when_a_layer_changes() -> None:
    configuration = Configuration.from_text(TEXT)
    other = configuration.with_shared({**configuration.settings, "learning_rate": 0.001})
    assert other != configuration
    assert other.digest != configuration.digest
    assert configuration.replace(0, bits=2).shared == configuration.shared
    assert configuration.with_shared(()) == Configuration.from_text("4:8*3 2:16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4:8 |", "no setting follows the bar"),
        ("4:8 | learning_rate", "not of the form name=value"),
        ("4:8 | learning_rate=1 learning_rate=2", "given once"),
        ("4:8 | learning_rate=nan", "neither a finite number"),
        ("4:8 | 2x=1", "no name of an option"),
        ("4:8 | a=b=c", "nor a name"),
        ("4:8 | a=", "nor a name"),
        ("4:8 learning_rate=1", "not of the form bits:rank"),
    ],
)
def test_what_is_no_setting_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Configuration.from_text(text)


@pytest.mark.parametrize(
    "values", [(), (1, 1), (2, 1), (1, "linear"), (True, 1), ("linear", "linear"), (True, True), (float("inf"),)]
)
def test_ladder_is_ascending_numbers_or_different_names(values: tuple[bool | float | str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="option"):
        SharedLadder("option", values)


def test_numbers_are_as_far_apart_as_rungs_and_names_all_alike() -> None:
    rates = SharedLadder("learning_rate", ("1e-3", 3e-3, 1e-2))
    assert rates.values == (0.001, 0.003, 0.01)
    assert (rates.ordinal, rates.distance(0, 2), rates.steps(0), rates.steps(1)) == (True, 2, (1,), (0, 2))
    names = SharedLadder("schedule", ("constant", "linear", "cosine"))
    assert (names.ordinal, names.distance(0, 2), names.steps(0)) == (False, 1, (1, 2))


def test_true_is_not_taken_for_one() -> None:
    assert SharedLadder("rslora", (False, True)).index(True) == 1
    with pytest.raises(ConfigurationError, match="rslora must be one of"):
        SharedLadder("rslora", (False, True)).index(1)


def test_ladders_come_sorted_by_name() -> None:
    ladders = shared_ladders({"rslora": [False, True], "learning_rate": [0.1]})
    assert [ladder.name for ladder in ladders] == ["learning_rate", "rslora"]
