"""The Slurm example on two loopback nodes, with stand-ins for Slurm's own commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_xformers.records.results_json import Record

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "train_scripts" / "slurm" / "train.sbatch"
TINY = [
    "--model=vit_tiny_patch16_224",
    "--set=model_kwargs={patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}",
    "--batch-size=16",
]
# Tasks side by side, their numbers in a file so that the test can signal them as Slurm does.
SRUN = """#!/bin/bash
echo "$*" > srun.txt
[[ $1 == --* ]] && shift
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
echo "${pids[@]}" > tasks.txt
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 && echo 127.0.0.2 ;;
    requeue) echo "$2" >> requeued.txt ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Start the job as Slurm would; gives the process."""
    tools = tmp_path / "bin"
    tools.mkdir()
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'  # a link would leave its environment
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PROCESSES_PER_NODE": "1",
    }

    def start(*arguments):
        return subprocess.Popen(
            ["bash", str(JOB), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def wait_for(path, words, process):
    deadline = time.monotonic() + 180
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, finish(process)
        time.sleep(0.05)


def test_without_arguments_it_says_how(submit):
    code, said = finish(submit())
    assert code == 2
    assert said.startswith("usage: sbatch")


def test_script_is_sound():
    subprocess.run(["bash", "-n", str(JOB)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(JOB)], check=True)


@pytest.mark.parametrize("place", [["--data-dir", "/shared data"], ["--data-dir=/shared data"]])
def test_a_folder_with_a_run_is_gone_on_with(submit, tmp_path, place):
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words.txt\nexit 3\n')
    assert finish(submit("new run", *place, "--epochs", "3"))[0] == 3
    words = (tmp_path / "words.txt").read_text().splitlines()
    assert words[words.index("--output") :] == [
        *("--output", "new run", "--num-processes", "2", *place, "--epochs", "3")
    ]
    (tmp_path / "new run").mkdir()
    (tmp_path / "new run" / "recipe.yaml").touch()
    finish(submit("new run", "--epochs", "3", *place, "--model", "x"))
    words = (tmp_path / "words.txt").read_text().splitlines()
    assert words[words.index("--resume") :] == ["--resume", "new run", *place]
    assert not (tmp_path / "requeued.txt").exists()


@pytest.mark.slow
def test_two_nodes_save_in_time_are_requeued_and_end(submit, tmp_path):
    arguments = ["run", *TINY, "--epochs=15"]
    log = tmp_path / "run" / "log.txt"

    def tell(signum):
        for pid in (tmp_path / "tasks.txt").read_text().split():
            os.kill(int(pid), signum)

    job = submit(*arguments)
    wait_for(log, "epoch 2/15", job)
    tell(signal.SIGUSR1)  # what --signal sends before the time limit
    code, said = finish(job)
    assert code == 0, said
    assert "run is saved and not finished" in said
    assert len((tmp_path / "requeued.txt").read_text().splitlines()) == 1
    assert "holds the state" in log.read_text()

    job = submit(*arguments)
    wait_for(log, "Going on", job)
    tell(signal.SIGTERM)  # what scancel sends
    code, said = finish(job)
    assert code != 0, said
    assert not (tmp_path / "run" / "results.json").exists()
    assert len((tmp_path / "requeued.txt").read_text().splitlines()) == 1

    code, said = finish(submit(*arguments))
    assert code == 0, said
    assert Record.load(tmp_path / "run" / "results.json").num_processes == 2
    assert len((tmp_path / "requeued.txt").read_text().splitlines()) == 1
    assert "run is finished" in finish(submit(*arguments))[1]
