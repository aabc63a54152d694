"""Stacked parameters of which each member has a rate, decay and schedule of its own, against AdamW on each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qratk.training.module import FineTuneModule
from qratk.training.optimisation import MemberSteps, adamw, learning_rate_factor
from qratk.training.options import FineTuneOptions

TOTAL, DONE, STEPS = 20, 3, 8
SETTINGS = (
    {"learning_rate": 1e-3, "weight_decay": 0.3},
    {"learning_rate": 1e-1, "schedule": "linear", "warmup_steps": 6},
    {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.05},
    {"learning_rate": 0, "weight_decay": 1},
)


def members() -> list[FineTuneOptions]:
    plain = FineTuneModule("no model", learning_rate=5e-3).options
    return [replace(plain, **settings) for settings in SETTINGS]


def gradients() -> list[list[torch.Tensor]]:
    """Gradients of two stacked parameters at each step, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(SETTINGS), 2, 5), (len(SETTINGS), 7, 2))
    return [[torch.randn(s, generator=generator) * 10.0 ** (k % 4 - 3) for s in shapes] for k in range(STEPS)]


def begun() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(g.shape, generator=generator) / 30) for g in gradients()[0]]


def alone(options: FineTuneOptions, member: int) -> list[torch.Tensor]:
    parameters = [nn.Parameter(stacked[member].detach().clone()) for stacked in begun()]
    optimizer = adamw(options, parameters, rate_factor=2.0, precision="32-true")
    for number, step in enumerate(gradients()):
        share = learning_rate_factor(DONE + number, TOTAL, options.warmup_steps, options.schedule)
        optimizer.param_groups[0]["lr"] = 2.0 * options.learning_rate * share
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient[member]
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_each_member_is_stepped_as_adamw_would_step_it_alone(precision: str) -> None:
    options, parameters = members(), begun()
    steps = MemberSteps(parameters, options, rate_factor=2.0, start=DONE, total=TOTAL)
    optimizer = steps.attached(precision=precision)
    for step in gradients():
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for member, own in enumerate(options):
        for stacked, expected in zip(parameters, alone(own, member), strict=True):
            torch.testing.assert_close(stacked[member].detach(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(parameters[0][3], begun()[0][3])  # a rate of 0


def test_rates_follow_each_members_schedule_from_the_step_that_was_reached() -> None:
    options = members()
    steps = MemberSteps(begun(), options, rate_factor=2.0, start=DONE, total=TOTAL)
    expected = [
        2.0 * own.learning_rate * learning_rate_factor(DONE, TOTAL, own.warmup_steps, own.schedule) for own in options
    ]
    assert steps.rates() == expected
    assert expected[1] == pytest.approx(2.0 * 1e-1 * 4 / 7)


def test_a_member_that_is_not_a_number_harms_no_other() -> None:
    options, parameters = members(), begun()
    optimizer = MemberSteps(parameters, options, rate_factor=1.0, start=0, total=TOTAL).attached(precision="32-true")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] = torch.nan
    optimizer.step()
    assert all(parameter[1].isnan().all() for parameter in parameters)
    assert all(parameter[[0, 2, 3]].isfinite().all() for parameter in parameters)
