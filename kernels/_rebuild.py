"""Networks rebuilt with fused layers: as torch.fx traces them, or as a copy of their modules."""

import operator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from kernels import _verify
from kernels._fused_layers import FoldedStem, FusedBatchNorm, FusedPointwise, MeasuredBatchNorm
from kernels._layer_moments import Record

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


def is_plain(layer):
    """Whether a BatchNorm is of PyTorch's own classes."""
    return type(layer) in PLAIN_BATCHNORMS


def list_classes(layers):
    """The names of the other classes among BatchNorms, for a message."""
    return ", ".join(sorted({type(layer).__name__ for layer in layers if not is_plain(layer)}))


# A traced network


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


def rebuild_by_tracing(model, layers):
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
        if is_plain(layer):
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
    others = f"its BatchNorms of another class ({n_measured} {list_classes(layers)})"
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


# A copy, where a network cannot be traced


def rebuild_by_copying(model, layers, problem):
    """A copy of the module tree that shares all weights, with the layers replaced alone."""
    record = Record(is_constant=True)
    replacements = {}
    for layer in layers:
        if is_plain(layer):
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
