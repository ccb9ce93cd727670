"""DeepInversion: class-conditional images from a trained network alone.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz, "Dreaming to Distill: Data-free Knowledge Transfer via
DeepInversion", CVPR 2020, arXiv:1912.08795. A batch of noise images is optimised until a frozen teacher assigns the
wanted classes and the moments of every BatchNorm input equal the running moments that the teacher stored in training.

    loss = CE(f(x'), y) + alpha_bn * R_bn(x') + alpha_tv_l2 * TV2(x') + alpha_tv_l1 * TV1(x') + alpha_l2 * R_l2(x')

where x' is what the teacher sees of x in this step: pooled in a low-resolution stage, rolled by a random offset,
mirrored at random; one draw for the whole batch (released code).

Where we differ from the paper or its released code:
- the teacher is frozen (no weight gradients); each BatchNorm, the addition and ReLU after it and the moments of its
  input are one op, all layers' distances another, jitter, flip and image priors a third (`kernels/`; --no-fused-bn,
  --no-fused-distance, --no-fused-view, --no-fused turn them off); on a GPU the whole step is one CUDA graph
  (--no-graph), and the learning rates and random views of a stage are drawn before it begins;
- a batch depends on the seed and its number alone, on no batch before it (but with --ema);
- R_l2 is the mean over images of the image's norm for every data set (released CIFAR code: one norm of the batch);
- each stage hands on, and the run keeps, the *last* images. The released code keeps those of the lowest loss and never
  resets that minimum between stages: with two stages it returns the blurred low-resolution images, and the loss that
  it compares belongs to another random view, before the step. With the cosine the last images are settled;
- settings `cifar10` and `cifar10-long` are ours; classes that do not all fit a batch are drawn, not a fixed list;
- low-resolution stages pool the full image (as released); the paper up-samples a small one.
Measured: on `cifar10`, 100 images a seed, 3 seeds, a verifier of another architecture agrees on 99.7 ± 0.6 % (1 CPU
thread beside other work, 250 s, torch 2.13, commit 364118c; `cifar10-long` 98.3 ± 1.5 %): results/inversion-*.json.
Run `python deepinversion.py [--teacher resnet50]`. It writes into --out: samples.png, images-00000.npz … of a batch
each (`images` uint8 (N, H, W, C), `labels` int64 (N,)), result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics:
`loss/total`; its unweighted terms `loss/ce` `loss/bn` `loss/tv_l2` `loss/tv_l1` `loss/l2`; `eval/teacher` percent of
views on target. `torchrun --nproc-per-node N deepinversion.py …` shares the batches out over N processes.
"""

import copy
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from kernels import (
    Captured,
    bn_moments,
    bn_moments_ref,
    fuse_batchnorm,
    hook_batchnorm,
    jittered_view,
    jittered_view_ref,
    moment_distance,
    moment_distance_ref,
)
from kernels.contract import (
    check_options,
    fail,
    load_network,
    one_line,
    restore_optimizer,
    seed_everything,
    shipped,
    try_out,
)
from kernels.distributed import join, joint_moments, least_of_all, leave, wait_for_all
from kernels.figures import draw_classes, save_png
from kernels.folder import RunFolder
from kernels.moment_distance import moment_kl
from kernels.quality import agreement, diversity


@dataclass
class Args:
    # Run settings.
    teacher: str = "cifar10-resnet20"
    """Shipped name (teachers/index.json), resnet18/34/50/101/152 (ImageNet), a teacher.pt, or file.py:factory."""
    weights: str = ""
    """State dict to load instead of the named one; needed for file.py:factory."""
    num_classes: int = 0
    """Classes of a foreign teacher; 0: as the named teacher has."""
    image_size: int = 0
    """Height = width of a foreign teacher's images in pixels; 0: as the named teacher has."""
    mean: tuple[float, ...] = ()
    """Per-channel mean the teacher's inputs were normalised with; empty: as the named teacher has."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation, likewise."""
    verifier: str = "auto"
    """Network that judges the images, never optimised against: as --teacher (a factory with weights); auto | none."""
    dataset: str = "auto"
    """Family of the images, which chooses --setting and --verifier: cifar10 | mnist | digits | imagenet | auto."""
    data_dir: str = "data"
    """Where ImageNet weights are looked for and downloaded to."""
    out: str = "runs/deepinversion/default"
    """Output folder."""
    seed: int = 0
    """Seeds python, numpy and torch."""
    device: str = "auto"
    """auto | cpu | cuda."""
    resume: bool = False
    """Continue from checkpoint.pt of the output folder; on a CPU (same machine, threads, versions) bit-exactly."""
    smoke: bool = False
    """A run of seconds: 6 steps on 20 images."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs the plain references, whatever the next three say."""
    fused_bn: bool = True
    """BatchNorm, addition, ReLU and moments as one op; off: hooks that read each input once more."""
    fused_distance: bool = True
    """The moment loss of all layers as one op; off: layer by layer."""
    fused_view: bool = True
    """Jitter, flip, total variation and l2 as one op; off: one after another."""
    graph: bool = True
    """On a GPU: the whole step as one CUDA graph."""
    bf16: bool = True
    """bfloat16 activations on a GPU (moments and images stay fp32)."""
    image_folder: bool = False
    """Also write PNGs into images/CLASS/ of the output folder, as torchvision's ImageFolder reads them."""
    sync_moments: bool = False
    """Under torchrun: moments over the images of all processes, which then work on one joint batch."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl; the host waits for the device then, and at checkpoints, only."""

    # Method. None: as --setting has it.
    setting: str = "auto"
    """A row of SETTINGS: cifar10 | cifar10-long | cifar10-released | mnist | digits | imagenet-0 | -1 | -2."""
    num_images: int = 0
    """Images to make, in whole batches (under torchrun as many for each process); 0: one batch."""
    classes: tuple[int, ...] = ()
    """Wanted classes, repeated in turn; empty: all of them."""
    batch_size: int | None = None
    """Images optimised together; part of the method, for the moments are those of the batch."""
    iterations: int | None = None
    """Steps per batch, shared out over the setting's stages."""
    lr: float | None = None
    """Adam's peak learning rate, in normalised units."""
    alpha_bn: float | None = None
    """Weight of the moment loss (released flag: r_feature)."""
    first_bn: float | None = None
    """Extra factor on the first BatchNorm (released code: 10 on ImageNet; absent from the paper)."""
    alpha_tv_l2: float | None = None
    """Weight of the l2 total variation (released flag: tv_l2)."""
    alpha_tv_l1: float | None = None
    """Weight of the l1 total variation (released flag: tv_l1)."""
    alpha_l2: float | None = None
    """Weight of the images' mean l2 norm (released flag: l2)."""
    moments: str | None = None
    """Distance of moments: l2 (paper) | symmetric-kl of the channels' Gaussians (ours, after ABD's one-sided one)."""
    ema: float | None = None
    """Share of this process's earlier batches in the moments, for small batches (Fast-Datafree: 0.9)."""
    priors_per_image: bool | None = None
    """Divide the l2 total variation, which grows so, by sqrt(batch size): its weight then fits any batch."""
    jitter: int | None = None
    """Largest roll in pixels at full resolution (released flag: jitter)."""
    flip: bool | None = None
    """Mirror the batch with probability 1/2."""
    clip: bool | None = None
    """Clip to the range of real pixels after each step, [-m/s, (1 - m)/s] per channel."""


# stages: (steps, pooling factor, jitter in pixels the teacher sees); warmup None: constant learning rate.
# fmt: off
BASE = dict(lr=0.3, betas=(0.5, 0.9), warmup=10, first_bn=1.0, alpha_tv_l1=0.0, alpha_l2=0.0, flip=True, clip=True,
            moments="l2", ema=0.0, priors_per_image=False)
CIFAR = dict(BASE, batch_size=100, alpha_bn=1.0, first_bn=10.0, alpha_tv_l2=1.5e-2)
GREY = dict(BASE, batch_size=100, alpha_bn=3.0, alpha_tv_l2=2e-3, flip=False)
IMAGENET = dict(BASE, lr=0.2, warmup=100, batch_size=64, alpha_bn=0.05, first_bn=10.0, alpha_tv_l2=1e-4, alpha_l2=1e-5)
SETTINGS = {
    "cifar10": dict(CIFAR, stages=[(400, 1, 2)]),  # ours
    "cifar10-long": dict(CIFAR, stages=[(1200, 1, 2)], alpha_bn=3.0),  # ours
    "cifar10-released": dict(CIFAR, stages=[(2000, 1, 2)], batch_size=256, alpha_bn=10.0, first_bn=1.0, lr=0.05,
                             alpha_tv_l2=2.5e-5, betas=(0.9, 0.999), warmup=None, flip=False, clip=False),
    "mnist": dict(GREY, stages=[(300, 1, 2)]),  # ours
    "digits": dict(GREY, stages=[(300, 1, 2)]),  # ours
    "imagenet-0": dict(IMAGENET, stages=[(2000, 2, 15), (1000, 1, 30)]),  # released default
    "imagenet-1": dict(IMAGENET, stages=[(2000, 1, 30)]),
    "imagenet-2": dict(IMAGENET, stages=[(20000, 1, 30)], betas=(0.9, 0.999), clip=False),  # nearest the paper's 4.2
}
FAMILIES = {"cifar10": ("cifar10", "cifar10-wrn-16-1"), "mnist": ("mnist", "mnist-lenet5"),  # setting, verifier
            "digits": ("digits", "digits-lenet5"), "imagenet": ("imagenet-0", "none")}
# fmt: on
CLASS_NAMES = {"cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}


# Networks: the paper's ResNets, CIFAR and ImageNet layouts. Everything else comes through file.py:factory.
class ResBlock(nn.Module):
    """Residual block (He et al. 2015): two 3x3 convolutions, or as a bottleneck 1x1, 3x3, 1x1 to 4x channels.

    Shortcut `option` A: strided subsampling and zero channels, no parameters; B: 1x1 convolution with BatchNorm.
    """

    def __init__(self, in_channels, channels, stride, option, bottleneck):
        super().__init__()
        wide = 4 * channels if bottleneck else channels
        basic_convs = [(channels, 3, stride), (wide, 3, 1)]  # width, kernel, stride
        convs = [(channels, 1, 1), (channels, 3, stride), (wide, 1, 1)] if bottleneck else basic_convs
        c = in_channels
        for i, (width, kernel, step) in enumerate(convs, 1):
            setattr(self, f"conv{i}", nn.Conv2d(c, width, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            c = width
        self.bottleneck, self.stride, self.new_channels = bottleneck, stride, wide - in_channels
        self.downsample = None
        if option == "B" and (stride != 1 or self.new_channels):
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet with torchvision's parameter names, stride in the 3x3 convolution ("v1.5").

    `imagenet`: 7x7 stem of stride 2 and max-pool; otherwise the 3x3 stem of CIFAR. Groups are the stages' outputs.
    """

    def __init__(self, blocks, widths, option, bottleneck=False, imagenet=False, num_classes=10, in_channels=3):
        super().__init__()
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.imagenet, self.n_stages = imagenet, len(widths)
        c = widths[0]
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for j in range(n):
                stage.append(ResBlock(c, width, 2 if i > 1 and j == 0 else 1, option, bottleneck))
                c = 4 * width if bottleneck else width
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.fc = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward_groups(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        groups = []
        for i in range(1, self.n_stages + 1):
            x = getattr(self, f"layer{i}")(x)
            groups.append(x)
        return self.fc(x.mean((2, 3))), tuple(groups)

    def forward(self, x):
        return self.forward_groups(x)[0]


NARROW, WIDE = (16, 32, 64), (64, 128, 256, 512)  # widths of the three- and the four-stage layout
NETWORKS = {f"resnet{6 * n + 2}": partial(ResNet, (n, n, n), NARROW, "A") for n in (1, 3, 5, 7, 9)}
NETWORKS["resnet18_cifar"] = partial(ResNet, (2, 2, 2, 2), WIDE, "B")
NETWORKS["resnet34_cifar"] = partial(ResNet, (3, 4, 6, 3), WIDE, "B")
PUBLIC = {}  # teachers to be downloaded, as teachers/index.json describes the shipped ones
for _name, _blocks, _file, _accuracy in (  # the official file's suffix: first 8 digits of its SHA-256; top-1 in %
    ("resnet18", (2, 2, 2, 2), "resnet18-f37072fd.pth", 69.758),
    ("resnet34", (3, 4, 6, 3), "resnet34-b627a593.pth", 73.314),
    ("resnet50", (3, 4, 6, 3), "resnet50-0676ba61.pth", 76.130),
    ("resnet101", (3, 4, 23, 3), "resnet101-63fe2227.pth", 77.374),
    ("resnet152", (3, 8, 36, 3), "resnet152-394f9c45.pth", 78.312),
):
    NETWORKS[_name] = partial(ResNet, _blocks, WIDE, "B", bottleneck=int(_name[6:]) >= 50, imagenet=True)
    PUBLIC[_name] = dict(arch=_name, dataset="imagenet", num_classes=1000, image_size=224, accuracy=_accuracy)
    PUBLIC[_name] |= dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    PUBLIC[_name] |= dict(file=_file, sha256=_file[-12:-4], url=f"https://download.pytorch.org/models/{_file}")


load = partial(load_network, networks=NETWORKS, public=PUBLIC)


# Losses
def measured(model, setting, device):
    """`model` as the steps call it: view (N, C, H, W) -> logits (N, K), [(moments (2, C), running_var (C,)), …].

    Moments are those of its BatchNorm2d inputs, mean less running mean and biased variance, in the order of the
    layers' running. A copy: the model itself keeps fp32 weights, without hooks.
    """
    network = copy.deepcopy(model)
    for m in network.modules():
        if setting["bf16"] and device == "cuda" and isinstance(m, (nn.Conv2d, nn.Linear)):
            m.to(torch.bfloat16)  # once; autocast, which caches only what needs gradients, would do so in every step
    if setting["fused_bn"]:
        return fuse_batchnorm(network, nn.BatchNorm2d)
    return hook_batchnorm(network, nn.BatchNorm2d, bn_moments if setting["fused"] else bn_moments_ref)


def blended(moments, past, share):
    """(2, C): moments with this share of past ones (2, C), where there are any."""
    return torch.where(past.isnan(), moments, torch.lerp(moments, past, share))


def moment_loss(found, setting, past=None):
    """R_bn, eq. 4-6: sum over BatchNorm2d inputs of ||mean - running_mean|| + ||var - running_var||, () fp32.

    Norms are not squared, variances are biased. The first layer that runs counts first_bn times. `past` (2, C of all
    layers): the running average of earlier batches' moments, NaN before the first; a constant within a batch.
    """
    moments = torch.cat([moments for moments, _ in found], 1)  # (2, C of all layers)
    running_var = torch.cat([running_var.float() for _, running_var in found])
    if setting["sync_moments"]:
        moments = joint_moments(moments)
    if setting["ema"]:
        moments = blended(moments, past, setting["ema"])
    sizes, weights = tuple(len(v) for _, v in found), (setting["first_bn"], *[1.0] * (len(found) - 1))
    if setting["moments"] == "symmetric-kl":
        return moment_kl(moments, running_var, sizes, weights)
    return (moment_distance if setting["fused_distance"] else moment_distance_ref)(
        moments, running_var, sizes, weights
    )


def asked(teacher, view, setting):
    """Logits (N, K) and moments of a view, in bf16 where the setting and the device have it."""
    with torch.autocast(view.device.type, torch.bfloat16, enabled=setting["bf16"] and view.is_cuda):
        return teacher.measured(view)


TERMS = "total", "ce", "bn", "tv_l1", "tv_l2", "l2", "teacher"


def synthesis_loss(x, draw, labels, teacher, setting, past=None):
    """Total loss (scalar) and (7,) of TERMS, unweighted, for images x (N, C, H, W) seen as `draw` (3,) says.

    R_l2 is the mean of the images' un-squared norms; `teacher`: percent of the views that it assigns to their labels.
    """
    see = jittered_view if setting["fused_view"] else jittered_view_ref
    view, tv_l1, tv_l2, l2 = see(x, draw, torch.bfloat16 if setting["bf16"] and x.is_cuda else None)
    logits, found = asked(teacher, view, setting)
    ce = F.cross_entropy(logits.float(), labels)
    tv_l2 = tv_l2 / math.sqrt(len(x)) if setting["priors_per_image"] else tv_l2
    terms = dict(ce=ce, bn=moment_loss(found, setting, past), tv_l1=tv_l1, tv_l2=tv_l2, l2=l2)
    weights = {k: 1.0 if k == "ce" else setting[f"alpha_{k}"] for k in terms}
    if setting["sync_moments"]:  # the others are means over this process's share of the joint batch: total is a share
        n = setting["world"]  # norms add as squares
        shares = dict(bn=1.0, tv_l2=1 / n if setting["priors_per_image"] else 1 / math.sqrt(n))
        weights = {k: w * shares.get(k, 1 / n) for k, w in weights.items()}
    total = sum(w * terms[k] for k, w in weights.items() if w)  # a term of weight 0 is only reported
    hits = (logits.argmax(1) == labels).float().mean() * 100
    return total, torch.stack([total, *terms.values(), hits]).detach()


# One step
def learning_rate(step, n_steps, setting):
    """Linear warm-up (at most a quarter: ours), then a cosine to zero; restarted in every stage (released code)."""
    if setting["warmup"] is None:
        return setting["lr"]
    warmup = min(setting["warmup"], n_steps // 4)
    if step < warmup:
        return setting["lr"] * (step + 1) / warmup
    return setting["lr"] / 2 * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup)))


def drawn(number, shape, setting, seed):
    """All that is random in a batch: noise (N, C, H, W), and for each stage the draws (n_steps, 3) of its views.

    One draw a step for the whole batch, as in the released code: pixels down, pixels right, mirrored or not.
    """
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    noise, draws = torch.randn(shape, generator=generator), []
    for n_steps, _, jitter in setting["stages"]:
        rolls = torch.randint(-jitter, jitter + 1, (n_steps, 2), generator=generator)
        mirrored = torch.randint(2, (n_steps, 1), generator=generator) * setting["flip"]
        draws.append(torch.cat((rolls, mirrored), 1))
    return noise, draws


def begin(x, labels, draws, stage, teacher, setting, past=None):
    """One stage of a batch: all that its steps read and change, on the device and in place, as a CUDA graph needs it.

    x: (N, C, H, W) fp32, channels_last, changed in place; labels: (N,); draws: (n_steps, 3); past: as of moment_loss.
    """
    n_steps, pool, _ = stage
    rates = torch.tensor([learning_rate(i, n_steps, setting) for i in range(n_steps)], device=x.device)
    # A fresh Adam in each stage, as released; its learning rate is a tensor that every step sets.
    options = dict(betas=setting["betas"], fused=True, capturable=x.is_cuda)
    optimizer = torch.optim.Adam([x.requires_grad_()], torch.zeros((), device=x.device), **options)
    step, terms = torch.zeros(1, dtype=torch.long, device=x.device), torch.zeros(len(TERMS), device=x.device)
    work = SimpleNamespace(x=x, labels=labels, draws=draws.to(x.device), rates=rates, pool=pool, step=step)
    work.teacher, work.setting, work.optimizer, work.terms, work.past = teacher, setting, optimizer, terms, past
    return work


def synthesis_step(work):
    """One update of the images work.x, without the host waiting; work.terms receives TERMS of the images before it."""
    x, draw = work.x, work.draws.index_select(0, work.step)[0]  # (3,)
    work.optimizer.param_groups[0]["lr"].copy_(work.rates.index_select(0, work.step)[0])
    seen = F.avg_pool2d(x, work.pool) if work.pool > 1 else x
    total, terms = synthesis_loss(seen, draw, work.labels, work.teacher, work.setting, work.past)
    gradient = torch.autograd.grad(total, x)[0]
    x.grad = gradient.contiguous(memory_format=torch.channels_last)  # fused Adam pairs by memory order, not by stride
    work.optimizer.step()
    if work.setting["clip"]:
        with torch.no_grad():
            torch.clamp(x, work.teacher.low, work.teacher.high, out=x)
    work.terms.copy_(terms)
    work.step += 1


@torch.no_grad()
def remembered(x, teacher, setting, past):
    """The running average of moments (2, C) after a batch whose images are x; past None: none before it."""
    moments = torch.cat([moments for moments, _ in asked(teacher, x, setting)[1]], 1)
    moments = joint_moments(moments) if setting["sync_moments"] else moments
    return moments if past is None else blended(moments, past, setting["ema"])


def synthesise(run, labels, teacher, setting):
    """All stages of one batch, on from where `run` stands; returns its images (N, C, H, W)."""
    shape = len(labels), teacher.shape[0], teacher.image_size, teacher.image_size
    noise, draws = drawn(run.batch, shape, setting, run.args.seed)
    x = (noise if run.x is None else run.x).to(run.args.device, memory_format=torch.channels_last)
    past = None
    if setting["ema"]:
        past = (
            torch.full_like(remembered(x, teacher, setting, None), torch.nan)
            if run.past is None
            else run.past.to(x.device)
        )
    for i, stage in list(enumerate(setting["stages"]))[run.stage :]:
        work = begin(x, labels, draws[i], stage, teacher, setting, past)
        work.step.fill_(run.step)
        if run.optimizer is not None:
            restore_optimizer(work.optimizer, run.optimizer)
        step = Captured(partial(synthesis_step, work), enabled=setting["graph"])
        for n in range(run.step, stage[0]):
            with one_line(f"step {n + 1} failed", "try --no-graph, --no-bf16, --no-fused or a smaller --batch-size"):
                step()
            run.after_step(i, n + 1, work)
        run.stage, run.step, run.optimizer = i + 1, 0, None
    if setting["ema"]:
        run.past = remembered(x, teacher, setting, run.past)
    return x.detach()


# Evaluation and files
def pixel_range(info, device):
    """Real pixels, 0 to 1, in normalised units: (low, high), (1, C, 1, 1) each; asymmetric about 0."""
    bounds = [[(pixel - m) / s for m, s in zip(info.mean, info.std, strict=True)] for pixel in (0.0, 1.0)]
    return torch.tensor(bounds, device=device).view(2, 1, -1, 1, 1)


def to_uint8(x, info):
    """Normalised (N, C, H, W) float -> (N, C, H, W) uint8 pixels."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (info.mean, info.std))
    return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


class Run(RunFolder):
    """One run's folder, and where in the run we stand: batch, stage, step, its images and optimiser.

    Under torchrun each process but the first has its checkpoint and metrics in a folder of its own, rankN.
    """

    def __init__(self, args, setting, n_batches, place):
        self.batch, self.stage, self.step, self.x, self.optimizer, self.past = place.rank, 0, 0, None, None, None
        self.place, self.shards, self.steps_of = place, Path(args.out), [n for n, _, _ in setting["stages"]]
        args = replace(args, out=str(self.shards / f"rank{place.rank}")) if place.rank else args
        if not args.resume and not place.rank:
            self.make_room()
        wait_for_all(place)
        super().__init__(args, setting, free=("device",), clears=("samples.png",))
        if setting["sync_moments"]:  # processes that step together were perhaps not stopped together
            if self.n_done() > least_of_all(self.n_done(), args.device):
                self.step_back()
            if least_of_all(-self.n_done(), args.device) != -self.n_done():
                fail("--resume: the processes' checkpoints are of different steps; run without --resume")
        total, hidden = n_batches // place.world * sum(self.steps_of), True if place.rank else None
        self.bar = tqdm(total=total, initial=self.n_done(), disable=hidden, mininterval=0.5)

    def make_room(self):
        """Delete what an earlier run made here; refuse where it was not finished: it may have taken days."""
        old = sorted(self.shards.glob("images-*.npz"))
        if len(old) > 1 and not (self.shards / "result.json").exists():
            fail(f"--out {self.shards} holds {len(old)} batches of an unfinished run; pass --resume or another --out")
        with one_line(f"--out {self.shards} cannot be used", "pass another folder"):
            for path in (*old, *self.shards.glob("images/*/[0-9]*-[0-9]*.png")):
                path.unlink()

    def n_done(self):
        return self.batch // self.place.world * sum(self.steps_of) + sum(self.steps_of[: self.stage]) + self.step

    def state(self):
        return {k: getattr(self, k) for k in ("batch", "stage", "step", "x", "optimizer", "past")}

    def restore(self, saved):
        self.batch, self.stage, self.step = int(saved["batch"]), int(saved["stage"]), int(saved["step"])
        self.x, self.optimizer, self.past = saved["x"], saved["optimizer"], saved["past"]

    def after_step(self, stage, step, work):
        """Log every log_every steps, where the host waits for the device and sees a NaN; checkpoint."""
        self.bar.update()
        self.stage, self.step = stage, step
        n = self.n_done()
        at_checkpoint = n % self.args.checkpoint_every == 0 and n % sum(self.steps_of)  # `keep` saves after a batch
        if n % self.args.log_every == 0 or at_checkpoint or n == self.bar.total:
            values = dict(zip(TERMS, work.terms.tolist(), strict=True))
            if not math.isfinite(values["total"]):
                fail(f"the loss is {values['total']} at step {n}; lower --lr or the weights of the terms")
            row = {("eval/" if k == "teacher" else "loss/") + k: v for k, v in values.items()}
            self.write({"step": n, "batch": self.batch, "stage": stage} | row)
            self.bar.set_postfix({k: f"{values[k]:.3g}" for k in ("total", "ce", "bn", "tv_l2", "teacher")})
            alone = self.bar.disable and not self.place.rank  # no terminal: rows instead of a bar
            if alone and n % (10 * self.args.log_every) == 0:
                print(f"step {n:6d}  " + "  ".join(f"{k} {v:9.4g}" for k, v in values.items()), flush=True)
        if at_checkpoint:
            self.x, self.optimizer = work.x.detach(), work.optimizer.state_dict()
            if not self.x.isfinite().all():  # the loss above belongs to the images before this step
                fail(f"the images are not finite after step {n}; lower --lr or the weights of the terms")
            self.save()

    def keep(self, images, labels, digits):
        """Write a finished batch, uint8 (N, C, H, W), and go to this process's next one; digits: of a class's folder.

        ImageFolder sorts folders as strings: without leading zeros 10 would come before 2.
        """
        name, pixels = f"images-{self.batch:05d}.npz", images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        with self.written(name):
            with open(self.shards / f"{name}.part", "wb") as file:
                np.savez(file, images=pixels, labels=labels.numpy())
                file.flush()
                os.fsync(file.fileno())  # the checkpoint that counts it is on the disk, too
            os.replace(self.shards / f"{name}.part", self.shards / name)
            for i, k in enumerate(labels.tolist() if self.args.image_folder else []):
                save_png(images[i], self.shards / "images" / f"{k:0{digits}d}" / f"{self.batch:05d}-{i:03d}.png")
        self.batch, self.stage, self.x, self.optimizer = self.batch + self.place.world, 0, None, None
        self.save()

    def made(self):
        """All finished batches in their order: images uint8 (N, C, H, W), labels (N,)."""
        for path in sorted(self.shards.glob("images-*.npz")):
            with np.load(path) as saved:
                yield torch.from_numpy(saved["images"]).permute(0, 3, 1, 2), torch.from_numpy(saved["labels"])

    def report(self, teacher, verifier, names, n_batches):
        """Write samples.png and result.json: what teacher and verifier say of all images; print their agreements."""
        if (n := len(list(self.shards.glob("images-*.npz")))) != n_batches:
            fail(f"--out {self.shards}: {n} of {n_batches} files images-*.npz are there; run without --resume")
        first = list(islice(self.made(), max(1, 1000 // self.setting["batch_size"])))
        images, labels = (torch.cat(parts) for parts in zip(*first, strict=True))
        with self.written("samples.png"):
            draw_classes(images, labels, names, self.out / "samples.png")
        result = dict(teacher=teacher.name, teacher_accuracy=teacher.accuracy, student_accuracy=None)
        result |= dict(verifier=verifier.name if verifier else None, ranks=self.place.world)
        result |= dict(n_images=n * self.setting["batch_size"], diversity=diversity(teacher, images, labels))
        for role, info in (("teacher", teacher), ("verifier", verifier)):
            total, by_class = agreement(info, self.made()) if info else (None, None)
            result |= {f"{role}_agreement": total, f"{role}_agreement_by_class": by_class}
            if info:
                print(f"{role} {info.name} assigns {total:.1f} % of the images to the wanted class")
        self.finish(result)


# Main
def choose_setting(args, dataset, world=1):
    """The row of SETTINGS with the command line's values over it, its stages rescaled to --iterations."""
    name = FAMILIES[dataset][0] if args.setting == "auto" else args.setting
    setting = SETTINGS[name] | {k: v for k in SETTINGS[name] if (v := getattr(args, k, None)) is not None}
    setting.update({k: args.fused and getattr(args, k) for k in ("fused", "fused_bn", "fused_distance", "fused_view")})
    setting.update(name=name, graph=args.graph, bf16=args.bf16, sync_moments=args.sync_moments, world=world)
    if args.smoke:
        setting.update(batch_size=min(setting["batch_size"], 20))
    planned = sum(n for n, _, _ in setting["stages"])
    scale = (6 if args.smoke else args.iterations or planned) / planned
    stages = [(max(1, round(n * scale)), pool, jitter) for n, pool, jitter in setting["stages"]]
    if args.jitter is not None:  # given at full resolution
        stages = [(n, pool, args.jitter // pool) for n, pool, _ in stages]
    return setting | {"stages": stages}


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    least = dict(batch_size=2, checkpoint_every=1, log_every=1, iterations=1, lr=1e-12)  # one image has no moments
    names = "seed image_size num_classes num_images alpha_bn alpha_tv_l2 alpha_tv_l1 alpha_l2 first_bn jitter"
    choices = dict(dataset=("auto", *FAMILIES), setting=("auto", *SETTINGS), moments=(None, "l2", "symmetric-kl"))
    check_options(args, least | dict.fromkeys(names.split(), 0), choices)
    if args.ema is not None and not 0 <= args.ema < 1:
        fail(f"--ema: expected at least 0 and below 1, got {args.ema}")


def main(args):
    check_args(args)
    seed_everything(args.seed)
    place = join(args.device)
    if args.sync_moments and place.world == 1:
        fail("--sync-moments: a single process has all images already; start several with torchrun, or leave it out")

    with one_line(f"--teacher {args.teacher}", "check --weights, --num-classes, --image-size, --mean and --std"):
        teacher, verifier = load(args.teacher, args), None
        teacher.low, teacher.high = pixel_range(teacher, args.device)
        n_classes, n_channels, size = teacher.num_classes, len(teacher.mean), teacher.image_size
        if size % 2 or size < 8:
            fail(f"--image-size: expected an even number of at least 8 pixels, got {size}")
        dataset = teacher.dataset if args.dataset == "auto" else args.dataset
        setting = choose_setting(args, dataset if dataset in FAMILIES else "cifar10", place.world)
        for _, pool, _ in setting["stages"]:
            try_out(teacher, n_channels, size // pool, n_classes)
        layers = [m for m in teacher.model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        if layers:
            teacher.measured = measured(teacher.model, setting, args.device)
            with torch.no_grad():  # as the steps will, in bf16 on a GPU
                asked(teacher, torch.zeros(2, n_channels, size, size, device=args.device), setting)
    if not layers:
        fail(f"--teacher {args.teacher}: no BatchNorm2d with running moments, which the method matches; take another")
    likely = FAMILIES.get(dataset, ("", "none"))[1]  # taken where it is shipped and fits this teacher's images
    takes = [shipped().get(likely, {}).get(k) for k in ("num_classes", "channels", "image_size")]
    likely = likely if takes == [n_classes, n_channels, size] else "none"
    judge = likely if args.verifier == "auto" else args.verifier
    if judge != "none":
        with one_line(f"--verifier {judge}", "choose another, or --verifier none"):
            verifier = load(judge, args, teacher=teacher)
            try_out(verifier, n_channels, size, n_classes)

    batch_size = setting["batch_size"]
    if not all(0 <= k < n_classes for k in args.classes):
        fail(f"--classes: expected numbers from 0 to {n_classes - 1}, got {args.classes}")
    classes = torch.tensor(args.classes or range(n_classes))
    n_batches = place.world * -(-(args.num_images or batch_size) // (batch_size * place.world))  # as many for each
    if len(classes) > batch_size:  # a batch cannot hold them all: mix them
        classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(args.seed))]
    n_images = n_batches * batch_size  # whole batches: their size is part of the method
    labels = classes.repeat(-(-n_images // len(classes)))[:n_images]

    run = Run(args, setting, n_batches, place)
    if not place.rank:
        print(f"{teacher.name}: {n_images} images, setting {setting['name']}, {args.device}, fused={args.fused}")
    while run.batch < n_batches:
        wanted = labels[run.batch * batch_size :][:batch_size]
        images = to_uint8(synthesise(run, wanted.to(args.device), teacher, setting), teacher).cpu()
        run.keep(images, wanted, len(str(n_classes - 1)))
    run.bar.close()
    wait_for_all(place)
    if not place.rank:
        run.report(teacher, verifier, dict(enumerate(CLASS_NAMES.get(dataset, []))), n_batches)
    leave(place)


if __name__ == "__main__":
    main(tyro.cli(Args))
