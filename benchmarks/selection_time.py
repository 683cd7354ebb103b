"""Time of training on a part that is chosen on the way, against training on everything.

    python benchmarks/selection_time.py CIFAR10.parquet [--strategies chg ...]

Of every fraction F the bar is 1.15 (F + 1 / (3 R)): a pass without training, every R epochs, costs a third of
a training epoch. Runs of all kinds are interleaved; the ratio is that of the medians.
"""

import argparse
from statistics import median

from chgval.config import DataConfig, TrainConfig, TrainingConfig
from chgval.data.open import open_dataset
from chgval.runs.choosing import Chooser
from chgval.runs.session import make_trainer, prepare
from chgval.runs.train import train
from chgval.runs.training_folder import TrainingProgress

SLACK = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--strategies", nargs="+", default=["chg"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset(DataConfig(source=options.data), 32)
    kinds = [("full", None), *((name, f) for f in options.fractions for name in options.strategies)]
    seconds: dict[tuple[str, float | None], list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.repetitions):
        for strategy, fraction in kinds:
            config = TrainingConfig(
                data=DataConfig(source=options.data),
                train=TrainConfig(arch="resnet8", epochs=options.epochs),
                strategy=strategy,
                fraction=fraction,
                select_every=None if fraction is None else options.every,
            )
            run = prepare(config.data, config.train, dataset)
            chooser, training = Chooser(run, config), TrainingProgress()
            trainer = make_trainer(run, choose=chooser, average=chooser.average)
            train(run, trainer.records(), training, config)
            seconds[strategy, fraction].append(training.seconds)
            print(f"{strategy} {fraction or 1:g}: {training.seconds:.1f} s", flush=True)
    full = median(seconds["full", None])
    for (strategy, fraction), times in seconds.items():
        if fraction is not None:
            bar = SLACK * (fraction + 1 / (3 * options.every))
            print(
                f"{strategy:<8} {fraction:g}: {median(times) / full:.3f} x of full training (bar {bar:.3f})"
            )


if __name__ == "__main__":
    main()
