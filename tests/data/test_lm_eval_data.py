from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qratk.core import DataError
from qratk.data import LmEvalData, MultipleChoiceData, SuiteData, lm_eval_task
from qratk.data.lm_eval import run_lm_eval
from qratk.data.lm_eval_task import ChatPrompt
from qratk.training.scoring import Scoring

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lm-eval's dependencies
    pytest.mark.usefixtures("datasets_cache"),
]

CHOICES = ["red", "green blue", "zwölf Bäume", "the quick brown fox", "yes"]


def documents(*numbers: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"one {n} two",
            "choices": CHOICES[n % 3 : n % 3 + 2 + n % 2],
            "label": n % 2,
            "both": [0, 1] if n % 3 else [1],
            "tail": f"the dog {n}",
        }
        for n in numbers
    ]


def metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": aggregation == "mean"}


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [metric("acc"), metric("acc_norm")],
}
TASKS: dict[str, dict[str, Any]] = {
    "plain": CHOICE,
    "shots": {**CHOICE, "num_fewshot": 2, "description": "Say {{label}}.\n\n", "fewshot_delimiter": "\n--\n"},
    "own_shots": {**CHOICE, "num_fewshot": 3, "fewshot_split": "test"},
    "first": {**CHOICE, "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}, "fewshot_split": "train"},
    "bytes": {
        **CHOICE,
        "target_delimiter": "\n",
        "metric_list": [metric(name) for name in ("acc_bytes", "exact_match", "acc_mutual_info", "acc")],
    },
    "both": {**CHOICE, "doc_to_target": "both", "metric_list": [metric("acc"), metric("acc_norm")]},
    "inputs": {
        **CHOICE,
        "doc_to_text": "label",
        "doc_to_target": "tail",
        "doc_to_choice": "{{[question ~ ' so', question ~ ' but the quick']}}",
        "num_fewshot": 1,
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{' ' ~ tail}}",
        "metric_list": [metric("acc"), metric("perplexity", "perplexity")],
    },
    "own_results": {**CHOICE, "process_results": "!results", "metric_list": [metric("share")]},
}
FUNCTION = """
import math

def results(doc, results):
    values = [math.exp(value) for value, _ in results]
    return {"share": values[doc["label"]] / sum(values)}

def of_text(doc, results):
    return {"share": (sum(map(ord, results[0])) + doc["label"]) % 11 / 11}
"""
TEXTS: dict[str, dict[str, Any]] = {
    "texts": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "tail",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["e", "fox"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0},
        "metric_list": [metric("share")],
        "process_results": "!of_text",
    },
    "texts_first": {  # 12 prompts behind the same examples
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "tail",
        "num_fewshot": 4,
        "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
        "metric_list": [metric("share")],
        "process_results": "!of_text",
    },
    "filtered": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{['h', 'o', 'e', 's'][label]}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 12},
        "metric_list": [{**metric("exact_match"), "ignore_case": True}],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in (("first", "([a-z])"), ("second", "[a-z][^a-z]*([a-z])"))
        ],
    },
}
TASKS |= TEXTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks over local files of each split."""
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "functions.py").write_text(FUNCTION, encoding="utf-8")
    return place


def write_tasks(place: Path, name: str, **options: Any) -> str:
    files = {"train": documents(*range(20, 32)), "validation": documents(*range(12, 20)), "test": documents(*range(12))}
    for split, rows in files.items():
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(place / f"{split}.jsonl") for split in files}},
        **splits,
        **TASKS[name],
        **options,
    }
    text = yaml.safe_dump({key: value for key, value in config.items() if value is not None}, sort_keys=False)
    for function in ("results", "of_text"):
        text = text.replace(f"'!{function}'", f"!function functions.{function}")
    (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def make(place: Path, name: str, tokenizer: Any, config: dict[str, Any] | None = None, **options: Any) -> LmEvalData:
    data = LmEvalData(write_tasks(place, name, **(config or {})), task_folders=[str(place)], **options)
    data.attach(tokenizer, context_length=256)
    return data


def scored(data: Any, model: Any, split: str = "test", shared_length: int = 128) -> Any:
    scoring = Scoring()
    scoring.begin(data, split, torch.device("cpu"), nullcontext())
    with torch.no_grad():
        for batch in data.scoring_batches(split, shared_length=shared_length):
            scoring.score(model, batch)
    (scorer,) = scoring.end()
    return scorer


def samples_of(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return found


@pytest.mark.parametrize("name", sorted(TASKS.keys() - TEXTS.keys()))
def test_requests_likelihoods_and_metrics_are_those_of_lm_eval(
    name: str, folder: Path, tokenizer: Any, model: Any
) -> None:
    data = make(folder, name, tokenizer)
    scorer = scored(data, model)
    theirs = run_lm_eval(model, tokenizer, [name], task_folders=[folder], log_samples=True, max_length=255)
    samples = samples_of(theirs, name)
    ours = [pair for item in data.items("test") for pair in data.harness.pairs(item.content)]
    assert ours == [tuple(pair) for sample in samples for pair in sample["arguments"]]
    expected = [value for sample in samples for value, _ in sample["filtered_resps"]]
    np.testing.assert_allclose(scorer.log_likelihood.numpy(), expected, rtol=2e-5, atol=2e-5)
    likeliest = [greedy for sample in samples for _, greedy in sample["filtered_resps"]]
    assert (scorer.greedy > 0).tolist() == likeliest
    figures = {key: float(value) for key, value in scorer.compute().items()}
    wanted = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
    wanted = {key: value for key, value in wanted.items() if "_stderr" not in key}
    assert wanted
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    for figure in wanted:
        if data.harness.bounded(figure):
            own = [float(sample[figure]) for sample in samples]
            assert scorer.item_figure(figure).tolist() == pytest.approx(own, rel=1e-5)
    assert float(scorer.outcomes().mean()) == pytest.approx(figures["score"])


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_texts_and_their_metrics_are_those_of_lm_eval(
    name: str, folder: Path, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(folder, name, tokenizer, eval_batch_size=5)
    texts: dict[int, str] = {}
    values = data.harness.text_values

    def noted(document: Any, text: str) -> list[float]:
        texts[document.index] = text
        return values(document, text)

    monkeypatch.setattr(data.harness, "text_values", noted)
    batches = data.scoring_batches("test", shared_length=256)
    assert {"prefix" in batch for batch in batches} == {name == "texts_first"}
    if name == "texts_first":
        assert len(batches) > 1
        assert len({tuple(batch["prefix"].tolist()) for batch in batches}) == 1
        assert max(batch["input_ids"].shape[1] for batch in batches) < 16 < len(batches[0]["prefix"])
    scorer = scored(data, model, shared_length=256)
    monkeypatch.setattr("qratk.data.generation.plain_greedy", lambda model: False)  # their own generation
    theirs = run_lm_eval(model, tokenizer, [name], task_folders=[folder], log_samples=True, max_length=256)
    samples = samples_of(theirs, name)
    assert len(texts) == 12
    for sample in samples:
        own = texts[sample["doc_id"]]
        for end in data.harness.until:
            own = own.split(end)[0]
        assert own == sample["resps"][0][0]
    assert len({sample["resps"][0][0] for sample in samples}) > 3
    figures = {key: float(value) for key, value in scorer.compute().items()}
    wanted = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
    wanted = {key: value for key, value in wanted.items() if "_stderr" not in key}
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert len(wanted) == (2 if name == "filtered" else 1)
    assert any(0 < value < 1 for value in wanted.values())
    assert figures["score"] == figures[next(iter(wanted))] == pytest.approx(float(scorer.outcomes().mean()))


@pytest.mark.parametrize(
    ("name", "multiturn"),
    [("shots", None), ("shots", False), ("bytes", True), ("inputs", True), ("last_word", True), ("texts_first", False)],
)
def test_prompts_through_a_chat_template_are_those_of_lm_eval(
    name: str, multiturn: bool | None, folder: Path, chat_tokenizer: Any, model: Any
) -> None:
    data = make(folder, name, chat_tokenizer, apply_chat_template=True, fewshot_as_multiturn=multiturn)
    assert data.fingerprint() != make(folder, name, chat_tokenizer).fingerprint()
    scorer = scored(data, model, shared_length=256)
    theirs = run_lm_eval(
        model, chat_tokenizer, [name], task_folders=[folder], log_samples=True, max_length=256,
        apply_chat_template=True, fewshot_as_multiturn=multiturn,
    )  # fmt: skip
    samples = samples_of(theirs, name)
    items = [item.content for item in data.items("test")]
    if name == "texts_first":
        asked = [sample["arguments"][0][0] for sample in samples]
        assert [data.harness.prompt(document, chat=data._chat) for document in items] == asked
    else:
        asked = [tuple(pair) for sample in samples for pair in sample["arguments"]]
        assert [pair for document in items for pair in data.harness.pairs(document, chat=data._chat)] == asked
        expected = [value for sample in samples for value, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(scorer.log_likelihood.numpy(), expected, rtol=2e-5, atol=2e-5)
    turns = {None: 3, True: {"inputs": 2}.get(name, 1), False: 1}[multiturn]
    first = asked[0] if name == "texts_first" else asked[0][0]
    assert first.count("<|turn|>user") == turns
    figures = {key: float(value) for key, value in scorer.compute().items()}
    wanted = {key.removesuffix(",none"): value for key, value in theirs["results"][name].items() if "," in key}
    wanted = {key: value for key, value in wanted.items() if "_stderr" not in key}
    assert wanted
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)


def test_a_chat_template_that_knows_no_system_is_given_none(chat_tokenizer: Any, tokenizer: Any) -> None:
    strict = copy.deepcopy(chat_tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + strict.chat_template
    )
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    chat = ChatPrompt(strict, multiturn=True)
    assert chat(messages) == "<|turn|>user\nb<|end|>\n<|turn|>assistant\n"
    begun = [*messages, {"role": "assistant", "content": "So"}]
    assert chat(begun, add_generation_prompt=False) == "<|turn|>user\nb<|end|>\n<|turn|>assistant\nSo"
    with pytest.raises(DataError, match="apply_chat_template is set, but the tokenizer has no chat template"):
        ChatPrompt(tokenizer, multiturn=True)


@pytest.fixture
def group(folder: Path) -> Path:
    """A group of a task and of a group of two others, of different numbers of documents."""
    for name, numbers in (("plain", range(12)), ("shots", range(40, 45)), ("own_shots", range(50, 57))):
        write_tasks(folder, name)
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
        files["test"] = str(folder / f"{name}.test.jsonl")
        Path(files["test"]).write_text("".join(json.dumps(row) + "\n" for row in documents(*numbers)), encoding="utf-8")
        write_tasks(folder, name, dataset_kwargs={"data_files": files})
    part = {"group": "part", "task": ["shots", "own_shots"]}
    aggregates = {
        "all": [{"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm", "weight_by_size": False}],
        "part": [{"metric": "acc", "weight_by_size": False}],
    }
    whole = {"group": "all", "task": ["plain", "part"], "aggregate_metric_list": aggregates["all"]}
    (folder / "part.yaml").write_text(yaml.safe_dump({**part, "aggregate_metric_list": aggregates["part"]}))
    (folder / "all.yaml").write_text(yaml.safe_dump(whole))
    return folder


def test_a_group_of_tasks_is_weighed_as_lm_eval_does(group: Path, tokenizer: Any, model: Any) -> None:
    data = LmEvalData("all", task_folders=[str(group)], score="acc_norm", validation="validation")
    data.attach(tokenizer, context_length=256)
    assert len(data.items("test")) == 12 + 5 + 7
    assert len(data.items("validation")) == 3 * 8
    theirs = run_lm_eval(model, tokenizer, ["all"], task_folders=[group], max_length=255)["results"]
    figures = {key: float(value) for key, value in scored(data, model).compute().items()}
    compared = 0
    for name, values in theirs.items():
        for key, value in values.items():
            if isinstance(value, float) and "," in key and "_stderr" not in key:
                own = key.removesuffix(",none")
                assert figures[own if name == "all" else f"{name}/{own}"] == pytest.approx(value, rel=1e-6), (name, key)
                compared += 1
    assert compared == 2 + 1 + 3 * 2
    sizes = np.array([12, 5, 7])
    accs, norms = (
        np.array([figures[f"{name}/{figure}"] for name in ("plain", "shots", "own_shots")])
        for figure in ("acc", "acc_norm")
    )
    assert figures["acc"] == pytest.approx((accs * sizes).sum() / sizes.sum())
    assert figures["score"] == figures["acc_norm"] == pytest.approx(norms.mean())
    assert norms.mean() != pytest.approx((norms * sizes).sum() / sizes.sum())
    weights = np.array(data.item_weights("test"))
    outcomes = scored(data, model).outcomes().numpy()
    assert (weights * outcomes).sum() / weights.sum() == pytest.approx(figures["score"])


def test_a_group_is_a_task_of_a_suite(group: Path, tokenizer: Any, model: Any) -> None:
    def suite(metric: str | None) -> SuiteData:
        made = SuiteData(
            validation={
                "all": {"data": LmEvalData("all", task_folders=[str(group)]), "metric": metric, "items": [10, 20]},
                "alone": {"data": make(group, "texts", tokenizer), "weight": 2},
            }
        )
        made.attach(tokenizer, context_length=256)
        return made

    for metric in ("acc", "acc_norm", None):
        data = suite(metric)
        scorer = scored(data, model, "validation")
        figures = {key: float(value) for key, value in scorer.compute().items()}
        assert figures["all/score"] == pytest.approx(figures["all/" + (metric or "score")])
        assert figures["score"] == pytest.approx((figures["all/score"] + 2 * figures["alone/score"]) / 3)
        weights, outcomes = np.array(data.item_weights("validation")), scorer.outcomes().numpy()
        assert len(outcomes) == 20 + 8
        assert (weights * outcomes).sum() / weights.sum() == pytest.approx(figures["score"])
        assert {"all/acc", "all/part/acc", "all/plain/acc"} <= figures.keys()
    data.rung = 0
    assert len(scored(data, model, "validation").outcomes()) == 10 + 8
    named = LmEvalData("all", task_folders=[str(group)], score="f1")
    named.attach(tokenizer, context_length=256)
    with pytest.raises(DataError, match="the group all has no figure 'f1' that is a mean over items; it has acc"):
        named.scoring_rows("test")


def test_candidates_side_by_side_generate_as_each_alone(folder: Path, tokenizer: Any, model: Any) -> None:
    suite = SuiteData(
        validation={name: {"data": make(folder, name, tokenizer)} for name in ("texts", "plain", "filtered")},
        eval_batch_size=3,
    )
    suite.attach(tokenizer, context_length=256)
    alone = scored(suite, model, "validation")
    scoring = Scoring()
    scoring.begin(suite, "validation", torch.device("cpu"), nullcontext(), count=2)
    with torch.no_grad():
        for batch in suite.scoring_batches("validation", shared_length=128):
            scoring.score(model, batch)
    for scorer in scoring.end():
        found = {key: float(value) for key, value in scorer.compute().items()}
        assert found == pytest.approx({key: float(value) for key, value in alone.compute().items()}, rel=1e-4)
        assert scorer.outcomes().tolist() == pytest.approx(alone.outcomes().tolist(), rel=1e-4)
    assert {"texts/share", "filtered/exact_match,first", "plain/acc"} <= set(found)


def test_replicas_share_texts_out(folder: Path, tokenizer: Any, model: Any) -> None:
    data = make(folder, "texts", tokenizer, eval_batch_size=2)
    whole, batches = scored(data, model), data.scoring_batches("test")
    parts = []
    for share in (batches[::2], [*batches[1::2], batches[0]]):  # one is scored by both
        scoring = Scoring()
        scoring.begin(data, "test", torch.device("cpu"), nullcontext())
        for batch in share:
            scoring.score(model, batch)
        parts += scoring.end()
    for name in ("seen", "values"):  # as a sum over replicas does
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    assert parts[0].outcomes().tolist() == pytest.approx(whole.outcomes().tolist(), rel=1e-6)


def test_items_with_the_same_examples_share_them(folder: Path, tokenizer: Any) -> None:
    def most_segments(name: str, *, suite: bool = False) -> int:
        data: Any = make(folder, name, tokenizer)
        if suite:
            data = SuiteData(test={"a": {"data": make(folder, "shots", tokenizer)}, "b": {"data": data}})
            data.attach(tokenizer, context_length=256)
        assert data.shares_prompts("test")
        batches = data.scoring_batches("test", shared_length=256)
        return max(int(batch["segments"].max()) for batch in batches if "segments" in batch)

    assert len(set(make(folder, "shots", tokenizer).groups("test") or ())) > 6
    assert make(folder, "plain", tokenizer).groups("test") is None
    assert make(folder, "first", tokenizer).groups("test") == (0,) * 12
    assert most_segments("first") > 3
    assert most_segments("first", suite=True) > 3


def test_examples_are_those_of_the_command_line(folder: Path, tokenizer: Any, model: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = make(folder, "plain", tokenizer, num_fewshot=3, max_test_items=5)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=255)
    results = simple_evaluate(
        harness,
        tasks=["plain"],
        num_fewshot=3,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert results is not None
    prompts = {sample["doc_id"]: sample["arguments"] for sample in samples_of(results, "plain")}
    assert len(data.items("test")) == 5
    for item in data.items("test"):  # a part of the documents has the examples that the whole has
        pairs = data.harness.pairs(item.content)
        assert list(pairs) == [tuple(pair) for pair in prompts[item.content.index]]
        assert pairs[0][0].count("Question:") == 4


def test_the_scores_to_search_by_are_those_of_choices(folder: Path, tokenizer: Any, model: Any, write: Any) -> None:
    data = make(folder, "plain", tokenizer)
    rows = [{"question": d["question"], "choices": d["choices"], "label": d["label"]} for d in documents(*range(12))]
    other = MultipleChoiceData(test=write("t.jsonl", rows), prompt="Question: {{question}}\nAnswer:")
    other.attach(tokenizer, context_length=256)
    ours, theirs = scored(data, model), scored(other, model)
    assert ours.score == theirs.score == "prob_per_token"
    expected = {key: float(value) for key, value in theirs.compute().items()}
    found = {key: float(value) for key, value in ours.compute().items()}
    assert found == pytest.approx(expected)
    assert make(folder, "last_word", tokenizer).scorer("test").score == "token_prob"
    assert make(folder, "own_results", tokenizer).scorer("test").score == "share"
    assert make(folder, "both", tokenizer).scorer("test").score == "acc"


def test_validation_and_test_are_the_splits_of_the_task(folder: Path, tokenizer: Any) -> None:
    data = make(folder, "own_shots", tokenizer, train="train")
    places = {split: {item.content.split for item in data.items(split)} for split in ("train", "validation", "test")}
    assert places == {"train": {"train"}, "validation": {"validation"}, "test": {"test"}}
    assert [len(data.items(split)) for split in ("train", "validation", "test")] == [12, 8, 12]
    assert any("draws its examples from the documents of 'test'" in note for note in data.notes)
    swapped = make(folder, "plain", tokenizer, validation="train", test="validation")
    assert [len(swapped.items(split)) for split in ("validation", "test")] == [12, 8]
    assert not swapped.has("train")


def test_one_split_is_shared_out_by_the_seed_and_that_is_said(folder: Path, tokenizer: Any) -> None:
    def shares(**options: Any) -> tuple[list[int], ...]:
        data = make(folder, "plain", tokenizer, {"test_split": None}, **options)
        assert any("5 of its 8 documents, by the seed, are validation" in note for note in data.notes)
        return tuple([item.content.index for item in data.items(split)] for split in ("validation", "test"))

    validation, test = shares(validation_items=5)
    assert sorted(validation + test) == list(range(8))
    assert len(validation) == 5
    assert shares(validation_items=5, seed=1) != (validation, test)
    whole = make(folder, "plain", tokenizer, {"test_split": None}, validation=None)
    assert len(whole.items("test")) == 8
    assert not whole.has("validation")
    assert whole.notes == ()
    with pytest.raises(DataError, match="cannot take 8 validation items off 8 documents"):
        make(folder, "plain", tokenizer, {"test_split": None}, validation_items=8).items("test")


def test_the_right_answer_is_trained_on_without_examples(folder: Path, tokenizer: Any) -> None:
    for name, text, learnt in (
        ("shots", "<s>Say 0.\n\nQuestion: one 20 two\nAnswer: zwölf Bäume", " zwölf Bäume"),
        ("last_word", "<s>one 20 two the dog 20", " the dog 20"),
        ("texts", "<s>one 20 two the dog 20", " the dog 20"),
    ):
        row = make(folder, name, tokenizer, train="train", batch_size=2).training_rows()[0]
        assert tokenizer.decode(row.tokens) == text
        assert tokenizer.decode(row.tokens[row.labelled]) == learnt


def test_in_a_suite_the_figures_are_the_same(folder: Path, tokenizer: Any, model: Any) -> None:
    alone = {name: scored(make(folder, name, tokenizer), model, "validation") for name in ("shots", "last_word")}
    tasks = {name: {"data": make(folder, name, tokenizer), "metric": "acc"} for name in alone}
    tasks["own_results"] = {"data": make(folder, "own_results", tokenizer, score="share"), "items": [3, 5]}
    suite = SuiteData(validation=tasks, test={"shots": {"data": make(folder, "shots", tokenizer)}})
    suite.attach(tokenizer, context_length=256)
    scorer = scored(suite, model, "validation")
    assert scorer.needs_greedy
    figures = {key: float(value) for key, value in scorer.compute().items()}
    for name, own in alone.items():
        expected = {f"{name}/{key}": float(value) for key, value in own.compute().items() if key != "score"}
        assert {key: figures[key] for key in expected if "exact" not in key} == pytest.approx(
            {key: value for key, value in expected.items() if "exact" not in key}, rel=1e-4
        )
        assert figures[f"{name}/score"] == figures[f"{name}/acc"]
    parts = [figures[f"{name}/score"] for name in tasks]
    assert figures["score"] == pytest.approx(sum(parts) / 3)
    suite.rung = 0
    assert len(scored(suite, model, "validation").outcomes()) == 8 + 8 + 3
    assert len(suite.items("test")) == 12
    suite.describe()


def test_the_same_documents_are_not_trained_on(folder: Path, tokenizer: Any, write: Any) -> None:
    source = MultipleChoiceData(write("s.jsonl", documents(*range(8, 16))))
    suite = SuiteData(
        [{"data": source}],
        validation={"plain": {"data": make(folder, "plain", tokenizer)}},
        test={"plain": {"data": make(folder, "plain", tokenizer)}},
    )
    suite.attach(tokenizer, context_length=256)
    with pytest.raises(DataError, match="every row is also in the validation data"):
        suite.items("train")
    assert "4 of 8 rows of train[0] are also in test: dropped" in suite._splits.notes


def test_data_are_told_apart_by_what_decides_prompts(folder: Path, tokenizer: Any) -> None:
    def seen(name: str = "shots", config: Any = None, **options: Any) -> str:
        return make(folder, name, tokenizer, config, **options).fingerprint()

    assert seen() == seen()
    others = [
        seen(fewshot_seed=3),
        seen(num_fewshot=1),
        seen(score="acc"),
        seen("plain"),
        seen(config={"description": "x"}),
    ]
    assert len({seen(), *others}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ""}, "task must be the name of one lm-eval task"),
        ({"task": "a", "num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"task": "a", "validation": "test", "test": "test"}, "must be different splits"),
        ({"task": "a", "rename": {"a": "b"}}, "`rename` does not apply"),
        ({"task": "a", "train": None, "validation": None, "test": None}, "no data"),
        ({"task": "a", "fewshot_as_multiturn": True}, "fewshot_as_multiturn is of chats"),
        ({"task": "a", "score": ""}, "score must be the name of a figure"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LmEvalData(**options)


def test_what_the_task_does_not_have_is_refused_before_anything_is_scored(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no figure 'f1' that is a mean over items; it has acc, acc_norm, prob"):
        make(folder, "plain", tokenizer, score="f1").scoring_rows("test")
    with pytest.raises(DataError, match=r"no split 'dev'; they have train, validation, test"):
        make(folder, "plain", tokenizer, test="dev").items("test")
    with pytest.raises(DataError, match=r"plain \[test\], row 1: the label is 3, which is none of the 3 choices"):
        make(folder, "plain", tokenizer, {"doc_to_target": "{{label * 3}}"}).scoring_rows("test")
    with pytest.raises(DataError, match="task plain of lm-eval cannot be loaded: IndexError"):
        make(folder, "plain", tokenizer, {"doc_to_target": "{{label + 3}}"}).scoring_rows("test")
    with pytest.raises(DataError, match="cannot draw 13 examples"):
        make(folder, "plain", tokenizer, num_fewshot=13).scoring_rows("test")
    with pytest.raises(DataError, match=r"row 1: task plain cannot make its requests: ZeroDivisionError"):
        make(folder, "plain", tokenizer, {"doc_to_text": "{{1 / (label - 1)}}"}).scoring_rows("validation")
    rolling = {"output_type": "loglikelihood_rolling", "metric_list": None}
    sampled = {"generation_kwargs": {"do_sample": True, "temperature": 0.7}}
    with pytest.raises(DataError, match="asks for more than the likeliest text"):
        make(folder, "texts", tokenizer, sampled).items("test")
    with pytest.raises(DataError, match=r"generates up to 300 tokens, which leaves no room for prompts within .* 256"):
        make(folder, "texts", tokenizer, {"generation_kwargs": {"max_gen_toks": 300}}).scoring_rows("test")
    with pytest.raises(
        DataError, match="output_type loglikelihood_rolling; only multiple_choice, loglikelihood, generate_until"
    ):
        make(folder, "last_word", tokenizer, rolling).items("test")
    with pytest.raises(DataError, match="says num_fewshot: 0, which lm-eval keeps"):
        make(folder, "plain", tokenizer, {"num_fewshot": 0}, num_fewshot=2).items("test")
    with pytest.raises(DataError, match=r"validation\.a: LmEvalData shows its task's own .* `num_fewshot`"):
        SuiteData(validation={"a": {"data": LmEvalData("plain"), "shots": 2}})


def test_a_metric_that_the_task_does_not_have_is_refused_before_training(folder: Path, tokenizer: Any) -> None:
    def suite(**options: Any) -> SuiteData:
        made = SuiteData(validation={"a": {"data": make(folder, "filtered", tokenizer, **options)}})
        made.attach(tokenizer, context_length=256)
        return made

    assert suite(score="exact_match,second").tasks["validation"]["a"].figure == "exact_match,second"
    suite(score="exact_match,second").setup("validate")
    suite(score="exact_match").setup("validate")
    data = SuiteData(validation={"a": {"data": make(folder, "filtered", tokenizer), "metric": "acc"}})
    data.attach(tokenizer, context_length=256)
    with pytest.raises(
        DataError, match=r"validation\.a: task filtered has no figure 'acc' .* exact_match,first, exact_"
    ):
        data.setup("validate")


def test_a_group_of_tasks_is_refused_by_its_tasks(folder: Path, tokenizer: Any) -> None:
    for name in ("plain", "shots"):
        write_tasks(folder, name)
    (folder / "group.yaml").write_text("group: all\ntask: [plain, shots]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"all is a group of lm-eval tasks; .* plain, shots"):
        LmEvalData("all", task_folders=[str(folder)]).items("test")


def arithmetic(folder: Path) -> dict[str, str]:
    """Rows of the fields that lm-eval's GSM8K asks for, in files by split."""
    found = {}
    for split, numbers in (("train", range(6)), ("test", range(6, 10))):
        rows = [
            {"question": f"What is {n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1}"} for n in numbers
        ]
        path = folder / f"{split}_rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[split] = str(path)
    return found


def test_a_task_of_lm_eval_has_the_rows_of_files_in_the_place_of_its_data_set(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_task, "_with_defaults", None)  # found without reading all tasks
    data = LmEvalData("gsm8k", data_files=arithmetic(folder), num_fewshot=0, validation="train", max_gen_toks=7)
    data.attach(tokenizer, context_length=256)
    (first, *_) = data.items("test")
    assert data.harness.prompt(first.content) == "Question: What is 6 and 1?\nAnswer:"
    assert (len(data.items("validation")), len(data.items("test"))) == (6, 4)
    assert {row.generates for row in data.scoring_rows("test")} == {7}
    assert data.harness.text_figures == ("exact_match,strict-match", "exact_match,flexible-extract")
    assert data.harness.text_values(first.content, " 6 and 1 make 7.") == [0.0, 1.0]
    assert data.harness.text_values(first.content, " So it is\n#### 7") == [1.0, 1.0]


def test_tokens_of_a_text_are_a_part_of_what_the_data_are(folder: Path, tokenizer: Any) -> None:
    one, other = (make(folder, "filtered", tokenizer, max_gen_toks=size) for size in (None, 5))
    assert one.fingerprint() != other.fingerprint()
    assert {row.generates for row in other.scoring_rows("test")} == {5}


def test_missing_files_of_rows_are_named(tmp_path: Path) -> None:
    data = LmEvalData("gsm8k", data_files={"test": "nowhere.jsonl"})
    with pytest.raises(DataError, match=r"data_files of task gsm8k: there is no file nowhere\.jsonl"):
        data.items("test")
    with pytest.raises(DataError, match="max_gen_toks must be at least 1"):
        LmEvalData("gsm8k", max_gen_toks=0)
