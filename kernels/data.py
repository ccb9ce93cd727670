"""Images as bytes and in a network's units; the real ones that measure students: official files, read only."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kernels.contract import fail, one_line


def pixel_range(info, device):
    """Real pixels, 0 to 1, in a network's normalised units: (low, high), (1, C, 1, 1) each; asymmetric about 0."""
    bounds = [[(pixel - m) / s for m, s in zip(info.mean, info.std, strict=True)] for pixel in (0.0, 1.0)]
    return torch.tensor(bounds, device=device).view(2, 1, -1, 1, 1)


def to_uint8(x, info):
    """Normalised (N, C, H, W) float -> (N, C, H, W) uint8 pixels."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (info.mean, info.std))
    return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


# Official files: folder, training files, test files, bytes of labels before each image (the last one counts).
FILES = {
    "mnist": ("mnist", *([f"{s}-images-idx3-ubyte.gz", f"{s}-labels-idx1-ubyte.gz"] for s in ("train", "t10k")), 0),
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),
}


CIFAR10 = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
CLASS_NAMES = {"cifar10": dict(enumerate(CIFAR10))}


def load_digits(split):
    """scikit-learn's 1,797 embedded digits, 8 px enlarged to 32 px; 360 of them, drawn once, are the test split."""
    from sklearn.datasets import load_digits as embedded_digits
    from sklearn.model_selection import train_test_split

    x, y = embedded_digits(return_X_y=True)  # (1797, 64) in 0..16
    parts = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    x = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    return x.round().to(torch.uint8), torch.from_numpy(y.astype(np.int64))


def load_dataset(dataset, data_dir, split):
    """Returns images (N, C, 32, 32) uint8 and labels (N,) int64 of the `train` or `test` split, on the CPU."""
    if dataset == "digits":
        return load_digits(split)
    folder, train_files, test_files, n_labels = FILES[dataset]
    parts, command = [], f"python teacher.py --dataset {dataset} --data-dir {data_dir}"
    for name in train_files if split == "train" else test_files:
        path = Path(data_dir) / folder / name
        header, width = (8, 1) if "labels" in name else (16, 784) if dataset == "mnist" else (0, n_labels + 3072)
        with one_line(f"{path} cannot be read", f"check --data-dir; {command} fetches what is missing or was deleted"):
            raw = gzip.decompress(path.read_bytes()) if header else path.read_bytes()
            parts.append(torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(-1, width))
            if width == 1 and len(parts[0]) != len(parts[1]):
                raise ValueError(f"{len(parts[1])} labels of {len(parts[0])} images")
    if dataset == "mnist":  # zero-padded from 28 px
        return F.pad(parts[0].view(-1, 1, 28, 28), (2, 2, 2, 2)), parts[1][:, 0].long()
    records = torch.cat(parts)
    return records[:, n_labels:].reshape(-1, 3, 32, 32), records[:, n_labels - 1].long()


def real_images(teacher, args, split="test"):
    """The real images that measure a method, if there are any.

    Args:
        teacher: of load_network: its dataset, image shape and number of classes.
        args: the script's; read are dataset (auto: the teacher's own), data_dir and device.
        split: train or test.

    Returns:
        The data set's name, "none" where there is none, and (images, labels) on the device, None where there is none.
    """
    known = teacher.dataset if teacher.dataset in ("digits", *FILES) else "none"
    dataset = known if args.dataset == "auto" else args.dataset
    if dataset not in ("digits", *FILES):  # such as ImageNet, whose validation split is no single file
        return "none", None
    images, labels = load_dataset(dataset, args.data_dir, split)
    if images.shape[1:3] != teacher.shape[:2] or labels.max() >= teacher.num_classes:
        fail(f"--dataset {dataset}: its images or classes do not fit the teacher; choose another, or none")
    return dataset, (images.to(args.device), labels.to(args.device))
