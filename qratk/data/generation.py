"""Greedy generation with a key-value cache, in batches that rows leave when they are done."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

_LOOK_BACK: Final = 2  # tokens more than a stop sequence has alone: it may begin within a token
_NEUTRAL: Final = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "guidance_scale": 1.0,
    "bad_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "watermarking_config": None, "penalty_alpha": None,
    "exponential_decay_length_penalty": None, "num_return_sequences": 1, "prompt_lookup_num_tokens": None,
}  # fmt: skip


def plain_greedy(model: nn.Module) -> bool:
    """Whether greedy generation of a model is its likeliest token each time: its configuration asks for nothing else,
    such as a penalty on repetition."""
    config = getattr(model, "generation_config", None)
    return config is not None and all(
        getattr(config, name, None) in (None, neutral) for name, neutral in _NEUTRAL.items()
    )


def asks_for_greedy(options: Mapping[str, Any]) -> bool:
    """Whether options of lm-eval's generation ask for the likeliest token each time, and for nothing else."""
    known = {"attention_mask", "do_sample", "temperature", "top_p", "top_k"}
    sampled = options.get("do_sample") or (options.get("do_sample") is None and options.get("temperature"))
    return set(options) <= known and "attention_mask" in options and not sampled


def end_ids(model: nn.Module) -> frozenset[int]:
    """Tokens by which a model says that a text is over."""
    config: Any = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


class StopSequences:
    """Tells whether tokens end in, or just behind, one of some texts; texts may begin and end within tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [(text, len(tokenizer.encode(text, add_special_tokens=False)) + _LOOK_BACK) for text in texts]

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether one of the texts has come."""
        return any(text in self._tokenizer.decode(tokens[-size:]) for text, size in self._texts)


class Prefix:
    """What prompts begin with, computed once: the key-value cache of the last one, which is kept for other batches.

    Good for one state of a model's weights and one number of candidates.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._cache: Any = None

    def cache(self, model: nn.Module, tokens: Tensor, candidates: int, prompts: int) -> Any:
        """The model's cache after `tokens`, (P,), for as many rows as each candidate has prompts."""
        if tokens.tolist() != self._tokens:
            ids = tokens.repeat(candidates, 1)
            positions = torch.arange(len(tokens), device=tokens.device).repeat(candidates, 1)
            self._cache = _pass(model, ids, torch.ones_like(ids), positions, None)[1]
            self._tokens = tokens.tolist()
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(prompts)
        return cache


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    most: int | Sequence[int],
    ends: Collection[int] = (),
    stopped: Callable[[int, Sequence[int]], bool] = lambda prompt, tokens: False,
    candidates: int = 1,
    prefix: Tensor | None = None,
    kept: Prefix | None = None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token; what ends it is part of it.

    Tokens are those of transformers' `generate(do_sample=False)`. Rows leave the batch when they are done: with several
    candidates side by side, a prompt does when all of them are.

    Args:
        model: causal language model, as Hugging Face has them; a cohort is installed in it for several candidates.
        input_ids: prompts (B, T), padded at the left.
        attention_mask: 1 where there is a token, 0 where there is padding, (B, T).
        most: tokens of a continuation at most, of all or of each prompt.
        ends: tokens that end a continuation.
        stopped: whether the continuation of a prompt, by its index, is over with these tokens.
        candidates: how many of them are in the model.
        prefix: tokens that all prompts begin with, (P,), where `input_ids` are what each has behind them. They are
            computed once, which models must allow that `qratk.backbone.logits.shared_length` knows.
        kept: where the cache of the prefix is kept for the next batch.

    Returns:
        Tokens of each continuation, of the first candidate's prompts, then the second's.
    """
    prompts = len(input_ids)
    limits = [most] * prompts if isinstance(most, int) else list(most)
    ids, mask = input_ids.repeat(candidates, 1), attention_mask.repeat(candidates, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    if prefix is not None:
        cache = (kept or Prefix()).cache(model, prefix, candidates, prompts)
        positions = positions + len(prefix)
        mask = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], 1)
    found: list[list[int]] = [[] for _ in range(candidates * prompts)]
    done = [False] * len(found)
    left = list(range(prompts))
    while True:
        tokens, cache = _pass(model, ids, mask, positions, cache)
        rows = [candidate * prompts + prompt for candidate in range(candidates) for prompt in left]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not done[row]:
                found[row].append(token)
                prompt = row % prompts
                done[row] = token in ends or len(found[row]) >= limits[prompt] or stopped(prompt, found[row])
        staying = [not all(done[prompt::prompts]) for prompt in left]
        if not any(staying):
            return found
        if not all(staying):
            index = torch.tensor(staying * candidates, device=ids.device).nonzero()[:, 0]
            cache.batch_select_indices(index)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
            left = [prompt for prompt, stays in zip(left, staying, strict=True) if stays]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _pass(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The likeliest token behind each row, (B,), and the cache with the row in it."""
    takes = inspect.signature(_inner(model).forward).parameters
    held = "cache" if "cache" in takes else "past_key_values"  # its name in later and earlier transformers
    options = {"position_ids": positions, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in takes}
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{held: cache}, **options)
    return out.logits[:, -1].argmax(-1), next(out[name] for name in ("cache", "past_key_values") if name in out)


def _inner(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
