"""What the command answers without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from documents import evaluation_entry, result_document

from qratk import __version__
from qratk.__main__ import COMMANDS, main
from qratk.cli.components import rows
from qratk.cli.gain import gain_text
from qratk.components import REGISTRIES
from qratk.run.document import ComparisonEntry

_PROBE = """
import sys
from qratk.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:  # argparse's own way to end with its help
    code = stop.code
heavy = {"torch", "lightning", "transformers", "peft", "botorch", "pymoo", "bitsandbytes"} & set(sys.modules)
print("HEAVY", sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["components"], ["serch"], ["init", "--help"], []])
def test_small_commands_import_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qratk {__version__}\n"


def test_missing_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: qratk COMMAND" in capsys.readouterr().err


def test_unknown_command_names_the_nearest(capsys):
    assert main(["serch"]) == 2
    assert "unknown command 'serch'. Did you mean 'search'?" in capsys.readouterr().err


def test_components_tells_options_with_defaults(capsys):
    assert main(["components", "searchers", "--json"]) == 0
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(told) == set(REGISTRIES["searchers"].names())
    assert told["random"]["options"]["offspring"] == "int = 25"
    assert told["random"]["owner"] == "qratk"


def test_components_of_unknown_kind_is_one_line(capsys):
    assert main(["components", "searcher"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qratk: error: there is no open set 'searcher'; known are estimators")
    assert "Traceback" not in error


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("QRATK_DEBUG", "1")
    assert main(["components", "searcher"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_component_has_a_summary():
    for registry in REGISTRIES.values():
        assert all(row.summary or row.problem for row in rows(registry)), registry.kind


def test_gain_is_told_for_the_asked_bits_only():
    four, two = evaluation_entry("4:8*2", 0.5, 100), evaluation_entry("2:8*2", 0.1, 60)
    comparisons = (
        ComparisonEntry(baseline=four, difference=0.25, low=0.1, high=0.4, confidence=0.95),
        ComparisonEntry(baseline=two, difference=0.65, low=0.5, high=0.8, confidence=0.95),
    )
    tests = {"8:4 2:8": {"score": 0.7}, "4:8*2": {"score": 0.6}}
    best = evaluation_entry("8:4 2:8", 0.75, 90)
    text = gain_text(result_document(best, comparisons=comparisons, test_scores=tests), 4)
    assert "over uniform 4:8: +0.2500 [+0.1000, +0.4000] at 90% of its bytes; on test data +0.1000" in text
    assert "2:8" not in text.splitlines()[-1]


def test_gain_of_an_unfinished_run_is_one_line(tmp_path, capsys):
    assert main(["gain", str(tmp_path)]) == 1
    assert "holds no finished search" in capsys.readouterr().err
