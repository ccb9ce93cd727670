"""Train, evaluate and export the classifiers that the methods take as teachers and verifiers.

The recipe is plain: cross-entropy on labelled images, SGD with Nesterov momentum, a learning rate
that rises and falls linearly, random crops, and random mirroring of natural images. There is
neither label smoothing nor mixup, because both change what the logits say about the wrong classes,
and that is what distillation reads.

    python teacher.py --dataset cifar10 --arch resnet20 --epochs 18 --data-dir data

writes runs/teacher/cifar10-resnet20/: teacher.pt, metrics.jsonl, result.json, checkpoint.pt. What
is missing of the data set's official files is downloaded. With `--classes 0 1 2 3 4` the network
has these classes alone, and continual.py adds others. The shipped teachers, their accuracies and
their commands are listed in teachers/README.md.

teacher.pt holds the weights in fp16 (BatchNorm in fp32) and describes itself: network, classes,
channels, image size, mean and std of the normalisation, accuracy of exactly these weights, command.

Metrics: train/loss is the mean cross-entropy of an epoch; train/acc and eval/acc are top-1
accuracies in percent, of the augmented training images and of the test split; lr is the learning
rate of the next step. On a GPU activations are in bfloat16.
"""

import hashlib
import json
import math
import shlex
import sys
import tarfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from harness import ROOT
from harness.data import (
    CROP_PADDING,
    FILES,
    FOLDERS,
    MIRRORED,
    N_CLASSES,
    PIXELS,
    evaluate,
    load_dataset,
    normalise,
)
from harness.errors import fail, fail_in_one_line, refuse_misfits
from harness.files import check_regular, encode_json, open_atomically, read_checkpoint
from harness.known import describe, make_info
from harness.load import build_network, load_trained
from harness.networks import IMAGENET_NETWORKS, NETWORKS
from harness.run import (
    RunFolder,
    RunOptions,
    autocast,
    check_at_least,
    choose_device,
    describe_machine,
    parse_args,
    restore_optimizer,
    seed_everything,
)

# Networks for images of 32 px: all but those of ImageNet.
ARCHS = [name for name in NETWORKS if name not in IMAGENET_NETWORKS]
EVAL_EVERY = 5  # epochs
N_SMOKE_IMAGES = 512


@dataclass
class Args(RunOptions):
    """Options of teacher.py. The names of the networks stand in harness/networks.py."""

    # Run settings.
    out: str = ""
    """Output folder; empty: runs/teacher/DATASET-ARCH, of some classes DATASET-ARCH-0-1-2."""
    dataset: Literal["digits", "mnist", "cifar10", "cifar100"] = "digits"
    """Labelled images. digits come with scikit-learn; the others lie in --data-dir."""
    classes: tuple[int, ...] = ()
    """Classes to train on, in rising order, which is that of the outputs; empty: all."""
    arch: str = "resnet8"
    """Network to train: lenet5, resnet8, resnet20, resnet34_cifar, vgg11_bn, wrn_16_1 …"""
    data_note: str = ""
    """What teacher.pt says of files that are not the official ones: JPEG copy of CIFAR-10."""
    compile: bool = False
    """torch.compile the network on a CPU too (needs a C++ compiler). On a GPU it always is."""
    evaluate: str = ""
    """Train nothing: measure this teacher.pt on the test split of --dataset."""
    export: str = ""
    """Also copy the result to teachers/NAME.pt and describe it in teachers/index.json."""

    # Training.
    epochs: int = 20
    """Passes over the training split (ours)."""
    batch_size: int = 128
    """Images a step (DAFL's recipe)."""
    lr: float = 0.2
    """Peak learning rate (ours: short schedules need more than DAFL's 0.1)."""
    warmup: float = 0.2
    """Share of all steps over which the learning rate rises; then it falls to zero (ours)."""
    momentum: float = 0.9
    """Nesterov momentum (DAFL's recipe)."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters (DAFL's recipe)."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, self, "epochs", "batch_size")
        check_at_least(0, self, "weight_decay")
        if self.classes:
            self.check_classes()
        if self.arch not in ARCHS:
            raise ValueError(f"--arch: expected one of {', '.join(ARCHS)}, got {self.arch!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr: expected a positive number, got {self.lr}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup: expected 0 to 1, got {self.warmup}")
        if not 0 < self.momentum < 1:
            raise ValueError(f"--momentum: expected between 0 and 1, got {self.momentum}")
        if self.evaluate and not self.evaluate.endswith(".pt"):
            raise ValueError(f"--evaluate: expected a teacher.pt, got {self.evaluate!r}")
        if Path(self.export).name != self.export:
            raise ValueError(f"--export: expected a name without folders, got {self.export!r}")

    def check_classes(self):
        """Raise ValueError unless --classes are two or more of the data set's, in rising order."""
        got = " ".join(map(str, self.classes))
        is_rising = list(self.classes) == sorted(set(self.classes))
        if len(self.classes) < 2 or not is_rising:
            expected = "expected at least 2 different classes in rising order"
            raise ValueError(f"--classes: {expected}, got {got}")
        last = N_CLASSES[self.dataset] - 1
        if self.classes[0] < 0 or self.classes[-1] > last:
            expected = f"expected classes of {self.dataset}, 0 to {last}"
            raise ValueError(f"--classes: {expected}, got {got}")


def shrink(args):
    """The options of --smoke: one epoch of small batches."""
    return replace(args, epochs=1, batch_size=64)


# Data
# Official addresses, and the MD5 sums that are published beside the files.
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


def download_file(url, path):
    """Fetch an official file to `path` and check its MD5. It appears there whole or not at all."""
    advice = f"try again, download it by hand to {path}, or pass another --data-dir"
    with (
        fail_in_one_line(f"{url} cannot be fetched", advice),
        urllib.request.urlopen(url, timeout=30) as reply,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        md5 = hashlib.md5()
        with open_atomically(path) as file:
            for chunk in iter(lambda: reply.read(1 << 20), b""):
                file.write(chunk)
                md5.update(chunk)
            if md5.hexdigest() != MD5[path.name]:
                raise ValueError(f"expected MD5 {MD5[path.name]}, got {md5.hexdigest()}")


def fetch_dataset(dataset, data_dir):
    """Download what is missing of a data set's official files into `data_dir`."""
    if dataset == "digits":
        return
    folder = Path(data_dir) / FOLDERS[dataset]
    names = [*FILES[dataset]["train"], *FILES[dataset]["test"]]
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return

    if dataset == "mnist":
        for name in missing:
            download_file(MNIST_URL + name, folder / name)
        return

    number = dataset.removeprefix("cifar")
    archive = Path(data_dir) / f"cifar-{number}-binary.tar.gz"
    if not archive.exists():
        download_file(CIFAR_URL + archive.name, archive)
    with fail_in_one_line(f"{archive} cannot be unpacked", "delete it and run again"):
        check_regular(archive)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in missing:  # the members that we know, at paths that we choose
                member = tar.extractfile(f"{folder.name}/{name}")
                with open_atomically(folder / name) as file:
                    file.write(member.read())


def load_split(dataset, classes, data_dir, split):
    """A data set, or the images of some of its classes; these are numbered from 0 in their order.

    Args:
        classes: in rising order; () means all.
        dataset, data_dir, split: as load_dataset takes them.

    Returns:
        Images (N, C, H, W) uint8 and labels (N,).
    """
    images, labels = load_dataset(dataset, data_dir, split)
    if not classes:
        return images, labels
    wanted = torch.tensor(classes)
    chosen = torch.isin(labels, wanted)
    return images[chosen], torch.searchsorted(wanted, labels[chosen])


def crop_and_mirror(images, padding, mirror, generator):
    """Pad images with zeros, crop them back at random places, and mirror half of them at random.

    One gather serves the whole batch.

    Args:
        images: (N, C, H, W) uint8.
        padding: width of the border, the most pixels that an image is moved by.
        mirror: whether to mirror each image left to right with probability 1/2.
        generator: source of all chance, on the device of `images`.

    Returns:
        (N, C, H, W) uint8 in channels_last memory.
    """
    N, _, H, W = images.shape
    device = images.device
    corners = torch.randint(0, 2 * padding + 1, (2, N, 1), generator=generator, device=device)
    rows = corners[0] + torch.arange(H, device=device)  # (N, H)
    columns = corners[1] + torch.arange(W, device=device)  # (N, W)
    if mirror:
        mirrored = torch.rand(N, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)

    padded = F.pad(images, (padding, padding, padding, padding))
    n = torch.arange(N, device=device).view(N, 1, 1)
    cropped = padded[n, :, rows.unsqueeze(2), columns.unsqueeze(1)]  # (N, H, W, C)
    return cropped.permute(0, 3, 1, 2)


# Training
def compute_lr(step, n_steps, args):
    """Learning rate of a step: a linear rise to args.lr, then a linear fall to zero."""
    n_warmup = max(1, round(args.warmup * n_steps))
    rise = (step + 1) / n_warmup
    fall = (n_steps - step) / max(1, n_steps - n_warmup)
    return args.lr * min(rise, fall)


def train(network, info, train_split, test_split, run):
    """Train a fresh network, or continue from the run's checkpoint.

    Args:
        network: changed in place.
        info: its NetworkInfo.
        train_split, test_split: images (N, C, H, W) uint8 and labels (N,), on the run's device.
        run: RunFolder; it gives the options and the device, and takes rows and checkpoints.
    """
    args = run.args
    images, labels = train_split
    padding = CROP_PADDING[args.dataset]
    mirror = args.dataset in MIRRORED
    n_batches = len(images) // args.batch_size  # a short last batch would disturb the moments
    n_steps = args.epochs * n_batches

    generator = torch.Generator(run.device).manual_seed(args.seed)  # of order, crops and mirroring
    optimizer = torch.optim.SGD(
        network.parameters(),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        nesterov=True,
        foreach=True,
    )
    first_epoch = 0
    with run.open_checkpoint() as saved:
        if saved is not None:
            network.load_state_dict(saved["network"])
            restore_optimizer(optimizer, saved["optimizer"])
            generator.set_state(saved["generator"])
            first_epoch = saved["epoch"]

    compiled = network
    if args.compile or run.device == "cuda":
        compiled = torch.compile(network)

    bar = tqdm(total=n_steps, initial=first_epoch * n_batches, disable=None, mininterval=1)
    for epoch in range(first_epoch, args.epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator, device=run.device)
        total_loss = torch.zeros((), device=run.device)
        n_correct = torch.zeros((), dtype=torch.int64, device=run.device)

        for batch in range(n_batches):
            step = epoch * n_batches + batch
            optimizer.param_groups[0]["lr"] = compute_lr(step, n_steps, args)

            chosen = order[batch * args.batch_size : (batch + 1) * args.batch_size]
            y = labels[chosen]  # (N,)
            x = crop_and_mirror(images[chosen], padding, mirror, generator)
            x = normalise(x, info)  # (N, C, H, W)
            with autocast(run.device, bf16=True):
                logits = compiled(x)  # (N, K)
                loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            total_loss += loss.detach()
            n_correct += (logits.detach().argmax(1) == y).sum()
            bar.update()

        row = {"epoch": epoch + 1}
        row["train/loss"] = total_loss.item() / n_batches
        row["train/acc"] = 100 * n_correct.item() / (n_batches * args.batch_size)
        row["lr"] = compute_lr((epoch + 1) * n_batches, n_steps, args)
        if (epoch + 1) % EVAL_EVERY == 0:
            row["eval/acc"] = evaluate(network, *test_split, info)
        run.show(bar, row)

        state = dict(network=network.state_dict(), optimizer=optimizer.state_dict())
        state["generator"] = generator.get_state()
        state["epoch"] = epoch + 1
        run.save_checkpoint(state)
    bar.close()


# Export
def round_weights(network):
    """State dict in fp16, but for BatchNorm: its moments are what methods match."""
    batchnorms = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    rounded = {}
    for key, value in network.state_dict().items():
        layer = key.rpartition(".")[0]
        if value.is_floating_point() and layer not in batchnorms:
            value = value.half()
        rounded[key] = value.cpu().clone()
    return rounded


def ship(path, name):
    """Copy a teacher.pt to teachers/NAME.pt; write its SHA-256 and description to index.json."""
    folder = ROOT / "teachers"
    description = read_checkpoint(path)
    del description["state_dict"]
    blob = Path(path).read_bytes()
    with fail_in_one_line(f"{folder} cannot be written", f"use --evaluate {path} --export {name}"):
        folder.mkdir(exist_ok=True)
        index = {}
        if (folder / "index.json").exists():
            index = json.loads((folder / "index.json").read_text())
        index[name] = dict(sha256=hashlib.sha256(blob).hexdigest(), **description)
        with open_atomically(folder / f"{name}.pt") as file:
            file.write(blob)
        with open_atomically(folder / "index.json") as file:
            file.write(encode_json(dict(sorted(index.items())), indent=1))
    print(f"shipped teachers/{name}.pt, {len(blob):,} bytes")


# Main
def evaluate_file(args, device):
    """Print the test accuracy of the network in --evaluate; ship it if --export asks for that."""
    with refuse_misfits(f"--evaluate {args.evaluate}", {"other": "pass a teacher.pt"}):
        network, info = load_trained(args.evaluate, device, args.data_dir)
        classes = tuple(describe(args.evaluate).get("classes", ()))
    images, labels = load_split(args.dataset, classes, args.data_dir, "test")
    n_classes = len(classes) or N_CLASSES[args.dataset]
    if info.channels != images.shape[1] or info.num_classes != n_classes:
        made_for = info.dataset or "other images"
        fail(f"--evaluate {args.evaluate}: made for {made_for}, not for {args.dataset}")
    print(f"{evaluate(network, images, labels, info):.2f} % of {args.dataset}")
    if args.export:
        ship(args.evaluate, args.export)


def train_and_export(args, device):
    """Train the network in --arch and write teacher.pt."""
    images, labels = load_split(args.dataset, args.classes, args.data_dir, "train")
    test_images, test_labels = load_split(args.dataset, args.classes, args.data_dir, "test")
    if args.smoke:
        images = images[:N_SMOKE_IMAGES]
        labels = labels[:N_SMOKE_IMAGES]
    if args.batch_size > len(images):
        expected = f"expected at most the {len(images)} training images"
        fail(f"--batch-size: {expected}, got {args.batch_size}")
    train_split = images.to(device), labels.to(device)
    test_split = test_images.to(device), test_labels.to(device)

    run = RunFolder(args, device, may_change=("export",), clears=("teacher.pt",))
    versions = describe_machine(device)["versions"]  # now: the files may change during the run
    n_classes = len(args.classes) or N_CLASSES[args.dataset]
    known = dict(dataset=args.dataset, num_classes=n_classes, image_size=32)
    info = make_info(args.arch, known, PIXELS[args.dataset])
    network = build_network(info).to(device, memory_format=torch.channels_last)
    advice = "try a smaller --batch-size"
    if args.compile:
        advice = "try it without --compile"
    with fail_in_one_line("the training failed", advice):
        train(network, info, train_split, test_split, run)

    # The accuracy that counts is that of the rounded weights.
    rounded = round_weights(network)
    network.load_state_dict(rounded)
    accuracy = evaluate(network, *test_split, info)

    description = dict(
        format=1,
        arch=args.arch,
        dataset=args.dataset,
        data=args.data_note or args.dataset,
        command="python teacher.py " + shlex.join(sys.argv[1:]),
        num_classes=info.num_classes,
        channels=info.channels,
        image_size=info.image_size,
        mean=info.mean,
        std=info.std,
        accuracy=accuracy,
        seed=args.seed,
        seconds=round(time.time() - run.start, 1),
        versions=versions,
    )
    if args.classes:
        description["classes"] = args.classes
    with run.write_file("teacher.pt") as file:
        torch.save(dict(description, state_dict=rounded), file)
    print(f"test accuracy {accuracy:.2f} % (last epoch, rounded weights)")
    # The last two stand in every script's result.json.
    run.finish(dict(description, teacher_accuracy=accuracy, student_accuracy=None))
    if args.export:
        ship(run.out / "teacher.pt", args.export)


def main(args):
    device = choose_device(args.device)
    if args.smoke:
        args = shrink(args)
    if not args.out:
        names = [args.dataset, args.arch, *map(str, args.classes)]
        args = replace(args, out=f"runs/teacher/{'-'.join(names)}")
    seed_everything(args.seed)
    fetch_dataset(args.dataset, args.data_dir)
    if args.evaluate:
        evaluate_file(args, device)
    else:
        train_and_export(args, device)


if __name__ == "__main__":
    main(parse_args({"teacher": Args()}))
