"""Adaptive gradient skipping keeps what nshtrainer promises of callbacks."""

from __future__ import annotations

from nshtrainer.testing import CallbackConformance, TinyModule
from nshtrainer_ema import GradientSkippingCallbackConfig


class TestZScoreFused(CallbackConformance):
    config = GradientSkippingCallbackConfig(
        policy="zscore", warmup_steps=2, sigmas=0.5, start_after_n_steps=1, max_consecutive=50
    )
    changes_training = True

    def module(self):
        return TinyModule(fused=True)

    def manual_module(self):
        return TinyModule(fused=True, optimizers=2)


class TestPercentileClips(CallbackConformance):
    """With an optimizer that is not fused, and all the same without waiting for the device."""

    config = GradientSkippingCallbackConfig(
        policy="percentile", percentile=30, window=4, warmup_steps=2, action="clip",
        start_after_n_steps=None,
    )  # fmt: skip
    changes_training = True


class TestHeldSchedules(CallbackConformance):
    config = GradientSkippingCallbackConfig(
        policy="sigma", window=4, warmup_steps=2, sigmas=0.5, start_after_n_steps=0,
        hold_scheduler=True,
    )  # fmt: skip
    changes_training = True
    syncs_every_step = True
    supports_manual_optimization = False
