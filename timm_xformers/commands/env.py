"""``timm-xformers env``: what a report of a fault needs to say about the machine."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

HELP = "show versions, devices, threads and extras, for a report of a fault"

PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "safetensors", "huggingface-hub", "accelerate"),
    *("triton", "transformers"),
)
# Variables that change what PyTorch, the allocator or the Hub's client do; none holds a secret.
VARIABLES = re.compile(
    r"(OMP|MKL|GOMP|KMP|MALLOC|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|NVIDIA|NCCL|TRITON|TIMM|ACCELERATE)_"
    r"\w+|LD_PRELOAD|HF_HOME|HF_HUB_OFFLINE|SLURM_CPUS_PER_TASK"
)
# Instruction sets that decide which kernels run.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd")
REQUIREMENT = re.compile(r"^([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)['\"]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print what there is; a missing package is named, never an error."""
    found = {
        "timm-xformers": _package(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        **_torch(),
        "processor": _processor(),
        "allocator": _allocator(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
        "extras": _extras(),
        "data": _data_folders(),
    }
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
            continue
        print(f"{name}:{'' if value else ' none'}")
        for key, entry in value.items():
            print(f"  {key}: {entry}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _package() -> str:
    import timm_xformers

    folder = Path(timm_xformers.__file__).parent
    return f"{timm_xformers.__version__} ({folder})"


def _torch() -> dict[str, Any]:
    import timm
    import torch

    devices = [
        f"{torch.cuda.get_device_name(i)}, {p.total_memory / 2**30:.0f} GiB, "
        f"compute capability {p.major}.{p.minor}"
        for i, p in enumerate(map(torch.cuda.get_device_properties, range(_gpus())))
    ]
    if torch.backends.mps.is_available():
        devices.append("Apple MPS")
    build = torch.__config__.show()
    mkldnn: Any = torch.backends.mkldnn
    between = torch.get_num_interop_threads()
    blas = re.search(r"BLAS_INFO=(\w+)", build)
    ours = [
        name
        for name in timm.list_models(exclude_filters="retrofit")  # stands for another name
        if "timm_xformers" in timm.model_entrypoint(name).__module__
    ]
    return {
        "devices": "; ".join(devices) or "CPU only",
        "CUDA": f"{torch.version.cuda or 'none'} (driver in use: {torch.cuda.is_available()})",
        "threads": f"{torch.get_num_threads()} ({between} between operations)",
        "BLAS": f"{blas[1] if blas else 'unknown'}, oneDNN {mkldnn.is_available()}",
        "PyTorch's kernels": torch.backends.cpu.get_cpu_capability(),
        "our models in timm": f"{len(ours)} (PyTorch imports the package: {_hook()})",
    }


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _hook() -> str:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return "no, TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    points = importlib.metadata.entry_points(group="torch.backends")
    return "yes" if any(p.name == "timm_xformers" for p in points) else "no, it is not installed"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*: (.*)$", text, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, flags=re.MULTILINE)
    known = flags[1].split() if flags else []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sets = " ".join(entry for entry in INSTRUCTIONS if entry in known)
    label = name[1] if name else platform.processor() or platform.machine()
    return f"{label}, {usable} of {os.cpu_count()} cores usable{f', {sets}' if sets else ''}"


def _allocator() -> str:
    preloaded = os.environ.get("LD_PRELOAD", "")
    other = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preloaded), "")
    return other or " ".join(platform.libc_ver()) or "the system's"


def _extras() -> dict[str, str]:
    """What each extra lacks."""
    try:
        requirements = importlib.metadata.requires("timm-xformers") or []
    except importlib.metadata.PackageNotFoundError:
        return {"unknown": "the package runs from a folder and is not installed"}
    lacking: dict[str, list[str]] = {}
    for requirement in requirements:
        found = REQUIREMENT.match(requirement)
        if found and not found[1].startswith("timm-xformers"):
            missing = lacking.setdefault(found[2], [])
            if _version(found[1]) == "not installed":
                missing.append(found[1])
    return {
        extra: f"lacks {', '.join(missing)}" if missing else "installed"
        for extra, missing in lacking.items()
    }


def _data_folders() -> dict[str, str]:
    """Known data sets in the usual places, for --data-dir."""
    from timm_xformers.data.known_sets import KNOWN_SETS

    places = [Path(), Path("data"), Path.home() / "data"]
    return {
        name: str(place.resolve())
        for name, known in KNOWN_SETS.items()
        for place in reversed(places)
        if known.layout and (place / known.layout).exists()
    }
