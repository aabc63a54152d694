"""What is to serve a search's answer, and what it cannot: known before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qratk.core.errors import ConfigurationError, PluginError
from qratk.core.text import nearest
from qratk.exporters.base import Exporter, Serving, Wanted, exporters

if TYPE_CHECKING:
    from qratk.training.module import FineTuneModule


def clients() -> dict[str, tuple[str, ...]]:
    """Every client that a form has, in order, with the names of these forms."""
    found: dict[str, tuple[str, ...]] = {}
    for form, cls in _forms().items():
        for client in cls.clients:
            found[client] = (*found.get(client, ()), form)
    return dict(sorted(found.items()))


def require_client(client: str) -> None:
    """Raise `ConfigurationError` for a client that no form has."""
    known = clients()
    if client not in known:
        raise ConfigurationError(
            f"must be one of {', '.join(known)}, which serve the very codes; got {client!r}" + nearest(client, known)
        )


def require_served(client: str, module: FineTuneModule, bits: Sequence[int]) -> tuple[str, ...]:
    """What a person should know of a search whose answer the client is to serve; loads no weights.

    Settings are looked at first, and then, with the model on the meta device, its shapes and its family. One form of
    the client's that holds all is enough. Raises `ConfigurationError` with all that no form does, and what to do.
    """
    from qratk.training.building import built_adapter, built_quantizers

    options = module.options
    quantizers = built_quantizers(options.quantizers)
    if unknown := sorted(set(bits) - set(quantizers)):
        raise ConfigurationError(
            f"search.bits: there are no quantisers of {unknown} bits; add them to model.quantizers"
        )
    method = built_adapter(options.adapter, {"adalora": options.adalora})
    wanted = Wanted(options.granularity, {b: quantizers[b] for b in sorted(bits)}, method)
    _best(client, wanted)
    answer = _best(client, replace(wanted, backbone=module.load_backbone(weights=False)))
    return tuple(f"for {client}: {text}" for text in answer.noted)


def _best(client: str, wanted: Wanted) -> Serving:
    """The answer of the first form that refuses nothing."""
    refused: dict[str, tuple[str, ...]] = {}
    for form in clients()[client]:
        answer = exporters.create(form, **_forms()[form].clients[client]).serving(wanted)
        if not answer.refused:
            return answer
        refused[form] = answer.refused
    told = "".join(f"\n  as {form}: {'; '.join(texts)}" for form, texts in refused.items())
    raise ConfigurationError(f"search.for: {client} could not serve what this search may find:{told}")


def _forms() -> dict[str, type[Exporter]]:
    found = {}
    for name in exporters.names():
        try:
            found[name] = exporters.get(name)
        except PluginError:  # told by whoever asks for that form
            continue
    return found
