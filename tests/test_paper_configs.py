"""The paper's set-up as shipped: its four models planned by their hub names, and the same for SmolLM2-135M."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qratk.cli.shipped import configuration, recipes
from qratk.settings.merge import laid_over
from qratk.settings.names import named_document
from qratk.settings.reading import read_settings

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama_3_1_8b": (
        "meta-llama/Llama-3.1-8B",
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        8_030_261_248,
    ),
    "llama_3_2_3b": (
        "meta-llama/Llama-3.2-3B",
        LLAMA
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
        | {"head_dim": 128, "tie_word_embeddings": True},
        3_212_749_824,
    ),
    "qwen2_5_7b": (
        "Qwen/Qwen2.5-7B",
        QWEN
        | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "qwen2_5_3b": (
        "Qwen/Qwen2.5-3B",
        QWEN
        | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        3_085_938_688,
    ),
}
"""Hub name, sizes as published, and published number of parameters of each configuration's model."""
TASKS = {"arc_challenge", "arc_easy", "boolq", "gsm8k", "hellaswag", "openbookqa", "piqa", "winogrande"}
"""Columns of the paper's Table 2."""
RIVALS = (
    "at_most_4_bits",
    "lora16",
    "qlora",
    "adalora",
    "loftq",
    "lq_lora",
    "amq_lora",
    "amq_adalora",
    "cut_high",
    "as_published",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with the configurations of the models, and a tokenizer; there is no network."""
    from qratk.embedded import model_directory

    for name, sizes, _ in MODELS.values():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        (snapshot / "config.json").write_text(json.dumps(sizes))
        for path in model_directory().glob("tokenizer*"):  # of another model: what lengths are counted by
            (snapshot / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_is_loaded_by_its_hub_name_with_all_projections_to_be_searched(name: str, hub: Path) -> None:
    from qratk.training.module import FineTuneModule

    hub_name, sizes, published = MODELS[name]
    settings = laid_over(read_settings(Path(configuration("paper"))), read_settings(Path(configuration(name))))
    assert settings["model"]["model"] == hub_name
    backbone = FineTuneModule(hub_name).load_backbone(weights=False)
    assert len(backbone.shapes) == sizes["num_hidden_layers"]
    embeddings = sizes["hidden_size"] * sizes["vocab_size"] * (1 if sizes.get("tie_word_embeddings") else 2)
    searched = sum(shape.parameters for shape in backbone.shapes)
    assert 0 <= published - embeddings - searched < 2e-4 * published  # norms and biases are left
    assert not backbone.coverage.left


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_paper_configuration_is_planned_without_weights(
    name: str, hub: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qratk.__main__ import main

    monkeypatch.setattr("qratk.peaks.foretold.training_peaks", lambda *_, **__: None)  # a minute, and tested by itself
    assert main(["plan", "--config", "paper", "--config", name, "--data=EmbeddedData", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    fits = {row["configuration"].partition("*")[0]: row["fits"] for row in plan["rows"] if row["name"] == "uniform"}
    assert [pair for pair, fit in fits.items() if not fit] == ["8:4", "8:8", "8:16"]
    assert plan["evaluations"]["900"] >= 3


@pytest.mark.parametrize("name", ["qwen2_5_3b", "smollm2"])
def test_configuration_is_built_with_the_tasks_of_the_paper(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["smollm2"] if name == "smollm2" else ["paper", name]
    model, data, loop = built(files, monkeypatch)
    assert set(data.tasks["validation"]) == set(data.tasks["test"]) == TASKS
    assert loop.name == name
    assert model.options.model == (MODELS[name][0] if name in MODELS else "models/smollm2")
    for task in data.tasks["test"].values():
        assert task.figure.split(",")[0] in ("acc", "acc_norm", "exact_match")
        assert task.data.sources["validation"] is None


def test_every_method_of_the_paper_is_a_recipe_that_can_be_given() -> None:
    assert [path.stem for path in recipes(RIVALS)] == list(RIVALS)  # each is built over a base by test_configs.py


def test_a_recipe_over_the_suite_keeps_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, data, loop = built(["smollm2", "at_most_4_bits"], monkeypatch)
    assert (loop.name, loop.max_average_bits, loop.test) == ("at_most_4_bits", 4.0, "answer")
    assert set(data.tasks["test"]) == TASKS


def test_the_published_recipe_is_what_as_published_makes_of_the_default() -> None:
    """The paper's set-up and the recipe `as_published` say the same of what both say."""
    paper = named_document(read_settings(Path(configuration("paper"))))
    recipe = named_document(read_settings(Path(configuration("as_published"))))
    recipe["search"].pop("name")
    same = laid_over(paper, recipe)
    assert same == paper


def test_no_file_of_the_set_up_says_again_what_another_says() -> None:
    shared = yaml.safe_load(Path(configuration("paper")).read_text())
    for name in MODELS:
        own = yaml.safe_load(Path(configuration(name)).read_text())
        assert own == {"model": {"model": MODELS[name][0]}, "search": {"name": name}}
        assert "model" not in shared["model"]


def built(names: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """Model, data and loop that `qratk search` builds of shipped configurations, by their names."""
    from qratk.cli.search import SearchCommand

    made: list[Any] = []
    monkeypatch.setattr(
        SearchCommand, "search", lambda self, model, datamodule: made.append((model, datamodule, self.loop))
    )
    SearchCommand([word for name in names for word in ("--config", configuration(name))])
    ((model, data, loop),) = made
    return model, data, loop
