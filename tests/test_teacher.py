"""teacher.py: networks, readers of the data files, augmentation, training, resume, export, one-line errors."""

import gzip
import hashlib
import io
import json
import math
import re
import struct
import subprocess
import tarfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import teacher
from kernels.data import FILES, load_dataset, load_digits
from teacher import ARCHS, DATASETS, MD5, Args, augment, fetch, normalise

CHECKPOINT_KEYS = {"arch", "num_classes", "channels", "image_size", "mean", "std", "accuracy", "command"}


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """Messages name the script, checkpoints record the command; no test reaches the network."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("sys.argv", ["teacher.py"])
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def few_digits(monkeypatch):
    """256 training and 64 test digits."""
    splits = {split: load_digits(split) for split in ("train", "test")}

    def few(dataset, data_dir, split):
        n = 256 if split == "train" else 64
        return tuple(t[:n] for t in splits[split])

    monkeypatch.setattr(teacher, "load_dataset", few)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Networks


@pytest.mark.parametrize(
    "arch, count",
    [
        ("lenet5", 62_006),
        ("lenet5_half", 15_888),
        ("resnet8", 75_290),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("wrn_16_1", 175_066),
        ("wrn_16_2", 691_674),
        ("wrn_40_1", 563_930),
        ("wrn_40_2", 2_243_546),
        ("resnet18_cifar", 11_173_962),
        ("resnet34_cifar", 21_282_122),
        ("vgg11_bn", 9_231_114),
    ],
)
def test_parameter_count(arch, count):
    with torch.device("meta"):
        network = ARCHS[arch](num_classes=10, in_channels=3)
    assert sum(p.numel() for p in network.parameters()) == count


GROUPS = {
    "lenet5": [(6, 28, 28), (16, 10, 10)],
    "lenet5_half": [(3, 28, 28), (8, 10, 10)],
    "resnet20": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "resnet18_cifar": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
    "vgg11_bn": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    "wrn_16_1": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    "wrn_40_2": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
}


@pytest.mark.parametrize("arch", GROUPS)
@torch.no_grad()
def test_group_shapes(arch):
    logits, groups = ARCHS[arch](num_classes=7, in_channels=1).forward_groups(torch.zeros(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    assert [tuple(g.shape) for g in groups] == [(2, *shape) for shape in GROUPS[arch]]


@pytest.mark.parametrize("arch, raw", [("wrn_16_1", True), ("lenet5", False), ("resnet8", False)])
def test_groups_and_logits(arch, raw):
    torch.manual_seed(0)
    network, x = ARCHS[arch]().eval(), torch.randn(2, 3, 32, 32)
    logits, groups = network.forward_groups(x)
    assert torch.equal(logits, network(x)) and logits.std() > 0
    for group in groups:  # raw residual sums of a WRN, activations after ReLU elsewhere
        assert (group.min() < 0) == raw and group.max() > 0


# Data


def write_idx(folder, split, images, labels):
    """MNIST's files: big-endian magic number and sizes, then bytes, compressed."""
    (folder / "mnist").mkdir(exist_ok=True)
    for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
        header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
        path = folder / "mnist" / f"{'train' if split == 'train' else 't10k'}-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.numpy().tobytes()))
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_reader(tmp_path, split):
    images, labels = pixels(3, 28, 28), torch.tensor([7, 0, 9], dtype=torch.uint8)
    write_idx(tmp_path, split, images, labels)
    x, y = load_dataset("mnist", str(tmp_path), split)
    assert x.shape == (3, 1, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(x[:, 0, 2:30, 2:30], images)
    assert x.sum() == images.sum()  # the border is zero
    assert y.dtype == torch.int64 and y.tolist() == [7, 0, 9]


def cifar_records(dataset, name):
    """Two records of one file; returns (bytes, images, labels). CIFAR-100 has a coarse label before the fine one."""
    images = pixels(2, 3, 32, 32, seed=len(name) + sum(name.encode()))
    labels = [(11, 3), (4, 99)] if dataset == "cifar100" else [(3,), (9,)]
    data = b"".join(bytes(y) + x.numpy().tobytes() for x, y in zip(images, labels, strict=True))
    return data, images, torch.tensor([y[-1] for y in labels])


def write_cifar(folder, dataset):
    subfolder, train_files, test_files, _ = FILES[dataset]
    (folder / subfolder).mkdir()
    for name in [*train_files, *test_files]:
        (folder / subfolder / name).write_bytes(cifar_records(dataset, name)[0])


def pack_cifar(dataset, extra=()):
    """The official archive with tiny files, as bytes; `extra` names more members."""
    subfolder, train_files, test_files, _ = FILES[dataset]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in [*extra, *(f"{subfolder}/{name}" for name in [*train_files, *test_files])]:
            data = cifar_records(dataset, Path(name).name)[0]
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def assert_tiny_cifar(dataset, folder):
    for split, names in zip(("train", "test"), FILES[dataset][1:3], strict=True):
        x, y = load_dataset(dataset, str(folder), split)
        records = [cifar_records(dataset, name) for name in names]
        assert torch.equal(x, torch.cat([images for _, images, _ in records])) and x.dtype == torch.uint8
        assert torch.equal(y, torch.cat([labels for _, _, labels in records])) and y.dtype == torch.int64


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_reader(tmp_path, dataset):
    write_cifar(tmp_path, dataset)
    assert_tiny_cifar(dataset, tmp_path)


def test_cifar_record_layout(tmp_path):
    """Label, then the red, green and blue plane, each row by row: from the data set's own description."""
    (tmp_path / "cifar-10-batches-bin").mkdir()
    record = bytearray(3073)
    record[0] = 6
    record[1 + 1 * 1024 + 5 * 32 + 9] = 200  # green, row 5, column 9
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(record)
    x, y = load_dataset("cifar10", str(tmp_path), "test")
    assert y.tolist() == [6] and x.nonzero().tolist() == [[0, 1, 5, 9]] and x.max() == 200


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_from_archive(tmp_path, dataset):
    archive = tmp_path / "data" / f"cifar-{dataset[5:]}-binary.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(pack_cifar(dataset, extra=["../outside.bin", "inside.bin"]))
    fetch(dataset, str(archive.parent))
    assert_tiny_cifar(dataset, archive.parent)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {archive.name, *FILES[dataset][1], *FILES[dataset][2]}  # known members only


def test_unpacking_mends_what_is_missing_and_touches_nothing_else(tmp_path):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    mine = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    mine.write_bytes(b"mine")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(pack_cifar("cifar10"))
    fetch("cifar10", str(tmp_path))
    assert len(load_dataset("cifar10", str(tmp_path), "train")[0]) == 10
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("damaged", [False, True])
def test_cifar_download(tmp_path, monkeypatch, capsys, damaged):
    packed, urls = pack_cifar("cifar10"), []

    def urlopen(url, timeout):
        urls.append(url)
        return io.BytesIO(packed[:-1] if damaged else packed)

    monkeypatch.setitem(MD5, "cifar-10-binary.tar.gz", hashlib.md5(packed).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    if damaged:
        assert "expected MD5" in message_of(capsys, lambda: fetch("cifar10", str(tmp_path)))
        assert not list(tmp_path.rglob("*.*"))
    else:
        fetch("cifar10", str(tmp_path))
        assert_tiny_cifar("cifar10", tmp_path)
        assert not list(tmp_path.glob("*.part"))
        fetch("cifar10", str(tmp_path))  # nothing is missing any more
    assert urls == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("damaged", [False, True])
def test_mnist_download(tmp_path, monkeypatch, capsys, damaged):
    images, labels, urls = pixels(3, 28, 28), torch.tensor([7, 0, 9], dtype=torch.uint8), []
    (tmp_path / "official").mkdir()
    for split in ("train", "test"):
        write_idx(tmp_path / "official", split, images, labels)
    official = {path.name: path.read_bytes() for path in (tmp_path / "official" / "mnist").iterdir()}

    def urlopen(url, timeout):
        urls.append(url)
        blob = official[url.rpartition("/")[2]]
        return io.BytesIO(blob[:-1] if damaged else blob)

    for name, blob in official.items():
        monkeypatch.setitem(MD5, name, hashlib.md5(blob).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    folder = tmp_path / "data"
    if damaged:
        assert "expected MD5" in message_of(capsys, lambda: fetch("mnist", str(folder)))
        assert not list(folder.rglob("*.*"))
        return
    fetch("mnist", str(folder))
    assert sorted(urls) == sorted(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}" for name in official)
    (folder / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    fetch("mnist", str(folder))
    assert len(urls) == 5 and urls[-1].endswith("/t10k-labels-idx1-ubyte.gz")  # only what is missing
    for split in ("train", "test"):
        assert load_dataset("mnist", str(folder), split)[1].tolist() == [7, 0, 9]
    assert not list(folder.rglob("*.part"))


def test_digits_split():
    (x, y), (x_test, y_test) = (load_dataset("digits", "", split) for split in ("train", "test"))
    assert x.shape == (1437, 1, 32, 32) and x_test.shape == (360, 1, 32, 32)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == torch.int64
    assert x.min() == 0 and x.max() == 255
    assert y.unique().tolist() == y_test.unique().tolist() == list(range(10))
    assert not {image.numpy().tobytes() for image in x} & {image.numpy().tobytes() for image in x_test}
    assert torch.equal(x, load_dataset("digits", "", "train")[0])  # the same split every time
    z = normalise(x, DATASETS["digits"]["mean"], DATASETS["digits"]["std"])
    assert abs(z.mean()) < 1e-3 and abs(z.std() - 1) < 1e-3


def test_normalise():
    x = pixels(4, 3, 5, 7)
    mean, std = DATASETS["cifar10"]["mean"], DATASETS["cifar10"]["std"]
    exact = (x.numpy() / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    z = normalise(x, mean, std)
    assert z.dtype == torch.float32 and np.abs(z.numpy() - exact).max() < 1e-6


# Augmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_augment_without_padding_and_flip_is_the_identity():
    x = pixels(5, 3, 8, 8)
    y = augment(x, 0, False, generator())
    assert torch.equal(y, x) and y.is_contiguous(memory_format=torch.channels_last)


def test_augment_crop_by_hand(monkeypatch):
    """Zero-padded by 1, then cut from (top, left) = (0, 2) and (2, 1)."""
    x = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]] * 2, dtype=torch.uint8)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([[0, 2], [2, 1]]))
    first, second = augment(x, 1, False, generator()).squeeze(1).tolist()
    assert first == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert second == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]


def all_views(image, pad, flip):
    """Every crop of one padded image (C, H, W), mirrored too where `flip`, as bytes."""
    C, H, W = image.shape
    padded = np.zeros((C, H + 2 * pad, W + 2 * pad), np.uint8)
    padded[:, pad : pad + H, pad : pad + W] = image
    crops = [padded[:, i : i + H, j : j + W] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return {c.tobytes() for c in crops} | {c[:, :, ::-1].tobytes() for c in crops if flip}


@pytest.mark.parametrize("flip", [False, True])
def test_augment_gives_all_views_and_no_others(flip):
    image = pixels(2, 4, 5) // 2 + 1  # no zeros, which are the padding
    seen = {view.numpy().tobytes() for view in augment(image.expand(600, -1, -1, -1), 1, flip, generator())}
    assert seen == all_views(image.numpy(), 1, flip)


def test_augment_flip_alone():
    x = pixels(64, 3, 4, 6)
    y = augment(x, 0, True, generator())
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert torch.equal(torch.where(mirrored[:, None, None, None], x.flip(3), x), y)
    assert 16 < mirrored.sum() < 48


def test_augment_depends_on_the_generator_alone():
    x = pixels(16, 3, 8, 8)
    first = augment(x, 2, True, generator())
    torch.rand(3)
    assert torch.equal(augment(x, 2, True, generator()), first)
    assert not torch.equal(augment(x, 2, True, generator(1)), first)


# Training


def test_evaluate():
    class Brightest(torch.nn.Module):
        """Class 1 for light images, class 0 for dark ones; wrong on everything in training mode."""

        def forward(self, x):
            light = x.mean((1, 2, 3)) > 0
            return torch.nn.functional.one_hot((light ^ self.training).long(), 2).float()

    images = torch.stack([torch.full((1, 4, 4), v, dtype=torch.uint8) for v in (0, 255, 0, 255, 250)])
    model = Brightest()
    for labels, accuracy in (([0, 1, 0, 1, 1], 100.0), ([1, 1, 0, 1, 0], 60.0)):
        assert teacher.evaluate(model, images, torch.tensor(labels), (0.5,), (0.5,), batch_size=2) == accuracy
    assert model.training


def test_smoke_run_and_export(tmp_path):
    """The whole of a run of one epoch, and what its teacher.pt promises."""
    teacher.main(Args(smoke=True, arch="resnet8", device="cpu", out=str(tmp_path / "run")))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = rows_of(tmp_path / "run")
    assert math.isfinite(row["train/loss"]) and row["epoch"] == 1
    assert json.loads((tmp_path / "run" / "args.json").read_text())["epochs"] == 1

    model, saved = teacher.load_export(tmp_path / "run" / "teacher.pt")
    assert set(saved) >= CHECKPOINT_KEYS | {"state_dict"} and not model.training
    assert saved["arch"] == "resnet8" and saved["command"].startswith("python teacher.py")
    assert (saved["num_classes"], saved["channels"], saved["image_size"]) == (10, 1, 32)
    assert saved["mean"] == DATASETS["digits"]["mean"] and saved["std"] == DATASETS["digits"]["std"]
    assert result["accuracy"] == result["teacher_accuracy"] == saved["accuracy"]
    accuracy = teacher.evaluate(model, *load_dataset("digits", "", "test"), saved["mean"], saved["std"])
    assert accuracy == saved["accuracy"]  # of exactly these rounded weights

    for key, value in saved["state_dict"].items():
        if not value.is_floating_point():
            continue
        is_moment_or_scale = "bn" in key
        assert value.dtype == (torch.float32 if is_moment_or_scale else torch.float16), key


@pytest.mark.parametrize("arch", ["lenet5_half", "resnet8", "wrn_16_1", "vgg11_bn"])
def test_export_round_trip(tmp_path, arch):
    torch.manual_seed(0)
    model = ARCHS[arch](num_classes=10, in_channels=3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(len(buffer)) + 1e-4)
    rounded = teacher.exported(model)
    n_layers = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert sum(v.dtype == torch.float32 for v in rounded.values()) == 4 * n_layers  # scale, shift and both moments
    assert all(torch.equal(rounded[k], v) for k, v in model.named_buffers())  # the moments are not rounded
    teacher.atomic_save(dict(arch=arch, num_classes=10, channels=3, state_dict=rounded), tmp_path / "teacher.pt")
    loaded, _ = teacher.load_export(tmp_path / "teacher.pt")
    model.load_state_dict(rounded)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pt"]


def test_evaluate_option(tmp_path, capsys, few_digits):
    args = dict(arch="lenet5", epochs=1, lr=0.05, device="cpu")
    teacher.main(Args(out=str(tmp_path / "run"), **args))
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"]
    capsys.readouterr()
    teacher.main(Args(evaluate=str(tmp_path / "run" / "teacher.pt"), device="cpu"))
    assert capsys.readouterr().out == f"{accuracy:.2f} %\n"


def test_training_lowers_the_loss(tmp_path):
    teacher.main(Args(arch="lenet5", epochs=4, batch_size=32, lr=0.05, device="cpu", out=str(tmp_path)))
    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 70


class Cut(BaseException):
    """Stands for a power cut."""


def test_resume_is_bit_equal(tmp_path, monkeypatch, few_digits):
    """Cut right after the first checkpoint, and right before the second, whose row of figures is then void."""
    args = dict(arch="resnet8", epochs=2, batch_size=64, device="cpu")
    teacher.main(Args(out=str(tmp_path / "straight"), **args))
    save = teacher.atomic_save
    for n_rows, name in enumerate(("after-first", "before-second"), 1):
        saved = []

        def save_or_stop(state, path, name=name, saved=saved):
            if saved:
                raise Cut
            save(state, path)
            saved.append(path)
            if name == "after-first":
                raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(teacher, "atomic_save", save_or_stop)
            with pytest.raises(Cut):
                teacher.main(Args(out=str(tmp_path / name), **args))
        assert len(rows_of(tmp_path / name)) == n_rows and not (tmp_path / name / "teacher.pt").exists()
        torch.rand(5)  # nothing may depend on the global stream
        teacher.main(Args(out=str(tmp_path / name), resume=True, **args))

    def outcome(name):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / name)]
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"], rows

    state, rows = outcome("straight")
    for name in ("after-first", "before-second"):
        resumed_state, resumed_rows = outcome(name)
        assert state.keys() == resumed_state.keys()
        for key, value in state.items():
            assert torch.equal(value, resumed_state[key]), f"{name}: {key}"
        assert resumed_rows == rows, name


def test_a_new_run_starts_a_new_record(tmp_path, few_digits):
    for _ in range(2):
        teacher.main(Args(arch="lenet5", epochs=1, lr=0.05, device="cpu", out=str(tmp_path)))
    assert len(rows_of(tmp_path)) == 1


def test_resume_never_takes_another_run(tmp_path, monkeypatch, few_digits):
    """A finished run, then another one in its folder, cut before its first checkpoint: nothing to resume."""
    args = dict(arch="lenet5", epochs=1, lr=0.05, device="cpu", out=str(tmp_path))
    teacher.main(Args(**args))

    def cut(*args):
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "train_epoch", cut)
        with pytest.raises(Cut):
            teacher.main(Args(seed=1, **args))
    teacher.main(Args(seed=1, resume=True, **args))
    resumed = torch.load(tmp_path / "teacher.pt", weights_only=True)["state_dict"]
    teacher.main(Args(seed=1, **args))
    straight = torch.load(tmp_path / "teacher.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())


def test_the_loop_rarely_waits_for_the_device(monkeypatch, few_digits):
    """Where no bar is shown, the figures are fetched once, at the end of the epoch."""
    fetched = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: fetched.append(1) or item(self))
    model = ARCHS["lenet5"](in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    images, labels = teacher.load_dataset("digits", "", "train")
    settings = SimpleNamespace(batch_size=16)
    with tqdm(disable=True) as bar:
        teacher.train_epoch(model, optimizer, schedule, images, labels, DATASETS["digits"], generator(), settings, bar)
    assert len(fetched) <= 4  # of 16 steps


def test_result_is_written_without_git(tmp_path, monkeypatch, few_digits):
    def no_git(command, *args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", command[0])

    monkeypatch.setattr(subprocess, "run", no_git)
    teacher.main(Args(arch="lenet5", epochs=1, lr=0.05, device="cpu", out=str(tmp_path)))
    assert json.loads((tmp_path / "result.json").read_text())["versions"]["commit"] == "unknown"


def test_ship(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "__file__", str(tmp_path / "teacher.py"))
    for name in ("b", "a"):
        saved = dict(arch="lenet5", accuracy=12.5, command="python teacher.py", state_dict={"w": torch.ones(2)})
        teacher.atomic_save(saved, tmp_path / "teacher.pt")
        teacher.ship(tmp_path / "teacher.pt", name)
    index = json.loads((tmp_path / "teachers" / "index.json").read_text())
    assert list(index) == ["a", "b"]
    for name, entry in index.items():
        blob = (tmp_path / "teachers" / f"{name}.pt").read_bytes()
        assert entry.pop("sha256") == hashlib.sha256(blob).hexdigest()
        assert entry == dict(arch="lenet5", accuracy=12.5, command="python teacher.py")


# Errors: exit code 2 and one line


def message_of(capsys, call):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("teacher.py: ")
    return lines[0]


@pytest.mark.parametrize(
    "settings, expected",
    [
        pytest.param(dict(dataset="imagenette"), "--dataset: expected one of digits", id="dataset"),
        pytest.param(dict(arch="resnet21"), "--arch: expected one of lenet5", id="arch"),
        pytest.param(dict(epochs=0), "--epochs: expected a positive number, got 0", id="epochs"),
        pytest.param(dict(batch_size=-1), "--batch-size", id="batch-size"),
        pytest.param(dict(batch_size=2000), "--batch-size", id="batch-larger-than-data"),
        pytest.param(dict(lr=0.0), "--lr", id="lr"),
        pytest.param(dict(momentum=0.0), "--momentum", id="momentum"),
        pytest.param(dict(weight_decay=-1.0), "--weight-decay", id="weight-decay"),
        pytest.param(dict(device="gpu"), "--device", id="device"),
        pytest.param(dict(dataset="mnist"), "cannot be fetched", id="mnist-offline"),
        pytest.param(dict(dataset="cifar10"), "cannot be fetched", id="cifar-offline"),
        pytest.param(dict(evaluate="absent.pt"), "absent.pt: not a checkpoint", id="evaluate-absent"),
    ],
)
def test_bad_settings(tmp_path, capsys, settings, expected):
    args = Args(**{"device": "cpu", "data_dir": str(tmp_path / "data"), "out": str(tmp_path / "run"), **settings})
    assert expected in message_of(capsys, lambda: teacher.main(args))


def test_device_without_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in message_of(capsys, lambda: teacher.main(Args(device="cuda")))


def test_data_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "data").write_text("")
    for dataset in ("mnist", "cifar10"):
        args = Args(dataset=dataset, data_dir=str(tmp_path / "data"), out=str(tmp_path / "run"), device="cpu")
        assert "cannot be fetched" in message_of(capsys, lambda args=args: teacher.main(args))


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named_and_never_fetched(tmp_path, capsys, monkeypatch, dataset, split):
    """The method scripts read only: the line says what fetches, and where to."""
    monkeypatch.setattr(teacher, "download", None)
    for folder in ("absent", "file", "partly"):
        (tmp_path / "file").write_text("")
        (tmp_path / "partly" / FILES[dataset][0]).mkdir(parents=True, exist_ok=True)
        if dataset == "mnist":
            write_idx(tmp_path / "partly", split, pixels(3, 28, 28), torch.zeros(3, dtype=torch.uint8)).unlink()
        where = str(tmp_path / folder)
        message = message_of(capsys, lambda where=where: load_dataset(dataset, where, split))
        name = FILES[dataset][1 if split == "train" else 2][1 if (dataset, folder) == ("mnist", "partly") else 0]
        assert f"{tmp_path / folder / FILES[dataset][0] / name} cannot be read" in message
        assert f"python teacher.py --dataset {dataset} --data-dir {where} fetches what is missing" in message


DAMAGE = {  # what becomes of a file's bytes `x`, and of its content: header of h bytes, items of n
    "cut": lambda x, h, n: x[:-20],
    "no-gzip": lambda x, h, n: b"<html>",
    "flipped-byte": lambda x, h, n: x[:10] + bytes([x[10] ^ 0x06]) + x[11:],  # type of the first compressed block
    "empty": lambda x, h, n: b"",
    "too-short": lambda x, h, n: gzip.compress(gzip.decompress(x)[:-7]),
    "one-item-less": lambda x, h, n: gzip.compress(gzip.decompress(x)[:-n]),
    "one-item-more": lambda x, h, n: gzip.compress(gzip.decompress(x) + bytes(n)),
    "header-only": lambda x, h, n: gzip.compress(gzip.decompress(x)[:h]),
    "half-a-header": lambda x, h, n: gzip.compress(gzip.decompress(x)[: h // 2]),
}


@pytest.mark.parametrize("kind, header, item", [("images-idx3", 16, 784), ("labels-idx1", 8, 1)])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_mnist(tmp_path, capsys, damage, kind, header, item):
    images, labels = pixels(40, 28, 28), torch.zeros(40, dtype=torch.uint8)
    write_idx(tmp_path, "test", images, labels)
    path = tmp_path / "mnist" / f"t10k-{kind}-ubyte.gz"
    path.write_bytes(DAMAGE[damage](path.read_bytes(), header, item))
    message = message_of(capsys, lambda: load_dataset("mnist", str(tmp_path), "test"))
    if damage.startswith("one-item") or (damage == "too-short" and item == 1):  # either file may be the wrong one
        found = {"one-item-less": 39, "one-item-more": 41, "too-short": 33}[damage]
        expected = f"{found} labels of 40 images" if item == 1 else f"40 labels of {found} images"
        assert str(tmp_path / "mnist") in message and expected in message
    else:
        assert f"{path} cannot be read" in message


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_damaged_cifar(tmp_path, capsys, dataset):
    write_cifar(tmp_path, dataset)
    folder, _, (name,), _ = FILES[dataset]
    path = tmp_path / folder / name
    for blob in (path.read_bytes()[:-1], path.read_bytes() + b"x", b""):
        path.write_bytes(blob)
        assert f"{path} cannot be read" in message_of(capsys, lambda: load_dataset(dataset, str(tmp_path), "test"))


def test_sizes_are_those_of_each_file(tmp_path, capsys):
    """A byte lost in one file and won in the next would shift all records in between."""
    write_cifar(tmp_path, "cifar10")
    first, second = (tmp_path / "cifar-10-batches-bin" / f"data_batch_{i}.bin" for i in (1, 2))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"x" + second.read_bytes())
    message = message_of(capsys, lambda: load_dataset("cifar10", str(tmp_path), "train"))
    assert f"{first} cannot be read" in message


def test_damaged_data_stop_a_run_before_it_writes(tmp_path, capsys):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").write_bytes(b"<html>")
    args = Args(dataset="cifar10", data_dir=str(tmp_path), out=str(tmp_path / "run"), device="cpu")
    assert "data_batch_4.bin cannot be read" in message_of(capsys, lambda: teacher.main(args))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "no-archive", "other-archive", "folders", "file-in-the-way"])
def test_damaged_archive(tmp_path, capsys, damage):
    changed = {"cut": pack_cifar("cifar10")[:-4000], "no-archive": b"<html>", "other-archive": pack_cifar("cifar100")}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    changed |= {"folders": packed.getvalue(), "file-in-the-way": pack_cifar("cifar10")}
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(changed[damage])
    if damage == "file-in-the-way":
        (tmp_path / "cifar-10-batches-bin").write_text("")
    message = message_of(capsys, lambda: fetch("cifar10", str(tmp_path)))
    assert "cifar-10-binary.tar.gz" in message


@pytest.mark.parametrize("content", [b"no checkpoint", b"", "another-dict", "tensor", "folder"])
def test_unreadable_checkpoint(tmp_path, capsys, content):
    path = tmp_path / "teacher.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    else:
        torch.save({"epoch": 3} if content == "another-dict" else torch.ones(2), path)
    args = Args(evaluate=str(path), device="cpu")
    assert f"{path}: not a checkpoint of teacher.py" in message_of(capsys, lambda: teacher.main(args))


def test_checkpoint_that_would_run_code(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"arch": Hostile()}, tmp_path / "teacher.pt")
    args = Args(evaluate=str(tmp_path / "teacher.pt"), device="cpu")
    assert "not a checkpoint of teacher.py" in message_of(capsys, lambda: teacher.main(args))
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_data_set(tmp_path, capsys):
    state = teacher.exported(ARCHS["lenet5"]())
    saved = dict(arch="lenet5", dataset="cifar10", num_classes=10, channels=3, state_dict=state)
    torch.save(saved, tmp_path / "teacher.pt")
    args = Args(evaluate=str(tmp_path / "teacher.pt"), device="cpu")
    assert "made for cifar10, not for --dataset digits" in message_of(capsys, lambda: teacher.main(args))


def test_out_that_is_a_file(tmp_path, capsys, few_digits):
    (tmp_path / "run").write_text("keep me")
    message = message_of(capsys, lambda: teacher.main(Args(arch="lenet5", device="cpu", out=str(tmp_path / "run"))))
    assert re.search(r"--out .*run: cannot be written", message)
    assert (tmp_path / "run").read_text() == "keep me"


def test_loss_that_is_not_finite(tmp_path, capsys, few_digits):
    args = Args(arch="lenet5", epochs=1, lr=1e9, batch_size=64, device="cpu", out=str(tmp_path / "run"))
    assert "lower --lr" in message_of(capsys, lambda: teacher.main(args))


@pytest.mark.parametrize("state", ["damaged", "another-network"])
def test_resume_from_an_unfit_checkpoint(tmp_path, capsys, few_digits, state):
    args = dict(arch="lenet5", epochs=1, lr=0.05, device="cpu", out=str(tmp_path / "run"))
    teacher.main(Args(**args))
    if state == "damaged":
        (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    else:
        args["arch"] = "lenet5_half"
    assert "--resume" in message_of(capsys, lambda: teacher.main(Args(resume=True, **args)))
