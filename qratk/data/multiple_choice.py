"""Multiple choice over rows of files: the right choice is learnt, and choices are scored as lm-eval does."""

from __future__ import annotations

from typing import Any, Literal, final

from qratk.data.choice_figures import ChoiceScore
from qratk.data.choices import DEFAULT_PROMPT, ChoiceData


@final
class MultipleChoiceData(ChoiceData):
    """Rows of context and question (either may be empty), choices, and label, the index of the right choice.

    Choices may also be {"text": [...], "label": [...]} with `label` one of these labels, as ARC has it on the hub (with
    `rename` {"label": "answerKey"}).

    Args:
        train: As in `TaskData`, whose other options apply too.
        prompt: Jinja template of the prompt over the row's fields, lm-eval's `doc_to_text`.
        target_delimiter: What stands between prompt and choice.
        blank: `substitute` puts each choice in the place of `_` and scores the rest of the sentence (partial
            evaluation, as lm-eval does for WinoGrande); `auto` does so when every row has such a blank.
        score: What a search maximises: the mean probability of the right choice among the choices (`prob`), its mean
            log-probability (`log_likelihood`), its plain mean log-likelihood (`nats`), or accuracy (`acc`; `acc_norm`
            divides by the characters of a choice). `_per_token` and `_per_char` behind the former two divide
            log-likelihoods by a choice's tokens or characters before choices are compared; `_fitted` behind
            `log_likelihood` or one of these compares at the temperature that suits the items best. All of them are
            recorded of every evaluation. `prob_per_token` of few items ranks configurations best by their accuracy on
            others (docs/score.md).
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        prompt: str = DEFAULT_PROMPT,
        target_delimiter: str = " ",
        blank: Literal["auto", "substitute", "none"] = "auto",
        score: ChoiceScore = "prob_per_token",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, prompt=prompt, target_delimiter=target_delimiter, blank=blank, score=score, **kwargs)
