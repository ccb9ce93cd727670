"""The 15 augmentation operations of role_kd.py, for batches of uint8 images on any device.

They and their magnitudes are those of Population Based Augmentation (Ho et al. 2019,
arXiv:1905.05393), which Fu et al. 2020 take over. The authors' code calls Pillow for one image at
a time; here one call serves all images of a batch that an operation has been drawn for. Each
operation gives Pillow's pixels, at every level. That includes the geometric ones, because Pillow
computes their coordinates in 16.16 fixed point, and so do we.

Inside an operation an image has one more channel, its alpha: 255, or 0 where a geometric operation
or Cutout left nothing. `apply_policy` paints those places at the end. Operations that the authors'
code runs in RGB (`look_up`) lose the alpha of what came before, so the order of operations matters.

A policy is 60 integers: probability index (0 to 10) and level (0 to 9) of each of 30 entries, the
15 operations in their order, twice. A schedule is a list of [number of epochs, policy].

    images = apply_policy(images, policy, recipe.fill, generator)  # up to two operations an image
    images = augment_base(images, recipe, generator)  # crop, mirror, fixed cutout
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.errors import fail_in_one_line
from harness.files import encode_json

# In the order of the 30 entries of a policy. It is the order that a dict of the authors' code has
# in Python 2.7; their published schedules decode rightly in this order alone.
OPERATIONS = (
    "Rotate",
    "TranslateX",
    "TranslateY",
    "Brightness",
    "Color",
    "Invert",
    "Sharpness",
    "Posterize",
    "ShearX",
    "Solarize",
    "ShearY",
    "Equalize",
    "AutoContrast",
    "Cutout",
    "Contrast",
)
N_ENTRIES = 2 * len(OPERATIONS)  # each operation twice
N_PROBABILITIES = 11  # probability indices 0 to 10, in tenths
N_LEVELS = 10  # levels 0 to 9
ZERO_POLICY = [0] * (2 * N_ENTRIES)
NONE = len(OPERATIONS)  # stands for no operation


# Geometry
ONE = 1 << 16  # 1 in Pillow's fixed-point numbers


def make_matrix(name, amount, height, width):
    """The six numbers a … f of Pillow's affine transform: where the pixel of a result comes from.

    x_source = a x + b y + c,    y_source = d x + e y + f
    """
    if name == "ShearX":
        return 1, amount, 0, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, amount, 1, 0
    if name == "TranslateX":
        return 1, 0, amount, 0, 1, 0
    if name == "TranslateY":
        return 1, 0, 0, 0, 1, amount
    # Rotate: as Image.rotate, counter-clockwise about the centre.
    angle = -math.radians(amount % 360)
    cos = round(math.cos(angle), 15)
    sin = round(math.sin(angle), 15)
    c = -cos * (width / 2) - sin * (height / 2) + width / 2
    f = sin * (width / 2) - cos * (height / 2) + height / 2
    return cos, sin, c, -sin, cos, f


def fix_matrix(a, b, c, d, e, f):
    """The same numbers in fixed point, c and f moved to the centre of the first pixel."""
    c = c + a * 0.5 + b * 0.5
    f = f + d * 0.5 + e * 0.5
    return [math.floor(number * ONE + 0.5) for number in (a, b, c, d, e, f)]


STEPS = {  # what a level adds: degrees, share of the height or width, pixels
    "Rotate": 3,
    "ShearX": 0.03,
    "ShearY": 0.03,
    "TranslateX": 1,
    "TranslateY": 1,
}


@functools.cache
def make_matrices(name, height, width, device):
    """All matrices of a geometric operation in fixed point: (2, 10, 6), by sign and level."""
    matrices = []
    for sign in (1, -1):
        for level in range(N_LEVELS):
            amount = sign * level * STEPS[name]
            matrices.append(fix_matrix(*make_matrix(name, amount, height, width)))
    return torch.tensor(matrices, device=device).view(2, N_LEVELS, 6)


def transform(x, matrices, fill):
    """Take each pixel from the nearest place that its image's matrix names.

    Args:
        x: (N, C, H, W) uint8.
        matrices: (N, 6) int64 in fixed point.
        fill: (1, C, 1, 1) uint8: pixels from outside.
    """
    N, C, H, W = x.shape
    columns = torch.arange(W, device=x.device)
    rows = torch.arange(H, device=x.device).view(H, 1)
    a, b, c, d, e, f = matrices.view(N, 6, 1, 1).unbind(1)  # each (N, 1, 1)
    source_x = (a * columns + b * rows + c) >> 16  # (N, H, W)
    source_y = (d * columns + e * rows + f) >> 16
    inside = (source_x >= 0) & (source_x < W) & (source_y >= 0) & (source_y < H)

    source = source_y.clamp(0, H - 1) * W + source_x.clamp(0, W - 1)  # (N, H, W)
    source = source.view(N, 1, H * W).expand(N, C, H * W)
    moved = x.flatten(2).gather(2, source).view(N, C, H, W)
    return torch.where(inside.unsqueeze(1), moved, fill)


def move(name, x, levels, generator):
    """Rotate, shear or translate to a random side; uncovered pixels become transparent."""
    N, C, H, W = x.shape
    signs = torch.randint(2, (N,), generator=generator, device=x.device)
    matrices = make_matrices(name, H, W, x.device)[signs, levels]  # (N, 6)
    return transform(x, matrices, x.new_zeros(1, C, 1, 1))


# Table look-ups: what a new grey level depends on is the old one alone
def look_up(x, tables):
    """Replace grey levels by their entries of a table; everything becomes opaque.

    Args:
        x: (N, C + 1, H, W) uint8, alpha last.
        tables: (N, C, 256), of any integers from 0 to 255.
    """
    pixels = x[:, :-1].long()
    N, C, H, W = pixels.shape
    tables = tables.to(torch.uint8).expand(N, C, 256)
    pixels = tables.gather(2, pixels.flatten(2)).view(N, C, H, W)
    return torch.cat([pixels, torch.full_like(x[:, -1:], 255)], 1)


def make_ramp(x):
    """The grey levels 0 to 255, as (1, 1, 256)."""
    return torch.arange(256, device=x.device).view(1, 1, 256)


def count_levels(x):
    """Histograms (N, C, 256) of the colour channels."""
    pixels = x[:, :-1].flatten(2).long()  # (N, C, H W)
    counts = pixels.new_zeros(*pixels.shape[:2], 256)
    return counts.scatter_add_(2, pixels, torch.ones_like(pixels))


def invert(x, levels, generator):
    return look_up(x, 255 - make_ramp(x))


def posterize(x, levels, generator):
    """Keep 4 - int(0.4 level) bits of each grey level: never all of them."""
    n_dropped = 4 + 4 * levels.view(-1, 1, 1) // 10
    return look_up(x, (make_ramp(x) >> n_dropped) << n_dropped)


def solarize(x, levels, generator):
    """Invert what is at least 256 - int(25.6 level)."""
    threshold = 256 - 256 * levels.view(-1, 1, 1) // 10
    ramp = make_ramp(x)
    return look_up(x, torch.where(ramp < threshold, ramp, 255 - ramp))


def auto_contrast(x, levels, generator):
    """Stretch each channel to the range 0 to 255; one of a single level stays."""
    pixels = x[:, :-1].flatten(2).double()
    low, high = pixels.aminmax(dim=2, keepdim=True)  # (N, C, 1)
    ramp = make_ramp(x)
    scale = torch.full_like(low, 255.0) / (high - low)  # 255 / tensor would round twice
    stretched = (ramp * scale + -low * scale).clamp(0, 255).long()
    return look_up(x, torch.where(high > low, stretched, ramp))


def equalize(x, levels, generator):
    """Make the distribution of each channel's levels even, in Pillow's integer arithmetic."""
    counts = count_levels(x)  # (N, C, 256)
    ramp = make_ramp(x)
    last = torch.where(counts > 0, ramp, 0).amax(2, keepdim=True)  # the highest level that occurs
    n_pixels = counts.sum(2, keepdim=True)
    step = (n_pixels - counts.gather(2, last)) // 255  # 0 also where there is one level only
    before = counts.cumsum(2) - counts
    equalized = (step // 2 + before) // step.clamp(min=1)
    return look_up(x, torch.where(step > 0, equalized.clamp(max=255), ramp))


# Enhancers: a mixture of the image and a version that lacks something
def to_grey(pixels):
    """Luminance (N, 1, H, W) int64 of colour pixels, as Pillow's convert("L") rounds it."""
    if pixels.shape[1] == 1:
        return pixels.long()
    red, green, blue = pixels.long().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def blend(x, without, levels):
    """without + factor (x - without), cut off to a grey level; the factor is 0.1 + 0.18 level.

    Args:
        x: (N, C + 1, H, W) uint8; its alpha stays.
        without: the version that lacks something, broadcastable to the colour channels.
        levels: (N,); at level 5 the factor is 1.
    """
    factors = torch.tensor([level * 1.8 / 10 + 0.1 for level in range(N_LEVELS)])
    factor = factors.to(x.device)[levels].view(-1, 1, 1, 1)
    pixels = x[:, :-1].float()
    without = without.float()
    mixed = without + factor * (pixels - without)
    return torch.cat([mixed.clamp(0, 255).to(torch.uint8), x[:, -1:]], 1)


def change_color(x, levels, generator):
    """Blend with the grey version of the image; grey images stay as they are."""
    return blend(x, to_grey(x[:, :-1]), levels)


def change_brightness(x, levels, generator):
    """Blend with black."""
    return blend(x, x.new_zeros(1, 1, 1, 1), levels)


def change_contrast(x, levels, generator):
    """Blend with its mean luminance."""
    grey = to_grey(x[:, :-1]).flatten(1)  # (N, H W)
    n = grey.shape[1]
    mean = (2 * grey.sum(1) + n) // (2 * n)  # rounded half up
    return blend(x, mean.view(-1, 1, 1, 1), levels)


def change_sharpness(x, levels, generator):
    """Blend with a smooth version: ImageFilter.SMOOTH, which leaves the border as it is."""
    pixels = x[:, :-1].float()
    N, C, H, W = pixels.shape
    kernel = torch.ones(3, 3, device=x.device)
    kernel[1, 1] = 5
    kernel = kernel.expand(C, 1, 3, 3)
    total = F.conv2d(pixels, kernel, groups=C).round().long()  # (N, C, H - 2, W - 2)
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).float()  # total / 13, rounded
    return blend(x, smooth, levels)


# Cutout
CUTOUT_COLORS = {3: (125, 122, 113), 1: (122,)}  # authors' code; its luminance


def draw_squares(images, half, generator):
    """Masks (N, 1, H, W): squares of 2 half pixels about random centres, clipped at the borders.

    Args:
        images: (N, C, H, W).
        half: (N,) or a number.
    """
    N, _, H, W = images.shape
    device = images.device
    half = torch.as_tensor(half, device=device).view(-1, 1)
    y = torch.randint(H, (N, 1), generator=generator, device=device)
    x = torch.randint(W, (N, 1), generator=generator, device=device)
    rows = torch.arange(H, device=device)
    columns = torch.arange(W, device=device)
    in_rows = (rows >= y - half) & (rows < y + half)  # (N, H)
    in_columns = (columns >= x - half) & (columns < x + half)  # (N, W)
    return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)


def cut_out(x, levels, generator):
    """A clear square, 2 x level pixels wide."""
    color = (*CUTOUT_COLORS[x.shape[1] - 1], 0)
    color = torch.tensor(color, dtype=torch.uint8, device=x.device).view(1, -1, 1, 1)
    return torch.where(draw_squares(x, levels, generator), color, x)


FUNCTIONS = {
    "Rotate": functools.partial(move, "Rotate"),
    "TranslateX": functools.partial(move, "TranslateX"),
    "TranslateY": functools.partial(move, "TranslateY"),
    "ShearX": functools.partial(move, "ShearX"),
    "ShearY": functools.partial(move, "ShearY"),
    "Brightness": change_brightness,
    "Color": change_color,
    "Contrast": change_contrast,
    "Sharpness": change_sharpness,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "Cutout": cut_out,
}


def apply_operations(x, numbers, levels, generator):
    """Apply to each image the operation that was drawn for it.

    Args:
        x: (N, C + 1, H, W) uint8, alpha last.
        numbers: (N,) places in OPERATIONS; NONE leaves the image as it is.
        levels: (N,) from 0 to 9.
        generator: source of the signs and of Cutout's centres.
    """
    order = numbers.argsort(stable=True)
    sizes = numbers.bincount(minlength=NONE + 1).tolist()  # the host waits here
    changed = x.clone()
    for name, chosen in zip(OPERATIONS, order.split(sizes)[:NONE], strict=True):
        if len(chosen):
            changed[chosen] = FUNCTIONS[name](x[chosen], levels[chosen], generator)
    return changed


# Policies and schedules
def sum_probabilities(policy):
    """The strength of a policy: the sum of the probabilities of its 30 entries."""
    return sum(policy[0::2]) / 10


def get_policy(schedule, epoch, n_epochs):
    """The policy of an epoch of n_epochs, each piece of the schedule stretched by the ratio."""
    length = sum(epochs for epochs, _ in schedule)
    place = epoch * length // n_epochs
    for epochs, policy in schedule:
        if place < epochs:
            return policy
        place -= epochs
    raise AssertionError(f"epoch {epoch} is none of {n_epochs}")


def encode_schedules(schedules):
    """Schedules as bytes of JSON: each policy as 30 of [operation, tenths of probability, level].

    `read_schedules` reads them.
    """
    saved = {}
    for role, schedule in schedules.items():
        saved[role] = []
        for epochs, policy in schedule:
            entries = []
            for entry in range(N_ENTRIES):
                name = OPERATIONS[entry % len(OPERATIONS)]
                entries.append([name, *policy[2 * entry : 2 * entry + 2]])
            saved[role].append(dict(epochs=epochs, policy=entries))
    return encode_json(saved)


def read_policy(entries):
    """The 60 integers of 30 of [operation, tenths of probability, level].

    Raises:
        ValueError: they are none that a search finds.
    """
    if len(entries) != N_ENTRIES:
        raise ValueError(f"expected {N_ENTRIES} entries of a policy, got {len(entries)}")
    policy = []
    for entry, (name, tenths, level) in enumerate(entries):
        expected = OPERATIONS[entry % len(OPERATIONS)]
        if name != expected:
            raise ValueError(f"expected {expected} as entry {entry}, got {name}")
        if tenths not in range(N_PROBABILITIES) or level not in range(N_LEVELS):
            raise ValueError(f"{name}: expected 0 to 10 and 0 to 9, got {tenths} and {level}")
        policy += [int(tenths), int(level)]
    return policy


def read_schedules(path, roles):
    """The schedules of these roles in a schedules.json; refuse what no search of ours wrote.

    Args:
        path: the file.
        roles: those that are needed, of teacher and student.
    """
    schedules = {}
    with fail_in_one_line(f"--schedules {path}", "pass schedules.json of a finished run"):
        saved = json.loads(Path(path).read_text())
        for role in roles:
            if role not in saved:
                raise ValueError(f"it has no schedule of a {role}")
            pieces = [[piece["epochs"], read_policy(piece["policy"])] for piece in saved[role]]
            if not pieces or min(epochs for epochs, _ in pieces) < 1:
                raise ValueError("expected pieces of at least 1 epoch each")
            schedules[role] = pieces
    return schedules


# A policy on a batch
def draw_entries(policy, n, generator, device):
    """Which entries of a policy fire for each of n images, in the order of their turn.

    An image's count is 0, 1 or 2 with probabilities 0.2, 0.3 and 0.5. The 30 entries take turns in
    random order, each firing with its probability, until as many as the count have fired.

    Args:
        policy: 60 integers.
        n: number of images.

    Returns:
        (n, 2) places in the 30 entries; -1 for none.
    """
    chance = torch.rand(n, generator=generator, device=device)
    count = (chance >= 0.2).long() + (chance >= 0.5).long()  # (n,)
    order = torch.rand(n, N_ENTRIES, generator=generator, device=device).argsort(1)  # (n, 30)
    tenths = torch.tensor(policy[0::2], device=device)[order]
    fires = 10 * torch.rand(n, N_ENTRIES, generator=generator, device=device) < tenths
    rank = fires.cumsum(1)  # the first that fires has rank 1
    fires &= rank <= count.unsqueeze(1)

    drawn = []
    for turn in (1, 2):
        hit = fires & (rank == turn)  # one place in a row, or none
        entry = torch.where(hit, order, -1).amax(1)
        drawn.append(entry)
    return torch.stack(drawn, 1)


def apply_policy(images, policy, fill, generator):
    """Change each image by up to two operations that are drawn from a policy.

    Args:
        images: (N, C, H, W) uint8, C 1 or 3.
        policy: 60 integers.
        fill: (1, C, 1, 1) uint8: what clear places are painted with.
        generator: source of all chance, on the device of `images`. A policy without a probability
            above 0 draws nothing from it and changes nothing.

    Returns:
        (N, C, H, W) uint8.
    """
    if not any(policy[0::2]):
        return images
    entries = draw_entries(policy, len(images), generator, images.device)  # (N, 2)
    levels = torch.tensor(policy[1::2], device=images.device)
    x = torch.cat([images, torch.full_like(images[:, :1], 255)], 1)  # (N, C + 1, H, W)
    for entry in entries.unbind(1):
        numbers = torch.where(entry < 0, NONE, entry % len(OPERATIONS))
        x = apply_operations(x, numbers, levels[entry], generator)
    return torch.where(x[:, -1:] > 0, x[:, :-1], fill)


# Base augmentation
class Recipe(NamedTuple):
    """What every training image of a data set goes through, with any policy."""

    padding: int
    """The most pixels that an image is moved by."""
    mirror: bool
    """Whether to mirror each image left to right with probability 1/2."""
    cutout: int
    """Width in pixels of the square that is cut out of each image, an even number; 0: none."""
    fill: torch.Tensor
    """(1, C, 1, 1) uint8: what borders, squares and clear places are painted with."""


def augment_base(images, recipe, generator):
    """Pad and crop at random, mirror half of the images, cut out a square.

    Args:
        images: (N, C, H, W) uint8.
        recipe: Recipe.
        generator: source of all chance, on the device of `images`.
    """
    N, _, _, W = images.shape
    device = images.device
    sizes = (-recipe.padding, recipe.padding + 1)
    moves = ONE * torch.randint(*sizes, (2, N), generator=generator, device=device)
    mirrored = torch.zeros(N, dtype=torch.bool, device=device)
    if recipe.mirror:
        mirrored = torch.rand(N, generator=generator, device=device) < 0.5

    zero = torch.zeros_like(moves[0])
    one = zero + ONE
    a = torch.where(mirrored, -one, one)
    c = moves[0] + torch.where(mirrored, W * one, zero) + a // 2
    f = moves[1] + one // 2
    matrices = torch.stack([a, zero, c, zero, one, f], 1)  # (N, 6)
    cropped = transform(images, matrices, recipe.fill)
    if recipe.cutout:
        squares = draw_squares(cropped, recipe.cutout // 2, generator)
        cropped = torch.where(squares, recipe.fill, cropped)
    return cropped
