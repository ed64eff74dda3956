"""Memory and precision of the devices."""

import ctypes
import sys
import types

import pytest

from timm_xformers.training import devices


@pytest.mark.parametrize(
    ("platform", "library", "calls"),
    [("linux", "glibc", 3), ("linux", "musl", 0), ("darwin", "glibc", 0)],
)
def test_freed_memory_is_kept_where_malloc_can(monkeypatch, platform, library, calls):
    asked = []
    found = types.SimpleNamespace()
    if library == "glibc":
        found.mallopt = lambda *option: asked.append(option)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(sys, "platform", platform)
    devices.make_accelerator("no")
    assert asked == list(devices.MALLOC_OPTIONS.items())[:calls]
