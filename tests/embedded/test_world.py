"""Tests of the embedded world, its data set and the committed model."""

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest

from qratk.embedded import model_directory, write_dataset
from qratk.embedded.world import (
    CHOICES,
    Row,
    Split,
    documents,
    fine_tuning_rows,
    make_world,
    split_people,
)

SPLITS: tuple[Split, ...] = get_args(Split)


@cache
def _people() -> frozenset[str]:
    return frozenset(person.name for person in make_world().people)


def _names(row: Row) -> tuple[str, ...]:
    """The people whom a row speaks of."""
    known = _people()
    words = f"{row.context} {row.question}".replace(".", " ").replace("?", " ").split()
    return tuple(word for word in words if word in known)


def _sentences(count: int) -> frozenset[str]:
    """Sentences, questions, and questions with their answers, in so many documents."""
    text = "\n".join(islice(documents(make_world(), 0), count))
    parts = re.findall(r"[^.?\n]+[.?]", text)
    answered = re.findall(r"[^.?\n]+\? [^.?\n]+\.", text)
    return frozenset(part.strip() for part in (*parts, *answered))


def test_same_seed_gives_same_rows() -> None:
    world = make_world()
    for split in SPLITS:
        assert fine_tuning_rows(world, split, 3) == fine_tuning_rows(make_world(), split, 3)
        assert fine_tuning_rows(world, split, 3) != fine_tuning_rows(world, split, 4)


def test_same_seed_gives_same_documents() -> None:
    world = make_world()
    first, again, other = (list(islice(documents(world, seed), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_have_the_promised_sizes() -> None:
    world = make_world()
    sizes = {split: len(fine_tuning_rows(world, split)) for split in SPLITS}
    assert 2000 <= sizes["train"] <= 4000
    assert 300 <= sizes["validation"] <= 400
    assert 500 <= sizes["test"] <= 800


@pytest.mark.parametrize("seed", [0, 1])
def test_no_person_is_asked_about_in_two_splits(seed: int) -> None:
    world = make_world()
    people = [{p.name for p in split_people(world, split, seed)} for split in SPLITS]
    assert len(set.union(*people)) == sum(map(len, people))
    for split, names in zip(SPLITS, people, strict=True):
        rows = fine_tuning_rows(world, split, seed)
        assert all(set(_names(row)) <= names for row in rows)


def test_no_row_is_repeated_in_or_across_splits() -> None:
    world = make_world()
    rows = [row for split in SPLITS for row in fine_tuning_rows(world, split)]
    assert len({row.id for row in rows}) == len(rows)
    assert len({(row.context, row.question, row.choices) for row in rows}) == len(rows)


def test_questions_use_only_words_of_the_pretraining_text() -> None:
    world = make_world()
    known = set(re.findall(r"\w+", " ".join(islice(documents(world, 0), 20_000))))
    for split in SPLITS:
        for row in fine_tuning_rows(world, split):
            assert set(re.findall(r"\w+", f"{row.context} {row.question}")) <= known


def test_compositions_are_not_in_the_pretraining_text() -> None:
    world = make_world()
    seen = _sentences(20_000)
    for split in SPLITS:
        for row in fine_tuning_rows(world, split):
            assert row.context
            assert not {row.context, row.question} & seen


def test_single_facts_of_every_split_are_in_the_pretraining_text() -> None:
    world = make_world()
    seen = _sentences(20_000)
    for person in world.people:
        assert f"In which town does {person.name} live? {person.town}." in seen
        assert f"What animal does {person.name} own? {person.animal}." in seen
        assert f"What food does {person.name} like? {person.food}." in seen
        assert f"What job does {person.name} have? {person.job}." in seen


def test_right_choice_is_the_fact_of_the_host() -> None:
    world = make_world()
    facts = {person.name: person for person in world.people}
    for row in fine_tuning_rows(world, "test"):
        first, verb, *_, last = row.context.removesuffix(".").split()
        host = facts[first if verb == "gives" else last]
        assert row.choices[row.label] in (host.town, host.animal, host.food, host.job)


def test_choices_are_distinct_and_include_the_fact_of_the_guest() -> None:
    world = make_world()
    facts = {person.name: person for person in world.people}
    for split in SPLITS:
        for row in fine_tuning_rows(world, split):
            assert len(set(row.choices)) == CHOICES
            assert 0 <= row.label < CHOICES
            pair = [facts[name] for name in _names(row)[:2]]
            for person in pair:
                assert {person.town, person.animal, person.food, person.job} & set(row.choices)


def test_right_answers_are_spread_evenly_over_the_positions() -> None:
    world = make_world()
    for split in SPLITS:
        labels = Counter(row.label for row in fine_tuning_rows(world, split))
        assert max(labels.values()) - min(labels.values()) <= 1


def test_unknown_split_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        split_people(make_world(), "dev", 0)  # type: ignore[arg-type]


def test_too_many_people_are_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match="people=100000"):
        make_world(people=100_000)


def test_written_files_hold_the_rows_and_are_the_same_each_time(tmp_path: Path) -> None:
    first, again = write_dataset(tmp_path / "a", seed=5), write_dataset(tmp_path / "b", seed=5)
    assert tuple(first) == SPLITS
    for split in SPLITS:
        assert first[split].read_bytes() == again[split].read_bytes()
        lines = first[split].read_text(encoding="utf-8").splitlines()
        rows = fine_tuning_rows(make_world(), split, 5)
        assert [json.loads(line) for line in lines] == [row.as_dict() for row in rows]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qratk.embedded; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_committed_model_is_small() -> None:
    total = sum(path.stat().st_size for path in model_directory().iterdir())
    assert total < 5_000_000


def test_committed_model_has_twelve_layers_and_about_a_million_parameters() -> None:
    from qratk.embedded.sensitivity import load

    model, tokenizer = load(model_directory())
    assert model.config.num_hidden_layers == 12
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert len(tokenizer) == model.config.vocab_size
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_tokenizer_gives_back_the_text() -> None:
    from qratk.embedded.sensitivity import load

    _, tokenizer = load(model_directory())
    for row in fine_tuning_rows(make_world(), "validation")[:50]:
        ids = tokenizer(row.question, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row.question


def test_held_out_loss_on_fresh_text_is_near_the_figure_in_the_curve() -> None:
    from qratk.embedded.sensitivity import load
    from qratk.embedded.train import Recipe, held_out_loss

    with (model_directory() / "training_curve.csv").open(encoding="utf-8") as file:
        claimed = float(list(csv.DictReader(file))[-1]["held_out_loss"])
    model, tokenizer = load(model_directory())
    fresh = held_out_loss(model, make_world(), tokenizer, Recipe(), count=192, seed=20_260_101)
    assert fresh == pytest.approx(claimed, abs=0.05)
