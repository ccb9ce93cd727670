"""pseudo_replay.py: networks, losses and schedule against hand-made cases; the memories; runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import n_parameters, rows_of

import kernels
import pseudo_replay as replay
from harness.load import load_student, load_teacher

FAST = dict(
    device="cpu", epochs=3, iterations=2, batch_size=16, memory_share=0.2, width=4, latent=6
)  # 4 memory images beside 16 novel ones


@pytest.fixture
def float64():
    """Adam turns a rounding error of a vanishing gradient into a whole step; float64 avoids it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_args(**options):
    return replace(replay.PRESETS["digits"], **{**FAST, **options})


def make_networks(args, device="cpu"):
    torch.manual_seed(0)
    teacher, info = load_teacher(args, device)
    student, _ = load_student(args.student, info, device)
    return replay.make_networks(teacher, student, info, args, device)


def run(out, **options):
    replay.main(make_args(out=str(out), **options))
    return json.loads((out / "result.json").read_text())


def assert_same_student(first, second):
    """Two runs ended with the same weights, bit for bit."""
    other = torch.load(second / "student.pt")["state_dict"]
    for key, value in torch.load(first / "student.pt")["state_dict"].items():
        assert torch.equal(value, other[key]), key


# Networks


def test_networks_have_the_released_sizes():
    decoder = replay.Generator(1000, 128, 3, 32, spectral=False)
    generator = replay.Generator(1000, 128, 3, 32, spectral=True)
    assert n_parameters(decoder) == n_parameters(generator) == 8_423_939
    assert n_parameters(replay.Encoder(1000, 128, 3, 32)) == 4_321_872


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_networks_fit_images_of_other_sizes(size):
    x = replay.Generator(5, 4, 1, size, spectral=True)(torch.randn(6, 5))
    assert x.shape == (6, 1, size, size)
    assert x.mean().abs() < 1e-4
    assert (x.std(unbiased=False) - 1).abs() < 1e-2

    mean, log_variance = replay.Encoder(5, 4, 1, size)(x)
    assert mean.shape == log_variance.shape == (6, 5)


def test_generator_has_the_released_layers():
    torch.manual_seed(1)
    decoder = replay.Generator(7, 8, 3, 16, spectral=False)
    double = nn.Upsample(scale_factor=2)
    leaky = nn.LeakyReLU(0.2)
    layers = nn.Sequential(decoder.linear, nn.Unflatten(1, (8, 4, 4)), decoder.bn0)
    layers.extend([double, decoder.conv1, decoder.bn1, leaky])
    layers.extend([double, decoder.conv2, decoder.bn2, leaky])
    layers.extend([decoder.conv3, nn.Tanh(), decoder.bn3])
    z = torch.randn(5, 7)
    assert torch.allclose(decoder(z), layers(z), atol=1e-5)

    batchnorms = [m for m in decoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [bn.eps for bn in batchnorms] == [1e-5, 0.8, 0.8, 1e-5]
    assert not decoder.bn3.affine
    for m in (decoder.linear, decoder.conv1, decoder.conv2, decoder.conv3):
        assert m.weight.abs().max() <= 0.08 and m.weight.std() > 0.04
        assert not m.bias.any()


def test_spectral_norm_bounds_the_convolutions_of_the_novel_generator_alone():
    generator = replay.Generator(7, 8, 3, 16, spectral=True)
    for _ in range(30):
        generator(torch.randn(4, 7))
    for conv in (generator.conv1, generator.conv2, generator.conv3):
        norm = torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.02)
    assert not hasattr(generator.linear, "weight_orig")
    decoder = replay.Generator(7, 8, 3, 16, spectral=False)
    assert not hasattr(decoder.conv1, "weight_orig")


def test_encoder_has_the_released_layers():
    torch.manual_seed(1)
    encoder = replay.Encoder(7, 8, 3, 32)
    x = torch.randn(5, 3, 32, 32)
    y = x / x.square().sum(2, keepdim=True).sqrt()  # over the height of the image
    y = F.leaky_relu(encoder.bn1(F.conv2d(y, encoder.conv1.weight, None, 1, 1)), 0.2)
    y = F.leaky_relu(encoder.bn2(F.conv2d(y, encoder.conv2.weight, None, 1, 1)), 0.2)
    y = y[:, :, ::2, ::2]  # nearest
    y = encoder.bn3(F.conv2d(y, encoder.conv3.weight, None, 2, 1))
    y = y[:, :, ::2, ::2].flatten(1)
    mean, log_variance = encoder(x)
    assert torch.allclose(mean, encoder.mean(y), atol=1e-5)
    assert torch.allclose(log_variance, encoder.log_variance(y), atol=1e-5)

    batchnorms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [bn.eps for bn in batchnorms] == [0.8, 0.8, 1e-5]


def test_features_are_what_enters_the_first_fully_connected_layer():
    x = torch.randn(3, 1, 32, 32)
    lenet, _ = load_teacher(make_args(), "cpu")
    logits, features = replay.forward_with_features(lenet, x)
    assert features.shape == (3, 120)  # as the released code takes them of LeNet-5
    assert torch.equal(lenet.fc2(F.relu(lenet.fc1(features))), logits)
    assert torch.equal(lenet(x), logits)

    resnet, _ = load_teacher(make_args(teacher="digits-resnet8"), "cpu")
    logits, features = replay.forward_with_features(resnet, x)
    assert features.shape == (3, 64)
    assert torch.equal(resnet.fc(features), logits)
    assert not resnet.fc._forward_pre_hooks

    without = nn.Sequential(nn.Conv2d(1, 10, 32), nn.Flatten())
    assert replay.forward_with_features(without, x)[1] is None


# Losses


def test_onehot_and_entropy_by_hand():
    # P = (3/4, 1/4) and (1/4, 3/4): each is sure by log(4/3), both together cover the classes
    t_logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    assert replay.onehot_loss(t_logits).item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert replay.entropy_loss(t_logits).item() == pytest.approx(-math.log10(2), rel=1e-5)

    first_alone = 0.75 * math.log10(0.75) + 0.25 * math.log10(0.25)
    assert replay.entropy_loss(t_logits[:1]).item() == pytest.approx(first_alone, rel=1e-5)
    assert replay.entropy_loss(torch.zeros(4, 100)).item() == pytest.approx(-2, rel=1e-5)


def test_entropy_is_finite_where_a_class_has_no_probability():
    t_logits = torch.tensor([[200.0, 0.0, -200.0]] * 3, requires_grad=True)  # 0 in fp32
    loss = replay.entropy_loss(t_logits)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert t_logits.grad.isfinite().all()


def test_released_disagreement_by_hand():
    # At tau = 3, P = (1/2, 1/2) and Q = (1/4, 3/4), so M = (3/8, 5/8); in the second row P = Q.
    t_logits = torch.zeros(2, 2)
    s_logits = torch.tensor([[0.0, 3 * math.log(3.0)], [0.0, 0.0]])
    kl_p = 3 / 8 * math.log(3 / 4) + 5 / 8 * math.log(5 / 4)  # KL(M || P)
    kl_q = 3 / 8 * math.log(3 / 2) + 5 / 8 * math.log(5 / 6)
    expected = (kl_p + kl_q) / 2 / 2 / 2  # the half, two classes, two rows
    j = replay.disagreement(t_logits, s_logits, "released", 3.0, True)
    assert j.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n_classes", "most"), [(10, 0.161), (100, 0.0161), (200, 0.0081)])
def test_released_disagreement_is_weak_at_its_strongest(n_classes, most):
    t_logits = 1e4 * torch.eye(n_classes)
    s_logits = t_logits.roll(1, 1)
    j = replay.disagreement(t_logits, s_logits, "released", 3.0, True)
    assert j.item() == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize("divergence", ["released", "js"])
def test_disagreement_has_no_gradient_to_the_teacher(divergence):
    t_logits = torch.randn(6, 10, requires_grad=True)
    s_logits = torch.randn(6, 10, requires_grad=True)
    replay.disagreement(t_logits, s_logits, divergence, 3.0, True).backward()
    assert t_logits.grad is None
    assert s_logits.grad.any()


@pytest.mark.parametrize("fused", [True, False])
def test_textbook_disagreement_is_the_op_at_temperature_3(fused):
    t_logits = torch.randn(6, 10)
    s_logits = torch.randn(6, 10)
    expected = kernels.js_divergence_ref(t_logits, s_logits, 3.0).item()
    j = replay.disagreement(t_logits, s_logits, "js", 3.0, fused)
    assert j.item() == pytest.approx(expected, rel=1e-4)


def test_generator_loss_weighs_its_terms_as_released():
    t_logits = torch.randn(6, 10)
    s_logits = torch.randn(6, 10)
    features = torch.randn(6, 7)
    j = replay.disagreement(t_logits, s_logits, "released", 3.0, True)
    expected = replay.onehot_loss(t_logits) + 5 * replay.entropy_loss(t_logits) + 1 - j
    paper = replay.PRESETS["cifar10"]
    loss = replay.generator_loss(t_logits, features, s_logits, paper)
    assert loss.item() == pytest.approx((expected - 0.1 * features.abs().mean()).item())

    without = replay.generator_loss(t_logits, None, s_logits, replace(paper, alpha_act=0.0))
    assert without.item() == pytest.approx(expected.item())


def test_prior_loss_by_hand():
    # One image with latents N(1, 1) and N(0, 4): 1/2 and (4 - 1 - log 4) / 2; another at the prior.
    mean = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    log_variance = torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])
    expected = (0.5 + (3 - math.log(4)) / 2) / 2
    assert replay.prior_loss(mean, log_variance).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("terms", "value"), [("pixel+logit", 3.5), ("logit", 0.5), ("pixel", 3.0)])
def test_reconstruction_loss_has_the_terms_that_it_names(terms, value):
    x = torch.zeros(2, 1, 4, 4)
    t_logits = torch.zeros(2, 5)
    loss = replay.reconstruction_loss(x, x + 3, t_logits, t_logits - 0.5, terms)
    assert loss.item() == pytest.approx(value)


# Class-balanced inference


@pytest.mark.parametrize(("tuning", "leaky"), [("leaky", True), ("clean", False), ("off", False)])
def test_latents_take_one_step_of_a_fresh_adam(tuning, leaky, float64):
    args = make_args(latent_tuning=tuning)
    networks = make_networks(args)
    decoder = networks.memory.decoder.eval()
    torch.manual_seed(3)
    x = replay.infer_images(decoder, networks.teacher, args, leaky)
    gradients = [p.grad for p in decoder.parameters()]

    torch.manual_seed(3)
    z = torch.randn(4, 6).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.02)
    t_logits = networks.teacher(decoder(z))
    p = t_logits.softmax(1).mean(0)
    loss = 5 * (p * p.log10()).sum() + F.cross_entropy(t_logits, t_logits.argmax(1))
    loss = loss + F.mse_loss(z.var(0), torch.ones(6)) + F.mse_loss(z.mean(0), torch.zeros(6))
    loss.backward()
    if tuning != "off":
        adam.step()
    assert torch.allclose(x, decoder(z), atol=1e-6)
    assert not x.requires_grad
    assert all((gradient is not None) == leaky for gradient in gradients)


# One inner iteration


def run_released_iteration(networks, args):
    """The released loop in plain PyTorch, with alpha_act 0.1 and alpha_kl 1e-5."""
    generator, student, teacher = networks.generator, networks.student, networks.teacher
    encoder, decoder = networks.memory.encoder, networks.memory.decoder
    adam_g = torch.optim.Adam(generator.parameters(), args.lr_generator)
    adam_s = torch.optim.Adam(student.parameters(), args.lr_student)
    adam_e = torch.optim.Adam(encoder.parameters(), args.lr_memory)
    adam_m = torch.optim.Adam(decoder.parameters(), args.lr_memory)

    def match_loss(x):
        logits = teacher(x)
        p = logits.softmax(1).mean(0)
        return 5 * (p * p.log10()).sum() + F.cross_entropy(logits, logits.argmax(1))

    def infer():
        z = torch.randn(4, 6).requires_grad_()
        loss = match_loss(decoder(z)) + (z.var(0) - 1).square().mean() + z.mean(0).square().mean()
        loss.backward()  # also fills the gradients of the decoder
        z = z - 0.02 * z.grad / (z.grad.abs() + 1e-8)
        return decoder(z.detach()).detach()

    x = generator(torch.randn(16, 6))
    hidden = F.max_pool2d(F.relu(teacher.conv1(x)), 2)
    hidden = F.max_pool2d(F.relu(teacher.conv2(hidden)), 2)
    features = F.relu(teacher.conv3(hidden)).flatten(1)
    j = replay.disagreement(teacher(x), student(x), "released", 3.0, False)
    adam_g.zero_grad()
    (match_loss(x) - 0.1 * features.abs().mean() + 1 - j).backward()
    adam_g.step()

    for i in range(10):
        novel = generator(torch.randn(16, 6)).detach()
        decoder.eval()
        x = torch.cat([novel, infer()])
        decoder.train()
        adam_s.zero_grad()
        (student(x) - teacher(x).detach()).abs().mean().backward()
        adam_s.step()

        if i < 4:
            adam_e.zero_grad()
            adam_m.zero_grad()
            own = infer()
            if args.latent_tuning == "clean":
                adam_m.zero_grad()
            x = torch.cat([novel[:8], own])
            mean, log_variance = encoder(x)
            rebuilt = decoder(mean + (log_variance / 2).exp() * torch.randn(12, 6))
            loss = (rebuilt - x).abs().mean() + (teacher(rebuilt) - teacher(x)).abs().mean()
            prior = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
            (loss + 1e-5 * prior).backward()
            adam_e.step()
            adam_m.step()


@pytest.mark.parametrize("tuning", ["leaky", "clean"])
def test_an_inner_iteration_is_the_released_loop(tuning, float64):
    args = make_args(latent_tuning=tuning, alpha_act=0.1, alpha_kl=1e-5)
    ours = make_networks(args)
    released = make_networks(args)
    torch.manual_seed(5)
    replay.train_iteration(ours, replay.make_optimizers(ours, args), args)
    torch.manual_seed(5)
    run_released_iteration(released, args)
    for name in ("generator", "student", "memory"):
        expected = dict(getattr(released, name).named_parameters())
        for key, p in getattr(ours, name).named_parameters():
            assert torch.allclose(p, expected[key], atol=1e-6), (name, key)


def watch_batch_sizes(network):
    """A list that grows by the size of each batch which `network` gets."""
    sizes = []
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def watch_modes(module):
    """A list that grows by whether `module` is in train mode, each time it runs."""
    modes = []
    module.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    return modes


def test_batches_and_modes_of_an_inner_iteration():
    args = make_args(student="resnet8")
    networks = make_networks(args)
    student_batches = watch_batch_sizes(networks.student)
    encoder_batches = watch_batch_sizes(networks.memory.encoder)
    generator_modes = watch_modes(networks.generator.bn0)
    student_modes = watch_modes(networks.student.bn1)
    encoder_modes = watch_modes(networks.memory.encoder.bn1)
    decoder_modes = watch_modes(networks.memory.decoder.bn0)
    teacher_modes = watch_modes(networks.teacher)
    replay.train_iteration(networks, replay.make_optimizers(networks, args), args)

    assert student_batches == [16] + [20] * 10  # the generator's step, then its own
    assert encoder_batches == [12] * 4  # half of 16, and 4 of the VAE's own
    assert generator_modes == [True] * 11
    assert student_modes == [True] * 11
    assert encoder_modes == [True] * 4
    # Before a student step the decoder tunes and decodes in eval mode, in a VAE step it tunes,
    # decodes and reconstructs in train mode.
    assert decoder_modes == ([False] * 2 + [True] * 3) * 4 + [False] * 12
    assert not any(teacher_modes)


@pytest.mark.parametrize(
    ("memory", "has_past", "student_batch", "encoder_batch"),
    [
        pytest.param("vae", False, 20, 8, id="vae-at-first"),  # the student replays all the same
        pytest.param("bank", False, 16, 0, id="bank-at-first"),
        pytest.param("bank", True, 20, 0, id="bank"),
        pytest.param("none", True, 16, 0, id="none"),
    ],
)
def test_batches_without_a_past_and_of_other_memories(
    memory, has_past, student_batch, encoder_batch
):
    args = make_args(memory=memory)
    networks = make_networks(args)
    student_batches = watch_batch_sizes(networks.student)
    encoder_batches = []
    if memory == "vae":
        encoder_batches = watch_batch_sizes(networks.memory.encoder)
    replay.train_iteration(networks, replay.make_optimizers(networks, args), args, has_past)
    assert student_batches == [16] + [student_batch] * 10
    assert encoder_batches == [encoder_batch] * 4 or not encoder_batch


# Memories


def test_the_bank_draws_from_its_last_batches():
    args = make_args(memory="bank", bank_capacity=3)
    bank = make_networks(args).memory
    drawn = []
    for number in range(6):
        bank.newest.fill_(number)
        bank.store(number)
        drawn.append({bank.draw_batch().mean().item() for _ in range(40)})
    assert drawn[:3] == [{0.0}, {0.0, 1.0}, {0.0, 1.0, 2.0}]
    assert drawn[5] == {3.0, 4.0, 5.0}
    assert bank.draw_batch().shape == (4, 1, 32, 32)


def test_the_bank_is_offered_the_last_novel_images():
    args = make_args(memory="bank")
    networks = make_networks(args)
    made = []
    networks.generator.register_forward_hook(lambda module, inputs, x: made.append(x))
    optimizers = replay.make_optimizers(networks, args)
    replay.train_iteration(networks, optimizers, args, has_past=False)
    assert torch.equal(networks.memory.newest, made[-1][:4])


def test_bytes_of_a_memory_are_those_of_its_weights_or_images():
    vae = make_networks(make_args()).memory
    n_floats = n_parameters(vae)
    n_floats += sum(b.numel() for b in vae.buffers() if b.is_floating_point())
    assert replay.count_memory_bytes(vae) == 4 * n_floats + 8 * 7  # and 7 counters of batches
    bank = make_networks(make_args(memory="bank", bank_capacity=3)).memory
    assert replay.count_memory_bytes(bank) == 3 * 4 * 32 * 32 * 4
    assert replay.count_memory_bytes(make_networks(make_args(memory="none")).memory) == 0


# Runs


def watch_iterations(monkeypatch, figure):
    """A list that grows by figure(networks, optimizers, has_past) before each inner iteration."""
    seen = []
    train_iteration = replay.train_iteration

    def watched(networks, optimizers, args, has_past=True):
        seen.append(figure(networks, optimizers, has_past))
        return train_iteration(networks, optimizers, args, has_past)

    monkeypatch.setattr(replay, "train_iteration", watched)
    return seen


def test_the_vae_has_a_past_after_one_iteration(tmp_path, monkeypatch):
    seen = watch_iterations(monkeypatch, lambda networks, optimizers, has_past: has_past)
    run(tmp_path, epochs=2, iterations=2)
    assert seen == [False, True, True, True]


def test_the_bank_grows_every_few_epochs_and_the_students_rate_falls(tmp_path, monkeypatch):
    def look(networks, optimizers, has_past):
        lr = optimizers["student"].param_groups[0]["lr"].item()
        return has_past, int(networks.memory.n_batches), lr

    seen = watch_iterations(monkeypatch, look)
    run(tmp_path, memory="bank", epochs=8, iterations=1, bank_every=3, bank_capacity=2)
    has_past, n_batches, rates = zip(*seen, strict=True)
    assert has_past == (False, *[True] * 7)
    assert n_batches == (0, 1, 1, 1, 2, 2, 2, 2)
    cosine = [0.002 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert rates == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("memory", ["vae", "bank", "none"])
def test_the_student_of_a_run_learns(tmp_path, memory):
    options = dict(epochs=4, iterations=6, width=8, lr_student=1e-2, bank_every=1)
    result = run(tmp_path, memory=memory, **options)
    rows = rows_of(tmp_path)
    accuracies = [row["eval/acc"] for row in rows]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert max(accuracies) > 20  # chance is 10
    assert rows[-1]["loss/student"] < rows[0]["loss/student"]
    assert ("loss/memory" in rows[0]) == (memory == "vae")

    assert result["student_accuracy"] == result["final"]
    assert result["final"] == pytest.approx(accuracies[-1], abs=1e-3)
    assert result["mean"] == pytest.approx(sum(accuracies) / 4, abs=1e-3)
    assert result["memory"] == memory
    assert (result["memory_bytes"] > 0) == (memory != "none")
    for name in ("samples.png", "curve.png", "student.pt"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("memory", ["vae", "bank"])
def test_an_interrupted_run_resumes_with_its_memory(tmp_path, monkeypatch, memory):
    options = dict(memory=memory, epochs=4, iterations=1, bank_every=1)
    run(tmp_path / "whole", **options)
    show = replay.RunFolder.show

    def interrupt(self, bar, row):
        show(self, bar, row)
        if row["epoch"] == 3:  # its row is written, its checkpoint is not
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replay.RunFolder, "show", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", **options)
    run(tmp_path / "cut", **options, resume=True)
    for name in ("metrics.jsonl", "samples.png", "curve.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert_same_student(tmp_path / "whole", tmp_path / "cut")


def test_real_images_measure_the_student_but_do_not_change_it(tmp_path):
    run(tmp_path / "digits", epochs=1)
    result = run(tmp_path / "none", epochs=1, dataset="none")
    assert result["dataset"] == "none" and result["student_accuracy"] is None
    assert not (tmp_path / "none/curve.png").exists()
    assert_same_student(tmp_path / "digits", tmp_path / "none")


def test_a_teacher_without_features_has_no_activation_term(tmp_path, capsys):
    """A foreign teacher of three channels and 28 pixels; the student is of its family."""
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def small(num_classes=10, in_channels=3, image_size=28):\n"
        "    layers = [nn.Conv2d(in_channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()]\n"
        "    return nn.Sequential(*layers, nn.Conv2d(6, num_classes, 13), nn.Flatten())\n"
    )
    layers = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 10, 13)]
    torch.save(nn.Sequential(*layers).state_dict(), tmp_path / "weights.pt")
    foreign = dict(
        teacher=f"{tmp_path}/nets.py:small",
        student=f"{tmp_path}/nets.py:small",
        weights=str(tmp_path / "weights.pt"),
        num_classes=10,
        image_size=28,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        epochs=1,
    )
    with pytest.raises(SystemExit):
        run(tmp_path / "run", **foreign, alpha_act=0.1)
    assert "pass --alpha-act 0" in capsys.readouterr().err
    assert run(tmp_path / "run", **foreign)["student_accuracy"] is None


def test_losses_that_are_not_finite_end_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, lr_student=1e9)
    line = capsys.readouterr().err
    assert "not finite: loss/" in line and "lower the learning rates" in line


# Options and statistics


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(memory_share=1.0), "share 1.0: the student needs novel", id="no-novel"),
        pytest.param(dict(memory_share=0.0), "share: 0 images a batch; expected 2", id="none"),
        pytest.param(dict(memory_share=0.6), "share: 24 images a batch; expected 2", id="large"),
    ],
)
def test_a_share_that_leaves_too_few_images_of_a_kind_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        make_args(**options)


def test_a_run_without_memory_needs_no_share():
    assert make_args(memory="none", memory_share=0.0).n_memory == 0


def test_the_released_share_is_an_eighth_of_the_novel_images():
    assert replay.PRESETS["cifar10"].n_memory == 1024 // 8
    assert replay.PRESETS["mnist"].n_memory == replay.PRESETS["digits"].n_memory == 128 // 8


@pytest.mark.parametrize(
    ("teacher", "dataset", "preset"),
    [
        ("", "", "digits"),
        ("mnist-lenet5", "", "mnist"),
        ("digits-resnet8", "none", "digits"),
        ("cifar10-resnet20", "auto", "cifar10"),
        ("nets.py:small", "", "cifar10"),
        ("nets.py:small", "mnist", "mnist"),
    ],
)
def test_presets_follow_the_real_images_then_the_teacher(teacher, dataset, preset):
    assert replay.choose_preset(teacher, dataset) == preset


def test_statistics_by_hand():
    found = replay.summarise_accuracies([10.0, 20.0, 30.0, 40.0, 80.0, 60.0, 70.0, 50.0])
    assert found == {
        "mean": 45.0,
        "std": 22.913,
        "variance": 525.0,
        "best": 80.0,
        "final": 50.0,
        "last_quarter": 60.0,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["vae", "bank", "none"])
@pytest.mark.parametrize(
    "options",
    [
        dict(bf16=False),
        dict(bf16=False, student="resnet8", optimizer="sgd", divergence="js"),
        dict(bf16=True, student="resnet8"),
    ],
)
def test_a_graph_replays_what_eager_steps_do(memory, options):
    """Six iterations: the first three warm up, the last two run without a host sync."""
    sums = {}
    for graph in (True, False):
        args = make_args(device="cuda", memory=memory, **options)
        networks = make_networks(args, "cuda")
        optimizers = replay.make_optimizers(networks, args)
        replay.train_iteration(networks, optimizers, args, has_past=False)
        if memory == "bank":
            networks.memory.store(0)

        total = torch.zeros(3, device="cuda")

        def iterate(total=total, networks=networks, optimizers=optimizers, args=args):
            total.add_(replay.train_iteration(networks, optimizers, args))

        step = kernels.CapturedStep(iterate, enabled=graph)
        mode = torch.cuda.get_sync_debug_mode()
        for i in range(6):
            torch.cuda.set_sync_debug_mode("error" if i >= 4 else mode)
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        sums[graph] = total.tolist()
    assert sums[True] == pytest.approx(sums[False], rel=0.1 if options["bf16"] else 1e-2)
