"""LoRA adapters that change rank in place: PEFT wraps the model once, a switch swaps the tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qratk.adapters.starts import Factors, expanded, pooled
from qratk.core.errors import ConfigurationError
from qratk.training.sharding import is_sharded, local, shard_like, whole

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from qratk.bank.linear import BankLinear

_ADAPTER = "default"

Initialisation = Literal["default", "loftq", "lq_lora"]


@dataclass(frozen=True)
class AdapterOptions:
    """How adapters are scaled and stored.

    Args:
        alpha_over_rank: scaling of the adapters' output; constant, so that rank alone differs between layers.
        rslora: scale by `alpha` / sqrt(rank) instead (rank-stabilised LoRA).
        alpha: numerator of the scaling with `rslora`; of no effect without it.
        dropout: probability of dropping an adapter's input in training.
        dtype: 16-bit type that adapters are stored, counted and scored in; they are trained in float32.
        init: "default" (A random, B zero, as PEFT), or so that the adapter makes up for the quantisation error: "loftq"
            by its singular values (Li et al. 2023), "lq_lora" by those weighted with Fisher information (Guo et al.
            2023). Projections left at 16 bits have no such error and begin as by default.
        init_iterations: of quantising and approximating in turn; 1 takes the bank's own quantised weights, with more
            they are quantised anew for each rank.
        input_groups: size of the groups of inputs that are summed into one before the adapter (QA-LoRA, Xu et al.
            2023): A is (rank, d_in / input_groups). Where it is the group size of an affine quantizer, scaling * B A is
            constant within a group and can be merged into its zero points. None is no pooling.
    """

    alpha_over_rank: float = 2.0
    rslora: bool = False
    dropout: float = 0.0
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    alpha: float = 16.0
    init: Initialisation = "default"
    init_iterations: int = 1
    input_groups: int | None = None

    def __post_init__(self) -> None:
        if self.init not in get_args(Initialisation):
            raise ConfigurationError(f"init must be one of {get_args(Initialisation)}, got {self.init!r}")
        if self.init_iterations < 1:
            raise ConfigurationError(f"init_iterations must be at least 1, got {self.init_iterations}")
        if self.input_groups is not None and self.input_groups < 1:
            raise ConfigurationError(
                f"input_groups is the size of a group of inputs, as in 32, or null; got {self.input_groups}"
            )
        if not (self.alpha_over_rank > 0 and self.alpha > 0):
            raise ConfigurationError(f"alpha must be positive, got {self.alpha_over_rank} and {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.dtype not in ("bfloat16", "float16"):
            raise ConfigurationError(f"adapters are stored in 'bfloat16' or 'float16', got {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The stored type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def input_group(self) -> int:
        """Inputs that are summed into one; 1 when there is no pooling."""
        return self.input_groups or 1

    def check_inputs(self, name: str, d_in: int) -> None:
        """Raise `ConfigurationError` when a projection's inputs do not divide into groups."""
        if d_in % self.input_group:
            raise ConfigurationError(
                f"the {d_in} inputs of {name!r} do not divide into groups of {self.input_group}; give input_groups a "
                "divisor of every projection's inputs, or leave such projections out of target_modules"
            )

    def lora_alpha(self, rank: int) -> float:
        """PEFT's `lora_alpha` at a rank."""
        return self.alpha if self.rslora else self.alpha_over_rank * rank

    def scaling(self, rank: int) -> float:
        """Factor of the adapter's output at a rank, computed as PEFT does."""
        return self.lora_alpha(rank) / (math.sqrt(rank) if self.rslora else rank)


def initial_a(name: str, rank: int, d_in: int, *, seed: int) -> torch.Tensor:
    """First matrix of an adapter, (rank, d_in) float32, uniform as PEFT's: Kaiming with a = sqrt(5).

    Seeded by (seed, module name) and nested in rank: the matrix of rank 8 is the first 8 rows of that of rank 16, so
    that two configurations differ only where they differ. The same on every device and version of torch.
    """
    rows = -(-rank // _ROWS) * _ROWS  # nested: what is kept serves all ranks up to there
    small = rows * d_in <= _SMALL_DRAW
    drawn = _small_uniform(name, rows, d_in, seed)[:rank] if small else _uniform(name, rank, d_in, seed)
    return torch.from_numpy(drawn).mul(1.0 / math.sqrt(d_in))


def _uniform(name: str, rank: int, d_in: int, seed: int) -> NDArray[np.float32]:
    # In [-1, 1).
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    drawn = np.random.Generator(np.random.Philox(key=key)).random((rank, d_in), dtype=np.float32)
    drawn *= np.float32(2.0)
    drawn -= np.float32(1.0)
    return drawn


def initial_weights(
    name: str, shape: tuple[int, int], rank: int, options: AdapterOptions, *, seed: int, factors: Factors | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of a fresh adapter, A (rank, d_in / group) and B (d_out, rank), float32 on the CPU.

    With factors, scaling * B A is what they stand for, and nested in rank as they are; a component that they have none
    of begins as by default, with a random row of A and zeros in B, since an adapter of zeros would never learn.
    """
    a = initial_a(name, rank, shape[1] // options.input_group, seed=seed)
    b = torch.zeros(shape[0], rank)
    if factors is None:
        return a, b
    if not factors.covers(rank):
        raise ConfigurationError(f"{name}: the initial adapters were made for ranks up to {factors.rank}, not {rank}")
    used = factors.used[:rank].nonzero()[:, 0]
    scale = options.scaling(rank) ** -0.5
    a[used], b[:, used] = factors.a[used] * scale, factors.b[:, used] * scale
    return a, b


# Candidates of a search begin with the same values again and again; at most 64 MiB of them are kept.
_ROWS, _SMALL_DRAW = 16, 1 << 13
_small_uniform = lru_cache(maxsize=2048)(_uniform)


class PooledLinear(nn.Linear):
    """First matrix of an adapter whose inputs (..., d_in) are summed in groups: its weight is (rank, d_in / group).

    The same as a plain one whose weight is this repeated for each input of a group (QA-LoRA, Xu et al. 2023,
    Algorithm 1: an average pool times the size of a group).
    """

    def __init__(self, group: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")  # its weight is given at each switch
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product (..., rank) of x (..., d_in)."""
        return nn.functional.linear(pooled(x, self.group), self.weight)


class Adapters:
    """The adapters of a wrapped model: ranks, tensors, rounding, files.

    They are trained in float32 masters (`describe` says so) and stored, counted and scored in 16 bits. A projection of
    rank 0 has no adapter at all.
    """

    def __init__(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> None:
        self.options = options
        self.banks = dict(banks)
        for name, bank in self.banks.items():
            options.check_inputs(name, bank.in_features)
        self.peft_model = _wrap(model, self.banks, options)
        base = self.peft_model.get_base_model()
        self._wrappers: dict[str, Any] = {name: base.get_submodule(name) for name in self.banks}
        self._linears = {
            n: (
                w.lora_A[_ADAPTER] if options.input_group == 1 else PooledLinear(options.input_group),
                w.lora_B[_ADAPTER],
            )
            for n, w in self._wrappers.items()
        }
        self._whole: dict[str, torch.Tensor] = {}  # of sharded adapters, for one process to save

    def rank(self, name: str) -> int:
        """Rank of a projection's adapter; 0 when there is none."""
        wrapper = self._wrappers[name]
        return int(wrapper.r[_ADAPTER]) if _ADAPTER in wrapper.lora_A else 0

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection a fresh adapter of this rank: A seeded, B zero, or both from factors."""
        wrapper, bank = self._wrappers[name], self.banks[name]
        self._whole = {}
        if rank == 0:
            for matrices in (wrapper.lora_A, wrapper.lora_B):
                if _ADAPTER in matrices:
                    matrices.pop(_ADAPTER)
            return
        a, b = self._linears[name]
        first, second = initial_weights(name, bank.shape, rank, self.options, seed=seed, factors=factors)
        a.weight, b.weight = nn.Parameter(first.to(bank.device)), nn.Parameter(second.to(bank.device))
        a.out_features = b.in_features = rank
        wrapper.lora_A[_ADAPTER], wrapper.lora_B[_ADAPTER] = a, b
        wrapper.r[_ADAPTER], wrapper.lora_alpha[_ADAPTER] = rank, self.options.lora_alpha(rank)
        wrapper.scaling[_ADAPTER] = self.options.scaling(rank)

    def delta(self, name: str) -> torch.Tensor:
        """What an adapter adds to its projection's weight, scaling * B A, (d_out, d_in); 0 at rank 0."""
        wrapper, bank = self._wrappers[name], self.banks[name]
        if _ADAPTER not in wrapper.lora_A:
            return torch.zeros(bank.shape, device=bank.device)
        a = expanded(wrapper.lora_A[_ADAPTER].weight, self.options.input_group)
        product: torch.Tensor = wrapper.lora_B[_ADAPTER].weight @ a
        return product.detach() * float(wrapper.scaling[_ADAPTER])

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order, as in 'model.layers.0.mlp.up_proj.lora_A.weight'."""
        found = []
        for name, wrapper in self._wrappers.items():
            if _ADAPTER in wrapper.lora_A:
                found.append((f"{name}.lora_A.weight", wrapper.lora_A[_ADAPTER].weight))
                found.append((f"{name}.lora_B.weight", wrapper.lora_B[_ADAPTER].weight))
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """Whole copies of the float32 masters by name; where they are sharded, all processes must ask."""
        return {name: whole(parameter).clone() for name, parameter in self.parameters()}

    def gather(self) -> None:
        """Hold whole copies of sharded masters on the CPU, so that one process alone can save; all must call it."""
        if any(is_sharded(parameter) for _, parameter in self.parameters()):
            self._whole = {name: value.cpu() for name, value in self.state().items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy masters in place; raises `ConfigurationError` unless names and shapes are those of the active ranks."""
        parameters = dict(self.parameters())
        wrong = sorted(parameters.keys() ^ state.keys())
        wrong += [n for n, p in parameters.items() if n in state and state[n].shape != p.shape]
        if wrong:
            raise ConfigurationError(
                f"the adapters are of another configuration: {len(wrong)} tensors differ, the first is {wrong[0]!r}; "
                "activate the configuration that they were trained with first"
            )
        self._whole = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(local(shard_like(parameter, state[name])))

    @contextmanager
    def stored_precision(self) -> Iterator[None]:
        """Within it the adapters have the values that are stored (16 bits); the masters return afterwards."""
        # In place: a sharded parameter is gathered from the memory that it had at first.
        masters = [(local(parameter), local(parameter).clone()) for _, parameter in self.parameters()]
        for values, master in masters:
            values.copy_(master.to(self.options.torch_dtype))
        try:
            yield
        finally:
            for values, master in masters:
                values.copy_(master)

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and that they are stored in."""
        stored = self.options.dtype
        return {
            "trained_in": "float32",
            "stored_in": stored,
            "text": f"adapters are trained in float32, as are AdamW's moments; stored, counted and scored in {stored}",
        }

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The adapters as they are counted, by name: on the CPU, in the stored type, pooled where inputs are pooled."""
        masters = self._whole or {name: whole(parameter) for name, parameter in self.parameters()}
        return {name: value.to("cpu", self.options.torch_dtype) for name, value in masters.items()}

    def save(self, directory: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` for plain PEFT, in the stored type.

        PEFT has no pooled inputs (but for GPTQ layers), so that a pooled A is written with its columns repeated: the
        file is then larger than what is counted.

        Ranks and alphas are anchored patterns, one for each projection; a pattern that matches none or not just its
        own projection is an error.
        """
        from safetensors.torch import save_file

        config = self.peft_config()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"base_model.model.{n}": (expanded(t, self.options.input_group) if n.endswith("lora_A.weight") else t)
            for n, t in self.stored_tensors().items()
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(directory))

    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of the active ranks; raises `ConfigurationError` when every rank is 0."""
        from peft import LoraConfig

        ranks = {name: self.rank(name) for name in self._wrappers if self.rank(name) > 0}
        if not ranks:
            raise ConfigurationError("every layer has rank 0: there is no adapter to save")
        patterns = {name: anchored(name) for name in ranks}
        check_patterns(patterns, list(self._wrappers))
        largest = max(ranks.values())
        return LoraConfig(
            r=largest,
            lora_alpha=self.options.lora_alpha(largest),  # type: ignore[arg-type]  # PEFT takes floats too
            rank_pattern={patterns[name]: rank for name, rank in ranks.items()},
            alpha_pattern={patterns[name]: self.options.lora_alpha(rank) for name, rank in ranks.items()},
            target_modules=list(ranks),
            lora_dropout=self.options.dropout,
            use_rslora=self.options.rslora,
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=self.peft_model.peft_config[_ADAPTER].base_model_name_or_path,
        )


def anchored(name: str) -> str:
    """Pattern that PEFT matches with this module name alone: 'layers.1' must not match layer 11."""
    return "^" + name.replace(".", r"\.")


def check_patterns(patterns: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise `ConfigurationError` unless each pattern matches, by PEFT's own rule, the one module it is for."""
    from peft.utils.other import get_pattern_key

    values = list(patterns.values())
    own = {name: get_pattern_key(values, name) for name in names}
    for name, pattern in patterns.items():
        if own.get(name) != pattern:
            raise ConfigurationError(
                f"the pattern {pattern!r} matches no module; {name!r} is not among the projections"
            )
    for name, pattern in own.items():
        if pattern in values and patterns.get(name) != pattern:
            raise ConfigurationError(f"the pattern {pattern!r} also matches {name!r}")


def _wrap(model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(banks),
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    for bank in banks.values():
        bank.hide_weight = True  # PEFT looks at every weight; on the meta device that costs nothing
    try:
        return get_peft_model(model, config, low_cpu_mem_usage=True)
    finally:
        for bank in banks.values():
            bank.hide_weight = False
