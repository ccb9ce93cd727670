"""Distance of all layers' batch moments from their running statistics, in one op: R_feature of a whole network.

    loss = sum_l w_l (||m_l||_2 + ||v_l - running_var_l||_2),   m_l = mean_l - running_mean_l, v_l the variance; (C_l,)
    dm_l = g w_l m_l / ||m_l||,   dv_l = g w_l (v_l - running_var_l) / ||v_l - running_var_l||;   0 where a norm is 0

Source: Yin et al., "Dreaming to Distill", arXiv:1912.08795, eq. 4, where w_l = 1; the released code has w_0 = 10 on
ImageNet. Norms not squared and not divided by C_l, as in the released code. The moments are those of `bn_act_moments`,
layer beside layer.

Traffic is nothing (a ResNet-50 has 26,560 channels: 0.3 MB); launches are what counts. Layer by layer, plain PyTorch
needs about 8 forward and 12 backward, each for a few hundred numbers: 1,000 for the 53 layers of a ResNet-50, some
3 ms of launching for 20 us of work. Here: 2 forward (norms, their sum), 1 backward.
"""

import functools

import torch

from kernels import _common
from kernels._common import tl, triton


def moment_distance_ref(moments, running_var, sizes, weights=None):
    """The definition in plain PyTorch: see moment_distance. float64 stays float64."""
    weights = [1.0] * len(sizes) if weights is None else weights
    mean_distance, var_distance = moments[0], moments[1] - running_var.detach()
    pairs = zip(weights, mean_distance.split(sizes), var_distance.split(sizes), strict=True)
    norm = torch.linalg.vector_norm  # its gradient at 0 is 0
    return torch.stack([w * (norm(mean) + norm(var)) for w, mean, var in pairs]).sum()


@triton.jit
def _distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels):
    """What the norms are of: the mean's offsets in row 0, the variance less the running one in row 1."""
    distance = tl.load(moments_ptr + row * n_channels + offs, mask=mask, other=0.0)
    return distance - tl.load(running_var_ptr + offs, mask=mask & (row == 1), other=0.0)


@triton.jit
def _moment_distance_fwd_kernel(
    norms_ptr,  # (2, L) fp32 out: of the distances of mean, of variance
    weighted_ptr,  # (2, L) fp32 out: these times the layers' weights
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin, end = tl.load(offsets_ptr + layer), tl.load(offsets_ptr + layer + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        distance = _distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels)
        total += distance * distance
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(norms_ptr + row * n_layers + layer, norm)
    tl.store(weighted_ptr + row * n_layers + layer, norm * tl.load(weights_ptr + layer))


@triton.jit
def _moment_distance_bwd_kernel(
    dmoments_ptr,  # (2, C) fp32 out
    grad_ptr,  # () gradient of the loss in the result
    norms_ptr,  # (2, L) fp32
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin, end = tl.load(offsets_ptr + layer), tl.load(offsets_ptr + layer + 1)
    norm = tl.load(norms_ptr + row * n_layers + layer)
    grad = tl.load(grad_ptr).to(tl.float32) * tl.load(weights_ptr + layer)
    scale = tl.where(norm == 0.0, 0.0, grad / tl.where(norm == 0.0, 1.0, norm))
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        distance = _distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels)
        tl.store(dmoments_ptr + row * n_channels + offs, distance * scale, mask=mask)


@functools.lru_cache(maxsize=256)
def _layout(sizes, weights, device):
    """Offsets (L + 1,) and each channel's layer (C,), int64, weights (L,): made once, a CUDA graph copies none."""
    lengths = torch.tensor([0, *sizes])
    layer = torch.repeat_interleave(torch.arange(len(sizes)), lengths[1:])
    weights = (
        torch.ones(len(sizes)) if weights is None else torch.tensor(weights, dtype=torch.float32)
    )
    return lengths.cumsum(0).to(device), layer.to(device), weights.to(device)


_META = {
    "BLOCK": 512,
    "num_warps": 4,
}  # a layer has 16 to 2048 channels: 1 to 4 blocks, 4 values a lane


class _MomentDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, moments, running_var, sizes, weights):
        ctx.layout = offsets, layer, weights = _layout(sizes, weights, moments.device)
        n_channels, n_layers = moments.shape[1], len(sizes)
        if _common.runs_triton(moments):
            norms, weighted = (
                torch.empty(2, n_layers, device=moments.device, dtype=torch.float32)
                for _ in range(2)
            )
            sizes = n_channels, n_layers
            _moment_distance_fwd_kernel[(n_layers, 2)](
                norms, weighted, moments, running_var, weights, offsets, *sizes, **_META
            )
        else:
            squares = torch.stack((moments[0], moments[1] - running_var)).square_()
            norms = squares.new_zeros(2, n_layers).index_add_(1, layer, squares).sqrt_()
            weighted = norms * weights
        ctx.save_for_backward(moments, running_var, norms)
        return weighted.sum()

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("moment_distance")
        moments, running_var, norms = ctx.saved_tensors
        offsets, layer, weights = ctx.layout
        if not _common.runs_triton(moments):
            distance = torch.stack((moments[0], moments[1] - running_var))
            scale = grad * weights / norms.masked_fill(norms == 0, torch.inf)  # (2, L)
            return distance.mul_(scale[:, layer]), None, None, None
        dmoments, sizes = torch.empty_like(moments), (moments.shape[1], len(weights))
        _moment_distance_bwd_kernel[(len(weights), 2)](
            dmoments, grad, norms, moments, running_var, weights, offsets, *sizes, **_META
        )
        return dmoments, None, None, None


def moment_distance(moments, running_var, sizes, weights=None):
    """Weighted sum over layers of ||mean - running_mean||_2 + ||var - running_var||_2, all layers at once.

    Args:
        moments: (2, C) float32, contiguous: mean less running mean, and biased variance, of layer beside layer, as
            torch.cat of what `bn_act_moments` returns along dimension 1.
        running_var: (C,) float32, contiguous; a constant.
        sizes: channels of each layer, python integers >= 1 that add up to C; a tuple.
        weights: of the layers, python numbers; a tuple as long as sizes. None: 1 each.

    Returns:
        (), float32.

    Raises:
        TypeError: a tensor is none, or not float32; sizes or weights are no tuple.
        ValueError: shapes, sizes, weights or devices that do not fit, a tensor that is not contiguous.

    Note:
        Differentiable once, in moments; where a norm is exactly 0 its gradient is 0, a subgradient. Repeated calls are
        bit-equal.

    Example:
        >>> moments = torch.tensor([[3.0, 4.0, 2.0], [1.0, 1.0, 6.0]])  # two layers, of 2 channels and of 1
        >>> moment_distance(moments, torch.ones(3), (2, 1))  # 5 + 0, 2 + 5
        tensor(12.)
    """
    _common.check_float("moment_distance", moments=moments, running_var=running_var)
    if not isinstance(sizes, tuple):
        raise TypeError(
            f"moment_distance: expected sizes to be a tuple, got {type(sizes).__name__}; pass integers"
        )
    for name, x in (("moments", moments), ("running_var", running_var)):
        if x.dtype != torch.float32 or not x.is_contiguous():
            got = f"{x.dtype} of strides {x.stride()}"
            raise ValueError(
                f"moment_distance: expected {name} contiguous in float32, got {got}; convert it"
            )
    shapes = tuple(moments.shape), tuple(running_var.shape)
    if shapes != ((2, sum(sizes)), (sum(sizes),)) or min(sizes, default=0) < 1:
        raise ValueError(
            f"moment_distance: expected (2, C) and (C,), C the sum of {sizes}, got {shapes}; check sizes"
        )
    if weights is not None and (not isinstance(weights, tuple) or len(weights) != len(sizes)):
        error = ValueError if isinstance(weights, tuple) else TypeError
        raise error(
            f"moment_distance: expected weights as a tuple of {len(sizes)}, got {weights}; one for each layer"
        )
    return _MomentDistance.apply(moments, running_var, sizes, weights)
