"""results/which.py: commands that their scripts take, a grid that goes on where it was."""

import json
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
    assert args.teacher == which.SETTINGS[data].teacher and args.setting == data


SCRIPT = """  # the first run of all is broken off after its first row
import json, sys
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
is_whole = Path("broken").exists()
Path("broken").touch()
rows = [json.dumps({"eval/acc": acc}) for acc in (50.0, 90.0)]
(out / "metrics.jsonl").write_text("\\n".join(rows[: 1 + is_whole]) + "\\n")
with open(out / "starts", "a") as file:
    file.write("x")
if not is_whole:
    sys.exit("broken off")
(out / "result.json").write_text("{}")
"""


def test_a_grid_goes_on_where_it_was_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    for name in ("results", "runs"):
        (tmp_path / name).mkdir()
    for arm in ("zskt", "noise"):
        (tmp_path / which.ARMS[arm].script).write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(which, "ROOT", tmp_path)
    arms = ("zskt", "noise")

    def run_grid():
        which.main("digits", arms, seeds=(0, 1), jobs=1)

    line = refuse(capsys, run_grid)
    assert "zskt, seed 0, ended with 1; read runs/which/digits/zskt-seed0.log" in line
    run_grid()
    run_grid()
    saved = json.loads((tmp_path / "results/which-digits.json").read_text())
    assert Image.open(tmp_path / "results/which-digits.png").size == (900, 550)
    assert list(saved["arms"]) == list(arms)
    for arm in arms:
        assert saved["arms"][arm]["accuracy"] == [90.0, 90.0]
        assert saved["arms"][arm]["seeds"] == [0, 1]
        for seed, curve in enumerate(saved["arms"][arm]["curves"]):
            assert [accuracy for _, accuracy in curve] == [50.0, 90.0]
            assert 0 < curve[0][0] <= curve[1][0]
            starts = (tmp_path / f"runs/which/digits/{arm}-seed{seed}/starts").read_text()
            assert starts == ("xx" if (arm, seed) == ("zskt", 0) else "x")
    assert "--images runs/which/digits/noise-images-seed0" in saved["arms"]["noise"]["command"]
