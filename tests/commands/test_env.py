"""What a report of a fault needs, and no secret."""

import json

import pytest

import timm_xformers
from timm_xformers.cli import main


def test_env_names_versions_devices_and_extras(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["timm-xformers"].startswith(timm_xformers.__version__)
    assert found["versions"]["torch"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert {"devices", "threads", "BLAS", "processor", "allocator", "extras", "data"} <= set(found)
    assert "secret" not in json.dumps(found)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "torch: " in said
    assert "secret" not in said


def test_env_finds_data_and_what_an_extra_lacks(capsys, monkeypatch, tmp_path):
    from timm_xformers.commands import env

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    requirements = ['nosuchpackage>=1; extra == "train"', 'torch>=2; extra == "data"']
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: requirements)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"] == {"train": "lacks nosuchpackage", "data": "installed"}
    assert found["data"] == {"mnist": str(tmp_path / "data")}


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"timm-xformers {timm_xformers.__version__}\n"
