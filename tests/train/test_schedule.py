from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.config import TrainConfig
from scalellm.train.schedule import learning_rate


def rates(**values: object) -> list[float]:
    train = TrainConfig.model_validate({"steps": 10, "learning_rate": 1.0, **values})
    return [learning_rate(step, train) for step in range(1, train.steps + 1)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(warmup_steps=4, schedule="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_ends_at_the_floor() -> None:
    assert rates(schedule="linear", min_learning_rate=0.1)[-1] == pytest.approx(0.1)
    assert rates(schedule="linear")[4] == pytest.approx(0.5)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(schedule="cosine")[4] == pytest.approx(0.5)
    assert rates(schedule="cosine", min_learning_rate=0.2)[-1] == pytest.approx(0.2)


def test_wsd_is_stable_then_decays() -> None:
    found = rates(schedule="wsd", warmup_steps=2, decay_steps=4)
    assert found[2:6] == [1.0] * 4
    assert found[6:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_a_warmup_longer_than_the_run_never_ends() -> None:
    """`train.steps=4` on a config made for a longer run is a trial, not a mistake."""
    assert rates(steps=4, warmup_steps=8) == [0.125, 0.25, 0.375, 0.5]


@given(
    st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    st.integers(1, 200),
    st.data(),
)
def test_rates_stay_between_zero_and_peak(schedule: str, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps // 2))
    found = rates(schedule=schedule, steps=steps, warmup_steps=warmup)
    assert all(0 <= rate <= 1 for rate in found)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
