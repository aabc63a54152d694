"""What data need of a model: its tokenizer, and how many tokens it can see."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qratk.core.errors import DataError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

DEFAULT_LENGTH = 2048
"""Tokens of a row at most, where neither an option nor tokenizer or model says less."""


@dataclass(frozen=True)
class Attached:
    """A tokenizer and the tokens that its model can see; either may be unknown."""

    tokenizer: Any = None
    context_length: int | None = None

    def same(self, other: Attached) -> bool:
        """Whether rows come out alike: equality of tokenizers would compare vocabularies."""
        return self.tokenizer is other.tokenizer and self.context_length == other.context_length

    def row_length(self, asked: int | None) -> int:
        """Tokens of a row at most: what is asked for, never above what the tokenizer and the model allow."""
        allowed = getattr(self.tokenizer, "model_max_length", None)  # 1e30 where there is none
        limits = [limit for limit in (allowed, self.context_length) if limit]
        return int(min([asked or DEFAULT_LENGTH, *limits]))

    @property
    def pad_id(self) -> int:
        """Token that fills up short rows: the tokenizer's, else its end of sequence, else 0."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(value for value in ids if value is not None)

    def tokenizer_text(self) -> str:
        """What decides the tokenizer's output; not its padding and truncation, which are state of the last call."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            parsed = json.loads(backend.to_str())
            core = {name: value for name, value in parsed.items() if name not in ("padding", "truncation")}
        else:
            core = dict(sorted(tokenizer.get_vocab().items()))
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        return json.dumps([core, special, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=str)


class Unlimited(Attached):
    """A tokenizer that rows may be as long as they are with."""

    def row_length(self, asked: int | None) -> int:
        """More than any row has."""
        return sys.maxsize


def of_trainer(trainer: Trainer | None, *, wanted_by: str) -> Attached:
    """Tokenizer and context length of the module in a Trainer. Raises DataError when there is no tokenizer; what goes
    wrong in the module on the way is its own error."""
    module = trainer.lightning_module if trainer is not None else None
    tokenizer = _read(module, "tokenizer")
    if tokenizer is None:
        raise DataError(
            f"{wanted_by} has no tokenizer: call `attach(tokenizer)`, or use it in a Trainer with a module that has a "
            f"`tokenizer`"
        )
    return Attached(tokenizer, _read(module, "context_length"))


def _read(module: Any, name: str) -> Any:
    """An attribute, None where there is none.

    A property is asked directly: when it fails by an AttributeError, `nn.Module` hides that behind "no attribute".
    """
    found = inspect.getattr_static(type(module), name, None)
    if isinstance(found, property) and found.fget is not None:
        return found.fget(module)
    return getattr(module, name, None)
