from __future__ import annotations

import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

import nshtrainer_monitoring as monitoring
from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.metric import MetricConfig
from nshtrainer_monitoring import (
    FiniteChecksCallbackConfig,
    LogEpochCallbackConfig,
    MetricValidationCallbackConfig,
    NormLoggingCallbackConfig,
    PrintTableMetricsCallbackConfig,
)

CONFIGS = {
    "debug_flag": monitoring.DebugFlagCallbackConfig,
    "epoch_timer": monitoring.EpochTimerCallbackConfig,
    "finite_checks": monitoring.FiniteChecksCallbackConfig,
    "learning_rate_monitor": monitoring.LearningRateMonitorConfig,
    "log_epoch": monitoring.LogEpochCallbackConfig,
    "metric_validation": monitoring.MetricValidationCallbackConfig,
    "norm_logging": monitoring.NormLoggingCallbackConfig,
    "print_table_metrics": monitoring.PrintTableMetricsCallbackConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_entry_point_finds_the_class(name: str):
    """Each name in the manifest loads the class of this package."""
    assert callback_registry.get(name) is CONFIGS[name]


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_round_trips_through_files(config_class: type[CallbackConfigBase]):
    """What is written as YAML or JSON is read back equal."""
    config = config_class(label="second")

    for form in ("yaml", "json"):
        assert config_class.from_text(config.to_text(form), form) == config


def test_reading_configurations_imports_no_torch():
    """A login node pays for neither torch, Lightning nor rich."""
    code = (
        "import sys, nshtrainer_monitoring as m; m.NormLoggingCallbackConfig(log_grad_norm=True);"
        "sys.exit(any(x in sys.modules for x in ('torch', 'lightning', 'rich', 'numpy')))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_lists_its_names():
    """`__all__` is sorted and every name in it resolves."""
    assert monitoring.__all__ == sorted(monitoring.__all__)
    for name in monitoring.__all__:
        assert getattr(monitoring, name).__name__ == name


@pytest.mark.parametrize(
    ("given", "kept"),
    [(True, True), (False, False), (1, 1.0), (2, 2.0), ("2.5", 2.5), ("inf", math.inf), (0.5, 0.5)],
)
def test_norm_type_is_a_switch_or_a_number(given: object, kept: object):
    """Numbers in text are parsed when the config is made, not in the middle of a fit."""
    config = NormLoggingCallbackConfig.model_validate({"log_grad_norm": given})

    assert config.log_grad_norm == kept
    assert type(config.log_grad_norm) is type(kept)
    assert NormLoggingCallbackConfig.from_text(config.to_text("json"), "json") == config


@pytest.mark.parametrize("bad", [0, -1, "two", math.nan, "NaN", None])
def test_norm_type_refuses_what_is_no_norm(bad: object):
    """A p that gives no norm is refused in the config."""
    with pytest.raises(ValidationError):
        NormLoggingCallbackConfig.model_validate({"log_param_norm": bad})


@pytest.mark.parametrize(("given", "kept"), [(True, "warn"), (False, "ignore"), ("raise", "raise")])
def test_finite_checks_take_switches_and_actions(given: object, kept: str):
    """Switches of existing configurations keep their meaning beside the actions."""
    config = FiniteChecksCallbackConfig.model_validate({"nonfinite_grads": given})

    assert config.nonfinite_grads == kept


def test_metrics_are_names_or_configurations():
    """A plain name is enough to require a metric; an empty one is refused."""
    config = MetricValidationCallbackConfig.model_validate(
        {"metrics": ["val/loss", {"name": "val/acc", "mode": "max"}]}
    )

    assert config.metrics == ["val/loss", MetricConfig(name="val/acc", mode="max")]
    with pytest.raises(ValidationError):
        MetricValidationCallbackConfig(metrics=[""])


def test_empty_names_are_refused():
    """An empty metric name is refused before the run."""
    with pytest.raises(ValidationError):
        LogEpochCallbackConfig(metric_name=" ")
    with pytest.raises(ValidationError):
        PrintTableMetricsCallbackConfig(metric_patterns=[""])


@pytest.mark.parametrize(
    "config",
    [
        NormLoggingCallbackConfig(),
        FiniteChecksCallbackConfig(nonfinite_grads="ignore", none_grads="ignore"),
        PrintTableMetricsCallbackConfig(enabled=False),
        monitoring.DebugFlagCallbackConfig(enabled=False),
        LogEpochCallbackConfig(train=False, val=False, test=False),
    ],
)
def test_switched_off_means_no_callback(config: CallbackConfigBase):
    """A configuration that asks for nothing builds nothing."""
    from nshtrainer import create_callbacks

    assert create_callbacks([config]) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_a_callback_with_a_stable_state_key(name: str):
    """State is kept under the configuration's name, and apart for a labelled second one."""
    from nshtrainer import create_callbacks

    options = {"log_grad_norm": True} if name == "norm_logging" else {}
    configs = [{"name": name, **options}, {"name": name, "label": "b", **options}]
    keys = [callback.state_key for callback in create_callbacks(configs)]

    assert keys == [f"nshtrainer.{name}", f"nshtrainer.{name}#b"]
