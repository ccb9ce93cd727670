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
from bench import ops, released, steps, timing
from bench.ops import Case, call_bn_act, call_distance, make_activations, make_bn_act_case
from bench.timing import (
    Limits,
    Options,
    Times,
    Turns,
    choose_slower,
    compute_ratio,
    run_in_turns,
    time_together,
)

COUNTS = ((1, 1), (1, 1))
SMOKE = Options("cpu", compile=False, smoke=True)
LIMITS = Limits(1e9, 1e9)


def make_small_cases(device, smoke=False):
    """One small case of every op."""
    x = make_activations((4, 6, 5, 5), device, torch.float32)
    image = make_activations((2, 3, 9, 40), device, torch.float32)
    affine = [torch.rand(6, device=device) + 0.5 for _ in range(4)]
    yield Case("bn_moment_loss", "", "", (x, *affine[:2]), *COUNTS)
    yield Case("bn_act_moments", "", "", (x, *affine), *COUNTS)
    yield ops.make_pointwise_case((1, 70, 5, 7), 35, True, device, torch.bfloat16)
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
    for case in ops.make_quantization_cases(device, torch.float32, smoke=True):
        yield replace(case, n_bytes=COUNTS[0], flops=COUNTS[1])


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
def test_a_wrong_op_marks_its_rows_and_the_others_are_timed(
    wrong, problem, monkeypatch, capsys, tmp_path
):
    """And the benchmark still fails, at its very end."""

    def make_three_cases(device, smoke):
        x = make_activations((4, 6, 5, 5), device, torch.float32)
        inputs = (x, torch.rand(6), torch.rand(6))
        right = Case("bn_moment_loss", "first", "", inputs, *COUNTS)
        yield right
        yield replace(right, shape="second", function=wrong)
        yield replace(right, shape="third")

    monkeypatch.setattr(ops, "make_cases", make_three_cases)
    monkeypatch.setattr(ops, "time_together", pretend_to_time)
    monkeypatch.setattr(bench_main, "measure_limits", lambda *rest: LIMITS)
    path = str(tmp_path / "rows.csv")

    with pytest.raises(SystemExit) as exit:
        bench_main.main(bench_main.Args(cpu=True, only="ops", compile=False, csv=path))
    assert exit.value.code == 2
    written = bench_main.read_csv(path)
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


def test_minimal_bytes_of_a_folded_stem_are_those_of_its_convolution():
    conv = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
    network = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()).eval()
    n_bytes = steps.count_bytes(network, torch.randn(2, 3, 8, 8))
    assert n_bytes == 4 * (2 * (2 * 3 * 64 + 2 * 4 * 16 + 4 * 3 * 49) + 5 * 2 * 4 * 16)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.bn(x) + x)


def test_minimal_bytes_of_an_addition():
    n_bytes = steps.count_bytes(Residual().eval(), torch.randn(2, 3, 5, 5))
    assert n_bytes == 4 * 8 * 2 * 3 * 25


@pytest.mark.parametrize(
    "device, passes", [("cpu", 7), pytest.param("cuda", 4, marks=pytest.mark.gpu)]
)
def test_minimal_bytes_of_a_pointwise_convolution(device, passes):
    """On a GPU it writes z and y forwards, and reads dy and z backwards."""
    conv = nn.Conv2d(3, 4, 1, bias=False)
    network = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()).eval().to(device)
    n_bytes = steps.count_bytes(network, torch.randn(2, 3, 5, 5, device=device))
    assert n_bytes == 4 * (2 * (2 * 3 * 25 + 4 * 3) + passes * 2 * 4 * 25)


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
    for without in ("batchnorm", "pointwise", "moment_distance", "jittered_view"):
        terms = steps.make_ours(*case, without=without)()
        torch.testing.assert_close(terms, ours, rtol=1e-4, atol=1e-6, equal_nan=True)
    conventional = steps.make_conventional(*case)()
    assert conventional == pytest.approx(ours[deepinversion.TERMS.index("total")].item(), rel=1e-4)


def test_a_wrong_step_marks_its_row(monkeypatch):
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    def scale_distance(moments, running_var, *rest):
        return kernels.moment_distance_ref(moments, running_var, *rest) * 1.01

    monkeypatch.setattr(kernels, "moment_distance", scale_distance)
    (row,) = steps.bench_step(SMOKE, LIMITS, steps.Case("resnet8", 8, 4))
    assert row["problem"] == "fused and plain steps disagree"
    assert "ours_ms" not in row


def test_verification_is_counted_in_steps(monkeypatch):
    monkeypatch.setattr(kernels._common, "INTERPRET", False)

    def pretend_to_time(functions, *rest):
        for run in functions.values():
            run()
        return dict(
            zip(functions, (Times(2.0, 2, 2), Times(5.0, 5, 5), Times(1.0, 1, 1)), strict=True)
        )

    monkeypatch.setattr(steps, "time_together", pretend_to_time)
    rows = steps.bench_verification(SMOKE, steps.Case("resnet8", 8, 6))
    assert [row["times_step"] for row in rows] == [1.0, 2.5, 0.5]


def test_times_on_a_cpu_are_processor_time():
    times = time_together({"sleep": lambda: time.sleep(0.002)}, "cpu", 0.0)["sleep"]
    assert times.p20 <= times.median <= times.p80 < 1.5 < 2.0 <= times.wall


@pytest.mark.parametrize(("estimate", "seconds", "rep"), [(0.01, 0.1, 50), (75.0, 0.1, 1650)])
def test_a_function_runs_at_least_so_often_on_a_gpu(monkeypatch, estimate, seconds, rep):
    """do_bench runs it for `rep` ms."""
    asked = []

    def pretend_to_bench(function, warmup, rep, quantiles=None):
        asked.append(rep)
        return estimate if quantiles is None else [2.0, 1.0, 3.0]

    monkeypatch.setattr(timing.triton.testing, "do_bench", pretend_to_bench)
    assert timing.time_on_gpu(len, seconds, 20) == Times(2.0, 1.0, 3.0)
    assert asked[-1] == rep


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_column_that_fails_leaves_the_others(monkeypatch, device):
    """On a GPU: what takes the times is replaced, and no GPU is asked for anything."""

    def run_and_measure(run, device):
        run()
        return 7.0

    def make_broken():
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(steps, "measure_peak", run_and_measure)
    monkeypatch.setattr(steps, "time_on_gpu", lambda *rest: Times(2.0, 1.0, 3.0))
    options = Options(device, smoke=True)
    makers = {"bare": lambda: lambda: None, "broken": make_broken, "ours": lambda: lambda: None}
    times, peaks, problems = steps.time_makers(makers, options)
    assert list(times) == ["bare", "ours"]
    assert problems == {"broken": "RuntimeError: no kernel image"}
    assert peaks["ours"] == (7.0 if device == "cuda" else None)


def test_of_two_rounds_the_larger_median_counts():
    fast = Times(1.0, 1.0, 1.0)
    slow = Times(2.0, 1.0, 3.0)
    assert choose_slower([dict(a=fast, b=slow, c=fast), dict(a=slow, b=fast, c=fast)]) == dict(
        a=slow, b=slow, c=fast
    )


# Turns


def test_a_ratio_is_that_of_neighbours_in_their_rounds():
    """A machine that gets twice as slow after two of five rounds changes no ratio."""
    ours = [10.0, 10.0, 20.0, 20.0, 20.0]
    theirs = [15.0, 15.0, 30.0, 30.0, 30.0]
    turns = Turns(dict(a=theirs, b=ours), dict(a=[3.0] * 5, b=[1.0, 1.0, 1.0, 3.0, 3.0]))
    assert compute_ratio(turns, "a", "b") == Times(1.5, 1.5, 1.5, 3.0)


def test_every_other_round_runs_backwards():
    order = []
    functions = {name: partial(order.append, name) for name in "ab"}
    turns = run_in_turns(functions, 0.0, 3)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert len(turns.processor["a"]) == len(turns.wall["b"]) == 3


# Released loops


@pytest.fixture
def cpu_path(monkeypatch):
    monkeypatch.setattr(kernels._common, "INTERPRET", False)


def find(title):
    """The smoke row of a released loop."""
    (comparison,) = [row for row in released.list_comparisons(SMOKE) if row.title == title]
    return comparison


TITLES = [row.title for row in released.list_comparisons(SMOKE)]


@pytest.mark.parametrize("title", TITLES)
def test_a_released_loop_has_the_losses_of_ours(title, cpu_path):
    """Its gate. The first three losses of a synthesis step; of a game those of its first steps."""
    assert find(title).find_problem() == ""


@pytest.mark.parametrize("title", TITLES)
def test_a_released_loop_goes_on_as_ours_does(title, cpu_path):
    """A whole step of each changes what the next one starts from."""
    comparison = find(title)
    torch.manual_seed(2)
    run = comparison.make_released()
    first, second = run(), run()
    assert first != second


@pytest.mark.parametrize(
    "module, name, title",
    [
        pytest.param(released, "subtract_neighbours", released.CIFAR, id="variation"),
        pytest.param(released, "diverge", "zero-shot transfer, same noise", id="divergence"),
        pytest.param(released, "balance", "pseudo replay", id="entropies"),
    ],
)
def test_a_released_loop_with_another_loss_is_not_timed(module, name, title, monkeypatch, cpu_path):
    right = getattr(module, name)

    def change(*inputs):
        value = right(*inputs)
        return [2 * d for d in value] if isinstance(value, list) else 1.1 * value

    monkeypatch.setattr(module, name, change)
    if title == released.CIFAR:  # its variation weighs too little to show
        args = replace(released.INVERSIONS[title], alpha_tv_l2=0.1)
        monkeypatch.setitem(released.INVERSIONS, title, args)
    row = released.compare_released(find(title), SMOKE)
    assert row["problem"].startswith("first losses differ")
    assert "ours_ms" not in row


def count_calls(module):
    """A list that gets a number a forward pass: whether gradients were on."""
    calls = []
    module.register_forward_hook(lambda *rest: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("fresh_z, n_answers", [(False, 1), (True, 10)])
def test_the_released_game_asks_the_teacher_as_often_as_released(
    fresh_z, n_answers, monkeypatch, cpu_path
):
    """Once with a graph, for the generator; then once a noise without one. The generator runs in
    each step, and its weights get a gradient in each."""
    args = replace(
        released.zskt.PRESETS["cifar10"],
        teacher="digits-lenet5",
        student="lenet5_half",
        batch_size=8,
        width=8,
        fresh_z=fresh_z,
    )
    players = released.make_players(args, "cpu")
    teacher, _, generator = players
    monkeypatch.setattr(released, "make_players", lambda *rest: players)
    n_gradients = []
    run = released.make_released_pseudo_batch(args, "cpu")
    answers = []
    forward_groups = teacher.forward_groups

    def answer(x):
        answers.append(torch.is_grad_enabled())
        return forward_groups(x)

    monkeypatch.setattr(teacher, "forward_groups", answer)
    made = count_calls(generator)
    generator.conv1.weight.register_hook(n_gradients.append)
    run()
    assert answers == [True] + [False] * n_answers
    assert made == [True] * 11
    assert len(n_gradients) == 11
    assert all(weight.requires_grad for weight in teacher.parameters())


def test_only_the_frozen_loop_spares_gradients_of_weights(monkeypatch, cpu_path):
    made = []

    def make_teacher(name, device):
        made.append(steps.make_teacher(name, device))
        return made[-1]

    monkeypatch.setattr(released, "make_teacher", make_teacher)
    noise = torch.randn(4, 3, 8, 8)
    for title in released.INVERSIONS:
        run = released.make_released_step(title, "resnet8", "cpu", noise, torch.arange(4))
        run()
    has_gradient = [network.fc.weight.grad is not None for network in made]
    assert has_gradient == [True, True, False]


# The program


def run_smoke(path, **options):
    bench_main.main(bench_main.Args(cpu=True, smoke=True, compile=False, csv=str(path), **options))
    return bench_main.read_csv(path)


def test_rows_are_chosen_and_others_kept(tmp_path, cpu_path):
    path = tmp_path / "rows.csv"
    (first,) = run_smoke(path, only="released", match="CIFAR class")
    rows = run_smoke(path, only="released", match="DeepInversion", keep=True)
    assert [row["op"] for row in rows] == [
        "released: DeepInversion, CIFAR class",
        "released: DeepInversion, ImageNet class",
    ]
    assert rows[0]["released_ms"] != first["released_ms"]  # measured again


def test_each_row_is_written_at_once(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    seen = []

    def produce_rows(args, options):
        yield dict(op="first", shape="")
        seen.append(path.read_text())
        yield dict(op="second", shape="")

    monkeypatch.setattr(bench_main, "produce_rows", produce_rows)
    run_smoke(path)
    assert "first" in seen[0]
    assert "second" not in seen[0]


def test_text_that_no_row_contains_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_smoke(tmp_path / "rows.csv", only="released", match="resnet19")
    assert exit.value.code == 2
    assert "--match resnet19: no row's name contains it" in capsys.readouterr().err
