"""deepinversion.py: its terms against hand-made cases, whole runs on the shipped digits teacher, refusals."""

import hashlib
import json
import math
import pickle
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import deepinversion as di
import kernels
from kernels import Captured, _common, contract, total_variation_ref
from kernels.quality import agreement, diversity

FAST = dict(teacher="digits-resnet8", iterations=12, batch_size=10, checkpoint_every=5, log_every=1)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """Scripts run the CPU path: the interpreter would take minutes. One line of stderr is checked: fix the name."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(sys, "argv", ["deepinversion.py"])


def run(out, **options):
    args = di.Args(**(FAST | options), out=str(out), device="cpu")
    di.main(args)
    return json.loads((out / "result.json").read_text())


def refused(capsys, **options):
    """The one line that a refused run prints."""
    with pytest.raises(SystemExit) as stop:
        di.main(di.Args(**({"device": "cpu"} | options)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


# Terms


FUSED = dict.fromkeys(("fused", "fused_bn", "fused_distance", "fused_view"), True)
FUSED |= dict(bf16=True, graph=True, sync_moments=False, ema=0.0)
PLAIN = FUSED | dict.fromkeys(("fused", "fused_bn", "fused_distance", "fused_view"), False)


@pytest.mark.parametrize("parts", [FUSED, PLAIN, FUSED | dict(fused_bn=False)], ids=["fused", "plain", "hooks"])
def test_moment_loss_equals_a_hand_computed_case(parts):
    bn = nn.BatchNorm2d(2).eval()
    bn.running_mean.copy_(torch.tensor([1.0, 0.0]))
    bn.running_var.copy_(torch.tensor([1.0, 2.0]))
    # Channel 0 is 0 and 2 (mean 1, variance 1); channel 1 is 3 and 5 (mean 4, variance 1).
    x = torch.tensor([[[[0.0]], [[3.0]]], [[[2.0]], [[5.0]]]])
    y, found = di.measured(nn.Sequential(bn), parts, "cpu")(x)
    assert di.moment_loss(found, parts | dict(first_bn=1.0, moments="l2")).item() == pytest.approx(4 + 1)
    assert torch.allclose(y, bn(x))


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_layer_that_runs_has_its_own_weight(fused):
    found = [(torch.tensor([[3.0], [1.0]]), torch.ones(1)), (torch.tensor([[0.0], [6.0]]), torch.ones(1))]
    term = FUSED | dict(first_bn=10.0, moments="l2", fused_distance=fused)
    assert di.moment_loss(found, term).item() == pytest.approx(10 * 3 + 5)


def test_symmetric_kl_equals_that_of_torchs_gaussians():
    mean, var, running_var = torch.randn(5), torch.rand(5) + 0.5, torch.rand(5) + 0.5
    here, there = (torch.distributions.Normal(m, (v + 1e-5).sqrt()) for m, v in ((mean, var), (0 * mean, running_var)))
    divergence = torch.distributions.kl_divergence
    expected = divergence(here, there) + divergence(there, here)  # (5,)
    found = [(torch.stack((mean, var))[:, part], running_var[part]) for part in (slice(0, 2), slice(2, 5))]
    loss = di.moment_loss(found, FUSED | dict(first_bn=3.0, moments="symmetric-kl"))
    assert loss.item() == pytest.approx((3 * expected[:2].mean() + expected[2:].mean()).item(), rel=1e-4)


def test_moments_of_earlier_batches_count_as_the_share_says():
    """0.9 of the past and 0.1 of the present, which alone has a gradient; no past: the present alone."""
    term = FUSED | dict(first_bn=1.0, moments="l2", ema=0.9)
    none, past = torch.full((2, 1), torch.nan), torch.tensor([[3.0], [1.0]])
    now = torch.tensor([[1.0], [6.0]], requires_grad=True)
    assert di.moment_loss([(now, torch.ones(1))], term, none).item() == pytest.approx(1 + 5)
    loss = di.moment_loss([(now, torch.ones(1))], term, past)
    assert loss.item() == pytest.approx((0.9 * 3 + 0.1) + 0.1 * 5)
    loss.backward()
    assert now.grad.flatten().tolist() == pytest.approx([0.1, 0.1])
    assert past.flatten().tolist() == [3, 1]


def test_past_moments_are_those_of_finished_batches():
    teacher, x = tiny_rgb_teacher(), torch.randn(4, 3, 8, 8)
    setting = FUSED | dict(ema=0.9)
    first = di.remembered(x, teacher, setting, None)
    inputs = teacher.model[0](x)
    assert torch.allclose(first[0], inputs.mean((0, 2, 3)) - teacher.model[1].running_mean, atol=1e-5)
    assert torch.allclose(first[1], inputs.var((0, 2, 3), unbiased=False), atol=1e-5)
    second = di.remembered(2 * x, teacher, setting, first)
    assert torch.allclose(second, 0.9 * first + 0.1 * di.remembered(2 * x, teacher, setting, None), atol=1e-5)


def test_priors_per_image_do_not_grow_with_the_batch():
    teacher, x = tiny_rgb_teacher(), torch.randn(1, 3, 8, 8)
    draw, setting = torch.zeros(3, dtype=torch.long), di.SETTINGS["cifar10"] | FUSED
    values = {}
    for per_image in (True, False):
        for n in (1, 4):
            options = setting | dict(priors_per_image=per_image)
            terms = di.synthesis_loss(
                x.expand(n, -1, -1, -1), draw, torch.zeros(n, dtype=torch.long), teacher, options
            )
            values[per_image, n] = terms[1][di.TERMS.index("tv_l2")].item()
    assert values[True, 4] == pytest.approx(values[True, 1], rel=1e-5) == pytest.approx(values[False, 1], rel=1e-5)
    assert values[False, 4] == pytest.approx(2 * values[False, 1], rel=1e-5)


def test_measuring_leaves_the_network_alone():
    """No hook stays on it, and what a GPU takes in bf16 is a copy."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).eval()
    for parts in (FUSED, PLAIN):
        half = di.measured(model, parts, "cuda")
        weights = [p.dtype for m in half.args[0].network.modules() for p in m.parameters(recurse=False) if p.ndim > 1]
        assert weights == [torch.bfloat16, torch.bfloat16]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        x = torch.randn(8, 3, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            logits, found = half.args[0](x)
        assert torch.allclose(logits.float(), model(x), atol=0.05)
        assert found[0][0].dtype == torch.float32
        di.measured(model, parts, "cpu")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_learning_rate_warms_up_and_ends_near_zero():
    setting = dict(lr=0.2, warmup=100)
    rates = [di.learning_rate(i, 2000, setting) for i in range(2000)]
    assert rates[0] < 0.01 * 0.2 + 1e-9
    assert max(rates) == pytest.approx(0.2, rel=1e-2)
    assert rates[1050] == pytest.approx(0.1, rel=1e-6)  # halfway through the cosine
    assert rates[-1] < 1e-5
    assert all(a <= b for a, b in zip(rates[:100], rates[1:101], strict=True))
    assert all(a >= b for a, b in zip(rates[101:], rates[102:], strict=False))
    assert di.learning_rate(7, 10, dict(lr=0.05, warmup=None)) == 0.05
    assert di.learning_rate(0, 1, setting) > 0


def test_all_chance_of_a_batch_comes_from_seed_and_number():
    setting = dict(stages=[(300, 2, 1), (400, 1, 2)], flip=True)
    noise, draws = di.drawn(3, (2, 3, 4, 4), setting, 7)
    again = di.drawn(3, (2, 3, 4, 4), setting, 7)
    assert torch.equal(noise, again[0]) and all(torch.equal(a, b) for a, b in zip(draws, again[1], strict=True))
    for number, seed in ((4, 7), (3, 8), (7, 3)):
        other, others = di.drawn(number, (2, 3, 4, 4), setting, seed)
        assert not torch.equal(noise, other) and not torch.equal(draws[1], others[1])
    for draw, jitter, n_steps in zip(draws, (1, 2), (300, 400), strict=True):
        assert draw.shape == (n_steps, 3) and draw.dtype == torch.int64
        assert {tuple(roll) for roll in draw[:, :2].tolist()} == {
            (down, right) for down in range(-jitter, jitter + 1) for right in range(-jitter, jitter + 1)
        }  # both ends of the range are drawn
        assert 0.4 < draw[:, 2].float().mean() < 0.6 and set(draw[:, 2].tolist()) == {0, 1}
    assert not di.drawn(3, (2, 3, 4, 4), setting | dict(flip=False), 7)[1][0][:, 2].any()


def test_a_step_takes_its_own_rate_and_draw(monkeypatch):
    teacher, seen = tiny_rgb_teacher(), []
    setting = di.SETTINGS["cifar10"] | FUSED | dict(warmup=2, lr=0.5)
    stage, see = (8, 2, 1), kernels.jittered_view

    def watched(x, draw, dtype):
        seen.append((tuple(x.shape), draw.tolist(), work.optimizer.param_groups[0]["lr"].item()))
        return see(x, draw, dtype)

    monkeypatch.setattr(kernels, "jittered_view", watched)
    draws = torch.tensor([[i, -i, i % 2] for i in range(8)])
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    work = di.begin(x, torch.arange(4), draws, stage, teacher, setting)
    for _ in range(8):
        di.synthesis_step(work)
    assert [shape for shape, _, _ in seen] == [(4, 3, 4, 4)] * 8  # pooled before the teacher sees it
    assert [draw for _, draw, _ in seen] == draws.tolist()
    assert [rate for *_, rate in seen] == pytest.approx([di.learning_rate(i, 8, setting) for i in range(8)], rel=1e-6)


def tiny_rgb_teacher(seed=0, parts=None):
    """A random RGB network with BatchNorm, as main would describe it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 10)).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    model[1].running_mean.normal_()
    info = SimpleNamespace(model=model, mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10, image_size=8, device="cpu")
    info.low, info.high = di.pixel_range(info, "cpu")
    info.measured = di.measured(model, parts or FUSED, "cpu")
    return info


def test_total_loss_is_the_weighted_sum_of_its_terms():
    teacher, labels = tiny_rgb_teacher(), torch.tensor([1, 2])
    weights = dict(alpha_l2=0.5, alpha_tv_l1=0.25, alpha_bn=2.0, alpha_tv_l2=0.125, first_bn=1.0)
    x = torch.zeros(2, 3, 8, 8)
    x[0, 0, 0, :2] = torch.tensor([3.0, 4.0])
    x[1, 0, 1, 1] = 1.0
    draw = torch.tensor([2, -1, 1])
    total, terms = di.synthesis_loss(x, draw, labels, teacher, di.SETTINGS["cifar10"] | FUSED | weights)
    terms = dict(zip(di.TERMS, terms.tolist(), strict=True))
    assert total.item() == terms["total"]
    view = x.roll((2, -1), (2, 3)).flip(3)
    logits = teacher.model(view)
    features = teacher.model[0](view)
    bn = teacher.model[1]
    distance = (features.mean((0, 2, 3)) - bn.running_mean).norm()
    distance += (features.var((0, 2, 3), unbiased=False) - bn.running_var).norm()
    l1, l2 = total_variation_ref(view)
    expected = dict(ce=nn.functional.cross_entropy(logits, labels), bn=distance, tv_l1=l1, tv_l2=l2, l2=(5 + 1) / 2)
    for name, value in expected.items():
        assert terms[name] == pytest.approx(float(value), rel=1e-4), name
    assert terms["teacher"] == 100 * (logits.argmax(1) == labels).float().mean()
    weighted = {"ce": 1.0, "bn": 2.0, "tv_l2": 0.125, "tv_l1": 0.25, "l2": 0.5}
    assert total.item() == pytest.approx(sum(w * terms[k] for k, w in weighted.items()), rel=1e-5)


def stepped(n_steps, parts=FUSED, seed=1, layout=torch.channels_last, optimizer=None, **options):
    """Images (4, 3, 8, 8) after some steps, and the losses on the way."""
    setting = di.SETTINGS["cifar10"] | parts | dict(warmup=None) | options
    teacher, stage = tiny_rgb_teacher(parts=parts), (n_steps, 1, 2)
    noise, draws = di.drawn(0, (4, 3, 8, 8), setting | dict(stages=[stage]), seed)
    x = noise.contiguous(memory_format=layout)
    work = di.begin(x, torch.arange(4), draws[0], stage, teacher, setting)
    if optimizer:
        work.optimizer = optimizer(work)
    losses = []
    for _ in range(n_steps):
        di.synthesis_step(work)
        losses.append(work.terms.clone())
    return x.detach(), torch.stack(losses)


@pytest.mark.parametrize("parts", [FUSED, PLAIN], ids=["fused", "plain"])
def test_steps_equal_plain_adam(parts):
    """The fused one pairs parameter and gradient by memory order: one of them in another layout would scramble."""

    def plain_adam(work):
        return torch.optim.Adam([work.x], torch.zeros(()), betas=work.setting["betas"], foreach=False)

    ours, _ = stepped(12, parts)
    assert torch.allclose(ours, stepped(12, parts, optimizer=plain_adam)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("off", ["fused_bn", "fused_distance", "fused_view", "fused"])
def test_each_part_turned_off_gives_the_same_first_losses(off):
    images, losses = stepped(4)
    other_images, others = stepped(4, PLAIN if off == "fused" else FUSED | {off: False})
    assert torch.allclose(losses, others, rtol=1e-4, atol=1e-6)
    assert torch.allclose(images, other_images, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [FUSED, PLAIN, EMA := FUSED | dict(ema=0.9)], ids=["fused", "plain", "past"])
def test_a_captured_step_is_the_eager_one_and_never_syncs(parts, monkeypatch):
    """ResNet-20, all terms, 12 steps: the same images to the bit; the host waits for nothing once it is captured."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results = []
    for graph in (False, True):
        info = di.load("cifar10-resnet20", di.Args(device="cuda"))
        info.low, info.high = di.pixel_range(info, "cuda")
        setting = di.SETTINGS["cifar10"] | parts | dict(alpha_l2=1e-5, alpha_tv_l1=1e-3)
        info.measured = di.measured(info.model, setting, "cuda")
        noise, draws = di.drawn(0, (20, 3, 32, 32), setting, 0)
        x = noise.to("cuda", memory_format=torch.channels_last)
        past = di.remembered(x, info, setting, None) if parts is EMA else None
        work = di.begin(x, torch.arange(20, device="cuda") % 10, draws[0], (400, 1, 2), info, setting, past)
        step = Captured(partial(di.synthesis_step, work), enabled=graph)
        for n in range(12):
            torch.cuda.set_sync_debug_mode("error" if n > 4 else 0)
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(0)
        assert work.step.item() == 12
        results.append((x.detach().clone(), work.terms.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping_keeps_the_images_in_the_pixels_range():
    teacher = tiny_rgb_teacher()
    for clip in (True, False):
        x, _ = stepped(1, lr=50.0, clip=clip)
        assert bool(((x >= teacher.low) & (x <= teacher.high)).all()) == clip


def test_stages_scale_with_iterations_and_jitter_with_resolution():
    args = di.Args(setting="imagenet-0", iterations=300, jitter=20)
    setting = di.choose_setting(args, "imagenet")
    assert setting["stages"] == [(200, 2, 10), (100, 1, 20)]
    untouched = di.choose_setting(di.Args(), "imagenet")
    assert untouched["stages"] == [(2000, 2, 15), (1000, 1, 30)]
    assert untouched["alpha_bn"] == 0.05
    assert di.choose_setting(di.Args(alpha_bn=0.0, flip=False), "cifar10")["alpha_bn"] == 0.0


def test_published_images_are_of_the_settings_as_they_stand():
    for path in (contract.ROOT / "results").glob("inversion-*.json"):
        then = json.loads(path.read_text())["setting"]
        now = json.loads(json.dumps(di.SETTINGS[then["name"]]))
        assert {k: v for k, v in then.items() if k in now} == {k: now[k] for k in then if k in now}, path.name


@pytest.mark.parametrize("setting", list(di.SETTINGS))
def test_every_setting_has_every_option(setting):
    assert set(di.SETTINGS[setting]) == set(di.SETTINGS["cifar10"])


# Networks


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        pytest.param("resnet18", 11_689_512, 122, id="resnet18"),
        pytest.param("resnet34", 21_797_672, 218, id="resnet34"),
        pytest.param("resnet50", 25_557_032, 320, id="resnet50"),
        pytest.param("resnet101", 44_549_160, 626, id="resnet101"),
        pytest.param("resnet152", 60_192_808, 932, id="resnet152"),
    ],
)
def test_imagenet_resnets_have_torchvisions_sizes_and_keys(name, parameters, keys):
    with torch.device("meta"):
        model = di.NETWORKS[name](num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == keys
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "layer4.1.bn2.bias", "fc.weight"} <= set(state)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer2.0.downsample.0.weight"].shape[2:] == (1, 1)
    if name in ("resnet50", "resnet101", "resnet152"):  # bottlenecks; the stride is in the 3x3 convolution
        assert model.layer2[0].conv2.stride == (2, 2)
        assert model.layer2[0].conv1.stride == (1, 1)


def test_public_cifar_weights_load_under_their_own_names(tmp_path):
    """Keys of the widely used files: DataParallel's prefix, `linear`, wrapped in {'state_dict': …}."""
    torch.manual_seed(0)
    source = di.NETWORKS["resnet20"]()
    for m in source.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    renamed = {"module." + k.replace("fc.", "linear."): v for k, v in source.state_dict().items()}
    torch.save({"state_dict": renamed, "best_prec1": 91.78}, tmp_path / "public.th")
    args = di.Args(teacher="cifar10-resnet20", weights=str(tmp_path / "public.th"), device="cpu")
    info = di.load(args.teacher, args)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(info.model(x), source.eval()(x), atol=1e-5)  # channels_last rounds otherwise
    assert info.accuracy is None  # the shipped accuracy is not this file's
    assert not any(p.requires_grad for p in info.model.parameters())
    assert not info.model.training


def test_public_four_stage_weights_load_with_their_shortcuts(tmp_path):
    torch.manual_seed(0)
    source = di.NETWORKS["resnet18_cifar"]()
    renamed = {
        k.replace("fc.", "linear.").replace("downsample.", "shortcut."): v for k, v in source.state_dict().items()
    }
    assert any("shortcut." in k for k in renamed)
    torch.save({"net": renamed}, tmp_path / "public.th")
    for spec in ("resnet18_cifar", f"{contract.ROOT / 'teacher.py'}:resnet18_cifar"):
        info = di.load(spec, di.Args(teacher=spec, weights=str(tmp_path / "public.th"), device="cpu"))
        x = torch.randn(2, 3, 8, 8)
        assert torch.allclose(info.model(x), source.eval()(x), atol=1e-4)


def test_every_public_teacher_is_described_like_a_shipped_one():
    needed = {"arch", "dataset", "num_classes", "image_size", "mean", "std", "accuracy", "file", "sha256"}
    assert needed <= set.intersection(*(set(known) for known in contract.shipped().values()))
    for name, known in contract.PUBLIC.items():
        assert needed | {"url"} == set(known)
        assert known["arch"] == name in di.NETWORKS
        assert known["url"] == f"https://download.pytorch.org/models/{name}-{known['sha256']}.pth"
        assert known["url"].endswith("/" + known["file"]) and re.fullmatch("[0-9a-f]{8}", known["sha256"])


def test_weights_of_a_public_teacher_keep_its_description(tmp_path):
    """No download, ImageNet's classes, size and moments; the official accuracy is not this file's."""
    torch.save(di.NETWORKS["resnet18"](num_classes=1000).state_dict(), tmp_path / "r18.pth")
    args = di.Args(teacher="resnet18", weights=str(tmp_path / "r18.pth"), data_dir=str(tmp_path / "no"), device="cpu")
    info = di.load(args.teacher, args)
    assert (info.name, info.arch, info.dataset, info.device) == ("resnet18", "resnet18", "imagenet", "cpu")
    assert (info.num_classes, info.image_size, info.accuracy) == (1000, 224, None)
    assert info.mean == (0.485, 0.456, 0.406) and info.std == (0.229, 0.224, 0.225)
    assert not (tmp_path / "no").exists()
    args.num_classes, args.image_size, args.mean, args.std = 5, 64, (0.5,) * 3, (0.2,) * 3
    torch.save(di.NETWORKS["resnet18"](num_classes=5).state_dict(), tmp_path / "r18.pth")
    info = di.load(args.teacher, args)
    assert (info.num_classes, info.image_size, info.mean, info.std) == (5, 64, (0.5,) * 3, (0.2,) * 3)


def test_a_public_teacher_is_taken_from_the_data_folder_and_checked(capsys, tmp_path, monkeypatch):
    torch.save(di.NETWORKS["resnet18"](num_classes=1000).state_dict(), tmp_path / "r18.pth")
    digest = hashlib.sha256((tmp_path / "r18.pth").read_bytes()).hexdigest()[:8]
    args = di.Args(teacher="resnet18", data_dir=str(tmp_path), device="cpu")
    monkeypatch.setitem(contract.PUBLIC, "resnet18", contract.PUBLIC["resnet18"] | dict(file="r18.pth", sha256=digest))
    assert di.load(args.teacher, args).accuracy == 69.758
    monkeypatch.setitem(contract.PUBLIC, "resnet18", contract.PUBLIC["resnet18"] | dict(sha256="f37072fd"))
    assert "SHA-256" in refused(capsys, teacher="resnet18", data_dir=str(tmp_path))


@pytest.mark.parametrize("spec", ["resnet18_cifar", "resnet18-cifar"])
def test_hyphens_and_underscores_name_one_network(tmp_path, spec):
    """Its `arch`, which a student's checkpoint repeats, is the function's name either way: a .pt can be loaded."""
    network = di.NETWORKS["resnet18_cifar"]()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    info = di.load(spec, di.Args(teacher=spec, weights=str(tmp_path / "w.pth"), device="cpu"))
    assert (info.name, info.arch) == (spec, "resnet18_cifar")
    torch.save({"arch": info.arch, "state_dict": info.model.state_dict()}, tmp_path / "student.pt")
    again = di.load(str(tmp_path / "student.pt"), di.Args(device="cpu"))
    assert again.arch == "resnet18_cifar"
    assert torch.equal(again.model.fc.weight, network.fc.weight)


def test_weights_beside_a_checkpoint_replace_its_own_only(tmp_path):
    """--teacher teacher.pt --weights FILE: the checkpoint says what network it is, FILE what is in it."""
    torch.manual_seed(0)
    first, second = (di.NETWORKS["resnet8"](num_classes=4, in_channels=1).state_dict() for _ in range(2))
    described = dict(arch="resnet8", num_classes=4, image_size=16, mean=(0.1,), std=(0.2,), accuracy=99.0)
    torch.save(described | {"state_dict": first}, tmp_path / "teacher.pt")
    torch.save(second, tmp_path / "w.pth")
    spec = str(tmp_path / "teacher.pt")
    info = di.load(spec, di.Args(teacher=spec, device="cpu"))
    assert torch.equal(info.model.fc.weight, first["fc.weight"]) and info.accuracy == 99.0
    info = di.load(spec, di.Args(teacher=spec, weights=str(tmp_path / "w.pth"), device="cpu"))
    assert torch.equal(info.model.fc.weight, second["fc.weight"]) and info.accuracy is None
    assert (info.num_classes, info.image_size, info.mean, info.std) == (4, 16, (0.1,), (0.2,))


def test_a_fresh_network_is_a_trainable_student_of_its_teacher(tmp_path):
    """Only the architecture is the named network's; images and classes are the teacher's, weights nobody's."""
    args = di.Args(teacher="digits-resnet8", weights="nowhere.pt", device="cpu")
    teacher = SimpleNamespace(num_classes=7, image_size=16, mean=(0.3,), std=(0.4,))
    torch.save({"arch": "resnet8", "num_classes": 3, "state_dict": {}}, tmp_path / "student.pt")
    for spec in ("cifar10-resnet20", "resnet18", "resnet8", "wrn_16_1", "wrn-16-1", str(tmp_path / "student.pt")):
        torch.manual_seed(0)
        info = di.load(spec, args, teacher=teacher, fresh=True)
        assert (info.num_classes, info.image_size, info.mean, info.std) == (7, 16, (0.3,), (0.4,)), spec
        assert info.accuracy is None and info.arch.isidentifier(), spec
        assert info.model.training and all(p.requires_grad for p in info.model.parameters()), spec
        contract.try_out(info, 1, 32, 7)
    info = di.load("resnet8", di.Args(weights="nowhere.pt", num_classes=5, device="cpu"), fresh=True)
    assert (info.num_classes, info.image_size, info.mean) == (5, 32, contract.INFO["mean"])


def test_a_networks_own_layer_names_are_left_alone():
    """`fc` and `linear` side by side: neither is mistaken for the other's public name."""
    torch.manual_seed(0)
    source, target = (nn.ModuleDict({"fc": nn.Linear(2, 2), "linear": nn.Linear(2, 2)}) for _ in range(2))
    contract.load_state(target, source.state_dict(), "file")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_imagenet_weights_come_by_file_and_run(tmp_path):
    torch.save(di.NETWORKS["resnet18"](num_classes=1000).state_dict(), tmp_path / "r18.pth")
    out = tmp_path / "run"
    result = run(out, teacher="resnet18", weights=str(tmp_path / "r18.pth"), image_size=32, iterations=2, batch_size=4)
    assert result["verifier_agreement"] is None
    with np.load(out / "images-00000.npz") as made:
        assert made["images"].shape == (4, 32, 32, 3)
        assert len(set(made["labels"].tolist())) == 4  # of 1000 classes, four different ones are drawn


FACTORY = """
import torch.nn as nn
from neighbour import WIDTH

def factory(num_classes):
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(WIDTH, num_classes))

def without_batchnorm(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

def with_weights(num_classes, in_channels, image_size):
    network = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
    nn.init.constant_(network[1].bias, 3.0)
    return network

def broken():
    raise KeyError("nothing here")

def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def foreign(tmp_path):
    """A user's own file and weights for it."""
    (tmp_path / "my_nets.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4")
    for name, file in (("factory", "w.pth"), ("without_batchnorm", "flat.pth")):
        torch.save(contract.load_factory(tmp_path / "my_nets.py", name, num_classes=7).state_dict(), tmp_path / file)
    return tmp_path


def test_a_users_own_network_is_inverted(foreign):
    options = dict(weights=str(foreign / "w.pth"), num_classes=7, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    result = run(foreign / "run", teacher=f"{foreign / 'my_nets.py'}:factory", batch_size=14, **options)
    assert result["teacher_accuracy"] is None
    assert result["verifier_agreement"] is None
    with np.load(foreign / "run/images-00000.npz") as made:
        assert made["images"].shape == (14, 16, 16, 3)


def test_a_verifier_reads_images_in_its_own_units():
    args = di.Args(teacher="mnist-resnet8", num_classes=3, mean=(0.5,), device="cpu")  # those options: the teacher's
    verifier = di.load("digits-lenet5", args, teacher=di.load("mnist-resnet8", di.Args(device="cpu")))
    assert (verifier.num_classes, verifier.mean, verifier.std) == (10, [0.3054], [0.3237])
    assert verifier.accuracy == pytest.approx(99.72, abs=0.01)


def test_a_verifiers_factory_brings_its_own_weights(foreign):
    """--weights is the teacher's; a verifier that is only a name of an architecture would judge untrained."""
    teacher = di.load("digits-resnet8", di.Args(device="cpu"))
    args = di.Args(teacher="digits-resnet8", weights="nowhere.pt", device="cpu")
    verifier = di.load(f"{foreign / 'my_nets.py'}:with_weights", args, teacher=teacher)
    assert (verifier.model[1].bias == 3).all()
    assert (verifier.num_classes, verifier.image_size, verifier.mean) == (10, 32, teacher.mean)
    assert verifier.accuracy is None and not verifier.model.training
    result = run(foreign / "run", verifier=f"{foreign / 'my_nets.py'}:with_weights", iterations=1)
    assert result["verifier_agreement"] is not None


# Runs


def test_a_run_writes_everything_and_the_loss_falls(tmp_path):
    result = run(tmp_path, iterations=40)
    for name in ("args.json", "metrics.jsonl", "result.json", "samples.png", "images-00000.npz", "checkpoint.pt"):
        assert (tmp_path / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss/total"] < 0.5 * rows[0]["loss/total"]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    with np.load(tmp_path / "images-00000.npz") as made:
        assert made["images"].shape == (10, 32, 32, 1)
        assert made["images"].dtype == np.uint8
        assert made["labels"].dtype == np.int64
        assert made["labels"].tolist() == list(range(10))
    assert {"teacher_accuracy", "student_accuracy", "seconds", "seed", "device", "versions"} <= set(result)
    assert result["teacher_agreement"] >= 80
    assert result["student_accuracy"] is None


def test_same_seed_same_images_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "images-00000.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_fused_and_plain_losses_agree_on_rgb_images_and_fall(tmp_path):
    rows = []
    parts = dict(fused_bn=False), dict(fused_distance=False), dict(fused_view=False), dict(fused=False)
    for i, off in enumerate(({}, *parts)):
        run(tmp_path / str(i), teacher="cifar10-resnet20", **off)
        rows.append([json.loads(line) for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()])
    for others in rows[1:]:
        for i, (ours, plain) in enumerate(zip(rows[0], others, strict=True)):
            for key in ("loss/total", "loss/bn", "loss/tv_l1", "loss/tv_l2", "loss/l2"):
                # Rounding grows from step to step; a gradient in the wrong places shows in the second.
                assert ours[key] == pytest.approx(plain[key], rel=1e-4 if i < 3 else 1e-2)
    assert rows[0][-1]["loss/total"] < 0.8 * rows[0][0]["loss/total"]


def assert_resumes_as_if_never_cut(tmp_path, monkeypatch, stop_at, **options):
    """Cut a second run short before its step `stop_at`, resume it, and compare with the one in tmp_path / "whole"."""
    after_step = di.Run.after_step

    def dies(self, *rest):
        if self.n_done() == stop_at - 1:
            raise InterruptedError
        after_step(self, *rest)

    monkeypatch.setattr(di.Run, "after_step", dies)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", **options)
    monkeypatch.setattr(di.Run, "after_step", after_step)
    run(tmp_path / "cut", resume=True, **options)
    for name in ("images-00000.npz", "metrics.jsonl", "samples.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


@pytest.mark.parametrize("stop_at", [3, 7, 17], ids=["before the first checkpoint", "between", "in the second batch"])
def test_an_interrupted_run_resumes_bit_exactly(tmp_path, monkeypatch, stop_at):
    options = dict(num_images=20)  # two batches of 12 steps
    run(tmp_path / "whole", **options)
    assert_resumes_as_if_never_cut(tmp_path, monkeypatch, stop_at, **options)


@pytest.mark.parametrize("stop_at", [4, 6], ids=["at the boundary", "in the second stage"])
def test_two_stages_of_two_resolutions_and_their_resume(tmp_path, monkeypatch, stop_at):
    two = di.SETTINGS["digits"] | {"stages": [(4, 2, 1), (4, 1, 2)]}
    monkeypatch.setitem(di.SETTINGS, "digits", two)
    sizes, synthesis_loss = [], di.synthesis_loss

    def watched(x, *rest):
        sizes.append(x.shape[-1])
        return synthesis_loss(x, *rest)

    monkeypatch.setattr(di, "synthesis_loss", watched)
    options = dict(iterations=None, checkpoint_every=2)
    run(tmp_path / "whole", **options)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0] * 4 + [1] * 4
    assert sizes == [16] * 4 + [32] * 4

    assert_resumes_as_if_never_cut(tmp_path, monkeypatch, stop_at, **options)


def test_classes_are_shared_out_over_the_batches_and_pngs_lie_in_folders_of_theirs(tmp_path):
    result = run(tmp_path, batch_size=5, num_images=10, iterations=1, image_folder=True)
    labels, images = [], []
    for path in sorted(tmp_path.glob("images-*.npz")):
        with np.load(path) as made:
            labels += made["labels"].tolist()
            images.append(made["images"])
    assert sorted(labels) == list(range(10)) and result["n_images"] == 10
    images = np.concatenate(images)
    run(tmp_path / "again", batch_size=5, num_images=10, iterations=1, image_folder=True)
    run(tmp_path / "again", batch_size=5, classes=(3,), iterations=1, image_folder=True)
    assert len(list((tmp_path / "again").glob("images/*/*.png"))) == 5  # nothing of the run before
    for i, k in enumerate(labels):
        (path,) = (tmp_path / "images" / str(k)).iterdir()
        assert path.name == f"{i // 5:05d}-{i % 5:03d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[i, :, :, 0])


def test_pixel_range_is_asymmetric_in_normalised_units():
    args = di.Args(teacher="digits-resnet8", device="cpu")
    info = di.load(args.teacher, args)
    low, high = di.pixel_range(info, "cpu")
    assert low.shape == high.shape == (1, 1, 1, 1)
    assert di.to_uint8(low.expand(1, 1, 2, 2), info).max() == 0
    assert di.to_uint8(high.expand(1, 1, 2, 2), info).min() == 255
    assert low.item() == pytest.approx(-info.mean[0] / info.std[0])
    assert high.item() == pytest.approx((1 - info.mean[0]) / info.std[0])
    info.mean, info.std = (0.1, 0.5, 0.4), (0.25, 0.5, 0.2)
    low, high = di.pixel_range(info, "cpu")
    assert low.flatten().tolist() == pytest.approx([-0.4, -1.0, -2.0])
    assert high.flatten().tolist() == pytest.approx([3.6, 1.0, 3.0])


def reader(model):
    return SimpleNamespace(model=model, mean=(0.0,), std=(1.0,), num_classes=2, device="cpu")


def test_agreement_counts_in_all_and_by_class_over_all_shards():
    info = reader(lambda x: x.flatten(1)[:, :2])
    images = torch.tensor([[[[200, 0]]], [[[0, 200]]], [[[0, 200]]], [[[0, 200]]]], dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    expected = (75.0, {0: 50.0, 1: 100.0})
    assert agreement(info, [(images, labels)]) == expected
    assert agreement(info, zip(images.split(3), labels.split(3), strict=True)) == expected


def test_diversity_is_the_distance_to_the_nearest_of_the_same_class():
    info = reader(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)))
    images = torch.tensor([[[[200, 0]]], [[[0, 200]]], [[[100, 0]]], [[[200, 0]]]], dtype=torch.uint8)
    assert diversity(info, images[:2], torch.tensor([0, 0])) == 1.0  # at a right angle
    assert diversity(info, images, torch.tensor([0, 0, 0, 1])) == pytest.approx(1 / 3, abs=1e-4)  # two point alike
    assert diversity(info, images[:2], torch.tensor([0, 1])) is None
    assert diversity(reader(nn.Flatten()), images, torch.tensor([0, 0, 0, 1])) is None
    assert not info.model[1]._forward_pre_hooks


def test_class_folders_sort_as_their_classes(tmp_path):
    torch.save(di.NETWORKS["resnet8"](num_classes=12).state_dict(), tmp_path / "w.pth")
    run(tmp_path, teacher="resnet8", weights=str(tmp_path / "w.pth"), num_classes=12, image_size=8, verifier="none",
        batch_size=12, iterations=1, image_folder=True)  # fmt: skip
    folders = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert folders == [f"{k:02d}" for k in range(12)]


def test_finished_batches_are_not_thrown_away(capsys, tmp_path):
    """An unfinished set is not overwritten for want of --resume, a finished one is; a lost file is missed."""
    options = FAST | dict(batch_size=5, num_images=15, iterations=1, out=str(tmp_path))
    run(tmp_path, **{k: v for k, v in options.items() if k != "out"})
    (tmp_path / "result.json").unlink()
    assert "3 batches of an unfinished run; pass --resume" in refused(capsys, **options)
    (tmp_path / "images-00001.npz").unlink()
    assert "images-00001.npz has gone; put it back" in refused(capsys, **options, resume=True)


# Refusals: one line, exit code 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(teacher="resnet7000"), "unknown network 'resnet7000'", id="unknown teacher"),
        pytest.param(dict(batch_size=1), "--batch-size: expected at least 2", id="batch of one"),
        pytest.param(dict(iterations=-3), "--iterations: expected at least 1", id="negative steps"),
        pytest.param(dict(iterations=0), "--iterations: expected at least 1", id="no steps"),
        pytest.param(dict(num_images=-1), "--num-images: expected at least 0", id="negative images"),
        pytest.param(dict(alpha_bn=-1.0), "--alpha-bn: expected at least 0", id="negative weight"),
        pytest.param(dict(lr=float("nan")), "--lr: expected at least", id="lr NaN"),
        pytest.param(dict(image_size=33), "--image-size: expected an even number", id="odd size"),
        pytest.param(dict(seed=-1), "--seed: expected at least 0", id="negative seed"),
        pytest.param(dict(alpha_bn=math.inf), "--alpha-bn: expected at least 0", id="infinite weight"),
        pytest.param(dict(mean=(math.nan,) * 3), "--mean and --std", id="mean NaN"),
        pytest.param(dict(classes=(10**30,)), "--classes: expected numbers from 0 to 9", id="huge class"),
        pytest.param(dict(num_classes=10**13), "--num-classes: expected at least 0", id="huge class count"),
        pytest.param(dict(classes=(3, 99)), "--classes: expected numbers from 0 to 9", id="class out of range"),
        pytest.param(dict(setting="best"), "--setting: expected one of", id="unknown setting"),
        pytest.param(dict(dataset="svhn"), "--dataset: expected one of", id="unknown data set"),
        pytest.param(dict(device="tpu"), "--device: expected one of", id="unknown device"),
        pytest.param(dict(mean=(0.5,), std=(0.5, 0.5)), "--mean and --std", id="mean and std of two lengths"),
        pytest.param(dict(mean=(0.5,) * 3, std=(0.0,) * 3), "--mean and --std", id="std zero"),
        pytest.param(dict(weights="nowhere.pt"), "cannot be read", id="missing weights"),
        pytest.param(dict(teacher="nowhere.pt"), "cannot be read", id="missing checkpoint"),
        pytest.param(dict(teacher="nowhere.py:net", weights="w.pt"), "No such file", id="missing factory file"),
        pytest.param(dict(teacher="teacher.py:wrn_16_1"), "--weights FILE", id="factory without weights"),
        pytest.param(dict(num_classes=100), "--num-classes", id="class count mismatch"),
        pytest.param(dict(teacher="resnet18_cifar"), "--weights FILE", id="architecture without weights"),
        pytest.param(dict(verifier="resnet20"), "resnet20: this builds an untrained network", id="untrained verifier"),
        pytest.param(dict(teacher="resnet-20"), "unknown network 'resnet-20'", id="nearly a name"),
        pytest.param(dict(teacher=""), "unknown network ''", id="empty name"),
        pytest.param(dict(teacher="wrn-16-1"), "unknown network", id="name of teacher.py without file"),
        pytest.param(dict(verifier="digits-lenet5"), "--verifier digits-lenet5", id="verifier of other channels"),
        pytest.param(dict(ema=1.0), "--ema: expected at least 0 and below 1", id="past alone"),
        pytest.param(dict(moments="l1"), "--moments: expected one of l2, symmetric-kl", id="unknown distance"),
        pytest.param(dict(sync_moments=True), "--sync-moments: a single process", id="one process"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, says):
    assert says in refused(capsys, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_bad_checkpoints_are_refused(capsys, tmp_path):
    good = contract.ROOT / "teachers" / "cifar10-resnet20.pt"
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:20000])

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    with open(tmp_path / "hostile.pt", "wb") as file:
        pickle.dump({"state_dict": Hostile()}, file)
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "keys.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    said = {name: refused(capsys, weights=str(tmp_path / f"{name}.pt")) for name in ("cut", "hostile", "keys", "list")}
    assert "no safe checkpoint" in said["cut"]
    assert "no safe checkpoint" in said["hostile"]
    assert not (tmp_path / "owned").exists()
    assert "weights_only" not in said["hostile"]  # PyTorch's advice how to run it all the same
    assert "keys do not fit" in said["keys"]
    assert "expected a state dict" in said["list"]
    torch.save({0: torch.ones(3)}, tmp_path / "numbers.pt")
    assert "keys do not fit" in refused(capsys, weights=str(tmp_path / "numbers.pt"))


def hostile_teachers():
    state = {"arch": "resnet20", "state_dict": {}}
    yield {"layer.weight": torch.ones(3)}, "not a checkpoint of teacher.py"
    for arch in (
        None,
        True,
        5,
        "evil.py:f",
        "../evil.py:f",
        "versions",
        "main",
        "__doc__",
        "__class__",
        "ResNet",
        "Path",
        "resnet-20",
        "",
    ):
        yield {"arch": arch}, "keys.pt"
    for odd in (dict(mean=None), dict(std=("a",)), dict(mean=(), std=()), dict(num_classes="x"), dict(num_classes=-1)):
        yield state | odd, "keys.pt"
    for odd in (dict(num_classes=10**13), dict(image_size=33), dict(image_size="a"), dict(dataset=["cifar10"])):
        yield state | odd, ""


def test_a_checkpoint_cannot_send_for_other_weights(capsys, tmp_path, monkeypatch):
    """A relative path would be looked up in --data-dir, not found, and fetched from the address in the checkpoint."""
    fetched, network = [], di.NETWORKS["resnet8"]()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *rest: fetched.append(rest))
    monkeypatch.chdir(tmp_path)
    hostile = dict(arch="resnet8", url="https://example.org/evil.pth", sha256="00", file="/etc/passwd")
    torch.save(hostile | {"state_dict": network.state_dict()}, "teacher.pt")
    info = di.load("teacher.pt", di.Args(teacher="teacher.pt", data_dir="data", device="cpu"))
    assert torch.equal(info.model.fc.weight, network.fc.weight)
    assert not fetched and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(dict(accuracy=torch.ones(3)), id="accuracy a tensor"),
        pytest.param(dict(accuracy="best"), id="accuracy a word"),
        pytest.param(dict(accuracy={"top1": 5}), id="accuracy a dict"),
        pytest.param(dict(num_classes=0), id="no classes"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_checkpoints_that_would_fail_after_an_hour_fail_at_once(capsys, tmp_path, odd):
    """What result.json cannot hold, and a network without outputs: all else about this file is in order."""
    state = di.NETWORKS["resnet8"](num_classes=odd.get("num_classes", 10)).state_dict()
    torch.save(dict(arch="resnet8", state_dict=state) | odd, tmp_path / "teacher.pt")
    said = refused(capsys, teacher=str(tmp_path / "teacher.pt"), out=str(tmp_path / "run"))
    assert "teacher.pt: " in said
    assert not (tmp_path / "run").exists()


def test_the_accuracy_of_a_checkpoint_reaches_the_result_as_a_number(tmp_path):
    state = di.NETWORKS["resnet8"]().state_dict()
    torch.save(dict(arch="resnet8", accuracy=torch.tensor(81.5), state_dict=state), tmp_path / "teacher.pt")
    result = run(tmp_path / "run", teacher=str(tmp_path / "teacher.pt"), iterations=1)
    assert result["teacher_accuracy"] == 81.5


@pytest.mark.parametrize(("blob", "says"), list(hostile_teachers()))
def test_hostile_teacher_files_are_refused_and_run_nothing(capsys, tmp_path, monkeypatch, blob, says):
    (tmp_path / "evil.py").write_text("open('owned', 'w')")
    monkeypatch.chdir(tmp_path)
    torch.save(blob, tmp_path / "keys.pt")
    assert says in refused(capsys, teacher=str(tmp_path / "keys.pt"), out=str(tmp_path / "run"))
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "run").exists()


def test_an_altered_shipped_teacher_is_refused(capsys, tmp_path, monkeypatch):
    shutil.copytree(contract.ROOT / "teachers", tmp_path / "teachers")
    blob = bytearray((tmp_path / "teachers/cifar10-resnet20.pt").read_bytes())
    blob[len(blob) // 2] ^= 1
    (tmp_path / "teachers/cifar10-resnet20.pt").write_bytes(blob)
    monkeypatch.setattr(contract, "ROOT", tmp_path)
    assert "SHA-256" in refused(capsys)


def test_bad_networks_are_refused(capsys, foreign):
    name = f"{foreign / 'my_nets.py'}:"
    described = dict(weights=str(foreign / "w.pth"), num_classes=7, image_size=16)
    said = refused(capsys, teacher=name + "without_batchnorm", **(described | {"weights": str(foreign / "flat.pth")}))
    assert "no BatchNorm2d" in said
    assert "KeyError" in refused(capsys, teacher=name + "broken", **described)
    assert "AttributeError" in refused(capsys, teacher=name + "absent", **described)
    assert "ends the program" in refused(capsys, teacher=name + "leaves", **described)
    said = refused(capsys, teacher=name + "without_batchnorm", weights=str(foreign / "flat.pth"), num_classes=7)
    assert "--image-size" in said  # 32 px images do not fit its linear layer


def test_no_network_names_address_place_and_option(capsys, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    said = refused(capsys, teacher="resnet50", data_dir=str(tmp_path))
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in said
    assert str(tmp_path / "resnet50-0676ba61.pth") in said
    assert "--weights" in said


def test_an_out_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert "--out" in refused(capsys, out=str(tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "mine"


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(capsys, tmp_path, monkeypatch):
    synthesis_loss, calls = di.synthesis_loss, []

    def poisoned(*rest):
        calls.append(1)
        total, terms = synthesis_loss(*rest)
        factor = math.nan if len(calls) >= 9 else 1.0
        return total * factor, terms * factor

    monkeypatch.setattr(di, "synthesis_loss", poisoned)
    said = refused(capsys, **(FAST | dict(out=str(tmp_path))))
    assert "the loss is nan at step 9" in said
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] == 5

    def poisoned_gradient(*rest):  # the loss of a step is finite, the images after it are not
        calls.append(1)
        total, terms = synthesis_loss(*rest)
        return total * (math.nan if len(calls) == 9 else 1.0), terms

    calls.clear()
    monkeypatch.setattr(di, "synthesis_loss", poisoned_gradient)
    said = refused(capsys, **(FAST | dict(out=str(tmp_path / "late"), log_every=100, checkpoint_every=9)))
    assert "not finite: x of the run's state" in said
    assert not (tmp_path / "late/checkpoint.pt").exists()
    monkeypatch.setattr(di, "synthesis_loss", synthesis_loss)
    run(tmp_path, resume=True)
    assert (tmp_path / "result.json").exists()


def test_resume_refuses_other_options_and_foreign_checkpoints(capsys, tmp_path):
    run(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    again = FAST | dict(out=str(tmp_path), resume=True)
    assert "--resume: setting, lr differ" in refused(capsys, **(again | dict(lr=0.5)))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "result.json").exists()  # nothing was touched
    for blob in ({"x": torch.ones(3)}, {"options": "[]"}, {"options": 5}):
        torch.save(blob, tmp_path / "checkpoint.pt")
        assert "no checkpoint of this script" in refused(capsys, **again)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / name).write_bytes(before[:1000])
    assert "no safe checkpoint" in refused(capsys, **again)
