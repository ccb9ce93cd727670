"""What the divergences of two batches of logits (N, K) share: rows in tiles, their launches, the checks of arguments.

The forward reads each logit once where K <= 4096 and leaves six numbers a row, from which the backward forms both
gradients in one further reading. Softmax(p_logits / T) is P, softmax(q_logits / T) is Q.
"""

import math

import torch

from kernels import _common
from kernels._common import tl, triton


@triton.jit
def load_tile(row_ptrs, cols, stride, row_mask, K):
    """A (BLOCK_N, BLOCK_K) tile of logits in fp32; beyond the tensor -inf, which adds nothing to any sum."""
    mask = row_mask[:, None] & (cols < K)[None, :]
    return tl.load(row_ptrs[:, None] + cols[None, :] * stride, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def add_block(logits, row_max, row_sum, inv_temperature):
    """Maximum and sum of exponentials of rows, continued over one more block; blocks of -inf leave them alone."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_sum *= tl.exp((row_max - shift) * inv_temperature)
    return new_max, row_sum + tl.sum(tl.exp((logits - shift[:, None]) * inv_temperature), 1)


@triton.jit
def probabilities(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, Q and d = log Q - log P, at most 128, of a tile from the statistics of its rows."""
    z_p = p_logits - max_p[:, None]
    z_q = q_logits - max_q[:, None]
    # q_logits - p_logits is exact for nearly equal rows; rows far apart are shifted first, as a softmax does it
    close = tl.abs(max_q - max_p) < 1.0
    shift = tl.where(close, max_q - max_p, 0.0) * inv_temperature + tl.log(sum_q / sum_p)
    d = tl.where(close[:, None], q_logits - p_logits, z_q - z_p) * inv_temperature - shift[:, None]
    d = tl.where((p_logits == float("-inf")) & (q_logits == float("-inf")), 0.0, d)
    d = tl.where(d > 128.0, 128.0, d)  # beyond, P is 0 in fp32 and 0 * d has to be 0; NaN stays NaN
    return tl.exp(z_p * inv_temperature) / sum_p[:, None], tl.exp(z_q * inv_temperature) / sum_q[:, None], d


@triton.jit
def sum_rows(
    row_sums: tl.constexpr,  # a tile's logits, the four statistics of its rows, 1 / T -> three sums over its columns
    stats_ptr,  # (6, N) fp32: max, sum of exp((logit - max) / T) of P, then of Q; the first two sums
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_pn,  # strides of both logits along rows and classes
    stride_pk,
    stride_qn,
    stride_qk,
    inv_temperature,  # 1 / T
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K: every logit is read once
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A forward kernel's body: write the statistics of this program's rows, return their third sums (BLOCK_N,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < N
    p_rows = p_ptr + rows * stride_pn
    q_rows = q_ptr + rows * stride_qn

    # The first block stays in registers between the statistics and the sums; further blocks are read twice.
    p_logits = load_tile(p_rows, cols, stride_pk, row_mask, K)
    q_logits = load_tile(q_rows, cols, stride_qk, row_mask, K)
    nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    max_p, sum_p = add_block(p_logits, nothing, tl.zeros((BLOCK_N,), tl.float32), inv_temperature)
    max_q, sum_q = add_block(q_logits, nothing, tl.zeros((BLOCK_N,), tl.float32), inv_temperature)
    if not ONE_BLOCK:
        for start in range(BLOCK_K, K, BLOCK_K):
            next_p = load_tile(p_rows, start + cols, stride_pk, row_mask, K)
            next_q = load_tile(q_rows, start + cols, stride_qk, row_mask, K)
            max_p, sum_p = add_block(next_p, max_p, sum_p, inv_temperature)
            max_q, sum_q = add_block(next_q, max_q, sum_q, inv_temperature)

    first, second, third = row_sums(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature)
    if not ONE_BLOCK:
        for start in range(BLOCK_K, K, BLOCK_K):
            next_p = load_tile(p_rows, start + cols, stride_pk, row_mask, K)
            next_q = load_tile(q_rows, start + cols, stride_qk, row_mask, K)
            a, b, c = row_sums(next_p, next_q, max_p, sum_p, max_q, sum_q, inv_temperature)
            first += a
            second += b
            third += c

    tl.store(stats_ptr + rows, max_p, mask=row_mask)
    tl.store(stats_ptr + N + rows, sum_p, mask=row_mask)
    tl.store(stats_ptr + 2 * N + rows, max_q, mask=row_mask)
    tl.store(stats_ptr + 3 * N + rows, sum_q, mask=row_mask)
    tl.store(stats_ptr + 4 * N + rows, first, mask=row_mask)
    tl.store(stats_ptr + 5 * N + rows, second, mask=row_mask)
    return tl.where(row_mask, third, 0.0)


# Chosen by arithmetic, not yet measured on a GPU.
_SHORT = 512  # elements of a tile of several short rows: up to 8 a lane
_WARPS = ((1024, 4), (math.inf, 8))  # (up to so many classes in a block, warps): 8 a lane, 16 for 2048 and 4096


def tiling(K, max_block):
    """Block sizes and warps: several short rows to a program, one row, or one row in blocks."""
    block_k = min(triton.next_power_of_2(K), max_block)
    num_warps = next(warps for limit, warps in _WARPS if block_k <= limit)
    return {"BLOCK_N": max(1, _SHORT // block_k), "BLOCK_K": block_k, "num_warps": num_warps}


def forward(ctx, kernel, forward_torch, p_logits, q_logits, temperature):
    """An autograd function's forward: `kernel` on a GPU; on a CPU `forward_torch`, which forms the gradients too."""
    N, K = p_logits.shape
    if _common.runs_triton(p_logits):
        meta = tiling(K, max_block=4096)
        n_programs = triton.cdiv(N, meta["BLOCK_N"])
        partials = torch.empty(n_programs, device=p_logits.device, dtype=torch.float32)
        stats = torch.empty(6, N, device=p_logits.device, dtype=torch.float32)
        strides, one_block = (*p_logits.stride(), *q_logits.stride()), meta["BLOCK_K"] >= K
        kernel[(n_programs,)](
            partials, stats, p_logits, q_logits, N, K, *strides, 1 / temperature, 1 / N, one_block, **meta
        )
        value = partials.sum()
        ctx.save_for_backward(p_logits, q_logits, stats)
    else:
        value, dp, dq = forward_torch(p_logits.float(), q_logits.float(), temperature, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(dp, dq)
    ctx.temperature = temperature
    ctx.dtypes = p_logits.dtype, q_logits.dtype
    return value


def backward(ctx, op, kernel, factor, grad):
    """Its backward: gradients of both logits (None where not needed), scaled by factor / (T N); None for T."""
    _common.refuse_double_backward(op)
    if not _common.runs_triton(grad):
        dp_dq = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if dx is None else (grad * dx).to(dtype) for dx, dtype in dp_dq), None
    p_logits, q_logits, stats = ctx.saved_tensors
    needs_p, needs_q, _ = ctx.needs_input_grad
    N, K = p_logits.shape
    inv_temperature, scale = 1 / ctx.temperature, factor / (ctx.temperature * N)
    dp = torch.empty_like(p_logits) if needs_p else None
    dq = torch.empty_like(q_logits) if needs_q else None
    meta = tiling(K, max_block=1024)
    grid = (triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(K, meta["BLOCK_K"]))
    strides = [s for x in (dp, dq, p_logits, q_logits) for s in ((0, 0) if x is None else x.stride())]
    kernel[grid](
        dp, dq, grad, stats, p_logits, q_logits, N, K, *strides, inv_temperature, scale, needs_p, needs_q, **meta
    )
    return dp, dq, None


def check(op, p_logits, q_logits, temperature):
    """Raise, as the ops' docstrings have it, unless these are two batches of logits and a temperature."""
    _common.check_float(op, p_logits=p_logits, q_logits=q_logits)
    shapes = tuple(p_logits.shape), tuple(q_logits.shape)
    if p_logits.ndim != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"{op}: expected logits of one shape (N, K), got {shapes}; reshape them to rows")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        kind = type(temperature).__name__
        raise TypeError(f"{op}: expected temperature to be a python number, got {kind}; pass a float")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: expected a finite temperature > 0, got {temperature}; 1.0 changes nothing")
