"""Workload: a model, the inputs it sees, and how good its answers are.

`core` never imports torch, so the model and its tensors are `Any` here; the stages that need torch say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perjoule.core.errors import PerjouleError, WorkloadError

Phase = Literal["train", "forward", "prefill", "decode"]
Batch = Mapping[str, Any]
"""Arguments of the model's forward by name, each a torch.Tensor whose axis 0 counts examples."""
Score = Callable[[Any], Any]
"""From the outputs over all of `evaluation` (array, axis 0 = examples) to one score per example; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What perjoule works on.

    Only `model` and `calibration` are required. Without `score`, quality is label-free fidelity to the
    original's own answers, so a model and sample inputs are enough.
    """

    model: Any
    """A trained torch.nn.Module."""
    calibration: Sequence[Any]
    """Batches the methods may look at: a tensor, a tuple of tensors, or a mapping from argument name to tensor."""
    evaluation: Sequence[Any] = ()
    """Batches that judge the result; kept apart from `calibration`. Empty: the second half of `calibration`."""
    score: Score | None = None
    score_name: str = ""
    requests: Mapping[str, Any] = field(default_factory=dict)
    """Kinds of request to time, by label; the first is the one a latency budget speaks of.

    Empty: one example, and 32, cut from the evaluation data.
    """
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axes that may change between requests, by argument; default: axis 0 of every argument."""
    phase: Phase = "forward"
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(getattr(self.model, "forward", None)):
            raise WorkloadError(f"workload model is {type(self.model).__name__}; give a torch.nn.Module")
        object.__setattr__(self, "model", _bare(self.model))
        arguments = _arguments(self.model)
        calibration = [_named(b, arguments, "calibration") for b in _batches(self.calibration, "calibration")]
        if not calibration:
            raise WorkloadError("calibration data are empty; give at least one batch of real inputs")
        evaluation = [_named(b, arguments, "evaluation") for b in _batches(self.evaluation, "evaluation")]
        if not evaluation:
            if self.score is not None:
                raise WorkloadError("a score needs evaluation data; give `evaluation` batches")
            if len(calibration) < 2:
                raise WorkloadError("one calibration batch and no evaluation data; give at least two batches")
            half = (len(calibration) + 1) // 2
            calibration, evaluation = calibration[:half], calibration[half:]
        requests = {str(k): _named(b, arguments, f"request {k}") for k, b in self.requests.items()}
        axes = {name: tuple(self.dynamic.get(name, (0,))) for name in calibration[0]}
        set_ = object.__setattr__
        set_(self, "calibration", tuple(calibration))
        set_(self, "evaluation", tuple(evaluation))
        set_(self, "requests", requests)
        set_(self, "dynamic", axes)
        set_(self, "score_name", self.score_name or ("fidelity" if self.score is None else "score"))
        set_(self, "name", self.name or type(self.model).__name__)

    @property
    def example(self) -> Batch:
        """One batch, for tracing."""
        return dict(self.calibration[0])


_AROUND = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""What torch puts around a model, and where the model is in it."""


def _bare(model: Any) -> Any:
    """The model itself: compiled or spread out, it takes `*args`, and cannot be copied or traced."""
    while type(model).__name__ in _AROUND:
        model = getattr(model, _AROUND[type(model).__name__])
    return model


def _arguments(model: Any) -> list[str]:
    """Names that inputs may have. `*args` is no name: a model with it alone gets its inputs by name."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if any(kind.__name__ == "ScriptModule" for kind in type(model).__mro__):
        raise WorkloadError("the model is scripted, and cannot be changed; give the Python module it was made from")
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in kinds]


def _batches(given: Any, what: str) -> list[Any]:
    """The batches. A tensor or a mapping is one batch, and going through it would give single examples, or names."""
    if hasattr(given, "shape") or isinstance(given, Mapping):
        kind = "a mapping" if isinstance(given, Mapping) else f"one tensor of shape {tuple(given.shape)}"
        raise WorkloadError(f"{what} is {kind}; give a list of batches, such as x.split(32)")
    try:
        return list(given)
    except TypeError as error:
        raise WorkloadError(f"{what} is {type(given).__name__}; give a list of batches, such as x.split(32)") from error


def _named(batch: Any, arguments: Sequence[str], what: str) -> Batch:
    """`batch` as a mapping from forward's argument names to tensors."""
    if isinstance(batch, Mapping):
        named = {str(k): v for k, v in batch.items()}
    else:
        given = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if len(given) > len(arguments):
            allowed = f"takes {len(arguments)} ({', '.join(arguments)})"
            if not arguments:
                allowed = "names none; give mappings from name to tensor"
            raise WorkloadError(f"{what}: {len(given)} input{'s' * (len(given) > 1)}, but forward {allowed}")
        named = dict(zip(arguments, given, strict=False))
    lengths: dict[str, int] = {}
    for name, value in named.items():
        if not hasattr(value, "shape") or not hasattr(value, "detach"):  # numpy's arrays have a shape too
            raise WorkloadError(f"{what}: '{name}' is {type(value).__name__}; give torch tensors")
        if len(value.shape) == 0 or value.shape[0] == 0:
            raise WorkloadError(f"{what}: '{name}' holds no examples (shape {tuple(value.shape)})")
        lengths[name] = int(value.shape[0])
    if not named:
        raise WorkloadError(f"{what}: a batch without tensors")
    if len(set(lengths.values())) > 1:
        raise WorkloadError(f"{what}: axis 0 must count examples in every input, found {lengths}")
    return named


def load(reference: str) -> Workload:
    """The workload behind "path.py", "path.py:function" or "package.module:function".

    Without a function name the file's only function annotated `-> Workload` is taken, or one called `workload`.
    Raises WorkloadError with one clear line for everything that can be wrong with it.
    """
    place, colon, function = reference.rpartition(":") if ":" in reference else (reference, "", "")
    module = _module(place, reference)
    if not colon:
        function = _only_function(module, reference)
    factory = getattr(module, function, None)
    if factory is None:
        raise WorkloadError(f"{reference}: no function '{function}' in it; it has {_public(module)}")
    if not callable(factory):
        raise WorkloadError(f"{reference}: '{function}' is {type(factory).__name__}, not a function")
    try:
        workload = factory()
    except (PerjouleError, ImportError):
        raise
    except Exception as error:  # the user's code raises what it likes
        raise WorkloadError(f"{reference}: '{function}' raised {_told(error)}") from error
    if not isinstance(workload, Workload):
        raise WorkloadError(f"{reference}: '{function}' returned {type(workload).__name__}; return a perjoule.Workload")
    return workload


def _module(place: str, reference: str) -> Any:
    if place.endswith(".py") or "/" in place:
        path = Path(place).expanduser()
        if not path.is_file():
            raise WorkloadError(f"{reference}: no file {path}; give path.py[:function] or module:function")
        name = f"perjoule_workload_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise WorkloadError(f"{reference}: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except PerjouleError:
            raise
        except Exception as error:  # the user's code raises what it likes
            raise WorkloadError(f"{reference}: cannot import it: {_told(error)}") from error
        return module
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise WorkloadError(f"{reference}: cannot import module '{place}': {error}") from error


def _told(error: Exception) -> str:
    """The error in one line; those of imports and syntax speak for themselves."""
    line = " ".join(str(error).split())
    return line if isinstance(error, ImportError | SyntaxError) else f"{type(error).__name__}: {line}"


def _public(module: Any) -> str:
    names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    return ", ".join(n for n in names if not n.startswith("_")) or "no functions"


def _only_function(module: Any, reference: str) -> str:
    found = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and str(value.__annotations__.get("return", "")).split(".")[-1].rstrip("'>") == "Workload"
    ]
    if callable(getattr(module, "workload", None)):
        return "workload"
    if len(found) != 1:
        raise WorkloadError(f"{reference}: name the function, as in {reference}:function; it has {_public(module)}")
    return str(found[0])
