"""Multiple choice over rows of files: the right choice is learnt, and choices are scored as lm-eval does."""

from __future__ import annotations

from typing import Any, Literal, final

from qratk.data.choices import DEFAULT_PROMPT, ChoiceData
from qratk.data.scoring import ChoiceScore


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
        score: What a search maximises: accuracy (`acc`; `acc_norm` divides by the characters of a choice), the mean
            log-probability of the right choice among the choices (`log_likelihood`, smooth), or its plain mean
            log-likelihood (`nats`).
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        prompt: str = DEFAULT_PROMPT,
        target_delimiter: str = " ",
        blank: Literal["auto", "substitute", "none"] = "auto",
        score: ChoiceScore = "log_likelihood",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, prompt=prompt, target_delimiter=target_delimiter, blank=blank, score=score, **kwargs)
