"""transition_error.py: paths against the released loop, one at a time; which images go where."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scripts import read_refusal

import transition_error
from harness import ROOT
from harness.data import evaluate, load_dataset, normalise
from harness.load import load_student, load_trained

TEACHER = str(ROOT / "teachers/digits-lenet5.pt")
ARGS = transition_error.Args(device="cpu", n_images=6, n_steps=20)


def run(out, *students, **options):
    """Measure students with few images; what mte.json holds."""
    args = replace(ARGS, students=students, out=str(out), n_steps=5)
    transition_error.main(replace(args, **options))
    return json.loads((out / "mte.json").read_text())


def make_network():
    layers = nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4)
    return nn.Sequential(*layers).requires_grad_(False).eval()


@pytest.fixture
def networks():
    """A student and a teacher, both with BatchNorm, images and goals."""
    return make_network(), make_network(), torch.randn(12, 1, 4, 4), torch.randint(0, 4, (12,))


def follow_one_by_one(student, teacher, x, goals, n_steps):
    """The released loop."""
    curves = torch.zeros(2, len(x), n_steps)
    for i in range(len(x)):
        image = x[i : i + 1].clone()
        for k in range(n_steps):
            image.requires_grad_()
            logits = student(image)
            curves[0, i, k] = logits.softmax(1)[0, goals[i]].detach()
            curves[1, i, k] = teacher(image).softmax(1)[0, goals[i]].detach()
            F.cross_entropy(logits, goals[i : i + 1]).backward()
            image = (image - image.grad).detach()
    return curves


def test_paths_side_by_side_are_those_of_the_released_loop(networks):
    student, teacher, x, goals = networks
    before = x.clone()
    curves = transition_error.follow_paths(student, teacher, x, goals, ARGS)
    assert curves.shape == (2, 12, 20)
    expected = follow_one_by_one(student, teacher, x, goals, 20)
    assert torch.allclose(curves, expected, atol=1e-5)
    assert curves[0, :, -1].mean() > curves[0, :, 0].mean()  # the student comes to believe
    assert torch.equal(x, before)


def test_error_of_lenets_over_a_hundred_steps_is_that_of_single_images():
    student, info = load_trained("mnist-lenet5", "cpu", "data")
    teacher, _ = load_trained("digits-lenet5", "cpu", "data")
    images, _ = load_dataset("digits", "data", "test")
    x = normalise(images[:6], info)
    goals = torch.arange(6)
    args = replace(ARGS, n_steps=100)
    together = transition_error.follow_paths(student, teacher, x, goals, args)
    alone = follow_one_by_one(student, teacher, x, goals, 100)
    error = transition_error.mean_transition_error(together)
    assert error == pytest.approx((alone[0] - alone[1]).abs().mean().item(), abs=1e-5)
    assert error > 0.05


def test_error_is_the_mean_distance_of_the_curves():
    curves = torch.tensor([[[0.0, 0.5], [1.0, 0.25]], [[0.5, 0.5], [0.0, 0.75]]])
    assert transition_error.mean_transition_error(curves) == pytest.approx(0.5)


def test_a_smaller_step_moves_less(networks):
    student, teacher, x, goals = networks
    curves = transition_error.follow_paths(student, teacher, x, goals, ARGS)
    slow = transition_error.follow_paths(student, teacher, x, goals, replace(ARGS, step_size=0.01))
    assert torch.equal(slow[:, :, 0], curves[:, :, 0])
    assert slow[0, :, 1].mean() < curves[0, :, 1].mean()


class Table(nn.Module):
    """A network that assigns image i to class table[i]; an image's pixels hold its number."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, x):
        return torch.eye(3)[self.table[x[:, 0].long()]]


def test_paths_lead_agreed_images_to_every_class_but_their_label():
    """Images that the networks disagree on are left out, also where one of them is right."""
    student = Table([0, 1, 2, 0, 1])
    teacher = Table([0, 1, 0, 0, 1])
    x = torch.arange(5.0).unsqueeze(1)
    labels = torch.tensor([0, 1, 2, 1, 1])
    chosen = transition_error.choose_images(student, teacher, x, 3)
    assert chosen.tolist() == [0, 1, 3]
    images, goals = transition_error.make_paths(x[chosen], labels[chosen], 3)
    pairs = list(zip(images[:, 0].int().tolist(), goals.tolist(), strict=True))
    # Image 3: both are wrong alike; its label is left out.
    assert sorted(pairs) == [(0, 1), (0, 2), (1, 0), (1, 2), (3, 0), (3, 2)]


def test_the_same_images_are_taken_in_every_run_and_in_parts_of_a_thousand(tmp_path, monkeypatch):
    sizes = []
    starts = []

    def follow(student, teacher, x, goals, args):
        sizes.append(len(x))
        starts.append(x)
        return torch.zeros(2, len(goals), args.n_steps)

    monkeypatch.setattr(transition_error, "follow_paths", follow)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        saved = run(tmp_path / name, TEACHER, n_images=120)
        assert saved["students"][TEACHER]["paths"] == 1080
    assert sizes == [1000, 80] * 2
    assert torch.equal(starts[0], starts[2])

    images, _ = load_dataset("digits", "data", "test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    _, info = load_trained(TEACHER, "cpu", "data")
    assert torch.equal(starts[0][0], normalise(images[order[:1]], info)[0])


def test_the_teacher_itself_has_no_error_and_all_files_are_written(tmp_path, capsys):
    saved = run(tmp_path, TEACHER, "digits-lenet5")
    published = json.loads((ROOT / "results/mte-mnist.json").read_text())
    assert set(published) == set(saved)
    assert set(published["versions"]) <= set(saved["versions"])
    assert saved["steps"] == 5
    assert saved["dataset"] == "digits"
    assert list(saved["students"]) == [TEACHER, "digits-lenet5"]
    row = saved["students"][TEACHER]
    assert row["mte"] == 0.0
    assert row["paths"] == 54
    network, info = load_trained(TEACHER, "cpu", "data")
    assert row["accuracy"] == evaluate(network, *load_dataset("digits", "data", "test"), info)
    assert (tmp_path / "mte.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{TEACHER}: mte 0" in capsys.readouterr().out


STUDENT = """
import torch.nn as nn

def student(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024 * in_channels, num_classes))
"""


def test_students_of_a_factory_are_named_beside_their_weights(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(STUDENT)
    spec = f"{tmp_path / 'mine.py'}:student"
    _, info = load_trained(TEACHER, "cpu", "data")
    student, _ = load_student(spec, info, "cpu")
    path = str(tmp_path / "student.pt")
    torch.save(dict(arch=spec, state_dict=student.state_dict()), path)
    saved = run(tmp_path / "mte", path, arch=spec)
    assert 0 < saved["students"][path]["paths"] <= 54
    assert "file.py:factory" in read_refusal(capsys, run, tmp_path / "no", path)


def save_changed_teacher(path, change):
    saved = torch.load(TEACHER, weights_only=True)
    change(saved["state_dict"])
    torch.save(saved, path)
    return str(path)


def test_students_that_do_not_compare_are_refused(tmp_path, capsys):
    out = tmp_path / "mte"
    assert "normalised otherwise" in read_refusal(capsys, run, out, "mnist-lenet5")
    assert "cannot be read" in read_refusal(capsys, run, out, "nowhere.pt")
    assert "--dataset none" in read_refusal(capsys, run, out, TEACHER, dataset="none")

    def break_bias(state):
        state["fc2.bias"][3] = math.nan

    path = save_changed_teacher(tmp_path / "nan.pt", break_bias)
    assert "not finite" in read_refusal(capsys, run, out, path)

    def remove_class(state):
        state["fc2.weight"] = state["fc2.weight"][:7]
        state["fc2.bias"] = state["fc2.bias"][:7]

    path = save_changed_teacher(tmp_path / "seven.pt", remove_class)
    assert "seven.pt" in read_refusal(capsys, run, out, path)

    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt" in read_refusal(capsys, run, out, str(tmp_path / "text.pt"))
    assert not out.exists()


def test_a_student_that_never_agrees_is_refused(tmp_path, capsys):
    def negate(state):
        state["fc2.weight"].neg_()
        state["fc2.bias"].neg_()

    path = save_changed_teacher(tmp_path / "contrary.pt", negate)
    line = read_refusal(capsys, run, tmp_path / "mte", path)
    assert "agree on no test image" in line


@pytest.mark.parametrize(
    "options", [dict(students=()), dict(n_images=0), dict(n_steps=0), dict(step_size=0.0)]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected at least"):
        replace(ARGS, **options)


@pytest.mark.gpu
def test_a_graph_follows_the_same_paths(networks):
    student, teacher, x, goals = (v.cuda() for v in networks)
    curves = []
    for graph in (True, False):
        args = replace(ARGS, graph=graph)
        curves.append(transition_error.follow_paths(student, teacher, x, goals, args))
    assert torch.allclose(*curves, atol=1e-5)
