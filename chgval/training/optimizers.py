"""How a step changes the weights: on the device alone, so that it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from chgval.training.recipe import Recipe
from chgval.types import State

# Devices whose torch has one kernel for all of a step.
FUSED = ("cpu", "cuda")
# Of the loss in float16: as torch.amp.GradScaler begins, and how it moves.
FIRST_SCALE, GROWTH, BACKOFF, STEPS_BEFORE_GROWTH = 2.0**16, 2.0, 0.5, 2000


class NesterovSGD:
    """Stochastic gradient descent with Nesterov momentum, in all weights at once.

    It is torch's own, without the object around it: making a torch.optim.Optimizer loads torch.compile,
    which takes longer than loading torch.

    Args:
        parameters: weights to train; those without a gradient stay as they are.
        recipe: momentum and weight decay.
        device: where the weights lie.
    Attributes:
        lr: learning rate of the next step, on the device, shape ().
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe, device: torch.device) -> None:
        self._parameters = list(parameters)
        # Here, not at the first step: no step takes memory that an earlier one did not.
        self._momenta = [torch.zeros_like(parameter, requires_grad=False) for parameter in self._parameters]
        self._momentum = recipe.momentum
        self._weight_decay = recipe.weight_decay
        self._is_fused = device.type in FUSED
        self.lr = torch.zeros((), device=device)

    def clear_gradients(self) -> None:
        """Free all gradients, before those of the next step are added up."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, scale: LossScale | None = None) -> None:
        """Move the weights against their gradients.

        Args:
            scale: by which the loss was multiplied. Where a gradient is then NaN or infinite, the weights
                stay as they are.
        """
        moved = [
            (parameter, _laid_out_as(parameter, gradient), momentum)
            for parameter, momentum in zip(self._parameters, self._momenta, strict=True)
            if (gradient := parameter.grad) is not None
        ]
        parameters, gradients, momenta = (list(tensors) for tensors in zip(*moved, strict=True))
        found_inf = None if scale is None else scale.unscale(gradients)
        sgd(
            parameters,
            gradients,
            momenta,
            foreach=not self._is_fused,
            fused=self._is_fused,
            found_inf=found_inf,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self.lr,
            dampening=0,
            nesterov=True,
            maximize=False,
        )
        if scale is not None and found_inf is not None:
            scale.update(found_inf)

    def state_dict(self) -> State:
        """Return what another optimizer of the same weights needs to resume."""
        return {str(number): momentum for number, momentum in enumerate(self._momenta)}

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another optimizer of the same weights."""
        for momentum, kept in zip(self._momenta, state.values(), strict=True):
            momentum.copy_(kept)


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the strides of its weights: fused kernels on CUDA devices refuse others.

    Autograd keeps strides alike, but for sides of one, as those of 1x1 convolutions are; torch.compile
    gives these others.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class LossScale:
    """What the loss is multiplied by, so that small gradients are not lost in float16.

    It halves when a gradient overflows, and doubles when none did for a long time. These are the operations
    of torch.amp.GradScaler, which waits for the device where its optimizer is not one of torch.optim.

    Args:
        device: where the weights lie.
    Attributes:
        value: float32, shape ().
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST_SCALE, device=device)
        self._steps_since = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor]) -> Tensor:
        """Divide gradients by the scale; return 1 where one of them is NaN or infinite, else 0."""
        found_inf = torch.zeros((), device=self.value.device)
        inverse = self.value.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
        return found_inf

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale to what a step found."""
        torch._amp_update_scale_(
            self.value, self._steps_since, found_inf, GROWTH, BACKOFF, STEPS_BEFORE_GROWTH
        )

    def state_dict(self) -> State:
        """Return what another scale needs to resume."""
        return {"value": self.value, "steps_since": self._steps_since}

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another."""
        self.value.copy_(state["value"])
        self._steps_since.copy_(state["steps_since"])
