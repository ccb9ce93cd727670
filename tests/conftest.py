"""Chooses the interpreter where there is no GPU, skips GPU-only cases with a reason, seeds, poisons fresh memory."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports kernels
torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers in every run and in every order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what torch.empty and its kin return with NaN: an output that no kernel wrote shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """Run a test twice: through the Triton kernels (interpreted on a CPU) and through the CPU path."""
    from kernels import _common

    if request.param == "torch":
        monkeypatch.setattr(_common, "INTERPRET", False)
    return request.param


@pytest.fixture
def device(request):
    """The GPU for the Triton kernels where there is one; the CPU path always gets CPU tensors."""
    on_cpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "torch"
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
