"""Generative ensemble: small generators learn from a teacher alone, then they teach students.

Luo, Sandler, Lin, Zhmoginov, Howard, "Large-scale generative data-free distillation", 2020,
arXiv:2012.05578. Each generator G_g makes images of its own classes, in which the teacher T must
see the wanted class, and which must have the moments that T stored. A student S then learns T's
answers to fresh images of the frozen generators:

    L_G = CE(T(x), y) + alpha_bn R(x),   x = G_g(z, y),  z ~ N(0, I),  y a class of generator g
    L_S = tau^2 KL(softmax(T(x) / tau) || softmax(S(x) / tau)),   tau: --temperature

R is the distance of the moments of T's BatchNorm inputs from the stored ones (`moment_loss`).
Run `python generative_ensemble.py`. It writes ensemble.pt, student.pt, samples.png (a row per
class), metrics.jsonl, result.json, args.json and checkpoint.pt into --out. Metrics, means since the
row before: `loss/ce` and `loss/bn`, unweighted; `eval/hits`, percent of images in which T sees the
wanted class; `loss/student`; `eval/acc`, percent of the real test images.
Measured, one CPU thread: digits 94.17 % (1 seed, 214 s); MNIST, ResNet-8 to LeNet-5, 96.44 ± 0.53 %
(3 seeds, 842 s each at most); with one generator in place of ten 82.97 %, with one of the size of
all ten 90.65 % (1 seed each). It has not run on a GPU.
The authors released the generator, but no losses, coefficients and schedules. Ours are:
- all generators train at once, as the groups of one network, in one pass through the teacher;
- the moments of the last layers are pooled over all generators (--pool);
- generators teach in train mode (--bn); no image priors and no depthwise convolutions; bf16
  activations on a GPU;
- the values of `OURS`, chosen on training images (results/NOTES.md), and of `Args`, untested.
"""

import contextlib
import math
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import kernels
from harness.data import evaluate, load_real_images, normalise
from harness.errors import fail, fail_in_one_line
from harness.files import open_atomically, read_checkpoint
from harness.images import augment, to_uint8
from harness.known import make_info
from harness.load import choose_preset_by_dataset, load_student, load_teacher
from harness.networks import compute_last_features, sample_example
from harness.pictures import draw_classes
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
    seed_everything,
)


@dataclass
class Args(MethodOptions):
    # Run settings
    setting: Literal["cifar10", "mnist", "digits"] = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else of the teacher's data set, else cifar10;
    without a teacher digits."""
    teacher: str = "cifar10-resnet20"
    """Shipped name (teachers/index.json), a checkpoint of teacher.py (.pt), or file.py:factory. The
    statistics of its BatchNorms are what is matched."""
    student: str = "resnet18_cifar"
    """Network to train: a name of harness/networks.py, a shipped name, or file.py:factory."""
    out: str = "runs/generative_ensemble/default"
    """Output folder."""
    ensemble: str = ""
    """A saved ensemble.pt that teaches another student: no generator is trained. The file replaces
    --generators, --latent, --width, --stages and --bn."""
    sample: int = 0
    """Train nothing: write samples.png with about so many images of --ensemble, or without it of
    --out/ensemble.pt. 0: train."""

    # Generators
    generators: int = 10
    """Generators, at most one a class; the classes are split evenly among them (paper, ImageNet:
    one a class)."""
    steps: int = 20000
    """Steps of all generators together; Adam's rate falls to zero over them by a cosine (ours)."""
    batch_size: int = 500
    """Images of a step, equally many from each generator (ours)."""
    latent: int = 100
    """Dimensions of the noise z (ours)."""
    width: int = 128
    """Channels of a generator's first layer; stage i has width // (i + 1) (released code)."""
    stages: int = 0
    """Up-samplings by 2 (released code: 2). 0: halve the image size while it is even and above 8,
    which gives 2 at 28 and 32 px and 5 at 224 px."""
    lr_generator: float = 1e-3
    """Adam's initial learning rate of the generators (ours)."""
    moments: Literal["l2", "relative", "kl"] = "l2"
    """Distance of a layer's moments from the stored ones; formulas: compute_distance."""
    pool: float = 0.3
    """Share of the BatchNorms, the last ones, whose moments are of all generators' images (under
    torchrun: of all that a process has). The others' are of each generator's images (ours)."""
    alpha_bn: float = 10.0
    """Weight of the moment loss; the cross-entropy has weight 1 (ours)."""

    # Student
    epochs: int = 200
    """Epochs of the student; each ends with a test (ours)."""
    iterations: int = 500
    """Student steps of an epoch (ours)."""
    student_batch: int = 250
    """Images of a student step, equally many from each generator (ours)."""
    bn: Literal["batch", "running"] = "batch"
    """Moments in the generators' BatchNorms while they teach: of the batch (train mode) or the
    running ones (eval mode; 6 points worse on digits) (ours)."""
    shift: int = 0
    """Most pixels by which each image that the student sees is moved; edges are repeated (ours)."""
    cut: bool = False
    """Give half of the student's images a random band of another image, as CutMix does (ours)."""
    temperature: float = 1.0
    """tau of the student's loss (ours)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The student's: sgd has momentum 0.9 and weight decay 5e-4 (ours)."""
    lr_student: float = 0.1
    """The student's initial learning rate; a cosine over the epochs lowers it to 0 (ours)."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, self, "sample", "stages", "shift", "alpha_bn", "pool")
        check_at_least(1, self, "generators", "steps", "batch_size", "latent", "width")
        check_at_least(1, self, "epochs", "iterations", "student_batch")
        check_at_least(1e-6, self, "temperature")
        check_at_least(1e-12, self, "lr_generator", "lr_student")
        if self.pool > 1:
            raise ValueError(f"--pool: expected a share of at most 1, got {self.pool}")
        if self.sample > 10_000:  # of one picture
            raise ValueError(f"--sample: expected at most 10000 images, got {self.sample}")


OURS = replace(
    Args(),
    student="lenet5",
    batch_size=40,
    latent=64,
    width=16,
    lr_generator=5e-3,
    student_batch=40,
    iterations=125,
    shift=2,
    cut=True,
    optimizer="adam",
    lr_student=5e-3,
)
PRESETS = {
    # untested: widths as released, the rest after related work; the paper's teacher: ResNet-34
    "cifar10": Args(),
    "mnist": replace(OURS, setting="mnist", teacher="mnist-resnet8", steps=4000, epochs=40),
    "digits": replace(
        OURS,
        setting="digits",
        teacher="digits-resnet8",
        steps=1000,
        alpha_bn=5.0,
        epochs=20,
        student_batch=80,
        iterations=80,
    ),
}


def choose_preset(teacher, dataset):
    """The name of the preset that follows from --teacher and --dataset."""
    return choose_preset_by_dataset(PRESETS, teacher, dataset)


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        steps=min(args.steps, 3),
        epochs=min(args.epochs, 2),
        iterations=2,
        batch_size=2 * args.generators,
        student_batch=2 * args.generators,
    )


# The generators
@dataclass
class Sizes:
    """What makes an ensemble's networks, besides their weights."""

    groups: list[list[int]]
    """The classes of each generator."""
    latent: int
    width: int
    stages: int
    channels: int
    image_size: int


def split_evenly(n, n_parts):
    """Split range(n) into contiguous slices; the first ones may be longer by 1.

    >>> split_evenly(10, 3)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    parts = torch.arange(n).tensor_split(n_parts)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


class Ensemble(nn.Module):
    """G generators that run together, each with its own group of classes.

    Activations are (n, G C, H, W): a convolution in G groups and one BatchNorm over G C channels
    compute exactly what G separate ones do. Each tensor of the state holds the generators' tensors
    one after another along dimension 0.

    Args:
        sizes: Sizes.
        own: slice of the generators that this module holds (under torchrun, a process's own). All
            of them draw noise, so that a generator's images do not depend on who else is here.
    """

    def __init__(self, sizes, own=slice(None)):
        super().__init__()
        self.sizes = sizes
        self.own = own
        G = len(sizes.groups[own])
        n_labels = max(len(group) for group in sizes.groups)
        widths = [sizes.width // (i + 1) for i in range(max(1, sizes.stages))]
        self.side = sizes.image_size >> sizes.stages  # height = width of the first maps

        n_outputs = widths[0] * self.side**2
        self.dense = nn.Parameter(torch.zeros(G, sizes.latent + n_labels, n_outputs))
        self.bn0 = nn.BatchNorm2d(G * widths[0])

        self.convs = nn.ParameterList()  # without bias, as released
        self.bns = nn.ModuleList()
        before = widths[0]
        for after in widths[: sizes.stages]:
            self.convs.append(torch.zeros(G * after, before, 3, 3))
            self.bns.append(nn.BatchNorm2d(G * after, eps=0.8))  # as released, an accident of DAFL
            before = after

        self.last = nn.Parameter(torch.zeros(G * sizes.channels, before, 3, 3))
        self.bias = nn.Parameter(torch.zeros(G * sizes.channels))
        self.bn_last = nn.BatchNorm2d(G * sizes.channels, eps=0.8, affine=False)
        self.scale = nn.Parameter(torch.ones(G * sizes.channels))  # learnt; there is no shift

        # filled up to one length; sample_inputs never draws the filling
        padded = [group + group[:1] * (n_labels - len(group)) for group in sizes.groups]
        n_classes = [len(group) for group in sizes.groups]
        self.register_buffer("classes", torch.tensor(padded), persistent=False)  # (all, n_labels)
        self.register_buffer("n_classes", torch.tensor(n_classes), persistent=False)  # (all,)

    def initialise(self):
        """Xavier's uniform weights, each generator's from its own fans; zero bias, as released."""
        for weight in self.dense.detach():
            nn.init.xavier_uniform_(weight)
        for weights in (*self.convs, self.last):
            for weight in weights.detach().chunk(len(self.dense)):
                nn.init.xavier_uniform_(weight)
        return self

    def sample_inputs(self, n):
        """Noise and classes of n images for each generator here.

        Returns:
            z: (n, G, latent), standard normal.
            place: (n, G), where the image's class stands in its generator's group, uniform.
        """
        n_all = len(self.n_classes)
        z = torch.randn(n, n_all, self.sizes.latent, device=self.classes.device)
        place = (torch.rand(n, n_all, device=z.device) * self.n_classes).long()
        return z[:, self.own], place[:, self.own]

    def forward(self, z, place):
        """Images (n G, C, H, W) in normalised units, and their labels (n G,).

        Image i G + g is the i-th one of generator g.
        """
        n, G, _ = z.shape
        labels = self.classes[self.own].T.gather(0, place).flatten()  # (n G,)

        places = torch.arange(self.classes.shape[1], device=z.device)
        onehot = (place.unsqueeze(2) == places).to(z.dtype)  # (n, G, n_labels)
        x = torch.cat([z, onehot], 2).transpose(0, 1)  # (G, n, latent + n_labels)
        x = torch.bmm(x, self.dense)  # (G, n, C_0 side^2)
        x = x.transpose(0, 1).reshape(n, -1, self.side, self.side)  # (n, G C_0, side, side)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.bn0(x), 0.2)

        for weight, bn in zip(self.convs, self.bns, strict=True):
            x = F.interpolate(x, scale_factor=2)
            x = F.conv2d(x, weight, padding=1, groups=G)  # (n, G C_i, 2^i side, 2^i side)
            x = F.leaky_relu(bn(x), 0.2)

        x = torch.tanh(F.conv2d(x, self.last, self.bias, padding=1, groups=G))  # (n, G C, H, W)
        x = self.bn_last(x) * self.scale.view(-1, 1, 1)
        x = x.reshape(n * G, -1, *x.shape[2:])
        return x.contiguous(memory_format=torch.channels_last), labels

    def take_part(self, own):
        """An ensemble of the generators of a slice, with a copy of their weights."""
        state = {}
        for name, tensor in self.state_dict().items():
            if tensor.ndim:  # all but the BatchNorms' counters
                tensor = torch.cat(tensor.chunk(len(self.dense))[own])
            state[name] = tensor
        part = Ensemble(self.sizes, own)
        part.load_state_dict(state)
        return part.to(self.dense.device, memory_format=torch.channels_last)

    def freeze(self, source):
        """Prepare to sample only: no gradients, and no call changes the running moments.

        Args:
            source: whose moments the BatchNorms use, "batch" or "running".
        """
        self.requires_grad_(False)
        self.train(source == "batch")
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.track_running_stats = source == "running"  # False in train mode: no updates
        return self


# Moments
@contextlib.contextmanager
def watch_batchnorm(teacher, n_generators, args, example=None):
    """Context with a function that runs the teacher and measures its BatchNorms' inputs.

    The function takes images (N, C, H, W), of which image i G + g is of generator g. It returns

    - logits (N, K);
    - moments (2, P, C): mean - running_mean (as a difference it is exact where both are large) and
      biased variance, of each generator's images (P = G) or with --pool 1 of all (P = 1), one
      layer's channels beside the other's;
    - running_var (C,) of the layers;
    - sizes: the layers' numbers of channels, which add up to C.

    Where the moments are of all images, BatchNorms are fused as far as the network allows, which
    some images `example` (N, C, H, W) decide; a line says what is not fused. Without an example it
    is not verified that the fused network is the teacher.
    """
    P = 1 if args.pool == 1 else n_generators
    bn_moments = kernels.bn_moments if args.fused else kernels.bn_moments_ref

    def measure(x, running_mean):
        n = len(x) // P
        x = x.reshape(n, P * x.shape[1], *x.shape[2:])  # (n, P C_l, H, W): parts as channels
        mean, var = bn_moments(x, running_mean.repeat(P))
        return mean.view(P, -1), var.view(P, -1)

    def observe(x):
        logits, found = watched(x)
        moments = found.moments.view(2, P, -1)  # fused layers have (2, C)
        return logits.float(), moments, found.running_var, found.sizes

    with fail_in_one_line("the teacher's BatchNorms cannot be measured", "take another network"):
        if args.fused and P == 1:  # measured in the pass of BatchNorm, addition and activation
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fuse_batchnorm: ")  # the reason is printed below
                watched = kernels.fuse_batchnorm(teacher, example)
        else:
            watched = kernels.hook_batchnorm(teacher, moments=measure)
        if example is not None:
            parts = example[:1].expand(P, *example.shape[1:])
            with torch.no_grad():
                _, found = watched(parts)
            if not found.sizes:
                watched.close()
                raise ValueError("none of them runs")
    if watched.reason:
        print(f"teacher: {watched.reason}")
    try:
        yield observe
    finally:
        watched.close()


def pool_moments(moments):
    """Moments (2, P, C) of equally large parts -> (2, 1, C) of all, by the law of total variance.

    mean = avg_p mean_p,   var = avg_p var_p + Var_p mean_p
    """
    mean, var = moments.mean(1)
    between = moments[0].var(0, unbiased=False)
    return torch.stack([mean, var + between]).unsqueeze(1)


# Losses
def inceptionism_loss(logits, labels):
    """CE(T(x), y): the teacher must see the class that the generator was asked for."""
    return F.cross_entropy(logits, labels)


def compute_distance(moments, running_var, sizes, args):
    """Sum over layers of d(moments, stored moments), mean over the P parts; 0 for no layers.

    d by --moments, where mean, var are the batch's, running_mean, running_var the layer's:

        l2:        ||mean - running_mean||_2 + ||var - running_var||_2
        relative:  the same, divided by ||sqrt(running_var)||_2 and ||running_var||_2
        kl:        mean over channels of KL(N(mean, var) || N(running_mean, running_var)), 1e-5
                   added to both variances

    Args:
        moments, running_var, sizes: of `watch_batchnorm`.
    """
    if not sizes:
        return 0.0
    P = moments.shape[1]
    moment_distance = kernels.moment_distance if args.fused else kernels.moment_distance_ref
    moments = moments.flatten(1).contiguous()  # (2, P C)
    return moment_distance(moments, running_var.repeat(P), sizes * P, form=args.moments) / P


def moment_loss(moments, running_var, sizes, args):
    """R(x): distance of the moments of T's BatchNorm inputs from those that T stored.

        R = 1/G sum_g sum_{l <= L - k} d(mean_gl, var_gl) + sum_{l > L - k} d(mean_l, var_l)

    mean_gl, var_gl are the moments of generator g's images in layer l, mean_l, var_l those of all
    generators' images, k = round(pool L), and d as in `compute_distance`. One class cannot have
    the moments of all classes, in the last layers least: hence the second sum. With all layers
    pooled, generators share out the styles (one makes blobs, one bricks); with none, they make
    strokes of no class.

    Args:
        moments, running_var, sizes: of `watch_batchnorm`.
    """
    n_own = len(sizes) - round(args.pool * len(sizes))  # L - k
    c = sum(sizes[:n_own])  # channels of these layers
    pooled = pool_moments(moments)
    own_loss = compute_distance(moments[:, :, :c], running_var[:c], sizes[:n_own], args)
    pooled_loss = compute_distance(pooled[:, :, c:], running_var[c:], sizes[n_own:], args)
    return own_loss + pooled_loss


def distillation_loss(t_logits, s_logits, args):
    """L_S: tau^2 KL(softmax(t_logits / tau) || softmax(s_logits / tau)), mean over the batch."""
    kl_divergence = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    tau = args.temperature
    return tau**2 * kl_divergence(t_logits, s_logits, tau)


# Steps
def generator_step(ensemble, observe, optimizer, args):
    """One step of all generators on L_G, on one pass through the teacher.

    With --pool 0 each generator learns exactly as if it were alone.

    Args:
        ensemble: in train mode.
        observe: of `watch_batchnorm`.

    Returns:
        (3,): cross-entropy, moment loss, share of images in which the teacher sees the wanted
        class. Nothing waits for the device.
    """
    with autocast(ensemble.dense.device.type, args.bf16):
        z, place = ensemble.sample_inputs(args.batch_size // args.generators)
        x, labels = ensemble(z, place)  # (N, C, H, W), (N,)
        logits, moments, running_var, sizes = observe(x)
    ce = inceptionism_loss(logits, labels)
    bn_loss = moment_loss(moments, running_var, sizes, args)
    loss = ce + args.alpha_bn * bn_loss

    # Cross-entropy and own moments are means over the P generators. Times P, each generator gets
    # the gradient of its own loss, as if it trained alone. A common factor would cancel in Adam,
    # but for its eps. With --pool 1 there is one part, so P is 1.
    P = moments.shape[1]
    optimizer.zero_grad()
    (P * loss).backward()
    optimizer.step()

    hits = (logits.argmax(1) == labels).float().mean()
    return torch.stack([ce.detach(), bn_loss.detach(), hits])


def student_step(student, teacher, ensemble, optimizer, args):
    """One step of the student on L_S, on fresh images of the frozen ensemble; returns L_S ()."""
    with autocast(ensemble.dense.device.type, args.bf16):
        with torch.no_grad():
            z, place = ensemble.sample_inputs(args.student_batch // args.generators)
            x, _ = ensemble(z, place)  # (N, C, H, W)
            x = augment(x, shift=args.shift, cut=args.cut)
            t_logits = teacher(x)  # (N, K)
        loss = distillation_loss(t_logits, student(x), args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# The two stages
def train_generators(ensemble, teacher, optimizer, run, done):
    """Stage 1: train this process's generators together.

    The host waits for the device twenty times, for a row of metrics and a checkpoint.

    Args:
        ensemble, teacher: networks; the teacher is frozen.
        optimizer: the ensemble's.
        run: RunFolder.
        done: steps that a continued run has behind it.
    """
    args = run.args
    device = ensemble.dense.device
    lr = optimizer.param_groups[0]["lr"]  # a tensor, which a captured step reads
    steps = torch.arange(args.steps, dtype=torch.float32, device=device)
    rates = args.lr_generator * (1 + torch.cos(math.pi / args.steps * steps)) / 2  # (steps,)
    ends = {args.steps * (i + 1) // 20 for i in range(20)}
    sums = torch.zeros(3, device=device)  # since the last row, which was written after step `start`
    start = done
    hidden = None  # tqdm hides the bar where there is no terminal
    if run.rank > 0:
        hidden = True
    bar = tqdm(total=args.steps, initial=done, disable=hidden, mininterval=0.5, desc="generators")

    example = sample_example(ensemble.sizes, device)
    with watch_batchnorm(teacher, len(ensemble.dense), args, example) as observe:

        def train_once():
            sums.add_(generator_step(ensemble, observe, optimizer, args))

        run_step = kernels.CapturedStep(train_once, enabled=args.graph and device.type == "cuda")
        for step in range(done, args.steps):
            lr.copy_(rates[step])
            run_step()
            bar.update()
            if step + 1 not in ends:
                continue

            ce, bn_loss, hits = (sums / (step + 1 - start)).tolist()
            sums.zero_()
            start = step + 1
            row = {"step": start, "loss/ce": ce, "loss/bn": bn_loss, "eval/hits": 100 * hits}
            run.show(bar, row)
            run.save_checkpoint(
                {
                    "step": start,
                    "ensemble": ensemble.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )
    bar.close()


class Networks(NamedTuple):
    """The networks of stage 2."""

    student: nn.Module
    teacher: nn.Module
    """Frozen."""
    ensemble: Ensemble
    """Frozen."""


def train_student(networks, optimizer, test, run, done):
    """Stage 2: distil the teacher on fresh images. The host waits for the device once an epoch.

    Args:
        networks: Networks.
        optimizer: the student's.
        test: (images, labels, NetworkInfo) for `evaluate`, or None.
        run: RunFolder.
        done: epochs that a continued run has behind it.
    """
    args = run.args
    student, teacher, ensemble = networks
    device = ensemble.dense.device
    lr = optimizer.param_groups[0]["lr"]
    loss_sum = torch.zeros((), device=device)  # of an epoch

    def train_once():
        loss_sum.add_(student_step(student, teacher, ensemble, optimizer, args))

    run_step = kernels.CapturedStep(train_once, enabled=args.graph and device.type == "cuda")
    total = args.epochs * args.iterations
    initial = done * args.iterations
    bar = tqdm(total=total, initial=initial, disable=None, mininterval=0.5, desc="student")

    for epoch in range(done, args.epochs):
        lr.fill_(args.lr_student * decay_by_cosine(epoch, args.epochs))
        for _ in range(args.iterations):
            run_step()
            bar.update()

        row = {"epoch": epoch + 1, "loss/student": loss_sum.item() / args.iterations}
        loss_sum.zero_()
        if test is not None:
            row["eval/acc"] = evaluate(student, *test)
        run.show(bar, row)
        run.save_checkpoint(
            {
                "epoch": epoch + 1,
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
        )
    bar.close()


# Several processes
def gather_ensemble(part, slices_by_rank, rank):
    """The whole ensemble, on every process, out of the parts that the processes hold.

    It is the last thing that the processes do together.

    Args:
        part: this process's generators.
        slices_by_rank: slices of the generators that each process holds.
        rank: of this process.
    """
    if len(slices_by_rank) == 1:
        return part

    device = part.dense.device
    states = []
    for r, own in enumerate(slices_by_rank):
        held = part if r == rank else Ensemble(part.sizes, own).to(device)
        state = {name: tensor.contiguous() for name, tensor in held.state_dict().items()}
        for tensor in state.values():
            dist.broadcast(tensor, r)
        states.append(state)
    dist.destroy_process_group()

    joined = {}
    for name, tensor in states[0].items():
        if tensor.ndim:  # all but the BatchNorms' counters
            tensor = torch.cat([state[name] for state in states])
        joined[name] = tensor
    whole = Ensemble(part.sizes)
    whole.load_state_dict(joined)
    return whole.to(device, memory_format=torch.channels_last)


# Evaluation
@torch.no_grad()
def sample_classes(ensemble, n_images, n):
    """Equally many images of each class, or of the first n_images classes one.

    Args:
        ensemble: frozen.
        n_images: in all, at most.
        n: images that each generator makes at once; in train mode they share their moments.

    Returns:
        (classes, images of a class, C, H, W) on the CPU.
    """
    n_classes = min(n_images, int(ensemble.classes.max()) + 1)
    n_each = n_images // n_classes
    kept = [[] for _ in range(n_classes)]
    while min(len(images) for images in kept) < n_each:
        z, place = ensemble.sample_inputs(n)
        images, labels = ensemble(z, place)
        for x, k in zip(images.float().cpu(), labels.tolist(), strict=True):
            if k < n_classes and len(kept[k]) < n_each:
                kept[k].append(x)
    return torch.stack([torch.stack(images) for images in kept])


@torch.no_grad()
def measure_spread(network, classes):
    """Mean distance of two images of one class: of their pixels, and of their last features.

    Args:
        network: in eval mode. Features are what enters its last linear layer, or its logits if it
            has none.
        classes: [(n, C, H, W), …], images of one class each, at least two, in normalised units.

    >>> pair = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    >>> measure_spread(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), [pair, pair])
    {'pixels': 2.0, 'features': 2.0}
    """
    features = compute_last_features(network, classes)
    if features is None:
        features = [network(x) for x in classes]
    spread = {}
    for name, groups in (("pixels", classes), ("features", features)):
        means = [torch.pdist(x.flatten(1).cpu()).mean() for x in groups]
        spread[name] = torch.stack(means).double().mean().item()
    return spread


@torch.no_grad()
def measure_images(teacher, images):
    """How good the generators' images (K, n, C, H, W) of `sample_classes` are.

    Returns:
        hits: percent of images in which the teacher sees the wanted class; diversity: see
        `measure_spread`.
    """
    n_hits = 0
    for k, x in enumerate(images):
        n_hits += (teacher(x).argmax(1) == k).sum().item()
    hits = 100 * n_hits / (images.shape[0] * images.shape[1])
    return dict(hits=hits, diversity=measure_spread(teacher, images))


def measure_real_classes(student, teacher, test, n):
    """How the student and real images do by class; test: as for `train_student`.

    Returns:
        class_accuracies: percent of each class; real_diversity: `measure_spread` of n real images
        of each class.
    """
    images, labels, info = test
    accuracies = []
    classes = []
    for k in labels.unique().tolist():
        of_class = images[labels == k]
        accuracies.append(evaluate(student, of_class, labels[labels == k], info))
        classes.append(normalise(of_class[:n], info))
    return dict(class_accuracies=accuracies, real_diversity=measure_spread(teacher, classes))


# Files
def draw_samples(images, info, file):
    """Write a PNG with a row for each class of images (classes, n, C, H, W), normalised."""
    n_classes, n = images.shape[:2]
    pixels = to_uint8(images.flatten(0, 1), info)
    labels = torch.arange(n_classes).repeat_interleave(n)
    draw_classes(pixels, labels, [], file, columns=n, rows=n_classes)


def save_ensemble(ensemble, info, run):
    """Write ensemble.pt: the weights, and what it takes to sample; info: NetworkInfo of T."""
    saved = dict(format=1, method="generative_ensemble", teacher=info.name)
    saved["shape"] = asdict(ensemble.sizes)
    saved["mean"] = list(info.mean)
    saved["std"] = list(info.std)
    saved["bn"] = run.args.bn
    saved["n"] = run.args.student_batch // run.args.generators  # images of a generator at once
    saved["state_dict"] = ensemble.state_dict()
    with run.write_file("ensemble.pt") as file:
        torch.save(saved, file)


def load_ensemble(path, device):
    """Read an ensemble.pt; refuse what does not belong together.

    Returns:
        The Ensemble, the NetworkInfo of the teacher whose images it makes, and the file's dict.
    """
    saved = read_checkpoint(path)
    advice = "pass the ensemble.pt that a run wrote"
    with fail_in_one_line(f"{path}: no ensemble of this script", advice):
        sizes = Sizes(**saved["shape"])
        classes = sorted(k for group in sizes.groups for k in group)
        if classes != list(range(len(classes))):
            raise ValueError("its generators do not make each class once")
        if not sizes.channels == len(saved["mean"]) == len(saved["std"]):
            raise ValueError("its channels do not fit its mean and std")
        if saved["bn"] not in ("batch", "running") or saved["n"] < 1:
            raise ValueError("it does not say how to sample from it")
        ensemble = Ensemble(sizes)
        ensemble.load_state_dict(saved["state_dict"])
        if not all(tensor.isfinite().all() for tensor in ensemble.state_dict().values()):
            raise ValueError("its weights are not finite")
        known = dict(num_classes=len(classes), image_size=sizes.image_size)
        info = make_info(saved["teacher"], known, dict(mean=saved["mean"], std=saved["std"]))
    return ensemble.to(device, memory_format=torch.channels_last), info, saved


def write_samples(args):
    """--sample: a picture of a saved ensemble, which needs no teacher for it."""
    seed_everything(args.seed)
    out = Path(args.out)
    path = args.ensemble or out / "ensemble.pt"
    ensemble, info, saved = load_ensemble(path, choose_device(args.device))
    ensemble.freeze(saved["bn"])
    images = sample_classes(ensemble, args.sample, saved["n"])
    with fail_in_one_line(f"--out {out} cannot be used", "pass another folder"):
        out.mkdir(parents=True, exist_ok=True)
        with open_atomically(out / "samples.png") as file:
            draw_samples(images, info, file)
    print(f"wrote samples.png into {out}")


# Main
def fit_sizes(args, info):
    """args with the number of generators and up-samplings that the teacher's images allow."""
    stages = args.stages
    if not stages:
        while info.image_size % 2 ** (stages + 1) == 0 and info.image_size >> stages > 8:
            stages += 1
    return replace(args, generators=min(args.generators, info.num_classes), stages=stages)


def load_trained_ensemble(args, info, device):
    """The Ensemble of --ensemble, and args with its sizes and mode; info is of the teacher."""
    ensemble, its_info, saved = load_ensemble(args.ensemble, device)
    for name in ("num_classes", "image_size", "mean", "std"):
        its = getattr(its_info, name)
        ours = getattr(info, name)
        if its != ours:
            problem = f"its {name} is {its}, the teacher's {ours}"
            fail(f"--ensemble {args.ensemble}: {problem}; train one for this teacher")
    sizes = ensemble.sizes
    args = replace(
        args,
        generators=len(sizes.groups),
        latent=sizes.latent,
        width=sizes.width,
        stages=sizes.stages,
        bn=saved["bn"],
    )
    return ensemble, args


def build_ensemble(args, info):
    """Fresh generators for the teacher that info describes; each has its share of the classes."""
    shares = split_evenly(info.num_classes, args.generators)
    sizes = Sizes(
        groups=[list(range(share.start, share.stop)) for share in shares],
        latent=args.latent,
        width=args.width,
        stages=args.stages,
        channels=info.channels,
        image_size=info.image_size,
    )
    return Ensemble(sizes).initialise()


def check_fit(args, teacher, info, world):
    """Refuse options that do not fit the teacher or the number of processes, `world`."""
    layers = [m for m in teacher.modules() if isinstance(m, _BatchNorm)]
    has_moments = any(layer.running_mean is not None for layer in layers)
    if not args.ensemble and not has_moments:
        problem = "no BatchNorm with running statistics, and these are what is matched"
        fail(f"--teacher {args.teacher}: {problem}; take another network")

    if args.ensemble and world > 1:
        fail("--ensemble: there is nothing to share out; run it without torchrun")
    if args.generators < world:
        fail(f"--generators {args.generators}: fewer than {world} processes; start fewer")
    n_halvings = (info.image_size & -info.image_size).bit_length() - 1  # how often 2 divides it
    most = min(n_halvings, args.width)
    if args.stages > most:
        problem = f"{info.image_size} pixels and a width of {args.width} allow {most} at most"
        fail(f"--stages {args.stages}: {problem}; lower it")
    if args.batch_size < args.generators:
        problem = f"fewer than {args.generators} generators"
        fail(f"--batch-size {args.batch_size}: {problem}; raise it, or lower --generators")
    if args.student_batch < args.generators:
        problem = f"fewer than {args.generators} generators"
        fail(f"--student-batch {args.student_batch}: {problem}; raise it, or lower --generators")


def main(args):
    """One run: generators of a teacher, then a student of theirs."""
    if args.sample:
        write_samples(args)
        return
    device = choose_device(args.device)
    rank, world = join_processes(device)
    seed_everything(args.seed)

    # The teacher, and the real images that measure (never train) the student.
    teacher, info = load_teacher(args, device)
    dataset, real = load_real_images(info, args, device)
    test = None
    result = dict(teacher_accuracy=info.accuracy, student_accuracy=None)
    if real is not None:
        test = (*real, info)
        result["teacher_accuracy"] = evaluate(teacher, *test)

    # The final options, the student, and the generators, of which each process trains its own.
    if args.ensemble:
        ensemble, args = load_trained_ensemble(args, info, device)
    else:
        args = fit_sizes(args, info)
    if args.smoke:
        args = shrink(args)
    check_fit(args, teacher, info, world)
    student, student_info = load_student(args.student, info, device)
    slices_by_rank = split_evenly(args.generators, world)
    if not args.ensemble:
        ensemble = build_ensemble(args, info).take_part(slices_by_rank[rank])
        ensemble.to(device, memory_format=torch.channels_last)
    generator_optimizer = make_optimizer("adam", ensemble, args.lr_generator)
    student_optimizer = make_optimizer(args.optimizer, student, args.lr_student)

    clears = () if args.ensemble else ("ensemble.pt",)
    run = RunFolder(args, device, clears=clears, rank=rank)
    if rank == 0:
        names = f"{info.name}, {student_info.name}"
        print(f"{names}: {args.generators} generators, {device}, fused={args.fused}")
    steps_done = 0
    epochs_done = 0
    with run.open_checkpoint() as saved:
        if saved is not None and "step" in saved:  # in stage 1
            steps_done = saved["step"]
            ensemble.load_state_dict(saved["ensemble"])
            restore_optimizer(generator_optimizer, saved["optimizer"])
        elif saved is not None:  # in stage 2: stage 1 left ensemble.pt
            steps_done = args.steps
            epochs_done = saved["epoch"]
            student.load_state_dict(saved["student"])
            restore_optimizer(student_optimizer, saved["optimizer"])
            if not args.ensemble:
                whole, _, _ = load_ensemble(run.out / "ensemble.pt", device)
                ensemble = whole.take_part(slices_by_rank[rank])

    if not args.ensemble:
        train_generators(ensemble, teacher, generator_optimizer, run, steps_done)
        ensemble = gather_ensemble(ensemble, slices_by_rank, rank)
        if rank > 0:
            run.finish({"teacher": info.name})  # says that this process's folder is complete
            return
        save_ensemble(ensemble, info, run)
    ensemble.freeze(args.bn)
    networks = Networks(student, teacher, ensemble)
    train_student(networks, student_optimizer, test, run, epochs_done)

    # What came of both.
    n = args.student_batch // args.generators
    with run.write_file("samples.png") as file:
        draw_samples(sample_classes(ensemble, 100, n), info, file)
    n_parameters = sum(p.numel() for p in ensemble.parameters())
    result["generator_parameters"] = n_parameters // args.generators
    K = info.num_classes
    n_images = max(2 * K, min(20 * K, 1000))
    images = sample_classes(ensemble, n_images, n).to(device)  # (K, n_images // K, C, H, W)
    result.update(measure_images(teacher, images))
    if test is not None:
        result.update(measure_real_classes(student, teacher, test, images.shape[1]))
        result["student_accuracy"] = evaluate(student, *test)
        accuracies = [result["teacher_accuracy"], result["student_accuracy"]]
        print("teacher {:.2f} %, student {:.2f} %".format(*accuracies))
    student_info = replace(student_info, dataset=dataset, accuracy=result["student_accuracy"])
    run.save_student(student, student_info, "generative_ensemble")
    names = dict(teacher=info.name, student=student_info.name, dataset=dataset)
    run.finish(names | result)


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
