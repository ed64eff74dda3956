"""An analysis for people: tables, CSV, Markdown and a plot."""

from pathlib import Path
from typing import Any

from timm_xformers.files.figures import COLOURS, MARKERS, literal, new_figure, save
from timm_xformers.files.tables import figure, markdown_table, text_table, write_csv

__all__ = ["ORIGINAL", "markdown", "plot", "tables", "write_tables"]

ORIGINAL = "original"
WHOLE_HEADS = ("all blocks", "features off by", "KL, nats", "agrees, %", "top-1, %")
# Divergences are drawn on a log scale, which has no place for none at all.
LEAST_KL = 1e-6


def tables(result: dict[str, Any]) -> str:
    """Both tables, what hurts most, and the proposal, for a terminal."""
    heads, rows = _whole(result)
    parts = [_title(result), text_table(heads, rows), "", _block_title(result)]
    heads, rows = _blocks(result)
    return "\n".join([*parts, text_table(heads, rows), "", *_words(result)])


def markdown(result: dict[str, Any]) -> str:
    """The same as Markdown, with where it was measured."""
    hardware, versions = result["hardware"], result["versions"]
    where = f"{hardware['cpu']}, {hardware['device']}"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [f"# {result['model']} with other attention", "", _title(result), ""]
    lines += [*markdown_table(*_whole(result)), "", _block_title(result), ""]
    lines += [*markdown_table(*_blocks(result)), "", *_words(result), ""]
    return "\n".join([*lines, f"Measured on {where}; {packages}; seed {result['seed']}.", ""])


def write_tables(output: Path, result: dict[str, Any]) -> None:
    """blocks.csv and models.csv, all figures in full."""
    write_csv(output / "blocks.csv", result["blocks"])
    rows = [
        {name: entry[name] for name in result["whole"][0]}
        | {"img_size": size}
        | _speed(result, size).get(entry["mechanism"], {})
        for size in result["time"]["img_sizes"]
        for entry in _entries(result)
    ]
    write_csv(
        output / "models.csv", rows, list(dict.fromkeys(name for row in rows for name in row))
    )


def _entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses of the whole model: as it is, with each mechanism, and as proposed."""
    return [*result["whole"], *([result["proposal"]] if "proposal" in result else [])]


def _speed(result: dict[str, Any], size: int) -> dict[str, dict[str, Any]]:
    """Time and memory of the same at a size, by name; what failed is not there."""
    rows = [*result["speed"], *result.get("proposal", {}).get("speed", [])]
    return {row["mechanism"]: row for row in rows if row["img_size"] == size}


def _mechanisms(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["mechanism"] for row in result["blocks"]))


def _title(result: dict[str, Any]) -> str:
    time = result["time"]
    return (
        f"{literal(result['model'])} on {result['images']} {result['split']} images of "
        f"{result['data']} at {result['img_size']} pixels, nothing trained; times as fast at "
        f"{', '.join(map(str, time['img_sizes']))} pixels (quartiles) and MiB at the largest, "
        f"forward, batch {time['batch_size']}, {time['dtype']}, threads {time['threads']}."
    )


def _whole(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    sizes = result["time"]["img_sizes"]
    rows = []
    for entry in _entries(result):
        at = [_speed(result, size).get(entry["mechanism"]) for size in sizes]
        peak = (at[-1] or {}).get("peak_mib")
        rows.append(
            [
                entry["mechanism"],
                f"{100 * entry['feature_error']:.1f} %",
                f"{entry['kl_nats']:.4f}",
                f"{entry['agreement_percent']:.1f}",
                figure(entry["top1_percent"], 1) or "no labels",
                *map(_times, at),
                figure(peak, 0),
            ]
        )
    return [*WHOLE_HEADS, *(f"× at {size}" for size in sizes), "MiB"], rows


def _times(row: dict[str, Any] | None) -> str:
    if row is None:
        return "failed"
    if row["mechanism"] == ORIGINAL:
        text = f"{row['ms']:.3g} ms"
    else:
        low, high = row["times_as_fast_quartiles"]
        text = f"{row['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
    return f"{text} void" if row["void"] else text


def _block_title(result: dict[str, Any]) -> str:
    return (
        "One block replaced alone: KL of the whole model's classes in nats, and in brackets by how "
        "much the output of the attention is off on the original's tokens."
    )


def _blocks(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = _mechanisms(result)
    by_block: dict[int, dict[str, Any]] = {}
    for row in result["blocks"]:
        by_block.setdefault(row["block"], {})[row["mechanism"]] = row
    rows = [
        [
            str(number),
            *(f"{own[n]['kl_nats']:.4f} ({100 * own[n]['output_error']:.0f} %)" for n in names),
        ]
        for number, own in by_block.items()
    ]
    return ["block", *names], rows


def _words(result: dict[str, Any]) -> list[str]:
    lines = []
    for name in _mechanisms(result):
        mine = [row for row in result["blocks"] if row["mechanism"] == name]
        worst = sorted(mine, key=lambda row: row["kl_nats"], reverse=True)[:3]
        numbers = ", ".join(str(row["block"]) for row in worst)
        lines.append(f"Hurt most alone by {name}: blocks {numbers}.")
    lines += [f"Block {number} is kept: it {why}." for number, why in result["kept"].items()]
    if result["feature_images"] < result["images"]:
        lines.append(f"Features are of the first {result['feature_images']} images.")
    sizes = result["time"]["img_sizes"]
    if any(row["void"] for size in sizes for row in _speed(result, size).values()):
        lines.append(
            "void: the original's times were not steady (quartiles further than 10 % from the "
            "median); measure again on a quieter machine, or with more --rounds."
        )
    if "proposal" not in result:
        return [*lines, "No proposal: name a budget, such as --budget 2x."]
    found = result["proposal"]
    gain = found["measured_gain"]
    what = "as fast" if not found["budget"].startswith("memory") else "less memory"
    seen = "not measured" if gain is None else f"{gain:.2f} times {what}"
    blocks = ", ".join(f"{name} in {numbers}" for numbers, name in found["blocks"].items())
    blocks = f"{blocks}; the others stay" if blocks else "nothing replaced"
    lines.append(
        f"Proposal for {found['budget']} at {found['img_size']} pixels, of "
        f"{found['sets_tried']} sets of blocks that were run: {blocks}. "
        f"Measured: {seen}, where {found['expected_gain']:.2f} was expected; it agrees on "
        f"{found['agreement_percent']:.1f} % of the images."
    )
    if not found["met"]:
        lines.append(
            f"The budget {found['budget']} cannot be met with these mechanisms at this size, and "
            "this is the nearest found; try larger images, other mechanisms or a smaller budget."
        )
    return [*lines, "To put it in and repair it:", f"  {found['command']}"]


def plot(path: Path, result: dict[str, Any]) -> None:
    """Divergence against speed, and divergence of each block alone as a heat map."""
    from matplotlib.colors import LogNorm

    names = _mechanisms(result)
    numbers = list(dict.fromkeys(row["block"] for row in result["blocks"]))
    picture = new_figure(6.0 + 0.95 * len(names) + 2.5, max(4.4, 1.6 + 0.3 * len(numbers)))
    left, right = picture.subplots(1, 2, width_ratios=[5, 1.2 + 0.95 * len(names)])
    _scatter(left, result, names)
    alone = {(row["block"], row["mechanism"]): row["kl_nats"] for row in result["blocks"]}
    values = [[max(alone[number, name], LEAST_KL) for name in names] for number in numbers]
    lowest, highest = min(map(min, values)), max(map(max, values))
    heat = right.imshow(
        values, cmap="YlOrRd", norm=LogNorm(lowest, max(highest, 1.01 * lowest)), aspect="auto"
    )
    for row, own in enumerate(values):
        for column, value in enumerate(own):
            dark = value > (lowest * highest**3) ** 0.25
            words = f"{value:.2g}" if value > LEAST_KL else f"≤ {LEAST_KL:g}"
            colour = "white" if dark else "black"
            right.text(column, row, words, ha="center", va="center", color=colour, size=8)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    right.set_yticks(range(len(numbers)), [str(number) for number in numbers])
    right.set_ylabel("Block")
    right.set_title("One block replaced alone", fontsize=10)
    picture.colorbar(heat, ax=right, label="KL of predicted classes (nats)")
    picture.suptitle(
        f"{literal(result['model'], 30, 30)}, {result['images']} {result['split']} images of "
        f"{literal(result['data'])}, nothing trained",
        fontsize=10,
    )
    save(picture, path)


def _scatter(axes: Any, result: dict[str, Any], names: list[str]) -> None:
    size = result["time"]["img_sizes"][-1]
    entries = {entry["mechanism"]: entry for entry in _entries(result)}
    proposal = result.get("proposal")
    at = _speed(result, size)
    for place, name in enumerate([*names, "proposal"]):
        if name not in at or name not in entries:
            continue
        row, entry = at[name], entries[name]
        low, high = row["times_as_fast_quartiles"]
        middle = row["times_as_fast"]
        axes.errorbar(
            [middle],
            [max(entry["kl_nats"], LEAST_KL)],
            xerr=[[middle - low], [high - middle]],
            marker="*" if name == "proposal" else MARKERS[place % len(MARKERS)],
            markersize=13 if name == "proposal" else 7,
            color="black" if name == "proposal" else COLOURS[place % len(COLOURS)],
            linestyle="none",
            label=f"{name} (agrees {entry['agreement_percent']:.0f} %)",
        )
    axes.axvline(1.0, color="0.6", linewidth=1)
    if proposal is not None and not proposal["budget"].startswith("memory"):
        factor = float(proposal["budget"].removesuffix("x"))
        axes.axvline(factor, color="0.3", linestyle="--", linewidth=1, label=f"budget {factor:g}x")
    axes.set_yscale("log")
    axes.set_xlabel(f"Times as fast as the original, {size} pixels (quartiles)")
    axes.set_ylabel("KL of predicted classes (nats)")
    title = "All blocks replaced" + ("" if proposal is None else ", and the proposal")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
