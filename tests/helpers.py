"""The measured-tolerance rule and the layouts that every op is tested in."""

import torch


def assert_as_exact_as_eager(kernel, exact, eager, name="value"):
    """|kernel - exact| <= 2 |eager - exact| + 4 eps max|exact|, in the max norm; NaN equals nothing.

    exact: the reference in float64 on the rounded inputs; eager: the reference in fp32, cast to the kernel's dtype.
    """
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    kernel64, exact64, eager64 = (t.detach().double().cpu() for t in (kernel, exact, eager.to(kernel.dtype)))
    error, measured = (kernel64 - exact64).abs().max(), (eager64 - exact64).abs().max()
    allowed = 2 * measured + 4 * torch.finfo(kernel.dtype).eps * exact64.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, eager {measured:.3g}, allowed {allowed:.3g}"


def lay_out(x, layout):
    """The values of 4-D `x` in another memory layout: same numbers, other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second row, all but the first column of a larger tensor
        N, C, H, W = x.shape
        big = torch.randn(N, C, 2 * H, W + 1, device=x.device).to(x.dtype)
        big[:, :, ::2, 1:] = x
        return big[:, :, ::2, 1:]
    if layout == "offset":  # starts one element into its storage: not 16-byte aligned
        flat = torch.zeros(x.numel() + 1, device=x.device, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == "expanded":  # stride 0 over the batch: all images share the first one's memory
        return x[:1].expand(x.shape)
    raise ValueError(layout)
