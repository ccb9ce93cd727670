"""Options, refusals, a run's folder, what makes it repeatable: harness/run.py and parts."""

import copy
import errno
import json
import math
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn as nn
from helpers import rows_of
from scripts import ROOT, read_refusal
from tqdm import tqdm

import harness
from harness import files as harness_files
from harness import run as harness_run
from harness.errors import fail_in_one_line, find_line, report_uncaught
from harness.files import find_not_finite, open_atomically, read_checkpoint
from harness.known import NetworkInfo
from harness.load import load_teacher
from harness.networks import NETWORKS
from harness.run import (
    MethodOptions,
    RunFolder,
    RunOptions,
    autocast,
    check_at_least,
    choose_device,
    describe_machine,
    join_processes,
    make_optimizer,
    parse_args,
    restore_optimizer,
    seed_everything,
)


@dataclass
class Args(RunOptions):
    """A script of this test: it draws a number in each epoch and adds it up."""

    teacher: str = "digits-lenet5"
    """A network's name."""
    dataset: Literal["auto", "digits", "mnist"] = "auto"
    """A data set."""
    setting: str = "auto"
    """A preset."""
    epochs: int = 4
    """Rows of metrics.jsonl."""
    lr: float = 0.5
    """Scale of what is drawn."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, self, "epochs")


PRESETS = {"digits": Args(), "mnist": Args(epochs=9, lr=0.25)}


def choose_preset(teacher, dataset):
    return "mnist" if "mnist" in (dataset, teacher.partition("-")[0]) else "digits"


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """A known name of the program. What a run sets of the interpreter is set back."""
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def parse(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["test", *command.split()])
    return parse_args(PRESETS, choose_preset)


# Options


@pytest.mark.parametrize(
    ("command", "epochs", "lr"),
    [
        ("", 4, 0.5),
        ("--teacher mnist-lenet5", 9, 0.25),
        ("--teacher=mnist-lenet5", 9, 0.25),
        ("--dataset mnist --teacher digits-lenet5", 9, 0.25),
        ("--setting mnist", 9, 0.25),
        ("--setting digits --teacher mnist-lenet5", 4, 0.5),
        ("--teacher mnist-lenet5 --lr 2", 9, 2.0),
        ("--lr 2 --setting=mnist --epochs 3", 3, 2.0),
    ],
)
def test_a_command_line_goes_over_the_preset_that_it_asks_for(monkeypatch, command, epochs, lr):
    args = parse(monkeypatch, command)
    assert (args.epochs, args.lr) == (epochs, lr)
    assert PRESETS["digits"] == Args()  # not changed


def test_help_shows_the_values_of_the_preset(monkeypatch, capsys):
    for command, value in (("", "0.5"), ("--teacher mnist-lenet5", "0.25")):
        with pytest.raises(SystemExit) as stopped:
            parse(monkeypatch, f"{command} --help")
        text = " ".join(capsys.readouterr().out.split())
        assert stopped.value.code == 0
        assert f"Scale of what is drawn. (default: {value})" in text
        assert "Seeds python, numpy and torch. (default: 0)" in text
        assert "{auto,digits,mnist}" in text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("--lr fast", "fast"),
        ("--epochs 1.5", "1.5"),
        ("--dataset svhn", "svhn"),
        ("--device tpu", "tpu"),
        ("--no-such-option 3", "no-such-option"),
        ("--epochs 0", "--epochs: expected at least 1 (and below 2^31), got 0"),
        ("--seed -1", "--seed: expected at least 0"),
    ],
)
def test_a_wrong_option_ends_with_exit_code_2(monkeypatch, capsys, command, says):
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, command)
    told = capsys.readouterr()
    assert stopped.value.code == 2
    text = " ".join((told.out + told.err).replace("│", " ").split())
    assert says in text and "Traceback" not in text


def test_an_unknown_setting_is_refused_with_all_choices(monkeypatch, capsys):
    line = read_refusal(capsys, parse, monkeypatch, "--setting best")
    assert line == "test: --setting: expected one of digits, mnist, got 'best'"


@pytest.mark.parametrize("value", [0, -3, 2**31, math.nan, math.inf, -math.inf])
def test_what_is_no_number_of_at_least_one_is_refused(value):
    args = Args()
    args.epochs = value
    with pytest.raises(ValueError, match="--epochs: expected at least 0.5"):
        check_at_least(0.5, args, "lr", "epochs")


def test_a_number_at_the_limit_is_accepted():
    args = Args()
    args.epochs = 2**31 - 1
    check_at_least(0.5, args, "lr", "epochs")


def test_every_method_has_the_options_of_a_run():
    with pytest.raises(ValueError, match="--image-size: expected at least 0"):
        MethodOptions(image_size=-1)
    with pytest.raises(ValueError, match="--seed: expected at least 0"):
        MethodOptions(seed=-1)


# Refusals and the machine


def test_an_error_becomes_its_first_sentence_in_one_line(capsys):
    def work():
        with fail_in_one_line("--thing x", "pass another"):
            raise ValueError("it\n  does not fit. Load it unsafely instead.")

    line = read_refusal(capsys, work)
    assert line == "test: --thing x: ValueError: it does not fit; pass another"


def test_an_interrupt_passes_a_refusal_and_ends_in_one_line(capsys):
    with pytest.raises(KeyboardInterrupt), fail_in_one_line("--thing x", "pass another"):
        raise KeyboardInterrupt
    report_uncaught(KeyboardInterrupt, KeyboardInterrupt(), None)
    told = capsys.readouterr().err.strip()
    assert told == "interrupted; --resume continues from what is finished"
    report_uncaught(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    line = read_refusal(capsys, choose_device, "cuda")
    assert "no CUDA device is visible; use --device cpu" in line


COUNT_PAGE_FAULTS = """
import resource, torch
from harness.run import choose_device
choose_device("cpu")
for step in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(4_000_000) for _ in range(4)]
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is of glibc")
def test_freed_memory_is_kept_on_the_cpu():
    """A page fault is the system's work on a page that it gives away."""
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    first, *others = map(int, found.stdout.split())
    assert first > 1000
    assert max(others[-3:]) < 100  # before, the heap may still grow by a tensor


def test_a_seed_settles_all_random_numbers():
    import random

    import numpy as np

    drawn = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_a_cpu_computes_in_fp32_whatever_the_option_says():
    x = torch.randn(2, 3)
    with autocast("cpu", bf16=True):
        assert nn.Linear(3, 4)(x).dtype == torch.float32


def test_a_result_names_device_and_versions(monkeypatch):
    found = describe_machine("cpu")
    assert found["device"] == "cpu" and "CPU thread" in found["device_name"]
    assert set(found["versions"]) == {"torch", "numpy", "triton", "commit"}
    assert found["versions"]["torch"] == str(torch.__version__)

    def find_no_git(command, *args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", command[0])

    monkeypatch.setattr(harness_run.subprocess, "run", find_no_git)
    assert describe_machine("cpu")["versions"]["commit"] == "unknown"


def test_a_process_alone_is_the_first_of_one(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes("cpu") == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = read_refusal(capsys, join_processes, "cpu")
    assert "torchrun: the processes cannot be joined" in line and "--nproc-per-node" in line


# Optimisers


@pytest.mark.parametrize("kind", ["adam", "sgd", "sgd-imagenet"])
def test_the_learning_rate_is_a_tensor_that_steps_read(kind):
    network = nn.Linear(2, 1)
    optimizer = make_optimizer(kind, network, 0.1)
    before = network.weight.detach().clone()
    optimizer.param_groups[0]["lr"].fill_(0.0)
    network(torch.ones(1, 2)).backward()
    optimizer.step()
    assert torch.equal(network.weight, before)
    optimizer.param_groups[0]["lr"].fill_(0.1)
    optimizer.step()
    assert not torch.equal(network.weight, before)
    if kind == "sgd":
        defaults = optimizer.defaults
        expected = dict(momentum=0.9, weight_decay=5e-4, nesterov=False)
        assert {name: defaults[name] for name in expected} == expected


def test_batchnorms_of_the_imagenet_recipe_do_not_decay():
    """NVIDIA's ResNet-50: momentum 0.875, weight decay 1/32768, and one learning rate for all."""
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    optimizer = make_optimizer("sgd-imagenet", network, 1.0)
    decayed, others = optimizer.param_groups
    assert (decayed["momentum"], others["momentum"]) == (0.875, 0.875)
    assert decayed["lr"] is others["lr"]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, *rest = network.parameters()
    torch.testing.assert_close(weight, before[0] * (1 - 1 / 32768), rtol=1e-7, atol=0)
    assert not torch.equal(weight, before[0])
    for parameter, same in zip(rest, before[1:], strict=True):
        assert torch.equal(parameter, same)


def take_step(network, optimizer):
    """One step towards smaller outputs; a parameter that is not used has no gradient."""
    optimizer.zero_grad()
    network(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "sgd", "sgd-imagenet"])
def test_a_restored_optimizer_goes_on_as_the_first_one(kind):
    networks = [nn.Linear(3, 4), nn.Linear(3, 4)]
    for network in networks:
        network.unused = nn.Parameter(torch.zeros(2))
    optimizers = [make_optimizer(kind, network, 0.1) for network in networks]
    take_step(networks[0], optimizers[0])
    networks[1].load_state_dict(networks[0].state_dict())
    rate = optimizers[1].param_groups[0]["lr"]
    restore_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
    rate.fill_(0.05)  # the tensor that a script took before it restored still is the rate
    optimizers[0].param_groups[0]["lr"].fill_(0.05)
    for network, optimizer in zip(networks, optimizers, strict=True):
        take_step(network, optimizer)
    assert torch.equal(networks[0].weight, networks[1].weight)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_of_another_network_is_refused(kind):
    """A fused step would read beyond the end of a smaller tensor."""
    network = nn.Linear(3, 4)
    optimizer = make_optimizer(kind, network, 0.1)
    take_step(network, optimizer)
    saved = optimizer.state_dict()
    tensor = "exp_avg" if kind == "adam" else "momentum_buffer"

    def change(**values):
        return {"state": saved["state"] | {0: saved["state"][0] | values}}

    without = {key: value for key, value in saved["state"][0].items() if key != tensor}
    broken = [
        {"state": {}},
        change(**{tensor: torch.zeros(1)}),
        change(step=torch.zeros(4, 3)),
        change(other=torch.zeros(4, 3)),
        {"state": saved["state"] | {0: without}},
        {"state": saved["state"] | {7: saved["state"][0]}},
    ]
    for state in broken:
        fresh = make_optimizer(kind, network, 0.1)
        with pytest.raises((ValueError, IndexError)):
            restore_optimizer(fresh, state)


# A run's folder


def train(out, epochs=4, stop=None, clears=(), **options):
    """A run of the script of this test; returns what it drew. `stop(run, epoch)` may end it."""
    args = Args(epochs=epochs, out=str(out), **options)
    seed_everything(args.seed)
    run = RunFolder(args, "cpu", may_change=("epochs",), clears=clears)
    drawn = []
    first = 0
    with run.open_checkpoint() as saved:
        if saved is not None:
            first = saved["epoch"]
            drawn = saved["drawn"]
    with tqdm(disable=True) as bar:
        for epoch in range(first, epochs):
            drawn.append(torch.rand(()) * args.lr)
            run.show(bar, {"epoch": epoch + 1, "loss/drawn": drawn[-1].item()})
            if stop:
                stop(run, epoch)
            run.save_checkpoint(dict(epoch=epoch + 1, drawn=drawn))
    run.finish(dict(total=sum(x.item() for x in drawn)))
    return drawn


class Cut(BaseException):
    """Stands for a kill at a known moment."""


def cut_at(n):
    """Ends a run after the row of epoch number `n` (from 0) and before its checkpoint."""

    def stop(run, epoch):
        if epoch == n:
            raise Cut

    return stop


def start_and_cut(out, n=2, **options):
    with pytest.raises(Cut):
        train(out, stop=cut_at(n), **options)


def test_a_run_writes_its_files(tmp_path, capsys):
    drawn = train(tmp_path, seed=5)
    assert rows_of(tmp_path) == [
        {"epoch": i + 1, "loss/drawn": round(x.item(), 6)} for i, x in enumerate(drawn)
    ]
    names = {path.name for path in tmp_path.iterdir()}
    files = {"args.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt"}
    assert names == files | {"seconds.txt", "result.json"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["total"] == pytest.approx(sum(drawn).item())
    assert (result["seed"], result["device"]) == (5, "cpu")
    assert set(result["versions"]) >= {"torch", "triton", "numpy", "commit"}
    assert result["seconds"] >= 0
    args = json.loads((tmp_path / "args.json").read_text())
    assert args == result["setting"] and args["seed"] == 5
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["epoch", "1"]
    assert shown[-1].startswith(f"wrote result.json into {tmp_path}; ")
    assert len({len(line) for line in shown[:4]}) == 1  # aligned


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_cut_run_that_resumes_is_an_unbroken_one(tmp_path, n):
    """Rows after the last checkpoint are forgotten, random numbers go on from it."""
    drawn = train(tmp_path / "whole")
    start_and_cut(tmp_path / "cut", n)
    assert len(rows_of(tmp_path / "cut")) == n + 1  # of which the last is done again
    torch.rand(7)  # no number of the process counts
    assert train(tmp_path / "cut", resume=True) == drawn
    for name in ("metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "cut" / name).read_bytes() == whole, name


def test_a_row_that_was_cut_short_is_forgotten(tmp_path):
    drawn = train(tmp_path / "whole")
    start_and_cut(tmp_path / "cut", 2)
    path = tmp_path / "cut/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert train(tmp_path / "cut", resume=True) == drawn
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_resumed_run_counts_its_seconds_on(tmp_path):
    start_and_cut(tmp_path)
    (tmp_path / "seconds.txt").write_text("1000.0\n")
    train(tmp_path, resume=True)
    seconds = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert 1000 <= seconds < 1060


def test_a_finished_run_can_go_on_with_more_epochs(tmp_path):
    drawn = train(tmp_path / "whole", epochs=5)
    train(tmp_path / "more", epochs=3)
    assert train(tmp_path / "more", epochs=5, resume=True) == drawn
    assert rows_of(tmp_path / "more") == rows_of(tmp_path / "whole")


def test_resume_refuses_other_options_and_leaves_the_run_alone(tmp_path, capsys):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = read_refusal(capsys, train, tmp_path, resume=True, lr=0.1, seed=2)
    assert "--resume: seed, lr differ from the first run's" in line
    (tmp_path / "lock").unlink()  # it goes with the process
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_without_a_run_starts_one(tmp_path):
    assert train(tmp_path / "a", resume=True) == train(tmp_path / "b")


def test_an_unfinished_run_is_never_deleted(tmp_path, capsys):
    start_and_cut(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    line = read_refusal(capsys, train, tmp_path)
    assert "holds an unfinished run" in line and "--resume to continue it" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_files_of_an_unfinished_run_are_its_checkpoints(tmp_path, capsys):
    """Such as finished batches of images."""
    (tmp_path / "images-00000.npz").write_bytes(b"an hour's work")
    line = read_refusal(capsys, train, tmp_path, clears=("images-*.npz",))
    assert "holds an unfinished run (images-00000.npz)" in line
    assert (tmp_path / "images-00000.npz").exists()


def test_a_new_run_forgets_a_finished_one(tmp_path):
    train(tmp_path)
    for name in ("images-00000.npz", "student.pt", "samples.png", "curve.png", "notes.txt"):
        (tmp_path / name).write_text("of before")
    (tmp_path / "metrics.jsonl").write_text("of before")
    start_and_cut(tmp_path, n=0, clears=("images-*.npz",))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"args.json", "metrics.jsonl", "notes.txt", "lock"}
    assert len(rows_of(tmp_path)) == 1


def test_the_newest_checkpoint_may_be_damaged(tmp_path, capsys):
    drawn = train(tmp_path / "whole")
    for damage in (b"", b"no checkpoint", None):
        cut = tmp_path / f"cut{damage}"
        start_and_cut(cut, 3)
        newest = cut / "checkpoint.pt"
        newest.write_bytes(newest.read_bytes()[:-300] if damage is None else damage)
        capsys.readouterr()
        assert train(cut, resume=True) == drawn
        assert "checkpoint.pt is damaged" in capsys.readouterr().out
        for name in ("metrics.jsonl", "checkpoint.pt", "checkpoint-previous.pt"):
            assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_checkpoint_that_does_not_fit_the_memory_is_not_damaged(tmp_path, monkeypatch, capsys):
    """It is kept: with more memory the run goes on from it."""
    drawn = train(tmp_path / "whole")
    cut = tmp_path / "cut"
    start_and_cut(cut, 3)
    before = {path.name: path.read_bytes() for path in cut.glob("checkpoint*")}

    def fail_to_read(path):
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(harness_run, "load_checkpoint", fail_to_read)
        with pytest.raises(MemoryError):
            train(cut, resume=True)
    assert "damaged" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in cut.glob("checkpoint*")} == before
    assert train(cut, resume=True) == drawn


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("my_nets.py", "my_nets.py, line 2"),
        ("channels.py", ""),
        ("kernels/bn_moments.py", ""),
        ("venv/lib/site-packages/nets.py", ""),
    ],
)
def test_only_a_users_own_line_is_to_blame(name, line):
    """A network of one's own may lie in the repository, beside our files."""
    code = compile("\nraise ValueError('wrong')", ROOT / name, "exec")
    with pytest.raises(ValueError, match="wrong") as caught:
        exec(code)
    assert find_line(caught.value, [ROOT]) == line


def test_a_damaged_checkpoint_never_replaces_the_whole_one(tmp_path):
    drawn = train(tmp_path / "whole")
    cut = tmp_path / "cut"
    start_and_cut(cut, 2)
    (cut / "checkpoint.pt").write_bytes(b"no checkpoint")

    def stop(run, epoch):
        with pytest.raises(SystemExit):
            run.save_checkpoint(dict(broken=torch.tensor(math.nan)))
        assert [path.name for path in cut.glob("checkpoint*")] == ["checkpoint-previous.pt"]
        raise Cut

    with pytest.raises(Cut):
        train(cut, stop=stop, resume=True)
    assert train(cut, resume=True) == drawn


def test_a_run_at_work_has_no_result(tmp_path):
    train(tmp_path, epochs=2)
    start_and_cut(tmp_path, n=2, resume=True)
    assert not (tmp_path / "result.json").exists()


def test_two_damaged_checkpoints_are_refused(tmp_path, capsys):
    start_and_cut(tmp_path, 3)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    line = read_refusal(capsys, train, tmp_path, resume=True)
    assert "checkpoint-previous.pt: no safe checkpoint" in line and "another --out" in line


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda saved: {"state_dict": {}}, id="a network"),
        pytest.param(lambda saved: saved | {"state": {"x": 1}}, id="another script's"),
        pytest.param(lambda saved: saved | {"state": [1]}, id="a list"),
        pytest.param(lambda saved: saved | {"n_rows": 99}, id="lost rows"),
        pytest.param(lambda saved: saved | {"rng": torch.zeros(3)}, id="no random numbers"),
        pytest.param(lambda saved: {k: v for k, v in saved.items() if k != "n_rows"}, id="cut"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_nothing_is_lost(tmp_path, capsys, change):
    start_and_cut(tmp_path, 3)
    rows = rows_of(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(change(saved), tmp_path / "checkpoint.pt")
    line = read_refusal(capsys, train, tmp_path, resume=True)
    assert "checkpoint.pt: no checkpoint of this run" in line and "run without --resume" in line
    assert rows_of(tmp_path) == rows


def test_nothing_that_is_not_finite_is_kept(tmp_path, capsys):
    def poison(run, epoch):
        if epoch == 2:
            run.save_checkpoint(dict(student={"weight": [torch.tensor([1.0, math.nan])]}))

    line = read_refusal(capsys, train, tmp_path, stop=poison)
    assert "not finite: student weight 0 of the run's state" in line
    assert not (tmp_path / "result.json").exists()
    for name, epoch in (("checkpoint.pt", 2), ("checkpoint-previous.pt", 1)):
        assert torch.load(tmp_path / name, weights_only=True)["state"]["epoch"] == epoch


def test_values_that_are_not_finite_are_found_where_they_are():
    assert find_not_finite({"a": [torch.ones(2)], "b": ({"c": torch.tensor([math.inf])},)})
    assert find_not_finite({"a": "text", "b": 1, "c": None, "d": torch.tensor([1, 2])}) == ""
    assert find_not_finite({}) == find_not_finite([]) == ""
    assert find_not_finite({"b": ({"c": torch.tensor([-math.inf])},)}) == "b 0 c"


# Files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("of before")
    for error in (ValueError, Cut):
        with pytest.raises(error), open_atomically(path) as file:
            file.write(b"half")
            raise error
        assert path.read_text() == "of before"
        assert list(tmp_path.iterdir()) == [path]
    with open_atomically(path) as file:
        file.write(b"whole")
        assert path.read_text() == "of before"
    assert path.read_text() == "whole"


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_waits_for_the_file(tmp_path, interrupts):
    """In the middle of torch.save it would be reported as a full disk, or abort the process."""
    path = tmp_path / "file"
    moments = []
    with pytest.raises(KeyboardInterrupt), open_atomically(path) as file:
        signal.raise_signal(signal.SIGINT)
        torch.save({"a": torch.ones(3)}, file)
        moments.append("saved")
    assert moments == ["saved"]
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):  # the handler of before is back
        signal.raise_signal(signal.SIGINT)


def fill_disk(monkeypatch, n_bytes):
    """Let each file that is opened for writing take so many bytes and no more."""
    open_file = open

    def open_on_full_disk(path, mode="r", *args, **kwargs):
        file = open_file(path, mode, *args, **kwargs)
        if mode not in ("wb", "ab"):
            return file
        write = file.write

        def write_little(data):
            if file.tell() + len(data) > n_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(data)

        return Writer(file, write_little)

    monkeypatch.setattr(harness_files, "open", open_on_full_disk, raising=False)


class Writer:
    """A file whose `write` is another function."""

    def __init__(self, file, write):
        self.file = file
        self.write = write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("n_bytes", [0, 200, 1000])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    tmp_path, capsys, monkeypatch, n_bytes
):
    """0 bytes: no row can be written; 200: rows can, but no checkpoint; 1000: half of one."""
    drawn = train(tmp_path / "whole")
    cut = tmp_path / "cut"

    def stop(run, epoch):
        if epoch == 1:
            fill_disk(monkeypatch, n_bytes)

    line = read_refusal(capsys, train, cut, stop=stop)
    assert "No space left on device" in line or "cannot be written" in line
    assert line.endswith("free some space, then continue with --resume")
    assert not list(cut.glob("*.part")) and not (cut / "result.json").exists()
    kept = [torch.load(path, weights_only=True) for path in cut.glob("checkpoint*.pt")]
    assert [saved["state"]["epoch"] for saved in kept] == [1]
    monkeypatch.undo()
    assert train(cut, resume=True) == drawn
    assert rows_of(cut) == rows_of(tmp_path / "whole")


def test_an_error_while_a_picture_is_drawn_leaves_the_old_one(tmp_path, capsys):
    run = RunFolder(Args(out=str(tmp_path)), "cpu")
    with run.write_file("samples.png") as file:
        file.write(b"old")

    def draw():
        with run.write_file("samples.png") as file:
            file.write(b"ne")
            raise RuntimeError("cannot draw")

    line = read_refusal(capsys, draw)
    assert "samples.png cannot be written: RuntimeError: cannot draw" in line
    assert (tmp_path / "samples.png").read_bytes() == b"old"
    assert not list(tmp_path.glob("*.part"))


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken/below"):
        assert "cannot be used" in read_refusal(capsys, train, out)
    assert (tmp_path / "taken").read_text() == "mine"
    assert "--out: expected a folder" in read_refusal(capsys, train, "")


def test_a_damaged_record_of_options_is_refused(tmp_path, capsys):
    start_and_cut(tmp_path)
    (tmp_path / "args.json").write_text("{")
    assert "cannot be used" in read_refusal(capsys, train, tmp_path, resume=True)


def test_each_process_but_the_first_has_a_folder_of_its_own(tmp_path, capsys):
    args = Args(out=str(tmp_path))
    for rank, folder in ((0, tmp_path), (1, tmp_path / "rank1")):
        run = RunFolder(args, "cpu", rank=rank)
        assert run.out == folder and (folder / "args.json").exists()
        with tqdm(disable=True) as bar:
            run.show(bar, {"step": 1})
    assert len(capsys.readouterr().out.splitlines()) == 1  # the first one speaks
    assert rows_of(tmp_path / "rank1") == [{"step": 1}]


def test_a_column_is_what_its_rows_have(tmp_path):
    run = RunFolder(Args(out=str(tmp_path)), "cpu")
    shown = run.log({"epoch": 1, "eval/acc": 12.3456789})
    run.log({"step": 2})
    assert run.column("eval/acc") == [12.345679] and run.column("step") == [2]
    assert shown == {"epoch": "1", "acc": "12.35"}


def test_a_student_is_written_as_a_teacher_that_loads(tmp_path):
    info = NetworkInfo("student", "resnet8", "digits", 10, 32, (0.3,), (0.4,), 81.5)
    student = NETWORKS["resnet8"](in_channels=1)
    run = RunFolder(Args(out=str(tmp_path), seed=3), "cpu")
    run.save_student(student, info, "a method")
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert (saved["method"], saved["seed"], saved["channels"]) == ("a method", 3, 1)
    args = MethodOptions(teacher=str(tmp_path / "student.pt"))
    network, found = load_teacher(args, "cpu")
    assert torch.equal(network.fc.weight, student.fc.weight)
    assert (found.arch, found.dataset, found.accuracy) == ("resnet8", "digits", 81.5)
    assert (found.mean, found.std, found.image_size) == ((0.3,), (0.4,), 32)


def test_reading_a_missing_file_is_refused(tmp_path, capsys):
    line = read_refusal(capsys, read_checkpoint, tmp_path / "nowhere.pt")
    assert "nowhere.pt cannot be read: there is no such file" in line


def test_the_folder_of_the_code_is_found():
    assert (harness.ROOT / "harness/run.py").samefile(Path(harness_run.__file__))
