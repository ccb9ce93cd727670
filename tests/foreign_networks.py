"""Small networks as users write them, each with one habit that a rebuilt network may get wrong.

NETWORKS holds (class, kind): what `fuse_batchnorm` makes of it with an example.
"""

import operator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Base(nn.Module):
    """Two convolutions with a BatchNorm each, and a linear layer. A habit overrides a part."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


# BatchNorms of another class


class TanhNorm(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class AllDerived(Base):
    def __init__(self):
        super().__init__()
        self.bn1 = TanhNorm(6)
        self.bn2 = TanhNorm(6)


class OneDerived(Base):
    def __init__(self):
        super().__init__()
        self.bn2 = TanhNorm(6)


class Synchronised(Base):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.SyncBatchNorm(6)


class Hooked(Base):
    """Somebody else's hook changes what the layer returns."""

    def __init__(self):
        super().__init__()
        self.bn1.register_forward_hook(lambda module, inputs, output: output * 0.5)


class Patched(Base):
    """The layer has the plain class, but a forward of its own."""

    def __init__(self):
        super().__init__()
        plain = self.bn1.forward
        self.bn1.forward = lambda x: plain(x).abs()


# Modules that are reached in another way


class InADictionary(Base):
    def __init__(self):
        super().__init__()
        self.by_name = {"first": self.bn1, "second": self.bn2}

    def forward(self, x):
        x = F.relu(self.by_name["first"](self.conv1(x)))
        if x.sum() < -1:  # cannot be traced
            x = -x
        return self.linear(F.relu(self.by_name["second"](self.conv2(x))).mean((2, 3)))


class BoundMethod(Base):
    def __init__(self):
        super().__init__()
        self.normalise = self.bn1.forward
        self.first = self.run_first

    def run_first(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x):
        x = self.first(x)
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class ByKeyword(Base):
    def forward(self, x):
        x = F.relu(self.bn1(input=self.conv1(x)))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Outside(Base):
    """A batch normalisation in a function: no layer shows its input."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        bn = self.bn2
        x = F.batch_norm(self.conv2(x), bn.running_mean, bn.running_var)
        return self.linear(F.relu(x).mean((2, 3)))


# What torch.fx does not see


class StopsGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            brightness = x.mean((2, 3), keepdim=True)
        return super().forward(x - brightness)


class WithoutAutocast(Base):
    """A part that stays in fp32 where the rest runs in half precision."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.bn1(self.conv1(x.float()))
        return self.linear(F.relu(self.bn2(self.conv2(F.relu(x)))).mean((2, 3)))


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.floor(x * 8) / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(Base):
    """Rounding with a gradient of its own; torch.fx keeps the values alone."""

    def forward(self, x):
        return super().forward(x + RoundStraightThrough.apply(x))


class ListOrTensor(Base):
    def forward(self, x):
        images = x if torch.is_tensor(x) else x[0]
        return super().forward(images)


class AssertsShape(Base):
    def forward(self, x):
        assert x.ndim == 4, "images expected"
        return super().forward(x)


class Checkpointed(Base):
    """Its first half runs again in the backward pass."""

    def forward(self, x):
        x = checkpoint(self.run_first, x, use_reentrant=False)
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    def run_first(self, x):
        x = self.bn1(self.conv1(x))
        if x.sum() < -1e9:  # cannot be traced
            x = -x
        return F.relu(x)


class ConstantNoise(Base):
    def forward(self, x):
        return super().forward(x + torch.randn(3, 1, 1))


class RandomDropout(Base):
    """Dropout that is on in eval mode too."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.2, training=True))


# What one forward pass leaves to the next


class CountsCalls(Base):
    def __init__(self):
        super().__init__()
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        return super().forward(x) * (1 + self.n_calls)


class CountsWithoutUse(Base):
    """Nothing shows in two passes, but the third one differs."""

    def __init__(self):
        super().__init__()
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        if self.n_calls > 2:
            x = -x
        return super().forward(x)


class DecaysABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x):
        self.gain.mul_(0.5)
        return super().forward(x * self.gain)


class BuildsItsGrid(Base):
    """Makes a tensor in the first call, and appends to a list in each."""

    def __init__(self):
        super().__init__()
        self.grid = None
        self.means = []

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 8) * x.new_ones(1)
        self.means.append(x.mean())
        return super().forward(x + self.grid)


# What must stay as fast as it is


class InPlace(Base):
    def forward(self, x):
        x = self.conv1(x)
        y = self.bn1(x)
        y.add_(x)
        F.relu(y, inplace=True)
        y = self.bn2(self.conv2(y))
        y *= 2
        y.relu_()
        return self.linear(y.mean((2, 3)))


class MobileActivations(Base):
    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.Hardtanh(0, 6, inplace=True), nn.ReLU6(), nn.Hardswish()])
        self.acts.append(nn.SiLU(inplace=True))

    def forward(self, x):
        x = self.acts[0](self.bn1(self.conv1(5 * x)))
        for act in self.acts[1:]:
            x = act(self.bn2(4 * x))
        for act in (F.silu, F.hardswish, F.relu6):
            x = act(self.bn2(4 * x), inplace=True)
        x = F.hardtanh(self.bn2(4 * x), 0, max_val=6)
        return self.linear(x.mean((2, 3)))


class OtherHardtanh(Base):
    """Functions that look like ReLU6 and are not."""

    def forward(self, x):
        x = F.hardtanh(self.bn1(self.conv1(x)), 0, 1)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.1, inplace=True)
        return self.linear(F.hardtanh(x).mean((2, 3)))


class DenseBlock(Base):
    """One BatchNorm after a concatenation, and one called twice."""

    def __init__(self):
        super().__init__()
        self.bn3 = nn.BatchNorm2d(9)
        self.conv3 = nn.Conv2d(9, 6, 1)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.conv3(F.relu(self.bn3(torch.cat((x, y), 1))))
        y = F.relu(self.bn2(self.conv2(y)))
        return self.linear(F.relu(self.bn2(y)).mean((2, 3)))


class Shortcut(Base):
    """The shortcut's BatchNorm runs between another one and its ReLU."""

    def forward(self, x):
        x = self.conv1(x)
        y = self.bn1(x)
        shortcut = self.bn2(x * 2)
        y = operator.iadd(y, shortcut)
        return self.linear(F.relu(y).mean((2, 3)))


class Perceptron(nn.Module):
    """BatchNorm1d after linear layers, dropout, inputs normalised inside, and a volume."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.volume = nn.Conv3d(1, 2, (3, 1, 1))
        self.bn0 = nn.BatchNorm3d(2)
        self.linear1 = nn.Linear(128, 7)
        self.bn1 = nn.BatchNorm1d(7, affine=False, eps=1e-2)
        self.dropout = nn.Dropout(0.5)
        self.batch_statistics = nn.BatchNorm1d(7, track_running_stats=False)
        self.linear2 = nn.Linear(7, 5)

    def forward(self, x):
        x = self.bn0(self.volume((x - self.mean).unsqueeze(1)))
        x = self.bn1(self.linear1(x.flatten(1)))
        return self.linear2(self.batch_statistics(self.dropout(x.relu())))


class TwoOutputs(Base):
    def forward(self, x):
        features = F.relu(self.bn1(self.conv1(x)))
        y = self.linear(F.relu(self.bn2(self.conv2(features))).mean((2, 3)))
        return {"logits": y, "features": features}


NETWORKS = [
    (AllDerived, "hooks"),
    (OneDerived, "partly fused"),
    (Synchronised, "fused"),
    (Hooked, "hooks"),
    (Patched, "hooks"),
    (InADictionary, "hooks"),
    (BoundMethod, "hooks"),
    (ByKeyword, "fused"),
    (Outside, "fused"),
    (StopsGradient, "partly fused"),
    (WithoutAutocast, "partly fused"),
    (StraightThrough, "partly fused"),
    (ListOrTensor, "partly fused"),
    (AssertsShape, "partly fused"),
    (Checkpointed, "partly fused"),
    (ConstantNoise, "partly fused"),
    (RandomDropout, "fused"),
    (CountsCalls, "partly fused"),
    (CountsWithoutUse, "partly fused"),
    (DecaysABuffer, "partly fused"),
    (BuildsItsGrid, "fused"),
    (InPlace, "fused"),
    (MobileActivations, "fused"),
    (OtherHardtanh, "fused"),
    (DenseBlock, "fused"),
    (Shortcut, "fused"),
    (Perceptron, "fused"),
    (TwoOutputs, "fused"),
]
