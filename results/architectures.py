"""Try `fuse_batchnorm` on networks of torchvision and timm, with random weights.

    python results/architectures.py [LIBRARY/NAME …]

For each network: how many of its BatchNorms are measured, what they become, and how far the
output, the moment loss and its image gradient are from those of plain hooks on the network itself.
Writes results/architectures.json; without arguments it takes all of TORCHVISION and TIMM, some
minutes on a CPU.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from harness.run import describe_machine  # noqa: E402

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision():
    """Import torchvision, also where its compiled operators do not load.

    They load beside one build of PyTorch alone. Without them the import stops where it describes
    two operators that no classifier calls. We declare these two and import again.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


try:
    torchvision = import_torchvision()
    import timm
except ImportError as error:
    sys.exit(f"results/architectures.py: it needs torchvision and timm ({error}); pip install timm")

# The quantized_ ones are the floating-point networks that are made to be quantised later.
TORCHVISION = """
resnet18 DataParallel(resnet18) quantized_resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11_bn
densenet121 googlenet inception_v3 mobilenet_v2 quantized_mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf
regnet_y_400mf maxvit_t
"""
TIMM = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 seresnet50 skresnet18 ecaresnet26t resnest14d
res2net50_26w_4s gernet_s densenet121 vgg11_bn dla34 dpn68 hrnet_w18_small darknet53 cspresnet50
cspdarknet53 ese_vovnet19b_dw selecsls42b inception_v3 inception_v4 inception_resnet_v2
legacy_xception regnetx_002 regnety_002 repvgg_a0 mobileone_s0 convmixer_768_32 mobilenetv1_100
mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small mnasnet_100
semnasnet_100 fbnetc_100 hardcorenas_a lcnet_050 tinynet_e mixnet_s ghostnet_100 ghostnetv2_100
repghostnet_050 rexnet_100 efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 starnet_s1
efficientvit_b0 mobilevit_xxs botnet26t_256 lambda_resnet26t coatnet_nano_rw_224 levit_128s
efficientformer_l1 fastvit_t8 swiftformer_xs tiny_vit_5m_224 visformer_tiny xcit_nano_12_p16_224
"""
SIZES = (64, 128, 224, 256)  # of an image; a network gets the smallest that it takes
TOLERANCES = {"output": 1e-4, "moments": 1e-4, "gradient": 1e-3}


def build_network(library, name):
    if library == "timm":
        return timm.create_model(name, pretrained=False)
    if name.startswith("DataParallel("):
        inner = name.removeprefix("DataParallel(").removesuffix(")")
        return nn.DataParallel(build_network(library, inner))
    return torchvision.models.get_model(name, weights=None)


def make_network(library, name):
    """A frozen network with statistics that its inputs miss."""
    torch.manual_seed(0)
    network = build_network(library, name)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.3, 0.7)  # keeps deep residual networks in range
                nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def find_images(network):
    """Two random images of the smallest size that the network takes."""
    for size in SIZES:
        x = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                network(x)
        except Exception:  # whatever a network raises for a size that it does not take
            if size == SIZES[-1]:
                raise
        else:
            return x


def differentiate(y, layers, x):
    """The moment loss, and the image gradient of it and of the output's mean square."""
    loss = sum(moments[0].norm() + (moments[1] - var).norm() for moments, var in layers)
    (gradient,) = torch.autograd.grad(y.square().mean() + loss, x)
    return loss.detach(), gradient


def watch_by_hand(network, x):
    """Output, BatchNorms that ran, moment loss and gradient, by hooks that anybody would write."""
    found = []

    def measure(layer, inputs):
        value = inputs[0]
        dims = [0, *range(2, value.ndim)]
        mean = value.mean(dims) - layer.running_mean
        found.append(((mean, value.var(dims, unbiased=False)), layer.running_var))

    hooks = []
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            hooks.append(layer.register_forward_pre_hook(measure))
    x = x.clone().requires_grad_()
    y = network(x)
    for hook in hooks:
        hook.remove()
    loss, gradient = differentiate(y, found, x)
    return y.detach(), len(found), loss, gradient


def watch_fused(watched, x):
    x = x.clone().requires_grad_()
    y, found = watched(x)
    loss, gradient = differentiate(y, found, x)
    return y.detach(), len(found.sizes), loss, gradient


def try_network(library, name):
    """A row of the table."""
    network = make_network(library, name)
    x = find_images(network)
    y, n_layers, loss, gradient = watch_by_hand(network, x)

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in the row
        watched = kernels.fuse_batchnorm(network, x)
    seconds = time.perf_counter() - start
    our_y, n_measured, our_loss, our_gradient = watch_fused(watched, x)
    watched.close()

    errors = {
        "output": (our_y - y).abs().max() / y.abs().max(),
        "moments": (our_loss - loss).abs() / loss,
        "gradient": (our_gradient - gradient).abs().max() / gradient.abs().max(),
    }
    errors = {key: float(f"{error.item():.1e}") for key, error in errors.items()}
    is_right = all(errors[key] <= tolerance for key, tolerance in TOLERANCES.items())
    return {
        "library": library,
        "name": name,
        "image_size": x.shape[-1],
        "batchnorms": n_layers,
        "measured": n_measured,
        "kind": watched.kind,
        "reason": watched.reason,
        "right": is_right and n_measured == n_layers,
        "errors": errors,
        "seconds": round(seconds, 2),
    }


def main(chosen):
    names = [f"torchvision/{name}" for name in TORCHVISION.split()]
    names += [f"timm/{name}" for name in TIMM.split()]
    rows = []
    for name in chosen or names:
        row = try_network(*name.split("/"))
        rows.append(row)
        print(f"{name}: {row['kind']}, right: {row['right']}, {row['errors']}; {row['reason']}")
    if chosen:
        return
    libraries = {"torchvision": torchvision.__version__, "timm": timm.__version__}
    saved = {**libraries, **describe_machine("cpu"), "rows": rows}
    path = ROOT / "results/architectures.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
