"""DeepInversion: class-conditional images from a trained network alone.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz, "Dreaming to Distill: Data-free Knowledge Transfer via
DeepInversion", CVPR 2020, arXiv:1912.08795. A batch of noise images is optimised until a frozen teacher assigns the
wanted classes and the moments of every BatchNorm input equal the running moments that the teacher stored in training.

    loss = CE(f(x'), y) + alpha_bn * R_bn(x') + alpha_tv_l2 * TV2(x') + alpha_tv_l1 * TV1(x') + alpha_l2 * R_l2(x')

where x' is what the teacher sees of x in this step: pooled in a low-resolution stage, rolled by a random offset,
mirrored at random; one draw for the whole batch (released code).

Where we differ from the paper or its released code:
- the teacher is frozen (no weight gradients) and each BatchNorm input is read once for its moments (`kernels/`);
- R_l2 is the mean over images of the image's norm for every data set (released CIFAR code: one norm of the batch);
- each stage hands on, and the run keeps, the *last* images. The released code keeps those of the lowest loss and never
  resets that minimum between stages: with two stages it returns the blurred low-resolution images, and the loss that
  it compares belongs to another random view, before the step. With the cosine the last images are settled;
- settings `cifar10` and `cifar10-long` are ours; classes that do not all fit a batch are drawn, not a fixed list;
- low-resolution stages pool the full image (as released); the paper up-samples a small one.
Measured: on `cifar10`, 100 images a seed, 3 seeds, a verifier of another architecture agrees on 97.7 ± 1.5 % (2 CPU
threads, 95 s, torch 2.13, commits a045d5f and 0083e38; `cifar10-long` 97.7 ± 0.6 %): results/inversion-*.json.
Run `python deepinversion.py [--teacher resnet50]`. It writes into --out: samples.png, images.npz (`images` uint8
(N, H, W, C), `labels` int64 (N,)), result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics: `loss/total`; its
unweighted terms `loss/ce` `loss/bn` `loss/tv_l2` `loss/tv_l1` `loss/l2`; `eval/teacher` percent of views on target.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from kernels import bn_moment_loss, bn_moment_loss_ref, total_variation, total_variation_ref
from kernels.contract import (
    check_options,
    fail,
    load_network,
    load_weights,
    one_line,
    ran_on,
    seed_everything,
    shipped,
    try_out,
)


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
    """Use the fused ops of kernels/; --no-fused runs the plain references."""
    bf16: bool = True
    """bfloat16 activations on a GPU (moments and images stay fp32)."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl; the host waits for the device then, and at checkpoints, only."""

    # Method. None: as --setting has it.
    setting: str = "auto"
    """A row of SETTINGS: cifar10 | cifar10-long | cifar10-released | mnist | digits | imagenet-0 | -1 | -2."""
    num_images: int = 0
    """Images to make, in batches; 0: one batch."""
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
    jitter: int | None = None
    """Largest roll in pixels at full resolution (released flag: jitter)."""
    flip: bool | None = None
    """Mirror the batch with probability 1/2."""
    clip: bool | None = None
    """Clip to the range of real pixels after each step, [-m/s, (1 - m)/s] per channel."""


# stages: (steps, pooling factor, jitter in pixels the teacher sees); warmup None: constant learning rate.
# fmt: off
BASE = dict(lr=0.3, betas=(0.5, 0.9), warmup=10, first_bn=1.0, alpha_tv_l1=0.0, alpha_l2=0.0, flip=True, clip=True)
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
class MomentLoss:
    """R_bn, eq. 4-6: sum over the teacher's BatchNorm2d inputs of ||mean - running_mean|| + ||var - running_var||.

    Norms are not squared, variances are biased. "First" is the first layer that runs. `close` removes the hooks."""

    def __init__(self, model, first_bn, fused):
        self.loss = bn_moment_loss if fused else bn_moment_loss_ref
        self.first_bn, self.terms = first_bn, []
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        self.handles = [m.register_forward_pre_hook(self.hook) for m in layers]

    def close(self):
        for handle in self.handles:
            handle.remove()

    def hook(self, module, inputs):
        self.terms.append(self.loss(inputs[0], module.running_mean, module.running_var))

    def total(self):
        """Sum of the last forward pass's terms, the first one times first_bn; forgets them."""
        terms, self.terms = torch.stack(self.terms), []
        return terms.sum() + (self.first_bn - 1) * terms[0]


# One step
def augmented_view(x, pool, jitter, flip, generator):
    """What the teacher sees: pooled, rolled by one random offset, mirrored or not. (N, C, H, W) -> (N, C, H', W')."""
    if pool > 1:
        x = F.avg_pool2d(x, pool)
    dy, dx = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()  # CPU generator: no device sync
    x = torch.roll(x, (dy, dx), (2, 3))
    if flip and torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    return x.contiguous(memory_format=torch.channels_last)


def synthesis_loss(view, labels, teacher, moments, setting):
    """Total loss (scalar) and a dict of its unweighted terms, for one view (N, C, H, W)."""
    with torch.autocast(view.device.type, torch.bfloat16, enabled=setting["bf16"] and view.is_cuda):
        logits = teacher.model(view)  # (N, K)
    terms = {"ce": F.cross_entropy(logits.float(), labels), "bn": moments.total()}
    terms["l2"] = view.flatten(1).norm(dim=1).mean()  # R_l2: mean of the images' un-squared norms
    terms["tv_l1"], terms["tv_l2"] = (total_variation if setting["fused"] else total_variation_ref)(view)
    # A term of weight 0 is only reported.
    total = terms["ce"] + sum(w * terms[k] for k in terms if k != "ce" and (w := setting[f"alpha_{k}"]))
    hits = (logits.argmax(1) == labels).float().mean() * 100
    return total, {"total": total.detach(), **{k: v.detach() for k, v in terms.items()}, "teacher": hits}


def learning_rate(step, n_steps, setting):
    """Linear warm-up (at most a quarter: ours), then a cosine to zero; restarted in every stage (released code)."""
    if setting["warmup"] is None:
        return setting["lr"]
    warmup = min(setting["warmup"], n_steps // 4)
    if step < warmup:
        return setting["lr"] * (step + 1) / warmup
    return setting["lr"] / 2 * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup)))


def synthesis_step(x, labels, teacher, moments, optimizer, stage, step, setting, generator):
    """One update of the images in place; returns the loss terms, still on the device."""
    n_steps, pool, jitter = stage
    optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps, setting)
    view = augmented_view(x, pool, jitter, setting["flip"], generator)
    total, terms = synthesis_loss(view, labels, teacher, moments, setting)
    x.grad = torch.autograd.grad(total, x)[0].contiguous()  # fused Adam pairs by memory order, not by stride
    optimizer.step()
    if setting["clip"]:
        with torch.no_grad():
            torch.clamp(x, teacher.low, teacher.high, out=x)
    return terms


def synthesise(state, labels, teacher, moments, setting, run):
    """All stages of one batch on, from state["stage"] and ["step"]; updates state["x"] (N, C, H, W) fp32 in place."""
    x = state["x"].requires_grad_()
    for i, stage in list(enumerate(setting["stages"]))[state["stage"] :]:
        optimizer = torch.optim.Adam([x], betas=setting["betas"], fused=True)  # a fresh one each stage (released code)
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        for step in range(state["step"], stage[0]):
            terms = synthesis_step(x, labels, teacher, moments, optimizer, stage, step, setting, run.generator)
            state.update(stage=i, step=step + 1)
            run.after_step(state, terms, optimizer)
        state.update(step=0, optimizer=None)


# Evaluation and files
def pixel_range(info, device):
    """Real pixels, 0 to 1, in normalised units: (low, high), (1, C, 1, 1) each; asymmetric about 0."""
    bounds = [[(pixel - m) / s for m, s in zip(info.mean, info.std, strict=True)] for pixel in (0.0, 1.0)]
    return torch.tensor(bounds, device=device).view(2, 1, -1, 1, 1)


def to_uint8(x, info):
    """Normalised (N, C, H, W) float -> (N, C, H, W) uint8 pixels."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (info.mean, info.std))
    return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


# Copied from teacher.py
def normalise(x, mean, std):
    """uint8 (N, C, H, W) -> float32 in units of the data set's standard deviation; mean, std: C numbers in [0, 1]."""
    mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return x.float() * (1 / (255 * std)) - mean / std


@torch.no_grad()
def agreement(info, images, labels):
    """Percent of uint8 images (N, C, H, W) that a network assigns to their labels: in all, and {class: percent}."""
    batches = (x.to(info.device) for x in images.split(100))
    predicted = [info.model(normalise(x, info.mean, info.std)).argmax(1) for x in batches]
    hits = 100 * (torch.cat(predicted).cpu() == labels).double()
    by_class = {k: round(hits[labels == k].mean().item(), 2) for k in labels.unique().tolist()}
    return round(hits.mean().item(), 2), by_class


def save_grid(images, labels, names, path, columns=10, rows=10):
    """Write a PNG: one row a class, its name at the left, small images enlarged to about 64 px."""
    scale = max(1, 64 // images.shape[-1])
    side, left = images.shape[-1] * scale + 2, 78
    classes = labels.unique()[:rows].tolist()
    sheet = Image.new("RGB", (left + columns * side, len(classes) * side), "white")
    for row, k in enumerate(classes):
        ImageDraw.Draw(sheet).text((4, (row + 0.5) * side - 6), names.get(k, f"class {k}"), fill="black")
        for column, image in enumerate(images[labels == k][:columns]):
            tile = Image.fromarray(image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())
            tile = tile.resize((side - 2, side - 2), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * side, row * side))
    sheet.save(path)


class Run:
    """One run's folder: args.json, metrics.jsonl, checkpoint.pt and the progress bar."""

    def __init__(self, args, setting, generator, n_steps):
        self.args, self.setting, self.generator, self.out = args, setting, generator, Path(args.out)
        self.lines, self.start, self.n_done = [], time.time(), 0
        self.state = dict(batch=0, stage=0, step=0, x=None, optimizer=None, done=[])
        settled = {k: v for k, v in asdict(args).items() if k not in ("resume", "device", "out")}
        self.settled = json.dumps(settled | {"setting": setting}, indent=1)
        with one_line(f"--out {self.out} cannot be used", "pass another folder, or run without --resume"):
            self.out.mkdir(parents=True, exist_ok=True)
            if args.resume and (self.out / "checkpoint.pt").exists():
                saved = load_weights(self.out / "checkpoint.pt")
                before, now = json.loads(saved["settled"]), json.loads(self.settled)
                if changed := ", ".join(k for k in now if before.get(k) != now[k]):
                    fail(f"--resume: {changed} differ from the first run's (args.json); repeat its options")
                self.lines, self.start, self.n_done = saved["lines"], time.time() - saved["seconds"], saved["n_done"]
                self.state = {k: saved[k] for k in self.state}
                generator.set_state(saved["generator"])
            (self.out / "args.json").write_text(self.settled + "\n")
            (self.out / "metrics.jsonl").write_text("".join(self.lines))  # forgets what came after the checkpoint
            (self.out / "result.json").unlink(missing_ok=True)  # its presence says that a run is complete
        self.bar = tqdm(total=n_steps, initial=self.n_done, disable=None, mininterval=0.5)

    def after_step(self, state, terms, optimizer):
        """Log every log_every steps, where the host waits for the device and sees a NaN; checkpoint."""
        self.bar.update()
        self.n_done = n = self.n_done + 1
        if n % self.args.log_every == 0 or n % self.args.checkpoint_every == 0 or n == self.bar.total:
            values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
            if not math.isfinite(values["total"]):
                fail(f"the loss is {values['total']} at step {n}; lower --lr or the weights of the terms")
            row = {("eval/" if k == "teacher" else "loss/") + k: round(v, 6) for k, v in values.items()}
            self.lines.append(json.dumps({"step": n, "batch": state["batch"], "stage": state["stage"]} | row) + "\n")
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(self.lines[-1])
            self.bar.set_postfix({k: f"{values[k]:.3g}" for k in ("total", "ce", "bn", "tv_l2", "teacher")})
            if self.bar.disable and n % (10 * self.args.log_every) == 0:  # no terminal: rows instead of a bar
                print(f"step {n:6d}  " + "  ".join(f"{k} {v:9.4g}" for k, v in values.items()), flush=True)
        if n % self.args.checkpoint_every == 0:
            if not state["x"].isfinite().all():  # the loss above belongs to the images before this step
                fail(f"the images are not finite after step {n}; lower --lr or the weights of the terms")
            saved = dict(state, x=state["x"].detach(), optimizer=optimizer.state_dict(), lines=self.lines, n_done=n)
            saved.update(generator=self.generator.get_state(), seconds=time.time() - self.start, settled=self.settled)
            torch.save(saved, self.out / "checkpoint.part")  # then renamed: nobody sees half a checkpoint
            os.replace(self.out / "checkpoint.part", self.out / "checkpoint.pt")

    def finish(self, images, labels, teacher, verifier, names):
        """Write images.npz, samples.png and result.json; print the agreements."""
        np.savez(self.out / "images.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        save_grid(images, labels, names, self.out / "samples.png")
        seconds = round(time.time() - self.start, 1)
        result = dict(teacher=teacher.name, teacher_accuracy=teacher.accuracy, student_accuracy=None, seconds=seconds)
        result |= dict(verifier=verifier.name if verifier else None, n_images=len(images), seed=self.args.seed)
        for role, info in (("teacher", teacher), ("verifier", verifier)):
            total, by_class = agreement(info, images, labels) if info else (None, None)
            result |= {f"{role}_agreement": total, f"{role}_agreement_by_class": by_class}
            if info:
                print(f"{role} {info.name} assigns {total:.1f} % of the images to the wanted class")
        result |= dict(setting=self.setting["name"]) | ran_on(self.args.device)
        (self.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote samples.png, images.npz, result.json into {self.out}; {seconds:.0f} s")


# Main
def choose_setting(args, dataset):
    """The row of SETTINGS with the command line's values over it, its stages rescaled to --iterations."""
    name = FAMILIES[dataset][0] if args.setting == "auto" else args.setting
    setting = SETTINGS[name] | {k: v for k in SETTINGS[name] if (v := getattr(args, k, None)) is not None}
    setting.update(name=name, fused=args.fused, bf16=args.bf16)
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
    choices = dict(dataset=("auto", *FAMILIES), setting=("auto", *SETTINGS))
    check_options(args, least | dict.fromkeys(names.split(), 0), choices)


def main(args):
    check_args(args)
    seed_everything(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # classes, noise, jitter and flips

    with one_line(f"--teacher {args.teacher}", "check --weights, --num-classes, --image-size, --mean and --std"):
        teacher, verifier = load(args.teacher, args), None
        teacher.low, teacher.high = pixel_range(teacher, args.device)
        n_classes, n_channels, size = teacher.num_classes, len(teacher.mean), teacher.image_size
        if size % 2 or size < 8:
            fail(f"--image-size: expected an even number of at least 8 pixels, got {size}")
        dataset = teacher.dataset if args.dataset == "auto" else args.dataset
        setting = choose_setting(args, dataset if dataset in FAMILIES else "cifar10")
        moments = MomentLoss(teacher.model, setting["first_bn"], args.fused)
        for _, pool, _ in setting["stages"]:
            try_out(teacher, n_channels, size // pool, n_classes)
    if not moments.terms:
        fail(f"--teacher {args.teacher}: no BatchNorm2d with running moments, which the method matches; take another")
    moments.terms = []
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
    n_batches = -(-(args.num_images or batch_size) // batch_size)
    if len(classes) > batch_size:  # a batch cannot hold them all: mix them
        classes = classes[torch.randperm(len(classes), generator=generator)]
    n_images = n_batches * batch_size  # whole batches: their size is part of the method
    labels = classes.repeat(-(-n_images // len(classes)))[:n_images]

    run = Run(args, setting, generator, n_batches * sum(n for n, _, _ in setting["stages"]))
    print(f"{teacher.name}: {len(labels)} images, setting {setting['name']}, {args.device}, fused={args.fused}")
    for wanted in labels.to(args.device).split(batch_size)[run.state["batch"] :]:
        if run.state["x"] is None:
            run.state["x"] = torch.randn(batch_size, n_channels, size, size, generator=generator)
        run.state["x"] = run.state["x"].to(args.device)
        synthesise(run.state, wanted, teacher, moments, setting, run)
        run.state["done"].append(to_uint8(run.state["x"].detach(), teacher).cpu())
        run.state.update(batch=run.state["batch"] + 1, stage=0, x=None)
    moments.close(), run.bar.close()
    run.finish(torch.cat(run.state["done"]), labels, teacher, verifier, dict(enumerate(CLASS_NAMES.get(dataset, []))))


if __name__ == "__main__":
    main(tyro.cli(Args))
