"""results/which.py: commands that their scripts take, a grid that goes on where it was."""

import json
import signal
import sys

import pytest
from PIL import Image
from test_results import load_program, refuse
from test_settings import METHODS

which = load_program("which")


@pytest.mark.parametrize("data", which.SETTINGS)
@pytest.mark.parametrize("arm", which.ARMS)
def test_every_command_is_one_that_its_script_takes(tmp_path, monkeypatch, arm, data):
    monkeypatch.setattr(which, "make_source", lambda *args: tmp_path)
    words = which.make_command(arm, data, "data", 3, tmp_path / "out")
    script = METHODS[which.ARMS[arm].script.removesuffix(".py")]
    monkeypatch.setattr(sys, "argv", words[1:])
    args = script.parse_args(script.PRESETS, script.choose_preset)
    assert args.seed == 3 and args.resume and args.out == str(tmp_path / "out")
    setting = which.SETTINGS[data]
    assert args.teacher == setting.teacher
    assert args.setting == setting.presets.get(which.ARMS[arm].script, data)


SCRIPT = """  # the first run of all is broken off after its second row
import json, sys, time
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
is_broken = not Path("broken").exists()
Path("broken").touch()
with open(out / "starts", "a") as file:
    file.write("x")


def write_rows(*accuracies):
    rows = [json.dumps({"eval/acc": accuracy}) + "\\n" for accuracy in accuracies]
    (out / "metrics.jsonl").write_text("".join(rows))
    time.sleep(0.5)


if is_broken:
    write_rows(50.0, 60.0)
    sys.exit("broken off")
write_rows(50.0)
write_rows(50.0, 90.0)
result = {"student_accuracy": 90.0, "seconds": 7.0, "device_name": "1 thread", "versions": {}}
(out / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Function that runs two arms and two seeds of digits with the script above."""
    for name in ("results", "runs"):
        (tmp_path / name).mkdir()
    arms = {name: which.ARMS[name] for name in ("zskt", "noise")}
    for arm in arms.values():
        (tmp_path / arm.script).write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(which, "ROOT", tmp_path)
    monkeypatch.setattr(which, "ARMS", arms)
    monkeypatch.setattr(which.SETTINGS["digits"], "seeds", (0, 1))

    def run_grid(**options):
        which.main("digits", **{"arms": tuple(arms), **options})

    return run_grid


def test_a_grid_goes_on_where_it_was_and_runs_nothing_twice(grid, tmp_path, capsys):
    line = refuse(capsys, lambda: grid(jobs=1))
    assert "zskt-seed0 ended with 1; read runs/which/digits/zskt-seed0.log" in line
    grid()
    grid()
    saved = json.loads((tmp_path / "results/which-digits.json").read_text())
    assert Image.open(tmp_path / "results/which-digits.png").size == (900, 550)
    assert list(saved["arms"]) == ["zskt", "noise"]
    for arm, found in saved["arms"].items():
        assert found["accuracy"] == [90.0, 90.0] and found["seconds"] == [7.0, 7.0]
        assert found["seeds"] == [0, 1] and found["device_name"] == "1 thread"
        for seed, curve in enumerate(found["curves"]):
            first, last = curve
            assert (first[1], last[1]) == (50.0, 90.0)
            assert 0 < first[0] <= last[0]
            starts = (tmp_path / f"runs/which/digits/{arm}-seed{seed}/starts").read_text()
            assert starts == ("xx" if (arm, seed) == ("zskt", 0) else "x")
    command = saved["arms"]["noise"]["command"]
    assert "--images runs/which/digits/noise-1437-images-seed0" in command


def test_a_run_that_goes_on_counts_its_seconds_on(grid, tmp_path):
    """From its last checkpoint; what came after that is done again."""
    out = tmp_path / "runs/which/digits/zskt-seed0"
    out.mkdir(parents=True)
    (out / "seconds.txt").write_text("100.0\n")
    out.with_suffix(".curve.json").write_text("[[60, 50.0], [120, 60.0]]")
    run = which.start_run("zskt", "digits", "data", 0)
    assert 100 <= which.time.time() - run.start < 110
    assert run.curve == [[60, 50.0]]
    run.process.wait()


def test_a_part_of_a_grid_leaves_the_table_as_it_is(grid, tmp_path, capsys):
    (tmp_path / "broken").touch()
    grid(arms=("zskt",), seeds=(0,))
    assert "zskt              90.00 %       7 s" in capsys.readouterr().out
    grid(seeds=(0,))
    assert not list((tmp_path / "results").iterdir())
    assert "--arms: expected some of zskt, noise" in refuse(capsys, lambda: grid(arms=("zsk",)))


def test_a_run_of_other_options_is_refused(grid, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").touch()
    grid(arms=("zskt",), seeds=(0,))
    monkeypatch.setitem(which.SETTINGS["digits"].options, "zskt", "--pseudo-batches 3")
    line = refuse(capsys, lambda: grid(arms=("zskt",), seeds=(0,)))
    assert "zskt-seed0 is of other options; delete runs/which/digits/zskt-seed0*" in line


def test_an_interrupt_ends_the_runs_too(grid, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").touch()
    started = []

    def interrupt(seconds):
        raise KeyboardInterrupt

    def start_run(*arguments):
        started.append(start(*arguments))
        return started[-1]

    start = which.start_run
    monkeypatch.setattr(which, "start_run", start_run)
    monkeypatch.setattr(which.time, "sleep", interrupt)
    line = refuse(capsys, lambda: grid(arms=("zskt",)))
    assert "interrupted; start the grid again" in line
    assert len(started) == 2
    assert all(run.process.poll() == -signal.SIGTERM for run in started)
