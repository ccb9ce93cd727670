"""Compare the three forms of the moment loss on seven networks: does one weight do for all?

    python results/moment_forms.py --data-dir DIR

First each form gets each weight of a grid with seed 100; the weight with the highest agreement, a
mean over the networks, is the form's. Then seeds 0 to 2 with that weight. Every run is a command of
deepinversion.py; a finished one is not repeated. Everything but form and weight is as in the preset
of the network's data set, with fewer steps. Writes results/moment-forms.json.

The two networks of ours that are not shipped are trained first, in few epochs:

    python teacher.py --dataset cifar10 --arch vgg11_bn --epochs 2 --lr 0.1 --data-dir DIR
    python teacher.py --arch mobilenet_v2_cifar --epochs 30 --batch-size 64 --lr 0.1    # digits

DIR/resnet20-12fca82f.th is the public ResNet-20 (akamaster/pytorch_resnet_cifar10); the weights of
efficientnet-lite0 and -lite2 are packages. A network whose file is missing is left out.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import deepinversion  # noqa: E402
import kernels  # noqa: E402
from harness.data import normalise  # noqa: E402
from harness.images import read_newest_images  # noqa: E402
from harness.load import load_teacher  # noqa: E402
from harness.run import describe_machine  # noqa: E402

WEIGHTS = {
    "l2": (0.001, 0.01, 0.1, 1.0, 10.0),
    "relative": (0.1, 1.0),
    "kl": (0.1, 1.0, 10.0),
}
GRID_SEED = 100
SEEDS = (0, 1, 2)

CIFAR = ["--setting=cifar10", "--batch-size=50", "--iterations=60"]
DIGITS = ["--setting=digits", "--batch-size=50"]
PUBLIC_RANGE = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
LITE = [
    "--setting=imagenet",
    "--image-size=160",
    "--iterations-low=0",
    "--iterations=100",
    "--lr=0.2",
]


@dataclass
class Args:
    data_dir: str = "data"
    """Folder with the public ResNet-20."""
    runs: str = "runs/moment-forms"
    """Folder of the runs."""
    teachers: str = "runs/teacher"
    """Folder of the networks that teacher.py trains."""


def list_networks(args):
    """{title: (teacher, verifier, other options)} of the networks whose files are there."""
    public = f"{args.data_dir}/resnet20-12fca82f.th"
    vgg = f"{args.teachers}/cifar10-vgg11_bn/teacher.pt"
    mobile = f"{args.teachers}/digits-mobilenet_v2_cifar/teacher.pt"
    networks = {
        "CIFAR-10 ResNet-20": ("cifar10-resnet20", "cifar10-wrn-16-1", CIFAR),
        "CIFAR-10 ResNet-20, public": (
            "resnet20",
            "cifar10-wrn-16-1",
            [*CIFAR, f"--weights={public}", *PUBLIC_RANGE],
        ),
        "CIFAR-10 VGG-11-BN": (vgg, "cifar10-wrn-16-1", CIFAR),
        "CIFAR-10 WRN-16-1": ("cifar10-wrn-16-1", "cifar10-resnet20", CIFAR),
        "MNIST ResNet-8": ("mnist-resnet8", "mnist-lenet5", ["--setting=mnist"]),
        "digits MobileNetV2": (mobile, "digits-resnet8", DIGITS),
        "ImageNet EfficientNet-Lite0, 160 px": ("efficientnet-lite0", "efficientnet-lite2", LITE),
    }
    needed = {
        "CIFAR-10 ResNet-20, public": public,
        "CIFAR-10 VGG-11-BN": vgg,
        "digits MobileNetV2": mobile,
    }
    for title, path in needed.items():
        if not Path(path).exists():
            print(f"{title} is left out: {path} is missing")
            del networks[title]
    return networks


def invert(title, network, form, weight, seed, args):
    """Run deepinversion.py unless it has run; what its result.json says, and the distances."""
    teacher, verifier, options = network
    out = Path(args.runs) / title.replace(" ", "-") / f"{form}-{weight:g}-seed{seed}"
    if not (out / "result.json").exists():
        command = [sys.executable, str(ROOT / "deepinversion.py"), *options]
        command += [f"--teacher={teacher}", f"--verifier={verifier}", f"--seed={seed}"]
        command += [f"--moments={form}", f"--alpha-bn={weight}", "--first-bn=1", "--resume"]
        command += [f"--out={out}", "--device=cpu"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((out / "result.json").read_text())
    row = {
        "network": title,
        "form": form,
        "weight": weight,
        "seed": seed,
        "teacher_agreement": result["teacher_agreement"],
        "verifier_agreement": result["verifier_agreement"],
        "seconds": result["seconds"],
    }
    return row | measure_distances(out)


def measure_distances(out):
    """The moment loss of a run's images in each form, all layers of weight 1."""
    saved = json.loads((out / "args.json").read_text())
    names = ("teacher", "weights", "num_classes", "image_size", "mean", "std", "data_dir")
    args = deepinversion.Args(**{name: saved[name] for name in names})
    teacher, info = load_teacher(args, "cpu", size_multiple=1)
    images, _ = read_newest_images([out / "images-00000.npz"])
    watched = kernels.hook_batchnorm(teacher)
    with torch.enable_grad():
        _, found = watched(normalise(images, info))
    distances = {}
    for form in WEIGHTS:
        distance = kernels.moment_distance(
            found.moments, found.running_var, found.sizes, form=form, eps=found.eps
        )
        distances[f"distance_{form}"] = round(distance.item(), 4)
    return distances


def choose_weight(rows, form):
    """The weight of a form with the highest mean agreement of the networks' verifiers."""
    means = {}
    for weight in WEIGHTS[form]:
        found = [
            r["verifier_agreement"] for r in rows if (r["form"], r["weight"]) == (form, weight)
        ]
        means[weight] = statistics.mean(found)
        print(f"{form} {weight:g}: verifiers agree on {means[weight]:.1f} %", flush=True)
    return max(means, key=means.get)


def main(args):
    networks = list_networks(args)
    grid = []
    for form, weights in WEIGHTS.items():
        for weight in weights:
            for title, network in networks.items():
                grid.append(invert(title, network, form, weight, GRID_SEED, args))
                print(grid[-1], flush=True)

    rows = []
    chosen = {form: choose_weight(grid, form) for form in WEIGHTS}
    for seed in SEEDS:
        for form, weight in chosen.items():
            for title, network in networks.items():
                rows.append(invert(title, network, form, weight, seed, args))
                print(rows[-1], flush=True)
        saved = dict(grid_seed=GRID_SEED, grid=grid, rows=rows) | describe_machine("cpu")
        path = ROOT / "results/moment-forms.json"
        path.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
