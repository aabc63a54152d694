"""Values of the right type that cannot be: each section is built alone, so that all of them are known at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from qratk.cli.diagnosis import Mistake
from qratk.cli.outcome import chain
from qratk.cli.trainer import check_options
from qratk.core.errors import ConfigurationError, Problem, QratkError
from qratk.loop import SearchLoop
from qratk.settings import names
from qratk.settings.recipe import defaults


def impossible(parser: LightningArgumentParser, settings: Namespace, *, searches: bool) -> Iterator[Mistake]:
    """Mistakes that building the parts of a command's settings brings to light."""
    for section in ("model", "data"):
        yield from _built(parser, settings, section)[1]
    if isinstance(settings.get("trainer"), Namespace):
        yield from _refused(lambda: check_options(settings.trainer.as_dict()), ("trainer",))[1]
    if searches and isinstance(settings.get(names.SECTION), Namespace):
        yield from _of_search(parser, settings)


def _of_search(parser: LightningArgumentParser, settings: Namespace) -> Iterator[Mistake]:
    section = settings[names.SECTION].clone()
    for slot, default in defaults().items():
        alone = _only(names.SECTION, _only(slot, section[slot]))
        built, wrong = _built(parser, alone, names.SECTION, slot)
        yield from wrong
        if built is None:  # the other settings are checked with the default in its place
            alone[names.SECTION][slot] = parser.parse_object({names.SECTION: {slot: default}}, _skip_required=True)[
                names.SECTION
            ][slot]
            built, _ = _built(parser, alone, names.SECTION, slot)
        section[slot] = None if built is None else built[names.SECTION][slot]
    yield from _refused(lambda: SearchLoop(**section.as_dict()), (names.SECTION,))[1]


def _built(
    parser: LightningArgumentParser, settings: Namespace, section: str, *keys: str
) -> tuple[Namespace | None, tuple[Mistake, ...]]:
    if settings.get(section) is None:
        return None, ()
    alone = _only(section, settings[section])
    # Of the search a component alone is built; the model would be too, and has no settings here.
    groups = section != names.SECTION
    return _refused(lambda: parser.instantiate_classes(alone, instantiate_groups=groups), (section, *keys))


def _refused(build: Any, keys: tuple[str, ...]) -> tuple[Any, tuple[Mistake, ...]]:
    """What was built, or what our own errors say against it; other errors are for who builds it in earnest."""
    try:
        return build(), ()
    except Exception as error:
        known = next((link for link in chain(error) if isinstance(link, QratkError)), None)
        return None, () if known is None else tuple(_mistakes(known, keys))


def _mistakes(error: QratkError, keys: tuple[str, ...]) -> Iterable[Mistake]:
    inner = () if keys in ((names.SECTION,), ("model",), ("trainer",)) else ("init_args",)
    problems = error.problems if isinstance(error, ConfigurationError) else ()
    if keys == ("data",) and (match := re.match(r"(\w+) (must .*)", str(error), re.S)):
        problems = (Problem(match[1], match[2]),)
    if not problems:
        return [Mistake(keys, str(error))]
    return [Mistake((*keys, *inner, *problem.option.split(".")), problem.text) for problem in problems]


def _only(key: str, value: Any) -> Namespace:
    alone = Namespace()  # type: ignore[no-untyped-call]
    alone[key] = value
    return alone
