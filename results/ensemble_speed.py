"""Time generators that train together against the same ones trained one after another, on one CPU thread.

    python results/ensemble_speed.py

Ten generators of one class each on `digits-resnet8`, own moments (`--pool 0`), float32: a step of all ten on one batch
beside ten steps of one, each with as many images per generator, in turns. Writes results/ensemble-speed.json.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import generative_ensemble as ge  # noqa: E402
from kernels.contract import ran_on  # noqa: E402


def stepper(args, teacher, groups, n):
    """A function that trains generators of these groups by one step of n images each, as the script does."""
    setting = ge.choose_setting(args, "digits", teacher) | dict(generators=len(groups), batch_size=n * len(groups))
    setting |= dict(pool=0.0 if len(groups) > 1 else 1.0)  # of one generator the same, by the faster path
    shape = dict(groups=groups, channels=1, image_size=32) | {k: setting[k] for k in ("latent", "width", "stages")}
    student = ge.load("lenet5", args, teacher=teacher, fresh=True)
    fresh = ge.load(args.teacher, args)  # hooks of one ensemble must not run in another's steps
    state = ge.Distiller(fresh, student, ge.Ensemble(shape).initialise(), setting, args)
    observe = ge.Observed(fresh.model, state.n_parts, True)
    return lambda: ge.generator_step(state, observe)


def milliseconds(steps):
    start = time.perf_counter()
    for step in steps:
        step()
    return 1000 * (time.perf_counter() - start)


def main():
    torch.set_num_threads(1)
    args, rows = ge.Args(device="cpu"), []
    teacher = ge.load(args.teacher, args)
    for width in (16, 8):
        args.width = width
        for n in (1, 2, 4, 8):
            together = [stepper(args, teacher, [[k] for k in range(10)], n)]
            alone = [stepper(args, teacher, [[k]], n) for k in range(10)]
            times = [(milliseconds(together), milliseconds(alone)) for _ in range(10)][2:]  # two to warm up
            medians = [round(statistics.median(t), 1) for t in zip(*times, strict=True)]
            rows.append(dict(width=width, images_per_generator=n, together_ms=medians[0], alone_ms=medians[1]))
            print(rows[-1], f"{medians[0] / medians[1]:.2f}", flush=True)
    saved = dict(teacher=args.teacher, generators=10, rows=rows) | ran_on("cpu")
    (ROOT / "results/ensemble-speed.json").write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
