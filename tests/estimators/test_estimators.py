"""Importance estimators against dense gradients of plain models by autograd."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import estimator_models as toys
import numpy as np
import pytest
import torch
from estimator_models import estimate

from qratk.bank import gradients
from qratk.bank.gradients import gradient_chunks, per_sequence
from qratk.core.errors import ConfigurationError, DataError, UnsupportedModelError
from qratk.estimators import fisher_residual
from qratk.estimators.base import estimate_together, estimators
from qratk.estimators.gradient_spectrum import spectral_energy

OF_GRADIENTS = ("fisher_residual", "gradient_norm", "gradient_spectrum", "hessian_trace")
OF_DATA = (*OF_GRADIENTS, "activation_error")
NAMES = (*OF_DATA, "quantization_error", "uniform")


def fisher_by_autograd(models: toys.Models, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Eq. 24 with a loop over single sequences and dense gradients."""
    rows = [(batch, row) for batch in batches for row in range(len(batch["labels"]))]
    gradients = [toys.dense_gradients(models, batch, slice(row, row + 1)) for batch, row in rows]
    scores = []
    for layer in models.module.backbone.layers:
        total = 0.0
        for name, bank in layer.modules:
            fisher = torch.stack([g[name].square() for g in gradients]).mean(dim=0)
            total += float((fisher * (bank.reference - bank.dequantized(toys.LOWEST)).square()).sum())
        scores.append(total)
    return np.array(scores)


def spectrum_by_svd(models: toys.Models, batches: list[dict[str, torch.Tensor]], components: int) -> np.ndarray:
    """Eq. 25-26 with dense gradients and a singular value decomposition."""
    gradients = [toys.dense_gradients(models, batch, slice(None)) for batch in batches]
    scores = []
    for layer in models.module.backbone.layers:
        means = [torch.stack([g[name] for g in gradients]).mean(dim=0) for name, _ in layer.modules]
        scores.append(sum(float(torch.linalg.svdvals(m)[:components].square().sum()) for m in means))
    return np.array(scores)


def test_fisher_residual_equals_dense_gradients_of_single_sequences(models: toys.Models) -> None:
    batches = toys.batches()
    np.testing.assert_allclose(
        estimate("fisher_residual", models, batches), fisher_by_autograd(models, batches), rtol=2e-4
    )


def test_fisher_residual_is_not_the_square_of_the_batch_gradient(llama: toys.Models) -> None:
    [batch] = toys.batches(count=1)
    gradient = toys.dense_gradients(llama, batch, slice(None))
    squared_mean = sum(
        float((gradient[name].square() * (bank.reference - bank.dequantized(toys.LOWEST)).square()).sum())
        for layer in llama.module.backbone.layers
        for name, bank in layer.modules
    )
    assert estimate("fisher_residual", llama, [batch]).sum() > 1.5 * squared_mean


@pytest.mark.parametrize("components", [1, 8])
def test_gradient_spectrum_equals_singular_values_of_dense_mean_gradients(models: toys.Models, components: int) -> None:
    batches = toys.batches()
    np.testing.assert_allclose(
        estimate("gradient_spectrum", models, batches, components=components),
        spectrum_by_svd(models, batches, components),
        rtol=2e-4,
    )


def test_gradient_spectrum_does_not_depend_on_the_memory_for_gradients(llama: toys.Models) -> None:
    batches = toys.batches()
    whole = estimate("gradient_spectrum", llama, batches)
    np.testing.assert_array_equal(estimate("gradient_spectrum", llama, batches, gradient_memory="1KiB"), whole)


def test_gradient_memory_bounds_what_is_held_at_a_time(llama: toys.Models) -> None:
    projections = [p for layer in llama.module.backbone.layers for p in layer.modules]
    chunks = list(gradient_chunks(projections, 3000))
    assert [name for chunk in chunks for name in chunk] == [name for name, _ in projections]
    assert len(chunks) > 1
    for chunk in chunks:
        held = sum(4 * bank.shape[0] * bank.shape[1] for bank in chunk.values())
        assert held <= 3000 or len(chunk) == 1


@pytest.mark.parametrize("name", ["activation_error", "fisher_residual", "gradient_norm", "gradient_spectrum"])
def test_scores_add_up_over_a_finer_split_of_the_layers(name: str, llama: toys.Models) -> None:
    batches = toys.batches()
    blocks = estimate(name, llama, batches)
    backbone = llama.module.backbone
    parts = [SimpleNamespace(name=n, modules=((n, bank),)) for layer in backbone.layers for n, bank in layer.modules]
    split = SimpleNamespace(backbone=SimpleNamespace(model=backbone.model, layers=tuple(parts)))
    single = estimators.create(name).estimate(split, batches, lowest_bits=toys.LOWEST)
    sizes = [len(layer.modules) for layer in backbone.layers]
    sums = [single[start:stop].sum() for start, stop in itertools.pairwise(np.cumsum([0, *sizes]))]
    np.testing.assert_allclose(blocks, sums, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_the_scores(name: str, llama: toys.Models) -> None:
    [batch] = toys.batches(count=1)
    size = len(batch["labels"])
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    padded = {k: torch.cat([v, torch.full((size, 5), fill[k])], dim=1) for k, v in batch.items()}
    np.testing.assert_allclose(estimate(name, llama, [padded]), estimate(name, llama, [batch]), rtol=2e-4)


@pytest.mark.parametrize("name", [*OF_GRADIENTS, "quantization_error", "uniform"])
def test_sequences_without_a_label_do_not_count(name: str, llama: toys.Models) -> None:
    [batch] = toys.batches(count=1)
    blank = {k: torch.cat([v, v[:1]]) for k, v in batch.items()}
    blank["labels"][-1] = -100
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    np.testing.assert_allclose(estimate(name, llama, [unlabelled, blank]), estimate(name, llama, [batch]), rtol=2e-4)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_batches_without_any_label_are_an_error(name: str, llama: toys.Models) -> None:
    [batch] = toys.batches(count=1)
    with pytest.raises(DataError, match="labelled token"):
        estimate(name, llama, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])


@pytest.mark.parametrize("name", NAMES)
def test_module_and_random_state_are_left_as_found(name: str, models: toys.Models) -> None:
    model = models.module.backbone.model
    model.train()
    model.get_submodule(models.module.backbone.layers[1].name).eval()
    adapter = torch.nn.Parameter(torch.ones(1))  # a trainable parameter in the graph must not collect a gradient
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] * adapter,))
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    scores = estimate(name, models, toys.batches())
    handle.remove()
    assert scores.shape == (3,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert (scores >= 0 if name == "hessian_trace" else scores > 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert adapter.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for _, bank in _banks(models) for module in [bank])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _banks(models: toys.Models) -> list[tuple[str, torch.nn.Module]]:
    return [pair for layer in models.module.backbone.layers for pair in layer.modules]


@pytest.mark.parametrize("name", OF_DATA)
def test_hooks_and_modes_are_restored_after_an_error(name: str, llama: toys.Models) -> None:
    model = llama.module.backbone.model.train()
    [batch] = toys.batches(count=1)
    with pytest.raises(KeyError):
        estimate(name, llama, [{k: v for k, v in batch.items() if k != "attention_mask"}])
    assert model.training
    assert all(not bank._forward_hooks and not bank._forward_pre_hooks for _, bank in _banks(llama))
    assert all("forward" not in vars(bank) for _, bank in _banks(llama))


@pytest.mark.parametrize("name", OF_DATA)
def test_max_batches_uses_the_first_ones(name: str, llama: toys.Models) -> None:
    batches = toys.batches(count=3)
    np.testing.assert_array_equal(estimate(name, llama, batches, max_batches=1), estimate(name, llama, batches[:1]))


@pytest.mark.parametrize("name", OF_DATA)
def test_scores_are_equal_with_and_without_dropout_in_the_training_mode(name: str, llama: toys.Models) -> None:
    batches = toys.batches(count=1)
    scores = []
    for training in (True, False):
        llama.module.backbone.model.train(training)
        scores.append(estimate(name, llama, batches))
    np.testing.assert_array_equal(*scores)


def test_spectral_energy_of_a_diagonal_matrix_is_known() -> None:
    matrix = torch.zeros(3, 5)
    matrix[0, 0], matrix[1, 1], matrix[2, 2] = 3.0, -2.0, 1.0
    assert spectral_energy(matrix, 2) == pytest.approx(13.0)
    assert spectral_energy(matrix.T, 8) == pytest.approx(14.0)


def spectra() -> dict[str, torch.Tensor]:
    """Large matrices (300, 700): of a flat spectrum, the worst there is, of decaying ones, and of low rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 300, generator=generator), torch.randn(300, 700, generator=generator)
    powers = torch.arange(1, 301) ** -0.7
    return {
        "flat": right,
        "decaying": left * powers @ right,
        "of rank 70": left[:, :70] @ right[:70],
        "of rank 3": left[:, :3] @ right[:3],
        "tiny": 1e-25 * (left * powers @ right),
        "zero": torch.zeros(300, 700),
    }


@pytest.mark.parametrize("components", [1, 8, 24])
@pytest.mark.parametrize("kind", spectra())
def test_spectral_energy_of_a_large_matrix_is_that_of_its_singular_values(kind: str, components: int) -> None:
    matrix = spectra()[kind]
    exact = float(torch.linalg.svdvals(matrix.double())[:components].square().sum())
    for turned in (matrix, matrix.T):
        found = spectral_energy(turned, components)
        assert found == spectral_energy(turned, components)
        assert found == pytest.approx(exact, rel=1e-3)
        assert found == pytest.approx(exact, rel=1e-5) or kind in ("flat", "of rank 70")


def test_fisher_residual_of_large_projections_equals_dense_gradients_too(
    models: toys.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_residual, "_SMALL", 0)
    monkeypatch.setattr(gradients, "_SMALL", 0)
    batches = toys.batches()
    np.testing.assert_allclose(
        estimate("fisher_residual", models, batches), fisher_by_autograd(models, batches), rtol=2e-4
    )


def test_flattened_tokens_are_told_apart_by_sequence() -> None:
    x, grad = torch.arange(24.0).reshape(2, 3, 4), torch.arange(12.0).reshape(2, 3, 2)
    found = per_sequence(x.reshape(6, 4), grad.reshape(6, 2), "mlp", 2)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], grad)


def test_rows_that_belong_to_no_sequence_are_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="batch size of 1"):
        per_sequence(torch.zeros(5, 4), torch.zeros(5, 2), "experts.0", 2)


@pytest.mark.parametrize("options", [{"components": 0}, {"max_batches": 0}, {"gradient_memory": "much"}])
def test_bad_options_of_the_spectrum_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        estimators.create("gradient_spectrum", **options)


def test_bad_options_of_the_fisher_residual_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_batches"):
        estimators.create("fisher_residual", max_batches=0)


def test_uniform_scores_are_one() -> None:
    module = SimpleNamespace(backbone=SimpleNamespace(layers=(None,) * 4))
    np.testing.assert_array_equal(estimators.create("uniform").estimate(module, [], lowest_bits=2), np.ones(4))


SHARING = [{"max_batches": None}, {"max_batches": 3}]  # of three batches


@pytest.mark.parametrize("options", SHARING)
def test_estimators_that_share_a_pass_say_what_they_say_alone(
    llama: toys.Models, options: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = toys.batches(count=3)
    asked = [estimators.create(name, **options) for name in ("fisher_residual", "gradient_spectrum")]
    asked.append(estimators.create("quantization_error"))
    apart = [one.estimate(llama.module, batches, lowest_bits=toys.LOWEST) for one in asked]
    passes = []
    loss = gradients.sequence_loss
    monkeypatch.setattr(gradients, "sequence_loss", lambda *given: passes.append(given) or loss(*given))
    together = estimate_together(asked, llama.module, batches, lowest_bits=toys.LOWEST)
    assert len(passes) == len(batches)
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{"max_batches": 2}, {"gradient_memory": 4 * 3000}])
def test_an_estimator_that_cannot_share_makes_passes_of_its_own(
    llama: toys.Models, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = toys.batches(count=3)
    asked = [estimators.create("fisher_residual"), estimators.create("gradient_spectrum", **options)]
    apart = [one.estimate(llama.module, batches, lowest_bits=toys.LOWEST) for one in asked]
    passes = []
    loss = gradients.sequence_loss
    monkeypatch.setattr(gradients, "sequence_loss", lambda *given: passes.append(given) or loss(*given))
    together = estimate_together(asked, llama.module, batches, lowest_bits=toys.LOWEST)
    assert len(passes) > len(batches)
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_gradient_of_a_batch_in_bfloat16_is_multiplied_in_it_and_added_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    sums, exact = gradients.GradientSums(), torch.zeros(7, 5)
    size = gradients.BatchSize(4, 2)
    for _ in range(3):
        x, grad = (torch.randn(4, 6, width, generator=generator).bfloat16() for width in (5, 7))
        sums.visit("one", x, grad, size)
        exact += grad.flatten(0, 1).float().T @ x.flatten(0, 1).float() / 2
    found = sums.means([size] * 3)["one"]
    assert found.dtype == torch.float32
    assert float((found - exact / 3).norm()) < 3e-3 * float(exact.norm() / 3)
    assert not sums.means([size])


def test_single_gradients_of_large_weights_are_those_of_the_first_sequences(
    llama: toys.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = toys.batches(count=5)
    sequences = len(batches[0]["labels"])
    few, many = fisher_by_autograd(llama, batches[:3]), fisher_by_autograd(llama, batches)
    assert not np.allclose(few, many, rtol=1e-2)
    monkeypatch.setattr(fisher_residual, "_SEQUENCES", 2 * sequences + 1)  # in the midst of the third batch
    np.testing.assert_allclose(estimate("fisher_residual", llama, batches), many, rtol=2e-4)
    monkeypatch.setattr(fisher_residual, "_SMALL", 0)
    np.testing.assert_allclose(estimate("fisher_residual", llama, batches), few, rtol=2e-4)
    asked = [estimators.create(name) for name in ("fisher_residual", "gradient_spectrum")]
    shared, _ = estimate_together(asked, llama.module, batches, lowest_bits=toys.LOWEST)
    np.testing.assert_allclose(shared, few, rtol=2e-4)
    sizes = [b.out_features * b.in_features for layer in llama.module.backbone.layers for _, b in layer.modules]
    monkeypatch.setattr(fisher_residual, "_SMALL", sorted(set(sizes))[0])  # some are small
    mixed = estimate("fisher_residual", llama, batches)
    assert not np.allclose(mixed, few, rtol=1e-3)
    assert not np.allclose(mixed, many, rtol=1e-3)
