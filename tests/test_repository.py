"""What style and README promise about the repository as a whole: sizes, imports, greps, weights, tables, pins."""

import ast
import doctest
import hashlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
# what is no op
SHARED = [
    "__init__.py",
    "_channels.py",
    "_common.py",
    "_logits.py",
    "bench.py",
    "bench_steps.py",
    "contract.py",
    "data.py",
    "figures.py",
]
SHARED += ["augment.py", "distributed.py", "folder.py", "fuse.py", "graphs.py", "pool.py", "quality.py", "shards.py"]
SHARED += ["transitions.py"]
OPS = [path for path in KERNELS if path.name not in SHARED]
TRITON = [*OPS, ROOT / "kernels" / "_channels.py", ROOT / "kernels" / "_logits.py"]
PYTHON = [*SCRIPTS, *KERNELS, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "results").glob("*.py"))]
IMPORT_NAMES = {"Pillow": "PIL", "scikit-learn": "sklearn"}  # where a package is imported under another name
TEACHERS = [f"{data}-{net}" for data in ("mnist", "digits") for net in ("lenet5", "resnet8")]
TEACHERS += ["cifar10-resnet20", "cifar10-wrn-16-1"]
LARGEST_SHIPMENT = 4_000_000  # bytes of all teachers/*.pt together


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.name for path in paths])


def parsed(path):
    return ast.parse(path.read_text())


def calls(tree):
    """All calls as (node, dotted name of what is called, "" in front of the dot where it is no name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                yield node, f"{owner}.{function.attr}"
            elif isinstance(function, ast.Name):
                yield node, function.id


def keywords(call):
    return {k.arg: k.value for k in call.keywords}


def requirements():
    """[(line number from 0, line)] of requirements.txt without blank lines and comments."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [(i, line) for i, line in enumerate(lines) if line.strip() and not line.startswith("#")]


# Scripts


@each(SCRIPTS)
def test_script_length(path):
    assert len(path.read_text().splitlines()) <= 650


@each(PYTHON)
def test_line_length(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 119]
    assert not long, f"lines over 119 columns: {long}"


@each(SCRIPTS)
def test_function_length(path):
    functions = [n for n in ast.walk(parsed(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno - n.lineno >= 60}
    long.pop("main", None)
    assert not long, f"functions over 60 lines: {long}"


@each(SCRIPTS)
def test_script_imports(path):
    packages = [re.match(r"[\w-]+", line).group() for _, line in requirements()]
    allowed = {IMPORT_NAMES.get(name, name) for name in packages} | set(sys.stdlib_module_names) | {"kernels"}
    for node in ast.walk(parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [node.module]
        for name in names:
            assert name.partition(".")[0] in allowed, f"line {node.lineno}: {name} is not in requirements.txt"


@each(SCRIPTS)
def test_last_line(path):
    assert path.read_text().endswith('\n\n\nif __name__ == "__main__":\n    main(tyro.cli(Args))\n')


@each(SCRIPTS)
def test_every_option_is_documented(path):
    (args,) = [n for n in parsed(path).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    fields = [(i, n) for i, n in enumerate(args.body) if isinstance(n, (ast.AnnAssign, ast.Assign))]
    assert fields
    for i, field in fields:
        assert isinstance(field, ast.AnnAssign) and field.value is not None, f"line {field.lineno}: type and default"
        _, _, text = path.read_text().split("\n")[field.end_lineno - 1][field.end_col_offset :].partition("  # ")
        below = args.body[i + 1] if i + 1 < len(args.body) else None
        if not text and isinstance(below, ast.Expr):
            text = getattr(below.value, "value", None)
        assert isinstance(text, str) and text.strip(), f"{field.target.id} has no comment beside nor string below it"
        assert "\n" not in text, f"{field.target.id}: more than one line"


# Kernels


@each(OPS)
def test_op_length(path):
    assert len(path.read_text().splitlines()) <= 420


@each(TRITON)
def test_no_block_pointers_nor_autotune(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("make_block_ptr", "advance", "autotune"), f"line {node.lineno}: {node.attr}"


@each(TRITON)
def test_masked_loads_name_their_other(path):
    for call, name in calls(parsed(path)):
        if name == "tl.load" and (len(call.args) > 1 or "mask" in keywords(call)):
            assert "other" in keywords(call), f"line {call.lineno}: tl.load with a mask and no other="


@each(TRITON)
def test_no_host_sync(path):
    for call, name in calls(parsed(path)):
        assert not name.endswith((".item", ".cpu", ".tolist", ".numpy")), f"line {call.lineno}: {name}"
        assert name != "torch.equal", f"line {call.lineno}: {name}"


@each(TRITON)
def test_program_ids_are_64_bit(path):
    tree = parsed(path)
    casts = [
        call for call, name in calls(tree) if name == ".to" and [ast.unparse(a) for a in call.args] == ["tl.int64"]
    ]
    widened = {call.func.value for call in casts}
    ids = [call for call, name in calls(tree) if name == "tl.program_id"]
    assert ids, "a file of kernels without a kernel"
    for call in ids:
        assert call in widened, f"line {call.lineno}: tl.program_id without .to(tl.int64)"


def test_public_ops_and_references_have_one_signature():
    import kernels

    names = [name for name in kernels.__all__ if getattr(kernels, name).__module__.split(".")[1] + ".py" not in SHARED]
    ops = [name for name in names if not name.endswith("_ref")]
    assert ops and sorted(names) == sorted([*ops, *(f"{name}_ref" for name in ops)])
    for name in ops:
        op, reference = getattr(kernels, name), getattr(kernels, f"{name}_ref")
        assert inspect.signature(op) == inspect.signature(reference), name
        assert op.__module__ == reference.__module__, name


def test_examples_of_public_ops_run():
    import kernels

    for name in kernels.__all__:
        if name.endswith("_ref"):
            continue
        op = getattr(kernels, name)
        environment = dict(vars(sys.modules[op.__module__]))
        tests = [t for t in doctest.DocTestFinder(recurse=False).find(op, name, globs=environment) if t.examples]
        assert tests, f"{name} has no example"
        report = []
        runner = doctest.DocTestRunner(verbose=False)
        for test in tests:
            runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)


# Weights


@each(PYTHON)
def test_pickles_never_run_code(path):
    forbidden = "weights_only=" + "False"
    assert forbidden not in path.read_text().replace(" ", "")
    for call, name in calls(parsed(path)):
        if name == "torch.load":
            value = keywords(call).get("weights_only")
            assert isinstance(value, ast.Constant) and value.value is True, f"line {call.lineno}: {name}"


def read_index():
    path = ROOT / "teachers" / "index.json"
    assert path.exists(), "teachers/index.json is missing; teacher.py --export NAME writes it"
    return json.loads(path.read_text())


def test_all_teachers_are_shipped():
    index = read_index()
    missing = sorted(set(TEACHERS) - set(index))
    assert not missing, f"not shipped: {missing}"
    files = sorted((ROOT / "teachers").glob("*.pt"))
    assert sorted(path.stem for path in files) == sorted(index)
    assert sum(path.stat().st_size for path in files) <= LARGEST_SHIPMENT


@pytest.mark.parametrize("name", TEACHERS)
def test_shipped_teacher(name):
    entry, path = read_index()[name], ROOT / "teachers" / f"{name}.pt"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert re.match(r"python teacher\.py( |$)", entry["command"]), entry["command"]
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = saved.pop("state_dict")
    assert state and all(torch.isfinite(value).all() for value in state.values())
    assert json.loads(json.dumps(saved)) == {k: v for k, v in entry.items() if k != "sha256"}


def test_teachers_readme_names_accuracies_and_digests():
    path = ROOT / "teachers" / "README.md"
    assert path.exists(), "teachers/README.md is missing"
    text = path.read_text()
    for name, entry in read_index().items():
        assert name in text, name
        assert re.search(rf"(?<![\d.]){entry['accuracy']:.2f}(?!\d)", text), f"{name}: {entry['accuracy']:.2f}"
        assert entry["sha256"] in text, f"{name}: {entry['sha256']}"


# Tables, pins, licence


def test_readme_tells_the_length_of_each_script():
    told = dict(re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert told == {path.name: str(len(path.read_text().splitlines())) for path in SCRIPTS}


def generated_tables():
    path = ROOT / "results" / "tables.py"
    assert path.exists(), "results/tables.py is missing; it writes the tables between the README's markers"
    spec = importlib.util.spec_from_file_location("results_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tables(), module.READMES


def shown_tables(path):
    """{name: text between its markers} of one README; a marker without its partner fails."""
    assert path.exists(), f"{path.relative_to(ROOT)} is missing"
    text = path.read_text()
    pairs = re.findall(r"<!-- begin:(\S+) -->\n(.*?)<!-- end:\1 -->", text, re.DOTALL)
    assert 2 * len(pairs) == len(re.findall(r"<!-- (?:begin|end):", text)), f"{path.name}: unpaired or nested markers"
    assert len({name for name, _ in pairs}) == len(pairs), f"{path.name}: a table is shown twice"
    return dict(pairs)


def test_readme_tables_are_those_of_the_results():
    tables, readmes = generated_tables()
    shown = [(path, name, text) for path in readmes for name, text in shown_tables(path).items()]
    for path, name, text in shown:
        assert name in tables, f"{path.relative_to(ROOT)}: no table {name} in results/tables.py"
        assert text.strip("\n") == tables[name].strip("\n"), f"{path.relative_to(ROOT)}: table {name} is out of date"
        assert not re.search(r"@[A-Z]{2,}", path.read_text()), f"{path.relative_to(ROOT)}: a figure is still to come"
    unused = sorted(set(tables) - {name for _, name, _ in shown})
    assert not unused, f"results/tables.py makes tables that no README shows: {unused}"


def test_readme_is_short():
    path = ROOT / "README.md"
    assert path.exists(), "README.md is missing"
    assert len(path.read_text().splitlines()) <= 200


def test_requirements_are_pinned_with_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert requirements()
    for i, line in requirements():
        pinned, _, reason = line.partition("#")
        assert re.fullmatch(r"[\w-]+==\d[\w.+]*(\s*;.*)?", pinned.strip()), f"not pinned: {line}"
        assert reason.strip() or (i and lines[i - 1].startswith("# ")), f"no reason: {line}"


def test_licence():
    assert "MIT License" in (ROOT / "LICENSE").read_text()


def test_no_traces_of_the_workplace():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout: no list of files")
    forbidden = ["/work" + "/", "/tmp/bash" + "_jobs", "pypi" + ".org"]
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # pictures, weights
            continue
        for trace in forbidden:
            assert trace not in text, f"{name} contains {trace}"
