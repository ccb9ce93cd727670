"""Mutants that the tests of kl_divergence must notice."""

from wrong import Mutant

FILE = "kl_divergence.py"

MUTANTS = [
    Mutant(
        "definition of KL(Q || P)",
        FILE,
        "return (log_p.exp() * (log_p - log_q)).sum(1).mean()",
        "return (log_q.exp() * (log_q - log_p)).sum(1).mean()",
    ),
    Mutant(
        "mean over classes too",
        FILE,
        "tl.sum(kl) * inv_n",
        "tl.sum(kl) * inv_n / K",
    ),
    Mutant(
        "third coefficient of the series",
        FILE,
        "d * (1 / 12 + d",
        "d * (1 / 13 + d",
    ),
    Mutant(
        "series taken where it does not hold",
        FILE,
        "near = tl.abs(d) < 1.0",
        "near = tl.abs(d) < 4.0",
    ),
    Mutant(
        "gradient of P without KL of the row",
        FILE,
        "dp = grad * p * (sum_pd[:, None] - d)",
        "dp = grad * p * (0.0 - d)",
    ),
    Mutant(
        "gradient of Q from rounded probabilities",
        FILE,
        "q_less_p = tl.where(near, p * (d + h), q - p)",
        "q_less_p = q - p",
        test="test_gradients_of_nearly_equal_logits",
    ),
    Mutant(
        "missing gradient of the result",
        FILE,
        "grad = tl.load(grad_ptr).to(tl.float32) * scale",
        "grad = scale",
    ),
    Mutant(
        "gradient of Q with the other sign on the CPU",
        FILE,
        "dq = log_q.exp_().sub_(p)",
        "dq = -log_q.exp_().sub_(p)",
    ),
    Mutant(
        "missing temperature in the gradients on the CPU",
        FILE,
        "scale = 1 / (temperature * len(p))",
        "scale = 1 / len(p)",
    ),
    Mutant(
        "class that P rules out not skipped on the CPU",
        FILE,
        ".masked_fill_(log_p == -math.inf, 0)",
        "",
    ),
    Mutant(
        "infinite log Q - log P",
        "_logits.py",
        "d = tl.where(d > 128.0, 128.0, d)",
        "d = d",
        test="test_class_that_q_alone_rules_out",
    ),
    Mutant(
        "digits of nearly equal rows lost",
        "_logits.py",
        "close = tl.abs(max_q - max_p) < 1.0",
        "close = tl.abs(max_q - max_p) < 0.0",
        test="test_gradients_of_nearly_equal_logits",
    ),
    Mutant(
        "logits multiplied by the temperature",
        "_logits.py",
        "        1 / temperature,\n",
        "        temperature,\n",
    ),
    Mutant(
        "missing temperature in the gradients",
        "_logits.py",
        "factor / (ctx.temperature * N)",
        "factor / N",
    ),
    Mutant(
        "logits rounded to half precision",
        "_logits.py",
        'other=float("-inf")).to(tl.float32)',
        'other=float("-inf")).to(tl.float16)',
    ),
    Mutant(
        "rows beyond the batch counted",
        "_logits.py",
        "return tl.where(row_mask, third, 0.0)",
        "return third",
    ),
    Mutant(
        "second derivative not refused",
        "_logits.py",
        "    _common.refuse_double_backward(op)\n",
        "",
    ),
]
