"""CapturedStep: which calls warm up, capture and replay; on a GPU the result of a training loop."""

import ast
import runpy
import sys

import pytest
import torch
from scripts import ROOT
from test_scripts import COMMANDS
from torch import nn

import kernels
from kernels import _common


class Recording(kernels.CapturedStep):
    """A CapturedStep on a machine without a GPU: notes what it would do and runs the step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = []

    def warm_up(self):
        self.events.append("warm up")
        self.step()

    def capture(self):
        self.events.append("capture")
        return self

    def replay(self):
        self.events.append("replay")
        self.step()


@pytest.fixture
def counter(monkeypatch):
    """A step that counts its runs, on a machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return torch.zeros(())


@pytest.mark.parametrize("n_warmup", [1, 3])
def test_each_call_is_one_step(n_warmup, counter):
    captured = Recording(lambda: counter.add_(1), n_warmup=n_warmup)
    for n_calls in range(1, n_warmup + 4):
        captured()
        assert counter == n_calls
    assert captured.events == n_warmup * ["warm up"] + ["capture"] + 3 * ["replay"]


def test_default_is_three_calls_of_warmup(counter):
    captured = Recording(lambda: counter.add_(1))
    for _ in range(4):
        captured()
    assert captured.events == 3 * ["warm up"] + ["capture", "replay"]


def test_disabled_is_the_step_itself(counter):
    captured = Recording(lambda: counter.add_(1), enabled=False)
    for _ in range(6):
        captured()
    assert counter == 6
    assert not captured.events


def test_without_a_gpu_it_is_the_step_itself(counter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    captured = Recording(lambda: counter.add_(1))
    for _ in range(6):
        captured()
    assert counter == 6
    assert not captured.events


def test_failed_capture_is_tried_again(counter, monkeypatch):
    captured = Recording(lambda: counter.add_(1), n_warmup=1)
    captured()

    def fail(self):
        raise RuntimeError("not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "capture", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="capturing"):
                captured()
    captured()
    assert captured.events == ["warm up", "capture", "replay"]
    assert counter == 2


@pytest.mark.parametrize("n_warmup", [0, -1])
def test_no_warmup_is_refused(n_warmup):
    message = f"CapturedStep: expected n_warmup of at least 1, got {n_warmup}; 3 is the default"
    with pytest.raises(ValueError, match=message):
        kernels.CapturedStep(lambda: None, n_warmup=n_warmup)


def list_captured_steps():
    """The calls of CapturedStep in scripts and benchmarks, as (file, expression of `enabled`)."""
    rows = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("CapturedStep"):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                rows.append((path.name, keywords.get("enabled", "missing")))
    return rows


def test_steps_are_captured_only_where_the_run_is_on_a_gpu():
    """Not merely where the machine has one."""
    rows = list_captured_steps()
    assert len(rows) >= 7
    for name, enabled in rows:
        assert enabled.endswith(("x.is_cuda", "== 'cuda'")), f"{name}: enabled={enabled}"


@pytest.mark.parametrize(
    "name", ["deepinversion-student", "generative_ensemble", "pseudo_replay", "zskt"]
)
def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_captures_nothing(name, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a run on the CPU touches the GPU")

    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    script, *options = COMMANDS[name].split()
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [script, *options, "--device", "cpu", "--out", str(out)])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert (out / "result.json").exists()


def train(device, n_steps, captured):
    """Distil one small network into another, on noise, at a falling rate; all that changes."""
    torch.manual_seed(0)
    bodies = []
    heads = []
    for C in (16, 8):
        body = nn.Sequential(nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C))
        bodies.append(body.to(device))
        heads.append(nn.Linear(C, 10).to(device))
    parameters = [*bodies[1].parameters(), *heads[1].parameters()]
    learning_rate = torch.tensor(1e-2, device=device)
    optimizer = torch.optim.Adam(parameters, learning_rate, capturable=device == "cuda")
    total_loss = torch.zeros((), device=device)

    def step():
        optimizer.param_groups[0]["lr"].mul_(0.9)
        x = torch.randn(32, 3, 8, 8, device=device)
        with torch.no_grad():
            features = bodies[0](x)
            teacher_logits = heads[0](features.mean((2, 3)))
            teacher_map = kernels.attention_map(features)
        features = bodies[1](x)
        student_logits = heads[1](features.mean((2, 3)))
        loss = kernels.kl_divergence(teacher_logits, student_logits)
        loss = loss + kernels.attention_transfer(features, teacher_map)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total_loss.add_(loss.detach())

    run = kernels.CapturedStep(step, enabled=device == "cuda") if captured else step
    for _ in range(n_steps):
        run()
    return [*parameters, *bodies[1].buffers(), optimizer.param_groups[0]["lr"], total_loss]


def test_training_on_cpu_is_the_plain_loop(monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)  # the interpreter takes seconds
    for a, b in zip(train("cpu", 2, False), train("cpu", 2, True), strict=True):
        assert torch.equal(a, b)


def test_convolutions_are_deterministic_in_every_test():
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.gpu
def test_captured_training_is_the_plain_loop():
    """The same noise, the same steps, every sum in the same order."""
    for a, b in zip(train("cuda", 10, False), train("cuda", 10, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
