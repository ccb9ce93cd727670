"""teacher.py: data files, downloads, changes of images, training, export, refusals."""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scripts import read_refusal

import teacher
from harness.data import FILES, FOLDERS, evaluate, load_dataset, load_digits, normalise
from harness.known import make_info
from harness.load import load_trained
from harness.networks import NETWORKS
from teacher import Args, crop_and_mirror, fetch_dataset


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("sys.argv", ["teacher.py"])  # checkpoints record the command
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def few_digits(monkeypatch):
    """256 training and 64 test digits."""
    splits = {split: load_digits(split) for split in ("train", "test")}

    def load_few(dataset, data_dir, split):
        n = 256 if split == "train" else 64
        images, labels = splits[split]
        return images[:n], labels[:n]

    monkeypatch.setattr(teacher, "load_dataset", load_few)


def train_briefly(out, **options):
    """A run of one epoch of LeNet-5; returns its result.json."""
    options = {"arch": "lenet5", "epochs": 1, "lr": 0.05, "device": "cpu", **options}
    teacher.main(Args(out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def read_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def random_pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Data files

MNIST_LABELS = torch.tensor([7, 0, 9], dtype=torch.uint8)


def write_idx(folder, split, images, labels):
    """Two of MNIST's files: magic number and sizes as big-endian integers, then bytes; gzipped."""
    paths = []
    for name, magic, array in zip(
        FILES["mnist"][split], (2051, 2049), (images, labels), strict=True
    ):
        header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
        path = folder / "mnist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(header + array.numpy().tobytes()))
        paths.append(path)
    return paths


def make_records(dataset, name):
    """Two records of a CIFAR file: the file's bytes, images and labels.

    CIFAR-100 has a coarse label before the fine one, which counts.
    """
    images = random_pixels(2, 3, 32, 32, seed=sum(name.encode()))
    labels = [(11, 3), (4, 99)] if dataset == "cifar100" else [(3,), (9,)]
    records = [bytes(y) + x.numpy().tobytes() for x, y in zip(images, labels, strict=True)]
    return b"".join(records), images, torch.tensor([y[-1] for y in labels])


def list_cifar_files(dataset):
    return [*FILES[dataset]["train"], *FILES[dataset]["test"]]


def write_cifar(data_dir, dataset):
    folder = data_dir / FOLDERS[dataset]
    folder.mkdir()
    for name in list_cifar_files(dataset):
        (folder / name).write_bytes(make_records(dataset, name)[0])
    return folder


def assert_whole_cifar(dataset, data_dir):
    """Both splits hold the records of make_records, in the files' order."""
    for split in ("train", "test"):
        images, labels = load_dataset(dataset, str(data_dir), split)
        records = [make_records(dataset, name) for name in FILES[dataset][split]]
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images, torch.cat([x for _, x, _ in records]))
        assert torch.equal(labels, torch.cat([y for _, _, y in records]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_read_and_padded_to_32_pixels(tmp_path, split):
    pixels = random_pixels(3, 28, 28)
    write_idx(tmp_path, split, pixels, MNIST_LABELS)
    images, labels = load_dataset("mnist", str(tmp_path), split)
    assert images.shape == (3, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 2:30, 2:30], pixels)
    assert images.sum() == pixels.sum()  # the border is zero
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 0, 9]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_read_file_by_file(tmp_path, dataset):
    write_cifar(tmp_path, dataset)
    assert_whole_cifar(dataset, tmp_path)


def test_a_cifar_record_is_a_label_and_three_planes_of_rows(tmp_path):
    record = bytearray(3073)
    record[0] = 6
    record[1 + 1 * 1024 + 5 * 32 + 9] = 200  # green, row 5, column 9
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(record)
    images, labels = load_dataset("cifar10", str(tmp_path), "test")
    assert labels.tolist() == [6]
    assert images.nonzero().tolist() == [[0, 1, 5, 9]]
    assert images.max() == 200


def test_digits_are_split_once_and_have_the_moments_that_they_are_normalised_with():
    images, labels = load_dataset("digits", "", "train")
    test_images, test_labels = load_dataset("digits", "", "test")
    assert images.shape == (1437, 1, 32, 32)
    assert test_images.shape == (360, 1, 32, 32)
    assert labels.unique().tolist() == test_labels.unique().tolist() == list(range(10))
    assert (images.min(), images.max()) == (0, 255)
    shown = {image.numpy().tobytes() for image in images}
    assert not shown & {image.numpy().tobytes() for image in test_images}
    assert torch.equal(images, load_dataset("digits", "", "train")[0])

    x = normalise(images, make_info("digits", teacher.PIXELS["digits"]))
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path, capsys, dataset, split):
    message = read_refusal(capsys, load_dataset, dataset, str(tmp_path), split)
    assert f"{tmp_path / FOLDERS[dataset]} cannot be read" in message
    assert FILES[dataset][split][0] in message
    assert f"python teacher.py --dataset {dataset} --data-dir {tmp_path} fetches" in message


@pytest.mark.parametrize("kind", [0, 1], ids=["images", "labels"])
@pytest.mark.parametrize("damage", ["cut", "no gzip", "empty", "header", "one less"])
def test_a_damaged_mnist_file_is_refused(tmp_path, capsys, damage, kind):
    labels = torch.zeros(40, dtype=torch.uint8)
    path = write_idx(tmp_path, "test", random_pixels(40, 28, 28), labels)[kind]
    header, size = [(16, 784), (8, 1)][kind]
    packed = path.read_bytes()
    content = gzip.decompress(packed)
    damaged = {
        "cut": packed[:-20],
        "no gzip": b"<html>",
        "empty": b"",
        "header": gzip.compress(content[:header]),
        "one less": gzip.compress(content[:-size]),
    }
    path.write_bytes(damaged[damage])
    message = read_refusal(capsys, load_dataset, "mnist", str(tmp_path), "test")
    assert f"{tmp_path / 'mnist'} cannot be read" in message
    if damage == "one less":
        shapes = ["(40, 28, 28)", "(40,)"]
        assert f"its header says {shapes[kind]}" in message


def test_mnist_files_of_other_sizes_are_refused(tmp_path, capsys):
    labels = torch.zeros(40, dtype=torch.uint8)
    write_idx(tmp_path, "test", random_pixels(39, 28, 28), labels)
    message = read_refusal(capsys, load_dataset, "mnist", str(tmp_path), "test")
    assert "40 labels of 39 images" in message
    write_idx(tmp_path, "test", random_pixels(160, 14, 14), labels)
    message = read_refusal(capsys, load_dataset, "mnist", str(tmp_path), "test")
    assert "its header says (160, 14, 14)" in message


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("size", [0, 1, 3072, 6147])
def test_a_cifar_file_of_a_wrong_size_is_named(tmp_path, capsys, dataset, size):
    folder = write_cifar(tmp_path, dataset)
    name = FILES[dataset]["train"][-1]
    (folder / name).write_bytes(bytes(size))
    message = read_refusal(capsys, load_dataset, dataset, str(tmp_path), "train")
    assert f"{name}: expected records of" in message
    assert f"got {size} bytes" in message


@pytest.mark.parametrize(("dataset", "last"), [("mnist", 9), ("cifar10", 9), ("cifar100", 99)])
def test_labels_that_are_no_class_are_refused(tmp_path, capsys, dataset, last):
    if dataset == "mnist":
        labels = torch.tensor([0, last + 1], dtype=torch.uint8)
        write_idx(tmp_path, "test", random_pixels(2, 28, 28), labels)
    else:
        folder = write_cifar(tmp_path, dataset)
        n_labels = 2 if dataset == "cifar100" else 1
        record = bytearray(n_labels + 3072)
        record[n_labels - 1] = last + 1
        (folder / FILES[dataset]["test"][0]).write_bytes(record)
    message = read_refusal(capsys, load_dataset, dataset, str(tmp_path), "test")
    assert f"expected labels from 0 to {last}, got {last + 1}" in message


# Downloads


def pack_cifar(dataset, others=()):
    """The bytes of the official archive with tiny files, and with `others` as unknown members."""
    packed = io.BytesIO()
    wanted = [f"{FOLDERS[dataset]}/{name}" for name in list_cifar_files(dataset)]
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in [*others, *wanted]:
            content = make_records(dataset, path.rpartition("/")[2])[0]
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """serve({name: bytes}, damaged) stands for the official servers; it returns their requests."""

    def start(official, damaged=False):
        urls = []

        def urlopen(url, timeout):
            urls.append(url)
            content = official[url.rpartition("/")[2]]
            return io.BytesIO(content[:-1] if damaged else content)

        for name, content in official.items():
            monkeypatch.setitem(teacher.MD5, name, hashlib.md5(content).hexdigest())
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return urls

    return start


def test_mnist_is_downloaded_as_far_as_it_is_missing(tmp_path, serve):
    official = {}
    for split in ("train", "test"):
        for path in write_idx(tmp_path / "server", split, random_pixels(3, 28, 28), MNIST_LABELS):
            official[path.name] = path.read_bytes()
    urls = serve(official)
    data_dir = str(tmp_path / "data")
    fetch_dataset("mnist", data_dir)
    address = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    assert sorted(urls) == sorted(address + name for name in official)
    for split in ("train", "test"):
        assert load_dataset("mnist", data_dir, split)[1].tolist() == [7, 0, 9]

    (tmp_path / "data/mnist/t10k-labels-idx1-ubyte.gz").unlink()
    fetch_dataset("mnist", data_dir)
    assert urls[4:] == [address + "t10k-labels-idx1-ubyte.gz"]
    assert {path.name for path in (tmp_path / "data/mnist").iterdir()} == set(official)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifars_archive_is_downloaded_and_only_its_known_members_unpacked(tmp_path, serve, dataset):
    archive = f"cifar-{dataset[5:]}-binary.tar.gz"
    urls = serve({archive: pack_cifar(dataset, others=["../outside.bin", "inside.bin"])})
    data_dir = tmp_path / "data"
    fetch_dataset(dataset, str(data_dir))
    assert_whole_cifar(dataset, data_dir)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {archive, *list_cifar_files(dataset)}

    fetch_dataset(dataset, str(data_dir))  # nothing is missing any more
    assert urls == ["https://www.cs.toronto.edu/~kriz/" + archive]


def test_a_download_with_another_md5_is_refused_and_not_kept(tmp_path, capsys, serve):
    serve({"cifar-10-binary.tar.gz": pack_cifar("cifar10")}, damaged=True)
    message = read_refusal(capsys, fetch_dataset, "cifar10", str(tmp_path))
    assert "expected MD5" in message
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_refusal_names_address_and_place(tmp_path, capsys):
    args = Args(dataset="mnist", data_dir=str(tmp_path), out=str(tmp_path / "run"))
    message = read_refusal(capsys, teacher.main, args)
    assert "https://ossci-datasets.s3.amazonaws.com/mnist/train-images" in message
    assert "cannot be fetched: OSError: no network" in message
    assert f"download it by hand to {tmp_path}/mnist/train-images" in message


def test_a_damaged_archive_is_refused(tmp_path, capsys):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(pack_cifar("cifar10")[:-4000])
    message = read_refusal(capsys, fetch_dataset, "cifar10", str(tmp_path))
    assert "cifar-10-binary.tar.gz cannot be unpacked" in message


# Changes of images


def test_without_padding_and_mirroring_an_image_stays_as_it_is():
    images = random_pixels(5, 3, 8, 8)
    changed = crop_and_mirror(images, 0, False, seeded())
    assert torch.equal(changed, images)
    assert changed.is_contiguous(memory_format=torch.channels_last)


def list_views(image, padding, mirror):
    """Every crop of one padded image (C, H, W), mirrored too if asked for, as bytes."""
    C, H, W = image.shape
    padded = np.zeros((C, H + 2 * padding, W + 2 * padding), np.uint8)
    padded[:, padding : padding + H, padding : padding + W] = image
    views = set()
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + H, left : left + W]
            views.add(crop.tobytes())
            if mirror:
                views.add(crop[:, :, ::-1].tobytes())
    return views


@pytest.mark.parametrize("mirror", [False, True])
def test_all_crops_occur_and_no_others(mirror):
    image = random_pixels(2, 4, 5) // 2 + 1  # no zeros, which are the padding
    changed = crop_and_mirror(image.expand(600, -1, -1, -1), 1, mirror, seeded())
    seen = {view.numpy().tobytes() for view in changed}
    assert seen == list_views(image.numpy(), 1, mirror)


def test_half_of_the_images_are_mirrored():
    images = random_pixels(400, 3, 4, 6)
    changed = crop_and_mirror(images, 0, True, seeded())
    is_mirrored = (changed == images.flip(3)).flatten(1).all(1)
    is_same = (changed == images).flatten(1).all(1)
    assert (is_mirrored ^ is_same).all()
    assert 150 < is_mirrored.sum() < 250


def test_changes_depend_on_the_generator_alone():
    images = random_pixels(16, 3, 8, 8)
    first = crop_and_mirror(images, 2, True, seeded())
    torch.rand(3)
    assert torch.equal(crop_and_mirror(images, 2, True, seeded()), first)
    assert not torch.equal(crop_and_mirror(images, 2, True, seeded(1)), first)


# Training


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    args = Args(lr=0.5, warmup=0.2)
    rates = [teacher.compute_lr(step, 100, args) for step in range(101)]
    assert rates[0] == pytest.approx(0.5 / 20)
    assert rates[9] == pytest.approx(0.25)
    assert rates[19] == max(rates) == 0.5
    assert rates[60] == pytest.approx(0.25)
    assert rates[100] == 0


@pytest.mark.parametrize(("warmup", "first", "last"), [(0, 0.5, 0.05), (1, 0.05, 0.5)])
def test_the_rise_may_take_no_step_or_all(warmup, first, last):
    args = Args(lr=0.5, warmup=warmup)
    rates = [teacher.compute_lr(step, 10, args) for step in range(10)]
    assert rates[0] == pytest.approx(first, rel=0.12)
    assert rates[9] == pytest.approx(last, rel=0.12)
    assert max(rates) == 0.5


def test_steps_are_those_of_nesterov_on_shuffled_and_cropped_batches(tmp_path, few_digits):
    train_briefly(tmp_path, epochs=2, batch_size=100, seed=3)
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["network"]

    torch.manual_seed(3)
    info = make_info("lenet5", teacher.PIXELS["digits"])
    network = NETWORKS["lenet5"](num_classes=10, in_channels=1)
    images, labels = teacher.load_dataset("digits", "", "train")
    generator = seeded(3)
    momenta = [torch.zeros_like(p) for p in network.parameters()]
    rates = [0.05, 0.05, 0.05 * 2 / 3, 0.05 / 3]  # four steps, of which one is the rise
    for epoch in range(2):
        order = torch.randperm(256, generator=generator)
        for batch in range(2):  # the last 56 images are left out
            chosen = order[100 * batch : 100 * (batch + 1)]
            x = normalise(crop_and_mirror(images[chosen], 2, False, generator), info)
            network.zero_grad()
            F.cross_entropy(network(x), labels[chosen]).backward()
            with torch.no_grad():
                for p, momentum in zip(network.parameters(), momenta, strict=True):
                    gradient = p.grad + 5e-4 * p
                    momentum.mul_(0.9).add_(gradient)
                    p -= rates[2 * epoch + batch] * (gradient + 0.9 * momentum)
    for name, value in network.state_dict().items():
        assert torch.allclose(trained[name], value, atol=1e-6), name


def test_training_lowers_the_loss_and_teaches_digits(tmp_path):
    result = train_briefly(tmp_path, epochs=5, batch_size=32)
    rows = read_rows(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert rows[-1]["train/acc"] > 80
    assert result["accuracy"] > 80

    figures = {"epoch", "train/loss", "train/acc", "lr"}
    assert all(set(row) == figures for row in rows[:4])
    assert set(rows[4]) == figures | {"eval/acc"}  # every fifth epoch
    assert rows[-1]["lr"] == 0
    assert abs(rows[-1]["eval/acc"] - result["accuracy"]) < 1  # before rounding and after


def test_the_host_waits_for_the_device_once_an_epoch_not_once_a_step(
    tmp_path, monkeypatch, few_digits
):
    fetched = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: fetched.append(1) or item(x))
    train_briefly(tmp_path / "large", batch_size=128)  # 2 steps
    n_large = len(fetched)
    train_briefly(tmp_path / "small", batch_size=16)  # 16 steps
    assert len(fetched) - n_large == n_large


def test_a_diverging_run_is_refused_and_leaves_no_teacher(tmp_path, capsys, few_digits):
    args = Args(arch="lenet5", epochs=1, lr=1e9, device="cpu", out=str(tmp_path / "run"))
    assert "not finite" in read_refusal(capsys, teacher.main, args)
    assert not (tmp_path / "run/teacher.pt").exists()


# Export


def test_a_teacher_describes_itself_and_has_the_accuracy_of_its_rounded_weights(tmp_path):
    teacher.main(Args(smoke=True, device="cpu", data_note="a note", out=str(tmp_path)))
    result = json.loads((tmp_path / "result.json").read_text())
    saved = torch.load(tmp_path / "teacher.pt", weights_only=True)
    state = saved.pop("state_dict")
    keys = ["format", "arch", "dataset", "data", "command", "num_classes", "channels"]
    keys += ["image_size", "mean", "std", "accuracy", "seed", "seconds", "versions"]
    assert list(saved) == keys
    assert (saved["arch"], saved["dataset"], saved["data"]) == ("resnet8", "digits", "a note")
    assert (saved["num_classes"], saved["channels"], saved["image_size"]) == (10, 1, 32)
    assert (saved["mean"], saved["std"]) == ((0.3054,), (0.3237,))
    assert saved["command"].startswith("python teacher.py")
    assert saved["accuracy"] == result["accuracy"] == result["teacher_accuracy"]
    for name, value in state.items():
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if "bn" in name else torch.float16), name

    network, info = load_trained(str(tmp_path / "teacher.pt"), "cpu", "")
    assert evaluate(network, *load_dataset("digits", "", "test"), info) == saved["accuracy"]
    assert len(read_rows(tmp_path)) == 1  # --smoke


def test_the_accuracy_is_that_of_the_weights_in_the_file(tmp_path, monkeypatch, few_digits):
    def round_to_zero(network):
        return {name: torch.zeros_like(value) for name, value in network.state_dict().items()}

    monkeypatch.setattr(teacher, "round_weights", round_to_zero)
    result = train_briefly(tmp_path, epochs=2, batch_size=16)
    labels = teacher.load_dataset("digits", "", "test")[1]
    n_zeros = (labels == 0).sum().item()  # equal logits mean class 0
    assert result["accuracy"] == 100 * n_zeros / len(labels)
    assert read_rows(tmp_path)[-1]["train/acc"] > result["accuracy"] + 10


@pytest.mark.parametrize("arch", ["lenet5_half", "resnet8", "resnet18_cifar", "wrn_16_1"])
def test_rounding_leaves_batchnorm_as_it_is(arch):
    network = NETWORKS[arch](num_classes=10, in_channels=3)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    rounded = teacher.round_weights(network)
    state = network.state_dict()
    assert list(rounded) == list(state)

    batchnorms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    unrounded = [name for name in state if rounded[name].dtype == torch.float32]
    assert len(unrounded) == 4 * len(batchnorms)  # scale, shift and both moments
    for name, value in state.items():
        if value.is_floating_point() and name not in unrounded:
            value = value.half()
        assert torch.equal(rounded[name], value), name
    network.load_state_dict(rounded)


def test_shipped_teachers_are_listed_by_name_with_their_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "ROOT", tmp_path)
    description = dict(arch="lenet5", accuracy=12.5, command="python teacher.py")
    torch.save(dict(description, state_dict={"w": torch.ones(2)}), tmp_path / "teacher.pt")
    for name in ("b", "a"):
        teacher.ship(tmp_path / "teacher.pt", name)
    index = json.loads((tmp_path / "teachers/index.json").read_text())
    assert list(index) == ["a", "b"]
    blob = (tmp_path / "teacher.pt").read_bytes()
    for name, entry in index.items():
        assert (tmp_path / f"teachers/{name}.pt").read_bytes() == blob
        assert entry == dict(sha256=hashlib.sha256(blob).hexdigest(), **description)


def test_a_teacher_is_measured_and_exported_later(tmp_path, monkeypatch, capsys, few_digits):
    monkeypatch.setattr(teacher, "ROOT", tmp_path)
    result = train_briefly(tmp_path / "run")
    path = tmp_path / "run/teacher.pt"
    capsys.readouterr()
    teacher.main(Args(evaluate=str(path), export="later", device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{result['accuracy']:.2f} % of digits"
    assert (tmp_path / "teachers/later.pt").read_bytes() == path.read_bytes()

    train_briefly(tmp_path / "run", export="at-once")
    index = json.loads((tmp_path / "teachers/index.json").read_text())
    assert set(index) == {"later", "at-once"}
    assert index["later"]["accuracy"] == result["accuracy"]


def test_a_teacher_of_another_data_set_is_not_measured(tmp_path, capsys):
    state = NETWORKS["lenet5"]().state_dict()
    saved = dict(arch="lenet5", dataset="cifar10", num_classes=10, state_dict=state)
    torch.save(saved, tmp_path / "teacher.pt")
    args = Args(evaluate=str(tmp_path / "teacher.pt"), device="cpu")
    assert "made for cifar10, not for digits" in read_refusal(capsys, teacher.main, args)


@pytest.mark.parametrize("saved", [None, {"epoch": 3}, {"arch": "lenet5", "state_dict": {}}])
def test_what_is_no_teacher_is_not_measured(tmp_path, capsys, saved):
    if saved is not None:
        torch.save(saved, tmp_path / "teacher.pt")
    args = Args(evaluate=str(tmp_path / "teacher.pt"), device="cpu")
    assert "teacher.pt" in read_refusal(capsys, teacher.main, args)


def test_a_network_of_some_classes_says_which_and_is_measured_on_them(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = dict(arch="lenet5", epochs=2, batch_size=64, lr=0.05, device="cpu")
    teacher.main(Args(classes=(2, 5, 9), **options))
    path = tmp_path / "runs/teacher/digits-lenet5-2-5-9/teacher.pt"
    saved = torch.load(path, weights_only=True)
    assert (saved["classes"], saved["num_classes"]) == ((2, 5, 9), 3)
    capsys.readouterr()
    teacher.main(Args(evaluate=str(path), device="cpu"))
    assert capsys.readouterr().out == f"{saved['accuracy']:.2f} % of digits\n"

    network, info = load_trained(str(path), "cpu", "")
    images, labels = load_dataset("digits", "", "test")
    n_correct = 0
    for output, k in enumerate((2, 5, 9)):
        chosen = labels == k
        answers = network(normalise(images[chosen], info)).argmax(1)
        n_correct += (answers == output).sum().item()
    n_images = sum((labels == k).sum().item() for k in (2, 5, 9))
    assert saved["accuracy"] == pytest.approx(100 * n_correct / n_images)
    assert saved["accuracy"] > 50


def test_images_of_some_classes_are_numbered_from_zero():
    images, labels = load_dataset("digits", "", "test")
    some, numbers = teacher.load_split("digits", (2, 7), "", "test")
    assert torch.equal(some, images[(labels == 2) | (labels == 7)])
    assert numbers.tolist() == [int(y == 7) for y in labels.tolist() if y in (2, 7)]
    assert torch.equal(teacher.load_split("digits", (), "", "test")[1], labels)


# Refusals


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("arch", "resnet21", "--arch: expected one of lenet5"),
        ("arch", "resnet18", "--arch"),  # ImageNet's
        ("epochs", 0, "--epochs: expected at least 1"),
        ("batch_size", 0, "--batch-size"),
        ("lr", 0.0, "--lr: expected a positive number"),
        ("lr", float("nan"), "--lr"),
        ("lr", float("inf"), "--lr"),
        ("warmup", float("nan"), "--warmup"),
        ("warmup", 1.1, "--warmup: expected 0 to 1"),
        ("momentum", 0.0, "--momentum: expected between 0 and 1"),
        ("momentum", 5.0, "--momentum"),
        ("weight_decay", -1.0, "--weight-decay"),
        ("seed", -1, "--seed"),
        ("evaluate", "resnet18", "--evaluate: expected a teacher.pt"),
        ("export", "a/b", "--export: expected a name without folders"),
        ("classes", (3,), "--classes: expected at least 2 different classes in rising order"),
        ("classes", (3, 3), "--classes: expected at least 2 different classes in rising order"),
        ("classes", (4, 3), "--classes: expected at least 2 different classes in rising order"),
        ("classes", (3, 10), "--classes: expected classes of digits, 0 to 9"),
        ("classes", (-1, 3), "--classes: expected classes of digits, 0 to 9"),
    ],
)
def test_options_out_of_range_are_refused(option, value, says):
    with pytest.raises(ValueError, match=says):
        Args(**{option: value})


def test_a_batch_larger_than_the_data_is_refused(tmp_path, capsys, few_digits):
    args = Args(batch_size=257, device="cpu", out=str(tmp_path / "run"))
    message = read_refusal(capsys, teacher.main, args)
    assert "--batch-size: expected at most the 256 training images, got 257" in message
    assert not (tmp_path / "run").exists()


def test_a_run_without_out_lies_in_a_folder_of_its_data_and_network(
    tmp_path, monkeypatch, few_digits
):
    monkeypatch.chdir(tmp_path)
    teacher.main(Args(arch="lenet5", smoke=True, lr=0.05, device="cpu"))
    assert (tmp_path / "runs/teacher/digits-lenet5/teacher.pt").exists()
