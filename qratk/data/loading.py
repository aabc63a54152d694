"""What a Trainer iterates over: training batches that know their place in the run, and scoring batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader

from qratk.core.errors import DataError
from qratk.core.evaluation import replicate_seed
from qratk.data.batches import Batch, scoring_batches
from qratk.data.encoding import Encoded
from qratk.data.order import Mixture
from qratk.data.sampler import StepSampler
from qratk.data.splits import Split, require_at_least

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LARGEST_BATCH: Final = 65_536


@dataclass(frozen=True)
class Place:
    """Where in the run training is: the Trainer, if any, the micro-batch that it began with, and which replicate."""

    trainer: Callable[[], Trainer | None]
    start_batch: int
    replicate: int = 0

    @property
    def counts_epochs(self) -> bool:
        """Whether a Trainer fits that must know how long an epoch is."""
        trainer = self.trainer()
        if trainer is None or trainer.state.fn != "fit":
            return False
        return trainer.max_steps == -1 or trainer.max_epochs not in (None, -1)

    def batches_done(self) -> int:
        """Micro-batches that the Trainer has trained on, those before the checkpoint it continues included."""
        trainer = self.trainer()
        if trainer is None or not trainer.training:
            return 0
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def replica(trainer: Trainer | None) -> tuple[int, int]:
    """Which of how many replicas this process is."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


@dataclass(frozen=True)
class Batches:
    """How rows become batches; the arguments of `TaskData` by the same names. Scoring batches are kept."""

    batch_size: int
    eval_batch_size: int
    seed: int
    num_workers: int
    share_prompts: bool
    _kept: dict[tuple[Split, int, int, int, tuple[int, ...] | None], list[Batch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least("batch_size", self.batch_size, 1)
        if self.batch_size > _LARGEST_BATCH:
            raise DataError(f"batch_size must be at most {_LARGEST_BATCH:,} rows of one pass, got {self.batch_size:,}")
        require_at_least("eval_batch_size", self.eval_batch_size, 1)
        require_at_least("num_workers", self.num_workers, 0)

    def training(
        self,
        rows: Sequence[Encoded],
        collate: Callable[[Sequence[Encoded]], Batch],
        place: Place,
        *,
        mixture: Mixture | None = None,
    ) -> TrainingLoader:
        """Loader of this replica's training batches, of rows of one kind or of those of a mixture."""
        rank, replicas = replica(place.trainer())
        length = -(-len(rows) // (self.batch_size * replicas)) if place.counts_epochs else None
        seed = replicate_seed(self.seed, place.replicate)
        sampler = StepSampler(
            len(rows), self.batch_size, seed, place.start_batch, length=length, rank=rank, replicas=replicas,
            done=place.batches_done, mixture=mixture,
        )  # fmt: skip
        return TrainingLoader(rows, sampler, collate, num_workers=self.num_workers)

    def scoring(
        self,
        rows: Sequence[Encoded],
        split: Split,
        pad_id: int,
        shared_length: int,
        replica: tuple[int, int],
        chosen: tuple[int, ...] | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[Batch]:
        """A replica's batches of the rows of a split, with prompts shared in rows of at most `shared_length` tokens;
        of the `chosen` rows alone, where some are. `groups` are items with the same examples, as `pack_rows` has them.
        """
        rank, replicas = replica
        longest = shared_length if self.share_prompts else 0
        key = (split, longest, rank, replicas, chosen)
        if key not in self._kept:
            every = scoring_batches(
                rows if chosen is None else [rows[index] for index in chosen],
                size=self.eval_batch_size, pad_id=pad_id, shared_length=longest, replicas=replicas, groups=groups,
            )  # fmt: skip
            if chosen is not None:
                every = [{**batch, "row": torch.tensor(chosen)[batch["row"]]} for batch in every]
            # No replica may go without a batch; a row that several replicas score counts once.
            self._kept[key] = every[rank::replicas] or every[:1]
        return self._kept[key]

    def calibration(
        self, num_rows: int, count: int, batch_size: int | None, *, mixture: Mixture | None = None
    ) -> list[list[int]]:
        """Indices of training rows, `count` batches of an order of their own."""
        sampler = StepSampler(num_rows, batch_size or self.batch_size, self.seed + 0x5EED, mixture=mixture)
        return [sampler.batch(k) for k in range(count)]

    def forget(self) -> None:
        """Let go of the batches that were kept."""
        self._kept.clear()


class TrainingLoader:
    """Training batches in the order of a sampler; has a length if the sampler has one.

    The state that Lightning puts into a checkpoint says what the Trainer's count of batches stands for: continued with
    other rows or batches, some would be seen twice and some never.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        sampler: StepSampler,
        collate: Callable[[Sequence[Encoded]], Batch],
        *,
        num_workers: int,
    ) -> None:
        self.batch_sampler = sampler
        data: Any = rows
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": num_workers, "generator": _own(sampler.seed)}
        self._loader: DataLoader[Batch] = DataLoader(data, batch_sampler=sampler, **options)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def state_dict(self) -> dict[str, int | str]:
        """What decides which rows make up micro-batch k."""
        sampler = self.batch_sampler
        state: dict[str, int | str] = {
            "rows": sampler.num_items,
            "batch_size": sampler.batch_size,
            "replicas": sampler.replicas,
            "seed": sampler.seed,
        }
        return state if sampler.mixture is None else {**state, "mixture": str(sampler.mixture)}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Check a checkpoint's state. Raises DataError when its batches were made otherwise."""
        ours = self.state_dict()
        differing = [name for name in {**ours, **state} if state.get(name) != ours.get(name)]
        if differing:
            told = ", ".join(f"{name} {state.get(name)} instead of {ours.get(name)}" for name in differing)
            raise DataError(
                f"the checkpoint was trained on other batches ({told}), so that it cannot go on with those never seen; "
                f"give the same data and options, or start without --ckpt_path"
            )


def scoring_loader(batches: Sequence[Batch], *, seed: int) -> DataLoader[Batch]:
    """Loader of ready batches."""
    # One batch an element, and not `batch_size=None`: Lightning rebuilds the loader for `predict`, and then needs a
    # sampler of batches.
    data: Any = batches
    return DataLoader(data, batch_size=1, collate_fn=_only, generator=_own(seed))


def _own(seed: int) -> torch.Generator:
    """A generator for a loader: its iterator draws from the global one unless it has its own, and training would then
    depend on how often validation ran."""
    return torch.Generator().manual_seed(seed)


def _only(batches: Sequence[Batch]) -> Batch:
    """The one batch of a list."""
    (batch,) = batches
    return batch
