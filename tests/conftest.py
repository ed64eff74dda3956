"""A model that trains an epoch of digits in a tenth of a second, and a clean slate per test."""

import gc
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xdist
from PIL import Image

from timm_xformers.recipe import Recipe

TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "epochs": 2,
    "lr": 3e-3,
    "trackers": [],  # TensorBoard takes seconds to import
}


def pytest_sessionstart(session: pytest.Session) -> None:
    """What all tests need, but not the process that only hands them out: it takes seconds."""
    if xdist.is_xdist_controller(session):
        return
    import accelerate  # noqa: F401
    import torch

    # Most tensors here are tiny: a second thread costs more in barriers than it computes.
    torch.set_num_threads(1)
    gc.disable()  # until all modules are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The costliest fixtures first: only what is left at the end is shared with other workers."""
    items.sort(key=lambda item: item.path.name != "test_registration.py")


def pytest_collection_finish() -> None:
    """What collecting made stays to the end, so that no search for garbage goes over it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_slate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Default run folders land in tmp_path; precision is a setting of the process in accelerate."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are files of one pixel: drawing a run's takes longer than training it here."""
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "png")

    def savefig(figure: object, path: str | Path, **options: object) -> None:
        Path(path).write_bytes(dot.getvalue())

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """Recipe of the tiny model; keywords go over it."""
    return lambda **values: Recipe(**{**TINY, **values})


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Red and blue squares, 24 to train and 8 to test, in folders by class."""
    root = tmp_path / "squares"
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in (("blue", (20, 30, 200)), ("red", (200, 30, 20))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (20 + number, 20), colour)
                image.putpixel((number, number % 20), (255, 255, 255))
                image.save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of the smallest of our models; not to be changed."""
    from timm_xformers.training.train import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(
        Recipe(
            model="vix_mnist_nano",
            epochs=2,
            lr=5e-3,
            img_size=8,
            trackers=[],
            output=str(folder),
        )
    )
    return folder


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """The same run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
