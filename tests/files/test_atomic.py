"""What a failed write says, and leaves."""

import errno
from pathlib import Path

import pytest

from timm_xformers.files.atomic import write_file


def test_a_read_only_disk_is_told_by_the_name_that_the_user_knows(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with (
        pytest.raises(OSError, match="Read-only") as raised,
        write_file(tmp_path / "x.txt") as fresh,
    ):
        refuse(fresh)
    assert raised.value.filename == str(tmp_path / "x.txt")
