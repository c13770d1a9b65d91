"""A small network in one line of words: "Conv(1,32,3,p1) ReLU MaxPool2 Linear(6272,10)", as tables of figures write it.

    network   layers, apart by blanks, "+", "->", "," or ";"; a layer is NAME, NAMEn or NAME(arguments), "x3" repeats it
    arguments numbers by place (into, out, kernel, stride, padding ...), or named: p1, s2, g4, d2, padding=1, stride 2,
              3x3, same, nobias, bias=False, 2 layers, bidirectional, batch_first
    steps     "on last step" takes the last step of the recurrent layers, "mean of steps" their mean

Each layer is tried on shapes as it is read, so widths that do not fit are an error here, with the layer's name; a
Linear after pictures flattens them. Nothing is guessed: a word that is not known is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.core.errors import BadInput, UnknownName

_LAYER = re.compile(
    r"\s*([A-Za-z][A-Za-z_]*)(\d+(?:x\d+)?d?)?\s*(\(([^()]*(?:\([^()]*\)[^()]*)*)\))?(?:\s*[x×]\s*(\d+)\b)?"
)
_BETWEEN = re.compile(r"\s*(?:\+|->|→|,|;|\|)?\s*")
_STEPS = (
    (
        re.compile(r"\b(?:on|of|at|from)?\s*(?:the\s+)?last\s+(?:time\s*)?(?:step|state|output|hidden)s?\b", re.I),
        "last",
    ),
    (re.compile(r"\bmean\s+(?:of|over)\s+(?:the\s+)?(?:time\s*)?steps\b", re.I), "mean"),
    (re.compile(r"\b(?:on|at)\s+(?:every|each|all)\s+(?:time\s*)?steps?\b", re.I), "all"),
)
_SHORT = {"p": "padding", "s": "stride", "g": "groups", "d": "dilation", "k": "kernel"}
_ALIASES = {"pad": "padding", "kernel_size": "kernel", "num_layers": "layers", "layer": "layers", "group": "groups",
            "in_features": "into", "in_channels": "into", "input_size": "into", "out_features": "out", "out_channels":
            "out", "hidden_size": "out", "bi": "bidirectional", "proj_size": "proj", "nhead": "heads", "head": "heads",
            "num_heads": "heads", "dim_feedforward": "ffn", "ff": "ffn", "output_padding": "extra"}  # fmt: skip
_WORDLESS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "silu": nn.SiLU, "swish": nn.SiLU, "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh, "softmax": lambda: nn.Softmax(-1), "logsoftmax": lambda: nn.LogSoftmax(-1), "elu": nn.ELU,
    "leakyrelu": nn.LeakyReLU, "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "softplus": nn.Softplus,
    "mish": nn.Mish, "selu": nn.SELU, "prelu": nn.PReLU, "identity": nn.Identity, "flatten": nn.Flatten,
    "dropout": nn.Dropout, "gap": lambda: nn.AdaptiveAvgPool2d(1), "globalavgpool": lambda: nn.AdaptiveAvgPool2d(1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The arguments of one layer."""

    layer: str
    places: tuple[Any, ...]
    named: dict[str, Any]

    def get(self, name: str, place: int, default: Any = None) -> Any:
        """By name, else by place, else the default; an error where there is none."""
        value = self.named.get(name, self.places[place] if 0 <= place < len(self.places) else default)
        if value is None:
            raise BadInput(f"{self.layer}: {name} is missing")
        return value


def build(text: str, shape: tuple[int, ...] = ()) -> tuple[nn.Module, dict[str, Tensor]]:
    """(module, {"x": input}) on the meta device. `shape` () is one row for a network that begins with a Linear."""
    layers, step = _parsed(text)
    if not shape:
        first = layers[0]
        if _plain(first.layer) not in ("linear", "dense", "fc"):
            raise BadInput(f"'{text}' begins with {first.layer}: give the shape of its input")
        shape = (1, first.get("into", 0))
    with torch.device("meta"):
        number = torch.long if _plain(layers[0].layer) in ("embedding", "embed") else torch.float32
        first_x = x = torch.empty(shape, dtype=number)
        made: list[nn.Module] = []
        last = max((i for i, w in enumerate(layers) if _plain(w.layer) in _RECURRENT), default=-1)
        for number_, words in enumerate(layers):
            for module in _made(words, x):
                made.append(module)
                x = _tried(module, x, words.layer)
            if number_ == last and step != "all":
                made.append(_Step(step))
                x = made[-1](x)
    return _Line(*made).eval(), {"x": first_x}


class _Line(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class _Step(nn.Module):
    """The last of the steps, or their mean: B T C -> B C."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1] if self.which == "last" else x.mean(1)


class _First(nn.Module):
    """The output of a module that also gives states or weights; attention attends to its own input."""

    def __init__(self, module: nn.Module, *, times: int = 1) -> None:
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(*[x] * self.times)[0]
        return result


def _tried(module: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        with torch.no_grad():
            result: Tensor = module.eval()(x)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise BadInput(f"{name} does not take an input of {'x'.join(map(str, x.shape))}: {error}") from error
    return result


def _parsed(text: str) -> tuple[list[_Words], str]:
    step, rest = "all", text
    for pattern, which in _STEPS:
        rest, found = pattern.subn(" ", rest)
        step = which if found else step
    layers, place = [], _end(_BETWEEN, rest, 0)
    while place < len(rest):
        match = _LAYER.match(rest, place)
        if match is None or match.end() == place:
            raise BadInput(f"'{rest[place:].strip()}' in '{text}' is no layer; write NAME(arguments)")
        name, suffix, _, inside, repeats = match.groups()
        layers += [_words(name, suffix or "", inside)] * int(repeats or 1)
        place = _end(_BETWEEN, rest, match.end())
    if not layers:
        raise BadInput(f"'{text}' names no layer; write for example Linear(784,100) ReLU Linear(100,10)")
    return layers, step


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _words(name: str, suffix: str, inside: str | None) -> _Words:
    named: dict[str, Any] = {}
    places: list[Any] = []
    if suffix.endswith("d"):
        named["dims"] = int(suffix[:-1])
    elif suffix and f"{name}{suffix}".lower() in _WORDLESS:
        name += suffix
    elif suffix:
        named["kernel"] = _number(suffix, name)
    for word in re.split(r",(?![^()]*\))", inside or ""):
        word = word.strip()
        key, value = _argument(word, name)
        if not word:
            continue
        if key:
            named[_ALIASES.get(key, key)] = value
        else:
            places.append(value)
    return _Words(layer=name, places=tuple(places), named=named)


def _argument(word: str, layer: str) -> tuple[str, Any]:
    """("", number) or (name, value)."""
    if re.fullmatch(r"-?[\d.]+(?:x\d+)*|\([\d, ]+\)", word):
        return "", _number(word, layer)
    if match := re.fullmatch(r"([psgdk])(\d+)", word):
        return _SHORT[match[1]], int(match[2])
    if match := re.fullmatch(r"(\w+)\s*[= ]\s*(\([\d, ]+\)|[\w.]+)", word):
        left, right = match[1].lower(), match[2]
        if left.isdigit():  # "2 layers"
            return _ALIASES.get(right.lower(), right.lower()), int(left)
        if left == "no":
            return right.lower(), False
        if right.lower() in ("true", "false"):
            return left, right.lower() == "true"
        return left, _number(right, layer) if re.match(r"[\d(]", right) else right.lower()
    return ("bias", False) if word.lower() == "nobias" else (word.lower(), True)


def _number(word: str, layer: str) -> int | float | tuple[int, ...]:
    parts = [p for p in re.split(r"[x, ]+", word.strip("()")) if p]
    try:
        numbers = [float(p) if "." in p else int(p) for p in parts]
    except ValueError:
        raise BadInput(f"{layer}: '{word}' is no number") from None
    if len(numbers) == 1:
        return numbers[0]
    return tuple(int(n) for n in numbers)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").removeprefix("nn.")


def _made(words: _Words, x: Tensor) -> list[nn.Module]:
    """The modules of one layer, for an input like `x`."""
    name = _plain(words.layer)
    if name in _WORDLESS:
        return [_WORDLESS[name]()]
    if name not in _MAKERS:
        raise UnknownName.of("layer", words.layer, [*_WORDLESS, *_MAKERS])
    try:
        return _MAKERS[name](words, x)
    except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{words.layer}: {error}") from error


def _linear(w: _Words, x: Tensor) -> list[nn.Module]:
    into = w.get("into", 0)
    flat: list[nn.Module] = [nn.Flatten()] if x.dim() > 3 or (x.dim() == 3 and x.shape[-1] != into) else []
    return [*flat, nn.Linear(into, w.get("out", 1), bias=w.get("bias", -1, True))]


def _conv(w: _Words, x: Tensor) -> list[nn.Module]:
    dims = w.get("dims", -1, x.dim() - 2)
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    into, padding = w.get("into", 0), w.get("padding", 4, "same" if w.named.get("same") else 0)
    groups = into if w.named.get("depthwise") or w.named.get("dw") else w.get("groups", 5, 1)
    return [kind(into, w.get("out", 1), w.get("kernel", 2), w.get("stride", 3, 1), padding,
                 w.get("dilation", -1, 1), groups, w.get("bias", -1, True))]  # fmt: skip


def _depthwise(w: _Words, x: Tensor) -> list[nn.Module]:
    """DWConv(channels, kernel, ...)."""
    into = w.get("into", 0)
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d}[x.dim() - 2]
    return [kind(into, into, w.get("kernel", 1), w.get("stride", 2, 1), w.get("padding", 3, 0), groups=into,
                 bias=w.get("bias", -1, True))]  # fmt: skip


def _transposed(w: _Words, x: Tensor) -> list[nn.Module]:
    dims = w.get("dims", -1, x.dim() - 2)
    kind: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    return [kind(w.get("into", 0), w.get("out", 1), w.get("kernel", 2), w.get("stride", 3, 1), w.get("padding", 4, 0),
                 w.get("extra", -1, 0), w.get("groups", 5, 1), w.get("bias", -1, True))]  # fmt: skip


def _pool(kind: str) -> Callable[[_Words, Tensor], list[nn.Module]]:
    def make(w: _Words, x: Tensor) -> list[nn.Module]:
        size = w.get("kernel", 0)
        pool: Any = getattr(nn, f"{kind}Pool{w.get('dims', -1, x.dim() - 2)}d")
        return [pool(size, w.get("stride", 1, size), w.get("padding", 2, 0))]

    return make


def _adaptive(w: _Words, x: Tensor) -> list[nn.Module]:
    kind: Any = getattr(nn, f"AdaptiveAvgPool{x.dim() - 2}d")
    return [kind(w.get("kernel", 0, 1))]


def _batch_norm(w: _Words, x: Tensor) -> list[nn.Module]:
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    return [kind(w.get("into", 0, x.shape[1]))]


def _recurrent(kind: type[nn.RNNBase]) -> Callable[[_Words, Tensor], list[nn.Module]]:
    def make(w: _Words, x: Tensor) -> list[nn.Module]:
        more = {"proj_size": w.named["proj"]} if "proj" in w.named else {}
        made: Any = kind
        return [_First(made(w.get("into", 0), w.get("out", 1), w.get("layers", 2, 1), bias=w.get("bias", -1, True),
                            batch_first=True, bidirectional=w.get("bidirectional", -1, False), **more))]  # fmt: skip

    return make


def _attention(w: _Words, x: Tensor) -> list[nn.Module]:
    return [_First(nn.MultiheadAttention(w.get("into", 0), w.get("heads", 1), bias=w.get("bias", -1, True),
                                         batch_first=True), times=3)]  # fmt: skip


def _encoder(w: _Words, x: Tensor) -> list[nn.Module]:
    width = w.get("into", 0)
    return [
        nn.TransformerEncoderLayer(width, w.get("heads", 1), w.get("ffn", 2, 2048), batch_first=True)
        for _ in range(w.get("layers", 3, 1))
    ]


_RECURRENT = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
_MAKERS: dict[str, Callable[[_Words, Tensor], list[nn.Module]]] = {
    **dict.fromkeys(("linear", "dense", "fc"), _linear),
    **dict.fromkeys(("conv", "convolution"), _conv),
    **dict.fromkeys(("dwconv", "depthwiseconv"), _depthwise),
    **dict.fromkeys(("convtranspose", "deconv", "convt"), _transposed),
    "maxpool": _pool("Max"),
    **dict.fromkeys(("avgpool", "meanpool"), _pool("Avg")),
    "adaptiveavgpool": _adaptive,
    **dict.fromkeys(("batchnorm", "bn"), _batch_norm),
    **dict.fromkeys(("layernorm", "ln"), lambda w, x: [nn.LayerNorm(w.get("into", 0, x.shape[-1]))]),
    "rmsnorm": lambda w, x: [nn.RMSNorm(w.get("into", 0, x.shape[-1]))],
    **dict.fromkeys(("groupnorm", "gn"), lambda w, x: [nn.GroupNorm(w.get("groups", 0), w.get("out", 1, x.shape[1]))]),
    **dict.fromkeys(("embedding", "embed"), lambda w, x: [nn.Embedding(w.get("into", 0), w.get("out", 1))]),
    **{name: _recurrent(kind) for name, kind in _RECURRENT.items()},
    **dict.fromkeys(("multiheadattention", "mha", "selfattention"), _attention),
    **dict.fromkeys(("transformerencoderlayer", "encoderlayer", "transformerencoder"), _encoder),
}
