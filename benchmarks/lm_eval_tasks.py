"""Scoring of a task of lm-eval within a search, against lm-eval's `hf` backend on the same model and items.

    python benchmarks/lm_eval_tasks.py --model DIR/models/smollm2 --items DIR/datasets/arc_easy/test.jsonl

Rows hold `question`, `choices` and `label`. The task is ARC's of lm-eval, without examples, with examples drawn for
each item (lm-eval's default), and with the same examples for all items (as MMLU has them). Tokens are those of
lm-eval's requests, whichever way they are computed. Making prompts is left out on both sides: a search does it once.
With `--texts`, rows of `question` and `answer`, also GSM8K's prompts, which the model goes on from: without examples,
and with the same for all items. `--only texts` leaves the choices out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import finish, interleaved, paired_ratios, parser, prepared, scratch, silent, spread, table, verdict


def write_tasks(folder: Path, rows: list[dict[str, Any]], shots: int, number: int) -> dict[str, str]:
    """Names of lm-eval tasks over the rows, by what is shown before an item."""
    import yaml

    for name, part in (("test", rows[:number]), ("train", rows[number:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    own = {"fewshot_split": "train", "num_fewshot": shots}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "no examples": ("plain", {}),
        f"{shots} examples, each item its own": ("own", own),
        f"{shots} examples, the same": ("same", {**own, "fewshot_config": {"sampler": "first_n"}}),
    }
    for name, options in cases.values():
        task = {
            "task": name, "dataset_path": "json", "output_type": "multiple_choice", "training_split": "train",
            "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "label",
            "doc_to_choice": "choices", "metric_list": metrics, **options,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return {case: name for case, (name, _) in cases.items()}


def write_texts(folder: Path, rows: list[dict[str, Any]], shots: int, number: int, most: int) -> dict[str, str]:
    """Names of tasks in which a model goes on from questions, by what is shown before an item."""
    import yaml

    for name, part in (("asked", rows[:number]), ("shown", rows[number:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    cases = {"no examples": ("texts", 0), f"{shots} examples, the same": ("same_texts", shots)}
    for name, examples in cases.values():
        task = {
            "task": name, "dataset_path": "json", "training_split": "train", "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "asked.jsonl"), "train": str(folder / "shown.jsonl")}
            },
            "output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "answer", "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": most},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": examples, "fewshot_config": {"sampler": "first_n"},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return {case: name for case, (name, _) in cases.items()}


class Texts:
    """Prompts that a model goes on from, both ways."""

    def __init__(self, model: Any, tokenizer: Any, name: str, folder: Path, size: int) -> None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from qratk.backbone.logits import shared_length
        from qratk.data.lm_eval_data import LmEvalData

        self.model = model
        self.data = LmEvalData(name, task_folders=[str(folder)], validation=None, eval_batch_size=size)
        self.data.attach(tokenizer, context_length=model.config.max_position_embeddings)
        self.batches = self.data.scoring_batches("test", shared_length=shared_length(model))
        self.harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        until, most = list(self.data.harness.until), self.data.harness.most_tokens
        options = {"until": until, "max_gen_toks": most, "do_sample": False}
        self.requests = [
            Instance("generate_until", {}, (self.data.harness.prompt(item.content), dict(options)), 0, (name, k, 1))
            for k, item in enumerate(self.data.items("test"))
        ]
        self.texts: dict[str, list[str]] = {}
        self.tokens = 0

    def ours(self) -> None:
        """As a search does."""
        from qratk.data.generation import Prefix, end_ids, generate

        kept = Prefix()
        scorer, tokenizer, made = self.data.scorer("test"), self.data.tokenizer, {}
        with torch.inference_mode():
            for batch in self.batches:
                rows = batch["row"].tolist()
                found = generate(
                    self.model, batch["input_ids"], batch["attention_mask"], most=batch["most"].tolist(),
                    ends=end_ids(self.model), stopped=lambda _, tokens: scorer.stopped(0, tokens),
                    prefix=batch.get("prefix"), kept=kept,
                )  # fmt: skip
                made |= dict(zip(rows, found, strict=True))
        self.tokens = sum(map(len, made.values()))
        texts = [tokenizer.decode(made[row], skip_special_tokens=True) for row in range(len(made))]
        for end in self.data.harness.until:
            texts = [text.split(end)[0] for text in texts]
        self.texts["ours"] = texts

    def theirs(self) -> None:
        """By lm-eval."""
        with silent():
            self.texts["lm-eval"] = self.harness.generate_until(self.requests, disable_tqdm=True)


def generation(model: Any, tokenizer: Any, folder: Path, given: Any) -> dict[str, Any]:
    """Texts of both, in turn."""
    rows = [json.loads(line) for line in given.texts.read_text().splitlines()[: given.number + 100]]
    results: dict[str, Any] = {}
    lines, verdicts = [], []
    for case, name in write_texts(folder, rows, given.shots, given.number, given.most).items():
        one = Texts(model, tokenizer, name, folder, given.batch_size)
        runs = {"ours": one.ours, "lm-eval": one.theirs}
        found = interleaved(runs, repeats=given.repeats, clock=given.clock, warm_up=0)
        ratios = paired_ratios(found["lm-eval"], found["ours"])
        same = sum(a == b for a, b in zip(one.texts["ours"], one.texts["lm-eval"], strict=True))
        speeds = [spread([one.tokens / value for value in values], digits=1) for values in found.values()]
        lines.append([case, str(one.tokens), f"{same} of {given.number}", *speeds, spread(ratios)])
        verdicts.append(verdict(f"texts, {case}", ratios, at_least=1.0 if name == "texts" else 2.0))
        results[case] = {"seconds": found, "tokens": one.tokens, "equal": same, "texts": given.number}
    heads = ["texts", "tokens generated", "equal", "ours, tokens a second", "lm-eval", "ratio"]
    print(f"\nof up to {given.most} tokens\n", table(heads, lines), *verdicts, sep="\n")
    return results


class Case:
    """One task, scored both ways."""

    def __init__(self, model: Any, tokenizer: Any, name: str, folder: Path, size: int) -> None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from qratk.backbone.logits import shared_length
        from qratk.data.lm_eval_data import LmEvalData

        self.model = model
        self.data = LmEvalData(name, task_folders=[str(folder)], validation=None, eval_batch_size=size)
        self.data.attach(tokenizer, context_length=model.config.max_position_embeddings)
        self.batches = self.data.scoring_batches("test", shared_length=shared_length(model))
        self.tokens = sum(len(row.tokens) for row in self.data.scoring_rows("test"))
        self.harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, softmax_dtype="float32")
        self.requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=k, metadata=(name, index, 1))
            for index, item in enumerate(self.data.items("test"))
            for k, pair in enumerate(self.data.harness.pairs(item.content))
        ]
        self.found: dict[str, torch.Tensor] = {}
        self.acc: dict[str, float] = {}

    def ours(self) -> None:
        """As a search scores."""
        from qratk.backbone.logits import labelled_logits, target_log_likelihood

        scorer = self.data.scorer("test")
        with torch.inference_mode():
            for batch in self.batches:
                scorer.update(batch, *target_log_likelihood(labelled_logits(self.model, batch), batch))
        self.acc["ours"] = float(scorer.compute()["acc"])
        self.found["ours"] = scorer.log_likelihood.double()

    def theirs(self) -> None:
        """By lm-eval."""
        with silent():
            values = self.harness.loglikelihood(self.requests, disable_tqdm=True)
        self.found["lm-eval"] = torch.tensor([value for value, _ in values], dtype=torch.float64)
        scorer = self.data.scorer("test")
        rows = torch.arange(len(values))
        scorer.update({"row": rows}, self.found["lm-eval"], torch.ones_like(rows))
        self.acc["lm-eval"] = float(scorer.compute()["acc"])


def main() -> None:
    """Every case in turn."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    options.add_argument("--items", type=Path, required=True, help="JSON lines of question, choices, label")
    options.add_argument("--number", type=int, default=100, help="items scored; examples are of those behind")
    options.add_argument("--shots", type=int, default=5)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--dtype", default="auto", help="of the model's weights, such as float32")
    options.add_argument("--texts", type=Path, help="JSON lines of question, answer, which are gone on from")
    options.add_argument("--only", choices=["choices", "texts"], help="leave the other out")
    options.add_argument("--most", type=int, default=64, help="tokens of such a text at most")
    given = prepared(options)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = [json.loads(line) for line in given.items.read_text().splitlines()]
    results: dict[str, Any] = {}
    lines, verdicts = [], []
    with scratch() as folder:
        cases = write_tasks(folder, rows[: given.number + 1000], given.shots, given.number)
        for case, name in cases.items() if given.only != "texts" else ():
            one = Case(model, tokenizer, name, folder, given.batch_size)
            runs = {"ours": one.ours, "lm-eval": one.theirs}
            found = interleaved(runs, repeats=given.repeats, clock=given.clock, warm_up=0)
            ratios = paired_ratios(found["lm-eval"], found["ours"])
            apart = float((one.found["ours"] - one.found["lm-eval"]).abs().max())
            speeds = [spread([one.tokens / value for value in found[side]], digits=0) for side in runs]
            accuracies = [f"{one.acc[side]:.3f}" for side in runs]
            lines.append([case, str(one.tokens), *speeds, spread(ratios), f"{apart:.1g}", *accuracies])
            verdicts.append(verdict(case, ratios, at_least=1.5 if name == "plain" else 2.0))
            results[case] = {"seconds": found, "tokens": one.tokens, "apart": apart, "acc": one.acc}
        if given.texts is not None and given.only != "choices":
            results["texts"] = generation(model, tokenizer, folder, given)
    heads = ["", "tokens", "ours, tokens a second", "lm-eval", "ratio", "nats apart", "acc, ours", "acc, lm-eval"]
    if lines:
        print(table(heads, lines), *verdicts, sep="\n")
    finish(given, "lm_eval_tasks", results)


if __name__ == "__main__":
    main()
