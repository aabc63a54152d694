"""HAQ keeps the contract of searchers, its wall holds, and its agent learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from qratk_haq import HAQ, Course, action_wall, rewards, truncated_normal
from qratk_haq._agent import Agent

from qratk import REGISTRIES, Configuration, ConfigurationError, GlobalSearcher, History
from qratk.testing import LADDER, SearcherContract, ToyEvaluator, default_proposer, promoted, toy_problem


class TestHAQContract(SearcherContract):
    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: HAQ(offspring=4, warmup=2, hidden=8, batch_size=4)


SHARED = {"learning_rate": [1e-3, 1e-2], "rslora": [False, True]}


def test_an_episode_sets_bits_then_rank_of_each_layer_and_settings_last() -> None:
    course = Course.of(toy_problem(3, shared=SHARED))
    assert course.steps == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1))
    one_rank = Course.of(toy_problem(3, ranks=(8,), like=(4, 8)))
    assert one_rank.steps == ((0, 0), (1, 0), (2, 0))
    configuration = one_rank.configuration(one_rank.places([0.0, 0.34, 1.0]))
    assert configuration == Configuration.from_text("2:8 4:8 8:8")


def test_actions_of_a_configuration_lead_back_to_it() -> None:
    problem = toy_problem(5, shared=SHARED)
    course, rng = Course.of(problem), np.random.default_rng(0)
    for _ in range(20):
        configuration = problem.space.random(rng).with_shared(problem.space.random_shared(rng))
        assert course.configuration(course.places(course.actions(configuration))) == configuration


def test_a_state_is_the_step_and_the_last_action() -> None:
    course = Course.of(toy_problem(4))
    states = [course.state(n, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8][:n]) for n in range(9)]
    assert all(state.shape == (course.features,) for state in states)
    assert [state[-1] for state in states] == [1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert all(state.min() >= 0 and state.max() <= 1 for state in states)
    assert len({tuple(state[:-1]) for state in states[:8]}) == 8  # every step is told from the others


@pytest.mark.parametrize("case", [{"like": (4, 8)}, {"like": (2, 8)}, {"like": (8, 16), "max_average_bits": 3.0}])
def test_the_wall_lowers_from_the_last_layer_just_until_the_budget_holds(case: dict) -> None:
    problem = toy_problem(6, **case)
    space, rng = problem.space, np.random.default_rng(1)
    for _ in range(30):
        start = rng.integers(3, size=(6, 2))
        indices, _ = action_wall(problem, (start, np.zeros(0, dtype=np.int64)))
        assert problem.feasible(space.from_indices(indices))
        assert (indices <= start).all()
        if problem.feasible(space.from_indices(start)):
            np.testing.assert_array_equal(indices, start)


def test_the_wall_takes_rank_and_bits_in_turn() -> None:
    problem = toy_problem(3, like=(8, 16))
    start = problem.space.indices(problem.space.largest)
    full = problem.bytes(problem.space.largest)

    def walled(less: int) -> list[list[int]]:
        tight = toy_problem(3, limit=full - less)
        return action_wall(tight, (start, np.zeros(0, dtype=np.int64)))[0].tolist()

    rank_step = int(np.diff(problem.table("rank")[2])[-1])
    assert walled(0) == [[2, 2], [2, 2], [2, 2]]
    assert walled(rank_step) == [[2, 2], [2, 2], [2, 1]]
    assert walled(rank_step + 1) == [[2, 2], [2, 2], [1, 1]]


def test_rewards_are_standardised_and_failures_have_the_worst() -> None:
    episodes = [{"score": s} for s in (-3.0, None, -1.0, -2.0)]
    found = rewards(episodes)
    assert found[1] == found[0] == found.min()
    assert found.mean() == pytest.approx(0.0, abs=1e-12)
    assert found.std() == pytest.approx(1.0)
    np.testing.assert_array_equal(rewards([{"score": None}, {"score": None}]), [0.0, 0.0])
    np.testing.assert_array_equal(rewards([{"score": 2.0}]), [0.0])


def test_noise_stays_within_the_actions() -> None:
    rng = np.random.default_rng(0)
    draws = [truncated_normal(0.9, 0.5, rng) for _ in range(500)]
    assert 0 <= min(draws) < 0.2
    assert 0.99 < max(draws) <= 1
    assert truncated_normal(1.0, 1e-9, rng) == pytest.approx(1.0)


def test_the_agent_finds_the_action_that_is_rewarded() -> None:
    """Rewarded is an action of .8 at the first step and of .2 at the second."""
    options = HAQ(hidden=32, actor_rate=1e-3, critic_rate=1e-2, averaging=0.05, batch_size=32, updates=4)
    agent, rng = Agent(options, 3, seed=0), np.random.default_rng(0)
    scores: list[float] = []
    states = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [1.0, 0.0, 0.5]])
    for _ in range(80):
        actions = rng.random(2).tolist()
        scores.append(-((actions[0] - 0.8) ** 2) - (actions[1] - 0.2) ** 2)
        agent.learn(states, actions, rewards([{"score": s} for s in scores]), active=True)
    assert agent.act(states[0]) == pytest.approx(0.8, abs=0.2)
    assert agent.act(states[1]) == pytest.approx(0.2, abs=0.2)


def test_a_restored_agent_has_learnt_the_same_to_the_bit() -> None:
    problem = toy_problem(4)
    searcher, rng = HAQ(offspring=3, warmup=2, hidden=16), np.random.default_rng(0)
    searcher.begin(default_proposer(problem), LADDER)
    history = History()
    for _ in range(4):
        told = promoted(ToyEvaluator(4), searcher.ask(history, rng), LADDER)
        for evaluation in told:
            history.append(evaluation)
        searcher.tell(told)
    reborn = HAQ(offspring=3, warmup=2, hidden=16)
    reborn.begin(default_proposer(problem), LADDER)
    reborn.restore(json.loads(json.dumps(searcher.state())))
    assert len(searcher._episodes) == 12
    ours, theirs = searcher._learnt().actor.state_dict(), reborn._learnt().actor.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_the_lowest_rung_of_its_own_episodes_teaches() -> None:
    problem, rng = toy_problem(4), np.random.default_rng(0)
    searcher, evaluator = HAQ(offspring=2), ToyEvaluator(4)
    searcher.begin(default_proposer(problem), LADDER)
    first, second = (c.configuration for c in searcher.ask(History(), rng))
    other = problem.space.smallest
    searcher.tell([evaluator.measure(c, steps) for steps in (300, 100) for c in (first, second, other)])
    assert [e["score"] for e in searcher._episodes] == [evaluator.measure(c, 100).score for c in (first, second)]


@pytest.mark.parametrize("options", [{"hidden": 0}, {"noise": 0.0}, {"noise_decay": 1.1}, {"warmup": -1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="haq"):
        HAQ(**options)


def test_it_is_found_by_its_name_and_its_recipe_is_of_it() -> None:
    import yaml

    assert isinstance(REGISTRIES["searchers"].create("haq", offspring=3), HAQ)
    recipe = yaml.safe_load((Path(__file__).parents[1] / "haq.yaml").read_text())
    assert recipe["search"]["searcher"]["class_path"] == "haq"
