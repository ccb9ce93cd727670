"""Distance of all layers' batch moments from their running statistics: a network's R_feature.

    loss = sum_l w_l d_l
    m    = mean - running_mean, v the variance, s = running_var of layer l: (C_l,) each

    form      d_l
    l2        ||m||_2 + ||v - s||_2
    relative  ||m||_2 / sqrt(sum_c s) + ||v - s||_2 / ||s||_2
    kl        mean_c KL(N(mean, v) || N(running_mean, s)), both variances with the layer's eps added
              = mean_c (m^2 / (s + eps) + t - ln(1 + t)) / 2,   t = (v - s) / (s + eps)

    form      gradient in m                         gradient in v
    l2        m / ||m||                             (v - s) / ||v - s||
    relative  m / (||m|| sqrt(sum_c s))             (v - s) / (||v - s|| ||s||)
    kl        m / (C_l (s + eps))                   (v - s) / (2 C_l (s + eps) (v + eps))
              times g w_l; 0 where a norm is 0

`l2` is Yin et al., "Dreaming to Distill", arXiv:1912.08795, eq. 4, where w_l = 1; the released
code has w_0 = 10 on ImageNet. The norms are not squared and not divided by C_l, as in the released
code. Their size depends on the network: a layer of large variances outweighs all others. `relative`
and `kl` have no unit, so that one weight of the loss serves many networks; both are ours.
The moments are those of `bn_act_moments`, one layer beside the other.

Traffic is next to nothing: a ResNet-50 has 26,560 channels, 0.3 MB. What counts is launches.
    eager  layer by layer about 8 forward and 12 backward, each for a few hundred numbers: 1,000 for
           the 53 layers of a ResNet-50, some 3 ms of launching for 20 us of work
    fused  2 forward (the distances, their sum), 1 backward
"""

import functools

import torch

from kernels import _common
from kernels._common import tl, triton

FORMS = "l2", "relative", "kl"


def moment_distance_ref(moments, running_var, sizes, weights=None, form="l2", eps=None):
    """The definition in plain PyTorch: see moment_distance. float64 stays float64."""
    if weights is None:
        weights = [1.0] * len(sizes)
    if eps is None:
        eps = [1e-5] * len(sizes)
    means = moments[0].split(sizes)
    variances = moments[1].split(sizes)
    stored = running_var.detach().split(sizes)

    terms = []
    for weight, m, v, s, layer_eps in zip(weights, means, variances, stored, eps, strict=True):
        if form == "kl":
            t = (v - s) / (s + layer_eps)
            distance = (m**2 / (s + layer_eps) + t - torch.log1p(t)).mean() / 2
        else:
            mean_distance = torch.linalg.vector_norm(m)  # gradient at 0: 0
            var_distance = torch.linalg.vector_norm(v - s)
            if form == "relative":
                mean_distance = mean_distance / s.sum().sqrt()
                var_distance = var_distance / torch.linalg.vector_norm(s)
            distance = mean_distance + var_distance
        terms.append(weight * distance)
    return torch.stack(terms).sum()


@triton.jit
def load_channels(
    moments_ptr,  # (2, C) fp32: mean - running_mean, variance
    running_var_ptr,  # (C,) fp32
    row,  # 0: mean, 1: variance
    offs,  # channels
    mask,
    n_channels,  # C, of all layers
):
    """Of each channel a moment, its distance from the stored one, and the running variance."""
    moment = tl.load(moments_ptr + row * n_channels + offs, mask=mask, other=0.0)
    stored = tl.load(running_var_ptr + offs, mask=mask, other=0.0)
    return moment, moment - tl.where(row == 1, stored, 0.0), stored


@triton.jit
def log1p(t):
    """ln(1 + t), exact also where 1 + t is rounded (Kahan): what rounding adds cancels."""
    rounded = 1.0 + t
    change = rounded - 1.0
    quotient = tl.log(rounded) / tl.where(change == 0.0, 1.0, change)
    return tl.where(change == 0.0, t, t * quotient)


@triton.jit
def _moment_distance_fwd_kernel(
    divisors_ptr,  # (2, L) fp32 out: what the slopes are divided by in the backward pass
    weighted_ptr,  # (2, L) fp32 out: the layers' distances times their weights
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    eps_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    FORM: tl.constexpr,  # one of FORMS
    BLOCK: tl.constexpr,  # channels at once
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin = tl.load(offsets_ptr + layer)
    end = tl.load(offsets_ptr + layer + 1)
    eps = tl.load(eps_ptr + layer)
    total = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)  # of the running variances, in the form relative
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        moment, distance, stored = load_channels(
            moments_ptr, running_var_ptr, row, offs, mask, n_channels
        )
        if FORM == "kl":
            unit = tl.where(mask, stored + eps, 1.0)
            t = distance / unit
            total += tl.where(row == 0, distance * t, t - log1p(t))
        else:
            total += distance * distance
        if FORM == "relative":
            size += tl.where(row == 0, stored, stored * stored)

    if FORM == "kl":
        divisor = (2 * (end - begin)).to(tl.float32)
        value = tl.sum(total, 0) / divisor
    else:
        value = tl.sqrt_rn(tl.sum(total, 0))
        divisor = value
        if FORM == "relative":
            unit = tl.sqrt_rn(tl.sum(size, 0))
            divisor = value * unit
            value = value / unit
    tl.store(divisors_ptr + row * n_layers + layer, divisor)
    tl.store(weighted_ptr + row * n_layers + layer, value * tl.load(weights_ptr + layer))


@triton.jit
def _moment_distance_bwd_kernel(
    dmoments_ptr,  # (2, C) fp32 out
    grad_ptr,  # (): gradient of the result
    divisors_ptr,  # (2, L) fp32
    moments_ptr,  # (2, C) fp32
    running_var_ptr,  # (C,) fp32
    weights_ptr,  # (L,) fp32
    eps_ptr,  # (L,) fp32
    offsets_ptr,  # (L + 1,) int64: where each layer begins
    n_channels,  # C, of all layers
    n_layers,  # L
    FORM: tl.constexpr,  # one of FORMS
    BLOCK: tl.constexpr,  # channels at once
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)  # 0: mean, 1: variance
    begin = tl.load(offsets_ptr + layer)
    end = tl.load(offsets_ptr + layer + 1)
    eps = tl.load(eps_ptr + layer)
    divisor = tl.load(divisors_ptr + row * n_layers + layer)
    grad = tl.load(grad_ptr).to(tl.float32) * tl.load(weights_ptr + layer)
    scale = tl.where(divisor == 0.0, 0.0, grad / tl.where(divisor == 0.0, 1.0, divisor))
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        moment, slope, stored = load_channels(
            moments_ptr, running_var_ptr, row, offs, mask, n_channels
        )
        if FORM == "kl":
            slope = slope / (stored + eps)
            slope = tl.where(row == 0, 2.0 * slope, slope / (moment + eps))
        tl.store(dmoments_ptr + row * n_channels + offs, slope * scale, mask=mask)


# A layer has 16 to 2048 channels: 1 to 4 blocks, 4 values a lane. Not yet measured on a GPU.
_META = {"BLOCK": 512, "num_warps": 4}


@functools.cache  # never dropped: a CUDA graph may read the tensors
def _describe_layers(sizes, weights, eps, device):
    """The layers' weights (L,), eps (L,), where each begins (L + 1,); each channel's layer (C,).

    The tensors are made once: a CUDA graph may not copy them from the host. They are made of python
    numbers, which torch.compile can follow.
    """
    layer_of_channel = []
    offsets = [0]
    for layer, size in enumerate(sizes):
        layer_of_channel += [layer] * size
        offsets.append(offsets[-1] + size)
    layer_weights = torch.ones(len(sizes))
    if weights is not None:
        layer_weights = torch.tensor(weights, dtype=torch.float32)
    layer_eps = torch.full((len(sizes),), 1e-5)
    if eps is not None:
        layer_eps = torch.tensor(eps, dtype=torch.float32)
    tensors = layer_weights, layer_eps, torch.tensor(offsets), torch.tensor(layer_of_channel)
    return tuple(tensor.to(device) for tensor in tensors)


def _forward_on_gpu(moments, running_var, layers, form):
    """(2, L) each: what the slopes are divided by, and the weighted distances."""
    layer_weights, layer_eps, offsets, _ = layers
    n_layers = len(layer_weights)
    divisors = torch.empty(2, n_layers, device=moments.device, dtype=torch.float32)
    weighted = torch.empty_like(divisors)
    with _common.on_device_of(moments):
        _moment_distance_fwd_kernel[(n_layers, 2)](
            divisors,
            weighted,
            moments,
            running_var,
            layer_weights,
            layer_eps,
            offsets,
            moments.shape[1],
            n_layers,
            FORM=form,
            **_META,
        )
    return divisors, weighted


def _forward_on_cpu(moments, running_var, layers, form):
    """As _forward_on_gpu, for all layers at once."""
    layer_weights, layer_eps, offsets, layer_of_channel = layers
    n_layers = len(layer_weights)

    def add_up(values):
        """(2, C) -> (2, L)."""
        return values.new_zeros(2, n_layers).index_add_(1, layer_of_channel, values)

    distance = torch.stack((moments[0], moments[1] - running_var))  # (2, C)
    if form == "kl":
        t = distance / (running_var + layer_eps[layer_of_channel])
        terms = torch.stack((distance[0] * t[0], t[1] - torch.log1p(t[1])))
        divisors = 2.0 * offsets.diff().expand(2, n_layers)
        values = add_up(terms) / divisors
    else:
        values = add_up(distance.square_()).sqrt_()
        divisors = values
        if form == "relative":
            units = add_up(torch.stack((running_var, running_var.square()))).sqrt_()
            divisors = values * units
            values = values / units
    return divisors, values * layer_weights


class _MomentDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, moments, running_var, sizes, weights, form, eps):
        ctx.form = form
        ctx.layers = _describe_layers(sizes, weights, eps, moments.device)
        measure = _forward_on_gpu if _common.runs_triton(moments) else _forward_on_cpu
        divisors, weighted = measure(moments, running_var, ctx.layers, form)
        ctx.save_for_backward(moments, running_var, divisors)
        return weighted.sum()

    @staticmethod
    def backward(ctx, grad):
        _common.refuse_double_backward("moment_distance")
        moments, running_var, divisors = ctx.saved_tensors
        layer_weights, layer_eps, offsets, layer_of_channel = ctx.layers
        if not _common.runs_triton(moments):
            slopes = torch.stack((moments[0], moments[1] - running_var))  # (2, C)
            if ctx.form == "kl":
                channel_eps = layer_eps[layer_of_channel]
                slopes /= running_var + channel_eps
                slopes[0] *= 2
                slopes[1] /= moments[1] + channel_eps
            scale = grad * layer_weights / divisors.masked_fill(divisors == 0, torch.inf)  # (2, L)
            return slopes.mul_(scale[:, layer_of_channel]), None, None, None, None, None

        dmoments = torch.empty_like(moments)
        n_layers = len(layer_weights)
        with _common.on_device_of(moments):
            _moment_distance_bwd_kernel[(n_layers, 2)](
                dmoments,
                grad,
                divisors,
                moments,
                running_var,
                layer_weights,
                layer_eps,
                offsets,
                moments.shape[1],
                n_layers,
                FORM=ctx.form,
                **_META,
            )
        return dmoments, None, None, None, None, None


def moment_distance(moments, running_var, sizes, weights=None, form="l2", eps=None):
    """Distance of the batch moments of all layers from their running statistics: R_feature.

    l2:        sum_l weights_l (||mean_l - running_mean_l||_2 + ||var_l - running_var_l||_2)
    relative:  the same, each norm divided by that of the training data: sqrt(sum running_var_l) for
               the mean, ||running_var_l||_2 for the variance
    kl:        sum_l weights_l mean_c KL(N(mean, var + eps) || N(running_mean, running_var + eps))

    Args:
        moments: (2, C) float32, contiguous: row 0 mean less running mean, row 1 biased variance, of
            one layer beside the other, as in the LayerMoments that a network of `fuse_batchnorm`
            returns.
        running_var: (C,) float32, contiguous; a constant. relative: not 0 in a whole layer.
        sizes: the channels of each layer, a tuple of python integers >= 1 that add up to C.
        weights: of the layers, a tuple of python numbers as long as sizes. None: 1 each.
        form: "l2", "relative" or "kl".
        eps: of kl, a tuple of python numbers > 0 as long as sizes: BatchNorm's own. Without it a
            channel that is nearly dead is the whole loss. None: 1e-5 each.

    Returns:
        (), float32.

    Raises:
        TypeError: a tensor argument is no tensor, or not of a float dtype; sizes, weights or eps
            are no tuple.
        ValueError: shapes, sizes, weights, eps, form or devices that do not fit; a tensor that is
            not float32 or not contiguous.

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

    for name, numbers in (("weights", weights), ("eps", eps)):
        if numbers is not None and not isinstance(numbers, tuple):
            got = type(numbers).__name__
            raise TypeError(
                f"moment_distance: expected {name} to be a tuple, got {got}; "
                "pass one for each layer"
            )
        if numbers is not None and len(numbers) != len(sizes):
            raise ValueError(
                f"moment_distance: expected {len(sizes)} {name}, got {numbers}; "
                "pass one for each layer"
            )
    if eps is not None and min(eps) <= 0:
        raise ValueError(f"moment_distance: expected eps > 0, got {eps}; pass BatchNorm's")
    if form not in FORMS:
        raise ValueError(
            f"moment_distance: expected form in {', '.join(FORMS)}, got {form!r}; choose one"
        )
    return _MomentDistance.apply(moments, running_var, sizes, weights, form, eps)
