"""`qratk gain`: what a finished search won over uniform configurations; needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qratk.core.errors import RunDirectoryError
from qratk.core.memory import format_bytes
from qratk.run import files


def gain(arguments: Sequence[str]) -> int:
    """Exit status of `qratk gain RUN [--bits B]`: what a finished search won over uniform configurations."""
    parser = argparse.ArgumentParser("qratk gain", description="Compare a search's best with uniform configurations.")
    parser.add_argument("run", type=Path, help="run directory of a finished search")
    parser.add_argument("--bits", type=int, default=4, help="bit-width of the uniform configurations (default 4)")
    given = parser.parse_args(arguments)
    print(gain_text(_result(given.run), given.bits))
    return 0


def gain_text(result: dict[str, Any], bits: int) -> str:
    """The best, and its gain in score over each uniform baseline of a bit-width, on validation and on test data."""
    best, tests = result["best"], result["test_scores"]
    lines = [f"best  {best['configuration']}: score {best['score']:.4f}, {format_bytes(best['bytes'])}"]
    for comparison in result["comparisons"]:
        baseline = comparison["baseline"]
        if not baseline["configuration"].startswith(f"{bits}:") or baseline["average_bits"] != bits:
            continue
        lines.append(
            f"  over uniform {baseline['configuration'].partition('*')[0]}: {comparison['difference']:+.4f} "
            f"[{comparison['low']:+.4f}, {comparison['high']:+.4f}] at {best['bytes'] / baseline['bytes']:.0%} "
            f"of its bytes"
        )
        both = [tests.get(row["configuration"], {}).get("score") for row in (best, baseline)]
        if None not in both:
            lines[-1] += f"; on test data {both[0] - both[1]:+.4f}"
    if len(lines) == 1:
        lines.append(f"  no uniform configuration of {bits} bits was measured")
    return "\n".join(lines)


def _result(run: Path) -> dict[str, Any]:
    path = run / files.RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing: {run} holds no finished search") from None
    except ValueError as error:
        raise RunDirectoryError(f"{path} is not readable: {error}") from error
    return found
