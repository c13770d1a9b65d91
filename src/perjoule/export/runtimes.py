"""Runtimes: what opens an exported file and answers requests with it.

Each is one class with `open`; libraries are imported where they are named. Precision is always stated: OpenVINO
computes in bf16 by default on CPUs that have it, so it is told float32.
"""

from __future__ import annotations

import abc
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from perjoule.core.errors import ExportError, MissingExtra, UnknownName

Feed = Mapping[str, Any]
"""numpy arrays by input name."""


class Session(abc.ABC):
    """An opened file."""

    @abc.abstractmethod
    def run(self, feed: Feed) -> Any:
        """The output array for one request."""


class Runtime(abc.ABC):
    """A library that runs ONNX files."""

    name: ClassVar[str]
    library: ClassVar[str]
    extra: ClassVar[str]

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.library) is not None

    @classmethod
    @abc.abstractmethod
    def version(cls) -> str: ...

    @classmethod
    @abc.abstractmethod
    def open(cls, model: Path | bytes, threads: int) -> Session:
        """Open a file, or the bytes of one. Raises ExportError if the runtime refuses it."""


class OnnxRuntime(Runtime):
    """ONNX Runtime, CPU."""

    name = "onnxruntime"
    library = "onnxruntime"
    extra = "models"

    @classmethod
    def version(cls) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    @classmethod
    def open(cls, model: Path | bytes, threads: int) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Threads that spin on behind an answer burn joules, and the time of whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        source = model if isinstance(model, bytes) else str(model)
        try:
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime refuses the file: {_line(error)}") from error
        return _OrtSession(session)


class _OrtSession(Session):
    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {i.name for i in session.get_inputs()}

    def run(self, feed: Feed) -> Any:
        return self._session.run(None, {k: v for k, v in feed.items() if k in self._inputs})[0]


def _openvino() -> Any:
    """The library, kept from sending usage data: importing it does, unless its telemetry module cannot be found."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class OpenVino(Runtime):
    """OpenVINO, CPU, float32 where the file does not say integer."""

    name = "openvino"
    library = "openvino"
    extra = "openvino"

    @classmethod
    def version(cls) -> str:
        openvino = _openvino()
        return f"openvino {openvino.__version__.split('-')[0]}"

    @classmethod
    def open(cls, model: Path | bytes, threads: int) -> Session:
        openvino = _openvino()
        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            read = core.read_model(model) if isinstance(model, bytes) else core.read_model(str(model))
            compiled = core.compile_model(read, "CPU", settings)
        except Exception as error:
            raise ExportError(f"openvino refuses the file: {_line(error)}") from error
        return _OvSession(compiled)


class _OvSession(Session):
    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = {name for i in compiled.inputs for name in i.get_names()}

    def run(self, feed: Feed) -> Any:
        return self._request.infer({k: v for k, v in feed.items() if k in self._inputs})[0]


RUNTIMES: dict[str, type[Runtime]] = {r.name: r for r in (OnnxRuntime, OpenVino)}


def runtime(name: str) -> type[Runtime]:
    """The runtime called `name`; raises UnknownName or MissingExtra."""
    if name not in RUNTIMES:
        raise UnknownName.of("runtime", name, RUNTIMES)
    found = RUNTIMES[name]
    if not found.installed():
        raise MissingExtra.of(found.library, found.extra)
    return found


def as_feed(batch: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """A batch of torch tensors as numpy arrays."""
    return {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in batch.items()}


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
