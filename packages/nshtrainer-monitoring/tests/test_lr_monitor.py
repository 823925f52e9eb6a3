from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor

import nshtrainer
from nshtrainer import TrainerConfig
from nshtrainer_monitoring import LearningRateMonitorCallback


def rates(logger, prefix="lr-"):
    """Every (step, name, value) that begins with *prefix*, in order of name and step."""
    return sorted(
        (name, step, float(value))
        for step, metrics in logger.calls
        for name, value in metrics.items()
        if name.startswith(prefix)
    )


def plain(module):
    return torch.optim.SGD(module.parameters(), lr=0.25, momentum=0.5, weight_decay=0.125)


def grouped(module):
    groups = [
        {"params": module.first.parameters(), "name": "body"},
        {"params": module.second.parameters(), "lr": 0.5},
    ]
    return torch.optim.AdamW(groups, lr=0.25)


def scheduled(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def epochwise(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": "my_rate"}}


def two(module):
    first = torch.optim.SGD(module.first.parameters(), lr=1.0)
    second = torch.optim.SGD(module.second.parameters(), lr=0.5)
    return [first, second], [torch.optim.lr_scheduler.StepLR(second, 1)]


# In manual optimization (`two`) ours logs more without an interval, which is tested below.
@pytest.mark.parametrize(
    ("configure", "interval"),
    [
        (configure, interval)
        for configure in (plain, grouped, scheduled, epochwise, two)
        for interval in (None, "step", "epoch")
        if not (configure is two and interval is None)
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_same_as_lightning(net, make_trainer, memory_logger, configure, interval, every):
    """Names, values and steps are those of Lightning's own monitor, in one logger call less."""
    options = {"logging_interval": interval, "log_momentum": True, "log_weight_decay": True}
    logged = []
    for monitor in (LearningRateMonitorCallback(**options), LearningRateMonitor(**options)):
        logger = memory_logger()
        trainer = make_trainer(monitor, logger=logger, max_epochs=2, log_every_n_steps=every)
        trainer.fit(net(optimizers=2 if configure is two else 1, configure=configure))
        prefixes = ("lr-", "my_rate")
        logged.append([rates(logger, prefix) for prefix in prefixes])

    assert logged[0] == logged[1]
    assert any(logged[0])


def test_the_rate_is_that_of_the_step(net, make_trainer, memory_logger):
    """Halved at each step, the rate logged for step n is 0.5**n: the one that step uses."""
    logger = memory_logger()

    make_trainer(LearningRateMonitorCallback(), logger=logger).fit(net(configure=scheduled))

    assert [float(v) for _, v in logger.values("lr-SGD")] == [0.5**n for n in range(6)]


def test_manual_schedulers_are_seen_at_each_step(net, make_trainer, memory_logger):
    """In manual optimization the module steps its schedulers when it likes: each step is logged."""

    class Manual(net):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    def configure(module):
        optimizers, _ = two(module)
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[1], 1, gamma=0.5)]

    logger = memory_logger()
    make_trainer(LearningRateMonitorCallback(), logger=logger, limit_train_batches=3).fit(
        Manual(optimizers=2, configure=configure)
    )

    by_name = {}
    for name, _, value in rates(logger):
        by_name.setdefault(name, []).append(value)
    assert by_name == {
        "lr-SGD": [0.5, 0.5, 0.25, 0.125],  # at the epoch's start and each step, sorted by step
        "lr-SGD-1": [1.0] * 4,
    }


def test_a_prefix_stands_before_every_name(net, make_trainer):
    """The prefix is part of the name, of momentum and weight decay too."""
    callback = LearningRateMonitorCallback(
        prefix="train/", log_momentum=True, log_weight_decay=True
    )
    trainer = make_trainer(callback)

    trainer.fit(net(configure=plain))

    names = {name for name in trainer.callback_metrics if "lr-" in name}
    assert names == {"train/lr-SGD", "train/lr-SGD-momentum", "train/lr-SGD-weight_decay"}


@pytest.mark.parametrize(
    "loggers", [[], [{"name": "csv", "enabled": False}], [{"name": "csv"}]], ids=str
)
def test_on_by_default_whatever_loggers_there_are(net, tmp_path, loggers):
    """Our trainer has it without being asked, also where no logger is built in the end."""
    config = TrainerConfig.model_validate(
        {
            "directory": {"project_root": tmp_path},
            "loggers": loggers,
            "checkpoint_saving": None,
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
    )
    trainer = nshtrainer.Trainer(config)

    trainer.fit(net(configure=plain))

    assert trainer.callback_metrics["lr-SGD"].item() == 0.25


def test_accumulation_logs_once_per_step(net, make_trainer, memory_logger):
    """With two batches to a step, a step's rate is logged once, at that step."""
    logger = memory_logger()
    trainer = make_trainer(
        LearningRateMonitorCallback(logging_interval="step"),
        logger=logger,
        accumulate_grad_batches=2,
    )

    trainer.fit(net(configure=scheduled))

    assert logger.values("lr-SGD") == [(0, 1.0), (1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("loggers", [0, 2])
def test_any_number_of_loggers(net, make_trainer, memory_logger, loggers):
    """Without a logger nothing fails and callbacks still see the rate; two get the same."""
    built = [memory_logger() for _ in range(loggers)]
    trainer = make_trainer(LearningRateMonitorCallback(), logger=built or False)

    trainer.fit(net(configure=plain))

    assert trainer.callback_metrics["lr-SGD"].item() == 0.25
    assert len({tuple(rates(logger)) for logger in built}) == min(1, loggers)


def test_equal_group_names_stay_apart(net, make_trainer, memory_logger):
    """Two groups of one name are told apart by their position, rather than failing the run."""

    def configure(module):
        layers = (module.first, module.second)
        return torch.optim.SGD([{"params": x.parameters(), "name": "x"} for x in layers], lr=0.5)

    logger = memory_logger()
    make_trainer(LearningRateMonitorCallback(), logger=logger).fit(net(configure=configure))

    assert {name for name, _, _ in rates(logger)} == {"lr-SGD/pg1", "lr-SGD/pg2"}


def test_class_name_is_not_lightnings():
    """Two callbacks of one class name would be hard to tell apart in messages."""
    assert LearningRateMonitorCallback.__name__ != LearningRateMonitor.__name__
