"""Lightning's commands and ours on one configuration: the only module that knows every part."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, cast

import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils.logging import disable_progress_bar

from qratk import _names
from qratk.core.errors import ConfigurationError
from qratk.core.result import SearchResult
from qratk.core.text import without_secrets
from qratk.data.base import TaskData
from qratk.data.instruction import InstructionData
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.data.text import TextData
from qratk.embedded.datamodule import EmbeddedData
from qratk.loop import SearchLoop
from qratk.reporting.base import Reporter
from qratk.reporting.standard import standard_reporters
from qratk.run import files
from qratk.run.atomic import write_atomically
from qratk.training.module import FineTuneModule

LIGHTNING_COMMANDS: Final = ("fit", "validate", "test", "predict")
DATA: Final = (InstructionData, MultipleChoiceData, TextData, EmbeddedData)  # imported, so that their names resolve
COMMANDS: Final = (*LIGHTNING_COMMANDS, "search", "plan")

_YAML: Final = "qratk"  # the parser mode: YAML in which components go by their names
# What one command saves and another must accept, with the commands that use it by themselves.
_SHARED: Final = {"ckpt_path": str, "weights_only": bool, "verbose": bool, "return_predictions": bool, "run_dir": str}

# Options of the model that say where and how fast it computes, never what: a search is resumed with other ones too.
_EXECUTION: Final = ("bank_dir", "dense_cache")


@dataclass(frozen=True)
class LmEvalOptions:
    """What `qratk test` runs with lm-eval beside the data's own scores.

    Args:
        tasks: names of lm-eval tasks; none by default.
        task_folders: folders with task files of your own.
        limit: only so many items of each task.
        batch_size: sequences in one pass.
    """

    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 8


class SearchTrainer(Trainer):
    """Lightning's Trainer with one more verb; its options hold for every run of a search too."""

    def __init__(self, **options: Any) -> None:
        if options.get("strategy") == "fsdp":  # Lightning's own flattens parameters, which the adapters cannot be
            options["strategy"] = "fsdp2"
        self._options = copy.deepcopy(options)
        super().__init__(**options)

    def another(self, **options: Any) -> Trainer:
        """A fresh Trainer with the same options, except for those given: a search makes one a run."""
        return Trainer(**{**copy.deepcopy(self._options), **options})

    def search(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        search: SearchLoop,
        *,
        run_dir: Path,
        reporter: Reporter,
        config: dict[str, Any] | None = None,
    ) -> SearchResult:
        """Result of searching bits and ranks under a memory budget; continues what `run_dir` holds."""
        return search.run(
            run_dir=run_dir,
            reporter=reporter,
            config=config or {},
            module=model,
            datamodule=datamodule,
            trainer=self.another,
        )


class CommandParser(LightningArgumentParser):
    """Lightning's parser; components go by their registered names, and a mistake ends in one line."""

    settings: Sequence[str] = ()  # what may be set, to suggest the nearest

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Namespace of command-line arguments."""
        given = sys.argv[1:] if args is None else args
        parsed: Namespace = super().parse_args(_names.resolve_arguments(given), *more, **options)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the message alone: Lightning's usage text takes a hundred lines."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"qratk: error: {explained(message, self.settings)}", file=sys.stderr)
        print(f"(`{self.prog} --help` lists all settings)", file=sys.stderr)
        raise SystemExit(2)


def explained(message: str, settings: Sequence[str] = ()) -> str:
    """jsonargparse's message without what only a programmer reads, and with what would be right."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    text = "\n".join(lines)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", text)
    text = re.sub(r"<class '(?:collections\.abc\.)?(\w+)'>", lambda m: {"Sequence": "list"}.get(m[1], m[1]), text)
    text = re.sub(r"collections\.abc\.Sequence\[", "list[", text)
    if match := re.search(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted", text):
        return text + _names.option_hint(match[1], match[2])
    if match := re.search(r"unrecognized arguments: --([\w.]+)", text):
        return text + _names.nearest(match[1], settings)
    if match := re.search(r"does not accept option '([\w.]+)'", text):
        return text + _names.nearest(match[1], settings)
    if match := re.search(r'key "data".*Expected a dot import path string: (\w+)', text, re.S):
        names = [cls.__name__ for cls in DATA]
        return f"data: unknown name {match[1]!r}; known are {', '.join(names)}" + _names.nearest(match[1], names)
    return re.sub(r"(arguments are required: )(?:\w+\.)(\w+)", r"\1--\2", text)


_NOISE = re.compile(r"Expected a path but|Subtypes: \[|Expected a <class 'NoneType'>|Given value type:")


class QratkCLI(LightningCLI):
    """Builds module, data, trainer and search loop from YAML and the command line, and runs a command.

    One file serves all commands: every command accepts all sections, and builds only what it needs. `reporters` makes
    what a search reports to, of its run directory.
    """

    def __init__(
        self, command: str, arguments: Sequence[str] = (), *, reporters: Callable[..., Reporter] = standard_reporters
    ) -> None:
        _prepare_parsing()
        self._reporters = reporters
        if command in ("search", "plan"):  # a search makes two trainers an evaluation, and each has much to say
            for name in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).setLevel(logging.WARNING)
        self._command = command
        super().__init__(
            FineTuneModule,
            TaskData,
            save_config_callback=SaveCleanConfig,
            trainer_class=SearchTrainer,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": _YAML, "prog": "qratk", "description": "Commands of qratk."},
            parser_class=CommandParser,
            subclass_mode_data=True,
            trainer_defaults={"use_distributed_sampler": False},  # the data share their batches out themselves
            args=[command, *arguments],
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, with the arguments that the command line does not give."""
        ours: dict[str, set[str]] = {"search": set(), "plan": set()}
        return {**LightningCLI.subcommands(), **ours}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `search` and `lm_eval`."""
        parser.add_class_arguments(SearchLoop, _names.SECTION, instantiate=False, sub_configs=True)
        parser.set_defaults({f"{_names.SECTION}.{slot}": value for slot, value in _names.defaults().items()})
        parser.add_class_arguments(LmEvalOptions, "lm_eval")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the command that was asked for: the parser of each takes about half a second.
        command = self._command
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
        _add_own_arguments(parser, subcommand, present=self._subcommand_method_arguments[subcommand])
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike Lightning's, without a warning when arguments are given from Python."""
        if isinstance(args, dict | Namespace):
            document = args.as_dict() if isinstance(args, Namespace) else args
            self.config = parser.parse_object(_names.resolve_document(document, COMMANDS))
        else:
            self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Lightning takes the checkpoint's model settings over the given ones in silence: say so. A search or a plan
        # starts from no checkpoint, even when the file of a fit names one.
        command = self.config.subcommand
        if command not in LIGHTNING_COMMANDS:
            return
        given = _plain(self.config[command].get("model"))
        super()._parse_ckpt_path()
        used = _plain(self.config[command].get("model"))
        for key in (key for key in used if used[key] != given.get(key)):
            text = f"model.{key}: {used[key]!r} of the checkpoint is used, not {given.get(key)!r}"
            print(f"qratk {command}: {text}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        """Build what the command needs: strategies of the search only where there is one."""
        needed = self.config.clone()
        if self.subcommand in ("search", "plan"):
            self.save_config_callback = None  # a search saves its configuration itself, once
        else:
            needed[self.subcommand].pop(_names.SECTION)
        self.config_init = self.parser.instantiate_classes(needed)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The Trainer; none for `plan`, whose machine need not have the devices."""
        return None if self.subcommand == "plan" else super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            self.plan(self.model, self.datamodule)
        else:
            super()._run_subcommand(subcommand)

    def resolved(self) -> dict[str, Any]:
        """All settings as plain data, without secrets and without what names a single run."""
        command = str(self.subcommand)
        text = self._parser(command).dump(self.config[command], skip_none=False)
        document = without_secrets(yaml.safe_load(text))
        return {key: value for key, value in document.items() if key not in ("config", *_SHARED)}

    def search(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Run the search, or continue it."""
        loop = self._loop()
        run_dir = choose_run_dir(self.config.search.run_dir, name=loop.name)
        config = self.resolved()
        save_config(config, run_dir)
        reporter = self._reporters(run_dir, fit_config=fit_config(config, steps=loop.ladder.highest))
        go_on = f"qratk search --config {run_dir / files.CONFIG} --run_dir {run_dir}"
        with resumable(go_on), closing(reporter):
            cast(SearchTrainer, self.trainer).search(
                model, datamodule, loop, run_dir=run_dir, reporter=reporter, config=deciding(config)
            )

    def plan(self, model: FineTuneModule, datamodule: TaskData) -> None:
        """Print what a search would take."""
        from qratk.plan import as_text, make_plan

        accumulate = self.config.plan.trainer.accumulate_grad_batches
        plan = make_plan(model, datamodule, self._loop(), accumulate=accumulate)
        print(json.dumps(plan.as_dict(), indent=2) if self.config.plan.json else as_text(plan))

    def _loop(self) -> SearchLoop:
        section = self._get(self.config_init, _names.SECTION)
        return SearchLoop(**section.as_dict() if isinstance(section, Namespace) else section)

    def before_predict(self) -> None:
        """Have the predictions written."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        self.trainer.callbacks.append(PredictionFile(folder))  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Save the adapter beside the logs, as PEFT wants it, and score it where there is validation data."""
        log_dir = self.trainer.log_dir  # a broadcast: every process must ask
        if log_dir and self.trainer.is_global_zero:
            folder = Path(log_dir) / "adapter"
            self.model.save_adapter(folder)
            print(f"adapter: {folder}")
        if self.datamodule.has("validation") and self.trainer.limit_val_batches != 0:
            self.trainer.validate(self.model, datamodule=self.datamodule)

    def after_test(self) -> None:
        """Run lm-eval on what was tested, when tasks are given."""
        options: LmEvalOptions = self._get(self.config_init, "lm_eval")
        if not options.tasks:
            return
        from qratk.data.lm_eval import evaluate_lm_eval

        backbone = self.model.backbone
        with backbone.stored_precision():  # as the adapter is saved, and as Lightning's test scored it
            scores = evaluate_lm_eval(
                backbone.model,
                backbone.tokenizer,
                options.tasks,
                task_folders=options.task_folders,
                batch_size=options.batch_size,
                limit=options.limit,
                device=str(self.trainer.strategy.root_device),
            )
        print(yaml.safe_dump({"lm_eval": scores}, sort_keys=False), end="")


class PredictionFile(BasePredictionWriter):
    """Writes `predictions.jsonl`: log-likelihood and tokens of every row, with the item that it belongs to."""

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.path = folder / "predictions.jsonl"

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all rows, in the order of the data."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        items = [row.item for row in data.scoring_rows(data.prediction_split)]
        lines = [
            {"row": row, "item": items[row], "log_likelihood": value, "tokens": tokens}
            for batch in predictions
            for row, value, tokens in zip(
                *(batch[k].tolist() for k in ("row", "log_likelihood", "tokens")), strict=True
            )
        ]
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["row"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)
        print(f"predictions: {self.path}")


class SaveCleanConfig(SaveConfigCallback):
    """Saves the configuration of a run beside its logs, without secrets."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        clean = parser.parse_object(without_secrets(config.as_dict()))
        super().__init__(parser, clean, **{"overwrite": True, **options})


def choose_run_dir(given: str | None, *, name: str) -> Path:
    """The folder that was asked for, or a new `runs/<time>-<name>`."""
    if given:
        return Path(given)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    tries = (Path("runs") / (stem + (f"-{n}" if n else "")) for n in range(1000))
    return next(path for path in tries if not path.exists())


def save_config(config: dict[str, Any], run_dir: Path) -> None:
    """Write `config.yaml` of a run; one that is there stays, for what was measured belongs to it."""
    path = run_dir / files.CONFIG
    if path.exists():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a search finds: all but those of how the model is held."""
    model = {key: value for key, value in config["model"].items() if key not in _EXECUTION}
    return {**config, "model": model}


def fit_config(config: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """What `best.yaml` holds besides the configuration: a fit of as many steps as the search's highest rung."""
    trainer = {**config.get("trainer", {})}
    if trainer.get("max_steps") in (None, -1):
        trainer["max_steps"] = steps
    return {**config, "trainer": trainer}


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Context in which Ctrl-C ends with status 130 and the command that goes on.

    Lightning turns a KeyboardInterrupt inside a fit into a SystemExit, so the signal itself is remembered.
    """
    interrupted = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if not interrupted and isinstance(stop, SystemExit):
            raise
        print(f"interrupted; to go on: {command}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)


def run(command: str, arguments: Sequence[str], **options: Any) -> int:
    """Exit status of a command with its arguments; `options` are those of `QratkCLI`."""
    # Classes named in a configuration may live in the working directory; last, so that they shadow nothing.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        QratkCLI(command, arguments, **options)
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error
    return 0


def fit(arguments: Sequence[str]) -> int:
    """Exit status of `qratk fit`."""
    return run("fit", arguments)


def validate(arguments: Sequence[str]) -> int:
    """Exit status of `qratk validate`."""
    return run("validate", arguments)


def test(arguments: Sequence[str]) -> int:
    """Exit status of `qratk test`."""
    return run("test", arguments)


def predict(arguments: Sequence[str]) -> int:
    """Exit status of `qratk predict`."""
    return run("predict", arguments)


def search(arguments: Sequence[str]) -> int:
    """Exit status of `qratk search`."""
    return run("search", arguments)


def plan(arguments: Sequence[str]) -> int:
    """Exit status of `qratk plan`."""
    return run("plan", arguments)


def _prepare_parsing() -> None:
    yaml_loader = get_loader("yaml")
    set_loader(_YAML, lambda text: _names.resolve_document(yaml_loader(text), COMMANDS), (yaml.YAMLError,))
    set_dumper(_YAML, lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    # Lightning calls methods that jsonargparse has renamed; nothing a user could do.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Lightning recommends its paid services at every start.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    # PEFT asks transformers for a name that is on its way out; nothing a user could do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Quantisers are given as plain data and built by the module, from the registry alone.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in str(record.msg)


def _add_own_arguments(parser: LightningArgumentParser, command: str, *, present: Sequence[str]) -> None:
    if command == "plan":
        parser.add_argument("--json", action="store_true", help="Print the plan for machines.")
    if "weights_only" in present:  # a checkpoint is data: nothing in it may run
        parser.set_defaults(weights_only=True)
    for name, kind in _SHARED.items():
        if name == "run_dir" and command == "search":
            text = "Folder of the run; one that holds a search continues it. Default: runs/<time>-<name>."
        else:
            text = "Accepted so that one file serves all commands; unused here."
        if name not in present:
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)


def _plain(namespace: Any) -> dict[str, Any]:
    return dict(namespace.as_dict()) if isinstance(namespace, Namespace) else dict(namespace or {})
