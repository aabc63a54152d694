"""When phase I ends, and how many evaluations there may still be."""

from __future__ import annotations

from qratk.loop.settings import SearchSettings
from qratk.loop.state import SearchState


def room(settings: SearchSettings, state: SearchState, steps: int) -> int | None:
    """How many more evaluations there may be at a rung; None when it has no cap."""
    if settings.max_evaluations is None or steps != settings.ladder.highest:
        return None
    return max(0, settings.max_evaluations - state.measured(steps))


def cap_reached(settings: SearchSettings, state: SearchState) -> str:
    """That the cap on evaluations is reached, in words; empty when there is room."""
    full = room(settings, state, settings.ladder.highest) == 0
    return f"the cap of {settings.max_evaluations} evaluations" if full else ""


def enough(settings: SearchSettings, state: SearchState) -> str:
    """Why phase I ends now; empty when it goes on."""
    if settings.searcher.finished:
        return "the searcher finished"
    if reason := cap_reached(settings, state):
        return reason
    if stalled(settings, state):
        return (
            f"the hypervolume grew by less than {settings.hypervolume_tolerance:g} relatively "
            f"in {settings.hypervolume_patience} generations"
        )
    return ""


def stalled(settings: SearchSettings, state: SearchState) -> bool:
    """Whether the hypervolume hardly grew in so many generations in a row (Eq. 28)."""
    recent = state.generations[-settings.hypervolume_patience :]
    return len(recent) == settings.hypervolume_patience and all(
        summary.relative_progress < settings.hypervolume_tolerance for summary in recent
    )
