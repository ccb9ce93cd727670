"""Zero-shot knowledge transfer: a student learns from a teacher's answers to images that a generator invents.

Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019, arXiv:1905.09768. A
generator seeks images on which the student disagrees with the teacher, the student learns to agree on them:

    loss_G = -D(x)    loss_S = D(x) + beta * sum_l A_l(x)    x = G(z),  z ~ N(0, I)
    D = mean over batch and classes of p_T (log p_T - log p_S),  A_l = mean over batch and positions of (q_T - q_S)^2

with q the attention map of group l (`kernels/attention_transfer.py`). One pseudo-batch: one generator step, then ten
student steps on what the updated generator makes of the same z (`--fresh-z`: of a new z each). Where we differ from
the paper or its released code, which settles what the text leaves open:
- images and teacher's answers are made once for the ten steps and detached; released: G runs again in each, with the
  same result but for the running moments of its BatchNorms, which only pictures use. The teacher is frozen;
- settings `digits`, `mnist` are ours: narrow generator, no final affine, fresh z, own rates. `cifar10` is the paper;
- `--divergence` js, reverse-kl: the paper's ablation; l1: DFAD's loss (Fang et al. 2019, arXiv:1912.11006), without
  its SGD student, its order of steps and its tanh;
- attention transfer wherever groups have equal sizes; released: between networks of one family only;
- `--shots`: the authors' recipe is unpublished; see `fine_tune`. `--pseudo-batches 0 --shots -1` is KD with all data.
Run `python zskt.py [--teacher mnist-lenet5]`. It writes into --out: student.pt, samples.png (rows: ten z through the
generator over time), result.json, args.json, metrics.jsonl, checkpoint.pt. Metrics, means since the last row:
`loss/generator`, `loss/student` (last step of each pseudo-batch), `eval/max_p_teacher`, `eval/max_p_student` (top
probability on the images), `eval/acc` percent of real test images. All figures are of the final iterate.
`python zskt.py --mte STUDENT.pt …` writes mte.json and mte.png: mean transition errors (kernels/transitions.py).
Measured: `--teacher mnist-lenet5` to its half 96.42 ± 0.42 % (3 seeds), at most 436 s; the default 93.70 ± 0.64 % (3),
at most 92 s; one CPU thread, torch 2.13.0; commits and seeds in results/zskt-*.json. Nothing on a GPU yet.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from tqdm import tqdm

import kernels
from kernels.contract import RunOptions, check_options, fail, load_network, load_student, load_teacher, one_line
from kernels.data import FILES, load_dataset, real_images
from kernels.folder import RunFolder


@dataclass
class Args(RunOptions):
    # Run settings.
    teacher: str = "digits-lenet5"
    """Shipped name (teachers/index.json), a teacher.pt, or file.py:factory."""
    student: str = "auto"
    """wrn-16-1 or the like, a network of teacher.py, a shipped name or file.py:factory; auto: as --setting has it."""
    dataset: str = "auto"
    """Real test images: digits | mnist | cifar10 | cifar100 | none; auto: the teacher's. Training never sees them."""
    out: str = "runs/zskt/default"
    """Output folder."""
    smoke: bool = False
    """A run of seconds: 3 pseudo-batches of 16 images."""
    fused: bool = True
    """Use the fused ops of kernels/; --no-fused runs the plain references."""
    graph: bool = True
    """Replay the pseudo-batch as one CUDA graph on a GPU."""
    mte: tuple[str, ...] = ()
    """Measure these students (student.pt …) against the teacher instead of training one."""
    mte_images: int = 1000
    """Test images on which both networks agree (paper: 1000); each is led to every other class."""
    shots: int = 0
    """Real training images per class that fine-tune the finished student, also with --resume (M); -1: all of them."""
    shot_steps: int = 1000
    """Fine-tuning steps of 128 images (ours)."""

    # Method; see SETTINGS. None: as --setting has it.
    setting: str = "auto"
    """A row of SETTINGS: cifar10 | mnist | digits; auto: by the data set."""
    pseudo_batches: int | None = None
    """Outer iterations N; both learning rates fall to zero over them. 0: no zero-shot phase."""
    evaluations: int | None = None
    """Rows of metrics.jsonl, tests, pictures and checkpoints in a run; the host waits for the device then only."""
    batch_size: int | None = None
    """Images of a pseudo-batch."""
    width: int | None = None
    """Channels of the generator's first layers (paper: 128)."""
    affine: bool | None = None
    """Let the generator learn its images' mean and scale (paper; off in DFAD and the released code before v3)."""
    n_student_iter: int | None = None
    """Student steps per pseudo-batch (n_S; the released code's own default, 7, is not what was run)."""
    lr_generator: float | None = None
    """Adam's initial learning rate of the generator (the paper prints 2e-3; code and logs have 1e-3)."""
    lr_student: float | None = None
    """Adam's initial learning rate of the student."""
    beta: float | None = None
    """Weight of each attention term (released flag: AT_beta); 0, or no common activations: no such term."""
    temperature: float | None = None
    """Divides both logits in the divergence (not in l1); no factor T^2."""
    divergence: str | None = None
    """kl (teacher || student) | reverse-kl | js | l1 (of logits)."""
    fresh_z: bool | None = None
    """New noise for every student step (Ferles et al., a reproduction: 1 to 3 points more on CIFAR-10)."""


# fmt: off
PAPER = dict(student="wrn_16_1", pseudo_batches=80000, evaluations=100, batch_size=128, width=128, n_generator_iter=1,
             n_student_iter=10, lr_generator=1e-3, lr_student=2e-3, beta=250.0, temperature=1.0, divergence="kl",
             fresh_z=False, affine=True, clip=5.0)  # clip: largest global norm of either gradient (released code only)
OURS = dict(PAPER, student="lenet5_half", evaluations=20, width=16, lr_generator=2e-3, lr_student=4e-3, beta=0.0,
            fresh_z=True, affine=False)  # how these were chosen: results/README.md
SETTINGS = {
    "cifar10": PAPER,  # SVHN: the same with 50,000 pseudo-batches
    "mnist": dict(OURS, pseudo_batches=600, width=32),
    "digits": dict(OURS, pseudo_batches=200),
}
# fmt: on
Z_DIM = 100


# Data: real images measure the student, and fine-tune it where --shots asks for that.
# Copied from teacher.py
def normalise(x, mean, std):
    """uint8 (N, C, H, W) -> float32 in units of the data set's standard deviation; mean, std: C numbers in [0, 1]."""
    mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    return x.float() * (1 / (255 * std)) - mean / std


# Networks: the paper's WRNs and its generator. LeNets and all others are factories, of teacher.py or of the user.
# Copied from teacher.py
class WideBlock(nn.Module):
    """Pre-activation block; the 1x1 shortcut, where channels change, reads the BN-ReLU'd input."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x):
        a = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (x if self.shortcut is None else self.shortcut(a))


# Copied from teacher.py
class WideResNet(nn.Module):
    """WRN-d-k: three groups of (d - 4) / 6 pre-activation blocks, widths 16k, 32k, 64k.

    Groups are the raw residual sums, before the next BatchNorm, as attention transfer takes them.
    """

    def __init__(self, depth, k, num_classes=10, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        c = 16
        for i, width in enumerate((16 * k, 32 * k, 64 * k), 1):
            stage = []
            for j in range((depth - 4) // 6):
                stage.append(WideBlock(c, width, 2 if i > 1 and j == 0 else 1))
                c = width
            setattr(self, f"block{i}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(c)
        self.linear = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward_groups(self, x):
        a1 = self.block1(self.conv1(x))  # (N, 16k, H, W)
        a2 = self.block2(a1)  # (N, 32k, H/2, W/2)
        a3 = self.block3(a2)  # (N, 64k, H/4, W/4)
        return self.linear(F.relu(self.bn(a3)).mean((2, 3))), (a1, a2, a3)

    def forward(self, x):
        return self.forward_groups(x)[0]


NETWORKS = {f"wrn_{d}_{k}": partial(WideResNet, d, k) for d, k in ((16, 1), (16, 2), (40, 1), (40, 2))}
load = partial(load_network, networks=NETWORKS)


class Generator(nn.Module):
    """Noise (N, 100) to normalised images (N, C, size, size): 1,051,145 parameters at width 128 and 3 x 32 x 32.

    Nothing bounds the pixels: the last BatchNorm, affine, gives the images their mean and scale, and they enter the
    networks as they are.
    """

    def __init__(self, width, channels, size, affine=True):
        super().__init__()
        self.shape = (width, size // 4, size // 4)
        self.linear = nn.Linear(Z_DIM, math.prod(self.shape))
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width // 2, 3, 1, 1), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, channels, 3, 1, 1), nn.BatchNorm2d(channels, affine=affine)

    def forward(self, z):
        x = self.bn0(self.linear(z).view(-1, *self.shape).contiguous(memory_format=torch.channels_last))
        x = F.leaky_relu(self.bn1(self.conv1(F.interpolate(x, scale_factor=2))), 0.2)  # (N, width, size/2, size/2)
        x = F.leaky_relu(self.bn2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)  # (N, width/2, size, size)
        return self.bn3(self.conv3(x))


# Losses
def disagreement(t_logits, s_logits, divergence, temperature, fused):
    """D, equation 1, of logits (N, K), or one of its alternatives: a mean over batch *and* classes."""
    if divergence == "l1":
        return (t_logits.float() - s_logits.float()).abs().mean()
    name = ("js_divergence" if divergence == "js" else "kl_divergence") + ("" if fused else "_ref")
    pair = (s_logits, t_logits) if divergence == "reverse-kl" else (t_logits, s_logits)
    return getattr(kernels, name)(*pair, temperature) / t_logits.shape[1]


def attention(groups, fused):
    """Attention maps of a teacher's groups: [(N, H W) fp32]."""
    return [(kernels.attention_map if fused else kernels.attention_map_ref)(a) for a in groups]


def attention_loss(groups, maps, fused):
    """Sum over the groups of A_l, the squared distance of attention maps, a mean over batch and positions."""
    loss = kernels.attention_transfer if fused else kernels.attention_transfer_ref
    return sum(loss(a, q) for a, q in zip(groups, maps, strict=True))


def logits_and_groups(model, x):
    """Groups are what attention transfer compares, () of a network that names none."""
    return model.forward_groups(x) if hasattr(model, "forward_groups") else (model(x), ())


# One pseudo-batch
class Game(nn.Module):
    """Generator and student with their optimisers; all that training changes is a parameter or a buffer here."""

    def __init__(self, teacher, student, setting, args):
        super().__init__()
        self.teacher, self.setting, cuda = teacher, setting, args.device == "cuda"  # the teacher is not a submodule
        self.student = student.model
        self.generator = Generator(setting["width"], *teacher.shape[:2], setting["affine"])
        self.register_buffer("preview_z", torch.randn(10, Z_DIM))
        self.register_buffer("step", torch.zeros(()))  # pseudo-batches done
        self.register_buffer("sums", torch.zeros(4))  # loss_G, loss_S, max p_T, max p_S since the last row
        self.to(args.device, memory_format=torch.channels_last)
        self.disagreement = partial(disagreement, **{k: setting[k] for k in ("divergence", "temperature", "fused")})
        self.optimizers = {}
        for name, model in (("generator", self.generator), ("student", self.student)):
            lr = torch.tensor(setting[f"lr_{name}"], device=args.device)  # where a graph can read what it becomes
            self.optimizers[name] = torch.optim.Adam(model.parameters(), lr, fused=True, capturable=cuda)
        self.amp = partial(torch.autocast, args.device, torch.bfloat16, args.bf16 and cuda, cache_enabled=False)

    def noise(self):
        return torch.randn(self.setting["batch_size"], Z_DIM, device=self.step.device)

    def update(self, name, loss):
        """Clip the gradient of one player's weights and step; no other gradient is formed."""
        parameters, optimizer = list(getattr(self, name).parameters()), self.optimizers[name]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, self.setting["clip"])
        optimizer.step()


def generator_step(game, z):
    """One step up on the disagreement of teacher and student, whose BatchNorms are in train mode (as released)."""
    with game.amp():
        x = game.generator(z)
        loss = -game.disagreement(game.teacher.model(x), game.student(x))
    game.update("generator", loss)
    return loss.detach()


@torch.no_grad()
def targets(game, z):
    """Images of the generator as it is now (N, C, H, W), the teacher's logits (N, K) and attention maps."""
    with game.amp():
        x = game.generator(z)
        logits, groups = logits_and_groups(game.teacher.model, x)
        return x, logits, attention(groups, game.setting["fused"]) if game.setting["beta"] else []


def student_step(game, x, t_logits, maps):
    """One step towards the teacher's answers; returns loss and logits, still on the device."""
    with game.amp():
        s_logits, groups = logits_and_groups(game.student, x)
        loss = game.disagreement(t_logits, s_logits)
        if beta := game.setting["beta"]:
            loss = loss + beta * attention_loss(groups, maps, game.setting["fused"])
    game.update("student", loss)
    return loss.detach(), s_logits.detach()


def pseudo_batch(game):
    """Algorithm 1's body: n_G generator steps, then n_S student steps, at the cosine's learning rates."""
    setting = game.setting
    cosine = (1 + torch.cos(math.pi / max(1, setting["pseudo_batches"]) * game.step)) / 2
    for name, optimizer in game.optimizers.items():
        optimizer.param_groups[0]["lr"].copy_(setting[f"lr_{name}"] * cosine)
    z = game.noise()
    for _ in range(setting["n_generator_iter"]):
        loss_g = generator_step(game, z)
    for i in range(setting["n_student_iter"]):
        if i == 0 or setting["fresh_z"]:
            x, t_logits, maps = targets(game, game.noise() if setting["fresh_z"] else z)
        loss_s, s_logits = student_step(game, x, t_logits, maps)
    tops = [logits.float().softmax(1).amax(1).mean() for logits in (t_logits, s_logits)]
    game.sums += torch.stack([loss_g, loss_s, *tops])
    game.step += 1


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


def draw_shots(images, labels, shots, seed):
    """`shots` images of each class, drawn at random; all of them for -1."""
    if shots > (least := labels.bincount().min()):
        fail(f"--shots {shots}: the smallest class has {least} images; pass at most so many, or -1 for all")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    index = torch.cat([shuffled[labels[shuffled] == k][: shots if shots > 0 else None] for k in labels.unique()])
    return images[index], labels[index]


def shot_loss(t_logits, t_groups, s_logits, groups, labels, setting):
    """0.1 CE + 28.8 D at temperature 4 + 12 beta / groups * A, as the authors' KD+AT baseline weighs them."""
    loss = 0.1 * F.cross_entropy(s_logits, labels)
    loss = loss + 28.8 * disagreement(t_logits, s_logits, "kl", 4.0, setting["fused"])
    if setting["beta"]:
        maps = attention(t_groups, setting["fused"])
        loss = loss + 12 * setting["beta"] / len(groups) * attention_loss(groups, maps, setting["fused"])
    return loss


def fine_tune(game, images, labels, args, run):
    """M-shot: distil real images (n, C, H, W) uint8 with labels (n,) into the student; metric `loss/shots`.

    Adam with a cosine from 5e-4, BatchNorms in eval mode (Ferles et al.); without a zero-shot phase from lr_student
    and in train mode. Augmentation (ours): one cyclic shift a batch, and of colour images one mirror.
    """
    setting, model, device, seeded = game.setting, game.student, game.step.device, random.Random(args.seed)
    images, labels, generator = images.to(device), labels.to(device), torch.Generator(device).manual_seed(args.seed)
    lr_0 = 5e-4 if setting["pseudo_batches"] else setting["lr_student"]
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(lr_0, device=device), fused=True)
    model.train(setting["pseudo_batches"] == 0)
    for step in (bar := tqdm(range(args.shot_steps), disable=None, desc="shots")):
        optimizer.param_groups[0]["lr"].fill_(lr_0 * (1 + math.cos(math.pi * step / args.shot_steps)) / 2)
        index = torch.randint(len(labels), (128,), generator=generator, device=device)
        x = normalise(images[index], game.teacher.mean, game.teacher.std)
        x = x.roll((seeded.randint(-2, 2), seeded.randint(-2, 2)), (2, 3))
        x = x.flip(3) if x.shape[1] == 3 and seeded.random() < 0.5 else x
        with torch.no_grad():
            answers = logits_and_groups(game.teacher.model, x)
        loss = shot_loss(*answers, *logits_and_groups(model, x), labels[index], setting)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, args.shot_steps // 10) == 0:
            bar.set_postfix(run.write({"shot_step": step + 1, "loss/shots": loss.item()}))


class Run(RunFolder):
    """One run's folder: args.json, metrics.jsonl, checkpoint.pt, student.pt, samples.png, result.json."""

    def __init__(self, args, game):
        self.game, self.previews = game, []  # (pseudo-batches, images (10, C, H, W))
        super().__init__(args, game.setting, free=("graph", "mte", "mte_images", "shots", "shot_steps"))

    def state(self):
        saved = {name: optimizer.state_dict() for name, optimizer in self.game.optimizers.items()}
        return saved | dict(game=self.game.state_dict(), previews=self.previews)

    def restore(self, saved):
        self.previews = saved["previews"]
        self.game.load_state_dict(saved["game"])
        for name, optimizer in self.game.optimizers.items():
            kernels.contract.restore_optimizer(optimizer, saved[name])
        shapes = {x.shape[1:] for _, x in self.previews}
        if len(shapes) > 1 or not 0 <= self.game.step <= self.game.setting["pseudo_batches"]:
            raise ValueError("its state does not belong together")

    @torch.no_grad()
    def after_window(self, n, window, bar, test):
        """The host's only wait: a row, a strip of the same ten z, a checkpoint."""
        names, game = ("loss/generator", "loss/student", "eval/max_p_teacher", "eval/max_p_student"), self.game
        row = dict(step=n) | dict(zip(names, (game.sums / window).tolist(), strict=True))
        if not all(math.isfinite(v) for v in row.values()):
            fail(f"the losses are not finite at pseudo-batch {n}; lower --lr-student or --lr-generator")
        game.sums.zero_()
        self.previews.append((n, game.generator.eval()(game.preview_z).cpu()))
        game.generator.train()
        self.show(bar, row | ({"eval/acc": evaluate(game.student, *test)} if test else {}))
        self.save()

    def draw(self):
        """samples.png: a row of the ten noise vectors' images for each of ten moments of the run."""
        teacher = self.game.teacher
        if self.previews:
            rows = dict(self.previews[round(i)] for i in np.linspace(0, len(self.previews) - 1, 10))  # ten or fewer
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (teacher.mean, teacher.std))
            images = (torch.stack([*rows.values()]) * std + mean).clamp(0, 1)
            sheet = rearrange(images, "r n c h w -> (r h) (n w) c").numpy()
            figure = Figure((8, 0.75 * len(rows)), layout="constrained")
            axis = figure.subplots()
            axis.imshow(sheet if sheet.shape[2] == 3 else sheet[:, :, 0], cmap="gray", extent=(0, 10, len(rows), 0))
            axis.set(xticks=[], yticks=np.arange(len(rows)) + 0.5, yticklabels=[f"step {n}" for n in rows])
            figure.savefig(self.out / "samples.png", dpi=100)


# Mean transition error
def measure_transitions(student, teacher, test, args):
    """Transition curves (2, n (K - 1), 100) over the test images, shuffled with seed 0 whatever --seed is."""
    order = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0)).to(test[1].device)
    x, labels, networks = normalise(test[0][order], *test[2:]), test[1][order], (student.model, teacher.model)
    x, goals = kernels.transition_pairs(*networks, x, labels, teacher.num_classes, args.mte_images)
    if not len(goals):
        fail(f"--mte {student.name}: it and the teacher agree on no test image; take a student that has learnt more")
    pairs = tqdm(list(zip(x.split(1000), goals.split(1000), strict=True)), disable=None, desc=student.name)
    return torch.cat([kernels.transition_curves(*networks, *pair, graph=args.graph).cpu() for pair in pairs], 1)


def compare_transitions(teacher, test, dataset, args):
    """--mte: the table of MTE and the figure of mean curves, one panel a student."""
    torch.backends.cudnn.allow_tf32 = False  # late gradients are tiny
    out, table, curves = Path(args.out), {}, {}
    for path in dict.fromkeys(args.mte):
        with one_line(f"--mte {path}", "pass a student.pt; of a file.py:factory, that too as --student"):
            fresh = args.student != "auto"  # an architecture: the file has its weights
            student = load(args.student if fresh else path, args, teacher=teacher, fresh=fresh)
            if fresh:
                kernels.contract.load_state(
                    student.model.requires_grad_(False).eval(), kernels.contract.load_weights(path), path
                )
            kernels.contract.try_out(student, *teacher.shape)
        if [*student.mean, *student.std] != [*teacher.mean, *teacher.std]:
            fail(f"--mte {path}: its images are normalised otherwise than the teacher's; their paths do not compare")
        with one_line(f"--out {out} cannot be used", "pass another folder"):
            out.mkdir(parents=True, exist_ok=True)
        student.name = path
        walked = measure_transitions(student, teacher, test, args)  # (2, n, 100)
        if not walked.isfinite().all():
            fail(f"--mte {path}: its probabilities are not finite; take another student")
        error = (walked[0] - walked[1]).abs().mean().item()
        table[path] = dict(mte=error, paths=walked.shape[1], accuracy=evaluate(student.model, *test))
        curves[f"{Path(path).parent.name}: MTE {error:.3f}"] = walked
        print(f"{path}:", ", ".join(f"{k} {v:.4g}" for k, v in table[path].items()))
    kernels.draw_transitions(curves, out / "mte.png")
    table = dict(steps=100, step_size=1.0, teacher=args.teacher, dataset=dataset, students=table)
    (out / "mte.json").write_text(json.dumps(table | kernels.contract.ran_on(args.device), indent=1) + "\n")
    print(f"wrote mte.json, mte.png into {out}")


# Main
def choose_setting(args, dataset):
    """The row of SETTINGS with the command line's values over it."""
    name = args.setting if args.setting != "auto" else dataset if dataset in SETTINGS else "cifar10"
    setting = SETTINGS[name] | {k: v for k in PAPER if (v := getattr(args, k, None)) not in (None, "auto")}
    if args.smoke:
        setting.update(pseudo_batches=min(setting["pseudo_batches"], 3), batch_size=16)
    return setting | dict(name=name, fused=args.fused)


def have_common_activations(teacher, student):
    """Whether both networks name groups, equally many, of equal height and width: then attention can be compared."""
    x = torch.zeros(2, len(teacher.mean), teacher.image_size, teacher.image_size, device=teacher.device)
    student.model.eval()  # a blank batch must not reach the moments
    t_sizes, s_sizes = ([a.shape[2:] for a in logits_and_groups(info.model, x)[1]] for info in (teacher, student))
    student.model.train()
    return bool(t_sizes) and t_sizes == s_sizes and all(len(size) == 2 for size in t_sizes)


def check_args(args):
    """Refuse impossible settings before anything is loaded or written."""
    least = dict(batch_size=2, width=2, shots=-1, lr_generator=1e-12, lr_student=1e-12, temperature=1e-6)
    least |= dict.fromkeys(("evaluations", "n_student_iter", "mte_images", "shot_steps"), 1)
    least |= dict.fromkeys(("seed", "image_size", "num_classes", "pseudo_batches", "beta"), 0)
    choices = dict(dataset=("auto", "digits", *FILES, "none"), setting=("auto", *SETTINGS))
    check_options(args, least, choices | {"divergence": (None, "kl", "reverse-kl", "js", "l1")})


def main(args):
    check_args(args)
    kernels.contract.seed_everything(args.seed)

    # The teacher, and the real images that measure (never train) the student.
    teacher = load_teacher(load, args)
    dataset, test = real_images(teacher, args)
    measures = dict(teacher_accuracy=teacher.accuracy, zero_shot_accuracy=None, student_accuracy=None)
    if test:
        test = *test, teacher.mean, teacher.std
        measures["teacher_accuracy"] = evaluate(teacher.model, *test)
    elif args.mte or args.shots:
        fail("--mte and --shots need real images: name their --dataset")
    if args.mte:
        return compare_transitions(teacher, test, dataset, args)
    if args.shots:
        real = draw_shots(*load_dataset(dataset, args.data_dir, "train"), args.shots, args.seed)

    # The student, and attention if the two networks have activations in common.
    setting = choose_setting(args, teacher.dataset if dataset == "none" else dataset)
    pair = f"{args.teacher} -> {setting['student']}"
    student = load_student(load, setting["student"], args, teacher)
    with one_line(f"--student {setting['student']}", "its forward_groups returns logits and a tuple of activations"):
        common = setting["beta"] and have_common_activations(teacher, student)
    if setting["beta"] and not common:
        if args.beta:
            fail(f"--beta {args.beta}: {pair} have no activations in common for attention transfer; use --beta 0")
        setting["beta"] = 0.0
        print(f"{pair}: no activations in common, so no attention transfer")

    # The game, in windows between which the host looks at it.
    game = Game(teacher, student, setting, args)
    run, total, n_windows = Run(args, game), setting["pseudo_batches"], setting["evaluations"]
    print(f"{pair}: {total} pseudo-batches, setting {setting['name']}, {args.device}, fused={args.fused}")
    step, done = kernels.Captured(partial(pseudo_batch, game), args.graph and args.device == "cuda"), int(game.step)
    bar = tqdm(total=total, initial=done, disable=None, mininterval=0.5)
    for end in sorted({n for i in range(n_windows) if (n := total * (i + 1) // n_windows) > done}):
        for _ in range(done, end):
            step()
            bar.update()
        run.after_window(end, end - done, bar, test)
        done = end
    bar.close()

    if test:
        measures["zero_shot_accuracy"] = measures["student_accuracy"] = evaluate(student.model, *test)
        if args.shots:
            fine_tune(game, *real, args, run)
            measures["student_accuracy"] = evaluate(student.model, *test)
        print(", ".join(f"{k.replace('_', ' ')} {v:.2f} %" for k, v in measures.items()))
    run.draw()
    run.save_student(student, teacher, "zskt", dataset, measures["student_accuracy"])
    run.finish(dict(teacher=teacher.name, student=student.name, dataset=dataset, shots=args.shots) | measures)


if __name__ == "__main__":
    main(tyro.cli(Args))
