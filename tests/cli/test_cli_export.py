"""`qratk export`: what was scored goes out as it was scored, whatever it is taken from, and is read again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qratk.__main__ import main
from qratk.cli.export import forms_table
from qratk.cli.source import source_of
from qratk.core.intact import require_intact, write_sums
from qratk.exporters.base import exporters
from qratk.exporters.dense import DenseExporter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*"),
]


@pytest.fixture(scope="module")
def config(model_dir, data_files):
    """Settings of a search of a tiny model with quantisers that servers read."""
    affine = {"group_size": 32}
    return {
        "trainer": {"accelerator": "cpu"},
        "model": {
            "model": str(model_dir), "learning_rate": 0.01, "calibration_sequences": 4,
            "quantizers": {
                2: {"class_path": "affine", "init_args": affine}, 4: {"class_path": "affine_gptq", "init_args": affine},
            },
        },
        "data": {"class_path": "MultipleChoiceData", "init_args": {**data_files, "batch_size": 4}},
        "search": {
            "evaluator": {
                "class_path": "finetune",
                "init_args": {"calibration_batches": 1, "calibration_batch_size": 2, "cohort": 2},
            },
            "searcher": {"class_path": "nsga2", "init_args": {"population": 3, "offspring": 1}},
            "refiner": "none", "bits": [2, 4], "ranks": [2, 4], "like": [4, 2], "steps": [1, 2], "generations": 1,
            "high_fidelity_candidates": 1, "seeds": 2, "merge": 2, "reporters": ["files"],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Folder of a finished search."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["search", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def _unchanged_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


def exported(*arguments):
    """Exit status of an export."""
    return main(["export", *map(str, arguments)])


def test_adapter_of_a_run_goes_out_as_it_was_scored(run, tmp_path, capsys):
    assert exported(run, "--form", "peft", tmp_path / "out") == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    told = capsys.readouterr().out
    assert "for PEFT over the base model" in told
    assert "self-check: largest difference of logits" in told
    require_intact(tmp_path / "out")


def test_best_yaml_of_a_run_is_the_run(run):
    assert source_of(run / "best.yaml") == source_of(run)


def test_options_of_a_form_are_given_by_name(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert exported(run, "--form", "peft", "--base", "dequantised", "--dtype", "float32", "--pad", out) == 0
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    assert load_file(out / "base" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32
    with pytest.raises(SystemExit) as stop:
        exported(run, "--form", "dense", "--pad", tmp_path / "other")
    assert stop.value.code == 2
    assert "unrecognized arguments: --pad" in capsys.readouterr().err


def test_checkpoint_of_a_fit_goes_out_as_its_adapter_folder(config, run, tmp_path):
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({k: config[k] for k in ("trainer", "model", "data")}))
    fit = ["fit", "--config", "fit.yaml", "--model.configuration=4:2", "--trainer.max_steps=2"]
    assert main([*fit, f"--trainer.default_root_dir={tmp_path}"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert exported(checkpoint, "--form", "peft", tmp_path / "out") == 0
    (adapter,) = tmp_path.glob("lightning_logs/*/adapter/adapter_model.safetensors")
    ours, theirs = load_file(adapter), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    given = ["--adapter", adapter.parent, "--form", "peft", tmp_path / "again"]
    settings = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text())
    (tmp_path / "fitted.yaml").write_text(yaml.safe_dump(settings))
    assert exported(tmp_path / "fitted.yaml", *given) == 0
    assert all(torch.equal(ours[n], t) for n, t in load_file(tmp_path / "again" / "adapter_model.safetensors").items())


def test_what_cannot_be_exported_says_why(config, run, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*arguments):
        assert exported(*arguments, "--form", "dense", out) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "no such file" in refused(tmp_path / "nothing")
    (tmp_path / "some.yaml").write_text(
        yaml.safe_dump({**config, "model": {**config["model"], "configuration": "4:2"}})
    )
    assert "has no adapter: give --adapter" in refused(tmp_path / "some.yaml")
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    assert "has not ended" in refused(unfinished)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    content = bytearray((damaged / "adapter" / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "adapter" / "adapter_model.safetensors").write_bytes(content)
    assert "is damaged" in refused(damaged)
    other = shutil.copytree(run, tmp_path / "other")
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["model"]["quantizers"]["4"] = {"class_path": "affine", "init_args": {"group_size": 64}}
    settings["model"]["quantizers"].pop(4, None)
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "not the one that was searched" in refused(other)


def test_adapter_of_another_scale_is_refused(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    path = other / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["alpha_pattern"] = {name: 2 * alpha for name, alpha in config["alpha_pattern"].items()}
    path.write_text(json.dumps(config))
    write_sums(other / "adapter")
    assert exported(other, "--form", "dense", tmp_path / "out") == 1
    assert "has the factor 4, and the settings say 2" in capsys.readouterr().err


def test_failed_self_check_deletes_nothing_and_ends_with_1(run, tmp_path, capsys, monkeypatch):
    write = DenseExporter.write

    def wrong(self, backbone, directory):
        write(self, backbone, directory)
        tensors = load_file(directory / "model.safetensors")
        name = next(name for name in tensors if "q_proj" in name)
        tensors[name] = tensors[name].flip(0)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(DenseExporter, "write", wrong)
    assert exported(run, "--form", "dense", "--dtype", "float32", tmp_path / "out") == 1
    assert "is not what was scored" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_source_takes_the_scored_matrices_whatever_adapters_began_with(run):
    backbone = source_of(run).backbone()
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{n}" for n in backbone.adapters.stored_tensors()} == stored.keys()


def test_help_tells_every_form_without_torch():
    code = (
        "import sys\nfrom qratk.__main__ import main\n"
        "try: main(['export', '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name}\n" in done.stdout for name in exporters.names())


def test_table_of_the_documentation_is_that_of_the_code():
    path = Path(__file__).parents[2] / "docs" / "export.md"
    assert forms_table() in path.read_text()
