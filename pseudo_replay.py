"""Generative pseudo replay: a student learns from generated images, and a VAE replays older ones.

PRE-DFKD: Binici, Aggarwal, Pham, Leman, Mitra, "Robust and Resource-Efficient Data-Free Knowledge
Distillation by Generative Pseudo Replay", AAAI 2022, arXiv:2201.03019. A generator G makes images
of which the teacher T is sure, which cover all classes, and on which the student S disagrees with
T; S learns T's logits on them. S forgets what G no longer makes, so a VAE (encoder E, decoder M)
learns the images of the past, and M's images join S's batches:

    L_G = alpha_onehot CE(t, argmax t) + alpha_entropy sum_k pbar_k log10 pbar_k
          - alpha_act mean|f| + 1 - J(t, s).clamp(0, 1),  x = G(z), z ~ N(0, I), f: features of T
    L_S = mean|S(x) - T(x)|,    x: images of G and of the memory together
    L_M = mean|x' - x| + mean|T(x') - T(x)| + alpha_kl KL(E(x) || N(0, I)),  x' = M(z'), z' ~ E(x)

--memory bank stores batches in place of the VAE (MB-DFKD, arXiv:2108.05698, as re-implemented by
others); --memory none replays nothing. Run `python pseudo_replay.py`. It writes student.pt,
curve.png, samples.png, metrics.jsonl, result.json, args.json and checkpoint.pt into --out. Metrics:
`loss/generator`, `loss/student`, `loss/memory`, each of the last step of an inner iteration, a mean
over the epoch; `eval/acc`, percent of the real test images. Measured, one CPU thread: MNIST,
LeNet-5 to its half, mean over 40 epochs 91.97 ± 2.10 % without memory, 90.32 ± 2.46 % with the VAE
(3 seeds). It has not run on a GPU. We follow the released code where it differs from the paper
(--reconstruction), from the textbook's J (--divergence), or seems to have a bug (--latent-tuning).
Ours: presets `mnist` and `digits`; the teacher answers once a batch; bf16 activations on a GPU.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm
from tqdm import tqdm

import kernels
from harness.data import evaluate, load_real_images
from harness.errors import fail
from harness.images import to_uint8
from harness.load import choose_preset_by_dataset, load_student, load_teacher
from harness.networks import find_linear_layers, list_learning
from harness.pictures import draw_curves, draw_rows
from harness.run import (
    MethodOptions,
    RunFolder,
    autocast,
    check_at_least,
    choose_device,
    decay_by_cosine,
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
    """Shipped or ImageNet name, a checkpoint of teacher.py (.pt), or file.py:factory (paper:
    ResNet-34; `teacher.py --arch resnet34_cifar` trains one)."""
    student: str = "resnet18_cifar"
    """Network to train: a name of harness/networks.py, a shipped name, or file.py:factory."""
    out: str = "runs/pseudo_replay/default"
    """Output folder."""

    # Method
    memory: Literal["vae", "bank", "none"] = "vae"
    """What replays the past: a VAE (PRE-DFKD), stored batches (MB-DFKD), or nothing."""
    epochs: int = 400
    """Epochs; the student is tested after each (released code)."""
    iterations: int = 36
    """Inner iterations of an epoch (released code)."""
    n_student_iter: int = 10
    """Student steps of an inner iteration, after one generator step (released code: kd_iter)."""
    n_memory_iter: int = 4
    """VAE steps of an inner iteration: one after each of its first student steps (released), so
    never more than those."""
    batch_size: int = 1024
    """Novel images of a step (released code); the VAE learns from the first half of them."""
    memory_share: float = 1 / 9
    """Share of memory images in the student's batch (released code: 128 of 1152)."""
    latent: int = 1000
    """Dimensions of the generator's noise and of the VAE's latents (released code: latent_dim)."""
    width: int = 128
    """Channels of generator, decoder and encoder (released code)."""
    lr_generator: float = 0.02
    """Adam's learning rate of the generator (released code: lr_G)."""
    lr_memory: float = 5e-4
    """Adam's learning rate of encoder and decoder (released code: lr_G / 40)."""
    lr_student: float = 0.1
    """The student's initial learning rate (released code: lr_S); a cosine over the epochs."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The student's: sgd with momentum 0.9 and weight decay 5e-4 (released code; MNIST: adam)."""
    alpha_onehot: float = 1.0
    """Weight of the cross-entropy to the teacher's own top class (released flag: oh)."""
    alpha_entropy: float = 5.0
    """Weight of the batch's negative class entropy in base 10 (released flag: ie)."""
    alpha_act: float = 0.1
    """Weight of the activation term (released flag: a); 0: no such term."""
    alpha_kl: float = 1e-5
    """Weight of the VAE's prior (released code)."""
    divergence: Literal["released", "js"] = "released"
    """Disagreement J: as the released code computes it, or the textbook's Jensen-Shannon."""
    reconstruction: Literal["pixel+logit", "logit", "pixel"] = "pixel+logit"
    """What the VAE reconstructs: pixels and the teacher's logits (released code), or one of them.
    The paper speaks of the teacher's response in place of pixels."""
    latent_tuning: Literal["leaky", "clean", "off"] = "leaky"
    """Class-balanced inference of memory images: leaky (released code) also trains the decoder for
    the balance of its images, clean moves the latents alone, off leaves them as drawn."""
    bank_capacity: int = 10
    """Batches that the bank holds; the oldest is overwritten (re-implementation of MB-DFKD)."""
    bank_every: int = 5
    """Epochs between two additions to the bank (re-implementation of MB-DFKD)."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, self, "alpha_onehot", "alpha_entropy", "alpha_act", "alpha_kl")
        check_at_least(0, self, "memory_share")
        check_at_least(1, self, "epochs", "iterations", "n_student_iter", "n_memory_iter")
        check_at_least(1, self, "latent", "bank_capacity", "bank_every")
        check_at_least(2, self, "width")
        check_at_least(4, self, "batch_size")
        check_at_least(1e-12, self, "lr_generator", "lr_memory", "lr_student")
        if self.memory_share >= 1:
            problem = "the student needs novel images too; pass a share below 1"
            raise ValueError(f"--memory-share {self.memory_share}: {problem}")
        if self.memory != "none" and not 2 <= self.n_memory <= self.batch_size:
            expected = "expected 2 to --batch-size, or --memory none"
            raise ValueError(f"--memory-share: {self.n_memory} images a batch; {expected}")

    @property
    def n_memory(self):
        """Memory images in the student's batch."""
        return round(self.batch_size * self.memory_share / (1 - self.memory_share))


RELEASED = Args()  # the values as released for CIFAR-100, with a smaller teacher
OURS = replace(  # how we chose these values: results/NOTES.md
    RELEASED,
    student="lenet5_half",
    batch_size=128,
    width=16,
    latent=64,
    optimizer="adam",
    lr_student=4e-3,
    alpha_act=0.0,
    alpha_kl=1e-3,
)
PRESETS = {
    "cifar10": RELEASED,
    "mnist": replace(OURS, setting="mnist", teacher="mnist-lenet5", epochs=40, iterations=20),
    "digits": replace(OURS, setting="digits", teacher="digits-lenet5", epochs=20, iterations=10),
}


def choose_preset(teacher, dataset):
    """The preset of a run without --setting."""
    return choose_preset_by_dataset(PRESETS, teacher, dataset)


def shrink(args):
    """A run of seconds, for --smoke: 16 novel images and 2 of the memory."""
    return replace(
        args, epochs=min(args.epochs, 2), iterations=2, batch_size=16, memory_share=1 / 9
    )


# Networks: generator, decoder, encoder
BN_EPS = 0.8  # eps of each BatchNorm before a LeakyReLU (released code)


def initialise(network):
    """The released initialisation: weights U(-0.08, 0.08), zero biases."""
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.uniform_(m.weight, -0.08, 0.08)
            nn.init.zeros_(m.bias)


class Generator(nn.Module):
    """Latents (N, latent) to images (N, C, size, size): G with spectral norm, the VAE's M without.

    8,423,939 parameters at width 128, latent 1000 and 3 x 32 x 32. The last BatchNorm gives the
    images mean 0 and deviation 1, and the networks take them as they are, as normalised images.
    """

    def __init__(self, latent, width, channels, size, spectral):
        super().__init__()
        self.shape = (width, size // 4, size // 4)
        self.linear = nn.Linear(latent, math.prod(self.shape))
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width, BN_EPS)
        self.conv2 = nn.Conv2d(width, width // 2, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width // 2, BN_EPS)
        self.conv3 = nn.Conv2d(width // 2, channels, 3, 1, 1)
        self.bn3 = nn.BatchNorm2d(channels, affine=False)
        initialise(self)
        if spectral:
            for conv in (self.conv1, self.conv2, self.conv3):
                spectral_norm(conv)

    def forward(self, z):
        x = self.linear(z).view(-1, *self.shape)  # (N, width, size/4, size/4)
        x = self.bn0(x.contiguous(memory_format=torch.channels_last))

        x = F.interpolate(x, scale_factor=2)  # (N, width, size/2, size/2)
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)

        x = F.interpolate(x, scale_factor=2)  # (N, width, size, size)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)  # (N, width/2, size, size)

        return self.bn3(torch.tanh(self.conv3(x)))  # (N, C, size, size)


class Encoder(nn.Module):
    """E: images (N, C, size, size) to mean and log-variance of their latents, (N, latent) each.

    4,321,872 parameters at width 128, latent 1000 and 3 x 32 x 32.
    """

    def __init__(self, latent, width, channels, size):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width // 2, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width // 2, BN_EPS)
        self.conv2 = nn.Conv2d(width // 2, width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width, BN_EPS)
        self.conv3 = nn.Conv2d(width, width, 3, 2, 1)
        self.bn3 = nn.BatchNorm2d(width)
        last_size = (size // 2 + 1) // 2 // 2  # after half the size, stride 2, half the size
        self.mean = nn.Linear(width * last_size**2, latent)
        self.log_variance = nn.Linear(width * last_size**2, latent)
        initialise(self)

    def forward(self, x):
        x = F.normalize(x, dim=2)  # over the height of the image, as released, perhaps by accident
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)  # (N, width/2, size, size)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)  # (N, width, size, size)

        x = F.interpolate(x, scale_factor=0.5)  # (N, width, size/2, size/2)
        x = self.bn3(self.conv3(x))  # (N, width, size/4, size/4)
        x = F.interpolate(x, scale_factor=0.5).flatten(1)  # (N, width * (size/8)^2)

        with torch.autocast(x.device.type, enabled=False):  # what follows goes through exp
            x = x.to(self.mean.weight.dtype)
            return self.mean(x), self.log_variance(x)


# Memories
class VaeMemory(nn.Module):
    """PRE-DFKD's memory: encoder E and decoder M, which learn the images of the past."""

    def __init__(self, args, info):
        super().__init__()
        sizes = (args.latent, args.width, info.channels, info.image_size)
        self.encoder = Encoder(*sizes)
        self.decoder = Generator(*sizes, spectral=False)


class BankMemory(nn.Module):
    """MB-DFKD's memory: the last `bank_capacity` batches of images that it was given."""

    def __init__(self, args, info):
        super().__init__()
        self.capacity = args.bank_capacity
        self.batch_size = args.n_memory
        shape = info.image_shape
        self.register_buffer("images", torch.zeros(self.capacity * self.batch_size, *shape))
        self.register_buffer("n_batches", torch.zeros(()))  # on the device: a CUDA graph reads it
        newest = torch.zeros(self.batch_size, *shape)  # what `store` takes; training writes it
        self.register_buffer("newest", newest, persistent=False)

    def store(self, number):
        """Keep `newest` as batch `number`, counted from 0; it overwrites the oldest one."""
        start = number % self.capacity * self.batch_size
        self.images[start : start + self.batch_size] = self.newest
        self.n_batches.fill_(min(number + 1, self.capacity))

    def draw_batch(self):
        """A stored batch (n, C, H, W), drawn uniformly."""
        device = self.images.device
        number = (torch.rand(1, device=device) * self.n_batches).long()
        return self.images[number * self.batch_size + torch.arange(self.batch_size, device=device)]


def make_memory(args, info):
    """The memory that --memory names; info: NetworkInfo of the teacher."""
    if args.memory == "vae":
        return VaeMemory(args, info)
    if args.memory == "bank":
        return BankMemory(args, info)
    return nn.Module()  # remembers nothing


def count_memory_bytes(memory):
    """Bytes that a memory holds: the bank's images, or all weights and buffers of the VAE."""
    if isinstance(memory, BankMemory):
        return memory.images.nbytes
    return sum(x.nbytes for x in memory.state_dict().values())


@dataclass
class Networks:
    """The networks of a run. Those that learn are in train mode, but for a few marked lines."""

    teacher: nn.Module
    """Frozen, in eval mode."""
    student: nn.Module
    generator: Generator
    memory: nn.Module
    """VaeMemory, BankMemory, or an empty module."""


def make_networks(teacher, student, info, args, device):
    """Networks with a fresh generator and memory; info: NetworkInfo of the teacher."""
    sizes = (args.latent, args.width, info.channels, info.image_size)
    generator = Generator(*sizes, spectral=True).to(device, memory_format=torch.channels_last)
    memory = make_memory(args, info).to(device, memory_format=torch.channels_last)
    return Networks(teacher, student, generator, memory)


# Losses of the generator
def onehot_loss(t_logits):
    """CE(t, argmax t), "predictive entropy": low where the teacher is sure, whatever the class."""
    return F.cross_entropy(t_logits, t_logits.argmax(1))


def entropy_loss(t_logits):
    """sum_k pbar_k log10 pbar_k, "categorical entropy": low where the batch covers the classes.

    pbar is the mean of the teacher's probabilities over the batch. Written out:

        pbar = t_logits.softmax(1).mean(0)  # (K,)
        loss = (pbar * pbar.log10()).sum()

    The loss lies between -log10 K (all classes are equally frequent) and 0. We compute log pbar
    from logits, because it stays finite where pbar is 0.
    """
    log_pbar = t_logits.log_softmax(1).logsumexp(0) - math.log(len(t_logits))  # (K,)
    return (log_pbar.exp() * log_pbar).sum() / math.log(10)


def activation_loss(features):
    """-mean|f|: low where the teacher's features are large, as they are on real images."""
    return -features.float().abs().mean()  # in fp32: autocast would leave it in bf16


J_TEMPERATURE = 3.0  # tau of J (released code)


def disagreement(t_logits, s_logits, divergence, temperature, fused):
    """J(t, s): how far the student's beliefs are from the teacher's.

    With the temperature tau, P = softmax(t / tau), Q = softmax(s / tau) and M = (P + Q) / 2, the
    textbook ("js") has

        J = 1/2 KL(P || M) + 1/2 KL(Q || M),    a mean over the batch

    The released code takes KL(M || P) and KL(M || Q), clamps P, Q and M to [0.01, 0.99], and
    averages over batch *and* classes. Its J is at most 0.161 with 10 classes and 0.016 with 100.
    The gradient reaches the images through the student alone.
    """
    t_logits = t_logits.detach()
    if divergence == "released":
        n_classes = t_logits.shape[1]
        return kernels.js_released(t_logits, s_logits, temperature) / n_classes
    js_divergence = kernels.js_divergence if fused else kernels.js_divergence_ref
    return js_divergence(t_logits, s_logits, temperature)


def generator_loss(t_logits, features, s_logits, args):
    """L_G of teacher and student on a batch of the generator's images.

    Args:
        t_logits, s_logits: (N, K) of teacher and student.
        features: the teacher's (N, D), or None of a teacher without a fully connected layer.
    """
    loss = args.alpha_onehot * onehot_loss(t_logits) + args.alpha_entropy * entropy_loss(t_logits)
    if args.alpha_act:
        loss = loss + args.alpha_act * activation_loss(features)
    j = disagreement(t_logits, s_logits, args.divergence, J_TEMPERATURE, args.fused)
    return loss + 1 - j.clamp(0, 1)


# Loss of the student
def student_loss(t_logits, s_logits):
    """L_S = mean|S(x) - T(x)| over batch and classes, of raw logits."""
    return F.l1_loss(s_logits, t_logits)


# Losses of the VAE
def reconstruction_loss(x, rebuilt, t_logits, rebuilt_t_logits, reconstruction):
    """mean|x' - x| + mean|T(x') - T(x)|, or one of the two terms as `reconstruction` says.

    The second term makes the VAE aware of the teacher: a small change of a synthetic image's pixels
    often changes the teacher's answer, unlike a real image's (paper, figure 3).
    """
    pixel_loss = F.l1_loss(rebuilt, x)
    logit_loss = F.l1_loss(rebuilt_t_logits, t_logits)
    if reconstruction == "pixel":
        return pixel_loss
    if reconstruction == "logit":
        return logit_loss
    return pixel_loss + logit_loss


def prior_loss(mean, log_variance):
    """KL(E(x) || N(0, I)) with E(x) = N(mean, exp(log_variance)): a sum over the latents.

    mean, log_variance: (N, latent). The result is a mean over the batch.
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


def memory_loss(memory, teacher, x, t_logits, args):
    """L_M of the VAE (algorithm 1 of the paper).

    Args:
        memory: VaeMemory.
        teacher: network.
        x, t_logits: images (N, C, H, W) and the teacher's logits of them (N, K), without gradient.
    """
    mean, log_variance = memory.encoder(x)  # (N, latent) each
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)  # (N, latent)
    rebuilt = memory.decoder(z)  # (N, C, H, W)
    loss = reconstruction_loss(x, rebuilt, t_logits, teacher(rebuilt), args.reconstruction)
    return loss + args.alpha_kl * prior_loss(mean, log_variance)


# Class-balanced inference of memory images
LATENT_LR = 0.02  # of the latents' one step (released code: lr_G)


def latent_loss(z, t_logits, args):
    """Low where the images of latents z (n, latent) cover the classes and z is like N(0, I):

        alpha_onehot CE(t, argmax t) + alpha_entropy sum_k pbar_k log10 pbar_k
        + mean_d (var z_d - 1)^2 + mean_d (mean z_d)^2,    t = T(M(z))

    with variance and mean of each latent dimension d over the n latents.
    """
    loss = args.alpha_onehot * onehot_loss(t_logits) + args.alpha_entropy * entropy_loss(t_logits)
    return loss + (z.var(0) - 1).square().mean() + z.mean(0).square().mean()


def sample_noise(n, latent, device):
    """z ~ N(0, I), (n, latent)."""
    return torch.randn(n, latent, device=device)


def infer_images(decoder, teacher, args, fills_gradients=False):
    """Images of the past, (n_memory, C, H, W) without gradient (algorithm 2 of the paper).

    The latents take one step of a fresh Adam down `latent_loss`.

    Args:
        decoder: M, in train or eval mode as the caller has set it.
        teacher: network.
        fills_gradients: whether the decoder's weights get the gradient of that loss too.
    """
    device = decoder.linear.weight.device
    z = sample_noise(args.n_memory, args.latent, device)  # (n, latent)

    if args.latent_tuning != "off":
        z.requires_grad_()
        with autocast(device.type, args.bf16):
            loss = latent_loss(z, teacher(decoder(z)), args)
        leaves = [z, *decoder.parameters()] if fills_gradients else [z]
        loss.backward(inputs=leaves)
        # Adam's first step is the gradient over its size: each latent moves by about LATENT_LR.
        z = z.detach() - LATENT_LR * z.grad / (z.grad.abs() + 1e-8)

    with torch.no_grad(), autocast(device.type, args.bf16):
        return decoder(z)


# One inner iteration
METRICS = ("loss/generator", "loss/student", "loss/memory")


def forward_with_features(teacher, x):
    """Logits (N, K), and the features (N, D) that enter the first fully connected layer.

    The features are None of a teacher without such a layer.
    """
    inputs = []  # what enters each fully connected layer, in the order in which they run

    def keep_input(layer, arguments):
        inputs.append(arguments[0])

    layers = find_linear_layers(teacher)
    hooks = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    logits = teacher(x)
    for hook in hooks:
        hook.remove()
    features = inputs[0] if inputs else None
    return logits, features


def update(network, optimizer, loss):
    """One step of `network` down its loss. No gradient of any other network is formed."""
    optimizer.zero_grad()
    loss.backward(inputs=list_learning(network))
    optimizer.step()


def train_iteration(networks, optimizers, args, has_past=True):
    """1 generator step, then n_student_iter student steps.

    A VAE step follows each of the first n_memory_iter student steps.

    Args:
        networks: Networks.
        optimizers: {"generator": …, "student": …, and of a VAE "memory": …}.
        has_past: whether the VAE has been trained, or the bank filled, in an earlier iteration.

    Returns:
        (3,) of METRICS: L_G, L_S and L_M (0 without a VAE), each of its last step. Nothing waits
        for the device.
    """
    teacher = networks.teacher
    student = networks.student
    generator = networks.generator
    memory = networks.memory
    device = generator.linear.weight.device

    # Generator. The student's BatchNorms are in train mode and count its images too, as released.
    with autocast(device.type, args.bf16):
        x = generator(sample_noise(args.batch_size, args.latent, device))  # (N, C, H, W)
        t_logits, features = forward_with_features(teacher, x)  # (N, K), (N, D)
        loss_g = generator_loss(t_logits, features, student(x), args)
    update(generator, optimizers["generator"], loss_g)

    loss_m = torch.zeros((), device=device)
    for i in range(args.n_student_iter):
        # Novel images, and images of the past: the student learns from both in one batch.
        with torch.no_grad(), autocast(device.type, args.bf16):
            novel = generator(sample_noise(args.batch_size, args.latent, device))  # (N, C, H, W)
        x = novel
        if args.memory == "vae":
            # The released code replays from the very first step on, when the decoder is still
            # untrained, so has_past does not matter here. It also has the decoder in eval mode:
            # the student gets what running moments give.
            memory.decoder.eval()
            x = torch.cat([novel, infer_images(memory.decoder, teacher, args)])  # (N + n, C, H, W)
            memory.decoder.train()
        elif args.memory == "bank" and has_past:
            x = torch.cat([novel, memory.draw_batch()])  # (N + n, C, H, W)

        # Student
        with autocast(device.type, args.bf16):
            with torch.no_grad():
                t_logits = teacher(x)  # (N + n, K)
            loss_s = student_loss(t_logits, student(x))
        update(student, optimizers["student"], loss_s)

        # VAE
        if args.memory == "vae" and i < args.n_memory_iter:
            half = args.batch_size // 2
            vae_x = novel[:half]  # (N / 2, C, H, W)
            vae_t_logits = t_logits[:half]  # (N / 2, K)
            optimizers["memory"].zero_grad()
            if has_past:
                # The VAE also learns from images of its own, so that it does not forget either.
                # The released code leaks here: tuning their latents leaves the gradient of
                # `latent_loss` in the decoder's weights, and nothing clears it. The step below
                # applies it with L_M, so the decoder also learns to make balanced images. (The
                # same happens where the student replays; the zero_grad above clears that.)
                leaks = args.latent_tuning == "leaky"
                own = infer_images(memory.decoder, teacher, args, leaks)  # (n, C, H, W)
                with torch.no_grad(), autocast(device.type, args.bf16):
                    own_t_logits = teacher(own)  # (n, K)
                vae_x = torch.cat([vae_x, own])  # (N / 2 + n, C, H, W)
                vae_t_logits = torch.cat([vae_t_logits, own_t_logits])
            with autocast(device.type, args.bf16):
                loss_m = memory_loss(memory, teacher, vae_x, vae_t_logits, args)
            loss_m.backward()
            optimizers["memory"].step()

    if args.memory == "bank":
        memory.newest.copy_(novel[: args.n_memory])
    return torch.stack([loss_g.detach(), loss_s.detach(), loss_m.detach()])


# Training
def make_optimizers(networks, args):
    """An optimiser for each network that learns, by its name."""
    optimizers = {
        "generator": make_optimizer("adam", networks.generator, args.lr_generator),
        "student": make_optimizer(args.optimizer, networks.student, args.lr_student),
    }
    if args.memory == "vae":
        optimizers["memory"] = make_optimizer("adam", networks.memory, args.lr_memory)
    return optimizers


def collect_state(networks, optimizers, epoch):
    """What a checkpoint holds; epoch: how many are done."""
    return dict(
        epoch=epoch,
        student=networks.student.state_dict(),
        generator=networks.generator.state_dict(),
        memory=networks.memory.state_dict(),
        optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    )


def restore_state(networks, optimizers, saved):
    """Put the networks and optimisers back to what `collect_state` returned."""
    networks.student.load_state_dict(saved["student"])
    networks.generator.load_state_dict(saved["generator"])
    networks.memory.load_state_dict(saved["memory"])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, saved["optimizers"][name])


def train(networks, info, test, run):
    """Train for all epochs, with a row of metrics after each.

    The host waits for the device at an epoch's end only.

    Args:
        networks: Networks.
        info: NetworkInfo of the teacher.
        test: real images and labels that measure the student, or None.
        run: RunFolder.
    """
    args = run.args
    optimizers = make_optimizers(networks, args)
    epochs_done = 0
    with run.open_checkpoint() as saved:
        if saved is not None:
            restore_state(networks, optimizers, saved)
            epochs_done = saved["epoch"]

    sums = torch.zeros(len(METRICS), device=run.device)  # of the losses, since the last row

    def iterate():
        sums.add_(train_iteration(networks, optimizers, args))

    run_step = kernels.CapturedStep(iterate, enabled=args.graph and run.device == "cuda")
    save_every = max(1, args.epochs // 20)
    total = args.epochs * args.iterations
    initial = epochs_done * args.iterations
    bar = tqdm(total=total, initial=initial, disable=None, mininterval=0.5)

    for epoch in range(epochs_done, args.epochs):
        student_lr = args.lr_student * decay_by_cosine(epoch, args.epochs)
        optimizers["student"].param_groups[0]["lr"].fill_(student_lr)

        for i in range(args.iterations):
            # As released, the VAE learns from no images of its own in the very first iteration. The
            # bank is empty throughout epoch 0, because an epoch's end fills it.
            has_past = epoch > 0
            if args.memory != "bank" and i > 0:
                has_past = True
            if has_past:
                run_step()
            else:
                sums.add_(train_iteration(networks, optimizers, args, has_past=False))
            bar.update()

        if args.memory == "bank" and epoch % args.bank_every == 0:
            networks.memory.store(epoch // args.bank_every)

        row = {"epoch": epoch + 1}
        row.update(zip(METRICS, (sums / args.iterations).tolist(), strict=True))
        if args.memory != "vae":
            del row["loss/memory"]
        sums.zero_()
        if test is not None:
            row["eval/acc"] = evaluate(networks.student, *test, info)
        run.show(bar, row)

        if (epoch + 1) % save_every == 0 or epoch + 1 == args.epochs:
            run.save_checkpoint(collect_state(networks, optimizers, epoch + 1))
    bar.close()


# Evaluation
def summarise_accuracies(accuracies):
    """Statistics of the test accuracies of all epochs, the first one included, in percent.

    Without validation data nobody knows the best epoch, so what counts is the accuracy of an epoch
    taken at random: its mean and spread (the paper's mu and sigma^2 of S_acc). The tables of the
    literature call "sigma^2" what looks like a standard deviation; hence we give both.

    Args:
        accuracies: test accuracy after each epoch; at least one.

    Returns:
        {"mean", "std" and "variance" of the population, "best", "final", and "last_quarter", the
        mean of the last quarter of the epochs}, rounded to three digits.
    """
    last_quarter = accuracies[-max(1, len(accuracies) // 4) :]
    summary = {
        "mean": statistics.mean(accuracies),
        "std": statistics.pstdev(accuracies),
        "variance": statistics.pvariance(accuracies),
        "best": max(accuracies),
        "final": accuracies[-1],
        "last_quarter": statistics.mean(last_quarter),
    }
    return {name: round(value, 3) for name, value in summary.items()}


@torch.no_grad()
def draw_samples(networks, info, run):
    """Write samples.png: four rows of ten images of the generator, and four of the memory.

    Both with running moments. The student gets the memory's images so, but the generator's with
    those of the batch.
    """
    args = run.args
    networks.generator.eval()
    networks.memory.eval()
    z = sample_noise(80, args.latent, run.device)
    shown = {"generator": networks.generator(z[:40])}
    if args.memory == "vae":
        shown["memory"] = networks.memory.decoder(z[40:])
    if args.memory == "bank":
        n_stored = int(networks.memory.n_batches) * args.n_memory
        shown["memory"] = networks.memory.images[: min(n_stored, 40)]

    rows = []
    for title, x in shown.items():
        for images in to_uint8(x, info).split(10):
            rows.append((title, images))
    with run.write_file("samples.png") as file:
        draw_rows(rows, file)


def main(args):
    if args.smoke:
        args = shrink(args)
    device = choose_device(args.device)
    seed_everything(args.seed)

    # The real images measure the student; they never train it.
    teacher, info = load_teacher(args, device)
    dataset, test = load_real_images(info, args, device)
    teacher_accuracy = info.accuracy
    if test is not None:
        teacher_accuracy = evaluate(teacher, *test, info)
    student, student_info = load_student(args.student, info, device)
    if args.alpha_act and not find_linear_layers(teacher):
        problem = "no fully connected layer, hence no features for the activation term"
        fail(f"--teacher {args.teacher}: {problem}; pass --alpha-act 0")

    networks = make_networks(teacher, student, info, args, device)

    run = RunFolder(args, device)
    names = f"{info.name}, {student_info.name}, memory {args.memory}"
    print(f"{names}: {args.epochs} x {args.iterations}, {device}, fused={args.fused}")
    train(networks, info, test, run)

    result = dict(
        teacher=info.name,
        student=student_info.name,
        dataset=dataset,
        teacher_accuracy=teacher_accuracy,
        student_accuracy=None,
        memory=args.memory,
        memory_bytes=count_memory_bytes(networks.memory),
    )
    if test is not None:
        accuracies = run.column("eval/acc")
        summary = summarise_accuracies(accuracies)
        result.update(summary, student_accuracy=summary["final"])
        figures = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in summary.items()]
        print(f"teacher {teacher_accuracy:.2f}, student: {', '.join(figures)}")
        with run.write_file("curve.png") as file:
            draw_curves({f"memory {args.memory}": [accuracies]}, file)

    draw_samples(networks, info, run)
    student_info = replace(student_info, dataset=dataset, accuracy=result["student_accuracy"])
    run.save_student(student, student_info, "pseudo_replay")
    run.finish(result)


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
