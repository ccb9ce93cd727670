"""bench/gpu_day.sh: its commands exist, its limits add up, and all of it runs on a CPU in small."""

import csv
import importlib
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import tyro

from bench import __main__ as bench_main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench/gpu_day.sh"
# seconds that a part may take
LIMITS = {"check": 170, "ops": 130, "steps": 290, "runs": 180}


def run_script(*arguments):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """[(name, seconds, words of the command)] of the whole day; nothing is run or written."""
    out = tmp_path_factory.mktemp("day") / "out"
    done = run_script(out, "plan")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    commands = []
    for line in done.stdout.splitlines():
        name, seconds, *words = shlex.split(line)
        commands.append((name, int(seconds), words))
    return commands


def test_each_part_is_planned(plan):
    names = [name for name, _, _ in plan]
    assert len(set(names)) == len(names)
    for part in ("check-gpu", "check-op", "ops", "steps", "runs"):
        assert any(name.startswith(part) for name in names), part


def test_each_command_is_accepted_by_its_program(plan):
    for name, _, words in plan:
        program = words[1]
        if program.endswith(".py"):
            module = importlib.import_module(program.removesuffix(".py"))
            tyro.cli(module.Args, args=words[2:])
        elif words[2] == "bench":
            tyro.cli(bench_main.Args, args=words[3:])
        else:
            assert words[1:3] == ["-m", "pytest"], name
            (path,) = [word for word in words if word.startswith("tests/")]
            assert (ROOT / path).is_file()


def test_every_file_with_tests_of_a_gpu_is_checked(plan):
    checked = {words[-1] for name, _, words in plan if name.startswith("check")}
    marked = [path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text()]
    assert {f"tests/{path.name}" for path in marked if path != Path(__file__)} <= checked


def test_the_limits_of_a_part_are_those_it_states(plan):
    text = SCRIPT.read_text()
    assert {name: int(n) for name, n in re.findall(r"begin_part (\w+) (\d+)", text)} == LIMITS
    for name, seconds, _ in plan:
        part = "steps" if name == "once" else name.partition("-")[0]
        assert seconds <= LIMITS[part]
    assert sum(LIMITS.values()) <= 13 * 60  # of the 15 minutes; starts and transfers take the rest
    readme = (ROOT / "bench/README.md").read_text()
    for part, seconds in LIMITS.items():
        assert re.search(rf"\| `{part}` \| {seconds} s \|", readme), part


@pytest.mark.parametrize("arguments", [[], ["out"], ["out", "chekc"]])
def test_what_it_does_not_know_is_refused(arguments, tmp_path):
    arguments = [
        str(tmp_path / argument) if argument == "out" else argument for argument in arguments
    ]
    done = run_script(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_part_that_fails_or_runs_too_long_does_not_stop_the_next(tmp_path):
    """The script's own functions, with other commands."""
    text = SCRIPT.read_text()
    functions = text[: text.index("check() {")]
    day = tmp_path / "bench/day.sh"
    day.parent.mkdir()
    (tmp_path / "tests").mkdir()
    commands = """
part_end=$((SECONDS + 60))
run first 9 sh -c 'echo begun; exit 3'
run second 1 sh -c 'echo line; sleep 30'
part_end=$((SECONDS + 1))
run third 9 sleep 30
run fourth 9 echo never
part_end=$((SECONDS + 9))
run fifth 9 echo well
echo "$n_failed failed"
"""
    day.write_text(functions + commands)
    out = tmp_path / "out"
    out.mkdir()
    start = time.monotonic()
    done = subprocess.run(["bash", day, out, "x"], capture_output=True, text=True)
    assert time.monotonic() - start < 20
    assert (out / "second.txt").read_text() == "line\n"
    assert "3 failed" in done.stdout
    lines = (out / "summary.txt").read_text().splitlines()
    ends = [re.sub(r", \d+ s$", "", line) for line in lines]
    assert ends == [
        "first: exit code 3",
        "second: exit code 124, out of time",
        "third: exit code 124, out of time",
        "fourth: no time left",
        "fifth: exit code 0",
    ]


@pytest.mark.slow
def test_the_day_runs_on_a_cpu_in_small(tmp_path):
    out = tmp_path / "out"
    start = time.monotonic()
    done = run_script(out, "rehearse")
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert time.monotonic() - start < 120
    summary = (out / "summary.txt").read_text()
    assert summary.count("exit code 0") == 7
    rows = {}
    for name in ("ops", "steps", "released"):
        with open(out / f"{name}.csv") as file:
            rows[name] = list(csv.DictReader(file))
    assert {row["op"] for row in rows["ops"]} >= {"bn_act_moments", "kl_divergence"}
    assert len(rows["released"]) == 6
    assert all(row["ours_ms"] for table in rows.values() for row in table)
    assert (out / "runs/zskt/student.pt").is_file()
