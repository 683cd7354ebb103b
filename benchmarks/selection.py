"""Selection while training: every strategy, with and without noise, tested on clean labels.

    python benchmarks/selection.py digits
    python benchmarks/selection.py cifar --train CIFAR10.parquet --test TEST.parquet

The digits are scikit-learn's, 1,497 to train and 300 to test; CIFAR-10 is read from Parquet files of
`image` and `clean_label` (or `label`). With noise, 30 % of the training labels are replaced by others at
random; the test labels are clean. Glister holds out a tenth of the training samples, the others train on
all. Every finished run is a line of the results file, so that a benchmark that was stopped goes on where it
was, and several can run at once. In the end the table of all runs is printed.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from chgval.config import DataConfig, TrainConfig, TrainingConfig, strategies
from chgval.data.dataset import Dataset, PixelImages
from chgval.data.open import open_dataset
from chgval.runs.choosing import Chooser, select_every
from chgval.runs.session import make_trainer, prepare
from chgval.runs.train import hold_out, ready_for, train
from chgval.runs.training_folder import TrainingProgress

NOISE = 0.3
NUM_CLASSES = 10
DIGITS_TESTED = 300
HELD_OUT = 0.1
RESULTS = Path(__file__).parent / "results" / "selection.jsonl"


def read_digits(part: slice) -> Dataset:
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))[part]
    gray = (bunch.images[order] * (255 / 16)).round().astype(np.uint8)
    return Dataset(
        source="digits",
        ids=[str(row) for row in order],
        labels_N=bunch.target[order].astype(np.int64),
        class_names=[str(digit) for digit in range(NUM_CLASSES)],
        content=PixelImages(np.ascontiguousarray(np.repeat(gray[:, None], 3, axis=1))),
        fingerprint="",
        flips=False,
    )


def read_cifar(path: str, column: str, count: int | None) -> Dataset:
    dataset = open_dataset(DataConfig(source=path, label_columns=(column,)), 32)
    return dataset if count is None else dataset.only(np.arange(count))


def with_noise(dataset: Dataset, seed: int) -> Dataset:
    rng = np.random.default_rng([seed, 30])
    rows = dataset.usable_rows()
    flipped = rows[rng.random(len(rows)) < NOISE]
    labels_N = dataset.labels_N.copy()
    labels_N[flipped] = (labels_N[flipped] + rng.integers(1, NUM_CLASSES, len(flipped))) % NUM_CLASSES
    return dataclasses.replace(dataset, labels_N=labels_N)


def run_one(clean: Dataset, tested: Dataset, options, strategy: str, noisy: bool, fraction: float, seed: int):
    """Train once; return what came out."""
    dataset = with_noise(clean, seed) if noisy else clean
    config = TrainingConfig(
        data=DataConfig(source=dataset.source),
        train=TrainConfig(arch="resnet8", epochs=options.epochs, seed=seed),
        strategy=strategy,
        fraction=None if strategy == "full" else fraction,
        select_every=None if strategy == "full" else options.every,
        holdout=HELD_OUT if strategy == "glister" else None,
        test_every=options.epochs,
    )
    held_out = None
    if strategy == "glister":
        dataset, held_out = hold_out(dataset, HELD_OUT, torch.Generator().manual_seed(seed))
    run = prepare(config.data, config.train, dataset)
    chooser = Chooser(run, config, None if held_out is None else ready_for(run, config.data, held_out))
    trainer, training = make_trainer(run, choose=chooser, average=chooser.average), TrainingProgress()
    test = ready_for(run, config.data, tested)
    train(run, trainer.records(), training, config, test=test)
    rows = dataset.usable_rows() if chooser.subset is None else chooser.subset.rows.numpy()
    return {
        "accuracy": training.evaluation.accuracy,
        "wrong": float((dataset.labels_N[rows] != clean.labels_N[rows]).mean()),
        "kept": len(rows),
        "seconds": training.seconds,
        "every": select_every(config, options.epochs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=["digits", "cifar"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one per finished run")
    parser.add_argument("--train", help="CIFAR-10 training images as Parquet")
    parser.add_argument("--test", help="CIFAR-10 test images as Parquet")
    parser.add_argument("--count", type=int, help="use only the first so many training images")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, help="epochs from one choice to the next")
    parser.add_argument("--strategies", nargs="+", default=strategies(), choices=strategies())
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.05, 0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--noise", nargs="+", choices=["noise", "none"], default=["noise", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="draw accuracies there (needs matplotlib)")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    finished = {}
    if options.results.exists():
        for line in options.results.read_text().splitlines():
            entry = json.loads(line)
            finished[json.dumps(entry["run"])] = entry["result"]
    if options.data == "digits":
        clean, tested = read_digits(slice(DIGITS_TESTED, None)), read_digits(slice(DIGITS_TESTED))
    else:
        clean = read_cifar(options.train, "clean_label", options.count)
        tested = read_cifar(options.test, "label", None)

    lines: dict[tuple, list[dict]] = {}
    for noise, fraction, strategy, seed in itertools.product(
        options.noise, options.fractions, options.strategies, options.seeds
    ):
        key = {
            "data": options.data,
            "count": options.count,
            "epochs": options.epochs,
            "every": None if strategy == "full" else options.every,
            "noise": noise,
            "strategy": strategy,
            "fraction": None if strategy == "full" else fraction,
            "seed": seed,
        }
        name = json.dumps(key)
        if name not in finished:
            finished[name] = run_one(clean, tested, options, strategy, noise == "noise", fraction, seed)
            with options.results.open("a") as file:
                file.write(json.dumps({"run": key, "result": finished[name]}) + "\n")
        result = finished[name]
        lines.setdefault((noise, fraction, strategy), []).append(result)
        print(f"{name} accuracy {result['accuracy']:.4f} wrong {result['wrong']:.3f}", flush=True)

    for noise in options.noise:
        print_table(noise, options.fractions, options.strategies, lines)
    if options.plot:
        draw(options.plot, options.noise, options.fractions, options.strategies, lines)


def print_table(noise: str, fractions, strategies, lines) -> None:
    """Print a Markdown table: per cent right (lowest to highest), and per cent of the last choice wrong."""
    print(f"\n| {noise} | " + " | ".join(f"{fraction:g}" for fraction in fractions) + " |")
    print("|---" * (len(fractions) + 1) + "|")
    for strategy in strategies:
        cells = [strategy]
        for fraction in fractions:
            results = lines[noise, fraction, strategy]
            accuracies = [100 * result["accuracy"] for result in results]
            wrong = 100 * np.mean([result["wrong"] for result in results])
            spread = f" ({min(accuracies):.1f} to {max(accuracies):.1f})"
            cells.append(
                f"{np.mean(accuracies):.1f}{spread}" + (f"; {wrong:.0f}" if noise == "noise" else "")
            )
        print("| " + " | ".join(cells) + " |")


def draw(path: Path, noises: list[str], fractions: list[float], strategies, lines) -> None:
    """Draw accuracy over the fraction: a panel without and with noise, mean and spread of the seeds."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(noises), figsize=(5 * len(noises), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, noise in zip(panels[0], noises, strict=True):
        for k, strategy in enumerate(strategies):
            accuracies = [[100 * r["accuracy"] for r in lines[noise, f, strategy]] for f in fractions]
            mean = [np.mean(values) for values in accuracies]
            colour = "black" if strategy in ("full", "auto") else f"C{(k - 1) % 10}"
            style = {"linestyle": ":"} if strategy == "full" else {"marker": "o", "markersize": 3}
            panel.plot(fractions, mean, label=strategy, color=colour, **style)
            low, high = [min(values) for values in accuracies], [max(values) for values in accuracies]
            panel.fill_between(fractions, low, high, color=colour, alpha=0.1, linewidth=0)
        title = "30 % of the labels wrong" if noise == "noise" else "no label wrong"
        panel.set(xlabel="fraction trained on", title=title)
    panels[0][0].set(ylabel="test accuracy, %")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
