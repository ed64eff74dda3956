"""Which configuration is best, by the rule below, and the files that show it.

Rule: the highest mean validation top-1 over the folds; among equals the lower mean loss, then fewer
parameters, then the one that came first. Only configurations that finished every fold take part.
"""

import csv
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_xformers.files.atomic import write_file, write_text
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import Record
from timm_xformers.studies.selecting.folds import FoldResult

__all__ = ["Summary", "best_of", "plot_selection", "summarize", "write_csv", "write_markdown"]

# More rows than this cannot be read in one image.
MOST_ROWS = 40
# Two of Okabe and Ito's colours, apart for every kind of colour vision.
COLOR, BEST_COLOR = "#0072B2", "#D55E00"


@dataclasses.dataclass(frozen=True)
class Summary:
    """One configuration over its folds.

    Attributes:
        number: Its place in the search, from 1.
        values: What it sets, by recipe key.
        results: One for each fold that was begun, in order.
        complete: Whether every fold was finished.
    """

    number: int
    values: dict[str, Any]
    results: list[FoldResult]
    complete: bool

    @property
    def top1_percent(self) -> float:
        """Mean of the last epoch's accuracy over the folds."""
        return statistics.fmean(self.fold_top1_percent)

    @property
    def top1_deviation(self) -> float | None:
        """Sample standard deviation over the folds (n - 1); None for one fold."""
        return _deviation(self.fold_top1_percent)

    @property
    def loss(self) -> float:
        """Mean of the last epoch's validation loss over the folds."""
        return statistics.fmean(self.fold_losses)

    @property
    def loss_deviation(self) -> float | None:
        """Sample standard deviation of it."""
        return _deviation(self.fold_losses)

    @property
    def fold_top1_percent(self) -> list[float]:
        """Accuracy of each fold after its last epoch."""
        return [result.val_top1_percent[-1] for result in self.results]

    @property
    def fold_losses(self) -> list[float]:
        """Loss of each fold after its last epoch."""
        return [result.val_loss[-1] for result in self.results]

    @property
    def params(self) -> int | None:
        """Parameters of the model; None if it could not be built."""
        return next((result.params for result in self.results), None)

    @property
    def label(self) -> str:
        """What it sets, in few words."""
        return ", ".join(f"{key.rpartition('.')[2]} {_text(v)}" for key, v in self.values.items())


def summarize(
    configurations: Sequence[dict[str, Any]], results: Sequence[Sequence[FoldResult]], folds: int
) -> list[Summary]:
    """Put results beside their configurations.

    Args:
        configurations: In the order in which they are counted.
        results: Those of each configuration, by fold.
        folds: How many a complete configuration has.
    """
    return [
        Summary(
            number,
            values,
            list(found),
            len(found) == folds and all(result.state == "complete" for result in found),
        )
        for number, (values, found) in enumerate(zip(configurations, results, strict=True), start=1)
    ]


def best_of(summaries: Sequence[Summary]) -> Summary | None:
    """Apply the rule; None if no configuration is complete."""
    return min(
        (summary for summary in summaries if summary.complete),
        key=lambda summary: (-summary.top1_percent, summary.loss, summary.params, summary.number),
        default=None,
    )


def write_csv(path: Path, summaries: Sequence[Summary], keys: Sequence[str]) -> None:
    """One row for every configuration and fold that was begun."""
    with write_file(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = "state,epochs,val_top1_percent,val_loss,val_images,train_images,params,seconds"
        writer.writerow(["configuration", *keys, "fold", *head.split(",")])
        for summary in summaries:
            for result in summary.results:
                measured = bool(result.val_loss)
                writer.writerow(
                    [
                        summary.number,
                        *[
                            _exact(summary.values[key]) if key in summary.values else ""
                            for key in keys
                        ],
                        result.fold,
                        result.state,
                        result.epochs,
                        repr(result.val_top1_percent[-1]) if measured else "",
                        repr(result.val_loss[-1]) if measured else "",
                        result.val_images,
                        result.train_images,
                        "" if result.params is None else result.params,
                        result.seconds,
                    ]
                )


def write_markdown(
    path: Path, recipe: Recipe, summaries: Sequence[Summary], best: Summary, record: Record | None
) -> None:
    """The table, the rule, and what came of the best.

    Args:
        path: The file.
        recipe: What all configurations share.
        summaries: All configurations.
        best: The chosen one.
        record: Of the final training, if there was one.
    """
    folds = len(best.results)
    images = best.results[0].train_images + best.results[0].val_images
    held_out = (
        f"{folds} stratified folds of {images:,} training images"
        if folds > 1
        else f"{best.results[0].val_images:,} of {images:,} training images held out"
    )
    lines = [
        f"# Selection: {recipe.model} on {recipe.data}",
        "",
        f"{len(summaries)} configurations, {held_out}. Validation after the last epoch, mean ± "
        "sample standard deviation over the folds; no test image was looked at.",
        "",
        "| | configuration | parameters | top-1 % | loss | top-1 % by fold | seconds a fold |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    lines += [_row(summary, summary is best) for summary in _in_order(summaries)]
    lines += [
        "",
        "Rule: the highest mean top-1; among equals the lower mean loss, then fewer parameters. "
        f"Best is **{best.number}** ({best.label}): `best.yaml`.",
    ]
    if record is not None and record.test_top1_percent is not None:
        low, high = record.test_top1_interval_percent or (0.0, 100.0)
        lines += [
            "",
            "Trained again on all training images and tested once: "
            f"**{record.test_top1_percent:.2f} %** of {record.test_images:,} test images "
            f"(95 %: {low} to {high}); `final/`.",
        ]
    write_text(path, "\n".join(lines) + "\n")


def plot_selection(path: Path, recipe: Recipe, summaries: Sequence[Summary], best: Summary) -> None:
    """Draw the folds of every complete configuration, their mean and deviation, the best marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    complete = [summary for summary in _in_order(summaries) if summary.complete]
    shown = complete[:MOST_ROWS]
    figure = Figure(figsize=(9, 2.0 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, summary in enumerate(shown):
        color = BEST_COLOR if summary is best else COLOR
        values = summary.fold_top1_percent
        first = place == 0
        axes.plot(
            values,
            [place] * len(values),
            marker="o",
            linestyle="none",
            markersize=5,
            markerfacecolor="none",
            color=color,
            label="a fold" if first else None,
        )
        axes.errorbar(
            summary.top1_percent,
            place,
            xerr=summary.top1_deviation,
            marker="D" if summary is best else "s",
            markersize=8 if summary is best else 5,
            capsize=4,
            color=color,
            label="best: mean ± deviation" if first else "mean ± deviation" if place == 1 else None,
        )
    axes.set_yticks(range(len(shown)), [f"{s.label}   {s.number}" for s in shown])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlabel("Validation top-1 accuracy (%)")
    note = f", the best {MOST_ROWS} of {len(complete)}" if len(complete) > MOST_ROWS else ""
    axes.set_title(f"{recipe.model} on {recipe.data}{note}")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    with write_file(path) as fresh:
        figure.savefig(fresh, dpi=120)


def _in_order(summaries: Sequence[Summary]) -> list[Summary]:
    """The best first, as the rule has it; unfinished ones at the end."""
    return sorted(
        summaries,
        key=lambda s: (
            (0, -s.top1_percent, s.loss, s.params, s.number) if s.complete else (1, s.number)
        ),
    )


def _row(summary: Summary, is_best: bool) -> str:
    if summary.complete:
        figures = [
            _with_deviation(summary.top1_percent, summary.top1_deviation, 2),
            _with_deviation(summary.loss, summary.loss_deviation, 4),
        ]
        seconds = statistics.fmean(result.seconds for result in summary.results)
        last = [" ".join(f"{value:.2f}" for value in summary.fold_top1_percent), f"{seconds:.0f}"]
    else:
        last_result = summary.results[-1] if summary.results else None
        figures = ["", ""]
        last = ["unfinished" if last_result is None else _end(last_result), ""]
    label = f"**{summary.label} (best)**" if is_best else summary.label
    params = "" if summary.params is None else f"{summary.params:,}"
    return f"| {' | '.join([str(summary.number), label, params, *figures, *last])} |"


def _end(result: FoldResult) -> str:
    reason = f": {result.reason}" if result.reason else f" after epoch {result.epochs}"
    return f"{result.state} in fold {result.fold}{reason}".replace("|", "\\|")


def _with_deviation(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _exact(value: Any) -> str:
    """A value that YAML reads back."""
    return value if isinstance(value, str) else json.dumps(value)


def _text(value: Any) -> str:
    """A value for people, its digits limited."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)
