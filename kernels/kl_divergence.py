"""Kullback-Leibler divergence of two batches of logits: value and gradients from the logits alone.

With P = softmax(p_logits / T), Q = softmax(q_logits / T), in nats, as a sum over the K classes and
a mean over the N rows of the batch:

    KL = sum_k P_k (log P_k - log Q_k) >= 0
    dKL / dp_logits_k = P_k (log P_k - log Q_k - KL of the row) / (T N)
    dKL / dq_logits_k = (Q_k - P_k) / (T N)

Sources: Kullback & Leibler 1951, "On information and sufficiency". The temperature is that of
Hinton et al. 2015, arXiv:1503.02531, who multiply their loss by T^2. In zero-shot knowledge
transfer (Micaelli & Storkey 2019, arXiv:1905.09768) P is the teacher and Q the student; the student
minimises KL and the generator maximises it, through both networks. Its released code averages over
batch and classes at T = 1, without T^2: this value divided by K.

Everything follows from d = log Q_k - log P_k, a difference of logits less one number per row. As P
and Q both sum to 1,

    KL = sum_k P_k h(d),   h(d) = exp(d) - 1 - d >= 0,   P_k exp(d) = Q_k

No term of the sum is negative. For small |d| a series of h ~ d^2 / 2 avoids differences of larger
numbers. KL of nearly equal P and Q therefore keeps its relative accuracy. The CPU path sums
P_k (log P_k - log Q_k) instead: it has absolute accuracy, and never falls below 0. Nothing is
clamped: P_k = 0 leaves Q_k.

Traffic in passes over one (N, K) tensor of logits (4 N K bytes in fp32):
    eager  forward about 23, backward about 27: some 20 elementwise steps in all, and each step
           reads one or two tensors and writes one
    fused  forward 2 (each logit once), up to 4 where K > 4096; backward 4 (read 2, write 2)
    best possible ratio, forward and backward: 50 / 6 = 8
"""

import math

import torch

from kernels import _logits
from kernels._common import tl, triton
from kernels._logits import load_tile, locate_tile, probabilities, sum_rows


def kl_divergence_ref(p_logits, q_logits, temperature=1.0):
    """The definition in plain PyTorch: see kl_divergence.

    float64 stays float64; half precision goes to fp32.
    """
    dtype = torch.promote_types(p_logits.dtype, q_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    log_p = torch.log_softmax(p_logits.to(dtype) / temperature, dim=1)  # (N, K)
    log_q = torch.log_softmax(q_logits.to(dtype) / temperature, dim=1)  # (N, K)

    # A class that P rules out adds exp(-1e9) * finite = 0, whatever Q says.
    # A class that only Q rules out adds infinity.
    ruled_out = log_p == -math.inf
    log_p = log_p.masked_fill(ruled_out, -1e9)
    log_q = log_q.masked_fill(ruled_out, -1e9)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


@triton.jit
def _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, d = log Q - log P, Q - P and P h(d) of a tile, from the statistics of its rows."""
    p, q, d = probabilities(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)

    # |d| < 1: h from its Taylor series, cut off below 1e-8
    tail = 1 / 20160 + d * (1 / 181440 + d * (1 / 1814400 + d * (1 / 19958400)))
    tail = 1 / 360 + d * (1 / 2520 + d * tail)
    h = 0.5 * d * d * (1.0 + d * (1 / 3 + d * (1 / 12 + d * (1 / 60 + d * tail))))

    # |d| >= 1: P h = Q - P - P d, where little cancels
    near = tl.abs(d) < 1.0
    q_less_p = tl.where(near, p * (d + h), q - p)
    terms = tl.where(near, p * h, q_less_p - p * d)
    terms = tl.where(terms < 0.0, 0.0, terms)  # below 0 only where P and Q are subnormal
    return p, d, q_less_p, terms


@triton.jit
def _row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """What a tile adds to the sums of P d, of Q - P and of P h(d) of its rows."""
    p, d, q_less_p, terms = _row_terms(
        p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature
    )
    return tl.sum(p * d, 1), tl.sum(q_less_p, 1), tl.sum(terms, 1)


@triton.jit
def _kl_divergence_fwd_kernel(
    partials_ptr,  # (n_programs,) fp32 out: what these rows add to the batch mean
    stats_ptr,  # (6, N) fp32 out: max and sum of P, of Q (see _logits); sum of P d, sum of Q - P
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
    kl = sum_rows(
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
    tl.store(partials_ptr + pid, tl.sum(kl) * inv_n)


@triton.jit
def _kl_divergence_bwd_kernel(
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
    scale,  # 1 / (T N)
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
    p, d, q_less_p, _ = _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)

    # The sum of P d is -KL and that of Q - P is 0. Both are taken with these very d, so that an
    # error common to all d of a row cancels.
    grad = tl.load(grad_ptr).to(tl.float32) * scale
    if NEEDS_P:
        sum_pd = tl.load(stats_ptr + 4 * N + rows, mask=row_mask, other=0.0)
        dp = grad * p * (sum_pd[:, None] - d)
        dp_ptrs = dp_ptr + rows[:, None] * stride_dpn + cols[None, :] * stride_dpk
        tl.store(dp_ptrs, dp.to(dp_ptr.dtype.element_ty), mask=mask)
    if NEEDS_Q:
        sum_diff = tl.load(stats_ptr + 5 * N + rows, mask=row_mask, other=0.0)
        dq = grad * (q_less_p - p * sum_diff[:, None])
        dq_ptrs = dq_ptr + rows[:, None] * stride_dqn + cols[None, :] * stride_dqk
        tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


def _forward_torch(p_logits, q_logits, temperature, needs_p, needs_q):
    """The CPU path: value and gradients together, while P and Q are at hand.

    A gradient that is not needed is None.
    """
    if temperature != 1:
        p_logits = p_logits / temperature
        q_logits = q_logits / temperature
    log_p = torch.log_softmax(p_logits, 1)  # (N, K)
    log_q = torch.log_softmax(q_logits, 1)  # (N, K)

    # log P - log Q; a class that P rules out adds 0
    p_over_q = (log_p - log_q).masked_fill_(log_p == -math.inf, 0)
    p = log_p.exp_()
    kl = (p * p_over_q).sum(1, keepdim=True)  # (N, 1)

    scale = 1 / (temperature * len(p))
    dp = None
    dq = None
    if needs_p:
        dp = p_over_q.sub_(kl).mul_(p).mul_(scale)
    if needs_q:
        dq = log_q.exp_().sub_(p)
        row_sum = dq.sum(1, keepdim=True)  # 0 but for rounding
        dq = dq.addcmul_(p, row_sum, value=-1).mul_(scale)
    return kl.mean().clamp_min_(0), dp, dq


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        return _logits.forward(
            ctx, _kl_divergence_fwd_kernel, _forward_torch, p_logits, q_logits, temperature
        )

    @staticmethod
    def backward(ctx, grad):
        return _logits.backward(ctx, "kl_divergence", _kl_divergence_bwd_kernel, 1, grad)


def kl_divergence(p_logits, q_logits, temperature=1.0):
    """Kullback-Leibler divergence of the softmaxes of two batches of logits, as a batch mean.

    KL(P || Q) = sum_k P_k (log P_k - log Q_k) in nats, with P = softmax(p_logits / T),
    Q = softmax(q_logits / T). In distillation P is the teacher and Q the student.

    Args:
        p_logits: (N, K) logits, not probabilities; float32, float16 or bfloat16, any strides.
        q_logits: (N, K) logits of the other network; their dtype may differ from p_logits'.
        temperature: T, a positive python number. It divides both logits. The result is not
            multiplied by T^2.

    Returns:
        fp32 scalar >= 0, without upper bound; exactly 0 where the logits are equal.

    Raises:
        TypeError: logits are no tensors or of another dtype; temperature is no python number.
        ValueError: logits are empty, not 2-D, or of different shapes or devices; temperature is
            not positive and finite.

    Note:
        The sum over the classes is averaged over the batch alone ("batchmean"). Divide by K for
        the mean over both. Differentiable once, in both logits. A gradient that is not needed is
        not computed. A constant added to a row changes nothing. Not symmetric.

        A logit of -inf rules out a class. Ruled out by P or by both: the result is finite, the
        gradient of that p_logit 0. Ruled out by Q alone: the result is +inf, or NaN where P_k is
        too small for fp32 (0 * inf). In such a row the gradient of p_logits is infinite or NaN,
        and that of q_logits is the limit (Q_k - P_k) / (T N). A row of -inf only, a +inf or a NaN
        gives NaN.

    Example:
        >>> p_logits = torch.tensor([[0.0, 0.0]])
        >>> q_logits = torch.tensor([[0.0, -200.0]])
        >>> kl_divergence(p_logits, q_logits).item()  # log(1/2) + 200 / 2
        99.30685424804688
        >>> round(kl_divergence(q_logits, p_logits).item(), 4)  # the other way round: ln 2
        0.6931
    """
    _logits.check("kl_divergence", p_logits, q_logits, temperature)
    return _KLDivergence.apply(p_logits, q_logits, float(temperature))
