"""A whole search, against the script that people write today for the same evaluations.

    python benchmarks/whole_search.py [--data DIR] [--evaluations N] [--repeats N]

One search of ours is run and timed from the first line to the last. Its evaluations (configurations and steps) are
then given to a script made of public libraries alone, which for each of them loads the model, quantises it
(bitsandbytes, HQQ), attaches LoRA (PEFT), trains (transformers' Trainer; same rows in the same order, batch size,
schedule, clipping) and scores the same items (lm-eval, in memory). A sample of `--evaluations` of each rung is timed,
A B A B with ours; the whole list is extrapolated rung by rung, which is said.

The script is treated kindly: it is one process, so that imports are not charged; rows are tokenised and lm-eval's task
is read before the clock starts; a promoted candidate resumes from the Trainer's checkpoint where that is quicker than
training it again; it pays for no search strategy, journal or report. Ours pays for all of it, and for importance and
the bank. What a script of one process an evaluation would pay besides, in imports, is printed, but not counted.

Both start from the same adapters. The scores printed side by side are of the library's own scorer on both models,
untimed.
"""

from __future__ import annotations

from common import (
    CLOCKS,
    Subject,
    finish,
    in_groups,
    paired_ratios,
    parser,
    prepared,
    scratch,
    seconds,
    silent,
    spread,
    subject,
    table,
    verdict,
)

# isort: split
import contextlib
import inspect
import io
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rivals
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qratk.adapters.matrices.drawing import initial_a
from qratk.backbone.logits import labelled_logits, target_log_likelihood
from qratk.core import Candidate, Configuration, Evaluation, Request
from qratk.core.evaluation import FidelityLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.optimisation import learning_rate_factor

STAGES = ("load", "quantise", "attach", "train", "score")


class InOrder(torch.utils.data.Dataset[dict[str, Any]]):
    """Training rows in the order of the run."""

    def __init__(self, data: Any, steps: int) -> None:
        rows = data.training_rows()
        sampler = data.train_dataloader().batch_sampler
        self.rows = [rows[index] for k in range(steps) for index in sampler.batch(k)]
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@dataclass
class Script:
    """The script: one model and one task, every evaluation from scratch or from the Trainer's own checkpoint."""

    subject: Subject
    folder: Path
    ladder: FidelityLadder
    clock: str
    resume: bool = True
    spent: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})

    def __post_init__(self) -> None:
        from lm_eval.tasks import TaskManager, get_task_dict

        from qratk.data.lm_eval import write_task

        module = self.subject.make_module()
        self.data = self.subject.make_data()
        self.data.attach(module.tokenizer, context_length=module.context_length)
        self.data.setup("fit")
        self.tokenizer, self.options = module.tokenizer, module.options
        self.rows = InOrder(self.data, self.ladder.highest)
        write_task(self.folder / "task", "validation_items", self.data, split="validation")
        manager = TaskManager(include_path=[str(self.folder / "task")], include_defaults=False)  # its index takes 20 s
        self.task = get_task_dict(["validation_items"], manager)

    def evaluate(self, configuration: Configuration, steps: int) -> tuple[Any, dict[str, float]]:
        """The trained model, and lm-eval's figures."""
        now = CLOCKS[self.clock]
        times = [now()]
        model = AutoModelForCausalLM.from_pretrained(self.subject.model, dtype=torch.float32)
        times.append(now())
        names = rivals.projections(model)
        rivals.quantise(model, configuration.bits)
        times.append(now())
        model = rivals.lora(model, names, configuration.ranks)
        times.append(now())
        self._start_as_ours(model)
        restarted = now()
        self._train(model, configuration, steps)
        trained = now()
        figures = self._score(model)
        ended = now()
        marks = [
            (times[0], times[1]),
            (times[1], times[2]),
            (times[2], times[3]),
            (restarted, trained),
            (trained, ended),
        ]
        for stage, (begin, end) in zip(STAGES, marks, strict=True):
            self.spent[stage].append(end - begin)
        return model, figures

    @property
    def last_seconds(self) -> float:
        """Seconds of the last evaluation, without what is there for comparison only."""
        return sum(self.spent[stage][-1] for stage in STAGES)

    def _start_as_ours(self, model: Any) -> None:
        # Not timed: for comparable scores.
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                a = module.lora_A["default"].weight
                a.data.copy_(initial_a(name, a.shape[0], a.shape[1], seed=self.options.seed))

    def _train(self, model: Any, configuration: Configuration, steps: int) -> None:
        options = self.options
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        total, warm_up, schedule = self.ladder.highest, options.warmup_steps, options.schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total, warm_up, schedule)
        )
        folder = self.folder / "trainer" / configuration.digest
        lower = [rung for rung in self.ladder.steps if rung < steps and (folder / f"checkpoint-{rung}").is_dir()]
        continues = steps < self.ladder.highest
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=self.data.batch_size,
            max_grad_norm=self.subject.clip,
            train_sampling_strategy="sequential",
            save_strategy="steps" if continues else "no",
            save_steps=steps,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=options.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=self.rows.collate,
            optimizers=(optimizer, scheduler),
        )
        resumed = str(folder / f"checkpoint-{lower[-1]}") if lower and self.resume else None
        with silent():
            trainer.train(resume_from_checkpoint=resumed)

    def _score(self, model: Any) -> dict[str, float]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.data.eval_batch_size)
        with silent():
            results: Any = evaluate(harness, self.task, bootstrap_iters=0, log_samples=False)
        figures = results["results"]["validation_items"]
        return {name.removesuffix(",none"): float(figures[name]) for name in ("acc,none", "acc_norm,none")}

    def our_figures(self, model: Any) -> dict[str, float]:
        """What the library's scorer says of a model, untimed."""
        scorer = self.data.scorer("validation")
        model.eval()
        with torch.inference_mode():
            for batch in self.data.scoring_batches("validation"):
                scorer.update(batch, *target_log_likelihood(labelled_logits(model, batch), batch))
        return {name: float(value) for name, value in scorer.compute().items()}

    def forget(self) -> None:
        """Drop the Trainer's checkpoints."""
        shutil.rmtree(self.folder / "trainer", ignore_errors=True)


# Ours


def evaluator_options(cohort: str | None) -> dict[str, Any]:
    """The evaluator's options; side by side where the library has it and nothing else was asked for."""
    if "cohort" not in inspect.signature(FineTuneEvaluator).parameters:
        return {}
    return {} if cohort is None else {"cohort": cohort if cohort == "auto" else int(cohort)}


def search(subject: Subject, folder: Path, options: dict[str, Any]) -> Any:
    """Result of one whole search, with all its reports."""
    from functools import partial

    from lightning import Trainer as LightningTrainer

    from qratk.reporters.standard import standard_reporters
    from qratk.settings.recipe import autoqra

    loop = autoqra(evaluator={"finetune": options}, test=False, **subject.search)
    with contextlib.closing(standard_reporters(folder, stream=io.StringIO())) as reporter:
        return loop.run(
            run_dir=folder,
            reporter=reporter,
            config={},
            module=subject.make_module(),
            datamodule=subject.make_data(),
            trainer=partial(LightningTrainer, gradient_clip_val=subject.clip, accelerator="cpu"),
        )


def timed_search(subject: Subject, folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Result of a search that finds no bank, and its seconds by clock."""
    os.environ["QRATK_CACHE"] = str(folder / "banks")
    began = {clock: now() for clock, now in CLOCKS.items()}
    result = search(subject, folder, options)
    return result, {clock: now() - began[clock] for clock, now in CLOCKS.items()}


def opened(subject: Subject, folder: Path, ladder: FidelityLadder, options: dict[str, Any]) -> FineTuneEvaluator:
    """An evaluator in a directory of its own, with its bank built."""
    from functools import partial

    from lightning import Trainer as LightningTrainer

    evaluator = FineTuneEvaluator(**options)
    trainer = partial(LightningTrainer, gradient_clip_val=subject.clip, accelerator="cpu")
    module, data = subject.make_module(), subject.make_data()
    evaluator.open(EvaluationContext(folder, ladder, 0, module, data, trainer, (), lambda text: None))
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace(tuple(subject.search["bits"]), tuple(subject.search["ranks"]), names))
    return evaluator


def requests(configurations: Sequence[Configuration], steps: int) -> list[Request]:
    """Requests of one rung."""
    return [Request(Candidate(configuration, "benchmark"), steps) for configuration in configurations]


# The comparison


@dataclass
class Comparison:
    """Sampled evaluations of each rung, by the script and by ours, repeat by repeat."""

    script: Script
    evaluator: FineTuneEvaluator
    sample: dict[int, list[Configuration]]
    ours: dict[int, list[float]] = field(default_factory=dict)
    theirs: dict[int, list[float]] = field(default_factory=dict)
    agreement: dict[tuple[int, str], tuple[float, float, float, float]] = field(default_factory=dict)

    def repeat(self) -> None:
        """Each rung by ours, then by the script; candidates of a higher rung continue from the lower one in both."""
        for folder in (self.evaluator.parts.context.run_dir / "checkpoints",):
            shutil.rmtree(folder, ignore_errors=True)
        self.script.forget()
        for steps, configurations in self.sample.items():
            self._prepare(steps, configurations)
            measured: list[Evaluation] = []
            asked = requests(configurations, steps)
            spent = seconds(lambda a=asked, m=measured: m.extend(in_groups(self.evaluator, a)), self.script.clock)  # type: ignore[misc]
            self.ours.setdefault(steps, []).append(spent / len(configurations))
            times = []
            for evaluation in measured:
                model, figures = self.script.evaluate(evaluation.configuration, steps)
                times.append(self.script.last_seconds)
                if (steps, str(evaluation.configuration)) not in self.agreement:
                    same = self.script.our_figures(model)
                    self.agreement[steps, str(evaluation.configuration)] = (
                        evaluation.score, same["score"], figures["acc"], same["acc"]
                    )  # fmt: skip
            self.theirs.setdefault(steps, []).append(statistics.mean(times))

    def _prepare(self, steps: int, configurations: Sequence[Configuration]) -> None:
        # Lower rungs of promoted candidates that are not in the sample of the lower rung, untimed.
        for rung in (r for r in self.script.ladder.steps if r < steps):
            missing = [c for c in configurations if c not in self.sample.get(rung, [])]
            in_groups(self.evaluator, requests(missing, rung))
            if self.script.resume:
                for configuration in missing:
                    self.script.evaluate(configuration, rung)
                    for stage in STAGES:
                        self.script.spent[stage].pop()


def sampled(evaluations: Sequence[Evaluation], number: int) -> dict[int, list[Configuration]]:
    """Up to `number` configurations of each rung; those of a higher rung are taken first, so that they continue."""
    draw = random.Random(0)
    rungs = sorted({e.steps for e in evaluations})
    chosen: dict[int, list[Configuration]] = {}
    promoted: list[Configuration] = []
    for steps in reversed(rungs):
        here = [e.configuration for e in evaluations if e.steps == steps]
        first = [c for c in promoted if c in here]
        rest = [c for c in here if c not in first]
        chosen[steps] = (first + draw.sample(rest, len(rest)))[:number]
        promoted = chosen[steps]
    return {steps: chosen[steps] for steps in rungs}


def whether_resuming_pays(script: Script, configuration: Configuration) -> bool:
    """Whether the Trainer reaches the highest rung sooner from its checkpoint than from scratch."""
    low, high = script.ladder.lowest, script.ladder.highest
    times = {}
    for resume in (True, False):
        script.forget()
        script.resume = True
        script.evaluate(configuration, low)  # warms up, and leaves the checkpoint
        script.resume = resume
        script.evaluate(configuration, high)
        times[resume] = script.last_seconds
    script.forget()
    for stage in STAGES:
        script.spent[stage].clear()
    return times[True] <= times[False]


def import_seconds() -> float:
    """CPU seconds of a new process that only imports what the script needs."""
    modules = "import torch, transformers, peft, bitsandbytes.nn, hqq.core.quantize, lm_eval.evaluator, lm_eval.tasks"
    code = f"{modules}; from transformers import Trainer; import time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Search, repeat by the script, compare."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--evaluations", type=int, default=3, help="sampled of each rung")
    options.add_argument("--searches", type=int, default=2, help="whole searches of ours: one before, the others after")
    options.add_argument("--generations", type=int, help="of the search, for a shorter one")
    options.add_argument("--cohort", default="auto", help="candidates side by side, where the library has that")
    given = prepared(options)
    mine = evaluator_options(given.cohort)
    with scratch() as folder:
        chosen = subject(given, folder)
        if given.generations is not None:
            chosen = replace(chosen, search={**chosen.search, "generations": given.generations})
        print(f"{chosen.name}; clock: {given.clock}", flush=True)
        result, whole = timed_search(chosen, folder / "first", mine)
        evaluations = [record.evaluation for record in result.records]
        ladder = result.plan.ladder
        counts = {steps: sum(e.steps == steps for e in evaluations) for steps in ladder.steps}
        print(f"our search: {whole[given.clock]:.1f} s for {counts} evaluations by steps", flush=True)
        script = Script(chosen, folder, ladder, given.clock)
        sample = sampled(evaluations, given.evaluations)
        script.resume = whether_resuming_pays(script, sample[ladder.highest][0])
        comparison = Comparison(script, opened(chosen, folder / "ours", ladder, mine), sample)
        for _ in range(given.repeats):
            comparison.repeat()
        again = [timed_search(chosen, folder / f"again-{n}", mine)[1] for n in range(1, given.searches)]
        results = report(comparison, counts, [whole, *again], given.clock)
    finish(given, "whole_search", {"subject": chosen.name, **results})


def report(
    comparison: Comparison, counts: dict[int, int], searches: Sequence[dict[str, float]], clock: str
) -> dict[str, Any]:
    """Print the tables; the figures as plain data."""
    ours, theirs, script = comparison.ours, comparison.theirs, comparison.script
    rows = [
        [f"{steps} steps", str(counts[steps]), str(len(comparison.sample[steps])), spread(theirs[steps]),
         spread(ours[steps], digits=3), spread(paired_ratios(theirs[steps], ours[steps]), digits=1)]
        for steps in counts if steps in ours
    ]  # fmt: skip
    print(table(["rung", "evaluations", "sampled", "script, s each", "ours, s each", "ratio"], rows))
    print(f"promoted candidates of the script {'resume' if script.resume else 'are trained again'}, the quicker way")
    total = sum(statistics.mean(script.spent[stage]) for stage in STAGES)
    shares = ", ".join(
        f"{stage} {statistics.mean(script.spent[stage]):.2f} s ({statistics.mean(script.spent[stage]) / total:.0%})"
        for stage in STAGES
    )
    print(f"the script's mean evaluation: {shares}")
    print(table(
        ["evaluation", "score, ours", "score, script", "lm-eval acc", "our acc of the same"],
        [[f"{name} at {steps}", *(f"{value:.4f}" for value in values)]
         for (steps, name), values in comparison.agreement.items()],
    ))  # fmt: skip
    repeats = range(len(next(iter(ours.values()))))
    script_whole = [sum(counts[s] * theirs[s][r] for s in theirs) for r in repeats]
    ours_parts = [sum(counts[s] * ours[s][r] for s in ours) for r in repeats]
    ratios = [value / whole[clock] for value in script_whole for whole in searches]
    print(f"all {sum(counts.values())} evaluations, extrapolated by rung: script {spread(script_whole, digits=1)} s, "
          f"ours {spread(ours_parts, digits=1)} s, "
          f"ratio {spread(paired_ratios(script_whole, ours_parts), digits=1)}")  # fmt: skip
    imports = import_seconds()
    print(f"a process for each evaluation would add {imports:.1f} s of imports to each, not counted")
    for whole in searches:
        print(f"our search from the first line to the last: {whole['cpu']:.1f} s CPU, {whole['wall']:.1f} s wall")
    print(verdict("script (extrapolated) / our whole search", ratios, at_least=10.0))
    return {
        "counts": counts, "ours_seconds": ours, "script_seconds": theirs, "script_stages": script.spent,
        "whole_search_seconds": searches, "script_whole_seconds": script_whole, "ratio_whole": ratios,
        "ratio_evaluations": paired_ratios(script_whole, ours_parts), "resumes": script.resume,
        "import_seconds": imports,
        "agreement": {f"{name} at {steps}": v for (steps, name), v in comparison.agreement.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
