"""Who may import whom (the arrows of the package), and what a light import must not load."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "timm_xformers"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SCRIPTS = sorted((ROOT / "train_scripts").glob("*.py"))

# For each part: the parts of ours, and the packages of others, that it may import.
MODELS_BELOW = {"layers", "weights", "registration", "replace"}
BELOW_DATA = {"errors", "files", "recipe"}
BELOW_TRAINING = BELOW_DATA | {"data", "layers", "records", "replace", "weights"}
ARROWS = {
    "__init__": ({"registration"}, set()),
    "__main__": ({"cli"}, set()),
    "registration": (set(), set()),
    "layers": (set(), {"torch", "timm", "triton"}),
    "weights": (set(), {"torch", "timm", "safetensors", "huggingface_hub"}),
    "models": (MODELS_BELOW, {"torch", "timm"}),
    "transformers_attention": ({"layers"}, {"torch", "transformers"}),
    "replace": ({"layers"}, {"torch", "timm"}),
    # Rooms from here on use models by timm.create_model alone, so they work for every timm model.
    "errors": (set(), set()),
    "files": ({"errors"}, None),
    "recipe": ({"errors", "files"}, {"yaml"}),
    "data": (BELOW_DATA, None),
    "records": (BELOW_DATA, None),
    "training": (BELOW_TRAINING, None),
    "predicting": (BELOW_TRAINING | {"training"}, None),
    "explaining": (BELOW_TRAINING | {"predicting", "training"}, None),
    "analysing": (BELOW_TRAINING | {"benchmarking", "predicting", "training"}, None),
    "planning": (BELOW_TRAINING | {"training"}, None),
    "benchmarking": (BELOW_TRAINING | {"training"}, None),
    # A study says before it starts what it takes, and measures its arms side by side.
    "studies": (BELOW_TRAINING | {"benchmarking", "planning", "training"}, None),
    "exporting": (BELOW_TRAINING | {"training"}, None),
    "publishing": (BELOW_TRAINING | {"planning", "predicting", "training"}, None),
    # Commands import what they need when they run: --help loads neither torch nor an extra.
    "commands": (
        {
            "analysing",
            "benchmarking",
            "data",
            "errors",
            "explaining",
            "exporting",
            "files",
            "planning",
            "predicting",
            "publishing",
        }
        | {"recipe", "studies", "training"},
        {"torch", "timm"},
    ),
    "cli": ({"commands", "errors", "recipe", "training"}, {"torch", "timm"}),
}
# What mechanisms share, where the factory imports it too.
SHARED_LAYERS = {"heads"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, except for type checkers only."""
    names = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def own(names: set[str], *, below: str = "timm_xformers") -> set[str]:
    """Second parts of the names below a package: ``timm_xformers.layers.x`` gives ``layers``."""
    prefix = f"{below}."
    return {
        name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)
    }


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_arrows(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours, others = ARROWS[part]
    names = imported(path)
    # `from timm_xformers import __version__` reads the package itself.
    assert own(names) - {"__version__", part} <= ours
    if others is not None:
        foreign = {name.partition(".")[0] for name in names} - {"timm_xformers"}
        assert foreign - sys.stdlib_module_names <= others


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, *TOOLS], ids=relative)
def test_timm_is_used_as_exported(path):
    private = {
        name
        for name in imported(path)
        if name.startswith("timm.") and any(part.startswith("_") for part in name.split("."))
    }
    assert private <= {"timm.__version__"}


def test_only_the_factory_sees_all_mechanisms():
    layers = PACKAGE / "layers"
    mechanisms = own(imported(layers / "factory.py"), below="timm_xformers.layers") - SHARED_LAYERS
    assert len(mechanisms) >= 6
    for name in mechanisms:  # a file, or a room of several
        room = [*layers.glob(f"{name}.py"), *layers.glob(f"{name}/**/*.py")]
        assert room, name
        seen = own(set().union(*map(imported, room)), below="timm_xformers.layers")
        assert not (seen - {name}) & mechanisms, name


def test_families_do_not_see_each_other():
    files = [p for p in (PACKAGE / "models").glob("*.py") if not p.stem.startswith("_")]
    families = {path.stem for path in files}
    for path in files:
        assert not own(imported(path), below="timm_xformers.models") & families, path.stem


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_only_call_the_package(path):
    names = imported(path)
    assert own(names) == {"cli"}
    assert {name.partition(".")[0] for name in names} - {"timm_xformers"} <= sys.stdlib_module_names


def run(code: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_package_import_is_light():
    run(
        "import sys, timm_xformers\n"
        "heavy = {'torch', 'timm', 'accelerate', 'numpy', 'yaml'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
