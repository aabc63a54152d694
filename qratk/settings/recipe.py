"""AutoQRA as published, as a search loop: the default recipe, each part replaceable by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qratk.components import REGISTRIES
from qratk.core.errors import ConfigurationError
from qratk.loop import SearchLoop
from qratk.settings.names import CLIENT, FOR, SLOTS, registered_name

RECIPE: Final[Mapping[str, str | tuple[str, ...]]] = {
    "searcher": "nsga2",
    "refiner": "trust_region",
    "surrogate": "huber",
    "mutations": ("sensitivity", "coupled"),
    "repair": "greedy",
    "bits_importance": "fisher_residual",
    "rank_importance": "gradient_spectrum",
    "evaluator": "finetune",
    "executor": "serial",
    "reporters": ("files", "pictures", "tensorboard", "terminal"),
}
"""The default of each component: AutoQRA as published."""


def autoqra(**settings: Any) -> SearchLoop:
    """Search loop with the published recipe, except for what is given.

    A component is given as a name, as a mapping {name: options}, or as an object; `mutations` and `reporters` as lists
    of these. `client` may also be called `for`, as in files. All other settings are those of `SearchLoop`. Raises
    `UnknownComponentError` or `ConfigurationError`.

        autoqra(like=[4, 8], searcher={"nsga2": {"population": 20}}, refiner="none")
    """
    if FOR in settings:
        settings[CLIENT] = settings.pop(FOR)
    built: dict[str, Any] = {}
    for slot, kind in SLOTS.items():
        given = settings.pop(slot, RECIPE[slot])
        if not isinstance(RECIPE[slot], tuple):
            built[slot] = _built(kind, given)
        elif isinstance(given, list | tuple):
            built[slot] = [_built(kind, item) for item in given]
        else:
            raise ConfigurationError(f"{slot} must be a list, as in {list(RECIPE[slot][:1])}; got {given!r}")
    return SearchLoop(**built, **settings)


def defaults() -> dict[str, Any]:
    """The published recipe as values of the search section: one `{class_path: ...}` for each component."""
    chosen: dict[str, Any] = {}
    for slot, names in RECIPE.items():
        registry = REGISTRIES[SLOTS[slot]]
        if isinstance(names, str):
            chosen[slot] = {"class_path": registry.class_path(names)}
        else:
            chosen[slot] = [{"class_path": registry.class_path(name)} for name in names]
    return chosen


def from_section(section: Mapping[str, Any]) -> SearchLoop:
    """Search loop that the `search` section of a configuration file describes: the published recipe but for that."""
    settings = dict(section)
    for slot in SLOTS.keys() & settings.keys():
        given = settings[slot]
        settings[slot] = [_from_file(item) for item in given] if isinstance(given, list) else _from_file(given)
    return autoqra(**settings)


def _from_file(given: Any) -> Any:
    return {given["class_path"]: given.get("init_args", {})} if isinstance(given, Mapping) else given


def _built(kind: str, given: Any) -> Any:
    if isinstance(given, str):
        return REGISTRIES[kind].create(registered_name(kind, given))
    if not isinstance(given, Mapping):
        return given
    if len(given) != 1:
        raise ConfigurationError(f"{kind}: a component is given as {{name: options}}, got {dict(given)}")
    ((name, options),) = given.items()
    return REGISTRIES[kind].create(registered_name(kind, name), **(options or {}))
