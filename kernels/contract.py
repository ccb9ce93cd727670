"""What every script promises alike: networks by name, checkpoint or factory, safely loaded; one line on bad input.

Nothing here belongs to a method, so it stands once instead of in each script.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import json
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent  # where teachers/ and teacher.py lie, if they came along


@dataclass
class RunOptions:
    """The options that mean the same in every method script, whose Args add their own."""

    weights: str = ""
    """State dict to load instead of the named one; needed for file.py:factory."""
    num_classes: int = 0
    """Classes of a foreign teacher; 0: as the named teacher has."""
    image_size: int = 0
    """Height = width of a foreign teacher's images in pixels; 0: as the named teacher has."""
    mean: tuple[float, ...] = ()
    """Per-channel mean the teacher's inputs were normalised with; empty: as the named teacher has."""
    std: tuple[float, ...] = ()
    """Per-channel standard deviation, likewise."""
    data_dir: str = "data"
    """Folder with the data set's official files; weights that a script fetches are looked for and put there too."""
    seed: int = 0
    """Seeds python, numpy and torch."""
    device: str = "auto"
    """auto | cpu | cuda."""
    resume: bool = False
    """Continue from checkpoint.pt of --out; on a CPU (same threads, versions; torch's own randomness) bit-exactly."""
    bf16: bool = True
    """bfloat16 activations on a GPU (moments and images stay fp32)."""


def fail(message):
    """Print one line that says what to do and leave with exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_options(args, least, choices):
    """Refuse numbers below `least` and words outside `choices`, {option: …} each; settle args.device."""
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and not low <= value < 2**31:
            fail(f"--{name.replace('_', '-')}: expected at least {low} (and below 2^31), got {value}")
    for name, allowed in (choices | {"device": ("auto", "cpu", "cuda")}).items():
        if (value := getattr(args, name)) not in allowed:
            option, words = name.replace("_", "-"), ", ".join(filter(None, allowed))
            fail(f"--{option}: expected one of {words}, got {value!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def one_line(subject, advice):
    """Report what fails inside in one line, its first sentence: PyTorch goes on to advise loading unsafely."""
    try:
        yield
    except Exception as error:
        fail(f"{subject}: {type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:300]}; {advice}")


def load_factory(path, name, **options):
    """Call `name` of the Python file at `path` with those of the options that it takes."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses of that file look themselves up there
    sys.path.insert(0, str(Path(path).resolve().parent))  # as if the file were run: it may import its neighbours
    try:
        spec.loader.exec_module(module)
        takes = inspect.signature(getattr(module, name)).parameters
        model = getattr(module, name)(**{k: v for k, v in options.items() if k in takes})
    except SystemExit as stop:
        raise RuntimeError(f"{path} ends the program") from stop
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load_weights(path, sha256="", url=""):
    """Read a checkpoint without running anything in it; `sha256`: how its digest must begin; `url`: its source."""
    path = Path(path)
    if url and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_line(f"cannot fetch {url}", f"put the file at {path} or name it with --weights FILE"):
            torch.hub.download_url_to_file(url, str(path), sha256)
    with one_line(f"{path} cannot be read", "pass an existing checkpoint"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        fail(f"{path}: its SHA-256 does not begin with {sha256}: damaged or altered; delete it and fetch it again")
    with warnings.catch_warnings(action="ignore"), one_line(f"{path}: no safe checkpoint", "save a state dict"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        fail(f"{path}: expected a state dict, got {type(saved).__name__}; save model.state_dict()")
    return saved


def load_state(model, saved, path):
    """Copy a state dict, also a wrapped one ({'state_dict': …}) or one of DataParallel ('module.…'), into `model`."""
    for key in ("state_dict", "model", "net"):
        saved = saved[key] if isinstance(saved.get(key), dict) else saved
    state = {str(k).removeprefix("module."): v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    wanted = model.state_dict()  # a key it lacks may be the public CIFAR weights' name for the last layer or shortcut
    public = {k: k.replace("linear.", "fc.").replace("shortcut.", "downsample.") for k in state if k not in wanted}
    state = {public[k] if public.get(k) in wanted else k: v for k, v in state.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unknown:
        fail(f"{path}: keys do not fit the network (lacks {missing[:2]}, has unknown {unknown[:2]}); check --teacher")


# ImageNet teachers with an official address, described as teachers/index.json does the shipped ones; the file's suffix
# is the first 8 digits of its SHA-256, the accuracy top-1 in percent.
PUBLIC = {}
for _name, _file, _accuracy in (
    ("resnet18", "resnet18-f37072fd.pth", 69.758),
    ("resnet34", "resnet34-b627a593.pth", 73.314),
    ("resnet50", "resnet50-0676ba61.pth", 76.130),
    ("resnet101", "resnet101-63fe2227.pth", 77.374),
    ("resnet152", "resnet152-394f9c45.pth", 78.312),
):
    PUBLIC[_name] = dict(arch=_name, dataset="imagenet", num_classes=1000, image_size=224, accuracy=_accuracy)
    PUBLIC[_name] |= dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    PUBLIC[_name] |= dict(file=_file, sha256=_file[-12:-4], url=f"https://download.pytorch.org/models/{_file}")


# What is taken of a network that is not described otherwise: CIFAR-10's.
INFO = dict(num_classes=10, image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def shipped():
    """What teachers/index.json tells of each network by name; empty where a script was copied alone."""
    path = ROOT / "teachers/index.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    return {name: known | {"file": path.with_name(f"{name}.pt")} for name, known in index.items()}


def load_network(spec, args, networks, public=None, teacher=None, fresh=False):
    """The network that `spec` names (--teacher, --student …), with what is known of it.

    Args:
        spec: name of a shipped or public teacher, a checkpoint of teacher.py (.pt), file.py:factory; for a fresh
            network also a name in `networks` or of a network of teacher.py.
        args: the script's; read are weights, num_classes, image_size, mean, std, device and data_dir.
        networks: {name: factory} of the calling script.
        public: {name: what is known} of teachers with an official address, as teachers/index.json describes its own.
        teacher: info of the teacher whose verifier or student this is: gives what is not known otherwise.
        fresh: as initialised and trainable, without weights; else frozen and in eval mode.

    Returns:
        Namespace with model, name, arch, device, dataset, num_classes, image_size, mean, std, accuracy (or None) and
        shape: channels, image_size, num_classes.
    """
    known, weights, named = {}, "" if teacher or fresh else args.weights, shipped() | (public or {})
    if spec in named:
        known = named[spec]
    elif spec.endswith(".pt"):
        known = load_weights(spec) | dict(file=spec, sha256="", url="")  # its own word on these does not count
        if not str(known.get("arch", "no name")).isidentifier():  # a checkpoint names a network, never a file
            fail(
                f"{spec}: not a checkpoint of teacher.py; name its network as file.py:factory and this as its weights"
            )
    elif ".py:" not in spec and spec.replace("-", "_") not in networks and not fresh:
        fail(f"unknown network {spec!r}; choose one of {', '.join(named)}, a teacher.pt or file.py:factory")
    elif not (weights or fresh or (teacher and ".py:" in spec)):  # a verifier's factory loads its weights itself
        fail(f"{spec}: this builds an untrained network; pass a teacher's weights with --weights FILE")
    if weights or fresh:
        known = known | dict(file=weights, sha256="", url="", accuracy=None)
    given = {k: getattr(teacher or args, k) for k in INFO if teacher or getattr(args, k)}
    known = INFO | given | known if teacher and not fresh else INFO | known | given
    arch = str(known.get("arch", spec if ".py:" in spec else spec.replace("-", "_")))
    info = SimpleNamespace(**{k: known[k] for k in INFO}, name=spec, arch=arch, device=args.device)
    info.dataset, info.accuracy = known.get("dataset", ""), known.get("accuracy") and float(known["accuracy"])
    info.shape = len(info.mean), info.image_size, info.num_classes
    finite = torch.tensor([*info.mean, *info.std]).isfinite().all()
    if len(info.mean) != len(info.std) or not finite or min(info.std) <= 0:
        fail(f"--mean and --std: expected as many finite values each, std positive, got {info.mean} and {info.std}")
    options = dict(num_classes=info.num_classes, in_channels=len(info.mean))
    if arch in networks:
        info.model = networks[arch](**options)
    else:  # a network of teacher.py is a factory like any other
        path, name = arch.rsplit(":", 1) if ".py:" in arch else (ROOT / "teacher.py", arch)
        info.model = load_factory(path, name, image_size=info.image_size, **options)
    if file := known.get("file"):
        file = Path(args.data_dir) / file if known.get("url") else file
        load_state(info.model, load_weights(file, known.get("sha256", ""), known.get("url", "")), file)
    info.model.requires_grad_(fresh).train(fresh).to(args.device, memory_format=torch.channels_last)
    return info


def try_out(info, n_channels, size, n_classes):
    """Feed two blank images: a network of another size, channel or class count fails here, not after an hour."""
    logits = info.model(torch.zeros(2, n_channels, size, size, device=info.device))
    if not logits.isfinite().all():
        raise ValueError("gives logits that are not finite")
    if logits.shape != (2, n_classes) or n_classes < 1:
        raise ValueError(f"gives logits of shape {tuple(logits.shape)} for 2 images and {n_classes} classes")


def load_teacher(load, args):
    """The teacher of a generator's script, tried out; load: load_network with the script's networks."""
    with one_line(f"--teacher {args.teacher}", "check --weights, --num-classes, --image-size, --mean and --std"):
        teacher = load(args.teacher, args)
        if teacher.image_size % 4 or teacher.image_size < 8:
            fail(f"--image-size: expected a multiple of 4 of at least 8 pixels, got {teacher.image_size}")
        try_out(teacher, *teacher.shape)
    return teacher


def load_student(load, spec, args, teacher):
    """A fresh student for the teacher's images and classes, tried out, in train mode."""
    with one_line(f"--student {spec}", "choose a network of this script or of teacher.py, or file.py:factory"):
        student = load(spec, args, teacher=teacher, fresh=True)
        student.model.eval()  # a blank batch must not reach the moments
        try_out(student, *teacher.shape)
        student.model.train()
    return student


def load_verifier(load, spec, likely, args, teacher):
    """The network that judges a teacher's images, tried out, or None.

    spec: as --teacher; none; auto: `likely` where it is shipped and fits the teacher's images and classes, else none.
    """
    takes = [shipped().get(likely, {}).get(k) for k in ("channels", "image_size", "num_classes")]
    likely = likely if takes == list(teacher.shape) else "none"
    if (spec := likely if spec == "auto" else spec) == "none":
        return None
    with one_line(f"--verifier {spec}", "choose another, or --verifier none"):
        verifier = load(spec, args, teacher=teacher)
        try_out(verifier, *teacher.shape)
    return verifier


def seed_everything(seed):
    """Python, numpy and torch; torch's own streams make networks and noise, the others are for foreign code."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def make_optimizer(kind, model, lr):
    """adam, or sgd with momentum 0.9 and weight decay 5e-4: fused, and its learning rate where a graph can read it."""
    cuda = next(model.parameters()).is_cuda
    make = partial(torch.optim.Adam, capturable=cuda)
    if kind == "sgd":
        make = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    return make(model.parameters(), torch.tensor(lr, device="cuda" if cuda else "cpu"), fused=True)


def restore_optimizer(optimizer, saved):
    """Load moments and steps, not the options; wrong sizes are refused here, for fused steps read past their end."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else {"momentum_buffer"}
    if not saved["state"]:
        raise ValueError("its optimiser has no state")
    for i, state in saved["state"].items():  # a parameter that is never used has none
        shapes = {key: value.shape for key, value in state.items()}
        if set(shapes) != wanted or shapes.pop("step", torch.Size()) or set(shapes.values()) != {parameters[i].shape}:
            raise ValueError("its optimiser belongs to another network")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def ran_on(device):
    """What result.json says of the machine and the code: device, device_name and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    commit = "unknown"
    with contextlib.suppress(OSError):  # no git
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
        commit = git.stdout.strip() or commit
    versions = dict(torch=str(torch.__version__), numpy=np.__version__, commit=commit)
    return dict(device=device, device_name=name, versions=versions)
