"""The moments that the BatchNorms of a network measure in a forward pass, joined.

`fuse_batchnorm` and `hook_batchnorm` return them as `LayerMoments`; `Record` gathers them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.bn_act_moments import merge_moments


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
