"""attention_map and attention_transfer: definition, kernels and CPU path against it, extremes, properties, errors."""

import inspect
import math

import pytest
import torch
from helpers import assert_as_exact_as_eager, lay_out

from kernels import attention_map, attention_map_ref, attention_transfer, attention_transfer_ref

HALF, BFLOAT = torch.float16, torch.bfloat16


def activation(shape, device="cpu", layout="contiguous", dtype=torch.float32, scale=1.5, seed=0):
    """Random activation with a mean, as after a ReLU; `transposed`: columns follow each other in memory, not rows."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * (torch.randn(shape, generator=generator) + 0.5)).to(device, dtype)
    return x.mT.contiguous().mT if layout == "transposed" else lay_out(x, layout)


def target_for(x, C=3):
    """The map of a teacher with C channels, of another scale, for a student's activation x."""
    N, _, H, W = x.shape
    return attention_map_ref(activation((N, C, H, W), x.device, scale=7.0, seed=1))


def value_and_grad(op, x, *args, cotangent):
    x = x.detach().requires_grad_()
    value = op(x, *args)
    return value, *torch.autograd.grad((value * cotangent.to(value.dtype)).sum(), x)


def assert_exact(op, ref, x, *args):
    """Value and gradient in x, by the measured-tolerance rule, under a random cotangent."""
    N, _, H, W = x.shape
    generator = torch.Generator().manual_seed(7)
    shape = (N, H * W) if op is attention_map else ()
    cotangent = torch.randn(shape, generator=generator).to(x.device)
    double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    fused = value_and_grad(op, x, *args, cotangent=cotangent)
    exact = value_and_grad(ref, x.double(), *double, cotangent=cotangent)
    eager = value_and_grad(ref, x.float(), *args, cotangent=cotangent)
    assert fused[0].dtype == torch.float32 and fused[0].shape == shape
    assert fused[1].dtype == x.dtype
    for name, *values in zip(("value", "dx"), fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)
    return fused


# the definition


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ref_gradcheck(layout):
    x = activation((2, 3, 4, 2), layout=layout, dtype=torch.float64).requires_grad_()
    target = target_for(x).double()
    assert torch.autograd.gradcheck(attention_map_ref, (x,))
    assert torch.autograd.gradcheck(attention_map_ref, (x, 1e3))  # below eps: not normalised
    assert torch.autograd.gradcheck(attention_transfer_ref, (x, target))


def test_ref_by_hand():
    # squares (9, 0) and (0, 16): m = (9, 16) / 2, ||m|| = sqrt(337) / 2
    x = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64, requires_grad=True)
    root = math.sqrt(337)
    assert attention_map_ref(x)[0].tolist() == pytest.approx([9 / root, 16 / root], rel=1e-12)
    assert attention_map_ref(x, 100.0)[0].tolist() == pytest.approx([0.045, 0.08], rel=1e-12)
    # ||q - t||^2 / 2 = 1 - <q, t> = 1 - q_0 for t = (1, 0); d q_0 / d m_0 = m_1^2 / ||m||^3, to m_1 -m_0 m_1 / ||m||^3
    loss = attention_transfer_ref(x, torch.tensor([[1.0, 0.0]]).double())
    assert loss.item() == pytest.approx(1 - 9 / root, rel=1e-12)
    loss.backward()
    expected = [-3 * 64 / (root / 2) ** 3, 0, 0, 4 * 36 / (root / 2) ** 3]
    assert x.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_ref_is_the_released_formula():
    x, teacher = (activation((3, C, 4, 5), dtype=torch.float64, seed=C) for C in (6, 2))
    q, t = (torch.nn.functional.normalize(a.pow(2).mean(1).view(a.size(0), -1)) for a in (x, teacher))
    torch.testing.assert_close(attention_map_ref(teacher), t, rtol=1e-12, atol=0)
    loss = attention_transfer_ref(x, attention_map_ref(teacher))
    assert loss.item() == pytest.approx((q - t).pow(2).mean().item(), rel=1e-12)


def test_signatures():
    assert inspect.signature(attention_map) == inspect.signature(attention_map_ref)
    assert inspect.signature(attention_transfer) == inspect.signature(attention_transfer_ref)


# kernels and CPU path against it

CASES = [
    pytest.param((1, 1, 1, 1), "contiguous", torch.float32, id="one_value"),
    pytest.param((5, 3, 1, 1), "contiguous", torch.float32, id="one_position"),
    pytest.param((2, 3, 1, 7), "contiguous", HALF, id="one_row_fp16"),
    pytest.param((2, 3, 7, 1), "channels_last", torch.float32, id="one_column_channels_last"),
    pytest.param((3, 1, 4, 5), "contiguous", torch.float32, id="one_channel"),
    pytest.param((2, 3, 5, 7), "contiguous", torch.float32, id="odd"),
    pytest.param((2, 3, 5, 7), "channels_last", torch.float32, id="odd_channels_last"),
    pytest.param((2, 20, 5, 7), "channels_last", HALF, id="few_channels_last_fp16"),
    pytest.param((4, 16, 4, 4), "channels_last", BFLOAT, id="power_of_2_channels_last_bf16"),
    pytest.param((2, 3, 15, 17), "contiguous", torch.float32, id="position_block_minus_1"),
    pytest.param((1, 9, 1, 257), "contiguous", BFLOAT, id="position_block_plus_1_bf16"),
    pytest.param((1, 17, 16, 16), "contiguous", torch.float32, id="blocks_of_channels"),
    pytest.param((2, 129, 3, 3), "channels_last", torch.float32, id="channel_block_plus_1"),
    pytest.param((2, 264, 3, 2), "channels_last", BFLOAT, id="channel_blocks_plus_8_bf16"),
    pytest.param((2, 2, 17, 241), "contiguous", torch.float32, id="sample_block_plus_1"),
    pytest.param((4, 3, 4, 5), "sliced", torch.float32, id="sliced"),
    pytest.param((4, 3, 4, 5), "sliced", BFLOAT, id="sliced_bf16"),
    pytest.param((3, 4, 5, 3), "offset", HALF, id="offset_fp16"),
    pytest.param((4, 3, 4, 5), "expanded", torch.float32, id="expanded"),
    pytest.param((2, 3, 5, 4), "transposed", torch.float32, id="transposed"),
    pytest.param((3, 16, 32, 32), "channels_last", torch.float32, id="wrn_group1"),
    pytest.param((3, 64, 8, 8), "channels_last", BFLOAT, id="wrn_group3_bf16"),
    pytest.param((3, 6, 28, 28), "channels_last", torch.float32, id="lenet_group1"),
    pytest.param((3, 32, 16, 16), "contiguous", torch.float32, id="wrn_group2_contiguous"),
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES)
def test_matches_ref(shape, layout, dtype, backend, device):
    x = activation(shape, device, layout, dtype)
    assert_exact(attention_map, attention_map_ref, x)
    assert_exact(attention_transfer, attention_transfer_ref, x, target_for(x))


def test_layouts_of_target(backend, device):
    x = activation((4, 5, 3, 6), device)
    target = target_for(x)
    wide = torch.nn.functional.pad(target, (3, 2))
    for same in (target.T.contiguous().T, wide[:, 3:-2], target[:1].expand(4, -1), target.half()):
        assert_exact(attention_transfer, attention_transfer_ref, x, same)


def test_channels_sparse_in_memory(backend, device):
    """channels_last inside a larger tensor: side by side, but neither dense nor in whole groups of 8."""
    for C, start in ((5, 1), (8, 0), (8, 8), (24, 4)):
        x = activation((2, 32, 3, 4), device, "channels_last", BFLOAT)[:, start : start + C]
        assert_exact(attention_map, attention_map_ref, x)
        assert_exact(attention_transfer, attention_transfer_ref, x, target_for(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_layout_of_gradient_follows_x(layout, backend, device):
    for dtype in (torch.float32, HALF):
        x = activation((2, 4, 3, 5), device, layout, dtype)
        for op, args in ((attention_map, ()), (attention_transfer, (target_for(x),))):
            _, dx = value_and_grad(op, x, *args, cotangent=torch.ones((), device=device))
            assert dx.stride() == x.stride()


def test_backward_of_scaled_loss_and_of_nothing(backend, device):
    x = activation((3, 4, 5, 2), device).requires_grad_()
    target = target_for(x)
    (once,) = torch.autograd.grad(attention_transfer(x, target), x)
    (3 * attention_transfer(x, target)).backward()
    torch.testing.assert_close(x.grad, 3 * once)
    assert not attention_map(x.detach()).requires_grad
    assert not attention_transfer(x.detach(), target).requires_grad
    with torch.no_grad():
        assert torch.equal(attention_map(x), attention_map(x.detach()))


def test_expanded_cotangent(backend, device):
    """Autograd hands over gradients of any strides: that of a sum is one number, expanded."""
    x = activation((2, 3, 4, 4), device).requires_grad_()
    weights = torch.randn(2, 16, device=device).T.contiguous().T
    (got,) = torch.autograd.grad((attention_map(x) * weights).sum() + attention_map(x).sum(), x)
    (eager,) = torch.autograd.grad((attention_map_ref(x) * weights).sum() + attention_map_ref(x).sum(), x)
    torch.testing.assert_close(got, eager)


def test_autocast_changes_nothing(backend, device):
    for C in (3, 16):
        x = activation((2, C, 4, 4), device, "channels_last")
        expected = value_and_grad(attention_map, x, cotangent=target_for(x))
        with torch.autocast(device, BFLOAT):
            got = value_and_grad(attention_map, x, cotangent=target_for(x))
            loss = value_and_grad(attention_transfer, x, expected[0].detach() / 2, cotangent=expected[0].sum())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        with torch.autocast(device, enabled=False):
            plain = value_and_grad(attention_transfer, x, expected[0].detach() / 2, cotangent=expected[0].sum())
        assert all(torch.equal(a, b) for a, b in zip(loss, plain, strict=True))


# extremes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sample_of_zeros(layout, backend, device):
    x = activation((3, 4, 3, 2), device, layout)
    x[1] = 0
    target = target_for(x)
    q, dq = assert_exact(attention_map, attention_map_ref, x)
    loss, dx = assert_exact(attention_transfer, attention_transfer_ref, x, target)
    assert not q[1].any() and not dq[1].any() and not dx[1].any()
    assert q.isfinite().all() and dq.isfinite().all() and dx.isfinite().all() and dx[0].any()


@pytest.mark.parametrize(
    ("scale", "eps"),
    [
        pytest.param(1e8, 1e-12, id="huge"),
        pytest.param(1e-4, 1e-12, id="small"),
        pytest.param(1e-7, 1e-12, id="below_eps"),
        pytest.param(1e-25, 1e-12, id="squares_vanish"),
        pytest.param(1.0, 8.0, id="above_and_below_eps"),
    ],
)
def test_scales(scale, eps, backend, device):
    x = activation((4, 5, 4, 3), device, scale=scale)
    if eps == 8.0:
        x[2:] *= 2
        norms = (x.square().mean(1).flatten(1)).norm(dim=1)
        assert (norms < eps).any() and (norms > eps).any()
    q, dq = assert_exact(attention_map, attention_map_ref, x, eps)
    loss, dx = assert_exact(attention_transfer, attention_transfer_ref, x, target_for(x), eps)
    assert all(value.isfinite().all() for value in (q, dq, loss, dx))


def test_constant_and_one_hot(backend, device):
    """Of a constant activation 1 / sqrt(H W) everywhere, of one position 1 there; no gradient but towards others."""
    q, _ = assert_exact(attention_map, attention_map_ref, torch.full((2, 3, 4, 4), -0.3, device=device))
    torch.testing.assert_close(q, torch.full((2, 16), 0.25, device=device))
    x = torch.zeros(2, 3, 4, 4, device=device)
    x[:, 1, 2, 3] = 5.0
    q, dx = assert_exact(attention_map, attention_map_ref, x)
    assert q.tolist() == [[0.0] * 11 + [1.0] + [0.0] * 4] * 2
    assert not dx.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_shows(bad, backend, device):
    x = activation((2, 3, 4, 4), device)
    x[1, 2, 0, 0] = bad
    q, dq = value_and_grad(attention_map, x, cotangent=torch.rand(2, 16, device=device))
    loss, dx = value_and_grad(attention_transfer, x, target_for(x), cotangent=torch.ones((), device=device))
    assert loss.isnan() and q[1].isnan().any() and dq[1].isnan().any() and dx[1].isnan().any()
    assert q[0].isfinite().all() and dq[0].isfinite().all() and dx[0].isfinite().all()


# properties


def test_properties_of_the_map(backend, device):
    x = activation((3, 6, 4, 5), device)
    q = attention_map(x)
    assert q.min() >= 0 and q.max() <= 1
    torch.testing.assert_close(q.norm(dim=1), torch.ones(3, device=device))
    assert torch.equal(attention_map(-4 * x), q)  # the unit falls out, bit for bit where it is a power of 2
    torch.testing.assert_close(attention_map(0.3 * x), q)
    order = torch.randperm(6, device=device)
    torch.testing.assert_close(attention_map(x[:, order]), q)
    torch.testing.assert_close(attention_map(torch.cat([x, x], 1)), q)  # and so does the number of channels
    flipped = attention_map(x.flip(3)).view(3, 4, 5).flip(2)
    torch.testing.assert_close(flipped.flatten(1), q)


def test_properties_of_the_loss(backend, device):
    x, teacher = (activation((3, C, 4, 5), device, seed=C) for C in (6, 11))
    target = attention_map(teacher)
    loss = attention_transfer(x, target)
    assert 0 < loss < 2 / 20
    per_sample = torch.stack([attention_transfer(x[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(per_sample.mean(), loss)  # a mean over the batch
    torch.testing.assert_close(attention_transfer(teacher, attention_map(x)), loss)  # symmetric
    torch.testing.assert_close(attention_transfer(5 * x, target), loss)
    # of its own map 0 but for rounding, and likewise its gradient, which always stands at right angles to x
    value, dx = value_and_grad(attention_transfer, teacher, target, cotangent=torch.ones((), device=device))
    assert value < 1e-12 and dx.abs().max() < 1e-7
    _, dx = value_and_grad(attention_transfer, x, target, cotangent=torch.ones((), device=device))
    assert (dx * x).flatten(1).sum(1).abs().max() < 1e-6 * (dx.norm() * x.norm())
    disjoint = torch.eye(20, device=device)[:3]  # one position each
    apart = attention_transfer(torch.eye(20, device=device)[5:8].view(3, 1, 4, 5), disjoint)
    assert apart.item() == pytest.approx(2 / 20)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_bit_for_bit(layout, backend, device):
    x = activation((8, 12, 8, 8), device, layout)
    cotangent = torch.tensor(0.3, device=device)
    for op, args in ((attention_map, ()), (attention_transfer, (target_for(x),))):
        first, second = (value_and_grad(op, x, *args, cotangent=cotangent) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# errors


def test_second_derivative_is_refused(backend, device):
    x = activation((2, 3, 4, 4), device).requires_grad_()
    with pytest.raises(RuntimeError, match="attention_map: no second derivative; use attention_map_ref"):
        torch.autograd.grad(attention_map(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_transfer: no second derivative; use attention_transfer_ref"):
        torch.autograd.grad(attention_transfer(x, target_for(x).detach()), x, create_graph=True)


X, T = torch.ones(2, 3, 4, 5), torch.ones(2, 20)
ERRORS = [
    pytest.param(lambda: attention_map([1.0]), TypeError, "attention_map: expected x to be a tensor", id="no_tensor"),
    pytest.param(lambda: attention_map(X.double()), TypeError, "float64; .*use attention_map_ref", id="float64"),
    pytest.param(lambda: attention_map(X.long()), TypeError, "expected x in float32", id="integers"),
    pytest.param(lambda: attention_map(X[:0]), ValueError, "non-empty x, .*drop the empty batch", id="empty"),
    pytest.param(lambda: attention_map(X[0]), ValueError, r"\(N, C, H, W\), got \(3, 4, 5\); use x\[None\]", id="3d"),
    pytest.param(lambda: attention_map(X, T), TypeError, "eps to be a python number, got Tensor", id="eps_tensor"),
    pytest.param(lambda: attention_map(X, True), TypeError, "python number, got bool; pass a float", id="eps_bool"),
    pytest.param(lambda: attention_map(X, 0), ValueError, "finite eps > 0 .*, got 0; 1e-12", id="eps_zero"),
    pytest.param(lambda: attention_map(X, 1e-50), ValueError, "that fp32 can hold, got 1e-50", id="eps_tiny"),
    pytest.param(lambda: attention_map(X, math.nan), ValueError, "finite eps > 0 .*, got nan", id="eps_nan"),
    pytest.param(lambda: attention_transfer(X[0], T), ValueError, "attention_transfer: expected x of", id="x_3d"),
    pytest.param(lambda: attention_transfer(X, [T]), TypeError, "target to be a tensor, got list", id="target_list"),
    pytest.param(lambda: attention_transfer(X, T.double()), TypeError, "expected target in", id="target_float64"),
    pytest.param(lambda: attention_transfer(X, T.view(2, 4, 5)), ValueError, r"shape \(2, 20\) .*pool", id="shape"),
    pytest.param(lambda: attention_transfer(X, T[:1]), ValueError, r"\(2, 20\) .*got \(1, 20\)", id="target_batch"),
    pytest.param(lambda: attention_transfer(X, T.to("meta")), ValueError, "expected one device", id="devices"),
    pytest.param(
        lambda: attention_transfer(X, T.clone().requires_grad_()), ValueError, "constant target, .*detach", id="grad"
    ),
    pytest.param(lambda: attention_transfer(X, T, -1.0), ValueError, "finite eps > 0 .*got -1.0", id="eps_negative"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


# GPU only


@pytest.mark.gpu
def test_no_synchronisation():
    x = activation((4, 16, 8, 8), "cuda").requires_grad_()
    target = attention_map(activation((4, 32, 8, 8), "cuda"))
    attention_transfer(x, target).backward()  # compiles
    attention_map(x).sum().backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_transfer(x, target).backward()
        attention_map(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_torch_compile():
    x, target = activation((4, 16, 8, 8), "cuda"), attention_map(activation((4, 32, 8, 8), "cuda"))
    torch.testing.assert_close(torch.compile(attention_map, fullgraph=True)(x), attention_map(x))
    compiled = torch.compile(attention_transfer, fullgraph=True)
    torch.testing.assert_close(compiled(x, target), attention_transfer(x, target))
