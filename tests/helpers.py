"""The measured-tolerance rule, layouts and pairs of logits for the ops; runs and refusals of the scripts."""

import importlib
import json

import pytest
import torch


def assert_as_exact_as_eager(kernel, exact, eager, name="value"):
    """|kernel - exact| <= 2 |eager - exact| + 4 eps max|exact|, in the max norm; NaN equals nothing.

    exact: the reference in float64 on the rounded inputs; eager: the reference in fp32, cast to the kernel's dtype.
    """
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    kernel64, exact64, eager64 = (t.detach().double().cpu() for t in (kernel, exact, eager.to(kernel.dtype)))
    error, measured = (kernel64 - exact64).abs().max(), (eager64 - exact64).abs().max()
    allowed = 2 * measured + 4 * torch.finfo(kernel.dtype).eps * exact64.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, eager {measured:.3g}, allowed {allowed:.3g}"


def lay_out(x, layout):
    """The values of 4-D `x` in another memory layout: same numbers, other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second row, all but the first column of a larger tensor
        N, C, H, W = x.shape
        big = torch.randn(N, C, 2 * H, W + 1, device=x.device).to(x.dtype)
        big[:, :, ::2, 1:] = x
        return big[:, :, ::2, 1:]
    if layout == "offset":  # starts one element into its storage: not 16-byte aligned
        flat = torch.zeros(x.numel() + 1, device=x.device, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == "expanded":  # stride 0 over the batch: all images share the first one's memory
        return x[:1].expand(x.shape)
    raise ValueError(layout)


def logits(shape, device="cpu", seed=0, dtype=torch.float32):
    """Logits of two networks, of standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(2))


def value_and_gradients(op, p_logits, q_logits, temperature, cotangent):
    """A divergence, its gradient times cotangent in either pair of logits."""
    p_logits, q_logits = (x.detach().requires_grad_() for x in (p_logits, q_logits))
    value = op(p_logits, q_logits, temperature)
    return value, *torch.autograd.grad(cotangent * value, (p_logits, q_logits))


def assert_divergence_exact(op, p_logits, q_logits, temperature=1.0, cotangent=-1.37):
    """The value and both gradients of js_divergence or kl_divergence, by the measured-tolerance rule."""
    pair, reference = (p_logits, q_logits), getattr(importlib.import_module(op.__module__), f"{op.__name__}_ref")
    fused = value_and_gradients(op, *pair, temperature, cotangent)
    exact = value_and_gradients(reference, *(x.double() for x in pair), temperature, cotangent)
    eager = value_and_gradients(reference, *(x.float() for x in pair), temperature, cotangent)
    assert fused[0].dtype == torch.float32 and fused[0].shape == ()
    assert [x.dtype for x in fused[1:]] == [x.dtype for x in pair]
    for name, *values in zip(("value", "dp", "dq"), fused, exact, eager, strict=True):
        assert_as_exact_as_eager(*values, name=name)
    return fused


def extreme_images(x, extreme):
    """Images x (N, C, H, W) changed to where total variation is hard to compute."""
    if extreme == "large":
        return x * 1e4
    if extreme == "tiny-contrast":
        return 100 + 0.01 * x
    if extreme == "half-constant":  # vertical norms and differences exactly zero, the other three not
        return x[:, :, :1].expand(x.shape)
    x = torch.zeros_like(x) if extreme == "one-pixel" else x.clone()
    x[1] = 0  # one black image
    if extreme == "one-pixel":
        x[1, 2, 3, 4] = 1.0
    return x


def script_runs(script, fast):
    """Two functions for the tests of a script: `run` (into a folder, result.json back) and `refused` (its one line).

    fast: options of a run of seconds, which those that are passed replace.
    """

    def run(out, **options):
        script.main(script.Args(**(fast | options), out=str(out), device="cpu"))
        return json.loads((out / "result.json").read_text())

    def refused(capsys, **options):
        with pytest.raises(SystemExit) as stop:
            script.main(script.Args(**(fast | {"device": "cpu"} | options)))
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
