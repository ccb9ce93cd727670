"""attention_map and attention_transfer: definition by hand, special layouts, extremes.

What all ops promise is in test_every_op.py.
"""

import math

import pytest
import torch
from helpers import assert_matches_definition, evaluate, lay_out, random_tensor
from ops_table import ATTENTION_MAP, ATTENTION_TRANSFER, BFLOAT, make_activation, make_student

import kernels


def assert_both_match(args):
    """The map of args["x"] and its distance from args["target"]; returns both Evaluations."""
    map_args = {"x": args["x"], "eps": args["eps"]}
    return (
        assert_matches_definition(ATTENTION_MAP, map_args),
        assert_matches_definition(ATTENTION_TRANSFER, args),
    )


# The definition


def test_definition_by_hand():
    # squares (9, 0) and (0, 16): m = (9, 16) / 2, ||m|| = sqrt(337) / 2
    x = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64, requires_grad=True)
    root = math.sqrt(337)
    q = kernels.attention_map_ref(x)
    assert q[0].tolist() == pytest.approx([9 / root, 16 / root], rel=1e-12)
    q = kernels.attention_map_ref(x, 100.0)
    assert q[0].tolist() == pytest.approx([0.045, 0.08], rel=1e-12)

    # for t = (1, 0): ||q - t||^2 / 2 = 1 - <q, t> = 1 - q_0
    target = torch.tensor([[1.0, 0.0]]).double()
    loss = kernels.attention_transfer_ref(x, target)
    assert loss.item() == pytest.approx(1 - 9 / root, rel=1e-12)

    # d q_0 / d m_0 = m_1^2 / ||m||^3 and d q_0 / d m_1 = -m_0 m_1 / ||m||^3
    loss.backward()
    norm = root / 2
    expected = [-3 * 64 / norm**3, 0, 0, 4 * 36 / norm**3]
    assert x.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_definition_is_the_released_formula():
    x = random_tensor((3, 6, 4, 5)).double()
    teacher = random_tensor((3, 2, 4, 5), seed=1).double()
    q, t = (
        torch.nn.functional.normalize(a.pow(2).mean(1).view(a.size(0), -1)) for a in (x, teacher)
    )
    torch.testing.assert_close(kernels.attention_map_ref(teacher), t, rtol=1e-12, atol=0)
    loss = kernels.attention_transfer_ref(x, t)
    assert loss.item() == pytest.approx((q - t).pow(2).mean().item(), rel=1e-12)


# Layouts


@pytest.mark.parametrize(("C", "start"), [(5, 1), (8, 0), (8, 8), (24, 4)])
def test_some_channels_of_a_channels_last_tensor(C, start, backend, device):
    """Side by side in memory, but neither dense nor always in whole groups of 8."""
    args = make_student(device, (2, 32, 3, 4), layout="channels_last", dtype=BFLOAT)
    assert_both_match({**args, "x": args["x"][:, start : start + C]})


# Extremes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sample_of_zeros_has_gradient_zero(layout, backend, device):
    args = make_student(device, (3, 4, 3, 2), layout=layout)
    args["x"][1] = 0
    of_map, of_loss = assert_both_match(args)
    assert not of_map.results[0][1].any()
    for got in (of_map, of_loss):
        dx = got.gradients["x"]
        assert not dx[1].any()
        assert dx[0].any()
        assert dx.isfinite().all()


def test_constant_activation(backend, device):
    """1 / sqrt(H W) everywhere."""
    args = {"x": torch.full((2, 3, 4, 4), -0.3, device=device)}
    q = assert_matches_definition(ATTENTION_MAP, args).results[0]
    torch.testing.assert_close(q, torch.full((2, 16), 0.25, device=device))


def test_activation_at_one_position(backend, device):
    """1 there, and no gradient but towards the others, where x is 0."""
    x = torch.zeros(2, 3, 4, 4, device=device)
    x[:, 1, 2, 3] = 5.0
    got = assert_matches_definition(ATTENTION_MAP, {"x": x})
    assert got.results[0].tolist() == [[0.0] * 11 + [1.0] + [0.0] * 4] * 2
    assert not got.gradients["x"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_shows(bad, backend, device):
    args = make_student(device, (2, 3, 4, 4))
    args["x"][1, 2, 0, 0] = bad
    of_map = evaluate(kernels.attention_map, {"x": args["x"]}, ("x",))
    of_loss = evaluate(kernels.attention_transfer, args, ("x",))
    assert of_loss.results[0].isnan()
    for value in (of_map.results[0], of_map.gradients["x"], of_loss.gradients["x"]):
        assert value[1].isnan().any()
        assert value[0].isfinite().all()  # the other sample is as it was


# Properties


def test_properties_of_the_map(backend, device):
    x = make_activation(device, (3, 6, 4, 5))["x"]
    q = kernels.attention_map(x)
    assert q.min() >= 0 and q.max() <= 1
    torch.testing.assert_close(q.norm(dim=1), torch.ones(3, device=device))

    # the unit of x cancels: bit for bit where it is a power of 2
    assert torch.equal(kernels.attention_map(-4 * x), q)
    torch.testing.assert_close(kernels.attention_map(0.3 * x), q)

    # so do the order and the number of the channels
    order = torch.randperm(6, device=device)
    torch.testing.assert_close(kernels.attention_map(x[:, order]), q)
    torch.testing.assert_close(kernels.attention_map(torch.cat([x, x], 1)), q)

    flipped = kernels.attention_map(x.flip(3)).view(3, 4, 5).flip(2)
    torch.testing.assert_close(flipped.flatten(1), q)


def test_properties_of_the_loss(backend, device):
    x = make_activation(device, (3, 6, 4, 5))["x"]
    teacher = lay_out(random_tensor((3, 11, 4, 5), device, seed=1) + 0.5, "channels_last")
    target = kernels.attention_map(teacher)
    loss = kernels.attention_transfer(x, target)
    assert 0 < loss < 2 / 20

    rows = [kernels.attention_transfer(x[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.stack(rows).mean(), loss)  # a mean over the batch
    other_way_round = kernels.attention_transfer(teacher, kernels.attention_map(x))
    torch.testing.assert_close(other_way_round, loss)
    torch.testing.assert_close(kernels.attention_transfer(5 * x, target), loss)


def test_disjoint_maps_are_2_over_the_positions_apart(backend, device):
    positions = torch.eye(20, device=device)
    student = positions[5:8].view(3, 1, 4, 5)
    loss = kernels.attention_transfer(student, positions[:3])
    assert loss.item() == pytest.approx(2 / 20)


def test_distance_from_the_own_map_is_zero(backend, device):
    """But for rounding. Its gradient is zero too, and always stands at right angles to x."""
    x = make_activation(device, (3, 6, 4, 5))["x"]
    one = [torch.ones((), device=device)]
    args = {"x": x, "target": kernels.attention_map(x)}
    got = evaluate(kernels.attention_transfer, args, ("x",), one)
    assert got.results[0] < 1e-12
    assert got.gradients["x"].abs().max() < 1e-7

    args["target"] = args["target"].flip(1)
    dx = evaluate(kernels.attention_transfer, args, ("x",), one).gradients["x"]
    along_x = (dx * x).flatten(1).sum(1).abs().max()
    assert along_x < 1e-6 * (dx.norm() * x.norm())
