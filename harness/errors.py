"""Errors end a program in one line: what is wrong, and the one thing to do; exit code 2."""

import contextlib
import errno
import io
import os
import re
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from harness import ROOT

DISK_ADVICE = "free some space, then continue with --resume"
RAISED = []  # options of the command line whose numbers are above the preset's
WRITE_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG)
PIPE_CODE = 141  # a shell's exit code of a program that wrote into a closed pipe
OWN_FOLDERS = ("harness", "kernels", "bench", "tests", "results", "teachers")
OWN_MODULES = ("augmentations.py", "channels.py", "tasks.py")
OWN_PATHS = [ROOT / name for name in (*OWN_FOLDERS, *OWN_MODULES)]
FOREIGN = {}  # {file or module: folders} of the users' own code that networks come from


# Refusals
def fail(message):
    """Print one line that says what to do and leave with exit code 2."""
    line = f"{Path(sys.argv[0]).name}: {message}"
    with contextlib.suppress(OSError):  # nobody can read it
        tqdm.write(line, file=sys.stderr)  # above a progress bar, not behind it
    raise SystemExit(2)


@contextlib.contextmanager
def fail_in_one_line(subject, advice):
    """Report what fails inside in one line: `subject`, the error's first sentence, `advice`."""
    try:
        yield
    except Exception as error:
        problem = f"{shorten_error(error)}; {advice}"
        if not is_out_of_memory(error):
            problem = explain_foreign(error) or problem
        elif RAISED:
            problem = f"{problem}, or {advise_less_memory()}"
        fail(f"{subject}: {problem}")


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


@contextlib.contextmanager
def refuse_unwritable(path):
    """Report in one line that a file cannot be written: its folder is gone, or the disk is full."""
    try:
        yield
    except Exception as error:
        # numbers that JSON lacks are a ValueError; anything else is a bug of ours
        if not isinstance(find_cause(error), (OSError, RuntimeError, MemoryError, ValueError)):
            raise
        advice = DISK_ADVICE
        if is_out_of_memory(error):
            advice = advise_less_memory()
        if not Path(path).parent.is_dir():
            advice = "its folder has gone; start again and leave --out where it is"
        fail(f"{path} cannot be written: {shorten_error(find_cause(error))}; {advice}")


# What an error says
def shorten_error(error):
    """An exception's kind and first sentence: PyTorch goes on to advise loading unsafely."""
    words = " ".join(str(error).split())
    words = re.sub(r"^\[enforce fail at [^]]*\] .*? == .*?\. ", "", words)  # a place in PyTorch
    kind = type(error).__name__
    if not words:  # such as MemoryError
        return kind
    sentence = words.split(". ")[0][:300]
    return f"{kind}: {sentence}"


def find_cause(error):
    """The OSError that led to an error, or the error itself: PyTorch hides a full disk."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def is_out_of_memory(error):
    """Whether an error means that memory does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    signs = ("allocate memory", "calculation overflowed", "bad_alloc", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def advise_less_memory():
    """What to do where memory does not suffice."""
    return f"lower {', '.join(RAISED) or 'the batch sizes'}"


def find_line(error, folders):
    """The last line of a user's own code that an error went through; "" if it went through none."""
    script = Path(sys.argv[0]).resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        is_own = any(path.is_relative_to(folder) for folder in folders)
        is_installed = "site-packages" in path.parts  # a virtual environment may lie in the folder
        is_ours = path == script or any(path.is_relative_to(own) for own in OWN_PATHS)
        if is_own and not is_installed and not is_ours:
            return f"{path.name}, line {frame.lineno}"
    return ""


def explain_foreign(error):
    """What a user's own network did wrong, and what to correct; "" if the error is not its."""
    for where, folders in FOREIGN.items():
        line = find_line(error, folders)
        if line:
            return f"{shorten_error(error)} ({line}); correct that line of the network"
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.endswith("autograd/graph.py"):  # in none of our ops
            return f"the backward pass failed: {shorten_error(error)}; correct {where}"
    return ""


# Errors that nothing catches
def prepare_program():
    """Let lines appear when they are printed, in any encoding, and let errors end in one line."""
    sys.excepthook = report_uncaught
    if sys.stdout is None:  # closed: no other file may get its number
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # else a notebook's
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def report_uncaught(kind, error, trace):
    """Report in one line what is no bug of ours: Ctrl-C, files, memory, a user's own network.

    Stands in for sys.excepthook. After Ctrl-C the exit code stays the signal's.
    """
    if issubclass(kind, KeyboardInterrupt):
        with contextlib.suppress(OSError):  # the terminal has gone
            print("\ninterrupted; --resume continues from what is finished", file=sys.stderr)
        return
    # errors of files are caught where they are written: this one is of standard output
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS and error.filename is None:
        leave_without_stdout(error)
    if is_out_of_memory(error):
        fail(f"{shorten_error(error)}; {advise_less_memory()}")
    problem = explain_foreign(error)
    if problem:
        fail(problem)
    if isinstance(error, OSError) and error.filename is not None:
        fail(f"{error.filename}: {error.strerror}; check the options that name files")
    sys.__excepthook__(kind, error, trace)


def leave_without_stdout(error):
    """End the program where standard output cannot be written; quietly if its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more at its end
    if isinstance(error, BrokenPipeError):
        raise SystemExit(PIPE_CODE)
    problem = f"standard output cannot be written: {error.strerror}"
    fail(f"{problem}; direct it elsewhere, then continue with --resume")
