"""Callbacks for the trainers people use: Hugging Face, Lightning, Keras 3. One line each; joules appear in their logs.

    Trainer(..., callbacks=[huggingface()])                 # transformers 5
    lightning.Trainer(..., callbacks=[for_lightning()])     # lightning 2, or pytorch_lightning 2
    model.fit(..., callbacks=[for_keras()])                 # keras 3

Each takes what Training takes, and has it as `.training`: `callback.training.reading` after the run. Logged are
energy_j with energy_low_j and energy_high_j, power_w, energy_j_per_step, all since training began.

    trainer        begins                ends                       epoch                step                logs
    Hugging Face   on_train_begin        on_train_end               on_epoch_end         on_step_end         on_log
    Lightning      on_fit_start          on_fit_end, on_exception   on_train_epoch_end   on_train_batch_end  log_metrics
    Keras          on_train_begin        on_train_end               on_epoch_end         on_train_batch_end  logs

Hugging Face and Keras do not tell callbacks of an exception: such a run ends with the process, or with the next one,
and is failed in the ledger. The library is imported where its callback is made, nowhere else.

Left out: Lightning's batches are counted as steps, which differ under gradient accumulation.
"""

from __future__ import annotations

import importlib
from typing import Any

from perjoule.core.errors import MissingExtra
from perjoule.measure.hooks import Training


def huggingface(**options: Any) -> Any:
    """A TrainerCallback of transformers; `options` are Training's."""
    return _made(_HuggingFace, _library("transformers").TrainerCallback, options)


def for_lightning(**options: Any) -> Any:
    """A Callback of lightning, or of pytorch_lightning; `options` are Training's."""
    try:
        library = importlib.import_module("lightning.pytorch")
    except ImportError:
        library = _library("pytorch_lightning", "lightning")
    return _made(_Lightning, library.Callback, options)


def for_keras(**options: Any) -> Any:
    """A Callback of keras 3; `options` are Training's."""
    return _made(_Keras, _library("keras").callbacks.Callback, options)


def _library(name: str, install: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"{install or name} is not installed; run: pip install {install or name}") from error


def _made(hooks: type, base: type, options: dict[str, Any]) -> Any:
    """Our hooks on the library's own class, so that its checks by type hold."""
    callback = type(hooks.__name__.removeprefix("_") + "Energy", (hooks, base), {})()
    callback.training = Training(**options)
    return callback


class _Hooks:
    training: Training


class _HuggingFace(_Hooks):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.epoch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The dictionary is the one that later callbacks print and send; the history keeps a copy made before."""
        if logs is None or not self.training.running:
            return
        figures = self.training.figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.end()


class _Lightning(_Hooks):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.training.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.training.step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.training.epoch()
        for logger in trainer.loggers if self.training.running else ():
            logger.log_metrics(self.training.figures(), step=trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.training.end(1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.training.end()


class _Keras(_Hooks):
    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.training.begin()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.training.step()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras hands one dictionary to all callbacks in turn, its history among them."""
        self.training.epoch()
        if logs is not None:
            logs.update(self.training.figures())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.training.end()
