"""Where the time of a whole search goes: what is neither training nor scoring.

    python benchmarks/overhead.py [--data DIR] [--large] [--profile]

A whole search of the quickstart (or of TREC on the 12-layer model of --data), with all its reports, under timers that
exclude one another: a second counts for the innermost category that is running. Training is forward, backward,
clipping and AdamW; scoring is forward without gradients and log-likelihoods. All else is overhead, by category.
The share at a second a step is reckoned from the overhead per evaluation and per step; `--large` measures it too, by a
small search with a random model of 8 layers, width 512, on the same data. `--profile` lists the functions that the
overhead is spent in (the profiler slows Python, so take the order, not the seconds).
"""

from __future__ import annotations

from common import CLOCKS, Subject, finish, parser, prepared, random_llama, scratch, subject, table

# isort: split
import argparse
import cProfile
import functools
import importlib
import pstats
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from whole_search import evaluator_options, search

# Category, module, dotted name. What the library does not have is left out: its time is then with the caller.
TIMED: tuple[tuple[str, str, str], ...] = (
    ("forward", "peft", "PeftModel.forward"),
    ("forward", "peft", "PeftModelForCausalLM.forward"),
    ("forward", "qratk.training.module", "FineTuneModule.forward"),
    ("forward", "qratk.training.module", "FineTuneModule.training_loss"),
    ("training", "torch.autograd", "backward"),
    ("training", "torch.nn.utils", "clip_grad_norm_"),
    ("training", "torch.optim", "Optimizer.zero_grad"),
    ("forward", "qratk.training.module", "FineTuneModule.log_likelihood"),
    ("scorer (metric)", "qratk.data.scoring", "Scorer.update"),
    ("scorer (metric)", "qratk.data.scoring", "Scorer.compute"),
    ("scorer (metric)", "qratk.data.scoring", "Scorer.outcomes"),
    ("Trainer loops", "lightning", "Trainer.fit"),
    ("Trainer loops", "lightning", "Trainer.validate"),
    ("Trainer set-up", "qratk.training.trainers", "QuietTrainers.scoring"),
    ("Trainer set-up", "qratk.training.trainers", "QuietTrainers.training"),
    ("checkpoints", "qratk.training.rungs", "save_state"),
    ("checkpoints", "qratk.training.rungs", "load_state"),
    ("checkpoints", "qratk.training.rungs", "Rungs.discard"),
    ("checkpoints", "qratk.training.module", "FineTuneModule.training_state"),
    ("journal", "qratk.run.journal", "Journal.append"),
    ("journal", "qratk.run.journal", "Journal.decide"),
    ("journal", "qratk.run.journal", "Journal.bind"),
    ("strategy", "qratk.loop.asking", "Asking.asked"),
    ("strategy", "qratk.loop.search", "promote"),
    ("strategy", "qratk.loop.answer", "top3_hit_rates"),
    ("Gaussian process", "botorch", "fit_gpytorch_mll"),
    ("Gaussian process", "qratk.refiners._trust_regions", "TrustRegions.ask"),
    ("reports: files", "qratk.reporters.files", "RunFiles.*"),
    ("reports: pictures", "qratk.reporters.pictures", "Pictures.*"),
    ("reports: TensorBoard", "qratk.reporters.tensorboard", "TensorBoardReporter.*"),
    ("reports: terminal", "qratk.reporters.terminal", "TerminalReporter.*"),
    ("data", "qratk.data.base", "TaskData.setup"),
    ("data", "qratk.data.base", "TaskData.collate"),
    ("data", "qratk.data.base", "TaskData.scoring_batches"),
    ("data", "qratk.data.base", "TaskData.fingerprint"),
    ("switch", "qratk.backbone.backbone", "Backbone.activate"),
    ("switch", "qratk.backbone.backbone", "Backbone.load_adapter_state"),
    ("bank", "qratk.backbone.backbone", "Backbone.build_bank"),
    ("bank", "qratk.backbone.backbone", "Backbone.release_reference"),
    ("load model", "qratk.training.module", "FineTuneModule.load_backbone"),
    ("importance", "qratk.evaluators.finetune", "FineTuneEvaluator.importance"),
)
WORK = ("training", "scoring")
REPORTER_CALLS = ("started", "message", "progress", "evaluated", "generation", "refinement", "finished", "close")


class Stopwatch:
    """Seconds by category, each second in the innermost one that is running."""

    def __init__(self, clock: str) -> None:
        self.now = CLOCKS[clock]
        self.spent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._running: list[str] = ["other"]
        self._since = self.now()

    def _book(self) -> None:
        now = self.now()
        self.spent[self._running[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    @contextmanager
    def within(self, category: str) -> Iterator[None]:
        """Count for a category."""
        self._book()
        self._running.append(category)
        self.calls[category] += 1
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def timed(self, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted. A forward is training or scoring by whether gradients are wanted."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            chosen = ("training" if torch.is_grad_enabled() else "scoring") if category == "forward" else category
            if "importance" in self._running:
                chosen = "importance"
            with self.within(chosen):
                return function(*args, **kwargs)

        return wrapped

    def timed_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """An optimiser's step as training; what Lightning does in the closure around the loss is not."""

        @functools.wraps(step)
        def wrapped(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
            inner = None if closure is None else self.timed("Trainer loops", closure)
            with self.within("training"):
                return step(optimizer) if inner is None else step(optimizer, inner)

        return wrapped

    def close(self) -> None:
        """Book the rest."""
        self._book()


@contextmanager
def patched(watch: Stopwatch) -> Iterator[None]:
    """The library under timers."""
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        inherited, before = name not in vars(owner), getattr(owner, name)
        setattr(owner, name, value)
        undo.append(lambda: delattr(owner, name) if inherited else setattr(owner, name, before))

    for category, module, path in TIMED:
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        names = [n for n in REPORTER_CALLS if owner and n in owner.__dict__] if last == "*" else [last]
        for name in names:
            if owner is not None and callable(owner.__dict__.get(name)):
                put(owner, name, watch.timed(category, owner.__dict__[name]))
    put(torch.optim.AdamW, "step", watch.timed_step(torch.optim.AdamW.step))
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


def measured(chosen: Subject, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one search by category, evaluations and steps; prints a table."""
    watch = Stopwatch(given.clock)
    with patched(watch):
        result = search(chosen, folder, evaluator_options(given.cohort))
    watch.close()
    evaluations = [record.evaluation for record in result.records]
    done: Counter[Any] = Counter()
    for evaluation in evaluations:
        done[evaluation.configuration] = max(done[evaluation.configuration], evaluation.steps)
    total = sum(watch.spent.values())
    rows = [
        [name, f"{spent:.2f}", f"{spent / total:.1%}", str(watch.calls[name])]
        for name, spent in sorted(watch.spent.items(), key=lambda pair: -pair[1])
    ]
    print(f"\n### {chosen.name}: {len(evaluations)} evaluations, {sum(done.values())} steps, {total:.1f} s\n")
    print(table(["category", "seconds", "share", "calls"], rows))
    overhead = total - sum(watch.spent[name] for name in WORK)
    return {
        "seconds": dict(watch.spent), "total": total, "overhead": overhead, "evaluations": len(evaluations),
        "steps": sum(done.values()), "share": overhead / total, "training": watch.spent["training"],
        "scoring": watch.spent["scoring"],
    }  # fmt: skip


def share_at_a_second(figures: dict[str, Any]) -> float:
    """Share of the overhead if a step took a second, and scoring as many steps' time as it does now."""
    factor = figures["steps"] / figures["training"]  # seconds of a step now -> 1
    return float(figures["overhead"] / (figures["overhead"] + factor * (figures["training"] + figures["scoring"])))


def larger(chosen: Subject, folder: Path) -> Subject:
    """The same data and few steps with a random model whose step takes about a second."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = random_llama(layers=8, width=512, vocabulary=max(64, len(tokenizer)), bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    module = {**chosen.module, "learning_rate": 1e-3}
    data = {
        **{k: v for k, v in chosen.data.items() if "validation" not in k},
        "max_validation_items": 20,
        "batch_size": 16,
    }
    search = {**chosen.search, "steps": [5, 15], "generations": 1, "ranks": [4, 8], "bits": [2, 4, 8],
              "searcher": {"nsga2": {"population": 8, "offspring": 4}}, "high_fidelity_candidates": 1,
              "refiner": {"trust_region": {"max_evaluations": 2}}}  # fmt: skip
    return replace(chosen, name="random, 8 x 512", model=str(folder), module=module, data=data, search=search)


def profile(chosen: Subject, folder: Path, given: argparse.Namespace) -> None:
    """Print the functions that most time is spent in, training and scoring included."""
    profiler = cProfile.Profile()
    profiler.enable()
    search(chosen, folder, evaluator_options(given.cohort))
    profiler.disable()
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats(
        "qratk|lightning|safetensors|botorch|matplotlib|tensorboard|fsync|replace", 70
    )


def main() -> None:
    """Measure the search, and at a second a step."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--large", action="store_true", help="measure a search with a step of about a second too")
    options.add_argument("--profile", action="store_true", help="profile the quickstart search instead")
    options.add_argument("--cohort", default="auto", help="candidates side by side, where the library has that")
    given = prepared(options)
    with scratch() as folder:
        chosen = subject(given, folder)
        if given.profile:
            profile(chosen, folder / "profile", given)
            return
        results: dict[str, Any] = {"runs": []}
        for repeat in range(given.repeats):
            results["runs"].append(measured(chosen, folder / f"run-{repeat}", given))
        if given.large:
            results["large"] = measured(larger(chosen, folder / "model"), folder / "large", given)
            shutil.rmtree(folder / "large", ignore_errors=True)
    shares = sorted(run["share"] for run in results["runs"])
    reckoned = sorted(share_at_a_second(run) for run in results["runs"])
    print(f"\noverhead: {shares[len(shares) // 2]:.1%} of the search, target under 25%; per evaluation "
          f"{results['runs'][0]['overhead'] / results['runs'][0]['evaluations']:.3f} s")  # fmt: skip
    print(f"overhead at a second a step, reckoned: {reckoned[len(reckoned) // 2]:.2%}, target under 2%")
    if given.large:
        large = results["large"]
        a_step = large["training"] / large["steps"]
        print(f"overhead measured at {a_step:.2f} s a step: {large['share']:.2%} of {large['total']:.0f} s")
    finish(given, "overhead", results)


if __name__ == "__main__":
    main()
