"""The operations of the AutoAugment family on batches of uint8 images, with a strength per image.

Definitions are those of torchvision's `transforms.functional` on uint8 tensors, and so are the
values, bit for bit, with one exception: where the source of a pixel lies exactly halfway between
two, either may be taken. What comes in from outside is black. A grey image has no saturation, so
`color` leaves it as it is.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPS", "take_pixels"]

# Weights of the three channels in a grey value (ITU-R 601, as torchvision has them).
GREY = (0.2989, 0.587, 0.114)


def take_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Give every output pixel the value of one input pixel; outside the image that is 0.

    Args:
        images: Of any type (B, C, H, W).
        rows: Row of the source, whole numbers that broadcast to (B, H, W).
        columns: Column of the source, likewise.

    Returns:
        (B, C, H, W).
    """
    height, width = images.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (B, H, W)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = index.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)  # (B, C, H * W)
    taken = images.flatten(2).gather(2, index).view_as(images)
    return taken.mul_(inside.unsqueeze(1))


def identity(images: Tensor, strength: Tensor) -> Tensor:
    """Leave the images as they are."""
    return images


def shear_x(images: Tensor, strength: Tensor) -> Tensor:
    """Move each row by ``strength`` times its distance from the top edge, to the left."""
    ones, zeros = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (ones, strength, strength * images.shape[-2] / 2), (zeros, ones, zeros))


def shear_y(images: Tensor, strength: Tensor) -> Tensor:
    """Move each column by ``strength`` times its distance from the left edge, upwards."""
    ones, zeros = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, (ones, zeros, zeros), (strength, ones, strength * images.shape[-1] / 2))


def translate_x(images: Tensor, strength: Tensor) -> Tensor:
    """Move to the right by ``strength`` pixels, cut off to whole ones."""
    columns = torch.arange(images.shape[-1]) - strength.trunc().long()[:, None]  # (B, W)
    rows = torch.arange(images.shape[-2])[None, :, None]
    return take_pixels(images, rows.to(images.device), columns[:, None].to(images.device))


def translate_y(images: Tensor, strength: Tensor) -> Tensor:
    """Move down by ``strength`` pixels, cut off to whole ones."""
    rows = torch.arange(images.shape[-2]) - strength.trunc().long()[:, None]  # (B, H)
    columns = torch.arange(images.shape[-1])[None, None]
    return take_pixels(images, rows[..., None].to(images.device), columns.to(images.device))


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    """Turn by ``strength`` degrees against the clock, about the centre."""
    angle = strength * math.pi / 180
    cos, sin, zeros = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _affine(images, (cos, -sin, zeros), (sin, cos, zeros))


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Multiply by ``1 + strength``."""
    return _blend(images, torch.zeros_like(images), 1 + strength)


def color(images: Tensor, strength: Tensor) -> Tensor:
    """Move away from the grey image (towards it, if negative) by ``strength``."""
    return images if images.shape[1] == 1 else _blend(images, _grey(images), 1 + strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Move away from the mean grey value (towards it, if negative) by ``strength``."""
    # Summed as whole numbers: the mean must not depend on the order of a batch's additions.
    total = _grey(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(images, total.float() / images[0, 0].numel(), 1 + strength)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Move away from the blurred image (towards it, if negative) by ``strength``."""
    if min(images.shape[-2:]) <= 2:
        return images
    channels = images.shape[1]
    # Whole numbers up to the division, so that reduced precision on a GPU changes nothing.
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    blurred = images.float()
    blurred[..., 1:-1, 1:-1] = (F.conv2d(blurred, kernel, groups=channels) / 13).round()
    return _blend(images, blurred, 1 + strength)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the ``strength`` highest bits of each value."""
    mask = (256 - 2 ** (8 - strength.trunc())).to(torch.uint8)
    return images & mask.to(images.device).view(-1, 1, 1, 1)


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert the values that are not below ``strength``."""
    bright = images >= strength.float().to(images.device).view(-1, 1, 1, 1)
    return torch.where(bright, 255 - images, images)


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel over the whole range."""
    low = images.amin(dim=(-2, -1), keepdim=True).float()
    high = images.amax(dim=(-2, -1), keepdim=True).float()
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    low = torch.where(flat, 0.0, low)
    return ((images - low) * scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Give each channel a histogram as flat as whole values allow."""
    values = images.flatten(2).long()  # (B, C, H * W)
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    brightest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - brightest) // 255  # (B, C, 1)
    divisor = step.clamp_min(1)
    table = (counts.cumsum(dim=2) + step // 2) // divisor
    table = F.pad(table, (1, 0))[..., :256].clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return table.to(torch.uint8).gather(2, values).view_as(images)


def invert(images: Tensor, strength: Tensor) -> Tensor:
    """Turn each value v into 255 - v."""
    return 255 - images


# By torchvision's names. Each takes uint8 images (B, C, H, W) and strengths (B,) in float64 on the
# CPU, and returns images of the same kind.
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": identity,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": brightness,
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}


def _affine(
    images: Tensor, for_x: tuple[Tensor, Tensor, Tensor], for_y: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Sample the nearest pixels.

    Args:
        images: uint8 images (B, C, H, W).
        for_x: Factors (B,) of x, y and 1 that give the source's x, in pixels from the centre.
        for_y: The same for the source's y.
    """
    height, width = images.shape[-2:]
    factors = torch.stack([*for_x, *for_y]).float().to(images.device)[..., None, None]
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, device=images.device) - middle_x  # (W,)
    y = torch.arange(height, device=images.device)[:, None] - middle_y  # (H, 1)
    # Element by element: a matrix product may round otherwise in a batch of another size.
    columns = factors[0] * x + factors[1] * y + (factors[2] + middle_x)  # (B, H, W)
    rows = factors[3] * x + factors[4] * y + (factors[5] + middle_y)
    return take_pixels(images, rows.round_().long(), columns.round_().long())


def _grey(images: Tensor) -> Tensor:
    """Grey values (B, 1, H, W), cut off to whole numbers."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    grey: Tensor = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return grey.to(torch.uint8).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, cut off to whole numbers from 0 to 255."""
    weights = torch.stack([factor, 1 - factor]).float().to(images.device)
    one, rest = weights.view(2, -1, 1, 1, 1)
    blended: Tensor = one * images + rest * other
    return blended.clamp_(0, 255).to(torch.uint8)
