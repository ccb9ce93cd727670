"""Synthesised images: pixels and normalised units, random changes on the device, files.

A run's images lie in files images-00000.npz, images-00001.npz …, one batch each: `images` uint8
(N, H, W, C) and `labels` int64 (N,).
"""

import re
from pathlib import Path

import numpy as np
import torch

from harness.errors import fail, fail_in_one_line, refuse_unwritable
from harness.files import check_archive, open_atomically


# Units
def get_pixel_range(info, device):
    """The darkest and the brightest pixel in a network's normalised units.

    Args:
        info: NetworkInfo.
        device: of the result.

    Returns:
        low, high: (1, C, 1, 1) fp32 each, (0 - mean) / std and (1 - mean) / std.
    """
    pairs = list(zip(info.mean, info.std, strict=True))
    low = torch.tensor([(0.0 - mean) / std for mean, std in pairs], device=device)
    high = torch.tensor([(1.0 - mean) / std for mean, std in pairs], device=device)
    return low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)


def to_uint8(x, info):
    """Images (N, C, H, W) in normalised units -> uint8 pixels; info: NetworkInfo."""
    mean = torch.tensor(info.mean, device=x.device).view(1, -1, 1, 1)
    std = torch.tensor(info.std, device=x.device).view(1, -1, 1, 1)
    pixels = (x * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8)


# Random changes without a host sync, so that a CUDA graph can hold them
def shift_images(x, pixels):
    """Move each image of (N, C, H, W) by up to `pixels` each way, at random; edges are repeated.

    >>> shift_images(torch.ones(2, 1, 8, 8), 3).shape
    torch.Size([2, 1, 8, 8])
    """
    N, _, H, W = x.shape
    moves = (torch.rand(2, N, 1, device=x.device) * (2 * pixels + 1)).long() - pixels  # (2, N, 1)
    rows = (torch.arange(H, device=x.device) + moves[0]).clamp(0, H - 1)  # (N, H)
    columns = (torch.arange(W, device=x.device) + moves[1]).clamp(0, W - 1)  # (N, W)
    images = torch.arange(N, device=x.device).view(N, 1, 1)
    moved = x.permute(0, 2, 3, 1)[images, rows.unsqueeze(2), columns.unsqueeze(1)]  # (N, H, W, C)
    return moved.permute(0, 3, 1, 2)


def mirror_images(x):
    """Mirror each image of (N, C, H, W) left to right with probability 1/2.

    >>> mirror_images(torch.ones(2, 1, 8, 8)).mean()
    tensor(1.)
    """
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def paste_bands(x):
    """Give half of the images of (N, C, S, S) a random band of rows or columns of another image.

    CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a rectangle; a band is ours.

    >>> paste_bands(torch.ones(2, 1, 8, 8)).mean()
    tensor(1.)
    """
    N = len(x)
    side = x.shape[2]
    ends = (torch.rand(2, N, 1, device=x.device) * (side + 1)).long()
    position = torch.arange(side, device=x.device)
    band = (position >= ends[0]) & (position < ends[1])  # (N, S), empty if the ends are swapped
    is_rows = torch.rand(N, 1, 1, device=x.device) < 0.5
    mask = torch.where(is_rows, band.unsqueeze(2), band.unsqueeze(1))  # (N, S, S)
    others = (torch.rand(N, device=x.device) * N).long()
    return torch.where(mask.unsqueeze(1), x[others], x)


def blend_images(x):
    """Blend half of the images (N, C, H, W) with others of the batch, in random shares.

    Mixup with alpha = 1 (Zhang et al. 2018, arXiv:1710.09412), but the teacher labels the images,
    so that there are no labels to blend, and the other half stays as it is (ours): blended images
    have less contrast, which BatchNorms would take for the contrast of all.
    """
    N = len(x)
    is_blended = torch.rand((N, 1, 1, 1), device=x.device) < 0.5
    share = torch.rand((N, 1, 1, 1), device=x.device) * is_blended
    others = (torch.rand(N, device=x.device) * N).long()
    return torch.lerp(x, x[others], share)


def augment(x, shift=0, mirror=False, cut=False, mix=False):
    """What a student sees of images (N, C, H, W), in channels_last memory.

    Args:
        shift: most pixels that each image is moved by; 0: none is.
        mirror: whether to mirror each with probability 1/2.
        cut: whether to mix bands of other images in.
        mix: whether to blend half of them with others.
    """
    if shift:
        x = shift_images(x, shift)
    if mirror:
        x = mirror_images(x)
    if cut:
        x = paste_bands(x)
    if mix:
        x = blend_images(x)
    return x.contiguous(memory_format=torch.channels_last)


# Files
def get_image_path(folder, number):
    """Where batch `number` of a run lies."""
    return Path(folder) / f"images-{number:05d}.npz"


def list_image_files(folder):
    """The paths of a folder that get_image_path names, in the order of their numbers."""
    numbers = []
    for path in Path(folder).glob("images-*.npz"):
        digits = path.stem.removeprefix("images-")
        if re.fullmatch("[0-9]+", digits) and path == get_image_path(folder, int(digits)):
            numbers.append(int(digits))
    return [get_image_path(folder, number) for number in sorted(numbers)]


def save_images(path, images, labels):
    """Write one batch, uint8 (N, C, H, W) and (N,) on the CPU, whole or not at all."""
    pixels = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    with refuse_unwritable(path), open_atomically(path) as file:
        np.savez(file, images=pixels, labels=labels.numpy())


def read_images(path):
    """One batch: images (N, C, H, W) uint8 and labels (N,) int64."""
    with fail_in_one_line(f"{path} cannot be read", "put a whole file there"):
        check_archive(path)
        with np.load(path) as file:
            images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
            labels = torch.from_numpy(file["labels"])
    return images, labels


def read_newest_images(paths, n_images=1000):
    """The last n_images images of these files and their labels, in their order, or all of fewer."""
    batches = []
    count = 0
    for path in reversed(paths):
        images, labels = read_images(path)
        batches.insert(0, (images, labels))
        count += len(labels)
        if count >= n_images:
            break
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    return images[-n_images:], labels[-n_images:]


def check_image_files(folder, info):
    """Refuse the images of --images unless they are a finished run's and like the teacher's.

    Args:
        folder: of images-*.npz and result.json.
        info: NetworkInfo of the teacher.

    Returns:
        Paths of the batches.
    """
    with fail_in_one_line(f"--images {folder}", "pass the --out of a finished run"):
        paths = list_image_files(folder)
    if not paths or not (Path(folder) / "result.json").exists():
        problem = "no images-*.npz or no result.json there"
        fail(f"--images {folder}: {problem}; pass the --out of a finished run")
    for path in paths:
        images, labels = read_images(path)
        shape = tuple(images.shape[1:])
        if images.dtype != torch.uint8 or shape != info.image_shape:
            expected = f"expected uint8 {info.image_shape}, as the teacher's"
            fail(f"--images: {path.name}: {expected}, got {images.dtype} {shape}")
        if labels.dtype != torch.int64:
            fail(f"--images: {path.name}: expected int64 labels, got {labels.dtype}")
        if labels.shape != images.shape[:1] or len(labels) == 0:
            fail(f"--images: {path.name}: expected as many labels as images, and some of both")
        if labels.min() < 0 or labels.max() >= info.num_classes:
            fail(f"--images: {path.name}: expected labels from 0 to {info.num_classes - 1}")
    return paths
