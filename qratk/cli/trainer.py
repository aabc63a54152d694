"""Lightning's Trainer with one more verb."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from qratk.core.result import SearchResult
from qratk.data.base import TaskData
from qratk.loop import SearchLoop
from qratk.reporting.base import Reporter
from qratk.settings.identity import comparable
from qratk.training.module import FineTuneModule


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
        model: FineTuneModule,
        datamodule: TaskData,
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
            comparable=comparable,
            module=model,
            datamodule=datamodule,
            trainer=self.another,
        )
