"""Signals ask a run to stop; a second one, or one that is not for it, does what it does elsewhere."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pyglow_fast.train.interrupt import StopRequest


def test_a_second_signal_has_its_ordinary_effect() -> None:
    # A shell starts its background jobs with SIGINT ignored, and so this test may find it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_in_another_thread_are_left_alone() -> None:
    found = []

    def work() -> None:
        with StopRequest() as stop:
            found.append(stop.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
