"""What all ops of kernels/ promise alike. The ops and their cases stand in ops_table*.py.

What is special to an op (hand-computed values, properties, extremes) is tested in its own file.
test_wrong.py calls these tests on mutated ops.
"""

import doctest
import importlib
import inspect

import ops_table
import ops_table_batchnorm
import pytest
import torch
from helpers import (
    assert_as_exact_as_eager,
    assert_equal_bits,
    assert_matches_definition,
    convert,
    evaluate,
    make_leaves,
    results_of,
)

import kernels

OPS = [*ops_table.OPS, *ops_table_batchnorm.OPS]


def each_op(test):
    rows = [pytest.param(op, id=op.name) for op in OPS]
    return pytest.mark.parametrize("op", rows)(test)


def each_case(table):
    """Parametrise a test over all (op, case) of `table`, a field of Op."""
    rows = []
    for op in OPS:
        for name, case in getattr(op, table).items():
            rows.append(pytest.param(op, case, id=f"{op.name}-{name}"))
    return pytest.mark.parametrize(("op", "case"), rows)


def fused(op):
    return getattr(kernels, op.name)


def definition(op):
    return getattr(kernels, f"{op.name}_ref")


def assert_backward_matches(op, args, loss_of):
    """Gradients of loss_of(results) by .backward(), by the measured-tolerance rule."""

    def gradients(function, args):
        leaves = make_leaves(args, op.differentiable)
        loss_of(results_of(function, {**args, **leaves})).backward()
        return {name: x.grad for name, x in leaves.items()}

    got = gradients(fused(op), args)
    exact = gradients(definition(op), convert(args, torch.float64))
    eager = gradients(definition(op), convert(args, torch.float32))
    for name, gradient in got.items():
        if exact[name] is None:  # the loss does not depend on this argument
            assert gradient is None or not gradient.any(), name
        else:
            assert_as_exact_as_eager(gradient, exact[name], eager[name], f"gradient of {name}")


# The public function and its definition


@each_op
def test_definition_takes_the_same_arguments(op):
    assert inspect.signature(fused(op)) == inspect.signature(definition(op))
    assert fused(op).__module__ == definition(op).__module__ == f"kernels.{op.file}"


@each_op
def test_docstring_is_complete_and_its_example_runs(op, backend):
    text = inspect.getdoc(fused(op))
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{section}\n" in text, f"no section {section}"

    module = importlib.import_module(f"kernels.{op.file}")
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(fused(op), op.name, globs=vars(module).copy())
    assert example.examples, "the docstring has no example"
    assert not doctest.DocTestRunner().run(example).failed


# Results and gradients on one small case


@pytest.mark.parametrize(
    ("op", "index"),
    [
        pytest.param(op, index, id=f"{op.name}-{name}")
        for op in OPS
        if len(op.results) > 1
        for index, name in enumerate(op.results)
    ],
)
def test_loss_of_one_result_alone(op, index, backend, device):
    def squares_of_one(results):
        return results[index].square().sum()

    assert_backward_matches(op, op.make(device, **op.small), squares_of_one)


@each_op
def test_cotangents_of_any_strides(op, backend, device):
    """Autograd may hand over gradients that are neither dense nor in order."""
    args = op.make(device, **op.small)
    cotangents = []
    for value in results_of(definition(op), args):
        wide = torch.full((*reversed(value.shape), 2), float("nan"), device=device)
        cotangent = wide[..., 0].permute(tuple(reversed(range(value.ndim))))
        cotangents.append(cotangent.copy_(torch.randn(value.shape)))
    assert_matches_definition(op, args, cotangents)


@each_op
def test_backward_of_a_scaled_sum(op, backend, device):
    """The gradient that a sum hands back is one number, expanded."""

    def scaled_sum(results):
        return 3 * sum(value.sum() for value in results)

    assert_backward_matches(op, op.make(device, **op.small), scaled_sum)


@each_op
def test_only_arguments_that_require_grad_get_one(op, backend, device):
    args = op.make(device, **op.small)
    assert not any(value.requires_grad for value in results_of(fused(op), args))
    if len(op.differentiable) == 1:
        return

    together = evaluate(fused(op), args, op.differentiable)
    for name, gradient in together.gradients.items():
        alone = evaluate(fused(op), args, (name,)).gradients[name]
        # Other constants make another kernel, which need not round alike.
        torch.testing.assert_close(alone, gradient, rtol=1e-5, atol=1e-7, msg=name)


@each_op
def test_same_inputs_give_the_same_bits(op, backend, device):
    """Again, and under autocast; and the inputs stay as they are."""
    args = op.make(device, **op.small)
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}

    first = evaluate(fused(op), args, op.differentiable)
    assert_equal_bits(first, evaluate(fused(op), args, op.differentiable))
    with torch.autocast(device, torch.bfloat16):
        assert_equal_bits(first, evaluate(fused(op), args, op.differentiable))

    for name, x in tensors.items():
        assert torch.equal(x, before[name]), name


@each_op
def test_a_change_in_place_is_noticed_or_does_not_matter(op, backend, device):
    """Before the backward pass, of an argument or a result: no gradient is silently wrong."""
    args = op.make(device, **op.small)
    tensors = [name for name, x in args.items() if isinstance(x, torch.Tensor)]
    expected = evaluate(fused(op), args, op.differentiable)

    for changed in [*tensors, *op.results]:
        given = {name: args[name].clone() for name in tensors}
        leaves = make_leaves(given, op.differentiable)
        given = {**args, **given, **leaves}
        results = results_of(fused(op), given)
        named = {**given, **dict(zip(op.results, results, strict=True))}
        with torch.no_grad():
            named[changed].add_(1)
        try:
            gradients = torch.autograd.grad(results, tuple(leaves.values()), expected.cotangents)
        except RuntimeError as error:
            assert "inplace" in str(error), changed
            continue
        for name, gradient in zip(leaves, gradients, strict=True):
            assert torch.equal(gradient, expected.gradients[name]), f"{changed} changed"


# What is refused


@each_op
def test_second_derivative_is_refused(op, backend, device):
    args = op.make(device, **op.small)
    message = f"{op.name}: no second derivative; use {op.name}_ref"
    for name, leaf in make_leaves(args, op.differentiable).items():
        for value in results_of(fused(op), {**args, name: leaf}):
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(value.sum(), leaf, create_graph=True)


@each_op
def test_wrong_tensors_are_refused(op):
    """No tensor, integers, float64, an empty batch: for the first argument of each op."""
    args = op.make("cpu", **op.small)
    name = next(iter(args))
    wrong = [
        ([1.0], TypeError, f"{op.name}: expected {name} to be a tensor, got list"),
        (args[name].long(), TypeError, f"expected {name} in float32, .* got torch.int64"),
        (args[name].double(), TypeError, f"got torch.float64; .* use {op.name}_ref"),
        (args[name][:0], ValueError, f"expected a non-empty {name}, .*; drop the empty batch"),
    ]
    for value, error, message in wrong:
        with pytest.raises(error, match=message):
            fused(op)(**{**args, name: value})


@each_case("refused")
def test_other_arguments_are_refused(op, case):
    changes, error, message = case
    args = op.make("cpu", **op.small)
    with pytest.raises(error, match=message.replace("OP", op.name)):
        fused(op)(**{**args, **changes})


# Results and gradients on all cases


@each_case("cases")
def test_matches_the_definition(op, case, backend, device):
    assert_matches_definition(op, op.make(device, **case))


@each_case("gradcheck")
def test_gradcheck_of_the_definition(op, case):
    args = convert(op.make("cpu", **case), torch.float64)
    leaves = make_leaves(args, op.differentiable)

    def function(*values):
        return definition(op)(**{**args, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# On a GPU


@pytest.mark.gpu
@each_op
def test_no_synchronisation(op):
    args = op.make("cuda", **op.small)
    cotangents = evaluate(fused(op), args, op.differentiable).cotangents  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(fused(op), args, op.differentiable, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@each_op
def test_torch_compile_makes_one_graph(op):
    args = op.make("cuda", **op.small)
    compiled = torch.compile(fused(op), fullgraph=True)
    expected = results_of(fused(op), args)
    for value, other in zip(results_of(compiled, args), expected, strict=True):
        torch.testing.assert_close(value, other)
