"""What the teacher sees of the images, rolled and mirrored at random, and the image priors on it: one pass over them.

    view[n, c, i, j] = x[n, c, (i - dy) mod H, (j' - dx) mod W],   j' = W - 1 - j if mirrored, else j
    tv_l1, tv_l2 = `total_variation` of the view;   l2 = mean_n ||view_n||
    dx = dview brought back + g_l1 dtv_l1/dx + g_l2 dtv_l2/dx + g x / (N ||x_n||), 0 for a norm that is exactly 0

dy, dx and whether to mirror are read from device memory, so that one captured CUDA graph serves every step's draw: a
torch.roll takes numbers that the host must know.

Source: the augmentations and priors R_TV, R_l2 of DeepInversion (Yin et al., arXiv:1912.08795, eq. 3; supplement). As
in its released code there is one draw for the batch, the roll is cyclic and the priors are those of the view: the
seam that the roll brings inside counts, the new border does not. l2, and the norms of images mirrored, are the same
for x and view; the kernels therefore walk over x, whose neighbours are the view's but across its border.

Traffic in passes over x (4 NCHW bytes each in fp32):
    eager  forward: roll 4 (two dimensions), flip 2, channels_last copy 2, total variation 28, norm 1; backward: about
           100 for the total variation, norm 3, flip 2, roll 4, sums of three gradients 6: about 150 in all
    fused  forward: x read, view written, 2; backward: x and dview read, dx written, 3
    best possible ratio: 150 / 5 = 30; a bf16 view saves half a pass each way, and the cast that a convolution made
"""

import torch

from kernels import _common
from kernels._common import tl, triton
from kernels.total_variation import (
    _backward_torch,
    _forward_torch,
    _inverse_counts,
    _planes,
    _tiling,
    l2_weight,
    plane_and_tile,
    slope,
    slope_weights,
    store_shares,
    total_variation_ref,
)


def _sources(draw, H, W):
    """The rows (H,) and columns (W,) of x that each row and column of the view shows."""
    rows, columns = (torch.arange(n, device=draw.device) for n in (H, W))
    columns = torch.where(draw[2] != 0, W - 1 - columns, columns)
    return (rows - draw[0]) % H, (columns - draw[1]) % W


def jittered_view_ref(x, draw, dtype=None):
    """The definition in plain PyTorch: see jittered_view. float64 stays float64, priors of half precision are fp32."""
    rows, columns = _sources(draw, *x.shape[2:])
    view = x.to(torch.promote_types(x.dtype, torch.float32))[:, :, rows[:, None], columns]
    l2 = torch.linalg.vector_norm(view.flatten(1), dim=1).mean()
    tv_l1, tv_l2 = total_variation_ref(view)
    return view.to(dtype or x.dtype, memory_format=torch.channels_last), tv_l1, tv_l2, l2


@triton.jit
def _places(draw_ptr, rows, cols, H, L, step):
    """Of pixels of x: their rows and columns in the rolled image, those in the view, and x's next rows and columns."""
    W = L // step
    # a remainder has the sign of the dividend; one of the draw for the whole program, none for each pixel
    dy = ((tl.load(draw_ptr) % H + H) % H).to(tl.int32)
    dx = ((tl.load(draw_ptr + 1) % W + W) % W).to(tl.int32)
    mirrored = tl.load(draw_ptr + 2)
    w = cols.to(tl.int32) // step
    i, j = rows.to(tl.int32) + dy, w + dx
    i, j = tl.where(i >= H, i - H, i), tl.where(j >= W, j - W, j)
    view_cols = tl.where(mirrored != 0, W - 1 - j, j) * step + cols - w * step
    rows_below = tl.where(rows + 1 < H, rows + 1, 0)
    cols_right = tl.where(cols + step < L, cols + step, cols + step - L)
    return i, j, view_cols, rows_below, cols_right, W


@triton.jit
def _jittered_view_fwd_kernel(
    view_ptr,  # out, images as the teacher sees them
    partials_ptr,  # (6, n_programs) fp32 out: this tile's share of l1, four sums of squares of differences, one of x
    x_ptr,  # images
    draw_ptr,  # (3,) int64: roll downwards, roll to the right, mirrored or not
    C,  # planes per image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane: W, or W * C where the channels are part of the columns
    stride_vn,
    stride_vc,
    stride_vh,
    stride_vl,
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
    x_ptr += (plane // C) * stride_xn + (plane % C) * stride_xc
    view_ptr += (plane // C) * stride_vn + (plane % C) * stride_vc
    i, j, view_cols, rows_below, cols_right, W = _places(draw_ptr, rows, cols, H, L, step)

    here = (rows < H) & (cols < L)
    has_right = here & (j < W - 1)
    has_below = here & (i < H - 1)
    has_both = has_right & has_below
    x00 = tl.load(x_ptr + rows * stride_xh + cols * stride_xl, mask=here, other=0.0).to(tl.float32)
    x01 = tl.load(x_ptr + rows * stride_xh + cols_right * stride_xl, mask=has_right, other=0.0).to(tl.float32)
    x10 = tl.load(x_ptr + rows_below * stride_xh + cols * stride_xl, mask=has_below, other=0.0).to(tl.float32)
    x11 = tl.load(x_ptr + rows_below * stride_xh + cols_right * stride_xl, mask=has_both, other=0.0).to(tl.float32)
    tl.store(view_ptr + i * stride_vh + view_cols * stride_vl, x00.to(view_ptr.dtype.element_ty), mask=here)
    counts = inv_count_h, inv_count_v, inv_count_d
    store_shares(partials_ptr, x00, x01, x10, x11, has_right, has_below, has_both, counts)
    tl.store(partials_ptr + 5 * tl.num_programs(0) + tl.program_id(0).to(tl.int64), tl.sum(x00 * x00))


@triton.jit
def _jittered_view_bwd_kernel(
    dx_ptr,  # out, gradient of the images
    dview_ptr,  # gradient of the view
    x_ptr,  # images
    draw_ptr,  # (3,) int64: roll downwards, roll to the right, mirrored or not
    norms_ptr,  # (4,) fp32: of the horizontal, vertical, diagonal and anti-diagonal differences
    image_norms_ptr,  # (N,) fp32
    grads_ptr,  # (3,) fp32: gradient of tv_l1, of tv_l2, of l2
    inverse_n,  # 1 / N
    C,  # planes per image; 1 where the channels are part of the columns
    H,  # rows of a plane
    L,  # columns of a plane
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dl,
    stride_vn,  # of dview
    stride_vc,
    stride_vh,
    stride_vl,
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
    x_ptr += (plane // C) * stride_xn + (plane % C) * stride_xc
    dview_ptr += (plane // C) * stride_vn + (plane % C) * stride_vc
    dx_ptr += (plane // C) * stride_dn + (plane % C) * stride_dc
    i, j, view_cols, rows_below, cols_right, W = _places(draw_ptr, rows, cols, H, L, step)
    above = tl.where(rows > 0, rows - 1, H - 1) * stride_xh
    below = rows_below * stride_xh
    left = tl.where(cols >= step, cols - step, cols - step + L) * stride_xl
    right = cols_right * stride_xl

    grad_l1, grad_l2 = tl.load(grads_ptr), tl.load(grads_ptr + 1)
    counts = inv_count_h, inv_count_v, inv_count_d
    h1, v1, d1, h2, v2, d2, a2 = slope_weights(grad_l1, grad_l2, norms_ptr, counts)
    of_norm = l2_weight(tl.load(grads_ptr + 2) * inverse_n, image_norms_ptr + plane // C)

    here = (rows < H) & (cols < L)
    to_left, to_right, up, down = here & (j > 0), here & (j < W - 1), here & (i > 0), here & (i < H - 1)
    row, col = rows * stride_xh, cols * stride_xl
    x = tl.load(x_ptr + row + col, mask=here, other=0.0).to(tl.float32)
    dx = tl.load(dview_ptr + i * stride_vh + view_cols * stride_vl, mask=here, other=0.0).to(tl.float32)
    dx += of_norm * x + slope(x_ptr + row + left, to_left, x, h1, h2) + slope(x_ptr + row + right, to_right, x, h1, h2)
    dx += slope(x_ptr + above + col, up, x, v1, v2) + slope(x_ptr + below + col, down, x, v1, v2)
    dx += slope(x_ptr + above + left, to_left & up, x, d1, d2)
    dx += slope(x_ptr + below + right, to_right & down, x, d1, d2)
    dx += slope(x_ptr + above + right, to_right & up, x, d1, a2)
    dx += slope(x_ptr + below + left, to_left & down, x, d1, a2)
    tl.store(dx_ptr + rows * stride_dh + cols * stride_dl, dx.to(dx_ptr.dtype.element_ty), mask=here)


def _moved(x, rows, columns):
    """x[:, :, rows][:, :, :, columns] in one gather, channels_last."""
    moved = x.permute(0, 2, 3, 1)[:, rows[:, None], columns].permute(0, 3, 1, 2)
    return moved.contiguous(memory_format=torch.channels_last)  # as it is, but for odd layouts of x


class _JitteredView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, draw, dtype):
        ctx.set_materialize_grads(False)  # a term that no loss uses costs nothing on the CPU
        if _common.runs_triton(x):
            view = torch.empty(x.shape, device=x.device, dtype=dtype, memory_format=torch.channels_last)
            (planes, C, H, L), step, strides = _planes(x, view)
            grid, meta = _tiling(planes, H, L, "forward")
            partials = torch.empty(6, grid[0], device=x.device, dtype=torch.float32)
            sizes, counts = (C, H, L, *strides[1], *strides[0], step), _inverse_counts(*x.shape)
            _jittered_view_fwd_kernel[grid](view, partials, x, draw, *sizes, *counts, **meta)
            tv_l1, norms = partials[0].sum(), partials[1:5].sum(1).sqrt()  # (), (4,)
            image_norms = partials[5].view(len(x), -1).sum(1).sqrt()  # (N,)
            ctx.save_for_backward(x, draw, norms, image_norms)
        else:
            x32 = _moved(x.float(), *_sources(draw, *x.shape[2:]))
            view = x32.to(dtype)
            tv_l1, norms = _forward_torch(x32)
            ctx.dtype, ctx.strides = x.dtype, torch.empty_like(x, device="meta").stride()
            image_norms = torch.linalg.vector_norm(x32.flatten(1), dim=1)  # (N,)
            ctx.save_for_backward(x32, draw, norms, image_norms)
        return view, tv_l1, norms.sum(), image_norms.mean()

    @staticmethod
    def backward(ctx, dview, grad_l1, grad_l2, grad_norm):
        _common.refuse_double_backward("jittered_view")
        x, draw, norms, image_norms = ctx.saved_tensors
        counts = _inverse_counts(*x.shape)
        if not _common.runs_triton(x):
            return _backward_cpu(ctx, dview, grad_l1, grad_l2, grad_norm, counts), None, None
        zero = norms.new_zeros(())
        grads = torch.stack([zero if g is None else g for g in (grad_l1, grad_l2, grad_norm)])  # (3,)
        dview = torch.zeros_like(x) if dview is None else dview
        gradient = torch.empty_like(x)
        (planes, C, H, L), step, strides = _planes(gradient, dview, x)
        grid, meta = _tiling(planes, H, L, "backward")
        sizes = (C, H, L, *(stride for of_one in strides for stride in of_one), step)
        _jittered_view_bwd_kernel[grid](
            gradient, dview, x, draw, norms, image_norms, grads, 1 / len(x), *sizes, *counts, **meta
        )
        return gradient, None, None


def _backward_cpu(ctx, dview, grad_l1, grad_l2, grad_norm, counts):
    x, draw, norms, image_norms = ctx.saved_tensors  # x as rolled and mirrored
    rows, columns = _sources(draw, *x.shape[2:])
    if grad_l1 is None and grad_l2 is None:
        gradient = torch.zeros_like(x) if dview is None else dview.float()
    else:
        gradient = _backward_torch(x, norms, grad_l1, grad_l2, counts)
        gradient = gradient if dview is None else gradient.add_(dview)
    if grad_norm is not None:
        of_norm = torch.where(image_norms == 0, 0.0, grad_norm / (len(x) * image_norms))
        gradient = torch.addcmul(gradient, x, of_norm.view(-1, 1, 1, 1))
    gradient = _moved(gradient, rows.argsort(), columns.argsort())  # the way back
    if gradient.stride() == ctx.strides and gradient.dtype == ctx.dtype:
        return gradient
    return torch.empty_strided(gradient.shape, ctx.strides, dtype=ctx.dtype).copy_(gradient)


def jittered_view(x, draw, dtype=None):
    """Images rolled cyclically and mirrored by an amount in device memory, and the priors on what results.

    Args:
        x: (N, C, H, W) images in normalised units, H and W at least 2; float32, float16 or bfloat16, any strides.
        draw: (3,) int64 on x's device: pixels to roll downwards and to the right, of any size and sign; mirrored left
            to right if the third is not 0. Roll first, as the released code has it.
        dtype: of the view: float32, float16 or bfloat16; None: that of x.

    Returns:
        view: (N, C, H, W) of `dtype`, channels_last.
        tv_l1, tv_l2: () fp32, `total_variation` of the view: a mean of |d|, and a sum of norms over the whole batch.
        l2: () fp32, the mean over images of the un-squared norm of an image.

    Raises:
        TypeError: x is no tensor or of another dtype; draw is not int64; dtype is none of the three.
        ValueError: x is empty, not 4-D, or has less than 2 rows or columns; draw has another shape or device.

    Note:
        Differentiable once, in x; all four results have gradients. The priors are computed from x, before the view is
        rounded to `dtype`. The slope of |d| at 0 is 0, and so is that of a norm that is exactly 0. The gradient has
        x's memory layout. Repeated calls are bit-equal. No host synchronisation on a GPU.

    Example:
        >>> image = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
        >>> view, tv_l1, tv_l2, l2 = jittered_view(image, torch.tensor([1, 0, 1]))  # one row down, mirrored
        >>> view.tolist(), l2.item()
        ([[[[0.0, 0.0], [4.0, 3.0]]]], 5.0)
    """
    _common.check_float("jittered_view", x=x)
    dtype = x.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"jittered_view: expected dtype float32, float16 or bfloat16, got {dtype}; choose one of them")
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        got = tuple(x.shape)
        raise ValueError(f"jittered_view: expected x (N, C, H, W), H and W at least 2, got {got}; use x[None] for one")
    if not isinstance(draw, torch.Tensor) or draw.dtype != torch.int64:
        got = getattr(draw, "dtype", type(draw).__name__)
        raise TypeError(f"jittered_view: expected draw as an int64 tensor, got {got}; make it with torch.tensor")
    if draw.shape != (3,) or draw.device != x.device or not draw.is_contiguous():
        got = f"{tuple(draw.shape)} on {draw.device}"
        raise ValueError(f"jittered_view: expected draw (3,), dense, on {x.device}, got {got}; move or reshape it")
    return _JitteredView.apply(x, draw, dtype)
