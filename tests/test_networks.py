"""The classifiers by name: sizes, parameter names, activations."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from harness.networks import IMAGENET_NETWORKS, NETWORKS, ResBlock, compute_last_features

# Parameters with 3 channels, and 10 classes or ImageNet's 1000.
PARAMETERS = {
    "lenet5": 62_006,
    "lenet5_half": 15_888,
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "vgg11_bn": 9_231_114,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "mobilenet_v2_cifar": 591_178,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_published_number_of_parameters(name):
    num_classes = 1000 if name in IMAGENET_NETWORKS else 10
    with torch.device("meta"):
        network = NETWORKS[name](num_classes=num_classes, in_channels=3)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


class Head(nn.Module):
    """Its last linear layer runs only in training; `rows` images may be rows of the other."""

    def __init__(self, rows=1):
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(3, 5)
        self.auxiliary = nn.Linear(5, 5)

    def forward(self, x):
        x = x.mean((2, 3)).repeat(self.rows, 1)
        return self.linear(input=x)[: len(x) // self.rows]


def test_last_features_are_those_of_the_linear_layer_that_runs_last():
    batches = [torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)]
    features = compute_last_features(Head(), batches)
    assert [part.shape for part in features] == [(2, 3), (1, 3)]
    torch.testing.assert_close(features[0], batches[0].mean((2, 3)))
    assert compute_last_features(Head(rows=3), batches) is None  # crops of an image
    assert compute_last_features(nn.Flatten(), batches) is None


def list_torchvision_keys(blocks, n_convs):
    """The state dict's keys of torchvision's ResNet with so many blocks a stage, convs a block."""

    def list_batchnorm_keys(name):
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{name}.{part}" for part in parts}

    keys = {"conv1.weight", "fc.weight", "fc.bias"} | list_batchnorm_keys("bn1")
    for stage, n_blocks in enumerate(blocks, 1):
        for j in range(n_blocks):
            block = f"layer{stage}.{j}"
            for k in range(1, n_convs + 1):
                keys.add(f"{block}.conv{k}.weight")
                keys |= list_batchnorm_keys(f"{block}.bn{k}")
            changes_channels = stage > 1 or n_convs == 3
            if j == 0 and changes_channels:
                keys.add(f"{block}.downsample.0.weight")
                keys |= list_batchnorm_keys(f"{block}.downsample.1")
    return keys


@pytest.mark.parametrize(
    ("name", "blocks", "n_convs"),
    [
        ("resnet18", (2, 2, 2, 2), 2),
        ("resnet34", (3, 4, 6, 3), 2),
        ("resnet50", (3, 4, 6, 3), 3),
        ("resnet152", (3, 8, 36, 3), 3),
        ("resnet18_cifar", (2, 2, 2, 2), 2),
    ],
)
def test_resnets_have_torchvisions_parameter_names(name, blocks, n_convs):
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert set(network.state_dict()) == list_torchvision_keys(blocks, n_convs)


def test_an_option_a_shortcut_subsamples_and_appends_zero_channels():
    block = ResBlock(2, 6, stride=2, option="A", bottleneck=False).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.rand(3, 2, 8, 8)
    expected = torch.zeros(3, 6, 4, 4)
    expected[:, 2:4] = x[:, :, ::2, ::2]
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert {name for name, _ in block.named_children()} == {"conv1", "bn1", "conv2", "bn2"}


GROUPS = {
    "lenet5": [(6, 28, 28), (16, 10, 10)],
    "lenet5_half": [(3, 28, 28), (8, 10, 10)],
    "resnet20": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "resnet18_cifar": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
    "resnet50": [(256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)],
    "vgg11_bn": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    "wrn_16_1": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "wrn_40_2": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
}


@pytest.mark.parametrize("name", GROUPS)
@torch.no_grad()
def test_groups_are_the_stages_activations(name):
    network = NETWORKS[name](num_classes=7, in_channels=1)
    logits, groups = network.forward_groups(torch.zeros(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    assert [tuple(group.shape) for group in groups] == [(2, *shape) for shape in GROUPS[name]]


@pytest.mark.parametrize(
    ("name", "raw"),
    [("wrn_16_1", True), ("lenet5", False), ("resnet8", False), ("vgg11_bn", False)],
)
@torch.no_grad()
def test_only_wide_resnets_give_groups_from_before_the_relu(name, raw):
    network = NETWORKS[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    logits, groups = network.forward_groups(x)
    assert torch.equal(logits, network(x))
    assert logits.std() > 0
    for group in groups:
        has_negative = bool(group.min() < 0)
        assert has_negative == raw
        assert group.max() > 0


def test_a_wide_resnets_logits_come_from_its_last_group():
    network = NETWORKS["wrn_16_1"]().eval()
    logits, groups = network.forward_groups(torch.randn(2, 3, 32, 32))
    features = F.relu(network.bn(groups[-1])).mean((2, 3))  # (N, 64)
    assert torch.equal(logits, network.linear(features))
