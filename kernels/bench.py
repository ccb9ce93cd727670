"""Benchmarks: `python -m kernels.bench` on a GPU, `python -m kernels.bench --cpu` for the CPU path.

One process, the same tensors for every column; medians with the 20th and 80th percentile; ratios only within a row.
Before an op is timed it must agree with its float64 reference on that very shape, or no time is printed.

Op rows: `eager` is the plain reference, `compile` torch.compile of it (GPU only: on a CPU it needs a compiler),
`ours` the op of this package. Minimal bytes: every input read once and every gradient written once, with one more
read of the input in the backward pass. % of copy: these bytes per second over those of `dst.copy_(src)`, 256 MB,
measured in the same run.

Step rows (`--end-to-end`, always with --cpu): one DeepInversion step on CIFAR-10's ResNet-20 with all terms.
- bare: the frozen teacher's forward pass and input gradient, nothing else: what no implementation can avoid;
- conventional: the loop as it is usually written: teacher not frozen, NCHW, fp32 (on a GPU too, where the others use
  bf16 activations), forward hooks that take the mean and then the variance of a permuted copy, four shifted tensors
  for the total variation, one `.item()` a step;
- ours: `deepinversion.synthesis_step`, fused and with the plain references.

Pseudo-batch rows (with the step rows): one generator step and ten student steps of zero-shot knowledge transfer with
attention terms, all ten on images of one z.
- conventional: the loop as released: the generator runs again in each student step, with its graph; teacher not
  frozen and asked again each time; NCHW, fp32, one `.item()` a step;
- ours: `zskt.pseudo_batch`, fused (on a GPU as one CUDA graph), with the plain references, and with fresh z.
"""

import argparse
import csv
import statistics
import subprocess
import time
from datetime import date
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
from kernels._common import triton

TRITON_VERSION = f"triton {getattr(triton, '__version__', 'absent')}"
COPY_BYTES = 256 * 2**20


def time_together(functions, device, seconds=3.0):
    """Time each function for about `seconds`; returns {name: (p50, p20, p80)} in ms.

    On a CPU the functions take turns, every other round backwards, so that no one always follows the same neighbour
    and a drifting machine slows all alike. On a GPU triton's do_bench times each (it clears the cache in between),
    in both orders; the slower of the two medians counts.
    """
    if device == "cuda":
        rounds = []
        for names in (list(functions), list(functions)[::-1]):
            options = dict(warmup=25, rep=max(100, int(500 * seconds)), quantiles=[0.5, 0.2, 0.8])
            rounds.append({name: tuple(triton.testing.do_bench(functions[name], **options)) for name in names})
        return {name: max(rounds[0][name], rounds[1][name]) for name in functions}
    times = {name: [] for name in functions}
    for run in functions.values():
        run()
        run()
    deadline, n_rounds = time.perf_counter() + seconds * len(functions), 0
    while time.perf_counter() < deadline or n_rounds < 20:
        for name in list(functions)[:: -1 if n_rounds % 2 else 1]:
            start = time.perf_counter()
            functions[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        n_rounds += 1
    return {name: tuple(statistics.quantiles(t, n=10)[i] for i in (4, 1, 7)) for name, t in times.items()}


def copy_bandwidth(device):
    """Bytes per second of a large copy, counting what is read and what is written."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    ms = time_together({"copy": lambda: target.copy_(source)}, device, 1.0)["copy"][0]
    return 2 * COPY_BYTES / (ms / 1e3)


def op_cases(device):
    """Yields (op, shape, layout, function, inputs, minimal bytes of forward, of forward + backward)."""
    channels_last = torch.channels_last
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [(100, 16, 32, 32), (100, 64, 8, 8)] if device == "cpu" else [(256, 64, 32, 32), (64, 256, 56, 56)]
    for shape in layers:
        for layout, memory_format in (("channels_last", channels_last), ("contiguous", torch.contiguous_format)):
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            moments = torch.randn(shape[1], device=device), torch.rand(shape[1], device=device)
            size = x.numel() * x.element_size()
            yield "bn_moment_loss", shape, layout, kernels.bn_moment_loss, (x, *moments), size, 3 * size
    for shape in [(100, 3, 32, 32)] if device == "cpu" else [(256, 3, 32, 32), (64, 3, 224, 224)]:
        x = torch.randn(shape, device=device).contiguous(memory_format=channels_last).requires_grad_()
        size = x.numel() * x.element_size()
        yield "total_variation", shape, "channels_last", kernels.total_variation, (x,), size, 3 * size
    for shape in [(100, 10), (100, 1000)] if device == "cpu" else [(256, 10), (256, 1000), (256, 21841)]:
        p, q = (torch.randn(shape, device=device).mul_(3).requires_grad_() for _ in range(2))
        size = 2 * p.numel() * p.element_size()
        yield "js_divergence", shape, "contiguous", kernels.js_divergence, (p, q), size, 3 * size
    for shape in [(128, 10), (128, 1000)]:  # the student's step: the teacher's logits are constants
        p, q = (torch.randn(shape, device=device).mul_(3).requires_grad_(needs) for needs in (False, True))
        size = p.numel() * p.element_size()
        yield "kl_divergence", shape, "contiguous", kernels.kl_divergence, (p, q), 2 * size, 5 * size
    groups = [(128, 16, 32, 32), (128, 32, 32, 32), (128, 64, 8, 8), (128, 6, 28, 28)]  # of two WRNs, of LeNet-5
    layouts = [("channels_last", channels_last)] * len(groups) + [("contiguous", torch.contiguous_format)]
    for shape, (layout, memory_format) in zip([*groups, groups[0]], layouts, strict=True):
        target = kernels.attention_map_ref(torch.randn(shape, device=device))
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        size, maps = x.numel() * x.element_size(), target.numel() * target.element_size()
        n_bytes = size + maps, 3 * size + 2 * maps
        yield "attention_transfer", shape, layout, kernels.attention_transfer, (x, target), *n_bytes


def as_scalar(value):
    """total_variation returns two losses: their weighted sum, so that both gradients are at work."""
    return value[0] + 1e-3 * value[1] if isinstance(value, tuple) else value


def agrees(function, reference, inputs):
    """Gate: value and gradients are as near the float64 reference as the fp32 reference is, by the tests' rule."""

    def values(run, inputs):
        leaves = [x for x in inputs if x.requires_grad]
        value = as_scalar(run(*inputs))
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    exact = values(reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    for ours, eager, true in zip(values(function, inputs), values(reference, inputs), exact, strict=True):
        allowed = 2 * (eager.double() - true).abs().max() + 4 * torch.finfo(ours.dtype).eps * true.abs().max()
        if not (ours.double() - true).abs().max() <= allowed:
            return False
    return True


def bench_ops(device, seconds):
    """One row per op, shape and mode."""
    peak = copy_bandwidth(device)
    print(f"copy of {COPY_BYTES >> 20} MB: {peak / 1e9:.1f} GB/s; times in ms, ratio = eager / ours\n")
    print(f"{'op':18} {'shape':16} {'layout':14} {'mode':8}     eager   compile      ours  ratio  %copy")
    rows = []
    for op, shape, layout, function, inputs, *n_bytes in op_cases(device):
        reference = getattr(kernels, f"{op}_ref")
        if not agrees(function, reference, inputs):
            raise SystemExit(f"{op} {shape} {layout}: disagrees with its float64 reference; not timed")
        columns = {"eager": reference, "ours": function}
        if device == "cuda":
            columns["compile"] = torch.compile(reference)
        leaves = [x for x in inputs if x.requires_grad]

        def forward(run, inputs=inputs):
            with torch.no_grad():
                run(*inputs)

        def both(run, inputs=inputs, leaves=leaves):
            torch.autograd.grad(as_scalar(run(*inputs)), leaves)

        for mode, call, moved in zip(("forward", "both"), (forward, both), n_bytes, strict=True):
            ms = time_together({k: partial(call, run) for k, run in columns.items()}, device, seconds)
            rate = moved / (ms["ours"][0] / 1e3)
            row = dict(op=op, shape="x".join(map(str, shape)), layout=layout, mode=mode, dtype=str(inputs[0].dtype))
            for column, (p50, p20, p80) in ms.items():
                row |= {f"{column}_ms": p50, f"{column}_p20_ms": p20, f"{column}_p80_ms": p80}
            rows.append(row | dict(minimal_bytes=moved, gb_per_s=rate / 1e9, percent_of_copy=100 * rate / peak))
            cells = [f"{ms[k][0]:9.4f}" if k in ms else f"{'-':>9}" for k in ("eager", "compile", "ours")]
            ratio = ms["eager"][0] / ms["ours"][0]
            cells += [f"{ratio:6.2f}", f"{100 * rate / peak:6.1f}"]
            print(f"{op:18} {row['shape']:16} {layout:14} {mode:8} {' '.join(cells)}")
    return rows


def conventional_step(x, labels, model, optimizer, setting, terms):
    """The loop as most public code has it. `terms` collects what the forward hooks of `hook_conventionally` saw."""
    optimizer.zero_grad()
    model.zero_grad()
    view = torch.roll(x, (1, -1), (2, 3))
    terms.clear()
    loss = F.cross_entropy(model(view), labels) + setting["alpha_bn"] * sum(terms)
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


def bench_step(device, seconds, batch_size=100):
    """One synthesis step of ResNet-20 on 32 px, every term switched on; returns one row per column."""
    import deepinversion

    def network():
        torch.manual_seed(0)
        model = deepinversion.NETWORKS["resnet20"]()
        for m in model.modules():  # moments as a trained network has them: neither 0 nor 1
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 1.5)
        return model.to(device).eval()

    labels = torch.arange(batch_size, device=device) % 10
    noise = torch.randn(batch_size, 3, 32, 32, device=device)
    setting = deepinversion.SETTINGS["cifar10"] | dict(alpha_l2=1e-5, alpha_tv_l1=1e-3, fused=True, bf16=True)
    frozen = network().requires_grad_(False).to(memory_format=torch.channels_last)
    x_bare = noise.contiguous(memory_format=torch.channels_last).requires_grad_()

    def bare():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(frozen(x_bare), labels)
        torch.autograd.grad(loss, x_bare)

    usual, terms, x_usual = network(), [], noise.clone().requires_grad_()
    hook_conventionally(usual, terms)
    usual_adam = torch.optim.Adam([x_usual], lr=0.1)
    columns = {
        "bare": bare,
        "conventional": lambda: conventional_step(x_usual, labels, usual, usual_adam, setting, terms),
    }
    for name, fused in (("ours", True), ("ours --no-fused", False)):
        model = network().requires_grad_(False).to(memory_format=torch.channels_last)
        teacher = SimpleNamespace(
            model=model, low=torch.tensor(-2.0, device=device), high=torch.tensor(2.0, device=device)
        )
        moments = deepinversion.MomentLoss(model, 1.0, fused)
        x = noise.clone().requires_grad_()
        adam = torch.optim.Adam([x], fused=True)
        options = setting | {"fused": fused}
        generator = torch.Generator().manual_seed(0)

        def ours(x=x, teacher=teacher, moments=moments, adam=adam, options=options, generator=generator):
            stage = (10**9, 1, 2)
            deepinversion.synthesis_step(x, labels, teacher, moments, adam, stage, 10**6, options, generator)

        columns[name] = ours
    ms = time_together(columns, device, seconds)
    print(f"\none step, ResNet-20, {batch_size} images of 32 px, {device}, all terms on")
    print(f"{'column':16} {'ms':>9} {'p20':>9} {'p80':>9} {'x bare':>8} {'x conventional':>15}")
    rows = []
    for name, (p50, p20, p80) in ms.items():
        to_bare, to_usual = p50 / ms["bare"][0], p50 / ms["conventional"][0]
        print(f"{name:16} {p50:9.2f} {p20:9.2f} {p80:9.2f} {to_bare:8.2f} {to_usual:15.2f}")
        row = dict(op=f"step: {name}", shape=f"{batch_size}x3x32x32", mode="step", ours_ms=p50, ours_p20_ms=p20)
        rows.append(row | dict(ours_p80_ms=p80, times_bare=to_bare, times_conventional=to_usual))
    return rows


def conventional_pseudo_batch(teacher, student, generator, adams, batch_size, beta):
    """Zero-shot knowledge transfer as the released code runs it; returns the generator's loss."""
    z = torch.randn(batch_size, 100, device=next(student.parameters()).device)

    values = []

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
    import zskt

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="time the CPU path: ops and the whole step")
    parser.add_argument("--end-to-end", action="store_true", help="time the whole step too")
    parser.add_argument("--seconds", type=float, default=1.0, help="per column of an op row; tenfold for a step")
    parser.add_argument("--csv", default="", help="also write the rows to this file")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; run python -m kernels.bench --cpu")
    device = "cpu" if args.cpu else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {TRITON_VERSION}")
    rows = bench_ops(device, args.seconds)
    if args.cpu or args.end_to_end:
        rows += bench_step(device, args.seconds * 10)
        rows += bench_pseudo_batch(device, args.seconds * 10, "digits-lenet5", "lenet5_half", 16, 128)
        wide = (128, 128) if device == "cuda" else (32, 16)  # a CPU would take minutes for the paper's size
        rows += bench_pseudo_batch(device, args.seconds * 10, "cifar10-wrn-16-1", "wrn_16_1", *wide)
    if args.csv:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        common = dict(date=str(date.today()), commit=commit, device=name, torch=torch.__version__)
        common["triton"] = TRITON_VERSION
        fields = list(dict.fromkeys(k for row in rows for k in (*common, *row)))
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(common | row for row in rows)
        print(f"wrote {args.csv}")


if __name__ == "__main__":
    main()
