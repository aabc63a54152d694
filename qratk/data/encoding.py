"""Text to tokens: continuations as lm-eval cuts them, and spans of a text by character offsets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import DataError

_MOST_REPEATS = 16  # of a row in one batch


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


def learnable(rows: Iterable[Encoded], *, max_length: int, batch_size: int) -> tuple[Encoded, ...]:
    """The rows that have something to learn. Raises DataError when none has, or when they are far too few to fill a
    batch."""
    kept = tuple(row for row in rows if row.labelled[1:].any())
    if not kept:
        raise DataError(f"no training row has anything to learn within max_length {max_length}: raise it")
    if batch_size > _MOST_REPEATS * len(kept):
        raise DataError(
            f"batch_size is {batch_size}, but there are {len(kept)} training rows: each would be in a batch more than "
            f"{_MOST_REPEATS} times; lower it"
        )
    return kept


def prefix_token_id(tokenizer: Any) -> int | None:
    """What stands before the first token of a text: the beginning of sequence, else the end of sequence."""
    begin: int | None = tokenizer.bos_token_id
    end: int | None = tokenizer.eos_token_id
    return end if begin is None else begin


class PairEncoder:
    """Tokens of (context, continuation) pairs, exactly those that lm-eval's `HFLM` scores.

    Spaces at the end of the context move to the continuation; context plus continuation are encoded in one piece and
    cut after as many tokens as the context alone has; an empty context is replaced by the prefix token.
    (`TemplateLM.loglikelihood` and `HFLM.tok_encode` of lm-eval 0.4.)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix = prefix_token_id(tokenizer)
        self._prefix_text = tokenizer.decode(self.prefix) if self.prefix is not None else None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokens of contexts and of continuations; a continuation may come out empty."""
        texts = {text for context, rest in pairs if context for text in (context.rstrip(), context + rest)}
        tokens = self._encode(sorted(texts))
        bare = sorted({rest for context, rest in pairs if not context})
        bare_tokens = dict(zip(bare, bare_ids(self.tokenizer, bare), strict=True))
        encoded = []
        for context, rest in pairs:
            if context:
                head = tokens[context.rstrip()]
                encoded.append((self._not_empty(head), tokens[context + rest][len(head) :]))
            else:
                encoded.append(self._without_context(bare_tokens[rest]))
        return encoded

    def _not_empty(self, head: list[int]) -> list[int]:
        if not head:
            raise DataError("a prompt holds nothing but white space, which has no tokens; leave it empty instead")
        return head

    def _encode(self, texts: Sequence[str]) -> dict[str, list[int]]:
        starts = self._prefix_text
        begun = [text for text in texts if starts and text.startswith(starts)]
        others = [text for text in texts if not (starts and text.startswith(starts))]
        ids = _ids(self.tokenizer, begun, special=False) + _ids(self.tokenizer, others)
        return dict(zip(begun + others, ids, strict=True))

    def _without_context(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        if self.prefix is None:
            raise DataError(
                "a row has an empty prompt, and the tokenizer has neither a beginning nor an end of sequence to put "
                "in its place: set `tokenizer.bos_token`, or give the rows a context"
            )
        if tokens and tokens[0] == self.prefix:
            return tokens[:1], tokens[1:]
        return [self.prefix], tokens


def _ids(tokenizer: Any, texts: Sequence[str], *, special: bool | None = None) -> list[list[int]]:
    if not texts:
        return []
    options = {} if special is None else {"add_special_tokens": special}
    # verbose=False: no warning on texts over the model's length, which are cut later.
    ids: list[list[int]] = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    return ids


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens, and of those added to the vocabulary as such."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, token in added.items() if token.special}


def bare_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts without any special token added."""
    return _ids(tokenizer, texts, special=False)


def encode_pieces(tokenizer: Any, pieces: Sequence[tuple[str, bool]], *, special: bool) -> tuple[list[int], list[int]]:
    """Tokens of the joined pieces, and for each token the index of the piece that it ends in (-1: added by the
    tokenizer).

    The text is encoded in one piece, as a user would; a tokenizer without character offsets encodes piece by piece.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _piece_by_piece(tokenizer, pieces, special=special)
    text = "".join(piece for piece, _ in pieces)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ends, total = [], 0
    for piece, _ in pieces:
        total += len(piece)
        ends.append(total)
    owners, index = [], 0
    for start, end in encoded["offset_mapping"]:
        while index < len(ends) - 1 and end > ends[index]:
            index += 1
        owners.append(index if end > start else -1)
    return list(encoded["input_ids"]), owners


def _piece_by_piece(
    tokenizer: Any, pieces: Sequence[tuple[str, bool]], *, special: bool
) -> tuple[list[int], list[int]]:
    ids, owners = [], []
    for index, (piece, _) in enumerate(pieces):
        tokens = tokenizer.encode(piece, add_special_tokens=special and index == 0)
        ids += tokens
        owners += [index] * len(tokens)
    return ids, owners
