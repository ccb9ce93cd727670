"""Mutants that the tests of fuse_batchnorm and hook_batchnorm must catch."""

from wrong import Mutant

FILE = "fuse_batchnorm.py"

MUTANTS = [
    Mutant(
        "a ReLU is lost",
        FILE,
        "FusedBatchNorm(bn, relu is not None, found)",
        "FusedBatchNorm(bn, False, found)",
    ),
    Mutant(
        "the ReLU after an addition that broadcasts is lost",
        FILE,
        "if self.relu:",
        "if False:",
    ),
    Mutant(
        "an addition that scales is fused",
        FILE,
        "if not is_sum or len(node.args) != 2 or node.kwargs:",
        "if not is_sum or len(node.args) != 2:",
    ),
    Mutant(
        "every method is taken for a ReLU",
        FILE,
        'return node.op == "call_method" and node.target == "relu"',
        'return node.op == "call_method"',
    ),
    Mutant(
        "sums written with a plus are not fused",
        FILE,
        "ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}",
        "ADD_FUNCTIONS = {torch.add}",
    ),
    Mutant(
        "one eps for all layers",
        FILE,
        "bn.running_var, bn.eps)",
        "bn.running_var, 1e-5)",
    ),
    Mutant(
        "other kinds of BatchNorm are replaced too",
        FILE,
        "isinstance(layer, kinds)",
        "isinstance(layer, BATCHNORMS)",
    ),
    Mutant(
        "layers in train mode are taken",
        FILE,
        "if any(layer.training for layer in chosen):",
        "if False:",
    ),
    Mutant(
        "the network itself is changed where it cannot be traced",
        FILE,
        "copy = module.__new__(type(module))",
        "copy = module",
    ),
    Mutant(
        "the autograd graph of a step is kept",
        FILE,
        "self.found.clear()  # nothing may keep",
        "pass  # nothing may keep",
    ),
    Mutant(
        "hooks return the mean itself",
        FILE,
        "torch.stack((mean - module.running_mean, var))",
        "torch.stack((mean, var))",
    ),
]
