"""Mutants that the tests of jittered_view must notice."""

from wrong import Mutant

FILE = "jittered_view.py"

MUTANTS = [
    Mutant(
        "definition that rolls the other way",
        FILE,
        "(rows - draw[0]) % H",
        "(rows + draw[0]) % H",
    ),
    Mutant(
        "definition that mirrors before it rolls",
        FILE,
        "(columns - draw[1]) % W",
        "(columns + torch.where(draw[2] != 0, draw[1], -draw[1])) % W",
    ),
    Mutant(
        "mirrored the wrong way round",
        FILE,
        "tl.where(mirrored != 0, W - 1 - j, j)",
        "tl.where(mirrored == 0, W - 1 - j, j)",
    ),
    Mutant(
        "rolled to the left",
        FILE,
        "dx = ((tl.load(draw_ptr + 1) % W + W) % W)",
        "dx = ((-tl.load(draw_ptr + 1) % W + W) % W)",
    ),
    Mutant(
        "rolled downwards by the number of columns",
        FILE,
        "dy = ((tl.load(draw_ptr) % H + H) % H)",
        "dy = ((tl.load(draw_ptr + 1) % H + H) % H)",
    ),
    Mutant(
        "seam of the roll left out of the gradient",
        FILE,
        "has_left = here & (j > 0)",
        "has_left = here & (j > 0) & (cols >= step)",
    ),
    Mutant(
        "new border counted in the gradient",
        FILE,
        "has_above = here & (i > 0)",
        "has_above = here & (rows > 0)",
    ),
    Mutant(
        "row above the first is the first",
        FILE,
        "above = tl.where(rows > 0, rows - 1, H - 1)",
        "above = tl.where(rows > 0, rows - 1, 0)",
    ),
    Mutant(
        "sum of the norms of images",
        FILE,
        "return view, tv_l1, norms.sum(), image_norms.mean()",
        "return view, tv_l1, norms.sum(), image_norms.sum()",
    ),
    Mutant(
        "gradient of a sum of the norms of images",
        FILE,
        "            1 / len(x),\n",
        "            1.0,\n",
    ),
    Mutant(
        "gradients of l1 and l2 swapped",
        FILE,
        "grads = [grad_l1, grad_l2, grad_norm]",
        "grads = [grad_l2, grad_l1, grad_norm]",
    ),
    Mutant(
        "gradient of the view left where it is on the CPU",
        FILE,
        "_gather(gradient, rows.argsort(), columns.argsort())",
        "_gather(gradient, rows, columns)",
    ),
    Mutant(
        "gradient of the view forgotten on the CPU",
        FILE,
        "            gradient.add_(dview)\n",
        "            pass\n",
    ),
    Mutant(
        "priors of the rounded view on the CPU",
        FILE,
        "tv_l1, norms = forward_torch(view)",
        "tv_l1, norms = forward_torch(view.to(dtype).float())",
    ),
    Mutant(
        "division by the norm of a black image on the CPU",
        FILE,
        "torch.where(image_norms == 0, 0.0, grad_norm / (len(view) * image_norms))",
        "grad_norm / (len(view) * image_norms)",
    ),
]
