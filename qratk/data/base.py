"""The data module that all tasks share: from rows of files to batches for a Trainer."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import FrameType
from typing import Any, ClassVar, Self, cast

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.parsing import AttributeDict, collect_init_args
from torch.utils.data import DataLoader

from qratk.core.errors import DataError
from qratk.core.resolution import TaskItems
from qratk.core.secrets import without_secrets
from qratk.data.attached import Attached, Unlimited, of_trainer
from qratk.data.batches import Batch, training_batch
from qratk.data.encoding import Encoded, learnable
from qratk.data.identity import counts, fingerprint
from qratk.data.loading import Batches, Place, TrainingLoader, replica, scoring_loader
from qratk.data.order import Mixture
from qratk.data.sources import Source
from qratk.data.splits import SPLITS, Item, ItemsBySplit, Split, SplitOptions, Splits, require_at_least
from qratk.data.task import Task


class TaskData(LightningDataModule, Task):
    """Batches for fine-tuning and for scoring, from rows of files or of `datasets`.

    Args:
        train: File (JSON or JSON lines), glob, list of them, or what `datasets.load_dataset` takes
            (`path:name#split`).
        validation: As `train`; if null, `validation_items` (or `validation_fraction`) are taken off `train` by seed.
        test: As `train`; never overlaps: rows found in it are dropped from the other two.
        batch_size: Rows of a training micro-batch.
        eval_batch_size: Size of a scoring batch, in rows of the longest: of shorter ones it holds more; null means
            `batch_size`.
        max_length: Tokens of a row at most; null means what tokenizer and model allow, but no more than 2048.
        seed: Of splits, subsamples and training order.
        validation_items: Rows taken off `train` when there is no `validation`.
        validation_fraction: Share taken off when `validation_items` is null.
        max_train_items: Seeded subsample of the training rows.
        max_validation_items: Seeded subsample of the validation rows.
        max_test_items: Seeded subsample of the test rows.
        rename: Our field names to the file's, as in {"question": "query"}.
        num_workers: Processes that prepare training batches; 0 is right for text.
        share_prompts: Compute the prompt of a multiple-choice item once for all its choices when scoring, where the
            model allows it. Scores agree to rounding.
    """

    start_batch: int = 0
    replicate: int = 0
    rung: int | None = None  # of a search, from the lowest on, whose validation items are scored; None: all items
    holds_others: ClassVar[bool] = False  # whether its rows are those of other data modules

    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        validation_items: int | None = None,
        validation_fraction: float = 0.1,
        max_train_items: int | None = None,
        max_validation_items: int | None = None,
        max_test_items: int | None = None,
        rename: dict[str, str] | None = None,
        num_workers: int = 0,
        share_prompts: bool = True,
    ) -> None:
        super().__init__()
        self._given = collect_init_args(cast(FrameType, inspect.currentframe()), [], classes=(TaskData,))
        self.sources: dict[Split, Source | None] = dict(zip(SPLITS, (train, validation, test), strict=True))
        limits = dict(zip(SPLITS, (max_train_items, max_validation_items, max_test_items), strict=True))
        require_at_least("max_length", 2 if max_length is None else max_length, 2)
        self.asked_length = max_length
        self._options = SplitOptions(self.sources, limits, validation_items, validation_fraction, rename, seed)
        self._splits = self._split(self._options)
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self._batches = Batches(batch_size, self.eval_batch_size, seed, num_workers, share_prompts)
        self._attached: Attached | None = None
        self._module: LightningModule | None = None  # that has what is attached, where it was read from a module
        self._encoded: dict[tuple[Split, bool], tuple[Encoded, ...]] = {}

    def _split(self, options: SplitOptions) -> ItemsBySplit:
        """Where items come from; files are not read yet."""
        return Splits(options, self)

    def join(self, *, max_length: int | None, carves: bool) -> None:
        """Become a part of data that hold several, before anything is read: with rows of at most `max_length` tokens
        unless an own option says less, and with or without validation items carved off the training rows."""
        self.asked_length = max_length if self.asked_length is None else self.asked_length
        self._options = replace(self._options, carves=carves, row_keys=True)
        self._splits = self._split(self._options)

    def narrow(self, split: Split, items: Sequence[Item]) -> None:
        """Let a split have these of its items only; what was encoded is forgotten."""
        self._splits.items[split] = tuple(items)
        self._encoded.clear()
        self._batches.forget()

    def read(self, source: Source, name: str) -> Sequence[Item]:
        """Items of all rows of a further source. Raises DataError."""
        return Splits(self._options, self).read(source, name)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments that the constructor of this class was given, by name, and the defaults of the others."""
        given = {name: value for level in self._given for name, value in level.items()}
        own = inspect.signature(type(self)).parameters
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        return {name: value for name, value in given.items() if takes_more or name in own}

    @property
    def hparams_initial(self) -> AttributeDict:
        """The arguments that a data module saves as hyper-parameters, as loggers write them: without secrets."""
        return AttributeDict(without_secrets(super().hparams_initial))

    @property
    def batch_size(self) -> int:
        """Rows of a training micro-batch."""
        return self._batches.batch_size

    @property
    def seed(self) -> int:
        """Of splits, subsamples and training order."""
        return self._batches.seed

    def attach(self, tokenizer: Any, *, context_length: int | None = None) -> None:
        """Take the model's tokenizer and the tokens it can see; what was encoded with others is forgotten."""
        attached = Attached(tokenizer, context_length)
        self._module = None
        if self._attached is None or not attached.same(self._attached):
            self._take(attached)

    def _take(self, attached: Attached | None) -> None:
        self._attached = attached
        self._encoded.clear()
        self._batches.forget()

    @property
    def attached(self) -> Attached:
        """What was attached, or what the module in the Trainer has. Raises DataError when there is no tokenizer."""
        if self._attached is None or self._attached.tokenizer is None:
            self._attached = of_trainer(self.trainer, wanted_by=type(self).__name__)
            self._module = None if self.trainer is None else self.trainer.lightning_module
        return self._attached

    @property
    def tokenizer(self) -> Any:
        """The attached tokenizer, or the one of the module in the Trainer. Raises DataError when there is none."""
        return self.attached.tokenizer

    @property
    def pad_id(self) -> int:
        """Token that fills up short rows: the tokenizer's, else its end of sequence, else 0."""
        return self.attached.pad_id

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: the option, never above what the tokenizer and the model allow."""
        return self.attached.row_length(self.asked_length)

    def without_limit(self) -> Self:
        """The same data, encoded as they are with no limit on the length of rows."""
        whole = copy(self)
        whole._attached = Unlimited(self.attached.tokenizer)
        whole._encoded = {}
        return whole

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what a stage of the Trainer needs, so that errors come before the first step.

        What was encoded for the module of another Trainer is forgotten.
        """
        if self._module is not None and self.trainer is not None and self.trainer.lightning_module is not self._module:
            self._take(None)
        needed = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}.get(stage or "", ())
        for split in filter(self.has, needed):
            self.rows(split)

    def has(self, split: Split) -> bool:
        """Whether a split has items."""
        return bool(self._splits.items[split])

    def items(self, split: Split) -> tuple[Item, ...]:
        """Items of a split. Raises DataError when it has none."""
        if not self.has(split):
            raise DataError(f"there is no {split} data: give the option `{split}`")
        return self._splits.items[split]

    def parts(self, split: Split) -> Mapping[str, TaskData]:
        """The data modules that the items of a split are of, by name: these data by that of the split, or those that
        they hold, each with its own items of the split."""
        return {split: self}

    def sample(self, split: Split, count: int) -> Sequence[Item]:
        """At most so many items of a split, from which lengths are told."""
        return self.items(split)[:count]

    def scored_share(self, rung: int | None) -> float:
        """Share of the validation rows that is scored at a rung; None is the highest."""
        return 1.0

    def judged(self, rung: int | None) -> tuple[TaskItems, ...]:
        """Tasks whose figures, means over items of something between 0 and 1, make up the validation score at a rung.

        None is the highest rung. Empty where the score is of another kind.
        """
        if not self.has("validation") or getattr(self, "score", None) not in self.metrics:
            return ()
        return (TaskItems("validation", len(self.items("validation"))),)

    def strata(self, split: Split = "validation") -> tuple[tuple[str, int], ...]:
        """Names of the tasks that the items of a split belong to, in order, and how many belong to each; empty where
        all are of one."""
        return ()

    def rows(self, split: Split) -> tuple[Encoded, ...]:
        """Rows to train on of the training split, rows to score of the others."""
        return self.training_rows() if split == "train" else self.scoring_rows(split)

    def training_rows(self) -> tuple[Encoded, ...]:
        """Encoded rows to train on, only those with something to learn."""
        if ("train", True) not in self._encoded:
            rows = self.encode_training(self.items("train"))
            self._encoded["train", True] = learnable(rows, max_length=self.max_length, batch_size=self.batch_size)
        return self._encoded["train", True]

    def scoring_rows(self, split: Split) -> tuple[Encoded, ...]:
        """Encoded rows to score."""
        if (split, False) not in self._encoded:
            self._encoded[split, False] = tuple(self.encode_scoring(self.items(split)))
        return self._encoded[split, False]

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """One batch, padded at the right to its longest row: input_ids, attention_mask, labels, each (B, T) int64."""
        return training_batch(rows, self.pad_id)

    def train_dataloader(self) -> TrainingLoader:
        """Training batches from micro-batch `start_batch` on, and on from there in each epoch of a Trainer.

        Endless, unless a Trainer fits without `max_steps` or for a number of epochs. Several devices share them out.
        """
        place = Place(lambda: self.trainer, self.start_batch, self.replicate)
        return self._batches.training(self.training_rows(), self.collate, place, mixture=self.mixture)

    @property
    def mixture(self) -> Mixture | None:
        """How the training rows are mixed; None where all are of one source, or count alike."""
        return None

    def val_dataloader(self) -> DataLoader[Batch]:
        """Scoring batches of the validation split."""
        return self.scoring_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Scoring batches of the test split."""
        return self.scoring_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Scoring batches of the test split, or of the validation split where there is no test."""
        return self.scoring_dataloader(self.prediction_split)

    @property
    def prediction_split(self) -> Split:
        """The split that `predict` works on."""
        return "test" if self.sources["test"] is not None else "validation"

    def scoring_dataloader(self, split: Split) -> DataLoader[Batch]:
        """The `scoring_batches` of a split; prompts are shared if the module in the Trainer can take that."""
        # The module tries its model for that, so it is only asked when it matters.
        module = self.trainer.lightning_module if self.trainer is not None and self.shares_prompts(split) else None
        batches = self.scoring_batches(split, shared_length=int(getattr(module, "shared_length", 0)))
        return scoring_loader(batches, seed=self.seed)

    def scoring_batches(self, split: Split, *, shared_length: int = 0) -> list[Batch]:
        """This replica's batches of the rows of a split, as `qratk.data.batches` describes them; not to be changed.

        Items with several rows share their prompts in rows of at most `shared_length` tokens. Kept: every validation of
        a search scores the same.
        """
        longest = min(shared_length, self.max_length)
        rows, chosen = self.scoring_rows(split), self.chosen_rows(split)
        place, groups = replica(self.trainer), self.groups(split)
        return self._batches.scoring(rows, split, self.pad_id, longest, place, chosen, groups)

    def groups(self, split: Split) -> tuple[int, ...] | None:
        """Of each item a number that those have in common that are shown with the same examples, -1 without any; None
        where there are none in the whole split."""
        return None

    def chosen_rows(self, split: Split) -> tuple[int, ...] | None:
        """Indices of the rows that are scored at the `rung`; None where all are."""
        return None

    def shares_prompts(self, split: Split) -> bool:
        """Whether prompts of a split are computed once for several rows, if the model allows it."""
        rows = self.scoring_rows(split)
        several = len(rows) != len(self.items(split)) or any(row.generates for row in rows)
        return self._batches.share_prompts and several

    def calibration_batches(self, count: int, batch_size: int | None = None) -> list[Batch]:
        """Training batches on the CPU, the first `count` of an order of their own."""
        rows = self.training_rows()
        batches = self._batches.calibration(len(rows), count, batch_size, mixture=self.mixture)
        return [self.collate([rows[i] for i in batch]) for batch in batches]

    def fingerprint(self) -> str:
        """SHA-256 over the rows in use of each split, the options that matter and the tokenizer."""
        sizes = {"max_length": self.max_length, "batch_size": self.batch_size, "seed": self.seed}
        options = {"class": type(self).__name__, **sizes, **self.options()}
        return fingerprint(options, self._splits.items, self.attached.tokenizer_text())

    def describe(self) -> dict[str, Any]:
        """Counts of each split that has data: items, also by form, rows, tokens (max, mean), truncated rows; and
        warnings."""
        present = [split for split in SPLITS if self.has(split)]
        figures: dict[str, Any] = {
            split: counts(self.items(split), self.rows(split), self.forms(split)) for split in present
        }
        return {**figures, "warnings": list(self.notes)}

    def forms(self, split: Split) -> dict[str, int]:
        """Items of a split by the form of their rows, the most common form first."""
        return dict(Counter(self.form_of(item.content) for item in self.items(split)).most_common())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped and why, and what of the rows is not used."""
        self._splits.items  # noqa: B018 - read them
        return tuple(self._splits.notes)
