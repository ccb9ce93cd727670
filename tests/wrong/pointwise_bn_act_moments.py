"""Mutants that the tests of pointwise_bn_act_moments must catch."""

from wrong import Mutant

FILE = "pointwise_bn_act_moments.py"

MUTANTS = [
    Mutant(
        "rows beyond the last enter the moments",
        FILE,
        "mean = tl.sum(tl.where(mask, z, 0.0), 0) / count",
        "mean = tl.sum(z, 0) / count",
    ),
    Mutant(
        "deviations of rows beyond the last enter the variance",
        FILE,
        "delta = tl.where(mask, z - mean[None, :], 0.0)",
        "delta = z - mean[None, :]",
    ),
    Mutant(
        "all tiles count as full",
        FILE,
        "count = tl.sum(mask_m.to(tl.float32), 0)",
        "count = tl.sum(tl.zeros((BLOCK_M,), tl.float32) + 1.0, 0)",
    ),
    Mutant(
        "the last step of the product alone",
        FILE,
        "acc = tl.dot(x, w, acc, input_precision=PRECISION)",
        "acc = tl.dot(x, w, input_precision=PRECISION)",
    ),
    Mutant(
        "the last step of the backward product alone",
        FILE,
        "acc = tl.dot(dz, w, acc, input_precision=PRECISION)",
        "acc = tl.dot(dz, w, input_precision=PRECISION)",
    ),
    Mutant(
        "moments of the output before rounding",
        FILE,
        "z = stored.to(tl.float32) - shift[None, :]",
        "z = acc - shift[None, :]",
        test="test_moments_are_those_of_the_stored_output",
    ),
    Mutant(
        "every tile of positions reads the first rows of x",
        FILE,
        "x_ptr += first * stride_xm",
        "x_ptr += 0 * stride_xm",
    ),
    Mutant(
        "strides of the weight exchanged",
        FILE,
        "offs = offs_k[:, None] * stride_wk + offs_c[None, :] * stride_wc",
        "offs = offs_k[:, None] * stride_wc + offs_c[None, :] * stride_wk",
    ),
    Mutant(
        "gradient of the mean ignored",
        FILE,
        "dz = g * scale[None, :] + a[None, :] + b[None, :]",
        "dz = g * scale[None, :] + b[None, :]",
    ),
    Mutant(
        "the second reader's gradient ignored",
        FILE,
        """if HAS_DY_AGAIN:
            offs""",
        """if False:
            offs""",
        test="test_gradients_of_two_readers_are_added",
    ),
    Mutant(
        "the residual's gradient is that of y",
        FILE,
        'is_dy_itself = ctx.activation == "none" and not has_again',
        "is_dy_itself = True",
        test="test_many_tiles_and_steps_of_the_products",
    ),
    Mutant(
        "alignment of the channels not looked at",
        FILE,
        "if stride_c != 1 or stride_m % 8 != 0 or matrix.size(1) % 8 != 0:",
        "if stride_c != 1 or stride_m % 8 != 0:",
        test="test_alignment_divides_sizes_and_rows",
    ),
    Mutant(
        "weight not transposed in the backward pass on a CPU",
        FILE,
        "dx = _multiply_on_cpu(dz, conv_matrix.T)",
        "dx = _multiply_on_cpu(dz, conv_matrix.reshape(conv_matrix.T.shape))",
    ),
    Mutant(
        "TF32 unless it is switched off",
        FILE,
        """return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee\"""",
        """return "ieee" if torch.backends.cudnn.conv.fp32_precision == "ieee" else "tf32\"""",
        test="test_tf32_only_where_convolutions_take_it",
    ),
    Mutant(
        "the output is a view of a matrix",
        FILE,
        "    return y, z, partial\n",
        "    return y.permute(0, 2, 3, 1).flatten(0, 2).view(y.permute(0, 2, 3, 1).shape)"
        ".permute(0, 3, 1, 2), z, partial\n",
        test="test_output_may_be_modified_in_place",
    ),
    Mutant(
        "a weight of another dtype taken",
        FILE,
        " or conv_weight.dtype != x.dtype",
        "",
        test="test_other_arguments_are_refused",
    ),
]
