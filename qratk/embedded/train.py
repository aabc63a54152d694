"""Trains the embedded model from scratch: `python -m qratk.embedded.train --out DIR --seed 0`."""

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qratk.embedded.world import SPARE_WORDS, World, documents, make_world

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HELD_OUT_SEED = 1_000_003
"""The seed of the text that the held-out loss is measured on; training never draws it."""


@dataclass(frozen=True)
class Recipe:
    """The sizes and the schedule of a training run, which may end before its ``horizon``."""

    seed: int = 0
    steps: int = 4000
    horizon: int = 6500
    batch: int = 8
    window: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warm_up: int = 200
    report_every: int = 200
    vocabulary: int = 1024
    hidden: int = 96
    intermediate: int = 192
    layers: int = 12
    heads: int = 3
    positions: int = 256


def build_tokenizer(world: World, recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from pre-training text and the spare words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = list(islice(documents(world, recipe.seed), 20_000))
    text += [f" {word}" for word in SPARE_WORDS for _ in range(500)]
    core.train_from_iterator(text, trainer)
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model of the recipe's size; draws its weights from torch's random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(world: World, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
    """An endless stream of token windows; documents are packed, one after another."""
    stream = documents(world, seed)
    eos = tokenizer.eos_token_id
    buffer: list[int] = []
    while True:
        encoded = tokenizer(list(islice(stream, 256)), add_special_tokens=False)["input_ids"]
        for ids in encoded:
            buffer += [*ids, eos]
        while len(buffer) >= recipe.window:
            yield torch.tensor(buffer[: recipe.window])
            buffer = buffer[recipe.window :]


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    count: int = 96,
    seed: int = HELD_OUT_SEED,
) -> float:
    """The mean loss a token on ``count`` windows of text drawn with another seed."""
    batch = torch.stack(list(islice(windows(world, tokenizer, recipe, seed), count)))
    was_training = model.training
    model.train(False)
    losses = [model(input_ids=part, labels=part).loss for part in torch.split(batch, 32)]
    model.train(was_training)
    return float(torch.stack(losses).mean())


def _schedule(step: int, recipe: Recipe) -> float:
    """The factor of the learning rate: a linear warm-up, then half a cosine over the horizon."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.horizon - recipe.warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _optimiser(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Nothing; writes the model in 16 bits, its configuration and its tokenizer to ``out``."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.float16)
    half.config.dtype = torch.float16
    half.generation_config.pad_token_id = tokenizer.pad_token_id
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _write_curve(rows: list[tuple[int, str, str, str]], out: Path) -> None:
    """Nothing; writes the training curve to ``out``."""
    with (out / "training_curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "train_loss", "held_out_loss", "seconds"))
        writer.writerows(rows)


def train(out: Path, recipe: Recipe, save_every: int = 1000) -> None:
    """Nothing; trains a model and leaves it, its tokenizer and its curve in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    world = make_world()
    tokenizer = build_tokenizer(world, recipe)
    model = build_model(tokenizer, recipe)
    optimiser = _optimiser(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _schedule(step, recipe))
    stream = windows(world, tokenizer, recipe, recipe.seed)
    curve: list[tuple[int, str, str, str]] = []
    total, start = 0.0, time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = torch.stack(list(islice(stream, recipe.batch)))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        total += float(loss.detach())
        if step % recipe.report_every == 0:
            seconds = time.monotonic() - start
            held = held_out_loss(model, world, tokenizer, recipe)
            row = (step, f"{total / recipe.report_every:.4f}", f"{held:.4f}", f"{seconds:.0f}")
            print(*row, flush=True)
            curve.append(row)
            total = 0.0
        if step % save_every == 0 or step == recipe.steps:
            save(model, tokenizer, out)
            _write_curve(curve, out)


def main() -> None:
    """Nothing; reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model's files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(arguments.seed, arguments.steps)
    train(arguments.out, recipe)


if __name__ == "__main__":
    main()
