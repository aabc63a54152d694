"""A policy over layers, learnt by reinforcement and walled in by the budget (HAQ, Wang et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk import (
    KNOBS,
    Candidate,
    Configuration,
    ConfigurationError,
    Evaluation,
    FidelityLadder,
    GenerationSearcher,
    History,
    Problem,
    Proposer,
)

if TYPE_CHECKING:
    from qratk_haq._agent import Agent

__all__ = ["HAQ"]

Array = NDArray[np.float64]

TRIES = 4  # episodes for one candidate, each with more noise, before a neighbour of the last one takes its place


class HAQ(GenerationSearcher):
    """An agent sets bits and rank of one layer after another, and then shared settings; a generation is some episodes.

    After arXiv:1811.08886: the state is what the layer is (place, weights, inputs and outputs), which knob is set and
    the last action; an action in [0, 1] is a place on the ladder; episodes over the budget are lowered by the action
    wall; every step has the reward of the whole episode; the agent is DDPG. The reward is the score at the lowest rung,
    standardised over all episodes so far, and a failure has that of the worst. Other candidates that were measured,
    such as uniform baselines, teach nothing.

    Args:
        offspring: episodes a generation.
        warmup: first episodes, whose actions are uniformly random; 20 in the paper.
        noise: standard deviation of the truncated normal noise of actions, after the warm-up.
        noise_decay: times this with every episode.
        updates: of the agent for each step of an episode.
        batch_size: transitions in an update.
        memory: transitions that the replay memory holds, in episodes.
        hidden: width of both hidden layers of actor and critic.
        actor_rate, critic_rate: learning rates of Adam.
        averaging: share of the networks in an update of their targets.
    """

    def __init__(
        self,
        offspring: int = 5,
        warmup: int = 20,
        noise: float = 0.5,
        noise_decay: float = 0.99,
        updates: int = 1,
        batch_size: int = 64,
        memory: int = 128,
        hidden: int = 300,
        actor_rate: float = 1e-4,
        critic_rate: float = 1e-3,
        averaging: float = 0.01,
    ) -> None:
        super().__init__(offspring)
        counts = {"updates": updates, "batch_size": batch_size, "memory": memory, "hidden": hidden}
        for name, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"haq: {name} must be at least 1, got {count}")
        rates = {"actor_rate": actor_rate, "critic_rate": critic_rate, "noise": noise}
        for name, rate in rates.items():
            if not rate > 0:
                raise ConfigurationError(f"haq: {name} must be positive, got {rate}")
        if warmup < 0 or not 0 < noise_decay <= 1 or not 0 < averaging <= 1:
            raise ConfigurationError(
                "haq: warmup must be at least 0 and noise_decay and averaging lie in (0, 1], got "
                f"{warmup}, {noise_decay} and {averaging}"
            )
        self.warmup = warmup
        self.noise, self.noise_decay = noise, noise_decay
        self.updates, self.batch_size, self.memory, self.hidden = updates, batch_size, memory, hidden
        self.actor_rate, self.critic_rate, self.averaging = actor_rate, critic_rate, averaging
        self._course: Course | None = None
        self._seed: int | None = None
        self._episodes: list[dict[str, Any]] = []
        self._pending: dict[Configuration, list[float]] = {}
        self._agent: Agent | None = None

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        super().begin(proposer, ladder)
        self._course = Course.of(proposer.problem)
        self._seed, self._agent = None, None
        self._episodes, self._pending = [], {}

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """Episodes of the agent as it is, brought under the budget; neighbours where they were measured before."""
        if self._seed is None:
            self._seed = int(rng.integers(2**31 - 1))
        self._pending = {}
        found: dict[Configuration, Candidate] = {}
        for _ in range(size):
            candidate = self._episode({*known, *found}, rng)
            if candidate is None:
                break
            found[candidate.configuration] = candidate
        return tuple(found.values())

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Remember the scores of the episodes at the lowest rung that they were measured at."""
        first: dict[Configuration, Evaluation] = {}
        for evaluation in evaluations:
            old = first.get(evaluation.configuration)
            if evaluation.configuration in self._pending and (old is None or evaluation.steps < old.steps):
                first[evaluation.configuration] = evaluation
        for configuration, evaluation in first.items():
            score = evaluation.score if evaluation.ok else None
            self._episodes.append({"actions": self._pending[configuration], "score": score})
        self._pending = {}
        super().tell(evaluations)

    def state(self) -> dict[str, Any]:
        """The generation, the agent's seed, all episodes with their scores, and those being measured."""
        pending = {str(configuration): actions for configuration, actions in self._pending.items()}
        return {**super().state(), "seed": self._seed, "episodes": self._episodes, "pending": pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the agent learns again when it is next asked."""
        super().restore(state)
        self._seed, self._agent = state["seed"], None
        self._episodes = [dict(episode) for episode in state["episodes"]]
        self._pending = {Configuration.from_text(text): list(a) for text, a in state["pending"].items()}

    # Episodes

    @property
    def course(self) -> Course:
        """The steps of an episode, once `begin` was called."""
        assert self._course is not None, "begin comes first"
        return self._course

    def _episode(self, taken: set[Configuration], rng: np.random.Generator) -> Candidate | None:
        course = self.course
        configuration = None
        for attempt in range(TRIES):
            actions = self._actions(rng, louder=1.0 + attempt)
            configuration = course.configuration(action_wall(self.proposer.problem, course.places(actions)))
            if configuration not in taken:
                self._pending[configuration] = actions
                return Candidate(configuration, "haq", generation=self.generation)
        if configuration is None:
            return None
        near = self.proposer.propose(configuration, rng, known=taken, generation=self.generation)
        if near is not None:
            self._pending[near.configuration] = course.actions(near.configuration)
        return near

    def _actions(self, rng: np.random.Generator, *, louder: float) -> list[float]:
        """Actions of one episode, in [0, 1]."""
        course = self.course
        told = len(self._episodes) + len(self._pending)
        if told < self.warmup:
            return [float(a) for a in rng.random(len(course.steps))]
        deviation = louder * self.noise * self.noise_decay ** (told - self.warmup)
        agent, actions = self._learnt(), list[float]()
        for number in range(len(course.steps)):
            wanted = agent.act(course.state(number, actions))
            actions.append(truncated_normal(wanted, deviation, rng))
        return actions

    def _learnt(self) -> Agent:
        """The agent after all episodes so far, which has learnt from each as it came."""
        from qratk_haq._agent import Agent

        if self._agent is None:
            assert self._seed is not None  # `proposals` draws it
            self._agent = Agent(self, self.course.features, seed=self._seed)
        for episode in range(self._agent.episodes, len(self._episodes)):
            actions = self._episodes[episode]["actions"]
            states = np.array([self.course.state(n, actions[:n]) for n in range(len(actions) + 1)])
            known = rewards(self._episodes[: episode + 1])
            self._agent.learn(states, actions, known, active=episode >= self.warmup - 1)
        return self._agent


@dataclass(frozen=True)
class Course:
    """The steps of an episode: knobs of layers in order, bits before ranks, then settings; those that have a choice.

    `steps` are (layer, column), with layer L for settings; `described` what is seen of each, (steps, features - 1).
    """

    problem: Problem
    steps: tuple[tuple[int, int], ...]
    described: Array

    @classmethod
    def of(cls, problem: Problem) -> Course:
        """The course of a problem."""
        space, steps = problem.space, list[tuple[int, int]]()
        for layer in range(space.num_layers):
            steps += [(layer, column) for column, knob in enumerate(KNOBS) if len(space.ladder(knob)) > 1]
        steps += [(space.num_layers, n) for n, ladder in enumerate(space.shared) if len(ladder.values) > 1]
        layers = np.zeros((space.num_layers + 1, 4))
        for layer, shape in enumerate(problem.shapes):
            sides = [(d_in, d_out) for _, d_in, d_out in shape.projections]
            layers[layer] = layer, sum(a * b for a, b in sides), sum(a for a, _ in sides), sum(b for _, b in sides)
        layers[-1, 0] = space.num_layers
        spread = np.ptp(layers, axis=0)
        layers = (layers - layers.min(axis=0)) / np.where(spread > 0, spread, 1.0)
        width = len(KNOBS) + len(space.shared)
        described = np.zeros((len(steps), 4 + width))
        for number, (layer, column) in enumerate(steps):
            described[number, :4] = layers[layer]
            described[number, 4 + column + (len(KNOBS) if layer == space.num_layers else 0)] = 1.0
        return cls(problem, tuple(steps), described)

    @property
    def features(self) -> int:
        """Length of a state."""
        return self.described.shape[1] + 1

    def state(self, number: int, actions: Sequence[float]) -> Array:
        """What the agent sees before step `number`, (features,): the step and the last action; the end is the last."""
        last = actions[number - 1] if number else 1.0
        row = self.described[min(number, len(self.steps) - 1)]
        return np.append(row, last)

    def places(self, actions: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rung indices (L, 2) and places of settings (S,) that actions stand for; knobs without a choice are at 0."""
        space = self.problem.space
        indices = np.zeros((space.num_layers, len(KNOBS)), dtype=np.int64)
        settings = np.zeros(len(space.shared), dtype=np.int64)
        for (layer, column), action in zip(self.steps, actions, strict=True):
            size = self._size(layer, column)
            place = min(size - 1, int(action * size))
            if layer == space.num_layers:
                settings[column] = place
            else:
                indices[layer, column] = place
        return indices, settings

    def actions(self, configuration: Configuration) -> list[float]:
        """Actions in the middle of what a configuration has."""
        space = self.problem.space
        indices, settings = space.indices(configuration), space.shared_indices(configuration)
        found = []
        for layer, column in self.steps:
            place = settings[column] if layer == space.num_layers else indices[layer, column]
            found.append((float(place) + 0.5) / self._size(layer, column))
        return found

    def configuration(self, places: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Configuration:
        """The configuration at some places."""
        indices, settings = places
        return self.problem.space.from_indices(indices, self.problem.space.shared_at(settings))

    def _size(self, layer: int, column: int) -> int:
        space = self.problem.space
        return len(space.shared[column].values if layer == space.num_layers else space.ladder(KNOBS[column]))


def action_wall(
    problem: Problem, places: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places lowered rung by rung, from the last layer to the first, rank before bits, until the budget holds."""
    indices, settings = places[0].copy(), places[1]
    space = problem.space
    while indices.any():
        for layer in reversed(range(space.num_layers)):
            for column in (1, 0):
                if problem.feasible(space.from_indices(indices, space.shared_at(settings))):
                    return indices, settings
                indices[layer, column] = max(0, indices[layer, column] - 1)
    return indices, settings


def rewards(episodes: Sequence[dict[str, Any]]) -> Array:
    """Standardised scores of episodes, (n,); that of the worst where one failed, all 0 where none has a score."""
    scores = np.array([math.nan if e["score"] is None else float(e["score"]) for e in episodes])
    if np.isnan(scores).all():
        return np.zeros(len(scores))
    scores = np.where(np.isnan(scores), np.nanmin(scores), scores)
    spread = float(scores.std())
    return (scores - scores.mean()) / (spread if spread > 0 else 1.0)


def truncated_normal(mean: float, deviation: float, rng: np.random.Generator) -> float:
    """A draw about the mean within [0, 1]; the mean itself, cut off, when none of a hundred draws is inside."""
    draws = rng.normal(mean, deviation, size=100)
    inside = draws[(draws >= 0) & (draws <= 1)]
    return float(inside[0] if len(inside) else min(1.0, max(0.0, mean)))
