"""The default: a part of what is probably labelled right, drawn anew each time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chgval.noise import read_noise
from chgval.strategies.base import Choice, Question, strategy

# Nothing is left out before this share of the epochs: wrong and not yet learned still look alike.
WARM_UP = 0.1
# How much is left out, as a share of the estimated noise: at first and in the end, rising between these
# shares of the epochs. The surer the model, the fewer of its suspects are samples that it has yet to learn.
LEFT_OUT, LEFT_OUT_LAST = 0.55, 1.0
RISE = (0.4, 0.7)
# How much of earlier passes stays in the average of predictions from one pass to the next.
REMEMBERED = 0.8
# Of the squared weights in the fit of the last layer, per sample, where features vary by 1.
RIDGE = 0.01
SMALLEST_PROBABILITY = 1e-3
# Rows worked on at a time in the fit.
CHUNK_ROWS = 4096


@strategy("auto", averages_weights=True)
def choose(question: Question) -> Choice:
    """Draw within each class from all samples but the most suspicious.

    Suspicion is the noise score of `chgval detect-noise`, of what the moving average of the weights predicted
    in all passes so far, recent ones counting more: by its own last layer, and by one that is fitted to the
    labels of all other samples, which is the better judge until the last layer is trained.
    """
    draw_N = torch.rand(len(question.labels_N), generator=question.generator).double().numpy()
    progress = (question.epoch - 1) / question.num_epochs
    if progress < WARM_UP:
        return Choice(question.highest_of_each_class(torch.from_numpy(draw_N)))
    samples = question.run_averaged_pass()
    left_out_NC = left_out_probabilities(samples.features_ND, samples.labels_N, question.num_classes)
    probabilities_NC = (samples.logits_NC.softmax(1) + left_out_NC) / 2
    memory = question.memory
    memory["sum"] = REMEMBERED * memory.get("sum", torch.zeros(())) + probabilities_NC
    memory["weight"] = REMEMBERED * memory.get("weight", torch.zeros(())) + 1
    averaged_NC = (memory["sum"] / memory["weight"]).numpy()
    times_seen = max(1, round((question.epoch - 1) * question.count / len(draw_N)))
    score_N = read_noise(averaged_NC, question.labels_N.numpy(), times_seen).noise_score_N
    expected_wrong = score_N.sum()
    num_left_out = int(np.interp(progress, RISE, (LEFT_OUT, LEFT_OUT_LAST)) * expected_wrong)
    # They come last: where a class has too few others, the least suspicious fill its share.
    left_out = np.argsort(-score_N, kind="stable")[:num_left_out]
    draw_N[left_out] = -score_N[left_out]
    return Choice(question.highest_of_each_class(torch.from_numpy(draw_N)))


def left_out_probabilities(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Predict every sample by a ridge regression on the labels of all others, in one fit.

    Args:
        features_ND: last-layer inputs, shape (N, D).
        labels_N: classes, shape (N,).
        num_classes: C.
    Returns:
        Probabilities, float32, shape (N, C): predictions cut off at SMALLEST_PROBABILITY, that sum to 1.
    Source: left out, a sample has its residual over 1 minus its leverage (Allen 1974, Technometrics 16:1).
    """
    num_samples, width = features_ND.shape
    features = torch.split(features_ND, CHUNK_ROWS)
    mean_D, deviation_D = features_ND.new_zeros(2, width, dtype=torch.float64)
    for features_BD in features:
        mean_D += features_BD.double().sum(0) / num_samples
    for features_BD in features:
        deviation_D += (features_BD.double() - mean_D).square().sum(0) / num_samples
    deviation_D.sqrt_()
    # What varies less than float32 can say is constant.
    deviation_D[deviation_D <= 1e-7 * mean_D.abs()] = 1.0
    share_C = torch.bincount(labels_N, minlength=num_classes).double() / num_samples

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for features_BD, labels_B in zip(features, torch.split(labels_N, CHUNK_ROWS), strict=True):
            targets_BC = functional.one_hot(labels_B, num_classes) - share_C
            yield (features_BD.double() - mean_D) / deviation_D, targets_BC

    matrix_DD = RIDGE * num_samples * torch.eye(width, dtype=torch.float64)
    products_DC = torch.zeros(width, num_classes, dtype=torch.float64)
    for inputs_BD, targets_BC in chunks():
        matrix_DD += inputs_BD.T @ inputs_BD
        products_DC += inputs_BD.T @ targets_BC
    inverse_DD = torch.linalg.inv(matrix_DD)
    weights_DC = inverse_DD @ products_DC
    predictions = []
    for inputs_BD, targets_BC in chunks():
        leverage_B1 = ((inputs_BD @ inverse_DD) * inputs_BD).sum(1, keepdim=True) + 1 / num_samples
        residuals_BC = targets_BC - inputs_BD @ weights_DC
        left_out_BC = share_C + targets_BC - residuals_BC / (1 - leverage_B1)
        predictions.append(left_out_BC.clamp(SMALLEST_PROBABILITY, 1).float())
    probabilities_NC = torch.cat(predictions)
    return probabilities_NC / probabilities_NC.sum(1, keepdim=True)
