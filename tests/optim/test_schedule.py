"""Tests of the learning rate schedules."""

import dataclasses

import pytest

from muonrec.optim.schedule import SCHEDULES, Schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_in_a_line_and_stays_between_0_and_1(name):
    schedule = Schedule(name, warmup_steps=4, num_steps=20, final_fraction=0.1)
    values = [schedule(step) for step in range(40)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert len(set(values[20:])) == 1


def test_constant_stays():
    schedule = Schedule("constant", num_steps=10)
    assert {schedule(step) for step in range(20)} == {1.0}


def test_cosine_falls_to_the_final_fraction():
    schedule = Schedule("cosine", warmup_steps=10, num_steps=110, final_fraction=0.2)
    assert [schedule(step) for step in (10, 60, 110, 1000)] == pytest.approx([1.0, 0.6, 0.2, 0.2], abs=1e-12)


def test_warmup_stable_decay_falls_only_at_the_end():
    schedule = Schedule("warmup_stable_decay", num_steps=100, final_fraction=0.5, decay_fraction=0.2)
    assert [schedule(step) for step in (0, 80, 90, 100, 200)] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5], abs=1e-12)


def test_warmup_may_fill_the_run():
    schedule = Schedule("cosine", warmup_steps=5, num_steps=5)
    assert schedule(4) == 1.0


def test_a_schedule_is_frozen_and_comparable():
    assert Schedule("cosine", num_steps=5) == Schedule("cosine", num_steps=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().name = "cosine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "cosin"}, "schedule is 'cosin'; use one of constant, cosine, warmup_stable_decay"),
        ({"num_steps": 0}, "num_steps is 0; a run has at least 1 step"),
        ({"num_steps": 5, "warmup_steps": 6}, "warmup_steps is 6 of num_steps 5; use 0 to 5"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5; use 0 to 1"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0; use more than 0"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)
    with pytest.raises(ValueError, match="step is -1; steps count from 0"):
        Schedule()(-1)
