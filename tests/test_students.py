"""deepinversion.py --student: when batches come, competition, the student's updates, resume."""

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers import rows_of
from scripts import read_refusal
from tqdm import tqdm

import deepinversion as di
import kernels
from harness.data import evaluate, load_digits, normalise
from harness.images import augment, get_image_path, list_image_files, save_images
from harness.load import load_student, load_teacher, load_trained
from harness.run import RunFolder, seed_everything
from kernels import _common

# Two batches of six images, then one before each second of eight updates.
FAST = replace(
    di.DIGITS,
    device="cpu",
    verifier="none",
    student="lenet5",
    competition="js",
    iterations=2,
    batch_size=6,
    initial_batches=2,
    batches_per_epoch=2,
    epochs=2,
    steps_per_epoch=4,
    student_batch=8,
    log_every=1,
)
# A student with BatchNorm and momentum, whose state a checkpoint must hold whole.
ADAPTIVE = replace(FAST, student="resnet8", optimizer="sgd", lr_student=0.05, mirror=True)


@pytest.fixture(autouse=True, scope="module")
def cpu_path():
    """Scripts run the CPU path, as the interpreter would take minutes, and know their name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "INTERPRET", False)
        patch.setattr(sys, "argv", ["deepinversion.py"])
        yield


@pytest.fixture(scope="module")
def whole(cpu_path, tmp_path_factory):
    """The folder of a finished adaptive run."""
    return run(tmp_path_factory.mktemp("whole"), ADAPTIVE)


def run(out, args, **options):
    di.main(replace(args, out=str(out), **options))
    return out


def read_result(out):
    return json.loads((out / "result.json").read_text())


def save_set(folder, images, labels, split=100):
    """Write the images of a finished run; returns the folder's name."""
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    batches = zip(images.split(split), labels.split(split), strict=True)
    for number, (x, y) in enumerate(batches):
        save_images(get_image_path(folder, number), x, y)
    return str(folder)


def make_synthesis(out, args, n_batches=1):
    args = replace(args, out=str(out))
    teacher, info = load_teacher(args, "cpu", 1)
    watched = di.watch_batchnorms(teacher, di.sample_example(info, "cpu"), args, "cpu")
    labels = di.choose_labels(torch.arange(10), n_batches, args)
    return di.Synthesis(watched, info, labels, RunFolder(args, "cpu"), tqdm(disable=True))


# The pool, and when batches come


def test_batches_come_at_even_distances_and_the_next_update_sees_the_new_one_alone(
    tmp_path, monkeypatch
):
    """Batch k of an epoch of S updates and m batches is made before update ceil(k S / m)."""
    events = []

    def make_batch(synthesis, number, opponent=None):
        """All pixels of batch `number` are number + 1; room that is still empty is 0."""
        events.append(("batch", number, opponent is not None))
        return torch.full((6, 1, 32, 32), number + 1, dtype=torch.uint8)

    def keep_batch_numbers(x, *rest):
        pixels = (x * x_std + x_mean) * 255
        events.append({int(value) - 1 for value in pixels[:, 0, 0, 0].round().tolist()})
        return augment(x)

    _, info = load_teacher(FAST, "cpu", 1)
    x_mean = info.mean[0]
    x_std = info.std[0]
    monkeypatch.setattr(di.Synthesis, "make_batch", make_batch)
    monkeypatch.setattr(di, "augment", keep_batch_numbers)
    monkeypatch.setattr(di, "report_agreement", lambda *rest: {})
    monkeypatch.setattr(di, "report_images", lambda *rest: {})
    run(tmp_path, FAST, steps_per_epoch=7, batches_per_epoch=3, student_batch=120, dataset="none")

    expected = [("batch", 0, False), ("batch", 1, False)]
    number = 2
    for _ in range(2):
        due = [math.ceil(k * 7 / 3) for k in range(3)]
        for n in range(7):
            seen = set(range(number))
            if n in due:
                expected.append(("batch", number, True))
                seen = {number}
                number += 1
            expected.append(seen)
    assert events == expected


def test_a_pool_draws_every_image_alike_and_never_beyond_the_last(tmp_path, monkeypatch):
    synthesis = make_synthesis(tmp_path, FAST, n_batches=3)  # room for 18 images
    pool = di.Pool(synthesis, [])
    pool.add(torch.zeros(8, 1, 32, 32, dtype=torch.uint8))
    pool.add(torch.full((4, 1, 32, 32), 255, dtype=torch.uint8))
    low, high = di.get_pixel_range(synthesis.info, "cpu")
    pool.sample_from(newest=False)
    x = pool.draw(3000)
    assert x.shape == (3000, 1, 32, 32) and x.dtype == torch.float32
    assert x.unique().tolist() == pytest.approx([low.item(), high.item()])
    assert (x[:, 0, 0, 0] > 0).float().mean().item() == pytest.approx(1 / 3, abs=0.03)

    def give_the_largest(n, dtype, device):
        return torch.full((n,), 1 - torch.finfo(dtype).eps / 2, dtype=dtype)

    monkeypatch.setattr(torch, "rand", give_the_largest)
    for newest in (False, True):
        pool.sample_from(newest)
        assert pool.draw(2).unique().tolist() == pytest.approx([high.item()])


# Competition


@pytest.mark.parametrize("competition", ["js", "none"])
def test_an_opponent_is_frozen_in_eval_mode_and_left_as_it_was(tmp_path, competition):
    synthesis = make_synthesis(tmp_path, replace(FAST, competition=competition), n_batches=2)
    student, _ = load_student("resnet8", synthesis.info, "cpu")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = []

    def keep_mode(module, inputs):
        is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
        modes.append((module.training, is_frozen))

    student.register_forward_pre_hook(keep_mode)
    synthesis.make_competing_batch(1, student)
    assert modes == ([(False, True)] * 2 if competition == "js" else [])
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert student.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_adaptive_images_fool_the_student_more(tmp_path):
    """The student is a trained LeNet-5; disagreement is JS of its and the teacher's answers."""
    args = replace(FAST, iterations=25, batch_size=20)
    opponent, info = load_trained("digits-lenet5", "cpu", "data")
    teacher, _ = load_teacher(args, "cpu", 1)
    disagreement = {}
    for name, rival in (("plain", None), ("adaptive", opponent)):
        synthesis = make_synthesis(tmp_path / name, args)
        x = normalise(synthesis.make_batch(0, opponent=rival), info)
        divergence = kernels.js_divergence_ref(teacher(x), opponent(x), args.temperature)
        disagreement[name] = divergence.item()
        hits = teacher(x).argmax(1) == synthesis.labels[0]
        assert hits.float().mean() >= 0.8, name
    assert disagreement["adaptive"] > 1.2 * disagreement["plain"]


# The student's updates


def test_the_rate_warms_up_and_falls_by_a_cosine_or_tenfold():
    args = replace(FAST, epochs=4, steps_per_epoch=2, lr_student=0.1, warmup_student=0)

    def compute_rates(**options):
        changed = replace(args, **options)
        return [di.compute_student_rate(step // 2, step % 2, changed) for step in range(8)]

    cosine = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert compute_rates() == pytest.approx(cosine)
    cosine = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert compute_rates(warmup_student=2) == pytest.approx([0.05, 0.1, *cosine])
    rates = compute_rates(schedule_student="steps", drop_every=2)
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_updates_are_plain_sgd_on_t_squared_kl(tmp_path, fused):
    """All images of the pool are one image, so that it does not matter which are drawn."""
    image = torch.randint(256, (1, 1, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.long)
    args = replace(
        FAST,
        images=save_set(tmp_path / "set", image.expand(8, -1, -1, -1), labels),
        competition="none",
        batches_per_epoch=0,
        steps_per_epoch=2,
        optimizer="sgd",
        lr_student=0.05,
        schedule_student="steps",
        drop_every=1,
        temperature=4.0,
        shift=0,
        cut=False,
        fused=fused,
    )
    out = run(tmp_path / "run", args)

    seed_everything(0)
    teacher, info = load_teacher(args, "cpu", 1)
    student, _ = load_student("lenet5", info, "cpu")
    x = normalise(image, info).expand(8, -1, -1, -1)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for lr in (0.05, 0.05, 0.005, 0.005):
        optimizer.param_groups[0]["lr"] = lr
        p = torch.softmax(teacher(x) / 4, 1)
        log_q = torch.log_softmax(student(x) / 4, 1)
        loss = 16 * (p * (p.log() - log_q)).sum(1).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows = rows_of(out)
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    assert [row["loss/student"] for row in rows] == pytest.approx(means, rel=1e-3)
    weights = torch.load(out / "student.pt", weights_only=True)["state_dict"]
    for name, value in student.state_dict().items():
        assert torch.allclose(weights[name], value, atol=1e-4), name


def test_a_student_learns_from_images_alone(tmp_path):
    args = replace(FAST, competition="none", batches_per_epoch=0, initial_batches=3, batch_size=20)
    args = replace(args, iterations=20, steps_per_epoch=60, student_batch=32)
    result = read_result(run(tmp_path, args, log_every=100))
    assert result["student_accuracy"] > 30  # of 60 images; 10 is chance
    assert result["teacher_accuracy"] == 100.0


# What a run leaves behind, and resume


def test_an_adaptive_run_logs_and_saves_its_student(whole):
    rows = rows_of(whole)
    result = read_result(whole)
    assert [row["step"] for row in rows if "step" in row] == list(range(1, 13))
    competing = [row["batch"] for row in rows if "loss/competition" in row]
    assert competing == [2, 2, 3, 3, 4, 4, 5, 5]
    epochs = [row for row in rows if "epoch" in row]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert rows.index(epochs[0]) == 8  # after the rows of four batches
    assert result["student_accuracy"] == pytest.approx(epochs[-1]["eval/acc"], abs=1e-6)
    assert result["n_images"] == 36
    assert (result["student"], result["dataset"]) == ("resnet8", "digits")
    assert (whole / "curve.png").stat().st_size > 0

    saved = torch.load(whole / "student.pt", weights_only=True)
    assert saved["method"] == "adaptive deepinversion"
    student, info = load_trained(str(whole / "student.pt"), "cpu", "data")
    assert (info.arch, info.accuracy) == ("resnet8", result["student_accuracy"])
    assert evaluate(student, *load_digits("test"), info) == result["student_accuracy"]


@pytest.mark.parametrize("update", [2, 6], ids=["first epoch", "second epoch"])
def test_an_unfinished_epoch_is_done_again_with_its_images(whole, tmp_path, monkeypatch, update):
    """The batches that it had made competed with a student that is no more; one is spoilt here."""
    calls = []

    def interrupt(*rest):
        calls.append(1)
        if len(calls) > update:
            raise KeyboardInterrupt
        return augment(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(di, "augment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, ADAPTIVE)
    paths = list_image_files(tmp_path)
    assert len(paths) == 2 + update // 2 + 1
    paths[-1].write_bytes(paths[0].read_bytes())
    run(tmp_path, ADAPTIVE, resume=True)
    names = [path.name for path in list_image_files(whole)]
    assert len(names) == 6
    for name in (*names, "metrics.jsonl", "student.pt", "samples.png", "curve.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_lost_batch_of_a_finished_epoch_is_not_made_up(capsys, whole, tmp_path):
    """It competed with a student that is no more; with the file back the run goes on."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "images-00003.npz").unlink()
    args = replace(ADAPTIVE, out=str(out), resume=True)
    assert "images-00003.npz is missing; put it back" in read_refusal(capsys, di.main, args)
    shutil.copy(whole / "images-00003.npz", out)
    di.main(args)
    for name in ("metrics.jsonl", "student.pt", "images-00005.npz"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_student_that_is_not_finite_stops_the_run_and_the_last_good_one_stays(
    capsys, whole, tmp_path, monkeypatch
):
    student_loss = di.student_loss
    calls = []

    def poison_second_epoch(*rest):
        calls.append(1)
        loss = student_loss(*rest)
        return loss * math.nan if len(calls) > 4 else loss

    args = replace(ADAPTIVE, out=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(di, "student_loss", poison_second_epoch)
        assert "lower" in read_refusal(capsys, di.main, args)
    assert not (tmp_path / "student.pt").exists()
    assert not (tmp_path / "result.json").exists()
    run(tmp_path, ADAPTIVE, resume=True)
    for name in ("metrics.jsonl", "student.pt", "images-00005.npz"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


# Given images


def test_an_earlier_runs_images_are_the_pool(tmp_path):
    """No image is made again; the student is that of a pool made on the spot."""
    args = replace(FAST, competition="none", batches_per_epoch=0)
    made = run(tmp_path / "made", args)
    given = run(tmp_path / "given", args, images=str(made))
    assert not list_image_files(given)
    assert read_result(given)["n_images"] == read_result(made)["n_images"] == 12
    for name in ("student.pt", "samples.png"):
        assert (given / name).read_bytes() == (made / name).read_bytes()


def test_given_batches_of_any_sizes_find_room_beside_new_ones(tmp_path):
    images = torch.zeros(10, 1, 32, 32, dtype=torch.uint8)
    folder = save_set(tmp_path / "set", images, torch.zeros(10, dtype=torch.long), split=7)
    out = run(tmp_path / "run", FAST, images=folder, epochs=1)
    assert read_result(out)["n_images"] == 2 * 6  # those of its own


def test_images_of_no_finished_run_or_of_this_one_are_refused(capsys, tmp_path):
    folder = tmp_path / "set"
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    save_set(folder, images, torch.zeros(2, dtype=torch.long))
    args = replace(FAST, out=str(tmp_path / "run"))
    for resume in (False, True):
        own = replace(args, images=str(folder), out=str(folder), resume=resume)
        assert "pass another --out" in read_refusal(capsys, di.main, own)
    assert get_image_path(folder, 0).exists()

    (folder / "result.json").unlink()
    for name in (str(folder), str(tmp_path / "nowhere")):
        says = read_refusal(capsys, di.main, replace(args, images=name))
        assert "pass the --out of a finished run" in says
    assert not (tmp_path / "run").exists()


# Other students, and refusals


def test_without_test_images_there_is_a_student_but_no_accuracy(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def tiny(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(1024 * in_channels, num_classes))\n"
    )
    own = f"{tmp_path / 'nets.py'}:tiny"
    out = run(tmp_path / "run", FAST, student=own, dataset="none")
    result = read_result(out)
    assert result["student_accuracy"] is None
    assert result["student"] == own
    assert not (out / "curve.png").exists()
    assert (out / "student.pt").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(student=""), "name one with --student", id="competition with nobody"),
        pytest.param(
            dict(student="", competition="none", images="x"), "name one with", id="images of nobody"
        ),
        pytest.param(dict(batches_per_epoch=0), "at least 1 with --competition", id="no rival"),
        pytest.param(dict(batches_per_epoch=5), "at most --steps-per-epoch", id="too many batches"),
        pytest.param(dict(batch_size=1), "--batch-size: expected at least 2", id="no moments"),
        pytest.param(dict(epochs=0), "--epochs: expected at least 1", id="no epoch"),
        pytest.param(dict(temperature=0.0), "--temperature: expected at least", id="temperature"),
        pytest.param(dict(alpha_bn=math.inf), "--alpha-bn: expected at least 0", id="infinite"),
        pytest.param(dict(lr_student=math.nan), "--lr-student: expected at least", id="NaN"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        replace(FAST, **options)


def test_a_student_without_images_is_refused(capsys, tmp_path):
    args = replace(FAST, out=str(tmp_path), competition="none")
    args = replace(args, initial_batches=0, batches_per_epoch=0)
    assert "the student has no images" in read_refusal(capsys, di.main, args)


def test_several_processes_train_no_student(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(di, "join_processes", lambda device: (0, 2))
    args = replace(FAST, out=str(tmp_path / "run"))
    assert "--student: one process trains it" in read_refusal(capsys, di.main, args)
    assert not (tmp_path / "run").exists()


def test_an_update_that_fails_is_one_line(capsys, tmp_path):
    """BatchNorm1d refuses one value a channel in train mode."""
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "def normed(num_classes):\n"
        "    norm = nn.BatchNorm1d(1024)\n"
        "    return nn.Sequential(nn.Flatten(), norm, nn.Linear(1024, num_classes))\n"
    )
    own = f"{tmp_path / 'nets.py'}:normed"
    args = replace(FAST, out=str(tmp_path / "run"), student=own, student_batch=1)
    says = read_refusal(capsys, di.main, args)
    assert "the student's training failed: ValueError" in says


# On a GPU


@pytest.mark.gpu
def test_captured_steps_train_the_same_student_and_never_wait(tmp_path, monkeypatch):
    run_step = kernels.CapturedStep.__call__

    def refuse_to_wait(step):
        torch.cuda.set_sync_debug_mode("error" if step.n_calls > 4 else "default")
        run_step(step)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(kernels.CapturedStep, "__call__", refuse_to_wait)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights = []
    for graph in (False, True):
        args = replace(ADAPTIVE, device="cuda", bf16=False, graph=graph, iterations=8)
        out = run(tmp_path / str(graph), args)
        state = torch.load(out / "student.pt", weights_only=True)["state_dict"]
        weights.append(torch.cat([value.flatten().float().cpu() for value in state.values()]))
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-4)
