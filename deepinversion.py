"""DeepInversion and Adaptive DeepInversion: class-conditional images from a network alone, and students of them.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz, "Dreaming to Distill: Data-free Knowledge Transfer via
DeepInversion", CVPR 2020, arXiv:1912.08795. A batch of noise images is optimised until a frozen teacher assigns the
wanted classes and the moments of every BatchNorm input equal the running moments that the teacher stored in training.

    loss = CE(f(x'), y) + alpha_bn * R_bn(x') + alpha_tv_l2 * TV2(x') + alpha_tv_l1 * TV1(x') + alpha_l2 * R_l2(x')
           [ + alpha_competition * (1 - JS(f(x'), g(x'))), adaptive: g is the student as it stands ]

where x' is what the teacher sees of x in this step: pooled in a low-resolution stage, rolled by a random offset,
mirrored at random; one draw for the whole batch (released code). With --student, g learns T² KL(f || g) at temperature
T on a growing pool of them, augmented anew in each step; a new batch is drawn from at once, then joins the pool.

Where we differ from the paper or its released code:
- the teacher is frozen (no weight gradients); each BatchNorm, the addition and ReLU after it and the moments of its
  input are one op, all layers' distances another, jitter, flip and image priors a third (`kernels/`; --no-fused-bn,
  --no-fused-distance, --no-fused-view, --no-fused turn them off); on a GPU a step is one CUDA graph (--no-graph);
- a batch depends on the seed and its number alone, on none before it (but with --ema, or where it competes);
- R_l2 is the mean over images of the image's norm for every data set (released CIFAR code: one norm of the batch);
- each stage hands on, and the run keeps, the *last* images; the released code those of the lowest loss, a minimum that
  it never resets between stages: with two it returns the blurred low-resolution images;
- the paper's competition term is textbook JS, the released one is not (`competition_loss` says more), both at the
  temperature of the student's loss (paper: 1); the student competes as it stands, from its first step on, in eval
  mode, its weights frozen (released: a fixed network, gradients left on);
- `cifar10`, `-long`, `mnist` and `digits` are ours; those of grey images start from blurred noise in the middle of a
  dark image, a prior that no teacher gives; classes that do not fit a batch are drawn, not a fixed list;
- low-resolution stages pool the full image (as released); the paper up-samples a small one.
Measured (3 seeds, 1 CPU thread beside other work, torch 2.13): on `cifar10`, 100 images, another network agrees on
99.7 ± 0.6 % (250 s, commit 364118c); MNIST ResNet-8 -> LeNet-5 97.60 ± 0.32 %, adaptive 97.77 ± 0.14 % (485 s at most,
commit d4b43af): results/inversion-*.json, students-*.json. Run `python deepinversion.py [--teacher resnet50]`. It
writes into --out: samples.png, images-00000.npz … of a batch each (`images` uint8 (N, H, W, C), `labels` int64 (N,)),
student.pt and curve.png of a student, result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics: `loss/total`; its
unweighted terms `loss/ce` `loss/bn` `loss/tv_l2` `loss/tv_l1` `loss/l2` `loss/competition`; `eval/teacher` percent of
views on target; of an epoch `loss/student` and `eval/acc`. `torchrun --nproc-per-node N …` shares the batches out.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import kernels
from kernels.augment import start, varied
from kernels.contract import RunOptions, check_options, fail, load_network, load_student, load_verifier, one_line
from kernels.data import CLASS_NAMES, pixel_range, real_images, to_uint8
from kernels.distributed import join, joint_moments, leave, wait_for_all
from kernels.figures import draw_classes, draw_curves
from kernels.folder import RunFolder
from kernels.fuse import lowered, measured
from kernels.js_divergence import js_released
from kernels.moment_distance import moment_kl
from kernels.pool import Pool
from kernels.quality import agreement, report
from kernels.shards import Shards, given_shards, wanted_labels


@dataclass
class Args(RunOptions):
    # Run settings, besides those of RunOptions.
    teacher: str = "auto"  # Shipped name, resnet18 … 152 (ImageNet), teacher.pt, file.py:factory; auto: --dataset's.
    student: str = ""  # Network to train: one of this script or of teacher.py, a shipped name, file.py:factory.
    competition: str = "none"  # Adaptive: images that the student gets wrong: none | js (paper) | released.
    images: str = ""  # An earlier run's folder: its images are the student's initial pool, in place of new ones.
    verifier: str = "auto"  # Judges the images, never optimised against: as --teacher (factory with weights) | none.
    dataset: str = "auto"  # Setting, verifier, test images: cifar10 | mnist | digits | imagenet | none | auto.
    out: str = "runs/deepinversion/default"  # Output folder.
    smoke: bool = False  # A run of seconds: 6 steps on 20 images; 4 of a student, whatever its options say.
    fused: bool = True  # Use the fused ops of kernels/; off: the plain references, whatever the next three say.
    fused_bn: bool = True  # BatchNorm, addition, ReLU and moments as one op; off: hooks that read inputs once more.
    fused_distance: bool = True  # The moment loss of all layers as one op; off: layer by layer.
    fused_view: bool = True  # Jitter, flip, total variation and l2 as one op; off: one after another.
    graph: bool = True  # On a GPU: the whole step as one CUDA graph.
    image_folder: bool = False  # Also write PNGs into images/CLASS/ of --out, as torchvision's ImageFolder reads them.
    sync_moments: bool = False  # Under torchrun: moments over the images of all processes, as of one joint batch.
    checkpoint_every: int = 200  # Steps between checkpoints.
    log_every: int = 10  # Steps between rows of metrics.jsonl: at these and at checkpoints the host waits, only.

    # Method. None: as --setting has it.
    setting: str = "auto"  # A row of SETTINGS; auto: the data set's first.
    num_images: int = 0  # In whole batches; 0: one. With --student the initial pool; 0: the setting's, or --images.
    classes: tuple[int, ...] = ()  # Wanted classes, repeated in turn; empty: all of them.
    batch_size: int | None = None  # Images optimised together; part of the method: the moments are those of a batch.
    iterations: int | None = None  # Steps per batch, shared out over the setting's stages.
    lr: float | None = None  # Adam's peak learning rate, in normalised units.
    alpha_bn: float | None = None  # Weight of the moment loss (released flag: r_feature).
    first_bn: float | None = None  # Factor on the first BatchNorm (released code: 10 on ImageNet; not in the paper).
    alpha_tv_l2: float | None = None  # Weight of the l2 total variation (released flag: tv_l2).
    alpha_tv_l1: float | None = None  # Weight of the l1 total variation (released flag: tv_l1).
    alpha_l2: float | None = None  # Weight of the images' mean l2 norm (released flag: l2).
    moments: str | None = None  # Distance: l2 (paper) | symmetric-kl of Gaussians (ours, after ABD's one-sided one).
    ema: float | None = None  # Share of this process's past batches in the moments (Fast-Datafree: 0.9).
    priors_per_image: bool | None = None  # Divide TV2, which grows so, by sqrt(batch size): one weight for all sizes.
    jitter: int | None = None  # Largest roll in pixels at full resolution (released flag: jitter).
    flip: bool | None = None  # Mirror the batch with probability 1/2.
    clip: bool | None = None  # Clip to the range of real pixels after each step, [-m/s, (1 - m)/s] per channel.
    alpha_competition: float | None = None  # Weight of the competition term (released flag: adi_scale).
    epochs: int | None = None  # Epochs of the student; it is tested after each.
    steps_per_epoch: int | None = None  # The student's updates in an epoch.
    batches_per_epoch: int | None = None  # Batches of images made in each epoch, at even distances.
    student_batch: int | None = None  # Images of an update, drawn from the pool.
    lr_student: float | None = None  # The student's initial learning rate.
    temperature: float | None = None  # T of the student's loss, which is multiplied by T², and of the competition.
    shift: int | None = None  # Largest move of a student's images, each its own, in pixels.


# stages: (steps, pooling factor, jitter in pixels the teacher sees); warmup, student_warmup: steps before a learning
# rate's cosine, None: constant; drop: epochs until the student's is a tenth; initial: batches before its first step.
# fmt: off
BASE = dict(lr=0.3, betas=(0.5, 0.9), warmup=10, first_bn=1.0, alpha_tv_l1=0.0, alpha_l2=0.0, flip=True, clip=True,
            moments="l2", ema=0.0, priors_per_image=False, blur=1, gain=1.0, margin=0)
STUDENT = dict(initial=10, epochs=20, steps_per_epoch=195, batches_per_epoch=2, student_batch=256, optimizer="sgd",
               lr_student=0.1, student_warmup=0, drop=10**6, temperature=3.0, alpha_competition=10.0, shift=4,
               mirror=True, cut=False)
PAPER = dict(STUDENT, initial=50, epochs=250, student_warmup=None, drop=100)  # 4.1, but for its unknown initial pool
PAPER_4_4 = dict(STUDENT, initial=2188, epochs=90, steps_per_epoch=137, batches_per_epoch=0, student_batch=1024,
                 lr_student=1.024, student_warmup=1096, alpha_competition=0.2, shift=32)  # 140,000 images; shift: ours
SMALL = dict(STUDENT, student_batch=64, optimizer="adam", lr_student=5e-3, student_warmup=100, alpha_competition=5.0,
             shift=2, mirror=False, cut=True)
CIFAR = dict(BASE, **STUDENT, batch_size=100, alpha_bn=1.0, first_bn=10.0, alpha_tv_l2=1.5e-2)
GREY = dict(BASE, **SMALL, batch_size=100, alpha_bn=3.0, flip=False)
IMAGENET = dict(BASE | PAPER_4_4, lr=0.2, warmup=100, batch_size=64, alpha_bn=0.05, first_bn=10.0, alpha_tv_l2=1e-4,
                alpha_l2=1e-5)
SETTINGS = {
    "cifar10": dict(CIFAR, stages=[(400, 1, 2)]),  # ours
    "cifar10-long": dict(CIFAR, stages=[(1200, 1, 2)], alpha_bn=3.0),  # ours
    "cifar10-released": dict(BASE | PAPER, stages=[(2000, 1, 2)], batch_size=256, alpha_bn=10.0, lr=0.05,
                             alpha_tv_l2=2.5e-5, betas=(0.9, 0.999), warmup=None, flip=False, clip=False),
    "mnist": dict(GREY, stages=[(25, 1, 2)], lr=0.8, alpha_tv_l2=5e-3, blur=5, gain=1.2, margin=6,  # ours
                  initial=20, epochs=20, steps_per_epoch=120, batches_per_epoch=1),
    "digits": dict(GREY, stages=[(40, 1, 1)], alpha_tv_l2=2e-2, blur=9, gain=0.7, margin=4,  # ours
                   initial=15, epochs=5, steps_per_epoch=300, batches_per_epoch=1),
    "imagenet-0": dict(IMAGENET, stages=[(2000, 2, 15), (1000, 1, 30)]),  # released default
    "imagenet-1": dict(IMAGENET, stages=[(2000, 1, 30)]),
    "imagenet-2": dict(IMAGENET, stages=[(20000, 1, 30)], betas=(0.9, 0.999), clip=False),  # nearest the paper's 4.2
}
FAMILIES = {"cifar10": ("cifar10", "cifar10-resnet20", "cifar10-wrn-16-1"),  # setting, teacher, verifier
            "mnist": ("mnist", "mnist-resnet8", "mnist-lenet5"), "imagenet": ("imagenet-0", "resnet50", "none"),
            "digits": ("digits", "digits-resnet8", "digits-lenet5")}
# fmt: on


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
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
for _depth, _blocks in DEPTHS.items():
    NETWORKS[f"resnet{_depth}"] = partial(ResNet, _blocks, WIDE, "B", bottleneck=_depth >= 50, imagenet=True)
ADVICE = "try --resume --no-graph, or in another --out --no-bf16, --no-fused or smaller batches"
load = partial(load_network, networks=NETWORKS, public=kernels.contract.PUBLIC)


# Losses
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
    distance = kernels.moment_distance if setting["fused_distance"] else kernels.moment_distance_ref
    return distance(moments, running_var, sizes, weights)


def competition_loss(t_logits, s_logits, setting):
    """R_compete, eq. 8: 1 - JS of teacher and student, both (N, K), at a temperature (released: 3); () fp32.

    `js` is at least 1 - ln 2 and has a gradient everywhere. `released`, with `js_released`, is clamped at 0: once a
    batch's mean passes 1, which sure networks that disagree do, the gradient of all its images ends.
    """
    if setting["competition"] == "released":
        return 1 - js_released(t_logits, s_logits, setting["temperature"]).clamp(0, 1)
    js = kernels.js_divergence if setting["fused"] else kernels.js_divergence_ref
    return 1 - js(t_logits, s_logits, setting["temperature"])


TERMS = "total", "ce", "bn", "tv_l1", "tv_l2", "l2", "competition", "teacher"


def synthesis_loss(x, draw, labels, teacher, setting, past=None, student=None):
    """Total loss (scalar) and (8,) of TERMS, unweighted, for images x (N, C, H, W) seen as `draw` (3,) says.

    R_l2 is the mean of the images' un-squared norms; `teacher`: percent of the views that it assigns to their labels;
    student: the network in eval mode that the images compete with, if any.
    """
    see = kernels.jittered_view if setting["fused_view"] else kernels.jittered_view_ref
    view, tv_l1, tv_l2, l2 = see(x, draw, torch.bfloat16 if setting["bf16"] and x.is_cuda else None)
    logits, found = teacher.measured(view)
    ce = F.cross_entropy(logits.float(), labels)
    tv_l2 = tv_l2 / math.sqrt(len(x)) if setting["priors_per_image"] else tv_l2
    terms = dict(ce=ce, bn=moment_loss(found, setting, past), tv_l1=tv_l1, tv_l2=tv_l2, l2=l2)
    if student is not None:
        with lowered(setting, x):
            s_logits = student(view)
        terms["competition"] = competition_loss(logits, s_logits, setting)
    weights = {k: 1.0 if k == "ce" else setting[f"alpha_{k}"] for k in terms}
    if setting["sync_moments"]:  # the others are means over this process's share of the joint batch: total is a share
        n = setting["world"]  # norms add as squares
        shares = dict(bn=1.0, tv_l2=1 / n if setting["priors_per_image"] else 1 / math.sqrt(n))
        weights = {k: w * shares.get(k, 1 / n) for k, w in weights.items()}
    total = sum(w * terms[k] for k, w in weights.items() if w)  # a term of weight 0 is only reported
    terms |= dict(total=total, teacher=(logits.argmax(1) == labels).float().mean() * 100)
    return total, torch.stack([terms.get(k, torch.zeros_like(total)) for k in TERMS]).detach()


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


def begin(x, labels, draws, stage, teacher, setting, past=None, student=None):
    """One stage of a batch: all that its steps read and change, on the device and in place, as a CUDA graph needs it.

    x: (N, C, H, W) fp32, channels_last, changed in place; labels: (N,); draws: (n_steps, 3); past: as of moment_loss;
    student: as of synthesis_loss.
    """
    n_steps, pool, _ = stage
    rates = torch.tensor([learning_rate(i, n_steps, setting) for i in range(n_steps)], device=x.device)
    # A fresh Adam in each stage, as released; its learning rate is a tensor that every step sets.
    options = dict(betas=setting["betas"], fused=True, capturable=x.is_cuda)
    optimizer = torch.optim.Adam([x.requires_grad_()], torch.zeros((), device=x.device), **options)
    step, terms = torch.zeros(1, dtype=torch.long, device=x.device), torch.zeros(len(TERMS), device=x.device)
    kept = dict(x=x, labels=labels, draws=draws.to(x.device), rates=rates, pool=pool, step=step, terms=terms)
    return SimpleNamespace(**kept, teacher=teacher, setting=setting, optimizer=optimizer, past=past, student=student)


def synthesis_step(work):
    """One update of the images work.x, without the host waiting; work.terms receives TERMS of the images before it."""
    x, draw = work.x, work.draws.index_select(0, work.step)[0]  # (3,)
    work.optimizer.param_groups[0]["lr"].copy_(work.rates.index_select(0, work.step)[0])
    seen = F.avg_pool2d(x, work.pool) if work.pool > 1 else x
    total, terms = synthesis_loss(seen, draw, work.labels, work.teacher, work.setting, work.past, work.student)
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
    moments = torch.cat([moments for moments, _ in teacher.measured(x)[1]], 1)
    moments = joint_moments(moments) if setting["sync_moments"] else moments
    return moments if past is None else blended(moments, past, setting["ema"])


def synthesise(run, labels, teacher, setting, student=None):
    """All stages of one batch, on from where `run` stands; returns its images (N, C, H, W)."""
    shape = len(labels), teacher.shape[0], teacher.image_size, teacher.image_size
    noise, draws = drawn(run.batch, shape, setting, run.args.seed)
    x = start(noise, setting, teacher) if run.x is None else run.x
    x = x.to(run.args.device, memory_format=torch.channels_last)
    past = None
    if setting["ema"]:
        nothing = torch.full_like(remembered(x, teacher, setting, None), torch.nan)
        past = nothing if run.past is None else run.past.to(x.device)
    for i, stage in list(enumerate(setting["stages"]))[run.stage :]:
        work = begin(x, labels, draws[i], stage, teacher, setting, past, student)
        work.step.fill_(run.step)
        if run.optimizer is not None:
            kernels.contract.restore_optimizer(work.optimizer, run.optimizer)
        step = kernels.Captured(partial(synthesis_step, work), enabled=run.args.graph)
        for n in range(run.step, stage[0]):
            with one_line(f"step {n + 1} failed", ADVICE):
                step()
            run.after_step(i, n + 1, work)
        run.stage, run.step, run.optimizer = i + 1, 0, None
    if setting["ema"]:
        run.past = remembered(x, teacher, setting, run.past)
    return x.detach()


# Knowledge transfer
class Distiller(nn.Module):
    """A student with its optimiser, and the pool of images that it learns from."""

    def __init__(self, teacher, student, setting, n_images):
        super().__init__()
        self.teacher, self.student, self.setting = teacher, student, setting  # of load_network; what learns is `model`
        self.model, self.pool = student.model, Pool(teacher, n_images)
        self.register_buffer("sum", torch.zeros((), device=teacher.device))  # of the losses of an epoch
        self.optimizer = kernels.contract.make_optimizer(setting["optimizer"], self.model, setting["lr_student"])

    @contextlib.contextmanager
    def at_rest(self):
        """The student as it is tested and as images compete with it: eval mode, no gradients of its weights."""
        yield self.model.eval().requires_grad_(False)
        self.model.train().requires_grad_(True)


def student_step(state):
    """One update of the student towards the teacher's answers to images of the pool, each augmented anew."""
    setting, T = state.setting, state.setting["temperature"]
    x = varied(state.pool.draw(setting["student_batch"]), setting)  # (N, C, H, W)
    divergence = kernels.kl_divergence if setting["fused"] else kernels.kl_divergence_ref
    with lowered(setting, x):
        with torch.no_grad():
            t_logits = state.teacher.model(x)
        loss = T**2 * divergence(t_logits, state.model(x), T)
    state.optimizer.zero_grad()
    loss.backward(inputs=list(state.model.parameters()))
    state.optimizer.step()
    state.sum += loss.detach()


def batches_before(step, setting):
    """Batches that are in the pool when the student takes its step number `step`, counted from 0."""
    new = setting["batches_per_epoch"]
    return setting["initial"] + (step * new // setting["steps_per_epoch"] + 1 if new and step >= 0 else 0)


def distil(run, state, step, test=None):
    """The student's steps until a new batch of images is due or its epoch ends."""
    setting, size = state.setting, state.setting["steps_per_epoch"]
    rates = dict(lr=setting["lr_student"] * 0.1 ** (run.epoch // setting["drop"]), warmup=setting["student_warmup"])
    for n in range(run.n_student, size * (run.epoch + 1)):
        if batches_before(n, setting) > run.batch:
            return
        state.optimizer.param_groups[0]["lr"].fill_(learning_rate(n, size * setting["epochs"], rates))
        state.pool.draw_from(newest=batches_before(n, setting) > batches_before(n - 1, setting))
        with one_line(f"the student's step {n + 1} failed", ADVICE):
            step()
        run.after_student_step(n + 1, state, test)


# Evaluation and files
class Run(RunFolder):
    """One run's folder, and where in the run we stand: batch, stage, step, its images and optimiser; the student.

    Under torchrun each process but the first has its checkpoint and metrics in a folder of its own, rankN.
    """

    NUMBERS = "batch", "stage", "step", "epoch", "n_student"

    def __init__(self, args, setting, n_batches, place, distiller=None):
        self.batch, self.stage, self.step, self.x, self.optimizer, self.past = place.rank, 0, 0, None, None, None
        self.place, self.shards, self.steps_of = place, Shards(args.out), [n for n, _, _ in setting["stages"]]
        self.distiller, self.epoch, self.n_student = distiller, 0, 0
        if not args.resume and not place.rank:
            self.shards.clear()
        wait_for_all(place)
        super().__init__(args, setting, free=("graph",), rank=place.rank)
        if setting["sync_moments"]:
            self.meet(self.n_done)
        total = n_batches // place.world * sum(self.steps_of)
        total += setting["epochs"] * setting["steps_per_epoch"] if distiller else 0
        hidden, done = True if place.rank else None, self.n_done() + self.n_student
        self.bar = tqdm(total=total, initial=done, disable=hidden, mininterval=0.5)

    def n_done(self):
        return self.batch // self.place.world * sum(self.steps_of) + sum(self.steps_of[: self.stage]) + self.step

    def state(self):
        saved, learns = {k: getattr(self, k) for k in (*self.NUMBERS, "x", "optimizer", "past")}, self.distiller
        return saved | (dict(student=learns.state_dict(), learner=learns.optimizer.state_dict()) if learns else {})

    def restore(self, saved):
        for k in self.NUMBERS:
            setattr(self, k, int(saved[k]))
        self.x, self.optimizer, self.past = saved["x"], saved["optimizer"], saved["past"]
        if self.distiller:
            self.distiller.load_state_dict(saved["student"])
            if self.n_student:
                kernels.contract.restore_optimizer(self.distiller.optimizer, saved["learner"])

    def after_step(self, stage, step, work):
        """Log every log_every steps, where the host waits for the device and sees a NaN; checkpoint."""
        self.bar.update()
        self.stage, self.step = stage, step
        n, last = self.n_done(), (stage + 1, step) == (len(self.steps_of), self.steps_of[-1])
        at_checkpoint = n % self.args.checkpoint_every == 0 and not last  # `keep` saves after a batch
        if n % self.args.log_every == 0 or at_checkpoint or last:
            values = dict(zip(TERMS, work.terms.tolist(), strict=True))
            if not math.isfinite(values["total"]):
                fail(f"the loss is {values['total']} at step {n}; lower --lr or the weights of the terms")
            if work.student is None:
                del values["competition"]
            row = {("eval/" if k == "teacher" else "loss/") + k: v for k, v in values.items()}
            shown = self.write({"step": n, "batch": self.batch, "stage": stage} | row)
            self.bar.set_postfix({k: shown[k] for k in ("total", "ce", "bn", "tv_l2", "teacher")})
            if self.bar.disable and not self.place.rank and n % (10 * self.args.log_every) == 0:  # no terminal
                print("  ".join(f"{k} {v:>8}" for k, v in shown.items()), flush=True)
        if at_checkpoint:
            self.x, self.optimizer = work.x.detach(), work.optimizer.state_dict()
            self.save()

    def keep(self, images, labels, digits):
        """Write a finished batch, uint8 (N, C, H, W), and go to this process's next one; digits: as Shards.write."""
        with self.written(f"images-{self.batch:05d}.npz"):
            self.shards.write(self.batch, images, labels, digits if self.args.image_folder else 0)
        self.batch, self.stage, self.x, self.optimizer = self.batch + self.place.world, 0, None, None
        self.save()

    def after_student_step(self, n, state, test):
        """At an epoch's end the host looks at the device: a row with the student's accuracy; checkpoint."""
        self.bar.update()
        self.n_student, size = n, state.setting["steps_per_epoch"]
        if n % size == 0:
            self.epoch += 1
            row = {"epoch": self.epoch, "loss/student": state.sum.item() / size}
            state.sum.zero_()
            with state.at_rest():
                self.show(self.bar, row | ({"eval/acc": agreement(state.student, [test])[0]} if test else {}))
        if 0 in (n % size, n % self.args.checkpoint_every):
            self.save()


# Main
def choose_setting(args, dataset, world=1):
    """The row of SETTINGS with the command line's values over it, its stages rescaled to --iterations."""
    name = FAMILIES.get(dataset, FAMILIES["cifar10"])[0] if args.setting == "auto" else args.setting
    setting = SETTINGS[name] | {k: v for k in SETTINGS[name] if (v := getattr(args, k, None)) is not None}
    setting.update({k: args.fused and getattr(args, k) for k in ("fused", "fused_bn", "fused_distance", "fused_view")})
    setting.update(name=name, bf16=args.bf16, sync_moments=args.sync_moments, world=world)
    if args.smoke:
        setting.update(initial=1, epochs=2, steps_per_epoch=2, batches_per_epoch=1, student_batch=20)
        setting.update(batch_size=min(setting["batch_size"], 20))
    elif args.num_images or args.images:
        setting.update(initial=-(-args.num_images // setting["batch_size"]))
    planned = sum(n for n, _, _ in setting["stages"])
    scale = (6 if args.smoke else args.iterations or planned) / planned
    stages = [(n, pool, j if args.jitter is None else args.jitter // pool) for n, pool, j in setting["stages"]]
    setting.update(stages=[(max(1, round(n * scale)), pool, j) for n, pool, j in stages], competition=args.competition)
    return setting if args.student else {k: v for k, v in setting.items() if k not in STUDENT}


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    least = dict(batch_size=2, checkpoint_every=1, log_every=1, iterations=1, lr=1e-12)  # one image has no moments
    least |= dict(epochs=1, steps_per_epoch=1, student_batch=1, lr_student=1e-12, temperature=1e-6)
    names = "seed image_size num_classes num_images alpha_bn alpha_tv_l2 alpha_tv_l1 alpha_l2 first_bn jitter"
    names += " alpha_competition batches_per_epoch shift"
    choices = dict(dataset=("auto", *FAMILIES, "cifar100", "none"), setting=("auto", *SETTINGS))
    choices |= dict(moments=(None, "l2", "symmetric-kl"), competition=("none", "js", "released"))
    check_options(args, least | dict.fromkeys(names.split(), 0), choices)
    if args.ema is not None and not 0 <= args.ema < 1:
        fail(f"--ema: expected at least 0 and below 1, got {args.ema}")
    of_student = [k for k in ("competition", "images", *STUDENT) if getattr(args, k, None) not in (None, "", "none")]
    if of_student and not args.student:
        fail(f"--{of_student[0].replace('_', '-')}: of a student's training; name one with --student")
    if args.teacher == "auto":
        args.teacher = FAMILIES.get(args.dataset, FAMILIES["cifar10"])[1]


def load_measured(args, world):
    """The teacher, with what the steps call, tried out at every resolution of its setting; and that setting."""
    with one_line(f"--teacher {args.teacher}", "check --weights, --num-classes, --image-size, --mean and --std"):
        teacher = load(args.teacher, args)
        teacher.low, teacher.high = pixel_range(teacher, args.device)
        n_channels, size, n_classes = teacher.shape
        if size % 2 or size < 8:
            fail(f"--image-size: expected an even number of at least 8 pixels, got {size}")
        teacher.family = teacher.dataset if args.dataset in ("auto", "none") else args.dataset
        setting = choose_setting(args, teacher.family, world)
        for _, pool, _ in setting["stages"]:
            kernels.contract.try_out(teacher, n_channels, size // pool, n_classes)
        if not any(isinstance(m, nn.BatchNorm2d) and m.running_mean is not None for m in teacher.model.modules()):
            fail(f"--teacher {args.teacher}: no BatchNorm2d with running moments, which are matched; take another")
        teacher.measured = measured(teacher.model, setting, args.device)
        with torch.no_grad():  # as the steps will, in bf16 on a GPU
            teacher.measured(torch.zeros(2, n_channels, size, size, device=args.device))
    return teacher, setting


def main(args):
    check_args(args)
    kernels.contract.seed_everything(args.seed)
    place = join(args.device)
    if args.sync_moments and place.world == 1:
        fail("--sync-moments: a single process has all images already; start several with torchrun, or leave it out")
    if args.student and place.world > 1:
        fail("--student: one process trains it; make images with torchrun first, then pass their folder as --images")

    # The teacher, the network that judges the images, the student and the real images that measure (never train) it.
    teacher, setting = load_measured(args, place.world)
    verifier = load_verifier(load, args.verifier, FAMILIES.get(teacher.family, ("none",))[-1], args, teacher)
    batch_size, student, state, test = setting["batch_size"], None, None, None
    measures, given = dict(teacher_accuracy=teacher.accuracy, student_accuracy=None), given_shards(args, teacher)
    n_batches = place.world * -(-(args.num_images or batch_size) // (batch_size * place.world))  # as many for each
    if args.student:
        least, new = int(args.competition != "none"), setting["batches_per_epoch"]
        if not least <= new <= setting["steps_per_epoch"]:
            fail(f"--batches-per-epoch: expected {least} to {setting['steps_per_epoch']} (steps an epoch), got {new}")
        student = load_student(load, args.student, args, teacher)
        dataset, test = real_images(teacher, args)
        n_batches = batches_before(setting["epochs"] * setting["steps_per_epoch"] - 1, setting)
        setting["given"] = given.n_images()
        state = Distiller(teacher, student, setting, n_batches * batch_size + setting["given"])
        measures["teacher_accuracy"] = agreement(teacher, [test])[0] if test else teacher.accuracy

    labels = wanted_labels(args.classes, teacher.num_classes, n_batches, batch_size, args.seed)
    run = Run(args, setting, n_batches, place, state)
    run.shards.expect(range(place.rank, run.batch, place.world))
    if not place.rank:
        print(f"{teacher.name}: {labels.numel()} images, setting {setting['name']}, {args.device}, fused={args.fused}")
    if state:
        for images, _ in chain(given.read(), run.shards.read(run.shards.paths()[: run.batch])):
            state.pool.add(images)
        step = kernels.Captured(partial(student_step, state), enabled=args.graph)
    while run.batch < n_batches or (state and run.epoch < setting["epochs"]):
        if state and run.batch >= batches_before(run.n_student, setting):
            distil(run, state, step, test)
            continue
        competes = args.competition != "none" and run.batch >= setting["initial"]
        with state.at_rest() if competes else contextlib.nullcontext() as opponent:
            x = synthesise(run, labels[run.batch].to(args.device), teacher, setting, opponent)
        images = to_uint8(x, teacher)
        if state:
            state.pool.add(images)
        run.keep(images.cpu(), labels[run.batch], len(str(teacher.num_classes - 1)))
    run.bar.close()
    wait_for_all(place)

    if not place.rank:
        if state:
            if accuracies := run.column("eval/acc"):
                measures["student_accuracy"] = accuracies[-1]
                with run.written("curve.png"):
                    draw_curves({student.name: [accuracies]}, run.out / "curve.png")
                print("teacher {teacher_accuracy:.2f} %, student {student_accuracy:.2f} %".format(**measures))
            method = "deepinversion" if args.competition == "none" else "adaptive deepinversion"
            run.save_student(student, teacher, method, dataset, measures["student_accuracy"])
            measures |= dict(student=student.name, dataset=dataset)
        made = run.shards if n_batches else given
        with run.written("samples.png"):
            draw_classes(*made.last(1000), CLASS_NAMES.get(teacher.family, {}), run.out / "samples.png")
        run.finish(measures | report(made, teacher, verifier) | dict(ranks=place.world))
    leave(place)


if __name__ == "__main__":
    main(tyro.cli(Args))
