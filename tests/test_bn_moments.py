"""bn_moments and bn_moment_loss: known values, unusual strides, extremes, properties."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_matches_definition, lay_out, random_tensor
from ops_table_batchnorm import BN_MOMENT_LOSS, BN_MOMENTS, make_running, make_x

import kernels


def assert_both_match(x, running_mean, running_var, keeps_layout=True):
    """Both ops by the measured-tolerance rule; the running mean is the shift of bn_moments."""
    moments = replace(BN_MOMENTS, keeps_layout=keeps_layout)
    assert_matches_definition(moments, {"x": x, "shift": running_mean})
    loss = replace(BN_MOMENT_LOSS, keeps_layout=keeps_layout)
    args = {"x": x, "running_mean": running_mean, "running_var": running_var}
    assert_matches_definition(loss, args)


# Known values


@pytest.mark.parametrize("suffix", ["", "_ref"], ids=["op", "definition"])
def test_value_and_gradient_computed_by_hand(suffix, backend, device):
    bn_moments = getattr(kernels, f"bn_moments{suffix}")
    bn_moment_loss = getattr(kernels, f"bn_moment_loss{suffix}")

    x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], device=device, requires_grad=True)
    mean, var = bn_moments(x)
    assert mean.tolist() == [2, 5]
    assert var.tolist() == [1, 0]

    running_mean = torch.tensor([2.0, 1.0], device=device)
    running_var = torch.tensor([1.0, 3.0], device=device)
    loss = bn_moment_loss(x, running_mean, running_var)
    assert loss.item() == 4 + 3  # |5 - 1| and |0 - 3|; channel 0 matches
    loss.backward()
    # d|mean - 1| is 1/2 for each value of channel 1; its variance has no slope at a constant.
    assert x.grad.tolist() == [[[0, 0], [0.5, 0.5]]]


def test_definition_agrees_with_numpy():
    x = make_x("cpu", (3, 5, 4, 2)).double()
    running_mean, running_var = make_running("cpu", x.shape, torch.float64)
    mean = x.numpy().mean((0, 2, 3))
    var = x.numpy().var((0, 2, 3), ddof=0)
    loss = np.linalg.norm(mean - running_mean.numpy()) + np.linalg.norm(var - running_var.numpy())

    for shift in (None, running_mean):
        got_mean, got_var = kernels.bn_moments_ref(x, shift)
        np.testing.assert_allclose(got_mean, mean, rtol=1e-13)
        np.testing.assert_allclose(got_var, var, rtol=1e-13)
    got_loss = kernels.bn_moment_loss_ref(x, running_mean, running_var)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-13)


# Inputs that the table of cases does not have

STRIDED = {
    "every-dimension-apart": lambda x: x[:, ::2, ::2, ::2, ::2],
    "channels_last-apart": lambda x: lay_out(x, "channels_last")[:, :, ::2, ::2, ::2],
    "channels-outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed-order": lambda x: x.permute(4, 1, 3, 2, 0),
    "expanded-channels": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    "expanded-everywhere": lambda x: x[:1, :, :1, :1, :1].expand(4, -1, 2, 3, 2),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_unusual_strides(view, backend, device):
    x = view(make_x(device, (3, 4, 4, 6, 5)))
    expanded = 0 in x.stride()
    assert_both_match(x, *make_running(device, x.shape), keeps_layout=not expanded)


def test_strided_statistics(backend, device):
    running_mean = random_tensor((6, 2), device)[:, 0]
    running_var = torch.ones(1, device=device).expand(6)
    assert_both_match(make_x(device, (4, 6, 5, 3)), running_mean, running_var)


def test_statistics_get_no_gradient(backend, device):
    x = make_x(device, (3, 4, 5, 2)).requires_grad_()
    running_mean, running_var = (v.requires_grad_() for v in make_running(device, x.shape))
    kernels.bn_moment_loss(x, running_mean, running_var).backward()
    kernels.bn_moments(x, running_mean)[0].sum().backward()
    assert running_mean.grad is None
    assert running_var.grad is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "mean"),
    [
        pytest.param((64, 16, 8, 8), 0.5, id="one-pass"),
        pytest.param((512, 8, 4, 4), 0.5, id="one-pass-over-two-parts-of-the-batch"),
        pytest.param((257, 16, 4, 4), 0.5, id="batch-without-equal-parts"),
        pytest.param((64, 16, 8, 8), 1000.0, id="too-far-from-zero-for-one-pass"),
    ],
)
def test_large_batches_on_cpu(shape, mean, layout, monkeypatch):
    """The sizes at which the CPU path reads x only once, and those at which it may not."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    x = make_x("cpu", shape, layout) + mean
    running_mean, running_var = make_running("cpu", shape)
    assert_both_match(x, running_mean + mean, running_var)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_large_batches_in_half_precision_on_cpu(dtype, layout, monkeypatch):
    """Read as they are, not as copies in fp32; some channels are too far from 0 for one pass."""
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    x = make_x("cpu", (64, 16, 8, 8), layout)
    x[:, 3] += 20  # 13 deviations: one pass will do for numbers of few digits
    x[:, 5] = 300 + 0.5 * x[:, 5]
    x[:, 7] = 2.5
    running_mean, running_var = make_running("cpu", x.shape)
    running_mean[5] += 300
    assert_both_match(x.to(dtype), running_mean, running_var)


# Many rows and many programs, which small inputs do not need


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param((37, 2, 5, 7), "contiguous", id="contiguous"),
        pytest.param((5, 64, 6, 7), "channels_last", id="channels_last"),
    ],
)
def test_programs_that_loop_over_rows(shape, layout, device, monkeypatch):
    module = importlib.import_module("kernels.bn_moments")
    monkeypatch.setattr(module, "FORWARD_PROGRAMS", 1)
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 1)
    x = make_x(device, shape, layout)
    assert_both_match(x, *make_running(device, shape))


@pytest.mark.parametrize("n_partials", [3, 2500])
def test_partial_moments_are_merged(n_partials, device):
    """More partials than one program merges at once; some of them are of no values."""
    (partial,) = make_partials(device, (n_partials, 5))
    merged = importlib.import_module("kernels._channels").merge_partials([partial])
    merged_mean, merged_var = merged.double()

    count, mean, m2 = partial.double()
    exact_mean = (count * mean).sum(0) / count.sum(0)
    between = count * (mean - exact_mean).square()
    exact_var = (m2 + between).sum(0) / count.sum(0)
    torch.testing.assert_close(merged_mean, exact_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged_var, exact_var, rtol=1e-5, atol=0)


def make_partials(device, *shapes):
    """Partial moments (3, P, C) of layers of these shapes (P, C)."""
    partials = []
    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        count = torch.randint(0, 9, shape, generator=generator).to(device)
        mean = random_tensor(shape, device, seed=2 * seed)
        m2 = count * random_tensor(shape, device, seed=2 * seed + 1).square()
        partials.append(torch.stack((count, mean, m2)))
    return partials


def test_layers_merged_at_once_are_those_merged_alone(device):
    """Layers of fewer and of more channels than a program merges, of one and of many partials."""
    merge_partials = importlib.import_module("kernels._channels").merge_partials
    partials = make_partials(device, (70, 3), (1, 40), (5, 16), (130, 17))
    alone = [merge_partials([partial]) for partial in partials]
    assert torch.equal(merge_partials(partials), torch.cat(alone, 1))


# Extremes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mean", "std", "shift"),
    [
        pytest.param(100.0, 0.01, 100.0, id="mean-far-above-std"),
        pytest.param(100.0, 0.01, None, id="mean-far-above-std-without-shift"),
        pytest.param(0.0, 1.0, 100.0, id="shift-100-sigma-off"),
        pytest.param(1e15, 1e15, 0.0, id="huge"),
        pytest.param(1e-15, 1e-15, 0.0, id="tiny"),
    ],
)
def test_extreme_moments(mean, std, shift, layout, backend, device):
    x = lay_out(mean + std * random_tensor((8, 3, 16, 16), device), layout)
    if shift is not None:
        shift = torch.full((3,), shift, device=device)
    assert_matches_definition(BN_MOMENTS, {"x": x, "shift": shift})


@pytest.mark.parametrize("C", [1, 5])
def test_constant_input(C, backend, device):
    x = torch.full((3, C, 4, 5), 0.1, device=device)
    mean, var = kernels.bn_moments(x)
    torch.testing.assert_close(mean, x[0, :, 0, 0])
    assert var.max() < 1e-14

    _, var = kernels.bn_moments(x, x[0, :, 0, 0])
    assert var.eq(0).all()


def test_exactly_matching_moments(backend, device):
    """Integers, so that nothing rounds: the loss is 0 and its gradient the subgradient 0."""
    values = torch.tensor([-1.0, 1.0, 3.0, 5.0], device=device)
    x = values.view(4, 1, 1).repeat(1, 3, 2).requires_grad_()
    mean = torch.full((3,), 2.0, device=device)
    var = torch.full((3,), 5.0, device=device)
    loss = kernels.bn_moment_loss(x, mean, var)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.eq(0).all()

    x.grad = None
    kernels.bn_moment_loss(x, mean, var + 1).backward()  # only the norm of the mean is 0
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_nan_shows_in_its_channel(backend, device):
    x = make_x(device, (2, 3, 4, 4))
    x[1, 2, 0, 0] = float("nan")
    mean, var = kernels.bn_moments(x)
    assert mean.isnan().tolist() == [False, False, True]
    assert var.isnan().tolist() == [False, False, True]
    assert kernels.bn_moment_loss(x, *make_running(device, x.shape)).isnan()


# Properties


def test_loss_is_zero_at_the_own_moments(backend, device):
    x = make_x(device, (8, 5, 4, 4))
    assert kernels.bn_moment_loss(x, *kernels.bn_moments(x)) < 1e-5


def test_moments_do_not_depend_on_the_shift(backend, device):
    x = make_x(device, (4, 3, 5, 6))
    expected = kernels.bn_moments(x)
    for shift in (-1.0, 2.0):
        moments = kernels.bn_moments(x, torch.full((3,), shift, device=device))
        torch.testing.assert_close(moments, expected)


def test_loss_does_not_depend_on_the_order_of_positions(backend, device):
    x = make_x(device, (4, 3, 5, 6))
    positions = x.movedim(1, -1).reshape(-1, 3)
    order = torch.randperm(len(positions), device=device)
    shuffled = positions[order].view(4, 5, 6, 3).movedim(-1, 1)
    running = make_running(device, x.shape)
    loss = kernels.bn_moment_loss(x, *running)
    torch.testing.assert_close(kernels.bn_moment_loss(shuffled, *running), loss)


def test_loss_of_a_shifted_input(backend, device):
    """x + delta misses its own moments by delta in every mean and by nothing in the variances."""
    x = make_x(device, (8, 4, 4, 4))
    loss = kernels.bn_moment_loss(x + 0.75, *kernels.bn_moments(x))
    assert loss.item() == pytest.approx(0.75 * 4**0.5, rel=1e-5)


def test_a_running_mean_that_training_changes_leaves_the_gradient_as_it_was(backend, device):
    """F.batch_norm updates it in place without a new version, so autograd would not notice."""
    x = make_x(device, (4, 3, 5, 5)).requires_grad_()
    running_mean = torch.zeros(3, device=device)
    expected = torch.autograd.grad(kernels.bn_moments(x, running_mean)[1].sum(), x)[0]

    _, var = kernels.bn_moments(x, running_mean)
    with torch.no_grad():
        F.batch_norm(x + 7, running_mean, torch.ones(3, device=device), training=True)
    assert running_mean.all()
    assert torch.equal(torch.autograd.grad(var.sum(), x)[0], expected)
