"""Finding finished runs: in run folders, in folders of them, and in files of records."""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from timm_xformers.files.text import one_line
from timm_xformers.records.results_csv import EpochRow, read_history
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import RunFolder

__all__ = ["Run", "Skipped", "find_runs", "read_record"]

# How deep below a given folder runs are looked for: OUTPUT/STUDY/RUN and one more.
DEEPEST = 3
RECORD_FILES = (".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        source: Where it was found; lines of a file are counted from 1.
        record: Its figures.
        rows: Its epochs; empty if they are not known.
        settings: Its recipe, as far as it can be read; empty if it is not known.
    """

    source: str
    record: Record
    rows: tuple[EpochRow, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that cannot be compared, and why."""

    source: str
    reason: str


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[Skipped]]:
    """Read every run at or below some places.

    Args:
        paths: Run folders, folders that hold some up to three levels down, or files of records:
            one JSON object, a list of them, or one per line.

    Returns:
        Runs, each once even if several paths lead to it, and what had to be left out.
    """
    runs: dict[str, Run] = {}
    skipped: dict[str, Skipped] = {}
    for path in paths:
        count = 0
        for found in _at(path):
            count += 1
            if isinstance(found, Skipped):
                skipped.setdefault(found.source, found)
                continue
            key = json.dumps(dataclasses.asdict(found.record), sort_keys=True)
            # A record in a file and the folder it was copied from are one run; the folder has more.
            if key not in runs or (found.rows and not runs[key].rows):
                runs[key] = found
        if not count:
            skipped.setdefault(str(path), Skipped(str(path), "holds no run and no record"))
    return list(runs.values()), list(skipped.values())


def read_record(values: Any) -> Record:
    """A record from parsed JSON; fields of later versions are passed over.

    Raises:
        ValueError: It is none, or a value has the wrong type or is no finite number.
    """
    if not isinstance(values, dict) or "kind" not in values:
        raise ValueError("is not a record of a run")
    hints = typing.get_type_hints(Record)
    fields = {field.name: field for field in dataclasses.fields(Record)}
    known = {name: value for name, value in values.items() if name in fields}
    missing = [
        name
        for name, field in fields.items()
        if name not in known and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"has {name}={value!r}, which is no such figure")
    return Record(**known)


def _at(path: Path) -> Iterator[Run | Skipped]:
    if path.is_file():
        if path.suffix in RECORD_FILES:
            yield from _records(path, asked_for=True)
        else:
            yield Skipped(str(path), "is neither a run folder nor a .json or .jsonl file")
    elif path.is_dir():
        for folder, below, files in os.walk(path):
            root = Path(folder)
            if _is_run(root):
                below.clear()
                yield _run(root)
                continue
            deep_enough = len(root.relative_to(path).parts) >= DEEPEST
            below[:] = [] if deep_enough else sorted(n for n in below if not n.startswith("."))
            for name in sorted(files):
                if name.endswith(RECORD_FILES):
                    yield from _records(root / name, asked_for=False)
    else:
        yield Skipped(str(path), "does not exist")


def _is_run(root: Path) -> bool:
    folder = RunFolder(root)
    return folder.recipe.is_file() or folder.record.is_file()


def _run(root: Path) -> Run | Skipped:
    folder = RunFolder(root)
    rows: list[EpochRow] = []
    problem = ""
    try:
        rows = read_history(folder.history)
    except (OSError, TypeError, ValueError) as error:
        problem = f"{folder.history.name} is damaged ({one_line(error)})"
    if not folder.record.is_file():
        done = problem or f"{len(rows)} epochs are done"
        return Skipped(str(root), f"is not finished: {done}; timm-xformers train --resume {root}")
    try:
        record = read_record(json.loads(folder.record.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return Skipped(str(root), f"{folder.record.name} is damaged ({one_line(error)})")
    # The figures do not need the curve.
    return Run(str(root), record, () if problem else tuple(rows), _settings(folder.recipe))


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _records(path: Path, *, asked_for: bool) -> Iterator[Run | Skipped]:
    """Records of a file; one that merely lies in a folder may be something else altogether."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Skipped(str(path), f"cannot be read ({one_line(error)})")
        return
    if path.suffix == ".jsonl":
        lines = [(f"{path}:{i}", line) for i, line in enumerate(text.splitlines(), 1)]
    else:
        lines = [(str(path), text)]
    for source, line in lines:
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            if asked_for or path.suffix == ".jsonl":
                yield Skipped(source, f"is not JSON ({one_line(error)})")
            continue
        for number, entry in enumerate(values if isinstance(values, list) else [values], 1):
            name = f"{source}[{number}]" if isinstance(values, list) else source
            try:
                yield Run(name, read_record(entry))
            except ValueError as error:
                if asked_for or (isinstance(entry, dict) and "kind" in entry):
                    yield Skipped(name, one_line(error))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is one of a field's type, finite where it is a number."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        whole = isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
        return whole and (len(value) == 2 or arguments[0] is not float)  # floats are an interval
    if hint is float or hint is int:
        kinds = (int, float) if hint is float else int
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or hint)
