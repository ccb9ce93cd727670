"""Frozen networks that return the batch moments of their BatchNorms' inputs beside their output.

`fuse_batchnorm` replaces each BatchNorm, with the addition and the ReLU after it, by one call of
`bn_act_moments`. A conventional inversion step does the same in three places: the layer in eval
mode, the ReLU, and a hook that measures the layer's input. Fused are BatchNorm -> ReLU,
BatchNorm -> addition -> ReLU, and BatchNorm alone.

`hook_batchnorm` is the plain way to the same result.
"""

import operator
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from kernels.bn_act_moments import bn_act_moments_folded, fold_constants
from kernels.bn_moments import bn_moments

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}


# What the two functions return


class FusedBatchNorm(nn.Module):
    """A frozen BatchNorm and the ReLU after it; appends the moments of each input to `found`."""

    def __init__(self, bn, relu, found):
        super().__init__()
        weight = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight
        bias = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
        affine = fold_constants(weight, bias, bn.running_mean, bn.running_var, bn.eps)
        self.register_buffer("affine", affine)
        self.register_buffer("running_var", bn.running_var.detach())
        self.relu = relu
        self.found = found

    def forward(self, x, residual=None):
        if residual is None or (residual.shape == x.shape and residual.dtype == x.dtype):
            activation = "relu" if self.relu else "none"
            y, moments = bn_act_moments_folded(x, self.affine, residual, activation)
        else:  # an addition that broadcasts or converts
            y, moments = bn_act_moments_folded(x, self.affine, None, "none")
            y = y + residual
            if self.relu:
                y = F.relu(y)
        self.found.append((moments, self.running_var))
        return y


class Fused(nn.Module):
    """What `fuse_batchnorm` returns. `fully` says whether torch.fx could trace the network."""

    def __init__(self, network, found, fully):
        super().__init__()
        self.network = network
        self.found = found
        self.fully = fully

    def forward(self, x):
        """The network's output, and [(moments (2, C), running_var (C,)), …] as its layers run."""
        self.found.clear()
        y = self.network(x)
        found = list(self.found)
        self.found.clear()  # nothing may keep the autograd graph of a step that is over
        return y, found


class Hooked:
    """What `hook_batchnorm` returns: called like a Fused, it returns the same."""

    def __init__(self, network, layers, moments):
        self.network = network
        self.moments = moments
        self.found = []
        self.handles = [layer.register_forward_pre_hook(self.measure_input) for layer in layers]

    def measure_input(self, module, inputs):
        mean, var = self.moments(inputs[0], module.running_mean)  # (C,), (C,)
        moments = torch.stack((mean - module.running_mean, var))  # (2, C)
        self.found.append((moments, module.running_var))

    def __call__(self, x):
        self.found = []
        y = self.network(x)
        found = self.found
        self.found = []  # nothing may keep the autograd graph of a step that is over
        return y, found

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
        Hooked: called with x it returns (model(x), [(moments, running_var), …]), as what
            `fuse_batchnorm` returns does.

    Raises:
        ValueError: such a BatchNorm is in train mode, or there is none.

    Example:
        >>> hooked = hook_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
        >>> y, found = hooked(torch.randn(2, 3, 8, 8))
        >>> [moments.shape for moments, running_var in found]
        [torch.Size([2, 4])]
    """
    return Hooked(model, _choose_layers("hook_batchnorm", model, kinds), moments)


def fuse_batchnorm(model, kinds=BATCHNORMS):
    """Replace each BatchNorm of a frozen network, with the addition and ReLU that alone follow it.

    Args:
        model: in eval mode. It stays as it is; the result shares its weights.
        kinds: the BatchNorm classes to replace. Layers without running statistics are passed over.

    Returns:
        Fused: called with x it returns (model(x), [(moments, running_var), …]) in the order in
            which the layers run. moments (2, C) are those of `bn_act_moments`: mean less running
            mean, and variance.

    Raises:
        ValueError: such a BatchNorm is in train mode, or there is none.

    Note:
        torch.fx cannot trace a network whose control flow depends on values. Then only the
        BatchNorms are replaced, additions and ReLUs stay, a warning says so, and `fully` is False.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> y, found = fuse_batchnorm(model)(torch.randn(2, 3, 8, 8))
        >>> y.shape, [moments.shape for moments, running_var in found]
        (torch.Size([2, 4, 6, 6]), [torch.Size([2, 4])])
    """
    chosen = set(_choose_layers("fuse_batchnorm", model, kinds))
    found = []
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever a network's code raises when its values are proxies
        reason = str(error).split("\n")[0][:120]
        warnings.warn(
            f"fuse_batchnorm: cannot trace ({reason}); ReLUs and additions stay apart",
            stacklevel=2,
        )
        return Fused(_copy_with_fused_layers(model, chosen, found), found, fully=False)

    _fuse_graph(traced, chosen, found)
    return Fused(traced, found, fully=True)


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


# Rewriting a traced network


def _fuse_graph(traced, chosen, found):
    """Replace the chosen BatchNorms in a torch.fx graph, each with what follows it."""
    for number, node in enumerate(list(traced.graph.nodes)):
        if node.op == "call_module" and traced.get_submodule(node.target) in chosen:
            addition, relu = _find_followers(traced, node)
            _replace_nodes(traced, f"fused_{number}", node, addition, relu, found)
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _find_followers(traced, node):
    """The addition and the ReLU after a BatchNorm's node; None for each that is not fused."""
    after = _find_only_user(node)
    if after is None:
        return None, None
    if _is_relu(traced, after):
        return None, after

    if _is_addition(after):
        end = _find_only_user(after)
        if end is not None and _is_relu(traced, end):
            return after, end
    return None, None


def _replace_nodes(traced, name, node, addition, relu, found):
    """Put one FusedBatchNorm in place of a BatchNorm's node and its followers."""
    bn = traced.get_submodule(node.target)
    traced.add_module(name, FusedBatchNorm(bn, relu is not None, found))
    inputs = [node.args[0]]
    if addition is not None:
        left, right = addition.args
        inputs.append(right if left is node else left)

    # The last of the nodes is where all inputs are known: a residual may come after the BatchNorm.
    last = node if relu is None else relu
    with traced.graph.inserting_after(last):
        fused = traced.graph.call_module(name, tuple(inputs))
    last.replace_all_uses_with(fused)
    for replaced in (relu, addition, node):
        if replaced is not None:
            traced.graph.erase_node(replaced)


def _find_only_user(node):
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_relu(traced, node):
    if node.op == "call_module":
        return type(traced.get_submodule(node.target)) is nn.ReLU
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    return node.op == "call_method" and node.target == "relu"


def _is_addition(node):
    """Whether a node adds two different tensors, and scales neither."""
    if node.op == "call_function":
        is_sum = node.target in ADD_FUNCTIONS
    else:
        is_sum = node.op == "call_method" and node.target == "add"
    if not is_sum or len(node.args) != 2 or node.kwargs:
        return False

    left, right = node.args
    return isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right


# Where a network cannot be traced


def _copy_with_fused_layers(module, chosen, found):
    """A copy of the module tree that shares all weights, its chosen BatchNorms replaced."""
    if module in chosen:
        return FusedBatchNorm(module, False, found)

    children = {}
    for name, child in module._modules.items():
        children[name] = None
        if child is not None:
            children[name] = _copy_with_fused_layers(child, chosen, found)
    copy = module.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": children}
    return copy
