"""What a student's BatchNorm moments cost it: they are those of synthetic images.

    python results/real_moments.py --networks student=runs/r8/student.pt --data-dir DIR \
        --out results/real-moments.json

Prints its accuracy on test images as it is, and with the moments of 1,000 real training images,
which is no data-free figure; writes both, if asked.
"""

import json
import sys
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pruning  # noqa: E402
from harness.data import evaluate, load_dataset, normalise  # noqa: E402
from harness.errors import fail, prepare_program  # noqa: E402
from harness.files import open_atomically  # noqa: E402
from harness.load import load_trained  # noqa: E402


def measure(network, info, data_dir, n_images=1000):
    """Percent of test images: as the network is, and with moments of n_images training images.

    Args:
        network: in eval mode; its running moments are changed.
    """
    test = load_dataset(info.dataset, data_dir, "test")
    before = evaluate(network, *test, info)
    images, _ = load_dataset(info.dataset, data_dir, "train")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:n_images]
    pruning.reestimate_batchnorm(network, normalise(images[chosen], info))
    return before, evaluate(network, *test, info)


def main(networks: tuple[str, ...], data_dir: str = "data", out: str = ""):
    """Print both accuracies of each network.

    Args:
        networks: LABEL=NETWORK each; NETWORK as --teacher of the scripts: student.pt of a run, or a
            shipped name.
        data_dir: folder of the data sets.
        out: path of a JSON file to write; "": none.
    """
    found = {}
    for word in networks:
        label, _, network = word.partition("=")
        student, info = load_trained(network, "cpu", data_dir)
        if not pruning.find_batchnorms(student):
            fail(f"--networks {word}: no BatchNorm with running moments; pass another")
        before, after = measure(student, info, data_dir)
        print(f"{label}: {before:.2f} %, with moments of real images {after:.2f} %")
        found[label] = {"accuracy": before, "real_moments": after}
    if out:
        with open_atomically(Path(out)) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    prepare_program()
    tyro.cli(main)
