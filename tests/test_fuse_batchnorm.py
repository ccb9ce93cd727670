"""fuse_batchnorm and hook_batchnorm: outputs, moment loss and image gradient are the plain ones."""

import copy
import importlib
import itertools
import re
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from foreign_networks import NETWORKS as FOREIGN
from foreign_networks import (
    AssertsShape,
    Base,
    BoundMethod,
    ChangesItsInput,
    ChangesItsInputInPlace,
    HalfFrozen,
    InAList,
    InPlace,
    MobileActivations,
    OtherHardtanh,
    Outside,
    RareBranch,
    Scripted,
    Shortcut,
    TanhNorm,
)
from helpers import assert_as_exact_as_eager
from scripts import ROOT
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

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
    loss = kernels.moment_distance(found.moments, found.running_var, found.sizes)
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


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (MobileActivations, ["mul"] * 8),
        (InPlace, ["mul", "relu_"]),  # a factor stands between BatchNorm and ReLU
        (Shortcut, ["mul"]),
        (OtherHardtanh, ["hardtanh", "leaky_relu", "hardtanh"]),
    ],
)
def test_what_follows_a_batchnorm_is_fused_with_it(make, left):
    """Of additions, factors and activations only these are left."""
    graph = kernels.fuse_batchnorm(make_foreign(make)).network.graph
    names = [getattr(node.target, "__name__", node.target) for node in graph.nodes]
    rest = [name for name in names if not re.search("x|output|conv|linear|mean|fused", name)]
    assert rest == left


class Pointwise(nn.Module):
    """A bottleneck block, and 1 x 1 convolutions of which only the first two are fused."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.expand = nn.Conv2d(4, 6, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.others = nn.ModuleList(
            [
                nn.Conv2d(6, 6, 1),  # a bias
                nn.Conv2d(6, 6, 1, bias=False, groups=2),
                nn.Conv2d(6, 6, 1, bias=False, padding=1),
                nn.Conv2d(6, 6, 1, bias=False, stride=2),
                nn.Conv2d(6, 6, 1, bias=False),  # two layers read its output
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in self.others])

    def forward(self, x):
        y = F.relu6(self.bn1(self.reduce(x)))
        x = F.relu(self.bn2(self.expand(y)) + self.bn3(self.shortcut(x)))
        *others, (conv, norm) = zip(self.others, self.norms, strict=True)
        for other_conv, other_norm in others:
            x = F.relu(other_norm(other_conv(x)))
        z = conv(x)
        return norm(z) + z


TF32_SWITCHES = """
import sys

import torch

from kernels import _verify

backends = torch.backends
ops = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
if sys.argv[1] == "cudnn":
    backends.cudnn.fp32_precision = "tf32"
if sys.argv[1] == "all":
    backends.fp32_precision = "tf32"
before = [op.fp32_precision for op in ops]
with _verify._forbid_tf32():
    assert all(op.fp32_precision in ("none", "ieee") for op in ops)
    with backends.cudnn.flags(enabled=True):
        pass  # as in a network's own forward
assert [op.fp32_precision for op in ops] == before
"""


@pytest.mark.parametrize("switch", ["default", "cudnn", "all"])
def test_networks_are_compared_without_tf32(switch):
    """However it was allowed; the settings are then as they were. In a process of its own."""
    command = [sys.executable, "-c", TF32_SWITCHES, switch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("runs_kernels", [False, True], ids=["torch", "triton"])
def test_pointwise_convolutions_are_fused_where_nothing_else_happens(runs_kernels, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", runs_kernels)
    module = importlib.import_module("kernels._fused_layers")
    network = make_foreign(Pointwise)
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    fused = kernels.fuse_batchnorm(network, x)
    assert (fused.kind, fused.reason) == ("fused", "")
    layers = [layer for layer in fused.modules() if type(layer) is module.FusedPointwise]
    assert [layer.conv for layer in layers] == [network.reduce, network.expand]

    calls = []
    run = module.pointwise_bn_act_moments_folded

    def record(*args):
        calls.append(args[1])
        return run(*args)

    monkeypatch.setattr(module, "pointwise_bn_act_moments_folded", record)
    assert_same_as_plain(fused, network, x)
    assert len(calls) == (2 if runs_kernels else 0)


def test_a_pointwise_convolution_is_fused_only_in_its_own_dtype_and_layout(monkeypatch):
    """Under autocast a weight in fp32 is converted, which the kernel does not do."""
    monkeypatch.setattr("kernels._common.INTERPRET", True)
    fused = kernels.fuse_batchnorm(make_foreign(Pointwise))
    layer = next(layer for layer in fused.modules() if hasattr(layer, "can_fuse"))

    def make_images(*shape):
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    x = make_images(2, 3, 4, 4)
    residual = make_images(2, 4, 4, 4)
    assert layer.can_fuse(x, None)
    assert layer.can_fuse(x, residual)
    assert not layer.can_fuse(x.contiguous(), None)
    assert not layer.can_fuse(x, residual.contiguous())
    assert not layer.can_fuse(x, make_images(1, 4, 4, 4))
    assert not layer.can_fuse(x, residual.bfloat16())
    assert not layer.can_fuse(x.bfloat16(), None)
    assert not layer.can_fuse(x[0], None)
    layer.conv.double()
    assert not layer.can_fuse(x.double(), None)
    layer.conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer.can_fuse(x, None)
    layer.conv.requires_grad_()
    assert not layer.can_fuse(x, None)
    layer.conv.requires_grad_(False).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.can_fuse(x.bfloat16(), None)
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    assert not layer.can_fuse(x.bfloat16(), None)


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", HOOKS)
def test_a_convolution_with_a_hook_still_calls_it(register, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", True)
    network = make_foreign(Pointwise)
    calls = []

    def record(*args):
        calls.append(args)

    getattr(network.expand, register)(record)
    fused = kernels.fuse_batchnorm(network)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    fused(x)[0].sum().backward()
    assert len(calls) == 1


def test_a_convolution_with_a_forward_of_its_own_keeps_it(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_foreign(lambda: Stem(nn.Conv2d(3, 4, 7, 2, 3)))
    plain = network.conv.forward
    network.conv.forward = lambda x: 2 * plain(x)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(kernels.fuse_batchnorm(network)(x)[0], network(x))


class ChangesLater(nn.Module):
    """The convolution's input changes between the convolution and what follows its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        h = x + 1
        z = self.bn(self.conv(h))
        h = F.relu_(h)
        return torch.relu(z + h)


def test_a_convolution_runs_before_its_input_changes(monkeypatch):
    """Without gradients: with them the network itself fails."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_foreign(ChangesLater)
    x = torch.randn(2, 3, 4, 4) - 1
    with torch.no_grad():
        torch.testing.assert_close(kernels.fuse_batchnorm(network)(x)[0], network(x))


class FlattenedHead(nn.Module):
    """It relies on the layout of what a 1 x 1 convolution returns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))).view(x.size(0), -1)


class InPlaceLater(nn.Module):
    """An activation in place that no op fuses, as in Darknet's blocks."""

    def __init__(self, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize("runs_kernels", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(FlattenedHead, torch.contiguous_format, id="view-of-the-output"),
        pytest.param(partial(InPlaceLater, 1), torch.channels_last, id="in-place-1x1"),
        pytest.param(partial(InPlaceLater, 3), torch.channels_last, id="in-place-3x3"),
    ],
)
def test_outputs_serve_as_those_of_the_plain_layers(make, layout, runs_kernels, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", runs_kernels)
    network = make_foreign(make)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=layout)
    fused = kernels.fuse_batchnorm(network, x)
    assert (fused.kind, fused.reason) == ("fused", "")
    assert_same_as_plain(fused, network, x)


def test_hooks_see_statistics_that_training_changed(monkeypatch):
    """Training changes them without a sign that autograd would see."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_foreign(partial(InPlaceLater, 1))
    x = torch.randn(2, 3, 4, 4)
    hooked = kernels.hook_batchnorm(network)
    hooked(x)
    network.train()
    network(5 * x)
    network.eval()
    assert torch.equal(hooked(x)[1].running_var, network.bn.running_var)


def test_a_copy_sees_the_statistics_that_it_loads(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    fused = kernels.fuse_batchnorm(make_foreign(partial(InPlaceLater, 1)))
    x = torch.randn(2, 3, 4, 4)
    fused(x)
    other = copy.deepcopy(fused)
    other(x)
    state = other.state_dict()
    for name in state:
        if name.endswith("running_var"):
            state[name] = 3 * state[name]
    for _ in range(3):
        other.load_state_dict(state)
        assert torch.equal(other(x)[1].running_var, 3 * fused(x)[1].running_var)


@pytest.mark.parametrize("watch", [kernels.fuse_batchnorm, kernels.hook_batchnorm])
def test_a_network_made_in_inference_mode_is_measured(watch, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    x = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        network = make_foreign(partial(InPlaceLater, 1))
        _, found = watch(network)(x)
        assert torch.equal(found.running_var, network.bn.running_var)


class Stem(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


STEMS = {  # (convolution, whether it is folded)
    "plain": (partial(nn.Conv2d, 3, 4, 7, 2, 3, bias=False), True),
    "bias-of-one-channel": (partial(nn.Conv2d, 1, 4, 7, 2, 3), True),
    "dilated": (partial(nn.Conv2d, 3, 4, 7, 2, 3, dilation=2), False),
    "reflecting": (partial(nn.Conv2d, 3, 4, 7, 2, 3, padding_mode="reflect"), False),
    "stride-1": (partial(nn.Conv2d, 3, 4, 7, 1, 3), False),
    "padding-2": (partial(nn.Conv2d, 3, 4, 7, 2, 2), False),
    "5x5": (partial(nn.Conv2d, 3, 4, 5, 2, 3), False),
    "many-channels": (partial(nn.Conv2d, 5, 4, 7, 2, 3), False),
}


@pytest.mark.parametrize(("make", "is_folded"), STEMS.values(), ids=STEMS)
@pytest.mark.parametrize("size", [(16, 10), (17, 10), (16, 9)], ids=str)
def test_a_stem_is_folded_where_that_is_the_same(make, is_folded, size, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_foreign(lambda: Stem(make()))
    x = torch.randn(3, network.conv.in_channels, *size)
    fused = kernels.fuse_batchnorm(network, x)
    assert (fused.kind, fused.reason) == ("fused", "")
    stems = [layer for layer in fused.modules() if hasattr(layer, "can_fold")]
    assert len(stems) == is_folded
    for stem in stems:
        assert stem.can_fold(x) == (size == (16, 10))
        assert not stem.can_fold(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not stem.can_fold(x)
    assert_same_as_plain(fused, network, x)
    network.conv.weight.data.mul_(2)  # the weights are shared
    assert_same_as_plain(fused, network, x)


class TwoReaders(nn.Module):
    """What the first layers return is read twice, by an addition in place or by a sum."""

    def __init__(self, in_place):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        y = F.silu(self.bn(self.conv(x)))
        if self.in_place:
            return self.branch(y) + y.add_(1)
        return self.branch(y) * y


@pytest.mark.parametrize("in_place", [False, True], ids=["out-of-place", "in-place"])
def test_an_output_that_two_layers_read_is_returned_twice(in_place, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = TwoReaders(in_place).eval()
    fused = kernels.fuse_batchnorm(network, torch.randn(2, 3, 8, 8) if not in_place else None)
    layers = [layer for layer in fused.modules() if hasattr(layer, "n_uses")]
    assert [layer.n_uses for layer in layers] == [1 if in_place else 2]

    resnet = kernels.fuse_batchnorm(NETWORKS["resnet18"](num_classes=10).eval())
    n_uses = [layer.n_uses for layer in resnet.modules() if hasattr(layer, "n_uses")]
    assert n_uses.count(2) == 7  # the outputs of eight blocks but the last; before, a max-pool


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
    assert set(found.sizes) == {6}
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
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.running_var, expected.running_var)
    assert found.sizes == expected.sizes
    assert hooked.record.entries is None, "the autograd graph of a step is kept"

    hooked.close()
    assert hooked(x)[1].sizes == ()
    assert_same_as_plain(kernels.hook_batchnorm(make_network("foreign")), network, x)


@pytest.mark.parametrize("watch", [kernels.fuse_batchnorm, kernels.hook_batchnorm])
def test_eps_is_that_of_the_layers_as_they_run(watch, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm2d(3, eps=1e-3)
            self.first = nn.BatchNorm2d(3, eps=0.1)

        def forward(self, x):
            return self.last(self.first(x)).mean((2, 3))

    watched = watch(Backwards().eval())
    _, found = watched(torch.randn(2, 3, 4, 4))
    assert found.eps == (0.1, 1e-3)


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
        assert len(found.sizes) == 19
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


# The network itself, whatever its code does


def make_foreign(make):
    """A frozen network in which each BatchNorm has statistics and weights of its own."""
    torch.manual_seed(1)
    network = make()
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.3, 0.7)
                nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def differentiate(y, layers, x):
    """Image gradient of a loss of the output and of all moments (mean - running_mean, variance)."""
    outputs = y.values() if isinstance(y, dict) else [y]
    loss = sum(output.square().mean() for output in outputs)
    for number, (moments, running_var) in enumerate(layers):
        loss = loss + (number + 1) * (moments[0].norm() + (moments[1] - running_var).norm())
    return torch.autograd.grad(loss, x)[0]


def watch_by_hand(network, x):
    """Outputs, moments and image gradient of three passes, with hooks as everybody writes them."""
    found = []

    def measure(layer, args, kwargs):
        value = args[0] if args else kwargs["input"]
        rows = value.float().transpose(0, 1).flatten(1)  # (C, N H W)
        moments = rows.mean(1) - layer.running_mean, rows.var(1, unbiased=False)
        if is_forward:  # and not a checkpoint's second forward pass
            found.append((moments, layer.running_var))

    hooks = []
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            hooks.append(layer.register_forward_pre_hook(measure, with_kwargs=True))
    results = []
    for _ in range(3):
        found.clear()
        leaf = x.clone().requires_grad_()
        is_forward = True
        y = network(leaf * 1)
        is_forward = False
        results.append((y, list(found), differentiate(y, found, leaf)))
    for hook in hooks:
        hook.remove()
    return results


def run_watched(watched, x):
    """The same three passes of what fuse_batchnorm returns."""
    results = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        y, found = watched(leaf * 1)
        layers = list(found)
        results.append((y, layers, differentiate(y, layers, leaf)))
    return results


def read_state(network):
    """All that code in forward may change, and where hooks lie."""
    state = {"random": torch.random.get_rng_state()}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)):
                value = copy.copy(value)
            state[name, key] = value
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        state["value", name] = tensor.clone()
        state["gradient", name] = tensor.grad, tensor.requires_grad
    return state


def assert_same_state(network, before):
    after = read_state(network)
    assert list(after) == list(before)
    for name, value in before.items():
        if torch.is_tensor(value):
            assert torch.equal(after[name], value), name
        else:
            assert after[name] == value, name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(AssertsShape, "without additions and activations, .*TraceError", id="copy"),
        pytest.param(BoundMethod, "by hooks, .*of 2 BatchNorms it measures 1", id="hooks"),
        pytest.param(RareBranch, "torch.fx takes random numbers for constants", id="random"),
        pytest.param(Outside, r"^batch normalisations outside .* \(1\) are unseen", id="outside"),
        pytest.param(HalfFrozen, r"^batch normalisations outside .* \(1\) are unseen", id="frozen"),
        pytest.param(InAList, r"normalisations outside .* \(1\) are unseen", id="list"),
        pytest.param(Scripted, r"^batch normalisations outside .* \(1\) are unseen", id="script"),
        pytest.param(
            ChangesItsInput,
            r"change their input \(1 ScaledNorm\) are measured before that",
            id="changed-input",
        ),
        pytest.param(
            ChangesItsInputInPlace,
            r"change their input \(1 InPlaceNorm\) are measured before that",
            id="changed-input-in-place",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_the_reason_says_what_is_not_fused(make, reason, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    watched = kernels.fuse_batchnorm(make_foreign(make), torch.randn(4, 3, 8, 8))
    assert re.search(reason, watched.reason)
    assert "\n" not in watched.reason
    watched.close()


@pytest.mark.parametrize(("make", "kind"), FOREIGN)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_foreign_network_is_measured_as_it_is(make, kind, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    x = torch.randn(4, 3, 8, 8)
    network = make_foreign(make)
    torch.manual_seed(2)
    expected = watch_by_hand(network, x)

    network = make_foreign(make)
    torch.manual_seed(2)
    before = read_state(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = kernels.fuse_batchnorm(network, x)
    watched.close()
    assert_same_state(network, before)
    assert watched.kind == kind, watched.reason
    lines = [str(warning.message) for warning in caught if "fuse_batchnorm" in str(warning.message)]
    assert lines == [f"fuse_batchnorm: {watched.reason}"] * bool(watched.reason)
    assert bool(watched.reason) == (kind != "fused" or make in (Outside, Scripted))

    if kind == "hooks":
        watched = kernels.hook_batchnorm(network, moments=watched.moments)
    torch.manual_seed(2)
    passes = run_watched(watched, x)
    for (y, found, gradient), (expected_y, expected_found, expected_gradient) in zip(
        passes, expected, strict=True
    ):
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
        assert len(found) == len(expected_found)
        for (moments, var), (expected_moments, expected_var) in zip(
            found, expected_found, strict=True
        ):
            assert torch.equal(var, expected_var)
            expected_moments = torch.stack(expected_moments)
            torch.testing.assert_close(moments, expected_moments, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


class Counted(Base):
    """Counts its forward passes, and the backward passes that reach its images."""

    n_forward = 0
    n_backward = 0

    def forward(self, x):
        Counted.n_forward += 1
        if x.requires_grad:
            x.register_hook(self.count_backward)
        return super().forward(x)

    def count_backward(self, gradient):
        Counted.n_backward += 1


def test_the_check_costs_two_backward_passes(monkeypatch):
    """With the three forward passes that are not differentiated, less than two steps."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    monkeypatch.setattr(Counted, "n_forward", 0)
    monkeypatch.setattr(Counted, "n_backward", 0)
    network = make_foreign(Counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = kernels.fuse_batchnorm(network, torch.randn(2, 3, 8, 8))
    assert watched.kind == "partly fused"  # a copy, which calls forward as the network does
    assert Counted.n_forward == 6  # one of them by torch.fx
    assert Counted.n_backward == 2


class Reentrant(Base):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


class ChannelsLastNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Rearranged(Base):
    """Its BatchNorm gets (N, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.bn1 = ChannelsLastNorm(6)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class NotCalled(Base):
    def forward(self, x):
        return self.linear(x.mean((2, 3)).repeat(1, 2))


class Failing(Base):
    def forward(self, x):
        raise KeyError("no such image")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(Reentrant, ValueError, "pass use_reentrant=False", id="reentrant"),
        pytest.param(
            Rearranged,
            ValueError,
            r"expected a ChannelsLastNorm to get \(N, 6, …\), got \(4, 8, 8, 6\)",
            id="rearranged",
        ),
        pytest.param(NotCalled, ValueError, "got 2 that do not run", id="not-called"),
        pytest.param(Failing, KeyError, "no such image", id="own-error"),
    ],
)
def test_networks_that_fail_with_the_example(make, error, message, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_foreign(make)
    x = torch.randn(4, 3, 8, 8)
    before = read_state(network)
    with pytest.raises(error, match=message):
        kernels.fuse_batchnorm(network, x)
    assert_same_state(network, before)


def test_hooks_refuse_reentrant_checkpoints_at_the_first_call(monkeypatch):
    """Their layers run without gradients, and so would the loss of the moments."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    hooked = kernels.hook_batchnorm(make_foreign(Reentrant))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs"):
        hooked(x)  # where nothing has a gradient, nothing is wrong
    message = "hook_batchnorm: expected a network .* got reentrant .*; pass use_reentrant=False"
    with pytest.raises(ValueError, match=message):
        hooked(x.requires_grad_())


def test_state_that_the_second_pass_alone_shows(monkeypatch):
    """An iterator is no counter that one could compare: torch.fx takes its first value for all."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)

    class Alternates(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.signs = itertools.cycle((1.0, -1.0))

        def forward(self, x):
            return self.bn(x * next(self.signs)).mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = kernels.fuse_batchnorm(Alternates().eval(), torch.randn(4, 3, 5, 5))
    assert watched.kind == "hooks"


def test_an_example_is_a_tensor():
    with pytest.raises(TypeError, match="expected example to be a tensor, got type; pass images"):
        kernels.fuse_batchnorm(make_foreign(Base), nn.BatchNorm2d)


# The moments of all layers side by side


class ThreeNorms(nn.Module):
    """Three layers in an order that a caller chooses; the second is of a class of its own."""

    def __init__(self):
        super().__init__()
        norms = [nn.BatchNorm2d(4), TanhNorm(4), nn.BatchNorm2d(4)]
        self.norms = nn.ModuleList(norms)
        for layer in self.norms:
            nn.init.uniform_(layer.running_var, 0.5, 2)
        self.order = 0, 1, 2

    def forward(self, x):
        for number in self.order:
            x = torch.tanh(self.norms[number](x))
        return x.mean((2, 3))


@pytest.mark.parametrize("function", ["fuse_batchnorm", "hook_batchnorm"])
def test_moments_come_layer_by_layer_too(function, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("resnet8")
    _, found = getattr(kernels, function)(network)(torch.randn(2, 3, 8, 8))
    layers = [layer for layer in network.modules() if isinstance(layer, ANY_BATCHNORM)]
    assert len(found) == len(found.sizes) == len(layers)
    assert [moments.shape for moments, _ in found] == [(2, size) for size in found.sizes]
    pairs = list(found)
    for place in (0, -1):
        for part, other in zip(found[place], pairs[place], strict=True):
            assert torch.equal(part, other)
    assert torch.equal(torch.cat([moments for moments, _ in found], 1), found.moments)
    assert torch.equal(torch.cat([running_var for _, running_var in found]), found.running_var)


class UntraceableNorms(ThreeNorms):
    def forward(self, x):
        if x.mean() > 100:
            return x
        return super().forward(x)


def join_running_vars(network, order):
    return torch.cat([network.norms[number].running_var for number in order])


@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_fused_and_measured_layers_keep_their_order(device):
    network = ThreeNorms().eval().to(device)
    x = torch.randn(3, 4, 5, 5, device=device)
    fused = kernels.fuse_batchnorm(network)
    assert fused.kind == "partly fused"
    _, found = fused(x)
    _, expected = kernels.hook_batchnorm(network, moments=kernels.bn_moments_ref)(x)
    assert torch.equal(found.running_var, join_running_vars(network, (0, 1, 2)))
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", ["fuse_batchnorm", "hook_batchnorm"])
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_running_variances_are_those_of_the_layers_in_their_order(function, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = UntraceableNorms().eval()
    x = torch.randn(2, 4, 3, 3)
    watched = getattr(kernels, function)(network)
    for order in (2, 0, 1), (1, 1), (0, 1, 2):
        watched.network.order = order
        _, found = watched(x)
        assert torch.equal(found.running_var, join_running_vars(network, order))
        assert found.sizes == (4,) * len(order)


@pytest.mark.parametrize("function", ["fuse_batchnorm", "hook_batchnorm"])
@pytest.mark.filterwarnings("ignore:fuse_batchnorm")
def test_running_variances_are_joined_again_where_they_changed(function, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = ThreeNorms().eval()
    x = torch.randn(2, 4, 3, 3)
    watched = getattr(kernels, function)(network)
    before = watched(x)[1].running_var
    is_same = watched(x)[1].running_var is before  # a CUDA graph reads it; hooks join in each call
    assert is_same == (function == "fuse_batchnorm")
    network.norms[2].running_var.mul_(3)
    after = watched(x)[1].running_var
    assert torch.equal(after, before * torch.tensor([1.0, 1.0, 3.0]).repeat_interleave(4))


def test_a_call_in_inference_mode_leaves_later_ones_differentiable(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = make_network("resnet20")
    fused = kernels.fuse_batchnorm(network)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        fused(x)
    assert_same_as_plain(fused, network, x)


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
