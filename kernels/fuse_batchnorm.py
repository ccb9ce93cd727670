"""Frozen networks that return the batch moments of their BatchNorms' inputs beside their output.

`fuse_batchnorm` replaces each BatchNorm, with the addition and the activation after it, by one call
of `bn_act_moments`. A conventional inversion step does the same in three places: the layer in eval
mode, the activation, and a hook that measures the layer's input. Fused are BatchNorm -> activation,
BatchNorm -> addition -> activation, and BatchNorm alone. On a GPU a 1 x 1 convolution before them
is part of the same call, `pointwise_bn_act_moments`. On a CPU a 7 x 7 stem runs as `FoldedStem`.

A rebuilt network may differ from the one that it was made of: torch.fx drops `torch.no_grad()`,
and a copied module may still call the original. With an example batch `fuse_batchnorm` compares
both (`_verify`), and returns the network with hooks where they differ.

`hook_batchnorm` is the plain way to the same result.
"""

import contextlib
import io
import operator
import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from kernels import _common, _verify
from kernels.bn_act_moments import bn_act_moments_folded, fold_constants, merge_moments
from kernels.bn_moments import bn_moments, bn_moments_ref
from kernels.pointwise_bn_act_moments import pointwise_bn_act_moments_folded

BATCHNORMS = _BatchNorm  # with SyncBatchNorm and what users derive
# The classes that compute what their name says. A derived one may do more, and is only measured.
PLAIN_BATCHNORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
ACTIVATION_FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
HARDTANH_FUNCTIONS = {F.hardtanh, F.hardtanh_}
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
ADD_METHODS = {"add", "add_"}
INPLACE_METHODS = {"relu_", "add_"}
INPLACE_FUNCTIONS = {operator.iadd, F.relu_, torch.relu_, F.hardtanh_}


# What the two functions return


@dataclass(eq=False)
class LayerMoments:
    """Batch moments of the inputs of all BatchNorms, one layer beside the other as they ran.

    The fields are arguments of `moment_distance`. Float64 networks have float64 in place of fp32.
    As a sequence it has a pair for each layer l: moments (2, C_l) and running_var (C_l,).
    """

    moments: torch.Tensor
    """(2, C) fp32, C channels in all: mean less running mean, biased variance. What a function of
    one's own measures for `hook_batchnorm` may have dimensions in between."""
    running_var: torch.Tensor
    """(C,) fp32, a constant, which may be the tensor of an earlier call: do not change it."""
    sizes: tuple[int, ...]
    """Channels of each layer, which add up to C. A layer that ran twice is there twice."""
    eps: tuple[float, ...]
    """eps of each layer."""

    def __iter__(self):
        moments = self.moments.split(self.sizes, -1)
        running_vars = self.running_var.split(self.sizes)
        return zip(moments, running_vars, strict=True)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, number):
        return list(self)[number]


class Entry(NamedTuple):
    """What one layer measured."""

    place: int
    """The layer's position: moments are sorted by it."""
    moments: torch.Tensor
    """(2, C_l), or what merge_moments makes them of."""
    running_var: torch.Tensor
    """(C_l,)."""
    eps: float
    is_part: bool
    """Whether moments are to be merged."""


class Record:
    """The moments that the layers of one network measure while a forward pass runs.

    Args:
        is_constant: whether the running statistics stay as they are, so that those of all layers
            are joined once.
    """

    def __init__(self, is_constant):
        self.is_constant = is_constant
        self.entries = None  # a list while a forward pass runs
        # of the layers, in the order of the latest forward pass
        self.running_vars = ()
        self.has_gradient = ()
        # {running_vars and their versions: joined}; kept, because CUDA graphs may read any of them
        self.joined = {}

    def __getstate__(self):
        """A copy joins anew: versions of its tensors count from another number."""
        return {**self.__dict__, "joined": {}}

    def add(self, place, moments, running_var, eps, is_part=False):
        """Record a layer's moments (2, C_l), or the part of which merge_moments makes them."""
        # Gradient checkpointing runs layers again in the backward pass: these are not recorded.
        if self.entries is not None:
            self.entries.append(Entry(place, moments, running_var, eps, is_part))

    def run(self, network, x):
        """The network's output, and LayerMoments of the layers that ran."""
        self.entries = []
        try:
            y = network(x)
            entries = sorted(self.entries, key=lambda entry: entry.place)
        finally:
            self.entries = None  # nothing may keep the autograd graph of a step that is over
        self.running_vars = tuple(entry.running_var for entry in entries)
        self.has_gradient = tuple(entry.moments.requires_grad for entry in entries)
        if not entries:
            return y, LayerMoments(torch.zeros(2, 0), torch.zeros(0), (), ())
        moments = _join_moments(entries)
        running_var = self.join_running_vars()
        sizes = tuple(len(running_var) for running_var in self.running_vars)
        eps = tuple(entry.eps for entry in entries)
        return y, LayerMoments(moments, running_var, sizes, eps)

    def join_running_vars(self):
        """running_var (C,) of all layers, joined once for layers that run in the same order."""
        has_versions = not any(running_var.is_inference() for running_var in self.running_vars)
        if not self.is_constant or not has_versions or torch.compiler.is_compiling():
            return _join_running_vars(self.running_vars)
        versions = tuple(running_var._version for running_var in self.running_vars)
        key = self.running_vars, versions  # tuples compare their tensors by identity first
        if key not in self.joined:
            with torch.inference_mode(False):  # a later call may save it for a backward pass
                self.joined[key] = _join_running_vars(self.running_vars)
        return self.joined[key]


def _join_running_vars(running_vars):
    """(C,) of all layers, in fp32 or float64."""
    joined = torch.cat([running_var.detach() for running_var in running_vars])
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _join_moments(entries):
    """Moments (2, C) of all layers, in the order of their entries."""
    parts = [entry.moments for entry in entries if entry.is_part]
    if not parts:
        return torch.cat([entry.moments for entry in entries], -1)
    merged = merge_moments(parts)  # (2, channels of these layers)
    if len(parts) == len(entries):
        return merged

    merged_layers = iter(merged.split([part.shape[-1] for part in parts], 1))
    layers = []
    for entry in entries:
        moments = next(merged_layers) if entry.is_part else entry.moments
        layers.append(moments)
    return torch.cat(layers, 1)


class FusedBatchNorm(nn.Module):
    """A frozen BatchNorm and the activation after it; it records the moments of each input.

    Args:
        bn: the BatchNorm.
        activation: of `bn_act_moments`.
        record: Record.
        place: a number that orders this layer's moments among the others'.
    """

    def __init__(self, bn, activation, record, place=0):
        super().__init__()
        weight = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight
        bias = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
        affine = fold_constants(weight, bias, bn.running_mean, bn.running_var, bn.eps)
        self.register_buffer("affine", affine)
        self.register_buffer("running_var", bn.running_var.detach())
        self.eps = bn.eps
        self.activation = activation
        self.record = record
        self.place = place
        self.n_uses = 1  # 2: forward returns its output twice, for two layers that read it

    def forward(self, input, residual=None):
        if residual is None or (residual.shape == input.shape and residual.dtype == input.dtype):
            y, part, *again = bn_act_moments_folded(
                input, self.affine, residual, self.activation, self.n_uses
            )
        else:  # an addition that broadcasts or converts
            y, part = bn_act_moments_folded(input, self.affine, None, "none")
            y = y + residual
            if self.activation != "none":
                y = getattr(F, self.activation)(y)
            again = [y] * (self.n_uses - 1)
        self.record.add(self.place, part, self.running_var, self.eps, is_part=True)
        return (y, *again) if again else y


class FusedPointwise(FusedBatchNorm):
    """A frozen 1 x 1 convolution, and the BatchNorm and activation after it.

    Args:
        conv: the convolution, of stride 1, one group, without padding and bias. The other
            arguments are those of FusedBatchNorm.
    """

    def __init__(self, conv, *args):
        super().__init__(*args)
        self.conv = conv

    def forward(self, input, residual=None):
        if not self.can_fuse(input, residual):
            return super().forward(self.conv(input), residual)
        y, part, *again = pointwise_bn_act_moments_folded(
            input, self.conv.weight, self.affine, residual, self.activation, self.n_uses
        )
        self.record.add(self.place, part, self.running_var, self.eps, is_part=True)
        return (y, *again) if again else y

    def can_fuse(self, input, residual):
        """Whether one kernel computes what the two layers would, in their dtype and layout.

        No kernel runs on a CPU. The kernel takes the weight as a constant and converts nothing.
        """
        weight = self.conv.weight
        if not _common.runs_triton(input) or not _is_channels_last(input):
            return False
        if input.dtype != weight.dtype or input.dtype not in _common.DTYPES:
            return False
        if weight.requires_grad and torch.is_grad_enabled():
            return False
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.get_autocast_dtype(device):
            return False
        if residual is None:
            return True
        shape = (len(input), len(weight), *input.shape[2:])
        return _is_channels_last(residual, shape) and residual.dtype == input.dtype


def _is_channels_last(x, shape=None):
    """Whether x is (N, C, H, W) in channels_last, and of a shape if one is given."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return shape is None or x.shape == shape


class FoldedStem(nn.Module):
    """A 7 x 7 convolution of stride 2 and padding 3 over images, on a CPU as one of 4 x 4.

        z_ij = sum_ab w_ab x_(2i+a-3, 2j+b-3)
             = sum_pq sum_rs w'_(2p+r, 2q+s) x_(2(i+p-2)+r, 2(j+q-2)+s),   w'_(a+1, b+1) = w_ab

    The four pixels (r, s) of a block become channels. With 3 input channels the input gradient
    takes five times as long as the forward pass, with 12 about as long as it. For 4 images of
    224 px in fp32, on one thread of a CPU with AVX-512, both passes take 0.57 of the plain time
    (32 of 56 ms). In bfloat16 they took 0.95 of it, so there the convolution runs as it is.
    """

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, input):
        if not self.can_fold(input):
            return self.conv(input)
        weight = F.pixel_unshuffle(F.pad(self.conv.weight, (1, 0, 1, 0)), 2)  # (C, 4 K, 4, 4)
        blocks = F.pad(F.pixel_unshuffle(input, 2), (2, 1, 2, 1))  # (N, 4 K, H / 2 + 3, W / 2 + 3)
        return F.conv2d(blocks, weight, self.conv.bias)

    def can_fold(self, input):
        """Whether the images (N, K, H, W) are in fp32 on a CPU and even in height and width."""
        if not input.is_cpu or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        return input.dim() == 4 and input.size(2) % 2 == 0 and input.size(3) % 2 == 0


class MeasuredBatchNorm(nn.Module):
    """A BatchNorm of a class of its own: it runs as it is, and the moments are measured apart."""

    def __init__(self, bn, record, place=0):
        super().__init__()
        self.bn = bn
        self.record = record
        self.place = place

    def forward(self, *args, **kwargs):
        moments = _measure_input(self.bn, args, kwargs, bn_moments)
        self.record.add(self.place, moments, self.bn.running_var, self.bn.eps)
        return self.bn(*args, **kwargs)


def _measure_input(bn, args, kwargs, moments):
    """Moments (2, C) of what a BatchNorm is called with: mean - running_mean, variance."""
    x = args[0] if args else next(iter(kwargs.values()))
    n_channels = len(bn.running_mean)
    if x.ndim < 2 or x.size(1) != n_channels:
        raise ValueError(
            f"fuse_batchnorm: expected a {type(bn).__name__} to get (N, {n_channels}, …), got "
            f"{tuple(x.shape)}; let it get its channels in dimension 1"
        )
    mean, var = moments(x, bn.running_mean)  # (C,), (C,)
    return torch.stack((mean - bn.running_mean, var))


class Fused(nn.Module):
    """What `fuse_batchnorm` returns where a rebuilt network is the original.

    Args:
        network: the rebuilt one.
        record: Record of its layers.
        kind: "fused", or "partly fused" where some of it stays as it was.
        reason: a sentence that says what stays and why; "" if nothing does.
    """

    def __init__(self, network, record, kind, reason=""):
        super().__init__()
        self.network = network
        self.record = record
        self.kind = kind
        self.reason = reason

    def forward(self, x):
        """The network's output, and LayerMoments."""
        return self.record.run(self.network, x)

    def close(self):
        """Do nothing: no hooks lie on the original. `Hooked` has some to remove."""


class Hooked:
    """What `hook_batchnorm` returns: called like a Fused, it returns the same."""

    kind = "hooks"

    def __init__(self, network, layers, moments, reason="", caller="fuse_batchnorm"):
        self.network = network
        self.moments = moments
        self.reason = reason
        self.caller = caller
        self.is_checked = False
        self.record = Record(is_constant=False)  # the network itself may go on learning
        self.handles = []
        for layer in layers:
            handle = layer.register_forward_pre_hook(self.measure_input, with_kwargs=True)
            self.handles.append(handle)

    def measure_input(self, module, args, kwargs):
        if self.record.entries is None and not torch.is_grad_enabled():
            return  # somebody else evaluates the network
        moments = _measure_input(module, args, kwargs, self.moments)
        self.record.add(0, moments, module.running_var, module.eps)

    def __call__(self, x):
        y, found = self.record.run(self.network, x)
        if not self.is_checked:
            self.is_checked = self.refuse_reentrant_checkpoints(y)
        return y, found

    def refuse_reentrant_checkpoints(self, y):
        """Raise if y depends on one. Returns whether y has an autograd graph, which shows that.

        Such a checkpoint runs its layers without gradients: their moments would have none either.
        """
        outputs = [value for value in tree_leaves(y) if torch.is_tensor(value)]
        nodes = {value.grad_fn for value in outputs} - {None}
        has_graph = bool(nodes)
        seen = set()
        while nodes:
            node = nodes.pop()
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise ValueError(
                    f"{self.caller}: expected a network that torch.autograd.grad can "
                    "differentiate, got reentrant gradient checkpointing; "
                    "pass use_reentrant=False to its checkpoint"
                )
            seen.add(node)
            nodes |= {parent for parent, _ in node.next_functions} - seen - {None}
        return has_graph

    def close(self):
        """Remove the hooks from the network."""
        for handle in self.handles:
            handle.remove()


# The two functions


def hook_batchnorm(model, kinds=BATCHNORMS, moments=bn_moments):
    """Measure the input of each BatchNorm in a hook, which reads it once more.

    Args:
        model: in eval mode. It gets the hooks itself, until `close()` of what is returned.
        kinds: the BatchNorm classes to measure. Layers without running statistics are passed over.
        moments: `bn_moments`, or `bn_moments_ref` for plain PyTorch.

    Returns:
        Hooked: called with x it returns (model(x), LayerMoments), as what `fuse_batchnorm` returns
            does.

    Raises:
        ValueError: such a BatchNorm is in train mode, or there is none. The first call raises it
            too, if the model uses reentrant gradient checkpointing.

    Example:
        >>> hooked = hook_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
        >>> y, found = hooked(torch.randn(2, 3, 8, 8))
        >>> found.moments.shape, found.sizes
        (torch.Size([2, 4]), (4,))
    """
    layers = _choose_layers("hook_batchnorm", model, kinds)
    return Hooked(model, layers, moments, caller="hook_batchnorm")


def fuse_batchnorm(model, example=None, kinds=BATCHNORMS):
    """Replace each BatchNorm of a frozen network, with the addition and activation after it.

    With an example the result is the model, measured exactly. These are tried one after another,
    each with the example, until one has the model's output, moments and image gradient:

    1. "fused": torch.fx traces the model, and each BatchNorm becomes one op with what alone
       follows it;
    2. "partly fused": the same where some BatchNorms are of a class of their own, which are only
       measured; or a copy of the modules in which each plain BatchNorm alone is replaced;
    3. "hooks": the model itself, measured as `hook_batchnorm` does, until `close()`.

    Args:
        model: in eval mode. It stays as it is; the result shares its weights.
        example: images (N, C, H, W), some random ones. None: nothing is verified, and the result
            may differ from a model whose code does more than call layers.
        kinds: the BatchNorm classes to measure. Layers without running statistics are passed over.

    Returns:
        Fused or Hooked: called with x it returns (model(x), LayerMoments), with the moments of
            `bn_act_moments` in the order in which the model's layers run. Its attribute `kind` is
            one of the three above, and `reason` says why it is not the first one. A warning says so
            too.

    Raises:
        TypeError: the example is no tensor.
        ValueError: such a BatchNorm is in train mode, or there is none, or none of them runs with
            the example; or the model uses reentrant gradient checkpointing.
        Exception: what the model itself raises with the example.

    Note:
        The BatchNorms' weights and statistics are taken when this function is called: load weights
        and set hooks before.

        1 x 1 convolutions are part of the layer on a GPU and in channels_last alone; stems are
        folded on a CPU, in fp32 and for even image sizes alone. So the example should have the
        device, size and memory format of later images: what it does not reach is not compared.

        Fused activations are ReLU, ReLU6, SiLU and Hardswish. The check runs two forward and
        backward passes over the example, and three forward passes: two images are enough. It leaves
        no trace in the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> fused = fuse_batchnorm(model, x)
        >>> y, found = fused(x)
        >>> fused.kind, y.shape, found.moments.shape
        ('fused', torch.Size([2, 4, 6, 6]), torch.Size([2, 4]))
    """
    if example is not None and not torch.is_tensor(example):
        name = type(example).__name__
        raise TypeError(f"fuse_batchnorm: expected example to be a tensor, got {name}; pass images")
    layers = _choose_layers("fuse_batchnorm", model, kinds)
    if example is None:
        watched = _rebuild_unverified(model, layers)
    else:
        watched = _rebuild_verified(model, layers, example)
    if watched.reason:
        warnings.warn(f"fuse_batchnorm: {watched.reason}", stacklevel=2)
    return watched


def _choose_layers(caller, model, kinds):
    """The BatchNorms of these kinds that have running statistics; ValueError if one trains."""
    chosen = []
    for layer in model.modules():
        if isinstance(layer, kinds) and layer.running_mean is not None:
            chosen.append(layer)
    if not chosen:
        raise ValueError(
            f"{caller}: expected BatchNorms with running statistics, got none; take another network"
        )
    if any(layer.training for layer in chosen):
        raise ValueError(
            f"{caller}: expected BatchNorms in eval mode, got some in train mode; call .eval()"
        )
    return chosen


# Choosing what to return


def _rebuild_unverified(model, layers):
    """The traced network, or a copy where it cannot be traced."""
    try:
        with _verify.keep_state(layers[0].running_mean.device, model):
            return _rebuild_by_tracing(model, layers)
    except Exception as error:  # whatever a network's code raises when its values are proxies
        problem = f"tracing by torch.fx fails ({_describe_error(error)})"
    return _rebuild_by_copying(model, layers, problem)


def _rebuild_verified(model, layers, example):
    """The first rebuilt network that is the model, or the model itself with hooks."""
    reference = Hooked(model, layers, bn_moments_ref)
    try:
        expected = _verify.run_twice(reference, model, example)
    finally:
        reference.close()
    if not expected[0].layers:
        raise ValueError(
            f"fuse_batchnorm: expected BatchNorms that run, got {len(layers)} that do not run with "
            "the example; take another network"
        )

    watched, problem = _try_to_rebuild(model, layers, example, expected)
    n_outside, changing = _verify.find_unseen_normalisations(model, example)
    changing = [layer for layer in changing if layer in layers]
    unseen = _describe_unseen(n_outside, changing)
    if watched is None:
        moments = bn_moments
        if example.dtype == torch.float64 or changing:
            moments = bn_moments_ref  # it keeps a copy of inputs, which may change in place
        reason = f"its BatchNorms are measured by hooks, because {problem}"
        watched = Hooked(model, layers, moments, reason)
    if unseen:
        watched.reason = f"{watched.reason}; {unseen}" if watched.reason else unseen
    return watched


def _describe_unseen(n_outside, changing):
    """What the moments of its BatchNorms do not show of a model, in a few words; "" for nothing.

    Args:
        n_outside: how many batch normalisations run outside of its BatchNorms.
        changing: the BatchNorms that change their input before they normalise it.
    """
    parts = []
    if n_outside:
        parts.append(
            f"batch normalisations outside of its BatchNorm layers ({n_outside}) are unseen"
        )
    if changing:
        classes = sorted({type(layer).__name__ for layer in changing})
        names = f"{len(changing)} {', '.join(classes)}"
        parts.append(f"BatchNorms that change their input ({names}) are measured before that")
    return "; ".join(parts)


def _try_to_rebuild(model, layers, example, expected):
    """(the first rebuilt network that is the model, ""), or (None, why there is none)."""
    if example.dtype == torch.float64:
        return None, "the ops compute in fp32 and the example is float64"
    if not any(_is_plain(layer) for layer in layers):
        return None, f"all are of another class ({_list_classes(layers)})"

    counter = _verify.find_changed_attribute(expected)
    if counter:
        problem = f"its forward changes {counter}, which torch.fx takes for a constant"
    else:
        rebuild = partial(_rebuild_by_tracing, model, layers)
        watched, difference = _verify_rebuilt(rebuild, model, example, expected)
        if watched is not None:
            return watched, ""
        problem = f"tracing by torch.fx fails ({difference})"

    rebuild = partial(_rebuild_by_copying, model, layers, problem)
    watched, difference = _verify_rebuilt(rebuild, model, example, expected)
    return watched, f"{problem} and copying its modules fails ({difference})"


def _verify_rebuilt(rebuild, model, example, expected):
    """(what `rebuild` returns, ""), or (None, how it differs from the model)."""
    try:
        with _verify.keep_state(example.device, model):
            watched = rebuild()
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints where its code fails
            passes = _verify.run_twice(watched, model, example)
    except Exception as error:  # whatever a network's code raises once it is rebuilt
        return None, _describe_error(error)

    difference = _verify.describe_difference(passes, expected)
    if difference:
        return None, difference
    return watched, ""


def _describe_error(error):
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:120]}"


def _is_plain(layer):
    return type(layer) in PLAIN_BATCHNORMS


def _list_classes(layers):
    return ", ".join(sorted({type(layer).__name__ for layer in layers if not _is_plain(layer)}))


# Rewriting a traced network


class _Tracer(fx.Tracer):
    """Traces a network down to PyTorch's own modules, and to the layers that are to be replaced."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.device = next(iter(layers)).running_mean.device

    def trace(self, root):
        generators = _verify.read_generators(self.device)
        # In a region of autocast, so that a region without it inside of forward shows.
        with torch.autocast(self.device.type, torch.bfloat16):
            graph = super().trace(root)
        if _verify.read_generators(self.device) != generators:
            raise fx.proxy.TraceError("torch.fx takes random numbers for constants")
        return graph

    def create_node(self, *args, **kwargs):
        if not torch.is_autocast_enabled(self.device.type):
            raise fx.proxy.TraceError("torch.fx drops torch.autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module, name):
        return module in self.layers or super().is_leaf_module(module, name)


def _rebuild_by_tracing(model, layers):
    """The network that torch.fx sees, with the layers replaced, each with what follows it."""
    tracer = _Tracer(set(layers))
    graph = tracer.trace(model)
    traced = fx.GraphModule(tracer.root, graph)
    _name_results_of_inplace_ops(traced)

    record = Record(is_constant=True)
    n_measured = 0
    for number, node in enumerate(list(traced.graph.nodes)):
        if node.op != "call_module":
            continue
        layer = traced.get_submodule(node.target)
        if layer not in tracer.layers:
            continue
        if _is_plain(layer):
            addition, end, activation = _find_followers(traced, node)
            convolution = _find_pointwise(traced, node)
            if convolution is None:
                fused = FusedBatchNorm(layer, activation, record, number)
            else:
                conv = traced.get_submodule(convolution.target)
                fused = FusedPointwise(conv, layer, activation, record, number)
            replaced = (end, addition, node, convolution)
            _replace_nodes(traced, f"fused_{number}", fused, replaced)
        else:
            node.target = f"measured_{number}"
            traced.add_module(node.target, MeasuredBatchNorm(layer, record, number))
            n_measured += 1
    _fork_outputs(traced)
    _fold_stems(traced)
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()

    if n_measured == 0:
        return Fused(traced, record, "fused")
    others = f"its BatchNorms of another class ({n_measured} {_list_classes(layers)})"
    return Fused(traced, record, "partly fused", f"{others} are measured apart")


def _name_results_of_inplace_ops(traced):
    """Let what follows an operation in place read its result, in place of what it changed."""
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    for node in order:
        if _is_inplace(traced, node):
            changed = node.args[0]
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)


def _is_inplace(traced, node):
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return getattr(traced.get_submodule(node.target), "inplace", False) is True
    if node.op == "call_method":
        return node.target in INPLACE_METHODS
    if node.op == "call_function":
        return node.target in INPLACE_FUNCTIONS or node.kwargs.get("inplace") is True
    return False


def _find_followers(traced, node):
    """The addition and the activation after a BatchNorm's node, as far as they are fused.

    Returns:
        The addition's node or None, the activation's node or None, and the activation's name.
    """
    after = _find_only_user(node)
    if after is None:
        return None, None, "none"

    activation = _name_activation(traced, after)
    if activation != "none":
        return None, after, activation

    if _is_addition(after):
        end = _find_only_user(after)
        if end is not None:
            activation = _name_activation(traced, end)
            if activation != "none":
                return after, end, activation
    return None, None, "none"


def _find_pointwise(traced, node):
    """The node of a 1 x 1 convolution whose output a BatchNorm's node alone reads, or None."""
    convolution = _get_input(node)
    if convolution.op != "call_module" or _find_only_user(convolution) is not node:
        return None
    conv = traced.get_submodule(convolution.target)
    if not _is_plain_convolution(conv) or conv.bias is not None:
        return None
    is_pointwise = set(conv.kernel_size + conv.stride) == {1}
    if not is_pointwise or conv.padding not in ((0, 0), "valid", "same"):
        return None
    # It will run where the BatchNorm's followers do, and must not meet a changed input there.
    if any(_is_inplace(traced, user) for user in _get_input(convolution).users):
        return None
    return convolution


def _get_input(node):
    """The first argument of a module's node."""
    return node.args[0] if node.args else node.kwargs["input"]


def _replace_nodes(traced, name, fused, replaced):
    """Put a FusedBatchNorm in place of a BatchNorm's node, its followers and its convolution.

    Args:
        replaced: the nodes of activation, addition, BatchNorm and convolution, each but that of the
            BatchNorm may be None.
    """
    end, addition, node, convolution = replaced
    traced.add_module(name, fused)
    beginning = node if convolution is None else convolution
    inputs = [_get_input(beginning)]
    if addition is not None:
        left, right = addition.args
        residual = right if left is node else left
        inputs.append(residual)

    # The last of the nodes is where all inputs are known: a residual may come after the BatchNorm.
    last = node if end is None else end
    with traced.graph.inserting_after(last):
        replacement = traced.graph.call_module(name, tuple(inputs))
    last.replace_all_uses_with(replacement)
    for old in replaced:
        if old is not None:
            traced.graph.erase_node(old)


def _fork_outputs(traced):
    """Let fused layers return their output twice where two nodes read it: a residual branches off.

    Their backward kernel then adds the two gradients. An operation in place needs the one output.
    """
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        layer = traced.get_submodule(node.target)
        readers = list(node.users)
        if not isinstance(layer, FusedBatchNorm) or len(readers) != 2:
            continue
        if any(_is_inplace(traced, reader) for reader in readers):
            continue

        layer.n_uses = 2
        with traced.graph.inserting_after(node):
            outputs = [
                traced.graph.call_function(operator.getitem, (node, number)) for number in (0, 1)
            ]
        for reader, output in zip(readers, outputs, strict=True):
            reader.replace_input_with(node, output)


def _fold_stems(traced):
    """Replace 7 x 7 convolutions over images by FoldedStem."""
    for number, node in enumerate(list(traced.graph.nodes)):
        if node.op == "call_module" and _is_stem(traced.get_submodule(node.target)):
            stem = FoldedStem(traced.get_submodule(node.target))
            node.target = f"stem_{number}"
            traced.add_module(node.target, stem)


def _is_stem(conv):
    if not _is_plain_convolution(conv) or conv.in_channels > 4:
        return False
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return shape == ((7, 7), (2, 2), (3, 3), (1, 1)) and conv.padding_mode == "zeros"


def _is_plain_convolution(module):
    """Whether a module is a Conv2d of one group that does only what its name says."""
    if type(module) is not nn.Conv2d or module.groups != 1 or "forward" in vars(module):
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks)


def _find_only_user(node):
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _name_activation(traced, node):
    """The activation that a node computes, as `bn_act_moments` calls it; "none" for another op."""
    if node.op == "call_module":
        module = traced.get_submodule(node.target)
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            return "relu6"
        return ACTIVATION_MODULES.get(type(module), "none")

    if node.op == "call_function":
        if node.target in HARDTANH_FUNCTIONS:
            return "relu6" if _read_hardtanh_range(node) == (0, 6) else "none"
        return ACTIVATION_FUNCTIONS.get(node.target, "none")

    if node.op == "call_method":
        return ACTIVATION_METHODS.get(node.target, "none")
    return "none"


def _read_hardtanh_range(node):
    bounds = {"min_val": -1, "max_val": 1}
    bounds.update(zip(bounds, node.args[1:], strict=False))
    bounds.update(node.kwargs)
    return bounds["min_val"], bounds["max_val"]


def _is_addition(node):
    """Whether a node adds two different tensors, and scales neither."""
    if node.op == "call_function":
        is_sum = node.target in ADD_FUNCTIONS
    else:
        is_sum = node.op == "call_method" and node.target in ADD_METHODS
    if not is_sum or len(node.args) != 2 or node.kwargs:
        return False

    left, right = node.args
    return isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right


# Where a network cannot be traced


def _rebuild_by_copying(model, layers, problem):
    """A copy of the module tree that shares all weights, with the layers replaced alone."""
    record = Record(is_constant=True)
    replacements = {}
    for layer in layers:
        if _is_plain(layer):
            replacements[layer] = FusedBatchNorm(layer, "none", record)
        else:
            replacements[layer] = MeasuredBatchNorm(layer, record)
    reason = f"its BatchNorms are fused without additions and activations, because {problem}"
    return Fused(_copy_module(model, replacements), record, "partly fused", reason)


def _copy_module(module, copies):
    """A shallow copy of a module and all below it; `copies` holds those that are there already."""
    if module in copies:
        return copies[module]

    copy = module.__new__(type(module))
    copies[module] = copy
    children = {}
    for name, child in module._modules.items():
        children[name] = None if child is None else _copy_module(child, copies)
    copy.__dict__ = {**module.__dict__, "_modules": children}
    copy.__dict__["_buffers"] = dict(module._buffers)  # what the copy assigns stays in the copy
    return copy
