"""From a picture as it is stored to the 8-bit grey or RGB picture that was meant."""

import io
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

__all__ = ["as_mode", "decode_picture"]

ORIENTATION = 0x0112  # the EXIF tag
# Formats whose 32-bit pictures in Pillow are 16-bit ones in the file.
AT_MOST_16_BITS = ("PNG", "PPM", None)


def decode_picture(source: BinaryIO | bytes, mode: str) -> Image.Image:
    """Decode a file's bytes; see `as_mode`.

    Raises:
        Exception: Whatever a decoder makes of damaged bytes.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return as_mode(image, mode)


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Turn a picture upright and convert it.

    * A camera's note of how it was held (EXIF) is followed.
    * 16-bit grey is scaled: 65535 becomes 255. Grey of 32 bits or of floats has no known range and
      is refused.
    * What is transparent shows white, as on a page; Pillow alone would show what lies beneath.

    Args:
        image: Of any kind that Pillow opens.
        mode: PIL mode of the result: L or RGB.

    Raises:
        ValueError: Grey without a known range.
    """
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if layered.getchannel("A").getextrema() != (255, 255):
            page = Image.new("RGBA", layered.size, "white")
            return Image.alpha_composite(page, layered).convert("RGB").convert(mode)
    if image.mode == "HSV":
        image = image.convert("RGB")
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # else a damaged PNG fails below, once and unnoticed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # a damaged note says nothing
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _scaled(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format not in AT_MOST_16_BITS):
        raise ValueError(
            "grey of 32 bits or of floats has no known range; store 8 or 16 bits per pixel"
        )
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
