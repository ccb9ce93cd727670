"""Small networks as users write them, each with one habit that a rebuilt network may get wrong.

NETWORKS holds (class, kind): what `fuse_batchnorm` makes of it with an example.
"""

import operator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune
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


class HookedBackward(Base):
    """Somebody else's hook changes the gradient alone."""

    def __init__(self):
        super().__init__()
        self.bn1.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 0.5,))


class HookedActivation(nn.Module):
    """A hook lies on a layer that would be fused into the BatchNorm before it."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.block[2].register_forward_hook(lambda module, inputs, output: output + 1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        return self.linear(self.block(x).mean((2, 3)))


class PrunedNorm(Base):
    """A hook computes the layer's weight before each call."""

    def __init__(self):
        super().__init__()
        prune.l1_unstructured(self.bn1, "weight", 0.5)


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()


class Parametrised(Base):
    """Weights are computed before each call: of two convolutions and of a BatchNorm."""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.conv1)
        parametrizations.spectral_norm(self.conv2)
        parametrize.register_parametrization(self.bn1, "weight", Exponential())


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x + 1)


class ChangesItsInput(Base):
    """The layer normalises something else than what it is called with."""

    def __init__(self):
        super().__init__()
        self.bn1 = ScaledNorm(6)


class InPlaceNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.mul_(2))


class ChangesItsInputInPlace(Base):
    def __init__(self):
        super().__init__()
        self.bn2 = InPlaceNorm(6)


class LowPrecision(Base):
    """A part in bfloat16: to fuse it would round in other places."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


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


class InAList(Base):
    """A BatchNorm in a plain list alone is no layer of the network."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.BatchNorm2d(6).eval().requires_grad_(False)]
        self.layers = [(self.conv1, self.bn1), (self.conv2, self.bn2)]

    def forward(self, x):
        for conv, bn in self.layers:
            x = F.relu(bn(conv(x)))
        return self.linear(self.hidden[0](x).mean((2, 3)))


class Scripted(Base):
    """TorchScript's copy of a BatchNorm is none for PyTorch."""

    def __init__(self):
        super().__init__()
        self.bn1 = torch.jit.script(nn.BatchNorm2d(6).eval())


class AnyArguments(Base):
    def forward(self, *args, scale=2.0, **kwargs):
        return super().forward(args[0] * scale)


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


class FrozenNorm(nn.Module):
    """A BatchNorm as detectors freeze it: buffers and a formula of its own."""

    def __init__(self, n_channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))

    def forward(self, x):
        scale = (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)


class HalfFrozen(Base):
    def __init__(self):
        super().__init__()
        self.bn1 = FrozenNorm(6)


class StopsGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            brightness = x.mean((2, 3), keepdim=True)
        return super().forward(x - brightness)


class FaintHead(Base):
    """It stops a part of a gradient that is a million times smaller than that of its moments."""

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        with torch.no_grad():
            stopped = x.square()
        return 1e-6 * self.linear((x + stopped).mean((2, 3)))


class LoudHead(Base):
    """It stops a part of the gradient of moments; that of its output is a million times larger."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        with torch.no_grad():
            stopped = x.square()
        self.bn2(self.conv2(x + stopped))
        return 1e6 * self.linear(x.mean((2, 3)))


class WithoutAutocast(Base):
    """A part that stays in fp32 where the rest runs in half precision."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.bn1(self.conv1(x.float()))
        return self.linear(F.relu(self.bn2(self.conv2(F.relu(x)))).mean((2, 3)))


class SetsCudnn(Base):
    """A part whose convolutions are to be repeatable on a GPU."""

    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            x = self.bn1(self.conv1(x))
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


class Halved(torch.Tensor):
    """A tensor whose ReLU is half as large."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        return y * 0.5 if function is F.relu else y


class TensorSubclass(Base):
    def forward(self, x):
        return super().forward(x.as_subclass(Halved)).as_subclass(torch.Tensor)


class WithAndWithoutGradient(Base):
    """One layer, called twice on the same input."""

    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            gate = torch.sigmoid(self.bn1(x))
        return self.linear(F.relu(self.bn1(x) * gate).mean((2, 3)))


class AssignsChannels(Base):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y[:, :2] = 0
        y[:, 2:4].mul_(2)
        return self.linear(F.relu(y).mean((2, 3)))


class ChangesItsResidual(Base):
    """Between the addition and the ReLU after it."""

    def forward(self, x):
        x = self.conv1(x)
        y = self.bn1(x)
        residual = x * 1
        total = y + residual
        residual.mul_(3)
        return self.linear((F.relu(total) + residual).mean((2, 3)))


class RareBranch(Base):
    """Random numbers decide, but hardly ever otherwise than when the network is traced."""

    def forward(self, x):
        if torch.rand(()) < 0.01:
            x = -x
        return super().forward(x)


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


class CountsInADictionary(Base):
    def __init__(self):
        super().__init__()
        self.counts = {"calls": 0}

    def forward(self, x):
        self.counts["calls"] += 1
        if self.counts["calls"] > 2:
            x = -x
        return super().forward(x)


class CountsInAList(Base):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(None)
        if len(self.calls) > 2:
            x = -x
        return super().forward(x)


class CountsInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
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
    """Makes a tensor in the first call, and a list in each."""

    def __init__(self):
        super().__init__()
        self.grid = None
        self.means = []

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 8) * x.new_ones(1)
        self.means = [x.mean()]
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


class Sequence(nn.Module):
    """One BatchNorm1d for (N, C, L) and for (N, C)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3)
        self.bn = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x.flatten(2))))
        return self.linear(F.relu(self.bn(x.mean(2)) + x[:, :, 0]))


class Layouts(Base):
    """Inputs that are expanded along channels and images, transposed, and sliced channels_last."""

    def forward(self, x):
        x = self.conv1(x)
        x = x + F.relu(self.bn1(x[:, :1].expand(-1, 6, -1, -1)))
        x = x + F.relu(self.bn1(x[:1].expand(4, -1, -1, -1)))
        x = x + F.relu(self.bn1(x.transpose(2, 3)))
        x = x.to(memory_format=torch.channels_last)[:, :, ::2, 1:]
        x = F.relu(self.bn2(x) + x[:, :, :, :1])
        return self.linear(x.mean((2, 3)))


class OddBatchNorms(Base):
    """Without momentum, without weights, with the batch's statistics, and built at first use."""

    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(6, momentum=None)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.bn3 = nn.BatchNorm2d(6, track_running_stats=False)
        self.bn4 = nn.LazyBatchNorm2d()
        self.bn4(torch.zeros(2, 6, 1, 1))

    def forward(self, x):
        x = F.relu(self.bn3(self.bn1(self.conv1(x))))
        x = F.relu(self.bn4(self.bn2(self.conv2(x))))
        return self.linear(x.mean((2, 3)))


class ReturnsViews(Base):
    def forward(self, x):
        features = F.relu(self.bn1(self.conv1(x)))
        y = self.linear(F.relu(self.bn2(self.conv2(features))).mean((2, 3)))
        return {"logits": y, "images": x[:, :2], "features": features.transpose(0, 1)}


class TwoOutputs(Base):
    def forward(self, x):
        features = F.relu(self.bn1(self.conv1(x)))
        y = self.linear(F.relu(self.bn2(self.conv2(features))).mean((2, 3)))
        return {"logits": y, "features": features}


NETWORKS = [
    (AllDerived, "hooks"),
    (OneDerived, "partly fused"),
    (SetsCudnn, "fused"),
    (Synchronised, "fused"),
    (Hooked, "hooks"),
    (Patched, "hooks"),
    (HookedBackward, "hooks"),
    (HookedActivation, "partly fused"),
    (PrunedNorm, "hooks"),
    (Parametrised, "partly fused"),
    (ChangesItsInput, "partly fused"),
    (ChangesItsInputInPlace, "hooks"),
    (LowPrecision, "hooks"),
    (InADictionary, "hooks"),
    (InAList, "hooks"),
    (Scripted, "fused"),
    (AnyArguments, "partly fused"),
    (BoundMethod, "hooks"),
    (ByKeyword, "fused"),
    (Outside, "fused"),
    (StopsGradient, "partly fused"),
    (FaintHead, "partly fused"),
    (LoudHead, "partly fused"),
    (WithoutAutocast, "partly fused"),
    (StraightThrough, "partly fused"),
    (ListOrTensor, "partly fused"),
    (AssertsShape, "partly fused"),
    (Checkpointed, "partly fused"),
    (TensorSubclass, "partly fused"),
    (WithAndWithoutGradient, "partly fused"),
    (AssignsChannels, "partly fused"),
    (ChangesItsResidual, "partly fused"),
    (RareBranch, "partly fused"),
    (ConstantNoise, "partly fused"),
    (RandomDropout, "fused"),
    (CountsCalls, "partly fused"),
    (CountsWithoutUse, "partly fused"),
    (CountsInADictionary, "partly fused"),
    (CountsInAList, "partly fused"),
    (CountsInABuffer, "partly fused"),
    (DecaysABuffer, "partly fused"),
    (BuildsItsGrid, "fused"),
    (InPlace, "fused"),
    (MobileActivations, "fused"),
    (OtherHardtanh, "fused"),
    (DenseBlock, "fused"),
    (Shortcut, "fused"),
    (Perceptron, "fused"),
    (Sequence, "fused"),
    (Layouts, "fused"),
    (OddBatchNorms, "fused"),
    (ReturnsViews, "fused"),
    (TwoOutputs, "fused"),
]
