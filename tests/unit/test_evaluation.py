"""Accuracy and calibration on a test, against scikit-learn and a loop."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score

from chgval.config import DataConfig
from chgval.data.loader import make_loader
from chgval.data.open import open_dataset
from chgval.training.evaluation import CALIBRATION_BINS, calibration_error, evaluate
from chgval.training.models import InputShape, build_model

CPU = torch.device("cpu")


def test_the_figures_are_those_of_scikit_learn(image_folder):
    dataset = open_dataset(DataConfig(source=str(image_folder)), 64)
    dataset.labels_N[[3, 5]] = -1  # not among the test samples
    loader = make_loader(dataset, batch_size=16, augment="none", device=CPU)
    model = build_model("resnet8", 3, InputShape(12), torch.Generator().manual_seed(0)).eval()
    result = evaluate(model, loader, dataset.labels_N, 3)

    with torch.inference_mode():
        logits_NC = torch.cat([model(batch.inputs_B)[0] for batch in loader.plain_batches()])
    labels_N = dataset.labels_N[dataset.usable_rows()]
    predicted_N = logits_NC.argmax(1)
    assert result.num_samples == len(labels_N) == len(dataset) - 2
    assert result.accuracy == pytest.approx(accuracy_score(labels_N, predicted_N))
    assert result.loss == pytest.approx(log_loss(labels_N, logits_NC.double().softmax(1), labels=[0, 1, 2]))
    recall = recall_score(labels_N, predicted_N, labels=[0, 1], average=None)
    assert result.class_accuracies[:2] == pytest.approx(recall) and np.isnan(result.class_accuracies[2])


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence_N = np.concatenate([rng.uniform(0.1, 1, 200), [1.0, 0.0]])
    right_N = (rng.random(202) < confidence_N**2).astype(np.float64)
    expected = 0.0
    for k in range(CALIBRATION_BINS):
        low, high = k / CALIBRATION_BINS, (k + 1) / CALIBRATION_BINS
        members = [
            i for i, c in enumerate(confidence_N) if low <= c < high or (k == CALIBRATION_BINS - 1 and c == 1)
        ]
        if members:
            gap = abs(confidence_N[members].mean() - right_N[members].mean())
            expected += len(members) / 202 * gap
    assert calibration_error(confidence_N, right_N) == pytest.approx(expected)
