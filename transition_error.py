"""Mean transition error: how alike the decision boundaries of a student and its teacher are.

Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019,
arXiv:1905.09768, section 4.3. Two networks may have the same accuracy and still change their minds
at different places. An image x of class i is led, step by step, to where the student believes in
another class j, and the probabilities p_j that student and teacher give to j are recorded:

    x_0 = x,    x_{k+1} = x_k - step_size * gradient of CE(student(x_k), j)
    MTE = mean over images, classes j != i and points k of |p_j^student(x_k) - p_j^teacher(x_k)|

The gradient is taken as it is, in normalised pixels: no sign, projection, momentum or clipping. The
paper's table 2 has 100 points a path (n_steps), step_size 1 and 1000 test images; other values
change the error.

Run `python transition_error.py --students runs/zskt/default/student.pt` after `python zskt.py`. It
writes mte.json (for each student `mte`, `paths`: images times classes, `accuracy` in percent) and
mte.png (p_j over k, a mean over the paths) into --out.
Measured, one CPU thread: zero-shot students of MNIST 0.71 to 0.73, a student of real images 0.92
(results/mte-mnist.json). Nothing ran on a GPU. Where we differ:
- the released code follows one path at a time; ours go side by side, with the same result, since
  both networks are in eval mode and the cross-entropy is summed over the batch;
- class i is an image's label, as in the released code; in the paper it is the predicted class.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from harness.data import evaluate, load_real_images, normalise
from harness.errors import fail, fail_in_one_line, refuse_misfits
from harness.files import encode_json, open_atomically
from harness.load import check_network, load_teacher, load_trained
from harness.run import TeacherOptions, check_at_least, choose_device, describe_machine, parse_args


@dataclass
class Args(TeacherOptions):
    # Networks and data
    students: tuple[str, ...] = ("runs/zskt/default/student.pt",)
    """Checkpoints of students (student.pt) to compare with the teacher."""
    arch: str = ""
    """The students' architecture: a name of harness/networks.py, or file.py:factory; empty: the one
    that each checkpoint names."""
    teacher: str = "digits-lenet5"
    """Shipped or ImageNet name, a checkpoint of teacher.py (.pt), or file.py:factory."""
    data_dir: str = "data"
    """Folder with the data sets' official files. Downloaded weights are kept there too."""
    out: str = "runs/transition_error/default"
    """Output folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on a GPU if there is one."""
    graph: bool = True
    """On a GPU: replay a step of the paths as one CUDA graph."""

    # Method
    n_images: int = 1000
    """Test images that both networks assign to the same class (paper: 1000)."""
    n_steps: int = 100
    """Points of a path (paper: 100)."""
    step_size: float = 1.0
    """Length of a step in units of the gradient (paper: 1)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.students:
            raise ValueError("--students: expected at least 1 checkpoint")
        if not self.out:
            raise ValueError("--out: expected a folder, got an empty name")
        check_at_least(1, self, "n_images", "n_steps")
        check_at_least(1e-12, self, "step_size")


N_PARALLEL = 1000  # paths that are followed side by side: a step of some 100 MB on a CPU


@torch.no_grad()
def choose_images(student, teacher, x, n_images):
    """The first images that student and teacher assign to the same class.

    Args:
        student, teacher: frozen networks in eval mode.
        x: (N, C, H, W) normalised images, in the order of preference.
        n_images: how many to choose.

    Returns:
        Their indices (n,) in x; n <= n_images, maybe 0.
    """
    agreed = []
    for part in x.split(500):
        agreed.append(student(part).argmax(1) == teacher(part).argmax(1))
    return torch.cat(agreed).nonzero().squeeze(1)[:n_images]


def make_paths(x, labels, num_classes):
    """Where paths start and lead to: each image with every class but its label.

    Args:
        x: (n, C, H, W) images.
        labels: (n,).
        num_classes: K.

    Returns:
        Images (n (K - 1), C, H, W), each K - 1 times in a row, and the classes (n (K - 1),) that
        they are led to.
    """
    others = torch.arange(1, num_classes, device=labels.device)
    goals = (labels.unsqueeze(1) + others) % num_classes  # (n, K - 1)
    return x.repeat_interleave(num_classes - 1, 0), goals.flatten()


def follow_paths(student, teacher, x, goals, args):
    """The probability of each image's goal along its path, which the student determines.

    Args:
        student, teacher: frozen networks in eval mode: a BatchNorm in train mode would make the
            paths depend on each other.
        x: (n, C, H, W) normalised images.
        goals: (n,) classes.
        args: n_steps, step_size, graph.

    Returns:
        (2, n, n_steps) fp32, student and teacher. The first point belongs to x itself.
    """
    x = x.detach().clone().requires_grad_()
    points = torch.zeros(2, len(goals), device=x.device)
    curves = torch.zeros(2, len(goals), args.n_steps, device=x.device)

    def move_images():
        s_logits = student(x)
        loss = F.cross_entropy(s_logits, goals, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            logits = torch.stack([s_logits, teacher(x)])  # (2, n, K)
            p = logits.float().softmax(2)
            index = goals.expand(2, -1).unsqueeze(2)  # (2, n, 1)
            points.copy_(p.gather(2, index).squeeze(2))
            x.sub_(args.step_size * gradient)

    run_step = kernels.CapturedStep(move_images, enabled=args.graph and x.is_cuda)
    for k in range(args.n_steps):
        run_step()
        curves[:, :, k] = points
    return curves


def mean_transition_error(curves):
    """MTE of transition curves (2, n, n_steps): the mean of |p_j^student - p_j^teacher|."""
    s_curves, t_curves = curves
    return (s_curves - t_curves).abs().mean().item()


def draw_transitions(curves, file):
    """A picture of mean curves, each in a band of ± 2 standard errors; one panel a student.

    Args:
        curves: [(title, (2, n, n_steps)), …].
        file: path or file object.
    """
    from matplotlib.figure import Figure

    figure = Figure((4 * len(curves), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, pair) in zip(axes, curves, strict=True):
        for name, curve in zip(("student", "teacher"), pair, strict=True):
            mean = curve.mean(0).numpy()  # (n_steps,)
            band = 2 * curve.std(0).numpy() / len(curve) ** 0.5
            axis.plot(mean, label=name)
            axis.fill_between(range(len(mean)), mean - band, mean + band, alpha=0.3)
        axis.set(title=title, xlabel="step", ylabel="probability of the goal")
        axis.legend()
    figure.savefig(file, format="png", dpi=100)


def load_students(args, teacher_info, device):
    """{path: network} of --students, frozen and tried out."""
    students = {}
    advice = {"other": "pass a student.pt; of a file.py:factory, that too as --arch"}
    for path in args.students:
        with refuse_misfits(f"--students {path}", advice):
            spec = args.arch or path
            weights = path if args.arch else ""
            student, info = load_trained(spec, device, args.data_dir, weights, like=teacher_info)
            check_network(student, teacher_info, device)
        if (info.mean, info.std) != (teacher_info.mean, teacher_info.std):
            problem = "its images are normalised otherwise than the teacher's"
            fail(f"--students {path}: {problem}; their paths do not compare")
        students[path] = student
    return students


def main(args):
    device = choose_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # late gradients are tiny
    teacher, info = load_teacher(args, device)
    students = load_students(args, info, device)

    # The test images, shuffled alike in every run.
    dataset, test = load_real_images(info, args, device)
    if test is None:
        fail(f"--dataset {args.dataset}: paths start from real images; name their data set")
    images, labels = test
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    x = normalise(images[order], info)  # (N, C, H, W)
    x_labels = labels[order]

    rows = {}
    pictures = []
    for path, student in students.items():
        chosen = choose_images(student, teacher, x, args.n_images)
        if len(chosen) == 0:
            problem = "it and the teacher agree on no test image"
            fail(f"--students {path}: {problem}; take a student that has learnt more")
        starts, goals = make_paths(x[chosen], x_labels[chosen], info.num_classes)

        curves = []
        parts = list(zip(starts.split(N_PARALLEL), goals.split(N_PARALLEL), strict=True))
        for part in tqdm(parts, disable=None, desc=path):
            curves.append(follow_paths(student, teacher, *part, args).cpu())
        curves = torch.cat(curves, 1)  # (2, n, n_steps)

        error = mean_transition_error(curves)
        if not math.isfinite(error):
            fail(f"--students {path}: its probabilities are not finite; take another student")
        accuracy = evaluate(student, *test, info)
        rows[path] = dict(mte=error, paths=len(goals), accuracy=accuracy)
        name = "/".join(Path(path).parts[-3:-1]) or path  # zskt/default
        pictures.append((f"{name}: MTE {error:.3f}", curves))
        print(f"{path}: mte {error:.4g}, paths {len(goals)}, accuracy {accuracy:.4g}")

    table = dict(steps=args.n_steps, step_size=args.step_size)
    table.update(teacher=args.teacher, dataset=dataset, students=rows, **describe_machine(device))
    out = Path(args.out)
    with fail_in_one_line(f"--out {out} cannot be used", "pass another folder"):
        out.mkdir(parents=True, exist_ok=True)
        with open_atomically(out / "mte.json") as file:
            file.write(encode_json(table, indent=1))
        with open_atomically(out / "mte.png") as file:
            draw_transitions(pictures, file)
    print(f"wrote mte.json, mte.png into {out}")


if __name__ == "__main__":
    main(parse_args({"transition_error": Args()}))
