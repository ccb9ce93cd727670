"""What js_divergence and kl_divergence have in common, beyond what all ops promise."""

import math

import pytest
import torch
from helpers import assert_matches_definition, evaluate, random_logits
from ops_table import JS_DIVERGENCE, KL_DIVERGENCE

import kernels

INF = math.inf
PAIR = ("p_logits", "q_logits")

each = pytest.mark.parametrize("op", [JS_DIVERGENCE, KL_DIVERGENCE], ids=["js", "kl"])


def fused(op):
    return getattr(kernels, op.name)


def definition(op):
    return getattr(kernels, f"{op.name}_ref")


def as_arguments(p_logits, q_logits, temperature=1.0):
    return {"p_logits": p_logits, "q_logits": q_logits, "temperature": temperature}


@each
@pytest.mark.parametrize("K", [6, 4200])
def test_equal_logits_give_exactly_zero(op, K, backend, device):
    p_logits, _ = random_logits((3, K), device)
    p_logits[2] = 7.0  # a constant row: both are uniform
    got = evaluate(fused(op), as_arguments(p_logits, p_logits.clone(), 3.0), PAIR)
    assert got.results[0].item() == 0
    assert not got.gradients["p_logits"].any()
    assert not got.gradients["q_logits"].any()


@pytest.mark.parametrize(
    ("op", "difference", "rel"),
    [
        pytest.param(JS_DIVERGENCE, 1e-1, 1e-4, id="js-1e-1"),
        pytest.param(JS_DIVERGENCE, 1e-3, 1e-4, id="js-1e-3"),
        pytest.param(JS_DIVERGENCE, 1e-5, 1e-4, id="js-1e-5"),
        pytest.param(KL_DIVERGENCE, 1e-1, 1e-4, id="kl-1e-1"),
        pytest.param(KL_DIVERGENCE, 1e-3, 1e-4, id="kl-1e-3"),
        pytest.param(KL_DIVERGENCE, 1e-5, 1e-2, id="kl-1e-5"),
    ],
)
def test_nearly_equal_logits_keep_digits(op, difference, rel, backend, device):
    """The value is never negative. The kernel keeps digits where eager loses all of them."""
    p_logits, noise = random_logits((4, 200), device)
    q_logits = p_logits + difference * noise
    value = assert_matches_definition(op, as_arguments(p_logits, q_logits)).results[0]
    assert value >= 0
    if backend == "triton":
        exact = definition(op)(p_logits.double(), q_logits.double())
        assert value.item() == pytest.approx(exact.item(), rel=rel)


@each
@pytest.mark.parametrize("d", [-1.001, -0.999, -0.3, 0.3, 0.999, 1.001])
def test_both_sides_of_the_bound_of_the_series(op, d, backend, device):
    """log Q - log P = d of one class: below 1 the kernel takes a series, above a closed form."""
    q_0 = math.exp(d) / 4
    q = torch.tensor([[q_0, *[(1 - q_0) / 3] * 3]], dtype=torch.float64, device=device)
    p_logits = torch.zeros(1, 4, device=device)
    q_logits = q.log().float()
    value = assert_matches_definition(op, as_arguments(p_logits, q_logits)).results[0]
    if backend == "triton":
        exact = definition(op)(p_logits.double(), q_logits.double())
        assert value.item() == pytest.approx(exact.item(), rel=1e-6)


EXTREMES = {
    "log-prob-200-in-both": (
        [[0.0, 1.0, -200.0], [1.0, 0.5, -200.0]],
        [[1.0, 0.0, -200.0], [0.0, 2.0, -201.0]],
    ),
    "log-prob-200-in-one": (
        [[0.0, 1.0, 0.5], [0.0, 1.0, -200.0]],
        [[1.0, 0.0, -200.0], [0.0, 2.0, 3.0]],
    ),
    "logits-1e4": (
        [[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]],
        [[-1e4, 1e4, 9999.0], [1e4, 1e4 - 1, -1e4]],
    ),
    "constants-apart": ([[1000.0, 1001.0, 999.0]], [[-1000.0, -999.5, -1001.0]]),
    "ruled-out-in-both": (
        [[0.0, -INF, 1.0], [0.0, 1.0, -INF]],
        [[1.0, -INF, 0.5], [0.0, 2.0, -INF]],
    ),
    "ruled-out-in-p": (
        [[0.0, -INF, 1.0], [-INF, -INF, 2.0]],
        [[1.0, 2.0, 0.5], [0.0, -300.0, 1.0]],
    ),
    "one-class-left-in-both": (
        [[0.0, -INF, -INF], [0.0, 1.0, 2.0]],
        [[7.0, -INF, -INF], [2.0, 0.0, 0.0]],
    ),
}


@each
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(op, extreme, backend, device):
    p_logits, q_logits = (torch.tensor(rows, device=device) for rows in EXTREMES[extreme])
    got = assert_matches_definition(op, as_arguments(p_logits, q_logits))
    dp, dq = got.gradients.values()
    assert dp.isfinite().all() and dq.isfinite().all()
    # nothing pulls at a class that is ruled out
    assert not dp[p_logits == -INF].any()
    assert not dq[q_logits == -INF].any()


@each
@pytest.mark.parametrize("first_block", [-INF, -3.0])
def test_long_rows_with_blocks_that_are_ruled_out(op, first_block, backend, device):
    p_logits, q_logits = random_logits((2, 4300), device)
    p_logits[0, :4096] = first_block
    p_logits[1, 4096:] = -INF
    q_logits[1, 4096:] = -INF
    got = assert_matches_definition(op, as_arguments(p_logits, q_logits))
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


@each
@pytest.mark.parametrize("bad", ["ruled-out-row", "nan", "+inf"])
def test_nan_shows(op, bad, backend, device):
    for side in PAIR:
        args = as_arguments(*random_logits((2, 5), device))
        if bad == "ruled-out-row":
            args[side][1] = -INF
        else:
            args[side][1, 2] = float(bad)

        got = evaluate(fused(op), args, PAIR)
        assert got.results[0].isnan()
        assert definition(op)(**args).isnan()
        for gradient in got.gradients.values():
            assert gradient[1].isnan().all()
            assert gradient[0].isfinite().all()  # the other row is as it was


@each
def test_what_changes_nothing(op, backend, device):
    p_logits, q_logits = random_logits((6, 9), device)
    value = fused(op)(p_logits, q_logits).item()
    assert value > 0

    constants = torch.arange(6, device=device)[:, None] * 8.0 - 20  # one for each row
    assert fused(op)(p_logits + constants, q_logits).item() == pytest.approx(value, rel=1e-5)
    assert fused(op)(p_logits, q_logits - constants).item() == pytest.approx(value, rel=1e-5)

    order = torch.arange(8, -1, -1, device=device)  # of the classes
    permuted = fused(op)(p_logits[:, order], q_logits[:, order])
    assert permuted.item() == pytest.approx(value, rel=1e-6)


@each
def test_result_is_the_mean_over_the_batch(op, backend, device):
    p_logits, q_logits = random_logits((6, 9), device)
    rows = [fused(op)(p_logits[i : i + 1], q_logits[i : i + 1]) for i in range(6)]
    value = fused(op)(p_logits, q_logits)
    assert torch.stack(rows).mean().item() == pytest.approx(value.item(), rel=1e-6)


@each
def test_temperature_divides_the_logits(op, backend, device):
    p_logits, q_logits = random_logits((6, 9), device)
    value = fused(op)(p_logits, q_logits).item()
    assert fused(op)(3 * p_logits, 3 * q_logits, 3.0).item() == pytest.approx(value, rel=1e-6)
