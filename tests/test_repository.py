"""What style and README promise of the repository as a whole: imports, lines, options, weights."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def list_files(*patterns):
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


PARTS = list_files(
    "augmentations.py", "channels.py", "tasks.py"
)  # of one script each, beside it because they are long
SCRIPTS = [path for path in list_files("*.py") if path not in PARTS]
KERNELS = list_files("kernels/*.py")
HARNESS = list_files("harness/*.py")
BENCH = list_files("bench/*.py")
RESULTS = list_files("results/*.py")
CODE = [*SCRIPTS, *PARTS, *KERNELS, *HARNESS, *BENCH, *RESULTS]
PYTHON = [*CODE, *list_files("tests/*.py", "tests/wrong/*.py")]
# files that hold Triton kernels
TRITON = [path for path in KERNELS if "@triton.jit" in path.read_text()]
# ops: all of kernels/ but what they share, and what works on networks and steps
NO_OPS = ("__init__.py", "cuda_graph.py", "fuse_batchnorm.py")
OPS = [path for path in KERNELS if path.name not in NO_OPS and path.name[0] != "_"]
# packages that are imported under another name
IMPORT_NAMES = {"Pillow": "PIL", "scikit-learn": "sklearn"}
LARGEST_SHIPMENT = 4_000_000  # bytes of all teachers/*.pt together


def each(paths):
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


def parse(path):
    return ast.parse(path.read_text())


def find_calls(tree):
    """All calls as (node, dotted name of what is called); "" before the dot where it is no name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                yield node, f"{owner}.{function.attr}"
            elif isinstance(function, ast.Name):
                yield node, function.id


def get_keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def find_imports(tree):
    """(node, first part of the module's name) of all imports, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node, node.module.partition(".")[0]


def read_requirements():
    """[(line number from 0, line)] of requirements.txt without blank lines and comments."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [(i, line) for i, line in enumerate(lines) if line.strip() and not line.startswith("#")]


def list_packages():
    """What requirements.txt installs, by the names that it is imported under."""
    names = [re.match(r"[\w-]+", line).group() for _, line in read_requirements()]
    return {IMPORT_NAMES.get(name, name) for name in names}


# Imports go one way: kernels, then harness, then scripts, then bench, results and tests

OWN_PACKAGES = {
    "kernels": {"kernels"},
    "harness": {"harness", "kernels"},
    "script": {"harness", "kernels"},
    "bench": {"bench", "harness", "kernels", *(path.stem for path in SCRIPTS)},
    "results": {"bench", "harness", "kernels", *(path.stem for path in SCRIPTS)},
}
# packages that are not in requirements.txt; who imports them says what to install
OPTIONAL = {
    "harness/weights.py": {"safetensors"},
    "harness/networks.py": {"teachers"},  # inside the function that builds one of them
    "results/architectures.py": {"timm", "torchvision"},
    "role_kd.py": {"augmentations"},  # its part
    "continual.py": {"tasks"},  # its part
    "pruning.py": {"channels"},  # its part
}


@each(CODE)
def test_imports_go_one_way(path):
    """Whoever copies a method takes its script, its part if any, kernels/ and harness/."""
    folder = "script" if path.parent == ROOT else path.parent.name
    allowed = OWN_PACKAGES[folder] | list_packages() | set(sys.stdlib_module_names)
    allowed |= OPTIONAL.get(str(path.relative_to(ROOT)), set())
    for node, name in find_imports(parse(path)):
        assert name in allowed, f"line {node.lineno}: {path.name} imports {name}"


@each(HARNESS)
def test_the_harness_holds_no_training_loop(path):
    for call, name in find_calls(parse(path)):
        is_training = name.endswith((".backward", ".step"))
        assert not is_training, f"line {call.lineno}: {name}"


@each([*SCRIPTS, *PARTS, *KERNELS, *HARNESS])
def test_nothing_runs_at_import(path):
    """A module's statements define things. A script's last one starts it."""
    definitions = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
    *statements, last = parse(path).body
    if path in SCRIPTS:
        assert ast.unparse(last).startswith("if __name__ == '__main__':\n    main(")
        assert len(last.body) == 1 and not last.orelse
        assert path.read_text().count("__name__") == 1
    else:
        statements.append(last)
    for node in statements:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_optional_import = isinstance(node, ast.Try) and isinstance(node.body[0], ast.Import)
        is_fine = isinstance(node, (*definitions, ast.AnnAssign)) or is_docstring
        assert is_fine or is_optional_import, f"line {node.lineno}: {ast.unparse(node)[:60]}"


# A line does one thing


def find_crowded_assignments(tree):
    """a, b, c = x, y, z: three facts in a line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and len(target.elts) >= 3:
                    yield node


def find_hidden_assignments(tree):
    """(name := …) in a condition or a comprehension."""
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree):
        place = node if isinstance(node, comprehensions) else None
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            place = node.test
        if place is not None:
            yield from (part for part in ast.walk(place) if isinstance(part, ast.NamedExpr))


def find_conditional_arguments(tree):
    """f(a if b else c)."""
    for call, _ in find_calls(tree):
        arguments = [*call.args, *get_keywords(call).values()]
        yield from (argument for argument in arguments if isinstance(argument, ast.IfExp))


def find_merged_dicts(tree):
    """a | {…} | b: who reads it must merge to know a value."""

    def list_operands(node):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return [*list_operands(node.left), *list_operands(node.right)]
        return [node]

    for node in ast.walk(tree):
        operands = list_operands(node)
        is_dict = [isinstance(part, ast.Dict) for part in operands]
        is_call = [isinstance(part, ast.Call) and ast.unparse(part.func) for part in operands]
        if len(operands) >= 3 and (any(is_dict) or "dict" in is_call):
            yield node


def find_set_attributes(tree):
    """setattr(…): a search for the attribute's name finds nothing."""
    yield from (call for call, name in find_calls(tree) if name == "setattr")


def find_bags(tree):
    """SimpleNamespace: an object whose attributes grow elsewhere."""
    for call, name in find_calls(tree):
        if name.rpartition(".")[2] == "SimpleNamespace":
            yield call


EXCEPTIONS = {  # (file, rule): why
    ("bench/ops.py", find_set_attributes): "a sweep tries values of a module's constant",
}


@each(CODE)
@pytest.mark.parametrize(
    "find",
    [
        find_crowded_assignments,
        find_hidden_assignments,
        find_conditional_arguments,
        find_merged_dicts,
        find_set_attributes,
        find_bags,
    ],
    ids=lambda find: find.__name__.removeprefix("find_"),
)
def test_a_line_does_one_thing(path, find):
    if (str(path.relative_to(ROOT)), find) in EXCEPTIONS:
        assert list(find(parse(path)))  # an exception that is no longer needed goes
        return
    found = [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in find(parse(path))]
    assert not found, "\n".join([find.__doc__, *found])


def test_these_rules_find_what_they_forbid():
    def count(find, text):
        return len(list(find(ast.parse(text))))

    assert count(find_crowded_assignments, "a, b, c = 1, 2, 3\na, b = 1, 2\na, b, c = f()") == 1
    assert count(find_hidden_assignments, "if x and (y := f()):\n    pass") == 1
    assert count(find_hidden_assignments, "z = [y for x in a if (y := f(x))]\ny = (x := 1)") == 1
    assert count(find_conditional_arguments, "f(a if b else c, k=a if b else c)\nx = a if b else c")
    assert count(find_merged_dicts, "x = a | {'b': 1} | c\ny = a | dict(b=1)") == 1
    assert count(find_merged_dicts, "def f(x: int | str | None): pass") == 0
    assert count(find_set_attributes, "setattr(x, 'a', 1)") == 1
    assert count(find_bags, "x = types.SimpleNamespace(a=1)") == 1


# Options


OPTION_FILES = [ROOT / "harness/run.py", ROOT / "harness/sources.py"]  # what scripts share


def find_option_classes(path):
    """The dataclasses of options in a file."""
    option_classes = {"RunOptions", "TeacherOptions", "MethodOptions", "SourceOptions"}
    for node in parse(path).body:
        bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
        is_options = option_classes & {*bases, getattr(node, "name", "")}
        if isinstance(node, ast.ClassDef) and (is_options or node.name == "Args"):
            yield node


def list_options(path):
    """All options that a script takes, those of its base classes included, without "--"."""
    sources = {node.name: node for path in OPTION_FILES for node in find_option_classes(path)}
    names = set()
    (args,) = find_option_classes(path)
    classes = [args]
    while classes:
        node = classes.pop()
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        names |= {field.target.id.replace("_", "-") for field in fields}
        classes += [sources[ast.unparse(base)] for base in node.bases]
    return names


@each([*SCRIPTS, *OPTION_FILES])
def test_every_option_has_a_type_a_default_and_an_explanation(path):
    classes = list(find_option_classes(path))
    assert classes
    for node in classes:
        for i, field in enumerate(node.body):
            assert not isinstance(field, ast.Assign), f"line {field.lineno}: no type"
            if not isinstance(field, ast.AnnAssign):
                continue
            name = field.target.id
            assert field.value is not None, f"{name} has no default"
            assert ast.unparse(field.value) != "None", f"{name} has no value to show"
            below = node.body[i + 1] if i + 1 < len(node.body) else None
            text = getattr(getattr(below, "value", None), "value", None)
            assert isinstance(below, ast.Expr) and isinstance(text, str), f"{name}: no string below"
            assert text.strip().endswith((".", "…")), f"{name}: {text}"


def find_commands(path):
    """(script, options without "--") of every command in a text, joined where lines end in a \\."""
    text = path.read_text().replace("\\\n", " ")
    text = text.replace("python -m bench", "python bench/__main__.py")
    for command in re.findall(r"(?<![\w./])([\w/]+\.py(?: [^`\n#]*)?)", text):
        script, *words = command.split()
        if ROOT / script in [*SCRIPTS, ROOT / "bench/__main__.py"]:
            yield script, [word[2:] for word in words if word.startswith("--")]


@each(list_files("*.md", "*/README.md", "results/*.md"))
def test_commands_in_texts_name_options_that_exist(path):
    for script, options in find_commands(path):
        known = list_options(ROOT / script)
        known |= {f"no-{name}" for name in known} | {"help"}
        for option in options:
            assert option.partition("=")[0] in known, f"{script} --{option}"


def test_the_readmes_commands_can_be_pasted():
    text = (ROOT / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("    ") and ".py" in line]
    assert commands
    for line in commands:
        command = line.partition("#")[0]
        assert "[" not in command and "…" not in command, line


def test_the_readmes_example_runs(monkeypatch):
    from kernels import _common

    monkeypatch.setattr(_common, "INTERPRET", False)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


@each(list_files("*.md", "*/README.md", "results/*.md"))
def test_links_of_texts_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


# Kernels


@each(OPS)
def test_an_op_has_a_test_file_and_rows_in_the_benchmark(path):
    assert (ROOT / f"tests/test_{path.stem}.py").exists()
    assert path.stem in (ROOT / "bench/ops.py").read_text()


@each(TRITON)
def test_kernels_have_neither_block_pointers_nor_autotune_nor_atomics(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            forbidden = ("make_block_ptr", "advance", "autotune", "atomic_add")
            assert node.attr not in forbidden, f"line {node.lineno}: {node.attr}"


@each(TRITON)
def test_masked_loads_name_their_other(path):
    for call, name in find_calls(parse(path)):
        if name == "tl.load" and (len(call.args) > 1 or "mask" in get_keywords(call)):
            assert "other" in get_keywords(call), f"line {call.lineno}: tl.load without other="


@each(TRITON)
def test_ops_never_make_the_host_wait(path):
    forbidden = (".item", ".cpu", ".tolist", ".numpy", "torch.equal")
    for call, name in find_calls(parse(path)):
        assert not name.endswith(forbidden), f"line {call.lineno}: {name}"


@each(TRITON)
def test_program_ids_are_64_bit(path):
    """The product of a 32-bit number and a stride can overflow."""
    tree = parse(path)
    casts = [call for call, name in find_calls(tree) if name == ".to"]
    widened = [call.func.value for call in casts if ast.unparse(call.args[0]) == "tl.int64"]
    ids = [call for call, name in find_calls(tree) if name == "tl.program_id"]
    for call in ids:
        assert call in widened, f"line {call.lineno}: tl.program_id without .to(tl.int64)"


def test_there_are_kernels_to_look_at():
    assert len(OPS) >= 8 and {path.stem for path in OPS} <= {*(path.stem for path in KERNELS)}
    assert len(TRITON) >= 8
    calls = [name for path in TRITON for _, name in find_calls(parse(path))]
    assert calls.count("tl.program_id") >= 8 and calls.count("tl.load") >= 8


# Weights


@each(PYTHON)
def test_pickles_never_run_code(path):
    for call, name in find_calls(parse(path)):
        if name == "torch.load":
            value = get_keywords(call).get("weights_only")
            is_safe = isinstance(value, ast.Constant) and value.value is True
            is_left_out = value is None and path not in CODE  # PyTorch's own default is safe
            assert is_safe or is_left_out, f"line {call.lineno}: {name}"


def read_index():
    return json.loads((ROOT / "teachers/index.json").read_text())


def test_all_teachers_are_shipped():
    names = {f"{data}-{net}" for data in ("mnist", "digits") for net in ("lenet5", "resnet8")}
    names |= {"cifar10-resnet20", "cifar10-wrn-16-1", "digits-resnet8-0-4"}
    files = list_files("teachers/*.pt")
    assert {path.stem for path in files} == set(read_index()) == names
    assert sum(path.stat().st_size for path in files) <= LARGEST_SHIPMENT


@pytest.mark.parametrize("name", read_index())
def test_a_shipped_teacher_is_what_the_index_says(name):
    entry = read_index()[name]
    path = ROOT / f"teachers/{name}.pt"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.pop("sha256")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = saved.pop("state_dict")
    assert state and all(value.isfinite().all() for value in state.values())
    assert json.loads(json.dumps(saved)) == entry
    script, *options = entry["command"].removeprefix("python ").split()
    assert script == "teacher.py"
    named = [word[2:] for word in options if word.startswith("--")]
    assert set(named) <= list_options(ROOT / script)


def test_the_teachers_readme_names_every_accuracy():
    text = (ROOT / "teachers/README.md").read_text()
    for name, entry in read_index().items():
        assert name in text
        assert re.search(rf"(?<![\d.]){entry['accuracy']:.2f}(?!\d)", text), name


# Pins, licence, traces


def test_requirements_are_pinned_with_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert read_requirements()
    for i, line in read_requirements():
        pinned, _, reason = line.partition("#")
        assert re.fullmatch(r"[\w-]+==\d[\w.+]*(\s*;.*)?", pinned.strip()), f"not pinned: {line}"
        is_explained = reason.strip() or (i and lines[i - 1].startswith("# "))
        assert is_explained, f"no reason: {line}"


def test_every_pinned_package_is_used():
    """pytest-xdist and ruff are used by commands alone."""
    used = {name for path in PYTHON for _, name in find_imports(parse(path))}
    assert list_packages() - used == {"pytest-xdist", "ruff"}


def test_the_licence_is_there():
    assert "MIT License" in (ROOT / "LICENSE").read_text()


def list_tracked():
    command = ["git", "ls-files", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout: no list of files")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_tracked_files_name_no_machine():
    """No folder of one machine, no account, no address inside a network."""
    forbidden = [r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w"]
    forbidden += [r"\b(?:10|192\.168|172\.16)\.\d+\.\d+\.?\d*\b(?=[:/])", r"pypi\.org/simple"]
    own = Path(__file__).resolve()
    for path in list_tracked():
        if not path.is_file() or path == own:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # pictures, weights
            continue
        for pattern in forbidden:
            match = re.search(pattern, text)
            assert match is None, f"{path.relative_to(ROOT)}: {match.group()}"


def test_tracked_files_are_small_and_none_is_generated():
    for path in list_tracked():
        if path.is_file():
            assert path.stat().st_size < 2_000_000, path.name
            assert path.suffix not in (".pyc", ".npz", ".part"), path.name


def test_triton_is_imported_only_where_it_can_run():
    """It takes 0.3 s, and on a machine without a GPU nobody needs it."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this PyTorch is built for GPUs")
    code = "import sys, kernels; print('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert found == "False\n"
