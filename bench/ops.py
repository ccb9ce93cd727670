"""Ops of kernels/ beside plain PyTorch and torch.compile, one by one.

Before an op is timed it must agree with its float64 reference on that very shape. A row whose op
does not is marked and has no times. Columns: `eager` is the plain reference, `compile`
torch.compile of it, `ours` the op. Minimal bytes: every large
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
from bench.timing import mark_row, measure_peak, name_columns, take_turns, time_together
from harness.errors import shorten_error
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
POINTWISE = (
    ("pointwise_bn_act_moments",),
    {
        "_FORWARD": [
            dict(BLOCK_M=m, BLOCK_C=c, BLOCK_K=k, num_warps=warps, num_stages=stages)
            for m, c, k, warps, stages in (
                (128, 64, 32, 4, 3),
                (128, 64, 64, 8, 2),
                (128, 64, 64, 8, 3),
                (128, 128, 32, 8, 3),
                (64, 64, 32, 4, 3),
                (64, 64, 64, 8, 3),
                (64, 128, 32, 8, 3),
            )
        ],
        "_BACKWARD": [
            dict(BLOCK_M=m, BLOCK_K=k, BLOCK_C=c, num_warps=warps, num_stages=stages)
            for m, k, c, warps, stages in (
                (64, 64, 32, 4, 3),
                (64, 128, 32, 4, 3),
                (64, 128, 64, 8, 2),
                (64, 256, 32, 8, 2),
                (128, 128, 32, 8, 2),
                (128, 64, 32, 8, 3),
            )
        ],
    },
)
DISTANCE = (
    ("moment_distance",),
    {"_META": [dict(BLOCK=b, num_warps=w) for b in (256, 512, 1024) for w in (1, 4, 8)]},
)
QUANTIZED = (
    ("_channels", "fake_quantize"),
    {"_TILES": TILES, "BACKWARD_PROGRAMS": [1024, 2048, 4096, 8192]},
)
CHANNEL_BLOCKS = (
    ("fake_quantize",),
    {"_BLOCK": [1024, 2048, 4096]},
)
SWEEPS = {
    "bn_moment_loss": CHANNELS,
    "bn_act_moments": CHANNELS,
    "pointwise_bn_act_moments": POINTWISE,
    "moment_distance": DISTANCE,
    "total_variation": IMAGES,
    "jittered_view": IMAGES,
    "attention_transfer": ATTENTION,
    "js_divergence": LOGITS,
    "kl_divergence": LOGITS,
    "fake_quantize": QUANTIZED,
    "fake_quantize_channels": CHANNEL_BLOCKS,
}

MODES = ("forward", "both")  # both: forward and backward pass
DISAGREES = "disagrees with its float64 reference"

# Where the slope of an activation jumps.
KINKS = {"none": (), "relu": (0.0,), "relu6": (0.0, 6.0), "silu": (), "hardswish": (-3.0, 3.0)}

# FLOPs an element of bn_act_moments without an activation, and what each activation adds, in the
# forward pass and in both. A sigmoid counts as 4.
PLAIN_FLOPS = (6, 12)
ACTIVATION_FLOPS = {
    "none": (0, 0),
    "relu": (1, 2),
    "relu6": (2, 3),
    "silu": (5, 11),
    "hardswish": (5, 10),
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
    find_kinks: Callable | None = None
    """Called with the dtype of x and the inputs in float64, it returns a mask in the shape of every
    gradient: the elements where either slope is right. None: there are no such elements."""

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


def make_affine(channels, device):
    """Random weight, bias, running mean and running variance of a BatchNorm."""
    weight = torch.randn(channels, device=device)
    bias = torch.randn(channels, device=device)
    mean = torch.randn(channels, device=device)
    var = torch.rand(channels, device=device) + 0.5
    return weight, bias, mean, var


def call_bn_act(op, activation, x, residual, *affine):
    return op(x, *affine, residual=residual, activation=activation)


def find_kinks(activation, dtype, x, residual, *affine):
    """The elements that rounding may put on either side of one of the activation's kinks.

    Args:
        activation: of bn_act_moments.
        dtype: of the activations before they became float64.
        x, residual, affine: the op's inputs in float64.

    Returns:
        A mask of x's shape.
    """
    u, _ = call_bn_act(kernels.bn_act_moments_ref, "none", x, residual, *affine)

    # The same of absolute values is the sum of all terms that u cancels from: fp32 arithmetic
    # rounds u by a few eps of it.
    weight, bias, mean, var = affine
    sizes = (weight.abs(), bias.abs(), -mean.abs(), var)
    residual_size = None if residual is None else residual.abs()
    terms, _ = call_bn_act(kernels.bn_act_moments_ref, "none", x.abs(), residual_size, *sizes)
    rounding = 4 * torch.finfo(torch.float32).eps * terms

    near = torch.zeros_like(u, dtype=torch.bool)
    for kink in KINKS[activation]:
        stored = torch.finfo(dtype).eps / 2 * abs(kink)  # relu6 compares y as it is stored
        near |= (u - kink).abs() <= rounding + stored
    return near


def make_bn_act_case(x, residual, affine, activation, layout="channels_last"):
    """A row of bn_act_moments. The first activation of the ResNets, relu, is not named in it."""
    n = x.numel()
    passes = (2, 5) if residual is None else (3, 8)
    n_additions = 0 if residual is None else 1
    flops = []
    for plain, extra in zip(PLAIN_FLOPS, ACTIVATION_FLOPS[activation], strict=True):
        flops.append((plain + extra + n_additions) * n)

    name = name_shape(x)
    if residual is not None:
        name += " + residual"
    if activation != "relu":
        name += f" {activation}"
    return Case(
        "bn_act_moments",
        name,
        layout,
        (x, residual, *affine),
        tuple(n_passes * x.nbytes for n_passes in passes),
        tuple(flops),
        partial(call_bn_act, kernels.bn_act_moments, activation),
        partial(call_bn_act, kernels.bn_act_moments_ref, activation),
        partial(find_kinks, activation),
    )


def make_batchnorm_cases(device, dtype, smoke):
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
    if smoke:
        layers = [(3, 4, 5, 5)]
    for shape in layers:
        affine = make_affine(shape[1], device)
        _, _, mean, var = affine
        for layout in ("channels_last", "contiguous"):
            x = make_activations(shape, device, dtype, layout)
            name = name_shape(x)
            size = x.nbytes
            n = x.numel()
            yield Case(
                "bn_moment_loss", name, layout, (x, mean, var), (size, 3 * size), (4 * n, 7 * n)
            )
            yield make_bn_act_case(x, None, affine, "relu", layout)
        x = make_activations(shape, device, dtype)
        residual = make_activations(shape, device, dtype)
        yield make_bn_act_case(x, residual, affine, "relu")


# Layers of networks at 224 px that end in an activation other than relu: (C, H, W).
ACTIVATION_LAYERS = (
    ("relu6", (96, 112, 112)),  # MobileNetV2, the first expansion, and two later ones
    ("relu6", (144, 56, 56)),
    ("relu6", (576, 14, 14)),
    ("silu", (96, 112, 112)),  # EfficientNet-B0: expansions of its second, third and last stages
    ("silu", (240, 28, 28)),
    ("silu", (1152, 7, 7)),
    ("hardswish", (240, 28, 28)),  # MobileNetV3-Large: its first expansion with it, and two later
    ("hardswish", (672, 14, 14)),
    ("hardswish", (960, 7, 7)),
)


def make_activation_cases(device, dtype, smoke):
    """bn_act_moments with other activations than relu, on layers of the networks that have them."""
    batch_size = 64 if device == "cuda" else 4
    for activation, shape in ACTIVATION_LAYERS:
        if smoke:
            shape = (4, 5, 5)
        x = make_activations((batch_size, *shape), device, dtype)
        yield make_bn_act_case(x, None, make_affine(shape[0], device), activation)


def call_pointwise(op, x, conv_weight, residual, *affine):
    return op(x, conv_weight, *affine, residual=residual)


def make_pointwise_case(shape, n_inputs, has_residual, device, dtype):
    """A row of pointwise_bn_act_moments.

    x and the convolution's weight are -1, 0 and 1, and residuals are whole numbers, so the
    convolution's output is exact in bfloat16 too. Running means lie half-way between numbers, so
    no element is near the ReLU's kink. In fp32 x gets a little noise: rounding errors of equal
    numbers are equal, and would add up in the moments.
    """
    N, C, H, W = shape

    def make_integers(*size):
        return torch.randint(-1, 2, size, device=device).to(dtype)

    x = make_integers(N, n_inputs, H, W).contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        x += 1e-3 * torch.randn_like(x)
    conv_weight = make_integers(C, n_inputs, 1, 1)
    one = torch.ones(C, device=device)
    running_mean = torch.randint(-8, 8, (C,), device=device) + 0.5
    affine = one, 0 * one, running_mean, one
    residual = None
    passes = (2, 4)  # over the output
    if has_residual:
        residual = make_integers(*shape).contiguous(memory_format=torch.channels_last)
        residual.requires_grad_()
        passes = (3, 7)

    name = f"{name_shape(x)} to {C}"
    if has_residual:
        name += " + residual"
    n = math.prod(shape)
    output = n * x.element_size()
    product = 2 * n * n_inputs
    forward, both = PLAIN_FLOPS
    return Case(
        "pointwise_bn_act_moments",
        name,
        "channels_last",
        (x.requires_grad_(), conv_weight, residual, *affine),
        (x.nbytes + passes[0] * output, 2 * x.nbytes + passes[1] * output),
        (product + forward * n, 2 * product + both * n),
        partial(call_pointwise, kernels.pointwise_bn_act_moments),
        partial(call_pointwise, kernels.pointwise_bn_act_moments_ref),
    )


# 1 x 1 convolutions of ResNet-50 and of EfficientNet-Lite0: inputs, output (C, H, W), and whether a
# residual is added.
POINTWISE_LAYERS = (
    (64, (256, 56, 56), True),
    (256, (64, 56, 56), False),
    (256, (1024, 14, 14), True),
    (2048, (512, 7, 7), False),  # where the product takes longer than the bytes
    (24, (144, 56, 56), False),
    (144, (24, 56, 56), True),
)


def make_pointwise_cases(device, dtype, smoke):
    batch_size = 64 if device == "cuda" else 4
    for n_inputs, shape, has_residual in POINTWISE_LAYERS:
        if smoke:
            shape = (6, 5, 5)
            n_inputs = 4
        yield make_pointwise_case((batch_size, *shape), n_inputs, has_residual, device, dtype)


def call_distance(op, sizes, moments, running_var):
    return op(moments, running_var, sizes)


def make_distance_cases(device, smoke):
    """moment_distance on all layers of a ResNet-20, and on about as many as a ResNet-50 has."""
    resnet20 = (16,) * 7 + (32,) * 6 + (64,) * 6
    resnet50 = (64, 64, 64, 256) * 4 + (512, 128) * 4 + (1024, 256) * 12 + (2048, 512) * 7
    networks = [(resnet20, "ResNet-20"), (resnet50, "about ResNet-50")]
    if smoke:
        networks = [((2, 5), "two layers")]
    for sizes, name in networks:
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


def make_image_cases(device, smoke):
    """total_variation and jittered_view on images of the scripts."""
    shapes = [(100, 3, 32, 32)]
    view_dtype = torch.float32
    if device == "cuda":
        shapes = [(256, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)]
        view_dtype = torch.bfloat16
    if smoke:
        shapes = [(2, 3, 9, 8)]
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


def make_divergence_cases(device, smoke):
    """js_divergence and kl_divergence; in a student's step the teacher's logits are constants."""
    shapes = [(100, 10), (100, 1000)]
    if device == "cuda":
        shapes = [(256, 10), (256, 1000), (256, 21841)]
    of_students = [(128, 10), (128, 1000)]
    if smoke:
        shapes = [(4, 10)]
        of_students = [(4, 10)]
    for shape in shapes:
        p = torch.randn(shape, device=device).mul_(3).requires_grad_()
        q = torch.randn(shape, device=device).mul_(3).requires_grad_()
        size = 2 * p.nbytes
        n = p.numel()
        name = name_shape(p)
        yield Case("js_divergence", name, "contiguous", (p, q), (size, 3 * size), (20 * n, 40 * n))
    for shape in of_students:
        p = torch.randn(shape, device=device).mul_(3)
        q = torch.randn(shape, device=device).mul_(3).requires_grad_()
        size = p.nbytes
        n = p.numel()
        name = name_shape(p)
        yield Case(
            "kl_divergence", name, "contiguous", (p, q), (2 * size, 5 * size), (12 * n, 20 * n)
        )


def make_attention_cases(device, dtype, smoke):
    """attention_transfer on groups of two WRNs and of LeNet-5."""
    groups = [
        ((128, 16, 32, 32), "channels_last"),
        ((128, 32, 32, 32), "channels_last"),
        ((128, 64, 8, 8), "channels_last"),
        ((128, 6, 28, 28), "channels_last"),
        ((128, 16, 32, 32), "contiguous"),
    ]
    if smoke:
        groups = [((3, 4, 5, 5), "channels_last")]
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


def avoid_halves(x, low, high, bits):
    """x with 0 in place of what rounding may put on either side of a half step of the grid."""
    scale, _ = kernels.quantization_grid(low.double(), high.double(), bits)
    position = x.double() / scale
    is_near = (position - position.floor() - 0.5).abs() < 0.01
    return x.masked_fill(is_near, 0)


def call_quantize(op, bits, *tensors):
    return op(*tensors, bits)


def make_quantization_cases(device, dtype, smoke):
    """fake_quantize on activations of ResNet-20 and 18, fake_quantize_channels on their weights."""
    bits = 4
    low = torch.zeros((), device=device)
    high = torch.full((), 2.0, device=device)
    layers = [(100, 16, 32, 32), (100, 64, 8, 8)]
    weights = [(16, 16, 3, 3), (64, 64, 3, 3)]
    if device == "cuda":
        layers = [(256, 16, 32, 32), (256, 64, 8, 8), (128, 64, 56, 56), (128, 512, 7, 7)]
        weights = [(64, 64, 3, 3), (512, 512, 3, 3)]
    if smoke:
        layers = [(3, 4, 5, 5)]
        weights = [(4, 3, 3, 3)]
    for shape in layers:
        x = make_activations(shape, device, dtype).detach()
        x = avoid_halves(x, low, high, bits).requires_grad_()
        size = x.nbytes
        n = x.numel()
        yield Case(
            "fake_quantize",
            f"{name_shape(x)} {bits} bits",
            "channels_last",
            (x, low, high),
            (2 * size, 5 * size),
            (7 * n, 10 * n),
            partial(call_quantize, kernels.fake_quantize, bits),
            partial(call_quantize, kernels.fake_quantize_ref, bits),
        )
    for shape in weights:
        x = make_activations(shape, device, torch.float32).detach()
        rows = x.flatten(1)
        ends = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        quiet = avoid_halves(rows, *ends, bits)
        is_end = (rows == ends[0]) | (rows == ends[1])
        x = torch.where(is_end, rows, quiet).view(shape)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        size = x.nbytes
        n = x.numel()
        yield Case(
            "fake_quantize_channels",
            f"{name_shape(x)} {bits} bits",
            "channels_last",
            (x,),
            (2 * size, 2 * size),
            (9 * n, 9 * n),
            partial(call_quantize, kernels.fake_quantize_channels, bits),
            partial(call_quantize, kernels.fake_quantize_channels_ref, bits),
        )


def make_cases(device, smoke=False):
    """All rows. On a GPU activations are bf16, images and logits fp32. smoke: tiny shapes.

    Groups of ops take turns, so that a run that is stopped has rows of each.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield from take_turns(
        make_activation_cases(device, dtype, smoke),
        make_pointwise_cases(device, dtype, smoke),
        make_batchnorm_cases(device, dtype, smoke),
        make_distance_cases(device, smoke),
        make_image_cases(device, smoke),
        make_divergence_cases(device, smoke),
        make_attention_cases(device, dtype, smoke),
        make_quantization_cases(device, dtype, smoke),
    )


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
    if x is None or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def compute_values(run, inputs, cotangents):
    """Results and gradients of a call."""
    results = call(run, inputs)
    gradients = [g.to(r.dtype) for g, r in zip(cotangents, results, strict=True)]
    found = torch.autograd.grad(results, find_leaves(inputs), gradients)
    return [*(result.detach() for result in results), *found]


def check_agreement(case, cotangents):
    """The gate: values and gradients are as near float64 as plain fp32 is, by the tests' rule.

    Gradients count only away from an activation's kinks. Next to one, rounding decides which slope
    an element gets, and either is right.
    """
    exact_inputs = [to_exact(x) for x in case.inputs]
    exact = compute_values(case.reference, exact_inputs, cotangents)
    eager = compute_values(case.reference, case.inputs, cotangents)
    ours = compute_values(case.function, case.inputs, cotangents)

    near_kink = None
    if case.find_kinks is not None:
        with torch.no_grad():
            near_kink = case.find_kinks(case.inputs[0].dtype, *exact_inputs)

    for place, (one, plain, true) in enumerate(zip(ours, eager, exact, strict=True)):
        error = (one.double() - true).abs()
        plain_error = (plain.double() - true).abs()
        is_gradient = place >= len(cotangents)
        if is_gradient and near_kink is not None:
            error[near_kink & error.isfinite()] = 0.0
            plain_error[near_kink] = 0.0

        rounding = 4 * torch.finfo(one.dtype).eps * true.abs().max()
        if not error.max() <= 2 * plain_error.max() + rounding:  # NaN is an error too
            return False
    return True


def make_calls(case):
    """({mode: function of an op to time}, ""), or ({}, why the case does not pass the gate).

    Cotangents are made beforehand.
    """
    try:
        with torch.no_grad():
            cotangents = [torch.randn_like(result) for result in call(case.function, case.inputs)]
        if not check_agreement(case, cotangents):
            return {}, DISAGREES
    except Exception as error:  # a kernel that does not compile, launch or fit the memory
        return {}, shorten_error(error)

    leaves = find_leaves(case.inputs)

    def run_forward(run):
        with torch.no_grad():
            run(*case.inputs)

    def run_both(run):
        torch.autograd.grad(call(run, case.inputs), leaves, cotangents)

    return dict(zip(MODES, (run_forward, run_both), strict=True)), ""


def list_columns(case, calls, options):
    """{column: what to time}; torch.compile has none where it fails."""
    columns = {"eager": case.reference, "ours": case.function}
    if not options.can_compile:
        return columns

    torch._dynamo.reset()  # each shape is compiled as if it were the only one
    compiled = torch.compile(case.reference)
    try:
        for run in calls.values():
            run(compiled)
    except Exception as error:  # whatever the compiler raises
        print(f"{case.op} {case.shape}: torch.compile fails: {shorten_error(error)}")
        return columns
    columns["compile"] = compiled
    return columns


def bench_ops(options, limits):
    """Time every op; yields a row per op, shape and mode. Rows of wrong ops have a `problem`."""
    device = options.device
    title = f"{'op':18} {'shape':28} {'layout':14} {'mode':8}"
    print(f"\n{title}     eager   compile      ours  ratio %limit  (ms)")
    for case in make_cases(device, options.smoke):
        if options.match not in f"{case.op} {case.shape}":
            continue
        known = dict(op=case.op, shape=case.shape, layout=case.layout, dtype=case.dtype)
        calls, problem = make_calls(case)
        if problem:
            for mode in MODES:
                yield mark_row(problem, **known, mode=mode)
            continue

        columns = list_columns(case, calls, options)
        for mode, n_bytes, flops in zip(MODES, case.n_bytes, case.flops, strict=True):
            functions = {name: partial(calls[mode], run) for name, run in columns.items()}
            times = time_together(functions, device, options.seconds, options.n_least)
            row = known | dict(mode=mode)
            for name in columns:
                row |= name_columns(name, times[name])
            ours = times["ours"].median
            row["minimal_bytes"] = n_bytes
            row["flops"] = flops
            row["gb_per_s"] = n_bytes / ours / 1e6
            row["percent_of_limit"] = limits.compute_percent(ours, n_bytes, flops)
            row["peak_mb"] = measure_peak(functions["ours"], device)
            print_row(row)
            yield row


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
    """Time an op's cases with each candidate of its tuning constants; wrong ones are marked."""
    names, constants = SWEEPS[op]
    modules = [importlib.import_module(f"kernels.{name}") for name in names]
    cases = [case for case in make_cases(device) if case.op == op]
    rows = []
    for name, candidates in constants.items():
        chosen = getattr(modules[0], name)
        for value in [chosen, *(v for v in candidates if v != chosen)]:
            set_constant(modules, name, value)
            mark = "  (as it is)" if value == chosen else ""
            print(f"{name} = {value}{mark}")
            rows += [time_candidate(case, name, value, device, seconds) for case in cases]
        set_constant(modules, name, chosen)
    return rows


def time_candidate(case, constant, value, device, seconds):
    """The row of a case with one candidate of a tuning constant, which is set already."""
    known = dict(op=case.op, shape=case.shape, layout=case.layout, dtype=case.dtype, mode="sweep")
    known |= dict(constant=constant, value=str(value))
    calls, problem = make_calls(case)
    if problem:
        return mark_row(problem, **known)

    functions = {"ours": partial(calls["both"], case.function)}
    times = time_together(functions, device, seconds)["ours"]
    print(f"    {case.shape:34} {case.layout:14} {times.median:9.4f} ms")
    return known | name_columns("ours", times)
