"""Time ops and whole steps: on a GPU, or with --cpu the CPU path.

    python -m bench --cpu --csv results/bench-cpu.csv    # ops and steps of the CPU path
    python -m bench                                      # ops on a GPU
    python -m bench --end-to-end                         # and whole steps
    python -m bench --sweep js_divergence                # candidates of an op's tuning constants

One process, the same tensors for every column; medians with the 20th and 80th percentile; ratios
only within a row. On a CPU one thread runs, and its processor time counts.

What does not agree with its reference is marked in its row and not timed. The exit code is then 2.
"""

import csv
import subprocess
from dataclasses import dataclass
from datetime import date
from typing import Literal

import torch
import triton
import tyro

from bench.ops import bench_ops, sweep
from bench.timing import measure_limits
from harness.run import ROOT, fail


@dataclass
class Args:
    cpu: bool = False
    """Time the CPU path: ops and whole steps."""
    end_to_end: bool = False
    """Time whole steps too."""
    sweep: Literal[
        "",
        "bn_moment_loss",
        "bn_act_moments",
        "moment_distance",
        "total_variation",
        "jittered_view",
        "attention_transfer",
        "js_divergence",
        "kl_divergence",
    ] = ""
    """Time the candidates of this op's tuning constants instead."""
    seconds: float = 1.0
    """Per column of an op's row; tenfold for a step."""
    csv: str = ""
    """Also write the rows to this file."""


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


def write_csv(path, rows, device):
    """Write the rows with what they were measured on."""
    common = dict(
        date=str(date.today()),
        commit=run_command(["git", "describe", "--always", "--dirty"]),
        device=name_device(device),
        torch=torch.__version__,
        triton=f"triton {triton.__version__}",
    )
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        common["driver, power limit"] = run_command(query)
    fields = list(common)
    for row in rows:
        fields += [name for name in row if name not in fields]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow(common | row)
    print(f"wrote {path}")


def main(args):
    if not args.cpu and not torch.cuda.is_available():
        fail("no CUDA device is visible; run python -m bench --cpu")
    if args.cpu and args.sweep:
        fail("--sweep: these constants are the Triton kernels'; the CPU path has none")
    device = "cpu" if args.cpu else "cuda"
    if args.cpu:
        torch.set_num_threads(1)  # processor time is then the time of an idle machine
    print(f"{name_device(device)}, torch {torch.__version__}, triton {triton.__version__}")
    torch.manual_seed(0)  # the gate compares roundings: the same inputs pass it again
    if args.sweep:
        rows = sweep(args.sweep, device, args.seconds)
    else:
        limits = measure_limits(device)
        rows = bench_ops(device, args.seconds, limits)
        if args.cpu or args.end_to_end:
            from bench.steps import bench_steps  # it imports the scripts

            rows += bench_steps(device, args.seconds * 10, limits)
    if args.csv:
        write_csv(args.csv, rows, device)
    n_problems = sum("problem" in row for row in rows)
    if n_problems:
        fail(f"{n_problems} of {len(rows)} rows are wrong and not timed; their lines say why")


if __name__ == "__main__":
    main(tyro.cli(Args))
