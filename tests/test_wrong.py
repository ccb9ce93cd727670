"""The tests of the ops notice small errors: each mutant of wrong/ fails at least one of them.

A mutant is one changed file of kernels/, loaded in place of the real one. Its tests are those of
the op's own file and, for the op, those of test_every_op.py and test_divergences.py, called one by
one until one fails. That test must then pass on the unchanged file, loaded in the same way.
"""

import ast
import importlib
import inspect
import itertools
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_divergences
import test_every_op
import torch
import wrong
from torch.autograd.gradcheck import GradcheckError

import kernels

KERNELS = Path(kernels.__file__).parent
FILES = [found.name for found in pkgutil.iter_modules(wrong.__path__)]
OWN_TESTS = {file: importlib.import_module(f"test_{file}") for file in FILES}
COMMON_TESTS = [test_divergences, test_every_op]
# RuntimeError: a gradient that autograd refuses to compute, as after a change in place
NOTICED = (AssertionError, pytest.fail.Exception, GradcheckError, RuntimeError)
NOTICED_BY = set()  # tests that have noticed a mutant

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="mutants run in the interpreter, which a GPU switches off"
)


def all_mutants():
    rows = []
    for file in FILES:
        for mutant in importlib.import_module(f"wrong.{file}").MUTANTS:
            rows.append(pytest.param(file, mutant, id=f"{file}-{mutant.name}".replace(" ", "-")))
    return rows


def load_ops(folder, monkeypatch):
    """Import all ops again, with the files of `folder` in place of those of kernels/.

    Until the end of the test the package `kernels` and sys.modules hold the new ones. The files lie
    on disk because Triton reads the source of its kernels.
    """
    homes = {name: getattr(kernels, name).__module__ for name in kernels.__all__}
    for name in list(sys.modules):
        if name.startswith("kernels."):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(kernels, name.removeprefix("kernels."), raising=False)
    monkeypatch.setattr(kernels, "__path__", [str(folder), str(KERNELS)])

    for name, home in homes.items():
        module = importlib.import_module(home)
        monkeypatch.setattr(kernels, name, getattr(module, name), raising=False)


@dataclass
class Call:
    """One way in which pytest would call a test: with these parameters, on this backend."""

    test: object
    parameters: dict
    backend: str | None

    def run(self):
        common = importlib.import_module("kernels._common")
        arguments = dict(self.parameters)
        wanted = inspect.signature(self.test).parameters
        if "backend" in wanted:
            arguments["backend"] = self.backend
        if "device" in wanted:
            arguments["device"] = "cpu"

        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "INTERPRET", self.backend != "torch")
            if "monkeypatch" in wanted:
                arguments["monkeypatch"] = patch
            self.test(**arguments)


def parameter_sets(mark):
    """The dicts of parameters that a parametrize mark stands for."""
    names, rows = mark.args
    if isinstance(names, str):
        names = names.split(",")
    for row in rows:
        if isinstance(row, type(pytest.param())):
            values = row.values
        else:
            values = row if len(names) > 1 else (row,)
        yield dict(zip(names, values, strict=True))


def calls_of(test):
    """All ways in which pytest would call `test` on a CPU: none if it needs a GPU or a fixture."""
    marks = getattr(test, "pytestmark", [])
    if any(mark.name == "gpu" for mark in marks):
        return []

    wanted = set(inspect.signature(test).parameters)
    backends = ("torch", "triton") if "backend" in wanted else (None,)
    choices = [list(parameter_sets(mark)) for mark in marks if mark.name == "parametrize"]

    calls = []
    for backend, *chosen in itertools.product(backends, *choices):
        parameters = {name: value for one in chosen for name, value in one.items()}
        if wanted <= {"backend", "device", "monkeypatch", *parameters}:
            calls.append(Call(test, parameters, backend))
    return calls


def functions_in(module):
    return [test for name, test in vars(module).items() if name.startswith("test_")]


def checks_of(file):
    """The suite's checks of the ops in kernels/<file>.py: their own tests and the common ones."""
    checks = []
    for test in functions_in(OWN_TESTS[file]):
        checks += calls_of(test)
    for module in COMMON_TESTS:
        for test in functions_in(module):
            checks += [call for call in calls_of(test) if call.parameters["op"].file == file]
    return checks


def is_in_a_kernel(source, text):
    """Whether a text of a file's source lies in a Triton kernel, which the CPU path never runs."""
    line = source[: source.index(text)].count("\n") + 1
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno:
            return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return False


def sort_checks(checks, mutant, in_kernel):
    """The likeliest to fail first: the mutant's own, of its backend, of one that noticed others."""

    def rank(check):
        is_of_backend = (check.backend == "triton") == in_kernel
        return check.test.__name__ != mutant.test, not is_of_backend, check.test not in NOTICED_BY

    return sorted(checks, key=rank)


def first_to_fail(checks):
    for check in checks:
        try:
            check.run()
        except pytest.skip.Exception:
            continue
        except NOTICED:
            NOTICED_BY.add(check.test)
            return check
    return None


@pytest.mark.parametrize("module", [*OWN_TESTS.values(), *COMMON_TESTS], ids=lambda m: m.__name__)
def test_tests_take_the_ops_from_the_package(module):
    """As kernels.<name>, when they run: what they import by name is never the mutant's."""
    homes = {name: getattr(value, "__module__", None) for name, value in vars(module).items()}
    by_name = [name for name, home in homes.items() if str(home).startswith("kernels.")]
    assert not by_name


@pytest.mark.parametrize(("file", "mutant"), all_mutants())
def test_mutant_is_noticed(file, mutant, tmp_path):
    source = (KERNELS / mutant.file).read_text()
    n_places = source.count(mutant.old)
    assert n_places == 1, f"kernels/{mutant.file} holds the old text {n_places} times"

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    with pytest.MonkeyPatch.context() as patch:
        load_ops(changed, patch)
        in_kernel = is_in_a_kernel(source, mutant.old)
        checks = sort_checks(checks_of(file), mutant, in_kernel)
        assert mutant.test in ("", checks[0].test.__name__)
        check = first_to_fail(checks)
    assert check, "no test fails"

    unchanged = tmp_path / "unchanged"
    unchanged.mkdir()
    (unchanged / mutant.file).write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        load_ops(unchanged, patch)
        check.run()
