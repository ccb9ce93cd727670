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

    def read(self, n=None):
        """The (first n) batches in their order: images uint8 (N, C, H, W), labels (N,)."""
        for path in self.paths()[:n]:
            with one_line(f"{path} cannot be read", "delete what it belongs to and run anew"), np.load(path) as saved:
                batch = torch.from_numpy(saved["images"]).permute(0, 3, 1, 2), torch.from_numpy(saved["labels"])
            yield batch

    def n_images(self):
        """In all batches, which are as large as the first."""
        return len(self) * len(next(self.read(1), ((), ()))[1])

    def first(self, n):
        """Images and labels of the first batches, as many as n images need."""
        parts, count = [], 0
        for images, labels in self.read():
            parts.append((images, labels))
            count += len(labels)
            if count >= n:
                break
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

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
