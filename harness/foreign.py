"""Networks of a user's own code: imported, called, and reduced to their logits."""

import contextlib
import copy
import importlib
import importlib.util
import inspect
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from harness import ROOT
from harness.errors import FOREIGN, Misfit, find_line, shorten_error
from harness.networks import fork_rng


# Importing
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
    """Context that ends with the settings, the seeds and the current folder with which it began.

    A user's code that seeds would make runs of all --seed alike. PyTorch's random numbers go on
    from where it left them unless it seeded: to initialise a network draws from them.
    """
    settings = read_settings()
    folder = os.getcwd()
    seed = torch.initial_seed()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda_states = []
    if torch.cuda.is_initialized():
        cuda_states = torch.cuda.get_rng_state_all()
    try:
        yield
    finally:
        restore_settings(settings)
        os.chdir(folder)
        of_torch, of_python, of_numpy = states
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        if torch.initial_seed() != seed:
            torch.set_rng_state(of_torch)
            torch.cuda.manual_seed_all(seed)  # also where no GPU has been used yet
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)


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
    if isinstance(network, torch.jit.ScriptModule):
        raise Misfit(f"{name} returned a TorchScript module", "return the network it was made of")
    if hasattr(network, "_orig_mod"):  # of torch.compile
        network = network._orig_mod
    if isinstance(network, nn.DataParallel):
        network = network.module
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        problem = f"{name} returned lazy modules that have no weights yet"
        raise Misfit(problem, "let the factory feed it a batch first")
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
        if "in-place" in str(error) or "inplace" in str(error):
            raise Misfit(problem, "take operations in place off its input") from error
        if re.search(r"dtype|scalar type|Input type|[Dd]ouble", str(error)):
            raise Misfit(problem, "let it compute in the dtype of its input") from error
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


def copy_for_trial(network):
    """A deep copy of a network.

    Raises:
        Misfit: it cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        problem = f"it cannot be copied ({shorten_error(error)})"
        advice = "use torch.nn.utils.parametrizations for weight_norm, and keep no results in it"
        raise Misfit(problem, advice) from error


@torch.no_grad()
def select_logits(network, info):
    """The network, or LogitsOnly of it where it returns a tuple, a list or a dict."""
    shape = torch.Size((2, info.num_classes))
    places = {}
    with fork_rng("cpu"):  # dropout draws, and nothing else may notice
        for training in (False, True):
            trial = copy_for_trial(network)  # running moments stay as they are
            trial.train(training)
            output = feed_blank_images(trial, info, "cpu", info.image_size)
            places[training] = find_logits(output, shape)
    if places[False] == () and places[True] == ():
        return network
    return LogitsOnly(network, places[False], places[True])
