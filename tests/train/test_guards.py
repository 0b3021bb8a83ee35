from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from scalellm.errors import DivergedError
from scalellm.train.guards import EarlyStopping, NonFiniteGuard, StopSignal


def test_first_signal_is_a_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: the launcher's copy, not impatience
        assert stop.received is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_second_signal_ends_the_process() -> None:
    code = """
import os, signal, time
from scalellm.train.guards import StopSignal
StopSignal.REPEAT_S = 0.0
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM


def test_guard_counts_only_steps_in_a_row() -> None:
    guard = NonFiniteGuard(limit=2)
    guard.observe(1, True, float("nan"))
    guard.observe(2, False, 1.0)
    guard.observe(3, True, float("nan"))
    with pytest.raises(DivergedError, match=r"the 2 steps up to 4: the run has diverged; lower"):
        guard.observe(4, True, float("inf"))


def test_early_stopping_waits_for_patience_and_survives_a_restart() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    for loss in (5.0, 4.0, 3.95):  # the last one is better, but by less than min_delta
        stopping.observe(loss)
    again = EarlyStopping(patience=2, min_delta=0.1)
    again.load(stopping.state())
    assert not again.should_stop
    again.observe(3.92)
    assert again.should_stop and again.best_loss == 4.0


def test_no_patience_never_stops() -> None:
    stopping = EarlyStopping(patience=0, min_delta=0.0)
    for _ in range(5):
        stopping.observe(1.0)
    assert not stopping.should_stop
