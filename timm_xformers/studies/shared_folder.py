"""A folder that any number of processes work in, started together or one after the other.

What is finished is a file. What is being worked on is a lock that the system takes back when its
holder dies, however it dies. So there is nothing to repair after a crash.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from timm_xformers.data.loader import usable_cores

__all__ = ["POLL_SECONDS", "SharedFolder", "threads_for"]

# Between two looks at whether others have finished what is left.
POLL_SECONDS = 0.2


def threads_for(workers: int) -> int:
    """Threads of a process if nobody says: the cores, shared out."""
    return max(1, min(torch.get_num_threads(), usable_cores()) // workers)


class SharedFolder:
    """Locks and a log; ``locks/`` must exist.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def log(self) -> Path:
        """A line for everything that was finished."""
        return self.root / "log.txt"

    @contextlib.contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold a name, if nobody else does; its holder's end, even a sudden one, frees it.

        Args:
            name: What is claimed.
            wait: Until it is free.

        Yields:
            Whether it is ours; always so after waiting.
        """
        lock = FileLock(self.root / "locks" / f"{name}.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire(poll_interval=POLL_SECONDS)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def say(self, text: str) -> None:
        """Show a line and log it."""
        print(text, file=sys.stderr, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
