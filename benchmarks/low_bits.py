"""Quantisers and starts at 2, 3 and 4 bits: loss and scores before and after training, by bytes.

    python benchmarks/low_bits.py measure --cache FOLDER [--model FOLDER --data DIR] [--device cuda] [--part 1/4] ...
    python benchmarks/low_bits.py table --cache FOLDER [--csv FILE]
    python benchmarks/low_bits.py weights --cache FOLDER [--model FOLDER --data DIR] [--every 5] [--csv FILE]

Every quantiser packs the whole model at 2, 3 or 4 bits ("all"), or its middle block at 2 or 3 while the others are at
4 by nf4 ("one"). LoRA of one rank begins at each start, without effect ("default"), by LoftQ and by CLoQ, and is
trained at each of the rates; the better one on validation items is told. "text" is the loss in nats a token, untrained
and trained, over prompts and right answers of test items, or over documents of the embedded model's world. Scores are
of the test items. Bits a weight count codes, scales and zero points exactly.

`weights` packs the projections of every so-manieth block alone and tells their relative errors, plain and in the second
moment of their inputs: ||W - Q||^2 / ||W||^2 and E||(W - Q) x||^2 / E||W x||^2, means over projections.

`measure` keeps a file for each quantiser, bits, layout, seed and start in FOLDER, so that it can be stopped and run
again; `--part I/N` does the I-th of N shares, for several processes at once, and `--minutes` begins nothing new after
that time; `--steps 0` measures untrained models alone, for a FOLDER of its own. DIR holds TREC as
`trec/{train,test}.jsonl`; without --model it is the embedded model on its own task. Starts and rates of one model are
trained side by side.
"""

from __future__ import annotations

from common import quiet, table

# isort: split
import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from qratk.backbone.logits import (
    labelled_logits,
    labelled_tokens,
    replicate,
    target_log_likelihood,
    training_losses,
)
from qratk.bank.calibration import gather
from qratk.core.configuration import Configuration
from qratk.core.errors import QuantizationError
from qratk.core.evaluation import FidelityLadder
from qratk.core.memory import LayerShape
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.data.splits import Split
from qratk.embedded import model_directory, write_dataset
from qratk.embedded.train import HELD_OUT_SEED
from qratk.embedded.world import documents, make_world
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.quantizers.base import Quantizer, quantizers
from qratk.training.cohort import Cohort
from qratk.training.cohort_module import CohortModule
from qratk.training.module import FineTuneModule
from qratk.training.trainers import in_place, quiet_lightning

Row = dict[str, Any]
LAYOUTS = ("all", "one")
STARTS = ("default", "loftq", "cloq")
FIGURES = ("log_likelihood", "log_likelihood_fitted", "acc")


# What is measured


@dataclass(frozen=True)
class Method:
    """A quantiser with its options, and the bits that it is measured at."""

    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = (2, 3, 4)

    @property
    def name(self) -> str:
        """As it is asked for, as in 'hqq-64'."""
        told = [str(v) if n == "group_size" else n if v is True else f"{n}={v}" for n, v in self.options.items()]
        return "-".join([self.quantizer, *told])

    @property
    def specified(self) -> dict[str, Any]:
        """As a module takes it."""
        return {"class_path": self.quantizer, "init_args": dict(self.options)}

    def takes(self, shapes: Sequence[LayerShape]) -> bool:
        """Whether every projection can be packed as it is, without falling back to another group size."""
        quantizer = quantizers.create(self.quantizer, **self.options)
        try:
            for shape in shapes:
                for _, d_in, d_out in shape.projections:
                    for bits in self.bits:
                        quantizer.check((d_out, d_in), bits)
        except QuantizationError:
            return False
        return True


def _grouped(quantizer: str, *sizes: int, bits: tuple[int, ...] = (2, 3, 4), **options: Any) -> list[Method]:
    return [Method(quantizer, {"group_size": size, **options}, bits) for size in sizes]


METHODS = (  # in the order in which they are measured
    *_grouped("affine_gptq", 32, 64),
    *_grouped("hqq", 16, 64),
    *_grouped("affine_gptq", 16, 192),
    *_grouped("slim", 64),
    *_grouped("slim", 64, range=0.6),
    *_grouped("gptq", 64),
    *_grouped("awq", 64),
    *_grouped("affine", 32, 64, bits=(2, 3, 4, 8)),
    *_grouped("affine", 32, 64, clip="unbiased"),
    *_grouped("hqq", 32),
    Method("none", bits=(16,)),
    Method("int8", bits=(8,)),
    Method("nf4", bits=(4,)),
    *_grouped("gptq", 16, 32),
    *_grouped("awq", 16, 32),
    *_grouped("slim", 16, 32),
    *_grouped("slim", 32, range=0.6),
    *_grouped("affine", 16, 192),
    *_grouped("affine", 32, 64, symmetric=True, bits=(2, 3, 4, 8)),
    *_grouped("affine_gptq", 32, 64, symmetric=True),
    *(method for name in ("affine_gptq", "affine", "slim", "gptq", "awq") for method in _grouped(name, 128)),
)


@dataclass(frozen=True)
class Unit:
    """What is trained at once: a quantiser at some bits in a layout, from every start at every rate."""

    method: Method
    bits: int
    layout: str
    seed: int
    begun: tuple[str, ...] = STARTS

    @property
    def table(self) -> tuple[str, int, bool]:
        """What can be measured in one loaded model: the method, the seed, and whether 4 bits are its own."""
        return (self.method.name, self.seed, self.bits not in (2, 3))

    def configuration(self, layers: int, rank: int) -> Configuration:
        """Of a model of so many layers."""
        bits = [self.bits if self.layout == "all" or i == layers // 2 else 4 for i in range(layers)]
        return Configuration.of(bits, [rank] * layers)

    @property
    def starts(self) -> tuple[str, ...]:
        """16 bits have no error to make up for."""
        return self.begun if self.bits < 16 else self.begun[:1]


def units(given: argparse.Namespace, shapes: Sequence[LayerShape]) -> list[Unit]:
    """All that were asked for and the model takes: first 2 and 3 bits everywhere, in the order of methods."""
    found = []
    for seed in given.seeds:
        for own in (False, True):
            for method in METHODS:
                if (given.methods and method.name not in given.methods) or not method.takes(shapes):
                    continue
                bits = [b for b in method.bits if (b not in (2, 3)) == own and (b in given.bits or b > 4)]
                for layout in given.layouts:
                    begun = tuple(given.starts)
                    found += [Unit(method, b, layout, seed, begun) for b in bits if layout == "all" or b in (2, 3)]
    return found


def part(found: Sequence[Unit], share: str) -> list[Unit]:
    """The I-th of N shares, "I/N" from 1: whole tables, dealt out in turn."""
    index, count = (int(number) for number in share.split("/"))
    if not 1 <= index <= count:
        raise SystemExit(f"--part is I/N with I from 1 to N, got {share}")
    tables = list(dict.fromkeys(unit.table for unit in found))
    chosen = tables[index - 1 :: count]
    return [unit for name in chosen for unit in found if unit.table == name]


# Measuring


@dataclass
class Bench:
    """The model, the data, and what is asked of them."""

    given: argparse.Namespace
    data: dict[int, MultipleChoiceData] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Folder of the model."""
        return str(self.given.model or model_directory())

    @property
    def name(self) -> str:
        """Name of the model."""
        return Path(self.given.model).name if self.given.model else "embedded"

    def file(self, unit: Unit, start: str) -> Path:
        """Where an item is kept."""
        folder = Path(self.given.cache) / self.name / str(unit.seed)
        return folder / f"{unit.method.name}_{unit.bits}_{unit.layout}_{start}.json"

    def missing(self, unit: Unit) -> tuple[str, ...]:
        """Starts that are not measured yet."""
        return tuple(start for start in unit.starts if not self.file(unit, start).exists())

    def data_of(self, seed: int) -> MultipleChoiceData:
        """The task; read once for all models."""
        if seed not in self.data:
            given = self.given
            files: dict[str, Any]
            if given.model is None:
                made = write_dataset(Path(given.cache) / "embedded-data" / str(seed), seed)
                files = {**{split: str(path) for split, path in made.items()}, "max_validation_items": given.items}
            else:
                if given.data is None:
                    raise SystemExit("--model needs --data, a folder with trec/train.jsonl and trec/test.jsonl")
                folder = given.data / "trec"
                files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
                files["validation_items"] = given.items
            self.data[seed] = MultipleChoiceData(
                **files, batch_size=given.batch, eval_batch_size=8 * given.batch, max_test_items=given.test_items,
                seed=seed, score="log_likelihood",
            )  # fmt: skip
        return self.data[seed]

    def module(self, unit: Unit) -> FineTuneModule:
        """A module for the units of a table."""
        given, own = self.given, unit.bits not in (2, 3)
        table_of: dict[int, Any] = dict.fromkeys(unit.method.bits if own else (2, 3), unit.method.specified)
        return FineTuneModule(
            self.model, quantizers={int(b): q for b, q in table_of.items()}, learning_rate=given.rates[0],
            warmup_steps=min(4, given.steps), schedule="linear", schedule_steps=max(1, given.steps), seed=unit.seed,
            compute_dtype=given.dtype, bank_dir=str(given.banks or Path(given.cache) / "banks"),
            calibration_sequences=given.sequences,
        )  # fmt: skip

    def opened(self, unit: Unit, folder: Path) -> FineTuneEvaluator:
        """An evaluator for the units of a table."""
        evaluator, given = FineTuneEvaluator(), self.given
        accelerator = {"cuda": "gpu"}.get(given.device, given.device)
        trainer = partial(Trainer, gradient_clip_val=1.0, accelerator=accelerator, devices=1)
        ladder, data = FidelityLadder((max(1, given.steps),)), self.data_of(unit.seed)
        evaluator.open(
            EvaluationContext(folder, ladder, unit.seed, self.module(unit), data, trainer, (), lambda text: None)
        )
        data.setup("test")
        _ = evaluator.parts.module.shared_length  # at 16 bits, which go with the full-precision weights
        return evaluator

    def prepare(self, evaluator: FineTuneEvaluator, unit: Unit) -> None:
        """Pack what a unit needs and is not packed yet, and make first values of its adapters."""
        names = tuple(shape.name for shape in evaluator.shapes)
        bits = {unit.bits, 4} if unit.layout == "one" else {unit.bits}
        starts = SharedLadder("init", unit.starts)
        evaluator.parts.preparation.build(SearchSpace(tuple(sorted(bits)), (self.given.rank,), names, (starts,)))


def measure(bench: Bench, wanted: Sequence[Unit]) -> None:
    """Measure what is missing, model by model."""
    given, began = bench.given, time.monotonic()

    def late() -> bool:
        return given.minutes is not None and time.monotonic() - began > 60 * given.minutes

    wanted = [unit for unit in wanted if bench.missing(unit)]
    for _, group in groupby(wanted, key=lambda unit: unit.table):
        own = list(group)
        if late():
            return
        loaded = time.monotonic()
        evaluator = bench.opened(own[0], Path(given.cache) / "runs")
        print(f"{own[0].method.name}: opened in {time.monotonic() - loaded:.1f} s", flush=True)
        for unit in own:
            if late():
                return
            _measure(bench, evaluator, unit)
        del evaluator
        if given.device == "cuda":
            torch.cuda.empty_cache()


def _measure(bench: Bench, evaluator: FineTuneEvaluator, unit: Unit) -> None:
    given, starts, began = bench.given, bench.missing(unit), time.monotonic()
    bench.prepare(evaluator, unit)
    prepared = time.monotonic() - began
    backbone = evaluator.parts.module.backbone
    base = unit.configuration(len(backbone.layers), given.rank)
    before = [base.with_shared({"init": start}) for start in starts]
    untrained = _figures(bench, evaluator, before, steps=0)
    rates = given.rates if given.steps else ()
    members = [(start, rate) for start in starts for rate in rates]
    after = [base.with_shared({"init": start, "learning_rate": rate}) for start, rate in members]
    trained = dict(zip(members, _figures(bench, evaluator, after, steps=given.steps) if after else (), strict=True))
    about = {
        "model": bench.name, "seed": unit.seed, "quantizer": unit.method.quantizer, "options": unit.method.options,
        "method": unit.method.name, "bits": unit.bits, "layout": unit.layout, "rank": given.rank, "steps": given.steps,
        "device": given.device, **_sizes(backbone, base, unit),
    }  # fmt: skip
    for start, first in zip(starts, untrained, strict=True):
        of_start = {f"{rate:g}": trained[start, rate] for rate in rates}
        path = bench.file(unit, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(
            json.dumps({**about, "start": start, "before": first, "after": of_start}), encoding="utf-8"
        )
        temporary.replace(path)
    best = {start: _best(trained, start) if trained else first for start, first in zip(starts, untrained, strict=True)}
    shown = " ".join(f"{start} {row['text']:.3f} {row['test']['log_likelihood']:.3f}" for start, row in best.items())
    spent = time.monotonic() - began
    where = f"{unit.method.name} {unit.bits} bits, {unit.layout}, seed {unit.seed}"
    print(f"{where}: {shown}, {spent:.1f} s, of these {prepared:.1f} to pack", flush=True)


def _best(trained: Mapping[tuple[str, float], Row], start: str) -> Row:
    return max((row for (own, _), row in trained.items() if own == start), key=_validated)


def _validated(row: Row) -> float:
    value = float(row["validation"]["log_likelihood"])
    return value if math.isfinite(value) else -math.inf


def _sizes(backbone: Any, configuration: Configuration, unit: Unit) -> Row:
    """Bytes of all packed weights, and bits a weight of all of them and of those at the bits in question."""
    total = weights = own = own_weights = 0
    for layer, choice in zip(backbone.layers, configuration.layers, strict=True):
        for _, bank in layer.modules:
            size, count = bank.require(choice.bits).nbytes, bank.out_features * bank.in_features
            total, weights = total + size, weights + count
            if choice.bits == unit.bits:
                own, own_weights = own + size, own_weights + count
    return {"bytes": total, "mean_bits": 8 * total / weights, "bits_per_weight": 8 * own / own_weights}


def _figures(bench: Bench, evaluator: FineTuneEvaluator, members: Sequence[Configuration], *, steps: int) -> list[Row]:
    """Loss on texts and scores of both splits, for configurations side by side after so many steps."""
    parts, count = evaluator.parts, len(members)
    cohort = Cohort.of(parts.module.backbone, members, seed=parts.module.options.seed)
    with cohort.installed(), quiet_lightning():
        together = CohortModule(parts.module, cohort)
        with in_place(together):
            if steps:
                trainer = parts.trainers.training(steps)
                parts.data.start_batch = 0
                together.train()
                trainer.fit(together, datamodule=parts.data)
            together.eval()
            with torch.no_grad(), cohort.stored_precision():
                texts = _text_losses(bench, parts, count)
                scores = {split: _scores(parts, split, count) for split in ("validation", "test")}
    return [{"text": texts[k], **{split: values[k] for split, values in scores.items()}} for k in range(count)]


def _scores(parts: Any, split: Split, count: int) -> list[Row]:
    scorers = [parts.data.scorer(split) for _ in range(count)]
    for batch in parts.data.scoring_batches(split, shared_length=parts.module.shared_length):
        whole = _moved(replicate(batch, count), parts.device)
        values, tokens = target_log_likelihood(labelled_logits(parts.module.backbone.model, whole), whole)
        shared = zip(scorers, values.view(count, -1).cpu(), tokens.view(count, -1).cpu(), strict=True)
        for scorer, likelihood, labelled in shared:
            scorer.update(batch, likelihood, labelled)
    found = [scorer.compute() for scorer in scorers]
    return [{name: float(own[name]) for name in FIGURES} for own in found]


def _text_losses(bench: Bench, parts: Any, count: int) -> list[float]:
    """Nats a token of held-out texts, for each member."""
    totals, tokens = torch.zeros(count, dtype=torch.float64), 0
    rows = sorted(_documents(parts) if bench.given.model is None else _answered(parts.data), key=len)
    for batch in _batched(rows, parts.data.pad_id):
        losses = training_losses(parts.module.backbone.model, _moved(batch, parts.device), count)
        seen = labelled_tokens(batch["labels"])
        totals, tokens = totals + seen * losses.double().cpu(), tokens + seen
    return [float(value) for value in totals / tokens]


def _documents(parts: Any, count: int = 128) -> list[Tensor]:
    """Tokens of documents of the embedded model's world, which it was not trained on."""
    texts = islice(documents(make_world(), HELD_OUT_SEED), count)
    return [torch.tensor(parts.module.tokenizer(text)["input_ids"][: parts.data.max_length]) for text in texts]


def _answered(data: MultipleChoiceData) -> list[Tensor]:
    """Tokens of test items with their right answers."""
    labels = [data.choices(item).label for item in data.items("test")]
    place: dict[int, int] = {}
    chosen = []
    for row in data.scoring_rows("test"):
        index = place[row.item] = place.get(row.item, -1) + 1
        if index == labels[row.item]:
            chosen.append(torch.from_numpy(row.tokens).long())
    return chosen


def _batched(rows: Sequence[Tensor], pad_id: int, at_once: int = 16) -> Iterator[dict[str, Tensor]]:
    """Batches of rows, every token labelled."""
    for first in range(0, len(rows), at_once):
        own = list(rows[first : first + at_once])
        ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=pad_id)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(one) for one in own])[:, None]).long()
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


# Errors of weights alone


def weight_errors(bench: Bench, methods: Sequence[Method], bits: Sequence[int]) -> list[Row]:
    """Exact bits a weight and relative errors of each method at each bit-width, over the projections of some blocks."""
    given = bench.given
    backbone = FineTuneModule(
        bench.model, quantizers={2: "affine_gptq"}, granularity="linear", compute_dtype=given.dtype, bank_dir=None
    ).backbone  # a calibrated one, so that there is something to calibrate
    data = bench.data_of(0)
    data.attach(backbone.tokenizer, context_length=None)
    data.setup("fit")
    blocks = {name.rpartition(".layers.")[2].partition(".")[0]: None for name in backbone.banks}
    chosen = set(list(blocks)[:: given.every])
    names = [n for n in backbone.banks if n.rpartition(".layers.")[2].partition(".")[0] in chosen]
    size = min(given.sequences, 32)
    moments = gather(
        backbone.model,
        {n: backbone.banks[n] for n in names},
        data.calibration_batches(-(-given.sequences // size), size),
    )
    rows: list[Row] = []

    def add(method: str, width: int, packed_as: Callable[[str, Tensor], tuple[int, Tensor]]) -> None:
        """A row; bytes and dense weight of each projection come of its name and its weight."""
        found = []
        for name in names:
            weight = backbone.banks[name].dequantized(16).float()
            stored, dense = packed_as(name, weight)
            residual, second = weight - dense, moments[name].second
            output = ((residual @ second) * residual).sum() / ((weight @ second) * weight).sum()
            plain = residual.square().sum() / weight.square().sum()
            found.append((8 * stored, weight.numel(), float(plain), float(output)))
        columns = zip(*found, strict=True)
        sizes, counts, plains, outputs = (torch.tensor(column, dtype=torch.float64) for column in columns)
        rows.append(
            {
                "model": bench.name, "bits": width, "method": method, "projections": len(names),
                "bits_per_weight": float(sizes.sum() / counts.sum()), "weight_error": float(plains.mean()),
                "output_error": float(outputs.mean()),
            }
        )  # fmt: skip
        print(" ".join(str(round(v, 5) if isinstance(v, float) else v) for v in rows[-1].values()), flush=True)

    for method in (m for m in methods if m.takes(backbone.shapes)):
        quantizer = quantizers.create(method.quantizer, **method.options)
        for width in (b for b in method.bits if b in bits or b > 4):

            def packed_as(
                name: str, weight: Tensor, width: int = width, quantizer: Quantizer = quantizer
            ) -> tuple[int, Tensor]:
                shape = (weight.shape[0], weight.shape[1])
                packed = quantizer.quantize_calibrated(weight, width, moments[name])
                dense = quantizer.dequantize(packed, shape, width, torch.float32)
                return quantizer.packed_bytes(shape, width).total, dense

            add(method.name, width, packed_as)
            if method.quantizer == "affine" and not method.options.get("symmetric") and width in bits:
                size = method.options["group_size"]
                add(f"half-quadratic, whole zeros-{size}", width, partial(_half_quadratic, quantizer, width, size))
    return rows


def _half_quadratic(
    grids: Quantizer, bits: int, size: int, name: str, weight: Tensor, iterations: int = 20
) -> tuple[int, Tensor]:
    """The grid of `affine` by HQQ's solver in its place: zero points rounded, then scales by least squares.

    Half-quadratic splitting with an l_0.7 loss and beta = 10, as the hqq library has it (Badri and Shaji 2023).
    """
    groups, largest = weight.reshape(-1, size), 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / largest).clamp(min=1e-8)
    zero = -low / scale
    for _ in range(iterations):
        codes = (groups / scale + zero).round().clamp(0, largest)
        residual = groups - (codes - zero) * scale
        sparse = residual.sign() * (residual.abs() - residual.abs().pow(-0.3) / 10).clamp(min=0)
        zero = (codes - (groups - sparse) / scale).mean(1, keepdim=True)
    zero = zero.round().clamp(0, largest)
    for _ in range(3):
        codes = (groups / scale + zero).round().clamp(0, largest) - zero
        fitted = (codes * groups).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
        scale = torch.where(fitted > 0, fitted, scale)
    scale = scale.half().float()
    codes = (groups / scale + zero).round().clamp(0, largest) - zero
    shape = (weight.shape[0], weight.shape[1])
    return grids.packed_bytes(shape, bits).total, (codes * scale).reshape(shape)


def told_errors(rows: Sequence[Row]) -> str:
    """Markdown, in the order of bits a weight within nominal bits."""
    lines = [
        [
            f"{row['bits_per_weight']:.2f}", str(row["bits"]), row["method"], f"{row['weight_error']:.2e}",
            f"{row['output_error']:.2e}",
        ]
        for row in sorted(rows, key=lambda row: (row["bits"], row["bits_per_weight"], row["method"]))
    ]  # fmt: skip
    return table(["bits a weight", "bits", "method", "error of weights", "of outputs"], lines)


# Telling

COLUMNS = (
    "model", "seed", "layout", "bits", "quantizer", "options", "start", "rank", "steps", "bytes", "mean_bits",
    "bits_per_weight", "text_before", "log_likelihood_before", "acc_before", "rate", "validation", "text_after",
    "log_likelihood_after", "log_likelihood_fitted_after", "acc_after", "device",
)  # fmt: skip


def rows_of(cache: Path) -> list[Row]:
    """A row for each item that was measured, in the order of bytes within layout and nominal bits."""
    found = [json.loads(path.read_text()) for path in sorted(cache.glob("*/*/*.json"))]
    rows = []
    for item in found:
        untrained = ("nan", item["before"])
        rate, after = max(item["after"].items(), key=lambda pair: _validated(pair[1]), default=untrained)
        first = item["before"]
        options = " ".join(f"{name}={value}" for name, value in item["options"].items())
        rows.append(
            {
                **{name: item[name] for name in COLUMNS if name in item},
                "options": options, "rate": float(rate), "validation": after["validation"]["log_likelihood"],
                "text_before": first["text"], "text_after": after["text"],
                "log_likelihood_before": first["test"]["log_likelihood"], "acc_before": first["test"]["acc"],
                **{f"{name}_after": after["test"][name] for name in FIGURES},
            }
        )  # fmt: skip
    order = ("model", "layout", "steps", "bits_per_weight", "quantizer", "options", "seed", "start")
    return sorted(rows, key=lambda row: tuple(row[name] for name in order))


def told(rows: Sequence[Row]) -> str:
    """Markdown: by model, layout and steps, every quantiser and start in the order of bits a weight, means over seeds.

    A star marks the best trained score among all that take no more bits.
    """
    tables = []
    for (model, layout, steps), own in groupby(rows, key=lambda row: (row["model"], row["layout"], row["steps"])):
        lines, best = [], -math.inf
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in own:
            key = tuple(row[name] for name in ("bits_per_weight", "bits", "quantizer", "options", "start"))
            groups.setdefault(key, []).append(row)
        for (size, bits, quantizer, options, start), same in sorted(groups.items(), key=lambda pair: pair[0][0]):

            def mean(name: str, same: list[Row] = same) -> float:
                return sum(row[name] for row in same) / len(same)

            score = mean("log_likelihood_after")
            star, best = ("*" if score > best else ""), max(best, score if math.isfinite(score) else best)
            names = ("text_before", "log_likelihood_before", "acc_before")
            trained = [f"{mean('text_after'):.3f}", f"{score:.3f}{star}", f"{mean('acc_after'):.3f}"] if steps else []
            lines.append(
                [
                    f"{size:.2f}", str(bits), quantizer, options, start, str(len(same)),
                    *(f"{mean(name):.3f}" for name in names), *trained,
                ]
            )  # fmt: skip
        heads = ["bits a weight", "bits", "quantiser", "options", "start", "seeds", "text", "score", "acc"]
        heads += ["text, trained", "score, trained", "acc, trained"] if steps else []
        tables.append(f"{model}, {layout}, {steps} steps\n\n" + table(heads, lines))
    return "\n\n".join(tables)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every item."""
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    _write(rounded, COLUMNS, path)


def _write(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """One of the two."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("measure", "table", "weights"))
    options.add_argument("--cache", type=Path, required=True, help="directory for what is measured")
    options.add_argument("--banks", type=Path, help="directory for packed weights; by default within the cache")
    options.add_argument("--model", type=Path, help="directory of a model; by default the embedded one")
    options.add_argument("--data", type=Path, help="directory with trec/train.jsonl and trec/test.jsonl")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--dtype", default="auto", help="compute type; auto is float32 on a CPU, bfloat16 on CUDA")
    options.add_argument("--part", default="1/1", help="I/N: the I-th of N shares")
    options.add_argument("--minutes", type=float, help="begin nothing new after so many")
    options.add_argument("--methods", nargs="+", help="as in hqq-64; all by default")
    options.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    options.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    options.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--batch", type=int, default=8, help="sequences of a training step")
    options.add_argument("--items", type=int, default=200, help="validation items, at most")
    options.add_argument("--test-items", type=int, default=500, help="test items, at most")
    options.add_argument("--sequences", type=int, default=128, help="that quantisers and starts are calibrated on")
    options.add_argument("--every", type=int, default=5, help="`weights`: every so-manieth block")
    options.add_argument("--list", action="store_true", help="print what `measure` would do")
    options.add_argument("--csv", type=Path, help="file for every item of `table`")
    given = options.parse_args()
    quiet()
    if given.what == "table":
        rows = rows_of(given.cache)
        if given.csv is not None:
            write_csv(rows, given.csv)
        print(told(rows))
        return
    torch.set_num_threads(1)
    bench = Bench(given)
    if given.what == "weights":
        named = [m for m in METHODS if not given.methods or m.name in given.methods]
        errors = weight_errors(bench, named, given.bits)
        if given.csv is not None:
            _write(errors, tuple(errors[0]), given.csv)
        print(told_errors(errors))
        return
    shapes = FineTuneModule(bench.model).load_backbone(weights=False).shapes
    wanted = part(units(given, shapes), given.part)
    if given.list:
        print(
            *(f"{u.method.name} {u.bits} {u.layout} {u.seed}: {len(bench.missing(u))} missing" for u in wanted),
            sep="\n",
        )
        return
    measure(bench, wanted)


if __name__ == "__main__":
    main()
