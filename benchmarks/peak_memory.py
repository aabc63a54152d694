"""Foretold and measured peaks of training, as one table.

    python benchmarks/peak_memory.py --data DIRECTORY --out runs/peaks.json [--device cuda]

Random models of four families, the embedded model and, from DIRECTORY/models, small real ones are trained for two steps
at several configurations, batch sizes and lengths, with and without gradient checkpointing and the dense cache. `whole`
is the trace of that very configuration, `counted` what a search counts it by. Ratios are to the measured peak: on the
CPU by every event of torch's allocator, on CUDA by its peak counter. The last lines give the extremes.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.core.space import SearchSpace
from qratk.peaks.foretold import memory_model
from qratk.peaks.measure import measured_peak
from qratk.peaks.trace import traced_peak
from qratk.quantizers.base import quantizers
from qratk.training.building import built_quantizers

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
REAL = ("stories260k", "babyllama105", "deep12")
BITS, RANKS = (2, 3, 4, 8, 16), (4, 8, 16)
CONFIGURATIONS = {"4:8": ([4], [8]), "mixed": ([2, 3, 4, 8, 16], [4, 8, 16]), "some without": ([8, 2, 4], [8, 0, 16])}


@dataclass(frozen=True)
class Case:
    """What is trained: batch size, length, and how."""

    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool = False
    dense_cache: bool = False


@dataclass(frozen=True)
class Row:
    """One comparison, in bytes."""

    model: str
    configuration: str
    case: Case
    whole: int
    counted: int | None  # None where a rank is off the ladder
    measured: int

    @property
    def ratio(self) -> float:
        """Of the traced to the measured peak."""
        return self.whole / self.measured


def random_model(family: str, hidden: int, layers: int) -> Any:
    """A random model of a family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }  # fmt: skip
    if family != "gpt2":
        sizes["intermediate_size"] = 2 * hidden
    if family in ("llama", "qwen2"):
        sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))


def makers(data: Path | None) -> Iterator[tuple[str, Callable[[], Backbone]]]:
    """Names of models, and functions that make their backbones anew."""
    hqq = quantizers.create("hqq", group_size=32)
    table = built_quantizers({2: hqq, 3: hqq})
    for family in FAMILIES:
        for hidden, layers in ((64, 3), (256, 6)):
            yield (
                f"{family} {layers} x {hidden}",
                lambda f=family, h=hidden, n=layers: Backbone.from_model(random_model(f, h, n), quantizers=table),
            )
    from qratk.embedded import model_directory

    paths = [("embedded", Path(model_directory()))]
    if data is not None:
        paths += [(name, data / "models" / name) for name in REAL]
    for name, path in paths:
        yield name, lambda p=path: Backbone.load(p, quantizers=table)


def compared(name: str, make: Callable[[], Backbone], case: Case, configuration: str, device: str) -> Row:
    """One comparison."""
    backbone = make()
    count = len(backbone.layers)
    bits, ranks = CONFIGURATIONS[configuration]
    chosen = Configuration.of(
        [bits[i % len(bits)] for i in range(count)], [ranks[i % len(ranks)] for i in range(count)]
    )
    options = {**asdict(case), "device": device}
    counted = None
    if set(chosen.ranks) <= set(RANKS):
        space = SearchSpace(BITS, RANKS, tuple(shape.name for shape in backbone.shapes))
        counted = memory_model(backbone, space, **options).bytes(chosen, "training")
    whole = traced_peak(backbone, chosen, **options).peak
    backbone.build_bank(sorted(set(chosen.bits)))
    backbone.model.to(device)
    return Row(name, configuration, case, whole, counted, measured_peak(backbone, chosen, **asdict(case)))


def table(rows: list[Row]) -> str:
    """The rows as Markdown, and the extremes."""
    lines = [
        "| model | configuration | batch | | traced | measured | ratio | counted |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        case = row.case
        how = " ".join(
            w for w, on in (("checkpointing", case.gradient_checkpointing), ("dense", case.dense_cache)) if on
        )
        counted = "" if row.counted is None else f"{row.counted / row.measured:.3f}"
        sizes = f"{row.whole:,} | {row.measured:,} | {row.ratio:.3f} | {counted}"
        batch = f"{case.batch_size} x {case.sequence_length}"
        lines.append(f"| {row.model} | {row.configuration} | {batch} | {how} | {sizes} |")
    ratios = [row.ratio for row in rows]
    counted = [row.counted / row.measured for row in rows if row.counted is not None]
    lines += [
        "",
        f"traced / measured: {min(ratios):.4f} to {max(ratios):.4f} over {len(rows)} cases",
        f"counted / measured: {min(counted):.4f} to {max(counted):.4f} over {len(counted)} cases",
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with models/NAME; without it no real models")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", help="only models whose name begins so")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    warnings.simplefilter("ignore")
    cases = [Case(8, 128), Case(8, 128, gradient_checkpointing=True), Case(1, 16), Case(1, 16, dense_cache=True)]
    rows = []
    for name, make in makers(options.data):
        if options.models and not name.startswith(tuple(options.models)):
            continue
        for case in cases:
            for configuration in CONFIGURATIONS:
                rows.append(compared(name, make, case, configuration, options.device))
        print(f"{name}: done", file=sys.stderr)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=2))
    print(table(rows))


if __name__ == "__main__":
    main()
