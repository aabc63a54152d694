"""Text for people: cleaned of control codes and secrets, durations, labels of configurations and layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from qratk.core.configuration import Configuration
from qratk.core.secrets import HIDDEN, text_without_secrets
from qratk.core.shared import shared_text

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+|\s+")
_SAID = (
    (re.compile(r"(?i)\b(authorization:\s*\w+|password|passwd|secret|api_?key|access_?token|auth_?token)(\s*[=:]\s*|\s+)"
                r"(?!\s)[^\s,;'\"]{6,}"), rf"\1\2{HIDDEN}"),
)  # fmt: skip


def clean(text: str) -> str:
    """Text on one line, without control codes, and with what looks like a token or a password hidden."""
    text = _CONTROLS.sub(" ", _ESCAPES.sub("", text)).strip()
    for pattern, replacement in _SAID:
        text = pattern.sub(replacement, text)
    return text_without_secrets(text)


def visible(text: str, *, lines: bool = False) -> str:
    """Text in which nothing acts on a terminal or hides: what is no printable character, and so moves the cursor,
    colours, turns the direction of writing or cannot be seen, is shown by its escape, as in \\x1b. With `lines`, line
    feeds stay, behind a sign."""
    shown = (c if c.isprintable() else "\u21b5\n" if lines and c == "\n" else _escaped(c) for c in text)
    return "".join(shown)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def duration(seconds: float | None) -> str:
    """Seconds as '8.1 s', '12 min 05 s', '3 h 07 min' or '2 d 04 h'; '-' when unknown."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def label(configuration: Configuration) -> str:
    """'4:8' for a uniform configuration, whatever its settings, else the first digits of its digest."""
    kinds = set(configuration.layers)
    return str(configuration.layers[0]) if len(kinds) == 1 else configuration.digest[:8]


def full_label(configuration: Configuration) -> str:
    """The label with the shared settings, as in '4:8 | learning_rate=0.001'."""
    return label(configuration) + (f" | {shared_text(configuration.shared)}" if configuration.shared else "")


def nearest(given: str, known: Iterable[str]) -> str:
    """A suggestion as the end of an error message; empty when nothing is near."""
    near = get_close_matches(given, list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Layer names without the dotted parts that all of them share at the front and at the back."""
    parts = [name.split(".") for name in names]
    shortest = min((len(p) for p in parts), default=0)
    front = 0
    while front < shortest - 1 and len({p[front] for p in parts}) == 1:
        front += 1
    back = 0
    while back < shortest - 1 - front and len({p[-1 - back] for p in parts}) == 1:
        back += 1
    return tuple(".".join(p[front : len(p) - back]) for p in parts)
