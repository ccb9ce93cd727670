"""js_divergence: definition, kernel and CPU path against it, extremes, properties, errors."""

import doctest
import importlib
import inspect
import math

import pytest
import torch
from helpers import assert_as_exact_as_eager

from kernels import js_divergence, js_divergence_ref

INF = math.inf
SHAPES = [
    pytest.param((1, 1), 1.0, id="smallest"),
    pytest.param((3, 5), 0.5, id="odd"),
    pytest.param((70, 10), 3.0, id="cifar"),
    pytest.param((33, 16), 1.0, id="rows-of-a-program+1"),
    pytest.param((3, 1000), 3.0, id="imagenet"),
    pytest.param((2, 1024), 1.0, id="backward-block"),
    pytest.param((2, 1025), 1.0, id="backward-block+1"),
    pytest.param((2, 4095), 1.0, id="block-1"),
    pytest.param((2, 4096), 20.0, id="block"),
    pytest.param((2, 4097), 1.0, id="block+1"),
    pytest.param((2, 21841), 1.0, id="imagenet-21k"),
]


def logits(shape, device="cpu", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(2))


def value_and_gradients(op, p_logits, q_logits, temperature, cotangent):
    p_logits, q_logits = (x.detach().requires_grad_() for x in (p_logits, q_logits))
    js = op(p_logits, q_logits, temperature)
    return js, *torch.autograd.grad(cotangent * js, (p_logits, q_logits))


def assert_exact(p_logits, q_logits, temperature=1.0, cotangent=-1.37):
    """The value and both gradients, by the measured-tolerance rule."""
    pair = p_logits, q_logits
    fused = value_and_gradients(js_divergence, *pair, temperature, cotangent)
    exact = value_and_gradients(js_divergence_ref, *(x.double() for x in pair), temperature, cotangent)
    eager = value_and_gradients(js_divergence_ref, *(x.float() for x in pair), temperature, cotangent)
    assert fused[0].dtype == torch.float32 and fused[0].shape == ()
    assert [x.dtype for x in fused[1:]] == [x.dtype for x in pair]
    for name, *values in zip(("value", "dp", "dq"), fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)
    return fused


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ref_gradcheck(layout, temperature):
    pair = [x if layout == "contiguous" else x.T.contiguous().T for x in logits((3, 5), dtype=torch.float64)]
    assert torch.autograd.gradcheck(js_divergence_ref, (*(x.requires_grad_() for x in pair), temperature))


def test_ref_by_hand():
    # P = (1/2, 1/2), Q = (1/4, 3/4), M = (3/8, 5/8)
    expected = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) + 0.5 * (
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    )
    p_logits, q_logits = torch.tensor([[5.0, 5.0]]).double(), torch.tensor([[0.0, math.log(3)]]).double()
    assert js_divergence_ref(p_logits, q_logits).item() == pytest.approx(expected, rel=1e-7)
    # T = 2 on doubled logits is the same
    assert js_divergence_ref(2 * p_logits, 2 * q_logits, 2).item() == pytest.approx(expected, rel=1e-7)


def test_ref_is_an_entropy_difference():
    p_logits, q_logits = logits((4, 7), dtype=torch.float64)
    p, q = torch.softmax(p_logits, 1), torch.softmax(q_logits, 1)
    H_m, H_p, H_q = (torch.special.entr(x).sum(1) for x in ((p + q) / 2, p, q))
    expected = (H_m - (H_p + H_q) / 2).mean()
    assert js_divergence_ref(p_logits, q_logits).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("shape", "temperature"), SHAPES)
def test_matches_ref(shape, temperature, backend, device):
    assert_exact(*logits(shape, device), temperature)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_layouts(layout, backend, device):
    p_logits, q_logits = logits((5, 12), device)
    p_logits = {
        "transposed": lambda x: x.T.contiguous().T,
        "sliced": lambda x: torch.nn.functional.pad(x, (1, 11), value=9.0)[:, 1::2],
        "offset": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
        "expanded": lambda x: x[:1].expand(x.shape),
    }[layout](p_logits)
    assert_exact(p_logits, q_logits)
    assert_exact(q_logits, p_logits)


@pytest.mark.parametrize(
    ("p_dtype", "q_dtype"),
    [
        pytest.param(torch.float16, torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
        pytest.param(torch.float32, torch.bfloat16, id="fp32-and-bf16"),
    ],
)
def test_dtypes(p_dtype, q_dtype, backend, device):
    p_logits, q_logits = logits((9, 33), device)
    assert_exact(p_logits.to(p_dtype), q_logits.to(q_dtype), 2.0)


@pytest.mark.parametrize("needs", ["p", "q", "none"])
def test_inputs_that_need_no_grad(needs, backend, device):
    pair = logits((5, 12), device)
    p_logits, q_logits = (x.requires_grad_(name == needs) for name, x in zip("pq", pair, strict=True))
    js = js_divergence(p_logits, q_logits)
    assert js.requires_grad == (needs != "none")
    if needs == "none":
        return
    (3 * js).backward()
    both = value_and_gradients(js_divergence, p_logits, q_logits, 1.0, 3.0)[1:]
    assert [x is None for x in (p_logits.grad, q_logits.grad)] == [needs == "q", needs == "p"]
    assert torch.equal(p_logits.grad, both[0]) if needs == "p" else torch.equal(q_logits.grad, both[1])


@pytest.mark.parametrize("K", [6, 4200])
def test_identical(K, backend, device):
    p_logits, _ = logits((3, K), device)
    value, dp, dq = value_and_gradients(js_divergence, p_logits, p_logits.clone(), 3.0, 1.0)
    assert value.item() == 0 and not dp.any() and not dq.any()


@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-5])
def test_nearly_identical(difference, backend, device):
    """Never negative; and the kernel keeps four digits where eager has none: its terms do not cancel."""
    p_logits, noise = logits((4, 200), device)
    q_logits = p_logits + difference * noise
    value, *_ = assert_exact(p_logits, q_logits)
    exact = js_divergence_ref(p_logits.double(), q_logits.double())
    assert value >= 0
    if backend == "triton":
        assert value.item() == pytest.approx(exact.item(), rel=1e-4)


EXTREMES = {
    "log-prob-200-in-both": ([[0.0, 1.0, -200.0], [1.0, 0.5, -200.0]], [[1.0, 0.0, -200.0], [0.0, 2.0, -201.0]]),
    "logits-1e4": ([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], [[-1e4, 1e4, 9999.0], [1e4, 1e4 - 1, -1e4]]),
    "ruled-out": ([[0.0, -INF, 1.0], [-INF, 0.0, 1.0]], [[1.0, -INF, 0.5], [0.0, -INF, 1.0]]),
    "one-class-left": ([[0.0, -INF, -INF], [0.0, 1.0, 2.0]], [[-INF, 0.0, -INF], [-INF, -INF, 0.0]]),
    "constants-apart": ([[1000.0, 1001.0, 999.0]], [[-1000.0, -999.5, -1001.0]]),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme, backend, device):
    p_logits, q_logits = (torch.tensor(x, device=device) for x in EXTREMES[extreme])
    fused = assert_exact(p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)
    for x, dx in ((p_logits, fused[1]), (q_logits, fused[2])):
        assert not dx[x == -INF].any()  # nothing pulls at a class that is ruled out


@pytest.mark.parametrize("first_block", [-INF, -3.0])
def test_long_rows_with_ruled_out_blocks(first_block, backend, device):
    p_logits, q_logits = logits((2, 4300), device)
    p_logits[0, :4096], q_logits[1, 4096:] = first_block, -INF
    fused = assert_exact(p_logits, q_logits)
    assert all(x.isfinite().all() for x in fused)


@pytest.mark.parametrize("bad", ["ruled-out-row", "nan", "+inf"])
def test_nan_shows(bad, backend, device):
    p_logits, q_logits = logits((2, 5), device)
    p_logits[1, slice(None) if bad == "ruled-out-row" else 2] = {"ruled-out-row": -INF, "nan": math.nan, "+inf": INF}[
        bad
    ]
    value, dp, dq = value_and_gradients(js_divergence, p_logits, q_logits, 1.0, 1.0)
    assert value.isnan() and dp[1].isnan().all() and dq[1].isnan().all()
    assert dp[0].isfinite().all() and dq[0].isfinite().all()  # the other row is as it was
    assert js_divergence_ref(p_logits, q_logits).isnan()


def test_properties(backend, device):
    p_logits, q_logits = logits((6, 9), device)
    value = js_divergence(p_logits, q_logits).item()
    assert 0 < value < math.log(2)
    assert js_divergence(q_logits, p_logits).item() == pytest.approx(value, rel=1e-6)
    constants = torch.arange(6, device=device)[:, None] * 8.0 - 20
    assert js_divergence(p_logits + constants, q_logits).item() == pytest.approx(value, rel=1e-5)
    order = torch.arange(8, -1, -1, device=device)
    assert js_divergence(p_logits[:, order], q_logits[:, order]).item() == pytest.approx(value, rel=1e-6)
    disjoint = js_divergence(1e3 * torch.eye(4, device=device), 1e3 * torch.eye(4, device=device).flip(0)).item()
    assert disjoint == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("N", "K"), [(40, 10), (4, 4200)])
def test_repeats_bit_for_bit(N, K, backend, device):
    first, second = (value_and_gradients(js_divergence, *logits((N, K), device), 2.0, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_raises(backend, device):
    p_logits, q_logits = (x.requires_grad_() for x in logits((2, 3), device))
    with pytest.raises(RuntimeError, match="js_divergence: no second derivative; use js_divergence_ref"):
        torch.autograd.grad(js_divergence(p_logits, q_logits), p_logits, create_graph=True)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param((ONES, [1.0]), TypeError, "js_divergence: expected q_logits to be a tensor, got list", id="list"),
        pytest.param((ONES.long(), ONES), TypeError, "p_logits in float32, .* got torch.int64", id="integers"),
        pytest.param((ONES, ONES.double()), TypeError, "got torch.float64; .* use js_divergence_ref", id="float64"),
        pytest.param((ONES[:0], ONES[:0]), ValueError, r"got shape \(0, 3\); drop the empty batch", id="empty"),
        pytest.param((ONES, ONES.T), ValueError, r"got \(\(2, 3\), \(3, 2\)\); reshape", id="unequal"),
        pytest.param((ONES[0], ONES[0]), ValueError, r"one shape \(N, K\), got \(\(3,\)", id="1-D"),
        pytest.param((ONES, ONES, 0.0), ValueError, "finite temperature > 0, got 0.0", id="zero"),
        pytest.param((ONES, ONES, math.nan), ValueError, "finite temperature > 0, got nan", id="nan"),
        pytest.param((ONES, ONES, ONES), TypeError, "python number, got Tensor; pass a float", id="tensor"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        js_divergence(*args)


def test_signature_and_example():
    assert inspect.signature(js_divergence) == inspect.signature(js_divergence_ref)
    assert doctest.testmod(importlib.import_module("kernels.js_divergence")).failed == 0


@pytest.mark.gpu
def test_compiles_into_one_graph():
    pair = logits((8, 1000), "cuda")
    compiled = torch.compile(js_divergence, fullgraph=True)
    assert compiled(*pair).item() == pytest.approx(js_divergence(*pair).item(), rel=1e-6)
