"""What confirming the answer with fresh seeds is worth: the winner's curse on simulated landscapes.

    python benchmarks/confirm.py --out docs/confirm.csv
    python benchmarks/confirm.py --only_table --out docs/confirm.csv

One search of `configs/simulated.yaml` for each landscape and noise, with uniform baselines and a cap on evaluations at
the highest rung. Its answer is told as it is, confirmed in several ways, and, for the same number of full runs, after
that many more evaluations in phase II without confirmation. Every one of them goes on in the folder of the same search.
`truth` is the answer's score without noise, `reported` what a person reads as its score, `optimism` the difference.
Figures in the table are means over landscapes; gains are paired, against the answer as it is, with standard errors.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from qratk.core.result import SearchResult
from qratk.evaluators.simulated import SimulatedEvaluator
from qratk.reporters.multi import Reporters
from qratk.settings.merge import laid_over
from qratk.settings.recipe import from_section

ROOT = Path(__file__).parent.parent
PLAIN = "none"
VARIANTS = ((3, 1), (3, 2), (3, 3), (3, 5), (5, 3), (8, 3))  # candidates, seeds


@dataclass(frozen=True)
class Row:
    """One answer: what was done for it, what it took, what it is said to score, and what it scores."""

    layers: int
    noise: float
    landscape: int
    variant: str
    runs: int
    reported: float
    truth: float
    low: float
    high: float

    @property
    def optimism(self) -> float:
        """By how much the report is too good."""
        return self.reported - self.truth

    @property
    def covered(self) -> bool:
        """Whether the interval over seeds holds the truth; there is none with fewer than two seeds."""
        return self.low <= self.truth <= self.high


def rows(layers: int, noise: float, landscape: int, cap: int) -> Iterator[Row]:
    """All answers of one search."""
    base = yaml.safe_load((ROOT / "configs" / "simulated.yaml").read_text())["search"]
    over = {
        "seed": landscape,
        "uniform_baselines": True,
        "max_evaluations": cap,
        "evaluator": {"init_args": {"num_layers": layers, "landscape": {"noise": noise}}},
        "refiner": {"class_path": "hill_climb", "init_args": {"max_evaluations": 200}},
    }
    section = laid_over({**base, "refiner": {}}, over)
    with tempfile.TemporaryDirectory() as folder:

        def answer(variant: str, **changes: Any) -> Row:
            result = from_section({**section, **changes}).run(run_dir=Path(folder), reporter=Reporters([]), config={})
            return _row(result, layers, noise, landscape, variant)

        yield answer(PLAIN)
        confirmed = [answer(f"{c} x {s}", confirm={"candidates": c, "seeds": s}) for c, s in VARIANTS]
        yield from confirmed
        for row in confirmed:
            yield answer(f"instead of {row.variant}", max_evaluations=row.runs)


def _row(result: SearchResult, layers: int, noise: float, landscape: int, variant: str) -> Row:
    highest = result.plan.ladder.highest
    options = yaml.safe_load((ROOT / "configs" / "simulated.yaml").read_text())["search"]["evaluator"]["init_args"]
    evaluator = SimulatedEvaluator(layers, landscape, landscape={**options["landscape"], "noise": noise})
    evaluator._settle(landscape, highest)
    own = result.confirmed
    return Row(
        layers,
        noise,
        landscape,
        variant,
        sum(record.evaluation.steps == highest for record in result.records),
        result.best.score if own is None else own.mean,
        evaluator.landscape.true_score(result.best.configuration, highest),
        float("nan") if own is None else own.low,
        float("nan") if own is None else own.high,
    )


def table(found: Sequence[Row]) -> str:
    """Means over landscapes, as Markdown."""
    lines = [
        "| layers | noise | confirmed (candidates x seeds) | runs at the highest rung | true score "
        "| gain of confirming | of as many runs searched on | reported - true | interval holds the truth |",
        "|---" * 9 + "|",
    ]
    groups: dict[tuple[int, float], dict[str, dict[int, Row]]] = {}
    for row in found:
        groups.setdefault((row.layers, row.noise), {}).setdefault(row.variant, {})[row.landscape] = row
    for (layers, noise), by_variant in groups.items():
        plain = by_variant[PLAIN]
        for variant, by_seed in by_variant.items():
            if variant.startswith("instead"):
                continue
            own, instead = list(by_seed.values()), by_variant.get(f"instead of {variant}", {})
            bounded = [row.covered for row in own if row.low == row.low]
            lines.append(
                f"| {layers} | {noise:g} | {variant} | {statistics.fmean(row.runs for row in own):.1f} "
                f"| {statistics.fmean(row.truth for row in own):.4f} "
                f"| {'' if variant == PLAIN else _gain(by_seed, plain)} | {_gain(instead, plain) if instead else ''} "
                f"| {_spread([row.optimism for row in own])} "
                f"| {f'{statistics.fmean(bounded):.2f}' if bounded else ''} |"
            )
    return "\n".join(lines)


def _gain(rows_: dict[int, Row], plain: dict[int, Row]) -> str:
    return _spread([row.truth - plain[landscape].truth for landscape, row in rows_.items()])


def _spread(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):+.4f} ± {error:.4f}"


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return [
            Row(
                int(line["layers"]), float(line["noise"]), int(line["landscape"]), line["variant"], int(line["runs"]),
                float(line["reported"]), float(line["truth"]), float(line["low"]), float(line["high"]),
            )
            for line in csv.DictReader(stream)
        ]  # fmt: skip


def main() -> None:
    """Run what the file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV; what is there already is not run again")
    parser.add_argument("--layers", type=int, nargs="+", default=[12])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--landscapes", type=int, default=30)
    parser.add_argument("--cap", type=int, default=40, help="evaluations at the highest rung")
    parser.add_argument("--only_table", action="store_true")
    given = parser.parse_args()
    found = read(given.out)
    done = {(row.layers, row.noise, row.landscape) for row in found}
    tasks = [(n, noise, s) for s in range(given.landscapes) for n in given.layers for noise in given.noise]
    for task in [] if given.only_table else [task for task in tasks if task not in done]:
        new = list(rows(*task, given.cap))
        found += new
        with given.out.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, [own.name for own in fields(Row)])
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerows(asdict(row) for row in new)
        print(task, *(f"{row.variant}: {row.optimism:+.4f}" for row in new[:4]), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
