"""Which tokens of a row are learnt: those of its answers, and what ends each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Piece = tuple[str, bool]
"""A stretch of text, and whether it is an answer to be learnt."""


def pieces_of(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """A text cut where answers begin and end."""
    pieces: list[Piece] = []
    position = 0
    for begin, end in spans:
        pieces += [(text[position:begin], False), (text[begin:end], True)]
        position = end
    return [*pieces, (text[position:], False)]


def label_answers(
    ids: Sequence[int],
    owners: Sequence[int],
    pieces: Sequence[Piece],
    closing: frozenset[int],
    *,
    blank: Callable[[int], bool],
) -> tuple[list[bool], bool]:
    """Labels of a row's tokens, and whether every answer has an end.

    An answer's end is the special token behind it, with the white space between; the token is learnt too.
    """
    labelled = [pieces[owner][1] if owner >= 0 else False for owner in owners]
    closed = True
    for piece in (index for index, (_, answer) in enumerate(pieces) if answer):
        first = next((at for at, owner in enumerate(owners) if owner > piece), len(ids))
        last = first
        while last < len(ids) and ids[last] not in closing and blank(ids[last]):
            last += 1
        if last < len(ids) and ids[last] in closing:
            labelled[first : last + 1] = [True] * (last + 1 - first)
        else:
            closed = False
    return labelled, closed


def end_answers(
    ids: Sequence[int], owners: Sequence[int], pieces: Sequence[Piece], end: int | None
) -> tuple[list[int], list[bool]]:
    """Tokens and labels, with an end of sequence put behind each answer."""
    tokens: list[int] = []
    labelled: list[bool] = []
    position = 0
    for piece, (_, answer) in enumerate(pieces):
        while position < len(ids) and owners[position] <= piece:
            tokens.append(ids[position])
            labelled.append(answer and owners[position] == piece)
            position += 1
        if answer and end is not None:
            tokens.append(end)
            labelled.append(True)
    return tokens, labelled
