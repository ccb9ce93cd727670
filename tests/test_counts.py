"""Launches and bytes of a synthesis step, counted without a GPU.

The step of deepinversion.py runs on the meta device, which knows shapes and no values, on its GPU
path: images in fp32, the view and all activations in bf16, convolution weights in bf16. Counted as
launches are

- each launch of a Triton kernel, recorded in place of running it;
- each operator that PyTorch dispatches and that writes memory. Views, allocations and queries
  launch nothing. cuDNN may need more than one launch for a convolution; it counts as one here, and
  so does the whole fused Adam step.

Bytes of a launch: every tensor that it is given or returns, once, also where it is given twice (as
kernels are given some tensor in place of one that they do not use); one that it changes in place
counts twice. A convolution's backward pass is charged what it needs for the input's gradient.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from helpers import record_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepinversion
import kernels
from bench.steps import ALL_TERMS, make_frozen_teacher
from kernels import _common

# They allocate, ask, or see memory otherwise; they launch nothing.
NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_record_function_enter_new",  # marks for a profiler
    "_record_function_exit",
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Nothing is computed here, and filling memory would count as launches."""


@dataclass
class Counts:
    """Launches and bytes by operator or kernel."""

    launches: Counter = field(default_factory=Counter)
    n_bytes: Counter = field(default_factory=Counter)

    def add(self, name, tensors):
        self.launches[name] += 1
        self.n_bytes[name] += sum(count_bytes(x) for x in tensors)

    @property
    def total_launches(self):
        return self.launches.total()

    @property
    def total_bytes(self):
        return self.n_bytes.total()


def count_bytes(x):
    """Bytes of a tensor; what is expanded counts once."""
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride != 0:
            n *= size
    return n * x.element_size()


def list_tensors(values):
    """All tensors in nested values, each once."""
    found = {id(x): x for x in tree_leaves(values) if isinstance(x, torch.Tensor)}
    return list(found.values())


def is_view(function):
    """Whether an operator returns its input's memory and writes nothing."""
    return any(
        value.alias_info is not None and not value.alias_info.is_write
        for value in function._schema.returns
    )


def is_new(function):
    """Whether an operator returns memory of its own."""
    return all(value.alias_info is None for value in function._schema.returns)


def split_tensors(function, args, kwargs):
    """The tensors that an operator reads, and those of its arguments that it writes."""
    read = []
    written = []
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if not argument.is_out:
            read.append(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(value)
    return list_tensors(read), list_tensors(written)


class CountOperators(TorchDispatchMode):
    """Count what PyTorch dispatches as launches."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name not in NO_LAUNCH and not is_view(function):
            read, written = split_tensors(function, args, kwargs)
            if name == "convolution_backward":
                output_gradient, _, weight = read[:3]
                read = [output_gradient, weight]
                dx, *others = result
                result = (dx.contiguous(memory_format=torch.channels_last), *others)
            if name == "convolution":  # cuDNN keeps channels_last, the meta device does not
                result = result.contiguous(memory_format=torch.channels_last)
            made = list_tensors(result) if is_new(function) else []
            self.counts.add(name, [*read, *written, *made])
        return result


@contextlib.contextmanager
def count_launches(monkeypatch):
    """Context that yields Counts; nothing is computed, so its tensors must be on meta."""
    counts = Counts()
    with monkeypatch.context() as patches:
        patches.setattr(_common, "runs_triton", lambda x: True)
        recorders = record_kernels(patches)
        with CountOperators(counts):
            yield counts
    for recorder in recorders:
        for _, args, kwargs in recorder.launches:
            counts.add(recorder.name, list_tensors((args, kwargs)))


def make_step(name, batch_size, size, monkeypatch):
    """One step's loss and gradient on meta, as on a GPU; it returns nothing."""
    network = make_frozen_teacher(name, "cpu")
    watched = kernels.fuse_batchnorm(network).to("meta")
    for module in watched.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(torch.bfloat16)  # as watch_batchnorms has them
    # there is no autocast on meta; view and weights are in bf16 already
    monkeypatch.setattr(torch, "autocast", lambda *rest, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)

    shape = (batch_size, 3, size, size)
    x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    labels = torch.empty(batch_size, dtype=torch.int64, device="meta")
    move = torch.empty(3, dtype=torch.int64, device="meta")
    target = deepinversion.Target(labels, watched, None)

    def step():
        total, _ = deepinversion.synthesis_loss(x, move, target, ALL_TERMS)
        torch.autograd.grad(total, x)

    return step


def count_update(counts, n_images, size):
    """Add what follows the gradient: Adam, clipping, and three small tensors that are written."""
    x = torch.zeros(n_images, 3, size, size).requires_grad_()
    x.grad = torch.zeros_like(x)
    low = torch.zeros(1, 3, 1, 1)
    optimizer = torch.optim.Adam([x], torch.tensor(0.1), fused=True)
    optimizer.step()  # the first makes the averages
    high = torch.ones(1, 3, 1, 1)
    rate = torch.zeros(())
    moves = torch.zeros(2, 3)
    terms = torch.zeros(2, 8)
    with CountOperators(counts), torch.no_grad():
        optimizer.step()
        torch.clamp(x, low, high, out=x)
        rate.fill_(0.1)
        moves[0].copy_(moves[1])
        terms[0].copy_(terms[1])


# The rule


def test_launches_and_bytes_by_hand():
    """2 x 3 fp32 values: a product reads two and writes one, a view nothing, an addition in place
    reads two and writes one."""
    counts = Counts()
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    with CountOperators(counts):
        c = a * b
        c.view(6).add_(b.reshape(6))
        torch.empty(5)
    assert counts.launches == Counter(mul=1, add_=1)
    assert counts.total_bytes == 2 * 3 * (6 * 4)


def test_bytes_of_an_optimiser_step():
    """Adam reads image, gradient and both averages, and by its schema may write all of them; clamp
    reads and writes the image. Two bounds, and the counter of steps, are 4 bytes each."""
    counts = Counts()
    count_update(counts, 2, 4)
    of_images = 4 * (2 * 3 * 4 * 4)
    assert counts.n_bytes["clamp"] == 2 * of_images + 2 * 3 * 4
    assert 8 * of_images <= counts.n_bytes["_fused_adam_"] <= 8 * of_images + 16


def test_what_is_expanded_is_read_once():
    counts = Counts()
    with CountOperators(counts):
        torch.ones(3, 1, device="meta").expand(3, 5) * 2
    assert counts.launches == Counter(ones=1, mul=1)
    assert counts.n_bytes["mul"] == 3 * 4 + 15 * 4


def test_a_convolution_without_a_gradient_of_its_weight(monkeypatch):
    """Forward: image, weight, output. Backward: the output's gradient, weight, image gradient."""
    conv = torch.nn.Conv2d(2, 4, 1, bias=False).requires_grad_(False).to("meta")
    x = torch.empty(1, 2, 5, 5, device="meta", requires_grad=True)
    with count_launches(monkeypatch) as counts:
        y = conv(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
    of_each = 4 * (2 * 25 + 4 * 2 + 4 * 25)
    assert counts.launches == Counter(convolution=1, convolution_backward=1)
    assert counts.total_bytes == 2 * of_each


def test_each_recorded_kernel_counts(monkeypatch):
    p = torch.empty(4, 10, device="meta")
    q = torch.empty(4, 10, device="meta", requires_grad=True)
    with count_launches(monkeypatch) as counts:
        kernels.kl_divergence(p, q)
    assert any(name.endswith("_kernel") for name in counts.launches)


# The steps


@pytest.mark.parametrize(
    "name, n_images, n_launches, gigabytes",
    [
        pytest.param("resnet18", 128, 124, 8.82, id="resnet18"),
        pytest.param("resnet50", 64, 191, 13.95, id="resnet50"),
    ],
)
def test_a_step_launches_and_moves_no_more_than_it_did(
    name, n_images, n_launches, gigabytes, monkeypatch
):
    """Upper bounds: lower them with the step. `pytest -s` prints what it is made of."""
    step = make_step(name, n_images, 224, monkeypatch)
    with count_launches(monkeypatch):
        step()  # the first one makes the constants that all others read
    with count_launches(monkeypatch) as counts:
        step()
    count_update(counts, n_images, 224)
    table = [(n, counts.n_bytes[op] / 1e9, op) for op, n in counts.launches.most_common()]
    print("\n".join(f"{n:5} {gb:8.3f} GB {op}" for n, gb, op in table))
    print(f"{name}, {n_images} images: {counts.total_launches} launches", end=", ")
    print(f"{counts.total_bytes / 1e9:.2f} GB")
    assert counts.total_launches <= n_launches
    assert counts.total_bytes / 1e9 <= gigabytes

    # a layer is a convolution and a BatchNorm: nothing of what counts most is missing
    assert counts.launches["_bn_act_moments_fwd_kernel"] == counts.launches["convolution"]
    assert counts.launches["_bn_act_moments_bwd_kernel"] == counts.launches["convolution_backward"]
    assert counts.launches["_merge_kernel"] == 1  # for all layers
