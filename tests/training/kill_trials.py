"""Kill a training run at random moments until it is done, and compare: ``--trials 200``.

Each trial trains a small run in a process of its own, with mixup, averaged weights and accumulation
on, and kills it by SIGKILL after a random time, again and again, until it has finished. What it
leaves must equal the undisturbed run bit for bit. Three of four trials hold their images in memory;
in the fourth two workers decode them from files. Children are forked, so that a start costs no
imports.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_xformers.recipe import Recipe
from timm_xformers.training.train import resume, train

MODEL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
RUN = Recipe(
    model="vit_tiny_patch16_224",
    model_kwargs={**MODEL, "proj_drop_rate": 0.1},
    epochs=2,
    lr=3e-3,
    batch_size=64,
    grad_accum_steps=2,
    mixup=0.2,
    cutmix=0.5,
    drop_path_rate=0.2,
    crop_pad=1,
    rotate_degrees=10.0,
    re_prob=0.3,
    model_ema_decay=0.9,
    clip_grad=1.0,
    trackers=[],
)
# Images from files know no turns, and fewer of them take as long.
FROM_FILES = replace(
    RUN,
    data="folder",
    in_memory=False,
    num_workers=2,
    img_size=8,
    batch_size=32,
    crop_pad=0,
    rotate_degrees=0.0,
    auto_augment="rand-m5-mstd0.5",
)
# Saving always, now and then, and after epochs only: kills fall into writing and into computing.
PACES = (1e-9, 0.002, 0.0)


def write_images(root: Path) -> None:
    """Put some handwritten digits into folders by class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number < 100 else "train"
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((16 * image).clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
        if number == 500:
            break


def start(recipe: Recipe, root: Path, minutes: float) -> int:
    """Fork a child that starts or continues the run; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with (root.parent / f"{root.name}.log").open("a") as log:
            os.dup2(log.fileno(), 2)
            try:
                if (root / "recipe.yaml").exists():
                    resume(root, checkpoint_minutes=minutes)
                else:
                    train(replace(recipe, output=str(root), checkpoint_minutes=minutes))
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Wait for a child; kill it when the time is over. Returns its code, None if killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def trial(recipe: Recipe, root: Path, rng: random.Random, seconds: float) -> tuple[bool, int]:
    """Kill and continue until the run is done.

    Args:
        recipe: What to train.
        root: Where to.
        rng: Draws the moments.
        seconds: What the run takes when nobody disturbs it.

    Returns:
        Whether it ever failed to go on, and how often it was killed.
    """
    kills = 0
    while True:
        # Mostly before it is done; after six times it gets what it needs.
        patience = rng.uniform(0, 0.8 * seconds) if kills < 6 else 120.0
        code = wait(start(recipe, root, rng.choice(PACES)), patience)
        if code is None:
            kills += 1
        else:  # a run killed after its end refuses to go on, and rightly
            return code != 0 and not (root / "results.json").exists(), kills


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not equal, bit for bit; times are left out."""
    sys.path.insert(0, str(Path(__file__).parent))
    from test_resume import assert_same_run

    try:
        assert_same_run(one, other)
    except AssertionError as error:
        return [str(error)[:200]]
    return []


def main(trials: int, seed: int = 0) -> int:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    lost = unlike = kills = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images")
        contenders = []
        for way, recipe in (
            ("memory", RUN),
            ("files", replace(FROM_FILES, data_dir=str(folder / "images"))),
        ):
            times = []  # the quickest counts, since others may be at work
            for name in (
                way,
                f"{way}-again",
                f"{way}-third",
            ):
                begin = time.monotonic()
                assert wait(start(recipe, folder / name, 0.0), 120) == 0, name
                times.append(time.monotonic() - begin)
            contenders.append((recipe, folder / way, min(times)))
        for number in range(trials):
            recipe, whole, seconds = contenders[number % 4 == 3]
            root = folder / f"run{number}"
            failed, killed = trial(recipe, root, rng, seconds)
            kills += killed
            if failed:
                lost += 1
                print((folder / f"{root.name}.log").read_text()[-2000:])
            elif found := differences(whole, root):
                unlike += 1
                print(root.name, found)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} trials, {kills} kills, {lost} lost, {unlike} different")
    print(f"{trials} trials, {kills} kills, {lost} lost, {unlike} different")
    return int(lost + unlike > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    raise SystemExit(main(options.trials, options.seed))
