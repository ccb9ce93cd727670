"""Collect finished runs of `deepinversion.py --student`, seeds of several arms, into one file and one picture.

    python results/students.py NAME LABEL=RUN [LABEL=RUN …]

Writes results/students-NAME.json, {"arms": {LABEL: [figures of a run, …]}} with the accuracy of each epoch, and
results/students-NAME.png, the arms' curves.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kernels.figures import draw_curves  # noqa: E402

KEPT = ("teacher", "student", "dataset", "teacher_accuracy", "student_accuracy", "teacher_agreement", "verifier")
KEPT += ("verifier_agreement", "n_images", "seconds", "seed", "device_name", "versions", "setting")


def main(name, *runs):
    arms = {}
    for run in runs:
        label, _, folder = run.partition("=")
        result = json.loads((Path(folder) / "result.json").read_text())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        accuracies = [row["eval/acc"] for row in rows if "eval/acc" in row]
        arms.setdefault(label, []).append({k: result[k] for k in KEPT} | dict(accuracies=accuracies))
    path = ROOT / f"results/students-{name}.json"
    path.write_text(json.dumps(dict(arms=arms), indent=1) + "\n")
    draw_curves({label: [r["accuracies"] for r in group] for label, group in arms.items()}, path.with_suffix(".png"))
    print(f"wrote {path.name} and its picture")


if __name__ == "__main__":
    main(*sys.argv[1:])
