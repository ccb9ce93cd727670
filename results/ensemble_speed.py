"""Time generators that train together against the same ones trained one after another.

    python results/ensemble_speed.py

Ten generators of one class each on `digits-resnet8`, own moments (`--pool 0`), float32, one CPU
thread: a step of all ten on one batch beside ten steps of one, each with as many images per
generator, in turns. Writes results/ensemble-speed.json.
"""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import generative_ensemble as ge  # noqa: E402
from harness.load import load_teacher  # noqa: E402
from harness.run import describe_machine, make_optimizer  # noqa: E402

WIDTHS = (16, 8)
IMAGES = (1, 2, 4, 8)  # of a generator in a step
ROUNDS = 10  # of which the first two warm up


def make_step(args, groups, n, stack):
    """A function that trains generators as the script does, by one step.

    Args:
        args: the script's Args.
        groups: classes of each generator.
        n: images of each generator in a step.
        stack: ExitStack that ends the measuring of the teacher's moments.
    """
    G = len(groups)
    pool = 0.0 if G > 1 else 1.0  # for one generator the same loss, by the faster path
    args = replace(args, generators=G, batch_size=n * G, pool=pool)
    teacher, info = load_teacher(args, "cpu")  # its own: hooks of one run in no other's steps
    sizes = ge.Sizes(groups, args.latent, args.width, args.stages, info.channels, info.image_size)
    ensemble = ge.Ensemble(sizes).initialise().to(memory_format=torch.channels_last)
    optimizer = make_optimizer("adam", ensemble, args.lr_generator)
    observe = stack.enter_context(ge.watch_batchnorm(teacher, G, args))
    return lambda: ge.generator_step(ensemble, observe, optimizer, args)


def measure_ms(steps):
    """Milliseconds that these functions take, one after another."""
    start = time.perf_counter()
    for step in steps:
        step()
    return 1000 * (time.perf_counter() - start)


def measure_row(args, n):
    """Median milliseconds of ten generators together and alone; n: images of each in a step."""
    with contextlib.ExitStack() as stack:
        together = [make_step(args, [[k] for k in range(10)], n, stack)]
        alone = [make_step(args, [[k]], n, stack) for k in range(10)]
        together_ms = []
        alone_ms = []
        for _ in range(ROUNDS):
            together_ms.append(measure_ms(together))
            alone_ms.append(measure_ms(alone))
    return {
        "width": args.width,
        "images_per_generator": n,
        "together_ms": round(statistics.median(together_ms[2:]), 1),
        "alone_ms": round(statistics.median(alone_ms[2:]), 1),
    }


def main():
    torch.set_num_threads(1)
    args = replace(ge.PRESETS["digits"], stages=2)
    rows = []
    for width in WIDTHS:
        for n in IMAGES:
            row = measure_row(replace(args, width=width), n)
            rows.append(row)
            print(row, f"{row['together_ms'] / row['alone_ms']:.2f}", flush=True)
    saved = dict(teacher=args.teacher, generators=10, rows=rows) | describe_machine("cpu")
    path = ROOT / "results/ensemble-speed.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
