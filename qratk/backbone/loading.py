"""Models and tokenizers from a name or a directory, with the one reason why they cannot be used."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qratk.bank.dense import is_out_of_memory
from qratk.core.errors import ConfigurationError, UnsupportedModelError
from qratk.core.work import working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POINTER = b"version https://git-lfs"
_SPECIAL = ("pad", "bos", "eos")
_MOST_BLOCKS = 10_000


def resolve_dtype(compute_dtype: str | torch.dtype, *, stored: torch.dtype = torch.float32) -> torch.dtype:
    """The compute dtype of a model whose checkpoint is stored in a dtype.

    "auto" is bfloat16 where CUDA has it. On a CPU it is bfloat16 for a checkpoint in bfloat16, which loses nothing by
    that, where the processor multiplies such numbers by itself, and float32 otherwise: 16-bit products that are
    imitated are slow.
    """
    if isinstance(compute_dtype, torch.dtype):
        return compute_dtype
    if compute_dtype == "auto":
        if torch.cuda.is_available():
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return torch.bfloat16 if stored == torch.bfloat16 and multiplies_bfloat16() else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if compute_dtype not in known:
        raise ConfigurationError(f"compute_dtype must be 'auto' or one of {tuple(known)}, got {compute_dtype!r}")
    return known[compute_dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `resolve_dtype` takes."""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 that torch uses: AVX512-BF16, or Arm's BF16."""
    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN takes bfloat16 on every AVX512, and imitates it where these instructions are missing.
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load_model(name: str, *, trust_remote_code: bool, weights: bool) -> PreTrainedModel:
    """A causal language model in its checkpoint's own dtype; without weights on the meta device.

    Also without weights a local directory's files are looked at: whether they are whole, not what they hold.
    Raises `UnsupportedModelError`, naming the file at fault where there is one, and for a checkpoint that is quantised
    already.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = load_config(name, trust_remote_code=trust_remote_code)
        _require_unquantised(name, config)
        _require_possible(name, config)
        if weights:
            dtype: Any = {dtype_argument(): "auto"}
            with working("loading the model"):
                return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **dtype)
        if fault := _file_at_fault(name):
            raise UnsupportedModelError(fault)
        stored = getattr(config, dtype_argument(), None) or torch.float32
        options: Any = {dtype_argument(): stored, "trust_remote_code": trust_remote_code}
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, **options)
        return model
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code, and the readers of its files, raise whatever they like
        if is_out_of_memory(error):
            raise
        raise _not_loaded(name, error) from error


def load_config(name: str, *, trust_remote_code: bool) -> Any:
    """A model's configuration. Raises `UnsupportedModelError`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's own code raises whatever it likes
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        _file_at_fault(name)
        or f"the model {name!r} cannot be loaded as a causal language model: {reason(error)} "
        "Give a Hugging Face name, or a directory with config.json and safetensors files"
    )


def load_tokenizer(name: str, *, trust_remote_code: bool, required: bool) -> Any:
    """A tokenizer; None where there is none and none is required. Raises `UnsupportedModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer classes raise whatever their files make them raise
        if not required:
            return None
        raise UnsupportedModelError(
            f"no tokenizer can be loaded from {name!r}: {reason(error)} Give one with the option 'tokenizer'"
        ) from error


def check_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise `UnsupportedModelError` for a special token that every batch needs and the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    for kind in _SPECIAL:
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None and token >= rows:
            raise UnsupportedModelError(
                f"the tokenizer's {kind}_token {getattr(tokenizer, f'{kind}_token', '')!r} is number {token}, but the "
                f"model has embeddings for {rows} tokens (0 to {rows - 1}); give the tokenizer that the model was "
                "trained with as the option 'tokenizer', or make the token one of those it has"
            )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedModelError` for a tensor of a checkpoint that holds NaN or infinity."""
    for name, tensor in tensors.items():
        # A sum shows both, in one pass and without another tensor; when it overflows, every number is looked at.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong:
                raise UnsupportedModelError(
                    f"{name!r} of the checkpoint holds NaN or infinity ({wrong:,} of {tensor.numel():,} numbers), so "
                    "that every output would; download the checkpoint again, or take another one"
                )


def reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dtype_argument() -> str:
    """What this transformers calls the type of a model's weights."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _require_possible(name: str, config: Any) -> None:
    """Raise `UnsupportedModelError` for more blocks than any model has: making them would never end."""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and not 1 <= blocks <= _MOST_BLOCKS:
        raise UnsupportedModelError(
            f"the configuration of {name!r} has num_hidden_layers {blocks:,}, but there must be between 1 and "
            f"{_MOST_BLOCKS:,}; mend its config.json, or download it again"
        )


def _require_unquantised(name: str, config: Any) -> None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    settings: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    raise UnsupportedModelError(
        f"the checkpoint {name!r} is quantised already (quant_method {settings.get('quant_method', 'unknown')!r}), and "
        "the bank packs full-precision weights at every bit-width itself; give the model that it was made from"
    )


def _file_at_fault(name: str) -> str:
    """What is wrong with a file of weights in a local directory; empty when nothing is seen."""
    from safetensors import safe_open

    for path in sorted(Path(name).glob("*.safetensors")):
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` there."
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:  # the reader has an error of its own
            return f"{path} is cut off or damaged ({reason(error)}); download it again."
    return ""
