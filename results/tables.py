"""Write the tables of the READMEs from the JSON and CSV files behind them.

    python results/tables.py

Each table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; a test fails where text and
files differ.
"""

import csv
import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
READMES = [
    ROOT / "README.md",
    ROOT / "kernels/README.md",
    ROOT / "results/README.md",
    ROOT / "results/NOTES.md",
    ROOT / "teachers/README.md",
]


# Helpers
def format_table(head, rows):
    """A Markdown table of a list of titles and a list of rows, lists of strings."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def format_spread(values, digits=2):
    """Mean ± standard deviation of the sample."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def format_percent(values, digits=2):
    return format_spread(values, digits) + " %"


def format_relative(students, teacher):
    """Mean of the students' accuracies as a percentage of the teacher's."""
    return f"{100 * statistics.mean(students) / teacher:.1f} %"


def name_device(result):
    """Where a run was; files of before wrote "1 CPU threads"."""
    return result["device_name"].replace("1 CPU threads", "1 CPU thread")


def format_longest(runs):
    return f"{max(run['seconds'] for run in runs):.0f} s, {name_device(runs[0])}"


def format_accuracies(found, name):
    """Mean ± std of one entry of several dicts; "" where they lack it."""
    values = [accuracies[name] for accuracies in found if name in accuracies]
    return format_percent(values) if values else ""


def get_preset(result):
    """The preset that a run took; older files call it `name`."""
    setting = result["setting"]
    return setting["name"] if "name" in setting else setting["setting"]


def read_json(name):
    return json.loads((RESULTS / name).read_text())


def read_seeds(pattern):
    """{stem without -seedN: [result of each seed, …]} of results/PATTERN."""
    runs = {}
    for path in sorted(RESULTS.glob(pattern)):
        stem = path.stem.rpartition("-seed")[0]
        runs.setdefault(stem, []).append(json.loads(path.read_text()))
    return runs


def read_rows(name):
    with open(RESULTS / name) as file:
        return list(csv.DictReader(file))


def describe_bench(name, rows):
    """What these rows of a CSV of the benchmarks were measured on."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = f"{rows[0]['device']}, torch {rows[0]['torch']}, float32, commit {commits}"
    return f"{where}; medians of processor time; `results/{name}`."


# Tables
def make_teachers():
    """Shipped teachers, from teachers/index.json."""
    index = json.loads((ROOT / "teachers/index.json").read_text())
    rows = []
    for name, known in index.items():
        command = known["command"].split(" --export")[0]
        rows.append([f"`{name}`", f"{known['accuracy']:.2f} %", known["data"], f"`{command}`"])
    return format_table(["teacher", "test accuracy", "data", "trained by"], rows)


def make_inversion():
    """Agreement of teacher and verifier, over the seeds of a setting."""
    rows = []
    for stem, runs in read_seeds("inversion-*-seed*.json").items():
        first = runs[0]
        seconds = statistics.mean(run["seconds"] for run in runs)
        rows.append(
            [
                f"`{get_preset(first)}`",
                f"`{first['teacher']}`",
                format_percent([run["teacher_agreement"] for run in runs], 1),
                f"`{first['verifier']}`",
                format_percent([run["verifier_agreement"] for run in runs], 1),
                str(len(runs)),
                f"{seconds:.0f} s, {name_device(first)}",
                f"`results/{stem}-seed*.json`",
            ]
        )
    head = ["setting", "teacher", "it agrees", "verifier", "it agrees"]
    return format_table([*head, "seeds", "seconds, device", "files"], rows)


ARM_TITLES = {
    "imagenet": "`imagenet`: 10 of 20 images a step, CE at temperature 2",
    "imagenet-long": "`imagenet-long`: CE without a temperature, a quarter more steps",
    "whole-long": "20 of 20 images a step, half as many steps",
    "ten": "5 of 10 images a step, CE without a temperature",
    "whole": "10 of 10 images a step, half as many steps",
    "single": "10 of 10, all steps at 224 px: as much work",
    "dream": "10 of 10, no moment loss (DeepDream)",
}


def make_imagenet():
    """Agreement of three networks with the ImageNet classes inverted from the first."""
    saved = read_json("imagenet.json")
    rows = []
    for arm, title in ARM_TITLES.items():
        if arm not in saved:
            continue
        runs = saved[arm]["runs"]
        row = [title]
        for name in runs[0]["agreement"]:
            row.append(format_percent([run["agreement"][name] for run in runs], 1))
        n_images = sum(run["n_images"] for run in runs)
        seconds = statistics.mean(run["seconds"] / run["n_images"] for run in runs)
        row += [f"{len(runs)} × {n_images // len(runs)}", f"{10 * seconds:.0f}"]
        rows.append(row)
    head = ["arm", "Lite0, inverted", "Lite1", "Lite2", "seeds × images", "s per 10 images"]
    where = name_device(saved["imagenet"]["runs"][0])
    return f"{format_table(head, rows)}\n\n{where}, beside other work."


def make_moment_grid():
    """Mean agreement of the verifiers for each form and weight of the moment loss."""
    saved = read_json("moment-forms.json")
    rows = []
    for form in ("l2", "relative", "kl"):
        found = [row for row in saved["grid"] if row["form"] == form]
        for weight in sorted({row["weight"] for row in found}):
            at_weight = [row for row in found if row["weight"] == weight]
            verifier = [row["verifier_agreement"] for row in at_weight]
            teacher = [row["teacher_agreement"] for row in at_weight]
            means = [f"{statistics.mean(verifier):.1f} %", f"{min(verifier):.0f} %"]
            means += [f"{statistics.mean(teacher):.1f} %", f"{min(teacher):.0f} %"]
            rows.append([f"`{form}`", f"{weight:g}", *means])
    head = ["form", "weight", "verifier, mean", "lowest", "teacher, mean", "lowest"]
    return format_table(head, rows)


def make_moment_forms():
    """Agreement and distances of the three forms, each with its one weight, by network."""
    saved = read_json("moment-forms.json")
    rows = []
    for network in dict.fromkeys(row["network"] for row in saved["rows"]):
        for form in ("l2", "relative", "kl"):
            runs = [r for r in saved["rows"] if (r["network"], r["form"]) == (network, form)]
            row = [network, f"`{form}`, {runs[0]['weight']:g}"]
            row.append(format_percent([run["teacher_agreement"] for run in runs], 1))
            row.append(format_percent([run["verifier_agreement"] for run in runs], 1))
            for other in ("l2", "relative", "kl"):
                row.append(f"{statistics.mean(run[f'distance_{other}'] for run in runs):.3g}")
            rows.append(row)
    head = ["network", "form, weight", "teacher agrees", "verifier agrees"]
    return format_table([*head, "left: `l2`", "`relative`", "`kl`"], rows)


def make_zskt():
    """Final-iterate accuracies of zero-shot students, over the seeds of a setting."""
    rows = []
    for stem, runs in read_seeds("zskt-*-seed*.json").items():
        first = runs[0]
        students = [run["student_accuracy"] for run in runs]
        rows.append(
            [
                f"`{get_preset(first)}`",
                f"`{first['teacher']}` → `{first['student']}`",
                f"{first['teacher_accuracy']:.2f} %",
                format_percent(students),
                format_relative(students, first["teacher_accuracy"]),
                str(first["setting"]["pseudo_batches"]),
                str(len(runs)),
                format_longest(runs),
                f"`results/{stem}-seed*.json`",
            ]
        )
    head = ["setting", "teacher → student", "teacher", "student", "relative", "steps N", "seeds"]
    return format_table([*head, "longest, device", "files"], rows)


def make_mte():
    """Mean transition errors of students of one teacher."""
    saved = read_json("mte-mnist.json")
    rows = []
    for path, row in saved["students"].items():
        name = f"`{Path(path).parent.name}`"
        rows.append([name, f"{row['accuracy']:.2f} %", f"{row['mte']:.3f}", str(row["paths"])])
    table = format_table(["student", "test accuracy", "mean transition error", "paths"], rows)
    steps = f"{saved['steps']} steps of size {saved['step_size']}"
    return f"{table}\n\nTeacher `{saved['teacher']}`, {steps}; `results/mte-mnist.json`."


def make_replay():
    """The three memories of pseudo_replay.py, over seeds."""
    columns = ["mean", "std", "variance", "best", "final", "last_quarter"]
    order = ["none", "bank", "vae"]
    rows = []
    for path in sorted(RESULTS.glob("replay-*.json")):
        table = json.loads(path.read_text())
        for memory in sorted(table["arms"], key=order.index):
            runs = table["arms"][memory]
            cells = [format_spread([run[column] for run in runs]) for column in columns]
            seconds = max(run["seconds"] for run in runs)
            cost = [f"{runs[0]['memory_bytes']:,}", f"{len(runs)}, {seconds:.0f} s"]
            rows.append([table["dataset"], f"`{memory}`", *cells, *cost])
    names = [column.replace("_", " ") for column in columns]
    return format_table(["data", "memory", *names, "bytes held", "seeds, longest"], rows)


def make_ensemble():
    """Final-iterate accuracies of students of ensembles, by setting."""
    rows = []
    for stem, runs in read_seeds("ensemble-*-seed*.json").items():
        first = runs[0]
        setting = first["setting"]
        students = [run["student_accuracy"] for run in runs]
        rows.append(
            [
                f"`{get_preset(first)}`",
                f"{setting['generators']} of {first['generator_parameters']:,}",
                f"`{first['teacher']}` → `{first['student']}`",
                f"{first['teacher_accuracy']:.2f} %",
                format_percent(students),
                format_relative(students, first["teacher_accuracy"]),
                f"{setting['steps']}, {setting['epochs']}",
                f"{len(runs)}, {format_longest(runs)}; `results/{stem}-seed*.json`",
            ]
        )
    head = ["setting", "generators", "teacher → student", "teacher", "student", "relative"]
    return format_table([*head, "steps, epochs", "seeds, longest"], rows)


def make_students():
    """Final-iterate accuracies of students of inverted images, by arm."""
    rows = []
    for path in sorted(RESULTS.glob("students-*.json")):
        for arm, runs in json.loads(path.read_text())["arms"].items():
            first = runs[0]
            students = [run["student_accuracy"] for run in runs]
            falls = [max(run["accuracies"]) - run["student_accuracy"] for run in runs]
            rows.append(
                [
                    path.stem.partition("-")[2],
                    arm,
                    f"`{first['teacher']}` → `{first['student']}`",
                    f"{first['n_images']:,}",
                    f"{first['teacher_accuracy']:.2f} %",
                    format_percent(students),
                    format_relative(students, first["teacher_accuracy"]),
                    f"{statistics.mean(falls):.2f}",
                    str(len(runs)),
                    format_longest(runs),
                ]
            )
    head = ["data", "arm", "teacher → student", "images", "teacher", "student", "relative"]
    return format_table([*head, "best less final", "seeds", "longest, device"], rows)


def make_real_moments():
    """What a student has with BatchNorm moments of real images, from results/real_moments.py."""
    rows = []
    for label, found in read_json("real-moments.json").items():
        rows.append([label, f"{found['accuracy']:.2f} %", f"{found['real_moments']:.2f} %"])
    return format_table(["student", "as it is", "moments of 1,000 real images"], rows)


ROLES = {  # what an arm's networks were trained with: teacher, student
    "base": ("base", "base"),
    "teacher": ("its schedule", "base"),
    "student": ("base", "its schedule"),
    "both": ("its schedule", "its schedule"),
    "shared": ("its schedule", "the teacher's"),
    "random": ("its schedule", "its own, on random operations"),
    "constant": ("its schedule", "the last policy of its own"),
}


def format_interval(found):
    """A mean and half the width of its 95 % interval."""
    return f"{found['mean']:+.2f} ± {found['half_width']:.2f}"


def make_roles():
    """The seven arms of role-wise augmentation, from results/role-kd-cifar10.json."""
    saved = read_json("role-kd-cifar10.json")
    rows = []
    for arm, (teacher, student) in ROLES.items():
        found = saved["summary"][arm]
        low = found["mean"] - found["half_width"]
        high = found["mean"] + found["half_width"]
        row = [f"`{arm}`", teacher, student, f"{found['mean']:.2f} ± {found['std']:.2f} %"]
        row.append(f"{low:.2f} to {high:.2f}")
        difference = ""
        if arm != "both":
            difference = format_interval(found["both_less_this"])
        row.append(difference)
        rows.append(row)
    head = ["arm", "teacher's augmentation", "student's", "student, mean ± std", "95 % interval"]
    text = format_table([*head, "`both` less this arm, 95 %"], rows)

    runs = saved["arms"]["both"]
    teachers = []
    for kind in ("base", "augmented"):
        values = [run["teacher_accuracies"][kind] for run in runs]
        teachers.append(f"{kind} {format_percent(values)}")
    costs = []
    for role in ("teacher", "student"):
        found = [run["searches"][role] for run in runs]
        seconds = statistics.mean(search["seconds"] for search in found)
        error = max(search["reward_standard_error"] for search in found)
        cost = f"{role}'s search {found[0]['member_epochs']} member-epochs, {seconds:.0f} s, "
        cost += f"{found[0]['images_trained']:,} images trained and "
        cost += f"{found[0]['images_measured']:,} measured, reward ± {error:.1f} points"
        costs.append(cost)
    pair = f"`{saved['teacher']}` → `{saved['student']}`, {len(runs)} seeds"
    where = f"{name_device(runs[0])}; `results/role-kd-cifar10.json`."
    return f"{text}\n\n{pair}; teachers: {', '.join(teachers)}; {'; '.join(costs)}; {where}"


def make_roles_digits():
    """Students of role_kd.py on digits, over the seeds of a setting."""
    rows = []
    for stem, runs in read_seeds("role-kd-digits*-seed*.json").items():
        first = runs[0]
        setting = first["setting"]
        student = f"`{first['student']}`"
        if setting["bits"] < 32:
            student += f", W{setting['bits']}A{setting['bits']}"
        row = [f"`{first['teacher']}` → {student}"]
        for kind in ("base", "augmented"):
            row.append(format_accuracies([run["teacher_accuracies"] for run in runs], kind))
        for arm in ("base", "both"):
            row.append(format_accuracies([run["student_accuracies"] for run in runs], arm))
        row += [str(len(runs)), format_longest(runs), f"`results/{stem}-seed*.json`"]
        rows.append(row)
    head = ["teacher → student", "teacher, base", "its schedule", "student, `base`", "`both`"]
    return format_table([*head, "seeds", "longest, device", "files"], rows)


def make_generators(data):
    """One generator against many, from results/ensemble-arms-DATA.json."""
    table = read_json(f"ensemble-arms-{data}.json")
    rows = []
    for arm, runs in table["arms"].items():
        row = [
            arm,
            format_percent([run["student_accuracy"] for run in runs]),
            format_percent([min(run["class_accuracies"]) for run in runs], 1),
            format_percent([run["hits"] for run in runs], 1),
        ]
        for kind in ("pixels", "features"):
            ratios = [100 * run["diversity"][kind] / run["real_diversity"][kind] for run in runs]
            row.append(format_percent(ratios, 0))
        rows.append([*row, str(len(runs))])
    head = ["generators, parameters each", "student", "its weakest class", "images on target"]
    text = format_table([*head, "distance in pixels", "in features", "seeds"], rows)
    pair = f"`{table['teacher']}` → `{table['student']}`"
    note = (
        f"{table['steps']} steps of {table['batch_size']} images each; {pair}; distances within a "
    )
    note += "class, in percent of that of real test images; "
    return f"{text}\n\n{note}`results/ensemble-arms-{data}.json`."


def make_generators_digits():
    return make_generators("digits")


def make_generators_mnist():
    return make_generators("mnist")


def make_ensemble_speed():
    """Generators together against one after another, from results/ensemble-speed.json."""
    saved = read_json("ensemble-speed.json")
    rows = []
    for row in saved["rows"]:
        together = row["together_ms"]
        alone = row["alone_ms"]
        sizes = [str(row["width"]), str(row["images_per_generator"])]
        rows.append([*sizes, str(together), str(alone), f"{together / alone:.2f}"])
    head = ["width", "images of a generator", "10 together, ms", "10 × one, ms", "ratio"]
    versions = saved["versions"]
    where = f"{name_device(saved)}, torch {versions['torch']}, commit {versions['commit']}"
    note = (
        f"One step of `{saved['teacher']}`, medians of 8; {where}; `results/ensemble-speed.json`."
    )
    return f"{format_table(head, rows)}\n\n{note}"


def make_architectures():
    """What fuse_batchnorm makes of others' networks, from results/architectures.json."""
    saved = read_json("architectures.json")
    rows = []
    for row in saved["rows"]:
        layers = f"{row['measured']} of {row['batchnorms']}"
        error = f"{max(row['errors'].values()):.0e}"
        network = f"{row['library']} `{row['name']}`"
        rows.append([network, layers, row["kind"], error, row["reason"]])
    head = ["network", "BatchNorms measured", "kind", "largest error", "why not fused"]
    counts = []
    for library in ("torchvision", "timm"):
        kinds = [row["kind"] for row in saved["rows"] if row["library"] == library]
        sizes = [f"{kinds.count(kind)} {kind}" for kind in ("fused", "partly fused", "hooks")]
        counts.append(f"{library}: {', '.join(sizes)}")
    n_wrong = sum(not row["right"] for row in saved["rows"])
    versions = saved["versions"]
    libraries = f"torchvision {saved['torchvision']}, timm {saved['timm']}"
    where = f"{libraries}, torch {versions['torch']}, commit {versions['commit']}"
    note = (
        f"{'; '.join(counts)}; {n_wrong} wrong. Errors of output, moment loss and image gradient, "
        f"relative to the largest value. {where}; `results/architectures.json`."
    )
    return f"{format_table(head, rows)}\n\n{note}"


SOURCES = {
    "inverted": "inverted",
    "lowpass": "inverted, low-pass",
    "real": "real, without labels",
    "mnist": "MNIST",
    "digits": "digits",
    "noise": "Gaussian noise",
}


def rank_values(values):
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def make_quantization(dataset="cifar10"):
    """Quantized networks by source of images and bits, over seeds."""
    runs = {}
    for stem, of_source in read_seeds(f"quantization-{dataset}-*-seed*.json").items():
        runs[stem.rpartition("-")[2]] = of_source
    rows = []
    points = {}  # of each pair of bits: (similarity, accuracy) of each source
    for source, title in SOURCES.items():
        if source not in runs:
            continue
        of_source = runs[source]
        whole = statistics.mean(run["teacher_accuracy"] for run in of_source)
        similarity = statistics.mean(run["similarity"] for run in of_source)
        for bits in of_source[0]["setting"]["bits"]:
            with_bits = [run for run in of_source if bits in run["student_accuracy"]]
            tuned = [run["student_accuracy"][bits] for run in with_bits]
            calibrated = [run["calibrated_accuracy"][bits] for run in with_bits]
            points.setdefault(bits, []).append((similarity, statistics.mean(tuned)))
            rows.append(
                [
                    title,
                    f"{similarity:.2g}",
                    bits,
                    format_percent(calibrated),
                    format_percent(tuned),
                    f"{whole - statistics.mean(tuned):.2f}",
                    str(len(with_bits)),
                ]
            )
    correlations = []
    for bits, pairs in points.items():
        if len(pairs) >= 3:
            ranks = [rank_values([pair[i] for pair in pairs]) for i in range(2)]
            correlations.append(f"{bits} {statistics.correlation(*ranks):.2f}")
    claim = "too few sources for a rank correlation"
    if correlations:
        figures = ", ".join(correlations)
        claim = f"rank correlation of distance and accuracy over the sources: {figures}"
    first = runs["inverted"][0]
    setting = first["setting"]
    n_steps = setting["epochs"] * setting["steps_per_epoch"]
    head = ["images", "distance", "bits", "calibrated", "fine-tuned", "gap", "seeds"]
    versions = first["versions"]
    note = (
        f"`{first['teacher']}`, float {first['teacher_accuracy']:.2f} % of the first "
        f"{setting['test_images']:,} test images; {first['n_images']} images, {n_steps} updates "
        f"of {setting['batch_size']}; {claim}. {name_device(first)}, torch "
        f"{versions['torch']}; `results/quantization-{dataset}-*.json`."
    )
    return f"{format_table(head, rows)}\n\n{note}"


def make_quantization_mnist():
    return make_quantization("mnist")


CONTINUAL_ARMS = {
    "base": "`base`: new images alone",
    "lwf": "`lwf`",
    "lwf-mc": "`lwf-mc`",
    "deepinversion": "`deepinversion`",
    "abd": "`abd`",
    "oracle-distill": "`oracle-distill`: real old images",
    "oracle-classify": "`oracle-classify`: and their labels",
    "joint": "`joint`: all real images",
}


def make_continual():
    """Class-incremental learning: a row an arm and sequence of tasks, over seeds."""
    rows = []
    notes = []
    for stem, runs in read_seeds("continual-*-seed*.json").items():
        setting = runs[0]["setting"]
        for arm, title in CONTINUAL_ARMS.items():
            with_arm = [run["arms"][arm] for run in runs if arm in run["arms"]]
            if not with_arm:
                continue
            row = [f"`{setting['setting']}`", title]
            for name in ("accuracy", "old", "new", "forgetting"):
                row.append(format_spread([tasks[-1][name] for tasks in with_arm], 1))
            means = [[task["accuracy"] for task in tasks] for tasks in with_arm]
            curve = [f"{statistics.mean(values):.0f}" for values in zip(*means, strict=True)]
            rows.append([*row, " ".join(curve), str(len(with_arm))])
        n_steps = setting["epochs"] * setting["steps_per_epoch"]
        tested = "all test images"
        if setting["test_images"]:
            tested = f"the first {setting['test_images']:,} test images of each task"
        longest = format_longest(runs)
        notes.append(
            f"`{setting['setting']}`: {' '.join(setting['tasks'])}; {n_steps} updates a task; "
            f"{tested}; all arms of a seed {longest}; `results/{stem}-seed*.json`."
        )
    if not rows:
        return "Not measured yet."
    head = ["tasks", "arm", "all classes, %", "old, %", "new, %", "forgetting"]
    table = format_table([*head, "after each task", "seeds"], rows)
    return "\n\n".join([table, *notes])


PRUNING_ARMS = {  # end of a file's name: what was changed, or the images
    "inverted": "inverted",
    "noise": "Gaussian noise",
    "mnist": "MNIST",
    "digits": "digits",
    "real": "real, without labels",
    "random": "inverted; channels at random",
    "magnitude": "inverted; channels by magnitude",
    "magnitude-noise": "Gaussian noise; channels by magnitude",
    "magnitude-mnist": "MNIST; channels by magnitude",
    "frozen": "inverted; statistics of the whole network",
    "noise-frozen": "Gaussian noise; statistics of the whole network",
    "mnist-frozen": "MNIST; statistics of the whole network",
    "batch": "inverted; BatchNorm in train mode",
    "latency": "inverted; milliseconds counted, eta 1",
}


def list_pruned():
    """[(data set, arm's title, runs)] of the pruned networks, in the order of PRUNING_ARMS."""
    runs = read_seeds("pruning-*-seed*.json")
    found = []
    for dataset in ("cifar10", "mnist", "digits"):
        for arm, title in PRUNING_ARMS.items():
            of_arm = runs.get(f"pruning-{dataset}-{arm}")
            if of_arm:
                found.append((dataset, title, of_arm))
    return found


def make_pruning():
    """Pruned networks by images and criterion, over seeds."""
    head = ["network", "images", "removed", "no fine-tuning", "BatchNorm re-estimated"]
    head += ["fine-tuned", "then re-estimated", "recovered", "seeds"]
    rows = []
    for _, title, runs in list_pruned():
        for target in runs[0]["pruned_accuracy"]:
            stages = []
            for stage in ("pruned", "reestimated", "student", "student_reestimated"):
                stages.append([run[f"{stage}_accuracy"][target] for run in runs])
            recovered = []
            for run, pruned, student in zip(runs, stages[0], stages[2], strict=True):
                lost = run["teacher_accuracy"] - pruned
                if lost > 0:
                    recovered.append(100 * (student - pruned) / lost)
            row = [f"`{runs[0]['teacher']}`", title, f"{target} %"]
            row += [format_percent(stage) for stage in stages]
            share = format_percent(recovered, 0) if recovered else ""
            rows.append([*row, share, str(len(runs))])
    return f"{format_table(head, rows)}\n\n{describe_pruning()}{compare_pruning()}"


def compare_pruning(dataset="cifar10", target="25"):
    """What fine-tuning on each source of images recovers, of what is lost without it."""
    found = {}
    for name, title, runs in list_pruned():
        if name == dataset and title in SOURCES.values():
            shares = []
            for run in runs:
                pruned = run["pruned_accuracy"][target]
                gained = run["student_accuracy"][target] - pruned
                shares.append(100 * gained / (run["teacher_accuracy"] - pruned))
            found[title] = shares
    if "inverted" not in found:
        return ""
    means = {title: statistics.mean(shares) for title, shares in found.items()}
    half = "half or more" if means["inverted"] >= 50 else "less than half"
    figures = ", ".join(f"{title} {format_percent(shares, 0)}" for title, shares in found.items())
    return f"\n\nWithout {target} % of the weights inverted images recover {half}: {figures}."


def describe_pruning():
    """What the runs of make_pruning have in common, a line a data set."""
    lines = []
    for dataset in ("cifar10", "mnist", "digits"):
        runs = [run for name, _, of_arm in list_pruned() if name == dataset for run in of_arm]
        if not runs:
            continue
        first = runs[0]
        setting = first["setting"]
        n_steps = setting["epochs"] * setting["steps_per_epoch"]
        tested = "all"
        if setting["test_images"]:
            tested = f"the first {setting['test_images']:,}"
        lines.append(
            f"`{first['teacher']}`: {first['teacher_accuracy']:.2f} % of {tested} test images; "
            f"{first['n_images']:,} images, {n_steps} updates of {setting['batch_size']}; "
            f"{format_longest(runs)}, torch {first['versions']['torch']}; "
            f"`results/pruning-{dataset}-*.json`."
        )
    return "\n\n".join(lines)


def make_pruning_sizes():
    """Sizes and times of pruned networks: the first seed of the arms that choose channels."""
    head = ["network", "images", "removed", "parameters", "MFLOPs", "ms: whole", "pruned"]
    rows = []
    for _, title, runs in list_pruned():
        run = runs[0]
        changed = run["setting"]["statistics"] != "reestimated"
        if run["images"] not in ("auto", "runs/inverted") or changed:
            continue
        for target in run["pruned_accuracy"]:
            row = [f"`{run['teacher']}`", title, f"{target} %"]
            row.append(f"{run['parameters']['whole']:,} → {run['parameters'][target]:,}")
            flops = [run["flops"][name] / 1e6 for name in ("whole", target)]
            row.append(f"{flops[0]:.1f} → {flops[1]:.1f}")
            row += [f"{run['milliseconds'][name]:.1f}" for name in ("whole", target)]
            rows.append(row)
    return format_table(head, rows)


def make_trace():
    """A short run of zskt.py's paper setting beside the first window of the authors' log."""
    columns = ["loss/generator", "loss/student", "eval/max_p_teacher", "eval/max_p_student"]
    lines = (RESULTS / "zskt-cifar10-trace.jsonl").read_text().splitlines()
    rows = []
    before = 0
    for line in lines:
        row = json.loads(line)
        figures = [f"{row[column]:.3f}" for column in columns]
        rows.append([f"{before + 1} to {row['step']}", *figures])
        before = row["step"]
    rows.append(["authors, 1 to 800", "-0.113", "0.263", "0.853", "0.365"])
    head = ["pseudo-batches", "loss_G", "loss_S", "mean max p_T", "mean max p_S"]
    return format_table(head, rows)


def make_cpu_ops():
    """Ops on a CPU: forward, and forward + backward; eager, torch.compile, ours."""
    modes = ("forward", "both")
    measured = [row for row in read_rows("bench-cpu.csv") if row["mode"] in modes]
    rows = []
    for row in measured:
        eager = float(row["eager_ms"])
        compiled = float(row["compile_ms"] or "nan")
        ours = float(row["ours_ms"])
        mode = "forward + backward" if row["mode"] == "both" else "forward"
        shape = f"{row['shape']}, {row['layout']}"
        times = [f"{eager:.2f}", f"{compiled:.2f}", f"{ours:.2f}"]
        ratios = [f"{eager / ours:.2f}", f"{compiled / ours:.2f}"]
        percent = f"{float(row['percent_of_limit']):.0f}"
        rows.append([row["op"], shape, mode, *times, *ratios, percent])
    head = ["op", "shape, layout", "mode", "eager, ms", "compile, ms", "ours, ms"]
    text = format_table([*head, "eager / ours", "compile / ours", "% of limit"], rows)
    return f"{text}\n\nA ratio below 1: we lose. {describe_bench('bench-cpu.csv', measured)}"


def make_cpu_step():
    """Whole synthesis steps of ResNet-20 on a CPU."""
    measured = [row for row in read_steps() if row["shape"].startswith("resnet20 ")]
    rows = []
    for row in measured:
        name = row["op"].removeprefix("step: ")
        ratios = [f"{float(row['times_bare']):.2f}", f"{float(row['times_conventional']):.2f}"]
        percent = f"{float(row['percent_of_limit']):.0f}"
        rows.append([name, f"{float(row['ours_ms']):.1f}", *ratios, percent])
    head = ["one step, ResNet-20, 100 images of 32 px", "ms", "× bare", "× conventional"]
    table = format_table([*head, "% of limit"], rows)
    return f"{table}\n\n{describe_bench('bench-cpu.csv', measured)}"


def read_steps():
    """The rows of whole synthesis steps on a CPU."""
    return [row for row in read_rows("bench-cpu.csv") if row["mode"] == "step"]


def make_bf16_steps():
    """Steps on a CPU in bfloat16 and fp32, from results/bf16-cpu.json."""
    saved = read_json("bf16-cpu.json")
    rows = []
    for row in saved["steps"]:
        ours = row["ours_bf16_ms"]
        shape = f"{row['network']}, {row['n_images']} images of {row['image_size']} px"
        times = [row["ours_ms"], ours, row["bare_ms"], row["bare_bf16_ms"]]
        ratios = [f"{ours / row['ours_ms']:.2f}", f"{ours / row['bare_bf16_ms']:.2f}"]
        cosine = f"{row['gradient_cosine']:.4f}"
        rows.append([shape, *(f"{ms:.0f}" for ms in times), *ratios, cosine])
    head = ["one step", "fp32, ms", "bf16, ms", "bare fp32, ms", "bare bf16, ms"]
    head += ["bf16 / fp32", "bf16 / bare bf16", "cosine of the gradients"]
    versions = saved["versions"]
    note = (
        f"{name_device(saved)}, torch {versions['torch']}, commit {versions['commit']}; medians "
        "of processor time; `results/bf16-cpu.json`."
    )
    return f"{format_table(head, rows)}\n\n{note}"


def make_bf16_images():
    """What a verifier sees in images made in bfloat16 and in fp32."""
    saved = read_json("bf16-cpu.json")["images"]
    rows = []
    for precision, runs in saved.items():
        agreements = [run["verifier_agreement"] for run in runs]
        each = ", ".join(f"{agreement:.0f}" for agreement in agreements)
        rows.append([precision, format_percent(agreements, 1), each])
    head = ["activations", "`cifar10-wrn-16-1` agrees", "seeds 0 to 2"]
    return f"{format_table(head, rows)}\n\n`results/bf16-cpu.json`."


def make_cpu_networks():
    """Whole synthesis steps of all networks on a CPU: a row a network."""
    measured = read_steps()
    networks = {}
    for row in measured:
        column = row["op"].removeprefix("step: ")
        ratios = f"{float(row['times_bare']):.2f}, {float(row['times_conventional']):.2f}"
        cell = f"{float(row['ours_ms']):.0f} ({ratios})"
        networks.setdefault(row["shape"], {})[column] = cell
    columns = ["bare", "conventional", "ours", "ours without fused BatchNorm"]
    columns += ["tuned", "tuned compile"]
    rows = []
    for shape, cells in networks.items():
        rows.append([shape, *(cells.get(column, "not run") for column in columns)])
    table = format_table(["network and images", *columns], rows)
    return f"{table}\n\nms (× bare, × conventional). {describe_bench('bench-cpu.csv', measured)}"


def make_cpu_once():
    """What fuse_batchnorm costs once on a CPU."""
    measured = [row for row in read_rows("bench-cpu.csv") if row["mode"] == "once"]
    rows = []
    for row in measured:
        figures = [f"{float(row['ours_ms']):.0f}", f"{float(row['times_step']):.2f}"]
        rows.append([row["shape"], row["op"].removeprefix("once: "), *figures])
    table = format_table(["network and images", "what", "ms", "steps"], rows)
    return f"{table}\n\n{describe_bench('bench-cpu.csv', measured)}"


RELEASED = "bench-released-cpu.csv"


def make_released():
    """Whole steps of released loops beside ours on a CPU: a row a loop and network."""
    rows = []
    for row in read_rows(RELEASED):
        loop = row["op"].removeprefix("released: ")
        times = [f"{float(row[name]):.0f}" for name in ("released_ms", "ours_ms")]
        names = ("times_ours", "times_ours_p20", "times_ours_p80", "times_ours_wall")
        median, low, high, wall = (f"{float(row[name]):.2f}" for name in names)
        ratio = f"{median} ({low} to {high})"
        rows.append([loop, row["shape"], *times, ratio, wall, row["rounds"]])
    head = ["released loop", "network, images", "released, ms", "ours, ms", "released / ours"]
    table = format_table([*head, "by the wall clock", "turns"], rows)
    return f"{table}\n\n{describe_bench(RELEASED, read_rows(RELEASED))}"


def make_released_range():
    """The README's sentence on released loops: the least and the largest ratio of each method."""
    ratios = {}
    for row in read_rows(RELEASED):
        method = row["op"].removeprefix("released: ").partition(",")[0]
        ratios.setdefault(method, []).append(float(row["times_ours"]))
    ranges = [f"{method} {min(r):.2f} to {max(r):.2f}" for method, r in ratios.items()]
    link = "[all networks](results/README.md#speed-on-a-cpu)"
    return (
        "A step of the loops that authors released takes more processor time than ours, on one CPU "
        f"thread and in fp32, by these factors: {', '.join(ranges)}; {link}."
    )


def sort_arms(saved):
    """The arms of results/which.py, the best first; the controls last."""

    def rank(arm):
        is_control = arm["title"].startswith("control")
        return is_control, -statistics.mean(arm["accuracy"])

    return sorted(saved["arms"].values(), key=rank)


def make_which(data):
    """All methods and controls on one data set, from results/which.py."""
    saved = read_json(f"which-{data}.json")
    rows = []
    for arm in sort_arms(saved):
        shared, _, own = arm["command"].partition(" --resume ")
        script, _, options = shared.partition(" ")
        row = [arm["title"], format_percent(arm["accuracy"])]
        row.append(format_relative(arm["accuracy"], saved["teacher_accuracy"]))
        row.append(format_spread(arm["seconds"], 0))
        row += [str(len(arm["seeds"])), f"`{script} … {own}`"]
        rows.append(row)
    head = ["arm", "student, final", "relative to the teacher", "seconds", "seeds", "command"]
    where = f"`{saved['teacher']}` ({saved['teacher_accuracy']:.2f} %) → `{saved['student']}`; "
    where += f"{name_device(arm)} a run, {saved['jobs']} runs at a time, "
    where += f"torch {arm['versions']['torch']}; the dots stand for `{options}`, "
    where += f"with each run's own seed and folder; `results/which-{data}.json`."
    return f"{format_table(head, rows)}\n\n{where}"


def make_which_digits():
    return make_which("digits")


def make_which_mnist():
    return make_which("mnist")


def make_which_cifar10():
    return make_which("cifar10")


def make_which_short():
    """README's table: the student's accuracy by method and data set."""
    sets = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}
    saved = [read_json(f"which-{name}.json") for name in sets]
    rows = []
    for arm in sort_arms(saved[0]):
        row = [arm["title"]]
        for table in saved:
            found = [other for other in table["arms"].values() if other["title"] == arm["title"]]
            row += [format_percent(other["accuracy"]) for other in found] or [""]
        rows.append(row)
    head = ["arm"]
    for table, name in zip(saved, sets.values(), strict=True):
        head.append(f"{name}, about {table['budget']} s a method")
    return format_table(head, rows)


MAKERS = {
    "teachers": make_teachers,
    "which_digits": make_which_digits,
    "which_mnist": make_which_mnist,
    "which_cifar10": make_which_cifar10,
    "which_short": make_which_short,
    "inversion": make_inversion,
    "students": make_students,
    "real_moments": make_real_moments,
    "imagenet": make_imagenet,
    "moment_grid": make_moment_grid,
    "moment_forms": make_moment_forms,
    "zskt": make_zskt,
    "mte": make_mte,
    "trace": make_trace,
    "replay": make_replay,
    "ensemble": make_ensemble,
    "ensemble_arms_digits": make_generators_digits,
    "ensemble_arms_mnist": make_generators_mnist,
    "ensemble_speed": make_ensemble_speed,
    "roles": make_roles,
    "roles_digits": make_roles_digits,
    "architectures": make_architectures,
    "quantization": make_quantization,
    "quantization_mnist": make_quantization_mnist,
    "pruning": make_pruning,
    "pruning_sizes": make_pruning_sizes,
    "continual": make_continual,
    "cpu_ops": make_cpu_ops,
    "cpu_step": make_cpu_step,
    "cpu_networks": make_cpu_networks,
    "cpu_once": make_cpu_once,
    "bf16_steps": make_bf16_steps,
    "bf16_images": make_bf16_images,
    "released": make_released,
    "released_range": make_released_range,
}


def fill_markers(text):
    """The text of a README with each table between its markers."""
    for name, make in MAKERS.items():
        begin = f"<!-- begin:{name} -->\n"
        end = f"<!-- end:{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            after = rest[rest.index(end) :]
            text = f"{before}{begin}{make()}\n{after}"
    return text


def main():
    for path in READMES:
        path.write_text(fill_markers(path.read_text()))
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
