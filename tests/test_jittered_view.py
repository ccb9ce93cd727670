"""jittered_view: definition, kernel and CPU path against it, draws, layouts, dtypes, extremes, errors."""

import doctest
import importlib
import inspect

import pytest
import torch
from helpers import assert_as_exact_as_eager, extreme_images
from test_total_variation import LAYOUTS, images, in_layout

from kernels import jittered_view, jittered_view_ref, total_variation_ref

HALF, BFLOAT = torch.float16, torch.bfloat16
NAMES = ("view", "tv_l1", "tv_l2", "l2", "dx")
DRAWS = [
    pytest.param((0, 0, 0), id="as-is"),
    pytest.param((0, 0, 1), id="mirrored"),
    pytest.param((1, -2, 0), id="rolled"),
    pytest.param((-1, 3, 1), id="rolled-mirrored"),
    pytest.param((17, -23, 1), id="beyond-the-size"),
]


def values_and_gradient(op, x, draw, cotangents, dtype=None):
    x = x.detach().requires_grad_()
    results = op(x, draw, dtype)
    total = sum((value * weight.to(value.dtype)).sum() for value, weight in zip(results, cotangents, strict=True))
    return *results, *torch.autograd.grad(total, x)


def assert_exact(x, draw=(1, -2, 1), dtype=None, seed=1):
    """All four results and the gradient for random cotangents, by the measured-tolerance rule."""
    generator = torch.Generator().manual_seed(seed)
    draw, weights = torch.tensor(draw, device=x.device), torch.randn(3, generator=generator).to(x.device)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.device, dtype or x.dtype), *weights]
    fused = values_and_gradient(jittered_view, x, draw, cotangents, dtype)
    exact = values_and_gradient(jittered_view_ref, x.double(), draw, cotangents)
    eager = values_and_gradient(jittered_view_ref, x.float(), draw, cotangents)
    assert fused[0].dtype == (dtype or x.dtype) and fused[4].dtype == x.dtype
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    assert all(value.dtype == torch.float32 and value.shape == () for value in fused[1:4])
    for name, *values in zip(NAMES, fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)
    return fused


@pytest.mark.parametrize("draw", DRAWS)
def test_ref_is_roll_flip_and_the_priors(draw):
    x = images((3, 2, 5, 6), dtype=torch.float64)
    rolled = x.roll(draw[:2], (2, 3))
    rolled = rolled.flip(3) if draw[2] else rolled
    view, *priors = jittered_view_ref(x, torch.tensor(draw))
    assert torch.equal(view, rolled)
    expected = *total_variation_ref(rolled), x.flatten(1).norm(dim=1).mean()
    assert [v.item() for v in priors] == pytest.approx([v.item() for v in expected], rel=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ref_gradcheck(layout):
    x = in_layout(images((2, 3, 3, 4), dtype=torch.float64), layout)
    draw = torch.tensor([1, -1, 1])
    assert torch.autograd.gradcheck(lambda x: jittered_view_ref(x, draw), x.requires_grad_())


def test_by_hand(backend, device):
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=device, requires_grad=True)
    draw = torch.tensor([1, 0, 1], device=device)
    view, tv_l1, tv_l2, l2 = jittered_view(x, draw)
    assert view.tolist() == [[[[8.0, 4.0], [2.0, 1.0]]]]
    # horizontal 4 and 1, vertical 6 and 3, main diagonal 8 - 1, anti-diagonal 2 - 4
    assert tv_l1.item() == pytest.approx(2.5 + 4.5 + 7 + 2)
    assert tv_l2.item() == pytest.approx(17**0.5 + 45**0.5 + 7 + 2)
    assert l2.item() == pytest.approx(85**0.5)
    (dx,) = torch.autograd.grad((view * torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)).sum(), x)
    assert dx.tolist() == [[[[4.0, 3.0], [2.0, 1.0]]]]  # brought back to where each pixel came from


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 2, 2), id="smallest"),
        pytest.param((2, 3, 5, 7), id="odd"),
        pytest.param((1, 3, 2, 9), id="two-rows"),
        pytest.param((3, 1, 9, 2), id="two-columns"),
        pytest.param((1, 2, 9, 255), id="block-1"),
        pytest.param((1, 1, 5, 257), id="block+1"),
        pytest.param((4, 3, 32, 32), id="cifar"),
    ],
)
def test_matches_ref(shape, backend, device):
    assert_exact(images(shape, device))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_draws(draw, layout, backend, device):
    assert_exact(in_layout(images((2, 3, 6, 5), device), layout), draw)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device):
    x = in_layout(images((3, 4, 6, 5), device), layout)
    dx = assert_exact(x)[4]
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("dtype", "view_dtype", "layout"),
    [
        pytest.param(torch.float32, BFLOAT, "channels_last", id="fp32 to bf16"),
        pytest.param(torch.float32, HALF, "contiguous", id="fp32 to fp16"),
        pytest.param(BFLOAT, None, "channels_last", id="bf16"),
        pytest.param(HALF, torch.float32, "contiguous", id="fp16 to fp32"),
    ],
)
def test_dtypes(dtype, view_dtype, layout, backend, device):
    assert_exact(in_layout(images((2, 3, 7, 9), device, dtype=dtype), layout), dtype=view_dtype)


@pytest.mark.parametrize("used", [*NAMES[:4], "three-times"])
def test_part_of_the_results(used, backend, device):
    gradients = []
    for op, dtype in ((jittered_view, None), (jittered_view_ref, torch.float64), (jittered_view_ref, None)):
        x = images((2, 3, 5, 6), device).to(dtype or torch.float32).requires_grad_()
        results = dict(zip(NAMES, op(x, torch.tensor([1, 2, 1], device=device)), strict=False))
        loss = 3 * sum(v.sum() for v in results.values()) if used == "three-times" else results[used].square().sum()
        loss.backward()
        gradients.append(x.grad)
    assert_as_exact_as_eager(*gradients, name="dx")


def test_input_that_needs_no_grad_and_is_left_alone(backend, device):
    x = in_layout(images((2, 3, 5, 6), device), "channels_last")
    before = x.clone()
    results = jittered_view(x, torch.tensor([0, 0, 0], device=device))
    assert not any(value.requires_grad for value in results)
    results[0].add_(1)  # the view is no view: the images stay
    assert torch.equal(x, before)


@pytest.mark.parametrize("extreme", ["large", "tiny-contrast", "half-constant", "one black image"])
def test_extremes(extreme, backend, device):
    dx = assert_exact(extreme_images(images((2, 3, 6, 5), device), extreme))[4]
    assert dx.isfinite().all()


def test_constant_images_have_the_gradient_of_the_view_alone(backend, device):
    x = torch.zeros(2, 3, 6, 5, device=device, requires_grad=True)
    view, *priors = jittered_view(x, torch.tensor([2, 1, 1], device=device))
    (dx,) = torch.autograd.grad(view.sum() + 5 * sum(priors), x)
    assert torch.equal(dx, torch.ones_like(dx))


def test_repeats_bit_for_bit(backend, device):
    x, draw = images((4, 3, 9, 33), device), torch.tensor([3, -4, 1], device=device)
    cotangents = [images(x.shape, device, 3), *torch.tensor([0.3, -1.7, 0.2], device=device)]
    first, second = (values_and_gradient(jittered_view, x, draw, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_raises(backend, device):
    x = images((1, 1, 3, 3), device).requires_grad_()
    results = jittered_view(x, torch.tensor([0, 1, 0], device=device))
    with pytest.raises(RuntimeError, match="jittered_view: no second derivative; use jittered_view_ref"):
        torch.autograd.grad(results[2], x, create_graph=True)


X, DRAW = torch.ones(2, 3, 4, 4), torch.tensor([0, 0, 0])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param(([1.0], DRAW), TypeError, "expected x to be a tensor, got list", id="list"),
        pytest.param((X.double(), DRAW), TypeError, "use jittered_view_ref", id="float64"),
        pytest.param((X[:0], DRAW), ValueError, "drop the empty batch", id="empty"),
        pytest.param((X[0], DRAW), ValueError, r"x\[None\] for one", id="3-D"),
        pytest.param((X[..., :1], DRAW), ValueError, "H and W at least 2", id="one column"),
        pytest.param((X, (0, 0, 0)), TypeError, "an int64 tensor, got tuple", id="draw no tensor"),
        pytest.param((X, DRAW.float()), TypeError, "got torch.float32", id="draw of floats"),
        pytest.param((X, DRAW[:2]), ValueError, r"got \(2,\) on cpu", id="draw of two"),
        pytest.param((X, DRAW.to("meta")), ValueError, "on meta; move", id="draw elsewhere"),
        pytest.param((X, DRAW, torch.float64), TypeError, "got torch.float64; choose", id="view in float64"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        jittered_view(*args)


def test_signature_and_example():
    assert inspect.signature(jittered_view) == inspect.signature(jittered_view_ref)
    tested = doctest.testmod(importlib.import_module("kernels.jittered_view"))
    assert tested.attempted and not tested.failed


@pytest.mark.gpu
def test_no_synchronisation():
    x, draw = images((4, 3, 32, 32), "cuda").requires_grad_(), torch.tensor([1, -1, 1], device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    for check in (mode, "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(check)
        try:
            view, *priors = jittered_view(x, draw, BFLOAT)
            (view.float().sum() + sum(priors)).backward()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
