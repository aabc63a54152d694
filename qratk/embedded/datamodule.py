"""The embedded data set as a data module: `data: EmbeddedData` in a configuration file."""

from __future__ import annotations

import shutil
import weakref
from tempfile import mkdtemp
from typing import Any, final

from qratk.data.choice_figures import ChoiceScore
from qratk.data.choices import ChoiceData
from qratk.embedded.data import write_dataset


@final
class EmbeddedData(ChoiceData):
    """The embedded multiple-choice task, made on the spot; nothing is kept.

    The right one of 4 choices follows from what the row says and a fact known from pre-training.

    Args:
        data_seed: seed of the rows.
        score: what a search maximises, as in `MultipleChoiceData`; options of `TaskData` (batch_size, ...) apply too.
    """

    def __init__(
        self,
        *,
        data_seed: int = 0,
        score: ChoiceScore = "prob_per_token",
        batch_size: int = 16,
        eval_batch_size: int | None = 128,
        max_length: int | None = None,
        seed: int = 0,
        max_train_items: int | None = None,
        max_validation_items: int | None = None,
        max_test_items: int | None = None,
    ) -> None:
        folder = mkdtemp(prefix="qratk-embedded-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files: dict[str, Any] = {split: str(path) for split, path in write_dataset(folder, data_seed).items()}
        super().__init__(
            **files,
            score=score,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            seed=seed,
            max_train_items=max_train_items,
            max_validation_items=max_validation_items,
            max_test_items=max_test_items,
        )
