"""Text to tokens: continuations as lm-eval cuts them, and spans of a text by character offsets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import DataError

_MOST_REPEATS = 16  # of a row in one batch


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens of a row, (T,), which are labelled, (T,), whether some were cut off, and the item it belongs to.

    A prompt that a model is to go on from has nothing labelled, and says how many tokens it `generates` at most.
    """

    tokens: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    truncated: bool = False
    item: int = 0
    generates: int = 0


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
    (`TemplateLM.loglikelihood` and `HFLM.tok_encode` of lm-eval 0.4.) Of a tokenizer that ends texts by a token, that
    is left off, here and in `run_lm_eval`; lm-eval itself would cut it from the continuation's beginning.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix = prefix_token_id(tokenizer)
        self._behind = affixes(tokenizer)[1]
        self._prefix_text = tokenizer.decode(self.prefix) if self.prefix is not None else None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokens of contexts and of continuations; a continuation may come out empty."""
        texts = {text for context, rest in pairs if context for text in (context.rstrip(), context + rest)}
        tokens = self._encode(sorted(texts))
        bare = sorted({rest for context, rest in pairs if not context})
        bare_tokens = dict(zip(bare, bare_ids(self.tokenizer, bare), strict=True))
        found = []
        for context, rest in pairs:
            if context:
                head = tokens[context.rstrip()]
                found.append((self._not_empty(head), tokens[context + rest][len(head) :]))
            else:
                found.append(self._without_context(bare_tokens[rest]))
        return found

    def rows(
        self, pairs: Sequence[tuple[str, str]], owners: Sequence[int], *, limit: int, empty: Callable[[int], DataError]
    ) -> Iterator[Encoded]:
        """Rows of at most `limit` tokens whose continuations are labelled; `owners` are their items.

        They are cut from the left, as lm-eval does. It stops at a continuation that is longer than the model's context;
        here the end of it is scored. `empty` is the error for an item one of whose continuations has no token.
        """
        for (context, continuation), owner in zip(self(pairs), owners, strict=True):
            if not continuation:
                raise empty(owner)
            tokens = (context + continuation)[-limit:]
            scored = min(len(continuation), limit - 1)
            labelled = [False] * (len(tokens) - scored) + [True] * scored
            yield encoded(tokens, labelled, truncated=len(context) + len(continuation) > limit, item=owner)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that a model is to go on from. Raises DataError for one that has none."""
        tokens = self._encode(sorted(set(texts)))
        return [self._not_empty(tokens[text]) for text in texts]

    def _not_empty(self, head: list[int]) -> list[int]:
        if not head:
            raise DataError("a prompt holds nothing but white space, which has no tokens; leave it empty instead")
        return head

    def _encode(self, texts: Sequence[str]) -> dict[str, list[int]]:
        starts = self._prefix_text
        begun = [text for text in texts if starts and text.startswith(starts)]
        others = [text for text in texts if not (starts and text.startswith(starts))]
        # What the tokenizer puts behind a text would stand between context and continuation.
        ended = [without_end(ids, self._behind) for ids in _ids(self.tokenizer, others)]
        ids = _ids(self.tokenizer, begun, special=False) + ended
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


def without_end(ids: list[int], behind: list[int]) -> list[int]:
    """Tokens of a text without those that the tokenizer put behind it."""
    return ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids


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


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before a text, and behind it."""
    ((bare, whole),) = zip(_ids(tokenizer, ["a"], special=False), _ids(tokenizer, ["a"], special=True), strict=True)
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    return [], []


def encode_pieces(tokenizer: Any, pieces: Sequence[tuple[str, bool]], *, special: bool) -> tuple[list[int], list[int]]:
    """Tokens of the joined pieces, and for each token the index of the piece that it ends in (-1: put before the text
    by the tokenizer, if `special`; what it puts behind is left out, for the text may go on).

    The text is encoded in one piece, as a user would.
    """
    text = "".join(piece for piece, _ in pieces)
    before = affixes(tokenizer)[0] if special else []
    ends = list(accumulate(len(piece) for piece, _ in pieces))
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, owners = list(encoding["input_ids"]), _owners([end for _, end in encoding["offset_mapping"]], ends)
    else:
        (ids,) = bare_ids(tokenizer, [text])
        heads = bare_ids(tokenizer, [text[:end] for end in ends[:-1]])
        owners = _owners_by_heads(ids, heads)
    return before + ids, [-1] * len(before) + owners


def _owners(token_ends: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Index of the piece that each token ends in."""
    return [min(bisect_left(ends, end), len(ends) - 1) for end in accumulate(token_ends, max)]


def _owners_by_heads(ids: Sequence[int], heads: Sequence[Sequence[int]]) -> list[int]:
    """As `_owners`, without character offsets: a token ends in a piece if it is a token of the text up to there too."""
    owners: list[int] = []
    for index, head in enumerate(heads):
        common = next((k for k, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b), min(len(ids), len(head)))
        owners += [index] * (common - len(owners))
    return owners + [len(heads)] * (len(ids) - len(owners))
