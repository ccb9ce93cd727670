"""Spatial attention maps of activations, and the distance of a student's maps from a teacher's.

For an activation x (N, C, H, W), with positions i = (h, w), and a fixed target t = q of the
teacher's activation; ||.|| is taken over the H W positions of one sample:

    m_ni = 1/C sum_c x_nci^2
    q_n  = m_n / max(||m_n||, eps)
    loss = 1/(N H W) sum_ni (q_ni - t_ni)^2

    dq     = 2 (q - t) / (N H W)
    dm_n   = (dq_n - q_n <q_n, dq_n>) / ||m_n||
    dx_nci = 2 x_nci dm_ni / C

Where ||m_n|| < eps, q_n = m_n / eps and dm_n = dq_n / eps. A sample of zeros has q = 0 and, since
x = 0, gradient 0.

Sources: Zagoruyko & Komodakis 2017, "Paying more attention to attention" (arXiv:1612.03928): m is
their F_mean^2. Micaelli & Storkey 2019, "Zero-shot knowledge transfer via adversarial belief
matching" (arXiv:1905.09768), eq. 1: it prints an un-squared norm of q - t. The released code of
both papers squares it and divides by N H W, and so does this file. eps is that of F.normalize.
Teacher and student may differ in C, but not in H W.

Traffic in passes over x (N C H W values; maps are 1/C of that and left out):
    eager  forward 3: x read, x^2 written, x^2 read for the mean; backward 8: the mean's gradient
           expanded 1, x^1 2, times two 2, times the gradient 3
    fused  forward 1, backward 2 (x read, dx written)
    best possible ratio: 3 forward, 11 / 3 = 3.7 with backward
"""

import math

import torch

from kernels import _common
from kernels._channels import mask_channels
from kernels._common import tl, triton


def attention_map_ref(x, eps=1e-12):
    """The definition in plain PyTorch: see attention_map.

    float64 stays float64; half precision goes to fp32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    m = x.square().mean(1).flatten(1)  # (N, H W)
    norm = torch.linalg.vector_norm(m, dim=1, keepdim=True)  # (N, 1), with gradient 0 at 0
    return m / norm.clamp_min(eps)


def attention_transfer_ref(x, target, eps=1e-12):
    """The definition in plain PyTorch: see attention_transfer."""
    return (attention_map_ref(x, eps) - target.detach()).square().mean()


# The kernels see x as images of positions: N images of H W positions each. Where the positions of
# all samples follow each other in memory at one step (channels_last), it is one image of N H W
# positions. A tile is positions x channels.


@triton.jit
def _position_offsets(
    image,  # index of the image
    offs_p,  # (BLOCK_P,) positions in it
    W,  # positions of a row
    stride_n,  # from image to image
    stride_h,  # from row to row, unused if FLAT
    stride_p,  # from position to position
    FLAT: tl.constexpr,  # the positions of an image lie at one step
    ALIGN: tl.constexpr,  # a number that divides all offsets; 1 for unknown
):
    """Where positions lie in memory (BLOCK_P,)."""
    if FLAT:
        offs = image * stride_n + offs_p * stride_p
    else:
        offs = image * stride_n + (offs_p // W) * stride_h + (offs_p % W) * stride_p
    if ALIGN > 1:  # Triton itself knows of multiples of 16 only
        offs = tl.multiple_of(offs, ALIGN)
    return offs


@triton.jit
def _attention_map_fwd_kernel(
    m_ptr,  # (N, H W) fp32 out: mean of squares
    x_ptr,  # (N, C, H, W) activation
    n_positions,  # positions of an image
    C,  # channels
    W,  # positions of a row
    stride_xn,  # from image to image
    stride_xh,  # from row to row, unused if FLAT
    stride_xp,  # from position to position
    stride_xc,  # from channel to channel
    inv_c,  # 1 / C
    FLAT: tl.constexpr,  # the positions of an image lie at one step
    ALIGN: tl.constexpr,  # 8 if the channels lie side by side in whole groups of 8, else 1
    BLOCK_P: tl.constexpr,  # positions of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
):
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(n_positions, BLOCK_P)
    image = pid // n_tiles
    tile = pid % n_tiles

    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < n_positions
    offs_x = _position_offsets(image, offs_p, W, stride_xn, stride_xh, stride_xp, FLAT, ALIGN)
    x_ptrs = x_ptr + offs_x[:, None]

    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = mask_p[:, None] & mask_channels(offs_c, C, ALIGN)[None, :]
        x = tl.load(x_ptrs + offs_c[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(m_ptr + image * n_positions + offs_p, tl.sum(acc, 1) * inv_c, mask=mask_p)


@triton.jit
def _attention_transfer_fwd_kernel(
    partials_ptr,  # (N,) fp32 out: share of each sample in the loss
    m_ptr,  # (N, H W) fp32 in and out: mean of squares, replaced by its gradient dm
    target_ptr,  # (N, H W) the teacher's maps
    n_positions,  # H W
    stride_tn,  # from sample to sample of the target
    stride_tp,  # from position to position of the target
    inv_n,  # 1 / (N H W)
    eps,  # least norm that is divided by
    BLOCK: tl.constexpr,  # positions of a sample at a time
):
    sample = tl.program_id(0).to(tl.int64)
    m_ptr += sample * n_positions
    target_ptr += sample * stride_tn

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        m = tl.load(m_ptr + offs, mask=offs < n_positions, other=0.0)
        squares += m * m
    norm = tl.sqrt_rn(tl.sum(squares))
    divisor = tl.where(norm < eps, eps, norm)  # a NaN stays

    loss = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < n_positions
        q = tl.load(m_ptr + offs, mask=mask, other=0.0) / divisor
        t = tl.load(target_ptr + offs * stride_tp, mask=mask, other=0.0).to(tl.float32)
        d = q - t
        loss += d * d
        inner += q * d
    tl.store(partials_ptr + sample, tl.sum(loss) * inv_n)

    # <q, d> is what the gradient loses along q. Below eps, q is not normalised and loses nothing.
    along_q = tl.where(norm < eps, 0.0, tl.sum(inner))
    scale = 2.0 * inv_n / divisor
    for start in range(0, n_positions, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < n_positions
        q = tl.load(m_ptr + offs, mask=mask, other=0.0) / divisor
        t = tl.load(target_ptr + offs * stride_tp, mask=mask, other=0.0).to(tl.float32)
        d = q - t
        tl.store(m_ptr + offs, scale * (d - q * along_q), mask=mask)


@triton.jit
def _attention_map_bwd_dx_kernel(
    dx_ptr,  # (N, C, H, W) out: gradient of x
    x_ptr,  # (N, C, H, W) activation
    dm_ptr,  # (N, H W) fp32: gradient of the mean of squares
    grad_ptr,  # () a further factor, or None
    n_positions,  # positions of an image
    C,  # channels
    W,  # positions of a row
    stride_dxn,  # of dx: from image to image
    stride_dxh,  # from row to row, unused if FLAT
    stride_dxp,  # from position to position
    stride_dxc,  # from channel to channel
    stride_xn,  # the same four of x
    stride_xh,
    stride_xp,
    stride_xc,
    scale,  # 2 / C
    FLAT: tl.constexpr,  # the positions of an image lie at one step
    ALIGN: tl.constexpr,  # 8 if the channels lie side by side in whole groups of 8, else 1
    BLOCK_P: tl.constexpr,  # positions of a tile
    BLOCK_C: tl.constexpr,  # channels of a tile
):
    pid = tl.program_id(0).to(tl.int64)
    n_channel_tiles = tl.cdiv(C, BLOCK_C)
    n_tiles = tl.cdiv(n_positions, BLOCK_P)
    image = pid // n_channel_tiles // n_tiles
    tile = pid // n_channel_tiles % n_tiles
    channel_tile = pid % n_channel_tiles

    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p = offs_p < n_positions
    mask = mask_p[:, None] & mask_channels(offs_c, C, ALIGN)[None, :]

    dm = tl.load(dm_ptr + image * n_positions + offs_p, mask=mask_p, other=0.0)
    if grad_ptr is not None:
        dm *= tl.load(grad_ptr).to(tl.float32)

    offs_x = _position_offsets(image, offs_p, W, stride_xn, stride_xh, stride_xp, FLAT, ALIGN)
    x_ptrs = x_ptr + offs_x[:, None] + offs_c[None, :] * stride_xc
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    dx = x * (scale * dm)[:, None]

    offs_dx = _position_offsets(image, offs_p, W, stride_dxn, stride_dxh, stride_dxp, FLAT, ALIGN)
    dx_ptrs = dx_ptr + offs_dx[:, None] + offs_c[None, :] * stride_dxc
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# Chosen by arithmetic (16 values a thread, so two to four 16-byte loads in flight), not yet
# measured on a GPU. Small layers need many programs more than long ones.
_TILES = (  # (most elements of x, elements of a tile, warps)
    (1 << 20, 2048, 4),
    (math.inf, 4096, 8),
)
_CHANNEL_BLOCK = 128  # most channels of a tile where they lie side by side: 256 bytes of bf16
_POSITION_BLOCK = 256  # most positions of a tile where those do; it then has 8 or 16 channels
_SAMPLE_BLOCK = 4096  # positions of a sample at a time: maps of up to 64 x 64 in one step
_SAMPLE_WARPS = (  # (most positions at a time, warps)
    (256, 1),
    (1024, 4),  # 8 elements a lane
    (_SAMPLE_BLOCK, 8),  # 16 elements a lane
)


def _plan(*tensors):
    """How to walk through tensors of one shape.

    Returns the number of programs along positions, (positions, C, W), the four strides of each
    tensor, and the kernel's constants.
    """
    N, C, H, W = tensors[0].shape

    # The dimension along which the next position lies, and whether all positions lie at one step.
    if W > 1:
        axis = 3
    elif H > 1:
        axis = 2
    else:
        axis = 0
    flat = min(H, W) == 1 or all(t.stride(2) == W * t.stride(axis) for t in tensors)
    one_run = N == 1 or H * W == 1 or all(t.stride(0) == H * W * t.stride(axis) for t in tensors)
    if flat and one_run:
        n_images = 1
        n_positions = N * H * W
    else:
        n_images = N
        n_positions = H * W
    strides = [(t.stride(0), t.stride(2), t.stride(axis), t.stride(1)) for t in tensors]

    tile, num_warps = next(
        (tile, warps) for limit, tile, warps in _TILES if tensors[0].numel() <= limit
    )
    channels_inside = C > 1 and all(t.stride(1) == 1 for t in tensors)
    if channels_inside:
        block_c = min(triton.next_power_of_2(C), _CHANNEL_BLOCK)
        block_p = min(triton.next_power_of_2(n_positions), tile // block_c)
    else:
        block_p = min(triton.next_power_of_2(n_positions), _POSITION_BLOCK)
        block_c = min(triton.next_power_of_2(C), tile // block_p)

    groups_of_8 = C % 8 == 0 and all(s % 8 == 0 for of_one in strides for s in of_one[:3])
    align = 8 if channels_inside and groups_of_8 else 1
    meta = {
        "FLAT": flat,
        "ALIGN": align,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": num_warps,
    }
    return n_images * triton.cdiv(n_positions, block_p), (n_positions, C, W), strides, meta


def _mean_square(x):
    """m (N, H W) of x, in fp32."""
    N, C, H, W = x.shape
    if _common.runs_triton(x):
        m = torch.empty(N, H * W, device=x.device, dtype=torch.float32)
        n_programs, sizes, (strides,), meta = _plan(x)
        with _common.on_device_of(x):
            _attention_map_fwd_kernel[(n_programs,)](m, x, *sizes, *strides, 1 / C, **meta)
        return m

    # The fastest on a CPU, measured. Where the channels lie side by side, the norm makes no copy
    # and takes 0.6 to 0.9 of the time of square and mean. Below 16 channels, a product with ones
    # takes 0.4 of it. Elsewhere the norm takes 13 times as long.
    x = x.float()
    if x.stride(1) != 1:
        m = x.square().mean(1)
    elif C < 16:
        m = torch.mv(x.movedim(1, -1).square().reshape(-1, C), x.new_full((C,), 1 / C))
    else:
        m = torch.linalg.vector_norm(x, dim=1).square_().div_(C)
    return m.reshape(N, H * W)


def _mean_square_backward(x, dm, grad=None):
    """dx in the memory layout of x, multiplied by `grad` () if that is given."""
    N, C, H, W = x.shape
    if _common.runs_triton(x):
        dx = torch.empty_like(x)
        n_programs, sizes, (dx_strides, x_strides), meta = _plan(dx, x)
        grid = (n_programs * triton.cdiv(C, meta["BLOCK_C"]),)
        with _common.on_device_of(x):
            _attention_map_bwd_dx_kernel[grid](
                dx, x, dm, grad, *sizes, *dx_strides, *x_strides, 2 / C, **meta
            )
        return dx

    factor = 2 / C if grad is None else grad * (2 / C)
    factor = (dm * factor).view(N, 1, H, W)
    if x.dtype == torch.float32:
        return x * factor
    return x.float().mul_(factor).to(x.dtype)  # converting half precision first: 9 times as fast


def _normalise(m, eps):
    """q (N, H W), in place of m, and ||m|| (N, 1)."""
    norm = torch.linalg.vector_norm(m, dim=1, keepdim=True)
    return m.div_(norm.clamp_min(eps)), norm


def _normalise_backward(dq, q, norm, eps):
    """dm (N, H W), contiguous."""
    dq = dq.contiguous()  # a small copy: autograd hands over any strides
    along_q = (q * dq).sum(1, keepdim=True).masked_fill_(norm < eps, 0.0)
    return torch.addcmul(dq, q, along_q, value=-1).div_(norm.clamp_min(eps))


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        q, norm = _normalise(_mean_square(x), eps)
        ctx.save_for_backward(x, q, norm)
        ctx.eps = eps
        return q

    @staticmethod
    def backward(ctx, dq):
        _common.refuse_double_backward("attention_map")
        x, q, norm = ctx.saved_tensors
        dm = _normalise_backward(dq, q, norm, ctx.eps)
        return _mean_square_backward(x, dm), None


class _AttentionTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, eps):
        ctx.eps = eps
        m = _mean_square(x)
        if not _common.runs_triton(x):
            q, norm = _normalise(m, eps)
            d = q - target
            ctx.save_for_backward(x, q, norm, d)
            return d.square().mean()

        N, n_positions = target.shape
        block = min(triton.next_power_of_2(n_positions), _SAMPLE_BLOCK)
        num_warps = next(warps for limit, warps in _SAMPLE_WARPS if block <= limit)
        partials = torch.empty(N, device=x.device, dtype=torch.float32)
        with _common.on_device_of(x):
            _attention_transfer_fwd_kernel[(N,)](
                partials,
                m,
                target,
                n_positions,
                *target.stride(),
                1 / target.numel(),
                eps,
                BLOCK=block,
                num_warps=num_warps,
            )
        dm = m  # the kernel has replaced one by the other
        ctx.save_for_backward(x, dm)
        return partials.sum()

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("attention_transfer")
        x, *saved = ctx.saved_tensors
        if _common.runs_triton(x):
            (dm,) = saved
        else:
            q, norm, d = saved
            dm = _normalise_backward(d * (2 / d.numel()), q, norm, ctx.eps)
        return _mean_square_backward(x, dm, grad), None, None


def _check(op, x, eps, **others):
    _common.check_float(op, x=x, **others)
    if x.ndim != 4:
        raise ValueError(
            f"{op}: expected x of shape (N, C, H, W), got {tuple(x.shape)}; "
            f"use x[None] for one sample"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        kind = type(eps).__name__
        raise TypeError(f"{op}: expected eps to be a python number, got {kind}; pass a float")
    if not torch.finfo(torch.float32).tiny <= eps < math.inf:
        raise ValueError(
            f"{op}: expected a finite eps > 0 that fp32 can hold, got {eps}; 1e-12 is the default"
        )


def attention_map(x, eps=1e-12):
    """Spatial attention map of an activation: its mean square over the channels, normalised.

    q_n = m_n / max(||m_n||_2, eps) with m_ni = 1/C sum_c x_nci^2, over the positions i = (h, w)
    of one sample, row by row.

    Args:
        x: (N, C, H, W) activation in any unit, |x| up to 1e8; float32, float16 or bfloat16, any
            strides.
        eps: positive python number, the least norm that is divided by, in the squared unit of x.

    Returns:
        (N, H*W) fp32 in [0, 1], of norm 1 in each sample; all 0 for a sample of zeros.

    Raises:
        TypeError: x is no tensor or of another dtype; eps is no python number.
        ValueError: x is empty or not 4-D; eps is not positive and finite.

    Note:
        Differentiable once, in x. The gradient has the memory layout of x and is 0 for a sample of
        zeros. Sums are formed in fp32 in a fixed order, so that the same input gives the same bits.
        A GPU makes no copy of x.

    Example:
        >>> x = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # 2 channels, 1 x 2 positions
        >>> [round(value, 4) for value in attention_map(x)[0].tolist()]  # squares sum to 9 and 16
        [0.4903, 0.8716]
    """
    _check("attention_map", x, eps)
    return _AttentionMap.apply(x, float(eps))


def attention_transfer(x, target, eps=1e-12):
    """Mean squared distance of a student's attention maps from those of its teacher.

    1/(N H W) sum_ni (q_ni - target_ni)^2 with q = attention_map(x): the squared L2 distance
    divided by H W, averaged over the batch.

    Args:
        x: (N, C, H, W) activation of the student in any unit, |x| up to 1e8; float32, float16 or
            bfloat16, any strides.
        target: (N, H*W) attention_map of the teacher's activation, whose C may differ. It is a
            constant of one of the same dtypes, any strides.
        eps: positive python number, the least norm that is divided by, in the squared unit of x.

    Returns:
        fp32 scalar in [0, 2 / (H W)], up to rounding, for a target that is an attention map.

    Raises:
        TypeError: a tensor is none or of another dtype; eps is no python number.
        ValueError: an argument is empty, of another device or shape; target requires grad; eps is
            not positive and finite.

    Note:
        Differentiable once, in x only. The gradient has the memory layout of x and is 0 for a
        sample of zeros. Sums are formed in fp32 in a fixed order, so that the same input gives the
        same bits. A GPU makes no copy of x.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, -2.0]]]])
        >>> attention_transfer(student, attention_map(teacher)).item()  # disjoint: 2 / (H W)
        0.5
    """
    _check("attention_transfer", x, eps, target=target)
    expected = x.shape[0], x.shape[2] * x.shape[3]
    if target.shape != expected:
        raise ValueError(
            f"attention_transfer: expected target of shape {expected} for x of shape "
            f"{tuple(x.shape)}, got {tuple(target.shape)}; take layers with the same H and W, or "
            f"pool the larger activation first"
        )
    if target.requires_grad:
        raise ValueError(
            "attention_transfer: expected a constant target, got one that requires grad; detach it"
        )
    return _AttentionTransfer.apply(x, target, float(eps))
