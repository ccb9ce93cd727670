"""kl_divergence: the definition by hand, its gradients, asymmetry, classes that Q rules out.

What it shares with js_divergence is in test_divergences.py, what all ops promise in
test_every_op.py.
"""

import math

import pytest
import torch
from helpers import evaluate, random_logits

import kernels

INF = math.inf
PAIR = ("p_logits", "q_logits")


def test_definition_by_hand():
    half = torch.tensor([[5.0, 5.0]]).double()  # (1/2, 1/2)
    quarter = torch.tensor([[0.0, math.log(3)]]).double()  # (1/4, 3/4)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    kl = kernels.kl_divergence_ref
    assert kl(half, quarter).item() == pytest.approx(forward, rel=1e-7)
    assert kl(quarter, half).item() == pytest.approx(reverse, rel=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_definition_is_the_batch_mean_of_torch(temperature):
    p_logits, q_logits = (x.double() for x in random_logits((4, 7)))
    value = kernels.kl_divergence_ref(p_logits, q_logits, temperature).item()

    log_p, log_q = (torch.log_softmax(x / temperature, 1) for x in (p_logits, q_logits))
    kl_div = torch.nn.functional.kl_div
    expected = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert value == pytest.approx(expected.item(), rel=1e-12)

    # the released code of zero-shot knowledge transfer takes the mean over both
    released = kl_div(log_q, log_p.exp(), reduction="sum") / p_logits.numel()
    assert value / 7 == pytest.approx(released.item(), rel=1e-12)


def test_gradients_are_the_formulas(backend, device):
    p_logits, q_logits = random_logits((4, 7), device)
    log_p, log_q = (torch.log_softmax(x.double() / 3, 1) for x in (p_logits, q_logits))
    row_kl = (log_p.exp() * (log_p - log_q)).sum(1, keepdim=True)
    expected_dp = log_p.exp() * (log_p - log_q - row_kl) / (3 * 4)
    expected_dq = (log_q.exp() - log_p.exp()) / (3 * 4)

    args = {"p_logits": p_logits, "q_logits": q_logits, "temperature": 3.0}
    got = evaluate(kernels.kl_divergence, args, PAIR, [torch.ones((), device=device)])
    dp, dq = got.gradients.values()
    torch.testing.assert_close(dp.double(), expected_dp, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dq.double(), expected_dq, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-5])
def test_gradients_of_nearly_equal_logits(difference, backend, device):
    p_logits, noise = random_logits((4, 200), device)
    q_logits = p_logits + difference * noise
    one = [torch.ones((), device=device)]
    args = {"p_logits": p_logits, "q_logits": q_logits}
    exact_args = {"p_logits": p_logits.double(), "q_logits": q_logits.double()}
    got = evaluate(kernels.kl_divergence, args, PAIR, one)
    exact = evaluate(kernels.kl_divergence_ref, exact_args, PAIR, one)

    for name, dx in got.gradients.items():
        # adding a constant to a row changes nothing
        assert (dx.sum(1).abs() < 1e-5 * dx.abs().sum(1)).all()
        if backend == "triton":
            expected = exact.gradients[name]
            assert (dx - expected).abs().max() < 1e-5 * expected.abs().max()


def test_class_that_q_alone_rules_out(backend, device):
    """The value is infinite, the gradient of Q its limit, that of P shows it."""
    p_logits, q_logits = random_logits((2, 5), device)
    q_logits[1, 2] = -INF
    p_logits[1, 4] = -INF
    args = {"p_logits": p_logits, "q_logits": q_logits, "temperature": 2.0}
    got = evaluate(kernels.kl_divergence, args, PAIR, [torch.ones((), device=device)])
    dp, dq = got.gradients.values()
    assert got.results[0].item() == INF
    assert kernels.kl_divergence_ref(**args).item() == INF
    assert not dp[1].isfinite().any()
    assert dp[0].isfinite().all()  # the other row is as it was
    limit = (torch.softmax(q_logits / 2, 1) - torch.softmax(p_logits / 2, 1)) / (2 * 2)
    torch.testing.assert_close(dq, limit, rtol=1e-5, atol=1e-7)

    p_logits[1, 2] = -500.0  # P is 0 in fp32
    assert not kernels.kl_divergence(p_logits, q_logits).isfinite()


def test_not_symmetric(backend, device):
    p_logits, q_logits = random_logits((6, 9), device)
    value = kernels.kl_divergence(p_logits, q_logits).item()
    other = kernels.kl_divergence(q_logits, p_logits).item()
    assert abs(other - value) > 0.01 * value
