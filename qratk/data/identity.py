"""What data are told apart by, and what a person wants to know of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qratk.data.encoding import Encoded
from qratk.data.splits import SPLITS, Item, Split


def fingerprint(options: Mapping[str, Any], items: Mapping[Split, Sequence[Item]], tokenizer_text: str) -> str:
    """SHA-256 over the options that matter, the rows in use of each split and the tokenizer."""
    digest = hashlib.sha256()
    digest.update(json.dumps(dict(options), sort_keys=True, default=str).encode())
    for split in SPLITS:
        digest.update(f"\n{split}\n".encode())
        digest.update("\n".join(item.key for item in items[split]).encode())
    digest.update(tokenizer_text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def counts(items: Sequence[Item], rows: Sequence[Encoded], forms: Mapping[str, int]) -> dict[str, Any]:
    """Items by form and in all, rows, tokens (max, mean) and truncated rows of a split."""
    lengths = [len(row.tokens) for row in rows]
    return {
        "items": len(items),
        "forms": dict(forms),
        "rows": len(rows),
        "max_tokens": max(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "truncated": sum(row.truncated for row in rows),
    }
