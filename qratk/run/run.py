"""A run folder as one object: settings, records, front, best and result, of a search that has ended or still runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.evaluation import Evaluation, History, mean_of
from qratk.core.plain import evaluation_of
from qratk.core.result import Record
from qratk.core.shared import REPLICATE
from qratk.run import files
from qratk.run.document import (
    EvaluationEntry,
    FrontDocument,
    ResultDocument,
    Settings,
    read_front,
    read_result,
    read_settings,
)
from qratk.run.journal import Contents, read_journal


@dataclass(frozen=True)
class Run:
    """What a run folder holds, each part read when it is first asked for.

    Every part raises `RunDirectoryError`, which names the file, when that is missing, damaged or of another make.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder; raises `RunDirectoryError` when it holds none."""
        found = cls(Path(folder))
        if not (found.begun or found.finished):
            raise RunDirectoryError(f"{folder} holds no run: neither {files.JOURNAL} nor {files.RESULT} is there")
        return found

    @property
    def begun(self) -> bool:
        """Whether a search was begun here."""
        return (self.folder / files.JOURNAL).is_file()

    @property
    def finished(self) -> bool:
        """Whether the search has ended."""
        return (self.folder / files.RESULT).is_file()

    @cached_property
    def settings(self) -> Settings:
        """All settings, as the command line saved them."""
        return read_settings(self.folder / files.CONFIG)

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """Every evaluation with its candidate, in the order of measurement."""
        return self._contents.records

    @cached_property
    def history(self) -> History:
        """What was measured for the search: all but the references, and but the replicates with fresh seeds."""
        return History(r.evaluation for r in self.records if r.searched)

    @cached_property
    def result(self) -> ResultDocument:
        """What the search ended with."""
        path = self.folder / files.RESULT
        if not path.exists():
            raise RunDirectoryError(f"{path} is missing: {self.folder} holds no finished search")
        return read_result(path)

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """The measured front by ascending bytes, as of the last generation or step; empty before the first."""
        document = self._front
        return () if document is None else self._recorded(document.evaluations)

    @property
    def best(self) -> Evaluation | None:
        """The answer, or the best so far; None before there is one."""
        if self.finished:
            return self._recorded([self.result.best])[0]
        path, front = self.folder / files.BEST, self._front
        if front is None or not path.exists():
            return None
        return self._measured(_fitted(path, read_settings(path)), front.steps, path)

    @property
    def baselines(self) -> tuple[Evaluation, ...]:
        """The uniform configurations at the highest rung that was reached so far, failed ones too."""
        if self.finished:
            return self._recorded(self.result.baselines)
        highest = max((r.evaluation.steps for r in self.records), default=0)
        uniform = (r.evaluation for r in self.records if r.candidate.phase == "baseline")
        return tuple(e for e in uniform if e.steps == highest)

    def checkpoint(self, evaluation: Evaluation) -> Path | None:
        """Folder with the adapter and the optimiser's state of an evaluation; None where it was not kept."""
        path = None if evaluation.checkpoint is None else self.folder / evaluation.checkpoint
        return path if path is not None and path.exists() else None

    @property
    def model_digest(self) -> str | None:
        """Digest of the model with its quantisers that was searched; None where the evaluator told none."""
        found = self._contents.meta.get("content.model")
        return None if found is None else str(json.loads(found))

    @property
    def data_digest(self) -> str | None:
        """Digest of the data that were searched on; None where the evaluator told none."""
        found = self._contents.meta.get("content.data")
        return None if found is None else str(json.loads(found))

    def decided(self, name: str) -> object:
        """What the search recorded under a name, such as "compute_dtype"; None where it did not."""
        found = self._contents.decisions.get(name)
        return None if found is None else json.loads(found)

    @cached_property
    def _contents(self) -> Contents:
        path = self.folder / files.JOURNAL
        if not path.exists():
            raise RunDirectoryError(f"{path} is missing: what was measured in {self.folder} is not known")
        return read_journal(path)

    @property
    def _front(self) -> FrontDocument | None:
        path = self.folder / files.FRONT
        if self.finished:
            return self.result.front
        return read_front(path) if path.exists() else None

    @cached_property
    def _index(self) -> Mapping[tuple[Configuration, int, int], Evaluation]:
        every = (record.evaluation for record in self.records)
        return {(e.configuration, e.steps, e.replicate): e for e in every}

    def _recorded(self, entries: Iterable[EvaluationEntry]) -> tuple[Evaluation, ...]:
        """What the journal holds of entries; raises `RunDirectoryError` when it says otherwise."""
        name = self.folder / (files.RESULT if self.finished else files.FRONT)
        found = tuple(
            self._mean(entry, name)
            if entry.merged
            else self._measured(entry.configuration, entry.steps, name, entry.replicate)
            for entry in entries
        )
        for entry, evaluation in zip(entries, found, strict=True):
            if evaluation.ok and entry.score != evaluation.score:
                raise RunDirectoryError(
                    f"{name} and {files.JOURNAL} differ: {entry.configuration} scored {entry.score} there and "
                    f"{evaluation.score} here; one of them is damaged, or of another run"
                )
        return found

    def _mean(self, entry: EvaluationEntry, name: Path) -> Evaluation:
        found = self._contents.decisions.get(mean_of(entry.merged))
        if found is None:
            raise RunDirectoryError(
                f"{name} tells of {entry.configuration} as the mean of {len(entry.merged)} trainings, which "
                f"{files.JOURNAL} does not hold; one of them is damaged, or of another run"
            )
        return evaluation_of(json.loads(found))

    def _measured(self, configuration: Configuration, steps: int, name: Path, replicate: int = 0) -> Evaluation:
        found = self._index.get((configuration, steps, replicate))
        if found is None:
            raise RunDirectoryError(
                f"{name} tells of {configuration} at {steps} steps, which {files.JOURNAL} does not hold; one of them "
                "is damaged, or of another run"
            )
        return found


def _fitted(path: Path, settings: Settings) -> Configuration:
    """The configuration in a `best.yaml`, with the options of the model that the search had as shared settings."""
    model = settings.section("model")
    model = {**model, **(model.get("init_args") or {})}
    search = settings.section("search")
    names = [*(search.get("shared") or {}), *([REPLICATE] if search.get("seeds", 1) > 1 else [])]
    shared = {name: model[name] for name in names if name in model}
    try:
        return Configuration.from_text(str(model.get("configuration"))).with_shared(shared)
    except ConfigurationError as error:
        raise RunDirectoryError(f"{path} is damaged: model.configuration: {error}") from error
