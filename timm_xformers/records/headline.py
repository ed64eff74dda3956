"""The figure that a run is judged by: top-1, mAP, or the share of answers that are the teacher's.

The first is for one class an image, the second for several, the third for images without labels.
Records, rows of results.csv and all that shows them find its fields and its names here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AGREEMENT", "HEADLINES", "MAP", "TOP1", "Headline", "headline_of"]


@dataclass(frozen=True, eq=False)
class Headline:
    """A figure in percent, by split, and what stands beside it.

    Attributes:
        key: Of fields such as ``test_KEY_percent``.
        word: Its name in a sentence.
        words: Its name in full, as a metric of the Hub's.
        metric: What the Hub calls it.
        beside: Names of further figures, by key.
        counted: Whether it is a share of the images, which has an interval.
    """

    key: str
    word: str
    words: str
    metric: str
    beside: Mapping[str, str]
    counted: bool = True

    def of(self, figures: Any, split: str) -> Any:
        """The figure of a record or row; None if it was not measured."""
        # Rows have no test, and records no train.
        return getattr(figures, f"{split}_{self.key}_percent", None)

    def interval_of(self, record: Any, split: str) -> Any:
        """Its 95 % interval in a record, a pair; None if it has none."""
        return getattr(record, f"{split}_{self.key}_interval_percent", None)

    def beside_of(self, record: Any, split: str) -> dict[str, float]:
        """Those beside it, by name; of up to five classes, five guesses say nothing."""
        shown = {} if self is TOP1 and record.num_classes <= 5 else self.beside
        return {word: getattr(record, f"{split}_{key}_percent") for key, word in shown.items()}


TOP1 = Headline("top1", "top-1", "Top-1 accuracy", "accuracy", {"top5": "top-5"})
MAP = Headline(
    *("map", "mAP", "Mean average precision", "mean_average_precision"),
    {"f1_micro": "F1 micro", "f1_macro": "F1 macro"},
    counted=False,
)
AGREEMENT = Headline("agreement", "agreement", "Agreement with the teacher", "agreement", {})
# With labels, agreement may stand beside top-1.
HEADLINES = (TOP1, MAP, AGREEMENT)


def headline_of(figures: Any) -> Headline:
    """Which figure a record or a row of results.csv has."""
    for headline in HEADLINES:
        if any(headline.of(figures, split) is not None for split in ("test", "val", "train")):
            return headline
    return TOP1
