"""Value samples while PyTorch Lightning trains: pip install chgval[lightning]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from chgval.tracker import Tracker


def last_of(batch: Any) -> Tensor:
    """Return the last item of a batch."""
    indices: Tensor = batch[-1]
    return indices


class TrackerCallback(pl.Callback):
    """Feeds a tracker from a Lightning training.

        tracker = Tracker(labels, head=module.model.fc)
        pl.Trainer(callbacks=[TrackerCallback(tracker)]).fit(module, loader)
        report = tracker.result()

    Args:
        tracker: has the head of the module.
        indices: takes the sample numbers out of a batch. Default: its last item, so that the dataset returns
            (image, label, index).
    """

    def __init__(self, tracker: Tracker, indices: Callable[[Any], Tensor] = last_of) -> None:
        self.tracker = tracker
        self._indices = indices

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in what went through the head in this step."""
        self.tracker.update(self._indices(batch))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Value the samples of this epoch."""
        self.tracker.end_epoch()
