"""Write the images of a run as PNG files in class folders, as torchvision's ImageFolder reads them.

python results/export_png.py --run runs/deepinversion/default --out runs/png
"""

import sys
from pathlib import Path

import tyro
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.errors import DISK_ADVICE, fail, fail_in_one_line  # noqa: E402
from harness.images import list_image_files, read_images  # noqa: E402
from harness.pictures import to_rgb  # noqa: E402


def main(run: str, out: str):
    """Write OUT/CLASS/BATCH-IMAGE.png for each image.

    Args:
        run: folder with images-*.npz.
        out: folder to write into.
    """
    paths = list_image_files(run)
    if not paths:
        fail(f"--run {run}: no images-*.npz there; pass the --out of a run of deepinversion.py")
    # ImageFolder sorts folders as strings: without leading zeros class 10 comes before class 2
    n_digits = max(len(str(read_images(path)[1].max().item())) for path in paths)
    with fail_in_one_line(f"--out {out} cannot be written", DISK_ADVICE):
        for number, path in enumerate(tqdm(paths, disable=None)):
            images, labels = read_images(path)
            pixels = to_rgb(images).numpy()  # (N, H, W, 3)
            for i, k in enumerate(labels.tolist()):
                folder = Path(out) / f"{k:0{n_digits}d}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[i]).save(folder / f"{number:05d}-{i:03d}.png")


if __name__ == "__main__":
    tyro.cli(main)
