"""Jensen-Shannon divergence of two batches of logits: value and gradients from the logits alone.

With P = softmax(p_logits / T), Q = softmax(q_logits / T), M = (P + Q) / 2, in nats, and as a mean
over the N rows of the batch:

    JS = 1/2 KL(P || M) + 1/2 KL(Q || M),   0 <= JS <= ln 2
    dJS / dp_logits_k = P_k (log P_k - log M_k - KL(P || M)) / (2 T N),   and likewise for Q

Source: Lin 1991, "Divergence measures based on the Shannon entropy"; DeepInversion (Yin et al.
2019, arXiv:1912.08795), equation 8: R_compete = 1 - JS. The released code of DeepInversion computes
another quantity, here `js_released`: P, Q and M are clamped to [0.01, 0.99] and the KL is reversed,
KL(M || P) + KL(M || Q). It may exceed ln 2: two confident networks that disagree give 1.61. The
released code then clamps the result, which ends the gradient.

Everything follows from d = log Q_k - log P_k, a difference of logits less one number per row. With
e = exp(-|d|):

    log P_k - log M_k = ln 2 - max(d, 0) - log(1 + e)
    log Q_k - log M_k = ln 2 - max(-d, 0) - log(1 + e)
    JS = sum_k M_k g(d) / 2,   g(d) = d tanh(d / 2) - 2 log cosh(d / 2) >= 0

No term of the sum is negative. For small |d| a series of g ~ d^2 / 4 avoids differences of larger
numbers. JS of nearly equal P and Q therefore keeps its relative accuracy. The CPU path adds the two
KL instead: it has absolute accuracy, and never falls below 0. Nothing is clamped: P_k = 0 gives
0 * finite = 0.

Traffic in passes over one (N, K) tensor of logits (4 N K bytes in fp32):
    eager  forward about 38, backward about 64: some 17 elementwise steps each, and each step reads
           one or two tensors and writes one
    fused  forward 2 (each logit once), up to 4 where K > 4096; backward 4 (read 2, write 2)
    best possible ratio, forward and backward: 102 / 6 = 17
"""

import math

import torch

from kernels import _logits
from kernels._common import tl, triton
from kernels._logits import load_tile, locate_tile, probabilities, sum_rows


def js_divergence_ref(p_logits, q_logits, temperature=1.0):
    """The definition in plain PyTorch: see js_divergence.

    float64 stays float64; half precision goes to fp32.
    """
    dtype = torch.promote_types(p_logits.dtype, q_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    log_p = torch.log_softmax(p_logits.to(dtype) / temperature, dim=1)  # (N, K)
    log_q = torch.log_softmax(q_logits.to(dtype) / temperature, dim=1)  # (N, K)

    # A class that is ruled out: exp(-1e9) is 0 as exp(-inf) is, but 0 * -1e9 is 0 and not NaN.
    log_p = log_p.masked_fill(log_p == -math.inf, -1e9)
    log_q = log_q.masked_fill(log_q == -math.inf, -1e9)

    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # (N, K)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(1)  # (N,)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(1)  # (N,)
    return (kl_p + kl_q).mean() / 2


def js_released(p_logits, q_logits, temperature):
    """What the released code of DeepInversion calls JS, in plain PyTorch, for comparison.

    1/2 KL(M || P) + 1/2 KL(M || Q) of clamped probabilities: P, Q (N, K) and M = (P + Q) / 2 are
    clamped to [0.01, 0.99] after M was formed. In nats, as a mean over the batch. Where two
    confident networks disagree on 2 classes it is 1.61.
    """
    p = torch.softmax(p_logits.float() / temperature, 1)  # (N, K)
    q = torch.softmax(q_logits.float() / temperature, 1)  # (N, K)
    m = (p + q) / 2  # (N, K)

    p = p.clamp(0.01, 0.99)
    q = q.clamp(0.01, 0.99)
    m = m.clamp(0.01, 0.99)
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
    log_mean = 0.6931471805599453 - log_1p_e  # ln 2 - log(1 + e)
    g_far = 2.0 * log_mean - 2.0 * size * e / (1.0 + e)  # tanh = 1 - 2 e / (1 + e)
    p_far = log_mean - tl.maximum(d, 0.0)
    q_far = log_mean - tl.maximum(-d, 0.0)

    # |d| < 1: Taylor series in s = (d / 2)^2 of g and of log cosh(d / 2), cut off below 2e-8
    s = 0.25 * d * d
    tail = 21844 / 3274425 + s * (-929569 / 340540200 + s * 0.0011144963)
    tail = 62 / 1575 + s * (-691 / 42525 + s * tail)
    g_near = s * (1.0 + s * (-1 / 2 + s * (2 / 9 + s * (-17 / 180 + s * tail))))
    tail = 31 / 14175 + s * (-691 / 935550 + s * (10922 / 42567525))
    log_cosh = s * (1 / 2 + s * (-1 / 12 + s * (1 / 45 + s * (-17 / 2520 + s * tail))))

    near = size < 1.0
    p_over_m = tl.where(near, -0.5 * d - log_cosh, p_far)
    q_over_m = tl.where(near, 0.5 * d - log_cosh, q_far)
    g = tl.where(near, g_near, g_far)
    return p_over_m, q_over_m, g


@triton.jit
def _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, Q, log P - log M, log Q - log M and g of a tile, from the statistics of its rows."""
    p, q, d = probabilities(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    # Below -128, Q is 0 in fp32. A NaN stays NaN.
    d = tl.where(d < -128.0, -128.0, d)
    p_over_m, q_over_m, g = _log_ratios(d)
    return p, q, p_over_m, q_over_m, g


@triton.jit
def _row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """What a tile adds to KL(P || M), KL(Q || M) and four times JS of its rows."""
    p, q, p_over_m, q_over_m, g = _row_terms(
        p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature
    )
    kl_p = tl.sum(p * p_over_m, 1)
    kl_q = tl.sum(q * q_over_m, 1)
    four_js = tl.sum((p + q) * g, 1)
    return kl_p, kl_q, four_js


@triton.jit
def _js_divergence_fwd_kernel(
    partials_ptr,  # (n_programs,) fp32 out: what these rows add to the batch mean
    stats_ptr,  # (6, N) fp32 out: max and sum of P, of Q (see _logits); KL(P || M), KL(Q || M)
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_pn,  # from row to row of p_logits
    stride_pk,  # from class to class of p_logits
    stride_qn,  # the same two of q_logits
    stride_qk,
    inv_temperature,  # 1 / T
    inv_n,  # 1 / N
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K
    BLOCK_N: tl.constexpr,  # rows of a program
    BLOCK_K: tl.constexpr,  # classes of a tile
):
    four_js = sum_rows(
        _row_sums,
        stats_ptr,
        p_ptr,
        q_ptr,
        N,
        K,
        stride_pn,
        stride_pk,
        stride_qn,
        stride_qk,
        inv_temperature,
        ONE_BLOCK,
        BLOCK_N,
        BLOCK_K,
    )
    pid = tl.program_id(0).to(tl.int64)
    tl.store(partials_ptr + pid, tl.sum(four_js) * (0.25 * inv_n))


@triton.jit
def _js_divergence_bwd_kernel(
    dp_ptr,  # (N, K) out: gradient of p_logits; unused unless NEEDS_P
    dq_ptr,  # (N, K) out: gradient of q_logits; unused unless NEEDS_Q
    grad_ptr,  # () gradient of the loss in the result
    stats_ptr,  # (6, N) fp32, as the forward kernel wrote it
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_dpn,  # from row to row of dp
    stride_dpk,  # from class to class of dp
    stride_dqn,  # the same two of dq
    stride_dqk,
    stride_pn,  # of p_logits
    stride_pk,
    stride_qn,  # of q_logits
    stride_qk,
    inv_temperature,  # 1 / T
    scale,  # 1 / (2 T N)
    NEEDS_P: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of a program
    BLOCK_K: tl.constexpr,  # classes of a program
):
    rows, cols = locate_tile(K, BLOCK_N, BLOCK_K)
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

    p, q, p_over_m, q_over_m, _ = _row_terms(
        p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature
    )
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
    """The CPU path: value and gradients together, while P, Q and M are at hand.

    A gradient that is not needed is None.
    """
    # The clamp affects -inf alone.
    log_p = torch.log_softmax(p_logits / temperature, 1).clamp_min_(-1e9)  # (N, K)
    log_q = torch.log_softmax(q_logits / temperature, 1).clamp_min_(-1e9)  # (N, K)
    d = log_q - log_p

    # log((1 + e) / 2), in a form that keeps its relative accuracy around d = 0
    log_mean = (-d.abs()).expm1_().mul_(0.5).log1p_()
    p_over_m = (-d).clamp_max_(0).sub_(log_mean)  # log P - log M
    q_over_m = d.clamp_max_(0).sub_(log_mean)  # log Q - log M

    p = log_p.exp_()
    q = log_q.exp_()
    kl_p = (p * p_over_m).sum(1, keepdim=True)  # (N, 1)
    kl_q = (q * q_over_m).sum(1, keepdim=True)  # (N, 1)

    scale = 1 / (2 * len(p))
    js = (kl_p + kl_q).sum().mul_(scale).clamp_min_(0)

    dp = None
    dq = None
    if needs_p:
        dp = p_over_m.sub_(kl_p).mul_(p).mul_(scale / temperature)
    if needs_q:
        dq = q_over_m.sub_(kl_q).mul_(q).mul_(scale / temperature)
    return js, dp, dq


class _JSDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        return _logits.forward(
            ctx, _js_divergence_fwd_kernel, _forward_torch, p_logits, q_logits, temperature
        )

    @staticmethod
    def backward(ctx, grad):
        return _logits.backward(ctx, "js_divergence", _js_divergence_bwd_kernel, 0.5, grad)


def js_divergence(p_logits, q_logits, temperature=1.0):
    """Jensen-Shannon divergence of the softmaxes of two batches of logits, as a batch mean.

    JS = 1/2 KL(P || M) + 1/2 KL(Q || M) in nats, with P = softmax(p_logits / T),
    Q = softmax(q_logits / T), M = (P + Q) / 2.

    Args:
        p_logits: (N, K) logits, not probabilities; float32, float16 or bfloat16, any strides.
        q_logits: (N, K) logits of the other network; their dtype may differ from p_logits'.
        temperature: T, a positive python number. It divides both logits. The result is not
            multiplied by T^2.

    Returns:
        fp32 scalar in [0, ln 2], up to rounding at ln 2; exactly 0 where the logits are equal.

    Raises:
        TypeError: logits are no tensors or of another dtype; temperature is no python number.
        ValueError: logits are empty, not 2-D, or of different shapes or devices; temperature is
            not positive and finite.

    Note:
        Differentiable once, in both logits. A gradient that is not needed is not computed.
        A logit of -inf rules out a class: the result is finite and its gradient 0. A row of -inf
        only, a +inf or a NaN gives NaN. The divergence is symmetric, and a constant added to a row
        does not change it. For the quantity of the released code see the top of this file.

    Example:
        >>> p_logits = torch.tensor([[0.0, -200.0]])
        >>> q_logits = torch.tensor([[-200.0, 0.0]])
        >>> round(js_divergence(p_logits, q_logits).item(), 4)  # disjoint: ln 2
        0.6931
    """
    _logits.check("js_divergence", p_logits, q_logits, temperature)
    return _JSDivergence.apply(p_logits, q_logits, float(temperature))
