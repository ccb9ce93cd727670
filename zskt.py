"""Zero-shot knowledge transfer: a student learns from a teacher on images that a generator invents.

Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019,
arXiv:1905.09768. A generator seeks images on which the student disagrees with the teacher; the
student learns to agree with the teacher on them. No real image is needed.

    loss_G = -D(x),    loss_S = D(x) + beta * sum_l a_l(x)  (equation 1),    x = G(z),  z ~ N(0, I)

D is the divergence of their beliefs (`disagreement`), a_l the distance of their attention maps
(`attention_loss`). Run `python zskt.py`, or with `--teacher mnist-lenet5`. It writes student.pt,
samples.png (rows: the same ten z over time), metrics.jsonl, result.json, args.json, checkpoint.pt.
Metrics, means over the pseudo-batches since the last row: `loss/generator`, `loss/student` (at the
last student step), `eval/max_p_teacher`, `eval/max_p_student` (the largest probability);
`loss/shots` of fine-tuning; `eval/acc`, percent of real test images. Measured, final iterate, 3
seeds, one CPU thread: MNIST, LeNet-5 to its half, 96.42 ± 0.42 %, at most 436 s; digits 93.70 ±
0.64 %, 92 s. Nothing ran on a GPU.

Where we differ from the paper and its released code:
- the ten student steps share one batch. The released code runs the generator again in each step and
  gets the same images; only its running moments, which pictures use, differ;
- presets `mnist` and `digits` are ours (`OURS`); `cifar10` has the paper's and the released code's
  values; its default pair is smaller than the paper's;
- attention transfer between all networks with groups of equal sizes; bf16 activations on a GPU;
- --divergence l1 is DFAD's loss (arXiv:1912.11006) without DFAD's other changes;
- how the authors fine-tune on M real images of a class is not published; see `fine_tune`.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from harness.data import evaluate, load_real_images, normalise
from harness.errors import fail, fail_in_one_line
from harness.images import to_uint8
from harness.load import choose_preset_by_dataset, load_student, load_teacher
from harness.networks import list_learning
from harness.pictures import draw_rows
from harness.run import (
    MethodOptions,
    RunFolder,
    autocast,
    check_at_least,
    choose_device,
    make_optimizer,
    parse_args,
    restore_optimizer,
    seed_everything,
)

MOST_EVALUATIONS = 100_000  # their steps are listed before the first one


@dataclass
class Args(MethodOptions):
    # Run settings
    setting: Literal["cifar10", "mnist", "digits"] = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else of the teacher's data set, else cifar10;
    without a teacher digits."""
    teacher: str = "cifar10-wrn-16-1"
    """Shipped name (teachers/index.json), a checkpoint of teacher.py (.pt), or file.py:factory."""
    student: str = "wrn_16_1"
    """Network to train: a name of harness/networks.py, a shipped name, or file.py:factory."""
    out: str = "runs/zskt/default"
    """Output folder."""
    evaluations: int = 100
    """How often a run is tested; each test also writes a row of metrics and a checkpoint."""
    shots: int = 0
    """M: fine-tune the finished student on M real training images of each class; -1: all. May be
    added with --resume."""
    shot_steps: int = 1000
    """Fine-tuning steps of 128 images (ours)."""

    # Method
    pseudo_batches: int = 80000
    """N: over them both learning rates fall to 0 (paper; SVHN: 50,000). 0: no zero-shot phase."""
    batch_size: int = 128
    """Images of a pseudo-batch (released code)."""
    n_generator_iter: int = 1
    """n_G: generator steps in a pseudo-batch (paper)."""
    n_student_iter: int = 10
    """n_S: student steps in a pseudo-batch (paper; 7, the released default, was not used)."""
    lr_generator: float = 1e-3
    """Adam's initial learning rate of the generator (released code and logs; paper: 2e-3)."""
    lr_student: float = 2e-3
    """Adam's initial learning rate of the student (paper)."""
    beta: float = 250.0
    """Weight of each attention term (paper; released flag: AT_beta); 0: no attention transfer."""
    temperature: float = 1.0
    """tau: divides both logits in the divergence, except in l1 (paper); no factor tau^2."""
    divergence: Literal["kl", "reverse-kl", "js", "l1"] = "kl"
    """D; kl: KL(teacher || student) (paper); reverse-kl, js: what the paper compares it with; l1:
    distance of the logits (DFAD)."""
    fresh_z: bool = False
    """Draw new noise for every student step (a reproduction by Ferles et al.: +1 to +3 points)."""
    width: int = 128
    """Channels of the generator's first layers (released code)."""
    affine: bool = True
    """Let the generator learn its images' mean and scale (released code; off in DFAD)."""
    clip_grad: float = 5.0
    """Largest L2 norm of either network's gradient (released code)."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(-1, self, "shots")
        check_at_least(0, self, "pseudo_batches", "beta")
        check_at_least(1, self, "evaluations", "shot_steps", "n_generator_iter", "n_student_iter")
        check_at_least(2, self, "batch_size", "width")
        check_at_least(1e-6, self, "temperature", "clip_grad")
        check_at_least(1e-12, self, "lr_generator", "lr_student")
        if self.evaluations > MOST_EVALUATIONS:
            expected = f"expected at most {MOST_EVALUATIONS}"
            raise ValueError(f"--evaluations: {expected}, got {self.evaluations}")


PUBLISHED = Args()  # the paper's and the released code's values, between smaller networks
OURS = replace(  # how we chose these values: results/NOTES.md
    PUBLISHED,
    student="lenet5_half",
    evaluations=20,
    lr_generator=2e-3,
    lr_student=4e-3,
    beta=0.0,
    fresh_z=True,
    affine=False,
)
PRESETS = {
    "cifar10": PUBLISHED,
    "mnist": replace(OURS, setting="mnist", teacher="mnist-lenet5", pseudo_batches=600, width=32),
    "digits": replace(
        OURS, setting="digits", teacher="digits-lenet5", pseudo_batches=200, width=16
    ),
}


def choose_preset(teacher, dataset):
    """The preset of a run without --setting."""
    return choose_preset_by_dataset(PRESETS, teacher, dataset)


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        pseudo_batches=min(args.pseudo_batches, 3),
        batch_size=16,
        shot_steps=min(args.shot_steps, 10),
    )


# The generator
Z_DIM = 100


class Generator(nn.Module):
    """Noise (N, 100) to images (N, C, size, size); 1,051,145 parameters at width 128, 3 x 32 x 32.

    No sigmoid or tanh bounds the pixels. The last BatchNorm gives the images mean 0 and deviation 1
    (affine: learnt ones), and the networks take them as they are, as normalised images.
    """

    def __init__(self, width, channels, size, affine=True):
        super().__init__()
        self.shape = (width, size // 4, size // 4)
        self.linear = nn.Linear(Z_DIM, math.prod(self.shape))
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width // 2, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, channels, 3, 1, 1)
        self.bn3 = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, z):
        x = self.linear(z).view(-1, *self.shape)  # (N, width, size/4, size/4)
        x = self.bn0(x.contiguous(memory_format=torch.channels_last))

        x = F.interpolate(x, scale_factor=2)  # (N, width, size/2, size/2)
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)

        x = F.interpolate(x, scale_factor=2)  # (N, width, size, size)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)  # (N, width/2, size, size)

        return self.bn3(self.conv3(x))  # (N, C, size, size)


# Losses
def disagreement(t_logits, s_logits, divergence, temperature, fused):
    """D(x), the first term of equation 1: how far the student's beliefs are from the teacher's.

    "kl" is the paper's D_KL(T(x) || S(x)). Written out, with logits (N, K) and the temperature tau:

        log_p_t = (t_logits / tau).log_softmax(1)  # (N, K)
        log_p_s = (s_logits / tau).log_softmax(1)  # (N, K)
        D = (log_p_t.exp() * (log_p_t - log_p_s)).mean()

    The mean is over batch *and* classes, as in the released code. The ops of kernels/ sum over the
    classes, hence the division by K. The paper compares "kl" with "reverse-kl" and "js".
    """
    n_classes = t_logits.shape[1]

    if divergence == "l1":
        return (t_logits.float() - s_logits.float()).abs().mean()

    if divergence == "js":
        js_divergence = kernels.js_divergence if fused else kernels.js_divergence_ref
        return js_divergence(t_logits, s_logits, temperature) / n_classes

    kl_divergence = kernels.kl_divergence if fused else kernels.kl_divergence_ref
    if divergence == "reverse-kl":
        return kl_divergence(s_logits, t_logits, temperature) / n_classes
    return kl_divergence(t_logits, s_logits, temperature) / n_classes


def attention_maps(groups, fused):
    """q_l = f(A_l) / ||f(A_l)||_2 of the teacher's groups A_l: a list of (N, H W).

    f is the mean square over the channels. Written out, for a group a (N, C, H, W):

        q = F.normalize(a.square().mean(1).flatten(1))
    """
    attention_map = kernels.attention_map if fused else kernels.attention_map_ref
    return [attention_map(a) for a in groups]


def attention_loss(groups, maps, fused):
    """The sum over l of a_l, the second term of equation 1: how far apart the attention maps are.

    Written out, for the student's groups a and the teacher's maps q_t:

        a_l = (F.normalize(a.square().mean(1).flatten(1)) - q_t).square().mean()

    This is the squared distance, a mean over batch and positions, as in the released code, whose
    beta it needs. The paper prints the distance itself.
    """
    attention_transfer = kernels.attention_transfer if fused else kernels.attention_transfer_ref
    loss = 0
    for a, q in zip(groups, maps, strict=True):
        loss = loss + attention_transfer(a, q)
    return loss


def forward_with_groups(network, x):
    """Logits (N, K), and activations whose attention is compared: () without `forward_groups`."""
    if hasattr(network, "forward_groups"):
        return network.forward_groups(x)
    return network(x), ()


# One pseudo-batch
def update(network, optimizer, loss, clip_grad):
    """One step of `network` down its loss. No gradient of any other network is formed."""
    parameters = list_learning(network)
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, clip_grad)
    optimizer.step()


def play_pseudo_batch(teacher, student, generator, optimizers, args):
    """The body of algorithm 1: n_G generator steps, then n_S student steps.

    Args:
        teacher: frozen, in eval mode.
        student, generator: in train mode throughout, also while the other one learns, as released.
        optimizers: {"generator": …, "student": …}.

    Returns:
        (4,): loss_G, loss_S at the last student step, and there the largest probabilities of
        teacher and student, means over the batch. Nothing waits for the device.
    """
    device = next(student.parameters()).device
    z = torch.randn(args.batch_size, Z_DIM, device=device)

    for _ in range(args.n_generator_iter):
        with autocast(device.type, args.bf16):
            x = generator(z)  # (N, C, H, W)
            loss_g = -disagreement(
                teacher(x), student(x), args.divergence, args.temperature, args.fused
            )
        update(generator, optimizers["generator"], loss_g, args.clip_grad)

    for i in range(args.n_student_iter):
        if args.fresh_z:
            z = torch.randn(args.batch_size, Z_DIM, device=device)
        if args.fresh_z or i == 0:
            with torch.no_grad(), autocast(device.type, args.bf16):
                x = generator(z)  # of the generator that has just been updated
                t_logits, t_groups = forward_with_groups(teacher, x)
                if args.beta:
                    t_maps = attention_maps(t_groups, args.fused)

        with autocast(device.type, args.bf16):
            s_logits, s_groups = forward_with_groups(student, x)
            loss_s = disagreement(  # equation 1
                t_logits, s_logits, args.divergence, args.temperature, args.fused
            )
            if args.beta:
                loss_s = loss_s + args.beta * attention_loss(s_groups, t_maps, args.fused)
        update(student, optimizers["student"], loss_s, args.clip_grad)

    max_p_teacher = t_logits.float().softmax(1).amax(1).mean()
    max_p_student = s_logits.detach().float().softmax(1).amax(1).mean()
    return torch.stack([loss_g.detach(), loss_s.detach(), max_p_teacher, max_p_student])


# The game
METRICS = ("loss/generator", "loss/student", "eval/max_p_teacher", "eval/max_p_student")


def set_learning_rate(optimizer, lr_0, step, n_steps):
    """A cosine from lr_0 at step 0 to 0 at n_steps, written into the tensor that a step reads.

    In fp32, as in the runs of results/: a game's course depends on the rate's last bit.
    """
    cosine = (1 + torch.cos(math.pi / n_steps * torch.tensor(float(step)))) / 2
    optimizer.param_groups[0]["lr"].fill_((lr_0 * cosine).item())


def list_window_ends(n_steps, n_windows):
    """The last step of each window. Lengths differ by at most one step; no window is empty."""
    ends = {n_steps * (i + 1) // n_windows for i in range(n_windows)}
    return sorted(ends - {0})


def choose_evenly(items, n):
    """n of the items at even distances, the first and the last among them; some twice if few."""
    if not items:
        return []
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


@torch.no_grad()
def generate_preview(generator, z, info):
    """Pixels (n, C, H, W) uint8, made with the running moments of the generator's BatchNorms."""
    generator.eval()
    images = to_uint8(generator(z), info)
    generator.train()
    return images.cpu()


def train(teacher, info, student, test, run):
    """Play all pseudo-batches, in windows; the host waits for the device only where one ends.

    Args:
        teacher, student: networks.
        info: NetworkInfo of the teacher.
        test: real images and labels that measure the student, or None.
        run: RunFolder.

    Returns:
        [(step, images (10, C, H, W) uint8), …]: what the generator made of the same ten z, at ten
        moments or fewer.
    """
    args = run.args
    n_steps = args.pseudo_batches

    generator = Generator(args.width, info.channels, info.image_size, args.affine)
    preview_z = torch.randn(10, Z_DIM).to(run.device)
    generator.to(run.device, memory_format=torch.channels_last)
    optimizers = {
        "generator": make_optimizer("adam", generator, args.lr_generator),
        "student": make_optimizer("adam", student, args.lr_student),
    }

    steps_done = 0
    previews = []
    with run.open_checkpoint() as saved:
        if saved is not None:
            steps_done = saved["step"]
            for end, images in saved["previews"]:
                # an error unless they are ten such pictures
                previews.append((end, images.view(10, *info.image_shape)))
            generator.load_state_dict(saved["generator"])
            student.load_state_dict(saved["student"])
            for name, optimizer in optimizers.items():
                restore_optimizer(optimizer, saved["optimizers"][name])

    sums = torch.zeros(len(METRICS), device=run.device)  # of the figures since the last row

    def play():
        sums.add_(play_pseudo_batch(teacher, student, generator, optimizers, args))

    run_step = kernels.CapturedStep(play, enabled=args.graph and run.device == "cuda")

    bar = tqdm(total=n_steps, initial=steps_done, disable=None, mininterval=0.5)
    ends = list_window_ends(n_steps, args.evaluations)
    preview_ends = choose_evenly(ends, 10)
    for end in ends:
        if end <= steps_done:
            continue  # --resume: this window is finished

        for step in range(steps_done, end):
            set_learning_rate(optimizers["generator"], args.lr_generator, step, n_steps)
            set_learning_rate(optimizers["student"], args.lr_student, step, n_steps)
            run_step()
            bar.update()

        means = (sums / (end - steps_done)).tolist()
        sums.zero_()
        steps_done = end

        if end in preview_ends:
            previews.append((end, generate_preview(generator, preview_z, info)))

        row = {"step": end}
        row.update(zip(METRICS, means, strict=True))
        if test is not None:
            row["eval/acc"] = evaluate(student, *test, info)
        run.show(bar, row)

        state = {"step": end, "previews": previews, "optimizers": {}}
        state["generator"] = generator.state_dict()
        state["student"] = student.state_dict()
        for name, optimizer in optimizers.items():
            state["optimizers"][name] = optimizer.state_dict()
        run.save_checkpoint(state)
    bar.close()
    return previews


# Fine-tuning on M real images of each class (section 4.2)
def draw_shots(images, labels, shots, seed):
    """`shots` images of each class, drawn at random, and their labels; all of them for -1."""
    least = labels.bincount().min()
    if shots > least:
        advice = "pass at most so many, or -1 for all"
        fail(f"--shots {shots}: the smallest class has {least} images; {advice}")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for k in labels.unique():
        of_class = shuffled[labels[shuffled] == k]
        if shots != -1:
            of_class = of_class[:shots]
        chosen.append(of_class)
    index = torch.cat(chosen)
    return images[index], labels[index]


def shot_loss(t_answers, s_answers, labels, beta, fused):
    """The loss of the authors' baseline KD+AT, whose weights are those of its released code:

        0.1 CE + 28.8 D + 12 beta / n_groups * sum_l a_l,    D at temperature 4

    Its code has 3 beta' / n_groups with beta' = 1000: we take beta' = 4 beta, with the beta of
    equation 1, 250.

    Args:
        t_answers, s_answers: logits and groups of teacher and student.
        labels: (N,).
        beta: 0: no attention transfer.
        fused: as in Args.
    """
    t_logits, t_groups = t_answers
    s_logits, s_groups = s_answers
    loss = 0.1 * F.cross_entropy(s_logits, labels)
    loss = loss + 28.8 * disagreement(t_logits, s_logits, "kl", 4.0, fused)
    if beta:
        maps = attention_maps(t_groups, fused)
        loss = loss + 12 * beta / len(s_groups) * attention_loss(s_groups, maps, fused)
    return loss


def fine_tune(teacher, info, student, shot_images, run):
    """Distil real images into the student; metric `loss/shots`.

    After a zero-shot phase: Adam with a cosine from 5e-4, BatchNorms in eval mode, as in a
    reproduction (Ferles et al.); that one has no attention term, and a penalty on the distance
    from the initial weights, which we leave out. Without a zero-shot phase: Adam with a cosine from
    lr_student, in train mode (the authors' baseline: SGD). The augmentation is ours: one cyclic
    shift of a whole batch and, of colour images, one mirror.

    Args:
        teacher, student: networks.
        info: NetworkInfo of the teacher.
        shot_images: images (n, C, H, W) uint8 and labels (n,).
        run: RunFolder.
    """
    args = run.args
    images = shot_images[0].to(run.device)
    labels = shot_images[1].to(run.device)
    noise = torch.Generator(run.device).manual_seed(args.seed)  # the same after any training
    moves = random.Random(args.seed)

    lr_0 = 5e-4 if args.pseudo_batches else args.lr_student
    optimizer = make_optimizer("adam", student, lr_0)
    student.train(args.pseudo_batches == 0)

    bar = tqdm(range(args.shot_steps), disable=None, desc="shots")
    for step in bar:
        set_learning_rate(optimizer, lr_0, step, args.shot_steps)
        index = torch.randint(len(labels), (128,), generator=noise, device=run.device)
        x = normalise(images[index], info)  # (128, C, H, W)
        x = x.roll((moves.randint(-2, 2), moves.randint(-2, 2)), (2, 3))
        if x.shape[1] == 3 and moves.random() < 0.5:
            x = x.flip(3)

        with torch.no_grad():
            t_answers = forward_with_groups(teacher, x)
        s_answers = forward_with_groups(student, x)
        loss = shot_loss(t_answers, s_answers, labels[index], args.beta, args.fused)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if (step + 1) % max(1, args.shot_steps // 10) == 0:
            run.show(bar, {"shot_step": step + 1, "loss/shots": loss.item()})


# Main
@torch.no_grad()
def share_activations(teacher, student, info):
    """Whether both networks return as many groups, with equal heights and widths."""
    device = next(student.parameters()).device
    x = torch.zeros(2, *info.image_shape, device=device)
    student.eval()  # a blank batch must not reach the running moments
    _, t_groups = forward_with_groups(teacher, x)
    _, s_groups = forward_with_groups(student, x)
    student.train()
    t_sizes = [a.shape[2:] for a in t_groups]
    s_sizes = [a.shape[2:] for a in s_groups]
    return len(t_sizes) > 0 and t_sizes == s_sizes and all(len(size) == 2 for size in t_sizes)


def main(args):
    device = choose_device(args.device)
    if args.smoke:
        args = shrink(args)
    seed_everything(args.seed)

    # The teacher, and the real images that measure the student.
    teacher, info = load_teacher(args, device)
    dataset, test = load_real_images(info, args, device)
    if args.shots:
        _, real = load_real_images(info, args, "cpu", split="train")
        if real is None:
            fail("--shots needs real images: name their --dataset")
        shot_images = draw_shots(*real, args.shots, args.seed)

    # The student, and attention transfer if the two networks have activations in common.
    student, student_info = load_student(args.student, info, device)
    pair = f"{info.name} -> {student_info.name}"
    advice = "let its forward_groups return logits and a tuple of activations"
    with fail_in_one_line(f"--student {args.student}", advice):
        comparable = args.beta == 0 or share_activations(teacher, student, info)
    if not comparable:
        args = replace(args, beta=0.0)
        print(f"{pair}: no activations in common, so no attention transfer")

    run = RunFolder(args, device, may_change=("shots", "shot_steps"))
    print(f"{pair}: {args.pseudo_batches} pseudo-batches, setting {args.setting}, {device}")
    previews = train(teacher, info, student, test, run)

    teacher_accuracy = info.accuracy
    zero_shot_accuracy = None
    accuracy = None
    if test is not None:
        teacher_accuracy = evaluate(teacher, *test, info)
        zero_shot_accuracy = evaluate(student, *test, info)
        accuracy = zero_shot_accuracy
        print(f"teacher {teacher_accuracy:.2f} %, zero-shot student {zero_shot_accuracy:.2f} %")
    if args.shots:  # then there are test images too, of the same data set
        fine_tune(teacher, info, student, shot_images, run)
        accuracy = evaluate(student, *test, info)
        print(f"fine-tuned student {accuracy:.2f} %")

    if previews:
        rows = [(f"step {step}", images) for step, images in previews]
        with run.write_file("samples.png") as file:
            draw_rows(rows, file)
    student_info = replace(student_info, dataset=dataset, accuracy=accuracy)
    run.save_student(student, student_info, "zskt")
    run.finish(
        dict(
            teacher=info.name,
            student=student_info.name,
            dataset=dataset,
            shots=args.shots,
            teacher_accuracy=teacher_accuracy,
            zero_shot_accuracy=zero_shot_accuracy,
            student_accuracy=accuracy,
        )
    )


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
