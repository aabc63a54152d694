"""Contract suites of the open sets that need torch: importance estimators and quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, RunDirectoryError
from qratk.core.intact import require_intact
from qratk.estimators.base import ImportanceEstimator, Measured
from qratk.exporters.base import Exporter
from qratk.quantizers.base import Moments, PackedLayer, Quantizer

VOCABULARY = 32


def tiny_module(num_layers: int = 3, four_bits: Quantizer | None = None) -> Any:
    """A stand-in for the LightningModule: its `backbone` is a random Llama with a bank of 16 and 4 bits."""
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    from qratk.backbone.backbone import Backbone
    from qratk.quantizers.base import quantizers

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
            )
        )  # fmt: skip
        chosen = {4: four_bits or quantizers.create("nf4"), 16: quantizers.create("none")}
        backbone = Backbone.from_model(model, quantizers=chosen, compute_dtype="float32")
    backbone.build_bank([4])
    return SimpleNamespace(backbone=backbone)


def tiny_batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of four sequences whose first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (4, 8), generator=generator)
        mask = (torch.arange(8) < torch.tensor([8, 7, 6, 5])[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


class EstimatorContract:
    """What every importance estimator promises. Override the fixture `make`: it returns what builds a new one."""

    @pytest.fixture
    def make(self) -> Callable[[], ImportanceEstimator]:
        """A callable that builds the estimator under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.mark.parametrize("num_layers", [1, 3])
    def test_scores_are_one_a_layer_finite_and_not_negative(
        self, make: Callable[[], ImportanceEstimator], num_layers: int
    ) -> None:
        scores = make().estimate(tiny_module(num_layers), tiny_batches(), lowest_bits=4)
        assert isinstance(scores, np.ndarray)
        assert scores.shape == (num_layers,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()

    def test_says_what_the_scores_are_of(self, make: Callable[[], ImportanceEstimator]) -> None:
        assert make().measures in get_args(Measured)

    def test_same_module_gives_the_same_scores(self, make: Callable[[], ImportanceEstimator]) -> None:
        module, batches = tiny_module(), tiny_batches()
        first, again = (make().estimate(module, batches, lowest_bits=4) for _ in range(2))
        np.testing.assert_array_equal(first, again)

    def test_module_is_left_as_found(self, make: Callable[[], ImportanceEstimator]) -> None:
        module = tiny_module()
        model = module.backbone.model
        model.train()
        next(iter(module.backbone.layers)).modules[0][1].eval()
        before = _observed(model)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        active = [bank.active for layer in module.backbone.layers for _, bank in layer.modules]
        make().estimate(module, tiny_batches(), lowest_bits=4)
        assert _observed(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert [bank.active for layer in module.backbone.layers for _, bank in layer.modules] == active

    def test_what_rungs_mean_is_nothing_or_a_table_of_the_same_each_time(
        self, make: Callable[[], ImportanceEstimator]
    ) -> None:
        module, ladder = tiny_module(), [4, 16] if make().measures == "sensitivity" else [0, 2, 4]
        before, state = _observed(module.backbone.model), torch.get_rng_state()
        found, again = (make().by_rung(module, tiny_batches(), ladder=ladder) for _ in range(2))
        assert _observed(module.backbone.model) == before
        assert torch.equal(torch.get_rng_state(), state)
        if found is None:
            assert again is None
            return
        assert found.shape == (len(module.backbone.layers), len(ladder))
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        np.testing.assert_array_equal(found, again)

    def test_random_state_is_left_as_found(self, make: Callable[[], ImportanceEstimator]) -> None:
        module = tiny_module()
        state = torch.get_rng_state()
        make().estimate(module, tiny_batches(), lowest_bits=4)
        assert torch.equal(torch.get_rng_state(), state)

    def test_batches_are_left_as_found(self, make: Callable[[], ImportanceEstimator]) -> None:
        batches = tiny_batches()
        make().estimate(tiny_module(), batches, lowest_bits=4)
        for batch, fresh in zip(batches, tiny_batches(), strict=True):
            assert batch.keys() == fresh.keys()
            assert all(torch.equal(batch[key], fresh[key]) for key in fresh)


def _observed(model: torch.nn.Module) -> list[Any]:
    modes = [(module.training, len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()]
    return [modes, [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]]


class QuantizerContract:
    """What every quantizer promises. `shapes` must hold some that it takes; `bound` is the largest relative error."""

    shapes: tuple[tuple[int, int], ...] = ((64, 64), (32, 96), (17, 64), (5, 7))
    bound: ClassVar[dict[int, float]] = {2: 0.6, 3: 0.35, 4: 0.2, 8: 0.02, 16: 0.005}

    @pytest.fixture
    def make(self) -> Callable[[], Quantizer]:
        """A callable that builds the quantizer under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    def test_some_shape_is_taken_at_every_bit_width(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        assert {bits for _, bits in self._taken(quantizer)} == set(quantizer.supported_bits)

    def test_predicted_bytes_are_those_of_the_tensors(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        for shape, bits in self._taken(quantizer):
            packed = quantizer.quantize(_weight(shape), bits)
            expected = quantizer.packed_bytes(shape, bits)
            codes = packed[quantizer.CODES].nbytes
            assert (codes, sum(t.nbytes for t in packed.values()) - codes) == (expected.weights, expected.metadata)

    def test_dequantized_weight_is_near(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        for shape, bits in self._taken(quantizer):
            weight = _weight(shape)
            dense = quantizer.dequantize(quantizer.quantize(weight, bits), shape, bits, torch.float32)
            assert dense.shape == shape
            assert dense.dtype == torch.float32
            assert float((dense - weight).norm() / weight.norm()) < self.bound[bits]

    def test_quantizing_is_repeatable_and_leaves_weight_and_random_state(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        for shape, bits in self._taken(quantizer):
            weight, state = _weight(shape), torch.get_rng_state()
            first, again = quantizer.quantize(weight, bits), quantizer.quantize(weight, bits)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(weight, _weight(shape))
            assert first.keys() == again.keys()
            assert all(torch.equal(first[name], again[name]) for name in first)

    def test_packed_tensors_survive_safetensors(self, make: Callable[[], Quantizer], tmp_path: Any) -> None:
        from safetensors.torch import load_file, save_file

        quantizer = make()
        for shape, bits in self._taken(quantizer):
            packed = quantizer.quantize(_weight(shape), bits)
            save_file(packed, tmp_path / "packed.safetensors")
            stored = load_file(tmp_path / "packed.safetensors")
            assert torch.equal(
                quantizer.dequantize(stored, shape, bits, torch.float32),
                quantizer.dequantize(packed, shape, bits, torch.float32),
            )

    def test_packing_with_moments_gives_the_same_tensors_in_other_values(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        for shape, bits in self._taken(quantizer):
            weight, moments = _weight(shape), _moments(shape[1])
            packed, again = (quantizer.quantize_calibrated(weight, bits, moments) for _ in range(2))
            plain = quantizer.quantize(weight, bits)
            assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {
                n: (t.shape, t.dtype) for n, t in plain.items()
            }
            assert all(torch.equal(packed[name], again[name]) for name in packed)
            assert torch.equal(weight, _weight(shape))
            assert torch.equal(moments.second, _moments(shape[1]).second)
            if not quantizer.calibrated:
                assert all(torch.equal(packed[name], plain[name]) for name in plain)
            dense = quantizer.dequantize(packed, shape, bits, torch.float32)
            assert float((dense - weight).norm() / weight.norm()) < 2 * self.bound[bits]

    def test_shared_bytes_and_alternatives_are_told(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        assert quantizer.shared_bytes >= 0
        for other in quantizer.alternatives():
            assert isinstance(other, Quantizer)
            assert set(other.supported_bits) & set(quantizer.supported_bits)

    def test_native_layer_multiplies_by_the_dequantized_weight_in_both_modes(
        self, make: Callable[[], Quantizer]
    ) -> None:
        quantizer = make()
        for shape, bits in self._taken(quantizer):
            packed, bias = quantizer.quantize(_weight(shape), bits), torch.linspace(-1, 1, shape[0])
            layer = PackedLayer(packed, shape, bits, bias, torch.float32, multiply=_product)
            module = quantizer.native_layer(layer)
            if module is None:
                continue
            dense = quantizer.dequantize(packed, shape, bits, torch.float32)
            x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                outs = [module.train(mode)(x) for mode in (True, False)]
            torch.testing.assert_close(outs[0], x @ dense.t() + bias)
            assert torch.equal(outs[0], outs[1])
            for tensor in module.state_dict().values():
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()
            assert torch.equal(quantizer.dequantize(packed, shape, bits, torch.float32), dense), "codes are copied"

    def test_what_is_refused_is_refused_clearly(self, make: Callable[[], Quantizer]) -> None:
        quantizer = make()
        unsupported = next(bits for bits in (5, 6, 7) if bits not in quantizer.supported_bits)
        with pytest.raises(QuantizationError, match=str(unsupported)):
            quantizer.check((64, 64), unsupported)
        for shape in self.shapes:
            for bits in quantizer.supported_bits:
                if (shape, bits) not in self._taken(quantizer):
                    with pytest.raises(QuantizationError):
                        quantizer.quantize(_weight(shape), bits)

    def _taken(self, quantizer: Quantizer) -> list[tuple[tuple[int, int], int]]:
        taken = []
        for shape in self.shapes:
            for bits in quantizer.supported_bits:
                try:
                    quantizer.check(shape, bits)
                except QuantizationError:
                    continue
                taken.append((shape, bits))
        return taken


def _product(x: torch.Tensor, dense: Callable[[], torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, dense(), bias)


class ExporterContract:
    """What every exporter promises. Override the fixture `make`: it returns what builds a new one.

    A form that cannot hold nf4 overrides `four_bits`, too.
    """

    @pytest.fixture
    def make(self) -> Callable[[], Exporter]:
        """A callable that builds the exporter under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.fixture
    def four_bits(self) -> Quantizer | None:
        """Quantiser at 4 bits of a weight of rows of 32 or 64; None for nf4."""
        return None

    @pytest.fixture
    def backbone(self, four_bits: Quantizer | None) -> Any:
        """A random Llama at 4 and 16 bits with adapters of rank 2 that do something."""
        backbone = tiny_module(four_bits=four_bits).backbone
        backbone.build_bank([4, 16])
        backbone.activate(Configuration.of([4, 16, 4], [2, 2, 2]), seed=0)
        generator = torch.Generator().manual_seed(5)
        state = backbone.adapter_state()
        backbone.load_adapter_state({n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in state.items()})
        return backbone

    def test_writes_a_folder_and_says_what_reads_it(
        self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path
    ) -> None:
        exporter = make()
        target = exporter.export(backbone, tmp_path / "some" / "out")
        assert any(target.iterdir())
        assert [path.name for path in target.parent.iterdir()] == ["out"], "nothing half written is left beside it"
        assert exporter.takes

    def test_writes_no_pickle(self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path) -> None:
        target = make().export(backbone, tmp_path / "out")
        assert not [path for path in target.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]

    def test_damage_to_any_file_is_found(self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path) -> None:
        target = make().export(backbone, tmp_path / "out")
        require_intact(target)
        for path in [path for path in target.rglob("*") if path.is_file()]:
            before = path.read_bytes()
            path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
            with pytest.raises(ConfigurationError, match=path.name):
                require_intact(target)
            path.write_bytes(before)

    def test_leaves_the_backbone_as_it_was(self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path) -> None:
        state, batch = backbone.adapter_state(), tiny_batches(1)[0]["input_ids"]
        with torch.no_grad():
            logits = backbone.model(input_ids=batch).logits
            make().export(backbone, tmp_path / "out")
            assert torch.equal(backbone.model(input_ids=batch).logits, logits)
        assert all(torch.equal(state[name], tensor) for name, tensor in backbone.adapter_state().items())

    def test_overwrites_nothing(self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(RunDirectoryError, match="there already"):
            make().export(backbone, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_what_fails_half_way_leaves_nothing(
        self, make: Callable[[], Exporter], backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exporter = make()
        write = exporter.write

        def full(backbone: Any, directory: Path) -> None:
            write(backbone, directory)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(exporter), "write", lambda self, *given: full(*given))
        with pytest.raises(RunDirectoryError, match="No space left"):
            exporter.export(backbone, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_wants_an_active_configuration(self, make: Callable[[], Exporter], tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="active"):
            make().export(tiny_module().backbone, tmp_path / "out")


def _moments(d_in: int) -> Moments:
    x = torch.randn(4 * d_in, d_in, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.5, 2, d_in)
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
