"""The data module that all tasks share: splits, batches, scoring rows, fingerprints."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from qratk.core.errors import DataError
from qratk.data.batches import scoring_batches
from qratk.data.sampler import StepSampler
from qratk.data.scoring import IGNORE, Scorer
from qratk.data.sources import Row, Source, content_key, read_rows

__all__ = ["Encoded", "Scorer", "StepSampler", "TaskData"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens of a row, (T,), which are labelled, (T,), whether some were cut off, and the item it belongs to."""

    tokens: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    truncated: bool = False
    item: int = 0


def encoded(tokens: Sequence[int], labelled: Sequence[bool], *, truncated: bool = False, item: int = 0) -> Encoded:
    """A row from plain lists."""
    return Encoded(np.array(tokens, dtype=np.int32), np.array(labelled, dtype=np.bool_), truncated, item)


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded at the right to its longest row: input_ids, attention_mask, labels, each (B, T) int64."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        ids[index, :size], mask[index, :size] = tokens, 1
        labels[index, :size] = torch.where(torch.from_numpy(row.labelled), tokens, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Item:
    """A checked row: what a task made of it, and the digest by which equal rows are found."""

    content: Any
    key: str
    where: str


class TaskData(LightningDataModule, ABC):
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
        self.sources: dict[Split, Source | None] = {"train": train, "validation": validation, "test": test}
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.seed, self.rename, self.num_workers, self.share_prompts = seed, rename, num_workers, share_prompts
        self.validation_items, self.validation_fraction = validation_items, validation_fraction
        self.limits = {"train": max_train_items, "validation": max_validation_items, "test": max_test_items}
        self._max_length = max_length
        self._tokenizer: Any = None
        self._context_length: int | None = None
        self._encoded: dict[tuple[Split, bool], tuple[Encoded, ...]] = {}
        self._batches: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
        self._check_options()

    def _check_options(self) -> None:
        sizes: dict[str, int | None] = {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}
        sizes |= {f"max_{split}_items": limit for split, limit in self.limits.items()}
        sizes |= {"max_length": self._max_length, "validation_items": self.validation_items, "seed": self.seed}
        least = {"max_length": 2, "seed": 0}
        for name, value in sizes.items():
            if value is not None and value < least.get(name, 1):
                raise DataError(f"{name} must be at least {least.get(name, 1)}, got {value}")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if all(source is None for source in self.sources.values()):
            raise DataError("no data: give at least one of train, validation and test")

    # What a task defines.

    @abstractmethod
    def parse(self, row: Row) -> Any:
        """Content of a row, made of tuples, texts and numbers. Raises DataError (`row.error`) when it is not right."""

    @abstractmethod
    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to train on."""

    @abstractmethod
    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to score, each naming its item by index; rows of an item follow one another."""

    @abstractmethod
    def build_scorer(self, split: Split) -> Scorer:
        """Scorer over `scoring_rows(split)`."""

    @abstractmethod
    def options(self) -> Mapping[str, Any]:
        """Options of the task that decide tokens or scores."""

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...] | None:
        """Weight of each item in the score; None when all are equal."""
        return None

    # Tokenizer.

    def attach(self, tokenizer: Any, *, context_length: int | None = None) -> None:
        """Take the model's tokenizer and the tokens it can see; what was encoded with others is forgotten."""
        if tokenizer is not self._tokenizer or context_length != self._context_length:
            self._tokenizer, self._context_length = tokenizer, context_length
            self._encoded.clear()
            self._batches.clear()

    @property
    def tokenizer(self) -> Any:
        """The attached tokenizer, or the one of the module in the Trainer. Raises DataError when there is none."""
        if self._tokenizer is None:
            module = getattr(self.trainer, "lightning_module", None) if self.trainer is not None else None
            tokenizer = getattr(module, "tokenizer", None)
            if tokenizer is None:
                raise DataError(
                    f"{type(self).__name__} has no tokenizer: call `attach(tokenizer)`, or use it in a Trainer with a "
                    f"module that has a `tokenizer`"
                )
            self.attach(tokenizer, context_length=getattr(module, "context_length", None))
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """Token that fills up short rows: the tokenizer's, else its end of sequence, else 0."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(value for value in ids if value is not None)

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: the option, never above what the tokenizer and the model allow."""
        tokenizer_limit = getattr(self.tokenizer, "model_max_length", None)  # 1e30 where there is none
        limits = [limit for limit in (tokenizer_limit, self._context_length) if limit]
        return int(min([self._max_length or _DEFAULT_LENGTH, *limits]))

    # Splits.

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what a stage of the Trainer needs, so that errors come before the first step."""
        needed = {"fit": SPLITS[:2], "validate": SPLITS[1:2], "test": SPLITS[2:]}.get(stage or "", ())
        for split in needed:
            if self._items[split] and split == "train":
                self.training_rows()
            elif self._items[split]:
                self.scoring_rows(split)

    def has(self, split: Split) -> bool:
        """Whether a split has items."""
        return bool(self._items[split])

    def items(self, split: Split) -> tuple[Item, ...]:
        """Items of a split. Raises DataError when it has none."""
        if not self._items[split]:
            raise DataError(f"there is no {split} data: give the option `{split}`")
        return self._items[split]

    @cached_property
    def _messages(self) -> list[str]:
        return []

    @cached_property
    def _items(self) -> dict[Split, tuple[Item, ...]]:
        read = {split: self._read(split) for split in SPLITS}
        for split in ("validation", "train"):
            read[split] = self._without(read[split], read["test"], split, "test")
        if self.sources["validation"] is None and read["train"]:
            read["train"], read["validation"] = self._carve(read["train"])
        read["train"] = self._without(read["train"], read["validation"], "train", "validation")
        return {split: self._subsample(read[split], split) for split in SPLITS}

    def _read(self, split: Split) -> list[Item]:
        source = self.sources[split]
        if source is None:
            return []
        rows = read_rows(source, split, rename=self.rename)
        contents = [self.parse(row) for row in rows]
        return [Item(c, content_key(c), row.where) for c, row in zip(contents, rows, strict=True)]

    def _without(self, items: list[Item], other: Sequence[Item], split: str, other_split: str) -> list[Item]:
        keys = {item.key for item in other}
        kept = [item for item in items if item.key not in keys]
        if dropped := len(items) - len(kept):
            self._messages.append(f"{dropped} of {len(items)} {split} rows are also in {other_split}: dropped")
        if items and not kept:
            raise DataError(f"every {split} row is also in the {other_split} data; give other files")
        return kept

    def _carve(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        number = self.validation_items or max(1, round(self.validation_fraction * len(items)))
        if number >= len(items):
            raise DataError(
                f"cannot take {number} validation items off {len(items)} training rows: "
                f"lower validation_items or give a validation file"
            )
        chosen = set(self._permutation(len(items), "carve")[:number].tolist())
        return (
            [item for index, item in enumerate(items) if index not in chosen],
            [item for index, item in enumerate(items) if index in chosen],
        )

    def _subsample(self, items: list[Item], split: Split) -> tuple[Item, ...]:
        limit = self.limits[split]
        if limit is None or limit >= len(items):
            return tuple(items)
        return tuple(items[index] for index in sorted(self._permutation(len(items), split)[:limit]))

    def _permutation(self, size: int, purpose: str) -> np.ndarray:
        entropy = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
        return np.random.default_rng([self.seed, entropy]).permutation(size)

    # Rows and batches.

    def training_rows(self) -> tuple[Encoded, ...]:
        """Encoded rows to train on, only those with something to learn."""
        if ("train", True) not in self._encoded:
            rows = tuple(row for row in self.encode_training(self.items("train")) if row.labelled[1:].any())
            if not rows:
                raise DataError(f"no training row has anything to learn within max_length {self.max_length}: raise it")
            self._encoded["train", True] = rows
        return self._encoded["train", True]

    def scoring_rows(self, split: Split) -> tuple[Encoded, ...]:
        """Encoded rows to score."""
        if (split, False) not in self._encoded:
            self._encoded[split, False] = tuple(self.encode_scoring(self.items(split)))
        return self._encoded[split, False]

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """One batch, padded at the right to its longest row: input_ids, attention_mask, labels, each (B, T) int64."""
        return collate(rows, self.pad_id)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training batches from micro-batch `start_batch` on; endless unless a Trainer fits without `max_steps`.

        With several devices, give the Trainer `use_distributed_sampler=False`: the batches are already shared out.
        """
        rows = self.training_rows()
        rank, replicas = self._replica()
        length = None
        if self.trainer is not None and self.trainer.state.fn == "fit" and self.trainer.max_steps == -1:
            length = -(-len(rows) // (self.batch_size * replicas))
        sampler = StepSampler(
            len(rows), self.batch_size, self.seed, self.start_batch, length=length, rank=rank, replicas=replicas
        )
        data: Any = rows
        options: dict[str, Any] = {
            "collate_fn": self.collate,
            "num_workers": self.num_workers,
            "generator": self._generator(),
        }
        return DataLoader(data, batch_sampler=sampler, **options)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Scoring batches of the validation split."""
        return self.scoring_dataloader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Scoring batches of the test split."""
        return self.scoring_dataloader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Scoring batches of the test split, or of the validation split where there is no test."""
        return self.scoring_dataloader(self.prediction_split)

    @property
    def prediction_split(self) -> Split:
        """The split that `predict` works on."""
        return "test" if self.sources["test"] is not None else "validation"

    def scoring_dataloader(self, split: Split) -> DataLoader[dict[str, Tensor]]:
        """The `scoring_batches` of a split; prompts are shared if the module in the Trainer can take that."""
        batches = self.scoring_batches(split, shared_length=self._shared_length(split))
        # One batch an element, and not `batch_size=None`: Lightning rebuilds the loader for `predict`, and then needs a
        # sampler of batches.
        data: Any = batches
        return DataLoader(data, batch_size=1, collate_fn=_only, generator=self._generator())

    def scoring_batches(self, split: Split, *, shared_length: int = 0) -> list[dict[str, Tensor]]:
        """This replica's batches of the rows of a split, as `qratk.data.batches` describes them; not to be changed.

        Items with several rows share their prompts in rows of at most `shared_length` tokens. Kept: every validation of
        a search scores the same.
        """
        rank, replicas = self._replica()
        longest = min(shared_length, self.max_length) if self.share_prompts else 0
        key = (split, longest, self.eval_batch_size, rank, replicas)
        if key not in self._batches:
            every = scoring_batches(
                self.scoring_rows(split), size=self.eval_batch_size, pad_id=self.pad_id, shared_length=longest,
                replicas=replicas,
            )  # fmt: skip
            # No replica may go without a batch; a row that several replicas score counts once.
            self._batches[key] = every[rank::replicas] or every[:1]
        return self._batches[key]

    def shares_prompts(self, split: Split) -> bool:
        """Whether prompts of a split are computed once for several rows, if the model allows it."""
        return self.share_prompts and len(self.scoring_rows(split)) != len(self.items(split))

    def _shared_length(self, split: Split) -> int:
        """What the module in the Trainer says; it tries the model for that, so it is only asked when it matters."""
        if self.trainer is None or not self.shares_prompts(split):
            return 0
        return int(getattr(self.trainer.lightning_module, "shared_length", 0))

    def _replica(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _generator(self) -> torch.Generator:
        # A loader's iterator draws from the global generator unless it has its own: training would then depend on
        # how often validation ran.
        return torch.Generator().manual_seed(self.seed)

    def calibration_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, Tensor]]:
        """Training batches on the CPU, the first `count` of an order of their own."""
        rows = self.training_rows()
        sampler = StepSampler(len(rows), batch_size or self.batch_size, self.seed + 0x5EED)
        return [self.collate([rows[index] for index in sampler.batch(k)]) for k in range(count)]

    def scorer(self, stage: Split = "validation") -> Scorer:
        """A fresh scorer of a split."""
        return self.build_scorer(stage)

    # Identity and description.

    def fingerprint(self) -> str:
        """SHA-256 over the rows in use of each split, the options that matter and the tokenizer."""
        digest = hashlib.sha256()
        options = {
            "class": type(self).__name__, "max_length": self.max_length, "batch_size": self.batch_size,
            "seed": self.seed, **self.options(),
        }  # fmt: skip
        digest.update(json.dumps(options, sort_keys=True, default=str).encode())
        for split in SPLITS:
            digest.update(f"\n{split}\n".encode())
            digest.update("\n".join(item.key for item in self._items[split]).encode())
        digest.update(_tokenizer_text(self.tokenizer).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts of each split that has data: items, rows, tokens (max, mean), truncated rows; and warnings."""
        described: dict[str, Any] = {}
        for split in SPLITS:
            if self._items[split]:
                rows = self.training_rows() if split == "train" else self.scoring_rows(split)
                lengths = [len(row.tokens) for row in rows]
                described[split] = {
                    "items": len(self._items[split]),
                    "rows": len(rows),
                    "max_tokens": max(lengths),
                    "mean_tokens": sum(lengths) / len(lengths),
                    "truncated": sum(row.truncated for row in rows),
                }
        described["warnings"] = list(self._messages)
        return described


def _only(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The one batch of a list."""
    (batch,) = batches
    return batch


def _tokenizer_text(tokenizer: Any) -> str:
    """What decides a tokenizer's output, as text; not its padding and truncation, which are state of the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parsed = json.loads(backend.to_str())
        core = {name: value for name, value in parsed.items() if name not in ("padding", "truncation")}
    else:
        core = dict(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return json.dumps([core, special, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=str)
