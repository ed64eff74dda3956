"""Ctrl-C and SIGTERM as requests: the run saves at its next update and ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest", "Stopped"]


class Stopped(Exception):
    """A signal ended the run, whose state is saved.

    Args:
        message: Where the state is and how to go on.
        signum: The signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the first signal; the second one interrupts at once, as without this.

    Attributes:
        signum: The signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
