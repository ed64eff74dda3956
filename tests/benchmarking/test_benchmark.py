"""Benchmarks: the arithmetic with a clock of our own, the plan, and a tiny case from end to end."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch

from timm_xformers.benchmarking import cases, worker
from timm_xformers.benchmarking.benchmark import MALLOC_NAMES, Benchmark, environ
from timm_xformers.benchmarking.compare import (
    crossover,
    growth,
    is_void,
    ratios,
    rows_of,
    summarise,
)
from timm_xformers.benchmarking.layers import build_contender
from timm_xformers.benchmarking.plots import plot_benchmark
from timm_xformers.benchmarking.settings import (
    CONTENDERS,
    PRESETS,
    Contender,
    Point,
    Settings,
)
from timm_xformers.benchmarking.steps import make_step
from timm_xformers.benchmarking.tables import (
    lines_of,
    markdown,
    timm_csv_text,
)
from timm_xformers.benchmarking.timing import HostStopwatch, run_rounds, warm_up
from timm_xformers.cli import main
from timm_xformers.files.tables import csv_text
from timm_xformers.replace import attention_sites
from tools.speed_tables import summary

LAYER = Point(
    kind="layer",
    shape="32-2x16",
    dim=32,
    num_heads=2,
    head_dim=16,
    size=64,
    batch_size=2,
    task="forward",
    dtype="float32",
    device="cpu",
    threads=1,
    allocator="default",
)
PLAN = {"rounds": 1, "min_ms": 0.0, "limit_seconds": 0.0, "seed": 0}
EXACT, OURS = Contender(name="softmax"), Contender(name="performer_relu_m64")
THEIRS, SLOWER = (
    dataclasses.replace(OURS, peer=package) for package in ("performer-pytorch", "other")
)


class FakeWatch:
    """A call takes what it says, times a factor that grows from measurement to measurement."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def measure(self, step, repeats):
        self.calls.append((step(), repeats))
        self.now += 1
        return {"wall": step() * self.now, "cpu": step()}


def test_rounds_are_shuffled_and_whole():
    watch = FakeWatch()
    steps = {name: lambda name=name: float(len(name)) for name in ("a", "bb", "ccc")}
    repeats = {"a": 3, "bb": 2, "ccc": 1}
    found = run_rounds(steps, repeats, watch, rounds=6, limit_seconds=1e9, seed=1)
    orders = [tuple(n for n, _ in watch.calls[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == [1, 2, 3] for order in orders)
    assert len(set(orders)) > 1
    assert dict(watch.calls) == {1: 3, 2: 2, 3: 1}
    assert found["bb"]["cpu"] == [2.0] * 6
    short = run_rounds(steps, repeats, watch, rounds=6, limit_seconds=0, seed=1)
    assert len(short["a"]["cpu"]) == 3


def test_warm_up_fills_the_time_and_tells_cold_from_warm():
    class Watch:
        def __init__(self):
            self.times = iter([5.0, 0.004])

        def measure(self, step, repeats):
            return {"wall": next(self.times)}

    repeats, extra = warm_up(lambda: None, Watch(), 0.03)
    assert repeats == 8
    assert extra == pytest.approx(4.996)


def test_process_time_is_for_one_thread():
    assert set(HostStopwatch(1).measure(lambda: None, 2)) == {"cpu", "wall"}
    assert set(HostStopwatch(2).measure(lambda: None, 2)) == {"wall"}


def found(**seconds):
    labels = {"exact": EXACT, "ours": OURS, "theirs": THEIRS, "slower": SLOWER}
    times = {labels[name].label: {"cpu": values} for name, values in seconds.items()}
    return {
        "seconds": times,
        "params": dict.fromkeys(times, 7),
        "compile_seconds": {},
        "left_out": {},
    }


def test_ratios_are_taken_within_rounds():
    # Medians of the two lists are equal; round by round one is faster in two of three.
    assert ratios([1.0, 2.0, 9.0], [2.0, 1.0, 3.0]).median == 2.0
    times = found(
        exact=[4.0, 4.2, 4.1], ours=[2.0, 2.1, 1.0], theirs=[3.0, 6.3, 2.0], slower=[9.0, 9.0, 9.0]
    )
    rows = rows_of(LAYER, [EXACT, OURS, THEIRS, SLOWER], times, "softmax", 64)
    exact, ours, theirs, _ = rows
    assert (exact.vs_exact.median, exact.vs_exact.q1, exact.peer) == (1.0, 1.0, "")
    assert (ours.vs_exact.median, ours.vs_exact.count) == (pytest.approx(2.0), 3)
    assert ours.peer == THEIRS.label  # the faster of the two
    assert ours.vs_peer.median == pytest.approx(2.0)
    assert (ours.vs_peer.q1, ours.vs_peer.q3) == (pytest.approx(1.75), pytest.approx(2.5))
    assert (theirs.peer, theirs.vs_peer) == ("", None)
    assert not any(row.void for row in rows)
    assert ours.per_second == 1.0


def test_unsteady_baseline_voids_the_point():
    assert is_void(summarise([1.0, 1.0, 1.3, 1.3, 1.0]))
    assert not is_void(summarise([1.0, 1.0, 1.05, 1.09, 1.0]))
    assert is_void(summarise([1.0, 0.8, 0.8, 1.0, 1.0]))
    times = found(exact=[1.0, 1.0, 9.0, 9.0], ours=[1.0] * 4)
    assert all(row.void for row in rows_of(LAYER, [EXACT, OURS], times, "softmax", 64))


def test_crossover_and_growth():
    assert crossover({64: 0.5, 256: 2.0, 1024: 8.0}) == pytest.approx(128)
    assert crossover({64: 1.1, 256: 2.0}) == 64
    assert crossover({64: 2.0, 256: 0.9}) is None
    # Faster once is not faster from there on.
    assert crossover({64: 2.0, 256: 0.5, 1024: 2.0}) == pytest.approx(512)
    assert growth({64: 9.0, 1024: 1.0, 4096: 16.0}) == pytest.approx(2.0)
    assert growth({256: 1.0, 1024: 4.0}) is None


def test_plan_has_peers_after_ours_and_the_baseline_first(tmp_path):
    settings = Settings(output=tmp_path, contenders=("nystrom_l64", "fnet", "softmax"))
    labels = [contender.label for contender in cases.contenders_of(settings)]
    assert labels == [
        "softmax",
        "nystrom_l64",
        "nystrom-attention: nystrom_l64",
        "transformers: nystrom_l64",
        "fnet",
    ]
    both = dataclasses.replace(settings, modes=("eager", "compiled"), peers=False)
    assert [c.label for c in cases.contenders_of(both)][:2] == ["softmax", "softmax, compiled"]
    assert cases.baseline_of(both).mode == "eager"
    assert cases.baseline_of(dataclasses.replace(both, modes=("compiled",))).mode == "compiled"
    names = ("performer_relu_m64", "performer_learned_m64", "nystrom_l64")
    kernels = dataclasses.replace(both, contenders=names, modes=("eager", "fused"))
    assert [c.label for c in cases.contenders_of(kernels)] == [
        "softmax",
        "performer_relu_m64",
        "performer_relu_m64, fused",
        "performer_learned_m64",
        "nystrom_l64",
    ]
    alone = dataclasses.replace(kernels, modes=("fused",))
    assert cases.contenders_of(alone) == cases.contenders_of(kernels)
    assert cases.baseline_of(alone) == cases.contenders_of(alone)[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_whose_contenders_fit(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cases, "shared_memory", lambda *device: 1)
    settings = cases.check(Settings(output=tmp_path, **PRESETS[preset]))
    assert cases.baseline_of(settings) in cases.contenders_of(settings)
    assert cases.points_of(settings)


def test_plan_has_every_point_and_own_shapes(tmp_path):
    settings = Settings(
        output=tmp_path, tokens=(256, 64), threads=(1, 2), allocators=("default", "tuned"), dim=64
    )
    points = cases.points_of(settings)
    assert len(points) == 2 * 2 * 2 * 2
    assert [point.size for point in points[:2]] == [64, 256]
    assert {(p.shape, p.dim, p.num_heads, p.head_dim) for p in points} == {("64-4x32", 64, 4, 32)}
    paper = cases.points_of(Settings(output=tmp_path, shape="B16"))[0]
    assert (paper.dim, paper.num_heads, paper.head_dim) == (384, 6, 64)


def test_baseline_of_models_is_the_exact_one(tmp_path):
    names = ("vix_performer_relu_m16", "vix_softmax", "vit_tiny_patch16_224")
    settings = Settings(output=tmp_path, models=names)
    assert cases.baseline_of(settings).name == "vix_softmax"
    # One more of ours for each package with a form of its attention.
    order = [names[1], names[0], names[0], names[0], names[2]]
    assert [contender.name for contender in cases.contenders_of(settings)] == order
    chosen = dataclasses.replace(settings, baseline=names[2])
    assert cases.baseline_of(chosen).name == names[2]


def test_replacements_of_the_baseline_are_contenders_of_their_own(tmp_path):
    record = json.dumps({"mechanism": {"0": "local1d_w16"}, "feature_seed": 0})
    settings = Settings(
        output=tmp_path, models=("vix_mnist_nano",), replacements=(("cheap", record),), peers=False
    )
    first, second = cases.contenders_of(settings)
    assert (first.label, second.label) == ("vix_mnist_nano", "cheap")
    assert first.kind != second.kind  # a colour each
    point = cases.points_of(settings)[0]
    plain, replaced = (build_contender(each, point, 0)[0] for each in (first, second))
    assert [site.mechanism for site in attention_sites(replaced)][:1] == ["local1d_w16"]
    assert str(plain) == str(timm.create_model("vix_mnist_nano"))
    assert str(plain) != str(replaced)


def test_environment_of_a_worker(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "5")
    assert not any(key.startswith("MALLOC_") for key in environ("default", 1))
    tuned = environ("tuned", 3)
    assert set(MALLOC_NAMES.values()) <= set(tuned)
    assert tuned["MALLOC_TOP_PAD_"] == str(1 << 26)
    assert tuned["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("task", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_default_contender_is_measured(task, dtype):
    point = dataclasses.replace(LAYER, task=task, dtype=dtype)
    contenders = [Contender(name=name) for name in ("softmax", *CONTENDERS, "fnet")]
    result = worker.measure_time(point, contenders, PLAN, HostStopwatch(1))
    assert result["left_out"] == {}
    assert list(result["seconds"]) == [contender.label for contender in contenders]
    assert {len(v) for times in result["seconds"].values() for v in times.values()} == {1}
    assert result["params"]["fnet"] == 0


def test_baseline_is_timms_layer_fused_or_not():
    fused, x = build_contender(EXACT, LAYER, 0)
    plain, y = build_contender(Contender(name="softmax_unfused"), LAYER, 0)
    assert (fused.fused_attn, plain.fused_attn) == (True, False)
    assert torch.equal(x, y)
    torch.testing.assert_close(fused(x), plain(y))
    assert fused.qkv.out_features == 3 * 2 * 16


def test_steps_compute_what_they_say():
    layer, x = build_contender(EXACT, LAYER, 0)
    parameters = list(layer.parameters())
    make_step(layer, parameters, x, LAYER)()
    make_step(layer, parameters, x, dataclasses.replace(LAYER, task="backward"))()
    assert x.requires_grad
    assert all(p.grad is None for p in parameters)
    model = timm.create_model("vix_mnist_nano")
    point = dataclasses.replace(LAYER, kind="model", task="train")
    before = [p.detach().clone() for p in model.parameters()]
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    make_step(model, list(model.parameters()), images, point)()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_memory_grows_with_the_tokens():
    peaks = [
        worker.measure_memory(
            dataclasses.replace(LAYER, task="backward", batch_size=8, size=size),
            Contender(name="softmax_unfused"),
            0,
        )["peak_mib"]
        for size in (64, 512)
    ]
    assert peaks[0] + 10 < peaks[1] < 400


@pytest.mark.skipif(not worker.can_fork("cpu"), reason="no copies of processes here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_memory_of_a_copy_of_the_process_and_its_death():
    assert worker._in_fork(lambda: {"peak_mib": 1.5}) == {"peak_mib": 1.5}
    killed = worker._in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert killed["left_out"].startswith("its process ended with code -9")


def test_a_contender_that_fails_is_left_out_with_its_reason():
    unknown = Contender(name="performer_relu_m64", peer="flash-linear-attention")
    result = worker.measure_time(LAYER, [EXACT, unknown], PLAN, HostStopwatch(1))
    assert list(result["seconds"]) == ["softmax"]
    assert result["left_out"][unknown.label]
    assert worker.measure_memory(LAYER, unknown, 0)["left_out"]


def synthetic(task="forward", kind="layer"):
    rows = []
    for size in (64, 256, 1024, 4096):
        point = dataclasses.replace(LAYER, size=size, task=task, kind=kind)
        exact = [1e-6 * size**2 * noise for noise in (1.0, 1.01, 1.02)]
        times = found(exact=exact, ours=[2e-4 * size] * 3, theirs=[4e-4 * size] * 3)
        rows += rows_of(point, [EXACT, OURS, THEIRS], times, "softmax", size)
    return [dataclasses.replace(row, peak_mib=float(row.size)) for row in rows]


RESULT = {
    "settings": {"min_ms": 30.0},
    "baseline": "softmax",
    "peers": {"performer-pytorch": "the same"},
    "left_out": {"natten: x": {"not installed": [64, 256]}},
    "hardware": {"cpu": "a cpu", "cores": 2},
    "versions": {"torch": "2"},
    "commit": None,
    "seed": 0,
    "created": "today",
}


def test_table_has_ratios_crossover_growth_and_memory():
    text = markdown(RESULT, synthetic())
    (exact,) = (line for line in text.splitlines() if line.startswith("| `softmax` | 4.14 ms (3)"))
    assert exact.split("|")[-3].strip() == "2.00"
    line = next(line for line in text.splitlines() if line.startswith("| `performer_relu_m64`"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[4] == "20.68 (20.58 to 20.79)"
    assert cells[5:7] == ["198", "1.00"]
    assert cells[7].startswith("2.00 performer-pytorch at 64, ")
    assert "| `performer_relu_m64` | 64 | 256 | 1,024 | 4,096 | 1.00 |" in text
    assert "- natten: x at 64, 256: not installed." in text
    assert "- **performer-pytorch**: the same." in text


def test_void_points_are_marked_and_do_not_count():
    rows = [dataclasses.replace(row, void=row.size < 1024) for row in synthetic()]
    text = markdown(RESULT, rows)
    assert "≤ 1024" in text
    assert text.count(" void |") == 6


def test_csv_has_every_figure():
    lines = list(csv.DictReader(csv_text(lines_of(synthetic())).splitlines()))
    assert len(lines) == 12
    assert lines[1]["contender"] == "performer_relu_m64"
    assert float(lines[1]["ms"]) == pytest.approx(12.8)
    assert (lines[1]["tokens"], lines[1]["pass"], lines[1]["clock"]) == ("64", "forward", "cpu")
    assert float(lines[1]["vs_peer"]) == pytest.approx(2.0)
    assert lines[2]["package"] == "performer-pytorch"


def test_summary_takes_the_worse_allocator_and_leaves_out_what_is_void():
    rows = [*synthetic(), *synthetic("backward")]
    slow = [
        dataclasses.replace(
            row,
            point=dataclasses.replace(row.point, allocator="tuned"),
            vs_exact=dataclasses.replace(row.vs_exact, median=row.vs_exact.median / 2),
            void=row.size == 4096,
        )
        for row in synthetic()
    ]
    # What is read from the file again gives the same as what is at hand.
    lines = lines_of([*rows, *slow])
    table = summary(list(csv.DictReader(csv_text(lines).splitlines())), "softmax")
    assert table == summary(lines, "softmax")
    head, _, exact, ours = ([c.strip() for c in t.split("|")[1:-1]] for t in table.splitlines())
    assert head[2:5] == ["× exact at 1,024", "× exact at 4,096", "× other packages at 1,024"]
    assert exact[:4] == ["`softmax`", "", "1,059 / 1,059 ms", "16,945 / 16,945 ms"]
    assert ours[1:4] == ["396 / 198", "2.59 / 5.17", "20.68 / 20.68"]
    assert ours[4:] == ["2.00 / 2.00", "2.00 / 2.00", "4,096"]
    assert summary(lines_of(synthetic(kind="model")), "softmax") == ""


def test_models_in_timms_columns():
    rows = [*synthetic(kind="model"), *synthetic("train", kind="model")]
    rows = [dataclasses.replace(row, clock="wall") for row in rows]
    lines = list(csv.DictReader(timm_csv_text(rows).splitlines()))
    assert len(lines) == 3 * 4
    assert list(lines[0])[:10] == [
        "model",
        "infer_samples_per_sec",
        "infer_step_time",
        "infer_batch_size",
        "infer_img_size",
        "train_samples_per_sec",
        "train_step_time",
        "train_batch_size",
        "train_img_size",
        "param_count",
    ]
    assert float(lines[1]["infer_samples_per_sec"]) == pytest.approx(2 / 0.0128, rel=1e-3)
    assert lines[1]["train_batch_size"] == "2"


def test_plots_are_drawn_even_of_void_and_single_points(tmp_path):
    assert plot_benchmark(tmp_path, synthetic(), EXACT) == ["time.png", "memory.png"]
    rows = [dataclasses.replace(row, void=True, peak_mib=None) for row in synthetic()[:3]]
    assert plot_benchmark(tmp_path, rows, EXACT) == ["time.png"]
    other = [
        dataclasses.replace(row, point=dataclasses.replace(row.point, allocator="tuned"))
        for row in rows
    ]
    names = plot_benchmark(tmp_path, [*rows, *other], EXACT)
    assert names == ["time-float32-1threads-default.png", "time-float32-1threads-tuned.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def measure_here(benchmark, kind, work):
    """`Benchmark._measure` of times, without a process that imports everything anew."""
    assert kind == "time"
    for point, contenders in work:
        result = worker.measure_time(point, [*contenders], PLAN, HostStopwatch(1))
        yield json.loads(json.dumps({"point": dataclasses.asdict(point), **result}))


def test_tiny_case_from_the_command_line(tmp_path, capsys, monkeypatch):
    command = (
        "benchmark --contenders performer_relu_m16 --tokens 64 --dim 32 --num-heads 2 --head-dim 16"
        " --batch-size 1 --rounds 1 --no-peers --no-memory --passes forward,backward --output done"
    )
    assert main(command.split()) == 0
    said = capsys.readouterr()
    assert "| `performer_relu_m16` |" in said.out
    assert "time 2/2: backward, 32-2x16, 64 tokens" in said.err
    names = {path.name for path in (tmp_path / "done").iterdir()}
    assert names == {"benchmark.csv", "benchmark.json", "benchmark.md", "log.txt", "time.png"}
    result = json.loads((tmp_path / "done" / "benchmark.json").read_text())
    assert {"commit", "versions", "hardware", "created", "seed", "settings"} <= set(result)
    assert len(result["rows"]) == 2 * 2 * 2  # contenders, passes, clocks
    assert main(command.split()) == 2
    assert "not empty" in capsys.readouterr().err

    # As if it had been killed after the first point: the same command goes on, another does not.
    path = tmp_path / "done" / "benchmark.json"
    killed = result | {"complete": False, "rows": result["rows"][:4]}
    path.write_text(json.dumps(killed))
    monkeypatch.setattr(Benchmark, "_measure", measure_here)
    assert main([*command.split(), "--rounds", "2"]) == 2
    assert main(command.split()) == 0
    assert "time 2/2: backward" in (said := capsys.readouterr().err)
    assert "time 1/2" not in said
    again = json.loads(path.read_text())
    assert again["complete"]
    assert again["rows"][:4] == result["rows"][:4]
    assert len(again["rows"]) == 8


@pytest.mark.parametrize(("unsteady", "void"), [(1, False), (2, False), (9, True)])
def test_void_points_are_measured_again_and_no_others(tmp_path, monkeypatch, unsteady, void):
    settings = {"contenders": ("performer_relu_m64",), "tokens": (64, 128), "peers": False}
    settings |= {"passes": ("forward",), "memory": False, "output": tmp_path / "done"}
    calls = []

    def measured(self, kind, work):
        for point, contenders in work:
            calls.append(point.size)
            disturbed = point.size == 64 and calls.count(64) <= unsteady
            exact = [1.0, 1.0, 2.0, 2.0] if disturbed else [1.0] * 4
            seconds = {c.label: {"cpu": exact, "wall": [1.0, 1.0, 2.0, 2.0]} for c in contenders}
            yield {
                "point": dataclasses.asdict(point),
                "seconds": seconds,
                "left_out": {},
                "params": dict.fromkeys(seconds, 1),
                "compile_seconds": {},
            }

    monkeypatch.setattr(Benchmark, "_measure", measured)
    benchmark = Benchmark(Settings(**settings))
    benchmark.run()
    assert calls == [64, 128] + [64] * min(unsteady, 2)
    by_clock = [(row.size, row.void) for row in benchmark.rows if row.clock == "cpu"]
    assert by_clock == [(64, void), (64, void), (128, False), (128, False)]


@pytest.mark.slow
def test_models_with_memory_and_peers_from_the_command_line(tmp_path, capsys):
    command = (
        "benchmark --models vix_performer_softmax_m32 vix_softmax --img-size 8 --batch-size 2 "
        "--passes train --rounds 1 --output done"
    )
    assert main(command.split()) == 0
    result = json.loads((tmp_path / "done" / "benchmark.json").read_text())
    peaks = {row["label"]: row["peak_mib"] for row in result["rows"]}
    assert peaks["vix_softmax"] > 0
    assert peaks["vix_performer_softmax_m32"] > 0
    lines = list(csv.DictReader((tmp_path / "done" / "timm.csv").read_text().splitlines()))
    assert lines[0]["model"] == "vix_softmax"
    assert float(lines[0]["train_samples_per_sec"]) > 0


@pytest.mark.slow
def test_compiled_layers_have_their_compile_time_apart(tmp_path):
    settings = Settings(
        output=tmp_path / "done",
        contenders=("performer_relu_m16",),
        peers=False,
        memory=False,
        tokens=(64,),
        passes=("forward",),
        modes=("eager", "compiled"),
        rounds=1,
    )
    benchmark = Benchmark(settings)
    benchmark.run()
    seconds = {row.contender.label: row.compile_seconds for row in benchmark.rows}
    assert seconds["softmax"] is None
    assert seconds["performer_relu_m16, compiled"] > 0.1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_fused_layers_run_the_kernels_or_are_left_out(tmp_path):
    command = (
        "-m timm_xformers benchmark --contenders performer_relu_m16 performer_relu_m256 --shape "
        "S32 --no-peers --tokens 64 --batch-size 1 --rounds 1 --modes eager fused --output"
    )
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = tmp_path / "done"
    given = [sys.executable, *command.split(), str(output)]
    result = subprocess.run(given, env=environ, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads((output / "benchmark.json").read_text())
    labels = {row["label"] for row in found["rows"]}
    assert {"performer_relu_m16, fused", "performer_relu_m256"} < labels
    assert "performer_relu_m256, fused" not in labels
    assert "the kernels do not take this shape" in str(found["left_out"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--contenders performer_relu_64", "nearest: performer_relu_m64"),
        ("--contenders performr", "Unknown contender 'performr'"),
        ("--models vix_sofmax", "nearest: vix_softmax"),
        ("--tokens 0", "--tokens 0 is out of range"),
        ("--tokens 64,-3", "--tokens -3 is out of range"),
        ("--tokens 150", "local2d_w8_shifted needs a square grid"),
        ("--contenders local2d_w16 --tokens 64", "do not fit the 8x8 grid of 64 tokens"),
        ("--passes train", "--passes train needs whole models"),
        ("--passes forwards", "nearest: forward"),
        ("--shape S48", "--shape 'S48' is unknown"),
        ("--allocator tune", "nearest: tuned"),
        ("--dtypes float16", "--dtypes float16 needs a GPU"),
        ("--batch-size 0", "--batch-size 0 is out of range"),
        ("--baseline vix_softmax", "--baseline chooses among --models"),
        ("--models vix_softmax --baseline vix_softmx", "nearest: vix_softmax"),
        ("--preset readmi", "nearest: readme"),
        ("--device cpu --modes fused", "--modes fused needs a GPU of compute capability 8.0"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_measured(arguments, words, tmp_path, capsys):
    assert main(["benchmark", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(capsys):
    assert main(["benchmark", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda needs a GPU, and there is none")


def test_numbers_that_are_none_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--tokens", "many"])
    assert stop.value.code == 2
    assert "invalid int list value: 'many'" in capsys.readouterr().err
