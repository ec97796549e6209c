"""Ctrl-C and SIGTERM: the first one asks for an orderly end, the second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as a shell says it
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal asked this process to end; like KeyboardInterrupt, no ``except Exception`` holds it up."""

    def __init__(self, number: int) -> None:
        """Take the signal's number."""
        super().__init__(number)
        self.exit_code = EXIT.get(signal.Signals(number), 128 + number)
        self.words = WORDS.get(signal.Signals(number), "stopped")


class StopRequest:
    """Whether a signal has asked for an end, and which."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self.number: int | None = None

    def __bool__(self) -> bool:
        """Return whether an end was asked for."""
        return self.number is not None

    def asked(self) -> int:
        """Return the signal's number, 0 for none."""
        return self.number or 0

    def obey(self) -> None:
        """Raise Stopped if an end was asked for."""
        if self.number is not None:
            raise Stopped(self.number)


@contextmanager
def stop_is_raised() -> Iterator[None]:
    """In the body, a signal raises Stopped wherever the main thread is."""

    raised = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        _leave_at_once_next_time()
        if not raised:
            raised = True
            raise Stopped(number)

    with _handling(on_signal):
        yield


@contextmanager
def stop_is_noted(request: StopRequest) -> Iterator[None]:
    """In the body, a signal fills in the request, so that the body can end where nothing is lost."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.number = request.number or number
        _leave_at_once_next_time()

    with _handling(on_signal):
        yield


def _leave_at_once_next_time() -> None:
    # A terminal sends Ctrl-C to torchrun and to its processes, and torchrun then sends them another: that is still the first request.
    # What does not end by itself, torchrun kills after half a minute.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    for number in EXIT:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in EXIT}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
