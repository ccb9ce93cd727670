"""Mutants that the tests of moment_distance must catch."""

from wrong import Mutant

FILE = "moment_distance.py"
LOAD = "distance = load_distances(moments_ptr, running_var_ptr, row, offs, mask, n_channels)"

MUTANTS = [
    Mutant(
        "squared norms",
        FILE,
        "norm = tl.sqrt(tl.sum(total, 0))",
        "norm = tl.sum(total, 0)",
    ),
    Mutant(
        "squares accumulated in fp16",
        FILE,
        "total += distance * distance",
        "total += (distance * distance).to(tl.float16).to(tl.float32)",
    ),
    Mutant(
        "a layer reads on into the next",
        FILE,
        f"mask = offs < end\n        {LOAD}\n        total",
        f"mask = offs < n_channels\n        {LOAD}\n        total",
    ),
    Mutant(
        "running variance subtracted from the means",
        FILE,
        "mask=mask & (row == 1)",
        "mask=mask",
    ),
    Mutant(
        "weights ignored",
        FILE,
        "norm * tl.load(weights_ptr + layer)",
        "norm",
    ),
    Mutant(
        "weights ignored in the gradient",
        FILE,
        "tl.load(grad_ptr).to(tl.float32) * tl.load(weights_ptr + layer)",
        "tl.load(grad_ptr).to(tl.float32)",
    ),
    Mutant(
        "gradient of the result ignored",
        FILE,
        "tl.load(grad_ptr).to(tl.float32) *",
        "1.0 *",
    ),
    Mutant(
        "gradient of a norm at zero",
        FILE,
        "scale = tl.where(norm == 0.0, 0.0, grad / tl.where(norm == 0.0, 1.0, norm))",
        "scale = grad / norm",
    ),
    Mutant(
        "gradient of a norm at zero on the CPU",
        FILE,
        "norms.masked_fill(norms == 0, torch.inf)",
        "norms",
    ),
]
