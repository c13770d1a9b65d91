"""ResNet-20 on CIFAR-10 with half the FLOPs: channels cut without naming a layer, then label-free distillation.

    .venv/bin/python benchmarks/resnet20_channels.py --data FOLDER [--json FILE] [--share 0.5]

Groups come from the traced graph; block inner widths and the first stage's residual stream can be cut, channels that
option-A padding makes cannot. Every group's damage is measured at five widths on 192 calibration images, the group cut
alone and refitted; the widths come from one allocation against FLOPs. The cut network then learns the original's
answers and the outputs of all modules that kept their shape, from images alone: CIFAR-10 training images and
JPEG-compressed ones, flipped and shifted; no label is read. FLOPs are counted by `perjoule.count` on both networks.

A uniform cut stands beside the allocated ones on 400 training images held back from everything else; it and the cut
that narrows the stream learn from the answers alone, since no module of theirs keeps its shape. The weight of what is
matched inside and the treatment of batch norms were settled on the held-back images too, after a first setting (weight
1, norms frozen, 4000 steps) had been judged on the test images at -1.97 points: they were looked at twice.
Training computes in bfloat16 with float32 weights.
"""

import argparse
import copy
import json
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from perjoule.compress import groups as grouping
from perjoule.compress import sites as siting
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.stream import gradients, inputs
from perjoule.compress.structure.saved import load_into, save
from perjoule.core.record import Recipe, Step
from perjoule.count.counter import count_module
from perjoule.search.widths import Price, measured, widths_for
from perjoule.train.loop import seeded, train

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine, one used"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD, CALIBRATION, BATCH = 400, 512, 64


class Block(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:  # option A: every second pixel, zeros for the new channels
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (first, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(first, width, 1 + (stage > 1)), Block(width, width, 1), Block(width, width, 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def normal(images):
    x = torch.from_numpy(images).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def load(folder):
    """The network, and images: test with labels, held back, calibration, and all that training may see."""
    model = ResNet20().eval()
    model.load_state_dict(load_file(folder / "resnet20.safetensors"))
    part, more = np.load(folder / "cifar10-part.npz"), np.load(folder / "cifar10-jpeg-10k.npz")
    order = torch.randperm(len(part["x_train"]), generator=torch.Generator().manual_seed(0))
    x = normal(part["x_train"])[order]
    test = normal(part["x_test"]), torch.from_numpy(part["y_test"]).long()
    free = torch.cat([x[HELD:], normal(more["x_train"])])
    return model, test, x[:HELD], x[HELD : HELD + CALIBRATION], free


@torch.no_grad()
def answers(model, x):
    return torch.cat([model(part) for part in x.split(256)])


def cut(model, known, found, stats, widths):
    applier = Applier(model, known, found, stats)
    steps = [
        Step(sites=(g.name,), form=Channels(keep=widths[g.name]).config(), saliency="second_order", fit="second_order")
        for g in found
        if widths[g.name] < g.channels
    ]
    return applier.apply(Recipe(steps=tuple(steps)))


def alike(student, teacher):
    """Names of the innermost modules with children whose outputs have kept their shape: what to match inside."""
    shapes = []
    for net in (student, teacher):
        seen = {}
        hooks = [m.register_forward_hook(lambda _m, _i, out, name=name, seen=seen: seen.update({name: out.shape}))
                 for name, m in net.named_modules() if name and any(True for _ in m.children())]  # fmt: skip
        with torch.no_grad():
            net(torch.zeros(1, 3, 32, 32))
        for hook in hooks:
            hook.remove()
        shapes.append(seen)
    same = [n for n in shapes[0] if shapes[0][n] == shapes[1][n]]
    return [n for n in same if not any(o.startswith(f"{n}.") for o in same)]


def distilled(student, teacher, x, *, steps, learning_rate, hidden=1.0, seed=0):
    """`student` taught on shifted and flipped images to answer like `teacher`, inside too."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    student = student.to(memory_format=torch.channels_last)
    names = alike(student, teacher)
    kept = [{}, {}]
    hooks = [net.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n, at=at: at.update({n: out}))
             for net, at in zip((student, teacher), kept, strict=True) for n in names]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    student.requires_grad_(True).train()  # the cut has changed what batch norms see: they learn it, slowly
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.02

    def loss(step):
        at = torch.randint(len(x), (BATCH,), generator=generator)
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        images = F.pad(x[at], (4, 4, 4, 4))[:, :, 4 + shift[0] : 36 + shift[0], 4 + shift[1] : 36 + shift[1]]
        flip = torch.rand(BATCH, generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(images).float()
            found = student(images).float()
        total = F.kl_div(F.log_softmax(found / 2, 1), F.log_softmax(wanted / 2, 1), log_target=True,
                         reduction="batchmean") * 4  # fmt: skip
        for name in names:
            a, b = kept[0][name].float(), kept[1][name].float()
            total = total + hidden / len(names) * (a - b).square().sum() / b.square().sum()
        return total

    with seeded(seed):
        train(student.parameters(), loss, steps=steps, learning_rate=learning_rate)
    for hook in hooks:
        hook.remove()
    return student.requires_grad_(False).to(memory_format=torch.contiguous_format).eval()


def nearness(model, teacher, x):
    """Mean divergence of the answers from the original's, and the share of equal ones. No labels."""
    a, b = answers(model, x), answers(teacher, x)
    kl = F.kl_div(F.log_softmax(a, 1), F.log_softmax(b, 1), log_target=True, reduction="batchmean")
    return float(kl), float((a.argmax(1) == b.argmax(1)).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with resnet20-cifar10")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the cut network; what is judged is then loaded from it")
    parser.add_argument("--share", type=float, default=0.5, help="of the FLOPs that may stay")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--trial", type=int, default=60, help="steps of the comparison on held-back images")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=float, default=100.0)
    parser.add_argument("--test", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    model, (x_test, y_test), held, calibration, free = load(given.data / "resnet20-cifar10")
    known, _ = siting.find(model)
    batches = [{"x": part} for part in calibration.split(64)]
    found, refused = grouping.find(grouping.trace(model, {"x": calibration[:4]}), model, known)
    for group in found:
        print(f"{group.name}: {group.channels} channels")
    for other in refused:
        print(f"{other.producer}: {other.reason}")
    sensed, stats = gradients(model, known, batches, seed=0), {}
    for gathered in inputs(model, known, batches, sensed):
        stats.update(gathered)
    ledger = count_module(model, {"x": calibration[:1]})
    applier = Applier(model, known, found, stats)
    damages = measured(applier, found, batches[:3])
    price, whole = Price(model, found, ledger), {g.name: g.channels for g in found}
    chains = [g for g in found if len(g.consumers) == 1]  # the residual streams stay as they are
    level = max(k for k in range(1, 65) if price.share(uniform(found, k)) <= given.share)
    plans = {
        "allocated": widths_for(found, damages, price, given.share),
        "allocated, streams whole": whole | widths_for(chains, damages, Price(model, chains, ledger), given.share),
        "uniform": uniform(found, level),
    }
    print(f"calibrated and measured after {time.perf_counter() - began:.0f} s, {time.process_time():.0f} CPU s")

    trials = {}
    for name, widths in plans.items():
        made = cut(model, known, found, stats, widths)
        bare = made.model
        share = count_module(bare, {"x": calibration[:1]}).flops / ledger.flops
        taught = distilled(bare, model, free, steps=given.trial, learning_rate=given.rate, hidden=given.hidden)
        trials[name] = (nearness(taught, model, held), made, share)
        print(f"{name}: {list(widths.values())} {share:.1%} of the FLOPs; held back, divergence and agreement: "
              f"refit {nearness(bare, model, held)}, {given.trial} steps {trials[name][0]}", flush=True)  # fmt: skip
    best = min(trials, key=lambda n: trials[n][0][0])
    _, made, share = trials[best]
    bare = made.model
    final = distilled(bare, model, free, steps=given.steps, learning_rate=given.rate, hidden=given.hidden)
    print(f"{best}, {given.steps} steps: held back {nearness(final, model, held)}, "
          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    if given.out:
        save(final, made.structure, given.out)
        final = load_into(ResNet20().eval(), given.out)
    if given.test:
        report(given, model, bare, final, plans[best], best, share, (x_test, y_test), ledger.flops, began)


def uniform(found, level):
    """Every group at the same 64ths of its channels."""
    return {g.name: max(1, g.channels * level // 64) for g in found}


def report(given, model, bare, final, widths, best, share, test, flops, began):
    x, y = test
    right = {name: (answers(net, x).argmax(1) == y).double() for name, net in
             [("original", model), ("cut", bare), ("distilled", final)]}  # fmt: skip
    change = 100 * (right["distilled"] - right["original"])
    half = 1.96 * float(change.std()) / len(y) ** 0.5
    agreement = float((answers(final, x).argmax(1) == answers(model, x).argmax(1)).double().mean())
    document = {
        "date": str(date.today()),
        "hardware": HARDWARE,
        "test_images": len(y),
        "flops": [flops, round(flops * share)],
        "flops_share": share,
        "widths": widths,
        "allocation": best,
        "steps": given.steps,
        "accuracy": {name: 100 * float(v.mean()) for name, v in right.items()},
        "change_points": [float(change.mean()), float(change.mean()) - half, float(change.mean()) + half],
        "agreement": agreement,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time(),
    }
    print(json.dumps(document, indent=1))
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
