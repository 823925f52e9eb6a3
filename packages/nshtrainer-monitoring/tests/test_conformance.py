"""Every callback of the package keeps what nshtrainer promises of callbacks."""

from __future__ import annotations

from importlib.metadata import distribution

from nshtrainer.metric import MetricConfig
from nshtrainer.testing import CallbackConformance
from nshtrainer_monitoring import (
    DebugFlagCallbackConfig,
    EpochTimerCallbackConfig,
    FiniteChecksCallbackConfig,
    LearningRateMonitorConfig,
    LogEpochCallbackConfig,
    MetricValidationCallbackConfig,
    NormLoggingCallbackConfig,
    PrintTableMetricsCallbackConfig,
)


class TestDebugFlag(CallbackConformance):
    config = DebugFlagCallbackConfig()


class TestEpochTimer(CallbackConformance):
    config = EpochTimerCallbackConfig()
    not_compared = ("train_elapsed_s", "train_phases_s", "validation_s")  # wall times


class TestFiniteChecks(CallbackConformance):
    config = FiniteChecksCallbackConfig(nonfinite_grads="warn", none_grads="warn")


class TestFiniteChecksWithExplanations(CallbackConformance):
    config = FiniteChecksCallbackConfig(
        label="second",
        nonfinite_grads="skip",
        none_grads="stop",
        nonfinite_loss="raise",
        nonfinite_params="raise",
        find_module=True,
        dump=True,
    )
    syncs_every_step = True


class TestLearningRateMonitor(CallbackConformance):
    config = LearningRateMonitorConfig(log_momentum=True, log_weight_decay=True)


class TestLogEpoch(CallbackConformance):
    config = LogEpochCallbackConfig()


class TestMetricValidation(CallbackConformance):
    config = MetricValidationCallbackConfig(
        metrics=["train_loss", MetricConfig(name="val_loss", mode="min")],
        check_finite=True,
        ranges={"val_loss": (0.0, None)},
        check_ranks_agree=True,
    )


class TestNormLogging(CallbackConformance):
    config = NormLoggingCallbackConfig(
        log_grad_norm=True,
        log_grad_norm_per_param=float("inf"),
        log_param_norm=True,
        log_param_norm_per_param=1.0,
    )


class TestNormLoggingOfEverything(CallbackConformance):
    config = NormLoggingCallbackConfig.model_validate(
        {
            "label": "second",
            "exclude": ["*.bias"],
            **dict.fromkeys(
                (n for n in NormLoggingCallbackConfig.model_fields if n.startswith("log_")), True
            ),
        }
    )


class TestPrintTableMetrics(CallbackConformance):
    config = PrintTableMetricsCallbackConfig(
        metric_patterns=["*_loss"], metrics=[MetricConfig(name="val_loss", mode="min")]
    )


def test_every_callback_of_the_package_is_tested_here():
    """A callback that is added to the entry points is added to this file."""
    points = distribution("nshtrainer-monitoring").entry_points
    names = {point.name for point in points.select(group="nshtrainer.callbacks")}
    tested = [c for c in CallbackConformance.__subclasses__() if c.__module__ == __name__]

    assert {c.config.name for c in tested} == names
