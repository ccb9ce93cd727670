"""Batch moments per channel, and their distance from BatchNorm's running statistics.

    mean_c = 1/n sum_i x_ic      var_c = 1/n sum_i (x_ic - mean_c)^2      n = N H W, biased
    loss   = ||mean - running_mean||_2 + ||var - running_var||_2          norms over the C channels
    dx_ic  = a_c + b_c (x_ic - mean_c),   a = g_mean / n,   b = 2 g_var / n
    loss:    g_mean = g (mean - running_mean) / ||mean - running_mean||_2,   g_var likewise;
             0 where a norm is 0

The loss is one layer's term of R_feature in Yin et al., "Dreaming to Distill", arXiv:1912.08795,
eq. 4-6. The released code takes the same two norms, neither squared nor divided by C, and the
biased variance; it sums over the layers.

The variance is never E[x^2] - E[x]^2, which loses its digits where the mean is large. Every lane
of a program keeps a running mean and a sum of squared deviations, and `_channels` merges them.

Traffic, in sizes of x:
    eager  forward 6: the mean reads x; x is read and x - mean written; that is read and its square
           written; that is read. Backward, as autograd composes it (power, product, sum, expanded
           gradients, their addition): about 12.
    fused  forward 1: reads x. Backward 2: reads x, writes dx.
    best possible ratio: forward 6 / 1 = 6, with backward 18 / 3 = 6.
"""

import functools
import math

import torch

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


def bn_moments_ref(x, shift=None):
    """The definition of `bn_moments`, differentiable by autograd in x.

    float64 stays float64; half precision is computed in fp32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    by_channel = x.to(dtype).movedim(1, -1)  # (N, *spatial, C)
    dims = list(range(x.dim() - 1))
    if shift is None:
        mean = by_channel.mean(dims)  # (C,)
        var = (by_channel - mean).square().mean(dims)  # (C,)
        return mean, var

    centred = by_channel - shift.detach()
    mean = centred.mean(dims)
    var = (centred - mean).square().mean(dims)
    return mean + shift.detach(), var


def bn_moment_loss_ref(x, running_mean, running_var):
    """The definition of `bn_moment_loss`, differentiable by autograd in x."""
    mean, var = bn_moments_ref(x, running_mean)
    mean_norm = torch.linalg.vector_norm(mean - running_mean.detach())  # its gradient at 0 is 0
    var_norm = torch.linalg.vector_norm(var - running_var.detach())
    return mean_norm + var_norm


@triton.jit
def _bn_moments_partial_kernel(
    partial_ptr,  # (3, P, C) out: count, mean - shift, sum of squared deviations of each program
    x_ptr,  # (N, C, *spatial)
    shift_ptr,  # (C,)
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
    shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0).to(tl.float32)

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
        step += 1.0
        mean, m2 = add_value(x, mask, mean, m2, step)
        count += mask_row.to(tl.float32)

    store_partial(
        partial_ptr + offs_partial, stride_part, mask_c, count, mask_col, mean, m2, CHANNELS_INSIDE
    )


@triton.jit
def _bn_moments_bwd_dx_kernel(
    dx_ptr,  # out, shape of x
    x_ptr,  # (N, C, *spatial)
    shift_ptr,  # (C,)
    mean_ptr,  # (C,): mean - shift
    grad_ptr,  # (2, C): gradient of mean, of var
    n_rows,  # positions along the rows
    n_columns,  # C if CHANNELS_INSIDE, else positions along the columns
    n_channels,  # C
    rows_per_program,  # a multiple of BLOCK_ROW
    size_1,  # sizes of the row dimensions but the outermost
    size_2,
    size_3,
    stride_x0,  # strides of x along the row dimensions
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,  # along the columns
    stride_xc,  # along the channels
    stride_dx0,  # the same six of dx
    stride_dx1,
    stride_dx2,
    stride_dx3,
    stride_dxcol,
    stride_dxc,
    inverse_n,  # 1 / n
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
    mean = tl.load(mean_ptr + channels, mask=mask_c, other=0.0)
    a = tl.load(grad_ptr + channels, mask=mask_c, other=0.0) * inverse_n
    b = tl.load(grad_ptr + n_channels + channels, mask=mask_c, other=0.0) * (2.0 * inverse_n)
    shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0).to(tl.float32)

    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_xcol
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # Subtracted one by one: mean + shift, rounded to fp32, would be too coarse.
        dx = a + b * (x - shift - mean)

        offs_row = compute_row_offsets(
            rows, size_1, size_2, size_3, stride_dx0, stride_dx1, stride_dx2, stride_dx3
        )
        offs = offs_row[:, None] + offs_col[None, :] * stride_dxcol
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _compute_moments_on_gpu(x, shift):
    """The moments (2, C), mean - shift and var: one kernel writes partials, one merges them."""
    launch = plan(FORWARD_PROGRAMS, x.shape, x.stride())
    n_channels = x.size(1)
    partial = torch.empty((3, launch.n_partials, n_channels), device=x.device, dtype=torch.float32)
    with _common.on_device_of(x):
        _bn_moments_partial_kernel[launch.grid](
            partial,
            x,
            shift,
            *launch.sizes,
            launch.n_partials * n_channels,
            *launch.strides[0],
            **launch.blocks,
        )
    return merge_partials([partial])


def _compute_dx_on_gpu(x, shift, mean, grads):
    dx = torch.empty_like(x)
    launch = plan(BACKWARD_PROGRAMS, x.shape, x.stride(), dx.stride())
    x_strides, dx_strides = launch.strides
    inverse_n = x.size(1) / x.numel()
    with _common.on_device_of(x):
        _bn_moments_bwd_dx_kernel[launch.grid](
            dx,
            x,
            shift,
            mean,
            grads,
            *launch.sizes,
            *x_strides,
            *dx_strides,
            inverse_n,
            **launch.blocks,
        )
    return dx


# CPU: below this many elements of x both its ways take the same time, most of it spent on calls.
_SMALL = 1 << 15


def compute_moments_on_cpu(x, shift):
    """The moments (2, C): mean - shift and the biased variance.

    Returns:
        The moments, and x and its mean (C,) as `compute_dx_on_cpu` takes them: where the mean of a
        channel is far from 0, both less the means, in fp32.
    """
    shift = shift.float()
    moments = _compute_near_moments(x, shift)
    mean = moments[0] + shift
    if _has_far_channels(mean, moments[1], x.dtype):
        x = (x.movedim(1, -1) - mean).movedim(-1, 1)
        shift = shift - mean
        moments = _compute_near_moments(x, shift)
        mean = moments[0] + shift
    return moments, x, mean


def _compute_near_moments(x, shift):
    """The same moments, exact where no mean is far from 0."""
    moments = _compute_moments_in_one_pass(x, shift)
    return _compute_centred_moments(x, shift) if moments is None else moments


def _compute_centred_moments(x, shift):
    """mean - shift and the variance, from a copy of x from which shift is subtracted first."""
    dims = list(range(x.dim() - 1))
    centred = x.movedim(1, -1) - shift  # (N, *spatial, C)
    mean = centred.mean(dims)  # (C,)
    centred -= mean
    residue = centred.mean(dims)  # what rounding left in `mean`
    var = centred.square_().mean(dims) - residue.square()
    return torch.stack((mean + residue, var))


def _has_far_channels(mean, var, dtype):
    """Whether a mean is so far from 0 that sums of x itself would lose its channel's variance.

    Half precision has rounded x already, by far more than sums in fp32 do.

    Args:
        mean, var: (C,) fp32.
        dtype: of x.
    """
    n_deviations = 16 if dtype == torch.float32 else 50
    surplus = torch.addcmul(var, mean, mean, value=-1 / n_deviations**2)
    return float(surplus.min()) < 0


@functools.lru_cache(maxsize=1024)
def _find_divisor(n, limit):
    """The largest divisor of n up to a limit."""
    return max(k for k in range(1, limit + 1) if n % k == 0)


def _compute_moments_in_one_pass(x, shift):
    """The moments (2, C): mean - shift and var, from one read of x; None where that is slow.

    torch.batch_norm_update_stats reduces the columns of x seen as (parts, rows, columns), and
    Chan's rule merges the columns of a channel. A row is an image, or in channels_last one or more
    pixels. The op reads its input twice, so a part of up to 2,048 channels in channels_last has at
    most 1 MB, which an L2 cache holds:
    for (100, 16, 32, 32) on one thread this takes 0.65 of the time of a single part. No other op
    does as well in both layouts.

    The op's sums are plain, so each column gets at most 256 terms, and _has_far_channels tells
    where its means are too coarse. The shift leaves the columns' means, whose own rounding then
    averages out.
    """
    N, C = x.shape[:2]
    if x.numel() < _SMALL:
        return None

    by_channel = x.movedim(1, -1)  # (N, *spatial, C)
    if by_channel.is_contiguous():
        n_pixels = x.numel() // C
        n_rows = _find_divisor(n_pixels, 128)
        if n_rows < 64:  # as of 4 images of 149 x 149 pixels
            n_rows = _find_divisor(n_pixels, 256)
        n_wide = n_pixels // n_rows  # rows of a pixel that may lie side by side
        n_columns = C * _find_divisor(n_wide, max(1, 2048 // C))
        if n_rows * n_columns < _SMALL:  # it has few divisors: many calls would cost more
            n_columns = C * n_wide
        parts = by_channel.view(-1, n_rows, n_columns)
        groups = (-1, C)
        dims = (0,)
    elif x.is_contiguous():
        n_rows = _find_divisor(N, 256)
        parts = x.view(-1, n_rows, x.numel() // N)
        groups = (len(parts), C, -1)
        dims = (0, 2)
        shift = shift.view(C, 1)
    else:
        return None
    if n_rows < 16:
        return None

    # The results are in the dtype of x, but in fp32 where the op gets fp32 running statistics,
    # which a momentum of 0 leaves alone.
    running = (None, None)
    if x.dtype != torch.float32:
        running = torch.zeros(2, parts.size(2))
    measured = [torch.batch_norm_update_stats(part, *running, 0.0) for part in parts.unbind()]
    means, variances = zip(*measured, strict=True)  # the variances are biased
    distance = torch.cat(means).view(groups) - shift
    var = torch.cat(variances).view(groups)
    pooled = distance.mean(dims, keepdim=True)
    delta = distance - pooled
    return torch.stack((pooled.view(C), torch.addcmul(var, delta, delta).mean(dims)))  # (2, C)


def is_channels_last(x):
    """Whether x (N, C, *spatial) is dense with its channels side by side, and not contiguous."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def view_rows(x, *vectors):
    """x in channels_last as rows of one or more pixels, and vectors (C,) as long as a row.

    Rows of few channels cost a loop each: 16 channels make addcmul take 1.5 times as long as 256.
    """
    C = x.size(1)
    by_channel = x.movedim(1, -1)  # (N, *spatial, C)
    if C >= 64:
        return by_channel.view(-1, C), *vectors

    n_pixels = _find_divisor(x.numel() // C, 256 // C)
    rows = by_channel.view(-1, n_pixels * C)
    return rows, *(torch.cat([vector] * n_pixels) for vector in vectors)


def scale_channels(x, scale, bias):
    """scale_c x + bias_c in one pass, in the dtype and layout of x; scale and bias are fp32.

    batch_norm does so too, and computes in fp32 whatever the dtype of x. But addcmul takes 0.4 of
    its time, for (100, 16, 32, 32) in channels_last and fp32 on one thread.
    """
    if is_channels_last(x) and x.dtype == torch.float32:
        y = torch.empty_like(x)  # no view, which autograd would not let a network change in place
        rows, scale, bias = view_rows(x, scale, bias)
        (y_rows,) = view_rows(y)
        torch.addcmul(bias, rows, scale, out=y_rows)
        return y
    mean = torch.zeros_like(scale)
    var = torch.ones_like(scale)
    # F.batch_norm of torch 2.11 refuses an eps of 0
    y = torch.batch_norm(x, scale, bias, mean, var, False, 0.0, 0.0, False)
    if is_channels_last(x) and y.stride() != x.stride():  # 3-D or 5-D
        y = torch.empty_like(x).copy_(y)
    return y


def fold_dx(x, mean, grads):
    """b / 2 and a - b mean, (C,) each, of dx = b x + (a - b mean).

    Where a mean is far from 0 both terms would cancel: `compute_moments_on_cpu` subtracts it first.
    """
    a, half_b = (grads * (x.size(1) / x.numel())).unbind()
    return half_b, torch.addcmul(a, half_b, mean, value=-2)


def compute_dx_on_cpu(x, mean, grads):
    """dx = a + b (x - mean), for what `compute_moments_on_cpu` returns; in the dtype of x."""
    half_b, bias = fold_dx(x, mean, grads)
    if x.is_contiguous() or is_channels_last(x):
        return scale_channels(x, 2 * half_b, bias)
    by_channel = x.movedim(1, -1).float()  # (N, *spatial, C)
    return torch.addcmul(bias, by_channel, half_b, value=2).to(x.dtype).movedim(-1, 1)


def _compute_moments(x, shift):
    """The moments (2, C), mean - shift and the biased variance; x and centre for _compute_dx.

    The centre (C,) is the shift, on a CPU the mean of the x returned.
    """
    if _common.runs_triton(x):
        return _compute_moments_on_gpu(x, shift), x, shift
    return compute_moments_on_cpu(x, shift)


def _compute_dx(x, centre, moments, grads, dtype):
    """dx from the gradients (2, C) of mean and var."""
    if _common.runs_triton(x):
        return _compute_dx_on_gpu(x, centre, moments[0], grads)
    return compute_dx_on_cpu(x, centre, grads).to(dtype)


class _BNMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift):
        # A BatchNorm in train mode changes its running mean without autograd's notice.
        ctx.dtype = x.dtype
        shift = shift.clone()
        moments, near_x, centre = _compute_moments(x, shift)
        ctx.save_for_backward(near_x, centre, moments)
        distance, var = moments
        return distance + shift, var.clone()

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        _common.refuse_double_backward("bn_moments")
        if not ctx.needs_input_grad[0]:
            return None, None
        x, centre, moments = ctx.saved_tensors
        grads = torch.stack((grad_mean, grad_var))  # (2, C)
        return _compute_dx(x, centre, moments, grads, ctx.dtype), None


class _BNMomentLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, running_mean, running_var):
        running_mean = running_mean.clone()  # as in _BNMoments
        ctx.dtype = x.dtype
        moments, near_x, centre = _compute_moments(x, running_mean)
        distance = torch.stack((moments[0], moments[1] - running_var))  # (2, C)
        norms = torch.linalg.vector_norm(distance, dim=1, keepdim=True)  # (2, 1)
        units = distance / norms.masked_fill(norms == 0, math.inf)  # (2, C), the norms' gradients
        ctx.save_for_backward(near_x, centre, moments, units)
        return norms.sum()

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("bn_moment_loss")
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, centre, moments, units = ctx.saved_tensors
        return _compute_dx(x, centre, moments, units * grad, ctx.dtype), None, None


def bn_moments(x, shift=None):
    """Mean and biased variance per channel in one read of x.

    mean_c = 1/n sum_i x_ic and var_c = 1/n sum_i (x_ic - mean_c)^2
    over the n = x.numel() / C values of a channel.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions; fp32, fp16 or bf16; any unit; any
            strides, and no copy on the GPU. On the CPU half precision is converted to fp32 first.
        shift: (C,) of a float dtype, in the unit of x, subtracted before anything else. The result
            does not depend on it but for rounding: a shift near the mean keeps precision where
            |mean| >> std. None takes the first value of each channel.

    Returns:
        mean, var: (C,) fp32 each.

    Raises:
        TypeError: an argument is no tensor or not fp32, fp16 or bf16.
        ValueError: an argument is empty, x is not 2-D to 5-D, shift is not (C,) or on another
            device.

    Note:
        The variance is biased: divided by n, as BatchNorm normalises in training; 0 for n = 1.
        Differentiable once in x, whose gradient takes the memory layout of x; shift gets no
        gradient. Repeated calls are bit-equal.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # N 1, C 2, length 2
        >>> bn_moments(x)
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    if shift is None:
        check_channels("bn_moments", x)
        # A channel's first value lies a few sigma from its mean, wherever that is.
        first = (0, slice(None), *[0] * (x.dim() - 2))
        return _BNMoments.apply(x, x.detach()[first].contiguous())

    check_channels("bn_moments", x, shift=shift)
    return _BNMoments.apply(x, shift.contiguous())


def bn_moment_loss(x, running_mean, running_var):
    """Distance of a BatchNorm's input from its running statistics: one layer of R_feature.

    ||mean(x) - running_mean||_2 + ||var(x) - running_var||_2 over the channels. The norms are not
    squared and not averaged.

    Args:
        x: (N, C, *spatial), what enters the BatchNorm; as for `bn_moments`.
        running_mean: (C,) of a float dtype, in the unit of x; also serves as the shift.
        running_var: (C,) of a float dtype, in the squared unit of x, >= 0.

    Returns:
        (), fp32.

    Raises:
        TypeError: an argument is no tensor or not fp32, fp16 or bf16.
        ValueError: an argument is empty, x is not 2-D to 5-D, a statistic is not (C,) or on
            another device.

    Note:
        Biased variance. Differentiable once, in x only. Where a norm is exactly 0 its gradient is
        0, a subgradient. The backward pass may read running_mean again: if it has changed, as in a
        layer in training mode, autograd raises.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # mean (2, 5), var (1, 0)
        >>> bn_moment_loss(x, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))
        tensor(7.)
    """
    check_channels("bn_moment_loss", x, running_mean=running_mean, running_var=running_var)
    return _BNMomentLoss.apply(x, running_mean.contiguous(), running_var.contiguous())
