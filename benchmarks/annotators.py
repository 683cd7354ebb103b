"""Labels of several annotators: consensus, scores of single labels and rates, beside cleanlab's.

    pip install cleanlab
    python benchmarks/annotators.py --images CIFAR10N.parquet --embeddings EMBEDDINGS.parquet --work FOLDER

Files as in verdicts.py; the network is linear, on embeddings. Annotators are made: "alike" ones mistake an
image for what it resembles, the more often the less plain it is; "even" ones at random; of "few" each
labelled 2 % of the images. "human" takes one annotator's labels from the file, and makes two more that agree
with its `worse_label` (the worst of three). cleanlab gets five-fold probabilities of the same network and
recipe, trained on the same majority. Takes about four minutes on 2 CPU cores.
"""

import argparse
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from verdicts import NUM_CLASSES, calibration_error, fold_probabilities, parser_of_files

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.detection.evidence import LeftOutGaussians
from chgval.runs.session import read_dataset
from chgval.runs.unfinished import Unfinished
from chgval.runs.value import value_dataset

CROWDS = ("human", "alike", "even", "few")


def make_crowd(kind: str, rows: pa.Table, embeddings_ND: np.ndarray) -> np.ndarray:
    """Return the label that each annotator gave, shape (N, A); -1 for none."""
    rng = np.random.default_rng([0, *kind.encode()])
    human_N, worse_N, clean_N = (rows[name].to_numpy() for name in ("label", "worse_label", "clean_label"))
    gaussians = LeftOutGaussians(torch.from_numpy(embeddings_ND), torch.from_numpy(clean_N), NUM_CLASSES)
    logs_NC = gaussians.log_probabilities().astype(np.float64)

    def alike(rate):
        plain_N = np.exp(logs_NC[np.arange(len(clean_N)), clean_N])
        hard_N = np.sqrt(1 - plain_N)
        others_NC = np.exp(0.3 * logs_NC)
        others_NC[np.arange(len(clean_N)), clean_N] = 0
        others_NC /= others_NC.sum(1, keepdims=True)
        other_N = (others_NC.cumsum(1) > rng.random((len(clean_N), 1))).argmax(1)
        return np.where(rng.random(len(clean_N)) < rate * hard_N / hard_N.mean(), other_N, clean_N)

    def even(rate):
        other_N = (clean_N + rng.integers(1, NUM_CLASSES, len(clean_N))) % NUM_CLASSES
        return np.where(rng.random(len(clean_N)) < rate, other_N, clean_N)

    match kind:
        case "alike":
            return np.stack([alike(rate) for rate in (0.1, 0.18, 0.3)], 1)
        case "even":
            return np.stack([even(rate) for rate in (0.05, 0.2, 0.4)], 1)
        case "few":
            labels_NA = np.stack([alike(rate) for rate in np.linspace(0.03, 0.5, 150)], 1)
            return np.where(rng.random(labels_NA.shape) < 0.02, labels_NA, -1)
    # One of the others is the worst wherever the first is not, and a few agree with what is wrong.
    also_N = np.where(rng.random(len(clean_N)) < 0.15, worse_N, clean_N)
    is_first_N = (worse_N != clean_N) & (human_N == worse_N)
    pair_N2 = np.stack([np.where(is_first_N, also_N, worse_N), also_N], 1)
    return np.concatenate([human_N[:, None], rng.permuted(pair_N2, axis=1)], 1)


def measure(kind: str, options: argparse.Namespace) -> None:
    """Value a crowd's labels, and print how good consensus, scores and rates are."""
    embeddings = pq.read_table(options.embeddings, columns=["embedding"])
    rows = pq.read_table(options.images, columns=["label", "worse_label", "clean_label"]).slice(
        0, len(embeddings)
    )
    clean_N = rows["clean_label"].to_numpy()
    labels_NA = make_crowd(kind, rows, np.stack(embeddings["embedding"].to_numpy()).astype(np.float32))
    names = tuple(f"a{number}" for number in range(labels_NA.shape[1]))
    path = options.work / f"annotators-{kind}.parquet"
    given = dict(zip(names, labels_NA.T, strict=True))
    pq.write_table(pa.table({"embedding": embeddings["embedding"], **given}), path, row_group_size=1000)

    data = DataConfig(source=str(path), label_columns=names, features_column="embedding")
    config = ValueConfig(data=data, train=TrainConfig(arch="linear", epochs=15))
    started = time.perf_counter()
    dataset = read_dataset(config.data, config.train)
    table = value_dataset(config, dataset, None, Unfinished()).report.table
    seconds = time.perf_counter() - started
    said_N = dataset.labels_N >= 0
    scores_NA = np.stack([table[f"noise_score_of_{name}"].to_numpy() for name in names], 1)
    rate = np.nanmean(table["noise_score"].to_numpy())
    truth = (dataset.labels_N != clean_N)[said_N].mean()
    print(f"{kind}: majority wrong {truth:.1%}, chgval says {rate:.1%}, in {seconds:.0f} s")
    if labels_NA.shape[1] <= 10:
        wrong_A = (labels_NA != clean_N[:, None]).mean(0)
        pairs = zip(wrong_A, np.nanmean(scores_NA, 0), strict=True)
        print("  annotators wrong, found: " + ", ".join(f"{true:.1%} {found:.1%}" for true, found in pairs))

    def show(who, label_N, probability_N, scores_NA):
        right_N, given_NA = label_N == clean_N[said_N], labels_NA[said_N]
        score = scores_NA[given_NA >= 0]
        wrong = (given_NA != clean_N[said_N, None])[given_NA >= 0]
        print(
            f"  {who:<8} consensus right {right_N.mean():.4f}, its calibration error "
            f"{calibration_error(probability_N, right_N):.3f}; labels: AUROC "
            f"{roc_auc_score(wrong, score):.4f}, average precision "
            f"{average_precision_score(wrong, score):.4f}, calibration error "
            f"{calibration_error(score, wrong):.3f}",
            flush=True,
        )

    consensus_N, probability_N = (
        table[f"consensus_{name}"].to_numpy()[said_N] for name in ("label", "probability")
    )
    show("chgval", consensus_N, probability_N, scores_NA[said_N])

    from cleanlab.multiannotator import get_label_quality_multiannotator

    probabilities_NC = fold_probabilities(config, dataset.only(np.flatnonzero(said_N)))[said_N]
    frame = pd.DataFrame(np.where(labels_NA[said_N] >= 0, labels_NA[said_N], np.nan))
    peer = get_label_quality_multiannotator(frame, probabilities_NC, verbose=False)
    quality, each = peer["label_quality"], peer["detailed_label_quality"].to_numpy()
    show(
        "cleanlab",
        quality["consensus_label"].to_numpy(),
        quality["consensus_quality_score"].to_numpy(),
        1 - each,
    )


def main() -> None:
    options = parser_of_files(__doc__).parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for kind in CROWDS:
        measure(kind, options)


if __name__ == "__main__":
    main()
