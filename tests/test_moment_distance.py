"""moment_distance: known values, weights, extremes, agreement with bn_moment_loss."""

import pytest
import torch
from helpers import assert_matches_definition, evaluate
from ops_table_batchnorm import MOMENT_DISTANCE, make_distances, make_running, make_x

import kernels


@pytest.mark.parametrize("name", ["moment_distance", "moment_distance_ref"])
def test_value_and_gradient_computed_by_hand(name, backend, device):
    # The means are off by (3, 4) and (2), the variances by (0, 0) and (5).
    moments = torch.tensor([[3.0, 4.0, 2.0], [1.0, 1.0, 6.0]], device=device, requires_grad=True)
    loss = getattr(kernels, name)(moments, torch.ones(3, device=device), (2, 1))
    assert loss.item() == 5 + 2 + 0 + 5
    loss.backward()
    expected = torch.tensor([[0.6, 0.8, 1.0], [0.0, 0.0, 1.0]], device=device)
    torch.testing.assert_close(moments.grad, expected)


@pytest.mark.parametrize("name", ["moment_distance", "moment_distance_ref"])
def test_relative_value_and_gradient_computed_by_hand(name, backend, device):
    """Running variances 9, 16 and 4: norms 5 (of sqrt(9 + 16)) and 2, and sqrt(337) and 4."""
    moments = torch.tensor([[3.0, 4.0, 2.0], [9.0, 16.0, 6.0]], device=device, requires_grad=True)
    running_var = torch.tensor([9.0, 16.0, 4.0], device=device)
    loss = getattr(kernels, name)(moments, running_var, (2, 1), form="relative")
    assert loss.item() == pytest.approx(5 / 5 + 0 + 2 / 2 + 2 / 4)
    loss.backward()
    expected = torch.tensor([[0.6 / 5, 0.8 / 5, 1 / 2], [0.0, 0.0, 1 / 4]], device=device)
    torch.testing.assert_close(moments.grad, expected)


@pytest.mark.parametrize("name", ["moment_distance", "moment_distance_ref"])
def test_kl_is_that_of_torch_distributions(name, backend, device):
    """Each layer has its own eps; the channels' divergences are averaged, the layers' added."""
    mean = torch.tensor([0.3, -2.0, 1.0], dtype=torch.double)
    var = torch.tensor([0.5, 3.0, 0.0], dtype=torch.double)
    running_var = torch.tensor([1.0, 2.0, 1e-4], dtype=torch.double)
    eps = torch.tensor([0.1, 0.1, 1e-3], dtype=torch.double)
    found = torch.distributions.Normal(mean, (var + eps).sqrt())
    stored = torch.distributions.Normal(0.0, (running_var + eps).sqrt())
    channels = torch.distributions.kl_divergence(found, stored)
    expected = channels[:2].mean() + channels[2]

    moments = torch.stack((mean, var)).float().to(device)
    distance = getattr(kernels, name)
    loss = distance(moments, running_var.float().to(device), (2, 1), form="kl", eps=(0.1, 1e-3))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("form", ["relative", "kl"])
def test_forms_without_a_unit(form, backend, device):
    """Activations ten times as large have the same distance; norms do not."""
    args = make_distances(device, (5, 40), form=form, eps=(1e-12, 1e-12))
    larger = dict(args)
    larger["moments"] = args["moments"] * torch.tensor([[10.0], [100.0]], device=device)
    larger["running_var"] = 100 * args["running_var"]
    distance = kernels.moment_distance(**args)
    assert kernels.moment_distance(**larger).item() == pytest.approx(distance.item(), rel=1e-4)


@pytest.mark.parametrize("shift", [1e-7, 1e-5, 1e-3])
def test_kl_of_nearly_equal_variances(shift, backend, device):
    """t - ln(1 + t) is t^2 / 2: the gradient does not drown in rounding."""
    running_var = torch.ones(4, device=device)
    moments = torch.stack((torch.zeros(4, device=device), running_var + shift)).requires_grad_()
    loss = kernels.moment_distance(moments, running_var, (4,), form="kl")
    loss.backward()
    t = (moments[1] - running_var).detach() / (1 + 1e-5)
    assert loss.item() == pytest.approx((t.square() / 4).mean().item(), abs=2e-8)
    torch.testing.assert_close(moments.grad[1], t / 8, rtol=2e-3, atol=0)


def test_weights_multiply_the_layers_distances(backend, device):
    """A layer of weight 0 counts for nothing, also where its distance is the largest."""
    sizes = (3, 5, 40)
    args = make_distances(device, sizes, weights=(10.0, 1.0, 0.0))
    got = assert_matches_definition(MOMENT_DISTANCE, args)

    alone = []
    for size, moments, running_var in zip(
        sizes, args["moments"].split(sizes, 1), args["running_var"].split(sizes), strict=True
    ):
        alone.append(kernels.moment_distance(moments.contiguous(), running_var, (size,)).item())
    assert got.results[0].item() == pytest.approx(10 * alone[0] + alone[1], rel=1e-6)

    gradient = got.gradients["moments"]
    assert gradient[:, :8].all()
    assert not gradient[:, 8:].any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_extreme_distances(scale, backend, device):
    args = make_distances(device, (5, 40))
    args["moments"] = scale * args["moments"]
    args["running_var"] = scale * args["running_var"]
    got = assert_matches_definition(MOMENT_DISTANCE, args)
    assert got.results[0] > 0
    assert got.gradients["moments"].isfinite().all()


@pytest.mark.parametrize("form", ["l2", "relative", "kl"])
def test_equal_moments_have_no_distance_and_no_gradient(form, backend, device):
    args = make_distances(device, (5, 4))
    args["moments"] = torch.stack((torch.zeros(9, device=device), args["running_var"]))
    args["form"] = form
    got = evaluate(kernels.moment_distance, args, ("moments",))
    assert got.results[0] == 0
    assert not got.gradients["moments"].any()


def test_nan_shows(backend, device):
    args = make_distances(device, (5, 4))
    args["moments"][1, 6] = float("nan")
    assert kernels.moment_distance(**args).isnan()


def test_is_the_sum_of_the_layers_losses(backend, device):
    layers = [make_x(device, (4, C, 3, 3)) for C in (3, 8)]
    running = [make_running(device, x.shape) for x in layers]
    expected = 0.0
    moments = []
    for x, (running_mean, running_var) in zip(layers, running, strict=True):
        expected += kernels.bn_moment_loss(x, running_mean, running_var).item()
        mean = x.mean((0, 2, 3)) - running_mean
        var = x.var((0, 2, 3), unbiased=False)
        moments.append(torch.stack((mean, var)))

    running_var = torch.cat([var for _, var in running])
    distance = kernels.moment_distance(torch.cat(moments, 1), running_var, (3, 8))
    assert distance.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*lru_cache")
@pytest.mark.parametrize("form", ["l2", "relative", "kl"])
def test_torch_compile_makes_one_graph_on_a_cpu(form, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    args = make_distances("cpu", (5, 4), form=form, weights=(2.0, 1.0))

    def differentiate(distance):
        moments = args["moments"].clone().requires_grad_()
        distance(**{**args, "moments": moments}).backward()
        return moments.grad

    compiled = torch.compile(kernels.moment_distance, fullgraph=True, backend="aot_eager")
    expected = differentiate(kernels.moment_distance)
    torch.testing.assert_close(differentiate(compiled), expected)
