"""What js_divergence and kl_divergence share: tiles of logits, kernel launches, argument checks.

Both compare P = softmax(p_logits / T) with Q = softmax(q_logits / T) row by row. The forward pass
reads each logit once where K <= 4096. It leaves six numbers a row, from which the backward pass
forms both gradients while it reads the logits once more.
"""

import math

import torch

from kernels import _common
from kernels._common import tl, triton


@triton.jit
def load_tile(
    row_ptrs,  # (BLOCK_N,) where each row starts
    cols,  # (BLOCK_K,) classes to load
    stride,  # from class to class
    row_mask,  # (BLOCK_N,) rows that exist
    K,  # classes
):
    """Load a (BLOCK_N, BLOCK_K) tile of logits as fp32.

    Outside the tensor it holds -inf, which adds nothing to any of the sums.
    """
    ptrs = row_ptrs[:, None] + cols[None, :] * stride
    mask = row_mask[:, None] & (cols < K)[None, :]
    return tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def locate_tile(
    K,  # classes
    BLOCK_N: tl.constexpr,  # rows of a tile
    BLOCK_K: tl.constexpr,  # classes of a tile
):
    """The rows (BLOCK_N,) and the classes (BLOCK_K,) of this program of a backward kernel.

    Both are counted along the first axis of the grid: a GPU allows 65,535 programs on the others.
    """
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(K, BLOCK_K)
    rows = (pid // n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % n_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    return rows, cols


@triton.jit
def add_block(logits, row_max, row_sum, inv_temperature):
    """Continue the maximum and the sum of exponentials of each row over one more block.

    A block of -inf changes neither.
    """
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    row_sum *= tl.exp((row_max - shift) * inv_temperature)
    block_sum = tl.sum(tl.exp((logits - shift[:, None]) * inv_temperature), 1)
    return new_max, row_sum + block_sum


@triton.jit
def probabilities(p_logits, q_logits, max_p, sum_p, max_q, sum_q, inv_temperature):
    """P, Q and d = log Q - log P of a tile, from the statistics of its rows. d is at most 128."""
    z_p = p_logits - max_p[:, None]
    z_q = q_logits - max_q[:, None]

    # q_logits - p_logits is exact for rows that are nearly equal. Where the two maxima lie far
    # apart, the maxima are subtracted first, as a softmax does.
    close = tl.abs(max_q - max_p) < 1.0
    # The fast division of a GPU may miss 1 for equal sums.
    log_ratio = tl.where(sum_q == sum_p, 0.0, tl.log(sum_q / sum_p))
    shift = tl.where(close, max_q - max_p, 0.0) * inv_temperature + log_ratio
    difference = tl.where(close[:, None], q_logits - p_logits, z_q - z_p)
    d = difference * inv_temperature - shift[:, None]

    d = tl.where((p_logits == float("-inf")) & (q_logits == float("-inf")), 0.0, d)
    # Beyond 128, P is 0 in fp32 and 0 * d has to be 0. A NaN stays NaN.
    d = tl.where(d > 128.0, 128.0, d)

    p = tl.exp(z_p * inv_temperature) / sum_p[:, None]
    q = tl.exp(z_q * inv_temperature) / sum_q[:, None]
    return p, q, d


@triton.jit
def sum_rows(
    row_sums: tl.constexpr,  # function of a tile and its rows' statistics: three sums over columns
    stats_ptr,  # (6, N) fp32 out: max, sum of exp((logit - max) / T) of P, of Q; first two sums
    p_ptr,  # (N, K) logits
    q_ptr,  # (N, K) logits
    N,  # rows
    K,  # classes
    stride_pn,  # from row to row of p_logits
    stride_pk,  # from class to class of p_logits
    stride_qn,  # the same two of q_logits
    stride_qk,
    inv_temperature,  # 1 / T
    ONE_BLOCK: tl.constexpr,  # K <= BLOCK_K: every logit is read once
    BLOCK_N: tl.constexpr,  # rows of a program
    BLOCK_K: tl.constexpr,  # classes of a tile
):
    """The body of a forward kernel: write the statistics of this program's rows.

    Returns the third sum of each row (BLOCK_N,).
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < N
    p_rows = p_ptr + rows * stride_pn
    q_rows = q_ptr + rows * stride_qn

    # The first block stays in registers from the statistics to the sums; later ones are read twice.
    p_logits = load_tile(p_rows, cols, stride_pk, row_mask, K)
    q_logits = load_tile(q_rows, cols, stride_qk, row_mask, K)

    minus_inf = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    max_p, sum_p = add_block(p_logits, minus_inf, zero, inv_temperature)
    max_q, sum_q = add_block(q_logits, minus_inf, zero, inv_temperature)
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
            next_first, next_second, next_third = row_sums(
                next_p, next_q, max_p, sum_p, max_q, sum_q, inv_temperature
            )
            first += next_first
            second += next_second
            third += next_third

    tl.store(stats_ptr + rows, max_p, mask=row_mask)
    tl.store(stats_ptr + N + rows, sum_p, mask=row_mask)
    tl.store(stats_ptr + 2 * N + rows, max_q, mask=row_mask)
    tl.store(stats_ptr + 3 * N + rows, sum_q, mask=row_mask)
    tl.store(stats_ptr + 4 * N + rows, first, mask=row_mask)
    tl.store(stats_ptr + 5 * N + rows, second, mask=row_mask)
    return tl.where(row_mask, third, 0.0)


# Chosen by arithmetic, not yet measured on a GPU. With larger tiles, the compiler spills registers
# for some pairs of dtypes.
_WHOLE_ROW = 4096  # most classes that the forward pass holds at once
_PART_OF_ROW = 2048  # classes of a forward tile where there are more
_BACKWARD_BLOCK = 512  # most classes of a backward tile
_SHORT = 512  # elements of a tile that holds several short rows: 4 a lane
_WARPS = [  # (most classes in a tile, warps): up to 8 elements a lane, 16 for 4096 classes
    (1024, 4),
    (math.inf, 8),
]


def tiling(K, max_block):
    """Block sizes and warps: a program has several short rows, one row, or one row in blocks."""
    block_k = min(triton.next_power_of_2(K), max_block)
    block_n = max(1, _SHORT // block_k)
    num_warps = next(warps for limit, warps in _WARPS if block_k <= limit)
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps}


def forward(ctx, kernel, forward_torch, p_logits, q_logits, temperature):
    """The forward pass of both autograd functions.

    A GPU runs `kernel`. A CPU runs `forward_torch`, which forms the gradients too.
    """
    ctx.temperature = temperature
    ctx.dtypes = p_logits.dtype, q_logits.dtype

    if not _common.runs_triton(p_logits):
        needs_p, needs_q, _ = ctx.needs_input_grad
        value, dp, dq = forward_torch(
            p_logits.float(), q_logits.float(), temperature, needs_p, needs_q
        )
        ctx.save_for_backward(dp, dq)
        return value

    N, K = p_logits.shape
    max_block = _WHOLE_ROW if K <= _WHOLE_ROW else _PART_OF_ROW
    meta = tiling(K, max_block)
    n_programs = triton.cdiv(N, meta["BLOCK_N"])
    partials = torch.empty(n_programs, device=p_logits.device, dtype=torch.float32)
    stats = torch.empty(6, N, device=p_logits.device, dtype=torch.float32)
    with _common.on_device_of(p_logits):
        kernel[(n_programs,)](
            partials,
            stats,
            p_logits,
            q_logits,
            N,
            K,
            *p_logits.stride(),
            *q_logits.stride(),
            1 / temperature,
            1 / N,
            ONE_BLOCK=meta["BLOCK_K"] >= K,
            **meta,
        )
    ctx.save_for_backward(p_logits, q_logits, stats)
    return partials.sum()


def backward(ctx, op, kernel, factor, grad):
    """The backward pass of both: the gradient of each argument of `forward`'s autograd function.

    Both gradients carry the scale factor / (T N); one that is not needed is None.
    """
    _common.refuse_double_backward(op)
    if not _common.runs_triton(grad):
        dp, dq = ctx.saved_tensors
        p_dtype, q_dtype = ctx.dtypes
        if dp is not None:
            dp = (grad * dp).to(p_dtype)
        if dq is not None:
            dq = (grad * dq).to(q_dtype)
        return dp, dq, None

    p_logits, q_logits, stats = ctx.saved_tensors
    needs_p, needs_q, _ = ctx.needs_input_grad
    dp = torch.empty_like(p_logits) if needs_p else None
    dq = torch.empty_like(q_logits) if needs_q else None

    N, K = p_logits.shape
    meta = tiling(K, _BACKWARD_BLOCK)
    grid = (triton.cdiv(N, meta["BLOCK_N"]) * triton.cdiv(K, meta["BLOCK_K"]),)
    with _common.on_device_of(p_logits):
        kernel[grid](
            dp,
            dq,
            grad,
            stats,
            p_logits,
            q_logits,
            N,
            K,
            *_strides(dp),
            *_strides(dq),
            *p_logits.stride(),
            *q_logits.stride(),
            1 / ctx.temperature,
            factor / (ctx.temperature * N),
            NEEDS_P=needs_p,
            NEEDS_Q=needs_q,
            **meta,
        )
    return dp, dq, None


def _strides(x):
    return (0, 0) if x is None else x.stride()


def check(op, p_logits, q_logits, temperature):
    """Raise unless these are two batches of logits and a temperature."""
    _common.check_float(op, p_logits=p_logits, q_logits=q_logits)

    shapes = tuple(p_logits.shape), tuple(q_logits.shape)
    if p_logits.ndim != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"{op}: expected logits of one shape (N, K), got {shapes}; reshape them to rows"
        )

    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        kind = type(temperature).__name__
        raise TypeError(
            f"{op}: expected temperature to be a python number, got {kind}; pass a float"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: expected a finite temperature > 0, got {temperature}; 1.0 changes nothing"
        )
