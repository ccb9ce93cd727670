"""zskt.py: generator, losses and one pseudo-batch against independent formulas; what a run does."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import n_parameters, rows_of
from scripts import read_refusal
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import zskt
from harness.data import evaluate, load_dataset
from harness.load import load_student, load_teacher, load_trained
from harness.run import make_optimizer
from kernels import _common

DIGITS = replace(
    zskt.PRESETS["digits"], device="cpu", pseudo_batches=6, batch_size=8, evaluations=3, width=4
)


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes."""
    monkeypatch.setattr(_common, "INTERPRET", False)


def run(out, **options):
    """Run the script with small digits settings; its result.json."""
    zskt.main(replace(DIGITS, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


class Game:
    """A teacher of digits, a fresh student and a generator with their optimisers."""

    def __init__(self, **options):
        self.args = replace(DIGITS, **options)
        device = self.args.device
        torch.manual_seed(0)
        self.teacher, self.info = load_teacher(self.args, device)
        self.student, _ = load_student(self.args.student, self.info, device)
        self.generator = zskt.Generator(self.args.width, 1, 32, self.args.affine).to(device)
        self.optimizers = {
            "generator": make_optimizer("adam", self.generator, self.args.lr_generator),
            "student": make_optimizer("adam", self.student, self.args.lr_student),
        }

    def play(self):
        return zskt.play_pseudo_batch(
            self.teacher, self.student, self.generator, self.optimizers, self.args
        )


# The generator


def test_generator_is_the_papers():
    generator = zskt.Generator(128, 3, 32)
    assert n_parameters(generator) == 1_051_145
    assert generator.bn3.affine
    x = generator(torch.randn(64, zskt.Z_DIM))
    assert x.shape == (64, 3, 32, 32)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4  # nothing after the last BatchNorm
    assert x.std((0, 2, 3), unbiased=False).sub(1).abs().max() < 1e-3
    assert not list(zskt.Generator(8, 1, 8, affine=False).bn3.parameters())
    assert zskt.Generator(16, 1, 64)(torch.randn(2, zskt.Z_DIM)).shape == (2, 1, 64, 64)


def test_generator_equals_its_layers_written_out():
    g = zskt.Generator(8, 3, 16)
    z = torch.randn(5, zskt.Z_DIM)
    layers = nn.Sequential(
        g.linear,
        nn.Unflatten(1, (8, 4, 4)),
        g.bn0,
        nn.Upsample(scale_factor=2),
        g.conv1,
        g.bn1,
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        g.conv2,
        g.bn2,
        nn.LeakyReLU(0.2),
        g.conv3,
        g.bn3,
    )
    assert torch.allclose(g(z), layers(z), atol=1e-5)


# Losses


def mean_kl(t_logits, s_logits):
    """The released code's D: F.kl_div averaged over batch and classes."""
    log_p_s = F.log_softmax(s_logits, 1)
    return F.kl_div(log_p_s, F.softmax(t_logits, 1), reduction="sum") / t_logits.numel()


@pytest.mark.parametrize("fused", [True, False])
def test_disagreement_is_a_mean_over_batch_and_classes(fused):
    # P = (3/4, 1/4), Q = (1/2, 1/2), M = (5/8, 3/8); a second row agrees; 2 rows x 2 classes.
    t_logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    s_logits = torch.zeros(2, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    kl_p_m = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    kl_q_m = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    expected = {
        "kl": kl / 4,
        "reverse-kl": reverse / 4,
        "js": (kl_p_m + kl_q_m) / 2 / 4,
        "l1": math.log(3.0) / 4,
    }
    for name, value in expected.items():
        loss = zskt.disagreement(t_logits, s_logits, name, 1.0, fused)
        assert loss.item() == pytest.approx(value, rel=1e-5), name

    x, y = torch.randn(2, 6, 10)
    for temperature in (1.0, 4.0):  # no factor tau^2
        loss = zskt.disagreement(x, y, "kl", temperature, fused)
        expected = mean_kl(x / temperature, y / temperature).item()
        assert loss.item() == pytest.approx(expected, rel=1e-4)


# Activations of one channel and two positions: attention maps (9, 16) / norm and, of two channels,
# (1, 0). DISTANCE is their A_l.
STUDENT_GROUP = torch.tensor([[[[3.0, 4.0]]]])
TEACHER_GROUP = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])
NORM = math.hypot(9, 16)
DISTANCE = ((9 / NORM - 1) ** 2 + (16 / NORM) ** 2) / 2


@pytest.mark.parametrize("fused", [True, False])
def test_attention_loss_sums_squared_distances_per_position(fused):
    maps = zskt.attention_maps([TEACHER_GROUP, TEACHER_GROUP], fused)
    loss = zskt.attention_loss([STUDENT_GROUP, TEACHER_GROUP], maps, fused)
    assert loss.item() == pytest.approx(DISTANCE, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_shot_loss_weighs_its_terms_as_the_authors_baseline(fused):
    # At temperature 4 P = (3/4, 1/4), Q = (1/2, 1/2), then equal; two labels 0; one map apart.
    t_logits = torch.tensor([[4 * math.log(3.0), 0.0], [0.0, 0.0]])
    t_answers = t_logits, (TEACHER_GROUP.repeat(2, 1, 1, 1), TEACHER_GROUP.repeat(2, 1, 1, 1))
    s_answers = (
        torch.zeros(2, 2),
        (STUDENT_GROUP.repeat(2, 1, 1, 1), TEACHER_GROUP.repeat(2, 1, 1, 1)),
    )
    kl = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4
    labels = torch.zeros(2, dtype=torch.int64)
    for beta in (0.0, 250.0):
        loss = zskt.shot_loss(t_answers, s_answers, labels, beta, fused)
        expected = 0.1 * math.log(2) + 28.8 * kl + 12 * beta / 2 * DISTANCE
        assert loss.item() == pytest.approx(expected, rel=1e-5)


# One pseudo-batch


@pytest.fixture
def float64():
    """Adam turns rounding errors of a vanishing gradient into whole steps: compare in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_pseudo_batch_is_the_released_loop(float64):
    """One generator step, then ten of the student on the same z, all clipped.

    The generator's gradient passes through teacher and student.
    """
    options = dict(fresh_z=False, beta=25.0, clip_grad=0.1, fused=False)
    ours = Game(**options)
    torch.manual_seed(5)
    figures = [ours.play() for _ in range(2)]

    plain = Game(**options)
    g, s, teacher = plain.generator, plain.student, plain.teacher
    adam_g = torch.optim.Adam(g.parameters(), plain.args.lr_generator)
    adam_s = torch.optim.Adam(s.parameters(), plain.args.lr_student)

    def maps(network, x):
        _, groups = network.forward_groups(x)
        return [F.normalize(a.square().mean(1).flatten(1)) for a in groups]

    def step(network, adam, loss):
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        adam.step()

    torch.manual_seed(5)
    for n in range(2):
        z = torch.randn(8, 100)
        x = g(z)
        loss_g = -mean_kl(teacher(x), s(x))
        step(g, adam_g, loss_g)
        for _ in range(10):
            x = g(z)  # as released: made again in every step
            loss_s = mean_kl(teacher(x), s(x))
            for a, b in zip(maps(s, x), maps(teacher, x), strict=True):
                loss_s = loss_s + 25 * (a - b).square().mean()
            step(s, adam_s, loss_s)
        assert figures[n][0].item() == pytest.approx(loss_g.item(), rel=1e-6)
        assert figures[n][1].item() == pytest.approx(loss_s.item(), rel=1e-6)

    for ours_network, network in ((ours.generator, g), (ours.student, s)):
        for p, q in zip(ours_network.parameters(), network.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize(
    ("fresh_z", "teacher_calls", "distinct"),
    [pytest.param(False, 2, 1, id="shared z"), pytest.param(True, 11, 10, id="fresh z")],
)
def test_teacher_answers_once_where_the_student_steps_share_z(fresh_z, teacher_calls, distinct):
    game = Game(fresh_z=fresh_z)
    calls = []
    seen = []

    def watch_student(network, inputs, output):
        seen.append(inputs[0])

    game.teacher.fc2.register_forward_hook(lambda *_: calls.append(1))
    game.student.conv1.register_forward_hook(watch_student)
    game.play()
    assert len(calls) == teacher_calls
    student_steps = seen[1:]
    assert len(student_steps) == 10
    assert len({x.abs().sum().item() for x in student_steps}) == distinct
    assert not any(x.requires_grad for x in student_steps)


def test_more_generator_steps_and_largest_probabilities():
    game = Game(n_generator_iter=3, n_student_iter=2, fresh_z=False)
    seen = []
    game.student.fc2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    t_seen = []
    game.teacher.fc2.register_forward_hook(lambda module, inputs, output: t_seen.append(output))
    *_, max_p_teacher, max_p_student = game.play()
    assert len(seen) == 3 + 2
    assert len(t_seen) == 3 + 1
    assert max_p_student.item() == pytest.approx(seen[-1].softmax(1).amax(1).mean().item())
    assert max_p_teacher.item() == pytest.approx(t_seen[-1].softmax(1).amax(1).mean().item())


def test_batchnorms_of_both_players_stay_in_train_mode_and_the_teacher_as_it_was():
    game = Game(student="wrn_16_1", fresh_z=False)
    before = {name: v.clone() for name, v in game.teacher.state_dict().items()}
    modes = []
    game.student.bn.register_forward_hook(lambda module, *_: modes.append(module.training))
    game.play()
    assert modes == [True] * 11
    assert game.student.bn.num_batches_tracked == 11
    assert game.generator.bn3.num_batches_tracked == 2

    assert not game.teacher.training
    for name, value in game.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in game.teacher.parameters())


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for the device, or reads a value no graph can follow."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for bad in ("_local_scalar_dense", "aten.nonzero", "aten.is_nonzero"):
            assert bad not in name, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [dict(beta=25.0), dict(fresh_z=False, divergence="js"), dict(divergence="l1")]
)
def test_a_pseudo_batch_never_waits_for_the_device(options):
    game = Game(**options)
    for optimizer in game.optimizers.values():
        optimizer.step = lambda: None  # the CPU's stand-in for `capturable` reads the rate
    with NoSync():
        game.play()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        torch.zeros(()).item()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param(dict(beta=25.0, fresh_z=False, bf16=False), 1e-2, id="attention"),
        pytest.param(dict(student="wrn_16_1", bf16=False), 1e-2, id="fresh z, BatchNorm"),
        pytest.param(dict(student="wrn_16_1"), 1e-1, id="bf16"),
    ],
)
def test_a_graph_plays_the_same_game_as_eager_steps(options, tolerance):
    """Replayed pseudo-batches give the losses of launched ones, and never wait."""
    sums = []
    for graph in (True, False):
        game = Game(device="cuda", **options)
        total = torch.zeros(4, device="cuda")

        def play(game=game, total=total):
            total.add_(game.play())

        run_step = kernels.CapturedStep(play, enabled=graph)
        for _ in range(4):  # warm-up, then the capture, which does wait
            run_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                zskt.set_learning_rate(game.optimizers["student"], 1e-3, 1, 2)
                run_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        sums.append(total.cpu())
    assert torch.allclose(*sums, rtol=tolerance)


# The paper's toy experiment: two-dimensional points instead of a generator


def sample_blob(x, y, std_x, std_y):
    return torch.randn(1000, 2) * torch.tensor([std_x, std_y]) + torch.tensor([x, y])


def make_toy_data():
    """Three classes in the plane; two have a small far-off blob inside the halves of the first."""
    halves = torch.cat([sample_blob(0, 1, 0.3, 0.4), sample_blob(0, -1, 0.3, 0.4)])
    upper = (halves - torch.tensor([0.0, 1.0])).norm(dim=1)
    lower = (halves + torch.tensor([0.0, 1.0])).norm(dim=1)
    classes = [
        halves[torch.minimum(upper, lower) > 0.3],
        torch.cat([sample_blob(-1, 0, 0.4, 0.3), sample_blob(0, 1, 0.06, 0.06)]),
        torch.cat([sample_blob(1, 0, 0.4, 0.3), sample_blob(0, -1, 0.06, 0.06)]),
    ]
    labels = [torch.full((len(points),), k) for k, points in enumerate(classes)]
    return torch.cat(classes), torch.cat(labels)


def make_toy_network():
    layers = nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 500), nn.ReLU(), nn.Linear(500, 3)
    return nn.Sequential(*layers)


def play_toy_game(teacher, student, n_point_steps):
    """60 rounds: free points step up the disagreement, then the student ten times down."""
    free = nn.Parameter(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
    points_adam = torch.optim.Adam([free], 5e-2)
    student_adam = torch.optim.Adam(student.parameters(), 1e-3)
    for _ in range(60):
        for _ in range(n_point_steps):
            points = 6 * torch.sigmoid(free) - 3  # inside the square of side 6
            loss = -zskt.disagreement(teacher(points), student(points), "kl", 1.0, True)
            points_adam.zero_grad()
            loss.backward(inputs=[free])
            points_adam.step()
        points = (6 * torch.sigmoid(free) - 3).detach()
        t_logits = teacher(points)
        for _ in range(10):
            loss = zskt.disagreement(t_logits, student(points), "kl", 1.0, True)
            zskt.update(student, student_adam, loss, clip_grad=3)


def test_toy_points_that_seek_disagreement_teach_more_than_points_at_rest():
    """After the authors' notebook, smaller: 100 points, 60 rounds of 10 steps."""
    x, y = make_toy_data()
    teacher = make_toy_network()
    students = [make_toy_network(), make_toy_network()]
    students[1].load_state_dict(students[0].state_dict())
    adam = torch.optim.Adam(teacher.parameters(), 1e-3)
    for _ in range(8):
        for index in torch.randperm(len(y)).split(100):
            zskt.update(teacher, adam, F.cross_entropy(teacher(x[index]), y[index]), clip_grad=100)
    teacher.requires_grad_(False)
    believed = teacher(x).argmax(1)
    assert (believed == y).float().mean() > 0.93

    agreement = []
    for student, n_point_steps in zip(students, (10, 0), strict=True):
        play_toy_game(teacher, student, n_point_steps)
        agreement.append((student(x).argmax(1) == believed).float().mean().item())
    adversarial, at_rest = agreement
    assert adversarial > 0.98
    assert 1 - adversarial < 0.5 * (1 - at_rest), agreement


# Runs


def test_a_student_learns_and_its_file_gives_the_accuracy_of_the_final_iterate(tmp_path):
    options = dict(pseudo_batches=40, batch_size=32, evaluations=4, width=8)
    result = run(tmp_path, **options)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    for row in rows:
        assert row["loss/generator"] < 0 < row["loss/student"]
        assert 0.1 <= row["eval/max_p_teacher"] <= 1
        assert 0.1 <= row["eval/max_p_student"] <= 1
    assert result["teacher_accuracy"] > 99
    assert result["student_accuracy"] > 60
    assert result["student_accuracy"] == pytest.approx(rows[-1]["eval/acc"], abs=1e-3)

    student, info = load_trained(str(tmp_path / "student.pt"), "cpu", "data")
    accuracy = evaluate(student, *load_dataset("digits", "data", "test"), info)
    assert accuracy == info.accuracy == result["student_accuracy"]


def test_rows_are_means_of_their_window_and_rates_follow_one_cosine(tmp_path, monkeypatch):
    """Five pseudo-batches in windows of two and three; the n-th has the figures n to n + 3."""
    rates = []

    def play(teacher, student, generator, optimizers, args):
        figures = torch.arange(4.0) + len(rates)
        rates.append([o.param_groups[0]["lr"].item() for o in optimizers.values()])
        return figures

    monkeypatch.setattr(zskt, "play_pseudo_batch", play)
    monkeypatch.setattr(zskt.RunFolder, "save_checkpoint", lambda run, state: None)
    run(tmp_path, pseudo_batches=5, evaluations=2)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 5]
    for row, first in zip(rows, (0.5, 3.0), strict=True):
        assert [row[name] for name in zskt.METRICS] == [first + i for i in range(4)]
    for n, (lr_generator, lr_student) in enumerate(rates):
        cosine = (1 + math.cos(math.pi * n / 5)) / 2
        assert lr_generator == pytest.approx(DIGITS.lr_generator * cosine, rel=1e-5)
        assert lr_student == pytest.approx(DIGITS.lr_student * cosine, rel=1e-5)


def test_windows_cover_all_pseudo_batches_and_ten_of_them_are_pictured():
    assert zskt.list_window_ends(10, 4) == [2, 5, 7, 10]
    assert zskt.list_window_ends(3, 20) == [1, 2, 3]
    assert zskt.list_window_ends(0, 20) == []
    assert zskt.choose_evenly([], 10) == []
    assert sorted(set(zskt.choose_evenly([3, 6], 10))) == [3, 6]
    ends = zskt.list_window_ends(80_000, 100)
    pictured = zskt.choose_evenly(ends, 10)
    assert pictured == [800 + 8800 * i for i in range(10)]


def test_a_preview_leaves_the_generator_as_it_was():
    game = Game()
    before = {name: v.clone() for name, v in game.generator.state_dict().items()}
    images = zskt.generate_preview(game.generator, torch.randn(10, zskt.Z_DIM), game.info)
    assert images.shape == (10, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert all(module.training for module in game.generator.modules())
    for name, value in game.generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def load_weights_of(out):
    return torch.load(out / "student.pt", weights_only=True)["state_dict"]


def test_real_images_never_reach_the_training(tmp_path):
    run(tmp_path / "with")
    result = run(tmp_path / "without", dataset="none")
    measured = load_weights_of(tmp_path / "with")
    for name, value in load_weights_of(tmp_path / "without").items():
        assert torch.equal(value, measured[name]), name
    assert result["student_accuracy"] is None
    assert "eval/acc" not in rows_of(tmp_path / "without")[0]


def test_wide_resnets_of_the_papers_preset_play_with_attention(tmp_path):
    paper = zskt.PRESETS["cifar10"]
    options = dict(dataset="none", pseudo_batches=1, n_student_iter=1, batch_size=8, width=4)
    zskt.main(replace(paper, device="cpu", out=str(tmp_path), **options))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["setting"]["beta"] == 250.0
    assert result["teacher"] == "cifar10-wrn-16-1"
    assert torch.load(tmp_path / "student.pt", weights_only=True)["arch"] == "wrn_16_1"


STUDENT = """
import torch.nn as nn

def student(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 5, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(64, num_classes))
"""


def test_a_foreign_student_plays_without_attention_and_says_so(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(STUDENT)
    spec = f"{tmp_path / 'mine.py'}:student"
    result = run(tmp_path / "run", student=spec, beta=250.0)
    assert "no activations in common, so no attention transfer" in capsys.readouterr().out
    assert result["setting"]["beta"] == 0.0


def test_attention_is_comparable_between_groups_of_equal_sizes():
    teacher, info = load_teacher(DIGITS, "cpu")
    comparable = {"lenet5_half": True, "wrn-16-1": False, "digits-resnet8": False}
    for spec, expected in comparable.items():
        student, _ = load_student(spec, info, "cpu")
        assert zskt.share_activations(teacher, student, info) == expected, spec
        assert student.training


def test_losses_that_are_not_finite_end_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zskt, "disagreement", lambda t, s, *rest: s.sum() * math.nan)
    line = read_refusal(capsys, run, tmp_path)
    assert "not finite" in line
    assert not (tmp_path / "result.json").exists()


# M real images of each class


def test_shots_fine_tune_on_so_many_images_a_class(tmp_path, monkeypatch):
    seen = []
    normalise = zskt.normalise

    def watch(images, info):
        seen.append(images)
        return normalise(images, info)

    monkeypatch.setattr(zskt, "normalise", watch)
    result = run(tmp_path, shots=3, shot_steps=250, evaluations=1)
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 30
    assert result["student_accuracy"] > result["zero_shot_accuracy"] + 10
    losses = [row["loss/shots"] for row in rows_of(tmp_path) if "loss/shots" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_shots_are_of_every_class_and_depend_on_the_seed():
    images = torch.arange(60)
    labels = torch.arange(3).repeat(20)
    chosen, chosen_labels = zskt.draw_shots(images, labels, 4, seed=0)
    assert chosen_labels.bincount().tolist() == [4, 4, 4]
    assert torch.equal(chosen % 3, chosen_labels)
    other, _ = zskt.draw_shots(images, labels, 4, seed=1)
    assert not torch.equal(chosen, other)
    everything, _ = zskt.draw_shots(images, labels, -1, seed=0)
    assert everything.unique().numel() == 60


def test_another_number_of_shots_needs_no_other_game(tmp_path, monkeypatch):
    zero_shot = run(tmp_path)["zero_shot_accuracy"]
    monkeypatch.setattr(zskt, "play_pseudo_batch", lambda *_: pytest.fail("plays again"))
    for shots in (2, 5):
        result = run(tmp_path, resume=True, shots=shots, shot_steps=20)
        assert result["shots"] == shots
        assert result["zero_shot_accuracy"] == zero_shot


@pytest.mark.parametrize(("pseudo_batches", "moves"), [(1, 0), (0, 1)])
def test_shots_leave_the_running_moments_of_a_zero_shot_student_alone(
    tmp_path, monkeypatch, pseudo_batches, moves
):
    """Its moments come from the game. A student without a game makes them here."""
    tracked = []
    fine_tune = zskt.fine_tune

    def watch(teacher, info, student, shots, run):
        tracked.append(student.bn.num_batches_tracked.item())
        fine_tune(teacher, info, student, shots, run)
        tracked.append(student.bn.num_batches_tracked.item())

    monkeypatch.setattr(zskt, "fine_tune", watch)
    options = dict(student="wrn_16_1", n_student_iter=1, evaluations=1, shots=1, shot_steps=1)
    run(tmp_path, pseudo_batches=pseudo_batches, **options)
    assert tracked[1] - tracked[0] == moves


def test_all_shots_without_pseudo_batches_is_distillation_with_data(tmp_path):
    result = run(tmp_path, pseudo_batches=0, shots=-1, shot_steps=100)
    assert result["zero_shot_accuracy"] < 40
    assert result["student_accuracy"] > 80
    assert not (tmp_path / "samples.png").exists()


# Options


def test_a_run_takes_the_preset_of_its_images_or_its_teacher():
    assert zskt.choose_preset("", "") == "digits"
    assert zskt.choose_preset("mnist-lenet5", "") == "mnist"
    assert zskt.choose_preset("mnist-lenet5", "none") == "mnist"
    assert zskt.choose_preset("mine.py:net", "mnist") == "mnist"
    assert zskt.choose_preset("mine.py:net", "auto") == "cifar10"
    assert zskt.choose_preset("resnet50", "") == "cifar10"


@pytest.mark.parametrize(
    "options",
    [
        dict(batch_size=1),  # BatchNorm has no moments of one image
        dict(width=1),
        dict(pseudo_batches=-1),
        dict(n_student_iter=0),
        dict(shots=-2),
        dict(beta=-1.0),
        dict(temperature=0.0),
        dict(lr_student=math.nan),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected at least"):
        replace(DIGITS, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(dict(shots=10**6), "the smallest class has", id="more shots than images"),
        pytest.param(dict(shots=5, dataset="none"), "real images", id="shots without images"),
        pytest.param(dict(image_size=30), "expected a multiple of 4", id="odd image size"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, capsys, options, says):
    assert says in read_refusal(capsys, run, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
