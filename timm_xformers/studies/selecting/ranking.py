"""Which configuration is best, by the rule below, and the files that show it.

Rule: the highest mean validation top-1 over the folds; among equals the lower mean loss, then fewer
parameters, then the one that came first. Only configurations that finished every fold take part.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_xformers.files.atomic import write_text
from timm_xformers.files.figures import BLUE, VERMILION, literal, new_figure, save
from timm_xformers.files.tables import markdown_table, write_csv
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import Record
from timm_xformers.studies.selecting.folds import FoldResult

__all__ = ["Summary", "best_of", "plot_selection", "summarize", "write_folds", "write_markdown"]

# More rows than this cannot be read in one image.
MOST_ROWS = 40
HEADS = ("", "configuration", "parameters", "top-1 %", "loss", "top-1 % by fold", "seconds a fold")


@dataclasses.dataclass(frozen=True)
class Summary:
    """One configuration over its folds; figures are of each fold's last epoch.

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
    def fold_top1_percent(self) -> list[float]:
        """Accuracy of each fold."""
        return [result.val_top1_percent[-1] for result in self.results]

    @property
    def top1_percent(self) -> float:
        """Its mean over the folds."""
        return statistics.fmean(self.fold_top1_percent)

    @property
    def top1_deviation(self) -> float | None:
        """Its sample standard deviation over the folds (n - 1); None for one fold."""
        return statistics.stdev(self.fold_top1_percent) if len(self.results) > 1 else None

    @property
    def fold_losses(self) -> list[float]:
        """Validation loss of each fold."""
        return [result.val_loss[-1] for result in self.results]

    @property
    def rank(self) -> tuple[float, ...]:
        """Sorts the best first, as the rule has it, and unfinished ones to the end."""
        if not self.complete:
            return (1, self.number)
        loss = statistics.fmean(self.fold_losses)
        return (0, -self.top1_percent, loss, self.params or 0, self.number)

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
    """Put the results of each configuration, by fold, beside it; ``folds`` of them are complete."""
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
    return min((s for s in summaries if s.complete), key=lambda s: s.rank, default=None)


def write_folds(path: Path, summaries: Sequence[Summary], keys: Sequence[str]) -> None:
    """One row for every configuration and fold that was begun; values are as YAML reads them."""
    head = ("state", "epochs", "val_top1_percent", "val_loss", "val_images", "train_images")
    rows = []
    for summary in summaries:
        for result in summary.results:
            row: dict[str, Any] = {"configuration": summary.number}
            row |= {key: _exact(value) for key, value in summary.values.items()}
            row |= dataclasses.asdict(result)
            for name in ("val_top1_percent", "val_loss"):
                row[name] = next(reversed(row[name]), None)
            rows.append(row)
    write_csv(path, rows, ["configuration", *keys, "fold", *head, "params", "seconds"])


def write_markdown(
    path: Path, recipe: Recipe, summaries: Sequence[Summary], best: Summary, record: Record | None
) -> None:
    """The table, the rule, and what came of the best: the record of its final training, if any."""
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
        *markdown_table(
            HEADS,
            [_row(summary, summary is best) for summary in sorted(summaries, key=lambda s: s.rank)],
            "rlrrrlr",
        ),
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
    complete = sorted((s for s in summaries if s.complete), key=lambda s: s.rank)
    shown = complete[:MOST_ROWS]
    figure = new_figure(9, 2.0 + 0.32 * len(shown))
    axes = figure.subplots()
    for place, summary in enumerate(shown):
        is_best = summary is best
        color = VERMILION if is_best else BLUE
        values = summary.fold_top1_percent
        hollow = {"marker": "o", "markersize": 5, "markerfacecolor": "none", "linestyle": "none"}
        label = "a fold" if place == 0 else None
        axes.plot(values, [place] * len(values), color=color, label=label, **hollow)
        axes.errorbar(
            summary.top1_percent,
            place,
            xerr=summary.top1_deviation,
            marker="D" if is_best else "s",
            markersize=8 if is_best else 5,
            capsize=4,
            color=color,
            label=("best: mean ± deviation", "mean ± deviation", None)[min(place, 2)],
        )
    axes.set_yticks(range(len(shown)), [literal(f"{s.label}   {s.number}", 200) for s in shown])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlabel("Validation top-1 accuracy (%)")
    note = f", the best {MOST_ROWS} of {len(complete)}" if len(complete) > MOST_ROWS else ""
    axes.set_title(literal(f"{recipe.model} on {recipe.data}{note}", 200))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def _row(summary: Summary, is_best: bool) -> list[Any]:
    if summary.complete:
        seconds = statistics.fmean(result.seconds for result in summary.results)
        figures = [
            _with_deviation(summary.fold_top1_percent, 2),
            _with_deviation(summary.fold_losses, 4),
            " ".join(f"{value:.2f}" for value in summary.fold_top1_percent),
            f"{seconds:.0f}",
        ]
    else:
        end = "unfinished"
        if summary.results:
            last = summary.results[-1]
            reason = f": {last.reason}" if last.reason else f" after epoch {last.epochs}"
            end = f"{last.state} in fold {last.fold}{reason}"
        figures = ["", "", end, ""]
    label = f"**{summary.label} (best)**" if is_best else summary.label
    return [
        summary.number,
        label,
        "" if summary.params is None else f"{summary.params:,}",
        *figures,
    ]


def _with_deviation(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def _exact(value: Any) -> str:
    """A value that YAML reads back."""
    return value if isinstance(value, str) else json.dumps(value)


def _text(value: Any) -> str:
    """A value for people, its digits limited."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)
