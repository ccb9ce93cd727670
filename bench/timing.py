"""How times are taken, and what the device could do at best.

On a CPU the times are processor time: other programs on the machine stretch the wall clock. With
one thread, both are the same on a machine that does nothing else.
"""

import shutil
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

COPY_BYTES = 256 * 2**20


class Times(NamedTuple):
    """How long calls of one function take, in ms: processor time on a CPU, do_bench's on a GPU."""

    median: float
    p20: float
    """The 20th percentile."""
    p80: float
    wall: float | None = None
    """Median by the wall clock; None on a GPU."""


def name_columns(name, times):
    """Times as columns of a row."""
    columns = {f"{name}_ms": times.median}
    columns |= {f"{name}_p20_ms": times.p20, f"{name}_p80_ms": times.p80}
    if times.wall is not None:
        columns[f"{name}_wall_ms"] = times.wall
    return columns


def mark_row(problem, **row):
    """A row without times, and why it has none."""
    names = [row[name] for name in ("op", "shape", "layout") if name in row]
    print(f"{' '.join(names)}: {problem}; not timed")
    return row | dict(problem=problem)


@dataclass
class Limits:
    """What the device does at best, measured in the same run."""

    bandwidth: float
    """Bytes per second of a large copy, read and written."""
    flops: float
    """FLOP/s of a matrix product."""

    def compute_percent(self, ms, n_bytes, flops):
        """How much of the time taken the device needs at least, in percent."""
        return 100 * self.compute_bound(n_bytes, flops) / ms

    def compute_bound(self, n_bytes, flops):
        """The least time in ms: the longer of moving the bytes and of the arithmetic."""
        return 1e3 * max(n_bytes / self.bandwidth, flops / self.flops)


def can_compile(device):
    """torch.compile needs a C++ compiler on a CPU."""
    return device == "cuda" or shutil.which("g++") is not None


def time_together(functions, device, seconds, n_least=20):
    """Time each function for about `seconds`; on a CPU at least `n_least` times.

    On a CPU the functions take turns, every other round backwards, so that no one always follows
    the same neighbour and a drifting machine slows all alike. On a GPU triton's do_bench times each
    (it clears the cache in between), in both orders; the slower of the two medians counts.

    Returns:
        {name: Times}.
    """
    if device == "cuda":
        return _time_on_gpu(functions, seconds)
    return _time_in_turns(functions, seconds, n_least)


def _time_on_gpu(functions, seconds):
    names = list(functions)
    rounds = []
    for order in (names, names[::-1]):
        times = {}
        for name in order:
            # the default statistic is the mean
            quantiles = triton.testing.do_bench(
                functions[name],
                warmup=25,
                rep=max(100, int(500 * seconds)),
                quantiles=[0.5, 0.2, 0.8],
            )
            times[name] = Times(*quantiles)
        rounds.append(times)
    for name in names:
        first = rounds[0][name].median
        second = rounds[1][name].median
        if abs(first - second) > 0.05 * min(first, second):
            print(f"  {name}: {first:.4f} ms in one order, {second:.4f} in the other")
    return choose_slower(rounds)


def choose_slower(rounds):
    """Of two rounds {name: Times}, for each name those with the larger median."""
    first, second = rounds
    slower = {}
    for name, times in first.items():
        slower[name] = max(times, second[name], key=lambda times: times.median)
    return slower


def _time_in_turns(functions, seconds, n_least):
    names = list(functions)
    processor = {name: [] for name in names}
    wall = {name: [] for name in names}
    for name in names:
        functions[name]()
        functions[name]()
    deadline = time.perf_counter() + seconds * len(names)
    n_rounds = 0
    while time.perf_counter() < deadline or n_rounds < n_least:
        order = names if n_rounds % 2 == 0 else names[::-1]
        for name in order:
            wall_start = time.perf_counter()
            start = time.process_time()
            functions[name]()
            processor[name].append((time.process_time() - start) * 1e3)
            wall[name].append((time.perf_counter() - wall_start) * 1e3)
        n_rounds += 1
    found = {}
    for name in names:
        deciles = statistics.quantiles(processor[name], n=10)
        found[name] = Times(deciles[4], deciles[1], deciles[7], statistics.median(wall[name]))
    return found


def measure_limits(device):
    """Limits of this machine, by a copy of 256 MB and a matrix product."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    columns = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = time_together(columns, device, 1.0)
    bandwidth = 2 * COPY_BYTES / times["copy"].median * 1e3
    flops = 2 * n**3 / times["product"].median * 1e3
    product = f"product of {n} x {n} {dtype} {flops / 1e12:.2f} TFLOP/s"
    print(f"copy {bandwidth / 1e9:.1f} GB/s, {product}")
    return Limits(bandwidth, flops)


def measure_peak(run, device):
    """Most memory in MB that a call takes beyond what was there before it; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
