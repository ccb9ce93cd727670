"""What all scripts promise alike: their files, refusals, repeatable results, resuming."""

import json
import random
import runpy
import shutil
import signal
import sys
import time

import pytest
import torch
from helpers import rows_of
from scripts import ROOT, read_refusal, run, start

from harness.data import evaluate, load_dataset
from harness.load import load_teacher
from harness.networks import NETWORKS
from harness.run import MethodOptions
from kernels import _common

# Each runs for about a second and has some checkpoints on its way.
COMMANDS = {
    "deepinversion": "deepinversion.py --dataset digits --verifier none --batch-size 10"
    " --num-images 50 --iterations 6 --log-every 2",
    "deepinversion-student": "deepinversion.py --dataset digits --verifier none --student lenet5"
    " --competition js --batch-size 10 --initial-batches 1 --iterations 4 --log-every 2"
    " --epochs 4 --steps-per-epoch 6 --batches-per-epoch 1 --student-batch 10",
    "zskt": "zskt.py --pseudo-batches 12 --evaluations 4 --batch-size 8 --width 8",
    "pseudo_replay": "pseudo_replay.py --epochs 4 --iterations 1 --batch-size 16 --width 8"
    " --latent 8",
    "generative_ensemble": "generative_ensemble.py --generators 5 --steps 10 --batch-size 10"
    " --latent 8 --width 6 --epochs 3 --iterations 5 --student-batch 10",
    "role_kd": "role_kd.py --population 2 --search-epochs 4 --search-images 96"
    " --validation-images 96 --train-images 96 --epochs 3",
    "quantization": "quantization.py --images noise --num-images 40 --test-images 100"
    " --bits W4A4 W3A3 --calibration-batches 1 --epochs 3 --steps-per-epoch 3 --batch-size 10",
    "continual": "continual.py --images noise --num-images 20 --arms oracle-distill abd --epochs 3"
    " --steps-per-epoch 3 --batch-size 8",
    "pruning": "pruning.py --images noise --num-images 40 --test-images 100 --target 0.1 0.4"
    " --channels-per-removal 20 --batches-per-removal 1 --epochs 3 --steps-per-epoch 3"
    " --batch-size 10",
    "teacher": "teacher.py --arch lenet5 --epochs 4 --batch-size 256 --lr 0.05",
}
SMOKE = {
    "deepinversion": "deepinversion.py --smoke",
    "deepinversion-student": "deepinversion.py --smoke --dataset digits --student lenet5",
    "zskt": "zskt.py --smoke",
    "pseudo_replay": "pseudo_replay.py --smoke",
    "generative_ensemble": "generative_ensemble.py --smoke",
    "role_kd": "role_kd.py --smoke",
    "quantization": "quantization.py --smoke --images noise",
    "continual": "continual.py --smoke --images noise",
    "pruning": "pruning.py --smoke --images noise",
    "teacher": "teacher.py --smoke --arch lenet5",
}
# A small network with two BatchNorms and a shortcut.
NETWORK = """
import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward_groups(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3))), (x,)

    def forward(self, x):
        return self.forward_groups(x)[0]
"""
# One step on that network.
STEP = {
    "deepinversion": "deepinversion.py --setting cifar10 --verifier none --batch-size 4"
    " --iterations 1 --alpha-tv-l1 1 --alpha-l2 1",
    "deepinversion-student": "deepinversion.py --setting cifar10 --verifier none --batch-size 4"
    " --iterations 1 --competition js --initial-batches 1 --batches-per-epoch 1 --epochs 1"
    " --steps-per-epoch 1 --student-batch 4",
    "zskt": "zskt.py --setting cifar10 --pseudo-batches 1 --evaluations 1 --batch-size 4 --width 4"
    " --n-student-iter 2",
    "pseudo_replay": "pseudo_replay.py --setting digits --divergence js --epochs 1 --iterations 1"
    " --n-student-iter 2 --n-memory-iter 1 --batch-size 16 --width 4 --latent 4",
    "generative_ensemble": "generative_ensemble.py --setting digits --generators 2 --steps 1"
    " --batch-size 4 --latent 4 --width 4 --epochs 1 --iterations 1 --student-batch 4",
    "quantization": "quantization.py --setting digits --images noise --num-images 8 --bits W2A2"
    " --calibration-batches 1 --epochs 1 --steps-per-epoch 1 --batch-size 4 --temperature 1",
    "pruning": "pruning.py --setting digits --images noise --num-images 8 --target 0.2"
    " --channels-per-removal 2 --batches-per-removal 1 --epochs 1 --steps-per-epoch 1"
    " --batch-size 4",
}
# no --student and no student.pt
NO_STUDENT = ("teacher", "deepinversion", "quantization", "pruning")
NEEDS_DATA = ("teacher", "role_kd", "continual")
EVERY_SCRIPT = pytest.mark.parametrize("name", COMMANDS)
# those that train on real images need the data set's own teacher
EVERY_METHOD = pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in NEEDS_DATA]
)
EVERY_TRAINING = pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name != "deepinversion"]
)
# what quantization.py and pruning.py write is no teacher: their own tests load it
EVERY_NETWORK = pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("deepinversion", "quantization", "pruning")]
)
INTERRUPTED = "interrupted; --resume continues from what is finished"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Function of a name, and of the table of its command: the folder of that run, made once."""
    folder = tmp_path_factory.mktemp("whole")

    def make(name, commands=COMMANDS):
        kind = "smoke" if commands is SMOKE else "run"
        out = folder / f"{kind}-{name}"
        if not out.exists():
            run(commands[name], out)
        return out

    return make


@pytest.fixture
def step_command(tmp_path):
    """Function of a method's name: its command of one step on the small network."""
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NETWORK)
    network = runpy.run_path(str(tmp_path / "net.py"))["Net"]()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    factory = f"{tmp_path / 'net.py'}:Net"

    def make(name):
        command = f"{STEP[name]} --teacher {factory} --weights {tmp_path / 'w.pth'}"
        if name not in NO_STUDENT:
            command += f" --student {factory}"
        return f"{command} --image-size 8 --mean 0.5 --std 0.25 --dataset none"

    return make


def read_result(out):
    return json.loads((out / "result.json").read_text())


def get_trained(out):
    """The file of the network that a run trained, the first one of several."""
    names = ("teacher.pt", "student.pt", "quantized-W4A4.pt", "pruned-10.pt")
    return next(out / name for name in names if (out / name).exists())


def read_file(path):
    """A file's bytes; of a network's file all but how long training took, where, with what code."""
    if path.suffix != ".pt":
        return path.read_bytes()
    saved = torch.load(path, weights_only=True)
    tensors = {key: value.numpy().tobytes() for key, value in saved.pop("state_dict").items()}
    for name in ("seconds", "command", "versions"):
        saved.pop(name, None)
    return saved, tensors


def assert_same_run(first, second):
    """Two folders hold the same files with the same bytes, besides options and times."""

    def list_files(folder):
        names = {path.name for path in folder.iterdir() if "checkpoint" not in path.name}
        return names - {"args.json", "result.json", "seconds.txt"}

    assert list_files(first) == list_files(second)
    for name in list_files(first):
        assert read_file(first / name) == read_file(second / name), name


# Files


@EVERY_SCRIPT
def test_a_smoke_run_writes_every_file(whole_runs, name):
    out = whole_runs(name, SMOKE)
    names = {path.name for path in out.iterdir()}
    expected = {"args.json", "metrics.jsonl", "result.json"}
    expected |= {"teacher.pt"} if name == "teacher" else {"samples.png"}
    if name not in NO_STUDENT:
        expected |= {"student.pt"}
    assert expected <= names
    for file in out.iterdir():
        assert file.stat().st_size > 0 and file.suffix != ".part", file.name

    result = read_result(out)
    needed = {"teacher_accuracy", "student_accuracy", "seconds", "seed", "device", "device_name"}
    assert needed <= set(result)
    assert {"torch", "triton", "numpy", "commit"} <= set(result["versions"])
    assert (result["device"], result["seed"]) == ("cpu", 0)
    assert result["setting"] == json.loads((out / "args.json").read_text())
    assert result["setting"]["out"] == str(out)
    rows = rows_of(out)
    figures = torch.tensor([value for row in rows for value in row.values()])
    assert rows and figures.isfinite().all()


@EVERY_NETWORK
def test_what_a_run_trained_is_a_teacher_of_the_accuracy_that_it_claims(whole_runs, name):
    out = whole_runs(name)
    network, info = load_teacher(MethodOptions(teacher=str(get_trained(out))), "cpu")
    assert info.dataset == "digits" and info.image_shape == (1, 32, 32)
    images, labels = load_dataset("digits", "", "test")
    accuracy = evaluate(network, images, labels, info)
    kind = "teacher_accuracy" if name == "teacher" else "student_accuracy"
    assert accuracy == pytest.approx(info.accuracy, abs=0.01)
    assert accuracy == pytest.approx(read_result(out)[kind], abs=0.01)


@EVERY_METHOD
def test_teachers_may_have_other_channels_classes_and_sizes(tmp_path, name):
    """Four channels, 7 classes, 16 pixels, no data set; the student is of another family."""
    network = NETWORKS["resnet8"](num_classes=7, in_channels=4)
    description = dict(arch="resnet8", num_classes=7, image_size=16)
    description |= dict(mean=(0.1, 0.2, 0.3, 0.4), std=(0.4, 0.3, 0.2, 0.1))
    torch.save(description | {"state_dict": network.state_dict()}, tmp_path / "four.pt")
    command = SMOKE[name].replace("--dataset digits", "--dataset none")
    command += f" --setting digits --teacher {tmp_path / 'four.pt'}"
    if name not in NO_STUDENT:
        command += " --student wrn-16-1"
    out = tmp_path / "run"
    run(command, out)
    result = read_result(out)
    accuracies = result["student_accuracy"]
    if name == "quantization":
        accuracies = accuracies["W8A8"]
    if name == "pruning":
        accuracies = accuracies["10"]
    assert result["teacher_accuracy"] is None and accuracies is None
    assert (out / "samples.png").exists()
    if name not in NO_STUDENT:
        saved = torch.load(out / "student.pt", weights_only=True)
        assert (saved["arch"], saved["num_classes"], saved["channels"]) == ("wrn_16_1", 7, 4)


# Options


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Function of a command: run the script inside this process, on the CPU path."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: 1 / 0)
    monkeypatch.chdir(tmp_path)

    def run_here(command):
        script, *options = command.split()
        monkeypatch.setattr(sys, "argv", [script, *options])
        return runpy.run_path(str(ROOT / script), run_name="__main__")

    return run_here


def refuse(capsys, call, command):
    """What a refused command says, in one line or in the box of the option parser."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(command)
    told = capsys.readouterr()
    text = told.out + told.err
    assert stopped.value.code == 2, text
    assert "Traceback" not in text
    return " ".join(text.replace("│", " ").split())


REFUSED = [  # (option, what the refusal says)
    ("--no-such-option 3", "no-such-option"),
    ("--seed x", "x"),
    ("--seed -1", "--seed: expected at least 0"),
    ("--device tpu", "tpu"),
    ("--dataset svhn", "svhn"),
    ("--out taken", "--out taken cannot be used"),
]
REFUSED_TEACHERS = [
    ("--setting best", "--setting: expected one of cifar10, "),
    ("--teacher nobody", "unknown network 'nobody'; choose one of"),
    ("--teacher nowhere.pt", "nowhere.pt cannot be read"),
    ("--weights nowhere.pt", "nowhere.pt cannot be read"),
    ("--mean 0.5 --std 0.5 0.5", "--mean and --std"),
    ("--num-classes 7", "--num-classes"),
    ("--image-size 7", "--image-size"),
]
REFUSED_STUDENTS = [
    ("--student nobody", "unknown network 'nobody'"),
    ("--dataset mnist --data-dir nowhere", "check --data-dir"),
    ("--teacher cifar10-wrn-16-1 --dataset digits", "do not fit the teacher"),
]
REFUSED_ROLES = [
    ("--population 1", "--population: expected at least 2"),
    ("--bits 0", "--bits: expected 2 to 8, or 32, got 0"),
    ("--arm nobody", "nobody"),
    ("--schedules nowhere.json", "--schedules nowhere.json: FileNotFoundError"),
    ("--arm student --weights nowhere.pt", "nowhere.pt"),
]
REFUSED_BITS = [
    ("--bits W0A4", "--bits: expected W and A with 2 to 8 bits each"),
    ("--bits W4A33", "--bits: expected W and A with 2 to 8 bits each"),
    ("--bits W4A4 W4A4", "--bits: expected each pair once"),
    ("--images nowhere", "nowhere: no images-*.npz"),
    ("--images cifar10 --data-dir nowhere", "check --data-dir"),
    ("--images real --dataset none --teacher cifar10-resnet20 --data-dir nowhere", "--data-dir"),
]
REFUSED_TARGETS = [
    ("--target 0", "--target: expected shares from 0.01 to 0.99, got 0.0"),
    ("--target 1", "--target: expected shares from 0.01 to 0.99, got 1.0"),
    ("--target 0.99", "--target 0.99: of digits-resnet8 at most 0.965 of the weights"),
    ("--images nowhere", "nowhere: no images-*.npz"),
    ("--images cifar10 --data-dir nowhere", "check --data-dir"),
]
REFUSED_TASKS = [
    ("--tasks digits:0-4 digits:4-9", "expected classes that do not overlap"),
    ("--tasks digits:0-4 digits:5", "expected at least 2 of the classes 0 to 9"),
    ("--tasks digits:0-3 digits:4-9", "it was trained on digits:0,1,2,3,4"),
    ("--tasks digits:0-4 mnist:0-9 --data-dir nowhere", "check --data-dir"),
    ("--setting mnist", "train it: python teacher.py --dataset mnist --arch resnet8 --classes 0 1"),
    ("--images nowhere", "nowhere: no images-*.npz"),
]


@EVERY_SCRIPT
def test_a_wrong_option_is_refused_before_anything_is_written(capsys, call, tmp_path, name):
    (tmp_path / "taken").write_text("mine")
    cases = {
        "teacher": REFUSED,
        "deepinversion": [*REFUSED, *REFUSED_TEACHERS],
        "deepinversion-student": REFUSED_STUDENTS,
        "quantization": [*REFUSED, *REFUSED_TEACHERS, *REFUSED_STUDENTS[1:], *REFUSED_BITS],
        "pruning": [*REFUSED, *REFUSED_TEACHERS, *REFUSED_STUDENTS[1:], *REFUSED_TARGETS],
        "continual": [*REFUSED, *REFUSED_TEACHERS[1:], *REFUSED_TASKS],
        "role_kd": [*REFUSED, *REFUSED_TEACHERS[:3], *REFUSED_STUDENTS[:2], *REFUSED_ROLES],
    }
    for option, says in cases.get(name, [*REFUSED, *REFUSED_TEACHERS, *REFUSED_STUDENTS]):
        assert says in refuse(capsys, call, f"{SMOKE[name]} {option}"), option
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken").read_text() == "mine"


@EVERY_SCRIPT
def test_a_gpu_that_is_not_there_is_refused(capsys, call, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = read_refusal(capsys, call, f"{SMOKE[name]} --device cuda")
    assert "no CUDA device is visible; use --device cpu" in line


@EVERY_SCRIPT
def test_help_explains_every_option(capsys, call, name):
    with pytest.raises(SystemExit) as stopped:
        call(f"{COMMANDS[name].split()[0]} --help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--out", "--seed", "--device", "--resume", "--data-dir"):
        assert option in text
    assert "(default: None)" not in text


# Repeatable results


@EVERY_SCRIPT
def test_the_seed_settles_a_run(tmp_path, step_command, name):
    command = SMOKE[name] if name in NEEDS_DATA else step_command(name)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"{command} --seed {seed}", tmp_path / out)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


def count_rows(out):
    """Rows of a run's metrics, also of one that is writing them."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def stop_at_random(program, signal_number, n_rows, seconds, chance):
    """Send a signal at a random moment of a run whose rows and duration are known.

    Returns:
        Exit code and standard error.
    """
    args = program.out / "args.json"
    is_resumed = args.exists()
    last = max(0, n_rows - 2)  # after the last row a run may end before the signal comes
    wanted = chance.randint(min(count_rows(program.out), last), last)
    while program.is_running() and (count_rows(program.out) < wanted or not args.exists()):
        time.sleep(0.002)
    if is_resumed:
        time.sleep(0.3)  # until it has read what was there
    time.sleep(chance.uniform(0, seconds / n_rows))
    if program.is_running():
        program.send(signal_number)
    code, _, errors = program.finish()
    return code, errors


def stop_and_resume(name, whole, cut, signals, seed=0):
    """Stop a run at random moments with these signals and resume it each time; let it finish.

    Before the end, its newest checkpoint is damaged, so that the one before must serve.

    Returns:
        How many of the signals found the run at work.
    """
    chance = random.Random(seed)
    n_stopped = 0
    command = COMMANDS[name]
    for number in signals:
        program = start(command, cut)
        n_rows = len(rows_of(whole))
        seconds = read_result(whole)["seconds"]
        code, errors = stop_at_random(program, number, n_rows, seconds, chance)
        assert code in (0, -number), errors
        if code == -signal.SIGINT:
            assert errors.strip() == INTERRUPTED
        n_stopped += code == -number
        command = f"{COMMANDS[name]} --resume"
    newest = cut / "checkpoint.pt"
    if newest.exists() and (cut / "checkpoint-previous.pt").exists():
        newest.write_bytes(newest.read_bytes()[:-500])
    run(command, cut)
    return n_stopped


@EVERY_SCRIPT
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_files(tmp_path, whole_runs, name):
    """Ctrl-C, then kill -9 twice, at random moments; then a damaged checkpoint.

    On a busy machine a run may end before each of its signals: then others are tried.
    """
    whole = whole_runs(name)
    signals = [signal.SIGINT, signal.SIGKILL, signal.SIGKILL]
    n_stopped = 0
    for seed in range(10):
        if n_stopped == 0:
            cut = tmp_path / f"cut-{seed}"
            n_stopped = stop_and_resume(name, whole, cut, signals, seed)
            assert_same_run(whole, cut)
    assert n_stopped >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@EVERY_SCRIPT
def test_twenty_kills_give_the_same_files(tmp_path, whole_runs, name, seed):
    whole = whole_runs(name)
    cut = tmp_path / "cut"
    assert stop_and_resume(name, whole, cut, [signal.SIGKILL] * 20, seed) >= 2
    assert_same_run(whole, cut)


PARTLY_FROZEN = """
import torch.nn as nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.fc = nn.Linear(4, 10)
        nn.init.constant_(self.conv.weight, 0.25)
        nn.init.constant_(self.fc.weight, 0.0)
        self.conv.requires_grad_(False)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))
"""


@pytest.mark.parametrize(
    "name", ["deepinversion-student", "zskt", "pseudo_replay", "generative_ensemble"]
)
def test_layers_of_a_student_that_are_frozen_stay(tmp_path, name):
    (tmp_path / "small.py").write_text(PARTLY_FROZEN)
    out = tmp_path / "run"
    run(f"{COMMANDS[name]} --student {tmp_path}/small.py:Small", out)
    state = torch.load(out / "student.pt", weights_only=True)["state_dict"]
    assert (state["conv.weight"] == 0.25).all()
    assert (state["fc.weight"] != 0).any()


@EVERY_SCRIPT
def test_a_full_disk_is_one_line(tmp_path, name):
    """No file may grow beyond 4,000 bytes."""
    out = tmp_path / "run"
    code, _, errors = start(COMMANDS[name], out, file_limit=4000).finish()
    assert code == 2
    assert len(errors.splitlines()) == 1 and "cannot be written" in errors
    assert errors.endswith("free some space, then continue with --resume\n")
    assert not list(out.glob("*.part")) and not (out / "result.json").exists()


def shorten_optimizers(state):
    """Cut an average of each optimiser in a checkpoint to one number; how many there are."""
    if isinstance(state, dict) and "param_groups" in state:
        averages = next(iter(state["state"].values()))
        for key, value in averages.items():
            if value.dim():
                averages[key] = value.flatten()[:1]
        return 1
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return sum(shorten_optimizers(value) for value in state)
    return 0


@EVERY_TRAINING
def test_a_foreign_checkpoint_is_refused_and_nothing_is_lost(tmp_path, whole_runs, name):
    """That of another script, and one whose optimisers belong to smaller networks."""
    out = tmp_path / "run"
    shutil.copytree(whole_runs(name), out)
    path = out / "checkpoint.pt"
    other = torch.load(path, weights_only=True) | {"state": {"x": 1}}
    smaller = torch.load(path, weights_only=True)
    assert shorten_optimizers(smaller["state"]) >= 1
    for saved in (other, smaller):
        torch.save(saved, path)
        code, _, errors = start(f"{COMMANDS[name]} --resume", out).finish()
        assert code == 2 and len(errors.splitlines()) == 1, errors
        assert "checkpoint.pt: no checkpoint of this run" in errors
        assert "run without --resume" in errors
        assert get_trained(out).exists()


def test_processes_of_torchrun_share_the_batches_out(tmp_path):
    """The images are those of one process."""
    command = COMMANDS["deepinversion"].replace("--num-images 50", "--num-images 40")
    run(command, tmp_path / "one")
    environment = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    environment["MASTER_PORT"] = str(random.SystemRandom().randint(20_000, 60_000))
    programs = []
    for rank in ("0", "1"):
        out = tmp_path / "two"
        ranked = environment | dict(RANK=rank, LOCAL_RANK=rank)
        programs.append(start(command, out, environment=ranked))
    for program in programs:
        code, _, errors = program.finish()
        assert code == 0, errors
    for path in sorted((tmp_path / "one").glob("*.npz")) + [tmp_path / "one/samples.png"]:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    steps = [row["batch"] for row in rows_of(tmp_path / "two")]
    assert set(steps) == {0, 2}
    assert {row["batch"] for row in rows_of(tmp_path / "two/rank1")} == {1, 3}


# Fused and plain


@EVERY_METHOD
def test_triton_kernels_the_cpu_path_and_plain_references_give_the_same_losses(
    tmp_path, step_command, name
):
    def assert_same_losses(kind):
        rows = rows_of(tmp_path / kind)
        for ours, others in zip(rows_of(tmp_path / "cpu"), rows, strict=True):
            for key, value in ours.items():
                assert others[key] == pytest.approx(value, rel=1e-4, abs=2e-6), (kind, key)

    command = step_command(name)
    run(command, tmp_path / "cpu")
    assert any(key.startswith("loss/") for key in rows_of(tmp_path / "cpu")[0])
    run(f"{command} --no-fused", tmp_path / "plain")
    assert_same_losses("plain")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU; test_<script>.py compares there")
    code, _, errors = start(command, tmp_path / "triton", interpret=True).finish()
    assert code == 0, errors
    assert_same_losses("triton")
