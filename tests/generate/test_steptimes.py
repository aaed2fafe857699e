from __future__ import annotations

from axicon.generate.steptimes import BOUNDS, StepClock, StepTimes


def test_a_step_is_counted_in_the_class_it_falls_into() -> None:
    clock = StepClock()
    for seconds in (BOUNDS[3], BOUNDS[3] * 1.0001, 1e-9, 1e9):
        clock.note(seconds)
    read = clock.read()
    assert {i for i, count in enumerate(read.counts) if count} == {0, 3, 4, len(BOUNDS)}
    assert sum(read.counts) == 4
    assert read.seconds > 1e9


def test_what_was_read_does_not_change_later() -> None:
    clock = StepClock()
    assert (before := clock.read()) == StepTimes()
    clock.note(0.01)
    assert before == StepTimes()
