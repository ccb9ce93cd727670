"""Kullback-Leibler divergence of two batches of logits, value and both gradients from logits alone.

With P = softmax(p_logits / T), Q = softmax(q_logits / T), in nats, a sum over the classes and a mean over the batch:

    KL = sum_k P_k (log P_k - log Q_k) >= 0
    dKL / dp_logits_k = P_k (log P_k - log Q_k - KL of the row) / (T N)
    dKL / dq_logits_k = (Q_k - P_k) / (T N)

Source: Kullback & Leibler 1951, "On information and sufficiency"; the temperature: Hinton et al. 2015,
arXiv:1503.02531, who multiply their loss by T^2. Zero-shot knowledge transfer (Micaelli & Storkey 2019,
arXiv:1905.09768): P the teacher, Q the student, minimised over the student and maximised over the generator, through
both networks. Its released code averages over batch and classes, at T = 1 and without T^2: this value divided by K.

Everything follows from d = log Q_k - log P_k, a difference of logits less one number per row. As P and Q both sum to 1

    KL = sum_k P_k h(d),   h(d) = exp(d) - 1 - d >= 0,   P_k exp(d) = Q_k

No term is negative, and with a series of h ~ d^2 / 2 for small |d| none is a difference of larger numbers: KL of
nearly equal P and Q keeps its relative accuracy (the CPU path sums P_k (log P_k - log Q_k) instead: absolute accuracy,
and never below 0). Nothing is clamped: P_k = 0 leaves Q_k.

Traffic in passes over one (N, K) tensor of logits (4 N K bytes in fp32):
    eager  forward about 23, backward about 27 (of some 20 elementwise steps each reads one or two and writes one)
    fused  forward 2 (each logit once), up to 4 where K > 4096; backward 4 (read 2, write 2)
    best possible ratio, forward and backward: 50 / 6 = 8
"""

import math

import torch

from kernels import _common
from kernels._common import tl, triton


def kl_divergence_ref(p_logits, q_logits, temperature=1.0):
    """The definition in plain PyTorch: see kl_divergence. float64 stays float64, half precision goes to fp32."""
    dtype = torch.promote_types(torch.promote_types(p_logits.dtype, q_logits.dtype), torch.float32)
    log_p = torch.log_softmax(p_logits.to(dtype) / temperature, dim=1)  # (N, K)
    log_q = torch.log_softmax(q_logits.to(dtype) / temperature, dim=1)  # (N, K)
    # A class that P rules out adds exp(-1e9) * finite = 0, whatever Q says; one that only Q rules out adds infinity.
    ruled_out = log_p == -math.inf
    log_p, log_q = log_p.masked_fill(ruled_out, -1e9), log_q.masked_fill(ruled_out, -1e9)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


@triton.jit
def _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, d = log Q - log P, Q - P and P h(d) of a (BLOCK_N, BLOCK_K) tile from the statistics of its rows."""
    z_p = p_logits - max_p[:, None]
    z_q = q_logits - max_q[:, None]
    p = tl.exp(z_p * inv_temperature) / sum_p[:, None]
    q = tl.exp(z_q * inv_temperature) / sum_q[:, None]

    # q_logits - p_logits is exact for nearly equal rows; rows far apart are shifted first, as a softmax does it
    close = tl.abs(max_q - max_p) < 1.0
    shift = tl.where(close, max_q - max_p, 0.0) * inv_temperature + tl.log(sum_q / sum_p)
    d = tl.where(close[:, None], q_logits - p_logits, z_q - z_p) * inv_temperature - shift[:, None]
    d = tl.where((p_logits == float("-inf")) & (q_logits == float("-inf")), 0.0, d)
    d = tl.where(d > 128.0, 128.0, d)  # beyond, P is 0 in fp32 and 0 * d has to be 0; NaN stays NaN

    # |d| < 1: h from its Taylor series, cut off below 1e-8; elsewhere P h = Q - P - P d, of which most remains
    tail = 1 / 360 + d * (1 / 2520 + d * (1 / 20160 + d * (1 / 181440 + d * (1 / 1814400 + d * (1 / 19958400)))))
    h = 0.5 * d * d * (1.0 + d * (1 / 3 + d * (1 / 12 + d * (1 / 60 + d * tail))))
    near = tl.abs(d) < 1.0
    q_less_p = tl.where(near, p * (d + h), q - p)
    terms = tl.where(near, p * h, q_less_p - p * d)
    return p, d, q_less_p, tl.where(terms < 0.0, 0.0, terms)  # below 0 only where P and Q are subnormal


@triton.jit
def _row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """What a tile adds to the sums of P d, Q - P and P h(d) of its rows."""
    p, d, q_less_p, terms = _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    return tl.sum(p * d, 1), tl.sum(q_less_p, 1), tl.sum(terms, 1)


@triton.jit
def _add_block(logits, row_max, row_sum, inv_temperature):
    """Maximum and sum of exponentials of rows, continued over one more block; blocks of -inf leave them alone."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_sum *= tl.exp((row_max - shift) * inv_temperature)
    return new_max, row_sum + tl.sum(tl.exp((logits - shift[:, None]) * inv_temperature), 1)


@triton.jit
def _load(row_ptrs, cols, stride, row_mask, K):
    """A tile of logits in fp32; beyond the tensor -inf, which adds nothing to any sum."""
    mask = row_mask[:, None] & (cols < K)[None, :]
    return tl.load(row_ptrs[:, None] + cols[None, :] * stride, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _kl_divergence_fwd_kernel(
    partials_ptr,  # (n_programs,) fp32: what these rows add to the batch mean
    stats_ptr,  # (6, N) fp32: max, sum of exp((logit - max) / T) of P, then of Q; sum of P d, sum of Q - P
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
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K: every logit is read once
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < N
    p_rows = p_ptr + rows * stride_pn
    q_rows = q_ptr + rows * stride_qn

    # The first block stays in registers between the statistics and the sums; further blocks are read twice.
    p_logits = _load(p_rows, cols, stride_pk, row_mask, K)
    q_logits = _load(q_rows, cols, stride_qk, row_mask, K)
    nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    max_p, sum_p = _add_block(p_logits, nothing, tl.zeros((BLOCK_N,), tl.float32), inv_temperature)
    max_q, sum_q = _add_block(q_logits, nothing, tl.zeros((BLOCK_N,), tl.float32), inv_temperature)
    if not ONE_BLOCK:
        for start in range(BLOCK_K, K, BLOCK_K):
            next_p = _load(p_rows, start + cols, stride_pk, row_mask, K)
            next_q = _load(q_rows, start + cols, stride_qk, row_mask, K)
            max_p, sum_p = _add_block(next_p, max_p, sum_p, inv_temperature)
            max_q, sum_q = _add_block(next_q, max_q, sum_q, inv_temperature)

    sum_pd, sum_diff, kl = _row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    if not ONE_BLOCK:
        for start in range(BLOCK_K, K, BLOCK_K):
            next_p = _load(p_rows, start + cols, stride_pk, row_mask, K)
            next_q = _load(q_rows, start + cols, stride_qk, row_mask, K)
            more_pd, more_diff, more = _row_sums(next_p, next_q, max_p, sum_p, max_q, sum_q, inv_temperature)
            sum_pd += more_pd
            sum_diff += more_diff
            kl += more

    tl.store(stats_ptr + rows, max_p, mask=row_mask)
    tl.store(stats_ptr + N + rows, sum_p, mask=row_mask)
    tl.store(stats_ptr + 2 * N + rows, max_q, mask=row_mask)
    tl.store(stats_ptr + 3 * N + rows, sum_q, mask=row_mask)
    tl.store(stats_ptr + 4 * N + rows, sum_pd, mask=row_mask)
    tl.store(stats_ptr + 5 * N + rows, sum_diff, mask=row_mask)
    tl.store(partials_ptr + pid, tl.sum(tl.where(row_mask, kl, 0.0)) * inv_n)


@triton.jit
def _kl_divergence_bwd_kernel(
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
    scale,  # 1 / (T N)
    NEEDS_P: tl.constexpr,
    NEEDS_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = rows < N
    mask = row_mask[:, None] & (cols < K)[None, :]
    p_logits = _load(p_ptr + rows * stride_pn, cols, stride_pk, row_mask, K)
    q_logits = _load(q_ptr + rows * stride_qn, cols, stride_qk, row_mask, K)
    max_p = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
    sum_p = tl.load(stats_ptr + N + rows, mask=row_mask, other=1.0)
    max_q = tl.load(stats_ptr + 2 * N + rows, mask=row_mask, other=0.0)
    sum_q = tl.load(stats_ptr + 3 * N + rows, mask=row_mask, other=1.0)

    # sum P d is -KL and sum (Q - P) is 0, but with these very d: an error common to all d of a row falls out
    p, d, q_less_p, _ = _row_terms(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
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


def _tiling(K, max_block):
    """Block sizes and warps: several short rows to a program, one row, or one row in blocks."""
    block_k = min(triton.next_power_of_2(K), max_block)
    block_n = max(1, 512 // block_k)
    # elements of a tile     512, 1024: up to 8 a lane     2048, 4096: up to 16 a lane
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4 if block_k <= 1024 else 8}


def _forward_torch(p_logits, q_logits, temperature, needs_p, needs_q):
    """Value and gradients (None where not needed) on the CPU: formed together, where P and Q are at hand."""
    if temperature != 1:
        p_logits, q_logits = p_logits / temperature, q_logits / temperature
    log_p, log_q = torch.log_softmax(p_logits, 1), torch.log_softmax(q_logits, 1)  # (N, K)
    p_over_q = (log_p - log_q).masked_fill_(log_p == -math.inf, 0)  # log P - log Q; a class that P rules out adds 0
    p = log_p.exp_()
    kl = (p * p_over_q).sum(1, keepdim=True)  # (N, 1)
    scale = 1 / (temperature * len(p))
    dp = p_over_q.sub_(kl).mul_(p).mul_(scale) if needs_p else None
    dq = None
    if needs_q:
        dq = log_q.exp_().sub_(p)
        dq = dq.addcmul_(p, dq.sum(1, keepdim=True), value=-1).mul_(scale)  # its sum is 0 but for rounding
    return kl.mean().clamp_min_(0), dp, dq


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature):
        N, K = p_logits.shape
        if _common.runs_triton(p_logits):
            meta = _tiling(K, max_block=4096)
            n_programs = triton.cdiv(N, meta["BLOCK_N"])
            partials = torch.empty(n_programs, device=p_logits.device, dtype=torch.float32)
            stats = torch.empty(6, N, device=p_logits.device, dtype=torch.float32)
            strides, one_block = (*p_logits.stride(), *q_logits.stride()), meta["BLOCK_K"] >= K
            _kl_divergence_fwd_kernel[(n_programs,)](
                partials, stats, p_logits, q_logits, N, K, *strides, 1 / temperature, 1 / N, one_block, **meta
            )
            kl = partials.sum()
            ctx.save_for_backward(p_logits, q_logits, stats)
        else:
            kl, dp, dq = _forward_torch(p_logits.float(), q_logits.float(), temperature, *ctx.needs_input_grad[:2])
            ctx.save_for_backward(dp, dq)
        ctx.temperature = temperature
        ctx.dtypes = p_logits.dtype, q_logits.dtype
        return kl

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("kl_divergence")
        if not _common.runs_triton(grad):
            dp_dq = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            return *(None if dx is None else (grad * dx).to(dtype) for dx, dtype in dp_dq), None
        p_logits, q_logits, stats = ctx.saved_tensors
        needs_p, needs_q, _ = ctx.needs_input_grad
        N, K = p_logits.shape
        inv_temperature, scale = 1 / ctx.temperature, 1 / (ctx.temperature * N)
        dp = torch.empty_like(p_logits) if needs_p else None
        dq = torch.empty_like(q_logits) if needs_q else None
        meta = _tiling(K, max_block=1024)
        grid = (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(K, meta["BLOCK_K"]))
        strides = [s for x in (dp, dq, p_logits, q_logits) for s in ((0, 0) if x is None else x.stride())]
        _kl_divergence_bwd_kernel[grid](
            dp, dq, grad, stats, p_logits, q_logits, N, K, *strides, inv_temperature, scale, needs_p, needs_q, **meta
        )
        return dp, dq, None


def kl_divergence(p_logits, q_logits, temperature=1.0):
    """Kullback-Leibler divergence of softmax(q_logits) from softmax(p_logits): nats, mean over the batch.

    KL(P || Q) = sum_k P_k (log P_k - log Q_k), P = softmax(p_logits / T), Q = softmax(q_logits / T). In distillation
    P is the teacher, Q the student.

    Args:
        p_logits: (N, K) logits, not probabilities; float32, float16 or bfloat16, any strides.
        q_logits: (N, K) logits of the other network, not necessarily of the same dtype.
        temperature: T, a positive python number; divides both logits. No factor T^2 is applied to the result.

    Returns:
        fp32 scalar >= 0, without upper bound; 0 exactly where the logits are equal.

    Raises:
        TypeError: logits that are no tensors or of another dtype, temperature that is no python number.
        ValueError: empty or not 2-D logits, unequal shapes or devices, a temperature not positive and finite.

    Note:
        The sum over the classes is averaged over the batch alone ("batchmean"): divide by K for the mean over both.
        Differentiable, once, in both logits; a gradient that is not needed is not computed. Unchanged by a constant
        added to a row, not symmetric. A logit of -inf is a class ruled out. By P, or by both: finite, gradient 0 in
        that p_logit. By Q alone: +inf (NaN where P_k is too small for fp32, as in 0 * inf); in such a row the
        gradient of p_logits is infinite or NaN, that of q_logits the limit (Q_k - P_k) / (T N).
        A row of -inf only, a +inf or a NaN gives NaN.

    Example:
        >>> p_logits, q_logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -200.0]])
        >>> kl_divergence(p_logits, q_logits).item()  # log(1/2) + 200 / 2
        99.30685424804688
        >>> round(kl_divergence(q_logits, p_logits).item(), 4)  # the other way round: ln 2
        0.6931
    """
    _common.check_float("kl_divergence", p_logits=p_logits, q_logits=q_logits)
    shapes = tuple(p_logits.shape), tuple(q_logits.shape)
    if p_logits.ndim != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"kl_divergence: expected logits of one shape (N, K), got {shapes}; reshape them to rows")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        kind = type(temperature).__name__
        raise TypeError(f"kl_divergence: expected temperature to be a python number, got {kind}; pass a float")
    if not 0 < temperature < math.inf:
        raise ValueError(f"kl_divergence: expected a finite temperature > 0, got {temperature}; 1.0 changes nothing")
    return _KLDivergence.apply(p_logits, q_logits, float(temperature))
