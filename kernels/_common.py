"""What every op shares: the optional import of Triton, the choice of path, checks of arguments."""

import contextlib
import os

import torch


class _NoTriton:
    """Stands in for `triton` and `tl`, so that the kernel files can be imported and read."""

    constexpr = None

    @staticmethod
    def jit(function):
        return function


def _import_triton():
    """triton and triton.language, or what stands in for them where no kernel can run.

    Their import takes 0.3 s. Kernels run on GPUs or, as the variable says, in the interpreter.
    """
    if not (torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ):
        return _NoTriton, _NoTriton
    try:
        import triton
        import triton.language as tl
    except ImportError:  # there is no build for this platform
        return _NoTriton, _NoTriton
    return triton, tl


triton, tl = _import_triton()

# The interpreter runs the kernels on CPU tensors, one program after the other. It is meant for
# tests and far too slow for work.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_triton(x):
    """Whether `x` goes through the Triton kernels: on a GPU, or under TRITON_INTERPRET=1."""
    return x.is_cuda or INTERPRET


def on_device_of(x):
    """A context in which kernels run on the GPU of `x`, which may be another than the current one.

    Triton launches on the current device. Every launch stands in this context; torch.compile enters
    one of its own.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def check_float(op, **tensors):
    """Raise unless all arguments are non-empty tensors of an accepted dtype on one device.

    An argument that is None is skipped. float64 is refused because the kernels compute in float32;
    the definition `<op>_ref` accepts it.
    """
    given = {name: x for name, x in tensors.items() if x is not None}

    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: expected {name} in float32, float16 or bfloat16, got {x.dtype}; "
                f"convert it or use {op}_ref"
            )
        if x.numel() == 0:
            raise ValueError(
                f"{op}: expected a non-empty {name}, got shape {tuple(x.shape)}; "
                f"drop the empty batch"
            )

    devices = {name: str(x.device) for name, x in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: expected one device, got {devices}; move the tensors together")


def refuse_double_backward(op):
    """Raise where autograd wants to differentiate the gradient. Every backward calls this first."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: no second derivative; use {op}_ref")
