"""jittered_view: roll, mirror and priors by hand and against torch.roll.

What all ops promise is in test_every_op.py.
"""

import pytest
import torch
from helpers import evaluate, random_tensor
from ops_table import make_jittered

import kernels


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param((0, 0, 0), id="as-is"),
        pytest.param((0, 0, 1), id="mirrored"),
        pytest.param((1, -2, 0), id="rolled"),
        pytest.param((-1, 3, 1), id="rolled-and-mirrored"),
        pytest.param((17, -23, 1), id="beyond-the-size"),
    ],
)
def test_definition_is_roll_flip_and_the_priors(draw):
    x = random_tensor((3, 2, 5, 6)).double()
    rolled = x.roll(draw[:2], (2, 3))
    if draw[2]:
        rolled = rolled.flip(3)

    view, tv_l1, tv_l2, l2 = kernels.jittered_view_ref(x, torch.tensor(draw))
    assert torch.equal(view, rolled)
    expected_l1, expected_l2 = kernels.total_variation_ref(rolled)
    assert tv_l1.item() == pytest.approx(expected_l1.item(), rel=1e-12)
    assert tv_l2.item() == pytest.approx(expected_l2.item(), rel=1e-12)
    assert l2.item() == pytest.approx(x.flatten(1).norm(dim=1).mean().item(), rel=1e-12)


def test_by_hand(backend, device):
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 6.0, 9.0]]]], device=device)
    draw = torch.tensor([1, 1, 1], device=device)
    dview = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]], device=device)
    grad_l1 = torch.tensor(12.0, device=device)
    zero = torch.zeros((), device=device)
    args = {"x": x, "draw": draw}
    got = evaluate(kernels.jittered_view, args, ("x",), [dview, grad_l1, zero, zero])

    view, tv_l1, tv_l2, l2 = got.results
    assert view.tolist() == [[[[6.0, 4.0, 9.0], [2.0, 1.0, 3.0]]]]
    # horizontal 2, -5, 1, -2; vertical 4, 3, 6; main diagonal 5, 1; anti-diagonal -2, -8
    assert tv_l1.item() == pytest.approx(10 / 4 + 13 / 3 + 6 / 2 + 10 / 2)
    assert tv_l2.item() == pytest.approx(34**0.5 + 61**0.5 + 26**0.5 + 68**0.5)
    assert l2.item() == pytest.approx(147**0.5)

    # dview is brought back to where each pixel came from: (5, 4, 6), (2, 1, 3). To it adds 12 times
    # the sum of a pixel's signs: 1/4 a horizontal, 1/3 a vertical, 1/2 a diagonal neighbour.
    dx = got.gradients["x"].flatten().tolist()
    assert dx == pytest.approx([5 - 22, 4 - 7, 6 - 7, 2 + 10, 1 + 13, 3 + 13])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_view_is_channels_last_and_no_alias_of_the_images(layout, backend, device):
    args = make_jittered(device, (2, 3, 5, 6), draw=(0, 0, 0), layout=layout)
    before = args["x"].clone()
    view = kernels.jittered_view(**args)[0]
    assert view.is_contiguous(memory_format=torch.channels_last)
    view.add_(1)
    assert torch.equal(args["x"], before)


def test_constant_images_have_the_gradient_of_the_view_alone(backend, device):
    args = make_jittered(device, (2, 3, 6, 5), draw=(2, 1, 1))
    args["x"] = torch.zeros_like(args["x"])
    dview = torch.ones_like(args["x"])
    five = torch.tensor(5.0, device=device)
    got = evaluate(kernels.jittered_view, args, ("x",), [dview, five, five, five])
    assert torch.equal(got.gradients["x"], dview)
