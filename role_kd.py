"""Role-wise augmentation for distillation: a teacher and its student each find their own.

Fu et al., "Role-Wise Data Augmentation for Knowledge Distillation", 2020, arXiv:2004.08861. A
population finds a schedule of augmentation policies for the teacher, by its validation accuracy,
then one for the student while it learns from the teacher. Both are then trained again with theirs.

    teacher: CE(t(x), y);    student, --kd soft: 0.7 CE(s(x), y) + 0.3 KL(p_t || p_s) at T = 3

Run `python role_kd.py`: digits, arm `both` beside `base`. It writes student.pt, schedules.json,
samples.png (ten images as they are and under each schedule's last policy), curve.png (`strength`
over a search), metrics.jsonl, result.json, args.json, checkpoint.pt. Metrics: `phase`, its place in
result.json's phases, from 0; `eval/validation` and `eval/mean`, percent, of a population's best and
its mean; `strength`, the sum of the best one's probabilities; `loss/train`, the mean of an epoch.
Measured, digits, 3 seeds, one CPU thread: LeNet-5 to its half 98.70 ± 0.89 % (base), 98.70 ± 0.58 %
(both); LeNet-5 to LeNet-5, base: 99.35 ± 0.32 %, W2A2 99.17 ± 0.48 %; CIFAR-10, ResNet-20 to
ResNet-8, 1,200 images: 40.32 ± 1.12 % (base), 39.72 ± 0.57 % (both).
Where we differ from the paper and its released code:
- rounds are synchronous, and the reward is the eval-mode accuracy at a round's end;
- an exploit copies all state. The released student search copies weights alone, without BatchNorm's
  statistics and Adam's averages: ours is the cleaner choice;
- --kd lacks the released MHGD and KD-SVD, whose attention heads the released code never trains;
- --bits: running moments too start from the teacher's; crops move by -4 to 4 pixels, not to 3;
- BatchNorms have PyTorch's momentum and eps: 0.1 and 1e-5, not 0.01 and 1e-3;
- what is cleared becomes black on digits and MNIST, on CIFAR the mean as a grey level.
"""

import copy
import math
import os
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from augmentations import (
    N_ENTRIES,
    N_LEVELS,
    N_PROBABILITIES,
    ZERO_POLICY,
    Recipe,
    apply_policy,
    augment_base,
    encode_schedules,
    get_policy,
    read_schedules,
    sum_probabilities,
)
from harness.data import (
    CROP_PADDING,
    MIRRORED,
    N_CLASSES,
    PIXELS,
    evaluate,
    load_dataset,
    normalise,
)
from harness.errors import fail, refuse_misfits
from harness.images import to_uint8
from harness.known import NetworkInfo, describe, make_info
from harness.load import TEACHER_ADVICE, build_network, check_network, load_student, load_trained
from harness.networks import ResBlock
from harness.pictures import draw_rows
from harness.run import (
    RunFolder,
    RunOptions,
    autocast,
    check_at_least,
    choose_device,
    parse_args,
    restore_optimizer,
    seed_everything,
)

ARMS = {  # name: its teacher, and the schedule that its student is trained with
    "base": ("base", "zero"),
    "teacher": ("augmented", "zero"),
    "student": ("base", "student"),
    "both": ("augmented", "student"),
    "shared": ("augmented", "teacher"),
    "random": ("augmented", "random"),  # the student's, its entries given to other operations
    "constant": ("augmented", "last"),  # the last policy of the student's in every epoch
}
ArmName = Literal["base", "teacher", "student", "both", "shared", "random", "constant", "all"]


@dataclass
class Args(RunOptions):
    # Run settings
    setting: Literal["cifar10", "cifar100", "digits"] = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else digits."""
    dataset: Literal["digits", "mnist", "cifar10", "cifar100"] = "cifar10"
    """Real images that both networks are trained on. digits come with scikit-learn."""
    teacher: str = "resnet20"
    """Network that stage 1 trains from scratch: a name of harness/networks.py, file.py:factory."""
    weights: str = ""
    """State dict of a trained --teacher: leaves stage 1 out; for the arms base and student."""
    student: str = "resnet8"
    """Network that stage 2 trains, named as --teacher is."""
    out: str = "runs/role_kd/default"
    """Output folder."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs their plain references."""
    bf16: bool = True
    """On a GPU: bfloat16 activations."""

    # Method
    arm: ArmName = "both"
    """Who trains with a searched schedule (ARMS). `base` is trained beside each; `all`: all seven,
    which share one teacher's and one student's search. The student's learns from the augmented
    teacher if there is one: with `all` that holds for the arm `student` too."""
    schedules: str = ""
    """Take the schedules from this file, schedules.json of another run, instead of searching. They
    are stretched to --epochs."""
    population: int = 8
    """Members of a search (released: 16)."""
    search_epochs: int = 60
    """Epochs of a search (released: 200)."""
    interval: int = 3
    """Epochs of a round, after which the worst quarter copies the best (released)."""
    search_images: int = 4000
    """Training images of a search (released)."""
    validation_images: int = 5000
    """Images, disjoint from --search-images, on which a member's accuracy is its reward
    (released: 46,000)."""
    train_images: int = 0
    """Training images of the final trainings; 0: all, the validation images too (released)."""
    epochs: int = 60
    """Epochs of a final training; the schedule is stretched to them (released: 200)."""
    batch_size: int = 128
    """Images of a step (released)."""
    lr: float = 1e-3
    """Adam's learning rate; x 0.1 at 30, 60 and 80 % of a training (released)."""
    weight_decay: float = 1e-5
    """L2 penalty on weights, not on biases and BatchNorm (released)."""
    cutout: int = 16
    """Pixels of the square that is cut out of each image of a final training (released: 16 of
    CIFAR-10, 8 of CIFAR-100); searches have none, as released."""
    kd: Literal["soft", "rkd", "at", "ab"] = "soft"
    """What of the teacher's answers the student learns; see `distillation_loss`."""
    kd_weight: float = 0.4
    """lambda of rkd, at and ab, x 0.6 at 30, 60 and 80 % of a training (released); soft: unused."""
    bits: int = 32
    """2 to 8: DoReFa's weights and activations of so many bits, for a student of the teacher's
    architecture that starts from its weights (released: 2 and 4). 32: full precision. student.pt
    holds the weights behind the quantized ones, which other scripts take as they are."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, self, "train_images", "weight_decay", "cutout", "kd_weight")
        check_at_least(1, self, "search_epochs", "interval", "search_images", "validation_images")
        check_at_least(1, self, "epochs")
        check_at_least(2, self, "population", "batch_size")
        check_at_least(1e-12, self, "lr")
        if not (2 <= self.bits <= 8 or self.bits == 32):
            raise ValueError(f"--bits: expected 2 to 8, or 32, got {self.bits}")


PRESETS = {
    "cifar10": Args(),
    "digits": Args(  # ours: a demonstration of minutes
        setting="digits",
        dataset="digits",
        teacher="lenet5",
        student="lenet5_half",
        population=4,
        search_epochs=30,
        interval=1,
        search_images=700,
        validation_images=700,
        epochs=40,
        batch_size=32,
        lr=2e-3,
        cutout=0,
    ),
    "cifar100": Args(  # the released search and its networks, but for the loss
        setting="cifar100",
        dataset="cifar100",
        teacher="resnet18_cifar",
        student="resnet18_cifar",
        population=16,
        search_epochs=200,
        validation_images=46000,
        epochs=200,
        cutout=8,
        bits=2,
    ),
}


def choose_preset(teacher, dataset):
    """The preset of a run without --setting."""
    return dataset if dataset in PRESETS else "digits"


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        population=2,
        search_epochs=2 * args.interval,
        search_images=64,
        validation_images=64,
        train_images=64,
        epochs=2,
        batch_size=32,
    )


# Data
class Split(NamedTuple):
    """Real images, and how they are augmented and normalised."""

    images: torch.Tensor
    """(N, C, H, W) uint8."""
    labels: torch.Tensor
    """(N,)."""
    recipe: Recipe
    info: NetworkInfo


def measure(network, split):
    """Top-1 accuracy in percent, in eval mode."""
    return evaluate(network, split.images, split.labels, split.info)


def load_splits(args, info, device):
    """The images of the searches, of their reward, of the final trainings, and the test images.

    The training split is shuffled once, the same for all seeds. Searches train on its first
    --search-images, the next --validation-images are their reward, and final trainings take the
    first --train-images, or all.

    Returns:
        {"search": …, "validation": …, "train": …, "test": …}, Splits.
    """
    images, labels = load_dataset(args.dataset, args.data_dir, "train")
    n_train = args.train_images or len(images)
    n_smallest = n_train
    n_needed = 0
    if list_searches(args):
        n_smallest = min(args.search_images, n_train)
        n_needed = args.search_images + args.validation_images
    if max(n_needed, n_train) > len(images):
        options = "--search-images and --validation-images, --train-images"
        fail(f"{options}: expected at most the {len(images)} training images; lower them")
    if args.batch_size > n_smallest:
        fail("--batch-size: expected at most --search-images and --train-images; lower it")

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[order].to(device)
    labels = labels[order].to(device)
    mean = torch.zeros(1, info.channels, 1, 1, device=device)  # in normalised units
    fill = to_uint8(mean, info)  # (1, C, 1, 1)
    if args.dataset in ("digits", "mnist"):
        fill = torch.zeros_like(fill)
    mirror = args.dataset in MIRRORED
    final = Recipe(CROP_PADDING[args.dataset], mirror, args.cutout, fill)
    plain = final._replace(cutout=0)

    test_images, test_labels = load_dataset(args.dataset, args.data_dir, "test")
    search = slice(args.search_images)
    reward = slice(args.search_images, args.search_images + args.validation_images)
    return {
        "search": Split(images[search], labels[search], plain, info),
        "validation": Split(images[reward], labels[reward], plain, info),
        "train": Split(images[:n_train], labels[:n_train], final, info),
        "test": Split(test_images.to(device), test_labels.to(device), plain, info),
    }


# Policies and schedules: see augmentations.py
BASE_SCHEDULE = [[1, ZERO_POLICY]]


def explore(policy, chance):
    """A changed copy of a policy, each integer by itself, as released.

    With probability 0.2 it is drawn again from its whole range. Otherwise 0, 1, 2 or 3 is added or
    subtracted, and what leaves the range is set to its end.

    Args:
        policy: 60 integers.
        chance: random.Random.
    """
    changed = []
    for place, value in enumerate(policy):
        largest = N_PROBABILITIES - 1 if place % 2 == 0 else N_LEVELS - 1
        if chance.random() < 0.2:
            changed.append(chance.randint(0, largest))
            continue
        step = chance.choice((-1, 1)) * chance.randint(0, 3)
        changed.append(min(max(value + step, 0), largest))
    return changed


def shuffle_entries(schedule, chance):
    """A random schedule of matched strength: the same pairs of probability and level at all times.

    One permutation deals the 30 entries of all policies to other operations.
    """
    order = chance.sample(range(N_ENTRIES), N_ENTRIES)
    shuffled = []
    for epochs, policy in schedule:
        pairs = [policy[2 * entry : 2 * entry + 2] for entry in order]
        shuffled.append([epochs, [value for pair in pairs for value in pair]])
    return shuffled


def choose_schedule(source, schedules, seed):
    """What a final training takes.

    Args:
        source: zero: base augmentation alone; else as in ARMS.
        schedules: {"teacher": …, "student": …}, those that have been found.
        seed: of the permutation of `random`.
    """
    if source == "zero":
        return BASE_SCHEDULE
    if source == "random":
        return shuffle_entries(schedules["student"], random.Random(seed))
    if source == "last":
        _, last_policy = schedules["student"][-1]
        return [[1, last_policy]]
    return schedules[source]


# Networks of few bits (DoReFa-Net, Zhou et al. 2016, arXiv:1606.06160)
class RoundToSteps(torch.autograd.Function):
    """Numbers in [0, 1] to the nearest of 0, 1/n, …, 1; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x, n):
        return (x * n).round() / n

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def quantize_weight(w, bits):
    """2 q - 1, where q is tanh(w) / (2 max |tanh(w)|) + 1/2 rounded to 2^bits levels in [0, 1]."""
    squashed = w.tanh()
    x = squashed / (2 * squashed.abs().max()) + 0.5
    return 2 * RoundToSteps.apply(x, 2**bits - 1) - 1


def quantize_activation(a, bits):
    """clip(a, 0, 1), rounded to 2^bits levels."""
    return RoundToSteps.apply(a.clamp(0, 1), 2**bits - 1)


class QuantizedConv2d(nn.Conv2d):
    """A convolution of quantized weights over quantized inputs; its parameters stay fp32."""

    bits = 32

    def forward(self, x):
        x = quantize_activation(x, self.bits)
        return self._conv_forward(x, quantize_weight(self.weight, self.bits), self.bias)


class QuantizedBlock(ResBlock):
    """A residual block that quantizes its input before both branches, as released."""

    bits = 32

    def forward(self, x):
        return super().forward(quantize_activation(x, self.bits))


def quantize_network(network, bits):
    """Quantise all convolutions but the first, in place; linear layers keep full precision.

    The names of parameters stay, so that the network loads a full-precision state dict.
    """
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions[1:]:
        if type(conv) is not nn.Conv2d:
            problem = f"{conv._get_name()} computes more than nn.Conv2d"
            fail(f"--bits {bits}: the network's {problem}; pass --bits 32")
        conv.__class__ = QuantizedConv2d
        conv.bits = bits
    for block in network.modules():
        if isinstance(block, ResBlock):
            block.__class__ = QuantizedBlock
            block.bits = bits


# One member of a population
@dataclass
class Member:
    """A network in training, and the policies that its weights have seen."""

    network: nn.Module
    connectors: nn.ModuleList
    """Of --kd ab; else empty."""
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """Of the order of images and their augmentation. It is the member's own, never copied."""
    policy: list
    """60 integers."""
    lineage: list
    """The schedule so far, [number of epochs, policy] of each round. A clone begins with that of
    the member that it was copied from."""
    score: float = 0.0
    """Validation accuracy in percent at the end of the last round."""

    def get_state(self):
        return {
            "network": self.network.state_dict(),
            "connectors": self.connectors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "policy": self.policy,
            "lineage": self.lineage,
            "score": self.score,
        }

    def set_state(self, state):
        state = copy.deepcopy(state)  # an optimiser would go on with the very tensors
        self.network.load_state_dict(state["network"])
        self.connectors.load_state_dict(state["connectors"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        self.policy = state["policy"]
        self.lineage = state["lineage"]
        self.score = state["score"]


# Losses of the student
def forward_with_groups(network, x):
    """Logits (N, K), and the activations whose maps are compared: () without `forward_groups`."""
    if hasattr(network, "forward_groups"):
        return network.forward_groups(x)
    return network(x), ()


def soft_loss(t_logits, s_logits, y, fused):
    """Hinton's soft targets as released: 0.7 CE + 0.3 KL(p_t || p_s), T = 3, no factor T^2."""
    kl_divergence = kernels.kl_divergence if fused else kernels.kl_divergence_ref
    return 0.7 * F.cross_entropy(s_logits, y) + 0.3 * kl_divergence(t_logits, s_logits, 3.0)


def pairwise_distances(e):
    """Distances (N, N) of points (N, D), divided by the mean of those above 0."""
    square = (e.unsqueeze(0) - e.unsqueeze(1)).square().sum(2)  # (N, N)
    apart = square > 0
    distance = torch.where(apart, square, 1).sqrt() * apart
    return distance / (distance.sum() / apart.sum().clamp(min=1))


def triplet_cosines(e):
    """Cosines (N, N, N) of the angles at the first of three points (N, D)."""
    sides = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), dim=2)  # (N, N, D): from i to j
    return sides @ sides.transpose(1, 2)


def relation_distance(t_logits, s_logits):
    """Relational distillation (Park et al. 2019, arXiv:1904.05068) on logits of length 1:

        50 Huber(pairwise distances) + 100 Huber(cosines of triplets),    means

    The weights are the released ones. Huber is d^2 / 2 below 1 and |d| - 1/2 above.
    """
    t = F.normalize(t_logits.float(), dim=1)
    s = F.normalize(s_logits.float(), dim=1)
    with torch.autocast(t.device.type, enabled=False):  # products in fp32
        distances = F.smooth_l1_loss(pairwise_distances(s), pairwise_distances(t))
        cosines = F.smooth_l1_loss(triplet_cosines(s), triplet_cosines(t))
    return 50 * distances + 100 * cosines


def attention_distance(t_groups, s_groups, fused):
    """Attention transfer (Zagoruyko, Komodakis 2017, arXiv:1612.03928): 1000 sum_l A_l,

        A_l = mean (q(s_l) - q(t_l))^2,    q(a) = F.normalize(a.square().mean(1).flatten(1))

    1000 is the beta of its authors' code.
    """
    attention_map = kernels.attention_map if fused else kernels.attention_map_ref
    attention_transfer = kernels.attention_transfer if fused else kernels.attention_transfer_ref
    distance = 0
    for t, s in zip(t_groups, s_groups, strict=True):
        distance = distance + attention_transfer(s, attention_map(t))
    return 1000 * distance


def boundary_distance(t_groups, s_groups, connectors):
    """Activation boundaries (Heo et al. 2019, arXiv:1811.03233): sum_l 2^l mean B_l,

        B_l = (s + 1)^2 where s > -1 and t <= 0;    (s - 1)^2 where s <= 1 and t > 0;    else 0

    s: the student's group behind its connector, a 1x1 convolution with BatchNorm. The margin is 1.
    Its authors learn boundaries first and classes then; the released code builds the loss and never
    minimises it. Here it is added to CE, so it is a mean: their sums, x 0.003, would drown CE.
    """
    distance = 0
    for i, (t, s) in enumerate(zip(t_groups, s_groups, strict=True)):
        s = connectors[i](s)
        off = (s + 1).square() * ((s > -1) & (t <= 0))
        on = (s - 1).square() * ((s <= 1) & (t > 0))
        distance = distance + 2**i * (off + on).float().mean()
    return distance


def distillation_loss(teacher, member, x, y, weight, args):
    """The student's loss: `soft_loss`, or CE + lambda * the distance that --kd names (released).

    Args:
        teacher: frozen; it sees the student's augmented images, as released.
        member: Member whose network is the student.
        weight: lambda.
    """
    with torch.no_grad():
        t_logits, t_groups = forward_with_groups(teacher, x)
    s_logits, s_groups = forward_with_groups(member.network, x)
    if args.kd == "soft":
        return soft_loss(t_logits, s_logits, y, args.fused)
    if args.kd == "rkd":
        distance = relation_distance(t_logits, s_logits)
    elif args.kd == "at":
        distance = attention_distance(t_groups, s_groups, args.fused)
    else:
        distance = boundary_distance(t_groups, s_groups, member.connectors)
    return F.cross_entropy(s_logits, y) + weight * distance


# One epoch of a member
def make_member(network, connectors, seed, args):
    """A member before its first step, with the all-zero policy."""
    parameters = [*network.parameters(), *connectors.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam(groups, args.lr, eps=1e-5, fused=True)  # released
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    return Member(network, connectors, optimizer, generator, ZERO_POLICY, [])


def train_epoch(member, teacher, split, progress, args):
    """One pass over a split under the member's policy.

    Args:
        member: changed in place.
        teacher: frozen network that it learns from; None: it learns from labels alone.
        split: Split.
        progress: how much of the training is done, from 0 to 1.

    Returns:
        The mean loss.
    """
    n_marks = sum(progress >= mark for mark in (0.3, 0.6, 0.8))
    for group in member.optimizer.param_groups:
        group["lr"] = args.lr * 0.1**n_marks
    kd_weight = args.kd_weight * 0.6**n_marks

    device = split.images.device
    n_batches = len(split.images) // args.batch_size  # a short last batch would disturb BatchNorm
    order = torch.randperm(len(split.images), generator=member.generator, device=device)
    total_loss = torch.zeros((), device=device)
    member.network.train()
    for chosen in order.split(args.batch_size)[:n_batches]:
        y = split.labels[chosen]  # (N,)
        images = split.images[chosen]
        images = apply_policy(images, member.policy, split.recipe.fill, member.generator)
        images = augment_base(images, split.recipe, member.generator)
        x = normalise(images, split.info).contiguous(memory_format=torch.channels_last)
        with autocast(device.type, args.bf16):
            if teacher is None:
                loss = F.cross_entropy(member.network(x), y)
            else:
                loss = distillation_loss(teacher, member, x, y, kd_weight, args)
        member.optimizer.zero_grad()
        loss.backward()
        member.optimizer.step()
        total_loss += loss.detach()
    return total_loss.item() / n_batches


# The search
def exploit(members, chance):
    """The worst quarter of a population copy members of the best quarter, and explore.

    All state is copied: weights, BatchNorm's statistics, Adam's averages, policy, lineage, score.
    Only then the policy changes, so that before its next step a clone has its source's score.

    Args:
        members: changed in place. All but the worst quarter go on unchanged.
        chance: random.Random.
    """
    ranked = sorted(members, key=lambda member: member.score)
    n = math.ceil(len(members) / 4)
    for loser in ranked[:n]:
        winner = chance.choice(ranked[-n:])
        state = winner.get_state()
        state["generator"] = loser.generator.get_state()  # a member's chance stays its own
        loser.set_state(state)
        loser.policy = explore(loser.policy, chance)


@dataclass
class Phase:
    """A search or a final training on its way."""

    name: str
    teacher: nn.Module | None
    members: list
    """The population; of a final training one member."""
    epoch: int = 0
    """Epochs that each member has behind it."""
    start: float = field(default_factory=time.time)
    """Start time; --resume sets it back by the seconds already spent."""

    def get_state(self):
        members = [member.get_state() for member in self.members]
        return {"epoch": self.epoch, "members": members}

    def set_state(self, state):
        self.epoch = state["epoch"]
        for member, member_state in zip(self.members, state["members"], strict=True):
            member.set_state(member_state)


def search(phase, splits, save, args):
    """Population based training: the schedule with which the best member got where it is.

    Args:
        phase: Phase, perhaps continued.
        splits: those of load_splits; `search` trains, `validation` rewards.
        save: function of a phase and a row of metrics.

    Returns:
        [[number of epochs, policy], …], the winner's lineage.
    """
    n_rounds = math.ceil(args.search_epochs / args.interval)  # the last may be shorter
    first_round = math.ceil(phase.epoch / args.interval)
    for round_number in range(first_round, n_rounds):
        n_epochs = min(args.interval, args.search_epochs - phase.epoch)
        for member in phase.members:
            for i in range(n_epochs):
                progress = (phase.epoch + i) / args.search_epochs
                train_epoch(member, phase.teacher, splits["search"], progress, args)
            member.lineage.append([n_epochs, member.policy])
            member.score = measure(member.network, splits["validation"])
        phase.epoch += n_epochs

        best = max(phase.members, key=lambda member: member.score)
        row = {"epoch": phase.epoch, "eval/validation": best.score}
        row["eval/mean"] = sum(member.score for member in phase.members) / len(phase.members)
        row["strength"] = sum_probabilities(best.policy)
        if phase.epoch < args.search_epochs:
            exploit(phase.members, random.Random(f"{args.seed} {phase.name} {round_number}"))
        save(phase, row)
    best = max(phase.members, key=lambda member: member.score)
    return best.lineage


def train(phase, split, schedule, save, args):
    """A final training of one network with a schedule; returns its weights."""
    (member,) = phase.members
    for epoch in range(phase.epoch, args.epochs):
        member.policy = get_policy(schedule, epoch, args.epochs)
        loss = train_epoch(member, phase.teacher, split, epoch / args.epochs, args)
        phase.epoch += 1
        row = {"epoch": phase.epoch, "loss/train": loss}
        row["strength"] = sum_probabilities(member.policy)
        save(phase, row)
    return member.network.state_dict()


# The phases of a run
def list_arms(arm):
    """The arms that a run trains."""
    return list(ARMS) if arm == "all" else list(dict.fromkeys(["base", arm]))


def list_roles(arms):
    """The roles whose schedules these arms need."""
    teachers = {ARMS[arm][0] for arm in arms}
    sources = {ARMS[arm][1] for arm in arms}
    roles = []
    if "augmented" in teachers:
        roles.append("teacher")
    if sources & {"student", "random", "last"}:
        roles.append("student")
    return roles


def list_searches(args):
    """The roles whose schedules a run searches."""
    return [] if args.schedules else list_roles(list_arms(args.arm))


def list_phases(args):
    """The names of all searches and trainings of a run, in order.

    search-teacher, teacher-base, teacher-augmented, search-student, student-ARM …
    """
    arms = list_arms(args.arm)
    roles = list_searches(args)
    phases = []
    if "teacher" in roles:
        phases.append("search-teacher")
    if not args.weights:
        phases += [f"teacher-{version}" for version in dict.fromkeys(ARMS[arm][0] for arm in arms)]
    if "student" in roles:
        phases.append("search-student")
    return [*phases, *(f"student-{arm}" for arm in arms)]


def describe_teacher(args):
    """NetworkInfo of the teacher: its architecture, and the data set's classes and pixels."""
    known = dict(dataset=args.dataset, num_classes=N_CLASSES[args.dataset], image_size=32)
    untrained = dict(accuracy=None)
    with refuse_misfits(f"--teacher {args.teacher}", TEACHER_ADVICE):
        its_own = describe(args.teacher)
        return make_info(args.teacher, its_own, known, PIXELS[args.dataset], untrained)


def build_teacher(args, info, device, state=None):
    """A fresh teacher; with `state` one of these weights, frozen."""
    with refuse_misfits(f"--teacher {args.teacher}", TEACHER_ADVICE):
        teacher = build_network(info).to(device, memory_format=torch.channels_last)
        check_network(teacher.eval(), info, device)
    if state is not None:
        teacher.load_state_dict(state)
        teacher.requires_grad_(False)
    return teacher


def build_student(args, info, device, state=None):
    """A fresh student of --bits; with `state` one of these weights."""
    student, _ = load_student(args.student, info, device)
    if state is not None:
        student.load_state_dict(state)
    if args.bits < 32:
        quantize_network(student, args.bits)
    return student


@torch.no_grad()
def find_groups(network, info):
    """The activations whose maps are compared, of two blank images."""
    x = torch.zeros(2, *info.image_shape, device=next(network.parameters()).device)
    network.eval()  # a blank batch must not reach the running moments
    _, groups = forward_with_groups(network, x)
    return groups


def build_connectors(info, teacher, student):
    """1x1 convolutions with BatchNorm from the student's groups to the teacher's (--kd ab)."""
    connectors = []
    groups = zip(find_groups(teacher, info), find_groups(student, info), strict=True)
    for t, s in groups:
        conv = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
        connectors.append(nn.Sequential(conv, nn.BatchNorm2d(t.shape[1])))
    return nn.ModuleList(connectors).to(t.device, memory_format=torch.channels_last)


def try_networks(args, info, device):
    """Build both networks once, so that what does not fit fails now; the student's NetworkInfo."""
    teacher = build_teacher(args, info, device)
    student, student_info = load_student(args.student, info, device)
    if args.kd in ("at", "ab"):
        t_sizes = [a.shape[2:] for a in find_groups(teacher, info)]
        s_sizes = [a.shape[2:] for a in find_groups(student, info)]
        if not t_sizes or t_sizes != s_sizes:
            problem = "the networks have no activations of equal sizes"
            fail(f"--kd {args.kd}: {problem}; pass --kd soft or rkd, or another --student")
    return student_info


@dataclass
class Finished:
    """What the finished phases of a run have found, or options have given in their place."""

    schedules: dict
    """{"teacher" or "student": the schedule of its search}."""
    weights: dict
    """{"teacher-base" and the like, or "student-ARM": state dict}."""

    def __contains__(self, phase):
        """Whether the phase of this name is over."""
        job, _, detail = phase.partition("-")
        if job == "search":
            return detail in self.schedules
        return phase in self.weights


def name_teacher_phase(name, finished):
    """The phase that trained a phase's teacher; "" of phases that train teachers themselves."""
    job, _, detail = name.partition("-")
    if job == "student":
        return f"teacher-{ARMS[detail][0]}"
    if name == "search-student":
        return "teacher-augmented" if "teacher-augmented" in finished else "teacher-base"
    return ""


def name_schedule(name):
    """What a final training is augmented with: the source of choose_schedule."""
    if name == "teacher-base":
        return "zero"
    if name == "teacher-augmented":
        return "teacher"
    return ARMS[name.removeprefix("student-")][1]


def start_phase(name, finished, info, args, device):
    """A Phase before its first step.

    Args:
        name: one of list_phases.
        finished: Finished.
        info: NetworkInfo of the teacher.
        args, device: the run's.
    """
    teacher_phase = name_teacher_phase(name, finished)
    teacher = None
    if teacher_phase:
        teacher = build_teacher(args, info, device, finished.weights[teacher_phase])
    members = []
    n_members = args.population if name.startswith("search") else 1
    for i in range(n_members):
        seed = 1000 * args.seed + i  # without --bits the students of all arms begin alike
        torch.manual_seed(seed)
        connectors = nn.ModuleList()
        if teacher is None:
            network = build_teacher(args, info, device)
        else:
            first = None
            if args.bits < 32:
                first = finished.weights[teacher_phase]
            network = build_student(args, info, device, first)
            if args.kd == "ab":
                connectors = build_connectors(info, teacher, network)
        members.append(make_member(network, connectors, seed, args))
    return Phase(name, teacher, members)


# Pictures
def draw_policies(images, schedules, recipe, file):
    """Ten images as they are, and under the last policy of each schedule.

    Args:
        images: (10, C, H, W) uint8.
        schedules: {"teacher": …, "student": …}, or one of them, or none.
        recipe: Recipe; its fill is used.
        file: path or file object.
    """
    rows = [("images", images)]
    for role, schedule in schedules.items():
        generator = torch.Generator(images.device).manual_seed(0)
        _, policy = schedule[-1]
        rows.append((role, apply_policy(images, policy, recipe.fill, generator)))
    draw_rows(rows, file)


def draw_strengths(strengths, file):
    """Write a PNG of each schedule's sum of probabilities over the epochs of its search.

    >>> import io
    >>> draw_strengths({"teacher": [0.0, 0.0, 1.5]}, io.BytesIO())
    """
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    for role, values in strengths.items():
        axis.step(range(1, len(values) + 1), values, where="mid", label=f"{role}'s schedule")
    axis.set(xlabel="epoch of the search", ylabel="sum of the 30 probabilities")
    axis.grid(alpha=0.3)
    if strengths:
        axis.legend(loc="upper left")
    figure.savefig(file, dpi=100)


# Main
def check_options(args):
    """Refuse options that do not go together."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("torchrun: expected one process, members take turns; run it with python")
    if args.weights and args.arm not in ("base", "student"):
        fail(f"--weights: leaves no teacher to augment for --arm {args.arm}; pass base or student")
    if args.bits < 32 and args.student != args.teacher:
        problem = f"expected a student that can start from the teacher, got {args.student}"
        fail(f"--bits {args.bits}: {problem}; pass --student {args.teacher}")
    if args.schedules:
        own = Path(args.out) / "schedules.json"
        if Path(args.schedules).resolve() == own.resolve():
            fail(f"--schedules {args.schedules}: this run would overwrite it; pass another --out")


def take_given(args, info, device):
    """Finished of what the options hand over in place of phases."""
    given = Finished(schedules={}, weights={})
    if args.schedules:
        given.schedules = read_schedules(args.schedules, list_roles(list_arms(args.arm)))
    if args.weights:
        overrides = {"num_classes": info.num_classes, "mean": info.mean, "std": info.std}
        with refuse_misfits(f"--teacher {args.teacher}", TEACHER_ADVICE):
            teacher, _ = load_trained(
                args.teacher, device, args.data_dir, args.weights, overrides=overrides
            )
        given.weights["teacher-base"] = teacher.state_dict()
    return given


def measure_all(weights, split, info, args):
    """Test accuracies in percent of all trained networks, {"teacher": {…}, "student": {…}}."""
    device = split.images.device
    accuracies = {"teacher": {}, "student": {}}
    for name, state in weights.items():
        role, _, detail = name.partition("-")
        build = build_teacher if role == "teacher" else build_student
        accuracies[role][detail] = measure(build(args, info, device, state), split)
    return accuracies


def compute_strengths(schedules):
    """The sum of probabilities of each epoch of the searches, {"teacher": […], "student": […]}."""
    strengths = {}
    for role, schedule in schedules.items():
        strengths[role] = []
        for n_epochs, policy in schedule:
            strengths[role] += [sum_probabilities(policy)] * n_epochs
    return strengths


def describe_searches(seconds, run, phases):
    """What each search cost and reached; seconds: {name of a phase: its duration}."""
    args = run.args
    costs = {}
    for number, name in enumerate(phases):
        if not name.startswith("search"):
            continue
        reward = [row for row in run.rows if row["phase"] == number][-1]["eval/validation"]
        member_epochs = args.population * args.search_epochs
        n_rounds = math.ceil(args.search_epochs / args.interval)
        n_batches = args.search_images // args.batch_size
        share = reward / 100
        costs[name.partition("-")[2]] = {
            "member_epochs": member_epochs,
            "images_trained": member_epochs * n_batches * args.batch_size,
            "images_measured": args.population * n_rounds * args.validation_images,
            "seconds": round(seconds[name], 1),
            "reward": reward,
            "reward_standard_error": 100 * math.sqrt(share * (1 - share) / args.validation_images),
        }
    return costs


def main(args):
    device = choose_device(args.device)
    if args.smoke:
        args = shrink(args)
    check_options(args)
    seed_everything(args.seed)

    info = describe_teacher(args)
    splits = load_splits(args, info, device)
    student_info = try_networks(args, info, device)
    finished = take_given(args, info, device)
    phases = list_phases(args)

    run = RunFolder(args, device, clears=("schedules.json",))
    print(f"{info.name} -> {student_info.name}: arm {args.arm}, {args.dataset}, {device}")
    phase = None
    seconds = {}
    with run.open_checkpoint() as saved:
        if saved is not None:
            finished = Finished(**saved["finished"])
            seconds = saved["seconds"]
            name = next(name for name in phases if name not in finished)
            phase = start_phase(name, finished, info, args, device)
            phase.set_state(saved)
            phase.start -= seconds[name]

    bar = tqdm(phases, disable=None)

    def save(phase, row):
        run.show(bar, {"phase": phases.index(phase.name), **row})
        seconds[phase.name] = time.time() - phase.start
        state = {"finished": vars(finished), "seconds": seconds}
        state.update(phase.get_state())
        run.save_checkpoint(state)

    for name in bar:
        bar.set_description(name)
        if name in finished:
            continue
        if phase is None:
            phase = start_phase(name, finished, info, args, device)
        if name.startswith("search"):
            role = name.removeprefix("search-")
            finished.schedules[role] = search(phase, splits, save, args)
        else:
            schedule = choose_schedule(name_schedule(name), finished.schedules, args.seed)
            finished.weights[name] = train(phase, splits["train"], schedule, save, args)
        phase = None

    # The test images are looked at here alone.
    accuracies = measure_all(finished.weights, splits["test"], info, args)
    for role, values in accuracies.items():
        for name, accuracy in values.items():
            print(f"{role} {name}: {accuracy:.2f} %")

    schedules = finished.schedules
    strengths = compute_strengths(schedules)
    with run.write_file("schedules.json") as file:
        file.write(encode_schedules(schedules))
    with run.write_file("samples.png") as file:
        draw_policies(splits["train"].images[:10], schedules, splits["train"].recipe, file)
    with run.write_file("curve.png") as file:
        draw_strengths(strengths, file)

    arm = "both" if args.arm == "all" else args.arm
    accuracy = accuracies["student"][arm]
    student = build_student(args, info, device, finished.weights[f"student-{arm}"])
    # other scripts take student.pt for a network of full precision, whose accuracy this is not
    known_accuracy = accuracy if args.bits == 32 else None
    student_info = replace(student_info, dataset=args.dataset, accuracy=known_accuracy)
    run.save_student(student, student_info, "role_kd")
    run.finish(
        dict(
            teacher=info.name,
            student=student_info.name,
            dataset=args.dataset,
            arm=args.arm,
            teacher_accuracy=accuracies["teacher"][ARMS[arm][0]],
            student_accuracy=accuracy,
            teacher_accuracies=accuracies["teacher"],
            student_accuracies=accuracies["student"],
            searches=describe_searches(seconds, run, phases),
            strengths=strengths,
            phases={name: round(seconds[name], 1) for name in phases},
        )
    )


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
