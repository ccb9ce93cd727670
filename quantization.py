"""Quantization without data: a network in few bits, calibrated and fine-tuned on inverted images.

Haroush, Hubara, Hoffer, Soudry, "The Knowledge Within: Methods for Data-Free Model Compression",
CVPR 2020, arXiv:1912.01274; protocol of GDFQ (Xu et al. 2020, arXiv:2003.03603). Weights get a grid
of 2^W values in each output channel, activations one of 2^A values in each tensor. The ranges are
calibrated on images; then the quantized network learns the answers of the whole one on them.

    loss = tau² KL(teacher(x) || quantized(x)) + CE(quantized(x), argmax teacher(x))

Every convolution and linear layer is quantized, first and last too, and whatever enters one but the
image itself. BatchNorm stays float, in eval mode. Run `python quantization.py`, or with `--teacher
cifar10-resnet20 --images DIR`. It writes args.json, metrics.jsonl, samples.png, curve.png (accuracy
against bits), quantized-W4A4.pt … (integers and scales: `load_integers`), checkpoint.pt,
result.json. Metrics: `loss/kl`, `loss/ce`, means of an epoch; `eval/acc` percent of real test
images. Measured on 2,500 test images, 3 seeds, one CPU thread: CIFAR-10 ResNet-20 0.07, 2.32 and
10.45 points below float (85.52 %) in 8, 4 and 3 bits. Nothing ran on a GPU.

Where we differ from GDFQ and its released code:
- images come from deepinversion.py, once (theirs: a generator that learns with the network);
- the tensor that a layer reads is quantized where it is made, so that shortcuts read it quantized
  too; after a pooling, not before it; the pooled features, which theirs leave float, are too;
- the gradient is 0 outside a range; ranges hold 0; KL is a sum over classes (theirs: a mean);
- labels of CE are the teacher's answers; the last epoch counts (theirs: the best on test images);
- presets without `released` in their name are ours: Adam, few steps.
"""

import copy
import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import kernels
from harness.data import evaluate, normalise
from harness.errors import fail, fail_in_one_line
from harness.files import read_checkpoint
from harness.images import augment
from harness.known import describe_info, read_info
from harness.load import build_network, choose_preset_by_dataset, load_teacher
from harness.networks import trace_network
from harness.run import (
    RunFolder,
    check_at_least,
    choose_device,
    decay_by_cosine,
    make_optimizer,
    parse_args,
    restore_optimizer,
    seed_everything,
)
from harness.sources import SourceOptions, load_lesson, report_lesson

RANGE_DECAY = 0.9  # of the moving average of minimum and maximum (released code)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass
class Args(SourceOptions):
    # Run settings.
    setting: Literal["cifar10", "cifar10-released", "mnist", "digits"] = "cifar10"
    """Preset (PRESETS); default: that of --dataset, else of the teacher's data set, else cifar10;
    without a teacher digits."""
    out: str = "runs/quantization/default"
    """Output folder."""

    # Method.
    bits: tuple[str, ...] = ("W8A8", "W4A4", "W3A3")
    """Bits of weights and of activations, 2 to 8; each is calibrated and fine-tuned by itself."""
    calibration_batches: int = 10
    """Batches that the activations' ranges are averaged over (ours)."""
    epochs: int = 4
    """Epochs of fine-tuning; 0: calibrate only."""
    steps_per_epoch: int = 50
    """Updates in an epoch."""
    batch_size: int = 100
    """Images of an update and of a calibration batch."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd: Nesterov momentum 0.9, weight decay 1e-4 (released code)."""
    lr: float = 1e-4
    """Initial learning rate."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """Of the learning rate; steps: a tenth after each quarter of all updates (released code)."""
    temperature: float = 20.0
    """tau: divides both logits of the KL term, which is multiplied by tau² (released code)."""
    low_pass: float = 0.0
    """D0 of SynQ's low-pass filter on the images, in frequencies; 8 at 32 px, 40 at 224; 0: off."""
    shift: int = 2
    """Augmentation: largest move of each image, in pixels (ours)."""
    mirror: bool = True
    """Augmentation: mirror each image with probability 1/2 (ours)."""

    def __post_init__(self):
        SourceOptions.__post_init__(self)
        if not self.bits:
            raise ValueError("--bits: expected at least one pair of bits, such as W4A4")
        for name in self.bits:
            parse_bits(name)
        if len(set(self.bits)) < len(self.bits):
            raise ValueError(f"--bits: expected each pair once, got {' '.join(self.bits)}")
        check_at_least(1, self, "calibration_batches", "steps_per_epoch", "batch_size")
        check_at_least(0, self, "epochs", "shift", "low_pass")
        check_at_least(1e-12, self, "lr", "temperature")


def parse_bits(name):
    """The bits of weights and of activations that a name such as W4A4 stands for."""
    found = re.fullmatch(r"W([2-8])A([2-8])", name)
    if not found:
        expected = "expected W and A with 2 to 8 bits each, such as W4A4"
        raise ValueError(f"--bits: {expected}, got {name!r}")
    return int(found[1]), int(found[2])


CIFAR10 = Args()  # how we chose its values: results/NOTES.md
RELEASED = replace(  # GDFQ's fine-tuning
    CIFAR10,
    setting="cifar10-released",
    num_images=5000,
    bits=("W4A4",),
    epochs=400,
    steps_per_epoch=200,
    batch_size=200,
    optimizer="sgd",
    lr=1e-4,
    schedule="steps",
    shift=0,
    mirror=False,
)
MNIST = replace(
    CIFAR10,
    setting="mnist",
    teacher="mnist-resnet8",
    epochs=2,
    steps_per_epoch=40,
    lr=3e-4,
    mirror=False,
)
PRESETS = {
    "cifar10": CIFAR10,
    "cifar10-released": RELEASED,
    "mnist": MNIST,
    "digits": replace(MNIST, setting="digits", teacher="digits-resnet8"),
}


def choose_preset(teacher, dataset):
    """The preset of a run without --setting."""
    return choose_preset_by_dataset(PRESETS, teacher, dataset)


def shrink(args):
    """A run of seconds, for --smoke."""
    return replace(
        args,
        num_images=min(args.num_images, 20),
        calibration_batches=1,
        epochs=min(args.epochs, 2),
        steps_per_epoch=2,
        batch_size=10,
    )


# The images
def filter_low_pass(x, radius):
    """SynQ's filter: x (N, C, H, W) with its frequencies weighted by a Gaussian, as (N, C, H, W).

    H(u, v) = exp(-D²(u, v) / (2 D0²)),   D the distance from frequency 0, D0 = radius
    """
    H, W = x.shape[2:]
    u = torch.fft.fftfreq(H, 1 / H, device=x.device)  # whole frequencies, (H,)
    v = torch.fft.rfftfreq(W, 1 / W, device=x.device)  # (W/2 + 1,)
    distance = u[:, None].square() + v.square()
    gain = torch.exp(-distance / (2 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(H, W))


def draw_batch(lesson, args, augmented):
    """Images drawn with replacement, (batch_size, C, H, W) fp32 in normalised units.

    Args:
        lesson: Lesson.
        augmented: whether to move and mirror them at random.
    """
    images = lesson.images
    index = torch.randint(len(images), (args.batch_size,), device=images.device)
    x = normalise(images[index], lesson.info)
    if augmented:
        x = augment(x, args.shift, args.mirror)
    if args.low_pass:
        x = filter_low_pass(x, args.low_pass)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measure_moment_distance(lesson, args, batch_size=100):
    """How far a set of images is from the training data, as BatchNorm sees it; 0: equal moments.

        mean over layers of KL( N(mean_l, var_l) || N(running_mean_l, running_var_l) ),

    itself a mean over channels, of the moments of all whole batches together. Haroush et al.
    compare the same statistics; the Gaussian KL is the form of their BNS loss.

    With args.low_pass the images are filtered first, as in draw_batch.

    Returns:
        A number of at least 0, or None of a teacher without BatchNorms that run.
    """
    images = lesson.images
    bn_moments = kernels.bn_moments if args.fused else kernels.bn_moments_ref
    try:
        hooked = kernels.hook_batchnorm(lesson.teacher, moments=bn_moments)
    except ValueError:  # it has none
        return None
    n_whole = max(1, len(images) // batch_size) * batch_size  # moments of equal batches are merged
    means = []
    variances = []
    for part in images[:n_whole].split(batch_size):
        x = normalise(part, lesson.info)
        if args.low_pass:
            x = filter_low_pass(x, args.low_pass)
        _, found = hooked(x)
        if not found.sizes:  # none of them runs
            return None
        mean, var = found.moments.double()  # (C,) each, of all layers
        means.append(mean)
        variances.append(var)
    hooked.close()
    means = torch.stack(means)  # (batches, C): mean - running_mean
    var = torch.stack(variances).mean(0) + means.var(0, unbiased=False)
    moments = torch.stack((means.mean(0), var)).float()
    distance = kernels.moment_distance_ref(
        moments, found.running_var, found.sizes, form="kl", eps=found.eps
    )
    return round(distance.item() / len(found.sizes), 6)


# The quantized network
class ActivationQuantizer(nn.Module):
    """One tensor on a grid of 2^bits values: kernels.fake_quantize over a calibrated range.

    y = scale (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero)
    """

    def __init__(self, bits, fused):
        super().__init__()
        self.bits = bits
        self.fused = fused
        self.calibrating = False
        self.n_batches = 0
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def update_range(self, x):
        """Move the range towards the minimum and maximum of a batch; the first one sets it."""
        weight = 1 - RANGE_DECAY if self.n_batches else 1.0
        self.n_batches += 1
        low, high = x.detach().aminmax()
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)

    def forward(self, x):
        if self.calibrating:
            self.update_range(x)
        fake_quantize = kernels.fake_quantize if self.fused else kernels.fake_quantize_ref
        return fake_quantize(x, self.low, self.high, self.bits)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with its weight on a grid of 2^bits values a channel."""

    def __init__(self, layer, bits, fused):
        super().__init__()
        self.layer = layer
        self.bits = bits
        self.fused = fused

    def forward(self, x):
        quantize = kernels.fake_quantize_channels
        if not self.fused:
            quantize = kernels.fake_quantize_channels_ref
        weight = quantize(self.layer.weight, self.bits)
        return functional_call(self.layer, {"weight": weight}, (x,))


def find_layer_calls(network):
    """[(node of the graph, name of the layer)] of all layers that can be quantized."""
    modules = dict(network.named_modules())
    calls = []
    for node in network.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) in LAYERS:
            calls.append((node, node.target))
    return calls


def check_quantizable(network, calls, info):
    """Refuse a network with nothing to quantize, or of which a weight would stay float."""
    subject = f"--teacher {info.name}"
    names = [name for _, name in calls]
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name.rpartition(".")[0] not in names:
            problem = f"{name} would stay float: it is of no plain convolution or linear layer"
            fail(f"{subject}: {problem}; take another network")
    if not names:
        fail(f"{subject}: no convolution or linear layer to quantize; take another network")
    for name in names:
        if names.count(name) > 1:
            fail(f"{subject}: its layer {name} is called twice; give each call its own layer")


def quantize_network(network, info, bits, fused=True):
    """A copy of a network with all layers and what enters them on grids, not yet calibrated.

    Args:
        network: in eval mode; it stays as it is.
        info: its NetworkInfo.
        bits: of weights and of activations.
        fused: as in Args.

    Returns:
        GraphModule in eval mode. Its QuantizedLayers stand where the layers stood. What enters one
        passes an ActivationQuantizer, quantizer_0 …, right behind the operation that made it: all
        others that read it, such as a shortcut, read it quantized. The image passes none.
    """
    weight_bits, activation_bits = bits
    quantized = trace_network(network, info)
    calls = find_layer_calls(quantized)
    check_quantizable(quantized, calls, info)

    graph = quantized.graph
    sources = set()
    for node, name in calls:
        layer = quantized.get_submodule(name)
        quantized.set_submodule(name, QuantizedLayer(layer, weight_bits, fused))
        (source,) = node.all_input_nodes
        if source.op == "placeholder" or source in sources:
            continue
        quantizer = f"quantizer_{len(sources)}"
        quantized.add_module(quantizer, ActivationQuantizer(activation_bits, fused))
        with graph.inserting_after(source):
            on_grid = graph.call_module(quantizer, (source,))
        source.replace_all_uses_with(on_grid)
        on_grid.args = (source,)
        sources.add(on_grid)
    quantized.recompile()
    return quantized.eval().to(next(network.parameters()).device)


def find_quantizers(network):
    return [m for m in network.modules() if isinstance(m, ActivationQuantizer)]


# Calibration and fine-tuning
@torch.no_grad()
def calibrate(network, lesson, args):
    """Set the activations' ranges: moving averages of minimum and maximum over some batches."""
    for quantizer in find_quantizers(network):
        quantizer.calibrating = True
    for _ in range(args.calibration_batches):
        network(draw_batch(lesson, args, augmented=False))
    for quantizer in find_quantizers(network):
        quantizer.calibrating = False


def distillation_losses(t_logits, s_logits, args):
    """The two terms of the loss, () each: KL with its factor tau², and CE.

        tau² sum_k P_k (log P_k - log Q_k),   P, Q = softmax(logits / tau) of teacher and quantized
        CE(s_logits, argmax t_logits)

    both as means over the batch.
    """
    kl_divergence = kernels.kl_divergence if args.fused else kernels.kl_divergence_ref
    kl = args.temperature**2 * kl_divergence(t_logits, s_logits, args.temperature)
    return kl, F.cross_entropy(s_logits, t_logits.argmax(1))


def choose_optimizer(network, args):
    """The optimiser; its learning rate is a tensor that compute_rate's values are written into."""
    if args.optimizer == "adam":
        return make_optimizer("adam", network, args.lr)
    rate = torch.tensor(args.lr, device=next(network.parameters()).device)
    return torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    )


def compute_rate(step, args):
    """The learning rate at an update, counted from 0 over all epochs."""
    n_steps = args.epochs * args.steps_per_epoch
    if args.schedule == "steps":
        return args.lr * 0.1 ** (4 * step // n_steps)
    return args.lr * decay_by_cosine(step, n_steps)


def train_epoch(network, lesson, optimizer, epoch, args):
    """One epoch of fine-tuning; returns the means of the two losses.

    Args:
        network: quantized, in eval mode: BatchNorm keeps its moments, its weights learn.
        epoch: counted from 0.
    """
    rate = optimizer.param_groups[0]["lr"]
    sums = torch.zeros(2, device=lesson.images.device)
    for step in range(epoch * args.steps_per_epoch, (epoch + 1) * args.steps_per_epoch):
        rate.fill_(compute_rate(step, args))
        x = draw_batch(lesson, args, augmented=True)
        with torch.no_grad():
            t_logits = lesson.teacher(x)
        losses = torch.stack(distillation_losses(t_logits, network(x), args))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        sums += losses.detach()
    return (sums / args.steps_per_epoch).tolist()


class Training(NamedTuple):
    """A network of some bits that learns."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    first_epoch: int
    """Epochs that a continued run has behind it. 0: the network is not calibrated yet."""


def begin_training(name, lesson, args):
    """The Training of a network of some bits."""
    network = quantize_network(lesson.teacher, lesson.info, parse_bits(name), args.fused)
    network.requires_grad_(True)
    return Training(network, choose_optimizer(network, args), 0)


def restore_training(saved, lesson, args):
    """The Training in a checkpoint. Raise an error if it is of another network."""
    training = begin_training(saved["arm"], lesson, args)
    training.network.load_state_dict(saved["network"])
    restore_optimizer(training.optimizer, saved["optimizer"])
    return training._replace(first_epoch=saved["arm_epoch"])


def tune(name, training, lesson, run, arms):
    """Calibrate and fine-tune a network of some bits, in place; a checkpoint after each epoch.

    Args:
        name: of the bits, such as W4A4.
        training: Training.
        lesson: Lesson.
        arms: results of all bits so far, {name: {…}}; this one is added.
    """
    args = run.args
    weight_bits, activation_bits = parse_bits(name)
    network, optimizer, first_epoch = training
    if first_epoch == 0:
        torch.manual_seed(args.seed)  # so that bits do not depend on those before them
        calibrate(network, lesson, args)
        arms[name] = dict(calibrated_accuracy=None, student_accuracy=None)
        if lesson.test is not None:
            accuracy = evaluate(network, *lesson.test, lesson.info)
            arms[name] = dict(calibrated_accuracy=accuracy, student_accuracy=accuracy)
            print(f"{name}: calibrated {accuracy:.2f} %")

    bar = tqdm(range(first_epoch, args.epochs), disable=None, desc=name)
    for epoch in bar:
        kl, ce = train_epoch(network, lesson, optimizer, epoch, args)
        n_before = list(args.bits).index(name) * args.epochs
        row = {"epoch": n_before + epoch + 1, "weight_bits": weight_bits}
        row |= {"activation_bits": activation_bits, "loss/kl": kl, "loss/ce": ce}
        if lesson.test is not None:
            row["eval/acc"] = evaluate(network, *lesson.test, lesson.info)
            arms[name]["student_accuracy"] = row["eval/acc"]
        run.show(bar, row)
        state = {"epoch": row["epoch"], "arm": name, "arm_epoch": epoch + 1, "arms": arms}
        state["network"] = network.state_dict()
        state["optimizer"] = optimizer.state_dict()
        run.save_checkpoint(state)


# Integers
class IntegerActivation(nn.Module):
    """An ActivationQuantizer with its grid alone: values scale (q - zero), 0 <= q < 2^bits."""

    def __init__(self, quantizer):
        super().__init__()
        self.n_steps = 2**quantizer.bits - 1
        scale, zero = kernels.quantization_grid(quantizer.low, quantizer.high, quantizer.bits)
        self.register_buffer("scale", scale)  # () fp32
        self.register_buffer("zero", zero.to(torch.uint8))  # ()

    def forward(self, x):
        zero = self.zero.float()
        q = ((x / self.scale).round() + zero).clamp(0, self.n_steps)
        return self.scale * (q - zero)


class IntegerLayer(nn.Module):
    """A layer that multiplies and adds integers, then scales once.

        y = scale_w scale_x sum (q_w - zero_w)(q_x - zero_x) + bias

    The sums are formed in float64, which holds integers up to 2^53 exactly and in which every
    device has convolutions. The first layer reads the image, which has no grid: its sums are of
    integer weights times float pixels, in float64 too.
    """

    def __init__(self, quantized, source):
        super().__init__()
        with torch.no_grad():
            weight = quantized.layer.weight
            rows = weight.flatten(1)
            scale, zero = kernels.quantization_grid(rows.amin(1), rows.amax(1), quantized.bits)
            shape = (-1, *[1] * (weight.ndim - 1))
            quantize = kernels.fake_quantize_channels
            if not quantized.fused:
                quantize = kernels.fake_quantize_channels_ref
            on_grid = quantize(weight, quantized.bits)
            q = (on_grid / scale.view(shape)).round() + zero.view(shape)
        self.layer = copy.deepcopy(quantized.layer)
        del self.layer.weight
        self.layer.register_buffer("weight", q.to(torch.uint8))
        self.layer.bias = None
        self.register_buffer("scale", scale)  # (C,) fp32
        self.register_buffer("zero", zero.to(torch.uint8))  # (C,)
        self.register_buffer("bias", None)
        if quantized.layer.bias is not None:
            self.bias = quantized.layer.bias.detach().clone()
        self.register_buffer("input_scale", None)
        if source is not None:
            self.input_scale = source.scale.clone()

    def forward(self, x):
        weight = self.layer.weight
        q = weight.double() - self.zero.double().view(-1, *[1] * (weight.ndim - 1))
        scale = self.scale.double()
        if self.input_scale is None:
            x = x.double()
        else:
            x = (x / self.input_scale).round().double()  # q_x - zero_x
            scale = scale * self.input_scale.double()
        y = functional_call(self.layer, {"weight": q}, (x,))
        shape = (-1, *[1] * (weight.ndim - 2))  # channels come last in a linear layer
        y = y * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.double().view(shape)
        return y.float()


def convert_to_integers(network):
    """The network that runs from integers, of one that quantize_network made. It shares nothing.

    Its state_dict is what quantized-W4A4.pt … hold; for each layer NAME
        NAME.layer.weight   uint8, q of the weight    NAME.zero     (C,) uint8
        NAME.scale          (C,) fp32                 NAME.bias     (C,) fp32, if the layer has one
        NAME.input_scale    () fp32, but for a layer that reads the image
    and for each quantizer_K its scale () fp32 and zero () uint8. All others, such as BatchNorm's,
    are the network's own.
    """
    integers = copy.deepcopy(network).requires_grad_(False)
    grids = {}
    for node in integers.graph.nodes:
        if node.op != "call_module":
            continue
        module = integers.get_submodule(node.target)
        (source,) = node.all_input_nodes[:1]
        if isinstance(module, ActivationQuantizer):
            grids[node.target] = IntegerActivation(module)
            integers.set_submodule(node.target, grids[node.target])
        elif isinstance(module, QuantizedLayer):
            integers.set_submodule(node.target, IntegerLayer(module, grids.get(source.target)))
    return integers


def save_integers(network, name, info, run):
    """Write quantized-NAME.pt: the integers and scales, and what they are of."""
    saved = dict(format=1, bits=name, **describe_info(info))
    saved["state_dict"] = convert_to_integers(network).state_dict()
    with run.write_file(f"quantized-{name}.pt") as file:
        torch.save(saved, file)


def load_integers(path, factory=""):
    """The network of a quantized-….pt, which runs from its integers, and its NetworkInfo.

    PyTorch has no quantized modules of its own that hold these: per-channel grids with a zero and
    fewer than 8 bits. torch.export takes what this returns: tests/test_quantization.py.

    Args:
        path: the file.
        factory: of a network of your own its file.py:factory. The file names it too, but may not
            choose which code runs.
    """
    saved = read_checkpoint(path)
    with fail_in_one_line(f"{path}: no file of quantization.py", "pass a quantized-….pt"):
        info = read_info(saved, path, factory)
        network = build_network(info).requires_grad_(False).eval()
        quantized = quantize_network(network, info, parse_bits(saved["bits"]))
        integers = convert_to_integers(quantized)
        integers.load_state_dict(saved["state_dict"])
    return integers, info


# Evaluation
def draw_accuracies(arms, teacher_accuracy, file):
    """Write a PNG of accuracies in percent against bits, {name: {…}}, as main collects them."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(teacher_accuracy, color="grey", linestyle="--", label="float")
    for field, label in (("student_accuracy", "fine-tuned"), ("calibrated_accuracy", "calibrated")):
        axis.plot(list(arms), [arm[field] for arm in arms.values()], marker="o", label=label)
    axis.set(xlabel="bits of weights (W) and activations (A)", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(file, dpi=100)


def main(args):
    if args.smoke:
        args = shrink(args)
    device = choose_device(args.device)
    seed_everything(args.seed)

    # The teacher, the real images that measure it, the images that it is quantized with.
    teacher, info = load_teacher(args, device, size_multiple=1)
    quantize_network(teacher, info, parse_bits(args.bits[0]), args.fused)  # or refuse it now
    lesson = load_lesson(teacher, info, args, device)

    run = RunFolder(args, device, clears=("quantized-W*A*.pt",))
    images = f"{len(lesson.images)} images of {args.images}"
    print(f"{info.name}: {' '.join(args.bits)}, {images}, {device}")
    result = report_lesson(lesson, run)
    result["similarity"] = measure_moment_distance(lesson, args)

    # Each pair of bits by itself.
    arms = {}
    restored = {}
    with run.open_checkpoint() as saved:
        if saved is not None:
            arms = saved["arms"]
            restored[saved["arm"]] = restore_training(saved, lesson, args)
    for name in args.bits:
        if name in arms and name not in restored:
            continue  # --resume: finished
        training = restored.get(name) or begin_training(name, lesson, args)
        tune(name, training, lesson, run, arms)
        save_integers(training.network, name, info, run)

    # What came of it.
    for field in ("calibrated_accuracy", "student_accuracy"):
        result[field] = {name: arm[field] for name, arm in arms.items()}
    if lesson.test is not None:
        with run.write_file("curve.png") as file:
            draw_accuracies(arms, result["teacher_accuracy"], file)
        figures = [f"{name} {arm['student_accuracy']:.2f} %" for name, arm in arms.items()]
        print(f"float {result['teacher_accuracy']:.2f} %, {', '.join(figures)}")
    run.finish(result)


if __name__ == "__main__":
    main(parse_args(PRESETS, choose_preset))
