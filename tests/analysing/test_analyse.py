"""What other mechanisms would cost a model: losses, the search, and the command from end to end."""

import csv
import dataclasses
import itertools
import json
import shlex
import types

import pytest
import timm
import torch
from torch import nn

from timm_xformers.analysing import analyse as room
from timm_xformers.analysing.losses import Losses
from timm_xformers.analysing.search import Budget, Costs, mapping_of, propose, read_budget
from timm_xformers.benchmarking.compare import Row, Summary
from timm_xformers.benchmarking.settings import Contender, Point
from timm_xformers.cli import main
from timm_xformers.errors import UsageError
from timm_xformers.replace import replace_attention

MECHANISMS = ["performer_relu_m16", "local1d_w16"]


def small() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vix_softmax", img_size=8, embed_dim=16, depth=3, num_heads=2, in_chans=1, num_classes=4
    )
    nn.init.normal_(model.head.weight)
    return model.eval()


def batches(sizes=(5, 3)):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(sum(sizes), 1, 8, 8, generator=rng)
    labels = torch.arange(sum(sizes)) % 4
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


@pytest.fixture(scope="module")
def losses():
    return Losses(small(), MECHANISMS, batches())


def test_losses_are_those_of_the_replaced_model(losses):
    assignment = {0: "performer_relu_m16", 2: "local1d_w16"}
    found = losses.of(assignment)
    images = torch.cat([images for images, _ in batches()])
    labels = torch.cat([labels for _, labels in batches()])
    model, changed = small(), small()
    replace_attention(changed, mapping_of(assignment))
    with torch.no_grad():
        before, after = model.forward_features(images), changed.forward_features(images)
        p, q = (m(images).double().softmax(dim=-1) for m in (model, changed))
    assert found.feature_error == pytest.approx(float((after - before).norm() / before.norm()))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.agreement == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.right == int((q.argmax(-1) == labels).sum())
    assert found.images == 8
    assert found.kl > 0


def test_the_model_is_as_it_was(losses):
    nothing = losses.of({})
    assert (nothing.feature_error, nothing.kl, nothing.agreement) == (0.0, 0.0, 8)
    fresh = small()
    assert str(losses.model) == str(fresh)
    images = batches()[0][0]
    assert torch.equal(losses.model(images), fresh(images))


def test_output_errors_are_of_each_block_on_the_originals_tokens(losses):
    found = losses.output_errors()
    model = small()
    given, expected = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.attn.register_forward_hook(lambda module, args, out: expected.append(out))
    images = torch.cat([images for images, _ in batches()])
    with torch.no_grad():
        model(images)
        tokens, outputs = list(given), list(expected)
        for name in MECHANISMS:
            changed = small()
            replace_attention(changed, name)
            for number, block in enumerate(changed.blocks):
                off = (block.attn(tokens[number]) - outputs[number]).norm()
                share = float(off / outputs[number].norm())
                assert found[number][name] == pytest.approx(share, rel=1e-4)


def test_a_mechanism_equal_to_the_original_loses_nothing():
    losses = Losses(small(), ["softmax"], batches())
    assert max(row["softmax"] for row in losses.output_errors().values()) < 1e-6
    assert losses.of({0: "softmax", 1: "softmax", 2: "softmax"}).kl < 1e-9


def test_what_cannot_be_tried_is_said():
    with pytest.raises(UsageError, match=r"fnet cannot be tried: .* has no queries"):
        Losses(small(), ["fnet"], batches())
    swin = timm.create_model("swin_local_tiny", depths=(1,), num_heads=(2,))
    with pytest.raises(UsageError, match=r"No block of this model can be replaced: .* windows"):
        Losses(swin, ["softmax"], [])


class Table:
    """Losses made up: a pair of blocks may be worse or better together than alone."""

    def __init__(self, blocks, kl):
        self.blocks = list(range(blocks))
        self.kl = kl
        self.known = {}

    def of(self, assignment):
        key = frozenset(assignment.items())
        self.known[key] = types.SimpleNamespace(kl=self.kl(dict(assignment)))
        return self.known[key]


def test_search_goes_by_losses_of_whole_sets():
    def kl(assignment):
        weights = {"fast": (5.0, 1.0, 1.0, 4.0), "good": (1.0, 0.5, 0.5, 3.0)}
        total = sum(weights[name][number] for number, name in assignment.items())
        # Alone block 3 hurts, but only behind block 0, so keeping block 0 is enough.
        return total - (3.0 if 3 in assignment and 0 not in assignment else 0.0)

    costs = Costs("time", 4.0, {"fast": 1.0, "good": 2.0}, 4)
    found = propose(Table(4, kl), costs, 1.6, most_exact=1)
    assert found.met
    assert 0 not in found.assignment
    assert {*found.assignment} == {1, 2, 3}
    assert costs.gain(found.assignment) == pytest.approx(found.gain)
    assert found.gain >= 1.6
    # The best that the budget allows, by trying all sets with one block exact at most.
    every = [dict(enumerate(names)) for names in itertools.product(["", "fast", "good"], repeat=4)]
    sets = [{n: name for n, name in one.items() if name} for one in every]
    allowed = [one for one in sets if len(one) >= 3 and costs.gain(one) >= 1.6]
    assert kl(found.assignment) == min(map(kl, allowed))


def test_a_budget_that_cannot_be_met_is_said():
    costs = Costs("time", 4.0, {"fast": 3.0, "good": 3.5}, 2)
    found = propose(Table(2, lambda assignment: len(assignment)), costs, 2.0, most_exact=2)
    assert not found.met
    assert found.assignment == {0: "fast", 1: "fast"}
    assert found.gain == pytest.approx(4 / 3)


def test_memory_is_that_of_the_largest_block():
    costs = Costs("memory", 8.0, {"fast": 2.0, "good": 4.0}, 2)
    assert costs.gain({0: "fast"}) == 1.0
    assert costs.gain({0: "fast", 1: "good"}) == 2.0
    assert costs.gain({0: "fast", 1: "fast"}) == 4.0


def test_budgets_are_read():
    assert read_budget("1.5x") == Budget("time", 1.5)
    assert str(read_budget("memory:2x")) == "memory:2x"
    for wrong in ("2", "0x", "disk:2x", "-1x"):
        with pytest.raises(UsageError, match="write how many times as fast"):
            read_budget(wrong)


@pytest.fixture
def measured(monkeypatch):
    """Time and memory by a rule, and what was asked of the benchmark."""
    asked = []

    class Benchmark:
        def __init__(self, settings):
            self.settings = settings
            asked.append(settings)

        def run(self):
            settings = self.settings
            point = Point(
                kind="model", batch_size=1, task="forward", dtype="float32", device="cpu",
                threads=1, allocator="default", size=0,
            )  # fmt: skip
            self.rows = []
            for size in settings.img_sizes:
                for title, record in (("", ""), *settings.replacements):
                    blocks = json.loads(record)["mechanism"] if record else {}
                    count = sum(2 if "-" in words else 1 for words in blocks)
                    gain = 1 / (1 - 0.25 * count)
                    self.rows.append(
                        Row(
                            point=dataclasses.replace(point, size=size),
                            contender=Contender(name="m", replacement=record, title=title),
                            clock="cpu", size=size, peer="", vs_peer=None, void=False, params=1,
                            seconds=Summary(1 / gain, 1 / gain, 1 / gain, 3),
                            vs_exact=Summary(gain, gain, gain, 3), compile_seconds=None,
                            peak_mib=100 / gain,
                        )
                    )  # fmt: skip

    monkeypatch.setattr(room, "Benchmark", Benchmark)
    return asked


def test_command_from_end_to_end(finished_run, measured, tmp_path, capsys):
    output = tmp_path / "a b"
    command = ["analyse", str(finished_run), "--mechanisms", "performer_relu_m16,nystrom_l16"]
    command += ["--images", "40", "--img-size", "8,16", "--output", str(output)]
    assert main([*command, "--budget", "1.3x"]) == 0
    out = capsys.readouterr().out
    result = json.loads((output / "analysis.json").read_text())
    assert result["images"] == 40
    assert result["split"] == "val"
    assert result["whole"][0]["mechanism"] == "original"
    assert {"versions", "hardware", "commit", "seed"} <= {*result}
    proposal = result["proposal"]
    assert proposal["met"]
    assert proposal["measured_gain"] >= 1.3
    assert proposal["img_size"] == 16
    words = shlex.split(proposal["command"])
    assert words[:2] == ["timm-xformers", "retrofit"]
    assert json.loads(words[words.index("--mechanism") + 1]) == proposal["blocks"]
    assert proposal["command"] in out
    assert "Hurt most alone by nystrom_l16" in out
    assert "void" not in out
    rows = list(csv.DictReader((output / "models.csv").read_text().splitlines()))
    assert {row["img_size"] for row in rows} == {"8", "16"}
    assert {row["mechanism"] for row in rows} >= {"original", "proposal"}
    blocks = list(csv.DictReader((output / "blocks.csv").read_text().splitlines()))
    assert len(blocks) == 2 * len({row["block"] for row in blocks})
    assert (output / "analysis.md").read_text().startswith("# ")
    assert (output / "analysis.png").stat().st_size > 10_000
    assert measured[0].threads == (1,)
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_replaced_model_is_analysed_as_it_is():
    model = small()
    replace_attention(model, "nystrom_l16")
    images = batches()[0][0]
    with torch.no_grad():
        expected = model(images)
    losses = Losses(model, ["performer_relu_m16"], batches())
    assert losses.of({}).kl == 0.0
    assert losses.of({0: "performer_relu_m16"}).kl > 0
    with torch.no_grad():
        assert torch.equal(model(images), expected)


def test_a_budget_out_of_reach_is_proposed_as_such(finished_run, measured, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["analyse", str(finished_run), "--mechanisms", "performer_relu_m16", "--images", "20"]
    assert main([*command, "--budget", "100x", "--output", str(output)]) == 0
    assert "cannot be met" in capsys.readouterr().out
    assert not json.loads((output / "analysis.json").read_text())["proposal"]["met"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--mechanisms performr_relu_m16", "did you mean performer_relu_m16"),
        ("--mechanisms softmax --budget fast", "write how many times as fast"),
        ("--mechanisms fnet", "fnet cannot be tried"),
        ("--mechanisms softmax --set model_kwargs.depth=1", "write the changed model to a folder"),
    ],
)
def test_mistakes_are_one_sentence(extra, words, finished_run, tmp_path, capsys):
    assert (
        main(["analyse", str(finished_run), *extra.split(), "--output", str(tmp_path / "o")]) == 2
    )
    err = capsys.readouterr().err
    assert words in err
    assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "o").exists()
