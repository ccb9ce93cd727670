"""fuse_batchnorm and hook_batchnorm: outputs, moment loss and image gradient are the plain ones."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_as_exact_as_eager

import kernels
from harness.networks import NETWORKS, ResNet

ANY_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d)


class Foreign(nn.Module):
    """What our own networks do not have: see the comments in forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.bn3 = nn.BatchNorm2d(6, eps=1e-2)
        self.act = nn.ReLU(inplace=True)
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.linear = nn.Linear(6, 5)
        self.bn4 = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x + F.relu(x)  # two layers read one BatchNorm, and the sum has no ReLU
        x = (self.bn2(self.conv2(x)) + self.shift).relu()  # an addition that broadcasts
        x = self.act(self.bn3(x) + x)
        x = self.act(x + self.bn3(x))  # the same layer again, on the right of the sum
        y = self.bn3(x)
        x = F.relu(y + y)  # an addition of one tensor to itself
        x = F.relu(torch.add(x, self.bn3(x), alpha=0.5))  # an addition that scales
        x = self.bn3(x).tanh()  # a method that is not relu
        x = self.bn3(x) + 1  # a number
        return self.bn4(self.linear(x.mean((2, 3))))


class Untraceable(nn.Module):
    """Its control flow depends on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        if x.mean() > 100:
            x = -x
        return self.linear(x.mean((2, 3)))


OTHERS = {
    "foreign": Foreign,
    "untraceable": Untraceable,
    # all layers of ResNet-34 and ResNet-50, with few channels
    "narrow34": partial(ResNet, (3, 4, 6, 3), (8, 16, 24, 32), "B"),
    "narrow50": partial(ResNet, (3, 4, 6, 3), (8, 16, 24, 32), "B", True, imagenet=True),
}


def make_network(name):
    """A frozen network whose BatchNorms have statistics that its inputs miss."""
    torch.manual_seed(0)
    make = OTHERS[name] if name in OTHERS else NETWORKS[name]
    network = make()
    for layer in network.modules():
        if isinstance(layer, ANY_BATCHNORM):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.3, 0.7)  # keeps deep residual networks in range
                nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def run_plainly(network, images):
    """Output, moment loss and image gradient, with hooks as everybody writes them."""
    losses = []

    def measure(layer, inputs):
        loss = kernels.bn_moment_loss_ref(inputs[0], layer.running_mean, layer.running_var)
        losses.append(loss)

    layers = [layer for layer in network.modules() if isinstance(layer, ANY_BATCHNORM)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    x = images.clone().requires_grad_()
    y = network(x)
    for hook in hooks:
        hook.remove()
    loss = sum(losses)
    (dx,) = torch.autograd.grad(y.square().mean() + loss, x)
    return y, loss, dx


def run(network, images):
    """The same of what fuse_batchnorm or hook_batchnorm returns."""
    x = images.clone().requires_grad_()
    y, found = network(x)
    moments = torch.cat([moments for moments, _ in found], 1)
    running_var = torch.cat([running_var for _, running_var in found])
    sizes = tuple(len(running_var) for _, running_var in found)
    loss = kernels.moment_distance(moments, running_var, sizes)
    (dx,) = torch.autograd.grad(y.square().mean() + loss, x)
    return y, loss, dx


def assert_same_as_plain(changed, network, x):
    got = run(changed, x)
    exact = run_plainly(copy.deepcopy(network).double(), x.double())
    eager = run_plainly(network, x)
    for name, *values in zip(("y", "loss", "dx"), got, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)


# What is replaced


def test_every_kind_of_addition_and_follower(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("foreign")
    fused = kernels.fuse_batchnorm(network)
    assert (fused.kind, fused.reason) == ("fused", "")
    assert not [layer for layer in fused.modules() if isinstance(layer, ANY_BATCHNORM)]
    assert_same_as_plain(fused, network, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "additions"),
    [
        ("resnet20", 0),
        ("wrn_16_1", 6),  # pre-activation blocks: no BatchNorm before the sum
        ("vgg11_bn", 0),
        ("resnet50", 0),
    ],
)
def test_every_pair_of_our_networks_is_fused(name, additions):
    fused = kernels.fuse_batchnorm(make_network(name))
    targets = [str(node.target) for node in fused.network.graph.nodes]
    assert len([target for target in targets if "relu" in target]) == 0
    assert len([target for target in targets if "add" in target]) == additions
    assert not [layer for layer in fused.modules() if isinstance(layer, nn.ReLU)]


@pytest.mark.parametrize("name", ["foreign", "untraceable"])
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_only_the_chosen_kinds_with_statistics_are_replaced(name, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network(name)
    without_statistics = nn.BatchNorm1d(5, track_running_stats=False).eval()
    network.linear = nn.Sequential(network.linear, without_statistics, nn.BatchNorm1d(5).eval())
    x = torch.randn(4, 3, 8, 8)

    fused = kernels.fuse_batchnorm(network, kinds=nn.BatchNorm2d)
    y, found = fused(x)
    assert {moments.shape[1] for moments, _ in found} == {6}
    assert [layer for layer in fused.modules() if isinstance(layer, nn.BatchNorm1d)]
    torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_traced_is_copied_with_a_warning(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("untraceable")
    with pytest.warns(UserWarning, match="fuse_batchnorm: .* without additions .*TraceError"):
        fused = kernels.fuse_batchnorm(network)
    assert fused.kind == "partly fused"
    assert isinstance(network.bn, nn.BatchNorm2d), "the original was changed"
    assert_same_as_plain(fused, network, torch.randn(4, 3, 8, 8))


def test_hooks_are_the_plain_way_to_the_same(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("foreign")
    x = torch.randn(4, 3, 8, 8)
    hooked = kernels.hook_batchnorm(network, moments=kernels.bn_moments_ref)
    _, found = hooked(x)
    _, expected = kernels.fuse_batchnorm(make_network("foreign"))(x)
    for (moments, running_var), (other, other_var) in zip(found, expected, strict=True):
        torch.testing.assert_close(moments, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(running_var, other_var)
    assert hooked.record.entries is None, "the autograd graph of a step is kept"

    hooked.close()
    assert not hooked(x)[1]
    assert_same_as_plain(kernels.hook_batchnorm(make_network("foreign")), network, x)


def test_weights_are_shared_and_no_autograd_graph_is_kept(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("resnet20")
    fused = kernels.fuse_batchnorm(network)
    addresses = {p.data_ptr() for p in network.parameters()}
    weights = [layer.weight for layer in fused.modules() if isinstance(layer, nn.Conv2d)]
    assert len(weights) == 19
    assert all(weight.data_ptr() in addresses for weight in weights)

    for _ in range(2):
        _, found = fused(torch.randn(2, 3, 32, 32, requires_grad=True))
        assert len(found) == 19
        assert fused.record.entries is None


@pytest.mark.parametrize("function", ["fuse_batchnorm", "hook_batchnorm"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        pytest.param(nn.Conv2d(3, 4, 3), "with running statistics, got none", id="no-batchnorm"),
        pytest.param(nn.BatchNorm2d(3), "in eval mode, got some in train mode", id="train-mode"),
        pytest.param(
            nn.BatchNorm2d(3, track_running_stats=False).eval(),
            "got none; take another",
            id="no-statistics",
        ),
    ],
)
def test_networks_that_are_refused(function, network, message):
    with pytest.raises(ValueError, match=f"{function}: .*{message}"):
        getattr(kernels, function)(network)


# Whole networks


@pytest.mark.parametrize("name", ["resnet20", "resnet34_cifar", "resnet50", "wrn_16_1", "vgg11_bn"])
def test_our_networks_on_cpu(name, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network(name)
    assert_same_as_plain(kernels.fuse_batchnorm(network), network, torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("foreign", 6),
        ("untraceable", 6),
        ("resnet20", 8),
        ("wrn_16_1", 8),
        ("narrow34", 8),
        ("narrow50", 32),
        # The interpreter would take 20 to 60 s for each of these.
        pytest.param("resnet34_cifar", 8, marks=pytest.mark.gpu),
        pytest.param("resnet50", 32, marks=pytest.mark.gpu),
        pytest.param("vgg11_bn", 32, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_networks_through_the_kernels(name, size, device):
    network = make_network(name).to(device)
    x = torch.randn(3, 3, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same_as_plain(kernels.fuse_batchnorm(network), network, x)
