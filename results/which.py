"""Which method should I use? Every method and its controls on one footing, within one budget.

    python results/which.py --data digits
    python results/which.py --data mnist --data-dir DIR

One teacher with BatchNorms, one student, and per run about the same time on one thread, images
included. Each run is a command of a script, in runs/which/DATA/ARM-seedS; two run at a time. A
finished run is not repeated, and one that was killed goes on where it was. Writes
results/which-DATA.json and results/which-DATA.png: accuracy on real test images against seconds.
Options were chosen on training images, with seeds that are not reported: results/NOTES.md.

Controls, all trained by deepinversion.py's loop with the updates of the arm `deepinversion`:

    no moments        images inverted without the moment loss
    noise             Gaussian noise with the mean and the deviation of the training pixels
    other data        training images of another data set
    real, no labels   the teacher's training images: an upper bound
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.data import predict  # noqa: E402
from harness.images import get_image_path, save_images  # noqa: E402
from harness.load import load_trained  # noqa: E402
from harness.run import describe_machine, fail  # noqa: E402
from harness.sources import SourceOptions, load_source_images  # noqa: E402

POLL_SECONDS = 0.2  # between two looks at a run's metrics


@dataclass
class Arm:
    """A way to get a student, as a command.

    Args:
        title: in tables and pictures.
        script: of the root folder.
        options: of all data sets.
        source: where the images of a control are from, as --images of harness/sources.py; `other`:
            the Setting's other data set; "": a method, which has no images.
    """

    title: str
    script: str
    options: str = ""
    source: str = ""


@dataclass
class Setting:
    """A data set: its networks, its budget, and each script's options within it.

    Args:
        budget: seconds of a run.
        other: the data set of the control `other data`.
        n_images: images of the controls' folders.
        options: {script, or arm where its steps take longer: options}.
    """

    teacher: str
    student: str
    budget: int
    other: str
    n_images: int
    options: dict


INVERSION = "deepinversion.py"
ENSEMBLE = "generative_ensemble.py"
GAME = "zskt.py"
REPLAY = "pseudo_replay.py"
GIVEN = "--batches-per-epoch 0"  # the student learns from the images that it is given
ARMS = {
    "deepinversion": Arm("DeepInversion", INVERSION),
    "adaptive": Arm("Adaptive DeepInversion", INVERSION, "--competition js"),
    "ensemble": Arm("generative ensemble", ENSEMBLE),
    "zskt": Arm("ZSKT", GAME),
    "dfad": Arm("ZSKT with DFAD's loss", GAME, "--divergence l1"),
    "pre-dfkd-none": Arm("PRE-DFKD, no memory", REPLAY, "--memory none"),
    "pre-dfkd-bank": Arm("PRE-DFKD, bank", REPLAY, "--memory bank"),
    "pre-dfkd-vae": Arm("PRE-DFKD, VAE", REPLAY, "--memory vae"),
    "no-moments": Arm("control: inversion without moments", INVERSION, "--alpha-bn 0"),
    "noise": Arm("control: Gaussian noise", INVERSION, GIVEN, "noise"),
    "other-data": Arm("control: images of another data set", INVERSION, GIVEN, "other"),
    "real": Arm("control: real images, no labels", INVERSION, GIVEN, "real"),
}
SETTINGS = {
    "digits": Setting(
        teacher="digits-resnet8",
        student="lenet5",
        budget=120,
        other="mnist",
        n_images=1437,
        options={
            INVERSION: "--verifier none --initial-batches 12 --epochs 5 --steps-per-epoch 250",
            ENSEMBLE: "--steps 700 --epochs 14 --sample 0",
            GAME: "--pseudo-batches 110 --evaluations 10",
            REPLAY: "--epochs 20 --iterations 5",
            "pre-dfkd-vae": "--epochs 12 --iterations 5",
        },
    ),
    "mnist": Setting(
        teacher="mnist-resnet8",
        student="lenet5",
        budget=150,
        other="cifar10",
        n_images=10000,
        options={
            INVERSION: "--verifier none --epochs 10",
            ENSEMBLE: "--steps 800 --epochs 12 --sample 0",
            GAME: "--pseudo-batches 110 --evaluations 10",
            REPLAY: "--epochs 13 --iterations 10",
            "pre-dfkd-vae": "--epochs 7 --iterations 10",
        },
    ),
}


# The controls' images
def make_source(name, data, data_dir, seed):
    """A folder of images as deepinversion.py leaves it; made once.

    Args:
        name: noise | real | other.
        data: a key of SETTINGS.
    """
    setting = SETTINGS[data]
    folder = Path("runs/which") / data / f"{name}-images-seed{seed}"
    if (folder / "result.json").exists():
        return folder
    teacher, info = load_trained(setting.teacher, "cpu", data_dir)
    source = setting.other if name == "other" else name
    torch.manual_seed(seed)
    wanted = SourceOptions(
        images=source, num_images=setting.n_images, data_dir=data_dir, out=str(folder)
    )
    images = load_source_images(wanted, info)
    labels = predict(teacher, images, info)
    folder.mkdir(parents=True, exist_ok=True)
    save_images(get_image_path(folder, 0), images, labels.cpu())
    (folder / "result.json").write_text(json.dumps({"images": source}) + "\n")
    return folder


# One run
def make_command(arm, data, data_dir, seed, out):
    """The command of a run, as a list of words."""
    setting = SETTINGS[data]
    command = [sys.executable, str(ROOT / ARMS[arm].script), "--setting", data, "--seed", str(seed)]
    command += ["--teacher", setting.teacher, "--student", setting.student, "--dataset", data]
    command += ["--device", "cpu", "--data-dir", data_dir, "--out", str(out), "--resume"]
    options = setting.options.get(arm, setting.options[ARMS[arm].script])
    command += shlex.split(options)
    command += shlex.split(ARMS[arm].options)
    if ARMS[arm].source:
        command += ["--images", str(make_source(ARMS[arm].source, data, data_dir, seed))]
    return command


def read_accuracies(out):
    """The test accuracies in a run's metrics so far, in percent."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    whole_lines = path.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in whole_lines]
    return [row["eval/acc"] for row in rows if "eval/acc" in row]


def read_curve(path):
    """The (seconds, accuracy) pairs that an earlier start of the run wrote down."""
    if not path.exists():
        return []
    return json.loads(path.read_text())


def run_arm(arm, data, data_dir, seed):
    """Run one command to its end, unless it has ended; write down when each accuracy came.

    Returns:
        [(seconds since the start, percent of real test images), …].

    Raises:
        SubprocessError: the command failed.
    """
    out = Path("runs/which") / data / f"{arm}-seed{seed}"
    out.parent.mkdir(parents=True, exist_ok=True)
    curve_path = out.with_suffix(".curve.json")
    if (out / "result.json").exists():
        return read_curve(curve_path)

    command = make_command(arm, data, data_dir, seed, out)
    seconds_path = out / "seconds.txt"  # what earlier starts took, up to their last checkpoint
    before = float(seconds_path.read_text()) if seconds_path.exists() else 0.0
    curve = read_curve(curve_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    print(f"{arm}, seed {seed}: {shlex.join(command[1:])}", flush=True)
    start = time.time() - before
    with open(out.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    running = True
    while running:
        time.sleep(POLL_SECONDS)
        running = process.poll() is None  # asked before the file is read: no row is missed
        seconds = round(time.time() - start, 1)
        accuracies = read_accuracies(out)
        del curve[len(accuracies) :]  # a continued run does again what no checkpoint held
        for accuracy in accuracies[len(curve) :]:
            curve.append((seconds, accuracy))
            curve_path.write_text(json.dumps(curve) + "\n")
    if process.returncode:
        problem = f"{arm}, seed {seed}, ended with {process.returncode}; read {log.name}"
        raise subprocess.SubprocessError(f"{problem}, then start the grid again: it goes on")
    return curve


# What came of it
def describe_runs(curves):
    """What which-DATA.json holds of an arm: seeds, final accuracies, seconds, curves."""
    return {
        "accuracy": [curve[-1][1] for curve in curves.values()],
        "seconds": [curve[-1][0] for curve in curves.values()],
        "seeds": list(curves),
        "curves": list(curves.values()),
    }


def draw_accuracies(table, path):
    """Write a PNG: accuracy against seconds, an arm a line, a bar of ± one std at its end."""
    figure = Figure((9, 5.5), layout="constrained")
    axis = figure.subplots()
    for arm, found in table["arms"].items():
        shortest = min(len(curve) for curve in found["curves"])
        curves = np.array([curve[:shortest] for curve in found["curves"]])  # (seeds, points, 2)
        seconds, accuracy = curves.mean(0).T
        title = ARMS[arm].title
        style = "--" if title.startswith("control") else "-"
        (line,) = axis.plot(seconds, accuracy, style, marker=".", label=title)
        if len(curves) > 1:
            spread = np.std(found["accuracy"], ddof=1)
            axis.errorbar(
                seconds[-1], accuracy[-1], spread, color=line.get_color(), capsize=4, elinewidth=2
            )
    axis.axhline(table["teacher_accuracy"], color="grey", linewidth=1, label="teacher")
    axis.set(xlabel="seconds on one thread, images included", ylabel="test accuracy, %")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def main(
    data: Literal["digits", "mnist"],
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (0, 1, 2),
    data_dir: str = "data",
    jobs: int = 2,
):
    """Run the grid of a data set, or what is left of it, and write its table and its picture.

    Args:
        data: digits or mnist.
        arms: of the grid.
        seeds: of each arm.
        data_dir: folder of the data sets.
        jobs: runs at a time, a thread each.
    """
    tasks = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in tasks:
        if ARMS[arm].source:  # here, as two at a time would share PyTorch's random numbers
            make_source(ARMS[arm].source, data, data_dir, seed)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(lambda task: run_arm(task[0], data, data_dir, task[1]), tasks))
    except subprocess.SubprocessError as error:
        fail(error)
    setting = SETTINGS[data]
    _, info = load_trained(setting.teacher, "cpu", data_dir)
    table = {"teacher": setting.teacher, "student": setting.student, "budget": setting.budget}
    table["teacher_accuracy"] = info.accuracy
    table["arms"] = {}
    for arm in arms:
        curves = {}
        for (name, seed), curve in zip(tasks, found, strict=True):
            if name == arm and curve:
                curves[seed] = curve
        if not curves:
            continue
        described = describe_runs(curves)
        table["arms"][arm] = described
        words = make_command(arm, data, "DIR", seeds[0], "OUT")
        described["command"] = shlex.join([Path(words[1]).name, *words[2:]])
        described["title"] = ARMS[arm].title
        mean = np.mean(described["accuracy"])
        print(f"{arm:24} {mean:6.2f} %  {max(described['seconds']):6.0f} s")
    table |= describe_machine("cpu")
    path = ROOT / f"results/which-{data}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    draw_accuracies(table, path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
