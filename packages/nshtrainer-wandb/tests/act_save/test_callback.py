from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer as LightningTrainer

from nshtrainer import Trainer, create_callbacks

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # new torch


@pytest.fixture(params=["model"])
def saving_model(request: pytest.FixtureRequest):
    """Hands its input to ActSave in every step."""
    model = request.getfixturevalue(request.param)
    from nshutils.actsave import ActSave

    loss = model._loss

    def saving(batch: torch.Tensor) -> torch.Tensor:
        ActSave({"input": batch})
        return loss(batch)

    model._loss = saving
    model.predict_step = lambda batch, batch_idx: saving(batch)
    return model


def _stored(folder: Path) -> dict[str, int]:
    """Session and name of what was stored -> number of files."""
    found: dict[str, int] = {}
    for file in folder.rglob("*.npy"):
        key = str(file.parent.relative_to(folder))
        found[key] = found.get(key, 0) + 1
    return found


def _is_off() -> bool:
    from nshutils.actsave import ActSave

    return not ActSave.is_initialized and ActSave._prefixes == []


@pytest.mark.parametrize("saving_model", ["validated_model"], indirect=True)
def test_each_stage_is_stored_under_its_own_name(make_config, saving_model, batches, project: Path):
    """Validation inside training is `validation`, and training goes on as `train` after it."""
    config = make_config(callbacks=[{"name": "act_save"}], id="r", val_check_interval=2)
    trainer = Trainer(config)
    trainer.fit(saving_model, batches, batches)
    trainer.test(saving_model, batches, verbose=False)
    trainer.predict(saving_model, batches)

    assert _stored(project / "nshtrainer_logs" / "r" / "activation") == {
        **dict.fromkeys(("0000/train.input", "0000/train.step"), 4),
        # twice all four, and two of the sanity check
        **dict.fromkeys(("0000/validation.input", "0000/validation.step"), 10),
        **dict.fromkeys(("0001/test.input", "0001/test.step"), 4),
        **dict.fromkeys(("0002/predict.input", "0002/predict.step"), 4),
    }
    assert _is_off()


def test_exception_closes_every_context(make_config, saving_model, batches, tmp_path: Path):
    """A later run does not write into the folder of one that crashed."""
    saving_model.fail_at = 2
    config = make_config(callbacks=[{"name": "act_save", "save_dir": str(tmp_path / "a")}])
    with pytest.raises(RuntimeError, match="the model failed"):
        Trainer(config).fit(saving_model, batches)
    assert _is_off()

    saving_model.fail_at = None
    Trainer(make_config()).fit(saving_model, batches)

    assert _stored(tmp_path / "a") == {"0000/train.input": 2, "0000/train.step": 2}


def test_switched_off_it_leaves_no_trace(make_config, saving_model, batches, project: Path):
    """`enabled: false` builds no callback and makes no folder."""
    trainer = Trainer(make_config(callbacks=[{"name": "act_save", "enabled": False}], id="r"))
    trainer.fit(saving_model, batches)

    assert "ActSaveCallback" not in {type(c).__name__ for c in trainer.callbacks}
    assert list(project.rglob("activation")) == []


def test_act_save_of_the_user_stays_on(make_config, saving_model, batches, tmp_path: Path):
    """Somebody's own ActSave is used and not closed; stage names are added."""
    from nshutils.actsave import ActSave

    with ActSave.enabled(tmp_path / "mine"):
        Trainer(make_config(callbacks=[{"name": "act_save"}])).fit(saving_model, batches)

        assert ActSave.is_initialized

    assert _stored(tmp_path / "mine") == {"0000/train.input": 4, "0000/train.step": 4}


def test_works_on_a_plain_trainer(saving_model, batches, tmp_path: Path, caplog):
    """`create_callbacks` is enough, and nothing is warned of."""
    trainer = LightningTrainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=create_callbacks(["act_save"], directory={"project_root": tmp_path}, id="r"),
    )  # fmt: skip

    with caplog.at_level(logging.WARNING):
        trainer.fit(saving_model, batches)

    stored = _stored(tmp_path / "nshtrainer_logs" / "r" / "activation")
    assert stored == {"0000/train.input": 4, "0000/train.step": 4}
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
