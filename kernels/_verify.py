"""Whether a rebuilt network is still the user's: the checks behind `fuse_batchnorm`.

A rebuilt network and the original get the same images, twice. The original is measured by hooks
and plain PyTorch. Compared are the output, which BatchNorms run in which order, the moments of
each, and the gradients with respect to the images. The second pass shows what a forward pass
changes for the next one.

Nothing of this stays: parameters, buffers, attributes and random number generators are put back.
"""

import contextlib
import copy
import random
import sys
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Largest difference relative to the largest value. Rounding alone gave at most 2e-6 on a CPU, with
# the networks of harness/networks.py and 82 others (results/architectures.json). A GPU rounds in
# other places, and an activation next to a kink may take its other side, which changes a gradient
# more than an output.
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


class Results(NamedTuple):
    """What one pass over the example gives."""

    outputs: list
    """The tensors that the network returns."""
    found: list
    """[(moments (2, C), running_var (C,)), …]."""
    gradient: torch.Tensor
    """With respect to the images."""
    attributes: dict
    """{(module, attribute): value} of what the model's modules hold besides parameters."""


# Running a network without a trace


@contextlib.contextmanager
def keep_state(model, device):
    """Put back what forward passes change: tensors, attributes and random number generators."""
    attributes = []
    containers = []
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        attributes.append((module, dict(module.__dict__)))
        for value in module.__dict__.values():
            if type(value) in (list, dict, set, OrderedDict):
                containers.append((value, copy.copy(value)))
            elif torch.is_tensor(value):
                tensors.append(value)
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, before in containers:
            container.clear()
            if isinstance(container, list):
                container.extend(before)
            else:
                container.update(before)
        for tensor, before in saved:
            if not torch.equal(tensor, before):
                tensor.detach().copy_(before)


def read_generators(device):
    """The states of the random number generators, to find out whether code draws from them."""
    states = [random.getstate(), torch.random.get_rng_state().tolist()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    numpy = sys.modules.get("numpy")
    if numpy:
        _, keys, position, *_ = numpy.random.get_state()
        states.append((keys.tolist(), position))
    return states


@contextlib.contextmanager
def _forbid_tf32():
    """Full fp32 precision on GPUs, where TF32 would turn rounding into differences of 1e-3."""
    ops = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [op.fp32_precision for op in ops]
    for op in ops:
        op.fp32_precision = "ieee"
    try:
        yield
    finally:
        for op, precision in zip(ops, before, strict=True):
            op.fp32_precision = precision


def run_twice(watched, model, example):
    """Results of two passes over the example; the model's state is put back.

    The first pass differentiates the output, the second one the moments, so that neither gradient
    hides in the other.

    Args:
        watched: called with images, it returns an output and [(moments, running_var), …].
        model: the user's network, whose state `watched` may change.
        example: images (N, C, H, W).
    """
    without_autocast = torch.autocast(example.device.type, enabled=False)
    with contextlib.ExitStack() as stack:
        for network in (model, watched.network):  # a copy has attributes of its own
            stack.enter_context(keep_state(network, example.device))
        for mode in (_forbid_tf32(), without_autocast, torch.enable_grad()):
            stack.enter_context(mode)
        first = _run_once(watched, model, example, _output_loss)
        second = _run_once(watched, model, example, _moment_loss)
    return first, second


def _run_once(watched, model, example, compute_loss):
    x = example.detach().clone().requires_grad_()
    y, found = watched(x.clone())  # a network may change its input in place, but not a leaf
    outputs = [value for value in tree_leaves(y) if torch.is_tensor(value)]
    gradient = _differentiate(compute_loss(outputs, found), x)
    return Results(
        [output.detach() for output in outputs],
        [(moments.detach(), running_var) for moments, running_var in found],
        gradient,
        _read_attributes(model),
    )


def _output_loss(outputs, found):
    return sum(output.square().mean() for output in outputs if output.is_floating_point())


def _moment_loss(outputs, found):
    return sum(moments[0].norm() + (moments[1] - var).norm() for moments, var in found)


def _differentiate(loss, x):
    """The gradient of a loss that may not depend on x at all."""
    if not torch.is_tensor(loss) or not loss.requires_grad:
        return torch.zeros_like(x)

    (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _read_attributes(model):
    """Numbers and strings, how long lists and the like are, and the sums of tensors."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, dict):
                for part, entry in value.items():
                    if isinstance(entry, (bool, int, float, str)):
                        attributes[name, f"{key}[{part!r}]"] = entry
            if isinstance(value, (bool, int, float, str)):
                attributes[name, key] = value
            elif isinstance(value, (dict, list, set)):
                attributes[name, key] = len(value)
            elif _can_be_summed(value):
                attributes[name, key] = str(value.sum(dtype=torch.float64).item())  # NaN is itself
    return attributes


def _can_be_summed(value):
    if not torch.is_tensor(value) or is_lazy(value) or value.is_meta:
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def find_changed_attribute(passes):
    """The name of what the second pass changed, as a counter; "" for nothing."""
    first, second = passes
    for place, value in second.attributes.items():
        if first.attributes.get(place) != value:
            return ".".join(place).strip(".")
    return ""


# Comparing


def describe_difference(passes, expected):
    """What differs between the results of two networks, in a few words; "" where nothing does."""
    for ours, theirs in zip(passes, expected, strict=True):
        difference = _describe_pass(ours, theirs)
        if difference:
            return difference
    return ""


def _describe_pass(ours, theirs):
    if len(ours.outputs) != len(theirs.outputs):
        return f"it returns {len(ours.outputs)} tensors in place of {len(theirs.outputs)}"
    for ours_y, theirs_y in zip(ours.outputs, theirs.outputs, strict=True):
        error = _measure_error(ours_y, theirs_y)
        if not error <= TOLERANCE:  # NaN is an error too
            return f"its output differs by {error:.2%}"

    if len(ours.found) != len(theirs.found):
        return f"of {len(theirs.found)} BatchNorms it measures {len(ours.found)}"
    for (ours_m, ours_var), (theirs_m, theirs_var) in zip(ours.found, theirs.found, strict=True):
        if ours_var.data_ptr() != theirs_var.data_ptr():
            return "its BatchNorms run in another order"
        if not _measure_moment_error(ours_m, theirs_m, theirs_var) <= TOLERANCE:
            return "the moments of its BatchNorms differ"

    error = _measure_error(ours.gradient, theirs.gradient)
    if not error <= GRADIENT_TOLERANCE:
        return f"its image gradient differs by {error:.2%}"
    return ""


def _measure_error(ours, theirs):
    """The largest difference relative to the largest value; infinite for another shape."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if ours.numel() == 0:
        return 0.0
    difference = (ours.double() - theirs.double()).abs().max()
    return (difference / theirs.double().abs().max().clamp(min=1e-30)).item()


def _measure_moment_error(ours, theirs, running_var):
    """The same of moments (2, C), where a mean and a variance may be near zero."""
    if ours.shape != theirs.shape:
        return float("inf")
    mean, var = theirs.double()
    mean_error, var_error = (ours.double() - theirs.double()).abs().amax(1)
    mean_scale = (mean.abs() + var.sqrt()).max().clamp(min=1e-30)
    var_scale = (var + mean.square() + running_var).max().clamp(min=1e-30)
    return max((mean_error / mean_scale).item(), (var_error / var_scale).item())


# What cannot be measured


class _NormalisationCounter(TorchDispatchMode):
    """Counts the batch normalisations by running statistics that the BatchNorms' inputs miss."""

    def __init__(self):
        super().__init__()
        self.n_outside = 0
        self.changing = []  # the BatchNorms that normalise something else than their input
        self.running = []  # (BatchNorm, its input) of those that run, one inside the other

    def enter(self, module, args, kwargs):
        self.running.append((module, args[0] if args else next(iter(kwargs.values()))))

    def leave(self, module, inputs, output):
        self.running.pop()

    def count(self, normalised):
        if not self.running:
            self.n_outside += 1
            return
        module, x = self.running[-1]
        if module not in self.changing and not _have_same_moments(normalised, x):
            self.changing.append(module)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"):
            trains = args[5]
            if not trains:
                self.count(args[0])
        return func(*args, **(kwargs or {}))


def _have_same_moments(x, y):
    """Whether two inputs (N, C, *spatial) of BatchNorms have the same moments, up to rounding."""
    if min(x.ndim, y.ndim) < 2 or x.size(1) != y.size(1):
        return False
    moments = []
    for value in (x, y):
        dims = [0, *range(2, value.ndim)]
        moments.append(torch.stack(torch.var_mean(value.double(), dims, correction=0)))
    return torch.allclose(*moments, rtol=1e-3, equal_nan=True)


def find_unseen_normalisations(model, example):
    """What the inputs of a model's BatchNorms do not show.

    Returns:
        How many batch normalisations by running statistics run in no BatchNorm, and a list of the
        BatchNorms that change their input before they normalise it.
    """
    counter = _NormalisationCounter()
    hooks = []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            hooks.append(layer.register_forward_pre_hook(counter.enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(counter.leave))
    try:
        with keep_state(model, example.device), torch.no_grad(), counter:
            model(example.clone())
    except Exception:  # code that no dispatch mode can watch
        return 0, []
    finally:
        for hook in hooks:
            hook.remove()
    return counter.n_outside, counter.changing
