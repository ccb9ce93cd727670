"""The benchmarks: the gate refuses wrong ops, sweeps end as they began, columns do equal work."""

import importlib
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import deepinversion
import kernels
from bench import __main__ as bench_main
from bench import ops, steps
from bench.ops import Case, call_bn_act, call_distance, make_activations, make_bn_act_case
from bench.timing import Limits, Times, choose_slower, time_together

COUNTS = ((1, 1), (1, 1))


def make_small_cases(device):
    """One small case of every op."""
    x = make_activations((4, 6, 5, 5), device, torch.float32)
    image = make_activations((2, 3, 9, 40), device, torch.float32)
    affine = [torch.rand(6, device=device) + 0.5 for _ in range(4)]
    yield Case("bn_moment_loss", "", "", (x, *affine[:2]), *COUNTS)
    yield Case("bn_act_moments", "", "", (x, *affine), *COUNTS)
    yield Case(
        "moment_distance",
        "",
        "",
        (torch.randn(2, 7, device=device).requires_grad_(), torch.rand(7, device=device)),
        *COUNTS,
        partial(call_distance, kernels.moment_distance, (2, 5)),
        partial(call_distance, kernels.moment_distance_ref, (2, 5)),
    )
    yield Case("total_variation", "", "", (image,), *COUNTS)
    draw = torch.tensor([1, -2, 1], device=device)
    yield Case("jittered_view", "", "", (image, draw, torch.float32), *COUNTS)
    p = torch.randn(5, 70, device=device)
    q = torch.randn(5, 70, device=device).requires_grad_()
    yield Case("js_divergence", "", "", (p.clone().requires_grad_(), q), *COUNTS)
    yield Case("kl_divergence", "", "", (p, q), *COUNTS)
    yield Case("attention_transfer", "", "", (x, torch.rand(4, 25, device=device)), *COUNTS)


def pretend_to_time(functions, *rest):
    return dict.fromkeys(functions, Times(1.0, 1.0, 1.0))


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
def test_every_candidate_of_a_sweep_is_right_and_the_chosen_one_stays(op, device, monkeypatch):
    """On a GPU where there is one, because CPU tensors reach no kernel there."""
    monkeypatch.setattr(ops, "make_cases", make_small_cases)
    monkeypatch.setattr(ops, "time_together", pretend_to_time)
    before = read_constants()
    rows = ops.sweep(op, device, 0.0)
    assert not [row for row in rows if "problem" in row]
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
    assert ops.make_calls(right)[1] == ""
    assert ops.make_calls(replace(right, function=wrong)) == ({}, ops.DISAGREES)


def raise_error(*inputs):
    raise RuntimeError("out of shared memory")


@pytest.mark.parametrize(
    "wrong, problem",
    [
        pytest.param(partial(scale_value, 1.001), ops.DISAGREES, id="value"),
        pytest.param(raise_error, "RuntimeError: out of shared memory", id="error"),
    ],
)
def test_a_wrong_op_marks_its_rows_and_the_others_are_timed(wrong, problem, monkeypatch, capsys):
    """And the benchmark still fails, at its very end."""

    def make_three_cases(device):
        x = make_activations((4, 6, 5, 5), device, torch.float32)
        inputs = (x, torch.rand(6), torch.rand(6))
        right = Case("bn_moment_loss", "first", "", inputs, *COUNTS)
        yield right
        yield replace(right, shape="second", function=wrong)
        yield replace(right, shape="third")

    monkeypatch.setattr(ops, "make_cases", make_three_cases)
    monkeypatch.setattr(ops, "time_together", pretend_to_time)
    monkeypatch.setattr(ops, "can_compile", lambda device: False)
    monkeypatch.setattr(bench_main, "measure_limits", lambda device: Limits(1e9, 1e9))
    monkeypatch.setattr(steps, "bench_steps", lambda *rest: [])
    written = []
    monkeypatch.setattr(bench_main, "write_csv", lambda path, rows, device: written.extend(rows))

    with pytest.raises(SystemExit) as exit:
        bench_main.main(bench_main.Args(cpu=True, csv="rows.csv"))
    assert exit.value.code == 2
    assert [row["shape"] for row in written] == ["first"] * 2 + ["second"] * 2 + ["third"] * 2
    for row in written:
        assert row.get("problem", "") == (problem if row["shape"] == "second" else "")
        assert ("ours_ms" in row) == (row["shape"] != "second")
    printed = capsys.readouterr().out
    assert "third" in printed.partition(f"second : {problem}; not timed")[2]


def add_to_slope(place, x, residual, *affine, activation):
    """An op whose slope at one element is too large by 1, as across a kink."""
    y, moments = call_bn_act(kernels.bn_act_moments_ref, activation, x, residual, *affine)
    is_place = torch.arange(x.numel()).view_as(x) == place
    extra = x - x.detach()  # 0, but its gradient is not
    return y + is_place * extra, moments


@pytest.mark.parametrize(
    "activation, kink, dtype, distance",
    [
        pytest.param("relu", 0, torch.float32, 5e-7, id="relu"),
        pytest.param("relu6", 0, torch.float32, 5e-7, id="relu6-at-0"),
        pytest.param("relu6", 6, torch.float32, 5e-7, id="relu6-at-6"),
        pytest.param("relu6", 6, torch.bfloat16, 1e-2, id="relu6-at-6-stored-as-6"),
        pytest.param("hardswish", -3, torch.float32, 5e-7, id="hardswish-at-minus-3"),
        pytest.param("hardswish", 3, torch.float32, 5e-7, id="hardswish-at-3"),
    ],
)
@pytest.mark.parametrize("side", [-1, 1])
def test_within_rounding_of_a_kink_alone_any_slope_is_right(
    activation, kink, dtype, distance, side
):
    place = 5

    def find_problems(u):
        """Of our op, and of one with another slope, where one element is at u."""
        x = torch.randn(3, 1, 2, 2)
        x.view(-1)[place] = 5.0
        one = torch.ones(1)
        affine = (one, one * (u - 5), 0 * one, one - 1e-5)  # u = x + bias
        case = make_bn_act_case(x.to(dtype).requires_grad_(), None, affine, activation)
        wrong = partial(add_to_slope, place, activation=activation)
        return ops.make_calls(case)[1], ops.make_calls(replace(case, function=wrong))[1]

    assert find_problems(kink + side * distance) == ("", "")
    assert find_problems(kink + side * 20 * distance) == ("", ops.DISAGREES)


def test_what_eager_does_at_a_kink_excuses_no_error_elsewhere():
    def cross_kink(x, residual, *affine):
        """The definition in float64; in fp32 the first element gets another slope."""
        if x.dtype == torch.float64:
            return kernels.bn_act_moments_ref(x, *affine)
        return add_to_slope(0, x, residual, *affine, activation="relu")

    x = torch.randn(3, 1, 2, 2)
    x.view(-1)[0] = 0.0
    zero = torch.zeros(1)
    case = make_bn_act_case(x.requires_grad_(), None, (zero + 1, zero, zero, zero + 1), "relu")
    case = replace(case, reference=cross_kink)
    wrong = partial(add_to_slope, 1, activation="relu")
    assert ops.make_calls(case)[1] == ""
    assert ops.make_calls(replace(case, function=wrong))[1] == ops.DISAGREES


def test_nan_at_a_kink_is_wrong():
    x = torch.zeros(2, 1, 2, 2).requires_grad_()
    zero = torch.zeros(1)
    case = make_bn_act_case(x, None, (zero, zero, zero, zero + 1), "relu")

    def differentiate_to_nan(x, residual, *affine):
        y, moments = kernels.bn_act_moments_ref(x, *affine)
        return y + 0 * x.sqrt(), moments

    assert ops.make_calls(case)[1] == ""
    assert ops.make_calls(replace(case, function=differentiate_to_nan))[1] == ops.DISAGREES


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


def test_a_wrong_step_marks_its_row(monkeypatch):
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    def scale_distance(moments, running_var, *rest):
        return kernels.moment_distance_ref(moments, running_var, *rest) * 1.01

    monkeypatch.setattr(kernels, "moment_distance", scale_distance)
    (row,) = steps.bench_step("cpu", 0.0, Limits(1e9, 1e9), "resnet8", 8, 4)
    assert row["problem"] == "fused and plain steps disagree"
    assert "ours_ms" not in row


def test_a_wrong_pseudo_batch_marks_its_row(monkeypatch):
    monkeypatch.setattr(steps, "check_first_loss", lambda columns, device: False)
    sizes = dict(batch_size=8, width=8)
    (row,) = steps.bench_pseudo_batch("cpu", 0.0, "digits-lenet5", "lenet5_half", sizes)
    assert row["problem"] == "ours disagrees with the plain loop"
    assert "ours_ms" not in row


def test_verification_is_counted_in_steps(monkeypatch):
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    def pretend_to_time(functions, *rest, n_least):
        for run in functions.values():
            run()
        return dict(
            zip(functions, (Times(2.0, 2, 2), Times(5.0, 5, 5), Times(1.0, 1, 1)), strict=True)
        )

    monkeypatch.setattr(steps, "time_together", pretend_to_time)
    rows = steps.bench_verification("cpu", 0.0, "resnet8", 8, 6)
    assert [row["times_step"] for row in rows] == [1.0, 2.5, 0.5]


def test_times_on_a_cpu_are_processor_time():
    times = time_together({"sleep": lambda: time.sleep(0.002)}, "cpu", 0.0)["sleep"]
    assert times.p20 <= times.median <= times.p80 < 1.5 < 2.0 <= times.wall


def test_of_two_rounds_the_larger_median_counts():
    fast = Times(1.0, 1.0, 1.0)
    slow = Times(2.0, 1.0, 3.0)
    assert choose_slower([dict(a=fast, b=slow, c=fast), dict(a=slow, b=fast, c=fast)]) == dict(
        a=slow, b=slow, c=fast
    )


def test_columns_of_a_pseudo_batch_have_the_same_first_loss(monkeypatch):
    """Its row is marked where they differ."""
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    monkeypatch.setattr(steps, "time_together", pretend_to_time)
    sizes = dict(batch_size=8, width=8)
    rows = steps.bench_pseudo_batch("cpu", 0.0, "digits-lenet5", "lenet5_half", sizes)
    assert [row["op"] for row in rows][:2] == ["pseudo-batch: conventional", "pseudo-batch: ours"]
