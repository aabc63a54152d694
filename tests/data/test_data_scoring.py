from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qratk.core import DataError
from qratk.data.scoring import ChoiceScorer, LikelihoodScorer


def feed(scorer: Any, values: list[float], tokens: list[int], rows: list[int]) -> None:
    scorer.update({"row": torch.tensor(rows)}, torch.tensor(values), torch.tensor(tokens))


def test_likelihood_score_is_the_token_weighted_mean_of_the_outcomes() -> None:
    scorer = LikelihoodScorer([0, 1, 1], 2)
    feed(scorer, [-4.0, -3.0], [3, 1], [2, 0])
    feed(scorer, [-2.0], [2], [1])
    assert scorer.outcomes().tolist() == pytest.approx([-3.0, -6 / 5])
    assert float(scorer.compute()["score"]) == pytest.approx(-9 / 6)


def test_choice_figures_of_a_small_table() -> None:
    # Item 0: three choices, item 1: two. The longest choice wins only when divided by its length.
    scorer = ChoiceScorer([0, 0, 0, 1, 1], [1, 0], [2, 8, 3, 1, 1], score="acc_norm")
    feed(scorer, [-3.0, -4.0, -6.0, -1.0, -1.0], [1] * 5, [0, 1, 2, 3, 4])
    figures = {name: float(value) for name, value in scorer.compute().items()}
    right = (
        -4
        - math.log(
            sum(map(math.exp, (-3, -4, -6))),
        ),
        -math.log(2),
    )
    assert figures["acc"] == 0.5  # the tie of item 1 goes to the first choice
    assert figures["acc_norm"] == figures["score"] == 1.0
    assert figures["nats"] == pytest.approx(-2.5)
    assert figures["log_likelihood"] == pytest.approx(sum(right) / 2)


def test_figures_of_likelihoods_have_the_perplexity() -> None:
    scorer = LikelihoodScorer([0, 1, 1], 2)
    feed(scorer, [-4.0, -3.0, -2.0], [3, 1, 2], [2, 0, 1])
    figures = {name: float(value) for name, value in scorer.compute().items()}
    token_prob = (math.exp(-3) + math.exp(-6 / 5)) / 2
    assert figures == pytest.approx(
        {"score": -1.5, "nats_per_token": 1.5, "perplexity": math.exp(1.5), "token_prob": token_prob}
    )
    assert scorer.item_figure("token_prob").tolist() == pytest.approx([math.exp(-3), math.exp(-6 / 5)])


def test_a_row_scored_by_two_replicas_counts_once() -> None:
    one, two = LikelihoodScorer([0, 1], 2), LikelihoodScorer([0, 1], 2)
    feed(one, [-1.0, -6.0], [2, 3], [0, 1])
    feed(two, [-1.0, -1.0, -6.0], [2, 2, 3], [0, 0, 1])  # as sums over replicas do
    assert torch.equal(one.outcomes(), two.outcomes())


def test_outcomes_of_an_unfinished_scoring_are_an_error() -> None:
    scorer = ChoiceScorer([0, 0, 1, 1], [0, 0], [1] * 4, score="acc")
    feed(scorer, [-1.0, -2.0, -1.0], [1] * 3, [0, 1, 2])
    with pytest.raises(DataError, match="1 of 2 items"):
        scorer.outcomes()
    assert float(scorer.compute()["acc"]) == 1.0  # over the finished item


def test_exact_match_is_of_the_right_choice() -> None:
    scorer = ChoiceScorer([0, 0, 1, 1], [0, 1], [1] * 4, score="acc")
    greedy = torch.tensor([True, False, True, False])
    scorer.update({"row": torch.arange(4)}, torch.zeros(4), torch.ones(4), greedy)
    assert float(scorer.compute()["exact_match"]) == 0.5


def _replica(rank: int, folder: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scorer = ChoiceScorer([0, 0, 1, 1], [1, 0], [2, 3, 1, 5], score="log_likelihood")
    rows = [[3, 0, 2], [1, 2]][rank]  # row 2 is scored by both
    feed(scorer, [[-3.0, -4.0, -1.0, -2.5][row] for row in rows], [1] * len(rows), rows)
    results[rank] = (float(scorer.compute()["score"]), scorer.outcomes().tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [context.Process(target=_replica, args=(rank, str(tmp_path), results)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        found = dict(results)
    scorer = ChoiceScorer([0, 0, 1, 1], [1, 0], [2, 3, 1, 5], score="log_likelihood")
    feed(scorer, [-3.0, -4.0, -1.0, -2.5], [1] * 4, [0, 1, 2, 3])
    assert found == {rank: (float(scorer.compute()["score"]), scorer.outcomes().tolist()) for rank in range(2)}
