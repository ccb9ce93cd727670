"""Pictures of a run: rows of labelled images, curves of accuracies."""

import numpy as np
import torch

TILE = 64  # pixels to which smaller images are enlarged, about


def to_rgb(images):
    """uint8 (N, C, H, W) -> (N, H, W, 3): grey is repeated; of more channels three are shown."""
    N, C, H, W = images.shape
    if C == 1:
        images = images.expand(N, 3, H, W)
    elif C == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    return images[:, :3].permute(0, 2, 3, 1).contiguous().cpu()


def draw_rows(rows, file, columns=10):
    """Write a PNG with a row of images for each title, which stands at the left.

    Args:
        rows: [(title, (n, C, H, W) uint8), …], all images of one size.
        file: path or file object.
        columns: the most images of a row.

    >>> import io
    >>> draw_rows([("zeros", torch.zeros(4, 1, 8, 8, dtype=torch.uint8))], io.BytesIO())
    """
    from PIL import Image, ImageDraw

    size = rows[0][1].shape[-1]
    tile = size * max(1, TILE // size)
    step = tile + 2
    left = 78  # pixels for the titles
    sheet = Image.new("RGB", (left + columns * step, len(rows) * step), "white")
    text = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(rows):
        text.text((4, (i + 0.5) * step - 6), title, fill="black")
        for j, pixels in enumerate(to_rgb(images[:columns])):
            image = Image.fromarray(pixels.numpy())
            image = image.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(image, (left + j * step, i * step))
    sheet.save(file, format="PNG")


def draw_tiles(titles, images, file, columns=5):
    """Write a PNG of images with a title below each, in rows of `columns`.

    Args:
        titles: N strings; a long one is cut to the width of a tile.
        images: (N, C, H, W) uint8.
        file: path or file object.

    >>> import io
    >>> draw_tiles(["a", "b"], torch.zeros(2, 3, 8, 8, dtype=torch.uint8), io.BytesIO())
    """
    from PIL import Image, ImageDraw

    size = images.shape[-1]
    tile = size * max(1, TILE // size)
    width = tile + 4
    height = tile + 18  # of which 14 pixels for the title
    n_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, n_rows * height), "white")
    text = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(to_rgb(images)):
        row, column = divmod(i, columns)
        image = Image.fromarray(pixels.numpy())
        image = image.resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(image, (column * width, row * height))
        title = titles[i][: tile // 6]  # a letter is 6 pixels wide
        text.text((column * width + 2, row * height + tile + 2), title, fill="black")
    sheet.save(file, format="PNG")


def draw_classes(images, labels, names, file, columns=10, rows=10):
    """Write a PNG of images by class: one row a class; or tiles if each class has one large image.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        names: the classes' names in their order; those it lacks go by number.
        file: path or file object.
        columns, rows: the most images of a class, and the most classes (the lowest ones).

    >>> import io
    >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    >>> draw_classes(images, torch.tensor([0, 1, 0, 7]), ["zero"], io.BytesIO())
    """

    def get_title(k):
        return names[k] if k < len(names) else f"class {k}"

    classes = labels.unique()
    if len(classes) == len(labels) and images.shape[-1] > TILE:
        shown = labels[: columns * rows].tolist()
        draw_tiles([get_title(k) for k in shown], images[: len(shown)], file)
        return
    sheet = [(get_title(k), images[labels == k]) for k in classes[:rows].tolist()]
    draw_rows(sheet, file, columns)


def draw_curves(groups, file, unit="epoch"):
    """Write a PNG of accuracies over time: each group's mean over runs, a band of ± one std.

    Args:
        groups: {label: [run, …]}, a run being a list of accuracies in percent. The runs of a group
            are cut to the shortest.
        file: path or file object.
        unit: of the horizontal axis.

    >>> import io
    >>> draw_curves({"a": [[10.0, 50.0], [10.0, 60.0]], "b": [[20.0, 30.0]]}, io.BytesIO())
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    for label, runs in groups.items():
        shortest = min(len(run) for run in runs)
        curves = np.array([run[:shortest] for run in runs])  # (runs, epochs)
        mean = curves.mean(0)
        x = range(1, shortest + 1)
        marker = "." if shortest < 30 else None
        axis.plot(x, mean, label=label, marker=marker)
        if len(runs) > 1:
            band = curves.std(0)
            axis.fill_between(x, mean - band, mean + band, alpha=0.25)
    axis.set(xlabel=unit, ylabel="test accuracy, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize="small")
    figure.savefig(file, dpi=100)
