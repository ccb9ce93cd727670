"""deepinversion.py --student: the pool, when new batches come, competition, resume, refusals."""

import math
import sys

import numpy as np
import pytest
import torch
from helpers import n_parameters, rows_of, script_runs

import deepinversion as di
import kernels
from kernels import _common, augment, contract
from kernels.distributed import Place
from kernels.folder import not_finite
from kernels.js_divergence import js_released
from kernels.pool import Pool
from kernels.shards import Shards

FAST = dict(dataset="digits", student="lenet5", verifier="none", iterations=4, batch_size=10, num_images=20, epochs=2,
            steps_per_epoch=4, batches_per_epoch=2, student_batch=8, checkpoint_every=3, log_every=1)  # fmt: skip
run, refused = script_runs(di, FAST)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """Scripts run the CPU path; one line of stderr is checked: fix the name."""
    monkeypatch.setattr(_common, "INTERPRET", False)
    monkeypatch.setattr(sys, "argv", ["deepinversion.py"])


def digits_teacher(**options):
    args = di.Args(teacher="digits-resnet8", dataset="digits", student="lenet5", device="cpu", **options)
    teacher = di.load(args.teacher, args)
    return teacher, contract.load_student(di.load, "lenet5", args, teacher), args


# Competition


def test_js_released_by_hand():
    """Two sure networks that disagree on two classes: P and Q clamped to 0.99 and 0.01, M = 1/2 each."""
    p, q = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    by_hand = 0.5 * (2 * math.log(0.5) - math.log(0.99) - math.log(0.01))
    assert js_released(p, q, 3.0).item() == pytest.approx(by_hand, rel=1e-5)
    assert by_hand == pytest.approx(1.614, abs=1e-3)
    assert js_released(p, p, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    ten = torch.zeros(1, 10)  # M is made before the clamp: with 1000 classes nearly all of it lies on the floor
    ten[0, 0] = 60.0
    m = torch.tensor([0.99, *[0.01] * 9])
    assert js_released(ten, ten, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    q = torch.zeros(1, 10)
    p_, q_ = m, torch.full((10,), 0.1)
    mid = ((torch.tensor([1.0, *[0.0] * 9]) + 0.1) / 2).clamp(0.01, 0.99)
    by_hand = 0.5 * (mid * (2 * mid.log() - p_.log() - q_.log())).sum()
    assert js_released(ten, q, 3.0).item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("form", ["js", "released"])
def test_competition_falls_as_the_networks_disagree_until_the_released_one_saturates(form):
    setting = dict(competition=form, temperature=3.0, fused=True)
    t_logits = torch.tensor([[30.0, 0.0, 0.0]])

    def loss_and_gradient(gap):
        s_logits = torch.tensor([[30.0 - gap, gap, 0.0]], requires_grad=True)
        loss = di.competition_loss(t_logits, s_logits, setting)
        return loss.item(), torch.autograd.grad(loss, s_logits)[0].abs().max().item()

    both = di.competition_loss(t_logits.repeat(2, 1), torch.tensor([[0.0, 30.0, 0.0], [30.0, 0.0, 0.0]]), setting)
    assert 0 < both.item() < 1  # one row that saturates does not end the gradient of a batch, its mean would
    values = [loss_and_gradient(gap) for gap in (0.0, 10.0, 15.0, 30.0)]
    assert values[0][0] == pytest.approx(1.0, abs=1e-5)
    assert all(a[0] >= b[0] - 1e-6 for a, b in zip(values, values[1:], strict=False))
    assert values[2][1] > 0
    if form == "js":
        assert values[3][0] == pytest.approx(1 - math.log(2), abs=1e-3)
    else:
        assert values[3] == (0.0, 0.0)  # the outer clamp: no gradient where both are sure and disagree


@pytest.mark.parametrize("fused", [True, False])
def test_the_competition_term_reaches_the_images_and_not_the_student(fused):
    torch.manual_seed(0)
    teacher, student, args = digits_teacher(fused=fused, competition="js", alpha_competition=2.0)
    setting = di.choose_setting(args, "digits")
    teacher.low, teacher.high = di.pixel_range(teacher, "cpu")
    teacher.measured = di.measured(teacher.model, setting, "cpu")
    state = di.Distiller(teacher, student, setting, 10)
    x, draw = torch.randn(4, 1, 32, 32, requires_grad=True), torch.zeros(3, dtype=torch.long)
    labels = torch.arange(4)
    with state.at_rest() as opponent:
        assert not opponent.training and not any(p.requires_grad for p in opponent.parameters())
        total, terms = di.synthesis_loss(x, draw, labels, teacher, setting, student=opponent)
        with_it = torch.autograd.grad(total, x)[0]
        by_hand = 2 * (1 - kernels.js_divergence_ref(teacher.model(x), opponent(x), setting["temperature"]))
        of_term = torch.autograd.grad(by_hand, x)[0]
    alone, _ = di.synthesis_loss(x, draw, labels, teacher, setting)
    without = torch.autograd.grad(alone, x)[0]
    assert terms[di.TERMS.index("competition")].item() == pytest.approx(by_hand.item() / 2, rel=1e-5)
    assert (total - alone).item() == pytest.approx(by_hand.item(), rel=1e-3)
    assert torch.allclose(with_it - without, of_term, atol=1e-3 * without.abs().max())
    assert of_term.abs().max() > 0
    assert student.model.training and all(p.requires_grad and p.grad is None for p in student.model.parameters())


# Pool and files


def test_a_pool_draws_from_all_its_images_or_from_the_newest_batch_alone():
    teacher, _, _ = digits_teacher()
    pool, batches = (
        Pool(teacher, 12),
        [torch.full((n, 1, 32, 32), v, dtype=torch.uint8) for n, v in ((8, 0), (4, 255))],
    )
    low, high = (v.item() for v in di.pixel_range(teacher, "cpu"))
    pool.add(batches[0])
    pool.draw_from(newest=False)
    assert pool.draw(50).unique().tolist() == pytest.approx([low])  # not the room that is still empty
    pool.add(batches[1])
    pool.draw_from(newest=True)
    assert pool.draw(50).unique().tolist() == pytest.approx([high])
    pool.draw_from(newest=False)
    x = pool.draw(3000)
    assert x.shape == (3000, 1, 32, 32) and x.unique().tolist() == pytest.approx([low, high])
    assert (x[:, 0, 0, 0] == high).float().mean().item() == pytest.approx(1 / 3, abs=0.05)  # every image alike
    assert "images" not in pool.state_dict()


def test_shards_keep_bytes_and_labels(tmp_path):
    shards = Shards(tmp_path)
    assert len(shards) == shards.n_images() == 0
    made = [(torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 11, k])) for k in range(3)]
    for i, batch in enumerate(made):
        shards.write(i, *batch, digits=2 if i == 0 else 0)
    assert len(shards) == 3 and shards.n_images() == 9
    for (images, labels), (x, y) in zip(made, shards.read(), strict=True):
        assert torch.equal(images, x) and torch.equal(labels, y)
    assert len(list(shards.read(shards.paths()[:2]))) == 2
    images, labels = shards.last(4)
    assert torch.equal(labels, torch.tensor([0, 11, 1, 0, 11, 2]))  # whole batches, the newest, in their order
    assert torch.equal(images[3:], made[2][0])
    shards.expect(range(3))
    assert {path.parent.name for path in tmp_path.glob("images/*/*.png")} == {"00", "11"}
    (tmp_path / "result.json").write_text("{}")
    shards.clear()
    assert not list(tmp_path.glob("images-*")) and not list(tmp_path.glob("images/*/*.png"))


def test_augmentation_moves_mirrors_and_cuts_within_the_batch():
    x = torch.arange(2 * 16, dtype=torch.float32).view(2, 1, 4, 4)
    rows = torch.stack([augment.mirrored(x) for _ in range(40)])
    for i in (0, 1):  # each image by itself, about half of the times
        flips = [torch.equal(row[i], x[i].flip(2)) for row in rows]
        assert all(torch.equal(row[i], x[i]) or flip for row, flip in zip(rows, flips, strict=True))
        assert 8 < sum(flips) < 32
    assert torch.equal(augment.varied(x, dict(shift=0, mirror=False, cut=False)), x)
    seen = augment.varied(x.repeat(8, 1, 1, 1), dict(shift=1, mirror=True, cut=True))
    assert seen.shape == (16, 1, 4, 4) and set(seen.unique().tolist()) <= set(x.unique().tolist())


def test_a_batch_starts_from_white_noise_or_from_a_blur_in_the_middle():
    info = contract.load_network("mnist-resnet8", di.Args(device="cpu"), di.NETWORKS)
    low, high = (v.item() for v in di.pixel_range(info, "cpu"))
    noise = torch.randn(200, 1, 32, 32)
    for name in ("cifar10", "cifar10-released", "imagenet-0"):
        assert torch.equal(augment.start(noise, di.SETTINGS[name], info), noise)
    setting = dict(blur=5, margin=6, gain=0.05)
    x = augment.start(noise, setting, info)
    inside = x[:, :, 6:26, 6:26]
    assert (x != low).sum() == inside.numel()  # nothing of the margin
    assert inside.std().item() == pytest.approx(0.05, rel=0.05)
    neighbours = torch.corrcoef(torch.stack([inside[..., 1:].flatten(), inside[..., :-1].flatten()]))[0, 1]
    assert neighbours.item() == pytest.approx(0.8, abs=0.03)  # 4 of 5 columns in common
    x = augment.start(noise, setting | dict(gain=20.0), info)
    assert x.min().item() == pytest.approx(low) and x.max().item() == pytest.approx(high)


# Protocol


def test_batches_come_at_even_distances():
    """The paper's VGG-11-BN protocol: 195 updates an epoch, four new batches in each."""
    setting = dict(initial=50, steps_per_epoch=195, batches_per_epoch=4)
    due = [n for n in range(390) if di.batches_before(n, setting) > di.batches_before(n - 1, setting)]
    assert due == [0, 49, 98, 147, 195, 244, 293, 342]
    assert di.batches_before(389, setting) == 58
    none = setting | dict(batches_per_epoch=0)
    assert {di.batches_before(n, none) for n in range(-1, 390)} == {50}


def test_a_student_is_trained_as_the_protocol_says(tmp_path, monkeypatch):
    """What each step draws from, which batches compete, what the run leaves behind."""
    drawn, opponents, synthesise, draw_from = [], [], di.synthesise, Pool.draw_from

    def watched(run, labels, teacher, setting, student=None):
        opponents.append((run.batch, run.n_student, student is not None))
        return synthesise(run, labels, teacher, setting, student)

    def noted(pool, newest):
        draw_from(pool, newest)
        drawn.append((newest, *pool.window.tolist()))

    monkeypatch.setattr(di, "synthesise", watched)
    monkeypatch.setattr(Pool, "draw_from", noted)
    result = run(tmp_path, competition="js")
    # two batches first; then one before steps 0, 2, 4 and 6
    assert opponents == [(0, 0, False), (1, 0, False), (2, 0, True), (3, 2, True), (4, 4, True), (5, 6, True)]
    assert drawn == [(True, 20, 10), (False, 0, 30), (True, 30, 10), (False, 0, 40)] + [
        (True, 40, 10), (False, 0, 50), (True, 50, 10), (False, 0, 60)]  # fmt: skip
    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2]
    assert [row["step"] for row in rows if "step" in row] == list(range(1, 25))
    assert [row["batch"] for row in rows if "loss/competition" in row] == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    assert rows[-1]["eval/acc"] == result["student_accuracy"]  # the final iterate
    assert result["n_images"] == 60 and result["student"] == "lenet5" and result["teacher_accuracy"] == 100.0
    assert (tmp_path / "curve.png").stat().st_size > 0
    student = di.load(str(tmp_path / "student.pt"), di.Args(device="cpu"))
    assert student.accuracy == result["student_accuracy"] and student.arch == "lenet5"
    images, labels = di.real_images(student, di.Args(dataset="digits", device="cpu"))[1]
    assert di.agreement(student, [(images, labels)])[0] == result["student_accuracy"]
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert saved["method"] == "adaptive deepinversion" and n_parameters(student.model) > 0


def test_only_its_own_steps_change_a_students_moments(monkeypatch):
    """Neither images that compete with it nor the measure of its accuracy do."""
    teacher, _, args = digits_teacher(student_batch=6, competition="js")
    setting, student = di.choose_setting(args, "digits"), contract.load_student(di.load, "resnet8", args, teacher)
    teacher.low, teacher.high = di.pixel_range(teacher, "cpu")
    teacher.measured = di.measured(teacher.model, setting, "cpu")
    state, x = di.Distiller(teacher, student, setting, 6), torch.randn(6, 1, 32, 32)

    def moments():
        return torch.cat([b.detach().clone().flatten().float() for b in student.model.buffers()])

    before = moments()
    with state.at_rest() as opponent:
        work = di.begin(x, torch.arange(6), torch.zeros(1, 3).long(), (1, 1, 0), teacher, setting, None, opponent)
        di.synthesis_step(work)
        di.agreement(student, [(torch.zeros(6, 1, 32, 32, dtype=torch.uint8), torch.arange(6))])
    assert torch.equal(before, moments()) and student.model.training
    state.pool.add(torch.randint(256, (6, 1, 32, 32), dtype=torch.uint8))
    state.pool.draw_from(newest=True)
    di.student_step(state)
    assert not torch.equal(before, moments())


def test_the_students_loss_is_t_squared_kl_at_the_setting_s_rate(monkeypatch):
    teacher, student, args = digits_teacher(student_batch=6, shift=0, lr_student=0.5, temperature=4.0)
    setting = di.choose_setting(args, "digits") | dict(optimizer="sgd", cut=False, mirror=False)
    teacher.low, teacher.high = di.pixel_range(teacher, "cpu")
    state = di.Distiller(teacher, student, setting, 6)
    state.pool.add(torch.randint(256, (6, 1, 32, 32), dtype=torch.uint8))
    x = state.pool.images.float() / 255
    x = (x - teacher.mean[0]) / teacher.std[0]
    monkeypatch.setattr(Pool, "draw", lambda pool, n: x)
    before = [p.detach().clone() for p in student.model.parameters()]
    p, log_q = torch.softmax(teacher.model(x) / 4, 1), torch.log_softmax(student.model(x) / 4, 1)
    loss = 16 * (p * (p.log() - log_q)).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(student.model.parameters()))
    di.student_step(state)
    assert state.sum.item() == pytest.approx(loss.item(), rel=1e-4)
    for old, new, g in zip(before, student.model.parameters(), gradients, strict=True):
        assert torch.allclose(new, old - 0.5 * (g + 5e-4 * old), atol=1e-5)


def test_the_rate_warms_up_and_falls_by_a_cosine_or_tenfold(tmp_path, monkeypatch):
    rates, student_step = [], di.student_step

    def watched(state):
        rates.append(state.optimizer.param_groups[0]["lr"].item())
        student_step(state)

    monkeypatch.setattr(di, "student_step", watched)
    options = dict(num_images=10, batches_per_epoch=0, steps_per_epoch=2, epochs=4, lr_student=0.1)
    for drop, warmup, expected in (
        (10**6, 0, [0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
        (10**6, 2, [0.05, 0.1, *[0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]]),
        (2, None, [0.1] * 4 + [0.01] * 4),
    ):
        changed = dict(drop=drop, student_warmup=warmup)
        monkeypatch.setitem(di.SETTINGS, "digits", di.SETTINGS["digits"] | changed)
        rates.clear()
        run(tmp_path / f"{drop} {warmup}", **options)
        assert rates == pytest.approx(expected), changed
    assert di.SETTINGS["cifar10-released"]["alpha_competition"] == 10.0  # the paper's; 0.2 on ImageNet
    assert di.SETTINGS["imagenet-0"]["alpha_competition"] == 0.2
    assert di.SETTINGS["cifar10-released"]["drop"] == 100 and di.SETTINGS["cifar10-released"]["student_warmup"] is None


# student steps are the updates 13, 14, 19, 20, 25, 26, 31 and 32 of the bar
@pytest.mark.parametrize(
    ("stop_at", "options"),
    [
        pytest.param(5, {}, id="initial pool"),
        pytest.param(13, {}, id="the student's first step, on a new batch"),
        pytest.param(23, {}, id="images that compete with a student"),
        pytest.param(26, {}, id="second epoch"),
        pytest.param(27, dict(student="resnet8"), id="SGD and BatchNorm"),
    ],
)
def test_a_run_with_a_student_resumes_bit_exactly(tmp_path, monkeypatch, stop_at, options):
    if options:
        monkeypatch.setitem(di.SETTINGS, "digits", di.SETTINGS["digits"] | dict(optimizer="sgd", mirror=True))
    options |= dict(competition="js")
    run(tmp_path / "whole", **options)
    calls, update = [0], di.tqdm.update

    def dies(self, *rest):
        calls[0] += 1
        if calls[0] == stop_at:
            raise InterruptedError
        return update(self, *rest)

    monkeypatch.setattr(di.tqdm, "update", dies)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", **options)
    monkeypatch.setattr(di.tqdm, "update", update)
    run(tmp_path / "cut", resume=True, **options)
    files = [*(f"images-{i:05d}.npz" for i in range(6)), "metrics.jsonl", "samples.png", "curve.png", "student.pt"]
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_an_earlier_runs_images_are_the_pool(tmp_path):
    """No image is made again; the same bytes and the same student as from a pool made on the spot."""
    made = run(tmp_path / "made", batches_per_epoch=0)
    options = dict(images=str(tmp_path / "made"), num_images=0, batches_per_epoch=0)
    given = run(tmp_path / "given", **options)
    assert not list((tmp_path / "given").glob("images-*"))
    assert given["n_images"] == made["n_images"] == 20
    for name in ("student.pt", "samples.png"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    more = run(tmp_path / "more", images=str(tmp_path / "made"), num_images=0, batches_per_epoch=1, competition="js")
    assert more["n_images"] == 20  # of its own: one batch an epoch


def test_a_user_s_student_and_no_test_images(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def tiny(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(1024 * in_channels, num_classes))\n"
    )
    result = run(tmp_path / "run", student=f"{tmp_path / 'nets.py'}:tiny", dataset="none", teacher="digits-resnet8")
    assert result["student_accuracy"] is None and result["setting"]["name"] == "digits"
    assert not (tmp_path / "run/curve.png").exists() and (tmp_path / "run/student.pt").exists()


def test_without_a_student_no_setting_of_one_is_kept(tmp_path):
    of_a_student = dict.fromkeys(("epochs", "steps_per_epoch", "batches_per_epoch", "student_batch"))
    result = run(tmp_path, student="", num_images=10, **of_a_student)
    assert not set(result["setting"]) & set(di.STUDENT)
    assert not (tmp_path / "student.pt").exists() and result["n_images"] == 10


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(student="", epochs=None, competition="js"), "name one with --student", id="no student"),
        pytest.param(dict(student="", images="x"), "name one with --student", id="images of nobody"),
        pytest.param(dict(student="lenet6"), "--student lenet6", id="unknown student"),
        pytest.param(dict(competition="kl"), "--competition: expected one of none, js, released", id="unknown form"),
        pytest.param(dict(images="nowhere"), "--images nowhere: no images-*.npz", id="no images there"),
        pytest.param(dict(student="", num_images=9, shift=1), "--epochs: of a student", id="option of nobody"),
        pytest.param(dict(student="", alpha_competition=1.0), "name one with --student", id="weight of nothing"),
        pytest.param(dict(competition="js", batches_per_epoch=0), "--batches-per-epoch: expected 1", id="no rival"),
        pytest.param(dict(batches_per_epoch=5), "--batches-per-epoch: expected 0 to 4", id="more batches than steps"),
        pytest.param(dict(epochs=0), "--epochs: expected at least 1", id="no epoch"),
        pytest.param(dict(temperature=0.0), "--temperature: expected at least", id="temperature zero"),
        pytest.param(dict(lr_student=math.nan), "--lr-student: expected at least", id="rate NaN"),
        pytest.param(dict(dataset="mnist", data_dir="nowhere"), "check --data-dir", id="no test images"),
        pytest.param(dict(teacher="cifar10-resnet20"), "do not fit the teacher", id="other test images"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, says):
    assert says in refused(capsys, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_one_process_trains_a_student(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(di, "join", lambda device: Place(0, 2))
    assert "--student: one process trains it" in refused(capsys, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        pytest.param(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, "(1, 32, 32), as the teacher's", id="shape"),
        pytest.param(np.zeros((4, 32, 32, 1), np.float32), [0] * 4, "expected uint8", id="dtype"),
        pytest.param(np.zeros((4, 32, 32, 1), np.uint8), [0, 1, 2, 10], "labels, below 10", id="class"),
        pytest.param(np.zeros((4, 32, 32, 1), np.uint8), [0] * 3, "as many labels", id="too few labels"),
    ],
)
def test_images_that_do_not_fit_are_refused(capsys, tmp_path, images, labels, says):
    (tmp_path / "result.json").write_text("{}")
    np.savez(tmp_path / "images-00000.npz", images=images, labels=np.array(labels, np.int64))
    assert says in refused(capsys, out=str(tmp_path / "run"), images=str(tmp_path))
    (tmp_path / "result.json").unlink()
    assert "pass the --out of a finished run" in refused(capsys, out=str(tmp_path / "run"), images=str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_images_are_not_deleted_by_the_run_that_takes_them(capsys, tmp_path):
    run(tmp_path, num_images=10, batches_per_epoch=0)
    for resume in (False, True):
        assert "pass another --out" in refused(capsys, out=str(tmp_path), images=str(tmp_path), resume=resume)
    assert (tmp_path / "images-00000.npz").exists()


def test_batches_of_two_sizes_all_find_room(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/result.json").write_text("{}")
    for i, n in enumerate((3, 7)):
        Shards(tmp_path / "set").write(i, torch.zeros(n, 1, 32, 32, dtype=torch.uint8), torch.zeros(n).long())
    result = run(tmp_path / "run", images=str(tmp_path / "set"), num_images=0, batches_per_epoch=0)
    assert result["n_images"] == result["setting"]["given"] == 10


def test_no_image_at_all_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(di.SETTINGS, "digits", di.SETTINGS["digits"] | dict(initial=0))
    assert "the student has no images" in refused(capsys, out=str(tmp_path), num_images=0, batches_per_epoch=0)


def test_a_broken_student_stops_the_run_and_the_last_good_one_stays(capsys, tmp_path):
    options = dict(lr_student=1e9, checkpoint_every=1)
    assert "not finite: student" in refused(capsys, out=str(tmp_path), **options)
    assert not (tmp_path / "student.pt").exists() and not (tmp_path / "result.json").exists()
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        state = torch.load(tmp_path / name, weights_only=True)["state"]
        assert not not_finite(state), name
    assert not_finite({"a": [torch.ones(2)], "b": ({"c": torch.tensor([1.0, math.nan])},)}) == "b 0 c"
    assert not_finite({"a": "text", "b": 1, "c": None, "d": torch.tensor([1, 2])}) == ""


def test_a_step_that_fails_is_one_line(capsys, tmp_path):
    """One value has no moments of its own: such a student refuses it in train mode."""
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def normed(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1024), nn.Linear(1024, num_classes))\n"
    )
    says = refused(capsys, out=str(tmp_path / "run"), student=f"{tmp_path / 'nets.py'}:normed", student_batch=1)
    assert "the student's step 1 failed: ValueError" in says


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_captured_student_step_is_the_eager_one_and_never_syncs(optimizer):
    args = di.Args(teacher="digits-resnet8", student="resnet8", device="cuda", student_batch=8)
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        teacher = di.load(args.teacher, args)
        setting = di.choose_setting(args, "digits") | dict(optimizer=optimizer, mirror=True, bf16=False)
        state = di.Distiller(teacher, contract.load_student(di.load, "resnet8", args, teacher), setting, 16)
        state.pool.add(torch.randint(256, (16, 1, 32, 32), dtype=torch.uint8))
        state.pool.draw_from(newest=False)
        torch.manual_seed(1)
        step = kernels.Captured(lambda state=state: di.student_step(state), enabled=captured)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for n in range(8):
                state.optimizer.param_groups[0]["lr"].fill_(0.01 / (n + 1))
                state.pool.draw_from(newest=n % 2 == 0)
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-4)
