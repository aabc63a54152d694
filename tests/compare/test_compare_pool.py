"""Worker processes: answers, deaths, the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qratk.compare.pool import Pool
from qratk.compare.worker import Answer, Task, output_to, run_task, stopped
from qratk.core.errors import CommandLineError


def echo(connection):
    """A worker that answers with what its task says, or does what it says."""
    while True:
        try:
            (word,) = connection.recv().arguments
        except EOFError:
            return
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "threads":
            word = os.environ["OMP_NUM_THREADS"]
        if word == "wait":
            time.sleep(60)
        connection.send(Answer(word))


def tasks(tmp_path, *words):
    return [Task((word,), tmp_path / "log.txt") for word in words]


def test_every_task_is_answered_once(tmp_path):
    answers = dict(Pool(2, echo).run(tasks(tmp_path, *"abcde")))
    assert {number: answer.reason for number, answer in answers.items()} == dict(enumerate("abcde"))


def test_killed_worker_costs_its_task_alone(tmp_path):
    answers = dict(Pool(1, echo).run(tasks(tmp_path, "a", "die", "b")))
    assert answers[1].reason == "its process was killed by SIGKILL; out of memory?"
    assert (answers[0].reason, answers[2].reason) == ("a", "b")


def test_workers_see_the_environment_unless_it_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pool = Pool(1, echo, environment={"OMP_NUM_THREADS": "1"})
    assert next(iter(dict(pool.run(tasks(tmp_path, "threads"))).values())).reason == "1"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    pool = Pool(1, echo, environment={"OMP_NUM_THREADS": "1"})
    assert next(iter(dict(pool.run(tasks(tmp_path, "threads"))).values())).reason == "7"


def test_closing_stops_running_tasks(tmp_path):
    pool = Pool(2, echo)
    answers = pool.run(tasks(tmp_path, "a", "wait"))
    assert next(answers)[1].reason == "a"
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 20


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_compare_pool import Pool, echo, tasks
if __name__ == "__main__":
    for _ in Pool(1, echo).run(tasks(Path(sys.argv[2]), "a", "wait")):
        print("one is done", flush=True)
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_comparison_that_is_killed(tmp_path, by):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        assert begun.stdout.readline() == "one is done\n"
        children = Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
        os.kill(begun.pid, by)
    assert children
    until = time.monotonic() + 20
    while any(works(child) for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)


def works(process):
    try:
        return "multiprocessing" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def test_output_of_libraries_and_of_python_goes_to_the_file(tmp_path):
    with output_to(tmp_path / "a" / "log.txt"):
        print("printed")
        os.write(2, b"written\n")
        print("complained", file=sys.stderr)
    assert (tmp_path / "a" / "log.txt").exists()
    text = (tmp_path / "a" / "log.txt").read_text()
    assert "written" in text


def test_exit_of_a_command_says_what_became_of_it():
    assert stopped(CommandLineError("no such option\nDid you mean it?")).reason == "no such option\nDid you mean it?"
    assert stopped(SystemExit(130)).interrupted
    assert stopped(SystemExit(0)) == Answer()
    assert stopped(SystemExit(3)).reason == "exit status 3"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("it broke"), "ValueError: it broke"), (KeyboardInterrupt(), "interrupted")],
)
def test_any_error_of_a_search_is_a_reason(tmp_path, error, reason):
    def fail(arguments, *, reporters):
        raise error

    assert run_task(Task((), tmp_path / "log.txt"), fail).reason == reason


def test_traceback_of_a_search_that_raises_is_told_without_secrets(tmp_path, capsys):
    def fail(arguments, *, reporters):
        raise ConnectionError("cannot reach https://me:8675309@host/x")

    run_task(Task((), tmp_path / "log.txt"), fail)
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ConnectionError: cannot reach https://host/x" in told
