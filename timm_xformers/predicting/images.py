"""Pictures by name: files, folders of them and addresses."""

import http.client
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from timm_xformers.data.pixels import decode_picture
from timm_xformers.data.trees import Place
from timm_xformers.errors import UserError
from timm_xformers.files.text import one_line, plain

__all__ = ["find_images", "open_image"]

SCHEMES = ("http://", "https://")
LARGEST_DOWNLOAD = 64 * 2**20
# For each answer of the server, and for the whole picture.
TIMEOUT_S = 20
WHOLE_TIMEOUT_S = 60
# Left as they are in an address; everything else that may not stand there is escaped.
ADDRESS_MARKS = "%/:=&?~#+!$,;'@()*[]"


def find_images(names: Sequence[str]) -> list[str]:
    """Put the pictures of a folder, and of those below it, in its place.

    Hidden folders and files that are no pictures by their names are passed over, as in training.

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
        if name.lower().startswith(SCHEMES) or path.is_file():
            found.append(name)
        elif path.is_dir():
            inside = sorted(Place(path).tree().files, key=lambda file: file.split("/"))
            if not inside:
                raise UserError(f"{name} holds no images; name a folder with .png, .jpg or such.")
            found += [str(path / file) for file in inside]
        elif path.exists():
            raise UserError(f"{plain(name)} is no regular file; name an image file.")
        else:
            raise UserError(f"{plain(name)} does not exist; name an image, a folder or an address.")
    return found


def open_image(name: str, mode: str) -> Image.Image:
    """Read a picture; see `timm_xformers.data.pixels.as_mode`.

    Args:
        name: A file or an address.
        mode: PIL mode of the result: L or RGB.

    Raises:
        UserError: It cannot be read; the message is the reason alone.
    """
    remote = name.lower().startswith(SCHEMES)
    try:
        return decode_picture(_download(name) if remote else Path(name).read_bytes(), mode)
    except UserError:
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        reason = one_line(error)
        told = "is no image" if "cannot identify" in reason else f"cannot be decoded: {reason}"
        raise UserError(told) from error


def _download(address: str) -> bytes:
    """Fetch a picture in a thread of its own: nothing else bounds a server that sends by the drop.

    Raises:
        UserError: It cannot be fetched whole.
    """
    answer: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            answer.append(_fetch(address))
        except Exception as error:  # servers send what they like
            answer.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(WHOLE_TIMEOUT_S)
    if not answer:
        raise UserError(f"cannot be fetched (not there after {WHOLE_TIMEOUT_S} seconds)")
    if isinstance(answer[0], bytes):
        return answer[0]
    if isinstance(answer[0], UserError):
        raise answer[0]
    error = answer[0]
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    raise UserError(f"cannot be fetched ({one_line(reason)})") from error


def _fetch(address: str) -> bytes:
    request = urllib.request.Request(
        urllib.parse.quote(address, safe=ADDRESS_MARKS), headers={"User-Agent": "timm-xformers"}
    )
    end = time.monotonic() + WHOLE_TIMEOUT_S
    data = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            told = answer.headers.get("Content-Length", "")
            while block := answer.read1(2**16):
                data += block
                if len(data) > LARGEST_DOWNLOAD:
                    raise UserError(f"has more than {LARGEST_DOWNLOAD >> 20} MiB")
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"the server answers {error.code} {plain(error.reason)}") from error
    except http.client.IncompleteRead as error:
        raise UserError("cannot be fetched (the server broke off)") from error
    if told.isdecimal() and int(told) != len(data):
        raise UserError(f"is cut off: {len(data)} of {told} bytes came")
    return bytes(data)
