"""Sequences of classes that a network learns one after the other, for continual.py.

A task such as mnist:0-4 names classes of a data set. A network's outputs are the classes of all
tasks so far, in their order.
"""

import re
from typing import NamedTuple

import torch

from harness.data import N_CLASSES, load_dataset
from harness.sources import match_channels

CLASSES = r"\d{1,3}-\d{1,3}|\d{1,3}(,\d{1,3})*"  # a range, or numbers


class Task(NamedTuple):
    """The classes that a network gets at once."""

    dataset: str
    classes: tuple[int, ...]
    """In the order of their outputs."""


def parse_tasks(words):
    """The tasks that words such as mnist:0-4 and cifar10:0,3,8 stand for."""
    tasks = []
    for word in words:
        dataset, _, text = word.partition(":")
        if dataset not in N_CLASSES or not re.fullmatch(CLASSES, text):
            expected = f"expected {' | '.join(N_CLASSES)} and classes, such as mnist:0-4"
            raise ValueError(f"--tasks: {expected} or mnist:0,3,8, got {word!r}")
        numbers = [int(number) for number in re.split("[,-]", text)]
        if "-" in text:
            numbers = list(range(numbers[0], numbers[1] + 1))
        if len(numbers) < 2 or max(numbers) >= N_CLASSES[dataset]:
            expected = f"expected at least 2 of the classes 0 to {N_CLASSES[dataset] - 1}"
            raise ValueError(f"--tasks: {expected}, got {word!r}")
        tasks.append(Task(dataset, tuple(numbers)))
    if len(tasks) < 2:
        raise ValueError("--tasks: expected the first network's classes, then those of a task")
    outputs = list_outputs(tasks)
    for output in outputs:
        if outputs.count(output) > 1:
            name = f"class {output[1]} of {output[0]}"
            raise ValueError(f"--tasks: expected classes that do not overlap, got {name} twice")
    return tasks


def list_outputs(tasks):
    """[(data set, class), …] of a network's outputs in their order."""
    return [(task.dataset, k) for task in tasks for k in task.classes]


def name_dataset(tasks):
    """The first task's data set, or "" where its classes are not the first outputs in their order.

    A checkpoint that names a data set is measured on it by other scripts.
    """
    first = tasks[0].dataset
    for i, (dataset, k) in enumerate(list_outputs(tasks)):
        if dataset == first and i != k:
            return ""
    return first


class LabelledImages(NamedTuple):
    images: torch.Tensor
    """(n, C, H, W) uint8."""
    labels: torch.Tensor
    """(n,) int64, numbers of outputs."""


def join_images(sets):
    """One LabelledImages of several."""
    images = torch.cat([part.images for part in sets])
    labels = torch.cat([part.labels for part in sets])
    return LabelledImages(images, labels)


def repeat_small_sets(sets):
    """Repeat each set as often as it fits into the largest, so that their sizes are about equal.

    Otherwise 1,437 digits would hardly be drawn beside 50,000 photographs.
    """
    largest = max(len(part.labels) for part in sets)
    repeated = []
    for part in sets:
        repeated += [part] * (largest // len(part.labels))
    return repeated


def load_task(tasks, number, split, info, args):
    """The real images of a task in a network's channels, as LabelledImages on the CPU.

    Args:
        tasks, number: all tasks, and the index of one.
        split: train | test.
        info: NetworkInfo.
        args: Args; read is data_dir.
    """
    task = tasks[number]
    n_before = len(list_outputs(tasks[:number]))
    images, labels = load_dataset(task.dataset, args.data_dir, split)
    outputs = torch.full((N_CLASSES[task.dataset],), -1)
    outputs[list(task.classes)] = n_before + torch.arange(len(task.classes))
    labels = outputs[labels]
    chosen = labels >= 0
    return LabelledImages(match_channels(images[chosen], info), labels[chosen])


def advise_training(task):
    """How to make a first network of a task's classes."""
    arch = "resnet20" if task.dataset.startswith("cifar") else "resnet8"
    classes = " ".join(map(str, sorted(task.classes)))
    words = f"--dataset {task.dataset} --arch {arch} --classes {classes}"
    return f"train it: python teacher.py {words}"
