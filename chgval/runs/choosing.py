"""What a training trains on: everything, a fixed subset, or what a strategy answers when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chgval.config import FULL, TrainingConfig
from chgval.data.loader import Loader
from chgval.runs.session import Run
from chgval.training.devices import has_room
from chgval.training.evaluation import predict
from chgval.training.loop import Subset, schedule_factor
from chgval.training.models import SplitModel
from chgval.training.step import WeightAverage
from chgval.training.strategies import REGISTRY, Predictions, Question, Strategy
from chgval.types import IntArray, State

# Choices in a run, unless the user says: as many as in the paper (300 epochs, every 20).
NUM_CHOICES = 15
# Share of a GPU's free memory that predictions may take; larger ones are chosen by on the host.
PREDICTIONS_SHARE = 0.25
# The moving average of the weights forgets over this share of the steps: the first choices need young ones.
AVERAGED_WHILE_CHOOSING = 1 / 25


@dataclass(frozen=True, slots=True)
class Holdout:
    """Samples that the model is not trained on, but tested on or compared with.

    Attributes:
        loader: of them.
        labels_N: of every row of their dataset, in the model's classes; -1 for rows that are not among them.
    """

    loader: Loader
    labels_N: IntArray

    @property
    def rows(self) -> IntArray:
        """Rows of the samples in their dataset."""
        return np.flatnonzero(self.labels_N >= 0)


class Chooser:
    """Says, before each epoch, what to train on: all, a fixed subset, or what a strategy answers when asked.

    Args:
        run: the run, whose loader has the training samples.
        config: the strategy, how much of the samples it may choose, and how often it is asked.
        held: samples that it may compare with.
        fixed: a subset that is always trained on, instead.
    """

    def __init__(
        self, run: Run, config: TrainingConfig, held: Holdout | None = None, fixed: Subset | None = None
    ) -> None:
        self._run = run
        self._held = held
        self._rows = run.dataset.usable_rows()
        self._fraction = config.fraction or 1
        self._memory: dict[str, Tensor] = {}
        self._strategy = strategy_of(config)
        self._every = select_every(config, run.recipe.epochs)
        self.average = None
        if self._strategy is not None and self._strategy.averages_weights:
            steps = run.recipe.epochs * run.loader.num_batches(torch.from_numpy(self._rows[: self._count]))
            self.average = WeightAverage(run.model, steps, share=AVERAGED_WHILE_CHOOSING)
        self.subset = fixed
        self._asked = 0

    def __call__(self, epoch: int) -> Subset | None:
        """Return what to train on in this epoch; None is all. Asked again for the epoch, say the same."""
        if self._strategy is not None and (epoch - 1) % self._every == 0 and epoch != self._asked:
            self.subset = self._ask(self._strategy, epoch)
            self._asked = epoch
        return self.subset

    def chosen_in(self, epoch: int) -> Subset | None:
        """Return what was chosen at the start of this epoch, if anything was."""
        return self.subset if epoch == self._asked else None

    def state_dict(self) -> State:
        """Return what another chooser of the same run needs to resume."""
        subset = self.subset if self._strategy is not None else None
        return {
            "rows": torch.from_numpy(self._rows),
            "memory": dict(self._memory),
            "asked": self._asked,
            "subset": None if subset is None else {"rows": subset.rows, "weights": subset.weights_N},
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another chooser of the same run."""
        self._rows, self._memory, self._asked = state["rows"].numpy(), state["memory"], state["asked"]
        if state["subset"] is not None:
            weights_N = state["subset"]["weights"]
            on_device = None if weights_N is None else weights_N.to(self._run.device)
            self.subset = Subset(state["subset"]["rows"], on_device)

    @property
    def _count(self) -> int:
        return max(2, round(self._fraction * len(self._rows)))

    def _ask(self, strategy: Strategy, epoch: int) -> Subset:
        run, recipe, held = self._run, self._run.recipe, self._held
        labels_N, num_problems = run.dataset.labels_N, len(run.dataset.problems)
        readable = np.setdiff1d(self._rows, list(run.dataset.problems))
        if len(readable) < len(self._rows):
            self._rows, self._memory = readable, {}

        def sample_pass(model: SplitModel) -> Predictions:
            return predict_rows(model, run.loader, labels_N, self._rows)

        def averaged_pass() -> Predictions:
            if self.average is None:
                raise ValueError("no moving average of the weights is kept")
            return sample_pass(self.average.model)

        def held_pass() -> Predictions:
            if held is None:
                raise ValueError("there are no held-out samples")
            return predict_rows(run.model, held.loader, held.labels_N)

        choice = strategy.choose(
            Question(
                labels_N=torch.from_numpy(labels_N[self._rows]),
                num_classes=run.dataset.num_classes,
                count=self._count,
                epoch=epoch,
                num_epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr=recipe.lr * schedule_factor(recipe.schedule, (epoch - 0.5) / recipe.epochs),
                generator=run.generator,
                predict_samples=lambda: sample_pass(run.model),
                predict_averaged=averaged_pass,
                predict_held=held_pass,
                memory=self._memory,
            )
        )
        if len(run.dataset.problems) > num_problems:
            # A pass found images that cannot be read: they are nothing to choose from. It has tried them all,
            # so that this happens once.
            return self._ask(strategy, epoch)
        rows = torch.from_numpy(self._rows)[choice.positions_K]
        if choice.weights_K is None:
            return Subset(rows)
        return Subset.weighted(rows, choice.weights_K, len(run.dataset), run.device)


def strategy_of(config: TrainingConfig) -> Strategy | None:
    """Return what chooses the samples; None where everything is trained on."""
    return REGISTRY.get(config.strategy or FULL)


def select_every(config: TrainingConfig, num_epochs: int) -> int:
    """Return the epochs from one choice to the next."""
    return config.select_every or max(1, round(num_epochs / NUM_CHOICES))


def predict_rows(
    model: SplitModel, loader: Loader, labels_N: IntArray, rows: IntArray | None = None
) -> Predictions:
    """Show samples to a model as it is, without training.

    Args:
        model: the model.
        loader: of the samples.
        labels_N: class of every row of their dataset.
        rows: which samples to return, in this order; of those that cannot be read zeros. None returns all
            that can be read, in any order.
    Raises:
        DataError, NonFiniteError: see `predict`.
    """
    device, num_numbers = model.head.weight.device, model.head.in_features + model.head.out_features
    seen_N, logits_NC, features_ND = predict(
        model, loader, stays_on_device=has_room(device, 4 * num_numbers * len(labels_N), PREDICTIONS_SHARE)
    )
    if rows is not None and not np.array_equal(seen_N.numpy(), rows):
        position_N = np.full(len(labels_N), -1)
        position_N[seen_N.numpy()] = np.arange(len(seen_N))
        found_N = torch.from_numpy(position_N[rows]).to(logits_NC.device)
        logits_NC = logits_NC[found_N].where(found_N[:, None] >= 0, 0)
        features_ND = features_ND[found_N].where(found_N[:, None] >= 0, 0)
        seen_N = torch.from_numpy(rows)
    labels = torch.from_numpy(labels_N)[seen_N].to(logits_NC.device)
    return Predictions(logits_NC, features_ND, labels, model.head.bias is not None)
