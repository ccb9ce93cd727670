"""Whole steps of released loops, each beside ours with the same terms, values and random draws.

What a "released" column does, point by point. In brackets stands the section of our fact sheet of
that method (DI: DeepInversion, Z: zero-shot transfer, P: pseudo replay) that the point is from.

All loops: fp32, NCHW, no fused op, no graph [DI 4]; Adam or SGD as torch makes them by default.

DeepInversion, CIFAR class:
- the view is the image rolled by up to 2 pixels, not mirrored; it is not clipped [DI 1.3];
- R_feature by a forward hook a BatchNorm: a mean, and the biased variance of a permuted copy of the
  layer's input; norms not squared; the first layer counts once [DI 1.1, 4];
- total variation by four differences, each a norm over the batch; the l2 norm of the batch is
  computed, with weight 0 [DI 1.1, 1.3];
- the learning rate is constant, Adam has its default betas [DI 1.3];
- the teacher is in eval mode; its weights get gradients, which each step clears [DI 2.1, 2.17];
- the loss is read in each step; the best images are an alias, which costs nothing [DI 8].

DeepInversion, ImageNet class, at full resolution. As above, but:
- the first layer counts tenfold; l1 total variation is computed with weight 0, and the l2 norm is a
  mean over images [DI 1.1];
- the learning rate is set in each step: warm-up, then cosine; betas 0.5 and 0.9 [DI 1.2];
- pixels are clipped after each step, channel by channel in a Python loop [DI 1.2, 4];
- a step whose loss is the lowest so far clones the images [DI 1.2].

SRe2L-like. As the ImageNet class, but there is no warm-up, both priors have weight 0, and the last
images are kept [DI 6]; the teacher is frozen, and the priors are computed all the same (its code).
In place of its random crop, which it resizes, stands our roll, so that both see the same views; its
copy of the images in each step is left out.

Zero-shot transfer:
- one generator step, with the graph through teacher and student [Z 1.1, 4.6];
- ten student steps on images of the same noise; the generator runs again in each, and its images
  are not detached, so each backward pass goes through the generator too [Z 1.1, 4.9];
- the teacher is asked once, in the first student step, without gradient [Z 1.1]. We normalise its
  attention maps once as well; the sheet does not say;
- both networks are in train mode, the teacher in eval mode; no weights are frozen [Z 1.5];
- gradient norms are clipped; Adam; one step of two cosine schedules a pseudo-batch [Z 1.5];
- with fresh noise (a reproduction's variant): new noise in each student step, so the teacher is
  asked in each, still without gradient [Z 3.4].

Generative pseudo replay:
- one generator step; then ten student steps, each on new images, not detached [P 1.5, 5.8];
- each student step infers memory images with the decoder in eval mode: one step of a fresh Adam on
  the latents, whose backward pass fills the decoder's gradients too; then the decoder runs again
  [P 1.4, 5.7]. The teacher answers to all images with a graph that nothing uses [P 1.2];
- a VAE step after each of the first four: it infers memory images in train mode, asks the teacher
  for its answers to novel and memory images again, and steps two Adams [P 1.3, 1.5];
- the teacher is in eval mode; no weights are frozen [P 1.7, 5.9].

Left out everywhere: what is done once a run, and printing. On a GPU a fused step is bf16 and the
released one fp32, as each is by default.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import deepinversion
import kernels
import pseudo_replay
import zskt
from bench.steps import (
    N_STEPS,
    Case,
    clip_channels,
    hook_conventionally,
    make_ours,
    make_teacher,
    subtract_neighbours,
    time_makers,
)
from bench.timing import (
    Times,
    compute_ratio,
    mark_row,
    name_columns,
    run_in_turns,
    summarise_turns,
    take_turns,
)
from harness.errors import shorten_error
from harness.load import load_student, load_teacher
from harness.run import make_optimizer

NO_PRIORS = dict(alpha_tv_l1=0.0, alpha_tv_l2=0.0, alpha_l2=0.0)
IMAGENET = deepinversion.PRESETS["imagenet-1"]
CIFAR = "DeepInversion, CIFAR class"
IMAGENET_CLASS = "DeepInversion, ImageNet class"
SRE2L = "SRe2L-like, teacher frozen"
# What both columns of a row compute.
INVERSIONS = {
    CIFAR: deepinversion.PRESETS["cifar10-released"],
    IMAGENET_CLASS: IMAGENET,
    SRE2L: replace(IMAGENET, **NO_PRIORS, lr=0.25, alpha_bn=0.01, warmup=0),
}


@dataclass
class Comparison:
    """A row: a released loop and ours."""

    title: str
    shape: str
    make_released: Callable
    make_ours: Callable
    find_problem: Callable
    """It returns "", or why the two must not be compared."""

    def __str__(self):
        return f"{self.title} {self.shape}"


def is_close(losses, others, tolerance):
    """Whether all losses agree, relative to the larger of both lists' largest."""
    if len(losses) != len(others):
        return False
    largest = max(abs(value) for value in [*losses, *others])
    worst = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    return worst <= tolerance * largest  # false for NaN


# A synthesis step
def make_released_step(title, name, device, noise, labels):
    """A step of a released inversion loop as a function of no arguments; it returns the loss."""
    args = INVERSIONS[title]
    is_cifar = title == CIFAR
    network = make_teacher(name, device).requires_grad_(title != SRE2L)
    terms = []
    hook_conventionally(network, terms)
    x = noise.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], args.lr, args.betas)
    best = dict(loss=1e4, images=x.data)
    step = 0

    def sum_losses(view):
        """All terms, also those of weight 0."""
        terms.clear()
        ce = F.cross_entropy(network(view), labels)
        factors = [args.first_bn] + [1.0] * (len(terms) - 1)
        r_feature = sum(factor * term for factor, term in zip(factors, terms, strict=True))
        differences = subtract_neighbours(view)
        tv_l2 = sum(torch.norm(d) for d in differences)
        loss = ce + args.alpha_bn * r_feature + args.alpha_tv_l2 * tv_l2
        if is_cifar:
            return loss + args.alpha_l2 * torch.norm(view)
        l2 = torch.norm(view.reshape(len(view), -1), dim=1).mean()
        tv_l1 = sum(d.abs().mean() for d in differences)
        return loss + args.alpha_l2 * l2 + args.alpha_tv_l1 * tv_l1

    def run():
        nonlocal step
        if not is_cifar:
            rate = deepinversion.compute_cosine(step, N_STEPS, args.lr, args.warmup)
            optimizer.param_groups[0]["lr"] = rate
        step += 1

        view = torch.roll(x, (1, -1), (2, 3))
        optimizer.zero_grad()
        network.zero_grad()
        loss = sum_losses(view)
        loss.backward()
        optimizer.step()

        if not is_cifar:
            clip_channels(x)
        value = loss.item()
        if value < best["loss"]:
            best["loss"] = value
            if title == IMAGENET_CLASS:
                best["images"] = x.data.clone()
        return value

    return run


def make_our_step(title, name, device, noise, labels):
    """Ours with the terms of that loop; it returns deepinversion.TERMS."""
    return make_ours(name, device, noise, labels, INVERSIONS[title])


def find_step_problem(title, name, device, noise, labels):
    """Whether the first three losses differ; on a GPU the first, because ours is in bf16."""
    inputs = (title, name, device, noise, labels)
    released = make_released_step(*inputs)
    ours = make_our_step(*inputs)
    n_steps = 1 if device == "cuda" else 3
    losses = [released() for _ in range(n_steps)]
    total = deepinversion.TERMS.index("total")
    others = [ours()[total].item() for _ in range(n_steps)]
    tolerance = 2e-2 if device == "cuda" else 1e-4
    if is_close(losses, others, tolerance):
        return ""
    return f"first losses differ: released {losses}, ours {others}"


def compare_inversion(device, title, case):
    """The row of one inversion loop and one network; case: steps.Case."""

    def call(function):
        return function(title, case.name, device, *case.make_inputs(device))

    return Comparison(
        title,
        str(case),
        partial(call, make_released_step),
        partial(call, make_our_step),
        partial(call, find_step_problem),
    )


# One pseudo-batch of zero-shot transfer
def thaw(*networks):
    """Networks as released code has them: weights that get gradients, in NCHW."""
    for network in networks:
        network.requires_grad_(True).to(memory_format=torch.contiguous_format)


def run_in_nchw(generator):
    """Have a generator of ours compute in NCHW: its forward pass lays its first map out otherwise.

    The hook copies a map of a sixteenth of the images' size.
    """
    generator.bn0.register_forward_pre_hook(lambda module, inputs: inputs[0].contiguous())


def make_players(args, device):
    """Teacher, student and generator of a pseudo-batch, the same in both columns."""
    torch.manual_seed(0)
    teacher, info = load_teacher(args, device)
    student, _ = load_student(args.student, info, device)
    generator = zskt.Generator(args.width, info.channels, info.image_size, args.affine)
    return teacher, student, generator.to(device, memory_format=torch.channels_last)


def make_our_pseudo_batch(args, device):
    """The pseudo-batch of zskt.py as a function of no arguments; it returns its METRICS."""
    teacher, student, generator = make_players(args, device)
    optimizers = {
        "generator": make_optimizer("adam", generator, args.lr_generator),
        "student": make_optimizer("adam", student, args.lr_student),
    }
    figures = torch.zeros(len(zskt.METRICS), device=device)

    def play():
        figures.copy_(zskt.play_pseudo_batch(teacher, student, generator, optimizers, args))

    step = kernels.CapturedStep(play, enabled=device == "cuda")

    def run():
        step()
        return figures

    return run


def map_attention(groups):
    """Mean squares over the channels, normalised over the positions: a list of (N, H W)."""
    return [F.normalize(a.pow(2).mean(1).view(len(a), -1)) for a in groups]


def diverge(t_logits, s_logits):
    """KL(teacher || student), a mean over batch and classes."""
    log_p_s = F.log_softmax(s_logits, 1)
    return F.kl_div(log_p_s, F.softmax(t_logits, 1), reduction="sum") / t_logits.numel()


def make_released_pseudo_batch(args, device):
    """The released solver's pseudo-batch as a function of no arguments.

    It returns the losses of the generator and of the last student step.
    """
    teacher, student, generator = make_players(args, device)
    thaw(teacher, student, generator)
    run_in_nchw(generator)
    adam_g = torch.optim.Adam(generator.parameters(), args.lr_generator)
    adam_s = torch.optim.Adam(student.parameters(), args.lr_student)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    schedules = [cosine(adam, args.pseudo_batches) for adam in (adam_g, adam_s)]

    def update(learner, adam, loss):
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), args.clip_grad)
        adam.step()

    def compare_answers(t_logits, t_maps, x):
        """The student's loss."""
        s_logits, s_groups = student.forward_groups(x)
        loss = diverge(t_logits, s_logits)
        if not args.beta:
            return loss
        s_maps = map_attention(s_groups)
        distances = [(a - b).pow(2).mean() for a, b in zip(s_maps, t_maps, strict=True)]
        return loss + args.beta * sum(distances)

    def run():
        z = torch.randn(args.batch_size, zskt.Z_DIM, device=device)
        x = generator(z)
        loss_g = -diverge(teacher(x), student(x))
        update(generator, adam_g, loss_g)

        for i in range(args.n_student_iter):
            if args.fresh_z:
                z = torch.randn(args.batch_size, zskt.Z_DIM, device=device)
            x = generator(z)
            if args.fresh_z or i == 0:
                with torch.no_grad():
                    t_logits, t_groups = teacher.forward_groups(x)
                    t_maps = map_attention(t_groups)
            loss_s = compare_answers(t_logits, t_maps, x)
            update(student, adam_s, loss_s)

        for schedule in schedules:
            schedule.step()
        return loss_g.item(), loss_s.item()

    return run


def find_pseudo_batch_problem(args, device):
    """Whether the losses of generator and student differ, with one student step and in fp32."""
    args = replace(args, n_student_iter=1, bf16=False)
    released = make_released_pseudo_batch(args, device)
    ours = make_our_pseudo_batch(args, device)
    torch.manual_seed(1)
    losses = released()
    torch.manual_seed(1)
    others = ours()[:2].tolist()
    tolerance = 2e-2 if device == "cuda" else 1e-3  # TF32
    if is_close(losses[:1], others[:1], tolerance) and is_close(losses[1:], others[1:], tolerance):
        return ""
    return f"first losses differ: released {losses}, ours {others}"


def compare_pseudo_batch(device, teacher, student, fresh_z, sizes):
    """The row of one pair of networks; sizes: options of zskt.py."""
    args = replace(zskt.PRESETS["cifar10"], teacher=teacher, student=student, fresh_z=fresh_z)
    args = replace(args, **sizes)
    noise = "fresh noise" if fresh_z else "same noise"
    return Comparison(
        f"zero-shot transfer, {noise}",
        f"{teacher} to {student}, batch {args.batch_size}, width {args.width}",
        partial(make_released_pseudo_batch, args, device),
        partial(make_our_pseudo_batch, args, device),
        partial(find_pseudo_batch_problem, args, device),
    )


# One inner iteration of generative pseudo replay
def make_replay_networks(args, device):
    """pseudo_replay.Networks, the same in both columns."""
    torch.manual_seed(0)
    teacher, info = load_teacher(args, device)
    student, _ = load_student(args.student, info, device)
    return pseudo_replay.make_networks(teacher, student, info, args, device)


def make_our_iteration(args, device):
    """The inner iteration of pseudo_replay.py as a function of no arguments; it returns (3,):
    the losses of generator, student and memory."""
    networks = make_replay_networks(args, device)
    optimizers = pseudo_replay.make_optimizers(networks, args)
    losses = torch.zeros(3, device=device)

    def iterate():
        losses.copy_(pseudo_replay.train_iteration(networks, optimizers, args))

    step = kernels.CapturedStep(iterate, enabled=device == "cuda")

    def run():
        step()
        return losses

    return run


def balance(t_logits, args):
    """The terms of predictive and of categorical entropy, weighted."""
    onehot = F.cross_entropy(t_logits, t_logits.argmax(1))
    p = F.softmax(t_logits, 1).mean(0)
    return args.alpha_onehot * onehot + args.alpha_entropy * (p * p.log10()).sum()


def make_released_iteration(args, device):
    """The released inner iteration as a function of no arguments; it returns the same losses."""
    networks = make_replay_networks(args, device)
    teacher = networks.teacher
    student = networks.student
    generator = networks.generator
    encoder = networks.memory.encoder
    decoder = networks.memory.decoder
    thaw(teacher, student, generator, encoder, decoder)
    run_in_nchw(generator)
    run_in_nchw(decoder)
    adam_g = torch.optim.Adam(generator.parameters(), args.lr_generator)
    adam_e = torch.optim.Adam(encoder.parameters(), args.lr_memory)
    adam_m = torch.optim.Adam(decoder.parameters(), args.lr_memory)
    if args.optimizer == "adam":
        optimizer_s = torch.optim.Adam(student.parameters(), args.lr_student)
    else:
        optimizer_s = torch.optim.SGD(
            student.parameters(), args.lr_student, momentum=0.9, weight_decay=5e-4
        )

    def make_images():
        return generator(torch.randn(args.batch_size, args.latent, device=device))

    def teach_generator():
        adam_g.zero_grad()
        x = make_images()
        t_logits, features = pseudo_replay.forward_with_features(teacher, x)
        loss = balance(t_logits, args)
        if args.alpha_act:
            loss = loss - args.alpha_act * features.abs().mean()
        temperature = pseudo_replay.J_TEMPERATURE
        j = kernels.js_released(t_logits.detach(), student(x), temperature) / t_logits.shape[1]
        loss = loss + 1 - j.clamp(0, 1)
        loss.backward()
        adam_g.step()
        return loss

    def infer_images():
        z = torch.randn(args.n_memory, args.latent, device=device, requires_grad=True)
        adam_z = torch.optim.Adam([z], pseudo_replay.LATENT_LR)
        adam_z.zero_grad()
        loss = balance(teacher(decoder(z)), args)
        loss = loss + (z.var(0) - 1).square().mean() + z.mean(0).square().mean()
        loss.backward()
        adam_z.step()
        return decoder(z).detach()

    def teach_student(novel):
        optimizer_s.zero_grad()
        decoder.eval()
        x = torch.cat([novel, infer_images()])
        decoder.train()
        loss = F.l1_loss(student(x), teacher(x).detach())
        loss.backward()
        optimizer_s.step()
        return loss

    def teach_memory(novel):
        adam_m.zero_grad()
        adam_e.zero_grad()
        x = torch.cat([novel[: args.batch_size // 2].detach(), infer_images()])
        t_logits = teacher(x).detach()
        mean, log_variance = encoder(x)
        rebuilt = decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        loss = F.l1_loss(rebuilt, x) + F.l1_loss(teacher(rebuilt), t_logits)
        loss = loss + args.alpha_kl * pseudo_replay.prior_loss(mean, log_variance)
        loss.backward()
        adam_m.step()
        adam_e.step()
        return loss

    def run():
        loss_g = teach_generator()
        for i in range(args.n_student_iter):
            novel = make_images()
            loss_s = teach_student(novel)
            if i < args.n_memory_iter:
                loss_m = teach_memory(novel)
        return loss_g.item(), loss_s.item(), loss_m.item()

    return run


def find_iteration_problem(args, device):
    """Whether the losses differ, with one student step and one of the memory, in fp32."""
    args = replace(args, n_student_iter=1, n_memory_iter=1, bf16=False)
    released = make_released_iteration(args, device)
    ours = make_our_iteration(args, device)
    torch.manual_seed(1)
    losses = released()
    torch.manual_seed(1)
    others = ours().tolist()
    tolerance = 2e-2 if device == "cuda" else 1e-3  # TF32
    for loss, other in zip(losses, others, strict=True):
        if not is_close([loss], [other], tolerance):
            return f"first losses differ: released {losses}, ours {others}"
    return ""


def compare_replay(device, teacher, student, sizes):
    """The row of one pair of networks; sizes: options of pseudo_replay.py."""
    args = replace(pseudo_replay.PRESETS["cifar10"], teacher=teacher, student=student, **sizes)
    return Comparison(
        "pseudo replay",
        f"{teacher} to {student}, batch {args.batch_size}, width {args.width}",
        partial(make_released_iteration, args, device),
        partial(make_our_iteration, args, device),
        partial(find_iteration_problem, args, device),
    )


# All rows: the most valuable first, because a GPU may be there for minutes
STEPS = {
    "cpu": [
        (CIFAR, Case("resnet34_cifar", 32, 32)),
        (CIFAR, Case("resnet20", 32, 100)),
        (CIFAR, Case("mobilenet_v2_cifar", 32, 32)),
        (IMAGENET_CLASS, Case("resnet18", 224, 4)),
        (IMAGENET_CLASS, Case("resnet50", 224, 4)),
        (IMAGENET_CLASS, Case("efficientnet_lite0", 224, 4)),
        (SRE2L, Case("resnet18", 224, 4)),
        (SRE2L, Case("resnet50", 224, 4)),
    ],
    "cuda": [
        (IMAGENET_CLASS, Case("resnet50", 224, 64)),
        (IMAGENET_CLASS, Case("resnet18", 224, 128)),
        (CIFAR, Case("resnet34_cifar", 32, 256)),
        (CIFAR, Case("resnet20", 32, 256)),
        (SRE2L, Case("resnet18", 224, 100)),
        (SRE2L, Case("resnet50", 224, 64)),
        (IMAGENET_CLASS, Case("efficientnet_lite0", 224, 64)),
        (CIFAR, Case("mobilenet_v2_cifar", 32, 256)),
    ],
    "smoke": [
        (CIFAR, Case("resnet8", 8, 4)),
        (IMAGENET_CLASS, Case("resnet8", 8, 4)),
        (SRE2L, Case("resnet8", 8, 4)),
    ],
}
WRN = ("cifar10-wrn-16-1", "wrn_16_1")
LENET = ("digits-lenet5", "lenet5_half")
RESNET = ("cifar10-resnet20", "resnet8")
DIGITS = dict(optimizer="adam", lr_student=4e-3, alpha_act=0.0)  # as the preset of digits has it
PSEUDO_BATCHES = {
    "cpu": [
        (*WRN, dict(batch_size=32, width=128)),
        (*WRN, dict(batch_size=32, width=16)),
        (*LENET, dict(batch_size=128, width=16)),
    ],
    "cuda": [(*WRN, dict(batch_size=128, width=128)), (*LENET, dict(batch_size=128, width=16))],
    "smoke": [(*LENET, dict(batch_size=8, width=8))],
}
REPLAYS = {
    "cpu": [
        (*RESNET, dict(batch_size=32, width=32, latent=100)),
        (*LENET, DIGITS | dict(batch_size=128, width=16, latent=64)),
    ],
    "cuda": [(*RESNET, dict(batch_size=1024, width=128, latent=1000))],
    "smoke": [(*LENET, DIGITS | dict(batch_size=16, width=8, latent=8))],
}


def list_comparisons(options):
    """All rows of a device."""
    device = options.device
    sizes = options.sizes
    inversions = [compare_inversion(device, title, case) for title, case in STEPS[sizes]]
    pseudo_batches = []
    for teacher, student, chosen in PSEUDO_BATCHES[sizes]:
        for fresh_z in (False, True):
            row = compare_pseudo_batch(device, teacher, student, fresh_z, chosen)
            pseudo_batches.append(row)
    replays = [compare_replay(device, *chosen) for chosen in REPLAYS[sizes]]
    if device == "cuda":  # where time may run out
        return list(take_turns(inversions, pseudo_batches, replays))
    return [*inversions, *pseudo_batches, *replays]


def measure(comparison, options):
    """Times of both columns, the ratio released / ours as Times, and the number of rounds.

    Or {column: why it cannot be timed}.
    """
    makers = {"released": comparison.make_released, "ours": comparison.make_ours}
    if options.device == "cuda":
        times, _, problems = time_makers(makers, options)
        if problems:
            return problems
        median = times["released"].median / times["ours"].median
        low = times["released"].p20 / times["ours"].p80
        high = times["released"].p80 / times["ours"].p20
        return times, Times(median, low, high), None
    functions = {name: make() for name, make in makers.items()}
    turns = run_in_turns(functions, 10 * options.seconds, options.n_least)
    ratio = compute_ratio(turns, "released", "ours")
    return summarise_turns(turns), ratio, len(turns.wall["ours"])


def compare_released(comparison, options):
    """The row of a comparison; marked and not timed where the first losses differ."""
    known = dict(op=f"released: {comparison.title}", shape=comparison.shape, mode="released")
    try:
        problem = comparison.find_problem()
    except Exception as error:  # a kernel that does not compile, launch or fit the memory
        problem = shorten_error(error)
    if problem:
        return mark_row(problem, **known)

    try:
        measured = measure(comparison, options)
    except Exception as error:
        return mark_row(shorten_error(error), **known)
    if isinstance(measured, dict):
        return mark_row(" ".join(measured.values()), **known)
    times, ratio, n_rounds = measured
    row = dict(known)
    for name, time in times.items():
        row |= name_columns(name, time)
    row |= dict(times_ours=ratio.median, times_ours_p20=ratio.p20, times_ours_p80=ratio.p80)
    row |= dict(times_ours_wall=ratio.wall, rounds=n_rounds)
    figures = f"{times['released'].median:9.1f} {times['ours'].median:9.1f}"
    spread = f"{ratio.median:6.2f} ({ratio.p20:.2f} to {ratio.p80:.2f})"
    print(f"{comparison.title:34} {comparison.shape:52} {figures} {spread}")
    return row


def bench_released(options):
    """All released loops beside ours; yields the rows as they are measured."""
    print(f"\n{'released loop':34} {'shape':52} {'released':>9} {'ours':>9}  released / ours (ms)")
    for comparison in options.choose(list_comparisons(options)):
        yield compare_released(comparison, options)
