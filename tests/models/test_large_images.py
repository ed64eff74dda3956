"""Thousands of tokens train in memory where exact attention that writes its maps does not."""

import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the limit and the peak are Linux's"),
]
if sys.platform == "linux":
    from .large_images import EFFICIENT, FUSED, IMAGES, LIMIT_MIB, UNFUSED, measure
else:
    EFFICIENT = IMAGES = []


@pytest.fixture(params=IMAGES, ids=lambda image: f"{image[0]} by {image[1]}")
def image(request):
    return request.param


@pytest.mark.parametrize("attention", EFFICIENT)
def test_efficient_attention_trains_within_the_limit(image, attention):
    assert 0 < measure(*image, attention, LIMIT_MIB)["peak_mib"] <= LIMIT_MIB


def test_exact_attention_that_writes_its_maps_does_not(image):
    assert "can't allocate memory" in measure(*image, UNFUSED, LIMIT_MIB)["error"]


def test_exact_attention_in_fused_kernels_does_too(image):
    assert 0 < measure(*image, FUSED, LIMIT_MIB)["peak_mib"] <= LIMIT_MIB
