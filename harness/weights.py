"""Weights: fetched, checked and read without running anything, and fitted to a network."""

import hashlib
import re
from pathlib import Path

import torch

from harness.errors import Misfit, shorten_error
from harness.files import check_regular, read_checkpoint

AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])|EMA")  # in the name of averaged weights
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers around a network
NOT_WEIGHTS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")


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


def have_equal_shapes(state, wanted):
    """Whether tensors have the shapes of those of the same names in `wanted`."""
    return all(state[key].shape == tensor.shape for key, tensor in wanted.items())


def find_fitting_state(network, saved):
    """The dict of tensors in a checkpoint whose names are the network's.

    Names are used as they are if they fit; otherwise the prefixes of wrappers are peeled. An
    average of the weights (…ema…) is taken only where nothing else fits.

    Returns:
        (names that lead to it, state), and of the nearest miss if none fits: (None, state).

    Raises:
        Misfit: several different ones fit, and none of them is an average.
    """
    wanted = drop_counters(network.state_dict())
    fitting = []
    averages = []
    nearest = {}
    for names, tensors in find_state_dicts(saved):
        for state in peel_prefixes(drop_counters(tensors)):
            state = rename_public_keys(state, wanted)
            if state.keys() == wanted.keys():
                if any(AVERAGE.search(name) for name in names):
                    averages.append((names, state))
                else:
                    fitting.append((names, state))
                break
            if len(state.keys() & wanted.keys()) >= len(nearest.keys() & wanted.keys()):
                nearest = state
    if not fitting:
        fitting = averages[:1]
    if not fitting:
        return None, nearest
    of_equal_shapes = [item for item in fitting if have_equal_shapes(item[1], wanted)]
    fitting = of_equal_shapes or fitting[:1]
    first_names, first = fitting[0]
    for names, state in fitting[1:]:
        # a copy in half precision is no other set
        pairs = [(first[key].double(), state[key].double()) for key in wanted]
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in pairs):
            both = f"{'.'.join(first_names) or 'its top'} and {'.'.join(names) or 'its top'}"
            raise Misfit(f"different weights in it fit: {both}", "save a file with one of them")
    return fitting[0]


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
    for key, tensor in state.items():
        # a mask of -inf, say, is part of the network
        if wanted[key].isfinite().all() and not tensor.isfinite().all():
            raise Misfit(f"{path}: {key} is not finite", cause="finite")
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
