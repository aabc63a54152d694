"""Prompt templates over the fields of a row: Jinja in a sandbox, with an end to loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qratk.core.errors import DataError

MOST_STEPS = 100_000
"""Rounds of loops, and calls, of one rendering."""

MOST_SIZE = 1_000_000
"""Length of a text that is made by repeating one, and binary digits of a power."""


class Prompt:
    """A template over a row's fields, in the settings of lm-eval's environment.

    In a sandbox, for it may come with somebody else's recipe; loops, calls, powers and repeated texts end by a bound.
    `fields` are those that it asks for. Raises DataError when the text is no template.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Bounded(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            tree = self._environment.parse(source)
            self.fields = frozenset(meta.find_undeclared_variables(tree))
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"prompt is not a Jinja template: {error}; got {source!r:.200}") from error

    def render(self, fields: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises DataError when it takes too much, and whatever its expressions raise."""
        self._environment.steps = 0
        return self._template.render(dict(fields))


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox that counts rounds of loops and calls, and refuses products and powers that are too large to make."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        self.filters = {**self.filters, "counted": self._counted}

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise DataError(f"it takes more than {MOST_STEPS:,} steps; loop over less")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Result of a call, which is one step."""
        self._step()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Result of a product or a power."""
        if (_power if operator == "**" else _product)(left, right) > MOST_SIZE:
            raise DataError(f"a {'power' if operator == '**' else 'product'} in it is too large")
        return super().call_binop(context, operator, left, right)


def _power(base: Any, exponent: Any) -> int:
    """Binary digits of a power of whole numbers; 0 for others, which cannot grow."""
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


def _product(left: Any, right: Any) -> int:
    """Length of a repeated text or list, binary digits of a product."""
    sizes = [len(v) for v in (left, right) if isinstance(v, str | list | tuple)]
    times = [v for v in (left, right) if isinstance(v, int)]
    return sizes[0] * times[0] if sizes and times else sum(v.bit_length() for v in times)
