"""Runs of the scripts: how their tests start them and read what they say and write."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def read_refusal(capsys, function, *args, **options):
    """Call a function that must refuse: the one line that it prints before exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args, **options)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


# Programs. A script's imports take some seconds, so its process is a fork of one that has imported
# PyTorch and the like already. In all else it is the process of `python SCRIPT OPTIONS`.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "scripts",
        "harness.data",
        "harness.images",
        "harness.load",
        "harness.networks",
        "harness.pictures",
        "harness.run",
        "kernels",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "PIL.Image",
        "PIL.ImageDraw",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torch._dynamo",  # an optimiser's first step imports it
    ]
)
LONGEST_RUN = 120  # seconds


@dataclass
class Program:
    """A script that runs in a process of its own."""

    process: multiprocessing.Process
    out: Path
    """Its --out; what it says lies beside that folder."""

    def is_running(self):
        return self.process.is_alive()

    def send(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)

    def finish(self):
        """Wait for its end: exit code, standard output, standard error."""
        self.process.join(LONGEST_RUN + 10)
        said = [read_file.read_text() for read_file in name_streams(self.out)]
        return self.process.exitcode, *said


def name_streams(out):
    """Files that take a program's standard output and standard error."""
    return [out.with_name(f"{out.name}.{stream}") for stream in ("stdout", "stderr")]


def start(command, out, interpret=False, file_limit=resource.RLIM_INFINITY, environment=None):
    """Start `python COMMAND --out OUT` on the CPU.

    Args:
        command: such as "zskt.py --smoke".
        out: Path.
        interpret: run the Triton kernels in their interpreter; else the CPU path.
        file_limit: bytes that no file may exceed, as on a full disk.
        environment: {name: value} of variables to set.
    """
    script, *options = command.split()
    argv = [str(ROOT / script), *options, "--device", "cpu", "--out", str(out)]
    streams = name_streams(out)
    arguments = argv, streams, interpret, file_limit, environment or {}
    process = FORKSERVER.Process(target=run_script, args=arguments)
    process.start()
    return Program(process, out)


def run(command, out, **options):
    """Run `python COMMAND --out OUT`, which must succeed; returns its standard output."""
    code, told, errors = start(command, out, **options).finish()
    assert code == 0, errors
    assert errors == ""
    return told


def run_script(argv, streams, interpret, file_limit, environment):
    """What the forked process does."""
    for i, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LONGEST_RUN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(environment)
    from kernels import _common

    _common.INTERPRET = interpret
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except KeyboardInterrupt:  # what Python does: the hook, then the signal's own end
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
