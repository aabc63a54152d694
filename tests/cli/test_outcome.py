"""Whatever is raised ends in one message and status 1."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings

import pytest

from qratk.__main__ import COMMANDS, Command, main
from qratk.cli.outcome import threads_told, told, warnings_told
from qratk.core.errors import DataError


def raising(error: BaseException):
    """A command that fails."""

    def command(arguments):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("the sky\nfell"), "RuntimeError: the sky fell. This looks like a fault of qratk: QRATK_DEBUG=1"),
        (RecursionError(), "RecursionError: no text. This looks like a fault"),
        (FileNotFoundError(2, "No such file or directory", "rows.jsonl"), "rows.jsonl: No such file or directory"),
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (MemoryError(), "memory ran out: MemoryError"),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), "memory ran out: unable to mmap"),
        (ModuleNotFoundError("No module named 'wandb'"), "a package is missing or broken: No module named 'wandb'"),
        (
            ValueError(
                "Errors:\n  - Problem with given class_path 'x.WandbLogger':\n    Requirement 'wandb' not met\n"
                "  - Expected a <class 'bool'>\nGiven value: ..."
            ),
            "error: x.WandbLogger cannot be made: Requirement 'wandb' not met\n",
        ),
        (DataError("rows.jsonl, line 3: no answer"), "error: rows.jsonl, line 3: no answer\n"),
    ],
)
def test_any_exception_is_one_message(monkeypatch, capsys, error, text):
    monkeypatch.setattr(Command, "load", lambda self: raising(error))
    monkeypatch.delenv("QRATK_DEBUG", raising=False)
    assert main([next(iter(COMMANDS))]) == 1
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.startswith("qratk: error: ")
    assert "Traceback" not in printed


def test_debug_shows_the_traceback_of_a_fault_without_secrets(monkeypatch, capsys):
    monkeypatch.setattr(Command, "load", lambda self: raising(RuntimeError("https://me:8675309@host/x")))
    monkeypatch.setenv("QRATK_DEBUG", "1")
    assert main(["search"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "8675309" not in printed


def test_users_mistake_within_a_wrapper_is_told_in_its_own_words():
    wrapper = ValueError("Parser key 'data': a hundred lines")
    wrapper.__cause__ = DataError("batch_size must be at least 1, got 0")
    assert told(wrapper) == "batch_size must be at least 1, got 0"


def test_notes_say_where():
    error = RuntimeError("x")
    error.add_note("rows.jsonl, line 7")
    assert told(error).endswith("\n  rows.jsonl, line 7")


def test_thread_that_fails_is_one_line(capsys):
    def fail() -> None:
        raise OSError(28, "No space left on device", "events.out")

    with threads_told():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    error = capsys.readouterr().err
    assert error == "qratk: warning: a thread beside the command failed: events.out: No space left on device\n"


def test_warning_is_one_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with warnings_told():
            warnings.warn("too few\n  workers", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "qratk: warning: too few workers\n"


def test_kernels_that_nobody_needs_are_not_recommended():
    code = "import qratk.cli, logging; print(logging.getLogger('bitsandbytes.backends.cpu.ops').level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == logging.ERROR


def test_lightning_says_only_what_is_of_use(caplog):
    from qratk.cli.parser import prepare_parsing

    prepare_parsing()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=logger.name):
        for text in ("GPU available: False, used: False", "TPU available: False, using: 0 TPU cores", "`fit` stopped"):
            logger.info(text)
    with caplog.at_level(logging.INFO, logger="lightning.fabric.utilities.seed"):
        logging.getLogger("lightning.fabric.utilities.seed").info("Seed set to 0")
    assert [record.message for record in caplog.records] == ["`fit` stopped"]
