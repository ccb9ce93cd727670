"""Total variation of images over four one-pixel shifts: an l1 and an l2 form from one pass.

With the differences of neighbours, where both exist (nothing wraps, nothing is padded)

    d_h = x[i,j] - x[i,j+1]      d_v = x[i,j]   - x[i+1,j]        horizontal, vertical
    d_d = x[i,j] - x[i+1,j+1]    d_a = x[i+1,j] - x[i,j+1]        main diagonal, anti-diagonal

    l1 = sum_k mean |d_k|,   l2 = sum_k ||d_k||
    dl1/dd_k = sign(d_k) / count_k,   dl2/dd_k = d_k / ||d_k||

||.|| is the Frobenius norm over the whole batch, not squared. sign(0) = 0, and the second slope is
0 where a norm is exactly zero. A pixel's gradient sums these slopes over its up to eight
neighbours, with a plus where it is the minuend and a minus where it is the subtrahend. Both slopes
are odd, so that this is the sum of slope_k(x - neighbour) over the neighbours.

Source: the image prior of DeepInversion (Yin et al. 2019, arXiv:1912.08795; its supplement takes
l2 norms against two diagonal, one vertical and one horizontal shift). The released code's TV1
equals l1 and its TV2 equals l2. l2 grows like sqrt(N) and l1 does not depend on N: a weight that
was tuned for l2 at one batch size does not carry over to another.

Traffic in passes over x (4 NCHW bytes each in fp32):
    eager  forward 28: per shift subtract 3, |d| 2, mean 1, norm 1;
           backward about 100: per shift 11 for the slopes, then 12 slices, each a zero fill and a
           copy (36), and the sums of 8 gradients of x (21)
    fused  forward 1, backward 2 (x read, dx written); the neighbours come from the cache
    best possible ratio, forward and backward: 128 / 3 = 43
"""

import math

import torch

from kernels import _common
from kernels._common import tl, triton


def shifted_pairs(x):
    """The two (N, C, H', W') views whose difference is d_k, for each of the four directions."""
    return (
        (x[..., :, :-1], x[..., :, 1:]),
        (x[..., :-1, :], x[..., 1:, :]),
        (x[..., :-1, :-1], x[..., 1:, 1:]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    )


def total_variation_ref(x):
    """The definition in plain PyTorch: see total_variation.

    float64 stays float64; half precision goes to fp32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    differences = [minuend - subtrahend for minuend, subtrahend in shifted_pairs(x)]
    l1 = sum(d.abs().mean() for d in differences)
    l2 = sum(torch.linalg.vector_norm(d) for d in differences)  # its gradient at a zero norm is 0
    return l1, l2


# Device functions that jittered_view uses too


@triton.jit
def plane_and_tile(H, L, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr):
    """This program's plane, and its rows (BLOCK_H, 1) and columns (1, BLOCK_L) of it."""
    pid = tl.program_id(0).to(tl.int64)
    n_col_tiles = tl.cdiv(L, BLOCK_L)
    n_tiles = tl.cdiv(H, BLOCK_H) * n_col_tiles
    plane = pid // n_tiles
    tile = pid % n_tiles

    rows = (tile // n_col_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    cols = (tile % n_col_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    return plane, rows, cols


@triton.jit
def store_shares(
    partials_ptr,  # (5, n_programs) fp32 out: this tile's share of l1, then four sums of squares
    x00,  # (BLOCK_H, BLOCK_L): the pixel itself
    x01,  # its right neighbour, 0 where there is none
    x10,  # the pixel below, 0 where there is none
    x11,  # the pixel below and to the right, 0 where there is none
    has_right,  # where those three exist
    has_below,
    has_both,
    inv_count_h,  # 1 / number of horizontal differences
    inv_count_v,  # 1 / number of vertical differences
    inv_count_d,  # 1 / number of differences along either diagonal
):
    """Store what one tile adds to l1 and to the squared norms of the four directions."""
    d_h = tl.where(has_right, x00 - x01, 0.0)
    d_v = tl.where(has_below, x00 - x10, 0.0)
    d_d = tl.where(has_both, x00 - x11, 0.0)
    d_a = tl.where(has_both, x10 - x01, 0.0)
    share_of_l1 = tl.abs(d_h) * inv_count_h + tl.abs(d_v) * inv_count_v
    share_of_l1 += (tl.abs(d_d) + tl.abs(d_a)) * inv_count_d

    pid = tl.program_id(0).to(tl.int64)
    n_programs = tl.num_programs(0)
    tl.store(partials_ptr + pid, tl.sum(share_of_l1))
    tl.store(partials_ptr + n_programs + pid, tl.sum(d_h * d_h))
    tl.store(partials_ptr + 2 * n_programs + pid, tl.sum(d_v * d_v))
    tl.store(partials_ptr + 3 * n_programs + pid, tl.sum(d_d * d_d))
    tl.store(partials_ptr + 4 * n_programs + pid, tl.sum(d_a * d_a))


@triton.jit
def norm_weight(grad, norm_ptr):
    """grad / norm: what the gradient of a norm is multiplied by; 0 where the norm is zero."""
    norm = tl.load(norm_ptr)
    return tl.where(norm == 0, 0.0, grad / tl.where(norm == 0, 1.0, norm))


@triton.jit
def slope(ptrs, mask, x, weight_l1, weight_l2):
    """What one neighbour adds to the gradient of x; 0 where there is none.

    weight_l1 * sign(d) + weight_l2 * d with d = x - neighbour.
    """
    neighbour = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    d = tl.where(mask, x - neighbour, 0.0)
    slope_l1 = tl.where(d > 0, weight_l1, tl.where(d < 0, -weight_l1, 0.0))
    return slope_l1 + weight_l2 * d


# The kernels of this op


@triton.jit
def _total_variation_fwd_kernel(
    partials_ptr,  # (5, n_programs) fp32 out: this tile's share of l1, then four sums of squares
    x_ptr,  # (N, C, H, W) images
    C,  # planes of an image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_xn,  # from image to image
    stride_xc,  # from plane to plane
    stride_xh,  # from row to row
    stride_xl,  # from column to column
    step,  # columns from a pixel to its right neighbour: 1, or C
    inv_count_h,  # 1 / number of horizontal differences
    inv_count_v,  # 1 / number of vertical differences
    inv_count_d,  # 1 / number of differences along either diagonal
    BLOCK_H: tl.constexpr,  # rows of a tile
    BLOCK_L: tl.constexpr,  # columns of a tile
):
    plane, rows, cols = plane_and_tile(H, L, BLOCK_H, BLOCK_L)
    plane_ptr = x_ptr + (plane // C) * stride_xn + (plane % C) * stride_xc
    ptrs = plane_ptr + rows * stride_xh + cols * stride_xl
    below = stride_xh
    right = step * stride_xl

    here = (rows < H) & (cols < L)
    has_right = (rows < H) & (cols < L - step)
    has_below = (rows < H - 1) & (cols < L)
    has_both = (rows < H - 1) & (cols < L - step)
    x00 = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
    x01 = tl.load(ptrs + right, mask=has_right, other=0.0).to(tl.float32)
    x10 = tl.load(ptrs + below, mask=has_below, other=0.0).to(tl.float32)
    x11 = tl.load(ptrs + below + right, mask=has_both, other=0.0).to(tl.float32)

    store_shares(
        partials_ptr,
        x00,
        x01,
        x10,
        x11,
        has_right,
        has_below,
        has_both,
        inv_count_h,
        inv_count_v,
        inv_count_d,
    )


@triton.jit
def _total_variation_bwd_kernel(
    dx_ptr,  # (N, C, H, W) out: gradient of the images
    x_ptr,  # (N, C, H, W) images
    norms_ptr,  # (4,) fp32: ||d_h||, ||d_v||, ||d_d||, ||d_a||
    grad_l1_ptr,  # () gradient of the loss in l1
    grad_l2_ptr,  # () gradient of the loss in l2
    C,  # planes of an image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_dn,  # of dx: from image to image
    stride_dc,  # from plane to plane
    stride_dh,  # from row to row
    stride_dl,  # from column to column
    stride_xn,  # the same four of x
    stride_xc,
    stride_xh,
    stride_xl,
    step,  # columns from a pixel to its right neighbour: 1, or C
    inv_count_h,  # 1 / number of horizontal differences
    inv_count_v,  # 1 / number of vertical differences
    inv_count_d,  # 1 / number of differences along either diagonal
    BLOCK_H: tl.constexpr,  # rows of a tile
    BLOCK_L: tl.constexpr,  # columns of a tile
):
    plane, rows, cols = plane_and_tile(H, L, BLOCK_H, BLOCK_L)
    plane_ptr = x_ptr + (plane // C) * stride_xn + (plane % C) * stride_xc
    ptrs = plane_ptr + rows * stride_xh + cols * stride_xl
    below = stride_xh
    right = step * stride_xl

    # What the slopes of l1 and l2 are multiplied by: horizontal, vertical, diagonal, anti-diagonal.
    grad_l1 = tl.load(grad_l1_ptr).to(tl.float32)
    grad_l2 = tl.load(grad_l2_ptr).to(tl.float32)
    h1 = grad_l1 * inv_count_h
    v1 = grad_l1 * inv_count_v
    d1 = grad_l1 * inv_count_d
    h2 = norm_weight(grad_l2, norms_ptr)
    v2 = norm_weight(grad_l2, norms_ptr + 1)
    d2 = norm_weight(grad_l2, norms_ptr + 2)
    a2 = norm_weight(grad_l2, norms_ptr + 3)

    here = (rows < H) & (cols < L)
    has_left = here & (cols >= step)
    has_right = here & (cols < L - step)
    has_above = rows > 0
    has_below = rows < H - 1
    x = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
    dx = slope(ptrs - right, has_left, x, h1, h2)
    dx += slope(ptrs + right, has_right, x, h1, h2)
    dx += slope(ptrs - below, here & has_above, x, v1, v2)
    dx += slope(ptrs + below, here & has_below, x, v1, v2)
    dx += slope(ptrs - below - right, has_left & has_above, x, d1, d2)
    dx += slope(ptrs + below + right, has_right & has_below, x, d1, d2)
    dx += slope(ptrs - below + right, has_right & has_above, x, d1, a2)
    dx += slope(ptrs + below - right, has_left & has_below, x, d1, a2)

    dx_plane_ptr = dx_ptr + (plane // C) * stride_dn + (plane % C) * stride_dc
    dx_ptrs = dx_plane_ptr + rows * stride_dh + cols * stride_dl
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=here)


# How to launch them


def inverse_counts(N, C, H, W):
    """1 / number of horizontal differences, of vertical ones, of those along either diagonal."""
    horizontal = N * C * H * (W - 1)
    vertical = N * C * (H - 1) * W
    diagonal = N * C * (H - 1) * (W - 1)
    return 1 / horizontal, 1 / vertical, 1 / diagonal


def walk_planes(*tensors):
    """How to walk through tensors of one shape: (planes, C, H, L), step, the strides of each.

    Where the channels lie side by side in all of them (channels_last), pixel and channel are one
    axis of W * C columns, and the right neighbour is C columns on. The innermost axis is then dense
    in memory.
    """
    N, C, H, W = tensors[0].shape
    if C > 1 and all(t.stride(3) == C * t.stride(1) for t in tensors):
        strides = [(t.stride(0), 0, t.stride(2), t.stride(1)) for t in tensors]
        return (N, 1, H, W * C), C, strides
    return (N * C, C, H, W), 1, [t.stride() for t in tensors]


# Chosen by arithmetic, not yet measured on a GPU.
_TILES = {  # most elements of a tile
    "forward": 2048,  # holds four neighbours of each pixel
    "backward": 1024,  # holds nine
}
_COLUMNS = 256  # most columns of a tile: whole rows of small images, 1 KB of larger ones
_WARPS = [  # (most elements of a tile, warps): 8 elements a lane, one warp for small planes
    (256, 1),
    (1024, 4),
    (math.inf, 8),
]


def tiling(planes, H, L, direction):
    """Grid, block sizes and warps. A tile is as wide as it may be, then as high."""
    max_tile = _TILES[direction]
    block_l = min(triton.next_power_of_2(L), _COLUMNS)
    block_h = min(triton.next_power_of_2(H), max(1, max_tile // block_l))
    num_warps = next(warps for limit, warps in _WARPS if block_h * block_l <= limit)
    n_programs = planes * triton.cdiv(H, block_h) * triton.cdiv(L, block_l)
    return (n_programs,), {"BLOCK_H": block_h, "BLOCK_L": block_l, "num_warps": num_warps}


# The CPU path


def forward_torch(x):
    """l1 () and the four norms (4,) of fp32 images."""
    differences = [minuend - subtrahend for minuend, subtrahend in shifted_pairs(x)]
    l1 = sum(d.abs().mean() for d in differences)
    norms = torch.stack([torch.linalg.vector_norm(d) for d in differences])
    return l1, norms


def backward_torch(x, norms, grad_l1, grad_l2):
    """The gradient of the images in a few in-place passes. A gradient that is None adds nothing.

    The differences are formed again rather than kept.
    """
    x32 = x.float()
    dx = torch.zeros_like(x32)
    inv_count_h, inv_count_v, inv_count_d = inverse_counts(*x.shape)
    inv_counts = inv_count_h, inv_count_v, inv_count_d, inv_count_d
    if grad_l2 is not None:
        weights_l2 = torch.where(norms == 0, 0.0, grad_l2 / norms)  # (4,)

    pairs = zip(shifted_pairs(x32), shifted_pairs(dx), strict=True)
    for k, ((minuend, subtrahend), (to_minuend, to_subtrahend)) in enumerate(pairs):
        d = minuend - subtrahend
        if grad_l1 is None:
            slope = d.mul_(weights_l2[k])
        else:
            slope = d.sign().mul_(grad_l1 * inv_counts[k])
            if grad_l2 is not None:
                slope.addcmul_(d, weights_l2[k])
        to_minuend += slope
        to_subtrahend -= slope
    return dx.to(x.dtype)


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)  # on the CPU, a result that no loss uses costs nothing
        if not _common.runs_triton(x):
            l1, norms = forward_torch(x.float())
            ctx.save_for_backward(x, norms)
            return l1, norms.sum()

        (planes, C, H, L), step, (strides,) = walk_planes(x)
        grid, meta = tiling(planes, H, L, "forward")
        partials = torch.empty(5, grid[0], device=x.device, dtype=torch.float32)
        with _common.on_device_of(x):
            _total_variation_fwd_kernel[grid](
                partials, x, C, H, L, *strides, step, *inverse_counts(*x.shape), **meta
            )
        l1 = partials[0].sum()
        norms = partials[1:].sum(1).sqrt()  # (4,)
        ctx.save_for_backward(x, norms)
        return l1, norms.sum()

    @staticmethod
    def backward(ctx, grad_l1, grad_l2):
        _common.refuse_double_backward("total_variation")
        if grad_l1 is None and grad_l2 is None:
            return None
        x, norms = ctx.saved_tensors
        if not _common.runs_triton(x):
            return backward_torch(x, norms, grad_l1, grad_l2)

        if grad_l1 is None:
            grad_l1 = norms.new_zeros(())
        if grad_l2 is None:
            grad_l2 = norms.new_zeros(())
        dx = torch.empty_like(x)
        (planes, C, H, L), step, (dx_strides, x_strides) = walk_planes(dx, x)
        grid, meta = tiling(planes, H, L, "backward")
        with _common.on_device_of(x):
            _total_variation_bwd_kernel[grid](
                dx,
                x,
                norms,
                grad_l1,
                grad_l2,
                C,
                H,
                L,
                *dx_strides,
                *x_strides,
                step,
                *inverse_counts(*x.shape),
                **meta,
            )
        return dx


def total_variation(x):
    """Total variation of images over four one-pixel shifts, as a mean of |d| and as a sum of norms.

    l1 = sum_k mean |d_k| and l2 = sum_k ||d_k|| over the horizontal, vertical and both diagonal
    differences d_k of neighbours. ||.|| is the un-squared Frobenius norm over the whole batch.

    Args:
        x: (N, C, H, W) images in normalised units, H and W at least 2; float32, float16 or
            bfloat16, any strides.

    Returns:
        (l1, l2), both fp32 scalars.

    Raises:
        TypeError: x is no tensor or of another dtype.
        ValueError: x is empty, not 4-D, or has less than 2 rows or columns.

    Note:
        l1 is a mean; l2 grows like sqrt(N). Both are differentiable once, in x. The gradient has
        the memory layout of x. The slope of |d| at 0 is 0, and so is that of a norm that is exactly
        0: constant images are safe. Sums are formed in fp32 in a fixed order, so that the same
        input gives the same bits. A GPU makes no copy of x.

    Example:
        >>> image = torch.tensor([[[[0.0, 3.0], [0.0, 3.0]]]])
        >>> l1, l2 = total_variation(image)  # |d|: 3 and 3, 0 and 0, 3, 3
        >>> round(l1.item(), 4), round(l2.item(), 4)
        (9.0, 10.2426)
    """
    _common.check_float("total_variation", x=x)
    shape = tuple(x.shape)
    if x.ndim != 4:
        raise ValueError(
            f"total_variation: expected x of shape (N, C, H, W), got {shape}; "
            f"use x[None] for one image"
        )
    if min(x.shape[2:]) < 2:
        raise ValueError(
            f"total_variation: expected H and W of at least 2, got shape {shape}; "
            f"drop the term for such x"
        )
    return _TotalVariation.apply(x)
