"""Training without the labels that are found wrong, against training on all, by the commands themselves.

    python benchmarks/cleaned_training.py CIFAR10N.parquet --test TEST.parquet --work FOLDER

For every seed: chgval value, detect-noise, select --drop, train on the selected; and chgval train on all.
Both train for the same epochs; with augmentation, which keeps a small model from learning wrong labels by
heart, and without. What is finished stays in FOLDER; a benchmark that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from chgval.files import TRAINING_FILE
from chgval.runs.training_folder import MODEL_FILE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--test", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        values, suspects, subset = (
            options.work / f"{name}-{seed}.parquet" for name in ("values", "suspects", "subset")
        )
        recipe = ["--arch", "resnet8", "--epochs", str(options.epochs), "--seed", str(seed), "-q", "--resume"]
        prepare = [
            (values, ["value", options.data, *recipe, "-o", values]),
            (suspects, ["detect-noise", values, "-q", "-o", suspects]),
            # All that is not flagged: more than there is of it is asked for.
            (subset, ["select", values, "--fraction", "1", "--drop", suspects, "-q", "-o", subset]),
        ]
        for result, arguments in prepare:
            if not result.exists():
                run(arguments)
        for augment in ("crop-flip", "none"):
            accuracies = []
            for name, chosen in (("all", []), ("cleaned", ["--subset", subset])):
                folder = options.work / f"{name}-{augment}-{seed}"
                if not (folder / MODEL_FILE).exists():
                    test = ["--test", options.test, "--test-every", str(options.epochs)]
                    run(["train", options.data, *recipe, *test, "--augment", augment, *chosen, "-o", folder])
                accuracies.append(json.loads((folder / TRAINING_FILE).read_text())["test"]["accuracy"])
            print(f"seed {seed}, {augment}: all {accuracies[0]:.4f}, cleaned {accuracies[1]:.4f}", flush=True)


def run(arguments: list[str | Path]) -> None:
    subprocess.run([sys.executable, "-m", "chgval", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
