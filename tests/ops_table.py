"""What test_every_op.py has to know of each op: how to call it, the cases, what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from helpers import lay_out, random_logits, random_tensor

HALF = torch.float16
BFLOAT = torch.bfloat16


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


def make_logits(
    device,
    shape,
    temperature=1.0,
    layout="contiguous",
    q_layout="contiguous",
    dtype=torch.float32,
    q_dtype=None,
):
    p_logits, q_logits = random_logits(shape, device)
    return {
        "p_logits": lay_out(p_logits.to(dtype), layout),
        "q_logits": lay_out(q_logits.to(q_dtype or dtype), q_layout),
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
        "backward-block": {"shape": (2, 1024)},
        "backward-block+1": {"shape": (2, 1025)},
        "block-1": {"shape": (2, 4095)},
        "block": {"shape": (2, 4096), "temperature": 20.0},
        "block+1": {"shape": (2, 4097)},
        "imagenet-21k": {"shape": (2, 21841)},
        "transposed-and-sliced": {
            "shape": (5, 12),
            "layout": "transposed",
            "q_layout": "sliced",
        },
        "sliced-and-expanded": {"shape": (5, 12), "layout": "sliced", "q_layout": "expanded"},
        "expanded-and-offset": {"shape": (5, 12), "layout": "expanded", "q_layout": "offset"},
        "offset-and-transposed": {
            "shape": (5, 12),
            "layout": "offset",
            "q_layout": "transposed",
        },
        "fp16": {"shape": (9, 33), "temperature": 2.0, "dtype": HALF},
        "bf16": {"shape": (9, 33), "temperature": 2.0, "dtype": BFLOAT},
        "fp32-and-bf16": {"shape": (9, 33), "temperature": 2.0, "q_dtype": BFLOAT},
    },
    "gradcheck": {
        "contiguous": {"shape": (3, 5)},
        "transposed": {"shape": (3, 5), "temperature": 3.0, "layout": "transposed"},
    },
    "refused": {
        "q-list": (
            {"q_logits": [1.0]},
            TypeError,
            "OP: expected q_logits to be a tensor, got list",
        ),
        "q-float64": ({"q_logits": LOGITS.double()}, TypeError, "got torch.float64; .* use OP_ref"),
        "unequal": ({"q_logits": LOGITS.T}, ValueError, r", \(3, 2\)\); reshape"),
        "1-D": ({"p_logits": LOGITS[0]}, ValueError, r"one shape \(N, K\), got \(\(3,\)"),
        "devices": ({"q_logits": LOGITS.to("meta")}, ValueError, "one device, got .*'meta'"),
        "T-infinite": (
            {"temperature": float("inf")},
            ValueError,
            "finite temperature > 0, got inf",
        ),
        "T-zero": ({"temperature": 0}, ValueError, "finite temperature > 0, got 0"),
        "T-nan": ({"temperature": float("nan")}, ValueError, "finite temperature > 0, got nan"),
        "T-tensor": ({"temperature": LOGITS}, TypeError, "python number, got Tensor; pass a float"),
    },
    "keeps_layout": False,
}

JS_DIVERGENCE = Op(name="js_divergence", file="js_divergence", **DIVERGENCE)
KL_DIVERGENCE = Op(name="kl_divergence", file="kl_divergence", **DIVERGENCE)


# Image priors


def make_images(device, shape, layout="contiguous", dtype=torch.float32):
    return {"x": lay_out(random_tensor(shape, device).to(dtype), layout)}


IMAGES = torch.ones(2, 3, 4, 4)

TOTAL_VARIATION = Op(
    name="total_variation",
    file="total_variation",
    make=make_images,
    differentiable=("x",),
    results=("l1", "l2"),
    small={"shape": (2, 3, 5, 6)},
    cases={
        "smallest": {"shape": (1, 1, 2, 2)},
        "odd": {"shape": (2, 3, 5, 7)},
        "power-of-two": {"shape": (4, 2, 8, 8)},
        "two-rows": {"shape": (1, 3, 2, 9)},
        "two-columns": {"shape": (3, 1, 9, 2)},
        "block-1": {"shape": (1, 2, 9, 255)},
        "block": {"shape": (1, 1, 8, 256)},
        "block+1": {"shape": (1, 1, 5, 257)},
        "cifar": {"shape": (4, 3, 32, 32)},
        "channels_last": {"shape": (3, 4, 6, 5), "layout": "channels_last"},
        "sliced": {"shape": (3, 4, 6, 5), "layout": "sliced"},
        "sliced-channels_last": {"shape": (3, 4, 6, 5), "layout": "sliced-channels_last"},
        "offset": {"shape": (3, 4, 6, 5), "layout": "offset"},
        "expanded": {"shape": (3, 4, 6, 5), "layout": "expanded"},
        "transposed": {"shape": (3, 4, 6, 5), "layout": "transposed"},
        "fp16": {"shape": (2, 3, 7, 9), "dtype": HALF},
        "bf16": {"shape": (2, 3, 7, 9), "dtype": BFLOAT},
        "bf16-channels_last": {"shape": (2, 3, 7, 9), "dtype": BFLOAT, "layout": "channels_last"},
    },
    gradcheck={  # random numbers: no difference lies near the kink of |d|
        "contiguous": {"shape": (2, 3, 3, 4)},
        "channels_last": {"shape": (2, 3, 3, 4), "layout": "channels_last"},
    },
    refused={
        "3-D": ({"x": IMAGES[0]}, ValueError, r"\(N, C, H, W\), got \(3, 4, 4\); use x\[None\]"),
        "one-row": ({"x": IMAGES[:, :, :1]}, ValueError, r"at least 2, got shape \(2, 3, 1, 4\)"),
        "one-column": ({"x": IMAGES[..., :1]}, ValueError, r"at least 2, got shape \(2, 3, 4, 1\)"),
    },
)

OPS = [JS_DIVERGENCE, KL_DIVERGENCE, TOTAL_VARIATION]
