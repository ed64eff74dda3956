"""The README's table and picture: attention mechanisms at one recipe, time against tokens.

    python -m tools.readme_table

draws docs/speed/tokens.png from docs/speed/readme; the table is written with the other generated
files (`tools.write_cards`). notes.yaml beside the records says which runs it shows, and which
folder of `tools.speed_page` their costs come from.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from timm_xformers.files.figures import COLOURS, MARKERS, new_figure, save
from timm_xformers.files.tables import markdown_table
from timm_xformers.records.results_json import Record
from timm_xformers.weights import read_manifest
from tools.checkout import Checkout, this_checkout
from tools.speed_tables import Part, read_part

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
    """Rows as notes.yaml lists them, with what one line below the table has to say; "" for none."""
    wanted = checkout.load_notes().get("readme")
    if wanted is None:
        return ""
    part = read_part(checkout.root / wanted["costs"]) if "costs" in wanted else Part([], [])
    costs = _costs(part)
    cards = {
        (entry.model, entry.tag, entry.recipe_hash): entry.card
        for entry in read_manifest(checkout.weights).values()
    }
    rows, records = [], []
    for model, recipe_hash in wanted["rows"].items():
        runs = [
            record
            for record in checkout.training_records()[wanted["data"]]
            if (record.model, record.recipe_hash) == (model, recipe_hash)
        ]
        card = cards.get((model, wanted["data"], recipe_hash))
        if card and len(runs) == 1:  # as the packaged weights load, which a reader can repeat
            runs = [checkout.load_float16_record(card)]
        records += runs
        cost = costs.get(model, {})
        rows.append(
            (
                f"`{model}`",
                wanted["mixes"][model],
                _accuracy(runs),
                str(len(runs)),
                f"{float(cost['per_second']):.3g}" if cost else "",
                f"{float(cost['peak_mib']):.0f}" if cost else "",
            )
        )
    heads = ("model", "attention", "test top-1 %", "seeds", "images/s", "MiB")
    lines = markdown_table(heads, rows, "llrrrr")
    return "\n".join([*lines, "", *_caption(wanted, records, part), ""])


def _accuracy(runs: list[Record]) -> str:
    """Mean ± standard deviation; one run has its own interval instead."""
    tested = [run.test_top1_percent for run in runs if run.test_top1_percent is not None]
    if len(tested) > 1:
        return f"{statistics.mean(tested):.2f} ± {statistics.stdev(tested):.2f}"
    low, high = runs[0].test_top1_interval_percent or (0.0, 0.0)
    return f"{tested[0]:.2f} ({low:.1f} to {high:.1f})"


def _caption(wanted: dict[str, Any], records: list[Record], part: Part) -> list[str]:
    counts = {(record.model, record.recipe_hash) for record in records}
    single = len(records) == len(counts)
    spread = (
        "One seed each, so the intervals in brackets are those of the test images alone (95 %)."
        if single
        else "± is the standard deviation over seeds (n − 1)."
    )
    images = records[0].test_images
    conditions = str(wanted["conditions"]).strip()
    if part.origins:
        hardware, versions = (part.origins[0][key] for key in ("hardware", "versions"))
        conditions = conditions.format(cpu=hardware["cpu"], torch=versions["torch"])
    return [
        f"Data set {wanted['data']}, {images:,} test images, one recipe (`{wanted['recipe']}`).",
        spread,
        *conditions.splitlines(),
    ]


def _costs(part: Part) -> dict[str, dict[str, Any]]:
    """Steady training steps of our models, with the allocator as `timm-xformers train` has it."""
    wanted = ("", "train", "tuned", "False")
    names = ("package", "pass", "allocator", "void")
    return {
        line["contender"]: dict(line)
        for line in part.lines
        if tuple(line[name] for name in names) == wanted
    }


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
