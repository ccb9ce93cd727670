"""A frozen BatchNorm, the addition and the activation after it, and its input's batch moments.

    s_c = weight_c / sqrt(running_var_c + eps)
    u   = s_c (x - running_mean_c) + bias_c + residual         residual: a tensor or nothing
    y   = act(u)
    moments: mean_c - running_mean_c and var_c of x, biased, as in `bn_moments`
    dx  = s_c g + a_c + b_c (x - mean_c),   g = dy act'(u),   a = g_mean / n,   b = 2 g_var / n
    dresidual = g

    activation  act(u)                          act'(u)
    none        u                               1
    relu        max(u, 0)                       1 where u > 0, else 0
    relu6       min(max(u, 0), 6)               1 where 0 < u < 6, else 0
    silu        u sigmoid(u)                    sigmoid(u) (1 + u (1 - sigmoid(u)))
    hardswish   u min(max(u + 3, 0), 6) / 6     0 where u <= -3, 1 where u >= 3, else u / 3 + 1 / 2

Values and slopes are those of torch.nn.functional, at the borders too. relu and relu6 take their
slope at u rounded to the dtype of y: it is 0 exactly where y, as stored, is 0 (or 6 for relu6). The
CPU path takes all slopes there.

An inversion step (Yin et al., arXiv:1912.08795, eq. 4-6) needs two things of every BatchNorm of a
frozen teacher: its output in eval mode, and how far the moments of its input are from the running
ones. Conventional code has a layer in eval mode, an activation, and a hook that reads the input
again, twice for the variance, and whose backward pass reads it twice more. ReLU6 follows the
BatchNorms of MobileNetV2, hardswish those of MobileNetV3, SiLU those of EfficientNet.

Traffic, in sizes of x, without a residual, the same for all activations but none:
    eager  forward: BatchNorm 2 (read, write), activation 2, moments 6. Backward: activation 3
           (reads dy and y or u, writes), BatchNorm 2 to 3, moments about 12, the sum of both
           gradients 3. About 30, and 5 fewer without an activation.
    fused  forward 2: reads x, writes y. Backward 3: reads x and dy, writes dx; act'(u) is computed
           again from x. Without an activation 5 as well.
    best possible ratio: 30 / 5 = 6
With a residual, fused:
    none                    6: the forward pass also reads the residual; dresidual is dy itself
    relu                    8: the backward pass also reads y and writes dresidual
    relu6, silu, hardswish  8: the backward pass also reads the residual and writes dresidual

Where two layers read y, as where a residual branches off, the backward pass reads both their
gradients: 1 more. Autograd would add them first: 3 more.

What the kernels save for the backward pass: x, and with a residual y (relu) or the residual (relu6,
silu, hardswish). The CPU path saves, beside x, what plain PyTorch saves: y for relu, u for relu6,
silu and hardswish, nothing for none. So y may be modified in place wherever that works after the
plain layers: after every activation but relu.

The weights and running statistics are constants here: they get no gradient.
"""

import math

import torch
import torch.nn.functional as F

from kernels import _common
from kernels._channels import (
    BACKWARD_PROGRAMS,
    FORWARD_PROGRAMS,
    add_value,
    check_channels,
    compute_row_offsets,
    locate_program,
    merge_partials,
    plan,
    store_partial,
)
from kernels._common import tl, triton
from kernels.bn_moments import (
    bn_moments_ref,
    compute_dx_on_cpu,
    compute_moments_on_cpu,
    fold_dx,
    is_channels_last,
    scale_channels,
    view_rows,
)

ACTIVATIONS = {
    "none": None,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def bn_act_moments_ref(
    x, weight, bias, running_mean, running_var, eps=1e-5, residual=None, activation="relu"
):
    """The definition in plain PyTorch, differentiable by autograd in x and residual.

    float64 stays float64; half precision is computed in fp32.
    """
    check_activation(activation)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.batch_norm(
        x.to(dtype),
        running_mean.detach().to(dtype),
        running_var.detach().to(dtype),
        weight.detach().to(dtype),
        bias.detach().to(dtype),
        training=False,
        eps=eps,
    )
    if residual is not None:
        y = y + residual.to(dtype)
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    mean, var = bn_moments_ref(x, running_mean)
    return y.to(x.dtype), torch.stack((mean - running_mean.detach(), var))


def check_activation(activation, op="bn_act_moments"):
    if activation not in ACTIVATIONS:
        choices = ", ".join(ACTIVATIONS)
        raise ValueError(f"{op}: expected activation in {choices}, got {activation!r}; choose one")


def check_residual(op, residual, shape, dtype):
    """Raise unless the residual is None or of this shape and dtype."""
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        expected = f"{tuple(shape)} {dtype}"
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"{op}: expected residual of {expected}, got {got}; match it to x")


@triton.jit
def apply_activation(
    u,  # fp32
    ACTIVATION: tl.constexpr,  # one of ACTIVATIONS
):
    """act(u). NaN stays NaN."""
    if ACTIVATION == "relu":
        u = tl.where(u < 0.0, 0.0, u)
    if ACTIVATION == "relu6":
        u = tl.where(u < 0.0, 0.0, u)
        u = tl.where(u > 6.0, 6.0, u)
    if ACTIVATION == "silu":
        u = u * tl.sigmoid(u)
    if ACTIVATION == "hardswish":
        gate = tl.where(u < -3.0, 0.0, u + 3.0)
        gate = tl.where(gate > 6.0, 6.0, gate)
        u = u * gate * (1.0 / 6.0)
    return u


@triton.jit
def multiply_by_slope(
    g,  # dy, fp32
    u,  # fp32; for relu y will do
    DTYPE: tl.constexpr,  # of y
    ACTIVATION: tl.constexpr,  # one of ACTIVATIONS
):
    """dy act'(u). The masks of relu and relu6 are those of y as it was stored."""
    if ACTIVATION == "relu":
        stored = u.to(DTYPE).to(tl.float32)
        g = tl.where(stored <= 0.0, 0.0, g)
    if ACTIVATION == "relu6":
        stored = u.to(DTYPE).to(tl.float32)
        g = tl.where(stored <= 0.0, 0.0, g)
        g = tl.where(stored >= 6.0, 0.0, g)
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(u)
        g = g * sigmoid * (1.0 + u * (1.0 - sigmoid))
    if ACTIVATION == "hardswish":
        slope = tl.where(u <= -3.0, 0.0, u * (1.0 / 3.0) + 0.5)
        slope = tl.where(u >= 3.0, 1.0, slope)
        g = g * slope
    return g


@triton.jit
def _bn_act_moments_fwd_kernel(
    y_ptr,  # out, shape of x
    partial_ptr,  # (3, P, C) out, a program each: count, mean - running_mean, squared deviations
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
    stride_x0,  # strides of x along the row dimensions
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,  # along the columns
    stride_xc,  # along the channels
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
    HAS_RESIDUAL: tl.constexpr,  # whether residual_ptr is read
    ACTIVATION: tl.constexpr,  # one of ACTIVATIONS
    CHANNELS_INSIDE: tl.constexpr,  # the columns are channels
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    channel, column_tile, chunk = locate_program(n_columns, BLOCK_COL)
    offs_col = column_tile * BLOCK_COL + tl.arange(0, BLOCK_COL)
    mask_col = offs_col < n_columns
    if CHANNELS_INSIDE:
        channels = offs_col
        mask_c = mask_col
        offs_partial = chunk * n_channels + channels
    else:
        channels = channel
        mask_c = channel < n_channels  # always
        part = chunk * tl.cdiv(n_columns, BLOCK_COL) + column_tile
        offs_partial = part * n_channels + channels
        x_ptr += channel * stride_xc
        y_ptr += channel * stride_yc
        residual_ptr += channel * stride_rc
    shift = tl.load(affine_ptr + channels, mask=mask_c, other=0.0)
    scale = tl.load(affine_ptr + n_channels + channels, mask=mask_c, other=0.0)
    bias = tl.load(affine_ptr + 2 * n_channels + channels, mask=mask_c, other=0.0)

    # A lane with a value in this step had one in every step before: `step` is its count.
    mean = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
    m2 = tl.zeros((BLOCK_ROW, BLOCK_COL), tl.float32)
    count = tl.zeros((BLOCK_ROW,), tl.float32)
    step = 0.0
    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask_row = rows < n_rows
        mask = mask_row[:, None] & mask_col[None, :]
        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_xcol
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - shift
        y = x * scale + bias
        if HAS_RESIDUAL:
            offs_row = compute_row_offsets(
                rows, size_1, size_2, size_3, stride_r0, stride_r1, stride_r2, stride_r3
            )
            offs = offs_row[:, None] + offs_col[None, :] * stride_rcol
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = apply_activation(y, ACTIVATION)
        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_y0, stride_y1, stride_y2, stride_y3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_ycol
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)

        step += 1.0
        mean, m2 = add_value(x, mask, mean, m2, step)
        count += mask_row.to(tl.float32)

    store_partial(
        partial_ptr + offs_partial, stride_part, mask_c, count, mask_col, mean, m2, CHANNELS_INSIDE
    )


@triton.jit
def _bn_act_moments_bwd_kernel(
    dx_ptr,  # out, shape of x
    dresidual_ptr,  # out, shape of x; unused unless NEEDS_RESIDUAL
    x_ptr,  # (N, C, *spatial)
    dy_ptr,  # shape of x
    dy_again_ptr,  # shape and strides of dy, added to it; unused unless HAS_DY_AGAIN
    saved_ptr,  # shape of x: y or the residual; unused where SAVED is "nothing"
    affine_ptr,  # (3, C) fp32: running_mean, scale, bias
    grad_ptr,  # (3, C) fp32: gradient of mean, of var; mean - running_mean; in each row dense
    n_rows,  # positions along the rows
    n_columns,  # C if CHANNELS_INSIDE, else positions along the columns
    n_channels,  # C
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_grad,  # between its rows: C, or more where it is a slice of all layers'
    stride_x0,  # strides of x along the row dimensions
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,  # along the columns
    stride_xc,  # along the channels
    stride_dx0,  # the same six of dx and dresidual
    stride_dx1,
    stride_dx2,
    stride_dx3,
    stride_dxcol,
    stride_dxc,
    stride_dy0,  # the same six of dy
    stride_dy1,
    stride_dy2,
    stride_dy3,
    stride_dycol,
    stride_dyc,
    stride_s0,  # the same six of what saved_ptr holds
    stride_s1,
    stride_s2,
    stride_s3,
    stride_scol,
    stride_sc,
    inverse_n,  # 1 / n
    HAS_DY_AGAIN: tl.constexpr,  # whether dy_again_ptr is read
    SAVED: tl.constexpr,  # what saved_ptr holds: "y", "residual" or "nothing"
    NEEDS_RESIDUAL: tl.constexpr,  # whether dresidual is wanted
    ACTIVATION: tl.constexpr,  # one of ACTIVATIONS
    CHANNELS_INSIDE: tl.constexpr,  # the columns are channels
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    channel, column_tile, chunk = locate_program(n_columns, BLOCK_COL)
    offs_col = column_tile * BLOCK_COL + tl.arange(0, BLOCK_COL)
    mask_col = offs_col < n_columns
    if CHANNELS_INSIDE:
        channels = offs_col[None, :]
        mask_c = mask_col[None, :]
    else:
        channels = channel
        mask_c = channel < n_channels  # always
        x_ptr += channel * stride_xc
        dx_ptr += channel * stride_dxc
        dresidual_ptr += channel * stride_dxc
        dy_ptr += channel * stride_dyc
        dy_again_ptr += channel * stride_dyc
        saved_ptr += channel * stride_sc
    shift = tl.load(affine_ptr + channels, mask=mask_c, other=0.0)
    scale = tl.load(affine_ptr + n_channels + channels, mask=mask_c, other=0.0)
    bias = tl.load(affine_ptr + 2 * n_channels + channels, mask=mask_c, other=0.0)
    a = tl.load(grad_ptr + channels, mask=mask_c, other=0.0) * inverse_n
    b = tl.load(grad_ptr + stride_grad + channels, mask=mask_c, other=0.0) * (2.0 * inverse_n)
    mean = tl.load(grad_ptr + 2 * stride_grad + channels, mask=mask_c, other=0.0)

    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_xcol
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - shift
        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_dy0, stride_dy1, stride_dy2, stride_dy3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_dycol
        g = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_DY_AGAIN:
            g += tl.load(dy_again_ptr + offs, mask=mask, other=0.0).to(tl.float32)

        u = x * scale + bias
        if SAVED != "nothing":
            offs_row = compute_row_offsets(
                rows, size_1, size_2, size_3, stride_s0, stride_s1, stride_s2, stride_s3
            )
            offs = offs_row[:, None] + offs_col[None, :] * stride_scol
            saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if SAVED == "y":
                u = saved
            else:
                u += saved
        g = multiply_by_slope(g, u, dx_ptr.dtype.element_ty, ACTIVATION)

        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_dx0, stride_dx1, stride_dx2, stride_dx3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_dxcol
        if NEEDS_RESIDUAL:
            tl.store(dresidual_ptr + offs, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dx = g * scale + a + b * (x - mean)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def fold_constants(weight, bias, running_mean, running_var, eps):
    """The constants as the kernels take them, (3, C) fp32: running_mean, scale, bias."""
    scale = weight.float() * torch.rsqrt(running_var.float() + eps)
    return torch.stack((running_mean.float(), scale, bias.float())).detach()


def _forward_on_gpu(x, residual, affine, activation):
    """y, and its partial moments (3, P, C)."""
    y = torch.empty_like(x)  # dense: in the layout of x, unless that has holes or overlaps
    has_residual = residual is not None
    other = residual if has_residual else x  # x stands in where the kernel reads no residual
    launch = plan(FORWARD_PROGRAMS, x.shape, x.stride(), y.stride(), other.stride())
    x_strides, y_strides, other_strides = launch.strides
    n_channels = x.size(1)
    partial = torch.empty((3, launch.n_partials, n_channels), device=x.device, dtype=torch.float32)
    with _common.on_device_of(x):
        _bn_act_moments_fwd_kernel[launch.grid](
            y,
            partial,
            x,
            other,
            affine,
            *launch.sizes,
            launch.n_partials * n_channels,
            *x_strides,
            *y_strides,
            *other_strides,
            has_residual,
            activation,
            **launch.blocks,
        )
    return y, partial


def _backward_on_gpu(ctx, saved_tensors, dy, dy_again, grads):
    """dx and dresidual, or None where the residual needs no gradient."""
    x, saved, affine, *_ = saved_tensors
    if dy_again is not None and dy_again.stride() != dy.stride():
        dy = dy + dy_again
        dy_again = None
    has_again = dy_again is not None
    dx = torch.empty_like(x)
    is_dy_itself = ctx.activation == "none" and not has_again
    needs_residual = ctx.needs_input_grad[1] and not is_dy_itself
    dresidual = torch.empty_like(x) if needs_residual else None
    # A layer's slice of the rows of all layers is read where it lies.
    rows = grads[:, 0]  # (3, C), of _MergeMoments.backward
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    other = x if saved is None else saved  # x stands in where the kernel reads nothing saved
    strides = (x.stride(), dx.stride(), dy.stride(), other.stride())
    launch = plan(BACKWARD_PROGRAMS, x.shape, *strides)
    x_strides, dx_strides, dy_strides, other_strides = launch.strides
    inverse_n = x.size(1) / x.numel()
    with _common.on_device_of(x):
        _bn_act_moments_bwd_kernel[launch.grid](
            dx,
            dresidual if needs_residual else dx,
            x,
            dy,
            dy_again if has_again else dy,
            other,
            affine,
            rows,
            *launch.sizes,
            rows.stride(0),
            *x_strides,
            *dx_strides,
            *dy_strides,
            *other_strides,
            inverse_n,
            has_again,
            ctx.saved,
            needs_residual,
            ctx.activation,
            **launch.blocks,
        )
    if ctx.needs_input_grad[1] and is_dy_itself:
        return dx, dy
    return dx, dresidual


def forward_on_cpu(x, residual, affine, activation):
    """y, the moments (2, C), and what to save.

    To save: x and its mean, or both less the means; y or u, as plain PyTorch does, or None.
    """
    shift, scale, bias = affine.unbind()
    offset = torch.addcmul(bias, scale, shift, value=-1)  # bias - scale running_mean
    u = scale_channels(x, scale, offset)
    if residual is not None:
        u.add_(residual)

    if activation == "none":
        y = u
        saved = None
    elif activation == "relu":
        y = u.relu_()
        saved = y
    else:
        y = ACTIVATIONS[activation](u)
        saved = u
    moments, near_x, near_mean = compute_moments_on_cpu(x, shift)
    return y, moments, (near_x, near_mean, saved)


def _multiply_by_slope_on_cpu(dy, saved, activation):
    """dy act'(u), in the dtype of dy, from y for relu and from u for the others."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, saved, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(dy, saved, 0, 6)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, saved)
    if activation == "hardswish":
        return torch.ops.aten.hardswish_backward(dy, saved)
    return dy


def _add_scaled_channels(dx, g, scale):
    """Add scale_c g to dx (N, C, *spatial) in place."""
    scale = scale.to(dx.dtype)
    by_channel = dx.movedim(1, -1)  # (N, *spatial, C)
    g_by_channel = g.movedim(1, -1)
    if by_channel.is_contiguous() and g_by_channel.is_contiguous():
        # Rows of several positions: rows of few channels are slow in half precision.
        n_positions = math.gcd(dx.numel() // len(scale), 16)
        scale = scale.repeat(n_positions)
        by_channel.view(-1, len(scale)).addcmul_(g_by_channel.view(-1, len(scale)), scale)
    else:
        by_channel.addcmul_(g_by_channel, scale)


def backward_on_cpu(ctx, saved_tensors, dy, dy_again, grads):
    """dx and dresidual, or None where the residual needs no gradient."""
    x, saved, affine, mean = saved_tensors
    scale = affine[1]
    if dy_again is not None:
        dy = dy + dy_again
    g = _multiply_by_slope_on_cpu(dy, saved, ctx.activation)
    dresidual = g if ctx.needs_input_grad[1] else None

    is_fp32 = x.dtype == g.dtype == torch.float32
    if not is_fp32 or not is_channels_last(x) or g.stride() != x.stride():
        dx = compute_dx_on_cpu(x, mean, grads).to(g.dtype)
        _add_scaled_channels(dx, g, scale)
        return dx, dresidual

    # The same in two passes, in place of g where nothing else reads it.
    half_b, bias = fold_dx(x, mean, grads)
    x_rows, half_b = view_rows(x, half_b)
    g_rows, scale, bias = view_rows(g, scale, bias)
    is_free = g is not dy and dresidual is None
    place = g_rows if is_free else None
    dx = torch.addcmul(bias, g_rows, scale, out=place)
    dx.addcmul_(x_rows, half_b, value=2)
    return dx.as_strided(x.shape, x.stride()), dresidual


def choose_saved(activation, residual):
    """What the backward kernel reads beside x and dy: "y", "residual" or "nothing"."""
    if residual is None or activation == "none":
        return "nothing"
    return "y" if activation == "relu" else "residual"


def fill_gradients(dy, grads, dy_again, x, affine):
    """The gradients that a backward pass gets, with zeros in place of those that nothing gave."""
    if dy is None:
        dy, dy_again = dy_again, None
    if dy is None:
        dy = torch.zeros_like(x)
    if grads is None:  # nothing depends on the moments
        n_channels = x.size(1)
        shape = (3, 1, n_channels) if _common.runs_triton(x) else (2, n_channels)
        grads = affine.new_zeros(shape)
    return dy, grads, dy_again


class _BNActMoments(torch.autograd.Function):
    """y, and what merge_moments takes: partial moments (3, P, C), on a CPU the moments (2, C).

    The partial ones do not get their gradient, but what _MergeMoments.backward returns.
    """

    @staticmethod
    def forward(ctx, x, residual, affine, activation, n_uses):
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        if _common.runs_triton(x):
            y, part = _forward_on_gpu(x, residual, affine, activation)
            ctx.saved = choose_saved(activation, residual)
            saved = {"nothing": None, "y": y, "residual": residual}[ctx.saved]
            ctx.save_for_backward(x, saved, affine, None)
        else:
            y, part, (near_x, near_mean, saved) = forward_on_cpu(x, residual, affine, activation)
            ctx.save_for_backward(near_x, saved, affine, near_mean)
        if n_uses == 2:
            return y, part, y.view_as(y)
        return y, part

    @staticmethod
    def backward(ctx, dy, grads, dy_again=None):
        _common.refuse_double_backward("bn_act_moments")
        saved_tensors = ctx.saved_tensors  # read once: gradient checkpointing allows no more
        x, _, affine, *_ = saved_tensors
        dy, grads, dy_again = fill_gradients(dy, grads, dy_again, x, affine)
        run = _backward_on_gpu if _common.runs_triton(x) else backward_on_cpu
        dx, dresidual = run(ctx, saved_tensors, dy, dy_again, grads)
        return dx, dresidual, None, None, None


class _MergeMoments(torch.autograd.Function):
    """Moments (2, C of all layers) from the layers' partial ones, in one launch."""

    @staticmethod
    def forward(ctx, op, *partials):
        ctx.op = op
        moments = merge_partials(partials)
        ctx.shapes = [partial.shape for partial in partials]
        ctx.save_for_backward(moments)
        return moments

    @staticmethod
    def backward(ctx, grads):
        """In place of its partials' gradient each layer gets what its backward kernel reads.

        These are three rows (3, C): the gradients of mean and variance, and the mean, which the
        layer did not know yet. Autograd wants a gradient of the partials' shape, so the rows are
        expanded to it, which moves nothing.
        """
        _common.refuse_double_backward(ctx.op)
        (moments,) = ctx.saved_tensors
        rows = torch.cat((grads, moments[:1]))  # (3, C of all layers)
        parts = rows.split([shape[2] for shape in ctx.shapes], 1)
        expanded = [
            part.unsqueeze(1).expand(shape) for part, shape in zip(parts, ctx.shapes, strict=True)
        ]
        return None, *expanded


def merge_moments(parts, op="bn_act_moments"):
    """Moments (2, C of all layers) from what `bn_act_moments_folded` gave for each, at least one.

    On a GPU one launch merges those of all layers. op: the name that errors say.
    """
    if not _common.runs_triton(parts[0]):
        return torch.cat(parts, 1)  # the CPU path has no partial ones
    return _MergeMoments.apply(op, *parts)


def bn_act_moments(
    x, weight, bias, running_mean, running_var, eps=1e-5, residual=None, activation="relu"
):
    """BatchNorm in eval mode, an addition, an activation, and the moments of x, in one read of x.

    y = act(weight (x - running_mean) / sqrt(running_var + eps) + bias + residual)

    Args:
        x: (N, C, *spatial), what enters the BatchNorm, with 0 to 3 spatial dimensions; fp32, fp16
            or bf16; any strides.
        weight, bias, running_mean, running_var: (C,) of a float dtype; constants;
            running_var + eps > 0.
        eps: a python number.
        residual: of x's shape and dtype, any strides, added before the activation. None adds
            nothing.
        activation: "none", "relu", "relu6", "silu" or "hardswish", as in torch.nn.functional.

    Returns:
        y: shape and dtype of x, in its memory format.
        moments: (2, C) fp32. Row 0 is mean(x) - running_mean, in the unit of x: the difference
            whose norm the moment loss takes. Subtracting afterwards would lose precision. Row 1 is
            the biased variance.

    Raises:
        TypeError: a tensor argument is no tensor, or not fp32, fp16 or bf16.
        ValueError: an argument is empty, of another shape than said, or on another device; or
            there is no such activation.

    Note:
        Differentiable once, in x and residual. Arithmetic is in fp32 and y is rounded once, where
        a BatchNorm and an addition in half precision round twice; the CPU path does that too.
        Repeated calls are bit-equal.

        Until the backward pass y may be modified in place, unless the activation is relu. On a GPU
        the residual may not be, if the activation is relu6, silu or hardswish. moments may not be
        at all. Autograd raises where it matters.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # N 1, C 2, length 2
        >>> one = torch.ones(2)
        >>> y, moments = bn_act_moments(x, one, 0 * one, torch.tensor([2.0, 4.0]), one, eps=0.0)
        >>> y.tolist(), moments.tolist()
        ([[[0.0, 1.0], [1.0, 1.0]]], [[0.0, 1.0], [1.0, 0.0]])
    """
    check_channels(
        "bn_act_moments",
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
    )
    _common.check_float("bn_act_moments", x=x, residual=residual)
    check_activation(activation)
    check_residual("bn_act_moments", residual, x.shape, x.dtype)
    affine = fold_constants(weight, bias, running_mean, running_var, eps)
    y, part = _BNActMoments.apply(x, residual, affine, activation, 1)
    return y, merge_moments([part])


def bn_act_moments_folded(x, affine, residual=None, activation="relu", n_uses=1):
    """`bn_act_moments` for constants that `fold_constants` has folded; tensors are not checked.

    Args:
        n_uses: 2: y is returned once more, at the end, for a second layer that reads it. The
            backward pass then reads both gradients, where autograd would write their sum first.

    Returns:
        y, and in place of the moments what `merge_moments` makes them of.
    """
    check_activation(activation)
    return _BNActMoments.apply(x, residual, affine, activation, n_uses)
