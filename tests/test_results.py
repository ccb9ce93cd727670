"""results/: tables follow from the files, runs are compared arm by arm, images are exported."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from harness.images import get_image_path, save_images
from harness.load import load_trained

ROOT = Path(__file__).resolve().parent.parent


def load_program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load_program("compare")
export_png = load_program("export_png")
real_moments = load_program("real_moments")
tables = load_program("tables")


def write_run(folder, accuracies, memory="vae", seed=0, **setting):
    """A finished run of pseudo_replay.py, as far as it is read."""
    folder.mkdir()
    result = dict(teacher="t", student="s", dataset="digits", teacher_accuracy=99.0, seed=seed)
    result |= dict(memory=memory, memory_bytes=7, seconds=1.0, device_name="x", versions={})
    result |= dict.fromkeys(compare.STATISTICS, accuracies[-1])
    result["setting"] = dict(memory=memory, seed=seed, out=str(folder), epochs=len(accuracies))
    result["setting"] |= setting
    (folder / "result.json").write_text(json.dumps(result))
    rows = [json.dumps({"step": i, "eval/acc": acc}) for i, acc in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def refuse(capsys, function, *args):
    """The one line that a program ends with."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("path", tables.READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_follow_from_the_files(path):
    assert tables.fill_markers(path.read_text()) == path.read_text()


def test_every_table_stands_once():
    text = "".join(path.read_text() for path in tables.READMES)
    for name in tables.MAKERS:
        assert text.count(f"<!-- begin:{name} -->") == 1, name


def test_memories_are_compared_with_their_seeds(tmp_path):
    runs = (
        write_run(tmp_path / "a", [50.0, 90.0]),
        write_run(tmp_path / "b", [60.0, 80.0], seed=1),
        write_run(tmp_path / "c", [40.0, 70.0], memory="none"),
    )
    compare.compare_memories(runs, str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [run["final"] for run in saved["arms"]["vae"]] == [90.0, 80.0]
    assert [run["seed"] for run in saved["arms"]["none"]] == [0]
    assert saved["teacher"] == "t" and saved["epochs"] == 2 and "memory" not in saved
    assert Image.open(tmp_path / "out.png").size == (700, 400)


def test_runs_that_differ_in_more_than_their_arm_are_refused(tmp_path, capsys):
    runs = (
        write_run(tmp_path / "a", [50.0], width=16),
        write_run(tmp_path / "b", [50.0], memory="none", width=32),
    )
    assert "they differ in width" in refuse(capsys, compare.compare_memories, runs, "out")


def test_a_seed_counts_once(tmp_path, capsys):
    runs = (write_run(tmp_path / "a", [50.0]), write_run(tmp_path / "b", [50.0]))
    line = refuse(capsys, compare.compare_memories, runs, "out")
    assert "a second run of vae with seed 0" in line


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    line = refuse(capsys, compare.compare_memories, (str(tmp_path),), "out")
    assert "pass the --out of finished, tested runs" in line


def test_generators_are_compared_by_number_and_size(tmp_path):
    runs = []
    for name, n in (("a", 1), ("b", 10)):
        run = write_run(tmp_path / name, [50.0], generators=n, width=16)
        path = Path(run) / "result.json"
        result = json.loads(path.read_text())
        result |= dict(generator_parameters=7000, student_accuracy=80.0, hits=50.0)
        result |= dict(class_accuracies=[70.0, 90.0])
        result |= dict(diversity={"pixels": 1.0}, real_diversity={"pixels": 2.0})
        path.write_text(json.dumps(result))
        runs.append(run)
    compare.compare_generators(tuple(runs), str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert list(saved["arms"]) == ["1 of 7,000", "10 of 7,000"]


def write_role_run(folder, seed, **accuracies):
    """A finished run of role_kd.py --arm all, as far as it is read."""
    folder.mkdir()
    result = dict(teacher="t", student="s", arm="all", seed=seed, student_accuracies=accuracies)
    result["setting"] = dict(seed=seed, out=str(folder), population=4)
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def test_roles_are_compared_within_their_runs(tmp_path, capsys):
    runs = (
        write_role_run(tmp_path / "a", 0, base=50.0, both=51.0),
        write_role_run(tmp_path / "b", 1, base=52.0, both=53.0),
        write_role_run(tmp_path / "c", 2, base=54.0, both=55.0),
    )
    compare.compare_roles(runs, str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out.json").read_text())
    base = saved["summary"]["base"]
    # 4.303 is Student's t of two degrees of freedom
    assert (base["mean"], base["std"]) == (52, 2)
    assert base["half_width"] == pytest.approx(4.303 * 2 / 3**0.5, abs=1e-4)
    assert base["both_less_this"] == dict(mean=1, std=0, half_width=0)
    assert [run["seed"] for run in saved["arms"]["both"]] == [0, 1, 2]
    assert saved["population"] == 4
    assert Image.open(tmp_path / "out.png").size == (700, 400)
    line = refuse(capsys, compare.compare_roles, runs[:1], "out")
    assert "expected 2 to 10, got 1" in line


def test_images_are_exported_into_class_folders_that_sort(tmp_path):
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    save_images(get_image_path(tmp_path, 0), images, torch.tensor([2, 10, 2]))
    export_png.main(str(tmp_path), str(tmp_path / "png"))
    names = sorted(str(p.relative_to(tmp_path / "png")) for p in tmp_path.glob("png/*/*.png"))
    assert names == ["02/00000-000.png", "02/00000-002.png", "10/00000-001.png"]
    pixel = Image.open(tmp_path / "png/10/00000-001.png").getpixel((3, 5))
    assert pixel == (images[1, 0, 5, 3].item(),) * 3


@pytest.mark.parametrize("name", ["README.md", "continual.py"])
def test_figures_of_continual_are_those_of_its_table(name):
    """Wherever README and docstring name an arm's accuracy, the table has it in that arm's row."""
    text = (ROOT / name).read_text()
    if name == "README.md":
        (text,) = [line for line in text.splitlines() if line.startswith("| [continual.py]")]
    text = " ".join(text[:4000].split())
    rows = tables.make_continual().splitlines()
    found = re.findall(r"\b(base|deepinversion|abd) (\d+\.\d(?: ± \d+\.\d)?)", text)
    for arm, figure in found:
        of_arm = [row for row in rows if f"| `{arm}`" in row]
        assert any(f"| {figure} |" in row for row in of_arm), (arm, figure)
    assert len(found) in (0, 3, 6)


def test_moments_of_real_images_repair_a_network_that_has_others(tmp_path, capsys):
    network, info = load_trained("digits-resnet8", "cpu", "data")
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean += 3 * layer.running_var.sqrt()
    before, after = real_moments.measure(network, info, "data")
    assert before < 50 and after > 95
    out = tmp_path / "found.json"
    real_moments.main(("r8=digits-resnet8",), out=str(out))
    assert "r8: 100.00 %, with moments of real images" in capsys.readouterr().out
    assert json.loads(out.read_text())["r8"]["accuracy"] == 100.0
    line = refuse(capsys, lambda: real_moments.main(("l5=digits-lenet5",)))
    assert "--networks l5=digits-lenet5: no BatchNorm with running moments" in line
