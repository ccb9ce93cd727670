"""Jensen-Shannon divergence of two batches of logits, value and gradient from logits alone.

With P = softmax(p_logits / T), Q = softmax(q_logits / T), M = (P + Q) / 2, in nats and as a mean over the batch:

    JS = 1/2 KL(P || M) + 1/2 KL(Q || M),   0 <= JS <= ln 2
    dJS / dp_logits_k = P_k (log P_k - log M_k - KL(P || M)) / (2 T N),   and likewise for Q

Source: Lin 1991, "Divergence measures based on the Shannon entropy"; DeepInversion (Yin et al. 2019,
arXiv:1912.08795) equation 8, R_compete = 1 - JS. The released DeepInversion code computes another quantity, here
`js_released`: P, Q and M clamped to [0.01, 0.99] and the KL reversed, KL(M || P) + KL(M || Q). That may exceed ln 2
(1.61 for two confident networks that disagree; its outer clamp then ends the gradient).

Everything follows from d = log Q_k - log P_k, a difference of logits less one number per row. With e = exp(-|d|):

    log P_k - log M_k = ln 2 - max(d, 0) - log(1 + e),   log Q_k - log M_k = ln 2 - max(-d, 0) - log(1 + e)
    JS = sum_k M_k g(d) / 2,   g(d) = d tanh(d / 2) - 2 log cosh(d / 2) >= 0

No term is negative, and with a series of g ~ d^2 / 4 for small |d| none is a difference of larger numbers: JS of
nearly equal P and Q keeps its relative accuracy (the CPU path adds up the two KL instead: absolute accuracy, and never
below 0). Nothing is clamped: P_k = 0 gives 0 * finite = 0.

Traffic in passes over one (N, K) tensor of logits (4 N K bytes in fp32):
    eager  forward about 38, backward about 64 (each of some 17 elementwise steps reads one or two and writes one)
    fused  forward 2 (each logit once), up to 4 where K > 4096; backward 4 (read 2, write 2)
    best possible ratio, forward and backward: 102 / 6 = 17
"""

import math

import torch

from kernels import _logits
from kernels._common import tl, triton
from kernels._logits import load_tile, probabilities, sum_rows


def js_divergence_ref(p_logits, q_logits, temperature=1.0):
    """The definition in plain PyTorch: see js_divergence. float64 stays float64, half precision goes to fp32."""
    dtype = torch.promote_types(torch.promote_types(p_logits.dtype, q_logits.dtype), torch.float32)
    log_p = torch.log_softmax(p_logits.to(dtype) / temperature, dim=1)  # (N, K)
    log_q = torch.log_softmax(q_logits.to(dtype) / temperature, dim=1)  # (N, K)
    # A class that is ruled out: exp(-1e9) is 0 like exp(-inf), and 0 * finite is 0 where 0 * inf is not.
    log_p = log_p.masked_fill(log_p == -math.inf, -1e9)
    log_q = log_q.masked_fill(log_q == -math.inf, -1e9)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(1)  # (N,)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(1)  # (N,)
    return (kl_p + kl_q).mean() / 2


def js_released(p_logits, q_logits, temperature):
    """What DeepInversion's released code computes for JS: 1/2 KL(M || P) + 1/2 KL(M || Q), of clamped probabilities.

    P, Q (N, K) and M = (P + Q) / 2 are clamped to [0.01, 0.99] after M was formed. Nats, mean over the batch (N rows);
    up to 1.61 where two sure networks disagree on 2 classes. Plain PyTorch, for comparison.
    """
    p, q = (torch.softmax(logits.float() / temperature, 1) for logits in (p_logits, q_logits))
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    return (m * (2 * m.log() - p.log() - q.log())).sum(1).mean() / 2


@triton.jit
def _log_ratios(d):
    """log P - log M, log Q - log M and g of d = log Q - log P in [-128, 128]."""
    size = tl.abs(d)
    e = tl.exp(-size)

    # |d| >= 1: log(1 + e) = 2 artanh(w), w = e / (2 + e) < 0.16, the series cut off below 4e-8
    w = e / (2.0 + e)
    w2 = w * w
    log_1p_e = 2.0 * w * (1.0 + w2 * (1 / 3 + w2 * (1 / 5 + w2 * (1 / 7))))
    g_far = 2.0 * (0.6931471805599453 - log_1p_e) - 2.0 * size * e / (1.0 + e)  # tanh = 1 - 2 e / (1 + e)
    p_far = (0.6931471805599453 - log_1p_e) - tl.maximum(d, 0.0)
    q_far = (0.6931471805599453 - log_1p_e) - tl.maximum(-d, 0.0)

    # |d| < 1: Taylor series in s = (d / 2)^2 of log cosh(d / 2) and of g, cut off below 2e-8
    s = 0.25 * d * d
    tail = 62 / 1575 + s * (-691 / 42525 + s * (21844 / 3274425 + s * (-929569 / 340540200 + s * 0.0011144963)))
    g_near = s * (1.0 + s * (-1 / 2 + s * (2 / 9 + s * (-17 / 180 + s * tail))))
    tail = 31 / 14175 + s * (-691 / 935550 + s * (10922 / 42567525))
    log_cosh = s * (1 / 2 + s * (-1 / 12 + s * (1 / 45 + s * (-17 / 2520 + s * tail))))

    near = size < 1.0
    p_over_m = tl.where(near, -0.5 * d - log_cosh, p_far)
    q_over_m = tl.where(near, 0.5 * d - log_cosh, q_far)
    return p_over_m, q_over_m, tl.where(near, g_near, g_far)


@triton.jit
def _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, Q, log P - log M, log Q - log M and g of a (BLOCK_N, BLOCK_K) tile from the statistics of its rows."""
    p, q, d = probabilities(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    p_over_m, q_over_m, g = _log_ratios(tl.where(d < -128.0, -128.0, d))  # beyond, Q is 0 in fp32; NaN stays NaN
    return p, q, p_over_m, q_over_m, g


@triton.jit
def _row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """What a tile adds to KL(P || M), KL(Q || M) and four times JS of its rows."""
    p, q, p_over_m, q_over_m, g = _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    return tl.sum(p * p_over_m, 1), tl.sum(q * q_over_m, 1), tl.sum((p + q) * g, 1)


@triton.jit
def _js_divergence_fwd_kernel(
    partials_ptr,  # (n_programs,) fp32: what these rows add to the batch mean
    stats_ptr,  # (6, N) fp32: max, sum of exp((logit - max) / T) of P, then of Q; KL(P || M), KL(Q || M)
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_pn,
    stride_pk,
    stride_qn,
    stride_qk,
    inv_temperature,
    inv_n,  # 1 / N
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    js = sum_rows(
        _row_sums, stats_ptr, p_ptr, q_ptr, N, K, stride_pn, stride_pk, stride_qn, stride_qk, inv_temperature,
        ONE_BLOCK, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64), tl.sum(js) * (0.25 * inv_n))


@triton.jit
def _js_divergence_bwd_kernel(
    dp_ptr,  # (N, K) gradient of p_logits; unused unless NEEDS_P
    dq_ptr,  # (N, K) gradient of q_logits; unused unless NEEDS_Q
    grad_ptr,  # () gradient of the loss in the result
    stats_ptr,  # (6, N) fp32, as the forward wrote it
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_dpn,
    stride_dpk,
    stride_dqn,
    stride_dqk,
    stride_pn,
    stride_pk,
    stride_qn,
    stride_qk,
    inv_temperature,
    scale,  # 1 / (2 T N)
    NEEDS_P: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = rows < N
    mask = row_mask[:, None] & (cols < K)[None, :]
    p_logits = load_tile(p_ptr + rows * stride_pn, cols, stride_pk, row_mask, K)
    q_logits = load_tile(q_ptr + rows * stride_qn, cols, stride_qk, row_mask, K)
    max_p = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
    sum_p = tl.load(stats_ptr + N + rows, mask=row_mask, other=1.0)
    max_q = tl.load(stats_ptr + 2 * N + rows, mask=row_mask, other=0.0)
    sum_q = tl.load(stats_ptr + 3 * N + rows, mask=row_mask, other=1.0)
    kl_p = tl.load(stats_ptr + 4 * N + rows, mask=row_mask, other=0.0)
    kl_q = tl.load(stats_ptr + 5 * N + rows, mask=row_mask, other=0.0)

    p, q, p_over_m, q_over_m, _ = _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    grad = tl.load(grad_ptr).to(tl.float32) * scale
    if NEEDS_P:
        dp = grad * p * (p_over_m - kl_p[:, None])
        dp_ptrs = dp_ptr + rows[:, None] * stride_dpn + cols[None, :] * stride_dpk
        tl.store(dp_ptrs, dp.to(dp_ptr.dtype.element_ty), mask=mask)
    if NEEDS_Q:
        dq = grad * q * (q_over_m - kl_q[:, None])
        dq_ptrs = dq_ptr + rows[:, None] * stride_dqn + cols[None, :] * stride_dqk
        tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


def _forward_torch(p_logits, q_logits, temperature, needs_p, needs_q):
    """Value and gradients (None where not needed) on the CPU: formed together, where P, Q and M are at hand."""
    log_p = torch.log_softmax(p_logits / temperature, 1).clamp_min_(-1e9)  # (N, K); -inf alone is affected
    log_q = torch.log_softmax(q_logits / temperature, 1).clamp_min_(-1e9)
    d = log_q - log_p
    log_mean = (-d.abs()).expm1_().mul_(0.5).log1p_()  # log((1 + e) / 2), which keeps its relative accuracy at d = 0
    p_over_m = (-d).clamp_max_(0).sub_(log_mean)  # log P - log M
    q_over_m = d.clamp_max_(0).sub_(log_mean)  # log Q - log M
    p, q = log_p.exp_(), log_q.exp_()
    kl_p = (p * p_over_m).sum(1, keepdim=True)
    kl_q = (q * q_over_m).sum(1, keepdim=True)
    scale = 1 / (2 * len(p))
    js = (kl_p + kl_q).sum().mul_(scale).clamp_min_(0)
    dp = p_over_m.sub_(kl_p).mul_(p).mul_(scale / temperature) if needs_p else None
    dq = q_over_m.sub_(kl_q).mul_(q).mul_(scale / temperature) if needs_q else None
    return js, dp, dq


class _JSDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        return _logits.forward(ctx, _js_divergence_fwd_kernel, _forward_torch, p_logits, q_logits, temperature)

    @staticmethod
    def backward(ctx, grad):
        return _logits.backward(ctx, "js_divergence", _js_divergence_bwd_kernel, 0.5, grad)


def js_divergence(p_logits, q_logits, temperature=1.0):
    """Jensen-Shannon divergence between the softmaxes of two batches of logits: nats, mean over the batch.

    JS = 1/2 KL(P || M) + 1/2 KL(Q || M), P = softmax(p_logits / T), Q = softmax(q_logits / T), M = (P + Q) / 2.

    Args:
        p_logits: (N, K) logits, not probabilities; float32, float16 or bfloat16, any strides.
        q_logits: (N, K) logits of the other network, not necessarily of the same dtype.
        temperature: T, a positive python number; divides both logits. No factor T^2 is applied to the result.

    Returns:
        fp32 scalar in [0, ln 2], up to rounding at ln 2; 0 exactly where the logits are equal.

    Raises:
        TypeError: logits that are no tensors or of another dtype, temperature that is no python number.
        ValueError: empty or not 2-D logits, unequal shapes or devices, a temperature not positive and finite.

    Note:
        Differentiable, once, in both logits; a gradient that is not needed is not computed. A logit of -inf is a
        class ruled out: finite result, gradient 0. A row of -inf only, a +inf or a NaN gives NaN. Symmetric, and
        unchanged by a constant added to a row. For the quantity of the released code see the top of this file.

    Example:
        >>> p_logits, q_logits = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
        >>> round(js_divergence(p_logits, q_logits).item(), 4)  # disjoint: ln 2
        0.6931
    """
    _logits.check("js_divergence", p_logits, q_logits, temperature)
    return _JSDivergence.apply(p_logits, q_logits, float(temperature))
