"""How a step changes the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from chgval.training.recipe import Recipe
from chgval.types import State


class NesterovSGD:
    """Stochastic gradient descent with Nesterov momentum, in all weights at once.

    It is torch's own, without the object around it: making a torch.optim.Optimizer loads torch.compile,
    which takes longer than loading torch.

    Args:
        parameters: weights to train; those without a gradient stay as they are.
        recipe: momentum and weight decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe) -> None:
        self._parameters = list(parameters)
        self._momenta: list[Tensor | None] = [None] * len(self._parameters)
        self._momentum = recipe.momentum
        self._weight_decay = recipe.weight_decay

    def clear_gradients(self) -> None:
        """Free all gradients, before those of the next step are added up."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the weights against their gradients, at this learning rate."""
        moved = [number for number, parameter in enumerate(self._parameters) if parameter.grad is not None]
        momenta = [self._momenta[number] for number in moved]
        sgd(
            [self._parameters[number] for number in moved],
            [gradient for parameter in self._parameters if (gradient := parameter.grad) is not None],
            momenta,
            foreach=True,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=lr,
            dampening=0,
            nesterov=True,
            maximize=False,
        )
        for number, momentum in zip(moved, momenta, strict=True):
            self._momenta[number] = momentum

    def state_dict(self) -> State:
        """Return what another optimizer of the same weights needs to resume."""
        return {str(number): momentum for number, momentum in enumerate(self._momenta)}

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another optimizer of the same weights."""
        self._momenta = [
            None if momentum is None else torch.empty_like(parameter, requires_grad=False).copy_(momentum)
            for parameter, momentum in zip(self._parameters, state.values(), strict=True)
        ]
