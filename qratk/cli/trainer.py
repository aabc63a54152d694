"""Lightning's Trainer with one more verb."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from qratk.core.checks import Checks
from qratk.core.errors import ConfigurationError
from qratk.core.result import SearchResult
from qratk.data.base import TaskData
from qratk.executors.base import Blueprint
from qratk.loop import SearchLoop
from qratk.reporters.base import Reporter
from qratk.settings.identity import comparable
from qratk.training.module import FineTuneModule


class SearchTrainer(Trainer):
    """Lightning's Trainer with one more verb; its options hold for every run of a search too."""

    def __init__(self, **options: Any) -> None:
        _check_callbacks(options.get("callbacks"))
        if options.get("strategy") == "fsdp":  # Lightning's own flattens parameters, which the adapters cannot be
            options["strategy"] = "fsdp2"
        self._options = copy.deepcopy(options)
        super().__init__(**options)

    def another(self, **options: Any) -> Trainer:
        """A fresh Trainer with the same options, except for those given: a search makes one a run."""
        return Trainer(**{**copy.deepcopy(self._options), **options})

    def search(
        self,
        model: FineTuneModule,
        datamodule: TaskData,
        search: SearchLoop,
        *,
        run_dir: Path,
        reporter: Reporter,
        config: dict[str, Any] | None = None,
        blueprint: Blueprint | None = None,
    ) -> SearchResult:
        """Result of searching bits and ranks under a memory budget; continues what `run_dir` holds."""
        return search.run(
            run_dir=run_dir,
            reporter=reporter,
            config=config or {},
            comparable=comparable,
            module=model,
            datamodule=datamodule,
            trainer=self.another,
            blueprint=blueprint,
        )


_LIMITS: Final = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "val_check_interval",
)  # fmt: skip
_AVERAGING: Final = (WeightAveraging, StochasticWeightAveraging)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for options of the Trainer that cannot be, before a device or process is touched."""
    checks = Checks()
    checks.at_least(0, gradient_clip_val=options.get("gradient_clip_val"))
    checks.at_least(1, accumulate_grad_batches=options.get("accumulate_grad_batches"))
    for name in _LIMITS:
        value = options.get(name)
        checks.require(_is_limit(value), name, value, "must be a share from 0 to 1, or a whole number of batches")
    accelerator = options.get("accelerator", "auto")
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if isinstance(accelerator, str):
        near = get_close_matches(accelerator, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        checks.require(accelerator in known, "accelerator", accelerator, f"must be one of {', '.join(known)}{hint}")
    count = _device_count(options.get("devices"))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    cores = os.cpu_count() or 1
    if count is not None and on_cpu:
        checks.require(count <= cores, "devices", count, f"must be at most {cores}, as many as there are cores")
    folder = options.get("default_root_dir")
    checks.require(_can_be_made(folder), "default_root_dir", folder, "must be a folder that can be made")
    checks.finish()


def _is_limit(value: Any) -> bool:
    """Whether it is a share or a number of batches, or nothing that counts them: null, or an interval of time."""
    return not isinstance(value, int | float) or 0 <= value <= 1 or (value > 1 and value % 1 == 0)


def _device_count(devices: Any) -> int | None:
    """How many devices are asked for; None where Lightning chooses."""
    if isinstance(devices, str) and devices.strip().lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        return len(devices)
    return devices if isinstance(devices, int) and devices > 0 else None


def _can_be_made(folder: Any) -> bool:
    if not isinstance(folder, str) or "://" in folder:
        return True
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _check_callbacks(callbacks: Any) -> None:
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    wrong = [type(callback).__name__ for callback in given if isinstance(callback, _AVERAGING)]
    if wrong:
        raise ConfigurationError(
            f"trainer.callbacks: {wrong[0]} averages a copy of the module that it makes before the adapters are there; "
            "leave it out, and take a smaller learning rate or `model.schedule: cosine` for a smoother end"
        )
