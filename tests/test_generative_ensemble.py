"""generative_ensemble.py: sizes, losses by hand, an ensemble against separate generators, runs."""

import doctest
import json
import math
import socket
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import n_parameters, rows_of
from scripts import read_refusal, start

import generative_ensemble as ge
import kernels
from harness.load import load_student, load_teacher
from harness.run import RunFolder, make_optimizer
from kernels import _common

FAST = dict(
    generators=5,
    steps=4,
    batch_size=20,
    width=4,
    latent=6,
    stages=2,
    epochs=2,
    iterations=2,
    student_batch=20,
    dataset="none",
)
DIGITS = replace(ge.PRESETS["digits"], device="cpu", **FAST)
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]  # the classes of five generators


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes."""
    monkeypatch.setattr(_common, "INTERPRET", False)


def run(out, **options):
    """Run the script with small digits settings; its result.json."""
    ge.main(replace(DIGITS, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def make_sizes(groups, latent=6, width=8, stages=2, channels=1, image_size=32):
    return ge.Sizes(groups, latent, width, stages, channels, image_size)


def make_ensemble(groups, **sizes):
    return ge.Ensemble(make_sizes(groups, **sizes)).initialise()


def load_digits_teacher():
    return load_teacher(DIGITS, "cpu")[0]


# The generators


class Generator(nn.Module):
    """One generator by the table of layers, out of PyTorch's modules; x: noise and label."""

    def __init__(self, n_inputs, widths, channels, side):
        super().__init__()
        self.shape = (widths[0], side, side)
        self.dense = nn.Linear(n_inputs, math.prod(self.shape), bias=False)
        self.bn0 = nn.BatchNorm2d(widths[0])
        self.convs = nn.ModuleList()
        self.bns = nn.ModuleList()
        before = widths[0]
        for width in widths:
            self.convs.append(nn.Conv2d(before, width, 3, 1, 1, bias=False))
            self.bns.append(nn.BatchNorm2d(width, 0.8))
            before = width
        self.last = nn.Conv2d(before, channels, 3, 1, 1)
        self.bn_last = nn.BatchNorm2d(channels, 0.8)
        self.bn_last.bias.requires_grad_(False)  # the released one has none

    def forward(self, x):
        x = F.leaky_relu(self.bn0(self.dense(x).view(-1, *self.shape)), 0.2)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = F.leaky_relu(bn(conv(x)), 0.2)
        return self.bn_last(self.last(x).tanh())


@torch.no_grad()
def separate(ensemble):
    """The generators of an ensemble as plain modules with copies of its weights."""
    sizes = ensemble.sizes
    G = len(sizes.groups)
    widths = [sizes.width // (i + 1) for i in range(sizes.stages)]
    side = sizes.image_size // 2**sizes.stages
    generators = []
    for g in range(G):
        one = Generator(ensemble.dense.shape[1], widths, sizes.channels, side)
        one.dense.weight.copy_(ensemble.dense[g].T)
        for conv, weight in zip(one.convs, ensemble.convs, strict=True):
            conv.weight.copy_(weight.chunk(G)[g])
        one.last.weight.copy_(ensemble.last.chunk(G)[g])
        one.last.bias.copy_(ensemble.bias.chunk(G)[g])
        one.bn_last.weight.copy_(ensemble.scale.chunk(G)[g])
        generators.append(one)
    return generators


def list_inputs(ensemble, z, place):
    """What enters each generator: noise beside the label, (n, latent + labels)."""
    onehot = F.one_hot(place, ensemble.classes.shape[1]).float()
    return torch.cat([z, onehot], 2).unbind(1)


@pytest.mark.parametrize(("latent", "n_classes"), [(100, 1), (100, 100), (256, 10)])
def test_a_generator_has_the_released_size(latent, n_classes):
    sizes = make_sizes([list(range(n_classes))], latent, 128, channels=3)
    assert n_parameters(ge.Ensemble(sizes)) == 223_558 + 8192 * (latent + n_classes)


def test_ten_generators_are_ten_times_one_and_five_stages_narrow_as_released():
    one = ge.Ensemble(make_sizes([[0]], 32, 16))
    ten = ge.Ensemble(make_sizes([[k] for k in range(10)], 32, 16))
    assert n_parameters(ten) == 10 * n_parameters(one)
    large = ge.Ensemble(make_sizes([[0]], 100, 128, 5, 3, 224))
    assert [weight.shape[0] for weight in large.convs] == [128, 64, 42, 32, 25]
    assert n_parameters(large) == pytest.approx(0.90e6, rel=0.01)


@pytest.mark.parametrize(("size", "stages"), [(8, 0), (16, 1), (28, 2), (32, 2), (64, 3), (224, 5)])
def test_stages_follow_from_the_image_size(size, stages):
    _, info = load_teacher(DIGITS, "cpu")
    args = ge.fit_sizes(replace(DIGITS, stages=0, generators=30), replace(info, image_size=size))
    assert (args.stages, args.generators) == (stages, 10)  # at most one generator a class
    ensemble = make_ensemble([[0, 1], [2]], width=10, stages=stages, channels=3, image_size=size)
    x, labels = ensemble(*ensemble.sample_inputs(2))
    assert x.shape == (4, 3, size, size) and labels.shape == (4,)
    assert x.isfinite().all() and x.std() > 0.01


@pytest.mark.parametrize(("stages", "width", "most"), [(6, 64, 5), (2 * 10**9, 64, 5), (4, 3, 3)])
def test_stages_that_do_not_fit_are_refused_at_once(capsys, stages, width, most):
    """At 32 pixels; 2 to the power of a large number would take memory and seconds."""
    teacher, info = load_teacher(DIGITS, "cpu")
    ge.check_fit(replace(DIGITS, stages=most, width=width), teacher, info, 1)
    args = replace(DIGITS, stages=stages, width=width)
    line = read_refusal(capsys, ge.check_fit, args, teacher, info, 1)
    assert f"--stages {stages}: 32 pixels and a width of {width} allow {most} at most;" in line


def test_epsilons_are_the_released_ones_and_images_are_scaled_but_not_shifted():
    ensemble = make_ensemble([[0], [1], [2]], channels=3)
    assert ensemble.bn0.eps == 1e-5
    assert [bn.eps for bn in (*ensemble.bns, ensemble.bn_last)] == [0.8, 0.8, 0.8]
    assert all(bn.momentum == 0.1 for bn in (ensemble.bn0, *ensemble.bns, ensemble.bn_last))
    assert ensemble.bn0.affine and not ensemble.bn_last.affine
    z, place = ensemble.sample_inputs(6)
    factors = torch.arange(1.0, 10.0)
    with torch.no_grad():
        ensemble.bias.normal_()
        x = ensemble(z, place)[0].unflatten(0, (6, 3))  # (n, G, C, H, W)
        ensemble.scale.copy_(factors)
        scaled = ensemble(z, place)[0].unflatten(0, (6, 3))
    assert torch.allclose(x.mean((0, 3, 4)), torch.zeros(3, 3), atol=1e-4)
    assert torch.allclose(scaled, x * factors.view(3, 3, 1, 1), rtol=1e-4, atol=1e-5)


def test_initial_weights_are_xaviers_of_one_generator():
    ensemble = make_ensemble([[k] for k in range(10)], latent=31, width=16)
    fans = [(ensemble.dense, 32 + 16 * 64), (ensemble.last, 9 * 9)]
    fans += [(ensemble.convs[0], 9 * 32), (ensemble.convs[1], 9 * 24)]
    for weight, fan in fans:
        limit = math.sqrt(6 / fan)
        assert 0.9 * limit < weight.abs().max() <= limit
    assert not ensemble.bias.any()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_an_ensemble_is_its_generators(stages):
    """Images, gradients of all kinds of weights, running moments; labels of the own classes."""
    groups = [[3, 1, 4], [5, 9], [2, 6]]
    ensemble = make_ensemble(groups, stages=stages, channels=3)
    generators = separate(ensemble)
    z, place = ensemble.sample_inputs(4)
    x, labels = ensemble(z, place)
    x = x.unflatten(0, (4, 3))
    cotangent = torch.randn_like(x)
    (x * cotangent).sum().backward()

    expected = [[groups[g][place[i, g]] for g in range(3)] for i in range(4)]
    assert labels.view(4, 3).tolist() == expected
    for g, inputs in enumerate(list_inputs(ensemble, z, place)):
        one = generators[g]
        y = one(inputs)
        assert torch.allclose(x[:, g], y, atol=1e-5)
        (y * cotangent[:, g]).sum().backward()
        pairs = [(ensemble.dense.grad[g].T, one.dense.weight.grad)]
        pairs.append((ensemble.convs[0].grad.chunk(3)[g], one.convs[0].weight.grad))
        pairs.append((ensemble.last.grad.chunk(3)[g], one.last.weight.grad))
        pairs.append((ensemble.scale.grad.chunk(3)[g], one.bn_last.weight.grad))
        for ours, its in pairs:
            assert torch.allclose(ours, its, atol=1e-3)
        running_var = ensemble.bn0.running_var.chunk(3)[g]
        assert torch.allclose(running_var, one.bn0.running_var, atol=1e-5)


def test_labels_are_drawn_evenly_from_a_generators_classes():
    ensemble = make_ensemble([[0, 1, 2, 3], [4, 5, 6], [7]])
    _, place = ensemble.sample_inputs(4000)
    counts = [place[:, g].bincount(minlength=4).tolist() for g in range(3)]
    assert all(abs(n - 1000) < 120 for n in counts[0])
    assert all(abs(n - 1333) < 120 for n in counts[1][:3]) and counts[1][3] == 0
    assert counts[2] == [4000, 0, 0, 0]


def test_a_part_makes_the_images_that_it_makes_in_the_whole():
    whole = make_ensemble([[0, 1], [2, 3], [4]])
    part = whole.take_part(slice(1, 3))
    torch.manual_seed(1)
    x, labels = whole(*whole.sample_inputs(3))
    torch.manual_seed(1)
    y, its_labels = part(*part.sample_inputs(3))
    x = x.unflatten(0, (3, 3))[:, 1:]
    assert torch.allclose(x, y.unflatten(0, (3, 2)), atol=1e-6)
    assert labels.view(3, 3)[:, 1:].flatten().tolist() == its_labels.tolist()


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_a_frozen_ensemble_does_not_change(bn):
    ensemble = make_ensemble([[0, 1], [2]])
    ensemble(*ensemble.sample_inputs(4))
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    ensemble.freeze(bn)
    z, place = ensemble.sample_inputs(4)
    x, _ = ensemble(z, place)
    assert not x.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in ensemble.state_dict().items())
    alone, _ = ensemble(z[:2], place[:2])
    does_batch_matter = not torch.allclose(alone, x[:4], atol=1e-5)
    assert does_batch_matter == (bn == "batch")


# Moments


def measure_by_hand(network, x):
    """Logits, and (mean - running_mean, biased variance, running_var) of each BatchNorm's input."""
    layers = []

    def measure(bn, inputs):
        by_channel = inputs[0].movedim(1, 0).flatten(1)  # (C, n)
        var = by_channel.var(1, unbiased=False)
        layers.append((by_channel.mean(1) - bn.running_mean, var, bn.running_var))

    hooks = []
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            hooks.append(m.register_forward_pre_hook(measure))
    logits = network(x)
    for hook in hooks:
        hook.remove()
    return logits, layers


def join(layers, i):
    """One of the three figures of all layers, (C,)."""
    return torch.cat([layer[i] for layer in layers])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pool", [1.0, 0.3, 0.0])
def test_moments_are_those_of_each_generators_images_or_of_all(pool, fused):
    teacher = load_digits_teacher()
    x = torch.randn(6, 1, 32, 32)
    logits, layers = measure_by_hand(teacher, x)
    with ge.watch_batchnorm(teacher, 3, replace(DIGITS, pool=pool, fused=fused)) as observe:
        its_logits, moments, running_var, sizes = observe(x)
    assert not any(m._forward_pre_hooks for m in teacher.modules())

    P = 1 if pool == 1 else 3
    assert sizes == tuple(len(layer[0]) for layer in layers)
    assert moments.shape == (2, P, sum(sizes))
    assert torch.allclose(its_logits, logits, atol=1e-4)
    assert torch.equal(running_var, join(layers, 2))
    pooled = ge.pool_moments(moments)
    for i in (0, 1):
        assert torch.allclose(pooled[i, 0], join(layers, i), atol=1e-4)
        for g in range(P):  # image i G + g is of generator g
            _, own_layers = measure_by_hand(teacher, x[g::P])
            assert torch.allclose(moments[i, g], join(own_layers, i), atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        pytest.param("l2", 5 + 0 + 2 + 5, id="l2"),
        pytest.param("relative", 5 / math.sqrt(2) + 0 + 2 + 5, id="relative"),
        pytest.param("kl", (9 / 2 + 16 / 2) / 2 + (9 - math.log(6)) / 2, id="kl"),
    ],
)
def test_moment_distances_by_hand(form, expected, fused):
    """Two layers, of 2 channels and of 1: means are off by 3, 4 and 2, variances by 0, 0 and 5."""
    args = replace(DIGITS, moments=form, fused=fused)
    moments = torch.tensor([[[3.0, 4.0, 2.0]], [[1.0, 1.0, 6.0]]])  # (2, 1, 3)
    ones = torch.ones(3)
    found = ge.compute_distance(moments, ones, (2, 1), args)
    assert found.item() == pytest.approx(expected, rel=1e-4)

    matching = torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]])
    both = torch.cat([moments, matching], 1)
    found = ge.compute_distance(both, ones, (2, 1), args)
    assert found.item() == pytest.approx(expected / 2, rel=1e-4)
    assert ge.compute_distance(moments[:, :, :0], ones[:0], (), args) == 0

    # One channel that matches and one that is dead: no loss, and no gradient that is not finite.
    still = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]], requires_grad=True)
    loss = ge.compute_distance(still, torch.tensor([1.0, 0.0]), (2,), args)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert still.grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        pytest.param(0.0, 5 + 13, id="own"),
        pytest.param(0.5, 5 + math.hypot(25, 144), id="last-of-two-pooled"),
        pytest.param(1.0, math.hypot(9, 16) + math.hypot(25, 144), id="pooled"),
    ],
)
def test_the_moment_loss_pools_the_last_layers(pool, expected):
    """Two generators whose means are opposite: pooled they cancel, and their spread is variance."""
    means = torch.tensor([[3.0, 4.0, 5.0, 12.0], [-3.0, -4.0, -5.0, -12.0]])
    moments = torch.stack([means, torch.ones(2, 4)])
    found = ge.moment_loss(moments, torch.ones(4), (2, 2), replace(DIGITS, pool=pool))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("form", "own"),
    [("l2", 2.0), ("relative", 1 / math.sqrt(1.25) + 1 / 1.25), ("kl", math.log(5) / 2)],
)
def test_one_class_alone_cannot_have_the_moments_of_all(form, own):
    """Classes as in the data pool to the stored moments, and neither of them has them."""
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
    teacher[0].running_var.fill_(1.25)  # E[var] + Var[mean] = 1/4 + 1; the mean is 0
    noise = 0.5 * torch.randn(400, 1, 8, 8)
    x = noise + torch.tensor([-1.0, 1.0]).repeat(200).view(-1, 1, 1, 1)  # the classes in turn
    for pool, expected in ((1.0, 0.0), (0.0, own)):
        args = replace(DIGITS, moments=form, pool=pool)
        with ge.watch_batchnorm(teacher, 2, args) as observe:
            _, *measured = observe(x)
        found = ge.moment_loss(*measured, args).item()
        assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("pool", [0.3, 1.0])
@pytest.mark.parametrize("trains", [False, True])
def test_batchnorms_that_cannot_be_measured_are_refused(capsys, pool, trains):
    teacher = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    if trains:
        teacher[1].train()
    else:
        teacher.forward = teacher[0].forward

    def watch():
        with ge.watch_batchnorm(teacher, 3, replace(DIGITS, pool=pool), torch.randn(2, 1, 8, 8)):
            pass

    line = read_refusal(capsys, watch)
    assert "the teacher's BatchNorms cannot be measured" in line
    assert line.strip().endswith("take another network")
    assert not teacher[1]._forward_pre_hooks


# Steps


class Training:
    """A teacher of digits, generators and a student with their optimisers."""

    def __init__(self, **options):
        self.args = replace(DIGITS, **options)
        device = self.args.device
        torch.manual_seed(0)
        self.teacher, info = load_teacher(self.args, device)
        self.student, _ = load_student("lenet5_half", info, device)
        ensemble = ge.build_ensemble(self.args, info).to(device)
        self.ensemble = ensemble.take_part(slice(None))
        self.adam = make_optimizer("adam", self.ensemble, self.args.lr_generator)
        self.frozen = self.ensemble.take_part(slice(None)).freeze(self.args.bn)
        self.student_adam = make_optimizer("adam", self.student, self.args.lr_student)

    def step_student(self):
        return ge.student_step(
            self.student, self.teacher, self.frozen, self.student_adam, self.args
        )


def compute_loss(teacher, x, labels, args):
    """L_G of images with the moments of all of them, out of plain PyTorch."""
    logits, layers = measure_by_hand(teacher, x)
    bn = 0
    for mean_difference, var, running_var in layers:
        bn = bn + mean_difference.norm() + (var - running_var).norm()
    return F.cross_entropy(logits, labels) + args.alpha_bn * bn


def step_ensemble(training, n_steps):
    """L_G, a mean over the generators, in each of so many steps of the script."""
    args = training.args
    losses = []
    torch.manual_seed(7)
    with ge.watch_batchnorm(training.teacher, args.generators, args) as observe:
        for _ in range(n_steps):
            ce, bn, _ = ge.generator_step(training.ensemble, observe, training.adam, args)
            losses.append((ce + args.alpha_bn * bn).item())
    return losses


@pytest.mark.parametrize("fused", [True, False])
def test_generators_that_train_together_are_those_that_train_alone(fused):
    """Own images, own moments, an own Adam each: the losses of the first steps."""
    training = Training(pool=0.0, fused=fused, lr_generator=2e-3)
    args = training.args
    generators = separate(training.ensemble)
    adams = [torch.optim.Adam(one.parameters(), args.lr_generator) for one in generators]
    together = step_ensemble(training, 4)

    alone = []
    torch.manual_seed(7)
    for _ in range(4):
        z, place = training.ensemble.sample_inputs(4)
        losses = []
        for g, inputs in enumerate(list_inputs(training.ensemble, z, place)):
            labels = torch.tensor(PAIRS[g])[place[:, g]]
            loss = compute_loss(training.teacher, generators[g](inputs), labels, args)
            adams[g].zero_grad()
            loss.backward()
            adams[g].step()
            losses.append(loss.item())
        alone.append(sum(losses) / 5)
    assert together == pytest.approx(alone, rel=1e-4)
    assert together[3] < together[0]


def test_pooled_generators_learn_on_one_pooled_batch():
    """One Adam over all generators, on the moments of all images."""
    training = Training(pool=1.0, lr_generator=2e-3)
    generators = separate(training.ensemble)
    parameters = [p for one in generators for p in one.parameters()]
    adam = torch.optim.Adam(parameters, training.args.lr_generator)
    together = step_ensemble(training, 3)

    expected = []
    torch.manual_seed(7)
    for _ in range(3):
        z, place = training.ensemble.sample_inputs(4)
        inputs = list_inputs(training.ensemble, z, place)
        images = [one(its) for one, its in zip(generators, inputs, strict=True)]
        x = torch.stack(images, 1).flatten(0, 1)
        labels = (place + 2 * torch.arange(5)).flatten()
        loss = compute_loss(training.teacher, x, labels, training.args)
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())
    assert together == pytest.approx(expected, rel=1e-4)


def test_hits_are_the_share_of_images_on_target():
    training = Training()
    torch.manual_seed(3)
    x, labels = training.ensemble(*training.ensemble.sample_inputs(4))
    expected = (training.teacher(x).argmax(1) == labels).float().mean()
    torch.manual_seed(3)
    with ge.watch_batchnorm(training.teacher, 5, training.args) as observe:
        *_, hits = ge.generator_step(training.ensemble, observe, training.adam, training.args)
    assert hits.item() == pytest.approx(expected.item())


def test_a_student_step_is_distillation():
    """T^2 KL of the student from the teacher, on the frozen ensemble's images, by Adam."""
    training = Training(temperature=4.0, shift=0, cut=False)
    plain, _ = load_student("lenet5_half", load_teacher(DIGITS, "cpu")[1], "cpu")
    plain.load_state_dict(training.student.state_dict())
    adam = torch.optim.Adam(plain.parameters(), training.args.lr_student)
    torch.manual_seed(3)
    loss = training.step_student()

    torch.manual_seed(3)
    x, _ = training.frozen(*training.frozen.sample_inputs(4))
    t = training.teacher(x) / 4
    s = plain(x) / 4
    divergence = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    expected = 16 * divergence.mean()
    expected.backward()
    adam.step()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for p, q in zip(training.student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_the_student_sees_moved_and_mixed_images(monkeypatch):
    seen = []
    training = Training(shift=1, cut=True)
    training.student.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    training.step_student()
    torch.manual_seed(3)
    x, _ = training.frozen(*training.frozen.sample_inputs(4))
    assert torch.equal(seen[0], ge.augment(x, shift=1, cut=True))


def test_both_learning_rates_fall_to_zero_by_a_cosine(tmp_path, monkeypatch):
    rates = []

    def record(step):
        def step_and_record(*args):
            optimizer = next(a for a in args if isinstance(a, torch.optim.Optimizer))
            rates.append(optimizer.param_groups[0]["lr"].item())
            return step(*args)

        return step_and_record

    monkeypatch.setattr(ge, "generator_step", record(ge.generator_step))
    monkeypatch.setattr(ge, "student_step", record(ge.student_step))
    run(tmp_path / "run", lr_generator=2.0**-10, lr_student=2.0**-8, epochs=2, iterations=2)
    generator_rates = [2.0**-11 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    student_rates = [2.0**-8, 2.0**-8, 2.0**-9, 2.0**-9]  # an epoch's rate is constant
    assert rates == pytest.approx(generator_rates + student_rates, rel=1e-6)


# Runs


def test_presets_follow_from_the_real_images_or_the_teacher():
    assert ge.choose_preset("", "") == "digits"
    assert ge.choose_preset("mnist-resnet8", "") == "mnist"
    assert ge.choose_preset("mnist-resnet8", "none") == "mnist"
    assert ge.choose_preset("cifar10-resnet20", "") == "cifar10"
    assert ge.choose_preset("mnist-resnet8", "digits") == "digits"
    assert ge.choose_preset("net.py:make", "") == "cifar10"
    assert all(args.setting == name for name, args in ge.PRESETS.items())


def test_a_run_measures_its_generators_and_its_student(tmp_path):
    result = run(tmp_path, steps=8, generators=10, dataset="digits")
    rows = rows_of(tmp_path)
    generators = [row for row in rows if "step" in row]
    student = [row for row in rows if "epoch" in row]
    assert [row["step"] for row in generators] == list(range(1, 9))
    assert [row["epoch"] for row in student] == [1, 2]
    assert generators[-1]["loss/bn"] < generators[0]["loss/bn"]
    assert result["student_accuracy"] == pytest.approx(student[-1]["eval/acc"], abs=1e-3)
    assert result["teacher_accuracy"] == 100
    assert result["generator_parameters"] == n_parameters(ge.Ensemble(make_sizes([[0]], 6, 4)))
    assert len(result["class_accuracies"]) == 10 and 0 <= result["hits"] <= 100
    by_class = sum(result["class_accuracies"]) / 10
    assert result["student_accuracy"] == pytest.approx(by_class, abs=2)  # classes are even
    for name in ("diversity", "real_diversity"):
        assert min(result[name]["pixels"], result[name]["features"]) > 0
    assert result["setting"]["generators"] == 10 and result["setting"]["stages"] == 2


def test_a_student_learns_in_a_short_run(tmp_path):
    options = dict(steps=150, batch_size=10, generators=10, dataset="digits")
    result = run(tmp_path, **options, epochs=6, iterations=25)
    losses = [row["loss/student"] for row in rows_of(tmp_path) if "epoch" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert result["student_accuracy"] > 15  # chance: 10


def test_real_images_only_measure(tmp_path):
    students = []
    for dataset in ("digits", "none"):
        result = run(tmp_path / dataset, dataset=dataset)
        saved = torch.load(tmp_path / dataset / "student.pt", weights_only=True)
        students.append(saved["state_dict"])
    assert result["student_accuracy"] is None and "real_diversity" not in result
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_an_ensemble_is_sampled_and_teaches_a_second_student(tmp_path):
    first = tmp_path / "first"
    run(first, temperature=2.0)
    file = first / "ensemble.pt"
    before = file.read_bytes()
    options = dict(ensemble=str(file), student="lenet5_half", epochs=1, generators=10, latent=64)
    result = run(tmp_path / "second", **options)
    assert [row["epoch"] for row in rows_of(tmp_path / "second")] == [1]  # no generator trained
    assert result["student"] == "lenet5_half" and not (tmp_path / "second/ensemble.pt").exists()
    assert (result["setting"]["generators"], result["setting"]["latent"]) == (5, 6)  # the file's

    ge.main(replace(DIGITS, ensemble=str(file), sample=40, out=str(tmp_path / "grid")))
    ge.main(replace(DIGITS, sample=40, out=str(first)))  # of the run in --out itself
    grids = [(tmp_path / name / "samples.png").read_bytes() for name in ("grid", "first")]
    assert grids[0] == grids[1]
    run(first, **options)  # into the folder that holds it
    assert file.read_bytes() == before


def test_sample_classes_gives_each_class_its_row():
    class Marked(ge.Ensemble):
        """Images whose pixels are their label."""

        def forward(self, z, place):
            x, labels = super().forward(z, place)
            return labels.view(-1, 1, 1, 1).float().expand_as(x), labels

    ensemble = Marked(make_sizes([[0, 3], [1], [2]])).initialise()
    images = ge.sample_classes(ensemble, 22, 2)
    assert images.shape == (4, 5, 1, 32, 32)
    assert all((x == k).all() for k, x in enumerate(images))
    assert ge.sample_classes(ensemble, 3, 2).shape[:2] == (3, 1)


@pytest.mark.parametrize("n_checkpoints", [1, 3, 5])
def test_a_run_that_is_cut_in_either_stage_resumes(tmp_path, monkeypatch, n_checkpoints):
    """It stops after a row and before that row's checkpoint; files are bit-equal in the end."""
    options = dict(steps=3, epochs=3, optimizer="sgd")
    save_checkpoint = RunFolder.save_checkpoint
    states = []

    def save_or_stop(self, state):
        if len(states) == n_checkpoints:
            raise KeyboardInterrupt
        states.append(state)
        save_checkpoint(self, state)

    run(tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "save_checkpoint", save_or_stop)
        run(tmp_path / "cut", **options)
    run(tmp_path / "cut", **options, resume=True)
    for name in ("metrics.jsonl", "samples.png", "ensemble.pt", "student.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def run_two_processes(out, options):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = []
    for rank in "01":
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        group |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command = f"generative_ensemble.py --setting digits {options}"
        programs.append(start(command, out, environment=group))
    for program in programs:
        code, _, errors = program.finish()
        assert code == 0, errors


def test_two_processes_train_the_generators_that_one_trains(tmp_path):
    """With own moments the split changes nothing, nor does a --resume of what is done."""
    options = dict(FAST, pool=0.0, epochs=1, lr_generator=1e-3)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    run_two_processes(tmp_path / "two", flags)
    run_two_processes(tmp_path / "two", f"{flags} --resume")
    run(tmp_path / "one", pool=0.0, epochs=1, lr_generator=1e-3)

    one, two = (torch.load(tmp_path / n / "ensemble.pt", weights_only=True) for n in ("one", "two"))
    assert one["shape"] == two["shape"]
    for name, tensor in one["state_dict"].items():
        difference = (tensor.float() - two["state_dict"][name].float()).abs()
        assert difference.mean() < 1e-4, name  # Adam makes whole steps of a rounding near 0
    saved = torch.load(tmp_path / "two/rank1/checkpoint.pt", weights_only=True)
    assert len(saved["state"]["ensemble"]["dense"]) == 2  # of five: this process has the last two
    assert (tmp_path / "two/result.json").exists()
    assert not (tmp_path / "two/rank1/student.pt").exists()


# Refusals


def test_ensembles_that_do_not_fit_the_teacher_are_refused(tmp_path, capsys):
    path = tmp_path / "ensemble.pt"
    args = replace(DIGITS, ensemble=str(path), out=str(tmp_path / "new"))
    sizes = make_sizes(PAIRS)

    def refuse(sizes=sizes, **changes):
        """What the script says of an ensemble of these sizes whose file has these entries."""
        saved = dict(teacher="digits-resnet8", mean=[0.3054], std=[0.3237], bn="batch", n=4)
        saved |= dict(shape=asdict(sizes), state_dict=ge.Ensemble(sizes).state_dict())
        torch.save(saved | changes, path)
        return read_refusal(capsys, ge.main, args)

    assert "its mean is (0.2,), the teacher's (0.3054,)" in refuse(mean=[0.2])
    assert "its num_classes is 3, the teacher's 10" in refuse(make_sizes([[0, 1], [2]]))
    larger = make_sizes(PAIRS, image_size=64, stages=3)
    assert "its image_size is 64, the teacher's 32" in refuse(larger)
    assert "not make each class once" in refuse(make_sizes([*PAIRS[:4], [8, 8]]))
    assert "no ensemble of this script" in refuse(shape=asdict(make_sizes([*PAIRS[:4], [8], [9]])))
    assert "its channels do not fit" in refuse(mean=[0.2, 0.2])
    assert "how to sample" in refuse(bn="other")
    assert "no ensemble of this script" in refuse(state_dict={})
    infinite = {name: t + math.inf for name, t in ge.Ensemble(sizes).state_dict().items()}
    assert "its weights are not finite" in refuse(state_dict=infinite)
    for options in (dict(ensemble="nowhere.pt"), dict(ensemble="", sample=10)):
        assert "cannot be read" in read_refusal(capsys, ge.main, replace(args, **options))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(batch_size=4), "--batch-size 4: fewer than 5 generators", id="batch"),
        pytest.param(dict(student_batch=4), "--student-batch 4: fewer than 5", id="student-batch"),
        pytest.param(dict(stages=6), "--stages 6: 32 pixels", id="stages"),
        pytest.param(dict(width=1), "a width of 1", id="width"),
        pytest.param(dict(teacher="digits-lenet5"), "take another network", id="no-batchnorm"),
    ],
)
def test_options_that_do_not_fit_the_teacher_are_refused(capsys, tmp_path, options, says):
    args = replace(DIGITS, out=str(tmp_path / "run"), **options)
    assert says in read_refusal(capsys, ge.main, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["generators", "steps", "latent", "iterations", "temperature"])
def test_options_below_their_least_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name}: expected at least"):
        ge.Args(**{name: 0})


@pytest.mark.parametrize("pool", [-0.1, 1.1, math.nan])
def test_the_pooled_share_is_from_0_to_1(pool):
    with pytest.raises(ValueError, match="--pool: expected"):
        ge.Args(pool=pool)


def test_examples_in_docstrings_are_right():
    tested = doctest.testmod(ge)
    assert tested.attempted and not tested.failed


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [dict(bf16=False), dict(bf16=False, pool=0.0), dict(bf16=False, pool=1.0), dict(bf16=True)],
)
def test_a_graph_replays_what_eager_steps_do(options):
    """Six steps of each stage; the last two, replayed, may not wait for the device."""
    figures = []
    for graph in (True, False):
        training = Training(device="cuda", **options)
        args = training.args
        sums = torch.zeros(4, device="cuda")
        with ge.watch_batchnorm(training.teacher, 5, args) as observe:

            def step_generators(training=training, observe=observe, sums=sums):
                sums[:3] += ge.generator_step(
                    training.ensemble, observe, training.adam, training.args
                )

            play(step_generators, graph)

        def step_student(training=training, sums=sums):
            sums[3] += training.step_student()

        play(step_student, graph)
        figures.append(sums.tolist())
    tolerance = 0.1 if options["bf16"] else 1e-2
    assert figures[0] == pytest.approx(figures[1], rel=tolerance, abs=1e-3)


def play(step, graph):
    """Six calls, the first ones as they are, the last two under a watch for synchronisation."""
    captured = kernels.CapturedStep(step, enabled=graph)
    mode = torch.cuda.get_sync_debug_mode()
    for i in range(6):
        torch.cuda.set_sync_debug_mode("error" if i >= 4 else mode)
        try:
            captured()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
