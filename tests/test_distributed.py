"""kernels.distributed, and deepinversion.py under torchrun: two gloo processes on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RUN = "deepinversion.py --teacher digits-resnet8 --verifier none --batch-size 6 --num-images 24 --iterations 4"
RUN += " --checkpoint-every 2 --log-every 1 --device cpu --out"


def python(*command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def torchrun(*command):
    python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)


def case(sync, world, per_image=False):
    """Images of two processes, a small teacher of whose moments they are far, and its setting."""
    import deepinversion as di

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    model += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model.eval().requires_grad_(False)
    setting = di.SETTINGS["cifar10"] | dict.fromkeys(("fused", "fused_bn", "fused_distance", "fused_view"), True)
    setting |= dict(bf16=False, sync_moments=sync, world=world, alpha_tv_l1=0.5, alpha_l2=0.5)
    setting |= dict(alpha_tv_l2=0.5, priors_per_image=per_image)
    x = torch.randn(8, 3, 10, 10)
    x[:4] = x[4:].flip(0) + 1  # the halves have other moments, and total variations of the same norms
    return SimpleNamespace(measured=di.measured(model, setting, "cpu")), x, torch.arange(8), setting


def gradients(x, labels, teacher, setting):
    """Weighted loss, moment loss and image gradient of one process."""
    import deepinversion as di

    x = x.clone().requires_grad_()
    total, terms = di.synthesis_loss(x, torch.tensor([1, 0, 1]), labels, teacher, setting)
    return total.detach(), terms[di.TERMS.index("bn")], *torch.autograd.grad(total, x)


def one_process(out):
    """What each process of test_two_processes_… does."""
    import torch.distributed as dist

    from kernels.distributed import join, joint_moments, least_of_all, leave, wait_for_all

    place = join("cpu")
    assert place.world == 2 and least_of_all(5 + place.rank, "cpu") == 5
    x = case(True, 2)[1]
    mine = slice(4 * place.rank, 4 * place.rank + 4)
    moments = torch.stack((x[mine].mean((0, 2, 3)), x[mine].var((0, 2, 3), unbiased=False)))
    results = []
    for per_image in (False, True):
        teacher, x, labels, setting = case(True, 2, per_image)
        total, bn, gradient = gradients(x[mine], labels[mine], teacher, setting)
        others = total - setting["alpha_bn"] * bn  # this process's share of what is averaged
        dist.all_reduce(others)
        results.append((others + setting["alpha_bn"] * bn, gradient))
    torch.save((results, joint_moments(moments)), f"{out}/{place.rank}.pt")
    wait_for_all(place)
    leave(place)


def test_two_processes_with_joint_moments_are_one_with_all_images(tmp_path):
    torchrun(__file__, tmp_path)
    x = case(False, 1)[1]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    moments = torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)))
    for _, joint in saved:
        assert torch.allclose(joint, moments, rtol=1e-5, atol=1e-6)
    for i, per_image in enumerate((False, True)):
        teacher, x, labels, setting = case(False, 1, per_image)
        total, _, gradient = gradients(x, labels, teacher, setting)
        for results, _ in saved:
            assert results[i][0].item() == pytest.approx(total.item(), rel=1e-5)
        together = torch.cat([results[i][1] for results, _ in saved])
        assert (together - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("images-*.npz"))}


def test_batches_are_shared_out_and_are_those_of_one_process(tmp_path):
    python(*RUN.split(), tmp_path / "one")
    torchrun(*RUN.split(), tmp_path / "two")
    assert list(shards(tmp_path / "one")) == [f"images-{i:05d}.npz" for i in range(4)]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert (tmp_path / "one/samples.png").read_bytes() == (tmp_path / "two/samples.png").read_bytes()


def test_joint_batches_resume_where_the_slower_process_stopped(tmp_path):
    """One process's newest checkpoint is lost: both go on from its last one, to the same images."""
    torchrun(*RUN.split(), tmp_path / "whole", "--sync-moments")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/images-00003.npz").unlink()
    slower = tmp_path / "cut/rank1"
    (slower / "checkpoint-previous.pt").replace(slower / "checkpoint.pt")
    steps = [torch.load(path, weights_only=True)["state"] for path in sorted(tmp_path.glob("cut/**/checkpoint.pt"))]
    assert [(state["batch"], state["step"]) for state in steps] == [(4, 0), (3, 2)]
    torchrun(*RUN.split(), tmp_path / "cut", "--sync-moments", "--resume")
    whole, cut = shards(tmp_path / "whole"), shards(tmp_path / "cut")
    assert whole == cut and len(set(whole.values())) == 4
    with np.load(tmp_path / "cut/images-00003.npz") as made:
        assert made["images"].shape == (6, 32, 32, 1)


if __name__ == "__main__":
    one_process(sys.argv[1])
