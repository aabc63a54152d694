"""Bytes of configurations, on and off the ladders of a search, for the data's batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qratk.core.configuration import Configuration
from qratk.core.memory import Footprint, MemoryModel
from qratk.core.space import SearchSpace

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule


class Footprints:
    """Memory models of a module for the batches of its data, each made once."""

    def __init__(self, module: FineTuneModule, data: TaskData) -> None:
        self._module, self._data = module, data
        self._models: dict[SearchSpace, MemoryModel] = {}

    def model(self, space: SearchSpace) -> MemoryModel:
        """Exact bytes over a space; the peaks are for the data's batch size and length."""
        from qratk.peaks.foretold import memory_model

        bare = replace(space, shared=tuple(ladder for ladder in space.shared if ladder.name == "lora_dropout"))
        if bare not in self._models:
            self._models[bare] = memory_model(
                self._module.backbone,
                bare,
                batch_size=self._data.batch_size,
                sequence_length=self._data.max_length,
                gradient_checkpointing=self._module.options.gradient_checkpointing,
            )
        return replace(self._models[bare], space=space) if space != bare else self._models[bare]

    def of(self, configuration: Configuration, space: SearchSpace) -> Footprint:
        """Bytes of a configuration; references may lie off the ladders of a space, which is widened then."""
        bits = tuple(sorted({*space.bits, *configuration.bits}))
        ranks = tuple(sorted({*space.ranks, *configuration.ranks}))
        return self.model(SearchSpace(bits, ranks, space.layer_names, space.shared)).footprint(configuration)
