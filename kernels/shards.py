"""A run's finished batches of images on the disk: a file a batch, and PNGs in class folders where they are wanted."""

import os
from pathlib import Path

import numpy as np
import torch

from kernels.contract import fail, one_line
from kernels.figures import save_png


class Shards:
    """images-00000.npz … of a folder: `images` uint8 (N, H, W, C) and `labels` int64 (N,), a batch each."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def paths(self):
        return sorted(self.folder.glob("images-*.npz"))

    def __len__(self):
        return len(self.paths())

    def _load(self, paths, names):
        for path in paths:
            with one_line(f"{path} cannot be read", "put a whole file there"), np.load(path) as saved:
                batch = {name: saved[name] for name in names}
            yield batch

    def read(self, paths=None):
        """All batches in their order, or those of some of their paths: images uint8 (N, C, H, W), labels (N,)."""
        for batch in self._load(self.paths() if paths is None else paths, ("images", "labels")):
            yield torch.from_numpy(batch["images"]).permute(0, 3, 1, 2), torch.from_numpy(batch["labels"])

    def n_images(self):
        return sum(len(batch["labels"]) for batch in self._load(self.paths(), ("labels",)))

    def last(self, n):
        """Images and labels of the newest batches, as many as n images need, in their order."""
        parts, count = [], 0
        for path in reversed(self.paths()):
            parts += self.read([path])
            count += len(parts[-1][1])
            if count >= n:
                break
        return tuple(torch.cat(part) for part in zip(*reversed(parts), strict=True))

    def expect(self, numbers):
        """Refuse where one of these batches has gone: what comes after it would take its place."""
        for i in numbers:
            if not (self.folder / f"images-{i:05d}.npz").exists():
                fail(f"--out {self.folder}: images-{i:05d}.npz has gone; put it back or run without --resume")

    def clear(self):
        """Delete what an earlier run made here; refuse where it was not finished: it may have taken days."""
        if len(self) > 1 and not (self.folder / "result.json").exists():
            fail(f"--out {self.folder} holds {len(self)} batches of an unfinished run; pass --resume or another --out")
        with one_line(f"--out {self.folder} cannot be used", "pass another folder"):
            for path in (*self.paths(), *self.folder.glob("images/*/[0-9]*-[0-9]*.png")):
                path.unlink()

    def write(self, number, images, labels, digits=0):
        """Write a batch, uint8 (N, C, H, W), whole or not at all; digits: of the names of its PNGs' folders, 0: none.

        ImageFolder sorts folders as strings: without leading zeros class 10 would come before class 2.
        """
        path, pixels = self.folder / f"images-{number:05d}.npz", images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        part = path.with_name(f"{path.name}.part")
        with open(part, "wb") as file:
            np.savez(file, images=pixels, labels=labels.numpy())
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that counts it is on the disk, too
        os.replace(part, path)
        for i, k in enumerate(labels.tolist() if digits else []):
            save_png(images[i], self.folder / "images" / f"{k:0{digits}d}" / f"{number:05d}-{i:03d}.png")


def given_shards(args, info):
    """The Shards of --images, a finished run of images like the teacher's; empty where there is no --images.

    Args:
        args: the script's; read are images and out.
        info: of load_network, the teacher: channels, image size and number of classes.
    """
    shards = Shards(args.images or os.devnull)
    if not args.images:
        return shards
    if not len(shards) or not (shards.folder / "result.json").exists():
        fail(f"--images {args.images}: no images-*.npz or no result.json there; pass the --out of a finished run")
    if shards.folder.resolve() == Path(args.out).resolve():
        fail(f"--images {args.images}: this is --out, whose images a new run deletes; pass another --out")
    for path, (images, labels) in zip(shards.paths(), shards.read(), strict=True):
        ours, theirs = (info.shape[0], info.image_size, info.image_size), tuple(images.shape[1:])
        if images.dtype != torch.uint8 or theirs != ours:
            fail(f"--images: {path.name}: expected uint8 {ours}, as the teacher's, got {images.dtype} {theirs}")
        if not 0 <= labels.min() <= labels.max() < info.num_classes or len(labels) != len(images):
            fail(f"--images: {path.name}: expected as many labels, below {info.num_classes}, as images")
    return shards


def wanted_labels(classes, n_classes, n_batches, batch_size, seed):
    """Labels (n_batches, batch_size): the classes in turn, all of them where none are named.

    Where a batch cannot hold them all, each takes the next ones of a random order. Batches are whole, for their size
    is part of a method that matches their moments.

    >>> wanted_labels((), 4, 2, 6, seed=0).tolist()
    [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]
    """
    if not all(0 <= k < n_classes for k in classes):
        fail(f"--classes: expected numbers from 0 to {n_classes - 1}, got {classes}")
    classes, n = torch.tensor(classes or range(n_classes)), n_batches * batch_size
    if len(classes) > batch_size:
        classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))]
    return classes.repeat(-(-n // len(classes)))[:n].view(n_batches, batch_size)
