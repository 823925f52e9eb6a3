"""Every callback of the package keeps what nshtrainer promises of callbacks."""

from __future__ import annotations

from importlib.metadata import distribution

from nshtrainer.metric import MetricConfig
from nshtrainer.testing import CallbackConformance, TinyModule
from nshtrainer_ema import (
    EarlyStoppingCallbackConfig,
    EMACallbackConfig,
    GradientSkippingCallbackConfig,
    SharedParametersCallbackConfig,
)


class TestEarlyStopping(CallbackConformance):
    """With a patience that is not used up, so that training has to be as without it."""

    config = EarlyStoppingCallbackConfig(
        metric=MetricConfig(name="val_loss", mode="min"), patience=5, min_lr=1e-6
    )


class TestEMA(CallbackConformance):
    config = EMACallbackConfig(decay=0.9)


class TestGradientSkipping(CallbackConformance):
    config = GradientSkippingCallbackConfig(
        threshold=4.0, start_after_n_steps=1, skip_non_finite=True
    )
    changes_training = True  # it leaves out steps
    syncs_every_step = True  # only a fused optimizer can skip without asking the host


class TestGradientSkippingFused(TestGradientSkipping):
    syncs_every_step = False

    def module(self):
        return TinyModule(fused=True)

    def manual_module(self):
        return TinyModule(fused=True, optimizers=2)


class SharingModule(TinyModule):
    """Says that the first layer is used twice."""

    @property
    def shared_parameters(self):
        return [(parameter, 2) for parameter in self.body.parameters()]


class TestSharedParameters(CallbackConformance):
    config = SharedParametersCallbackConfig()
    changes_training = True  # it scales gradients

    def module(self):
        return SharingModule(optimizer="sgd")  # AdamW hardly sees a factor

    def manual_module(self):
        return SharingModule(optimizers=2)


def test_every_callback_of_the_package_is_tested_here():
    """A callback that is added to the entry points is added to this file."""
    points = distribution("nshtrainer-ema").entry_points
    names = {point.name for point in points.select(group="nshtrainer.callbacks")}
    tested = [c for c in CallbackConformance.__subclasses__() if c.__module__ == __name__]

    assert {c.config.name for c in tested} == names
