"""js_divergence: the definition by hand, bounds, ruled-out classes, the released variant.

What it shares with kl_divergence is in test_divergences.py, what all ops promise in
test_every_op.py.
"""

import math

import pytest
import torch
from helpers import assert_matches_definition, random_logits
from ops_table import JS_DIVERGENCE

import kernels

INF = math.inf


def test_definition_by_hand():
    # P = (1/2, 1/2), Q = (1/4, 3/4), M = (3/8, 5/8)
    kl_p = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    kl_q = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    p_logits = torch.tensor([[5.0, 5.0]]).double()
    q_logits = torch.tensor([[0.0, math.log(3)]]).double()
    value = kernels.js_divergence_ref(p_logits, q_logits)
    assert value.item() == pytest.approx((kl_p + kl_q) / 2, rel=1e-7)


def test_definition_is_an_entropy_difference():
    p_logits, q_logits = (x.double() for x in random_logits((4, 7)))
    p = torch.softmax(p_logits, 1)
    q = torch.softmax(q_logits, 1)
    H_m, H_p, H_q = (torch.special.entr(x).sum(1) for x in ((p + q) / 2, p, q))
    expected = (H_m - (H_p + H_q) / 2).mean()
    value = kernels.js_divergence_ref(p_logits, q_logits)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_released_variant_by_hand():
    """P = (1, 0, 0) and Q = (0, 1, 0) are clamped to 0.99 and 0.01, M is (1/2, 1/2, 0.01)."""
    p_logits = torch.tensor([[200.0, 0.0, 0.0]])
    q_logits = torch.tensor([[0.0, 200.0, 0.0]])
    expected = math.log(0.5) - (math.log(0.99) + math.log(0.01)) / 2
    value = kernels.js_released(p_logits, q_logits, 1.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert value > 1.6 > math.log(2)


@pytest.mark.parametrize(
    ("p_logits", "q_logits"),
    [
        pytest.param(
            [[0.0, -INF, 1.0], [-INF, 0.0, 1.0]],
            [[1.0, -INF, 0.5], [0.0, -INF, 1.0]],
            id="one-class",
        ),
        pytest.param(
            [[0.0, -INF, -INF], [0.0, 1.0, 2.0]],
            [[-INF, 0.0, -INF], [-INF, -INF, 0.0]],
            id="all-but-one-class",
        ),
    ],
)
def test_classes_that_one_side_rules_out(p_logits, q_logits, backend, device):
    args = {
        "p_logits": torch.tensor(p_logits, device=device),
        "q_logits": torch.tensor(q_logits, device=device),
    }
    got = assert_matches_definition(JS_DIVERGENCE, args)
    for name, gradient in got.gradients.items():
        assert gradient.isfinite().all()
        assert not gradient[args[name] == -INF].any()  # nothing pulls at a ruled-out class


def test_long_rows_where_q_alone_rules_out_a_block(backend, device):
    p_logits, q_logits = random_logits((2, 4300), device)
    q_logits[1, 4096:] = -INF
    got = assert_matches_definition(JS_DIVERGENCE, {"p_logits": p_logits, "q_logits": q_logits})
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


def test_symmetric_and_at_most_ln_2(backend, device):
    p_logits, q_logits = random_logits((6, 9), device)
    value = kernels.js_divergence(p_logits, q_logits).item()
    assert 0 < value < math.log(2)
    assert kernels.js_divergence(q_logits, p_logits).item() == pytest.approx(value, rel=1e-6)

    one_hot = 1e3 * torch.eye(4, device=device)
    disjoint = kernels.js_divergence(one_hot, one_hot.flip(0)).item()
    assert disjoint == pytest.approx(math.log(2), rel=1e-6)
