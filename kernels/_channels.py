"""What the ops on channels share: tiles over x (N, C, *spatial), and moments merged over programs.

A program works on tiles of rows x columns. The columns are what lies densest in memory: in
channels_last the channels; in NCHW one run of H W, and then a program works on one channel. The
rows are all other positions, in up to four dimensions. x may have any strides.

Groups of values are merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm
for computing sample variances", 1979.
"""

import functools
import math
from typing import NamedTuple

import torch

from kernels import _common
from kernels._common import tl, triton


@triton.jit
def compute_row_offsets(
    rows,  # flat indices over the four row dimensions
    size_1,  # sizes of the row dimensions but the outermost; 1 if absent, which Triton folds away
    size_2,
    size_3,
    stride_0,  # strides of the row dimensions
    stride_1,
    stride_2,
    stride_3,
):
    """Offsets in memory of flat row indices."""
    i_3 = rows % size_3
    outer = rows // size_3
    i_2 = outer % size_2
    outer = outer // size_2
    i_1 = outer % size_1
    i_0 = outer // size_1
    return i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2 + i_3 * stride_3


@triton.jit
def mask_channels(
    offs_c,  # channels
    n_channels,
    ALIGN: tl.constexpr,  # a number that divides n_channels; 1 for unknown
):
    """offs_c < n_channels. It is the same for ALIGN neighbours, so they may be loaded at once."""
    mask = offs_c < n_channels
    if ALIGN > 1:
        mask = tl.max_constancy(mask, ALIGN)
    return mask


@triton.jit
def locate_program(
    n_columns,  # C if the columns are channels, else positions along the columns
    BLOCK_COL: tl.constexpr,  # columns of a tile
):
    """This program's channel (0 if the columns are channels), tile of columns and chunk of rows.

    Channel and tile share the first axis of the grid: a GPU allows 65,535 programs on the others.
    """
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(n_columns, BLOCK_COL)
    return pid // n_tiles, pid % n_tiles, tl.program_id(1).to(tl.int64)


@triton.jit
def merge_groups(
    count,  # values in each group, fp32; 0 is allowed
    mean,  # mean of each group
    m2,  # sum of squared deviations from it
):
    """Merge the groups along axis 0 into one."""
    total = tl.sum(count, 0)
    pooled = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    delta = mean - pooled
    residue = tl.sum(count * delta, 0) / tl.maximum(total, 1.0)  # what rounding left in `pooled`
    pooled_m2 = tl.sum(m2 + count * delta * delta, 0) - total * residue * residue
    return total, pooled + residue, pooled_m2


@triton.jit
def add_value(
    x,  # (BLOCK_ROW, BLOCK_COL) fp32: the next value of each lane
    mask,  # lanes that have one
    mean,  # of the lane's values so far
    m2,  # sum of squared deviations from it
    step,  # number of values with this one
):
    """Add one value to the moments of each lane (Welford 1962)."""
    delta = tl.where(mask, x - mean, 0.0)
    new_mean = mean + delta * (1.0 / step)
    return new_mean, m2 + delta * (x - new_mean)


@triton.jit
def store_partial(
    partial_ptr,  # (3, P, C), at this program's place: count, mean, sum of squared deviations
    stride_part,  # P C
    mask_c,  # channels of this program
    count,  # (BLOCK_ROW,) fp32: values in each row of lanes
    mask_col,  # (BLOCK_COL,)
    mean,  # (BLOCK_ROW, BLOCK_COL) fp32
    m2,  # (BLOCK_ROW, BLOCK_COL) fp32
    CHANNELS_INSIDE: tl.constexpr,  # the columns are channels
):
    """Merge a program's lanes into one group for each of its channels and store the groups."""
    lane_count = count[:, None] * mask_col.to(tl.float32)[None, :]
    group_count, group_mean, group_m2 = merge_groups(lane_count, mean, m2)  # (BLOCK_COL,)
    if not CHANNELS_INSIDE:
        group_count, group_mean, group_m2 = merge_groups(group_count, group_mean, group_m2)
    tl.store(partial_ptr, group_count, mask=mask_c)
    tl.store(partial_ptr + stride_part, group_mean, mask=mask_c)
    tl.store(partial_ptr + 2 * stride_part, group_m2, mask=mask_c)


@triton.jit
def _merge_kernel(
    moments_ptr,  # (2, C) out, C of all layers: mean - shift, variance
    partials_ptr,  # of each layer (3, P, C_l): count, mean - shift, sum of squared deviations
    table_ptr,  # (programs, 5) int64: list_merges
    n_channels,  # C
    BLOCK_PART: tl.constexpr,  # partials merged at once
    BLOCK_C: tl.constexpr,  # channels of a program
):
    table_ptr += tl.program_id(0).to(tl.int64) * 5
    begin = tl.load(table_ptr)
    n_partials = tl.load(table_ptr + 1)
    n_layer_channels = tl.load(table_ptr + 2)
    layer_place = tl.load(table_ptr + 3)
    first_channel = tl.load(table_ptr + 4)
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_layer_channels
    stride_part = n_partials * n_layer_channels

    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, n_partials, BLOCK_PART):
        parts = start + tl.arange(0, BLOCK_PART).to(tl.int64)
        offs = partials_ptr + begin + parts[:, None] * n_layer_channels + offs_c[None, :]
        mask = (parts < n_partials)[:, None] & mask_c[None, :]
        tile_count, tile_mean, tile_m2 = merge_groups(
            tl.load(offs, mask=mask, other=0.0),
            tl.load(offs + stride_part, mask=mask, other=0.0),
            tl.load(offs + 2 * stride_part, mask=mask, other=0.0),
        )
        share = tile_count / tl.maximum(count + tile_count, 1.0)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tile_m2 + delta * delta * count * share
        count += tile_count

    offs = moments_ptr + layer_place + offs_c
    tl.store(offs, mean, mask=mask_c)
    tl.store(offs + n_channels, m2 / tl.maximum(count, 1.0), mask=mask_c)


# (up to this many elements of x, elements per tile, warps). Small layers need many programs more
# than they need long ones. Chosen by arithmetic: 16 values a thread keep two to four 16-byte loads
# in flight. Not yet measured on a GPU.
_TILES = (
    (1 << 20, 2048, 4),
    (math.inf, 4096, 8),
)

# The most channels of a tile in channels_last. A row is then 128 bytes of fp16, and enough rows are
# left to reduce.
_CHANNEL_BLOCK = 64

# The numbers of programs to aim at. The forward pass writes a row of partials for each.
FORWARD_PROGRAMS = 1024
BACKWARD_PROGRAMS = 4096


class Launch(NamedTuple):
    """How to launch a kernel on tensors of one shape."""

    grid: tuple
    """Programs along channels and columns, and along the rows: see locate_program."""
    sizes: tuple
    """n_rows, n_columns, n_channels, rows_per_program, then size_1, size_2, size_3 of the rows."""
    strides: list
    """For each tensor its strides along the four row dimensions, the columns, the channels."""
    blocks: dict
    """CHANNELS_INSIDE, BLOCK_ROW, BLOCK_COL and num_warps."""
    n_partials: int
    """Programs that work on the same channel."""


@functools.lru_cache(maxsize=4096)
def plan(programs, shape, *strides):
    """Plan the launch of about `programs` programs on tensors of one shape with these strides.

    A sweep over the constants above must call plan.cache_clear().
    """
    n_channels = shape[1]
    channel_strides = [stride[1] for stride in strides]

    dims = merge_dimensions(shape, strides)
    inside = _channels_are_densest(dims, n_channels, channel_strides[0])
    if inside:
        n_columns = n_channels
        column_strides = channel_strides
    else:
        n_columns, column_strides = dims.pop()
    absent = (1, [0] * len(strides))
    rows = dims + [absent] * (4 - len(dims))
    n_rows = math.prod([size for size, _ in rows])

    tile, num_warps = _choose_tile(math.prod(shape))
    widest = _CHANNEL_BLOCK if inside else tile
    block_col = min(triton.next_power_of_2(n_columns), widest)
    block_row = min(triton.next_power_of_2(n_rows), tile // block_col)

    n_channel_programs = 1 if inside else n_channels
    n_column_tiles = triton.cdiv(n_columns, block_col)
    wanted = max(1, programs // (n_column_tiles * n_channel_programs))
    chunks = min(triton.cdiv(n_rows, block_row), wanted)
    rows_per_program = triton.cdiv(triton.cdiv(n_rows, chunks), block_row) * block_row
    n_chunks = triton.cdiv(n_rows, rows_per_program)

    inner_sizes = [size for size, _ in rows[1:]]
    all_strides = []
    for i in range(len(strides)):
        row_strides = [stride[i] for _, stride in rows]
        all_strides.append((*row_strides, column_strides[i], channel_strides[i]))
    n_partials = n_chunks if inside else n_column_tiles * n_chunks
    return Launch(
        grid=(n_channel_programs * n_column_tiles, n_chunks),
        sizes=(n_rows, n_columns, n_channels, rows_per_program, *inner_sizes),
        strides=all_strides,
        blocks={
            "CHANNELS_INSIDE": inside,
            "BLOCK_ROW": block_row,
            "BLOCK_COL": block_col,
            "num_warps": num_warps,
        },
        n_partials=n_partials,
    )


def merge_dimensions(shape, strides):
    """All dimensions but the channels, outermost first, as [(size, [its stride in each tensor])].

    The order is that of the first tensor's strides; a dimension of stride 0 goes outside.
    Neighbours that form one run in memory in every tensor become one dimension.
    """
    dims = []
    for d, size in enumerate(shape):
        if d != 1 and size > 1:
            dims.append((size, [stride[d] for stride in strides]))
    dims = sorted(dims, key=lambda dim: dim[1][0] or math.inf, reverse=True)

    merged = []
    for size, inner in dims:
        run = [stride * size for stride in inner]
        if merged and merged[-1][1] == run:
            outer_size, _ = merged.pop()
            merged.append((outer_size * size, inner))
        else:
            merged.append((size, inner))
    return merged


def _channels_are_densest(dims, n_channels, channel_stride):
    """Whether no dimension of the first tensor lies denser in memory than its channels."""
    if not dims:
        return True
    if n_channels == 1:
        return False
    densest = dims[-1][1][0]
    return densest == 0 or 0 < channel_stride < densest


def _choose_tile(n_elements):
    """Elements of a tile, and warps, for an x of this many elements."""
    for limit, tile, num_warps in _TILES:
        if n_elements <= limit:
            return tile, num_warps


# Rows of 64 bytes, 16 values a lane. Not yet measured on a GPU.
_MERGE = {"BLOCK_PART": 128, "BLOCK_C": 16, "num_warps": 4}


@functools.cache  # never dropped: a CUDA graph may read the tensor
def list_merges(shapes, block_c, device):
    """What each program of _merge_kernel merges, a row (5,) int64 each.

    Where the layer's partials begin, how many they are, the layer's channels, where they begin
    among those of all layers, and the first of them that this program merges. The tensor is made
    once: a CUDA graph may not copy it from the host. It is made of python numbers, which
    torch.compile can follow.

    Args:
        shapes: of each layer (number of partials, channels).
        block_c: channels of a program.
    """
    rows = []
    begin = 0
    place = 0
    for n_partials, n_channels in shapes:
        for first_channel in range(0, n_channels, block_c):
            rows.append([begin, n_partials, n_channels, place, first_channel])
        begin += 3 * n_partials * n_channels
        place += n_channels
    return torch.tensor(rows, device=device)


def merge_partials(partials):
    """Merge the partials of all layers in one launch.

    Args:
        partials: of each layer (3, P_l, C_l) fp32: counts, means, sums of squared deviations.

    Returns:
        (2, C) fp32, one layer beside the other: mean and variance.
    """
    shapes = tuple(tuple(partial.shape[1:]) for partial in partials)
    flat = partials[0]
    if len(partials) > 1:
        flat = torch.cat([partial.flatten() for partial in partials])
    n_channels = sum(n for _, n in shapes)
    moments = torch.empty((2, n_channels), device=flat.device, dtype=torch.float32)
    table = list_merges(shapes, _MERGE["BLOCK_C"], flat.device)
    with _common.on_device_of(flat):
        _merge_kernel[(len(table),)](moments, flat, table, n_channels, **_MERGE)
    return moments


def check_channels(op, x, **vectors):
    """Raise unless x is (N, C, *spatial), each vector (C,), all in a float dtype, on one device."""
    _common.check_float(op, x=x, **vectors)
    if not 2 <= x.dim() <= 5:
        got = tuple(x.shape)
        raise ValueError(
            f"{op}: expected x of shape (N, C, *spatial), 2-D to 5-D, got {got}; reshape it"
        )
    check_vectors(op, x.size(1), **vectors)


def check_vectors(op, n_channels, **vectors):
    """Raise unless each vector has one value per channel."""
    for name, vector in vectors.items():
        shape = None if vector is None else tuple(vector.shape)
        if shape != (n_channels,):
            raise ValueError(
                f"{op}: expected {name} of shape ({n_channels},), got {shape}; "
                "pass one value per channel"
            )
