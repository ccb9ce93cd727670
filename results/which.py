"""Which method should I use? Every method and its controls on one footing, within one budget.

    python results/which.py --data digits
    python results/which.py --data mnist --data-dir DIR
    python results/which.py --data cifar10 --data-dir DIR

One teacher with BatchNorms, one student. A method has the options of a preset, but for the length:
about as many seconds for each, on one thread, images included. How the presets were chosen:
results/NOTES.md. Each run is a command of a script, in runs/which/DATA/ARM-seedS; two run at a
time. A finished run is not repeated, and one that was killed goes on where it was. All arms with
all seeds write results/which-DATA.json and results/which-DATA.png: accuracy on real test images
against seconds.

Controls, trained by deepinversion.py's loop with as many updates as the arm `deepinversion`; those
that are given images need less time:

    no-moments    images inverted without the moment loss
    noise         Gaussian noise with the mean and the deviation of the training pixels
    other-data    training images of another data set
    real          training images of the teacher, without labels
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.data import predict  # noqa: E402
from harness.errors import fail, prepare_program  # noqa: E402
from harness.files import open_atomically  # noqa: E402
from harness.images import get_image_path, save_images  # noqa: E402
from harness.load import load_trained  # noqa: E402
from harness.sources import SourceOptions, load_source_images  # noqa: E402

FOLDER = Path("runs/which")
POLL_SECONDS = 0.2  # between two looks at a run's metrics


@dataclass
class Arm:
    """A way to get a student, as a command.

    Args:
        title: in tables and pictures.
        script: of the root folder.
        options: of all data sets.
        source: where the images of a control are from, as --images of harness/sources.py; `other`:
            the Setting's other data set; "": the arm makes its own.
    """

    title: str
    script: str
    options: str = ""
    source: str = ""


@dataclass
class Setting:
    """A data set: its networks, its budget, and each script's options within it.

    Args:
        budget: seconds of a method's run, about; its options were sized for it.
        other: the data set of the control `other-data`.
        n_images: images of the controls' folders.
        options: {script, or arm where its steps take longer: options}.
        seeds: of the published table.
        presets: {script: its preset}, where that is not the data set's.
    """

    teacher: str
    student: str
    budget: int
    other: str
    n_images: int
    options: dict
    seeds: tuple = (0, 1, 2)
    presets: dict = field(default_factory=dict)


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
            GAME: "--pseudo-batches 90 --evaluations 10",
            REPLAY: "--epochs 13 --iterations 10",
            "pre-dfkd-vae": "--epochs 6 --iterations 10",
        },
    ),
    "cifar10": Setting(
        teacher="cifar10-resnet20",
        student="resnet8",
        budget=1200,
        other="mnist",
        n_images=50000,
        options={
            INVERSION: "--verifier none --initial-batches 10 --epochs 13 --steps-per-epoch 250",
            # narrow generators and small batches: the presets' sizes leave a few hundred updates
            ENSEMBLE: "--width 32 --steps 280 --epochs 10 --iterations 40 --sample 0",
            GAME: "--pseudo-batches 280 --evaluations 10",
            REPLAY: "--width 32 --batch-size 128 --epochs 13 --iterations 20",
            "pre-dfkd-vae": "--width 32 --batch-size 128 --epochs 11 --iterations 16",
        },
        seeds=(0,),
        presets={INVERSION: "cifar10-student"},
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
    folder = FOLDER / data / f"{name}-{setting.n_images}-images-seed{seed}"
    if (folder / "result.json").exists():
        return folder
    teacher, info = load_trained(setting.teacher, "cpu", data_dir)
    source = name
    if name == "other":
        source = setting.other
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
    script = ARMS[arm].script
    preset = setting.presets.get(script, data)
    command = [sys.executable, str(ROOT / script), "--setting", preset, "--seed", str(seed)]
    command += ["--teacher", setting.teacher, "--student", setting.student, "--dataset", data]
    command += ["--device", "cpu", "--data-dir", data_dir, "--out", str(out), "--resume"]
    options = setting.options.get(arm, setting.options[script])
    command += shlex.split(options)
    command += shlex.split(ARMS[arm].options)
    if ARMS[arm].source:
        command += ["--images", str(make_source(ARMS[arm].source, data, data_dir, seed))]
    return command


@dataclass
class Run:
    """A command at work."""

    name: str
    """ARM-seedS."""
    out: Path
    process: subprocess.Popen
    start: float
    """When it would have started without a break, in seconds since the epoch."""
    curve: list
    """[[seconds since the start, percent of real test images], …] so far."""

    def record_accuracies(self):
        """Write down when each accuracy came."""
        seconds = round(time.time() - self.start, 1)
        accuracies = read_accuracies(self.out)
        del self.curve[len(accuracies) :]  # points that a continued run will measure again
        for accuracy in accuracies[len(self.curve) :]:
            self.curve.append([seconds, accuracy])
            with open_atomically(self.out.with_suffix(".curve.json")) as file:
                file.write(json.dumps(self.curve).encode())

    def is_running(self):
        """Record what is new; whether the command is still at work.

        Raises:
            SubprocessError: the command failed.
        """
        code = self.process.poll()  # before the file is read, so that no row is missed
        self.record_accuracies()
        if code:
            log = self.out.with_suffix(".log")
            problem = f"{self.name} ended with {code}; read {log}"
            raise subprocess.SubprocessError(f"{problem}, then start the grid again: it goes on")
        return code is None


def read_accuracies(out):
    """The test accuracies in a run's metrics so far, in percent."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    whole_lines = path.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in whole_lines]
    return [row["eval/acc"] for row in rows if "eval/acc" in row]


def read_curve(out):
    """The curve that was written down of a run so far."""
    path = out.with_suffix(".curve.json")
    if not path.exists():
        return []
    return json.loads(path.read_text())


def name_run(arm, seed):
    return f"{arm}-seed{seed}"


def start_run(arm, data, data_dir, seed):
    """Start a command, or go on with it; None if it has ended, with the same options."""
    name = name_run(arm, seed)
    out = FOLDER / data / name
    out.parent.mkdir(parents=True, exist_ok=True)
    command = make_command(arm, data, data_dir, seed, out)
    words = shlex.join(command[1:])
    command_path = out.with_suffix(".command")
    if command_path.exists() and command_path.read_text() != words:
        fail(f"{out} is of other options; delete {out}*, so that it is run anew")
    command_path.write_text(words)
    if (out / "result.json").exists():
        return None

    seconds_path = out / "seconds.txt"  # what earlier starts took, up to their last checkpoint
    before = float(seconds_path.read_text()) if seconds_path.exists() else 0.0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    print(f"{name}: {words}", flush=True)
    with open(out.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    curve = [point for point in read_curve(out) if point[0] <= before]  # the rest is done again
    return Run(name, out, process, time.time() - before, curve)


def run_grid(tasks, data, data_dir, jobs):
    """Run all commands, `jobs` at a time; one that fails ends the grid.

    Args:
        tasks: [(arm, seed), …].
    """
    waiting = list(tasks)
    running = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                arm, seed = waiting.pop(0)
                run = start_run(arm, data, data_dir, seed)
                if run:
                    running.append(run)
            time.sleep(POLL_SECONDS)
            running = [run for run in running if run.is_running()]
    except subprocess.SubprocessError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; start the grid again: it goes on")
    finally:
        for run in running:
            run.process.terminate()
            run.process.wait()


# What came of it
def describe_arm(arm, data, seeds):
    """What which-DATA.json holds of an arm: of each seed its figures, as the run wrote them."""
    described = {"title": ARMS[arm].title, "seeds": list(seeds)}
    outs = [FOLDER / data / name_run(arm, seed) for seed in seeds]
    results = [json.loads((out / "result.json").read_text()) for out in outs]
    described["accuracy"] = [result["student_accuracy"] for result in results]
    described["seconds"] = [result["seconds"] for result in results]
    described["device_name"] = results[0]["device_name"]
    described["versions"] = results[0]["versions"]
    words = make_command(arm, data, "DIR", seeds[0], "OUT")
    described["command"] = shlex.join([Path(words[1]).name, *words[2:]])
    described["curves"] = [read_curve(out) for out in outs]
    return described


def draw_accuracies(table, path):
    """Write a PNG: accuracy against seconds, an arm a line, a bar of ± one std at its end."""
    figure = Figure((9, 5.5), layout="constrained")
    axis = figure.subplots()
    for found in table["arms"].values():
        shortest = min(len(curve) for curve in found["curves"])
        if shortest == 0:  # the grid was killed while the run went on
            continue
        curves = np.array([curve[:shortest] for curve in found["curves"]])  # (seeds, points, 2)
        seconds, accuracy = curves.mean(0).T
        title = found["title"]
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
    data: Literal["digits", "mnist", "cifar10"],
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (),
    data_dir: str = "data",
    jobs: int = 2,
):
    """Run the grid of a data set, or what is left of it; of all arms write table and picture.

    Args:
        data: the data set, a key of SETTINGS.
        arms: of the grid.
        seeds: of each arm; none: those of the table. The table is written of all arms with these
            seeds only; else the figures are printed.
        data_dir: folder of the data sets.
        jobs: runs at a time, a thread each.
    """
    unknown = set(arms) - set(ARMS)
    if unknown:
        fail(f"--arms: expected some of {', '.join(ARMS)}, got {', '.join(unknown)}")
    setting = SETTINGS[data]
    seeds = seeds or setting.seeds
    run_grid([(arm, seed) for seed in seeds for arm in arms], data, data_dir, jobs)
    _, info = load_trained(setting.teacher, "cpu", data_dir)
    table = {"teacher": setting.teacher, "student": setting.student, "budget": setting.budget}
    table |= {"teacher_accuracy": info.accuracy, "jobs": jobs, "arms": {}}
    for arm in arms:
        described = describe_arm(arm, data, seeds)
        table["arms"][arm] = described
        mean = np.mean(described["accuracy"])
        print(f"{arm:16} {mean:6.2f} %  {max(described['seconds']):6.0f} s")
    if set(arms) == set(ARMS) and set(seeds) == set(setting.seeds):
        path = ROOT / f"results/which-{data}.json"
        with open_atomically(path) as file:
            file.write(json.dumps(table, indent=1).encode() + b"\n")
        draw_accuracies(table, path.with_suffix(".png"))


if __name__ == "__main__":
    prepare_program()
    tyro.cli(main)
