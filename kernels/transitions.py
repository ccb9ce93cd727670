"""Transition curves: how alike two classifiers' decision boundaries are, beyond their accuracy on real images.

Micaelli & Storkey 2019, "Zero-shot knowledge transfer via adversarial belief matching" (arXiv:1905.09768), section
4.3. An image x is led, step by step, to where the student believes in a class j,

    x <- x - step_size * gradient of CE(student(x), j)

and both networks' probabilities of j are recorded along the way, before each step. Their mean absolute difference over
images, goals and steps is the mean transition error (MTE, Table 2: K = 100 points, step_size = 1, 1000 test images,
the 9 classes beside an image's own). Plain gradient in normalised pixels: no sign, projection, momentum or clipping.

The released code walks one path at a time. A path never sees another one where both networks are in eval mode and the
cross-entropy is summed, not averaged, over the batch: so all paths walk side by side here, on a GPU in one graph.
"""

import torch
import torch.nn.functional as F

from kernels.graphs import Captured


def transition_pairs(student, teacher, x, labels, num_classes, n_images=1000):
    """Images that student and teacher assign to one class, each beside every class but its label.

    The released code leads an image away from its label; the paper says from its prediction. They differ for the few
    images that both networks get wrong alike.

    Args:
        student: frozen network in eval mode, (n, C, H, W) -> logits (n, num_classes).
        teacher: likewise.
        x: (N, C, H, W) float images in the units that both networks take, in the order of preference.
        labels: (N,) int64 classes.
        num_classes: K.
        n_images: how many of the agreed images are taken, from the first on.

    Returns:
        Images (n (K - 1), C, H, W), each K - 1 times in a row, and goals (n (K - 1),) int64; n <= n_images, maybe 0.

    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).requires_grad_(False).eval()
    >>> x, goals = transition_pairs(network, network, torch.randn(2, 1, 2, 2), torch.tensor([0, 2]), 3)
    >>> goals
    tensor([1, 2, 0, 1])
    """
    agreed = torch.cat([teacher(part).argmax(1) == student(part).argmax(1) for part in x.split(500)])
    x, labels = x[agreed][:n_images], labels[agreed][:n_images]
    goals = (labels[:, None] + torch.arange(1, num_classes, device=labels.device)).flatten() % num_classes
    return x.repeat_interleave(num_classes - 1, 0), goals


def transition_curves(student, teacher, x, goals, n_steps=100, step_size=1.0, graph=True):
    """Probability of each image's goal along its path, for the student, which is followed, and for the teacher.

    Args:
        student: frozen network in eval mode, (n, C, H, W) -> logits (n, K).
        teacher: likewise.
        x: (n, C, H, W) float images in the units that both networks take; unchanged.
        goals: (n,) int64 classes.
        n_steps: points of a curve, at least 1; the first belongs to x itself.
        step_size: length of a step in units of the gradient.
        graph: on a GPU, replay the step as a CUDA graph.

    Returns:
        (2, n, n_steps) fp32: student, teacher. `(curves[0] - curves[1]).abs().mean()` is the MTE.

    Raises:
        ValueError: a layer in train mode (its BatchNorm would couple the paths), shapes that do not match, n_steps.

    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).requires_grad_(False).eval()
    >>> curves = transition_curves(network, network, torch.randn(2, 1, 2, 2), torch.tensor([0, 2]), n_steps=5)
    >>> curves.shape, (curves[0] - curves[1]).abs().mean()
    (torch.Size([2, 2, 5]), tensor(0.))
    """
    if any(m.training for network in (student, teacher) for m in network.modules()):
        raise ValueError("transition_curves: expected networks in eval mode, got a layer in train mode; call .eval()")
    if goals.shape != x.shape[:1] or n_steps < 1:
        got = f"x {tuple(x.shape)}, goals {tuple(goals.shape)}, n_steps {n_steps}"
        raise ValueError(f"transition_curves: expected a goal for each image and n_steps of at least 1, got {got}")
    x = x.detach().clone().requires_grad_()
    curves = torch.zeros(2, len(goals), n_steps, device=x.device)
    k = torch.zeros(1, dtype=torch.int64, device=x.device)  # on the device: a replayed graph counts on

    def step():
        s_logits = student(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(s_logits, goals, reduction="sum"), x)
        with torch.no_grad():
            probabilities = torch.stack([s_logits, teacher(x)]).float().softmax(2)  # (2, n, K)
            points = probabilities.gather(2, goals.expand(2, -1)[:, :, None])  # (2, n, 1)
            curves.index_copy_(2, k, points)
            x.sub_(step_size * gradient)
            k.add_(1)

    step = Captured(step, enabled=graph and x.is_cuda)
    for _ in range(n_steps):
        step()
    return curves


def draw_transitions(curves, path):
    """Write a picture of mean curves with a band of ± 2 standard errors, one panel for each of {title: (2, n, K)}.

    >>> import io
    >>> draw_transitions({"a student": torch.rand(2, 9, 100)}, io.BytesIO())
    """
    from matplotlib.figure import Figure  # not needed but here

    figure = Figure((4 * len(curves), 3), layout="constrained")
    for axis, (title, pair) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, curve in zip(("student", "teacher"), pair, strict=True):
            mean, band = curve.mean(0).numpy(), 2 * curve.std(0).numpy() / len(curve) ** 0.5
            axis.plot(mean, label=name)
            axis.fill_between(range(len(mean)), mean - band, mean + band, alpha=0.3)
        axis.set(title=title, xlabel="step", ylabel="probability of the goal")
        axis.legend()
    figure.savefig(path, dpi=100)
