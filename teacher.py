"""Train, evaluate and export the classifiers that the data-free methods take as teachers.

A teacher is an ordinary network trained on labelled images; everything else in this repository sees only its
weights. The recipe is plain: SGD with Nesterov momentum, a triangular learning rate, random crops (and flips for
natural images), cross-entropy on hard labels. No label smoothing and no mixup: both change what a teacher's logits
say about the wrong classes, which is the very thing that distillation reads.

    python teacher.py --dataset cifar10 --arch resnet20 --epochs 18 --data-dir data

Shipped teachers, their accuracies and commands: teachers/README.md.

Networks are the field's standard pairs: LeNet-5 and its half (LeCun et al. 1998; no BatchNorm), the three-stage
CIFAR ResNets (He et al. 2015, arXiv:1512.03385, section 4.2; parameter-free "option A" shortcuts), ResNet-18/34 in
the four-stage CIFAR layout (3x3 stem, no max-pool) of DAFL and DeepInversion, VGG-11 with BatchNorm (Simonyan &
Zisserman 2014, one linear layer on top), WRN-d-k (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

A checkpoint (`teacher.pt`) is pickle-free and self-describing: weights in fp16 (BatchNorm in fp32), architecture,
classes, channels, image size, mean and std of the normalisation, accuracy of exactly these rounded weights, command.

Metrics (`metrics.jsonl`): `train/loss` mean cross-entropy of the epoch, `train/acc` and `eval/acc` in percent, `lr`.
"""

import hashlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tarfile
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from kernels.contract import fail, one_line
from kernels.data import FILES, load_dataset


@dataclass
class Args:
    # Run settings.
    dataset: str = "digits"
    """digits (embedded) | mnist | cifar10 | cifar100."""
    arch: str = "resnet8"
    """A network function of this file: lenet5(_half), resnet8/20/32/44/56, resnet18_cifar, vgg11_bn, wrn_16_1 …"""
    data_dir: str = "data"
    """Folder with the data set (mnist/*.gz, cifar-10-batches-bin/*.bin); what is missing is downloaded into it."""
    data_note: str = ""
    """Recorded in the checkpoint when the files are not the official ones, e.g. 'JPEG copy of CIFAR-10'."""
    out: str = ""
    """Output folder; default runs/teacher/DATASET-ARCH."""
    seed: int = 0
    """Seeds python, numpy and torch."""
    device: str = "auto"
    """auto | cpu | cuda."""
    resume: bool = False
    """Continue from checkpoint.pt of the output folder."""
    smoke: bool = False
    """A run of seconds: one epoch on 512 images."""
    compile: bool = False
    """torch.compile the network on a CPU too (needs a C++ compiler); on a GPU it always is."""
    evaluate: str = ""
    """Only measure this teacher.pt on the test split of --dataset."""
    export: str = ""
    """Also ship the result as teachers/NAME.pt and record its SHA-256 in teachers/index.json."""

    # Training.
    epochs: int = 20
    """Passes over the training split."""
    batch_size: int = 128
    """Images per step (DAFL recipe: 128)."""
    lr: float = 0.2
    """Peak learning rate (ours; short schedules like more than DAFL's 0.1)."""
    warmup: float = 0.2
    """Fraction of all steps over which the learning rate rises linearly; then it falls linearly to zero (ours)."""
    momentum: float = 0.9
    """Nesterov momentum (DAFL recipe)."""
    weight_decay: float = 5e-4
    """L2 penalty on all weights (DAFL recipe)."""


# Data

# Per data set: classes, channels, padding of the random crop, mirrored or not, and mean and standard deviation of the
# training split's pixels in [0, 1] (MNIST padded to 32 px, digits enlarged to it).
DATASETS = {
    "digits": dict(num_classes=10, channels=1, pad=2, flip=False, mean=(0.3054,), std=(0.3237,)),
    "mnist": dict(num_classes=10, channels=1, pad=2, flip=False, mean=(0.1000,), std=(0.2752,)),
    "cifar10": dict(
        num_classes=10, channels=3, pad=4, flip=True, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": dict(
        num_classes=100, channels=3, pad=4, flip=True, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
}
# Official addresses and the MD5 sums published beside them.
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}


def download(url, path):
    """Fetch `url` into `path` atomically and compare its MD5; one clear line when there is no network."""
    md5 = MD5[path.name]
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
            while chunk := reply.read(1 << 20):
                file.write(chunk)
    except OSError as error:
        if part.exists():
            part.unlink()
        fail(f"{path} is missing and {url} cannot be fetched ({error}); download it by hand or pass --data-dir")
    if (got := hashlib.md5(part.read_bytes()).hexdigest()) != md5:
        part.unlink()
        fail(f"{url}: expected MD5 {md5}, got {got}; try again or download it by hand to {path}")
    os.replace(part, path)


def fetch(dataset, data_dir):
    """Download what is missing of a data set's official files into `data_dir`."""
    if dataset == "digits":
        return
    folder, train_files, test_files, _ = FILES[dataset]
    root = Path(data_dir)
    missing = [name for name in (*train_files, *test_files) if not (root / folder / name).exists()]
    if dataset == "mnist":
        for name in missing:
            download(MNIST_URL + name, root / folder / name)
    elif missing:
        archive = root / f"cifar-{dataset[5:]}-binary.tar.gz"
        if not archive.exists():
            download(CIFAR_URL + archive.name, archive)
        with one_line(f"{archive} cannot be unpacked", "delete it and run again"), tarfile.open(archive) as tar:
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in missing:  # only the members we know, never the archive's own paths
                (root / folder / name).write_bytes(tar.extractfile(f"{folder}/{name}").read())


def normalise(x, mean, std):
    """uint8 (N, C, H, W) -> float32 in units of the data set's standard deviation; mean, std: C numbers in [0, 1]."""
    mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return x.float() * (1 / (255 * std)) - mean / std


def augment(x, pad, flip, generator):
    """Random crop of the zero-padded images and random mirror, one gather for the whole batch.

    x: (N, C, H, W) uint8; returns the same shape in channels_last memory. The generator lives on x's device.
    """
    N, _, H, W = x.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, N), generator=generator, device=x.device)
    rows = top[:, None] + torch.arange(H, device=x.device)  # (N, H)
    cols = left[:, None] + torch.arange(W, device=x.device)  # (N, W)
    if flip:
        mirrored = torch.rand(N, generator=generator, device=x.device) < 0.5
        cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    padded = F.pad(x, (pad, pad, pad, pad))
    n = torch.arange(N, device=x.device)[:, None, None]
    return padded[n, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # gathered as (N, H, W, C)


# Networks. `forward_groups` returns (logits, activations) with the maps that attention transfer compares.


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling for 32 px (62,006 parameters at 3 channels); `width` 0.5 is its half.

    Groups are the two convolutions after ReLU; `features` is the 120-vector that PRE-DFKD's activation term reads.
    """

    def __init__(self, num_classes=10, in_channels=3, width=1.0):
        super().__init__()
        c1, c2, c3, f1 = (int(c * width) for c in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, f1)
        self.fc2 = nn.Linear(f1, num_classes)

    def forward_groups(self, x):
        a1 = F.relu(self.conv1(x))  # (N, 6, 28, 28)
        a2 = F.relu(self.conv2(F.max_pool2d(a1, 2)))  # (N, 16, 10, 10)
        features = F.relu(self.conv3(F.max_pool2d(a2, 2))).flatten(1)  # (N, 120)
        return self.fc2(F.relu(self.fc1(features))), (a1, a2)

    def forward(self, x):
        return self.forward_groups(x)[0]


# Copied from deepinversion.py
class ResBlock(nn.Module):
    """Residual block (He et al. 2015): two 3x3 convolutions, or as a bottleneck 1x1, 3x3, 1x1 to 4x channels.

    Shortcut `option` A: strided subsampling and zero channels, no parameters; B: 1x1 convolution with BatchNorm.
    """

    def __init__(self, in_channels, channels, stride, option, bottleneck):
        super().__init__()
        wide = 4 * channels if bottleneck else channels
        basic_convs = [(channels, 3, stride), (wide, 3, 1)]  # width, kernel, stride
        convs = [(channels, 1, 1), (channels, 3, stride), (wide, 1, 1)] if bottleneck else basic_convs
        c = in_channels
        for i, (width, kernel, step) in enumerate(convs, 1):
            setattr(self, f"conv{i}", nn.Conv2d(c, width, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            c = width
        self.bottleneck, self.stride, self.new_channels = bottleneck, stride, wide - in_channels
        self.downsample = None
        if option == "B" and (stride != 1 or self.new_channels):
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x)


# Copied from deepinversion.py
class ResNet(nn.Module):
    """ResNet with torchvision's parameter names, stride in the 3x3 convolution ("v1.5").

    `imagenet`: 7x7 stem of stride 2 and max-pool; otherwise the 3x3 stem of CIFAR. Groups are the stages' outputs.
    """

    def __init__(self, blocks, widths, option, bottleneck=False, imagenet=False, num_classes=10, in_channels=3):
        super().__init__()
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.imagenet, self.n_stages = imagenet, len(widths)
        c = widths[0]
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for j in range(n):
                stage.append(ResBlock(c, width, 2 if i > 1 and j == 0 else 1, option, bottleneck))
                c = 4 * width if bottleneck else width
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.fc = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward_groups(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        groups = []
        for i in range(1, self.n_stages + 1):
            x = getattr(self, f"layer{i}")(x)
            groups.append(x)
        return self.fc(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


class VGG(nn.Module):
    """VGG with BatchNorm for 32 px and one linear layer on top; "M" is a 2x2 max-pool. Groups precede each pool."""

    def __init__(self, layout, num_classes=10, in_channels=3):
        super().__init__()
        layers, c = [], in_channels
        for width in layout:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                c = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(c, num_classes)

    def forward_groups(self, x):
        groups = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                groups.append(x)
            x = layer(x)
        return self.classifier(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


class WideBlock(nn.Module):
    """Pre-activation block; the 1x1 shortcut, where channels change, reads the BN-ReLU'd input."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (x if self.shortcut is None else self.shortcut(a))


class WideResNet(nn.Module):
    """WRN-d-k: three groups of (d - 4) / 6 pre-activation blocks, widths 16k, 32k, 64k.

    Groups are the raw residual sums, before the next BatchNorm, as attention transfer takes them.
    """

    def __init__(self, depth, k, num_classes=10, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        c = 16
        for i, width in enumerate((16 * k, 32 * k, 64 * k), 1):
            stage = []
            for j in range((depth - 4) // 6):
                stage.append(WideBlock(c, width, 2 if i > 1 and j == 0 else 1))
                c = width
            setattr(self, f"block{i}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(c)
        self.linear = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward_groups(self, x):
        a1 = self.block1(self.conv1(x))  # (N, 16k, H, W)
        a2 = self.block2(a1)  # (N, 32k, H/2, W/2)
        a3 = self.block3(a2)  # (N, 64k, H/4, W/4)
        return self.linear(F.relu(self.bn(a3)).mean((2, 3))), (a1, a2, a3)

    def forward(self, x):
        return self.forward_groups(x)[0]


# Each takes (num_classes=10, in_channels=3) by keyword.
lenet5 = LeNet5
lenet5_half = partial(LeNet5, width=0.5)
resnet8, resnet20, resnet32, resnet44, resnet56 = (
    partial(ResNet, (n, n, n), (16, 32, 64), "A") for n in (1, 3, 5, 7, 9)
)
resnet18_cifar = partial(ResNet, (2, 2, 2, 2), (64, 128, 256, 512), "B")
resnet34_cifar = partial(ResNet, (3, 4, 6, 3), (64, 128, 256, 512), "B")
vgg11_bn = partial(VGG, (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"))
wrn_16_1 = partial(WideResNet, 16, 1)
wrn_16_2 = partial(WideResNet, 16, 2)
wrn_40_1 = partial(WideResNet, 40, 1)
wrn_40_2 = partial(WideResNet, 40, 2)
names = "lenet5 lenet5_half resnet8 resnet20 resnet32 resnet44 resnet56 resnet18_cifar resnet34_cifar vgg11_bn"
ARCHS = {name: globals()[name] for name in [*names.split(), "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"]}


# Training


@torch.no_grad()
def evaluate(model, images, labels, mean, std, batch_size=500):
    """Top-1 accuracy in percent, eval mode. images: (N, C, H, W) uint8, labels: (N,)."""
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for i in range(0, len(images), batch_size):
        x = normalise(images[i : i + batch_size], mean, std).contiguous(memory_format=torch.channels_last)
        correct += (model(x).argmax(1) == labels[i : i + batch_size]).sum()
    model.train(was_training)
    return 100 * correct.item() / len(images)


def train_epoch(model, optimizer, schedule, images, labels, info, generator, args, bar):
    """One pass; returns (mean loss, accuracy in percent). The host waits for the device once, at the end."""
    model.train()
    mean, std = (torch.tensor(info[k], device=images.device) for k in ("mean", "std"))
    order = torch.randperm(len(images), generator=generator, device=images.device)
    n_steps = len(images) // args.batch_size  # the short last batch is dropped: it would disturb the moments
    total_loss = torch.zeros((), device=images.device)
    total_correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for i in range(n_steps):
        index = order[i * args.batch_size : (i + 1) * args.batch_size]
        x = normalise(augment(images[index], info["pad"], info["flip"], generator), mean, std)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            logits = model(x)
            loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total_loss += loss.detach()
        total_correct += (logits.detach().argmax(1) == labels[index]).sum()
        bar.update()
        if not bar.disable and i % 50 == 49:  # the only other sync: a live figure every 50 steps
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{schedule.get_last_lr()[0]:.3f}")
    return total_loss.item() / n_steps, 100 * total_correct.item() / (n_steps * args.batch_size)


def atomic_save(state, path):
    """torch.save through a temporary file and rename: a reader never sees half a checkpoint."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def exported(model):
    """State dict with convolutions and linear layers in fp16; BatchNorm stays fp32: its moments are targets."""
    keep = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    state = {}
    for key, value in model.state_dict().items():
        half = value.is_floating_point() and key.rpartition(".")[0] not in keep
        state[key] = (value.half() if half else value).cpu().clone()
    return state


def load_export(path):
    """Read a `teacher.pt`; returns (model in eval mode, checkpoint dict)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError("not a dict")
        model = ARCHS[saved["arch"]](num_classes=saved["num_classes"], in_channels=saved["channels"])
        model.load_state_dict(saved["state_dict"])
    except Exception as error:  # noqa: BLE001 - whatever a broken file raises, the user gets one line
        fail(f"{path}: not a checkpoint of teacher.py ({type(error).__name__}); train one with --out DIR")
    return model.eval(), saved


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1) + "\n")


def ship(path, name):
    """Copy a `teacher.pt` to teachers/NAME.pt beside this file; record its SHA-256 and figures in index.json."""
    folder = Path(__file__).parent / "teachers"
    saved = torch.load(path, map_location="cpu", weights_only=True)
    blob = Path(path).read_bytes()
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pt").write_bytes(blob)
    index = json.loads((folder / "index.json").read_text()) if (folder / "index.json").exists() else {}
    entry = {key: value for key, value in saved.items() if key != "state_dict"}
    index[name] = dict(sha256=hashlib.sha256(blob).hexdigest(), **entry)
    write_json(folder / "index.json", dict(sorted(index.items())))
    print(f"shipped teachers/{name}.pt, {len(blob):,} bytes")


def versions():
    """Versions and the commit that a figure was measured with."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return dict(python=platform.python_version(), torch=str(torch.__version__), commit=commit or "unknown")


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    if args.dataset not in DATASETS:
        fail(f"--dataset: expected one of {', '.join(DATASETS)}, got {args.dataset!r}")
    if args.arch not in ARCHS:
        fail(f"--arch: expected one of {', '.join(ARCHS)}, got {args.arch!r}")
    for name in ("epochs", "batch_size", "lr", "momentum"):
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(args, name)}")
    if not args.weight_decay >= 0:
        fail(f"--weight-decay: expected at least 0, got {args.weight_decay}")
    if args.device not in ("auto", "cpu", "cuda"):
        fail(f"--device: expected auto, cpu or cuda, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible; use --device cpu")


def main(args):
    check_args(args)
    if args.smoke:
        args.epochs, args.batch_size = 1, 64
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - the legacy stream is what foreign code would draw from
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # data order and augmentation
    info = DATASETS[args.dataset]
    mean, std = info["mean"], info["std"]

    fetch(args.dataset, args.data_dir)
    test_images, test_labels = (t.to(device) for t in load_dataset(args.dataset, args.data_dir, "test"))
    if args.evaluate:
        model, saved = load_export(args.evaluate)
        if (saved["num_classes"], saved["channels"]) != (info["num_classes"], info["channels"]):
            fail(f"{args.evaluate}: made for {saved.get('dataset')}, not for --dataset {args.dataset}")
        how = saved.get("mean", mean), saved.get("std", std)
        print(f"{evaluate(model.to(device), test_images, test_labels, *how):.2f} %")
        if args.export:
            ship(args.evaluate, args.export)
        return
    images, labels = (t.to(device) for t in load_dataset(args.dataset, args.data_dir, "train"))
    if args.smoke:
        images, labels = images[:512], labels[:512]
    if args.batch_size > len(images):
        fail(f"--batch-size: expected at most the {len(images)} training images, got {args.batch_size}")

    out = Path(args.out or f"runs/teacher/{args.dataset}-{args.arch}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not args.resume:  # what an earlier run left here must not be continued as if it were this one
            (out / "checkpoint.pt").unlink(missing_ok=True)
        write_json(out / "args.json", asdict(args))
    except OSError as error:
        fail(f"--out {out}: cannot be written ({error}); pass another folder")
    model = ARCHS[args.arch](num_classes=info["num_classes"], in_channels=info["channels"]).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=True, foreach=True
    )
    n_steps = args.epochs * (len(images) // args.batch_size)
    rise = max(1, round(args.warmup * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (n_steps - step) / max(1, n_steps - rise))
    )
    first_epoch, seconds_before, lines = 0, 0.0, []
    if args.resume and (out / "checkpoint.pt").exists():
        try:
            state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"].cpu())
            first_epoch, seconds_before, lines = state["epoch"], state["seconds"], state["lines"]
        except Exception as error:  # noqa: BLE001 - damaged, or of another network
            fail(f"--resume: {out / 'checkpoint.pt'} does not fit this run ({type(error).__name__}); start afresh")
    network = torch.compile(model) if args.compile or device == "cuda" else model

    start, ran_with = time.time(), versions()  # now: the files may change while this runs
    bar = tqdm(total=n_steps, initial=first_epoch * (n_steps // args.epochs), disable=None, mininterval=1)
    for epoch in range(first_epoch, args.epochs):
        loss, accuracy = train_epoch(network, optimizer, schedule, images, labels, info, generator, args, bar)
        row = {"epoch": epoch + 1, "train/loss": loss, "train/acc": accuracy, "lr": schedule.get_last_lr()[0]}
        if not np.isfinite(loss):
            fail(f"the loss is {loss} in epoch {epoch + 1}; lower --lr (last good state: {out / 'checkpoint.pt'})")
        if (epoch + 1) % 5 == 0:
            row["eval/acc"] = evaluate(model, test_images, test_labels, mean, std)
        row["seconds"] = seconds_before + time.time() - start
        tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
        lines.append(json.dumps(row) + "\n")
        (out / "metrics.jsonl").write_text("".join(lines))
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
        state.update(generator=generator.get_state(), epoch=epoch + 1, seconds=row["seconds"], lines=lines)
        atomic_save(state, out / "checkpoint.pt")
    bar.close()

    # The accuracy that counts is that of the rounded weights which are shipped.
    rounded = exported(model)
    model.load_state_dict(rounded)
    accuracy = evaluate(model, test_images, test_labels, mean, std)
    seconds = round(seconds_before + time.time() - start, 1)
    command = "python teacher.py " + shlex.join(sys.argv[1:])
    saved = dict(format=1, arch=args.arch, dataset=args.dataset, data=args.data_note or args.dataset, command=command)
    saved.update(num_classes=info["num_classes"], channels=info["channels"], image_size=32, mean=mean, std=std)
    saved.update(accuracy=accuracy, seed=args.seed, seconds=seconds, versions=ran_with, state_dict=rounded)
    atomic_save(saved, out / "teacher.pt")
    result = {key: value for key, value in saved.items() if key != "state_dict"}
    write_json(out / "result.json", dict(result, teacher_accuracy=accuracy, student_accuracy=None, device=device))
    print(f"test accuracy {accuracy:.2f} % (final iterate, fp16 weights); wrote {out / 'teacher.pt'}")
    if args.export:
        ship(out / "teacher.pt", args.export)


if __name__ == "__main__":
    main(tyro.cli(Args))
