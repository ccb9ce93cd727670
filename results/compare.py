"""Compare finished runs: several arms, the seeds of each, in one JSON file and one picture.

    python results/compare.py memories --runs runs/a runs/b … --out results/replay-mnist
    python results/compare.py generators --runs runs/a runs/b … --out results/ensemble-arms-mnist
    python results/compare.py students --runs X=runs/a Y=runs/b … --out results/students-mnist
    python results/compare.py roles --runs runs/a runs/b … --out results/role-kd-cifar10

- memories: runs of pseudo_replay.py by --memory;
- generators: runs of generative_ensemble.py by number and size of their generators;
- students: runs of deepinversion.py --student by labels of your own, X and Y above;
- roles: runs of role_kd.py --arm all, a seed each, by arm, with 95 % intervals over the seeds.

Each writes OUT.json and OUT.png. OUT.json holds what the runs share, and {"arms": {arm: [figures of
a run, …]}}. Runs that differ in more than arm and seed are refused, but for those of students.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.errors import fail, fail_in_one_line  # noqa: E402
from harness.pictures import draw_curves  # noqa: E402
from harness.run import RunOptions  # noqa: E402

NAMES = ("teacher", "student", "dataset", "teacher_accuracy")
STATISTICS = ("mean", "std", "variance", "best", "final", "last_quarter")
SIZES = ("generators", "width", "stages", "latent")  # in which generators may differ
# options that do not say how a run was computed
FREE = {*RunOptions.__dataclass_fields__, "graph", "ensemble", "sample", "images"}


def read_run(folder):
    """The result.json of a finished run, and the test accuracy of each of its epochs."""
    folder = Path(folder)
    with fail_in_one_line(f"--runs {folder}", "pass the --out of finished, tested runs"):
        result = json.loads((folder / "result.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        accuracies = [row["eval/acc"] for row in rows if "eval/acc" in row]
        if not accuracies:
            raise ValueError("was never tested on real images")
    return result, accuracies


def add_run(arms, arm, figures):
    """Append a run's figures to its arm; refuse a seed that is there already."""
    runs = arms.setdefault(arm, [])
    if any(run["seed"] == figures["seed"] for run in runs):
        fail(
            f"--runs: a second run of {arm} with seed {figures['seed']}; pass each seed once an arm"
        )
    runs.append(figures)


def get_shared(results, differing, names=NAMES):
    """What all runs share; refuse runs that differ in anything but their arm and their seed.

    Args:
        results: their result.json.
        differing: options that make the arm.
        names: what of a result.json besides its options they share.
    """
    descriptions = []
    for result in results:
        description = {name: result[name] for name in names}
        for name, value in result["setting"].items():
            if name not in FREE and name not in differing:
                description.setdefault(name, value)
        descriptions.append(description)
    first = descriptions[0]
    for description in descriptions[1:]:
        other = [k for k in first.keys() | description.keys() if first.get(k) != description.get(k)]
        if other:
            allowed = " and ".join([*differing, "seed"])
            advice = f"pass runs that differ in {allowed} alone"
            fail(f"--runs: they differ in {', '.join(sorted(other))}; {advice}")
    return first


def select(result, names):
    """Those of the entries that a result has."""
    return {name: result[name] for name in names if name in result}


def print_means(arms, names):
    """A line an arm: means over its runs."""
    for arm, runs in arms.items():
        means = [f"{name} {np.mean([run[name] for run in runs]):.2f}" for name in names]
        print(f"{arm}: {len(runs)} runs, {', '.join(means)}")


def save(out, shared, arms, draw):
    """Write OUT.json, and OUT.png by draw(file)."""
    out = Path(out)
    with fail_in_one_line(f"--out {out} cannot be written", "pass another path"):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(shared | dict(arms=arms), indent=1) + "\n")
        draw(out.with_suffix(".png"))
    print(f"wrote {out}.json and {out}.png")


def compare_memories(runs: tuple[str, ...], out: str):
    """Runs of pseudo_replay.py by --memory: curves and statistics of their accuracies.

    Args:
        runs: the --out folders of finished runs.
        out: path of what is written, without .json and .png.
    """
    arms = {}
    curves = {}
    results = []
    for folder in runs:
        result, accuracies = read_run(folder)
        names = (*STATISTICS, "seed", "seconds", "memory_bytes", "device_name", "versions")
        add_run(arms, result["memory"], select(result, names))
        curves.setdefault(f"memory {result['memory']}", []).append(accuracies)
        results.append(result)
    shared = get_shared(results, ("memory",))
    print_means(arms, ("mean", "std", "best", "final", "last_quarter"))
    save(out, shared, arms, lambda file: draw_curves(curves, file))


def compare_generators(runs: tuple[str, ...], out: str):
    """Runs of generative_ensemble.py by number and size of generators: classes and diversity.

    Args:
        runs: the --out folders of finished runs.
        out: path of what is written, without .json and .png.
    """
    names = ("seed", "student_accuracy", "class_accuracies", "diversity", "real_diversity", "hits")
    arms = {}
    results = []
    for folder in runs:
        result, _ = read_run(folder)
        arm = f"{result['setting']['generators']} of {result['generator_parameters']:,}"
        add_run(arms, arm, select(result, (*names, "seconds", "device_name", "versions")))
        results.append(result)
    shared = get_shared(results, SIZES)
    print_means(arms, ("student_accuracy",))
    save(out, shared, arms, lambda file: draw_generators(arms, file))


def compare_students(runs: tuple[str, ...], out: str):
    """Runs of deepinversion.py --student by labels: curves and accuracies.

    Args:
        runs: LABEL=FOLDER each; runs of one label are seeds of one arm.
        out: path of what is written, without .json and .png.
    """
    names = (*NAMES, "student_accuracy", "teacher_agreement", "verifier", "verifier_agreement")
    names += ("n_images", "seconds", "seed", "device_name", "versions", "setting")
    arms = {}
    curves = {}
    for run in runs:
        label, _, folder = run.partition("=")
        result, accuracies = read_run(folder)
        add_run(arms, label, select(result, names) | dict(accuracies=accuracies))
        curves.setdefault(label, []).append(accuracies)
    print_means(arms, ("student_accuracy",))
    save(out, {}, arms, lambda file: draw_curves(curves, file))


# Student's t that 95 % of the distribution lie within, by the number of values less one
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def estimate(values):
    """Mean, standard deviation, and half the width of the 95 % interval of the mean.

    >>> estimate([1.0, 2.0, 3.0])
    {'mean': 2.0, 'std': 1.0, 'half_width': 2.4843}
    """
    std = statistics.stdev(values)
    half_width = T_95[len(values) - 1] * std / math.sqrt(len(values))
    found = {"mean": statistics.mean(values), "std": std, "half_width": half_width}
    return {name: round(value, 4) for name, value in found.items()}


def compare_roles(runs: tuple[str, ...], out: str):
    """Runs of role_kd.py --arm all: the arms' students, with 95 % intervals over seeds.

    `summary` in OUT.json holds an arm's estimate, and that of how much `both` is above it in the
    same run: seeds, initial weights and searches are the same there.

    Args:
        runs: the --out folders of finished runs, 2 to 10.
        out: path of what is written, without .json and .png.
    """
    if not 2 <= len(runs) <= 10:
        fail(f"--runs: expected 2 to 10, got {len(runs)}; an interval needs several seeds")
    arms = {}
    results = []
    for folder in runs:
        with fail_in_one_line(f"--runs {folder}", "pass the --out of finished runs of --arm all"):
            result = json.loads((Path(folder) / "result.json").read_text())
            if result["arm"] != "all":
                raise ValueError(f"expected --arm all, got {result['arm']}")
        for arm, accuracy in result["student_accuracies"].items():
            figures = {"student_accuracy": accuracy}
            if arm == "both":  # what all arms have in common stands once
                names = ("teacher_accuracies", "searches", "strengths", "phases", "device_name")
                figures |= select(result, (*names, "seconds", "versions"))
            add_run(arms, arm, figures | {"seed": result["seed"]})
        results.append(result)
    shared = get_shared(results, (), ("teacher", "student"))

    accuracies = {arm: [run["student_accuracy"] for run in arms[arm]] for arm in arms}
    summary = {}
    for arm, values in accuracies.items():
        pairs = zip(accuracies["both"], values, strict=True)
        summary[arm] = estimate(values)
        summary[arm]["both_less_this"] = estimate([both - value for both, value in pairs])
    print_means(arms, ("student_accuracy",))
    save(out, shared | dict(summary=summary), arms, lambda file: draw_roles(accuracies, file))


def draw_roles(accuracies, file):
    """Each arm's runs as points, their mean and its 95 % interval.

    Args:
        accuracies: {arm: [percent of a run, …]}.
        file: path or file object.

    >>> import io
    >>> draw_roles({"base": [50.0, 51.0], "both": [51.0, 53.0]}, io.BytesIO())
    """
    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    for i, values in enumerate(accuracies.values()):
        found = estimate(values)
        axis.errorbar(i, found["mean"], found["half_width"], fmt="_", capsize=8, color="C0")
        axis.plot([i] * len(values), values, ".", color="C1")
    axis.set(ylabel="test accuracy of the student, %")
    axis.set(xticks=range(len(accuracies)), xticklabels=list(accuracies))
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=100)


def draw_generators(arms, file):
    """Bars, an arm's mean over runs ± one std: accuracy of each class, diversity over the real.

    Args:
        arms: {arm: [run, …]}, a run with class_accuracies [percent, …], and with diversity and
            real_diversity {kind: distance}.
        file: path or file object.

    >>> import io
    >>> run = dict(class_accuracies=[90.0, 80.0], diversity={"pixels": 4.0})
    >>> run["real_diversity"] = {"pixels": 5.0}
    >>> draw_generators({"a": [run, run], "b": [run]}, io.BytesIO())
    """
    figure = Figure((11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    width = 0.8 / len(arms)
    for i, (arm, runs) in enumerate(arms.items()):
        kinds = list(runs[0]["diversity"])
        classes = np.array([run["class_accuracies"] for run in runs])  # (runs, K)
        ratios = np.array(
            [
                [run["diversity"][kind] / run["real_diversity"][kind] for kind in kinds]
                for run in runs
            ]
        )
        offset = 0.8 * (i - (len(arms) - 1) / 2) / len(arms)
        for axis, values in ((left, classes), (right, ratios)):
            x = np.arange(values.shape[1]) + offset
            label = f"{arm} parameters"
            axis.bar(x, values.mean(0), width, yerr=values.std(0), label=label)
    left.set(xlabel="class", ylabel="test accuracy, %", xticks=range(classes.shape[1]))
    left.legend(loc="lower right")
    right.set(ylabel="distance within a class / of real images")
    right.set(xticks=range(len(kinds)), xticklabels=kinds)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {
            "memories": compare_memories,
            "generators": compare_generators,
            "students": compare_students,
            "roles": compare_roles,
        }
    )
