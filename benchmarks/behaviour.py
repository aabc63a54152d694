"""Digests of what the commands decide, measure and write, to show that two states of the code behave alike.

    python benchmarks/behaviour.py --out before.json [--tree DIR] [--keep DIR]
    python benchmarks/behaviour.py --against benchmarks/behaviour.json [--only 'searcher-*' quickstart]

Runs small searches, fits, plans and a comparison through the command line alone, reads the files that they write, and
takes a SHA-256 of each part: scores, configurations, bytes, decisions, states of strategies, tensors. Floats enter to
the last bit; seconds, versions, paths, the order in time and import paths do not enter. Nothing of the package is
imported but its command, so that one script serves trees whose modules lie elsewhere: `--tree` is the checkout whose
package runs.

The file is {"about": ..., case: {part: digest}}; "about" is not compared. Digests of trained scores and of adapters
hold for one type of processor and one set of library versions only, those of "about": elsewhere, make the record of
the earlier tree anew. `--against` ends with status 1 on a difference; `--keep` writes each part as text, and `diff -r`
of two such folders shows what differs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import hashlib
import importlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import yaml

Plain: TypeAlias = "str | int | float | bool | list[Plain] | dict[str, Plain] | None"
Parts: TypeAlias = dict[str, str]  # normalised text by part
Digests: TypeAlias = dict[str, dict[str, str]]  # by case and part

ROOT: Final = Path(__file__).resolve().parent.parent
ENVIRONMENT: Final = {  # before numpy and torch are imported
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
DEPTHS: Final = (12, 32)
# Imported before the cases are forked off, so that each need not do it again.
PRELOADED: Final = (
    "torch", "lightning.pytorch", "lightning.pytorch.cli", "transformers", "peft", "botorch", "gpytorch", "pymoo",
    "sklearn", "matplotlib.pyplot", "jsonargparse", "datasets", "torchmetrics", "bitsandbytes", "hqq",
)  # fmt: skip
LIBRARIES: Final = (
    "bitsandbytes", "botorch", "gpytorch", "hqq", "lightning", "numpy", "peft", "pymoo", "scikit-learn", "scipy",
    "torch", "transformers",
)  # fmt: skip


# The command


class CommandError(Exception):
    """A command did not end with status 0."""


def qratk(*arguments: str) -> str:
    """What a command prints to standard output. Raises `CommandError` when it fails."""
    main: Callable[[Sequence[str]], int] = importlib.import_module("qratk.__main__").main
    print(f"$ qratk {' '.join(arguments)}", file=sys.stderr, flush=True)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            status: int | str | None = main(arguments)
    except SystemExit as stop:
        status = stop.code
    print(printed.getvalue(), flush=True)
    if status not in (0, None):
        raise CommandError(f"`qratk {' '.join(arguments)}` ended with status {status}")
    return printed.getvalue()


def own_components(kind: str) -> list[str]:
    """Names of this package's own components of a kind, as the command lists them; without those of plugins."""
    rows = re.findall(r"^  (\w+)  (?:(\[[\w-]+\])|\S)", qratk("components", kind), re.M)
    return [name for name, owner in rows if not owner]


# Normalised text


def text_of(value: Plain) -> str:
    """JSON with sorted keys, floats by repr, import paths by their last part, and this run's folder as RUN."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False)
    text = re.sub(r"\bqratk(?:\.\w+)+\.(\w+)\b", r"\1", text)
    return text.replace(str(Path.cwd()), "RUN") + "\n"


def without(value: Plain, *names: str) -> Plain:
    """Nested plain data without the entries of these names."""
    if isinstance(value, dict):
        return {key: without(item, *names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [without(item, *names) for item in value]
    return value


def chosen(row: Mapping[str, Plain], names: Iterable[str]) -> dict[str, Plain]:
    """The entries of these names, so that one that is added later is no difference."""
    return {name: row.get(name) for name in names}


def table(path: Path, *, drop: Sequence[str]) -> Plain:
    """Rows of a CSV file, without columns whose name holds one of these words."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: cell for name, cell in row.items() if not any(word in name for word in drop)}
            for row in csv.DictReader(file)
        ]


def tensors(path: Path) -> dict[str, Plain]:
    """Type, shape and SHA-256 of every tensor of a safetensors file, whatever else is noted in it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    found: dict[str, Plain] = {}
    for name, about in head.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            found[name] = [about["dtype"], about["shape"], hashlib.sha256(body[begin:end]).hexdigest()]
    return found


def one(pattern: str, folder: Path = Path()) -> Path:
    """The only file below a folder that matches. Raises `FileNotFoundError` when there are none or several."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"there are {len(found)} files {pattern} below {folder.resolve()}, not one")
    return found[0]


# What a search writes

EVALUATION: Final = (
    "configuration", "digest", "steps", "score", "bytes", "fits", "storage_bytes", "training_bytes", "serving_bytes",
    "fixed_bytes", "average_bits", "average_rank", "status", "reason",
)  # fmt: skip
CSV_COLUMNS: Final = (
    "phase", "generation", "origin", "bits", "ranks", "steps", "score", "storage_bytes", "average_bits", "average_rank",
    "status", "reason",
)  # fmt: skip
REQUEST: Final = ("configuration", "origin", "parents", "generation", "phase", "steps")
LATER: Final = (
    "log_likelihood_per_token", "log_likelihood_per_char", "log_likelihood_fitted", "log_likelihood_per_token_fitted",
    "log_likelihood_per_char_fitted", "prob", "prob_per_token", "prob_per_char",
)  # fmt: skip
"""Figures that scorings say since the record was made."""
RESULT: Final = (
    "best", "baselines", "references", "comparisons", "test_scores", "hypervolume_by_generation", "generations",
    "refinements", "evaluations_by_rung", "failed_evaluations", "item_weights", "top3_hit_rates", "proposals",
    "utility",
)  # fmt: skip
PROBLEM: Final = (
    "layers", "bits", "ranks", "log10_configurations", "limit_bytes", "scope", "max_average_bits", "fixed_bytes",
    "importance", "steps", "reduction_factor",
)  # fmt: skip
PHASES: Final = ("baseline", "global", "local", "reference")


def of_search(run: Path) -> Parts:
    """The parts of a finished search, of the files in its folder."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    front = json.loads((run / "front.json").read_text(encoding="utf-8"))
    parts = of_journal(run / "journal.sqlite")
    parts["evaluations.csv"] = text_of([chosen(row, CSV_COLUMNS) for row in _rows(run / "evaluations.csv")])
    parts["front"] = text_of(_measured(front))
    parts["best"] = text_of(_best(run / "best.yaml"))
    told = {**chosen(result, RESULT), "problem": chosen(result["problem"], PROBLEM)}
    parts["result"] = text_of(_measured(without(told, *LATER)))
    parts["stops"] = text_of(result["stop_reasons"])
    kept = sorted(json.dumps(tensors(path), sort_keys=True) for path in run.rglob("adapter*.safetensors"))
    if kept:
        parts["checkpoints"] = text_of([json.loads(text) for text in kept])
    return parts


def of_journal(path: Path) -> Parts:
    """Evaluations, bytes, decisions, states of strategies and importance, as the journal holds them."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        evaluations = [dict(row) for row in database.execute("SELECT * FROM evaluations")]
        decisions = {row["key"]: json.loads(row["value"]) for row in database.execute("SELECT * FROM decisions")}
    evaluations.sort(key=lambda e: (PHASES.index(e["phase"]), e["generation"], e["steps"], e["configuration"]))
    names = ("phase", "generation", "origin", "configuration", "digest", "steps", "score", "status", "reason")
    importance = decisions.pop("importance", None)
    decisions.pop("compute_dtype", None)  # recorded since the record was made
    return {
        "evaluations": text_of(
            [
                {**chosen(e, names), "outcomes": json.loads(e["outcomes"]), "parents": json.loads(e["parents"])}
                for e in evaluations
            ]
        ),
        "bytes": text_of(
            {f"{e['configuration']}, {e['steps']} steps": json.loads(e["footprint"]) for e in evaluations}
        ),
        "importance": text_of(importance),
        "decisions": text_of({key: _decided(value) for key, value in decisions.items()}),
        "states": text_of(
            {key: without(value, "requests") for key, value in decisions.items() if _is_asked(value)},
        ),
    }


def _is_asked(decision: Plain) -> bool:
    return isinstance(decision, dict) and "requests" in decision


def _decided(decision: Plain) -> Plain:
    """What was asked for, in the order of the strategy; any other decision as it stands, less figures added later."""
    if not isinstance(decision, dict) or "requests" not in decision:
        return without(decision, *LATER)
    requests = decision["requests"]
    assert isinstance(requests, list)
    return [chosen(request, REQUEST) for request in requests if isinstance(request, dict)]


def _measured(value: Plain) -> Plain:
    """Nested data with evaluations cut down to `EVALUATION`, and without what differs from run to run or came later."""
    if isinstance(value, list):
        return [_measured(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "digest" in value and "score" in value:
        return chosen(value, EVALUATION)
    # "over" says what an interval is over: of items alone, as it was before others came, it is left out.
    return {k: _measured(item) for k, item in value.items() if k != "seconds" and (k, item) != ("over", "items")}


def _rows(path: Path) -> list[dict[str, Plain]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _best(path: Path) -> Plain:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = document["model"]
    options = model.get("init_args", model)
    return [options["configuration"], document["trainer"]["max_steps"]]


# The cases


@dataclass(frozen=True)
class Configs:
    """Where the example configurations of a tree are."""

    folder: Path

    @classmethod
    def of(cls, tree: Path, given: Path | None) -> Configs:
        """Those that are given, or of `configs` in the tree or its package. Raises `FileNotFoundError`."""
        places = [given] if given is not None else [tree / "configs", tree / "qratk" / "configs"]
        for place in places:
            if (place / "quickstart.yaml").exists():
                return cls(place.resolve())
        raise FileNotFoundError(f"there is no quickstart.yaml in {', '.join(map(str, places))}: give --configs DIR")

    def arguments(self, *names: str) -> tuple[str, ...]:
        """Options of a command that lay these files over one another."""
        return tuple(word for name in names for word in ("--config", str(self.folder / f"{name}.yaml")))


Case: TypeAlias = Callable[[Configs], Parts]

QUIET: Final = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
LOGGED: Final = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.log_every_n_steps=1")
SMALL_SIMULATED: Final = (
    "--search.generations=4",
    "--search.searcher.offspring=10",
    "--search.high_fidelity_candidates=4",  # eight pairs after two generations: surrogates are fitted
    "--search.max_evaluations=22",
    "--search.refiner.max_evaluations=5",
    "--search.refiner.pool_size=100",
)
TINY: Final = (  # a search on the embedded model that measures hardly anything
    "--search.steps=[1, 2]", "--search.generations=1", "--search.high_fidelity_candidates=1", "--search.ranks=[4, 8]",
    "--search.searcher.offspring=3", "--search.refiner=none", "--search.evaluator.cohort=2",
    "--data.max_validation_items=32", "--data.max_test_items=32",
)  # fmt: skip
# The adapters' methods and the places where they begin, with few steps each: settings of a fit.
FITS: Final[dict[str, tuple[str, ...]]] = {
    "lora": (),
    "packed": ("--model.dense_cache=off",),
    "rslora": ("--model.rslora=true", "--model.schedule=cosine"),
    "loftq": ("--model.quantizers={4: nf4}", "--model.init=loftq"),
    "lq_lora": ("--model.init=lq_lora",),
    "adalora": ("--model.quantizers={4: nf4}", "--model.adapter=adalora"),
    "qa_lora": (
        "--model.quantizers={4: {class_path: hqq, init_args: {group_size: 32}}}", "--model.input_groups=32",
    ),
    "gptq": ("--model.quantizers={4: gptq}",),
    "awq": ("--model.quantizers={4: awq}",),
    "mixed": ("--model.configuration=2:4 4:8*3 8:2 16:4 4:0*2 2:16*4",),
    "sublayer": ("--model.granularity=sublayer", "--model.configuration=4:8*12 2:4*12"),
    "dropout": ("--model.lora_dropout=0.1", "--model.gradient_checkpointing=true", "--model.adapter_dtype=float16"),
}  # fmt: skip
ESTIMATORS: Final = (
    ("activation_error", "fisher_residual"),
    ("gradient_norm", "gradient_spectrum"),
    ("hessian_trace", "quantization_error"),
    ("fisher_residual", "uniform"),
)


def search(configs: Configs, *names: str, settings: Sequence[str] = ()) -> Parts:
    """The parts of a search with these configurations and settings."""
    qratk("search", *configs.arguments(*names), "--run_dir=run", *QUIET, *settings)
    return of_search(Path("run"))


def simulated(depth: int, *settings: str, over: Sequence[str] = ()) -> Case:
    """A search on a simulated landscape of so many layers."""
    given = (f"--search.evaluator.num_layers={depth}", *SMALL_SIMULATED, *settings)
    return lambda configs: search(configs, "simulated", *over, settings=given)


def with_searcher(name: str, depth: int) -> Case:
    """Phase I by one searcher."""
    choice = f"--search.searcher={name}"
    if name == "fixed":
        texts = [f"{bits}:{rank}*{depth}" for bits, rank in ((4, 8), (4, 4), (2, 16), (2, 4))]
        choice = "--search.searcher=" + json.dumps({"class_path": name, "init_args": {"configurations": texts}})
    return simulated(depth, choice, "--search.refiner=none")


def tiny(*settings: str) -> Case:
    """A search on the embedded model that measures hardly anything."""
    return lambda configs: search(configs, "quickstart", settings=(*TINY, *settings))


def fit(*settings: str) -> Case:
    """A few steps of one configuration: losses, scores, and the adapter's tensors."""

    def run(configs: Configs) -> Parts:
        given = ("--model.configuration=4:8", "--trainer.max_steps=6", "--data.max_validation_items=48", *settings)
        qratk("fit", *configs.arguments("quickstart"), *QUIET, *LOGGED, *given)
        return of_fit(Path())

    return run


def of_fit(folder: Path) -> Parts:
    """The parts of a fit, of the files below a folder."""
    names = ("step", "train/loss", *(f"validation/{n}" for n in ("score", "acc", "acc_norm", "log_likelihood", "nats")))
    return {
        "scores": text_of([chosen(row, names) for row in _rows(one("metrics.csv", folder))]),
        "adapter": text_of(tensors(one("adapter_model.safetensors", folder))),
    }


def quickstart(configs: Configs) -> Parts:
    """The quickstart's search, a fit of its best, and the test scores and predictions of that fit."""
    parts = search(configs, "quickstart", settings=("--search.evaluator.cohort=4",))
    qratk(
        "fit",
        "--config=run/best.yaml",
        *QUIET,
        *LOGGED,
        "--trainer.default_root_dir=fit",
        "--trainer.logger.save_dir=fit",
    )
    parts |= {f"fit {name}": text for name, text in of_fit(Path("fit")).items()}
    after = ("--config=run/best.yaml", *QUIET, f"--ckpt_path={one('*.ckpt', Path('fit'))}")
    qratk("test", *after, *LOGGED, "--trainer.logger.save_dir=test")
    parts["fit tested"] = text_of(table(one("metrics.csv", Path("test")), drop=("epoch", "second", *LATER)))
    qratk("predict", *after, "--trainer.default_root_dir=predict")
    lines = one("predictions.jsonl", Path("predict")).read_text(encoding="utf-8").splitlines()
    parts["fit predictions"] = text_of([json.loads(line) for line in lines])
    return parts


def plan(*settings: str, over: Sequence[str] = ()) -> Case:
    """What a search would take, without what is measured of the machine."""

    def run(configs: Configs) -> Parts:
        printed = qratk("plan", *configs.arguments("quickstart", *over), "--json", *settings)
        document = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
        names = (
            "num_layers",
            "parameters",
            "log10_size",
            "budget",
            "binds",
            "evaluations",
            "steps",
            "workload",
            "batch",
        )
        return {
            "figures": text_of(without(chosen(document, names), "source")),
            "bytes": text_of(document["rows"]),
            "memory": text_of(document["search_memory"]),
            "notes": text_of(document["fallbacks"]),
        }

    return run


def compared(configs: Configs) -> Parts:
    """Three recipes and their base on two simulated landscapes: tables, figures' data, and every cell."""
    recipes = [str(configs.folder / "ablations" / f"{name}.yaml") for name in ("as_published", "random", "bo_only")]
    given = ("--search.evaluator.num_layers=12", *SMALL_SIMULATED, "--search.max_evaluations=12")
    base = configs.arguments("simulated")
    qratk("compare", *base, "--recipes", *recipes, "--seeds", "0", "1", "--jobs", "1", "--run_dir", "all", *given)
    everything = Path("all")
    parts = {
        name: text_of(table(one(name, everything), drop=("second", "time"))) for name in ("cells.csv", "table.csv")
    }
    parts["table.md"] = _without_time(one("table.md", everything).read_text(encoding="utf-8"))
    parts["figures"] = text_of(
        {path.name: table(path, drop=("second", "time")) for path in sorted(everything.rglob("figures/*.csv"))}
    )
    cells = [of_journal(path) for path in sorted(everything.rglob("journal.sqlite"))]
    return parts | {name: "".join(cell[name] for cell in cells) for name in ("evaluations", "decisions", "states")}


def _without_time(markdown: str) -> str:
    """A table in Markdown without its column of times."""
    lines, position = [], None
    for line in markdown.splitlines():
        cells = line.split("|")
        if " time " in cells:
            position = cells.index(" time ")
        if position is not None and len(cells) > position:
            del cells[position]
        lines.append("|".join(cells))
    return "\n".join(lines) + "\n"


def all_cases() -> dict[str, Case]:
    """Every case by name; open sets are listed by the command itself."""
    cases: dict[str, Case] = {
        "quickstart": quickstart,
        "plan-quickstart": plan(),
        "plan-training": plan("--search.scope=training", "--search.references=[[16, 16]]", "--search.bits=[2, 3, 4]"),
        "plan-attention": plan("--trainer.accumulate_grad_batches=2", over=["baselines/qlora_attention"]),
        "compare": compared,
    }
    for depth in DEPTHS:
        cases[f"as-published-{depth}"] = simulated(depth, over=["ablations/as_published"])
        cases |= {f"searcher-{name}-{depth}": with_searcher(name, depth) for name in own_components("searchers")}
        for name in own_components("refiners"):
            cases[f"refiner-{name}-{depth}"] = simulated(depth, f"--search.refiner={name}")
    repairs = own_components("repairs")
    for number, surrogate in enumerate(own_components("surrogates")):
        repair = repairs[number % len(repairs)]
        choice = (f"--search.surrogate={surrogate}", f"--search.repair={repair}")
        cases[f"strategies-{surrogate}-{repair}"] = simulated(12, *choice, "--search.refiner=none")
    everything = json.dumps(own_components("mutations"))
    cases["mutations"] = simulated(12, f"--search.mutations={everything}", "--search.refiner=none")
    cases |= {f"fit-{name}": fit(*settings) for name, settings in FITS.items()}
    for bits, rank in ESTIMATORS:
        choice = (f"--search.bits_importance={bits}", f"--search.rank_importance={rank}")
        cases[f"importance-{bits}-{rank}"] = tiny(*choice, "--search.uniform_baselines=false")
    cases["frozen-divergence"] = tiny("--search.evaluator=frozen_divergence", "--search.promotion=last")
    cases["search-adalora"] = tiny("--model.adapter=adalora")
    return cases


# Running


@dataclass(frozen=True)
class Outcome:
    """The parts of a case, or why it failed."""

    parts: Parts
    failure: str = ""

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each part."""
        return {part: hashlib.sha256(text.encode()).hexdigest() for part, text in sorted(self.parts.items())}


def in_a_process(case: Case, configs: Configs, folder: Path) -> Outcome:
    """Outcome of a case in a process and a folder of its own, so that none sees what another left behind."""
    folder.mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(case, configs, folder))
    process.start()
    process.join()
    written = folder / "parts.json"
    if process.exitcode == 0 and written.exists():
        return Outcome(json.loads(written.read_text(encoding="utf-8")))
    return Outcome({}, f"status {process.exitcode}, see the end of {folder / 'log.txt'}")


def _work(case: Case, configs: Configs, folder: Path) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
    os.chdir(folder)
    os.environ["QRATK_CACHE"] = str(folder / "banks")  # every tree quantises by its own code
    try:
        parts = case(configs)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / "parts.json").write_text(json.dumps(parts), encoding="utf-8")


def use(tree: Path) -> None:
    """Have the package of a tree imported, here and in the processes that commands begin. Raises `ImportError`."""
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH", ""))))
    found = importlib.import_module("qratk").__file__
    if found is None or not Path(found).is_relative_to(tree):
        raise ImportError(f"qratk is imported from {found}, not from {tree}")


def seconds_of_children() -> float:
    """Processor time of the cases that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def preload() -> None:
    """Import libraries, and have figures made but not drawn: that is most of a small search, and none is compared."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    figure = importlib.import_module("matplotlib.figure").Figure
    figure.draw = figure.savefig = lambda *_, **__: None


def about(tree: Path) -> Plain:
    """Commit, versions and processor."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True).stdout.strip()

    changed = " and changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": git("rev-parse", "HEAD") + changed,
        "python": platform.python_version(),
        "processor": names[0] if names else platform.machine(),
        "instructions": importlib.import_module("torch").backends.cpu.get_cpu_capability(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


# Comparing


def judged(name: str, found: Digests, known: Digests, failures: Mapping[str, str]) -> str:
    """How a case stands against the record."""
    if name in failures:
        return f"failed: {failures[name]}"
    if name not in known:
        return "not in the record"
    if name not in found:
        return "missing"
    parts = sorted({*found[name], *known[name]})
    different = [part for part in parts if found[name].get(part) != known[name].get(part)]
    return f"different: {', '.join(different)}" if different else "equal"


def compare(found: Digests, known: Digests, failures: Mapping[str, str], only: Sequence[str]) -> bool:
    """Whether nothing differs from the record; prints how each case stands."""
    names = [name for name in [*known, *(n for n in (*found, *failures) if n not in known)] if selected(name, only)]
    verdicts = {name: judged(name, found, known, failures) for name in names}
    width = max(map(len, names), default=0)
    for name, verdict in verdicts.items():
        print(f"{name:<{width}} | {verdict}")
    good = sum(verdict in ("equal", "not in the record") for verdict in verdicts.values())
    print(f"{good} of {len(verdicts)} without a difference")
    return good == len(verdicts)


def selected(name: str, only: Sequence[str]) -> bool:
    """Whether a case was asked for."""
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


def read(path: Path) -> Digests:
    """The digests of a record."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document.pop("about", None)
    return dict(document)


def keep(outcome: Outcome, folder: Path) -> None:
    """Write each part as text."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in outcome.parts.items():
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose package is run; default: this one")
    parser.add_argument("--configs", type=Path, help="folder of quickstart.yaml; default: of the tree or its package")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="names, or patterns such as 'fit-*'")
    parser.add_argument("--list", action="store_true", help="print the names of all cases, and run none")
    parser.add_argument("--out", type=Path, help="file for the digests")
    parser.add_argument("--against", type=Path, help="record to compare with")
    parser.add_argument("--keep", type=Path, help="folder for the text of every part")
    return parser.parse_args()


def main() -> int:
    """Run, record and compare; 1 when a case failed or differs."""
    given = options()
    os.environ.update(ENVIRONMENT)
    tree = given.tree.resolve()
    use(tree)
    configs = Configs.of(tree, given.configs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cases = all_cases()
    cases = {name: case for name, case in cases.items() if selected(name, given.only)}
    if given.list:
        print("\n".join(cases))
        return 0
    known = {} if given.against is None else read(given.against)
    preload()
    found: Digests = {}
    failures: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix="qratk-behaviour-"))
    for name, case in cases.items():
        began = seconds_of_children()
        outcome = in_a_process(case, configs, folder / name)
        print(
            f"{name}: {outcome.failure or 'done'} ({seconds_of_children() - began:.0f} s)", file=sys.stderr, flush=True
        )
        if outcome.failure:
            failures[name] = outcome.failure
            continue
        found[name] = outcome.digests
        if given.keep is not None:
            keep(outcome, given.keep / name)
        shutil.rmtree(folder / name)
    if not failures:
        folder.rmdir()
    if given.out is not None:
        given.out.write_text(json.dumps({"about": about(tree), **found}, indent=1) + "\n", encoding="utf-8")
    equal = given.against is None or compare(found, known, failures, given.only)
    return 0 if equal and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
