"""What networks say of synthesised images: whether they are of their class, and how alike they are."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

BATCH = 100  # images at a time: any network's activations fit


def batches(info, images):
    """The network's inputs, in its own units, from uint8 images (N, C, H, W)."""
    mean, std = (torch.tensor(v, device=info.device).view(1, -1, 1, 1) for v in (info.mean, info.std))
    for x in images.split(BATCH):
        x = (x.to(info.device).float() / 255 - mean) / std
        yield x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def agreement(info, shards):
    """How many images a network assigns to their class: that which they were made for, or that of a real image.

    Args:
        info: of load_network.
        shards: pairs of images uint8 (N, C, H, W) and labels (N,), one after another.

    Returns:
        Percent in all, and {class: percent} of those that occur.
    """
    hits, counts = torch.zeros(2, info.num_classes, dtype=torch.double)
    for images, labels in shards:
        predicted, labels = torch.cat([info.model(x).argmax(1) for x in batches(info, images)]).cpu(), labels.cpu()
        hits += torch.bincount(labels[predicted == labels], minlength=info.num_classes)
        counts += torch.bincount(labels, minlength=info.num_classes)
    by_class = {k: round(100 * (hits[k] / counts[k]).item(), 2) for k in counts.nonzero().flatten().tolist()}
    return round(100 * (hits.sum() / counts.sum()).item(), 2), by_class


def last_inputs(model, inputs):
    """What enters a network's last linear layer, [(n, D), …] on the CPU, for each of its inputs; None: it has none."""
    layers, found = [m for m in model.modules() if isinstance(m, nn.Linear)], []
    if not layers:
        return None
    hook = layers[-1].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].flatten(1).cpu()))
    for x in inputs:
        model(x)
    hook.remove()
    return found


@torch.no_grad()
def diversity(info, images, labels):
    """Mean cosine distance from an image to its nearest neighbour of the same class, in what the last layer reads.

    0: each image has a copy. Comparable only between sets of one size and one network.

    Args:
        info: of load_network; its last linear layer's input is taken.
        images: uint8 (N, C, H, W), at most some thousands.
        labels: (N,).

    Returns:
        A number from 0 to 2; None where no class has two images or the network has no linear layer.
    """
    features = last_inputs(info.model, batches(info, images))
    if features is None:
        return None
    features = F.normalize(torch.cat(features).float(), dim=1)  # (N, D)
    alike = features @ features.T  # (N, N)
    alike[(labels[:, None] != labels) | torch.eye(len(labels), dtype=torch.bool)] = -math.inf
    nearest = alike.amax(1)
    nearest = nearest[nearest.isfinite()]
    return round(1 - nearest.mean().item(), 4) if len(nearest) else None


@torch.no_grad()
def spread_of_classes(model, classes):
    """Mean distance of two images of one class, in pixels and in what enters the network's last linear layer.

    Args:
        model: in eval mode; without a linear layer its logits are taken.
        classes: [(n, C, H, W), …], images of one class each, at least two, in normalised units.

    >>> pair = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    >>> spread_of_classes(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), [pair, pair])
    {'pixels': 2.0, 'features': 2.0}
    """
    groups = {"pixels": classes, "features": last_inputs(model, classes) or [model(x) for x in classes]}
    distances = {k: [torch.pdist(x.flatten(1).cpu()).mean() for x in images] for k, images in groups.items()}
    return {k: torch.stack(values).double().mean().item() for k, values in distances.items()}


def report(shards, teacher, verifier, n=1000):
    """What result.json says of a run's images; prints how many each network assigns to the wanted class.

    Args:
        shards: its Shards.
        teacher, verifier: of load_network; verifier may be None.
        n: newest images, among which nearest neighbours are sought.

    Returns:
        n_images, diversity, and for each role its name, agreement and agreement_by_class.
    """
    found = {}
    for role, info in (("teacher", teacher), ("verifier", verifier)):
        total, by_class = agreement(info, shards.read()) if info else (None, None)
        found |= {role: info.name if info else None}
        found |= {f"{role}_agreement": total, f"{role}_agreement_by_class": by_class}
        if info:
            print(f"{role} {info.name} assigns {total:.1f} % of the images to the wanted class")
    return found | dict(n_images=shards.n_images(), diversity=diversity(teacher, *shards.last(n)))
