"""Batched operations against torchvision's, image by image."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from timm_xformers.data.pixel_ops import OPS

NEAREST = InterpolationMode.NEAREST


def affine(image, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return TF.affine(image, 0.0, list(translate), 1.0, list(shear), NEAREST, center=center)


def slant(strength):
    return math.degrees(math.atan(strength))


# torchvision's own call for each operation, and the range of strengths to try.
PEERS = {
    "Identity": (lambda i, s: i, 0, 0),
    "ShearX": (lambda i, s: affine(i, shear=(slant(s), 0.0), center=[0, 0]), -0.99, 0.99),
    "ShearY": (lambda i, s: affine(i, shear=(0.0, slant(s)), center=[0, 0]), -0.99, 0.99),
    "TranslateX": (lambda i, s: affine(i, translate=(int(s), 0)), -32, 32),
    "TranslateY": (lambda i, s: affine(i, translate=(0, int(s))), -32, 32),
    "Rotate": (lambda i, s: TF.rotate(i, s, NEAREST), -135, 135),
    "Brightness": (lambda i, s: TF.adjust_brightness(i, 1 + s), -0.99, 0.99),
    "Color": (lambda i, s: TF.adjust_saturation(i, 1 + s), -0.99, 0.99),
    "Contrast": (lambda i, s: TF.adjust_contrast(i, 1 + s), -0.99, 0.99),
    "Sharpness": (lambda i, s: TF.adjust_sharpness(i, 1 + s), -0.99, 0.99),
    "Posterize": (lambda i, s: TF.posterize(i, int(s)), 2, 9),
    "Solarize": (TF.solarize, 0, 255),
    "AutoContrast": (lambda i, s: TF.autocontrast(i), 0, 0),
    "Equalize": (lambda i, s: TF.equalize(i), 0, 0),
    "Invert": (lambda i, s: TF.invert(i), 0, 0),
}


def make_images(channels, height, width):
    """Noise of several contrasts, a smooth one, a flat one and one of two values."""
    rng = torch.Generator().manual_seed(height)
    images = torch.rand(40, channels, height, width, generator=rng) * 255
    images[:10] = 100 + images[:10] * 0.3
    images[10] = torch.linspace(0, 255, height * width).view(height, width)
    images[11] = 77
    images[12] = (images[12] > 128) * 255.0
    return images.to(torch.uint8)


@pytest.mark.parametrize("name", list(OPS))
@pytest.mark.parametrize(
    "shape",
    [(3, 32, 32), (1, 28, 28), (3, 9, 15), (1, 2, 2)],
    ids=["cifar", "mnist", "oblong", "two-pixels"],
)
def test_equals_torchvision(name, shape):
    peer, low, high = PEERS[name]
    images = make_images(*shape)
    rng = torch.Generator().manual_seed(1)
    strength = low + (high - low) * torch.rand(40, generator=rng, dtype=torch.float64)
    before = images.clone()

    ours = OPS[name](images, strength)

    expected = torch.stack([peer(i, float(s)) for i, s in zip(images, strength, strict=True)])
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "Contrast", "Sharpness"])
def test_an_image_does_not_depend_on_its_batch(name):
    images = make_images(3, 32, 32)
    strength = torch.linspace(-0.9, 0.9, 40, dtype=torch.float64)
    whole = OPS[name](images, strength)
    for row in range(40):
        alone = OPS[name](images[row : row + 1], strength[row : row + 1])
        assert torch.equal(alone[0], whole[row])
