"""From a run folder to float16 weights, and into the package of a checkout."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.predicting.evaluate import evaluate
from timm_xformers.publishing.finished_run import open_finished
from timm_xformers.publishing.float16 import convert, write_float16
from timm_xformers.recipe import Recipe
from timm_xformers.records.results_json import Record
from timm_xformers.weights import MANIFEST_FILE, check_images, read_manifest
from tools import package_weights as package
from tools.checkout import Checkout, this_checkout
from tools.generated_files import stale_files, write_generated
from tools.package_weights import add_to_package

NAME = "vix_mnist_nano.digits"
README = "# A\n<!-- readme -->\n<!-- /readme -->\nB\n"
RECORDS, PAGE = README.replace("readme", "results"), README.replace("readme", "best")
NOTES = "mixes: {vix_mnist_nano: tiny patches}\ncommands: {}\npublished: {}\nbudgets: {}\n"


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    made = Checkout(tmp_path / "checkout")
    made.weights.mkdir(parents=True)
    (made.weights / "manifest.json").write_text("{}")
    made.results.mkdir(parents=True)
    made.notes.write_text(NOTES)
    made.readme.write_text(README)
    made.results_page.parent.mkdir()
    made.results_page.write_text(PAGE)
    made.records_page.write_text(RECORDS)
    (made.root / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    return made


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def retrained(run: Path, seed: int = 1) -> Path:
    """The same run as if its weights were others."""
    path = run / "best" / "model.safetensors"
    weights = {key: value + 0.01 for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    manifest = json.loads((run / "best" / "manifest.json").read_text())
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": package.sha256_of(path)}
    (run / "best" / "manifest.json").write_text(json.dumps(manifest))
    record = Record.load(run / "results.json")
    dataclasses.replace(record, seed=seed).save(run / "results.json")
    return run


def test_folder_of_float16_weights(finished_run, tmp_path):
    record = convert(open_finished(finished_run), tmp_path / "half")
    trained = Record.load(finished_run / "results.json")
    assert (record.kind, record.weights_dtype, trained.weights_dtype) == (
        "evaluate",
        "float16",
        None,
    )
    assert (record.seed, record.recipe_hash) == (trained.seed, trained.recipe_hash)
    assert Record.load(tmp_path / "half" / "results.json") == record
    halves = load_file(tmp_path / "half" / "model.safetensors")
    wholes = load_file(finished_run / "best" / "model.safetensors")
    assert halves.keys() == wholes.keys()
    assert all(torch.equal(halves[key], wholes[key].half()) for key in wholes)
    model = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, halves[key].to(value.dtype)), key
    with pytest.raises(UsageError, match="exists"):
        convert(open_finished(finished_run), tmp_path / "half")


def test_what_a_killed_convert_left_goes_and_nothing_else(finished_run, tmp_path):
    left = tmp_path / ".txf-0123abcd-half"
    kept = [tmp_path / name for name in (".txf-0123abcd-other", "half.tmp-1", "notes.tmp-2")]
    for folder in (left, *kept):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    convert(open_finished(finished_run), tmp_path / "half")
    assert not left.exists()
    assert all((folder / "model.safetensors").exists() for folder in kept)


def test_adding_writes_everything_that_belongs_to_it(finished_run, checkout):
    run = open_finished(finished_run)
    entry, record = add_to_package(run, checkout)
    assert read_manifest(checkout.weights) == {NAME: entry}
    path = checkout.weights / entry.file
    assert package.sha256_of(path) == entry.sha256
    assert path.stat().st_size == entry.bytes
    assert entry.test_top1_percent == record.test_top1_percent
    assert record == checkout.load_float16_record(NAME)
    assert record.model == NAME
    assert entry.label_names == tuple(map(str, range(10)))
    assert checkout.training_records() == {"digits": [run.record]}

    model = timm.create_model("vix_mnist_nano", img_size=8).eval()
    model.load_state_dict(load_file(path))
    with torch.no_grad():
        logits = model(check_images(entry.input_size, entry.mean, entry.std))
    torch.testing.assert_close(logits, torch.tensor(entry.logits), atol=1e-4, rtol=1e-4)

    assert checkout.load_recipe(entry.recipe_hash).digest == entry.recipe_hash
    assert "output" not in yaml.safe_load(checkout.stored_recipe(entry.recipe_hash).read_text())
    row = next(line for line in checkout.records_page.read_text().splitlines() if "nano" in line)
    assert f"{entry.test_top1_percent:.2f} | 1 | - |" in row  # as they load
    assert f"[weights](../model_cards/{NAME}.md)" in row
    assert f"--recipe results/recipes/vix_mnist_nano.digits.{entry.recipe_hash}.yaml" in row
    assert stale_files(checkout) == []


def test_adding_again_changes_nothing(finished_run, checkout):
    run = open_finished(finished_run)
    add_to_package(run, checkout)
    before = contents(checkout.root)
    add_to_package(run, checkout)
    assert contents(checkout.root) == before


def test_a_tag_changes_before_the_first_release_only_and_when_told_to(
    finished_run, run_copy, checkout
):
    first, _ = add_to_package(open_finished(finished_run), checkout)
    other = open_finished(retrained(run_copy))
    before = contents(checkout.root)
    with pytest.raises(UserError, match=r"has other weights \(seed 0, .* add --replace"):
        add_to_package(other, checkout)
    assert contents(checkout.root) == before
    entry, _ = add_to_package(other, checkout, replace=True)
    assert (entry.seed, first.seed) == (1, 0)
    assert entry.sha256 != first.sha256
    assert stale_files(checkout) == []

    changelog = checkout.root / "CHANGELOG.md"
    changelog.write_text(changelog.read_text() + "\n## 0.1.0 - 2026-12-01\n")
    with pytest.raises(UserError, match="published weights never change"):
        add_to_package(open_finished(finished_run), checkout, replace=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "vit_tiny_patch16_224"}, "is no model of this package"),
        ({"model": "no_such_model"}, "is no model of this package"),
        ({"data": "tiny_imagenet"}, "tags are cifar10, cifar100, mnist, digits"),
        ({"model_kwargs": {"patch_size": 2}}, "train without"),
        ({"val_images": None}, "chosen on validation"),
    ],
)
def test_runs_that_can_give_no_tag(change, words, finished_run, checkout):
    run = open_finished(finished_run)
    run = dataclasses.replace(run, record=dataclasses.replace(run.record, **change))
    before = contents(checkout.root)
    with pytest.raises(UserError, match=words):
        add_to_package(run, checkout)
    assert contents(checkout.root) == before


def test_weights_beyond_float16_are_refused(run_copy, tmp_path):
    run = open_finished(run_copy)
    path = run_copy / "best" / "model.safetensors"
    weights = load_file(path)
    weights["head.bias"][0] = 70000
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"head.bias has values up to 70000"):
        write_float16(run, tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "holds no run"),
        (lambda run: (run / "results.json").unlink(), "is not finished"),
        (lambda run: (run / "results.json").write_text("{}"), "is damaged"),
        (lambda run: (run / "best" / "config.json").write_text("{}"), "config.json has 2 bytes"),
        (lambda run: shutil.rmtree(run / "best"), "is damaged"),
    ],
)
def test_damaged_runs_are_named(damage, words, run_copy, capsys):
    damage(run_copy)
    assert main(["convert", str(run_copy), "--output", "half"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not Path("half").exists()


def test_command_says_both_figures(finished_run, capsys):
    assert main(["convert", str(finished_run), "--output", "half"]) == 0
    out = capsys.readouterr().out
    record, _ = json.JSONDecoder().raw_decode(out)
    assert record["weights_dtype"] == "float16"
    trained = Record.load(finished_run / "results.json").test_top1_percent
    assert out.splitlines()[-1] == (
        f"float16 weights are in half: {record['test_top1_percent']:.2f} % on the test set, "
        f"{trained:.2f} % as trained"
    )
    assert main(["convert", str(finished_run), "--to-package"]) == 2


def test_a_file_that_other_tags_load_is_not_replaced(finished_run, checkout):
    add_to_package(open_finished(finished_run), checkout)
    path = checkout.weights / MANIFEST_FILE
    entries = json.loads(path.read_text())
    entries["vix_softmax.digits"] = entries[NAME]
    entries[NAME] = {**entries[NAME], "sha256": "0" * 64}
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"vix_softmax.digits load the file of {NAME} too"):
        add_to_package(open_finished(finished_run), checkout, replace=True)


def test_stale_files_are_noticed(finished_run, checkout):
    add_to_package(open_finished(finished_run), checkout)
    card = checkout.card(NAME)
    card.write_text(card.read_text() + "by hand\n")
    checkout.card("old").write_text("of weights that are gone\n")
    checkout.results_page.write_text(PAGE)
    checkout.records_page.write_text(RECORDS)
    wanted = ["model_cards/old.md", f"model_cards/{NAME}.md"]
    wanted += ["docs/records.md", "docs/results.md"]
    assert sorted(stale_files(checkout)) == sorted(wanted)
    checkout.card("old").unlink()
    write_generated(checkout)
    assert stale_files(checkout) == []


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_cards_of_this_checkout_are_valid_and_equal_the_records():
    checkout = this_checkout()
    assert stale_files(checkout) == [], "run: python -m tools.write_cards"
    entries = read_manifest(checkout.weights)
    assert entries
    for name, entry in entries.items():
        text = checkout.card(entry.card).read_text(encoding="utf-8")
        if entry.card != name:  # the same file under another name
            assert f"`{name}`" in text
            assert not checkout.card(name).exists()
            assert entries[entry.card].sha256 == entry.sha256
            continue
        head = head_of(text)
        assert head["license"] == entry.license
        assert (head["library_name"], head["pipeline_tag"]) == ("timm", "image-classification")
        (model,) = head["model-index"]
        assert model["name"] == name
        (result,) = model["results"]
        assert result["task"]["type"] == "image-classification"
        assert {"type", "name", "split"} == result["dataset"].keys()
        figures = {metric["name"]: metric["value"] for metric in result["metrics"]}
        record = checkout.load_float16_record(name)
        assert figures == {
            "Top-1 accuracy, %": record.test_top1_percent,
            "Top-5 accuracy, %": record.test_top5_percent,
        }
        assert record.test_top1_percent == entry.test_top1_percent
        assert (record.weights_dtype, record.model) == ("float16", name)
        assert (record.seed, record.recipe_hash) == (entry.seed, entry.recipe_hash)
        for word in ("## Use", "**Limits.**", "## Data", "## Results", "## Training", "## Speed"):
            assert word in text


DATA_DIR = os.environ.get("TIMM_XFORMERS_DATA")  # has mnist/, cifar10/ and so on


@pytest.mark.slow
@pytest.mark.parametrize("name", read_manifest())
def test_evaluation_by_name_gives_the_published_figures(name):
    tag = name.partition(".")[2]
    if tag != "digits" and DATA_DIR is None:
        pytest.skip("TIMM_XFORMERS_DATA names no folder with the data sets")
    folder = None if tag == "digits" else str(Path(DATA_DIR) / tag)
    record = evaluate(Recipe(model=name, data=tag, data_dir=folder))
    card = read_manifest()[name].card
    published = this_checkout().load_float16_record(card)
    assert record.test_images == published.test_images
    assert record.test_top1_percent == published.test_top1_percent
    assert record.test_top5_percent == published.test_top5_percent
    assert record.test_loss == pytest.approx(published.test_loss, rel=1e-3)
