"""Contract suite of adapter methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from qratk.adapters.base import AdapterMethod, Way, stored_bytes
from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.shared import Setting
from qratk.core.space import SearchSpace
from qratk.quantizers.base import quantizers

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone

_STEPS = 12
_MIXED = Configuration.of([4, 4, 4], [4, 0, 8])
_SHARED: dict[str, Setting] = {"alpha_over_rank": 0.5, "lora_dropout": 0.3, "rslora": True}


def tiny_llama() -> Any:
    """A random Llama of three blocks, with weights that 16 bits can hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.train(False)
    return model


def adapted(method: AdapterMethod, configuration: Configuration, **options: Any) -> Backbone:
    """A backbone of 4 and 16 bits with fresh adapters of a method."""
    from qratk.backbone.backbone import Backbone

    table = {4: quantizers.create("nf4"), 16: quantizers.create("none")}
    backbone = Backbone.from_model(
        tiny_llama(), quantizers=table, method=method, compute_dtype="float32", bank_dir=None,
        adapter=AdapterOptions(**options),
    )  # fmt: skip
    backbone.build_bank([4])
    backbone.activate(configuration, seed=3)
    return backbone


def batch() -> dict[str, torch.Tensor]:
    """Four sequences of 12 tokens."""
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the batch, without gradients."""
    with torch.no_grad():
        out: torch.Tensor = model(**batch()).logits
    return out


def trained(backbone: Backbone, steps: int = _STEPS) -> list[float]:
    """Losses of some steps on one batch, the whole schedule of what follows each step being done."""
    adapters = backbone.adapters
    rate = 1e-2 * adapters.method.learning_rate_factor
    optimizer = torch.optim.AdamW([p for _, p in adapters.parameters()], lr=rate)
    after = adapters.after_steps(steps)
    losses = []
    for step in range(1, steps + 1):
        loss = backbone.model(**batch(), labels=batch()["input_ids"]).loss
        losses.append(loss.item())
        penalty = adapters.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        if after is not None:
            after.step(step)
    return losses


class AdapterContract:
    """What every adapter method promises. Override the fixture `make`: it returns what builds a new one."""

    @pytest.fixture
    def make(self) -> Callable[[], AdapterMethod]:
        """A callable that builds the method under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    def test_fresh_adapters_change_nothing(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), Configuration.uniform(4, 0, 3))
        without = logits(backbone.model)
        assert backbone.trainable_parameters() == []
        backbone.activate(Configuration.uniform(4, 8, 3), seed=3)
        torch.testing.assert_close(logits(backbone.model), without, rtol=1e-5, atol=1e-5)

    def test_first_values_depend_on_the_seed_alone(self, make: Callable[[], AdapterMethod]) -> None:
        state = torch.get_rng_state()
        first, again = adapted(make(), _MIXED), adapted(make(), _MIXED)
        before = first.adapter_state()
        assert all(torch.equal(value, again.adapter_state()[name]) for name, value in before.items())
        again.activate(_MIXED, seed=4)
        assert any(not torch.equal(value, again.adapter_state()[name]) for name, value in before.items())
        assert torch.equal(torch.get_rng_state(), state)

    def test_only_the_adapters_are_trained_and_they_learn(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        own = {id(parameter) for _, parameter in backbone.trainable_parameters()}
        assert {id(p) for p in backbone.model.parameters() if p.requires_grad} == own
        assert all(parameter.dtype == torch.float32 for _, parameter in backbone.trainable_parameters())
        losses = trained(backbone)
        assert losses[-1] < losses[0]

    def test_stored_bytes_are_those_foretold(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        trained(backbone)
        method, options = backbone.adapters.method, backbone.adapters.options
        from qratk.peaks.foretold import memory_model

        foretold = sum(
            stored_bytes(method, options, [bank.shape for _, bank in layer.modules], choice.rank)
            for layer, choice in zip(backbone.layers, _MIXED.layers, strict=True)
        )
        space = SearchSpace((4,), (0, 4, 8), tuple(shape.name for shape in backbone.shapes))
        stored = backbone.adapters.stored_tensors()
        assert memory_model(backbone, space, trace=False).footprint(_MIXED).adapters == foretold
        assert 0.9 * foretold <= sum(tensor.nbytes for tensor in stored.values()) <= foretold
        assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{options.dtype}"}

    def test_scores_are_of_what_is_stored_and_the_masters_return(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        trained(backbone)
        before, masters = backbone.adapter_state(), logits(backbone.model)
        with backbone.stored_precision():
            assert not torch.equal(logits(backbone.model), masters)
        after = backbone.adapter_state()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(logits(backbone.model), masters)

    def test_shared_settings_hold_for_their_configuration_alone(self, make: Callable[[], AdapterMethod]) -> None:
        plain, used = adapted(make(), _MIXED), adapted(make(), _MIXED.with_shared(_SHARED))
        other, expected = trained(used), trained(plain)
        used.activate(_MIXED, seed=3)
        again = trained(used)
        assert again == expected != other

    @pytest.mark.parametrize("shared", [{}, _SHARED], ids=["plain", "shared settings"])
    def test_saved_adapters_have_the_same_logits_in_plain_peft(
        self, make: Callable[[], AdapterMethod], tmp_path: Path, shared: dict[str, Setting]
    ) -> None:
        from peft import PeftModel

        configuration = Configuration.of([16, 16, 16], [4, 0, 8]).with_shared(shared)
        backbone = adapted(make(), configuration)
        trained(backbone)
        backbone.save_adapter(tmp_path, configuration)
        plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        backbone.model.eval()
        with backbone.stored_precision():
            torch.testing.assert_close(logits(plain), logits(backbone.model), rtol=1e-5, atol=1e-5)

    def test_state_is_put_back_and_that_of_other_ranks_refused(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        trained(backbone)
        state, expected = backbone.adapter_state(), logits(backbone.model)
        backbone.activate(Configuration.uniform(4, 2, 3), seed=3)
        with pytest.raises(ConfigurationError, match="another configuration"):
            backbone.load_adapter_state(state)
        backbone.activate(_MIXED, seed=9)
        backbone.load_adapter_state(state)
        assert torch.equal(logits(backbone.model), expected)

    def test_delta_is_what_the_adapter_adds_to_the_weight(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        trained(backbone)
        for name, bank in backbone.banks.items():
            x = torch.randn(3, bank.in_features, generator=torch.Generator().manual_seed(2))
            merged = bank.dequantized(bank.active) + backbone.adapters.delta(name)
            with torch.no_grad():
                torch.testing.assert_close(backbone.base.get_submodule(name)(x), x @ merged.t(), rtol=1e-4, atol=1e-4)

    def test_candidates_are_trained_side_by_side_or_it_is_said_why_not(self, make: Callable[[], AdapterMethod]) -> None:
        backbone = adapted(make(), _MIXED)
        from qratk.training.cohort import Cohort

        refusal = backbone.adapters.method.refusal("side by side")
        if refusal:
            with pytest.raises(ConfigurationError, match="one by one"):
                Cohort.of(backbone, [_MIXED, _MIXED], seed=3)
            return
        cohort = Cohort.of(backbone, [_MIXED, _MIXED], seed=3)
        alone = backbone.adapter_state()
        assert all(torch.equal(value, alone[name]) for name, value in cohort.state(1).items())

    def test_what_is_trained_for_a_configuration_is_trained_for_itself_at_the_same_bits(
        self, make: Callable[[], AdapterMethod]
    ) -> None:
        method, configuration = make(), Configuration.from_text("2:2 4:0 8:32")
        trained = method.trained(configuration)
        assert method.trained(trained) == trained
        assert trained.bits == configuration.bits
        assert trained == configuration or method.shares_trainings

    def test_refusals_are_words_without_an_end(self, make: Callable[[], AdapterMethod]) -> None:
        method = make()
        for way in get_args(Way):
            assert method.refusal(way).strip(" .:") == method.refusal(way)

    def test_training_peak_is_foretold(self, make: Callable[[], AdapterMethod]) -> None:
        from qratk.peaks.foretold import memory_model
        from qratk.peaks.measure import measured_peak

        uniform = Configuration.uniform(4, 8, 3)
        backbone = adapted(make(), uniform)
        space = SearchSpace((4,), (8,), tuple(shape.name for shape in backbone.shapes))
        sizes = {"batch_size": 4, "sequence_length": 24}
        memory = memory_model(backbone, space, **sizes)  # type: ignore[arg-type]
        foretold = memory.footprint(uniform).training_bytes
        measured = measured_peak(backbone, uniform, **sizes)  # type: ignore[arg-type]
        assert memory.training.source == "trace"
        assert foretold >= 0.95 * measured
        if backbone.adapters.method.traced == backbone.adapters.method:
            assert foretold <= 1.05 * measured
