"""A frozen network whose BatchNorms, with the addition and ReLU after them, are `bn_act_moments`: no hooks.

What a conventional inversion step does in three places, the layer in eval mode, the ReLU, the hook that measures the
input, is one op here, wherever a network has BatchNorm -> ReLU, BatchNorm -> addition -> ReLU, or BatchNorm alone.
"""

import operator
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx

from kernels.bn_act_moments import bn_act_moments_folded, fold_constants
from kernels.bn_moments import bn_moments

RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
ADDS = {operator.add, operator.iadd, torch.add}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FusedBatchNorm(nn.Module):
    """A BatchNorm's constants, and whether a ReLU follows; appends the moments of each input to `found`."""

    def __init__(self, bn, relu, found):
        super().__init__()
        ones = torch.ones_like(bn.running_mean)
        weight, bias = (
            ones if bn.weight is None else bn.weight,
            0 * ones if bn.bias is None else bn.bias,
        )
        self.register_buffer(
            "affine", fold_constants(weight, bias, bn.running_mean, bn.running_var, bn.eps)
        )
        self.register_buffer("running_var", bn.running_var.detach())
        self.relu, self.found = relu, found

    def forward(self, x, residual=None):
        if residual is None or (residual.shape == x.shape and residual.dtype == x.dtype):
            y, moments = bn_act_moments_folded(x, self.affine, residual, self.relu)
        else:  # an addition that broadcasts or converts
            y, moments = bn_act_moments_folded(x, self.affine, None, False)
            y = F.relu(y + residual) if self.relu else y + residual
        self.found.append((moments, self.running_var))
        return y


class Fused(nn.Module):
    """What fuse_batchnorm returns: `network`, its BatchNorms replaced, `fully` told whether it could be traced."""

    def __init__(self, network, found, fully):
        super().__init__()
        self.network, self.found, self.fully = network, found, fully

    def forward(self, x):
        """The network's output, and [(moments (2, C), running_var (C,)), …] of its BatchNorms as they are called."""
        self.found.clear()
        y = self.network(x)
        found = list(self.found)
        self.found.clear()  # nothing may keep the graph of a step that is over
        return y, found


class Hooked:
    """What hook_batchnorm returns: called like a Fused, it gives the same."""

    def __init__(self, network, layers, moments):
        self.network, self.moments, self.found = network, moments, []
        self.handles = [m.register_forward_pre_hook(self.measure) for m in layers]

    def measure(self, module, inputs):
        mean, var = self.moments(inputs[0], module.running_mean)  # (C,), (C,)
        self.found.append((torch.stack((mean - module.running_mean, var)), module.running_var))

    def __call__(self, x):
        self.found = []
        y, found = self.network(x), self.found
        self.found = []  # nothing may keep the graph of a step that is over
        return y, found

    def close(self):
        """Take the hooks off the network."""
        for handle in self.handles:
            handle.remove()


def is_relu(node, modules):
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return (
        node.target in RELUS
        if node.op == "call_function"
        else node.op == "call_method" and node.target == "relu"
    )


def is_add(node):
    """Whether a node adds two tensors, neither scaled nor a number."""
    is_sum = (
        node.target in ADDS
        if node.op == "call_function"
        else (node.op, node.target) == ("call_method", "add")
    )
    return (
        is_sum
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) for a in node.args)
    )


def only_user(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def chosen_layers(caller, model, kinds):
    """The BatchNorms of these kinds with running statistics, all in eval mode; ValueError otherwise."""
    chosen = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    if not chosen:
        raise ValueError(
            f"{caller}: expected BatchNorms with running statistics, got none; take another network"
        )
    if any(m.training for m in chosen):
        raise ValueError(
            f"{caller}: expected BatchNorms in eval mode, got some in train mode; call .eval()"
        )
    return chosen


def hook_batchnorm(model, kinds=BATCHNORMS, moments=bn_moments):
    """The plain way to what `fuse_batchnorm` gives: a hook before each BatchNorm, which reads its input once more.

    Args:
        model: in eval mode; it gets the hooks itself, until `close()` of what is returned.
        kinds: the BatchNorms that count, but for those without running statistics.
        moments: `bn_moments`, or `bn_moments_ref` for plain PyTorch.

    Returns:
        Hooked: called with x it gives (model(x), [(moments, running_var), …]) as `fuse_batchnorm`'s networks do.

    Raises:
        ValueError: such a BatchNorm is in train mode; there is none.

    >>> hooked = hook_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    >>> [moments.shape for moments, _ in hooked(torch.randn(2, 3, 8, 8))[1]]
    [torch.Size([2, 4])]
    """
    return Hooked(model, chosen_layers("hook_batchnorm", model, kinds), moments)


def fuse_batchnorm(model, kinds=BATCHNORMS):
    """Replace the BatchNorms of a frozen network, each with the addition and the ReLU that alone follow it.

    Args:
        model: in eval mode; left as it is. Its weights are shared, not copied.
        kinds: the BatchNorms that count; these, but for those without running statistics, are replaced.

    Returns:
        Fused: called with x it gives (model(x), [(moments, running_var), …]); moments as of `bn_act_moments`, mean
        less running mean and variance, in the order in which the layers run.

    Raises:
        ValueError: such a BatchNorm is in train mode; there is none.

    Note:
        A network that torch.fx cannot trace (control flow on values) keeps its ReLUs: its BatchNorms alone are
        replaced, a warning says so and `fully` is False.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> y, found = fuse_batchnorm(model)(torch.randn(2, 3, 8, 8))
    >>> y.shape, [moments.shape for moments, _ in found]
    (torch.Size([2, 4, 6, 6]), [torch.Size([2, 4])])
    """
    chosen = set(chosen_layers("fuse_batchnorm", model, kinds))
    found = []
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # whatever a network's own code raises when its values are proxies
        reason = str(error).split("\n")[0][:120]
        warnings.warn(
            f"fuse_batchnorm: cannot trace ({reason}); ReLUs and additions stay apart", stacklevel=2
        )
        return Fused(_replaced(model, chosen, found), found, False)
    modules = dict(graph.named_modules())
    for i, node in enumerate(list(graph.graph.nodes)):
        if node.op != "call_module" or modules[node.target] not in chosen:
            continue
        last, residual, after = node, None, only_user(node)
        if after is not None and is_add(after) and after.args[0] is not after.args[1]:
            end = only_user(after)
            if end is not None and is_relu(end, modules):
                residual = after.args[1] if after.args[0] is node else after.args[0]
                last = end
        elif after is not None and is_relu(after, modules):
            last = after
        name = f"fused_{i}"
        modules[name] = FusedBatchNorm(modules[node.target], last is not node, found)
        graph.add_module(name, modules[name])
        # where the addition stood all its operands are there; a lone BatchNorm stays where it is
        with graph.graph.inserting_after(last):
            inputs = (node.args[0],) if residual is None else (node.args[0], residual)
            fused = graph.graph.call_module(name, inputs)
        last.replace_all_uses_with(fused)
        for gone in (last, after, node):
            if (
                gone is not None
                and not gone.users
                and gone in graph.graph.nodes
                and gone.op != "output"
            ):
                graph.graph.erase_node(gone)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return Fused(graph, found, True)


def _replaced(model, chosen, found):
    """A copy of the module tree, weights shared, with FusedBatchNorm in place of each chosen BatchNorm."""
    if model in chosen:
        return FusedBatchNorm(model, False, found)
    copy = model.__new__(type(model))
    copy.__dict__ = dict(model.__dict__)
    copy._modules = {name: m and _replaced(m, chosen, found) for name, m in model._modules.items()}
    return copy
