"""The retrofit's evidence: figures of the page come from the records, and twins are twins."""

import json
import shutil
import statistics

import pytest
import timm
import torch

from timm_xformers.replace import attention_sites
from tools.checkout import this_checkout
from tools.retrofit_page import read_evidence, retrofit_plot, retrofit_tables
from tools.retrofit_proof import with_timms_attention

FOLDERS = this_checkout().retrofits()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_record_is_in_the_table(folder, tmp_path):
    found = read_evidence(folder)
    records = [json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")]
    assert sum(len(row.top1) for row in found.rows) == len(records)
    mean = statistics.fmean(value for row in found.rows for value in row.top1)
    assert mean == pytest.approx(statistics.fmean(r["test_top1_percent"] for r in records))
    assert len({row.images for row in found.rows}) == 1
    for row in found.rows:
        low, high = row.interval
        assert low <= row.mean <= high
        assert (row.trained == 0) == (row.kind == "swapped") == (row.percent == 0)
    assert f"| {100 * found.rows[0].mean / found.teacher:.1f} |" in retrofit_tables(found)[2]
    retrofit_plot(found, tmp_path / "plot.png", folder.name)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_rows_of_other_images_are_refused(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(FOLDERS[0], folder)
    path = sorted((folder / "rows").glob("*.json"))[0]
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"test_teacher_top1_percent": 1.0}))
    with pytest.raises(ValueError, match="tested on different images"):
        read_evidence(folder)


def test_twin_with_timms_attention_computes_the_same():
    model = timm.create_model("vix_softmax", img_size=8, depth=2, embed_dim=32, num_heads=2).eval()
    twin = with_timms_attention(model).double()
    kinds = {type(site.module).__module__ for site in attention_sites(twin)}
    assert kinds == {"timm.layers.attention"}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(twin(images), model.double()(images))
