"""One training step: ours packed and dense, against plain LoRA and PEFT over bitsandbytes and HQQ.

    python benchmarks/step.py [--data DIR] [--models blocks8 deep12] [--tokens 64 512 1024]
    python benchmarks/step.py --smollm2 DIR/models/smollm2 [--data DIR] [--dtypes float32 bfloat16]

A step is forward, backward and AdamW, rank 8 on every projection of every block, float32. All variants are timed in
turn, repeat after repeat; ratios are taken within a repeat. `blocks8` is a random Llama of 8 layers, width 512;
`deep12` is the 12-layer model of --data, or the embedded one.

With --smollm2, a folder of SmolLM2-135M, that model alone is measured, in each dtype, against its floor: the products
of a step by frozen weights alone (forward, gradients of inputs, output embedding), in the same dtype. Batches are 8
rows of 64 tokens, all labelled, and with --data four of TREC's, of 8 rows as `smollm2_trec.yaml` trains on.
"""

from __future__ import annotations

from common import finish, interleaved, paired_ratios, parser, prepared, random_llama, spread, table, verdict

# isort: split
import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
from torch.nn.functional import cross_entropy, linear

from qratk.backbone.backbone import Backbone
from qratk.backbone.logits import by_length, targets_of, training_losses
from qratk.core import Configuration
from qratk.training.allocation import keep_freed_memory
from qratk.training.building import built_quantizers

Batch = dict[str, torch.Tensor]
RANK = 8
MIX = (2, 3, 4, 8)
RATIOS = {  # name: (over, under, target)
    "ours dense 4 bit / plain LoRA": ("ours dense 4", "plain LoRA", 1.05),
    "ours dense 2 bit / plain LoRA": ("ours dense 2", "plain LoRA", 1.05),
    "ours dense mix / plain LoRA": ("ours dense mix", "plain LoRA", 1.05),
    "ours packed 4 bit / PEFT + bnb 4 bit": ("ours packed 4", "bnb 4", 1.0),
    "ours packed 8 bit / PEFT + bnb 8 bit": ("ours packed 8", "bnb 8", 1.0),
    "ours packed 2 bit / PEFT + HQQ 2 bit": ("ours packed 2", "HQQ 2", 1.0),
    "ours packed 3 bit / PEFT + HQQ 3 bit": ("ours packed 3", "HQQ 3", 1.0),
    "ours packed mix / PEFT mix": ("ours packed mix", "PEFT mix", 1.0),
}


class Stepper:
    """A model and an optimiser over what trains in it."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, tokens: torch.Tensor) -> None:
        """Forward, backward, AdamW."""
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Ours:
    """One backbone for all our variants: a switch before each measurement, outside the clock."""

    def __init__(self, model: Any) -> None:
        self.backbone = Backbone.from_model(copy.deepcopy(model), quantizers=built_quantizers(None), bank_dir=None)
        self.backbone.build_bank(MIX)
        self.backbone.release_reference()

    def at(self, bits: list[int], *, dense: bool, tokens: torch.Tensor) -> Stepper:
        """A stepper at these bits, warm."""
        self.backbone.dense_cache(dense)
        self.backbone.activate(Configuration.of(bits, [RANK] * len(bits)), seed=0)
        stepper = Stepper(self.backbone.model)
        stepper.step(tokens)
        return stepper


class Floor:
    """The products of a step by frozen weights, and nothing else: what no arrangement of the rest can take away."""

    def __init__(self, backbone: Backbone) -> None:
        self.dtype = backbone.compute_dtype
        self.weights = [bank.dense_weight(bank.active, self.dtype) for bank in backbone.banks.values()]
        self.head = backbone.base.get_output_embeddings().weight.detach()  # type: ignore[operator]
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}

    def _input(self, rows: int, width: int) -> torch.Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width).to(self.dtype)
        return self._inputs[rows, width]

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        """The products of the passes that a batch is computed in."""
        for part in by_length(batch):
            rows, labelled = part["input_ids"].numel(), len(targets_of(part["labels"])[0])
            for weight in self.weights:
                linear(self._input(rows, weight.shape[1]), weight)
            linear(self._input(labelled, self.head.shape[1]), self.head)
            torch.mm(self._input(labelled, self.head.shape[0]), self.head)
            for weight in reversed(self.weights[3:]):  # inputs of the first three have no gradient
                torch.mm(self._input(rows, weight.shape[0]), weight)


class Labelled(Stepper):
    """A stepper on batches with labels: ours computes logits where they are needed, by length."""

    def step(self, batch: Batch) -> None:  # type: ignore[override]
        """Forward, backward, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        training_losses(self.model, batch)[0].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Usual(Stepper):
    """A stepper on batches with labels, as transformers' models compute their loss."""

    def step(self, batch: Batch) -> None:  # type: ignore[override]
        """Forward, backward, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**batch, use_cache=False).loss.backward()
        self.optimizer.step()


def labelled_batches(given: argparse.Namespace) -> dict[str, list[Batch]]:
    """Batches by name: one of 8 x 64 tokens, and four of TREC where there are data."""
    tokens = torch.randint(0, 49152, (8, 64), generator=torch.Generator().manual_seed(0))
    found = {"8 x 64 tokens": [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}]}
    if given.data is not None:
        from transformers import AutoTokenizer

        from qratk.data.multiple_choice import MultipleChoiceData

        files = {split: str(given.data / "datasets" / "trec" / f"{split}.jsonl") for split in ("train", "test")}
        data = MultipleChoiceData(**files, validation_items=200, batch_size=8)
        data.attach(AutoTokenizer.from_pretrained(str(given.smollm2)))
        found["TREC"] = data.calibration_batches(4, 8)
    return found


def against_floor(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step on SmolLM2 of ours and of plain LoRA, and their ratios to the floor, by dtype and batches."""
    from transformers import AutoModelForCausalLM

    results: dict[str, Any] = {}
    for dtype in given.dtypes:
        kind = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(str(given.smollm2), dtype=kind)
        layers = model.config.num_hidden_layers
        usual = Usual(rivals.peft_model(model, [16] * layers, [RANK] * layers, dtype=kind))
        backbone = Backbone.from_model(model, quantizers=built_quantizers(None), bank_dir=None, compute_dtype=dtype)
        backbone.build_bank([4])
        backbone.release_reference()
        backbone.dense_cache("on")
        backbone.activate(Configuration.uniform(4, RANK, layers), seed=0)
        keep_freed_memory()
        variants: dict[str, Any] = {"floor": Floor(backbone), "ours dense 4": Labelled(backbone.model)}
        variants["plain LoRA"] = usual
        for name, batches in labelled_batches(given).items():
            found = interleaved(
                {label: partial(_steps, each, batches) for label, each in variants.items()},
                repeats=given.repeats,
                clock=given.clock,
            )
            found = {label: [value / len(batches) for value in values] for label, values in found.items()}
            print(f"\n### SmolLM2, {name}, {dtype}, ms a step\n")
            print(table(["variant", "median (range)"], [[v, spread(s, scale=1e3, digits=1)] for v, s in found.items()]))
            ratios = {f"{label} / floor": paired_ratios(found[label], found["floor"]) for label in list(variants)[1:]}
            print(verdict("ours dense 4 bit / floor", ratios["ours dense 4 / floor"], at_most=1.25))
            print(f"plain LoRA / floor: {spread(ratios['plain LoRA / floor'])}", flush=True)
            results[f"smollm2/{name}/{dtype}"] = {"seconds": found, "ratios": ratios}
    return results


def _steps(stepper: Any, batches: list[Batch]) -> None:
    for batch in batches:
        stepper.step(batch)


def base_model(name: str, given: argparse.Namespace) -> Any:
    """A float32 model by the name of the command line."""
    if name == "blocks8":
        return random_llama(layers=8, width=512)
    from transformers import AutoModelForCausalLM

    from qratk.embedded import model_directory

    path = model_directory() if given.data is None else given.data / "models" / name
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def variants(model: Any) -> tuple[dict[str, Stepper], Ours, dict[str, tuple[list[int], bool]]]:
    """Their steppers by name; ours; the bits and cache of our variants by name."""
    layers = model.config.num_hidden_layers
    ranks, mix = [RANK] * layers, [MIX[i % len(MIX)] for i in range(layers)]
    theirs = {
        "plain LoRA": [16] * layers,
        "bnb 4": [4] * layers,
        "bnb 8": [8] * layers,
        "HQQ 2": [2] * layers,
        "HQQ 3": [3] * layers,
        "PEFT mix": mix,
    }
    steppers = {name: Stepper(rivals.peft_model(model, bits, ranks)) for name, bits in theirs.items()}
    settings = {
        f"ours {'dense' if dense else 'packed'} {bits}": ([bits] * layers, dense)
        for dense in (False, True)
        for bits in MIX
    }
    settings |= {"ours packed mix": (mix, False), "ours dense mix": (mix, True)}
    return steppers, Ours(model), settings


def measured(model: Any, count: int, given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each variant, a figure a repeat."""
    theirs, ours, settings = variants(model)
    length = min(count, 128, model.config.max_position_embeddings)
    tokens = torch.randint(
        0, model.config.vocab_size, (count // length, length), generator=torch.Generator().manual_seed(0)
    )
    active: dict[str, Stepper] = {}

    def stepping(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(given.steps):
                active[name].step(tokens)

        return run

    compared = [name for over, under, _ in RATIOS.values() for name in (under, over)]  # neighbours in time
    found: dict[str, list[float]] = {name: [] for name in dict.fromkeys((*compared, *theirs, *settings))}
    for _ in range(given.repeats):
        for name in found:
            if name in settings:
                bits, dense = settings[name]
                active[name] = ours.at(bits, dense=dense, tokens=tokens)
            else:
                theirs[name].step(tokens)
                active[name] = theirs[name]
            spent = interleaved({name: stepping(name)}, repeats=1, clock=given.clock, warm_up=0)
            found[name].append(spent[name][0] / given.steps)
    return found


def main() -> None:
    """Every model and number of tokens."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--models", nargs="+", default=["blocks8", "deep12"])
    options.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 1024])
    options.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M, to be measured instead of --models")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of SmolLM2")
    options.add_argument("--steps", type=int, default=3, help="steps of each measurement")
    given = prepared(options)
    if given.smollm2 is not None:
        finish(given, "step", against_floor(given))
        return
    results: dict[str, Any] = {}
    for name in given.models:
        model = base_model(name, given)
        for count in given.tokens:
            found = measured(model, count, given)
            print(f"\n### {name if given.data or name == 'blocks8' else 'embedded'}, {count} tokens, ms a step\n")
            print(table(["variant", "median (range)"], [[v, spread(s, scale=1e3, digits=1)] for v, s in found.items()]))
            ratios = {label: paired_ratios(found[over], found[under]) for label, (over, under, _) in RATIOS.items()}
            for label, values in ratios.items():
                print(verdict(label, values, at_most=RATIOS[label][2]), flush=True)
            results[f"{name}/{count}"] = {"seconds": found, "ratios": ratios}
    finish(given, "step", results)


if __name__ == "__main__":
    main()
