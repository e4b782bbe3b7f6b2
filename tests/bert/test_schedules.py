"""Schedules of the learning rate, on random lengths of runs and warm-ups."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bert.config import Config, OptimizerConfig
from bert.schedules import SCHEDULES, learning_rate_at
from bert.validation import validate
from data.errors import InputError

RUNS = (st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 10))


def rates(name, max_steps, warmup_ratio, decay_ratio, peak):
    config = OptimizerConfig(schedule=name, learning_rate=peak, warmup_ratio=warmup_ratio, decay_ratio=decay_ratio)
    return [learning_rate_at(step, config, max_steps) for step in range(1, max_steps + 1)]


def steps_of(ratio, max_steps):
    return math.ceil(round(ratio * max_steps, 6))


@given(*RUNS)
def test_linear_is_the_recipes_to_the_last_bit(max_steps, warmup_ratio, decay_ratio, peak):
    warmup = steps_of(warmup_ratio, max_steps)
    expected = [
        peak * step / warmup
        if step <= warmup
        else peak * (max_steps - step + 1) / (max_steps - warmup + (1 if warmup else 0))
        for step in range(1, max_steps + 1)
    ]
    assert rates("linear", max_steps, warmup_ratio, decay_ratio, peak) == expected


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant"])
def test_rates_rise_to_the_peak_stay_above_zero_and_never_rise_again(name):
    @given(*RUNS)
    def check(max_steps, warmup_ratio, decay_ratio, peak):
        found = rates(name, max_steps, warmup_ratio, decay_ratio, peak)
        top = max(1, steps_of(warmup_ratio, max_steps))
        assert found[top - 1] == pytest.approx(peak, rel=1e-15) and max(found) == pytest.approx(peak, rel=1e-15)
        assert all(found[i] == pytest.approx(peak * (i + 1) / top) for i in range(top))
        assert all(rate > 0 for rate in found) and all(a >= b for a, b in zip(found[top:], found[top + 1 :]))

    check()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_peak_is_reached_once_and_zero_is_one_step_away_from_the_last(name):
    @given(*RUNS)
    def check(max_steps, warmup_ratio, decay_ratio, peak):
        found = rates(name, max_steps, warmup_ratio, decay_ratio, peak)
        falling = found[max(1, steps_of(warmup_ratio, max_steps)) - 1 :] + [0.0]
        changes = [a - b for a, b in zip(falling, falling[1:])]
        assert min(changes) > 0 and found.count(max(found)) == 1
        assert max(changes) <= peak * math.pi / 2 / len(changes) * (1 + 1e-9)  # a half cosine's steepest place

    check()


@given(*RUNS)
def test_wsd_leaves_the_peak_for_the_last_share_of_all_steps(max_steps, warmup_ratio, decay_ratio, peak):
    found = rates("wsd", max_steps, warmup_ratio, decay_ratio, peak)
    top, decay = max(1, steps_of(warmup_ratio, max_steps)), steps_of(decay_ratio, max_steps)
    start = max(top, max_steps - decay)
    assert all(rate == pytest.approx(peak) for rate in found[top - 1 : start])
    falling = found[start - 1 :]
    expected = [peak * (len(falling) - i) / len(falling) for i in range(len(falling))]
    assert falling == pytest.approx(expected)


def test_cosine_is_half_way_down_in_the_middle():
    found = rates("cosine", 11, 0.1, 0.0, 2.0)  # the peak in step 2, 0 in step 12
    assert found[6] == pytest.approx(1.0) and found[4] - found[5] > found[2] - found[3]


def test_a_schedule_of_ones_own_is_one_entry(monkeypatch):
    monkeypatch.setitem(
        SCHEDULES, "root", lambda config, step, peak_step, max_steps: config.learning_rate * (peak_step / step) ** 0.5
    )
    assert rates("root", 8, 0.25, 0.0, 1.0) == pytest.approx([0.5, 1.0] + [(2 / step) ** 0.5 for step in range(3, 9)])


def test_a_schedule_that_is_not_there_is_an_error_that_names_those_that_are():
    with pytest.raises(InputError, match='optimizer.schedule is "mine", expected one of linear, cosine, wsd, constant'):
        validate(Config(optimizer=OptimizerConfig(schedule="mine")))


def test_the_linear_schedule_differs_from_transformers_as_its_help_says():
    steps, warmup = 50, 10
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_ratio=warmup / steps)
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_linear_schedule_with_warmup(torch_optimizer, warmup, steps)
    for s in range(1, steps + 1):
        rising = s / warmup, (s - 1) / warmup
        falling = (steps + 1 - s) / (steps + 1 - warmup), (steps + 1 - s) / (steps - warmup)
        ours, theirs = rising if s <= warmup else falling
        assert learning_rate_at(s, optimizer, steps) == pytest.approx(ours)
        assert schedule.get_last_lr()[0] == pytest.approx(theirs)
        torch_optimizer.step()
        schedule.step()
