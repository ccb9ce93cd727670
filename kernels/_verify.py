"""Whether a rebuilt network is still the user's: the checks behind `fuse_batchnorm`.

A rebuilt network and the original get the same images, twice. The original is measured by hooks
and plain PyTorch. Compared are the output, which BatchNorms run in which order, the moments of
each, and the gradient with respect to the images. The second pass shows what a forward pass
changes for the next one; it is not differentiated.

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
    layers: list
    """[(moments (2, C_l), running_var (C_l,)), …] as the layers l ran."""
    addresses: list
    """Of the layers' running variances: which layers ran."""
    has_gradient: list
    """Whether autograd reaches the images, of each output and of each layer's moments."""
    gradient: torch.Tensor | None
    """With respect to the images; of the first pass alone."""
    attributes: dict
    """{(module, attribute): value} of what the model's modules hold besides parameters."""


# Running a network without a trace


@contextlib.contextmanager
def keep_state(device, *networks):
    """Put back what forward passes change: tensors, attributes and random number generators.

    Modules and tensors that several of the networks share are saved once.
    """
    attributes = []
    containers = []
    tensors = []
    for module in _list_modules(networks):
        attributes.append((module, dict(module.__dict__)))
        tensors += [*module._parameters.values(), *module._buffers.values()]
        for value in module.__dict__.values():
            if type(value) in (list, dict, set, OrderedDict):
                containers.append((value, copy.copy(value)))
            else:
                tensors.append(value)
    distinct = {id(tensor): tensor for tensor in tensors if torch.is_tensor(tensor)}
    saved = [(tensor, tensor.detach().clone()) for tensor in distinct.values()]

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


def _list_modules(networks):
    """The modules of these networks, each once."""
    modules = {}
    for network in networks:
        modules.update(dict.fromkeys(network.modules()))
    return list(modules)


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
    conv = torch.backends.cudnn.conv
    matmul = torch.backends.cuda.matmul
    conv_before = conv.fp32_precision
    matmul_before = matmul.fp32_precision
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the program has set cuDNN's operators apart
        allowed = None
    # By the older switch if possible: a network's torch.backends.cudnn.flags() reads no other.
    if allowed is None:
        conv.fp32_precision = "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = False
        if conv.fp32_precision == "tf32":  # by torch.backends.fp32_precision
            conv.fp32_precision = "ieee"
            torch.backends.cudnn.rnn.fp32_precision = "ieee"
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if allowed is None:
            conv.fp32_precision = conv_before
        else:
            torch.backends.cudnn.allow_tf32 = allowed
        matmul.fp32_precision = matmul_before


def run_twice(watched, model, example):
    """Results of two passes over the example; the model's state is put back.

    Args:
        watched: Fused or Hooked.
        model: the user's network, whose state `watched` may change.
        example: images (N, C, H, W).
    """
    without_autocast = torch.autocast(example.device.type, enabled=False)
    with contextlib.ExitStack() as stack:
        # a copy has attributes of its own
        stack.enter_context(keep_state(example.device, model, watched.network))
        for mode in (_forbid_tf32(), without_autocast, torch.enable_grad()):
            stack.enter_context(mode)
        first = _run_once(watched, model, example, differentiate=True)
        second = _run_once(watched, model, example, differentiate=False)
    return first, second


def _run_once(watched, model, example, differentiate):
    x = example.detach().clone().requires_grad_()
    y, found = watched(x.clone())  # a network may change its input in place, but not a leaf
    outputs = [value for value in tree_leaves(y) if torch.is_tensor(value)]
    layers = list(found)
    gradient = None
    if differentiate:
        gradient = _differentiate(_add_output_loss(outputs) + _add_moment_loss(layers), x)
    return Results(
        [output.detach() for output in outputs],
        [(moments.detach(), running_var) for moments, running_var in layers],
        [running_var.data_ptr() for running_var in watched.record.running_vars],
        [*(output.requires_grad for output in outputs), *watched.record.has_gradient],
        gradient,
        _read_attributes(model),
    )


# Both losses are about 1 whatever the scale of outputs and moments, and however little the images
# change them. So neither gradient hides in the other.


def _add_output_loss(outputs):
    """How much the outputs of different images differ, relative to that difference."""
    loss = 0.0
    for output in outputs:
        if output.is_floating_point() and output.ndim > 0:
            spread = (output - output.detach().mean(0)).square().mean()
            loss = loss + spread / spread.detach().clamp(min=1e-30)
    return loss


def _add_moment_loss(layers):
    """How far the moments are from the stored ones, relative to their scale; a mean over layers."""
    loss = 0.0
    for moments, running_var in layers:
        mean_scale, var_scale = _measure_scales(moments.detach(), running_var)
        mean_distance = moments[0].norm() / mean_scale
        var_distance = (moments[1] - running_var).norm() / var_scale
        loss = loss + (mean_distance + var_distance) / len(layers)
    return loss


def _measure_scales(moments, running_var):
    """Sizes () and () to compare differences of means and variances with; either may be 0."""
    mean, var = moments.double()
    mean_scale = (mean.abs() + var.sqrt()).max().clamp(min=1e-30)
    var_scale = (var + mean.square() + running_var).max().clamp(min=1e-30)
    return mean_scale, var_scale


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

    if len(ours.layers) != len(theirs.layers):
        return f"of {len(theirs.layers)} BatchNorms it measures {len(ours.layers)}"
    if ours.addresses != theirs.addresses:
        return "its BatchNorms run in another order"
    for (ours_m, _), (theirs_m, theirs_var) in zip(ours.layers, theirs.layers, strict=True):
        if not _measure_moment_error(ours_m, theirs_m, theirs_var) <= TOLERANCE:
            return "the moments of its BatchNorms differ"

    if ours.has_gradient != theirs.has_gradient:
        return "gradients reach its images by other ways"
    if theirs.gradient is not None:
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
    mean_error, var_error = (ours.double() - theirs.double()).abs().amax(1)
    mean_scale, var_scale = _measure_scales(theirs, running_var)
    return max((mean_error / mean_scale).item(), (var_error / var_scale).item())


# What cannot be measured


class _NormalisationCounter(TorchDispatchMode):
    """Counts the batch normalisations by running statistics that the BatchNorms' inputs miss."""

    def __init__(self):
        super().__init__()
        self.n_outside = 0
        self.n_before = []  # n_outside when a module with statistics of its own began
        self.changing = []  # the BatchNorms that normalise something else than their input
        # (BatchNorm, its input, the input's version) of those that run, one inside the other
        self.running = []

    def enter(self, module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        self.running.append((module, x, x._version))

    def leave(self, module, inputs, output):
        self.running.pop()

    def enter_frozen(self, module, inputs):
        self.n_before.append(self.n_outside)

    def leave_frozen(self, module, inputs, output):
        """Count a module that normalises by formulas of its own, as frozen BatchNorms do."""
        if self.n_before.pop() == self.n_outside:
            self.n_outside += 1

    def count(self, normalised):
        if not self.running:
            self.n_outside += 1
            return
        module, x, version = self.running[-1]
        is_changed = x._version != version
        if not is_changed and not _is_same_tensor(normalised, x):
            is_changed = not _have_same_moments(normalised, x)
        if is_changed and module not in self.changing:
            self.changing.append(module)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"):
            trains = args[5]
            if not trains:
                self.count(args[0])
        return func(*args, **(kwargs or {}))


def _is_same_tensor(x, y):
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _have_same_moments(x, y):
    """Whether two inputs (N, C, *spatial) of BatchNorms have the same moments, up to rounding."""
    if min(x.ndim, y.ndim) < 2 or x.size(1) != y.size(1):
        return False
    moments = []
    for value in (x, y):
        dims = [0, *range(2, value.ndim)]
        moments.append(torch.stack(torch.var_mean(value.double(), dims, correction=0)))
    return torch.allclose(*moments, rtol=1e-3, equal_nan=True)


def _has_statistics(module):
    """Whether a module has running statistics, such as the frozen BatchNorms of detectors."""
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
        return False
    buffers = dict(module.named_buffers(recurse=False))
    return buffers.get("running_mean") is not None and buffers.get("running_var") is not None


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
        elif _has_statistics(layer):
            hooks.append(layer.register_forward_pre_hook(counter.enter_frozen))
            hooks.append(layer.register_forward_hook(counter.leave_frozen))
    try:
        with keep_state(example.device, model), torch.no_grad(), counter:
            model(example.clone())
    except Exception:  # code that no dispatch mode can watch
        return 0, []
    finally:
        for hook in hooks:
            hook.remove()
    return counter.n_outside, counter.changing
