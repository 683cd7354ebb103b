"""Training without the labels that are found wrong, against training on all, by the commands themselves.

    python benchmarks/cleaned_training.py CIFAR10N.parquet --test TEST.parquet --work FOLDER

For every seed: chgval value, detect-noise, select --drop, train on the selected; and chgval train on all.
Both train for the same epochs. What is finished stays in FOLDER; a benchmark that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from chgval.runs.training_folder import MODEL_FILE, TRAINING_FILE


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
        test = ["--test", options.test, "--test-every", str(options.epochs)]
        cleaned, on_all = options.work / f"cleaned-{seed}", options.work / f"all-{seed}"
        steps = [
            (values, ["value", options.data, *recipe, "-o", values]),
            (suspects, ["detect-noise", values, "-q", "-o", suspects]),
            # All that is not flagged: more than there is of it is asked for.
            (subset, ["select", values, "--fraction", "1", "--drop", suspects, "-q", "-o", subset]),
            (
                cleaned,
                ["train", options.data, *recipe, *test, "--subset", subset, "-o", cleaned, "--overwrite"],
            ),
            (on_all, ["train", options.data, *recipe, *test, "-o", on_all, "--overwrite"]),
        ]
        for result, arguments in steps:
            if not (result / MODEL_FILE if result.suffix == "" else result).exists():
                subprocess.run([sys.executable, "-m", "chgval", *map(str, arguments)], check=True)
        tests = [json.loads((folder / TRAINING_FILE).read_text())["test"] for folder in (on_all, cleaned)]
        print(f"seed {seed}: all {tests[0]['accuracy']:.4f}, cleaned {tests[1]['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
