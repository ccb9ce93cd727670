"""DeepInversion and Adaptive DeepInversion: images of a network's classes from the network alone.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020,
arXiv:1912.08795. Noise is optimised until a frozen teacher assigns the wanted classes and each
BatchNorm input has the moments that training stored. With --student, a student g learns the
teacher's answers on a growing pool of such images.

    loss = CE(f(x'), y) + alpha_bn R_feature(x') + alpha_tv_l2 TV2(x') + alpha_tv_l1 TV1(x')
           + alpha_l2 R_l2(x') [ + alpha_competition R_compete(x'), adaptive ]

The view x' is x as the teacher f sees it: pooled in a low-resolution stage, rolled, mirrored.
Run `python deepinversion.py`, or with `--teacher efficientnet-lite0`; torchrun shares out the
batches. It writes args.json, metrics.jsonl, images-00000.npz … (a batch each), samples.png,
result.json; of a student student.pt, curve.png, checkpoint.pt. Metrics: `loss/total` and its terms,
unweighted, `loss/ce` `loss/bn` `loss/tv_l2` `loss/tv_l1` `loss/l2` `loss/competition`;
`eval/teacher` percent of views that the teacher assigns to their label; of an epoch `loss/student`,
`eval/acc` percent of real test images. Measured, 3 seeds, 1 CPU thread: another network agrees on
99.7 ± 0.6 % of 100 images (`cifar10`), on 98.3 ± 2.9 % of 20 (`imagenet`); MNIST ResNet-8 ->
LeNet-5: 97.60 ± 0.32 %, adaptive 97.77 ± 0.14 %. Nothing ran on a GPU.
Where we differ from paper (p) and released code (r):
- we keep the last images; r those of the lowest loss over both stages, often blurred ones;
- R_l2 is a mean over images (r, CIFAR: one norm of the batch); low-resolution stages pool the image
  as r does (p enlarges a small one); bf16 on a GPU (p: fp32); the student competes as it is, frozen
  and in eval mode (r: a fixed network that gets gradients);
- presets but for `cifar10-released` and `imagenet-0` to `-2` are ours, so are options so marked.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import kernels
from harness.data import evaluate, list_class_names, load_real_images, normalise, predict
from harness.errors import fail, fail_in_one_line, refuse_misfits
from harness.images import (
    augment,
    check_image_files,
    get_image_path,
    get_pixel_range,
    list_image_files,
    read_images,
    read_newest_images,
    save_images,
    to_uint8,
)
from harness.load import check_network, find_dataset, load_student, load_teacher, load_verifier
from harness.networks import (
    compute_last_features,
    copy_network,
    list_learning,
    sample_example,
)
from harness.pictures import draw_classes, draw_curves
from harness.run import (
    MethodOptions,
    RunFolder,
    autocast,
    check_at_least,
    choose_device,
    decay_by_cosine,
    join_processes,
    make_optimizer,
    parse_args,
    restore_optimizer,
    seed_apart,
    seed_everything,
)


@dataclass
class Args(MethodOptions):
    # Run settings, besides those of MethodOptions.
    out: str = "runs/deepinversion/default"
    """Output folder."""
    images: str = ""
    """Folder of an earlier run. The student's pool starts with its images instead of new ones;
    --batches-per-epoch still adds some."""
    verifier: str = "auto"
    """Judges the images, never optimised against: as --teacher; none; auto: the data set's."""
    num_images: int = 0
    """Images to make (with --student: before its first update), rounded up to whole batches, as
    many for each process. 0: one batch; with --student initial_batches, or none with --images."""
    classes: tuple[int, ...] = ()
    """Wanted classes, repeated in turn; empty: all; of ImageNet without a student the 42 that the
    released code shows."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl; a batch's last step has one too. The host waits for
    a GPU only there and at the end of a batch or an epoch."""

    bf16_cpu: bool = False
    """On a CPU with bfloat16 units (AVX512-BF16 or AMX): the teacher's activations in bfloat16.
    Other CPUs compute in fp32."""

    # Method: the images. The defaults are ours, for CIFAR-10.
    setting: str = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else of the teacher's data set, else any;
    without a teacher cifar10."""
    batch_size: int = 100
    """Images optimised together. Part of the method: the moments are those of a batch."""
    step_images: int = 0
    """Images of the batch that a step takes, drawn anew for each step; 0: all (paper). Fewer: the
    moments are those of random parts, so that no image makes up for what others lack (ours)."""
    iterations: int = 400
    """Steps per batch at full resolution."""
    iterations_low: int = 0
    """Steps per batch before them, at half resolution."""
    lr: float = 0.3
    """Adam's peak learning rate, in normalised units."""
    lr_low: float = 0.0
    """The same at half resolution; 0: as at full resolution (ours)."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's decay rates of its two averages (released code, ImageNet)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate, restarted in each stage; cosine: warm-up, then to zero."""
    warmup: int = 10
    """Steps of linear warm-up, at most a quarter of the stage."""
    moments: Literal["l2", "relative", "kl"] = "l2"
    """Distance of a layer's moments from the stored ones: moment_loss; l2: the paper's."""
    alpha_bn: float = 1.0
    """Weight of R_feature (released flag: r_feature)."""
    first_bn: float = 10.0
    """Factor on the first BatchNorm's share (released code, ImageNet; 1 in the paper)."""
    pixel_bn: float = 0.0
    """Weight of the pixels in R_feature, as one more layer with stored mean 0 and variance 1 in
    each channel (ours). Right only if --mean and --std are those of the training images. 0: off."""
    ce_temperature: float = 1.0
    """Divides the teacher's logits in CE. Above 1, CE keeps a gradient when the teacher is already
    sure (ours)."""
    second_class: float = 0.0
    """Each image gets a random second class, whose share of CE's target is uniform from 0 to this
    value (ours). 0: the label alone (paper)."""
    alpha_tv_l2: float = 1.5e-2
    """Weight of the l2 total variation (released flag: tv_l2)."""
    alpha_tv_l1: float = 0.0
    """Weight of the l1 total variation (released flag: tv_l1)."""
    alpha_l2: float = 0.0
    """Weight of the images' mean l2 norm (released flag: l2)."""
    jitter: int = 2
    """Largest roll in pixels at full resolution, half of it at half resolution (flag: jitter)."""
    flip: bool = True
    """Mirror the batch with probability 1/2 in each step (released flag: do_flip)."""
    clip: bool = True
    """Clip to the range of real pixels after each step: -m/s to (1 - m)/s per channel."""
    start_blur: int = 1
    """Side of a box filter on the initial noise in pixels, odd; 1: none (ours)."""
    start_gain: float = 1.0
    """Factor on the initial noise (ours)."""
    start_margin: int = 0
    """Pixels along each edge that start at the darkest value (ours, grey images)."""

    # Method: the student.
    competition: Literal["none", "js", "released"] = "none"
    """Adaptive: images that the student gets wrong; js: R_compete as in the paper; released: as in
    the released code."""
    alpha_competition: float = 10.0
    """Weight of R_compete (paper 4.1; released flag: adi_scale)."""
    initial_batches: int = 10
    """Batches made before the student's first step; unused with --num-images or --images."""
    batches_per_epoch: int = 2
    """Batches of images made in each epoch, evenly spaced over its updates."""
    epochs: int = 20
    """Epochs of the student; it is tested after each."""
    steps_per_epoch: int = 195
    """The student's updates in an epoch."""
    student_batch: int = 256
    """Images of an update, drawn from the pool."""
    optimizer: Literal["sgd", "sgd-imagenet", "adam"] = "sgd"
    """The student's; sgd: momentum 0.9, weight decay 5e-4; sgd-imagenet: momentum 0.875, weight
    decay 1/32768 but for BatchNorms (paper 4.4)."""
    lr_student: float = 0.1
    """The student's initial learning rate."""
    schedule_student: Literal["cosine", "steps"] = "cosine"
    """Of the student's learning rate; steps: a tenth after each drop_every epochs."""
    drop_every: int = 100
    """Epochs between two drops (paper 4.1)."""
    warmup_student: int = 0
    """Updates of linear warm-up of the cosine schedule."""
    temperature: float = 3.0
    """tau of the student's loss, which is multiplied by tau², and of R_compete (released: 3)."""
    shift: int = 4
    """Augmentation: largest move of each of a student's images, in pixels."""
    mirror: bool = True
    """Augmentation: mirror each of a student's images with probability 1/2."""
    cut: bool = False
    """Augmentation: give half of a student's images a band of another image (ours, grey images)."""
    mix: bool = False
    """Augmentation: blend half of a student's images with others, in random shares (mixup,
    arXiv:1710.09412; half of them: ours)."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(2, self, "batch_size")  # one image has no moments
        check_at_least(1, self, "iterations", "log_every", "start_blur", "drop_every")
        check_at_least(1, self, "epochs", "steps_per_epoch", "student_batch")
        check_at_least(1e-12, self, "lr", "lr_student", "start_gain")
        check_at_least(1e-12, self, "temperature", "ce_temperature")
        check_at_least(0, self, "num_images", "iterations_low", "warmup", "first_bn", "jitter")
        check_at_least(0, self, "alpha_bn", "pixel_bn", "alpha_tv_l2", "alpha_tv_l1", "alpha_l2")
        check_at_least(0, self, "alpha_competition", "initial_batches", "batches_per_epoch")
        check_at_least(0, self, "warmup_student", "shift", "start_margin", "lr_low", "step_images")
        if not 0 <= self.second_class <= 0.5:  # above, the second class could outweigh the label
            got = self.second_class
            raise ValueError(f"--second-class: expected a share from 0 to 0.5, got {got}")
        if self.step_images == 1:
            raise ValueError("--step-images: expected 0 or at least 2, got 1")
        if self.start_blur % 2 == 0:
            raise ValueError(f"--start-blur: expected an odd number, got {self.start_blur}")
        if not self.student and (self.images or self.competition != "none"):
            raise ValueError("--images, --competition: for a student; name one with --student")
        if self.batches_per_epoch > self.steps_per_epoch:
            raise ValueError("--batches-per-epoch: expected at most --steps-per-epoch")
        if self.competition != "none" and self.batches_per_epoch == 0:
            raise ValueError("--batches-per-epoch: expected at least 1 with --competition")


# fmt: off
CIFAR10 = Args()
RELEASED = Args(  # the released CIFAR-10 code; its student is that of the paper's section 4.1
    setting="cifar10-released", batch_size=256, iterations=2000, lr=0.05, betas=(0.9, 0.999),
    schedule="constant", alpha_bn=10.0, first_bn=1.0, alpha_tv_l2=2.5e-5, flip=False, clip=False,
    initial_batches=50, epochs=250, schedule_student="steps")  # the paper's first pool is not known
MNIST = Args(
    setting="mnist", teacher="mnist-resnet8", iterations=25, lr=0.8, alpha_bn=3.0, first_bn=1.0,
    alpha_tv_l2=5e-3, flip=False, start_blur=5, start_gain=1.2, start_margin=6,
    alpha_competition=5.0, initial_batches=20, batches_per_epoch=1, steps_per_epoch=120,
    student_batch=64, optimizer="adam", lr_student=5e-3, warmup_student=100, shift=2, mirror=False,
    cut=True)
DIGITS = replace(
    MNIST, setting="digits", teacher="digits-resnet8", iterations=40, lr=0.3, alpha_tv_l2=2e-2,
    jitter=1, start_blur=9, start_gain=0.7, start_margin=4, initial_batches=15, epochs=5,
    steps_per_epoch=300)
RELEASED_IMAGENET = Args(  # setting_id 0 of the released code; student of section 4.4, shift ours
    setting="imagenet-0", teacher="resnet50", batch_size=64, iterations=1000, iterations_low=2000,
    lr=0.2, warmup=100, alpha_bn=0.05, alpha_tv_l2=1e-4, alpha_l2=1e-5, jitter=30,
    alpha_competition=0.2, initial_batches=2188, batches_per_epoch=0, epochs=90,
    steps_per_epoch=137, student_batch=1024, optimizer="sgd-imagenet", lr_student=1.024,
    warmup_student=1096, shift=32)
IMAGENET = replace(  # ours
    RELEASED_IMAGENET, setting="imagenet", teacher="efficientnet-lite0", batch_size=20,
    step_images=10, iterations=300, iterations_low=1600, lr=0.05, lr_low=0.2, warmup=20,
    moments="kl", alpha_bn=0.3, first_bn=1.0, ce_temperature=2.0, alpha_tv_l2=1e-3, alpha_l2=0.0,
    jitter=28, start_blur=5, start_gain=0.3, initial_batches=7000)
PRESETS = {
    "cifar10": CIFAR10,
    "any": replace(  # of networks whose data set we do not know: results/moment_forms.py
        CIFAR10, setting="any", moments="relative", first_bn=1.0),
    "cifar10-long": replace(CIFAR10, setting="cifar10-long", iterations=1200, alpha_bn=3.0),
    "cifar10-student": replace(  # chosen by what students learn, not by looks: results/NOTES.md
        CIFAR10, setting="cifar10-student", iterations=50, moments="kl", alpha_bn=10.0,
        first_bn=1.0, pixel_bn=1.0, ce_temperature=3.0, second_class=0.5, initial_batches=20,
        epochs=45, steps_per_epoch=500, student_batch=64, mix=True),
    "cifar10-released": RELEASED,
    "mnist": MNIST,
    "digits": DIGITS,
    "imagenet": IMAGENET,
    "imagenet-long": replace(
        IMAGENET, setting="imagenet-long", iterations_low=2000, iterations=400, ce_temperature=1.0),
    "imagenet-0": RELEASED_IMAGENET,
    "imagenet-1": replace(
        RELEASED_IMAGENET, setting="imagenet-1", iterations=2000, iterations_low=0),
    "imagenet-2": replace(  # nearest the paper's section 4.2
        RELEASED_IMAGENET, setting="imagenet-2", iterations=20000, iterations_low=0,
        betas=(0.9, 0.999), clip=False),
}
# The 42 classes of ImageNet that the released code makes images of; first those whose images were
# named best by viewers: goldfish, zebra, tiger, bee, butterfly, bear, balloon, cheeseburger,
# volcano, cell phone; golf ball, restaurant, bottle, guitar, pizza, cardoon, strawberry, clock,
# otter and Chihuahua.
SHOWN_CLASSES = (
    1, 340, 292, 309, 325, 294, 417, 933, 980, 487, 574, 762, 440, 402, 963, 946, 949, 409, 360,
    151,
    25, 63, 92, 94, 107, 154, 207, 250, 270, 277, 283, 311, 386, 403, 468, 530, 590, 670, 817, 920,
    967, 985)
# fmt: on
PRESET_OF_DATASET = {
    "cifar10": "cifar10",
    "cifar100": "cifar10",
    "mnist": "mnist",
    "digits": "digits",
    "imagenet": "imagenet",
}
VERIFIERS = {
    "cifar10": "cifar10-wrn-16-1",
    "mnist": "mnist-lenet5",
    "digits": "digits-lenet5",
    "imagenet": "efficientnet-lite2",
}


# Precision and constants
def choose_dtype(device, args):
    """What the teacher's activations are computed in: bfloat16 or float32."""
    is_wanted = args.bf16
    if device == "cpu":
        find_units = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 has no such function
        units = {}
        if find_units is not None:
            units = find_units()
        has_units = units.get("avx512_bf16", False) or units.get("amx_bf16", False)
        is_wanted = args.bf16_cpu and has_units
    return torch.bfloat16 if is_wanted else torch.float32


@functools.cache  # made once, so that a step does not fill them in again
def make_constants(numbers, device):
    """A tuple of n python numbers as a tensor (n,) fp32; nothing is copied from the host."""
    with torch.inference_mode(False):  # a later step may differentiate
        return torch.stack([torch.full((), float(number), device=device) for number in numbers])


# Losses
@dataclass
class Target:
    """What the images of one batch are optimised for."""

    labels: torch.Tensor
    """(N,) int64, the wanted classes y."""
    watched: Callable
    """The teacher as watch_batchnorms returns it: view -> logits, kernels.LayerMoments."""
    opponent: nn.Module | None
    """The student that the images compete with, frozen and in eval mode; None: no competition."""
    shares: torch.Tensor | None = None
    """(N, K) of sample_shares, the classes that CE wants; None: the labels alone."""


def select_targets(target, numbers):
    """The Target of the images with these numbers, (n,)."""
    shares = target.shares
    if shares is not None:
        shares = shares[numbers]
    return replace(target, labels=target.labels[numbers], shares=shares)


def moment_loss(found, args):
    """R_feature, eq. 4: how far a batch's moments are from those that the teacher stored.

    The stored ones stand for the training data's expectations (eq. 5 and 6).

        R_feature(x) = sum_l w_l d_l
        l2:        d_l = || mean_l(x) - running_mean_l ||_2 + || var_l(x) - running_var_l ||_2
        relative:  the same with the norms divided by || sqrt(running_var_l) ||_2 and
                   || running_var_l ||_2
        kl:        d_l = mean over channels of KL( N(mean_l(x), var_l(x)) ||
                                                   N(running_mean_l, running_var_l) )

    `l2` is the paper's; its norms are not squared. `relative` and `kl` are ours. The variances are
    biased. w_l is first_bn for the BatchNorm that runs first, pixel_bn for the pixels, else 1.

    Args:
        found: kernels.LayerMoments of the layers l as they run, after the pixels if args.pixel_bn.
            Row 0 of its moments is mean_l - running_mean_l already, row 1 is var_l; `kl` adds its
            eps to both variances.

    Returns:
        () fp32.
    """
    weights = [args.first_bn]
    if args.pixel_bn:
        weights = [args.pixel_bn, args.first_bn]
    weights += [1.0] * (len(found.sizes) - len(weights))
    distance = kernels.moment_distance if args.fused else kernels.moment_distance_ref
    return distance(
        found.moments, found.running_var, found.sizes, tuple(weights), args.moments, found.eps
    )


def put_pixels_first(view, found, args):
    """LayerMoments of the pixels (N, C, H, W), as of one more layer, and of the layers found."""
    bn_moments = kernels.bn_moments if args.fused else kernels.bn_moments_ref
    moments = torch.stack(bn_moments(view))  # (2, C), less the wanted mean, 0
    wanted_var = torch.ones_like(moments[1])
    return kernels.LayerMoments(
        torch.cat((moments, found.moments), 1),
        torch.cat((wanted_var, found.running_var)),
        (len(wanted_var), *found.sizes),
        (1e-5, *found.eps),  # BatchNorm's default
    )


def competition_loss(t_logits, s_logits, args):
    """R_compete, eq. 8: 1 - JS(p_T, p_S), low where teacher and student disagree; () fp32.

        JS(P, Q) = (KL(P || M) + KL(Q || M)) / 2,   M = (P + Q) / 2

    P, Q: the networks' probabilities at args.temperature. JS is at most ln 2 and has a gradient
    everywhere. `released` clamps at 0: once a batch's mean divergence passes 1, as it does when
    two confident networks disagree, no image of the batch gets a gradient.
    """
    if args.competition == "released":
        divergence = kernels.js_released(t_logits, s_logits, args.temperature)
        return 1 - divergence.clamp(0, 1)
    js_divergence = kernels.js_divergence if args.fused else kernels.js_divergence_ref
    return 1 - js_divergence(t_logits, s_logits, args.temperature)


# "competition" is NaN without an opponent
TERMS = "total", "ce", "bn", "tv_l1", "tv_l2", "l2", "competition", "teacher"


def synthesis_loss(x, move, target, args):
    """The loss of images x (N, C, H, W), eq. 2: CE, and eq. 3, 4 and 8, of the view x'.

        CE = - mean_i sum_k q_ik log softmax(f(x'_i) / ce_temperature)_k
             paper: q one-hot, ce_temperature 1; ours: q of sample_shares
        TV2 = sum_d || x' - shift_d(x') ||_2    over the whole batch
        TV1 = sum_d mean | x' - shift_d(x') |   d: right, down, and both diagonals, by one pixel
        R_l2 = mean over images of || x' ||_2

    Args:
        x: in normalised units.
        move: (3,) int64: rows and columns that the view is rolled by, whether it is mirrored.
        target: Target.

    Returns:
        () total loss, and (8,) of TERMS, unweighted and detached. `competition` is NaN without an
        opponent; `teacher` is the percentage of views that the teacher assigns to their labels,
        whatever the second classes.
    """
    device = x.device.type
    dtype = choose_dtype(device, args)
    make_view = kernels.jittered_view if args.fused else kernels.jittered_view_ref
    view, tv_l1, tv_l2, l2 = make_view(x, move, dtype)  # (N, C, H, W), (), (), ()
    is_half = dtype == torch.bfloat16
    half_precision = torch.autocast(device, torch.bfloat16, is_half, cache_enabled=False)
    with half_precision:
        t_logits, found = target.watched(view)  # (N, K)
    if args.pixel_bn:
        found = put_pixels_first(view, found, args)
    ce_logits = t_logits.float()
    if args.ce_temperature != 1:  # two launches on a GPU, for nothing at 1
        ce_logits = ce_logits / args.ce_temperature
    wanted = target.labels  # (N,)
    if target.shares is not None:
        wanted = target.shares  # (N, K)
    terms = {
        "ce": F.cross_entropy(ce_logits, wanted),
        "bn": moment_loss(found, args),
        "tv_l1": tv_l1,
        "tv_l2": tv_l2,
        "l2": l2,
    }
    weights = {
        "ce": 1.0,
        "bn": args.alpha_bn,
        "tv_l1": args.alpha_tv_l1,
        "tv_l2": args.alpha_tv_l2,
        "l2": args.alpha_l2,
        "competition": args.alpha_competition,
    }
    if target.opponent is not None:
        with half_precision:
            s_logits = target.opponent(view)
        terms["competition"] = competition_loss(t_logits, s_logits, args)

    # a term of weight 0 is only reported: its gradient would cost time
    names = [name for name in terms if weights[name]]
    alphas = make_constants(tuple(weights[name] for name in names), x.device)  # (n,)
    total = (alphas * torch.stack([terms[name] for name in names])).sum()

    terms["total"] = total
    terms["teacher"] = (t_logits.argmax(1) == target.labels).float().mean() * 100
    (missing,) = make_constants((math.nan,), x.device)
    values = torch.stack([terms.get(name, missing) for name in TERMS])
    return total, values.detach()


def student_loss(t_logits, s_logits, args):
    """Eq. 1: tau² KL(p_T || p_S) at temperature tau (Hinton et al. 2015, arXiv:1503.02531)."""
    tau = args.temperature
    kl_divergence = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    return tau**2 * kl_divergence(t_logits, s_logits, tau)


# The images
def watch_batchnorms(teacher, example, args, device):
    """The frozen teacher as steps call it: view -> logits (N, K), kernels.LayerMoments.

    The moments are those of its BatchNorms' inputs, as moment_loss takes them. With args.fused the
    example decides how they are measured, and the attribute `reason` says what is not fused. What
    is watched is a copy where there can be one: the teacher keeps fp32 weights, without hooks.

    Args:
        teacher: in eval mode.
        example: some images (N, C, H, W), as of sample_example.
    """
    network = copy_network(teacher, example)
    if args.fused:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fuse_batchnorm: ")  # main prints the reason
            watched = kernels.fuse_batchnorm(network, example)
    else:
        watched = kernels.hook_batchnorm(network, moments=kernels.bn_moments_ref)

    if choose_dtype(device, args) == torch.bfloat16 and network is not teacher:
        for module in network.modules():  # whose weights `watched` shares
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)  # once; autocast would convert them in every step
    return watched


class Stage(NamedTuple):
    """Part of a batch's optimisation at one resolution."""

    n_steps: int
    scale: int
    """Factor by which the teacher sees the images smaller."""
    jitter: int
    """Largest roll in pixels that the teacher sees."""
    lr: float
    """Peak learning rate."""


def list_stages(args):
    """The stages of a batch, the low-resolution one first."""
    stages = []
    if args.iterations_low:
        lr = args.lr_low or args.lr
        stages.append(Stage(args.iterations_low, scale=2, jitter=args.jitter // 2, lr=lr))
    stages.append(Stage(args.iterations, scale=1, jitter=args.jitter, lr=args.lr))
    return stages


def count_steps(args):
    """Steps of a batch."""
    return sum(stage.n_steps for stage in list_stages(args))


def compute_cosine(step, n_steps, peak, warmup):
    """Linear warm-up to `peak`, over at most a quarter of the steps (ours), then cosine to zero."""
    warmup = min(warmup, n_steps // 4)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * decay_by_cosine(step - warmup, n_steps - warmup)


def make_generator(number, args, stream=0):
    """Random numbers of batch `number`, from --seed and this number alone.

    Args:
        stream: another one has other numbers, so that an option that draws some more leaves noise
            and rolls as they are.
    """
    state = np.random.SeedSequence([args.seed, number, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def sample_randomness(number, shape, args):
    """All that is random in batch `number`; it depends on --seed and this number alone.

    Returns:
        Noise (N, C, H, W), and for each stage (n_steps, 3) int64: pixels down, pixels right,
        mirrored or not; one draw a step for the whole batch, as in the released code. With
        --step-images (n_steps, 3 + step_images): then come the images that the step takes.
    """
    generator = make_generator(number, args)
    noise = torch.randn(shape, generator=generator)
    draws = []
    for stage in list_stages(args):
        low = -stage.jitter
        high = stage.jitter + 1
        rolls = torch.randint(low, high, (stage.n_steps, 2), generator=generator)
        mirrored = torch.randint(2, (stage.n_steps, 1), generator=generator) * args.flip
        draw = torch.cat((rolls, mirrored), 1)  # (n_steps, 3)
        if 0 < args.step_images < len(noise):
            keys = torch.rand(stage.n_steps, len(noise), generator=generator)
            draw = torch.cat((draw, keys.argsort(1)[:, : args.step_images]), 1)
        draws.append(draw)
    return noise, draws


def sample_shares(labels, number, n_classes, args):
    """What CE wants of batch `number`: beside each image's label a part of a second class.

        q = (1 - share) onehot(y) + share onehot(y'),    share ~ U(0, second_class),  y' != y

    Such images lie between classes, as some real ones do. Ours; what it changes: results/NOTES.md.

    Args:
        labels: (N,) int64, y.

    Returns:
        (N, n_classes) fp32, or None without args.second_class.
    """
    if args.second_class == 0:
        return None
    generator = make_generator(number, args, stream=1)
    share = args.second_class * torch.rand(len(labels), 1, generator=generator)
    offset = torch.randint(1, n_classes, labels.shape, generator=generator)
    second = (labels + offset) % n_classes
    return (1 - share) * F.one_hot(labels, n_classes) + share * F.one_hot(second, n_classes)


def make_start_images(noise, info, args):
    """What a batch starts from: N(0, 1) noise times start_gain, blurred and with a dark edge.

    For grey images this is knowledge about digits that comes from us and not from the teacher:
    strokes are some pixels wide (start_blur) and stand in the middle (start_margin). The figures
    of MNIST and digits depend on it. On ImageNet weak and smooth noise spares some images from
    staying noise.
    """
    if args.start_blur == 1 and args.start_margin == 0:
        return noise * args.start_gain
    low, high = get_pixel_range(info, "cpu")
    blur = args.start_blur
    margin = args.start_margin
    x = F.avg_pool2d(noise, blur, 1, blur // 2) * blur  # deviation 1 again, but for the edges
    x = x * args.start_gain
    height, width = x.shape[2:]
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[margin : height - margin, margin : width - margin] = True
    return torch.where(inside, x, low).clamp(low, high)


def optimise_images(x, draws, stage, target, bounds, args):
    """One stage: an Adam step on the images for each draw.

    Args:
        x: (N, C, H, W) fp32, channels_last, a leaf; changed in place.
        draws: (n_steps, 3 or more) int64, as of sample_randomness, on x's device.
        stage: Stage.
        target: Target.
        bounds: lowest and highest value of a pixel, (1, C, 1, 1) each.

    Yields:
        After each step, (8,) of TERMS of the images before it; the same tensor each time.
    """
    low, high = bounds
    n_steps = len(draws)
    # a CUDA graph reads and writes these, so they stay the same objects
    draw = torch.zeros_like(draws[0])
    lr = torch.zeros((), device=x.device)
    terms = torch.zeros(len(TERMS), device=x.device)
    optimizer = torch.optim.Adam([x], lr, args.betas, fused=True, capturable=x.is_cuda)

    def update_images():
        seen = x
        seen_target = target
        part = draw[3:]  # (n,) of the images; none: the step takes all
        if len(part):
            seen = x.index_select(0, part).contiguous(memory_format=torch.channels_last)
            seen_target = select_targets(target, part)
        if stage.scale > 1:
            seen = F.avg_pool2d(seen, stage.scale)
        total, values = synthesis_loss(seen, draw[:3], seen_target, args)
        (gradient,) = torch.autograd.grad(total, x)
        # fused Adam walks through both memories side by side, whatever their strides say
        x.grad = gradient.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        if args.clip:
            with torch.no_grad():
                torch.clamp(x, low, high, out=x)
        terms.copy_(values)

    run_step = kernels.CapturedStep(update_images, enabled=args.graph and x.is_cuda)
    for step in range(n_steps):
        rate = stage.lr
        if args.schedule == "cosine":
            rate = compute_cosine(step, n_steps, stage.lr, args.warmup)
        lr.fill_(rate)
        draw.copy_(draws[step])
        run_step()
        yield terms


class Synthesis:
    """Makes batches of images and keeps them in files; a finished file is its own checkpoint.

    Args:
        watched: the teacher, of watch_batchnorms.
        info: NetworkInfo of the teacher.
        labels: (n_batches, N) int64, the wanted classes.
        run: RunFolder; it gets the rows of metrics.jsonl.
        bar: progress bar that counts steps.
        world: number of processes that share the batches out.
    """

    def __init__(self, watched, info, labels, run, bar, world=1):
        self.watched = watched
        self.info = info
        self.labels = labels
        self.run = run
        self.bar = bar
        self.world = world
        self.args = run.args

    def make_batch(self, number, opponent=None):
        """Images (N, C, H, W) uint8 of batch `number`, on the CPU; from its file if it is there."""
        path = get_image_path(self.args.out, number)
        if path.exists():
            self.bar.update(count_steps(self.args))
            return self.read_batch(path, number)
        advice = list_remedies("--batch-size", self.run.device)
        # a noisy teacher draws for each batch anew, whatever was made before it
        seed = make_generator(number, self.args).initial_seed() % 2**32
        with fail_in_one_line(f"batch {number} failed", advice), seed_apart(seed, self.run.device):
            x = self.synthesise(number, opponent)
        if not x.isfinite().all():  # the loss before the last step may still have been finite
            fail(f"batch {number} is not finite; lower --lr or the weights of the terms")
        images = to_uint8(x, self.info).cpu()
        save_images(path, images, self.labels[number])
        self.run.save_seconds()
        return images

    def read_batch(self, path, number):
        """The images of batch `number` in its file, which must be those of this run."""
        images, labels = read_images(path)
        shape = (self.labels.shape[1], *self.info.image_shape)
        fits = images.dtype == torch.uint8 and images.shape == shape
        if not fits or not torch.equal(labels, self.labels[number]):
            fail(f"{path} holds no batch of this run; put its own back, or delete it")
        return images

    def make_competing_batch(self, number, student):
        """As make_batch; with --competition the student competes as it is now, frozen."""
        if self.args.competition == "none":
            return self.make_batch(number)
        learning = list_learning(student)
        student.eval()
        student.requires_grad_(False)
        images = self.make_batch(number, opponent=student)
        student.train()
        for parameter in learning:
            parameter.requires_grad_(True)
        return images

    def discard_unfinished(self, n_initial, n_finished):
        """Delete the batches of an unfinished epoch; refuse where one of a finished epoch is lost.

        A batch that competed cannot be made again: its student has learnt on since. Those of the
        initial pool did not compete.
        """
        paths = [get_image_path(self.args.out, number) for number in range(len(self.labels))]
        for path in paths[n_initial:n_finished]:
            if self.args.competition != "none" and not path.exists():
                fail(f"{path} is missing; put it back, or begin again in another --out")
        for path in paths[n_finished:]:
            path.unlink(missing_ok=True)

    def synthesise(self, number, opponent):
        """All stages of one batch; its images (N, C, H, W) in normalised units."""
        device = self.run.device
        labels = self.labels[number]
        shares = sample_shares(labels, number, self.info.num_classes, self.args)
        if shares is not None:
            shares = shares.to(device)
        target = Target(labels.to(device), self.watched, opponent, shares)
        bounds = get_pixel_range(self.info, device)
        shape = (len(labels), *self.info.image_shape)
        noise, draws = sample_randomness(number, shape, self.args)
        x = make_start_images(noise, self.info, self.args)
        x = x.to(device, memory_format=torch.channels_last).requires_grad_()

        step = number // self.world * count_steps(self.args)  # of this process's earlier batches
        last_step = step + count_steps(self.args)
        for i, stage in enumerate(list_stages(self.args)):
            stage_draws = draws[i].to(device)
            # each stage has a fresh Adam, as in the released code
            for terms in optimise_images(x, stage_draws, stage, target, bounds, self.args):
                step += 1
                self.bar.update()
                if step % self.args.log_every == 0 or step == last_step:
                    self.log_terms({"step": step, "batch": number, "stage": i}, terms)
        return x.detach()

    def log_terms(self, row, terms):
        """Write a row with the terms. The host waits for the device here, and sees a NaN."""
        values = dict(zip(TERMS, terms.tolist(), strict=True))
        if not math.isfinite(values["total"]):
            problem = f"the loss is {values['total']} at step {row['step']}"
            fail(f"{problem}; lower --lr or the weights of the terms")
        for name in TERMS:
            prefix = "eval" if name == "teacher" else "loss"
            if not math.isnan(values[name]):  # no competition
                row[f"{prefix}/{name}"] = values[name]
        self.run.show(self.bar, row)


def list_remedies(size, device):
    """What to try where a step fails: a smaller `size` (an option), or less of what is fast."""
    if device == "cuda":
        return f"try a smaller {size}, --no-graph, --no-bf16 or --no-fused"
    return f"try a smaller {size} or --no-fused"


# Files and labels
def choose_classes(info, args):
    """The wanted classes, (n,) int64, in a random order if a batch cannot hold them all.

    The 42 of ImageNet keep their order: those that viewers name best come first.
    """
    if not args.classes and info.dataset == "imagenet" and not args.student:
        return torch.tensor(SHOWN_CLASSES)
    wanted = args.classes or range(info.num_classes)
    if min(wanted) < 0 or max(wanted) >= info.num_classes:
        fail(f"--classes: expected numbers from 0 to {info.num_classes - 1}, got {wanted}")
    classes = torch.tensor(wanted)
    if len(classes) > args.batch_size:
        generator = torch.Generator().manual_seed(args.seed)
        classes = classes[torch.randperm(len(classes), generator=generator)]
    return classes


def choose_labels(classes, n_batches, args):
    """Labels (n_batches, N): the wanted classes in turn.

    Batches are whole, because their size is part of the method.
    """
    n_images = n_batches * args.batch_size
    n_repeats = math.ceil(n_images / len(classes))
    return classes.repeat(n_repeats)[:n_images].view(n_batches, args.batch_size)


def keep_finished_rows(run, epoch):
    """Forget the rows of batches without a file and of epochs after `epoch`."""
    rows = []
    for row in run.rows:
        if "epoch" in row:
            finished = row["epoch"] <= epoch
        else:
            finished = get_image_path(run.args.out, row["batch"]).exists()
        if finished:
            rows.append(row)
    run.keep_rows(rows)


# The student
class Pool:
    """Images on their device, as bytes, from which a student draws; it grows batch by batch.

    Args:
        synthesis: Synthesis; there is room for all batches that it will make.
        given: paths of image files that are in the pool from the start.
    """

    def __init__(self, synthesis, given):
        info = synthesis.info
        device = synthesis.run.device
        batches = [read_images(path)[0] for path in given]
        n_images = synthesis.labels.numel() + sum(len(images) for images in batches)
        if n_images == 0:
            advice = "raise --num-images or --batches-per-epoch, or pass --images"
            fail(f"the student has no images: {advice}")
        subject = f"{n_images} images of {info.image_size} pixels do not fit"
        with fail_in_one_line(subject, "take fewer, or another --device"):
            shape = (n_images, *info.image_shape)
            self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.low, self.high = get_pixel_range(info, device)
        self.n_images = 0
        self.n_newest = 0
        # which images `draw` samples from: a CUDA graph reads these
        self.first = torch.zeros((), dtype=torch.long, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        for images in batches:
            self.add(images)

    def add(self, images):
        """Append a batch, uint8 (N, C, H, W); it is the newest now."""
        end = self.n_images + len(images)
        self.images[self.n_images : end] = images.to(self.images.device)
        self.n_images = end
        self.n_newest = len(images)

    def sample_from(self, newest):
        """Choose what later draws sample from: the newest batch or the whole pool."""
        count = self.n_newest if newest else self.n_images
        self.first.fill_(self.n_images - count)
        self.count.fill_(count)

    def draw(self, n):
        """n images drawn with replacement, (n, C, H, W) fp32 in normalised units."""
        # in double precision: fp32 would not draw all images of a large pool alike
        position = torch.rand(n, dtype=torch.double, device=self.images.device)
        # rounded down before the addition, which could round up to one image too far
        images = self.images[self.first + (position * self.count).long()]
        return torch.lerp(self.low, self.high, images.float() / 255)


def compute_student_rate(epoch, step, args):
    """The student's learning rate at an update of an epoch, both counted from 0."""
    if args.schedule_student == "steps":
        return args.lr_student * 0.1 ** (epoch // args.drop_every)
    n_steps = args.epochs * args.steps_per_epoch
    return compute_cosine(
        epoch * args.steps_per_epoch + step, n_steps, args.lr_student, args.warmup_student
    )


def restore_student(run, student, optimizer):
    """Go back to the last epoch that a killed run finished; return how many there were."""
    with run.open_checkpoint() as saved:
        student.load_state_dict(saved["student"])
        restore_optimizer(optimizer, saved["optimizer"])
        return int(saved["epoch"])


def train_student(student, teacher, synthesis, given, test):
    """Train a student on a pool of images that grows while it learns; a checkpoint an epoch.

    Each epoch makes batches_per_epoch new batches, evenly spaced over its updates. The update after
    a new batch draws from it alone, the others from the whole pool.

    Args:
        student: in train mode.
        teacher: frozen.
        synthesis: Synthesis, makes the batches.
        given: paths of image files that the pool starts with.
        test: real images and labels that measure the student, or None.

    Returns:
        Test accuracies after each epoch, in percent; empty without test images.
    """
    args = synthesis.args
    run = synthesis.run
    device = run.device
    n_new = args.batches_per_epoch
    n_initial = len(synthesis.labels) - args.epochs * n_new
    optimizer = make_optimizer(args.optimizer, student, args.lr_student)
    lr = optimizer.param_groups[0]["lr"]  # a tensor, which a CUDA graph reads
    loss_sum = torch.zeros((), device=device)

    first_epoch = 0
    if run.has_checkpoint():
        first_epoch = restore_student(run, student, optimizer)
    n_finished = n_initial + first_epoch * n_new
    synthesis.discard_unfinished(n_initial, n_finished)
    keep_finished_rows(run, first_epoch)
    pool = Pool(synthesis, given)
    for number in range(n_finished):
        pool.add(synthesis.make_batch(number))

    def update_student():
        x = augment(pool.draw(args.student_batch), args.shift, args.mirror, args.cut, args.mix)
        with autocast(device, args.bf16):
            with torch.no_grad():
                t_logits = teacher(x)
            loss = student_loss(t_logits, student(x), args)
        optimizer.zero_grad()
        loss.backward(inputs=list_learning(student))
        optimizer.step()
        loss_sum.add_(loss.detach())

    run_step = kernels.CapturedStep(update_student, enabled=args.graph and device == "cuda")
    # batch k of an epoch is made before this update
    due = [math.ceil(k * args.steps_per_epoch / n_new) for k in range(n_new)]
    for epoch in range(first_epoch, args.epochs):
        for step in range(args.steps_per_epoch):
            if step in due:
                number = n_initial + epoch * n_new + due.index(step)
                pool.add(synthesis.make_competing_batch(number, student))
            pool.sample_from(newest=step in due)
            lr.fill_(compute_student_rate(epoch, step, args))
            run_step()
            synthesis.bar.update()
        row = {"epoch": epoch + 1, "loss/student": loss_sum.item() / args.steps_per_epoch}
        loss_sum.zero_()
        if test is not None:
            row["eval/acc"] = evaluate(student, *test, synthesis.info)
        run.show(synthesis.bar, row)
        state = dict(epoch=epoch + 1, student=student.state_dict())
        state["optimizer"] = optimizer.state_dict()
        run.save_checkpoint(state)
    return run.column("eval/acc")


# Evaluation
def measure_agreement(network, info, paths):
    """How many of the images in these files a network assigns to the class they were made for.

    Returns:
        Percent in all, and {class: percent} of the classes that occur.
    """
    hits = torch.zeros(info.num_classes, dtype=torch.long)
    counts = torch.zeros(info.num_classes, dtype=torch.long)
    for path in paths:
        images, labels = read_images(path)
        predicted = predict(network, images, info, batch_size=100).cpu()
        hits += torch.bincount(labels[predicted == labels], minlength=info.num_classes)
        counts += torch.bincount(labels, minlength=info.num_classes)
    by_class = {}
    for k in counts.nonzero().flatten().tolist():
        by_class[k] = round(100 * hits[k].item() / counts[k].item(), 2)
    return round(100 * hits.sum().item() / counts.sum().item(), 2), by_class


def measure_diversity(network, info, images, labels):
    """Mean cosine distance from an image to its nearest neighbour of the same class.

    Measured in what enters the network's last linear layer. 0: each image has a copy. Comparable
    only between sets of one size and one network.

    Args:
        images, labels: uint8 (N, C, H, W) and (N,), at most some thousands.

    Returns:
        A number from 0 to 2; None without two images of a class or without a linear layer.
    """
    device = next(network.parameters()).device
    batches = (normalise(part.to(device), info) for part in images.split(100))
    features = compute_last_features(network, batches)
    if features is None:
        return None
    features = F.normalize(torch.cat(features).float(), dim=1)  # (N, D)
    similarity = features @ features.T  # (N, N)
    is_other_class = labels[:, None] != labels
    is_itself = torch.eye(len(labels), dtype=torch.bool)
    similarity[is_other_class | is_itself] = -math.inf
    nearest = similarity.amax(1)
    nearest = nearest[nearest.isfinite()]
    return round(1 - nearest.mean().item(), 4) if len(nearest) else None


def report_agreement(role, network, info, paths):
    """What result.json says of how teacher or verifier (a network or None) see the images."""
    result = {role: None, f"{role}_agreement": None, f"{role}_agreement_by_class": None}
    if network is not None:
        percent, by_class = measure_agreement(network, info, paths)
        print(f"{role} {info.name} assigns {percent:.1f} % of the images to the wanted class")
        result[role] = info.name
        result[f"{role}_agreement"] = percent
        result[f"{role}_agreement_by_class"] = by_class
    return result


def report_images(run, paths, teacher, info):
    """Draw samples.png; returns what result.json says of the images in these files."""
    images, labels = read_newest_images(paths)
    with run.write_file("samples.png") as file:
        draw_classes(images, labels, list_class_names(info.dataset), file)
    n_images = sum(len(read_images(path)[1]) for path in paths)
    return dict(n_images=n_images, diversity=measure_diversity(teacher, info, images, labels))


# Main
def choose_preset(teacher, dataset):
    """The preset of --dataset, or of the data set that the teacher was trained on, or `any`.

    Without a teacher it is `cifar10`.
    """
    if dataset in ("", "auto", "none"):
        if not teacher:
            return "cifar10"
        dataset = find_dataset(teacher)
    return PRESET_OF_DATASET.get(dataset, "any")


def shrink(args):
    """The --smoke run: 6 steps on batches of 20 images; of a student 2 epochs of 2 updates."""
    iterations_low = min(args.iterations_low, 4)
    return replace(
        args,
        batch_size=min(args.batch_size, 20),
        step_images=min(args.step_images, 10),
        iterations=6 - iterations_low,
        iterations_low=iterations_low,
        initial_batches=1,
        batches_per_epoch=1,
        epochs=2,
        steps_per_epoch=2,
        student_batch=20,
    )


def load_checked_teacher(args, device):
    """The teacher, tried out at each resolution of its stages; it must have what args need."""
    size_multiple = 2 if args.iterations_low else 1
    teacher, info = load_teacher(args, device, size_multiple)
    low_size = info.image_size // 2
    advice = {"other": "pass --iterations-low 0"}
    if args.iterations_low:
        with refuse_misfits(f"--teacher {args.teacher} at {low_size} pixels", advice):
            check_network(teacher, info, device, low_size)
    layers = [m for m in teacher.modules() if isinstance(m, _BatchNorm)]
    if args.second_class and info.num_classes == 1:
        fail(f"--second-class {args.second_class}: the network has one class; pass 0")
    if not any(layer.running_mean is not None for layer in layers):
        problem = "no BatchNorm with running moments, which are matched"
        fail(f"--teacher {args.teacher}: {problem}; take another")
    return teacher, info


def find_given_images(args, info):
    """The image files of --images, checked."""
    if not args.images:
        return []
    if Path(args.images).resolve() == Path(args.out).resolve():
        problem = "this is --out, whose images a new run deletes"
        fail(f"--images {args.images}: {problem}; pass another --out")
    return check_image_files(args.images, info)


def count_batches(args, world):
    """How many batches a run makes, as many for each process."""
    n_batches = math.ceil(max(args.num_images, 1) / args.batch_size)
    if args.student:
        if args.num_images == 0:
            n_batches = args.initial_batches
            if args.images:
                n_batches = 0
        n_batches += args.epochs * args.batches_per_epoch
    return world * math.ceil(n_batches / world)


def main(args):
    if args.smoke:
        args = shrink(args)
    device = choose_device(args.device)
    seed_everything(args.seed)
    rank, world = join_processes(device)
    if args.student and world > 1:
        way_out = "make images with torchrun first, then pass their folder as --images"
        fail(f"--student: one process trains it; {way_out}")

    # The networks, and the real images that measure (never train) the student.
    teacher, info = load_checked_teacher(args, device)
    domain = info.dataset if args.dataset in ("auto", "none") else args.dataset
    likely = VERIFIERS.get(domain, "none")
    verifier, verifier_info = load_verifier(args.verifier, likely, info, args, device)
    student = test = None
    if args.student:
        student, student_info = load_student(args.student, info, device)
        dataset, test = load_real_images(info, args, device)
    given = find_given_images(args, info)
    labels = choose_labels(choose_classes(info, args), count_batches(args, world), args)

    # The folder, then the images, or the student with its images.
    clears = ("images-[0-9]*.npz",) if rank == 0 else ()
    run = RunFolder(args, device, clears=clears, rank=rank)
    if world > 1:
        dist.barrier()  # the first process has cleared the folder
    if rank == 0:
        dtype = str(choose_dtype(device, args)).removeprefix("torch.")
        print(f"{info.name}: {labels.numel()} images, setting {args.setting}, {device}, {dtype}")
    n_batches = len(labels)
    n_steps = n_batches // world * count_steps(args)
    if student is not None:
        n_steps += args.epochs * args.steps_per_epoch
    with fail_in_one_line(f"--teacher {args.teacher}", "take another network"):
        watched = watch_batchnorms(teacher, sample_example(info, device), args, device)
    if watched.reason and rank == 0:
        print(f"teacher: {watched.reason}")
    hidden = None  # tqdm hides the bar where there is no terminal
    if rank > 0:
        hidden = True
    bar = tqdm(total=n_steps, disable=hidden, mininterval=0.5)
    synthesis = Synthesis(watched, info, labels, run, bar, world)
    if student is not None:
        advice = list_remedies("--student-batch", device)
        with fail_in_one_line("the student's training failed", advice):
            accuracies = train_student(student, teacher, synthesis, given, test)
    else:
        keep_finished_rows(run, epoch=0)
        for number in range(rank, n_batches, world):
            synthesis.make_batch(number)
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return

    # What came of it.
    result = dict(teacher_accuracy=info.accuracy, student_accuracy=None, ranks=world)
    if test is not None:
        result["teacher_accuracy"] = evaluate(teacher, *test, info)
        result["student_accuracy"] = accuracies[-1]
        with run.write_file("curve.png") as file:
            draw_curves({student_info.name: [accuracies]}, file)
        print(f"teacher {result['teacher_accuracy']:.2f} %, student {accuracies[-1]:.2f} %")
    if student is not None:
        method = "deepinversion" if args.competition == "none" else "adaptive deepinversion"
        accuracy = result["student_accuracy"]
        student_info = replace(student_info, dataset=dataset, accuracy=accuracy)
        run.save_student(student, student_info, method)
        result |= dict(student=student_info.name, dataset=dataset)
    paths = list_image_files(args.out) or given
    result |= report_agreement("teacher", teacher, info, paths)
    result |= report_agreement("verifier", verifier, verifier_info, paths)
    result |= report_images(run, paths, teacher, info)
    run.finish(result)


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
