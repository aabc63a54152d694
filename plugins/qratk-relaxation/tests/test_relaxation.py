"""The relaxation keeps the contract, leaves the model as it was, and gives bits to the layers that need them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qratk_relaxation import Relaxation, priced_mode
from qratk_relaxation._gates import Gates, gumbel_softmax, limits_of
from qratk_relaxation._mixture import MixtureMatmul, Weights, gated
from qratk_relaxation._training import Price

from qratk import (
    REGISTRIES,
    Configuration,
    ConfigurationError,
    EvaluationContext,
    FidelityLadder,
    GlobalSearcher,
    History,
    Problem,
    Proposer,
    SearchError,
)
from qratk.testing import CASES, LADDER, VOCABULARY, SearcherContract, default_proposer, tiny_batches, toy_problem

pytestmark = [
    # Importing hqq makes torch warn of its own use of torch.jit.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # PEFT reads an attribute of every model that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@lru_cache
def tiny_backbone(num_layers: int, bits: tuple[int, ...]) -> Any:
    """A random Llama whose bank holds these bit-widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qratk import REGISTRIES, Backbone

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
            )
        )  # fmt: skip
    chosen = {b: REGISTRIES["quantizers"].create("none" if b == 16 else "hqq") for b in bits}
    backbone = Backbone.from_model(model, quantizers=chosen, compute_dtype="float32", bank_dir=None)
    backbone.build_bank(bits)
    return backbone


def context(problem: Problem) -> EvaluationContext:
    """A tiny model with the problem's layers and bits, and its data."""
    module = SimpleNamespace(
        backbone=tiny_backbone(problem.num_layers, problem.space.bits), options=SimpleNamespace(learning_rate=1e-2)
    )
    data = SimpleNamespace(calibration_batches=lambda count, size: tiny_batches(count))
    return EvaluationContext(Path(), LADDER, 0, module, data, say=lambda text: None)


class Attached(Relaxation):
    """Is shown a tiny model made for the problem that it begins."""

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        self.attach(context(proposer.problem))
        super().begin(proposer, ladder)


class TestRelaxationContract(SearcherContract):
    @pytest.fixture(params=["one layer", "one bit-width", "one rank", "rank 0 and 16 bits", "capped and budgeted"])
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return toy_problem(**{"num_layers": 4, **CASES[request.param]})

    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: Attached(offspring=5, steps=3, batches=2)


class TestStraightThroughContract(SearcherContract):
    @pytest.fixture(params=["one layer", "capped average bits"])
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return toy_problem(**{"num_layers": 3, **CASES[request.param]})

    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: Attached(offspring=5, steps=2, batches=1, estimator="straight_through", constraint="hinge")


def asked(problem: Problem, seed: int = 0, **options: Any) -> tuple[Relaxation, tuple[Any, ...]]:
    """A searcher after its first `ask`, and what it asked for."""
    searcher = Attached(**{"offspring": 6, "steps": 4, "batches": 2, **options})
    searcher.begin(default_proposer(problem), LADDER)
    return searcher, searcher.ask(History(), np.random.default_rng(seed))


# The mixture


def test_mixture_has_the_gradients_of_plain_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(5, 4, generator=generator) for _ in range(3)]
    x, p = torch.randn(2, 3, 4, generator=generator), torch.tensor([0.2, 0.5, 0.3])
    found: list[tuple[torch.Tensor, ...]] = []
    for plain in (False, True):
        a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
        if plain:
            out = a @ sum(share * weight for share, weight in zip(b, dense, strict=True)).t()
        else:
            out = MixtureMatmul.apply(a, b, [lambda dtype, w=weight: w.to(dtype) for weight in dense])
        (out * torch.arange(30.0).reshape(2, 3, 5)).sum().backward()
        found.append((out.detach(), a.grad, b.grad))
    for mine, plainly in zip(*found, strict=True):
        torch.testing.assert_close(mine, plainly)


def test_gates_of_one_configuration_compute_what_that_configuration_does() -> None:
    problem = toy_problem(3, ranks=(0, 2, 4))
    backbone, batch = tiny_backbone(3, problem.space.bits), tiny_batches(1)[0]
    configuration = Configuration.of((2, 8, 4), (4, 0, 2))
    one_hot = [
        torch.nn.functional.one_hot(torch.tensor(column), 3).float()
        for column in problem.space.indices(configuration).T.tolist()
    ]
    backbone.activate(configuration, seed=5)
    values = {name: 0.1 * torch.ones_like(p) for name, p in backbone.trainable_parameters() if "lora_B" in name}
    backbone.load_adapter_state({**backbone.adapter_state(), **values})
    expected = backbone.model(input_ids=batch["input_ids"]).logits
    with gated(backbone, Weights(*one_hot), problem.space.bits, problem.space.ranks, seed=5) as adapters:
        with torch.no_grad():
            for parameter in adapters[1::2]:
                parameter.fill_(0.1)
        found = backbone.model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(found, expected)


# The gates


@pytest.mark.parametrize("case", ["rank 0 and 16 bits", "capped and budgeted"])
def test_gradient_of_the_expected_use_agrees_with_finite_differences(case: str) -> None:
    problem = toy_problem(**{"num_layers": 4, **CASES[case]})
    gates = Gates(problem, torch.device("cpu")).double()
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for limit in limits_of(problem, torch.device("cpu")):
        limit = type(limit)(limit.bits.double(), limit.rank.double(), limit.constant)
        assert torch.autograd.gradcheck(
            lambda bits, rank, limit=limit: limit.excess(bits.softmax(1), rank.softmax(1)), tuple(gates.parameters())
        )


def test_expected_excess_is_the_mean_over_configurations() -> None:
    problem = toy_problem(6, max_average_bits=4.5)
    gates, rng = Gates(problem, torch.device("cpu")), np.random.default_rng(0)
    bits, rank = (p.detach() for p in gates.probabilities())  # uniform, as `space.random` draws
    drawn = [problem.space.random(rng) for _ in range(4000)]
    sizes = [problem.bytes(c) / problem.budget.limit_bytes - 1 for c in drawn]
    averages = [problem.memory.average_bits(c) / 4.5 - 1 for c in drawn]
    found = [float(limit.excess(bits, rank)) for limit in limits_of(problem, torch.device("cpu"))]
    np.testing.assert_allclose(found, [np.mean(sizes), np.mean(averages)], atol=0.02)


def test_samples_follow_the_probabilities_and_hard_ones_keep_the_soft_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20_000, 1).requires_grad_()
    hard = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0), hard=True)
    soft = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0), hard=False)
    np.testing.assert_allclose(
        hard.detach().mean(0).numpy(), torch.tensor([0.0, 1.0, 2.0]).softmax(0).numpy(), atol=0.01
    )
    (of_hard,) = torch.autograd.grad(hard[:, 2].sum(), logits)
    (of_soft,) = torch.autograd.grad(soft[:, 2].sum(), logits)
    torch.testing.assert_close(of_hard, of_soft)


def test_multiplier_rises_while_over_the_budget_and_falls_to_zero_below() -> None:
    problem = toy_problem(3)
    price = Price(limits_of(problem, torch.device("cpu")), 1.0, adapt=True)
    most, least = ([torch.eye(3)[index].repeat(3, 1) for _ in "br"] for index in (2, 0))
    first, second = float(price(*most)), float(price(*most))
    assert 0 < first < second
    for _ in range(100):
        price(*least)
    assert price.multipliers == [0.0]
    assert float(price(*least)) == 0.0


# The outcome


def test_model_is_left_as_found_and_so_is_the_random_state() -> None:
    problem = toy_problem(4)
    backbone = tiny_backbone(4, problem.space.bits)
    backbone.activate(problem.space.largest, seed=0)
    backbone.model.train()
    next(backbone.base.children()).eval()
    modules = {name: (id(m), m.training) for name, m in backbone.model.named_modules()}
    values = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    active = [bank.active for bank in backbone.banks.values()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    asked(problem)
    assert {name: (id(m), m.training) for name, m in backbone.model.named_modules()} == modules
    assert all(torch.equal(value, values[name]) for name, value in backbone.model.state_dict().items())
    assert [bank.active for bank in backbone.banks.values()] == active
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert torch.equal(torch.get_rng_state(), random[0])
    np.testing.assert_array_equal(np.random.get_state()[1], random[1])  # type: ignore[index]


def test_gates_are_distributions_and_depend_on_the_generator_alone() -> None:
    problem = toy_problem(4)
    first, again, other = (asked(problem, seed)[0].gates for seed in (0, 0, 1))
    for probabilities, same, different in zip(first, again, other, strict=True):
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
        np.testing.assert_array_equal(probabilities, same)
        assert not np.array_equal(probabilities, different)


def test_resumed_searcher_does_not_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = toy_problem(4)
    searcher, _ = asked(problem)
    resumed = Relaxation(offspring=6)
    resumed.begin(default_proposer(problem), LADDER)  # no model is attached: training would raise
    resumed.restore(json.loads(json.dumps(searcher.state(), allow_nan=False)))
    known, rng = History(), np.random.default_rng(4)
    assert resumed.ask(known, rng) == searcher.ask(known, np.random.default_rng(4))


def test_budget_holds_after_rounding_however_greedy_the_gates() -> None:
    problem = toy_problem(5)
    searcher, _ = asked(problem)
    wish = np.tile([0.0, 0.01, 0.99], (5, 1)).tolist()
    searcher.restore({**searcher.state(), "gates": {"bits": wish, "rank": wish}})
    candidates = searcher.ask(History(), np.random.default_rng(0))
    assert candidates[0].origin == "relaxation:mode"
    assert all(problem.feasible(candidate.configuration) for candidate in candidates)


def test_priced_mode_is_near_the_best_of_all_configurations_that_fit() -> None:
    import itertools

    problem, rng = toy_problem(3), np.random.default_rng(2)
    bits, rank = (rng.dirichlet(np.ones(3), size=3) for _ in range(2))

    def merit(indices: np.ndarray) -> float:
        return float(sum(np.log(p[np.arange(3), indices[:, k]]).sum() for k, p in enumerate((bits, rank))))

    every = [np.array(flat).reshape(3, 2) for flat in itertools.product(range(3), repeat=6)]
    fitting = [c for c in every if problem.feasible(problem.space.from_indices(c))]
    found = priced_mode(problem, bits, rank)
    assert problem.feasible(problem.space.from_indices(found))
    same_or_smaller = [c for c in fitting if size(problem, c) <= size(problem, found)]
    assert merit(found) == pytest.approx(max(map(merit, same_or_smaller)))  # on the convex hull
    assert merit(found) <= max(map(merit, fitting))


def size(problem: Problem, indices: np.ndarray) -> int:
    return problem.bytes(problem.space.from_indices(indices))


# Rise of the embedded model's held-out loss with one layer at 2 bits, from the table in qratk/embedded/README.md.
RISES = (0.019, 0.000, 0.001, 0.000, 0.001, 0.001, 0.002, 0.003, 0.003, 0.001, 0.006, 0.005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_gates_give_more_bits_to_the_sensitive_layers_of_the_embedded_model(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    from qratk import EmbeddedData, FineTuneEvaluator, FineTuneModule, Importance, SearchSpace, resolve_budget

    module, data = FineTuneModule("embedded", learning_rate=5e-3, bank_dir=None), EmbeddedData(batch_size=16)
    given = EvaluationContext(tmp_path, FidelityLadder((40,)), 0, module, data, say=lambda text: None)
    evaluator = FineTuneEvaluator()
    evaluator.open(given)
    space = SearchSpace((2, 4, 8), (2, 4, 8, 16), tuple(shape.name for shape in evaluator.shapes))
    memory = evaluator.memory_model(space)
    problem = Problem(evaluator.shapes, memory, resolve_budget(memory, like=(4, 8)), Importance.uniform(12))
    searcher = Relaxation(offspring=3, steps=60)
    searcher.attach(given)
    searcher.begin(default_proposer(problem), given.ladder)
    candidates = searcher.ask(History(), np.random.default_rng(0))
    bits, _ = searcher.gates
    assert spearmanr(bits @ space.bits, RISES).statistic > 0.3
    assert all(problem.feasible(candidate.configuration) for candidate in candidates)
    assert problem.bytes(candidates[1].configuration) > 0.9 * problem.budget.limit_bytes  # what the mode leaves, priced


def test_search_without_a_model_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="model itself"):
        Relaxation().attach(EvaluationContext(Path(), LADDER, 0))


def test_model_that_was_never_attached_is_asked_for() -> None:
    searcher = Relaxation()
    searcher.begin(default_proposer(toy_problem(3)), LADDER)
    with pytest.raises(ConfigurationError, match="attach"):
        searcher.ask(History(), np.random.default_rng(0))


def test_model_with_other_layers_than_the_problem_is_refused() -> None:
    searcher = Relaxation()
    searcher.attach(context(toy_problem(4)))
    searcher.begin(default_proposer(toy_problem(5)), LADDER)
    with pytest.raises(ConfigurationError, match="4 layers"):
        searcher.ask(History(), np.random.default_rng(0))


def test_diverging_loss_says_what_to_lower() -> None:
    with pytest.raises(SearchError, match="adapter_learning_rate"):
        asked(toy_problem(3), adapter_learning_rate=1e30, steps=20, warmup=0.9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offspring": 0}, "offspring"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup": 1.0}, "warmup"),
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"adapter_learning_rate": -1.0}, "adapter_learning_rate"),
        ({"estimator": "reinforce"}, "reinforce"),
        ({"constraint": "none"}, "none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Relaxation(**options)


def test_it_is_found_by_its_name() -> None:
    assert isinstance(REGISTRIES["searchers"].create("relaxation", steps=3), Relaxation)
