"""deepinversion.py: its losses, a batch against plain Adam, what is random, whole runs."""

import copy
import json
import math
import random
import shutil
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import scripts
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import rows_of
from scripts import read_refusal
from tqdm import tqdm

import deepinversion as di
import kernels
from harness.foreign import load_factory
from harness.images import get_pixel_range, list_image_files, read_images, save_images
from harness.known import NetworkInfo
from harness.load import load_trained
from harness.run import RunFolder
from kernels import _common

# Batches of a tiny network, and whole runs on the shipped digits teacher.
TINY = replace(
    di.CIFAR10,
    device="cpu",
    batch_size=4,
    iterations=6,
    iterations_low=4,
    warmup=2,
    alpha_tv_l1=0.2,
    alpha_l2=0.05,
    log_every=4,
)
DIGITS = replace(di.DIGITS, device="cpu", batch_size=10, num_images=40, iterations=20, log_every=5)
TINY_INFO = NetworkInfo("tiny", "tiny", "", 10, 8, (0.5,) * 3, (0.25,) * 3, None)


@pytest.fixture(autouse=True, scope="module")
def cpu_path():
    """Scripts run the CPU path, as the interpreter would take minutes, and know their name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        patch.setattr(sys, "argv", ["deepinversion.py"])
        yield


@pytest.fixture(scope="module")
def whole(cpu_path, tmp_path_factory):
    """The folder of a finished run: four batches of ten digits."""
    out = tmp_path_factory.mktemp("whole")
    di.main(replace(DIGITS, out=str(out)))
    return out


def make_teacher():
    """A random network of RGB images with two BatchNorms, frozen."""
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    for layer in (teacher[1], teacher[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return teacher.eval().requires_grad_(False)


def make_synthesis(out, teacher, args, n_batches=1):
    args = replace(args, out=str(out))
    watched = di.watch_batchnorms(teacher, torch.randn(2, 3, 8, 8), args, "cpu")
    labels = di.choose_labels(torch.arange(10), n_batches, args)
    return di.Synthesis(watched, TINY_INFO, labels, RunFolder(args, "cpu"), tqdm(disable=True))


# Losses


def write_out_competition(t_logits, s_logits, args):
    """Eq. 8 from entropies, and the lines of the released code."""
    p = torch.softmax(s_logits / args.temperature, 1)
    q = torch.softmax(t_logits / args.temperature, 1)
    m = (p + q) / 2
    if args.competition == "js":

        def entropy(probabilities):
            return -(probabilities * probabilities.log()).sum(1).mean()

        return 1 - (entropy(m) - (entropy(p) + entropy(q)) / 2)
    p = p.clamp(0.01, 0.99)
    q = q.clamp(0.01, 0.99)
    m = m.clamp(0.01, 0.99)
    divergence = F.kl_div(p.log(), m, reduction="batchmean") / 2
    divergence = divergence + F.kl_div(q.log(), m, reduction="batchmean") / 2
    return 1 - divergence.clamp(0, 1)


def write_out_loss(x, draw, labels, teacher, args, opponent=None):
    """Eq. 1 in plain PyTorch: the total, and its terms by name."""
    down, right, mirrored = draw.tolist()
    view = x.roll((down, right), (2, 3))
    if mirrored:
        view = view.flip(3)

    inputs = view
    bn = 0
    factor = args.first_bn
    for layer in teacher:
        if isinstance(layer, nn.BatchNorm2d):
            mean = inputs.mean((0, 2, 3))
            var = inputs.var((0, 2, 3), unbiased=False)
            norms = (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
            bn = bn + factor * norms
            factor = 1.0
        inputs = layer(inputs)

    differences = [
        view[:, :, :, :-1] - view[:, :, :, 1:],
        view[:, :, :-1, :] - view[:, :, 1:, :],
        view[:, :, 1:, :-1] - view[:, :, :-1, 1:],
        view[:, :, :-1, :-1] - view[:, :, 1:, 1:],
    ]
    terms = {
        "ce": F.cross_entropy(inputs / args.ce_temperature, labels),
        "bn": bn,
        "tv_l1": sum(difference.abs().mean() for difference in differences),
        "tv_l2": sum(difference.norm() for difference in differences),
        "l2": view.flatten(1).norm(dim=1).mean(),
    }
    total = terms["ce"] + args.alpha_bn * bn + args.alpha_l2 * terms["l2"]
    total = total + args.alpha_tv_l1 * terms["tv_l1"] + args.alpha_tv_l2 * terms["tv_l2"]
    if opponent is not None:
        terms["competition"] = write_out_competition(inputs, opponent(view), args)
        total = total + args.alpha_competition * terms["competition"]
    terms["total"] = total
    terms["teacher"] = 100 * (inputs.argmax(1) == labels).float().mean()
    return total, terms


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("competition", ["none", "js", "released"])
def test_terms_and_gradient_are_those_of_the_formulas(competition, fused):
    weights = dict(first_bn=5.0, ce_temperature=3.0)
    args = replace(TINY, student="lenet5", competition=competition, fused=fused, **weights)
    teacher = make_teacher()
    opponent = None if competition == "none" else make_teacher()
    x = torch.randn(4, 3, 8, 7, requires_grad=True)
    draw = torch.tensor([2, -1, 1])
    labels = torch.tensor([1, 2, 3, 3])
    target = di.Target(labels, di.watch_batchnorms(teacher, x.detach(), args, "cpu"), opponent)

    total, terms = di.synthesis_loss(x, draw, target, args)
    expected_total, expected = write_out_loss(x, draw, labels, teacher, args, opponent)
    for name, value in zip(di.TERMS, terms.tolist(), strict=True):
        if name in expected:
            assert value == pytest.approx(expected[name].item(), rel=1e-4), name
        else:
            assert name == "competition" and math.isnan(value)

    (gradient,) = torch.autograd.grad(total, x)
    (expected_gradient,) = torch.autograd.grad(expected_total, x)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_constants_made_in_inference_mode_serve_later_steps():
    device = torch.device("cpu")
    numbers = 0.125, 0.375
    with torch.inference_mode():
        di.make_constants(numbers, device)
    x = torch.ones(2, requires_grad=True)
    (di.make_constants(numbers, device) * x).sum().backward()
    assert x.grad.tolist() == [0.125, 0.375]


def test_a_second_class_is_beside_each_label_in_random_shares():
    args = replace(TINY, second_class=0.4)
    labels = torch.arange(1000) % 10
    shares = di.sample_shares(labels, 3, 10, args)
    assert torch.allclose(shares.sum(1), torch.ones(1000))
    assert ((shares > 0).sum(1) <= 2).all()
    first = shares.gather(1, labels[:, None]).flatten()
    assert torch.equal(shares.argmax(1), labels)
    assert first.min() >= 0.6
    assert first.mean() == pytest.approx(0.8, abs=0.01)
    second = shares.scatter(1, labels[:, None], 0).argmax(1)
    assert torch.bincount((second - labels) % 10, minlength=10)[1:].min() > 80  # each other class

    assert torch.equal(shares, di.sample_shares(labels, 3, 10, args))
    assert not torch.equal(shares, di.sample_shares(labels, 4, 10, args))
    assert not torch.equal(shares, di.sample_shares(labels, 3, 10, replace(args, seed=9)))
    assert di.sample_shares(labels, 3, 10, TINY) is None


def test_a_second_class_of_a_network_with_one_is_refused(monkeypatch, capsys):
    teacher = make_teacher()
    info = replace(TINY_INFO, num_classes=1)
    monkeypatch.setattr(di, "load_teacher", lambda *rest: (teacher, info))
    args = replace(TINY, second_class=0.3, iterations_low=0)
    line = read_refusal(capsys, di.load_checked_teacher, args, "cpu")
    assert "--second-class 0.3: the network has one class; pass 0" in line


def test_ce_with_a_second_class_is_that_of_the_shares():
    args = replace(TINY, second_class=0.5, ce_temperature=2.0)
    teacher = make_teacher()
    x = torch.randn(4, 3, 8, 8)
    labels = torch.tensor([1, 2, 3, 3])
    watched = di.watch_batchnorms(teacher, x, args, "cpu")
    shares = di.sample_shares(labels, 0, 10, args)
    target = di.Target(labels, watched, None, shares)
    _, terms = di.synthesis_loss(x, torch.zeros(3, dtype=torch.long), target, args)
    log_p = (teacher(x) / 2).log_softmax(1)
    expected = -(shares * log_p).sum(1).mean().item()
    assert terms[di.TERMS.index("ce")].item() == pytest.approx(expected, rel=1e-4)


def test_a_step_takes_the_images_that_it_drew():
    """The others keep still while Adam's averages of their gradients are 0."""
    args = replace(TINY, step_images=3, iterations=2, iterations_low=0, clip=False)
    noise, (draws,) = di.sample_randomness(0, (8, 3, 8, 8), args)
    assert draws.shape == (2, 6)
    for draw in draws:
        assert len(set(draw[3:].tolist())) == 3
        assert draw[3:].min() >= 0
        assert draw[3:].max() < 8

    x = noise.to(memory_format=torch.channels_last).requires_grad_()
    target = di.Target(
        torch.arange(8), di.watch_batchnorms(make_teacher(), noise, args, "cpu"), None
    )
    stage = di.Stage(n_steps=2, scale=1, jitter=1, lr=0.1)
    before = x.detach().clone()
    next(di.optimise_images(x, draws, stage, target, (None, None), args))
    moved = (x.detach() != before).flatten(1).any(1).nonzero().flatten()
    assert moved.tolist() == sorted(draws[0, 3:].tolist())


@pytest.mark.parametrize("second_class", [0.0, 0.5])
def test_a_step_of_part_of_the_images_is_a_step_of_a_smaller_batch(second_class):
    args = replace(TINY, step_images=4, iterations=1, iterations_low=0, clip=False)
    noise, (draws,) = di.sample_randomness(0, (8, 3, 8, 8), args)
    part = draws[0, 3:]
    watched = di.watch_batchnorms(make_teacher(), noise, args, "cpu")
    labels = torch.arange(8)
    shares = None
    if second_class:
        shares = di.sample_shares(labels, 0, 10, replace(args, second_class=second_class))
    stage = di.Stage(n_steps=1, scale=1, jitter=1, lr=0.1)

    x = noise.to(memory_format=torch.channels_last).requires_grad_()
    target = di.Target(labels, watched, None, shares)
    terms = next(di.optimise_images(x, draws, stage, target, (None, None), args)).clone()

    small = noise[part].contiguous(memory_format=torch.channels_last).requires_grad_()
    target = di.select_targets(target, part)
    assert torch.equal(target.labels, labels[part])
    expected = next(di.optimise_images(small, draws[:, :3], stage, target, (None, None), args))
    assert torch.equal(terms.nan_to_num(), expected.nan_to_num())
    torch.testing.assert_close(x[part], small)


def test_all_images_are_taken_where_a_step_takes_at_least_as_many():
    shape = (4, 3, 8, 8)
    args = replace(TINY, iterations=3, iterations_low=0)
    noise, (draws,) = di.sample_randomness(0, shape, args)
    again, (same,) = di.sample_randomness(0, shape, replace(args, step_images=4))
    assert torch.equal(noise, again)
    assert torch.equal(draws, same)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_bf16_on_a_cpu_changes_the_gradient_little(fused, monkeypatch):
    """The teacher's activations alone are rounded: moments, losses and images stay fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    teacher = make_teacher()
    x = torch.randn(16, 3, 8, 8, requires_grad=True)
    draw = torch.tensor([2, -1, 1])
    labels = torch.arange(16) % 10
    gradients = []
    for bf16_cpu in (False, True):
        args = replace(TINY, fused=fused, bf16_cpu=bf16_cpu)
        watched = di.watch_batchnorms(teacher, x.detach(), args, "cpu")
        target = di.Target(labels, watched, None)
        total, terms = di.synthesis_loss(x, draw, target, args)
        assert total.dtype == terms.dtype == torch.float32
        gradients.append(*torch.autograd.grad(total, x))
    in_fp32, in_bf16 = gradients
    assert in_bf16.dtype == torch.float32
    assert not torch.equal(in_fp32, in_bf16)
    assert F.cosine_similarity(in_fp32.flatten(), in_bf16.flatten(), dim=0) > 0.99


def test_bf16_on_a_cpu_needs_its_units(monkeypatch):
    asked = replace(TINY, bf16_cpu=True)
    for units, dtype in ({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=units: found, raising=False)
        assert di.choose_dtype("cpu", asked) == dtype
        assert di.choose_dtype("cpu", TINY) == torch.float32
        assert di.choose_dtype("cuda", TINY) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert di.choose_dtype("cpu", asked) == torch.float32


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_pixels_count_as_a_layer_that_wants_mean_0_and_variance_1(fused):
    x = torch.randn(6, 3, 8, 8) * 2 + 0.5
    teacher = make_teacher()
    labels = torch.arange(6) % 10
    losses = []
    for pixel_bn in (0.0, 0.7):
        args = replace(TINY, moments="l2", first_bn=5.0, pixel_bn=pixel_bn, fused=fused)
        target = di.Target(labels, di.watch_batchnorms(teacher, x, args, "cpu"), None)
        _, terms = di.synthesis_loss(x, torch.tensor([0, 0, 0]), target, args)
        losses.append(terms[di.TERMS.index("bn")].item())
    without, with_pixels = losses
    mean = x.mean((0, 2, 3))
    var = x.var((0, 2, 3), correction=0)
    expected = 0.7 * (mean.norm() + (var - 1).norm()).item()
    assert with_pixels - without == pytest.approx(expected, rel=1e-3)


# a layer of two channels and one of one: mean less running mean, and variance
TWO_LAYERS = kernels.LayerMoments(
    moments=torch.tensor([[3.0, 4.0, 0.0], [1.0, 1.0, 6.0]]),
    running_var=torch.ones(3),
    sizes=(2, 1),
    eps=(0.5, 1.0),
)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_moment_loss_adds_norms_and_the_first_layer_has_a_factor(fused):
    args = replace(TINY, first_bn=10.0, moments="l2", fused=fused)
    assert di.moment_loss(TWO_LAYERS, args).item() == pytest.approx(10 * 5 + 5)
    args = replace(args, first_bn=1.0)
    assert di.moment_loss(TWO_LAYERS, args).item() == pytest.approx(5 + 5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_moment_loss_without_a_unit(fused):
    """The channels' KL divergences are averaged; each layer's eps is added to both variances."""
    args = replace(TINY, moments="relative", first_bn=10.0, fused=fused)
    expected = 10 * 5 / 2**0.5 + 5
    assert di.moment_loss(TWO_LAYERS, args).item() == pytest.approx(expected)

    args = replace(args, moments="kl")
    of_first = (9 / 1.5 + 16 / 1.5) / 2 / 2
    of_second = (7 / 2 - 1 - math.log(7 / 2)) / 2
    expected = 10 * of_first + of_second
    assert di.moment_loss(TWO_LAYERS, args).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_first_layer_is_the_one_that_runs_first(fused):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.BatchNorm2d(4)
            self.first = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.last(self.conv(self.first(x)))

    x = torch.randn(2, 3, 4, 4)
    watched = di.watch_batchnorms(Backwards().eval(), x, replace(TINY, fused=fused), "cpu")
    _, found = watched(x)
    assert found.sizes == (3, 4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_watching_leaves_the_teacher_as_it_is(fused):
    """No hook stays on it, and the bf16 weights of a GPU are a copy's."""
    teacher = make_teacher()
    x = torch.randn(8, 3, 8, 8)
    logits = teacher(x)
    watched = di.watch_batchnorms(teacher, x, replace(TINY, fused=fused), "cuda")
    with torch.autocast("cpu", torch.bfloat16):
        t_logits, found = watched(x)
    assert t_logits.dtype == torch.bfloat16
    assert torch.allclose(t_logits.float(), logits, atol=0.05)
    assert found.moments.dtype == torch.float32
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert not any(module._forward_pre_hooks for module in teacher.modules())


class CallsTheOriginal(nn.Module):
    """A copy of it still runs the first layers of what it was copied from."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.second = nn.BatchNorm2d(4)
        self.run_first = lambda x: self.first(x)

    def forward(self, x):
        return self.second(self.run_first(x)).mean((2, 3))


class CannotBeCopied(nn.Module):
    """Keeps what it computed, with an autograd graph."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.kept = torch.ones(1, requires_grad=True) * 2

    def forward(self, x):
        return self.bn(x).mean((2, 3))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(("make", "n_layers"), [(CallsTheOriginal, 2), (CannotBeCopied, 1)])
def test_a_teacher_without_a_true_copy_is_watched_itself(make, n_layers, fused):
    teacher = make().eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert di.copy_network(teacher, x) is teacher
    watched = di.watch_batchnorms(teacher, x, replace(TINY, fused=fused), "cuda")
    y, found = watched(x)
    assert torch.allclose(y, teacher(x), atol=1e-6)
    assert len(found.sizes) == n_layers
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("form", ["js", "released"])
def test_competition_falls_with_disagreement_and_only_the_released_one_saturates(form):
    args = replace(TINY, student="lenet5", competition=form)
    t_logits = torch.tensor([[30.0, 0.0, 0.0]])
    values = []
    slopes = []
    for gap in (0.0, 10.0, 15.0, 30.0):
        s_logits = torch.tensor([[30.0 - gap, gap, 0.0]], requires_grad=True)
        loss = di.competition_loss(t_logits, s_logits, args)
        values.append(loss.item())
        slopes.append(torch.autograd.grad(loss, s_logits)[0].abs().max().item())
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert slopes[2] > 0
    if form == "js":
        assert values[3] == pytest.approx(1 - math.log(2), abs=1e-3) and slopes[3] > 0
    else:
        assert values[3] == slopes[3] == 0

    # the clamp is of the batch's mean: one image that saturates does not stop the others
    s_logits = torch.tensor([[0.0, 30.0, 0.0], [30.0, 0.0, 0.0]])
    assert 0 < di.competition_loss(t_logits.repeat(2, 1), s_logits, args).item() < 1


# What a batch is made from


def test_the_cosine_warms_up_and_ends_near_zero():
    rates = [di.compute_cosine(step, 2000, 0.2, 100) for step in range(2000)]
    assert rates[:100] == pytest.approx([0.2 * (step + 1) / 100 for step in range(100)])
    assert rates[100] == 0.2
    assert rates[1050] == pytest.approx(0.1)  # halfway
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert 0 < rates[-1] < 1e-5
    assert di.compute_cosine(0, 1, 0.2, 100) == 0.2
    assert di.compute_cosine(0, 8, 0.2, 100) == pytest.approx(0.1)  # a quarter is 2 steps


def test_randomness_comes_from_seed_and_number_alone():
    args = replace(TINY, iterations_low=300, iterations=400, jitter=2, seed=7)
    shape = (2, 3, 4, 4)
    noise, draws = di.sample_randomness(3, shape, args)
    torch.rand(5)  # what others draw does not matter
    again, draws_again = di.sample_randomness(3, shape, args)
    assert torch.equal(noise, again)
    assert all(torch.equal(a, b) for a, b in zip(draws, draws_again, strict=True))
    for number, seed in ((4, 7), (3, 8), (7, 3)):
        other, other_draws = di.sample_randomness(number, shape, replace(args, seed=seed))
        assert not torch.equal(noise, other)
        assert not torch.equal(draws[1], other_draws[1])


def test_a_draw_rolls_by_up_to_the_jitter_and_mirrors_half_of_the_steps():
    args = replace(TINY, iterations_low=300, iterations=400, jitter=2)
    noise, draws = di.sample_randomness(0, (2, 3, 40, 40), args)
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    for draw, n_steps, jitter in zip(draws, (300, 400), (1, 2), strict=True):
        assert draw.shape == (n_steps, 3) and draw.dtype == torch.int64
        sides = range(-jitter, jitter + 1)
        rolls = {tuple(roll) for roll in draw[:, :2].tolist()}
        assert rolls == {(down, right) for down in sides for right in sides}
        assert set(draw[:, 2].tolist()) == {0, 1}
        assert 0.4 < draw[:, 2].float().mean() < 0.6
    for draw in di.sample_randomness(0, (2, 3, 4, 4), replace(args, flip=False))[1]:
        assert not draw[:, 2].any()


def test_grey_sets_start_from_a_blur_in_the_middle_and_others_from_noise():
    info = replace(TINY_INFO, image_size=32, mean=(0.1,), std=(0.3,))
    low, high = (bound.item() for bound in get_pixel_range(info, "cpu"))
    noise = torch.randn(200, 1, 32, 32)
    for name in ("cifar10", "cifar10-released", "imagenet-0"):
        assert torch.equal(di.make_start_images(noise, info, di.PRESETS[name]), noise)

    args = replace(di.MNIST, start_blur=5, start_margin=6, start_gain=0.05)
    x = di.make_start_images(noise, info, args)
    inside = x[:, :, 6:26, 6:26]
    assert (x != low).sum() == inside.numel()  # the margin is dark
    assert inside.std().item() == pytest.approx(0.05, rel=0.05)
    neighbours = torch.stack([inside[..., 1:].flatten(), inside[..., :-1].flatten()])
    assert torch.corrcoef(neighbours)[0, 1].item() == pytest.approx(0.8, abs=0.03)  # 4 of 5 columns

    x = di.make_start_images(noise, info, replace(args, start_gain=20.0))
    assert x.min().item() == pytest.approx(low)
    assert x.max().item() == pytest.approx(high)


def test_labels_are_the_wanted_classes_in_turn():
    args = replace(TINY, batch_size=4)
    labels = di.choose_labels(torch.arange(3), 2, args)
    assert labels.tolist() == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert di.choose_labels(torch.tensor([7, 2]), 1, args).tolist() == [[7, 2, 7, 2]]
    assert di.choose_labels(torch.arange(10), 0, args).shape == (0, 4)


def test_classes_that_do_not_fit_a_batch_come_in_a_random_order():
    info = replace(TINY_INFO, num_classes=1000)
    classes = di.choose_classes(info, TINY)
    assert sorted(classes.tolist()) == list(range(1000))
    assert classes[:4].tolist() != [0, 1, 2, 3]
    assert torch.equal(classes, di.choose_classes(info, TINY))
    assert not torch.equal(classes, di.choose_classes(info, replace(TINY, seed=1)))

    labels = di.choose_labels(classes, 251, TINY)
    assert labels.shape == (251, 4)
    assert torch.equal(labels[:250].flatten(), classes)
    assert torch.equal(labels[250], classes[:4])


def test_which_classes_are_made():
    """A student needs all of ImageNet's; a picture shows those of the released code."""
    assert di.choose_classes(TINY_INFO, replace(TINY, batch_size=10)).tolist() == list(range(10))
    assert di.choose_classes(TINY_INFO, replace(TINY, classes=(7, 2))).tolist() == [7, 2]

    info = replace(TINY_INFO, dataset="imagenet", num_classes=1000)
    assert di.choose_classes(info, TINY).tolist() == list(di.SHOWN_CLASSES)
    assert len(set(di.SHOWN_CLASSES)) == 42
    assert len(di.choose_classes(info, replace(TINY, student="resnet18"))) == 1000
    assert di.choose_classes(info, replace(TINY, classes=(7,))).tolist() == [7]


@pytest.mark.parametrize("classes", [(3, 10), (-1,), (10**30,)])
def test_classes_that_the_teacher_lacks_are_refused(capsys, classes):
    args = replace(TINY, classes=classes)
    says = read_refusal(capsys, di.choose_classes, TINY_INFO, args)
    assert "--classes: expected numbers from 0 to 9" in says


@pytest.mark.parametrize(
    ("options", "world", "n_batches"),
    [
        pytest.param(dict(), 1, 1, id="one by default"),
        pytest.param(dict(num_images=9), 1, 3, id="whole batches"),
        pytest.param(dict(num_images=9), 2, 4, id="as many for each process"),
        pytest.param(dict(student="lenet5"), 1, 7 + 3 * 2, id="student"),
        pytest.param(dict(student="lenet5", num_images=8), 1, 2 + 3 * 2, id="student's images"),
        pytest.param(dict(student="lenet5", images="folder"), 1, 3 * 2, id="given images"),
    ],
)
def test_images_come_in_whole_batches(options, world, n_batches):
    args = replace(TINY, initial_batches=7, batches_per_epoch=2, epochs=3, **options)
    assert di.count_batches(args, world) == n_batches


# A batch


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(), id="cosine, clipped, fused"),
        pytest.param(dict(schedule="constant", clip=False, fused=False), id="constant, plain"),
        pytest.param(dict(lr_low=0.02), id="another rate at low resolution"),
    ],
)
def test_a_batch_is_made_by_plain_adam_low_resolution_first(tmp_path, options):
    """Each stage begins with a fresh Adam; each step has its own draw and rate."""
    args = replace(TINY, **options)
    teacher = make_teacher()
    number = 2
    noise, draws = di.sample_randomness(number, (4, 3, 8, 8), args)
    x = noise.clone().requires_grad_()
    labels = di.choose_labels(torch.arange(10), 3, args)[number]
    expected_rows = []
    peaks = (args.lr_low or args.lr, args.lr)
    for stage, (n_steps, pool) in enumerate([(4, 2), (6, 1)]):
        optimizer = torch.optim.Adam([x], betas=args.betas, foreach=False)
        for n in range(n_steps):
            rate = peaks[stage]
            if args.schedule == "cosine":
                rate = di.compute_cosine(n, n_steps, rate, warmup=2)
            optimizer.param_groups[0]["lr"] = rate
            view = F.avg_pool2d(x, pool)
            total, terms = write_out_loss(view, draws[stage][n], labels, teacher, args)
            expected_rows.append({"stage": stage} | {k: v.item() for k, v in terms.items()})
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if args.clip:
                x.data.clamp_(-2, 2)  # (0 - 0.5) / 0.25 to (1 - 0.5) / 0.25

    made = make_synthesis(tmp_path, teacher, args, 3).synthesise(number, None)
    assert torch.allclose(made, x, atol=2e-3)
    rows = rows_of(tmp_path)
    # every 4th step of the run and the batch's last; batches 0 and 1 would have been 20 steps
    assert [row["step"] for row in rows] == [24, 28, 30]
    for row in rows:
        wanted = expected_rows[row["step"] - 21]
        assert (row["batch"], row["stage"]) == (2, wanted["stage"])
        assert row["eval/teacher"] == wanted["teacher"]
        for name in ("total", "ce", "bn", "tv_l1", "tv_l2", "l2"):
            assert row[f"loss/{name}"] == pytest.approx(wanted[name], rel=1e-2), name
        assert "loss/competition" not in row


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_keeps_images_in_the_range_of_real_pixels(tmp_path, clip):
    args = replace(TINY, clip=clip, lr=50.0)
    x = make_synthesis(tmp_path, make_teacher(), args).synthesise(0, None)
    assert (x.abs().max().item() <= 2) == clip


def test_a_batch_made_alone_is_that_of_a_run(tmp_path):
    teacher = make_teacher()
    synthesis = make_synthesis(tmp_path / "run", teacher, TINY, 4)
    made = [synthesis.make_batch(number) for number in range(4)]
    alone = make_synthesis(tmp_path / "alone", teacher, TINY, 4)
    assert torch.equal(alone.make_batch(3), made[3])
    for a, b in zip(made[1:], made[:-1], strict=True):
        assert not torch.equal(a, b)
    images, labels = read_images(tmp_path / "run/images-00003.npz")
    assert torch.equal(images, made[3])
    assert torch.equal(labels, di.choose_labels(torch.arange(10), 4, TINY)[3])


@pytest.mark.parametrize(
    ("broken", "problem"),
    [("loss", "the loss is nan at step 16"), ("gradient", "batch 1 is not finite")],
)
def test_nan_stops_in_one_line_and_finished_files_stay(
    capsys, tmp_path, monkeypatch, broken, problem
):
    """Step 20 is the last of batch 1: its loss is finite if only its gradient is not."""
    synthesis = make_synthesis(tmp_path, make_teacher(), TINY, 2)
    synthesis.make_batch(0)
    synthesis_loss = di.synthesis_loss
    steps = list(range(11, 21))

    def poison(*rest):
        total, terms = synthesis_loss(*rest)
        step = steps.pop(0)
        if broken == "loss" and step == 16:
            return total * math.nan, terms * math.nan
        if broken == "gradient" and step == 20:
            return total * math.nan, terms
        return total, terms

    monkeypatch.setattr(di, "synthesis_loss", poison)
    says = read_refusal(capsys, synthesis.make_batch, 1)
    assert f"{problem}; lower --lr" in says
    assert [path.name for path in list_image_files(tmp_path)] == ["images-00000.npz"]


# Teachers

NETS = """
import torch.nn as nn

def pooled(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, num_classes))

def one_size(num_classes, image_size):
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(),
                         nn.Linear(3 * image_size**2, num_classes))

def without_batchnorm(num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

class TanhNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).tanh()

def derived(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), TanhNorm(4), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, num_classes))
"""


def describe_own_teacher(folder, name, image_size):
    """Options for a network of a user's own file."""
    path = folder / "nets.py"
    path.write_text(NETS)
    network = load_factory(f"{path}:{name}", 7, 3, image_size)
    torch.save(network.state_dict(), folder / "w.pth")
    return dict(
        teacher=f"{path}:{name}",
        weights=str(folder / "w.pth"),
        num_classes=7,
        image_size=image_size,
        batch_size=7,
    )


def test_images_of_an_odd_size_need_no_low_resolution(capsys, tmp_path):
    options = describe_own_teacher(tmp_path, "pooled", 9)
    args = replace(TINY, out=str(tmp_path / "run"), **options)
    says = read_refusal(capsys, di.main, args)
    assert "expected a multiple of 2" in says
    assert not (tmp_path / "run").exists()
    di.main(replace(args, iterations_low=0))
    images, labels = read_images(tmp_path / "run/images-00000.npz")
    assert images.shape == (7, 3, 9, 9)
    assert labels.tolist() == list(range(7))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["teacher_accuracy"] is None
    assert result["verifier"] is None


def test_a_teacher_is_tried_at_half_resolution_only_where_a_stage_needs_it(capsys, tmp_path):
    args = replace(TINY, **describe_own_teacher(tmp_path, "one_size", 16))
    says = read_refusal(capsys, di.load_checked_teacher, args, "cpu")
    assert "nets.py:one_size at 8 pixels" in says
    assert says.endswith("; pass --iterations-low 0")
    di.load_checked_teacher(replace(args, iterations_low=0), "cpu")


def test_remedies_are_those_of_the_device():
    assert di.list_remedies("--batch-size", "cpu") == "try a smaller --batch-size or --no-fused"
    assert "--no-graph" in di.list_remedies("--batch-size", "cuda")


def test_a_line_says_which_batchnorms_are_not_fused(capsys, tmp_path):
    options = describe_own_teacher(tmp_path, "derived", 8)
    di.main(replace(TINY, out=str(tmp_path / "run"), **options))
    lines = capsys.readouterr().out.splitlines()
    reason = "its BatchNorms are measured by hooks, because all are of another class (TanhNorm)"
    assert lines.count(f"teacher: {reason}") == 1


def test_a_teacher_without_batchnorm_is_refused(capsys, tmp_path):
    options = describe_own_teacher(tmp_path, "without_batchnorm", 16)
    args = replace(TINY, iterations_low=0, **options)
    says = read_refusal(capsys, di.load_checked_teacher, args, "cpu")
    assert "no BatchNorm" in says


def test_an_even_blur_is_refused():
    with pytest.raises(ValueError, match="--start-blur: expected an odd number, got 4"):
        replace(TINY, start_blur=4)


# Runs


def test_a_run_makes_images_that_teacher_and_verifier_judge(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(5, 81, 5))
    assert [row["batch"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert rows[3]["loss/total"] < 0.5 * rows[0]["loss/total"]
    images, labels = read_images(whole / "images-00000.npz")
    assert images.shape == (10, 1, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == list(range(10))
    result = json.loads((whole / "result.json").read_text())
    assert result["n_images"] == 40
    assert result["teacher_agreement"] >= 80
    assert set(result["teacher_agreement_by_class"]) == set("0123456789")
    assert result["verifier"] == "digits-lenet5"
    assert 0 <= result["verifier_agreement"] <= 100
    assert 0 < result["diversity"] < 2
    assert result["student_accuracy"] is None


def test_images_do_not_depend_on_the_verifier(whole, tmp_path):
    di.main(replace(DIGITS, out=str(tmp_path), num_images=10, verifier="none"))
    name = "images-00000.npz"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def read_image_bytes(out):
    return {path.name: path.read_bytes() for path in list_image_files(out)}


def test_a_removed_batch_is_made_again(whole, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    (out / "images-00001.npz").unlink()
    di.main(replace(DIGITS, out=str(out), resume=True))
    assert read_image_bytes(out) == read_image_bytes(whole)
    rows = sorted(rows_of(out), key=lambda row: row["step"])
    assert rows == rows_of(whole)


def change_labels(images, labels):
    return images, labels + 1


def make_smaller(images, labels):
    return images[:, :, ::2, ::2], labels


def drop_images(images, labels):
    return images[:5], labels[:5]


@pytest.mark.parametrize("change", [change_labels, make_smaller, drop_images])
def test_a_file_with_another_batch_is_refused(whole, tmp_path, capsys, change):
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    path = out / "images-00001.npz"
    save_images(path, *change(*read_images(path)))
    line = read_refusal(capsys, di.main, replace(DIGITS, out=str(out), resume=True))
    assert f"{path} holds no batch of this run" in line and "delete it" in line


class Noise(nn.Module):
    """Draws from PyTorch, numpy and python."""

    def forward(self, x):
        factor = random.uniform(0.5, 1) * np.random.uniform(0.5, 1)  # noqa: NPY002
        return x + 0.1 * factor * torch.randn_like(x)


def test_a_teacher_that_draws_gives_each_batch_its_own_numbers(tmp_path):
    """So that a run that goes on makes the batches of one that was never stopped."""
    teacher = make_teacher()
    teacher.insert(0, Noise())
    args = replace(TINY, verifier="none")
    images = []
    for order in ([0, 1], [1]):
        synthesis = make_synthesis(tmp_path / str(len(order)), teacher, args, n_batches=2)
        for number in order:
            torch.rand(1)  # something else draws too
            made = synthesis.make_batch(number)
        images.append(made)
    assert torch.equal(*images)


def test_random_numbers_go_on_behind_a_batch(tmp_path):
    drawn = []
    for makes_a_batch in (False, True):
        synthesis = make_synthesis(tmp_path / str(makes_a_batch), make_teacher(), TINY)
        torch.manual_seed(5)
        random.seed(5)
        if makes_a_batch:
            synthesis.make_batch(0)
        drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]


def test_a_student_that_competes_learns_the_same_parameters_afterwards(tmp_path):
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Flatten(), nn.Linear(4, 10))
    student[0].requires_grad_(False)
    args = replace(TINY, student="resnet8", competition="js", batches_per_epoch=1)
    synthesis = make_synthesis(tmp_path, make_teacher(), args)
    synthesis.make_competing_batch(0, student)
    assert [p.requires_grad for p in student.parameters()] == [False, False, True, True]


def run_two_processes(out, options=""):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "deepinversion.py --setting digits --batch-size 10 --num-images 40 --iterations 20"
    programs = []
    for rank in "01":
        group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        group |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        program = scripts.start(f"{command} --log-every 5 {options}", out, environment=group)
        programs.append(program)
    for program in programs:
        code, _, errors = program.finish()
        assert code == 0, errors


def test_two_processes_share_the_batches_of_one(whole, tmp_path):
    out = tmp_path / "run"
    run_two_processes(out)
    assert read_image_bytes(out) == read_image_bytes(whole)
    assert (out / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert json.loads((out / "result.json").read_text())["ranks"] == 2
    for folder, batches in ((out, [0, 2]), (out / "rank1", [1, 3])):
        rows = rows_of(folder)
        assert [row["batch"] for row in rows] == [batches[0]] * 4 + [batches[1]] * 4
        assert [row["step"] for row in rows] == list(range(5, 41, 5))

    (out / "images-00003.npz").unlink()
    run_two_processes(out, "--resume")
    assert read_image_bytes(out) == read_image_bytes(whole)


# What is reported of images


def save_set(folder, images, labels, split):
    for number, (x, y) in enumerate(
        zip(images.split(split), torch.tensor(labels).split(split), strict=True)
    ):
        di.save_images(di.get_image_path(folder, number), x, y)
    return list_image_files(folder)


def test_agreement_counts_all_files_and_each_class_in_the_networks_own_units(tmp_path):
    """The network's class is the brighter pixel after normalising: of (100, 60) the second."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    network[1].weight.data = torch.eye(2)
    info = replace(TINY_INFO, num_classes=2, mean=(0.0, 0.0), std=(1.0, 0.25))
    pixels = torch.tensor([[200, 10], [100, 60], [100, 60], [0, 200]], dtype=torch.uint8)
    paths = save_set(tmp_path, pixels.view(4, 2, 1, 1), [0, 0, 1, 1], split=3)
    assert di.measure_agreement(network, info, paths) == (75.0, {0: 50.0, 1: 100.0})


def test_diversity_is_the_distance_to_the_nearest_image_of_the_same_class():
    info = replace(TINY_INFO, num_classes=2, mean=(0.0,), std=(1.0,))
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    pixels = torch.tensor([[200, 0], [0, 200], [100, 0], [200, 0]], dtype=torch.uint8)
    images = pixels.view(4, 1, 1, 2)

    def measure(n, labels, network=network):
        return di.measure_diversity(network, info, images[:n], torch.tensor(labels))

    assert measure(2, [0, 0]) == 1.0  # at a right angle
    assert measure(4, [0, 0, 0, 1]) == pytest.approx(
        1 / 3, abs=1e-4
    )  # two have a copy, one has not
    assert measure(2, [0, 1]) is None  # no two of a class
    assert measure(4, [0, 0, 0, 1], nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten())) is None


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_captured_step_is_the_eager_one_and_never_waits(fused, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    args = replace(di.CIFAR10, device="cuda", fused=fused, alpha_l2=1e-5, alpha_tv_l1=1e-3)
    teacher, info = load_trained("cifar10-resnet20", "cuda", "data")
    noise, draws = di.sample_randomness(0, (20, 3, 32, 32), args)
    results = []
    for graph in (False, True):
        args = replace(args, graph=graph)
        watched = di.watch_batchnorms(copy.deepcopy(teacher), noise[:4].cuda(), args, "cuda")
        target = di.Target(torch.arange(20, device="cuda") % 10, watched, None)
        x = noise.to("cuda", memory_format=torch.channels_last).requires_grad_()
        bounds = get_pixel_range(info, "cuda")
        (stage,) = di.list_stages(args)
        steps = di.optimise_images(x, draws[0][:12].to("cuda"), stage, target, bounds, args)
        for n, terms in enumerate(steps):  # noqa: B007
            torch.cuda.set_sync_debug_mode("error" if n >= 4 else "default")
        torch.cuda.set_sync_debug_mode("default")
        results.append((x.detach().clone(), terms.clone()))
    for eager, captured in zip(*results, strict=True):  # a competition that is not there is NaN
        torch.testing.assert_close(captured, eager, rtol=0, atol=0, equal_nan=True)
