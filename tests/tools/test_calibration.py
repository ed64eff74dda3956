"""The calibration error of packaged weights, against a sum by hand."""

import itertools

import numpy as np
import pytest
import torch

from tools.calibration import BINS, calibration, calibration_error


def test_error_is_the_mean_gap_of_the_bins():
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(4, (500,), generator=rng)
    sure = logits.softmax(-1).amax(-1).numpy()
    right = (logits.argmax(-1) == labels).numpy()
    edges = np.linspace(0, 1, BINS + 1)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (sure > low) & (sure <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert calibration_error(logits, labels) == pytest.approx(100 * total)


def test_temperature_mends_logits_that_were_scaled():
    """Labels drawn from the model's own probabilities are calibrated; dividing by 2 spoils that."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 3, generator=rng, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
    found = calibration(logits / 2, labels)
    assert found["temperature"] == pytest.approx(0.5, abs=0.03)
    assert found["confidence_percent"] < found["top1_percent"] - 5
    assert found["ece_percent"] > 5 > 1 > found["ece_with_it_percent"]
