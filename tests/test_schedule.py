"""Learning rates, and soft channels, from epoch to epoch."""

from itertools import pairwise

import pytest

from deepshare.train.schedule import Schedule, soft_channels_at


def test_linear_schedule_ends_at_three_quarters():
    rate = Schedule("linear", 100, 0.05, 5e-4)
    rates = [rate.at(epoch) for epoch in range(100)]
    assert rates[0] == 0.05
    assert rates[74] > rates[75] == rates[99] == 5e-4
    steps = {round(earlier - later, 12) for earlier, later in pairwise(rates[:76])}
    assert steps == {round((0.05 - 5e-4) / 75, 12)}


def test_cosine_schedule_runs_from_end_to_end():
    rate = Schedule("cosine", 11, 1.0, 0.1)
    assert rate.at(0) == 1.0
    assert rate.at(5) == pytest.approx(0.55)
    assert rate.at(10) == pytest.approx(0.1)
    assert Schedule("cosine", 1, 1.0, 0.1).at(0) == 1.0


@pytest.mark.parametrize("channels", [1, 16, 64, 511])
@pytest.mark.parametrize("switching", [1, 2, 7, 150])
def test_switch_goes_down_to_none_by_equal_shares(channels, switching):
    soft = [soft_channels_at(epoch, switching, channels) for epoch in range(switching + 2)]
    assert soft[switching - 1 :] == [0, 0, 0]
    steps = [before - after for before, after in pairwise([channels, *soft])]
    assert min(steps) >= 0
    assert max(steps[:switching]) - min(steps[:switching]) <= 1
