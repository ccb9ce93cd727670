"""Deliberate copies between the scripts are byte-equal and marked; `python tests/test_copies.py --fix` mends drift.

A copy is one top-level definition with the line `# Copied from NAME.py` right above it (above its decorators). Any
name that two scripts define is either such a copy or stands in OWN with a reason.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"# Copied from (\w+\.py)")
MAX_LINES = 60
OWN = {  # defined in several scripts, and meant to differ
    "Args": "the settings of one method",
    "main": "the run of one method",
    "check_args": "refuses impossible values of that script's own Args",
    "SETTINGS": "one method's settings by data set",
    "choose_setting": "lays that script's options over its SETTINGS",
    "NETWORKS": "the networks of one paper",
    "load": "load_network with that script's networks",
    "Run": "one method's state, rows, checkpoint and pictures",
    "PAPER": "one paper's values",
    "OURS": "one method's values for small grey images",
    "Generator": "one paper's generator",
    "disagreement": "one paper's divergence of teacher and student",
    "generator_step": "one method's step",
    "student_step": "one method's step",
    "moment_loss": "one method's distance of moments",
    "Distiller": "all networks of one method with their optimisers",
}


@dataclass
class Definition:
    names: tuple  # what it binds: one name, or several of a tuple assignment
    first: int  # line of the first decorator or of the definition, from 0
    last: int  # line after its end
    lines: list
    mark: str | None  # file that it is marked as copied from


def definitions(path):
    """All top-level functions, classes and assignments of a script."""
    lines = path.read_text().split("\n")
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = (node.name,)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            names = tuple(n.id for n in bound if isinstance(n.ctx, ast.Store))
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        mark = MARK.fullmatch(lines[first - 1]) if first else None
        found.append(
            Definition(names, first, node.end_lineno, lines[first : node.end_lineno], mark.group(1) if mark else None)
        )
    return found


def compare(folder):
    """Returns (problems, replacements): lines of text, and {script: [(copy, lines of the original)]}."""
    scripts = {path.name: definitions(path) for path in sorted(Path(folder).glob("*.py"))}
    problems, replacements = [], {}
    for script, found in scripts.items():
        above = {d.first - 1 for d in found if d.mark}
        for i, line in enumerate((Path(folder) / script).read_text().split("\n")):
            if re.match(r"\s*#+\s*copied from", line, re.IGNORECASE) and i not in above:
                problems.append(f"{script}:{i + 1}: stray mark, not right above a top-level definition")
        for copy in (d for d in found if d.mark):
            where = f"{script}:{copy.first + 1}: {', '.join(copy.names)}"
            original = next((d for d in scripts.get(copy.mark, []) if copy.names and d.names == copy.names), None)
            if original is None or copy.mark == script:
                problems.append(f"{where}: unknown original in {copy.mark}")
            elif original.mark:
                problems.append(f"{where}: a copy of a copy; {copy.mark} has it from {original.mark}")
            elif len(original.lines) > MAX_LINES:
                problems.append(f"{where}: a copy of {len(original.lines)} lines, more than {MAX_LINES}")
            elif copy.lines != original.lines:
                problems.append(f"{where}: differs from {copy.mark}:{original.first + 1}; --fix rewrites it")
                replacements.setdefault(script, []).append((copy, original.lines))
    homes = {}
    for script, found in scripts.items():
        for name in {name for d in found if not d.mark for name in d.names}:
            homes.setdefault(name, []).append(script)
    for name, where in sorted(homes.items()):
        if len(where) > 1 and name not in OWN:
            problems.append(f"{name}: defined in {' and '.join(where)}; mark the copy or give a reason in OWN")
    return problems, replacements


def fix(folder):
    """Rewrite every drifted copy from its original; returns the scripts that changed."""
    _, replacements = compare(folder)
    for script, changes in replacements.items():
        path = Path(folder) / script
        lines = path.read_text().split("\n")
        for copy, original in sorted(changes, key=lambda change: -change[0].first):  # from the end: numbers stay true
            lines[copy.first : copy.last] = original
        path.write_text("\n".join(lines))
    return sorted(replacements)


def test_repository():
    problems, _ = compare(ROOT)
    assert not problems, "\n" + "\n".join(problems)


ORIGINAL = '''"""Script a."""

import functools

LIMIT, STEP = 3, 4


@functools.cache
def shared(x):
    """A function worth reading in place."""
    return x + 1


class Box:
    size = 1


def main():
    pass
'''
COPY = '''"""Script b."""

import functools


# Copied from a.py
@functools.cache
def shared(x):
    """A function worth reading in place."""
    return x + 1


# Copied from a.py
LIMIT, STEP = 3, 4


# Copied from a.py
class Box:
    size = 1


def main():
    return "another"
'''


MARKED = "# Copied from a.py\n@functools.cache\n"


def folder_with(tmp_path, copy, original=ORIGINAL):
    (tmp_path / "a.py").write_text(original)
    (tmp_path / "b.py").write_text(copy)
    return tmp_path


def test_true_copies_pass(tmp_path):
    assert compare(folder_with(tmp_path, COPY)) == ([], {})
    assert fix(tmp_path) == [] and (tmp_path / "b.py").read_text() == COPY


@pytest.mark.parametrize(
    "old, new",
    [
        pytest.param("return x + 1", "return x + 2", id="body"),
        pytest.param("in place.", "in  place.", id="docstring"),
        pytest.param("@functools.cache\n", "", id="decorator"),
        pytest.param("return x + 1", "return x + 1\n    # a comment\n    x = 2", id="longer"),
        pytest.param("STEP = 3, 4", "STEP = 3, 5", id="assignment"),
        pytest.param("size = 1", "size = 1  # why", id="comment"),
    ],
)
def test_mismatch_is_found_and_mended(tmp_path, old, new):
    assert old in COPY
    (problem,), _ = compare(folder_with(tmp_path, COPY.replace(old, new)))
    assert "b.py:" in problem and "differs from a.py" in problem
    assert fix(tmp_path) == ["b.py"]
    assert (tmp_path / "b.py").read_text() == COPY and (tmp_path / "a.py").read_text() == ORIGINAL


def test_fix_mends_several_of_one_file(tmp_path):
    drifted = COPY.replace("x + 1", "(\n        x + 1\n    )").replace("size = 1", "size = 2\n    more = 3")
    assert len(compare(folder_with(tmp_path, drifted))[0]) == 2
    fix(tmp_path)
    assert (tmp_path / "b.py").read_text() == COPY


@pytest.mark.parametrize(
    "old, new, expected",
    [
        pytest.param("Box", "Crate", "Crate: unknown original in a.py", id="unknown-name"),
        pytest.param("a.py\nclass", "c.py\nclass", "Box: unknown original in c.py", id="unknown-file"),
        pytest.param("a.py\nclass", "b.py\nclass", "Box: unknown original in b.py", id="of-itself"),
        pytest.param("# Copied from a.py\nclass", "# Copied from a.py\n\nclass", "stray mark", id="blank-line"),
        pytest.param(MARKED, "@functools.cache\n# Copied from a.py\n", "stray mark", id="below-decorator"),
        pytest.param('    return "', '    # Copied from a.py\n    return "', "stray mark", id="inside"),
        pytest.param("import functools", "# Copied from a.py\nimport functools", "stray mark", id="import"),
        pytest.param("# Copied from a.py\nclass", "# copied from a.py:\nclass", "stray mark", id="misspelt"),
        pytest.param("# Copied from a.py\nclass", "class", "Box: defined in a.py and b.py", id="unmarked-double"),
        pytest.param("# Copied from a.py\nLIMIT, STEP", "LIMIT", "LIMIT: defined in a.py and b.py", id="constant"),
    ],
)
def test_other_faults_are_found_and_left_alone(tmp_path, old, new, expected):
    assert COPY.count(old) >= 1
    changed = COPY.replace(old, new, 1)
    problems, _ = compare(folder_with(tmp_path, changed))
    assert any(expected in problem for problem in problems), problems
    assert fix(tmp_path) == [] and (tmp_path / "b.py").read_text() == changed


def test_copy_of_a_copy_and_length(tmp_path):
    folder_with(tmp_path, COPY)
    (tmp_path / "c.py").write_text("# Copied from b.py\nclass Box:\n    size = 1\n")
    (problem,), _ = compare(tmp_path)
    assert problem == "c.py:2: Box: a copy of a copy; b.py has it from a.py"
    (tmp_path / "c.py").unlink()
    long = "class Box:\n" + MAX_LINES * "    size = 1\n"
    short = "class Box:\n    size = 1\n"
    folder_with(tmp_path, COPY.replace(short, long), ORIGINAL.replace(short, long))
    (problem,), _ = compare(tmp_path)
    assert "a copy of 61 lines" in problem


def test_as_a_program(tmp_path):
    (tmp_path / "tests").mkdir()
    program = tmp_path / "tests" / "test_copies.py"
    program.write_text(Path(__file__).read_text())
    folder_with(tmp_path, COPY.replace("return x + 1", "return x + 2"))
    for options, code, output in ([], 1, "differs from a.py"), (["--fix"], 0, "rewritten: b.py"), ([], 0, ""):
        done = subprocess.run([sys.executable, program, *options], capture_output=True, text=True)
        assert done.returncode == code and output in done.stdout + done.stderr
    assert (tmp_path / "b.py").read_text() == COPY


def test_every_exception_has_a_reason():
    assert all(len(reason) > 10 for reason in OWN.values())


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--fix"]):
        sys.exit("usage: python tests/test_copies.py [--fix]")
    if sys.argv[1:]:
        print("rewritten:", ", ".join(fix(ROOT)) or "nothing")
    remaining = compare(ROOT)[0]
    sys.exit("\n".join(remaining) or None)
