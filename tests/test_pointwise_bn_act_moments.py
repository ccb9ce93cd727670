"""pointwise_bn_act_moments: the layers it replaces, known values, sizes, layouts, extremes."""

import importlib

import pytest
import torch
import torch.nn as nn
from helpers import assert_matches_definition, random_tensor
from ops_table_batchnorm import POINTWISE_BN_ACT_MOMENTS, make_pointwise_arguments

import kernels

SHAPE = (3, 5, 4, 2)
CONSTANTS = ("weight", "bias", "running_mean", "running_var")


# Known values


@pytest.mark.parametrize("residual", [None, "contiguous"], ids=["alone", "residual"])
def test_definition_is_the_layers_it_replaces(residual):
    args = make_pointwise_arguments("cpu", SHAPE, 7, residual, eps=1e-3)
    conv = nn.Conv2d(7, 5, 1, bias=False)
    conv.weight.data = args["conv_weight"]
    bn = nn.BatchNorm2d(5, eps=1e-3).eval()
    bn.load_state_dict({name: args[name] for name in CONSTANTS}, strict=False)

    z = conv(args["x"])
    expected = bn(z)
    if residual is not None:
        expected = expected + args["residual"]
    y, moments = kernels.pointwise_bn_act_moments_ref(**args)
    torch.testing.assert_close(y, expected.relu())
    torch.testing.assert_close(moments[0] + bn.running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(moments[1], z.var((0, 2, 3), unbiased=False))


def test_value_and_gradient_computed_by_hand(backend, device):
    x = torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]]], device=device, requires_grad=True)
    conv_weight = torch.tensor([[1.0, 1.0], [2.0, 0.0]], device=device)[:, :, None, None]
    one = torch.ones(2, device=device)
    mean = torch.tensor([7.0, 4.0], device=device)
    var = torch.tensor([4.0, 1.0], device=device)
    op = kernels.pointwise_bn_act_moments
    y, moments = op(x, conv_weight, 3 * one, -one, mean, var, eps=0.0)
    # z: 6, 8 and 2, 6. 3 (z - 7) / 2 - 1 = -2.5, 0.5; 3 (z - 4) - 1 = -7, 5
    assert y.flatten().tolist() == [0.0, 0.5, 0.0, 5.0]
    assert moments.tolist() == [[0.0, 0.0], [1.0, 4.0]]

    (y.sum() + moments.sum()).backward()
    # a = 1/2; b (z - mean of z) = -1, 1 and -2, 2. dz: -0.5, 1.5 + 1.5 and -1.5, 3 + 2.5
    assert x.grad.flatten().tolist() == [-3.5, 14.0, -0.5, 3.0]


def test_moments_are_those_of_the_stored_output(backend, device):
    """2049 and 2051 are 2048 and 2052 in float16: of mean 2050 too, but of variance 4, not 1."""
    x = torch.tensor([[[[2048.0, 2048.0]], [[1.0, 3.0]]]], device=device).half()
    conv_weight = torch.ones(1, 2, 1, 1, device=device).half()
    one = torch.ones(1, device=device)
    op = kernels.pointwise_bn_act_moments
    y, moments = op(x, conv_weight, one, 0 * one, 2050 * one, one, eps=0.0)
    assert moments.flatten().tolist() == [0.0, 4.0]
    assert y.flatten().tolist() == [0.0, 2.0]


def test_nan_shows_in_its_pixel(backend, device):
    args = make_pointwise_arguments(device, SHAPE, 7)
    args["x"][0, 1, 2, 1] = float("nan")
    y, moments = kernels.pointwise_bn_act_moments(**args)
    assert y[0, :, 2, 1].isnan().all()
    assert y.isnan().sum() == 5
    assert moments.isnan().all()


# Sizes and layouts


@pytest.mark.parametrize("residual", [None, "channels_last"], ids=["alone", "residual"])
def test_many_tiles_and_steps_of_the_products(residual, device, monkeypatch):
    """Small blocks: several programs along positions and channels, several steps of each sum."""
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    forward = {**module._FORWARD, "BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_K": 16}
    backward = {**module._BACKWARD, "BLOCK_M": 16, "BLOCK_C": 16, "BLOCK_K": 16}
    monkeypatch.setattr(module, "_FORWARD", forward)
    monkeypatch.setattr(module, "_BACKWARD", backward)
    args = make_pointwise_arguments(device, (2, 35, 4, 5), 37, residual)
    assert_matches_definition(POINTWISE_BN_ACT_MOMENTS, args)


def test_channels_last_is_read_where_it_lies(device, monkeypatch):
    """No large tensor is copied before or after the kernels."""
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    args = make_pointwise_arguments(device, (2, 6, 4, 5), 8, "channels_last")
    args["x"].requires_grad_()
    args["residual"].requires_grad_()
    seen = []
    see = module._see_as_matrix

    def record(x):
        matrix = see(x)
        seen.append(matrix.data_ptr() == x.data_ptr())
        return matrix

    monkeypatch.setattr(module, "_see_as_matrix", record)
    y, moments = kernels.pointwise_bn_act_moments(**args)
    grads = torch.ones_like(y), torch.ones_like(moments)
    torch.autograd.backward((y, moments), grads)
    assert len(seen) >= 5 and all(seen)
    for tensor in (y, args["x"].grad, args["residual"].grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("n_channels", "n_inputs", "n_wide", "alignment"),
    [
        pytest.param(24, 40, 40, 8, id="multiples-of-8"),
        pytest.param(24, 41, 41, 1, id="odd-inputs"),
        pytest.param(12, 40, 40, 1, id="channels-are-none"),
        pytest.param(24, 12, 24, 1, id="part-of-wider-rows"),
        pytest.param(24, 16, 24, 8, id="aligned-part-of-wider-rows"),
    ],
)
def test_alignment_divides_sizes_and_rows(
    n_channels, n_inputs, n_wide, alignment, device, monkeypatch
):
    """x is the first of n_wide channels. The interpreter does not use the hint."""
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    args = make_pointwise_arguments(device, (2, n_channels, 3, 4), n_inputs)
    wide = torch.zeros(2, n_wide, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    wide[:, :n_inputs] = args["x"]
    args["x"] = wide[:, :n_inputs]

    chosen = []
    choose = module.choose_alignment

    def record(*matrices):
        chosen.append(choose(*matrices))
        return chosen[-1]

    monkeypatch.setattr(module, "choose_alignment", record)
    assert_matches_definition(POINTWISE_BN_ACT_MOMENTS, args)
    assert chosen[0] == alignment
    assert chosen[1] in (1, alignment)  # dx is dense: n_wide is not its stride
    assert (chosen[1] == 8) == (n_channels % 8 == 0 and n_inputs % 8 == 0)


@pytest.mark.parametrize("residual", [None, "channels_last"], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["none", "relu6", "silu", "hardswish"])
def test_output_may_be_modified_in_place(activation, residual, backend, device):
    """As after the plain layers. relu is left out: PyTorch's own keeps its output."""
    args = make_pointwise_arguments(device, SHAPE, 7, residual, activation, gain=4.0)
    x = args["x"].requires_grad_()
    gradients = []
    for function in (kernels.pointwise_bn_act_moments, kernels.pointwise_bn_act_moments_ref):
        y, moments = function(**args)
        y = nn.functional.leaky_relu_(y, 0.1)
        loss = y.square().sum() + moments.square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "dtype", "is_amd", "precision"),
    [
        pytest.param("tf32", torch.float32, False, "tf32", id="allowed"),
        pytest.param("ieee", torch.float32, False, "ieee", id="refused"),
        pytest.param("none", torch.float32, False, "ieee", id="not-set"),
        pytest.param("tf32", torch.bfloat16, False, "ieee", id="half-precision"),
        pytest.param("tf32", torch.float32, True, "ieee", id="amd"),
    ],
)
def test_tf32_only_where_convolutions_take_it(setting, dtype, is_amd, precision, monkeypatch):
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = setting
    monkeypatch.setattr(torch.version, "hip", "6.4" if is_amd else None)
    try:
        assert module.choose_precision(dtype) == precision
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.gpu
def test_tf32_rounds_the_operands_alone(monkeypatch):
    """To 10 bits each, so that a product is off by 2^-9 of itself at most."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x = torch.randn(8, 256, 14, 14, device="cuda").to(memory_format=torch.channels_last)
    conv_weight = torch.randn(64, 256, 1, 1, device="cuda")
    ones = torch.ones(64, device="cuda")
    zeros = torch.zeros(64, device="cuda")
    y, _ = kernels.pointwise_bn_act_moments(
        x, conv_weight, ones, zeros, zeros, ones, eps=1e-5, activation="none"
    )
    exact = nn.functional.conv2d(x.double(), conv_weight.double())
    size = nn.functional.conv2d(x.double().abs(), conv_weight.double().abs())
    error = (y.double() * (1 + 1e-5) ** 0.5 - exact).abs()
    assert (error <= 1.1 * 2**-9 * size).all()


# Extremes


@pytest.mark.parametrize("extreme", ["constant", "far", "large-mean"])
def test_extremes(extreme, backend, device):
    args = make_pointwise_arguments(device, (4, 3, 5, 5), 6)
    if extreme == "constant":
        args["x"] = torch.full_like(args["x"], 2.5)
    if extreme == "far":
        args["running_mean"] = args["running_mean"] + 100 * args["running_var"].sqrt()
    if extreme == "large-mean":
        args["x"] = 100 + 0.01 * args["x"]
    got = assert_matches_definition(POINTWISE_BN_ACT_MOMENTS, args)
    y, moments = got.results
    assert y.isfinite().all()
    assert moments.isfinite().all()
    assert got.gradients["x"].isfinite().all()


# An output that two layers read, and no gradient of one of the results


@pytest.mark.parametrize("used", ["both", "first", "second", "neither"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients_of_two_readers_are_added(activation, used, backend, device):
    """As autograd adds them where the output is one tensor."""
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    args = make_pointwise_arguments(device, SHAPE, 7, "channels_last", activation)
    layer = importlib.import_module("kernels.bn_act_moments")
    affine = layer.fold_constants(*(args[name] for name in CONSTANTS), args["eps"])
    dy = random_tensor(SHAPE, device, seed=7)
    dy_again = random_tensor(SHAPE, device, seed=8)
    grads = random_tensor((2, 5), device, seed=9)

    gradients = []
    for n_uses in (1, 2):
        x = args["x"].detach().requires_grad_()
        residual = args["residual"].detach().requires_grad_()
        y, part, *again = module.pointwise_bn_act_moments_folded(
            x, args["conv_weight"], affine, residual, activation, n_uses
        )
        moments = layer.merge_moments([part])
        second = again[0] if again else y
        assert torch.equal(y, second)
        results = [(moments, grads)]
        if used in ("both", "first"):
            results.append((y, dy))
        if used in ("both", "second"):
            results.append((second, dy_again))
        torch.autograd.backward(*zip(*results, strict=True))
        gradients.append((x.grad, residual.grad))
    for one, two in zip(*gradients, strict=True):
        if one is None:  # nothing reads the residual
            assert two is None or not two.any()
        else:
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_unknown_activation_is_refused_when_folded():
    module = importlib.import_module("kernels.pointwise_bn_act_moments")
    args = make_pointwise_arguments("cpu", SHAPE, 7)
    with pytest.raises(ValueError, match="pointwise_bn_act_moments: expected activation in none,"):
        module.pointwise_bn_act_moments_folded(
            args["x"], args["conv_weight"], torch.ones(3, 5), None, "gelu"
        )
