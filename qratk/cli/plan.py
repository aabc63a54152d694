"""`qratk plan`: what a search would take, for people or machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qratk.cli.application import SearchingCLI, run
from qratk.core.memory import format_bytes
from qratk.core.resolution import CHANGED, Resolution
from qratk.core.shared import setting_text
from qratk.core.text import duration
from qratk.data.base import TaskData
from qratk.plan import Plan, PlanRow, make_plan
from qratk.training.module import FineTuneModule


class PlanCommand(SearchingCLI):
    """Prints a plan."""

    command = "plan"

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: the machine of a plan need not have the devices."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        self.plan(self.model, self.datamodule)

    def plan(self, model: FineTuneModule, datamodule: TaskData) -> None:
        """Print what a search would take."""
        accumulate, folder = self.settings.trainer.accumulate_grad_batches, self.settings.get("run_dir")
        run_dir = Path(folder) if folder else None
        found = make_plan(model, datamodule, self.loop, accumulate=accumulate, run_dir=run_dir)
        print(json.dumps(found.as_dict(), indent=2) if self.settings.json else as_text(found))


def plan(arguments: Sequence[str]) -> int:
    """Exit status of `qratk plan`."""
    return run(PlanCommand, arguments)


def as_text(plan: Plan) -> str:
    """The plan for people."""
    budget = plan.budget
    cap = "" if budget.max_average_bits is None else f", at most {budget.max_average_bits:g} bits on average"
    lines = [
        f"layers       {plan.num_layers} ({plan.parameters:,} weights to quantise)",
        f"space        10^{plan.log10_size:.1f} configurations",
        f"budget       {format_bytes(budget.limit_bytes)} ({budget.limit_bytes:,} bytes) of {budget.scope}{cap}"
        + ("" if plan.binds else "; it never binds"),
        "",
        *_table(plan.rows),
        "",
        *_peaks(plan),
        "",
        *_settings(plan),
        f"evaluations  {', '.join(f'{count} of {steps} steps' for steps, count in plan.evaluations.items())} at most"
        + (f"; {plan.replicates} of them run the best again with fresh seeds" if plan.replicates else ""),
        f"steps        {plan.steps:,} in all; each evaluation continues the rung below",
        f"time         at least {duration(plan.seconds)}: an estimate from {plan.workload.step_tokens:,.0f} tokens a "
        f"batch ({plan.workload.source}) and {plan.flops_per_second / 1e9:,.1f} GFLOP/s, measured here;",
        "             multiplications alone, without dequantising, attention and overhead",
        *_generation(plan),
        *(line for resolution in plan.resolutions for line in _resolution(resolution)),
    ]
    return "\n".join(
        [*lines, *(f"note         {text}" for text in (plan.coverage, *plan.fallbacks, *plan.served) if text)]
    )


def _settings(plan: Plan) -> list[str]:
    """The ladders of shared settings, and the budget of full runs, where there are any."""
    lines = []
    if plan.shared:
        ladders = ", ".join(f"{name} {'/'.join(map(setting_text, values))}" for name, values in plan.shared.items())
        count = math.prod(len(values) for values in plan.shared.values())
        lines.append(f"settings     {ladders}: {count} combinations, of which each uniform configuration gets the best")
    if plan.full_runs is not None:
        lines.append(f"effort       {plan.full_runs:g} full runs of training in all, whatever the evaluations")
    return lines


def _generation(plan: Plan) -> list[str]:
    """What the texts of a scoring take, where there are any."""
    found = plan.generation
    if found is None:
        return []
    return [
        f"texts        {found.texts:,.0f} of up to {found.tokens} tokens a scoring of all items: {found.passes:,.0f} "
        f"passes over the model, {duration(found.seconds)} of the time, if none ends early;",
        f"             peak {format_bytes(found.peak_bytes)} beside weights and adapters, of which the key-value cache "
        f"{format_bytes(found.cache_bytes)} (an estimate)",
    ]


def _resolution(found: Resolution) -> list[str]:
    """How fine a score is, task by task and in all."""
    bound = "" if found.measured else "at most "
    tasks = ", ".join(f"{task.name} {task.standard_error:.3f} ({task.items} items)" for task in found.tasks)
    assumed = "" if found.measured else f" if configurations differ on {CHANGED:.0%} of them"
    paired = "" if math.isnan(found.paired) else f", {found.paired:.3f} over the same{assumed}"
    source = ", by scorings in the run folder" if found.measured else ""
    return [
        f"score        at {found.steps} steps: standard error {bound}{found.standard_error:.3f}{source}",
        f"             differences told at 95 %: {found.unpaired:.3f} over other items{paired}",
        f"             tasks: {tasks}",
    ]


def _table(rows: Sequence[PlanRow]) -> list[str]:
    head = ("", "bits:rank", "weights", "metadata", "adapters", "storage", "fixed", "training", "serving", "fits")
    body = []
    for row in rows:
        f = row.footprint
        sizes = (f.weights, f.metadata, f.adapters, f.storage_bytes, f.fixed, row.training_bytes, f.serving_bytes)
        name = row.configuration.partition("*")[0]
        body.append((row.name, name, *map(format_bytes, sizes), "yes" if row.fits else "no"))
    return _aligned((head, *body))


def _peaks(plan: Plan) -> list[str]:
    """Training peaks by part, and what the search holds besides."""
    batch = f"{plan.batch[0]} x {plan.batch[1]} tokens, all labelled"
    if plan.peak_source == "estimate":
        lines = [f"training     an estimate of the peak of fine-tuning one configuration ({batch})"]
    else:
        lines = [f"training     peak of fine-tuning one configuration ({batch}), by part:"]
        shown = [row for row in plan.rows if row.name == "uniform"]
        names = list(shown[0].training_parts)
        body = [
            (row.name, row.configuration.partition("*")[0], *(format_bytes(row.training_parts[n]) for n in names))
            for row in shown
        ]
        lines += _aligned((("", "bits:rank", *names), *body))
    if plan.budget.scope == "training" and plan.peak_source == "trace":
        lines.append(
            "             the search counts a little more: for every layer, the largest workspace of the space"
        )
    memory = plan.search_memory
    if memory is not None:
        bits = ", ".join(map(str, memory.bits))
        lines.append(
            f"bank         {format_bytes(memory.bank_bytes)}: the packed weights of {bits} bits that a search holds"
        )
        if memory.dense_cache != "off":
            kept = "kept" if memory.dense_cache == "on" else "kept while memory allows"
            lines.append(f"dense cache  up to {format_bytes(memory.dense_limit)} more a configuration, {kept}")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in rows
    ]
