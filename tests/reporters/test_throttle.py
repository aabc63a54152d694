from __future__ import annotations

from qratk.reporters._throttle import Throttle


def test_drawing_waits_twenty_times_as_long_as_it_took() -> None:
    now = [100.0]
    throttle = Throttle(0.05, clock=lambda: now[0])
    assert throttle.ready
    with throttle.drawing():
        now[0] += 2.0
    now[0] += 39.0
    assert not throttle.ready
    now[0] += 1.0
    assert throttle.ready
