"""What a search would take: bytes, evaluations, steps and time, before weights are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation, FidelityLadder
from qratk.core.memory import Budget, Footprint, MemoryModel
from qratk.core.resolution import Resolution, TaskItems, foretold, measured
from qratk.core.shared import Setting
from qratk.data.attached import DEFAULT_LENGTH, Attached
from qratk.data.splits import SPLITS
from qratk.run.run import Run

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone
    from qratk.data.base import TaskData
    from qratk.data.encoding import Encoded
    from qratk.loop import SearchLoop
    from qratk.training.module import FineTuneModule

_SAMPLE = 256  # rows that lengths are measured on
_COLD_BYTES = 256 * 2**20  # more than caches of processors hold


@dataclass(frozen=True)
class PlanRow:
    """One configuration with its bytes by part and in each scope.

    `training_parts` sum to its training peak; empty where that is an estimate. The figure in the footprint, which the
    search counts by, is never less: it charges every layer with the space's largest workspace.
    """

    name: str
    configuration: str
    footprint: Footprint
    average_bits: float
    fits: bool
    training_parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def training_bytes(self) -> int:
        """The training peak: traced where that was possible."""
        return sum(self.training_parts.values()) or self.footprint.training_bytes


@dataclass(frozen=True)
class SearchMemory:
    """What a search holds besides one candidate's training: packed weights of all bit-widths, and kept dense ones.

    `dense_limit` are all dense weights of one configuration; `dense_cache` is the mode that says whether they are kept.
    """

    bank_bytes: int
    bits: tuple[int, ...]
    dense_cache: str
    dense_limit: int


@dataclass(frozen=True)
class Texts:
    """Texts that a validation generates, as if none ended before its last token.

    `batches` are texts side by side, tokens of their prompts with padding, and tokens that are generated at most; each
    token after the first is a pass of the batch over the model. `share` is the part of the texts that they stand for.
    """

    batches: tuple[tuple[int, int, int], ...]
    share: float = 1.0

    @property
    def number(self) -> float:
        """Texts of a validation."""
        return sum(texts for texts, _, _ in self.batches) / self.share

    @property
    def tokens(self) -> int:
        """Tokens of a text at most."""
        return max(most for _, _, most in self.batches)

    @property
    def passes(self) -> float:
        """Passes over the model behind those that read the prompts."""
        return sum(most - 1 for _, _, most in self.batches) / self.share


@dataclass(frozen=True)
class Workload:
    """Tokens of an optimiser step, tokens scored in a validation (those of prompts among them, to which texts are
    generated), and where these figures come from; `texts` where a validation generates some."""

    step_tokens: float
    validation_tokens: float
    source: str
    texts: Texts | None = None


@dataclass(frozen=True)
class Generation:
    """What the texts of a validation take: passes, seconds, and bytes at the peak, the key-value cache among them."""

    texts: float
    tokens: int
    passes: float
    seconds: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """Figures of a search before it begins.

    `evaluations` is the largest number of evaluations at each rung, `replicates` how many of the highest one have fresh
    seeds; `steps` the optimiser steps they take in all, each of the others continuing the rung below, within the budget
    of `full_runs`, if there is one; `shared` the ladders of settings that all layers share; `seconds` an estimate from
    the arithmetic of the projections and the head alone. Training peaks are those of `batch`, sequences and tokens in
    each, all labelled; `peak_source` is "trace" (within 5 % of what is measured) or "estimate". `resolutions` say of
    the rungs, highest first, how fine scores are, those of equal items once; none where the score has no bounds.
    `other_data` says that what was measured before was of other data, `served` what the client that the answer is for
    makes of it. `generation` is what texts take that a validation has generated, if it has; the seconds of all scorings
    are in `seconds`.
    """

    num_layers: int
    parameters: int
    log10_size: float
    budget: Budget
    binds: bool
    rows: tuple[PlanRow, ...]
    evaluations: Mapping[int, int]
    steps: int
    workload: Workload
    flops_per_second: float
    seconds: float
    fallbacks: tuple[str, ...] = ()
    coverage: str = ""
    peak_source: str = "estimate"
    batch: tuple[int, int] = (1, DEFAULT_LENGTH)
    search_memory: SearchMemory | None = None
    replicates: int = 0
    shared: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    full_runs: float | None = None
    resolutions: tuple[Resolution, ...] = ()
    other_data: str = ""
    served: tuple[str, ...] = ()
    generation: Generation | None = None

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data; bytes of every row with their sums by scope."""
        data = asdict(self)
        for row, plain in zip(self.rows, data["rows"], strict=True):
            plain["footprint"]["storage_bytes"] = row.footprint.storage_bytes
            plain["footprint"]["total_bytes"] = row.footprint.total_bytes
            plain["training_bytes"] = row.training_bytes
        data["evaluations"] = {str(steps): count for steps, count in self.evaluations.items()}
        return data


def make_plan(
    module: FineTuneModule,
    datamodule: TaskData,
    loop: SearchLoop,
    *,
    accumulate: int = 1,
    run_dir: Path | None = None,
) -> Plan:
    """Plan of a search; loads no weights. Raises `InfeasibleBudgetError` with the smallest feasible figure, and
    `ConfigurationError` for what the client of the search could not serve.

    `accumulate` is the number of batches in an optimiser step. What a search on the same data in `run_dir`, if there is
    one, has measured tells how fine scores are.
    """
    from qratk.bank.table import told
    from qratk.peaks.foretold import memory_model

    served = loop.require_served(module)
    backbone = module.load_backbone(weights=False)
    checkpointing = bool(module.options.gradient_checkpointing)
    length = _attached_length(datamodule, backbone)
    foretold = partial(
        memory_model,
        backbone,
        batch_size=datamodule.batch_size,
        sequence_length=length,
        gradient_checkpointing=checkpointing,
        dense_cache=_dense_cache(module) == "on",
    )
    memory, budget = loop.pose([shape.name for shape in backbone.shapes], foretold)
    rows = plan_rows(memory, budget)
    fitting = [Configuration.from_text(row.configuration) for row in rows if row.name == "uniform" and row.fits]
    evaluations = loop.planned_evaluations(len(loop.baselines(fitting)))
    references = 0 if loop.shared_ladders else len(loop.reference_choices)
    afresh = references + loop.planned_replicates
    steps = total_steps(evaluations, afresh=afresh, untrained=loop.untrained)
    steps += loop.evaluator.shared_runs * loop.ladder.highest
    if loop.full_runs is not None:  # the rungs' counts are each within it, and so are all of them together
        apart = total_steps({steps: size * len(loop.reference_choices) for steps, size in loop.reference_race})
        steps = min(steps, int(loop.full_runs * loop.ladder.highest) + apart)
    work = workload(datamodule, length, tokenizer=backbone.tokenizer is not None)
    speed = matmul_flops_per_second(backbone, tokens=datamodule.batch_size * length)
    per_token = 2.0 * (sum(memory.parameters) + _head_parameters(backbone))
    # Forward, and backward to the inputs alone: frozen weights have no gradient. Checkpointing runs forward twice.
    passes = 3.0 if checkpointing else 2.0
    scored, other_data = _scored(datamodule, run_dir)
    rungs = _rungs(loop.ladder)
    scorings = sum(number * datamodule.scored_share(rungs.get(at)) for at, number in evaluations.items())
    tokens = steps * accumulate * work.step_tokens * passes + scorings * work.validation_tokens
    texts = None if work.texts is None else generation(work.texts, backbone, per_token)
    seconds = tokens * per_token / speed + (0.0 if texts is None else scorings * texts.seconds)
    return Plan(
        num_layers=memory.space.num_layers,
        parameters=sum(memory.parameters),
        log10_size=memory.space.log10_size,
        budget=budget,
        binds=budget.check(memory),
        rows=rows,
        evaluations=evaluations,
        steps=steps,
        workload=work,
        flops_per_second=speed,
        seconds=seconds,
        fallbacks=told(backbone.fallbacks),
        coverage=str(backbone.coverage) if backbone.coverage.left else "",
        peak_source=memory.training.source,
        batch=(datamodule.batch_size, length),
        search_memory=search_memory(backbone, loop, _dense_cache(module)),
        replicates=loop.planned_replicates,
        shared={ladder.name: ladder.values for ladder in loop.shared_ladders},
        full_runs=loop.full_runs,
        resolutions=tuple(_resolutions(datamodule, loop.ladder, scored)),
        other_data=other_data,
        served=served,
        generation=texts,
    )


def generation(texts: Texts, backbone: Backbone, per_token: float) -> Generation:
    """What generation of these texts takes; `per_token` are operations of a token in a pass."""
    from qratk.peaks.estimate import generation_peak
    from qratk.peaks.foretold import facts_of

    speeds = {n: matmul_flops_per_second(backbone, tokens=n, cold=True) for n in {n for n, _, _ in texts.batches}}
    seconds = sum((most - 1) * number * per_token / speeds[number] for number, _, most in texts.batches)
    facts = facts_of(backbone)
    peaks = [
        generation_peak(backbone.shapes, facts, texts=number, prompt_tokens=prompt, generated_tokens=most)
        for number, prompt, most in texts.batches
    ]
    cache, peak = max(peaks, key=lambda found: found[1])
    return Generation(texts.number, texts.tokens, texts.passes, seconds / texts.share, cache, peak)


def _scored(datamodule: TaskData, run_dir: Path | None) -> tuple[Sequence[Evaluation], str]:
    """Evaluations of a search on the same data in a folder; else why there are none, where it holds another one."""
    if run_dir is None or not (run := Run(run_dir)).begun:
        return (), ""
    if run.data_digest != datamodule.fingerprint():
        return (), f"{run_dir} holds a search on other data: what it measured does not tell how fine these scores are"
    return [record.evaluation for record in run.records], ""


def _rungs(ladder: FidelityLadder) -> dict[int, int | None]:
    """Number of each rung by its steps, as data count them: None is the highest."""
    return {steps: None if steps == ladder.highest else rung for rung, steps in enumerate(ladder.steps)}


def _resolutions(datamodule: TaskData, ladder: FidelityLadder, scored: Sequence[Evaluation]) -> Iterator[Resolution]:
    before: tuple[TaskItems, ...] = ()
    for steps, rung in reversed(_rungs(ladder).items()):
        tasks = datamodule.judged(rung)
        if not tasks or tasks == before:
            continue
        before = tasks
        own = [e.outcomes for e in scored if e.ok and e.steps == steps]
        yield measured(steps, tasks, own) or foretold(steps, tasks)


def search_memory(backbone: Backbone, loop: SearchLoop, dense_cache: str) -> SearchMemory:
    """What a search holds: the bank of its bit-widths and of its references."""
    bits = tuple(sorted({*loop.bits, *(choice.bits for choice in loop.reference_choices)}))
    packed = [backbone.table.layer_bytes(shape, b) for shape in backbone.shapes for b in bits]
    biases = sum(shape.constant_bytes for shape in backbone.shapes)
    dense = sum(shape.parameters for shape in backbone.shapes) * backbone.compute_dtype.itemsize
    return SearchMemory(sum(p.weights + p.metadata for p in packed) + biases, bits, dense_cache, dense)


def _dense_cache(module: FineTuneModule) -> str:
    mode = module.options.dense_cache
    return str(mode) if isinstance(mode, str) else ("on" if mode else "off")


def plan_rows(memory: MemoryModel, budget: Budget) -> tuple[PlanRow, ...]:
    """The smallest and the largest configuration, and every uniform one between."""

    def row(name: str, configuration: Configuration) -> PlanRow:
        fits = budget.violation(memory, configuration) == 0.0
        average, footprint = memory.average_bits(configuration), memory.footprint(configuration)
        parts = dict(memory.training.uniform.get((configuration.bits[0], configuration.ranks[0]), {}))
        if parts:  # traced without what is packed
            parts["weights"] = footprint.weights + footprint.metadata
        return PlanRow(name, str(configuration.with_shared(())), footprint, average, fits, parts)

    space = memory.space
    uniforms = [row("uniform", configuration) for configuration in space.uniforms()]
    return (row("smallest", space.smallest), *uniforms, row("largest", space.largest))


def total_steps(evaluations: Mapping[int, int], *, afresh: int = 0, untrained: int | None = None) -> int:
    """Optimiser steps of all evaluations; each continues the rung below, but for `afresh` of the highest one.

    An untrained rung takes none, and what goes up from it begins at step 0.
    """
    trained = sorted(steps for steps in evaluations if steps != untrained)
    total = sum(evaluations[steps] * (steps - below) for below, steps in pairwise([0, *trained]))
    return total + afresh * (trained[-2] if len(trained) > 1 else 0)


def workload(datamodule: TaskData, length: int, *, tokenizer: bool = True) -> Workload:
    """Tokens of a step and of a validation, from the first rows of the data; at full length, without validation, where
    there are none or no tokenizer. Raises DataError when there are rows that cannot be read."""
    missing = [split for split in SPLITS if split != "test" and not datamodule.has(split)]
    if missing or not tokenizer:
        reason = f"there is no {missing[0]} data" if missing else "the model has no tokenizer"
        tokens = float(datamodule.batch_size * length)
        return Workload(tokens, 0.0, f"rows of {length} tokens, validation left out: {reason}")
    train = [len(row.tokens) for row in datamodule.encode_training(datamodule.sample("train", _SAMPLE))]
    held_out = datamodule.items("validation")
    rows = list(datamodule.encode_scoring(datamodule.sample("validation", _SAMPLE)))
    scored = [len(row.tokens) for row in rows]
    batches = [train[i : i + datamodule.batch_size] for i in range(0, len(train), datamodule.batch_size)]
    width = sum(map(max, batches)) / len(batches)  # a batch is padded to its longest row
    share = min(len(held_out), _SAMPLE) / len(held_out)
    texts = _texts([row for row in rows if row.generates], datamodule.eval_batch_size, share)
    return Workload(datamodule.batch_size * width, sum(scored) / share, f"the first {len(train)} rows", texts)


def _texts(prompts: Sequence[Encoded], batch_size: int, share: float) -> Texts | None:
    """Texts that go on from prompts, in the batches in which they are scored; None without prompts."""
    if not prompts:
        return None
    from qratk.data.batches import scoring_batches

    made = scoring_batches(prompts, size=batch_size, pad_id=0)
    return Texts(tuple((*batch["input_ids"].shape, int(batch["most"].max())) for batch in made), share)


def matmul_flops_per_second(backbone: Backbone, *, tokens: int, seconds: float = 0.3, cold: bool = False) -> float:
    """Measured speed of this machine at multiplying a batch with the model's most common projection; `cold` with
    weights that come from memory each time, as those of a whole model do."""
    import torch

    sizes = [(d_in, d_out) for shape in backbone.shapes for _, d_in, d_out in shape.projections]
    d_in, d_out = max(set(sizes), key=lambda size: (sizes.count(size), size))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Large enough to be fast, small enough that the products of an 8B model take a second or two on a CPU.
    rows = min(tokens, 8192 if device == "cuda" else 64 + int(1e9 / (2 * d_in * d_out)))
    d_out = d_out if device == "cuda" else min(d_out, max(64, int(1e9 / (2 * d_in * rows))))
    x = torch.ones(rows, d_in, dtype=backbone.compute_dtype, device=device)
    weight = torch.ones(d_in, d_out, dtype=backbone.compute_dtype, device=device)
    copies = min(64, 1 + _COLD_BYTES // weight.nbytes) if cold else 1
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]

    def timed(repeats: int) -> float:
        began = time.perf_counter()
        for number in range(repeats):
            x @ weights[number % copies]
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed(copies + 1)
    repeats = max(3, min(10_000, int(seconds / max(timed(copies + 1) / (copies + 1), 1e-9))))
    return 2.0 * x.shape[0] * d_in * d_out * repeats / timed(repeats)


def _attached_length(datamodule: TaskData, backbone: Backbone) -> int:
    from qratk.training.building import context_length

    attached = Attached(backbone.tokenizer, context_length(backbone.config))
    datamodule.attach(attached.tokenizer, context_length=attached.context_length)
    return attached.row_length(datamodule.asked_length)


def _head_parameters(backbone: Backbone) -> int:
    text = backbone.config.get_text_config()
    return int(text.hidden_size) * int(text.vocab_size)
