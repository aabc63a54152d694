"""Options of the module that cannot be are refused before anything is loaded, all at once."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from qratk.core.errors import ConfigurationError
from qratk.peaks.foretold import memory_model
from qratk.training.module import FineTuneModule
from qratk.training.options import FineTuneOptions


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("betas", (1.5, 0.9)),
        ("betas", (0.9, 0.99, 0.999)),
        ("warmup_steps", -5),
        ("schedule_steps", 0),
        ("schedule_steps", -3),
        ("seed", -1),
        ("lora_dropout", 1.0),
        ("alpha_over_rank", 0.0),
        ("init_iterations", 0),
        ("input_groups", 0),
        ("calibration_sequences", 0),
        ("bank_dir", ""),
        ("quantizers", {4: 3}),
    ],
)
def test_option_that_cannot_be_is_refused_by_its_name(option, value):
    with pytest.raises(ConfigurationError, match=option) as caught:
        FineTuneModule("nowhere", **{option: value})
    assert [problem.option for problem in caught.value.problems] == [option]


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigurationError) as caught:
        FineTuneModule("nowhere", learning_rate=-1.0, warmup_steps=-5, bank_dir="")
    assert {problem.option for problem in caught.value.problems} == {"learning_rate", "warmup_steps", "bank_dir"}


def test_options_are_the_arguments_of_the_constructor_and_cannot_be_changed():
    arguments = inspect.signature(FineTuneModule.__init__).parameters.keys() - {"self"}
    assert {field.name for field in dataclasses.fields(FineTuneOptions)} == arguments
    module = FineTuneModule("nowhere", learning_rate=0.5, betas=(0.5, 0.75))
    assert (module.options.learning_rate, module.options.betas, module.options.seed) == (0.5, (0.5, 0.75), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.options.seed = 1


def test_home_folder_is_expanded_in_the_models_name(monkeypatch):
    given = []
    monkeypatch.setenv("HOME", "/homes/somebody")
    monkeypatch.setattr(
        "qratk.backbone.backbone.Backbone.load", lambda model, **options: given.append((model, options))
    )
    FineTuneModule("~/model", tokenizer="~/words").load_backbone()
    FineTuneModule("./here").load_backbone()
    assert [model for model, _ in given] == ["/homes/somebody/model", "./here"]
    assert given[0][1]["tokenizer"] == "/homes/somebody/words"
    assert given[1][1]["tokenizer"] is None


def test_plan_and_fit_refuse_ranks_above_the_matrices_alike(model_dir):
    from qratk.core.space import SearchSpace

    module = FineTuneModule(str(model_dir), configuration="4:1000000000", bank_dir=None)
    with pytest.raises(ConfigurationError, match="rank 1000000000 is above the matrices"):
        module.setup("validate")
    backbone = module.load_backbone(weights=False)
    names = tuple(shape.name for shape in backbone.shapes)
    with pytest.raises(ConfigurationError, match="rank 1000000000 is above the matrices"):
        memory_model(backbone, SearchSpace((4,), (1000000000,), names))
