"""fuse_batchnorm: outputs, moment loss and image gradient of fused networks are those of the networks with hooks."""

import copy
import doctest
import importlib
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_as_exact_as_eager

import deepinversion
import teacher
from kernels import _common, bn_moment_loss_ref, bn_moments_ref, fuse_batchnorm, hook_batchnorm

TERM = dict(first_bn=1.0, moments="l2", sync_moments=False, fused_distance=True, ema=0.0)
NARROW = (8, 16, 24, 32)
# The interpreter would take 20 to 60 s for each: the same layers as in the narrow ones, more channels.
WIDE = [("resnet34_cifar", 8), ("resnet50", 32), ("vgg11_bn", 32)]


class Foreign(nn.Module):
    """Additions that are no residual, a BatchNorm that two layers read, one that runs twice, 1-D, inplace, methods."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.bn3, self.act = nn.BatchNorm2d(6, eps=1e-2), nn.ReLU(inplace=True)
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.linear, self.bn4 = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x + F.relu(x)  # two users of one BatchNorm
        x = (self.bn2(self.conv2(x)) + self.shift).relu()  # broadcasts
        x = self.act(self.bn3(x) + x)
        x = self.act(x + self.bn3(x))  # the same layer again, on the right of the sum
        x = self.bn3(x) + 1
        return self.bn4(self.linear(x.mean((2, 3))))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.linear((x if x.mean() < 100 else -x).mean((2, 3)))


def network(name):
    """A frozen network whose BatchNorms have statistics that its inputs miss, and how many pairs it leaves apart."""
    torch.manual_seed(0)
    made = {
        "resnet20": deepinversion.NETWORKS["resnet20"],
        "resnet34_cifar": deepinversion.NETWORKS["resnet34_cifar"],
        "resnet50": deepinversion.NETWORKS["resnet50"],
        "narrow34": partial(deepinversion.ResNet, (3, 4, 6, 3), NARROW, "B"),
        "narrow50": partial(
            deepinversion.ResNet, (3, 4, 6, 3), NARROW, "B", bottleneck=True, imagenet=True
        ),
        "wrn_16_1": teacher.wrn_16_1,
        "vgg11_bn": teacher.vgg11_bn,
        "foreign": Foreign,
        "untraceable": Untraceable,
    }[name]()
    for m in made.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.3, 0.7)  # keeps deep residual networks in range
                nn.init.normal_(m.bias, 0, 0.3)
    return made.eval().requires_grad_(False)


def with_hooks(model, x):
    """Output, moment loss and image gradient as everybody writes them."""
    losses, x = [], x.clone().requires_grad_()

    def measure(m, inputs):
        losses.append(bn_moment_loss_ref(inputs[0], m.running_mean, m.running_var))

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_pre_hook(measure) for m in layers]
    y = model(x)
    for hook in hooks:
        hook.remove()
    loss = sum(losses)
    return y, loss, *torch.autograd.grad(y.square().mean() + loss, x)


def with_fusion(model, x):
    x = x.clone().requires_grad_()
    y, found = model(x)
    loss = deepinversion.moment_loss(found, TERM)
    return y, loss, *torch.autograd.grad(y.square().mean() + loss, x)


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet34_cifar", "resnet50", "wrn_16_1", "vgg11_bn", "foreign"]
)
def test_fused_networks_are_the_plain_ones(name, monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)
    model, x = network(name), torch.randn(4, 3, 32, 32)
    fused = fuse_batchnorm(model)
    assert fused.fully
    assert not [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    exact = with_hooks(copy.deepcopy(model).double(), x.double())
    for what, *triple in zip(
        ("y", "loss", "dx"), with_fusion(fused, x), exact, with_hooks(model, x), strict=True
    ):
        assert_as_exact_as_eager(*triple, name=what)


@pytest.mark.parametrize(
    ("name", "relus"), [("resnet20", 0), ("resnet50", 0), ("wrn_16_1", 0), ("vgg11_bn", 0)]
)
def test_every_pair_of_our_networks_is_fused(name, relus):
    fused = fuse_batchnorm(network(name))
    nodes = [
        n for n in fused.network.graph.nodes if "relu" in str(n.target) or "add" in str(n.target)
    ]
    additions = 6 if name == "wrn_16_1" else 0  # pre-activation: no BatchNorm before the sum
    assert len(nodes) == relus + additions
    assert not [m for m in fused.modules() if isinstance(m, nn.ReLU)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20", 8),
        ("narrow34", 8),
        ("narrow50", 32),
        ("wrn_16_1", 8),
        ("foreign", 6),
        ("untraceable", 6),
    ]
    + [pytest.param(*wide, marks=pytest.mark.gpu) for wide in WIDE],
)
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_through_the_interpreter_or_a_gpu(name, size, device):
    model, x = network(name).to(device), torch.randn(3, 3, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = with_hooks(copy.deepcopy(model).double(), x.double())
    got = with_fusion(fuse_batchnorm(model), x)
    for what, *triple in zip(("y", "loss", "dx"), got, exact, with_hooks(model, x), strict=True):
        assert_as_exact_as_eager(*triple, name=what)


def test_a_network_that_cannot_be_traced_says_so(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)
    model, x = network("untraceable"), torch.randn(4, 3, 8, 8)
    with pytest.warns(
        UserWarning, match="fuse_batchnorm: cannot trace .*; ReLUs and additions stay apart"
    ):
        fused = fuse_batchnorm(model)
    assert not fused.fully and isinstance(model.bn, nn.BatchNorm2d)  # the original is left as it is
    for a, b in zip(with_fusion(fused, x), with_hooks(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_are_shared_and_the_graph_of_a_step_is_not_kept(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)
    model = network("resnet20")
    fused = fuse_batchnorm(model)
    shared = {p.data_ptr() for p in model.parameters()}
    convs = [m.weight for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 19 and all(w.data_ptr() in shared for w in convs)
    fused(torch.randn(2, 3, 32, 32, requires_grad=True))
    assert not fused.found
    assert len(fused(torch.randn(2, 3, 32, 32))[1]) == 19


@pytest.mark.parametrize("name", ["foreign", "untraceable"])
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_only_the_chosen_kinds_with_statistics_count(name, monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)
    model, x = network(name), torch.randn(4, 3, 8, 8)
    head = nn.BatchNorm1d(5, track_running_stats=False).eval()
    model.linear = nn.Sequential(model.linear, head, nn.BatchNorm1d(5).eval())
    fused = fuse_batchnorm(model, nn.BatchNorm2d)
    y, found = fused(x)
    assert {moments.shape[1] for moments, _ in found} == {6}
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert [type(m) for m in fused.modules() if isinstance(m, nn.BatchNorm1d)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(nn.Conv2d(3, 4, 3), "with running statistics, got none", id="none"),
        pytest.param(nn.BatchNorm2d(3), "in eval mode, got some in train mode", id="train"),
        pytest.param(
            nn.BatchNorm2d(3, track_running_stats=False).eval(),
            "got none; take another",
            id="no-statistics",
        ),
    ],
)
def test_errors(model, message):
    for function in (fuse_batchnorm, hook_batchnorm):
        with pytest.raises(ValueError, match=f"{function.__name__}: .*{message}"):
            function(model)


def test_hooks_are_the_plain_way_to_the_same(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)
    model, x = network("foreign"), torch.randn(4, 3, 8, 8)
    hooked = hook_batchnorm(model, moments=bn_moments_ref)
    for a, b in zip(
        with_fusion(hooked, x), with_fusion(fuse_batchnorm(network("foreign")), x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not hooked.found and len(hooked(x)[1]) == 6
    hooked.close()
    assert not hooked(x)[1]


def test_examples():
    tested = doctest.testmod(importlib.import_module("kernels.fuse_batchnorm"))
    assert tested.attempted >= 4 and not tested.failed
