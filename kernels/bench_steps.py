"""Whole steps for `python -m kernels.bench`: side by side in one process, ratios only within a table.

A DeepInversion step with all terms on, columns:
- bare: the frozen teacher's forward pass and input gradient, eager, channels_last (bf16 on a GPU), nothing else: what
  a loop without fused ops cannot avoid;
- conventional: the loop as it is usually written: teacher not frozen, NCHW, forward hooks that take the mean and then
  the variance of a permuted copy, four shifted tensors for the total variation, one `.item()` a step; fp32 and, on a
  GPU, also with autocast (`conventional amp`);
- tuned: what a careful user gets from PyTorch alone: our loop with the plain references and hooks: frozen,
  channels_last, bf16 on a GPU, no host sync; `tuned compile`: with torch.compile of loss and gradient; `tuned compile
  graph`: that, captured in a CUDA graph;
- ours: `deepinversion.synthesis_step`; on a GPU one CUDA graph; and with each part turned off.
Limit: the longer of minimal bytes / copy bandwidth and FLOPs / matrix rate. Bytes: each convolution and linear layer
reads its input and weights and writes its output, and back; each BatchNorm with what follows moves 2 + 3 times its
size (3 + 5 with an addition). FLOPs are those of the bare column, as torch.utils.flop_counter counts them.

A pseudo-batch of zero-shot knowledge transfer with attention terms: one generator step, ten student steps on images of
one z, columns:
- conventional: the loop as released: the generator runs again in each student step, with its graph; teacher not
  frozen and asked again each time; NCHW, fp32, one `.item()` a step;
- ours: `zskt.pseudo_batch`, fused (on a GPU as one CUDA graph), with the plain references, and with fresh z.
"""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deepinversion
import kernels
import zskt
from kernels.bench import can_compile, peak_mb, percent_of_limit, time_together
from kernels.fuse import FusedBatchNorm


def conventional_step(x, labels, model, optimizer, setting, terms, amp=False):
    """The loop as most public code has it. `terms` collects what the forward hooks of `hook_conventionally` saw."""
    optimizer.zero_grad()
    model.zero_grad()
    view = torch.roll(x, (1, -1), (2, 3))
    terms.clear()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = model(view)
    loss = F.cross_entropy(logits.float(), labels) + setting["alpha_bn"] * sum(terms)
    differences = [view[:, :, :, :-1] - view[:, :, :, 1:], view[:, :, :-1] - view[:, :, 1:]]
    differences += [view[:, :, :-1, :-1] - view[:, :, 1:, 1:], view[:, :, 1:, :-1] - view[:, :, :-1, 1:]]
    loss = loss + setting["alpha_tv_l2"] * sum(torch.norm(d) for d in differences)
    loss = loss + setting["alpha_tv_l1"] * sum(d.abs().mean() for d in differences)
    loss = loss + setting["alpha_l2"] * torch.norm(view.reshape(len(view), -1), dim=1).mean()
    loss.backward()
    optimizer.step()
    for c in range(x.shape[1]):
        x.data[:, c] = torch.clamp(x.data[:, c], -2.0, 2.0)
    return loss.item()


def hook_conventionally(model, terms):
    """Forward hooks with a mean pass and a variance of a permuted copy, as public implementations have them."""

    def hook(module, inputs, output):
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        terms.append(torch.norm(module.running_var - var, 2) + torch.norm(module.running_mean - mean, 2))

    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.register_forward_hook(hook)


def teacher_of(name, device):
    """A network with moments as a trained one has them: neither 0 nor 1."""
    torch.manual_seed(0)
    model = deepinversion.NETWORKS[name](**(dict(num_classes=1000) if name in kernels.contract.PUBLIC else {}))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.3, 0.7)  # keeps deep residual networks in range
    return model.to(device).eval()


def frozen(name, device):
    return teacher_of(name, device).requires_grad_(False).to(memory_format=torch.channels_last)


def minimal_bytes(model, x):
    """Bytes that one step must move, by the rule in the file's header; x: images (N, C, H, W) in a step's dtype."""
    moved = []

    def count(module, inputs, result):
        tensors = [t for t in (*inputs, result[0] if isinstance(result, tuple) else result) if torch.is_tensor(t)]
        if isinstance(module, FusedBatchNorm):
            moved.append((8 if len(tensors) == 3 else 5) * tensors[0].numel())
        else:
            moved.append(2 * (sum(t.numel() for t in tensors) + module.weight.numel()))

    fused = kernels.fuse_batchnorm(model, nn.BatchNorm2d)
    for m in fused.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, FusedBatchNorm)):
            m.register_forward_hook(count)
    with torch.no_grad():
        fused(x)
    for m in fused.modules():
        m._forward_hooks.clear()  # they share their convolutions with `model`
    return sum(moved) * x.element_size()


FUSED = ("fused", "fused_bn", "fused_distance", "fused_view")
OFF = {"ours --no-fused-bn": ("fused_bn",), "ours --no-fused-distance": ("fused_distance",),
       "ours --no-fused-view": ("fused_view",), "ours --no-graph": ("graph",), "tuned": (*FUSED, "graph")}  # fmt: skip


def ours(name, device, noise, labels, off=(), compiled=False):
    """`deepinversion.synthesis_step` of one network as a function of no arguments; `off`: parts not taken."""
    setting = deepinversion.SETTINGS["cifar10"] | dict(alpha_l2=1e-5, alpha_tv_l1=1e-3, bf16=True, warmup=None)
    setting |= {part: part not in off for part in (*FUSED, "graph")} | dict(sync_moments=False)
    model, stage = frozen(name, device), (10**4, 1, 2)
    teacher = SimpleNamespace(
        model=model, low=torch.tensor(-2.0, device=device), high=torch.tensor(2.0, device=device)
    )
    teacher.measured = deepinversion.measured(model, setting, device)
    draws = deepinversion.drawn(0, (1, 1, 1, 1), setting | dict(stages=[stage]), 0)[1][0]
    x = noise.clone(memory_format=torch.channels_last)
    work = deepinversion.begin(x, labels, draws, stage, teacher, setting)
    loss = torch.compile(deepinversion.synthesis_loss) if compiled else deepinversion.synthesis_loss

    def step():
        with patch.object(deepinversion, "synthesis_loss", loss):
            deepinversion.synthesis_step(work)

    captured = kernels.Captured(step, enabled=setting["graph"])

    def run():  # a benchmark may take more steps than the stage has
        captured()
        work.step.remainder_(stage[0])
        return work.terms

    return run


def bare_teacher(name, device, noise):
    """The frozen network and the images as the bare column has them."""
    plain = frozen(name, device)
    x_bare = noise.clone(memory_format=torch.channels_last)
    if device == "cuda":  # weights in bf16 once: autocast would cast those of a frozen network in every step
        plain, x_bare = plain.to(torch.bfloat16), x_bare.to(torch.bfloat16)
    return plain, x_bare.requires_grad_()


def bare(name, device, noise, labels):
    plain, x = bare_teacher(name, device, noise)

    def run():
        torch.autograd.grad(F.cross_entropy(plain(x).float(), labels), x)

    return run


def conventional(name, device, noise, labels, amp=False):
    setting = deepinversion.SETTINGS["cifar10"] | dict(alpha_l2=1e-5, alpha_tv_l1=1e-3)
    usual, terms, x = teacher_of(name, device), [], noise.clone().requires_grad_()
    hook_conventionally(usual, terms)
    adam = torch.optim.Adam([x], lr=0.1)
    return partial(conventional_step, x, labels, usual, adam, setting, terms, amp)


def step_columns(device):
    """{column: maker of a function to time, called with network, device, noise and labels}."""
    gpu = device == "cuda"
    columns = dict(bare=bare, conventional=conventional)
    columns |= {"conventional amp": partial(conventional, amp=True)} if gpu else {}
    columns["ours"] = ours
    columns |= {column: partial(ours, off=off) for column, off in OFF.items() if gpu or off != ("graph",)}
    if can_compile(device):
        columns["tuned compile"] = partial(ours, off=OFF["tuned"], compiled=True)
    if gpu:
        columns["tuned compile graph"] = partial(ours, off=FUSED, compiled=True)
    return columns


def time_made(makers, device, seconds):
    """time_together for functions that are made first; on a GPU one after another, for all at once may not fit it.

    Returns {name: (p50, p20, p80)} in ms and {name: peak memory in MB, None on a CPU}.
    """
    if device == "cpu":
        return time_together({name: make() for name, make in makers.items()}, device, seconds), dict.fromkeys(makers)
    rounds, peaks = [], {}
    for names in (list(makers), list(makers)[::-1]):
        rounds.append({})
        for name in names:
            torch._dynamo.reset()
            made = {}

            def build_and_run(name=name, made=made):  # a graph's memory is its own from the capture on
                made[name] = makers[name]()
                for _ in range(5):
                    made[name]()

            peaks[name] = peak_mb(build_and_run, device)
            rounds[-1] |= time_together(made, device, seconds / 2)
            made.clear()
            torch.cuda.empty_cache()
    return {name: max(rounds[0][name], rounds[1][name]) for name in makers}, peaks


def step_cost(name, device, noise, labels):
    """Minimal bytes of a step, and FLOPs of the bare one."""
    plain, x = bare_teacher(name, device, noise)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(plain(x * 1).float(), labels).backward()
    return minimal_bytes(plain, x.detach()), counter.get_total_flops()


def first_losses_agree(name, device, noise, labels):
    """Gate: fused and plain steps from the same noise have the same terms, to what their precision allows."""
    terms = []
    for off in ((), OFF["tuned"]):
        terms.append(ours(name, device, noise, labels, off)()[:-1].double())
    return torch.allclose(*terms, rtol=2e-2 if device == "cuda" else 1e-4)  # bf16 rounds in other places


def bench_step(device, seconds, limits, name, size, batch_size):
    """One synthesis step of one network; returns one row per column."""
    labels = torch.arange(batch_size, device=device) % 10
    noise = torch.randn(batch_size, 3, size, size, device=device)
    if not first_losses_agree(name, device, noise, labels):
        raise SystemExit(f"step of {name}: fused and plain disagree; not timed")
    n_bytes, flops = step_cost(name, device, noise, labels)
    makers = {column: partial(make, name, device, noise, labels) for column, make in step_columns(device).items()}
    ms, peaks = time_made(makers, device, seconds)
    bound = 1e3 * max(n_bytes / limits.bandwidth, flops / limits.flops)
    print(f"\none step, {name}, {batch_size} images of {size} px, {device}, all terms on; at least {bound:.2f} ms:")
    print(f"{n_bytes / 1e9:.2f} GB, {flops / 1e9:.1f} GFLOP")
    print(f"{'column':26} {'ms':>9} {'p20':>9} {'p80':>9} {'x bare':>7} {'x conv.':>8} {'images/s':>9} {'%limit':>7}")
    rows = []
    for column, (p50, p20, p80) in ms.items():
        to_bare, to_usual, rate = p50 / ms["bare"][0], p50 / ms["conventional"][0], 1e3 * batch_size / p50
        percent = percent_of_limit(p50, n_bytes, flops, limits)
        line = (
            f"{column:26} {p50:9.2f} {p20:9.2f} {p80:9.2f} {to_bare:7.2f} {to_usual:8.2f} {rate:9.0f} {percent:7.1f}"
        )
        print(line)
        row = dict(op=f"step: {column}", shape=f"{name} {batch_size}x3x{size}x{size}", mode="step", ours_ms=p50)
        row |= dict(ours_p20_ms=p20, ours_p80_ms=p80, times_bare=to_bare, times_conventional=to_usual)
        row |= dict(minimal_bytes=n_bytes, flops=flops, percent_of_limit=percent, images_per_s=rate)
        rows.append(row | dict(peak_mb=peaks[column]))
    return rows


def conventional_pseudo_batch(teacher, student, generator, adams, batch_size, beta):
    """Zero-shot knowledge transfer as the released code runs it; returns the generator's loss."""
    values, z = [], torch.randn(batch_size, 100, device=next(student.parameters()).device)

    def maps(groups):
        return [F.normalize(a.pow(2).mean(1).view(len(a), -1)) for a in groups]

    for i in range(11):  # the generator's step, then the student's ten
        model, adam = (generator, adams[0]) if i == 0 else (student, adams[1])
        adam.zero_grad()
        x = generator(z)
        t_logits, t_groups = teacher.forward_groups(x)
        s_logits, s_groups = student.forward_groups(x)
        kl = F.kl_div(F.log_softmax(s_logits, 1), F.softmax(t_logits, 1), reduction="sum") / t_logits.numel()
        distances = [(a - b).pow(2).mean() for a, b in zip(maps(s_groups), maps(t_groups), strict=True)]
        loss = -kl if i == 0 else kl + beta * sum(distances)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        adam.step()
        values.append(loss.item())
    return values[0]


def bench_pseudo_batch(device, seconds, teacher_name, student_name, width, batch_size):
    """One pseudo-batch of a shipped teacher and a fresh student; returns one row per column."""

    def game(**options):
        torch.manual_seed(0)
        args = zskt.Args(device=device, batch_size=batch_size, width=width, n_student_iter=10, **options)
        teacher = zskt.load(teacher_name, args)
        student = zskt.load(student_name, args, teacher=teacher, fresh=True)
        return zskt.Game(teacher, student, zskt.choose_setting(args, "cifar10"), args)

    usual = game()
    networks = [usual.teacher.model.requires_grad_(True), usual.student, usual.generator]
    networks = [model.to(memory_format=torch.contiguous_format) for model in networks]
    adams = torch.optim.Adam(usual.generator.parameters(), 1e-3), torch.optim.Adam(usual.student.parameters(), 2e-3)
    conventional = partial(conventional_pseudo_batch, *networks, adams, batch_size, 250.0)
    columns, games = {"conventional": conventional}, {}
    for name, options in (
        ("ours", {}),
        ("ours --no-fused", dict(fused=False)),
        ("ours --fresh-z", dict(fresh_z=True)),
    ):
        games[name] = game(**options)
        columns[name] = kernels.Captured(partial(zskt.pseudo_batch, games[name]), enabled=device == "cuda")
    torch.manual_seed(1)
    expected = conventional()
    torch.manual_seed(1)
    columns["ours"]()
    if not abs(games["ours"].sums[0].item() - expected) < (0.1 if device == "cuda" else 1e-3) * abs(expected):  # bf16
        raise SystemExit(f"pseudo-batch {teacher_name}: disagrees with the conventional loop; not timed")
    ms = time_together(columns, device, seconds)
    title = f"{teacher_name} to {student_name}"
    print(f"\none pseudo-batch, {title}, {batch_size} images, generator of width {width}, {device}")
    print(f"{'column':16} {'ms':>9} {'p20':>9} {'p80':>9} {'x conventional':>15}")
    rows = []
    for name, (p50, p20, p80) in ms.items():
        to_usual = p50 / ms["conventional"][0]
        print(f"{name:16} {p50:9.2f} {p20:9.2f} {p80:9.2f} {to_usual:15.2f}")
        shape = f"{title}, batch {batch_size}, width {width}"
        row = dict(op=f"pseudo-batch: {name}", shape=shape, mode="pseudo-batch", ours_ms=p50, ours_p20_ms=p20)
        rows.append(row | dict(ours_p80_ms=p80, times_conventional=to_usual))
    return rows


def bench_steps(device, seconds, limits):
    """All tables of whole steps: ImageNet, CIFAR and small ones on a GPU, small ones on a CPU."""
    rows, steps = [], [("resnet20", 32, 100)]
    if device == "cuda":
        steps = [("resnet50", 224, 64), ("resnet18", 224, 128), ("resnet34_cifar", 32, 256)]
        steps += [("resnet20", 32, 256), ("resnet20", 32, 64)]
    for step in steps:
        rows += bench_step(device, seconds, limits, *step)
    rows += bench_pseudo_batch(device, seconds, "digits-lenet5", "lenet5_half", 16, 128)
    wide = (128, 128) if device == "cuda" else (32, 16)  # a CPU would take minutes for the paper's size
    return rows + bench_pseudo_batch(device, seconds, "cifar10-wrn-16-1", "wrn_16_1", *wide)
