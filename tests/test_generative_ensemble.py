"""generative_ensemble.py: sizes, terms against hand-made cases, one ensemble against its generators, whole runs."""

import doctest
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import n_parameters, rows_of, script_runs

import generative_ensemble as ge
import kernels
from kernels import _common, augment, contract, distributed

FAST = dict(steps=4, batch_size=20, width=4, latent=6, epochs=2, iterations=2, student_batch=20, generators=5)
run, refused = script_runs(ge, FAST)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """Scripts run the CPU path: the interpreter would take minutes. One line of stderr is checked: fix the name."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(sys, "argv", ["generative_ensemble.py"])


@pytest.fixture(autouse=True)
def few_real_images(monkeypatch):
    """Sixty test images measure as well as all for what is tested here."""

    def few(teacher, args):
        dataset, test = real_images(teacher, args)
        return dataset, test and tuple(v[:60] for v in test)

    real_images = ge.real_images
    monkeypatch.setattr(ge, "real_images", few)


def shape_of(groups, latent=6, width=8, stages=2, channels=1, image_size=32):
    return dict(groups=groups, latent=latent, width=width, stages=stages, channels=channels, image_size=image_size)


class Generator(nn.Module):
    """One generator by the table of layers, out of PyTorch's modules; x: noise and one-hot label."""

    def __init__(self, inputs, widths, channels, side):
        super().__init__()
        self.shape = (widths[0], side, side)
        self.dense = nn.Linear(inputs, math.prod(self.shape), bias=False)
        self.bn0 = nn.BatchNorm2d(widths[0])
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 1, 1, bias=False) for a, b in pairs])
        self.bns = nn.ModuleList([nn.BatchNorm2d(width, 0.8) for width in widths])
        self.last, self.bn_last = nn.Conv2d(widths[-1], channels, 3, 1, 1), nn.BatchNorm2d(channels, 0.8)

    def forward(self, x):
        x = F.leaky_relu(self.bn0(self.dense(x).view(-1, *self.shape)), 0.2)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.leaky_relu(bn(conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))), 0.2)
        return self.bn_last(self.last(x).tanh())


def separate(ensemble):
    """The generators of an ensemble, one by one, as plain modules with its weights."""
    shape, G = ensemble.shape, len(ensemble.dense)
    widths = [shape["width"] // (i + 1) for i in range(shape["stages"])]
    inputs, side = ensemble.dense.shape[1], shape["image_size"] // 2 ** shape["stages"]
    generators = []
    for g in range(G):
        one = Generator(inputs, widths, shape["channels"], side)
        with torch.no_grad():
            one.dense.weight.copy_(ensemble.dense[g].T)
            for conv, weight in zip((*one.convs, one.last), (*ensemble.convs, ensemble.last), strict=True):
                conv.weight.copy_(weight.unflatten(0, (G, -1))[g])
            one.last.bias.copy_(ensemble.bias.unflatten(0, (G, -1))[g])
            one.bn_last.weight.copy_(ensemble.scale.unflatten(0, (G, -1))[g])
        one.bn_last.bias.requires_grad_(False)  # it has none
        generators.append(one)
    return generators


def conditioned(ensemble, z, place):
    """What enters generator g, (n, z + labels), for each g."""
    onehot = F.one_hot(place, ensemble.classes.shape[1]).float()
    return torch.cat([z, onehot], 2).unbind(1)


def teacher_of(name="digits-resnet8", **options):
    return ge.load(name, ge.Args(device="cpu", **options))


def state_of(**options):
    """A Distiller of digits, and what observes its teacher."""
    args = ge.Args(device="cpu", **(FAST | options))
    torch.manual_seed(0)
    teacher = teacher_of()
    setting = ge.choose_setting(args, "digits", teacher)
    groups = [list(range(own.start, own.stop)) for own in distributed.slices(10, setting["generators"])]
    ensemble = ge.Ensemble(shape_of(groups, setting["latent"], setting["width"])).initialise()
    student = ge.load("lenet5_half", args, teacher=teacher, fresh=True)
    state = ge.Distiller(teacher, student, ensemble, setting, args)
    return state, ge.Observed(teacher.model, state.n_parts, setting["fused"])


# Generators


@pytest.mark.parametrize("latent", [100, 256])
@pytest.mark.parametrize("n_classes", [1, 10, 100])
def test_a_generator_has_the_released_size(latent, n_classes):
    ensemble = ge.Ensemble(shape_of([list(range(n_classes))], latent, 128, channels=3))
    assert n_parameters(ensemble) == 223_558 + 8192 * (latent + n_classes)


def test_parameters_of_an_ensemble_and_of_five_stages():
    one, ten = (ge.Ensemble(shape_of([[k] for k in range(n)], 32, 16)) for n in (1, 10))
    assert n_parameters(ten) == 10 * n_parameters(one)
    large = ge.Ensemble(shape_of([[0]], 100, 128, 5, 3, 224))
    assert [w.shape[0] for w in large.convs] == [128, 64, 42, 32, 25]
    assert n_parameters(large) == pytest.approx(0.90e6, rel=0.01)


@pytest.mark.parametrize(("size", "stages"), [(28, 2), (32, 2), (64, 3), (224, 5)])
def test_image_sizes(size, stages):
    teacher = teacher_of()
    teacher.image_size = size
    assert ge.choose_setting(ge.Args(width=8), "digits", teacher)["stages"] == stages
    ensemble = ge.Ensemble(shape_of([[0, 1], [2]], width=10, stages=stages, channels=3, image_size=size)).initialise()
    x, labels = ensemble(*ensemble.draw(2))
    assert x.shape == (4, 3, size, size) and labels.shape == (4,)
    assert x.isfinite().all() and x.std() > 0.01


def test_epsilons_and_an_output_that_is_scaled_but_not_shifted():
    torch.manual_seed(0)
    ensemble = ge.Ensemble(shape_of([[0], [1], [2]], channels=3)).initialise()
    assert (ensemble.bn0.eps, *[bn.eps for bn in ensemble.bns], ensemble.bn_last.eps) == (1e-5, 0.8, 0.8, 0.8)
    assert all(bn.momentum == 0.1 for bn in (ensemble.bn0, *ensemble.bns, ensemble.bn_last))
    assert ensemble.bn0.affine and not ensemble.bn_last.affine and ensemble.scale.shape == (9,)
    with torch.no_grad():
        ensemble.bias.normal_()
        drawn, factors = ensemble.draw(6), torch.arange(1.0, 10.0)
        x = ensemble(*drawn)[0].unflatten(0, (6, 3))  # (n, G, C, H, W)
        ensemble.scale.copy_(factors)
        scaled = ensemble(*drawn)[0].unflatten(0, (6, 3))
    assert torch.allclose(x.mean((0, 3, 4)), torch.zeros(3, 3), atol=1e-4)  # of each generator's each channel
    assert torch.allclose(scaled, x * factors.view(3, 3, 1, 1), rtol=1e-4, atol=1e-5)


def test_initial_weights_are_xaviers_of_one_generator():
    ensemble = ge.Ensemble(shape_of([[k] for k in range(10)], 31, 16)).initialise()
    fans = {ensemble.dense: 32 + 16 * 64, ensemble.convs[0]: 9 * 32, ensemble.convs[1]: 9 * 24, ensemble.last: 9 * 9}
    for weight, fan in fans.items():
        limit = math.sqrt(6 / fan)
        assert 0.9 * limit < weight.abs().max() <= limit
    assert not ensemble.bias.any()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_an_ensemble_is_its_generators(stages):
    """Images, their gradients in all weights, and running moments; labels are those of the generator's classes."""
    torch.manual_seed(0)
    ensemble = ge.Ensemble(shape_of([[3, 1, 4], [5, 9], [2, 6]], stages=stages, channels=3)).initialise()
    generators = separate(ensemble)
    z, place = ensemble.draw(4)
    x, labels = ensemble(z, place)
    x = x.unflatten(0, (4, 3))
    cotangent = torch.randn_like(x)
    (x * cotangent).sum().backward()
    groups = ensemble.shape["groups"]
    expected = [[groups[g][place[i, g]] for g in range(3)] for i in range(4)]
    assert labels.view(4, 3).tolist() == expected
    for g, (one, inputs) in enumerate(zip(generators, conditioned(ensemble, z, place), strict=True)):
        y = one(inputs)
        assert torch.allclose(x[:, g], y, atol=1e-5)
        (y * cotangent[:, g]).sum().backward()
        assert torch.allclose(ensemble.dense.grad[g].T, one.dense.weight.grad, atol=1e-3)
        assert torch.allclose(ensemble.last.grad.unflatten(0, (3, -1))[g], one.last.weight.grad, atol=1e-3)
        assert torch.allclose(ensemble.scale.grad.unflatten(0, (3, -1))[g], one.bn_last.weight.grad, atol=1e-3)
        assert torch.allclose(ensemble.bn0.running_var.unflatten(0, (3, -1))[g], one.bn0.running_var, atol=1e-5)


def test_labels_are_drawn_evenly_from_a_generators_classes():
    torch.manual_seed(0)
    ensemble = ge.Ensemble(shape_of([[0, 1, 2, 3], [4, 5, 6], [7]])).initialise()
    _, place = ensemble.draw(4000)
    counts = [place[:, g].bincount(minlength=4).tolist() for g in range(3)]
    assert counts[1][3] == 0 and counts[2] == [4000, 0, 0, 0]
    assert all(abs(n - 1000) < 120 for n in counts[0]) and all(abs(n - 1333) < 120 for n in counts[1][:3])


def test_a_part_makes_the_images_that_it_makes_in_the_whole():
    torch.manual_seed(0)
    whole = ge.Ensemble(shape_of([[0, 1], [2, 3], [4]])).initialise()
    part = whole.part(slice(1, 3))
    draws = []
    for ensemble in (whole, part):
        torch.manual_seed(1)
        draws.append(ensemble.draw(3))
    x, labels = whole(*draws[0])
    y, its_labels = part(*draws[1])
    assert torch.allclose(x.unflatten(0, (3, 3))[:, 1:], y.unflatten(0, (3, 2)), atol=1e-6)
    assert labels.view(3, 3)[:, 1:].flatten().tolist() == its_labels.tolist()


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_a_frozen_ensemble_does_not_change(bn):
    ensemble = ge.Ensemble(shape_of([[0, 1], [2]])).initialise()
    ensemble(*ensemble.draw(4))
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    ensemble.freeze(bn)
    z, place = ensemble.draw(4)
    x, _ = ensemble(z, place)
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items()) and not x.requires_grad
    alone, _ = ensemble(z[:2], place[:2])
    assert torch.allclose(alone, x[:4], atol=1e-5) == (bn == "running")  # else the batch decides


# Moments


def moments_by_hand(model, x):
    """[(mean - running mean, biased variance), running variance] of each BatchNorm's input, by hooks and torch."""
    found = []

    def hook(bn, inputs):
        channels = inputs[0].movedim(1, 0).flatten(1)  # (C, n)
        found.append((channels.mean(1) - bn.running_mean, channels.var(1, unbiased=False), bn.running_var))

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    logits = model(x)
    for handle in hooks:
        handle.remove()
    return logits, found


@pytest.mark.parametrize("fused", [True, False])
def test_pooled_moments_are_those_of_forward_hooks(fused):
    model, x = teacher_of().model, torch.randn(6, 1, 32, 32)
    logits, found = moments_by_hand(model, x)
    for n_parts in (1, 3):
        observe = ge.Observed(model, n_parts, fused)
        its_logits, moments, running_var, sizes = observe(x)
        observe.close()
        assert sizes == tuple(len(v) for _, _, v in found) and moments.shape == (2, n_parts, sum(sizes))
        assert torch.allclose(its_logits, logits, atol=1e-4)
        for i, row in enumerate(ge.pooled(moments)[:, 0]):  # of three parts by the law of total variance
            assert torch.allclose(row, torch.cat([f[i] for f in found]), atol=1e-4)
        assert torch.equal(running_var, torch.cat([f[2] for f in found]))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fused", [True, False])
def test_moments_of_each_generator_are_those_of_its_images_alone(fused):
    x = torch.randn(6, 1, 32, 32)
    _, moments, _, _ = ge.Observed(teacher_of().model, 3, fused)(x)
    for g in range(3):
        _, found = moments_by_hand(teacher_of().model, x[g::3])  # image i G + g is of generator g
        for row, part in zip(moments[:, g], range(2), strict=True):
            assert torch.allclose(row, torch.cat([f[part] for f in found]), atol=1e-4)


def test_moment_losses_by_hand():
    """Two layers, of two channels and of one; distances 3, 4 and 2 of the means, 0, 0 and 5 of the variances."""
    moments, running_var = torch.tensor([[[3.0, 4.0, 2.0]], [[1.0, 1.0, 6.0]]]), torch.ones(3)
    two = torch.cat([moments, torch.tensor([[[0.0] * 3], [[1.0] * 3]])], 1)  # beside a part that has nothing to match
    kl = [(9 + 1 - 1) / 2, (16 + 1 - 1) / 2, (-math.log(6) + 6 + 4 - 1) / 2]
    expected = {"l2": 5 + 0 + 2 + 5, "squared": 25 + 0 + 4 + 25, "gaussian-kl": sum(kl)}
    for form, value in expected.items():
        for fused in (True, False):
            found = ge.moment_loss(moments, running_var, (2, 1), form, fused)
            assert found.item() == pytest.approx(value, rel=1e-4), form
            assert ge.moment_loss(two, running_var, (2, 1), form, fused).item() == pytest.approx(value / 2, rel=1e-4)
    kl_of = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.7, math.sqrt(2.0)), torch.distributions.Normal(0.0, math.sqrt(3.0))
    )
    found = ge.moment_loss(torch.tensor([[[0.7]], [[2.0]]]), torch.tensor([3.0]), (1,), "gaussian-kl", True)
    assert found.item() == pytest.approx(kl_of.item(), rel=1e-4)
    for form in expected:  # nothing to match, and a dead channel
        still = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]], requires_grad=True)
        loss = ge.moment_loss(still, torch.tensor([1.0, 0.0]), (2,), form, True)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6) and still.grad.abs().max() < 1e-5


class TwoClasses(nn.Sequential):
    """A teacher whose only BatchNorm has seen images of two kinds, all -1 and all +1, each plus noise."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
        self[0].running_var.fill_(1.25)  # E[var] + Var[mean] = 1/4 + 1; the mean is 0
        self.eval()


def test_one_class_alone_cannot_have_the_moments_of_all():
    """Law of total variance: classes that are as the data pool to the stored moments, and none of them has them."""
    noise = 0.5 * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise + torch.tensor([-1.0, 1.0]).repeat(200).view(-1, 1, 1, 1)  # classes in turn, as of two generators
    model = TwoClasses()
    for form in ("l2", "squared", "gaussian-kl"):
        pooled, own = (ge.moment_loss(*ge.Observed(model, P, True)(x)[1:], form, True).item() for P in (1, 2))
        exact = {"l2": 2.0, "squared": 2.0, "gaussian-kl": (math.log(5) + 1 - 1) / 2}[form]  # mean off by 1, var by 1
        assert pooled < 0.02 and own == pytest.approx(exact, abs=0.05), form


def test_a_single_class_that_matches_alone_is_no_longer_that_class():
    """What --pool 0 asks of it: one class's images, moved by gradient steps, spread until they look like both."""
    spread = {}
    for n_parts in (1, 2):
        x = 0.5 * torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        x = (x + torch.tensor([-1.0, 1.0]).repeat(50).view(-1, 1, 1, 1)).requires_grad_()
        observe = ge.Observed(TwoClasses(), n_parts, True)
        for _ in range(60):
            loss = ge.moment_loss(*observe(x)[1:], "squared", True)
            x = (x - 200 * torch.autograd.grad(loss, x)[0]).detach().requires_grad_()
        spread[n_parts] = x[1::2].mean().item()
    assert spread[1] == pytest.approx(1, abs=0.05) and abs(spread[2]) < 0.1


def test_terms_and_their_weights():
    torch.manual_seed(0)
    x, labels, logits = torch.randn(6, 1, 32, 32), torch.arange(6), torch.randn(6, 10)
    means = torch.tensor([[3.0, 4.0, 5.0, 12.0], [-3.0, -4.0, -5.0, -12.0]])  # two parts of two layers of two channels
    answers = (logits, torch.stack([means, torch.ones(2, 4)]), torch.ones(4), (2, 2))
    setting = state_of(alpha_tv=0.5, alpha_l2=0.1)[0].setting | dict(pool=0.0, moments="l2")
    terms = ge.generator_terms(x, labels, answers, setting)
    tv, _ = kernels.total_variation_ref(x)
    expected = [F.cross_entropy(logits, labels), 5.0 + 13.0, tv, x.square().sum((1, 2, 3)).sqrt().mean()]
    assert terms.tolist() == pytest.approx([float(v) for v in expected], rel=1e-5)
    assert ge.generator_terms(x, labels, answers, setting | dict(alpha_tv=0, alpha_l2=0))[2:].tolist() == [0, 0]
    first, last = math.hypot(9, 16), math.hypot(25, 144)  # pooled, the means cancel; their spread is variance
    for share, bn in ((1.0, first + last), (0.5, 5 + last)):
        assert ge.generator_terms(x, labels, answers, setting | dict(pool=share))[1].item() == pytest.approx(bn)


# Steps


def steps_of_separate_generators(ensemble, setting, teacher, n_steps):
    """Losses of each generator, trained alone: its own images, its own moments, its own Adam; (steps, G)."""
    generators, found = separate(ensemble), []
    torch.manual_seed(7)
    optimizers = [torch.optim.Adam([p for p in one.parameters() if p.requires_grad], 1.0) for one in generators]
    for step in range(n_steps):
        z, place = ensemble.draw(setting["batch_size"] // len(generators))
        row = []
        for g, inputs in enumerate(conditioned(ensemble, z, place)):
            labels = torch.tensor(ensemble.shape["groups"][g])[place[:, g]]
            logits, found_g = moments_by_hand(teacher, generators[g](inputs))
            bn = sum((m.norm() + (v - running_var).norm()) for m, v, running_var in found_g)
            loss = F.cross_entropy(logits, labels) + setting["alpha_bn"] * bn
            optimizers[g].param_groups[0]["lr"] = (
                setting["lr_generator"] * (1 + math.cos(math.pi * step / setting["steps"])) / 2
            )
            optimizers[g].zero_grad()
            loss.backward()
            optimizers[g].step()
            row.append(loss.item())
        found.append(row)
    return torch.tensor(found)


@pytest.mark.parametrize("fused", [True, False])
def test_generators_that_train_together_are_those_that_train_alone(fused):
    """With moments of their own: the losses of the first steps, to 1e-4 of their size."""
    state, observe = state_of(pool=0.0, fused=fused, steps=8, lr_generator=2e-3)
    together, before = [], state.ensemble.part(slice(None))
    torch.manual_seed(7)
    for _ in range(4):
        state.sums.zero_()
        ge.generator_step(state, observe)
        together.append((state.weights * state.sums[:4]).sum().item())
    alone = steps_of_separate_generators(before, state.setting, teacher_of().model, 4)
    assert together == pytest.approx(alone.mean(1).tolist(), rel=1e-4)
    assert together[3] < together[0]


def test_pooled_generators_learn_on_one_pooled_batch():
    """One Adam over all generators on the mean cross-entropy and the moments of all images."""
    state, observe = state_of(pool=1.0, steps=8, lr_generator=2e-3)
    before, setting = separate(state.ensemble), state.setting
    adam = torch.optim.Adam([p for one in before for p in one.parameters() if p.requires_grad], 1.0)
    together, expected = [], []
    torch.manual_seed(7)
    for _ in range(3):
        state.sums.zero_()
        ge.generator_step(state, observe)
        together.append((state.weights * state.sums[:4]).sum().item())
    torch.manual_seed(7)
    for step in range(3):
        z, place = state.ensemble.draw(4)
        inputs = conditioned(state.ensemble, z, place)
        x = torch.stack([one(i) for one, i in zip(before, inputs, strict=True)], 1).flatten(0, 1)
        logits, found = moments_by_hand(state.teacher.model, x)
        labels = (place + 2 * torch.arange(5)).flatten()  # two classes a generator
        bn = sum((m.norm() + (v - running_var).norm()) for m, v, running_var in found)
        loss = F.cross_entropy(logits, labels) + setting["alpha_bn"] * bn
        adam.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / 8)) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())
    assert together == pytest.approx(expected, rel=1e-4)


def test_shifts_move_whole_images_and_repeat_edges():
    torch.manual_seed(0)
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    padded, seen = F.pad(x[:1], (2, 2, 2, 2), mode="replicate"), set()
    for image in augment.shifted(x, 2):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[0, :, i : i + 8, j : j + 8], image)]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 25


def test_cut_images_have_a_band_of_another():
    torch.manual_seed(0)
    x = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 1, 8, 8)
    y, kinds = augment.cut(x), {"whole": 0, "rows": 0, "columns": 0}
    for i, image in enumerate(y[:, 0]):
        foreign = image != i
        assert len(image.unique()) <= 2
        if not foreign.any():
            kinds["whole"] += 1
            continue
        rows = bool((foreign == foreign[:, :1]).all())
        kinds["rows" if rows else "columns"] += 1
        line = (foreign[:, 0] if rows else foreign[0]).int()
        assert (foreign == foreign[:, :1]).all() or (foreign == foreign[:1]).all()
        assert (line.diff() == 1).sum() <= 1  # one band
    assert 180 < kinds["whole"] < 270 and kinds["columns"] > 60 and kinds["rows"] > 60, kinds


def test_a_student_step_is_distillation():
    """KL of the student from the teacher at T times T^2, on the frozen ensemble's images, with one Adam step."""
    state, _ = state_of(temperature=4.0, bn="batch", shift=0, cut=False)
    ensemble = state.ensemble.part(slice(None)).freeze("batch")
    plain = ge.load("lenet5_half", ge.Args(device="cpu"), teacher=state.teacher, fresh=True).model
    plain.load_state_dict(state.student.state_dict())
    adam = torch.optim.Adam(plain.parameters(), state.setting["lr_student"])
    torch.manual_seed(3)
    ge.student_step(state, ensemble)
    torch.manual_seed(3)
    x, _ = ensemble(*ensemble.draw(4))
    t, s = state.teacher.model(x) / 4, plain(x) / 4
    loss = 16 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    loss.backward()
    adam.step()
    assert state.sums[5].item() == pytest.approx(loss.item(), rel=1e-4)
    for p, q in zip(state.student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


# Runs


def test_a_run_writes_everything(tmp_path):
    result = run(tmp_path / "run", steps=8, epochs=2)
    rows = rows_of(tmp_path / "run")
    generators, student = [r for r in rows if "step" in r], [r for r in rows if "epoch" in r]
    assert [r["step"] for r in generators] == list(range(1, 9)) and [r["epoch"] for r in student] == [1, 2]
    assert generators[-1]["loss/bn"] < generators[0]["loss/bn"]
    assert result["student_accuracy"] == pytest.approx(student[-1]["eval/acc"], abs=1e-3)
    keys = {"teacher_accuracy", "student_accuracy", "seconds", "seed", "device", "versions", "setting"}
    assert keys < set(result) and len(result["class_accuracies"]) == 10 and 0 <= result["hits"] <= 100
    assert result["generator_parameters"] == n_parameters(ge.Ensemble(shape_of([[0, 1]], 6, 4)))
    assert set(result["diversity"]) == set(result["real_diversity"]) == {"pixels", "features"}
    names = "args.json metrics.jsonl result.json samples.png checkpoint.pt student.pt ensemble.pt"
    assert all((tmp_path / "run" / name).stat().st_size > 0 for name in names.split())
    saved = torch.load(tmp_path / "run/student.pt", weights_only=True)
    assert saved["arch"] == "lenet5" and saved["method"] == "generative_ensemble"
    assert not list((tmp_path / "run").glob("*.part"))


def test_fused_and_plain_runs_begin_alike(tmp_path):
    """Pooled and own moments, both paths: the losses of the first steps."""
    for pool in (1.0, 0.5):
        rows = []
        for fused in (True, False):
            run(tmp_path / f"{pool}{fused}", pool=pool, fused=fused, alpha_tv=0.1, steps=2, epochs=1)
            rows.append(rows_of(tmp_path / f"{pool}{fused}"))
        for first, second in zip(*rows, strict=True):
            for name in first.keys() & {"loss/ce", "loss/bn", "loss/tv", "loss/student"}:
                assert first[name] == pytest.approx(second[name], rel=1e-4), name


def test_an_ensemble_is_reloaded_sampled_and_teaches_a_second_student(tmp_path, capsys):
    run(tmp_path / "first", temperature=2.0)
    file = str(tmp_path / "first/ensemble.pt")
    before = (tmp_path / "first/ensemble.pt").read_bytes()
    result = run(tmp_path / "second", ensemble=file, student="lenet5_half", epochs=1, generators=None)
    assert not [r for r in rows_of(tmp_path / "second") if "step" in r] and result["student"] == "lenet5_half"
    assert result["setting"]["generators"] == 5 and result["setting"]["latent"] == 6
    ge.main(ge.Args(ensemble=file, sample=40, out=str(tmp_path / "grid"), device="cpu"))
    ge.main(ge.Args(sample=40, out=str(tmp_path / "first"), device="cpu"))  # of the run itself
    grids = [(tmp_path / name / "samples.png").read_bytes() for name in ("grid", "first")]
    assert grids[0] == grids[1] and (tmp_path / "first/ensemble.pt").read_bytes() == before
    run(tmp_path / "first", ensemble=file, student="lenet5_half", epochs=1)  # into the folder that has it
    assert (tmp_path / "first/ensemble.pt").read_bytes() == before


def test_sample_classes_gives_each_class_its_row():
    torch.manual_seed(0)
    ensemble = ge.Ensemble(shape_of([[0, 3], [1], [2]])).initialise()

    class Marked:
        classes = ensemble.classes

        def draw(self, n):
            return ensemble.draw(n)

        def __call__(self, z, place):
            x, labels = ensemble(z, place)
            return labels.view(-1, 1, 1, 1).float().expand_as(x), labels

    images = ge.sample_classes(Marked(), 22, 2)
    assert images.shape == (4, 5, 1, 32, 32)
    assert all((x == k).all() for k, x in enumerate(images))
    assert ge.sample_classes(Marked(), 3, 2).shape[:2] == (3, 1)


def assert_same_run(whole, cut):
    for name in ("metrics.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    a, b = (torch.load(n / "checkpoint.pt", weights_only=True)["state"]["networks"] for n in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (torch.load(n / "ensemble.pt", weights_only=True)["state_dict"] for n in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_run_resumes_bit_exactly(tmp_path, monkeypatch, at):
    """Cut in stage 1 and in stage 2, after a row and before its checkpoint."""
    options, after = dict(steps=3, epochs=3, optimizer="sgd"), ge.Run.after

    def interrupted(self, bar, row):
        if len(self.lines) == at:
            self.show(bar, row)
            raise KeyboardInterrupt
        after(self, bar, row)

    run(tmp_path / "whole", **options)
    monkeypatch.setattr(ge.Run, "after", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", **options)
    monkeypatch.setattr(ge.Run, "after", after)
    run(tmp_path / "cut", **options, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def command_of(**options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (FAST | options).items()]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    return [str(contract.ROOT / "generative_ensemble.py"), "--device=cpu", *flags, "--out"], environment


def test_a_killed_run_resumes_bit_exactly(tmp_path):
    """SIGKILL in each stage, in a process of its own, then --resume; beside a run that was never cut."""
    options = dict(steps=20, epochs=6, student_batch=10, dataset="none")
    command, environment = command_of(**options)
    command = [sys.executable, *command]
    run(tmp_path / "whole", **options)
    for word in ('"step"', '"epoch"'):
        resume = ["--resume"] if word == '"epoch"' else []
        with subprocess.Popen(
            [*command, str(tmp_path / "cut"), *resume], env=environment, stdout=subprocess.DEVNULL
        ) as cut:
            until, rows, seen = time.time() + 60, tmp_path / "cut/metrics.jsonl", ""
            while seen.count(word) < 2 and cut.poll() is None and time.time() < until:
                seen = rows.read_text() if rows.exists() else ""
                time.sleep(0.002)
            cut.send_signal(signal.SIGKILL)
        assert cut.returncode == -signal.SIGKILL and not (tmp_path / "cut/result.json").exists()
    resumed = subprocess.run([*command, str(tmp_path / "cut"), "--resume"], env=environment, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert b"step        " not in resumed.stdout and b"epoch        6" in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_ranks_train_the_generators_that_one_trains(tmp_path):
    """torchrun over gloo: with moments of their own the split changes nothing; each rank has its part alone."""
    options = dict(pool=0.0, generators=5, steps=4, epochs=1, lr_generator=1e-3, dataset="none")
    command, environment = command_of(**options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", command[0]]
    both = subprocess.run([*launch, *command[1:], str(tmp_path / "two")], env=environment, capture_output=True)
    assert both.returncode == 0, both.stderr[-2000:]
    run(tmp_path / "one", **options)
    one, two = (torch.load(tmp_path / n / "ensemble.pt", weights_only=True) for n in ("one", "two"))
    assert one["shape"] == two["shape"]
    for key, value in one["state_dict"].items():  # Adam makes whole steps of rounding where a gradient is near 0: mean
        assert (value.float() - two["state_dict"][key].float()).abs().mean() < 1e-4, key
    parts = [tmp_path / "two/checkpoint.pt", tmp_path / "two/rank1/checkpoint.pt"]
    sizes = [torch.load(p, weights_only=True)["state"]["networks"]["ensemble.dense"].shape[0] for p in parts]
    assert sizes == [3, 2] and (tmp_path / "two/result.json").exists()
    assert not (tmp_path / "two/rank1/student.pt").exists()


def damaged_checkpoints(saved):
    def with_state(**state):
        return saved | {"state": saved["state"] | state}

    optimizers = saved["state"]["optimizers"]
    yield with_state(optimizers={"student": optimizers["student"]})
    yield with_state(optimizers=optimizers | {"generator": {"state": {}}})
    yield with_state(networks=saved["state"]["networks"] | {"epoch": torch.tensor(0.0)})
    yield {k: v for k, v in saved.items() if k != "options"}
    yield {"state_dict": {}}


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path, capsys):
    run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for damaged in damaged_checkpoints(saved):
        torch.save(damaged, tmp_path / "checkpoint.pt")
        assert "run without --resume" in refused(capsys, out=str(tmp_path), resume=True)
        assert (tmp_path / "student.pt").exists() and (tmp_path / "ensemble.pt").exists()  # nothing is lost
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert "moments" in refused(capsys, out=str(tmp_path), resume=True, moments="squared")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def altered_ensembles(saved):
    """(an ensemble.pt that cannot be used, what its refusal says)"""
    state, shape = saved["state_dict"], saved["shape"]
    yield saved | dict(shape=shape | dict(groups=[[0, 1], [2, 3], [4, 5], [6, 7], [8, 8]])), "no ensemble of this"
    yield saved | dict(shape=shape | dict(groups=shape["groups"][:4])), "no ensemble of this"
    yield saved | dict(bn="other"), "no ensemble of this"
    yield saved | dict(state_dict=state | dict(dense=state["dense"] / 0)), "not finite"
    yield saved | dict(mean=[0.2, 0.2]), "no ensemble of this"
    yield saved | dict(mean=[0.2]), "its mean is [0.2]"
    yield {"state_dict": state}, "no ensemble of this"
    yield {"x": Hostile()}, "no safe checkpoint"


def test_ensembles_that_do_not_fit_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run")
    file, options = tmp_path / "run/ensemble.pt", dict(out=str(tmp_path / "new"), ensemble="run/ensemble.pt")
    foreign = dict(teacher="cifar10-resnet20", dataset="none", student="lenet5")
    assert "its mean is [0.305" in refused(capsys, **options, **foreign)
    assert "its mean is" in refused(capsys, **options, teacher="mnist-resnet8", dataset="none")
    saved = torch.load(file, weights_only=True)
    assert (
        saved["shape"]["groups"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and saved["teacher"] == "digits-resnet8"
    )
    fewer = ge.Ensemble(saved["shape"] | dict(groups=[[0, 1], [2]]))
    torch.save(saved | dict(shape=fewer.shape, state_dict=fewer.state_dict()), file)
    assert "its num_classes is 3, the teacher's 10" in refused(capsys, **options)
    larger = ge.Ensemble(saved["shape"] | dict(image_size=64, stages=3))
    torch.save(saved | dict(shape=larger.shape, state_dict=larger.state_dict()), file)
    assert "its image_size is 64, the teacher's 32" in refused(capsys, **options)
    for damaged, says in altered_ensembles(saved):
        torch.save(damaged, file)
        assert says in refused(capsys, **options), says
    assert not (tmp_path / "hostile").exists() and not (tmp_path / "new").exists()
    assert "cannot be read" in refused(capsys, out=str(tmp_path / "new"), ensemble="nowhere.pt")
    assert "cannot be read" in refused(capsys, out=str(tmp_path / "new"), sample=10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(generators=11), "--generators 11: expected 1 to 10 (classes", id="generators"),
        pytest.param(dict(generators=0), "--generators: expected at least 1", id="no-generators"),
        pytest.param(dict(batch_size=4), "--batch-size 4: fewer than 5 generators", id="batch"),
        pytest.param(dict(student_batch=4), "--student-batch 4: fewer than 5 generators", id="student-batch"),
        pytest.param(dict(stages=6), "--stages 6: 32 pixels", id="stages"),
        pytest.param(dict(width=1), "a width of 1", id="width"),
        pytest.param(dict(moments="l1"), "--moments: expected one of l2, squared, gaussian-kl", id="moments"),
        pytest.param(dict(bn="none"), "--bn: expected one of batch, running", id="bn"),
        pytest.param(dict(pool=1.5), "--pool 1.5: a share of at most 1", id="pool"),
        pytest.param(dict(alpha_bn=-1.0), "--alpha-bn: expected at least 0", id="alpha"),
        pytest.param(dict(temperature=0.0), "--temperature: expected at least", id="temperature"),
        pytest.param(dict(teacher="nobody"), "unknown network 'nobody'", id="teacher"),
        pytest.param(dict(student="nobody"), "--student nobody", id="student"),
        pytest.param(dict(teacher="digits-lenet5"), "its BatchNorms are what is matched", id="no-batchnorm"),
        pytest.param(dict(teacher="mnist-resnet8", data_dir="nowhere"), "cannot be read", id="missing"),
        pytest.param(dict(weights="nowhere.pt"), "nowhere.pt", id="weights"),
        pytest.param(dict(compare=("nowhere",)), "pass the --out of finished", id="compare"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, says):
    assert says in refused(capsys, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("name", ["generator_terms", "student_step"])
def test_losses_that_are_not_finite_end_the_run(capsys, tmp_path, monkeypatch, name):
    if name == "generator_terms":
        terms = ge.generator_terms
        monkeypatch.setattr(ge, name, lambda *rest: terms(*rest) * math.nan)
    line = refused(capsys, out=str(tmp_path), lr_student=2.0 if name == "generator_terms" else 1e9, optimizer="sgd")
    assert "not finite" in line and "lower --lr-generator or --lr-student" in line
    assert (tmp_path / "checkpoint.pt").exists() == (name == "student_step")  # of what was still finite


def test_compare_draws_the_arms(tmp_path, capsys):
    run(tmp_path / "five0")
    for seed in (0, 1):
        run(tmp_path / f"one{seed}", seed=seed, generators=1, width=9)
    folders = tuple(str(tmp_path / name) for name in ("five0", "one0", "one1"))
    ge.main(ge.Args(compare=folders, out=str(tmp_path / "all")))
    table = json.loads((tmp_path / "all/compare.json").read_text())
    assert (tmp_path / "all/compare.png").stat().st_size > 0 and table["steps"] == 4
    assert sorted(len(runs) for runs in table["arms"].values()) == [1, 2]
    assert {arm.split()[0] for arm in table["arms"]} == {"5", "1"}
    result = json.loads((tmp_path / "one1/result.json").read_text())
    (entry,) = [r for arm, runs in table["arms"].items() if arm[0] == "1" for r in runs if r["seed"] == 1]
    assert all(entry[k] == result[k] for k in ("student_accuracy", "class_accuracies", "diversity"))
    run(tmp_path / "other", steps=3, seed=2)
    assert "the runs differ in steps; pass" in refused(capsys, compare=(*folders, str(tmp_path / "other")))
    run(tmp_path / "other")
    assert "a second run of generators 5" in refused(capsys, compare=(folders[0], str(tmp_path / "other")))


def test_real_images_only_measure(tmp_path):
    students = []
    for dataset in ("digits", "none"):
        result = run(tmp_path / dataset, dataset=dataset, setting="digits")
        students.append(torch.load(tmp_path / dataset / "student.pt", weights_only=True)["state_dict"])
    assert result["student_accuracy"] is None and "real_diversity" not in result
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])


def test_doctests():
    for module in (augment, distributed):
        tested = doctest.testmod(module)
        assert tested.attempted and not tested.failed


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, dict(pool=0.0), dict(moments="gaussian-kl", alpha_tv=0.1, pool=0.5), dict(bf16=True)]
)
def test_a_graph_replays_what_eager_steps_do(options):
    """Six steps of each stage, the first three as they are, the last two under a watch for synchronisation."""
    sums, options = [], FAST | dict(bf16=False, steps=100) | options
    for graph in (True, False):
        args = ge.Args(device="cuda", **options)
        torch.manual_seed(0)
        teacher = ge.load("digits-resnet8", args)
        setting = ge.choose_setting(args, "digits", teacher)
        shape = shape_of([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], setting["latent"], setting["width"])
        ensemble = ge.Ensemble(shape).initialise().part(slice(None))
        student = ge.load("lenet5_half", args, teacher=teacher, fresh=True)
        state = ge.Distiller(teacher, student, ensemble, setting, args)
        observe = ge.Observed(teacher.model, state.n_parts, True)
        frozen = state.ensemble.part(slice(None)).freeze("batch")
        for step in (
            lambda s=state, o=observe: ge.generator_step(s, o),
            lambda s=state, f=frozen: ge.student_step(s, f),
        ):
            step, mode = kernels.Captured(step, graph), torch.cuda.get_sync_debug_mode()
            for i in range(6):
                torch.cuda.set_sync_debug_mode("error" if i >= 4 else mode)
                try:
                    step()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        sums.append(state.sums.tolist())
    assert sums[0] == pytest.approx(sums[1], rel=0.1 if options["bf16"] else 1e-2, abs=1e-3)
