"""How times are taken, and what the device could do at best.

On a CPU the times are processor time: other programs on the machine stretch the wall clock. With
one thread, both are the same on a machine that does nothing else.
"""

import math
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import partial
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


@dataclass
class Options:
    """How the tables are measured."""

    device: str
    """cpu or cuda."""
    seconds: float = 1.0
    """Per column of an op's row; tenfold for a step."""
    n_least: int = 20
    """Rounds that a CPU runs at least."""
    match: str = ""
    """Only rows whose name contains this."""
    compile: bool = True
    """Have columns of torch.compile."""
    ablations: bool = True
    """Have columns of a step without one of its ops."""
    smoke: bool = False
    """Tiny shapes, two rounds."""

    def __post_init__(self):
        if self.smoke:
            self.seconds = 0.0
            self.n_least = 2

    @property
    def sizes(self):
        """Key of the tables' lists of shapes."""
        return "smoke" if self.smoke else self.device

    @property
    def can_compile(self):
        """torch.compile needs a C++ compiler on a CPU."""
        return self.compile and (self.device == "cuda" or shutil.which("g++") is not None)

    def choose(self, cases):
        """Those of `cases` whose text contains `match`."""
        return [case for case in cases if self.match in str(case)]


def time_together(functions, device, seconds, n_least=20):
    """Time each function for about `seconds`, and at least `n_least` times.

    On a CPU the functions take turns (run_in_turns). On a GPU time_on_gpu times each, in both
    orders; the slower of the two medians counts.

    Returns:
        {name: Times}.
    """
    if device == "cpu":
        return summarise_turns(run_in_turns(functions, seconds, n_least))
    names = list(functions)
    rounds = []
    for order in (names, names[::-1]):
        rounds.append({name: time_on_gpu(functions[name], seconds, n_least) for name in order})
    return choose_slower(rounds)


def time_on_gpu(function, seconds, n_least):
    """Times of one function in one of two orders, by triton's do_bench.

    do_bench clears the cache in between. It runs for about half of `seconds`, and at least
    `n_least` times.
    """
    estimate = triton.testing.do_bench(function, warmup=1, rep=1)  # ms
    duration = max(20, 500 * seconds, 1.1 * n_least * estimate)  # ms
    # the default statistic is the mean
    quantiles = triton.testing.do_bench(
        function, warmup=10, rep=math.ceil(duration), quantiles=[0.5, 0.2, 0.8]
    )
    return Times(*quantiles)


def choose_slower(rounds):
    """Of two rounds {name: Times}, for each name those with the larger median."""
    first, second = rounds
    slower = {}
    for name, times in first.items():
        other = second[name]
        if abs(times.median - other.median) > 0.05 * min(times.median, other.median):
            print(f"  {name}: {times.median:.4f} ms in one order, {other.median:.4f} in the other")
        slower[name] = max(times, other, key=lambda times: times.median)
    return slower


class Turns(NamedTuple):
    """What functions took that ran in turns on a CPU: {name: [ms, …]}, a number a round."""

    processor: dict
    wall: dict


def run_in_turns(functions, seconds, n_least):
    """Run functions in turns for about `seconds` each, at least `n_least` rounds; Turns.

    Every other round runs backwards, so that no function always follows the same neighbour, and a
    drifting machine slows all alike.
    """
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
    return Turns(processor, wall)


def summarise_turns(turns):
    """{name: Times} of Turns."""
    found = {}
    for name, times in turns.processor.items():
        deciles = statistics.quantiles(times, n=10)
        wall = statistics.median(turns.wall[name])
        found[name] = Times(deciles[4], deciles[1], deciles[7], wall)
    return found


def time_on_the_host(functions, n_rounds):
    """Times by the wall clock of a GPU's functions that keep the host busy; {name: Times}.

    They take turns.
    """

    def wait_for(function):
        function()
        torch.cuda.synchronize()

    waiting = {name: partial(wait_for, function) for name, function in functions.items()}
    turns = run_in_turns(waiting, 0.0, n_rounds)
    return summarise_turns(Turns(turns.wall, turns.wall))


def take_turns(*groups):
    """The first item of each group, then the second of each, and so on; items are made when due.

    >>> list(take_turns("ab", "1", "xyz"))
    ['a', '1', 'x', 'b', 'y', 'z']
    """
    waiting = [iter(group) for group in groups]
    while waiting:
        for group in list(waiting):
            try:
                yield next(group)
            except StopIteration:
                waiting.remove(group)


def compute_ratio(turns, name, other):
    """How many times longer `name` takes than `other`, by the ratios of their turns; Times.

    Each ratio is of two runs side by side in one round. `wall` is the same by the wall clock.
    """

    def divide(times):
        return [a / b for a, b in zip(times[name], times[other], strict=True)]

    deciles = statistics.quantiles(divide(turns.processor), n=10)
    wall = statistics.median(divide(turns.wall))
    return Times(deciles[4], deciles[1], deciles[7], wall)


def measure_limits(device, smoke=False):
    """Limits of this machine, by a copy of 256 MB and a matrix product; smoke: of small ones."""
    n_bytes = COPY_BYTES // 256 if smoke else COPY_BYTES
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 1024
    seconds = 0.0 if smoke else 1.0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    columns = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = time_together(columns, device, seconds)
    bandwidth = 2 * n_bytes / times["copy"].median * 1e3
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
