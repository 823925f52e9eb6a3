"""Callbacks of nshtrainer on a plain Lightning trainer: nothing else of the program changes.

Run it with `python examples/plain_lightning.py`; checkpoints go below the current folder.
"""

from __future__ import annotations

from digits import Classifier, loaders
from lightning.pytorch import Trainer, seed_everything

from nshtrainer import MetricConfig, create_callbacks

if __name__ == "__main__":
    seed_everything(0)
    callbacks = create_callbacks(
        [
            {"name": "ema", "decay": 0.98},
            {"name": "gradient_skipping", "threshold": 20.0},
            {"name": "early_stopping", "patience": 8},
            "best_checkpoint",
            "epoch_timer",
        ],
        primary_metric=MetricConfig(name="val_acc", mode="max"),
    )
    trainer = Trainer(max_epochs=15, accelerator="cpu", logger=False, callbacks=callbacks)
    trainer.fit(Classifier(), *loaders())
    best = trainer.checkpoint_callback
    print(f"best validation accuracy: {best.best_model_score:.2%}")
    print(f"its checkpoint: {best.best_model_path}")
    print(f"last epoch: {trainer.callback_metrics['train/epoch_time_s']:.2f} s")
