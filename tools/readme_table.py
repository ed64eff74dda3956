"""The README's table and picture: attention mechanisms at one recipe, time against tokens.

    python -m tools.readme_table

draws docs/speed/tokens.png from docs/speed/readme; the table is written with the other generated
files (`tools.write_cards`). notes.yaml beside the records says which arms of which study it shows.
"""

import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm_xformers.files.figures import COLOURS, MARKERS, new_figure, save
from timm_xformers.files.tables import column_table, figure
from timm_xformers.studies.comparing.groups import interval_text, mean_text
from timm_xformers.studies.running.costs import read_costs
from timm_xformers.studies.running.definition import load_study
from timm_xformers.studies.running.folder import StudyFolder
from timm_xformers.studies.running.page import Row, study_rows
from tools.checkout import Checkout, this_checkout
from tools.speed_tables import read_part

__all__ = ["draw_tokens", "readme_table"]

# Exact attention first, in black.
LAYERS = {
    "softmax": "exact attention",
    "performer_softmax_m32": "Performer, 32 softmax features",
    "performer_relu_m64": "Performer, 64 relu features",
    "nystrom_l64_conv33": "Nyström, 64 landmarks",
    "linformer_k256": "Linformer, 256 slots",
    "local1d_w256": "windows of 256 tokens and neighbours",
    "local2d_w8_shifted": "windows of 8×8 tokens",
}


def readme_table(checkout: Checkout) -> str:
    """The arms of a study that notes.yaml names, with what has to be said of them; "" for none."""
    wanted = checkout.load_notes().get("readme")
    if wanted is None:
        return ""
    root = checkout.root / wanted["study"]
    study = load_study(root / "study.yaml")
    rows = {row.arm: row for row in study_rows(study, root)}
    columns: dict[str, Callable[[str], str]] = {
        "attention": wanted["arms"].get,
        f"{study.metric} top-1 %": lambda arm: _accuracy(rows[arm]),
        "seeds": lambda arm: str(len(rows[arm].group.runs) if rows[arm].group else 0),
        "parameters": lambda arm: figure(rows[arm].costs.get("params"), 0),
        "processor s": lambda arm: figure(rows[arm].costs.get("cpu_seconds"), 0),
        "images/s": lambda arm: _speed(rows[arm], rows[study.baseline]),
        "MiB": lambda arm: figure(rows[arm].costs.get("peak_mib"), 0),
    }
    lines = column_table(columns, list(wanted["arms"]), "lr")
    words = " ".join([wanted["conditions"].strip(), *_costs(read_costs(StudyFolder(root), study))])
    done = sum(len(row.group.runs) for row in rows.values() if row.group)
    if done < len(study.runs):
        words += f" Not complete: {done} of {len(study.runs)} runs are finished."
    return "\n".join([*lines, "", *textwrap.wrap(words, 120), ""])


def _accuracy(row: Row) -> str:
    """Mean ± standard deviation; a single run has its own interval instead."""
    found = row.group.score("test") if row.group else None
    single = found is not None and found.deviation is None
    return mean_text(found) + (f" ({interval_text(found)})" if single else "")


def _speed(row: Row, baseline: Row) -> str:
    """Images a second of a training step, where the machine was quiet for it and the baseline."""
    steady = row.costs.get("train_steady") and baseline.costs.get("train_steady")
    return figure(row.costs["train_img_s"], 0) if steady else ""


def _costs(costs: Mapping[str, Any]) -> list[str]:
    """What images/s and MiB are of."""
    if not costs:
        return ["Speed and memory have not been measured yet."]
    (entry,) = costs["data"].values()
    thread = "thread" if costs["threads"] == 1 else "threads"
    return [
        f"Speed (images/s, left out where the machine was not quiet) and memory (MiB) are those of "
        f"a training step of {entry['batch_size']} images, {entry['dtype']}, {costs['threads']} "
        f"{thread} of {costs['hardware']['cpu']}, torch {costs['versions']['torch']}."
    ]


def draw_tokens(folder: Path) -> Path:
    """Draw forward with backward against tokens, on the default allocator.

    Args:
        folder: Of the parts of `tools.speed_page`.
    """
    lines = [
        line
        for line in read_part(folder / "readme").lines
        if (line["pass"], line["allocator"]) == ("backward", "default")
    ]
    figure = new_figure(7, 5.6)
    axes = figure.subplots()
    for place, (layer, label) in enumerate(LAYERS.items()):
        points = sorted(
            (int(line["tokens"]), float(line["ms"])) for line in lines if line["contender"] == layer
        )
        exact = place == 0
        axes.plot(
            *zip(*points, strict=True),
            color="black" if exact else COLOURS[place - 1],
            marker=MARKERS[place],
            linewidth=2.4 if exact else 1.4,
            markersize=5,
            label=label,
        )
    sizes = sorted({int(line["tokens"]) for line in lines})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, ["" if size == 196 else f"{size:,}" for size in sizes])  # 256 is near
    axes.minorticks_off()
    axes.tick_params(labelsize=11)
    axes.set_xlabel("Tokens", fontsize=12)
    axes.set_ylabel("Milliseconds, forward and backward", fontsize=12)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    save(figure, folder / "tokens.png")
    return folder / "tokens.png"


def main() -> int:
    """Draw the picture."""
    print(draw_tokens(this_checkout().speed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
