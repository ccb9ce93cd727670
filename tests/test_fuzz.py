"""Random attacks on whole programs: bad inputs, kills, flipped bits, two at once, full disks.

A quick sample of each runs by default; `pytest -m slow tests/test_fuzz.py` takes some minutes each
and prints how many were tried. Every case follows from its seed, which the failure names.
"""

import builtins
import errno
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from scripts import FORKSERVER, ROOT, name_streams
from test_scripts import assert_same_run
from test_trust import flip_bit, is_equal

import continual
import deepinversion
import generative_ensemble
import pruning
import pseudo_replay
import quantization
import role_kd
import teacher
import zskt
from harness.errors import Misfit
from harness.files import read_checkpoint
from harness.images import read_images
from harness.known import describe_checkpoint
from harness.weights import load_weights
from kernels import _common

# Runs of about a second each
COMMANDS = {
    "deepinversion": "--dataset digits --verifier none --batch-size 4 --num-images 8"
    " --iterations 3 --log-every 2",
    "deepinversion-student": "--dataset digits --verifier none --student lenet5 --competition js"
    " --batch-size 4 --initial-batches 1 --iterations 2 --log-every 2 --epochs 2"
    " --steps-per-epoch 3 --batches-per-epoch 1 --student-batch 4",
    "zskt": "--pseudo-batches 4 --evaluations 2 --batch-size 4 --width 4 --n-student-iter 2",
    "pseudo_replay": "--epochs 2 --iterations 1 --n-student-iter 2 --batch-size 16 --width 4"
    " --latent 4",
    "generative_ensemble": "--generators 2 --steps 4 --batch-size 4 --latent 4 --width 4"
    " --epochs 2 --iterations 2 --student-batch 4",
    "role_kd": "--population 2 --search-epochs 2 --search-images 64 --validation-images 64"
    " --train-images 64 --epochs 2",
    "quantization": "--images noise --num-images 20 --test-images 40 --bits W4A4 W3A3"
    " --calibration-batches 1 --epochs 2 --steps-per-epoch 2 --batch-size 4",
    "continual": "--images noise --num-images 20 --test-images 40 --arms lwf deepinversion"
    " --epochs 2 --steps-per-epoch 2 --batch-size 4",
    "pruning": "--images noise --num-images 20 --test-images 40 --target 0.1 0.3"
    " --channels-per-removal 20 --batches-per-removal 1 --epochs 2 --steps-per-epoch 2"
    " --batch-size 4",
    "teacher": "--arch lenet5 --epochs 2 --batch-size 512 --lr 0.05",
}
SCRIPTS = {
    "deepinversion": deepinversion,
    "deepinversion-student": deepinversion,
    "zskt": zskt,
    "pseudo_replay": pseudo_replay,
    "generative_ensemble": generative_ensemble,
    "role_kd": role_kd,
    "quantization": quantization,
    "continual": continual,
    "pruning": pruning,
    "teacher": teacher,
}
PATIENCE = 20  # seconds that a program which writes rows is watched
LONG_PATIENCE = 120  # seconds until a program that has neither ended nor written a row hangs
MEMORY = 6 * 2**30  # bytes of address space that a program gets


# Programs


def limit_memory(n_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def run_prepared(prepare, argument, argv, streams, folder):
    """What a forked process does: prepare(argument), then the script in a folder of its own."""
    for i, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import harness
    from kernels import _common

    _common.INTERPRET = False
    harness.ROOT = folder  # where teacher.py exports to
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = argv
    prepare(argument)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


def start_prepared(name, options, folder, prepare=len, argument=""):
    """Start a script in `folder` and in a process of its own that calls prepare(argument) first."""
    script = name.partition("-")[0]
    argv = [str(ROOT / f"{script}.py"), *options]
    for path in name_streams(folder):
        path.write_text("")  # a kill may come before the program opens them
    arguments = prepare, argument, argv, name_streams(folder), folder
    process = FORKSERVER.Process(target=run_prepared, args=arguments)
    process.start()
    return process


def read_streams(out):
    """What a program wrote to its standard output and to its standard error."""
    return [path.read_text(errors="replace") for path in name_streams(out)]


# Bad inputs

WHOLE = ["-1", "0", "1", "2", "3", "7", "100000", "2000000000", "2147483647", "1" + 30 * "0", "x"]
REAL = ["-1", "0", "nan", "inf", "1e-320", "1e-12", "1e5", "2e9", "0.5", "1", "1e308", "x"]
WORD = ["", "x", "0", "/", ".", "..", "PIPE", "FOLDER", "TEXT", "NOTHING", "/dev/zero"]
WORD += ["/dev/null", "/dev/full", "TEXT/x", 300 * "n", "r\xe9sum\xe9", "a b", "x.py:f", "a:b:c"]
WORD += ["TEXT.pt", "PIPE.pt", "FOLDER.pt", "\udcff", "NETS:detached", "NETS:exits", "os:getcwd"]
WORD += ["W4A4", "W0A33"]


def list_values(field):
    """Values to try for an option, as lists of words."""
    kind = field.type
    if kind is bool:
        return [["maybe"], [""]]
    if get_origin(kind) is Literal:
        return [[choice] for choice in get_args(kind)] + [["x"], [""]]
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        words = get_args(item) or {float: REAL, int: WHOLE, str: WORD}[item]
        return [[a] for a in words] + [[a, b] for a in words for b in ("0.5", "3")] + [[]]
    if kind is int:
        return [[value] for value in WHOLE]
    if kind is float:
        return [[value] for value in REAL]
    return [[value] for value in WORD]


NETS = """
import torch.nn as nn


def detached(num_classes, in_channels, image_size):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)).detach()

    return Net(in_channels * image_size**2, num_classes)


def exits():
    raise GeneratorExit
"""


def make_traps(folder):
    """What a path of a bad input names: {word: path}."""
    (folder / "FOLDER").mkdir()
    (folder / "FOLDER.pt").mkdir()
    os.mkfifo(folder / "PIPE")
    os.mkfifo(folder / "PIPE.pt")
    for name in ("TEXT", "TEXT.pt"):
        (folder / name).write_text("no network")
    (folder / "nets.py").write_text(NETS)
    traps = {name: str(folder / name) for name in ("PIPE", "FOLDER", "TEXT", "NOTHING")}
    traps |= {name: str(folder / name) for name in ("PIPE.pt", "FOLDER.pt", "TEXT.pt", "TEXT/x")}
    for name in ("detached", "exits"):
        traps[f"NETS:{name}"] = f"{folder}/nets.py:{name}"
    return traps


def draw_bad_options(name, chance, traps):
    """One or two options of a script with values that are mostly bad."""
    choices = [f for f in fields(SCRIPTS[name].Args) if f.name not in ("smoke", "device", "fused")]
    options = []
    for field in chance.sample(choices, chance.choice([1, 1, 2])):
        words = chance.choice(list_values(field))
        words = [traps.get(word, word) for word in words]
        options += ["--" + field.name.replace("_", "-"), *words]
    return options


def judge_bad_input(process, work):
    """Wait for a program with a bad input; "" or what is wrong with how it took it."""
    start = time.time()
    is_at_work = False
    while process.is_alive() and not is_at_work and time.time() < start + LONG_PATIENCE:
        process.join(0.02)
        if time.time() > start + PATIENCE:
            is_at_work = bool(list(work.rglob("metrics.jsonl")))
    if process.is_alive():
        process.kill()
        process.join()
        return "" if is_at_work else "hung"
    said, errors = read_streams(work)
    if "Traceback" in errors or "Error in " in errors:
        return "a traceback:\n" + errors[-1500:]
    if process.exitcode == 0:
        return ""
    if process.exitcode != 2:
        return f"exit code {process.exitcode}: {errors[-1500:]}"
    lines = errors.strip().splitlines()
    is_box = "╭" in errors  # of the option parser
    if not is_box and len(lines) != 1:
        return f"{len(lines)} lines: {errors[-1500:]}"
    if not is_box and ";" not in errors and ": expected" not in errors:
        return f"no advice: {errors}"
    return ""


def try_bad_inputs(folder, seeds):
    """Start a program for each seed; {seed and options: what is wrong}."""
    names = list(COMMANDS)
    wrong = {}
    traps = make_traps(folder)
    for seed in seeds:
        chance = random.Random(seed)
        name = names[seed % len(names)]
        work = folder / f"work-{seed}"
        work.mkdir()
        options = [*COMMANDS[name].split(), "--device", "cpu", "--out", "out"]
        bad = draw_bad_options(name, chance, traps)
        process = start_prepared(name, [*options, *bad], work, limit_memory, MEMORY)
        problem = judge_bad_input(process, work)
        if problem:
            wrong[f"{seed} {name} {bad}"] = problem
        shutil.rmtree(work)
    return wrong


def test_a_bad_input_is_accepted_or_refused_in_one_line(tmp_path):
    """Every other script."""
    assert try_bad_inputs(tmp_path, range(2, len(COMMANDS), 2)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1400, 100))
def test_hundreds_of_bad_inputs_are_accepted_or_refused_in_one_line(tmp_path, first):
    assert try_bad_inputs(tmp_path, range(first, first + 100)) == {}


# Whole runs to compare with


def start_run(name, folder, options=(), prepare=len, argument=""):
    """Start a script's command of seconds; its --out is folder/out."""
    folder.mkdir(exist_ok=True)
    given = [*COMMANDS[name].split(), "--device", "cpu", "--out", "out", *options]
    return start_prepared(name, given, folder, prepare, argument)


def finish(process, folder):
    """Wait for a program's end: exit code and standard error."""
    process.join(120)
    assert not process.is_alive()
    return process.exitcode, read_streams(folder)[1]


def resume(name, folder):
    """Continue a run, which must succeed."""
    code, errors = finish(start_run(name, folder, ["--resume"]), folder)
    assert (code, errors) == (0, ""), errors


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Function of a script's name: the folder of a whole run, and how many file operations it has.

    Each is made once.
    """
    parent = tmp_path_factory.mktemp("whole")
    made = {}

    def make(name):
        if name not in made:
            counter = FORKSERVER.Value("i", 0)
            folder = parent / name
            process = start_run(name, folder, [], attack_files, (counter, 0, ""))
            code, errors = finish(process, folder)
            assert (code, errors) == (0, ""), errors
            made[name] = folder / "out", counter.value
        return made[name]

    return make


# The disk at a single operation


class AttackedFile:
    """A file whose writes count as operations."""

    def __init__(self, file, attack):
        self.file = file
        self.attack = attack

    def write(self, content):
        self.attack(lambda: self.file.write(bytes(content)[: len(content) // 2]))
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def attack_files(plan):
    """Count what is done to files of --out; at one operation the disk is full or all is killed.

    Args:
        plan: (shared counter, number of the operation, "full" or "kill").
    """
    counter, attacked, kind = plan
    plain_open = open

    def attack(do_half=bool):
        counter.value += 1
        if counter.value != attacked:
            return
        do_half()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_attacked(path, mode="r", *args, **options):
        is_text = "b" not in mode
        if "r" in mode or is_text or not str(path).startswith("out"):
            return plain_open(path, mode, *args, **options)
        attack()
        return AttackedFile(plain_open(path, mode, *args, **options), attack)

    def wrap(function):
        def call(*args, **options):
            attack()
            return function(*args, **options)

        return call

    builtins.open = open_attacked
    os.fsync = wrap(os.fsync)
    os.replace = wrap(os.replace)


def attack_one_operation(name, folder, whole, attacked, kind):
    """Let one operation fail, then continue the run: its files are the whole run's."""
    counter = FORKSERVER.Value("i", 0)
    process = start_run(name, folder, [], attack_files, (counter, attacked, kind))
    code, errors = finish(process, folder)
    case = f"{name}, operation {attacked}, {kind}: {errors}"
    out = folder / "out"
    if kind == "kill":
        assert code == -signal.SIGKILL, case
    else:
        assert code == 2, case
        assert len(errors.splitlines()) == 1 and "No space left on device; " in errors, case
        assert "out cannot be used" in errors or " cannot be written" in errors, case
        assert "standard output" not in errors, case
        assert not list(out.glob("*.part")), case
    if not (out / "result.json").exists():
        resume(name, folder)
    assert_same_run(whole, out)
    shutil.rmtree(folder)


def attack_operations(name, tmp_path, whole_runs, kind, n, seed=0):
    """Attack n operations: one at random, the first and the last, then others at random."""
    whole, n_operations = whole_runs(name)
    middle = random.Random(seed).sample(range(2, n_operations), min(n, n_operations - 2))
    for attacked in [middle[0], 1, n_operations, *middle[1:]][:n]:
        attack_one_operation(name, tmp_path / str(attacked), whole, attacked, kind)


EVERY_SCRIPT = pytest.mark.parametrize("name", COMMANDS)
KINDS = pytest.mark.parametrize("kind", ["full", "kill"])


@KINDS
def test_a_run_survives_a_full_disk_and_a_kill_at_a_file_operation(tmp_path, whole_runs, kind):
    attack_operations("teacher", tmp_path, whole_runs, kind, 1)


@pytest.mark.slow
@KINDS
@EVERY_SCRIPT
def test_a_run_survives_a_full_disk_and_a_kill_at_any_file_operation(
    tmp_path, whole_runs, name, kind
):
    attack_operations(name, tmp_path, whole_runs, kind, 25, seed=1)


# Kills at random moments


def kill_at_random(name, folder, whole, n_kills, seed):
    """Kill a run at random moments and continue it each time; its files are the whole run's.

    Returns:
        How many of the kills found it at work.
    """
    chance = random.Random(seed)
    n_killed = 0
    for _ in range(n_kills):
        process = start_run(name, folder, ["--resume"])
        process.join(chance.uniform(0, 1.5))
        process.kill()
        code, errors = finish(process, folder)
        assert code in (0, -signal.SIGKILL) and errors == "", errors
        n_killed += code != 0
    resume(name, folder)
    assert_same_run(whole, folder / "out")
    return n_killed


def test_a_run_survives_kills_at_random_moments(tmp_path, whole_runs):
    whole, _ = whole_runs("teacher")
    kill_at_random("teacher", tmp_path / "run", whole, 1, seed=0)


@pytest.mark.slow
@EVERY_SCRIPT
def test_a_run_survives_many_kills_at_random_moments(tmp_path, whole_runs, name):
    whole, _ = whole_runs(name)
    n_killed = 0
    for seed in range(5):
        n_killed += kill_at_random(name, tmp_path / str(seed), whole, 4, seed)
    print(f"{name}: {n_killed} of 20 kills found it at work")
    assert n_killed >= 5


# Flipped bits


READERS = {
    "checkpoint.pt": read_checkpoint,
    "student.pt": load_weights,
    "teacher.pt": describe_checkpoint,
    "ensemble.pt": lambda path: generative_ensemble.load_ensemble(path, "cpu")[2],
    "quantized-W4A4.pt": lambda path: quantization.load_integers(path)[0].state_dict(),
    "pruned-10.pt": lambda path: pruning.load_pruned(path)[0].state_dict(),
    "images-00000.npz": read_images,
}
HOLDERS = {  # a script whose run writes the file
    "checkpoint.pt": "zskt",
    "student.pt": "pseudo_replay",
    "teacher.pt": "teacher",
    "ensemble.pt": "generative_ensemble",
    "quantized-W4A4.pt": "quantization",
    "pruned-10.pt": "pruning",
    "images-00000.npz": "deepinversion",
}


def flip_bits(name, tmp_path, whole_runs, capsys, n, seed=0):
    """Flip each of n random bits of a file: reading it is refused, or gives the same.

    Returns:
        How many were refused.
    """
    whole, _ = whole_runs(HOLDERS[name])
    path = tmp_path / name
    content = (whole / name).read_bytes()
    path.write_bytes(content)
    original = READERS[name](path)
    n_refused = 0
    for position in random.Random(seed).sample(range(8 * len(content)), n):
        path.write_bytes(content)
        flip_bit(path, position)
        try:
            read = READERS[name](path)
        except (SystemExit, Misfit):
            n_refused += 1
        else:
            assert is_equal(read, original), position
    capsys.readouterr()
    return n_refused


@pytest.fixture
def cpu_path(monkeypatch):
    """The CPU path of the ops, for readers that call one."""
    monkeypatch.setattr(_common, "INTERPRET", False)


EVERY_FILE = pytest.mark.parametrize("name", READERS)


@EVERY_FILE
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, whole_runs, capsys, cpu_path, name):
    assert flip_bits(name, tmp_path, whole_runs, capsys, 10) > 0


@pytest.mark.slow
@EVERY_FILE
def test_thousands_of_flipped_bits_are_refused_or_change_nothing(
    tmp_path, whole_runs, capsys, cpu_path, name
):
    assert flip_bits(name, tmp_path, whole_runs, capsys, 3000, seed=1) > 0


def resume_flipped(name, folder, whole, position):
    """Continue a run whose checkpoint has a flipped bit: the same files, or a refusal."""
    folder.mkdir()
    shutil.copytree(whole, folder / "out")
    flip_bit(folder / "out/checkpoint.pt", position)
    code, errors = finish(start_run(name, folder, ["--resume"]), folder)
    if code == 0:
        assert_same_run(whole, folder / "out")
    else:
        assert code == 2 and len(errors.splitlines()) == 1, errors
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "deepinversion"])
def test_a_run_resumed_from_a_flipped_checkpoint_ends_with_the_same_files(
    tmp_path, whole_runs, name
):
    whole, _ = whole_runs(name)
    n_bits = 8 * (whole / "checkpoint.pt").stat().st_size
    for position in random.Random(2).sample(range(n_bits), 20):
        resume_flipped(name, tmp_path / str(position), whole, position)


# Streams that break


def break_stream(kind):
    """Give this program a standard output that cannot be written."""
    if kind == "pipe":
        read_end, write_end = os.pipe()
        os.close(read_end)
        sys.stdout = os.fdopen(write_end, "w")
    elif kind == "full":
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115 (it stays open)
    else:
        os.close(1)
        sys.stdout = None


@pytest.mark.slow
@EVERY_SCRIPT
def test_a_run_whose_output_breaks_ends_in_one_line_or_goes_on(tmp_path, whole_runs, name):
    whole, _ = whole_runs(name)
    for kind, expected in (("pipe", 141), ("full", 2), ("closed", 0)):
        folder = tmp_path / kind
        code, errors = finish(start_run(name, folder, [], break_stream, kind), folder)
        assert code == expected, errors
        assert len(errors.splitlines()) == int(kind == "full"), errors
        if kind != "closed":
            resume(name, folder)
        assert_same_run(whole, folder / "out")


@pytest.mark.parametrize(("kind", "expected"), [("pipe", 141), ("full", 2)])
def test_measuring_a_teacher_for_an_output_that_breaks(tmp_path, whole_runs, kind, expected):
    """No run folder is there to prepare the program."""
    whole, _ = whole_runs("teacher")
    options = ["--evaluate", str(whole / "teacher.pt"), "--device", "cpu"]
    folder = tmp_path / "work"
    folder.mkdir()
    process = start_prepared("teacher", options, folder, break_stream, kind)
    code, errors = finish(process, folder)
    assert code == expected and len(errors.splitlines()) == int(kind == "full"), errors


# Several at once


def use_streams(name):
    """Let this program speak into files of its own."""
    os.dup2(os.open(f"{name}.errors", os.O_WRONLY | os.O_CREAT), 2)


def start_together(name, folder, whole, chance):
    """Start three programs in one folder, a moment apart: at least one succeeds, no file suffers.

    Returns:
        How many were refused: none, if on a busy machine each ends before the next begins.
    """
    processes = []
    for i in range(3):
        options = chance.choice([[], ["--resume"]])
        beside = folder.with_name(f"{folder.name}-{i}")
        processes.append((start_run(name, folder, options, use_streams, str(beside)), beside))
        time.sleep(chance.choice([0, 0.02, 0.2, 0.5]))
    n_refused = 0
    for process, beside in processes:
        process.join(120)
        errors = Path(f"{beside}.errors").read_text()
        if process.exitcode == 0:
            assert errors == "", errors
            continue
        n_refused += 1
        assert process.exitcode == 2 and len(errors.splitlines()) == 1, errors
        assert "is in use by process" in errors, errors
    assert n_refused < 3
    assert_same_run(whole, folder / "out")
    return n_refused


@pytest.mark.parametrize("name", ["teacher"])
def test_programs_that_start_at_once_in_one_folder(tmp_path, whole_runs, name):
    whole, _ = whole_runs(name)
    start_together(name, tmp_path / "run", whole, random.Random(0))


@pytest.mark.slow
@EVERY_SCRIPT
def test_many_programs_that_start_at_once_in_one_folder(tmp_path, whole_runs, name):
    whole, _ = whole_runs(name)
    n_refused = 0
    for seed in range(8):
        n_refused += start_together(name, tmp_path / f"run-{seed}", whole, random.Random(seed))
    assert n_refused >= 8
