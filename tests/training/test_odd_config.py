"""A config.json that somebody or something else wrote is a sentence, never a traceback."""

import json

import pytest

from timm_xformers.errors import UserError
from timm_xformers.training.build import build_model

WHOLE = {
    "architecture": "vix_mnist_nano",
    "num_classes": 10,
    "label_names": list("0123456789"),
    "model_args": {"in_chans": 1, "img_size": [8, 8]},
    "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4]},
}


def build(folder, config):
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    return build_model(f"local-dir:{folder}")[0]


def test_what_we_write_is_read(tmp_path):
    assert build(tmp_path, WHOLE).num_classes == 10
    assert build(tmp_path, WHOLE | {"num_classes": 0}).num_classes == 0


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe{", id="no-utf8"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param([], id="list"),
        pytest.param(None, id="null"),
        pytest.param({k: v for k, v in WHOLE.items() if k != "architecture"}, id="no-model"),
        pytest.param(WHOLE | {"architecture": "no_such_model"}, id="unknown-model"),
        pytest.param(WHOLE | {"architecture": 3}, id="model-number"),
        pytest.param(WHOLE | {"num_classes": "ten"}, id="classes-word"),
        pytest.param(WHOLE | {"num_classes": True}, id="classes-bool"),
        pytest.param(WHOLE | {"num_classes": -1}, id="classes-negative"),
        pytest.param(WHOLE | {"label_names": 7}, id="labels-number"),
        pytest.param(WHOLE | {"model_args": [1]}, id="args-list"),
        pytest.param(WHOLE | {"model_args": {"nonsense": 1}}, id="args-unknown"),
        pytest.param(WHOLE | {"model_args": {"depth": "deep"}}, id="args-word"),
        pytest.param(WHOLE | {"pretrained_cfg": "x"}, id="cfg-word"),
        pytest.param(WHOLE | {"pretrained_cfg": {"input_size": 5}}, id="size-number"),
        pytest.param(WHOLE | {"pretrained_cfg": {"input_size": [1, 8]}}, id="size-short"),
        pytest.param(WHOLE | {"pretrained_cfg": {"input_size": [1, 0, 8]}}, id="size-zero"),
        pytest.param(WHOLE | {"pretrained_cfg": {"mean": "grey"}}, id="mean-word"),
        pytest.param(WHOLE | {"pretrained_cfg": {"std": ["a"]}}, id="std-words"),
    ],
)
def test_odd_config_is_a_sentence(tmp_path, config):
    with pytest.raises(UserError):
        build(tmp_path, config)
