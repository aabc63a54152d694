"""`qratk gain`: what a finished search won over uniform configurations; needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qratk.core.memory import format_bytes
from qratk.core.text import full_label
from qratk.run.document import ResultDocument
from qratk.run.run import Run


def gain(arguments: Sequence[str]) -> int:
    """Exit status of `qratk gain RUN [--bits B]`: what a finished search won over uniform configurations."""
    parser = argparse.ArgumentParser("qratk gain", description="Compare a search's best with uniform configurations.")
    parser.add_argument("run", type=Path, help="run directory of a finished search")
    parser.add_argument("--bits", type=int, default=4, help="bit-width of the uniform configurations (default 4)")
    given = parser.parse_args(arguments)
    print(gain_text(Run(given.run).result, given.bits))
    return 0


def gain_text(result: ResultDocument, bits: int) -> str:
    """The best, and its gain in score over each uniform baseline of a bit-width, on validation and on test data."""
    best = result.best
    lines = [f"best  {best.configuration}: score {best.score:.4f}, {format_bytes(best.bytes)}"]
    if (confirmed := result.confirmed) is not None:
        seeds = sum(entry.status == "ok" for entry in confirmed.replicates)
        known = confirmed.low == confirmed.low  # none over a single seed
        bounds = f" [{confirmed.low:.4f}, {confirmed.high:.4f}]" if known else ""
        lines.append(f"  over {seeds} fresh seed{'s' * (seeds > 1)}: {confirmed.mean:.4f}{bounds}")
    head = len(lines)
    for comparison in result.comparisons:
        baseline = comparison.baseline
        if set(baseline.configuration.bits) != {bits}:
            continue
        over = " over seeds" if comparison.over == "seeds" else ""
        lines.append(
            f"  over uniform {full_label(baseline.configuration)}: {comparison.difference:+.4f} "
            f"[{comparison.low:+.4f}, {comparison.high:+.4f}]{over} at {best.bytes / baseline.bytes:.0%} of its bytes"
        )
        ours, theirs = (result.tested(entry).get("score") for entry in (best, baseline))
        if ours is not None and theirs is not None:
            lines[-1] += f"; on test data {ours - theirs:+.4f}"
    if len(lines) == head:
        lines.append(f"  no uniform configuration of {bits} bits was measured")
    return "\n".join(lines)
