from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from qratk.core import Configuration, ConfigurationError, SearchSpace
from qratk.core.shared import SharedLadder


def breadth_first_distances(space: SearchSpace, start: Configuration) -> dict[Configuration, int]:
    distances, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for layer in range(space.num_layers):
            for knob in ("bits", "rank"):
                for direction in (-1, 1):
                    there = space.step(here, layer, knob, direction)
                    if there is not None and there not in distances:
                        distances[there] = distances[here] + 1
                        queue.append(there)
    return distances


@pytest.fixture
def space():
    return SearchSpace((2, 4, 8), (4, 8, 16, 32), ("a", "b"))


def test_atomic_distance_is_the_shortest_path_of_single_edits(space):
    for start in (space.smallest, space.uniform(4, 8)):
        distances = breadth_first_distances(space, start)
        assert len(distances) == (3 * 4) ** 2
        for configuration, distance in distances.items():
            assert space.atomic_distance(start, configuration) == distance


def test_neighbours_are_all_configurations_at_distance_one(space):
    for centre in (space.smallest, space.largest, space.uniform(4, 8)):
        at_one = {c for c, d in breadth_first_distances(space, centre).items() if d == 1}
        assert set(space.neighbours(centre)) == at_one
        assert len(space.neighbours(centre)) == len(at_one)


def test_indices_read_back(space):
    rng = np.random.default_rng(0)
    for _ in range(20):
        configuration = space.random(rng)
        assert space.from_indices(space.indices(configuration)) == configuration


def test_embedding_is_standardised_over_the_ladder(space):
    rows = np.array([space.embed(c) for c in breadth_first_distances(space, space.smallest)])
    assert rows.shape[1] == 4
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(rows.std(axis=0), 1)


def test_ladder_of_one_rung_embeds_as_zero():
    space = SearchSpace((4,), (8,), ("a", "b"))
    np.testing.assert_array_equal(space.embed(space.smallest), np.zeros(4))


@pytest.mark.parametrize(
    ("bits", "ranks"), [((), (4,)), ((4, 2), (4,)), ((2, 2), (4,)), ((0, 2), (4,)), ((2,), (-1, 4)), ((2,), ())]
)
def test_ladder_that_does_not_ascend_is_refused(bits, ranks):
    with pytest.raises(ConfigurationError, match="ascending ladder"):
        SearchSpace(bits, ranks, ("a",))


def test_configuration_off_the_ladder_names_the_layer(space):
    with pytest.raises(ConfigurationError, match=r"bits must be one of \(2, 4, 8\), got 3 for layer 'b'"):
        space.validate(Configuration.of([2, 3], [4, 4]))


def test_configuration_text_reads_back():
    rng = np.random.default_rng(0)
    space = SearchSpace((2, 4), (0, 8), tuple("abcdefg"))
    for _ in range(50):
        configuration = space.random(rng)
        assert Configuration.from_text(str(configuration)) == configuration
    assert str(Configuration.of([4, 4, 2], [8, 8, 16])) == "4:8*2 2:16"


def test_garbled_configuration_text_is_refused():
    with pytest.raises(ConfigurationError, match="bits:rank"):
        Configuration.from_text("4:8 four:8")


def test_space_contains_just_what_it_validates():
    space = SearchSpace((2, 4), (4, 8), ("a", "b"))
    for text in ("2:4 4:8", "2:4*2"):
        assert Configuration.from_text(text) in space
    for text in ("2:4 4:16", "3:4 4:8", "2:4*3"):
        configuration = Configuration.from_text(text)
        assert configuration not in space
        with pytest.raises(ConfigurationError):
            space.validate(configuration)


SHARED = (SharedLadder("schedule", ("constant", "linear", "cosine")), SharedLadder("learning_rate", (1e-3, 3e-3, 1e-2)))


@pytest.fixture
def shared_space():
    return SearchSpace((2, 4), (4, 8), ("a",), SHARED)


def every(space: SearchSpace) -> list[Configuration]:
    return [c.with_shared(shared) for c in space.uniforms() for shared in space.all_shared]


def test_distance_with_settings_is_the_shortest_path_over_neighbours(shared_space):
    for start in every(shared_space)[::5]:
        distances, queue = {start: 0}, deque([start])
        while queue:
            here = queue.popleft()
            for there in shared_space.neighbours(here):
                if there not in distances:
                    distances[there] = distances[here] + 1
                    queue.append(there)
        assert set(distances) == set(every(shared_space))
        assert all(shared_space.atomic_distance(start, c) == d for c, d in distances.items())


def test_size_counts_the_settings(shared_space):
    assert 10**shared_space.log10_size == pytest.approx(len(every(shared_space)))
    assert len(set(every(shared_space))) == len(every(shared_space))


def test_settings_read_back_from_their_places_and_random_ones_are_in_the_space(shared_space):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        configuration = shared_space.random(rng)
        shared_space.validate(configuration)
        assert configuration in shared_space
        assert shared_space.shared_at(shared_space.shared_indices(configuration)) == configuration.shared
        seen.add(configuration.shared)
    assert seen == set(shared_space.all_shared)


def test_configuration_without_the_settings_of_the_space_is_refused_until_it_is_settled(shared_space):
    bare = Configuration.uniform(2, 4, 1)
    assert bare not in shared_space
    with pytest.raises(ConfigurationError, match="learning_rate, schedule is needed"):
        shared_space.validate(bare)
    assert shared_space.settled(bare).settings == {"learning_rate": 0.003, "schedule": "linear"}
    with pytest.raises(ConfigurationError, match="learning_rate must be one of"):
        shared_space.validate(bare.with_shared({"learning_rate": 0.5, "schedule": "linear"}))


def test_settings_of_a_configuration_are_refused_by_a_space_without_any():
    with pytest.raises(ConfigurationError, match="no shared settings is needed"):
        SearchSpace((2, 4), (4, 8), ("a",)).validate(Configuration.from_text("2:4 | learning_rate=0.1"))


def test_embedding_has_names_equally_far_apart_and_a_setting_as_far_as_all_layers_bits():
    space = SearchSpace((2, 4, 8), (4,), ("a", "b", "c", "d"), SHARED)
    centre = space.uniform(4, 4)
    far = {c.shared: float(np.linalg.norm(space.embed(c) - space.embed(centre))) for c in space.shared_steps(centre)}
    names = [distance for shared, distance in far.items() if ("learning_rate", 0.003) in shared]
    rates = [distance for shared, distance in far.items() if ("schedule", "linear") in shared]
    bits = float(np.linalg.norm(space.embed(space.uniform(8, 4)) - space.embed(centre)))
    assert names == pytest.approx([names[0]] * 2)
    assert rates == pytest.approx([bits] * 2)
    table = np.array([space.embed(c)[8:] for c in every(space)])
    np.testing.assert_allclose(table.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(table[:, 0].std(), 2.0)


def test_names_of_two_are_as_far_apart_as_two_rungs():
    for ladder in (SharedLadder("rslora", (False, True)), SharedLadder("alpha_over_rank", (1, 2))):
        space = SearchSpace((2,), (4,), ("a",), (ladder,))
        first, second = (space.embed_shared(c) for c in every(space))
        assert float(np.linalg.norm(first - second)) == pytest.approx(2.0)
