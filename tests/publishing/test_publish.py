"""Publishing with the real client against a Hub on this machine, through what can go wrong."""

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from timm_xformers.cli import main
from timm_xformers.errors import UsageError, UserError
from timm_xformers.publishing.publish import publish
from timm_xformers.records.results_json import Record

from ..hub_server import TOKEN, Fault, HubServer, Repo

ROOT = Path(__file__).resolve().parents[2]
REPO = "me/nano"
SENT = {
    *("README.md", "config.json", "confusion.png", "curves.png", "model.safetensors"),
    *("per_class.csv", "recipe.yaml", "results.csv", "results.json"),
}
ALWAYS = 99
SLOW = pytest.mark.slow  # a second each, and like the others
# The client's own, when it uploads a file with the HTTP library of its newest versions.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server; the client is told to use plain uploads, and waits in no time."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_token_is_ever_seen(capsys, caplog, tmp_path):
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    caplog.set_level(logging.DEBUG, logger="httpx2")
    yield
    said = "".join(capsys.readouterr()) + caplog.text
    assert TOKEN not in said
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def send(hub, run, **options):
    """Publish; what is said, to whomever, has neither token nor addresses of storage."""
    lines: list[str] = []
    problem = None
    try:
        publish(run, REPO, api=HfApi(endpoint=hub.url, token=TOKEN), say=lines.append, **options)
    except UserError as error:
        problem = error
    kept = [
        data for repo in hub.repos.values() for _, files in repo.commits for data in files.values()
    ]
    assert not any(TOKEN.encode() in data for data in kept)
    if problem is not None:
        assert not {word for word in (TOKEN, hub.url) if word in str(problem)}
        assert problem.__cause__ is None
        raise problem
    return "\n".join(lines)


def commits(hub):
    return len(hub.repos[REPO].commits) - 1  # creation makes one


def assert_published(hub, run):
    files = hub.files(REPO)
    assert set(files) >= SENT
    assert files["model.safetensors"] == (run / "best" / "model.safetensors").read_bytes()


def test_one_commit_with_everything_in_it(hub, finished_run):
    said = send(hub, finished_run)
    assert f"{hub.url}/{REPO} is there, and comes back as it was sent" in said
    assert_published(hub, finished_run)
    assert commits(hub) == 1
    files = hub.files(REPO)
    assert set(files) == SENT | {".gitattributes"}
    config = json.loads(files["config.json"])
    assert config["architecture"] == "vix_mnist_nano"
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert config["label_names"] == list(map(str, range(10)))
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert not {"output", "data_dir"} & recipe.keys()
    assert str(finished_run).encode() not in b"".join(files.values())

    record = Record.load(finished_run / "results.json")
    text = files["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == record.test_top1_percent
    assert "(curves.png)" in text
    assert f'create_model("hf-hub:{REPO}", pretrained=True)' in text
    assert f"{record.test_top1_percent:.2f}" in text


def test_again_is_no_commit_and_no_bytes(hub, finished_run):
    send(hub, finished_run)
    hub.requests.clear()
    assert "was there already, nothing was sent" in send(hub, finished_run)
    assert commits(hub) == 1
    assert hub.count("PUT") == hub.count("/commit/") == 0


def test_dry_run_asks_nobody(hub, finished_run):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit({})
    said = send(hub, finished_run, dry_run=True)
    assert hub.requests == []
    assert all(name in said for name in SENT)
    assert "Nothing was sent" in said
    assert "model-index" in said


@pytest.mark.slow
def test_private(hub, finished_run):
    send(hub, finished_run, private=True)
    assert hub.repos[REPO].private
    assert_published(hub, finished_run)


@pytest.mark.parametrize(
    ("fault", "most_commits"),
    [
        pytest.param(Fault("repos/create", status=500, times=2), 1, id="create 500", marks=SLOW),
        pytest.param(Fault("repos/create", status=429), 1, id="create 429", marks=SLOW),
        pytest.param(
            Fault("repos/create", status=502, after=True),
            1,
            id="create lost its answer",
            marks=SLOW,
        ),
        pytest.param(Fault("/commit/", status=500, times=2), 1, id="commit 500", marks=SLOW),
        pytest.param(Fault("/commit/", status=500, after=True), 1, id="commit lost its answer"),
        pytest.param(Fault("/commit/", status=409), 1, id="commit 409", marks=SLOW),
        pytest.param(Fault("/commit/", status=412), 1, id="commit 412", marks=SLOW),
        pytest.param(Fault("GET /api/models/", status=503), 1, id="listing 503", marks=SLOW),
        pytest.param(Fault("/preupload/", status=500), 1, id="preupload 500", marks=SLOW),
        pytest.param(Fault("objects/batch", status=429), 1, id="batch 429", marks=SLOW),
        pytest.param(Fault("PUT", status=500), 1, id="upload 500", marks=SLOW),
        pytest.param(Fault("PUT", cut=True), 1, id="upload cut", marks=SLOW),
        pytest.param(Fault("GET .*model.safetensors", cut=True), 1, id="download cut", marks=SLOW),
        pytest.param(Fault("GET .*model.safetensors", flip=True), 1, id="download flipped"),
        pytest.param(Fault("GET .*README.md", status=500), 1, id="download 500", marks=SLOW),
        pytest.param(Fault("HEAD .*README.md", status=503), 1, id="head 503", marks=SLOW),
    ],
)
def test_what_passes_is_got_over(fault, most_commits, hub, finished_run):
    hub.faults.append(fault)
    send(hub, finished_run)
    assert fault.times == 0
    assert_published(hub, finished_run)
    assert commits(hub) == most_commits


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        pytest.param("/commit/", {"status": 401}, "does not accept the token", marks=SLOW),
        ("/commit/", {"status": 403}, "may not write to me/nano"),
        pytest.param("/commit/", {"status": 404}, "has no me/nano", marks=SLOW),
        pytest.param("/commit/", {"status": 412}, "changed again and again", marks=SLOW),
        pytest.param("/commit/", {"status": 429}, "takes no more requests for now", marks=SLOW),
        pytest.param("/commit/", {"status": 500}, r"in 5 tries \(500\)", marks=SLOW),
        pytest.param("PUT", {"status": 403}, "may not write to me/nano", marks=SLOW),
        pytest.param("PUT", {"cut": True}, "in 5 tries", marks=SLOW),
        pytest.param(
            "GET .*/resolve/.*model", {"flip": True}, "came back from me/nano", marks=SLOW
        ),
        pytest.param("GET .*/resolve/.*model", {"status": 404}, "has no me/nano", marks=SLOW),
    ],
    ids=str,
)
def test_what_stays_is_said_and_leaves_no_half(where, fault, words, hub, finished_run):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit({"theirs.txt": b"kept"})
    hub.faults.append(Fault(where, **fault, times=ALWAYS))
    with pytest.raises(UserError, match=words):
        send(hub, finished_run)
    assert len(hub.requests) < 200
    files = hub.files(REPO)
    assert set(files) in ({"theirs.txt"}, {"theirs.txt"} | SENT)

    hub.faults.clear()
    hub.requests.clear()
    there = bool(hub.storage)
    send(hub, finished_run)
    assert_published(hub, finished_run)
    assert hub.files(REPO)["theirs.txt"] == b"kept"
    assert commits(hub) == 1
    if there:  # what was uploaded stays
        assert hub.count("PUT") < 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept the token"),
        pytest.param(403, "may not write to me/nano", marks=SLOW),
        pytest.param(500, "in 5 tries", marks=SLOW),
    ],
)
def test_repository_that_cannot_be_made(status, words, hub, finished_run):
    hub.faults.append(Fault("repos/create", status=status, times=ALWAYS))
    with pytest.raises(UserError, match=words):
        send(hub, finished_run)
    assert hub.repos == {}
    hub.faults.clear()
    send(hub, finished_run)
    assert commits(hub) == 1


@pytest.mark.slow
def test_waits_as_long_as_the_hub_asks_within_reason(hub, finished_run, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.faults += [
        Fault("/commit/", status=429, headers={"Retry-After": "7"}),
        Fault("/commit/", status=429, headers={"Retry-After": "100000"}),
    ]
    send(hub, finished_run)
    assert [wait for wait in waits if wait > 5] == [7, 60]


def test_somebody_elses_commit_between_two_tries(hub, finished_run):
    def theirs():
        hub.repos[REPO].commit({**hub.files(REPO), "theirs.txt": b"kept"})

    hub.faults.append(Fault("/commit/", call=theirs))
    send(hub, finished_run)
    assert_published(hub, finished_run)
    assert hub.files(REPO)["theirs.txt"] == b"kept"
    assert hub.count("/commit/") == 2


def test_a_run_that_changes_meanwhile_is_published_as_it_was(hub, run_copy):
    weights = run_copy / "best" / "model.safetensors"
    before = weights.read_bytes()
    hub.faults.append(Fault("/commit/", status=500, call=lambda: weights.write_bytes(before[::-1])))
    send(hub, run_copy)
    assert hub.files(REPO)["model.safetensors"] == before
    with pytest.raises(UserError, match="is not what was written"):
        send(hub, run_copy)


def test_hub_that_is_gone(finished_run, hub):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit({})
    hub.close()
    with pytest.raises(
        UserError, match=r"did not do its part in 5 tries \(ConnectError|Connection"
    ):
        send(hub, finished_run)


def test_offline(hub, finished_run, monkeypatch):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit({})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        send(hub, finished_run)


def test_without_a_token(hub, finished_run):
    with pytest.raises(UserError, match="There is no token"):
        publish(finished_run, REPO, api=HfApi(endpoint=hub.url), say=lambda _: None)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["nano", "a/b/c", "../x", "a--b/c", "a/", "a b/c", "a/" + "x" * 99]
)
def test_names_that_the_hub_does_not_take(name, finished_run, tmp_path):
    with pytest.raises(UsageError, match="is no name on the Hub"):
        publish(finished_run, name)
    assert main(["publish", str(finished_run), name]) == 2


@pytest.mark.slow
def test_command_line(hub, finished_run, monkeypatch, capsys):
    local = functools.partial(HfApi, endpoint=hub.url)
    monkeypatch.setattr("timm_xformers.publishing.publish.HfApi", local)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code = main(["publish", str(finished_run), REPO, "--private"])
    assert code == 0, capsys.readouterr().err
    assert hub.repos[REPO].private
    assert f'Load it with timm.create_model("hf-hub:{REPO}"' in capsys.readouterr().out


LOAD = """
    import hashlib, sys
    import timm
    assert "timm_xformers.training" not in sys.modules
    def say(name):
        model = timm.create_model(name, pretrained=True)
        digest = hashlib.sha256()
        for key, value in sorted(model.state_dict().items()):
            digest.update(key.encode() + value.numpy().tobytes())
        print(digest.hexdigest(), flush=True)
    for name in sys.argv[1:]:
        say(name)
    input()  # the server goes
    say(sys.argv[-1])
"""


@pytest.mark.slow
def test_same_bits_come_back_where_only_timm_is_imported(hub, finished_run, tmp_path):
    send(hub, finished_run)
    metadata = tmp_path / "path" / "timm_xformers-0.dist-info"  # as pip leaves it
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: timm-xformers\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\ntimm_xformers = timm_xformers.registration:install\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TORCH_"))}
    environ |= {
        "PYTHONPATH": f"{metadata.parent}{os.pathsep}{ROOT}",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    names = [f"local-dir:{finished_run / 'best'}", f"hf-hub:{REPO}"]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOAD), *names],
        cwd=tmp_path,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    digests = [process.stdout.readline().strip() for _ in names]
    hub.close()
    rest, errors = process.communicate("\n", timeout=120)
    assert process.returncode == 0, errors
    digests.append(rest.strip())

    from safetensors.numpy import load_file

    weights = load_file(finished_run / "best" / "model.safetensors")
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode() + value.tobytes())
    assert digests == [digest.hexdigest()] * 3
