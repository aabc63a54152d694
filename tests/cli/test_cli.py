"""The commands in one process: settings, errors, and a whole search on the embedded model."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from qratk.__main__ import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning and torch disagree about the name of a leaf; neither is ours.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a checkpoint is tested elsewhere than trained
]

TINY = {
    "trainer": {"accelerator": "cpu"},
    "model": {"model": "embedded", "learning_rate": 0.005},
    "data": {
        "class_path": "EmbeddedData",
        "init_args": {"max_train_items": 32, "max_validation_items": 8, "max_test_items": 8, "batch_size": 4},
    },
    "search": {
        "evaluator": {
            "class_path": "finetune", "init_args": {"calibration_batches": 1, "calibration_batch_size": 2, "cohort": 2},
        },
        "searcher": {"class_path": "nsga2", "init_args": {"population": 4, "offspring": 3}},
        "refiner": "none", "bits": [2, 4], "ranks": [2], "like": [4, 2], "steps": [1, 2], "generations": 1,
        "high_fidelity_candidates": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unchanged_process(monkeypatch, tmp_path):
    """Commands work in an empty folder and leave signals, loggers and paths as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def failed(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and the error text of a command; there is no traceback."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error


def printed(capsys, *arguments: str) -> dict:
    """The settings that a command prints."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_printed_config_is_accepted_back_and_prints_itself(capsys, config, tmp_path):
    first = printed(capsys, "search", "--config", config)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(first))
    for command in ("search", "fit", "plan"):
        second = printed(capsys, command, "--config", str(tmp_path / "printed.yaml"))
        assert {key: second[key] for key in ("model", "data", "search")} == {
            key: first[key] for key in ("model", "data", "search")
        }


def test_defaults_are_the_recipe_and_options_are_overridden_by_path(capsys, config):
    search = printed(capsys, "search", "--config", config, "--search.searcher.population=7")["search"]
    assert search["searcher"]["init_args"]["population"] == 7
    assert search["searcher"]["init_args"]["offspring"] == 3
    assert search["surrogate"]["class_path"] == "huber"
    assert len(search["mutations"]) == 2


def test_component_is_replaced_from_the_command_line(capsys, config):
    search = printed(capsys, "search", "--config", config, "--search.searcher=random")["search"]
    assert search["searcher"]["class_path"] == "random"
    assert "population" not in search["searcher"]["init_args"]


def test_config_of_a_fit_with_a_checkpoint_is_accepted_by_search(capsys, config, tmp_path):
    fit = printed(capsys, "fit", "--config", config, "--ckpt_path=last.ckpt")
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    assert printed(capsys, "search", "--config", str(tmp_path / "fit.yaml"))["ckpt_path"] == "last.ckpt"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--search.searcher=nsga"], 1, "unknown name 'nsga'; known are"),
        (["--search.scope=disk"], 2, "one of 'storage', 'training', 'serving'. Got value: disk"),
        (["--model.granularity=row"], 2, "one of 'block', 'sublayer', 'fused', 'linear'. Got value: row"),
        (["--search.generatons=3"], 2, "Did you mean 'search.generations'?"),
        (["--search.searcher.popluation=3"], 2, "Did you mean 'population'?"),
        (["--data=EmbedData"], 2, "known are InstructionData, MultipleChoiceData, TextData, SuiteData, LmEvalData"),
        (["--search.searcher=os.system"], 2, "does not correspond to a subclass of GlobalSearcher"),
        (["--search.steps=[30, 10]"], 1, "steps must be positive and ascending"),
        (["--search.like=null", "--search.limit=1KB"], 1, "Give at least that much"),
        (["--search.like=null", "--search.limit=5 parsecs"], 1, "is not a size"),
        (["--model.model=./nowhere"], 1, "./nowhere"),
        (["--model.quantizers={4: nf5}"], 1, "unknown name 'nf5'"),
        (["--config=nowhere.yaml"], 2, "File does not exist"),
    ],
)
def test_mistake_is_told_in_one_message(capsys, config, arguments, status, text):
    found, error = failed(capsys, "plan", "--config", config, *arguments)
    assert found == status
    assert text in error


def test_missing_data_file_is_told_in_one_message(capsys, config):
    arguments = ["--data=MultipleChoiceData", "--data.train=nowhere.jsonl"]
    status, error = failed(capsys, "search", "--config", config, *arguments, "--run_dir=run")
    assert status == 1
    assert "nowhere.jsonl" in error


def test_broken_yaml_is_told_in_one_message(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {model: x\nsearch: [\n")
    status, error = failed(capsys, "search", "--config", "broken.yaml")
    assert status == 1
    assert "broken.yaml:2 is no YAML" in error


def test_fit_without_a_configuration_says_how_to_give_one(capsys, config):
    status, error = failed(capsys, "fit", "--config", config, "--trainer.max_steps=1", "--trainer.logger=false")
    assert status == 1
    assert "--model.configuration" in error


def test_plan_prints_bytes_for_machines(capsys, config):
    assert main(["plan", "--config", config, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["rows"]] == ["smallest", *["uniform"] * 2, "largest"]


def test_search_then_resume_repeat_fit_and_test(capsys, config, tmp_path):
    """One story, because its chapters share what was trained."""
    run = tmp_path / "run"
    assert main(["search", "--config", config, "--run_dir", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    before = (run / "evaluations.csv").read_bytes()

    # The same command continues: nothing is left to do, and nothing is measured again. How the model is held decides
    # nothing.
    held = ["--model.dense_cache=off", "--model.bank_dir=null"]
    assert main(["search", "--config", config, "--run_dir", str(run), *held]) == 0
    assert (run / "evaluations.csv").read_bytes() == before

    # Another configuration in the same directory is refused.
    capsys.readouterr()
    status, error = failed(capsys, "search", "--config", config, "--search.seed=1", "--run_dir", str(run))
    assert status == 1
    assert "config.search.seed" in error

    # The saved configuration repeats the search, to the bit.
    again = tmp_path / "again"
    command = ["search", "--config", str(run / "config.yaml"), "--run_dir", str(again)]
    assert main([*command, "--search.reporters=[files]"]) == 0
    repeated = json.loads((again / "result.json").read_text())
    assert repeated["best"]["score"] == result["best"]["score"]
    assert repeated["best"]["configuration"] == result["best"]["configuration"]

    # A fit of the best trains it for as many steps, saves adapter and checkpoint, and scores the same.
    assert main(["fit", "--config", str(run / "best.yaml"), "--trainer.default_root_dir", str(tmp_path / "fit")]) == 0
    (adapter,) = (tmp_path / "fit").rglob("adapter_config.json")
    log_dir = adapter.parent.parent
    assert list(log_dir.glob("events.out.tfevents*"))
    (checkpoint,) = log_dir.rglob("*.ckpt")
    capsys.readouterr()
    arguments = ["--config", str(run / "best.yaml"), "--ckpt_path", str(checkpoint)]
    assert main(["validate", *arguments]) == 0
    assert f"{result['best']['score']:.10f}"[:8] in capsys.readouterr().out

    # The checkpoint's own settings win over other ones, and that is said.
    assert main(["test", *arguments, "--model.learning_rate=1"]) == 0
    assert "model.learning_rate: 0.005 of the checkpoint is used, not 1" in capsys.readouterr().err

    # Predictions are written: four choices of each item, the likeliest being what is scored.
    assert main(["predict", *arguments, "--trainer.default_root_dir", str(tmp_path / "predict")]) == 0
    (written,) = (tmp_path / "predict").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["item"] for row in rows] == [item for item in range(8) for _ in range(4)]
    assert all(row["log_likelihood"] < 0 and row["tokens"] > 0 for row in rows)


@pytest.mark.slow
def test_fit_runs_on_two_processes_with_accumulation_and_clipping(config, tmp_path):
    """A command of its own: processes are started from the command line."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "qratk", "fit", "--config", config, "--model.configuration=4:2"),
        *("--trainer.max_steps=2", "--trainer.devices=2", "--trainer.strategy=ddp"),
        *("--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1.0"),
        *("--trainer.default_root_dir", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
    assert "validation/score" in done.stdout


@pytest.mark.slow
def test_predictions_of_two_processes_are_those_of_one(config, tmp_path):
    written = []
    for devices in ("1", "2"):
        folder = tmp_path / devices
        command = [
            *(sys.executable, "-W", "ignore", "-m", "qratk", "predict", "--config", config),
            *("--model.configuration=4:2", f"--trainer.devices={devices}", "--trainer.strategy=ddp"),
            *("--trainer.default_root_dir", str(folder)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        (path,) = folder.rglob("predictions.jsonl")
        written.append(path.read_text())
    assert len(written[0].splitlines()) == 32
    assert written[0] == written[1]


def test_checkpoints_are_loaded_without_running_code(capsys, config):
    assert printed(capsys, "validate", "--config", config)["weights_only"] is True


def test_secrets_are_not_saved(monkeypatch, config, tmp_path):
    from qratk.cli.trainer import SearchTrainer

    bound = []
    monkeypatch.setattr(SearchTrainer, "search", lambda self, *a, **options: bound.append(options["config"]))
    options = {"save_dir": "https://me:hunter22@host/x", "name": "hf_" + "a" * 34, "prefix": "?token=hunter22"}
    logger = json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": options})
    given = ["--config", config, "--run_dir=run", f"--trainer.logger={logger}", "--model.model=https://me:hunter22@h/x"]
    assert main(["search", *given]) == 0
    path = tmp_path / "run" / "config.yaml"
    for text in (path.read_text(), json.dumps(bound)):
        assert "hunter22" not in text
        assert "hf_a" not in text
    saved = yaml.safe_load(path.read_text())
    assert not {"run_dir", "ckpt_path", "config"} & set(saved)
    assert main(["search", "--config", str(path), "--run_dir=run"]) == 0  # it can be read again, and is the same
    assert bound[0] == bound[1]


def test_interrupt_tells_how_to_go_on(monkeypatch, capsys, config):
    from qratk.cli.trainer import SearchTrainer

    def interrupted(self, *arguments, **options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemExit(1) from None  # as Lightning does inside a fit

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(SearchTrainer, "search", interrupted)
    status, error = failed(capsys, "search", "--config", config, "--run_dir=run")
    assert status == 130
    assert "to go on: qratk search --config run/config.yaml --run_dir run" in error
    assert signal.getsignal(signal.SIGINT) is before


def test_command_to_go_on_can_be_pasted_where_a_folder_has_a_space(monkeypatch, capsys, config):
    from qratk.cli.trainer import SearchTrainer

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SearchTrainer, "search", interrupted)
    _, error = failed(capsys, "search", "--config", config, "--run_dir=my run")
    go_on = shlex.split(error.partition("to go on: ")[2])
    assert go_on == ["qratk", "search", "--config", "my run/config.yaml", "--run_dir", "my run"]


def test_search_that_is_ended_from_within_is_no_success(monkeypatch, capsys, config):
    from qratk.cli.trainer import SearchTrainer

    def leaves(self, *arguments, **options):
        raise SystemExit(0)

    monkeypatch.setattr(SearchTrainer, "search", leaves)
    status, error = failed(capsys, "search", "--config", config, "--run_dir=run")
    assert status == 1
    assert "before there was a result" in error


def test_run_directory_defaults_to_time_and_name(tmp_path):
    from qratk.cli.search import choose_run_dir

    first = choose_run_dir(None, name="mine")
    first.mkdir(parents=True)
    second = choose_run_dir(None, name="mine")
    assert first.parts[0] == "runs"
    assert first.name.endswith("-mine")
    assert second != first


def test_fsdp_means_the_strategy_that_shards_adapters() -> None:
    from qratk.cli.trainer import SearchTrainer

    trainer = SearchTrainer(strategy="fsdp", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy).__name__ == "ShardedStrategy"
