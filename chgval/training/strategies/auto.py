"""The default: a part of what is probably labelled right, drawn anew each time."""

import numpy as np
import torch

from chgval.detection.scores import score_labels
from chgval.training.strategies.base import Choice, Question, strategy

# Nothing is left out before this share of the epochs: wrong and not yet learned still look alike.
WARM_UP = 0.1
# How much is left out, as a share of the estimated noise: at first and in the end, rising between these
# shares of the epochs. The surer the model, the fewer of its suspects are samples that it has yet to learn.
LEFT_OUT, LEFT_OUT_LAST = 0.55, 1.0
RISE = (0.4, 0.7)
# From this share of the epochs on, more is left out than is wrong: scores of what is wrong and what is hard
# overlap, and steps are small by then, so that little is lost by leaving out what is hard.
FINAL, LEFT_OUT_FINAL = 0.9, 1.8
# How much of earlier passes stays in the average of predictions from one pass to the next.
REMEMBERED = 0.8


@strategy(averages_weights=True)
def choose(question: Question) -> Choice:
    """Draw within each class from all samples but the most suspicious.

    Suspicion is the noise score of `chgval detect-noise`, of what the moving average of the weights predicted
    in all passes so far, recent ones counting more, and of its last-layer inputs in this one.
    """
    draw_N = torch.rand(len(question.labels_N), generator=question.generator).double().numpy()
    progress = (question.epoch - 1) / question.num_epochs
    if progress < WARM_UP:
        return Choice(question.highest_of_each_class(torch.from_numpy(draw_N)))
    samples = question.predict_averaged()
    memory = question.memory
    kept = memory.get("sum", torch.zeros(())).to(samples.logits_NC.device)
    memory["sum"] = REMEMBERED * kept + samples.logits_NC.softmax(1)
    memory["weight"] = REMEMBERED * memory.get("weight", torch.zeros(())) + 1
    averaged_NC = (memory["sum"] / memory["weight"]).cpu().numpy()
    noise = score_labels(question.labels_N.numpy(), averaged_NC, samples.features_ND.cpu(), quick=True)
    score_N = noise.noise_score_N
    share = LEFT_OUT_FINAL if progress >= FINAL else np.interp(progress, RISE, (LEFT_OUT, LEFT_OUT_LAST))
    num_left_out = int(share * score_N.sum())
    # They come last: where a class has too few others, the least suspicious fill its share.
    left_out = np.argsort(-score_N, kind="stable")[:num_left_out]
    draw_N[left_out] = -score_N[left_out]
    return Choice(question.highest_of_each_class(torch.from_numpy(draw_N)))
