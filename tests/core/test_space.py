from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from qratk.core import Configuration, ConfigurationError, SearchSpace


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
