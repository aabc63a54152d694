"""Deep deterministic policy gradients (Lillicrap et al. 2016); the only module that imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from qratk_haq import HAQ

Array = NDArray[np.float64]


class Agent:
    """Actor and critic with their targets and a replay memory, on the CPU; equal seeds and episodes make equal ones.

    Args:
        options: those of the searcher.
        features: length of a state.
        seed: of first weights and of replayed batches.
    """

    def __init__(self, options: HAQ, features: int, *, seed: int) -> None:
        self._options = options
        self._generator = torch.Generator().manual_seed(seed)
        hidden = options.hidden
        self.actor, self._actor_target = (_network(features, hidden, nn.Sigmoid()) for _ in range(2))
        self.critic, self._critic_target = (_network(features + 1, hidden, nn.Identity()) for _ in range(2))
        for network, target in ((self.actor, self._actor_target), (self.critic, self._critic_target)):
            _draw(network, self._generator)
            target.load_state_dict(network.state_dict())
        self._actor_steps = torch.optim.Adam(self.actor.parameters(), lr=options.actor_rate)
        self._critic_steps = torch.optim.Adam(self.critic.parameters(), lr=options.critic_rate)
        self._memory: list[tuple[Tensor, Tensor]] = []
        self.episodes = 0

    def act(self, state: Array) -> float:
        """The action in a state, in [0, 1], without noise."""
        with torch.no_grad():
            return float(self.actor(torch.from_numpy(state).float()[None]))

    def learn(self, states: Array, actions: Sequence[float], rewards: Array, *, active: bool) -> None:
        """Remember an episode and, if active, learn from replayed batches, `updates` for each of its steps.

        `states` (steps + 1, features) are those before each step and at the end, `rewards` (episodes,) of all episodes
        so far, this one last.
        """
        self._memory.append((torch.from_numpy(states).float(), torch.tensor(actions, dtype=torch.float32)))
        self.episodes += 1
        if not active:
            return
        kept = self._memory[-self._options.memory :]
        steps = len(actions)
        before = torch.cat([s[:-1] for s, _ in kept])
        after = torch.cat([s[1:] for s, _ in kept])
        acts = torch.cat([a for _, a in kept])[:, None]
        reward = torch.from_numpy(rewards[-len(kept) :]).float().repeat_interleave(steps)[:, None]
        goes_on = torch.ones(len(kept), steps)
        goes_on[:, -1] = 0.0
        goes_on = goes_on.flatten()[:, None]
        for _ in range(self._options.updates * steps):
            rows = torch.randint(len(before), (min(self._options.batch_size, len(before)),), generator=self._generator)
            self._update(before[rows], acts[rows], reward[rows], after[rows], goes_on[rows])

    def _update(self, state: Tensor, action: Tensor, reward: Tensor, after: Tensor, goes_on: Tensor) -> None:
        with torch.no_grad():
            future = self._critic_target(torch.cat([after, self._actor_target(after)], dim=1))
            # Each step has the reward of the whole episode, and what follows is worth as much again: their mean.
            wanted = torch.where(goes_on > 0, (reward + future) / 2, reward)
        loss = nn.functional.mse_loss(self.critic(torch.cat([state, action], dim=1)), wanted)
        self._critic_steps.zero_grad()
        loss.backward()
        self._critic_steps.step()
        self._actor_steps.zero_grad()
        (-self.critic(torch.cat([state, self.actor(state)], dim=1)).mean()).backward()
        self._actor_steps.step()
        with torch.no_grad():
            for network, target in ((self.actor, self._actor_target), (self.critic, self._critic_target)):
                for own, kept in zip(network.parameters(), target.parameters(), strict=True):
                    kept.lerp_(own, self._options.averaging)


def _network(features: int, hidden: int, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1), last
    )


def _draw(network: nn.Sequential, generator: torch.Generator) -> None:
    """First weights, uniform within 1 / sqrt(fan-in), of the last layer within 0.003 (Lillicrap et al. 2016)."""
    linear = [module for module in network if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module in linear:
            bound = 0.003 if module is linear[-1] else module.in_features**-0.5
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
