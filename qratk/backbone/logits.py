"""Logits of the tokens that count, their likelihoods, and batches in which rows share a prompt or candidates a batch.

A batch holds `input_ids` and `attention_mask`, both (B, T). What is predicted stands in one of two forms:

- `labels`, (B, T), -100 where nothing is predicted (training);
- targets (scoring): `predictor` (P,), increasing flat indices b * T + t of the positions that predict; `target` (N,),
  the tokens predicted; `target_at` (N,), the index of each target's predictor; `target_row` (N,), not decreasing, the
  index of its scorer row in `row` (R,). A position may predict several targets: the last token of a shared prompt does.

In a batch of shared prompts, a row is a trunk and the branches that continue it: `segments`, (B, T), is 0 in the trunk,
a number of its own in each branch and -1 in the padding, and `position_ids`, (B, T), restart after the trunk with every
branch. Where some branches share more than the trunk, that is a segment too, and `parents`, (B, T), is its number in
these branches and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from qratk.core.batching import BATCH_COST, cheapest_cuts
from qratk.core.errors import QratkError

IGNORE = -100
_CHUNK_BYTES = 1 << 26
_MANY = 1 << 22  # logits whose likelihoods are taken some rows at a time
_ROWS_BYTES = 1 << 20  # of float32 at a time: what a processor's cache holds
_INPUTS = ("input_ids", "attention_mask", "labels", "segments", "position_ids", "parents")
# How far two ways to compute the same logits may lie apart by rounding, as a share of their spread.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Rounding of 16 bits grows with depth: that many times as far is well, if it is this share of what a mistake makes.
_DEEP, _OF_MISTAKE = 4.0, 0.2


def targets_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the positions that predict labelled tokens, and these tokens, both (N,), of labels (B, T).

    Position t is predicted by t - 1, so the first label of a row never counts.
    """
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


def labelled_tokens(labels: Tensor) -> int:
    """How many tokens a model is trained to predict in labels (B, T): the first of a row never counts."""
    return int((labels[:, 1:] != IGNORE).sum())


def model_inputs(batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of a Hugging Face model; a batch of shared prompts gets a mask (B, 1, T, T) of `dtype` to be added."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "segments" in batch:
        mask = _shared_mask(batch["segments"], batch.get("parents"), dtype)
        inputs |= {"attention_mask": mask, "position_ids": batch["position_ids"]}
    return inputs


def _shared_mask(segments: Tensor, parents: Tensor | None, dtype: torch.dtype) -> Tensor:
    asking, asked = segments[:, :, None], segments[:, None, :]
    # Padding may look at the trunk: a row of a mask that allows nothing makes NaN of it.
    visible = (asked == 0) | (asked == asking)
    if parents is not None:
        visible |= asked == parents[:, :, None]
    visible = visible.tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def labelled_logits(model: nn.Module, batch: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor:
    """Logits at flat indices b * T + t, (P, V); by default at the batch's `predictor`, or where its `labels` say.

    The output embedding sees only these positions, as one row of hidden states (1, P, H), so that neither the
    multiplication by the vocabulary nor its result is spent on others; what a family does to logits afterwards still
    happens. A family that does not call its output embedding on all positions is asked for all logits. Differentiable.
    """
    if positions is None:
        positions = batch["predictor"] if "predictor" in batch else targets_of(batch["labels"])[0]
    shape = batch["input_ids"].shape
    chosen = False

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal chosen
        if not arguments or not isinstance(arguments[0], Tensor) or arguments[0].shape[:-1] != shape:
            return None
        chosen = True
        return (arguments[0].flatten(0, 1)[positions][None], *arguments[1:])

    head = _base(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(choose) if isinstance(head, nn.Module) else None
    try:
        logits: Tensor = model(**model_inputs(batch, _dtype(model)), use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if chosen else logits.flatten(0, 1)[positions]


def _base(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _dtype(model: nn.Module) -> torch.dtype:
    dtype: torch.dtype = _base(model).get_input_embeddings().weight.dtype
    return dtype


def labelled_loss(logits: Tensor, target: Tensor, candidates: int = 1, *, meant: str = "cpu") -> Tensor:
    """Mean negative log-likelihood of each candidate's targets, (K,) float32, in nats.

    `logits` is (K * N, V), candidate after candidate, and `target` (N,) or (K * N,). On the meta device, the loss is
    made as on the type of device that is meant.
    """
    repeated = target.repeat(len(logits) // max(1, len(target)))
    device = logits.device.type if logits.device.type != "meta" else meant
    if device == "cpu" and logits.numel() > _MANY:
        function: Any = CrossEntropy
        losses: Tensor = function.apply(logits, repeated)
    else:
        losses = cross_entropy(logits.float(), repeated, reduction="none")
    return losses.view(candidates, -1).mean(1)


class CrossEntropy(torch.autograd.Function):
    """Negative log-likelihoods in float32 without a second tensor of the size of the logits before their gradient.

    Some rows at a time are converted, so that they stay in the processor's cache. Kept for the backward pass are the
    logits and a number a row; probabilities are made anew.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Losses (N,) float32 of logits (N, V) and targets (N,)."""
        total = torch.cat([part.float().logsumexp(1) for part in torch.split(logits, _rows_at_once(logits))])
        ctx.save_for_backward(logits, target, total)
        return total - logits[torch.arange(len(target), device=target.device), target].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits."""
        logits, target, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        rows = _rows_at_once(logits)
        parts = zip(*(torch.split(each, rows) for each in (logits, out, target, total, grad)), strict=True)
        for given, made, tokens, sums, weights in parts:
            shares = given.sub(sums[:, None]).exp_()  # in float32, as the sums are
            shares[torch.arange(len(tokens), device=tokens.device), tokens] -= 1.0
            made.copy_(shares.mul_(weights[:, None]))
        return out, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _ROWS_BYTES // (4 * logits.shape[1]))


def training_losses(
    model: nn.Module, batch: Mapping[str, Tensor], candidates: int = 1, *, overhead: float | None = BATCH_COST
) -> Tensor:
    """Mean negative log-likelihood of a batch's labelled tokens for each candidate in the model, (K,), in nats.

    The batch is computed `by_length`, which changes nothing but the order of additions; with None for the overhead it
    is computed in one piece. Differentiable.
    """
    parts = [batch] if overhead is None else by_length(batch, overhead=overhead)
    losses: list[Tensor] = []
    counts: list[int] = []
    for part in parts:
        whole = replicate(part, candidates) if candidates > 1 else part
        positions, target = targets_of(whole["labels"])
        if len(target) or len(parts) == 1:
            losses.append(labelled_loss(labelled_logits(model, whole, positions), target, candidates))
            counts.append(len(target))
    if len(losses) == 1:
        return losses[0]
    total = sum(counts)
    return torch.stack([loss * (count / total) for loss, count in zip(losses, counts, strict=True)]).sum(0)


def by_length(batch: Mapping[str, Tensor], *, overhead: float = BATCH_COST) -> list[dict[str, Tensor]]:
    """A training batch in parts of rows of about equal length, each without the padding that it does not need.

    There are as many parts as make it cheapest, where each pass costs `overhead` tokens; often that is the batch as it
    is.
    """
    mask = batch["attention_mask"]
    rows, width = mask.shape
    ends = (mask != 0) * torch.arange(1, width + 1, device=mask.device)
    lengths = ends.amax(1).clamp(min=1).tolist()
    order = sorted(range(rows), key=lambda row: (-lengths[row], row))
    cuts = cheapest_cuts([lengths[row] for row in order], budget=rows * width, most=rows, overhead=overhead)
    if len(cuts) == 1:
        return [dict(batch)]
    parts = []
    for cut in cuts:
        chosen = torch.tensor(order[cut], device=mask.device)
        longest = lengths[order[cut.start]]
        parts.append({name: value[chosen, :longest] for name, value in batch.items() if name in _INPUTS})
    return parts


def target_log_likelihood(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed natural log-likelihood of each scorer row's targets, (R,) float32, and their number, (R,) int64.

    `logits` is (P, V), of the batch's predictors. They are converted to float32 some at a time, so that no second
    tensor of their size is made. Differentiable.
    """
    target, at, row = batch["target"], batch["target_at"], batch["target_row"]
    rows = len(batch["row"])
    counts = torch.bincount(row, minlength=rows)
    if not len(target):
        return torch.zeros(rows, device=logits.device), counts
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    total = torch.cat([part.float().logsumexp(1) for part in torch.split(logits, step)])  # (P,)
    values = logits[at, target].float() - total[at]
    # A table of one place for each target: adding up by index has no fixed order on a GPU.
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    table = torch.zeros(rows, int(counts.max()), device=logits.device)
    return table.index_put((row, place), values).sum(1), counts


def target_greedy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether each scorer row's targets are the likeliest tokens, every one of them, (R,) bool.

    `logits` is (P, V), of the batch's predictors. Of equals the first is the likeliest, as in lm-eval.
    """
    likeliest = logits.argmax(1)[batch["target_at"]] == batch["target"]
    missed = torch.zeros(len(batch["row"]), dtype=torch.int64, device=logits.device)
    return missed.index_add_(0, batch["target_row"], (~likeliest).long()) == 0


def replicate(batch: Mapping[str, Tensor], candidates: int) -> dict[str, Tensor]:
    """The batch `candidates` times over: row b of candidate k is row k * B + b, and likewise for targets.

    Logits are then (K * P, V), log-likelihoods (K * R,), and `row` repeats: `.view(candidates, -1)` takes them apart.
    """
    copied = {
        name: value.repeat(candidates, *[1] * (value.dim() - 1))
        for name, value in batch.items()
        if name in _INPUTS or name in ("target", "row")
    }
    if "predictor" in batch:
        sizes = {
            "predictor": batch["input_ids"].numel(),
            "target_at": len(batch["predictor"]),
            "target_row": len(batch["row"]),
        }
        for name, size in sizes.items():
            offsets = torch.arange(candidates, device=batch[name].device) * size
            copied[name] = (offsets[:, None] + batch[name]).flatten()
    return copied


def shared_length(model: nn.Module) -> int:
    """Tokens that a row of shared prompts may have with this model; 0 when it cannot take such rows.

    Found by trial: a shared row must give the logits of its separate rows, to rounding. Families fail where they ignore
    masks or positions, or compute positions themselves. How much such a mistake changes is seen in a row without a mask
    and in one whose positions run on; rounding must change far less. Adapters are left out and the mode is evaluation,
    so that the answer is the model's alone. Attention that slides over fewer tokens is only right within them.
    """
    longest = _window(_base(model).config)
    if longest < _TRUNK + sum(_BRANCHES):  # a position too far would leave a GPU in an unusable state
        return 0
    try:
        with torch.no_grad(), _evaluating(model), without_adapters(model):
            batches = _trial(model)
            shared, separate = (labelled_logits(model, batch).float() for batch in batches)
            spread, limit = separate.std(dim=-1).mean(), _TOLERANCE[_dtype(model)]
            error = (shared - separate).square().mean().sqrt() / spread
            if _dtype(model) != torch.float32 and limit < error <= _DEEP * limit:
                wrong = (labelled_logits(model, batch).float() for batch in _mistaken(batches[0]))
                limit = _OF_MISTAKE * min(float((one - separate).square().mean().sqrt() / spread) for one in wrong)
    except (torch.OutOfMemoryError, QratkError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError, AssertionError):
        return 0  # whatever a family raises at a mask or at positions that it does not know
    return longest if bool(error <= limit) else 0  # NaN is no agreement


def _window(config: Any) -> int:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("sliding_window", "attention_chunk_size", "window_size", "max_position_embeddings", "n_positions")
    sizes = [getattr(config, name, None) for name in names]
    return min([size for size in sizes if isinstance(size, int) and size > 0], default=1 << 30)


_TRUNK, _BRANCHES = 6, (11, 7, 9)


def _trial(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A shared row, and the same as separate rows; the predictors are all tokens of the branches, in the same order."""
    embedding = _base(model).get_input_embeddings().weight
    device, vocabulary = embedding.device, embedding.shape[0]
    size = _TRUNK + sum(_BRANCHES)
    tokens = (torch.arange(size, device=device) * 7919 + 17) % vocabulary
    trunk, *branches = tokens.split([_TRUNK, *_BRANCHES])
    segments = torch.repeat_interleave(torch.arange(1 + len(_BRANCHES)), torch.tensor([_TRUNK, *_BRANCHES]))
    positions = torch.cat([torch.arange(_TRUNK), *(torch.arange(_TRUNK, _TRUNK + n) for n in _BRANCHES)])
    shared = {
        "input_ids": tokens[None],
        "attention_mask": torch.ones_like(tokens)[None],
        "segments": segments[None].to(device),
        "position_ids": positions[None].to(device),
        "predictor": torch.arange(_TRUNK, size, device=device),
    }
    width = _TRUNK + max(_BRANCHES)
    ids = torch.zeros(len(_BRANCHES), width, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for index, branch in enumerate(branches):
        ids[index, : _TRUNK + len(branch)] = torch.cat([trunk, branch])
        mask[index, : _TRUNK + len(branch)] = 1
    predictor = torch.cat([index * width + _TRUNK + torch.arange(n) for index, n in enumerate(_BRANCHES)])
    return shared, {"input_ids": ids, "attention_mask": mask, "predictor": predictor.to(device)}


def _mistaken(shared: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A shared row as a model sees it that ignores positions, and as one that ignores masks."""
    yield {
        **shared,
        "position_ids": torch.arange(shared["input_ids"].shape[1], device=shared["input_ids"].device)[None],
    }
    yield {**shared, "segments": torch.zeros_like(shared["segments"])}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters of a PEFT model add nothing."""
    # PEFT's own context also switches `requires_grad` of the adapters off and on.
    switched = [module for module in model.modules() if getattr(module, "_disable_adapters", None) is False]
    for module in switched:
        module._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module._disable_adapters = False  # type: ignore[assignment]
