"""bn_act_moments: the layers it replaces, known values, layouts, extremes."""

import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_matches_definition, make_leaves, random_tensor
from ops_table_batchnorm import BN_ACT_MOMENTS, make_layer_arguments

import kernels

LAYERS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


def make_plain_arguments(x, **options):
    """Arguments of a layer whose u is x, plus the residual if there is one."""
    one = torch.ones(x.size(1), device=x.device)
    args = {"weight": one, "bias": 0 * one, "running_mean": 0 * one, "running_var": one}
    return {"x": x, **args, "eps": 0.0, **options}


# Known values


@pytest.mark.parametrize("activation", LAYERS)
@pytest.mark.parametrize("residual", [None, "contiguous"], ids=["alone", "residual"])
def test_definition_is_the_layers_it_replaces(activation, residual):
    args = make_layer_arguments("cpu", (3, 5, 4, 2), residual, activation, eps=1e-3)
    bn = nn.BatchNorm2d(5, eps=1e-3).eval()
    names = ("weight", "bias", "running_mean", "running_var")
    bn.load_state_dict({name: args[name] for name in names}, strict=False)

    x = args["x"]
    expected = bn(x)
    if residual is not None:
        expected = expected + args["residual"]
    expected = LAYERS[activation](expected)
    y, moments = kernels.bn_act_moments_ref(**args)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(moments[0] + bn.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(moments[1], x.var((0, 2, 3), unbiased=False))


def test_value_and_gradient_computed_by_hand(backend, device):
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], device=device, requires_grad=True)
    one = torch.ones(2, device=device)
    running_mean = torch.tensor([2.0, 4.0], device=device)
    running_var = torch.tensor([4.0, 1.0], device=device)
    y, moments = kernels.bn_act_moments(x, 3 * one, -one, running_mean, running_var, eps=0.0)
    assert y.tolist() == [[[0.0, 0.5], [2.0, 2.0]]]  # 3 (x - 2) / 2 - 1 = -2.5, 0.5; 3 (5 - 4) - 1
    assert moments.tolist() == [[0.0, 1.0], [1.0, 0.0]]

    (y.sum() + moments.sum()).backward()
    # Channel 0: s = 3/2 where y > 0, a = 1/2, b (x - 2) = -1, 1. Channel 1: s = 3, a = 1/2, b 0.
    assert x.grad.tolist() == [[[-0.5, 3.0], [3.5, 3.5]]]


BORDERS = [-4.0, -3.0, -1.0, 0.0, 3.0, 6.0, 7.0]
AT_BORDERS = {  # activation: (values, slopes)
    "none": (BORDERS, [1.0] * 7),
    "relu": ([0, 0, 0, 0, 3, 6, 7], [0, 0, 0, 0, 1, 1, 1]),
    "relu6": ([0, 0, 0, 0, 3, 6, 6], [0, 0, 0, 0, 1, 0, 0]),
    "silu": (
        [-0.0719448, -0.1422776, -0.2689414, 0, 2.8577224, 5.9851642, 6.9936230],
        [-0.0526646, -0.0881041, 0.0723295, 0.5, 1.0881041, 1.0123263, 1.0054601],
    ),
    "hardswish": ([0, 0, -1 / 3, 0, 3, 6, 7], [0, 0, 1 / 6, 0.5, 1, 1, 1]),
}


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("activation", LAYERS)
def test_values_and_slopes_at_the_borders(activation, dtype, has_residual, backend, device):
    u = torch.tensor(BORDERS, device=device, dtype=dtype).view(7, 1)
    residual = torch.full_like(u, 2.0) if has_residual else None
    x = u if residual is None else u - residual
    x = x.requires_grad_()
    args = make_plain_arguments(x, residual=residual, activation=activation)
    y, _ = kernels.bn_act_moments(**args)
    (slope,) = torch.autograd.grad(y.sum(), x)

    values, slopes = AT_BORDERS[activation]
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor(values, dtype=dtype), **close)
    torch.testing.assert_close(slope.flatten().cpu(), torch.tensor(slopes, dtype=dtype), **close)

    expected = LAYERS[activation](u.detach().requires_grad_())
    torch.testing.assert_close(y, expected, **close)


def test_no_gradient_where_y_rounds_to_zero(backend, device):
    args = make_layer_arguments(device, (3, 4, 5, 2), dtype=torch.float16)
    args["weight"] = torch.full((4,), 1e-9, device=device)
    args["bias"] = torch.zeros(4, device=device)
    x = args["x"].requires_grad_()
    y, _ = kernels.bn_act_moments(**args)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 6e4))
    assert not y.any()
    assert not dx.any()


@pytest.mark.parametrize("activation", LAYERS)
def test_nan_shows_in_its_pixel_and_channel(activation, backend, device):
    args = make_layer_arguments(device, (2, 3, 4, 4), activation=activation)
    args["x"][0, 1, 2, 3] = float("nan")
    y, moments = kernels.bn_act_moments(**args)
    assert y[0, 1, 2, 3].isnan()
    assert y.isnan().sum() == 1
    assert moments[:, 1].isnan().all()
    assert moments[:, [0, 2]].isfinite().all()


def test_moments_are_those_of_bn_moment_loss(backend, device):
    args = make_layer_arguments(device, (4, 6, 5, 5), layout="channels_last")
    _, moments = kernels.bn_act_moments(**args)
    loss = moments[0].norm() + (moments[1] - args["running_var"]).norm()
    expected = kernels.bn_moment_loss(args["x"], args["running_mean"], args["running_var"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_of_the_residual_is_the_mask_of_the_relu(backend, device):
    args = make_layer_arguments(device, (3, 4, 5, 2), residual="contiguous")
    residual = args["residual"].requires_grad_()
    y, _ = kernels.bn_act_moments(**args)
    (3 * y.sum()).backward()
    assert torch.equal(residual.grad, 3 * (y > 0).float())


# What may be modified in place before the backward pass

IN_PLACE = {
    "relu": F.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "add": partial(torch.Tensor.add_, other=1.5),
}


@pytest.mark.parametrize("residual", [None, "contiguous"], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("activation", "operation"),
    [
        *[("none", operation) for operation in IN_PLACE],
        *[(activation, "add") for activation in ("relu6", "silu", "hardswish")],
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_may_be_modified_in_place(activation, operation, residual, layout, backend, device):
    """As after the plain layers. relu is left out: PyTorch's own keeps its output."""
    options = dict(gain=4.0, layout=layout)
    args = make_layer_arguments(device, (3, 4, 5, 2), residual, activation, **options)
    gradients = {}
    for name in ("bn_act_moments", "bn_act_moments_ref"):
        leaves = make_leaves(args, BN_ACT_MOMENTS.differentiable)
        y, moments = getattr(kernels, name)(**{**args, **leaves})
        y = IN_PLACE[operation](y)
        loss = y.square().sum() + moments.square().sum()
        try:
            gradients[name] = torch.autograd.grad(loss, tuple(leaves.values()))
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
    torch.testing.assert_close(*gradients.values(), rtol=1e-4, atol=1e-4)


# Layouts and sizes that the table of cases does not have


@pytest.mark.parametrize("residual", [None, "contiguous"], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradient_keep_the_layout_of_x(layout, residual, backend, device):
    args = make_layer_arguments(device, (4, 8, 3, 5), residual, layout=layout)
    x = args["x"].requires_grad_()
    y, moments = kernels.bn_act_moments(**args)
    (y.square().sum() + moments.square().sum()).backward()
    assert y.stride() == x.stride()
    assert x.grad.stride() == x.stride()


LARGE = (64, 16, 8, 8), (3, 70, 13, 13), (3, 24, 47, 47)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_batch_on_cpu(shape, layout, monkeypatch):
    """A size at which the CPU path computes the moments in one read of x."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    args = make_layer_arguments("cpu", shape, residual=layout, layout=layout)
    assert_matches_definition(BN_ACT_MOMENTS, args)


@pytest.mark.parametrize("residual", [None, "channels_last"], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", LAYERS)
def test_gradients_on_cpu_overwrite_nothing(activation, residual, monkeypatch):
    """The backward pass writes dx in place of dy act'(u) where that is a tensor of its own."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    options = dict(layout="channels_last", gain=0.3)  # hardswish jumps at 3 and -3
    args = make_layer_arguments("cpu", (64, 16, 8, 8), residual, activation, **options)
    assert_matches_definition(BN_ACT_MOMENTS, args)

    args["x"].requires_grad_()
    y, moments = kernels.bn_act_moments(**args)
    dy = torch.randn_like(y)
    before = dy.clone()
    torch.autograd.backward((y, moments), (dy, torch.ones_like(moments)))
    assert torch.equal(dy, before)


@pytest.mark.parametrize("residual", [None, "contiguous"], ids=["alone", "residual"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param((37, 2, 5, 7), "contiguous", id="contiguous"),
        pytest.param((5, 64, 6, 7), "channels_last", id="channels_last"),
    ],
)
def test_programs_that_loop_over_rows(shape, layout, residual, device, monkeypatch):
    module = importlib.import_module("kernels.bn_act_moments")
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 1)
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 1)
    args = make_layer_arguments(device, shape, residual, layout=layout)
    assert_matches_definition(BN_ACT_MOMENTS, args)


def test_moments_of_two_layers_merged_at_once(backend, device):
    """Values and gradients are those of each layer alone; rows of a layer do not lie together."""
    module = importlib.import_module("kernels.bn_act_moments")
    layers = [make_layer_arguments(device, (3, C, 4, 2)) for C in (3, 37)]
    cotangent = random_tensor((2, 40), device)

    def run(measure):
        inputs = [args["x"].detach().requires_grad_() for args in layers]
        moments = measure(inputs)  # (2, 40)
        return moments, *torch.autograd.grad(moments, inputs, cotangent)

    def merge(inputs):
        parts = []
        for args, x in zip(layers, inputs, strict=True):
            vectors = [args[name] for name in ("weight", "bias", "running_mean", "running_var")]
            affine = module.fold_constants(*vectors, args["eps"])
            parts.append(module.bn_act_moments_folded(x, affine)[1])
        return module.merge_moments(parts)

    def define(inputs):
        pairs = zip(layers, inputs, strict=True)
        return torch.cat(
            [kernels.bn_act_moments_ref(**{**args, "x": x})[1] for args, x in pairs], 1
        )

    for merged, defined in zip(run(merge), run(define), strict=True):
        torch.testing.assert_close(merged, defined, rtol=1e-5, atol=1e-6)


def test_unknown_activation_is_refused_in_each_form():
    args = make_layer_arguments("cpu", (3, 4, 5, 2), activation="gelu")
    with pytest.raises(ValueError, match="expected activation in none, .* got 'gelu'"):
        kernels.bn_act_moments_ref(**args)

    module = importlib.import_module("kernels.bn_act_moments")
    with pytest.raises(ValueError, match="expected activation in none, .* got True"):
        module.bn_act_moments_folded(args["x"], torch.ones(3, 4), None, True)


# Extremes


@pytest.mark.parametrize("extreme", ["constant", "zero-variance", "far", "large-mean"])
def test_extremes(extreme, backend, device):
    args = make_layer_arguments(device, (4, 3, 5, 5))
    x = args["x"]
    running_mean = args["running_mean"]
    if extreme == "constant":
        args["x"] = torch.full_like(x, 2.5)
    if extreme == "zero-variance":
        x[:, 1] = running_mean[1]
    if extreme == "far":
        args["running_mean"] = running_mean + 100 * args["running_var"].sqrt()
    if extreme == "large-mean":
        args["x"] = 1e4 + 0.01 * x
        args["running_mean"] = 1e4 + running_mean

    got = assert_matches_definition(BN_ACT_MOMENTS, args)
    y, moments = got.results
    assert y.isfinite().all()
    assert moments.isfinite().all()
    assert (moments[1] >= 0).all()
    assert got.gradients["x"].isfinite().all()


# An output that two layers read


def call_twice(x, affine, residual, activation, n_uses):
    """y for the first reader, y for the second one, and the moments."""
    module = importlib.import_module("kernels.bn_act_moments")
    outputs = module.bn_act_moments_folded(x, affine, residual, activation, n_uses)
    y, part, *again = outputs
    moments = module.merge_moments([part])
    assert len(again) == n_uses - 1
    return y, again[0] if again else y, moments


@pytest.mark.parametrize("used", ["both", "both, strided", "first", "second", "neither"])
@pytest.mark.parametrize(
    ("activation", "residual", "layout"),
    [
        pytest.param("relu", None, "contiguous", id="relu"),
        pytest.param("relu", "channels_last", "channels_last", id="relu-residual-channels_last"),
        pytest.param("none", "contiguous", "contiguous", id="none-residual"),
        pytest.param("silu", "contiguous", "contiguous", id="silu-residual"),
    ],
)
def test_gradients_of_two_readers_are_added(activation, residual, layout, used, backend, device):
    """As autograd adds them where the output is one tensor."""
    args = make_layer_arguments(device, (3, 5, 4, 6), residual, activation, layout=layout)
    module = importlib.import_module("kernels.bn_act_moments")
    names = ("weight", "bias", "running_mean", "running_var", "eps")
    affine = module.fold_constants(*(args[name] for name in names))
    dy = random_tensor(args["x"].shape, device, seed=7)
    dy_again = random_tensor(args["x"].shape, device, seed=8)
    if used == "both, strided":
        dy = dy.contiguous(memory_format=torch.channels_last)
    grads = random_tensor((2, 5), device, seed=9)

    gradients = []
    for n_uses in (1, 2):
        x = args["x"].detach().requires_grad_()
        other = None if residual is None else args["residual"].detach().requires_grad_()
        first, second, moments = call_twice(x, affine, other, activation, n_uses)
        assert torch.equal(first, second)
        results = {"moments": (moments, grads)}
        if used not in ("second", "neither"):
            results["first"] = (first, dy)
        if used not in ("first", "neither"):
            results["second"] = (second, dy_again)
        torch.autograd.backward(*zip(*results.values(), strict=True))
        gradients.append([leaf.grad for leaf in (x, other) if leaf is not None])
    for one, two in zip(*gradients, strict=True):
        if one is None:  # nothing reads the residual
            assert two is None or not two.any()
        else:
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_gradients_of_two_readers_are_added_in_the_kernel(device, monkeypatch):
    """Read where they lie: a sum of them is not written first."""
    args = make_layer_arguments(device, (3, 5, 4, 6))
    module = importlib.import_module("kernels.bn_act_moments")
    names = ("weight", "bias", "running_mean", "running_var", "eps")
    affine = module.fold_constants(*(args[name] for name in names))
    x = args["x"].requires_grad_()
    first, second, _ = call_twice(x, affine, None, "relu", 2)

    seen = []
    backward = module._backward_on_gpu

    def record(ctx, saved, dy, dy_again, grads):
        seen.append((dy, dy_again))
        return backward(ctx, saved, dy, dy_again, grads)

    monkeypatch.setattr(module, "_backward_on_gpu", record)
    dy = torch.ones_like(first)
    torch.autograd.backward((first, second), (dy, 2 * dy))
    ((one, two),) = seen
    assert torch.equal(one, dy) and torch.equal(two, 2 * dy)


# Half precision on a CPU


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "none"])
def test_half_precision_is_not_copied_on_cpu(activation, layout, monkeypatch):
    """Rows of few channels too."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    options = dict(layout=layout, dtype=torch.bfloat16, gain=0.3)  # hardswish jumps at 3 and -3
    args = make_layer_arguments("cpu", (32, 6, 16, 16), None, activation, **options)
    assert_matches_definition(BN_ACT_MOMENTS, args)

    x = args["x"].requires_grad_()
    with torch.profiler.profile(record_shapes=True) as record:
        y, moments = kernels.bn_act_moments(**args)
        (y.sum() + moments.sum()).backward()
    assert y.dtype == torch.bfloat16
    for event in record.events():
        if event.name == "aten::_to_copy":
            assert math.prod(event.input_shapes[0]) < x.numel() / 2, "a whole tensor is converted"

    args["x"] = args["x"].detach()
    args["x"][:, 2] = 100.0  # a dead channel: its layer is copied
    args["running_mean"][2] = 99.0
    assert_matches_definition(BN_ACT_MOMENTS, args)
