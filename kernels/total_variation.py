"""Total variation of a batch of images over four one-pixel shifts: an l1 and an l2 form from one pass.

With the differences of neighbours on the valid region (nothing wraps, nothing is padded)

    d_h = x[i,j] - x[i,j+1]      d_v = x[i,j]   - x[i+1,j]        horizontal, vertical
    d_d = x[i,j] - x[i+1,j+1]    d_a = x[i+1,j] - x[i,j+1]        main diagonal, anti-diagonal

    l1 = sum_k mean |d_k|,   l2 = sum_k ||d_k||,   ||.|| the Frobenius norm over the whole batch, not squared
    dl1/dd_k = sign(d_k) / count_k,   dl2/dd_k = d_k / ||d_k||,   sign(0) = 0 and 0 where a norm is exactly zero,

and a pixel's gradient sums these slopes over its up to eight neighbours, plus where it is the minuend and minus
where it is the subtrahend; both slopes are odd, so that is slope_k(x - neighbour) summed over the neighbours.

Source: the image prior of DeepInversion (Yin et al. 2019, arXiv:1912.08795; supplement: l2 norms against two
diagonal, one vertical and one horizontal shift). l2 grows like sqrt(N), l1 does not depend on N: a weight tuned for
l2 at one batch size does not carry over to another. The released code's TV1 equals l1 and its TV2 equals l2.

Traffic in passes over x (4 NCHW bytes each in fp32):
    eager  forward 28: per shift subtract 3, |d| 2, mean 1, norm 1; backward about 100: per shift 11 for the slopes,
           then 12 slices, each a zero fill and a copy (36), and the sums of 8 gradients of x (21)
    fused  forward 1, backward 2 (x read, dx written); the neighbours come from the cache
    best possible ratio, forward and backward: 128 / 3 = 43
"""

import math

import torch

from kernels import _common
from kernels._common import tl, triton


def _shifted_pairs(x):
    """The two (N, C, H', W') views whose difference is d_k, for horizontal, vertical, main and anti-diagonal."""
    return (
        (x[..., :, :-1], x[..., :, 1:]),
        (x[..., :-1, :], x[..., 1:, :]),
        (x[..., :-1, :-1], x[..., 1:, 1:]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    )


def total_variation_ref(x):
    """The definition in plain PyTorch: see total_variation. float64 stays float64, half precision goes to fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    differences = [minuend - subtrahend for minuend, subtrahend in _shifted_pairs(x)]
    l1 = sum(d.abs().mean() for d in differences)
    l2 = sum(torch.linalg.vector_norm(d) for d in differences)  # PyTorch's gradient of a zero norm is 0
    return l1, l2


@triton.jit
def plane_and_tile(H, L, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr):
    """This program's plane, and its rows (BLOCK_H, 1) and columns (1, BLOCK_L) of it."""
    pid = tl.program_id(0).to(tl.int64)
    n_col_tiles = tl.cdiv(L, BLOCK_L)
    n_tiles = tl.cdiv(H, BLOCK_H) * n_col_tiles
    tile = pid % n_tiles
    rows = (tile // n_col_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    cols = (tile % n_col_tiles) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    return pid // n_tiles, rows, cols


@triton.jit
def store_shares(
    partials_ptr,  # (5, n_programs) fp32: this tile's share of l1, then its four sums of squares
    x00,  # (BLOCK_H, BLOCK_L): pixel, its right and lower neighbour, the lower one's right one; 0 where there is none
    x01,
    x10,
    x11,
    has_right,
    has_below,
    has_both,
    inv_counts,  # 1 / number of horizontal, vertical and of either kind of diagonal differences
):
    """Write down what one tile adds to the four directions' norms."""
    d_h = tl.where(has_right, x00 - x01, 0.0)
    d_v = tl.where(has_below, x00 - x10, 0.0)
    d_d = tl.where(has_both, x00 - x11, 0.0)
    d_a = tl.where(has_both, x10 - x01, 0.0)
    share_of_l1 = tl.abs(d_h) * inv_counts[0] + tl.abs(d_v) * inv_counts[1]
    share_of_l1 += (tl.abs(d_d) + tl.abs(d_a)) * inv_counts[2]
    pid, n_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tl.store(partials_ptr + pid, tl.sum(share_of_l1))
    tl.store(partials_ptr + n_programs + pid, tl.sum(d_h * d_h))
    tl.store(partials_ptr + 2 * n_programs + pid, tl.sum(d_v * d_v))
    tl.store(partials_ptr + 3 * n_programs + pid, tl.sum(d_d * d_d))
    tl.store(partials_ptr + 4 * n_programs + pid, tl.sum(d_a * d_a))


@triton.jit
def _total_variation_fwd_kernel(
    partials_ptr,  # (5, n_programs) fp32: this tile's share of l1, then its four sums of squares
    x_ptr,  # images
    C,  # planes per image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xl,
    step,  # columns between a pixel and its right neighbour: 1, or C
    inv_count_h,  # 1 / number of horizontal differences
    inv_count_v,  # the same of vertical ones
    inv_count_d,  # the same of either kind of diagonal ones
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    plane, rows, cols = plane_and_tile(H, L, BLOCK_H, BLOCK_L)
    plane_ptr = x_ptr + (plane // C) * stride_xn + (plane % C) * stride_xc
    ptrs = plane_ptr + rows * stride_xh + cols * stride_xl
    right = step * stride_xl

    here = (rows < H) & (cols < L)
    has_right = (rows < H) & (cols < L - step)
    has_below = (rows < H - 1) & (cols < L)
    has_both = (rows < H - 1) & (cols < L - step)
    x00 = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
    x01 = tl.load(ptrs + right, mask=has_right, other=0.0).to(tl.float32)
    x10 = tl.load(ptrs + stride_xh, mask=has_below, other=0.0).to(tl.float32)
    x11 = tl.load(ptrs + stride_xh + right, mask=has_both, other=0.0).to(tl.float32)
    counts = inv_count_h, inv_count_v, inv_count_d
    store_shares(partials_ptr, x00, x01, x10, x11, has_right, has_below, has_both, counts)


@triton.jit
def slope(ptrs, mask, x, weight_l1, weight_l2):
    """What one neighbour adds to dx: weight_l1 sign(d) + weight_l2 d with d = x - neighbour, 0 where there is none."""
    d = tl.where(mask, x - tl.load(ptrs, mask=mask, other=0.0).to(tl.float32), 0.0)
    return tl.where(d > 0, weight_l1, tl.where(d < 0, -weight_l1, 0.0)) + weight_l2 * d


@triton.jit
def l2_weight(grad_l2, norm_ptr):
    """grad_l2 / ||d_k||, and 0 where the norm is exactly zero."""
    norm = tl.load(norm_ptr)
    return tl.where(norm == 0, 0.0, grad_l2 / tl.where(norm == 0, 1.0, norm))


@triton.jit
def slope_weights(grad_l1, grad_l2, norms_ptr, inv_counts):
    """What `slope` takes for horizontal, vertical and both diagonal neighbours: l1's three weights, l2's four."""
    h1, v1, d1 = grad_l1 * inv_counts[0], grad_l1 * inv_counts[1], grad_l1 * inv_counts[2]
    h2, v2 = l2_weight(grad_l2, norms_ptr), l2_weight(grad_l2, norms_ptr + 1)
    d2, a2 = l2_weight(grad_l2, norms_ptr + 2), l2_weight(grad_l2, norms_ptr + 3)
    return h1, v1, d1, h2, v2, d2, a2


@triton.jit
def _total_variation_bwd_kernel(
    dx_ptr,  # gradient of the images
    x_ptr,  # images
    norms_ptr,  # (4,) fp32: ||d_h||, ||d_v||, ||d_d||, ||d_a||
    grad_l1_ptr,  # () fp32
    grad_l2_ptr,  # () fp32
    C,  # planes per image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dl,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xl,
    step,  # columns between a pixel and its right neighbour
    inv_count_h,  # 1 / number of horizontal differences
    inv_count_v,  # the same of vertical ones
    inv_count_d,  # the same of either kind of diagonal ones
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    plane, rows, cols = plane_and_tile(H, L, BLOCK_H, BLOCK_L)
    plane_ptr = x_ptr + (plane // C) * stride_xn + (plane % C) * stride_xc
    ptrs = plane_ptr + rows * stride_xh + cols * stride_xl
    right = step * stride_xl

    grad_l1 = tl.load(grad_l1_ptr).to(tl.float32)
    grad_l2 = tl.load(grad_l2_ptr).to(tl.float32)
    counts = inv_count_h, inv_count_v, inv_count_d
    h1, v1, d1, h2, v2, d2, a2 = slope_weights(grad_l1, grad_l2, norms_ptr, counts)

    here = (rows < H) & (cols < L)
    has_left = here & (cols >= step)
    has_right = here & (cols < L - step)
    above = rows > 0
    below = rows < H - 1
    x = tl.load(ptrs, mask=here, other=0.0).to(tl.float32)
    dx = slope(ptrs - right, has_left, x, h1, h2) + slope(ptrs + right, has_right, x, h1, h2)
    dx += slope(ptrs - stride_xh, here & above, x, v1, v2)
    dx += slope(ptrs + stride_xh, here & below, x, v1, v2)
    dx += slope(ptrs - stride_xh - right, has_left & above, x, d1, d2)
    dx += slope(ptrs + stride_xh + right, has_right & below, x, d1, d2)
    dx += slope(ptrs - stride_xh + right, has_right & above, x, d1, a2)
    dx += slope(ptrs + stride_xh - right, has_left & below, x, d1, a2)

    dx_ptrs = dx_ptr + (plane // C) * stride_dn + (plane % C) * stride_dc + rows * stride_dh + cols * stride_dl
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=here)


def _inverse_counts(N, C, H, W):
    """1 / number of horizontal, of vertical and of either kind of diagonal differences."""
    return 1 / (N * C * H * (W - 1)), 1 / (N * C * (H - 1) * W), 1 / (N * C * (H - 1) * (W - 1))


def _planes(*tensors):
    """How the kernels walk through `tensors`: (planes, C, H, L), step, and the four strides of each tensor.

    Where the channels lie side by side in all of them (channels_last), pixel and channel are one axis of W * C
    columns with the right neighbour C columns on, so that the innermost axis stays dense in memory.
    """
    N, C, H, W = tensors[0].shape
    if C > 1 and all(t.stride(3) == C * t.stride(1) for t in tensors):
        return (N, 1, H, W * C), C, [(t.stride(0), 0, t.stride(2), t.stride(1)) for t in tensors]
    return (N * C, C, H, W), 1, [t.stride() for t in tensors]


# Chosen by arithmetic, not yet measured on a GPU.
_TILES = dict(forward=2048, backward=1024)  # most elements: the backward pass holds nine neighbours of each, not four
_COLUMNS = 256  # most columns of a tile: whole rows of small images, 1 KB of larger ones
_WARPS = (
    (256, 1),
    (1024, 4),
    (math.inf, 8),
)  # (up to so many elements, warps): 8 elements a lane, small planes one warp


def _tiling(planes, H, L, direction):
    """Grid, block sizes and warps. Whole rows as far as they fit, then as many rows as the tile holds."""
    block_l = min(triton.next_power_of_2(L), _COLUMNS)
    block_h = min(triton.next_power_of_2(H), max(1, _TILES[direction] // block_l))
    num_warps = next(warps for limit, warps in _WARPS if block_h * block_l <= limit)
    grid = (planes * triton.cdiv(H, block_h) * triton.cdiv(L, block_l),)
    return grid, {"BLOCK_H": block_h, "BLOCK_L": block_l, "num_warps": num_warps}


def _forward_torch(x):
    """l1 and the four norms (4,) of fp32 images."""
    differences = [minuend - subtrahend for minuend, subtrahend in _shifted_pairs(x)]
    return sum(d.abs().mean() for d in differences), torch.stack([torch.linalg.vector_norm(d) for d in differences])


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)  # a result that no loss uses costs nothing on the CPU
        if _common.runs_triton(x):
            (planes, C, H, L), step, (strides,) = _planes(x)
            grid, meta = _tiling(planes, H, L, "forward")
            partials = torch.empty(5, grid[0], device=x.device, dtype=torch.float32)
            counts = _inverse_counts(*x.shape)
            _total_variation_fwd_kernel[grid](partials, x, C, H, L, *strides, step, *counts, **meta)
            l1 = partials[0].sum()
            norms = partials[1:].sum(1).sqrt()  # (4,)
        else:
            l1, norms = _forward_torch(x.float())
        ctx.save_for_backward(x, norms)
        return l1, norms.sum()

    @staticmethod
    def backward(ctx, grad_l1, grad_l2):
        _common.refuse_double_backward("total_variation")
        if grad_l1 is None and grad_l2 is None:
            return None
        x, norms = ctx.saved_tensors
        counts = _inverse_counts(*x.shape)
        if not _common.runs_triton(x):
            return _backward_torch(x, norms, grad_l1, grad_l2, counts)
        grad_l1 = norms.new_zeros(()) if grad_l1 is None else grad_l1
        grad_l2 = norms.new_zeros(()) if grad_l2 is None else grad_l2
        dx = torch.empty_like(x)
        (planes, C, H, L), step, (dx_strides, x_strides) = _planes(dx, x)
        grid, meta = _tiling(planes, H, L, "backward")
        _total_variation_bwd_kernel[grid](
            dx, x, norms, grad_l1, grad_l2, C, H, L, *dx_strides, *x_strides, step, *counts, **meta
        )
        return dx


def _backward_torch(x, norms, grad_l1, grad_l2, counts):
    """The analytic gradient in a few in-place passes; the differences are formed again rather than kept."""
    x32 = x.float()
    dx = torch.zeros_like(x32)
    weights_l2 = None if grad_l2 is None else torch.where(norms == 0, 0.0, grad_l2 / norms)  # (4,)
    inverse_counts = (*counts, counts[2])
    for k, ((minuend, subtrahend), (to_minuend, to_subtrahend)) in enumerate(
        zip(_shifted_pairs(x32), _shifted_pairs(dx), strict=True)
    ):
        d = minuend - subtrahend
        slope = d.sign().mul_(grad_l1 * inverse_counts[k]) if grad_l1 is not None else None
        if weights_l2 is not None:
            slope = d.mul_(weights_l2[k]) if slope is None else slope.addcmul_(d, weights_l2[k])
        to_minuend += slope
        to_subtrahend -= slope
    return dx.to(x.dtype)


def total_variation(x):
    """Total variation of images over four one-pixel shifts, as a mean of |d| and as a sum of norms, in one pass.

    l1 = sum_k mean |d_k| and l2 = sum_k ||d_k|| over the horizontal, vertical and both diagonal differences d_k of
    neighbours; ||.|| is the un-squared Frobenius norm over the whole batch.

    Args:
        x: (N, C, H, W) images in normalised units, H and W at least 2; float32, float16 or bfloat16, any strides.

    Returns:
        (l1, l2), both fp32 scalars.

    Raises:
        TypeError: x is no tensor or of another dtype.
        ValueError: x is empty, not 4-D, or has less than 2 rows or columns.

    Note:
        l2 grows like sqrt(N), l1 is a mean. Both are differentiable, once, in x; the gradient has the memory layout
        of x. The slope of |d| at 0 is 0, and so is that of a norm that is exactly 0: constant images are safe.
        Sums are formed in fp32 in a fixed order: the same input gives the same bits. No copy of x is made on a GPU.

    Example:
        >>> image = torch.tensor([[[[0.0, 3.0], [0.0, 3.0]]]])
        >>> l1, l2 = total_variation(image)  # |d|: 3 and 3, 0 and 0, 3, 3
        >>> round(l1.item(), 4), round(l2.item(), 4)
        (9.0, 10.2426)
    """
    _common.check_float("total_variation", x=x)
    if x.ndim != 4:
        raise ValueError(
            f"total_variation: expected x of shape (N, C, H, W), got {tuple(x.shape)}; use x[None] for one image"
        )
    if min(x.shape[2:]) < 2:
        raise ValueError(
            f"total_variation: expected H and W of at least 2, got shape {tuple(x.shape)}; drop the term for such x"
        )
    return _TotalVariation.apply(x)
