"""Networks by name, checkpoint or factory, and what does not fit: harness/load.py and parts."""

import hashlib
import importlib
import json
import math
import pickle
import random
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from scripts import read_refusal

from harness import ROOT
from harness.data import evaluate, load_dataset
from harness.errors import FOREIGN, fail_in_one_line, report_uncaught
from harness.foreign import import_first_from, load_factory
from harness.known import DEFAULTS, IMAGENET_FILES, NetworkInfo, list_imagenet, list_shipped
from harness.load import find_dataset, load_student, load_teacher, load_trained, load_verifier
from harness.networks import NETWORKS
from harness.run import MethodOptions, seed_everything
from harness.weights import load_state

GREY = dict(num_classes=4, image_size=16, mean=(0.1,), std=(0.2,))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test reaches the network. Refusals begin with a name of the program that is known."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("sys.argv", ["test"])


def teacher_of(spec, **options):
    """(teacher, NetworkInfo) of --teacher `spec`."""
    return load_teacher(MethodOptions(teacher=str(spec), **options), "cpu")


def refuse_teacher(capsys, spec, size_multiple=4, **options):
    """The line with which --teacher `spec` is refused."""
    args = MethodOptions(teacher=str(spec), **options)
    return read_refusal(capsys, load_teacher, args, "cpu", size_multiple)


def describe_teacher(**changes):
    """NetworkInfo of a grey teacher of 10 classes."""
    known = dict(name="teacher", arch="lenet5", dataset="digits", num_classes=10, image_size=32)
    known |= dict(mean=(0.3,), std=(0.4,), accuracy=99.0)
    return NetworkInfo(**known | changes)


def write_checkpoint(path, network, **description):
    """A checkpoint as teacher.py writes it."""
    torch.save(description | {"state_dict": network.state_dict()}, path)
    return path


# Names


@pytest.mark.parametrize("name", ["digits-lenet5", "digits-resnet8"])
def test_a_shipped_teacher_is_as_accurate_as_its_description_says(name):
    teacher, info = teacher_of(name)
    known = json.loads((ROOT / "teachers/index.json").read_text())[name]
    assert (info.name, info.arch, info.dataset) == (name, known["arch"], "digits")
    assert (info.image_shape, info.channels, info.num_classes) == ((1, 32, 32), 1, 10)
    assert list(info.mean) == known["mean"] and list(info.std) == known["std"]
    assert info.accuracy == known["accuracy"]
    images, labels = load_dataset("digits", "", "test")
    assert evaluate(teacher, images, labels, info) == pytest.approx(info.accuracy, abs=0.01)


@pytest.mark.parametrize("name", sorted(list_shipped()))
def test_a_shipped_teacher_is_frozen_in_eval_mode_and_channels_last(name):
    teacher, _ = teacher_of(name)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_imagenet_teachers_are_described_like_shipped_ones():
    needed = {"arch", "dataset", "num_classes", "image_size", "mean", "std", "accuracy"}
    needed |= {"file", "sha256"}
    for known in list_shipped().values():
        assert needed <= set(known)
    for name, known in list_imagenet().items():
        assert set(known) == needed | {"url"}
        assert known["arch"] == name and name in NETWORKS
        assert re.fullmatch("[0-9a-f]{8}", known["sha256"])
        url = f"https://download.pytorch.org/models/{name}-{known['sha256']}.pth"
        assert known["url"] == url
        assert (known["num_classes"], known["image_size"]) == (1000, 224)


@pytest.mark.parametrize("spec", ["resnet8", "wrn_16_1", "wrn-16-1", "resnet18-cifar"])
def test_hyphens_and_underscores_name_one_network(tmp_path, spec):
    """`arch` has underscores either way, so that a student's checkpoint can be loaded again."""
    arch = spec.replace("-", "_")
    network = NETWORKS[arch](in_channels=1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    _, info = teacher_of(spec, weights=weights, image_size=16, mean=(0.5,), std=(0.5,))
    assert (info.name, info.arch) == (spec, arch)
    description = dict(arch=info.arch, mean=info.mean, std=info.std)
    saved = write_checkpoint(tmp_path / "student.pt", network, **description)
    _, again = teacher_of(saved, image_size=16)
    assert again.arch == arch


@pytest.mark.parametrize("spec", ["resnet7000", "resnet-20", "", "digits", "teachers/index.json"])
def test_an_unknown_name_is_refused_with_all_choices(capsys, spec):
    line = refuse_teacher(capsys, spec)
    assert f"unknown network {spec!r}" in line and "; choose one of" in line
    for choice in ("digits-lenet5", "resnet50", "wrn_16_1", "teacher.pt or file.py:factory"):
        assert choice in line


def test_a_name_without_weights_is_refused(capsys):
    assert "untrained network; pass a teacher's weights" in refuse_teacher(capsys, "wrn-16-1")


@pytest.mark.parametrize(
    ("spec", "dataset"),
    [
        ("", ""),
        ("digits-resnet8", "digits"),
        ("cifar10-wrn-16-1", "cifar10"),
        ("resnet50", "imagenet"),
        ("wrn_16_1", ""),
        ("nowhere.py:factory", ""),
    ],
)
def test_the_teachers_data_set_is_found_by_its_name(spec, dataset):
    assert find_dataset(spec) == dataset


# Checkpoints


def test_a_checkpoint_says_what_network_it_is(tmp_path):
    network = NETWORKS["resnet8"](num_classes=4, in_channels=1)
    path = write_checkpoint(
        tmp_path / "t.pt", network, arch="resnet8", dataset="mnist", accuracy=81.5, **GREY
    )
    teacher, info = teacher_of(path)
    assert torch.equal(teacher.fc.weight, network.fc.weight)
    expected = dict(GREY, name=str(path), arch="resnet8", dataset="mnist", accuracy=81.5)
    assert info == NetworkInfo(**expected)
    assert find_dataset(str(path)) == "mnist"


def test_options_go_before_what_a_checkpoint_says(tmp_path):
    network = NETWORKS["resnet8"](num_classes=4, in_channels=1)
    path = write_checkpoint(tmp_path / "t.pt", network, arch="resnet8", **GREY)
    _, info = teacher_of(path, image_size=8, mean=(0.5,), std=(0.6,))
    assert (info.num_classes, info.image_size, info.mean, info.std) == (4, 8, (0.5,), (0.6,))


def test_weights_beside_a_checkpoint_replace_its_own_only(tmp_path):
    first = NETWORKS["resnet8"](num_classes=4, in_channels=1)
    second = NETWORKS["resnet8"](num_classes=4, in_channels=1)
    path = write_checkpoint(tmp_path / "t.pt", first, arch="resnet8", accuracy=99.0, **GREY)
    torch.save(second.state_dict(), tmp_path / "w.pth")
    teacher, info = teacher_of(path, weights=str(tmp_path / "w.pth"))
    assert torch.equal(teacher.fc.weight, second.fc.weight)
    assert (info.num_classes, info.image_size, info.mean, info.std) == tuple(GREY.values())
    assert info.accuracy is None  # the description's is not this file's


def test_the_accuracy_of_a_checkpoint_becomes_a_number(tmp_path):
    network = NETWORKS["resnet8"]()
    path = write_checkpoint(tmp_path / "t.pt", network, arch="resnet8", accuracy=torch.tensor(81.5))
    assert teacher_of(path)[1].accuracy == 81.5


def test_a_checkpoint_cannot_send_for_other_weights(tmp_path, monkeypatch):
    """Neither an address nor a path in a checkpoint is followed."""
    fetched = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: fetched.append(args))
    monkeypatch.chdir(tmp_path)
    network = NETWORKS["resnet8"]()
    hostile = dict(url="https://example.org/evil.pth", sha256="00", file="/etc/passwd")
    write_checkpoint("t.pt", network, arch="resnet8", **hostile)
    teacher, _ = teacher_of("t.pt", data_dir="data")
    assert torch.equal(teacher.fc.weight, network.fc.weight)
    assert not fetched and not Path("data").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(dict(arch=None), "not a checkpoint of teacher.py", id="no arch"),
        pytest.param(dict(arch=5), "not a checkpoint of teacher.py", id="arch a number"),
        pytest.param(dict(arch="../evil.py:f"), "it is of ../evil.py:f, and a", id="arch a file"),
        pytest.param(dict(arch="resnet-20"), "not a checkpoint of teacher.py", id="arch misspelt"),
        pytest.param(dict(arch="__class__"), "unknown network '__class__'", id="arch unknown"),
        pytest.param(dict(dataset=["cifar10"]), "not a checkpoint of teacher.py", id="data a list"),
        pytest.param(dict(mean=None), "--mean", id="no mean"),
        pytest.param(dict(std=("a",) * 3), "--std", id="std of words"),
        pytest.param(dict(mean=(), std=()), "--mean", id="no channel"),
        pytest.param(dict(num_classes="x"), "--num-classes", id="classes a word"),
        pytest.param(dict(num_classes=-1), "--num-classes", id="negative classes"),
        pytest.param(dict(num_classes=10**13), "--num-classes", id="too many classes"),
        pytest.param(dict(image_size="a"), "--image-size", id="size a word"),
        pytest.param(dict(image_size=33), "--image-size", id="odd size"),
        pytest.param(dict(accuracy="best"), "t.pt", id="accuracy a word"),
        pytest.param(dict(accuracy=torch.ones(3)), "t.pt", id="accuracy of three"),
    ],
)
def test_an_odd_checkpoint_is_refused_before_the_work(capsys, tmp_path, changes, says):
    (tmp_path / "evil.py").write_text("open('owned', 'w')")
    description = dict(arch="resnet8") | changes
    path = write_checkpoint(tmp_path / "t.pt", NETWORKS["resnet8"](), **description)
    assert says in refuse_teacher(capsys, path)
    assert not list(tmp_path.glob("**/owned"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_network_without_classes_is_refused(capsys, tmp_path):
    network = NETWORKS["resnet8"](num_classes=0)
    path = write_checkpoint(tmp_path / "t.pt", network, arch="resnet8", num_classes=0)
    assert "0 classes" in refuse_teacher(capsys, path)


class Hostile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_weights", [False, True], ids=["teacher", "weights"])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_hostile_file_runs_nothing(capsys, tmp_path, write, as_weights):
    path = tmp_path / "hostile.pt"
    write({"arch": "resnet8", "state_dict": Hostile(tmp_path / "owned")}, path)
    if as_weights:
        line = refuse_teacher(capsys, "cifar10-resnet20", weights=str(path))
    else:
        line = refuse_teacher(capsys, path)
    assert f"{path}: no safe checkpoint" in line
    assert "weights_only" not in line  # PyTorch's advice how to run it all the same
    assert not (tmp_path / "owned").exists()


# Weights


def test_public_resnet20_weights_load_under_their_own_names(tmp_path):
    """The keys of the widely used file: DataParallel's prefix, `linear`, in {"state_dict": …}."""
    convs = {"conv1": (16, 3)}
    width = 16
    for stage in (1, 2, 3):
        for block in range(3):
            convs[f"layer{stage}.{block}.conv1"] = (16 * 2 ** (stage - 1), width)
            width = 16 * 2 ** (stage - 1)
            convs[f"layer{stage}.{block}.conv2"] = (width, width)
    public = {"module.linear.weight": torch.randn(10, 64), "module.linear.bias": torch.randn(10)}
    for name, (after, before) in convs.items():
        public[f"module.{name}.weight"] = torch.randn(after, before, 3, 3)
        bn = name.replace("conv", "bn")
        for part in ("weight", "bias", "running_mean", "running_var"):
            public[f"module.{bn}.{part}"] = torch.rand(after)
    torch.save({"state_dict": public, "best_prec1": 91.78}, tmp_path / "resnet20.th")

    teacher, info = teacher_of("cifar10-resnet20", weights=str(tmp_path / "resnet20.th"))
    state = teacher.state_dict()
    for key, value in public.items():
        ours = key.removeprefix("module.").replace("linear.", "fc.")
        assert torch.equal(state[ours], value), key
    assert info.accuracy is None and info.dataset == "cifar10"


def test_public_four_stage_weights_load_with_their_shortcuts(tmp_path):
    source = NETWORKS["resnet18_cifar"]()
    public = {}
    for key, value in source.state_dict().items():
        public[key.replace("fc.", "linear.").replace("downsample.", "shortcut.")] = value
    assert any("shortcut." in key for key in public)
    torch.save({"net": public}, tmp_path / "w.pth")
    teacher, _ = teacher_of("resnet18_cifar", weights=str(tmp_path / "w.pth"), image_size=8)
    for key, value in source.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value), key


def test_a_networks_own_layer_names_are_left_alone():
    """`fc` and `linear` side by side: neither is mistaken for the other's public name."""

    def build():
        return nn.ModuleDict({"fc": nn.Linear(2, 2), "linear": nn.Linear(2, 2)})

    source = build()
    target = build()
    load_state(target, source.state_dict(), "file")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_weights_of_an_imagenet_teacher_keep_its_description(tmp_path):
    weights = str(tmp_path / "r18.pth")
    torch.save(NETWORKS["resnet18"](num_classes=1000).state_dict(), weights)
    args = MethodOptions(teacher="resnet18", weights=weights, data_dir=str(tmp_path / "no"))
    _, info = load_trained(args.teacher, "cpu", args.data_dir, args.weights)
    assert (info.name, info.arch, info.dataset) == ("resnet18", "resnet18", "imagenet")
    assert (info.num_classes, info.image_size, info.accuracy) == (1000, 224, None)
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        pytest.param({"layer.weight": torch.ones(3)}, "keys do not fit", id="other keys"),
        pytest.param({0: torch.ones(3)}, "keys do not fit", id="numbers as keys"),
        pytest.param({"state_dict": {}}, "keys do not fit", id="no keys"),
        pytest.param([torch.ones(3)], "expected a dict, got list", id="list"),
        pytest.param(torch.ones(3), "expected a dict, got Tensor", id="tensor"),
    ],
)
def test_weights_of_another_kind_are_refused(capsys, tmp_path, saved, says):
    torch.save(saved, tmp_path / "w.pt")
    assert says in refuse_teacher(capsys, "digits-lenet5", weights=str(tmp_path / "w.pt"))


def test_truncated_missing_and_unreadable_files_are_refused(capsys, tmp_path):
    whole = (ROOT / "teachers/digits-lenet5.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:20_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "folder.pt").mkdir()
    for name in ("cut", "empty", "text", "folder", "nowhere"):
        path = str(tmp_path / f"{name}.pt")
        for options in (dict(spec=path), dict(spec="digits-lenet5", weights=path)):
            line = refuse_teacher(capsys, **options)
            assert path in line, line
            assert "no safe checkpoint" in line or "cannot be read" in line, line


def test_an_altered_shipped_teacher_is_refused(capsys, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "teachers", tmp_path / "teachers")
    path = tmp_path / "teachers/digits-lenet5.pt"
    altered = bytearray(path.read_bytes())
    altered[len(altered) // 2] ^= 1
    path.write_bytes(altered)
    monkeypatch.setattr("harness.known.ROOT", tmp_path)
    assert "SHA-256" in refuse_teacher(capsys, "digits-lenet5")


# Downloads


def test_an_imagenet_teacher_is_fetched_once_and_checked(capsys, tmp_path, monkeypatch):
    torch.save(NETWORKS["resnet18"](num_classes=1000).state_dict(), tmp_path / "r18.pth")
    official = (tmp_path / "r18.pth").read_bytes()
    digest = hashlib.sha256(official).hexdigest()[:8]
    name = f"resnet18-{digest}.pth"
    monkeypatch.setitem(IMAGENET_FILES, "resnet18", (name, 69.758))
    calls = []

    def download(url, path, digest):
        calls.append((url, path, digest))
        Path(path).write_bytes(official)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    folder = tmp_path / "data"
    for _ in range(2):
        _, info = load_trained("resnet18", "cpu", str(folder))
        assert info.accuracy == 69.758
    url = f"https://download.pytorch.org/models/{name}"
    assert calls == [(url, str(folder / name), digest)]

    (folder / name).write_bytes(official[:-1])
    line = refuse_teacher(capsys, "resnet18", data_dir=str(folder))
    assert f"{name} does not begin with {digest}" in line and "fetch it again" in line


def test_a_failed_download_names_address_place_and_option(capsys, tmp_path):
    line = refuse_teacher(capsys, "resnet50", data_dir=str(tmp_path / "data"))
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in line
    assert str(tmp_path / "data/resnet50-0676ba61.pth") in line
    assert "--weights FILE" in line


# Factories

FACTORIES = """
from dataclasses import dataclass

import torch
import torch.nn as nn
from neighbour import WIDTH


@dataclass
class Sizes:
    width: int = WIDTH


def factory(num_classes):
    width = Sizes().width
    network = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return network.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)])


def flat(num_classes, in_channels, image_size):
    network = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
    nn.init.constant_(network[1].bias, 3.0)
    return network
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """`nets("factory")` names a factory in a user's own file, which imports its neighbour."""
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("my_nets", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    return lambda name: f"{tmp_path / 'my_nets.py'}:{name}"


def test_a_users_own_network_is_loaded_with_its_weights(nets, tmp_path):
    """Its file imports a neighbour; its factory takes one of three options."""
    network = load_factory(nets("factory"), num_classes=7, in_channels=3, image_size=16)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    options = dict(num_classes=7, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher, info = teacher_of(nets("factory"), weights=str(tmp_path / "w.pth"), **options)
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(teacher(x), network.eval()(x), atol=1e-6)
    assert (info.arch, info.dataset, info.accuracy) == (nets("factory"), "", None)
    assert (info.num_classes, info.image_size, info.mean) == (7, 16, (0.5,) * 3)


def test_packages_stay_where_the_environment_lies_in_the_repository(nets, tmp_path, monkeypatch):
    """Ours of other names than harness make room for a user's; what is installed does not."""
    site = tmp_path / ".venv/lib/site-packages"
    modules = {"installed": site / "installed.py", "kernels": tmp_path / "kernels/__init__.py"}
    for name, path in modules.items():
        module = types.ModuleType(name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("harness.foreign.ROOT", tmp_path)
    site.mkdir(parents=True)
    (site / "fetched.py").write_text("")
    monkeypatch.syspath_prepend(site)
    installed = sys.modules["installed"]
    with import_first_from([tmp_path]):
        assert sys.modules["installed"] is installed
        assert "kernels" not in sys.modules
        fetched = importlib.import_module("fetched")
    assert sys.modules.pop("fetched") is fetched  # not forgotten: some cannot be imported twice


def test_a_factory_gets_the_options_that_it_takes(nets):
    network = load_factory(nets("flat"), num_classes=7, in_channels=2, image_size=8)
    assert network[1].weight.shape == (7, 128)


def test_a_factory_without_weights_is_no_teacher(capsys, nets):
    assert "--weights FILE" in refuse_teacher(capsys, nets("factory"))


# Trying out


@pytest.mark.parametrize(
    ("size", "multiple", "fits"), [(8, 4, True), (12, 4, True), (10, 4, False), (10, 2, True)]
)
def test_image_sizes_are_multiples_of_what_the_method_needs(capsys, tmp_path, size, multiple, fits):
    network = NETWORKS["resnet8"](in_channels=1)
    path = write_checkpoint(tmp_path / "t.pt", network, arch="resnet8", mean=(0.5,), std=(0.5,))
    args = MethodOptions(teacher=str(path), image_size=size)
    if fits:
        assert load_teacher(args, "cpu", multiple)[1].image_size == size
        return
    line = refuse_teacher(capsys, path, size_multiple=multiple, image_size=size)
    assert f"--image-size: expected a multiple of {multiple} of at least 8 pixels" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(mean=(0.5,), std=(0.5, 0.5)), "--mean and --std", id="two lengths"),
        pytest.param(dict(mean=(0.5,), std=(0.0,)), "std positive", id="std zero"),
        pytest.param(dict(mean=(math.nan,), std=(0.5,)), "finite", id="mean NaN"),
        pytest.param(dict(mean=(0.5,) * 3, std=(0.5,) * 3), "digits-lenet5", id="other channels"),
        pytest.param(dict(image_size=64), "--image-size", id="too large for its linear layer"),
    ],
)
def test_options_that_do_not_fit_the_teacher_are_refused(capsys, options, says):
    assert says in refuse_teacher(capsys, "digits-lenet5", **options)


def test_a_teacher_that_gives_nan_is_refused(capsys, tmp_path):
    network = NETWORKS["lenet5"](in_channels=1)
    nn.init.constant_(network.fc2.bias[3:4], math.nan)
    path = write_checkpoint(tmp_path / "t.pt", network, arch="lenet5", mean=(0.5,), std=(0.5,))
    assert "fc2.bias is not finite; pass weights that are finite" in refuse_teacher(capsys, path)


# Students


@pytest.mark.parametrize(
    "spec", ["cifar10-resnet20", "resnet8", "wrn_16_1", "wrn-16-1", "checkpoint", "factory"]
)
def test_a_student_is_fresh_and_has_its_teachers_images_and_classes(tmp_path, nets, spec):
    """Only the architecture is the named network's."""
    teacher_info = describe_teacher(num_classes=7, image_size=16, mean=(0.3,) * 3, std=(0.4,) * 3)
    if spec == "checkpoint":
        network = NETWORKS["resnet8"](num_classes=3)
        spec = str(write_checkpoint(tmp_path / "s.pt", network, arch="resnet8", num_classes=3))
    elif spec == "factory":
        spec = nets("factory")
    student, info = load_student(spec, teacher_info, "cpu")
    for name in DEFAULTS:
        assert getattr(info, name) == getattr(teacher_info, name)
    assert info.name == spec and info.accuracy is None
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert student(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_an_imagenet_name_is_a_students_architecture():
    teacher_info = describe_teacher(num_classes=5, image_size=32, mean=(0.3,) * 3, std=(0.4,) * 3)
    student, info = load_student("resnet18", teacher_info, "cpu")
    assert student.fc.weight.shape == (5, 512) and info.arch == "resnet18"


def test_trying_a_student_out_leaves_its_running_moments_alone():
    student, _ = load_student("resnet8", describe_teacher(), "cpu")
    assert student.bn1.num_batches_tracked == 0 and not student.bn1.running_mean.any()


# Verifiers


def verifier_of(spec, likely="digits-lenet5", teacher_info=None):
    return load_verifier(spec, likely, teacher_info or describe_teacher(), MethodOptions(), "cpu")


def test_the_likely_verifier_is_taken_where_it_fits():
    _, info = verifier_of("auto")
    assert info.name == "digits-lenet5"
    other_sizes = dict(num_classes=7), dict(image_size=16), dict(mean=(0.3,) * 3, std=(0.4,) * 3)
    for changes in other_sizes:
        teacher_info = describe_teacher(**changes)
        assert verifier_of("auto", teacher_info=teacher_info) == (None, None), changes
    assert verifier_of("auto", likely="none") == (None, None)
    assert verifier_of("none") == (None, None)


def test_a_verifier_reads_images_in_its_own_units():
    verifier, info = verifier_of("digits-lenet5", likely="none")
    assert (info.mean, info.std, info.num_classes) == ((0.3054,), (0.3237,), 10)
    assert info.accuracy == pytest.approx(99.72, abs=0.01)
    assert not verifier.training and not any(p.requires_grad for p in verifier.parameters())


def test_a_verifiers_factory_brings_its_own_weights(nets):
    verifier, info = verifier_of(nets("flat"))
    assert (verifier[1].bias == 3).all()
    assert (info.num_classes, info.image_size, info.mean) == (10, 32, (0.3,))


# Advice that helps: what was tried, and the one thing to change

BAD_NETS = """
import torch
import torch.nn as nn


def pool(channels=3, num_classes=10):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def seven():
    return pool(num_classes=7)


def grey():
    return nn.Sequential(nn.Conv2d(1, 3, 3), pool())


def large():
    return nn.Sequential(nn.Conv2d(3, 3, 40), pool())


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def maps():
    return nn.Conv2d(3, 10, 1)


def not_finite():
    network = pool()
    nn.init.constant_(network[2].bias, float("nan"))
    return network


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = seven()

    def forward(self, x):
        return self.network(x), x


class Broken(nn.Module):
    def forward(self, x):
        return {}["logits"]


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = pool()
        self.n_calls = 0

    def forward(self, x):
        return self.network(x)


class Detached(Pool):
    def forward(self, x):
        return self.network(x).detach()


class NoGrad(Pool):
    forward = torch.no_grad()(Pool.forward)


class Counted(Pool):
    def forward(self, x):
        return self.network(x).round().long()


class Complex(Pool):
    def forward(self, x):
        return self.network(x) * 1j


class InfiniteSlope(Pool):
    def forward(self, x):
        return self.network(x) + (x.mean() * 0).sqrt()


class Constant(Pool):
    def forward(self, x):
        return torch.zeros(len(x), 10, requires_grad=True) + 0


class ChangedInPlace(Pool):
    def forward(self, x):
        y = self.network(x).exp()
        z = y.exp()
        z.add_(1)
        return z.log()


class SecondCall(Pool):
    def forward(self, x):
        self.n_calls += 1
        if self.n_calls > 1:
            raise KeyError("only once")
        return self.network(x)


class SwitchesOff(Pool):
    def forward(self, x):
        torch.set_grad_enabled(False)
        return self.network(x)


class Doubles(Pool):
    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        return self.network(x)


class Probable(Pool):
    def forward(self, x):
        return self.network(x).softmax(1)


class CentresItsInput(Pool):
    def forward(self, x):
        return self.network(x.sub_(0.5))


class InDouble(Pool):
    def forward(self, x):
        return self.network(x.double())


class KeepsAGraph(Pool):
    def __init__(self):
        super().__init__()
        self.kept = self.network[2].weight * 2


class SilentTrain(Pool):
    def train(self, mode=True):
        super().train(mode)  # and returns nothing


def frozen():
    return pool().requires_grad_(False)


def partly_frozen():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), pool())
    network[0].requires_grad_(False)
    return network


def scripted():
    return torch.jit.script(pool())


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def compiled():
    return torch.compile(pool())


class Leaves(Pool):
    def forward(self, x):
        raise SystemExit(0)


class Base(BaseException):
    pass


def raises_base():
    raise Base


def needs(depth, num_classes):
    return pool()


def imports():
    import nosuchpackage


def broken():
    raise KeyError("nothing here")


def leaves():
    raise SystemExit(0)


def no_network():
    return {"num_classes": 10}


NETWORK = pool()
NUMBER = 3
"""
COLOURS = dict(mean=(0.3,) * 3, std=(0.4,) * 3)


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """A folder of bad factories, and of files that are no weights of theirs."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_nets.py").write_text(BAD_NETS)
    (folder / "imports.py").write_text("import math\nimport nosuchpackage.part\n")
    (folder / "names.py").write_text("from bad_nets import missing\n")
    (folder / "syntax.py").write_text("def factory(:\n")
    (folder / "text.pth").write_text("no checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", list(sys.path))
        names = ("seven", "grey", "large", "flat", "not_finite", "TwoOutputs", "Pool")
        for name in names:
            network = load_factory(f"{folder}/bad_nets.py:{name}", 10, 3, 32)
            torch.save(network.state_dict(), folder / f"{name}.pth")
    pools = [load_factory(f"{folder}/bad_nets.py:Pool", 10, 3, 32).state_dict() for _ in "ab"]
    torch.save(dict(student=pools[0], teacher=pools[1]), folder / "two.pth")
    lenet = NETWORKS["lenet5"](num_classes=7, in_channels=1)
    torch.save(lenet.state_dict(), folder / "lenet.pt")
    torch.save(NETWORKS["resnet8"]().state_dict(), folder / "resnet8.pth")
    return folder


def refuse_role(capsys, option, spec, options):
    """The line with which the network of an option is refused."""
    if option == "--teacher":
        return refuse_teacher(capsys, spec, **options)
    info = describe_teacher(**{**COLOURS, **options})
    if option == "--student":
        return read_refusal(capsys, load_student, spec, info, "cpu")
    return read_refusal(capsys, load_verifier, spec, "none", info, MethodOptions(), "cpu")


def name_weights(name, **options):
    return dict(weights=f"{name}.pth", **options)


T, S, V = "--teacher", "--student", "--verifier"
NUMBERS = ("--num-classes", "--mean", "--image-size")  # no cure for what python could not import
# option, its value, the other options or what the teacher is, what the line says, what it does not
BAD_INPUTS = [
    # names
    (S, "nosuchnet", {}, ["unknown network 'nosuchnet'", "choose one of"], []),
    (V, "nosuchnet", {}, ["unknown network 'nosuchnet'", "choose one of"], []),
    (T, "cifar10-resnet-20", {}, ["perhaps cifar10-resnet20;"], ["--weights"]),
    (S, "", {}, ["unknown network ''"], []),
    (T, "bad_nets.py", {}, ["as bad_nets.py:NAME"], ["choose one of"]),
    (T, "./bad_nets:flat", {}, ["write file.py:function"], ["choose one of"]),
    (T, "resnet8.pth", {}, ["--teacher and the file with --weights"], ["choose one of"]),
    (S, "resnet8.pth", {}, ["choose a network of harness"], ["--weights"]),
    (T, "lenet.pt", {}, ["not a checkpoint of teacher.py", "with --weights"], []),
    (S, "nowhere.pt", {}, ["nowhere.pt cannot be read: there is no such file"], []),
    (V, "nowhere.pt", {}, ["nowhere.pt cannot be read: there is no such file"], []),
    (T, "wrn_16_1", {}, ["untrained", "--weights FILE"], []),
    (V, "wrn_16_1", {}, ["untrained", "--verifier none"], ["--weights"]),
    # what does not import
    (T, "nowhere.py:f", name_weights("flat"), ["there is no file", "nowhere.py"], NUMBERS),
    (S, "nowhere.py:f", {}, ["there is no file", "nowhere.py"], ["harness/networks.py"]),
    (S, "nopackage.nets:f", {}, ["no module nopackage", "looked in", "install"], []),
    (T, "imports.py:f", name_weights("flat"), ["nosuchpackage, which imports.py, line 2"], NUMBERS),
    (S, "bad_nets.py:imports", {}, ["no module nosuchpackage", "looked in"], []),
    (S, "names.py:f", {}, ["cannot import name 'missing'", "names.py, line 1"], []),
    (S, "syntax.py:f", {}, ["SyntaxError", "line 1", "correct syntax.py"], []),
    (S, "bad_nets:absent", {}, ["defines no absent", "pool, seven, grey"], ["nn"]),
    # what does not build
    (
        T,
        "bad_nets.py:broken",
        name_weights("flat"),
        ["KeyError: 'nothing here' (bad_nets.py, line"],
        NUMBERS,
    ),
    (S, "bad_nets.py:needs", {}, ["it needs depth,", "give depth a default"], []),
    (S, "bad_nets.py:leaves", {}, ["bad_nets.py ends the program", "__main__"], []),
    (S, "bad_nets.py:no_network", {}, ["returned a dict, expected a torch.nn.Module"], []),
    (S, "bad_nets.py:NUMBER", {}, ["NUMBER is of type int"], []),
    (S, "bad_nets.py:NETWORK", {}, ["NETWORK is of type Sequential"], []),
    # what does not fit
    (T, "bad_nets.py:seven", name_weights("seven"), ["(2, 7)", "--num-classes 7"], ["--mean"]),
    (T, "bad_nets.py:TwoOutputs", name_weights("TwoOutputs"), ["--num-classes 7"], ["--mean"]),
    (S, "bad_nets.py:seven", {}, ["(2, 7)", "10 classes", "num_classes"], ["--num-classes"]),
    (V, "bad_nets.py:seven", {}, ["(2, 7)", "10 classes", "--verifier none"], ["--num-classes"]),
    (V, "cifar10-resnet20", dict(num_classes=7), ["10) for 2 images and 7 classes"], []),
    (S, "bad_nets.py:maps", {}, ["(2, 10, 32, 32)", "one row of logits"], ["num_classes"]),
    (
        T,
        "bad_nets.py:grey",
        name_weights("grey"),
        ["3 x 32 x 32", "1 value(s) of --mean"],
        ["--image-size"],
    ),
    (S, "bad_nets.py:grey", {}, ["3 x 32 x 32", "in_channels"], ["--mean"]),
    (V, "digits-lenet5", {}, ["to have 1 channels", "--verifier none"], ["--mean"]),
    (T, "bad_nets.py:large", name_weights("large"), ["3 x 32 x 32", "--image-size"], ["--mean"]),
    (
        T,
        "bad_nets.py:flat",
        name_weights("flat", image_size=64),
        ["3 x 64 x 64", "--image-size"],
        ["--mean"],
    ),
    (S, "lenet5", dict(image_size=16), ["3 x 16 x 16", "images of this size"], ["--image-size"]),
    (V, "digits-lenet5", dict(image_size=16, mean=(0.3,), std=(0.4,)), ["1 x 16 x 16"], []),
    (
        T,
        "bad_nets.py:not_finite",
        name_weights("not_finite"),
        ["not finite; pass weights that are finite"],
        NUMBERS,
    ),
    (S, "bad_nets.py:Broken", {}, ["KeyError: 'logits'", "correct its forward"], []),
    # what does not learn, or changes what it should not
    (S, "bad_nets.py:Counted", {}, ["of type torch.int64", "real numbers"], []),
    (S, "bad_nets.py:Complex", {}, ["of type torch.complex64", "real numbers"], []),
    (S, "bad_nets.py:Detached", {}, ["carry no gradient", "take detach"], []),
    (S, "bad_nets.py:NoGrad", {}, ["carry no gradient", "no_grad"], []),
    (T, "bad_nets.py:Detached", name_weights("Pool"), ["carry no gradient", "detach"], NUMBERS),
    (T, "bad_nets.py:NoGrad", name_weights("Pool"), ["carry no gradient", "no_grad"], NUMBERS),
    (S, "bad_nets.py:Constant", {}, ["depend on none of what is to change"], []),
    (
        T,
        "bad_nets.py:InfiniteSlope",
        name_weights("Pool"),
        ["gradients are not finite", "correct its forward"],
        NUMBERS,
    ),
    (S, "bad_nets.py:ChangedInPlace", {}, ["its backward pass failed", "inplace"], []),
    (
        S,
        "bad_nets.py:SecondCall",
        {},
        ["KeyError: 'only once' (bad_nets.py", "correct that line"],
        [],
    ),
    (S, "bad_nets.py:SwitchesOff", {}, ["switches gradients", "leave PyTorch's settings"], []),
    (S, "bad_nets.py:Doubles", {}, ["the default dtype", "leave PyTorch's settings"], []),
    (S, "bad_nets.py:Leaves", {}, ["SystemExit: 0", "correct its forward"], []),
    (S, "bad_nets.py:raises_base", {}, ["ends the program (Base)"], []),
    (S, "bad_nets.py:Probable", {}, ["gives probabilities", "the logarithm"], []),
    (T, "bad_nets.py:Probable", name_weights("Pool"), ["gives probabilities"], NUMBERS),
    (
        T,
        "bad_nets.py:CentresItsInput",
        name_weights("Pool"),
        ["take operations in place off its input"],
        NUMBERS,
    ),
    (S, "bad_nets.py:InDouble", {}, ["let it compute in the dtype of its input"], []),
    (S, "bad_nets.py:KeepsAGraph", {}, ["cannot be copied", "keep no results in it"], []),
    (S, "bad_nets.py:frozen", {}, ["parameters are frozen", "let some require"], []),
    (S, "bad_nets.py:scripted", {}, ["a TorchScript module", "it was made of"], []),
    (S, "bad_nets.py:lazy", {}, ["lazy modules", "feed it a batch"], []),
    # weights
    (
        T,
        "bad_nets.py:Pool",
        name_weights("two"),
        ["different weights in it fit: student and teacher", "with one of them"],
        NUMBERS,
    ),
    (
        T,
        "digits-lenet5",
        dict(weights="lenet.pt"),
        ["(7, 84), the network's (10, 84)", "--num-classes 7"],
        ["--mean"],
    ),
    (
        T,
        "digits-lenet5",
        dict(num_classes=100),
        ["the network's (100, 84)", "--num-classes 10"],
        ["--mean"],
    ),
    (T, "digits-lenet5", COLOURS, ["(6, 1, 5, 5)", "1 value(s) of --mean"], ["--num-classes"]),
    (
        T,
        "cifar10-resnet20",
        name_weights("resnet8"),
        ["keys do not fit", "with --teacher"],
        NUMBERS,
    ),
    (T, "cifar10-resnet20", name_weights("nowhere"), ["nowhere.pth cannot be read"], NUMBERS),
    (T, "cifar10-resnet20", name_weights("text"), ["text.pth: no safe checkpoint"], NUMBERS),
]


@pytest.mark.parametrize(
    ("option", "spec", "options", "says", "says_not"),
    BAD_INPUTS,
    ids=[f"{option[2:]} {spec}" for option, spec, *_ in BAD_INPUTS],
)
def test_a_refusal_names_the_option_and_the_one_thing_to_change(
    capsys, monkeypatch, bad_folder, option, spec, options, says, says_not
):
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    line = refuse_role(capsys, option, spec, options)
    assert line.startswith(f"test: {option}".rstrip()) or "no safe checkpoint" in line, line
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    for words in says:
        assert words in line
    for words in says_not:
        assert words not in line


# What holds for the whole program

SETTINGS = """
import torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")


def double():
    torch.set_grad_enabled(False)
    return torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10, device="cpu")
    )
"""


def test_a_users_file_does_not_change_settings_for_the_program(tmp_path):
    """Gradients, the default dtype and device are as before; the network computes in fp32."""
    (tmp_path / "settings.py").write_text(SETTINGS)
    info = describe_teacher(**COLOURS)
    student, _ = load_student(f"{tmp_path}/settings.py:double", info, "cpu")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert student(torch.zeros(2, 3, 32, 32)).dtype == torch.float32


SEEDS = """
import os
import random

import numpy as np
import torch

torch.manual_seed(42)
random.seed(42)
np.random.seed(42)
os.chdir("/")


def seeded():
    random.random()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
"""


def test_a_users_file_that_seeds_does_not_make_all_seeds_alike(tmp_path, monkeypatch):
    (tmp_path / "seeds.py").write_text(SEEDS)
    monkeypatch.chdir(tmp_path)
    drawn = []
    for seed in (0, 1):
        seed_everything(seed)
        load_student("seeds.py:seeded", describe_teacher(**COLOURS), "cpu")
        drawn.append((torch.rand(1).item(), random.random(), np.random.random()))  # noqa: NPY002
    assert not set(drawn[0]) & set(drawn[1])
    assert Path.cwd() == tmp_path


def test_a_student_keeps_the_layers_that_its_factory_froze(bad_folder, monkeypatch):
    monkeypatch.chdir(bad_folder)
    info = describe_teacher(**COLOURS)
    student, _ = load_student("bad_nets.py:partly_frozen", info, "cpu")
    assert [p.requires_grad for p in student.parameters()] == [False, False, True, True]
    named, _ = load_student("resnet8", info, "cpu")
    assert all(p.requires_grad for p in named.parameters())


@pytest.mark.parametrize("name", ["SilentTrain", "compiled"])
def test_networks_with_odd_habits_that_load(bad_folder, monkeypatch, name):
    monkeypatch.chdir(bad_folder)
    student, _ = load_student(f"bad_nets.py:{name}", describe_teacher(**COLOURS), "cpu")
    assert not any(key.startswith("_orig_mod") for key in student.state_dict())


def test_an_average_is_known_by_a_word_of_its_name(tmp_path):
    """`schema` has no average; of two equal sets of weights either will do."""
    network = nn.Linear(2, 2)
    first = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    second = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    load_state(network, {"model_ema": second, "schema": first}, "file")
    assert network.bias.sum() == 2
    load_state(network, {"state_dict": second, "model": dict(second)}, "file")
    assert network.bias.sum() == 0
    load_state(network, {"ema_state": first}, "file")
    assert network.bias.sum() == 2
    load_state(network, {"modelEMA": first, "model": second}, "file")
    assert network.bias.sum() == 0


def test_what_fits_in_names_alone_does_not_count(tmp_path):
    """Nor does a copy in half precision, and a buffer of -inf is the network's own."""
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.full((2,), -math.inf))
    fitting = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    other = {name: torch.zeros(3, 3) for name in fitting}
    half = {name: tensor.half() for name, tensor in fitting.items()}
    load_state(network, {"backbone": other, "net": fitting, "half": half}, "file")
    assert torch.equal(network.weight, fitting["weight"])


def test_an_imagenet_architecture_of_other_classes_is_not_of_imagenet(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "fine.pth"
    torch.save(NETWORKS["resnet18"](num_classes=7).state_dict(), weights)
    args = MethodOptions(teacher="resnet18", weights=str(weights), num_classes=7, image_size=64)
    _, info = load_teacher(args, "cpu")
    assert (info.dataset, info.accuracy, info.arch) == ("", None, "resnet18")


LATE = """
import torch


class Late(torch.nn.Linear):
    n_calls = 0

    def __init__(self, num_classes, in_channels, image_size):
        super().__init__(in_channels * image_size**2, num_classes)

    def forward(self, x):
        Late.n_calls += 1
        if Late.n_calls > 20:
            raise KeyError("late")
        return super().forward(x.flatten(1))


class LateBackward(Late):
    def forward(self, x):
        Late.n_calls += 1
        y = super(Late, self).forward(x.flatten(1))
        if Late.n_calls > 20:
            y = y.detach()
        return y
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Late", "KeyError: 'late' (late.py, line 14); correct that line of the network"),
        ("LateBackward", "the backward pass failed: RuntimeError: element 0 of tensors"),
    ],
)
def test_a_network_that_fails_late_is_one_line(capsys, tmp_path, name, says):
    """Where no block of the script catches it, and where one does."""
    FOREIGN.clear()
    (tmp_path / "late.py").write_text(LATE)
    student, _ = load_student(f"{tmp_path}/late.py:{name}", describe_teacher(), "cpu")

    def learn():
        for _ in range(30):
            student(torch.randn(2, 1, 32, 32)).sum().backward()

    def learn_as_program():
        try:
            learn()
        except Exception as error:
            report_uncaught(type(error), error, error.__traceback__)

    def learn_in_a_block():
        with fail_in_one_line("the training failed", "take fewer"):
            learn()

    assert says in read_refusal(capsys, learn_as_program)
    line = read_refusal(capsys, learn_in_a_block)
    assert line.startswith("test: the training failed: ") and says in line
    assert "take fewer" not in line
