"""Pictures by name: files, folders of them and addresses."""

import io
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from timm.data import get_img_extensions

from timm_xformers.data.pixels import decode_picture
from timm_xformers.errors import UserError

__all__ = ["find_images", "open_image"]

SCHEMES = ("http://", "https://")
LARGEST_DOWNLOAD = 64 * 2**20
TIMEOUT_S = 20


def find_images(names: Sequence[str]) -> list[str]:
    """Put the images of a folder, and of those below it, in its place.

    Args:
        names: Files, folders and addresses.

    Returns:
        Files and addresses; those of a folder in the order of their names.

    Raises:
        UserError: There is no such file, or no image in a folder.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if name.startswith(SCHEMES) or path.is_file():
            found.append(name)
        elif path.is_dir():
            suffixes: tuple[str, ...] = get_img_extensions()  # type: ignore[no-untyped-call]
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
            if not inside:
                raise UserError(f"{name} holds no images; name a folder with .png, .jpg or such.")
            found += map(str, inside)
        else:
            raise UserError(f"{name} does not exist; name an image, a folder or an address.")
    return found


def open_image(name: str, mode: str) -> Image.Image:
    """Read a picture.

    Args:
        name: A file or an address.
        mode: PIL mode of the result: L or RGB.

    Raises:
        UserError: It cannot be read; the message is the reason alone.
    """
    source = _download(name) if name.startswith(SCHEMES) else name
    try:
        if isinstance(source, str):
            source = io.BytesIO(Path(source).read_bytes())
        return decode_picture(source, mode)
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        reason = "is no image" if "cannot identify" in str(error) else " ".join(str(error).split())
        raise UserError(reason or type(error).__name__) from error


def _download(address: str) -> io.BytesIO:
    request = urllib.request.Request(address, headers={"User-Agent": "timm-xformers"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            data = answer.read(LARGEST_DOWNLOAD + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"cannot be fetched ({reason})") from error
    if len(data) > LARGEST_DOWNLOAD:
        raise UserError(f"has more than {LARGEST_DOWNLOAD >> 20} MiB")
    return io.BytesIO(data)
