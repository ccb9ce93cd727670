"""Noise that images are made from, and random changes of images on their device, without a host sync."""

import torch
import torch.nn.functional as F

from kernels.data import pixel_range


def shifted(x, pixels):
    """Each image of (N, C, H, W) moved by a random number of pixels each way, at most so many, its edges repeated.

    >>> shifted(torch.ones(2, 1, 8, 8), 3).shape
    torch.Size([2, 1, 8, 8])
    """
    N, _, H, W = x.shape
    moves = (torch.rand(2, N, 1, device=x.device) * (2 * pixels + 1)).long() - pixels
    rows = (torch.arange(H, device=x.device) + moves[0]).clamp(0, H - 1)  # (N, H)
    columns = (torch.arange(W, device=x.device) + moves[1]).clamp(0, W - 1)  # (N, W)
    images = torch.arange(N, device=x.device).view(N, 1, 1)
    return x.permute(0, 2, 3, 1)[images, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def mirrored(x):
    """Each image of (N, C, H, W) mirrored left to right with probability 1/2.

    >>> mirrored(torch.ones(2, 1, 8, 8)).mean()
    tensor(1.)
    """
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def cut(x):
    """Half of the images of (N, C, S, S) get a random band of rows or of columns from another image, as in CutMix.

    >>> cut(torch.ones(2, 1, 8, 8)).mean()
    tensor(1.)
    """
    N, side = len(x), x.shape[2]
    ends = (torch.rand(2, N, 1, device=x.device) * (side + 1)).long()
    at = torch.arange(side, device=x.device)
    band = (at >= ends[0]) & (at < ends[1])  # (N, S), empty where the ends are the wrong way round
    of_rows = torch.rand(N, 1, 1, device=x.device) < 0.5
    mask = torch.where(of_rows, band.unsqueeze(2), band.unsqueeze(1))  # (N, S, S)
    return torch.where(mask.unsqueeze(1), x[(torch.rand(N, device=x.device) * N).long()], x)


def varied(x, setting):
    """What a student sees of images (N, C, H, W); setting: shift, most pixels of a move; cut; mirror, absent: no."""
    x = shifted(x, setting["shift"]) if setting["shift"] else x
    x = mirrored(x) if setting.get("mirror") else x
    x = cut(x) if setting["cut"] else x
    return x.contiguous(memory_format=torch.channels_last)


def start(noise, setting, info):
    """What a batch of images starts from: N(0, 1) noise as it is, or, a prior on where strokes stand, dim and centred.

    Args:
        noise: (N, C, H, W), on the CPU.
        setting: blur, side of a box filter in pixels, odd, 1: none, whose result has a spread of about 1 again; gain,
            a factor on it; margin, pixels along each edge that start at the darkest value.
        info: of load_network: mean and std of the pixels.

    >>> from types import SimpleNamespace
    >>> info = SimpleNamespace(mean=(0.5,), std=(0.25,))
    >>> start(torch.ones(1, 1, 4, 4), dict(blur=1, gain=0.5, margin=1), info)[0, 0]
    tensor([[-2.0000, -2.0000, -2.0000, -2.0000],
            [-2.0000,  0.5000,  0.5000, -2.0000],
            [-2.0000,  0.5000,  0.5000, -2.0000],
            [-2.0000, -2.0000, -2.0000, -2.0000]])
    """
    blur, margin = setting["blur"], setting["margin"]
    if blur == 1 and not margin:
        return noise * setting["gain"]
    low, high = pixel_range(info, "cpu")
    x = F.avg_pool2d(noise, blur, 1, blur // 2) * blur * setting["gain"]
    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[margin : x.shape[2] - margin, margin : x.shape[3] - margin] = True
    return torch.where(inside, x, low).clamp(low, high)
