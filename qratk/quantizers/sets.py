"""Quantisers of all bit-widths by one name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qratk.core.errors import ConfigurationError
from qratk.core.text import nearest
from qratk.quantizers.base import quantizers

_FEW_BITS: Final = {"class_path": "affine", "init_args": {"clip": "unbiased"}}
_SYMMETRIC_8: Final = {"class_path": "affine", "init_args": {"symmetric": True}}

QUANTIZER_SETS: Final[Mapping[str, Mapping[int, str | Mapping[str, Any]]]] = {
    "default": {2: "hqq", 3: "hqq", 4: "nf4", 8: "int8", 16: "none"},
    "portable": {2: _FEW_BITS, 3: _FEW_BITS, 4: _FEW_BITS, 8: _SYMMETRIC_8, 16: "none"},
    "portable_gptq": {2: "affine_gptq", 3: "affine_gptq", 4: "affine_gptq", 8: _SYMMETRIC_8, 16: "none"},
}
"""Quantiser of each bit-width, by name of the set: what `model.quantizers` may be in one word.

"portable" has codes that vLLM, transformers, llama.cpp and MLX take as they are; "portable_gptq" has the same, fitted
to calibration sequences where few bits make that worth its time. At 8 bits nothing is left to fit, and symmetric codes
are those that GGUF's Q8_0 and Marlin's kernels hold.
"""


def quantizer_set(name: str) -> dict[int, Any]:
    """Quantisers by bits, each as its name or {class_path, init_args}. Raises `ConfigurationError` for other names."""
    if name in QUANTIZER_SETS:
        found = QUANTIZER_SETS[name].items()
        return {b: one if isinstance(one, str) else {k: _copied(v) for k, v in one.items()} for b, one in found}
    cure = f", or quantisers by bits, as in {{4: {name}}}" if name in quantizers.names() else ""
    raise ConfigurationError(
        f"{name!r} is no set of quantisers; give one of {', '.join(QUANTIZER_SETS)}{cure}"
        + nearest(name, QUANTIZER_SETS)
    )


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
