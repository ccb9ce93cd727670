"""quantization.py: the graph, the grids, calibration, losses, integers; what a run does."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import rows_of
from scripts import read_refusal

import quantization
from harness.data import load_dataset, normalise
from harness.known import NetworkInfo
from harness.load import load_teacher
from harness.sources import Lesson, draw_noise
from kernels import _common

DIGITS = replace(
    quantization.PRESETS["digits"],
    device="cpu",
    images="real",
    num_images=60,
    bits=("W4A4", "W3A3"),
    calibration_batches=2,
    epochs=2,
    steps_per_epoch=2,
    batch_size=20,
)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes."""
    monkeypatch.setattr(_common, "INTERPRET", False)


def run(out, **options):
    """Run the script with small digits settings; its result.json."""
    quantization.main(replace(DIGITS, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def load_digits_teacher(name="digits-resnet8"):
    return load_teacher(replace(DIGITS, teacher=name), "cpu")


def load_digits_images(info, n=60):
    images, _ = load_dataset("digits", "", "test")
    return normalise(images[:n], info)


def make_quantized(bits=(4, 4), name="digits-resnet8", fused=True):
    """A calibrated network, its info and images (60, C, H, W) in normalised units."""
    teacher, info = load_digits_teacher(name)
    network = quantization.quantize_network(teacher, info, bits, fused)
    images, _ = load_dataset("digits", "", "train")
    torch.manual_seed(0)
    quantization.calibrate(network, Lesson(teacher, info, images, "none", None), DIGITS)
    return network, info, load_digits_images(info)


def describe(image_size=8, channels=1):
    mean = (0.5,) * channels
    return NetworkInfo("net", "net", "", 2, image_size, mean, mean, None)


# Options


@pytest.mark.parametrize("name", ["W0A4", "W4A33", "W04A4", "W1A8", "w4a4", "4", "A4W4", "", "W4"])
def test_bits_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match="--bits: expected W and A with 2 to 8 bits each"):
        replace(DIGITS, bits=(name,))


def test_bits_are_weights_then_activations():
    assert quantization.parse_bits("W4A8") == (4, 8)
    assert quantization.parse_bits("W2A3") == (2, 3)


@pytest.mark.parametrize(
    ("field", "value", "source"),
    [
        ("bits", ("W4A4",), "paper, tables"),
        ("epochs", 400, "released configuration"),
        ("steps_per_epoch", 200, "released configuration"),
        ("batch_size", 200, "released configuration"),
        ("optimizer", "sgd", "released configuration"),
        ("lr", 1e-4, "released configuration"),
        ("schedule", "steps", "released configuration: a tenth at 1/4, 1/2, 3/4"),
        ("temperature", 20.0, "released configuration"),
        ("low_pass", 0.0, "not in GDFQ"),
        ("shift", 0, "no augmentation"),
        ("mirror", False, "no augmentation"),
    ],
)
def test_released_values(field, value, source):
    assert getattr(quantization.PRESETS["cifar10-released"], field) == value, source


def test_released_constants():
    assert quantization.RANGE_DECAY == 0.9
    network = nn.Linear(2, 2)
    optimizer = quantization.choose_optimizer(network, quantization.RELEASED)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)


def test_learning_rates():
    args = replace(DIGITS, epochs=4, steps_per_epoch=2, lr=1.0)
    rates = [quantization.compute_rate(step, args) for step in range(8)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])
    args = replace(args, schedule="steps")
    rates = [quantization.compute_rate(step, args) for step in range(8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


# Images


def test_low_pass_weights_each_frequency_by_a_gaussian():
    x = torch.randn(2, 3, 8, 6)
    found = quantization.filter_low_pass(x, 2.0)
    spectrum = torch.fft.fft2(x.double())
    for u in range(8):
        for v in range(6):
            distance = min(u, 8 - u) ** 2 + min(v, 6 - v) ** 2
            spectrum[..., u, v] *= math.exp(-distance / 8)
    torch.testing.assert_close(found.double(), torch.fft.ifft2(spectrum).real, rtol=0, atol=1e-5)
    flat = torch.full((1, 1, 8, 8), 3.0)
    torch.testing.assert_close(quantization.filter_low_pass(flat, 1.0), flat)


@pytest.mark.parametrize("low_pass", [0.0, 2.0])
def test_similarity_is_the_mean_divergence_of_the_layers(low_pass):
    torch.manual_seed(3)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    network[2].running_mean.normal_()
    network[2].running_var.uniform_(0.5, 2)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    info = describe()
    lesson = Lesson(network, info, images, "none", None)
    args = replace(DIGITS, low_pass=low_pass)
    found = quantization.measure_moment_distance(lesson, args, batch_size=10)

    x = normalise(images, info)
    if low_pass:
        x = quantization.filter_low_pass(x, low_pass)
    expected = 0
    for layer, of_layer in ((network[0], x), (network[2], network[1](network[0](x)))):
        mean = of_layer.mean((0, 2, 3))
        var = of_layer.var((0, 2, 3), unbiased=False) + layer.eps
        stored = layer.running_var + layer.eps
        ratio = (var + (mean - layer.running_mean).square()) / stored
        expected = expected + (0.5 * (ratio - 1 - (var / stored).log())).mean() / 2
    assert found == pytest.approx(expected.item(), abs=2e-6)
    without = lesson._replace(teacher=nn.Conv2d(1, 1, 3))
    assert quantization.measure_moment_distance(without, args) is None
    idle = nn.Conv2d(1, 1, 3)
    idle.norm = nn.BatchNorm2d(1).eval()  # runs in training alone, say
    assert quantization.measure_moment_distance(lesson._replace(teacher=idle), args) is None


def test_real_images_are_nearer_than_noise():
    teacher, info = load_digits_teacher()
    real, _ = load_dataset("digits", "", "train")
    noise = draw_noise(info, 200)
    lesson = Lesson(teacher, info, real[:200], "none", None)
    pair = (lesson, lesson._replace(images=noise))
    distances = [quantization.measure_moment_distance(of_set, DIGITS) for of_set in pair]
    assert 0 <= distances[0] < 0.2 * distances[1]


# The quantized network


@pytest.mark.parametrize("name", ["digits-resnet8", "digits-lenet5"])
@pytest.mark.parametrize("fused", [True, False])
def test_every_layer_multiplies_values_of_two_grids(name, fused):
    network, _, x = make_quantized((4, 3), name, fused)
    layers = [m for m in network.modules() if isinstance(m, quantization.QuantizedLayer)]
    plain = [m for m in load_digits_teacher(name)[0].modules() if type(m) in quantization.LAYERS]
    assert len(layers) == len(plain) == (8 if "resnet" in name else 5)

    read = {}
    weights = []

    def keep_input(layer, inputs):
        read[layer] = inputs[0]

    hooks = [layer.layer.register_forward_pre_hook(keep_input) for layer in layers]
    call = quantization.functional_call

    def keep_weight(layer, parameters, inputs):
        weights.append(parameters["weight"])
        return call(layer, parameters, inputs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(quantization, "functional_call", keep_weight)
        network(x)
    for hook in hooks:
        hook.remove()
    n_values = [len(values.unique()) for values in read.values()]
    assert n_values[0] > 2**3  # the image
    assert max(n_values[1:]) <= 2**3 and min(n_values[1:]) > 2
    assert max(len(row.unique()) for weight in weights for row in weight) == 2**4


def test_a_shortcut_reads_what_the_layer_beside_it_reads():
    network, _, _ = make_quantized()
    calls = quantization.find_quantizers(network)
    users = []
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target.startswith("quantizer_"):
            assert list(node.args[0].users) == [node]  # nobody reads around it
            users.append(len(node.users))
    assert len(users) == len(calls)
    assert max(users) > 1  # a convolution and a shortcut


def test_eight_bits_answer_as_the_teacher_does():
    network, info, x = make_quantized((8, 8))
    teacher, _ = load_digits_teacher()
    with torch.no_grad():
        same = network(x).argmax(1) == teacher(x).argmax(1)
    assert same.float().mean() > 0.98


def test_fused_and_plain_ops_give_the_same_network():
    fused, _, x = make_quantized()
    plain, _, _ = make_quantized(fused=False)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)


def test_ranges_are_moving_averages_of_the_batches_ends():
    quantizer = quantization.ActivationQuantizer(4, True)
    quantizer.calibrating = True
    quantizer(torch.tensor([-1.0, 3.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1.0, 3.0)
    quantizer(torch.tensor([0.0, 13.0]))
    assert quantizer.low.item() == pytest.approx(-0.9)
    assert quantizer.high.item() == pytest.approx(0.9 * 3 + 0.1 * 13)
    quantizer.calibrating = False
    quantizer(torch.tensor([99.0]))
    assert quantizer.high.item() == pytest.approx(4.0)


def test_losses_are_those_of_torch():
    t_logits, s_logits = 3 * torch.randn(2, 5, 7)
    kl, ce = quantization.distillation_losses(t_logits, s_logits, replace(DIGITS, temperature=4.0))
    log_p, log_q = ((x / 4).log_softmax(1) for x in (t_logits, s_logits))
    expected = 16 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl, expected)
    assert ce.item() == pytest.approx(F.cross_entropy(s_logits, t_logits.argmax(1)).item())


def test_fine_tuning_changes_weights_and_no_moments():
    network, info, _ = make_quantized()
    teacher, _ = load_digits_teacher()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    network.requires_grad_(True)
    optimizer = quantization.choose_optimizer(network, DIGITS)
    images, _ = load_dataset("digits", "", "train")
    lesson = Lesson(teacher, info, images, "none", None)
    quantization.train_epoch(network, lesson, optimizer, 0, DIGITS)
    for name, x in network.state_dict().items():
        changes = name.endswith(("weight", "bias"))
        assert torch.equal(x, before[name]) != changes, name
    assert not network.training and not any(m.training for m in network.modules())
    assert all(p.grad is None for p in teacher.parameters())


# Networks that cannot be quantized


class Nothing(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3)).unsqueeze(1).expand(-1, 2)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(2, 1, 3, 3))
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(F.conv2d(x, self.kernel).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.last = nn.Linear(64, 2)

    def forward(self, x):
        return self.last(self.conv(self.conv(x)).flatten(1))


class Wandering(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 2)

    def forward(self, x):
        return self.last(x.flatten(1)) if x.sum() > 0 else self.last(-x.flatten(1))


class Transposed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ConvTranspose2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Nothing(), "no convolution or linear layer to quantize; take another network"),
        (Functional(), "kernel would stay float: it is of no plain convolution or linear layer"),
        (Twice(), "its layer conv is called twice; give each call its own layer"),
        (Wandering(), "cannot be traced by torch.fx: .*; take control flow that depends on values"),
        (Transposed(), "0.weight would stay float: it is of no plain convolution or linear layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_networks_that_cannot_be_quantized_are_refused(network, message, capsys):
    network.register_parameter("scale", nn.Parameter(torch.ones(1)))  # a device to compute on
    line = read_refusal(capsys, quantization.quantize_network, network.eval(), describe(), (4, 4))
    assert "--teacher net" in line
    assert re.search(message, line), line


# Integers


@pytest.mark.parametrize("name", ["digits-resnet8", "digits-lenet5"])
def test_integers_answer_as_the_fake_quantized_network_does(name):
    network, _, x = make_quantized((4, 4), name)
    integers = quantization.convert_to_integers(network)
    with torch.no_grad():
        expected = network(x)
        found = integers(x)
    assert (found.argmax(1) == expected.argmax(1)).all()
    # a sum that rounds to the other side of a half step moves a value by one step
    assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_a_layers_integers_give_its_very_sums_in_integer_arithmetic():
    network, _, x = make_quantized((3, 4))
    integers = quantization.convert_to_integers(network)
    seen = []
    layers = [m for m in integers.modules() if isinstance(m, quantization.IntegerLayer)]
    for layer in layers[1:]:
        layer.register_forward_hook(lambda layer, inputs, y: seen.append((layer, inputs[0], y)))
    with torch.no_grad():
        integers(x[:4])
    assert len(seen) == 7
    for layer, values, y in seen:
        inner = layer.layer
        assert inner.weight.dtype == torch.uint8 and inner.weight.max() <= 7
        q_x = (values / layer.input_scale).round().long()
        assert torch.equal(q_x * layer.input_scale, values)  # on the grid, and nothing is lost
        assert 0 <= q_x.max() - q_x.min() <= 15
        shape = (-1, *[1] * (inner.weight.ndim - 1))
        q_w = inner.weight.long() - layer.zero.long().view(shape)
        if isinstance(inner, nn.Linear):
            total = q_x @ q_w.T
            scale = layer.scale
        else:
            total = F.conv2d(q_x, q_w, None, inner.stride, inner.padding)
            scale = layer.scale.view(-1, 1, 1)
        assert total.dtype == torch.int64
        expected = total.double() * (scale.double() * layer.input_scale.double())
        if layer.bias is not None:
            expected = expected + layer.bias.double()
        assert torch.equal(y, expected.float())


def test_the_integers_are_what_the_docstring_says(tmp_path):
    run(tmp_path / "run", bits=("W3A4",), epochs=1)
    saved = torch.load(tmp_path / "run/quantized-W3A4.pt", weights_only=True)
    assert saved["bits"] == "W3A4"
    state = saved["state_dict"]
    weights = [name for name in state if name.endswith(".layer.weight")]
    assert len(weights) == 8
    for name in weights:
        layer = name.removesuffix(".layer.weight")
        assert state[name].dtype == torch.uint8 and state[name].max() == 7
        assert state[f"{layer}.zero"].dtype == torch.uint8
        assert state[f"{layer}.scale"].shape == state[name].shape[:1]
        assert (f"{layer}.input_scale" in state) == (layer != "conv1")
        assert (f"{layer}.bias" in state) == (layer == "fc")
        assert f"{name}_float" not in state
    assert state["quantizer_0.zero"].dtype == torch.uint8


def test_a_saved_network_runs_from_its_integers_and_can_be_exported(tmp_path):
    run(tmp_path / "run", bits=("W4A4",), epochs=1)
    integers, info = quantization.load_integers(tmp_path / "run/quantized-W4A4.pt")
    images, labels = load_dataset("digits", "", "test")
    accuracy = quantization.evaluate(integers, images, labels, info)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert accuracy == pytest.approx(result["student_accuracy"]["W4A4"], abs=1.0)

    x = normalise(images[:2], info)
    program = torch.export.export(integers, (x,))
    torch.testing.assert_close(program.module()(x), integers(x))


USERS_NETWORK = """
import torch.nn as nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


def test_a_file_does_not_choose_which_code_runs(tmp_path, capsys):
    (tmp_path / "net.py").write_text(USERS_NETWORK)
    namespace = {}
    exec(USERS_NETWORK, namespace)
    torch.save(namespace["make"](10).state_dict(), tmp_path / "w.pth")
    teacher = f"{tmp_path / 'net.py'}:make"
    options = dict(teacher=teacher, weights=str(tmp_path / "w.pth"), mean=(0.3,), std=(0.3,))
    run(tmp_path / "run", **options, images="digits", dataset="digits", bits=("W4A4",), epochs=1)
    path = tmp_path / "run/quantized-W4A4.pt"
    integers, info = quantization.load_integers(path, teacher)
    assert integers(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    line = read_refusal(capsys, quantization.load_integers, path)
    assert f"it would run {teacher}; pass that as factory if you trust it" in line


def test_a_file_of_something_else_is_no_quantized_network(tmp_path, capsys):
    torch.save({"format": 1}, tmp_path / "other.pt")
    line = read_refusal(capsys, quantization.load_integers, tmp_path / "other.pt")
    assert "no file of quantization.py" in line and line.endswith("pass a quantized-….pt")


# Runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        run(folder)
    return folder


def test_a_run_writes_what_it_says(whole_run):
    result = json.loads((whole_run / "result.json").read_text())
    names = {path.name for path in whole_run.iterdir()}
    pictures = {"samples.png", "curve.png"}
    assert {"quantized-W4A4.pt", "quantized-W3A3.pt", "checkpoint.pt", *pictures} <= names
    assert set(result["student_accuracy"]) == set(result["calibrated_accuracy"]) == {"W4A4", "W3A3"}
    assert result["teacher_accuracy"] > 95
    assert result["similarity"] > 0
    rows = rows_of(whole_run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["weight_bits"] for row in rows] == [4, 4, 3, 3]
    assert rows[1]["eval/acc"] == pytest.approx(result["student_accuracy"]["W4A4"], abs=1e-5)


def test_fine_tuning_lowers_the_loss_and_fused_ops_learn_the_same(tmp_path):
    options = dict(bits=("W3A3",), epochs=3, steps_per_epoch=6)
    run(tmp_path / "fused", **options)
    run(tmp_path / "plain", **options, fused=False)
    fused = rows_of(tmp_path / "fused")
    assert fused[-1]["loss/kl"] < 0.8 * fused[0]["loss/kl"]
    assert rows_of(tmp_path / "plain")[0]["loss/kl"] == pytest.approx(fused[0]["loss/kl"], rel=0.02)


def test_bits_do_not_depend_on_those_before_them(whole_run, tmp_path):
    run(tmp_path / "alone", bits=("W3A3",))
    first = torch.load(whole_run / "quantized-W3A3.pt", weights_only=True)["state_dict"]
    second = torch.load(tmp_path / "alone/quantized-W3A3.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_resumed_run_is_bit_equal(calls, whole_run, tmp_path, monkeypatch):
    train_epoch = quantization.train_epoch
    done = []

    def stop_later(*arguments):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return train_epoch(*arguments)

    out = tmp_path / "cut"
    monkeypatch.setattr(quantization, "train_epoch", stop_later)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    monkeypatch.setattr(quantization, "train_epoch", train_epoch)
    resumed = run(out, resume=True)
    whole = json.loads((whole_run / "result.json").read_text())
    for field in ("student_accuracy", "calibrated_accuracy", "similarity"):
        assert resumed[field] == whole[field]
    assert rows_of(out) == rows_of(whole_run)
    for name in ("W4A4", "W3A3"):
        states = []
        for folder in (out, whole_run):
            saved = torch.load(folder / f"quantized-{name}.pt", weights_only=True)
            states.append(saved["state_dict"])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_without_epochs_a_network_is_calibrated_only(tmp_path):
    result = run(tmp_path / "run", epochs=0, bits=("W8A8",))
    assert result["student_accuracy"] == result["calibrated_accuracy"]
    assert result["student_accuracy"]["W8A8"] > 90
    assert not rows_of(tmp_path / "run")


def test_without_test_images_a_network_is_quantized_all_the_same(tmp_path):
    teacher = "digits-resnet8"
    result = run(tmp_path / "run", dataset="none", bits=("W8A8",), teacher=teacher, images="noise")
    assert result["student_accuracy"] == {"W8A8": None}
    assert (tmp_path / "run/quantized-W8A8.pt").exists()


def test_low_pass_changes_what_is_learnt(tmp_path):
    options = dict(bits=("W3A3",), epochs=1)
    run(tmp_path / "a", **options)
    run(tmp_path / "b", **options, low_pass=4.0)
    assert rows_of(tmp_path / "a")[0]["loss/kl"] != rows_of(tmp_path / "b")[0]["loss/kl"]
    figures = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("a", "b")]
    assert figures[0]["similarity"] != figures[1]["similarity"]
