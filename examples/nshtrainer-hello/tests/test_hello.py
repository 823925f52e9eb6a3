"""The whole contract of a callback, and what only this one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from nshtrainer_hello import HelloCallbackConfig
from nshtrainer_hello.callback import HelloCallback

from nshtrainer import Trainer, TrainerConfig, create_callbacks, resolve_callbacks
from nshtrainer.testing import (
    CallbackConformance,
    TinyDataModule,
    TinyModule,
    quiet_trainer_kwargs,
)

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class TestHello(CallbackConformance):
    """Everything that nshtrainer expects of a callback."""

    config = HelloCallbackConfig(greeting="Hi", every_n_epochs=2)


def test_greets_every_nth_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The greeting is printed at the start of every second epoch."""
    config = TrainerConfig.model_validate(
        {
            **QUIET,
            "accelerator": "cpu",
            "directory": {"project_root": tmp_path},
            "log_every_n_steps": 1,
            "max_epochs": 3,
            "callbacks": [{"name": "hello", "greeting": "Hi", "every_n_epochs": 2}],
        }
    )

    Trainer(config).fit(TinyModule(), datamodule=TinyDataModule())

    greetings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Hi,")]
    assert greetings == ["Hi, epoch 0", "Hi, epoch 2"]


def test_works_on_a_plain_lightning_trainer(tmp_path: Path) -> None:
    """Any Lightning trainer takes the callback."""
    import lightning.pytorch as pl

    (callback,) = create_callbacks(["hello"])
    kwargs = quiet_trainer_kwargs(tmp_path, max_epochs=2)

    pl.Trainer(**kwargs, callbacks=[callback]).fit(TinyModule(), datamodule=TinyDataModule())

    assert isinstance(callback, HelloCallback)
    assert callback.num_greetings == 2


def test_zero_is_refused() -> None:
    """An interval of zero is an error before any training."""
    with pytest.raises(ValueError, match="every_n_epochs"):
        HelloCallbackConfig(every_n_epochs=0)


def test_is_a_default_only_where_the_config_asks() -> None:
    """Being installed changes no run; `plugins.defaults` adds the callback."""
    without = resolve_callbacks(TrainerConfig(name=["me"]))
    asked = TrainerConfig(name=["me"], plugins={"defaults": ["nshtrainer-hello"]})
    with_hello = [c for c in resolve_callbacks(asked) if isinstance(c, HelloCallback)]

    assert not any(isinstance(c, HelloCallback) for c in without)
    assert [c.config.greeting for c in with_hello] == ["Hello from me"]
    assert with_hello[0].config.added_by == "nshtrainer-hello"
