"""The names of what lies in a run folder."""

from __future__ import annotations

from typing import Final

CONFIG: Final = "config.yaml"
"""All settings of the run."""
JOURNAL: Final = "journal.sqlite"
"""The durable record: every evaluation and decision."""
LOCK: Final = "journal.lock"
"""Held by the one process that writes the journal."""
EVALUATIONS: Final = "evaluations.csv"
"""One row an evaluation, for people and spreadsheets."""
FRONT: Final = "front.json"
"""The measured front."""
BEST: Final = "best.yaml"
"""Settings of a fit of the best configuration."""
RESULT: Final = "result.json"
"""What the search ended with; there once it has ended."""
ADAPTER: Final = "adapter"
"""Folder of the best's adapter, as it was scored, for PEFT; there once the search has ended."""
FRONT_PICTURE: Final = "front.png"
ALLOCATION_PICTURE: Final = "allocation.png"
PROGRESS_PICTURE: Final = "progress.png"
TENSORBOARD: Final = "tensorboard"
"""Folder of event files."""
CHECKPOINTS: Final = "checkpoints"
"""Folder of adapter and optimiser states."""

ALL: Final = (
    CONFIG, JOURNAL, EVALUATIONS, FRONT, BEST, RESULT, ADAPTER, FRONT_PICTURE, ALLOCATION_PICTURE, PROGRESS_PICTURE,
    TENSORBOARD, CHECKPOINTS,
)  # fmt: skip
"""What a finished run may hold, in the order in which it is told."""
