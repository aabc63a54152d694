"""Bytes that an action takes from torch's allocator."""

from __future__ import annotations

import pytest
import torch

from qratk.peaks.allocated import allocated_peak


def test_peak_is_what_was_held_at_once_and_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def action() -> torch.Tensor:
        first = torch.ones(1000)
        del first
        return torch.ones(2000) + torch.ones(2000)

    assert allocated_peak(action, torch.device("cpu")) == 3 * 8000
    assert capfd.readouterr() == ("", "")
