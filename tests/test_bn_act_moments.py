"""bn_act_moments: definition, kernels and CPU path against it, layouts, extremes, properties, traffic, errors."""

import doctest
import importlib

import pytest
import torch
import torch.nn as nn
from helpers import assert_as_exact_as_eager, lay_out

from kernels import bn_act_moments, bn_act_moments_ref, bn_moment_loss

bn_act_module = importlib.import_module("kernels.bn_act_moments")  # the name in the package is the function
HALF, BFLOAT = torch.float16, torch.bfloat16


def laid_out(x, layout):
    if layout == "channels_inside":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x if layout == "contiguous" else lay_out(x, layout)


def make(shape, device, layout="contiguous", dtype=torch.float32, residual_layout=None):
    """x, the four vectors of a BatchNorm whose statistics x misses, and a residual (or None)."""
    torch.manual_seed(sum(shape))
    x = laid_out((torch.randn(shape, device=device) * 1.5 + 0.5).to(dtype), layout)
    C = shape[1]
    vectors = torch.randn(C, device=device), torch.randn(C, device=device), torch.randn(C, device=device)
    vectors = (*vectors, torch.rand(C, device=device) + 0.5)
    residual = None
    if residual_layout:
        residual = laid_out(torch.randn(shape, device=device).to(dtype), residual_layout)
    return x, vectors, residual


def values_and_grads(op, x, vectors, residual, relu, cotangents):
    """y, moments, dx and, where there is a residual, dresidual, under fixed cotangents."""
    x = x.detach().requires_grad_()
    inputs = [x]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        inputs.append(residual)
    y, moments = op(x, *vectors, eps=1e-5, residual=residual, relu=relu)
    total = (y * cotangents[0].to(y.dtype)).sum() + (moments * cotangents[1].to(moments.dtype)).sum()
    return y, moments, *torch.autograd.grad(total, inputs)


def assert_matches_ref(x, vectors, residual=None, relu=True):
    # round the cotangent of y as the op's dtype has it: all three differentiate the same function
    cotangents = torch.randn(x.shape, device=x.device).to(x.dtype), torch.randn(2, x.shape[1], device=x.device)

    def widened(dtype):
        wide = None if residual is None else residual.to(dtype)
        return x.to(dtype), [v.to(dtype) for v in vectors], wide, relu, cotangents

    got = values_and_grads(bn_act_moments, x, vectors, residual, relu, cotangents)
    exact = values_and_grads(bn_act_moments_ref, *widened(torch.float64))
    eager = values_and_grads(bn_act_moments_ref, *widened(torch.float32))
    assert got[0].dtype == got[2].dtype == x.dtype and got[1].dtype == torch.float32
    for name, *triple in zip(("y", "moments", "dx", "dresidual"), got, exact, eager, strict=False):
        assert_as_exact_as_eager(*triple, name=name)
    return got


# the definition


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [True, False])
def test_ref_gradcheck(layout, relu):
    x, vectors, residual = make((3, 4, 2, 5), "cpu", layout, residual_layout=layout)
    x, residual = x.double().requires_grad_(), residual.double().requires_grad_()
    vectors = [v.double() for v in vectors]
    assert torch.autograd.gradcheck(lambda x, r: bn_act_moments_ref(x, *vectors, residual=r, relu=relu), (x, residual))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_ref_is_the_layers_it_replaces(relu, with_residual):
    x, vectors, residual = make((3, 5, 4, 2), "cpu", residual_layout="contiguous" if with_residual else None)
    bn = nn.BatchNorm2d(5, eps=1e-3).eval()
    values = dict(zip(("weight", "bias", "running_mean", "running_var"), vectors, strict=True))
    bn.load_state_dict(values, strict=False)
    expected = bn(x) + residual if with_residual else bn(x)
    y, moments = bn_act_moments_ref(x, *vectors, eps=1e-3, residual=residual, relu=relu)
    torch.testing.assert_close(y, expected.relu() if relu else expected)
    torch.testing.assert_close(moments[0] + bn.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(moments[1], x.var((0, 2, 3), unbiased=False))


def test_by_hand(backend, device):
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], device=device, requires_grad=True)
    one = torch.ones(2, device=device)
    running_mean, running_var = torch.tensor([2.0, 4.0], device=device), torch.tensor([4.0, 1.0], device=device)
    y, moments = bn_act_moments(x, 3 * one, -one, running_mean, running_var, eps=0.0)
    assert y.tolist() == [[[0.0, 0.5], [2.0, 2.0]]]  # 3 (x - 2) / 2 - 1 = -2.5, 0.5; 3 (5 - 4) - 1
    assert moments.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    (y.sum() + moments[0].sum() + moments[1].sum()).backward()
    # channel 0: s = 1.5 where y > 0, a = 1/2, b (x - 2) = -1, 1; channel 1: s = 3, a = 1/2, no deviation
    assert x.grad.tolist() == [[[-0.5, 3.0], [3.5, 3.5]]]


# kernels and CPU path against it

CASES = [
    pytest.param((1, 1, 1, 1), "contiguous", torch.float32, None, id="one-value"),
    pytest.param((5, 7), "contiguous", torch.float32, "contiguous", id="2d"),
    pytest.param((65, 130), "contiguous", HALF, None, id="2d-block+1-fp16"),
    pytest.param((3, 2, 63), "contiguous", torch.float32, None, id="3d-block-1"),
    pytest.param((3, 6, 7), "channels_inside", BFLOAT, "channels_inside", id="3d-channels-inside-bf16"),
    pytest.param((2, 3, 5, 7), "contiguous", torch.float32, None, id="odd"),
    pytest.param((2, 3, 5, 7), "channels_last", torch.float32, "channels_last", id="odd-channels-last"),
    pytest.param((4, 8, 4, 4), "channels_last", HALF, "channels_last", id="power-of-2-fp16"),
    pytest.param((3, 65, 3, 3), "channels_last", torch.float32, None, id="channel-block+1"),
    pytest.param((1, 2, 41, 50), "contiguous", BFLOAT, "contiguous", id="tile+2-bf16"),
    pytest.param((1, 2, 23, 89), "contiguous", torch.float32, None, id="tile-1"),
    pytest.param((4, 3, 4, 5), "sliced", torch.float32, "contiguous", id="sliced"),
    pytest.param((4, 3, 4, 5), "contiguous", torch.float32, "sliced", id="sliced-residual"),
    pytest.param((3, 4, 5, 3), "offset", HALF, "offset", id="offset-fp16"),
    pytest.param((4, 3, 4, 5), "expanded", torch.float32, None, id="expanded"),
    pytest.param((4, 6, 4, 5), "channels_last", torch.float32, "contiguous", id="mixed-layouts"),
    pytest.param((2, 3, 2, 3, 5), "channels_inside", HALF, None, id="5d-channels-inside-fp16"),
    pytest.param((8, 64, 8, 8), "channels_last", torch.float32, "channels_last", id="resnet20-layer3"),
    pytest.param((8, 16, 32, 32), "channels_last", BFLOAT, None, id="resnet20-layer1-bf16"),
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "residual_layout"), CASES)
def test_matches_ref(backend, device, shape, layout, dtype, residual_layout):
    x, vectors, residual = make(shape, device, layout, dtype, residual_layout)
    y, _, dx, *_ = assert_matches_ref(x, vectors, residual)
    assert_matches_ref(x, vectors, residual, relu=False)
    if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


def test_expanded_cotangent(backend, device):
    """What a sum or mean over positions sends back has strides of 0."""
    x, vectors, residual = make((4, 3, 4, 5), device, "channels_last", residual_layout="channels_last")
    grads = []
    for op in (bn_act_moments, bn_act_moments_ref):
        leaf = x.clone().requires_grad_()
        y, moments = op(leaf, *vectors, residual=residual)
        (y.mean((2, 3)).square().sum() + moments.square().sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("needs", ["x", "residual", "none"])
def test_inputs_that_need_no_grad(needs, backend, device):
    x, vectors, residual = make((3, 4, 5, 2), device, residual_layout="contiguous")
    x.requires_grad_(needs == "x")
    residual.requires_grad_(needs == "residual")
    y, moments = bn_act_moments(x, *vectors, residual=residual)
    assert y.requires_grad == (needs != "none")
    if needs == "none":
        return
    (3 * y.sum()).backward()
    assert (x.grad is None) == (needs != "x") and (residual.grad is None) == (needs != "residual")
    if needs == "residual":
        assert torch.equal(residual.grad, 3 * (y > 0).float())


def test_one_output_alone(backend, device):
    """The loss on the moments alone, or the logits alone."""
    x, vectors, _ = make((3, 4, 5, 2), device)
    for index in (0, 1):
        grads = []
        for op in (bn_act_moments, bn_act_moments_ref):
            leaf = x.clone().requires_grad_()
            op(leaf, *vectors)[index].square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("extreme", ["constant", "zero-variance-channel", "far", "offset-1e4"])
def test_extremes(extreme, backend, device):
    x, vectors, _ = make((4, 3, 5, 5), device)
    weight, bias, running_mean, running_var = vectors
    if extreme == "constant":
        x = torch.full_like(x, 2.5)
    if extreme == "zero-variance-channel":
        x[:, 1] = running_mean[1]
    if extreme == "far":
        running_mean = running_mean + 100 * running_var.sqrt()
    if extreme == "offset-1e4":
        x, running_mean = 1e4 + 0.01 * x, 1e4 + running_mean
    y, moments, dx = assert_matches_ref(x, (weight, bias, running_mean, running_var))
    assert y.isfinite().all() and moments.isfinite().all() and dx.isfinite().all() and (moments[1] >= 0).all()


def test_nan_shows(backend, device):
    x, vectors, _ = make((2, 3, 4, 4), device)
    x[0, 1, 2, 3] = float("nan")
    y, moments = bn_act_moments(x, *vectors)
    assert y[0, 1, 2, 3].isnan() and y.isnan().sum() == 1
    assert moments[:, 1].isnan().all() and moments[:, [0, 2]].isfinite().all()


def test_moments_are_those_of_the_loss(backend, device):
    x, vectors, _ = make((4, 6, 5, 5), device, "channels_last")
    _, moments = bn_act_moments(x, *vectors)
    loss = moments[0].norm() + (moments[1] - vectors[3]).norm()
    assert loss.item() == pytest.approx(bn_moment_loss(x, *vectors[2:]).item(), rel=1e-6)


def test_repeats_bit_for_bit(backend, device):
    x, vectors, residual = make((6, 5, 7, 7), device, "channels_last", BFLOAT, "channels_last")
    cotangents = torch.randn(x.shape, device=device), torch.randn(2, 5, device=device)
    first, second = (values_and_grads(bn_act_moments, x, vectors, residual, True, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("residual", "reads", "writes"), [(False, (1, 2), (1, 1)), (True, (2, 3), (1, 2))])
def test_traffic_from_the_launches(monkeypatch, residual, reads, writes):
    """Tensors of x's size that each kernel gets as (inputs, outputs): 2 passes forward and 3 backward, no residual."""
    seen = {}

    def recorded(name):
        kernel = getattr(bn_act_module, name)

        class Recorder:
            def __getitem__(self, grid):
                def launch(*args, **meta):
                    large = {t.data_ptr() for t in args if torch.is_tensor(t) and t.numel() == x.numel()}
                    seen[name] = (*args[-3:], len(large))
                    return kernel[grid](*args, **meta)

                return launch

        monkeypatch.setattr(bn_act_module, name, Recorder())

    x, vectors, r = make((4, 8, 6, 6), "cpu", "channels_last", residual_layout="channels_last" if residual else None)
    for name in ("_bn_act_moments_fwd_kernel", "_bn_act_moments_bwd_kernel"):
        recorded(name)
    x.requires_grad_()
    y, moments = bn_act_moments(x, *vectors, residual=r.requires_grad_() if residual else None)
    (y.square().sum() + moments.sum()).backward()
    forward, backward = seen["_bn_act_moments_fwd_kernel"], seen["_bn_act_moments_bwd_kernel"]
    assert forward[-1] == reads[0] + writes[0]
    # y goes along for its dtype; without a residual HAS_RESIDUAL is false and nothing of it is read
    assert backward[:3] == (residual, residual, True)
    assert backward[-1] - (0 if residual else 1) == reads[1] + writes[1]


def test_double_backward_raises(backend, device):
    x, vectors, _ = make((2, 3, 4, 4), device)
    y, _ = bn_act_moments(x.requires_grad_(), *vectors)
    with pytest.raises(RuntimeError, match="bn_act_moments: no second derivative; use bn_act_moments_ref"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


ONES, X = torch.ones(3), torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        pytest.param(([1.0], ONES, ONES, ONES, ONES), {}, TypeError, "expected x to be a tensor, got list", id="list"),
        pytest.param((X.long(), ONES, ONES, ONES, ONES), {}, TypeError, "got torch.int64", id="integers"),
        pytest.param((X.double(), ONES, ONES, ONES, ONES), {}, TypeError, "use bn_act_moments_ref", id="float64"),
        pytest.param((X[:0], ONES, ONES, ONES, ONES), {}, ValueError, "drop the empty batch", id="empty"),
        pytest.param((ONES, ONES, ONES, ONES, ONES), {}, ValueError, "2-D to 5-D", id="1-D"),
        pytest.param((X, ONES[:2], ONES, ONES, ONES), {}, ValueError, r"weight of shape \(3,\), got \(2,\)", id="few"),
        pytest.param((X, None, ONES, ONES, ONES), {}, ValueError, r"weight of shape \(3,\), got None", id="none"),
        pytest.param((X, ONES, ONES, ONES, ONES), {"residual": X[:1]}, ValueError, "match it to x", id="residual"),
        pytest.param((X, ONES, ONES, ONES, ONES), {"residual": X.half()}, ValueError, "float16; match", id="dtype"),
        pytest.param((X, ONES, ONES, ONES, ONES.to("meta")), {}, ValueError, "expected one device", id="devices"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        bn_act_moments(*args, **options)


def test_example():
    tested = doctest.testmod(bn_act_module)
    assert tested.attempted and not tested.failed


@pytest.mark.gpu
def test_no_synchronisation():
    x, vectors, residual = make((8, 16, 32, 32), "cuda", "channels_last", BFLOAT, "channels_last")
    x.requires_grad_()
    mode = torch.cuda.get_sync_debug_mode()
    for check in (mode, "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(check)
        try:
            y, moments = bn_act_moments(x, *vectors, residual=residual)
            (y.float().sum() + moments.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
