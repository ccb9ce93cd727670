"""kl_divergence: definition, kernel and CPU path against it, extremes, properties, errors."""

import doctest
import importlib
import inspect
import math

import pytest
import torch
from helpers import assert_as_exact_as_eager

from kernels import kl_divergence, kl_divergence_ref

INF = math.inf
SHAPES = [
    pytest.param((1, 1), 1.0, id="smallest"),
    pytest.param((3, 5), 2.0, id="odd"),
    pytest.param((70, 10), 3.0, id="cifar"),
    pytest.param((33, 16), 0.5, id="rows-of-a-program+1"),
    pytest.param((3, 1000), 3.0, id="imagenet"),
    pytest.param((2, 1025), 1.0, id="backward-block+1"),
    pytest.param((2, 4095), 1.0, id="block-1"),
    pytest.param((2, 4096), 20.0, id="block"),
    pytest.param((2, 4097), 1.0, id="block+1"),
    pytest.param((2, 21841), 1.0, id="imagenet-21k"),
]


def logits(shape, device="cpu", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(2))


def value_and_gradients(op, p_logits, q_logits, temperature, cotangent):
    p_logits, q_logits = (x.detach().requires_grad_() for x in (p_logits, q_logits))
    kl = op(p_logits, q_logits, temperature)
    return kl, *torch.autograd.grad(cotangent * kl, (p_logits, q_logits))


def assert_exact(p_logits, q_logits, temperature=1.0, cotangent=-1.37):
    """The value and both gradients, by the measured-tolerance rule."""
    pair = p_logits, q_logits
    fused = value_and_gradients(kl_divergence, *pair, temperature, cotangent)
    exact = value_and_gradients(kl_divergence_ref, *(x.double() for x in pair), temperature, cotangent)
    eager = value_and_gradients(kl_divergence_ref, *(x.float() for x in pair), temperature, cotangent)
    assert fused[0].dtype == torch.float32 and fused[0].shape == ()
    assert [x.dtype for x in fused[1:]] == [x.dtype for x in pair]
    for name, *values in zip(("value", "dp", "dq"), fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)
    return fused


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_ref_gradcheck(layout):
    pair = [x if layout == "contiguous" else x.T.contiguous().T for x in logits((3, 5), dtype=torch.float64)]
    assert torch.autograd.gradcheck(kl_divergence_ref, (*(x.requires_grad_() for x in pair), 3.0))


def test_ref_by_hand():
    # P = (1/2, 1/2), Q = (1/4, 3/4)
    forward, reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    half, quarter = torch.tensor([[5.0, 5.0]]).double(), torch.tensor([[0.0, math.log(3)]]).double()
    assert kl_divergence_ref(half, quarter).item() == pytest.approx(forward, rel=1e-7)
    assert kl_divergence_ref(quarter, half).item() == pytest.approx(reverse, rel=1e-7)
    # T = 2 on doubled logits is the same
    assert kl_divergence_ref(2 * half, 2 * quarter, 2).item() == pytest.approx(forward, rel=1e-7)
    # a mean over the rows, whatever the number of classes
    both = torch.cat([half, quarter]), torch.cat([quarter, half])
    assert kl_divergence_ref(*both).item() == pytest.approx((forward + reverse) / 2, rel=1e-7)


def test_ref_is_the_batch_mean_of_torch():
    p_logits, q_logits = logits((4, 7), dtype=torch.float64)
    for temperature in (1.0, 4.0):
        log_p, log_q = (torch.log_softmax(x / temperature, 1) for x in (p_logits, q_logits))
        value = kl_divergence_ref(p_logits, q_logits, temperature).item()
        expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        assert value == pytest.approx(expected.item(), rel=1e-12)
        released = torch.nn.functional.kl_div(log_q, log_p.exp()).item()  # zero-shot knowledge transfer's mean
        assert value / p_logits.shape[1] == pytest.approx(released, rel=1e-12)


def test_gradients_are_the_formulas(backend, device):
    p_logits, q_logits = logits((4, 7), device)
    log_p, log_q = (torch.log_softmax(x.double() / 4, 1) for x in (p_logits, q_logits))
    row_kl = (log_p.exp() * (log_p - log_q)).sum(1, keepdim=True)
    expected_dp = log_p.exp() * (log_p - log_q - row_kl) / (4 * 4)
    expected_dq = (log_q.exp() - log_p.exp()) / (4 * 4)
    _, dp, dq = value_and_gradients(kl_divergence, p_logits, q_logits, 4.0, 1.0)
    torch.testing.assert_close(dp.double(), expected_dp, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dq.double(), expected_dq, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("shape", "temperature"), SHAPES)
def test_matches_ref(shape, temperature, backend, device):
    assert_exact(*logits(shape, device), temperature)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_layouts(layout, backend, device):
    p_logits, q_logits = logits((5, 12), device)
    p_logits = {
        "transposed": lambda x: x.T.contiguous().T,
        "sliced": lambda x: torch.nn.functional.pad(x, (1, 11), value=9.0)[:, 1::2],
        "offset": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
        "expanded": lambda x: x[:1].expand(x.shape),
    }[layout](p_logits)
    assert_exact(p_logits, q_logits)
    assert_exact(q_logits, p_logits)


@pytest.mark.parametrize(
    ("p_dtype", "q_dtype"),
    [
        pytest.param(torch.float16, torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
        pytest.param(torch.float32, torch.bfloat16, id="fp32-and-bf16"),
    ],
)
def test_dtypes(p_dtype, q_dtype, backend, device):
    p_logits, q_logits = logits((9, 33), device)
    assert_exact(p_logits.to(p_dtype), q_logits.to(q_dtype), 2.0)


@pytest.mark.parametrize("needs", ["p", "q", "none"])
def test_inputs_that_need_no_grad(needs, backend, device):
    pair = logits((5, 12), device)
    p_logits, q_logits = (x.requires_grad_(name == needs) for name, x in zip("pq", pair, strict=True))
    kl = kl_divergence(p_logits, q_logits)
    assert kl.requires_grad == (needs != "none")
    if needs == "none":
        return
    (3 * kl).backward()
    both = value_and_gradients(kl_divergence, p_logits, q_logits, 1.0, 3.0)[1:]
    assert [x is None for x in (p_logits.grad, q_logits.grad)] == [needs == "q", needs == "p"]
    assert torch.equal(p_logits.grad, both[0]) if needs == "p" else torch.equal(q_logits.grad, both[1])


@pytest.mark.parametrize("K", [6, 4200])
def test_identical(K, backend, device):
    p_logits, _ = logits((3, K), device)
    p_logits[2] = 7.0  # constant: both uniform
    value, dp, dq = value_and_gradients(kl_divergence, p_logits, p_logits.clone(), 3.0, 1.0)
    assert value.item() == 0 and not dp.any() and not dq.any()


@pytest.mark.parametrize(("difference", "rel"), [(1e-1, 1e-4), (1e-3, 1e-4), (1e-5, 1e-2)])
def test_nearly_identical(difference, rel, backend, device):
    """Never negative; and the kernel keeps digits where eager has none: its terms do not cancel."""
    p_logits, noise = logits((4, 200), device)
    q_logits = p_logits + difference * noise
    value, *gradients = assert_exact(p_logits, q_logits, cotangent=1.0)
    exact = value_and_gradients(kl_divergence_ref, p_logits.double(), q_logits.double(), 1.0, 1.0)
    assert value >= 0
    for dx, expected in zip(gradients, exact[1:], strict=True):
        assert (dx.sum(1).abs() < 1e-5 * dx.abs().sum(1)).all()  # adding a constant to a row changes nothing
        if backend == "triton":
            assert (dx - expected).abs().max() < 1e-5 * expected.abs().max()
    if backend == "triton":
        assert value.item() == pytest.approx(exact[0].item(), rel=rel)


def test_both_sides_of_the_series(backend, device):
    """log Q - log P of one class on either side of the bound between series and closed form."""
    for d in (-1.001, -0.999, -0.3, 0.3, 0.999, 1.001):
        q = torch.tensor([[math.exp(d) / 4, *[(1 - math.exp(d) / 4) / 3] * 3]], dtype=torch.float64, device=device)
        p_logits, q_logits = torch.zeros(1, 4, device=device), q.log().float()
        value, *_ = assert_exact(p_logits, q_logits)
        exact = kl_divergence_ref(p_logits.double(), q_logits.double())
        if backend == "triton":
            assert value.item() == pytest.approx(exact.item(), rel=1e-6)


EXTREMES = {
    "log-prob-200-in-both": ([[0.0, 1.0, -200.0], [1.0, 0.5, -200.0]], [[1.0, 0.0, -200.0], [0.0, 2.0, -201.0]]),
    "log-prob-200-in-one": ([[0.0, 1.0, 0.5], [0.0, 1.0, -200.0]], [[1.0, 0.0, -200.0], [0.0, 2.0, 3.0]]),
    "logits-1e4": ([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], [[-1e4, 1e4, 9999.0], [1e4, 1e4 - 1, -1e4]]),
    "ruled-out-in-both": ([[0.0, -INF, 1.0], [0.0, 1.0, -INF]], [[1.0, -INF, 0.5], [0.0, 2.0, -INF]]),
    "ruled-out-in-p": ([[0.0, -INF, 1.0], [-INF, -INF, 2.0]], [[1.0, 2.0, 0.5], [0.0, -300.0, 1.0]]),
    "one-class-left-in-both": ([[0.0, -INF, -INF], [0.0, 1.0, 2.0]], [[7.0, -INF, -INF], [2.0, 0.0, 0.0]]),
    "constants-apart": ([[1000.0, 1001.0, 999.0]], [[-1000.0, -999.5, -1001.0]]),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme, backend, device):
    p_logits, q_logits = (torch.tensor(x, device=device) for x in EXTREMES[extreme])
    fused = assert_exact(p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)
    assert not fused[1][p_logits == -INF].any()  # nothing pulls at a class that is ruled out
    assert not fused[2][(p_logits == -INF) & (q_logits == -INF)].any()


def test_ruled_out_by_q_alone(backend, device):
    """The value is infinite, the gradient of Q its limit, that of P shows; the other row is as it was."""
    p_logits, q_logits = logits((2, 5), device)
    q_logits[1, 2] = p_logits[1, 4] = -INF
    value, dp, dq = value_and_gradients(kl_divergence, p_logits, q_logits, 2.0, 1.0)
    assert value.item() == kl_divergence_ref(p_logits, q_logits, 2.0).item() == INF
    assert not dp[1].isfinite().any() and dp[0].isfinite().all()
    limit = (torch.softmax(q_logits / 2, 1) - torch.softmax(p_logits / 2, 1)) / (2 * 2)
    torch.testing.assert_close(dq, limit, rtol=1e-5, atol=1e-7)
    p_logits[1, 2] = -500.0  # P is 0 in fp32
    assert not kl_divergence(p_logits, q_logits).isfinite()


def test_long_rows_with_ruled_out_blocks(backend, device):
    p_logits, q_logits = logits((2, 4300), device)
    p_logits[0, :4096], p_logits[1, 4096:], q_logits[1, 4096:] = -INF, -INF, -INF
    fused = assert_exact(p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)


@pytest.mark.parametrize("bad", ["ruled-out-row", "nan", "+inf"])
def test_nan_shows(bad, backend, device):
    for side in (0, 1):
        pair = logits((2, 5), device)
        broken = {"ruled-out-row": -INF, "nan": math.nan, "+inf": INF}[bad]
        pair[side][1, slice(None) if bad == "ruled-out-row" else 2] = broken
        value, dp, dq = value_and_gradients(kl_divergence, *pair, 1.0, 1.0)
        assert value.isnan() and dp[1].isnan().all() and dq[1].isnan().all()
        assert dp[0].isfinite().all() and dq[0].isfinite().all()  # the other row is as it was
        assert kl_divergence_ref(*pair).isnan()


def test_properties(backend, device):
    p_logits, q_logits = logits((6, 9), device)
    value = kl_divergence(p_logits, q_logits).item()
    assert value > 0
    assert abs(kl_divergence(q_logits, p_logits).item() - value) > 0.01 * value  # not symmetric
    constants = torch.arange(6, device=device)[:, None] * 8.0 - 20
    assert kl_divergence(p_logits + constants, q_logits).item() == pytest.approx(value, rel=1e-5)
    assert kl_divergence(p_logits, q_logits - constants).item() == pytest.approx(value, rel=1e-5)
    order = torch.arange(8, -1, -1, device=device)
    assert kl_divergence(p_logits[:, order], q_logits[:, order]).item() == pytest.approx(value, rel=1e-6)
    rows = torch.stack([kl_divergence(p_logits[i : i + 1], q_logits[i : i + 1]) for i in range(6)])
    assert rows.mean().item() == pytest.approx(value, rel=1e-6)  # the mean over the batch


@pytest.mark.parametrize(("N", "K"), [(40, 10), (4, 4200)])
def test_repeats_bit_for_bit(N, K, backend, device):
    first, second = (value_and_gradients(kl_divergence, *logits((N, K), device), 2.0, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(backend, device):
    pair = [x.bfloat16() for x in logits((5, 12), device)]
    expected = value_and_gradients(kl_divergence, *pair, 2.0, 0.3)
    with torch.autocast(device, torch.bfloat16):
        got = value_and_gradients(kl_divergence, *pair, 2.0, 0.3)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_backward_raises(backend, device):
    p_logits, q_logits = (x.requires_grad_() for x in logits((2, 3), device))
    for x in (p_logits, q_logits):
        with pytest.raises(RuntimeError, match="kl_divergence: no second derivative; use kl_divergence_ref"):
            torch.autograd.grad(kl_divergence(p_logits, q_logits), x, create_graph=True)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param((ONES, [1.0]), TypeError, "kl_divergence: expected q_logits to be a tensor, got list", id="list"),
        pytest.param((ONES.long(), ONES), TypeError, "p_logits in float32, .* got torch.int64", id="integers"),
        pytest.param((ONES, ONES.double()), TypeError, "got torch.float64; .* use kl_divergence_ref", id="float64"),
        pytest.param((ONES[:0], ONES[:0]), ValueError, r"got shape \(0, 3\); drop the empty batch", id="empty"),
        pytest.param((ONES, ONES.T), ValueError, r"got \(\(2, 3\), \(3, 2\)\); reshape", id="unequal"),
        pytest.param((ONES[0], ONES[0]), ValueError, r"one shape \(N, K\), got \(\(3,\)", id="1-D"),
        pytest.param((ONES, ONES.to("meta")), ValueError, "expected one device, got .*'meta'", id="devices"),
        pytest.param((ONES, ONES, INF), ValueError, "finite temperature > 0, got inf", id="infinite"),
        pytest.param((ONES, ONES, 0), ValueError, "finite temperature > 0, got 0", id="zero"),
        pytest.param((ONES, ONES, math.nan), ValueError, "finite temperature > 0, got nan", id="nan"),
        pytest.param((ONES, ONES, ONES), TypeError, "python number, got Tensor; pass a float", id="tensor"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        kl_divergence(*args)


def test_signature_and_example():
    assert inspect.signature(kl_divergence) == inspect.signature(kl_divergence_ref)
    assert doctest.testmod(importlib.import_module("kernels.kl_divergence")).failed == 0


@pytest.mark.gpu
def test_no_synchronisation():
    pair = [x.requires_grad_() for x in logits((8, 1000), "cuda")]
    kl_divergence(*pair).backward()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kl_divergence(*pair).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_compiles_into_one_graph():
    pair = logits((8, 1000), "cuda")
    compiled = torch.compile(kl_divergence, fullgraph=True)
    assert compiled(*pair).item() == pytest.approx(kl_divergence(*pair).item(), rel=1e-6)
