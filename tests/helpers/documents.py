"""Documents of made-up runs."""

from __future__ import annotations

from typing import Any

from qratk.core import Configuration
from qratk.run.document import EvaluationEntry, FrontDocument, ImportanceEntry, ProblemEntry, ResultDocument


def evaluation_entry(text: str, score: float, size: int = 100) -> EvaluationEntry:
    """An evaluation of a configuration at 9 steps; twice as many bytes in training."""
    configuration = Configuration.from_text(text)
    return EvaluationEntry(
        configuration=configuration, digest=configuration.digest, steps=9, score=score, bytes=size, fits=True,
        storage_bytes=size, training_bytes=2 * size, serving_bytes=size, fixed_bytes=0,
        average_bits=sum(configuration.bits) / len(configuration),
        average_rank=sum(configuration.ranks) / len(configuration), seconds=1.0, status="ok", reason="",
        checkpoint=None,
    )  # fmt: skip


def result_document(best: EvaluationEntry, *, limit: int = 100, **parts: Any) -> ResultDocument:
    """What a search over two layers at 3 and 9 steps ended with; `parts` are other fields."""
    problem = ProblemEntry(
        layers=("a", "b"), bits=(4,), ranks=(8,), log10_configurations=0.0, limit_bytes=limit, scope="storage",
        max_average_bits=None, fixed_bytes=0, importance=ImportanceEntry(bits=(1.0, 1.0), rank=(1.0, 1.0)),
        steps=(3, 9), reduction_factor=3.0, resumed=0,
    )  # fmt: skip
    front = FrontDocument(scope="storage", limit_bytes=limit, steps=9, evaluations=(best,))
    given = {"baselines": (), "references": (), "comparisons": (), "failed_evaluations": 0, "front": front, **parts}
    return ResultDocument(name="search", best=best, problem=problem, **given)
