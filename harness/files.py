"""Files that are read without trust, written whole or not at all, and locked."""

import argparse
import atexit
import contextlib
import errno
import json
import math
import os
import re
import signal
import socket
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from harness.errors import fail, shorten_error

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCKS = {}  # {path: open file} of the folders that this process holds


# Reading without trust
def list_harmless_globals():
    """What a checkpoint may hold besides tensors and plain python: options and numpy numbers."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "?")]
    old_name = (scalar, "numpy.core.multiarray.scalar")  # as numpy 1 wrote it
    return [argparse.Namespace, np.dtype, scalar, old_name, *dtypes]


def check_regular(path):
    """Raise OSError where a path names a folder, a pipe or a device: reading it may never end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def check_archive(path):
    """Raise an error if a path is no file, or if a checksum in a zip archive does not fit.

    Files of torch.save and .npz files are such archives. Other files pass, such as those that
    PyTorch wrote before version 1.6. torch.load does not look at the checksums itself.
    """
    check_regular(path)
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it has another checksum than was written")
        for entry in archive.infolist():
            # torch.load returns memory that it never filled where a file is marked as a folder
            if entry.external_attr & 0x10 and not entry.is_dir():
                raise ValueError(f"{entry.filename} in it is marked as a folder")


def load_checkpoint(path):
    """What a file of torch.save holds, loaded without running anything in it."""
    check_archive(path)
    with (
        warnings.catch_warnings(action="ignore"),
        torch.serialization.safe_globals(list_harmless_globals()),
    ):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path, advice="save a state dict"):
    """As load_checkpoint; ends the program in one line where that fails or gives no dict.

    Args:
        path: the file.
        advice: what to do if it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        fail(f"{path} cannot be read: there is no such file; pass an existing checkpoint")
    try:
        saved = load_checkpoint(path)
    except Exception as error:
        problem = shorten_error(error)
        stranger = re.search(r"GLOBAL ([\w.]+)", str(error))
        if stranger:
            problem = f"it holds a {stranger[1]}, which could run code"
        fail(f"{path}: no safe checkpoint: {problem}; {advice}")
    if not isinstance(saved, dict):
        fail(f"{path}: expected a dict, got {type(saved).__name__}; save model.state_dict()")
    return saved


def find_not_finite(state):
    """The name of the first number or tensor in nested dicts and lists that is NaN or infinite.

    Returns:
        The names that lead to it, or "" where all are finite.

    >>> find_not_finite({"a": [torch.ones(2)], "b": {"c": torch.tensor([1.0, torch.nan])}})
    'b c'
    """
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for name, value in items:
        if isinstance(value, torch.Tensor):
            if not value.isfinite().all():
                return str(name)
        elif isinstance(value, float):
            if not math.isfinite(value):
                return str(name)
        elif isinstance(value, (dict, list, tuple)):
            found = find_not_finite(value)
            if found:
                return f"{name} {found}"
    return ""


# Writing whole or not at all
@contextlib.contextmanager
def delay_interrupts():
    """Let a Ctrl-C take effect at the end, unless something else fails before.

    In the middle of torch.save it would look like a full disk, or end the process with an abort.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if handler is None or not is_main:  # not Python's to change
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def open_atomically(path):
    """A file to write that appears at `path` whole or not at all, whenever the run is stopped."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with delay_interrupts():
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before what it names
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


# JSON
def encode_json(value, indent=None):
    """A line or a file of JSON, as bytes. NaN and infinity, which JSON lacks, are a ValueError."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def parse_row(line):
    """A row of metrics.jsonl, or None where a line is no JSON object of finite numbers.

    >>> parse_row('{"epoch": 1}'), parse_row('{"epoch": 1, "lo'), parse_row('{"loss": NaN}')
    ({'epoch': 1}, None, None)
    """
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    is_numeric = all(type(value) in (int, float) for value in row.values())
    return row if is_numeric and not find_not_finite(row) else None


# Locks
def lock_folder(folder):
    """Hold a run's folder until this process ends; refuse where another process holds it.

    The lock goes with the process, even if that is killed; the file `lock` only says who holds it.
    Nothing is locked where the system or the file system has no locks.
    """
    path = (folder / "lock").resolve()
    if fcntl is None or path in LOCKS:
        return
    file = open(path, "a+")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        fail(f"--out {folder} is in use by {holder}; wait for its end, or pass another --out")
    except OSError:
        return
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        lock_folder(folder)  # the holder has finished just now and deleted this file
        return
    LOCKS[path] = file
    atexit.register(unlock_folder, folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def unlock_folder(folder):
    """Release a run's folder for other processes."""
    path = (folder / "lock").resolve()
    if path in LOCKS:
        path.unlink(missing_ok=True)
        LOCKS.pop(path).close()
