"""Transition curves: against the released loop, one image at a time; which images go where; refusals."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import zskt


@pytest.fixture
def networks():
    """A student, a teacher (frozen, with BatchNorm), images and goals."""

    def make():
        layers = nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4)
        return nn.Sequential(*layers).requires_grad_(False).eval()

    torch.manual_seed(0)
    return make(), make(), torch.randn(12, 1, 4, 4), torch.randint(0, 4, (12,))


def one_by_one(student, teacher, x, goals, n_steps):
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


def test_curves_are_those_of_the_released_loop(networks):
    student, teacher, x, goals = networks
    before = x.clone()
    curves = kernels.transition_curves(student, teacher, x, goals, n_steps=20)
    assert curves.shape == (2, 12, 20)
    assert torch.allclose(curves, one_by_one(student, teacher, x, goals, 20), atol=1e-5)
    assert curves[0, :, -1].mean() > curves[0, :, 0].mean()  # the student comes to believe
    assert torch.equal(x, before)


def test_mte_of_lenets_over_a_hundred_steps_is_that_of_single_images():
    student, teacher = (zskt.load(f"{name}-lenet5", zskt.Args(device="cpu")).model for name in ("mnist", "digits"))
    images, _ = zskt.load_dataset("digits", "", "test")
    x, goals = zskt.normalise(images[:6], (0.3,), (0.3,)), torch.arange(6)
    together = kernels.transition_curves(student, teacher, x, goals)
    alone = one_by_one(student, teacher, x, goals, 100)
    mte = [(curves[0] - curves[1]).abs().mean().item() for curves in (together, alone)]
    assert mte[0] == pytest.approx(mte[1], abs=1e-5)
    assert mte[0] > 0.05


def test_curves_of_equal_networks_are_equal(networks):
    student, _, x, goals = networks
    curves = kernels.transition_curves(student, student, x, goals, n_steps=5)
    assert torch.equal(curves[0], curves[1])


def test_pairs_are_agreed_images_and_every_class_but_their_label():
    """Images that the networks disagree on are left out, also where one of them is right."""
    classes = torch.eye(3)

    def network(table):
        return lambda x: classes[torch.tensor(table)[x[:, 0].long()]]

    student, teacher = network([0, 1, 2, 0, 1]), network([0, 1, 0, 0, 1])
    x, labels = torch.arange(5.0)[:, None], torch.tensor([0, 1, 2, 1, 1])
    images, goals = kernels.transition_pairs(student, teacher, x, labels, 3, n_images=3)
    led = {}
    for image, goal in zip(images[:, 0].int().tolist(), goals.tolist(), strict=True):
        led.setdefault(image, set()).add(goal)
    assert led == {0: {1, 2}, 1: {0, 2}, 3: {0, 2}}  # image 3: both are wrong alike; its label is left out


def test_what_cannot_be_walked_is_refused(networks):
    student, teacher, x, goals = networks
    student[3].train()  # a single BatchNorm, inside
    with pytest.raises(ValueError, match="eval mode"):
        kernels.transition_curves(student, teacher, x, goals)
    student.eval()
    with pytest.raises(ValueError, match="a goal for each image"):
        kernels.transition_curves(student, teacher, x, goals[:3])
    with pytest.raises(ValueError, match="n_steps"):
        kernels.transition_curves(student, teacher, x, goals, n_steps=0)


def test_drawing_writes_one_panel_a_student(tmp_path):
    curves = torch.rand(2, 9, 10)
    kernels.draw_transitions({"one": curves, "another": curves}, tmp_path / "mte.png")
    assert (tmp_path / "mte.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.gpu
def test_a_graph_walks_the_same_paths(networks):
    student, teacher, x, goals = (v.cuda() for v in networks)
    walked = [
        kernels.transition_curves(student, teacher, x, goals, n_steps=20, graph=graph) for graph in (True, False)
    ]
    assert torch.allclose(*walked, atol=1e-5)
