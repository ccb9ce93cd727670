"""Write the tables of README.md, teachers/README.md and results/README.md from the JSON and CSV files behind them.

    python results/tables.py

Each table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; a test fails where text and files differ.
"""

import csv
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / f"{folder}README.md" for folder in ("", "kernels/", "results/", "teachers/")]


def teachers_table():
    """Shipped teachers, from teachers/index.json."""
    index = json.loads((ROOT / "teachers/index.json").read_text())
    lines = ["| teacher | test accuracy | data | trained by |", "|---|---|---|---|"]
    for name, t in index.items():
        command = t["command"].split(" --export")[0]
        lines.append(f"| `{name}` | {t['accuracy']:.2f} % | {t['data']} | `{command}` |")
    return "\n".join(lines)


def inversion_table():
    """Agreement of teacher and verifier, mean ± std over the seeds of a setting, from results/inversion-*.json."""
    runs = {}
    for path in sorted((ROOT / "results").glob("inversion-*.json")):
        result = json.loads(path.read_text())
        runs.setdefault((result["setting"]["name"], result["teacher"], result["verifier"]), []).append(result)
    lines = ["| setting | teacher | it agrees | verifier | it agrees | seeds | seconds, device | files |"]
    lines.append("|---" * 8 + "|")
    for (setting, teacher, verifier), group in sorted(runs.items(), key=str):
        seconds = statistics.mean(r["seconds"] for r in group)
        agree = [spread([r[f"{role}_agreement"] for r in group], 1) for role in ("teacher", "verifier")]
        lines.append(
            f"| `{setting}` | `{teacher}` | {agree[0]} | `{verifier}` | {agree[1]} "
            f"| {len(group)} | {seconds:.0f} s, {group[0]['device_name']} "
            f"| `results/inversion-{setting}-seed*.json` |"
        )
    return "\n".join(lines)


def spread(values, digits=2):
    """Mean ± standard deviation (of the sample), in percent."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation} %"


def zskt_table():
    """Final-iterate accuracies of zero-shot students, over the seeds of a setting, from results/zskt-*-seed*.json."""
    runs = {}
    for path in sorted((ROOT / "results").glob("zskt-*-seed*.json")):
        runs.setdefault(path.stem.rpartition("-seed")[0], []).append(json.loads(path.read_text()))
    lines = [
        "| setting | teacher → student | teacher | student | relative | steps N | seeds | longest, device | files |"
    ]
    lines.append("|---" * 9 + "|")
    for name, group in runs.items():
        first, students = group[0], [r["student_accuracy"] for r in group]
        relative = statistics.mean(students) / first["teacher_accuracy"]
        lines.append(
            f"| `{first['setting']['name']}` | `{first['teacher']}` → `{first['student']}` "
            f"| {first['teacher_accuracy']:.2f} % | {spread(students)} | {100 * relative:.1f} % "
            f"| {first['setting']['pseudo_batches']} | {len(group)} "
            f"| {max(r['seconds'] for r in group):.0f} s, {first['device_name']} | `results/{name}-seed*.json` |"
        )
    return "\n".join(lines)


def mte_table():
    """Mean transition errors of students of one teacher, from results/mte-mnist.json."""
    saved = json.loads((ROOT / "results/mte-mnist.json").read_text())
    lines = ["| student | test accuracy | mean transition error | paths |", "|---|---|---|---|"]
    for path, row in saved["students"].items():
        name = Path(path).parent.name
        lines.append(f"| `{name}` | {row['accuracy']:.2f} % | {row['mte']:.3f} | {row['paths']} |")
    note = (
        f"Teacher `{saved['teacher']}`, {saved['steps']} steps of size {saved['step_size']}; `results/mte-mnist.json`."
    )
    return "\n".join(lines) + "\n\n" + note


def replay_table():
    """The three memories of pseudo_replay.py, mean ± std over seeds, from results/replay-*.json."""
    columns = ("mean", "std", "variance", "best", "final", "last_quarter")
    names = " | ".join(c.replace("_", " ") for c in columns)
    lines = [f"| data | memory | {names} | bytes held | seeds, longest |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for path in sorted((ROOT / "results").glob("replay-*.json")):
        table = json.loads(path.read_text())
        for memory in sorted(table["arms"], key=["none", "bank", "vae"].index):
            runs = table["arms"][memory]
            cells = [spread([r[c] for r in runs]).removesuffix(" %") for c in columns]
            cost = f"{runs[0]['memory_bytes']:,} | {len(runs)}, {max(r['seconds'] for r in runs):.0f} s"
            lines.append(f"| {table['dataset']} | `{memory}` | " + " | ".join(cells) + f" | {cost} |")
    return "\n".join(lines)


def ensemble_table():
    """Final-iterate accuracies of students of ensembles, by setting, from results/ensemble-*-seed*.json."""
    runs = {}
    for path in sorted((ROOT / "results").glob("ensemble-*-seed*.json")):
        runs.setdefault(path.stem.rpartition("-seed")[0], []).append(json.loads(path.read_text()))
    lines = [
        "| setting | generators | teacher → student | teacher | student | relative | steps, epochs | seeds, longest |"
    ]
    lines.append("|---" * 8 + "|")
    for name, group in runs.items():
        first, students = group[0], [r["student_accuracy"] for r in group]
        setting, relative = first["setting"], statistics.mean(students) / first["teacher_accuracy"]
        lines.append(
            f"| `{setting['name']}` | {setting['generators']} of {first['generator_parameters']:,} "
            f"| `{first['teacher']}` → `{first['student']}` | {first['teacher_accuracy']:.2f} % | {spread(students)} "
            f"| {100 * relative:.1f} % | {setting['steps']}, {setting['epochs']} | {len(group)}, "
            f"{max(r['seconds'] for r in group):.0f} s, {first['device_name']}; `results/{name}-seed*.json` |"
        )
    return "\n".join(lines)


def students_table():
    """Final-iterate accuracies of students of inverted images, by arm, from results/students-*.json."""
    head = "teacher → student | images | teacher | student | relative | best less final | seeds | longest, device"
    lines = [f"| data | arm | {head} |", "|---" * 10 + "|"]
    for path in sorted((ROOT / "results").glob("students-*.json")):
        for arm, group in json.loads(path.read_text())["arms"].items():
            first, students = group[0], [r["student_accuracy"] for r in group]
            relative = statistics.mean(students) / first["teacher_accuracy"]
            fall = statistics.mean(max(r["accuracies"]) - r["student_accuracy"] for r in group)
            lines.append(
                f"| {path.stem.partition('-')[2]} | {arm} | `{first['teacher']}` → `{first['student']}` "
                f"| {first['n_images']:,} | {first['teacher_accuracy']:.2f} % | {spread(students)} "
                f"| {100 * relative:.1f} % | {fall:.2f} | {len(group)} "
                f"| {max(r['seconds'] for r in group):.0f} s, {first['device_name']} |"
            )
    return "\n".join(lines)


def students_summary():
    """One line a data set for README.md: the arms' final-iterate accuracies."""
    lines = []
    for path in sorted((ROOT / "results").glob("students-*.json")):
        arms = json.loads(path.read_text())["arms"]
        first = next(iter(arms.values()))[0]
        found = "; ".join(
            f"{arm} **{spread([r['student_accuracy'] for r in group])}** ({len(group)})" for arm, group in arms.items()
        )
        lines.append(
            f"- {path.stem.partition('-')[2]}, `{first['teacher']}` ({first['teacher_accuracy']:.2f} %) → "
            f"`{first['student']}`: {found}."
        )
    return "\n".join(lines)


def arms_table(data):
    """One generator against many, from results/ensemble-arms-DATA.json."""
    table = json.loads((ROOT / f"results/ensemble-arms-{data}.json").read_text())
    names = "student | its weakest class | images on target | distance in pixels | in features"
    lines = [f"| generators, parameters each | {names} | seeds |", "|---" * 7 + "|"]
    for arm, runs in table["arms"].items():
        ratio = {k: [100 * r["diversity"][k] / r["real_diversity"][k] for r in runs] for k in ("pixels", "features")}
        cells = [spread([r["student_accuracy"] for r in runs]), spread([min(r["class_accuracies"]) for r in runs], 1)]
        cells += [spread([r["hits"] for r in runs], 1), *(spread(v, 0) for v in ratio.values())]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(runs)} |")
    note = (
        f"{table['steps']} steps of {table['batch_size']} images each; `{table['teacher']}` → `{table['student']}`; "
    )
    note += "distances within a class, in percent of that of real test images; "
    return "\n".join(lines) + f"\n\n{note}`results/ensemble-arms-{data}.json`."


def ensemble_speed_table():
    """Generators together against one after another, from results/ensemble-speed.json."""
    saved = json.loads((ROOT / "results/ensemble-speed.json").read_text())
    lines = ["| width | images of a generator | 10 together, ms | 10 × one, ms | ratio |", "|---" * 5 + "|"]
    for r in saved["rows"]:
        ratio = f"{r['together_ms'] / r['alone_ms']:.2f}"
        cells = (r["width"], r["images_per_generator"], r["together_ms"], r["alone_ms"], ratio)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    where = f"{saved['device_name']}, torch {saved['versions']['torch']}, commit {saved['versions']['commit']}"
    return (
        "\n".join(lines)
        + f"\n\nOne step of `{saved['teacher']}`, medians of 8; {where}; `results/ensemble-speed.json`."
    )


def trace_table():
    """A short run of zskt.py's paper setting beside the first window of the authors' log."""
    rows = [json.loads(line) for line in (ROOT / "results/zskt-cifar10-trace.jsonl").read_text().splitlines()]
    lines = ["| pseudo-batches | loss_G | loss_S | mean max p_T | mean max p_S |", "|---|---|---|---|---|"]
    keys, before = ("loss/generator", "loss/student", "eval/max_p_teacher", "eval/max_p_student"), 0
    for row in rows:
        lines.append(f"| {before + 1} to {row['step']} | " + " | ".join(f"{row[k]:.3f}" for k in keys) + " |")
        before = row["step"]
    return "\n".join([*lines, "| authors, 1 to 800 | -0.113 | 0.263 | 0.853 | 0.365 |"])


def rows_of(name):
    with open(ROOT / "results" / name) as file:
        return list(csv.DictReader(file))


def cpu_ops_table():
    """Op rows of `python -m kernels.bench --cpu`; eager -> ours in ms."""
    lines = ["| op | shape | layout | forward | ratio | forward + backward | ratio | % of limit |", "|---" * 8 + "|"]
    rows = {}
    for r in rows_of("bench-cpu.csv"):
        if r["mode"] in ("forward", "both"):
            eager, compiled, ours = (float(r[f"{column}_ms"] or "nan") for column in ("eager", "compile", "ours"))
            row = rows.setdefault((r["op"], r["shape"], r["layout"]), [])
            row += [f"{eager:.2f}, {compiled:.2f}, {ours:.2f}", f"{eager / ours:.2f}, {compiled / ours:.2f}"]
            row += [f"{float(r['percent_of_limit']):.0f}"] if r["mode"] == "both" else []
    lines += ["| " + " | ".join([*key, *row]) + " |" for key, row in rows.items()]
    note = "Eager, torch.compile and ours in ms; eager / ours and compile / ours: below 1 we lose. "
    return "\n".join(lines) + "\n\n" + note + measured_on("bench-cpu.csv")


def cpu_step_table():
    """Step rows of `python -m kernels.bench --cpu`."""
    lines = [
        "| one step, ResNet-20, 100 images of 32 px | ms | × bare | × conventional | % of limit |",
        "|---" * 5 + "|",
    ]
    for r in rows_of("bench-cpu.csv"):
        if r["mode"] == "step":
            ratios = f"{float(r['times_bare']):.2f} | {float(r['times_conventional']):.2f}"
            percent = f"{float(r['percent_of_limit']):.0f}"
            lines.append(f"| {r['op'].removeprefix('step: ')} | {float(r['ours_ms']):.1f} | {ratios} | {percent} |")
    return "\n".join(lines) + "\n\n" + measured_on("bench-cpu.csv")


def cpu_summary():
    """One sentence for README.md out of the tables of whole steps."""
    rows = {(r["op"], r["shape"]): r for r in rows_of("bench-cpu.csv")}
    (step,) = (r for (op, _), r in rows.items() if op == "step: ours")
    games = [f"{float(r['times_conventional']):.2f}" for (op, _), r in rows.items() if op == "pseudo-batch: ours"]
    return (
        f"A synthesis step of ResNet-20 takes {float(step['times_conventional']):.2f} of the conventional loop's time "
        "(teacher not frozen, NCHW, hooks\nwith a mean and a permuted-copy variance) and "
        f"{float(step['times_bare']):.2f} of that of the frozen teacher's bare forward pass and input\ngradient; a "
        f"pseudo-batch of `zskt.py` takes {games[0]} (LeNet-5) and {games[1]} (WRN-16-1) of the released loop's time."
    )


def cpu_pseudo_batch_table():
    """Pseudo-batch rows of `python -m kernels.bench --cpu`: one line a pair of networks, ms and ratio an arm."""
    pairs = {}
    for r in rows_of("bench-cpu.csv"):
        if r["mode"] == "pseudo-batch":
            cell = f"{float(r['ours_ms']):.0f} ({float(r['times_conventional']):.2f})"
            pairs.setdefault(r["shape"], {})[r["op"].partition(": ")[2]] = cell
    arms = list(next(iter(pairs.values())))
    lines = ["| one pseudo-batch | " + " | ".join(arms) + " |", "|---" * (1 + len(arms)) + "|"]
    lines += [f"| {pair} | " + " | ".join(row[arm] for arm in arms) + " |" for pair, row in pairs.items()]
    return "\n".join(lines) + "\n\nms (× conventional). " + measured_on("bench-cpu.csv")


def measured_on(name):
    r = rows_of(name)[0]
    return f"{r['device']}, torch {r['torch']}, float32, commit {r['commit']}; medians; `results/{name}`."


def tables():
    """{name: text between its markers}."""
    makers = dict(teachers=teachers_table, inversion=inversion_table, cpu_ops=cpu_ops_table, cpu_step=cpu_step_table)
    makers |= dict(zskt=zskt_table, mte=mte_table, cpu_pseudo_batch=cpu_pseudo_batch_table)
    makers |= dict(trace=trace_table, replay=replay_table, cpu_summary=cpu_summary, ensemble=ensemble_table)
    makers |= dict(ensemble_speed=ensemble_speed_table, ensemble_arms_digits=lambda: arms_table("digits"))
    makers |= dict(ensemble_arms_mnist=lambda: arms_table("mnist"))
    makers |= dict(students=students_table, students_summary=students_summary)
    return {name: make() for name, make in makers.items()}


def main():
    made = tables()
    for path in READMES:
        text = path.read_text()
        for name, table in made.items():
            pattern = rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)"
            text = re.sub(pattern, lambda m, table=table: m[1] + table + "\n" + m[2], text, flags=re.DOTALL)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
