"""The CIFAR-10 ResNet-20 of resnet20.py: network, published weights, images, and layer-wise fits in order."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Metric
from perjoule.compress.forms.base import DAMPING
from perjoule.compress.sites import find
from perjoule.compress.stream import gradients

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.stride, self.pad = stride, (width - width_in) // 2

    def shortcut(self, x):
        """Option A: every second pixel, zeros for the new channels."""
        return x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet20(nn.Module):
    """With every batch norm folded into its convolution, which gives it a bias."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.ModuleList(Block(*w) for w in widths)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        for block in self.blocks:
            x = block(x)
        return self.linear(x.mean((2, 3)))


def folded(path):
    """The published weights, batch norms folded."""
    state, model = load_file(path), ResNet20()
    names = {"conv1": ("conv1", "bn1"), "linear": ("linear", None)}
    for i in range(9):
        for n in "12":
            names[f"blocks.{i}.conv{n}"] = (f"layer{i // 3 + 1}.{i % 3}.conv{n}", f"layer{i // 3 + 1}.{i % 3}.bn{n}")
    with torch.no_grad():
        for ours, (conv, norm) in names.items():
            module = model.get_submodule(ours)
            if norm is None:
                module.weight.copy_(state[f"{conv}.weight"])
                module.bias.copy_(state[f"{conv}.bias"])
                continue
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
            module.weight.copy_(state[f"{conv}.weight"] * scale[:, None, None, None])
            module.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
    return model.eval()


def normal(x):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(x).float() / 255 - mean) / std


def pixels(x):
    """What `normal` was made from."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (255 * (x * std + mean)).numpy()


@dataclass(frozen=True, kw_only=True)
class Images:
    fit: torch.Tensor
    held: torch.Tensor
    """Choices are made on these: 1269 originals and 1000 recompressed ones, which the network finds harder."""
    x_test: torch.Tensor
    y_test: torch.Tensor
    originals: tuple[int, int]
    """How many of `fit` and of `held` are no recompressed images; they come first."""

    @classmethod
    def read(cls, folder):
        """Every third original image is held back, and no recompressed copy of one is fitted on."""
        part, jpeg = np.load(folder / "cifar10-part.npz"), np.load(folder / "cifar10-jpeg-10k.npz")["x_train"]
        third = np.arange(len(part["x_train"])) % 3 == 0
        held, rest = part["x_train"][third], part["x_train"][~third]
        of_held, of_rest = (copies(jpeg, x) for x in (held, rest))
        later = np.flatnonzero(~of_held & ~of_rest)[:1000]
        fitted = ~of_held
        fitted[later] = False
        return cls(
            fit=normal(np.concatenate([rest, jpeg[fitted]])),
            held=normal(np.concatenate([held, jpeg[later]])),
            x_test=normal(part["x_test"]),
            y_test=torch.from_numpy(part["y_test"]).long(),
            originals=(len(rest), len(held)),
        )

    def unseen(self, calibrated, searched):
        """Originals of both parts of which neither calibration nor search has seen a copy, itself included."""
        some = torch.cat([part[:count] for part, count in zip((self.fit, self.held), self.originals, strict=True)])
        return some[torch.from_numpy(~copies(*(pixels(x) for x in (some, torch.cat([calibrated, searched])))))]


def copies(jpeg, x):
    """Which images are recompressed copies: closer than 18 of 255 (root mean square); others are 25 and more away."""
    far = torch.cdist(*(torch.from_numpy(v).float().flatten(1) for v in (jpeg, x)))
    return (far.amin(1) / 3072**0.5 < 18).numpy()


def logits(model, x):
    with torch.inference_mode():
        return torch.cat([model(b) for b in x.split(128)])


def divergences(found, wanted):
    """KL from the original's answer to every image, in nats."""
    return F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)


def divergence(found, wanted):
    return float(divergences(found, wanted).mean())


def agreement(found, wanted):
    return float((found.argmax(1) == wanted.argmax(1)).double().mean())


# ---- fits without training


class Moments:
    """Of what a layer reads now, x, and what it should answer, y: E[x xᵀ], E[y xᵀ], both about their means."""

    def __init__(self):
        self.xx, self.yx, self.x, self.y, self.rows = 0, 0, 0, 0, 0

    def add(self, module, x, y):
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, 3, padding=1, stride=module.stride).transpose(1, 2).flatten(0, 1)
            y = y.flatten(2).transpose(1, 2).flatten(0, 1)
            some = torch.linspace(0, len(x) - 1, min(len(x), 8192)).long()
            x, y = x[some], y[some]
        self.xx, self.yx = self.xx + x.T @ x, self.yx + y.T @ x
        self.x, self.y, self.rows = self.x + x.sum(0), self.y + y.sum(0), self.rows + len(x)

    def centred(self):
        """H, C, mean of x, mean of y."""
        x, y = self.x / self.rows, self.y / self.rows
        return self.xx / self.rows - torch.outer(x, x), self.yx / self.rows - torch.outer(y, x), x, y


@torch.no_grad()
def walk(model, original, x_N, treat):
    """Hand every layer, in order, to `treat(name, module, moments)`, which may change it.

    What it should answer is what makes the block's sum right again, although its inputs have changed.
    """
    x, x0 = [list(x_N.split(64)) for _ in "12"]

    def step(name, module, inputs, wanted):
        moments = Moments()
        for a, y in zip(inputs, wanted, strict=True):
            moments.add(module, a, y)
        treat(name, module, moments)

    wanted = [original.conv1(a) for a in x0]
    step("conv1", model.conv1, x, wanted)
    x, x0 = [F.relu(model.conv1(a)) for a in x], [F.relu(y) for y in wanted]
    for i, (block, first) in enumerate(zip(model.blocks, original.blocks, strict=True)):
        wanted = [first.conv1(a) for a in x0]
        step(f"blocks.{i}.conv1", block.conv1, x, wanted)
        h, h0 = [F.relu(block.conv1(a)) for a in x], [F.relu(y) for y in wanted]
        sums = [first.conv2(b) + first.shortcut(a) for a, b in zip(x0, h0, strict=True)]
        step(f"blocks.{i}.conv2", block.conv2, h, [s - block.shortcut(a) for s, a in zip(sums, x, strict=True)])
        x = [F.relu(block.conv2(b) + block.shortcut(a)) for a, b in zip(x, h, strict=True)]
        x0 = [F.relu(s) for s in sums]
    step("linear", model.linear, [a.mean((2, 3)) for a in x], [original.linear(a.mean((2, 3))) for a in x0])


class Predictions(nn.Module):
    """Outputs whose squared derivatives, v . output with v ~ N(0, 1), are the Fisher information of the predictions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        log_p = self.model(x).log_softmax(-1)
        return log_p.detach().exp().sqrt() * log_p


def fisher(model, x_N):
    """E[g^2] of every channel of every layer, summed over positions."""
    watched = Predictions(copy.deepcopy(model).requires_grad_(False))
    found = gradients(watched, find(watched)[0], [{"x": x} for x in x_N.split(32)], seed=0).g_O
    return {name.removeprefix("model."): g_O for name, g_O in found.items()}


def metric_of(h_II, g_O):
    d_I = h_II.diagonal()
    return Metric(diagonal_OI=d_I.clamp_min(1e-8 * float(d_I.max()))[None], full_II=h_II, rows_O=g_O)


def fitted(original, x_N, g_O, form_of, *, fit="second_order", share=0.5):
    """(model, packed by parameter): every layer in the form `form_of(name)`; None leaves it as it is."""
    model, packed = copy.deepcopy(original), {}

    def treat(name, module, moments):
        form = form_of(name)
        if form is None:
            return
        h_II, c_OI, x_I, y_O = moments.centred()
        w_OI = module.weight.flatten(1)
        damp = DAMPING * h_II.diagonal().mean() * torch.eye(len(h_II))
        target_OI = w_OI + share * torch.linalg.solve(h_II + damp, (c_OI - w_OI @ h_II).T).T
        one = FITS[fit](form, target_OI, metric_of(h_II, g_O[name]))
        module.weight.copy_(one.dense().reshape(module.weight.shape))
        module.bias.copy_(y_O - one.dense() @ x_I)
        packed[f"{name}.weight"] = one

    walk(model, original, x_N, treat)
    return model, packed
