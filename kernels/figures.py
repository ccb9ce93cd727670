"""Pictures of runs, and the statistics of their accuracies over the epochs.

Without validation data nobody knows the best epoch, so what counts is the accuracy that an epoch taken at random has:
its mean and spread over all epochs (Binici et al. 2022, arXiv:2201.03019, call them mu and sigma^2 of S_acc).
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from kernels.contract import fail, one_line


def accuracy_statistics(accuracies):
    """Mean, spread and ends of the accuracies of all epochs, the first one included, in percent.

    Args:
        accuracies: test accuracy after each epoch, in percent; at least one.

    Returns:
        {"mean", "std" and "variance" of the population, "best", "final", "last_quarter": mean of the last quarter}.
        The tables of the literature call "sigma^2" what looks like a standard deviation: hence both.

    Raises:
        ValueError: no accuracy at all.

    >>> accuracy_statistics([50.0, 90.0, 94.0, 98.0])
    {'mean': 83.0, 'std': 19.261, 'variance': 371.0, 'best': 98.0, 'final': 98.0, 'last_quarter': 98.0}
    """
    if not accuracies:
        raise ValueError("accuracy_statistics: expected the accuracies of some epochs, got none; test every epoch")
    quarter = accuracies[-max(1, len(accuracies) // 4) :]
    found = dict(mean=statistics.mean(accuracies), std=statistics.pstdev(accuracies))
    found |= dict(variance=statistics.pvariance(accuracies), best=max(accuracies), final=accuracies[-1])
    return {k: round(v, 3) for k, v in (found | dict(last_quarter=statistics.mean(quarter))).items()}


def draw_curves(groups, path, unit="epoch"):
    """Write a picture of the groups' curves: their mean over runs and a band of ± one standard deviation.

    Args:
        groups: {label: [run, …]}, a run being a list of accuracies in percent; runs are cut to their group's shortest.
        path: of the PNG, or a file object.
        unit: of the horizontal axis.

    >>> import io
    >>> draw_curves({"a": [[10.0, 50.0, 90.0], [10.0, 60.0, 80.0]], "b": [[20.0, 30.0]]}, io.BytesIO())
    """
    from matplotlib.figure import Figure  # not needed but here

    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    for label, runs in groups.items():
        shortest = min(map(len, runs))
        curves = np.array([run[:shortest] for run in runs])  # (runs, epochs)
        mean, band, x = curves.mean(0), curves.std(0), range(1, shortest + 1)
        axis.plot(x, mean, label=label, marker="." if shortest < 30 else None)
        if len(runs) > 1:
            axis.fill_between(x, mean - band, mean + band, alpha=0.25)
    axis.set(xlabel=unit, ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def draw_sheets(images, mean, std, path):
    """Write a picture of up to 64 images each, side by side, one panel for each of {title: images}.

    Args:
        images: {title: (N, C, H, W)}, C 1 or 3, in normalised units, on any device.
        mean, std: C numbers each that undo the normalisation.
        path: of the PNG, or a file object.

    >>> import io
    >>> draw_sheets({"a": torch.randn(9, 3, 8, 8), "b": torch.randn(64, 3, 8, 8)}, [0.5] * 3, [0.2] * 3, io.BytesIO())
    """
    from matplotlib.figure import Figure  # not needed but here

    figure = Figure((4 * len(images), 4.3), layout="constrained")
    for axis, (title, x) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        columns = min(8, len(x))
        x = x[: min(64, len(x) // columns * columns)].detach().float().cpu()
        x = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        sheet = rearrange(x.clamp(0, 1), "(r n) c h w -> (r h) (n w) c", n=columns).numpy()
        axis.imshow(sheet if sheet.shape[2] == 3 else sheet[:, :, 0], cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def save_png(image, path):
    """Write one image, uint8 (C, H, W) with C 1 or 3, as it is; the folder is made."""
    from PIL import Image  # not needed but here

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels if len(image) == 3 else pixels[:, :, 0]).save(path)


def draw_classes(images, labels, names, path, columns=10, rows=10):
    """Write a picture of images by class: one row a class, its name at the left, small images enlarged to about 64 px.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3.
        labels: (N,) integers.
        names: {class: name}; those it lacks go by number.
        path: of the PNG, or a file object.
        columns, rows: the most images of a class, and the most classes (the lowest ones).

    >>> import io
    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> draw_classes(images, torch.tensor([0, 1, 0, 7]), {0: "zero"}, io.BytesIO())
    """
    from PIL import Image, ImageDraw  # not needed but here

    scale = max(1, 64 // images.shape[-1])
    side, left = images.shape[-1] * scale + 2, 78
    classes = labels.unique()[:rows].tolist()
    sheet = Image.new("RGB", (left + columns * side, len(classes) * side), "white")
    for row, k in enumerate(classes):
        ImageDraw.Draw(sheet).text((4, (row + 0.5) * side - 6), names.get(k, f"class {k}"), fill="black")
        for column, image in enumerate(images[labels == k][:columns]):
            tile = Image.fromarray(image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())
            tile = tile.resize((side - 2, side - 2), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * side, row * side))
    sheet.save(path, format="PNG")


def _refuse_differences(kinds, by):
    """What all runs share; kinds: {folder: {option: value}}."""
    first = next(iter(kinds.values()))
    if differ := sorted({k for kind in kinds.values() for k in kind if kind[k] != first.get(k, kind[k])}):
        fail(f"--compare: the runs differ in {', '.join(differ)}; pass runs that differ in {by} and seed alone")
    return first


def compare_runs(folders, by, out):
    """Write compare.json and compare.png: the accuracies of finished runs, grouped by an entry of their result.json.

    Args:
        folders: where the runs are, with result.json and metrics.jsonl (`eval/acc` of each epoch).
        by: the entry, such as "memory"; runs of one value are seeds of one arm.
        out: folder to write into.

    compare.json: teacher, student, dataset and setting, which all runs share; arms, {value: [statistics and costs of a
    run, …]}.
    """
    curves, arms, kinds, out = {}, {}, {}, Path(out)
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        with one_line(f"--compare {folder}", "pass the --out of finished, tested runs, each seed once an arm"):
            result = json.loads((folder / "result.json").read_text())
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            accuracies, value = [row["eval/acc"] for row in rows], str(result[by])
            if any(run["seed"] == result["seed"] for run in arms.setdefault(value, [])):
                raise ValueError(f"a second run of {by} {value} with seed {result['seed']}")
            costs = ("seed", "seconds", f"{by}_bytes", "device_name", "versions")
            arms[value].append(accuracy_statistics(accuracies) | {k: result[k] for k in costs if k in result})
            kind = {k: result[k] for k in ("teacher", "student", "dataset", "teacher_accuracy")} | result["setting"]
            kinds[folder] = kind | {by: None, "epochs": len(rows)}
            curves.setdefault(f"{by} {value}", []).append(accuracies)
    first = _refuse_differences(kinds, by)
    for value, runs in arms.items():
        means = {k: f"{np.mean([r[k] for r in runs]):.2f}" for k in ("mean", "std", "best", "final", "last_quarter")}
        print(f"{by} {value}: {len(runs)} runs,", ", ".join(f"{k} {v}" for k, v in means.items()))
    with one_line(f"--out {out} cannot be used", "pass another folder"):
        out.mkdir(parents=True, exist_ok=True)
        draw_curves(curves, out / "compare.png")
        known = {k: v for k, v in first.items() if k != by}
        (out / "compare.json").write_text(json.dumps(known | dict(arms=arms), indent=1) + "\n")
    print(f"wrote compare.json, compare.png into {out}")


def draw_grid(images, mean, std, path):
    """`draw_classes` of images by class, (classes, n, C, H, W) in normalised units, on the CPU.

    Args:
        images: as above, C 1 or 3.
        mean, std: C numbers each that undo the normalisation.
        path: of the PNG, or a file object.

    >>> import io
    >>> draw_grid(torch.randn(3, 4, 1, 8, 8), [0.5], [0.2], io.BytesIO())
    """
    n_classes, n = images.shape[:2]
    images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).flatten(0, 1)
    draw_classes(pixels, torch.arange(n_classes).repeat_interleave(n), {}, path, columns=n, rows=n_classes)


def draw_arms(arms, path):
    """Write bars, an arm's mean over runs ± one standard deviation: accuracy of each class, diversity over the real.

    Args:
        arms: {label: [run, …]}, a run with class_accuracies [percent, …], diversity, real_diversity {name: distance}.
        path: of the PNG, or a file object.

    >>> import io
    >>> run = dict(class_accuracies=[90.0, 80.0], diversity={"pixels": 4.0}, real_diversity={"pixels": 5.0})
    >>> draw_arms({"a": [run, run], "b": [run]}, io.BytesIO())
    """
    from matplotlib.figure import Figure  # not needed but here

    figure = Figure((11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, (label, runs) in enumerate(arms.items()):
        classes = np.array([r["class_accuracies"] for r in runs])  # (runs, K)
        names = list(runs[0]["diversity"])
        ratios = np.array([[r["diversity"][k] / r["real_diversity"][k] for k in names] for r in runs])
        for axis, values in ((left, classes), (right, ratios)):
            x = np.arange(values.shape[1]) + 0.8 * (i - (len(arms) - 1) / 2) / len(arms)
            axis.bar(x, values.mean(0), 0.8 / len(arms), yerr=values.std(0), label=label)
    left.set(xlabel="class", ylabel="test accuracy, %", xticks=range(classes.shape[1]))
    left.legend(loc="lower right")
    right.set(ylabel="distance within a class / of real images", xticks=range(len(names)), xticklabels=names)
    figure.savefig(path, dpi=100)


def compare_arms(folders, sizes, out):
    """Write compare.json and compare.png: finished runs by number and size of their generators.

    Args:
        folders: where the runs are, with result.json; runs of one arm are its seeds.
        sizes: the entries of setting that make an arm; in all others the runs must agree.
        out: folder to write into.

    compare.json: what the runs share; arms, {"10 generators of 37,402": [figures of a run, …]}.
    """
    arms, kinds, out = {}, {}, Path(out)
    kept = ("seed", "student_accuracy", "class_accuracies", "diversity", "real_diversity", "hits", "seconds")
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        with one_line(f"--compare {folder}", "pass the --out of finished, tested runs, each seed once an arm"):
            result = json.loads((folder / "result.json").read_text())
            setting = result["setting"]
            arm = f"{setting['generators']} of {result['generator_parameters']:,}"
            if any(run["seed"] == result["seed"] for run in arms.setdefault(arm, [])):
                raise ValueError(f"a second run of generators {arm} parameters with seed {result['seed']}")
            arms[arm].append({k: result[k] for k in (*kept, "device_name", "versions")})
            kind = {k: result[k] for k in ("teacher", "student", "dataset", "teacher_accuracy")} | setting
            kinds[folder] = {k: v for k, v in kind.items() if k not in sizes}
    first = _refuse_differences(kinds, "generators")
    for arm, runs in arms.items():
        print(f"generators {arm} parameters: {np.mean([r['student_accuracy'] for r in runs]):.2f} %, {len(runs)} runs")
    with one_line(f"--out {out} cannot be used", "pass another folder"):
        out.mkdir(parents=True, exist_ok=True)
        draw_arms({f"{arm} parameters": runs for arm, runs in arms.items()}, out / "compare.png")
        (out / "compare.json").write_text(json.dumps(first | dict(arms=arms), indent=1) + "\n")
    print(f"wrote compare.json, compare.png into {out}")
