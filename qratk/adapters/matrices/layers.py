"""PEFT's LoRA layers round a bank: wrapped once, their matrices swapped at each switch, written for plain PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qratk.adapters.matrices.factors import pooled
from qratk.adapters.matrices.fused import ADAPTER, fuse
from qratk.core.errors import ConfigurationError, UnsupportedModelError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from qratk.adapters.options import AdapterOptions
    from qratk.bank.linear import BankLinear


class PooledLinear(nn.Linear):
    """First matrix of an adapter whose inputs (..., d_in) are summed in groups: its weight is (rank, d_in / group).

    The same as a plain one whose weight is this repeated for each input of a group (QA-LoRA, Xu et al. 2023,
    Algorithm 1: an average pool times the size of a group).
    """

    def __init__(self, group: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")  # its weight is given at each switch
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Product (..., rank) of x (..., d_in)."""
        return nn.functional.linear(pooled(x, self.group), self.weight)


class PeftLayers:
    """A model wrapped by PEFT, whose LoRA layers hold matrices of any rank, or none.

    Args:
        model: it is changed.
        banks: its projections by qualified name.
        options: how adapters are scaled, and their dropout.

    Attributes:
        model: the PEFT model.
    """

    def __init__(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> None:
        self._options = options
        self.model: PeftModel = _wrapped(model, banks, options)
        base = self.model.get_base_model()
        _check_wrapped(base, list(banks))
        self._layers: dict[str, Any] = {name: base.get_submodule(name) for name in banks}
        for layer in self._layers.values():
            fuse(layer)

    def configure(self, options: AdapterOptions) -> None:
        """Scale by other options from the next `place` on; dropout changes at once."""
        if options.dropout != self._options.dropout:
            for layer in self._layers.values():
                dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
                layer.lora_dropout[ADAPTER] = dropout.train(layer.training)
        self._options = options

    def __iter__(self) -> Iterator[str]:
        """Names of all projections, in model order."""
        return iter(self._layers)

    def layer(self, name: str) -> Any:
        """PEFT's layer round a projection."""
        return self._layers[name]

    def matrices(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """The modules that are in the layer, A and B."""
        layer = self._layers[name]
        return layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]

    def rank(self, name: str) -> int:
        """Rank that the layer is scaled by; 0 when it holds nothing."""
        layer = self._layers[name]
        return int(layer.r[ADAPTER]) if ADAPTER in layer.lora_A else 0

    def scaling(self, name: str) -> float:
        """Factor of the layer's product."""
        return float(self._layers[name].scaling[ADAPTER])

    def place(self, name: str, a: nn.Linear, b: nn.Linear, rank: int) -> None:
        """Put two modules, whose weights are (r, d_in) and (d_out, r), into a layer, scaled as of this rank."""
        layer = self._layers[name]
        a.out_features = b.in_features = a.weight.shape[0]
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = a, b
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER] = rank, self._options.lora_alpha(rank)
        layer.scaling[ADAPTER] = self._options.scaling(rank)

    def remove(self, name: str) -> None:
        """Leave a layer without matrices; nothing happens where there are none."""
        layer = self._layers[name]
        for matrices in (layer.lora_A, layer.lora_B):
            if ADAPTER in matrices:
                matrices.pop(ADAPTER)

    def configuration(self, ranks: Mapping[str, int]) -> LoraConfig:
        """PEFT's configuration of the projections over rank 0; raises `ConfigurationError` when there are none."""
        from peft import LoraConfig

        ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        if not ranks:
            raise ConfigurationError("every layer has rank 0: there is no adapter to save")
        patterns = {name: anchored(name) for name in ranks}
        check_patterns(patterns, list(self))
        largest = max(ranks.values())
        return LoraConfig(
            r=largest,
            lora_alpha=self._options.lora_alpha(largest),  # type: ignore[arg-type]  # PEFT takes floats too
            rank_pattern={patterns[name]: rank for name, rank in ranks.items()},
            alpha_pattern={patterns[name]: self._options.lora_alpha(rank) for name, rank in ranks.items()},
            target_modules=list(ranks),
            lora_dropout=self._options.dropout,
            use_rslora=self._options.rslora,
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=self.model.peft_config[ADAPTER].base_model_name_or_path,
        )


def write(directory: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for plain PEFT, of tensors by projection."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(directory))


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


def _check_wrapped(base: Any, names: Sequence[str]) -> None:
    """Raise `UnsupportedModelError` for projections that PEFT left without a layer.

    In mixtures whose experts are one tensor, PEFT takes the names of the experts' projections for that tensor, also
    where a shared expert or a dense block has projections of these names.
    """
    left = [name for name in names if not hasattr(base.get_submodule(name), "lora_A")]
    if left:
        able = _tails(set(names) - {n for n in names if n.rpartition(".")[2] in _tails(left)})
        raise UnsupportedModelError(
            f"PEFT leaves {len(left)} of the {len(names)} projections without an adapter, {left[0]!r} for one: in this "
            f"family it takes {_tails(left)} for the experts of the mixture; give target_modules={able}"
        )


def _tails(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _wrapped(model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> PeftModel:
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
    except ValueError as error:
        raise UnsupportedModelError(
            f"PEFT cannot adapt {type(model).__name__}: {str(error).strip().splitlines()[0]} Name projections that it "
            f"can adapt as target_modules; there are {_tails(banks)}"
        ) from error
    finally:
        for bank in banks.values():
            bank.hide_weight = False
