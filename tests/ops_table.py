"""What test_every_op.py has to know of each op: how to call it, the cases, what it refuses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from helpers import extreme_images, lay_out, random_logits, random_tensor

from kernels import attention_map_ref, quantization_grid

FLOAT = torch.float32
HALF = torch.float16
BFLOAT = torch.bfloat16
DENSE = "contiguous"
LAST = "channels_last"


@dataclass(frozen=True)
class Op:
    """One row of the table. A case is a dict of keyword arguments for `make`."""

    name: str
    """The op is kernels.<name>; its definition in plain PyTorch is kernels.<name>_ref."""
    file: str
    """Its file kernels/<file>.py, its own tests test_<file>.py, its mutants wrong/<file>.py."""
    make: Callable
    """make(device, **case) gives the arguments of one call, as a dict by name."""
    differentiable: tuple[str, ...]
    """The arguments that get a gradient."""
    results: tuple[str, ...]
    """What the op returns, by name."""
    small: dict
    """The case for the checks that need only one: a few dozen numbers."""
    cases: dict[str, dict]
    """The cases on which values and gradients are compared with the definition."""
    gradcheck: dict[str, dict]
    """The cases for torch.autograd.gradcheck of the definition, in float64."""
    refused: dict[str, tuple] = field(default_factory=dict)
    """(changed arguments, error, regular expression for its message); `OP` in it is the name."""
    like_x: tuple[str, ...] = ()
    """The results that have the dtype of the argument x; all others are float32."""
    keeps_layout: bool = True
    """Whether a gradient has the strides of its argument, as torch.empty_like makes them."""


# Divergences of two batches of logits


def make_logits(device, shape, temperature=1.0, layouts=(DENSE, DENSE), dtypes=(FLOAT, FLOAT)):
    p_logits, q_logits = random_logits(shape, device)
    return {
        "p_logits": lay_out(p_logits.to(dtypes[0]), layouts[0]),
        "q_logits": lay_out(q_logits.to(dtypes[1]), layouts[1]),
        "temperature": temperature,
    }


LOGITS = torch.ones(2, 3)

DIVERGENCE = {
    "make": make_logits,
    "differentiable": ("p_logits", "q_logits"),
    "results": ("value",),
    "small": {"shape": (5, 12), "temperature": 2.0},
    "cases": {
        "smallest": {"shape": (1, 1)},
        "odd": {"shape": (3, 5), "temperature": 0.5},
        "rows-of-a-program+1": {"shape": (33, 16), "temperature": 0.5},
        "cifar": {"shape": (70, 10), "temperature": 3.0},
        "imagenet": {"shape": (3, 1000), "temperature": 3.0},
        "backward-block": {"shape": (2, 512)},
        "backward-block+1": {"shape": (2, 513)},
        "block-1": {"shape": (2, 4095)},
        "block": {"shape": (2, 4096), "temperature": 20.0},
        "block+1": {"shape": (2, 4097)},
        "imagenet-21k": {"shape": (2, 21841)},
        "transposed-sliced": {"shape": (5, 12), "layouts": ("transposed", "sliced")},
        "sliced-expanded": {"shape": (5, 12), "layouts": ("sliced", "expanded")},
        "expanded-offset": {"shape": (5, 12), "layouts": ("expanded", "offset")},
        "offset-transposed": {"shape": (5, 12), "layouts": ("offset", "transposed")},
        "fp16": {"shape": (9, 33), "temperature": 2.0, "dtypes": (HALF, HALF)},
        "bf16": {"shape": (9, 33), "temperature": 2.0, "dtypes": (BFLOAT, BFLOAT)},
        "fp32-bf16": {"shape": (9, 33), "temperature": 2.0, "dtypes": (FLOAT, BFLOAT)},
    },
    "gradcheck": {
        "contiguous": {"shape": (3, 5)},
        "transposed": {"shape": (3, 5), "temperature": 3.0, "layouts": ("transposed", DENSE)},
    },
    "refused": {
        "q-list": ({"q_logits": [1.0]}, TypeError, "OP: expected q_logits to be a tensor, got"),
        "q-float64": ({"q_logits": LOGITS.double()}, TypeError, "got torch.float64; .* use OP_ref"),
        "unequal": ({"q_logits": LOGITS.T}, ValueError, r", \(3, 2\)\); reshape"),
        "1-D": ({"p_logits": LOGITS[0]}, ValueError, r"one shape \(N, K\), got \(\(3,\)"),
        "devices": ({"q_logits": LOGITS.to("meta")}, ValueError, "one device, got .*'meta'"),
        "T-infinite": ({"temperature": math.inf}, ValueError, "finite temperature > 0, got inf"),
        "T-zero": ({"temperature": 0}, ValueError, "finite temperature > 0, got 0"),
        "T-nan": ({"temperature": math.nan}, ValueError, "finite temperature > 0, got nan"),
        "T-tensor": ({"temperature": LOGITS}, TypeError, "python number, got Tensor; pass a float"),
    },
    "keeps_layout": False,
}

JS_DIVERGENCE = Op(name="js_divergence", file="js_divergence", **DIVERGENCE)
KL_DIVERGENCE = Op(name="kl_divergence", file="kl_divergence", **DIVERGENCE)


# Image priors


def make_images(device, shape, layout=DENSE, dtype=FLOAT, extreme=None):
    x = random_tensor(shape, device)
    if extreme is not None:
        x = extreme_images(x, extreme)
    return {"x": lay_out(x.to(dtype), layout)}


IMAGES = torch.ones(2, 3, 4, 4)

TOTAL_VARIATION = Op(
    name="total_variation",
    file="total_variation",
    make=make_images,
    differentiable=("x",),
    results=("l1", "l2"),
    small={"shape": (2, 3, 5, 6), "layout": LAST},
    cases={
        "smallest": {"shape": (1, 1, 2, 2)},
        "odd": {"shape": (2, 3, 5, 7)},
        "power-of-two": {"shape": (2, 2, 8, 8)},
        "two-rows": {"shape": (1, 3, 2, 9)},
        "two-columns": {"shape": (3, 1, 9, 2)},
        "block-1": {"shape": (1, 2, 9, 255)},
        "block": {"shape": (1, 1, 8, 256)},
        "block+1": {"shape": (1, 1, 5, 257)},
        "cifar": {"shape": (2, 3, 32, 32)},
        "channels_last": {"shape": (2, 2, 6, 5), "layout": LAST},
        "sliced": {"shape": (2, 2, 6, 5), "layout": "sliced"},
        "sliced-channels_last": {"shape": (2, 2, 6, 5), "layout": "sliced-channels_last"},
        "offset": {"shape": (2, 2, 6, 5), "layout": "offset"},
        "expanded": {"shape": (2, 2, 6, 5), "layout": "expanded"},
        "transposed": {"shape": (2, 2, 6, 5), "layout": "transposed"},
        "fp16": {"shape": (2, 2, 7, 9), "dtype": HALF},
        "bf16": {"shape": (2, 2, 7, 9), "dtype": BFLOAT},
        "bf16-channels_last": {"shape": (2, 2, 7, 9), "dtype": BFLOAT, "layout": LAST},
        "large": {"shape": (2, 2, 6, 5), "extreme": "large"},
        "tiny-contrast": {"shape": (2, 2, 6, 5), "extreme": "tiny-contrast"},
        "one-pixel": {"shape": (2, 2, 6, 5), "extreme": "one-pixel"},
        "half-constant": {"shape": (2, 2, 6, 5), "extreme": "half-constant"},
    },
    gradcheck={  # random numbers: no difference lies near the kink of |d|
        "contiguous": {"shape": (2, 3, 3, 4)},
        "channels_last": {"shape": (2, 3, 3, 4), "layout": LAST},
    },
    refused={
        "3-D": ({"x": IMAGES[0]}, ValueError, r"\(N, C, H, W\), got \(3, 4, 4\); use x\[None\]"),
        "one-row": ({"x": IMAGES[:, :, :1]}, ValueError, r"at least 2, got shape \(2, 3, 1, 4\)"),
        "one-column": ({"x": IMAGES[..., :1]}, ValueError, r"at least 2, got shape \(2, 3, 4, 1\)"),
    },
)


def make_jittered(device, shape, draw=(1, -2, 1), view_dtype=None, **images):
    args = make_images(device, shape, **images)
    return {**args, "draw": torch.tensor(draw, device=device), "dtype": view_dtype}


DRAW = torch.tensor([0, 0, 0])

JITTERED_VIEW = Op(
    name="jittered_view",
    file="jittered_view",
    make=make_jittered,
    differentiable=("x",),
    results=("view", "tv_l1", "tv_l2", "l2"),
    like_x=("view",),
    small={"shape": (2, 3, 5, 6), "layout": LAST},
    cases={
        "smallest": {"shape": (1, 1, 2, 2)},
        "odd": {"shape": (2, 3, 5, 7)},
        "two-rows": {"shape": (1, 3, 2, 9)},
        "two-columns": {"shape": (3, 1, 9, 2)},
        "block-1": {"shape": (1, 2, 9, 255)},
        "block+1": {"shape": (1, 1, 5, 257)},
        "cifar": {"shape": (2, 3, 32, 32)},
        "as-is": {"shape": (1, 3, 6, 5), "draw": (0, 0, 0)},
        "mirrored": {"shape": (1, 3, 6, 5), "draw": (0, 0, 1), "layout": LAST},
        "rolled": {"shape": (1, 3, 6, 5), "draw": (1, -2, 0)},
        "rolled-channels_last": {"shape": (1, 3, 6, 5), "draw": (-1, 3, 0), "layout": LAST},
        "beyond-the-size": {"shape": (1, 3, 6, 5), "draw": (17, -23, 1)},
        "channels_last": {"shape": (2, 2, 6, 5), "layout": LAST},
        "sliced": {"shape": (2, 2, 6, 5), "layout": "sliced"},
        "sliced-channels_last": {"shape": (2, 2, 6, 5), "layout": "sliced-channels_last"},
        "offset": {"shape": (2, 2, 6, 5), "layout": "offset"},
        "expanded": {"shape": (2, 2, 6, 5), "layout": "expanded"},
        "transposed": {"shape": (2, 2, 6, 5), "layout": "transposed"},
        "fp16": {"shape": (2, 2, 7, 9), "dtype": HALF},
        "bf16-channels_last": {"shape": (2, 2, 7, 9), "dtype": BFLOAT, "layout": LAST},
        "fp32-to-bf16": {"shape": (2, 2, 7, 9), "view_dtype": BFLOAT, "layout": LAST},
        "fp32-to-fp16": {"shape": (2, 2, 7, 9), "view_dtype": HALF},
        "fp16-to-fp32": {"shape": (2, 2, 7, 9), "dtype": HALF, "view_dtype": FLOAT},
        "large": {"shape": (2, 2, 6, 5), "extreme": "large"},
        "tiny-contrast": {"shape": (2, 2, 6, 5), "extreme": "tiny-contrast"},
        "one-black-image": {"shape": (2, 2, 6, 5), "extreme": "one-black-image"},
        "half-constant": {"shape": (2, 2, 6, 5), "extreme": "half-constant"},
    },
    gradcheck={
        "contiguous": {"shape": (2, 3, 3, 4)},
        "channels_last": {"shape": (2, 3, 3, 4), "layout": LAST},
    },
    refused={
        "3-D": ({"x": IMAGES[0]}, ValueError, r"x\[None\] for one"),
        "one-column": ({"x": IMAGES[..., :1]}, ValueError, "H and W at least 2"),
        "draw-tuple": ({"draw": (0, 0, 0)}, TypeError, "an int64 tensor, got tuple"),
        "draw-of-floats": ({"draw": DRAW.float()}, TypeError, "got torch.float32"),
        "draw-of-two": ({"draw": DRAW[:2]}, ValueError, r"got \(2,\) on cpu"),
        "draw-elsewhere": ({"draw": DRAW.to("meta")}, ValueError, "on meta; move"),
        "view-float64": ({"dtype": torch.float64}, TypeError, "got torch.float64; choose"),
    },
)


# Attention maps


def make_activation(device, shape, layout=DENSE, dtype=FLOAT, eps=1e-12, scale=1.5):
    """Random numbers with a mean, as after a ReLU."""
    x = scale * (random_tensor(shape, device) + 0.5)
    return {"x": lay_out(x.to(dtype), layout), "eps": eps}


def make_student(device, shape, target_layout=DENSE, target_dtype=FLOAT, **student):
    """A student's activation and the map of a teacher with 3 channels, of another scale."""
    N, _, H, W = shape
    args = make_activation(device, shape, **student)
    teacher = 7 * (random_tensor((N, 3, H, W), device, seed=1) + 0.5)
    target = attention_map_ref(teacher).to(target_dtype)
    return {"x": args["x"], "target": lay_out(target, target_layout), "eps": args["eps"]}


ACTIVATION = torch.ones(2, 3, 4, 5)
TARGET = torch.ones(2, 20)

ATTENTION_CASES = {
    "one-value": {"shape": (1, 1, 1, 1)},
    "one-position": {"shape": (5, 3, 1, 1)},
    "one-row-fp16": {"shape": (2, 3, 1, 7), "dtype": HALF},
    "one-column-channels_last": {"shape": (2, 3, 7, 1), "layout": LAST},
    "one-channel": {"shape": (3, 1, 4, 5)},
    "odd": {"shape": (2, 3, 5, 7)},
    "odd-channels_last": {"shape": (2, 3, 5, 7), "layout": LAST},
    "few-channels_last-fp16": {"shape": (2, 20, 5, 7), "layout": LAST, "dtype": HALF},
    "power-of-two-channels_last-bf16": {"shape": (4, 16, 4, 4), "layout": LAST, "dtype": BFLOAT},
    "position-block-1": {"shape": (2, 3, 15, 17)},
    "position-block+1-bf16": {"shape": (1, 9, 1, 257), "dtype": BFLOAT},
    "blocks-of-channels": {"shape": (1, 17, 16, 16)},
    "channel-block+1": {"shape": (2, 129, 3, 3), "layout": LAST},
    "channel-blocks+8-bf16": {"shape": (2, 264, 3, 2), "layout": LAST, "dtype": BFLOAT},
    "sample-block+1": {"shape": (2, 2, 17, 241)},
    "sliced": {"shape": (4, 3, 4, 5), "layout": "sliced"},
    "sliced-bf16": {"shape": (4, 3, 4, 5), "layout": "sliced", "dtype": BFLOAT},
    "sliced-channels_last": {"shape": (2, 5, 4, 3), "layout": "sliced-channels_last"},
    "offset-fp16": {"shape": (3, 4, 5, 3), "layout": "offset", "dtype": HALF},
    "expanded": {"shape": (4, 3, 4, 5), "layout": "expanded"},
    "transposed": {"shape": (2, 3, 5, 4), "layout": "transposed"},
    "wrn-group1": {"shape": (3, 16, 32, 32), "layout": LAST},
    "wrn-group2-contiguous": {"shape": (3, 32, 16, 16)},
    "wrn-group3-bf16": {"shape": (3, 64, 8, 8), "layout": LAST, "dtype": BFLOAT},
    "lenet-group1": {"shape": (3, 6, 28, 28), "layout": LAST},
    "huge": {"shape": (4, 5, 4, 3), "scale": 1e8},
    "small": {"shape": (4, 5, 4, 3), "scale": 1e-4},
    "below-eps": {"shape": (4, 5, 4, 3), "scale": 1e-7},
    "squares-vanish": {"shape": (4, 5, 4, 3), "scale": 1e-25},
    "some-below-eps": {"shape": (4, 5, 4, 3), "eps": 11.0},
}

# attention_map goes through the same kernels as attention_transfer, so that a few cases suffice.
MAP_CASES = [
    "one-value",
    "one-column-channels_last",
    "odd",
    "few-channels_last-fp16",
    "blocks-of-channels",
    "sliced-bf16",
    "expanded",
    "transposed",
    "wrn-group3-bf16",
    "huge",
    "below-eps",
    "squares-vanish",
    "some-below-eps",
]

EPS_REFUSED = {
    "3-D": (
        {"x": ACTIVATION[0]},
        ValueError,
        r"OP: .*\(N, C, H, W\), got \(3, 4, 5\); use x\[None\]",
    ),
    "eps-tensor": ({"eps": TARGET}, TypeError, "eps to be a python number, got Tensor"),
    "eps-bool": ({"eps": True}, TypeError, "python number, got bool; pass a float"),
    "eps-zero": ({"eps": 0}, ValueError, "finite eps > 0 .*, got 0; 1e-12"),
    "eps-negative": ({"eps": -1.0}, ValueError, "finite eps > 0 .*, got -1.0"),
    "eps-tiny": ({"eps": 1e-50}, ValueError, "that fp32 can hold, got 1e-50"),
    "eps-nan": ({"eps": math.nan}, ValueError, "finite eps > 0 .*, got nan"),
}

ATTENTION_MAP = Op(
    name="attention_map",
    file="attention_transfer",
    make=make_activation,
    differentiable=("x",),
    results=("map",),
    small={"shape": (3, 6, 4, 2)},
    cases={name: ATTENTION_CASES[name] for name in MAP_CASES},
    gradcheck={
        "contiguous": {"shape": (2, 3, 4, 2)},
        "channels_last": {"shape": (2, 3, 4, 2), "layout": LAST},
        "below-eps": {"shape": (2, 3, 4, 2), "eps": 1e3},  # not normalised
    },
    refused=EPS_REFUSED,
)

ATTENTION_TRANSFER = Op(
    name="attention_transfer",
    file="attention_transfer",
    make=make_student,
    differentiable=("x",),
    results=("loss",),
    small={"shape": (3, 6, 4, 2)},
    cases={
        **ATTENTION_CASES,
        "target-transposed": {"shape": (4, 5, 3, 6), "target_layout": "transposed"},
        "target-sliced": {"shape": (4, 5, 3, 6), "target_layout": "sliced"},
        "target-expanded": {"shape": (4, 5, 3, 6), "target_layout": "expanded"},
        "target-fp16": {"shape": (4, 5, 3, 6), "target_dtype": HALF},
    },
    gradcheck={
        "contiguous": {"shape": (2, 3, 4, 2)},
        "channels_last": {"shape": (2, 3, 4, 2), "layout": LAST},
    },
    refused={
        **EPS_REFUSED,
        "target-list": ({"target": [1.0]}, TypeError, "target to be a tensor, got list"),
        "target-float64": ({"target": TARGET.double()}, TypeError, "expected target in"),
        "target-4-D": ({"target": TARGET.view(2, 4, 5)}, ValueError, r"shape \(3, 8\) .*pool"),
        "target-batch": ({"target": TARGET[:1]}, ValueError, r"\(3, 8\) .*got \(1, 20\)"),
        "target-elsewhere": ({"target": TARGET.to("meta")}, ValueError, "expected one device"),
        "target-with-gradient": (
            {"target": torch.ones(3, 8, requires_grad=True)},
            ValueError,
            "constant target, .*detach",
        ),
    },
)


# Fake quantization


def avoid_halves(x, low, high, bits):
    """The values x with 0 in place of those that rounding may put on either side of a half step."""
    scale, zero = quantization_grid(low.double(), high.double(), bits)
    position = x.double() / scale
    is_near = (position - position.floor() - 0.5).abs() < 0.01
    return x.masked_fill(is_near, 0)


def make_quantized(
    device, shape, bits=4, ends=(-1.0, 2.0), gain=1.5, end_dtype=FLOAT, layout=DENSE, dtype=FLOAT
):
    """Random numbers, many of which lie outside the range."""
    low, high = torch.tensor(ends, dtype=end_dtype, device=device)
    x = (gain * random_tensor(shape, device)).to(dtype)
    x = avoid_halves(x, low.clamp_max(0), high.clamp_min(0), bits)
    return {"x": lay_out(x, layout), "low": low, "high": high, "bits": bits}


def make_weight(device, shape, bits=4, shift=0.0, gain=1.0, layout=DENSE, dtype=FLOAT):
    """Random numbers, of which each channel keeps the least and the greatest."""
    x = (gain * (random_tensor(shape, device) + shift)).to(dtype)
    rows = x.flatten(1)
    ends = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    quiet = avoid_halves(rows, ends[0], ends[1], bits)
    is_end = (rows == ends[0]) | (rows == ends[1])
    x = torch.where(is_end, rows, quiet).view(shape)
    return {"x": lay_out(x, layout), "bits": bits}


VALUE = torch.tensor(1.0)

BITS_REFUSED = {
    "bits-0": ({"bits": 0}, ValueError, "OP: expected bits from 1 to 16, got 0; 8 is usual"),
    "bits-17": ({"bits": 17}, ValueError, "bits from 1 to 16, got 17"),
    "bits-float": ({"bits": 4.0}, TypeError, "a python integer, got float; pass an int"),
    "bits-bool": ({"bits": True}, TypeError, "a python integer, got bool"),
    "6-D": ({"x": torch.ones(1, 1, 1, 1, 1, 1)}, ValueError, "got .*; reshape it"),
}

QUANTIZED_CASES = {
    "one-bit": {"shape": (3, 5), "bits": 1},
    "eight-bits": {"shape": (4, 5, 3, 3), "bits": 8},
    "sixteen-bits": {"shape": (4, 5, 3, 3), "bits": 16},
    "odd": {"shape": (2, 3, 5, 7), "bits": 3},
    "channels_last": {"shape": (2, 3, 5, 7), "layout": LAST},
    "sliced": {"shape": (2, 3, 4, 5), "layout": "sliced"},
    "sliced-channels_last": {"shape": (2, 3, 4, 5), "layout": "sliced-channels_last"},
    "offset": {"shape": (2, 3, 4, 5), "layout": "offset"},
    "expanded": {"shape": (3, 2, 4, 5), "layout": "expanded"},
    "transposed": {"shape": (2, 3, 4, 5), "layout": "transposed"},
    "2-D": {"shape": (7, 5)},
    "5-D": {"shape": (2, 3, 2, 3, 5)},
    "5-D-sliced": {"shape": (2, 3, 2, 3, 5), "layout": "sliced"},
    "fp16": {"shape": (2, 3, 5, 7), "dtype": HALF, "bits": 3},
    "bf16-channels_last": {"shape": (2, 8, 5, 7), "dtype": BFLOAT, "bits": 3, "layout": LAST},
    "tiny": {"shape": (3, 4, 2, 5), "gain": 1e-6},
}

FAKE_QUANTIZE = Op(
    name="fake_quantize",
    file="fake_quantize",
    make=make_quantized,
    differentiable=("x",),
    results=("y",),
    like_x=("y",),
    small={"shape": (3, 6, 4, 2)},
    cases={
        **QUANTIZED_CASES,
        "one-value": {"shape": (1,)},
        "1-D": {"shape": (7,)},
        "tile-1": {"shape": (1, 1, 23, 89)},
        "tile+2-bf16": {"shape": (1, 2, 41, 25), "dtype": BFLOAT, "bits": 3},
        "rows-of-programs": {"shape": (7, 3, 9, 33), "layout": "sliced"},
        "resnet20-layer3": {"shape": (4, 64, 8, 8), "layout": LAST},
        "relu": {"shape": (2, 3, 5, 7), "ends": (0.0, 2.0)},
        "range-above-zero": {"shape": (2, 3, 5, 7), "ends": (0.5, 2.0)},
        "range-below-zero": {"shape": (2, 3, 5, 7), "ends": (-2.0, -0.5)},
        "range-of-no-width": {"shape": (2, 3, 5, 7), "ends": (0.0, 0.0)},
        "all-outside": {"shape": (2, 3, 5, 7), "ends": (-1e-3, 1e-3), "gain": 1e4},
        "ends-of-bf16": {"shape": (2, 3, 5, 7), "end_dtype": BFLOAT},
    },
    gradcheck={},  # the slope is no derivative of the steps
    refused={
        **BITS_REFUSED,
        "low-list": ({"low": [0.0]}, TypeError, "OP: expected low to be a tensor, got list"),
        "low-float": ({"low": 0.0}, TypeError, "expected low to be a tensor, got float"),
        "low-1-D": ({"low": VALUE[None]}, ValueError, r"low of shape \(\), got \(1,\); pass one"),
        "high-1-D": ({"high": VALUE[None]}, ValueError, r"high of shape \(\), got \(1,\)"),
        "high-integer": ({"high": VALUE.long()}, TypeError, "expected high in float32"),
        "high-elsewhere": ({"high": VALUE.to("meta")}, ValueError, "expected one device"),
        "high-with-gradient": (
            {"high": torch.tensor(1.0, requires_grad=True)},
            ValueError,
            "constant high; detach it",
        ),
        "no-dimension": ({"x": VALUE}, ValueError, r"1 to 5 dimensions, got \(\); reshape"),
    },
)

FAKE_QUANTIZE_CHANNELS = Op(
    name="fake_quantize_channels",
    file="fake_quantize",
    make=make_weight,
    differentiable=("x",),
    results=("y",),
    like_x=("y",),
    small={"shape": (5, 6, 4, 2)},
    cases={
        **QUANTIZED_CASES,
        "one-value": {"shape": (1, 1)},
        "block-1": {"shape": (2, 4095)},
        "block+1": {"shape": (2, 4097)},
        "blocks-channels_last": {"shape": (2, 460, 3, 3), "layout": LAST, "bits": 8},
        "all-above-zero": {"shape": (5, 4, 3, 3), "shift": 9.0},
        "all-below-zero": {"shape": (5, 4, 3, 3), "shift": -9.0},
        "dead": {"shape": (5, 4, 3, 3), "gain": 0.0},
    },
    gradcheck={},
    refused={
        **BITS_REFUSED,
        "1-D": ({"x": torch.ones(3)}, ValueError, r"OP: expected x of shape \(C, \*rest\), 2-D"),
    },
    keeps_layout=False,  # the gradient is passed on as it comes
)

OPS = [
    JS_DIVERGENCE,
    KL_DIVERGENCE,
    ATTENTION_MAP,
    ATTENTION_TRANSFER,
    TOTAL_VARIATION,
    JITTERED_VIEW,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_CHANNELS,
]
