"""Peak of a training step, foretold by running the very step on the meta device and keeping a ledger of allocations.

Nothing is computed there, but every operation of the model's own code, of autograd and of the optimiser makes its
tensors, and these live and die as on a real device. So the trace is right for any family, for eager and fused
attention, with and without gradient checkpointing, and for any configuration. What a kernel allocates inside itself is
not seen and is added by rule: unpacking a weight (measured on a small one) and fused attention on the CPU.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qratk.adapters.matrices.fused import leave_to_peft
from qratk.backbone.attention import use_fused_backward
from qratk.backbone.backbone import Backbone
from qratk.backbone.layers import find_blocks
from qratk.backbone.logits import labelled_logits, labelled_loss, targets_of
from qratk.bank.linear import BankLinear, PackedVariant, dequantized_matmul
from qratk.core.configuration import Configuration
from qratk.core.memory import PEAK_PARTS
from qratk.peaks.scratch import SCRATCH, cublas_workspace
from qratk.quantizers.base import Quantizer
from qratk.quantizers.none import NoQuantizer

Device = Literal["cpu", "cuda"]
Phase = Literal["forward", "backward", "backward:middle", "backward:first", "optimizer"]

_CUDA_BLOCK = 512  # the caching allocator rounds up to it
_SAMPLE = 1 << 14  # weights that unpacking is measured on

_NO_QUANTIZER = NoQuantizer()

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class PeakTrace:
    """Peak bytes of a training step: in all, by part at the moment of the peak, and the largest of each phase."""

    peak: int
    parts: Mapping[str, int]
    phases: Mapping[str, int]


@dataclass
class PhaseRecord:
    """The largest total of a phase, and the largest just before a weight of each shape was unpacked, both by part."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    unpacking: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict)


class AllocationLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of all tensors made within it or adopted, their peak, and what they were for at that moment.

    A storage counts once, whatever the number of its views, and until nobody holds it, autograd included.
    """

    def __init__(self, *, block: int = 1, devices: tuple[str, ...] = ("meta", "cpu")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block, self.devices = block, devices
        self.live: Counter[str] = Counter()
        self.total = 0
        self.phases: defaultdict[str, PhaseRecord] = defaultdict(PhaseRecord)
        self.phase = ""
        self.part: str | None = None
        self.vocabulary = 0
        self._held: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation's result, entered."""
        replaced = _DATA_DEPENDENT.get(func)
        out = None
        if replaced is not None and args[0].device.type == "meta":
            out = replaced(*args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        scratch = SCRATCH.get(func)
        if scratch is not None:
            self.transient(scratch(args), "workspace")
        self._enter(out)
        return out

    def _enter(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self.adopt(out, self.part or self._guess(out))
        elif isinstance(out, list | tuple):
            for each in out:
                self._enter(each)

    def _guess(self, tensor: Tensor) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        return "logits" if tensor.shape and tensor.shape[-1] == self.vocabulary else "activations"

    def adopt(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage, unless it is counted already."""
        if tensor.device.type not in self.devices:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._held[key] = (weakref.ref(storage, lambda _: self._leave(key)), size, part)
        self.live[part] += size
        self.total += size
        self._note(self.total, {})

    def _leave(self, key: int) -> None:
        _, size, part = self._held.pop(key)
        self.live[part] -= size
        self.total -= size

    def retag(self, tensor: Tensor, part: str) -> None:
        """Count a storage under another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            reference, size, old = self._held[key]
            self._held[key] = (reference, size, part)
            self.live[old] -= size
            self.live[part] += size

    def transient(self, size: int, part: str) -> None:
        """Note bytes that are taken and given back at once."""
        self._note(self.total + size, {part: size})

    def unpacks(self, shape: tuple[int, int]) -> None:
        """Note that a weight is about to be unpacked."""
        record = self.phases[self.phase].unpacking
        if self.total > sum(record.get(shape, {}).values()):
            record[shape] = dict(self.live)

    def _note(self, total: int, more: Mapping[str, int]) -> None:
        record = self.phases[self.phase]
        if total > record.total:
            record.total = total
            record.parts = dict(self.live + Counter(more))

    @property
    def peak(self) -> PhaseRecord:
        """The phase with the largest total."""
        return max(self.phases.values(), key=lambda record: record.total)

    @contextmanager
    def tagged(self, part: str) -> Iterator[None]:
        """Context in which whatever is made is for one part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


def _all_nonzero(mask: Tensor) -> Tensor:
    # Every position counts: the most that a batch of this size can ask for.
    return torch.empty((mask.numel(), mask.dim()), dtype=torch.int64, device="meta")


def _true(value: Tensor) -> bool | None:
    # "Is there no padding?": a batch of full rows. No other number is known here.
    return True if value.dtype == torch.bool else None


_DATA_DEPENDENT: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _all_nonzero,
    aten._local_scalar_dense.default: _true,
    aten.is_nonzero.default: _true,
}


@contextmanager
def fused_attention(device: Device) -> Iterator[None]:
    """Context in which attention on the meta device is the kernel that torch would choose on a device.

    Meta itself takes none, which would keep all scores. The function is replaced, not a mode entered: modes are left
    within `backward`, where checkpointing computes attention anew. Calls on real devices pass through.
    """
    original = nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, *args, **kwargs)
        found = _fused(device, query, *args, **kwargs)
        return original(query, *args, **kwargs) if found is None else found

    with patch.object(nn.functional, "scaled_dot_product_attention", attend):
        yield


def _fused(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if device == "cpu":
        if dropout_p != 0.0 or query.shape[-1] != value.shape[-1]:
            return None
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    if attn_mask is None and query.dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out
    repeats = query.shape[1] // key.shape[1]
    if enable_gqa and repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return out


# One training step


def training_batch(batch_size: int, length: int, device: torch.device | str) -> dict[str, Tensor]:
    """A batch of full rows in which every token is labelled."""
    ids = torch.ones((batch_size, length), dtype=torch.int64, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    *,
    enter: Callable[[Phase], None] = lambda phase: None,
    meant: Device = "cpu",
) -> None:
    """Train as Lightning does: the gradients of a step are let go only after the forward pass of the next.

    A model on the meta device does it as on the one that is meant.
    """

    def closure() -> Tensor:
        enter("forward")
        positions, target = targets_of(batch["labels"])
        loss = labelled_loss(labelled_logits(model, batch, positions), target, meant=meant)[0]
        optimizer.zero_grad()
        enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        enter("optimizer")
        return loss.detach()

    optimizer.step(closure)  # type: ignore[arg-type]


def resident_tensors(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """What is held between steps, by part: fixed tensors and buffers, packed weights with biases, adapters."""
    trained = {id(parameter) for _, parameter in backbone.trainable_parameters()}
    for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
        yield ("adapters" if id(tensor) in trained else "fixed"), tensor
    for bank in backbone.banks.values():
        for variant in bank.variants.values():
            for packed in variant.packed.values():
                yield "weights", packed
        if bank.bias is not None:
            yield "weights", bank.bias


# The stand-in for a real backbone


def twin_of(backbone: Backbone, *, gradient_checkpointing: bool = False, blocks: int | None = None) -> Backbone:
    """A backbone of the same options on the meta device, in training mode; of its first `blocks` only."""
    base: Any = backbone.base
    with torch.device("meta"):
        model = type(base)(copy.deepcopy(base.config))
    if blocks is not None:
        path, modules = find_blocks(model)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, modules[:blocks])
    twin = Backbone.from_model(
        model,
        quantizers=backbone.table.quantizers,
        granularity=backbone.granularity,
        target_modules=backbone.target_modules,
        adapter=backbone.adapters.options,
        method=backbone.adapters.method.traced,
        compute_dtype=backbone.compute_dtype,
    )
    for name, bank in twin.banks.items():
        bias = backbone.banks[name].bias
        bank.install(
            16, PackedVariant(_NO_QUANTIZER, 16, {}), None if bias is None else torch.empty_like(bias, device="meta")
        )
    if gradient_checkpointing:
        twin.enable_gradient_checkpointing()
    twin.model.train()
    return twin


@dataclass(frozen=True)
class _StandIn:
    """Allocates what a quantizer allocates when it unpacks a weight."""

    ledger: AllocationLedger
    transient: int  # bytes beyond the dense weight
    dense: Tensor | None  # kept by the dense cache, or the stored weight itself
    adds_bias_afterwards: bool

    def dequantize(self, packed: Mapping[str, Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Tensor:
        """A dense weight (d_out, d_in) on the meta device."""
        if self.dense is not None:
            return self.dense
        with self.ledger.tagged("workspace"):
            self.ledger.unpacks(shape)
            self.ledger.transient(self.transient + shape[0] * shape[1] * dtype.itemsize, "workspace")
            return torch.empty(shape, dtype=dtype, device="meta")


@lru_cache(maxsize=256)
def _sampled_bytes(quantizer: Quantizer, bits: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Most bytes beyond the dense weight while one is unpacked, and whether the dense weight is the stored one."""
    weight = torch.linspace(-1.0, 1.0, rows * columns).reshape(rows, columns).to(torch.bfloat16)
    with torch.no_grad():
        packed = quantizer.quantize(weight, bits)
        ledger = AllocationLedger(devices=("cpu",))
        for tensor in packed.values():
            ledger.adopt(tensor, "packed")
        before = ledger.total
        with ledger:
            dense = quantizer.dequantize(packed, (rows, columns), bits, dtype)
    shared = any(dense.untyped_storage()._cdata == t.untyped_storage()._cdata for t in packed.values())
    return (0, True) if shared else (ledger.peak.total - before - dense.nbytes, False)


def unpacking_bytes(quantizer: Quantizer, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, bool]:
    """Bytes that unpacking takes for a moment beyond the dense weight, measured on a part of its rows and scaled up.

    Second: whether no dense weight is made at all, the stored one being used as it is.
    """
    rows = min(shape[0], max(1, _SAMPLE // shape[1]))
    while rows < shape[0]:
        try:
            quantizer.check((rows, shape[1]), bits)
            break
        except Exception:  # this many rows do not divide into groups
            rows = min(shape[0], 2 * rows)
    extra, shared = _sampled_bytes(quantizer, bits, rows, shape[1], dtype)
    return -(-extra * shape[0] // rows), shared


def _install(
    twin: Backbone, ledger: AllocationLedger, configuration: Configuration, *, cached: bool, unpacking: bool
) -> None:
    dtype = twin.compute_dtype
    for layer, choice in zip(twin.layers, configuration.layers, strict=True):
        for (name, bank), (local, _, _) in zip(layer.modules, layer.shape.projections, strict=True):
            chosen = twin.table.choose(layer.name, local, bank.shape, choice.bits)
            size = chosen.packed_bytes(bank.shape)
            packed = torch.empty(size.weights + size.metadata, dtype=torch.uint8, device="meta")
            extra, shared = unpacking_bytes(chosen.quantizer, chosen.bits, bank.shape, dtype)
            dense = None
            if shared:
                packed = dense = torch.empty(bank.shape, dtype=dtype, device="meta")
            elif cached:
                dense = torch.empty(bank.shape, dtype=dtype, device="meta")
                ledger.adopt(dense, "workspace")
            after = chosen.quantizer.adds_bias_afterwards
            stand_in: Any = _StandIn(ledger, extra if unpacking else 0, dense, after)
            bank.install(choice.bits, PackedVariant(stand_in, chosen.bits, {"codes": packed}), bank.bias)
            bank.forward = partial(_multiply, bank, stand_in)  # type: ignore[method-assign]
            twin.adapters.outline(name, choice.rank)


def _multiply(bank: BankLinear, stand_in: _StandIn, x: Tensor) -> Tensor:
    # As `BankLinear.forward` without a dense cache and autocast, neither of which knows the meta device.
    bias = None if bank.bias is None else bank.bias.to(x.dtype)
    dense = partial(stand_in.dequantize, {}, bank.shape, 0, x.dtype)
    return dequantized_matmul(x, dense, bias, after=stand_in.adds_bias_afterwards)


class PeakTracer:
    """Foretells peaks of a backbone, real or without weights, at one batch size and length.

    Args:
        backbone: what is to be trained; it is only looked at.
        batch_size, sequence_length: of a batch of full rows, every token of which is labelled.
        gradient_checkpointing: as in training.
        dense_cache: whether all dense weights of the configuration are kept.
        device: whose allocator and attention kernels are meant; by default where the backbone lies, and on the meta
            device where torch would train.
        blocks: trace only so many of the model's first blocks.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        batch_size: int = 1,
        sequence_length: int = 512,
        gradient_checkpointing: bool = False,
        dense_cache: bool = False,
        device: Device | None = None,
        blocks: int | None = None,
    ) -> None:
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.dense_cache = dense_cache
        self.device: Device = device or default_device(backbone)
        self.twin = twin_of(backbone, gradient_checkpointing=gradient_checkpointing, blocks=blocks)
        if self.device == "cuda":
            use_fused_backward(self.twin.base)
            leave_to_peft(self.twin.base)

    def trace(self, configuration: Configuration) -> PeakTrace:
        """Peak of fine-tuning this configuration: its own packed weights, no others of the bank."""
        phases = self.records(configuration)
        record = max(phases.values(), key=lambda record: record.total)
        parts = {part: record.parts.get(part, 0) for part in PEAK_PARTS}
        largest: Counter[str] = Counter()
        for phase, found in phases.items():
            name = phase.partition(":")[0]
            largest[name] = max(largest[name], found.total)
        return PeakTrace(record.total, parts, dict(largest))

    def records(self, configuration: Configuration, *, unpacking: bool = True) -> dict[str, PhaseRecord]:
        """What each phase of a training step takes; what unpacking takes beyond the dense weight may be left out."""
        cuda = self.device == "cuda"
        ledger = AllocationLedger(block=_CUDA_BLOCK if cuda else 1, devices=("meta",) if cuda else ("meta", "cpu"))
        _install(self.twin, ledger, configuration, cached=self.dense_cache, unpacking=unpacking)
        ledger.vocabulary = int(self.twin.config.get_text_config().vocab_size)
        for part, tensor in resident_tensors(self.twin):
            ledger.adopt(tensor, part)
        if cuda:
            workspace = torch.empty(cublas_workspace(), dtype=torch.uint8, device="meta")
            ledger.adopt(workspace, "workspace")
        parameters = self._parameters()
        hooks = [Tensor.register_post_accumulate_grad_hook(p, hook) for p, hook in self._hooks(ledger)]  # type: ignore[no-untyped-call]
        try:
            with fused_attention(self.device), ledger:
                self._run(ledger, list(parameters))
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                parameter.grad = None
        return {phase: record for phase, record in ledger.phases.items() if phase}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.twin.trainable_parameters() if p.numel()]

    def _hooks(self, ledger: AllocationLedger) -> Iterator[tuple[nn.Parameter, Callable[[Tensor], None]]]:
        path, modules = find_blocks(self.twin.base)
        phases: list[Phase] = ["backward:first", *["backward:middle"] * (len(modules) - 2), "backward"]  # type: ignore[list-item]

        def hook(phase: Phase, parameter: Tensor) -> None:
            ledger.phase = phase
            if parameter.grad is not None:
                ledger.retag(parameter.grad, "gradients")

        for name, parameter in self.twin.trainable_parameters():
            block = int(name.removeprefix(f"{path}.").partition(".")[0])
            yield parameter, partial(hook, phases[block] if len(modules) > 1 else "backward")

    def _run(self, ledger: AllocationLedger, parameters: list[nn.Parameter]) -> None:
        def enter(phase: Phase) -> None:
            ledger.phase = phase

        batch = training_batch(self.batch_size, self.sequence_length, "meta")
        if not parameters:  # nothing to train: a forward pass is all there is
            enter("forward")
            labelled_loss(labelled_logits(self.twin.model, batch), targets_of(batch["labels"])[1], meant=self.device)
            return
        # Fine-tuning uses the fused kernel, which has no meta device and no temporaries; those of one parameter at a
        # time are next to nothing.
        optimizer = torch.optim.AdamW(parameters, foreach=False)
        enter("optimizer")  # the step before has made gradients and moments
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
            ledger.retag(parameter.grad, "gradients")
        optimizer.step()
        training_step(self.twin.model, optimizer, batch, enter=enter, meant=self.device)


def default_device(backbone: Backbone) -> Device:
    """Whose allocator a peak is foretold for: the device that the weights lie on, or that training would choose."""
    kinds = {bank.device.type for bank in backbone.banks.values()}
    if "meta" in kinds:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if "cuda" in kinds else "cpu"


def traced_peak(backbone: Backbone, configuration: Configuration, **options: Any) -> PeakTrace:
    """Foretold peak of fine-tuning a configuration; options as for `PeakTracer`."""
    return PeakTracer(backbone, **options).trace(configuration)
