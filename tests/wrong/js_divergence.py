"""Mutants that the tests of js_divergence must notice."""

from wrong import Mutant

FILE = "js_divergence.py"

MUTANTS = [
    Mutant(
        "definition with the KL reversed",
        FILE,
        "(log_q.exp() * (log_q - log_m)).sum(1)",
        "(log_m.exp() * (log_m - log_q)).sum(1)",
    ),
    Mutant(
        "released variant without the clamp of M",
        FILE,
        "m = m.clamp(0.01, 0.99)",
        "m = m.clamp_min(0)",
    ),
    Mutant(
        "twice the value",
        FILE,
        "(0.25 * inv_n)",
        "(0.5 * inv_n)",
    ),
    Mutant(
        "series taken where it does not hold",
        FILE,
        "near = size < 1.0",
        "near = size < 4.0",
    ),
    Mutant(
        "fifth coefficient of the series of g",
        FILE,
        "tail = 62 / 1575 +",
        "tail = 60 / 1575 +",
        test="test_both_sides_of_the_bound_of_the_series",
    ),
    Mutant(
        "Q of a ruled-out class not bounded",
        FILE,
        "d = tl.where(d < -128.0, -128.0, d)",
        "d = d",
        test="test_classes_that_one_side_rules_out",
    ),
    Mutant(
        "gradient of P without KL of the row",
        FILE,
        "dp = grad * p * (p_over_m - kl_p[:, None])",
        "dp = grad * p * p_over_m",
    ),
    Mutant(
        "gradient of Q with KL of P",
        FILE,
        "(q_over_m - kl_q[:, None])",
        "(q_over_m - kl_p[:, None])",
    ),
    Mutant(
        "missing gradient of the result",
        FILE,
        "grad = tl.load(grad_ptr).to(tl.float32) * scale",
        "grad = scale",
    ),
    Mutant(
        "mean over classes too on the CPU",
        FILE,
        "scale = 1 / (2 * len(p))",
        "scale = 1 / (2 * p.numel())",
    ),
    Mutant(
        "missing temperature in a gradient on the CPU",
        FILE,
        "dq = q_over_m.sub_(kl_q).mul_(q).mul_(scale / temperature)",
        "dq = q_over_m.sub_(kl_q).mul_(q).mul_(scale)",
    ),
    Mutant(
        "tile filled with 0 beyond the classes",
        "_logits.py",
        'tl.load(ptrs, mask=mask, other=float("-inf"))',
        "tl.load(ptrs, mask=mask, other=0.0)",
    ),
    Mutant(
        "sum of exponentials not rescaled to a new maximum",
        "_logits.py",
        "row_sum *= tl.exp((row_max - shift) * inv_temperature)",
        "row_sum *= 1.0",
    ),
    Mutant(
        "class that both rule out not skipped",
        "_logits.py",
        'd = tl.where((p_logits == float("-inf")) & (q_logits == float("-inf")), 0.0, d)',
        "d = d",
    ),
    Mutant(
        "last block of a long row alone in the value",
        "_logits.py",
        "third += next_third",
        "third = next_third",
    ),
]
