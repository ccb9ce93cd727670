"""harness/sources.py: what --images names, and the program that makes images of a teacher."""

import json
from dataclasses import replace

import pytest
import torch
import tyro
from scripts import read_refusal

import deepinversion
import quantization
from harness import sources
from harness.data import normalise
from harness.images import get_image_path, save_images
from harness.load import load_teacher
from harness.sources import (
    draw_noise,
    invert_teacher,
    load_source_images,
    load_training_images,
    name_teacher,
)

DIGITS = replace(quantization.PRESETS["digits"], device="cpu", num_images=60)


def test_noise_has_the_moments_of_the_training_pixels():
    _, info = load_teacher(DIGITS, "cpu")
    info.mean = (0.5,)
    info.std = (0.1,)
    pixels = draw_noise(info, 50)
    assert pixels.shape == (50, 1, 32, 32) and pixels.dtype == torch.uint8
    x = normalise(pixels, info)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_real_images_of_a_network_of_some_classes_are_refused(capsys):
    """Its training images are not all of the data set's."""
    _, info = load_teacher(DIGITS, "cpu")
    args = replace(DIGITS, images="real")
    assert load_source_images(args, info).shape == (60, 1, 32, 32)
    some = replace(info, num_classes=5)
    line = read_refusal(capsys, load_source_images, args, some)
    assert "--images real: the teacher's own images are not at hand" in line


def test_grey_images_are_repeated_for_a_teacher_of_colours():
    _, info = load_teacher(DIGITS, "cpu")
    info.mean = (0.5, 0.4, 0.3)
    info.std = (0.2, 0.2, 0.2)
    images = load_training_images("digits", info, DIGITS)
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])
    info.image_size = 28
    with pytest.raises(SystemExit):
        load_training_images("digits", info, DIGITS)


def test_deepinversion_is_started_once_with_the_teachers_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []

    def start(command):
        commands.append(command)
        folder = tmp_path / command[command.index("--out") + 1]
        folder.mkdir(parents=True)
        options = tyro.cli(deepinversion.Args, args=command[2:], default=deepinversion.DIGITS)
        assert (options.teacher, options.num_images) == ("digits-resnet8", 60)
        assert (options.mean, options.std, options.device) == ((0.25,), (0.5,), "cpu")
        assert options.resume and not options.smoke
        (folder / "args.json").write_text(json.dumps(vars(options)))
        (folder / "result.json").write_text("{}")
        return sources.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sources.subprocess, "run", start)
    args = replace(DIGITS, images="auto", mean=(0.25,), std=(0.5,))
    folder = invert_teacher(args)
    assert invert_teacher(args) == folder
    assert len(commands) == 1
    assert f"{folder} holds the images" in capsys.readouterr().out

    line = read_refusal(capsys, invert_teacher, replace(args, std=(0.6,)))
    assert "its images were made with other std; delete it" in line


def test_deepinversion_is_started_with_changed_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def start(command):
        commands.append(command)
        return sources.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sources.subprocess, "run", start)
    invert_teacher(DIGITS, {"moments": "relative", "alpha_bn": 0.0})
    options = tyro.cli(deepinversion.Args, args=commands[0][2:], default=deepinversion.DIGITS)
    assert (options.moments, options.alpha_bn) == ("relative", 0.0)


def test_images_of_other_options_are_not_taken(tmp_path, monkeypatch):
    """Whichever was made first."""
    monkeypatch.chdir(tmp_path)
    done = sources.subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(sources.subprocess, "run", lambda command: done)
    changes = ({}, {"moments": "relative"}, {"moments": "kl"}, {"moments": "kl", "alpha_bn": 2.0})
    folders = {invert_teacher(DIGITS, changed) for changed in changes}
    folders.add(invert_teacher(replace(DIGITS, smoke=True)))
    assert len(folders) == 5


def test_without_deepinversion_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    line = read_refusal(capsys, invert_teacher, DIGITS)
    assert "deepinversion.py is missing" in line


def test_a_failure_of_deepinversion_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sources.subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(sources.subprocess, "run", lambda command: done)
    with pytest.raises(SystemExit) as stop:
        invert_teacher(DIGITS)
    assert stop.value.code == 2


def test_another_network_in_the_same_file_gets_another_folder(tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_bytes(b"one")
    args = replace(DIGITS, teacher=str(path))
    first = name_teacher(args)
    path.write_bytes(b"two")
    second = name_teacher(args)
    assert first != second and "/" not in first

    factory = tmp_path / "mine.py"
    factory.write_text("def make(): ...")
    of_factory = replace(DIGITS, teacher=f"{factory}:make", weights=str(path))
    names = {name_teacher(of_factory)}
    path.write_bytes(b"three")
    names.add(name_teacher(of_factory))
    factory.write_text("def make(): pass")
    names.add(name_teacher(of_factory))
    assert len(names) == 3
    assert name_teacher(DIGITS) == "digits-resnet8"


@pytest.mark.parametrize("shape", [(20, 1, 28, 28), (20, 3, 32, 32)])
def test_a_folder_with_images_of_another_size_is_refused(shape, tmp_path, capsys):
    _, info = load_teacher(DIGITS, "cpu")
    images = torch.zeros(shape, dtype=torch.uint8)
    save_images(get_image_path(tmp_path, 0), images, torch.zeros(20, dtype=torch.int64))
    (tmp_path / "result.json").write_text("{}")
    args = replace(DIGITS, images=str(tmp_path))
    line = read_refusal(capsys, load_source_images, args, info)
    assert "expected uint8 (1, 32, 32), as the teacher's" in line


def test_images_in_the_folder_that_a_run_writes_into_are_refused(tmp_path, capsys):
    args = sources.SourceOptions(images=str(tmp_path / "x/.."), out=str(tmp_path))
    (tmp_path / "x").mkdir()
    line = read_refusal(capsys, sources.load_source_images, args, None)
    assert "this is --out, where the run writes; pass another --out" in line


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    _, info = load_teacher(DIGITS, "cpu")
    args = replace(DIGITS, images=str(tmp_path))
    line = read_refusal(capsys, load_source_images, args, info)
    assert "no images-*.npz or no result.json there; pass the --out of a finished run" in line
