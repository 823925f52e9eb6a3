"""Each family beside the core, one at a time, and what stays when one is taken away."""

from __future__ import annotations

import json

import pytest

from nshtrainer.plugins.catalogue import CALLBACKS, LOGGERS

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

RUN = """
id: family
max_epochs: 1
accelerator: cpu
devices: 1
log_every_n_steps: 1
num_sanity_val_steps: 0
enable_progress_bar: false
enable_model_summary: false
primary_metric: {name: val_loss, mode: min}
"""

# family -> what its fit is configured with, and the callbacks (by name) that must be there
FITS = {
    "checkpoint": ("", {"best_checkpoint", "last_checkpoint", "on_exception_checkpoint"}),
    "ema": (
        "early_stopping: {patience: 3}\nshared_parameters: {}\n"
        "callbacks:\n- {name: ema, decay: 0.9}\n- {name: gradient_skipping, threshold: 100.0}\n",
        {"early_stopping", "ema", "gradient_skipping", "shared_parameters"},
    ),
    "monitoring": (
        "log_norms: {log_grad_norm: true}\n"
        "auto_validate_metrics: {metrics: [val_loss]}\n"
        "callbacks:\n- name: epoch_timer\n- name: finite_checks\n- name: print_table_metrics\n",
        {
            "debug_flag", "epoch_timer", "finite_checks", "learning_rate_monitor", "log_epoch",
            "metric_validation", "norm_logging", "print_table_metrics",
        },
    ),
    "wandb": (
        "loggers:\n- {name: wandb, offline: true}\n",
        {"wandb_watch"},
    ),
}  # fmt: skip

FIT = r"""
import re
from nshtrainer import Trainer, TrainerConfig
from nshtrainer.testing import TinyDataModule, TinyModule

class Module(TinyModule):
    @property
    def shared_parameters(self):
        return [(self.head.weight, 2)]

trainer = Trainer(TrainerConfig.from_file("run.yaml"))
trainer.fit(Module(), datamodule=TinyDataModule())
keys = [c.state_key for c in trainer.callbacks if c.state_key.startswith("nshtrainer.")]
names = {re.match(r"nshtrainer\.(\w+)", key)[1] for key in keys}
print("steps", trainer.global_step, *sorted(names))
"""

IMPORTS = """
import json, sys, nshtrainer.configs
from nshtrainer import manifest
entries = [e for e in manifest() if e.dist == sys.argv[1] and e.group != "nshtrainer.plugins"]
print(json.dumps({e.name: getattr(nshtrainer.configs, e.class_name).__name__ for e in entries}))
"""


def listed(environment) -> dict[str, set[str]]:
    """Distribution -> names of its callbacks and loggers, as `nshtrainer plugins` sees them."""
    report = json.loads(environment.run("nshtrainer", "plugins", "--load", "--json"))
    assert {row["state"] for row in report["plugins"]} <= {"loaded", "unavailable"}, report
    found: dict[str, set[str]] = {}
    for row in report["plugins"]:
        names = found.setdefault(row["distribution"], set())
        if row["kind"] != "hooks":
            names.add(row["name"])
    return found


@pytest.mark.parametrize("family", FITS)
def test_one_family_works_beside_the_core(environment, family):
    """Installed by its extra, a family brings exactly its names, and its callbacks train."""
    dist = f"nshtrainer-{family}"
    core = environment.wheel("nshtrainer-core")
    more, callbacks = FITS[family]

    environment.install(f"nshtrainer-core[{family}] @ {core.as_uri()}")

    expected = {
        name: cls for t in (CALLBACKS, LOGGERS) for name, (d, cls) in t.items() if d == dist
    }
    assert listed(environment).keys() == {"nshtrainer-core", dist}
    assert listed(environment)[dist] == expected.keys()
    assert json.loads(environment.run("python", "-c", IMPORTS, dist)) == expected
    environment.file("run.yaml", RUN + more)
    output = environment.python(FIT)
    (line,) = [line for line in output.splitlines() if line.startswith("steps ")]
    assert line.split()[1] == "4", output
    assert callbacks <= set(line.split()[2:]), output


def test_uninstalling_one_family_leaves_the_others_working(environment):
    """Names of the missing family are refused with the command; the other family still trains."""
    environment.install(*map(environment.wheel, ("nshtrainer-ema", "nshtrainer-monitoring")))
    both = environment.file(
        "both.yaml", "callbacks:\n- {name: ema, decay: 0.9}\n- name: epoch_timer\n"
    )
    one = environment.file("one.yaml", "callbacks:\n- name: epoch_timer\n")
    assert "ema" in environment.run("nshtrainer", "validate", both)

    environment.uninstall("nshtrainer-ema")

    refused = environment.run("nshtrainer", "validate", both, check=False)
    assert "callbacks.0" in refused or "callbacks[0]" in refused
    assert "pip install nshtrainer-ema" in refused
    assert "Traceback" not in refused
    imported = environment.python("from nshtrainer.configs import EMACallbackConfig", check=False)
    assert "pip install nshtrainer-ema" in imported
    assert listed(environment).keys() == {"nshtrainer-core", "nshtrainer-monitoring"}
    assert "epoch_timer" in environment.run("nshtrainer", "validate", "--build", one)
