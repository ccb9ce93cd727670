"""harness/pictures.py: rows of labelled images, images by class, curves."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from harness.pictures import draw_classes, draw_curves, draw_rows, to_rgb

LEFT = 78  # pixels for the titles


def read_picture(draw, *args, **options):
    """What `draw` writes, as (H, W, 3) uint8; the same bytes each time."""
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        draw(*args, file, **options)
    assert files[0].getvalue() == files[1].getvalue()
    with Image.open(files[0]) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_one_to_four_channels_become_red_green_and_blue():
    pixels = torch.randint(256, (2, 4, 3, 5), dtype=torch.uint8)
    grey, two, three, four = (to_rgb(pixels[:, :n]) for n in (1, 2, 3, 4))
    for rgb in (grey, two, three, four):
        assert rgb.shape == (2, 3, 5, 3) and rgb.dtype == torch.uint8
    for c in range(3):
        assert torch.equal(grey[..., c], pixels[:, 0])
        assert torch.equal(three[..., c], pixels[:, c])
    assert torch.equal(two[..., :2], three[..., :2]) and not two[..., 2].any()
    assert torch.equal(four, three)


@pytest.mark.parametrize(("size", "tile"), [(8, 64), (28, 56), (32, 64), (64, 64), (96, 96)])
def test_images_stand_side_by_side_enlarged_by_whole_numbers(size, tile):
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    rows = [("first", images), ("second", images[:1])]
    picture = read_picture(draw_rows, rows, columns=4)
    step = tile + 2
    assert picture.shape == (2 * step, LEFT + 4 * step, 3)
    for i, j, image in ((0, 0, 0), (0, 2, 2), (1, 0, 0)):
        top = i * step
        left = LEFT + j * step
        shown = picture[top : top + tile, left : left + tile]
        scale = tile // size
        expected = to_rgb(images)[image].numpy().repeat(scale, 0).repeat(scale, 1)
        assert np.array_equal(shown, expected)
    assert (picture[step:, LEFT + step :] == 255).all()  # no image, so white
    assert (picture[:, :LEFT] < 128).any()  # the titles


def test_no_more_images_are_shown_than_there_are_columns():
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    assert read_picture(draw_rows, [("", images)], columns=2).shape[1] == LEFT + 2 * 66


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_each_class_has_a_row_of_its_images(n_channels):
    labels = torch.tensor([7, 0, 7, 3])
    values = torch.tensor([40, 90, 140, 190], dtype=torch.uint8)
    images = values.view(4, 1, 1, 1).expand(4, n_channels, 8, 8)
    picture = read_picture(draw_classes, images, labels, ["zero"], columns=3)
    assert picture.shape == (3 * 66, LEFT + 3 * 66, 3)  # of classes 0, 3 and 7
    red = picture[32::66, LEFT + 32 :: 66, 0]
    assert red.tolist() == [[90, 255, 255], [190, 255, 255], [40, 140, 255]]


def test_large_images_of_a_class_each_stand_in_tiles_in_their_order():
    labels = torch.arange(12).flip(0)
    images = labels.view(12, 1, 1, 1).expand(12, 1, 100, 100).to(torch.uint8)
    picture = read_picture(draw_classes, images, labels, ["zero"])
    assert picture.shape[:2] == (3 * 118, 5 * 104)  # rows of five, a title below each
    assert picture[50::118, 50::104, 0].flatten().tolist() == [*range(11, -1, -1), 255, 255, 255]
    assert (picture[100:118, :100] < 255).any()  # a title


def test_the_lowest_classes_are_shown_where_there_are_too_many():
    labels = torch.arange(20).flip(0)
    images = labels.view(20, 1, 1, 1).expand(20, 1, 8, 8).to(torch.uint8)
    picture = read_picture(draw_classes, images, labels, [], rows=4)
    assert picture[32::66, LEFT + 32, 0].tolist() == [0, 1, 2, 3]


def count_coloured(picture):
    """How many pixels are not grey: those of curves, and of their bands."""
    return int((np.ptp(picture.astype(int), axis=2) > 20).sum())


def test_curves_of_several_runs_have_a_band_of_their_deviation():
    runs = [[10.0, 50.0, 60.0], [30.0, 90.0, 80.0, 99.0]]  # the longer one is cut
    alone = read_picture(draw_curves, {"a": [[20.0, 70.0, 70.0]]})
    together = read_picture(draw_curves, {"a": runs})
    assert alone.shape == together.shape == (400, 700, 3)
    assert count_coloured(together) > 3 * count_coloured(alone)


def test_long_curves_and_curves_of_one_point_are_drawn():
    picture = read_picture(draw_curves, {"long": [list(range(50))], "short": [[99.0]]})
    assert picture.shape == (400, 700, 3)
