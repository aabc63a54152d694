"""A task of lm-eval as it stands there: its documents, the requests that it makes of them, and its metrics."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import yaml

from qratk.core.errors import DataError
from qratk.data.generation import asks_for_greedy
from qratk.data.splits import Split

if TYPE_CHECKING:
    from qratk.data.splits import Item

FEWSHOT_SEED: Final = 1234
"""Of lm-eval's command line, by which it draws examples."""

_SCORED: Final = ("multiple_choice", "loglikelihood", "generate_until")
_MOST_TOKENS: Final = 256  # of a text, where the task does not say: lm-eval's default
_TEXTS: Final = ("doc_to_text", "doc_to_choice", "doc_to_target")
_DECIDING: Final = (
    "output_type", *_TEXTS, "description", "target_delimiter", "fewshot_delimiter", "gen_prefix", "use_prompt",
    "fewshot_config", "process_docs", "process_results", "metric_list", "filter_list", "generation_kwargs",
)  # fmt: skip


def load_tasks(
    names: Sequence[str],
    folders: Sequence[str | Path] = (),
    *,
    data_files: Mapping[str, str | Sequence[str]] | None = None,
) -> dict[Any, Any]:
    """Tasks of lm-eval by name, its own or those in folders; a group's value holds its tasks.

    `data_files` are files of rows by split, in place of the data set that the tasks name. Its own tasks are only looked
    for when a name is in no folder: by the files that name them, or else among all of them (20 s, once). Raises
    DataError for an unknown task, a missing folder, or data that cannot be loaded.
    """
    if isinstance(names, str) or not names:
        raise DataError(f"tasks must be a list of task names, got {names!r}")
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(f"there is no task folder {folder}; paths are relative to {Path.cwd()}")
    from lm_eval.tasks import TaskManager, get_task_dict

    paths = tuple(str(folder) for folder in folders)
    manager = TaskManager(include_path=list(paths), include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = _with_own(tuple(names), paths, TaskManager)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise DataError(
                f"there is no lm-eval task {name!r}, neither among lm-eval's own nor in "
                f"{list(paths) or 'a task folder'}" + (f"; near are {', '.join(near)}" if near else "")
            )
    try:
        tasks: dict[Any, Any] = _loaded(names, manager, data_files, get_task_dict)
    except DataError:
        raise
    except Exception as error:  # of data sets, templates, and functions of a task, which are tried on a document
        named = f"task{'s' * (len(names) > 1)} {', '.join(names)}"
        raise DataError(f"{named} of lm-eval cannot be loaded: {type(error).__name__}: {error}") from error
    return tasks


def _loaded(
    names: Sequence[str], manager: Any, data_files: Mapping[str, str | Sequence[str]] | None, load: Callable[..., Any]
) -> dict[Any, Any]:
    """Tasks of a manager, with rows of files in place of their own where there are any."""
    if not data_files:
        return dict(load(list(names), manager))
    files = {
        split: given if isinstance(given, str) else [str(path) for path in given] for split, given in data_files.items()
    }
    with TemporaryDirectory() as folder:
        for name in names:
            if name not in manager.all_subtasks:
                raise DataError(
                    f"data_files are rows of one task, and {name} is a group: give each of its tasks its own"
                )
            over = {
                "include": str(manager.task_index[name].yaml_path),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
            }
            Path(folder, f"{name}.yaml").write_text(yaml.safe_dump(over), encoding="utf-8")
        return dict(load(list(names), type(manager)(include_path=folder, include_defaults=False)))


def _with_own(names: tuple[str, ...], paths: tuple[str, ...], manager: Callable[..., Any]) -> Any:
    """A manager of folders and of lm-eval's own tasks: of those of these names, or of all where some are not found so,
    as groups are not."""
    folders = _own_folders(names)
    found = manager(include_path=[*folders, *paths], include_defaults=False)
    missing = any(name not in found.all_tasks for name in names)
    return _with_defaults(paths, manager) if missing else found


@lru_cache(maxsize=64)
def _own_folders(names: tuple[str, ...]) -> tuple[str, ...]:
    """Folders of lm-eval's own tasks of these names, each by the one file that says so; reading all 14,000 files as
    YAML would take ten times as long."""
    import lm_eval.tasks

    line = re.compile(rf"^task:[ \t]*[\"']?({'|'.join(map(re.escape, names))})[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
    found: dict[str, list[Path]] = {}
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        for name in line.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, []).append(path)
    return tuple(sorted({str(paths[0].parent) for paths in found.values() if len(paths) == 1}))


@lru_cache(maxsize=4)
def _with_defaults(paths: tuple[str, ...], manager: Callable[..., Any]) -> Any:
    return manager(include_path=list(paths), include_defaults=True)


class ChatPrompt:
    """A tokenizer's chat template as lm-eval's `hf` backend puts prompts through it: with the generation prompt behind,
    or the task's `gen_prefix` as the answer's beginning, and without the system's message where the template has none.

    Args:
        tokenizer: that has a chat template. Raises DataError where there is none.
        multiturn: whether examples are earlier turns, or part of the one message of the user.
    """

    def __init__(self, tokenizer: Any, *, multiturn: bool) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("apply_chat_template is set, but the tokenizer has no chat template: leave it out")
        self._tokenizer, self.multiturn = tokenizer, multiturn

    def __call__(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages."""
        from jinja2 import TemplateError

        def apply(given: list[dict[str, str]]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
            return text

        try:
            return apply(messages)
        except TemplateError:
            return apply([message for message in messages if message["role"] != "system"])


@dataclass(frozen=True, eq=False)
class Document:
    """A document of a task: where it stands in a split of the task's data set, its fields, and the task."""

    split: str
    index: int
    fields: dict[str, Any]
    task: HarnessTask


class HarnessTask:
    """One task of lm-eval, whose documents are scored by log-likelihoods or by the text that a model goes on with.

    Prompts are the task's own, with as many examples as it says, or `num_fewshot`, drawn by its own sampler: the
    documents that lm-eval itself evaluates have the very examples that they have in a whole run of it with that seed,
    and in one with a `limit`. Raises DataError for what is no such task, and where documents do not fit its templates.
    """

    def __init__(
        self,
        name: str,
        task: Any,
        *,
        num_fewshot: int | None = None,
        seed: int = FEWSHOT_SEED,
        max_gen_toks: int | None = None,
    ) -> None:
        """`task` is lm-eval's object; `max_gen_toks` are tokens of a text at most, by default what the task says."""
        self.name, self.seed = name, seed
        self._task = _checked(name, task)
        self._dataset: Mapping[str, Any] = self._task.dataset
        self.shots = self._number_of_shots(num_fewshot)
        self._sampler = getattr(self._task, "sampler", None)
        self._documents: dict[str, list[Document]] = {}
        self._drawn_examples: dict[str, list[Sequence[Any]]] = {}
        self._remember_texts()
        if self.generates:
            self.until, most = self._generation()
            self.most_tokens = most if max_gen_toks is None else max_gen_toks

    def _number_of_shots(self, asked: int | None) -> int:
        own = self._task.config.num_fewshot
        if asked is not None and own == 0 and asked > 0:
            raise DataError(f"task {self.name} says num_fewshot: 0, which lm-eval keeps; leave num_fewshot out")
        return int((own or 0) if asked is None else asked)

    def _remember_texts(self) -> None:
        """Have the task render a document's own fields once: metrics ask for them at every scoring."""
        for name in _TEXTS:
            setattr(self._task, name, _remembered(getattr(self._task, name)))

    @property
    def output_type(self) -> str:
        """What the task asks of a model: multiple_choice, loglikelihood or generate_until."""
        return str(self._task.OUTPUT_TYPE)

    @property
    def generates(self) -> bool:
        """Whether a model has to go on from prompts."""
        return self.output_type == "generate_until"

    @property
    def own_results(self) -> bool:
        """Whether the task makes results of an item by a function of its own."""
        return callable(self._task.config.process_results)

    # Documents

    def own_split(self, split: Split) -> str | None:
        """Name that the task gives to its training, validation or test split; None where it has none."""
        config = self._task.config
        found: str | None = {
            "train": config.training_split,
            "validation": config.validation_split,
            "test": config.test_split,
        }[split]
        return found

    @property
    def evaluated_split(self) -> str:
        """Name of the split that lm-eval evaluates: test, or else validation."""
        return self.own_split("test") or self.own_split("validation") or ""

    def documents(self, split: str) -> list[Document]:
        """Documents of a split of the data set, as the task processes them, in their order."""
        if split not in self._documents:
            try:
                raw = self._dataset[split]
            except (KeyError, TypeError):
                known = ", ".join(map(str, self._dataset)) if isinstance(self._dataset, Mapping) else "none"
                raise DataError(f"the data of task {self.name} have no split {split!r}; they have {known}") from None
            process = self._task.config.process_docs
            fields = raw if process is None else process(raw)
            self._documents[split] = [Document(split, index, doc, self) for index, doc in enumerate(fields)]
        return self._documents[split]

    def where(self, document: Document) -> str:
        """Where a document stands, for people."""
        return f"{self.name} [{document.split}], row {document.index}"

    # Requests

    def pairs(
        self, document: Document, *, shots: bool = True, chat: ChatPrompt | None = None
    ) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of each request that lm-eval would make of a document, through a chat template if
        there is one.

        Of choices these are one each, and, where mutual information is a metric, one each again without a context.
        """
        return tuple((str(one.args[0]), str(one.args[1])) for one in self._requests(document, shots, chat))

    def prompt(self, document: Document, *, shots: bool = True, chat: ChatPrompt | None = None) -> str:
        """What a model has to go on from."""
        return str(self._requests(document, shots, chat)[0].args[0])

    def _requests(self, document: Document, shots: bool, chat: ChatPrompt | None) -> list[Any]:
        examples = self.examples(document) if shots else ()
        task, doc = self._task, document.fields
        with self._making(document):
            task.sampler = _Given(examples)
            context = task.fewshot_context(
                doc,
                num_fewshot=len(examples),
                system_instruction=None,
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=chat is not None and chat.multiturn,
                chat_template=chat,
                gen_prefix=task.doc_to_prefix(doc),
            )
            made = task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(self.name, document.index, 1),
                apply_chat_template=chat is not None,
                chat_template=chat,
            )
        return list(made) if isinstance(made, list) else [made]

    def choices(self, document: Document) -> list[str]:
        """Texts of a document's choices, by which lm-eval measures them."""
        with self._making(document):
            return [str(choice) for choice in self._task.doc_to_choice(document.fields)]

    def right(self, document: Document) -> tuple[int, ...]:
        """Indices of the right choices. Raises DataError where the document has none."""
        task, doc, choices = self._task, document.fields, self.choices(document)
        with self._making(document):
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        found = [choices.index(one) if one in choices else one for one in (gold if isinstance(gold, list) else [gold])]
        if not found or not all(isinstance(one, int) and 0 <= one < len(choices) for one in found):
            raise DataError(
                f"{self.where(document)}: the label is {gold!r:.80}, which is none of the {len(choices)} choices; "
                f"choose a split of the data whose labels are known"
            )
        return tuple(found)

    def answer(self, document: Document, *, chat: ChatPrompt | None = None) -> str:
        """The right answer of a task that generates text, as it stands behind the prompt; in a chat there is no
        delimiter between them."""
        with self._making(document):
            target = self._task.doc_to_target(document.fields)
            if self._task.config.doc_to_choice is not None and isinstance(target, int):
                target = self.choices(document)[target]
            first = target[0] if isinstance(target, list) else target
            return f"{'' if chat is not None else self._task.config.target_delimiter}{first}"

    def _generation(self) -> tuple[tuple[str, ...], int]:
        """Texts that end a text, and its tokens at most. Raises DataError unless the likeliest tokens are asked for."""
        from lm_eval.models.utils import normalize_gen_kwargs

        options = dict(normalize_gen_kwargs(dict(self._task.config.generation_kwargs or {}), _MOST_TOKENS))
        until, most = options.pop("until", None) or [], int(options.pop("max_gen_toks"))
        if not asks_for_greedy({**options, "attention_mask": None}) or int(self._task.config.repeats or 1) > 1:
            raise DataError(
                f"task {self.name} asks for more than the likeliest text, by {self._task.config.generation_kwargs}; it "
                f"can run after a search: --lm_eval.tasks='[{self.name}]'"
            )
        return tuple(until if isinstance(until, list) else [until]), most

    @contextmanager
    def _making(self, document: Document) -> Iterator[None]:
        """Context in which errors of templates and of functions of the task name the document."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # whatever templates and a task's own functions can raise
            raise DataError(
                f"{self.where(document)}: task {self.name} cannot make its requests: {type(error).__name__}: {error}"
            ) from error

    def examples(self, document: Document) -> Sequence[Any]:
        """Documents that are shown before a document. Raises DataError where there are too few."""
        if not self.shots:
            return ()
        if document.split not in self._drawn_examples:
            self._drawn_examples[document.split] = list(self._drawn(document.split))
        return self._drawn_examples[document.split][document.index]

    def _drawn(self, split: str) -> Iterator[Sequence[Any]]:
        """Examples of every document of a split in turn, as lm-eval draws them in a run over it."""
        if self._sampler is None:
            raise DataError(f"task {self.name} has no documents to draw {self.shots} examples from")
        fewshot, config = self._task.fewshot_cfg.split, self._task.config
        by_task = fewshot == config.test_split  # `ConfigurableTask.fewshot_context`
        apart = by_task if split == self.evaluated_split else self.examples_split == split
        self._sampler.set_rnd(self.seed)
        for document in self.documents(split):
            try:
                yield self._sampler.sample(n=self.shots, eval_doc=document.fields if apart else None)
            except (AssertionError, ValueError) as error:
                raise DataError(
                    f"task {self.name} cannot draw {self.shots} examples: {error}; lower num_fewshot"
                ) from error

    @property
    def examples_split(self) -> str | None:
        """Name of the split that examples are drawn from; None where they are given in the task."""
        if self._task.fewshot_cfg.split is not None:
            return str(self._task.fewshot_cfg.split)
        if self._task.config.fewshot_config is not None and self._task.fewshot_cfg.samples is not None:
            return None
        return self.own_split("train") or self.own_split("validation") or self.own_split("test")

    def examples_from(self, split: str) -> bool:
        """Whether examples are drawn from a split."""
        return bool(self.shots) and self.examples_split == split

    def example_pool(self) -> list[Any]:
        """Documents that examples are drawn from, without any where none are shown."""
        return list(self._sampler.df) if self.shots and self._sampler is not None else []

    # Metrics

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics."""
        return tuple(self._task._metric_fn_list)

    def bounded(self, metric: str) -> bool:
        """Whether a metric is a mean over items, and larger is better, as far as the task says."""
        from lm_eval.api.metrics import mean

        return self._task.aggregation().get(metric) is mean and bool(self._task.higher_is_better().get(metric, True))

    @property
    def text_figures(self) -> tuple[str, ...]:
        """Names of the metrics of a text that are means over items, each with the filter that the text went through."""
        names = [metric for metric in self.metrics if self.bounded(metric)]
        filters = [one.name for one in self._task._filters]
        return tuple(name if one == "none" else f"{name},{one}" for one in filters for name in names)

    def text_values(self, document: Document, text: str) -> list[float]:
        """Values of `text_figures` of a text, which is cut before what ends it."""
        from lm_eval.api.instance import Instance

        for end in filter(None, self.until):
            text = text.split(end)[0]
        found: dict[str, Any] = {}
        with self._making(document):
            request = Instance("generate_until", document.fields, ("", {}), 0, (self.name, document.index, 1), [text])
            for one in self._task._filters:
                one.apply([request])
                results = self._task.process_results(document.fields, [request.filtered_resps[one.name]])
                found |= {
                    name if one.name == "none" else f"{name},{one.name}": value for name, value in results.items()
                }
            return [float(found[name]) for name in self.text_figures]

    @property
    def needs_greedy(self) -> bool:
        """Whether metrics ask if a continuation is the likeliest token by token."""
        return not self.generates and self._asks_for_greedy

    @property
    def _asks_for_greedy(self) -> bool:
        return self.own_results or self.output_type == "loglikelihood" or "exact_match" in self.metrics

    def results(self, document: Document, responses: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Each metric's value of an item, from the log-likelihood of each request and whether it was the likeliest."""
        with self._making(document):
            found: dict[str, Any] = self._task.process_results(document.fields, list(responses))
        return found

    def aggregated(self, metric: str, values: Sequence[Any]) -> float:
        """A metric over items, from its values of each."""
        from lm_eval.api.metrics import mean

        return float(self._task.aggregation().get(metric, mean)(list(values)))

    def identity(self) -> dict[str, Any]:
        """What decides prompts and figures, in plain data."""
        config = self._task.dump_config()
        return {name: config.get(name) for name in _DECIDING}


def load_harness(
    name: str,
    folders: Sequence[str | Path] = (),
    *,
    num_fewshot: int | None = None,
    seed: int = FEWSHOT_SEED,
    data_files: Mapping[str, str | Sequence[str]] | None = None,
    max_gen_toks: int | None = None,
) -> HarnessTask | HarnessGroup:
    """The task of that name, or the group with all of its tasks. Raises DataError for what cannot be scored."""
    loaded = load_tasks([name], folders, data_files=data_files)
    options: dict[str, Any] = {"num_fewshot": num_fewshot, "seed": seed, "max_gen_toks": max_gen_toks}
    if name in loaded and not isinstance(loaded[name], Mapping):
        return HarnessTask(name, loaded[name], **options)
    found = [(key, value) for key, value in loaded.items() if isinstance(value, Mapping)]
    weighings = tuple(_weighings(key, value) for key, value in _groups(loaded))
    if len(found) != 1 or not weighings[0].figures:
        inside = [one for one, _ in leaves(loaded)]
        shown = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
        raise DataError(
            f"{name} is a group of lm-eval tasks; it does not say how their figures make one (aggregate_metric_list): "
            f"give each its place in a suite: {shown}"
        )
    tasks = tuple(HarnessTask(one, task, **options) for one, task in leaves(loaded))
    return HarnessGroup(name, tasks, weighings)


@dataclass(frozen=True)
class Weighing:
    """How a group makes figures of those of its tasks: for each metric, with a filter's name or for all filters,
    whether a task counts by its documents or all tasks alike."""

    name: str
    tasks: tuple[str, ...]
    figures: Mapping[tuple[str, str | None], bool]

    def by_size(self, figure: str) -> bool | None:
        """Whether tasks count by their documents in a figure, `acc` or `acc,filter`; None where the group has no such
        figure."""
        metric, _, filter_name = figure.partition(",")
        return self.figures.get((metric, filter_name or "none"), self.figures.get((metric, None)))


class HarnessGroup:
    """Several tasks of lm-eval that make up one: `weighings` are the group's own, then those of the groups in it."""

    def __init__(self, name: str, tasks: Sequence[HarnessTask], weighings: Sequence[Weighing]) -> None:
        self.name, self.tasks, self.weighings = name, tuple(tasks), tuple(weighings)

    @property
    def shots(self) -> tuple[int, ...]:
        """Examples before each item, of every task."""
        return tuple(task.shots for task in self.tasks)

    def own_split(self, split: Split) -> str | None:
        """Name that all tasks give to their training, validation or test split. Raises DataError where they differ."""
        return self._agreed(f"{split} split", [task.own_split(split) for task in self.tasks])

    @property
    def evaluated_split(self) -> str:
        """Name of the split that lm-eval evaluates."""
        return self._agreed("evaluated split", [task.evaluated_split for task in self.tasks]) or ""

    def _agreed(self, what: str, names: Sequence[str | None]) -> str | None:
        if len(set(names)) > 1:
            raise DataError(
                f"tasks of the group {self.name} differ in their {what}: "
                f"{', '.join(sorted(set(map(str, names))))}; name it by `train`, `validation` or `test`"
            )
        return names[0]

    def documents(self, split: str) -> list[Document]:
        """Documents of a split of every task, task by task."""
        return [document for task in self.tasks for document in task.documents(split)]

    def examples_from(self, split: str) -> bool:
        """Whether a task draws its examples from a split."""
        return any(task.examples_from(split) for task in self.tasks)

    def example_pool(self) -> list[Any]:
        """Documents that examples are drawn from, of every task."""
        return [task.example_pool() for task in self.tasks]

    def identity(self) -> dict[str, Any]:
        """What decides prompts and figures, in plain data."""
        weighings = [(one.name, list(one.tasks), sorted(map(str, one.figures.items()))) for one in self.weighings]
        return {"group": weighings, "tasks": {task.name: task.identity() for task in self.tasks}}


def _checked(name: str, task: Any) -> Any:
    """lm-eval's task. Raises DataError for what is not scored here."""
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):
        raise DataError(f"task {name} is a class of its own, {type(task).__name__}; only those of a YAML can be used")
    if task.OUTPUT_TYPE not in _SCORED:
        raise DataError(
            f"task {name} has the output_type {task.OUTPUT_TYPE}; only {', '.join(_SCORED)} can be scored in a "
            f"search, others run after it: --lm_eval.tasks='[{name}]'"
        )
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name} runs code of the model or shows it more than text, which is not done here")
    return task


def _groups(loaded: Mapping[Any, Any]) -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    """Groups with what is in them, those that hold others first."""
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            yield key, value
            yield from _groups(value)


def leaves(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """lm-eval's tasks of nested groups by name."""
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield str(key), value


def _weighings(group: Any, inside: Mapping[Any, Any]) -> Weighing:
    """How a group of lm-eval weighs its tasks."""
    name = str(getattr(group, "group_name", None) or getattr(group, "group", None) or group)
    config = getattr(group, "config", None) or {}
    figures: dict[tuple[str, str | None], bool] = {}
    for one in config.get("aggregate_metric_list") or ():
        given = one if isinstance(one, Mapping) else vars(one)
        if given.get("aggregation", "mean") != "mean":
            raise DataError(
                f"group {name} of lm-eval makes {given.get('metric')} by a function; only means can be used"
            )
        filters = given.get("filter_list")
        for filter_name in [filters] if filters is None or isinstance(filters, str) else filters:
            figures[str(given["metric"]), filter_name] = bool(given.get("weight_by_size", True))
    return Weighing(name, tuple(one for one, _ in leaves(inside)), figures)


def _remembered(render: Callable[..., Any]) -> Callable[..., Any]:
    """What a task makes of a document by a template, which is kept with both of them."""
    kept: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    def rendered(doc: Any, template: Any = None) -> Any:
        place = id(doc), id(template)
        if place not in kept:
            kept[place] = (doc, template, render(doc) if template is None else render(doc, template))
        return kept[place][2]

    return rendered


@dataclass(frozen=True)
class _Given:
    """A sampler that has drawn already."""

    examples: Sequence[Any]

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:
        return self.examples[:n]


def document_of(item: Item) -> Document:
    """The document that an item is of."""
    found: Document = item.content
    return found
