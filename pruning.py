"""Structured pruning without data: fewer channels, chosen and fine-tuned on inverted images.

Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning", CVPR
2019, arXiv:1906.10771, as used data-free in section 4.3 of DeepInversion (Yin et al. 2020,
arXiv:1912.08795). Channels with the lowest importance go, all layers ranked together; the smaller
network then learns the whole one's answers.

    I_m = (dL / dg_m)²,   L = KL(teacher(x) || pruned(x)),   g_m = 1 a gate of channel m

Channels that are added or multiplied share a gate, and go together: a residual stream is pruned as
one (channels.py). Shortcuts of option A pad a fixed number of channels: their streams stay whole.
Run `python pruning.py`, or with `--teacher cifar10-resnet20 --images DIR`. It writes args.json,
metrics.jsonl, samples.png, curve.png (accuracy against size), pruned-25.pt … (`load_pruned`),
checkpoint.pt, result.json. Metrics: `loss/importance`, L; `loss/kl`, of fine-tuning; `weights`,
percent left; `eval/acc`, percent of real test images. Measured on 2,500 test images, 3 seeds, one
CPU thread: CIFAR-10 ResNet-20 of 85.52 % without 25 % of its weights: 82.24 ± 0.36 %; BatchNorm
re-estimated alone 80.32 %, no fine-tuning 69.88 %. Nothing ran on a GPU.

Where we differ from the papers and the released code of Taylor pruning:
- no weight learns while channels are removed, so that "no fine-tuning" means none;
- KL has no gradient before the first removal: there L is the Fisher form, importance_loss;
- importances of a removal are divided by their mean before the momentum averages them, and so are
  saved milliseconds, so that eta has no unit;
- targets are shares of the weights (theirs: numbers of filters); Adam, few updates, tau² KL.
"""

import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import kernels
from channels import (
    can_remove,
    check_removal,
    count_channels,
    count_removed,
    find_channels,
    find_kinds,
    leave_one,
    mask_channels,
    remove_channels,
    shrink_network,
)
from harness.data import evaluate, normalise
from harness.errors import fail, fail_in_one_line
from harness.files import read_checkpoint
from harness.images import augment
from harness.known import describe_info, read_info
from harness.load import build_network, choose_preset_by_dataset, load_teacher
from harness.networks import sample_example
from harness.run import (
    RunFolder,
    check_at_least,
    choose_device,
    decay_by_cosine,
    make_optimizer,
    parse_args,
    restore_optimizer,
    seed_everything,
)
from harness.sources import SourceOptions, load_lesson, report_lesson

MOMENTUM = 0.9  # of importances over removals (released code)
TIMED_IMAGES = 20  # of a forward pass whose milliseconds are measured
TURNS = 15  # of networks that are measured in turn; the median counts
STAGES = ("pruned", "reestimated", "student", "student_reestimated")


@dataclass
class Args(SourceOptions):
    # Run settings.
    setting: Literal["cifar10", "mnist", "digits"] = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else of the teacher's data set, else cifar10;
    without a teacher digits."""
    out: str = "runs/pruning/default"
    """Output folder."""

    # Method: which channels go.
    target: tuple[float, ...] = (0.10, 0.25, 0.50)
    """Shares of the weights to remove; each network is fine-tuned by itself."""
    criterion: Literal["taylor", "magnitude", "random"] = "taylor"
    """taylor: I_m; magnitude: mean square of the weights that write a channel; random."""
    latency: float = 0.0
    """eta: weight of the milliseconds that a channel's removal saves beside its importance (paper
    Eq. 10), each divided by its mean (ours)."""
    channels_per_removal: int = 8
    """Channels removed at a time (released code: 100 of ResNet-50)."""
    batches_per_removal: int = 4
    """Mini-batches between two removals, that importances are summed over (released code: 30)."""

    # Method: fine-tuning.
    statistics: Literal["frozen", "reestimated", "batch"] = "reestimated"
    """BatchNorm in fine-tuning: the whole network's running statistics; those of one batch of the
    images, then frozen; or train mode, each batch's own."""
    epochs: int = 2
    """Epochs of fine-tuning; 0: prune only."""
    steps_per_epoch: int = 30
    """Updates in an epoch."""
    batch_size: int = 100
    """Images of an update and of a batch that importances are measured on."""
    lr: float = 3e-4
    """Initial learning rate of Adam; it falls as a cosine (ours)."""
    temperature: float = 5.0
    """tau: divides both logits of the KL, which is multiplied by tau² (paper: 5, 10 or 15)."""
    shift: int = 2
    """Augmentation: largest move of each image, in pixels (ours)."""
    mirror: bool = True
    """Augmentation: mirror each image with probability 1/2 (ours)."""

    def __post_init__(self):
        SourceOptions.__post_init__(self)
        if not self.target:
            raise ValueError("--target: expected at least one share of the weights, such as 0.25")
        for share in self.target:
            if not 0.01 <= share <= 0.99:
                raise ValueError(f"--target: expected shares from 0.01 to 0.99, got {share}")
        if len({name_target(share) for share in self.target}) < len(self.target):
            raise ValueError("--target: expected shares that differ when rounded to percents")
        check_at_least(1, self, "channels_per_removal", "batches_per_removal")
        check_at_least(1, self, "steps_per_epoch", "batch_size")
        check_at_least(0, self, "epochs", "shift", "latency")
        check_at_least(1e-12, self, "lr", "temperature")


def name_target(share):
    """A target in percent, such as 25, as it stands in files and results."""
    return str(round(100 * share))


CIFAR10 = Args()
MNIST = replace(CIFAR10, setting="mnist", teacher="mnist-resnet8", mirror=False)
PRESETS = {
    "cifar10": CIFAR10,
    "mnist": replace(MNIST, channels_per_removal=4),
    "digits": replace(
        MNIST, setting="digits", teacher="digits-resnet8", num_images=200, channels_per_removal=4
    ),
}


def choose_preset(teacher, dataset):
    """The preset of a run without --setting."""
    return choose_preset_by_dataset(PRESETS, teacher, dataset)


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        num_images=min(args.num_images, 20),
        target=args.target[:2],
        channels_per_removal=max(args.channels_per_removal, 16),
        batches_per_removal=1,
        epochs=min(args.epochs, 2),
        steps_per_epoch=2,
        batch_size=10,
    )


def draw_batch(lesson, args):
    """Images drawn with replacement, moved and mirrored at random: (batch_size, C, H, W) fp32."""
    images = lesson.images
    index = torch.randint(len(images), (args.batch_size,), device=images.device)
    return augment(normalise(images[index], lesson.info), args.shift, args.mirror)


def compute_kl(t_logits, s_logits, temperature, args):
    """KL(P || Q) in nats, a mean over the batch, of P, Q = softmax(logits / temperature): ()."""
    op = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    return op(t_logits, s_logits, temperature)


# Which channels go
def importance_loss(t_logits, s_logits, removal, args):
    """L, whose derivatives in the gates rank the channels: ().

        L = KL(P || Q),   P, Q = softmax of teacher's and pruned network's logits

    Before the first removal P = Q, where KL and its gradient are 0. There we take

        L = -log Q(y),   y ~ P,   since   d²KL / dg_m² = E[(d log Q(y) / dg_m)²]   at P = Q

    Args:
        removal: counted from 0.
    """
    if removal > 0:
        return compute_kl(t_logits, s_logits, 1.0, args)
    y = torch.multinomial(t_logits.softmax(1), 1).flatten()  # (N,)
    return F.cross_entropy(s_logits, y)


def differentiate_gates(network, channels):
    """dL/dg_m of all gates, (count,), after L.backward().

    A gate that multiplies what a layer reads multiplies the columns of its weight as well, so

        dL/dg_m = sum over the layers that read m, and their columns of m, of <W[:, m], dL/dW[:, m]>

    The gate of a channel that several layers read, as of a residual stream, is one: its derivatives
    are added before they are squared. Behind a BatchNorm and ReLU this is a gate after BatchNorm.
    """
    derivative = torch.zeros(channels.count, device=next(network.parameters()).device)
    for name, numbers in channels.read.items():
        weight = network.get_submodule(name).weight  # (rows, columns, ...)
        if weight.grad is None:  # the logits do not depend on this layer
            continue
        products = (weight.detach() * weight.grad).transpose(0, 1).flatten(1).sum(1)  # (columns,)
        gated = numbers >= 0
        derivative.index_add_(0, numbers[gated], products[gated])
    return derivative


def measure_importance(network, lesson, channels, removal, args):
    """I_m, (count,): the sum of (dL/dg_m)² over the mini-batches between two removals.

    Returns:
        Importances, and the mean of L.
    """
    total = torch.zeros(channels.count, device=lesson.images.device)
    loss_sum = torch.zeros((), device=lesson.images.device)
    for _ in range(args.batches_per_removal):
        x = draw_batch(lesson, args)
        with torch.no_grad():
            t_logits = lesson.teacher(x)
        loss = importance_loss(t_logits, network(x), removal, args)
        network.zero_grad()
        loss.backward()
        total += differentiate_gates(network, channels).square()
        loss_sum += loss.detach()
    return total, loss_sum.item() / args.batches_per_removal


def measure_magnitude(network, channels):
    """The mean square of the weights that write a channel, in all layers that do, (count,)."""
    squares = torch.zeros(channels.count, device=next(network.parameters()).device)
    n_weights = torch.zeros_like(squares)
    for name in channels.read:  # convolutions and linear layers
        numbers = channels.written[name]
        rows = network.get_submodule(name).weight.detach().flatten(1)  # (rows, weights)
        counted = numbers >= 0
        squares.index_add_(0, numbers[counted], rows[counted].square().sum(1))
        n_weights.index_add_(
            0, numbers[counted], rows[counted].new_full((counted.sum(),), rows.size(1))
        )
    return squares / n_weights


def score_channels(network, lesson, channels, removal, args):
    """Scores of all channels by --criterion, (count,), and the mean of L or None."""
    if args.criterion == "taylor":
        return measure_importance(network, lesson, channels, removal, args)
    if args.criterion == "magnitude":
        return measure_magnitude(lesson.teacher, channels), None
    generator = torch.Generator().manual_seed(args.seed)
    return torch.rand(channels.count, generator=generator).to(lesson.images.device), None


def check_targets(teacher, channels, info, args):
    """Refuse targets that cannot be reached: each layer keeps at least one channel."""
    kept = torch.zeros(channels.count, dtype=torch.bool, device=next(teacher.parameters()).device)
    leave_one(channels, kept)
    largest = count_removed(teacher, channels, kept) / count_parameters(teacher)
    if max(args.target) > largest:
        problem = f"of {info.name} at most {largest:.3f} of the weights can be removed"
        fail(f"--target {max(args.target)}: {problem}; pass less")


@dataclass
class Progress:
    """What a run has behind it. Checkpoints hold it."""

    removal: int
    """Removals done."""
    kept: torch.Tensor
    """(count,) bool, the channels that are still there."""
    importance: torch.Tensor
    """(count,) fp32, the running mean of their scores."""
    choices: dict
    """{target: the channels that are kept}, of the targets that are reached."""
    arms: dict
    """{target: {stage: accuracy}}, of the targets that are fine-tuned."""


def remove_lowest(ranks, progress, teacher, channels, args):
    """Remove the channels of the lowest ranks, --channels-per-removal of them.

    Args:
        ranks: (count,), low: goes first.
        progress: Progress; `kept` changes in place, and in `choices` each target gets what is kept
            when it is reached.

    Returns:
        Share of the weights that is removed by now.
    """
    kept = progress.kept
    choices = progress.choices
    n_weights = count_parameters(teacher)
    n_before = int(kept.sum())
    share = 0.0
    for number in ranks.argsort(stable=True).tolist():
        if not kept[number] or not can_remove(channels, kept, number):
            continue
        kept[number] = False
        share = count_removed(teacher, channels, kept) / n_weights
        for target in args.target:
            if share >= target:
                choices.setdefault(name_target(target), kept.clone())
        if len(choices) == len(args.target) or kept.sum() == n_before - args.channels_per_removal:
            break
    return share


def begin_progress(channels, device):
    """The Progress before the first removal."""
    return Progress(
        removal=0,
        kept=torch.ones(channels.count, dtype=torch.bool, device=device),
        importance=torch.zeros(channels.count, device=device),
        choices={},
        arms={},
    )


def restore_progress(saved, channels, device):
    """The Progress in a checkpoint. Raise an error if it is of another network."""
    progress = Progress(**{field.name: saved[field.name] for field in fields(Progress)})
    progress.kept = progress.kept.to(device)
    progress.importance = progress.importance.to(device)
    progress.choices = {name: kept.to(device) for name, kept in progress.choices.items()}
    for numbers in (progress.kept, progress.importance, *progress.choices.values()):
        if numbers.shape != (channels.count,):
            raise ValueError("it is of a network with other channels")
    return progress


def prune(lesson, channels, savings, run, progress):
    """Remove channels, a few at a time, until the largest target; a checkpoint after each time.

    Args:
        lesson: Lesson.
        channels: of its teacher.
        savings: (count,) milliseconds that each channel's removal saves, or None.
        progress: Progress; its `choices` get every target.
    """
    args = run.args
    kept = progress.kept
    choices = progress.choices
    bar = tqdm(range(progress.removal, channels.count), disable=None, desc="pruning")
    for removal in bar:
        if len(choices) == len(args.target):
            break
        pruned = mask_channels(lesson.teacher, channels, kept).requires_grad_(True)
        scores, loss = score_channels(pruned, lesson, channels, removal, args)
        scores = scores / scores[kept].mean().clamp(min=1e-30)
        importance = scores
        if removal > 0:
            importance = MOMENTUM * progress.importance + (1 - MOMENTUM) * scores

        ranks = importance
        if savings is not None:  # paper Eq. 10, I_err + eta I_lat; I_lat, what changes, is negative
            ranks = importance - args.latency * savings / savings.mean().clamp(min=1e-30)
        share = remove_lowest(ranks, progress, lesson.teacher, channels, args)

        row = {"removal": removal + 1, "channels": int(kept.sum()), "weights": 100 * (1 - share)}
        if loss is not None:
            row["loss/importance"] = loss
        run.show(bar, row)
        progress.removal = removal + 1
        progress.importance = importance
        run.save_checkpoint(vars(progress))


# Sizes and times
def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def count_flops(network, info):
    """Floating-point operations of one image, of convolutions and linear layers alone.

    An addition and a product count one each.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which takes 0.2 s

    x = sample_example(info, next(network.parameters()).device)[:1]
    with FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


@torch.no_grad()
def measure_milliseconds(networks, info):
    """{name: milliseconds} of a forward pass of TIMED_IMAGES images, of networks {name: …}.

    The networks take turns, so that other load on the machine affects all of them alike; medians.
    """
    device = next(next(iter(networks.values())).parameters()).device
    x = sample_example(info, device)[:1].repeat(TIMED_IMAGES, 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    times = {name: [] for name in networks}
    for turn in range(TURNS + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 0:  # the first one allocates
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(median(of_one), 3) for name, of_one in times.items()}


def measure_savings(teacher, info, channels, run):
    """Milliseconds that the removal of each channel saves, (count,): the paper's look-up table.

    Channels of the same layers have one entry: the network without half of them is measured. The
    table is latency.json, so that a continued run ranks by the same numbers.
    """
    kinds = find_kinds(channels)
    path = run.out / "latency.json"
    if path.exists():
        with fail_in_one_line(f"{path} cannot be used", "begin again in another --out"):
            table = json.loads(path.read_text())
            entries = [float(entry) for entry in table]
            if len(entries) != len(kinds) or not all(0 <= x < math.inf for x in entries):
                raise ValueError(f"expected {len(kinds)} numbers of at least 0")
    else:
        networks = {"whole": teacher}
        for i, kind in enumerate(kinds):
            kept = torch.ones(channels.count, dtype=torch.bool, device=kind.device)
            kept[kind[: len(kind) // 2]] = False
            networks[i] = remove_channels(teacher, channels, kept)
        milliseconds = measure_milliseconds(networks, info)
        entries = []
        for i, kind in enumerate(kinds):
            gained = max(0.0, milliseconds["whole"] - milliseconds[i])
            n_removed = len(kind) // 2
            entry = 0.0  # of a single channel, which stays
            if n_removed > 0:
                entry = gained / n_removed
            entries.append(entry)
        with run.write_file("latency.json") as file:
            file.write(json.dumps(entries).encode())

    savings = torch.zeros(channels.count, device=kinds[0].device)
    for kind, entry in zip(kinds, entries, strict=True):
        savings[kind] = entry
    return savings


# Fine-tuning
def find_batchnorms(network):
    """The BatchNorms that have running statistics."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None]


def pick_batch(lesson, args):
    """The batch of images that BatchNorm is re-estimated on, the same in every call."""
    images = lesson.images
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randperm(len(images), generator=generator)[: args.batch_size]
    x = normalise(images[index.to(images.device)], lesson.info)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def reestimate_batchnorm(network, x):
    """Set running statistics to the moments of one batch, in place; one forward pass."""
    momenta = []
    for layer in find_batchnorms(network):
        momenta.append(layer.momentum)
        layer.reset_running_stats()
        layer.momentum = None  # a mean over all batches, of which there is one
        layer.train()
    network(x)
    for layer, momentum in zip(find_batchnorms(network), momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def compute_rate(step, args):
    """The learning rate at an update, counted from 0 over all epochs."""
    n_steps = args.epochs * args.steps_per_epoch
    return args.lr * decay_by_cosine(step, n_steps)


def train_epoch(network, lesson, optimizer, epoch, args):
    """One epoch of fine-tuning; returns the mean of the loss tau² KL(teacher || network).

    Args:
        network: in eval mode but for its BatchNorms with --statistics batch.
        epoch: counted from 0.
    """
    for layer in find_batchnorms(network):
        layer.train(args.statistics == "batch")
    rate = optimizer.param_groups[0]["lr"]
    loss_sum = torch.zeros((), device=lesson.images.device)
    for step in range(epoch * args.steps_per_epoch, (epoch + 1) * args.steps_per_epoch):
        rate.fill_(compute_rate(step, args))
        x = draw_batch(lesson, args)
        with torch.no_grad():
            t_logits = lesson.teacher(x)
        s_logits = network(x)
        loss = args.temperature**2 * compute_kl(t_logits, s_logits, args.temperature, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
    network.eval()
    return loss_sum.item() / args.steps_per_epoch


def evaluate_twice(network, batch, lesson):
    """Accuracies in percent of a network as it is, and with BatchNorm re-estimated on a batch."""
    with torch.no_grad():
        network(batch)  # a network that keeps its features can be copied without their graph
    reestimated = deepcopy(network)
    reestimate_batchnorm(reestimated, batch)
    accuracy = evaluate(network, *lesson.test, lesson.info)
    return accuracy, evaluate(reestimated, *lesson.test, lesson.info)


class Training(NamedTuple):
    """A pruned network that learns."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    first_epoch: int
    """Epochs that a continued run has behind it."""


def begin_training(teacher, channels, kept, args):
    """The Training of a network without some channels, otherwise as the teacher."""
    network = remove_channels(teacher, channels, kept).requires_grad_(True)
    return Training(network, make_optimizer("adam", network, args.lr), 0)


def restore_training(saved, teacher, channels, kept, args):
    """The Training in a checkpoint. Raise an error if it is of another network."""
    training = begin_training(teacher, channels, kept, args)
    training.network.load_state_dict(saved["network"])
    restore_optimizer(training.optimizer, saved["optimizer"])
    return training._replace(first_epoch=saved["arm_epoch"])


def tune(name, training, lesson, run, progress):
    """Measure a pruned network and fine-tune it, in place; a checkpoint after each epoch.

    Args:
        name: of the target, such as 25.
        training: Training.
        lesson: Lesson.
        progress: Progress; its `arms` get this target's accuracies.
    """
    args = run.args
    arms = progress.arms
    network, optimizer, first_epoch = training
    batch = pick_batch(lesson, args)
    if first_epoch == 0:
        torch.manual_seed(args.seed)  # so that targets do not depend on those before them
        arms[name] = dict.fromkeys(STAGES)
        if lesson.test is not None:
            found = evaluate_twice(network, batch, lesson)
            arms[name] = dict(zip(STAGES, found + found, strict=True))  # the student knows nothing
            print(f"{name} %: pruned {found[0]:.2f} %, re-estimated {found[1]:.2f} %")
        if args.statistics == "reestimated":
            reestimate_batchnorm(network, batch)
            arms[name]["student"] = arms[name]["reestimated"]  # what --epochs 0 ends with

    bar = tqdm(range(first_epoch, args.epochs), disable=None, desc=f"{name} %")
    n_before = [name_target(share) for share in args.target].index(name) * args.epochs
    for epoch in bar:
        loss = train_epoch(network, lesson, optimizer, epoch, args)
        row = {"epoch": n_before + epoch + 1, "target": int(name), "loss/kl": loss}
        if lesson.test is not None:
            of_student = evaluate_twice(network, batch, lesson)
            arms[name] |= dict(zip(STAGES[2:], of_student, strict=True))
            row["eval/acc"] = of_student[0]
        run.show(bar, row)
        state = {"epoch": row["epoch"], "arm": name, "arm_epoch": epoch + 1}
        state["network"] = network.state_dict()
        state["optimizer"] = optimizer.state_dict()
        state.update(vars(progress))
        run.save_checkpoint(state)


# Files
def save_pruned(network, name, info, channels, run):
    """Write pruned-NAME.pt: the sizes of the layers, the weights, and what they are of."""
    saved = dict(format=1, **describe_info(info))
    saved["channels"] = count_channels(network, channels)
    saved["state_dict"] = network.state_dict()
    with run.write_file(f"pruned-{name}.pt") as file:
        torch.save(saved, file)


def load_pruned(path, factory=""):
    """The network of a pruned-….pt, in eval mode, and its NetworkInfo.

    It is built as the whole network is, of the same classes, and its layers get the saved sizes.

    Args:
        path: the file.
        factory: of a network of your own its file.py:factory. The file names it too, but may not
            choose which code runs.
    """
    saved = read_checkpoint(path)
    with fail_in_one_line(f"{path}: no file of pruning.py", "pass a pruned-….pt"):
        info = read_info(saved, path, factory)
        network = build_network(info).requires_grad_(False)
        shrink_network(network, saved["channels"])
        network.load_state_dict(saved["state_dict"])
    return network.eval(), info


# Evaluation
def draw_accuracies(arms, sizes, teacher_accuracy, file):
    """Write a PNG of accuracies in percent against the weights left in percent.

    Args:
        arms: {target: {stage: accuracy}}.
        sizes: {"whole" or target: parameters}.
        teacher_accuracy: of the whole network, a dashed line.
    """
    from matplotlib.figure import Figure

    labels = {
        "student": "fine-tuned",
        "reestimated": "BatchNorm re-estimated",
        "pruned": "no fine-tuning",
    }
    left = [100 * sizes[name] / sizes["whole"] for name in arms]
    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(teacher_accuracy, color="grey", linestyle="--", label="whole network")
    for stage, label in labels.items():
        axis.plot(left, [arm[stage] for arm in arms.values()], marker="o", label=label)
    axis.set(xlabel="weights left, %", ylabel="test accuracy, %")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(file, dpi=100)


def main(args):
    if args.smoke:
        args = shrink(args)
    device = choose_device(args.device)
    seed_everything(args.seed)

    # The teacher, what can be removed of it, the real images that measure it, the others.
    teacher, info = load_teacher(args, device, size_multiple=1)
    channels = find_channels(teacher, info)
    check_removal(teacher, channels, info)
    check_targets(teacher, channels, info, args)
    lesson = load_lesson(teacher, info, args, device)

    run = RunFolder(args, device, clears=("pruned-*.pt", "latency.json"))
    images = f"{len(lesson.images)} images of {args.images}"
    print(f"{info.name}: {channels.count} removable channels, {images}")
    result = report_lesson(lesson, run)
    result["n_channels"] = channels.count
    savings = None
    if args.latency:
        savings = measure_savings(teacher, info, channels, run)

    # Which channels go.
    progress = begin_progress(channels, device)
    trainings = {}
    with run.open_checkpoint() as saved:
        if saved is not None:
            progress = restore_progress(saved, channels, device)
        if saved is not None and "arm" in saved:
            kept = progress.choices[saved["arm"]]
            trainings[saved["arm"]] = restore_training(saved, teacher, channels, kept, args)
    prune(lesson, channels, savings, run, progress)

    # Each target by itself.
    arms = progress.arms
    networks = {"whole": teacher}
    for share in args.target:
        name = name_target(share)
        is_finished = name in arms and name not in trainings  # before --resume
        if name not in trainings:
            kept = progress.choices[name]
            trainings[name] = begin_training(teacher, channels, kept, args)
        networks[name] = trainings[name].network
        if is_finished:
            continue
        tune(name, trainings[name], lesson, run, progress)
        save_pruned(networks[name], name, info, channels, run)

    # What came of it.
    for stage in STAGES:
        result[f"{stage}_accuracy"] = {name: arm[stage] for name, arm in arms.items()}
    result["parameters"] = {name: count_parameters(of) for name, of in networks.items()}
    result["flops"] = {name: count_flops(of, info) for name, of in networks.items()}
    result["milliseconds"] = measure_milliseconds(networks, info)
    if lesson.test is not None:
        with run.write_file("curve.png") as file:
            draw_accuracies(arms, result["parameters"], result["teacher_accuracy"], file)
        figures = [f"-{name} %: {arm['student']:.2f} %" for name, arm in arms.items()]
        print(f"whole {result['teacher_accuracy']:.2f} %, {', '.join(figures)}")
    run.finish(result)


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
