"""Generative ensemble: small generators, each of its own classes, learn from a teacher alone, then teach students.

Luo, Sandler, Lin, Zhmoginov, Howard, "Large-scale generative data-free distillation", 2020, arXiv:2012.05578. The
teacher T must see in an image the class that it was made for, and know its moments; students S learn T's answers:

    L_G = CE(T(x), y) + alpha_bn R(x),   x = G_g(z, y), z ~ N(0, I), y uniform over the classes of generator g
    L_S = T^2 KL(T(x) / T || S(x) / T),  x of the frozen ensemble, all generators alike, nothing stored

R: distance of the moments of T's BatchNorm inputs from those it stored. All generators train at once, as groups of one
network, in one pass through T. The generator is the released one, without its depthwise variant. Neither losses,
coefficients nor schedules were released: all else here is ours, chosen on training images (results/README.md):
- `--pool`: of which layers moments are pooled over all generators. A class cannot have the moments of all classes, in
  deep layers least. Pooled everywhere, generators divide the styles among them (blobs, bricks); own moments everywhere
  make strokes of no class; the default pools the last 30 % of the layers;
- `--bn batch`: generators teach in train mode; eval mode: 6 points worse (digits). Batches as in training help, too;
- no total variation, no l2 prior (switches); `--shift`, `--cut` vary what students see; T^2 in L_S.
Measured (results/ensemble-*; 1 CPU thread): digits 94.17 % (1 seed, 214 s); mnist-resnet8 to lenet5 96.44 ± 0.53 %
(3 seeds, at most 842 s), with one generator 82.97 %, with one ten times its size 90.65 % (1 seed). Not on a GPU yet.
Run `python generative_ensemble.py`. It writes into --out: ensemble.pt, student.pt, samples.png (a row per class),
result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics, means since the last row: `loss/ce`, `loss/bn`,
`loss/tv`, `loss/l2` unweighted, `eval/hits` percent of images on target; `loss/student`, `eval/acc` percent of real
test images. `--ensemble FILE` teaches another student, `--sample N` draws a grid, `--compare RUN RUN …` compares runs.
`torchrun --nproc-per-node=R generative_ensemble.py` splits the generators over ranks; each pools over its own.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import kernels
from kernels.augment import varied
from kernels.contract import (
    RunOptions,
    check_options,
    fail,
    load_network,
    load_student,
    load_teacher,
    load_weights,
    make_optimizer,
    one_line,
)
from kernels.data import FILES, real_images
from kernels.distributed import exchange, join, slices
from kernels.figures import compare_arms, draw_grid
from kernels.folder import RunFolder
from kernels.quality import spread_of_classes


@dataclass
class Args(RunOptions):
    # Run settings.
    teacher: str = "digits-resnet8"
    """Shipped name (teachers/index.json), a teacher.pt, or file.py:factory; its BatchNorms are what is matched."""
    student: str = "auto"
    """lenet5 or another network of teacher.py, a shipped name, file.py:factory; auto: as --setting has it."""
    dataset: str = "auto"
    """Real test images: digits | mnist | cifar10 | cifar100 | none; auto: the teacher's. Training never sees them."""
    out: str = "runs/generative_ensemble/default"
    """Output folder."""
    ensemble: str = ""
    """A saved ensemble.pt to distil another student from: no generator is trained."""
    sample: int = 0
    """Write a labelled grid of so many images of --ensemble (or of --out's) into --out, and stop."""
    compare: tuple[str, ...] = ()
    """Compare these finished runs (their --out folders) by number and size of generators instead of training."""
    smoke: bool = False
    """A run of seconds: 3 generator steps, 2 epochs of 2 student steps."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs hooks and the plain references."""
    graph: bool = True
    """Replay a step as one CUDA graph on a GPU."""

    # Method; see SETTINGS. None: as --setting has it; of a saved ensemble the sizes are its own.
    setting: str = "auto"
    """A row of SETTINGS: cifar10 | mnist | digits; auto: by the data set."""
    generators: int | None = None
    """Generators; the classes are split evenly among them (paper, ImageNet: one each)."""
    steps: int | None = None
    """Steps of all generators together; Adam's rate falls to zero over them by a cosine."""
    batch_size: int | None = None
    """Images of a step, in equal parts from each generator."""
    latent: int | None = None
    """Dimensions of the noise z."""
    width: int | None = None
    """Channels of a generator's first layer; stage i has width // (i + 1) (released: 128)."""
    stages: int | None = None
    """Up-samplings by 2 (released: 2); 0: halve the image size while it is even and above 8."""
    lr_generator: float | None = None
    """Adam's initial learning rate of the generators."""
    moments: str | None = None
    """l2 (norms, as DeepInversion) | squared | gaussian-kl (of batch from stored moments)."""
    pool: float | None = None
    """Share of the BatchNorms, the last, whose moments are of all (a rank's) generators' images; others: of each's."""
    alpha_bn: float | None = None
    """Weight of the moment loss, beside the cross-entropy's 1."""
    alpha_tv: float | None = None
    """Weight of the l1 total variation; 0: no such term."""
    alpha_l2: float | None = None
    """Weight of the images' mean l2 norm; 0: no such term."""
    epochs: int | None = None
    """Epochs of the student, which is tested after each."""
    iterations: int | None = None
    """Student steps of an epoch (no data pass exists)."""
    student_batch: int | None = None
    """Images of a student step, in equal parts from each generator."""
    bn: str | None = None
    """Moments in the generators' BatchNorms while they teach: batch (train mode) | running (eval mode)."""
    shift: int | None = None
    """Each image that a student sees is shifted by up to so many pixels each way, its edges repeated."""
    cut: bool | None = None
    """Replace a random band of rows or columns, in half of a student's images, by another's (CutMix): True | False."""
    temperature: float | None = None
    """Divides both logits of the student's KL, which is multiplied by its square."""
    optimizer: str | None = None
    """The student's: sgd (momentum 0.9, weight decay 5e-4) | adam."""
    lr_student: float | None = None
    """The student's initial learning rate; a cosine over the epochs ends it."""


# fmt: off
PAPER = dict(student="resnet18_cifar", generators=10, steps=20000, batch_size=500, latent=100, width=128, stages=0,
             lr_generator=1e-3, moments="l2", pool=0.3, alpha_bn=10.0, alpha_tv=0.0, alpha_l2=0.0, epochs=200,
             iterations=500, student_batch=250, bn="batch", shift=0, cut=False, temperature=1.0, optimizer="sgd",
             lr_student=0.1)
OURS = dict(PAPER, student="lenet5", batch_size=40, latent=64, width=16, lr_generator=5e-3, iterations=125,
            student_batch=40, shift=2, cut=True, optimizer="adam", lr_student=5e-3)  # chosen as results/README.md says
SETTINGS = {
    "cifar10": PAPER,  # untested: the released widths, the rest after related work
    "mnist": dict(OURS, steps=4000, epochs=40),
    "digits": dict(OURS, steps=1000, alpha_bn=5.0, epochs=20, student_batch=80, iterations=80),
}
# fmt: on
load = partial(load_network, networks={})  # all but the generators are factories, of teacher.py or of the user
SHAPE = ("groups", "latent", "width", "stages", "channels", "image_size")  # what makes an ensemble's networks
SIZES = ("generators", "width", "stages", "latent")  # in which arms of a comparison may differ


# Copied from teacher.py
def normalise(x, mean, std):
    """uint8 (N, C, H, W) -> float32 in units of the data set's standard deviation; mean, std: C numbers in [0, 1]."""
    mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return x.float() * (1 / (255 * std)) - mean / std


# The generators. All other networks are factories, of teacher.py or of the user.
class Ensemble(nn.Module):
    """G generators, each of its own group of classes, that run together.

    Activations are (n, G C, H, W): a convolution in G groups and one BatchNorm over G C channels are exactly G
    separate ones. Each tensor of the state holds the generators' tensors one after another along dimension 0.

    Args:
        shape: SHAPE's values; groups: the classes of each generator.
        own: slice of the generators that are here (a rank's); all of them draw noise, so a part's images do not depend
            on what it is part of.
    """

    def __init__(self, shape, own=slice(None)):
        super().__init__()
        self.shape, self.own, self.all = shape, own, len(shape["groups"])
        groups, channels, n_labels = shape["groups"], shape["channels"], max(map(len, shape["groups"]))
        G, side = len(groups[own]), shape["image_size"] >> shape["stages"]
        widths = [shape["width"] // (i + 1) for i in range(max(1, shape["stages"]))]
        self.dense = nn.Parameter(torch.zeros(G, shape["latent"] + n_labels, widths[0] * side**2))
        self.bn0 = nn.BatchNorm2d(G * widths[0])
        self.convs, self.bns = nn.ParameterList(), nn.ModuleList()  # convolutions without bias
        for before, after in zip([widths[0], *widths], widths[: shape["stages"]], strict=False):
            self.convs.append(torch.zeros(G * after, before, 3, 3))
            self.bns.append(nn.BatchNorm2d(G * after, 0.8))  # eps as released, there an inherited accident
        self.last, self.bias = (nn.Parameter(torch.zeros(G * channels, *rest)) for rest in ((widths[-1], 3, 3), ()))
        self.bn_last = nn.BatchNorm2d(G * channels, 0.8, affine=False)
        self.scale = nn.Parameter(torch.ones(G * channels))  # learnt, and no shift
        classes = torch.tensor([[*group, *group[:1] * (n_labels - len(group))] for group in groups])
        self.register_buffer("classes", classes, persistent=False)  # (all, n_labels); the filling is never drawn
        self.register_buffer("n_classes", torch.tensor([len(group) for group in groups]), persistent=False)

    def initialise(self):
        """Xavier's uniform weights, each generator's from its own fans; zero bias, as released."""
        for weights in (self.dense, *self.convs, self.last):
            for weight in weights.detach().unflatten(0, (len(self.dense), -1)):
                nn.init.xavier_uniform_(weight[0] if weight.ndim == 3 else weight)
        return self

    def draw(self, n):
        """Noise (n, G, z), and of each image's class the place (n, G) in its generator's group, uniform."""
        z = torch.randn(n, self.all, self.shape["latent"], device=self.classes.device)
        place = (torch.rand(n, self.all, device=z.device) * self.n_classes).long()
        return z[:, self.own], place[:, self.own]

    def forward(self, z, place):
        """Images (n G, C, H, W) in normalised units and labels (n G,); image i G + g is the i-th of generator g."""
        n, G, _ = z.shape
        onehot = (place.unsqueeze(2) == torch.arange(self.classes.shape[1], device=z.device)).to(z.dtype)
        x = torch.bmm(torch.cat([z, onehot], 2).transpose(0, 1), self.dense)  # (G, n, C0 H0 W0)
        side = self.shape["image_size"] >> self.shape["stages"]
        x = x.transpose(0, 1).reshape(n, -1, side, side).contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.bn0(x), 0.2)
        for weight, bn in zip(self.convs, self.bns, strict=True):
            x = F.conv2d(F.interpolate(x, scale_factor=2), weight, padding=1, groups=G)  # (n, G C_i, H, W)
            x = F.leaky_relu(bn(x), 0.2)
        x = self.bn_last(torch.tanh(F.conv2d(x, self.last, self.bias, padding=1, groups=G)))
        x = x * self.scale.view(-1, 1, 1)
        labels = self.classes[self.own].T.gather(0, place)  # (n, G)
        x = x.reshape(n * G, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        return x, labels.flatten()

    def part(self, own):
        """The generators of a slice, as they are now."""
        part, G = Ensemble(self.shape, own), len(self.dense)
        state = {k: v.unflatten(0, (G, -1))[own].flatten(0, 1) if v.ndim else v for k, v in self.state_dict().items()}
        part.load_state_dict(state)
        return part.to(self.dense.device, memory_format=torch.channels_last)

    def freeze(self, bn):
        """For sampling: no gradients, BatchNorms use the batch's moments and keep their own, or use their own."""
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.track_running_stats = bn == "running"
        return self.requires_grad_(False).train(bn == "batch")


# Losses
class Observed:
    """A frozen teacher, and the moments of what enters its BatchNorms.

    Args:
        model: in eval mode.
        n_parts: 1: moments over all images; G: over those of each generator, image i G + g being of generator g.
        fused: moments by `kernels`, of the whole batch in the pass of the BatchNorm and the ReLU; else hooks alone.
    """

    def __init__(self, model, n_parts, fused):
        self.model, self.n_parts, self.found, self.hooks = model, n_parts, [], []
        self.moments = kernels.bn_moments if fused else kernels.bn_moments_ref
        layers = [m for m in model.modules() if isinstance(m, kernels.fuse.BATCHNORMS) and m.running_mean is not None]
        if fused and n_parts == 1:
            self.model = kernels.fuse_batchnorm(model)
        elif not layers:
            raise ValueError("no BatchNorm with running statistics")
        else:
            self.hooks = [m.register_forward_pre_hook(self.hook) for m in layers]

    def close(self):
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()

    def hook(self, bn, inputs):
        """Folds the generators into the channels, as they do: then the moments of a channel are of one generator."""
        x, P = inputs[0], self.n_parts
        x = x.reshape(len(x) // P, P * x.shape[1], *x.shape[2:])  # (n, P C, H, W)
        running_mean = bn.running_mean.repeat(P)
        mean, var = self.moments(x, running_mean)
        self.found.append((torch.stack([mean - running_mean, var]).unflatten(1, (P, -1)), bn.running_var))

    def __call__(self, x):
        """Logits (N, K); moments (2, P, C): mean less running mean, biased variance, of each part, layer beside layer;
        running_var (C,); the layers' sizes, which add up to C."""
        y = self.model(x)
        logits, found = (y, list(self.found)) if self.hooks else y
        self.found.clear()  # nothing may keep the graph of a step that is over
        moments, sizes = [m.view(2, self.n_parts, -1) for m, _ in found], tuple(len(v) for _, v in found)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, torch.cat(moments, 2), torch.cat([v for _, v in found]), sizes


def pooled(moments):
    """Moments (2, P, C) of equal parts -> (2, 1, C) of all together, by the law of total variance."""
    mean, var = moments.mean(1)
    return torch.stack([mean, var + moments[0].var(0, unbiased=False)]).unsqueeze(1)


def moment_loss(moments, running_var, sizes, form, fused, eps=1e-5):
    """Distance of moments (2, P, C) from the stored ones: a sum over layers, a mean over parts; form: of --moments.

    l2: ||mean - mu|| + ||var - s2|| of each layer, not squared; squared: its squares; gaussian-kl: the sum over
    channels of KL(N(mean, var) || N(mu, s2)), eps added to both variances.
    """
    P, (distance, var) = moments.shape[1], moments
    if form == "l2":
        norms = kernels.moment_distance if fused else kernels.moment_distance_ref
        return norms(moments.flatten(1).contiguous(), running_var.repeat(P), sizes * P) / P
    if form == "squared":
        return (distance.square() + (var - running_var).square()).sum() / P
    var, running_var = var + eps, running_var + eps
    return ((running_var / var).log() + (var + distance.square()) / running_var - 1).sum() / (2 * P)


def generator_terms(x, labels, answers, setting):
    """The unweighted terms of the generators' loss, means over generators: (4,) ce, bn, tv, l2; 0 where not wanted."""
    (logits, moments, running_var, sizes), zero = answers, x.new_zeros(())
    ce, bn, tv, l2 = F.cross_entropy(logits, labels), zero, zero, zero  # "inceptionism": of the class that was drawn
    first = len(sizes) - round(setting["pool"] * len(sizes))  # layers of which each generator has its own moments
    for part, layers in ((moments, slice(0, first)), (pooled(moments), slice(first, len(sizes)))):
        if sizes[layers]:
            at = slice(sum(sizes[: layers.start]), sum(sizes[: layers.stop]))
            matched = part[:, :, at], running_var[at], sizes[layers]
            bn = bn + moment_loss(*matched, setting["moments"], setting["fused"])
    if setting["alpha_tv"]:
        tv, _ = (kernels.total_variation if setting["fused"] else kernels.total_variation_ref)(x)
    if setting["alpha_l2"]:
        l2 = x.flatten(1).norm(dim=1).mean()
    return torch.stack([ce, bn, tv, l2])


# Steps
class Distiller(nn.Module):
    """Generators and student with their optimisers; all that training changes is a parameter or a buffer here."""

    def __init__(self, teacher, student, ensemble, setting, args):
        super().__init__()
        self.teacher, self.setting, cuda = teacher, setting, args.device == "cuda"  # the teacher is not a submodule
        self.student, self.ensemble = student.model, ensemble
        self.n_parts = 1 if setting["pool"] == 1 else len(ensemble.dense)  # whose moments are taken apart
        self.register_buffer("step", torch.zeros(()))  # of the generators
        self.register_buffer("epoch", torch.zeros(()))  # of the student
        self.register_buffer("sums", torch.zeros(6))  # ce, bn, tv, l2, images on target, loss of the student
        self.to(args.device, memory_format=torch.channels_last)
        weights = [1.0, *(setting[f"alpha_{name}"] for name in ("bn", "tv", "l2"))]
        self.weights = torch.tensor(weights, device=args.device)
        self.amp = partial(torch.autocast, args.device, torch.bfloat16, args.bf16 and cuda, cache_enabled=False)
        self.optimizers = {"generator": make_optimizer("adam", ensemble, setting["lr_generator"])}
        self.optimizers["student"] = make_optimizer(setting["optimizer"], self.student, setting["lr_student"])

    def update(self, name, loss, model):
        """Step on the gradient of one network's weights, of no other."""
        parameters, optimizer = list(model.parameters()), self.optimizers[name]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()


def generator_step(state, observe):
    """One step of all generators on one pass through the teacher; at --pool 0 each learns exactly as if alone."""
    setting, n = state.setting, state.setting["batch_size"] // state.setting["generators"]
    cosine = (1 + torch.cos(math.pi / setting["steps"] * state.step)) / 2
    state.optimizers["generator"].param_groups[0]["lr"].copy_(setting["lr_generator"] * cosine)
    with state.amp():
        x, labels = state.ensemble(*state.ensemble.draw(n))  # (N, C, H, W)
        answers = observe(x)
    terms = generator_terms(x, labels, answers, setting)
    state.update("generator", state.n_parts * (state.weights * terms).sum(), state.ensemble)  # not a mean: as alone
    hits = (answers[0].argmax(1) == labels).float().mean()
    state.sums[:5] += torch.stack([*terms.detach(), hits])
    state.step += 1


def student_step(state, ensemble):
    """One step towards the teacher's answers to fresh images; ensemble: frozen."""
    setting, T = state.setting, state.setting["temperature"]
    divergence = kernels.kl_divergence if setting["fused"] else kernels.kl_divergence_ref
    with state.amp():
        with torch.no_grad():
            x, _ = ensemble(*ensemble.draw(setting["student_batch"] // setting["generators"]))
            x = varied(x, setting)
            t_logits = state.teacher.model(x)
        loss = T**2 * divergence(t_logits, state.student(x), T)
    state.update("student", loss, state.student)
    state.sums[5] += loss.detach()


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


@torch.no_grad()
def sample_classes(ensemble, n_images, n):
    """n_images in all, of (the first) classes alike: (classes, each, C, H, W) on the CPU; n: batch of a generator."""
    n_classes = min(n_images, int(ensemble.classes.max()) + 1)
    each, kept = n_images // n_classes, [[] for _ in range(n_classes)]
    while min(map(len, kept)) < each:
        images, labels = ensemble(*ensemble.draw(n))
        for x, k in zip(images.float().cpu(), labels.tolist(), strict=True):
            if k < n_classes and len(kept[k]) < each:
                kept[k].append(x)
    return torch.stack([torch.stack(images) for images in kept])


def ensemble_measures(state, ensemble, test, n):
    """hits: percent of images that the teacher sees as wanted; diversity, beside that of as many real images; accuracy
    of each class."""
    K, model, device = state.teacher.num_classes, state.teacher.model, state.step.device
    images = sample_classes(ensemble, max(2 * K, min(20 * K, 1000)), n).to(device)  # (K, each, C, H, W)
    with torch.no_grad():
        hits = [(model(x).argmax(1) == k).float().mean().item() for k, x in enumerate(images)]
    found = dict(hits=100 * float(np.mean(hits)), diversity=spread_of_classes(model, images))
    if test:
        real, labels, *normalisation = test
        found["class_accuracies"] = [
            evaluate(state.student, real[labels == k], labels[labels == k], *normalisation)
            for k in labels.unique().tolist()
        ]
        of_class = [real[labels == k][: images.shape[1]] for k in labels.unique().tolist()]
        found["real_diversity"] = spread_of_classes(model, [normalise(x, *normalisation) for x in of_class])
    return found


def save_ensemble(ensemble, teacher, setting, n, path):
    """Write ensemble.pt: tensors, numbers and strings that describe themselves; n: images of a generator to sample."""
    saved = dict(format=1, method="generative_ensemble", teacher=teacher.name, shape=ensemble.shape, bn=setting["bn"])
    saved |= dict(n=n, **{k: list(getattr(teacher, k)) for k in ("mean", "std")})
    torch.save(saved | {"state_dict": ensemble.state_dict()}, f"{path}.part")  # then renamed: never half a file
    os.replace(f"{path}.part", path)


def load_ensemble(path, device, teacher=None):
    """An Ensemble, ready to sample, and what its file says of it; teacher: whose images and classes it must have."""
    with one_line(f"{path}: no ensemble of this script", "pass the ensemble.pt that a run wrote"):
        saved = load_weights(path)
        shape = {k: saved["shape"][k] for k in SHAPE}
        classes = sorted(k for group in shape["groups"] for k in group)
        its = dict(num_classes=len(classes), image_size=shape["image_size"], mean=saved["mean"], std=saved["std"])
        right = classes == list(range(len(classes))) and saved["n"] >= 1 and saved["bn"] in ("batch", "running")
        if not right or not shape["channels"] == len(saved["mean"]) == len(saved["std"]):
            raise ValueError("its description does not belong together")
        ensemble = Ensemble(shape)
        ensemble.load_state_dict(saved["state_dict"])
        if not all(v.isfinite().all() for v in ensemble.state_dict().values()):
            raise ValueError("its weights are not finite")
    for name, value in its.items() if teacher else ():
        ours = getattr(teacher, name)
        if value != (list(ours) if isinstance(value, list) else ours):
            fail(f"--ensemble {path}: its {name} is {value}, the teacher's {ours}; train one for this teacher")
    return ensemble.freeze(saved["bn"]).to(device, memory_format=torch.channels_last), saved


class Run(RunFolder):
    """One run's folder; of torchrun's ranks but the first a folder rankN in it, with checkpoint and rows."""

    def __init__(self, args, state, rank):
        self.distiller = state
        clears = ("student.pt", "samples.png", *(() if args.ensemble else ("ensemble.pt",)))
        super().__init__(args, state.setting, free=("graph", "compare", "sample"), clears=clears, rank=rank)

    def state(self):
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.distiller.optimizers.items()}
        used = {name: saved for name, saved in optimizers.items() if saved["state"]}  # not yet the student's
        return dict(networks=self.distiller.state_dict(), optimizers=used)

    def restore(self, saved):
        state = self.distiller
        state.load_state_dict(saved["networks"])
        used = [name for name, done in (("generator", state.step), ("student", state.epoch)) if done]
        if sorted(saved["optimizers"]) != used or not self.lines:
            raise ValueError("its state does not belong together")
        for name in used:
            kernels.contract.restore_optimizer(state.optimizers[name], saved["optimizers"][name])

    def after(self, bar, row):
        """The host's only wait: a row of metrics, a checkpoint."""
        if not all(math.isfinite(v) for v in row.values()):
            fail(f"the losses are not finite: {row}; lower --lr-generator or --lr-student")
        self.distiller.sums.zero_()
        self.show(bar, row)
        self.save()


def gathered(part, owns, rank):
    """The whole ensemble, on every rank, out of the parts that the ranks hold."""
    held = [part if r == rank else Ensemble(part.shape, own).to(part.dense.device) for r, own in enumerate(owns)]
    states = [{k: v.contiguous() for k, v in one.state_dict().items()} for one in held]
    exchange(states)
    whole = Ensemble(part.shape)
    whole.load_state_dict({k: torch.cat([s[k] for s in states]) if v.ndim else v for k, v in states[0].items()})
    return whole.to(part.dense.device, memory_format=torch.channels_last)


# Main
def train_ensemble(state, run, args, quiet):
    """Stage 1, in twenty windows between which the host looks at it."""
    total, done, setting = state.setting["steps"], int(state.step), state.setting
    if done >= total:
        return
    with one_line(f"--teacher {args.teacher}", "its BatchNorms are what is matched; take a network that has some"):
        observe = Observed(state.teacher.model, state.n_parts, setting["fused"])
    step = kernels.Captured(partial(generator_step, state, observe), args.graph and args.device == "cuda")
    bar = tqdm(total=total, initial=done, disable=quiet or None, mininterval=0.5, desc="generators")
    for end in sorted({n for i in range(20) if (n := total * (i + 1) // 20) > done}):
        for _ in range(done, end):
            step()
            bar.update()
        ce, bn, tv, l2, hits = (state.sums[:5] / (end - done)).tolist()
        row = {"step": end, "loss/ce": ce, "loss/bn": bn, "eval/hits": 100 * hits}
        row |= {f"loss/{k}": v for k, v in (("tv", tv), ("l2", l2)) if setting[f"alpha_{k}"]}
        run.after(bar, row)
        done = end
    bar.close()
    observe.close()


def train_student(state, ensemble, run, args, test):
    """Stage 2: epochs on fresh images of the frozen ensemble; the host looks at the device between them only."""
    setting, done = state.setting, int(state.epoch)
    epochs, iterations = setting["epochs"], setting["iterations"]
    step = kernels.Captured(partial(student_step, state, ensemble), args.graph and args.device == "cuda")
    bar = tqdm(total=epochs * iterations, initial=done * iterations, disable=None, mininterval=0.5, desc="student")
    for epoch in range(done, epochs):
        cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
        state.optimizers["student"].param_groups[0]["lr"].fill_(setting["lr_student"] * cosine)
        for _ in range(iterations):
            step()
            bar.update()
        state.epoch += 1
        row = {"epoch": epoch + 1, "loss/student": state.sums[5].item() / iterations}
        run.after(bar, row | ({"eval/acc": evaluate(state.student, *test)} if test else {}))
    bar.close()


def choose_setting(args, dataset, teacher, n_ranks=1, saved=None):
    """The row of SETTINGS with the command line's values over it, and what follows of them; saved: an ensemble."""
    name = args.setting if args.setting != "auto" else dataset if dataset in SETTINGS else "cifar10"
    given = {k: v for k in PAPER if (v := getattr(args, k)) not in (None, "auto")}
    K, size, setting = teacher.num_classes, teacher.image_size, SETTINGS[name] | given
    if args.generators is None:
        setting["generators"] = min(setting["generators"], K)
    if not setting["stages"]:  # at 28 and 32 px the released two
        setting["stages"] = next(m for m in range(32) if size >> m <= 8 or (size >> m) % 2)
    if saved:
        setting |= {k: saved["shape"][k] for k in ("latent", "width", "stages")} | dict(steps=0)
        setting |= dict(generators=len(saved["shape"]["groups"]), bn=args.bn or saved["bn"])
    if args.smoke:
        setting.update(steps=min(setting["steps"], 3), epochs=min(setting["epochs"], 2), iterations=2)
        setting.update(dict.fromkeys(("batch_size", "student_batch"), 2 * setting["generators"]))
    if not n_ranks <= setting["generators"] <= K or (saved and n_ranks > 1):
        least = f"{n_ranks} (ranks, and no --ensemble)" if n_ranks > 1 else "1"
        fail(f"--generators {setting['generators']}: expected {least} to {K} (classes of the teacher)")
    if size % 2 ** setting["stages"] or setting["width"] < max(1, setting["stages"]):
        fail(f"--stages {setting['stages']}: {size} pixels or a width of {setting['width']} do not divide so often")
    for name_ in ("batch_size", "student_batch"):
        if setting[name_] < setting["generators"]:
            fail(f"--{name_.replace('_', '-')} {setting[name_]}: fewer than {setting['generators']} generators")
    return setting | dict(name=name, fused=args.fused)


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    least = dict(lr_generator=1e-12, lr_student=1e-12, temperature=1e-6, steps=1)
    least |= dict.fromkeys(("generators", "batch_size", "student_batch", "epochs", "iterations", "latent", "width"), 1)
    least |= dict.fromkeys(("seed", "image_size", "num_classes", "sample", "stages", "shift"), 0)
    least |= dict.fromkeys(("alpha_bn", "alpha_tv", "alpha_l2"), 0)
    choices = dict(
        dataset=("auto", "digits", *FILES, "none"), setting=("auto", *SETTINGS), bn=(None, "batch", "running")
    )
    choices |= dict(moments=(None, "l2", "squared", "gaussian-kl"), optimizer=(None, "sgd", "adam"))
    check_options(args, least | dict(pool=0), choices)
    if (args.pool or 0) > 1:
        fail(f"--pool {args.pool}: a share of at most 1 is pooled")


def write_samples(args):
    """--sample: a labelled grid of a saved ensemble, which needs no teacher for it."""
    kernels.contract.seed_everything(args.seed)
    ensemble, saved = load_ensemble(args.ensemble or str(Path(args.out) / "ensemble.pt"), args.device)
    with one_line(f"--out {args.out} cannot be used", "pass another folder"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        images = sample_classes(ensemble, args.sample, saved["n"])
        draw_grid(images, saved["mean"], saved["std"], Path(args.out) / "samples.png")
    print(f"wrote samples.png into {args.out}")


def main(args):
    check_args(args)
    if args.compare:
        return compare_arms(args.compare, SIZES, args.out)
    if args.sample:
        return write_samples(args)
    rank, n_ranks = join(args.device)
    kernels.contract.seed_everything(args.seed)

    # The teacher, the real images that measure (never train) the student, the student.
    teacher = load_teacher(load, args)
    dataset, test = real_images(teacher, args)
    measures = dict(teacher_accuracy=teacher.accuracy, student_accuracy=None)
    if test:
        test = *test, teacher.mean, teacher.std
        measures["teacher_accuracy"] = evaluate(teacher.model, *test)
    ensemble, saved = load_ensemble(args.ensemble, args.device, teacher) if args.ensemble else (None, None)
    setting = choose_setting(args, teacher.dataset if dataset == "none" else dataset, teacher, n_ranks, saved)
    student = load_student(load, setting["student"], args, teacher)

    # Stage 1, each rank its own generators, or none for a saved ensemble; then the first rank has them all.
    owns, n = slices(setting["generators"], n_ranks), setting["student_batch"] // setting["generators"]
    if not saved:
        groups = [list(range(own.start, own.stop)) for own in slices(teacher.num_classes, setting["generators"])]
        shape = dict(groups=groups, channels=teacher.shape[0], image_size=teacher.image_size)
        ensemble = (
            Ensemble(shape | {k: setting[k] for k in ("latent", "width", "stages")}).initialise().part(owns[rank])
        )
    state = Distiller(teacher, student, ensemble, setting, args)
    run = Run(args, state, rank)
    print(f"{teacher.name}, {student.name}: {setting['generators']} generators, {args.device}, fused={args.fused}")
    train_ensemble(state, run, args, quiet=rank > 0)
    ensemble = gathered(ensemble, owns, rank).freeze(setting["bn"])
    if rank > 0:
        return
    if not saved:
        save_ensemble(ensemble, teacher, setting, n, run.out / "ensemble.pt")

    # Stage 2, and what came of both.
    train_student(state, ensemble, run, args, test)
    draw_grid(sample_classes(ensemble, 100, n), teacher.mean, teacher.std, run.out / "samples.png")
    measures["generator_parameters"] = sum(p.numel() for p in ensemble.parameters()) // setting["generators"]
    measures |= ensemble_measures(state, ensemble, test, n)
    if test:
        measures["student_accuracy"] = evaluate(student.model, *test)
        print(f"teacher {measures['teacher_accuracy']:.2f} %, student {measures['student_accuracy']:.2f} %")
    run.save_student(student, teacher, "generative_ensemble", dataset, measures["student_accuracy"])
    run.finish(dict(teacher=teacher.name, student=student.name, dataset=dataset) | measures)


if __name__ == "__main__":
    main(tyro.cli(Args))
