"""What js_divergence and kl_divergence have in common: kernel and CPU path against the definition, errors."""

import doctest
import importlib
import math

import pytest
import torch
from helpers import assert_divergence_exact, logits, value_and_gradients

import kernels

INF = math.inf


@pytest.fixture(params=["js_divergence", "kl_divergence"])
def op(request):
    return getattr(kernels, request.param)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ref_gradcheck(layout, temperature, op):
    reference = getattr(kernels, f"{op.__name__}_ref")
    pair = [x if layout == "contiguous" else x.T.contiguous().T for x in logits((3, 5), dtype=torch.float64)]
    assert torch.autograd.gradcheck(reference, (*(x.requires_grad_() for x in pair), temperature))


@pytest.mark.parametrize(
    ("shape", "temperature"),
    [
        pytest.param((1, 1), 1.0, id="smallest"),
        pytest.param((3, 5), 0.5, id="odd"),
        pytest.param((70, 10), 3.0, id="cifar"),
        pytest.param((33, 16), 0.5, id="rows-of-a-program+1"),
        pytest.param((3, 1000), 3.0, id="imagenet"),
        pytest.param((2, 1024), 1.0, id="backward-block"),
        pytest.param((2, 1025), 1.0, id="backward-block+1"),
        pytest.param((2, 4095), 1.0, id="block-1"),
        pytest.param((2, 4096), 20.0, id="block"),
        pytest.param((2, 4097), 1.0, id="block+1"),
        pytest.param((2, 21841), 1.0, id="imagenet-21k"),
    ],
)
def test_matches_ref(shape, temperature, backend, device, op):
    assert_divergence_exact(op, *logits(shape, device), temperature)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_layouts(layout, backend, device, op):
    p_logits, q_logits = logits((5, 12), device)
    p_logits = {
        "transposed": lambda x: x.T.contiguous().T,
        "sliced": lambda x: torch.nn.functional.pad(x, (1, 11), value=9.0)[:, 1::2],
        "offset": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
        "expanded": lambda x: x[:1].expand(x.shape),
    }[layout](p_logits)
    assert_divergence_exact(op, p_logits, q_logits)
    assert_divergence_exact(op, q_logits, p_logits)


@pytest.mark.parametrize(
    ("p_dtype", "q_dtype"),
    [
        pytest.param(torch.float16, torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
        pytest.param(torch.float32, torch.bfloat16, id="fp32-and-bf16"),
    ],
)
def test_dtypes(p_dtype, q_dtype, backend, device, op):
    p_logits, q_logits = logits((9, 33), device)
    assert_divergence_exact(op, p_logits.to(p_dtype), q_logits.to(q_dtype), 2.0)


@pytest.mark.parametrize("needs", ["p", "q", "none"])
def test_inputs_that_need_no_grad(needs, backend, device, op):
    pair = logits((5, 12), device)
    p_logits, q_logits = (x.requires_grad_(name == needs) for name, x in zip("pq", pair, strict=True))
    value = op(p_logits, q_logits)
    assert value.requires_grad == (needs != "none")
    if needs == "none":
        return
    (3 * value).backward()
    both = value_and_gradients(op, p_logits, q_logits, 1.0, 3.0)[1:]
    assert [x is None for x in (p_logits.grad, q_logits.grad)] == [needs == "q", needs == "p"]
    assert torch.equal(p_logits.grad, both[0]) if needs == "p" else torch.equal(q_logits.grad, both[1])


@pytest.mark.parametrize("K", [6, 4200])
def test_identical(K, backend, device, op):
    p_logits, _ = logits((3, K), device)
    p_logits[2] = 7.0  # constant: both uniform
    value, dp, dq = value_and_gradients(op, p_logits, p_logits.clone(), 3.0, 1.0)
    assert value.item() == 0 and not dp.any() and not dq.any()


@pytest.mark.parametrize(("N", "K"), [(40, 10), (4, 4200)])
def test_repeats_bit_for_bit(N, K, backend, device, op):
    first, second = (value_and_gradients(op, *logits((N, K), device), 2.0, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing(backend, device, op):
    pair = [x.bfloat16() for x in logits((5, 12), device)]
    expected = value_and_gradients(op, *pair, 2.0, 0.3)
    with torch.autocast(device, torch.bfloat16):
        got = value_and_gradients(op, *pair, 2.0, 0.3)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_backward_raises(backend, device, op):
    p_logits, q_logits = (x.requires_grad_() for x in logits((2, 3), device))
    for x in (p_logits, q_logits):
        with pytest.raises(RuntimeError, match=f"{op.__name__}: no second derivative; use {op.__name__}_ref"):
            torch.autograd.grad(op(p_logits, q_logits), x, create_graph=True)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        pytest.param((ONES, [1.0]), TypeError, "OP: expected q_logits to be a tensor, got list", id="list"),
        pytest.param((ONES.long(), ONES), TypeError, "p_logits in float32, .* got torch.int64", id="integers"),
        pytest.param((ONES, ONES.double()), TypeError, "got torch.float64; .* use OP_ref", id="float64"),
        pytest.param((ONES[:0], ONES[:0]), ValueError, r"got shape \(0, 3\); drop the empty batch", id="empty"),
        pytest.param((ONES, ONES.T), ValueError, r"got \(\(2, 3\), \(3, 2\)\); reshape", id="unequal"),
        pytest.param((ONES[0], ONES[0]), ValueError, r"one shape \(N, K\), got \(\(3,\)", id="1-D"),
        pytest.param((ONES, ONES.to("meta")), ValueError, "expected one device, got .*'meta'", id="devices"),
        pytest.param((ONES, ONES, INF), ValueError, "finite temperature > 0, got inf", id="infinite"),
        pytest.param((ONES, ONES, 0), ValueError, "finite temperature > 0, got 0", id="zero"),
        pytest.param((ONES, ONES, math.nan), ValueError, "finite temperature > 0, got nan", id="nan"),
        pytest.param((ONES, ONES, ONES), TypeError, "python number, got Tensor; pass a float", id="tensor"),
    ],
)
def test_errors(args, error, message, op):
    with pytest.raises(error, match=message.replace("OP", op.__name__)):
        op(*args)


def test_example(op):
    tested = doctest.testmod(importlib.import_module(op.__module__))
    assert tested.attempted and not tested.failed


@pytest.mark.gpu
def test_no_synchronisation(op):
    pair = [x.requires_grad_() for x in logits((8, 1000), "cuda")]
    op(*pair).backward()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*pair).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_compiles_into_one_graph(op):
    pair = logits((8, 1000), "cuda")
    compiled = torch.compile(op, fullgraph=True)
    assert compiled(*pair).item() == pytest.approx(op(*pair).item(), rel=1e-6)
