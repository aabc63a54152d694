"""Components of every open set, written as a third party would: with the front door and the contract suites alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from qratk import (
    REGISTRIES,
    AdapterMethod,
    AdapterOptions,
    Adapters,
    Backbone,
    BankLinear,
    Blueprint,
    Candidate,
    Configuration,
    ConfigurationError,
    Destination,
    Equipment,
    Evaluation,
    EvaluationContext,
    Evaluator,
    Executor,
    Exporter,
    Factors,
    FidelityLadder,
    GenerationSummary,
    GlobalSearcher,
    Group,
    History,
    ImportanceEstimator,
    LayerBytes,
    LayerShape,
    LocalRefiner,
    Measured,
    MemoryModel,
    Moments,
    MutationOperator,
    Packed,
    PackedBytes,
    Prediction,
    Problem,
    Progress,
    PromotionSurrogate,
    Proposer,
    QuantizationError,
    Quantizer,
    Record,
    RefinementSummary,
    RejectedConfigurationError,
    RepairPolicy,
    Reporter,
    Request,
    Residual,
    SearchPlan,
    SearchResult,
    SearchSpace,
    Start,
    SurrogateQuality,
    Utility,
    Way,
    Weighting,
    Work,
)
from qratk.testing import (
    EstimatorContract,
    EvaluatorContract,
    ExecutorContract,
    ExporterContract,
    MutationContract,
    QuantizerContract,
    StartContract,
)


class MyEstimator(ImportanceEstimator):
    measures: ClassVar[Measured] = "nothing"

    def estimate(self, module: Any, batches: Sequence[dict[str, Any]], *, lowest_bits: int) -> np.ndarray:
        return np.arange(len(module.backbone.layers), dtype=np.float64)


class MyMutation(MutationOperator):
    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        return problem.space.random(rng)


class MyRepair(RepairPolicy):
    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        if problem.feasible(configuration):
            return configuration
        raise RejectedConfigurationError("too large")


class MySurrogate(PromotionSurrogate):
    trusted = False
    quality = SurrogateQuality(0, np.nan, np.nan, np.nan)

    def fit(self, problem: Problem, history: History, *, low: int, high: int) -> None:
        pass

    def predict(self, problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Prediction, ...]:
        return tuple(Prediction(e.configuration, e.score) for e in evaluations)


class MySearcher(GlobalSearcher):
    finished, generation_size = True, 1

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        self.problem = proposer.problem

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        return ()

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class MyRefiner(LocalRefiner):
    finished, stop_reason = True, "nothing to refine"
    diagnostics: ClassVar[dict[str, float]] = {}

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        pass

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        return ()

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        pass

    def planned_evaluations(self, ladder: FidelityLadder) -> dict[int, int]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class MyQuantizer(Quantizer):
    """Signs, times the mean magnitude of a row."""

    supported_bits = (4,)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        if bits != 4:
            raise QuantizationError(f"4 bits alone, not {bits}")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        self.check((weight.shape[0], weight.shape[1]), bits)
        return {self.CODES: torch.sign(weight).to(torch.int8), "scales": weight.float().abs().mean(dim=1)}

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        return self.quantize(weight, bits)

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return (packed[self.CODES] * packed["scales"][:, None]).to(dtype)

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        return PackedBytes(shape[0] * shape[1], 4 * shape[0])


class MyAdapters(AdapterMethod):
    """Says all that needs no model."""

    learning_rate_factor = 1.0

    def check(self, options: AdapterOptions) -> None:
        if options.init != "default":
            raise ConfigurationError("no start but the default")

    def refusal(self, way: Way) -> str:
        return "it is a sketch"

    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        return rank * sum(shape)

    @property
    def traced(self) -> AdapterMethod:
        return self

    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        return memory

    def wrap(self, model: Any, banks: Mapping[str, BankLinear], options: AdapterOptions) -> Adapters:
        raise ConfigurationError("it is a sketch")


class MyStart(Start):
    """The first component alone, whatever rank is asked for."""

    weighted = False

    def weightings(self, model: Any, projections: Any, batches: Any) -> Mapping[str, Weighting]:
        return {}

    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        chosen, shape = residual.chosen, (residual.weight.shape[0], residual.weight.shape[1])
        left = residual.weight - chosen.quantizer.dequantize(residual.packed, shape, chosen.bits, torch.float32)
        pooled = left.reshape(shape[0], -1, residual.group).mean(dim=2)
        u, s, vt = torch.linalg.svd(pooled, full_matrices=False)
        return residual.packed, Factors(vt[:rank].contiguous(), (u * s)[:, :rank].contiguous())


class MyEvaluator(Evaluator):
    """A score by the bits alone, over two layers."""

    shapes = tuple(LayerShape(name, (("up", 8, 8),)) for name in ("first", "second"))
    item_weights = None

    def open(self, context: EvaluationContext) -> None:
        self.steps = context.ladder.highest

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        adapters = {r: 32 * r for r in space.ranks}
        size = LayerBytes({q: 8 * q for q in space.bits}, dict.fromkeys(space.bits, 0), adapters)
        return MemoryModel(space, (size, size), (64, 64))

    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> np.ndarray:
        return np.ones(2)

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Evaluation]:
        for request in requests:
            score = float(sum(request.configuration.bits)) * request.steps / self.steps
            yield Evaluation(
                request.configuration, request.steps, score, self.footprint(request.configuration), (score,)
            )

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        return {"score": evaluation.score}

    def discard(self, evaluation: Evaluation) -> None:
        pass

    def fingerprint(self) -> dict[str, str]:
        return {"mine": "1"}


class MyExecutor(Executor):
    """One group after another."""

    workers = 1

    def open(self, evaluator: Evaluator, context: EvaluationContext, blueprint: Blueprint | None) -> None:
        evaluator.open(context)
        self.equipment = Equipment(evaluator)

    def begin(self, space: SearchSpace) -> None:
        pass

    def finished(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Sequence[Evaluation]]]:
        for group in groups:
            yield group, list(self.equipment.evaluator.evaluate(group))

    def tested(self, evaluations: Iterable[Evaluation]) -> Iterator[tuple[Evaluation, dict[str, float]]]:
        for evaluation in evaluations:
            yield evaluation, self.equipment.evaluator.test(evaluation)

    def close(self) -> None:
        pass


class MyExporter(Exporter):
    takes = "people who like to read"

    def check(self, backbone: Backbone) -> None:
        pass

    def write(self, backbone: Backbone, directory: Path) -> None:
        (directory / "configuration.txt").write_text(str(backbone.configuration))


class MyReporter(Reporter):
    """Keeps the best score."""

    def open(self, destination: Destination) -> None:
        self.best = -np.inf

    def started(self, plan: SearchPlan) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def working(self, work: Work) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def evaluated(self, record: Record, progress: Progress) -> None:
        self.best = max(self.best, record.evaluation.score)

    def generation(self, summary: GenerationSummary) -> None:
        pass

    def refinement(self, summary: RefinementSummary) -> None:
        pass

    def finished(self, result: SearchResult) -> None:
        pass

    def close(self) -> None:
        pass


ALL = {
    "adapters": MyAdapters,
    "adapters.starts": MyStart,
    "estimators": MyEstimator,
    "evaluators": MyEvaluator,
    "executors": MyExecutor,
    "exporters": MyExporter,
    "mutations": MyMutation,
    "quantizers": MyQuantizer,
    "refiners": MyRefiner,
    "repairs": MyRepair,
    "reporters": MyReporter,
    "searchers": MySearcher,
    "surrogates": MySurrogate,
}


def test_there_is_one_of_every_open_set() -> None:
    assert ALL.keys() == REGISTRIES.keys()


@pytest.mark.parametrize("kind", sorted(ALL))
def test_it_can_be_made_and_is_a_component_of_its_kind(kind: str) -> None:
    made = ALL[kind]()
    assert REGISTRIES[kind].base in {base.__name__ for base in type(made).__mro__}


class TestMyQuantizer(QuantizerContract):
    bound: ClassVar[dict[int, float]] = {4: 0.7}  # sqrt(1 - 2 / pi) for a normal weight

    @pytest.fixture
    def make(self) -> Callable[[], Quantizer]:
        return MyQuantizer


class TestMyMutation(MutationContract):
    @pytest.fixture
    def make(self) -> Callable[[], MutationOperator]:
        return MyMutation


class TestMyEstimator(EstimatorContract):
    @pytest.fixture
    def make(self) -> Callable[[], ImportanceEstimator]:
        return MyEstimator


class TestMyStart(StartContract):
    @pytest.fixture
    def make(self) -> Callable[[], Start]:
        return MyStart


class TestMyEvaluator(EvaluatorContract):
    @pytest.fixture
    def make(self) -> Callable[[], Evaluator]:
        return MyEvaluator


class TestMyExecutor(ExecutorContract):
    @pytest.fixture
    def make(self) -> Callable[[], Executor]:
        return MyExecutor


class TestMyExporter(ExporterContract):
    @pytest.fixture
    def make(self) -> Callable[[], Exporter]:
        return MyExporter
