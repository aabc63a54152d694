"""The bank and the scoring: build, reopen, switch, restore, score; and how they grow with the number of layers.

    python benchmarks/bank.py [--data DIR] [--layers 4 8 16 32 64 128]

Build: all projections at 2, 3, 4 and 8 bits, in memory, to disk, and again from disk; wrapping the model is counted.
Switch: every layer to another bit-width with fresh adapters; restore: a switch, then stored adapters put in place.
Score: the validation items of a multiple-choice task, against lm-eval's in-process run on the same model and items.
 Growth is measured on random Llamas of width 128.
"""

from __future__ import annotations

from common import (
    exponent,
    finish,
    interleaved,
    paired_ratios,
    parser,
    prepared,
    random_llama,
    scratch,
    silent,
    spread,
    subject,
    table,
)

# isort: split
import argparse
import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import Stepper

from qratk.backbone.backbone import Backbone
from qratk.core import Configuration
from qratk.training.building import built_quantizers

BITS = (2, 3, 4, 8)


def configurations(layers: int) -> tuple[Configuration, Configuration]:
    """Two configurations that differ in every layer."""
    first = [BITS[i % 4] for i in range(layers)]
    return Configuration.of(first, [8] * layers), Configuration.of(first[1:] + first[:1], [8] * layers)


def switching(backbone: Backbone) -> tuple[Callable[[], None], Callable[[], None]]:
    """A switch with fresh adapters, and one to stored adapters."""
    both = configurations(len(backbone.layers))
    stored = []
    for configuration in both:
        backbone.activate(configuration, seed=0)
        stored.append(backbone.adapter_state())
    turns = itertools.cycle(zip(both, stored, strict=True))

    def fresh() -> None:
        backbone.activate(next(turns)[0], seed=0)

    def restored() -> None:
        configuration, state = next(turns)
        backbone.activate(configuration, seed=0)
        backbone.load_adapter_state(state)

    return fresh, restored


def scored(module: Any, data: Any, *, shared: bool) -> dict[str, float]:
    """Figures on the validation items, without a Trainer; choices share their prompt or not."""
    scorer = data.scorer("validation")
    module.eval()
    with torch.inference_mode(), module.backbone.stored_precision():
        for batch in data.scoring_batches("validation", shared_length=module.shared_length if shared else 0):
            scorer.update(batch, *module.log_likelihood(batch))
    return {name: float(value) for name, value in scorer.compute().items()}


def scoring(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scoring against lm-eval on the same model and items."""
    from lightning import Trainer

    from qratk.data.lm_eval import evaluate_lm_eval, write_task
    from qratk.training.trainers import quiet_lightning

    chosen = subject(given, folder)
    module, data = chosen.make_module(configuration="4:8"), chosen.make_data()
    module.setup("validate")
    for name, parameter in module.backbone.trainable_parameters():  # adapters that do something
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    data.attach(module.tokenizer, context_length=module.context_length)
    data.setup("validate")
    write_task(folder / "task", "validation_items", data, split="validation")
    figures: dict[str, dict[str, float]] = {}

    def ours() -> None:
        figures["ours"] = scored(module, data, shared=True)

    def separately() -> None:
        figures["ours, prompts not shared"] = scored(module, data, shared=False)

    def by_trainer() -> None:
        with quiet_lightning():
            trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
            found = trainer.validate(module, datamodule=data, verbose=False)[0]
        figures["ours, by the Trainer"] = {name.removeprefix("validation/"): value for name, value in found.items()}

    def harness() -> None:
        with silent(), module.backbone.stored_precision():
            figures["lm-eval"] = evaluate_lm_eval(
                module.backbone.model, module.tokenizer, ["validation_items"], task_folders=[folder / "task"],
                batch_size=data.eval_batch_size,
            )["validation_items"]  # fmt: skip

    runs = {
        "ours": ours,
        "ours, prompts not shared": separately,
        "ours, by the Trainer": by_trainer,
        "lm-eval": harness,
    }
    found = interleaved(runs, repeats=given.repeats, clock=given.clock)
    rows = [
        [name, spread(values, scale=1e3, digits=0), *(f"{figures[name][figure]:.4f}" for figure in ("acc", "acc_norm")),
         spread(paired_ratios(found["lm-eval"], values))]
        for name, values in found.items()
    ]  # fmt: skip
    rows_scored = len(data.scoring_rows("validation"))
    print(f"\n### scoring {len(data.items('validation'))} items, {rows_scored} choices; {chosen.name}\n")
    print(table(["", "ms", "acc", "acc_norm", "lm-eval / this"], rows), flush=True)
    same = all(abs(figures["ours"][f] - figures["lm-eval"][f]) < 1e-12 for f in ("acc", "acc_norm"))
    print(f"figures {'equal' if same else 'DIFFER'}")
    return {"seconds": found, "figures": figures, "equal": same}


def one_size(layers: int, width: int, given: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of everything at a number of layers."""
    model = random_llama(layers=layers, width=width)
    tokens = torch.randint(0, 1024, (4, 32), generator=torch.Generator().manual_seed(0))
    held: dict[str, Backbone] = {}

    def build(name: str, options: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            held[name] = Backbone.from_model(copy.deepcopy(model), quantizers=built_quantizers(None), **options)
            held[name].say = lambda text: None
            held[name].build_bank(BITS)
            held[name].release_reference()

        return run

    found: dict[str, list[float]] = {}
    disk: dict[str, Any] = {"bank_dir": str(folder / "bank")}
    runs = {
        "build in memory": build("memory", {"bank_dir": None}),
        "build to disk": build("disk", disk),
        "reopen from disk": build("disk", disk),
    }
    for _ in range(given.repeats):
        shutil.rmtree(folder / "bank", ignore_errors=True)
        for name, values in interleaved(runs, repeats=1, clock=given.clock, warm_up=0).items():
            found.setdefault(name, []).extend(values)
    backbone = held["memory"]
    fresh, restored = switching(backbone)
    fresh()
    stepper = Stepper(backbone.model)

    def score() -> None:
        with torch.inference_mode():
            backbone.model(input_ids=tokens, use_cache=False)

    # The stepper's parameters must stay: it is timed before the switches.
    found |= interleaved(
        {"step": lambda: stepper.step(tokens), "score": score}, repeats=given.repeats, clock=given.clock
    )
    found |= interleaved({"switch": fresh, "restore": restored}, repeats=given.repeats, clock=given.clock)
    return found


def main() -> None:
    """Growth with layers, then scoring."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128])
    options.add_argument("--width", type=int, default=128)
    given = prepared(options)
    sizes: dict[int, dict[str, list[float]]] = {}
    with scratch() as folder:
        results: dict[str, Any] = {"scoring": scoring(given, folder)}
        for layers in given.layers:
            sizes[layers] = one_size(layers, given.width, given, folder)
            print(f"{layers} layers done", flush=True)
    names = list(next(iter(sizes.values())))
    medians = {name: [sorted(found[name])[len(found[name]) // 2] for found in sizes.values()] for name in names}
    rows = [
        [name, *(spread(found[name], scale=1e3, digits=1) for found in sizes.values()),
         f"{exponent(list(sizes), medians[name]):.2f}" if len(sizes) > 1 else ""]
        for name in names
    ]  # fmt: skip
    print(f"\n### growth with layers, width {given.width}, ms\n")
    print(table(["", *(f"{layers} layers" for layers in sizes), "exponent"], rows))
    results["growth"] = {str(layers): found for layers, found in sizes.items()}
    finish(given, "bank", results)


if __name__ == "__main__":
    main()
