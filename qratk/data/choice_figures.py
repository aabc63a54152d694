"""What likelihoods of choices say of items, one figure each: the names of scores and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from torch import Tensor

from qratk.data.temperature import among_choices, fitted_inverse_temperature

ChoiceScore = Literal[
    "acc",
    "acc_norm",
    "log_likelihood",
    "prob",
    "nats",
    "log_likelihood_per_token",
    "log_likelihood_per_char",
    "log_likelihood_fitted",
    "log_likelihood_per_token_fitted",
    "log_likelihood_per_char_fitted",
    "prob_per_token",
    "prob_per_char",
]


@dataclass(frozen=True)
class Compared:
    """Choices of items, compared by one kind of likelihood.

    Attributes:
        values: (items, most choices), in double precision, -inf where there is no choice.
        right: index of the right choice, (items,).
    """

    values: Tensor
    right: Tensor

    @property
    def hits(self) -> Tensor:
        """1 where the right choice is first, else 0, (items,); argmax gives the first of equals, as lm-eval's does."""
        return (self.values.argmax(1) == self.right).double()

    @property
    def of_right(self) -> Tensor:
        """Values of the right choices, (items,)."""
        return self._at_right(self.values)

    @cached_property
    def log_likelihood(self) -> Tensor:
        """Log-probability of the right choice among the choices, (items,)."""
        return self._at_right(among_choices(self.values))

    @property
    def fitted(self) -> Tensor:
        """The same at the temperature that is fitted to all items, (items,)."""
        return self._at_right(among_choices(self.values, fitted_inverse_temperature(self.values, self.right)))

    def _at_right(self, values: Tensor) -> Tensor:
        return values.gather(1, self.right[:, None]).squeeze(1)


@dataclass(frozen=True)
class ComparedChoices:
    """Choices of items compared by their log-likelihood as it is, per token and per character."""

    plain: Compared
    per_token: Compared
    per_char: Compared


CHOICE_FIGURES: Final[Mapping[ChoiceScore, Callable[[ComparedChoices], Tensor]]] = {
    "acc": lambda choices: choices.plain.hits,
    "acc_norm": lambda choices: choices.per_char.hits,
    "log_likelihood": lambda choices: choices.plain.log_likelihood,
    "prob": lambda choices: choices.plain.log_likelihood.exp(),
    "nats": lambda choices: choices.plain.of_right,
    "log_likelihood_per_token": lambda choices: choices.per_token.log_likelihood,
    "log_likelihood_per_char": lambda choices: choices.per_char.log_likelihood,
    "log_likelihood_fitted": lambda choices: choices.plain.fitted,
    "log_likelihood_per_token_fitted": lambda choices: choices.per_token.fitted,
    "log_likelihood_per_char_fitted": lambda choices: choices.per_char.fitted,
    "prob_per_token": lambda choices: choices.per_token.log_likelihood.exp(),
    "prob_per_char": lambda choices: choices.per_char.log_likelihood.exp(),
}
"""Outcome of each item, (items,), by the name of the figure, which is their mean."""

UNIT_FIGURES: Final[Mapping[str, Callable[[ComparedChoices], Tensor]]] = {
    name: CHOICE_FIGURES[name] for name in ("acc", "acc_norm", "prob", "prob_per_token", "prob_per_char")
}
"""Those between 0 and 1, which do not depend on other items."""
