"""A frozen BatchNorm, the addition and the ReLU after it, and the batch moments of its input, in one read of it.

    s_c = weight_c / sqrt(running_var_c + eps)
    y   = act(s_c (x - running_mean_c) + bias_c + residual)         act: ReLU or nothing; residual: or nothing
    mean_c - running_mean_c, var_c of x, biased, as `bn_moments` has them
    dx  = s_c g + a_c + b_c (x - mean_c),   g = dy [y > 0],   a = g_mean / n,   b = 2 g_var / n;   dresidual = g

An inversion step (Yin et al., arXiv:1912.08795, eq. 4-6) needs both of every BatchNorm of a frozen teacher: its output
in eval mode, and how far the moments of its input are from the running ones. Conventional code has a layer in eval
mode, a ReLU, and a hook that reads the input again, twice for the variance, and whose backward reads it twice more.

Traffic, in sizes of x, without a residual. Eager: BatchNorm 2 (read, write), ReLU 2, moments 6; backward: ReLU 3 (it
reads y and dy, writes), BatchNorm 2 to 3, moments about 12, the sum of the two gradients 3: about 30 in all.
Fused: forward reads x, writes y: 2; backward reads x and dy, writes dx: 3; the mask is formed again from x. Best
possible ratio: 30 / 5 = 6. A residual adds its read; its backward reads y for the mask and writes dresidual.
The weights and running statistics are constants here: no gradient reaches them.
"""

import torch
import torch.nn.functional as F

from kernels import _common
from kernels._channels import (
    BACKWARD_PROGRAMS,
    FORWARD_PROGRAMS,
    merged_moments,
    plan,
    row_offsets,
    store_partial,
    welford,
)
from kernels._common import tl, triton
from kernels.bn_moments import _torch_dx, _torch_moments, bn_moments_ref


def bn_act_moments_ref(x, weight, bias, running_mean, running_var, eps=1e-5, residual=None, relu=True):
    """The definition in plain PyTorch, differentiable by autograd in x and residual: see bn_act_moments."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, running_mean, running_var = (v.detach().to(dtype) for v in (weight, bias, running_mean, running_var))
    y = F.batch_norm(x.to(dtype), running_mean, running_var, weight, bias, training=False, eps=eps)
    y = y if residual is None else y + residual.to(dtype)
    y = F.relu(y) if relu else y
    mean, var = bn_moments_ref(x, running_mean)
    return y.to(x.dtype), torch.stack((mean - running_mean, var))


@triton.jit
def _bn_act_moments_fwd_kernel(
    y_ptr,  # out, shape of x
    partial_ptr,  # (3, P, C) out: count, mean - running_mean, sum of squared deviations of each program
    x_ptr,  # (N, C, *spatial)
    residual_ptr,  # shape of x; unused unless HAS_RESIDUAL
    affine_ptr,  # (3, C) fp32: running_mean, scale, bias
    n_rows,  # positions along the rows
    n_columns,  # C if CHANNELS_INSIDE, else positions along the columns
    n_channels,  # C
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_part,  # P C
    stride_x0,  # strides of the row dimensions of x, along its columns, along its channels
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,
    stride_xc,
    stride_y0,  # the same six of y
    stride_y1,
    stride_y2,
    stride_y3,
    stride_ycol,
    stride_yc,
    stride_r0,  # the same six of the residual
    stride_r1,
    stride_r2,
    stride_r3,
    stride_rcol,
    stride_rc,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,  # columns are channels
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    column_tile = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    offs_col = column_tile * BLOCK_COL + tl.arange(0, BLOCK_COL)
    mask_col = offs_col < n_columns
    if CHANNELS_INSIDE:
        channels, mask_c = offs_col, mask_col
        offs_partial = chunk * n_channels + channels
    else:
        channels, mask_c = channel, channel < n_channels  # always
        offs_partial = (chunk * tl.num_programs(1) + column_tile) * n_channels + channels
        x_ptr += channel * stride_xc
        y_ptr += channel * stride_yc
        residual_ptr += channel * stride_rc
    shift = tl.load(affine_ptr + channels, mask=mask_c, other=0.0)  # a vector or a scalar
    scale = tl.load(affine_ptr + n_channels + channels, mask=mask_c, other=0.0)
    bias = tl.load(affine_ptr + 2 * n_channels + channels, mask=mask_c, other=0.0)

    # a lane that is valid now was valid in all steps before, so `step` is its count
    mean = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
    m2 = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
    count = tl.zeros((BLOCK_ROW,), tl.float32)
    step = 0.0
    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask_row = rows < n_rows
        mask = mask_row[:, None] & mask_col[None, :]
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3)
        x = tl.load(x_ptr + offs_row[:, None] + offs_col[None, :] * stride_xcol, mask=mask, other=0.0)
        x = x.to(tl.float32) - shift
        y = x * scale + bias
        if HAS_RESIDUAL:
            offs_row = row_offsets(rows, size_1, size_2, size_3, stride_r0, stride_r1, stride_r2, stride_r3)
            offs = offs_row[:, None] + offs_col[None, :] * stride_rcol
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_y0, stride_y1, stride_y2, stride_y3)
        offs = offs_row[:, None] + offs_col[None, :] * stride_ycol
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        step += 1.0
        mean, m2 = welford(x, mask, mean, m2, step)
        count += mask_row.to(tl.float32)

    store_partial(partial_ptr + offs_partial, stride_part, mask_c, count, mask_col, mean, m2, CHANNELS_INSIDE)


@triton.jit
def _bn_act_moments_bwd_kernel(
    dx_ptr,  # out, shape of x
    dresidual_ptr,  # out, shape of x; unused unless NEEDS_RESIDUAL
    x_ptr,  # (N, C, *spatial)
    y_ptr,  # shape of x; read for the mask where there was a residual
    dy_ptr,  # shape of x
    affine_ptr,  # (3, C) fp32: running_mean, scale, bias
    mean_ptr,  # (C,) fp32: mean - running_mean
    grad_ptr,  # (2, C) fp32: gradient of mean, of var; in each row dense
    n_rows,  # positions along the rows
    n_columns,  # C if CHANNELS_INSIDE, else positions along the columns
    n_channels,  # C
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_grad,  # between the rows of grad: C, or more where all layers' moments were one tensor
    stride_x0,  # strides of the row dimensions of x, along its columns, along its channels
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,
    stride_xc,
    stride_y0,  # the same six of y, dx and dresidual
    stride_y1,
    stride_y2,
    stride_y3,
    stride_ycol,
    stride_yc,
    stride_dy0,  # the same six of dy
    stride_dy1,
    stride_dy2,
    stride_dy3,
    stride_dycol,
    stride_dyc,
    inverse_n,  # 1 / n
    HAS_RESIDUAL: tl.constexpr,
    NEEDS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,  # columns are channels
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    offs_col = tl.program_id(1).to(tl.int64) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    chunk = tl.program_id(2).to(tl.int64)
    mask_col = offs_col < n_columns
    if CHANNELS_INSIDE:
        channels, mask_c = offs_col[None, :], mask_col[None, :]
    else:
        channels, mask_c = channel, channel < n_channels  # always
        x_ptr += channel * stride_xc
        dx_ptr += channel * stride_yc
        dresidual_ptr += channel * stride_yc
        y_ptr += channel * stride_yc
        dy_ptr += channel * stride_dyc
    shift = tl.load(affine_ptr + channels, mask=mask_c, other=0.0)
    scale = tl.load(affine_ptr + n_channels + channels, mask=mask_c, other=0.0)
    bias = tl.load(affine_ptr + 2 * n_channels + channels, mask=mask_c, other=0.0)
    mean = tl.load(mean_ptr + channels, mask=mask_c, other=0.0)
    a = tl.load(grad_ptr + channels, mask=mask_c, other=0.0) * inverse_n
    b = tl.load(grad_ptr + stride_grad + channels, mask=mask_c, other=0.0) * (2.0 * inverse_n)
    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3)
        x = tl.load(x_ptr + offs_row[:, None] + offs_col[None, :] * stride_xcol, mask=mask, other=0.0)
        x = x.to(tl.float32) - shift
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_dy0, stride_dy1, stride_dy2, stride_dy3)
        g = tl.load(dy_ptr + offs_row[:, None] + offs_col[None, :] * stride_dycol, mask=mask, other=0.0)
        g = g.to(tl.float32)
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_y0, stride_y1, stride_y2, stride_y3)
        offs = offs_row[:, None] + offs_col[None, :] * stride_ycol
        if RELU:
            if HAS_RESIDUAL:
                y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            else:
                y = (x * scale + bias).to(y_ptr.dtype.element_ty).to(tl.float32)  # as it was stored
            g = tl.where(y <= 0.0, 0.0, g)
        if NEEDS_RESIDUAL:
            tl.store(dresidual_ptr + offs, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dx = g * scale + a + b * (x - mean)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def fold(weight, bias, running_mean, running_var, eps):
    """(3, C) fp32: running_mean, scale, bias, as the kernels take them; for a frozen layer once."""
    scale = weight.float() * torch.rsqrt(running_var.float() + eps)
    return torch.stack((running_mean.float(), scale, bias.float())).detach()


def _forward_triton(x, residual, affine, relu):
    y = torch.empty_like(x)  # keeps a dense layout; of an x with holes or overlaps it is dense
    other = x if residual is None else residual
    grid, sizes, strides, blocks = plan(FORWARD_PROGRAMS, x.shape, x.stride(), y.stride(), other.stride())
    n_channels, n_partials = x.size(1), grid[2] if blocks["CHANNELS_INSIDE"] else grid[1] * grid[2]
    partial = torch.empty((3, n_partials, n_channels), device=x.device, dtype=torch.float32)
    strides = [step for steps in strides for step in steps]
    _bn_act_moments_fwd_kernel[grid](
        y, partial, x, other, affine, *sizes, n_partials * n_channels, *strides, residual is not None, relu, **blocks
    )
    return y, merged_moments(partial, n_channels, n_partials)


def _backward_triton(x, y, affine, mean, dy, grads, has_residual, needs_residual, relu):
    dx = torch.empty_like(y)
    dresidual = torch.empty_like(y) if needs_residual else None
    grid, sizes, strides, blocks = plan(BACKWARD_PROGRAMS, x.shape, x.stride(), dx.stride(), dy.stride())
    if grads.stride(1) != 1:  # one layer's slice of all layers' is taken as it is
        grads = grads.contiguous()
    strides, inverse_n = [step for steps in strides for step in steps], x.size(1) / x.numel()
    flags = (has_residual, needs_residual, relu)
    _bn_act_moments_bwd_kernel[grid](
        dx,
        dx if dresidual is None else dresidual,
        x,
        y,
        dy,
        affine,
        mean,
        grads,
        *sizes,
        grads.stride(0),
        *strides,
        inverse_n,
        *flags,
        **blocks,
    )
    return dx, dresidual


class _BNActMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, affine, relu):
        ctx.relu, ctx.has_residual = relu, residual is not None
        if _common.runs_triton(x):
            y, moments = _forward_triton(x, residual, affine, relu)
            ctx.save_for_backward(x, y, affine, None, moments)
            return y, moments
        shift, scale, bias = affine
        y = F.batch_norm(x.float(), shift, torch.ones_like(scale), scale, bias, training=False, eps=0.0)
        y = y if residual is None else y.add_(residual)
        y = (y.relu_() if relu else y).to(x.dtype)
        moments, origin = _torch_moments(x, shift)
        ctx.save_for_backward(x, y, affine, origin, moments[0])
        from_running = moments[0] - affine[0] if origin is None else moments[0]
        return y, torch.stack((from_running, moments[1]))

    @staticmethod
    def backward(ctx, dy, grads):
        _common.refuse_double_backward("bn_act_moments")
        x, y, affine, origin, mean = ctx.saved_tensors  # of mean the kernel reads the first C numbers
        needs_residual = ctx.needs_input_grad[1]
        if _common.runs_triton(x):
            dx, dresidual = _backward_triton(x, y, affine, mean, dy, grads, ctx.has_residual, needs_residual, ctx.relu)
            return dx, dresidual, None, None
        g = torch.ops.aten.threshold_backward(dy, y, 0) if ctx.relu else dy
        dx = _torch_dx(x, origin, mean, grads)
        dx = torch.addcmul(dx, g, affine[1].to(dx.dtype).view(-1, *[1] * (x.dim() - 2)))
        return dx, g.to(x.dtype) if needs_residual else None, None, None


def bn_act_moments(x, weight, bias, running_mean, running_var, eps=1e-5, residual=None, relu=True):
    """BatchNorm in eval mode, plus a residual, through a ReLU; and the batch moments of x: one read of x.

    y = relu(weight (x - running_mean) / sqrt(running_var + eps) + bias + residual)

    Args:
        x: (N, C, *spatial), what enters the BatchNorm, 0 to 3 spatial dimensions; fp32, fp16 or bf16, any strides.
        weight, bias, running_mean, running_var: (C,) of a float dtype; constants, running_var + eps > 0.
        eps: a python number.
        residual: of x's shape and dtype, any strides, added before the ReLU; None: nothing.
        relu: whether there is a ReLU.

    Returns:
        y: shape and dtype of x, in its memory format.
        moments: (2, C) fp32: mean(x) - running_mean in the unit of x, and the biased variance. The first is what the
            moment loss takes the norm of; as a difference it keeps digits that the mean itself has not.

    Raises:
        TypeError: a tensor is none, or not fp32, fp16 or bf16.
        ValueError: an argument is empty, of another shape than said or on another device.

    Note:
        Differentiable once in x and residual. Where y is 0 the ReLU's gradient is 0. Arithmetic in fp32; y is rounded
        once, where a BatchNorm and an addition in half precision round twice. Repeated calls are bit-equal.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # N 1, C 2, length 2
        >>> one = torch.ones(2)
        >>> y, moments = bn_act_moments(x, one, 0 * one, torch.tensor([2.0, 4.0]), one, eps=0.0)
        >>> y.tolist(), moments.tolist()
        ([[[0.0, 1.0], [1.0, 1.0]]], [[0.0, 1.0], [1.0, 0.0]])
    """
    vectors = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _common.check_float("bn_act_moments", x=x, residual=residual, **vectors)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"bn_act_moments: expected x (N, C, *spatial), 2-D to 5-D, got {tuple(x.shape)}; reshape it")
    for name, vector in vectors.items():
        if vector is None or vector.shape != x.shape[1:2]:
            shape = None if vector is None else tuple(vector.shape)
            raise ValueError(f"bn_act_moments: expected {name} of shape ({x.size(1)},), got {shape}; one per channel")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"bn_act_moments: expected residual of {tuple(x.shape)} {x.dtype}, got {got}; match it to x")
    return _BNActMoments.apply(x, residual, fold(weight, bias, running_mean, running_var, eps), relu)


def bn_act_moments_folded(x, affine, residual=None, relu=True):
    """`bn_act_moments` for constants that are folded already, by `fold`, and fit x: nothing is checked."""
    return _BNActMoments.apply(x, residual, affine, relu)
