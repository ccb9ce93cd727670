"""Mutants that the tests of bn_act_moments must catch."""

from wrong import Mutant

FILE = "bn_act_moments.py"

MUTANTS = [
    Mutant(
        "gradient where the ReLU is zero",
        FILE,
        """stored = u.to(DTYPE).to(tl.float32)
        g = tl.where(stored <= 0.0, 0.0, g)
    if ACTIVATION == "relu6":""",
        """stored = u.to(DTYPE).to(tl.float32)
        g = tl.where(stored < 0.0, 0.0, g)
    if ACTIVATION == "relu6":""",
        test="test_values_and_slopes_at_the_borders",
    ),
    Mutant(
        "mask of the ReLU before rounding",
        FILE,
        """if ACTIVATION == "relu":
        stored = u.to(DTYPE).to(tl.float32)""",
        """if ACTIVATION == "relu":
        stored = u""",
        test="test_no_gradient_where_y_rounds_to_zero",
    ),
    Mutant(
        "ReLU swallows NaN",
        FILE,
        """if ACTIVATION == "relu":
        u = tl.where(u < 0.0, 0.0, u)""",
        """if ACTIVATION == "relu":
        u = tl.where(u > 0.0, u, 0.0)""",
        test="test_nan_shows_in_its_pixel_and_channel",
    ),
    Mutant(
        "gradient of the mean ignored",
        FILE,
        "dx = g * scale + a + b * (x - mean)",
        "dx = g * scale + b * (x - mean)",
        test="test_value_and_gradient_computed_by_hand",
    ),
    Mutant(
        "variance in place of the mean",
        FILE,
        "torch.cat((grads, moments[:1]))",
        "torch.cat((grads, moments[1:]))",
    ),
    Mutant(
        "rows of the gradient taken as adjacent",
        FILE,
        " rows.stride(0),",
        " rows.size(1),",
        test="test_moments_of_two_layers_merged_at_once",
    ),
    Mutant(
        "lanes without a value enter the moments",
        FILE,
        "count += mask_row.to(tl.float32)",
        "count += 1.0",
        test="test_moments_of_two_layers_merged_at_once",
    ),
    Mutant(
        "residual read with the strides of y",
        FILE,
        """*y_strides,
            *other_strides,""",
        """*y_strides,
            *y_strides,""",
    ),
    Mutant(
        "eps ignored",
        FILE,
        "torch.rsqrt(running_var.float() + eps)",
        "torch.rsqrt(running_var.float() + 1e-5)",
    ),
    Mutant(
        "residual gets the gradient before the ReLU on the CPU",
        FILE,
        "dresidual = g if",
        "dresidual = dy if",
    ),
    Mutant(
        "residual of another dtype taken",
        FILE,
        " or residual.dtype != dtype",
        "",
        test="test_other_arguments_are_refused",
    ),
    Mutant(
        "output in another layout than x",
        FILE,
        "y = torch.empty_like(x)",
        "y = torch.empty(x.shape, device=x.device, dtype=x.dtype)",
        test="test_output_and_gradient_keep_the_layout_of_x",
    ),
    Mutant(
        "gradient of ReLU6 at its upper border",
        FILE,
        "g = tl.where(stored >= 6.0, 0.0, g)",
        "g = tl.where(stored > 6.0, 0.0, g)",
        test="test_values_and_slopes_at_the_borders",
    ),
    Mutant(
        "slope of SiLU without its second term",
        FILE,
        "g = g * sigmoid * (1.0 + u * (1.0 - sigmoid))",
        "g = g * sigmoid",
    ),
    Mutant(
        "slope of hardswish at its lower border",
        FILE,
        "tl.where(u <= -3.0, 0.0, u * (1.0 / 3.0) + 0.5)",
        "tl.where(u < -3.0, 0.0, u * (1.0 / 3.0) + 0.5)",
    ),
    Mutant(
        "slope of SiLU without the residual",
        FILE,
        "u += saved",
        "u += 0.0",
    ),
    Mutant(
        "saved residual read with the strides of dx",
        FILE,
        """*dy_strides,
            *other_strides,""",
        """*dy_strides,
            *dx_strides,""",
        test="test_matches_the_definition",
    ),
    Mutant(
        "moments saved in a way that hides their changes",
        FILE,
        "ctx.save_for_backward(moments)",
        "ctx.save_for_backward(moments.data)",
        test="test_a_change_in_place_is_noticed_or_does_not_matter",
    ),
    Mutant(
        "output kept where nothing follows it",
        FILE,
        """        y = u
        saved = None""",
        """        y = u
        saved = y""",
    ),
    Mutant(
        "channels in another order on the CPU",
        FILE,
        "scale = scale.repeat(n_positions)",
        "scale = scale.repeat_interleave(n_positions)",
    ),
    Mutant(
        "the second reader's gradient is lost in the kernel",
        FILE,
        "g += tl.load(dy_again_ptr",
        "g += 0.0 * tl.load(dy_again_ptr",
        test="test_gradients_of_two_readers_are_added",
    ),
    Mutant(
        "the second reader's gradient is lost on the CPU",
        FILE,
        "    if dy_again is not None:\n        dy = dy + dy_again",
        "    if dy_again is not None:\n        pass",
    ),
    Mutant(
        "the second reader's gradient is lost where it is the only one",
        FILE,
        "dy, dy_again = dy_again, None",
        "dy_again = None",
    ),
    Mutant(
        "a second gradient of other strides is read as if it had the first one's",
        FILE,
        "if dy_again is not None and dy_again.stride() != dy.stride():",
        "if False:",
        test="test_gradients_of_two_readers_are_added",
    ),
]
