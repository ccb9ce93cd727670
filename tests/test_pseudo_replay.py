"""pseudo_replay.py: sizes, terms and schedule against hand-made cases, the three memories, whole runs, refusals."""

import doctest
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import n_parameters, rows_of, script_runs

import kernels
import pseudo_replay as replay
from kernels import _common, contract, figures

FAST = dict(epochs=3, iterations=2, batch_size=16, memory_share=0.2, width=4, latent=6)
run, refused = script_runs(replay, FAST)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """Scripts run the CPU path: the interpreter would take minutes. One line of stderr is checked: fix the name."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(sys, "argv", ["pseudo_replay.py"])


@pytest.fixture
def float64():
    """Adam turns rounding errors of a vanishing gradient into whole steps: such comparisons need float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def distiller_of(student="lenet5_half", memory="vae", **setting):
    args = replay.Args(device="cpu", memory=memory, **FAST)
    torch.manual_seed(0)
    teacher = replay.load("digits-lenet5", args)
    setting = replay.choose_setting(args, "digits") | setting
    return replay.Distiller(teacher, replay.load(student, args, teacher=teacher, fresh=True), setting, args)


# Sizes and layers


def test_networks_have_the_released_sizes():
    decoder, encoder = replay.Generator(1000, 128, 3, 32, spectral=False), replay.Encoder(1000, 128, 3, 32)
    assert n_parameters(decoder) == n_parameters(replay.Generator(1000, 128, 3, 32, spectral=True)) == 8_423_939
    assert n_parameters(encoder) == 4_321_872
    assert n_parameters(replay.NETWORKS["lenet5"]()) == 62_006
    assert n_parameters(replay.NETWORKS["resnet18_cifar"]()) == 11_173_962
    assert n_parameters(replay.NETWORKS["resnet34_cifar"]()) == 21_282_122


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_image_sizes(size):
    x = replay.Generator(5, 4, 1, size, spectral=True)(torch.randn(6, 5))
    assert x.shape == (6, 1, size, size)
    assert x.mean().abs() < 1e-4 and (x.std(unbiased=False) - 1).abs() < 1e-2  # the last BatchNorm, nothing learnt
    mean, log_variance = replay.Encoder(5, 4, 1, size)(x)
    assert mean.shape == log_variance.shape == (6, 5)


def test_generators_are_the_released_layers():
    torch.manual_seed(1)
    decoder, z = replay.Generator(7, 8, 3, 16, spectral=False), torch.randn(5, 7)
    layers = nn.Sequential(nn.Unflatten(1, (8, 4, 4)), decoder.bn0, nn.Upsample(scale_factor=2), decoder.conv1)
    layers.extend([decoder.bn1, nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2), decoder.conv2, decoder.bn2])
    layers.extend([nn.LeakyReLU(0.2), decoder.conv3, nn.Tanh(), decoder.bn3])
    assert torch.allclose(decoder(z), layers(decoder.linear(z)), atol=1e-5)
    assert [m.eps for m in decoder.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]
    assert not decoder.bn3.affine
    for m in decoder.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert m.weight.abs().max() <= 0.08 and m.weight.std() > 0.04 and not m.bias.any()


def test_spectral_norm_bounds_the_novel_generators_convolutions_alone():
    torch.manual_seed(0)
    generator = replay.Generator(7, 8, 3, 16, spectral=True)
    for _ in range(30):
        generator(torch.randn(4, 7))
    for conv in (generator.conv1, generator.conv2, generator.conv3):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert not hasattr(generator.linear, "weight_orig")
    assert not hasattr(replay.Generator(7, 8, 3, 16, spectral=False).conv1, "weight_orig")


def test_encoder_is_the_released_layers():
    torch.manual_seed(1)
    encoder, x = replay.Encoder(7, 8, 3, 32), torch.randn(5, 3, 32, 32)
    assert [m.eps for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)] == [0.8, 0.8, 1e-5]
    y = x / x.square().sum(2, keepdim=True).sqrt()  # over the height of the image
    y = F.leaky_relu(encoder.bn1(F.conv2d(y, encoder.conv1.weight, None, 1, 1)), 0.2)
    y = F.leaky_relu(encoder.bn2(F.conv2d(y, encoder.conv2.weight, None, 1, 1)), 0.2)
    y = encoder.bn3(F.conv2d(y[:, :, ::2, ::2], encoder.conv3.weight, None, 2, 1))[:, :, ::2, ::2]  # nearest
    assert torch.allclose(encoder(x)[0], encoder.mean(y.flatten(1)), atol=1e-5)


def test_features_enter_the_first_fully_connected_layer():
    args = replay.Args(device="cpu")
    lenet, x = replay.load("digits-lenet5", args).model, torch.randn(3, 1, 32, 32)
    logits, features = replay.logits_and_features(lenet, x)
    assert features.shape == (3, 120)  # the vector that the released code takes of LeNet-5
    assert torch.equal(lenet.fc2(F.relu(lenet.fc1(features))), logits) and torch.equal(lenet(x), logits)
    resnet = replay.load("digits-resnet8", args).model
    logits, features = replay.logits_and_features(resnet, x)
    assert features.shape == (3, 64) and torch.equal(resnet.fc(features), logits)
    assert not resnet.fc._forward_pre_hooks
    assert replay.logits_and_features(nn.Sequential(nn.Conv2d(1, 10, 32), nn.Flatten()), x)[1] is None


# Terms


def test_onehot_and_entropy_by_hand():
    # P = (3/4, 1/4) and (1/4, 3/4): each is sure by log(4/3), together they cover both classes: -log10(2)
    t_logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    assert replay.onehot_loss(t_logits).item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert replay.entropy_loss(t_logits).item() == pytest.approx(-math.log10(2), rel=1e-5)
    expected = 0.75 * math.log10(0.75) + 0.25 * math.log10(0.25)
    assert replay.entropy_loss(t_logits[:1]).item() == pytest.approx(expected, rel=1e-5)
    assert replay.entropy_loss(torch.zeros(4, 100)).item() == pytest.approx(-2, rel=1e-5)  # bans, not nats


def test_entropy_of_a_class_that_nobody_has():
    t_logits = torch.tensor([[200.0, 0.0, -200.0]] * 3, requires_grad=True)  # its mean probability is 0 in fp32
    loss = replay.entropy_loss(t_logits)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and t_logits.grad.isfinite().all()


def test_released_disagreement():
    # At temperature 3 P = (1/2, 1/2), Q = (1/4, 3/4), so M = (3/8, 5/8); a mean over both classes; then an equal row.
    t_logits, s_logits = torch.zeros(2, 2), torch.tensor([[0.0, 3 * math.log(3.0)], [0.0, 0.0]])
    kl_p = 3 / 8 * math.log(3 / 4) + 5 / 8 * math.log(5 / 4)
    kl_q = 3 / 8 * math.log(3 / 2) + 5 / 8 * math.log(5 / 6)
    j = replay.disagreement(t_logits, s_logits, "released", True)
    assert j.item() == pytest.approx((kl_p + kl_q) / 2 / 2 / 2, rel=1e-5)  # half, two classes, two rows
    for K, most in ((10, 0.161), (100, 0.0161), (200, 0.0081)):  # the reach of the clamp
        sure = 1e4 * torch.eye(K)
        assert replay.disagreement(sure, sure.roll(1, 1), "released", True).item() == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize("divergence", ["released", "js"])
def test_disagreement_moves_the_student_side_alone(divergence):
    t_logits, s_logits = (torch.randn(6, 10, requires_grad=True) for _ in range(2))
    replay.disagreement(t_logits, s_logits, divergence, True).backward()
    assert t_logits.grad is None and s_logits.grad.any()


def test_textbook_disagreement_is_the_fused_op():
    t_logits, s_logits = torch.randn(6, 10), torch.randn(6, 10)
    expected = kernels.js_divergence_ref(t_logits, s_logits, 3.0).item()
    for fused in (True, False):
        assert replay.disagreement(t_logits, s_logits, "js", fused).item() == pytest.approx(expected, rel=1e-4)


def test_generator_loss_weighs_its_terms():
    t_logits, s_logits, features = torch.randn(6, 10), torch.randn(6, 10), torch.randn(6, 7)
    setting = replay.choose_setting(replay.Args(), "cifar10")
    expected = replay.onehot_loss(t_logits) + 5 * replay.entropy_loss(t_logits) - 0.1 * features.abs().mean()
    expected = expected + 1 - replay.disagreement(t_logits, s_logits, "released", True)
    assert replay.generator_loss(t_logits, features, s_logits, setting).item() == pytest.approx(expected.item())
    off = setting | {"alpha_act": 0.0}
    assert replay.generator_loss(t_logits, None, s_logits, off).isfinite()


def test_prior_loss_by_hand():
    # one image, latents N(1, 1) and N(0, 4): 1/2 and (4 - 1 - log 4) / 2; another that is the prior; a mean over both
    mean, log_variance = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])
    expected = (0.5 + (3 - math.log(4)) / 2) / 2
    assert replay.prior_loss(mean, log_variance).item() == pytest.approx(expected, rel=1e-5)


def test_reconstruction_loss_names_its_terms():
    x, rebuilt = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 3.0)
    answers, rebuilt_answers = (
        (torch.zeros(2, 5), torch.zeros(2, 7)),
        (torch.full((2, 5), 0.5), torch.full((2, 7), 9.0)),
    )
    values = {"pixel+logit": 3.5, "logit": 0.5, "feature": 9.0, "pixel": 3.0}
    for name, value in values.items():
        loss = replay.reconstruction_loss(x, answers, rebuilt, rebuilt_answers, name)
        assert loss.item() == pytest.approx(value), name


# One inner iteration


@pytest.mark.parametrize("tuning", ["leaky", "clean", "off"])
def test_latents_take_one_step_of_a_fresh_adam(tuning, float64):
    state = distiller_of(latent_tuning=tuning)
    decoder = state.memory["decoder"].eval()
    torch.manual_seed(3)
    x = replay.decoded_memory(state, leak=tuning == "leaky")
    gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
    torch.manual_seed(3)
    z = torch.randn(state.setting["n_memory"], 6).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.02)
    t_logits = state.teacher.model(decoder(z))
    p = t_logits.softmax(1).mean(0)
    loss = 5 * (p * p.log10()).sum() + F.cross_entropy(t_logits, t_logits.argmax(1))
    loss = loss + F.mse_loss(z.var(0), torch.ones(6)) + F.mse_loss(z.mean(0), torch.zeros(6))
    loss.backward()
    if tuning != "off":
        adam.step()
    assert torch.allclose(x, decoder(z), atol=1e-6) and not x.requires_grad
    assert [g.any().item() for g in gradients] == (
        [True] * len(list(decoder.parameters())) if tuning == "leaky" else []
    )


@pytest.mark.parametrize("tuning", ["leaky", "clean"])
def test_an_inner_iteration_is_the_released_loop(tuning, float64):
    """1 generator step, 10 student steps on novel and memory images, a VAE step after each of the first four."""
    ours, plain = (distiller_of(latent_tuning=tuning, alpha_act=0.1, alpha_kl=1e-5) for _ in range(2))
    torch.manual_seed(5)
    replay.inner_iteration(ours)
    torch.manual_seed(5)
    g, s, t, n = plain.generator, plain.student, plain.teacher.model, plain.setting["n_memory"]
    encoder, decoder = plain.memory["encoder"], plain.memory["decoder"]
    adam = {
        k: torch.optim.Adam(getattr(plain, k).parameters(), plain.setting[f"lr_{k}"]) for k in ("generator", "student")
    }
    vae = [torch.optim.Adam(m.parameters(), plain.setting["lr_memory"]) for m in (encoder, decoder)]

    def balance(x):
        logits = t(x)
        p = logits.softmax(1).mean(0)
        return 5 * (p * p.log10()).sum() + F.cross_entropy(logits, logits.argmax(1))

    def inferred():
        z = torch.randn(n, 6).requires_grad_()
        (balance(decoder(z)) + (z.var(0) - 1).square().mean() + z.mean(0).square().mean()).backward()
        return decoder((z - 0.02 * z.grad / (z.grad.abs() + 1e-8)).detach()).detach()

    x = g(torch.randn(16, 6))
    hidden = F.relu(t.conv1(x))
    hidden = F.relu(t.conv2(F.max_pool2d(hidden, 2)))
    features = F.relu(t.conv3(F.max_pool2d(hidden, 2))).flatten(1)
    loss = balance(x) - 0.1 * features.abs().mean() + 1 - replay.disagreement(t(x), s(x), "released", False)
    adam["generator"].zero_grad()
    loss.backward()
    adam["generator"].step()
    for i in range(10):
        novel = g(torch.randn(16, 6)).detach()
        decoder.eval()
        x = torch.cat([novel, inferred()])
        decoder.train()
        adam["student"].zero_grad()
        (s(x) - t(x).detach()).abs().mean().backward()
        adam["student"].step()
        if i < 4:
            for optimizer in vae:
                optimizer.zero_grad()
            own = inferred()  # deposits its gradient in the decoder
            if tuning == "clean":
                decoder.zero_grad()
            x = torch.cat([novel[:8], own])
            mean, log_variance = encoder(x)
            rebuilt = decoder(mean + (log_variance / 2).exp() * torch.randn(8 + n, 6))
            loss = (rebuilt - x).abs().mean() + (t(rebuilt) - t(x)).abs().mean()
            prior = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
            (loss + 1e-5 * prior).backward()
            for optimizer in vae:
                optimizer.step()
    for name in ("generator", "student", "memory"):
        for (key, p), q in zip(getattr(ours, name).named_parameters(), getattr(plain, name).parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6), (name, key)


def watch(state, monkeypatch):
    """Batch sizes of the student's and of the memory's steps, and modes of the BatchNorms wherever one runs."""
    sizes, modes = {"student": [], "encoder": []}, {}
    step, encoder = replay.student_step, state.memory["encoder"] if state.setting["memory"] == "vae" else None

    def watched(state, x):
        sizes["student"].append(len(x))
        return step(state, x)

    monkeypatch.setattr(replay, "student_step", watched)
    if encoder:
        encoder.register_forward_hook(lambda m, x, y: sizes["encoder"].append(len(x[0])))
    for name, module in state.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, x, y, name=name: modes.setdefault(name, []).append(m.training))
    return sizes, modes


def test_schedule_and_modes_of_an_iteration(monkeypatch):
    state = distiller_of("resnet8", n_memory=5)
    sizes, modes = watch(state, monkeypatch)
    replay.inner_iteration(state)
    assert sizes == {"student": [21] * 10, "encoder": [13] * 4}  # 16 and 5; half of 16 and 5 of its own
    assert modes["generator.bn0"] == [True] * 11
    assert modes["memory.encoder.bn1"] == [True] * 4
    # decoder: two eval calls before a student step (tune, decode); three in train mode in a memory step
    assert modes["memory.decoder.bn0"] == ([False] * 2 + [True] * 3) * 4 + [False] * 12
    assert modes["student.bn1"] == [True] * 11  # the generator's step updates the student's moments too
    assert not any(m.training for m in state.teacher.model.modules())


def test_the_first_iteration_has_no_past(monkeypatch):
    state = distiller_of(n_memory=5)
    sizes, _ = watch(state, monkeypatch)
    replay.inner_iteration(state, has_past=False)
    assert sizes == {"student": [21] * 10, "encoder": [8] * 4}  # the student replays from the first step


@pytest.mark.parametrize(
    ("memory", "replays", "expected"), [("none", True, 16), ("bank", False, 16), ("bank", True, 21)]
)
def test_other_memories(monkeypatch, memory, replays, expected):
    state = distiller_of(memory=memory, n_memory=5)
    if memory == "bank":
        replay.end_epoch(state, 0)
    sizes, _ = watch(state, monkeypatch)
    replay.inner_iteration(state, has_past=replays)
    assert sizes["student"] == [expected] * 10
    assert not hasattr(state, "memory")


def test_bank_keeps_the_last_batches_and_draws_only_those():
    state = distiller_of(memory="bank", n_memory=2, bank_capacity=3, bank_every=5)
    seen = []
    for epoch in range(30):
        state.novel.fill_(epoch + 1)
        replay.end_epoch(state, epoch)
        seen.append({replay.memory_images(state, True)[0].mean().item() for _ in range(40)})
    assert seen[0] == seen[4] == {1.0}
    assert seen[7] == {1.0, 6.0}
    assert seen[29] == {16.0, 21.0, 26.0}  # pushed after epochs 15, 20, 25; the oldest were overwritten
    assert state.n_banked == 3 and replay.memory_bytes(state) == 3 * 2 * 32 * 32 * 4
    images = replay.memory_images(state, True)[0]
    assert images.shape == (2, 1, 32, 32)


def test_the_banks_batch_is_the_last_novel_one():
    state = distiller_of(memory="bank", n_memory=5)
    torch.manual_seed(4)
    replay.inner_iteration(state, has_past=False)
    replay.end_epoch(state, 0)
    assert torch.equal(state.bank[:5], state.novel) and state.novel.abs().sum() > 0


def test_memory_bytes_are_those_of_the_weights():
    state = distiller_of()
    n = sum(p.numel() for p in state.memory.parameters())
    n += sum(b.numel() for b in state.memory.buffers() if b.is_floating_point())
    assert replay.memory_bytes(state) == 4 * n + 8 * 7  # seven counters of batches
    assert replay.memory_bytes(distiller_of(memory="none")) == 0


def test_the_papers_values_are_the_cifar10_setting():
    setting = replay.choose_setting(replay.Args(), "cifar100")
    expected = dict(
        epochs=400, iterations=36, batch_size=1024, n_memory=128, latent=1000, width=128, n_student_iter=10
    )
    expected |= dict(n_memory_iter=4, lr_generator=0.02, lr_memory=0.02 / 40, lr_student=0.1, optimizer="sgd")
    expected |= dict(alpha_onehot=1.0, alpha_entropy=5.0, alpha_act=0.1, alpha_kl=1e-5, bank_capacity=10, bank_every=5)
    expected |= dict(reconstruction="pixel+logit", latent_tuning="leaky", divergence="released", memory="vae")
    assert {k: setting[k] for k in expected} == expected
    assert setting["student"] == "resnet18_cifar"
    sgd = distiller_of(optimizer="sgd").optimizers["student"]
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("momentum", "weight_decay", "nesterov")} == dict(
        momentum=0.9, weight_decay=5e-4, nesterov=False
    )


# Runs


@pytest.mark.parametrize("memory", ["vae", "bank", "none"])
def test_a_run_writes_everything_and_the_student_learns(tmp_path, memory):
    result = run(tmp_path, memory=memory, epochs=4, iterations=6, width=8, lr_student=1e-2, bank_every=1)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    accuracies = [row["eval/acc"] for row in rows]
    assert max(accuracies) > 20  # chance is 10
    assert rows[-1]["loss/student"] < rows[0]["loss/student"]
    assert result["student_accuracy"] == pytest.approx(accuracies[-1], abs=1e-3)
    assert result["mean"] == pytest.approx(sum(accuracies) / 4, abs=1e-3)
    assert result["best"] == pytest.approx(max(accuracies), abs=1e-3)
    assert result["std"] ** 2 == pytest.approx(result["variance"], rel=1e-2)
    assert (result["memory_bytes"] > 0) == (memory != "none")
    assert {"teacher_accuracy", "seconds", "seed", "device", "versions", "last_quarter"} < set(result)
    names = "args.json metrics.jsonl result.json samples.png curve.png checkpoint.pt student.pt"
    assert all((tmp_path / name).stat().st_size > 0 for name in names.split())
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert saved["arch"] == "lenet5_half" and saved["method"] == "pseudo_replay"
    teacher = replay.load(str(tmp_path / "student.pt"), replay.Args(device="cpu"))  # a student is a teacher too
    images, labels = replay.real_images(teacher, replay.Args(device="cpu"))[1]
    assert replay.evaluate(teacher.model, images, labels, teacher.mean, teacher.std) == pytest.approx(
        accuracies[-1], abs=1
    )


def test_the_students_rate_follows_a_cosine_over_the_epochs(tmp_path, monkeypatch):
    seen, step = [], replay.inner_iteration

    def watched(state, has_past=True):
        seen.append(state.optimizers["student"].param_groups[0]["lr"].item())
        return step(state, has_past)

    monkeypatch.setattr(replay, "inner_iteration", watched)
    run(tmp_path, epochs=4, iterations=2, lr_student=0.01, memory="none")
    expected = [0.005 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(2)]
    assert seen == pytest.approx(expected, rel=1e-5)


def test_fused_and_plain_runs_begin_alike(tmp_path):
    losses = []
    for fused in (True, False):
        run(tmp_path / str(fused), fused=fused, divergence="js", epochs=1)
        losses.append(rows_of(tmp_path / str(fused))[0])
    for name in ("loss/generator", "loss/student", "loss/memory"):
        assert losses[0][name] == pytest.approx(losses[1][name], abs=1e-4), name


@pytest.mark.parametrize("options", [{"reconstruction": "feature"}, {"latent_tuning": "off"}, {"optimizer": "sgd"}])
def test_options_run(tmp_path, options):
    assert run(tmp_path, epochs=1, **options)["student_accuracy"] is not None


def test_a_foreign_teacher_of_another_size_and_a_student_of_another_family(tmp_path, capsys):
    """A teacher without a fully connected layer has no features; its images have three channels and 28 pixels."""
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def small(num_classes=10, in_channels=3, image_size=28):\n"
        "    layers = nn.Conv2d(in_channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, num_classes, 13)\n"
        "    return nn.Sequential(*layers, nn.Flatten())\n"
    )
    torch.save(contract.load_factory(tmp_path / "nets.py", "small").state_dict(), tmp_path / "weights.pt")
    options = dict(
        teacher=f"{tmp_path}/nets.py:small", weights=str(tmp_path / "weights.pt"), student=f"{tmp_path}/nets.py:small"
    )
    options |= dict(num_classes=10, image_size=28, mean=(0.5,) * 3, std=(0.25,) * 3, epochs=1)
    assert "no features" in refused(capsys, **options, alpha_act=0.1, out=str(tmp_path / "run"))
    result = run(tmp_path / "run", **options)
    assert result["dataset"] == "none" and result["student_accuracy"] is None
    assert "no activation term" in capsys.readouterr().out
    assert not (tmp_path / "run/curve.png").exists() and (tmp_path / "run/samples.png").exists()


@pytest.mark.parametrize("memory", ["vae", "bank", "none"])
def test_an_interrupted_run_resumes_bit_exactly(tmp_path, monkeypatch, memory):
    options, after_epoch = dict(memory=memory, epochs=4, bank_every=1), replay.Run.after_epoch

    def interrupted(self, *rest):
        after_epoch(self, *rest)
        if len(self.lines) == 3:  # its row is written, its checkpoint is not
            raise KeyboardInterrupt

    run(tmp_path / "whole", **options)
    monkeypatch.setattr(replay.Run, "after_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", **options)
    monkeypatch.setattr(replay.Run, "after_epoch", after_epoch)
    run(tmp_path / "cut", **options, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def assert_same_run(whole, cut):
    for name in ("metrics.jsonl", "samples.png", "curve.png"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    a, b = (torch.load(n / "checkpoint.pt", weights_only=True)["state"]["networks"] for n in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_resumes_bit_exactly(tmp_path):
    """SIGKILL in the middle of an epoch, in a process of its own; then --resume, beside a run that was never cut."""
    options = dict(epochs=4, iterations=3, batch_size=16, width=8, latent=8)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, str(contract.ROOT / "pseudo_replay.py"), "--device=cpu", *flags, "--out"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    with subprocess.Popen([*command, str(tmp_path / "cut")], env=environment, stdout=subprocess.DEVNULL) as cut:
        until = time.time() + 60
        while not (tmp_path / "cut/checkpoint.pt").exists() and cut.poll() is None and time.time() < until:
            time.sleep(0.005)
        cut.send_signal(signal.SIGKILL)
    assert cut.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut/result.json").exists()
    resumed = subprocess.run([*command, str(tmp_path / "cut"), "--resume"], env=environment, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert b"step        1" not in resumed.stdout and b"step        4" in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def damaged_checkpoints(saved):
    def with_state(**state):
        return saved | {"state": saved["state"] | state}

    optimizers = saved["state"]["optimizers"]
    first = optimizers["memory"]["state"] | {0: dict(optimizers["memory"]["state"][0], exp_avg=torch.zeros(1))}
    yield with_state(optimizers=optimizers | {"memory": {"state": first}})
    yield with_state(optimizers={"student": optimizers["student"]})
    yield with_state(networks=saved["state"]["networks"] | {"epoch": torch.tensor(2.0)})
    yield {k: v for k, v in saved.items() if k != "options"}
    yield {"state_dict": {}}


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path, capsys):
    run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for damaged in damaged_checkpoints(saved):
        torch.save(damaged, tmp_path / "checkpoint.pt")
        assert "run without --resume" in refused(capsys, out=str(tmp_path), resume=True)
        assert (tmp_path / "student.pt").exists()  # nothing is lost
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert "memory" in refused(capsys, out=str(tmp_path), resume=True, memory="none")


def test_compare_draws_the_arms(tmp_path, capsys):
    for seed in (0, 1):
        for memory in ("none", "bank"):
            run(tmp_path / f"{memory}{seed}", memory=memory, seed=seed)
    folders = tuple(str(tmp_path / name) for name in ("none0", "none1", "bank0", "bank1"))
    replay.main(replay.Args(compare=folders, out=str(tmp_path / "all")))
    table = json.loads((tmp_path / "all/compare.json").read_text())
    assert (tmp_path / "all/compare.png").stat().st_size > 0
    assert table["epochs"] == 3 and sorted(table["arms"]) == ["bank", "none"]
    for memory, runs in table["arms"].items():
        for entry in runs:
            result = json.loads((tmp_path / f"{memory}{entry['seed']}/result.json").read_text())
            assert all(entry[k] == result[k] for k in ("mean", "std", "best", "final", "memory_bytes"))
    run(tmp_path / "short", epochs=1)
    run(tmp_path / "again", epochs=1, reconstruction="pixel")
    again = (str(tmp_path / "again"),)
    capsys.readouterr()
    assert "a second run of memory vae" in refused(capsys, compare=(*[str(tmp_path / "short")] * 2, *again))
    assert "the runs differ in epochs; pass" in refused(capsys, compare=(*folders, str(tmp_path / "short")))
    assert "pass the --out of finished" in refused(capsys, compare=(str(tmp_path / "nothing"),))


def test_statistics_by_hand():
    found = figures.accuracy_statistics([10.0, 20.0, 30.0, 40.0, 80.0, 60.0, 70.0, 50.0])
    assert found == dict(mean=45.0, std=22.913, variance=525.0, best=80.0, final=50.0, last_quarter=60.0)
    with pytest.raises(ValueError, match="got none"):
        figures.accuracy_statistics([])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(bank_capacity=0, memory="bank"), "--bank-capacity: expected at least 1", id="bank"),
        pytest.param(dict(memory_share=1.0), "--memory-share 1.0: the student needs novel images", id="share"),
        pytest.param(dict(memory_share=0.0), "--memory-share: 0 images a batch", id="no-share"),
        pytest.param(dict(memory_share=0.6), "--memory-share: 24 images a batch; expected 2", id="large-share"),
        pytest.param(dict(latent_tuning="x"), "--latent-tuning: expected one of leaky", id="tuning"),
        pytest.param(dict(latent=0), "--latent: expected at least 1", id="latent"),
        pytest.param(dict(memory="disk"), "--memory: expected one of vae, bank, none", id="memory"),
        pytest.param(dict(reconstruction="x"), "--reconstruction: expected one of pixel+logit", id="reconstruction"),
        pytest.param(dict(teacher="nobody"), "unknown network 'nobody'", id="teacher"),
        pytest.param(dict(student="nobody"), "--student nobody", id="student"),
        pytest.param(dict(teacher="cifar10-wrn-16-1", dataset="digits"), "do not fit the teacher", id="dataset"),
        pytest.param(dict(teacher="mnist-lenet5", data_dir="nowhere"), "cannot be read", id="missing"),
        pytest.param(dict(weights="nowhere.pt"), "nowhere.pt", id="weights"),
        pytest.param(dict(epochs=0), "--epochs: expected at least 1", id="epochs"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, says):
    assert says in refused(capsys, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run/result.json").exists()


def test_losses_that_are_not_finite_end_the_run(capsys, tmp_path):
    line = refused(capsys, out=str(tmp_path), lr_student=1e9)
    assert "not finite in epoch" in line and "lower --lr-student" in line


def test_real_images_only_measure(tmp_path):
    students = []
    for dataset in ("digits", "none"):
        run(tmp_path / dataset, dataset=dataset, setting="digits")
        students.append(torch.load(tmp_path / dataset / "student.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])


def test_a_student_with_an_unused_parameter_resumes(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch, torch.nn as nn\n"
        "class Odd(nn.Sequential):\n"
        "    def __init__(self, num_classes=10):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(1024, num_classes))\n"
        "        self.unused = nn.Parameter(torch.zeros(3))\n"
    )
    options = dict(student=f"{tmp_path}/nets.py:Odd", optimizer="sgd")
    run(tmp_path / "run", **options)
    run(tmp_path / "run", **options, resume=True)


def test_doctests():
    tested = doctest.testmod(figures)
    assert tested.attempted and not tested.failed


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["vae", "bank", "none"])
@pytest.mark.parametrize(
    ("student", "options"),
    [("lenet5_half", {}), ("resnet8", dict(optimizer="sgd", divergence="js")), ("resnet8", dict(bf16=True))],
)
def test_a_graph_replays_what_eager_steps_do(memory, student, options):
    """Six iterations, the first three as they are, the last two under a watch for synchronisation."""
    sums, options = [], FAST | dict(bf16=False) | options
    for graph in (True, False):
        args = replay.Args(device="cuda", memory=memory, **options)
        torch.manual_seed(0)
        teacher = replay.load("digits-lenet5", args)
        student_info = replay.load(student, args, teacher=teacher, fresh=True)
        state = replay.Distiller(teacher, student_info, replay.choose_setting(args, "digits"), args)
        replay.inner_iteration(state, has_past=False)
        replay.end_epoch(state, 0)
        step = kernels.Captured(lambda state=state: replay.inner_iteration(state), graph)
        mode = torch.cuda.get_sync_debug_mode()
        for i in range(6):
            torch.cuda.set_sync_debug_mode("error" if i >= 4 else mode)
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        sums.append(state.sums.tolist())
    assert sums[0] == pytest.approx(sums[1], rel=0.1 if options["bf16"] else 1e-2)
