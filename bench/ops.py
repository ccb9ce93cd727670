"""Ops of kernels/ beside plain PyTorch and torch.compile, one by one.

Before an op is timed it must agree with its float64 reference on that very shape. Columns: `eager`
is the plain reference, `compile` torch.compile of it, `ours` the op. Minimal bytes: every large
input read once and every large output written once, each way, with what the backward pass must read
again. FLOPs are counted per element from the formulas, roughly. `% of limit`: bench/timing.py; for
these ops it is always the bytes that count.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import kernels
from bench.timing import can_compile, measure_peak, time_together
from kernels import _channels

# Candidates of the ops' tuning constants: the modules where they stand, {constant: [value, …]}.
# One changes at a time.
TILES = [((math.inf, tile, warps),) for tile in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)]
CHANNELS = (
    ("_channels", "bn_moments", "bn_act_moments"),
    {
        "_TILES": TILES,
        "_CHANNEL_BLOCK": [16, 32, 64, 128],
        "FORWARD_PROGRAMS": [256, 512, 1024, 2048, 4096],
        "BACKWARD_PROGRAMS": [1024, 2048, 4096, 8192],
    },
)
IMAGES = (
    ("total_variation",),
    {
        "_TILES": [
            dict(forward=512, backward=512),
            dict(forward=1024, backward=512),
            dict(forward=1024, backward=1024),
            dict(forward=4096, backward=2048),
        ],
        "_COLUMNS": [64, 128, 256, 512],
        "_WARPS": [
            ((256, 1), (1024, 2), (math.inf, 4)),
            ((256, 1), (1024, 4), (math.inf, 4)),
            ((256, 1), (1024, 4), (math.inf, 8)),
            ((256, 1), (1024, 8), (math.inf, 8)),
        ],
    },
)
LOGITS = (
    ("_logits",),
    {
        "_SHORT": [256, 512, 1024, 2048],
        "_WARPS": [((1024, a), (math.inf, b)) for a in (2, 4) for b in (4, 8, 16)],
    },
)
ATTENTION = (
    ("attention_transfer",),
    {"_TILES": TILES, "_CHANNEL_BLOCK": [32, 64, 128, 256]},
)
DISTANCE = (
    ("moment_distance",),
    {"_META": [dict(BLOCK=b, num_warps=w) for b in (256, 512, 1024) for w in (1, 4, 8)]},
)
SWEEPS = {
    "bn_moment_loss": CHANNELS,
    "bn_act_moments": CHANNELS,
    "moment_distance": DISTANCE,
    "total_variation": IMAGES,
    "jittered_view": IMAGES,
    "attention_transfer": ATTENTION,
    "js_divergence": LOGITS,
    "kl_divergence": LOGITS,
}


@dataclass
class Case:
    """One row of the table of ops."""

    op: str
    shape: str
    layout: str
    inputs: tuple
    n_bytes: tuple[int, int]
    """Minimal bytes of the forward pass, and of forward and backward together."""
    flops: tuple[int, int]
    function: Callable | None = None
    """The op; None: that of kernels/ named `op`."""
    reference: Callable | None = None

    def __post_init__(self):
        self.function = self.function or getattr(kernels, self.op)
        self.reference = self.reference or getattr(kernels, f"{self.op}_ref")
        self.dtype = str(self.inputs[0].dtype)


def make_activations(shape, device, dtype, layout="channels_last"):
    """Random activations that need a gradient, in a memory layout."""
    memory_format = torch.contiguous_format
    if layout == "channels_last":
        memory_format = torch.channels_last
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=memory_format).requires_grad_()


def name_shape(x):
    return "x".join(str(size) for size in x.shape)


def call_with_residual(op, x, residual, *vectors):
    return op(x, *vectors, residual=residual)


def call_with_activation(op, activation, x, *vectors):
    return op(x, *vectors, activation=activation)


def make_batchnorm_cases(device, dtype):
    """bn_moment_loss and bn_act_moments on layers of ResNet-20 and 34 (CIFAR), 18 and 50 at 224."""
    layers = [(100, 16, 32, 32), (100, 64, 8, 8)]
    if device == "cuda":
        layers = [
            (256, 16, 32, 32),
            (256, 64, 8, 8),
            (256, 64, 32, 32),
            (256, 512, 4, 4),
            (128, 64, 56, 56),
            (64, 64, 112, 112),
            (64, 256, 56, 56),
            (64, 512, 28, 28),
            (64, 1024, 14, 14),
            (64, 2048, 7, 7),
        ]
    for shape in layers:
        channels = shape[1]
        weight = torch.randn(channels, device=device)
        bias = torch.randn(channels, device=device)
        mean = torch.randn(channels, device=device)
        var = torch.rand(channels, device=device) + 0.5
        affine = (weight, bias, mean, var)
        for layout in ("channels_last", "contiguous"):
            x = make_activations(shape, device, dtype, layout)
            name = name_shape(x)
            size = x.nbytes
            n = x.numel()
            yield Case(
                "bn_moment_loss", name, layout, (x, mean, var), (size, 3 * size), (4 * n, 7 * n)
            )
            yield Case(
                "bn_act_moments", name, layout, (x, *affine), (2 * size, 5 * size), (7 * n, 14 * n)
            )
        x = make_activations(shape, device, dtype)
        residual = make_activations(shape, device, dtype)
        yield Case(
            "bn_act_moments",
            f"{name} + residual",
            "channels_last",
            (x, residual, *affine),
            (3 * size, 8 * size),
            (8 * n, 15 * n),
            partial(call_with_residual, kernels.bn_act_moments),
            partial(call_with_residual, kernels.bn_act_moments_ref),
        )


def make_activation_cases(device, dtype):
    """bn_act_moments with the activations of MobileNetV2 and EfficientNet, on one of their layers.

    FLOPs: a sigmoid counts as 4.
    """
    shape = (64, 96, 56, 56) if device == "cuda" else (16, 96, 28, 28)
    channels = shape[1]
    weight = torch.randn(channels, device=device)
    bias = torch.randn(channels, device=device)
    mean = torch.randn(channels, device=device)
    var = torch.rand(channels, device=device) + 0.5
    x = make_activations(shape, device, dtype)
    size = x.nbytes
    n = x.numel()
    for activation, flops in (("relu6", (8 * n, 15 * n)), ("silu", (11 * n, 23 * n))):
        yield Case(
            "bn_act_moments",
            f"{name_shape(x)} {activation}",
            "channels_last",
            (x, weight, bias, mean, var),
            (2 * size, 5 * size),
            flops,
            partial(call_with_activation, kernels.bn_act_moments, activation),
            partial(call_with_activation, kernels.bn_act_moments_ref, activation),
        )


def call_distance(op, sizes, moments, running_var):
    return op(moments, running_var, sizes)


def make_distance_cases(device):
    """moment_distance on all layers of a ResNet-20, and on about as many as a ResNet-50 has."""
    resnet20 = (16,) * 7 + (32,) * 6 + (64,) * 6
    resnet50 = (64, 64, 64, 256) * 4 + (512, 128) * 4 + (1024, 256) * 12 + (2048, 512) * 7
    for sizes, name in ((resnet20, "ResNet-20"), (resnet50, "about ResNet-50")):
        n = sum(sizes)
        moments = torch.randn(2, n, device=device).requires_grad_()
        running_var = torch.rand(n, device=device)
        yield Case(
            "moment_distance",
            f"2x{n} {name}",
            "contiguous",
            (moments, running_var),
            (12 * n, 28 * n),
            (6 * n, 10 * n),
            partial(call_distance, kernels.moment_distance, sizes),
            partial(call_distance, kernels.moment_distance_ref, sizes),
        )


def make_image_cases(device):
    """total_variation and jittered_view on images of the scripts."""
    shapes = [(100, 3, 32, 32)]
    view_dtype = torch.float32
    if device == "cuda":
        shapes = [(256, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)]
        view_dtype = torch.bfloat16
    for shape in shapes:
        x = make_activations(shape, device, torch.float32)
        name = name_shape(x)
        size = x.nbytes
        n = x.numel()
        layout = "channels_last"
        yield Case("total_variation", name, layout, (x,), (size, 3 * size), (16 * n, 48 * n))
        view = size * torch.finfo(view_dtype).bits // 32
        draw = torch.tensor([1, -2, 1], device=device)
        yield Case(
            "jittered_view",
            f"{name} to {str(view_dtype).removeprefix('torch.')}",
            layout,
            (x, draw, view_dtype),
            (size + view, 3 * size + 2 * view),
            (18 * n, 52 * n),
        )


def make_divergence_cases(device):
    """js_divergence and kl_divergence; in a student's step the teacher's logits are constants."""
    shapes = [(100, 10), (100, 1000)]
    if device == "cuda":
        shapes = [(256, 10), (256, 1000), (256, 21841)]
    for shape in shapes:
        p = torch.randn(shape, device=device).mul_(3).requires_grad_()
        q = torch.randn(shape, device=device).mul_(3).requires_grad_()
        size = 2 * p.nbytes
        n = p.numel()
        name = name_shape(p)
        yield Case("js_divergence", name, "contiguous", (p, q), (size, 3 * size), (20 * n, 40 * n))
    for shape in [(128, 10), (128, 1000)]:
        p = torch.randn(shape, device=device).mul_(3)
        q = torch.randn(shape, device=device).mul_(3).requires_grad_()
        size = p.nbytes
        n = p.numel()
        name = name_shape(p)
        yield Case(
            "kl_divergence", name, "contiguous", (p, q), (2 * size, 5 * size), (12 * n, 20 * n)
        )


def make_attention_cases(device, dtype):
    """attention_transfer on groups of two WRNs and of LeNet-5."""
    groups = [
        ((128, 16, 32, 32), "channels_last"),
        ((128, 32, 32, 32), "channels_last"),
        ((128, 64, 8, 8), "channels_last"),
        ((128, 6, 28, 28), "channels_last"),
        ((128, 16, 32, 32), "contiguous"),
    ]
    for shape, layout in groups:
        target = kernels.attention_map_ref(torch.randn(shape, device=device))
        x = make_activations(shape, device, dtype, layout)
        size = x.nbytes
        maps = target.nbytes
        n = x.numel()
        n_bytes = (size + maps, 3 * size + 2 * maps)
        yield Case(
            "attention_transfer", name_shape(x), layout, (x, target), n_bytes, (2 * n, 5 * n)
        )


def make_cases(device):
    """All rows. On a GPU activations are bf16, images and logits fp32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield from make_batchnorm_cases(device, dtype)
    yield from make_activation_cases(device, dtype)
    yield from make_distance_cases(device)
    yield from make_image_cases(device)
    yield from make_divergence_cases(device)
    yield from make_attention_cases(device, dtype)


def find_leaves(inputs):
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def call(run, inputs):
    """What an op returns, as a tuple."""
    results = run(*inputs)
    return results if isinstance(results, tuple) else (results,)


def to_exact(x):
    """An input of the float64 reference."""
    if isinstance(x, torch.dtype):
        return torch.float64
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def compute_values(run, inputs, cotangents):
    """Results and gradients of a call."""
    results = call(run, inputs)
    gradients = [g.to(r.dtype) for g, r in zip(cotangents, results, strict=True)]
    found = torch.autograd.grad(results, find_leaves(inputs), gradients)
    return [*(result.detach() for result in results), *found]


def check_agreement(case, cotangents):
    """The gate: values and gradients are as near float64 as plain fp32 is, by the tests' rule."""
    exact = compute_values(case.reference, [to_exact(x) for x in case.inputs], cotangents)
    eager = compute_values(case.reference, case.inputs, cotangents)
    ours = compute_values(case.function, case.inputs, cotangents)
    for one, plain, true in zip(ours, eager, exact, strict=True):
        rounding = 4 * torch.finfo(one.dtype).eps * true.abs().max()
        allowed = 2 * (plain.double() - true).abs().max() + rounding
        if not (one.double() - true).abs().max() <= allowed:
            return False
    return True


def make_calls(case):
    """{mode: function of an op to time}, and whether the case passes the gate.

    Cotangents are made beforehand.
    """
    with torch.no_grad():
        cotangents = [torch.randn_like(result) for result in call(case.function, case.inputs)]
    leaves = find_leaves(case.inputs)

    def run_forward(run):
        with torch.no_grad():
            run(*case.inputs)

    def run_both(run):
        torch.autograd.grad(call(run, case.inputs), leaves, cotangents)

    return {"forward": run_forward, "both": run_both}, check_agreement(case, cotangents)


def bench_ops(device, seconds, limits):
    """Time every op; returns a row per op, shape and mode."""
    title = f"{'op':18} {'shape':28} {'layout':14} {'mode':8}"
    print(f"\n{title}     eager   compile      ours  ratio %limit  (ms)")
    rows = []
    for case in make_cases(device):
        calls, is_right = make_calls(case)
        if not is_right:
            name = f"{case.op} {case.shape} {case.layout}"
            raise SystemExit(f"{name}: disagrees with its float64 reference; not timed")
        columns = {"eager": case.reference, "ours": case.function}
        if can_compile(device):
            torch._dynamo.reset()  # each shape is compiled as if it were the only one
            columns["compile"] = torch.compile(case.reference)
        for mode, n_bytes, flops in zip(calls, case.n_bytes, case.flops, strict=True):
            functions = {name: partial(calls[mode], run) for name, run in columns.items()}
            ms = time_together(functions, device, seconds)
            row = dict(op=case.op, shape=case.shape, layout=case.layout, mode=mode)
            row["dtype"] = case.dtype
            for name, (p50, p20, p80) in ms.items():
                row[f"{name}_ms"] = p50
                row[f"{name}_p20_ms"] = p20
                row[f"{name}_p80_ms"] = p80
            ours = ms["ours"][0]
            row["minimal_bytes"] = n_bytes
            row["flops"] = flops
            row["gb_per_s"] = n_bytes / ours / 1e6
            row["percent_of_limit"] = limits.compute_percent(ours, n_bytes, flops)
            row["peak_mb"] = measure_peak(functions["ours"], device)
            rows.append(row)
            print_row(row)
    return rows


def print_row(row):
    cells = []
    for name in ("eager", "compile", "ours"):
        ms = row.get(f"{name}_ms")
        cell = f"{'-':>9}"
        if ms is not None:
            cell = f"{ms:9.4f}"
        cells.append(cell)
    cells.append(f"{row['eager_ms'] / row['ours_ms']:6.2f}")
    cells.append(f"{row['percent_of_limit']:6.1f}")
    name = f"{row['op']:18} {row['shape']:28} {row['layout']:14} {row['mode']:8}"
    print(name, " ".join(cells))


def set_constant(modules, name, value):
    for module in modules:
        if hasattr(module, name):
            setattr(module, name, value)
    _channels.plan.cache_clear()


def sweep(op, device, seconds):
    """Time an op's cases with each candidate of its tuning constants; mark wrong results."""
    names, constants = SWEEPS[op]
    modules = [importlib.import_module(f"kernels.{name}") for name in names]
    cases = [case for case in make_cases(device) if case.op == op]
    rows = []
    for name, candidates in constants.items():
        chosen = getattr(modules[0], name)
        for value in [chosen, *(v for v in candidates if v != chosen)]:
            set_constant(modules, name, value)
            for case in cases:
                calls, is_right = make_calls(case)
                functions = {"ours": partial(calls["both"], case.function)}
                p50, p20, p80 = time_together(functions, device, seconds)["ours"]
                row = dict(op=op, shape=case.shape, layout=case.layout, mode="sweep")
                row |= dict(constant=name, value=str(value), right=is_right)
                row |= dict(ours_ms=p50, ours_p20_ms=p20, ours_p80_ms=p80)
                rows.append(row)
                mark = "  (as it is)" if value == chosen else ""
                if not is_right:
                    mark += "  WRONG"
                shape = f"{case.shape:28} {case.layout:14}"
                print(f"{name} = {value!s:44} {shape} {p50:9.4f} ms{mark}")
        set_constant(modules, name, chosen)
    return rows
