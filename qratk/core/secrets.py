"""Secrets, told by their names and by their shapes: kept out of whatever is written or shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "(hidden)"

# Whole names in snake case. `pad_token` and `max_tokens` are no secrets, and neither is the path in `private_key_file`.
_ALWAYS: Final = re.compile(
    r"(.*_)?(passwords?|passwd|pwd|passphrase|passcode|secrets?|secret_(key|access_key|value)|api_?keys?|"
    r"(access|account|encryption|private|signing|ssh|subscription)_?keys?|authorization|auth|bearer|cookies?|"
    r"credentials?|(access|api|auth|bearer|bot|github|gitlab|hf|hub|hugging_?face|oauth|personal|refresh|"
    r"secret|security|session|wandb)_?tokens?)"
)
_TOKENS: Final = re.compile(r"tokens?")  # such a number is a count
_SIGNED: Final = re.compile(r"sig|(.*_)?(signature|credential)")  # in the query of an address

_SHAPES: Final = re.compile(
    r"\b(?:"
    r"hf_[A-Za-z0-9]{16,}|(?:gh[oprsu]_|github_pat_|glpat-|wandb_|npm_|pypi-)[A-Za-z0-9_-]{16,}|"
    r"sk[_-][A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|xox[abeprs]-[A-Za-z0-9-]{10,}|"
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r")"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)
_SCHEMES: Final = re.compile(r"\b(Bearer|Basic|Token)\s+[A-Za-z0-9+/._~=-]{6,}")
_USER: Final = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@:]*:[^/\s]*@|(\bhttps?://)[^/\s@]+@")
_QUERY: Final = re.compile(r"\?([\w.~-]+=[^#\s'\"]*)")
_ASSIGNED: Final = re.compile(r"(?<![?&\w.-])((?:--)?[A-Za-z_][\w.-]*)=(?![{$=])([^\s,;'\"&]+)")

_KEYED: Final = re.compile(r"""(['"])([\w.-]+)\1(\s*:\s*)('[^']*'|"[^"]*"|[^\s,}\]{[]+)""")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name, in whatever spelling, holds a secret."""
    return bool(_ALWAYS.fullmatch(_snake(name)))


def without_secrets(value: Any) -> Any:
    """Plain data (a copy) that may be written to a file, and can be read again as settings.

    What stands under the name of a secret is left out with its name, so that a default or the environment gives it
    when the settings are read; so is a text that is a token by its shape. Texts lose what in them is one: the user of
    an address, a parameter of its query, a token.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not _is_secret(str(key), item)}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return text_without_secrets(value) if isinstance(value, str) else value


def text_without_secrets(text: str) -> str:
    """A text in which what looks like a token, or is assigned to the name of a secret, is cut out or hidden."""
    text = _USER.sub(lambda m: m[1] or m[2], text)
    text = _QUERY.sub(_query_without_secrets, text)
    text = _SHAPES.sub(HIDDEN, text)
    text = _SCHEMES.sub(rf"\1 {HIDDEN}", text)
    text = _KEYED.sub(lambda m: f"{m[1]}{m[2]}{m[1]}{m[3]}{HIDDEN}" if _names_secret(m[2]) else m[0], text)
    return _ASSIGNED.sub(lambda m: f"{m[1]}={HIDDEN}" if _names_secret(m[1].rpartition(".")[2]) else m[0], text)


def _is_secret(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False  # `use_auth_token: true` says where to look
    if is_secret_name(name) or (_TOKENS.fullmatch(_snake(name)) and not isinstance(value, int | float)):
        return True
    return isinstance(value, str) and bool(_SHAPES.fullmatch(value.strip()))


def _query_without_secrets(match: re.Match[str]) -> str:
    kept = [part for part in match[1].split("&") if not _names_secret(part.partition("=")[0])]
    return "?" + "&".join(kept) if kept else ""


def _names_secret(name: str) -> bool:
    return bool(is_secret_name(name) or _TOKENS.fullmatch(_snake(name)) or _SIGNED.fullmatch(_snake(name)))


def _snake(name: str) -> str:
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.lstrip("-"))
    return re.sub(r"[\s.-]+", "_", parted).lower()
