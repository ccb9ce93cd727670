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
import warnings
from functools import partial

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from kernels import _verify
from kernels._fused_layers import measure_input
from kernels._layer_moments import Record
from kernels._rebuild import is_plain, list_classes, rebuild_by_copying, rebuild_by_tracing
from kernels.bn_moments import bn_moments, bn_moments_ref

BATCHNORMS = _BatchNorm  # with SyncBatchNorm and what users derive


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
        moments = measure_input(module, args, kwargs, self.moments)
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
            return rebuild_by_tracing(model, layers)
    except Exception as error:  # whatever a network's code raises when its values are proxies
        problem = f"tracing by torch.fx fails ({_describe_error(error)})"
    return rebuild_by_copying(model, layers, problem)


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
    if not any(is_plain(layer) for layer in layers):
        return None, f"all are of another class ({list_classes(layers)})"

    counter = _verify.find_changed_attribute(expected)
    if counter:
        problem = f"its forward changes {counter}, which torch.fx takes for a constant"
    else:
        rebuild = partial(rebuild_by_tracing, model, layers)
        watched, difference = _verify_rebuilt(rebuild, model, example, expected)
        if watched is not None:
            return watched, ""
        problem = f"tracing by torch.fx fails ({difference})"

    rebuild = partial(rebuild_by_copying, model, layers, problem)
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
