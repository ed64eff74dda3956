"""The figures of docs/speed.md: measured in parts, and written into the page.

    python -m tools.speed_page measure [PART ...] [--output FOLDER]

measures on one thread of this machine, which should do nothing else, all parts or some, one after
the other. Each leaves benchmark.csv and origin.json in FOLDER/PART; a part that was interrupted
goes on. Then `python -m tools.write_cards` writes the page's tables anew.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_xformers.benchmarking.settings import BASELINE, CONTENDERS, PRESETS, UNFUSED, Settings
from timm_xformers.errors import UsageError, UserError, nearest
from timm_xformers.files.atomic import write_text
from tools.checkout import this_checkout
from tools.readme_table import draw_tokens
from tools.speed_tables import (
    CSV_FILE,
    ORIGIN_FILE,
    growth_table,
    layers_table,
    losses_table,
    models_table,
    origin_list,
    package_list,
    read_part,
    short_table,
    summary,
)

__all__ = ["PARTS", "main", "measure_part", "speed_blocks"]

MECHANISMS = tuple(name for name in CONTENDERS if name != UNFUSED)
BOTH = {"allocators": ("default", "tuned"), "memory": False}
# Part of the page -> settings of its benchmarks, the most wanted first. All take some 27 minutes of
# a quiet core with AVX2: 7, 7, 6, 1, 4 and 3.
PARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "readme": (PRESETS["readme"],),
    "models": (
        {
            "models": (
                "vix_softmax",
                "vix_performer_softmax_m32",
                "vix_performer_relu_m64",
                "vix_nystrom",
                "vix_linformer",
            ),
            "passes": ("train",),
            "batch_size": 16,
            "allocators": ("default", "tuned"),
            "rounds": 5,
            "limit_seconds": 75.0,
        },
    ),
    "layers": (
        # With a class token, as a ViT has it, where the other package takes any length.
        {"contenders": MECHANISMS[:4], "tokens": (1025,), "limit_seconds": 25.0, **BOTH},
        {"contenders": MECHANISMS[4:], "tokens": (1024,), "limit_seconds": 25.0, **BOTH},
        {
            "contenders": (*MECHANISMS[:2], "performer_softmax_m64"),
            "shape": "S64",
            "tokens": (1025,),
            "limit_seconds": 25.0,
            **BOTH,
        },
        {
            "contenders": MECHANISMS,
            "tokens": (4096,),
            "passes": ("forward",),
            "rounds": 5,
            "limit_seconds": 40.0,
            **BOTH,
        },
    ),
    "short": (
        {
            "contenders": (*MECHANISMS[:3], "linformer_k64", MECHANISMS[-1]),
            "tokens": (64, 144, 196, 256),
            "peers": False,
            "memory": False,
        },
    ),
    "growth": (PRESETS["growth"],),
    "batch64": (
        {
            "contenders": MECHANISMS[:1],
            "tokens": (1025,),
            "batch_size": 64,
            "rounds": 5,
            "limit_seconds": 40.0,
            **BOTH,
        },
    ),
}


def measure_part(name: str, cases: Sequence[dict[str, Any]], output: Path) -> None:
    """Measure a part of the page.

    Args:
        name: Of the part, and of the folder that is written when all of it is there.
        cases: Settings of its benchmarks.
        output: Folder of the parts.

    Raises:
        UserError: It cannot be measured.
    """
    from timm_xformers.benchmarking.benchmark import Benchmark

    started = time.perf_counter()
    scratch = output / f"{name}.unfinished"
    texts: list[str] = []
    origins = []
    for number, case in enumerate(cases):
        folder = scratch / str(number)
        if not _is_complete(folder, case):
            Benchmark(Settings(output=folder, device="cpu", **case)).run()
        found = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
        # What differs between machines of the same kind stays out, and so do the rows: the CSV.
        found["settings"].pop("output")
        origins.append({key: value for key, value in found.items() if key != "rows"})
        text = (folder / CSV_FILE).read_text(encoding="utf-8")
        texts.append(text if not texts else text.partition("\n")[2])
    (output / name).mkdir(exist_ok=True)
    write_text(output / name / CSV_FILE, "".join(texts))
    write_text(output / name / ORIGIN_FILE, json.dumps(origins, indent=1) + "\n")
    shutil.rmtree(scratch)
    print(f"{name}: {time.perf_counter() - started:.0f} s, in {output / name}", flush=True)


def _is_complete(folder: Path, case: dict[str, Any]) -> bool:
    """Whether a benchmark of these settings has ended there."""
    path = folder / "benchmark.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    same = json.loads(json.dumps(case)).items() <= found["settings"].items()
    return bool(found["complete"] and same)


def speed_blocks(folder: Path) -> dict[str, str]:
    """What stands between the page's markers ``<!-- speed NAME -->``, by name.

    Args:
        folder: Of the parts.
    """
    parts = {name: read_part(folder / name) for name in PARTS}
    measured = [name for name, part in parts.items() if part.lines]
    tables = {
        "readme": lambda part: summary(part.lines, BASELINE).splitlines(),
        "models": models_table,
        "layers": layers_table,
        "short": short_table,
        "growth": growth_table,
    }
    shown = dict(parts)
    if "layers" in measured:
        shown["layers"] += parts["batch64"]
    blocks = {
        name: table(shown[name]) if name in measured else _missing(name)
        for name, table in tables.items()
    }
    found = {name: parts[name] for name in measured}
    blocks["origins"] = origin_list(found) if found else _missing("")
    blocks["packages"] = package_list(found.values()) if found else _missing("")
    blocks["losses"] = losses_table(found.values()) if found else _missing("")
    return {f"speed {name}": "\n".join([*lines, ""]) for name, lines in blocks.items()}


def _missing(part: str) -> list[str]:
    command = f"python -m tools.speed_page measure {part}".strip()
    return [f"Not measured yet: `{command}`."]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tools.speed_page", description=__doc__)
    measure = parser.add_subparsers(required=True).add_parser("measure")
    measure.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    measure.add_argument("--output", type=Path, metavar="FOLDER", help="default docs/speed")
    args = parser.parse_args(argv)
    try:
        output = args.output or this_checkout().speed
        for name in args.parts:
            if name not in PARTS:
                raise UsageError(
                    f"There is no part {name!r}{nearest(name, PARTS)}; choose from "
                    f"{', '.join(PARTS)}."
                )
        for name in args.parts or PARTS:
            measure_part(name, PARTS[name], output)
            if name == "readme":
                print(draw_tokens(output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
