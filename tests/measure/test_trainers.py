"""Trainers' callbacks. transformers through its own CallbackHandler, in the order of its training loop."""

import contextlib
import importlib.util
import time
import types

import pytest

from perjoule.core.errors import MissingExtra
from perjoule.measure import trainers
from perjoule.measure.hooks import Training
from perjoule.testing.sensors import SteadySensor


def steady():
    return SteadySensor({"package": 10.0})


def test_hugging_face_calls_it_and_logs_joules():
    """What Trainer.train fires in 2 epochs of 3 steps, through the real handler (Trainer itself needs accelerate)."""
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_callback import CallbackHandler

    callback = trainers.huggingface(sensors=[steady()])
    assert isinstance(callback, transformers.TrainerCallback)
    args, state, control = object(), transformers.TrainerState(), transformers.TrainerControl()
    handler = CallbackHandler([callback], None, None, None, None)
    handler.on_train_begin(args, state, control)
    for epoch in range(2):
        handler.on_epoch_begin(args, state, control)
        for _ in range(3):
            handler.on_step_begin(args, state, control)
            time.sleep(0.01)
            handler.on_pre_optimizer_step(args, state, control)
            handler.on_optimizer_step(args, state, control)
            handler.on_step_end(args, state, control)
        logs = {"loss": 1.0, "epoch": epoch}
        state.log_history.append({**logs, "step": 3 * (epoch + 1)})
        handler.on_log(args, state, control, logs)
        assert logs["energy_j"] > 0
        handler.on_epoch_end(args, state, control)
    handler.on_train_end(args, state, control)
    training = callback.training
    assert (training.steps, len(training.epochs), training.running) == (6, 2, False)
    reading = training.reading
    assert reading.energy_j.value == pytest.approx(10 * reading.time_s.value)
    assert [r["energy_j"] < reading.energy_j.value for r in state.log_history] == [True, True]
    assert state.log_history[-1]["energy_j_per_step"] == pytest.approx(state.log_history[-1]["energy_j"] / 6)


def test_hugging_face_logs_outside_training_are_left_alone():
    transformers = pytest.importorskip("transformers")
    callback = trainers.huggingface(sensors=[steady()])
    logs = {"eval_loss": 1.0}
    callback.on_log(None, transformers.TrainerState(), None, logs=logs)
    assert logs == {"eval_loss": 1.0}


def test_real_trainer(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x, labels):
            return {"loss": ((self.linear(x) - labels) ** 2).mean()}

    data = [{"x": torch.ones(2), "labels": torch.ones(1)} for _ in range(8)]
    callback = trainers.huggingface()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, use_cpu=True, report_to=[], logging_steps=1
    )
    trainer = transformers.Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert len(callback.training.epochs) == 2
    assert "energy_j" in trainer.state.log_history[-1]


def test_lightning_hooks_feed_training():
    """The hooks by themselves, as the documentation of lightning 2 calls them."""
    hooks = trainers._Lightning()
    hooks.training = Training(sensors=[steady()])
    logged = []
    logger = types.SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics["energy_j"])))
    trainer = types.SimpleNamespace(loggers=[logger], global_step=1)
    hooks.on_fit_start(trainer, None)
    hooks.on_train_batch_end(trainer, None, None, None, 0)
    hooks.on_train_epoch_end(trainer, None)
    hooks.on_exception(trainer, None, KeyboardInterrupt())
    hooks.on_fit_end(trainer, None)
    assert (hooks.training.steps, len(hooks.training.epochs), hooks.training.running) == (1, 1, False)
    assert [step for step, _ in logged] == [1]


def test_keras_hooks_feed_training():
    """The hooks by themselves, as the documentation of keras 3 calls them."""
    hooks = trainers._Keras()
    hooks.training = Training(sensors=[steady()])
    hooks.on_train_begin({})
    hooks.on_train_batch_end(0, {"loss": 1.0})
    logs = {"loss": 1.0}
    hooks.on_epoch_end(0, logs)
    hooks.on_train_end(logs)
    assert logs["energy_j"] > 0
    assert (hooks.training.steps, len(hooks.training.epochs), hooks.training.running) == (1, 1, False)


@pytest.mark.filterwarnings("ignore")  # its own, of other libraries
def test_real_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    import torch
    from lightning.pytorch.loggers import CSVLogger

    class Net(lightning.LightningModule):
        def __init__(self, fails=False):
            super().__init__()
            self.linear, self.fails = torch.nn.Linear(2, 1), fails

        def training_step(self, batch, number):
            if self.fails:
                raise ZeroDivisionError
            return self.linear(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trained(net):
        callback = trainers.for_lightning(sensors=[steady()])
        logger = CSVLogger(tmp_path)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=logger, callbacks=[callback], enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1, default_root_dir=tmp_path,
        )  # fmt: skip
        with contextlib.suppress(ZeroDivisionError):
            trainer.fit(net, torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=4))
        return callback.training, logger

    training, logger = trained(Net())
    assert (training.steps, len(training.epochs), training.running) == (4, 2, False)
    assert training.reading.energy_j.value == pytest.approx(10 * training.reading.time_s.value)
    assert "energy_j" in (tmp_path / "lightning_logs" / f"version_{logger.version}" / "metrics.csv").read_text()
    failed, _ = trained(Net(fails=True))
    assert failed.reading is not None
    assert not failed.running


def test_real_keras():
    keras = pytest.importorskip("keras")
    import numpy

    callback = trainers.for_keras(sensors=[steady()])
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    history = model.fit(numpy.ones((8, 2)), numpy.ones((8, 1)), batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    training = callback.training
    assert (training.steps, len(training.epochs), training.running) == (4, 2, False)
    assert training.reading.energy_j.value == pytest.approx(10 * training.reading.time_s.value)
    assert len(history.history["energy_j"]) == 2


@pytest.mark.parametrize(("make", "library"), [("for_lightning", "lightning"), ("for_keras", "keras")])
def test_what_is_not_installed_is_named(make, library):
    if importlib.util.find_spec(library) or importlib.util.find_spec("pytorch_lightning"):
        pytest.skip(f"{library} is installed")
    with pytest.raises(MissingExtra, match=f"^{library} is not installed; run: pip install {library}$"):
        getattr(trainers, make)()
