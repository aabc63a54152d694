"""Estimators beside the paper's against plain autograd, explicit Hessians and explicit inputs of tiny models."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import estimator_models as toys
import numpy as np
import pytest
import torch
from estimator_models import estimate
from torch.nn.functional import cross_entropy

from qratk.core.errors import ConfigurationError, DataError
from qratk.estimators._curvature import directional_curvatures, rademacher
from qratk.estimators.base import estimators


def residual(bank: torch.nn.Module) -> torch.Tensor:
    return bank.reference - bank.dequantized(toys.LOWEST)


def projections(models: toys.Models) -> dict[str, torch.nn.Module]:
    return dict(pair for layer in models.module.backbone.layers for pair in layer.modules)


@pytest.mark.parametrize("relative", [False, True])
def test_quantization_error_is_the_squared_residual(models: toys.Models, relative: bool) -> None:
    expected = [
        sum(
            np.linalg.norm(residual(bank).numpy()) ** 2
            / (np.linalg.norm(bank.reference.numpy()) ** 2 if relative else 1.0)
            for _, bank in layer.modules
        )
        for layer in models.module.backbone.layers
    ]
    np.testing.assert_allclose(estimate("quantization_error", models, [], relative=relative), expected, rtol=1e-5)


def test_relative_error_of_a_weight_of_zeros_is_zero() -> None:
    bank = toys.banked_linear(torch.nn.Linear(16, 8))
    with torch.no_grad():
        bank.reference.zero_()
    bank.add_variant(4, bank.variants[4].__class__(bank.variants[4].quantizer, 4, zeros_packed(bank)))
    module = SimpleNamespace(backbone=SimpleNamespace(layers=(SimpleNamespace(modules=(("only", bank),)),)))
    scores = estimators.create("quantization_error", relative=True).estimate(module, [], lowest_bits=4)
    np.testing.assert_array_equal(scores, [0.0])


def zeros_packed(bank: torch.nn.Module) -> dict[str, torch.Tensor]:
    return bank.variants[4].quantizer.quantize(torch.zeros(bank.shape), 4)


def output_errors(models: toys.Models, batches: list[dict[str, torch.Tensor]], *, relative: bool) -> np.ndarray:
    """Mean over tokens of ||(W - Q(W)) x||^2, or its share of that of ||W x||^2.

    From inputs that the plain model shows for one unpadded row at a time.
    """
    sizes: dict[str, float] = dict.fromkeys(projections(models), 0.0)
    sums: dict[str, float] = dict.fromkeys(projections(models), 0.0)
    tokens = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen: dict[str, torch.Tensor] = {}
            handles = [
                models.plain.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, name=name, seen=seen: seen.update({name: args[0][0]}) and None
                )
                for name in sums
            ]
            models.plain(input_ids=ids[None, : int(mask.sum())])
            for handle in handles:
                handle.remove()
            tokens += int(mask.sum())
            for name, bank in projections(models).items():
                sums[name] += sum(float((residual(bank) @ x).square().sum()) for x in seen[name].detach())
                sizes[name] += sum(float((bank.reference @ x).square().sum()) for x in seen[name].detach())
    return np.array(
        [
            sum(sums[n] / (sizes[n] if relative else tokens) for n, _ in layer.modules)
            for layer in models.module.backbone.layers
        ]
    )


@pytest.mark.parametrize("relative", [False, True])
def test_activation_error_is_the_mean_squared_error_of_the_outputs(models: toys.Models, relative: bool) -> None:
    batches = toys.batches()
    found = estimate("activation_error", models, batches, relative=relative)
    np.testing.assert_allclose(found, output_errors(models, batches, relative=relative), rtol=2e-4)


def test_activation_error_counts_tokens_without_a_label(llama: toys.Models) -> None:
    [batch] = toys.batches(count=1)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    np.testing.assert_array_equal(
        estimate("activation_error", llama, [unlabelled]), estimate("activation_error", llama, [batch])
    )


def test_activation_error_without_any_token_is_an_error(llama: toys.Models) -> None:
    with pytest.raises(DataError, match="padding"):
        estimate("activation_error", llama, [])


def test_gradient_norm_is_that_of_dense_mean_gradients(models: toys.Models) -> None:
    batches = toys.batches()
    gradients = [toys.dense_gradients(models, batch, slice(None)) for batch in batches]
    expected = [
        sum(float(torch.stack([g[name] for g in gradients]).mean(dim=0).square().sum()) for name, _ in layer.modules)
        for layer in models.module.backbone.layers
    ]
    for memory in ("1GiB", "1KiB"):
        found = estimate("gradient_norm", models, batches, gradient_memory=memory)
        np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_gradient_norm_of_sequences_is_the_mean_of_dense_squared_norms(models: toys.Models) -> None:
    batches = toys.batches()
    rows = [(batch, row) for batch in batches for row in range(len(batch["labels"]))]
    gradients = [toys.dense_gradients(models, batch, slice(row, row + 1)) for batch, row in rows]
    expected = [
        np.mean([sum(float(g[name].square().sum()) for name, _ in layer.modules) for g in gradients])
        for layer in models.module.backbone.layers
    ]
    np.testing.assert_allclose(estimate("gradient_norm", models, batches, of="sequences"), expected, rtol=2e-4)


def small(make: object) -> toys.Models:
    """A model of one block: its Hessian in all projections has few enough rows."""
    models = toys.models(make)
    layers = models.module.backbone.layers[:1]
    return toys.Models(
        SimpleNamespace(backbone=SimpleNamespace(model=models.module.backbone.model, layers=layers)),
        models.plain,
        models.transposed,
    )


def loss_of_deltas(models: toys.Models, batch: dict[str, torch.Tensor], names: list[str], flat: torch.Tensor):
    """Mean loss over sequences of the plain model, in eager attention, with a flat vector added to some weights."""
    changed, at = {}, 0
    for name in names:
        weight = models.plain.get_submodule(name).weight.detach()
        shape = weight.T.shape if models.transposed else weight.shape
        delta = flat[at : at + weight.numel()].reshape(shape)
        changed[f"{name}.weight"] = weight + (delta.T if models.transposed else delta)
        at += weight.numel()
    losses = []
    for row in range(len(batch["labels"])):
        kept = int(batch["attention_mask"][row].sum())
        inputs = {"input_ids": batch["input_ids"][row : row + 1, :kept]}
        logits = torch.func.functional_call(models.plain, changed, (), inputs).logits[0, :-1]
        losses.append(cross_entropy(logits, batch["labels"][row, 1:kept], ignore_index=-100))
    return torch.stack(losses).mean()


def explicit_hessian(models: toys.Models, batch: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    models.plain.set_attn_implementation("eager")
    size = sum(models.plain.get_submodule(name).weight.numel() for name in names)
    point = torch.zeros(size, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of_deltas(models, batch, names, point), point, create_graph=True)
    return torch.autograd.grad(gradient, point, torch.eye(size), is_grads_batched=True)[0]


def test_one_sample_is_the_product_with_the_explicit_hessian() -> None:
    for make in toys.FAMILIES.values():
        models = small(make)
        [batch] = toys.batches(count=1, size=2, length=7)
        banks = {n: b for n, b in projections(models).items() if n.endswith(("k_proj", "v_proj", "attn.c_proj"))}
        names = list(banks)
        hessian = explicit_hessian(models, batch, names)
        found = directional_curvatures(models.module.backbone.model, banks, [batch], seeds=[5, 6])
        for index, seed in enumerate((5, 6)):
            signs = [
                rademacher(bank.shape, seed, number, torch.float32, torch.device("cpu")).flatten()
                for number, bank in enumerate(banks.values())
            ]
            product = hessian @ torch.cat(signs)
            parts = product.split([len(v) for v in signs])
            expected = [float(v @ part) for v, part in zip(signs, parts, strict=True)]
            np.testing.assert_allclose([found[name][index] for name in names], expected, rtol=2e-3, atol=1e-5)


def test_hessian_trace_converges_to_the_explicit_trace_times_the_mean_squared_residual() -> None:
    models = small(toys.gpt2)
    [batch] = toys.batches(count=1, size=2, length=7)
    banks = {n: b for n, b in projections(models).items() if n.endswith("attn.c_proj")}
    layer = SimpleNamespace(name="part", modules=tuple(banks.items()))
    module = SimpleNamespace(backbone=SimpleNamespace(model=models.module.backbone.model, layers=(layer,)))
    diagonal = explicit_hessian(models, batch, list(banks)).diagonal()
    expected, at = 0.0, 0
    for bank in banks.values():
        n = bank.reference.numel()
        expected += float(diagonal[at : at + n].sum() / n * residual(bank).square().sum())
        at += n
    found = [
        estimators.create("hessian_trace", samples=16, seed=seed).estimate(module, [batch], lowest_bits=toys.LOWEST)[0]
        for seed in range(8)
    ]
    assert expected > 0
    spread = np.std(found, ddof=1) / np.sqrt(len(found))
    assert spread < 0.15 * expected
    assert abs(np.mean(found) - expected) < 4 * spread


def test_a_negative_trace_counts_as_zero() -> None:
    models = small(toys.llama)
    [batch] = toys.batches(count=1, size=2, length=7)
    banks = {n: b for n, b in projections(models).items() if n.endswith("v_proj")}
    assert float(explicit_hessian(models, batch, list(banks)).trace()) < 0
    layer = SimpleNamespace(name="part", modules=tuple(banks.items()))
    module = SimpleNamespace(backbone=SimpleNamespace(model=models.module.backbone.model, layers=(layer,)))
    scores = estimators.create("hessian_trace", samples=16).estimate(module, [batch], lowest_bits=toys.LOWEST)
    np.testing.assert_array_equal(scores, [0.0])


def test_curvatures_of_batches_are_their_mean_over_labelled_sequences(llama: toys.Models) -> None:
    batches = toys.batches(count=2)
    banks, model = projections(llama), llama.module.backbone.model
    together = directional_curvatures(model, banks, batches, seeds=[1])
    apart = [directional_curvatures(model, banks, [batch], seeds=[1]) for batch in batches]
    for name in banks:
        assert together[name][0] == pytest.approx((apart[0][name][0] + apart[1][name][0]) / 2, rel=1e-4, abs=1e-6)


def test_random_signs_are_signs_and_differ_between_seeds_and_projections() -> None:
    device = torch.device("cpu")
    drawn = [rademacher((64, 64), seed, index, torch.float32, device) for seed, index in ((0, 0), (0, 1), (1, 0))]
    for signs in drawn:
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(signs.mean())) < 0.1
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.1
    assert abs(float((drawn[0] * drawn[2]).mean())) < 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("activation_error", {"max_batches": 0}), ("gradient_norm", {"of": "median"}),
        ("gradient_norm", {"max_batches": 0}), ("hessian_trace", {"samples": 0}), ("hessian_trace", {"max_batches": 0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=name):
        estimators.create(name, **options)


def test_autoquantize_is_the_squared_gradient_of_outputs_times_their_squared_error(models: toys.Models) -> None:
    """Against outputs and gradients of the plain model, one unpadded row at a time."""
    batches, expected, labelled = toys.batches(), np.zeros(len(models.module.backbone.layers)), 0
    layers = models.module.backbone.layers
    for batch in batches:
        for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
            kept = int(mask.sum())
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

            def note(module: torch.nn.Module, args: tuple, output: torch.Tensor, *, name: str, seen: dict) -> None:
                output.retain_grad()
                seen[name] = args[0].detach(), output

            handles = [
                models.plain.get_submodule(name).register_forward_hook(partial(note, name=name, seen=seen))
                for name in projections(models)
            ]
            logits = models.plain(input_ids=ids[None, :kept]).logits[0, :-1]
            for handle in handles:
                handle.remove()
            cross_entropy(logits, labels[1:kept], ignore_index=-100).backward()
            labelled += 1
            for number, layer in enumerate(layers):
                for name, bank in layer.modules:
                    x, output = seen[name]
                    error = x @ residual(bank).T
                    expected[number] += float((output.grad.square() * error.square()).sum())
    found = estimators.create("autoquantize").by_rung(models.module, batches, ladder=[toys.LOWEST, 16])
    np.testing.assert_allclose(found[:, 0], expected / labelled, rtol=2e-4)
    np.testing.assert_array_equal(found[:, 1], 0.0)
    np.testing.assert_array_equal(estimate("autoquantize", models, batches), found[:, 0])


def test_explained_variance_is_the_share_of_the_inputs_variance(models: toys.Models) -> None:
    batches, ladder = toys.batches(), [0, 1, 4, 16, 99]
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in projections(models)}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            handles = [
                models.plain.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, name=name: inputs[name].append(args[0][0].detach().double().numpy())
                )
                for name in inputs
            ]
            models.plain(input_ids=ids[None, : int(mask.sum())])
            for handle in handles:
                handle.remove()
    expected = np.zeros((len(models.module.backbone.layers), len(ladder)))
    for number, layer in enumerate(models.module.backbone.layers):
        for name, _ in layer.modules:
            x = np.concatenate(inputs[name])
            values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
            expected[number] += [values[:rank].sum() / values.sum() for rank in ladder]
    found = estimators.create("explained_variance").by_rung(models.module, batches, ladder=ladder)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(estimate("explained_variance", models, batches, components=4), found[:, 2])


@pytest.mark.parametrize(
    ("name", "options"), [("autoquantize", {"max_batches": 0}), ("explained_variance", {"components": 0})]
)
def test_estimators_by_rung_refuse_options_out_of_range(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=name):
        estimators.create(name, **options)
