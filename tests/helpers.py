"""Inputs, memory layouts, the measured-tolerance rule and launches of ops; runs of the scripts."""

import importlib
import json
import pkgutil
from typing import NamedTuple

import pytest
import torch

import kernels

# Random inputs for the ops


def random_tensor(shape, device="cpu", seed=0):
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def random_logits(shape, device="cpu", seed=0):
    """Logits of two networks, of standard deviation 2."""
    p_logits, q_logits = 2 * random_tensor((2, *shape), device, seed)
    return p_logits, q_logits


def lay_out(x, layout):
    """The values of `x` (2-D to 5-D) in another memory layout: same numbers, other strides.

    What lies between the numbers of a sliced layout is NaN, so that reading it shows.
    """
    if layout == "contiguous":
        return x.contiguous()

    if layout == "channels_last":
        if x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    if layout == "transposed":  # the last dimension is outermost in memory
        backwards = tuple(reversed(range(x.ndim)))
        return x.permute(backwards).contiguous().permute(backwards)

    if layout == "sliced":  # every second row, and all but the first column of a larger tensor
        if x.ndim < 4:
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
            view = wide[..., 1::2]
        else:
            N, C, H, *rest, W = x.shape
            wide = x.new_full((N, C, 2 * H, *rest, W + 1), float("nan"))
            view = wide[:, :, ::2, ..., 1:]
        return view.copy_(x)

    if layout == "sliced-channels_last":  # side by side, inside a larger tensor
        N, C, H, W = x.shape
        wide = lay_out(x.new_full((N, C, H + 3, W + 3), float("nan")), "channels_last")
        return wide[:, :, :-3, 1:-2].copy_(x)

    if layout == "offset":  # starts one element into its storage: not aligned to 16 bytes
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    if layout == "expanded":  # stride 0 over the batch: all samples share the memory of the first
        return x[:1].expand(x.shape)

    raise ValueError(f"no layout {layout}")


def extreme_images(x, extreme):
    """Images x (N, C, H, W) changed to where total variation is hard to compute."""
    if extreme == "large":
        return x * 1e4

    if extreme == "tiny-contrast":
        return 100 + 0.01 * x

    if extreme == "half-constant":  # vertical differences are zero, and so is their norm
        return x[:, :, :1].expand(x.shape)

    if extreme == "one-black-image":
        x = x.clone()
        x[1] = 0
        return x

    if extreme == "one-pixel":
        x = torch.zeros_like(x)
        x[-1, -1, 3, 4] = 1.0
        return x

    raise ValueError(f"no extreme {extreme}")


# The measured-tolerance rule


def assert_as_exact_as_eager(kernel, exact, eager, name="value"):
    """|kernel - exact| <= 2 |eager - exact| + 4 eps max|exact|, in the max norm.

    NaN equals nothing.
    exact: the definition in float64 on the rounded inputs.
    eager: the definition in float32, cast to the kernel's dtype.
    """
    assert kernel.shape == exact.shape, (
        f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    )
    kernel64 = kernel.detach().double().cpu()
    exact64 = exact.detach().double().cpu()
    eager64 = eager.detach().to(kernel.dtype).double().cpu()

    error = (kernel64 - exact64).abs().max()
    measured = (eager64 - exact64).abs().max()
    allowed = 2 * measured + 4 * torch.finfo(kernel.dtype).eps * exact64.abs().max()
    assert error <= allowed, (
        f"{name}: error {error:.3g}, eager {measured:.3g}, allowed {allowed:.3g}"
    )


class Evaluation(NamedTuple):
    results: tuple
    """What the function returned."""
    gradients: dict
    """By the argument's name."""
    cotangents: tuple
    """The gradient that was handed to each result."""


def make_leaves(args, names):
    """The named arguments, as tensors that require grad; those that are None are left out."""
    given = {name: args[name] for name in names if args[name] is not None}
    return {name: x.detach().requires_grad_() for name, x in given.items()}


def results_of(function, args):
    """What `function` returns, as a tuple."""
    results = function(**args)
    return results if isinstance(results, tuple) else (results,)


def evaluate(function, args, differentiable, cotangents=None):
    """Call `function` on args, a dict by name; differentiate all results in the named arguments.

    Without cotangents they are random.
    """
    leaves = make_leaves(args, differentiable)
    results = results_of(function, {**args, **leaves})
    if cotangents is None:
        cotangents = [random_tensor(x.shape, x.device, seed=7 + i) for i, x in enumerate(results)]
    cotangents = tuple(c.to(x.dtype) for c, x in zip(cotangents, results, strict=True))
    gradients = torch.autograd.grad(results, tuple(leaves.values()), cotangents)
    return Evaluation(results, dict(zip(leaves, gradients, strict=True)), cotangents)


def convert(args, dtype):
    """The arguments with every floating-point tensor in another dtype."""
    converted = dict(args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            converted[name] = value.to(dtype)
    return converted


def assert_matches_definition(op, args, cotangents=None):
    """All results and gradients of `op`, a row of ops_table.py, by the measured-tolerance rule.

    Returns the op's Evaluation.
    """
    fused = getattr(kernels, op.name)
    definition = getattr(kernels, f"{op.name}_ref")
    got = evaluate(fused, args, op.differentiable, cotangents)
    args64 = convert(args, torch.float64)
    args32 = convert(args, torch.float32)
    exact = evaluate(definition, args64, op.differentiable, got.cotangents)
    eager = evaluate(definition, args32, op.differentiable, got.cotangents)

    for i, name in enumerate(op.results):
        assert_as_exact_as_eager(got.results[i], exact.results[i], eager.results[i], name)
        expected = torch.float32
        if name in op.like_x:
            expected = args.get("dtype") or args["x"].dtype
        assert got.results[i].dtype == expected, f"{name}: {got.results[i].dtype}"

    for name, gradient in got.gradients.items():
        assert_as_exact_as_eager(
            gradient, exact.gradients[name], eager.gradients[name], f"gradient of {name}"
        )
        assert gradient.dtype == args[name].dtype, f"gradient of {name}: {gradient.dtype}"
        if op.keeps_layout:
            assert gradient.stride() == torch.empty_like(args[name]).stride(), name
    return got


def assert_equal_bits(first, second):
    """Two Evaluations have the same results and gradients, bit for bit."""
    for a, b in zip(first.results, second.results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


# Launches of kernels


class Recorder:
    """Stands in place of a kernel: keeps what each launch is given, and launches nothing."""

    def __init__(self, name, kernel):
        self.name = name
        self.kernel = kernel
        self.launches = []  # (grid, args, kwargs)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


def record_kernels(monkeypatch):
    """Replace every `_*_kernel` of every module of the package. New kernels are found as well."""
    recorders = []
    for found in pkgutil.iter_modules(kernels.__path__, "kernels."):
        module = importlib.import_module(found.name)
        for name, kernel in list(vars(module).items()):
            is_kernel = name.startswith("_") and name.endswith("_kernel")
            if is_kernel and kernel.fn.__module__ == found.name:
                recorder = Recorder(name, kernel)
                monkeypatch.setattr(module, name, recorder)
                recorders.append(recorder)
    return recorders


# Runs of the scripts


def script_runs(script, fast):
    """Two functions for the tests of a script: `run` and `refused`.

    run(out, **options) runs it into the folder `out` and returns result.json.
    refused(capsys, **options) returns the one line with which it stops.
    fast: options of a run of seconds, which those that are passed replace.
    """

    def run(out, **options):
        settings = {**fast, **options}
        script.main(script.Args(**settings, out=str(out), device="cpu"))
        return json.loads((out / "result.json").read_text())

    def refused(capsys, **options):
        settings = {**fast, "device": "cpu", **options}
        with pytest.raises(SystemExit) as stop:
            script.main(script.Args(**settings))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run, refused


def rows_of(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())
