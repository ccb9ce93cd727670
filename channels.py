"""Channels of a network that stay or go together, and the network without some of them.

A part of pruning.py. A removed channel leaves every tensor that it is part of: the rows of the
layer that writes it, its BatchNorm and depthwise convolutions, the columns of the layers that read
it. Channels are tied, and have one number, where an operation combines them one to one, as an
addition or a product does. So a residual stream is pruned as one: a channel of it goes in all
blocks or in none.

What writes a channel, what passes it on and what reads it follows from the network's torch.fx
graph. A channel stays where the graph does not say: the network's input and output, zero channels
that F.pad appends (the shortcuts of option A), grouped convolutions, a layer that is called twice,
constant sizes in a reshape, and every operation that is not listed here.
"""

import math
import operator
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import fail, fail_in_one_line
from harness.networks import sample_example, trace_network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What channel c of the result holds depends on channel c of the operands alone
CHANNEL_BY_CHANNEL = (
    # arithmetic
    *("add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "truediv"),
    *("neg", "abs", "clamp", "clone", "contiguous", "detach", "float"),
    # activations, and dropout, which does nothing in eval mode
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus"),
    *("sigmoid", "tanh", "hardsigmoid", "hardswish", "hardtanh", "dropout", "dropout2d"),
    # pooling and sizes
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool2d", "interpolate"),
)
CHANNEL_BY_CHANNEL_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d, nn.Upsample),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
SIZES = ("size", "dim", "ndim", "shape")  # what an operation may ask of a tensor


@dataclass
class Channels:
    """The removable channels of a network, numbered from 0; tied ones have the same number."""

    count: int
    written: dict[str, torch.Tensor]
    """{layer: (rows of its tensors,) int64, the number of each output channel; -1: it stays}."""
    read: dict[str, torch.Tensor]
    """{layer: (columns of its weight,) int64, the number of the channel that each column reads; -1:
    it stays}. Several columns may have one number: those of a channel's pixels behind a flatten."""


class Ties:
    """A set of channels, some of them tied (union-find). Those that are tied to number 0 stay."""

    def __init__(self):
        self.parents = [0]

    def add(self, n):
        """n new channels, tied to nothing."""
        first = len(self.parents)
        self.parents += range(first, first + n)
        return list(range(first, first + n))

    def find(self, channel):
        """The lowest channel that this one is tied to."""
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def tie(self, first, second):
        for a, b in zip(first, second, strict=True):
            low, high = sorted((self.find(a), self.find(b)))
            self.parents[high] = low

    def keep(self, channels):
        """Let these stay."""
        self.tie(channels, [0] * len(channels))
        return channels


# The graph
def get_shape(node):
    """The shape of what a node of the graph returns, None where that is no tensor."""
    known = node.meta.get("tensor_meta")
    return known.shape if isinstance(known, TensorMetadata) else None


def get_operation(node, modules):
    """The name of a node's operation, or the module that it calls."""
    if node.op == "call_module":
        return modules[node.target]
    if node.target is getattr:
        return node.args[1]
    return getattr(node.target, "__name__", node.target)


def is_plain(layer):
    """Whether a layer's parameters are its weight and its bias, with nothing computed first."""
    names = {name for name, _ in layer.named_parameters()}
    return names <= {"weight", "bias"} and len(list(layer.modules())) == 1


def shares_weights(module, owners):
    """Whether a parameter of a module is another module's too; owners: {id of one: modules}."""
    return any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False))


def is_dense(layer, shape):
    """Whether each output channel of a layer may read every input channel."""
    if not is_plain(layer):
        return False
    if isinstance(layer, nn.Linear):
        return len(shape) == 2
    return isinstance(layer, CONVOLUTIONS) and layer.groups == 1


def is_depthwise(layer):
    if not isinstance(layer, CONVOLUTIONS) or not is_plain(layer):
        return False
    return layer.groups == layer.in_channels == layer.out_channels


def get_argument(node, name, default):
    """The second argument of a node's operation, given by its name or by its place."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[1] if len(node.args) > 1 else default


def reduces_pixels(node, ndim):
    """Whether a mean, sum or maximum goes over neither images nor channels."""
    dims = get_argument(node, "dim", None)
    if dims is None:
        return False
    dims = [dims] if isinstance(dims, int) else dims
    return all(isinstance(dim, int) and dim % ndim >= 2 for dim in dims)


def pads_pixels(node, ndim):
    """Whether F.pad adds pixels alone, and no channels."""
    widths = get_argument(node, "pad", ())
    return len(widths) <= 2 * (ndim - 2)


def cuts_pixels(node, ndim):
    """Whether an index such as x[:, :, ::2, 1:] takes all images and channels."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) > ndim:
        return False
    return index[:2] == (slice(None), slice(None)) and all(isinstance(i, slice) for i in index)


def keeps_channels(node, operation, ndim):
    """Whether channel c of a node's tensor depends on channel c of its operands alone."""
    if isinstance(operation, nn.Module):
        return type(operation) in CHANNEL_BY_CHANNEL_MODULES
    if operation in ("mean", "sum", "amax"):
        return reduces_pixels(node, ndim)
    if operation == "pad":
        return pads_pixels(node, ndim)
    if node.target is operator.getitem:
        return cuts_pixels(node, ndim)
    return operation in CHANNEL_BY_CHANNEL


def flattens_pixels(node, operation, before, after):
    """Whether (N, C, H, W) becomes (N, C H W) for any number of channels C."""
    if len(after) != 2 or math.prod(before[1:]) != after[1]:
        return False
    if operation == "flatten" or isinstance(operation, nn.Flatten):
        return True
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    return operation in ("view", "reshape") and len(sizes) == 2 and sizes[1] == -1


def joins_channels(node, operation):
    """Whether a node is torch.cat of channels."""
    dim = get_argument(node, "dim", 0)
    return operation in ("cat", "concat") and dim == 1


def follow_node(node, operation, known, ties):
    """The channels, in order, of what an operation returns.

    Args:
        node: of the graph; no layer.
        operation: its name or module.
        known: {node: its channels}, of the nodes before it that return tensors.
        ties: where channels are tied, or kept.

    Returns:
        A list of channels of `ties`, or None where it returns no tensor.
    """
    shape = get_shape(node)
    operands = [known[n] for n in node.all_input_nodes if known[n] is not None]
    shapes = [get_shape(n) for n in node.all_input_nodes if known[n] is not None]
    if shape is None and operation in SIZES:
        return None
    if shape is not None and shapes:
        same = all(other[:2] == shape[:2] for other in shapes)
        same_ndim = all(len(other) == len(shapes[0]) for other in shapes)
        if same and same_ndim and keeps_channels(node, operation, len(shapes[0])):
            for other in operands[1:]:
                ties.tie(operands[0], other)
            return operands[0]
        if len(shapes) == 1 and flattens_pixels(node, operation, shapes[0], shape):
            pixels = math.prod(shapes[0][2:])
            return [channel for channel in operands[0] for _ in range(pixels)]
        if joins_channels(node, operation):
            joined = node.args[0] if node.args else node.kwargs["tensors"]
            return [channel for n in joined for channel in known[n]]

    for channels in operands:
        ties.keep(channels)
    if shape is None:
        return None
    if len(shape) < 2:
        return []
    return ties.keep(ties.add(shape[1]))


def find_channels(network, info):
    """The channels of a network that can be removed, without changing what it reads and returns.

    Args:
        network: in eval mode.
        info: its NetworkInfo.

    Returns:
        Channels, on the network's device.
    """
    device = next(network.parameters()).device
    traced = trace_network(network, info)
    with fail_in_one_line(f"--teacher {info.name} cannot be pruned", "take another network"):
        ShapeProp(traced).propagate(sample_example(info, device))
    modules = dict(traced.named_modules())
    nodes = list(traced.graph.nodes)
    calls = [node.target for node in nodes if node.op == "call_module"]
    owners = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))

    ties = Ties()
    known = {}  # {node: channels of its tensor}
    written = {}
    read = {}
    for node in nodes:
        operation = get_operation(node, modules)
        is_layer = node.op == "call_module" and calls.count(node.target) == 1
        if is_layer and shares_weights(operation, owners):
            is_layer = False  # its channels stay
        source = known[node.all_input_nodes[0]] if is_layer else None
        if is_layer and is_dense(operation, get_shape(node)):
            read[node.target] = source
            written[node.target] = ties.add(get_shape(node)[1])
            known[node] = written[node.target]
        elif is_layer and (is_depthwise(operation) or isinstance(operation, _BatchNorm)):
            written[node.target] = source
            known[node] = source
        else:
            known[node] = follow_node(node, operation, known, ties)

    number_of_root = {0: -1}
    for channel in range(len(ties.parents)):
        number_of_root.setdefault(ties.find(channel), len(number_of_root) - 1)

    def number_channels(table):
        rows = {}
        for name, channels in table.items():
            found = [number_of_root[ties.find(channel)] for channel in channels]
            rows[name] = torch.tensor(found, device=device)
        return rows

    channels = Channels(len(number_of_root) - 1, number_channels(written), number_channels(read))
    if channels.count == 0:
        fail(f"--teacher {info.name}: no channel of it can be removed; take another network")
    return channels


# The network without some channels
def select_kept(numbers, kept):
    """Which rows or columns stay, bool: those of kept channels, and those without a number."""
    return (numbers < 0) | kept[numbers.clamp(min=0)]


@torch.no_grad()
def mask_channels(network, channels, kept):
    """A copy of a network whose layers no longer read the removed channels: it is no smaller.

    Args:
        network: that find_channels saw.
        channels: its Channels.
        kept: (count,) bool.
    """
    masked = deepcopy(network)
    for name, numbers in channels.read.items():
        masked.get_submodule(name).weight[:, ~select_kept(numbers, kept)] = 0
    return masked


def take_channels(layer, rows, columns):
    """Keep some channels of a layer, in place.

    Args:
        layer: convolution, linear layer or BatchNorm.
        rows: indices of its output channels.
        columns: indices of what it reads; None: of a BatchNorm or depthwise convolution.
    """
    for name, tensor in list(layer.named_parameters(recurse=False)):
        taken = tensor.detach()[rows]
        if columns is not None and tensor.ndim > 1:
            taken = taken[:, columns]
        layer.register_parameter(name, nn.Parameter(taken.clone(), tensor.requires_grad))
    for name, tensor in list(layer.named_buffers(recurse=False)):
        if tensor.ndim:
            layer.register_buffer(name, tensor[rows].clone())

    if isinstance(layer, _BatchNorm):
        layer.num_features = len(rows)
    elif isinstance(layer, nn.Linear):
        layer.out_features = len(rows)
        layer.in_features = len(columns)
    elif columns is None:
        layer.out_channels = layer.in_channels = layer.groups = len(rows)
    else:
        layer.out_channels = len(rows)
        layer.in_channels = len(columns)


def remove_channels(network, channels, kept):
    """A smaller copy of a network, of the same classes, without the removed channels."""
    smaller = deepcopy(network)
    for name, numbers in channels.written.items():
        rows = select_kept(numbers, kept).nonzero().flatten()
        columns = None
        if name in channels.read:
            columns = select_kept(channels.read[name], kept).nonzero().flatten()
        take_channels(smaller.get_submodule(name), rows, columns)
    device = next(network.parameters()).device
    return smaller.to(device, memory_format=torch.channels_last)


def count_channels(network, channels):
    """{layer: [rows, columns or -1]} of a network: what shrink_network needs to rebuild it."""
    counts = {}
    for name in channels.written:
        layer = network.get_submodule(name)
        if isinstance(layer, _BatchNorm):
            counts[name] = [layer.num_features, -1]
        elif name in channels.read:
            counts[name] = list(layer.weight.shape[:2])
        else:
            counts[name] = [layer.out_channels, -1]
    return counts


def shrink_network(network, counts):
    """Give the layers of a network the sizes of count_channels, in place; any weights."""
    for name, (rows, columns) in counts.items():
        columns = None if columns < 0 else torch.arange(columns)
        take_channels(network.get_submodule(name), torch.arange(rows), columns)


def leave_one(channels, kept):
    """Keep a channel, in place, of each layer that would have none."""
    for numbers in channels.written.values():
        if not select_kept(numbers, kept).any():
            kept[numbers[0]] = True


@torch.no_grad()
def check_removal(network, channels, info):
    """Refuse a network that does not answer alike with channels masked and with them removed.

    Half of all removable channels go, the odd numbers. A forward with a hard-coded number of
    channels fails here.
    """
    device = next(network.parameters()).device
    kept = torch.arange(channels.count, device=device) % 2 == 0
    leave_one(channels, kept)
    x = sample_example(info, device)
    advice = "keep numbers of channels out of its code, or take another network"
    with fail_in_one_line(f"--teacher {info.name} cannot be made smaller", advice):
        smaller = remove_channels(network, channels, kept)(x)
        masked = mask_channels(network, channels, kept)(x)
        difference = (smaller - masked).abs().max() / masked.abs().max().clamp(min=1)
        if not difference < 1e-3:
            raise ValueError(f"without half of its channels it answers otherwise: {difference:.3g}")


def find_kinds(channels):
    """Channels by the layers that they are part of: [(k,) int64, …], one for each such set."""
    parts = [[] for _ in range(channels.count)]
    for table in (channels.written, channels.read):
        for name, numbers in table.items():
            for number in numbers[numbers >= 0].unique().tolist():
                parts[number].append(name)
    kinds = {}
    for number, names in enumerate(parts):
        kinds.setdefault(tuple(sorted(set(names))), []).append(number)
    device = next(iter(channels.written.values())).device
    return [torch.tensor(numbers, device=device) for numbers in kinds.values()]


def can_remove(channels, kept, number):
    """Whether each layer keeps at least one channel without this one."""
    kept = kept.clone()
    kept[number] = False
    tables = [numbers for numbers in channels.written.values() if (numbers == number).any()]
    return all(select_kept(numbers, kept).any() for numbers in tables)


def count_removed(network, channels, kept):
    """How many parameters of a network go with the channels that are not kept."""
    removed = 0
    for name, numbers in channels.written.items():
        n_rows = len(numbers)
        n_rows_kept = int(select_kept(numbers, kept).sum())
        n_columns = 1
        n_columns_kept = 1
        if name in channels.read:
            n_columns = len(channels.read[name])
            n_columns_kept = int(select_kept(channels.read[name], kept).sum())
        for tensor in network.get_submodule(name).parameters(recurse=False):
            before = n_rows
            after = n_rows_kept
            if tensor.ndim > 1:
                before *= n_columns
                after *= n_columns_kept
            removed += tensor.numel() // before * (before - after)
    return removed
