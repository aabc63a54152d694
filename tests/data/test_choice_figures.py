"""Figures of choices against plain numpy, and the temperature that is fitted to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from qratk.data.choice_figures import CHOICE_FIGURES
from qratk.data.scoring import ChoiceScorer
from qratk.data.temperature import among_choices, fitted_inverse_temperature

RNG = np.random.default_rng(0)
COUNTS = RNG.integers(2, 6, size=40)
LABELS = [int(RNG.integers(count)) for count in COUNTS]
ROWS = int(COUNTS.sum())
TOKENS = RNG.integers(1, 9, size=ROWS)
CHARACTERS = TOKENS * 3 + RNG.integers(0, 3, size=ROWS)
OWNERS = np.repeat(np.arange(len(COUNTS)), COUNTS)
VALUES = -TOKENS * RNG.gamma(2.0, 1.0, size=ROWS)
RIGHT = np.isin(np.arange(ROWS), np.cumsum(COUNTS) - COUNTS + LABELS).astype(float)
KINDS = {"": np.ones(ROWS), "_per_token": TOKENS, "_per_char": CHARACTERS}


def scored(values: Any = VALUES, score: Any = "acc") -> ChoiceScorer:
    scorer = ChoiceScorer(OWNERS.tolist(), LABELS, CHARACTERS.tolist(), score=score)
    scorer.update({"row": torch.arange(ROWS)}, torch.tensor(values), torch.tensor(TOKENS))
    scorer.log_likelihood = torch.tensor(values)  # in double precision, as the oracles have it
    return scorer


def items(values: Any) -> list[tuple[Any, int]]:
    """Values of the choices of each item, and the right one."""
    return [(values[item == OWNERS], label) for item, label in enumerate(LABELS)]


def log_probability(values: Any, inverse_temperature: float = 1.0) -> Any:
    """Of the right choice of each item, (items,)."""
    found = []
    for row, label in items(values):
        scaled = row * inverse_temperature
        found.append(scaled[label] - scaled.max() - math.log(np.exp(scaled - scaled.max()).sum()))
    return np.array(found)


def smoothed(values: Any, inverse_temperature: float) -> float:
    """What the fit maximises: an observation an item, and one more over all items, of any choice in equal shares."""
    each = [log_probability(values, inverse_temperature).sum()]
    for row, _ in items(values):
        scaled = row * inverse_temperature
        each.append((scaled - np.logaddexp.reduce(scaled)).mean() / len(LABELS))
    return float(np.sum(each))


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_and_probability_of_the_right_choice_are_those_of_numpy(kind: str) -> None:
    figures = scored().compute()
    expected = log_probability(VALUES / KINDS[kind])
    assert float(figures[f"log_likelihood{kind}"]) == pytest.approx(expected.mean(), rel=1e-12)
    assert float(figures[f"prob{kind}"]) == pytest.approx(np.exp(expected).mean(), rel=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("acc", ""), ("acc_norm", "_per_char")])
def test_accuracies_are_those_of_numpy(name: str, kind: str) -> None:
    hits = [row.argmax() == label for row, label in items(VALUES / KINDS[kind])]
    assert float(scored().compute()[name]) == np.mean(hits)


def test_nats_are_the_plain_mean_of_the_right_choice() -> None:
    assert float(scored().compute()["nats"]) == pytest.approx(np.mean([row[label] for row, label in items(VALUES)]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fitted_temperature_is_the_best_of_a_dense_grid(kind: str) -> None:
    values = VALUES / KINDS[kind]
    values = values + values.std() * RIGHT
    scorer = scored(values)
    choices = scorer._compared(torch.ones(len(LABELS), dtype=torch.bool)).plain
    found = fitted_inverse_temperature(choices.values, choices.right)
    grid = np.geomspace(0.01, 100, 801)
    best = grid[np.argmax([smoothed(values, b) for b in grid])]
    assert 0.02 < best < 50
    assert found == pytest.approx(best, rel=0.02)
    assert smoothed(values, found) >= max(smoothed(values, b) for b in grid) - 1e-12
    figure = float(scorer.compute()["log_likelihood_fitted"])
    assert figure == pytest.approx(log_probability(values, found).mean(), rel=1e-9)
    assert figure > float(scorer.compute()["log_likelihood"])


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0, 1e4])
def test_fitted_figures_do_not_depend_on_the_scale_of_likelihoods(factor: float) -> None:
    plain, scaled = scored().compute(), scored(VALUES * factor).compute()
    for name in CHOICE_FIGURES:
        if name.endswith("fitted"):
            assert float(scaled[name]) == pytest.approx(float(plain[name]), rel=1e-7)
    assert float(scaled["log_likelihood"]) != pytest.approx(float(plain["log_likelihood"]), rel=1e-3)


def test_fitted_figures_of_a_model_worse_than_chance_are_those_of_chance() -> None:
    figures = scored(-RIGHT).compute()
    assert float(figures["log_likelihood_fitted"]) == pytest.approx(-np.log(COUNTS).mean())
    assert float(figures["log_likelihood"]) < float(figures["log_likelihood_fitted"])


def test_fitted_figures_tell_perfect_models_apart() -> None:
    noise = RNG.uniform(0, 1, size=ROWS)
    narrow, wide = (scored(RIGHT * (1 + gap) + noise).compute() for gap in (0.1, 4.0))
    assert float(narrow["acc"]) == float(wide["acc"]) == 1.0
    assert -1 < float(narrow["log_likelihood_fitted"]) < float(wide["log_likelihood_fitted"]) < 0


def test_the_pull_towards_chance_fades_with_the_number_of_items() -> None:
    right = torch.zeros(1, dtype=torch.int64)
    fitted = [
        fitted_inverse_temperature(torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(n, 1), right.repeat(n))
        for n in (1, 10, 1000)
    ]
    # n times right and one observation of either: n + 1/2 of n + 1 are right
    assert fitted == pytest.approx([math.log((n + 0.5) / 0.5) for n in (1, 10, 1000)])


def test_likelihoods_that_are_all_alike_are_compared_as_they_are() -> None:
    values = torch.full((3, 2), -5.0, dtype=torch.float64)
    assert fitted_inverse_temperature(values, torch.tensor([0, 1, 1])) == 1.0


def test_choices_that_are_not_there_have_no_share() -> None:
    values = torch.tensor([[-1.0, -1.0, -torch.inf]], dtype=torch.float64)
    for b in (0.0, 1.0, 3.0):
        assert among_choices(values, b).exp().tolist() == [[pytest.approx(0.5), pytest.approx(0.5), 0.0]]


def test_a_likelihood_that_is_not_a_number_makes_no_score() -> None:
    values = VALUES.copy()
    values[3] = math.nan
    figures = scored(values).compute()
    assert all(math.isnan(float(figures[name])) for name in ("log_likelihood", "log_likelihood_fitted", "prob"))


@pytest.mark.parametrize("score", CHOICE_FIGURES)
def test_every_figure_can_be_the_score_and_is_the_mean_of_its_outcomes(score: Any) -> None:
    scorer = scored(score=score)
    assert float(scorer.compute()["score"]) == float(scorer.compute()[score])
    assert scorer.outcomes().shape == (len(LABELS),)
    assert float(scorer.outcomes().mean()) == pytest.approx(float(scorer.compute()[score]), rel=1e-12)


def test_figures_of_finished_items_do_not_know_of_the_others() -> None:
    whole = ChoiceScorer(OWNERS.tolist(), LABELS, CHARACTERS.tolist(), score="acc")
    first = int(COUNTS[:15].sum())
    part = ChoiceScorer(OWNERS[:first].tolist(), LABELS[:15], CHARACTERS[:first].tolist(), score="acc")
    for scorer in (whole, part):
        scorer.update({"row": torch.arange(first)}, torch.tensor(VALUES[:first]), torch.tensor(TOKENS[:first]))
    a, b = whole.compute(), part.compute()
    assert {name: float(a[name]) for name in a} == pytest.approx({name: float(b[name]) for name in b}, rel=1e-12)
