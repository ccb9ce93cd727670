"""Class-incremental learning without old data: classes are added to a network on inverted images.

Yin et al., "Dreaming to Distill", CVPR 2020, arXiv:1912.08795, section 4.5, whose code was never
released; Smith et al., "Always Be Dreaming", ICCV 2021, arXiv:2106.09701. The old network p_o knows
some classes. Its copy p_k gets an output for each new class and learns from new real images x_k,
labels y_k, and from images x^ that deepinversion.py makes of p_o. No task id is given at test.

    deepinversion   KL(p_o(x^) || p_k(x^)) + CE(p_k(x_k), y_k) + KL(p_o(x_k) || p_k(x_k)), the last
                    over the old classes only
    abd             CE of x_k over the new classes + CE of the last layer alone over all classes
                    + 0.1 distillation of features, seen by the old last layer

`--arms` also has base, lwf, lwf-mc, two oracles with real old images, and joint, the upper bound.
Run `python continual.py`. It writes args.json, metrics.jsonl, samples.png, confusion.png, curve.png
(accuracy over tasks), ARM-task1.pt … (the network after a task), student.pt, checkpoint.pt,
result.json. Metrics: `loss/…` the arm's terms, means of an epoch; after a task `eval/acc` percent
of real test images of all classes, `eval/old`, `eval/new`, and `eval/forgetting` of old ones.
Measured, 3 seeds: CIFAR-10 + MNIST: base 35.8 ± 3.8, deepinversion 71.8 ± 3.3, abd 86.6 ± 0.1 %;
MNIST in 5 tasks: base 19.0 ± 0.4, deepinversion 20.7 ± 2.4, abd 22.8 ± 1.8 %. Nothing ran on a GPU.

Where we differ: few updates and images (paper: 250 a class); all arms share deepinversion's
optimiser and, except joint, freeze the BatchNorms; abd learns on deepinversion's images (its paper:
a generator per task); lwf-mc takes the first network's softmax (theirs: sigmoids). Inversion replay
no longer leads class-incremental learning: README.md.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import kernels
from harness.data import N_CLASSES, evaluate, list_class_names, normalise, predict
from harness.errors import fail, fail_in_one_line
from harness.images import augment, check_image_files
from harness.known import describe, is_factory
from harness.load import load_teacher
from harness.networks import find_linear_layers
from harness.pictures import draw_classes, draw_curves
from harness.run import (
    RunFolder,
    check_at_least,
    choose_device,
    parse_args,
    restore_optimizer,
    seed_everything,
)
from harness.sources import SourceOptions, load_source_images
from tasks import (
    LabelledImages,
    advise_training,
    join_images,
    list_outputs,
    load_task,
    name_dataset,
    parse_tasks,
    repeat_small_sets,
)

Arm = Literal[
    "base",
    "lwf",
    "lwf-mc",
    "deepinversion",
    "abd",
    "oracle-distill",
    "oracle-classify",
    "joint",
]
SOURCES = ("auto", "noise", *N_CLASSES)  # values of --images that are no folder
INVERSIONS = {  # options of deepinversion.py besides its preset
    "preset": {},
    "relative": dict(moments="relative", alpha_bn=1.0, first_bn=1.0, iterations=60),
}
REPLAYING = ("deepinversion", "abd")  # arms that take inverted images
REMEMBERING = ("oracle-distill", "oracle-classify", "joint")  # arms that take real old images
LWF_TEMPERATURE = 2.0  # Li & Hoiem, arXiv:1606.09282
ALPHA_FEATURES = 0.1  # weight of ABD's distillation (released code: mu)
NEW_STD = 0.01  # of new units' weights, so small that no new class wins at once (ours)
RATE_DROPS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)  # of all updates; each cuts the rate to 20 % (paper)


@dataclass
class Args(SourceOptions):
    # Run settings.
    setting: Literal["digits", "mnist", "cifar10", "cifar10-mnist"] = "digits"
    """Preset (PRESETS): an equal split of a data set, or a network and another data set."""
    out: str = "runs/continual/default"
    """Output folder."""
    teacher: str = "digits-resnet8-0-4"
    """First old network, of the first task's classes: as for the other scripts; for a part of a
    data set's classes a checkpoint of teacher.py --classes."""
    images: str = "auto"
    """What stands for old images. auto: images that deepinversion.py makes of each old network,
    once. A folder: the --out of deepinversion.py on the first network; later ones are inverted as
    by auto. noise. Another data set's name: its training images."""
    inversion: Literal["preset", "relative"] = "preset"
    """How deepinversion.py makes them: by its preset; relative: with the moment loss that has no
    unit, in 60 steps, which small networks of few classes need (ours)."""
    num_images: int = 200
    """Images of auto, noise and other data sets, of all old classes together."""
    test_images: int = 0
    """Real test images of each task, the first ones; 0: all."""

    # Method.
    tasks: tuple[str, ...] = ("digits:0-4", "digits:5-9")
    """Classes of the first network, then those that each task adds, as DATASET:FIRST-LAST or
    DATASET:0,3,8. Images take the network's channels: grey ones are repeated."""
    arms: tuple[Arm, ...] = ("base", "deepinversion")
    """Arms to train, explained at the top of this file; student.pt holds the last one's network."""
    epochs: int = 5
    """Epochs of a task."""
    steps_per_epoch: int = 40
    """Updates in an epoch, the same for all arms."""
    batch_size: int = 32
    """New images of an update, and as many old ones (paper: 128); joint: twice as many of all."""
    lr: float = 1.0
    """Initial learning rate of SGD with momentum 0.9 (ours)."""
    clip: float = 0.1
    """Largest norm of the gradient (paper)."""
    shift: int = 2
    """Augmentation: largest move of each image, in pixels (ours)."""

    def __post_init__(self):
        SourceOptions.__post_init__(self)
        if self.dataset != "auto":
            raise ValueError("--dataset: expected auto; --tasks names the data sets")
        if self.images == "real":
            expected = "expected auto, a folder or another source"
            raise ValueError(f"--images: {expected}, got real, which the oracles take")
        datasets = {task.dataset for task in parse_tasks(self.tasks)}
        if self.images in datasets:
            problem = f"{self.images} is one of --tasks, whose old images are gone"
            raise ValueError(f"--images: {problem}; pass another source")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms: expected one or more, each once, got {' '.join(self.arms)}")
        check_at_least(1, self, "epochs", "steps_per_epoch", "batch_size")
        check_at_least(0, self, "shift")
        check_at_least(1e-12, self, "lr", "clip")


DIGITS = Args()  # how we chose its values: results/NOTES.md
MNIST = replace(
    DIGITS,
    setting="mnist",
    teacher="runs/teacher/mnist-resnet8-0-1/teacher.pt",
    tasks=("mnist:0-1", "mnist:2-3", "mnist:4-5", "mnist:6-7", "mnist:8-9"),
    steps_per_epoch=50,
    batch_size=16,
    inversion="relative",
)
CIFAR10 = replace(
    DIGITS,
    setting="cifar10",
    teacher="runs/teacher/cifar10-resnet20-0-1-2-3-4/teacher.pt",
    tasks=("cifar10:0-4", "cifar10:5-9"),
    num_images=500,
)
PRESETS = {
    "digits": DIGITS,
    "mnist": MNIST,
    "cifar10": CIFAR10,
    "cifar10-mnist": replace(
        CIFAR10,
        setting="cifar10-mnist",
        teacher="cifar10-resnet20",
        tasks=("cifar10:0-9", "mnist:0-9"),
        num_images=1000,
    ),
}


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        num_images=min(args.num_images, 20),
        epochs=min(args.epochs, 2),
        steps_per_epoch=2,
        batch_size=10,
    )


# The first network
def check_first_network(teacher, info, task, args):
    """Refuse a first network that was trained on other classes than the first task's, or that
    cannot be inverted where an arm needs that."""
    if is_factory(info.arch):
        problem = "a task's network must be a checkpoint, which names no factory"
        fail(f"--teacher {args.teacher}: {problem}; pass one of harness/networks.py")
    if info.image_size != 32:
        fail(f"--teacher {args.teacher}: expected images of 32 px, got {info.image_size}")
    known = describe(args.teacher)
    classes = tuple(known.get("classes", range(info.num_classes)))
    dataset = info.dataset or task.dataset
    if (dataset, classes) != task:
        its = f"{dataset}:{','.join(map(str, classes))}"
        fail(f"--teacher {args.teacher}: it was trained on {its}; begin --tasks with {its}")
    if args.images == "auto" and set(args.arms) & set(REPLAYING):
        layers = [m for m in teacher.modules() if isinstance(m, _BatchNorm)]
        if not any(layer.running_mean is not None for layer in layers):
            problem = "no BatchNorm with running moments, which inversion matches"
            fail(f"--teacher {args.teacher}: {problem}; take another, or pass --images noise")


# The network
def add_classes(old, n_new, seed):
    """A copy of a network whose last linear layer has n_new further outputs; its weights learn.

    New weights are small and new biases 0, so that no new class wins before it has learnt. They
    depend on the seed alone.
    """
    network = copy.deepcopy(old).requires_grad_(True)
    old_head = find_linear_layers(network)[-1]
    n_old, D = old_head.weight.shape
    head = nn.utils.skip_init(nn.Linear, D, n_old + n_new).to(old_head.weight)
    rows = NEW_STD * torch.randn(n_new, D, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight[:n_old] = old_head.weight
        head.weight[n_old:] = rows
        head.bias.zero_()
        head.bias[:n_old] = old_head.bias
    names = {module: name for name, module in network.named_modules()}
    network.set_submodule(names[old_head], head)
    return network


def freeze_batchnorms(network):
    """Let no BatchNorm learn. In eval mode it keeps its running moments too."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def compute_features(network, x):
    """Logits (N, K) of images and what enters the last linear layer, (N, D)."""
    entered = []
    head = find_linear_layers(network)[-1]
    hook = head.register_forward_pre_hook(lambda head, inputs: entered.append(inputs[0]))
    logits = network(x)
    hook.remove()
    return logits, entered[0]


# Losses. K_o, K: numbers of old and of all classes.
def replay_loss(old_logits, logits, args):
    """DeepInversion's first term, KL(p_o(x^) || p_k(x^)) over all classes; () fp32.

    Args:
        old_logits: (N, K_o) of p_o, whose probability of new classes is zero.
        logits: (N, K) of p_k for the same images.
        args: Args; read is fused.
    """
    kl_divergence = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    n_new = logits.shape[1] - old_logits.shape[1]
    padded = F.pad(old_logits, (0, n_new), value=-torch.inf)  # (N, K)
    return kl_divergence(padded, logits)


def old_class_loss(old_logits, logits, args, temperature=1.0):
    """DeepInversion's third term and LwF's: T² KL(p_o(x_k) || p_k(x_k)), softmaxes of old classes.

    The new logits have no part in it. T is 1 in DeepInversion, 2 in LwF.

    Args:
        old_logits, logits: (N, K_o) and (N, K) for new images.
        args: Args; read is fused.
    """
    kl_divergence = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    n_old = old_logits.shape[1]
    return temperature**2 * kl_divergence(old_logits, logits[:, :n_old], temperature)


def binary_loss(old_probabilities, logits, y):
    """LwF.MC's (Rebuffi et al. 2017, arXiv:1611.07725, without exemplars); () fp32.

        - sum_k t_k log s_k + (1 - t_k) log(1 - s_k),   s = sigmoid(logits)

    Args:
        old_probabilities: (N, K_o) of p_o, the targets t of old classes.
        logits: (N, K).
        y: (N,); the targets of new classes are 1 or 0.
    """
    n_old = old_probabilities.shape[1]
    n_new = logits.shape[1] - n_old
    targets = torch.cat((old_probabilities, F.one_hot(y - n_old, n_new)), 1)  # (N, K)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()


def weighted_cross_entropy(logits, y, weights):
    """mean_n of weights_n CE(logits_n, y_n), () fp32; all are of N images."""
    return (weights * F.cross_entropy(logits, y, reduction="none")).mean()


def weigh_classes(y, n_old, n_all):
    """ABD's weight of each image, (N,): n_old / n_all for old classes, n_new / n_all for new ones.

    Labels y are (N,). As in the released code; both kinds fill half of a batch.
    """
    share = n_old / n_all
    return torch.where(y < n_old, share, 1 - share)


def feature_loss(old_features, features, old_head):
    """ABD's distillation: squared distance of features, seen by the old last layer W; () fp32.

        mean over images and old classes of ( W f_k(x) - W f_o(x) )²

    Args:
        old_features, features: (N, D) of p_o and p_k for real and inverted images.
        old_head: the last layer of p_o.
    """
    return (old_head(features) - old_head(old_features)).square().mean()


class Batch(NamedTuple):
    """Images of an update; of arms without old images x_old and y_old are empty."""

    x_new: torch.Tensor
    """(N, C, H, W), normalised."""
    y_new: torch.Tensor
    """(N,)."""
    x_old: torch.Tensor
    """(N, C, H, W): inverted images, or an oracle's real ones."""
    y_old: torch.Tensor
    """(N,): real images' labels; of others the classes that p_o predicts."""


def compute_losses(arm, number, network, old, batch, args):
    """The terms of an arm's loss, each weighted: {name: () fp32}; number: of the task, from 1."""
    N = len(batch.x_new)
    x = torch.cat((batch.x_new, batch.x_old))
    logits, features = compute_features(network, x)
    new_logits, replayed_logits = logits[:N], logits[N:]
    losses = {}
    if arm not in ("lwf-mc", "abd"):
        losses["ce"] = F.cross_entropy(new_logits, batch.y_new)
    if arm in ("base", "joint"):
        return losses
    if arm == "oracle-classify":
        losses["replay"] = F.cross_entropy(replayed_logits, batch.y_old)
        return losses

    with torch.no_grad():
        old_logits, old_features = compute_features(old, x)
    n_old = old_logits.shape[1]
    n_all = logits.shape[1]
    if arm == "lwf":
        losses["old"] = old_class_loss(old_logits, logits, args, LWF_TEMPERATURE)
    elif arm == "lwf-mc":
        old_probabilities = old_logits.sigmoid()
        if number == 1:  # the first network learnt with softmax, its sigmoids mean nothing
            old_probabilities = old_logits.softmax(1)
        losses["binary"] = binary_loss(old_probabilities, logits, batch.y_new)
    elif arm == "oracle-distill":
        losses["replay"] = replay_loss(old_logits[N:], replayed_logits, args)
    elif arm == "deepinversion":
        losses["replay"] = replay_loss(old_logits[N:], replayed_logits, args)
        losses["old"] = old_class_loss(old_logits[:N], new_logits, args)
    elif arm == "abd":
        y = torch.cat((batch.y_new, batch.y_old))
        weights = weigh_classes(y, n_old, n_all)
        head_logits = find_linear_layers(network)[-1](features.detach())
        local_logits = new_logits[:, n_old:]
        losses["local"] = weighted_cross_entropy(local_logits, batch.y_new - n_old, weights[:N])
        losses["head"] = weighted_cross_entropy(head_logits, y, weights)
        distance = feature_loss(old_features, features, find_linear_layers(old)[-1])
        losses["features"] = ALPHA_FEATURES * distance
    return losses


# Learning a task
def make_old_args(arm, number, run):
    """Args with which load_teacher loads the network that a task adds classes to."""
    args = run.args
    if number == 1:
        return args
    path = run.out / name_network(arm, number - 1)
    images = args.images
    if images not in SOURCES:
        images = "auto"  # the folder's are of the first network
    return replace(
        args,
        teacher=str(path),
        weights="",
        num_classes=0,
        image_size=0,
        mean=(),
        std=(),
        images=images,
    )


def name_network(arm, number):
    """The file of an arm's network after a task."""
    return f"{arm}-task{number}.pt"


def choose_real_images(arm, number, train_sets):
    """What an arm draws from: (new ones, real old ones or None).

    Args:
        number: of the task.
        train_sets: {number of a task: LabelledImages}.
    """
    new = train_sets[number]
    if arm not in REMEMBERING:
        return new, None
    before = [train_sets[k] for k in range(number)]
    if arm == "joint":
        return join_images(repeat_small_sets([*before, new])), None
    return new, join_images(repeat_small_sets(before))


def draw_images(source, n, info, args):
    """n of LabelledImages with replacement: (n, C, H, W) normalised and moved, and labels (n,)."""
    index = torch.randint(len(source.images), (n,), device=source.images.device)
    x = augment(normalise(source.images[index], info), args.shift)
    return x, source.labels[index]


def draw_batch(arm, new, replayed, info, args):
    """The images of an update: batch_size new ones and as many old ones, as a Batch."""
    n_new = args.batch_size
    if arm == "joint":
        n_new = 2 * args.batch_size  # new and old together
    x_new, y_new = draw_images(new, n_new, info, args)
    if replayed is None:
        return Batch(x_new, y_new, x_new[:0], y_new[:0])
    x_old, y_old = draw_images(replayed, args.batch_size, info, args)
    return Batch(x_new, y_new, x_old, y_old)


def compute_rate(step, args):
    """The learning rate at an update of a task, counted from 0."""
    n_steps = args.epochs * args.steps_per_epoch
    n_drops = sum(step >= drop * n_steps for drop in RATE_DROPS)
    return args.lr * 0.2**n_drops


def seed_epoch(seed, task, epoch):
    """Let an epoch's random numbers depend on nothing else, so that --resume needs no more."""
    state = np.random.SeedSequence([seed, task, epoch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def prepare_task(arm, number, run, sets):
    """The network that a task adds classes to, and what the arm learns from.

    Returns:
        The old network, its NetworkInfo, LabelledImages of new images, and of old ones or None.
    """
    args = run.args
    old_args = make_old_args(arm, number, run)
    old, info = load_teacher(old_args, run.device, size_multiple=1)
    new, replayed = choose_real_images(arm, number, sets["train"])
    if arm in REPLAYING:
        images = load_source_images(old_args, info, INVERSIONS[args.inversion]).to(run.device)
        replayed = LabelledImages(images, predict(old, images, info))
    draws_samples = arm in REPLAYING or not set(args.arms) & set(REPLAYING)
    if number == 1 and draws_samples:
        with run.write_file("samples.png") as file:
            draw_samples(parse_tasks(args.tasks), [new, replayed], file)
    return old, info, new, replayed


def grow_network(old, arm, n_new, args):
    """A task's network before its first update, and its optimiser."""
    network = add_classes(old, n_new, args.seed)
    network.train(arm == "joint")
    if arm != "joint":
        freeze_batchnorms(network)
    learning = [p for p in network.parameters() if p.requires_grad]
    return network, torch.optim.SGD(learning, args.lr, momentum=0.9, foreach=True)


def learn_task(arm, number, run, sets, saved, arms):
    """Add a task's classes to the network before it; a checkpoint after each epoch.

    Args:
        number: of the task, from 1; task 0 is the first network's.
        run: RunFolder.
        sets: {"train" | "test": {number of a task: LabelledImages}}.
        saved: the state of a checkpoint of this arm and task, or None.
        arms: {name: [figures of each task so far]}; this task's are added.
    """
    args = run.args
    tasks = parse_tasks(args.tasks)
    seed_epoch(args.seed, number, 0)
    old, info, new, replayed = prepare_task(arm, number, run, sets)
    network, optimizer = grow_network(old, arm, len(tasks[number].classes), args)
    learning = optimizer.param_groups[0]["params"]
    n_old = len(list_outputs(tasks[:number]))
    first_epoch = 0
    if saved is not None:
        advice = "run without --resume, in another --out"
        with fail_in_one_line(f"{run.out}/checkpoint.pt: no checkpoint of this run", advice):
            network.load_state_dict(saved["network"])
            restore_optimizer(optimizer, saved["optimizer"])
            first_epoch = saved["task_epoch"]

    bar = tqdm(range(first_epoch, args.epochs), disable=None, desc=f"{arm}, task {number}")
    for epoch in bar:
        seed_epoch(args.seed, number, epoch + 1)
        sums = {}
        for step in range(epoch * args.steps_per_epoch, (epoch + 1) * args.steps_per_epoch):
            batch = draw_batch(arm, new, replayed, info, args)
            losses = compute_losses(arm, number, network, old, batch, args)
            optimizer.param_groups[0]["lr"] = compute_rate(step, args)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(learning, args.clip)
            optimizer.step()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()

        n_before = list(args.arms).index(arm) * (len(tasks) - 1) + number - 1
        row = {"epoch": n_before * args.epochs + epoch + 1, "task": number}
        row |= {f"loss/{name}": total.item() / args.steps_per_epoch for name, total in sums.items()}
        if epoch + 1 == args.epochs:
            tests = [sets["test"][k] for k in range(number + 1)]
            figures = measure(network, tests, info, n_old, arms[arm][-1]["accuracy"])
            arms[arm].append(figures)
            row |= {"eval/acc": figures["accuracy"], "eval/old": figures["old"]}
            row |= {"eval/new": figures["new"], "eval/forgetting": figures["forgetting"]}
            save_network(network, arm, number, info, run, figures["accuracy"])
        run.show(bar, row)
        state = {"epoch": row["epoch"], "arm": arm, "task": number, "task_epoch": epoch + 1}
        state |= {"arms": arms, "network": network.state_dict()}
        state["optimizer"] = optimizer.state_dict()
        run.save_checkpoint(state)


def save_network(network, arm, number, info, run, accuracy):
    """Write an arm's network after a task as a checkpoint that all scripts take."""
    tasks = parse_tasks(run.args.tasks)[: number + 1]
    n_classes = len(list_outputs(tasks))
    grown = replace(info, num_classes=n_classes, dataset=name_dataset(tasks), accuracy=accuracy)
    for name in (name_network(arm, number), "student.pt"):
        run.save_student(network, grown, f"continual, {arm}", name)


# Evaluation
def measure(network, tests, info, n_old, accuracy_before):
    """What a network knows after a task, in percent of real test images of all classes so far.

    The class is the largest of all logits: nothing says which task an image is of.

    Args:
        tests: LabelledImages of each task so far.
        info: NetworkInfo; read are mean and std.
        n_old: number of old classes.
        accuracy_before: of the old network on the old classes.

    Returns:
        {accuracy, old, new, forgetting, confusion}: confusion (K, K) counts the images of each
        class (a row) by the network's answer.
    """
    was_training = network.training
    network.eval()
    K = find_linear_layers(network)[-1].out_features
    confusion = torch.zeros(K * K, dtype=torch.int64)
    for test in tests:
        predicted = predict(network, test.images, info)
        confusion += torch.bincount((test.labels * K + predicted).cpu(), minlength=K * K)
    network.train(was_training)
    confusion = confusion.view(K, K)

    def compute_accuracy(rows):
        return 100 * confusion.diagonal()[rows].sum().item() / confusion[rows].sum().item()

    old = compute_accuracy(slice(0, n_old))
    return dict(
        accuracy=compute_accuracy(slice(0, K)),
        old=old,
        new=compute_accuracy(slice(n_old, K)),
        forgetting=accuracy_before - old,
        confusion=confusion.tolist(),
    )


def draw_samples(tasks, sets, file):
    """Write a PNG of what the first task is learnt from, a row a class; sets may hold None."""
    shown = join_images([part for part in sets if part is not None])
    names = []
    for dataset, k in list_outputs(tasks):
        known = list_class_names(dataset)
        name = known[k] if known else f"{dataset} {k}"
        names.append(name)
    draw_classes(shown.images.cpu(), shown.labels.cpu(), names, file, rows=20)


def draw_confusions(confusions, tasks, file):
    """Write a PNG of {arm: (K, K) counts}: a panel an arm, lines between the tasks' classes."""
    from matplotlib.figure import Figure

    n_columns = min(4, len(confusions))
    n_rows = -(-len(confusions) // n_columns)
    figure = Figure((3.2 * n_columns, 3.4 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (arm, confusion) in zip(axes, confusions.items(), strict=False):
        counts = np.array(confusion)
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        axis.set_axis_on()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for k in range(1, len(tasks)):
            edge = len(list_outputs(tasks[:k])) - 0.5
            axis.axhline(edge, color="red", linewidth=0.8)
            axis.axvline(edge, color="red", linewidth=0.8)
        axis.set(title=arm, xlabel="answer", ylabel="class")
    figure.savefig(file, dpi=80)


def print_table(arms):
    """Print the figures of each arm after the last task."""
    names = ("accuracy", "old", "new", "forgetting")
    print(" " * 16 + "".join(f"{name:>12}" for name in names))
    for arm, figures in arms.items():
        print(f"{arm:16}" + "".join(f"{figures[-1][name]:12.2f}" for name in names))


def load_sets(tasks, info, args, device):
    """{"train" | "test": {number of a task: LabelledImages}}.

    The first task's training images are there only for the arms that take real old ones.
    """
    sets = {"train": {}, "test": {}}
    for number in range(len(tasks)):
        test = load_task(tasks, number, "test", info, args)
        if args.test_images:
            test = LabelledImages(*(part[: args.test_images] for part in test))
        sets["test"][number] = LabelledImages(*(part.to(device) for part in test))
        if number > 0 or set(args.arms) & set(REMEMBERING):
            train = load_task(tasks, number, "train", info, args)
            sets["train"][number] = LabelledImages(*(part.to(device) for part in train))
    return sets


def main(args):
    if args.smoke:
        args = shrink(args)
    device = choose_device(args.device)
    seed_everything(args.seed)

    # The first network, the tasks' real images; refuse what does not fit before anything is long.
    tasks = parse_tasks(args.tasks)
    if args.teacher.endswith(".pt") and not Path(args.teacher).exists():
        fail(f"--teacher: {args.teacher} cannot be read: no such file; {advise_training(tasks[0])}")
    teacher, info = load_teacher(args, device, size_multiple=1)
    check_first_network(teacher, info, tasks[0], args)
    sets = load_sets(tasks, info, args, device)
    if args.images not in SOURCES:
        check_image_files(args.images, info)

    run = RunFolder(args, device, clears=("*-task*.pt", "confusion.png"))
    print(f"{info.name}: {' '.join(args.tasks)}, arms {' '.join(args.arms)}, {device}")
    arms = {}
    with run.open_checkpoint() as saved:
        if saved is not None:
            arms = saved["arms"]
    accuracy = evaluate(teacher, *sets["test"][0], info)
    first = dict(accuracy=accuracy, old=None, new=accuracy, forgetting=None)

    # Each arm by itself, task after task.
    for arm in args.arms:
        arms.setdefault(arm, [first])
        for number in range(1, len(tasks)):
            saved_here = None
            if saved is not None and (saved["arm"], saved["task"]) == (arm, number):
                saved_here = saved
            if saved_here is not None or number >= len(arms[arm]):
                learn_task(arm, number, run, sets, saved_here, arms)

    # What came of it.
    with run.write_file("confusion.png") as file:
        draw_confusions({arm: f[-1]["confusion"] for arm, f in arms.items()}, tasks, file)
    with run.write_file("curve.png") as file:
        draw_curves({arm: [[f["accuracy"] for f in arms[arm]]] for arm in arms}, file, "task")
    print_table(arms)
    result = dict(teacher=info.name, tasks=args.tasks, teacher_accuracy=accuracy)
    result["student_accuracy"] = arms[args.arms[-1]][-1]["accuracy"]
    run.finish(result | dict(arms=arms))


if __name__ == "__main__":
    main(parse_args(PRESETS))
