"""Log-probabilities that clients give, beside those of the model: asked in processes of their own interpreters."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clients.environments import Client

MOST_WANTED = 128  # log-probabilities that vLLM gives for one position


class ClientError(Exception):
    """A client ended with an error; the text has its last words."""


@dataclass(frozen=True, eq=False)
class Question:
    """Positions of texts, and the tokens whose log-probabilities are wanted there.

    Attributes:
        texts: tokens of each text.
        wanted: of each of the last positions of each text, tokens that may come next.
    """

    texts: Sequence[Sequence[int]]
    wanted: Sequence[Sequence[Sequence[int]]]

    @classmethod
    def likeliest(cls, tokens: Tensor, logits: Tensor, count: int = 20) -> Question:
        """The tokens that a model finds likeliest, (texts, length, vocabulary), at all positions."""
        return cls(tokens.tolist(), logits.topk(min(count, logits.shape[-1]), -1).indices.tolist())


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client gives for the positions of a question, one text after another.

    Attributes:
        logprobs: for each position those of the wanted tokens, in the order of the question.
        first: the likeliest token of each position.
    """

    logprobs: Sequence[Sequence[float]]
    first: Sequence[int]


@dataclass(frozen=True)
class Apart:
    """How far a client is from a model.

    Attributes:
        largest: difference of two log-probabilities, in nats.
        mean: of the differences.
        agreement: positions where both find the same token likeliest.
        positions: how many there are.
    """

    largest: float
    mean: float
    agreement: int
    positions: int

    def __str__(self) -> str:
        return f"{self.largest:.2g}, mean {self.mean:.2g}; {self.agreement} of {self.positions}"


def ask(
    client: Client,
    model: Path,
    question: Question,
    adapters: Sequence[Path | None] = (None,),
    *,
    dtype: str = "float32",
    strings: Sequence[str] = (),
    minutes: float = 30,
) -> tuple[list[Reply], dict[str, object]]:
    """Replies of a client with each of several adapters, None for none, and all that it said besides.

    Args:
        client: one that is set up; else this raises `NotSetUpError`.
        model: what it loads.
        question: what it is asked, at most `MOST_WANTED` tokens a position.
        adapters: folders or files.
        dtype: type that it computes in, where it lets one choose.
        strings: texts that it is to cut into tokens, for clients that do.
        minutes: after which it is stopped.

    Raises `ClientError` where it ends with an error.
    """
    assert all(len(ids) <= MOST_WANTED for text in question.wanted for ids in text)
    request = {
        "model": str(model),
        "adapters": [None if path is None else str(path) for path in adapters],
        "dtype": dtype,
        "longest": max(map(len, question.texts)),
        "texts": [list(text) for text in question.texts],
        "wanted": [[list(ids) for ids in text] for text in question.wanted],
        "strings": list(strings),
    }
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, said = (Path(folder) / name for name in ("request.json", "answer.json", "output.txt"))
        asked.write_text(json.dumps(request))
        command = [str(client.python), str(client.script), str(asked), str(answered)]
        with said.open("w") as output:
            done = subprocess.run(
                command,
                env={**plain, **variables, **client.running},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
            )
        if done.returncode or not answered.exists():
            raise ClientError(f"{client.name} ended with status {done.returncode}: {said.read_text()[-3000:]}")
        told = json.loads(answered.read_text())
    return [Reply(**reply) for reply in told.pop("answers")], told


def apart(reply: Reply, question: Question, logits: Tensor) -> Apart:
    """Compare a reply with a model's logits (texts, length, vocabulary) at the same positions."""
    logprobs = logits.double().log_softmax(-1)
    differences: list[float] = []
    same = place = 0
    for text, wanted in enumerate(question.wanted):
        rows = logprobs[text, -len(wanted) :]
        for row, ids in zip(rows, wanted, strict=True):
            given = torch.tensor(reply.logprobs[place], dtype=torch.float64)
            differences += (given - row[list(ids)]).abs().tolist()
            same += int(reply.first[place] == int(row.argmax()))
            place += 1
    assert place == len(reply.first)
    largest = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
    return Apart(largest, sum(differences) / len(differences), same, place)
