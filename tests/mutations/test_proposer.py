from __future__ import annotations

import json

import numpy as np
import pytest

from qratk.core import ConfigurationError
from qratk.core.correlation import spearman
from qratk.mutations.base import mutations
from qratk.mutations.proposer import Proposer
from qratk.repairs.base import repairs
from qratk.testing import toy_problem


def proposer(problem, repair="greedy", names=("sensitivity", "coupled"), **options):
    return Proposer(problem, [mutations.create(name) for name in names], repairs.create(repair), **options)


def test_candidate_names_its_operator_and_parent():
    problem = toy_problem(4)
    parent = problem.space.uniform(4, 8)
    candidate = proposer(problem).propose(parent, np.random.default_rng(0), generation=3, phase="local")
    assert candidate.parents == (parent.digest,)
    assert candidate.origin in ("sensitivity", "coupled")
    assert (candidate.generation, candidate.phase) == (3, "local")


def test_operators_are_drawn_in_equal_parts():
    problem, rng = toy_problem(4), np.random.default_rng(0)
    parent = problem.space.uniform(4, 8)
    origins = [proposer(problem).propose(parent, rng).origin for _ in range(600)]
    assert 240 < origins.count("coupled") < 360


def test_known_configurations_are_not_proposed():
    problem, rng = toy_problem(4), np.random.default_rng(0)
    parent = problem.space.uniform(4, 8)
    known = set(problem.space.neighbours(parent)) | {parent}
    for _ in range(30):
        assert proposer(problem).propose(parent, rng, known=known).configuration not in known


def test_none_is_proposed_when_all_is_known():
    problem = toy_problem(1)
    source = proposer(problem, tries=40)
    known = set(problem.space.uniforms())
    assert source.propose(problem.space.smallest, np.random.default_rng(0), known=known) is None
    assert source.counts.repeated == 40


def test_counts_tell_infeasible_and_rejected_proposals():
    problem, rng = toy_problem(4), np.random.default_rng(0)
    source = proposer(problem, repair="reject", names=("uniform",))
    for _ in range(40):
        source.vary(problem.space.uniform(4, 16), rng)
    assert source.counts.proposed == 40
    assert 0 < source.counts.infeasible == source.counts.rejected < 40


def test_proposer_without_operators_is_refused():
    with pytest.raises(ConfigurationError, match="at least one mutation"):
        proposer(toy_problem(2), names=())


CROSSING = ("sensitivity", "crossover_uniform", "crossover_block")


def some(problem, count, seed=1):
    rng, policy = np.random.default_rng(seed), repairs.create("greedy")
    return tuple(policy.repair(problem, problem.space.random(rng)) for _ in range(count))


def test_child_of_two_names_both_parents():
    problem, rng = toy_problem(8), np.random.default_rng(0)
    parent, *mates = some(problem, 5)
    source = proposer(problem, names=("crossover_uniform",))
    for _ in range(20):
        candidate = source.propose(parent, rng, mates=mates)
        ours, theirs = candidate.parents
        assert candidate.origin == "crossover_uniform"
        assert ours == parent.digest
        assert theirs in {mate.digest for mate in mates}


def test_operators_are_drawn_in_equal_parts_with_crossovers_among_them():
    problem, rng = toy_problem(8), np.random.default_rng(0)
    parent, *mates = some(problem, 5)
    source = proposer(problem, names=CROSSING)
    origins = [source.vary(parent, rng, mates=mates)[1] for _ in range(900)]
    assert all(240 < origins.count(name) < 360 for name in CROSSING)


@pytest.mark.parametrize("with_itself", [False, True])
def test_crossovers_are_left_out_without_a_mate(with_itself):
    """The parent is no mate of itself."""
    problem, rng = toy_problem(8), np.random.default_rng(0)
    (parent,) = some(problem, 1)
    source = proposer(problem, names=CROSSING)
    candidates = [source.propose(parent, rng, mates=(parent,) * with_itself) for _ in range(50)]
    assert {candidate.origin for candidate in candidates} == {"sensitivity"}
    assert {candidate.parents for candidate in candidates} == {(parent.digest,)}


def test_nothing_is_proposed_when_every_operator_wants_a_mate_and_there_is_none():
    problem, rng = toy_problem(8), np.random.default_rng(0)
    (parent,) = some(problem, 1)
    source = proposer(problem, names=("crossover_uniform",))
    assert source.vary(parent, rng) is None
    assert source.propose(parent, rng) is None
    assert source.counts.proposed == 0


def test_mates_do_not_move_the_random_stream_of_operators_without_crossover():
    problem = toy_problem(8)
    parent, *mates = some(problem, 5)
    with_mates, without = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(30):
        expected = proposer(problem).propose(parent, without)
        assert proposer(problem).propose(parent, with_mates, mates=mates) == expected


def test_repaired_rungs_are_counted_layer_by_layer():
    problem, rng = toy_problem(8), np.random.default_rng(0)
    source, policy = proposer(problem), repairs.create("greedy")
    expected = np.zeros((8, 2), dtype=int)
    for _ in range(30):
        drawn = problem.space.random(rng)
        source.repaired(drawn)
        expected += problem.space.indices(drawn) - problem.space.indices(policy.repair(problem, drawn))
    assert expected.sum() > 0
    assert source.counts.repaired_bits == expected[:, 0].tolist()
    assert source.counts.repaired_rank == expected[:, 1].tolist()


def test_repair_hits_unimportant_layers_most():
    """Figure 8 of the paper: repair intensity falls with sensitivity."""
    problem, rng = toy_problem(16, 3), np.random.default_rng(0)
    source = proposer(problem)
    for _ in range(200):
        source.repaired(problem.space.random(rng))
    intensity = source.counts.repaired_bits
    assert spearman(intensity, problem.importance.bits) < -0.5


def test_counts_survive_json_and_go_on():
    problem, rng = toy_problem(4), np.random.default_rng(0)
    straight, first, second = proposer(problem), proposer(problem), proposer(problem)
    drawn = [problem.space.random(rng) for _ in range(20)]
    for number, configuration in enumerate(drawn):
        straight.repaired(configuration)
        (first if number < 10 else second).repaired(configuration)
        if number == 9:
            second.counts.restore(json.loads(json.dumps(first.counts.state())))
    assert second.counts == straight.counts
    assert sum(straight.counts.repaired_bits) > 0


def test_restored_counts_are_apart_from_the_state_they_came_from():
    source = proposer(toy_problem(2))
    state = source.counts.state()
    source.counts.restore(state)
    source.repaired(source.problem.space.largest)
    assert state["repaired_bits"] == [0, 0]
    assert state["proposed"] == 0
