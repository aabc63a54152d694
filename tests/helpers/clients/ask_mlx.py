"""MLX's log-probabilities: `python ask_mlx.py REQUEST.json ANSWER.json`; see `asking`."""

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for adapter in asked["adapters"]:
        model = load(asked["model"], adapter_path=adapter)[0]
        model.set_dtype(getattr(mx, asked["dtype"]))
        logprobs, first = [], []
        for text, wanted in zip(asked["texts"], asked["wanted"], strict=True):
            logits = model(mx.array([text]))[0, -len(wanted) :].astype(mx.float32)
            found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            logprobs += [found[place, mx.array(ids)].tolist() for place, ids in enumerate(wanted)]
            first += mx.argmax(found, axis=-1).tolist()
        answers.append({"logprobs": logprobs, "first": first})
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "answers": answers}))


if __name__ == "__main__":
    main()
