"""Distance of all layers' batch moments from their running statistics: a network's R_feature.

    loss = sum_l w_l (||m_l||_2 + ||v_l - running_var_l||_2)
           m_l = mean_l - running_mean_l, v_l the variance, of layer l: (C_l,) each
    dm_l = g w_l m_l / ||m_l||
    dv_l = g w_l (v_l - running_var_l) / ||v_l - running_var_l||;   0 where a norm is 0

Source: Yin et al., "Dreaming to Distill", arXiv:1912.08795, eq. 4, where w_l = 1; the released code
has w_0 = 10 on ImageNet. The norms are not squared and not divided by C_l, as in the released code.
The moments are those of `bn_act_moments`, one layer beside the other.

Traffic is next to nothing: a ResNet-50 has 26,560 channels, 0.3 MB. What counts is launches.
    eager  layer by layer about 8 forward and 12 backward, each for a few hundred numbers: 1,000 for
           the 53 layers of a ResNet-50, some 3 ms of launching for 20 us of work
    fused  2 forward (the norms, their sum), 1 backward
"""

import functools

import torch

from kernels import _common
from kernels._common import tl, triton


def moment_distance_ref(moments, running_var, sizes, weights=None):
    """The definition in plain PyTorch: see moment_distance. float64 stays float64."""
    if weights is None:
        weights = [1.0] * len(sizes)
    mean_distances = moments[0].split(sizes)
    var_distances = (moments[1] - running_var.detach()).split(sizes)

    terms = []
    for weight, mean, var in zip(weights, mean_distances, var_distances, strict=True):
        norms = torch.linalg.vector_norm(mean) + torch.linalg.vector_norm(var)  # gradient at 0: 0
        terms.append(weight * norms)
    return torch.stack(terms).sum()


@triton.jit
def load_distances(
    moments_ptr,  # (2, C) fp32: mean - running_mean, variance
    running_var_ptr,  # (C,) fp32
    row,  # 0: mean, 1: variance
    offs,  # channels
    mask,
    n_channels,  # C, of all layers
):
    """The distances of the channels' moments: of the mean in row 0, of the variance in row 1."""
    moments = tl.load(moments_ptr + row * n_channels + offs, mask=mask, other=0.0)
    return moments - tl.load(running_var_ptr + offs, mask=mask & (row == 1), other=0.0)


@triton.jit
def _moment_distance_fwd_kernel(
    norms_ptr,  # (2, L) fp32 out: norms of the distances of the mean, of the variance
    weighted_ptr,  # (2, L) fp32 out: the norms times the layers' weights
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    BLOCK: tl.constexpr,  # channels at once
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin = tl.load(offsets_ptr + layer)
    end = tl.load(offsets_ptr + layer + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        distance = load_distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels)
        total += distance * distance
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(norms_ptr + row * n_layers + layer, norm)
    tl.store(weighted_ptr + row * n_layers + layer, norm * tl.load(weights_ptr + layer))


@triton.jit
def _moment_distance_bwd_kernel(
    dmoments_ptr,  # (2, C) fp32 out
    grad_ptr,  # (): gradient of the result
    norms_ptr,  # (2, L) fp32
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    BLOCK: tl.constexpr,  # channels at once
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin = tl.load(offsets_ptr + layer)
    end = tl.load(offsets_ptr + layer + 1)
    norm = tl.load(norms_ptr + row * n_layers + layer)
    grad = tl.load(grad_ptr).to(tl.float32) * tl.load(weights_ptr + layer)
    scale = tl.where(norm == 0.0, 0.0, grad / tl.where(norm == 0.0, 1.0, norm))
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        distance = load_distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels)
        tl.store(dmoments_ptr + row * n_channels + offs, distance * scale, mask=mask)


# A layer has 16 to 2048 channels: 1 to 4 blocks, 4 values a lane. Not yet measured on a GPU.
_META = {"BLOCK": 512, "num_warps": 4}


@functools.lru_cache(maxsize=256)
def _describe_layers(sizes, weights, device):
    """Where each layer begins, (L + 1,); the layer of each channel, (C,); the weights, (L,).

    The tensors are made once: a CUDA graph may not copy them from the host.
    """
    lengths = torch.tensor([0, *sizes])
    layer_of_channel = torch.repeat_interleave(torch.arange(len(sizes)), lengths[1:])
    if weights is None:
        layer_weights = torch.ones(len(sizes))
    else:
        layer_weights = torch.tensor(weights, dtype=torch.float32)
    offsets = lengths.cumsum(0)
    return offsets.to(device), layer_of_channel.to(device), layer_weights.to(device)


def _forward_on_gpu(moments, running_var, offsets, layer_weights):
    """The norms (2, L), and these times the layers' weights."""
    n_layers = len(layer_weights)
    norms = torch.empty(2, n_layers, device=moments.device, dtype=torch.float32)
    weighted = torch.empty_like(norms)
    _moment_distance_fwd_kernel[(n_layers, 2)](
        norms,
        weighted,
        moments,
        running_var,
        layer_weights,
        offsets,
        moments.shape[1],
        n_layers,
        **_META,
    )
    return norms, weighted


class _MomentDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, moments, running_var, sizes, weights):
        ctx.layers = _describe_layers(sizes, weights, moments.device)
        offsets, layer_of_channel, layer_weights = ctx.layers
        if _common.runs_triton(moments):
            norms, weighted = _forward_on_gpu(moments, running_var, offsets, layer_weights)
        else:
            squares = torch.stack((moments[0], moments[1] - running_var)).square_()  # (2, C)
            norms = squares.new_zeros(2, len(sizes)).index_add_(1, layer_of_channel, squares)
            norms.sqrt_()  # (2, L)
            weighted = norms * layer_weights
        ctx.save_for_backward(moments, running_var, norms)
        return weighted.sum()

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("moment_distance")
        moments, running_var, norms = ctx.saved_tensors
        offsets, layer_of_channel, layer_weights = ctx.layers
        if not _common.runs_triton(moments):
            distance = torch.stack((moments[0], moments[1] - running_var))  # (2, C)
            scale = grad * layer_weights / norms.masked_fill(norms == 0, torch.inf)  # (2, L)
            return distance.mul_(scale[:, layer_of_channel]), None, None, None

        dmoments = torch.empty_like(moments)
        n_layers = len(layer_weights)
        _moment_distance_bwd_kernel[(n_layers, 2)](
            dmoments,
            grad,
            norms,
            moments,
            running_var,
            layer_weights,
            offsets,
            moments.shape[1],
            n_layers,
            **_META,
        )
        return dmoments, None, None, None


def moment_distance(moments, running_var, sizes, weights=None):
    """Distance of the batch moments of all layers from their running statistics: R_feature.

    sum_l weights_l (||mean_l - running_mean_l||_2 + ||var_l - running_var_l||_2)

    Args:
        moments: (2, C) float32, contiguous: row 0 mean less running mean, row 1 biased variance, of
            one layer beside the other. torch.cat along dimension 1 makes it from the moments that
            `bn_act_moments` returns.
        running_var: (C,) float32, contiguous; a constant.
        sizes: the channels of each layer, a tuple of python integers >= 1 that add up to C.
        weights: of the layers, a tuple of python numbers as long as sizes. None: 1 each.

    Returns:
        (), float32.

    Raises:
        TypeError: a tensor argument is no tensor, or not of a float dtype; sizes or weights are no
            tuple.
        ValueError: shapes, sizes, weights or devices that do not fit; a tensor that is not float32
            or not contiguous.

    Note:
        Differentiable once, in moments. Where a norm is exactly 0 its gradient is 0, a subgradient.
        Repeated calls are bit-equal.

    Example:
        >>> moments = torch.tensor([[3.0, 4.0, 2.0], [1.0, 1.0, 6.0]])  # 2 channels, 1 channel
        >>> moment_distance(moments, torch.ones(3), (2, 1))  # (5 + 0) + (2 + 5)
        tensor(12.)
    """
    _common.check_float("moment_distance", moments=moments, running_var=running_var)
    for name, x in (("moments", moments), ("running_var", running_var)):
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"moment_distance: expected {name} contiguous in float32, "
                f"got {x.dtype} of strides {x.stride()}; convert it"
            )

    if not isinstance(sizes, tuple):
        got = type(sizes).__name__
        raise TypeError(f"moment_distance: expected sizes to be a tuple, got {got}; pass integers")
    C = sum(sizes)
    shapes = (tuple(moments.shape), tuple(running_var.shape))
    if shapes != ((2, C), (C,)) or min(sizes, default=0) < 1:
        raise ValueError(
            f"moment_distance: expected (2, C) and (C,), C the sum of {sizes}, got {shapes}; "
            "check sizes"
        )

    if weights is not None and not isinstance(weights, tuple):
        got = type(weights).__name__
        raise TypeError(
            f"moment_distance: expected weights to be a tuple, got {got}; pass one for each layer"
        )
    if weights is not None and len(weights) != len(sizes):
        raise ValueError(
            f"moment_distance: expected {len(sizes)} weights, got {weights}; "
            "pass one for each layer"
        )
    return _MomentDistance.apply(moments, running_var, sizes, weights)
