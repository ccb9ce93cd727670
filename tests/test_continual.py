"""continual.py: tasks, the grown head, each loss by hand, what is measured, refusals, runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import rows_of
from scripts import read_refusal

import continual
from harness.data import evaluate, load_dataset, normalise
from harness.images import get_image_path, save_images
from harness.known import NetworkInfo
from harness.load import load_teacher
from kernels import _common
from tasks import (
    LabelledImages,
    join_images,
    list_outputs,
    load_task,
    name_dataset,
    parse_tasks,
    repeat_small_sets,
)

DIGITS = replace(
    continual.PRESETS["digits"],
    device="cpu",
    images="noise",
    num_images=20,
    test_images=60,
    epochs=2,
    steps_per_epoch=2,
    batch_size=8,
    lr=1.0,
)
THREE = ("digits:0-4", "digits:5,6", "digits:7-9")
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes."""
    monkeypatch.setattr(_common, "INTERPRET", False)


def run(out, **options):
    """Run the script with small digits settings; its result.json."""
    continual.main(replace(DIGITS, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def load_first():
    return load_teacher(DIGITS, "cpu")


def load_digits_images(info, n=40):
    images, _ = load_dataset("digits", "", "test")
    return normalise(images[:n], info)


def log_of(*probabilities):
    """Logits (1, K) with these softmax probabilities, moved by a constant."""
    return torch.tensor([probabilities]).log() + 3


def draw_logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def describe(channels):
    mean = (0.5,) * channels
    return NetworkInfo("net", "net", "", 2, 32, mean, mean, None)


# Tasks


def test_words_name_tasks():
    tasks = parse_tasks(("cifar10:0-2", "mnist:7,3"))
    assert tasks == [("cifar10", (0, 1, 2)), ("mnist", (7, 3))]
    assert list_outputs(tasks)[2:] == [("cifar10", 2), ("mnist", 7), ("mnist", 3)]


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (("digits:0-4", "digits:4-9"), "do not overlap, got class 4 of digits twice"),
        (("digits:0-4", "digits:6,6"), "do not overlap, got class 6 of digits twice"),
        (("digits:0-4", "digits:5"), "at least 2 of the classes 0 to 9, got 'digits:5'"),
        (("digits:0-4", "digits:9-5"), "at least 2 of the classes 0 to 9, got 'digits:9-5'"),
        (("digits:0-4", "digits:5-10"), "at least 2 of the classes 0 to 9, got 'digits:5-10'"),
        (("digits:0-4",), "the first network's classes, then those of a task"),
        ((), "the first network's classes, then those of a task"),
        (("digits:0-4", "svhn:5-9"), "such as mnist:0-4 or mnist:0,3,8, got 'svhn:5-9'"),
        (("digits:0-4", "5-9"), "got '5-9'"),
        (("digits:0-4", "digits:-1,3"), "got 'digits:-1,3'"),
        (("digits:0-4", "digits:"), "got 'digits:'"),
    ],
)
def test_tasks_that_cannot_be_are_refused(tasks, says):
    with pytest.raises(ValueError, match="--tasks: expected") as error:
        replace(DIGITS, tasks=tasks)
    assert str(error.value).endswith(says)


def test_equal_classes_of_two_data_sets_are_different_classes():
    assert len(parse_tasks(("mnist:0-9", "digits:0-9"))) == 2


@pytest.mark.parametrize(
    ("tasks", "dataset"),
    [
        (("digits:0-4", "digits:5-9"), "digits"),
        (("cifar10:0-9", "mnist:0-9"), "cifar10"),
        (("digits:5-9", "digits:0-4"), ""),
        (("mnist:1,0", "mnist:2,3"), ""),
        (("cifar10:0-4", "mnist:0-9", "cifar10:5-9"), ""),
    ],
)
def test_a_checkpoint_names_a_data_set_only_where_its_labels_are_the_outputs(tasks, dataset):
    assert name_dataset(parse_tasks(tasks)) == dataset


def test_labels_of_a_task_go_on_from_the_classes_before_it():
    tasks = parse_tasks(("digits:0-4", "digits:8,6"))
    images, labels = load_dataset("digits", "", "test")
    found = load_task(tasks, 1, "test", describe(3), DIGITS)
    chosen = (labels == 8) | (labels == 6)
    assert torch.equal(found.labels, torch.where(labels[chosen] == 8, 5, 6))
    assert found.images.shape == (int(chosen.sum()), 3, 32, 32)
    assert torch.equal(found.images[:, 2:], images[chosen])


# The network


def test_new_outputs_leave_old_logits_as_they_are_and_do_not_win():
    old, info = load_first()
    x = load_digits_images(info)
    before = torch.get_rng_state()
    network = continual.add_classes(old, 5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    logits = network(x)
    assert logits.shape == (40, 10) and old(x).shape == (40, 5)
    torch.testing.assert_close(logits[:, :5], old(x))
    labels = load_dataset("digits", "", "test")[1][:40]
    known = labels < 5
    assert torch.equal(logits.argmax(1)[known], labels[known])
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in old.parameters())
    again = continual.add_classes(old, 5, seed=0)
    other = continual.add_classes(old, 5, seed=1)
    assert torch.equal(again.fc.weight, network.fc.weight)
    assert not torch.equal(other.fc.weight[5:], network.fc.weight[5:])


def test_features_are_what_enters_the_last_layer():
    old, info = load_first()
    x = load_digits_images(info)
    logits, features = continual.compute_features(old, x)
    assert features.shape == (40, 64)
    assert torch.equal(old.fc(features), logits) and torch.equal(logits, old(x))
    assert not old.fc._forward_pre_hooks


# Losses

BOTH = pytest.mark.parametrize("fused", [True, False])


@BOTH
def test_first_term_by_hand(fused):
    """P = (1/2, 1/2, 0), Q = (1/8, 1/8, 3/4): 2 * 1/2 * log(4)."""
    args = replace(DIGITS, fused=fused)
    loss = continual.replay_loss(log_of(0.5, 0.5), log_of(1 / 8, 1 / 8, 3 / 4), args)
    assert loss.item() == pytest.approx(2 * LN2, rel=1e-5)


@BOTH
def test_first_term_pushes_new_classes_down_on_inverted_images(fused):
    logits = draw_logits(6, 5).requires_grad_()
    args = replace(DIGITS, fused=fused)
    continual.replay_loss(draw_logits(6, 3, seed=1), logits, args).backward()
    expected = logits.detach().softmax(1)[:, 3:] / 6  # q - p with p = 0, of a mean over 6
    torch.testing.assert_close(logits.grad[:, 3:], expected)


@BOTH
def test_third_term_by_hand_and_over_old_classes_only(fused):
    """P = (1/2, 1/2); the old logits' softmax is Q = (1/4, 3/4) whatever the new logits are."""
    args = replace(DIGITS, fused=fused)
    old_logits = log_of(0.5, 0.5)
    expected = math.log(2) / 2 + math.log(2 / 3) / 2
    for new in (-50.0, 0.0, 50.0):
        logits = F.pad(log_of(0.25, 0.75), (0, 2), value=new).requires_grad_()
        loss = continual.old_class_loss(old_logits, logits, args)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        assert logits.grad[:, 2:].abs().max() == 0
        assert logits.grad[:, :2].abs().min() > 0


@BOTH
def test_lwf_softens_both_by_its_temperature(fused):
    """Logits 2 log(…) at T = 2 give these probabilities; the factor is 4."""
    args = replace(DIGITS, fused=fused)
    old_logits = 2 * log_of(0.5, 0.5)
    logits = F.pad(2 * log_of(0.25, 0.75), (0, 3))
    loss = continual.old_class_loss(old_logits, logits, args, continual.LWF_TEMPERATURE)
    expected = 4 * (math.log(2) / 2 + math.log(2 / 3) / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_binary_loss_by_hand():
    """Targets 3/4, 1/4 (old), 0 and 1 (new) against sigmoids 1/2, 1/2, 1/4, 1/4."""
    logits = torch.tensor([[0.0, 0.0, -math.log(3), -math.log(3)]])
    loss = continual.binary_loss(torch.tensor([[0.75, 0.25]]), logits, torch.tensor([3]))
    expected = 2 * LN2 - math.log(3 / 4) - math.log(1 / 4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_lwf_mc_takes_softmax_of_the_first_network_and_sigmoids_of_its_own(monkeypatch):
    """An old network that sees none of its classes must not claim a new image."""
    old = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(old[1].weight)
    nn.init.constant_(old[1].bias, -5.0)
    network = continual.add_classes(old, 2, seed=0)
    x = torch.randn(3, 1, 2, 2)
    batch = continual.Batch(x, torch.tensor([2, 3, 3]), x[:0], torch.empty(0, dtype=torch.long))
    targets = []
    monkeypatch.setattr(continual, "binary_loss", lambda t, *rest: targets.append(t) or t.sum())
    for number in (1, 2):
        continual.compute_losses("lwf-mc", number, network, old, batch, DIGITS)
    torch.testing.assert_close(targets[0], torch.full((3, 2), 0.5))
    torch.testing.assert_close(targets[1], torch.full((3, 2), 1 / (1 + math.exp(5))))


def test_small_sets_are_drawn_as_often_as_large_ones():
    sets = [LabelledImages(torch.zeros(n, 1), torch.full((n,), n)) for n in (3, 7, 20)]
    joined = join_images(repeat_small_sets(sets))
    assert [int((joined.labels == n).sum()) for n in (3, 7, 20)] == [18, 14, 20]
    alike = [sets[2], LabelledImages(torch.zeros(12, 1), torch.zeros(12))]
    assert repeat_small_sets(alike) == alike


def test_weights_of_classes():
    weights = continual.weigh_classes(torch.tensor([0, 7, 8, 9]), 8, 10)
    assert weights.tolist() == pytest.approx([0.8, 0.8, 0.2, 0.2])


def test_weighted_cross_entropy_by_hand():
    logits = torch.cat((log_of(0.5, 0.5), log_of(0.25, 0.75)))
    weights = torch.tensor([1.0, 3.0])
    loss = continual.weighted_cross_entropy(logits, torch.tensor([1, 0]), weights)
    assert loss.item() == pytest.approx((LN2 + 3 * 2 * LN2) / 2)


def test_feature_loss_by_hand():
    """W = ((1, 2), (0, 3)); features differ by (1, -1): W d = (-1, -3), mean square 5."""
    head = nn.Linear(2, 2)
    head.weight.data = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    features = torch.tensor([[4.0, 5.0]])
    old_features = torch.tensor([[3.0, 6.0]])
    assert continual.feature_loss(old_features, features, head).item() == pytest.approx(5)


def make_batch(arm="deepinversion"):
    """An old network, its copy with 5 more classes and other weights, and a Batch."""
    old, info = load_first()
    network = continual.add_classes(old, 5, seed=0)
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    network.eval()
    x = load_digits_images(info, 10)
    y = torch.tensor([5, 6, 7, 8, 9, 9, 0, 1, 2, 3])
    has_old = arm in (*continual.REPLAYING, "oracle-distill", "oracle-classify")
    n_old = 4 if has_old else 0
    batch = continual.Batch(x[:6], y[:6], x[6 : 6 + n_old], y[6 : 6 + n_old])
    return old, network, batch


def kl(p_logits, q_logits):
    """Written out, batch mean."""
    p = p_logits.softmax(1)
    return (p * (p_logits.log_softmax(1) - q_logits.log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("arm", continual.Arm.__args__)
def test_terms_of_each_arm(arm):
    old, network, batch = make_batch(arm)
    losses = continual.compute_losses(arm, 1, network, old, batch, DIGITS)
    with torch.no_grad():
        new, new_old = network(batch.x_new), old(batch.x_new)
        ce = F.cross_entropy(new, batch.y_new)
        expected = {"ce": ce}
        if arm in continual.REPLAYING or arm.startswith("oracle"):
            replayed, replayed_old = network(batch.x_old), old(batch.x_old)
            p = replayed_old.softmax(1)
            log_ratio = replayed_old.log_softmax(1) - replayed.log_softmax(1)[:, :5]
            replay = (p * log_ratio).sum(1).mean()
        if arm == "lwf":
            expected["old"] = 4 * kl(new_old / 2, new[:, :5] / 2)
        elif arm == "lwf-mc":
            targets = torch.cat((new_old.softmax(1), torch.eye(10)[batch.y_new][:, 5:]), 1)
            log_s = -(1 + (-new.double()).exp()).log()
            binary = -(targets * log_s + (1 - targets) * (log_s - new))  # log(1 - s) = log s - x
            expected = {"binary": binary.sum() / 6}
        elif arm == "deepinversion":
            expected |= {"replay": replay, "old": kl(new_old, new[:, :5])}
        elif arm == "oracle-distill":
            expected["replay"] = replay
        elif arm == "oracle-classify":
            expected["replay"] = F.cross_entropy(replayed, batch.y_old)
        elif arm == "abd":
            # 5 old and 5 new classes: every weight is 1/2
            x = torch.cat((batch.x_new, batch.x_old))
            y = torch.cat((batch.y_new, batch.y_old))
            difference = continual.compute_features(network, x)[1]
            difference = difference - continual.compute_features(old, x)[1]
            distance = (difference @ old.fc.weight.T).square().mean()
            local = F.cross_entropy(new[:, 5:], batch.y_new - 5) / 2
            head = F.cross_entropy(network(x), y) / 2
            expected = {"local": local, "head": head, "features": 0.1 * distance}
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3), name
        assert value > 1e-3, name


def find_reached(network, loss):
    """Names of the parameters in which a loss has a gradient."""
    names = [name for name, _ in network.named_parameters()]
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None and g.any()}


def test_only_the_head_learns_all_classes_in_abd():
    old, network, batch = make_batch("abd")
    losses = continual.compute_losses("abd", 1, network, old, batch, DIGITS)
    assert find_reached(network, losses["head"]) == {"fc.weight", "fc.bias"}
    assert "conv1.weight" in find_reached(network, losses["features"])
    assert not find_reached(network, losses["features"]) & {"fc.weight", "fc.bias"}
    (gradient,) = torch.autograd.grad(losses["local"], [network.fc.weight])
    assert gradient[:5].abs().max() == 0 and gradient[5:].abs().min() > 0


# Learning


def test_the_rate_falls_to_a_fifth_at_the_papers_four_marks():
    args = replace(DIGITS, epochs=3, steps_per_epoch=4, lr=1.0)
    rates = [continual.compute_rate(step, args) for step in range(12)]
    expected = [1] * 4 + [0.2] * 2 + [0.04] * 2 + [0.008] * 2 + [0.0016] * 2
    assert rates == pytest.approx(expected)


def read_state(path):
    return torch.load(path, weights_only=True)["state_dict"]


def list_batchnorm(state):
    return [name for name in state if ".bn" in name or name.startswith("bn")]


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory):
    """The folder of an unbroken run of all arms, and {arm: [Batch of each update, …]}."""
    folder = tmp_path_factory.mktemp("whole")
    batches = {}
    compute_losses = continual.compute_losses

    def watch(arm, number, network, old, batch, args):
        batches.setdefault(arm, []).append(batch)
        return compute_losses(arm, number, network, old, batch, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        patch.setattr(continual, "compute_losses", watch)
        run(folder, arms=continual.Arm.__args__)
    return folder, batches


@pytest.fixture
def whole_run(watched_run):
    return watched_run[0]


@pytest.mark.parametrize("arm", continual.Arm.__args__)
def test_batchnorms_are_frozen_in_all_arms_but_joint(arm, whole_run):
    old, _ = load_first()
    before = old.state_dict()
    after = read_state(whole_run / f"{arm}-task1.pt")
    names = list_batchnorm(before)
    assert len(names) >= 35
    unchanged = [name for name in names if torch.equal(before[name], after[name])]
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    if arm == "joint":
        assert not {"bn1.running_mean", "bn1.running_var", "bn1.weight"} & set(unchanged)
    else:
        assert unchanged == names


def test_all_arms_learn_equally_long_from_equal_batches(watched_run):
    _, batches = watched_run
    for arm in continual.Arm.__args__:
        sizes = [(len(batch.x_new), len(batch.x_old)) for batch in batches[arm]]
        expected = (8, 0)
        if arm == "joint":
            expected = (16, 0)
        elif arm in continual.REPLAYING or arm.startswith("oracle"):
            expected = (8, 8)
        assert sizes == [expected] * 4, arm


def test_oracles_and_joint_see_old_images_and_others_never(watched_run):
    _, batches = watched_run
    old = {0, 1, 2, 3, 4}
    for arm in continual.Arm.__args__:
        y_new = set(torch.cat([batch.y_new for batch in batches[arm]]).tolist())
        y_old = set(torch.cat([batch.y_old for batch in batches[arm]]).tolist())
        assert y_old <= old
        if arm == "joint":
            assert y_new & old and y_new - old
        else:
            assert y_new and not y_new & old
        if arm.startswith("oracle"):
            assert len(y_old) > 2
    assert not torch.equal(batches["abd"][0].x_old, batches["oracle-distill"][0].x_old)


def test_images_are_made_of_each_old_network_anew(tmp_path, monkeypatch):
    asked = []

    def make(args, info, changes):
        assert changes == continual.INVERSIONS["relative"]
        asked.append((args.teacher, args.images, args.num_images, info.num_classes))
        return torch.randint(256, (20, 1, 32, 32), dtype=torch.uint8)

    monkeypatch.setattr(continual, "load_source_images", make)
    out = tmp_path / "run"
    result = run(
        out, tasks=THREE, arms=("base", "deepinversion"), images="auto", inversion="relative"
    )
    first = ("digits-resnet8-0-4", "auto", 20, 5)
    assert asked == [first, (str(out / "deepinversion-task1.pt"), "auto", 20, 7)]
    assert [len(figures) for figures in result["arms"].values()] == [3, 3]


def test_a_folder_of_images_is_of_the_first_network_only(tmp_path):
    run_folder = type("Run", (), {"args": replace(DIGITS, images="there"), "out": tmp_path})
    assert continual.make_old_args("abd", 1, run_folder).images == "there"
    later = continual.make_old_args("abd", 2, run_folder)
    assert later.images == "auto" and later.teacher == str(tmp_path / "abd-task1.pt")


def test_inverted_images_get_the_old_networks_labels(tmp_path, monkeypatch):
    images, labels = load_dataset("digits", "", "train")
    known = labels < 5
    monkeypatch.setattr(continual, "load_source_images", lambda *_: images[known])
    sources = []
    draw_batch = continual.draw_batch

    def watch(arm, new, replayed, info, args):
        sources.append(replayed)
        return draw_batch(arm, new, replayed, info, args)

    monkeypatch.setattr(continual, "draw_batch", watch)
    run(tmp_path / "run", arms=("abd",))
    assert torch.equal(sources[0].images, images[known])
    assert (sources[0].labels == labels[known]).float().mean() > 0.99


# What is measured


class Constant(nn.Module):
    """A network that gives the same logits for all images."""

    def __init__(self, logits):
        super().__init__()
        self.fc = nn.Linear(1, len(logits))
        self.fc.weight.data.zero_()
        self.fc.bias.data = torch.tensor(logits)

    def forward(self, x):
        return self.fc(x.mean((1, 2, 3)).unsqueeze(1))


def test_no_task_id_helps_at_test():
    """An old image counts as wrong where a new class has the largest logit, and in reverse."""
    images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    tests = [
        LabelledImages(images, torch.tensor([0, 1, 1, 1])),
        LabelledImages(images[:2], torch.tensor([2, 3])),
    ]
    network = Constant([0.0, 2.0, 1.0, 3.0])
    figures = continual.measure(network, tests, describe(1), 2, accuracy_before=75.0)
    assert (figures["old"], figures["new"]) == (0, 50)
    assert figures["accuracy"] == pytest.approx(100 / 6)
    assert figures["forgetting"] == 75
    assert figures["confusion"] == [[0, 0, 0, 1], [0, 0, 0, 3], [0, 0, 0, 1], [0, 0, 0, 1]]
    network = Constant([0.0, 2.0, 1.0, 0.0])
    figures = continual.measure(network, tests, describe(1), 2, accuracy_before=75.0)
    assert (figures["old"], figures["new"], figures["forgetting"]) == (75, 0, 0)


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tasks=("digits:0-3", "digits:5-9")), "it was trained on digits:0,1,2,3,4; begin"),
        (dict(tasks=("digits:5-9", "digits:0-4")), "it was trained on digits:0,1,2,3,4; begin"),
        (dict(tasks=("mnist:0-4", "digits:5-9")), "it was trained on digits:0,1,2,3,4; begin"),
        (dict(teacher="digits-resnet8"), "it was trained on digits:0,1,2,3,4,5,6,7,8,9; begin"),
        (dict(teacher="nowhere/teacher.pt"), "--dataset digits --arch resnet8 --classes 0 1 2 3 4"),
        (dict(tasks=("digits:0-4", "mnist:5-9"), data_dir="nowhere"), "check --data-dir"),
        (dict(images="nowhere"), "no images-*.npz or no result.json there"),
        (
            dict(teacher="digits-lenet5", tasks=("digits:0-9", "mnist:0-9"), images="auto"),
            "no BatchNorm with running moments, which inversion matches",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_begins(options, says, tmp_path, capsys):
    line = read_refusal(capsys, run, tmp_path / "out", **options)
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(arms=()), "--arms: expected one or more"),
        (dict(arms=("base", "base")), "--arms: expected one or more, each once"),
        (dict(images="real"), "got real, which the oracles take"),
        (dict(images="digits"), "digits is one of --tasks, whose old images are gone"),
        (dict(dataset="mnist"), "--tasks names the data sets"),
        (dict(epochs=0), "--epochs: expected at least 1"),
        (dict(lr=0.0), "--lr: expected at least"),
        (dict(lr=float("nan")), "--lr: expected at least"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError) as error:
        replace(DIGITS, **options)
    assert says in str(error.value)


def test_images_of_another_network_are_refused(tmp_path, capsys):
    images = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    save_images(get_image_path(tmp_path, 0), images, torch.arange(8))  # of 8 classes
    (tmp_path / "result.json").write_text("{}")
    line = read_refusal(capsys, run, tmp_path / "out", images=str(tmp_path))
    assert "expected labels from 0 to 4" in line


# Runs


def test_a_run_writes_what_it_says(whole_run):
    result = json.loads((whole_run / "result.json").read_text())
    names = {path.name for path in whole_run.iterdir()}
    arms = continual.Arm.__args__
    assert {f"{arm}-task1.pt" for arm in arms} <= names
    assert {"samples.png", "confusion.png", "curve.png", "student.pt", "checkpoint.pt"} <= names
    assert list(result["arms"]) == list(arms)
    assert result["student_accuracy"] == result["arms"]["joint"][-1]["accuracy"]
    for first, last in result["arms"].values():
        assert first["accuracy"] == result["teacher_accuracy"] > 95
        assert last["forgetting"] == pytest.approx(first["accuracy"] - last["old"])
        assert last["accuracy"] == pytest.approx((last["old"] + last["new"]) / 2)  # 60 of each
        assert torch.tensor(last["confusion"]).sum() == 120
    rows = rows_of(whole_run)
    assert [row["epoch"] for row in rows] == list(range(1, 17))
    assert rows[1]["eval/acc"] == pytest.approx(result["arms"]["base"][-1]["accuracy"], abs=1e-5)


def test_the_finished_network_is_a_teacher(whole_run):
    path = str(whole_run / "student.pt")
    network, info = load_teacher(replace(DIGITS, teacher=path), "cpu")
    assert (info.num_classes, info.dataset, info.arch) == (10, "digits", "resnet8")
    images, labels = load_dataset("digits", "", "test")
    old = labels < 5
    result = json.loads((whole_run / "result.json").read_text())
    last = result["arms"]["joint"][-1]
    accuracy = evaluate(network, images[old][:60], labels[old][:60], info)
    assert accuracy == pytest.approx(last["old"])


def test_arms_do_not_depend_on_those_before_them(whole_run, tmp_path):
    run(tmp_path / "alone", arms=("abd",))
    first = read_state(whole_run / "abd-task1.pt")
    second = read_state(tmp_path / "alone/abd-task1.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    """The folder of an unbroken run of three tasks and two arms: eight epochs."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        run(folder, tasks=THREE, arms=("deepinversion", "base"))
    return folder


@pytest.mark.parametrize("n_epochs", [1, 2, 5, 8])
def test_a_resumed_run_is_bit_equal(n_epochs, three_tasks, tmp_path, monkeypatch):
    save_checkpoint = continual.RunFolder.save_checkpoint
    saved = []

    def stop_later(folder, state):
        save_checkpoint(folder, state)
        saved.append(1)
        if len(saved) == n_epochs:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    options = dict(tasks=THREE, arms=("deepinversion", "base"))
    monkeypatch.setattr(continual.RunFolder, "save_checkpoint", stop_later)
    with pytest.raises(KeyboardInterrupt):
        run(out, **options)
    monkeypatch.setattr(continual.RunFolder, "save_checkpoint", save_checkpoint)
    torch.rand(3)
    resumed = run(out, resume=True, **options)
    whole = json.loads((three_tasks / "result.json").read_text())
    assert resumed["arms"] == whole["arms"]
    assert rows_of(out) == rows_of(three_tasks)
    for path in three_tasks.glob("*.pt"):
        if "checkpoint" not in path.name:
            first, second = read_state(path), read_state(out / path.name)
            assert all(torch.equal(first[name], second[name]) for name in first), path.name
    assert (out / "samples.png").read_bytes() == (three_tasks / "samples.png").read_bytes()


def test_grey_classes_are_added_to_a_network_of_colours(tmp_path, monkeypatch):
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8)

    def load_some(dataset, data_dir, split):
        if dataset == "cifar10":
            return images, torch.arange(30) % 10
        return load_dataset(dataset, data_dir, split)

    monkeypatch.setattr("tasks.load_dataset", load_some)
    options = dict(teacher="cifar10-resnet20", tasks=("cifar10:0-9", "digits:0-9"), epochs=1)
    result = run(tmp_path / "run", arms=("abd",), test_images=20, **options)
    assert len(result["arms"]["abd"][-1]["confusion"]) == 20
    _, info = load_teacher(replace(DIGITS, teacher=str(tmp_path / "run/student.pt")), "cpu")
    assert (info.num_classes, info.channels, info.dataset) == (20, 3, "cifar10")
