"""harness/data.py: which real images measure a method, and what a network says of images.

How the official files are read is tested in test_teacher.py, beside what fetches them.
"""

import pytest
import torch
import torch.nn as nn
from scripts import read_refusal

from harness.data import CLASS_NAMES, N_CLASSES, evaluate, load_real_images, normalise, predict
from harness.images import to_uint8
from harness.known import NetworkInfo
from harness.run import MethodOptions


def describe_teacher(dataset="digits", n_channels=1, num_classes=10, image_size=32):
    """NetworkInfo of a teacher of images of these sizes."""
    mean = (0.5, 0.25, 0.4, 0.3)[:n_channels]
    std = (0.25, 0.5, 0.3, 0.2)[:n_channels]
    return NetworkInfo("teacher", "lenet5", dataset, num_classes, image_size, mean, std, None)


def test_a_teacher_is_measured_on_its_own_data_set():
    dataset, (images, labels) = load_real_images(describe_teacher(), MethodOptions(), "cpu")
    assert dataset == "digits"
    assert images.shape == (360, 1, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (360,) and labels.dtype == torch.int64
    _, (images, _) = load_real_images(describe_teacher(), MethodOptions(), "cpu", "train")
    assert len(images) == 1437


@pytest.mark.parametrize(
    ("known", "option"), [("", "auto"), ("imagenet", "auto"), ("svhn", "auto"), ("digits", "none")]
)
def test_there_may_be_no_real_images(known, option):
    args = MethodOptions(dataset=option)
    assert load_real_images(describe_teacher(known), args, "cpu") == ("none", None)


def test_real_images_of_another_data_set_are_taken_where_they_fit():
    dataset, _ = load_real_images(describe_teacher(""), MethodOptions(dataset="digits"), "cpu")
    assert dataset == "digits"


@pytest.mark.parametrize("sizes", [dict(n_channels=3), dict(num_classes=9), dict(image_size=28)])
def test_real_images_that_do_not_fit_the_teacher_are_refused(capsys, sizes):
    line = read_refusal(capsys, load_real_images, describe_teacher(**sizes), MethodOptions(), "cpu")
    assert "--dataset digits: its images or classes do not fit the teacher" in line


def test_missing_real_images_are_refused(capsys, tmp_path):
    args = MethodOptions(data_dir=str(tmp_path))
    line = read_refusal(capsys, load_real_images, describe_teacher("mnist"), args, "cpu")
    assert "check --data-dir" in line and "python teacher.py --dataset mnist" in line


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_pixels_survive_the_way_into_normalised_units_and_back(n_channels):
    info = describe_teacher(n_channels=n_channels)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, n_channels, 1, 1)
    x = normalise(pixels, info)
    assert x.dtype == torch.float32
    for c in range(n_channels):
        expected = (pixels[:, c] / 255 - info.mean[c]) / info.std[c]
        assert torch.allclose(x[:, c], expected, atol=1e-6)
    assert torch.equal(to_uint8(x, info), pixels)


class Brightest(nn.Linear):
    """The channel that is brightest; in train mode that which is darkest."""

    def __init__(self):
        super().__init__(3, 3, bias=False)
        nn.init.eye_(self.weight)

    def forward(self, x):
        logits = super().forward(x.mean((2, 3)))
        return -logits if self.training else logits


def test_an_accuracy_counts_hits_in_eval_mode_and_leaves_the_mode_alone():
    info = NetworkInfo("x", "x", "", 3, 4, (0.5,) * 3, (0.5,) * 3, None)
    brightest = torch.tensor([0, 1, 2, 1, 1, 0, 2])
    images = torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    images[torch.arange(7), brightest] = 200
    labels = torch.tensor([0, 1, 2, 0, 0, 0, 0])
    network = Brightest()
    for training in (True, False):
        network.train(training)
        for batch_size in (1, 3, 500):
            accuracy = evaluate(network, images, labels, info, batch_size)
            assert accuracy == pytest.approx(100 * 4 / 7)
            assert network.training == training
    predicted = predict(network.eval(), images, info, batch_size=2)
    assert torch.equal(predicted, brightest) and not predicted.requires_grad


def test_class_names_are_as_many_as_the_classes():
    for dataset, names in CLASS_NAMES.items():
        assert len(set(names)) == N_CLASSES[dataset]
