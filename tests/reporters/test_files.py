from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml
from example_search import STEPS, best_of, example_search, opened, play

from qratk.core import Configuration, RunDirectoryError
from qratk.core.result import SearchResult
from qratk.reporters.files import COLUMNS, RunFiles


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search()


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluations.csv").open(newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
        assert tuple(reader.fieldnames or ()) == (COLUMNS if not rows else (*COLUMNS, "acc", "log_likelihood"))
        return rows


def _strict_json(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_table_has_one_row_for_each_record_with_its_figures(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result)
    rows = _rows(tmp_path)
    assert len(rows) == len(result.records)
    memory = result.plan.problem.memory
    for row, record in zip(rows, result.records, strict=True):
        evaluation = record.evaluation
        bits, ranks = ([int(v) for v in row[name].split()] for name in ("bits", "ranks"))
        assert Configuration.of(bits, ranks) == evaluation.configuration
        assert (row["phase"], row["origin"]) == (record.candidate.phase, record.candidate.origin)
        assert (int(row["generation"]), int(row["steps"])) == (record.candidate.generation, evaluation.steps)
        assert int(row["storage_bytes"]) == memory.bytes(evaluation.configuration)
        assert float(row["average_bits"]) == pytest.approx(memory.average_bits(evaluation.configuration), abs=1e-6)
        assert float(row["average_rank"]) == pytest.approx(memory.average_rank(evaluation.configuration), abs=1e-6)
        assert float(row["seconds"]) == evaluation.seconds
        assert row["status"] == evaluation.status
        if evaluation.ok:
            assert float(row["score"]) == evaluation.score
        figures = {name: float(row[name]) for name in ("acc", "log_likelihood") if row[name]}
        assert figures == evaluation.figures


def test_figures_that_come_late_have_a_column_in_rows_before_them_too(tmp_path: Path, result: SearchResult) -> None:
    records = list(result.records)
    for index, figures in ((0, {}), (1, {"nats": 0.5}), (2, {"acc": 0.25, "nats": 1.5})):
        evaluation = dataclasses.replace(records[index].evaluation, figures=figures)
        records[index] = dataclasses.replace(records[index], evaluation=evaluation)
    play(opened(RunFiles(), tmp_path), dataclasses.replace(result, records=tuple(records)), stop_after=3)
    with (tmp_path / "evaluations.csv").open(newline="") as file:
        rows = [(row["acc"], row["nats"]) for row in csv.DictReader(file, strict=True)]
    assert rows == [("", ""), ("", "0.5"), ("0.25", "1.5")]


def test_failed_evaluation_has_no_score_and_its_reason_on_one_line(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result)
    failed = [row for row in _rows(tmp_path) if row["status"] == "failed"]
    assert [(row["score"], row["reason"]) for row in failed] == [("", "loss is nan at step 3, red")]


@pytest.mark.parametrize("records", [0, 1, 6, 9, 18, 30])
def test_interrupted_search_leaves_a_table_of_what_was_measured(
    tmp_path: Path, result: SearchResult, records: int
) -> None:
    play(opened(RunFiles(), tmp_path), result, stop_after=records)
    assert len(_rows(tmp_path)) == records


def test_interrupted_search_leaves_the_best_of_the_last_generation(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result, stop_after=20)
    told = [r for r in result.records[:20] if r.candidate.phase != "global" or r.candidate.generation == 0]
    best = best_of(result.plan.problem, told)
    assert best is not None
    text = yaml.safe_load((tmp_path / "best.yaml").read_text())["model"]["configuration"]
    assert Configuration.from_text(text) == best.configuration
    assert not (tmp_path / "result.json").exists()


def test_resumed_search_ends_in_the_same_table_as_an_uninterrupted_one(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path / "whole"), result)
    play(opened(RunFiles(), tmp_path / "parts"), result, stop_after=13)
    play(opened(RunFiles(), tmp_path / "parts"), result, resumed=13)
    for name in ("evaluations.csv", "front.json", "best.yaml"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_kill_while_records_are_replayed_keeps_the_earlier_table(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result, stop_after=25)
    before = (tmp_path / "evaluations.csv").read_bytes()
    play(opened(RunFiles(), tmp_path), result, resumed=25, stop_after=18)
    assert (tmp_path / "evaluations.csv").read_bytes() == before


def test_table_cut_short_by_a_crash_is_mended_on_resume(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result, stop_after=10)
    path = tmp_path / "evaluations.csv"
    path.write_bytes(path.read_bytes()[:-20])
    play(opened(RunFiles(), tmp_path), result, resumed=10, stop_after=11)
    assert len(_rows(tmp_path)) == 11


def test_best_file_adds_the_configuration_to_the_given_settings(tmp_path: Path, result: SearchResult) -> None:
    given = {"model": {"name": "tiny", "alpha": 16}, "data": {"path": "x.jsonl"}, "trainer": {"max_steps": 450}}
    play(opened(RunFiles(), tmp_path, given), result)
    text = (tmp_path / "best.yaml").read_text()
    config = yaml.safe_load(text)
    assert Configuration.from_text(config["model"].pop("configuration")) == result.best.configuration
    assert config == given
    assert f"# score: {result.best.score!r}" in text
    assert str(result.best.footprint.storage_bytes) in text


def test_best_file_puts_the_configuration_among_the_arguments_of_a_class(tmp_path: Path, result: SearchResult) -> None:
    given = {"model": {"class_path": "qratk.X", "init_args": {"name": "tiny"}}}
    play(opened(RunFiles(), tmp_path, given), result)
    model = yaml.safe_load((tmp_path / "best.yaml").read_text())["model"]
    assert model["init_args"] == {"name": "tiny", "configuration": str(result.best.configuration)}


def test_best_file_holds_no_token_but_keeps_settings_named_alike(tmp_path: Path, result: SearchResult) -> None:
    given = {"model": {"hf_token": "hf_abcdefghijklmnop", "pad_token": "<pad>", "max_tokens": 5}}
    play(opened(RunFiles(), tmp_path, given), result)
    model = yaml.safe_load((tmp_path / "best.yaml").read_text())["model"]
    assert ("hf_token" in model, model["pad_token"], model["max_tokens"]) == (False, "<pad>", 5)


def test_front_file_agrees_with_the_front(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result)
    front = _strict_json(tmp_path / "front.json")
    assert front["limit_bytes"] == result.plan.problem.budget.limit_bytes
    written = [(e["configuration"], e["score"], e["bytes"]) for e in front["evaluations"]]
    assert written == [
        (str(e.configuration), e.score, e.footprint.storage_bytes) for e in result.front.evaluations
    ]  # fmt: skip


def test_front_of_a_running_search_is_the_one_of_feasible_measurements(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result, stop_after=len(result.records))  # everything, but never finished
    written = [e["configuration"] for e in _strict_json(tmp_path / "front.json")["evaluations"]]
    assert written == [str(e.configuration) for e in result.front.evaluations]


def test_result_file_is_strict_json_with_the_search_in_figures(tmp_path: Path, result: SearchResult) -> None:
    play(opened(RunFiles(), tmp_path), result)
    data = _strict_json(tmp_path / "result.json")
    assert data["best"]["configuration"] == str(result.best.configuration)
    assert data["best"]["fits"]
    assert not data["references"][0]["fits"]
    assert len(data["comparisons"]) == len(result.baselines)
    assert data["comparisons"][0]["low"] == result.comparisons[0].low
    assert data["hypervolume_by_generation"] == [g.hypervolume for g in result.generations]
    counted = {str(s): sum(r.evaluation.steps == s for r in result.records) for s in STEPS}
    assert data["evaluations_by_rung"] == counted
    assert data["failed_evaluations"] == 1
    assert data["top3_hit_rates"] == {"surrogate": 0.66, "low_fidelity": None}
    assert data["generations"][1]["surrogate"]["low_fidelity_spearman"] is None
    assert data["generations"][0]["surrogate"] is None
    assert data["refinements"][0]["diagnostics"]["radius"] == 2.0
    assert data["stop_reasons"] == dict(result.stop_reasons)
    assert data["environment"]["libraries"]["numpy"]


def test_full_disk_is_one_clear_error_and_the_old_file_stays(
    tmp_path: Path, result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opened(RunFiles(), tmp_path)
    play(files, result, stop_after=13)
    before = (tmp_path / "evaluations.csv").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match=r"No space left.*journal keeps it.*run the same command again"):
        files.generation(result.generations[0])
    assert (tmp_path / "evaluations.csv").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_partly_written_row_is_cut_off_again(
    tmp_path: Path, result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    files = opened(RunFiles(), tmp_path)
    play(files, result, stop_after=3)
    before = (tmp_path / "evaluations.csv").read_bytes()
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with pytest.raises(RunDirectoryError, match="run the same command again"):
        play_one(files, result, 3)
    assert (tmp_path / "evaluations.csv").read_bytes() == before


def play_one(files: RunFiles, result: SearchResult, index: int) -> None:
    from qratk.core.result import Progress

    record = result.records[index]
    files.evaluated(record, Progress("baseline", 0, record.evaluation.steps, 4, 40, None, 40.0, None))


def test_run_directory_that_is_a_file_is_one_clear_error(tmp_path: Path, result: SearchResult) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        play(opened(RunFiles(), tmp_path / "run"), result)
