"""Real images from the data sets' official files, and what a network says of images.

Test images only measure. What trains on real images, of the training split, says so: README.md.
"""

import functools
import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness import ROOT
from harness.errors import fail, fail_in_one_line
from harness.files import check_regular

CLASS_NAMES = {
    "cifar10": [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ],
}


def list_class_names(dataset):
    """The names of a data set's classes in their order; [] if they are only numbers."""
    if dataset != "imagenet":
        return CLASS_NAMES.get(dataset, [])
    path = ROOT / "teachers/imagenet_classes.txt"
    if not path.exists():  # a script was copied alone
        return []
    return path.read_text().splitlines()


MNIST_IMAGES = "{}-images-idx3-ubyte.gz"
MNIST_LABELS = "{}-labels-idx1-ubyte.gz"

N_CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
# Mean and standard deviation of the training split's pixels in [0, 1], with MNIST padded and digits
# enlarged to 32 px.
PIXELS = {
    "digits": dict(mean=(0.3054,), std=(0.3237,)),
    "mnist": dict(mean=(0.1000,), std=(0.2752,)),
    "cifar10": dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
}
# How networks are augmented that learn from real images.
CROP_PADDING = {"digits": 2, "mnist": 2, "cifar10": 4, "cifar100": 4}  # pixels on each side
MIRRORED = ("cifar10", "cifar100")  # a mirrored digit is another sign

# The official files of each data set: folder, and the files of each split.
FOLDERS = {
    "mnist": "mnist",
    "cifar10": "cifar-10-batches-bin",
    "cifar100": "cifar-100-binary",
}
FILES = {
    "mnist": {
        "train": [MNIST_IMAGES.format("train"), MNIST_LABELS.format("train")],
        "test": [MNIST_IMAGES.format("t10k"), MNIST_LABELS.format("t10k")],
    },
    "cifar10": {
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["test_batch.bin"],
    },
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}


def load_digits(split):
    """scikit-learn's 1,797 embedded digits, enlarged from 8 to 32 px.

    360 of them, drawn once, are the test split.
    """
    from sklearn.datasets import load_digits as load_embedded_digits
    from sklearn.model_selection import train_test_split

    x, y = load_embedded_digits(return_X_y=True)  # (1797, 64) in 0..16
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=360, random_state=0, stratify=y
    )
    x = train_x if split == "train" else test_x
    y = train_y if split == "train" else test_y
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return images.round().to(torch.uint8), torch.from_numpy(y.astype(np.int64))


def read_idx(path, sizes):
    """The bytes of a gzipped IDX file, (n, *sizes) uint8.

    Its header: two zeros, 8 for bytes, the number of dimensions, then their sizes in 4 bytes each.
    """
    check_regular(path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    n_dims = 1 + len(sizes)
    start = 4 + 4 * n_dims
    if raw[:4] != bytes((0, 0, 8, n_dims)) or len(raw) < start:
        raise ValueError(f"{path.name}: no IDX file of bytes in {n_dims} dimensions")
    shape = tuple(np.frombuffer(raw[4:start], dtype=">i4").tolist())
    if shape[1:] != sizes or math.prod(shape) != len(raw) - start:
        raise ValueError(f"{path.name}: {len(raw) - start} bytes, its header says {shape}")
    return torch.frombuffer(raw[start:], dtype=torch.uint8).view(shape)


def load_mnist(folder, split):
    """MNIST, zero-padded from 28 to 32 px."""
    images_name, labels_name = FILES["mnist"][split]
    images = read_idx(folder / images_name, (28, 28)).unsqueeze(1)  # (n, 1, 28, 28)
    labels = read_idx(folder / labels_name, ())
    if len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels of {len(images)} images")
    return F.pad(images, (2, 2, 2, 2)), labels.long()


def load_cifar(folder, dataset, split):
    """CIFAR's binary files: records of a label (CIFAR-100: two, the second counts) and an image."""
    n_labels = 1 if dataset == "cifar10" else 2
    size = n_labels + 3072
    parts = []
    for name in FILES[dataset][split]:
        check_regular(folder / name)
        raw = bytearray((folder / name).read_bytes())
        if not raw or len(raw) % size:
            raise ValueError(f"{name}: expected records of {size} bytes, got {len(raw)} bytes")
        parts.append(torch.frombuffer(raw, dtype=torch.uint8).view(-1, size))
    records = torch.cat(parts)
    images = records[:, n_labels:].reshape(-1, 3, 32, 32)
    return images, records[:, n_labels - 1].long()


def load_dataset(dataset, data_dir, split):
    """A data set in memory.

    Args:
        dataset: digits | mnist | cifar10 | cifar100.
        data_dir: folder that holds the official files' folders.
        split: train | test.

    Returns:
        Images (N, C, 32, 32) uint8 and labels (N,) int64, on the CPU.
    """
    if dataset == "digits":
        return load_digits(split)
    folder = Path(data_dir) / FOLDERS[dataset]
    command = f"python teacher.py --dataset {dataset} --data-dir {data_dir}"
    advice = f"check --data-dir; {command} fetches what is missing or was deleted"
    with fail_in_one_line(f"{folder} cannot be read", advice):
        if dataset == "mnist":
            images, labels = load_mnist(folder, split)
        else:
            images, labels = load_cifar(folder, dataset, split)
        last_class = N_CLASSES[dataset] - 1
        if labels.max() > last_class:
            raise ValueError(f"expected labels from 0 to {last_class}, got {labels.max()}")
    return images, labels


def load_real_images(info, args, device, split="test"):
    """The real images that measure a method, if there are any.

    Args:
        info: NetworkInfo of the teacher.
        args: TeacherOptions with data_dir; read are dataset (auto: the teacher's own) and data_dir.
        device: where the images go.
        split: train | test.

    Returns:
        The data set's name and (images, labels); ("none", None) where there are none.
    """
    dataset = info.dataset if args.dataset == "auto" else args.dataset
    if dataset not in N_CLASSES:  # such as ImageNet, whose validation split is no single file
        return "none", None
    images, labels = load_dataset(dataset, args.data_dir, split)
    fits = images.shape[1:] == info.image_shape and labels.max() < info.num_classes
    if not fits:
        problem = "its images or classes do not fit the teacher"
        fail(f"--dataset {dataset}: {problem}; choose another, or none")
    return dataset, (images.to(device), labels.to(device))


@functools.cache
def make_constant(values, device):
    """One number a channel as a tensor (1, C, 1, 1), kept: a copy makes the host wait for a GPU."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def normalise(images, info):
    """uint8 pixels (N, C, H, W) -> float32 in a network's normalised units; info: NetworkInfo."""
    mean = make_constant(info.mean, images.device)
    std = make_constant(info.std, images.device)
    return images.float() * (1 / (255 * std)) - mean / std


@torch.no_grad()
def predict(network, images, info, batch_size=500):
    """The classes (N,) that a network in eval mode assigns to images (N, C, H, W) uint8."""
    device = next(network.parameters()).device
    parts = []
    for part in images.split(batch_size):
        x = normalise(part.to(device), info).contiguous(memory_format=torch.channels_last)
        parts.append(network(x).argmax(1))
    return torch.cat(parts)


def evaluate(network, images, labels, info, batch_size=500):
    """Top-1 accuracy in percent, in eval mode; the network's mode is restored.

    Args:
        network: classifier.
        images, labels: (N, C, H, W) uint8 and (N,) int64.
        info: NetworkInfo whose mean and std the images are normalised with.
        batch_size: images at a time.
    """
    was_training = network.training
    network.eval()
    predicted = predict(network, images, info, batch_size)
    network.train(was_training)
    n_correct = (predicted == labels.to(predicted.device)).sum()
    return 100 * n_correct.item() / len(images)
