"""js_divergence: definition, extremes and properties; what both divergences have in common: test_divergences.py."""

import math

import pytest
import torch
from helpers import assert_divergence_exact, logits, value_and_gradients

from kernels import js_divergence, js_divergence_ref

INF = math.inf


def test_ref_by_hand():
    # P = (1/2, 1/2), Q = (1/4, 3/4), M = (3/8, 5/8)
    expected = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) + 0.5 * (
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    )
    p_logits, q_logits = torch.tensor([[5.0, 5.0]]).double(), torch.tensor([[0.0, math.log(3)]]).double()
    assert js_divergence_ref(p_logits, q_logits).item() == pytest.approx(expected, rel=1e-7)
    # T = 2 on doubled logits is the same
    assert js_divergence_ref(2 * p_logits, 2 * q_logits, 2).item() == pytest.approx(expected, rel=1e-7)


def test_ref_is_an_entropy_difference():
    p_logits, q_logits = logits((4, 7), dtype=torch.float64)
    p, q = torch.softmax(p_logits, 1), torch.softmax(q_logits, 1)
    H_m, H_p, H_q = (torch.special.entr(x).sum(1) for x in ((p + q) / 2, p, q))
    expected = (H_m - (H_p + H_q) / 2).mean()
    assert js_divergence_ref(p_logits, q_logits).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-5])
def test_nearly_identical(difference, backend, device):
    """Never negative; and the kernel keeps four digits where eager has none: its terms do not cancel."""
    p_logits, noise = logits((4, 200), device)
    q_logits = p_logits + difference * noise
    value, *_ = assert_divergence_exact(js_divergence, p_logits, q_logits)
    exact = js_divergence_ref(p_logits.double(), q_logits.double())
    assert value >= 0
    if backend == "triton":
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)


EXTREMES = {
    "log-prob-200-in-both": ([[0.0, 1.0, -200.0], [1.0, 0.5, -200.0]], [[1.0, 0.0, -200.0], [0.0, 2.0, -201.0]]),
    "logits-1e4": ([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], [[-1e4, 1e4, 9999.0], [1e4, 1e4 - 1, -1e4]]),
    "ruled-out": ([[0.0, -INF, 1.0], [-INF, 0.0, 1.0]], [[1.0, -INF, 0.5], [0.0, -INF, 1.0]]),
    "one-class-left": ([[0.0, -INF, -INF], [0.0, 1.0, 2.0]], [[-INF, 0.0, -INF], [-INF, -INF, 0.0]]),
    "constants-apart": ([[1000.0, 1001.0, 999.0]], [[-1000.0, -999.5, -1001.0]]),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme, backend, device):
    p_logits, q_logits = (torch.tensor(x, device=device) for x in EXTREMES[extreme])
    fused = assert_divergence_exact(js_divergence, p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)
    for x, dx in ((p_logits, fused[1]), (q_logits, fused[2])):
        assert not dx[x == -INF].any()  # nothing pulls at a class that is ruled out


@pytest.mark.parametrize("first_block", [-INF, -3.0])
def test_long_rows_with_ruled_out_blocks(first_block, backend, device):
    p_logits, q_logits = logits((2, 4300), device)
    p_logits[0, :4096], q_logits[1, 4096:] = first_block, -INF
    fused = assert_divergence_exact(js_divergence, p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)


@pytest.mark.parametrize("bad", ["ruled-out-row", "nan", "+inf"])
def test_nan_shows(bad, backend, device):
    p_logits, q_logits = logits((2, 5), device)
    p_logits[1, slice(None) if bad == "ruled-out-row" else 2] = {"ruled-out-row": -INF, "nan": math.nan, "+inf": INF}[
        bad
    ]
    value, dp, dq = value_and_gradients(js_divergence, p_logits, q_logits, 1.0, 1.0)
    assert value.isnan() and dp[1].isnan().all() and dq[1].isnan().all()
    assert dp[0].isfinite().all() and dq[0].isfinite().all()  # the other row is as it was
    assert js_divergence_ref(p_logits, q_logits).isnan()


def test_properties(backend, device):
    p_logits, q_logits = logits((6, 9), device)
    value = js_divergence(p_logits, q_logits).item()
    assert 0 < value < math.log(2)
    assert js_divergence(q_logits, p_logits).item() == pytest.approx(value, rel=1e-6)
    constants = torch.arange(6, device=device)[:, None] * 8.0 - 20
    assert js_divergence(p_logits + constants, q_logits).item() == pytest.approx(value, rel=1e-5)
    order = torch.arange(8, -1, -1, device=device)
    assert js_divergence(p_logits[:, order], q_logits[:, order]).item() == pytest.approx(value, rel=1e-6)
    disjoint = js_divergence(1e3 * torch.eye(4, device=device), 1e3 * torch.eye(4, device=device).flip(0)).item()
    assert disjoint == pytest.approx(math.log(2), rel=1e-6)
