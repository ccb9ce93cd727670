"""total_variation: definition, kernel and CPU path against it, extremes, properties, errors."""

import doctest
import importlib
import inspect

import pytest
import torch
from helpers import assert_as_exact_as_eager, extreme_images, lay_out

from kernels import total_variation, total_variation_ref

SHAPES = [
    pytest.param((1, 1, 2, 2), id="smallest"),
    pytest.param((2, 3, 5, 7), id="odd"),
    pytest.param((4, 2, 8, 8), id="power-of-two"),
    pytest.param((1, 3, 2, 9), id="two-rows"),
    pytest.param((3, 1, 9, 2), id="two-columns"),
    pytest.param((1, 2, 9, 255), id="block-1"),
    pytest.param((1, 1, 8, 256), id="block"),
    pytest.param((1, 1, 5, 257), id="block+1"),
    pytest.param((4, 3, 32, 32), id="cifar"),
]
LAYOUTS = ["channels_last", "sliced", "sliced-channels_last", "offset", "expanded", "transposed"]


def in_layout(x, layout):
    if layout == "transposed":  # columns outermost in memory, batch innermost
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "sliced-channels_last":
        return lay_out(torch.nn.functional.pad(x, (1, 2, 0, 3), value=7.0), "channels_last")[..., :-3, 1:-2]
    return lay_out(x, layout)


def images(shape, device="cpu", seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def values_and_gradient(op, x, cotangents):
    x = x.detach().requires_grad_()
    l1, l2 = op(x)
    (dx,) = torch.autograd.grad(cotangents[0] * l1 + cotangents[1] * l2, x)
    return l1, l2, dx


def assert_exact(x, seed=1):
    """Both values and the gradient for a random cotangent, by the measured-tolerance rule."""
    cotangents = torch.randn(2, generator=torch.Generator().manual_seed(seed)).tolist()
    fused = values_and_gradient(total_variation, x, cotangents)
    exact = values_and_gradient(total_variation_ref, x.double(), cotangents)
    eager = values_and_gradient(total_variation_ref, x.float(), cotangents)
    assert fused[0].dtype == fused[1].dtype == torch.float32 and fused[2].dtype == x.dtype
    for name, *values in zip(("l1", "l2", "dx"), fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_ref_gradcheck(layout):
    x = in_layout(images((2, 3, 3, 4), dtype=torch.float64), layout)  # random: no difference near the kink of |d|
    assert torch.autograd.gradcheck(total_variation_ref, x.requires_grad_())


def test_ref_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    # horizontal -1 and -4, vertical -3 and -6, main diagonal 1 - 8, anti-diagonal 4 - 2
    l1, l2 = total_variation_ref(x)
    assert l1.item() == pytest.approx(2.5 + 4.5 + 7 + 2)
    assert l2.item() == pytest.approx(17**0.5 + 45**0.5 + 7 + 2)


def test_ref_against_loops():
    x = images((2, 2, 3, 4), dtype=torch.float64)
    N, C, H, W = x.shape
    shifts = {(0, 1): [], (1, 0): [], (1, 1): [], (-1, 1): []}
    for (down, right), found in shifts.items():
        for n, c, i, j in ((n, c, i, j) for n in range(N) for c in range(C) for i in range(H) for j in range(W)):
            if 0 <= i + down < H and j + right < W:
                found.append((x[n, c, i, j] - x[n, c, i + down, j + right]).item())
    l1, l2 = total_variation_ref(x)
    assert l1.item() == pytest.approx(sum(sum(map(abs, d)) / len(d) for d in shifts.values()), rel=1e-12)
    assert l2.item() == pytest.approx(sum(sum(v * v for v in d) ** 0.5 for d in shifts.values()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_ref(shape, backend, device):
    assert_exact(images(shape, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device):
    x = in_layout(images((3, 4, 6, 5), device), layout)
    assert_exact(x)
    (dx,) = torch.autograd.grad(total_variation(x.requires_grad_())[1], x)
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float16, "contiguous", id="fp16"),
        pytest.param(torch.bfloat16, "contiguous", id="bf16"),
        pytest.param(torch.bfloat16, "channels_last", id="bf16-channels_last"),
    ],
)
def test_dtypes(dtype, layout, backend, device):
    assert_exact(lay_out(images((2, 3, 7, 9), device, dtype=dtype), layout))


@pytest.mark.parametrize("used", ["l1", "l2", "three-times"])
def test_part_of_the_results(used, backend, device):
    def part(op):
        def loss(x):
            l1, l2 = op(x)
            return {"l1": l1, "l2": l2, "three-times": 3 * (l1 + l2)}[used]

        return loss

    gradients = []
    for op, dtype in ((total_variation, None), (total_variation_ref, torch.float64), (total_variation_ref, None)):
        x = images((2, 3, 5, 6), device).to(dtype or torch.float32).requires_grad_()
        part(op)(x).backward()
        gradients.append(x.grad)
    assert_as_exact_as_eager(*gradients, name="dx")


def test_input_that_needs_no_grad(backend, device):
    l1, l2 = total_variation(images((2, 3, 5, 6), device))
    assert not l1.requires_grad and not l2.requires_grad
    l1 += l2  # not a view of something that must not change
    assert l1.isfinite()


@pytest.mark.parametrize("extreme", ["large", "tiny-contrast", "one-pixel", "half-constant"])
def test_extremes(extreme, backend, device):
    assert_exact(extreme_images(images((2, 3, 6, 5), device), extreme))


def test_constant_images(backend, device):
    x = torch.full((2, 3, 6, 5), 0.7, device=device, requires_grad=True)
    l1, l2 = total_variation(x)
    (dx,) = torch.autograd.grad(2 * l1 + 3 * l2, x)
    assert l1.item() == l2.item() == 0
    assert torch.equal(dx, torch.zeros_like(dx))
    (dx_ref,) = torch.autograd.grad(sum(total_variation_ref(x)), x)
    assert torch.equal(dx_ref, torch.zeros_like(dx_ref))


def test_nan_shows(backend, device):
    x = images((2, 3, 6, 5), device)
    x[0, 0, 2, 2] = float("nan")
    x.requires_grad_()
    l1, l2 = total_variation(x)
    (dx,) = torch.autograd.grad(l2, x)
    assert l1.isnan() and l2.isnan() and dx.isnan().all()


@pytest.mark.parametrize("change", ["shift", "flip-h", "flip-v", "transpose", "scale"])
def test_invariances(change, backend, device):
    x = (images((2, 3, 6, 6), device) * 64).round() / 64  # a shift by 3 is then exact
    changed = {
        "shift": lambda: x + 3,
        "flip-h": lambda: x.flip(3),
        "flip-v": lambda: x.flip(2),
        "transpose": lambda: x.transpose(2, 3),
        "scale": lambda: -2 * x,
    }[change]()
    factor = 2 if change == "scale" else 1
    for before, after in zip(total_variation(x), total_variation(changed), strict=True):
        assert after.item() == pytest.approx(factor * before.item(), rel=1e-6)


def test_growth_with_the_batch(backend, device):
    x = images((1, 3, 6, 5), device)
    one, four = total_variation(x), total_variation(x.expand(4, -1, -1, -1))
    assert four[0].item() == pytest.approx(one[0].item(), rel=1e-6)
    assert four[1].item() == pytest.approx(2 * one[1].item(), rel=1e-6)  # sqrt(4)


def test_repeats_bit_for_bit(backend, device):
    x = images((4, 3, 9, 33), device)
    first, second = (values_and_gradient(total_variation, x, (0.3, -1.7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_raises(backend, device):
    x = images((1, 1, 3, 3), device).requires_grad_()
    with pytest.raises(RuntimeError, match="total_variation: no second derivative; use total_variation_ref"):
        torch.autograd.grad(total_variation(x)[1], x, create_graph=True)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        pytest.param([[1.0]], TypeError, "total_variation: expected x to be a tensor, got list", id="list"),
        pytest.param(torch.ones(1, 1, 2, 2).long(), TypeError, "got torch.int64; convert it", id="integers"),
        pytest.param(torch.ones(1, 1, 2, 2).double(), TypeError, "use total_variation_ref", id="float64"),
        pytest.param(
            torch.ones(0, 3, 4, 4), ValueError, r"got shape \(0, 3, 4, 4\); drop the empty batch", id="empty"
        ),
        pytest.param(torch.ones(3, 4, 4), ValueError, r"\(N, C, H, W\), got \(3, 4, 4\); use x\[None\]", id="3-D"),
        pytest.param(torch.ones(1, 3, 1, 4), ValueError, r"at least 2, got shape \(1, 3, 1, 4\)", id="one-row"),
        pytest.param(torch.ones(1, 3, 4, 1), ValueError, r"at least 2, got shape \(1, 3, 4, 1\)", id="one-column"),
    ],
)
def test_errors(x, error, message):
    with pytest.raises(error, match=message):
        total_variation(x)


def test_signature_and_example():
    assert inspect.signature(total_variation) == inspect.signature(total_variation_ref)
    assert doctest.testmod(importlib.import_module("kernels.total_variation")).failed == 0


@pytest.mark.gpu
def test_compiles_into_one_graph():
    x = images((2, 3, 32, 32), "cuda")
    compiled = torch.compile(total_variation, fullgraph=True)
    for fused, expected in zip(compiled(x), total_variation(x), strict=True):
        assert fused.item() == pytest.approx(expected.item(), rel=1e-6)
