"""Whether files, folders and streams can be trusted: what is damaged, shared or gone is refused."""

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import rows_of
from scripts import ROOT, read_refusal, start
from scripts import run as run_program
from tqdm import tqdm

import generative_ensemble
import teacher
import zskt
from harness import errors as harness_errors
from harness import files as harness_files
from harness.data import load_dataset
from harness.errors import Misfit, fail, fail_in_one_line, prepare_program, refuse_unwritable
from harness.files import encode_json, read_checkpoint
from harness.images import check_image_files, read_images, save_images
from harness.known import describe_checkpoint
from harness.run import MethodOptions, RunFolder, RunOptions, parse_args
from harness.weights import load_weights


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
    if isinstance(a, (list, tuple)):
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
    monkeypatch.setattr(harness_files, "fcntl", None)
    make_run(tmp_path / "other")
    assert not (tmp_path / "other/lock").exists()


@pytest.mark.parametrize("option", ["weights", "teacher"])
def test_a_run_goes_on_only_with_the_same_files(tmp_path, capsys, option):
    path = tmp_path / "net.pt"
    path.write_bytes(b"first")
    args = MethodOptions(out=str(tmp_path / "run"), **{option: str(path)})
    RunFolder(args, "cpu")
    args.resume = True
    RunFolder(args, "cpu")
    path.write_bytes(b"other")
    line = read_refusal(capsys, RunFolder, args, "cpu")
    assert f"the file of --{option} is not the first run's; put that back" in line


def test_a_new_run_does_not_delete_what_it_is_to_read(tmp_path, capsys):
    run = make_run(tmp_path)
    save_epochs(run, 1)
    (tmp_path / "student.pt").write_bytes(b"weights")
    run.finish({})
    before = read_folder(tmp_path)
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "student.pt")
    args = MethodOptions(out=str(tmp_path), teacher=str(link))
    line = read_refusal(capsys, RunFolder, args, "cpu")
    assert "the file of --teacher, which a new run deletes; pass another --out" in line
    link.unlink()
    assert read_folder(tmp_path) == before


def test_a_students_file_without_a_result_is_not_deleted(tmp_path, capsys):
    (tmp_path / "student.pt").write_bytes(b"weights")
    line = read_refusal(capsys, make_run, tmp_path)
    assert "holds an unfinished run (student.pt)" in line
    assert (tmp_path / "student.pt").read_bytes() == b"weights"


def test_random_numbers_of_python_and_numpy_go_on_too(tmp_path):
    """A user's network may draw them."""
    run = make_run(tmp_path)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    save_epochs(run, 1)
    expected = random.random(), np.random.normal()  # noqa: NPY002
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    run = make_run(tmp_path, resume=True)
    with run.open_checkpoint():
        pass
    assert (random.random(), np.random.normal()) == expected  # noqa: NPY002


# What a run goes on from


def read_folder(out):
    """The bytes of a run's files, but for the lock, which goes with the process."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}


def finish_run(out):
    """A finished run of three epochs."""
    run = make_run(out)
    save_epochs(run, 3)
    run.finish({"accuracy": 50.0})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("args.json", "[1, 2]", "args.json holds no options"),
        ("args.json", "{", "JSONDecodeError"),
        ("seconds.txt", "nan", "seconds.txt: expected at least 0, got nan"),
        ("seconds.txt", "-5", "seconds.txt: expected at least 0, got -5.0"),
        ("seconds.txt", "inf", "seconds.txt: expected at least 0, got inf"),
        ("metrics.jsonl", '[1]\n{"epoch": 2}\n', "line 1 is no row of numbers"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n', "line 2 is no row of numbers"),
        ("metrics.jsonl", '{"epoch": 1}\n\n{"epoch": 3}\n', "line 2 is no row of numbers"),
        ("metrics.jsonl", '{"epoch": "1"}\n', "line 1 is no row of numbers"),
        ("metrics.jsonl", '{"epoch": NaN}\n', "line 1 is no row of numbers"),
        ("metrics.jsonl", '{"epoch": true}\n', "line 1 is no row of numbers"),
        ("metrics.jsonl", "\xff\n", "line 1 is no row of numbers"),
    ],
)
def test_a_damaged_record_is_refused_and_nothing_is_changed(tmp_path, capsys, name, content, says):
    finish_run(tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    before = read_folder(tmp_path)
    line = read_refusal(capsys, restore, tmp_path)
    assert f"--out {tmp_path} cannot be used" in line and says in line
    assert read_folder(tmp_path) == before


@pytest.mark.parametrize("rest", ['{"epoch": 4, "lo', "\0\0\0", "4", "\xff"])
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path, rest):
    finish_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + rest.encode("latin-1"))
    run, saved = restore(tmp_path)
    assert saved["epoch"] == 3
    assert run.rows == rows_of(tmp_path) == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_rows": -1}, "expected a number of rows, got -1"),
        ({"n_rows": True}, "expected a number of rows, got True"),
        ({"n_rows": 2.0}, "expected a number of rows, got 2.0"),
        ({"n_rows": 4}, "metrics.jsonl has lost rows"),
        ({"state": [1]}, "its state is no dict"),
        ({"state": {"epoch": -3}}, "epoch: expected a whole number of at least 0, got -3"),
        ({"state": {"epoch": 3.0}}, "epoch: expected a whole number of at least 0, got 3.0"),
        ({"state": {"step": "3"}}, "step: expected a whole number"),
        ({"state": {"epoch": 7}}, "epoch is 7, in metrics.jsonl 3"),
        ({"state": {"epoch": 3, "w": torch.tensor([torch.nan])}}, "w is not finite"),
        ({"state": {"epoch": 3, "lr": float("inf")}}, "lr is not finite"),
        ({"rng": torch.zeros(3)}, "no checkpoint of this run"),
    ],
)
def test_numbers_that_no_run_wrote_are_refused_and_nothing_is_changed(
    tmp_path, capsys, change, says
):
    finish_run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(saved | change, tmp_path / "checkpoint.pt")
    before = read_folder(tmp_path)
    line = read_refusal(capsys, restore, tmp_path)
    assert "checkpoint.pt: no checkpoint of this run" in line and says in line
    assert read_folder(tmp_path) == before


def test_a_state_that_its_script_refuses_changes_nothing(tmp_path, capsys):
    finish_run(tmp_path)
    before = read_folder(tmp_path)

    def restore_other_network():
        run = make_run(tmp_path, resume=True, data_dir="elsewhere")
        with run.open_checkpoint() as saved:
            torch.nn.Linear(2, 3).load_state_dict(saved["network"])

    read_refusal(capsys, restore_other_network)
    assert read_folder(tmp_path) == before
    restore(tmp_path)
    assert not (tmp_path / "result.json").exists()  # it is at work again


@pytest.mark.parametrize(
    "previews", [7, [3], [(1, torch.zeros(10, 1, 8, 8))], [(1, "image")]], ids=str
)
def test_pictures_that_no_run_drew_are_refused(tmp_path, capsys, previews):
    """They would show at the end of the run only."""
    args = zskt.Args(
        out=str(tmp_path),
        device="cpu",
        fused=False,
        teacher="digits-lenet5",
        student="lenet5_half",
        dataset="none",
        pseudo_batches=1,
        batch_size=4,
        n_student_iter=1,
        width=4,
        beta=0.0,
    )
    zskt.main(args)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["state"]["previews"] = previews
    torch.save(saved, tmp_path / "checkpoint.pt")
    before = read_folder(tmp_path)
    line = read_refusal(capsys, zskt.main, replace(args, resume=True))
    assert "no checkpoint of this run" in line
    assert read_folder(tmp_path) == before


def test_two_damaged_checkpoints_both_stay(tmp_path, capsys):
    finish_run(tmp_path)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-300])
    before = read_folder(tmp_path)
    read_refusal(capsys, restore, tmp_path)
    assert read_folder(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_json_has_not_is_written(tmp_path, capsys, value):
    run = make_run(tmp_path)
    for write in (run.log, run.finish):
        line = read_refusal(capsys, write, {"loss/kl": value, "epoch": 1})
        assert "not finite: loss/kl of " in line and "lower the learning rates" in line
    assert run.rows == [] and not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(ValueError, match="Out of range"):
        encode_json({"loss": value})


# What is no file, and what is too much


class Hung(BaseException):
    """Raised where a call would wait for ever."""


@pytest.fixture
def limited_time():
    """End a test that hangs."""

    def stop(number, frame):
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_no_file(path, kind):
    """Put a pipe, a folder or a device without an end at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


KINDS = pytest.mark.parametrize("kind", ["pipe", "folder", "device"])


@KINDS
def test_a_path_that_is_no_file_is_refused(tmp_path, capsys, limited_time, kind):
    path = tmp_path / "images-00000.npz"
    make_no_file(path, kind)
    for read in (read_checkpoint, read_images):
        assert "Not a regular file" in read_refusal(capsys, read, path)
    with pytest.raises(Misfit, match="not a regular file"):
        load_weights(path)


@KINDS
@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("mnist", "mnist/t10k-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin"),
        ("cifar100", "cifar-100-binary/test.bin"),
    ],
)
def test_a_data_file_that_is_no_file_is_refused(
    tmp_path, capsys, limited_time, kind, dataset, name
):
    path = tmp_path / name
    path.parent.mkdir()
    make_no_file(path, kind)
    line = read_refusal(capsys, load_dataset, dataset, str(tmp_path), "test")
    assert "cannot be read" in line and "Not a regular file" in line


@KINDS
def test_an_archive_of_data_that_is_no_file_is_refused(tmp_path, capsys, limited_time, kind):
    make_no_file(tmp_path / "cifar-10-binary.tar.gz", kind)
    line = read_refusal(capsys, teacher.fetch_dataset, "cifar10", str(tmp_path))
    assert "cannot be unpacked" in line and "Not a regular file" in line


def test_a_name_that_no_folder_can_have_is_refused(capsys):
    line = read_refusal(capsys, check_image_files, 300 * "n", None)
    assert "--images nnn" in line and "File name too long" in line


@pytest.mark.parametrize("word", ["\udcff", "two\nlines", "\x1b[31mred", "nul\0"])
def test_a_word_that_no_line_can_show_is_refused(monkeypatch, capsys, word):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["test", "--out", word])
    line = read_refusal(capsys, parse_args, {"": MethodOptions()}, lambda teacher, dataset: "")
    assert "expected printable UTF-8 text" in line


@KINDS
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "seconds.txt"])
def test_a_run_whose_record_is_no_file_is_refused(tmp_path, capsys, limited_time, kind, name):
    finish_run(tmp_path)
    (tmp_path / name).unlink()
    make_no_file(tmp_path / name, kind)
    line = read_refusal(capsys, restore, tmp_path)
    assert "cannot be used" in line and "Not a regular file" in line


@KINDS
def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_no_file(
    tmp_path, capsys, limited_time, kind
):
    finish_run(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    make_no_file(tmp_path / "checkpoint.pt", kind)
    if kind == "folder":
        assert "checkpoint.pt" in read_refusal(capsys, restore, tmp_path)
    else:
        assert restore(tmp_path)[1]["epoch"] == 2


def test_an_empty_folder_name_is_no_out():
    with pytest.raises(ValueError, match="--out: expected a folder"):
        MethodOptions(out="")


def call_as_program(function, *args):
    """Call a function; what it raises goes to the hook that Python would call."""
    try:
        function(*args)
    except Exception:
        sys.excepthook(*sys.exc_info())


ALLOCATIONS = {
    "torch": lambda: torch.zeros(10**14),
    "torch's sizes": lambda: torch.zeros(2**31, 2**31, 2**31),
    "numpy": lambda: np.zeros(10**16),
    "python": lambda: [0] * 10**16,
}


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_too_little_memory_is_one_line_that_names_the_option(monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["test", "--image-size", "2000000000", "--seed", "7"])
    args = parse_args({"": MethodOptions()}, lambda teacher, dataset: "")
    assert args.image_size == 2_000_000_000
    line = read_refusal(capsys, call_as_program, ALLOCATIONS[kind])
    assert line.startswith("test: ") and line.endswith("; lower --image-size")
    assert "enforce fail" not in line

    monkeypatch.setattr(sys, "argv", ["test"])
    parse_args({"": MethodOptions()}, lambda teacher, dataset: "")
    line = read_refusal(capsys, call_as_program, ALLOCATIONS[kind])
    assert line.endswith("; lower the batch sizes")

    def allocate_inside():
        with fail_in_one_line("--thing x", "take fewer"):
            ALLOCATIONS[kind]()

    line = read_refusal(capsys, allocate_inside)
    assert line.startswith("test: --thing x: ") and line.endswith("; take fewer")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "nnn"), "test: nnn: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device", "x.part"), "x.part: No space left"),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc; lower the batch sizes"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "lower the batch sizes"),
    ],
)
def test_what_is_no_bug_is_one_line(monkeypatch, capsys, error, says):
    monkeypatch.setattr(harness_errors, "RAISED", [])
    monkeypatch.setattr(sys, "argv", ["test"])
    line = read_refusal(capsys, harness_errors.report_uncaught, type(error), error, None)
    assert says in line


def test_a_full_disk_that_another_error_hides_is_named(tmp_path, capsys):
    """PyTorch's writer ends with an error of its own where a file's write failed."""

    def write():
        with refuse_unwritable(tmp_path / "checkpoint.pt"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . ")

    line = read_refusal(capsys, write)
    assert "checkpoint.pt cannot be written: OSError: [Errno 28] No space left on device" in line
    assert "enforce fail" not in line and line.endswith("continue with --resume")


def test_a_picture_that_memory_is_too_small_for_is_not_blamed_on_the_disk(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(harness_errors, "RAISED", ["--sample"])

    def write():
        with refuse_unwritable(tmp_path / "samples.png"):
            ALLOCATIONS["python"]()

    line = read_refusal(capsys, write)
    assert line.endswith("; lower --sample") and "free some space" not in line


def test_a_refusal_that_nobody_can_read_keeps_its_exit_code(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(SystemExit) as stopped:
            fail("--thing x: no such thing; pass another")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left goes there
    assert stopped.value.code == 2


def test_too_many_options_are_named_beside_the_advice(monkeypatch, capsys):
    monkeypatch.setattr(harness_errors, "RAISED", ["--iterations"])

    def allocate():
        with fail_in_one_line("batch 0 failed", "try a smaller --batch-size"):
            ALLOCATIONS["torch"]()

    line = read_refusal(capsys, allocate)
    assert line.endswith("; try a smaller --batch-size, or lower --iterations")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: zskt.Args(evaluations=2_000_000_000), "--evaluations: expected at most"),
        (lambda: generative_ensemble.Args(sample=2_000_000_000), "--sample: expected at most"),
    ],
)
def test_a_count_that_would_fill_the_memory_with_a_list_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_checkpoint_does_not_grow_with_time(tmp_path):
    """Neither with the rows of metrics.jsonl, nor with the pictures of a long run."""
    sizes = []
    for n in (12, 60):
        run_program(
            f"zskt.py --pseudo-batches {n} --evaluations {n} --batch-size 4 --width 4"
            " --n-student-iter 1",
            tmp_path / str(n),
        )
        assert len(rows_of(tmp_path / str(n))) == n
        sizes.append((tmp_path / f"{n}/checkpoint.pt").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 1000


def test_a_bug_still_shows_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    prepare_program()
    call_as_program(lambda: torch.zeros(2) @ torch.zeros(3))
    assert "Traceback" in capsys.readouterr().err


# Terminals, pipes, folders that go


class Terminal(io.StringIO):
    """Takes what is printed, as a terminal does."""

    def isatty(self):
        return True


def test_a_refusal_does_not_stand_behind_the_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["test"])
    with tqdm(total=3, disable=None) as bar:
        bar.update()
        with pytest.raises(SystemExit):
            fail("--thing x: no such thing")
    shown = terminal.getvalue()
    assert "1/3" in shown
    before, line, _ = shown.partition("test: --thing x: no such thing\n")
    assert line
    assert before.endswith("\r")  # at the start of a line that was cleared
    assert not before.split("\r")[-2].strip()


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path, script):
    out = tmp_path / "run"
    program = start(f"{script} --pause 100", out)
    wait_for(out / "seconds.txt", program)
    assert "a run in" in (tmp_path / "run.stdout").read_text()
    program.send(signal.SIGKILL)
    program.finish()


PIPED = """
import os, sys
sys.path.insert(0, {root!r})
sys.argv = [{script!r}, "--device", "cpu", "--out", {out!r}]
{prepare}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BREAK_PIPE = "read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
FILL = 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'


@pytest.mark.parametrize(
    ("name", "prepare", "code", "says"),
    [
        ("pipe", BREAK_PIPE, 141, ""),
        ("full", FILL, 2, "standard output cannot be written: No space left on device"),
        ("closed", "os.close(1); sys.stdout = None", 0, ""),
        ("all closed", "os.close(1); os.close(2); sys.stdout = sys.stderr = None", 0, ""),
    ],
)
def test_a_broken_standard_output_ends_without_a_traceback(
    tmp_path, script, name, prepare, code, says
):
    out = str(tmp_path / "run")
    program = PIPED.format(root=str(ROOT), script=str(script), out=out, prepare=prepare)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and len(done.stderr.splitlines()) == int(code == 2), done.stderr


def test_names_that_a_terminal_cannot_show_are_spelt_out(tmp_path, script):
    out = str(tmp_path / "r\xe9sum\xe9")
    command = [sys.executable, str(script), "--device", "cpu", "--out", out]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "r\\xe9sum\\xe9" in done.stdout


def test_a_full_output_is_not_blamed_on_the_training(tmp_path, monkeypatch, capsys):
    """A device that is always full stands for the standard output."""
    run = make_run(tmp_path)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with (
            pytest.raises(SystemExit) as stopped,
            fail_in_one_line("the training failed", "try less"),
            tqdm(disable=True) as bar,
        ):
            run.show(bar, {"epoch": 1})
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert "standard output cannot be written: No space left" in line
    assert "the training failed" not in line


def test_a_folder_that_has_gone_is_not_called_a_full_disk(tmp_path, capsys):
    out = tmp_path / "run"
    run = make_run(out)
    state = save_epochs(run, 2)
    shutil.rmtree(out)
    for write in (
        lambda: run.log({"epoch": 3}),
        lambda: run.save_checkpoint(state),
        lambda: run.finish({}),
        lambda: save_images(out / "images-00000.npz", torch.zeros(1, 1, 2, 2), torch.zeros(1)),
    ):
        line = read_refusal(capsys, write)
        assert "cannot be written" in line and "its folder has gone" in line
        assert "free some space" not in line
