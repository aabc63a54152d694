"""The `qratk` command: decides what is asked for before anything heavy is imported."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qratk import __version__
from qratk.core.work import listening
from qratk.reporters.working import WorkLines


@dataclass(frozen=True)
class Command:
    """A command: where its function is ("module:function", taking the arguments after the name), and a summary."""

    target: str
    summary: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """The function; imports its module."""
        module, _, name = self.target.partition(":")
        function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
        return function


COMMANDS: Final[dict[str, Command]] = {
    "search": Command("qratk.cli.search:search", "find bits and ranks under a memory budget"),
    "plan": Command("qratk.cli.plan:plan", "bytes, evaluations and time of a search, before weights are loaded"),
    "data": Command("qratk.cli.data:data", "what rows come to: forms, lengths, what is cut, what is learnt of each"),
    "fit": Command("qratk.cli.fit:fit", "fine-tune one configuration and save its adapter"),
    "validate": Command("qratk.cli.validate:validate", "score on the validation data"),
    "test": Command("qratk.cli.test:test", "score on the test data, and with lm-eval"),
    "predict": Command("qratk.cli.predict:predict", "predictions for the data's prediction set"),
    "export": Command("qratk.cli.export:export", "what was found, in a form that other tools take"),
    "init": Command("qratk.cli.init:init", "a commented configuration to start from, for your model and data"),
    "compare": Command("qratk.cli.compare:compare", "recipes, seeds and budgets in one table, with figures"),
    "gain": Command("qratk.cli.gain:gain", "what a finished search won over uniform bits and ranks"),
    "components": Command(
        "qratk.cli.components:components", "strategies that can be chosen, their options and packages"
    ),
}

_EPILOG: Final = """\
`qratk COMMAND --help` describes a command; `--print_config` prints all its settings as YAML.
A setting of the file is overridden by its path: --search.searcher=random --search.searcher.population=20
Set QRATK_DEBUG=1 for a traceback when something fails."""


def usage() -> str:
    """The text of `qratk --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = "usage: qratk COMMAND [--config FILE] [--SETTING VALUE ...]\n       qratk --help | --version"
    return "\n".join([head, "", "commands:", *lines, "", _EPILOG])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a command: 0 done, 1 an error that the user can cure, 2 a wrong command line, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(usage(), file=sys.stderr)
        return 2
    name, rest = given[0], given[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"qratk {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"{usage()}\n\nqratk: error: unknown command {name!r}.{hint}", file=sys.stderr)
        return 2
    return _run(command, rest)


def _run(command: Command, arguments: Sequence[str]) -> int:
    debug = os.environ.get("QRATK_DEBUG", "") not in ("", "0")
    try:
        with listening(WorkLines(sys.stderr, overwriting=sys.stderr.isatty())):
            return command.load()(arguments)
    except BrokenPipeError:  # `qratk components | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("qratk: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # also what nobody foresaw ends in one message
        from qratk.cli.outcome import told
        from qratk.core.secrets import text_without_secrets

        if debug:
            print(text_without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        print(f"qratk: error: {text_without_secrets(told(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
