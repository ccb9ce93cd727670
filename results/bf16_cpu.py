"""Inversion on a CPU in bfloat16 against fp32: time of a step, and what another network sees.

    python results/bf16_cpu.py

Steps: a step of deepinversion.py and a bare one (forward pass, cross entropy, image gradient of the
frozen network), each in both precisions, in turns; one thread, processor time. Images: the command

    python deepinversion.py --seed SEED [--bf16-cpu]

for three seeds; a finished run is not repeated. Writes results/bf16-cpu.json. It needs a CPU with
AVX512-BF16 or AMX.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import deepinversion  # noqa: E402
from bench import steps  # noqa: E402
from harness.errors import fail  # noqa: E402
from harness.run import describe_machine, keep_freed_memory  # noqa: E402

RUNS = "runs/bf16-cpu"
SEEDS = 0, 1, 2
NETWORKS = ("resnet20", 32, 100), ("resnet18", 224, 4)  # image size, images of a step
N_ROUNDS = 24
IN_BF16 = replace(steps.ALL_TERMS, bf16_cpu=True)


def make_bare_in_bf16(name, noise, labels):
    """A bare step of a network whose weights and BatchNorms are all in bfloat16."""
    network = steps.make_frozen_teacher(name, "cpu").to(torch.bfloat16)
    x = noise.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()

    def run():
        torch.autograd.grad(F.cross_entropy(network(x).float(), labels), x)

    return run


def time_steps(name, size, n_images):
    """{column: median milliseconds}, and the ratios that results/README.md shows."""
    torch.manual_seed(0)
    noise = torch.randn(n_images, 3, size, size)
    labels = torch.arange(n_images) % 10
    columns = {
        "bare": steps.make_bare(name, "cpu", noise, labels),
        "ours": steps.make_ours(name, "cpu", noise, labels),
        "bare_bf16": make_bare_in_bf16(name, noise, labels),
        "ours_bf16": steps.make_ours(name, "cpu", noise, labels, args=IN_BF16),
    }
    times = {column: [] for column in columns}
    for _ in range(N_ROUNDS):
        for column, run in columns.items():
            start = time.process_time()
            run()
            times[column].append(1000 * (time.process_time() - start))
    medians = {}
    for column, values in times.items():
        medians[f"{column}_ms"] = round(statistics.median(values[2:]), 1)  # two rounds warm up
    return medians


def measure_gradient(name, size, n_images):
    """Cosine between the image gradients in bfloat16 and in fp32."""
    torch.manual_seed(0)
    noise = torch.randn(n_images, 3, size, size)
    labels = torch.arange(n_images) % 10
    teacher = steps.make_frozen_teacher(name, "cpu")
    gradients = []
    for args in (steps.ALL_TERMS, IN_BF16):
        watched = deepinversion.watch_batchnorms(teacher, noise[:2], args, "cpu")
        target = deepinversion.Target(labels, watched, None)
        x = noise.clone(memory_format=torch.channels_last).requires_grad_()
        total, _ = deepinversion.synthesis_loss(x, torch.tensor([1, -1, 0]), target, args)
        gradients.append(*torch.autograd.grad(total, x))
    return round(F.cosine_similarity(*(g.flatten() for g in gradients), dim=0).item(), 5)


def invert(seed, option):
    """Run deepinversion.py unless it has run; what its result.json says of the images."""
    out = Path(RUNS) / f"{option.strip('-') or 'fp32'}-seed{seed}"
    if not (out / "result.json").exists():
        command = [sys.executable, str(ROOT / "deepinversion.py"), f"--seed={seed}", f"--out={out}"]
        command += ["--device=cpu", "--resume", *filter(None, [option])]
        subprocess.run(command, check=True)
    result = json.loads((out / "result.json").read_text())
    names = ("teacher_agreement", "verifier_agreement", "seconds", "seed")
    return {name: result[name] for name in names}


def main():
    if deepinversion.choose_dtype("cpu", IN_BF16) != torch.bfloat16:
        fail("bf16_cpu.py: this CPU has neither AVX512-BF16 nor AMX; run it on another")
    torch.set_num_threads(1)
    keep_freed_memory()
    saved = {"steps": [], "images": {}}
    for name, size, n_images in NETWORKS:
        row = dict(network=name, image_size=size, n_images=n_images)
        row |= time_steps(name, size, n_images)
        row["gradient_cosine"] = measure_gradient(name, size, n_images)
        saved["steps"].append(row)
        print(row, flush=True)
    for precision, option in (("fp32", ""), ("bf16", "--bf16-cpu")):
        saved["images"][precision] = [invert(seed, option) for seed in SEEDS]
    path = ROOT / "results/bf16-cpu.json"
    path.write_text(json.dumps(saved | describe_machine("cpu"), indent=1) + "\n")


if __name__ == "__main__":
    main()
