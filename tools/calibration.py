"""How far the probabilities of packaged weights are to be believed, on the test images of digits.

    python -m tools.calibration

writes results/calibration.json, from which the cards have their sentence.
"""

import json
import sys

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from timm_xformers.data.data import open_data
from timm_xformers.data.preprocessing import Preprocessing
from timm_xformers.files.atomic import write_text
from timm_xformers.recipe import Recipe
from timm_xformers.weights import read_manifest
from tools.checkout import this_checkout

__all__ = ["calibration", "calibration_error"]

BINS = 15
# Logits are divided by it; from very sure to hardly sure.
TEMPERATURES = [round(0.02 * step, 2) for step in range(10, 101)]


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent (Guo et al., arXiv:1706.04599, eq. 3).

    Args:
        logits: (N, classes).
        labels: (N,).
    """
    sure, chosen = logits.softmax(dim=-1).max(dim=-1)
    right = (chosen == labels).to(sure.dtype)
    bins = (sure * BINS).ceil().clamp(1, BINS)  # bin k holds (k - 1, k] / BINS
    gaps = [(right[bins == k].sum() - sure[bins == k].sum()).abs() for k in range(1, BINS + 1)]
    return 100 * float(torch.stack(gaps).sum()) / len(labels)


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, confidence and calibration error in percent, and the temperature of least loss.

    The temperature is fitted on the same images, so the error with it is a lower bound.
    """
    logits = logits.double()
    sure, chosen = logits.softmax(dim=-1).max(dim=-1)
    best = min(TEMPERATURES, key=lambda t: float(F.cross_entropy(logits / t, labels)))
    return {
        "top1_percent": round(100 * float((chosen == labels).double().mean()), 2),
        "confidence_percent": round(100 * float(sure.mean()), 2),
        "ece_percent": round(calibration_error(logits, labels), 2),
        "temperature": best,
        "ece_with_it_percent": round(calibration_error(logits / best, labels), 2),
    }


def main() -> int:
    """Measure every weight of digits, and say the table."""
    checkout = this_checkout()
    test = open_data(Recipe(data="digits")).test
    assert test is not None
    images = torch.stack([torch.as_tensor(_pixels(test.image(n))) for n in range(len(test))])
    found = {}
    for name in sorted(read_manifest(checkout.weights)):
        if not name.endswith(".digits"):
            continue
        model = timm.create_model(name, pretrained=True).eval()
        expects = Preprocessing.of_model(model)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (expects.mean, expects.std))
        with torch.inference_mode():
            logits = torch.cat([model((part - mean) / std) for part in torch.split(images, 200)])
        found[name] = calibration(logits, test.labels)
        print(name, found[name])
    path = checkout.results / "calibration.json"
    write_text(
        path, json.dumps({"bins": BINS, "data": "digits", "weights": found}, indent=1) + "\n"
    )
    return 0


def _pixels(image: object) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    pixels: Tensor = pil_to_tensor(image)
    return pixels.float() / 255


if __name__ == "__main__":
    sys.exit(main())
