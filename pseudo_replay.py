"""Generative pseudo replay (PRE-DFKD): a student learns from invented images, a VAE replays those of the past.

Binici, Aggarwal, Pham, Leman, Mitra, "Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative
Pseudo Replay", AAAI 2022, arXiv:2201.03019. A generator G makes images that the teacher T is sure of, that cover all
classes and on which the student S disagrees; S learns T's logits on them. As G moves on, S forgets; so a VAE, encoder
E and decoder M, models the images of the past, with T as its judge of likeness, and M's samples join S's batches:

    L_G = oh CE(t, argmax t) + ie sum_k pbar_k log10 pbar_k - a mean|f| + 1 - J(T, S),   x = G(z), z ~ N(0, I)
    L_S = mean |S(x) - T(x)| over batch and classes,   x: novel images and memory images together
    L_M = mean|x' - x| + mean|T(x') - T(x)| + kl KL(E(x) || N(0, I)),   x' = M(z'), z' ~ E(x)

with t, f the teacher's logits and features, pbar its mean probabilities, J `disagreement`. Inner iteration: a step of
G, ten of S, one of E and M after each of the first four. `--memory bank` (MB-DFKD, arXiv:2108.05698, as re-implemented
by others) keeps batches in place of the VAE, `--memory none` nothing. As released; what else there is, is an option:
- `--reconstruction`: the paper speaks of the teacher's response in place of pixels, the code adds the two;
- `--latent-tuning`: before M's images are used, one step moves its latents to where they cover the classes; the code
  leaves that step's gradient in M's weights and applies it with L_M (leaky);
- `--divergence js`: the textbook's; the released J is clamped, reversed, averaged over classes too: below 0.17.
Ours: no gradient where none is used, a frozen teacher, asked once for each batch, one Adam for E and M (the same as
two of one rate); `digits` and `mnist` drop the activation term, train S by Adam, have own sizes (results/README.md).
Run `python pseudo_replay.py [--memory vae|bank|none]`. It writes into --out: student.pt, curve.png (accuracy of every
epoch), samples.png (generator beside memory), result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics, means of
an epoch over each iteration's last steps: `loss/generator`, `loss/student`, `loss/memory`; `eval/acc` in percent.
`python pseudo_replay.py --compare RUN RUN …` writes compare.json and compare.png: the arms' curves and statistics.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.utils import spectral_norm
from tqdm import tqdm

import kernels
from kernels.contract import RunOptions, check_options, fail, load_network, load_student, load_teacher
from kernels.data import FILES, real_images
from kernels.figures import accuracy_statistics, compare_runs, draw_curves, draw_sheets
from kernels.folder import RunFolder
from kernels.js_divergence import js_released


@dataclass
class Args(RunOptions):
    # Run settings.
    teacher: str = "digits-lenet5"
    """Shipped name (teachers/index.json), a teacher.pt, or file.py:factory."""
    student: str = "auto"
    """lenet5-half or the like, a network of teacher.py, a shipped name, file.py:factory; auto: as --setting has it."""
    dataset: str = "auto"
    """Real test images: digits | mnist | cifar10 | cifar100 | none; auto: the teacher's. Training never sees them."""
    out: str = "runs/pseudo_replay/default"
    """Output folder."""
    smoke: bool = False
    """A run of seconds: 2 epochs of 2 iterations of 16 images."""
    fused: bool = True
    """Use the fused op of kernels/ (--divergence js); --no-fused runs the plain reference."""
    graph: bool = True
    """Replay the inner iteration as one CUDA graph on a GPU."""
    compare: tuple[str, ...] = ()
    """Compare these finished runs (their --out folders) by memory instead of training."""

    # Method; see SETTINGS. None: as --setting has it.
    memory: str = "vae"
    """vae (PRE-DFKD) | bank (MB-DFKD) | none."""
    setting: str = "auto"
    """A row of SETTINGS: cifar10 | mnist | digits; auto: by the data set."""
    epochs: int | None = None
    """Epochs; the student is tested after each."""
    iterations: int | None = None
    """Inner iterations of an epoch (released: 36); no data pass exists."""
    batch_size: int | None = None
    """Novel images of a step."""
    memory_share: float | None = None
    """Share of memory images in the student's batch (released: 128 of 1152): two images to half of the batch."""
    width: int | None = None
    """Channels of generator, decoder and encoder (released: 128)."""
    latent: int | None = None
    """Dimensions of the noise and of the VAE's latents (released: 1000)."""
    lr_generator: float | None = None
    """Adam's learning rate of the generator."""
    lr_memory: float | None = None
    """Adam's learning rate of encoder and decoder."""
    lr_student: float | None = None
    """The student's initial learning rate; a cosine over the epochs ends it."""
    optimizer: str | None = None
    """The student's: sgd (momentum 0.9, weight decay 5e-4) | adam."""
    alpha_onehot: float | None = None
    """Weight of the cross-entropy to the teacher's own top class (released flag: oh)."""
    alpha_entropy: float | None = None
    """Weight of the batch's negative class entropy, in bans (released flag: ie)."""
    alpha_act: float | None = None
    """Weight of the activation term (flag: a) of what enters the first fully connected layer; 0: no such term."""
    alpha_kl: float | None = None
    """Weight of the VAE's prior."""
    divergence: str | None = None
    """Disagreement J of the generator: released | js (textbook, nats, mean over the batch)."""
    reconstruction: str | None = None
    """What the VAE reconstructs: pixel+logit (released) | logit | feature (of the teacher) | pixel."""
    latent_tuning: str | None = None
    """Class-balanced inference of the memory: leaky (released) | clean | off."""
    bank_capacity: int | None = None
    """Batches of memory images that the bank holds, the oldest overwritten."""
    bank_every: int | None = None
    """Epochs between two additions to the bank."""


# fmt: off
PAPER = dict(student="resnet18_cifar", epochs=400, iterations=36, batch_size=1024, memory_share=1 / 9, width=128,
             latent=1000, n_student_iter=10, n_memory_iter=4, lr_generator=0.02, lr_memory=5e-4, lr_student=0.1,
             optimizer="sgd", alpha_onehot=1.0, alpha_entropy=5.0, alpha_act=0.1, alpha_kl=1e-5, bank_every=5,
             divergence="released", reconstruction="pixel+logit", latent_tuning="leaky", bank_capacity=10)
OURS = dict(PAPER, student="lenet5_half", batch_size=128, width=16, latent=64, optimizer="adam", lr_student=4e-3,
            alpha_act=0.0, alpha_kl=1e-3)  # how these were chosen: results/README.md
SETTINGS = {
    "cifar10": PAPER,  # CIFAR-100 and Tiny-ImageNet too
    "mnist": dict(OURS, epochs=40, iterations=20),
    "digits": dict(OURS, epochs=20, iterations=10),
}
# fmt: on
LATENT_LR = 0.02  # of the one Adam step on the memory's latents


# Copied from teacher.py
def normalise(x, mean, std):
    """uint8 (N, C, H, W) -> float32 in units of the data set's standard deviation; mean, std: C numbers in [0, 1]."""
    mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return x.float() * (1 / (255 * std)) - mean / std


# Networks: the paper's pairs, its generators and its encoder. All others are factories, of teacher.py or of the user.
# Copied from teacher.py
class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling for 32 px (62,006 parameters at 3 channels); `width` 0.5 is its half.

    Groups are the two convolutions after ReLU; `features` is the 120-vector that PRE-DFKD's activation term reads.
    """

    def __init__(self, num_classes=10, in_channels=3, width=1.0):
        super().__init__()
        c1, c2, c3, f1 = (int(c * width) for c in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, f1)
        self.fc2 = nn.Linear(f1, num_classes)

    def forward_groups(self, x):
        a1 = F.relu(self.conv1(x))  # (N, 6, 28, 28)
        a2 = F.relu(self.conv2(F.max_pool2d(a1, 2)))  # (N, 16, 10, 10)
        features = F.relu(self.conv3(F.max_pool2d(a2, 2))).flatten(1)  # (N, 120)
        return self.fc2(F.relu(self.fc1(features))), (a1, a2)

    def forward(self, x):
        return self.forward_groups(x)[0]


# Copied from deepinversion.py
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


# Copied from deepinversion.py
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


BLOCKS = {"resnet18_cifar": (2, 2, 2, 2), "resnet34_cifar": (3, 4, 6, 3)}
NETWORKS = {name: partial(ResNet, blocks, (64, 128, 256, 512), "B") for name, blocks in BLOCKS.items()}
NETWORKS |= {"lenet5": LeNet5, "lenet5_half": partial(LeNet5, width=0.5)}
load = partial(load_network, networks=NETWORKS)


def reset(model):
    """The released initialisation: U(-0.08, 0.08), zero biases."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.uniform_(m.weight, -0.08, 0.08)
            nn.init.zeros_(m.bias)


class Generator(nn.Module):
    """Latents (N, latent) to normalised images (N, C, size, size); the memory's decoder has no spectral norm.

    The decoder has 8,423,939 parameters at width 128, latent 1000 and 3 x 32 x 32; eps 0.8 is as released. Images have
    mean 0 and deviation 1 and enter the networks as they are.
    """

    def __init__(self, latent, width, channels, size, spectral):
        super().__init__()
        self.shape = (width, size // 4, size // 4)
        self.linear = nn.Linear(latent, math.prod(self.shape))
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width, 0.8)
        self.conv2, self.bn2 = nn.Conv2d(width, width // 2, 3, 1, 1), nn.BatchNorm2d(width // 2, 0.8)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, channels, 3, 1, 1), nn.BatchNorm2d(channels, affine=False)
        reset(self)
        for conv in (self.conv1, self.conv2, self.conv3) if spectral else ():
            spectral_norm(conv)

    def forward(self, z):
        x = self.bn0(self.linear(z).view(-1, *self.shape).contiguous(memory_format=torch.channels_last))
        x = F.leaky_relu(self.bn1(self.conv1(F.interpolate(x, scale_factor=2))), 0.2)  # (N, width, size/2, size/2)
        x = F.leaky_relu(self.bn2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)  # (N, width/2, size, size)
        return self.bn3(torch.tanh(self.conv3(x)))


class Encoder(nn.Module):
    """Images (N, C, size, size) to mean and log-variance (N, latent): 4,321,872 parameters at the released sizes."""

    def __init__(self, latent, width, channels, size):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width // 2, 3, 1, 1), nn.BatchNorm2d(width // 2, 0.8)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width, 3, 1, 1), nn.BatchNorm2d(width, 0.8)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width)
        n_features = width * ((size // 2 + 1) // 2 // 2) ** 2
        self.mean, self.log_variance = nn.Linear(n_features, latent), nn.Linear(n_features, latent)
        reset(self)

    def forward(self, x):
        x = F.normalize(x, dim=2)  # released: over the height of the image, perhaps by accident
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        x = self.bn3(self.conv3(F.interpolate(x, scale_factor=0.5)))  # (N, width, size/4, size/4)
        x = F.interpolate(x, scale_factor=0.5).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # these go through exp
            return tuple(layer(x.to(layer.weight.dtype)) for layer in (self.mean, self.log_variance))


# Losses
def logits_and_features(model, x):
    """Logits (N, K) and what enters the first fully connected layer; None of a network without one."""
    found, linear = [], [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: found.extend(inputs[:1])) for m in linear]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), found[0] if found else None


def onehot_loss(t_logits):
    """CE(t, argmax t): the teacher is to be sure, whatever the class ("predictive entropy")."""
    return F.cross_entropy(t_logits, t_logits.argmax(1))


def entropy_loss(t_logits):
    """sum_k pbar_k log10 pbar_k in [-log10 K, 0]: the batch is to cover the classes ("categorical entropy")."""
    log_p = torch.log_softmax(t_logits, 1).logsumexp(0) - math.log(len(t_logits))  # (K,), finite where pbar is 0
    return (log_p.exp() * log_p).sum() / math.log(10)


def disagreement(t_logits, s_logits, divergence, fused, temperature=3.0):
    """J of teacher and student; no gradient to the teacher's side.

    Released: 1/2 KL(M || P) + 1/2 KL(M || Q) of probabilities clamped to [0.01, 0.99], after M was formed; a mean over
    batch *and* classes: at most 0.161 at K = 10, 0.016 at K = 100.
    """
    t_logits = t_logits.detach()
    if divergence == "js":
        return (kernels.js_divergence if fused else kernels.js_divergence_ref)(t_logits, s_logits, temperature)
    return js_released(t_logits, s_logits, temperature) / t_logits.shape[1]


def generator_loss(t_logits, features, s_logits, setting):
    """L_G of teacher and student on a batch of the generator's images."""
    loss = setting["alpha_onehot"] * onehot_loss(t_logits) + setting["alpha_entropy"] * entropy_loss(t_logits)
    loss = loss - setting["alpha_act"] * features.abs().mean() if setting["alpha_act"] else loss
    return loss + 1 - disagreement(t_logits, s_logits, setting["divergence"], setting["fused"]).clamp(0, 1)


def prior_loss(mean, log_variance):
    """KL of the encoder's N(mean, exp(log_variance)) from N(0, I): a sum over latents, a mean over the batch."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


def reconstruction_loss(x, answers, rebuilt, rebuilt_answers, reconstruction):
    """Mean distances |x' - x| of what --reconstruction names; answers: the teacher's logits and features."""
    pairs = zip((x, *answers), (rebuilt, *rebuilt_answers), strict=True)
    terms = dict(zip(("pixel", "logit", "feature"), pairs, strict=True))
    return sum(F.l1_loss(*terms[name]) for name in reconstruction.split("+"))


# One inner iteration
class Distiller(nn.Module):
    """All networks with their optimisers; all that training changes is a parameter or a buffer here."""

    def __init__(self, teacher, student, setting, args):
        super().__init__()
        self.teacher, self.setting, cuda = teacher, setting, args.device == "cuda"  # the teacher is not a submodule
        shape = (setting["latent"], setting["width"], *teacher.shape[:2])
        self.student, self.generator = student.model, Generator(*shape, spectral=True)
        if setting["memory"] == "vae":
            self.memory = nn.ModuleDict(dict(encoder=Encoder(*shape), decoder=Generator(*shape, spectral=False)))
        if setting["memory"] == "bank":
            n, channels, size = setting["n_memory"], *teacher.shape[:2]
            self.register_buffer("bank", torch.zeros(setting["bank_capacity"] * n, channels, size, size))
            self.register_buffer("novel", torch.zeros(n, channels, size, size))  # of the last student step
        self.register_buffer("n_banked", torch.zeros(()))  # batches that the bank holds
        self.register_buffer("epoch", torch.zeros(()))  # epochs done
        self.register_buffer("sums", torch.zeros(3))  # losses of generator, student, memory since the last row
        self.to(args.device, memory_format=torch.channels_last)
        self.amp = partial(torch.autocast, args.device, torch.bfloat16, args.bf16 and cuda, cache_enabled=False)
        self.optimizers = {}
        for name in ("generator", "student", "memory")[: 3 if setting["memory"] == "vae" else 2]:
            lr = torch.tensor(setting[f"lr_{name}"], device=args.device)  # where a graph can read what it becomes
            make = partial(torch.optim.Adam, capturable=cuda)
            if name == "student" and setting["optimizer"] == "sgd":
                make = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
            self.optimizers[name] = make(getattr(self, name).parameters(), lr, fused=True)

    def noise(self, n):
        return torch.randn(n, self.setting["latent"], device=self.sums.device)

    def novel_images(self):
        with torch.no_grad(), self.amp():
            return self.generator(self.noise(self.setting["batch_size"]))

    def update(self, name, loss, zero=True):
        """Step on the gradient of one network's weights, of no other."""
        parameters, optimizer = list(getattr(self, name).parameters()), self.optimizers[name]
        if zero:
            optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        return loss.detach()


def generator_step(state):
    """One step of G; the student's BatchNorms are in train mode and take its images in (as released)."""
    with state.amp():
        x = state.generator(state.noise(state.setting["batch_size"]))  # (N, C, H, W)
        answers = logits_and_features(state.teacher.model, x)
        loss = generator_loss(*answers, state.student(x), state.setting)
    return state.update("generator", loss)


def decoded_memory(state, leak=False):
    """Images of the memory's decoder, in the mode it is in, from class-balanced latents (Algorithm 2).

    The latents take Adam's first step, g / (|g| + eps) times its rate, towards images that cover the classes and their
    own mean 0 and variance 1. leak: its gradient stays in the decoder's weights.
    """
    setting, decoder, z = state.setting, state.memory["decoder"], state.noise(state.setting["n_memory"])
    if setting["latent_tuning"] != "off":
        z.requires_grad_()
        with state.amp():
            t_logits, _ = logits_and_features(state.teacher.model, decoder(z))
        loss = setting["alpha_onehot"] * onehot_loss(t_logits) + setting["alpha_entropy"] * entropy_loss(t_logits)
        loss = loss + (z.var(0) - 1).square().mean() + z.mean(0).square().mean()
        loss.backward(inputs=[z, *decoder.parameters()] if leak else [z])
        z = z.detach() - LATENT_LR * z.grad / (z.grad.abs() + 1e-8)
    with torch.no_grad(), state.amp():
        return decoder(z)


def memory_images(state, has_past):
    """What joins the student's batch: () of an empty memory, else one batch (n, C, H, W) in a tuple."""
    if state.setting["memory"] == "vae":
        state.memory.eval()
        x = decoded_memory(state)
        state.memory.train()
        return (x,)
    if state.setting["memory"] == "bank" and has_past:
        batch, n = (torch.rand(1, device=state.bank.device) * state.n_banked).long(), state.setting["n_memory"]
        return (state.bank[batch * n + torch.arange(n, device=state.bank.device)],)
    return ()


def student_step(state, x):
    """One step towards the teacher's logits; returns loss and the teacher's answers."""
    with state.amp():
        with torch.no_grad():
            answers = logits_and_features(state.teacher.model, x)
        loss = F.l1_loss(state.student(x), answers[0])
    return state.update("student", loss), answers


def memory_step(state, x, answers, has_past):
    """One step of the VAE on the first half of the novel images and, if it has a past, on images of its own."""
    setting, n = state.setting, state.setting["batch_size"] // 2
    x, answers = x[:n], [a if a is None else a[:n] for a in answers]
    state.optimizers["memory"].zero_grad()
    if has_past:
        own = decoded_memory(state, leak=setting["latent_tuning"] == "leaky")  # (n_memory, C, H, W)
        with torch.no_grad(), state.amp():
            own_answers = logits_and_features(state.teacher.model, own)
        x = torch.cat([x, own])  # (N / 2 + n_memory, C, H, W)
        answers = [a if a is None else torch.cat([a, b]) for a, b in zip(answers, own_answers, strict=True)]
    with state.amp():
        mean, log_variance = state.memory["encoder"](x)  # (N, latent)
        rebuilt = state.memory["decoder"](mean + (log_variance / 2).exp() * torch.randn_like(mean))
        rebuilt_answers = logits_and_features(state.teacher.model, rebuilt)
        loss = reconstruction_loss(x, answers, rebuilt, rebuilt_answers, setting["reconstruction"])
        loss = loss + setting["alpha_kl"] * prior_loss(mean, log_variance)
    return state.update("memory", loss, zero=False)


def inner_iteration(state, has_past=True):
    """1 generator step, 10 student steps, a memory step after each of the first 4; has_past: of the memory."""
    setting, loss_m = state.setting, torch.zeros((), device=state.sums.device)
    loss_g = generator_step(state)
    for i in range(setting["n_student_iter"]):
        x = state.novel_images()  # (N, C, H, W)
        loss_s, answers = student_step(state, torch.cat([x, *memory_images(state, has_past)]))
        if setting["memory"] == "vae" and i < setting["n_memory_iter"]:
            loss_m = memory_step(state, x, answers, has_past)
    if setting["memory"] == "bank":
        state.novel.copy_(x[: setting["n_memory"]])
    state.sums += torch.stack([loss_g, loss_s, loss_m])  # the last step's of each


def end_epoch(state, epoch):
    """Count, and put the epoch's last novel images into the bank where it is time."""
    setting = state.setting
    if setting["memory"] == "bank" and epoch % setting["bank_every"] == 0:
        slot = epoch // setting["bank_every"] % setting["bank_capacity"]  # the oldest batch's, once all are full
        state.bank[slot * setting["n_memory"] :][: setting["n_memory"]] = state.novel
        state.n_banked += (state.n_banked < setting["bank_capacity"]).float()
    state.epoch += 1


def memory_bytes(state):
    """Bytes that the memory holds: the bank's images, or all weights and buffers of the VAE."""
    return sum(x.nbytes for name, x in state.state_dict().items() if name.startswith(("memory.", "bank")))


# Evaluation and files
# Copied from teacher.py
@torch.no_grad()
def evaluate(model, images, labels, mean, std, batch_size=500):
    """Top-1 accuracy in percent, eval mode. images: (N, C, H, W) uint8, labels: (N,)."""
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for i in range(0, len(images), batch_size):
        x = normalise(images[i : i + batch_size], mean, std).contiguous(memory_format=torch.channels_last)
        correct += (model(x).argmax(1) == labels[i : i + batch_size]).sum()
    model.train(was_training)
    return 100 * correct.item() / len(images)


class Run(RunFolder):
    def __init__(self, args, state):
        self.distiller = state
        super().__init__(args, state.setting, free=("graph", "compare"))

    def state(self):
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.distiller.optimizers.items()}
        return dict(networks=self.distiller.state_dict(), optimizers=optimizers)

    def restore(self, saved):
        self.distiller.load_state_dict(saved["networks"])
        for name, optimizer in self.distiller.optimizers.items():
            kernels.contract.restore_optimizer(optimizer, saved["optimizers"][name])
        if len(self.lines) != int(self.distiller.epoch):
            raise ValueError("its state does not belong together")

    def after_epoch(self, bar, test, iterations):
        """The host's only wait: losses, test accuracy, a row."""
        state, losses = self.distiller, (self.distiller.sums / iterations).tolist()
        row = dict(step=int(state.epoch)) | {f"loss/{k}": v for k, v in zip(state.optimizers, losses, strict=False)}
        if not all(math.isfinite(v) for v in row.values()):
            fail(f"the losses are not finite in epoch {row['step']}; lower --lr-student or --lr-generator")
        state.sums.zero_()
        self.show(bar, row | ({"eval/acc": evaluate(state.student, *test)} if test else {}))

    @torch.no_grad()
    def draw(self):
        """samples.png: 64 images of the generator beside 64 of the memory; curve.png."""
        state, teacher = self.distiller, self.distiller.teacher
        shown = {"generator": state.generator.eval()(state.noise(64))}
        if self.args.memory == "vae":
            shown["memory"] = state.memory["decoder"].eval()(state.noise(64))
        if self.args.memory == "bank" and state.n_banked:
            shown["memory"] = state.bank[: int(state.n_banked) * state.setting["n_memory"]]
        draw_sheets(shown, teacher.mean, teacher.std, self.out / "samples.png")
        if accuracies := self.column("eval/acc"):
            draw_curves({f"memory {self.args.memory}": [accuracies]}, self.out / "curve.png")


# Main
def choose_setting(args, dataset):
    """The row of SETTINGS with the command line's values over it."""
    name = args.setting if args.setting != "auto" else dataset if dataset in SETTINGS else "cifar10"
    setting = SETTINGS[name] | {k: v for k in PAPER if (v := getattr(args, k, None)) not in (None, "auto")}
    if args.smoke:
        setting.update(epochs=min(setting["epochs"], 2), iterations=2, batch_size=16)
    n_memory = round(setting["batch_size"] * setting["memory_share"] / (1 - setting["memory_share"]))
    return setting | dict(name=name, memory=args.memory, fused=args.fused, n_memory=n_memory)


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    least = dict(batch_size=4, width=2, lr_generator=1e-12, lr_memory=1e-12, lr_student=1e-12, memory_share=0)
    least |= dict.fromkeys(("epochs", "iterations", "latent", "bank_capacity", "bank_every"), 1)
    least |= dict.fromkeys(("seed", "image_size", "num_classes", *(k for k in PAPER if k.startswith("alpha"))), 0)
    choices = dict(dataset=("auto", "digits", *FILES, "none"), setting=("auto", *SETTINGS))
    choices |= dict(memory=("vae", "bank", "none"), optimizer=(None, "sgd", "adam"))
    choices |= dict(divergence=(None, "released", "js"), latent_tuning=(None, "leaky", "clean", "off"))
    check_options(args, least, choices | dict(reconstruction=(None, "pixel+logit", "logit", "feature", "pixel")))
    if (args.memory_share or 0) >= 1:
        fail(f"--memory-share {args.memory_share}: the student needs novel images too; pass a share below 1")


def main(args):
    check_args(args)
    if args.compare:
        return compare_runs(args.compare, "memory", args.out)
    kernels.contract.seed_everything(args.seed)

    # The teacher, the real images that measure (never train) the student, the student; has the teacher features?
    teacher = load_teacher(load, args)
    dataset, test = real_images(teacher, args)
    measures = dict(teacher_accuracy=teacher.accuracy, student_accuracy=None)
    if test:
        test = *test, teacher.mean, teacher.std
        measures["teacher_accuracy"] = evaluate(teacher.model, *test)
    setting = choose_setting(args, teacher.dataset if dataset == "none" else dataset)
    student = load_student(load, setting["student"], args, teacher)
    blank = torch.zeros(2, len(teacher.mean), teacher.image_size, teacher.image_size, device=args.device)
    if logits_and_features(teacher.model, blank)[1] is None:
        if args.alpha_act or "feature" in setting["reconstruction"]:
            fail(f"{args.teacher}: no fully connected layer, no features; use --alpha-act 0, --reconstruction logit")
        setting["alpha_act"] = 0.0
        print(f"{args.teacher}: no fully connected layer, so no activation term")
    if args.memory != "none" and not 2 <= setting["n_memory"] <= setting["batch_size"]:
        fail(f"--memory-share: {setting['n_memory']} images a batch; expected 2 to --batch-size, or --memory none")

    # Epochs; the host looks at the device between them only.
    state = Distiller(teacher, student, setting, args)
    run, epochs, iterations = Run(args, state), setting["epochs"], setting["iterations"]
    print(f"{teacher.name}, {student.name}: {epochs} x {iterations}, {args.memory}, {args.device}, fused={args.fused}")
    bar = tqdm(total=epochs * iterations, initial=int(state.epoch) * iterations, disable=None, mininterval=0.5)
    step = None
    for epoch in range(int(state.epoch), epochs):
        cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
        state.optimizers["student"].param_groups[0]["lr"].fill_(setting["lr_student"] * cosine)
        if not step or (epoch == 1 and args.memory == "bank"):  # which has something to replay from then on
            past = epoch > 0 or args.memory == "vae"
            step = kernels.Captured(partial(inner_iteration, state, past), args.graph and args.device == "cuda")
        for i in range(iterations):
            if epoch == i == 0:
                inner_iteration(state, has_past=False)
            else:
                step()
            bar.update()
        end_epoch(state, epoch)
        run.after_epoch(bar, test, iterations)
        if (epoch + 1) % max(1, epochs // 20) == 0 or epoch + 1 == epochs:
            run.save()
    bar.close()

    if test:
        measures |= accuracy_statistics(run.column("eval/acc"))
        measures["student_accuracy"] = measures["final"]
        print(", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in measures.items()))
    run.draw()
    run.save_student(student, teacher, "pseudo_replay", dataset, measures["student_accuracy"])
    measures |= dict(memory=args.memory, memory_bytes=memory_bytes(state))
    run.finish(dict(teacher=teacher.name, student=student.name, dataset=dataset) | measures)


if __name__ == "__main__":
    main(tyro.cli(Args))
