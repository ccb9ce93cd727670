"""Several processes side by side, as `torchrun --nproc-per-node N SCRIPT` starts them: who is who, joint moments."""

import os
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from kernels.contract import one_line


class Place(NamedTuple):
    """Which process this is, from 0, and how many there are."""

    rank: int
    world: int


def join(device):
    """This process's Place among those that torchrun started; (0, 1) without torchrun.

    Args:
        device: cpu (gloo) or cuda (NCCL; this process then uses the GPU of its local rank).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Place(0, 1)
    with one_line(
        "torchrun: the processes cannot be joined", "check its --nproc-per-node and the machines' addresses"
    ):
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # processes that do not step together may finish hours apart, and wait for each other then
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=7))
    return Place(dist.get_rank(), dist.get_world_size())


def wait_for_all(place):
    """Until every process has come here."""
    if place.world > 1:
        dist.barrier()


def slices(n, n_parts):
    """range(n) in so many contiguous parts, even but for one; none is empty where n >= n_parts.

    >>> slices(10, 3)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(range(n), n_parts)]


def exchange(states):
    """Give every process all processes' tensors, in place: the last thing that they do together.

    Args:
        states: [{name: contiguous tensor}, one for each rank]: this process's own, and others of the right shapes.
    """
    for rank, state in enumerate(states):
        for tensor in state.values() if len(states) > 1 else ():
            dist.broadcast(tensor, rank)
    if len(states) > 1:
        dist.destroy_process_group()


def least_of_all(value, device):
    """The smallest of all processes' integers."""
    smallest = torch.tensor(value, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return smallest.item()


def leave(place):
    """The end of what `join` began."""
    if place.world > 1:
        dist.destroy_process_group()


class _JointMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, moments):
        world, joint = dist.get_world_size(), moments.clone()
        dist.all_reduce(joint)
        joint /= world
        offset = moments[0] - joint[0]  # of this process's mean from that of all
        between = offset.square()
        dist.all_reduce(between)
        joint[1] += between / world
        ctx.save_for_backward(offset)
        ctx.world = world
        return joint

    @staticmethod
    def backward(ctx, grads):
        (offset,) = ctx.saved_tensors
        return torch.stack((grads[0] + 2 * offset * grads[1], grads[1])) / ctx.world


def joint_moments(moments):
    """Moments over the values of all processes, from those of each; as many values in each.

    mean = avg_r mean_r,   var = avg_r var_r + avg_r (mean_r - mean)^2 (Chan's rule: no difference of squares)
    dmean_r = (dmean + 2 (mean_r - mean) dvar) / world,   dvar_r = dvar / world

    Args:
        moments: (2, C) of this process: mean, or mean less a constant that all share, and biased variance.

    Returns:
        (2, C), the same on every process.

    Note:
        The gradient is that of one loss that all processes compute alike from the result, as one process with all
        images would have it: nothing is sent in the backward pass. Terms of a process's own images that this loss
        averages over all must be divided by their number, `world`. Two all-reduces of C numbers.
    """
    return _JointMoments.apply(moments)
