"""The layers that `fuse_batchnorm` puts in place of a network's own."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import _common
from kernels.bn_act_moments import bn_act_moments_folded, fold_constants
from kernels.bn_moments import bn_moments
from kernels.pointwise_bn_act_moments import pointwise_bn_act_moments_folded


class FusedBatchNorm(nn.Module):
    """A frozen BatchNorm and the activation after it; it records the moments of each input.

    Args:
        bn: the BatchNorm.
        activation: of `bn_act_moments`.
        record: Record.
        place: a number that orders this layer's moments among the others'.
    """

    def __init__(self, bn, activation, record, place=0):
        super().__init__()
        weight = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight
        bias = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
        affine = fold_constants(weight, bias, bn.running_mean, bn.running_var, bn.eps)
        self.register_buffer("affine", affine)
        self.register_buffer("running_var", bn.running_var.detach())
        self.eps = bn.eps
        self.activation = activation
        self.record = record
        self.place = place
        self.n_uses = 1  # 2: forward returns its output twice, for two layers that read it

    def forward(self, input, residual=None):
        if residual is None or (residual.shape == input.shape and residual.dtype == input.dtype):
            y, part, *again = bn_act_moments_folded(
                input, self.affine, residual, self.activation, self.n_uses
            )
        else:  # an addition that broadcasts or converts
            y, part = bn_act_moments_folded(input, self.affine, None, "none")
            y = y + residual
            if self.activation != "none":
                y = getattr(F, self.activation)(y)
            again = [y] * (self.n_uses - 1)
        self.record.add(self.place, part, self.running_var, self.eps, is_part=True)
        return (y, *again) if again else y


class FusedPointwise(FusedBatchNorm):
    """A frozen 1 x 1 convolution, and the BatchNorm and activation after it.

    Args:
        conv: the convolution, of stride 1, one group, without padding and bias. The other
            arguments are those of FusedBatchNorm.
    """

    def __init__(self, conv, *args):
        super().__init__(*args)
        self.conv = conv

    def forward(self, input, residual=None):
        if not self.can_fuse(input, residual):
            return super().forward(self.conv(input), residual)
        y, part, *again = pointwise_bn_act_moments_folded(
            input, self.conv.weight, self.affine, residual, self.activation, self.n_uses
        )
        self.record.add(self.place, part, self.running_var, self.eps, is_part=True)
        return (y, *again) if again else y

    def can_fuse(self, input, residual):
        """Whether one kernel computes what the two layers would, in their dtype and layout.

        No kernel runs on a CPU. The kernel takes the weight as a constant and converts nothing.
        """
        weight = self.conv.weight
        if not _common.runs_triton(input) or not _is_channels_last(input):
            return False
        if input.dtype != weight.dtype or input.dtype not in _common.DTYPES:
            return False
        if weight.requires_grad and torch.is_grad_enabled():
            return False
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.get_autocast_dtype(device):
            return False
        if residual is None:
            return True
        shape = (len(input), len(weight), *input.shape[2:])
        return _is_channels_last(residual, shape) and residual.dtype == input.dtype


def _is_channels_last(x, shape=None):
    """Whether x is (N, C, H, W) in channels_last, and of a shape if one is given."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return shape is None or x.shape == shape


class FoldedStem(nn.Module):
    """A 7 x 7 convolution of stride 2 and padding 3 over images, on a CPU as one of 4 x 4.

        z_ij = sum_ab w_ab x_(2i+a-3, 2j+b-3)
             = sum_pq sum_rs w'_(2p+r, 2q+s) x_(2(i+p-2)+r, 2(j+q-2)+s),   w'_(a+1, b+1) = w_ab

    The four pixels (r, s) of a block become channels. With 3 input channels the input gradient
    takes five times as long as the forward pass, with 12 about as long as it. For 4 images of
    224 px in fp32, on one thread of a CPU with AVX-512, both passes take 0.57 of the plain time
    (32 of 56 ms). In bfloat16 they took 0.95 of it, so there the convolution runs as it is.
    """

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, input):
        if not self.can_fold(input):
            return self.conv(input)
        weight = F.pixel_unshuffle(F.pad(self.conv.weight, (1, 0, 1, 0)), 2)  # (C, 4 K, 4, 4)
        blocks = F.pad(F.pixel_unshuffle(input, 2), (2, 1, 2, 1))  # (N, 4 K, H / 2 + 3, W / 2 + 3)
        return F.conv2d(blocks, weight, self.conv.bias)

    def can_fold(self, input):
        """Whether the images (N, K, H, W) are in fp32 on a CPU and even in height and width."""
        if not input.is_cpu or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        return input.dim() == 4 and input.size(2) % 2 == 0 and input.size(3) % 2 == 0


class MeasuredBatchNorm(nn.Module):
    """A BatchNorm of a class of its own: it runs as it is, and the moments are measured apart."""

    def __init__(self, bn, record, place=0):
        super().__init__()
        self.bn = bn
        self.record = record
        self.place = place

    def forward(self, *args, **kwargs):
        moments = measure_input(self.bn, args, kwargs, bn_moments)
        self.record.add(self.place, moments, self.bn.running_var, self.bn.eps)
        return self.bn(*args, **kwargs)


def measure_input(bn, args, kwargs, moments):
    """Moments (2, C) of what a BatchNorm is called with: mean - running_mean, variance."""
    x = args[0] if args else next(iter(kwargs.values()))
    n_channels = len(bn.running_mean)
    if x.ndim < 2 or x.size(1) != n_channels:
        raise ValueError(
            f"fuse_batchnorm: expected a {type(bn).__name__} to get (N, {n_channels}, …), got "
            f"{tuple(x.shape)}; let it get its channels in dimension 1"
        )
    mean, var = moments(x, bn.running_mean)  # (C,), (C,)
    return torch.stack((mean - bn.running_mean, var))
