"""Packaged weights: as they were written, exactly what timm lists, and loading without network."""

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import generate_default_cfgs, model_entrypoint

import timm_xformers.models  # noqa: F401  registers the models where autoload is off
from timm_xformers.files.atomic import sha256_of
from timm_xformers.weights import MAX_BYTES, best_tag, check_images, manifest, read_manifest
from timm_xformers.weights.manifest import FOLDER, TAGS, Weights, with_weights

WHEEL_BYTES = 60 * 2**20
ENTRIES = read_manifest()
NAMES = list(ENTRIES)
PLAIN = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "first_conv": "stem",
}
SOME = Weights(
    name="a.digits",
    file="a.digits.safetensors",
    bytes=1,
    sha256="",
    license="apache-2.0",
    hf_hub_id="me/a",
    input_size=(1, 8, 8),
    num_classes=10,
    mean=(0.3,),
    std=(0.2,),
    crop_pct=1.0,
    interpolation="bicubic",
    label_names=("zero",),
    test_images=599,
    test_top1_percent=98.0,
    test_top1_interval_percent=(97.0, 99.0),
    recipe_hash="0",
    seed=0,
    logits=(),
)


def ours(name):
    return model_entrypoint(name.partition(".")[0]).__module__.startswith("timm_xformers.")


def assert_logits(model, entry):
    x = check_images(entry.input_size, entry.mean, entry.std)
    with torch.no_grad():
        logits = model.eval()(x)
    torch.testing.assert_close(logits, torch.tensor(entry.logits), atol=2e-3, rtol=1e-3)


def test_timm_lists_exactly_what_is_here():
    assert NAMES
    assert sorted(filter(ours, timm.list_pretrained())) == sorted(NAMES)
    assert {path.name for path in FOLDER.glob("*.safetensors")} == {
        entry.file for entry in ENTRIES.values()
    }
    assert sum(entry.bytes for entry in ENTRIES.values()) < WHEEL_BYTES


def test_a_file_of_several_tags_is_of_models_that_say_the_same():
    """On digits, windows of 64 tokens and of 8x8 pixels are all there is beside the class token."""
    shared = {name: entry for name, entry in ENTRIES.items() if entry.card != name}
    assert {*shared} == {"vix_local1d_w64.digits", "vix_local2d_w8.digits"}
    for entry in shared.values():
        assert entry.logits == ENTRIES[entry.card].logits
        assert entry.sha256 == ENTRIES[entry.card].sha256


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_they_were_written(name):
    entry = ENTRIES[name]
    assert sha256_of(entry.path) == entry.sha256
    assert entry.path.stat().st_size == entry.bytes <= MAX_BYTES
    kinds = {value.dtype for value in load_file(entry.path).values() if value.is_floating_point()}
    assert kinds == {torch.float16}


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_says_what_it_said(name):
    entry = ENTRIES[name]
    model = timm.create_model(name, pretrained=True)
    assert_logits(model, entry)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == entry.input_size
    assert (config["mean"], config["std"]) == (entry.mean, entry.std)
    assert model.pretrained_cfg["label_names"] == entry.label_names
    assert len(entry.label_names) == entry.num_classes == model.num_classes
    untrained = timm.create_model(name)
    assert untrained.pretrained_cfg["input_size"] == entry.input_size
    with pytest.raises(AssertionError):
        assert_logits(untrained, entry)


@pytest.mark.parametrize("model", sorted({entry.model for entry in ENTRIES.values()}))
def test_bare_name_means_its_best_tag(model):
    best = next(tag for tag in TAGS if f"{model}.{tag}" in ENTRIES)
    assert best_tag(model) == best
    entry = ENTRIES[f"{model}.{best}"]
    assert_logits(timm.create_model(model, pretrained=True), entry)
    # timm's newest scripts look the configuration up and hand it on.
    looked_up = timm.get_pretrained_cfg(model).to_dict()
    assert_logits(timm.create_model(model, pretrained=True, pretrained_cfg=looked_up), entry)
    with torch.device("meta"):
        untrained = timm.create_model(model)
    assert untrained.pretrained_cfg["input_size"][1:] == untrained.patch_embed.img_size
    assert untrained.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_with_other_heads_channels_and_sizes(name):
    entry = ENTRIES[name]
    channels, side, _ = entry.input_size
    model = timm.create_model(
        name, pretrained=True, num_classes=3, in_chans=4 - channels, img_size=2 * side
    ).eval()  # BatchNorm's running figures are compared below
    assert model(torch.zeros(2, 4 - channels, 2 * side, 2 * side)).shape == (2, 3)
    own = load_file(entry.path)
    same = [
        key
        for key, value in model.state_dict().items()
        if key in own
        and value.shape == own[key].shape
        and torch.equal(value, own[key].to(value.dtype))
    ]
    assert len(same) > len(own) // 2


def test_names_without_weights_claim_none():
    assert not timm.is_model_pretrained("cct_14_7x2_224")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cct_14_7x2_224"):
        timm.create_model("cct_14_7x2_224", pretrained=True)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("cct_14_7x2_224.digits", pretrained=True)


def test_a_callers_own_source_is_left_alone(tmp_path):
    entry = next(iter(ENTRIES.values()))
    fresh = timm.create_model(entry.model)
    torch.save(fresh.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth")}
    loaded = timm.create_model(entry.model, pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def defaults(monkeypatch, *entries):
    monkeypatch.setattr(manifest, "_packaged", lambda: {entry.name: entry for entry in entries})
    return generate_default_cfgs(with_weights({"a": dict(PLAIN), "b": dict(PLAIN)}))


def test_default_tag_is_the_best_one_for_the_names_own_images(monkeypatch):
    alike = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.2,) * 3}
    cifar10 = dataclasses.replace(SOME, name="a.cifar10", hf_hub_id="me/b", **alike)
    found = defaults(monkeypatch, cifar10, SOME)
    assert list(found["a"].tags) == ["cifar10", "digits"]
    assert best_tag("a") == "cifar10"
    assert found["a"].cfgs["digits"].input_size == (1, 8, 8)
    assert found["a"].cfgs["cifar10"].first_conv == "stem"
    assert list(found["b"].tags) == [""]
    assert best_tag("b") is None

    found = defaults(monkeypatch, SOME)
    assert list(found["a"].tags) == ["", "digits"]
    assert best_tag("a") == "digits"


def test_hub_stands_in_for_a_file_that_is_not_here(monkeypatch, tmp_path):
    config = defaults(monkeypatch, SOME)["a"].cfgs["digits"]
    assert (config.file, config.hf_hub_id) == (None, "me/a")

    nowhere = dataclasses.replace(SOME, hf_hub_id=None)
    assert list(defaults(monkeypatch, nowhere)["a"].tags) == [""]

    monkeypatch.setattr(manifest, "FOLDER", tmp_path)
    (tmp_path / SOME.file).write_bytes(b"")
    config = defaults(monkeypatch, SOME)["a"].cfgs["digits"]
    assert (config.file, config.hf_hub_id) == (str(tmp_path / SOME.file), None)


def test_check_images_are_the_same_everywhere():
    images = check_images((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    assert images.shape == (3, 3, 32, 32)
    pixels = (255 * images).round().long()
    assert int(pixels.min()) == 0
    assert int(pixels.max()) > 250
    # By hand: image, channel, row, column.
    places = {(0, 0, 0, 0): 0, (0, 0, 16, 0): 255, (0, 1, 0, 0): 90, (1, 2, 3, 5): 76}
    assert {place: int(pixels[place]) for place in places} == places


def test_manifest_is_in_the_order_of_tags():
    text = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(text) == sorted(NAMES)
    places = [(entry.model, TAGS.index(entry.tag)) for entry in ENTRIES.values()]
    assert places == sorted(places)
