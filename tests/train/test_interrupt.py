"""Ctrl-C waits for the end of a step, a second one does not."""

import signal
import threading

import pytest

from upt_fast.train.interrupt import InterruptBetweenSteps


@pytest.fixture(autouse=True)
def _python_s_own_handler():
    """Also where the tests run as a shell's background job, which ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_the_first_waits_for_the_check():
    with InterruptBetweenSteps() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupts_at_once():
    with InterruptBetweenSteps():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_callers_own_handler_stays():
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with InterruptBetweenSteps() as interrupt:
            signal.raise_signal(signal.SIGINT)
            interrupt.check()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [1]


def test_other_threads_set_no_handler():
    errors = []

    def work():
        try:
            with InterruptBetweenSteps() as interrupt:
                interrupt.check()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
