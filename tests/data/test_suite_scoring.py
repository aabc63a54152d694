from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, SuiteData

Write = Callable[[str, list[Any]], str]


def questions(*numbers: int, choices: int = 2) -> list[dict[str, Any]]:
    words = ["red", "green blue", "the quick brown fox", "yes"]
    return [{"question": f"one {n} two", "choices": words[:choices], "label": n % choices} for n in numbers]


def answers(*numbers: int) -> list[dict[str, Any]]:
    return [{"instruction": f"two and {n}", "output": f"the dog barks {n}"} for n in numbers]


@pytest.fixture
def files(write: Write) -> dict[str, str]:
    return {
        "two": write("two.jsonl", questions(*range(6))),
        "four": write("four.jsonl", questions(*range(10, 23), choices=4)),
        "answer": write("answer.jsonl", answers(*range(5))),
    }


def members(files: dict[str, str]) -> dict[str, Any]:
    return {
        "two": MultipleChoiceData(validation=files["two"]),
        "four": MultipleChoiceData(validation=files["four"]),
        "answer": InstructionData(validation=files["answer"], template="alpaca"),
    }


def suite(files: dict[str, str], tokenizer: Any) -> SuiteData:
    data = members(files)
    tasks: dict[str, Any] = {
        "two": {"data": data["two"], "metric": "acc_norm", "weight": 2},
        "four": {"data": data["four"]},
        "answer": {"data": data["answer"], "weight": 0.5},
    }
    made = SuiteData(validation=tasks, eval_batch_size=4)
    made.attach(tokenizer, context_length=256)
    return made


@pytest.mark.parametrize("shared_length", [0, 128])
def test_figures_are_those_of_each_task_alone(
    files: dict[str, str], tokenizer: Any, model: Any, scored: Callable[..., Any], shared_length: int
) -> None:
    scorer = scored(suite(files, tokenizer), model, "validation", shared_length=shared_length)
    found = {name: float(value) for name, value in scorer.compute().items()}
    for name, data in members(files).items():
        data.attach(tokenizer, context_length=256)
        alone = scored(data, model, "validation", shared_length=shared_length).compute()
        own = {key: float(value) for key, value in alone.items() if key != "score"}
        assert {key: found[f"{name}/{key}"] for key in own} == pytest.approx(own, rel=1e-4)
    assert found["two/score"] == found["two/acc_norm"]
    assert found["four/score"] == found["four/prob_per_token"]
    assert found["answer/score"] == found["answer/token_prob"]
    mean = 2 * found["two/score"] + found["four/score"] + 0.5 * found["answer/score"]
    assert found["score"] == pytest.approx(mean / 3.5)
    assert list(found)[:4] == ["score", "two/score", "four/score", "answer/score"]


def test_the_score_is_the_weighted_mean_of_the_outcomes(
    files: dict[str, str], tokenizer: Any, model: Any, scored: Callable[..., Any]
) -> None:
    data = suite(files, tokenizer)
    scorer = scored(data, model, "validation")
    outcomes, weights = scorer.outcomes(), torch.tensor(data.item_weights(), dtype=torch.float64)
    assert float((outcomes * weights).sum() / weights.sum()) == pytest.approx(float(scorer.compute()["score"]))
    assert data.strata() == (("two", 6), ("four", 13), ("answer", 5))
    assert ((outcomes >= 0) & (outcomes <= 1)).all()


def test_a_task_counts_alike_however_many_items_and_tokens_it_has(files: dict[str, str], tokenizer: Any) -> None:
    data = suite(files, tokenizer)
    scorer = data.scorer()
    rows = torch.arange(len(data.scoring_rows("validation")))
    tokens = torch.tensor([int(row.labelled[1:].sum()) for row in data.scoring_rows("validation")])
    likelihood = torch.zeros(len(rows))
    likelihood[-5:] = math.log(0.25) * tokens[-5:]  # of the answers, each token
    likelihood[:12:2], likelihood[1:12:2] = -1.0, -100.0  # the first choice of two
    likelihood[12:64] = -3.0 * tokens[12:64]  # four choices alike
    scorer.update({"row": rows}, likelihood, tokens)
    assert float(scorer.compute()["score"]) == pytest.approx((2 * 0.5 + 0.25 + 0.5 * 0.25) / 3.5)


def test_some_of_the_batches_score_the_tasks_that_they_hold(files: dict[str, str], tokenizer: Any) -> None:
    data = suite(files, tokenizer)
    scorer = data.scorer()
    rows = torch.arange(12, 16)
    scorer.update({"row": rows}, torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.ones(4, dtype=torch.int64))
    figures = scorer.compute()
    assert set(figures) >= {"score", "four/acc"}
    assert not [name for name in figures if name.startswith("two/")]
    assert float(figures["score"]) == pytest.approx(0.25)
    with pytest.raises(DataError, match="23 of 24 items were not scored"):
        scorer.outcomes()


def test_replicas_share_a_suite_out(files: dict[str, str], tokenizer: Any) -> None:
    data = suite(files, tokenizer)
    whole, parts = data.scorer(), [data.scorer(), data.scorer()]
    batches = data.scoring_batches("validation")
    for index, batch in enumerate(batches):
        values = -(batch["row"].float() % 7) - 0.5
        tokens = torch.bincount(batch["target_row"], minlength=len(values))
        for scorer in (whole, parts[index % 2]):
            scorer.update(batch, values, tokens)
    for name in ("log_likelihood", "tokens", "seen", "greedy"):  # as a sum over replicas does
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    one, other = whole.compute(), parts[0].compute()
    assert {name: float(value) for name, value in one.items()} == {name: float(value) for name, value in other.items()}


def test_a_figure_that_a_kind_does_not_have_is_refused(files: dict[str, str], tokenizer: Any) -> None:
    data = members(files)["answer"]
    data.attach(tokenizer, context_length=256)
    with pytest.raises(DataError, match="no figure 'acc'"):
        data.scorer("validation").item_figure("acc")


@pytest.mark.parametrize("shared_length", [0, 128])
def test_lower_rungs_score_a_part_of_the_items(
    files: dict[str, str], tokenizer: Any, model: Any, scored: Callable[..., Any], shared_length: int
) -> None:
    data = members(files)
    made = SuiteData(
        validation={
            "two": {"data": data["two"], "items": [2, 4], "metric": "prob"},
            "four": {"data": data["four"], "items": [3, 5, 9]},
            "answer": {"data": data["answer"], "weight": 2},
        }
    )
    made.attach(tokenizer, context_length=256)
    outcomes, shares = {}, []
    for rung in (0, 1, None):
        made.rung = rung
        scorer = scored(made, model, "validation", shared_length=shared_length)
        outcomes[rung] = scorer.outcomes().tolist()
        sizes = [task.items for task in made.judged(rung)]
        assert len(outcomes[rung]) == sum(sizes)
        parts = torch.tensor(outcomes[rung]).split(sizes)
        mean = (parts[0].mean() + parts[1].mean() + 2 * parts[2].mean()) / 4
        assert float(scorer.compute()["score"]) == pytest.approx(float(mean))
        shares.append(made.scored_share(rung))
        assert len(made.scoring_batches("validation")) >= 1
    assert [len(values) for values in outcomes.values()] == [10, 14, 18]
    assert shares == pytest.approx([10 / 18, 14 / 18, 1.0])
    whole = [round(value, 5) for value in outcomes[None]]
    assert all({round(value, 5) for value in outcomes[rung]} <= set(whole) for rung in (0, 1))
    assert {round(value, 5) for value in outcomes[0]} <= {round(value, 5) for value in outcomes[1]}
    assert made.item_weights()[:4] == (0.25,) * 4
