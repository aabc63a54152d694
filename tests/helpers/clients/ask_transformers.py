"""Log-probabilities of transformers and PEFT: `python ask_transformers.py REQUEST.json ANSWER.json`; see `asking`."""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for adapter in asked["adapters"]:
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"]).eval()
        if adapter:
            with torch.no_grad():
                model(torch.tensor([[1]]))  # compressed-tensors unpacks weights in the first pass, which PEFT wants
            model = PeftModel.from_pretrained(model, adapter).eval()
        logprobs, first = [], []
        for text, wanted in zip(asked["texts"], asked["wanted"], strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text])).logits[0, -len(wanted) :].float()
            found = logits.log_softmax(-1)
            logprobs += [found[place, ids].tolist() for place, ids in enumerate(wanted)]
            first += found.argmax(-1).tolist()
        answers.append({"logprobs": logprobs, "first": first})
    names = ("transformers", "torch", "compressed-tensors", "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "answers": answers}))


if __name__ == "__main__":
    main()
