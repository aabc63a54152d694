from __future__ import annotations

import numpy as np
import pytest

from qratk.core import ConfigurationError
from qratk.mutations._proposer import Proposer
from qratk.mutations.base import mutations
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
