"""Mutants that the tests of moment_distance must catch."""

from wrong import Mutant

FILE = "moment_distance.py"
MUTANTS = [
    Mutant(
        "squared norms",
        FILE,
        "value = tl.sqrt_rn(tl.sum(total, 0))",
        "value = tl.sum(total, 0)",
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
        "mask = offs < end\n        moment, distance",
        "mask = offs < n_channels\n        moment, distance",
    ),
    Mutant(
        "running variance subtracted from the means",
        FILE,
        "tl.where(row == 1, stored, 0.0)",
        "stored",
    ),
    Mutant(
        "weights ignored",
        FILE,
        "value * tl.load(weights_ptr + layer)",
        "value",
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
        "scale = tl.where(divisor == 0.0, 0.0, grad / tl.where(divisor == 0.0, 1.0, divisor))",
        "scale = grad / divisor",
    ),
    Mutant(
        "gradient of a norm at zero on the CPU",
        FILE,
        "divisors.masked_fill(divisors == 0, torch.inf)",
        "divisors",
    ),
    Mutant(
        "relative to the norm of the running variance in both rows",
        FILE,
        "size += tl.where(row == 0, stored, stored * stored)",
        "size += stored * stored",
    ),
    Mutant(
        "relative distances with the gradient of the norms",
        FILE,
        "divisor = value * unit",
        "divisor = value",
    ),
    Mutant(
        "kl summed over channels",
        FILE,
        "divisor = (2 * (end - begin)).to(tl.float32)",
        "divisor = 2.0",
    ),
    Mutant(
        "one eps for all layers",
        FILE,
        "eps = tl.load(eps_ptr + layer)\n    total",
        "eps = 1e-5\n    total",
    ),
    Mutant(
        "one eps for all layers in the gradient",
        FILE,
        "eps = tl.load(eps_ptr + layer)\n    divisor",
        "eps = 1e-5\n    divisor",
    ),
    Mutant(
        "the wrong direction of the divergence",
        FILE,
        "slope / (moment + eps)",
        "slope / (stored + eps)",
    ),
]
