"""Trained parameters as float32 masters: copied, put back, and rounded to what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qratk.adapters.matrices.shards import local, shard_like, whole
from qratk.adapters.matrices.stored import stored_values
from qratk.adapters.options import StoredType
from qratk.core.errors import ConfigurationError

Named = Sequence[tuple[str, nn.Parameter]]


def copied(parameters: Named) -> dict[str, Tensor]:
    """Whole copies by name; where they are sharded, all processes must ask."""
    return {name: whole(parameter).clone() for name, parameter in parameters}


def put_back(named: Named, state: Mapping[str, Tensor]) -> None:
    """Copy values in place; raises `ConfigurationError` unless names and shapes are those of the parameters."""
    parameters = dict(named)
    wrong = sorted(parameters.keys() ^ state.keys())
    wrong += [n for n, p in parameters.items() if n in state and state[n].shape != p.shape]
    if wrong:
        raise ConfigurationError(
            f"the adapters are of another configuration: {len(wrong)} tensors differ, the first is {wrong[0]!r}; "
            "activate the configuration that they were trained with first"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(local(shard_like(parameter, state[name])))


@contextmanager
def rounded(parameters: Named, kind: StoredType) -> Iterator[None]:
    """Within it the parameters have the values that are stored; the masters return afterwards."""
    # In place: a sharded parameter is gathered from the memory that it had at first.
    masters = [(name, local(parameter), local(parameter).clone()) for name, parameter in parameters]
    for name, values, master in masters:
        values.copy_(stored_values(name, master, kind))
    try:
        yield
    finally:
        for _, values, master in masters:
            values.copy_(master)


def described(dtype: str, more: str = "") -> dict[str, str]:
    """What is to be said of the precision of masters, and of the type that they are stored in."""
    text = f"adapters are trained in float32, as are AdamW's moments; stored, counted and scored in {dtype}{more}"
    return {"trained_in": "float32", "stored_in": dtype, "text": text}
