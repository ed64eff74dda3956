"""The README's table from a study: what it says of runs and costs that are there or missing."""

import json
import shutil

import pytest

from tools.checkout import Checkout, this_checkout
from tools.readme_table import readme_table

NOTES = """\
readme:
  study: results/digits_study
  arms: {softmax: exact, linformer: Linformer}
  conditions: On digits.
"""


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    made = Checkout(tmp_path)
    shutil.copytree(this_checkout().results / "digits_study", made.results / "digits_study")
    made.notes.write_text(NOTES)
    return made


def test_arms_and_costs_of_a_complete_study(checkout):
    heads, _, exact, linformer, _, words = readme_table(checkout).splitlines()[:6]
    assert heads == "| attention | test top-1 % | seeds | parameters | processor s | MiB |"
    assert exact.startswith("| exact | 81.72 ± 2.01 | 2 | 71,690 | 18 | ")
    assert linformer.startswith("| Linformer | 93.41 ± 1.06 | 2 | 88,330 | ")
    # The machine was not quiet while speed was measured.
    assert words.startswith("On digits. Speed (images/s, left out where the machine was not quiet)")
    assert "Not complete" not in readme_table(checkout)


def test_speed_is_shown_where_it_was_steady(checkout):
    path = checkout.results / "digits_study" / "costs.json"
    costs = json.loads(path.read_text())
    for arm in costs["data"]["digits"]["arms"].values():
        arm["train_steady"] = True
    path.write_text(json.dumps(costs))
    heads, _, exact, *_ = readme_table(checkout).splitlines()
    assert heads.endswith("| processor s | images/s | MiB |")
    assert exact.startswith("| exact | 81.72 ± 2.01 | 2 | 71,690 | 18 | 552 | ")


def test_what_is_missing_is_said(checkout):
    study = checkout.results / "digits_study"
    (study / "costs.json").unlink()
    for run in ("softmax-s0", "linformer-s0", "linformer-s1"):
        shutil.rmtree(study / "records" / run)
    heads, _, exact, linformer, _, *words = readme_table(checkout).splitlines()
    assert heads == "| attention | test top-1 % | seeds | parameters | processor s |"
    # A single run has the interval of its test images.
    assert exact == "| exact | 83.14 (79.93 to 85.92 *W*) | 1 | 71,690 | 19 |"
    assert linformer == "| Linformer | - | 0 | - | - |"
    assert " ".join(words) == (
        "On digits. Speed and memory have not been measured yet. Not complete: 3 of 6 runs are "
        "finished."
    )


def test_no_table_without_a_note(checkout):
    checkout.notes.write_text("mixes: {}\n")
    assert readme_table(checkout) == ""
