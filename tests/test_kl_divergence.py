"""kl_divergence: definition, extremes and properties; what both divergences have in common: test_divergences.py."""

import math

import pytest
import torch
from helpers import assert_divergence_exact, logits, value_and_gradients

from kernels import kl_divergence, kl_divergence_ref

INF = math.inf


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


@pytest.mark.parametrize(("difference", "rel"), [(1e-1, 1e-4), (1e-3, 1e-4), (1e-5, 1e-2)])
def test_nearly_identical(difference, rel, backend, device):
    """Never negative; and the kernel keeps digits where eager has none: its terms do not cancel."""
    p_logits, noise = logits((4, 200), device)
    q_logits = p_logits + difference * noise
    value, *gradients = assert_divergence_exact(kl_divergence, p_logits, q_logits, cotangent=1.0)
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
        value, *_ = assert_divergence_exact(kl_divergence, p_logits, q_logits)
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
    fused = assert_divergence_exact(kl_divergence, p_logits, q_logits)
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
    fused = assert_divergence_exact(kl_divergence, p_logits, q_logits)
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
