"""What the teacher sees of the images, rolled and mirrored at random, with the image priors on it.

    view[n, c, i, j] = x[n, c, (i - dy) mod H, (j' - dx) mod W]
    j' = W - 1 - j if mirrored, else j
    tv_l1, tv_l2 = `total_variation` of the view,   l2 = mean_n ||view_n||
    gradient of x = dview brought back + g_l1 dtv_l1/dx + g_l2 dtv_l2/dx + g x / (N ||x_n||)

The last term is 0 for an image whose norm is exactly 0. The kernels read dy, dx and whether to
mirror from device memory, so that one captured CUDA graph serves the draw of every step. (A
torch.roll takes numbers that the host must know.)

Source: the augmentations and the priors R_TV, R_l2 of DeepInversion (Yin et al. 2019,
arXiv:1912.08795, eq. 3; supplement). As in its released code, there is one draw for the batch, the
roll is cyclic, and the priors are those of the view. The seam that the roll brings inside therefore
counts, and the differences across the new border do not. l2 and the norms of mirrored images are
the same for x and for the view. The kernels therefore walk over x; its neighbours are the view's,
except across the view's border.

Traffic in passes over x (4 NCHW bytes each in fp32):
    eager  forward: roll 4 (two dimensions), flip 2, channels_last copy 2, total variation 28,
           norm 1; backward: about 100 for the total variation, norm 3, flip 2, roll 4, sums of
           three gradients 6; about 150 in all
    fused  forward 2 (x read, view written), backward 3 (x and dview read, dx written)
    best possible ratio: 150 / 5 = 30; a bf16 view saves half a pass each way, and the cast that a
    convolution would make
"""

import torch

from kernels import _common
from kernels._common import tl, triton
from kernels.total_variation import (
    backward_torch,
    forward_torch,
    inverse_counts,
    norm_weight,
    plane_and_tile,
    slope,
    store_shares,
    tiling,
    total_variation_ref,
    walk_planes,
)


def source_pixels(draw, H, W):
    """The rows (H,) and columns (W,) of x that the view shows, in the view's order."""
    rows = torch.arange(H, device=draw.device)
    columns = torch.arange(W, device=draw.device)
    columns = torch.where(draw[2] != 0, W - 1 - columns, columns)
    return (rows - draw[0]) % H, (columns - draw[1]) % W


def jittered_view_ref(x, draw, dtype=None):
    """The definition in plain PyTorch: see jittered_view.

    float64 stays float64; of half precision the priors are fp32.
    """
    H, W = x.shape[2:]
    rows, columns = source_pixels(draw, H, W)
    view = x.to(torch.promote_types(x.dtype, torch.float32))[:, :, rows[:, None], columns]
    l2 = torch.linalg.vector_norm(view.flatten(1), dim=1).mean()
    tv_l1, tv_l2 = total_variation_ref(view)
    return view.to(dtype or x.dtype, memory_format=torch.channels_last), tv_l1, tv_l2, l2


@triton.jit
def _view_places(
    draw_ptr,  # (3,) int64: roll downwards, roll to the right, mirrored or not
    rows,  # (BLOCK_H, 1) rows of x
    cols,  # (1, BLOCK_L) columns of x
    H,  # rows of a plane
    L,  # columns of a plane
    step,  # columns from a pixel to its right neighbour
):
    """Where pixels of x lie: row i and column j of the rolled image, column of the view, width W.

    i and j count pixels; the column of the view counts as `cols` does.
    """
    # A remainder has the sign of the dividend. These are two for a program, none for each pixel.
    W = L // step
    dy = ((tl.load(draw_ptr) % H + H) % H).to(tl.int32)
    dx = ((tl.load(draw_ptr + 1) % W + W) % W).to(tl.int32)
    mirrored = tl.load(draw_ptr + 2)

    w = cols.to(tl.int32) // step
    channel = cols - w * step
    i = rows.to(tl.int32) + dy
    j = w + dx
    i = tl.where(i >= H, i - H, i)
    j = tl.where(j >= W, j - W, j)
    view_cols = tl.where(mirrored != 0, W - 1 - j, j) * step + channel
    return i, j, view_cols, W


@triton.jit
def _jittered_view_fwd_kernel(
    view_ptr,  # (N, C, H, W) out: images as the teacher sees them
    partials_ptr,  # (6, n_programs) fp32 out: shares of l1, of four norms squared, of ||x_n||^2
    x_ptr,  # (N, C, H, W) images
    draw_ptr,  # (3,) int64: roll downwards, roll to the right, mirrored or not
    C,  # planes of an image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_vn,  # of the view: from image to image
    stride_vc,  # from plane to plane
    stride_vh,  # from row to row
    stride_vl,  # from column to column
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
    x_ptr += (plane // C) * stride_xn + (plane % C) * stride_xc
    view_ptr += (plane // C) * stride_vn + (plane % C) * stride_vc
    i, j, view_cols, W = _view_places(draw_ptr, rows, cols, H, L, step)

    # x's neighbours wrap around, as the seam of the roll lies inside the view.
    row = rows * stride_xh
    col = cols * stride_xl
    below = tl.where(rows + 1 < H, rows + 1, 0) * stride_xh
    right = tl.where(cols + step < L, cols + step, cols + step - L) * stride_xl

    here = (rows < H) & (cols < L)
    has_right = here & (j < W - 1)
    has_below = here & (i < H - 1)
    has_both = has_right & has_below
    x00 = tl.load(x_ptr + row + col, mask=here, other=0.0).to(tl.float32)
    x01 = tl.load(x_ptr + row + right, mask=has_right, other=0.0).to(tl.float32)
    x10 = tl.load(x_ptr + below + col, mask=has_below, other=0.0).to(tl.float32)
    x11 = tl.load(x_ptr + below + right, mask=has_both, other=0.0).to(tl.float32)

    view_ptrs = view_ptr + i * stride_vh + view_cols * stride_vl
    tl.store(view_ptrs, x00.to(view_ptr.dtype.element_ty), mask=here)
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
    pid = tl.program_id(0).to(tl.int64)
    tl.store(partials_ptr + 5 * tl.num_programs(0) + pid, tl.sum(x00 * x00))


@triton.jit
def _jittered_view_bwd_kernel(
    dx_ptr,  # (N, C, H, W) out: gradient of the images
    dview_ptr,  # (N, C, H, W) gradient of the view
    x_ptr,  # (N, C, H, W) images
    draw_ptr,  # (3,) int64: roll downwards, roll to the right, mirrored or not
    norms_ptr,  # (4,) fp32: norms of horizontal, vertical, diagonal, anti-diagonal differences
    image_norms_ptr,  # (N,) fp32: ||x_n||
    grad_l1_ptr,  # () fp32: gradient of the loss in tv_l1
    grad_l2_ptr,  # () fp32: in tv_l2
    grad_norm_ptr,  # () fp32: in l2, the mean norm of an image
    inv_n,  # 1 / N
    C,  # planes of an image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_dn,  # of dx: from image to image
    stride_dc,  # from plane to plane
    stride_dh,  # from row to row
    stride_dl,  # from column to column
    stride_vn,  # the same four of dview
    stride_vc,
    stride_vh,
    stride_vl,
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
    x_ptr += (plane // C) * stride_xn + (plane % C) * stride_xc
    dview_ptr += (plane // C) * stride_vn + (plane % C) * stride_vc
    dx_ptr += (plane // C) * stride_dn + (plane % C) * stride_dc
    i, j, view_cols, W = _view_places(draw_ptr, rows, cols, H, L, step)

    # x's neighbours wrap around, as the seam of the roll lies inside the view.
    row = rows * stride_xh
    col = cols * stride_xl
    above = tl.where(rows > 0, rows - 1, H - 1) * stride_xh
    below = tl.where(rows + 1 < H, rows + 1, 0) * stride_xh
    left = tl.where(cols >= step, cols - step, cols - step + L) * stride_xl
    right = tl.where(cols + step < L, cols + step, cols + step - L) * stride_xl

    # What the slopes of l1 and l2 are multiplied by: horizontal, vertical, diagonal, anti-diagonal.
    grad_l1 = tl.load(grad_l1_ptr)
    grad_l2 = tl.load(grad_l2_ptr)
    h1 = grad_l1 * inv_count_h
    v1 = grad_l1 * inv_count_v
    d1 = grad_l1 * inv_count_d
    h2 = norm_weight(grad_l2, norms_ptr)
    v2 = norm_weight(grad_l2, norms_ptr + 1)
    d2 = norm_weight(grad_l2, norms_ptr + 2)
    a2 = norm_weight(grad_l2, norms_ptr + 3)
    image_weight = norm_weight(tl.load(grad_norm_ptr) * inv_n, image_norms_ptr + plane // C)

    here = (rows < H) & (cols < L)
    has_left = here & (j > 0)
    has_right = here & (j < W - 1)
    has_above = here & (i > 0)
    has_below = here & (i < H - 1)
    x = tl.load(x_ptr + row + col, mask=here, other=0.0).to(tl.float32)
    in_row = image_weight * x
    in_row += slope(x_ptr + row + left, has_left, x, h1, h2)
    in_row += slope(x_ptr + row + right, has_right, x, h1, h2)
    in_col = slope(x_ptr + above + col, has_above, x, v1, v2)
    in_col += slope(x_ptr + below + col, has_below, x, v1, v2)

    dview_ptrs = dview_ptr + i * stride_vh + view_cols * stride_vl
    dx = tl.load(dview_ptrs, mask=here, other=0.0).to(tl.float32)
    dx += in_row
    dx += in_col
    dx += slope(x_ptr + above + left, has_left & has_above, x, d1, d2)
    dx += slope(x_ptr + below + right, has_right & has_below, x, d1, d2)
    dx += slope(x_ptr + above + right, has_right & has_above, x, d1, a2)
    dx += slope(x_ptr + below + left, has_left & has_below, x, d1, a2)

    dx_ptrs = dx_ptr + rows * stride_dh + cols * stride_dl
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=here)


def _gather(x, rows, columns):
    """x[:, :, rows][:, :, :, columns], as channels_last.

    As whole rows of memory and then numbers within a row: a sixth of the time of both in one step.
    """
    N, C, H, W = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(N, H, W * C)  # a copy for odd layouts of x only
    places = columns.view(W, 1) * C + torch.arange(C, device=x.device)
    moved = lines.index_select(1, rows).view(N * H, W * C).index_select(1, places.flatten())
    return moved.view(N, H, W, C).permute(0, 3, 1, 2)


def _backward_cpu(ctx, dview, grad_l1, grad_l2, grad_norm):
    view, draw, norms, image_norms = ctx.saved_tensors  # the view in fp32

    if grad_l1 is None and grad_l2 is None:
        gradient = torch.zeros_like(view) if dview is None else dview.float()
    else:
        gradient = backward_torch(view, norms, grad_l1, grad_l2)
        if dview is not None:
            gradient.add_(dview)
    if grad_norm is not None:
        weights = torch.where(image_norms == 0, 0.0, grad_norm / (len(view) * image_norms))  # (N,)
        gradient = torch.addcmul(gradient, view, weights.view(-1, 1, 1, 1))

    H, W = view.shape[2:]
    rows, columns = source_pixels(draw, H, W)
    gradient = _gather(gradient, rows.argsort(), columns.argsort())  # the way back
    if gradient.stride() == ctx.strides and gradient.dtype == ctx.dtype:
        return gradient
    return torch.empty_strided(gradient.shape, ctx.strides, dtype=ctx.dtype).copy_(gradient)


class _JitteredView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, draw, dtype):
        ctx.set_materialize_grads(False)  # on the CPU, a term that no loss uses costs nothing
        N, C, H, W = x.shape

        if not _common.runs_triton(x):
            ctx.dtype = x.dtype
            ctx.strides = torch.empty_like(x, device="meta").stride()
            view = _gather(x.float(), *source_pixels(draw, H, W))
            tv_l1, norms = forward_torch(view)
            image_norms = torch.linalg.vector_norm(view.flatten(1), dim=1)  # (N,)
            ctx.save_for_backward(view, draw, norms, image_norms)
            return view.to(dtype), tv_l1, norms.sum(), image_norms.mean()

        view = torch.empty(x.shape, device=x.device, dtype=dtype, memory_format=torch.channels_last)
        (planes, C, H, L), step, (x_strides, view_strides) = walk_planes(x, view)
        grid, meta = tiling(planes, H, L, "forward")
        partials = torch.empty(6, grid[0], device=x.device, dtype=torch.float32)
        with _common.on_device_of(x):
            _jittered_view_fwd_kernel[grid](
                view,
                partials,
                x,
                draw,
                C,
                H,
                L,
                *view_strides,
                *x_strides,
                step,
                *inverse_counts(*x.shape),
                **meta,
            )
        sums = partials[:5].sum(1)  # (5,)
        tv_l1 = sums[0]
        norms = sums[1:].sqrt()  # (4,)
        image_norms = partials[5].view(N, -1).sum(1).sqrt()  # (N,)
        ctx.save_for_backward(x, draw, norms, image_norms)
        return view, tv_l1, norms.sum(), image_norms.mean()

    @staticmethod
    def backward(ctx, dview, grad_l1, grad_l2, grad_norm):
        _common.refuse_double_backward("jittered_view")
        x, draw, norms, image_norms = ctx.saved_tensors
        if not _common.runs_triton(x):
            return _backward_cpu(ctx, dview, grad_l1, grad_l2, grad_norm), None, None

        if dview is None:
            dview = torch.zeros_like(x)
        grads = [grad_l1, grad_l2, grad_norm]
        if any(grad is None for grad in grads):
            zero = norms.new_zeros(())
            grads = [zero if grad is None else grad for grad in grads]
        dx = torch.empty_like(x)
        (planes, C, H, L), step, (dx_strides, dview_strides, x_strides) = walk_planes(dx, dview, x)
        grid, meta = tiling(planes, H, L, "backward")
        with _common.on_device_of(x):
            _jittered_view_bwd_kernel[grid](
                dx,
                dview,
                x,
                draw,
                norms,
                image_norms,
                *grads,
                1 / len(x),
                C,
                H,
                L,
                *dx_strides,
                *dview_strides,
                *x_strides,
                step,
                *inverse_counts(*x.shape),
                **meta,
            )
        return dx, None, None


def jittered_view(x, draw, dtype=None):
    """Roll and mirror images by an amount in device memory; return the result and its priors.

    view[n, c, i, j] = x[n, c, (i - dy) mod H, (j' - dx) mod W], where j' = W - 1 - j if mirrored
    and j otherwise; then `total_variation` of the view and the mean norm of its images.

    Args:
        x: (N, C, H, W) images in normalised units, H and W at least 2; float32, float16 or
            bfloat16, any strides.
        draw: (3,) int64 on x's device: dy and dx, the pixels to roll downwards and to the right, of
            any size and sign; then whether to mirror left to right (not 0). The roll comes first,
            as in the released code.
        dtype: of the view: float32, float16 or bfloat16; None means that of x.

    Returns:
        view: (N, C, H, W) of `dtype`, channels_last.
        tv_l1, tv_l2: () fp32, `total_variation` of the view: a mean of |d|, and a sum of norms over
            the whole batch.
        l2: () fp32, the un-squared norm of an image, averaged over the images.

    Raises:
        TypeError: x is no tensor or of another dtype; draw is not int64; dtype is another one.
        ValueError: x is empty, not 4-D, or has less than 2 rows or columns; draw has another shape
            or device.

    Note:
        Differentiable once, in x; all four results have gradients. The priors are computed from x,
        before the view is rounded to `dtype`. The slope of |d| at 0 is 0, and so is that of a norm
        that is exactly 0. The gradient has x's memory layout. Repeated calls are bit-equal. On a
        GPU the host does not synchronise with it.

    Example:
        >>> image = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
        >>> draw = torch.tensor([1, 0, 1])  # one row down, mirrored
        >>> view, tv_l1, tv_l2, l2 = jittered_view(image, draw)
        >>> view.tolist(), l2.item()
        ([[[[0.0, 0.0], [4.0, 3.0]]]], 5.0)
    """
    _common.check_float("jittered_view", x=x)
    if dtype is None:
        dtype = x.dtype
    if dtype not in _common.DTYPES:
        raise TypeError(
            f"jittered_view: expected dtype float32, float16 or bfloat16, got {dtype}; "
            f"choose one of them"
        )
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(
            f"jittered_view: expected x (N, C, H, W), H and W at least 2, got {tuple(x.shape)}; "
            f"use x[None] for one"
        )
    if not isinstance(draw, torch.Tensor) or draw.dtype != torch.int64:
        got = getattr(draw, "dtype", type(draw).__name__)
        raise TypeError(
            f"jittered_view: expected draw as an int64 tensor, got {got}; make it with torch.tensor"
        )
    if draw.shape != (3,) or draw.device != x.device or not draw.is_contiguous():
        raise ValueError(
            f"jittered_view: expected draw (3,), dense, on {x.device}, got {tuple(draw.shape)} "
            f"on {draw.device}; move or reshape it"
        )
    return _JitteredView.apply(x, draw, dtype)
