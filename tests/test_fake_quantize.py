"""fake_quantize: values by hand, PyTorch's own op, the grid, what lies at its ends.

What all ops promise is in test_every_op.py.
"""

import pytest
import torch
from helpers import lay_out, random_tensor

import kernels

ENDS = (torch.tensor(-1.0), torch.tensor(2.0))


def slope_of(function, x, *args):
    """The gradient of the sum of what a function returns."""
    leaf = x.detach().requires_grad_()
    function(leaf, *args).sum().backward()
    return leaf.grad


def test_values_and_slopes_by_hand(backend, device):
    """Steps of 0.5 from -1 to 0.5; halves go to the even neighbour; 0.5 is inside."""
    x = torch.tensor([-9.0, -1.0, -0.74, -0.25, -0.1, 0.0, 0.25, 0.3, 0.5, 0.51, 9.0])
    ends = torch.tensor(-1.0, device=device), torch.tensor(0.5, device=device)
    y = torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    slope = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    for op in (kernels.fake_quantize, kernels.fake_quantize_ref):
        assert torch.equal(op(x.to(device), *ends, 2).cpu(), y)
        assert torch.equal(slope_of(op, x.to(device), *ends, 2).cpu(), slope)


def test_zero_is_rounded_to_a_step(backend, device):
    """[-0.4, 1.1] in steps of 0.5: the grid becomes [-0.5, 1]."""
    x = torch.tensor([-0.4, 0.1, 0.6, 1.1], device=device)
    ends = torch.tensor(-0.4, device=device), torch.tensor(1.1, device=device)
    scale, zero = kernels.quantization_grid(*ends, 2)
    assert (round(scale.item(), 6), zero.item()) == (0.5, 1.0)
    expected = torch.tensor([-0.5, 0.0, 0.5, 1.0])
    torch.testing.assert_close(kernels.fake_quantize(x, *ends, 2).cpu(), expected)
    torch.testing.assert_close(kernels.fake_quantize_ref(x, *ends, 2).cpu(), expected)


def test_channels_by_hand(backend, device):
    """Steps of 1 from -1 to 2; of 0.5 from 0 to 1.5, which 0 widens; of 2 from -6 to 0; none."""
    x = torch.tensor([[-1.0, 0.4, 1.6, 2.0], [0.5, 0.8, 1.1, 1.5], [-6, -5.5, -2.6, -1], [0] * 4])
    y = torch.tensor([[-1.0, 0.0, 2.0, 2.0], [0.5, 1.0, 1.0, 1.5], [-6, -6, -2, 0], [0] * 4])
    for op in (kernels.fake_quantize_channels, kernels.fake_quantize_channels_ref):
        torch.testing.assert_close(op(x.to(device), 2).cpu(), y, rtol=0, atol=1e-6)
        assert torch.equal(slope_of(op, x.to(device), 2).cpu(), torch.ones_like(x))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_definition_has_the_values_of_pytorch(bits):
    x = 2 * random_tensor((500,))
    scale, zero = kernels.quantization_grid(*ENDS, bits)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 2**bits - 1)
    ours = kernels.fake_quantize_ref(x, *ENDS, bits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    w = random_tensor((5, 4, 3, 3))
    rows = w.flatten(1)
    scale, zero = kernels.quantization_grid(rows.amin(1), rows.amax(1), bits)
    theirs = torch.fake_quantize_per_channel_affine(w, scale, zero.int(), 0, 0, 2**bits - 1)
    ours = kernels.fake_quantize_channels_ref(w, bits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_lie_on_the_grid(bits, backend, device):
    x = 2 * random_tensor((4, 100), device)
    ends = [end.to(device) for end in ENDS]
    scale, zero = kernels.quantization_grid(*ends, bits)
    y = kernels.fake_quantize(x, *ends, bits)
    q = (y / scale).round() + zero
    assert torch.equal(y, scale * (q - zero))
    assert q.min() == 0 and q.max() == 2**bits - 1
    assert bits > 4 or len(q.unique()) == 2**bits
    torch.testing.assert_close(kernels.fake_quantize(y, *ends, bits), y)  # once is enough

    weight = kernels.fake_quantize_channels(x, bits)
    assert all(len(row.unique()) <= 2**bits for row in weight)
    scale, _ = kernels.quantization_grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits)
    assert ((weight - x).abs() <= scale * 1.0001).all()


def test_channels_are_quantized_one_by_one(backend, device):
    x = lay_out(random_tensor((5, 4, 3, 3), device), "channels_last")
    y = kernels.fake_quantize_channels(x, 4)
    for one, of_channel in zip(x, y, strict=True):
        expected = kernels.fake_quantize(one, one.min(), one.max(), 4)
        torch.testing.assert_close(of_channel, expected)
    assert y.stride() == x.stride()


def test_the_ends_of_a_channel_may_be_its_last_values(backend, device):
    """More values than a program holds at once: the range is that of all of them."""
    x = random_tensor((2, 5000), device)
    x[0, -1] = -9.0
    x[1, -1] = 9.0
    y = kernels.fake_quantize_channels(x, 4)
    assert abs(y[0].min() + 9) < 0.6  # half a step is at most 0.5: 0 lies on the grid
    assert abs(y[1].max() - 9) < 0.6


def test_values_that_are_no_numbers(backend, device):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.3], device=device)
    y = kernels.fake_quantize(x, *(end.to(device) for end in ENDS), 4)
    scale, zero = kernels.quantization_grid(*ENDS, 4)
    assert y[0].isnan()
    expected = scale * (torch.tensor([15.0, 0.0, 15.0, 2 + zero]) - zero)
    torch.testing.assert_close(y[1:].cpu(), expected)


def test_large_steps_of_large_values(backend, device):
    """Beyond 2^22 steps, where sums in fp32 round no more, values end at the grid's end."""
    x = torch.tensor([5e6, 3.1e7, -5e6, -3.1e7, 1e30], device=device)
    ends = torch.tensor(0.0, device=device), torch.tensor(15.0, device=device)
    assert kernels.fake_quantize(x, *ends, 4).tolist() == [15.0, 15.0, 0.0, 0.0, 15.0]


def test_a_range_of_no_width_has_no_infinite_step(backend, device):
    x = torch.zeros(3, 4, device=device)
    assert torch.equal(kernels.fake_quantize_channels(x, 4), x)
    scale, zero = kernels.quantization_grid(x[0], x[0], 4)
    assert scale.isfinite().all() and (scale > 0).all() and torch.equal(zero, x[0])
