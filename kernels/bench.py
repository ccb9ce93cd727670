"""Benchmarks: `python -m kernels.bench` on a GPU, `python -m kernels.bench --cpu` for the CPU path.

One process, the same tensors for every column; medians with the 20th and 80th percentile; ratios only within a row.
Before an op is timed it must agree with its float64 reference on that very shape, or no time is printed.

Op rows: `eager` is the plain reference, `compile` torch.compile of it (on a CPU only where a C++ compiler is found),
`ours` the op of this package. Minimal bytes: every large input read once and every large output written once, each
way, with what the backward pass must read again; FLOPs are counted per element from the formulas, roughly. % of limit:
the longer of bytes / bandwidth of `dst.copy_(src)`, 256 MB, and FLOPs / rate of a matrix product, both measured in the
same run, over the time taken; for these ops it is always the bytes.

Rows of whole steps (`--end-to-end`, always with --cpu): kernels/bench_steps.py says what their columns are.

`--sweep OP` times an op with every candidate of its table of tuning constants: see SWEEPS.
"""

import argparse
import csv
import importlib
import math
import shutil
import statistics
import subprocess
import time
from datetime import date
from functools import partial
from types import SimpleNamespace

import torch

import kernels
from kernels import _channels
from kernels._common import triton

TRITON_VERSION = f"triton {getattr(triton, '__version__', 'absent')}"
COPY_BYTES = 256 * 2**20

# Candidates of each op's tuning constants: (modules they stand in, {constant: [value, …]}); one changes at a time.
CHANNELS = (("_channels", "bn_moments", "bn_act_moments"), {
    "_TILES": [((math.inf, tile, warps),) for tile in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)],
    "_CHANNEL_BLOCK": [16, 32, 64, 128],
    "FORWARD_PROGRAMS": [256, 512, 1024, 2048, 4096],
    "BACKWARD_PROGRAMS": [1024, 2048, 4096, 8192],
})  # fmt: skip
IMAGES = (("total_variation",), {
    "_TILES": [dict(forward=a, backward=b) for a, b in ((512, 512), (1024, 512), (1024, 1024), (4096, 2048))],
    "_COLUMNS": [64, 128, 256, 512],
    "_WARPS": [((256, 1), (1024, a), (math.inf, b)) for a, b in ((2, 4), (4, 4), (4, 8), (8, 8))],
})  # fmt: skip
LOGITS = (("_logits",), {
    "_SHORT": [256, 512, 1024, 2048],
    "_WARPS": [((1024, a), (math.inf, b)) for a in (2, 4) for b in (4, 8, 16)],
})  # fmt: skip
ATTENTION = (("attention_transfer",), {"_TILES": CHANNELS[1]["_TILES"], "_CHANNEL_BLOCK": [32, 64, 128, 256]})
DISTANCE = (("moment_distance",), {"_META": [dict(BLOCK=b, num_warps=w) for b in (256, 512, 1024) for w in (1, 4, 8)]})
SWEEPS = dict.fromkeys(("bn_moment_loss", "bn_act_moments"), CHANNELS) | dict(moment_distance=DISTANCE)
SWEEPS |= dict.fromkeys(("total_variation", "jittered_view"), IMAGES) | dict(attention_transfer=ATTENTION)
SWEEPS |= dict.fromkeys(("js_divergence", "kl_divergence"), LOGITS)


def time_together(functions, device, seconds=3.0):
    """Time each function for about `seconds`; returns {name: (p50, p20, p80)} in ms.

    On a CPU the functions take turns, every other round backwards, so that no one always follows the same neighbour
    and a drifting machine slows all alike. On a GPU triton's do_bench times each (it clears the cache in between),
    in both orders; the slower of the two medians counts, and a difference above 5 % is printed.
    """
    if device == "cuda":
        rounds = []
        for names in (list(functions), list(functions)[::-1]):
            options = dict(warmup=25, rep=max(100, int(500 * seconds)), quantiles=[0.5, 0.2, 0.8])
            rounds.append({name: tuple(triton.testing.do_bench(functions[name], **options)) for name in names})
        for name in functions:
            first, second = rounds[0][name][0], rounds[1][name][0]
            if abs(first - second) > 0.05 * min(first, second):
                print(f"  {name}: {first:.4f} ms in one order, {second:.4f} in the other")
        return {name: max(rounds[0][name], rounds[1][name]) for name in functions}
    times = {name: [] for name in functions}
    for run in functions.values():
        run()
        run()
    deadline, n_rounds = time.perf_counter() + seconds * len(functions), 0
    while time.perf_counter() < deadline or n_rounds < 20:
        for name in list(functions)[:: -1 if n_rounds % 2 else 1]:
            start = time.perf_counter()
            functions[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        n_rounds += 1
    return {name: tuple(statistics.quantiles(t, n=10)[i] for i in (4, 1, 7)) for name, t in times.items()}


def measured_limits(device):
    """What the device does at best: bytes per second of a large copy (both ways), FLOP/s of a matrix product."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    columns = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    ms = time_together(columns, device, 1.0)
    limits = SimpleNamespace(bandwidth=2 * COPY_BYTES / ms["copy"][0] * 1e3, flops=2 * n**3 / ms["product"][0] * 1e3)
    print(f"copy {limits.bandwidth / 1e9:.1f} GB/s, product of {n} x {n} {dtype} {limits.flops / 1e12:.2f} TFLOP/s")
    return limits


def percent_of_limit(ms, n_bytes, flops, limits):
    """How much of the time taken the device needs at least."""
    return 100 * max(n_bytes / limits.bandwidth, flops / limits.flops) / (ms / 1e3)


def can_compile(device):
    return device == "cuda" or shutil.which("g++") is not None


def laid_out(shape, device, dtype, layout="channels_last"):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()


def case(op, x, n_bytes, flops, *inputs, layout="channels_last", note="", function=None, reference=None):
    """One row of the table of ops: minimal bytes and FLOPs are (of the forward pass, of both)."""
    function, reference = function or getattr(kernels, op), reference or getattr(kernels, f"{op}_ref")
    shape = "x".join(map(str, x.shape)) + note
    return SimpleNamespace(op=op, shape=shape, dtype=str(x.dtype), layout=layout, function=function, flops=flops,
                           reference=reference, inputs=(x, *inputs), n_bytes=n_bytes)  # fmt: skip


def moment_cases(device, dtype):
    """bn_moment_loss, bn_act_moments and moment_distance on layers of ResNet-20/34 (CIFAR) and ResNet-18/50 at 224."""
    layers = [(100, 16, 32, 32), (100, 64, 8, 8)]
    if device == "cuda":
        layers = [(256, 16, 32, 32), (256, 64, 8, 8), (256, 64, 32, 32), (256, 512, 4, 4), (128, 64, 56, 56)]
        layers += [(64, 64, 112, 112), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]
    for shape in layers:
        for layout in ("channels_last", "contiguous"):
            x = laid_out(shape, device, dtype, layout)
            moments, size, n = [torch.randn(shape[1], device=device) for _ in range(3)], x.nbytes, x.numel()
            var = torch.rand(shape[1], device=device) + 0.5
            yield case("bn_moment_loss", x, (size, 3 * size), (4 * n, 7 * n), moments[0], var, layout=layout)
            yield case("bn_act_moments", x, (2 * size, 5 * size), (7 * n, 14 * n), *moments, var, layout=layout)
        residual, x = laid_out(shape, device, dtype), laid_out(shape, device, dtype)

        def added(op, x, residual, *vectors):
            return op(x, *vectors, residual=residual)

        ops = {k: partial(added, getattr(kernels, name)) for k, name in (
            ("function", "bn_act_moments"), ("reference", "bn_act_moments_ref"))}  # fmt: skip
        counts = (3 * size, 8 * size), (8 * n, 15 * n)
        yield case("bn_act_moments", x, *counts, residual, *moments, var, note=" + residual", **ops)
    for sizes, name in (((16,) * 7 + (32,) * 6 + (64,) * 6, "ResNet-20"), ((64, 64, 64, 256) * 4 + (512, 128) * 4
                        + (1024, 256) * 12 + (2048, 512) * 7, "about ResNet-50")):  # fmt: skip
        C = sum(sizes)
        moments = torch.randn(2, C, device=device).requires_grad_()
        ops = {k: lambda m, v, op=op, sizes=sizes: op(m, v, sizes) for k, op in (
            ("function", kernels.moment_distance), ("reference", kernels.moment_distance_ref))}  # fmt: skip
        counts = (12 * C, 28 * C), (6 * C, 10 * C)
        var = torch.rand(C, device=device)
        yield case("moment_distance", moments, *counts, var, layout="contiguous", note=f" {name}", **ops)


def image_cases(device):
    """total_variation and jittered_view on images of the scripts."""
    for shape in [(100, 3, 32, 32)] if device == "cpu" else [(256, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)]:
        x = laid_out(shape, device, torch.float32)
        size, n, draw = x.nbytes, x.numel(), torch.tensor([1, -2, 1], device=device)
        yield case("total_variation", x, (size, 3 * size), (16 * n, 48 * n))
        half = torch.bfloat16 if device == "cuda" else torch.float32
        view = size * torch.finfo(half).bits // 32
        counts = (size + view, 3 * size + 2 * view), (18 * n, 52 * n)
        yield case("jittered_view", x, *counts, draw, half, note=f" to {half}".replace("torch.", ""))


def divergence_cases(device):
    """js_divergence and kl_divergence; in a student's step the teacher's logits are constants."""
    for shape in [(100, 10), (100, 1000)] if device == "cpu" else [(256, 10), (256, 1000), (256, 21841)]:
        p, q = (torch.randn(shape, device=device).mul_(3).requires_grad_() for _ in range(2))
        size, n = 2 * p.nbytes, p.numel()
        yield case("js_divergence", p, (size, 3 * size), (20 * n, 40 * n), q, layout="contiguous")
    for shape in [(128, 10), (128, 1000)]:
        p, q = (torch.randn(shape, device=device).mul_(3).requires_grad_(needs) for needs in (False, True))
        size, n = p.nbytes, p.numel()
        yield case("kl_divergence", p, (2 * size, 5 * size), (12 * n, 20 * n), q, layout="contiguous")


def attention_cases(device, dtype):
    """attention_transfer on groups of two WRNs and of LeNet-5."""
    groups = [(128, 16, 32, 32), (128, 32, 32, 32), (128, 64, 8, 8), (128, 6, 28, 28)]
    layouts = ["channels_last"] * len(groups) + ["contiguous"]
    for shape, layout in zip([*groups, groups[0]], layouts, strict=True):
        target = kernels.attention_map_ref(torch.randn(shape, device=device))
        x = laid_out(shape, device, dtype, layout)
        size, maps, n = x.nbytes, target.nbytes, x.numel()
        counts = (size + maps, 3 * size + 2 * maps), (2 * n, 5 * n)
        yield case("attention_transfer", x, *counts, target, layout=layout)


def op_cases(device):
    """All rows; on a GPU activations are bf16, images and logits fp32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield from moment_cases(device, dtype)
    yield from image_cases(device)
    yield from divergence_cases(device)
    yield from attention_cases(device, dtype)


def leaves_of(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def results_of(run, inputs):
    """What an op returns, as a tuple."""
    results = run(*inputs)
    return results if isinstance(results, tuple) else (results,)


def agrees(c, cotangents):
    """Gate: values and gradients are as near the float64 reference as the fp32 reference is, by the tests' rule."""

    def values(run, inputs):
        results = results_of(run, inputs)
        gradients = [g.to(r.dtype) for g, r in zip(cotangents, results, strict=True)]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves_of(inputs), gradients)]

    def exact_input(x):
        if isinstance(x, torch.dtype):
            return torch.float64
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    exact = values(c.reference, [exact_input(x) for x in c.inputs])
    for ours, eager, true in zip(values(c.function, c.inputs), values(c.reference, c.inputs), exact, strict=True):
        allowed = 2 * (eager.double() - true).abs().max() + 4 * torch.finfo(ours.dtype).eps * true.abs().max()
        if not (ours.double() - true).abs().max() <= allowed:
            return False
    return True


def checked_calls(c):
    """Whether the case passes the gate, and {mode: function of an op to time}; cotangents are made beforehand."""
    with torch.no_grad():
        cotangents = [torch.randn_like(r) for r in results_of(c.function, c.inputs)]
    leaves = leaves_of(c.inputs)

    def forward(run):
        with torch.no_grad():
            run(*c.inputs)

    def both(run):
        torch.autograd.grad(results_of(run, c.inputs), leaves, cotangents)

    return agrees(c, cotangents), {"forward": forward, "both": both}


def peak_mb(run, device):
    """Most memory that a call takes beyond what was there before it (of a captured step: building included)."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_ops(device, seconds, limits):
    """One row per op, shape and mode."""
    print(f"\n{'op':18} {'shape':28} {'layout':14} {'mode':8}     eager   compile      ours  ratio %limit  (ms)")
    rows = []
    for c in op_cases(device):
        right, calls = checked_calls(c)
        if not right:
            raise SystemExit(f"{c.op} {c.shape} {c.layout}: disagrees with its float64 reference; not timed")
        columns = {"eager": c.reference, "ours": c.function}
        if can_compile(device):
            torch._dynamo.reset()  # each shape is compiled for itself, as a user's only one would be
            columns["compile"] = torch.compile(c.reference)
        for mode, moved, flops in zip(calls, c.n_bytes, c.flops, strict=True):
            ms = time_together({k: partial(calls[mode], run) for k, run in columns.items()}, device, seconds)
            row = dict(op=c.op, shape=c.shape, layout=c.layout, mode=mode, dtype=c.dtype)
            for column, (p50, p20, p80) in ms.items():
                row |= {f"{column}_ms": p50, f"{column}_p20_ms": p20, f"{column}_p80_ms": p80}
            ours, percent = ms["ours"][0], percent_of_limit(ms["ours"][0], moved, flops, limits)
            row |= dict(minimal_bytes=moved, flops=flops, gb_per_s=moved / ours / 1e6, percent_of_limit=percent)
            rows.append(row | dict(peak_mb=peak_mb(partial(calls[mode], c.function), device)))
            cells = [f"{ms[k][0]:9.4f}" if k in ms else f"{'-':>9}" for k in ("eager", "compile", "ours")]
            cells += [f"{ms['eager'][0] / ours:6.2f}", f"{percent:6.1f}"]
            print(f"{c.op:18} {c.shape:28} {c.layout:14} {mode:8} {' '.join(cells)}")
    return rows


def sweep(op, device, seconds):
    """Time an op's cases with each candidate of its tuning constants; one that gives wrong results is marked so."""
    modules, constants = SWEEPS[op]
    modules = [importlib.import_module(f"kernels.{name}") for name in modules]
    rows, cases = [], [c for c in op_cases(device) if c.op == op]

    def set_constant(name, value):
        for module in modules:
            if hasattr(module, name):
                setattr(module, name, value)
        _channels.plan.cache_clear()

    for name, candidates in constants.items():
        chosen = getattr(modules[0], name)
        for value in [chosen, *(v for v in candidates if v != chosen)]:
            set_constant(name, value)
            for c in cases:
                right, calls = checked_calls(c)
                ms = time_together({"ours": partial(calls["both"], c.function)}, device, seconds)["ours"]
                row = dict(op=op, shape=c.shape, layout=c.layout, mode="sweep", constant=name, value=str(value))
                rows.append(row | dict(ours_ms=ms[0], ours_p20_ms=ms[1], ours_p80_ms=ms[2], right=right))
                mark = ("  (as it stands)" if value == chosen else "") + ("" if right else "  WRONG")
                print(f"{name} = {value!s:44} {c.shape:28} {c.layout:14} {ms[0]:9.4f} ms{mark}")
        set_constant(name, chosen)
    return rows


def write_csv(path, rows, device):
    """Rows with what they were measured on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    common = dict(date=str(date.today()), commit=commit, device=name, torch=torch.__version__, triton=TRITON_VERSION)
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        common["driver, power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    fields = list(dict.fromkeys(k for row in rows for k in (*common, *row)))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="time the CPU path: ops and whole steps")
    parser.add_argument("--end-to-end", action="store_true", help="time whole steps too")
    parser.add_argument("--sweep", choices=SWEEPS, help="time the candidates of an op's tuning constants instead")
    parser.add_argument("--seconds", type=float, default=1.0, help="per column of an op row; tenfold for a step")
    parser.add_argument("--csv", default="", help="also write the rows to this file")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; run python -m kernels.bench --cpu")
    if args.cpu and args.sweep:
        raise SystemExit("--sweep: these constants are the Triton kernels'; the CPU path has none")
    device = "cpu" if args.cpu else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {TRITON_VERSION}")
    torch.manual_seed(0)  # the gate compares roundings: the same inputs pass it again
    if args.sweep:
        rows = sweep(args.sweep, device, args.seconds)
    else:
        limits = measured_limits(device)
        rows = bench_ops(device, args.seconds, limits)
        if args.cpu or args.end_to_end:
            from kernels.bench_steps import bench_steps  # it imports the scripts

            rows += bench_steps(device, args.seconds * 10, limits)
    if args.csv:
        write_csv(args.csv, rows, device)


if __name__ == "__main__":
    main()
