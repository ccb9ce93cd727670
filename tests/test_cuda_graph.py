"""CapturedStep: without a GPU the function itself; with a stand-in for torch.cuda its protocol; on a GPU the result."""

import contextlib
import doctest
import importlib

import pytest
import torch
from torch import nn

from kernels import CapturedStep, _common, attention_map, attention_transfer, kl_divergence


class Device:
    """Stands in for torch.cuda: runs what is launched, records it while a graph captures, and notes the order."""

    def __init__(self, monkeypatch):
        self.events, self.n_done, self.recording, self.n_streams = [], 0, None, 0
        device = self

        class Stream:
            def __init__(self):
                self.name = f"side{device.n_streams}"
                device.n_streams += 1

            def wait_stream(self, other):
                device.events.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self):
                self.work = []

            def replay(self):
                device.events.append(f"replay on {device.current.name}")
                for launched in self.work:
                    launched()

        @contextlib.contextmanager
        def stream(chosen):
            device.current, before = chosen, device.current
            yield
            device.current = before

        @contextlib.contextmanager
        def graph(captured):
            assert device.recording is None and not captured.work
            device.events.append("capture")
            device.recording = captured.work
            try:
                yield
            finally:
                device.recording = None

        self.current = Stream()
        self.current.name, self.n_streams = "main", 0
        parts = dict(Stream=Stream, CUDAGraph=CUDAGraph, stream=stream, graph=graph)
        parts |= dict(current_stream=lambda: device.current, is_available=lambda: True)
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)

    def step(self):
        """What a training step is to a graph: launches, of which capturing makes records."""

        def work():
            self.n_done += 1

        if self.recording is None:
            self.events.append(f"step on {self.current.name}")
            work()
        else:
            self.recording.append(work)


@pytest.fixture
def fake_cuda(monkeypatch):
    return Device(monkeypatch)


@pytest.mark.parametrize("n_warmup", [1, 3])
def test_protocol(n_warmup, fake_cuda):
    captured, n_calls = CapturedStep(fake_cuda.step, n_warmup=n_warmup), n_warmup + 3
    for i in range(1, n_calls + 1):
        captured()
        assert fake_cuda.n_done == i  # one step's effect a call: none lost, none doubled
    warmup = ["side0 waits for main", "step on side0", "main waits for side0"]
    assert fake_cuda.events == n_warmup * warmup + ["capture"] + 3 * ["replay on main"]


def test_default_is_three_calls_of_warmup(fake_cuda):
    captured = CapturedStep(fake_cuda.step)
    for _ in range(4):
        captured()
    assert fake_cuda.events.count("step on side0") == 3 and fake_cuda.events[-2:] == [
        "capture",
        "replay on main",
    ]


def test_disabled_is_the_step_itself(fake_cuda):
    captured = CapturedStep(fake_cuda.step, enabled=False)
    for _ in range(6):
        captured()
    assert fake_cuda.n_done == 6 and fake_cuda.events == 6 * ["step on main"]


def test_failed_capture_leaves_no_graph(fake_cuda):
    broken = []

    def step():
        fake_cuda.step()
        if broken:
            raise RuntimeError("not permitted when stream is capturing")

    captured = CapturedStep(step, n_warmup=1)
    captured()
    broken.append(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"):
            captured()
    broken.clear()
    captured()
    assert fake_cuda.n_done == 2 and fake_cuda.events[-2:] == ["capture", "replay on main"]


def test_without_a_gpu_it_is_the_step_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []
    captured = CapturedStep(lambda: calls.append(1))
    for i in range(6):
        captured()
        assert len(calls) == i + 1


@pytest.mark.parametrize("n_warmup", [0, -1])
def test_errors(n_warmup):
    with pytest.raises(
        ValueError, match=f"CapturedStep: expected n_warmup of at least 1, got {n_warmup}; 3 is"
    ):
        CapturedStep(lambda: None, n_warmup=n_warmup)


def test_example():
    assert doctest.testmod(importlib.import_module("kernels.cuda_graph")).failed == 0


def train(device, n_steps, captured):
    """Distil one small network into another on noise, at a falling rate; returns all that changes."""
    torch.manual_seed(0)
    bodies = [
        nn.Sequential(nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C)).to(device) for C in (16, 8)
    ]
    heads = [nn.Linear(C, 10).to(device) for C in (16, 8)]
    parameters = [*bodies[1].parameters(), *heads[1].parameters()]
    optimizer = torch.optim.Adam(
        parameters, torch.tensor(1e-2, device=device), capturable=device == "cuda"
    )
    losses = torch.zeros((), device=device)

    def step():
        optimizer.param_groups[0]["lr"].mul_(0.9)
        x = torch.randn(32, 3, 8, 8, device=device)
        with torch.no_grad():
            teacher = bodies[0](x)
            t_logits, maps = heads[0](teacher.mean((2, 3))), attention_map(teacher)
        student = bodies[1](x)
        loss = kl_divergence(t_logits, heads[1](student.mean((2, 3)))) + attention_transfer(
            student, maps
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.add_(loss.detach())

    run = CapturedStep(step, enabled=device == "cuda") if captured else step
    for _ in range(n_steps):
        run()
    return [*parameters, *bodies[1].buffers(), optimizer.param_groups[0]["lr"], losses]


def test_training_on_cpu(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRET", False)  # the interpreter takes seconds
    assert all(
        torch.equal(a, b)
        for a, b in zip(train("cpu", 2, False), train("cpu", 2, True), strict=True)
    )


@pytest.mark.gpu
def test_captured_training_is_the_plain_loop(monkeypatch):
    """Same noise, same steps, every sum in the same order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for a, b in zip(train("cuda", 10, False), train("cuda", 10, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
