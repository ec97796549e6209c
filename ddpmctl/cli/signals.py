"""Ctrl-C and SIGTERM: the first one requests a clean stop, the second one kills the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as in shells
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal requested a stop; like KeyboardInterrupt, ``except Exception`` does not catch it."""

    def __init__(self, number: int) -> None:
        """Create it from the signal's number."""
        super().__init__(number)
        self.exit_code = EXIT.get(signal.Signals(number), 128 + number)
        self.words = WORDS.get(signal.Signals(number), "stopped")


@dataclass
class StopRequest:
    """What signals said to this process.

    Attributes:
        number: of the signal that requested a stop, 0 for none.
        continued: how often the process went on after it was halted, as by Ctrl-Z and ``fg``.
    """

    number: int = 0
    continued: int = 0

    def obey(self, words: str = "") -> None:
        """Raise Stopped if a stop is requested; ``words`` says what was stopped and what is kept."""
        if self.number:
            stop = Stopped(self.number)
            stop.words = words or stop.words
            raise stop


@contextmanager
def when_stopped(kept: str) -> Iterator[None]:
    """In the body, a stop also says what is kept."""
    try:
        yield
    except Stopped as stop:
        stop.words += f"; {kept}"
        raise


@contextmanager
def stop_is_raised() -> Iterator[None]:
    """In the body, the first signal raises Stopped in the main thread."""
    raised = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        _restore_default_handlers()
        if not raised:
            raised = True
            raise Stopped(number)

    with _handling(on_signal):
        yield


@contextmanager
def stop_is_noted(request: StopRequest) -> Iterator[None]:
    """In the body, a signal sets the request, so that the body can stop at a safe point; SIGCONT is counted."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.number = request.number or number
        _restore_default_handlers()

    def on_continue(number: int, frame: FrameType | None) -> None:
        request.continued += 1

    with _handling(on_signal), _handling(on_continue, [signal.SIGCONT] if hasattr(signal, "SIGCONT") else []):
        yield


def _restore_default_handlers() -> None:
    # A terminal sends Ctrl-C to torchrun and its processes, and torchrun sends a second signal, which must not kill them.
    # torchrun itself kills processes that do not stop within 30 seconds.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    for number in EXIT:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handling(handler: object, numbers: Iterable[int] = EXIT) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
