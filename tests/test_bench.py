"""The benchmarks: the gate refuses wrong ops, sweeps end as they began, columns do equal work."""

import importlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import deepinversion
import kernels
from bench import ops, steps
from bench.ops import Case, call_distance, make_activations
from bench.timing import Limits

COUNTS = ((1, 1), (1, 1))


def make_small_cases(device):
    """One small case of every op."""
    x = make_activations((4, 6, 5, 5), "cpu", torch.float32)
    image = make_activations((2, 3, 9, 40), "cpu", torch.float32)
    affine = [torch.rand(6) + 0.5 for _ in range(4)]
    yield Case("bn_moment_loss", "", "", (x, *affine[:2]), *COUNTS)
    yield Case("bn_act_moments", "", "", (x, *affine), *COUNTS)
    yield Case(
        "moment_distance",
        "",
        "",
        (torch.randn(2, 7).requires_grad_(), torch.rand(7)),
        *COUNTS,
        partial(call_distance, kernels.moment_distance, (2, 5)),
        partial(call_distance, kernels.moment_distance_ref, (2, 5)),
    )
    yield Case("total_variation", "", "", (image,), *COUNTS)
    draw = torch.tensor([1, -2, 1])
    yield Case("jittered_view", "", "", (image, draw, torch.float32), *COUNTS)
    p = torch.randn(5, 70)
    q = torch.randn(5, 70).requires_grad_()
    yield Case("js_divergence", "", "", (p.clone().requires_grad_(), q), *COUNTS)
    yield Case("kl_divergence", "", "", (p, q), *COUNTS)
    yield Case("attention_transfer", "", "", (x, torch.rand(4, 25)), *COUNTS)


def read_constants():
    """The tuning constants as they stand now."""
    found = {}
    for modules, constants in ops.SWEEPS.values():
        for module in modules:
            for name in constants:
                value = getattr(importlib.import_module(f"kernels.{module}"), name, None)
                found[module, name] = value
    return found


ONE_OF_EACH_TABLE = (
    "bn_act_moments",
    "moment_distance",
    "jittered_view",
    "attention_transfer",
    "kl_divergence",
)
OTHERS = [op for op in ops.SWEEPS if op not in ONE_OF_EACH_TABLE]


@pytest.mark.parametrize(
    "op", [*ONE_OF_EACH_TABLE, *(pytest.param(op, marks=pytest.mark.slow) for op in OTHERS)]
)
def test_every_candidate_of_a_sweep_is_right_and_the_chosen_one_stays(op, monkeypatch):
    def pretend_to_time(functions, *rest):
        return dict.fromkeys(functions, (1.0, 1.0, 1.0))

    monkeypatch.setattr(ops, "make_cases", make_small_cases)
    monkeypatch.setattr(ops, "time_together", pretend_to_time)
    before = read_constants()
    rows = ops.sweep(op, "cpu", 0.0)
    assert all(row["right"] for row in rows), [row for row in rows if not row["right"]]
    constants = ops.SWEEPS[op][1]
    assert {row["constant"] for row in rows} == set(constants)
    assert len(rows) > 2 * len(constants)
    assert read_constants() == before


def test_every_op_of_a_sweep_has_rows():
    assert set(ops.SWEEPS) == {case.op for case in ops.make_cases("cpu")}


def add_wrong_gradient(x, mean, var):
    extra = x.sum() - x.detach().sum()  # 0, but its gradient is not
    return kernels.bn_moment_loss_ref(x, mean, var) + 1e-4 * extra


def scale_value(factor, x, mean, var):
    return kernels.bn_moment_loss_ref(x, mean, var) * factor


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(partial(scale_value, 1.001), id="value"),
        pytest.param(partial(scale_value, math.nan), id="nan"),
        pytest.param(add_wrong_gradient, id="gradient"),
    ],
)
def test_the_gate_refuses_an_op_that_is_wrong(wrong):
    x = make_activations((4, 6, 5, 5), "cpu", torch.float32)
    inputs = (x, torch.rand(6), torch.rand(6))
    right = Case("bn_moment_loss", "", "", inputs, *COUNTS)
    assert ops.make_calls(right)[1]
    assert not ops.make_calls(replace(right, function=wrong))[1]


def test_minimal_bytes_by_hand():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    network = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    there_and_back = 2 * (2 * 3 * 25 + 2 * 4 * 25 + 4 * 3 * 9)  # input, output, weights
    assert steps.count_bytes(network, x) == 4 * (there_and_back + 5 * 2 * 4 * 25)
    assert not any(module._forward_hooks for module in network.modules())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.bn(x) + x)


def test_minimal_bytes_of_an_addition():
    n_bytes = steps.count_bytes(Residual().eval(), torch.randn(2, 3, 5, 5))
    assert n_bytes == 4 * 8 * 2 * 3 * 25


def test_the_limit_is_the_longer_of_bytes_and_arithmetic():
    limits = Limits(bandwidth=1e9, flops=1e12)
    assert limits.compute_percent(2.0, 1e6, 1e6) == pytest.approx(50)
    assert limits.compute_percent(2.0, 1e3, 1e9) == pytest.approx(50)


def test_columns_of_a_step_do_the_same_work(monkeypatch):
    """Ours without any one op has the terms of ours; the conventional loss is ours of its view."""
    monkeypatch.setattr(kernels._common, "INTERPRET", False)
    case = ("resnet8", "cpu", torch.randn(6, 3, 8, 8), torch.arange(6))
    assert steps.check_first_losses(*case)
    ours = steps.make_ours(*case)().clone()
    for without in ("batchnorm", "moment_distance", "jittered_view"):
        terms = steps.make_ours(*case, without=without)()
        torch.testing.assert_close(terms, ours, rtol=1e-4, atol=1e-6, equal_nan=True)
    conventional = steps.make_conventional(*case)()
    assert conventional == pytest.approx(ours[deepinversion.TERMS.index("total")].item(), rel=1e-4)


def test_columns_of_a_pseudo_batch_have_the_same_first_loss(monkeypatch):
    """The benchmark ends where they differ."""
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    def call_once(functions, *rest):
        return dict.fromkeys(functions, (1.0, 1.0, 1.0))

    monkeypatch.setattr(steps, "time_together", call_once)
    sizes = dict(batch_size=8, width=8)
    rows = steps.bench_pseudo_batch("cpu", 0.0, "digits-lenet5", "lenet5_half", sizes)
    assert [row["op"] for row in rows][:2] == ["pseudo-batch: conventional", "pseudo-batch: ours"]
