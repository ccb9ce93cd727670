"""RunFolder: what a run leaves behind when it is killed, interrupted, or when the disk is full.

By hand, with as many kills as wanted: python tests/test_folder.py 20
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "deepinversion.py --dataset digits --student lenet5 --competition js --verifier none --batch-size 10"
COMMAND += " --num-images 10 --iterations 16 --epochs 3 --steps-per-epoch 12 --batches-per-epoch 1 --student-batch 10"
COMMAND += " --checkpoint-every 4 --log-every 1 --device cpu --out"
SAME = (*(f"images-{i:05d}.npz" for i in range(4)), "metrics.jsonl", "samples.png", "curve.png", "student.pt")


def start(out, *options, limit=resource.RLIM_INFINITY):
    """A run as a process of its own; limit: bytes of the largest file that it may write."""

    def before_it_begins():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background is born deaf to it
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command, pipes = [sys.executable, *COMMAND.split(), str(out), *options], dict(stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, preexec_fn=before_it_begins, **pipes
    )


def finish(out, *options, **limit):
    process = start(out, *options, **limit)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, [line for line in errors.splitlines() if "|" not in line and line.strip()]


def assert_same(a, b):
    for name in SAME:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def kill_and_resume(whole, cut, n_kills, seed=0):
    """Kill a run n_kills times at random moments after its first checkpoint, resuming each time; then compare."""
    chance, process, n_steps = random.Random(seed), start(cut), []
    for _ in range(n_kills):
        before, until = None if not n_steps else (cut / "checkpoint.pt").stat().st_mtime_ns, time.time() + 60
        while process.poll() is None and time.time() < until:  # until it has done something
            newest = cut / "checkpoint.pt"
            if newest.exists() and newest.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        n_steps.append(len((cut / "metrics.jsonl").read_text().splitlines()))
        process = start(cut, "--resume")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same(whole, cut)
    return n_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "whole"
    assert finish(out)[0] == 0
    return out


def test_kill_9_at_random_moments_changes_nothing(whole, tmp_path):
    n_steps = kill_and_resume(whole, tmp_path / "cut", 2)
    n_rows = len((whole / "metrics.jsonl").read_text().splitlines())
    assert all(0 < n < n_rows for n in n_steps), "killed too late or too early to test anything"


def test_interrupted_out_of_disk_and_damaged(whole, tmp_path):
    """One run: Ctrl-C, resumed on a full disk, its newest checkpoint cut short, resumed: the bytes of a whole run."""
    cut = tmp_path / "cut"
    process = start(cut)
    while len(list(cut.glob("checkpoint*.pt"))) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, 1)
    assert "Traceback" not in errors
    assert (
        errors.strip().splitlines()[-1] == "interrupted; --resume continues from the last checkpoint, if there is one"
    )

    # the largest file that the process may write is smaller than a checkpoint: no room is left for the next one
    before = (cut / "checkpoint.pt").read_bytes()
    code, errors = finish(cut, "--resume", limit=len(before) - 20_000)
    assert code == 2 and len(errors) == 1, errors
    assert "checkpoint.pt cannot be written" in errors[0] and "then continue with --resume" in errors[0]
    assert (cut / "checkpoint.pt").read_bytes() == before
    assert not (cut / "checkpoint.part").exists() and not (cut / "result.json").exists()

    (cut / "checkpoint.pt").write_bytes(before[:-1000])
    assert finish(cut, "--resume")[0] == 0
    assert_same(whole, cut)
    assert json.loads((cut / "result.json").read_text())["n_images"] == 40


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        COMMAND = COMMAND.replace("--iterations 16", "--iterations 30")  # room for twenty
        assert finish(Path(made) / "whole")[0] == 0
        steps = kill_and_resume(Path(made) / "whole", Path(made) / "cut", int(sys.argv[1]))
        print("steps done at each kill:", steps, "- the same bytes in the end")
