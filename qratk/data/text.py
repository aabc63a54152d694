"""Plain text: blocks to train on, and nats per token of held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qratk.core.errors import DataError
from qratk.data.base import TaskData
from qratk.data.encoding import Encoded, bare_ids, encoded, prefix_token_id
from qratk.data.scoring import LikelihoodScorer
from qratk.data.sources import Row
from qratk.data.splits import Item, Split, permutation


class TextData(TaskData):
    """Rows of text; the score is minus nats per token of the held-out documents.

    Args:
        train: As in `TaskData`, whose other options apply too.
        packing: Train on blocks of the joined documents; otherwise on blocks of each document.
        stride: New tokens in each window after the first of a document over `max_length`; null means `max_length - 1`,
            the least work, where windows share one token. Every token is scored once whatever the stride.
        end_token: Put the end of sequence after each document, to be learnt and scored.
    """

    metrics = ("token_prob",)

    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        packing: bool = True,
        stride: int | None = None,
        end_token: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, **kwargs)
        if stride is not None and stride < 1:
            raise DataError(f"stride must be at least 1, got {stride}")
        self.packing, self.stride, self.end_token = packing, stride, end_token

    def options(self) -> Mapping[str, Any]:
        """Packing, stride and end token."""
        return {"packing": self.packing, "stride": self.stride, "end_token": self.end_token}

    def parse(self, row: Row) -> str:
        """The text."""
        text = row.text("text")
        if not text.strip():
            raise row.error("has an empty text; remove it")
        return text

    def form_of(self, content: Any) -> str:
        """All rows are texts."""
        return "text"

    @property
    def joins_items(self) -> bool:
        """With packing, and blocks of one document do not say which."""
        return True

    def fields_used(self) -> frozenset[str]:
        """The text."""
        return frozenset(("text",))

    def _documents(self, items: Sequence[Item]) -> Iterator[list[int]]:
        """Tokens of documents: prefix, text, end of sequence. The first of them is never predicted."""
        prefix, end = prefix_token_id(self.tokenizer), self.tokenizer.eos_token_id
        head = [prefix] if prefix is not None else []
        tail = [end] if self.end_token and end is not None else []
        for item, ids in zip(items, bare_ids(self.tokenizer, [item.content for item in items]), strict=True):
            if len(tokens := head + ids + tail) < 2:
                raise DataError(f"{item.where}: the text has no token that could be predicted; remove it")
            yield tokens

    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Blocks of at most `max_length` tokens."""
        documents = list(self._documents(items))
        if not self.packing:
            yield from (block for tokens in documents for block in self._blocks(tokens, [True] * len(tokens)))
            return
        stream: list[int] = []
        labelled: list[bool] = []
        end = self.tokenizer.eos_token_id
        ends_and_begins = self.end_token and end is not None and end == prefix_token_id(self.tokenizer)
        for index in permutation(len(documents), seed=self.seed, purpose="packing"):
            tokens = documents[index]
            if stream and ends_and_begins:  # one token does both: once is enough
                tokens = tokens[1:]
                labelled += [True] * len(tokens)
            else:
                labelled += [False] + [True] * (len(tokens) - 1)
            stream += tokens
        yield from self._blocks(stream, labelled)

    def _blocks(self, tokens: Sequence[int], labelled: Sequence[bool]) -> Iterator[Encoded]:
        size = self.max_length
        for first in range(0, len(tokens), size):
            if len(block := tokens[first : first + size]) > 1:
                yield encoded(block, labelled[first : first + size])

    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Windows over each document in which every token but the first is labelled once."""
        size = self.max_length
        step = min(self.stride or size - 1, size - 1)
        for index, tokens in enumerate(self._documents(items)):
            done = 1
            while done < len(tokens):
                end = min(len(tokens), size if done == 1 else done + step)
                window = tokens[max(0, end - size) : end]
                new = end - done
                yield encoded(window, [False] * (len(window) - new) + [True] * new, item=index)
                done = end

    def scorer(self, split: Split = "validation") -> LikelihoodScorer:
        """Scorer of nats per token."""
        return LikelihoodScorer([row.item for row in self.scoring_rows(split)], len(self.items(split)))

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...]:
        """Scored tokens of each document."""
        return scored_tokens(self.scoring_rows(stage), len(self.items(stage)))


def scored_tokens(rows: Sequence[Encoded], num_items: int) -> tuple[float, ...]:
    """Scored tokens of each item."""
    weights = [0.0] * num_items
    for row in rows:
        weights[row.item] += float(row.labelled[1:].sum())
    return tuple(weights)
