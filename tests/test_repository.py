"""Files around the code that no program reads here: workflows, issue forms, citation, bounds."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
import yaml

import timm_xformers

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
EXTRAS = ("train", "data", "search", "export", "docs")


def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brought tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_lowest_versions_are_the_bounds_of_pyproject():
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    bounds = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in wanted]
    assert None not in bounds
    pins = (GITHUB / "lowest.txt").read_text(encoding="utf-8").split("\n#")[0].splitlines()[1:]
    assert sorted(pins) == sorted(f"{found[1]}=={found[2]}" for found in bounds)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_jobs_that_end_and_few_rights(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "permissions", "jobs"} <= {*workflow}
    assert True in workflow  # YAML 1.1 reads the key `on` so
    assert workflow["permissions"]["contents"] == "read"
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_ci_is_the_developers_command_and_its_files_exist():
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    linux = workflow["jobs"]["linux"]
    assert ".ci/run python" in linux["steps"][-1]["run"]
    cases = linux["strategy"]["matrix"]["include"]
    assert [case["versions"] for case in cases] == ["lowest", "highest"]
    assert (ROOT / cases[0]["constraint"]).is_file()
    assert cases[0]["python"] == project()["requires-python"].removeprefix(">=")
    systems = workflow["jobs"]["smoke"]["strategy"]["matrix"]["os"]
    assert systems == ["macos-latest", "windows-latest"]


def test_smoke_test_passes_here(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(GITHUB / "smoke.py"))
    assert "two models and weights work" in capsys.readouterr().out


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        return
    assert {"name", "description", "body"} <= {*form}
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len({*ids})
    assert all(field["attributes"]["label"] for field in form["body"])


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == timm_xformers.__version__
    assert citation["license"] == project()["license"]
    assert {"cff-version", "message", "title", "authors"} <= {*citation}
