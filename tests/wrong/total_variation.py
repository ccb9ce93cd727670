"""Mutants that the tests of total_variation must catch."""

from wrong import Mutant

FILE = "total_variation.py"

MUTANTS = [
    Mutant(
        "differences wrap around at the right border",
        FILE,
        "has_right = (rows < H) & (cols < L - step)",
        "has_right = (rows < H) & (cols < L)",
    ),
    Mutant(
        "gradient of l1 ignored",
        FILE,
        "grad_l1 = tl.load(grad_l1_ptr).to(tl.float32)",
        "grad_l1 = 1.0",
    ),
]
