"""Whether files, folders and streams can be trusted: what is damaged, shared or gone is refused."""

import random
import signal
import time
from dataclasses import asdict

import pytest
import torch
from helpers import rows_of
from scripts import read_refusal, start
from tqdm import tqdm

import generative_ensemble
from harness import run as harness_run
from harness.images import read_images, save_images
from harness.load import describe_checkpoint, load_weights
from harness.run import RunFolder, RunOptions, read_checkpoint


def flip_bit(path, position):
    """Turn one bit of a file over, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << (position % 8)
    path.write_bytes(content)


def flip_value(path, array):
    """Turn one bit of an array over where it stands in a file."""
    place = path.read_bytes().index(array.tobytes())
    flip_bit(path, 8 * place + 5)


def is_equal(a, b):
    """Whether two nested dicts and lists of tensors and numbers are equal, bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a == b


# A flipped bit


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, capsys):
    """300 bits anywhere in a checkpoint: in the data, the headers and the directory."""
    path = tmp_path / "checkpoint.pt"
    state = {"weights": [torch.randn(20, 7), torch.arange(5)], "epoch": 3, "name": "lenet5"}
    torch.save(dict(state=state, n_rows=3), path)
    written = path.read_bytes()
    original = read_checkpoint(path)
    chance = random.Random(0)
    n_refused = 0
    for position in chance.sample(range(8 * len(written)), 300):
        path.write_bytes(written)
        flip_bit(path, position)
        try:
            saved = read_checkpoint(path)
        except SystemExit as stopped:
            assert stopped.code == 2
            assert len(capsys.readouterr().err.splitlines()) == 1, position
            n_refused += 1
        else:
            assert is_equal(saved, original), position
    assert n_refused > 100


def test_an_entry_that_became_a_folder_is_refused(tmp_path, capsys):
    """torch.load would return memory that nothing was written to."""
    path = tmp_path / "checkpoint.pt"
    torch.save(dict(state=torch.randn(20, 7)), path)
    entry = path.read_bytes().rindex(b"checkpoint/data/0") - 46  # in the archive's directory
    flip_bit(path, 8 * (entry + 38) + 4)
    assert "data/0 in it is marked as a folder" in read_refusal(capsys, read_checkpoint, path)


def write_teacher(path):
    """A small checkpoint of teacher.py; returns its only tensor."""
    weight = torch.randn(4, 3)
    torch.save(dict(arch="lenet5", dataset="digits", state_dict={"weight": weight}), path)
    return weight.numpy()


def write_ensemble(path):
    """A small ensemble.pt; returns one of its tensors."""
    sizes = generative_ensemble.Sizes([[0, 1]], 4, 4, 1, 1, 16)
    ensemble = generative_ensemble.Ensemble(sizes).initialise()
    saved = dict(shape=asdict(sizes), mean=[0.5], std=[0.5], bn="batch", n=2, teacher="t")
    torch.save(saved | dict(state_dict=ensemble.state_dict()), path)
    return next(ensemble.parameters()).detach().numpy()


def write_images(path):
    """A batch of images; returns its labels."""
    labels = torch.arange(4)
    save_images(path, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels)
    return labels.numpy()


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("teacher.pt", write_teacher, describe_checkpoint),
        ("weights.pth", write_teacher, load_weights),
        ("ensemble.pt", write_ensemble, lambda p: generative_ensemble.load_ensemble(p, "cpu")),
        ("images-00000.npz", write_images, read_images),
    ],
)
def test_a_flipped_bit_in_any_file_of_numbers_is_refused(tmp_path, capsys, name, write, read):
    path = tmp_path / name
    array = write(path)
    read(path)
    flip_value(path, array)
    line = read_refusal(capsys, read, path)
    assert name in line and "another checksum than was written" in line


def make_run(out, **options):
    """A folder of a run on the CPU."""
    return RunFolder(RunOptions(out=str(out), **options), "cpu")


def save_epochs(run, n_epochs):
    """A row and a checkpoint for each epoch; returns what the last one holds."""
    with tqdm(disable=True) as bar:
        for epoch in range(n_epochs):
            run.show(bar, {"epoch": epoch + 1})
            state = dict(epoch=epoch + 1, weights=torch.full((50,), epoch + 1.0))
            run.save_checkpoint(state)
    return state


def restore(out):
    """Continue a run; returns it and the state that it found."""
    run = make_run(out, resume=True)
    with run.open_checkpoint() as saved:
        pass
    return run, saved


def test_a_run_goes_on_from_the_checkpoint_before_a_flipped_bit(tmp_path, capsys):
    state = save_epochs(make_run(tmp_path), 3)
    flip_value(tmp_path / "checkpoint.pt", state["weights"].numpy())
    run, saved = restore(tmp_path)
    assert saved["epoch"] == 2 and run.rows == [{"epoch": 1}, {"epoch": 2}]
    assert "checkpoint.pt is damaged" in capsys.readouterr().out


def test_files_in_the_old_format_of_pytorch_still_load(tmp_path):
    state = {"weight": torch.randn(3, 4)}
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["weight"], state["weight"])
    assert torch.equal(load_weights(path)["weight"], state["weight"])


# Two processes


SCRIPT = """
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from harness.run import RunFolder, RunOptions, parse_args


@dataclass
class Args(RunOptions):
    epochs: int = 3
    pause: float = 0.0
    "Seconds after the first epoch."


def main(args):
    run = RunFolder(args, "cpu", may_change=("pause",))
    print(f"a run in {run.out}")
    with run.open_checkpoint() as saved:
        first = 0 if saved is None else saved["epoch"]
    for epoch in range(first, args.epochs):
        with tqdm(disable=True) as bar:
            run.show(bar, {"epoch": epoch + 1})
        run.save_checkpoint(dict(epoch=epoch + 1, weights=torch.ones(5)))
        if epoch == 0:
            time.sleep(args.pause)
    run.finish({})


if __name__ == "__main__":
    main(parse_args({"": Args()}, lambda teacher, dataset: ""))
"""


@pytest.fixture
def script(tmp_path):
    """The path of a small script: it writes a row and a checkpoint for each of three epochs."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def wait_for(path, program):
    """Wait until a program has written a file."""
    while program.is_running() and not path.exists():
        time.sleep(0.01)
    assert path.exists()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, script):
    out = tmp_path / "run"
    first = start(f"{script} --pause 100", out)
    wait_for(out / "seconds.txt", first)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for option in ("", " --resume"):
        second = start(f"{script}{option}", out)
        code, _, errors = second.finish()
        assert code == 2 and len(errors.splitlines()) == 1, errors
        assert f"in use by process {first.process.pid} on " in errors
        assert "pass another --out" in errors
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    first.send(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    code, _, errors = start(f"{script} --resume", out).finish()
    assert code == 0, errors
    assert rows_of(out) == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
    assert not (out / "lock").exists()


def test_a_process_may_open_its_folder_again_and_runs_go_on_without_locks(tmp_path, monkeypatch):
    make_run(tmp_path)
    make_run(tmp_path)
    monkeypatch.setattr(harness_run, "fcntl", None)
    make_run(tmp_path / "other")
    assert not (tmp_path / "other/lock").exists()
