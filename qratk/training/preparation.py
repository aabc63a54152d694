"""Builds what configurations need: packed weights and first values of adapters, for a fit or for a whole search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.memory import require_ranks
from qratk.core.space import SearchSpace
from qratk.training.building import spread
from qratk.training.options import FineTuneOptions

_CALIBRATION_BATCH: Final = 8


class CalibrationData(Protocol):
    """Data that have batches to look at before any training, such as `qratk.data.TaskData`."""

    def calibration_batches(self, count: int, batch_size: int, /) -> list[dict[str, Tensor]]:
        """So many training batches of so many sequences, on the CPU."""


def calibrate(backbone: Backbone, options: FineTuneOptions, data: CalibrationData) -> None:
    """Fit quantisers such as GPTQ, where the options name one, to training sequences.

    They depend on the data's options and on `calibration_sequences` alone: the same in a search and in a fit.
    """
    if backbone.table.calibrated:
        backbone.calibrate(_sequences(options, data))


def _sequences(options: FineTuneOptions, data: CalibrationData) -> list[dict[str, Tensor]]:
    size = min(options.calibration_sequences, _CALIBRATION_BATCH)
    return data.calibration_batches(-(-options.calibration_sequences // size), size)


def build_initial(
    backbone: Backbone,
    options: FineTuneOptions,
    choices: Sequence[tuple[int, int]],
    data: Callable[[], CalibrationData],
) -> None:
    """Make what adapters begin with at these (bits, rank), from a bank built at them; nothing for the default.

    The start is that of the options. `data` returns those that Fisher information is measured on, at 16 bits and
    without adapters, or that the start is calibrated on, where one of these is needed.
    """
    if not backbone.needs_initial(choices, init=options.init):
        return
    start, weightings, calibration = options.adapters.start, None, None
    if start is not None and start.weighted:
        backbone.activate(Configuration.uniform(16, 0, len(backbone.layers)), seed=options.seed)
        batches = data().calibration_batches(options.init_batches, options.init_batch_size)
        weightings = start.weightings(backbone.model, backbone.banks, batches)
    if start is not None and start.calibrated:
        calibration = _sequences(options, data())
    backbone.build_initial(choices, weightings=weightings, calibration=calibration, init=options.init)


def asked_configuration(options: FineTuneOptions) -> Configuration:
    """The configuration that the options ask for; raises `ConfigurationError` where they ask for none that can be."""
    if not options.configuration:
        raise ConfigurationError(
            "no configuration to train: give --model.configuration, as in '4:8' (4 bits, rank 8 everywhere), "
            "or the best.yaml of a search as --config"
        )
    configuration = Configuration.from_text(options.configuration)
    options.with_shared(configuration.shared)  # raises for settings that cannot be
    return configuration


def prepare_fit(
    backbone: Backbone,
    options: FineTuneOptions,
    asked: Configuration,
    *,
    device: torch.device | None,
    data: Callable[[], CalibrationData],
) -> Configuration:
    """The configuration, spread over all layers, that everything is built for; the full-precision weights are dropped.

    `device` is where training will go, and None where there is no trainer, and so no data either.
    """
    configuration, options = spread(asked, len(backbone.layers)), options.with_shared(asked.shared)
    require_ranks(backbone.shapes, configuration.ranks)
    trained = backbone.adapters.method.trained(configuration)
    choices = sorted({(layer.bits, layer.rank) for layer in trained.layers})
    if device is not None and (backbone.needs_initial(choices, init=options.init) or backbone.table.calibrated):
        backbone.model.to(device)  # where a search makes them
    if device is not None and backbone.table.calibrated:
        calibrate(backbone, options, data())
    backbone.build_bank(sorted(set(configuration.bits)))
    build_initial(backbone, options, choices, data)
    backbone.release_reference()
    return configuration


class Preparation:
    """Builds the bank when it is first needed, and says its notes once.

    Args:
        backbone: whose bank it is.
        options: those of the module.
        data: for starts of adapters that depend on data.
        reference_bits: bits that are needed besides those of the search.
        reference_ranks: ranks, too.
        say: is told the backbone's notes, and of files of the bank.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: FineTuneOptions,
        data: CalibrationData,
        *,
        reference_bits: tuple[int, ...],
        reference_ranks: tuple[int, ...],
        say: Callable[[str], None],
    ) -> None:
        self._backbone, self._options, self._data, self._say = backbone, options, data, say
        self._bits, self._ranks = reference_bits, reference_ranks
        self._before_release: list[Callable[[], None]] = []
        self._announced: set[str] = set()

    def before_release(self, action: Callable[[], None]) -> None:
        """Have something done once, at the last moment at which there are full-precision weights."""
        self._before_release.append(action)

    def build(self, space: SearchSpace) -> None:
        """Build what is missing of the bank for a space; the full-precision weights stay."""
        backbone = self._backbone
        backbone.say = self._say
        bits = sorted({*space.bits, *self._bits})
        backbone.build_bank(bits)
        ranks = sorted({*space.ranks, *self._ranks})
        every = Configuration.of([b for b in bits for _ in ranks], ranks * len(bits))
        trained = backbone.adapters.method.trained(every)
        choices = list(dict.fromkeys((layer.bits, layer.rank) for layer in trained.layers))
        starts = [ladder.values for ladder in space.shared if ladder.name == "init"] or [(self._options.init,)]
        for init in starts[0]:
            build_initial(backbone, self._options.with_shared((("init", init),)), choices, lambda: self._data)
        self._announce()

    def finish(self, space: SearchSpace) -> None:
        """Build what is missing, and drop the full-precision weights."""
        self.build(space)
        while self._before_release:
            self._before_release[0]()
            self._before_release.pop(0)  # only once it came to an end: memory may run out
        self._backbone.release_reference()

    def _announce(self) -> None:
        for note in self._backbone.notes:
            if note not in self._announced:
                self._say(note)
                self._announced.add(note)
