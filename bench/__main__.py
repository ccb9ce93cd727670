"""Time ops and whole steps: on a GPU, or with --cpu the CPU path.

    python -m bench --cpu --csv FILE                     # everything, of the CPU path
    python -m bench --csv FILE                           # everything, on a GPU
    python -m bench --cpu --only released --csv FILE     # one part
    python -m bench --cpu --only released --match resnet18 --keep --csv FILE    # some rows of it
    python -m bench --sweep js_divergence                # candidates of an op's tuning constants

Parts: `ops`; `steps`, one step of deepinversion.py piece by piece; `once`, what fuse_batchnorm
costs before the first step; `released`, whole steps of released loops beside ours.

One process, the same tensors for every column; medians with the 20th and 80th percentile; ratios
only within a row. On a CPU one thread runs, and its processor time counts. The CSV is written after
each row.

What does not agree with its reference is marked in its row and not timed. The exit code is then 2.
"""

import csv
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import triton
import tyro

from bench.ops import bench_ops, sweep
from bench.timing import Options, measure_limits
from harness import ROOT
from harness.errors import fail
from harness.run import keep_freed_memory


@dataclass
class Args:
    cpu: bool = False
    """Time the CPU path."""
    only: Literal["", "ops", "steps", "once", "released"] = ""
    """Time one part; empty: all of them."""
    match: str = ""
    """Time only rows whose op or network contains this text."""
    compile: bool = True
    """Have columns of torch.compile."""
    ablations: bool = True
    """Have columns of a step without one of its ops."""
    sweep: Literal[
        "",
        "bn_moment_loss",
        "bn_act_moments",
        "pointwise_bn_act_moments",
        "moment_distance",
        "total_variation",
        "jittered_view",
        "attention_transfer",
        "js_divergence",
        "kl_divergence",
        "fake_quantize",
        "fake_quantize_channels",
    ] = ""
    """Time the candidates of this op's tuning constants instead."""
    seconds: float = 1.0
    """Per column of an op's row; tenfold for a step."""
    rounds: int = 20
    """Least number of rounds on a CPU, in which all columns run once."""
    csv: str = ""
    """Also write the rows to this file."""
    keep: bool = False
    """Keep the rows that the file has, except those that are measured again."""
    smoke: bool = False
    """Tiny shapes, two rounds: everything runs, and no figure means anything."""


def run_command(command):
    """The output of a command, "" where it does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip()


def name_device(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def describe_machine(device):
    """What rows were measured on."""
    known = dict(
        date=str(date.today()),
        commit=run_command(["git", "describe", "--always", "--dirty"]),
        device=name_device(device),
        torch=torch.__version__,
        triton=f"triton {triton.__version__}",
    )
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        known["driver, power limit"] = run_command(query)
    return known


def identify(row):
    """What makes a row the same in another run."""
    names = ("op", "shape", "layout", "mode", "constant", "value")
    return tuple(row.get(name) or "" for name in names)


def read_csv(path):
    """The rows of a file, without their empty cells; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if cell} for row in rows]


def write_csv(path, rows):
    """Write the rows; a column is there if any row has it."""
    fields = []
    for row in rows:
        fields += [name for name in row if name not in fields]
    unfinished = Path(f"{path}.tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def produce_rows(args, options):
    """Measure all parts that are asked for; yields the rows as they are measured."""
    if args.sweep:
        yield from sweep(args.sweep, options.device, args.seconds)
        return

    def wants(part):
        return args.only in ("", part)

    if wants("ops") or wants("steps"):
        limits = measure_limits(options.device, options.smoke)
    if wants("ops"):
        yield from bench_ops(options, limits)

    from bench import released, steps  # they import the scripts

    if wants("steps"):
        yield from steps.bench_steps(options, limits)
    if wants("once"):
        yield from steps.bench_verifications(options)
    if wants("released"):
        yield from released.bench_released(options)


def main(args):
    if not args.cpu and not torch.cuda.is_available():
        fail("no CUDA device is visible; run python -m bench --cpu")
    if args.cpu and args.sweep:
        fail("--sweep: these constants are the Triton kernels'; the CPU path has none")
    device = "cpu" if args.cpu else "cuda"
    if args.cpu:
        torch.set_num_threads(1)  # processor time is then the time of an idle machine
        keep_freed_memory()  # as the scripts do; all columns gain from it
    print(f"{name_device(device)}, torch {torch.__version__}, triton {triton.__version__}")
    torch.manual_seed(0)  # the gate compares roundings: the same inputs pass it again

    options = Options(
        device, args.seconds, args.rounds, args.match, args.compile, args.ablations, args.smoke
    )
    machine = describe_machine(device)
    kept = read_csv(args.csv) if args.keep else []
    rows = []
    for row in produce_rows(args, options):
        rows.append(machine | row)
        if args.csv:
            measured = {identify(row) for row in rows}
            others = [row for row in kept if identify(row) not in measured]
            write_csv(args.csv, [*others, *rows])
    if not rows:
        fail(f"--match {args.match}: no row's name contains it")
    n_problems = sum("problem" in row for row in rows)
    if n_problems:
        fail(f"{n_problems} of {len(rows)} rows are wrong and not timed; their lines say why")


if __name__ == "__main__":
    main(tyro.cli(Args))
