"""role_kd.py: operations beside Pillow's, policies, search, losses, few bits; what a run does."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import rows_of
from PIL import Image, ImageEnhance, ImageOps
from scripts import read_refusal

import augmentations
import role_kd
from harness.networks import NETWORKS
from kernels import _common

TINY = replace(
    role_kd.PRESETS["digits"],
    device="cpu",
    population=2,
    search_epochs=3,
    interval=1,
    search_images=64,
    validation_images=64,
    train_images=64,
    epochs=2,
    batch_size=32,
    lr=1e-3,
)
FULL = [10, 5] * 30  # every entry fires at its turn


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch):
    """The CPU path of the ops: the interpreter would take minutes."""
    monkeypatch.setattr(_common, "INTERPRET", False)


def run(out, **options):
    """Run the script with tiny digits settings; its result.json."""
    role_kd.main(replace(TINY, out=str(out), **options))
    return json.loads((out / "result.json").read_text())


# Operations beside Pillow


def make_images(channels):
    """Noise; low contrast; one level; a ramp; two levels; noise with a clear corner. Alpha last."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (6, channels, 32, 32), dtype=torch.uint8, generator=generator)
    noise[1] = 60 + noise[1] // 4
    noise[2] = 77
    noise[3] = (4 * torch.arange(32)).to(torch.uint8)
    noise[4] = 200 * (noise[4] > 127)
    x = torch.cat([noise, torch.full_like(noise[:, :1], 255)], 1)
    x[5, -1, 3:9, 4:15] = 0
    return x


def apply_pillow(image, name, level, sign):
    """What the authors' code calls, on an image with alpha; the result's pixels (C + 1, H, W)."""
    mode = image.mode
    opaque = image.convert(mode[:-1])
    factor = 0.1 + 1.8 * level / 10
    shear = sign * 0.3 * level / 10

    def warp(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    calls = {
        "Rotate": lambda: image.rotate(sign * int(30 * level / 10)),
        "ShearX": lambda: warp(1, shear, 0, 0, 1, 0),
        "ShearY": lambda: warp(1, 0, 0, shear, 1, 0),
        "TranslateX": lambda: warp(1, 0, sign * level, 0, 1, 0),
        "TranslateY": lambda: warp(1, 0, 0, 0, 1, sign * level),
        "Color": lambda: ImageEnhance.Color(image).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "AutoContrast": lambda: ImageOps.autocontrast(opaque),
        "Equalize": lambda: ImageOps.equalize(opaque),
        "Invert": lambda: ImageOps.invert(opaque),
        "Posterize": lambda: ImageOps.posterize(opaque, 4 - int(0.4 * level)),
        "Solarize": lambda: ImageOps.solarize(opaque, 256 - int(25.6 * level)),
    }
    return to_tensor(calls[name]().convert(mode))


def to_tensor(image):
    bands = [torch.tensor(list(band.tobytes()), dtype=torch.uint8) for band in image.split()]
    return torch.stack(bands).view(len(bands), image.height, image.width)


def to_pillow(x):
    bands = [Image.fromarray(band.numpy()) for band in x]
    return Image.merge({2: "LA", 4: "RGBA"}[len(bands)], bands)


SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [n for n in augmentations.OPERATIONS if n != "Cutout"])
def test_an_operation_equals_pillows_at_every_level(name, channels):
    """Every pixel and every alpha, exactly; geometric operations to either side."""
    x = make_images(channels)
    generator = torch.Generator().manual_seed(0)
    sides = set()
    for level in range(10):
        levels = torch.full((len(x),), level)
        changed = augmentations.FUNCTIONS[name](x, levels, generator)
        for before, after in zip(x, changed, strict=True):
            image = to_pillow(before)
            right = [s for s in (1, -1) if torch.equal(after, apply_pillow(image, name, level, s))]
            assert right, f"level {level}"
            sides.update(right if len(right) == 1 else ())
    assert sides == ({1, -1} if name in SIGNED else set())


def test_images_of_a_batch_have_their_own_levels():
    x = make_images(3)
    levels = torch.arange(6)
    for name in augmentations.OPERATIONS:
        if name in (*SIGNED, "Cutout"):
            continue
        changed = augmentations.FUNCTIONS[name](x, levels, None)
        for i in range(len(x)):
            alone = augmentations.FUNCTIONS[name](x[i : i + 1], levels[i : i + 1], None)
            assert torch.equal(changed[i : i + 1], alone), name


@pytest.mark.parametrize("level", range(10))
def test_cutout_clears_a_square_of_two_levels_that_borders_clip(level):
    x = torch.full((400, 4, 32, 32), 255, dtype=torch.uint8)
    levels = torch.full((400,), level)
    changed = augmentations.cut_out(x, levels, torch.Generator().manual_seed(0))
    clear = changed[:, 3] == 0  # (N, H, W)
    assert ((changed[:, 0] == 125) == clear).all() and ((changed[:, 2] == 113) == clear).all()
    heights = clear.any(2).sum(1)
    widths = clear.any(1).sum(1)
    assert torch.equal(clear.sum((1, 2)), heights * widths)
    assert heights.max() == 2 * level and widths.max() == 2 * level
    if level:
        assert heights.min() == level  # a centre at the upper border


def test_color_leaves_grey_images_as_they_are():
    x = make_images(1)
    for level in range(10):
        levels = torch.full((6,), level)
        changed = augmentations.change_color(x, levels, None)
        assert (changed.int() - x.int()).abs().max() <= 0


# Policies on a batch


def test_an_all_zero_policy_is_base_augmentation_bit_for_bit():
    images = make_images(3)[:, :3]
    recipe = augmentations.Recipe(4, True, 8, torch.full((1, 3, 1, 1), 9, dtype=torch.uint8))
    with_policy = torch.Generator().manual_seed(3)
    without = torch.Generator().manual_seed(3)
    changed = augmentations.apply_policy(images, [0, 9] * 30, recipe.fill, with_policy)
    changed = augmentations.augment_base(changed, recipe, with_policy)
    assert torch.equal(changed, augmentations.augment_base(images, recipe, without))
    assert torch.equal(with_policy.get_state(), without.get_state())


def test_nothing_fires_without_a_probability():
    generator = torch.Generator().manual_seed(0)
    entries = augmentations.draw_entries([0, 9] * 30, 1000, generator, "cpu")
    assert (entries == -1).all()
    x = make_images(3)
    none = torch.full((6,), augmentations.NONE)
    assert torch.equal(augmentations.apply_operations(x, none, none, generator), x)


@pytest.mark.parametrize(
    "tenths, mean",
    [
        (10, 0.3 + 2 * 0.5),
        # at least one, at least two of 30 entries with probability 0.1
        (1, 0.8 * (1 - 0.9**30) + 0.5 * (1 - 0.9**30 - 30 * 0.1 * 0.9**29)),
    ],
)
def test_mean_number_of_operations_an_image(tenths, mean):
    generator = torch.Generator().manual_seed(0)
    entries = augmentations.draw_entries([tenths, 5] * 30, 40000, generator, "cpu")
    fired = (entries >= 0).sum(1).double()
    assert fired.mean().item() == pytest.approx(mean, abs=4 * fired.std().item() / 200)
    counts = entries[entries >= 0].bincount(minlength=30).double()
    assert (counts / counts.mean() - 1).abs().max() < 0.15  # all entries alike


def test_both_copies_of_an_operation_may_fire():
    """Invert alone: an image of count 1 is inverted, one of count 2 is inverted back."""
    policy = [0, 0] * 30
    invert = augmentations.OPERATIONS.index("Invert")
    for entry in (invert, invert + 15):
        policy[2 * entry] = 10
    images = torch.full((20000, 1, 1, 1), 10, dtype=torch.uint8)
    fill = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    changed = augmentations.apply_policy(images, policy, fill, torch.Generator().manual_seed(0))
    assert set(changed.unique().tolist()) == {10, 245}
    assert (changed == 245).double().mean().item() == pytest.approx(0.3, abs=0.013)


def test_an_operation_in_rgb_makes_clear_places_opaque():
    """Translate, then invert: what the move left is white. The other way round it is painted."""
    x = torch.full((1, 2, 8, 8), 255, dtype=torch.uint8)
    x[:, 0] = 100
    level = torch.tensor([3])
    generator = torch.Generator().manual_seed(0)

    def apply(x, name):
        number = torch.tensor([augmentations.OPERATIONS.index(name)])
        return augmentations.apply_operations(x, number, level, generator)

    moved_first = apply(apply(x, "TranslateX"), "Invert")
    assert (moved_first[:, 1] == 255).all()
    assert (moved_first[:, 0] == 255).sum() == 24
    inverted_first = apply(apply(x, "Invert"), "TranslateX")
    assert (inverted_first[:, 1] == 0).sum() == 24


def test_clear_places_are_painted():
    policy = [0, 0] * 30
    translate = augmentations.OPERATIONS.index("TranslateX")
    policy[2 * translate : 2 * translate + 2] = [10, 9]
    images = torch.full((64, 1, 32, 32), 7, dtype=torch.uint8)
    fill = torch.full((1, 1, 1, 1), 99, dtype=torch.uint8)
    changed = augmentations.apply_policy(images, policy, fill, torch.Generator().manual_seed(0))
    painted = (changed == 99).sum((1, 2, 3))
    assert set(painted.tolist()) == {0, 9 * 32}
    assert ((changed == 7) | (changed == 99)).all()


def test_base_augmentation_moves_mirrors_and_cuts():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) + 1
    fill = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    padded = F.pad(images, (2, 2, 2, 2))
    crops = {}
    for i in range(5):
        for j in range(5):
            crop = padded[0, 0, i : i + 8, j : j + 8]
            crops[bytes(crop.flatten().tolist())] = (i, j, False)
            crops[bytes(crop.flip(1).flatten().tolist())] = (i, j, True)
    recipe = augmentations.Recipe(2, True, 0, fill)
    many = images.expand(2000, 1, 8, 8)
    changed = augmentations.augment_base(many, recipe, torch.Generator().manual_seed(0))
    found = {crops[bytes(image.flatten().tolist())] for image in changed}
    assert len(found) == 50

    recipe = augmentations.Recipe(0, False, 4, fill)
    changed = augmentations.augment_base(many, recipe, torch.Generator().manual_seed(0))
    assert (changed == 0).sum((1, 2, 3)).max() == 16
    assert ((changed == 0) | (changed == images)).all()


# Policies and schedules


def test_explored_integers_stay_in_their_ranges():
    chance = random.Random(0)
    policy = augmentations.ZERO_POLICY
    seen = [set(), set()]
    for _ in range(300):
        policy = role_kd.explore(policy, chance)
        seen[0].update(policy[0::2])
        seen[1].update(policy[1::2])
    assert seen == [set(range(11)), set(range(10))]
    assert augmentations.ZERO_POLICY == [0] * 60


def test_an_integer_is_explored_with_the_released_probabilities():
    """From 5: to each of 0 … 10 with 0.2 / 11; by 0 with 0.2, by ±1, ±2, ±3 with 0.1 each."""
    chance = random.Random(0)
    counts = [0] * 11
    for _ in range(1000):
        for value in role_kd.explore([5] * 60, chance)[0::2]:
            counts[value] += 1
    expected = [0.2 / 11] * 11
    for value in (2, 3, 4, 6, 7, 8):
        expected[value] += 0.1
    expected[5] += 0.2
    for count, share in zip(counts, expected, strict=True):
        assert count / 30000 == pytest.approx(share, abs=4 * math.sqrt(share / 30000))


def test_a_schedule_is_stretched_by_the_ratio():
    schedule = [[1, "a"], [2, "b"], [1, "c"]]
    assert [augmentations.get_policy(schedule, i, 4) for i in range(4)] == list("abbc")
    assert [augmentations.get_policy(schedule, i, 8) for i in range(8)] == list("aabbbbcc")
    assert [augmentations.get_policy(schedule, i, 2) for i in range(2)] == list("ab")


def test_a_random_schedule_has_the_strength_of_its_model():
    chance = random.Random(0)
    first = role_kd.explore(augmentations.ZERO_POLICY, chance)
    schedule = [[2, first], [3, role_kd.explore(first, chance)]]
    shuffled = role_kd.shuffle_entries(schedule, random.Random(1))

    def get_pairs(policy):
        return list(zip(policy[0::2], policy[1::2], strict=True))

    orders = []
    for (epochs, policy), (others, other) in zip(schedule, shuffled, strict=True):
        assert epochs == others and policy != other
        assert sorted(get_pairs(policy)) == sorted(get_pairs(other))
    twice = [[1, list(range(60))], [1, list(range(60))]]
    for _, policy in role_kd.shuffle_entries(twice, random.Random(2)):
        orders.append(policy)
    assert orders[0] == orders[1] != list(range(60))


def test_arms_take_their_schedules():
    student_schedule = [[1, augmentations.ZERO_POLICY], [1, [3, 3] * 30]]
    schedules = {"teacher": [[2, FULL]], "student": student_schedule}

    def choose(name):
        return role_kd.choose_schedule(role_kd.name_schedule(name), schedules, 0)

    for name in ("teacher-base", "student-base", "student-teacher"):
        assert choose(name) == role_kd.BASE_SCHEDULE
    for name in ("teacher-augmented", "student-shared"):
        assert choose(name) == schedules["teacher"]
    for name in ("student-student", "student-both"):
        assert choose(name) == schedules["student"]
    assert choose("student-constant") == [[1, [3, 3] * 30]]
    assert [epochs for epochs, _ in choose("student-random")] == [1, 1]


def test_schedules_are_read_as_they_were_written(tmp_path):
    schedules = {"teacher": [[2, FULL], [1, augmentations.ZERO_POLICY]]}
    (tmp_path / "s.json").write_bytes(augmentations.encode_schedules(schedules))
    assert augmentations.read_schedules(tmp_path / "s.json", ["teacher"]) == schedules


@pytest.mark.parametrize(
    "old, new, says",
    [
        ('"epochs": 3', '"epochs": 0', "expected pieces of at least 1 epoch each"),
        ('"Rotate"', '"Twirl"', "expected Rotate as entry 0, got Twirl"),
        ('"Rotate"', '"Invert"', "expected Rotate as entry 0, got Invert"),
        ("10", "11", "Rotate: expected 0 to 10 and 0 to 9, got 11 and 5"),
        ('"teacher"', '"pupil"', "it has no schedule of a teacher"),
        ("{", "", "JSONDecodeError"),
    ],
)
def test_schedules_of_no_search_are_refused(tmp_path, capsys, old, new, says):
    text = augmentations.encode_schedules({"teacher": [[3, FULL]]}).decode()
    (tmp_path / "s.json").write_text(text.replace(old, new, 1))
    line = read_refusal(capsys, augmentations.read_schedules, tmp_path / "s.json", ["teacher"])
    assert says in line


# The search


def make_population(n, **options):
    """A phase of n small members, and the splits of digits."""
    args = replace(TINY, population=n, **options)
    info = role_kd.describe_teacher(args)
    splits = role_kd.load_splits(args, info, "cpu")
    return role_kd.start_phase("search-teacher", {}, info, args, "cpu"), splits, args


def test_a_clone_scores_as_its_source_and_then_goes_its_own_way():
    phase, splits, args = make_population(5, teacher="resnet8")
    for i, member in enumerate(phase.members):
        role_kd.train_epoch(member, None, splits["search"], 0.0, args)
        member.lineage.append([1, member.policy])
        member.score = 10.0 * (5 - i)  # the last two are the worst quarter
    sources = phase.members[:2]
    true_scores = [role_kd.measure(member.network, splits["validation"]) for member in sources]
    before = [role_kd.copy.deepcopy(member.get_state()) for member in phase.members]

    role_kd.exploit(phase.members, random.Random(0))
    for i in (0, 1, 2):  # all others go on as they were
        assert phase.members[i].score == before[i]["score"]
        assert phase.members[i].policy == augmentations.ZERO_POLICY
    for i in (3, 4):
        clone = phase.members[i]
        j = [member.score for member in sources].index(clone.score)
        assert role_kd.measure(clone.network, splits["validation"]) == true_scores[j]
        assert clone.policy != augmentations.ZERO_POLICY
        assert clone.lineage == [[1, augmentations.ZERO_POLICY]]
        state = clone.optimizer.state_dict()["state"]
        for key, value in sources[j].optimizer.state_dict()["state"].items():
            assert torch.equal(state[key]["exp_avg_sq"], value["exp_avg_sq"])
        assert not torch.equal(clone.generator.get_state(), before[j]["generator"])

    role_kd.train_epoch(phase.members[3], None, splits["search"], 0.0, args)
    phase.members[3].lineage.append([1, phase.members[3].policy])
    for i in (0, 1):
        after = phase.members[i].get_state()
        assert all(torch.equal(after["network"][k], v) for k, v in before[i]["network"].items())
        first = after["optimizer"]["state"][0]["exp_avg"]
        assert torch.equal(first, before[i]["optimizer"]["state"][0]["exp_avg"])
        assert len(after["lineage"]) == 1


@pytest.mark.parametrize("interval", [1, 2])
def test_a_schedule_is_the_winners_lineage_and_as_long_as_the_search(interval):
    phase, splits, args = make_population(4, search_epochs=5, interval=interval)
    rows = []
    schedule = role_kd.search(phase, splits, lambda phase, row: rows.append(row), args)
    assert sum(epochs for epochs, _ in schedule) == 5
    assert [row["epoch"] for row in rows] == ([1, 2, 3, 4, 5] if interval == 1 else [2, 4, 5])
    for _, policy in schedule:
        assert len(policy) == 60
        assert set(policy[0::2]) <= set(range(11)) and set(policy[1::2]) <= set(range(10))
    best = max(member.score for member in phase.members)
    assert best in [m.score for m in phase.members if m.lineage == schedule]
    assert rows[-1]["eval/validation"] == best

    # killed after its last round, a search has nothing left to do
    n_rows = len(rows)
    assert role_kd.search(phase, splits, lambda phase, row: rows.append(row), args) == schedule
    assert len(rows) == n_rows and sum(epochs for epochs, _ in schedule) == 5


def test_the_learning_rate_falls_at_the_released_marks():
    phase, splits, args = make_population(2)
    member = phase.members[0]
    for progress, factor in ((0, 1), (0.29, 1), (0.3, 0.1), (0.6, 0.01), (0.8, 0.001)):
        role_kd.train_epoch(member, None, splits["search"], progress, args)
        for group in member.optimizer.param_groups:
            assert group["lr"] == pytest.approx(1e-3 * factor)


def test_weight_decay_spares_biases_and_batchnorm():
    phase, _, _ = make_population(2, teacher="resnet8")
    decayed, others = phase.members[0].optimizer.param_groups
    assert decayed["weight_decay"] == 1e-5 and others["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"]) and others["params"]


# Losses


def test_the_soft_loss_is_the_released_formula():
    t, s = 3 * torch.randn(2, 6, 10)
    y = torch.randint(10, (6,))
    p = (t / 3).softmax(1)
    kl = (p * (p.log() - (s / 3).log_softmax(1))).sum(1).mean()
    expected = 0.7 * F.cross_entropy(s, y) + 0.3 * kl
    for fused in (True, False):
        assert role_kd.soft_loss(t, s, y, fused).item() == pytest.approx(expected.item(), rel=1e-5)


def test_relations_are_distances_over_their_mean_and_angles():
    e = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    expected = torch.tensor([[0.0, 3, 4], [3, 0, 5], [4, 5, 0]]) / 4
    torch.testing.assert_close(role_kd.pairwise_distances(e), expected)
    cosines = role_kd.triplet_cosines(e)
    assert cosines[0, 1, 2].item() == pytest.approx(0, abs=1e-6)
    assert cosines[1, 0, 2].item() == pytest.approx(0.6)
    assert cosines[2, 0, 1].item() == pytest.approx(0.8)

    t, s = torch.randn(2, 8, 10)
    assert role_kd.relation_distance(t, t).item() == 0
    assert role_kd.relation_distance(t, 3 * t).item() == pytest.approx(0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(10, 10))[0]
    assert role_kd.relation_distance(t, t @ turn).item() == pytest.approx(0, abs=1e-6)
    s.requires_grad_()
    loss = role_kd.relation_distance(t, s)
    loss.backward()
    assert loss.item() > 0.1 and s.grad.isfinite().all() and s.grad.abs().sum() > 0


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_a_thousand_squared_distances_of_maps(fused):
    t = [torch.randn(2, 4, 5, 5), torch.randn(2, 3, 2, 2)]
    s = [torch.randn(2, 6, 5, 5), torch.randn(2, 3, 2, 2)]
    expected = 0
    for a, b in zip(t, s, strict=True):
        maps = [F.normalize(x.square().mean(1).flatten(1)) for x in (a, b)]
        expected += 1000 * (maps[0] - maps[1]).square().mean().item()
    assert role_kd.attention_distance(t, s, fused).item() == pytest.approx(expected, rel=1e-4)


def test_activation_boundaries_by_hand():
    """(s + 1)^2 counts where the teacher is off and s > -1, (s - 1)^2 where it is on and s <= 1."""
    t = torch.tensor([0.0, 0.0, 2.0, 2.0]).view(1, 4, 1, 1)
    s = torch.tensor([-2.0, 0.5, 0.5, 3.0]).view(1, 4, 1, 1)
    identity = torch.nn.Identity()
    once = role_kd.boundary_distance([t], [s], [identity])
    assert once.item() == pytest.approx((1.5**2 + 0.5**2) / 4)
    twice = role_kd.boundary_distance([t, t], [s, s], [identity, identity])
    assert twice.item() == pytest.approx(3 * once.item())


@pytest.mark.parametrize("kd", ["soft", "rkd", "at", "ab"])
def test_every_loss_teaches(tmp_path, kd):
    options = dict(train_images=512, epochs=6, lr=3e-3, arm="base")
    result = run(tmp_path, kd=kd, **options)
    losses = [row["loss/train"] for row in rows_of(tmp_path) if row["phase"] == 1]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert result["student_accuracy"] > 15


# Few bits


class StandardisedConv(nn.Conv2d):
    """It standardises its weight first."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_convolutions_that_compute_more_are_not_quantized(capsys):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), StandardisedConv(2, 2, 3))
    line = read_refusal(capsys, role_kd.quantize_network, network, 2)
    assert "StandardisedConv computes more than nn.Conv2d; pass --bits 32" in line
    assert type(network[1]) is StandardisedConv


def test_quantised_values_and_their_gradients():
    a = torch.tensor([-1.0, 0.0, 0.1, 0.2, 0.5001, 0.9, 1.0, 7.0], requires_grad=True)
    q = role_kd.quantize_activation(a, 2)
    third = torch.tensor(1.0) / 3
    expected = torch.stack([0 * third, 0 * third, 0 * third, third, 2 * third, *[3 * third] * 3])
    assert torch.equal(q, expected)
    q.sum().backward()
    assert a.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]

    w = torch.tensor([-2.0, -0.1, 0.1, 1.0])
    scaled = [v / (2 * math.tanh(2)) + 0.5 for v in w.tanh().tolist()]
    expected = [2 * round(v * 3) / 3 - 1 for v in scaled]
    assert role_kd.quantize_weight(w, 2).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_w2a2_student_starts_from_its_teacher_and_computes_with_four_levels(monkeypatch):
    args = replace(TINY, teacher="resnet8", student="resnet8", bits=2)
    info = role_kd.describe_teacher(args)
    teacher = NETWORKS["resnet8"](in_channels=1)
    student = role_kd.build_student(args, info, "cpu", teacher.state_dict())
    for key, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key

    seen = []
    convolve = torch.nn.Conv2d._conv_forward

    def watch(self, x, weight, bias):
        seen.append((type(self), x, weight))
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", watch)
    student(torch.randn(4, 1, 32, 32))
    first, *others = seen
    assert first[0] is torch.nn.Conv2d and len(others) == 6
    levels = torch.tensor([0.0, 1.0, 2.0, 3.0]) / 3
    for kind, x, weight in others:
        assert kind is role_kd.QuantizedConv2d
        assert torch.isin(x, levels).all() and len(x.unique()) > 1
        assert torch.isin(weight, 2 * levels - 1).all()

    block = student.layer2[0].eval()
    x = torch.rand(2, 16, 8, 8)
    quantized = role_kd.quantize_activation(x, 2)
    assert torch.equal(block(x), block(quantized))  # the shortcut reads the quantised input too
    assert not torch.equal(x, quantized)


def test_a_quantised_run_says_so(tmp_path):
    result = run(tmp_path, bits=2, teacher="resnet8", student="resnet8", arm="base")
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert saved["accuracy"] is None and saved["arch"] == "resnet8"
    assert result["setting"]["bits"] == 2 and result["student_accuracy"] > 0


# Runs


def test_all_arms_share_one_pair_of_searches(tmp_path):
    result = run(tmp_path / "all", arm="all")
    assert list(result["student_accuracies"]) == list(role_kd.ARMS)
    assert set(result["teacher_accuracies"]) == {"base", "augmented"}
    names = [f"student-{arm}" for arm in role_kd.ARMS]
    first = ["search-teacher", "teacher-base", "teacher-augmented", "search-student"]
    assert list(result["phases"]) == [*first, *names]

    for role in ("teacher", "student"):
        cost = result["searches"][role]
        assert (cost["member_epochs"], cost["images_trained"]) == (6, 6 * 64)
        assert cost["images_measured"] == 6 * 64 and cost["seconds"] > 0
        p = cost["reward"] / 100
        error = 100 * math.sqrt(p * (1 - p) / 64)
        assert cost["reward_standard_error"] == pytest.approx(error)
        assert len(result["strengths"][role]) == 3
    saved = json.loads((tmp_path / "all/schedules.json").read_text())
    pieces = saved["student"]
    strength = sum(tenths for _, tenths, _ in pieces[-1]["policy"]) / 10
    assert result["strengths"]["student"][-1] == pytest.approx(strength)
    assert Image.open(tmp_path / "all/samples.png").size[1] == 3 * 66
    assert (tmp_path / "all/curve.png").exists()

    # An arm alone gives the figures that it gives among all.
    for arm in ("both", "shared"):
        alone = run(tmp_path / arm, arm=arm)
        assert alone["student_accuracies"] == {
            name: result["student_accuracies"][name] for name in ("base", arm)
        }

    # With the schedules of that run nothing is searched, and the figures are the same.
    path = str(tmp_path / "all/schedules.json")
    again = run(tmp_path / "again", arm="both", schedules=path)
    assert again["student_accuracies"]["both"] == result["student_accuracies"]["both"]
    assert again["searches"] == {} and "search-teacher" not in again["phases"]


def test_test_images_are_measured_after_the_last_step(tmp_path, monkeypatch):
    events = []
    measure = role_kd.measure
    train_epoch = role_kd.train_epoch

    def watch_measure(network, split):
        events.append(len(split.images))
        return measure(network, split)

    def watch_epoch(member, teacher, split, progress, args):
        events.append("train")
        assert len(split.images) == 64
        return train_epoch(member, teacher, split, progress, args)

    monkeypatch.setattr(role_kd, "measure", watch_measure)
    monkeypatch.setattr(role_kd, "train_epoch", watch_epoch)
    run(tmp_path)
    last = len(events) - events[::-1].index("train")
    assert set(events[:last]) == {"train", 64}  # 64 validation images
    assert events[last:] == [360] * 4  # each of the networks once


def test_search_reward_and_test_images_are_apart():
    args = replace(TINY, search_images=700, validation_images=737, train_images=0)
    splits = role_kd.load_splits(args, role_kd.describe_teacher(args), "cpu")
    together = torch.cat([splits["search"].images, splits["validation"].images])
    assert torch.equal(together, splits["train"].images) and len(together) == 1437
    assert len(splits["test"].images) == 360
    assert splits["search"].recipe.cutout == 0


def test_a_trained_teacher_leaves_stage_one_out(tmp_path):
    weights = "teachers/digits-lenet5.pt"
    path = role_kd.Path(role_kd.__file__).parent / weights
    result = run(tmp_path, weights=str(path), teacher="lenet5", arm="student")
    assert list(result["phases"]) == ["search-student", "student-base", "student-student"]
    assert result["teacher_accuracies"]["base"] > 95


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(weights="w.pt"), "--weights: leaves no teacher to augment for --arm both"),
        (dict(bits=2), "--bits 2: expected a student that can start from the teacher"),
        (dict(search_images=1000), "expected at most the 1437 training images"),
        (dict(schedules="schedules.json", out="."), "this run would overwrite it; pass another"),
        (dict(schedules="nowhere.json"), "--schedules nowhere.json: FileNotFoundError"),
        (dict(kd="at", student="resnet8"), "no activations of equal sizes; pass --kd soft or rkd"),
        (dict(teacher="resnet99"), "--teacher resnet99: unknown network"),
        (dict(student="resnet99"), "--student resnet99: unknown network"),
        (dict(batch_size=65), "--batch-size: expected at most --search-images"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    schedules = {role: [[3, FULL]] for role in ("teacher", "student")}
    (tmp_path / "s.json").write_bytes(augmentations.encode_schedules(schedules))
    args = replace(TINY, validation_images=500, **options)
    assert says in read_refusal(capsys, role_kd.main, args)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun: expected one process" in read_refusal(capsys, role_kd.main, TINY)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(population=1), "--population: expected at least 2"),
        (dict(bits=0), "--bits: expected 2 to 8, or 32, got 0"),
        (dict(bits=1), "--bits: expected 2 to 8, or 32, got 1"),
        (dict(interval=0), "--interval: expected at least 1"),
        (dict(lr=float("nan")), "--lr: expected at least"),
    ],
)
def test_numbers_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        replace(TINY, **options)


def test_presets_hold_the_released_values():
    released = role_kd.PRESETS["cifar100"]
    assert (released.population, released.search_epochs, released.interval) == (16, 200, 3)
    assert (released.search_images, released.validation_images) == (4000, 46000)
    assert (released.batch_size, released.lr, released.weight_decay) == (128, 1e-3, 1e-5)
    assert (released.epochs, released.cutout, released.bits) == (200, 8, 2)
    assert role_kd.PRESETS["cifar10"].cutout == 16 and released.kd_weight == 0.4
