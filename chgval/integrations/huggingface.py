"""Value samples while the Hugging Face Trainer trains: pip install chgval[huggingface]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chgval.errors import TrackerError
from chgval.tracker import Tracker


class TrackerCallback(TrainerCallback):
    """Feeds a tracker from a Hugging Face training.

    The dataset has a column with the number of each sample, from 0, which is taken out of the batch before
    the model sees it; pass TrainingArguments(remove_unused_columns=False), so that the column reaches it.

        tracker = Tracker(labels, head=model.classifier)
        Trainer(model, arguments, train_dataset=dataset, callbacks=[TrackerCallback(tracker)]).train()
        report = tracker.result()

    Args:
        tracker: has the head of the model.
        column: of the numbers.
    """

    def __init__(self, tracker: Tracker, column: str = "index") -> None:
        self.tracker = tracker
        self._column = column
        self._indices: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the model's forward passes."""
        model: nn.Module = kwargs["model"]
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Value the samples of this epoch."""
        self.tracker.end_epoch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop to listen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the numbers out of what the model is given."""
        inputs = dict(kwargs)
        self._indices = inputs.pop(self._column, None)
        if self._indices is None and model.training:
            raise TrackerError(
                f"the batch has no column '{self._column}'; add the number of each sample to the dataset, "
                "and pass TrainingArguments(remove_unused_columns=False)."
            )
        return args, inputs

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training and self._indices is not None:
            self.tracker.update(self._indices)
