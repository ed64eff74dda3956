"""Peak memory of one piece of work: of the GPU, or of the process on a CPU."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["memory_marks"]


def memory_marks(device: str) -> tuple[int, Callable[[], int]]:
    """Bytes held now, and a function for their peak since.

    Args:
        device: ``cuda``, or ``cpu`` for the process itself. On Linux its peak begins anew; where a
            kernel does not allow that, and elsewhere, it is the peak since the process began.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    status = Path("/proc/self/status")
    if status.exists():

        def read(field: str) -> int:
            found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)
            return int(found[1]) * 1024 if found else 0

        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            pass
        else:
            return read("VmRSS"), lambda: read("VmHWM")
        return read("VmHWM"), lambda: read("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024

    def highest() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    return highest(), highest
