"""curves.png: loss and accuracy over the epochs, the kept one marked."""

from pathlib import Path

from timm_xformers.files.atomic import write_file
from timm_xformers.records.results_csv import EpochRow
from timm_xformers.records.results_json import Record

__all__ = ["plot_curves"]

# Two of Okabe and Ito's colours, apart for every kind of colour vision; the dashes help in print.
TRAIN = {"color": "#0072B2", "linestyle": "--", "label": "training"}
VALIDATION = {"color": "#D55E00", "linestyle": "-", "label": "validation"}


def plot_curves(path: Path, rows: list[EpochRow], record: Record) -> None:
    """Draw the history of a run.

    Args:
        path: The image to write.
        rows: At least one epoch.
        record: Names the run and the epoch whose weights were kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    best_epoch = record.best_epoch or len(rows)
    title = f"{record.model} on {record.data}"
    if record.test_top1_percent is not None:
        title += f": {record.test_top1_percent:.2f} % on {record.test_images} test images"
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) == 1 else None
    series: tuple[tuple[str, list[float], list[float | None]], ...] = (
        (
            "Loss",
            [row.train_loss for row in rows],
            [row.val_loss for row in rows],
        ),
        (
            "Top-1 accuracy (%)",
            [row.train_top1_percent for row in rows],
            [row.val_top1_percent for row in rows],
        ),
    )
    for axes, (label, train, val) in zip(panels, series, strict=True):
        axes.plot(epochs, train, marker=marker, **TRAIN)
        known = [value for value in val if value is not None]
        if known:
            axes.plot(epochs, known, marker=marker, **VALIDATION)
        best_value = (known or train)[best_epoch - 1]
        axes.axvline(best_epoch, color="0.6", linewidth=1, zorder=0)
        axes.plot(
            [best_epoch],
            [best_value],
            marker="o",
            markersize=9,
            markerfacecolor="none",  # a ring, to leave the point inside visible
            color="black",
            linestyle="none",
            label=f"kept: epoch {best_epoch}, {best_value:.4g}",
        )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(label)
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    with write_file(path) as fresh:
        figure.savefig(fresh, dpi=120)
