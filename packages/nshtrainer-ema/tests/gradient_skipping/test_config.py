"""The configuration: what can be said, in which ways, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nshtrainer_ema import GradientSkippingCallbackConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "neither threshold nor policy is given"),
        ({"skip_non_finite": True}, "neither threshold nor policy is given"),
        ({"threshold": 1.0, "sigmas": 2.0}, "sigmas is given, .* zscore and sigma, and policy is None"),
        ({"policy": "zscore", "window": 9}, "window is given, .* sigma and percentile, and policy is 'z"),
        ({"policy": "sigma", "statistics_decay": 0.9}, "statistics_decay is given, .* policies zscore"),
        ({"policy": "sigma", "percentile": 90}, "percentile is given"),
        ({"threshold": 1.0, "warmup_steps": 9}, "warmup_steps is given"),
        ({"policy": "percentile"}, "has no percentile; give one"),
        ({"policy": "percentile", "percentile": 10}, "would leave out most steps, since 90%"),
        (
            {"policy": "percentile", "percentile": 99, "action": "raise"},
            "would stop a healthy run, since 1%",
        ),
        ({"threshold": 1.0, "action": "clip", "max_consecutive": 3}, "max_consecutive is given, but no"),
        ({"threshold": 1.0, "action": "raise", "hold_scheduler": True}, "hold_scheduler is given, but"),
        ({"policy": "median"}, "policy"),
        ({"policy": "zscore", "action": "stop"}, "action"),
        ({"policy": "zscore", "sigmas": 0}, "sigmas"),
        ({"policy": "zscore", "sigmas": "inf"}, "sigmas"),
        ({"policy": "zscore", "statistics_decay": 1.0}, "statistics_decay"),
        ({"policy": "zscore", "warmup_steps": 1}, "warmup_steps"),
        ({"policy": "sigma", "window": 1}, "window"),
        ({"policy": "percentile", "percentile": 101}, "percentile"),
        ({"policy": "percentile", "percentile": 90, "percentile_factor": "inf"}, "percentile_factor"),
        ({"threshold": 1.0, "max_consecutive": 0}, "max_consecutive"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, said):
    """Before any training, with a message that says what to change."""
    with pytest.raises(ValidationError, match=said):
        GradientSkippingCallbackConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "zscore"},
        {"policy": "zscore", "threshold": 5.0, "sigmas": 3, "statistics_decay": 0.9},
        {"policy": "sigma", "window": 64, "warmup_steps": 32, "max_consecutive": 10},
        {"policy": "percentile", "percentile": 10, "action": "clip"},
        {"policy": "percentile", "percentile": 10, "percentile_factor": 20.0},
        {"policy": "percentile", "percentile": 95, "percentile_factor": 3.0, "action": "raise"},
        {"threshold": 1.0, "action": "clip", "skip_non_finite": True, "max_consecutive": 3},
        {"threshold": 1.0, "hold_scheduler": True},
    ],
)
def test_what_makes_sense_survives_files(options):
    """YAML, JSON and a copy."""
    config = GradientSkippingCallbackConfig(**options)

    for format_ in ("yaml", "json"):
        assert GradientSkippingCallbackConfig.from_text(config.to_text(format_), format_) == config
    assert config.replace(start_after_n_steps=3).replace(start_after_n_steps=100) == config


def test_a_refused_change_leaves_the_configuration_alone():
    """The rules hold for assignments too."""
    config = GradientSkippingCallbackConfig(policy="zscore", sigmas=3.0)
    with pytest.raises(ValidationError, match="sigmas is given"):
        config.policy = "percentile"

    assert config.policy == "zscore"
