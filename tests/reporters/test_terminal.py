from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from example_search import best_of, example_problem, example_search, play
from rich.console import Console

from qratk.core import Configuration
from qratk.core.result import Progress, SearchResult
from qratk.reporters.terminal import LiveView, Summary, TerminalReporter, strip, summary_lines


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search()


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def _view(result: SearchResult, records: int) -> LiveView:
    view = LiveView(lambda: 0.0)
    view.start(result.plan)
    view.messages.append("kernel [bold]fell back[/bold]")
    told = []
    for record in result.records[:records]:
        told.append(record)
        best = best_of(result.plan.problem, told)
        view.record(record, Progress(record.candidate.phase, record.candidate.generation, record.evaluation.steps,
                                     len(told), 52, best, 10.0 * len(told), 3700.0))  # fmt: skip
    view.summary = result.generations[-1]
    return view


def _render(renderable: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    console.print(renderable)
    return console.export_text(styles=False).splitlines()


def test_plain_lines_hold_every_score_and_no_control_codes(result: SearchResult) -> None:
    stream = io.StringIO()
    play(TerminalReporter.to(stream), result)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    for record in result.records:
        if record.evaluation.ok:
            assert f"{record.index + 1}/{len(result.records)} " in text
            assert f"{record.evaluation.score:.4f}" in text
    assert "failed: loss is nan at step 3, red" in text
    assert "budget [bold]binds[/bold] at 3 layers" in text
    for summary in result.generations:
        assert f"generation {summary.number} done" in text
        assert f"{summary.hypervolume:.4g}" in text
    assert "expected improvement 0.01, radius 2" in text


def test_plain_lines_say_how_many_evaluations_were_taken_over_instead_of_listing_them(result: SearchResult) -> None:
    stream = io.StringIO()
    play(TerminalReporter.to(stream, plain=True), result, resumed=20)
    text = stream.getvalue()
    assert "20 evaluations of the earlier run were taken over" in text
    assert f"20/{len(result.records)} " not in text.split("taken over")[0]
    assert f"21/{len(result.records)} " in text


def test_plain_lines_survive_a_stream_that_knows_only_ascii(result: SearchResult) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    reporter = TerminalReporter.to(stream, plain=True)
    reporter.started(result.plan)
    reporter.message("Modell für Köln")
    assert "Modell f?r K?ln" in stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def test_summary_names_best_interval_stops_rungs_tests_and_files(tmp_path: Path, result: SearchResult) -> None:
    (tmp_path / "best.yaml").write_text("")
    lines = summary_lines(result, run_dir=tmp_path)
    text = "\n".join(lines)
    top = max(result.comparisons, key=lambda c: c.baseline.score)
    assert f"best configuration: {result.best.configuration}" in lines
    assert f"{top.difference:+.4f}, 95% interval [{top.low:+.4f}, {top.high:+.4f}]" in text
    assert "stopped, global: 3 generations were allowed" in lines
    assert "test, best: accuracy 0.6100" in lines
    assert any(
        line.startswith("evaluations: 15 at 50 steps, 9 at 150 steps, 16 at 450 steps; 1 failed") for line in lines
    )
    assert f"files in {tmp_path}: best.yaml" in lines
    assert sum(line.startswith("uniform") for line in lines) == len(result.baselines)


@pytest.mark.parametrize("width", [40, 60, 100, 160])
@pytest.mark.parametrize("layers", [12, 126])
def test_live_view_fits_its_width_and_shows_the_standing(layers: int, width: int) -> None:
    result = example_search(layers)
    lines = _render(_view(result, 30), width)
    text = " ".join(" ".join(line.strip("│ ").split()) for line in lines)
    best = best_of(result.plan.problem, list(result.records[:30]))
    assert best is not None
    assert all(len(line) <= width for line in lines)
    assert f"{best.score:.4f}" in text
    assert "30/52" in text
    assert f"{best.footprint.storage_bytes / result.plan.problem.budget.limit_bytes:.1%}" in text
    assert "1 h 01 min left" in text
    assert "[bold]fell" in text
    assert len(lines) <= 32


@pytest.mark.parametrize("width", [60, 100, 160])
def test_summary_table_fits_its_width(result: SearchResult, width: int) -> None:
    lines = _render(Summary(result), width)
    assert all(len(line) <= width for line in lines)
    assert any(f"{result.best.score:.4f}" in line for line in lines)


def test_summary_table_draws_a_long_configuration_instead_of_spelling_it_out() -> None:
    short, long = example_search(), example_search(126)
    assert any("best configuration" in line for line in _render(Summary(short), 100))
    lines = _render(Summary(long), 100)
    assert not any("best configuration" in line for line in lines)
    assert sum(line.startswith("bits ") for line in lines) == 3  # two rows and the legend


def test_strip_draws_each_layer_at_the_height_of_its_rung() -> None:
    problem = example_problem(6)
    configuration = Configuration.of([2, 4, 8, 8, 4, 2], [16, 8, 4, 4, 8, 16])
    bits, ranks, _ = strip(problem, configuration, 60).plain.splitlines()
    assert bits.split()[-1] == "▁▅██▅▁"
    assert ranks.split()[-1] == "█▅▁▁▅█"


def test_strip_of_many_layers_says_how_many_a_mark_stands_for() -> None:
    problem = example_problem(560)
    text = strip(problem, problem.space.uniform(4, 8), 60, ascii_only=True).plain
    assert text.isascii()
    assert "a mark: 4 layers" in text
    assert len(text.splitlines()) == 7
    rows = [line for line in text.splitlines()[:-1] if line.startswith("bits")]
    assert sum(line.count("+") for line in rows) == 560 / 4


def test_live_view_gives_the_terminal_back_after_an_error(
    result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    reporter = TerminalReporter.to(stream)
    play(reporter, result, stop_after=12)
    reporter.close()
    reporter.close()
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert "12/40" in text


def test_live_view_ends_in_the_summary(result: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    play(TerminalReporter.to(stream), result)
    tail = stream.getvalue().rpartition("\x1b[?25h")[2]
    assert f"{result.best.score:.4f}" in tail
    assert "3 generations were allowed" in tail


def test_colours_forced_by_the_environment_do_not_make_a_log_file_a_terminal(
    result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    play(TerminalReporter.to(stream), result)
    assert "\x1b" not in stream.getvalue()


def test_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = _Terminal()
    play(TerminalReporter.to(stream), result)
    assert "\x1b" not in stream.getvalue()


def test_summary_tells_the_first_figures_of_the_best_and_how_many_more_there_are(result: SearchResult) -> None:
    best = result.best.figures
    told = f"acc {best['acc']:.4f}, log_likelihood {best['log_likelihood']:.4f}"
    assert f"best figures: {told}" in summary_lines(result)
    many = {**best, **{f"other_{number}": 0.5 for number in range(7)}}
    line = next(
        line
        for line in summary_lines(replace(result, best=replace(result.best, figures=many)))
        if line.startswith("best figures: ")
    )
    others = ", ".join(f"other_{number} 0.5000" for number in range(4))
    assert line == f"best figures: {told}, {others}; 3 more in result.json"
