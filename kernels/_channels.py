"""What the ops on channels share: x (N, C, *spatial) of any strides as tiles, and moments that are merged by Chan.

A tile is rows x columns. Columns are what lies densest in memory: the channels in channels_last, one run of H W in
NCHW (a program then works on one channel). Rows are all other positions, in up to four dimensions.
"""

import functools
import math

import torch

from kernels._common import tl, triton


@triton.jit
def row_offsets(rows, size_1, size_2, size_3, stride_0, stride_1, stride_2, stride_3):
    """Offsets of flat row indices; absent dimensions have size 1, which Triton folds away."""
    i_3, rows = rows % size_3, rows // size_3
    i_2, rows = rows % size_2, rows // size_2
    i_1, i_0 = rows % size_1, rows // size_1
    return i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2 + i_3 * stride_3


@triton.jit
def chan_merge(count, mean, m2):
    """Merge groups along axis 0: `count` values each, their mean and sum of squared deviations; count 0 is allowed."""
    total = tl.sum(count, 0)
    pooled = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    delta = mean - pooled
    residue = tl.sum(count * delta, 0) / tl.maximum(total, 1.0)  # what rounding left in `pooled`
    return total, pooled + residue, tl.sum(m2 + count * delta * delta, 0) - total * residue * residue


@triton.jit
def welford(x, mask, mean, m2, step):
    """Mean and sum of squared deviations of every lane after its value number `step` (Welford 1962)."""
    delta = tl.where(mask, x - mean, 0.0)
    mean += delta * (1.0 / step)
    return mean, m2 + delta * (x - mean)


@triton.jit
def store_partial(
    partial_ptr,  # (3, P, C), at this program's place: count, mean, sum of squared deviations
    stride_part,  # P C
    mask_c,  # channels of this program
    count,  # (BLOCK_ROW,) fp32: values in each row of lanes
    mask_col,  # (BLOCK_COL,)
    mean,  # (BLOCK_ROW, BLOCK_COL) fp32
    m2,  # (BLOCK_ROW, BLOCK_COL) fp32
    CHANNELS_INSIDE: tl.constexpr,  # columns are channels
):
    """Merge a program's lanes into one group for each of its channels and write that down."""
    count = count[:, None] * mask_col.to(tl.float32)[None, :]
    count, mean, m2 = chan_merge(count, mean, m2)  # (BLOCK_COL,)
    if not CHANNELS_INSIDE:
        count, mean, m2 = chan_merge(count, mean, m2)  # scalars
    tl.store(partial_ptr, count, mask=mask_c)
    tl.store(partial_ptr + stride_part, mean, mask=mask_c)
    tl.store(partial_ptr + 2 * stride_part, m2, mask=mask_c)


@triton.jit
def _merge_kernel(
    moments_ptr,  # (2, C) out: mean - shift, var
    partial_ptr,  # (3, P, C): count, mean - shift, sum of squared deviations
    n_channels,  # C
    n_partials,  # P
    BLOCK_PART: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    stride_part = n_partials * n_channels
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, n_partials, BLOCK_PART):
        parts = start + tl.arange(0, BLOCK_PART).to(tl.int64)
        offs = partial_ptr + parts[:, None] * n_channels + offs_c[None, :]
        mask = (parts < n_partials)[:, None] & mask_c[None, :]
        tile_count, tile_mean, tile_m2 = chan_merge(
            tl.load(offs, mask=mask, other=0.0),
            tl.load(offs + stride_part, mask=mask, other=0.0),
            tl.load(offs + 2 * stride_part, mask=mask, other=0.0),
        )
        share = tile_count / tl.maximum(count + tile_count, 1.0)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tile_m2 + delta * delta * count * share
        count += tile_count
    tl.store(moments_ptr + offs_c, mean, mask=mask_c)
    tl.store(moments_ptr + n_channels + offs_c, m2 / tl.maximum(count, 1.0), mask=mask_c)


# (up to so many elements of x, elements per tile, warps): small layers need many programs more than long ones.
# Chosen by arithmetic (16 values a thread, so two to four 16-byte loads in flight), not yet measured on a GPU.
_TILES = ((1 << 20, 2048, 4), (math.inf, 4096, 8))
_CHANNEL_BLOCK = 64  # most channels per tile in channels_last: 128 bytes of fp16 in a row, and rows left to reduce
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 1024, 4096  # aimed at; forward pays for each with a row of partials


@functools.lru_cache(maxsize=4096)
def plan(programs, shape, *strides):
    """How to launch about `programs` programs on tensors of one shape: grid, sizes, strides of each tensor, constants.

    Dimensions that are one run in memory in all tensors become one. A sweep over _TILES must call plan.cache_clear().
    """
    dims = [(n, [s[d] for s in strides]) for d, n in enumerate(shape) if d != 1 and n > 1]
    merged = []  # outermost first, by the strides of the first tensor; stride 0 goes outside
    for size, steps in sorted(dims, key=lambda dim: dim[1][0] or math.inf, reverse=True):
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], steps, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, steps))
    n_channels, channel_steps = shape[1], [s[1] for s in strides]
    densest = merged[-1][1][0] if merged else 0
    inside = not merged or (n_channels > 1 and (densest == 0 or 0 < channel_steps[0] < densest))
    n_columns, column_steps = (n_channels, channel_steps) if inside else merged.pop()
    merged += [(1, [0] * len(strides))] * (4 - len(merged))
    n_rows = math.prod([size for size, _ in merged])

    tile, num_warps = [blocks for limit, *blocks in _TILES if math.prod(shape) <= limit][0]
    block_col = min(triton.next_power_of_2(n_columns), _CHANNEL_BLOCK if inside else tile)
    block_row = min(triton.next_power_of_2(n_rows), tile // block_col)
    n_column_tiles, n_channel_programs = triton.cdiv(n_columns, block_col), 1 if inside else n_channels
    chunks = min(triton.cdiv(n_rows, block_row), max(1, programs // (n_column_tiles * n_channel_programs)))
    rows_per_program = triton.cdiv(triton.cdiv(n_rows, chunks), block_row) * block_row
    grid = (n_channel_programs, n_column_tiles, triton.cdiv(n_rows, rows_per_program))
    sizes = (n_rows, n_columns, n_channels, rows_per_program, *(size for size, _ in merged[1:]))
    steps = [(*(s[i] for _, s in merged), column_steps[i], channel_steps[i]) for i in range(len(strides))]
    blocks = {"CHANNELS_INSIDE": inside, "BLOCK_ROW": block_row, "BLOCK_COL": block_col, "num_warps": num_warps}
    return grid, sizes, steps, blocks


def merged_moments(partial, n_channels, n_partials):
    """(2, C) fp32: mean and biased variance, from (3, P, C): count, mean, sum of squared deviations of P programs."""
    moments = torch.empty((2, n_channels), device=partial.device, dtype=torch.float32)
    block_part = min(triton.next_power_of_2(n_partials), 1024)
    block_c = min(triton.next_power_of_2(n_channels), 2048 // block_part, 32)
    blocks = {"BLOCK_PART": block_part, "BLOCK_C": block_c, "num_warps": 4}
    _merge_kernel[(triton.cdiv(n_channels, block_c),)](moments, partial, n_channels, n_partials, **blocks)
    return moments
