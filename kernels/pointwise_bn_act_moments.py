"""A frozen 1 x 1 convolution, the BatchNorm after it with its moments, addition and activation.

    z_c = sum_k conv_weight_ck x_k                           at each position; stored in x's dtype
    y, moments = bn_act_moments(z, …)                        u, s, g, a, b as there
    dz  = s_c g + a_c + b_c (z - mean_c),   dresidual = g
    dx_k = sum_c conv_weight_ck dz_c

Two thirds of the convolutions of a ResNet-50, a MobileNet or an EfficientNet are 1 x 1: a matrix
product of positions and channels. At the widths of these networks it is bound by memory on current
GPUs, for instance 2 (64 + 256) bytes and 2 * 64 * 256 FLOPs a position in the first block of a
ResNet-50: 51 FLOPs a byte, where an H100 has 295. So what counts is to read and write less. z is
still in registers when its moments and y are computed, and dz when it is multiplied.

Traffic, in sizes of z, beside x and dx, without a residual:
    eager  32: the 30 of `bn_act_moments`; the convolution writes z and reads dz
    convolution, then bn_act_moments  forward 3: writes z, reads it, writes y. Backward 4: reads dy
           and z, writes dz, reads it
    fused  forward 2: writes z and y. Backward 2: reads dy and z
    best possible ratio: 32 / 4, and 7 / 4 beside bn_act_moments; 2 launches in place of 4
As in `bn_act_moments` a residual adds 1 forwards, and 2 backwards unless there is no activation.

The kernels see matrices of positions x channels, as they lie in memory in channels_last. Most other
layouts are copied. Each program has a tile of positions and of channels, so x is read once for each
tile of channels, and dy and z once for each tile of input channels: mostly from the L2 cache, since
such programs are neighbours. Minimal bytes count them once.

What is saved for the backward pass: z, and y or the residual where `bn_act_moments` saves them; not
x. Weights and running statistics are constants here: they get no gradient.
"""

import torch
import torch.nn.functional as F

from kernels import _common
from kernels._channels import check_vectors, mask_channels
from kernels._common import tl, triton
from kernels.bn_act_moments import (
    apply_activation,
    backward_on_cpu,
    bn_act_moments_ref,
    check_activation,
    check_residual,
    choose_saved,
    fill_gradients,
    fold_constants,
    forward_on_cpu,
    merge_moments,
    multiply_by_slope,
)


def pointwise_bn_act_moments_ref(
    x,
    conv_weight,
    weight,
    bias,
    running_mean,
    running_var,
    eps=1e-5,
    residual=None,
    activation="relu",
):
    """The definition in plain PyTorch, differentiable by autograd in x and residual.

    float64 stays float64; half precision is computed in fp32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = F.conv2d(x.to(dtype), conv_weight.detach().to(dtype))
    if residual is not None:
        residual = residual.to(dtype)
    constants = (weight, bias, running_mean, running_var)
    y, moments = bn_act_moments_ref(z, *constants, eps, residual, activation)
    return y.to(x.dtype), moments


@triton.jit
def _locate_tile(
    offs_m,  # (BLOCK_M,) positions
    stride_m,
    offs_c,  # (BLOCK_C,) channels
    stride_c,
    ALIGN: tl.constexpr,  # a number that divides stride_m; 1 for unknown
):
    """Offsets of a tile's elements (BLOCK_M, BLOCK_C)."""
    offs_row = offs_m * stride_m
    if ALIGN > 1:  # Triton itself knows of multiples of 16 only
        offs_row = tl.multiple_of(offs_row, ALIGN)
    return offs_row[:, None] + offs_c[None, :] * stride_c


@triton.jit
def _pointwise_bn_act_moments_fwd_kernel(
    y_ptr,  # (M, C) out, dense; M = N H W positions
    z_ptr,  # (M, C) out, dense: the convolution's output
    partial_ptr,  # (3, P, C) out, a program each: count, mean - running_mean, squared deviations
    x_ptr,  # (M, K)
    conv_weight_ptr,  # (C, K)
    residual_ptr,  # (M, C); unused unless HAS_RESIDUAL
    affine_ptr,  # (3, C) fp32: running_mean, scale, bias
    n_positions,  # M
    n_inputs,  # K
    n_channels,  # C
    stride_part,  # P C
    stride_xm,
    stride_xk,
    stride_wc,
    stride_wk,
    stride_rm,  # of the residual
    stride_rc,
    HAS_RESIDUAL: tl.constexpr,  # whether residual_ptr is read
    ACTIVATION: tl.constexpr,  # of bn_act_moments
    PRECISION: tl.constexpr,  # of products of fp32 numbers: "ieee" or "tf32"
    MULTIPLY_FP32: tl.constexpr,  # whether factors become fp32 first, for Triton's interpreter
    ALIGN: tl.constexpr,  # divides C, K and all strides of positions; 1 for unknown
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # input channels of a step
):
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % n_tiles).to(tl.int32)
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = mask_channels(offs_c, n_channels, ALIGN)
    part = pid // n_tiles
    first = part * BLOCK_M  # position of this tile
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_positions - first
    mask = mask_m[:, None] & mask_c[None, :]
    x_ptr += first * stride_xm

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first_k in range(0, n_inputs, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = mask_channels(offs_k, n_inputs, ALIGN)
        offs = _locate_tile(offs_m, stride_xm, offs_k, stride_xk, ALIGN)
        x = tl.load(x_ptr + offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        offs = offs_k[:, None] * stride_wk + offs_c[None, :] * stride_wc
        w = tl.load(conv_weight_ptr + offs, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        if MULTIPLY_FP32:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    stored = acc.to(z_ptr.dtype.element_ty)
    offs = _locate_tile(offs_m, n_channels, offs_c, 1, ALIGN)
    tl.store(z_ptr + first * n_channels + offs, stored, mask=mask)
    shift = tl.load(affine_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(affine_ptr + n_channels + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(affine_ptr + 2 * n_channels + offs_c, mask=mask_c, other=0.0)
    z = stored.to(tl.float32) - shift[None, :]  # as the backward pass reads it
    u = z * scale[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        offs_r = _locate_tile(offs_m, stride_rm, offs_c, stride_rc, ALIGN)
        residual_ptr += first * stride_rm
        u += tl.load(residual_ptr + offs_r, mask=mask, other=0.0).to(tl.float32)
    y = apply_activation(u, ACTIVATION)
    tl.store(y_ptr + first * n_channels + offs, y.to(y_ptr.dtype.element_ty), mask=mask)

    count = tl.sum(mask_m.to(tl.float32), 0)
    mean = tl.sum(tl.where(mask, z, 0.0), 0) / count
    delta = tl.where(mask, z - mean[None, :], 0.0)
    residue = tl.sum(delta, 0) / count  # what rounding left in `mean`
    m2 = tl.sum(delta * delta, 0) - count * residue * residue
    partial_ptr += part * n_channels + offs_c
    tl.store(partial_ptr, tl.zeros((BLOCK_C,), tl.float32) + count, mask=mask_c)
    tl.store(partial_ptr + stride_part, mean + residue, mask=mask_c)
    tl.store(partial_ptr + 2 * stride_part, m2, mask=mask_c)


@triton.jit
def _pointwise_bn_act_moments_bwd_kernel(
    dx_ptr,  # (M, K) out, dense; M = N H W positions
    dresidual_ptr,  # (M, C) out, dense; unused unless NEEDS_RESIDUAL
    z_ptr,  # (M, C), dense
    dy_ptr,  # (M, C)
    dy_again_ptr,  # (M, C), added to dy; unused unless HAS_DY_AGAIN
    saved_ptr,  # (M, C): y or the residual; unused where SAVED is "nothing"
    conv_weight_ptr,  # (C, K)
    affine_ptr,  # (3, C) fp32: running_mean, scale, bias
    grad_ptr,  # (3, C) fp32: gradient of mean, of var; mean - running_mean; in each row dense
    n_positions,  # M
    n_inputs,  # K
    n_channels,  # C
    stride_dym,
    stride_dyc,
    stride_am,  # of dy_again
    stride_ac,
    stride_sm,  # of what saved_ptr holds
    stride_sc,
    stride_wc,
    stride_wk,
    stride_grad,  # between its rows: C, or more where it is a slice of all layers'
    inverse_n,  # 1 / M
    HAS_DY_AGAIN: tl.constexpr,  # whether dy_again_ptr is read
    SAVED: tl.constexpr,  # what saved_ptr holds: "y", "residual" or "nothing"
    NEEDS_RESIDUAL: tl.constexpr,  # whether dresidual is wanted
    ACTIVATION: tl.constexpr,  # of bn_act_moments
    PRECISION: tl.constexpr,  # of products of fp32 numbers: "ieee" or "tf32"
    MULTIPLY_FP32: tl.constexpr,  # whether factors become fp32 first, for Triton's interpreter
    ALIGN: tl.constexpr,  # divides C, K and all strides of positions; 1 for unknown
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels of a step
):
    n_tiles = tl.cdiv(n_inputs, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    tile = (pid % n_tiles).to(tl.int32)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = mask_channels(offs_k, n_inputs, ALIGN)
    first = pid // n_tiles * BLOCK_M  # position of this tile
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_positions - first
    z_ptr += first * n_channels
    dresidual_ptr += first * n_channels
    dy_ptr += first * stride_dym
    dy_again_ptr += first * stride_am
    saved_ptr += first * stride_sm

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_c in range(0, n_channels, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)
        mask_c = mask_channels(offs_c, n_channels, ALIGN)
        mask = mask_m[:, None] & mask_c[None, :]
        shift = tl.load(affine_ptr + offs_c, mask=mask_c, other=0.0)
        scale = tl.load(affine_ptr + n_channels + offs_c, mask=mask_c, other=0.0)
        bias = tl.load(affine_ptr + 2 * n_channels + offs_c, mask=mask_c, other=0.0)
        a = tl.load(grad_ptr + offs_c, mask=mask_c, other=0.0) * inverse_n
        b = tl.load(grad_ptr + stride_grad + offs_c, mask=mask_c, other=0.0) * (2.0 * inverse_n)
        mean = tl.load(grad_ptr + 2 * stride_grad + offs_c, mask=mask_c, other=0.0)

        offs_z = _locate_tile(offs_m, n_channels, offs_c, 1, ALIGN)
        z = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32) - shift[None, :]
        offs = _locate_tile(offs_m, stride_dym, offs_c, stride_dyc, ALIGN)
        g = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_DY_AGAIN:
            offs = _locate_tile(offs_m, stride_am, offs_c, stride_ac, ALIGN)
            g += tl.load(dy_again_ptr + offs, mask=mask, other=0.0).to(tl.float32)

        u = z * scale[None, :] + bias[None, :]
        if SAVED != "nothing":
            offs = _locate_tile(offs_m, stride_sm, offs_c, stride_sc, ALIGN)
            saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if SAVED == "y":
                u = saved
            else:
                u += saved
        g = multiply_by_slope(g, u, dx_ptr.dtype.element_ty, ACTIVATION)
        if NEEDS_RESIDUAL:  # one tile of input channels writes it for all
            dresidual = g.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + offs_z, dresidual, mask=mask & (tile == 0))

        dz = g * scale[None, :] + a[None, :] + b[None, :] * (z - mean[None, :])
        dz = dz.to(dx_ptr.dtype.element_ty)
        offs = offs_c[:, None] * stride_wc + offs_k[None, :] * stride_wk
        w = tl.load(conv_weight_ptr + offs, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        if MULTIPLY_FP32:
            dz = dz.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(dz, w, acc, input_precision=PRECISION)

    offs = _locate_tile(offs_m, n_inputs, offs_k, 1, ALIGN)
    mask = mask_m[:, None] & mask_k[None, :]
    tl.store(dx_ptr + first * n_inputs + offs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, so there factors
# become fp32 first (MULTIPLY_FP32). That changes no value: products and sums are fp32 anyway.

# Positions and channels of a tile, channels of a step of the product, and how it is launched.
# Chosen by arithmetic and by the registers that ahead-of-time compilation counts. Not yet measured
# on a GPU.
_FORWARD = {"BLOCK_M": 128, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
_BACKWARD = {"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}


def choose_precision(dtype):
    """How fp32 numbers are multiplied: in TF32 where PyTorch's convolutions are, else exactly.

    torch.compile cannot read that setting, and Triton has no TF32 for most AMD GPUs.
    """
    if dtype != torch.float32 or torch.compiler.is_compiling() or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def choose_alignment(*matrices):
    """8 if it divides the row strides and sizes of all, whose channels lie side by side, else 1."""
    for matrix in matrices:
        stride_m, stride_c = matrix.stride()
        if stride_c != 1 or stride_m % 8 != 0 or matrix.size(1) % 8 != 0:
            return 1
    return 8


def _see_as_matrix(x):
    """x (N, C, H, W) as (N H W, C): a view in channels_last, a copy in most other layouts."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))


def _make_empty(x, n_channels):
    """(N, n_channels, H, W) in channels_last, not written; the rest is as of x (N, C, H, W).

    Autograd would not let a network change a view of a matrix in place.
    """
    N, _, H, W = x.shape
    options = {"device": x.device, "dtype": x.dtype, "memory_format": torch.channels_last}
    return torch.empty((N, n_channels, H, W), **options)


def _forward_on_gpu(x, conv_matrix, residual, affine, activation):
    """y, z (N, C, H, W), and partial moments (3, P, C)."""
    x_matrix = _see_as_matrix(x)
    M, K = x_matrix.shape
    C = len(conv_matrix)
    z = _make_empty(x, C)
    y = _make_empty(x, C)
    z_matrix = _see_as_matrix(z)
    has_residual = residual is not None
    other = _see_as_matrix(residual) if has_residual else z_matrix  # stands in where none is read

    n_tiles = triton.cdiv(C, _FORWARD["BLOCK_C"])
    n_blocks = triton.cdiv(M, _FORWARD["BLOCK_M"])
    partial = torch.empty((3, n_blocks, C), device=x.device, dtype=torch.float32)
    with _common.on_device_of(x):
        _pointwise_bn_act_moments_fwd_kernel[(n_tiles * n_blocks,)](
            _see_as_matrix(y),
            z_matrix,
            partial,
            x_matrix,
            conv_matrix,
            other,
            affine,
            M,
            K,
            C,
            n_blocks * C,
            *x_matrix.stride(),
            *conv_matrix.stride(),
            *other.stride(),
            has_residual,
            activation,
            choose_precision(x.dtype),
            _common.INTERPRET,
            ALIGN=choose_alignment(z_matrix, x_matrix, other),
            **_FORWARD,
        )
    return y, z, partial


def _backward_on_gpu(ctx, saved_tensors, conv_matrix, dy, dy_again, grads):
    """dx and dresidual, or None where the residual needs no gradient."""
    z, saved, affine, *_ = saved_tensors
    z_matrix = _see_as_matrix(z)
    dy_matrix = _see_as_matrix(dy)
    has_again = dy_again is not None
    again = _see_as_matrix(dy_again) if has_again else dy_matrix  # stands in where none is read
    other = z_matrix if saved is None else _see_as_matrix(saved)
    C, K = conv_matrix.shape
    M = len(z_matrix)
    dx = _make_empty(z, K)
    dx_matrix = _see_as_matrix(dx)
    is_dy_itself = ctx.activation == "none" and not has_again
    needs_residual = ctx.needs_input_grad[1] and not is_dy_itself
    dresidual = torch.empty_like(z) if needs_residual else None
    # A layer's slice of the rows of all layers is read where it lies.
    rows = grads[:, 0]  # (3, C), of _MergeMoments.backward
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    n_tiles = triton.cdiv(K, _BACKWARD["BLOCK_K"])
    n_blocks = triton.cdiv(M, _BACKWARD["BLOCK_M"])
    with _common.on_device_of(z):
        _pointwise_bn_act_moments_bwd_kernel[(n_tiles * n_blocks,)](
            dx_matrix,
            _see_as_matrix(dresidual) if needs_residual else z_matrix,
            z_matrix,
            dy_matrix,
            again,
            other,
            conv_matrix,
            affine,
            rows,
            M,
            K,
            C,
            *dy_matrix.stride(),
            *again.stride(),
            *other.stride(),
            *conv_matrix.stride(),
            rows.stride(0),
            1 / M,
            has_again,
            ctx.saved,
            needs_residual,
            ctx.activation,
            choose_precision(z.dtype),
            _common.INTERPRET,
            ALIGN=choose_alignment(dx_matrix, z_matrix, dy_matrix, again, other),
            **_BACKWARD,
        )
    if ctx.needs_input_grad[1] and is_dy_itself:
        return dx, dy
    return dx, dresidual


def _multiply_on_cpu(x, conv_matrix):
    """The convolution of x (N, K, H, W), in x's dtype also under autocast; (N, C, H, W)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, conv_matrix.to(x.dtype)[:, :, None, None])


class _PointwiseBNActMoments(torch.autograd.Function):
    """y, and what merge_moments takes, as of `_BNActMoments`."""

    @staticmethod
    def forward(ctx, x, residual, conv_matrix, affine, activation, n_uses):
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        if _common.runs_triton(x):
            y, z, part = _forward_on_gpu(x, conv_matrix, residual, affine, activation)
            ctx.saved = choose_saved(activation, residual)
            saved = {"nothing": None, "y": y, "residual": residual}[ctx.saved]
            ctx.save_for_backward(z, saved, affine, None, conv_matrix)
        else:
            z = _multiply_on_cpu(x, conv_matrix)
            y, part, (near_z, near_mean, saved) = forward_on_cpu(z, residual, affine, activation)
            ctx.save_for_backward(near_z, saved, affine, near_mean, conv_matrix)
        if n_uses == 2:
            return y, part, y.view_as(y)
        return y, part

    @staticmethod
    def backward(ctx, dy, grads, dy_again=None):
        _common.refuse_double_backward("pointwise_bn_act_moments")
        *saved_tensors, conv_matrix = ctx.saved_tensors  # read once, as in _BNActMoments
        z, _, affine, *_ = saved_tensors
        dy, grads, dy_again = fill_gradients(dy, grads, dy_again, z, affine)
        if _common.runs_triton(dy):
            dx, dresidual = _backward_on_gpu(ctx, saved_tensors, conv_matrix, dy, dy_again, grads)
        else:
            dz, dresidual = backward_on_cpu(ctx, saved_tensors, dy, dy_again, grads)
            dx = _multiply_on_cpu(dz, conv_matrix.T)
        return dx, dresidual, None, None, None, None


def pointwise_bn_act_moments(
    x,
    conv_weight,
    weight,
    bias,
    running_mean,
    running_var,
    eps=1e-5,
    residual=None,
    activation="relu",
):
    """1 x 1 convolution, BatchNorm in eval mode, an addition, an activation, and moments.

    y, moments = bn_act_moments(conv2d(x, conv_weight), weight, …), and z = conv2d(x, conv_weight)
    is written once and read only by the backward pass.

    Args:
        x: (N, K, H, W); fp32, fp16 or bf16; any strides. A GPU copies what is not channels_last;
            that is true of residual and of y's gradient too.
        conv_weight: (C, K, 1, 1) in the dtype of x, any strides; a constant. The convolution has
            stride 1, no padding, one group and no bias.
        weight, bias, running_mean, running_var: (C,) of a float dtype; constants;
            running_var + eps > 0.
        eps: a python number.
        residual: (N, C, H, W) in the dtype of x, any strides, added before the activation. None
            adds nothing.
        activation: "none", "relu", "relu6", "silu" or "hardswish", as in torch.nn.functional.

    Returns:
        y: (N, C, H, W) in the dtype of x; channels_last on a GPU.
        moments: (2, C) fp32 of z as it is stored, in the dtype of x: mean(z) - running_mean, and
            the biased variance.

    Raises:
        TypeError: a tensor argument is no tensor, or not fp32, fp16 or bf16.
        ValueError: an argument is empty, of another shape or dtype than said, or on another device;
            or there is no such activation.

    Note:
        Differentiable once, in x and residual. Sums are in fp32. Products of fp32 numbers are
        exact, or in TF32 where PyTorch's convolutions may use it
        (torch.backends.cudnn.conv.fp32_precision). Repeated calls are bit-equal.

        What may be modified in place is as with `bn_act_moments`.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(1, 2, 1, 2)  # 2 channels, 1 x 2 positions
        >>> conv_weight = torch.tensor([[1.0, 1.0]]).view(1, 2, 1, 1)  # z: 6, 8
        >>> one = torch.ones(1)
        >>> y, moments = pointwise_bn_act_moments(x, conv_weight, one, 0 * one, 7 * one, one, 0.0)
        >>> y.flatten().tolist(), moments.flatten().tolist()
        ([0.0, 1.0], [0.0, 1.0])
    """
    op = "pointwise_bn_act_moments"
    vectors = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _common.check_float(op, x=x, conv_weight=conv_weight, residual=residual, **vectors)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: expected x of shape (N, K, H, W), got {tuple(x.shape)}; reshape it"
        )
    N, K, H, W = x.shape
    if conv_weight.dim() != 4 or conv_weight.shape[1:] != (K, 1, 1) or conv_weight.dtype != x.dtype:
        got = f"{tuple(conv_weight.shape)} {conv_weight.dtype}"
        raise ValueError(
            f"{op}: expected conv_weight of (C, {K}, 1, 1) {x.dtype}, got {got}; match it to x"
        )
    C = len(conv_weight)
    check_vectors(op, C, **vectors)
    check_residual(op, residual, (N, C, H, W), x.dtype)
    check_activation(activation, op)
    affine = fold_constants(weight, bias, running_mean, running_var, eps)
    y, part = pointwise_bn_act_moments_folded(x, conv_weight, affine, residual, activation)
    return y, merge_moments([part], op)


def pointwise_bn_act_moments_folded(
    x, conv_weight, affine, residual=None, activation="relu", n_uses=1
):
    """`pointwise_bn_act_moments` for constants that `fold_constants` has folded.

    Tensors are not checked. n_uses and what is returned are as of `bn_act_moments_folded`.
    """
    check_activation(activation, "pointwise_bn_act_moments")
    conv_matrix = conv_weight.detach()[:, :, 0, 0]  # (C, K)
    return _PointwiseBNActMoments.apply(x, residual, conv_matrix, affine, activation, n_uses)
