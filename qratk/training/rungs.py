"""States of candidates at the rungs of a search: where each of them continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qratk.core.configuration import Configuration
from qratk.core.errors import RunDirectoryError
from qratk.core.evaluation import FidelityLadder
from qratk.training.checkpoints import continues, discard_state, load_state, save_state
from qratk.training.state import TrainingState


def itself(configuration: Configuration) -> Configuration:
    """The configuration, which has a training of its own."""
    return configuration


@dataclass(frozen=True)
class Rungs:
    """States in a folder, one for each training and rung that it reached.

    Attributes:
        folder: where they lie, as `<digest of the configuration that is trained>/<steps>`.
        ladder: the rungs.
        keep_optimizer: whether the optimiser's state is kept at the last rung too, where nothing continues.
        say: is told of damaged ones.
        trained: the configuration that is trained for one; those with an equal one share their states.
    """

    folder: Path
    ladder: FidelityLadder
    keep_optimizer: bool
    say: Callable[[str], None]
    trained: Callable[[Configuration], Configuration] = itself

    def of_replicate(self, replicate: int) -> Rungs:
        """The states of a replicate, in a folder of its own."""
        return replace(self, folder=self.folder / f"replicate-{replicate}") if replicate else self

    def path(self, configuration: Configuration, steps: int) -> Path:
        """Folder of a state."""
        return self.folder / self.trained(configuration).digest / str(steps)

    def begins_at(self, configuration: Configuration, steps: int) -> int:
        """Steps after which a training of so many would continue; 0 where it would begin."""
        return next((rung for rung, _ in self._stored(configuration, steps - 1)), 0)

    def latest(self, configuration: Configuration, steps: int) -> tuple[int, TrainingState | None]:
        """Steps and state of the highest stored rung up to `steps`."""
        from safetensors import SafetensorError

        for rung, path in self._stored(configuration, steps):
            try:
                return rung, load_state(path)
            except (OSError, SafetensorError, ValueError) as error:
                self.say(f"{path} is damaged and left out, its steps are repeated: {error}")
        return 0, None

    def common(self, configurations: Sequence[Configuration], steps: int) -> tuple[int, list[TrainingState]]:
        """Steps that all of them have done, up to `steps`, and their states there: none at 0 steps."""
        while True:
            latest = [self.latest(configuration, steps) for configuration in configurations]
            lowest = min(done for done, _ in latest)
            if all(done == lowest for done, _ in latest):
                return lowest, [state for _, state in latest if state is not None]
            steps = lowest  # one of them was not saved, or is damaged: all go back

    def save(self, configuration: Configuration, steps: int, state: TrainingState) -> None:
        """Keep a state; raises `RunDirectoryError` when it cannot be written."""
        from safetensors import SafetensorError

        path = self.path(configuration, steps)
        try:
            save_state(path, state, optimizer=self.keep_optimizer or steps < self.ladder.highest)
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"cannot write {path}: {error}. Free some space, then run the same command to go on; what was measured "
                "before is kept."
            ) from error

    def discard(self, configuration: Configuration, steps: int) -> None:
        """Delete a state; one that is gone already is no error."""
        discard_state(self.path(configuration, steps))

    def _stored(self, configuration: Configuration, steps: int) -> Iterator[tuple[int, Path]]:
        """Stored rungs that can be scored at `steps`, or continued to there, the highest first."""
        for rung in sorted((s for s in self.ladder.steps if s <= steps), reverse=True):
            path = self.path(configuration, rung)
            if path.is_dir() and (rung == steps or continues(path)):
                yield rung, path
