"""Chooses Triton's interpreter where there is no GPU, seeds every test, poisons fresh memory."""

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
    # numpy warns of every inf - inf and 0 / 0 of a lane that a kernel masks afterwards
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers in every run and in every order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """On a GPU cuDNN takes the same algorithm each time, captured or eager, and no TF32.

    The rule by which an op is right compares it with float64, as plain fp32 would be.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what torch.empty, empty_like and new_empty return with NaN.

    An output that no kernel wrote then shows.
    """

    def poison(make):
        def make_poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point():
                x.detach().fill_(float("nan"))  # it may be a leaf that wants a gradient
            return x

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    """Run a test twice: through the Triton kernels (interpreted on a CPU), through the CPU path."""
    from kernels import _common

    if request.param == "torch":
        monkeypatch.setattr(_common, "INTERPRET", False)
    return request.param


@pytest.fixture
def device(request):
    """The GPU for the Triton kernels where there is one; the CPU path always gets CPU tensors."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "torch":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"
