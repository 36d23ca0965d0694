"""Pure arithmetic: the learning rate as a function of the step."""

import math

import pytest

from llamita.train.run import Schedule
from llamita.train.schedule import lr_ratio


def test_wsd_rises_stays_and_falls_to_the_end():
    wsd = Schedule(kind="wsd", warmup_steps=10, decay_share=0.2)
    assert lr_ratio(wsd, 0, 100) == pytest.approx(0.1)
    assert lr_ratio(wsd, 9, 100) == 1.0
    assert lr_ratio(wsd, 79, 100) == 1.0
    assert lr_ratio(wsd, 90, 100) == pytest.approx(0.5)
    assert lr_ratio(wsd, 99, 100) == pytest.approx(0.05)


def test_cosine_meets_its_equation_and_floor():
    cosine = Schedule(kind="cosine", warmup_steps=10, final_ratio=0.1)
    assert lr_ratio(cosine, 55, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert lr_ratio(cosine, 100, 100) == pytest.approx(0.1)


def test_a_step_behind_the_last_stays_at_the_floor():
    for kind in ("wsd", "cosine"):
        schedule = Schedule(kind=kind, warmup_steps=2, final_ratio=0.1)
        assert lr_ratio(schedule, 130, 100) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak():
    assert lr_ratio(Schedule(kind="wsd", warmup_steps=0), 0, 100) == 1.0
