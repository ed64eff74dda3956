"""Pictures of every kind become the 8-bit pictures that they show."""

import io

import numpy as np
import pytest
from PIL import Image

from timm_xformers.data.pixels import as_mode, decode_picture


def stored(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled(kind):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    picture = decode_picture(stored(Image.fromarray(values), kind, **options), "L")
    np.testing.assert_allclose(np.asarray(picture), values / 257, atol=0.5 + 1e-9)
    rgb = np.asarray(decode_picture(stored(Image.fromarray(values), kind, **options), "RGB"))
    assert (rgb == np.asarray(picture)[..., None]).all()


def test_sixteen_bits_of_the_other_byte_order():
    values = np.array([[0, 257], [65535, 32896]], ">u2")
    image = Image.frombytes("I;16B", (2, 2), values.tobytes())
    assert np.asarray(as_mode(image, "L")).tolist() == [[0, 1], [255, 128]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_range_is_refused(dtype):
    content = stored(Image.fromarray(np.full((4, 4), 300, dtype)), "TIFF")
    with pytest.raises(ValueError, match="no known range; store 8 or 16 bits"):
        decode_picture(content, "L")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_the_camera_was_held(kind, orientation):
    upright = Image.new("RGB", (48, 32), (10, 10, 10))
    upright.paste((250, 10, 10), (0, 0, 16, 16))  # red in the upper left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What lies in the file is turned back, so that turning it gives the upright picture.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    lying = upright if orientation == 1 else upright.transpose(back[orientation])
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = decode_picture(stored(lying, kind, exif=exif, **options), "RGB")
    assert picture.size == (48, 32)
    np.testing.assert_allclose(np.asarray(picture), np.asarray(upright), atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so when it opens
def test_a_damaged_note_of_orientation_is_ignored():
    content = stored(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_picture(content, "RGB").size == (8, 4)


def transparent(mode):
    """Left half transparent over red, right half opaque blue."""
    rgba = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (4, 0, 8, 4))
    if mode == "P":
        palette = rgba.convert("RGB").quantize(2, dither=Image.Dither.NONE)
        red = palette.getpixel((0, 0))
        return stored(palette, transparency=red)
    if mode == "tRNS":
        return stored(rgba.convert("RGB"), transparency=(255, 0, 0))
    if mode == "LA":
        return stored(rgba.convert("LA"))
    return stored(
        rgba,
        "WEBP" if mode == "WEBP" else "PNG",
        **({"lossless": True, "exact": True} if mode == "WEBP" else {}),
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS", "WEBP"])
def test_what_is_transparent_shows_white(mode):
    picture = decode_picture(transparent(mode), "RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    blue = (29, 29, 29) if mode == "LA" else (0, 0, 255)
    assert picture.getpixel((7, 3)) == blue
    assert decode_picture(transparent(mode), "L").getpixel((0, 0)) == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_all_other_pictures_are_as_pillow_has_them(mode, wanted):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    assert as_mode(image, wanted).tobytes() == image.convert(wanted).tobytes()
    content = stored(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    with Image.open(io.BytesIO(content)) as again:
        expected = again.convert(wanted)
    assert decode_picture(content, wanted).tobytes() == expected.tobytes()
