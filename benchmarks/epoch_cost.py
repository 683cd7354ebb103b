"""What valuing adds to the time of an epoch: online and exact against the same training without values.

    python benchmarks/epoch_cost.py DATA [--arch resnet8] [--epochs 6]

Three runs of the same recipe take turns, one epoch each, in one process; the medians of their epochs are
compared. The first round warms up and is not counted. Bars: online at most 1.05, exact at most 1.45.
"""

import argparse
import statistics
import time

import torch

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.runs.session import make_trainer, make_valuing, prepare, read_dataset
from chgval.training.records import EpochRecord

MODES = ("none", "online", "exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--features-column")
    options = parser.parse_args()

    runs = {}
    for mode in MODES:
        config = ValueConfig(
            data=DataConfig(source=options.data, features_column=options.features_column),
            train=TrainConfig(arch=options.arch, epochs=options.epochs + 1),
            mode="online" if mode == "none" else mode,
        )
        run = prepare(config.data, config.train, read_dataset(config.data, config.train))
        trainer = make_trainer(run) if mode == "none" else make_valuing(run, config)[2]
        runs[mode] = trainer.records()

    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(options.epochs + 1):
        for offset in range(len(MODES)):
            mode = MODES[(turn + offset) % len(MODES)]
            started = time.perf_counter()
            while not isinstance(next(runs[mode]), EpochRecord):
                pass
            if turn:
                times[mode].append(time.perf_counter() - started)

    print(
        f"{options.data}, {options.arch}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.epochs} epochs each"
    )
    reference = statistics.median(times["none"])
    for mode, bar in zip(MODES, (1.0, 1.05, 1.45), strict=True):
        median = statistics.median(times[mode])
        # Each turn's epochs ran next to each other, so their ratio does not see the machine drift.
        ratio = statistics.median(a / b for a, b in zip(times[mode], times["none"], strict=True))
        share = median / reference
        print(f"{mode:<7} {median:8.3f} s  {share:5.3f} x  paired {ratio:5.3f} x  (bar {bar:.2f})")


if __name__ == "__main__":
    main()
