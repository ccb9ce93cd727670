"""What test_every_op.py has to know of the ops on BatchNorms; ops_table.py explains a row."""

import torch
import torch.nn.functional as F
from helpers import lay_out, random_tensor
from ops_table import BFLOAT, HALF, Op


def make_x(device, shape, layout="contiguous", dtype=torch.float32):
    x = 1.5 * random_tensor(shape, device) + 0.5
    return lay_out(x.to(dtype), layout)


def make_running(device, shape, dtype=torch.float32):
    """A running mean and a running variance that the x of make_x misses."""
    mean, var = random_tensor((2, shape[1]), device, seed=1)
    return mean.to(dtype), (var.abs() + 0.5).to(dtype)


def make_moments_arguments(device, shape, has_shift=True, shift_dtype=torch.float32, **x_options):
    shift = make_running(device, shape, shift_dtype)[0] if has_shift else None
    return {"x": make_x(device, shape, **x_options), "shift": shift}


def make_loss_arguments(device, shape, running_dtype=torch.float32, **x_options):
    running_mean, running_var = make_running(device, shape, running_dtype)
    return {
        "x": make_x(device, shape, **x_options),
        "running_mean": running_mean,
        "running_var": running_var,
    }


def make_layer_arguments(
    device, shape, residual=None, activation="relu", eps=1e-5, gain=1.0, **x_options
):
    """residual: its layout, or None. gain: of weight and bias, to reach beyond all borders."""
    weight, bias = gain * random_tensor((2, shape[1]), device, seed=2)
    args = make_loss_arguments(device, shape, **x_options)
    args = {**args, "weight": weight, "bias": bias, "eps": eps, "residual": None}
    args["activation"] = activation
    if residual is not None:
        other = random_tensor(shape, device, seed=3)
        if args["x"].dtype != torch.float32:
            other = avoid_kink(other, args)
        args["residual"] = lay_out(other.to(args["x"].dtype), residual)
    return args


def avoid_kink(residual, args):
    """A residual with which no sum is near 0, where rounding decides on which side it lies.

    The CPU path rounds the BatchNorm's output before the sum.
    """
    names = ("running_mean", "running_var", "weight", "bias")
    constants = (args[name].float() for name in names)
    y = F.batch_norm(args["x"].float(), *constants, eps=args["eps"])
    is_near = (y + residual).abs() < 0.05 * (1 + y.abs())
    return torch.where(is_near, residual + 0.2 * (1 + y.abs()), residual)


def make_pointwise_arguments(
    device,
    shape,
    n_inputs,
    residual=None,
    activation="relu",
    gain=1.0,
    eps=1e-5,
    layout="channels_last",
    weight_layout="contiguous",
    dtype=torch.float32,
):
    """In half precision x and the weight are -1, 0 and 1: the convolution's output is exact."""
    N, C, H, W = shape
    x = make_x(device, (N, n_inputs, H, W))
    conv_weight = random_tensor((C, n_inputs, 1, 1), device, seed=4)
    if dtype == torch.float32:
        conv_weight = conv_weight / n_inputs**0.5
    else:
        x = x.round().clamp(-1, 1)
        conv_weight = conv_weight.round().clamp(-1, 1)
    z = F.conv2d(x, conv_weight)
    options = dict(gain=gain, eps=eps, dtype=dtype)
    args = make_layer_arguments(device, shape, residual, activation, **options)
    if residual is not None and dtype != torch.float32:
        other = avoid_kink(random_tensor(shape, device, seed=3), {**args, "x": z})
        args["residual"] = lay_out(other.to(dtype), residual)
    args["x"] = lay_out(x.to(dtype), layout)
    return {
        "x": args.pop("x"),
        "conv_weight": lay_out(conv_weight.to(dtype), weight_layout),
        **args,
    }


def make_distances(device, sizes, weights=None, form="l2", eps=None):
    moments = random_tensor((2, sum(sizes)), device)
    moments[1] = moments[1].abs()
    running_var = random_tensor((sum(sizes),), device, seed=1).abs() + 0.5
    return {
        "moments": moments,
        "running_var": running_var,
        "sizes": sizes,
        "weights": weights,
        "form": form,
        "eps": eps,
    }


SHAPES = {
    "one-value": {"shape": (1, 1, 1, 1)},
    "one-image-2-D": {"shape": (1, 3)},
    "2-D": {"shape": (5, 7)},
    "2-D-channels_last": {"shape": (7, 5), "layout": "channels_last"},
    "2-D-block+1-fp16": {"shape": (65, 130), "dtype": HALF},
    "3-D-block-1": {"shape": (3, 2, 63)},
    "3-D-channels_last-bf16": {"shape": (3, 6, 7), "layout": "channels_last", "dtype": BFLOAT},
    "odd": {"shape": (2, 3, 5, 7)},
    "odd-channels_last": {"shape": (2, 3, 5, 7), "layout": "channels_last"},
    "power-of-two": {"shape": (4, 8, 4, 4)},
    "power-of-two-channels_last-fp16": {
        "shape": (4, 8, 4, 4),
        "layout": "channels_last",
        "dtype": HALF,
    },
    "channel-block+1": {"shape": (3, 65, 3, 3), "layout": "channels_last"},
    "one-channel": {"shape": (7, 1, 3, 3), "layout": "channels_last"},
    "tile-1": {"shape": (1, 2, 23, 89)},
    "tile+2-bf16": {"shape": (1, 2, 41, 50), "dtype": BFLOAT},
    "sliced": {"shape": (4, 3, 4, 5), "layout": "sliced"},
    "sliced-bf16": {"shape": (4, 3, 4, 5), "layout": "sliced", "dtype": BFLOAT},
    "sliced-channels_last": {"shape": (4, 3, 4, 5), "layout": "sliced-channels_last"},
    "transposed": {"shape": (4, 3, 4, 5), "layout": "transposed"},
    "offset-fp16": {"shape": (3, 4, 5, 3), "layout": "offset", "dtype": HALF},
    "expanded": {"shape": (4, 3, 4, 5), "layout": "expanded"},
    "5-D": {"shape": (2, 3, 2, 3, 5)},
    "5-D-channels_last-fp16": {
        "shape": (2, 3, 2, 3, 5),
        "layout": "channels_last",
        "dtype": HALF,
    },
    "resnet20-layer1-bf16": {"shape": (2, 16, 32, 32), "dtype": BFLOAT},
    "resnet20-layer3": {"shape": (8, 64, 8, 8), "layout": "channels_last"},
}

SMALL = (3, 4, 5, 2)
TINY = (3, 4, 2, 5)
ONES = torch.ones(4)

BN_MOMENTS = Op(
    name="bn_moments",
    file="bn_moments",
    make=make_moments_arguments,
    differentiable=("x",),
    results=("mean", "var"),
    small={"shape": SMALL},
    cases={
        **SHAPES,
        "no-shift": {"shape": (4, 6, 5, 3), "has_shift": False},
        "no-shift-2-D": {"shape": (5, 7), "has_shift": False},
        "bf16-shift": {"shape": (4, 6, 5, 3), "shift_dtype": BFLOAT},
    },
    gradcheck={
        "contiguous": {"shape": TINY},
        "channels_last": {"shape": TINY, "layout": "channels_last"},
        "no-shift": {"shape": TINY, "has_shift": False},
    },
    refused={
        "1-D": ({"x": ONES}, ValueError, r"OP: .* x of shape \(N, C, .*2-D to 5-D, got \(4,\)"),
        "6-D": ({"x": torch.ones(2, 4, 1, 1, 1, 1)}, ValueError, "2-D to 5-D, got .*; reshape"),
        "shift-short": ({"shift": ONES[:2]}, ValueError, r"shift of shape \(4,\), got \(2,\)"),
        "shift-2-D": ({"shift": ONES.view(4, 1)}, ValueError, r"got \(4, 1\); pass one value"),
        "shift-integers": ({"shift": ONES.long()}, TypeError, "expected shift in float32"),
        "devices": ({"shift": ONES.to("meta")}, ValueError, "expected one device, got .*'meta'"),
    },
)

BN_MOMENT_LOSS = Op(
    name="bn_moment_loss",
    file="bn_moments",
    make=make_loss_arguments,
    differentiable=("x",),
    results=("loss",),
    small={"shape": SMALL},
    cases={
        **SHAPES,
        "bf16-statistics": {"shape": (4, 6, 5, 3), "running_dtype": BFLOAT},
    },
    gradcheck={
        "contiguous": {"shape": TINY},
        "channels_last": {"shape": TINY, "layout": "channels_last"},
    },
    refused={
        "mean-short": ({"running_mean": ONES[:1]}, ValueError, "OP: .*running_mean of shape"),
        "mean-none": ({"running_mean": None}, ValueError, r"running_mean of .*\(4,\), got None"),
        "var-short": ({"running_var": ONES[:1]}, ValueError, "OP: .*running_var of shape"),
        "var-integers": ({"running_var": ONES.long()}, TypeError, "running_var in float32"),
        "devices": ({"running_var": ONES.to("meta")}, ValueError, "expected one device"),
    },
)

ACTIVATION_CASES = {  # the gain takes values beyond 6 and below -3; none lies on a border
    "relu6": {"shape": (2, 3, 5, 7), "activation": "relu6", "gain": 4.0},
    "relu6-residual-channels_last-fp16": {
        "shape": (4, 8, 4, 4),
        "layout": "channels_last",
        "residual": "channels_last",
        "activation": "relu6",
        "gain": 4.0,
        "dtype": HALF,
    },
    "silu-channels_last": {
        "shape": (2, 3, 5, 7),
        "layout": "channels_last",
        "activation": "silu",
        "gain": 4.0,
    },
    "silu-residual-mixed-layouts": {
        "shape": (4, 6, 4, 5),
        "layout": "channels_last",
        "residual": "contiguous",
        "activation": "silu",
        "gain": 4.0,
    },
    "silu-residual-fp16": {
        "shape": (4, 8, 4, 4),
        "residual": "contiguous",
        "activation": "silu",
        "gain": 4.0,
        "dtype": HALF,
    },
    "hardswish-fp16": {
        "shape": (4, 8, 4, 4),
        "activation": "hardswish",
        "gain": 4.0,
        "dtype": HALF,
    },
    "hardswish-residual-sliced": {
        "shape": (4, 3, 4, 5),
        "residual": "sliced",
        "activation": "hardswish",
        "gain": 4.0,
    },
}

BN_ACT_MOMENTS = Op(
    name="bn_act_moments",
    file="bn_act_moments",
    make=make_layer_arguments,
    differentiable=("x", "residual"),
    results=("y", "moments"),
    like_x=("y",),
    small={"shape": SMALL, "residual": "contiguous"},
    cases={
        **SHAPES,
        "none": {"shape": (2, 3, 5, 7), "activation": "none"},
        **ACTIVATION_CASES,
        "large-eps": {"shape": (2, 3, 5, 7), "eps": 0.5},
        "residual": {"shape": (2, 3, 5, 7), "residual": "contiguous"},
        "residual-2-D": {"shape": (5, 7), "residual": "contiguous"},
        "none-residual": {
            "shape": (2, 3, 5, 7),
            "residual": "contiguous",
            "activation": "none",
        },
        "residual-channels_last-fp16": {
            "shape": (4, 8, 4, 4),
            "layout": "channels_last",
            "residual": "channels_last",
            "dtype": HALF,
        },
        "residual-3-D-channels_last-bf16": {
            "shape": (3, 6, 7),
            "layout": "channels_last",
            "residual": "channels_last",
            "dtype": BFLOAT,
        },
        "residual-mixed-layouts": {
            "shape": (4, 6, 4, 5),
            "layout": "channels_last",
            "residual": "contiguous",
        },
        "residual-of-a-sliced-x": {
            "shape": (4, 3, 4, 5),
            "layout": "sliced",
            "residual": "contiguous",
        },
        "residual-sliced": {"shape": (4, 3, 4, 5), "residual": "sliced"},
        "residual-offset-fp16": {
            "shape": (3, 4, 5, 3),
            "layout": "offset",
            "residual": "offset",
            "dtype": HALF,
        },
        "residual-tile+2-bf16": {
            "shape": (1, 2, 41, 50),
            "residual": "contiguous",
            "dtype": BFLOAT,
        },
        "residual-resnet20-layer3": {
            "shape": (8, 64, 8, 8),
            "layout": "channels_last",
            "residual": "channels_last",
        },
    },
    gradcheck={
        "contiguous": {"shape": TINY, "residual": "contiguous"},
        "channels_last": {"shape": TINY, "layout": "channels_last", "residual": "channels_last"},
        "none": {"shape": TINY, "residual": "contiguous", "activation": "none"},
        "relu6": {"shape": TINY, "residual": "contiguous", "activation": "relu6", "gain": 4.0},
        "silu": {"shape": TINY, "residual": "contiguous", "activation": "silu", "gain": 4.0},
        "hardswish": {
            "shape": TINY,
            "residual": "contiguous",
            "activation": "hardswish",
            "gain": 4.0,
        },
        "no-residual": {"shape": TINY},
    },
    refused={
        "1-D": ({"x": ONES}, ValueError, "OP: .*2-D to 5-D"),
        "weight-short": ({"weight": ONES[:2]}, ValueError, r"weight of shape \(4,\), got \(2,\)"),
        "weight-none": ({"weight": None}, ValueError, r"weight of shape \(4,\), got None"),
        "bias-integers": ({"bias": ONES.long()}, TypeError, "expected bias in float32"),
        "residual-list": ({"residual": [1.0]}, TypeError, "residual to be a tensor, got list"),
        "residual-shape": ({"residual": torch.ones(1, 4, 5, 2)}, ValueError, "match it to x"),
        "residual-dtype": (
            {"residual": torch.ones(SMALL, dtype=HALF)},
            ValueError,
            "residual of .* torch.float32, got .* torch.float16; match it to x",
        ),
        "activation": (
            {"activation": "gelu"},
            ValueError,
            "OP: expected activation in none, relu, relu6, silu, hardswish, got 'gelu'; choose one",
        ),
        "activation-bool": ({"activation": True}, ValueError, "got True"),
        "activation-none": ({"activation": None}, ValueError, "got None"),
        "devices": ({"running_var": ONES.to("meta")}, ValueError, "expected one device"),
        "residual-device": (
            {"residual": torch.ones(SMALL, device="meta")},
            ValueError,
            "expected one device",
        ),
    },
    keeps_layout=False,  # the residual's gradient has the layout of y, not its own
)

POINTWISE_BN_ACT_MOMENTS = Op(
    name="pointwise_bn_act_moments",
    file="pointwise_bn_act_moments",
    make=make_pointwise_arguments,
    differentiable=("x", "residual"),
    results=("y", "moments"),
    like_x=("y",),
    small={"shape": SMALL, "n_inputs": 6, "residual": "contiguous"},
    cases={
        "one-value": {"shape": (1, 1, 1, 1), "n_inputs": 1},
        "odd": {"shape": (2, 3, 5, 7), "n_inputs": 5},
        "odd-contiguous": {"shape": (2, 3, 5, 7), "n_inputs": 5, "layout": "contiguous"},
        "power-of-two-fp16": {"shape": (4, 16, 4, 4), "n_inputs": 8, "dtype": HALF},
        "blocks": {"shape": (2, 64, 8, 8), "n_inputs": 128},
        "blocks-1": {"shape": (1, 63, 7, 9), "n_inputs": 127},
        "blocks+1": {"shape": (1, 65, 3, 43), "n_inputs": 129},
        "channel-blocks+1-bf16": {"shape": (1, 65, 3, 11), "n_inputs": 33, "dtype": BFLOAT},
        "expands-residual-bf16": {
            "shape": (4, 64, 4, 4),
            "n_inputs": 16,
            "residual": "channels_last",
            "dtype": BFLOAT,
        },
        "reduces-fp16": {"shape": (4, 16, 4, 4), "n_inputs": 64, "dtype": HALF},
        "weight-transposed": {
            "shape": (2, 6, 4, 5),
            "n_inputs": 9,
            "weight_layout": "transposed",
        },
        "sliced": {"shape": (4, 3, 4, 5), "n_inputs": 6, "layout": "sliced"},
        "sliced-channels_last": {
            "shape": (4, 3, 4, 5),
            "n_inputs": 6,
            "layout": "sliced-channels_last",
        },
        "offset-fp16": {"shape": (3, 4, 5, 3), "n_inputs": 8, "layout": "offset", "dtype": HALF},
        "expanded": {"shape": (4, 3, 4, 5), "n_inputs": 6, "layout": "expanded"},
        "residual": {"shape": (2, 8, 5, 7), "n_inputs": 5, "residual": "channels_last"},
        "residual-mixed-layouts": {"shape": (4, 6, 4, 5), "n_inputs": 3, "residual": "contiguous"},
        "residual-sliced": {"shape": (4, 3, 4, 5), "n_inputs": 6, "residual": "sliced"},
        "none": {"shape": (2, 8, 5, 7), "n_inputs": 5, "activation": "none"},
        "none-residual": {
            "shape": (2, 8, 5, 7),
            "n_inputs": 5,
            "activation": "none",
            "residual": "channels_last",
        },
        "relu6": {"shape": (2, 8, 5, 7), "n_inputs": 5, "activation": "relu6", "gain": 4.0},
        "silu-residual": {
            "shape": (2, 8, 5, 7),
            "n_inputs": 5,
            "activation": "silu",
            "residual": "channels_last",
        },
        "hardswish-bf16": {
            "shape": (2, 8, 5, 7),
            "n_inputs": 5,
            "activation": "hardswish",
            "gain": 0.3,
            "dtype": BFLOAT,
        },
        "large-eps": {"shape": (2, 8, 5, 7), "n_inputs": 5, "eps": 0.5},
    },
    gradcheck={
        "channels_last": {"shape": TINY, "n_inputs": 3, "residual": "channels_last"},
        "contiguous": {"shape": TINY, "n_inputs": 3, "layout": "contiguous"},
    },
    refused={
        "3-D": ({"x": torch.ones(2, 6, 5)}, ValueError, r"OP: .* \(N, K, H, W\), got \(2, 6, 5\)"),
        "conv_weight-2-D": (
            {"conv_weight": torch.ones(4, 6)},
            ValueError,
            r"conv_weight of \(C, 6, 1, 1\) .*float32, got \(4, 6\) .*; match it to x",
        ),
        "conv_weight-3x3": ({"conv_weight": torch.ones(4, 6, 3, 3)}, ValueError, "conv_weight of"),
        "conv_weight-groups": (
            {"conv_weight": torch.ones(4, 3, 1, 1)},
            ValueError,
            r"got \(4, 3, 1, 1\)",
        ),
        "conv_weight-dtype": (
            {"conv_weight": torch.ones(4, 6, 1, 1, dtype=HALF)},
            ValueError,
            "got .* torch.float16; match it to x",
        ),
        "bias-short": ({"bias": ONES[:2]}, ValueError, r"OP: .*bias of shape \(4,\), got \(2,\)"),
        "weight-none": ({"weight": None}, ValueError, r"weight of shape \(4,\), got None"),
        "residual-shape": (
            {"residual": torch.ones(3, 6, 5, 2)},
            ValueError,
            r"residual of \(3, 4, 5, 2\) .*, got \(3, 6, 5, 2\) .*; match it to x",
        ),
        "activation": ({"activation": "gelu"}, ValueError, "OP: expected activation in none, relu"),
        "devices": (
            {"conv_weight": torch.ones(4, 6, 1, 1, device="meta")},
            ValueError,
            "one device",
        ),
    },
    keeps_layout=False,  # the gradients are dense
)

MOMENTS = torch.ones(2, 9)

MOMENT_DISTANCE = Op(
    name="moment_distance",
    file="moment_distance",
    make=make_distances,
    differentiable=("moments",),
    results=("value",),
    small={"sizes": (3, 5, 1)},
    cases={
        "one-value": {"sizes": (1,)},
        "odd": {"sizes": (3, 5, 1)},
        "powers-of-two": {"sizes": (16, 16, 32, 64)},
        "block+-1": {"sizes": (511, 512, 513)},
        "resnet50": {"sizes": (64, 2048, 7)},
        "weights": {"sizes": (3, 5, 40), "weights": (10.0, 1.0, 0.5)},
        "weight-zero": {"sizes": (3, 5, 40), "weights": (10, 1, 0)},
        "relative-one-value": {"sizes": (1,), "form": "relative"},
        "relative-odd": {"sizes": (3, 5, 1), "form": "relative", "weights": (10.0, 1.0, 0.5)},
        "relative-block+-1": {"sizes": (511, 512, 513), "form": "relative"},
        "relative-resnet50": {"sizes": (64, 2048, 7), "form": "relative"},
        "kl-one-value": {"sizes": (1,), "form": "kl"},
        "kl-odd": {"sizes": (3, 5, 1), "form": "kl", "weights": (10.0, 1.0, 0.5)},
        "kl-eps": {"sizes": (3, 5, 1), "form": "kl", "eps": (1e-3, 1e-5, 10.0)},
        "kl-block+-1": {"sizes": (511, 512, 513), "form": "kl"},
        "kl-resnet50": {"sizes": (64, 2048, 7), "form": "kl"},
    },
    gradcheck={
        "equal-weights": {"sizes": (3, 2)},
        "weights": {"sizes": (3, 2), "weights": (10.0, 0.5)},
        "relative": {"sizes": (3, 2), "weights": (10.0, 0.5), "form": "relative"},
        "kl": {"sizes": (3, 2), "weights": (10.0, 0.5), "form": "kl", "eps": (1e-3, 0.1)},
    },
    refused={
        "half": ({"moments": MOMENTS.half()}, ValueError, "float32, got torch.float16 of strides"),
        "transposed": ({"moments": torch.ones(9, 2).T}, ValueError, r"strides \(1, 2\); convert"),
        "var-strided": ({"running_var": torch.ones(9, 2)[:, 0]}, ValueError, "running_var contig"),
        "one-row": ({"moments": MOMENTS[:1]}, ValueError, r"\(2, C\) and \(C,\), .*; check sizes"),
        "sizes-list": ({"sizes": [9]}, TypeError, "sizes to be a tuple, got list; pass integers"),
        "sizes-short": ({"sizes": (8,)}, ValueError, r"C the sum of \(8,\)"),
        "sizes-negative": ({"sizes": (10, -1)}, ValueError, "check sizes"),
        "sizes-none": ({"sizes": ()}, ValueError, "check sizes"),
        "weights-list": (
            {"weights": [1.0, 1.0, 1.0]},
            TypeError,
            "weights to be a tuple, got list",
        ),
        "weights-short": ({"weights": (1.0,)}, ValueError, r"expected 3 weights, got \(1.0,\)"),
        "eps-number": ({"eps": 1e-3}, TypeError, "expected eps to be a tuple, got float"),
        "eps-short": ({"eps": (1e-3,)}, ValueError, r"expected 3 eps, got \(0.001,\)"),
        "eps-zero": ({"eps": (1.0, 0.0, 1.0)}, ValueError, "expected eps > 0"),
        "form": ({"form": "cosine"}, ValueError, "form in l2, relative, kl, got 'cosine'"),
        "devices": ({"running_var": torch.ones(9, device="meta")}, ValueError, "one device"),
    },
)

OPS = [
    BN_MOMENTS,
    BN_MOMENT_LOSS,
    BN_ACT_MOMENTS,
    POINTWISE_BN_ACT_MOMENTS,
    MOMENT_DISTANCE,
]
