"""Mutants that the tests of fake_quantize and fake_quantize_channels must notice."""

from wrong import Mutant

FILE = "fake_quantize.py"

MUTANTS = [
    Mutant(
        "definition with one value more than 2^bits",
        FILE,
        "scale = ((high - low) / (2**bits - 1))",
        "scale = ((high - low) / 2**bits)",
    ),
    Mutant(
        "range of no width divides by zero",
        FILE,
        ".clamp_min(LEAST_SCALE)",
        "",
    ),
    Mutant(
        "zero is no integer",
        FILE,
        "return scale, (-low / scale).round()",
        "return scale, -low / scale",
    ),
    Mutant(
        "definition with a slope everywhere",
        FILE,
        "inside = x32.clamp(low.clamp_max(0), high.clamp_min(0))",
        "inside = x32 * 1",
    ),
    Mutant(
        "definition with one range for all channels",
        FILE,
        "rows.amin(1).view(shape), rows.amax(1).view(shape), bits)",
        "rows.amin().view(shape), rows.amax().view(shape), bits)",
    ),
    Mutant(
        "rounded down",
        FILE,
        "return (x + 12582912.0) - 12582912.0",
        "return tl.floor(x)",
    ),
    Mutant(
        "halves rounded up",
        FILE,
        "return (x + 12582912.0) - 12582912.0",
        "return tl.floor(x + 0.5)",
        test="test_values_and_slopes_by_hand",
    ),
    Mutant(
        "zero not rounded in the kernels",
        FILE,
        "return scale, _round(tl.div_rn(-low, scale))",
        "return scale, tl.div_rn(-low, scale)",
    ),
    Mutant(
        "not clamped at the upper end",
        FILE,
        "q = tl.minimum(tl.maximum(q, 0.0), n_steps)",
        "q = tl.maximum(q, 0.0)",
    ),
    Mutant(
        "slope everywhere",
        FILE,
        "dx = tl.where((x >= low) & (x <= high), dy, 0.0)",
        "dx = dy",
    ),
    Mutant(
        "no slope at the range's end",
        FILE,
        "(x >= low) & (x <= high)",
        "(x >= low) & (x < high)",
    ),
    Mutant(
        "values beyond the tensor count for the range",
        FILE,
        "return tl.load(x_ptr + offs, mask=values < n_values, other=0.0)",
        "return tl.load(x_ptr + offs, mask=values < n_values, other=99.0)",
    ),
    Mutant(
        "range without 0",
        FILE,
        "lows = tl.minimum(x, 0.0)",
        "lows = x",
        test="test_channels_by_hand",
    ),
    Mutant(
        "range of a channel's first block alone",
        FILE,
        "lows = tl.minimum(lows, more)",
        "lows = lows",
        test="test_the_ends_of_a_channel_may_be_its_last_values",
    ),
    Mutant(
        "channels read at the strides of the result",
        FILE,
        "strides.append(tensor.stride(0))",
        "strides.append(y.stride(0))",
    ),
    Mutant(
        "zero left out on the CPU",
        FILE,
        ".sub_(zero)",
        "",
    ),
    Mutant(
        "no gradient of the result on the CPU",
        FILE,
        "dx.eq_(x32).mul_(dy)",
        "dx.eq_(x32)",
    ),
    Mutant(
        "range of all channels on the CPU",
        FILE,
        "low, high = x.flatten(1).aminmax(dim=1)",
        "low, high = (end.expand(len(x)) for end in x.aminmax())",
    ),
    Mutant(
        "second derivative not refused",
        FILE,
        '    _common.refuse_double_backward("fake_quantize_channels")\n',
        "    pass\n",
    ),
]
