"""AutoQRA as published, as a search loop: the default recipe, each part replaceable by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qratk.components import REGISTRIES
from qratk.core.errors import ConfigurationError
from qratk.loop import SearchLoop

SLOTS: Final[Mapping[str, str]] = {
    "searcher": "searchers",
    "refiner": "refiners",
    "surrogate": "surrogates",
    "mutations": "mutations",
    "repair": "repairs",
    "bits_importance": "estimators",
    "rank_importance": "estimators",
    "evaluator": "evaluators",
}
"""Which open set each component of a search comes from."""

RECIPE: Final[Mapping[str, str | tuple[str, ...]]] = {
    "searcher": "nsga2",
    "refiner": "trust_region",
    "surrogate": "huber",
    "mutations": ("sensitivity", "coupled"),
    "repair": "greedy",
    "bits_importance": "fisher_residual",
    "rank_importance": "gradient_spectrum",
    "evaluator": "finetune",
}
"""The default of each component: AutoQRA as published."""


def autoqra(**settings: Any) -> SearchLoop:
    """Search loop with the published recipe, except for what is given.

    A component is given as a name, as a mapping {name: options}, or as an object; `mutations` as a list of these. All
    other settings are those of `SearchLoop`. Raises `UnknownComponentError` or `ConfigurationError`.

        autoqra(like=[4, 8], searcher={"nsga2": {"population": 20}}, refiner="none")
    """
    built: dict[str, Any] = {}
    for slot, kind in SLOTS.items():
        given = settings.pop(slot, RECIPE[slot])
        built[slot] = [_built(kind, item) for item in given] if slot == "mutations" else _built(kind, given)
    return SearchLoop(**built, **settings)


def _built(kind: str, given: Any) -> Any:
    if isinstance(given, str):
        return REGISTRIES[kind].create(given)
    if not isinstance(given, Mapping):
        return given
    if len(given) != 1:
        raise ConfigurationError(f"{kind}: a component is given as {{name: options}}, got {dict(given)}")
    ((name, options),) = given.items()
    return REGISTRIES[kind].create(name, **(options or {}))
