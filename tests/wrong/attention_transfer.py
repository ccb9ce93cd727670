"""Mutants that the tests of attention_map and attention_transfer must notice."""

from wrong import Mutant

FILE = "attention_transfer.py"

MUTANTS = [
    # attention_map
    Mutant(
        "definition with rows and columns swapped",
        FILE,
        "m = x.square().mean(1).flatten(1)",
        "m = x.square().mean(1).mT.flatten(1)",
    ),
    Mutant(
        "sum over the channels in place of the mean",
        FILE,
        "tl.sum(acc, 1) * inv_c",
        "tl.sum(acc, 1)",
    ),
    Mutant(
        "tile filled with 1 beyond the channels",
        FILE,
        "x = tl.load(x_ptrs + offs_c[None, :] * stride_xc, mask=mask, other=0.0)",
        "x = tl.load(x_ptrs + offs_c[None, :] * stride_xc, mask=mask, other=1.0)",
    ),
    Mutant(
        "squares in half precision",
        FILE,
        "acc += x * x",
        "acc += (x * x).to(tl.float16)",
    ),
    Mutant(
        "half the gradient",
        FILE,
        "*x_strides, 2 / C, **meta",
        "*x_strides, 1 / C, **meta",
    ),
    Mutant(
        "gradient along the map not removed",
        FILE,
        "torch.addcmul(dq, q, along_q, value=-1)",
        "torch.addcmul(dq, q, along_q, value=0)",
    ),
    Mutant(
        "gradient along the map removed below eps too",
        FILE,
        ".masked_fill_(norm < eps, 0.0)",
        "",
    ),
    Mutant(
        "norm not divided by the channels on the CPU",
        FILE,
        "torch.linalg.vector_norm(x, dim=1).square_().div_(C)",
        "torch.linalg.vector_norm(x, dim=1).square_()",
    ),
    Mutant(
        "sum over few channels on the CPU",
        FILE,
        "x.new_full((C,), 1 / C)",
        "x.new_full((C,), 1.0)",
    ),
    Mutant(
        "images of positions taken for one run",
        FILE,
        "all(t.stride(0) == H * W * t.stride(axis) for t in tensors)",
        "all(t.stride(0) >= H * W * t.stride(axis) for t in tensors)",
    ),
    # attention_transfer
    Mutant(
        "absolute in place of squared differences",
        FILE,
        "loss += d * d",
        "loss += tl.abs(d)",
    ),
    Mutant(
        "mean over the batch alone",
        FILE,
        "            1 / target.numel(),\n",
        "            1 / N,\n",
    ),
    Mutant(
        "half the gradient of the loss",
        FILE,
        "scale = 2.0 * inv_n / divisor",
        "scale = inv_n / divisor",
    ),
    Mutant(
        "gradient along the map kept by the kernel",
        FILE,
        "scale * (d - q * along_q)",
        "scale * d",
    ),
    Mutant(
        "gradient along the map removed below eps by the kernel",
        FILE,
        "along_q = tl.where(norm < eps, 0.0, tl.sum(inner))",
        "along_q = tl.sum(inner)",
    ),
    Mutant(
        "missing gradient of the loss",
        FILE,
        "dm *= tl.load(grad_ptr).to(tl.float32)",
        "dm *= 1.0",
    ),
    Mutant(
        "missing gradient of the loss on the CPU",
        FILE,
        "factor = 2 / C if grad is None else grad * (2 / C)",
        "factor = 2 / C",
    ),
    Mutant(
        "gradient of a sum of squares on the CPU",
        FILE,
        "d * (2 / d.numel())",
        "d * 2",
    ),
    Mutant(
        "divided by eps where the norm is larger",
        FILE,
        "divisor = tl.where(norm < eps, eps, norm)",
        "divisor = tl.where(norm < eps, norm, eps)",
    ),
]
