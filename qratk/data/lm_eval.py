"""lm-eval on a model in memory, and multiple choice data as an lm-eval task."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.core.errors import DataError
from qratk.core.logs import only_errors
from qratk.data.lm_eval_task import FEWSHOT_SEED, leaves, load_tasks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qratk.data.choices import ChoiceData, Choices
    from qratk.data.splits import Item, Split
    from qratk.data.task import ShotStyle


def evaluate_lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folders: Sequence[str | Path] = (),
    batch_size: int = 8,
    limit: int | None = None,
    device: str | None = None,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of each task, as in {"arc_easy": {"acc": 0.31, "acc_norm": 0.29}}, measured by lm-eval.

    `tasks` are names of lm-eval's own tasks or of tasks in `task_folders`; its own are only read (20 s) when a name is
    in no folder. Prompts go through the tokenizer's chat template if asked for, examples then as earlier turns, unless
    that is set false. The model stays where it is (`device` moves it there and back), and in the mode it was in. Raises
    DataError for an unknown task or a missing folder.
    """
    results = run_lm_eval(
        model, tokenizer, tasks, task_folders=task_folders, batch_size=batch_size, limit=limit, device=device,
        max_length=max_length, apply_chat_template=apply_chat_template, fewshot_as_multiturn=fewshot_as_multiturn,
    )  # fmt: skip
    return {name: _figures(values) for name, values in results["results"].items()}


def run_lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folders: Sequence[str | Path] = (),
    batch_size: int = 8,
    limit: int | None = None,
    device: str | None = None,
    max_length: int | None = None,
    log_samples: bool = False,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns, with each item under "samples" if asked for; see `evaluate_lm_eval`.

    Examples are drawn by the seed of lm-eval's command line.
    """
    if fewshot_as_multiturn and not apply_chat_template:
        raise DataError("fewshot_as_multiturn is of chats: set apply_chat_template too, or leave it out")
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError("apply_chat_template is set, but the tokenizer has no chat template: leave it out")
    task_dict = load_tasks(tasks, task_folders)
    for _, task in leaves(task_dict):
        task.set_fewshot_seed(FEWSHOT_SEED)
    # Where groups know the groups in them, lm-eval takes the tasks of all of these side by side.
    task_dict = {
        key: dict(leaves(value)) if isinstance(value, Mapping) and hasattr(key, "get_all_tasks") else value
        for key, value in task_dict.items()
    }
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _placed(model, device), only_errors("lm_eval"):  # it warns that a model in memory is one
        harness = _harness(HFLM, tokenizer, model)(
            pretrained=_view(model),
            tokenizer=copy.deepcopy(tokenizer),  # a padding token is set on it
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",  # its default is the model's type: in bfloat16 choices would tie
        )
        results: dict[str, Any] | None = evaluate(
            harness, task_dict, limit=limit, bootstrap_iters=0, log_samples=log_samples,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn,
        )  # fmt: skip
    if results is None:  # on other ranks than the first
        raise DataError("lm-eval returned no results: call it on the first process only")
    return results


def _harness(kind: Any, tokenizer: Any, model: nn.Module) -> Any:
    """lm-eval's `HFLM`, of texts without what the tokenizer puts behind them: it would stand before continuations.

    Where generation is greedy, rows leave the batch when they are done; texts are the same.
    """
    from qratk.data.encoding import affixes, without_end

    behind = affixes(tokenizer)[1]

    class Harness(kind):  # type: ignore[misc]
        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, add_special_tokens, **options)
            return ids if add_special_tokens is False or not behind else without_end(ids, behind)

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            import torch

            from qratk.data.generation import StopSequences, asks_for_greedy, end_ids, generate, plain_greedy

            if not (asks_for_greedy(options) and plain_greedy(model)):
                made: Tensor = super()._model_generate(context=context, max_length=max_length, stop=stop, **options)
                return made
            stops = StopSequences(self.tokenizer, stop)
            rows = generate(
                model, context, options["attention_mask"], most=max_length - context.shape[1], ends=end_ids(model),
                stopped=lambda _, tokens: stops(tokens),
            )  # fmt: skip
            width = max(map(len, rows))
            pad = self.tokenizer.pad_token_id
            filled = [row + [pad] * (width - len(row)) for row in rows]
            return torch.cat([context, context.new_tensor(filled)], 1)

    return Harness


def _view(model: nn.Module) -> Any:
    """The model as lm-eval wants it, but deaf to `tie_weights`, which could rewrite tensors of the bank."""
    from torch import nn

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.viewed = model

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "viewed" else getattr(self.viewed, name)

        @property
        def device(self) -> Any:
            return next(self.viewed.parameters()).device

        def tie_weights(self) -> None:
            """Nothing: the weights are as they should be."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.viewed(*args, **kwargs)

    return View()


@contextmanager
def _placed(model: nn.Module, device: str | None) -> Iterator[None]:
    training = {name: module.training for name, module in model.named_modules()}
    before = next(model.parameters()).device
    if device is not None:
        model.to(device)
    try:
        yield
    finally:
        if device is not None:
            model.to(before)
        for name, module in model.named_modules():
            module.training = training[name]


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    numbers = {name: value for name, value in numbers.items() if name != "sample_len" and "_stderr" not in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def write_task(
    directory: str | Path,
    name: str,
    data: ChoiceData,
    *,
    split: Split = "test",
    metrics: Sequence[str] = ("acc", "acc_norm"),
    examples: Sequence[Item] = (),
    style: ShotStyle | None = None,
) -> Path:
    """Path of the task's YAML file; `evaluate_lm_eval(..., [name], task_folders=[directory])` then scores these items.

    The items of a split are written beside it, prompts rendered, so that lm-eval sees the very texts that `data` does.
    lm-eval shows the `examples` before each item by its own means: all of them, in their order, in this style. What
    items already have before them is not written.
    """
    import yaml

    from qratk.data.task import ShotStyle

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    rows_path = (folder / f"{name}.jsonl").resolve()
    _write_documents(rows_path, data, data.items(split))
    files = {"test": str(rows_path)}
    if examples:
        files["shots"] = str(rows_path.with_name(f"{name}.shots.jsonl"))
        _write_documents(Path(files["shots"]), data, examples)
    style = style or ShotStyle()
    shown = {
        "num_fewshot": len(examples),
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "description": style.description,
        "fewshot_delimiter": style.delimiter,
    }
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "label" if data.substitutes else "prompt",
        "doc_to_target": "rest" if data.substitutes else "label",
        "doc_to_choice": "choices",
        "target_delimiter": data.target_delimiter,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": 1.0},
        **(shown if examples else {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return path


def _write_documents(path: Path, data: ChoiceData, items: Sequence[Item]) -> None:
    rows = [_document(data.choices(replace(item, before=None)), data) for item in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _document(choices: Choices, data: ChoiceData) -> dict[str, Any]:
    context, continuation = choices.pairs[0]
    text = {"rest": continuation.removeprefix(data.target_delimiter)} if data.substitutes else {"prompt": context}
    return {**text, "choices": list(choices.texts), "label": choices.label}
