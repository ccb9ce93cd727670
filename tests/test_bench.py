"""kernels.bench: its gate catches wrong ops, every candidate of a sweep is right, its counts are those of hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernels
from kernels import bench, bench_steps


def small_cases(device):
    """One small case of every op."""
    x, vectors = bench.laid_out((4, 6, 5, 5), "cpu", torch.float32), [torch.rand(6) + 0.5 for _ in range(4)]
    sizes = (1, 1), (1, 1)
    yield bench.case("bn_moment_loss", x, *sizes, *vectors[:2])
    yield bench.case("bn_act_moments", x, *sizes, *vectors)
    ops = {
        "function": lambda m, v: kernels.moment_distance(m, v, (2, 5)),
        "reference": lambda m, v: kernels.moment_distance_ref(m, v, (2, 5)),
    }
    yield bench.case("moment_distance", torch.randn(2, 7).requires_grad_(), *sizes, torch.rand(7), **ops)
    yield bench.case("total_variation", bench.laid_out((2, 3, 9, 40), "cpu", torch.float32), *sizes)
    draw = torch.tensor([1, -2, 1])
    yield bench.case("jittered_view", bench.laid_out((2, 3, 9, 40), "cpu", torch.float32), *sizes, draw, torch.float32)
    p, q = (torch.randn(5, 70).requires_grad_() for _ in range(2))
    yield bench.case("js_divergence", p, *sizes, q)
    yield bench.case("kl_divergence", p.detach(), *sizes, q)
    yield bench.case("attention_transfer", x, *sizes, torch.rand(4, 25))


def test_every_candidate_of_a_sweep_is_right(monkeypatch):
    """Through the interpreter; what stands in the files is back afterwards."""
    monkeypatch.setattr(bench, "op_cases", small_cases)
    monkeypatch.setattr(bench, "time_together", lambda functions, *rest: {name: (1.0, 1.0, 1.0) for name in functions})

    def constants_now():
        standing = [
            (f"kernels.{m}", name) for modules, names in bench.SWEEPS.values() for m in modules for name in names
        ]
        return {key: getattr(bench.importlib.import_module(key[0]), key[1], None) for key in standing}

    before = constants_now()
    assert set(bench.SWEEPS) == {case.op for case in small_cases("cpu")} == {case.op for case in bench.op_cases("cpu")}
    for op, (_, constants) in bench.SWEEPS.items():
        rows = bench.sweep(op, "cpu", 0.0)
        assert all(row["right"] for row in rows), [row for row in rows if not row["right"]]
        assert {row["constant"] for row in rows} == set(constants)
        assert len(rows) > 2 * len(constants)
    assert constants_now() == before


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_the_gate_refuses_an_op_that_is_wrong(wrong):
    def op(x, mean, var):
        value = kernels.bn_moment_loss_ref(x, mean, var)
        if wrong == "gradient":
            return value + 1e-4 * (x.sum() - x.detach().sum())
        return value * (1.001 if wrong == "value" else math.nan)

    x, moments = bench.laid_out((4, 6, 5, 5), "cpu", torch.float32), [torch.rand(6) for _ in range(2)]
    for function, right in ((op, False), (kernels.bn_moment_loss, True)):
        c = bench.case("bn_moment_loss", x, (1, 1), (1, 1), *moments, function=function)
        assert bench.checked_calls(c)[0] == right


def test_minimal_bytes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    convolution = 2 * (2 * 3 * 25 + 2 * 4 * 25 + 4 * 3 * 9)  # there and back: input, output, weights
    assert bench_steps.minimal_bytes(model, x) == 4 * (convolution + 5 * 2 * 4 * 25)
    assert not any(m._forward_hooks for m in model.modules())


def test_minimal_bytes_of_an_addition():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return torch.relu(self.bn(x) + x)

    assert bench_steps.minimal_bytes(Residual().eval(), torch.randn(2, 3, 5, 5)) == 4 * 8 * 2 * 3 * 25


def test_percent_of_limit_takes_the_longer_of_both():
    limits = SimpleNamespace(bandwidth=1e9, flops=1e12)
    assert bench.percent_of_limit(2.0, 1e6, 1e6, limits) == pytest.approx(50)
    assert bench.percent_of_limit(2.0, 1e3, 1e9, limits) == pytest.approx(50)


def test_columns_of_a_step_do_the_same_work(monkeypatch):
    """Ours with any part off has the terms of ours; conventional's loss is ours of its view, each layer once."""
    monkeypatch.setattr(kernels._common, "INTERPRET", False)
    case = "resnet8", "cpu", torch.randn(6, 3, 8, 8), torch.arange(6)
    assert bench_steps.first_losses_agree(*case)
    expected = bench_steps.ours(*case)().clone()
    for off in bench_steps.OFF.values():
        assert torch.allclose(bench_steps.ours(*case, off=off)(), expected, rtol=1e-4)
    di, noise, labels = bench_steps.deepinversion, *case[2:]
    setting = di.SETTINGS["cifar10"] | dict.fromkeys(bench_steps.FUSED, True) | dict(bf16=False, sync_moments=False)
    setting |= dict(first_bn=1.0, alpha_l2=1e-5, alpha_tv_l1=1e-3)
    teacher = SimpleNamespace(measured=di.measured(bench_steps.frozen("resnet8", "cpu"), setting, "cpu"))
    total, _ = di.synthesis_loss(noise, torch.tensor([1, -1, 0]), labels, teacher, setting)
    assert bench_steps.conventional(*case)() == pytest.approx(total.item(), rel=1e-4)
