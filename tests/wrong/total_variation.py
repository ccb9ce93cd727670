"""Mutants that the tests of total_variation must notice."""

from wrong import Mutant

FILE = "total_variation.py"

MUTANTS = [
    Mutant(
        "one diagonal twice",
        FILE,
        "(x[..., 1:, :-1], x[..., :-1, 1:])",
        "(x[..., 1:, 1:], x[..., :-1, :-1])",
    ),
    Mutant(
        "definition with squared norms",
        FILE,
        "sum(torch.linalg.vector_norm(d) for d in differences)",
        "sum(d.square().sum() for d in differences)",
    ),
    Mutant(
        "mean over pixels in place of differences",
        FILE,
        "horizontal = N * C * H * (W - 1)",
        "horizontal = N * C * H * W",
    ),
    Mutant(
        "diagonal wraps around the right border",
        FILE,
        "has_both = (rows < H - 1) & (cols < L - step)",
        "has_both = (rows < H - 1) & (cols < L)",
    ),
    Mutant(
        "anti-diagonal from the wrong pixel",
        FILE,
        "d_a = tl.where(has_both, x10 - x01, 0.0)",
        "d_a = tl.where(has_both, x11 - x01, 0.0)",
    ),
    Mutant(
        "norms squared",
        FILE,
        "norms = partials[1:].sum(1).sqrt()",
        "norms = partials[1:].sum(1)",
    ),
    Mutant(
        "sign of zero",
        FILE,
        "tl.where(d > 0, weight_l1, tl.where(d < 0, -weight_l1, 0.0))",
        "tl.where(d > 0, weight_l1, -weight_l1)",
    ),
    Mutant(
        "division by a norm of zero",
        FILE,
        "return tl.where(norm == 0, 0.0, grad / tl.where(norm == 0, 1.0, norm))",
        "return grad / norm",
    ),
    Mutant(
        "norms of the diagonals confused in the gradient",
        FILE,
        "a2 = norm_weight(grad_l2, norms_ptr + 3)",
        "a2 = norm_weight(grad_l2, norms_ptr + 2)",
    ),
    Mutant(
        "missing gradient of l1",
        FILE,
        "grad_l1 = tl.load(grad_l1_ptr).to(tl.float32)",
        "grad_l1 = 1.0",
    ),
    Mutant(
        "gradient of a result that no loss uses",
        FILE,
        "grad_l2 = norms.new_zeros(())",
        "grad_l2 = norms.new_ones(())",
        test="test_loss_of_one_result_alone",
    ),
    Mutant(
        "neighbours across the channels of channels_last",
        FILE,
        "return (N, 1, H, W * C), C, strides",
        "return (N, 1, H, W * C), 1, strides",
    ),
    Mutant(
        "l1 and l2 swapped on the CPU",
        FILE,
        "return backward_torch(x, norms, grad_l1, grad_l2)",
        "return backward_torch(x, norms, grad_l2, grad_l1)",
    ),
    Mutant(
        "subtrahend without its share on the CPU",
        FILE,
        "        to_subtrahend -= slope\n",
        "",
    ),
]
