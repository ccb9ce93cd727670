"""Mutants that the tests of bn_moments and bn_moment_loss must catch."""

from wrong import Mutant

FILE = "bn_moments.py"
SHARED = "_channels.py"

MUTANTS = [
    Mutant(
        "unbiased variance",
        SHARED,
        "m2 / tl.maximum(count, 1.0)",
        "m2 / tl.maximum(count - 1.0, 1.0)",
    ),
    Mutant(
        "lanes without a value change their mean",
        SHARED,
        "delta = tl.where(mask, x - mean, 0.0)",
        "delta = x - mean",
        test="test_programs_that_loop_over_rows",
    ),
    Mutant(
        "mean accumulated in fp16",
        SHARED,
        "new_mean = mean + delta * (1.0 / step)",
        "new_mean = (mean + delta * (1.0 / step)).to(tl.float16).to(tl.float32)",
    ),
    Mutant(
        "groups merged without the distance of their means",
        SHARED,
        "pooled_m2 = tl.sum(m2 + count * delta * delta, 0)",
        "pooled_m2 = tl.sum(m2, 0)",
    ),
    Mutant(
        "blocks of partials merged with equal weights",
        SHARED,
        "mean += delta * share",
        "mean += delta * 0.5",
    ),
    Mutant(
        "partials of a layer read where another's lie",
        SHARED,
        "begin += 3 * n_partials * n_channels",
        "begin += n_partials * n_channels",
        test="test_layers_merged_at_once_are_those_merged_alone",
    ),
    Mutant(
        "masked partials are not neutral",
        SHARED,
        "tl.load(offs + stride_part, mask=mask, other=0.0)",
        'tl.load(offs + stride_part, mask=mask, other=float("nan"))',
    ),
    Mutant(
        "zero for a shift where none is given",
        FILE,
        "return _BNMoments.apply(x, x.detach()[first].contiguous())",
        "return _BNMoments.apply(x, torch.zeros_like(x.detach()[first]))",
    ),
    Mutant(
        "gradient of the variance halved",
        FILE,
        "* (2.0 * inverse_n)",
        "* inverse_n",
    ),
    Mutant(
        "gradients of mean and variance swapped",
        FILE,
        "torch.stack((grad_mean, grad_var))",
        "torch.stack((grad_var, grad_mean))",
    ),
    Mutant(
        "gradient with a rounded mean",
        FILE,
        "dx = a + b * (x - shift - mean)",
        "dx = a + b * (x - (shift + mean))",
    ),
    Mutant(
        "gradient of the loss ignored",
        FILE,
        "units * grad, ctx.dtype)",
        "units, ctx.dtype)",
    ),
    Mutant(
        "gradient of a norm at zero",
        FILE,
        "distance / norms.masked_fill(norms == 0, math.inf)",
        "distance / norms",
    ),
    Mutant(
        "loss of squared norms",
        FILE,
        "return norms.sum()",
        "return norms.square().sum()",
    ),
    Mutant(
        "one pass on the CPU where the mean is far from zero",
        FILE,
        "float(surplus.min()) < 0",
        "False",
    ),
    Mutant(
        "one pass on the CPU without the distance of the columns",
        FILE,
        "torch.addcmul(var, delta, delta)",
        "var",
    ),
]
