"""Measures what bits and ranks do to the embedded model; prints the tables of the README.

`python -m qratk.embedded.sensitivity` (about ten minutes on one busy core). Weights are
quantised and given back in full precision ("fake" quantisation), then frozen; LoRA adapters are
trained on top.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

from qratk.embedded.data import model_directory
from qratk.embedded.train import Recipe, held_out_loss
from qratk.embedded.world import Row, Split, fine_tuning_rows, make_world
from qratk.quantizers.nf4 import NF4Quantizer

IGNORED = -100
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """One fine-tuning run: bits and rank of each layer, and the hyper-parameters."""

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int = 40
    batch: int = 16
    learning_rate: float = 5e-3
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Accuracy, and the mean log-probability of the right choice among the choices."""

    accuracy: float
    log_likelihood: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """A question and one of its choices as tokens."""

    prompt: tuple[int, ...]
    choice: tuple[int, ...]


def fake_quantise(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight as it reads back after quantisation to 16, 8, 4 or 2 bits."""
    if bits == 16:
        return weight.clone()
    if bits == 8:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scale).round().clamp(-127, 127) * scale
    if bits == 4:
        quantizer, (rows, columns) = NF4Quantizer(double_quantization=False), weight.shape
        return quantizer.dequantize(quantizer.quantize(weight, 4), (rows, columns), 4, torch.float32).to(weight.dtype)
    if bits == 2:
        from hqq.core.quantize import Quantizer

        packed, meta = Quantizer.quantize(
            weight, nbits=2, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        dense: torch.Tensor = Quantizer.dequantize(packed, meta)
        return dense.to(weight.dtype)
    raise ValueError(f"bits={bits} was given; choose 16, 8, 4 or 2.")


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in full precision and its tokenizer."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(f"{directory} holds a {type(tokenizer).__name__}; a fast tokenizer is needed.")
    return model, tokenizer


def quantise_layers(model: PreTrainedModel, bits: Sequence[int]) -> None:
    """Nothing; quantises the projections of layer i to ``bits[i]``, in place."""
    with torch.no_grad():
        for layer, width in zip(model.model.layers, bits, strict=True):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.copy_(fake_quantise(module.weight, width))


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[Encoded, ...]:
    """The row's question with each of its choices."""
    text = f"{row.context}\n{row.question}" if row.context else row.question
    prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(
        Encoded(prompt, tuple(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])) for choice in row.choices
    )


def collate(pairs: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, attention mask and labels (the choice only), padded on the right."""
    width = max(len(pair.prompt) + len(pair.choice) for pair in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.choice)
        ids[i, :end] = torch.tensor(pair.prompt + pair.choice)
        mask[i, :end] = 1
        labels[i, start:end] = torch.tensor(pair.choice)
    return ids, mask, labels


@torch.no_grad()
def choice_scores(model: nn.Module, pairs: Sequence[Encoded], pad: int) -> torch.Tensor:
    """The log-likelihood of each choice after its question."""
    ids, mask, labels = collate(pairs, pad)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    total: torch.Tensor = (picked * (target != IGNORED)).sum(-1)
    return total


def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], batch: int = 64) -> Score:
    """The score of the model on the rows."""
    was_training, start = model.training, time.monotonic()
    model.train(False)
    pairs = [pair for row in rows for pair in encode(tokenizer, row)]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].choice))
    scores = torch.zeros(len(pairs))
    for i in range(0, len(order), batch):
        part = order[i : i + batch]
        scores[part] = choice_scores(model, [pairs[j] for j in part], tokenizer.pad_token_id)
    model.train(was_training)
    table = scores.view(len(rows), -1)
    right = torch.tensor([row.label for row in rows])
    hits = (table.argmax(-1) == right).float().mean()
    chance = table.log_softmax(-1).gather(1, right.unsqueeze(1)).mean()
    return Score(float(hits), float(chance), time.monotonic() - start)


def with_adapters(model: PreTrainedModel, ranks: Sequence[int]) -> nn.Module:
    """The model with LoRA adapters of ``ranks[i]`` on every projection of layer i."""
    from peft import LoraConfig, get_peft_model

    pattern = {
        rf"^.*layers\.{i}\.(self_attn|mlp)\.{name}$": rank for i, rank in enumerate(ranks) for name in PROJECTIONS
    }
    config = LoraConfig(
        r=max(ranks),
        lora_alpha=2 * max(ranks),
        target_modules=list(PROJECTIONS),
        rank_pattern=pattern,
        alpha_pattern={key: 2 * rank for key, rank in pattern.items()},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def fine_tune(model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], plan: Plan) -> float:
    """Seconds of CPU time a step; trains the adapters on the right choices."""
    pairs = [encode(tokenizer, row)[row.label] for row in rows]
    draw = random.Random(plan.seed)
    order = [
        i for _ in range(1 + plan.steps * plan.batch // len(pairs)) for i in draw.sample(range(len(pairs)), len(pairs))
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0, fused=True)
    warm_up = max(1, plan.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm_up, (plan.steps - s) / (plan.steps - warm_up))
    )
    model.train()
    start = time.process_time()
    for step in range(plan.steps):
        part = [pairs[i] for i in order[step * plan.batch : (step + 1) * plan.batch]]
        ids, mask, labels = collate(part, tokenizer.pad_token_id)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
    return (time.process_time() - start) / plan.steps


def run_plan(directory: Path, plan: Plan, split: Split = "validation") -> tuple[Score, float]:
    """The score after fine-tuning by this plan, and the CPU seconds a step took."""
    world = make_world()
    model, tokenizer = load(directory)
    quantise_layers(model, plan.bits)
    torch.manual_seed(plan.seed)
    adapted = with_adapters(model, plan.ranks)
    pace = fine_tune(adapted, tokenizer, fine_tuning_rows(world, "train"), plan)
    return evaluate(adapted, tokenizer, fine_tuning_rows(world, split)), pace


def layer_bytes(bits: int, rank: int, hidden: int = Recipe.hidden) -> int:
    """What one layer takes: packed weights with their scales, and its adapters in 16 bits."""
    wide = Recipe.intermediate
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]
    total = 0
    for columns, rows in shapes:
        size, blocks = columns * rows, -(-columns * rows // 64)
        packed = {
            16: 2 * size,
            8: size + 4 * rows,
            4: size // 2 + blocks + 4 * -(-blocks // 256) + 4,
            2: size // 4 + 4 * blocks,
        }
        total += packed[bits] + 2 * rank * (columns + rows)
    return total


def layer_losses(directory: Path, bits: int, count: int = 64) -> list[float]:
    """The rise of the held-out loss when only layer i is at ``bits``, for each i."""
    world = make_world()

    def loss(index: int | None) -> float:
        model, tokenizer = load(directory)
        quantise_layers(model, [bits if i == index else 16 for i in range(Recipe.layers)])
        return held_out_loss(model, world, tokenizer, Recipe(), count=count)

    whole = loss(None)
    return [loss(index) - whole for index in range(Recipe.layers)]


def print_layers(directory: Path) -> list[float]:
    """The rise of the loss at 2 bits by layer; prints it beside that at 4 bits."""
    table = {bits: layer_losses(directory, bits) for bits in (2, 4)}
    print("| layer | rise of the loss at 2 bits | at 4 bits |\n|---|---|---|")
    for index, (low, high) in enumerate(zip(table[2], table[4], strict=True)):
        print(f"| {index} | {low:+.3f} | {high:+.4f} |")
    print(flush=True)
    return table[2]


def print_plan(directory: Path, name: str, plan: Plan, seeds: Sequence[int]) -> None:
    """Nothing; prints a plan's scores, mean and standard deviation over the seeds."""
    runs = [run_plan(directory, replace(plan, seed=seed)) for seed in seeds]
    hits = [score.accuracy for score, _ in runs]
    logs = [score.log_likelihood for score, _ in runs]
    size = sum(map(layer_bytes, plan.bits, plan.ranks)) / 1000
    pace = 1000 * min(pace for _, pace in runs)
    print(
        f"| {name} | {size:.0f} | {statistics.fmean(hits):.3f} | {statistics.pstdev(hits):.3f} "
        f"| {statistics.fmean(logs):.3f} | {statistics.pstdev(logs):.3f} | {pace:.0f} |",
        flush=True,
    )


def uniform(template: Plan, bits: int, rank: int) -> Plan:
    """The template with these bits and this rank in every layer."""
    return replace(template, bits=(bits,) * Recipe.layers, ranks=(rank,) * Recipe.layers)


def mixed(template: Plan, rises: Sequence[float], low: int, high: int) -> Plan:
    """The template with the half of the layers that suffers most at 4 bits, the others at 2."""
    order = sorted(range(len(rises)), key=lambda i: rises[i])
    cheap = set(order[: len(rises) // 2])
    return replace(
        template,
        bits=tuple(2 if i in cheap else 4 for i in range(len(rises))),
        ranks=tuple(low if i in cheap else high for i in range(len(rises))),
    )


def print_plans(directory: Path, template: Plan, rises: Sequence[float], seeds: Sequence[int]) -> None:
    """Nothing; prints the table of uniform and mixed plans."""
    print("| plan | kB | accuracy | sd | log-likelihood | sd | CPU ms a step |\n|---|---|---|---|---|---|---|")
    cases = [(16, 8), (8, 8), (4, 8), (2, 8), (4, 2), (4, 4), (4, 16), (2, 2), (2, 4), (2, 16)]
    for bits, rank in cases:
        name = f"{bits} bits, rank {rank}"
        print_plan(directory, name, uniform(template, bits, rank), seeds)
    wrong = [-rise for rise in rises]
    print_plan(directory, "4 bits where it matters, else 2; rank 8", mixed(template, rises, 8, 8), seeds)
    print_plan(directory, "the other way round; rank 8", mixed(template, wrong, 8, 8), seeds)


def main() -> None:
    """Nothing; reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Measure the embedded model's sensitivity.")
    parser.add_argument("--model", type=Path, default=model_directory())
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(arguments.model)
    zero = evaluate(model, tokenizer, fine_tuning_rows(make_world(), "validation"))
    print(f"zero-shot: accuracy {zero.accuracy:.3f}, log-likelihood {zero.log_likelihood:.3f}\n")
    rises = print_layers(arguments.model)
    template = Plan((), (), arguments.steps, arguments.batch, arguments.learning_rate)
    print_plans(arguments.model, template, rises, range(arguments.seeds))


if __name__ == "__main__":
    main()
