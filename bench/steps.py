"""Whole steps of deepinversion.py, part by part, beside plain loops.

Columns of one synthesis step, all with the same network, images and terms of the loss:

- bare: forward pass and image gradient of the frozen teacher's cross-entropy alone, channels_last;
- conventional: the loop as most public code has it, with our loss (released loops as they are, with
  their own loss: released.py): weight gradients, NCHW, a forward hook a
  BatchNorm with a mean and the variance of a permuted copy, total variation by slices, clipping
  channel by channel, the loss read in each step; `conventional amp` is the same under autocast;
- ours: the step of deepinversion.py; `ours without …`: with one fused op replaced by its reference;
  `ours without fused convolutions` (GPU): 1 x 1 convolutions by cuDNN, then `bn_act_moments`;
- tuned: the same frozen step in plain PyTorch, without fused ops and graph; `tuned compile` with
  torch.compile on its loss, `tuned compile graph` in a CUDA graph besides.

Another table says what `fuse_batchnorm` costs once before the first step, in steps, and how much of
that is the check of its result.

Minimal bytes of a step: for each convolution and linear layer its input, output and weight read or
written once each way; for each fused BatchNorm the 5 passes of `bn_act_moments`, 8 with a residual,
and 1 more where two layers read its output. A 1 x 1 convolution in one kernel with its BatchNorm
saves 3 passes: its output is not read forwards, the output's gradient neither written nor read.
That is counted on a GPU alone.
"""

import contextlib
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deepinversion
import kernels
from bench.timing import (
    choose_slower,
    mark_row,
    measure_peak,
    name_columns,
    time_on_gpu,
    time_on_the_host,
    time_together,
)
from harness.errors import shorten_error
from harness.known import list_imagenet, list_packaged
from harness.networks import NETWORKS
from kernels._fused_layers import FoldedStem, FusedBatchNorm, FusedPointwise

# all terms of the loss on
ALL_TERMS = replace(
    deepinversion.PRESETS["cifar10"],
    first_bn=1.0,
    alpha_l2=1e-5,
    alpha_tv_l1=1e-3,
    schedule="constant",
)
BOUNDS = -2.0, 2.0  # that pixels are clipped to
N_STEPS = 1_000_000  # more than are timed
N_EXAMPLES = 2  # images that fuse_batchnorm compares networks with, as sample_example has them
IMAGENET_NETWORKS = {info["arch"] for info in (list_imagenet() | list_packaged()).values()}


# Networks
def make_teacher(name, device):
    """A network whose moments are neither 0 nor 1, as those of a trained one."""
    torch.manual_seed(0)
    n_classes = 1000 if name in IMAGENET_NETWORKS else 10
    network = NETWORKS[name](num_classes=n_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.7)  # keeps deep residual networks in range
    return network.to(device).eval()


def make_frozen_teacher(name, device):
    return make_teacher(name, device).requires_grad_(False).to(memory_format=torch.channels_last)


# One synthesis step
def make_bare_inputs(name, device, noise):
    """The frozen network and the images of the bare column; in bf16 on a GPU."""
    network = make_frozen_teacher(name, device)
    x = noise.clone(memory_format=torch.channels_last)
    if device == "cuda":
        # once: autocast would convert the weights of a frozen network in each step
        network = network.to(torch.bfloat16)
        x = x.to(torch.bfloat16)
    return network, x.requires_grad_()


def make_bare(name, device, noise, labels):
    network, x = make_bare_inputs(name, device, noise)

    def run():
        torch.autograd.grad(F.cross_entropy(network(x).float(), labels), x)

    return run


def hook_conventionally(network, terms):
    """Forward hooks with a mean pass and the variance of a permuted copy, as in public code."""

    def add_term(module, inputs, output):
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        of_mean = torch.norm(module.running_mean - mean, 2)
        terms.append(torch.norm(module.running_var - var, 2) + of_mean)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(add_term)


def subtract_neighbours(view):
    """Differences of neighbouring pixels in four directions, by slices."""
    return [
        view[:, :, :, :-1] - view[:, :, :, 1:],
        view[:, :, :-1] - view[:, :, 1:],
        view[:, :, :-1, :-1] - view[:, :, 1:, 1:],
        view[:, :, 1:, :-1] - view[:, :, :-1, 1:],
    ]


def clip_channels(x):
    """Clip images to BOUNDS in place, channel by channel, as released."""
    for c in range(x.shape[1]):
        x.data[:, c] = torch.clamp(x.data[:, c], *BOUNDS)


def make_conventional(name, device, noise, labels, amp=False):
    args = ALL_TERMS
    network = make_teacher(name, device)
    terms = []
    hook_conventionally(network, terms)
    x = noise.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=args.lr)

    def run():
        optimizer.zero_grad()
        network.zero_grad()
        view = torch.roll(x, (1, -1), (2, 3))
        terms.clear()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits = network(view)
        differences = subtract_neighbours(view)
        loss = F.cross_entropy(logits.float(), labels) + args.alpha_bn * sum(terms)
        loss = loss + args.alpha_tv_l2 * sum(torch.norm(d) for d in differences)
        loss = loss + args.alpha_tv_l1 * sum(d.abs().mean() for d in differences)
        loss = loss + args.alpha_l2 * torch.norm(view.reshape(len(view), -1), dim=1).mean()
        loss.backward()
        optimizer.step()
        clip_channels(x)
        return loss.item()

    return run


def make_ours(name, device, noise, labels, args=ALL_TERMS, without="", compiled=False):
    """The step of deepinversion.py as a function of no arguments, which returns its TERMS.

    Args:
        args: deepinversion.Args.
        without: an op that is replaced by its reference; "batchnorm": by hooks; "pointwise": 1 x 1
            convolutions run apart from their BatchNorms.
        compiled: whether torch.compile gets the loss.
    """
    teacher = make_frozen_teacher(name, device)
    watch_args = replace(args, fused=args.fused and without != "batchnorm")
    watched = deepinversion.watch_batchnorms(teacher, noise[:N_EXAMPLES], watch_args, device)
    target = deepinversion.Target(labels, watched, None)
    bounds = [torch.tensor(bound, device=device) for bound in BOUNDS]
    x = noise.clone(memory_format=torch.channels_last).requires_grad_()
    moves = torch.tensor([1, -1, 0], device=device).expand(N_STEPS, 3)
    stage = deepinversion.Stage(len(moves), scale=1, jitter=args.jitter, lr=args.lr)
    steps = deepinversion.optimise_images(x, moves, stage, target, bounds, args)

    stack = contextlib.ExitStack
    loss = deepinversion.synthesis_loss
    if compiled:
        loss = torch.compile(loss)

    def run():
        with stack() as patches:
            if compiled:
                patches.enter_context(patch.object(deepinversion, "synthesis_loss", loss))
            if without == "pointwise":
                no = patch.object(FusedPointwise, "can_fuse", return_value=False)
                patches.enter_context(no)
            elif without and without != "batchnorm":
                reference = getattr(kernels, f"{without}_ref")
                patches.enter_context(patch.object(kernels, without, reference))
            return next(steps)

    return run


def list_columns(options):
    """{column: maker of a function to time, called with network, device, noise and labels}."""
    device = options.device
    tuned = replace(ALL_TERMS, fused=False, graph=False)
    columns = {"bare": make_bare, "conventional": make_conventional}
    if device == "cuda":
        columns["conventional amp"] = partial(make_conventional, amp=True)
    columns["ours"] = make_ours
    if device == "cuda":  # a CPU has no other way
        columns["ours without fused convolutions"] = partial(make_ours, without="pointwise")
    if options.ablations:
        columns["ours without fused BatchNorm"] = partial(make_ours, without="batchnorm")
        columns["ours without moment_distance"] = partial(make_ours, without="moment_distance")
        columns["ours without jittered_view"] = partial(make_ours, without="jittered_view")
    if options.ablations and device == "cuda":
        columns["ours without graph"] = partial(make_ours, args=replace(ALL_TERMS, graph=False))
    columns["tuned"] = partial(make_ours, args=tuned)
    if options.can_compile:
        columns["tuned compile"] = partial(make_ours, args=tuned, compiled=True)
        if device == "cuda":
            graphed = replace(ALL_TERMS, fused=False)
            columns["tuned compile graph"] = partial(make_ours, args=graphed, compiled=True)
    return columns


def count_bytes(network, x):
    """Minimal bytes of one step by the rule in the file's header; x: images in a step's dtype."""
    n_values = []

    def count(module, inputs, result):
        output = result[0] if isinstance(result, tuple) else result
        tensors = [t for t in (*inputs, output) if torch.is_tensor(t)]
        if isinstance(module, FusedBatchNorm):
            passes = 8 if len(tensors) == 3 else 5
            passes += module.n_uses - 1
            if isinstance(module, FusedPointwise):
                # With the convolution's two passes over the output: 3 fewer in one kernel.
                passes += -1 if x.is_cuda else 2
                n_values.append(2 * (tensors[0].numel() + module.conv.weight.numel()))
            n_values.append(passes * output.numel())
        else:
            layer = module.conv if isinstance(module, FoldedStem) else module
            n_values.append(2 * (sum(t.numel() for t in tensors) + layer.weight.numel()))

    fused = kernels.fuse_batchnorm(network)
    holders = (FusedPointwise, FoldedStem)
    held = {layer.conv for layer in fused.modules() if isinstance(layer, holders)}
    hooks = []
    for module in fused.modules():
        is_layer = isinstance(module, (nn.Conv2d, nn.Linear, FusedBatchNorm, FoldedStem))
        if is_layer and module not in held:
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        fused(x)
    for hook in hooks:
        hook.remove()  # the convolutions are those of `network`
    return sum(n_values) * x.element_size()


def count_step(name, device, noise, labels):
    """Minimal bytes of a step, and FLOPs of the bare one."""
    network, x = make_bare_inputs(name, device, noise)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(x * 1).float(), labels).backward()
    return count_bytes(network, x.detach()), counter.get_total_flops()


def find_step_problem(name, device, noise, labels):
    """The gate: "", or why a network's step is not timed."""
    try:
        is_right = check_first_losses(name, device, noise, labels)
    except Exception as error:  # a kernel that does not compile, launch or fit the memory
        return shorten_error(error)
    return "" if is_right else "fused and plain steps disagree"


def check_first_losses(name, device, noise, labels):
    """Whether fused and plain steps from the same noise have the same terms."""
    plain = replace(ALL_TERMS, fused=False, graph=False)
    ours = make_ours(name, device, noise, labels)()
    theirs = make_ours(name, device, noise, labels, plain)()
    is_loss = [
        i for i, term in enumerate(deepinversion.TERMS) if term not in ("competition", "teacher")
    ]
    tolerance = 2e-2 if device == "cuda" else 1e-4  # bf16 rounds in other places
    return torch.allclose(ours[is_loss].double(), theirs[is_loss].double(), rtol=tolerance)


class Measured(NamedTuple):
    """What time_makers finds, by column."""

    times: dict
    """Times."""
    peaks: dict
    """Most memory in MB; None on a CPU."""
    problems: dict
    """Why a column has no times: it does not compile, run or fit the memory."""


def time_makers(makers, options):
    """Measured of functions that are made first; a step gets tenfold the seconds of an op.

    On a GPU they are made one after another, because all at once may not fit it.
    """
    device = options.device
    seconds = 10 * options.seconds
    problems = {}
    if device == "cpu":
        functions = {}
        for name, make in makers.items():
            try:
                functions[name] = make()
                functions[name]()
            except Exception as error:
                functions.pop(name, None)
                problems[name] = shorten_error(error)
        times = {}
        if functions:
            times = time_together(functions, device, seconds, options.n_least)
        return Measured(times, dict.fromkeys(times), problems)

    names = list(makers)
    rounds = []
    peaks = {}
    for order in (names, names[::-1]):
        times = {}
        for name in order:
            if name in problems:
                continue
            try:
                times[name], peaks[name] = _make_and_time(makers[name], options, seconds)
            except Exception as error:
                problems[name] = shorten_error(error)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        rounds.append(times)
    rounds = [{name: times[name] for name in names if name not in problems} for times in rounds]
    return Measured(choose_slower(rounds), peaks, problems)


def _make_and_time(make, options, seconds):
    """Times and peak memory in MB of what `make` returns, on a GPU."""
    made = []

    def make_and_run():  # a graph's memory is its own from the capture on
        made.append(make())
        for _ in range(5):
            made[0]()

    peak = measure_peak(make_and_run, options.device)
    return time_on_gpu(made[0], seconds, options.n_least), peak


class Case(NamedTuple):
    """A network and the images of its step."""

    name: str
    size: int
    """Side of the images in pixels."""
    batch_size: int

    def __str__(self):
        return f"{self.name} {self.batch_size}x3x{self.size}x{self.size}"

    def make_inputs(self, device):
        """Noise (N, 3, size, size) and labels (N,)."""
        noise = torch.randn(self.batch_size, 3, self.size, self.size, device=device)
        return noise, torch.arange(self.batch_size, device=device) % 10


def bench_step(options, limits, case):
    """Time one synthesis step of one network; returns a row per column."""
    device = options.device
    name, size, batch_size = case
    noise, labels = case.make_inputs(device)
    shape = str(case)
    problem = find_step_problem(name, device, noise, labels)
    if problem:
        return [mark_row(problem, op="step", shape=shape, mode="step")]

    n_bytes, flops = count_step(name, device, noise, labels)
    makers = {}
    for column, make in list_columns(options).items():
        makers[column] = partial(make, name, device, noise, labels)
    times, peaks, problems = time_makers(makers, options)

    bound = limits.compute_bound(n_bytes, flops)
    print(f"\none step, {name}, {batch_size} images of {size} px, {device}, all terms on;", end=" ")
    print(f"at least {bound:.2f} ms: {n_bytes / 1e9:.2f} GB, {flops / 1e9:.1f} GFLOP")
    title = f"{'column':30} {'ms':>9} {'p20':>9} {'p80':>9} {'x bare':>7} {'x conv.':>8}"
    print(f"{title} {'images/s':>9} {'%limit':>7}")
    rows = []
    for column, problem in problems.items():
        rows.append(mark_row(problem, op=f"step: {column}", shape=shape, mode="step"))
    for column, time in times.items():
        to_bare = divide_times(time, times.get("bare"))
        to_conventional = divide_times(time, times.get("conventional"))
        rate = 1e3 * batch_size / time.median
        percent = limits.compute_percent(time.median, n_bytes, flops)
        figures = f"{time.median:9.2f} {time.p20:9.2f} {time.p80:9.2f}"
        ratios = f"{to_bare:7.2f} {to_conventional:8.2f}"
        print(f"{column:30} {figures} {ratios} {rate:9.0f} {percent:7.1f}")
        row = dict(op=f"step: {column}", shape=shape, mode="step") | name_columns("ours", time)
        row |= dict(times_bare=to_bare, times_conventional=to_conventional)
        row |= dict(minimal_bytes=n_bytes, flops=flops, percent_of_limit=percent)
        row |= dict(images_per_s=rate, peak_mb=peaks[column])
        rows.append(row)
    return rows


def divide_times(time, other):
    """The ratio of two medians; NaN where there is no other."""
    return math.nan if other is None else time.median / other.median


# What fuse_batchnorm costs, once
def bench_verification(options, case):
    """Time fuse_batchnorm with and without an example, beside a step of a run's own batch."""
    device = options.device
    name, size, batch_size = case
    noise, labels = case.make_inputs(device)
    network = make_frozen_teacher(name, device)
    example = noise[:N_EXAMPLES].contiguous(memory_format=torch.channels_last)
    columns = {
        "step": make_ours(name, device, noise, labels),
        "fuse_batchnorm, verified": partial(kernels.fuse_batchnorm, network, example),
        "fuse_batchnorm, not verified": partial(kernels.fuse_batchnorm, network),
    }
    n_rounds = min(5, options.n_least)  # a check is long, and runs once
    if device == "cpu":
        times = time_together(columns, device, 10 * options.seconds, n_rounds)
    else:
        times = time_on_the_host(columns, n_rounds)

    step = times["step"].median
    title = f"{name}, {batch_size} images of {size} px, verified with {N_EXAMPLES}"
    print(f"\nfuse_batchnorm before the first step, {title}, {device}")
    print(f"{'column':30} {'ms':>9} {'p20':>9} {'p80':>9} {'steps':>7}")
    rows = []
    for column, time in times.items():
        figures = f"{time.median:9.2f} {time.p20:9.2f} {time.p80:9.2f}"
        print(f"{column:30} {figures} {time.median / step:7.2f}")
        row = dict(op=f"once: {column}", shape=str(case), mode="once")
        row |= name_columns("ours", time) | dict(times_step=time.median / step)
        rows.append(row)
    return rows


# All tables
STEPS = {
    "cpu": [
        Case("resnet20", 32, 100),
        Case("mobilenet_v2_cifar", 32, 32),
        Case("efficientnet_lite0", 224, 4),
    ],
    "cuda": [
        Case("resnet50", 224, 64),
        Case("resnet18", 224, 128),
        Case("resnet34_cifar", 32, 256),
        Case("resnet20", 32, 256),
        Case("efficientnet_lite0", 224, 64),
        Case("mobilenet_v2_cifar", 32, 256),
        Case("resnet20", 32, 64),
    ],
    "smoke": [Case("resnet8", 8, 4)],
}
VERIFICATIONS = {
    "cpu": [Case("resnet20", 32, 100), Case("resnet50", 224, 4)],
    "cuda": [Case("resnet20", 32, 256), Case("resnet50", 224, 64)],
    "smoke": [Case("resnet8", 8, 4)],
}


def bench_steps(options, limits):
    """One synthesis step of each network; yields the rows as they are measured."""
    for case in options.choose(STEPS[options.sizes]):
        yield from bench_step(options, limits, case)


def bench_verifications(options):
    """What fuse_batchnorm costs once on some networks; yields the rows as they are measured."""
    for case in options.choose(VERIFICATIONS[options.sizes]):
        yield from bench_verification(options, case)
