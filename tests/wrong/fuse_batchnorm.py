"""Mutants that the tests of fuse_batchnorm and hook_batchnorm must catch."""

from wrong import Mutant

FILE = "fuse_batchnorm.py"
VERIFY = "_verify.py"

MUTANTS = [
    Mutant(
        "an activation is lost",
        FILE,
        "fused = FusedBatchNorm(layer, activation, record, number)",
        'fused = FusedBatchNorm(layer, "none", record, number)',
    ),
    Mutant(
        "the activation after an addition that broadcasts is lost",
        FILE,
        'if self.activation != "none":',
        "if False:",
    ),
    Mutant(
        "an addition that scales is fused",
        FILE,
        "if not is_sum or len(node.args) != 2 or node.kwargs:",
        "if not is_sum or len(node.args) != 2:",
    ),
    Mutant(
        "a 1 x 1 convolution of two groups is fused",
        FILE,
        " and conv.groups == 1",
        "",
    ),
    Mutant(
        "the bias of a 1 x 1 convolution is lost",
        FILE,
        " or conv.bias is not None",
        "",
    ),
    Mutant(
        "a 1 x 1 convolution with hooks is fused",
        FILE,
        " or conv._forward_hooks or conv._forward_pre_hooks",
        "",
    ),
    Mutant(
        "a weight of another dtype goes into the kernel",
        FILE,
        " or input.dtype != weight.dtype",
        "",
    ),
    Mutant(
        "fp32 goes into the kernel under autocast",
        FILE,
        "if torch.is_autocast_enabled(device) and",
        "if False and",
    ),
    Mutant(
        "a weight that learns goes into the kernel",
        FILE,
        "if weight.requires_grad and torch.is_grad_enabled():",
        "if False:",
    ),
    Mutant(
        "every method is taken for a ReLU",
        FILE,
        'return ACTIVATION_METHODS.get(node.target, "none")',
        'return "relu"',
    ),
    Mutant(
        "every hardtanh is taken for a ReLU6",
        FILE,
        'return "relu6" if _read_hardtanh_range(node) == (0, 6) else "none"',
        'return "relu6"',
    ),
    Mutant(
        "sums written with a plus are not fused",
        FILE,
        "ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}",
        "ADD_FUNCTIONS = {torch.add}",
    ),
    Mutant(
        "results of operations in place are read under their old name",
        FILE,
        "if order[user] > order[node]:",
        "if False:",
    ),
    Mutant(
        "one eps for all layers",
        FILE,
        "bn.running_var, bn.eps)",
        "bn.running_var, 1e-5)",
    ),
    Mutant(
        "layers in the order of their fused ops",
        FILE,
        "entries = sorted(self.entries, key=lambda entry: entry.place)",
        "entries = list(self.entries)",
    ),
    Mutant(
        "layers that are measured apart come last",
        FILE,
        "for entry in entries:\n        moments",
        "for entry in sorted(entries, key=lambda entry: not entry.is_part):\n        moments",
    ),
    Mutant(
        "running variances of another order of layers",
        FILE,
        "key = self.running_vars, versions",
        "key = versions",
    ),
    Mutant(
        "changed running variances are not noticed",
        FILE,
        "key = self.running_vars, versions",
        "key = self.running_vars",
    ),
    Mutant(
        "derived classes are taken for plain ones",
        FILE,
        "return type(layer) in PLAIN_BATCHNORMS",
        "return isinstance(layer, tuple(PLAIN_BATCHNORMS))",
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
        "self.entries = None  # nothing may keep",
        "pass  # nothing may keep",
    ),
    Mutant(
        "hooks return the mean itself",
        FILE,
        "torch.stack((mean - bn.running_mean, var))",
        "torch.stack((mean, var))",
    ),
    Mutant(
        "hooks of the check stay",
        FILE,
        "reference.close()",
        "pass",
    ),
    Mutant(
        "a counter in the network is not noticed",
        FILE,
        "if counter:",
        "if False:",
    ),
    Mutant(
        "the check compares no gradient",
        VERIFY,
        "if not error <= GRADIENT_TOLERANCE:",
        "if False:",
    ),
    Mutant(
        "a small output hides its gradient",
        VERIFY,
        "loss = loss + spread / spread.detach().clamp(min=1e-30)",
        "loss = loss + spread",
    ),
    Mutant(
        "a large output hides the gradient of the moments",
        VERIFY,
        "loss = loss + spread / spread.detach().clamp(min=1e-30)",
        "loss = loss + spread * 1e12",
    ),
    Mutant(
        "inputs that a BatchNorm changes in place are not noticed",
        VERIFY,
        "is_changed = x._version != version",
        "is_changed = False",
    ),
    Mutant(
        "the check does not count BatchNorms",
        VERIFY,
        'return f"of {len(theirs.layers)} BatchNorms it measures {len(ours.layers)}"',
        'return ""',
    ),
    Mutant(
        "the check compares the first pass alone",
        VERIFY,
        "for ours, theirs in zip(passes, expected, strict=True):",
        "for ours, theirs in zip(passes[:1], expected[:1], strict=True):",
    ),
    Mutant(
        "the check leaves changed buffers",
        VERIFY,
        "tensor.detach().copy_(before)",
        "pass",
    ),
    Mutant(
        "the check leaves changed attributes",
        VERIFY,
        "module.__dict__.clear()\n            module.__dict__.update(before)",
        "pass",
    ),
    Mutant(
        "the check draws random numbers",
        VERIFY,
        "with torch.random.fork_rng(devices):",
        "with contextlib.nullcontext():",
    ),
    Mutant(
        "batch normalisations outside of layers are not counted",
        VERIFY,
        "self.n_outside += 1",
        "pass",
    ),
    Mutant(
        "no output is returned twice",
        FILE,
        "_fork_outputs(traced)\n    traced.graph.lint()",
        "traced.graph.lint()",
    ),
    Mutant(
        "an output that an operation in place reads is returned twice",
        FILE,
        "if any(_is_inplace(traced, reader) for reader in readers):",
        "if False:",
    ),
]
