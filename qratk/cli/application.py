"""Lightning's command line on our parser: what all commands that work on a model and data have in common."""

from __future__ import annotations

import logging
import sys
from abc import ABC
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qratk.cli.checkpoint import require_checkpoint
from qratk.cli.diagnosis import Diagnosis, Mistake, Source, listed, pairs_for_numbers, sources_of
from qratk.cli.outcome import threads_told, warnings_told
from qratk.cli.parser import (
    COMMANDS,
    LIGHTNING_COMMANDS,
    SHARED,
    YAML_MODE,
    CommandParser,
    LmEvalOptions,
    add_own_arguments,
    prepare_parsing,
)
from qratk.cli.shipped import with_paths
from qratk.cli.trainer import SearchTrainer, check_options
from qratk.cli.values import impossible
from qratk.core.errors import ConfigurationError, UnknownComponentError
from qratk.core.secrets import without_secrets
from qratk.data.base import TaskData
from qratk.loop import SearchLoop
from qratk.settings import names
from qratk.settings.recipe import defaults
from qratk.training.module import FineTuneModule


class QratkCLI(LightningCLI, ABC):
    """Builds module, data, trainer and search loop from YAML and the command line, and runs a command.

    One file serves all commands: every command accepts all sections, and builds only what it needs. A command is a
    subclass with its name in `command`; Lightning calls its methods `before_<command>`, `<command>` and
    `after_<command>`.
    """

    command: ClassVar[str]
    searches: ClassVar[bool] = False  # whether the command builds a search

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        prepare_parsing()
        self._words: Sequence[str] = ()
        super().__init__(
            FineTuneModule,
            TaskData,
            save_config_kwargs={"overwrite": True},
            trainer_class=SearchTrainer,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": YAML_MODE, "prog": "qratk", "description": "Commands of qratk."},
            parser_class=CommandParser,
            subclass_mode_data=True,
            trainer_defaults={"use_distributed_sampler": False},  # the data share their batches out themselves
            args=[self.command, *arguments],
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, with the arguments that the command line does not give."""
        ours: dict[str, set[str]] = {"search": set(), "plan": set(), "data": set()}
        return {**LightningCLI.subcommands(), **ours}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `search` and `lm_eval`."""
        parser.add_class_arguments(SearchLoop, names.SECTION, instantiate=False, sub_configs=True)
        parser.set_defaults({f"{names.SECTION}.{slot}": value for slot, value in defaults().items()})
        parser.add_class_arguments(LmEvalOptions, "lm_eval")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the command that was asked for: the parser of each takes about half a second.
        command = self.command
        prepared = self._prepare_subcommand_parser(SearchTrainer, command)
        self._subcommand_parsers = {command: prepared}
        parser.add_subcommands().add_subcommand(command, prepared)
        for known in (parser, prepared):
            assert isinstance(known, CommandParser)
            known.prog = f"qratk {command}"
            known.settings = [option.removeprefix("--") for option in prepared._option_string_actions]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # Ours are prepared by hand: `add_method_arguments` would make a second group named "search".
        if subcommand in LIGHTNING_COMMANDS:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        else:
            parser = self.init_parser(**kwargs)
            self._add_arguments(parser)
            self._subcommand_method_arguments[subcommand] = []
        add_own_arguments(parser, subcommand, present=self._subcommand_method_arguments[subcommand])
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike Lightning's, without a warning when arguments are given from Python."""
        if isinstance(args, dict | Namespace):
            document = args.as_dict() if isinstance(args, Namespace) else args
            self.config = parser.parse_object(names.resolve_document(document, COMMANDS))
        else:
            self._parse_words(parser, args)

    def _parse_words(self, parser: LightningArgumentParser, words: Sequence[str]) -> None:
        both = [each for each in (parser, self._subcommand_parsers[self.command]) if isinstance(each, CommandParser)]
        self._words = with_paths(words[1:])
        for each in both:
            each.examine = self._all_mistakes
        try:
            self.config = parser.parse_args(words)
        except UnknownComponentError as error:
            raise ConfigurationError(self._all_mistakes() or str(error)) from error
        finally:
            for each in both:
                each.examine = None
        given = [(section, self.settings.get(section)) for section in ("model", "trainer", names.SECTION)]
        wrong = [Mistake((name,), f"must hold settings by name, got {v!r}") for name, v in given if _is_value(v)]
        wrong += pairs_for_numbers(self._sources, self.settings)
        if wrong:
            raise ConfigurationError(listed(wrong, self._sources))

    def _all_mistakes(self) -> str | None:
        """All that is wrong with settings that could not be parsed; None where that is not in a single setting."""
        parser = self._subcommand_parsers[self.command]
        assert isinstance(parser, CommandParser)
        parser.examine = None
        sources = self._sources
        diagnosis = Diagnosis(parser, sources)
        mistakes = diagnosis.mistakes
        if diagnosis.config is not None:
            mistakes += self._impossible(diagnosis.config)
        return listed(mistakes, sources) if mistakes else None

    @property
    def _sources(self) -> list[Source]:
        """Where settings were given; none where a file cannot be read as settings."""
        try:
            return sources_of(self._words)
        except ConfigurationError:
            return []

    def _impossible(self, settings: Namespace) -> tuple[Mistake, ...]:
        """Values that are of the right type and cannot be."""
        return tuple(impossible(self._subcommand_parsers[self.command], settings, searches=self.searches))

    def _parse_ckpt_path(self) -> None:
        # Lightning takes the checkpoint's model settings over the given ones in silence: say so. A search or a plan
        # starts from no checkpoint, even when the file of a fit names one.
        if self.command not in LIGHTNING_COMMANDS:
            return
        if path := self.settings.get("ckpt_path"):
            require_checkpoint(str(path))
        given = _plain(self.settings.get("model"))
        super()._parse_ckpt_path()
        used = _plain(self.settings.get("model"))
        for key in (key for key in used if used[key] != given.get(key)):
            if used[key] == without_secrets(given.get(key)):  # checkpoints are written without secrets
                self.settings.model[key] = given.get(key)
                continue
            text = f"model.{key}: {used[key]!r} of the checkpoint is used, not {given.get(key)!r}"
            print(f"qratk {self.command}: {text}", file=sys.stderr)

    @property
    def settings(self) -> Namespace:
        """All settings of the command, as parsed."""
        found: Namespace = self.config[self.command]
        return found

    def instantiate_classes(self) -> None:
        """Build what the command needs; strategies of the search are left out where there is none."""
        needed = self.config.clone()
        needed[self.command].pop(names.SECTION)
        self._build(needed)

    def _build(self, config: Namespace) -> None:
        try:
            check_options(self.settings.trainer.as_dict())
            self.config_init = self.parser.instantiate_classes(config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            self._built()
            self.trainer = self.instantiate_trainer()
        except Exception as error:
            mistakes = self._impossible(self.settings)
            if not mistakes:
                raise
            raise ConfigurationError(listed(mistakes, self._sources)) from error

    def _built(self) -> None:
        """For a command to build more of what `config_init` holds."""

    def resolved(self) -> dict[str, Any]:
        """All settings as plain data, without secrets and without what names a single run."""
        document = yaml.safe_load(self._parser(self.command).dump(self.settings, skip_none=False))
        return {key: value for key, value in document.items() if key not in ("config", *SHARED)}


class SearchingCLI(QratkCLI, ABC):
    """A command that builds a search: of no run beside those of the search, which save and log by themselves."""

    searches = True
    loop: SearchLoop  # that the settings describe

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):  # two trainers an evaluation have much to say
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(arguments)

    def instantiate_classes(self) -> None:
        """Build model, data, trainer and the strategies of the search."""
        self.save_config_callback = None  # a search saves its configuration itself, once
        self._build(self.config.clone())

    def _built(self) -> None:
        section = self._get(self.config_init, names.SECTION)
        self.loop = SearchLoop(**section.as_dict() if isinstance(section, Namespace) else section)


def find_local_classes() -> None:
    """Let classes that a configuration names live in the working directory; last, so that they shadow nothing."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def run(command: Callable[[Sequence[str]], QratkCLI], arguments: Sequence[str]) -> int:
    """Exit status of a command with its arguments."""
    find_local_classes()
    try:
        with threads_told(), warnings_told():
            command(arguments)
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error
    return 0


def _is_value(section: Any) -> bool:
    return section is not None and not isinstance(section, Namespace)


def _plain(namespace: Any) -> dict[str, Any]:
    return dict(namespace.as_dict()) if isinstance(namespace, Namespace) else dict(namespace or {})
