"""The library door: values and noise scores from a training loop of your own.

Shape legend: N samples, B rows of one batch, C classes, D last-layer inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import chgval
from chgval import progress
from chgval.detection.scores import score_labels
from chgval.detection.verdict import verdict_of
from chgval.errors import TrackerError
from chgval.registry import names_in
from chgval.reports.report import Report
from chgval.reports.tables import InputRows, values_table
from chgval.types import IntArray
from chgval.valuation.accumulator import ValueAccumulator
from chgval.valuation.signals import EpochSignals


class Tracker:
    """Values every sample from the steps that a training makes anyway.

    A step only pays for copying logits and last-layer inputs; the closed form is computed at the end of an
    epoch. The training itself is not changed.

        >>> inputs, labels = torch.rand(60, 4), torch.arange(60) % 3
        >>> head = nn.Linear(8, 3)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), head)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tracker = Tracker(labels, head=head)
        >>> for epoch in range(2):
        ...     for indices in torch.randperm(60).split(20):
        ...         loss = nn.functional.cross_entropy(model(inputs[indices]), labels[indices])
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         tracker.update(indices)
        ...     signals = tracker.end_epoch()
        >>> tracker.result().values.shape
        (60,)

    Noise scores are the better the more the features know of a sample without having learned its label: after
    the last epoch, show all samples once more in evaluation mode (`observe`).

    Args:
        labels: given class of every sample, integers, shape (N,); -1 where unknown. Where a tensor lies, the
            samples' buffers of (C + D) float32 and 2 C more do too.
        head: last linear layer of the model, whose inputs and outputs are then taken from its forward passes.
            Without it, pass `features` to `update`.
        num_classes: C. Default: of the head, or of the class names, or of the labels.
        class_names: of all classes. Default: their numbers.
        ids: of all samples. Default: their numbers.
        utility: the game: chg, gradient or hardness (paper, section 3.2 and Table 2).
        per_class: whether each class is a coalition of its own.
        has_bias: whether the last layer has a bias; taken from the head, if that is given.
        averaged_from: first epoch, from 1, whose probabilities enter the averaged ones. Half of the epochs is
            a good choice: early ones predict poorly.

    Raises:
        TrackerError: the arguments do not fit each other.

    Source of the values: Cai, arXiv:2406.11730, Theorem 1.
    """

    def __init__(
        self,
        labels: ArrayLike | Tensor,
        *,
        head: nn.Linear | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        utility: str = "chg",
        per_class: bool = False,
        has_bias: bool = True,
        averaged_from: int = 1,
    ) -> None:
        labels_N = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
        if labels_N.ndim != 1 or labels_N.is_floating_point() or labels_N.dtype == torch.bool:
            raise TrackerError(
                f"labels: {labels_N.dtype} of shape {tuple(labels_N.shape)}; pass integers, one per sample."
            )
        self._labels_N = labels_N.to(torch.int64).clamp(min=-1)
        self._all_labelled = bool((self._labels_N >= 0).all())
        largest = int(self._labels_N.max()) if len(labels_N) else -1
        if num_classes is None:
            named = None if class_names is None else len(class_names)
            num_classes = head.out_features if head is not None else named or largest + 1
        names = range(num_classes) if class_names is None else class_names
        self.class_names = [str(name) for name in names]
        if largest >= num_classes or len(self.class_names) != num_classes or num_classes < 2:
            raise TrackerError(
                f"labels: up to {largest}, {num_classes} classes and {len(self.class_names)} class names do "
                "not fit each other; pass labels from 0, and a name for each of at least two classes."
            )
        self.ids = [str(name) for name in (ids if ids is not None else range(len(labels_N)))]
        if len(self.ids) != len(labels_N):
            raise TrackerError(f"ids: {len(self.ids)} for {len(labels_N)} labels; pass one per sample.")
        if utility not in names_in("valuation.games") or averaged_from < 1:
            raise TrackerError(
                f"utility {utility!r}, averaged_from {averaged_from}: expected one of "
                f"{', '.join(names_in('valuation.games'))}, and an epoch from 1 on."
            )
        self._num_classes = num_classes
        self._has_bias = head.bias is not None if head is not None else has_bias
        self._settings: dict[str, Any] = {
            "utility": utility,
            "per_class": per_class,
            "averaged_from": averaged_from,
        }
        self._accumulator: ValueAccumulator | None = None
        self._num_epochs = 0
        self._observed_ND: Tensor | None = None
        self._passed: tuple[Tensor, Tensor, int] | None = None
        self._hook: RemovableHandle | None = None
        if head is not None:
            self._hook = head.register_forward_hook(self._take, with_kwargs=True)

    def update(
        self,
        indices: ArrayLike | Tensor,
        logits: Tensor | None = None,
        features: Tensor | None = None,
    ) -> None:
        """Take in one batch of a training step. Copies only; waits for nothing on the device.

        Unknown labels on a CUDA device are the exception; pass the labels on the host then.

        Args:
            indices: which samples these are, from 0, shape (B,).
            logits: what the model returned for them, shape (B, C). Default: what the head returned last.
            features: input of the last linear layer, shape (B, D). Default: what the head was given last.
        Raises:
            TrackerError: shapes do not fit each other, or nothing went through the head.
        """
        rows_B, logits_BC, features_BD = self._batch(indices, logits, features)
        self._accumulating(features_BD).update(rows_B, logits_BC, features_BD)

    def end_epoch(self) -> EpochSignals:
        """End an epoch: value the samples that it saw, and return the values and signals of that epoch.

        Raises:
            TrackerError: it saw no sample.
        """
        if self._accumulator is None or not self._accumulator.has_seen:
            raise TrackerError("end_epoch: the epoch saw no sample; call update after each step.")
        self._num_epochs += 1
        with torch.autocast(self._labels_N.device.type, enabled=False):
            return self._accumulator.finish_epoch()

    def observe(
        self,
        indices: ArrayLike | Tensor,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        *,
        weight: float | None = None,
    ) -> None:
        """Take in one batch of a pass without training, after the last epoch; for noise scores.

        Best is a view of the samples that was not trained on, such as mirrored images where training did not
        mirror, by a moving average of the weights.

        Args:
            indices: which samples these are, as for `update`.
            logits: as for `update`.
            features: as for `update`.
            weight: how much its probabilities count beside those of an epoch, which count 1. Default: as much
                as all averaged epochs.
        Raises:
            TrackerError: shapes do not fit each other, or there was no epoch.
        """
        rows_B, logits_BC, features_BD = self._batch(indices, logits, features)
        if self._accumulator is None:
            raise TrackerError("observe: comes after the last epoch; train with update and end_epoch first.")
        if weight is None:
            weight = max(1, self._num_epochs + 1 - self._settings["averaged_from"])
        self._accumulator.add_predictions(rows_B, logits_BC, weight)
        if self._observed_ND is None:
            self._observed_ND = torch.full((len(self._labels_N), features_BD.shape[1]), torch.nan)
        self._observed_ND[rows_B.cpu()] = features_BD.detach().float().cpu()

    def result(self) -> Report:
        """Return values, signals, noise scores and suggestions of every sample so far.

        Raises:
            TrackerError: there was no epoch.
        """
        accumulator = self._accumulator
        if accumulator is None or not self._num_epochs:
            raise TrackerError("result: there is none before the first end_epoch.")
        labels_N: IntArray = self._labels_N.cpu().numpy()
        statuses = np.where(accumulator.num_epochs_N > 0, "valued", "unseen")
        statuses = np.where(labels_N < 0, "unlabelled", statuses)
        rows = InputRows(
            ids=self.ids,
            labels_N=labels_N,
            class_names=self.class_names,
            statuses=statuses.tolist(),
            reasons=[None] * len(labels_N),
        )
        metadata = {
            "version": chgval.__version__,
            "command": "chgval.Tracker",
            "settings": {"tracker": self._settings},
            "class_names": self.class_names,
            "epochs": self._num_epochs,
        }
        trained_ND = accumulator.last_features()
        if self._observed_ND is None:
            return make_report(rows, accumulator, trained_ND, None, metadata)
        missing = int((self._observed_ND.isnan().all(1).numpy() & (labels_N >= 0)).sum())
        if missing:
            progress.warn(
                f"{missing:,} of {len(labels_N):,} samples were not shown to observe and have no score; "
                "show it all of them, or none"
            )
        return make_report(rows, accumulator, self._observed_ND, trained_ND, metadata)

    def close(self) -> None:
        """Stop listening to the head; what was tracked so far stays.

        Call it before `torch.save(model)`, which would write the hook, and all that is tracked, too.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __deepcopy__(self, _: dict[int, Any]) -> Tracker:
        # A copy of the model, such as a moving average of its weights, talks to the same tracker.
        return self

    def _take(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        features_BD = inputs[0] if inputs else named["input"]
        # Logits as they are now: the loop may change its own. The pointer tells whether those are the same.
        self._passed = features_BD.detach(), output.detach().clone(), output.data_ptr()

    def _batch(
        self, indices: ArrayLike | Tensor, logits: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows_B = indices if isinstance(indices, Tensor) else torch.from_numpy(np.array(indices))
        if rows_B.is_floating_point() or rows_B.dtype == torch.bool:
            raise TrackerError(f"update: indices are {rows_B.dtype}; pass the numbers of the samples.")
        rows_B = rows_B.to(torch.int64)
        if (logits is None or features is None) and self._passed is None:
            raise TrackerError(
                "update: nothing went through the head; pass logits and features, or head=model.fc to "
                "Tracker before the forward pass."
            )
        if self._passed is not None and features is None:
            passed_BD, passed_BC, pointer = self._passed
            if logits is not None and logits.data_ptr() != pointer:
                raise TrackerError(
                    "update: these logits are not what the head returned last; call update before the head "
                    "is used again, or pass features too."
                )
            logits, features = passed_BC, passed_BD
            self._passed = None
        if logits is None or features is None:
            raise TrackerError("update: pass logits and features.")
        num_rows, expected = len(rows_B), (len(rows_B), self._num_classes)
        if rows_B.ndim != 1 or logits.shape != expected or features.ndim != 2 or len(features) != num_rows:
            raise TrackerError(
                f"update: {tuple(rows_B.shape)} indices, logits of shape {tuple(logits.shape)} and features "
                f"of shape {tuple(features.shape)}; expected one row of {self._num_classes} logits, and "
                "one of features, per index."
            )
        if not self._all_labelled:
            labelled_B = self._labels_N[rows_B.to(self._labels_N.device)] >= 0
            positions_K = labelled_B.nonzero()[:, 0]  # waits for a device only if the labels are there
            rows_B, logits, features = (
                part[positions_K.to(part.device, non_blocking=part.device.type == "cuda")]
                for part in (rows_B, logits, features)
            )
        return rows_B, logits, features

    def _accumulating(self, features_BD: Tensor) -> ValueAccumulator:
        if self._accumulator is None:
            self._accumulator = ValueAccumulator(
                self._labels_N,
                self._num_classes,
                features_BD.shape[1],
                has_bias=self._has_bias,
                **self._settings,
            )
        return self._accumulator


def make_report(
    rows: InputRows,
    accumulator: ValueAccumulator,
    unseen_ND: Tensor,
    seen_ND: Tensor | None,
    metadata: dict[str, Any],
) -> Report:
    """Return the report of a run that is over, with noise scores, and the verdict on these in its metadata.

    Args:
        rows: what was valued.
        accumulator: has seen all epochs.
        unseen_ND: what noise scores are made of, as for `score_labels`.
        seen_ND: the same.
        metadata: what else is known of the run.
    """
    signals, probabilities_NC = accumulator.run_signals(), accumulator.averaged_probabilities()
    noise = score_labels(rows.labels_N, probabilities_NC, unseen_ND, seen_ND, rows.annotations)
    verdict = verdict_of(noise, rows.labels_N, signals.predicted_label_N, rows.class_names, rows.annotations)
    table = values_table(rows, signals, noise, per_class=accumulator.per_class)
    return Report(table, {**metadata, "verdict": verdict})
