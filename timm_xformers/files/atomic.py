"""Files and folders that are there whole or not at all, whatever kills the writing process.

A folder is filled under another name, listed in a manifest of sizes and SHA-256 sums, brought to
the disk and renamed. What the manifest does not confirm is damaged.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from timm_xformers.errors import UserError

__all__ = [
    "MANIFEST_FILE",
    "creating",
    "find_damage",
    "previous_of",
    "recover",
    "scratch_folder",
    "sha256_of",
    "sweep",
    "write_file",
    "write_folder",
    "write_text",
]

MANIFEST_FILE = "manifest.json"
# Names that nobody else gives: what a killed process leaves behind is removed by them.
MARK = ".txf-"
UNFINISHED = re.compile(re.escape(MARK) + r"[0-9a-f]{8}-")


def _hidden(path: Path) -> Path:
    """A new name beside a path, with the path's suffix, which some writers go by."""
    # No process number: another machine may be writing to the same folder.
    return path.with_name(f"{MARK}{secrets.token_hex(4)}-{path.name}")


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Replace a file: fill the temporary one that is yielded; it then takes the name.

    A reader sees the file of before or the new one, never half of it.
    """
    fresh = _hidden(path)
    try:
        yield fresh
        _sync(fresh)
        fresh.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses it before it looks
            fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, as `write_file` does."""
    with write_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="")


def previous_of(path: Path) -> Path:
    """Where the folder before the newest one lies."""
    return path.with_name(f"{path.name}.previous")


@contextlib.contextmanager
def write_folder(path: Path, *, keep_previous: bool = False) -> Iterator[Path]:
    """Write a folder whole: fill the temporary one that is yielded; it then takes the name.

    A crash at any point leaves the folder, or the one before it as `previous_of`, or both.

    Args:
        path: The folder. The one that holds it must exist.
        keep_previous: Leave the one before it where it is then.

    Raises:
        UserError: The files cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError  # a recipe is written without it

    fresh, trash, previous = _hidden(path), _hidden(path), previous_of(path)
    try:
        fresh.mkdir()
        yield fresh
        _write_manifest(fresh)
        mode = (fresh / MANIFEST_FILE).stat().st_mode  # safetensors' files are their owner's alone
        for file in fresh.iterdir():
            file.chmod(mode)
            _sync(file)
        _sync(fresh)
        if path.exists():
            if previous.exists():
                previous.rename(trash)
            path.rename(previous)
        fresh.rename(path)
        _sync(path.parent)
        if not keep_previous:
            shutil.rmtree(previous, ignore_errors=True)
    # A full disk is an OSError, to torch a RuntimeError, to safetensors an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        if "DataLoader worker" in str(error):  # PyTorch reports a dead one at any moment
            raise
        if not path.parent.is_dir():
            raise UserError(
                f"Cannot write {path}: the folder {path.parent} was removed; start again."
            ) from error
        raise UserError(
            f"Cannot write {path}: {' '.join(str(error).split())}; free space or rights, or choose "
            "another --output. The folders of earlier epochs are as they were."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def creating(what: str) -> Iterator[None]:
    """Say of a folder that cannot be made, in a sentence, which and why.

    Raises:
        UserError: An OSError came.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot create the {what} {error.filename}: {error.strerror}; choose another --output."
        ) from error


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside a path, for files that take their places there when all are right."""
    sweep(path.parent, path.name)
    folder = _hidden(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(root: Path, name: str = "") -> None:
    """Remove what killed processes left half written or half removed.

    Args:
        root: Where.
        name: Of what they were writing; empty: of anything.
    """
    for path in root.iterdir():
        started = UNFINISHED.match(path.name)
        if not started or (name and path.name[started.end() :] != name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def recover(path: Path) -> str | None:
    """Put a folder back that a crash left under its other name, and look for damage.

    Returns:
        None, or what is wrong with it.
    """
    if not path.exists() and previous_of(path).exists():
        previous_of(path).rename(path)
    return find_damage(path)


def find_damage(folder: Path) -> str | None:
    """Compare a folder with its manifest.

    Returns:
        None, or the file that differs and how.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing" if folder.exists() else "it is missing"
    except (AttributeError, KeyError, TypeError, ValueError, OSError):
        return f"{MANIFEST_FILE} is damaged"
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != digest:
            return f"{name} is not what was written"
    return None


def _write_manifest(folder: Path) -> None:
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and renames without this
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
