"""Signals that ask a run to end: it saves its state at the next update, then stops."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "Stopped"]

# Ctrl-C; schedulers and `timeout`; a terminal that closes (there is none on Windows).
REQUESTS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Stopped(Exception):
    """A signal ended the run, whose state is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the first signal. A second Ctrl-C interrupts at once, as without this.

    Other signals often come twice (`timeout` sends one to the process and one to its group, systemd
    two kinds), and must not keep the state from being saved.

    Attributes:
        signum: The signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for signum in REQUESTS:
                # nohup ignores SIGHUP, and so it stays. Shells start background jobs with SIGINT
                # ignored, and a scheduler's must be heard.
                if signal.getsignal(signum) is signal.SIG_IGN and signum != signal.SIGINT:
                    continue
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
