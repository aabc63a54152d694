"""What `qratk export` takes: a finished run, the settings of a fit with its adapter, or a fit's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from qratk.adapters.matrices.folder import put_pairs, read_pairs
from qratk.backbone.backbone import Backbone
from qratk.cli.application import QratkCLI, find_local_classes
from qratk.cli.checkpoint import require_checkpoint
from qratk.core.configuration import Configuration
from qratk.core.errors import CommandLineError, ConfigurationError, RunDirectoryError
from qratk.core.intact import require_intact
from qratk.data.base import TaskData
from qratk.run import files
from qratk.run.document import read_settings
from qratk.run.run import Run
from qratk.settings.names import registered_name
from qratk.training.fit_checkpoint import FitCheckpoint
from qratk.training.module import FineTuneModule
from qratk.training.observing import observe
from qratk.training.preparation import asked_configuration, prepare_fit


@dataclass(frozen=True)
class Source:
    """A configuration with its adapters as they were scored.

    Attributes:
        settings: all settings, as a file of `qratk fit` has them.
        configuration: as text, with the options that a search had as shared settings.
        adapter: PEFT folder; None where there is none, or where a checkpoint holds the masters.
        masters: adapters of a checkpoint, by name; empty where a folder holds them.
        digest: of the model with its quantisers; None where it is not known.
    """

    settings: Mapping[str, Any]
    configuration: str
    adapter: Path | None = None
    masters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    digest: str | None = None

    def backbone(self) -> Backbone:
        """The model on this configuration, with these adapters; see `opened`."""
        return self.opened()[0]

    def opened(self) -> tuple[Backbone, TaskData]:
        """The model on this configuration, with these adapters, and the data with its tokenizer.

        Weights are packed as they were for the training: from the store, or anew with the same calibration sequences.
        Raises `ConfigurationError` where the model is another one by now.
        """
        built = _built(self._document())
        module, data = built.model, built.datamodule
        options = module.options
        backbone = module.backbone
        if self.digest is not None and not backbone.table.calibrated:
            self._require_digest(backbone)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        data.attach(backbone.tokenizer, context_length=module.context_length)

        def ready() -> Any:
            data.setup("fit")
            return data

        configuration = prepare_fit(backbone, options, asked_configuration(options), device=device, data=ready)
        if self.digest is not None and backbone.table.calibrated:
            self._require_digest(backbone)
        module.activate(configuration)
        backbone.keep_active()
        backbone.dense_cache("auto")  # the self-check writes texts, token by token
        backbone.model.to(device).eval()
        if self.adapter is not None:
            put_pairs(backbone.adapters, read_pairs(require_intact(self.adapter)))
        elif self.masters:
            backbone.load_adapter_state(self.masters)
            if count := backbone.adapters.method.observed_batches:
                observe(backbone.adapters, backbone.model, ready(), count, device=device)
        return backbone, data

    def _document(self) -> dict[str, Any]:
        """Settings of the very training, but that adapters begin without effect: they get their values after."""
        document = {key: value for key, value in self.settings.items() if key not in ("ckpt_path", "run_dir")}
        model = dict(document.get("model") or {})
        own = dict(model["init_args"]) if isinstance(model.get("init_args"), Mapping) else model
        configuration = Configuration.from_text(self.configuration)
        if own.get("init_iterations", 1) == 1:
            configuration = configuration.with_shared({**dict(configuration.shared), "init": "default"})
        if self.adapter is not None:
            own["adapter"] = _method(own.get("adapter", "lora"), int(own.get("init_iterations", 1)))
            own.pop("adalora", None)
        own["configuration"] = str(configuration)
        if own is not model:
            model["init_args"] = own
        return {**document, "model": model}

    def _require_digest(self, backbone: Backbone) -> None:
        if backbone.digest() != self.digest:
            raise ConfigurationError(
                "the model is not the one that was searched: its weights, quantisers, compute type or calibration "
                "sequences differ, so that other codes would be exported than were scored; put the model and data back "
                "as they were, and use the machine's type of then (model.compute_dtype)"
            )


def source_of(given: Path, *, adapter: Path | None = None, settings: Path | None = None) -> Source:
    """What a path names.

    Args:
        given: folder of a finished run, its `best.yaml`, a file of settings for `qratk fit`, or a fit's checkpoint.
        adapter: PEFT folder for a file of settings that has none beside it.
        settings: file of a checkpoint's settings; by default the `config.yaml` that Lightning wrote above it.

    Raises `ConfigurationError` or `RunDirectoryError`, saying what is missing.
    """
    if not given.exists():
        raise ConfigurationError(f"{given}: there is no such file or folder")
    if given.is_dir():
        return _of_run(given)
    if given.suffix in (".yaml", ".yml"):
        beside = given.name == files.BEST and (given.parent / files.RESULT).exists()
        return _of_run(given.parent) if beside and adapter is None else _of_settings(given, adapter)
    return _of_checkpoint(given, settings)


def _of_run(folder: Path) -> Source:
    run = Run.open(folder)
    if not run.finished or run.best is None:
        raise RunDirectoryError(
            f"the search in {folder} has not ended; go on with it (`qratk search --config {folder / files.CONFIG} "
            f"--run_dir {folder}`), or export a fit's checkpoint"
        )
    settings, best = dict(run.settings.document), run.best.configuration
    if (known := run.decided("compute_dtype")) is not None:
        settings["model"] = _with_option(settings.get("model"), "compute_dtype", known)
    adapter = folder / files.ADAPTER
    if any(best.ranks) and not adapter.exists():
        raise RunDirectoryError(
            f"{adapter} is missing, the adapter as it was scored; the same `qratk search` on {folder} writes it again"
        )
    return Source(settings, str(best), adapter if any(best.ranks) else None, digest=run.model_digest)


def _of_settings(path: Path, adapter: Path | None) -> Source:
    settings = dict(read_settings(path).document)
    configuration = _option(settings.get("model"), "configuration")
    if not configuration:
        raise ConfigurationError(f"{path} names no configuration: give the folder of a run, or a file with one")
    if any(Configuration.from_text(str(configuration)).ranks) and adapter is None:
        raise ConfigurationError(
            f"{path} has no adapter: give --adapter LOG_DIR/adapter, as `qratk fit` writes it, or the folder of a run"
        )
    return Source(settings, str(configuration), adapter)


def _of_checkpoint(path: Path, settings: Path | None) -> Source:
    require_checkpoint(str(path))
    above = settings or path.parent.parent / files.CONFIG
    if not above.exists():
        raise ConfigurationError(
            f"{above} is missing, the settings that {path.name} was trained with; give them as --config FILE"
        )
    found = torch.load(path, map_location="cpu", weights_only=True)
    loaded = FitCheckpoint.take(found, str(found["configuration"]))
    document = dict(read_settings(above).document)
    if loaded.compute_dtype is not None:
        document["model"] = _with_option(document.get("model"), "compute_dtype", loaded.compute_dtype)
    return Source(document, loaded.configuration, masters=loaded.adapter)


def _method(given: Any, iterations: int) -> str:
    """The method whose folders hold what this one writes."""
    name = registered_name("adapters", str(given.get("class_path", "lora") if isinstance(given, Mapping) else given))
    if name == "dora" or iterations == 1 or name == "lora":
        return "dora" if name == "dora" else "lora"
    raise ConfigurationError(
        f"weights were packed anew for each rank (init_iterations={iterations}) under the adapter {name!r}, whose "
        "trained ranks a folder does not tell; export a fit's checkpoint"
    )


def _option(model: Any, name: str) -> Any:
    found = model if isinstance(model, Mapping) else {}
    return {**found, **(found.get("init_args") or {})}.get(name)


def _with_option(model: Any, name: str, value: object) -> dict[str, Any]:
    found = dict(model or {})
    if isinstance(found.get("init_args"), Mapping):
        return {**found, "init_args": {**found["init_args"], name: value}}
    return {**found, name: value}


def _built(document: Mapping[str, Any]) -> _Building:
    find_local_classes()
    try:
        return _Building(["--config", yaml.safe_dump(dict(document), allow_unicode=True)])
    except CommandLineError as error:
        raise ConfigurationError(error.message) from error


class _Building(QratkCLI):
    """Builds model and data and runs nothing."""

    command = "validate"
    model: FineTuneModule

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: whoever exports need not have the devices of the training."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: what was built is taken from outside."""
