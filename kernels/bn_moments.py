"""Batch moments per channel, and the distance of them from BatchNorm's running statistics.

    mean_c = 1/n sum_i x_ic        var_c = 1/n sum_i (x_ic - mean_c)^2        n = N H W, biased
    loss   = ||mean - running_mean||_2 + ||var - running_var||_2              norms over the C channels
    dx_ic  = a_c + b_c (x_ic - mean_c),   a = g_mean / n,   b = 2 g_var / n
    loss:    g_mean = g (mean - running_mean) / ||mean - running_mean||_2, g_var likewise; 0 where a norm is 0

The loss is one layer's term of R_feature in Yin et al., "Dreaming to Distill", arXiv:1912.08795, eq. 4-6. The released
code takes the same two norms, neither squared nor divided by C, and the biased variance; it sums over layers.
Variance never comes from E[x^2] - E[x]^2: every lane keeps a running mean and sum of squared deviations, and groups
are merged as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for sample variances", 1979.

Traffic, in sizes of x. Eager: forward reads x, reads x and writes x - mean, reads it and writes its square, reads
that: 6; backward, as autograd composes it (power, product, sum, expanded gradients, their addition): about 12.
Fused: forward reads x: 1; backward reads x, writes dx: 2. Best possible ratio: 6 forward, 18 / 3 = 6 with backward.
"""

import math

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


def bn_moments_ref(x, shift=None):
    """The definition of `bn_moments`, differentiable by autograd; float64 stays float64, half is computed in fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)  # (N, *spatial, C), a view
    dims = list(range(x.dim() - 1))
    centred = x if shift is None else x - shift.detach()
    mean = centred.mean(dims)  # (C,)
    var = (centred - mean).square().mean(dims)  # (C,)
    return (mean if shift is None else mean + shift.detach()), var


def bn_moment_loss_ref(x, running_mean, running_var):
    """The definition of `bn_moment_loss`, differentiable by autograd in x."""
    mean, var = bn_moments_ref(x, running_mean)
    mean_distance = torch.linalg.vector_norm(mean - running_mean.detach())  # its gradient at 0 is 0
    return mean_distance + torch.linalg.vector_norm(var - running_var.detach())


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
    stride_x0,  # strides of the row dimensions of x
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,  # stride of x along the columns
    stride_xc,  # stride of x along the channels
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
    shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0).to(tl.float32)  # a vector or a scalar

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
        step += 1.0
        mean, m2 = welford(x, mask, mean, m2, step)
        count += mask_row.to(tl.float32)

    store_partial(partial_ptr + offs_partial, stride_part, mask_c, count, mask_col, mean, m2, CHANNELS_INSIDE)


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
    stride_x0,  # strides of the row dimensions of x
    stride_x1,
    stride_x2,
    stride_x3,
    stride_xcol,  # stride of x along the columns
    stride_xc,  # stride of x along the channels
    stride_dx0,  # the same six of dx
    stride_dx1,
    stride_dx2,
    stride_dx3,
    stride_dxcol,
    stride_dxc,
    inverse_n,  # 1 / n
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
        dx_ptr += channel * stride_dxc
    mean = tl.load(mean_ptr + channels, mask=mask_c, other=0.0)
    a = tl.load(grad_ptr + channels, mask=mask_c, other=0.0) * inverse_n
    b = tl.load(grad_ptr + n_channels + channels, mask=mask_c, other=0.0) * (2.0 * inverse_n)
    shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0).to(tl.float32)
    for start in range(0, rows_per_program, BLOCK_ROW):
        rows = chunk * rows_per_program + start + tl.arange(0, BLOCK_ROW)
        mask = (rows < n_rows)[:, None] & mask_col[None, :]
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_x0, stride_x1, stride_x2, stride_x3)
        x = tl.load(x_ptr + offs_row[:, None] + offs_col[None, :] * stride_xcol, mask=mask, other=0.0)
        dx = a + b * (x.to(tl.float32) - shift - mean)  # mean + shift, rounded, would be too coarse
        offs_row = row_offsets(rows, size_1, size_2, size_3, stride_dx0, stride_dx1, stride_dx2, stride_dx3)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offs_row[:, None] + offs_col[None, :] * stride_dxcol, dx, mask=mask)


_SMALL = 1 << 15  # CPU: below this many elements of x its two ways take the same time, most of it in calls


def _triton_moments(x, shift):
    """(2, C): mean - shift and var of x by two kernels, with the partial moments of each program in between."""
    grid, sizes, (strides,), blocks = plan(FORWARD_PROGRAMS, x.shape, x.stride())
    n_channels, n_partials = x.size(1), grid[2] if blocks["CHANNELS_INSIDE"] else grid[1] * grid[2]
    partial = torch.empty((3, n_partials, n_channels), device=x.device, dtype=torch.float32)
    _bn_moments_partial_kernel[grid](partial, x, shift, *sizes, n_partials * n_channels, *strides, **blocks)
    return merged_moments(partial, n_channels, n_partials)


def _triton_dx(x, shift, mean, grads):
    dx = torch.empty_like(x)
    grid, sizes, (strides, dx_strides), blocks = plan(BACKWARD_PROGRAMS, x.shape, x.stride(), dx.stride())
    inverse_n = x.size(1) / x.numel()
    _bn_moments_bwd_dx_kernel[grid](dx, x, shift, mean, grads, *sizes, *strides, *dx_strides, inverse_n, **blocks)
    return dx


def _torch_moments(x, shift):
    """The CPU path: (2, C) moments as mean - origin and var, and the origin: shift, or None (zero) where it was idle.

    torch.batch_norm_update_stats reduces the columns of x seen as (N, rest), Chan's rule merges those of a channel:
    for (256, 16, 32, 32) on one thread in 0.2 of the time of bn_moments_ref, 0.04 of torch.var_mean, and no other op
    does as well in both layouts. Its sums are plain, so a column gets at most 256 terms; and where |mean| >
    5 sqrt(var) its means are too coarse: such inputs take the definition, with the shift.
    """
    N, C = x.shape[:2]
    fold = 1 << ((N - 1) // 256).bit_length()  # parts of N with at most 256 images each
    by_channel = x.movedim(1, -1)  # (N, *spatial, C)
    dense = x if x.is_contiguous() else by_channel if by_channel.is_contiguous() else None
    if dense is not None and x.numel() >= _SMALL and N >= 16 and N % fold == 0:
        stats = torch.batch_norm_update_stats(dense.float().view(N // fold, -1), None, None, 0.0)  # var is biased
        groups, dims = ((fold, C, -1), (0, 2)) if dense is x else ((-1, C), 0)
        mean, var = (v.view(groups) for v in stats)
        pooled = mean.mean(dims, keepdim=True)
        delta = mean - pooled
        moments = torch.stack((pooled.view(C), torch.addcmul(var, delta, delta).mean(dims)))  # (2, C)
        if bool((moments[0].square() <= 25 * moments[1]).all()):
            return moments, None
    dims = list(range(x.dim() - 1))
    delta = by_channel - shift.float()
    mean = delta.mean(dims)
    delta -= mean
    residue = delta.mean(dims)  # what rounding left in `mean`
    return torch.stack((mean + residue, delta.square_().mean(dims) - residue.square())), shift


def _torch_dx(x, origin, mean, grads):
    """a + b (x - mean). As x b + (a - b mean), one pass by F.batch_norm, only where that does not cancel."""
    a, b = grads[0] * (x.size(1) / x.numel()), grads[1] * (2 * x.size(1) / x.numel())
    if origin is None and x.dtype == torch.float32:  # |mean| <= 5 sqrt(var)
        return F.batch_norm(x, mean, torch.ones_like(mean), b, a, training=False, eps=0.0)
    by_channel = x.movedim(1, -1)
    centred = by_channel.float() - mean if origin is None else (by_channel - origin.float()).sub_(mean)
    return centred.mul_(b).add_(a).to(x.dtype).movedim(-1, 1)


class _BNMoments(torch.autograd.Function):
    """bn_moments, or with a running_var bn_moment_loss, whose running_mean is the shift."""

    @staticmethod
    def forward(ctx, x, shift, running_var):
        ctx.op = "bn_moments" if running_var is None else "bn_moment_loss"
        moments, origin = (_triton_moments(x, shift), shift) if _common.runs_triton(x) else _torch_moments(x, shift)
        if running_var is None:
            ctx.save_for_backward(x, origin, moments[0], None)
            return moments[0].clone() if origin is None else moments[0] + origin, moments[1].clone()
        mean_distance = moments[0] - shift if origin is None else moments[0]
        distance = torch.stack((mean_distance, moments[1] - running_var))  # (2, C)
        norms = torch.linalg.vector_norm(distance, dim=1, keepdim=True)  # (2, 1)
        units = distance / norms.masked_fill(norms == 0, math.inf)  # (2, C), gradient of each norm, 0 at 0
        ctx.save_for_backward(x, origin, moments[0], units)
        return norms.sum()

    @staticmethod
    def backward(ctx, *grad_outputs):
        _common.refuse_double_backward(ctx.op)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, origin, mean, units = ctx.saved_tensors
        grads = torch.stack(grad_outputs) if units is None else units * grad_outputs[0]  # (2, C)
        dx = _triton_dx if _common.runs_triton(x) else _torch_dx
        return dx(x, origin, mean, grads), None, None


def _check(op, x, **vectors):
    _common.check_float(op, x=x, **vectors)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{op}: expected x of shape (N, C, *spatial), 2-D to 5-D, got {tuple(x.shape)}; reshape it")
    for name, vector in vectors.items():
        if vector is None or vector.shape != x.shape[1:2]:
            shape = None if vector is None else tuple(vector.shape)
            raise ValueError(f"{op}: expected {name} of shape ({x.size(1)},), got {shape}; pass one value per channel")


def bn_moments(x, shift=None):
    """Mean and biased variance per channel in one read of x.

    mean_c = 1/n sum_i x_ic and var_c = 1/n sum_i (x_ic - mean_c)^2 over the n = x.numel() / C values of a channel.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions; fp32, fp16 or bf16; any unit, any strides, not copied on
            the GPU. On the CPU half precision is converted to fp32 first.
        shift: (C,) of a float dtype, in the unit of x, subtracted first: near the mean it keeps precision where
            |mean| >> std, mathematically it does not matter. None takes the first value of each channel.

    Returns:
        mean, var: (C,) fp32 each.

    Raises:
        TypeError: an argument is no tensor or not fp32, fp16 or bf16.
        ValueError: an argument is empty, x is not 2-D to 5-D, shift is not (C,) or on another device.

    Note:
        The variance is biased (divided by n, as BatchNorm normalises in training; 0 for n = 1). Differentiable once in
        x, whose gradient takes the memory layout of x; no gradient to shift. Repeated calls are bit-equal.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # N 1, C 2, length 2
        >>> bn_moments(x)
        (tensor([2., 5.]), tensor([1., 0.]))
    """
    _check("bn_moments", x, **({} if shift is None else {"shift": shift}))
    if shift is None:  # a value of the channel is a few sigma from its mean, wherever that is
        shift = x.detach()[(0, slice(None), *[0] * (x.dim() - 2))]  # (C,)
    return _BNMoments.apply(x, shift.contiguous(), None)


def bn_moment_loss(x, running_mean, running_var):
    """Distance of the batch moments of a BatchNorm's input from its running statistics, one layer of R_feature.

    ||mean(x) - running_mean||_2 + ||var(x) - running_var||_2 over the channels: norms not squared, not averaged.

    Args:
        x: (N, C, *spatial), what enters the BatchNorm layer; as for `bn_moments`.
        running_mean: (C,) of a float dtype, in the unit of x; also serves as shift.
        running_var: (C,) of a float dtype, in the squared unit of x, >= 0.

    Returns:
        (), fp32.

    Raises:
        TypeError: an argument is no tensor or not fp32, fp16 or bf16.
        ValueError: an argument is empty, x is not 2-D to 5-D, a statistic is not (C,) or on another device.

    Note:
        Biased variance. Differentiable once, in x only; where a norm is exactly 0 its gradient is 0, a subgradient.
        If the statistics change between forward and backward (a layer in training mode), autograd raises.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])  # mean (2, 5), var (1, 0)
        >>> bn_moment_loss(x, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))
        tensor(7.)
    """
    _check("bn_moment_loss", x, running_mean=running_mean, running_var=running_var)
    return _BNMoments.apply(x, running_mean.contiguous(), running_var.contiguous())
