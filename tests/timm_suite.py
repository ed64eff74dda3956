"""Run timm's own model tests on our models: ``python tests/timm_suite.py [pytest arguments]``.

The tests come from the source distribution of the installed timm version, which pip downloads.
They take their model names from ``timm.list_models`` while they are imported, so that function is
narrowed first. Not a test module itself: it needs the network, and all models take many minutes.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm

import timm_xformers.models  # noqa: F401  # registers where autoload is off

# Swin's features are maps; what the others return is tokens, and timm checks those separately.
MAPS = ("swin_",)
# A member of the list of names, and of the list of modules, by which timm selects such models.
TOKEN_FILTER, VIT_MODULE = "vit_*", "vision_transformer"
# timm asks the models of its list for three levels of features; two blocks have two.
TWO_BLOCKS, THREE_LEVELS = "_2_3x2_32", "test_model_forward_intermediates"
MARKERS = [
    *("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features"),
    *("fxforward", "fxbackward", "timeout"),
]


class OnlyOurs:
    """pytest plugin: drop the tests whose model is named in their source."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line("markers", f"{marker}: timm's")

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Function]
    ) -> None:
        kept, dropped = [], []
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            arch = str(params.get("model_name", "")).partition(".")[0]
            asks = item.originalname != THREE_LEVELS or not arch.endswith(TWO_BLOCKS)
            (kept if arch in self.names and asks else dropped).append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def narrow_to_ours() -> set[str]:
    """Make ``timm.list_models`` name only our models, treated as timm treats its ViTs."""
    list_models, list_pretrained = timm.list_models, timm.list_pretrained

    def is_ours(name: str) -> bool:
        if name == "retrofit":  # stands for another name, and is built with it
            return False
        return timm.model_entrypoint(name).__module__.startswith("timm_xformers.")

    names = {name for name in list_models() if is_ours(name)}
    modules = sorted({timm.model_entrypoint(n).__module__.rpartition(".")[2] for n in names})
    tokens = sorted(name for name in names if not name.startswith(MAPS))

    def ours(filter="", module="", pretrained=False, exclude_filters="", **options):
        def extended(value, member, more):
            return [*value, *more] if isinstance(value, list) and member in value else value

        found = list_models(
            extended(filter, TOKEN_FILTER, tokens),
            extended(module, VIT_MODULE, modules),
            pretrained,
            extended(exclude_filters, TOKEN_FILTER, tokens),
            **options,
        )
        return [name for name in found if is_ours(name)]

    timm.list_models = ours
    timm.list_pretrained = lambda *args, **options: [
        name for name in list_pretrained(*args, **options) if is_ours(name)
    ]
    return names


def find_sdist(folder: Path) -> Path:
    """Download the source distribution of the installed timm."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, "--no-binary", "timm", f"timm=={timm.__version__}"], check=True)
    return next(folder.glob("timm-*.tar.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, help="timm's source distribution; else pip gets it")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(options.sdist or find_sdist(folder)) as archive:
            member = f"timm-{timm.__version__}/tests/test_models.py"
            # Only this file: timm's package beside its tests would shadow the installed one.
            source = archive.extractfile(member)
            assert source is not None
            (folder / "test_models.py").write_bytes(source.read())
        (folder / "pytest.ini").write_text("[pytest]\n")  # not the settings of our own tests
        os.chdir(folder)
        plugin = OnlyOurs(narrow_to_ours())
        return int(pytest.main([*arguments, "test_models.py"], plugins=[plugin]))


if __name__ == "__main__":
    raise SystemExit(main())
