"""One run of a script: its options, its folder, and what makes it repeatable."""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from harness import ROOT
from harness.errors import (
    RAISED,
    fail,
    fail_in_one_line,
    is_out_of_memory,
    leave_without_stdout,
    prepare_program,
    refuse_unwritable,
)
from harness.files import (
    check_regular,
    encode_json,
    find_not_finite,
    load_checkpoint,
    lock_folder,
    open_atomically,
    parse_row,
    read_checkpoint,
    unlock_folder,
)
from harness.networks import fork_rng

FINITE_ADVICE = "in another --out, lower the learning rates or weights"
COUNTERS = ("step", "epoch")  # entries of a checkpoint that count what its run has finished
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt, in malloc.h


# Options
@dataclass
class RunOptions:
    """The options of every script. A script's Args adds its own and may change the defaults."""

    data_dir: str = "data"
    """Folder with the data sets' official files. Downloaded weights are kept there too."""
    out: str = "runs/default"
    """Output folder."""
    seed: int = 0
    """Seeds python, numpy and torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on a GPU if there is one."""
    resume: bool = False
    """Continue the run in --out. On a CPU the result is bit-equal to that of an unbroken run."""
    smoke: bool = False
    """Shrink everything to a run of seconds."""

    def __post_init__(self):
        check_at_least(0, self, "seed")


@dataclass
class TeacherOptions:
    """The teacher that a script takes, and the real images beside it."""

    teacher: str = "cifar10-resnet20"
    """Shipped or ImageNet name, a checkpoint of teacher.py (.pt), or file.py:factory."""
    weights: str = ""
    """State dict to load instead of the named one; file.py:factory needs it."""
    num_classes: int = 0
    """Classes of a foreign teacher; 0: as many as the named teacher has."""
    image_size: int = 0
    """Height = width of a foreign teacher's images in pixels; 0: as the named teacher has."""
    mean: tuple[float, ...] = ()
    """Per-channel mean of the teacher's normalisation, in [0, 1]; empty: as named."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation, likewise."""
    dataset: Literal["auto", "digits", "mnist", "cifar10", "cifar100", "imagenet", "none"] = "auto"
    """Real test images. Training never sees them. auto: the teacher's."""

    def __post_init__(self):
        check_at_least(0, self, "num_classes", "image_size")


@dataclass
class MethodOptions(TeacherOptions, RunOptions):
    """The options of every method: how it runs, its teacher and its student."""

    student: str = ""
    """Network to train: a name of harness/networks.py, a shipped name, or file.py:factory."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs their plain references."""
    graph: bool = True
    """On a GPU: replay a whole step as one CUDA graph."""
    bf16: bool = True
    """On a GPU: bfloat16 activations, and images that a generator has just made. Moments and losses
    stay fp32."""

    def __post_init__(self):
        RunOptions.__post_init__(self)
        TeacherOptions.__post_init__(self)
        if not self.out:
            raise ValueError("--out: expected a folder, got an empty name")


def check_at_least(least, args, *names):
    """Raise ValueError where one of these options is below `least`, NaN, or at least 2^31."""
    for name in names:
        value = getattr(args, name)
        if not least <= value < 2**31:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected at least {least} (and below 2^31), got {value}")


def parse_args(presets, choose_preset=None):
    """Parse the command line over the preset that it asks for, so that --help shows final values.

    Args:
        presets: {name: Args}.
        choose_preset: function of (teacher, dataset), strings, "" where the command line has none;
            it returns the preset's name. None: the first preset. --setting NAME takes precedence.

    Returns:
        The Args. A wrong option ends the program with exit code 2.
    """
    prepare_program()
    for word in sys.argv:
        if not word.isprintable():  # files of a run hold it as UTF-8, on one line
            fail(f"{word!r}: expected printable UTF-8 text; rename what it names")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--setting", "--teacher", "--dataset"):
        parser.add_argument(option, default="")
    known, _ = parser.parse_known_args()
    name = known.setting
    if not name and choose_preset is None:
        name = next(iter(presets))
    elif not name:
        name = choose_preset(known.teacher, known.dataset)
    if name not in presets:
        fail(f"--setting: expected one of {', '.join(presets)}, got {name!r}")
    preset = presets[name]
    args = tyro.cli(type(preset), default=preset)
    RAISED[:] = list_raised(args, preset)
    return args


def list_raised(args, preset):
    """The options that are larger whole numbers than a preset's: what may be too much memory."""
    raised = []
    for name, value in vars(args).items():
        if type(value) is int and value > getattr(preset, name) and name != "seed":
            raised.append("--" + name.replace("_", "-"))
    return raised


# Device, seeds, precision, optimisers
def choose_device(device):
    """The device that --device asks for, "cpu" or "cuda"; refuses cuda where none is visible.

    For the CPU the process keeps the memory that it frees, as keep_freed_memory says.
    """
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensors; other C libraries are left alone.

    It would return large blocks to the system, which then clears their pages anew: a step of
    ResNet-20 with 100 images has some 13,000 page faults, which take a tenth of its time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes that may be free at the heap's end
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)  # smaller blocks come from the heap


def seed_everything(seed):
    """Seed python, numpy and torch. Scripts draw from torch; the others are for foreign code."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def get_foreign_states():
    """The states of python's and numpy's random numbers, which a user's network may draw."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    of_numpy = [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss]
    version, numbers, gauss_next = random.getstate()
    return {"python": [version, torch.tensor(numbers), gauss_next], "numpy": of_numpy}


def set_foreign_states(states):
    """Go on from what get_foreign_states returned."""
    version, numbers, gauss_next = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))
    keys, position, has_gauss, gauss = states["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, gauss))  # noqa: NPY002


@contextlib.contextmanager
def seed_apart(seed, device):
    """Context with random numbers of this seed. Behind it they go on as if none had been drawn."""
    foreign_states = get_foreign_states()
    with fork_rng(device):
        seed_everything(seed)
        yield
    set_foreign_states(foreign_states)


def autocast(device, bf16):
    """Context in which networks run in bfloat16, on a GPU only.

    Autocast caches no converted weights: a CUDA graph would keep them beyond the step.
    """
    enabled = bf16 and device == "cuda"
    return torch.autocast(device, torch.bfloat16, enabled, cache_enabled=False)


def make_optimizer(kind, network, lr):
    """A fused optimiser whose learning rate is a tensor, so that a CUDA graph can read it.

    Args:
        kind: "adam"; "sgd": momentum 0.9, weight decay 5e-4 on all parameters; "sgd-imagenet":
            momentum 0.875, weight decay 1/32768, none on BatchNorm's parameters (NVIDIA's recipe
            of ResNet-50).
        network: its parameters are optimised.
        lr: initial learning rate.

    Raises:
        ValueError: there is no such kind.
    """
    device = next(network.parameters()).device
    rate = torch.tensor(lr, device=device)
    if kind == "sgd":
        return torch.optim.SGD(
            network.parameters(), rate, momentum=0.9, weight_decay=5e-4, fused=True
        )
    if kind == "sgd-imagenet":
        groups = split_by_decay(network, weight_decay=1 / 32768)
        return torch.optim.SGD(groups, rate, momentum=0.875, fused=True)
    if kind == "adam":
        capturable = device.type == "cuda"
        return torch.optim.Adam(network.parameters(), rate, fused=True, capturable=capturable)
    raise ValueError(f"make_optimizer: expected adam, sgd or sgd-imagenet, got {kind!r}")


def decay_by_cosine(step, n_steps):
    """A factor of a learning rate: half a cosine, 1 at step 0 and 0 at n_steps.

    >>> [round(decay_by_cosine(step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return (1 + math.cos(math.pi * step / n_steps)) / 2


def split_by_decay(network, weight_decay):
    """Two groups of parameters: all but BatchNorm's with weight decay, BatchNorm's without."""
    decayed = []
    others = []
    for module in network.modules():
        group = others if isinstance(module, _BatchNorm) else decayed
        group += module.parameters(recurse=False)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def restore_optimizer(optimizer, saved):
    """Load an optimiser's state, not its options. Raise ValueError where it does not fit.

    Wrong sizes must be refused here: fused steps would read beyond a tensor's end.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adam = "betas" in optimizer.defaults
    wanted = {"step", "exp_avg", "exp_avg_sq"} if is_adam else {"momentum_buffer"}
    if not saved["state"]:
        raise ValueError("its optimiser has no state")
    for i, state in saved["state"].items():  # a parameter that is never used has none
        shapes = {key: value.shape for key, value in state.items()}
        step_shape = shapes.get("step", torch.Size())
        others = {shape for key, shape in shapes.items() if key != "step"}
        if set(shapes) != wanted or step_shape or others != {parameters[i].shape}:
            raise ValueError("its optimiser belongs to another network")
    rates = [group["lr"] for group in optimizer.param_groups]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # the tensor that the script fills, not load_state_dict's copy of it


# Several processes
def join_processes(device):
    """Rank of this process and number of processes under torchrun; (0, 1) without it.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL; the process then uses the GPU of its local rank).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    advice = "check its --nproc-per-node and the machines' addresses"
    with fail_in_one_line("torchrun: the processes cannot be joined", advice):
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device == "cuda" else "gloo"
        # processes that do not step together may finish hours apart and wait for each other then
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size()


# The folder
def find_input_files(args):
    """{option: Path} of the files with weights or schedules that options name; no code."""
    found = {}
    for option in ("teacher", "weights", "student", "verifier", "ensemble", "schedules"):
        path = Path(getattr(args, option, "") or "none")
        may_be_a_name = option in ("teacher", "student", "verifier") and not path.suffix
        if path.is_file() and not may_be_a_name:
            found[option] = path
    return found


def hash_file(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_machine(device):
    """What result.json says of machine and code: device, device_name and versions."""
    if device == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        n_threads = torch.get_num_threads()
        device_name = "1 CPU thread" if n_threads == 1 else f"{n_threads} CPU threads"
    commit = ""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # no git on this machine
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    versions = dict(torch=str(torch.__version__), numpy=np.__version__, triton=find_triton())
    versions["commit"] = commit or "unknown"
    return dict(device=device, device_name=device_name, versions=versions)


def find_triton():
    """Triton's version, or None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


class RunFolder:
    """One run's folder: args.json, metrics.jsonl, checkpoint.pt, student.pt, result.json, pictures.

    Whenever the run is killed, the files that are there are whole. The checkpoint before the newest
    is kept too: --resume takes it if the newest is damaged. result.json appears last: its presence
    says that the run is complete. A full disk ends the run in one line. While a run is at work no
    other can use its folder.

    Args:
        args: the script's Args.
        device: "cpu" or "cuda"; the state of its random numbers is part of a checkpoint.
        may_change: options that a continued run may change, besides those that never matter.
        clears: patterns of files that a new run deletes, besides those of every run.
        rank: which of torchrun's processes this is; each but the first has a folder of its own,
            rankN, in --out.
    """

    def __init__(self, args, device, may_change=(), clears=(), rank=0):
        if not args.out:
            fail("--out: expected a folder, got an empty name; pass one")
        self.args = args
        self.device = device
        self.rank = rank
        self.out = Path(args.out) / f"rank{rank}" if rank else Path(args.out)
        self.checkpoints = [self.out / "checkpoint.pt", self.out / "checkpoint-previous.pt"]
        self.may_change = {"resume", "out", "data_dir", "smoke", "graph", *may_change}
        self.rows = []
        self.start = time.time()
        self.inputs = find_input_files(args)
        self.digests = {option: hash_file(path) for option, path in self.inputs.items()}
        prepare_program()
        with fail_in_one_line(f"--out {self.out} cannot be used", "pass another folder"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock_folder(self.out)
            if args.resume and (self.out / "args.json").exists():
                self._continue()
            else:
                self._clear(clears)
                self._claim()

    def _claim(self):
        """From here on the folder is this run's: write its options, delete an earlier result."""
        (self.out / "result.json").unlink(missing_ok=True)
        options = asdict(self.args)
        if self.digests:
            options["sha256"] = self.digests
        with self.write_file("args.json") as file:
            file.write(encode_json(options, indent=1))

    def _clear(self, clears):
        """Delete what an earlier run left; refuse if it was not finished."""
        unfinished = not (self.out / "result.json").exists()
        names = ("metrics.jsonl", "seconds.txt", "samples.png", "curve.png")
        old = [self.out / name for name in (*names, "args.json", "result.json")]
        for pattern in ("checkpoint.pt", "checkpoint-previous.pt", "student.pt", *clears):
            for path in sorted(self.out.glob(pattern)):
                if unfinished:
                    way_out = "pass another --out"
                    if (self.out / "args.json").exists():
                        way_out = "pass --resume to continue it, or another --out"
                    fail(f"--out {self.out} holds an unfinished run ({path.name}); {way_out}")
                old.append(path)
        for option, taken in self.inputs.items():
            if any(path.resolve() == taken.resolve() for path in old):
                held = f"{taken.name}, the file of --{option}, which a new run deletes"
                fail(f"--out {self.out} holds {held}; pass another --out")
        for path in old:
            path.unlink(missing_ok=True)

    def _continue(self):
        """Refuse other options than the first run's; take over its rows and its seconds.

        Nothing is written yet: `keep_rows` comes when the checkpoint has been read.
        """
        for name in ("args.json", "metrics.jsonl", "seconds.txt"):
            check_regular(self.out / name)
        before = json.loads((self.out / "args.json").read_text())
        if not isinstance(before, dict):
            raise ValueError("args.json holds no options")
        now = json.loads(json.dumps(asdict(self.args)))
        changed = [k for k in now if k not in self.may_change and now[k] != before.get(k)]
        if changed:
            names = ", ".join(changed)
            fail(f"--resume: {names} differ from the first run's (args.json); repeat its options")
        for option, digest in before.get("sha256", {}).items():
            if self.digests.get(option) != digest:
                problem = f"the file of --{option} is not the first run's"
                fail(f"--resume: {problem}; put that back, or begin again in another --out")
        self.rows = self._read_rows()
        seconds = self.out / "seconds.txt"
        if seconds.exists():
            taken = float(seconds.read_text())
            if not 0 <= taken < math.inf:
                raise ValueError(f"seconds.txt: expected at least 0, got {taken}")
            self.start -= taken

    def _read_rows(self):
        """The rows of metrics.jsonl. A kill may have cut the last line short: it is dropped."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        lines = path.read_bytes().decode(errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            row = parse_row(line)
            if row is not None:
                rows.append(row)
            elif number < len(lines):
                raise ValueError(f"metrics.jsonl: line {number} is no row of numbers")
        return rows

    def keep_rows(self, rows):
        """Rewrite metrics.jsonl with these rows alone; rows of work that is done again go."""
        self._claim()
        self.rows = list(rows)
        with self.write_file("metrics.jsonl") as file:
            file.write(b"".join(encode_json(row) for row in self.rows))

    @contextlib.contextmanager
    def write_file(self, name):
        """Context with a file to write at `name`, whole or not at all; a full disk ends the run."""
        path = self.out / name
        with refuse_unwritable(path), open_atomically(path) as file:
            yield file

    def log(self, row):
        """Add a row of numbers to metrics.jsonl; return its figures as short strings."""
        row = {name: round(value, 6) for name, value in row.items()}
        self._refuse_not_finite(row, "a row of metrics.jsonl")
        self.rows.append(row)
        path = self.out / "metrics.jsonl"
        with refuse_unwritable(path), open(path, "ab") as file:
            file.write(encode_json(row))
        figures = {}
        for name, value in row.items():
            short_name = name.split("/")[-1]
            if short_name in figures:  # eval/acc behind train/acc
                short_name = name
            figures[short_name] = f"{value:.4g}"
        return figures

    def show(self, bar, row):
        """Log a row and show it: beside the bar on a terminal, as an aligned line elsewhere."""
        figures = self.log(row)
        bar.set_postfix(figures)
        if bar.disable and self.rank == 0:
            line = "  ".join(f"{name} {value:>8}" for name, value in figures.items())
            try:
                print(line, flush=True)
            except OSError as error:  # not one of the training around it
                leave_without_stdout(error)

    def has_checkpoint(self):
        """Whether --resume finds one here."""
        return self.args.resume and any(path.exists() for path in self.checkpoints)

    def column(self, name):
        """All values of one figure, from the rows that have it."""
        return [row[name] for row in self.rows if name in row]

    def save_seconds(self):
        """Save the run's seconds, to which --resume adds its own."""
        with self.write_file("seconds.txt") as file:
            file.write(f"{time.time() - self.start:.1f}\n".encode())

    def save_checkpoint(self, state):
        """Write checkpoint.pt; the one before becomes checkpoint-previous.pt.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them. Nothing that is not
                finite is kept: the last good checkpoints stay.
        """
        self._refuse_not_finite(state, "the run's state")
        saved = dict(state=state, n_rows=len(self.rows), rng=self._random_module().get_rng_state())
        saved["foreign_rng"] = get_foreign_states()
        newest, previous = self.checkpoints
        if newest.exists():
            with refuse_unwritable(previous):
                os.replace(newest, previous)
        with self.write_file(newest.name) as file:
            torch.save(saved, file)
        self.save_seconds()

    def _refuse_not_finite(self, values, where):
        """Fail where nested dicts and lists hold NaN or infinity; say what does, and where."""
        broken = find_not_finite(values)
        if broken:
            fail(f"not finite: {broken} of {where}; {FINITE_ADVICE}")

    def _random_module(self):
        return torch.cuda if self.device == "cuda" else torch

    @contextlib.contextmanager
    def open_checkpoint(self):
        """Context with the state that was saved last, or None. What fails inside is one refusal.

        On leaving, random numbers go on from where they stood, and metrics.jsonl holds the rows
        from before the checkpoint alone.
        """
        path, saved = self._find_checkpoint()
        if saved is None:
            yield None
            self.keep_rows([])
            return
        advice = "run without --resume, in another --out"
        with fail_in_one_line(f"{path}: no checkpoint of this run", advice):
            self._check_saved(saved)
            yield saved["state"]
            self._random_module().set_rng_state(saved["rng"])
            if "foreign_rng" in saved:  # older checkpoints lack it
                set_foreign_states(saved["foreign_rng"])
            self.keep_rows(self.rows[: saved["n_rows"]])
            newest, previous = self.checkpoints
            if path == previous:  # the next one written must not push a damaged one over it
                newest.unlink(missing_ok=True)

    def _check_saved(self, saved):
        """Raise an error if a checkpoint's numbers cannot come from a run in this folder."""
        n_rows = saved["n_rows"]
        if type(n_rows) is not int or n_rows < 0:
            raise ValueError(f"expected a number of rows, got {n_rows!r}")
        if n_rows > len(self.rows):
            raise ValueError("metrics.jsonl has lost rows")
        state = saved["state"]
        if not isinstance(state, dict):
            raise ValueError("its state is no dict")
        broken = find_not_finite(state)
        if broken:
            raise ValueError(f"{broken} is not finite")
        last_row = self.rows[n_rows - 1] if n_rows else {}
        for name in COUNTERS:
            value = state.get(name, 0)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
            if name in state and value != last_row.get(name, value):
                raise ValueError(f"{name} is {value}, in metrics.jsonl {last_row[name]}")

    def _find_checkpoint(self):
        """The newest checkpoint that can be read, and what it holds; (None, None) without any."""
        if not self.has_checkpoint():
            return None, None
        paths = [path for path in self.checkpoints if path.exists()]
        *newer, last = paths
        for path in newer:
            try:
                saved = load_checkpoint(path)
            except Exception as error:  # of any kind, where a file is damaged
                if is_out_of_memory(error):
                    raise
                saved = None
            if isinstance(saved, dict):
                return path, saved
            tqdm.write(f"{path} is damaged: continuing from {last.name}")  # above a bar
        return last, read_checkpoint(last, "begin again in another --out")

    def save_student(self, student, info, method, name="student.pt"):
        """Write student.pt, described as the checkpoints of teacher.py are.

        Args:
            student: the network.
            info: its NetworkInfo; dataset and accuracy are those of the real test images.
            method: a name.
            name: of the file.
        """
        saved = dict(format=1, method=method, seed=self.args.seed)
        for key in ("arch", "dataset", "num_classes", "image_size", "mean", "std", "channels"):
            saved[key] = getattr(info, key)
        saved["accuracy"] = info.accuracy
        saved["state_dict"] = student.state_dict()
        with self.write_file(name) as file:
            torch.save(saved, file)

    def finish(self, result):
        """Write result.json, the last file of a run: `result`, options, seconds, seed, machine."""
        seconds = round(time.time() - self.start, 1)
        result = result | dict(seconds=seconds, seed=self.args.seed, setting=asdict(self.args))
        result |= describe_machine(self.device)
        self._refuse_not_finite(result, "the result")
        with self.write_file("result.json") as file:
            file.write(encode_json(result, indent=1))
        unlock_folder(self.out)
        print(f"wrote result.json into {self.out}; {seconds:.0f} s")
