"""Wrong labels found by one run of chgval, against cleanlab on five-fold cross-validated probabilities.

    pip install cleanlab
    python benchmarks/detection.py CIFAR10N.parquet --work FOLDER [--only human-15 none-15] [--seeds 0 1 2]

Both train the same architecture by the same recipe on the same labels; cleanlab's folds get the moving
average of the weights too. The Parquet file holds `image`, a human `label` and `clean_label`; the latter only
makes the noise and measures. Every finished piece stays in FOLDER, so that a run that was stopped goes on
where it was. The table of all pieces there are is printed at the end. On 2 CPU cores everything takes about
three hours. `--reliability FILE.png` (needs matplotlib) draws how often labels of each score are wrong.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.console import Console
from chgval.data.digits import read_digits
from chgval.data.loader import make_loader
from chgval.models import InputShape, build_model
from chgval.runs.value import prepare, read_dataset
from chgval.training import Trainer, WeightAverage, observe

ARCH = "resnet8"
NUM_FOLDS = 5
NUM_CLASSES = 10
# Of the noise score, where its calibration is measured.
NUM_BINS = 10
# cat <-> dog, truck <-> automobile, deer <-> horse, bird <-> airplane
PARTNERS = {3: 5, 5: 3, 9: 1, 1: 9, 4: 7, 7: 4, 2: 0, 0: 2}
SETTINGS = (
    "human-15", "pairs-15", "symmetric10-15", "symmetric30-15", "none-15", "imbalanced-15", "digits-15",
    "uneven-15", "human-45", "symmetric30-45",
)  # fmt: skip
CLEANLAB_FILTERS = (
    "prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given",
)  # fmt: skip


def noisy_labels(noise: str, human_N, clean_N):
    """Return the rows to use and the label of each; the noise is always the same."""
    rng = np.random.default_rng([0, *noise.encode()])
    rows = np.arange(len(clean_N))
    if noise in ("human", "digits"):
        return rows, human_N
    if noise == "imbalanced":  # classes shrink from all their images to a tenth of them, at random
        shares = 10 ** -np.linspace(0, 1, NUM_CLASSES)
        kept = [
            rng.permutation(np.flatnonzero(clean_N == label))[: round(share * (clean_N == label).sum())]
            for label, share in zip(rng.permutation(NUM_CLASSES), shares, strict=True)
        ]
        rows = np.sort(np.concatenate(kept))
    labels_N = clean_N[rows].copy()
    # uneven: every class has its own rate, from 0 to twice the mean
    rates_C = {
        "none": np.zeros(NUM_CLASSES),
        "symmetric10": np.full(NUM_CLASSES, 0.1),
        "symmetric30": np.full(NUM_CLASSES, 0.3),
        "imbalanced": np.full(NUM_CLASSES, 0.15),
        "uneven": rng.permutation(np.linspace(0, 0.3, NUM_CLASSES)),
        "pairs": np.where(
            np.isin(np.arange(NUM_CLASSES), list(PARTNERS)), 0.2 * NUM_CLASSES / len(PARTNERS), 0
        ),
    }[noise]
    flipped = np.flatnonzero(rng.random(len(rows)) < rates_C[labels_N])
    if noise == "pairs":
        labels_N[flipped] = [PARTNERS[label] for label in labels_N[flipped]]
    else:
        labels_N[flipped] = (labels_N[flipped] + rng.integers(1, NUM_CLASSES, len(flipped))) % NUM_CLASSES
    return rows, labels_N


def write_data(noise: str, source: str, folder: Path) -> tuple[str, np.ndarray]:
    """Write the dataset without the truth; return what to read, and the truth."""
    if noise == "digits":
        return "builtin:digits", load_digits().target
    table = pq.read_table(source)
    rows, labels_N = noisy_labels(noise, table["label"].to_numpy(), table["clean_label"].to_numpy())
    path = folder / f"{noise}.parquet"
    if not path.exists():
        data = pa.table({"image": table["image"].take(rows), "label": labels_N})
        pq.write_table(data.replace_schema_metadata(None), path, row_group_size=1000)
    return str(path), table["clean_label"].to_numpy()[rows]


def run_ours(data: str, epochs: int, seed: int, output: Path) -> None:
    """Run the commands as a user does, and keep what they say of every row."""
    started = time.perf_counter()
    values = output.with_suffix(".values.parquet")
    settings = ["--arch", ARCH, "--epochs", str(epochs), "--seed", str(seed)]
    probabilities = ["--pred-probs", str(output.with_suffix(".npy"))]
    chgval = [sys.executable, "-m", "chgval"]
    subprocess.run(
        [*chgval, "value", data, "--overwrite", "-o", str(values), *settings, *probabilities], check=True
    )
    subprocess.run(
        [*chgval, "detect-noise", str(values), "--all", "--overwrite", "-o", str(output)], check=True
    )
    output.with_suffix(".json").write_text(json.dumps({"seconds": time.perf_counter() - started}))


def run_fold(data: str, epochs: int, seed: int, fold: int, output: Path) -> None:
    """Train without one fold, predict it, with the last weights and with their moving average."""
    config = ValueConfig(
        data=DataConfig(source=data), train=TrainConfig(arch=ARCH, epochs=epochs, seed=seed), mode="none"
    )
    run = prepare(
        config, read_dataset(config, Console(quiet=True))
    )  # the recipe is that of the whole dataset
    labels_N = run.dataset.labels_N
    splits = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(labels_N, labels_N)
    train_rows, held_rows = list(splits)[fold]

    def loader_of(rows):
        return make_loader(
            run.dataset.only(rows),
            batch_size=run.recipe.batch_size,
            augment=run.recipe.augment,
            device=run.device,
        )

    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed * NUM_FOLDS + fold)
    shape = InputShape(run.dataset.input_size, is_embedding=False)
    model = build_model(ARCH, run.dataset.num_classes, shape, generator, None)
    model.to(memory_format=torch.channels_last)
    loader, held = loader_of(train_rows), loader_of(held_rows)
    average = WeightAverage(model, epochs * loader.num_batches(loader.rows))
    trainer = Trainer(model, loader, run.recipe, device=run.device, generator=generator, average=average)
    for _ in trainer.records():
        pass
    probabilities = {
        "last": np.zeros((len(labels_N), NUM_CLASSES)),
        "average": np.zeros((len(labels_N), NUM_CLASSES)),
    }

    def take(name, share):
        def add(indices_B, logits_BC, _):
            probabilities[name][indices_B.numpy()] += share * logits_BC.double().softmax(1).numpy()

        return add

    observe(model, held, take("last", 1))
    mirrorings = [False, True] if run.dataset.flips else [False]
    for mirrored in mirrorings:
        observe(average.model, held, take("average", 1 / len(mirrorings)), mirrored=mirrored)
    np.savez(output, rows=held_rows, seconds=time.perf_counter() - started, **probabilities)


def measure(score_N, flagged_N, suggested_N, labels_N, clean_N) -> dict[str, float]:
    wrong_N = labels_N != clean_N
    caught = (flagged_N & wrong_N).sum()
    return {
        "auroc": roc_auc_score(wrong_N, score_N) if wrong_N.any() else np.nan,
        "ap": average_precision_score(wrong_N, score_N) if wrong_N.any() else np.nan,
        "f1": 2 * caught / (flagged_N.sum() + wrong_N.sum()) if wrong_N.any() else np.nan,
        "flagged": flagged_N.mean(),
        "suggested": (suggested_N == clean_N)[flagged_N & wrong_N].mean() if caught else np.nan,
        "noise": wrong_N.mean(),
    }


def sums_by_score(score_N, *figures_N) -> list[np.ndarray]:
    """Return sums of figures over the samples in each of NUM_BINS equal bins of the score."""
    bin_N = (score_N * NUM_BINS).astype(int).clip(0, NUM_BINS - 1)
    return [np.bincount(bin_N, figure_N, minlength=NUM_BINS) for figure_N in figures_N]


def calibration_error(score_N, wrong_N) -> float:
    """Expected calibration error: mean distance of score and truth over equal bins of the score."""
    (gaps,) = sums_by_score(score_N, score_N - wrong_N)
    return np.abs(gaps).sum() / len(score_N)


def draw_reliability(path: Path, runs: list[Path], labels_N, clean_N) -> None:
    """Draw the share of wrong labels over the noise score, and how many labels have that score."""
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(5, 5.5), height_ratios=[3, 1], layout="constrained"
    )
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    for run in runs:
        score_N = pq.read_table(run).sort_by("index")["noise_score"].to_numpy()
        sizes, scores, wrong = sums_by_score(score_N, np.ones_like(score_N), score_N, labels_N != clean_N)
        seed = run.stem.rsplit("-", 1)[1]
        (line,) = upper.plot(scores / sizes, wrong / sizes, marker="o", markersize=4, label=f"seed {seed}")
        lower.stairs(sizes, np.linspace(0, 1, NUM_BINS + 1), color=line.get_color())
    upper.set(ylabel="share of wrong labels", xlim=(0, 1), ylim=(0, 1))
    upper.legend(loc="upper left")
    lower.set(xlabel="noise_score", ylabel="labels", yscale="log", ylim=(100, 10_000))
    lower.set_yticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
    lower.minorticks_off()
    figure.savefig(path, dpi=120)


def read_ours(path: Path, labels_N, clean_N) -> dict[str, float]:
    table = pq.read_table(path).sort_by("index")
    score_N = table["noise_score"].to_numpy()
    result = measure(
        score_N, table["flagged"].to_numpy(), table["suggested_label"].to_numpy(), labels_N, clean_N
    )
    metadata = json.loads(table.schema.metadata[b"chgval"])
    seconds = json.loads(path.with_suffix(".json").read_text())["seconds"]
    calibration = calibration_error(score_N, labels_N != clean_N)
    return {**result, "rate": metadata["noise_rate"]["rate"], "calibration": calibration, "seconds": seconds}


def read_cleanlab(paths: list[Path], labels_N, clean_N) -> dict[str, dict[str, float]]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    folds = [np.load(path) for path in paths]
    seconds = sum(float(fold["seconds"]) for fold in folds)
    results = {}
    for weights in ("last", "average"):
        probabilities_NC = sum(fold[weights] for fold in folds)
        masked_NC = probabilities_NC.copy()
        masked_NC[np.arange(len(labels_N)), labels_N] = -1
        score_N = 1 - get_label_quality_scores(labels_N, probabilities_NC)
        for name in CLEANLAB_FILTERS:
            flagged_N = find_label_issues(labels_N, probabilities_NC, filter_by=name, n_jobs=1)
            result = measure(score_N, flagged_N, masked_NC.argmax(1), labels_N, clean_N)
            results[f"cleanlab, {weights} weights, {name}"] = {**result, "seconds": seconds}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="CIFAR-10N as Parquet")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--cleanlab-seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    parser.add_argument("--reliability", type=Path, metavar="PNG", help="draw the first setting's scores")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    results = {}
    for setting in options.only:
        noise, epochs = setting.rsplit("-", 1)
        data, clean_N = write_data(noise, options.data, options.work)
        if noise == "digits":
            labels_N = read_digits().labels_N
        else:
            labels_N = pq.read_table(data, columns=["label"])["label"].to_numpy()
        for seed in options.seeds:
            path = options.work / f"{setting}-ours-{seed}.parquet"
            if not path.with_suffix(".json").exists() and not options.table:
                run_ours(data, int(epochs), seed, path)
            if path.with_suffix(".json").exists():
                results[setting, f"chgval, seed {seed}"] = read_ours(path, labels_N, clean_N)
        if options.reliability and setting == options.only[0]:
            runs = [options.work / f"{setting}-ours-{seed}.parquet" for seed in options.seeds]
            draw_reliability(options.reliability, runs, labels_N, clean_N)
        for seed in options.cleanlab_seeds:
            paths = [options.work / f"{setting}-fold-{seed}-{fold}.npz" for fold in range(NUM_FOLDS)]
            for fold, path in enumerate(paths):
                if not path.exists() and not options.table:
                    run_fold(data, int(epochs), seed, fold, path)
            if all(path.exists() for path in paths):
                for name, result in read_cleanlab(paths, labels_N, clean_N).items():
                    results[setting, name] = result

    columns = ("auroc", "ap", "f1", "flagged", "suggested", "noise", "rate", "calibration", "seconds")
    print(f"{'setting':<15} {'method':<44}", *(f"{column:>11}" for column in columns))
    for (setting, method), result in results.items():
        figures = (f"{result[column]:11.4f}" if column in result else " " * 11 for column in columns)
        print(f"{setting:<15} {method:<44}", *figures)


if __name__ == "__main__":
    main()
