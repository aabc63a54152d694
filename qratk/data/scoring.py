"""From log-likelihoods of rows to figures of items."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from qratk.core.errors import DataError
from qratk.data.choice_figures import CHOICE_FIGURES, UNIT_FIGURES, ChoiceScore, Compared, ComparedChoices

IGNORE = -100


class Scorer(Metric):
    """Figures of a split from the log-likelihoods of its rows; every row of every item must be seen before `outcomes`.

    Works with several replicas: states are summed, and a row that two replicas scored counts once. Figures are made on
    the CPU in double precision, where adding up has one order. Where only some items are to be scored, `wanted` says
    which, (num_items,) bool. `needs_greedy` says whether `update` must be told if rows were the likeliest tokens. Rows
    that generate text have `width` figures each, `values`, (rows, width), made as soon as their text is there.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    log_likelihood: Tensor
    tokens: Tensor
    seen: Tensor
    greedy: Tensor
    values: Tensor
    wanted: Tensor | None = None
    needs_greedy: bool = False

    def __init__(self, items: Sequence[int], num_items: int, width: int = 0) -> None:
        """`items` holds the item of each row, `width` is the number of figures of a text that is generated."""
        super().__init__()
        rows = len(items)
        self.num_items = num_items
        self.items = torch.tensor(items, dtype=torch.int64)  # (rows,)
        self._has_greedy = False
        self.add_state("log_likelihood", torch.zeros(rows), dist_reduce_fx="sum")
        for name in ("tokens", "seen", "greedy"):
            self.add_state(name, torch.zeros(rows, dtype=torch.int64), dist_reduce_fx="sum")
        self.width = width
        if width:
            self.add_state("values", torch.zeros(rows, width), dist_reduce_fx="sum")

    def update(
        self,
        batch: Mapping[str, Tensor],
        log_likelihood: Tensor | None = None,
        tokens: Tensor | None = None,
        greedy: Tensor | None = None,
        *,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Take the summed log-likelihood and the number of labelled tokens of each row of a batch, both (B,).

        `greedy`, (B,) bool, tells whether each row's labelled tokens were the likeliest ones: adds "exact_match".
        Of a batch of prompts, `texts` are the tokens that were generated for each, and nothing else is given.
        """
        row = batch["row"].to(self.seen.device)
        if texts is not None:
            values = torch.zeros(len(texts), self.width)
            for place, (number, text) in enumerate(zip(row.tolist(), texts, strict=True)):
                own = torch.tensor(self.text_values(number, text))
                values[place, : len(own)] = own
            self.values.index_add_(0, row, values.to(self.values))
            self.seen.index_add_(0, row, torch.ones_like(row))
            return
        assert log_likelihood is not None
        assert tokens is not None
        self.log_likelihood.index_add_(0, row, log_likelihood.detach().to(self.log_likelihood))
        self.tokens.index_add_(0, row, tokens.to(self.tokens))
        self.seen.index_add_(0, row, torch.ones_like(row))
        if greedy is not None:
            self._has_greedy = True
            self.greedy.index_add_(0, row, greedy.to(self.greedy))

    def stopped(self, row: int, tokens: Sequence[int]) -> bool:
        """Whether the text of a row is over after these tokens."""
        raise DataError(f"{type(self).__name__} has no rows that generate text")

    def text_values(self, row: int, tokens: Sequence[int]) -> Sequence[float]:
        """Figures of the text of a row."""
        raise DataError(f"{type(self).__name__} has no rows that generate text")

    def compute(self) -> dict[str, Tensor]:
        """Named figures, among them "score" (larger is better), over the items whose every row was seen."""
        complete = self._complete()
        if not bool(complete.any()):
            raise DataError("no item was scored: run at least one scoring batch before asking for the score")
        figures = self._figures(complete)
        if self._has_greedy and not self.needs_greedy:  # who needs it makes figures of it
            figures["exact_match"] = self._exact()[complete].double().mean()
        return {name: self._placed(value) for name, value in figures.items()}

    def outcomes(self) -> Tensor:
        """Figure of each item, (num_items,), whose mean under the item weights is the score; of those wanted."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            wanted = torch.ones(self.num_items, dtype=torch.bool) if self.wanted is None else self.wanted
            missing = int((wanted & ~self._complete()).sum())
            if missing:
                raise DataError(f"{missing} of {int(wanted.sum())} items were not scored: run all scoring batches")
            return self._placed(self._outcomes()[wanted])

    @abstractmethod
    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        """Figures over the items that `complete`, (num_items,) bool, admits."""

    @abstractmethod
    def _outcomes(self) -> Tensor:
        """Figure of each item, (num_items,)."""

    def item_figure(self, name: str) -> Tensor:
        """A figure between 0 and 1 of each item, (num_items,), on the CPU; that named so is the mean over items.

        Raises DataError where there is none of that name.
        """
        raise DataError(f"{type(self).__name__} has no figure {name!r} of items between 0 and 1")

    def mean_figure(self, name: str, admitted: Tensor) -> Tensor:
        """A figure between 0 and 1 over the items that `admitted`, (num_items,) bool, admits."""
        return self.item_figure(name)[admitted].mean()

    @abstractmethod
    def _exact(self) -> Tensor:
        """Whether each item's right answer was the likeliest token by token, (num_items,) bool."""

    def _placed(self, values: Tensor) -> Tensor:
        # Apple's GPUs have no double precision.
        return values.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)

    def _complete(self) -> Tensor:
        return self._sum_by_item(self.seen.cpu() == 0) == 0

    def _sum_by_item(self, values: Tensor) -> Tensor:
        return torch.zeros(self.num_items, dtype=torch.float64).index_add_(0, self.items, values.double())

    def _row_values(self) -> tuple[Tensor, Tensor]:
        """Log-likelihood and tokens of each row, (rows,)."""
        times = self.seen.cpu().clamp(min=1)
        return self.log_likelihood.cpu().double() / times, (self.tokens.cpu() // times).double()


class LikelihoodScorer(Scorer):
    """Minus nats per token: items weigh as many tokens as they have.

    `token_prob` is the mean over items, all alike, of the geometric mean of their tokens' probabilities.
    """

    def _sums(self) -> tuple[Tensor, Tensor]:
        log_likelihood, tokens = self._row_values()
        return self._sum_by_item(log_likelihood), self._sum_by_item(tokens)

    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        log_likelihood, tokens = self._sums()
        score = log_likelihood[complete].sum() / tokens[complete].sum()
        token_prob = (log_likelihood[complete] / tokens[complete]).exp().mean()
        return {"score": score, "nats_per_token": -score, "perplexity": (-score).exp(), "token_prob": token_prob}

    def _outcomes(self) -> Tensor:
        log_likelihood, tokens = self._sums()
        return log_likelihood / tokens

    def item_figure(self, name: str) -> Tensor:
        """`token_prob` of each item."""
        return self._outcomes().exp() if name == "token_prob" else super().item_figure(name)

    def _exact(self) -> Tensor:
        return self._sum_by_item(self.greedy.cpu() == 0) == 0


class ChoiceScorer(Scorer):
    """Accuracy and likelihood of the right choice; the figures are lm-eval's where it has them.

    `acc_norm`, "per_char" and "per_token" divide the log-likelihood of a choice by its characters or tokens. "fitted"
    ones compare choices at the temperature that is fitted to the very items that are scored, so that of a test is not
    that of the validation: they tell how well choices are told apart, however sure of itself the model is. It is one
    number from all items, by which a score gains 1 / items nats in the mean where it has nothing to tell.
    """

    def __init__(
        self, items: Sequence[int], labels: Sequence[int], lengths: Sequence[int], *, score: ChoiceScore
    ) -> None:
        """`items` and `lengths` (characters of the choice) are of rows, in the order of choices; `labels` of items."""
        super().__init__(items, len(labels))
        self.score = score
        counts = torch.bincount(self.items, minlength=len(labels))
        first = counts.cumsum(0) - counts
        columns = torch.arange(int(counts.max()))
        # (num_items, most choices), -1 where there is no choice
        self.choice_rows = torch.where(columns < counts[:, None], first[:, None] + columns, -1)
        self.lengths = torch.tensor(lengths, dtype=torch.float64)  # (rows,)
        self.labels = torch.tensor(labels, dtype=torch.int64)  # (num_items,)

    def _compared(self, items: Tensor) -> ComparedChoices:
        """Choices of the items that `items`, (num_items,) bool, admits."""
        log_likelihood, tokens = self._row_values()
        kinds = (log_likelihood, log_likelihood / tokens, log_likelihood / self.lengths)
        plain, per_token, per_char = (Compared(self._table(values)[items], self.labels[items]) for values in kinds)
        return ComparedChoices(plain, per_token, per_char)

    def _table(self, values: Tensor) -> Tensor:
        present = self.choice_rows >= 0
        return torch.where(present, values[self.choice_rows.clamp(min=0)], -torch.inf)  # (num_items, most choices)

    def _figures(self, complete: Tensor) -> dict[str, Tensor]:
        choices = self._compared(complete)
        figures = {name: figure(choices).mean() for name, figure in CHOICE_FIGURES.items()}
        return {"score": figures[self.score], **{str(name): value for name, value in figures.items()}}

    def _outcomes(self) -> Tensor:
        return CHOICE_FIGURES[self.score](self._compared(torch.ones_like(self.labels, dtype=torch.bool)))

    def item_figure(self, name: str) -> Tensor:
        """One of `UNIT_FIGURES` of each item."""
        if name not in UNIT_FIGURES:
            return super().item_figure(name)
        return UNIT_FIGURES[name](self._compared(torch.ones_like(self.labels, dtype=torch.bool)))

    def _exact(self) -> Tensor:
        return self._table(self.greedy.cpu().double()).gather(1, self.labels[:, None]).squeeze(1) > 0
