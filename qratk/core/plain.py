"""Plain data, as JSON and YAML hold it, of what travels between modules, and back, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, Request
from qratk.core.result import Record

T = TypeVar("T")


def request_data(request: Request) -> dict[str, Any]:
    """A request as plain data; `request_of` reads it."""
    candidate = request.candidate
    return {
        "configuration": str(candidate.configuration),
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "generation": candidate.generation,
        "phase": candidate.phase,
        "steps": request.steps,
    }


def request_of(data: Mapping[str, Any]) -> Request:
    """The request that plain data tell; raises `ConfigurationError`."""
    return Request(typed(Candidate, data, "request"), typed(int, data.get("steps"), "request.steps"))


def record_data(record: Record) -> dict[str, Any]:
    """A record as plain data, of one level but for footprint, outcomes, figures and parents; `record_of` reads it."""
    evaluation, candidate = record.evaluation, record.candidate
    return {
        "position": record.index,
        "configuration": str(evaluation.configuration),
        "digest": evaluation.configuration.digest,
        "steps": evaluation.steps,
        "score": evaluation.score,
        "status": evaluation.status,
        "reason": evaluation.reason,
        "seconds": evaluation.seconds,
        "checkpoint": evaluation.checkpoint,
        "footprint": asdict(evaluation.footprint),
        "outcomes": list(evaluation.outcomes),
        "figures": dict(evaluation.figures),
        "phase": candidate.phase,
        "generation": candidate.generation,
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "trained_as": evaluation.trained_as,
        "replicate": evaluation.replicate,
    }


def evaluation_of(data: Mapping[str, Any]) -> Evaluation:
    """The evaluation that plain data tell, as `plain` writes one; raises `ConfigurationError`."""
    failed = data.get("status") in ("failed", "lost")  # JSON has no infinite scores
    return typed(Evaluation, {**data, "score": -math.inf} if failed else data, "evaluation")


def record_of(data: Mapping[str, Any]) -> Record:
    """The record that plain data tell; raises `ConfigurationError`."""
    failed = data.get("status") in ("failed", "lost")
    evaluation = typed(Evaluation, {**data, "score": -math.inf} if failed else data, "record")
    if data.get("digest") != evaluation.configuration.digest:
        raise ConfigurationError(f"record.digest: {data.get('digest')!r} is not that of {evaluation.configuration}")
    return Record(typed(int, data.get("position"), "record.position"), typed(Candidate, data, "record"), evaluation)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def plain(value: object) -> Any:
    """Any value as plain data: a dataclass by its fields, a configuration as text, figures not finite as None."""
    if isinstance(value, Configuration):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def typed(kind: type[T], data: object, where: str) -> T:
    """The value of a type that plain data tell, `where` being its name in messages; raises `ConfigurationError`.

    Knows dataclasses, which ignore keys of no field, configurations, tuples, mappings, unions, literals and scalars.
    None where a number is wanted is NaN, as `plain` writes it.
    """
    return cast(T, _read(kind, data, where))


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(arguments, data, where)
    if origin is tuple:
        return _read_tuple(arguments, data, where)
    if origin in (Mapping, dict):
        return _read_mapping(arguments, data, where)
    if kind is Configuration:
        return Configuration.from_text(_scalar(str, data, where))
    if is_dataclass(kind):
        return _read_fields(kind, data, where)
    if origin is Literal:
        if data not in arguments:
            raise _wrong(where, f"one of {', '.join(map(repr, arguments))}", data)
        return data
    return _scalar(kind, data, where)


def _one_of(kinds: Sequence[Any], data: Any, where: str) -> Any:
    if data is None and NoneType in kinds:
        return None
    wrong = _wrong(where, "something else", data)
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _read(kind, data, where)
            except ConfigurationError as error:
                wrong = error
    raise wrong


def _read_tuple(kinds: Sequence[Any], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise _wrong(where, "a list", data)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        if kinds[0] is float and all(type(item) is float for item in data):  # thousands of validation outcomes
            return tuple(data)
        kinds = [kinds[0]] * len(data)
    if len(kinds) != len(data):
        raise _wrong(where, f"a list of {len(kinds)}", data)
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, data, strict=True)))


def _read_mapping(kinds: Sequence[Any], data: Any, where: str) -> dict[Any, Any]:
    if not isinstance(data, Mapping):
        raise _wrong(where, "a mapping", data)
    key_kind, kind = kinds
    return {_key(key_kind, key, where): _read(kind, item, f"{where}.{key}") for key, item in data.items()}


def _key(kind: Any, key: Any, where: str) -> Any:
    try:
        return kind(key)  # JSON's keys are text
    except ValueError:
        raise _wrong(where, f"keys of type {kind.__name__}", key) from None


def _read_fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(where, "a mapping", data)
    hints, found = _hints(kind), {}
    for field in fields(kind):
        if field.name in data:
            found[field.name] = _read(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigurationError(f"{where}.{field.name} is missing")
    return kind(**found)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


_SCALARS: Mapping[Any, tuple[str, Any]] = {
    str: ("text", str),
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", int | float),
}


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and data is None:
        return math.nan
    name, allowed = _SCALARS[kind]
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise _wrong(where, name, data)
    return kind(data)


def _wrong(where: str, expected: str, data: object) -> ConfigurationError:
    text = repr(data)
    return ConfigurationError(f"{where}: expected {expected}, got {text if len(text) <= 80 else text[:79] + '…'}")
