"""Several processes on one run, as torchrun starts them: who this is, what is whose, and the exchange at the end."""

import numpy as np
import torch
import torch.distributed as dist


def join_ranks(device):
    """This process's rank and the number of ranks, as torchrun has it; 0 of 1 without. device: "cpu" or "cuda"."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return dist.get_rank(), dist.get_world_size()


def slices(n, n_parts):
    """range(n) in so many contiguous parts, even but for one; none is empty where n >= n_parts.

    >>> slices(10, 3)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(range(n), n_parts)]


def exchange(states):
    """Give every rank all ranks' tensors, in place: the last thing that they do together.

    Args:
        states: [{name: contiguous tensor}, one for each rank]: this rank's own, and others of the right shapes.
    """
    for rank, state in enumerate(states):
        for tensor in state.values() if len(states) > 1 else ():
            dist.broadcast(tensor, rank)
    if len(states) > 1:
        dist.destroy_process_group()
