"""Ctrl-C is Ctrl-C, whatever a library makes of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from compressor.interrupts import Interruptible


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallowing_library() -> None:
    """What safetensors does when its callback into Python is interrupted."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_error_after_an_interruption_is_the_interruption() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Interruptible():
        swallowing_library()
    assert isinstance(caught.value.__cause__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Finicky:
    """Its destructor is where the interruption strikes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_destructor_lost_is_found() -> None:
    with Interruptible() as interruptible:
        interruptible.check()
        Finicky()
        with pytest.raises(KeyboardInterrupt):
            interruptible.check()


def test_a_plain_interruption_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt), Interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nested_the_inner_one_converts_first() -> None:
    seen: list[type[BaseException]] = []

    def work() -> None:
        try:
            with Interruptible():
                swallowing_library()
        except KeyboardInterrupt as error:
            seen.append(type(error))
            raise

    with pytest.raises(KeyboardInterrupt), Interruptible():
        work()
    assert seen == [KeyboardInterrupt]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_an_interruption_stays_itself() -> None:
    with pytest.raises(ValueError, match="own"), Interruptible():
        raise ValueError("its own")


def test_another_handler_is_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruptible():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_are_left_alone() -> None:
    entered: list[bool] = []

    def work() -> None:
        with Interruptible():
            entered.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
