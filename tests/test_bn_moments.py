"""bn_moments and bn_moment_loss: definition, kernels and CPU path against it, extremes, properties, errors."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from helpers import assert_as_exact_as_eager, lay_out

from kernels import bn_moment_loss, bn_moment_loss_ref, bn_moments, bn_moments_ref

bn_moments_module = importlib.import_module("kernels.bn_moments")  # the name in the package is the function


def channels_inside(x):
    """channels_last for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_x(shape, device, layout="contiguous", dtype=torch.float32, mean=0.5, std=1.5):
    torch.manual_seed(sum(shape))
    x = (torch.randn(shape, device=device) * std + mean).to(dtype)
    if layout == "channels_inside":
        return channels_inside(x)
    return x if layout == "contiguous" else lay_out(x, layout)


def statistics(C, device):
    """A running mean and variance that random inputs miss."""
    return torch.randn(C, device=device), torch.rand(C, device=device) + 0.5


def values_and_grad(op, x, *vectors, cotangents):
    """The outputs of `op`, and the gradient in x under fixed cotangents."""
    x = x.detach().requires_grad_()
    values = op(x, *vectors)
    values = values if isinstance(values, tuple) else (values,)
    pairs = zip(values, cotangents, strict=True)
    (dx,) = torch.autograd.grad(sum((v * c.to(v.dtype)).sum() for v, c in pairs), x)
    return *values, dx


def assert_matches_ref(op, ref, x, *vectors):
    """Values and gradient of `op` are as exact as those of the eager reference in fp32."""
    n_values = 2 if op is bn_moments else 1
    shape = (x.shape[1],) if op is bn_moments else ()
    cotangents = [torch.randn(shape, device=x.device) for _ in range(n_values)]
    double = [v if v is None else v.double() for v in vectors]
    got = values_and_grad(op, x, *vectors, cotangents=cotangents)
    exact = values_and_grad(ref, x.double(), *double, cotangents=cotangents)
    eager = values_and_grad(ref, x.float(), *vectors, cotangents=cotangents)
    assert all(v.dtype == torch.float32 for v in got[:-1])
    assert got[-1].dtype == x.dtype
    names = ("mean", "var", "dx") if op is bn_moments else ("loss", "dx")
    for name, *triple in zip(names, got, exact, eager, strict=True):
        assert_as_exact_as_eager(*triple, name=name)


# the definition


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ref_gradcheck(layout):
    x = make_x((3, 4, 2, 5), "cpu", layout).double().requires_grad_()
    running_mean, running_var = (v.double() for v in statistics(4, "cpu"))
    assert torch.autograd.gradcheck(bn_moments_ref, (x, None))
    assert torch.autograd.gradcheck(bn_moments_ref, (x, running_mean))
    assert torch.autograd.gradcheck(bn_moment_loss_ref, (x, running_mean, running_var))


def test_ref_by_hand():
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], dtype=torch.float64, requires_grad=True)  # mean (2, 5), var (1, 0)
    mean, var = bn_moments_ref(x)
    assert mean.tolist() == [2, 5]
    assert var.tolist() == [1, 0]
    loss = bn_moment_loss_ref(x, torch.tensor([2.0, 1.0]).double(), torch.tensor([1.0, 3.0]).double())
    assert loss.item() == 4 + 3  # |5 - 1| and |0 - 3|, the other two agree
    loss.backward()  # d|5 - 1| = 1/2 each in channel 1; var there has no slope at a constant
    assert x.grad.tolist() == [[[0, 0], [0.5, 0.5]]]


def test_ref_against_numpy():
    x = make_x((3, 5, 4, 2), "cpu").double()
    running_mean, running_var = (v.double() for v in statistics(5, "cpu"))
    a = x.numpy()
    mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3), ddof=0)
    loss = np.sqrt(((mean - running_mean.numpy()) ** 2).sum()) + np.sqrt(((var - running_var.numpy()) ** 2).sum())
    for shift in (None, running_mean):
        got_mean, got_var = bn_moments_ref(x, shift)
        np.testing.assert_allclose(got_mean, mean, rtol=1e-13)
        np.testing.assert_allclose(got_var, var, rtol=1e-13)
    np.testing.assert_allclose(bn_moment_loss_ref(x, running_mean, running_var), loss, rtol=1e-13)


def test_signatures():
    assert inspect.signature(bn_moments) == inspect.signature(bn_moments_ref)
    assert inspect.signature(bn_moment_loss) == inspect.signature(bn_moment_loss_ref)


# kernels and CPU path against it

HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = [
    pytest.param((1, 1, 1, 1), "contiguous", torch.float32, id="one_value"),
    pytest.param((1, 3), "contiguous", torch.float32, id="n1_2d"),
    pytest.param((5, 7), "contiguous", torch.float32, id="2d"),
    pytest.param((65, 130), "contiguous", HALF, id="2d_block_plus_1_fp16"),
    pytest.param((7, 5), "channels_inside", torch.float32, id="2d_channels_inside"),
    pytest.param((3, 2, 63), "contiguous", torch.float32, id="3d_block_minus_1"),
    pytest.param((3, 6, 7), "channels_inside", BFLOAT, id="3d_channels_inside_bf16"),
    pytest.param((2, 3, 5, 7), "contiguous", torch.float32, id="odd"),
    pytest.param((2, 3, 5, 7), "channels_last", torch.float32, id="odd_channels_last"),
    pytest.param((4, 8, 4, 4), "contiguous", torch.float32, id="power_of_2"),
    pytest.param((4, 8, 4, 4), "channels_last", HALF, id="power_of_2_channels_last_fp16"),
    pytest.param((3, 65, 3, 3), "channels_last", torch.float32, id="channel_block_plus_1"),
    pytest.param((1, 2, 41, 50), "contiguous", BFLOAT, id="tile_plus_2_bf16"),
    pytest.param((1, 2, 23, 89), "contiguous", torch.float32, id="tile_minus_1"),
    pytest.param((7, 1, 3, 3), "channels_last", torch.float32, id="one_channel"),
    pytest.param((4, 3, 4, 5), "sliced", torch.float32, id="sliced"),
    pytest.param((4, 3, 4, 5), "sliced", BFLOAT, id="sliced_bf16"),
    pytest.param((3, 4, 5, 3), "offset", HALF, id="offset_fp16"),
    pytest.param((4, 3, 4, 5), "expanded", torch.float32, id="expanded"),
    pytest.param((2, 3, 2, 3, 5), "contiguous", torch.float32, id="5d"),
    pytest.param((2, 3, 2, 3, 5), "channels_inside", HALF, id="5d_channels_inside_fp16"),
    pytest.param((8, 64, 8, 8), "channels_last", torch.float32, id="resnet20_layer3"),
    pytest.param((8, 16, 32, 32), "contiguous", BFLOAT, id="resnet20_layer1_bf16"),
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES)
def test_matches_ref(backend, device, shape, layout, dtype):
    x = make_x(shape, device, layout, dtype)
    running_mean, running_var = statistics(shape[1], device)
    assert_matches_ref(bn_moments, bn_moments_ref, x, running_mean)
    assert_matches_ref(bn_moment_loss, bn_moment_loss_ref, x, running_mean, running_var)


def test_without_shift_and_with_other_dtypes(backend, device):
    x = make_x((4, 6, 5, 3), device)
    assert_matches_ref(bn_moments, bn_moments_ref, x, None)
    running_mean, running_var = (v.to(t) for v, t in zip(statistics(6, device), (BFLOAT, HALF), strict=True))
    assert_matches_ref(bn_moments, bn_moments_ref, x, running_mean)
    assert_matches_ref(bn_moment_loss, bn_moment_loss_ref, x, running_mean, running_var)
    strided = torch.randn(6, 2, device=device)[:, 0]
    assert_matches_ref(bn_moment_loss, bn_moment_loss_ref, x, strided, running_var[:1].expand(6))


STRIDED = {
    "every_dimension_apart": lambda x: x[:, ::2, ::2, ::2, ::2],
    "channels_inside_apart": lambda x: channels_inside(x)[:, :, ::2, ::2, ::2],
    "channels_outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed_order": lambda x: x.permute(4, 1, 3, 2, 0),
    "expanded_channels": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    "expanded_everywhere": lambda x: x[:1, :, :1, :1, :1].expand(4, -1, 2, 3, 2),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_unusual_strides(backend, device, view):
    x = view(make_x((3, 4, 4, 6, 5), device))
    running_mean, running_var = statistics(x.shape[1], device)
    assert_matches_ref(bn_moments, bn_moments_ref, x, None)
    assert_matches_ref(bn_moment_loss, bn_moment_loss_ref, x, running_mean, running_var)


@pytest.mark.parametrize("part", [0, 1], ids=["mean", "var"])
def test_only_one_output_used(backend, device, part):
    x = make_x((3, 4, 5, 2), device).requires_grad_()
    cotangent = torch.randn(4, device=device)
    (got,) = torch.autograd.grad((bn_moments(x)[part] * cotangent).sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((bn_moments_ref(exact)[part] * cotangent).sum(), exact)
    (eager,) = torch.autograd.grad((bn_moments_ref(x)[part] * cotangent).sum(), x)
    assert_as_exact_as_eager(got, expected, eager, "dx")


def test_backward_of_scaled_loss(backend, device):
    x = make_x((3, 4, 5, 2), device).requires_grad_()
    running = statistics(4, device)
    (once,) = torch.autograd.grad(bn_moment_loss(x, *running), x)
    (3 * bn_moment_loss(x, *running)).backward()
    torch.testing.assert_close(x.grad, 3 * once)


def test_input_without_gradient(backend, device):
    x, running = make_x((3, 4, 5, 2), device), [v.requires_grad_() for v in statistics(4, device)]
    assert not bn_moment_loss(x, *(v.detach() for v in running)).requires_grad
    bn_moment_loss(x, *running).backward()  # statistics that want a gradient get none
    bn_moments(x, running[0])[0].sum().backward()
    assert running[0].grad is None
    assert running[1].grad is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_of_gradient_follows_x(backend, device, layout):
    x = make_x((2, 4, 3, 5), device, layout).requires_grad_()
    (dx,) = torch.autograd.grad(bn_moment_loss(x, *statistics(4, device)), x)
    assert dx.stride() == x.stride()


# the one-pass branch of the CPU path


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "mean", "one_pass"),
    [
        pytest.param((64, 16, 8, 8), 0.5, True, id="batch_of_64"),
        pytest.param((512, 8, 4, 4), 0.5, True, id="batch_folded_in_2"),
        pytest.param((257, 16, 4, 4), 0.5, False, id="batch_that_does_not_fold"),
        pytest.param((64, 16, 8, 8), 20.0, False, id="far_from_zero"),
    ],
)
def test_large_on_cpu(monkeypatch, layout, shape, mean, one_pass):
    monkeypatch.setattr(bn_moments_module._common, "INTERPRET", False)
    x = make_x(shape, "cpu", layout, mean=mean)
    running_mean, running_var = statistics(shape[1], "cpu")
    _, origin = bn_moments_module._torch_moments(x, running_mean)
    assert (origin is None) == one_pass
    assert_matches_ref(bn_moments, bn_moments_ref, x, running_mean + mean)
    assert_matches_ref(bn_moment_loss, bn_moment_loss_ref, x, running_mean + mean, running_var)


# extremes

EXTREMES = {
    "mean_100_std_0.01": ({"mean": 100.0, "std": 0.01}, 100.0),
    "mean_100_std_0.01_no_shift": ({"mean": 100.0, "std": 0.01}, None),
    "running_mean_100_sigma_off": ({"mean": 0.0, "std": 1.0}, 100.0),
    "huge": ({"mean": 1e15, "std": 1e15}, 0.0),
    "tiny": ({"mean": 1e-15, "std": 1e-15}, 0.0),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("values", "shift"), EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_moments(backend, device, layout, values, shift):
    x = make_x((8, 3, 16, 16), device, layout, **values)
    shift = None if shift is None else torch.full((3,), shift, device=device)
    assert_matches_ref(bn_moments, bn_moments_ref, x, shift)


@pytest.mark.parametrize("C", [1, 5])
def test_constant_input(backend, device, C):
    x = torch.full((3, C, 4, 5), 0.1, device=device)
    mean, var = bn_moments(x)
    torch.testing.assert_close(mean, x[0, :, 0, 0])
    assert var.max() < 1e-14
    assert bn_moments(x, x[0, :, 0, 0])[1].eq(0).all()


def test_exactly_matching_moments(backend, device):
    """Integers, so that nothing rounds: the loss is 0 and its gradient the subgradient 0, not NaN."""
    x = torch.tensor([-1.0, 1.0, 3.0, 5.0], device=device).view(4, 1, 1).repeat(1, 3, 2).requires_grad_()
    mean, var = torch.full((3,), 2.0, device=device), torch.full((3,), 5.0, device=device)
    loss = bn_moment_loss(x, mean, var)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.eq(0).all()
    x.grad = None
    bn_moment_loss(x, mean, var + 1).backward()  # one of the two norms is 0: the other one's gradient remains
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_nan_is_not_swallowed(backend, device):
    x = make_x((2, 3, 4, 4), device)
    x[1, 2, 0, 0] = float("nan")
    mean, var = bn_moments(x)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True]
    assert bn_moment_loss(x, *statistics(3, device)).isnan()


# properties


def test_zero_loss_at_own_moments(backend, device):
    x = make_x((8, 5, 4, 4), device)
    assert bn_moment_loss(x, *bn_moments(x)) < 1e-5


def test_invariant_to_permuting_positions(backend, device):
    x = make_x((4, 3, 5, 6), device)
    rows = x.movedim(1, -1).reshape(-1, 3)
    shuffled = rows[torch.randperm(len(rows), device=device)].view(4, 5, 6, 3).movedim(-1, 1)
    running = statistics(3, device)
    torch.testing.assert_close(bn_moment_loss(shuffled, *running), bn_moment_loss(x, *running))


def test_shifted_input_has_known_loss(backend, device):
    """x + delta misses its own moments by delta in every mean and by nothing in the variances."""
    x, delta = make_x((8, 4, 4, 4), device), 0.75
    torch.testing.assert_close(bn_moment_loss(x + delta, *bn_moments(x)).item(), delta * 4**0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bit_equal_on_repetition(backend, device, layout):
    x = make_x((16, 12, 8, 8), device, layout).requires_grad_()
    running = statistics(12, device)
    first, second = (values_and_grad(bn_moment_loss, x, *running, cotangents=[torch.ones(())]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# errors


def test_second_derivative_is_refused(backend, device):
    x = make_x((2, 3, 4), device).requires_grad_()
    with pytest.raises(RuntimeError, match="bn_moments: no second derivative; use bn_moments_ref"):
        torch.autograd.grad(bn_moments(x)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_moment_loss: no second derivative"):
        torch.autograd.grad(bn_moment_loss(x, *statistics(3, device)), x, create_graph=True)


X, V = torch.ones(2, 3, 4), torch.ones(3)
ERRORS = [
    pytest.param(lambda: bn_moments([1.0]), TypeError, "bn_moments: expected x to be a tensor", id="no_tensor"),
    pytest.param(lambda: bn_moments(X.double()), TypeError, "got torch.float64; .*bn_moments_ref", id="float64"),
    pytest.param(lambda: bn_moments(X.long()), TypeError, "expected x in float32", id="integers"),
    pytest.param(lambda: bn_moments(X[:0]), ValueError, "expected a non-empty x", id="empty"),
    pytest.param(lambda: bn_moments(V), ValueError, r"expected x of shape \(N, C, .*got \(3,\)", id="1d"),
    pytest.param(lambda: bn_moments(X[:, :, None, None, None, None]), ValueError, "2-D to 5-D", id="7d"),
    pytest.param(lambda: bn_moments(X, V[:2]), ValueError, r"expected shift of shape \(3,\)", id="shift_shape"),
    pytest.param(lambda: bn_moments(X, V.view(3, 1)), ValueError, r"got \(3, 1\)", id="shift_dimensions"),
    pytest.param(lambda: bn_moments(X, V.to("meta")), ValueError, "expected one device", id="devices"),
    pytest.param(lambda: bn_moments(X, V.long()), TypeError, "expected shift in float32", id="shift_dtype"),
    pytest.param(lambda: bn_moment_loss(X, V[:1], V), ValueError, "bn_moment_loss: .*running_mean", id="running_mean"),
    pytest.param(lambda: bn_moment_loss(X, V, V[:1]), ValueError, "bn_moment_loss: .*running_var", id="running_var"),
    pytest.param(lambda: bn_moment_loss(X, None, V), ValueError, r"of shape \(3,\), got None", id="no_running_mean"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


# GPU only


@pytest.mark.gpu
def test_no_synchronisation():
    x = make_x((4, 16, 8, 8), "cuda").requires_grad_()
    running = statistics(16, "cuda")
    bn_moment_loss(x, *running).backward()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bn_moment_loss(x, *running).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_torch_compile():
    x = make_x((4, 16, 8, 8), "cuda")
    running = statistics(16, "cuda")
    compiled = torch.compile(bn_moment_loss, fullgraph=True)
    torch.testing.assert_close(compiled(x, *running), bn_moment_loss(x, *running))
