"""total_variation: the definition by hand and in loops, invariances.

What all ops promise is in test_every_op.py.
"""

import pytest
import torch
from helpers import evaluate, random_tensor

import kernels


def test_definition_by_hand():
    # horizontal -1 and -4, vertical -3 and -6, main diagonal 1 - 8, anti-diagonal 4 - 2
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    l1, l2 = kernels.total_variation_ref(x)
    assert l1.item() == pytest.approx(2.5 + 4.5 + 7 + 2)
    assert l2.item() == pytest.approx(17**0.5 + 45**0.5 + 7 + 2)


def test_definition_in_loops():
    x = random_tensor((2, 2, 3, 4)).double()
    N, C, H, W = x.shape
    expected_l1 = 0.0
    expected_l2 = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        differences = []
        for n in range(N):
            for c in range(C):
                for i in range(H):
                    for j in range(W):
                        if 0 <= i + down < H and j + right < W:
                            d = x[n, c, i, j] - x[n, c, i + down, j + right]
                            differences.append(d.item())
        expected_l1 += sum(abs(d) for d in differences) / len(differences)
        expected_l2 += sum(d * d for d in differences) ** 0.5

    l1, l2 = kernels.total_variation_ref(x)
    assert l1.item() == pytest.approx(expected_l1, rel=1e-12)
    assert l2.item() == pytest.approx(expected_l2, rel=1e-12)


def test_constant_images_have_gradient_zero(backend, device):
    x = torch.full((2, 3, 6, 5), 0.7, device=device)
    for function in (kernels.total_variation, kernels.total_variation_ref):
        got = evaluate(function, {"x": x}, ("x",))
        assert got.results[0].item() == got.results[1].item() == 0
        assert not got.gradients["x"].any()


def test_nan_shows(backend, device):
    x = random_tensor((2, 3, 6, 5), device)
    x[0, 0, 2, 2] = float("nan")
    got = evaluate(kernels.total_variation, {"x": x}, ("x",))
    assert got.results[0].isnan() and got.results[1].isnan()
    assert got.gradients["x"].isnan().all()  # every norm is NaN


@pytest.mark.parametrize("change", ["shift", "flip-h", "flip-v", "transpose", "scale"])
def test_invariances(change, backend, device):
    x = (random_tensor((1, 2, 6, 6), device) * 64).round() / 64  # adding 3 is then exact
    changed = {
        "shift": x + 3,
        "flip-h": x.flip(3),
        "flip-v": x.flip(2),
        "transpose": x.transpose(2, 3),
        "scale": -2 * x,
    }[change]
    factor = 2 if change == "scale" else 1
    before = kernels.total_variation(x)
    after = kernels.total_variation(changed)
    for value, other in zip(before, after, strict=True):
        assert other.item() == pytest.approx(factor * value.item(), rel=1e-6)


def test_l1_is_a_mean_and_l2_grows_like_the_root_of_the_batch(backend, device):
    x = random_tensor((1, 3, 6, 5), device)
    one = kernels.total_variation(x)
    four = kernels.total_variation(x.expand(4, -1, -1, -1))
    assert four[0].item() == pytest.approx(one[0].item(), rel=1e-6)
    assert four[1].item() == pytest.approx(2 * one[1].item(), rel=1e-6)
