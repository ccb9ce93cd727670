"""How kernels are launched: on grids that a GPU accepts, on the GPU that holds their tensors."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import evaluate, record_kernels
from test_every_op import each_op, fused

import kernels
from kernels import _common


@pytest.fixture
def recorders(monkeypatch):
    """In place of all kernels; the ops take their Triton path on any device."""
    monkeypatch.setattr(_common, "runs_triton", lambda x: True)
    return record_kernels(monkeypatch)


# Grids


def assert_grids_are_allowed(recorders):
    launched = [recorder for recorder in recorders if recorder.launches]
    assert launched
    for recorder in launched:
        for grid, *_ in recorder.launches:
            assert grid[0] < 2**31, f"{recorder.name}: {grid}"
            assert max(grid[1:], default=1) < 2**16, f"{recorder.name}: {grid}"


def make_meta(*shape, layout=torch.contiguous_format):
    """A tensor without memory, of any size."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16, memory_format=layout)
    return x.requires_grad_()


def run_image_op(name, x):
    """One op, forward and backward, on x (N, C, H, W)."""
    N, C, H, W = x.shape
    vectors = [torch.ones(C, device="meta")] * 4
    if name == "bn_moments":
        results = kernels.bn_moments(x)
    elif name == "bn_moment_loss":
        results = kernels.bn_moment_loss(x, *vectors[:2])
    elif name == "bn_act_moments":
        results = kernels.bn_act_moments(x, *vectors, residual=torch.empty_like(x))
    elif name == "attention_transfer":
        results = kernels.attention_transfer(x, torch.ones(N, H * W, device="meta"))
    elif name == "jittered_view":
        results = kernels.jittered_view(x, torch.ones(3, device="meta", dtype=torch.int64))
    else:
        results = fused(SimpleNamespace(name=name))(x)

    if isinstance(results, torch.Tensor):
        results = (results,)
    sum(value.sum() for value in results).backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 8, 20_000, 20_000), id="large-image"),
        pytest.param((2, 600_000, 16, 16), id="many-channels"),
        pytest.param((2, 20_000_000, 2, 2), id="more-channels"),
        pytest.param((3_000_000, 3, 8, 8), id="many-images"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "bn_moments",
        "bn_moment_loss",
        "bn_act_moments",
        "attention_map",
        "attention_transfer",
        "total_variation",
        "jittered_view",
    ],
)
def test_grids_of_huge_images(name, shape, layout, recorders):
    run_image_op(name, make_meta(*shape, layout=layout))
    assert_grids_are_allowed(recorders)


@pytest.mark.parametrize("name", ["js_divergence", "kl_divergence"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 200_000_000), id="many-classes"),
        pytest.param((100_000_000, 10), id="many-rows"),
        pytest.param((1_000_000, 30_000), id="both"),
    ],
)
def test_grids_of_huge_logits(name, shape, recorders):
    fused(SimpleNamespace(name=name))(make_meta(*shape), make_meta(*shape)).backward()
    assert_grids_are_allowed(recorders)


# Devices


@each_op
def test_every_launch_is_on_the_device_of_its_tensors(op, recorders, monkeypatch):
    def count_launches():
        return Counter({recorder.name: len(recorder.launches) for recorder in recorders})

    inside = Counter()

    @contextlib.contextmanager
    def on_device_of(x):
        before = count_launches()
        yield
        inside.update(count_launches() - before)

    monkeypatch.setattr(_common, "on_device_of", on_device_of)
    evaluate(fused(op), op.make("cpu", **op.small), op.differentiable)
    has_backward = op.name != "fake_quantize_channels"  # whose gradient is dy itself
    assert count_launches().total() >= 1 + has_backward
    outside = +(count_launches() - inside)
    assert not outside


def test_device_of_a_tensor():
    elsewhere = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    assert _common.on_device_of(elsewhere).idx == 1
    with _common.on_device_of(torch.ones(1)):  # without any GPU
        pass


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_op
def test_tensors_on_another_gpu_than_the_current_one(op):
    first, second = (
        evaluate(fused(op), op.make(device, **op.small), op.differentiable)
        for device in ("cuda:0", "cuda:1")
    )
    for a, b in zip(first.results, second.results, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(gradient.cpu(), second.gradients[name].cpu())
