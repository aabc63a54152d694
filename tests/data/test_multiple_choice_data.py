from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qratk.core import DataError
from qratk.data import MultipleChoiceData, evaluate_lm_eval, write_task
from qratk.data.lm_eval import run_lm_eval

Write = Callable[[str, list[Any]], str]

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "red",
    "green blue",
    "yes",
    "no",
    "maybe",
    "seven",
]


def make_rows(kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Random rows: choices of one to five words, contexts and questions there or not."""
    rng = np.random.default_rng(11)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for index in range(count):
        choices = [words(1, 6) + ("\u00e9" if index % 5 == 0 else "") for _ in range(2 + index % 3)]
        row: dict[str, Any] = {
            "id": str(index),
            "context": words(2, 9),
            "question": words(2, 6) + "?",
            "choices": choices,
        }
        row["label"] = int(rng.integers(len(choices)))
        if kind == "no_context" or (kind == "mixed" and index % 3 == 0):
            row["context"] = ""
        if kind == "no_question" or (kind == "mixed" and index % 2 == 0):
            row["question"] = ""
        if kind == "nothing":
            row["context"] = row["question"] = ""
        if kind == "blank":
            row["context"], row["question"] = "", f"{words(2, 5)} _ {words(2, 5)}."
        if kind == "begun" and index % 2:
            row["context"] = "<s>" + row["context"]
        if kind == "spaces":
            row["question"] += "  \n"
        rows.append(row)
    return rows


def make(write: Write, tokenizer: Any, rows: list[Any], **options: Any) -> MultipleChoiceData:
    data = MultipleChoiceData(test=write("test.jsonl", rows), eval_batch_size=7, **options)
    data.attach(tokenizer)
    return data


def assert_equal_to_lm_eval(data: Any, model: Any, tokenizer: Any, folder: Path, scorer: Any) -> None:
    write_task(folder, "same_items", data)
    results = run_lm_eval(
        model, tokenizer, ["same_items"], task_folders=[folder], batch_size=5, log_samples=True,
        max_length=data.max_length - 1,
    )  # fmt: skip
    samples = sorted(results["samples"]["same_items"], key=lambda sample: sample["doc_id"])
    theirs = [value[0] for sample in samples for value in sample["filtered_resps"]]
    np.testing.assert_allclose(scorer.log_likelihood.numpy(), theirs, rtol=2e-5, atol=2e-5)
    figures = scorer.compute()
    for metric in ("acc", "acc_norm"):
        scorer.score = metric
        assert scorer.outcomes().tolist() == [sample[metric] for sample in samples]
        assert float(figures[metric]) == pytest.approx(results["results"]["same_items"][f"{metric},none"], abs=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("kind", ["full", "no_context", "no_question", "mixed", "nothing", "blank", "spaces", "begun"])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("shared_length", [0, 40, 256])
def test_figures_equal_lm_eval_item_by_item(
    kind: str,
    begin: bool,
    shared_length: int,
    write: Write,
    tokenizer: Any,
    bare_tokenizer: Any,
    model: Any,
    scored: Any,
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer if begin else bare_tokenizer
    data = make(write, tokenizer, make_rows(kind))
    assert data.substitutes == (kind == "blank")
    scorer = scored(data, model, shared_length=shared_length)
    assert_equal_to_lm_eval(data, model, tokenizer, tmp_path / "tasks", scorer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
def test_a_tokenizer_that_ends_texts_gives_the_figures_of_one_that_does_not(
    write: Write, tokenizer: Any, ending_tokenizer: Any, model: Any, scored: Any, tmp_path: Path
) -> None:
    data = make(write, ending_tokenizer, make_rows("mixed"))
    scorer = scored(data, model)
    other = scored(make(write, tokenizer, make_rows("mixed")), model)
    assert scorer.log_likelihood.tolist() == other.log_likelihood.tolist()
    assert_equal_to_lm_eval(data, model, ending_tokenizer, tmp_path / "tasks", scorer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
def test_rows_that_are_cut_still_equal_lm_eval(
    write: Write, tokenizer: Any, model: Any, scored: Any, tmp_path: Path
) -> None:
    data = make(write, tokenizer, make_rows("full"), max_length=24)
    assert data.describe()["test"]["truncated"] > 0
    assert_equal_to_lm_eval(data, model, tokenizer, tmp_path / "tasks", scored(data, model, shared_length=256))


def test_log_likelihoods_equal_a_plain_computation(write: Write, tokenizer: Any, model: Any, scored: Any) -> None:
    rows = make_rows("full", 6)
    data = make(write, tokenizer, rows)
    scorer = scored(data, model)
    expected = []
    for row in rows:
        for choice in row["choices"]:
            context = tokenizer.encode(f"{row['context']}\n{row['question']}")
            ids = torch.tensor([tokenizer.encode(f"{row['context']}\n{row['question']} {choice}")])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            expected.append(sum(float(log_p[k - 1, ids[0, k]]) for k in range(len(context), ids.shape[1])))
    np.testing.assert_allclose(scorer.log_likelihood.numpy(), expected, rtol=1e-5)


def test_of_a_choice_longer_than_the_model_can_see_the_end_is_scored(write: Write, tokenizer: Any) -> None:
    rows = [{"question": "Sky?", "choices": ["blue", "red " * 30 + "green"], "label": 0}]
    data = make(write, tokenizer, rows, max_length=16)
    short, long = data.scoring_rows("test")
    assert not short.truncated
    assert long.truncated
    assert len(long.tokens) == 16
    assert long.labelled.tolist() == [False] + [True] * 15
    assert tokenizer.decode(long.tokens).endswith("red green")


def test_training_learns_the_right_choice_only(write: Write, tokenizer: Any) -> None:
    rows = make_rows("full", 10)
    data = MultipleChoiceData(write("train.jsonl", rows), validation=write("v.jsonl", make_rows("nothing", 2)))
    data.attach(tokenizer)
    texts = [tokenizer.decode(row.tokens[row.labelled]) for row in data.training_rows()]
    assert texts == [f" {row['choices'][row['label']]}" for row in rows]
    whole = tokenizer.decode(data.training_rows()[0].tokens)
    assert whole == f"<s>{rows[0]['context']}\n{rows[0]['question']} {rows[0]['choices'][rows[0]['label']]}"


def test_training_on_blanks_learns_the_rest_of_the_sentence(write: Write, tokenizer: Any) -> None:
    row = {"question": "The dog is bigger than _ the fox.", "choices": ["one", "two"], "label": 1}
    data = MultipleChoiceData(write("train.jsonl", [row]), validation=write("v.jsonl", [{**row, "label": 0}]))
    data.attach(tokenizer)
    (encoded,) = data.training_rows()
    assert tokenizer.decode(encoded.tokens) == "<s>The dog is bigger than two the fox."
    assert tokenizer.decode(encoded.tokens[encoded.labelled]) == " the fox."


def test_a_blank_is_only_filled_when_every_row_has_one(write: Write, tokenizer: Any) -> None:
    rows = make_rows("blank", 4) + make_rows("full", 1)
    assert not make(write, tokenizer, rows).substitutes
    with pytest.raises(DataError, match=r"line 5: there is no blank"):
        make(write, tokenizer, rows, blank="substitute").scoring_rows("test")


def test_the_prompt_is_a_template_over_the_fields_of_the_row(write: Write, tokenizer: Any) -> None:
    rows = [{"question": "Sky?", "subject": "colour", "choices": ["red", "blue"], "label": 1}]
    data = make(write, tokenizer, rows, prompt="{{subject}}: {{question}}\nAnswer:")
    assert tokenizer.decode(data.scoring_rows("test")[1].tokens) == "<s>colour: Sky?\nAnswer: blue"


def test_choices_with_labels_of_their_own_are_taken_as_the_hub_has_them(write: Write, tokenizer: Any) -> None:
    row = {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"}
    data = make(write, tokenizer, [row], rename={"label": "answerKey"})
    assert data.items("test")[0].content == ("Sky?", ("red", "blue"), 1)
    with pytest.raises(DataError, match=r"line 1: the row needs `label`, one of .*\['1', '2'\]; got 'B'"):
        make(write, tokenizer, [{**row, "answerKey": "B"}], rename={"label": "answerKey"}).items("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["one"]}, "line 2: the row needs `choices`"),
        ({"choices": ["one", ""]}, "line 2: the row has a choice that is empty"),
        ({"label": 2}, "line 2: the row needs `label`, an index from 0 to 1; got 2"),
        ({"label": "A"}, "line 2: the row needs `label`"),
        ({"label": True}, "line 2: the row needs `label`"),
        ({"context": 4}, "line 2: the row needs a text field 'context'"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(write: Write, tokenizer: Any, change: Any, message: str) -> None:
    row = {"context": "a", "question": "b", "choices": ["one", "two"], "label": 0}
    with pytest.raises(DataError, match=message):
        make(write, tokenizer, [row, {**row, **change}]).items("test")


def test_a_template_that_names_a_missing_field_is_reported(write: Write, tokenizer: Any) -> None:
    rows = [{"question": "b", "choices": ["one", "two"], "label": 0}]
    with pytest.raises(DataError, match=r"line 1: the row does not fit the prompt template: 'subject'"):
        make(write, tokenizer, rows, prompt="{{subject}}").items("test")
    with pytest.raises(DataError, match="not a Jinja template"):
        make(write, tokenizer, rows, prompt="{{subject").items("test")


def test_an_empty_prompt_needs_a_token_to_begin_with(write: Write, bare_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(bare_tokenizer)
    tokenizer.eos_token = None
    data = make(write, tokenizer, make_rows("nothing", 2))
    with pytest.raises(DataError, match="neither a beginning nor an end"):
        data.scoring_rows("test")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
class TestLmEval:
    def test_missing_folders_and_unknown_tasks_are_named(self, model: Any, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no task folder"):
            evaluate_lm_eval(model, tokenizer, ["x"], task_folders=[tmp_path / "nowhere"])
        with pytest.raises(DataError, match="list of task names"):
            evaluate_lm_eval(model, tokenizer, "arc_easy")

    def test_unknown_tasks_are_reported_with_the_nearest(
        self, model: Any, tokenizer: Any, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import lm_eval.tasks

        class LocalOnly(lm_eval.tasks.TaskManager):  # reading lm-eval's own tasks takes 20 s
            def __init__(self, include_path: Any, include_defaults: bool) -> None:
                super().__init__(include_path=include_path, include_defaults=False)

        monkeypatch.setattr(lm_eval.tasks, "TaskManager", LocalOnly)
        write_task(tmp_path / "t", "fox_questions", make(write, tokenizer, make_rows("full", 3)))
        with pytest.raises(DataError, match=r"no lm-eval task 'fox_question'.*near are fox_questions"):
            evaluate_lm_eval(model, tokenizer, ["fox_question"], task_folders=[tmp_path / "t"])

    @pytest.mark.usefixtures("datasets_cache")
    def test_the_model_and_the_tokenizer_are_left_as_they_were(
        self, model: Any, bare_tokenizer: Any, write: Write, tmp_path: Path
    ) -> None:
        write_task(tmp_path / "t", "fox_questions", make(write, bare_tokenizer, make_rows("full", 3)))
        model.train()
        model.model.norm.eval()
        try:
            figures = evaluate_lm_eval(model, bare_tokenizer, ["fox_questions"], task_folders=[tmp_path / "t"], limit=2)
            assert model.training
            assert not model.model.norm.training
        finally:
            model.eval()
        assert bare_tokenizer.pad_token is None
        assert set(figures) == {"fox_questions"}
        assert set(figures["fox_questions"]) == {"acc", "acc_norm"}

    @pytest.mark.usefixtures("datasets_cache")
    def test_tasks_that_generate_text_run_too(self, model: Any, tokenizer: Any, write: Write, tmp_path: Path) -> None:
        rows = write("rows.jsonl", [{"q": "The dog", "a": " barks"}, {"q": "The fox", "a": " jumps"}])
        (tmp_path / "generates.yaml").write_text(
            "task: generates\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
            f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
            "doc_to_text: q\ndoc_to_target: a\n"
            "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
            encoding="utf-8",
        )
        figures = evaluate_lm_eval(model, tokenizer, ["generates"], task_folders=[tmp_path])
        assert figures["generates"]["exact_match"] in (0.0, 0.5, 1.0)

    @pytest.mark.usefixtures("datasets_cache")
    def test_a_peft_model_scores_as_its_merged_self(
        self, model: Any, tokenizer: Any, write: Write, tmp_path: Path
    ) -> None:
        import copy

        from peft import LoraConfig, get_peft_model

        write_task(tmp_path / "t", "fox_questions", make(write, tokenizer, make_rows("full", 12)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            adapted = get_peft_model(copy.deepcopy(model), config)
        options: Any = {"tasks": ["fox_questions"], "task_folders": [tmp_path / "t"]}
        before = evaluate_lm_eval(adapted, tokenizer, **options)
        assert before == evaluate_lm_eval(adapted.merge_and_unload(), tokenizer, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["trec", "arc_easy", "winogrande"])
def test_figures_equal_lm_eval_on_real_items(name: str, shared: Path, scored: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    test = str(shared / "datasets" / name / "test.jsonl")
    data = MultipleChoiceData(test=test, max_test_items=100, eval_batch_size=32)
    data.attach(tokenizer)
    scorer = scored(data, model, shared_length=512)
    assert any("segments" in batch for batch in data.scoring_batches("test", shared_length=512))
    assert_equal_to_lm_eval(data, model, tokenizer, tmp_path / "tasks", scorer)
