"""What a Hugging Face folder has besides weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.backbone.loading import dtype_argument, dtype_name

if TYPE_CHECKING:
    import torch

    from qratk.adapters.matrices.folder import Pair
    from qratk.backbone.backbone import Backbone

GENERATION = "generation_config.json"


def is_converted(backbone: Backbone) -> bool:
    """Whether files of the model's family are not named as its modules, or come with code of their own.

    Such as mixtures whose experts are one tensor in memory and several on disk: transformers alone writes these.
    """
    if type(backbone.base).__module__.startswith("transformers_modules"):
        return True
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # before transformers 5, models had the names of their files
        return bool(getattr(type(backbone.base), "_checkpoint_conversion_mapping", None))
    find: Any = get_checkpoint_conversion_mapping
    return bool(find(backbone.config.model_type))


def write_description(
    backbone: Backbone, directory: Path, *, dtype: torch.dtype, more: dict[str, Any] | None = None
) -> None:
    """Write `config.json` with some settings more, `generation_config.json` and the tokenizer."""
    config = copy.deepcopy(backbone.config)
    config.architectures = [type(backbone.base).__name__]
    setattr(config, dtype_argument(), dtype_name(dtype))
    for name, value in (more or {}).items():
        setattr(config, name, value)
    config.save_pretrained(directory)
    generation = getattr(backbone.base, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / GENERATION)
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(directory)


def active_pairs(backbone: Backbone) -> dict[str, Pair]:
    """The active adapters as a PEFT folder holds them; none where every rank is 0."""
    from qratk.adapters.matrices.folder import read_pairs

    if not any(backbone.adapters.rank(name) for name in backbone.banks):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        backbone.adapters.save(folder)
        return read_pairs(Path(folder))
