"""Prompt templates over the fields of a row: Jinja in a sandbox, with an end to loops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Final

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qratk.core.errors import DataError

MOST_STEPS = 100_000
"""Rounds of loops, and calls, of one rendering."""

MOST_SIZE = 1_000_000
"""Length of a text that an expression makes larger than what it is given, and binary digits of a power."""


class Prompt:
    """A template over a row's fields, in the settings of lm-eval's environment.

    In a sandbox, for it may come with somebody else's recipe; loops, calls, powers and all that makes a text longer
    end by a bound.
    `fields` are those that it asks for. Raises DataError when the text is no template.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Bounded(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            tree = self._environment.parse(source)
            self.fields = frozenset(meta.find_undeclared_variables(tree))
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            for joined in list(tree.find_all(nodes.Concat)):
                joined.nodes = [nodes.Filter(nodes.List(joined.nodes), "joined", [], [], None, None)]
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"prompt is not a Jinja template: {error}; got {source!r:.200}") from error

    def render(self, fields: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises DataError when it takes too much, and whatever its expressions raise."""
        self._environment.steps = 0
        return self._template.render(dict(fields))


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox that counts rounds of loops and calls, and refuses what would make a number or text too large."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_shown, **options)
        self.steps = 0
        filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.filters = {**filters, "counted": self._counted, "joined": _joined}
        self.globals.pop("lipsum", None)  # random words: a prompt is a function of its row

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Texts one behind the other, as blocks, macros and the whole template put them."""
        return _joined(parts)

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise DataError(f"it takes more than {MOST_STEPS:,} steps; loop over less")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._step()
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            given = [value for value in args if not isinstance(value, Context | nodes.EvalContext | type(self))]
            _require(_made(name, given, kwargs), f"what {name!r} makes")
            return function(*args, **kwargs)

        return bounded

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Result of a call, which is one step."""
        self._step()
        name, of = getattr(obj, "__name__", "a call"), getattr(obj, "__self__", None)
        _require(_made(name, [of, *args], kwargs), f"what {name!r} makes")
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's own `format` within the sandbox; None for anything else."""
        found = super().wrap_str_format(value)
        if found is None:
            return None

        @wraps(found)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _require(_formatted(value.__self__, [args, kwargs]), "a formatted text")
            return found(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Result of an operation that can make a number, text or list larger."""
        name, size = _OPERATIONS[operator]
        _require(size(left, right), name)
        return super().call_binop(context, operator, left, right)


def _require(size: int, what: str) -> None:
    if size > MOST_SIZE:
        raise DataError(f"{what} in it is too large")


def _shown(value: Any) -> Any:
    """What an expression puts into the text, as it is."""
    _require(_size(value), "a value")
    return value


def _joined(parts: Iterable[Any]) -> str:
    """Texts one behind the other, as `~` makes them."""
    parts = list(parts)
    _require(_size(parts) - len(parts) - 1, "a text")
    return "".join(map(str, parts))


def _size(value: Any, before: int = 0) -> int:
    """Characters and items of plain data, on top of what was counted before, and no further than what is too large."""
    size = before + 1 + (len(value) if isinstance(value, str) else 0)
    if isinstance(value, list | tuple | Mapping):
        for item in value.items() if isinstance(value, Mapping) else value:
            if size > 2 * MOST_SIZE:
                break
            size = _size(item, size)
    return size


def _power(base: Any, exponent: Any) -> int:
    """Binary digits of a power of whole numbers; 0 for others, which cannot grow."""
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


def _product(left: Any, right: Any) -> int:
    """Size of a repeated text or list, binary digits of a product."""
    sizes = [_size(v) - 1 for v in (left, right) if isinstance(v, str | list | tuple)]
    times = [v for v in (left, right) if isinstance(v, int)]
    return sizes[0] * times[0] if sizes and times else sum(v.bit_length() for v in times)


def _sum(left: Any, right: Any) -> int:
    """Size of two texts or lists one behind the other."""
    return _size(right, _size(left))


def _formatted(text: Any, values: Any) -> int:
    """A bound of the length of a text that `%` or `format` makes; 0 for the rest of a division."""
    if not isinstance(text, str):
        return 0
    widths = sum(int(digits[:12]) for digits in re.findall(r"\d+", text))
    widths += len(re.findall(r"\*|{[^{}]*{", text)) * _whole(values)
    return len(text) + widths + (text.count("%") + text.count("{")) * _size(values)


_OPERATIONS: Final[dict[str, tuple[str, Callable[[Any, Any], int]]]] = {
    "*": ("a product", _product),
    "**": ("a power", _power),
    "+": ("a sum", _sum),
    "%": ("a formatted text", _formatted),
}

_WIDTHS: Final = frozenset(("ljust", "rjust", "center", "zfill", "batch", "slice", "to_bytes", "round"))
_BETWEEN: Final = frozenset(("join", "wordwrap", "urlize", "translate"))
_INDENTS: Final = frozenset(("indent", "expandtabs", "tojson"))


def _made(name: str, given: Sequence[Any], named: Mapping[str, Any]) -> int:
    """A bound of the size of what a filter or method makes of what it is given, a method's own object first."""
    first, *rest = [*(given or [None]), *named.values()]
    size = _size([first, *rest])
    if size > MOST_SIZE:
        return size
    if name == "format":
        return size + _formatted(first, rest)
    if name == "replace":
        old, new = ([str(value) for value in rest] + ["", ""])[:2]
        return size + str(first).count(old) * len(new)
    if name in _WIDTHS:
        return size + _whole(rest)
    if name in _BETWEEN:
        lists = [value for value in (first, *rest) if isinstance(value, list | tuple | range)]
        pieces, between = (len(lists[0]), [first, *rest]) if lists else (_size(first), rest)
        return size + pieces * _longest(between)
    if name in _INDENTS:
        return size + (1 + sum(str(first).count(mark) for mark in "\n\t,")) * max(_whole(rest), _longest(rest))
    return size


def _longest(values: Iterable[Any]) -> int:
    """Length of the longest text."""
    return max((len(value) for value in values if isinstance(value, str)), default=0)


def _whole(value: Any) -> int:
    """The largest whole number in plain data, without its sign."""
    if isinstance(value, list | tuple | Mapping):
        return max(map(_whole, value.values() if isinstance(value, Mapping) else value), default=0)
    return abs(value) if isinstance(value, int) else 0
