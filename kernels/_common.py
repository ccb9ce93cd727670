"""What every op shares: the optional Triton import, the choice of path, and the checks of arguments."""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: the CPU path still works

    class _NoTriton:
        """Stands in for `triton` and `tl` so that kernel files can be imported and read."""

        constexpr = None

        @staticmethod
        def jit(function):
            return function

    triton = tl = _NoTriton

# The interpreter runs the kernels on CPU tensors, program by program: for tests, far too slow for work.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x):
    """True where `x` goes through the Triton kernels: on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return x.is_cuda or INTERPRET


def check_float(op, **tensors):
    """Raise unless all arguments are non-empty floating-point tensors on one device (None is passed over).

    float64 belongs to the references: the kernels compute in fp32.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{op}: expected {name} in float32, float16 or bfloat16, got {x.dtype}; convert it or use {op}_ref"
            )
        if x.numel() == 0:
            raise ValueError(f"{op}: expected a non-empty {name}, got shape {tuple(x.shape)}; drop the empty batch")
    devices = {name: str(x.device) for name, x in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: expected one device, got {devices}; move the tensors together")


def refuse_double_backward(op):
    """To be called first in every backward: the analytic gradients are not differentiable themselves."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: no second derivative; use {op}_ref")
