"""harness/images.py: pixel ranges, what augmentation may do, files of images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import read_refusal

from harness.images import (
    augment,
    blend_images,
    check_image_files,
    get_image_path,
    get_pixel_range,
    list_image_files,
    mirror_images,
    paste_bands,
    read_images,
    read_newest_images,
    save_images,
    shift_images,
    to_uint8,
)
from harness.known import NetworkInfo

GREY = NetworkInfo("teacher", "lenet5", "digits", 10, 32, (0.3,), (0.4,), None)
FOUR = (0.1, 0.5, 0.4, 0.2), (0.25, 0.5, 0.2, 0.1)


# Units


def test_the_pixel_range_is_asymmetric_in_normalised_units():
    info = NetworkInfo("teacher", "x", "", 10, 8, *FOUR, None)
    low, high = get_pixel_range(info, "cpu")
    assert low.shape == high.shape == (1, 4, 1, 1)
    assert low.flatten().tolist() == pytest.approx([-0.4, -1.0, -2.0, -2.0])
    assert high.flatten().tolist() == pytest.approx([3.6, 1.0, 3.0, 8.0])
    assert to_uint8(low.expand(2, 4, 3, 3), info).max() == 0
    assert to_uint8(high.expand(2, 4, 3, 3), info).min() == 255


def test_what_lies_beyond_the_pixel_range_is_clipped_and_the_rest_rounded():
    info = NetworkInfo("teacher", "x", "", 10, 8, (0.0,), (1.0,), None)
    x = torch.tensor([-9.0, -1e-3, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 7.0])
    pixels = to_uint8(x.view(8, 1, 1, 1), info)
    assert pixels.dtype == torch.uint8
    assert pixels.flatten().tolist() == [0, 0, 0, 0, 1, 255, 255, 255]


# Augmentation


@pytest.mark.parametrize(("height", "width", "pixels"), [(8, 8, 2), (5, 7, 1), (4, 3, 2)])
def test_a_shifted_image_is_a_crop_of_the_one_with_repeated_edges(height, width, pixels):
    """All shifts of up to so many pixels occur, about as often, and no others."""
    image = torch.arange(2.0 * height * width).view(1, 2, height, width)
    padded = F.pad(image, (pixels,) * 4, mode="replicate")[0]
    n_shifts = (2 * pixels + 1) ** 2
    counts = dict.fromkeys(range(n_shifts), 0)
    for moved in shift_images(image.expand(20 * n_shifts, -1, -1, -1), pixels):
        fits = []
        for shift in range(n_shifts):
            i, j = divmod(shift, 2 * pixels + 1)
            if torch.equal(padded[:, i : i + height, j : j + width], moved):
                fits.append(shift)
        assert len(fits) == 1
        counts[fits[0]] += 1
    assert min(counts.values()) >= 3


def test_half_of_the_images_are_mirrored_each_by_itself():
    x = torch.rand(400, 3, 4, 5)
    mirrored = mirror_images(x)
    is_flipped = (mirrored == x.flip(3)).flatten(1).all(1)
    is_same = (mirrored == x).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert 160 < is_flipped.sum() < 240


def test_half_of_the_images_get_a_band_of_rows_or_columns_of_another():
    x = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 2, 8, 8)
    counts = {"whole": 0, "rows": 0, "columns": 0}
    sources = set()
    for i, image in enumerate(paste_bands(x)):
        foreign = image[0] != i
        sources |= set(image[0][foreign].tolist())
        assert torch.equal(image[0], image[1])  # all channels alike
        assert len(image[0][foreign].unique()) <= 1  # of one other image
        if not foreign.any():
            counts["whole"] += 1
            continue
        is_rows = (foreign == foreign[:, :1]).all()
        assert is_rows or (foreign == foreign[:1]).all()
        counts["rows" if is_rows else "columns"] += 1
        line = foreign[:, 0] if is_rows else foreign[0]
        assert (line.int().diff() == 1).sum() <= 1  # one band
    assert 180 < counts["whole"] < 270
    assert counts["rows"] > 60 and counts["columns"] > 60
    assert len(sources) > 100


def test_half_of_the_images_are_blends_of_two_in_random_shares():
    x = torch.eye(64).reshape(64, 1, 8, 8)  # image k is 1 in pixel k alone
    torch.manual_seed(0)
    shares = torch.cat([blend_images(x).reshape(64, 64) for _ in range(20)])
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    n_parts = (shares > 0).sum(1)
    assert n_parts.max() == 2
    assert 0.45 < (n_parts == 2).float().mean() < 0.55
    own_shares = shares[torch.arange(len(shares)), torch.arange(64).repeat(20)][n_parts == 2]
    assert 0.45 < own_shares.mean() < 0.55 and own_shares.std() > 0.25  # uniform: 0.29


def test_augmentation_does_what_is_asked_and_nothing_else():
    x = torch.rand(8, 3, 16, 16)
    same = augment(x)
    assert torch.equal(same, x)
    flipped = augment(x, mirror=True)
    for image, original in zip(flipped, x, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(2))
    mixed = augment(x, cut=True)
    assert ((mixed == x).all(1) | (mixed != x).all(1)).all()  # whole pixels, none moved
    assert not torch.equal(mixed, x) and not torch.equal(augment(x, shift=2), x)
    changed = augment(x, shift=2, mirror=True, cut=True)
    blended = augment(x, mix=True)
    assert not torch.isclose(blended, x).all((1, 2, 3)).all()
    assert blended.amin() >= x.amin() and blended.amax() <= x.amax()
    for images in (same, changed, blended):
        assert images.shape == x.shape
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert set(changed.unique().tolist()) <= set(x.unique().tolist())
    assert not torch.equal(changed, x)


def test_augmentation_depends_on_the_seed_alone():
    x = torch.rand(8, 3, 16, 16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(x, shift=2, mirror=True, cut=True, mix=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# Files


def make_batch(n, n_channels=1, size=32, last_class=9):
    images = torch.randint(256, (n, n_channels, size, size), dtype=torch.uint8)
    return images, torch.arange(n) % (last_class + 1)


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_a_batch_is_read_as_it_was_written(tmp_path, n_channels):
    images, labels = make_batch(3, n_channels, size=5)
    path = get_image_path(tmp_path, 7)
    save_images(path, images, labels)
    with np.load(path) as file:
        assert file["images"].shape == (3, 5, 5, n_channels) and file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.int64
    again, labels_again = read_images(path)
    assert torch.equal(again, images) and torch.equal(labels_again, labels)
    assert [path.name for path in tmp_path.iterdir()] == ["images-00007.npz"]


def test_image_files_are_listed_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 0, 99999, 100_000, 1_000_000):
        save_images(get_image_path(tmp_path, number), *make_batch(1, size=2))
    for stray in ("images-notes.npz", "images-00001-copy.npz", "images-7.npz", "images-.npz"):
        (tmp_path / stray).write_text("no batch")
    (tmp_path / "images-00003.npz.part").write_text("half a batch")
    numbers = [int(path.stem.partition("-")[2]) for path in list_image_files(tmp_path)]
    assert numbers == [0, 2, 10, 99999, 100_000, 1_000_000]


def test_the_newest_images_are_those_of_the_last_files_in_their_order(tmp_path):
    batches = []
    for number in range(4):
        batches.append(make_batch(3, size=2))
        save_images(get_image_path(tmp_path, number), *batches[-1])
    paths = list_image_files(tmp_path)
    all_images = torch.cat([x for x, _ in batches])
    all_labels = torch.cat([y for _, y in batches])
    for n_images in (1, 3, 4, 12, 99):  # a file of many is not taken whole
        images, labels = read_newest_images(paths, n_images)
        assert torch.equal(images, all_images[-n_images:]), n_images
        assert torch.equal(labels, all_labels[-n_images:])


@pytest.mark.parametrize("content", [b"", b"no archive", "cut", "other arrays"])
def test_a_broken_file_of_images_is_refused(capsys, tmp_path, content):
    path = get_image_path(tmp_path, 0)
    save_images(path, *make_batch(3))
    if content == "cut":
        content = path.read_bytes()[:-500]
    elif content == "other arrays":
        with open(path, "wb") as file:
            np.savez(file, x=np.zeros(3))
        content = path.read_bytes()
    path.write_bytes(content)
    line = read_refusal(capsys, read_images, path)
    assert f"{path} cannot be read" in line and "put a whole file there" in line


def test_an_image_file_that_would_run_code_is_refused(capsys, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path / "owned").touch, ()

    path = get_image_path(tmp_path, 0)
    arrays = dict(images=np.array([Hostile()], dtype=object), labels=np.zeros(1, np.int64))
    np.savez(path, **arrays, allow_pickle=True)
    assert "cannot be read" in read_refusal(capsys, read_images, path)
    assert not (tmp_path / "owned").exists()


def test_images_that_cannot_be_written_are_refused(capsys, tmp_path):
    path = get_image_path(tmp_path / "nowhere", 0)
    line = read_refusal(capsys, save_images, path, *make_batch(1))
    assert "cannot be written" in line and "its folder has gone" in line


# The images of another run


def finish_run(folder, sizes=(4,), last_class=9):
    """A folder as a finished run leaves it: a result and batches of these sizes."""
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text("{}")
    for number, n in enumerate(sizes):
        save_images(get_image_path(folder, number), *make_batch(n, last_class=last_class))
    return folder


def test_the_images_of_a_finished_run_are_counted(tmp_path):
    paths = check_image_files(finish_run(tmp_path, (4, 3, 7)), GREY)
    assert paths == list_image_files(tmp_path) and len(paths) == 3


@pytest.mark.parametrize("lost", ["result.json", "images-00000.npz", "folder"])
def test_images_of_an_unfinished_run_are_refused(capsys, tmp_path, lost):
    folder = tmp_path / "folder"
    if lost != "folder":
        finish_run(folder)
        (folder / lost).unlink()
    line = read_refusal(capsys, check_image_files, folder, GREY)
    assert f"--images {folder}: no images-*.npz or no result.json" in line
    assert "pass the --out of a finished run" in line


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        pytest.param(np.zeros((4, 8, 8, 1)), [0] * 4, "expected uint8 (1, 32, 32)", id="float"),
        pytest.param(np.zeros((4, 8, 8, 1), np.uint8), [0] * 4, "(1, 8, 8)", id="size"),
        pytest.param(np.zeros((4, 32, 32, 3), np.uint8), [0] * 4, "(3, 32, 32)", id="channels"),
        pytest.param(np.zeros((2, 32, 32, 1), np.uint8), [0, 10], "labels from 0 to 9", id="class"),
        pytest.param(np.zeros((2, 32, 32, 1), np.uint8), [-1, 0], "labels from 0 to 9", id="below"),
        pytest.param(np.zeros((2, 32, 32, 1), np.uint8), [0], "as many labels", id="few labels"),
        pytest.param(np.zeros((0, 32, 32, 1), np.uint8), [], "some of both", id="none"),
        pytest.param(np.zeros((2, 32, 32), np.uint8), [0, 0], "images-00001", id="no channels"),
    ],
)
def test_images_unlike_the_teachers_are_refused(capsys, tmp_path, images, labels, says):
    finish_run(tmp_path)
    np.savez(get_image_path(tmp_path, 1), images=images, labels=np.array(labels, np.int64))
    line = read_refusal(capsys, check_image_files, tmp_path, GREY)
    assert "images-00001" in line and says in line


def test_labels_with_another_axis_are_refused(capsys, tmp_path):
    finish_run(tmp_path)
    images = np.zeros((2, 32, 32, 1), np.uint8)
    np.savez(get_image_path(tmp_path, 1), images=images, labels=np.zeros((2, 1), np.int64))
    line = read_refusal(capsys, check_image_files, tmp_path, GREY)
    assert "images-00001.npz: expected as many labels as images" in line


def test_labels_of_another_kind_are_refused(capsys, tmp_path):
    finish_run(tmp_path)
    images = np.zeros((2, 32, 32, 1), np.uint8)
    np.savez(get_image_path(tmp_path, 1), images=images, labels=np.array([0.0, math.nan]))
    line = read_refusal(capsys, check_image_files, tmp_path, GREY)
    assert "images-00001.npz: expected int64 labels, got torch.float64" in line
