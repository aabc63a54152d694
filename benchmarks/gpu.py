"""On a GPU: an 8B-shaped random Llama, 16-bit LoRA against PEFT + bitsandbytes QLoRA against ours.

    python benchmarks/gpu.py [--layers 32] [--batch 4] [--length 1024] [--json FILE]

Tokens a second, peak memory, and the share of the matmul ceiling that is measured first, with and without gradient
checkpointing and `torch.compile`; peak memory as the memory model foretells it; seconds to build the bank, to reopen it
from disk and to switch; K candidates side by side, where the library has that. The model is made of its configuration
alone, on the device, in bfloat16: nothing is downloaded. What does not fit is said so, and the rest goes on.

`--device cpu --toy` runs every line on a small model without a GPU: a check of this script, no measurement.
"""

from __future__ import annotations

from common import finish, in_groups, paired_ratios, parser, prepared, random_llama, scratch, spread, table

# isort: split
import argparse
import contextlib
import gc
import inspect
import itertools
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rivals
import torch
from torch.nn.functional import cross_entropy

from qratk.backbone.backbone import Backbone
from qratk.core import Candidate, Configuration, Request
from qratk.core.evaluation import FidelityLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.peaks.foretold import memory_model
from qratk.training.building import built_quantizers
from qratk.training.module import FineTuneModule

BITS = (2, 3, 4, 8)
RANK = 16
SHAPE_8B = {
    "width": 4096, "vocabulary": 128256, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TOY = {"width": 64, "vocabulary": 1024, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass
class Bench:
    """The device, the shape of the model and of the batches."""

    device: torch.device
    dtype: torch.dtype
    layers: int
    shape: dict[str, Any]
    batch: int
    length: int
    steps: int
    repeats: int
    compiles: bool
    ceiling: float = 0.0  # FLOP/s
    rows: list[list[str]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Forget what was held, and the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Peak bytes since `clean`; without a GPU those of the whole process so far."""
        if self.cuda:
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def seconds(self, run: Callable[[], Any]) -> float:
        """Wall seconds of a call, the device awaited."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def model(self) -> Any:
        """The random model, made on the device in the compute dtype."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = random_llama(layers=self.layers, **self.shape)
        finally:
            torch.set_default_dtype(before)
        return model.requires_grad_(False)

    def tokens(self) -> torch.Tensor:
        """A batch, (B, T)."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, self.shape["vocabulary"], (self.batch, self.length), generator=generator)
        return drawn.to(self.device)


def matmul_ceiling(bench: Bench) -> float:
    """FLOP/s of the best large matrix product in the compute dtype."""
    best = 0.0
    for size in (4096, 8192, 16384) if bench.cuda else (256, 512):
        a = torch.randn(size, size, device=bench.device, dtype=bench.dtype)
        torch.matmul(a, a)
        for _ in range(3):
            spent = bench.seconds(lambda a=a: [torch.matmul(a, a) for _ in range(5)])  # type: ignore[misc]
            best = max(best, 5 * 2 * size**3 / spent)
    return best


def step_flops(bench: Bench, model_parameters: int, checkpointing: bool) -> float:
    """Operations of a step that must be done: forward and gradient of inputs, 2 each a frozen weight and token.

    Attention adds 2 products of (T, T) scores, forward once and backward twice; half of it is masked. Adapters are left
    out (under 1 %). Checkpointing repeats the forward, which is counted: the share is of the work that was done.
    """
    tokens = bench.batch * bench.length
    passes = 3 if checkpointing else 2
    attention = bench.layers * 2 * 2 * bench.length * float(bench.shape["width"]) / 2 * tokens
    return passes * 2 * model_parameters * tokens + (passes + 1) * attention


class Trainee:
    """A model with adapters, its optimiser, and a step."""

    def __init__(self, model: Any, *, checkpointing: bool, compiled: bool) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        base.config.use_cache = False
        self.model = model.train()
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(self, tokens: torch.Tensor) -> None:
        """Forward, backward, AdamW."""
        logits = self.run(input_ids=tokens).logits[:, :-1]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


@contextlib.contextmanager
def survived(bench: Bench, label: str) -> Iterator[None]:
    """Goes on after what a device or a compiler may refuse, and says so."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ImportError) as error:  # OutOfMemoryError is a RuntimeError
        reason = "out of memory" if "memory" in str(error).lower() else f"{type(error).__name__}: {error}"
        bench.rows.append([label, reason.splitlines()[0][:80], "", "", "", ""])
        bench.results[label] = {"failed": reason[:500]}
        print(f"{label}: {bench.rows[-1][1]}", flush=True)
    finally:
        torch._dynamo.reset()


def measure(bench: Bench, label: str, trainee: Trainee, parameters: int, *, checkpointing: bool, foretold: int) -> None:
    """Time steps, note the peak, add a row."""
    tokens = bench.tokens()
    for _ in range(2):
        trainee.step(tokens)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        for _ in range(bench.steps):
            trainee.step(tokens)

    times = [bench.seconds(run) / bench.steps for _ in range(bench.repeats)]
    peak, count = bench.peak(), bench.batch * bench.length
    shares = [step_flops(bench, parameters, checkpointing) / spent / bench.ceiling for spent in times]
    speeds = [count / spent for spent in times]
    bench.results[label] = {"seconds": times, "tokens_a_second": speeds, "peak": peak, "foretold": foretold}
    bench.results[label]["share_of_ceiling"] = shares
    told = f"{foretold / 2**30:.2f}" if foretold else ""
    off = f"{peak / foretold:.2f}" if foretold and bench.cuda else ""  # without a GPU the peak is the whole process's
    bench.rows.append(
        [label, spread(speeds, digits=0), spread(shares, scale=100, digits=0), f"{peak / 2**30:.2f}", told, off]
    )
    print(" | ".join(bench.rows[-1]), flush=True)


def modes(bench: Bench) -> Iterator[tuple[str, bool, bool]]:
    """Suffix of the label, checkpointing, compiled."""
    for checkpointing, compiled in itertools.product((False, True), (False, True)[: 1 + bench.compiles]):
        yield f"{', checkpointing' * checkpointing}{', compiled' * compiled}", checkpointing, compiled


def theirs(bench: Bench, parameters: int) -> None:
    """16-bit LoRA and QLoRA by PEFT and bitsandbytes."""
    for name, bits in (("16-bit LoRA, PEFT", 16), ("QLoRA nf4, PEFT + bitsandbytes", 4)):
        with survived(bench, name):
            bench.clean()
            model = bench.model()
            names = rivals.projections(model)
            rivals.quantise(model, [bits] * bench.layers, dtype=bench.dtype, device=str(bench.device))
            model = rivals.lora(model, names, [RANK] * bench.layers)
            for suffix, checkpointing, compiled in modes(bench):
                with survived(bench, name + suffix):
                    bench.clean()
                    trainee = Trainee(model, checkpointing=checkpointing, compiled=compiled)
                    measure(bench, name + suffix, trainee, parameters, checkpointing=checkpointing, foretold=0)
        model = trainee = None  # type: ignore[assignment]


def configurations(layers: int) -> dict[str, Configuration]:
    """Uniform 4 bit, and a mix."""
    mix = [BITS[i % len(BITS)] for i in range(layers)]
    return {
        "ours, 4 bit": Configuration.uniform(4, RANK, layers),
        "ours, mix of 2, 3, 4, 8": Configuration.of(mix, [RANK] * layers),
    }


def made(bench: Bench, folder: Path) -> Backbone:
    """A backbone whose bank is in the folder, or comes to be there."""
    options: dict[str, Any] = {"quantizers": built_quantizers(None), "compute_dtype": bench.dtype}
    backbone = Backbone.from_model(bench.model(), bank_dir=folder, **options)
    backbone.model.to(bench.device)
    backbone.say = lambda text: None
    backbone.build_bank(BITS)
    backbone.release_reference()
    return backbone


def ours(bench: Bench, folder: Path, parameters: int) -> None:
    """The bank, then training packed and dense."""
    with survived(bench, "ours: the bank"):
        bench.clean()
        held: list[Backbone] = []
        build = bench.seconds(lambda: held.append(made(bench, folder)))
        held.clear()
        bench.clean()
        reopen = bench.seconds(lambda: held.append(made(bench, folder)))
        backbone = held.pop()
        turns = itertools.cycle(configurations(bench.layers).values())
        switches = [bench.seconds(lambda: backbone.activate(next(turns), seed=0)) for _ in range(1 + bench.repeats)][1:]
        print(f"bank of {list(BITS)} bits: build {build:.1f} s, reopen from disk {reopen:.1f} s (both with the model); "
              f"switch {spread(switches, scale=1e3, digits=0)} ms", flush=True)  # fmt: skip
        bench.results["bank"] = {"build_seconds": build, "reopen_seconds": reopen, "switch_seconds": switches}
        for name, configuration in configurations(bench.layers).items():
            for dense in ("off", "on"):
                for suffix, checkpointing, compiled in modes(bench):
                    label = f"{name}, {'dense' if dense == 'on' else 'packed'}{suffix}"
                    with survived(bench, label):
                        one_of_ours(bench, backbone, configuration, label, parameters, dense, checkpointing, compiled)
        print(f"bytes of the bank: {bank_bytes(backbone) / 2**30:.2f} GiB")


def one_of_ours(
    bench: Bench, backbone: Backbone, configuration: Configuration, label: str, parameters: int, dense: str,
    checkpointing: bool, compiled: bool,
) -> None:  # fmt: skip
    """Measure a configuration; the other bit-widths of the bank are counted into what is foretold."""
    bench.clean()
    backbone.dense_cache(dense)
    backbone.activate(configuration, seed=0)
    space = SearchSpace(BITS, (RANK,), tuple(shape.name for shape in backbone.shapes))
    memory = memory_model(
        backbone, space, batch_size=bench.batch, sequence_length=bench.length, gradient_checkpointing=checkpointing
    )
    footprint = memory.footprint(configuration)
    idle = bank_bytes(backbone, other_than=configuration)
    cache = sum(rows * columns for rows, columns in (b.shape for b in backbone.banks.values())) * bench.dtype.itemsize
    foretold = footprint.training_bytes + idle + (cache if dense == "on" else 0)
    trainee = Trainee(backbone.model, checkpointing=checkpointing, compiled=compiled)
    measure(bench, label, trainee, parameters, checkpointing=checkpointing, foretold=foretold)


def bank_bytes(backbone: Backbone, other_than: Configuration | None = None) -> int:
    """Bytes of packed weights on the device, or of those that a configuration does not use."""
    used = {}
    for layer, choice in zip(backbone.layers, (other_than.layers if other_than else ()), strict=bool(other_than)):
        used.update({name: choice.bits for name, _ in layer.modules})
    return sum(
        variant.nbytes
        for name, bank in backbone.banks.items()
        for bits, variant in bank.variants.items()
        if bits != used.get(name)
    )


# Side by side


class RandomModule(FineTuneModule):
    """A FineTuneModule on the random model, with the embedded tokenizer."""

    bench: Bench
    folder: Path

    def load_backbone(self, *, weights: bool = True) -> Backbone:
        """The random model with its bank."""
        from transformers import AutoTokenizer

        from qratk.embedded import model_directory

        backbone = made(self.bench, self.folder)
        backbone.tokenizer = AutoTokenizer.from_pretrained(str(model_directory()))
        return backbone


def written(folder: Path, length: int) -> dict[str, Any]:
    """Files of random words, long enough for full batches."""
    import json

    draw, words = (
        random.Random(0),
        ["the", "town", "has", "many", "people", "who", "live", "in", "homes", "with", "animals", "and", "food"],
    )
    files: dict[str, Any] = {}
    for split, rows in (("train", 64), ("validation", 4)):
        path = folder / f"{split}.jsonl"
        texts = [" ".join(draw.choices(words, k=2 * length)) for _ in range(rows)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files[split] = str(path)
    return files


def side_by_side(bench: Bench, folder: Path) -> None:
    """K candidates at once against one after another, through the evaluator."""
    if "cohort" not in inspect.signature(FineTuneEvaluator).parameters:
        print("side by side: this version of the library trains one candidate after another")
        return
    from qratk.data.text import TextData

    module = RandomModule("random", learning_rate=1e-5, dense_cache="off")
    module.bench, module.folder = bench, folder / "bank"
    draw = random.Random(0)
    candidates = [
        Configuration.of(draw.choices(BITS, k=bench.layers), [RANK] * bench.layers) for _ in range(8)
    ]  # fmt: skip
    ladder = FidelityLadder((bench.steps,))
    rows = []
    for width in (1, 2, 4, 8):
        with survived(bench, f"side by side, K = {width}"):
            bench.clean()
            data = TextData(**written(folder, bench.length), batch_size=bench.batch, max_length=bench.length)
            evaluator = FineTuneEvaluator(cohort=width)
            run_dir = folder / f"cohort-{width}"
            evaluator.open(EvaluationContext(run_dir, ladder, 0, module, data, None, (), lambda text: None))
            evaluator.memory_model(SearchSpace(BITS, (RANK,), tuple(shape.name for shape in evaluator.shapes)))
            requests = [Request(Candidate(configuration, "benchmark"), bench.steps) for configuration in candidates]
            found: list[Any] = []
            spent = bench.seconds(lambda: found.extend(in_groups(evaluator, requests))) / len(candidates)  # noqa: B023
            failed = [evaluation.reason for evaluation in found if not evaluation.ok]
            bench.results[f"side by side {width}"] = {"seconds": spent, "peak": bench.peak(), "failed": failed}
            rows.append([str(width), f"{spent:.2f}", f"{bench.peak() / 2**30:.2f}", str(len(failed))])
    print("\n" + table(["side by side", "s a candidate", "peak, GiB", "failed"], rows))


def settings(given: argparse.Namespace) -> Bench:
    """The bench of the command line."""
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if given.toy:
        return Bench(device, dtype, 2, TOY, 2, 32, 1, min(2, given.repeats), given.compile)
    sizes = (given.batch, given.length, given.steps, given.repeats)
    return Bench(device, dtype, given.layers, SHAPE_8B, *sizes, given.compile)


def main() -> None:
    """Everything, or one line when there is no GPU."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--layers", type=int, default=32, help="32 is the 8B shape; fewer for smaller GPUs")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--steps", type=int, default=5, help="steps of each measurement")
    options.add_argument("--device", default="cuda")
    options.add_argument("--no-compile", dest="compile", action="store_false", help="leave `torch.compile` out")
    options.add_argument("--toy", action="store_true", help="a small model: checks the script, measures nothing")
    given = prepared(options)
    given.clock = "wall"
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device here, nothing was measured (--device cpu --toy checks the script)")
        return
    bench = settings(given)
    bench.ceiling = matmul_ceiling(bench)
    model = bench.model()
    embedding = model.get_input_embeddings().weight.numel()
    parameters = sum(p.numel() for p in model.parameters()) - embedding  # a look-up is no product
    print(f"{bench.layers} layers, {(parameters + embedding) / 1e9:.2f}B parameters, "
          f"{bench.batch} x {bench.length} tokens; "
          f"matmul ceiling {bench.ceiling / 1e12:.1f} TFLOP/s", flush=True)  # fmt: skip
    del model
    with scratch() as folder:
        theirs(bench, parameters)
        ours(bench, folder / "bank", parameters)
        heads = ["", "tokens/s", "% of ceiling", "peak, GiB", "foretold, GiB", "peak / foretold"]
        print("\n" + table(heads, bench.rows))
        side_by_side(bench, folder)
    compared(bench)
    finish(given, "gpu", {"ceiling": bench.ceiling, "layers": bench.layers, **bench.results})


def compared(bench: Bench) -> None:
    """Print ours against theirs in the same mode."""
    for suffix, *_ in modes(bench):
        rival = bench.results.get(f"QLoRA nf4, PEFT + bitsandbytes{suffix}", {}).get("seconds")
        for form in ("packed", "dense"):
            mine = bench.results.get(f"ours, 4 bit, {form}{suffix}", {}).get("seconds")
            if rival and mine:
                ratio = spread(paired_ratios(mine, rival))
                print(f"ours 4 bit {form} / PEFT + bitsandbytes{suffix}, time a step: {ratio}")


if __name__ == "__main__":
    main()
