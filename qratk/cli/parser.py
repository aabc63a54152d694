"""The command line's parser: components by their names, one file for all commands, a mistake in one message."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

import yaml
from jsonargparse import Namespace, set_dumper, set_loader, set_parsing_settings
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils.logging import disable_progress_bar

from qratk.cli.messages import explained
from qratk.cli.shipped import files_of, with_paths
from qratk.core.errors import CommandLineError
from qratk.core.secrets import text_without_secrets, without_secrets
from qratk.settings import names
from qratk.settings.reading import load, read_settings

LIGHTNING_COMMANDS: Final = ("fit", "validate", "test", "predict")
COMMANDS: Final = (*LIGHTNING_COMMANDS, "search", "plan")
YAML_MODE: Final = "qratk"  # the parser mode: YAML in which components go by their names
SHARED: Final = {"ckpt_path": str, "weights_only": bool, "verbose": bool, "return_predictions": bool, "run_dir": str}
"""What one command saves and another must accept: the commands that use it declare it by themselves."""


@dataclass(frozen=True)
class LmEvalOptions:
    """What `qratk test` runs with lm-eval beside the data's own scores.

    Args:
        tasks: names of lm-eval tasks; none by default.
        task_folders: folders with task files of your own.
        limit: only so many items of each task.
        batch_size: sequences in one pass.
        apply_chat_template: put prompts through the tokenizer's chat template.
        fewshot_as_multiturn: show examples as earlier turns of the chat; null means so with a chat template.
    """

    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None


class CommandParser(LightningArgumentParser):
    """Lightning's parser; components go by their registered names, and a mistake ends in one line."""

    settings: Sequence[str] = ()  # what may be set, to suggest the nearest
    examine: Callable[[], str | None] | None = None  # finds all mistakes, once one is known

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Namespace of command-line arguments."""
        given = with_paths(sys.argv[1:] if args is None else args)
        for path in files_of(given):
            read_settings(path)  # says what is wrong with a whole file before its settings are looked at
        parsed: Namespace = super().parse_args(names.resolve_arguments(given), *more, **options)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the message alone: Lightning's usage text takes a hundred lines."""
        if not self.exit_on_error:
            super().error(message, ex)
        found = (None if self.examine is None else self.examine()) or explained(message, self.settings)
        found = text_without_secrets(found)
        print(f"qratk: error: {found}", file=sys.stderr)
        print(f"(`{self.prog} --help` lists all settings)", file=sys.stderr)
        raise CommandLineError(found)


_OF_NO_USE: Final = ("Tip: For seamless cloud", "GPU available: False", "TPU available: ", "Seed set to ")


def prepare_parsing() -> None:
    """Teach jsonargparse our YAML, and keep off what other libraries say that a user cannot act on."""
    set_loader(YAML_MODE, lambda text: names.resolve_document(load(text), COMMANDS), (yaml.YAMLError,))
    set_dumper(YAML_MODE, _as_yaml)
    # Lightning calls methods that jsonargparse has renamed; nothing a user could do.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # At every start Lightning recommends its paid services, and names devices that are not there.
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").addFilter(_is_of_use)
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    # PEFT asks transformers for a name that is on its way out; nothing a user could do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Projections that PEFT leaves out are an error of ours, with what to do.
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
    # Quantisers are given as plain data and built by the module, from the registry alone.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)


def add_own_arguments(parser: LightningArgumentParser, command: str, *, present: Sequence[str]) -> None:
    """Add what a command takes beside the sections; `present` are arguments that Lightning has added."""
    if command == "plan":
        parser.add_argument("--json", action="store_true", help="Print the plan for machines.")
    if command == "data":
        splits = Literal["train", "validation", "test", "all"]
        colors = Literal["auto", "always", "never"]
        parser.add_argument("--rows", type=NonNegativeInt, default=3, help="Example rows that are shown.")
        parser.add_argument(
            "--split", type=splits | None, default=None, help="Whose rows; by default the first there is."
        )
        text = "Characters of a stretch of a row that are shown; 0 for all."
        parser.add_argument("--characters", type=NonNegativeInt, default=800, help=text)
        text = "Show by colour what is learnt; auto does so on a terminal, where NO_COLOR is not set."
        parser.add_argument("--color", type=colors, default="auto", help=text)
        parser.add_argument("--json", action="store_true", help="Print figures and rows for machines.")
    if "weights_only" in present:  # a checkpoint is data: nothing in it may run
        parser.set_defaults(weights_only=True)
    for name, kind in SHARED.items():
        if name == "run_dir" and command == "search":
            text = "Folder of the run; one that holds a search continues it. Default: runs/<time>-<name>."
        else:
            text = "Accepted so that one file serves all commands; unused here."
        if name not in present:
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)


def _as_yaml(data: Any) -> str:
    """Settings as every file and `--print_config` has them: components by name, and no secrets."""
    return yaml.safe_dump(names.named_document(without_secrets(data), COMMANDS), sort_keys=False, allow_unicode=True)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in _OF_NO_USE)
