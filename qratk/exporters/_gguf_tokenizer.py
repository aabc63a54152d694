"""A fast tokenizer of Hugging Face as metadata of GGUF, made of its own description: no other file is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qratk.core.errors import UnsupportedModelError
from qratk.exporters._gguf_file import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN: Final = re.compile("<0x[0-9A-F]{2}>")
_SPACE: Final = "\u2581"
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Final = {
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}": "tekken",
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}": "gpt-4o",
}
"""Names of llama.cpp for the pattern that a text is cut by."""
_CURE: Final = "give --pre-tokenizer NAME, a name of llama.cpp's for one that cuts alike, or export 'dense'"


def tokenizer_metadata(tokenizer: Any, size: int, *, pre_tokenizer: str = "auto") -> dict[str, Value]:
    """What llama.cpp needs to know of a tokenizer, for a model with embeddings of `size` tokens.

    Raises `UnsupportedModelError` for a tokenizer that llama.cpp has not the like of.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is no fast tokenizer, so that it cannot be read; save it as tokenizer.json"
        )
    description = json.loads(backend.to_str())
    if description["model"]["type"] != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is a {description['model']['type']}, and only byte-pair encodings are written here; export "
            "'dense' and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    level = _has_byte_level(description.get("pre_tokenizer"))
    found = _byte_level(description, size, pre_tokenizer) if level else _sentence_piece(description, size)
    return {**found, **_special(tokenizer)}


def _byte_level(description: Mapping[str, Any], size: int, pre_tokenizer: str) -> dict[str, Value]:
    name = _split_name(description["pre_tokenizer"]) if pre_tokenizer == "auto" else pre_tokenizer
    tokens, kinds = _tokens(description, size)
    merges = description["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
    }


def _sentence_piece(description: Mapping[str, Any], size: int) -> dict[str, Value]:
    """Pieces with scores: of two pairs llama.cpp joins that first which makes the piece of the higher score.

    A piece scores by the first merge that makes it, so that the order is that of the merges.
    """
    model = description["model"]
    tokens, kinds = _tokens(description, size)
    first: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        first.setdefault(left + right, rank)
    last = len(model["merges"])
    scores = [-float(first.get(token, last + index)) for index, token in enumerate(tokens)]
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        raise UnsupportedModelError(
            "the tokenizer has no tokens for single bytes, and llama.cpp ends with an error at a character that no "
            "token has; export 'dense' for another server"
        )
    unknown = model["vocab"].get(model.get("unk_token"))
    for index, token in enumerate(tokens):
        if index == unknown:
            kinds[index] = _UNKNOWN
        elif _BYTE_TOKEN.fullmatch(token):
            kinds[index] = _BYTE
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _adds_space(description),
    }


def _tokens(description: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every token of the model; rows of embeddings that no token has are unused."""
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    for token, index in description["model"]["vocab"].items():
        if index < size:
            tokens[index], kinds[index] = token, _NORMAL
    for added in description["added_tokens"]:
        if (index := added["id"]) < size:
            text = added["content"]
            tokens[index] = text if added["special"] else text.replace(_SPACE, " ")
            kinds[index] = _CONTROL if added["special"] else _USER
    return tokens, kinds


def _special(tokenizer: Any) -> dict[str, Value]:
    """Numbers of special tokens, whether a text begins and ends with one, and the chat template."""
    found: dict[str, Value] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = int(number)
    ids = list(tokenizer("a")["input_ids"])
    found["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found


def _parts(pre: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if pre is None:
        return ()
    return tuple(pre["pretokenizers"]) if pre["type"] == "Sequence" else (pre,)


def _has_byte_level(pre: Mapping[str, Any] | None) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(pre))


def _split_name(pre: Mapping[str, Any]) -> str:
    """llama.cpp's name for what cuts a text before pairs are joined; raises `UnsupportedModelError`."""
    *before, last = _parts(pre)
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not before:
            return "gpt-2"
        if last["use_regex"] and [(p["type"], p.get("individual_digits")) for p in before] == [("Digits", True)]:
            return "smollm"
        if not last["use_regex"] and len(before) == 1 and before[0]["type"] == "Split":
            pattern = before[0]["pattern"].get("Regex", "")
            if pattern in _SPLITS and not before[0].get("invert"):
                return _SPLITS[pattern]
    raise UnsupportedModelError(
        f"no tokenizer of llama.cpp is known here that cuts texts as this one ({json.dumps(pre)[:200]}); {_CURE}"
    )


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a text is given a space before it."""
    normalizer, pre = description.get("normalizer"), description.get("pre_tokenizer")
    steps = () if normalizer is None else normalizer.get("normalizers", (normalizer,))
    if any(step["type"] == "Prepend" and step["prepend"] == _SPACE for step in steps):
        return True
    parts = [part for part in _parts(pre) if part["type"] == "Metaspace"]
    return any(part.get("prepend_scheme", "always") != "never" for part in parts)
