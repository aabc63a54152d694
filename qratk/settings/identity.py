"""What decides a search: the settings that a run directory is tied to, in a form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qratk.core.plain import flatten
from qratk.core.secrets import without_secrets
from qratk.settings.names import named_document

UNDECIDING: Final = frozenset({
    "model.bank_dir", "model.dense_cache",
    "search.client", "search.confirm", "search.executor", "search.for", "search.name",
    "search.reporters", "search.test",
    "trainer.default_root_dir", "trainer.enable_model_summary", "trainer.enable_progress_bar",
    "trainer.log_every_n_steps", "trainer.logger", "trainer.profiler",
    "lm_eval",
})  # fmt: skip
"""Settings that say where and how a search computes, what is shown and what is asked at its end: no measurement."""


LATER: Final[Mapping[str, Any]] = {
    "search.full_runs": None, "search.merge": 0, "search.seeds": 1, "model.replicate": None,
    "data.init_args.form": "auto", "data.init_args.answers": "human",
    "data.init_args.apply_chat_template": False, "data.init_args.fewshot_as_multiturn": None,
}  # fmt: skip
"""Settings that run directories from before they were thought of lack, with the value that says the same; those of data
also of the parts of a suite."""


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a search measures: all but those of `UNDECIDING`."""
    return _without(config, "")


def comparable(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key in the form in which two searches are compared: what decides, components by their names.

    Takes what a run directory of any age holds. Empty mappings are left out, for they set nothing, and so are
    secrets, which no file holds.
    """
    compared: dict[str, Any] = {}
    for key, value in flat.items():
        if not any(key == other or key.startswith(f"{other}.") for other in UNDECIDING):
            compared.update(flatten(named_document(without_secrets(_nested(key, value)))))
    return {key: _before(value) for key, value in compared.items() if value != {} and not _is_later(key, value)}


def _is_later(key: str, value: Any) -> bool:
    """Whether a setting says what was so before it was thought of."""
    own = key[max(0, key.rfind("data.init_args.")) :]
    return own in LATER and value == LATER[own]


def _before(value: Any) -> Any:
    """Sources of a suite, which are a list, without such settings."""
    if not isinstance(value, list):
        return value
    return [
        {key: one for key, one in flatten(part).items() if not _is_later(key, one)}
        if isinstance(part, Mapping) and isinstance(part.get("data"), Mapping)
        else part
        for part in value
    ]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _without(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key: _without(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in UNDECIDING
    }
