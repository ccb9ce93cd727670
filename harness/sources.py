"""What --images names: inverted images, noise, real ones without labels, another data set's.

For scripts that use images and do not make them: pruning, quantization, class-incremental learning.
"""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from harness import ROOT
from harness.data import (
    N_CLASSES,
    evaluate,
    list_class_names,
    load_dataset,
    load_real_images,
    predict,
)
from harness.errors import fail, fail_in_one_line
from harness.images import check_image_files, read_images, to_uint8
from harness.known import NetworkInfo, is_factory
from harness.pictures import draw_classes
from harness.run import RunOptions, TeacherOptions, check_at_least

INVERSION_OPTIONS = ("teacher", "weights", "num_classes", "image_size", "mean", "std", "num_images")


@dataclass
class SourceOptions(TeacherOptions, RunOptions):
    """The options of every script that takes images of some source."""

    images: str = "auto"
    """Images to learn on: auto: deepinversion.py makes them, once; the --out of one of its runs;
    noise; real: the teacher's training images, without labels; or the name of another data set."""
    num_images: int = 300
    """Images of auto (rounded up to whole batches of its preset), noise, real and other data sets;
    of a folder all are taken."""
    test_images: int = 0
    """Real test images that measure the networks, the first ones; 0: all."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs their plain references."""

    def __post_init__(self):
        RunOptions.__post_init__(self)
        TeacherOptions.__post_init__(self)
        if not self.out:
            raise ValueError("--out: expected a folder, got an empty name")
        if not self.images:
            raise ValueError("--images: expected a folder or a source, got an empty name")
        check_at_least(2, self, "num_images")
        check_at_least(0, self, "test_images")


def load_source_images(args, info, changes=None):
    """The images of --images.

    Args:
        args: read are images (auto | noise | real | a data set | a folder of deepinversion.py),
            num_images, the options of TeacherOptions and RunOptions.
        info: NetworkInfo of the teacher.
        changes: {option of deepinversion.py: value} that auto starts it with; None: its preset.

    Returns:
        (n, C, H, W) uint8 on the CPU.
    """
    if args.images == "noise":
        return draw_noise(info, args.num_images)
    if args.images == "real":
        if N_CLASSES.get(info.dataset) != info.num_classes:  # unknown, or of some classes only
            fail("--images real: the teacher's own images are not at hand; choose another source")
        return load_training_images(info.dataset, info, args)
    if args.images in N_CLASSES:
        return load_training_images(args.images, info, args)
    folder = args.images
    if folder == "auto":
        folder = invert_teacher(args, changes)
    if Path(folder).resolve() == Path(args.out).resolve():
        fail(f"--images {folder}: this is --out, where the run writes; pass another --out")
    paths = check_image_files(folder, info)
    return torch.cat([read_images(path)[0] for path in paths])


def draw_noise(info, n):
    """Pixels (n, C, H, W) uint8 of Gaussian noise in the training images' mean and deviation.

    Values outside the range of pixels are clipped. Where images are dark, as those of MNIST, the
    noise then has other moments than they have.
    """
    return to_uint8(torch.randn(n, *info.image_shape), info)


def load_training_images(dataset, info, args):
    """Training images of a data set in the teacher's number of channels, uint8, in random order."""
    images, _ = load_dataset(dataset, args.data_dir, "train")
    if images.shape[2:] != info.image_shape[1:]:
        size = images.shape[2]
        problem = f"its images have {size} pixels, the teacher's {info.image_size}"
        fail(f"--images {args.images}: {problem}; choose another source")
    images = images[torch.randperm(len(images))[: args.num_images]]
    return match_channels(images, info)


def match_channels(images, info):
    """Images (n, C, H, W) uint8 in a network's channels: grey is repeated, colours become grey."""
    if images.shape[1] != info.channels:
        if images.shape[1] > 1:
            images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
        images = images.expand(-1, info.channels, -1, -1)
    return images.contiguous()


class Lesson(NamedTuple):
    """What a network learns from, and what measures it."""

    teacher: torch.nn.Module
    """Frozen, in eval mode."""
    info: NetworkInfo
    """Of the teacher."""
    images: torch.Tensor
    """(n, C, H, W) uint8 of --images, on the device."""
    dataset: str
    """Of the test images; "none" without them."""
    test: tuple[torch.Tensor, torch.Tensor] | None
    """Real images and labels, or None."""


def load_lesson(teacher, info, args, device):
    """A Lesson: the images of --images, which auto first makes, and those that measure."""
    dataset, test = load_real_images(info, args, device)
    if test is not None and args.test_images:
        test = tuple(part[: args.test_images] for part in test)
    images = load_source_images(args, info).to(device)
    return Lesson(teacher, info, images, dataset, test)


def report_lesson(lesson, run):
    """Draw samples.png; returns what result.json says of the teacher and the images."""
    info = lesson.info
    images = lesson.images
    with run.write_file("samples.png") as file:
        labels = predict(lesson.teacher, images, info, batch_size=100).cpu()
        draw_classes(images.cpu(), labels, list_class_names(info.dataset), file)
    result = dict(teacher=info.name, dataset=lesson.dataset, images=run.args.images)
    result["n_images"] = len(images)
    result["teacher_accuracy"] = info.accuracy
    if lesson.test is not None:
        result["teacher_accuracy"] = evaluate(lesson.teacher, *lesson.test, info)
    return result


# Inverted images
def invert_teacher(args, changes=None):
    """Start deepinversion.py with the teacher's preset, once.

    --seed is not passed on: runs of all seeds share the images.

    Args:
        args, changes: as of load_source_images; args.images is not read.

    Returns:
        The folder of its images, see name_folder.
    """
    changes = changes or {}
    folder = name_folder(args, changes)
    if (folder / "result.json").exists():
        check_inversion(folder, args, changes)
        print(f"{folder} holds the images; delete it for new ones")
        return folder

    wanted = f"at least {args.num_images} images of {args.teacher}"
    print(f"deepinversion.py makes {wanted}, once, into {folder}")
    script = ROOT / "deepinversion.py"
    if not script.exists():
        fail(
            f"--images auto: {script} is missing; put it there, or pass --images noise or a folder"
        )
    command = [sys.executable, str(script), "--resume", "--out", str(folder)]
    for name in (*INVERSION_OPTIONS, "device", "data_dir", "smoke"):
        command += format_option(name, getattr(args, name))
    for name, value in changes.items():
        command += format_option(name, value)
    if not args.fused:
        command.append("--no-fused")
    code = subprocess.run(command).returncode
    if code == 2:
        raise SystemExit(2)  # it has said why, in one line
    if code:
        fail(f"--images auto: deepinversion.py ended with {code}; pass --images noise or a folder")
    return folder


def name_folder(args, changes):
    """Where a teacher's images lie, as a Path.

    runs/deepinversion/NAME-N, with each change in its name. The name of a teacher in a file ends in
    the first digits of the file's SHA-256: another network there gets other images. What else may
    differ, check_inversion refuses.
    """
    words = [name_teacher(args), str(args.num_images)]
    words += [f"{name}={value}" for name, value in changes.items()]
    if args.smoke:
        words.append("smoke")
    return Path("runs/deepinversion") / "-".join(words)


def name_teacher(args):
    """A folder's name for a teacher, which changes with the contents of its files."""
    name = re.sub(r"[^\w.-]", "_", args.teacher)
    source = args.teacher.rpartition(":")[0] if is_factory(args.teacher) else args.teacher
    digest = hashlib.sha256()
    found = False
    for path in (source, args.weights):
        if path and Path(path).is_file():
            digest.update(Path(path).read_bytes())
            found = True
    return f"{name}-{digest.hexdigest()[:8]}" if found else name


def check_inversion(folder, args, changes):
    """Refuse images that deepinversion.py made with other options."""
    with fail_in_one_line(f"--images auto: {folder} cannot be used", "delete it"):
        made_with = json.loads((folder / "args.json").read_text())
        wanted = {name: getattr(args, name) for name in INVERSION_OPTIONS}
        if not args.smoke:  # which shrinks some of them
            wanted |= changes
        wanted = json.loads(json.dumps(wanted))
        changed = [name for name in wanted if made_with[name] != wanted[name]]
        if changed:
            raise ValueError(f"its images were made with other {', '.join(changed)}")


def format_option(name, value):
    """An option as words of a command line; none of "", () and False, which say nothing."""
    option = "--" + name.replace("_", "-")
    if value is False or value in ("", ()):
        return []
    if value is True:
        return [option]
    if isinstance(value, tuple):
        return [option, *map(str, value)]
    return [option, str(value)]
