"""All mistakes of a configuration are told at once, each with its place and what would be right."""

from __future__ import annotations

import pytest
import yaml

from qratk.__main__ import main

GOOD = {
    "trainer": {"accelerator": "cpu", "logger": False},
    "model": {"model": "embedded"},
    "data": {"class_path": "EmbeddedData", "init_args": {"batch_size": 4}},
    "search": {"refiner": "none", "bits": [2, 4], "ranks": [2], "like": [4, 2], "steps": [1, 2], "generations": 1},
}

WRONG = """\
model:
  model: embedded
  learning_rate: fast
  warmup_stps: 3
  weight_decay: -1.0
data:
  class_path: EmbeddedData
  init_args:
    batch_size: many
    batch_sise: 3
search:
  searcher: nsga
  generatons: 3
  refiner: {class_path: trust_region, init_args: {radus: 3}}
  scope: disk
  like: [4, 8]
trainr: {max_steps: 3}
trainer:
  max_steps: soon
  devices: 100000
  accelerator: cpu
"""


def refused(capsys, command: str, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and lines of the message."""
    try:
        status = main([command, *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error.splitlines()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


def test_every_mistake_has_a_line_with_its_place_and_the_nearest_name(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(WRONG)
    status, lines = refused(capsys, "search", "--config", "my.yaml", "--trainer.acelerator=cpu")
    expected = [
        ("my.yaml:3: model.learning_rate: expected a float", "fast"),
        ("my.yaml:4: model.warmup_stps: unknown setting", "'model.warmup_steps'?"),
        ("my.yaml:9: data.batch_size: expected an int", "many"),
        ("my.yaml:10: data.batch_sise: option 'batch_sise' is not accepted", "Did you mean 'batch_size'?"),
        ("my.yaml:12: search.searcher: ", "unknown name 'nsga'; known are"),
        ("my.yaml:13: search.generatons: unknown setting", "'search.generations'?"),
        ("my.yaml:14: search.refiner.radus: option 'radus' is not accepted", "Did you mean 'radius'?"),
        ("my.yaml:15: search.scope: expected one of 'storage', 'training', 'serving'", "disk"),
        ("my.yaml:17: trainr.max_steps: unknown setting", "'trainer.max_steps'?"),
        ("my.yaml:19: trainer.max_steps: expected an int", "soon"),
        ("--trainer.acelerator: unknown setting", "'trainer.accelerator'?"),
        ("my.yaml:5: model.weight_decay: must be at least 0, got -1.0", ""),
        ("my.yaml:20: trainer.devices: must be at most", "got 100000"),
    ]
    assert status == 1
    assert lines[0] == f"qratk: error: {len(expected)} settings are wrong:"
    told = lines[1 : 1 + len(expected)]
    for line, (begin, end) in zip(told, expected, strict=True):
        assert line.strip().startswith(begin)
        assert end in line


@pytest.mark.parametrize("command", ["plan", "fit"])
def test_values_that_cannot_be_are_told_together_before_anything_is_loaded(capsys, tmp_path, command):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GOOD))
    arguments = ["--model.learning_rate=-0.1", "--model.betas=[1.5,0.9]", "--trainer.gradient_clip_val=-1"]
    status, lines = refused(capsys, command, "--config", "my.yaml", *arguments, "--model.model=./nowhere")
    assert status == 1
    assert [line.partition(",")[0].strip() for line in lines] == [
        "qratk: error: 3 settings are wrong:",
        "--model.learning_rate: must be at least 0",
        "--model.betas: must be two in [0",
        "--trainer.gradient_clip_val: must be at least 0",
    ]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--trainer.accelerator=nope", "--trainer.accelerator: must be one of auto, gpu"),
        ("--trainer.accumulate_grad_batches=-1", "--trainer.accumulate_grad_batches: must be at least 1, got -1"),
        ("--trainer.default_root_dir=/dev/null/x", "--trainer.default_root_dir: must be a folder that can be made"),
        ("--trainer.limit_train_batches=-1", "--trainer.limit_train_batches: must be a share from 0 to 1, or a whole"),
        ("--trainer.val_check_interval=1.5", "--trainer.val_check_interval: must be a share from 0 to 1, or a whole"),
        ("--trainer.devices=99999", "--trainer.devices: must be at most"),
        ("--model.bank_dir=", "--model.bank_dir: must be a folder, 'auto' or null, got ''"),
        ("--data.batch_size=1000000", "--data.batch_size: must be at most 65,536"),
        ("--model.quantizers={4: 3}", "--model.quantizers: must be names"),
        ("--model.weight_decay=4:8", "--model.weight_decay: expected a number, got '4:8'"),
        ("--data.batch_size=1:4", "--data.batch_size: expected a number, got '1:4'"),
    ],
)
def test_value_that_cannot_be_is_told_with_its_place(capsys, tmp_path, argument, text):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GOOD))
    status, lines = refused(capsys, "fit", "--config", "my.yaml", argument)
    assert status == 1
    assert lines[0].startswith(f"qratk: error: {text}")


def test_section_that_is_a_list_is_told_by_its_name(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GOOD))
    status, lines = refused(capsys, "fit", "--config", "my.yaml", "--trainer=[3]")
    assert status == 2
    assert lines[0] == "qratk: error: --trainer: must hold settings by name, or name a file that does, got '[3]'"


def test_component_that_is_null_is_told_with_what_switches_it_off(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**GOOD, "search": {**GOOD["search"], "surrogate": None}}))
    nulls = ["--search.refiner=null", "--search.searcher=null"]
    status, lines = refused(capsys, "search", "--config", "my.yaml", *nulls)
    assert status == 2
    assert [line.strip() for line in lines[:4]] == [
        "qratk: error: 3 settings are wrong:",
        "my.yaml:21: search.surrogate: must be the name of a component, got null; 'none' switches it off",
        "--search.refiner: must be the name of a component, got null; 'none' switches it off",
        "--search.searcher: must be the name of a component, got null; leave it out for 'nsga2'",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"model:\n  model: \xe9\n", "more.yaml:2 is not UTF-8"),
        (b"\xff\xfe\x00", "more.yaml:1 is not UTF-8"),
        (b"", "more.yaml is empty"),
        (b"data: {class_path: null}\n", "more.yaml:1: 'class_path' must be a name"),
        (b"model:\n  weight_decay: 4:8\n  configuration: 4:8\n", "more.yaml:2: model.weight_decay: expected a number"),
        (b"trainer: [3]\n", "more.yaml:1: 'trainer' must hold settings by name, as in 'trainer: {...}'"),
    ],
)
def test_file_that_holds_no_settings_is_told_in_one_message(capsys, tmp_path, content, text):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / "more.yaml").write_bytes(content)
    status, lines = refused(capsys, "plan", "--config", "my.yaml", "--config", "more.yaml")
    assert status in (1, 2)
    assert lines[0].startswith(f"qratk: error: {text}")


def test_bit_widths_are_keys_that_are_no_text(capsys, tmp_path):
    quantizers = {2: {"class_path": "hqq", "init_args": {"group_size": 32}}, 4: "nf4"}
    settings = {**GOOD, "model": {**GOOD["model"], "quantizers": quantizers, "weight_decay": "4:8"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings).replace("'4:8'", "4:8"))
    status, lines = refused(capsys, "plan", "--config", "my.yaml")
    assert status == 1
    assert "model.weight_decay: expected a number, got '4:8'" in lines[0]


@pytest.mark.parametrize("name", ["WeightAveraging", "StochasticWeightAveraging", "EMAWeightAveraging"])
def test_callback_that_averages_weights_is_refused_with_a_cure(name):
    from lightning.pytorch import callbacks

    from qratk.cli.trainer import SearchTrainer
    from qratk.core.errors import ConfigurationError

    options = {"swa_lrs": 0.1} if name.startswith("Stochastic") else {}
    with pytest.raises(ConfigurationError, match=f"{name} averages a copy .* leave it out"):
        SearchTrainer(callbacks=[getattr(callbacks, name)(**options)], accelerator="cpu", logger=False)


@pytest.mark.parametrize("command", ["plan", "search"])
def test_what_a_client_cannot_serve_is_refused_before_there_is_a_folder(command, capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**GOOD, "search": {**GOOD["search"], "for": "vllm"}}))
    status, lines = refused(capsys, command, "--config", "my.yaml", "--run_dir=run")
    assert status == 1
    assert lines[0] == "qratk: error: search.for: vllm could not serve what this search may find:"
    assert "2 bits by hqq" in lines[1]
    assert "give model.quantizers: portable" in lines[1]
    assert not (tmp_path / "run").exists()


def test_clients_and_sets_of_quantisers_are_listed_for_names_that_are_none(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GOOD))
    status, lines = refused(capsys, "plan", "--config", "my.yaml", "--search.for=vlm", "--model.quantizers=portabel")
    assert (status, len(lines)) == (1, 3)
    assert (
        lines[1]
        .lstrip()
        .startswith("--model.quantizers: 'portabel' is no set of quantisers; give one of default, portable")
    )
    assert "--search.for: must be one of" in lines[2]
