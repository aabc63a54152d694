"""What adapters begin with: low-rank approximations of quantisation errors, against numpy, autograd and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qratk.adapters.matrices.covariance import damped, low_rank_for_inputs, output_error
from qratk.adapters.matrices.drawing import initial_a, initial_weights
from qratk.adapters.matrices.factors import Directions, Weighting, expanded, low_rank, pooled
from qratk.adapters.matrices.fisher import fisher_weightings
from qratk.adapters.matrices.principal import directed, without_effect
from qratk.adapters.options import AdapterOptions
from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.peaks.foretold import memory_model

UP = "model.layers.0.mlp.up_proj"
RANKS = (2, 4, 16)


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weighting(rows: int, columns: int) -> Weighting:
    return Weighting(matrix(rows, seed=1).double().exp(), matrix(columns, seed=2).double().exp())


def started(tiny_backbone: Callable[..., Backbone], *, bits: tuple[int, ...] = (2, 4, 8), **adapter: Any) -> Backbone:
    options = {key: adapter.pop(key) for key in ("family", "bank_dir", "layers") if key in adapter}
    family = options.pop("family", "llama")
    backbone = tiny_backbone(
        family, bits=bits, adapter=AdapterOptions(**{"init": "loftq", **adapter}), **{"bank_dir": None, **options}
    )
    weightings = None
    if backbone.adapters.options.init == "lq_lora":
        weightings = {n: weighting(bank.out_features, bank.in_features) for n, bank in backbone.banks.items()}
    calibration = sequences(1) if backbone.adapters.options.init == "cloq" else None
    backbone.build_initial([(b, r) for b in bits for r in RANKS], weightings=weightings, calibration=calibration)
    return backbone


def sequences(seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def product(backbone: Backbone, name: str) -> torch.Tensor:
    return backbone.adapters.delta(name)


# The factors


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)])
def test_factors_are_numpys_singular_values_and_vectors_split_evenly(shape: tuple[int, int]) -> None:
    residual = matrix(*shape)
    factors = low_rank(residual, 5)
    u, s, vt = np.linalg.svd(residual.double().numpy(), full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    np.testing.assert_allclose((factors.b @ factors.a).numpy(), best, atol=1e-5)
    np.testing.assert_allclose(factors.b.square().sum(dim=0).numpy(), s[:5], rtol=1e-5)
    np.testing.assert_allclose(factors.a.square().sum(dim=1).numpy(), s[:5], rtol=1e-5)


def test_factors_are_those_of_peft_up_to_signs() -> None:
    from peft.utils import loftq_utils

    decomposed: Any = loftq_utils._low_rank_decomposition
    residual = matrix(40, 24)
    factors, theirs = low_rank(residual, 8), decomposed(residual, reduced_rank=8)
    signs = (factors.b * theirs["L"]).sum(dim=0).sign()
    torch.testing.assert_close(factors.b * signs, theirs["L"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors.a * signs[:, None], theirs["R"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [1, 7, 16, 20])
def test_factors_are_nested_in_rank_to_the_bit(asked: int) -> None:
    residual = matrix(50, 37)
    large, small = low_rank(residual, 32), low_rank(residual, asked)
    assert torch.equal(large.a[:asked], small.a)
    assert torch.equal(large.b[:, :asked], small.b)


def descended(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], m: int, n: int, rank: int) -> float:
    """The least loss over all factors, as gradient descent finds it."""
    a, b = (0.3 * matrix(rank, n, seed=5)).double(), (0.3 * matrix(m, rank, seed=6)).double()
    a.requires_grad_()
    b.requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=3000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(a, b)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(loss(a, b).detach())


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_factors_have_a_smaller_weighted_error(group: int, weighted: bool) -> None:
    residual = matrix(7, 12).double()
    weights = weighting(7, 12) if weighted else Weighting(torch.ones(7).double(), torch.ones(12).double())

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        error = residual - b @ expanded(a, group)
        return (weights.rows[:, None] * error * weights.columns).square().sum()

    factors = low_rank(residual, 2, weighting=weights if weighted else None, group=group)
    found = float(loss(factors.a.double(), factors.b.double()))
    assert found == pytest.approx(descended(loss, 7, 12 // group, 2), rel=1e-5)
    plain = low_rank(residual, 2, group=group)
    assert not weighted or found < 0.999 * float(loss(plain.a.double(), plain.b.double()))


def test_a_residual_of_lower_rank_leaves_components_of_zeros() -> None:
    factors = low_rank(matrix(20, 3).double() @ matrix(3, 30, seed=1).double(), 8)
    assert factors.used.tolist() == [True] * 3 + [False] * 5
    assert factors.covers(99)
    assert not low_rank(matrix(20, 30), 8).covers(9)


def test_fisher_weights_are_the_means_of_squared_gradients_of_each_sequence(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    backbone = tiny_backbone()
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :6] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = fisher_weightings(backbone.model, {UP: backbone.banks[UP]}, [batch])[UP]
    model, bank = backbone.model, backbone.banks[UP]
    dense = bank.dequantized(16).requires_grad_()
    bank.forward = lambda x: torch.nn.functional.linear(x, dense, bank.bias)  # type: ignore[method-assign]
    fisher = torch.zeros(bank.shape)
    for row in range(3):
        loss = model(input_ids=ids[row : row + 1], labels=labels[row : row + 1]).loss
        fisher += torch.autograd.grad(loss, dense)[0].square() / 3
    rows, columns = fisher.mean(dim=1).sqrt(), fisher.mean(dim=0).sqrt()
    torch.testing.assert_close(found.rows.float(), rows.clamp(min=1e-3 * rows.mean()), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found.columns.float(), columns.clamp(min=1e-3 * columns.mean()), rtol=1e-3, atol=1e-9)


def correlated(d_in: int, *, seed: int = 4) -> torch.Tensor:
    """Second moment of inputs of a fifth of the dimensions, some larger than others."""
    x = matrix(200, d_in // 5, seed=seed) @ matrix(d_in // 5, d_in, seed=seed + 1) * torch.linspace(0.2, 3, d_in)
    return x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(20, 35), (35, 20)])
def test_factors_for_inputs_are_those_of_the_papers_closed_form(shape: tuple[int, int]) -> None:
    residual, second = matrix(*shape).double(), correlated(shape[1])
    factors = low_rank_for_inputs(residual, 4, second)
    # Theorem 3.1, in the paper's orientation: the residual is (d_in, d_out), A (d_in, r) and B (d_out, r).
    values, vectors = np.linalg.eigh(damped(second.double()).numpy())
    root = np.sqrt(values)[:, None] * vectors.T
    left, sizes, right = np.linalg.svd(root @ residual.numpy().T, full_matrices=False)
    a, b = np.linalg.solve(root, left[:, :4] * sizes[:4]), right[:4].T
    np.testing.assert_allclose((factors.b @ factors.a).numpy(), b @ a.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.abs(factors.b.numpy()), np.abs(b), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.abs(factors.a.numpy()), np.abs(a.T), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_factors_for_inputs_are_the_best_that_descent_finds(group: int) -> None:
    residual, second = matrix(7, 12, seed=3).double(), correlated(12)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        error = residual - b @ expanded(a, group)
        return ((error @ damped(second.double())) * error).sum()

    factors = low_rank_for_inputs(residual, 2, second, group=group)
    found = float(loss(factors.a.double(), factors.b.double()))
    assert found == pytest.approx(output_error(residual - factors.b @ expanded(factors.a, group), second), rel=1e-5)
    assert found == pytest.approx(descended(loss, 7, 12 // group, 2), rel=1e-4)
    plain = low_rank(residual, 2, group=group)
    assert found < 0.95 * float(loss(plain.a.double(), plain.b.double()))


def test_factors_for_inputs_are_nested_in_rank_and_without_inputs_plain_singular_vectors() -> None:
    residual, second = matrix(20, 30), correlated(30)
    small, large = (low_rank_for_inputs(residual, rank, second) for rank in (3, 18))
    assert torch.equal(small.a, large.a[:3])
    assert torch.equal(small.b, large.b[:, :3])
    unseen, plain = low_rank_for_inputs(residual, 3, torch.zeros(30, 30)), low_rank(residual, 3)
    torch.testing.assert_close(unseen.b @ unseen.a, plain.b @ plain.a, rtol=1e-4, atol=1e-5)
    lower = low_rank_for_inputs(matrix(20, 3).double() @ matrix(3, 30, seed=1).double(), 8, second)
    assert lower.used.tolist() == [True] * 3 + [False] * 5
    with pytest.raises(QuantizationError, match="second moment"):
        low_rank_for_inputs(residual, 3, torch.diag(torch.tensor([-5.0, *[1.0] * 29])))


# Adapters of a backbone


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["loftq", "lq_lora"])
def test_what_an_adapter_adds_is_the_residuals_best_approximation(
    init: str, rslora: bool, tiny_backbone: Callable[..., Backbone]
) -> None:
    backbone = started(tiny_backbone, init=init, rslora=rslora, alpha_over_rank=3.0)
    backbone.activate(Configuration.of([2, 4, 8], [4, 16, 2]), seed=0)
    for layer, rank in zip(backbone.layers, (4, 16, 2), strict=True):
        for name, bank in layer.modules:
            residual = bank.reference - bank.dequantized(bank.active)
            weights = weighting(*bank.shape) if init == "lq_lora" else None
            factors = low_rank(residual, rank, weighting=weights)
            torch.testing.assert_close(product(backbone, name), factors.b @ factors.a, rtol=1e-4, atol=1e-5)
            if weights is None:
                assert float((residual - product(backbone, name)).norm()) < float(residual.norm())


def test_cloq_is_fitted_to_the_inputs_at_full_precision(tiny_backbone: Callable[..., Backbone]) -> None:
    from qratk.bank.calibration import gather

    backbone, reference = started(tiny_backbone, init="cloq"), tiny_backbone()
    moments = gather(reference.model, {UP: reference.banks[UP]}, sequences(1))[UP]
    backbone.activate(Configuration.uniform(2, 4, 3), seed=0)
    bank = backbone.banks[UP]
    factors = low_rank_for_inputs(bank.reference - bank.dequantized(2), 4, moments.second)
    torch.testing.assert_close(product(backbone, UP), factors.b @ factors.a, rtol=1e-3, atol=1e-5)


def test_cloq_of_other_sequences_is_another_file(
    tiny_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qratk.adapters.starts.cloq import CLoQ

    def made(seed: int) -> torch.Tensor:
        backbone = tiny_backbone(bits=(2,), adapter=AdapterOptions(init="cloq"), bank_dir=tmp_path)
        backbone.build_initial([(2, 4)], calibration=sequences(seed))
        backbone.activate(Configuration.uniform(2, 4, 3), seed=0)
        return product(backbone, UP)

    first, other = made(1), made(2)
    assert not torch.equal(first, other)
    monkeypatch.setattr(CLoQ, "begin", None)
    assert torch.equal(made(1), first)
    with pytest.raises(TypeError):
        made(3)


def test_at_16_bits_and_beyond_the_residuals_rank_adapters_begin_as_by_default(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    backbone = started(tiny_backbone, bits=(4, 16))
    backbone.activate(Configuration.of([16, 4, 16], [4, 0, 2]), seed=3)
    state = backbone.adapter_state()
    assert torch.equal(state[f"{UP}.lora_A.weight"], initial_a(UP, 4, 64, seed=3))
    assert not state[f"{UP}.lora_B.weight"].any()
    backbone.activate(Configuration.uniform(4, 4, 3), seed=3)
    assert backbone.adapter_state()[f"{UP}.lora_B.weight"].any()


def test_an_unmade_start_is_refused(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = started(tiny_backbone, bits=(4,))
    before = backbone.configuration
    with pytest.raises(ConfigurationError, match="up to 16"):
        backbone.activate(Configuration.uniform(4, 32, 3), seed=0)
    assert backbone.configuration is before
    backbone.build_bank([2])
    with pytest.raises(QuantizationError, match="build_initial"):
        backbone.activate(Configuration.uniform(2, 4, 3), seed=0)
    backbone.release_reference()
    with pytest.raises(QuantizationError, match="load the model again"):
        backbone.build_initial([(2, 4)])
    with pytest.raises(ConfigurationError, match="Fisher"):
        tiny_backbone(bits=(4,), adapter=AdapterOptions(init="lq_lora")).build_initial([(4, 2)])
    with pytest.raises(ConfigurationError, match="calibration batches"):
        tiny_backbone(bits=(4,), adapter=AdapterOptions(init="cloq")).build_initial([(4, 2)])


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init_iterations": 0}, {"input_groups": 0}])
def test_options_of_the_start_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AdapterOptions(**options)


@pytest.mark.parametrize("iterations", [1, 2])
def test_factors_come_back_from_a_store_to_the_bit(
    iterations: int, tiny_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qratk.adapters.matrices import alternating

    first = started(tiny_backbone, bits=(2,), bank_dir=tmp_path, init_iterations=iterations)
    monkeypatch.setattr(alternating, "alternated", None)
    second = started(tiny_backbone, bits=(2,), bank_dir=tmp_path, init_iterations=iterations)
    for backbone in (first, second):
        backbone.activate(Configuration.uniform(2, 4, 3), seed=0)
    ours, theirs = first.adapter_state(), second.adapter_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(first.model(input_ids=ids).logits, second.model(input_ids=ids).logits)
    monkeypatch.undo()
    monkeypatch.setattr(alternating, "low_rank", None)
    with pytest.raises(TypeError):  # other options are another file
        started(tiny_backbone, bits=(2,), bank_dir=tmp_path, init_iterations=iterations, input_groups=2)


def test_the_digest_tells_beginnings_apart(tiny_backbone: Callable[..., Backbone]) -> None:
    kinds: list[dict[str, Any]] = [{}, {"init": "loftq"}, {"init": "loftq", "init_iterations": 2}, {"input_groups": 8}]
    digests = {tiny_backbone(adapter=AdapterOptions(**options)).digest() for options in kinds}
    assert len(digests) == 4
    assert tiny_backbone().digest() in digests


# Several iterations


def test_three_iterations_are_pefts_but_for_rounding(tiny_backbone: Callable[..., Backbone]) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft.utils import loftq_utils

    from qratk.quantizers.base import quantizers

    decomposed: Any = loftq_utils._low_rank_decomposition
    table = {4: quantizers.create("nf4", double_quantization=False)}
    backbone = tiny_backbone(
        bits=(4,), quantizers=table, adapter=AdapterOptions(init="loftq", init_iterations=3), bank_dir=None
    )
    backbone.build_initial([(4, 8)])
    backbone.activate(Configuration.uniform(4, 8, 3), seed=0)
    weight = backbone.banks[UP].reference.float()
    rest = weight
    for _ in range(3):  # as `peft.utils.loftq_utils.loftq_init`, which needs CUDA
        codes, state = quantize_4bit(rest.contiguous(), blocksize=64, quant_type="nf4")
        dense = dequantize_4bit(codes, state)
        parts = decomposed(weight - dense, reduced_rank=8)
        rest = weight - parts["L"] @ parts["R"]
    packed = backbone.banks[UP].dequantized(4, rank=8)
    assert (
        float(packed.isclose(dense, rtol=1e-4).float().mean()) > 0.99
    )  # a code on the edge may fall to the other side
    assert float(backbone.banks[UP].dequantized(4).isclose(dense, rtol=1e-4).float().mean()) < 0.9
    left = weight - packed - product(backbone, UP)
    assert float(left.norm()) == pytest.approx(float((weight - dense - parts["L"] @ parts["R"]).norm()), rel=1e-3)


@pytest.mark.parametrize(("init", "bits"), [("loftq", 4), ("lq_lora", 2), ("cloq", 2)])
def test_more_iterations_leave_a_smaller_error(init: str, bits: int, tiny_backbone: Callable[..., Backbone]) -> None:
    errors = []
    from qratk.bank.calibration import gather

    reference = tiny_backbone()
    found = gather(reference.model, reference.banks, sequences(1))
    second_moments = {name: moments.second for name, moments in found.items()}
    for iterations in (1, 4):
        backbone = started(tiny_backbone, bits=(bits,), init=init, init_iterations=iterations)
        backbone.activate(Configuration.uniform(bits, 16, 3), seed=0)
        error = 0.0
        for name, bank in backbone.banks.items():
            weights = weighting(*bank.shape)
            left = bank.reference - bank.dequantized(bits, rank=16) - product(backbone, name)
            if init == "lq_lora":
                left = weights.rows[:, None] * left * weights.columns
            if init == "cloq":
                error += output_error(left, second_moments[name])
                continue
            error += float(left.square().sum())
        errors.append(error)
    assert errors[1] < errors[0]


def test_each_rank_has_its_own_weights_after_several_iterations_and_the_plain_ones_stay(
    tiny_backbone: Callable[..., Backbone], tiny_batch: dict[str, Any]
) -> None:
    backbone = started(tiny_backbone, bits=(2,), init_iterations=2)
    plain = started(tiny_backbone, bits=(2,))
    bank, other = backbone.banks[UP], plain.banks[UP]
    assert torch.equal(bank.dequantized(2), other.dequantized(2))
    assert not torch.equal(bank.dequantized(2, rank=4), bank.dequantized(2))
    assert not torch.equal(bank.dequantized(2, rank=4), bank.dequantized(2, rank=16))
    assert bank.require(2, 4).nbytes == bank.require(2).nbytes
    logits: dict[int, torch.Tensor] = {}
    for mode in ("off", "on"):
        backbone.dense_cache(mode)
        for rank in (0, 4, 16, 4, 0):
            backbone.activate(Configuration.uniform(2, rank, 3), seed=0)
            with torch.no_grad():
                found = backbone.model(**tiny_batch).logits
            assert torch.equal(logits.setdefault(rank, found), found)
    plain.activate(Configuration.uniform(2, 0, 3), seed=0)
    with torch.no_grad():
        assert torch.equal(plain.model(**tiny_batch).logits, logits[0])


def test_what_is_kept_for_a_fit_gives_the_same_logits(
    tiny_backbone: Callable[..., Backbone], tiny_batch: dict[str, Any]
) -> None:
    backbone = started(tiny_backbone, init_iterations=2)
    backbone.activate(Configuration.of([2, 4, 2], [4, 2, 16]), seed=0)
    before = backbone.model(**tiny_batch).logits
    backbone.keep_active()
    assert torch.equal(backbone.model(**tiny_batch).logits, before)
    assert all(len(bank.variants) == 1 for bank in backbone.banks.values())


# Pooled inputs


@pytest.mark.usefixtures("processor")
def test_a_pooled_adapter_is_a_plain_one_with_repeated_columns(
    tiny_backbone: Callable[..., Backbone], tiny_batch: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    from qratk.core.space import SearchSpace
    from qratk.exporters.native import native_model

    configuration = Configuration.of([2, 4, 8], [4, 16, 2])
    backbone = started(tiny_backbone, input_groups=16)
    backbone.activate(configuration, seed=0)
    assert backbone.adapter_state()[f"{UP}.lora_A.weight"].shape == (4, 64 // 16)
    backbone.save_adapter(tmp_path, configuration)
    native = PeftModel.from_pretrained(native_model(backbone, configuration), tmp_path).eval()
    with torch.no_grad(), backbone.stored_precision():
        torch.testing.assert_close(
            native(**tiny_batch).logits, backbone.model(**tiny_batch).logits, rtol=1e-4, atol=1e-5
        )
    written = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{UP}.lora_A.weight"]
    assert written.shape == (4, 64)
    assert torch.equal(written[:, :16], written[:, :1].expand(-1, 16))
    space = SearchSpace((2, 4, 8), (0, 2, 4, 16), tuple(shape.name for shape in backbone.shapes))
    footprint = memory_model(backbone, space, trace=False).footprint(configuration)
    assert footprint.adapters == sum(t.nbytes for t in backbone.adapters.stored_tensors().values())


def test_a_pooled_adapter_merges_into_the_zero_points_of_its_groups() -> None:
    from qratk.quantizers.base import quantizers

    group, rank, scaling = 32, 4, 2.0
    quantizer = quantizers.create("hqq", group_size=group, metadata_dtype="float32")
    weight, a, b = matrix(48, 96), 0.1 * matrix(rank, 96 // group, seed=1), 0.1 * matrix(48, rank, seed=2)
    packed = quantizer.quantize(weight, 2)
    with_adapter = quantizer.dequantize(packed, (48, 96), 2, torch.float32) + scaling * b @ expanded(a, group)
    shift = (scaling * b @ a).reshape(-1, 1) / packed["scale"]
    merged = quantizer.dequantize({**packed, "zero": packed["zero"] - shift}, (48, 96), 2, torch.float32)
    torch.testing.assert_close(merged, with_adapter, rtol=1e-5, atol=1e-5)
    assert not torch.equal(merged, quantizer.dequantize(packed, (48, 96), 2, torch.float32))


def test_pooling_sums_neighbours_and_indivisible_inputs_are_refused(tiny_backbone: Callable[..., Backbone]) -> None:
    assert pooled(torch.arange(6.0), 3).tolist() == [3.0, 12.0]
    with pytest.raises(ConfigurationError, match="do not divide into groups of 48"):
        tiny_backbone(adapter=AdapterOptions(input_groups=48))


@pytest.mark.parametrize("case", [{"batch_size": 4, "sequence_length": 48}, {"batch_size": 1, "sequence_length": 8}])
def test_the_foretold_peak_of_pooled_adapters_is_the_measured_one(
    case: dict[str, Any], tiny_backbone: Callable[..., Backbone]
) -> None:
    from qratk.peaks.measure import measured_peak
    from qratk.peaks.trace import traced_peak

    configuration = Configuration.of([2, 4, 16], [4, 16, 8])
    made = {group: tiny_backbone(adapter=AdapterOptions(input_groups=group)) for group in (None, 16)}
    foretold = {group: traced_peak(backbone, configuration, **case) for group, backbone in made.items()}
    assert foretold[16].peak == pytest.approx(measured_peak(made[16], configuration, **case), rel=0.02)
    assert foretold[16].parts["adapters"] < foretold[None].parts["adapters"]


# Beside quantisers that are fitted to data


def test_weights_that_calibration_decides_are_approximated_as_they_are_and_not_packed_anew(
    tiny_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    from qratk.quantizers.base import quantizers

    def made(seed: int, iterations: int = 1) -> Backbone:
        backbone = tiny_backbone(
            quantizers={4: quantizers.create("gptq", group_size=32)},
            adapter=AdapterOptions(init="loftq", init_iterations=iterations),
            bank_dir=tmp_path,
        )
        ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(seed))
        backbone.calibrate([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        backbone.build_bank([4])
        backbone.build_initial([(4, 4)])
        backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
        return backbone

    for seed in (1, 2):  # their files must not be taken for each other
        backbone = made(seed)
        bank = backbone.banks[UP]
        factors = low_rank(bank.reference - bank.dequantized(4), 4)
        torch.testing.assert_close(product(backbone, UP), factors.b @ factors.a, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match="init_iterations=1"):
        made(1, iterations=2)


# Directions of the inputs


def principal(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variances and directions of rows about their mean, by numpy."""
    x = rows.double().numpy()
    _, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return s**2 / len(x), vt


def shown(backbone: Backbone, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs of the projection `UP` of all tokens but padding, one unpadded row at a time."""
    seen: list[torch.Tensor] = []
    handle = backbone.banks[UP].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach().float()))
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        backbone.model(input_ids=ids[None, : int(mask.sum())])
    handle.remove()
    return torch.cat(seen)


def calibration_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 15, (12, 16), generator=generator)
    mask = (torch.arange(16) < torch.randint(8, 17, (12, 1), generator=generator)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def eva(tiny_backbone: Callable[..., Backbone], *, bits: tuple[int, ...] = (4, 16), **options: Any) -> Backbone:
    backbone = tiny_backbone("llama", bits=bits, adapter=AdapterOptions(init="eva", **options), bank_dir=None)
    backbone.activate(Configuration.uniform(16, 0, 3), seed=0)
    start = backbone.adapters.options.start
    assert start is not None
    told = start.weightings(backbone.model, backbone.banks, [calibration_batch()])
    backbone.build_initial([(b, r) for b in bits for r in RANKS], weightings=told)
    return backbone


@pytest.mark.parametrize("bits", [4, 16])
def test_eva_begins_at_the_principal_directions_of_the_inputs_without_effect(
    bits: int, tiny_backbone: Callable[..., Backbone]
) -> None:
    backbone = eva(tiny_backbone)
    variances, directions = principal(shown(backbone, calibration_batch()))
    backbone.activate(Configuration.uniform(bits, 4, 3), seed=0)
    state = backbone.adapter_state()
    first = state[f"{UP}.lora_A.weight"].double().numpy()
    assert not state[f"{UP}.lora_B.weight"].any()
    assert (np.diff(variances[:5]) < -1e-6).all()  # else they have no order
    np.testing.assert_allclose(np.abs(np.sum(first * directions[:4], axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0, atol=1e-5)


def test_eva_is_nested_in_rank_and_the_same_at_every_rslora_scaling(tiny_backbone: Callable[..., Backbone]) -> None:
    firsts = []
    for options in ({}, {"rslora": True}):
        backbone = eva(tiny_backbone, bits=(4,), **options)
        for rank in (4, 16):
            backbone.activate(Configuration.uniform(4, rank, 3), seed=0)
            firsts.append(backbone.adapter_state()[f"{UP}.lora_A.weight"][:4])
    assert all(torch.equal(first, firsts[0]) for first in firsts)


def test_eva_of_pooled_inputs_has_the_directions_of_their_sums(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = eva(tiny_backbone, bits=(4,), input_groups=8)
    _, directions = principal(pooled(shown(backbone, calibration_batch()), 8))
    backbone.activate(Configuration.uniform(4, 2, 3), seed=0)
    first = backbone.adapter_state()[f"{UP}.lora_A.weight"].double().numpy()
    assert first.shape == (2, 8)
    np.testing.assert_allclose(np.abs(np.sum(first * directions[:2], axis=1)), 1.0, atol=1e-3)


def test_eva_leaves_components_without_a_direction_to_chance(tiny_backbone: Callable[..., Backbone]) -> None:
    directions = Directions(torch.eye(64)[:3], torch.tensor([3.0, 2.0, 1.0]))
    first = directed(directions, 4, 1)
    assert torch.equal(first[:3], torch.eye(64)[:3])
    a, b = initial_weights(UP, (32, 64), 4, AdapterOptions(init="eva"), seed=1, factors=without_effect(first, 32))
    assert torch.equal(a[:3], torch.eye(64)[:3])
    assert torch.equal(a[3], initial_a(UP, 4, 64, seed=1)[3])
    assert not b.any()
