"""Ctrl-C reaches a long command although a library swallows the exception."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from adasplash_cli.interrupts import interrupts


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_raised_at_once_and_handed_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts():
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is before


def test_one_that_was_swallowed_is_raised_at_the_next_check() -> None:
    with interrupts() as interrupt:
        interrupt.check()
        with contextlib.suppress(KeyboardInterrupt):
            press_ctrl_c()
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupt.check()


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupts() as interrupt:
            seen.append(signal.getsignal(signal.SIGINT))
            interrupt.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
