"""moment_distance: definition, kernels and CPU path against it, zero distances, agreement with the layers' own op."""

import doctest
import importlib
import math

import pytest
import torch
from helpers import assert_as_exact_as_eager

from kernels import bn_moment_loss, moment_distance, moment_distance_ref

module = importlib.import_module("kernels.moment_distance")
SIZES = [
    pytest.param((1,), id="one-value"),
    pytest.param((3, 5, 1), id="odd"),
    pytest.param((16, 16, 32, 64), id="powers-of-2"),
    pytest.param((511, 512, 513), id="block+-1"),
    pytest.param((64, 2048, 7), id="resnet50"),
]


def make(sizes, device, seed=0):
    torch.manual_seed(seed)
    C = sum(sizes)
    return torch.randn(2, C, device=device), torch.rand(C, device=device) + 0.5


def value_and_gradient(op, moments, running_var, sizes, cotangent, weights=None):
    moments = moments.detach().requires_grad_()
    value = op(moments, running_var, sizes, weights)
    return value, *torch.autograd.grad(cotangent * value, moments)


def assert_exact(moments, running_var, sizes, weights=None):
    rest = sizes, -1.37, weights
    got = value_and_gradient(moment_distance, moments, running_var, *rest)
    exact = value_and_gradient(moment_distance_ref, moments.double(), running_var.double(), *rest)
    eager = value_and_gradient(moment_distance_ref, moments, running_var, *rest)
    for name, *triple in zip(("value", "gradient"), got, exact, eager, strict=True):
        assert_as_exact_as_eager(*triple, name=name)
    return got


def test_ref_gradcheck():
    moments, running_var = (x.double() for x in make((3, 2), "cpu"))
    assert torch.autograd.gradcheck(lambda m: moment_distance_ref(m, running_var, (3, 2)), moments.requires_grad_())


def test_by_hand(backend, device):
    # layers (3, 4) and (2): norms 5 and 2 of the means; variances off by (0, 0) and 5
    moments = torch.tensor([[3.0, 4.0, 2.0], [1.0, 1.0, 6.0]], device=device, requires_grad=True)
    for op in (moment_distance, moment_distance_ref):
        moments.grad = None
        loss = op(moments, torch.ones(3, device=device), (2, 1))
        assert loss.item() == 12
        loss.backward()
        expected = torch.tensor([[0.6, 0.8, 1.0], [0.0, 0.0, 1.0]], device=device)
        torch.testing.assert_close(moments.grad, expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_matches_ref(sizes, backend, device):
    assert_exact(*make(sizes, device), sizes)


def test_weights_of_the_layers(backend, device):
    """Ten times the first layer, nothing of the last one: also where that one's norm is the largest."""
    moments, running_var = make((3, 5, 40), device)
    weights = (10.0, 1.0, 0.0)
    value, gradient = assert_exact(moments, running_var, (3, 5, 40), weights)
    layers = zip(moments.split((3, 5, 40), 1), running_var.split((3, 5, 40)), (3, 5, 40), strict=True)
    single = [moment_distance(m.contiguous(), v, (size,)).item() for m, v, size in layers]
    assert value.item() == pytest.approx(10 * single[0] + single[1], rel=1e-6)
    assert not gradient[:, 8:].any() and gradient[:, :8].all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_extremes(scale, backend, device):
    moments, running_var = make((5, 40), device)
    value, gradient = assert_exact(scale * moments, scale * running_var, (5, 40))
    assert value > 0 and gradient.isfinite().all()


def test_equal_moments_and_nan(backend, device):
    moments, running_var = make((5, 4), device)
    moments[0], moments[1] = 0, running_var
    value, gradient = value_and_gradient(moment_distance, moments, running_var, (5, 4), 1.0)
    assert value == 0 and not gradient.any()
    moments[1, 6] = math.nan
    assert moment_distance(moments, running_var, (5, 4)).isnan()


def test_is_the_sum_of_the_layers_losses(backend, device):
    torch.manual_seed(0)
    layers = [torch.randn(4, c, 3, 3, device=device) for c in (3, 8)]
    mean, var = torch.randn(11, device=device), torch.rand(11, device=device) + 0.5
    means, variances = mean.split((3, 8)), var.split((3, 8))
    expected = sum(bn_moment_loss(x, m, v) for x, m, v in zip(layers, means, variances, strict=True))
    moments = [torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))) for x in layers]
    moments = torch.cat(moments, 1)
    moments[0] -= mean
    assert moment_distance(moments, var, (3, 8)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_repeats_bit_for_bit_and_needs_no_gradient(backend, device):
    moments, running_var = make((70, 600), device)
    first, second = (value_and_gradient(moment_distance, moments, running_var, (70, 600), 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not moment_distance(moments, running_var, (70, 600)).requires_grad


def test_launches(monkeypatch):
    """One launch forward and one backward, whatever the number of layers."""
    launches = []

    def recorded(name):
        kernel = getattr(module, name)

        class Recorder:
            def __getitem__(self, grid):
                launches.append((name, grid))
                return kernel[grid]

        monkeypatch.setattr(module, name, Recorder())

    recorded("_moment_distance_fwd_kernel")
    recorded("_moment_distance_bwd_kernel")
    sizes = (4,) * 53
    value_and_gradient(moment_distance, *make(sizes, "cpu"), sizes, 1.0)
    assert launches == [("_moment_distance_fwd_kernel", (53, 2)), ("_moment_distance_bwd_kernel", (53, 2))]


def test_double_backward_raises(backend, device):
    moments, running_var = make((3,), device)
    with pytest.raises(RuntimeError, match="moment_distance: no second derivative; use moment_distance_ref"):
        torch.autograd.grad(moment_distance(moments.requires_grad_(), running_var, (3,)), moments, create_graph=True)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param(([1.0], ONES[0], (3,)), TypeError, "moments to be a tensor, got list", id="list"),
        pytest.param((ONES.double(), ONES[0], (3,)), TypeError, "use moment_distance_ref", id="float64"),
        pytest.param((ONES.half(), ONES[0], (3,)), ValueError, "contiguous in float32, got torch.float16", id="half"),
        pytest.param((torch.ones(3, 2).T, ONES[0], (3,)), ValueError, "strides", id="transposed"),
        pytest.param((ONES, ONES[0], [3]), TypeError, "sizes to be a tuple, got list", id="sizes"),
        pytest.param((ONES, ONES[0], (2,)), ValueError, r"C the sum of \(2,\)", id="sum"),
        pytest.param((ONES, ONES[0], (4, -1)), ValueError, "check sizes", id="negative"),
        pytest.param((ONES[:1], ONES[0], (3,)), ValueError, "check sizes", id="rows"),
        pytest.param((ONES, ONES[0].to("meta"), (3,)), ValueError, "expected one device", id="devices"),
        pytest.param((ONES, ONES[0], (3,), [1.0]), TypeError, "weights as a tuple of 1", id="weights-list"),
        pytest.param((ONES, ONES[0], (1, 2), (1.0,)), ValueError, "weights as a tuple of 2", id="weights-few"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        moment_distance(*args)


def test_example():
    tested = doctest.testmod(module)
    assert tested.attempted and not tested.failed
