"""The tables of docs/speed.md: every figure from the files, no loss left out, parts that go on."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from timm_xformers.benchmarking import benchmark, cases
from timm_xformers.benchmarking.settings import Settings
from timm_xformers.errors import UserError
from timm_xformers.files.tables import csv_text
from tools import speed_page
from tools.checkout import this_checkout
from tools.speed_page import PARTS, main, measure_part, speed_blocks

ORIGIN = {
    "commit": "0123456789",
    "versions": {"torch": "2.0", "timm": "1.0"},
    "hardware": {"cpu": "a cpu", "cores": 2, "vectors": "AVX2"},
    "created": "2026-01-02T03:04:05+00:00",
    "baseline": "softmax",
    "peers": {"other": "the same", "unseen": "never measured"},
    "left_out": {
        "natten: x": {"not installed; pip install natten": [64]},
        "other: x": {"64 tokens are too few": [64]},
    },
}


def line(name, tokens=1024, task="forward", **values):
    package = values.get("package", "")
    return {
        "contender": f"{package}: {name}" if package else name,
        "name": name,
        "package": package,
        "kind": "layer",
        "pass": task,
        "tokens": tokens,
        "shape": "S32",
        "batch_size": 2,
        "device": "cpu",
        "threads": 1,
        "allocator": "default",
        "clock": "cpu",
        "ms": 10.0,
        "ms_q1": 10.0,
        "ms_q3": 10.0,
        "rounds": 5,
        "per_second": 200.0,
        "vs_exact": 1.0,
        "peer": "",
        "vs_peer": None,
        "void": False,
        "peak_mib": None,
    } | values


def write(folder, lines, **origin):
    folder.mkdir(parents=True)
    (folder / "benchmark.csv").write_text(csv_text(lines), encoding="utf-8")
    (folder / "origin.json").write_text(json.dumps([ORIGIN | origin]), encoding="utf-8")


def rows(table):
    return [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in table.splitlines()
        if text.startswith("|")
    ]


def test_before_anything_is_measured_every_table_says_how(tmp_path):
    blocks = speed_blocks(tmp_path)
    assert {f"speed {name}" for name in PARTS} - {"speed batch64"} < {*blocks}
    assert all(text.startswith("Not measured yet: `python -m tools.") for text in blocks.values())
    assert blocks["speed layers"].endswith("measure layers`.\n")


def test_page_has_every_block_and_each_is_up_to_date():
    checkout = this_checkout()
    page = checkout.speed_page.read_text(encoding="utf-8")
    for name, text in speed_blocks(checkout.speed).items():
        assert f"<!-- {name} -->\n{text}<!-- /{name} -->" in page, "python -m tools.write_cards"
    assert page.count("<!-- speed ") == len(speed_blocks(checkout.speed))


def test_layers_have_exact_milliseconds_ratios_and_stars(tmp_path):
    write(
        tmp_path / "layers",
        [
            line("softmax"),
            line("softmax", task="backward", ms=1234.5),
            line("fast", vs_exact=2.5, peer="other: fast", vs_peer=1.25),
            line("fast", vs_exact=9.9, clock="wall"),
            line("fast", task="backward", vs_exact=3.5, void=True),
            line("fast", allocator="tuned", vs_exact=2.0),
            line("fast", package="other", vs_exact=2.0),
        ],
    )
    heads, _, exact, fast = rows(speed_blocks(tmp_path)["speed layers"])
    assert heads[4:] == ["× exact, default", "× exact, tuned", "× other package, default", heads[7]]
    assert exact[:5] == ["`softmax`", "S32", "2", "1,024", "10.0 / 1,234 ms"]
    assert fast == ["`fast`", "S32", "2", "1,024", "2.50 / 3.50*", "2.00 / -", "1.25 / -", "other"]
    write(tmp_path / "batch64", [line("softmax", batch_size=64)])
    assert [row[2] for row in rows(speed_blocks(tmp_path)["speed layers"])[2:]] == ["2", "2", "64"]


def test_every_loss_is_listed_of_every_part_void_or_not(tmp_path):
    write(
        tmp_path / "readme",
        [
            line("softmax"),
            line("softmax_unfused", vs_exact=0.3),
            line("fast", 64, vs_exact=0.5, void=True),
            line("fast", 256, vs_exact=0.998),
            line("fast", vs_exact=2.0, peer="other: fast", vs_peer=0.9),
            line("fast", vs_exact=2.0, task="backward", peer="other: fast", vs_peer=1.1),
            line("fast", package="other", vs_exact=0.4),
            line("fast", clock="wall", vs_exact=0.1),
        ],
    )
    model = {"kind": "model", "shape": "", "batch_size": 16, "allocator": "tuned"}
    write(tmp_path / "models", [line("vix", 65, "train", vs_exact=0.25, **model)])
    heads, _, *found = rows(speed_blocks(tmp_path)["speed losses"])
    assert heads[3:] == ["forward, default", "with backward, tuned"]
    assert found == [
        ["`fast`", "exact attention", "S32, batch 2", "64: 0.50*, 256: 0.998", "-"],
        ["`fast`", "other", "S32, batch 2", "1,024: 0.90", "-"],
        ["`vix`", "exact attention", "model, batch 16", "-", "65: 0.25"],
    ]


def test_without_losses_there_are_none(tmp_path):
    write(tmp_path / "short", [line("softmax"), line("fast", vs_exact=1.5)])
    assert speed_blocks(tmp_path)["speed losses"] == "None.\n"


def test_number_of_losses_is_that_of_the_committed_files():
    folder = this_checkout().speed
    wanted = 0
    for path in folder.glob("*/benchmark.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for found in csv.DictReader(file):
                if found["clock"] == "cpu" and not found["package"] and "unfused" not in str(found):
                    wanted += sum(float(found[name] or 1) < 1 for name in ("vs_exact", "vs_peer"))
    cells = [c for row in rows(speed_blocks(folder)["speed losses"])[2:] for c in row[3:]]
    assert sum(cell.count(": ") for cell in cells) == wanted


def test_short_models_and_growth(tmp_path):
    write(tmp_path / "short", [line("softmax", 64), line("fast", 64, vs_exact=0.7)])
    models = [
        line("vix", task="train", per_second=4.25, peak_mib=605.4, vs_exact=1.0),
        line("vix", task="train", package="other", vs_exact=0.5),
    ]
    write(tmp_path / "models", models)
    growing = [
        line("fast", n, task, ms=ms, ms_q1=ms, ms_q3=ms * wide, peak_mib=n / 64)
        for n, ms, wide in ((1024, 10.0, 1.0), (4096, 40.0, 1.0), (16384, 640.0, 1.5))
        for task in ("forward", "backward")
    ]
    write(tmp_path / "growth", growing)
    blocks = speed_blocks(tmp_path)
    assert rows(blocks["speed short"])[2:] == [
        ["`softmax`", "10.0 / - ms"],
        ["`fast`", "0.70 / -"],
    ]
    heads, _, own, other = rows(blocks["speed models"])
    assert heads == ["model", "images/s, default", "× exact, default", "MiB"]
    assert own == ["`vix`", "4.2", "1.00", "605"]
    assert other == ["`other: vix`", "200", "0.50", "-"]
    # The disturbed length counts for memory alone.
    assert rows(blocks["speed growth"])[2][1:3] == ["1.00 / 1.00", "1.00"]


def test_machine_versions_and_packages_are_those_of_the_records(tmp_path):
    fast = [line("softmax"), line("fast", package="other")]
    write(tmp_path / "short", fast)
    write(tmp_path / "readme", fast, versions={"torch": "2.0", "other": "3"})
    write(tmp_path / "layers", fast, created="2026-02-02T00:00:00")
    blocks = speed_blocks(tmp_path)
    assert blocks["speed origins"].splitlines() == [
        "- *readme, short*: a cpu (AVX2, 2 cores), 2026-01-02, commit 0123456, torch 2.0, other 3, "
        "timm 1.0.",
        "- *layers*: a cpu (AVX2, 2 cores), 2026-02-02, commit 0123456, torch 2.0, timm 1.0.",
    ]
    assert blocks["speed packages"].splitlines() == [
        "- **other**: the same.",
        "- Left out: other: x at 64 tokens: 64 tokens are too few.",
        "- Not installed for some parts: natten.",
    ]


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_settings_that_can_be_measured(name, tmp_path):
    for values in PARTS[name]:
        settings = cases.check(Settings(output=tmp_path, device="cpu", **values))
        assert settings.threads == (1,)
        assert cases.baseline_of(settings) in cases.contenders_of(settings)


def test_a_part_is_measured_whole_and_goes_on(tmp_path, monkeypatch):
    case = {"contenders": ("linformer_k64",), "peers": False, "memory": False}
    both = [case | {"tokens": (tokens,), "passes": ("forward",)} for tokens in (64, 256)]
    ran = []

    def measure(kind, work, effort, log):
        for point, contenders in work:
            ran.append(point.size)
            if len(ran) == 2:
                raise UserError("killed")
            labels = [contender.label for contender in contenders]
            yield {
                "point": dataclasses.asdict(point),
                "seconds": {label: {"cpu": [0.5, 0.5], "wall": [1.0, 1.0]} for label in labels},
                "params": dict.fromkeys(labels, 1),
                "compile_seconds": {},
                "left_out": {},
            }

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "plot_benchmark", lambda *given: None)
    with pytest.raises(UserError, match="killed"):
        measure_part("layers", both, tmp_path)
    assert not (tmp_path / "layers").exists()
    measure_part("layers", both, tmp_path)
    assert ran == [64, 256, 256]
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]
    origins = json.loads((tmp_path / "layers" / "origin.json").read_text(encoding="utf-8"))
    assert [origin["settings"]["tokens"] for origin in origins] == [[64], [256]]
    assert str(tmp_path) not in json.dumps(origins)
    table = rows(speed_blocks(tmp_path)["speed layers"])[2:]
    assert [(row[0], row[3]) for row in table] == [
        ("`softmax`", "64"),
        ("`linformer_k64`", "64"),
        ("`softmax`", "256"),
        ("`linformer_k64`", "256"),
    ]


def test_unknown_parts_are_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(speed_page, "measure_part", lambda *given: pytest.fail("measured"))
    assert main(["measure", "layer", "--output", str(Path("x"))]) == 2
    assert "nearest: layers" in capsys.readouterr().err
