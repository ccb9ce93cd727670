"""pruning.py, channels.py: tied channels, gates, removal, fine-tuning, files; what a run does."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import rows_of
from scripts import read_refusal

import channels as channels_part
import pruning
from channels import (
    can_remove,
    check_removal,
    count_removed,
    find_channels,
    find_kinds,
    mask_channels,
    remove_channels,
)
from harness.data import evaluate, load_dataset
from harness.known import NetworkInfo
from harness.load import load_teacher
from harness.networks import NETWORKS, ResNet, sample_example
from harness.sources import Lesson
from kernels import _common

DIGITS = replace(
    pruning.PRESETS["digits"],
    device="cpu",
    images="real",
    num_images=60,
    test_images=60,
    target=(0.1, 0.4),
    channels_per_removal=15,
    batches_per_removal=1,
    epochs=2,
    steps_per_epoch=2,
    batch_size=20,
)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes. Times are taken once."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(pruning, "TURNS", 1)


def run(out, **options):
    """Run the script with small digits settings; its result.json."""
    pruning.main(replace(DIGITS, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def load_test_images():
    """The real images that measure a run."""
    return tuple(part[: DIGITS.test_images] for part in load_dataset("digits", "", "test"))


def describe(n_channels=3, num_classes=10, image_size=32):
    mean = (0.5,) * n_channels
    return NetworkInfo("net", "net", "", num_classes, image_size, mean, mean, None)


def scatter_moments(network):
    """Give the BatchNorms of a network random moments and biases; the network, in eval mode."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def make_small_resnet():
    """Two stages of one block each, option B: streams of 4 and 8 channels."""
    return scatter_moments(ResNet((1, 1), (4, 8), "B"))


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# Tied channels


class Dense(nn.Module):
    """Concatenates what it has, as DenseNet does."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = torch.cat([x, F.relu(self.conv2(x))], 1)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation, with a sigmoid, which is not 0 at 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 10, 1)

    def forward(self, x):
        x = self.conv(x)
        scale = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(x * scale).mean((2, 3))


class Flat(nn.Module):
    """Flattens 4 x 4 pixels before its linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, 2, 1)
        self.hidden = nn.Linear(5 * 16, 7)
        self.fc = nn.Linear(7, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(torch.sigmoid(self.conv(x)), 4).contiguous()
        return self.fc(torch.sigmoid(self.hidden(x.view(x.size(0), -1))))


def make_network(name):
    for kind in (Dense, Excited, Flat):
        if name == kind.__name__:
            return kind()
    if name == "bottlenecks":
        return ResNet((2, 1), (4, 8), "B", bottleneck=True)
    return NETWORKS[name](num_classes=10, in_channels=3)


@pytest.mark.parametrize(
    "name",
    [
        *("lenet5", "resnet8", "resnet20", "resnet18_cifar", "vgg11_bn", "wrn_16_1", "wrn_16_2"),
        *("mobilenet_v2_cifar", "efficientnet_lite0", "bottlenecks", "Dense", "Excited", "Flat"),
    ],
)
def test_the_smaller_network_answers_as_the_masked_one_does(name):
    network = scatter_moments(make_network(name))
    info = describe()
    channels = find_channels(network, info)
    kept = torch.rand(channels.count) < 0.6
    channels_part.leave_one(channels, kept)
    smaller = remove_channels(network, channels, kept)
    masked = mask_channels(network, channels, kept)
    x = sample_example(info, "cpu")
    expected = masked(x)
    torch.testing.assert_close(smaller(x), expected, rtol=1e-4, atol=1e-5)
    assert (expected - network(x)).abs().max() > 1e-3  # the mask does something
    assert type(smaller) is type(network)
    n_left = count_parameters(network) - count_removed(network, channels, kept)
    assert count_parameters(smaller) == n_left < count_parameters(network)
    check_removal(network, channels, info)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lenet5", 6 + 16 + 120 + 84),
        ("resnet8", 16 + 32 + 64),  # the first convolution of each block; streams stay whole
        ("resnet20", 3 * (16 + 32 + 64)),
        ("resnet18_cifar", (1 + 2) * (64 + 128 + 256 + 512)),  # streams, and inner ones
        ("vgg11_bn", 64 + 128 + 2 * 256 + 4 * 512),
        ("wrn_16_1", 16 + 32 + 64 + 2 * (16 + 32 + 64)),
        ("Dense", 6 + 4),
        ("Excited", 6 + 3),
        ("Flat", 5 + 7),
    ],
)
def test_number_of_removable_channels(name, count):
    assert find_channels(make_network(name).eval(), describe()).count == count


def test_a_residual_stream_is_one_group():
    channels = find_channels(make_small_resnet(), describe())
    stream = channels.written["conv1"].tolist()
    assert len(set(stream)) == 4
    for name in ("bn1", "layer1.0.conv2", "layer1.0.bn2"):
        assert channels.written[name].tolist() == stream
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"):
        assert channels.read[name].tolist() == stream
    assert set(channels.written["layer1.0.conv1"].tolist()).isdisjoint(stream)
    assert channels.written["layer2.0.downsample.0"].tolist() == channels.read["fc"].tolist()
    assert channels.written["fc"].tolist() == [-1] * 10
    assert channels.read["conv1"].tolist() == [-1] * 3


def test_streams_with_zero_channels_appended_stay():
    channels = find_channels(NETWORKS["resnet8"]().eval(), describe())
    for name in ("conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"):
        assert (channels.written[name] == -1).all(), name
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"):
        assert (channels.written[name] >= 0).all(), name


def test_a_depthwise_convolution_has_the_channels_that_it_reads():
    channels = find_channels(make_network("mobilenet_v2_cifar").eval(), describe())
    block = "_blocks.1"
    expanded = channels.written[f"{block}._expand_conv"].tolist()
    assert channels.written[f"{block}._depthwise_conv"].tolist() == expanded
    assert channels.written[f"{block}._bn1"].tolist() == expanded
    assert channels.read[f"{block}._project_conv"].tolist() == expanded
    assert f"{block}._depthwise_conv" not in channels.read


def test_behind_a_flatten_all_pixels_of_a_channel_have_its_number():
    channels = find_channels(Flat().eval(), describe())
    numbers = channels.written["conv"]
    assert torch.equal(channels.read["hidden"], numbers.repeat_interleave(16))


def test_channels_of_the_same_layers_are_one_kind():
    channels = find_channels(make_small_resnet(), describe())
    sizes = [len(kind) for kind in find_kinds(channels)]
    assert sorted(sizes) == [4, 4, 8, 8]
    assert sorted(torch.cat(find_kinds(channels)).tolist()) == list(range(24))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.conv2(self.conv2(self.conv1(x))).mean((2, 3)))


class Softened(nn.Module):
    """A softmax over channels mixes them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.conv1(x).softmax(1).mean((2, 3)))


class Sized(Softened):
    """Its code holds the number of channels."""

    def forward(self, x):
        return self.fc(self.conv1(x).mean((2, 3)).view(-1, 4))


class Scaled(Softened):
    """A parameter of its own, one number a channel."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.fc((self.conv1(x) * self.gamma).mean((2, 3)))


class Mean(Softened):
    """A mean over channels reads them all."""

    def forward(self, x):
        x = self.conv1(x)
        return self.fc(x.mean((2, 3))) + x.mean((1, 2, 3)).unsqueeze(1)


class OneLayer(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


@pytest.mark.parametrize("kind", [Grouped, Twice, Softened, Sized, Scaled, Mean, OneLayer])
def test_a_network_with_nothing_to_prune_is_refused(kind, capsys):
    line = read_refusal(capsys, find_channels, kind().eval(), describe())
    assert "--teacher net: no channel of it can be removed; take another network" in line


class Standardized(nn.Conv2d):
    """Its weight loses the mean over what it reads, so that channels are no summands."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_a_network_that_answers_otherwise_is_refused(capsys):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Standardized(8, 8, 3), nn.ReLU())
    network = nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    channels = find_channels(network.eval(), describe())
    line = read_refusal(capsys, check_removal, network, channels, describe())
    assert "--teacher net cannot be made smaller: ValueError: without half of its channels" in line


# Gates


def measure_gates(network, names, n_channels, x, y):
    """dL/dg by autograd, of one gate a channel that multiplies what these BatchNorms return."""
    gates = torch.ones(n_channels, requires_grad=True)

    def multiply(layer, inputs, output):
        return output * gates.view(1, -1, 1, 1)

    hooks = [network.get_submodule(name).register_forward_hook(multiply) for name in names]
    F.cross_entropy(network(x), y).backward()
    for hook in hooks:
        hook.remove()
    return gates.grad


@pytest.mark.parametrize(
    "names",
    [
        ["layer1.0.bn1"],
        ["layer2.0.bn1"],
        ["bn1", "layer1.0.bn2"],  # a stream: all that write it have one gate
        ["layer2.0.bn2", "layer2.0.downsample.1"],
    ],
)
def test_derivatives_are_those_of_gates_after_batchnorm(names):
    network = make_small_resnet().requires_grad_(True)
    channels = find_channels(network, describe())
    x = torch.randn(6, 3, 32, 32)
    y = torch.arange(6)
    numbers = channels.written[names[0]]
    expected = measure_gates(network, names, len(numbers), x, y)
    network.zero_grad()
    F.cross_entropy(network(x), y).backward()
    found = pruning.differentiate_gates(network, channels)[numbers]
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_before_the_first_removal_importance_is_the_curvature_of_kl():
    """At P = Q: d²KL/dg² = sum_y P(y) (d log Q(y) / dg)², whose term of a drawn y is (dL/dg)²."""
    base, slope = torch.randn(2, 1, 5, dtype=torch.float64)
    log_p = base.log_softmax(1)

    def divergence(g):
        log_q = (base + (g - 1) * slope).log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum()

    curvature = torch.autograd.functional.hessian(divergence, torch.ones((), dtype=torch.float64))
    total = 0
    for y in range(5):
        g = torch.ones((), dtype=torch.float64, requires_grad=True)
        sure = torch.full((1, 5), -99.0, dtype=torch.float64)
        sure[0, y] = 99.0  # so that y is drawn
        loss = pruning.importance_loss(sure, base + (g - 1) * slope, 0, DIGITS)
        (derivative,) = torch.autograd.grad(loss, g)
        total += log_p[0, y].exp() * derivative.square()
    torch.testing.assert_close(total, curvature)


def test_after_the_first_removal_the_loss_is_kl():
    t_logits, s_logits = 3 * torch.randn(2, 6, 5)
    found = pruning.importance_loss(t_logits, s_logits, 1, DIGITS)
    log_p, log_q = t_logits.log_softmax(1), s_logits.log_softmax(1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, expected)


def test_importance_sums_squares_over_mini_batches(monkeypatch):
    derivatives = [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 0.0])]
    monkeypatch.setattr(pruning, "differentiate_gates", lambda *_: derivatives.pop(0))
    teacher, info = load_teacher(DIGITS, "cpu")
    images, _ = load_dataset("digits", "", "train")
    channels = channels_part.Channels(2, {}, {})
    args = replace(DIGITS, batches_per_removal=2)
    network = pruning.deepcopy(teacher).requires_grad_(True)
    lesson = Lesson(teacher, info, images, "none", None)
    found, loss = pruning.measure_importance(network, lesson, channels, 1, args)
    assert found.tolist() == [10.0, 4.0]
    assert loss == pytest.approx(0, abs=1e-5)  # KL of equal networks


def test_magnitude_is_a_mean_over_the_weights_that_write_a_channel():
    network = make_small_resnet()
    channels = find_channels(network, describe())
    found = pruning.measure_magnitude(network, channels)
    stem = network.conv1.weight[2]
    second = network.layer1[0].conv2.weight[2]
    expected = (stem.square().sum() + second.square().sum()) / (stem.numel() + second.numel())
    torch.testing.assert_close(found[channels.written["conv1"][2]], expected)
    inner = network.layer2[0].conv1.weight[5].square().mean()
    torch.testing.assert_close(found[channels.written["layer2.0.conv1"][5]], inner)


# Which channels go


class Tied(nn.Module):
    """Two convolutions of one weight, and a torch.cat by keywords."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat(tensors=[self.second(x), self.third(x)], dim=1)
        return self.last(x.mean((2, 3)))


def test_layers_that_share_a_weight_keep_their_channels():
    network = Tied().eval()
    pixels = NetworkInfo("net", "net", "", 10, 8, (0.5,) * 3, (0.5,) * 3, None)
    with pytest.raises(SystemExit):  # no channel is left: the first layer's enter the tied ones
        find_channels(network, pixels)
    network.third.weight = nn.Parameter(network.second.weight.detach().clone())
    assert find_channels(network, pixels).count == 12


class Keeper(nn.Module):
    """It keeps its features, with their graph."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4, 10)

    def forward(self, x):
        self.kept = self.conv(x)
        return self.last(self.kept.mean((2, 3)))


def test_a_network_that_keeps_its_features_is_measured():
    network = Keeper().eval()
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    info = NetworkInfo("net", "net", "", 10, 8, (0.5,) * 3, (0.5,) * 3, None)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    lesson = Lesson(network, info, images, "none", (images, torch.arange(4)))
    before, after = pruning.evaluate_twice(network, torch.randn(2, 3, 8, 8), lesson)
    assert before == after


def remove(scores, network, channels, target, per_removal):
    progress = pruning.begin_progress(channels, "cpu")
    args = replace(DIGITS, target=target, channels_per_removal=per_removal)
    share = pruning.remove_lowest(scores, progress, network, channels, args)
    return progress.kept, progress.choices, share


def test_the_lowest_go_first():
    network = make_small_resnet()
    channels = find_channels(network, describe())
    scores = torch.arange(channels.count).roll(7).float()
    kept, choices, share = remove(scores, network, channels, (0.9,), 3)
    assert sorted((~kept).nonzero().flatten().tolist()) == sorted(scores.argsort()[:3].tolist())
    assert not choices
    assert share == count_removed(network, channels, kept) / count_parameters(network)


def test_a_target_is_reached_with_the_channel_that_passes_it():
    network = make_small_resnet()
    channels = find_channels(network, describe())
    order = torch.randperm(channels.count)
    scores = order.argsort().float()
    _, choices, share = remove(scores, network, channels, (0.2, 0.3), 24)
    n_weights = count_parameters(network)
    for name, target in (("20", 0.2), ("30", 0.3)):
        kept = choices[name]
        assert count_removed(network, channels, kept) / n_weights >= target
        last = order[int((~kept).sum()) - 1]  # without it the target is not reached
        assert not kept[last]
        kept[last] = True
        assert count_removed(network, channels, kept) / n_weights < target
    assert 0.3 <= share < 0.4


def test_each_layer_keeps_a_channel():
    network = make_small_resnet()
    channels = find_channels(network, describe())
    scores = torch.ones(channels.count)
    kept, _, _ = remove(scores, network, channels, (0.99,), 1000)
    for name, numbers in channels.written.items():
        if (numbers >= 0).all():
            assert kept[numbers].sum() == 1, name
    assert not any(can_remove(channels, kept, number) for number in kept.nonzero())


def test_latency_goes_before_importance_where_its_weight_is_high(monkeypatch, tmp_path):
    monkeypatch.setattr(pruning, "measure_milliseconds", lambda networks, info: measured(networks))
    teacher, _ = load_teacher(DIGITS, "cpu")

    def measured(networks):
        assert count_parameters(networks[1]) < count_parameters(networks["whole"])
        if len(networks) == 4:  # whole, and a network for each of three kinds
            return {"whole": 10.0, 0: 10.0, 1: 2.0, 2: 11.0}
        return dict.fromkeys(networks, 1.0)

    monkeypatch.setattr(pruning, "count_flops", lambda *_: 1)
    table = tmp_path / "run/latency.json"
    with pytest.raises(KeyError):  # the fake knows no networks of the end
        run(tmp_path / "run", latency=1e6, target=(0.1,), epochs=0)
    assert json.loads(table.read_text()) == [0.0, 8.0 / 16, 0.0]
    kept = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["state"]["kept"]
    info = load_teacher(DIGITS, "cpu")[1]
    kinds = find_kinds(find_channels(teacher, info))
    assert kept[kinds[0]].all() and kept[kinds[2]].all() and not kept[kinds[1]].all()


# BatchNorm and fine-tuning


def test_reestimated_statistics_are_the_moments_of_the_batch():
    network = make_small_resnet()
    x = torch.randn(8, 3, 32, 32)
    seen = {}
    network.conv1.register_forward_hook(lambda layer, inputs, y: seen.update(y=y))
    momentum = network.bn1.momentum
    pruning.reestimate_batchnorm(network, x)
    y = seen["y"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(network.bn1.running_mean, y.mean(1))
    torch.testing.assert_close(network.bn1.running_var, y.var(1))
    assert network.bn1.momentum == momentum
    assert not any(layer.training for layer in network.modules())


@pytest.mark.parametrize(
    ("mode", "moves"), [("frozen", False), ("reestimated", False), ("batch", True)]
)
def test_statistics_move_in_train_mode_alone(mode, moves):
    teacher, info = load_teacher(DIGITS, "cpu")
    images, _ = load_dataset("digits", "", "train")
    network = pruning.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        network.fc.weight *= 0.5  # something to learn
    before = {name: x.clone() for name, x in network.state_dict().items()}
    args = replace(DIGITS, statistics=mode)
    optimizer = pruning.make_optimizer("adam", network, args.lr)
    lesson = Lesson(teacher, info, images, "none", None)
    pruning.train_epoch(network, lesson, optimizer, 0, args)
    for name, x in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(x, before[name]) != moves, name
        if name.endswith("conv1.weight"):
            assert not torch.equal(x, before[name]), name
    assert not any(layer.training for layer in network.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_flops_are_those_of_the_layers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(4, 10))
    expected = 2 * (30 * 30 * 4 * 3 * 9 + 4 * 10)
    assert pruning.count_flops(network, describe()) == expected


def test_networks_take_turns_and_the_median_counts(monkeypatch):
    calls = []

    class Noted(nn.Linear):
        def forward(self, x):
            calls.append(self.in_features)
            return x

    networks = {"a": Noted(1, 1), "b": Noted(2, 1)}
    found = pruning.measure_milliseconds(networks, describe())
    assert calls == [1, 2] * (pruning.TURNS + 1)
    assert set(found) == {"a", "b"} and min(found.values()) >= 0


# Options


@pytest.mark.parametrize("target", [(), (0.0,), (1.0,), (-0.5,), (25.0,), (0.5, float("nan"))])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match="--target: expected"):
        replace(DIGITS, target=target)


def test_targets_of_one_name_are_refused():
    with pytest.raises(ValueError, match="shares that differ when rounded to percents"):
        replace(DIGITS, target=(0.251, 0.25))


def test_a_target_out_of_reach_is_refused(tmp_path, capsys):
    line = read_refusal(capsys, run, tmp_path / "out", target=(0.2, 0.97))
    assert "--target 0.97: of digits-resnet8 at most 0.96" in line and line.endswith("pass less")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("constant", "value", "source"),
    [
        ("MOMENTUM", 0.9, "released code"),
    ],
)
def test_released_constants(constant, value, source):
    assert getattr(pruning, constant) == value, source


# Runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        patch.setattr(pruning, "TURNS", 1)
        run(folder)
    return folder


def test_a_run_writes_what_it_says(whole_run):
    result = json.loads((whole_run / "result.json").read_text())
    names = {path.name for path in whole_run.iterdir()}
    pictures = {"samples.png", "curve.png"}
    assert {"pruned-10.pt", "pruned-40.pt", "checkpoint.pt", *pictures} <= names
    for stage in pruning.STAGES:
        assert set(result[f"{stage}_accuracy"]) == {"10", "40"}
    assert result["teacher_accuracy"] > 95
    for field in ("parameters", "flops"):
        sizes = result[field]
        assert sizes["whole"] > sizes["10"] > sizes["40"], field
    assert set(result["milliseconds"]) == {"whole", "10", "40"}
    assert 0.59 < result["parameters"]["40"] / result["parameters"]["whole"] <= 0.6
    rows = rows_of(whole_run)
    removals = [row for row in rows if "removal" in row]
    assert [row["removal"] for row in removals] == list(range(1, len(removals) + 1))
    assert removals[-1]["weights"] <= 60 < removals[-2]["weights"]
    assert all(row["loss/importance"] > 0 for row in removals)
    epochs = [row for row in rows if "epoch" in row]
    assert [(row["epoch"], row["target"]) for row in epochs] == [(1, 10), (2, 10), (3, 40), (4, 40)]
    assert epochs[1]["eval/acc"] == pytest.approx(result["student_accuracy"]["10"], abs=1e-5)


def test_a_saved_network_is_the_one_that_was_measured(whole_run):
    network, info = pruning.load_pruned(whole_run / "pruned-40.pt")
    images, labels = load_test_images()
    result = json.loads((whole_run / "result.json").read_text())
    assert evaluate(network, images, labels, info) == result["student_accuracy"]["40"]
    assert count_parameters(network) == result["parameters"]["40"]
    assert network.layer3[0].conv1.out_channels == network.layer3[0].conv2.in_channels < 64


def test_fine_tuning_lowers_the_loss_and_fused_ops_learn_the_same(tmp_path):
    options = dict(target=(0.4,), steps_per_epoch=6, test_images=10, statistics="frozen")
    run(tmp_path / "fused", **options)
    run(tmp_path / "plain", **options, fused=False)
    fused = [row for row in rows_of(tmp_path / "fused") if "epoch" in row]
    plain = [row for row in rows_of(tmp_path / "plain") if "epoch" in row]
    assert fused[-1]["loss/kl"] < 0.8 * fused[0]["loss/kl"]
    assert plain[0]["loss/kl"] == pytest.approx(fused[0]["loss/kl"], rel=0.02)


def test_targets_do_not_depend_on_those_before_them(whole_run, tmp_path):
    run(tmp_path / "alone", target=(0.4,))
    first = torch.load(whole_run / "pruned-40.pt", weights_only=True)["state_dict"]
    second = torch.load(tmp_path / "alone/pruned-40.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("function", "calls"),
    [("score_channels", 2), ("train_epoch", 1), ("train_epoch", 2)],
)
def test_a_resumed_run_is_bit_equal(function, calls, whole_run, tmp_path, monkeypatch):
    original = getattr(pruning, function)
    done = []

    def stop_later(*arguments):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments)

    out = tmp_path / "cut"
    monkeypatch.setattr(pruning, function, stop_later)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    monkeypatch.setattr(pruning, function, original)
    resumed = run(out, resume=True)
    whole = json.loads((whole_run / "result.json").read_text())
    for field in (*(f"{stage}_accuracy" for stage in pruning.STAGES), "parameters", "flops"):
        assert resumed[field] == whole[field], field
    assert rows_of(out) == rows_of(whole_run)
    for name in ("10", "40"):
        first = torch.load(out / f"pruned-{name}.pt", weights_only=True)["state_dict"]
        second = torch.load(whole_run / f"pruned-{name}.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(first[key], second[key]) for key in second)


def test_a_continued_run_ranks_by_the_saved_milliseconds(tmp_path, monkeypatch):
    options = dict(latency=1.0, target=(0.2,), epochs=1)
    monkeypatch.setattr(pruning, "train_epoch", None)
    with pytest.raises(TypeError):
        run(tmp_path / "run", **options)
    monkeypatch.undo()
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(pruning, "TURNS", 1)
    table = (tmp_path / "run/latency.json").read_text()
    assert len(json.loads(table)) == 3
    run(tmp_path / "run", **options, resume=True)
    assert (tmp_path / "run/latency.json").read_text() == table


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_other_criteria_need_no_images_to_choose(criterion, tmp_path):
    result = run(tmp_path / "run", criterion=criterion, epochs=0, target=(0.3,), images="noise")
    assert 0.69 < result["parameters"]["30"] / result["parameters"]["whole"] <= 0.7
    assert all("loss/importance" not in row for row in rows_of(tmp_path / "run"))


def test_without_epochs_a_network_is_pruned_only(tmp_path):
    result = run(tmp_path / "run", epochs=0, target=(0.1,))
    assert result["student_accuracy"] == result["reestimated_accuracy"]
    result = run(tmp_path / "frozen", epochs=0, target=(0.1,), statistics="frozen")
    assert result["student_accuracy"] == result["pruned_accuracy"]
    assert result["pruned_accuracy"]["10"] > 50


def test_without_test_images_a_network_is_pruned_all_the_same(tmp_path):
    teacher = "digits-lenet5"
    result = run(tmp_path / "run", dataset="none", target=(0.5,), teacher=teacher, images="noise")
    assert result["student_accuracy"] == {"50": None}
    network, _ = pruning.load_pruned(tmp_path / "run/pruned-50.pt")
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


USERS_NETWORK = """
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8 * 8 * 8, num_classes)
        self.projection = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x):
        features = self.body(x).flatten(1)
        return {"logits": self.fc(features), "projection": self.projection(features)}
"""


def test_a_users_network_is_pruned_and_loaded_again(tmp_path, capsys):
    (tmp_path / "net.py").write_text(USERS_NETWORK)
    namespace = {}
    exec(USERS_NETWORK, namespace)
    torch.save(namespace["Net"](10).state_dict(), tmp_path / "w.pth")
    teacher = f"{tmp_path / 'net.py'}:Net"
    options = dict(teacher=teacher, weights=str(tmp_path / "w.pth"), mean=(0.3,), std=(0.3,))
    result = run(tmp_path / "run", **options, images="digits", dataset="digits", target=(0.5,))
    path = tmp_path / "run/pruned-50.pt"
    network, info = pruning.load_pruned(path, teacher)
    images, labels = load_test_images()
    assert evaluate(network, images, labels, info) == result["student_accuracy"]["50"]
    line = read_refusal(capsys, pruning.load_pruned, path)
    assert f"it would run {teacher}; pass that as factory if you trust it" in line


def test_a_file_of_something_else_is_no_pruned_network(tmp_path, capsys):
    torch.save({"format": 1}, tmp_path / "other.pt")
    line = read_refusal(capsys, pruning.load_pruned, tmp_path / "other.pt")
    assert "no file of pruning.py" in line and line.endswith("pass a pruned-….pt")
