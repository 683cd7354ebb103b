"""Training and valuing embeddings together: seconds an epoch on 1,000 digits of 64 numbers.

    python benchmarks/embeddings.py

Bar: at most 0.1 s an epoch. The published implementation, one sample at a time through autograd, takes 2.0 ms
a sample and epoch, 2.0 s an epoch.
"""

import statistics
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_digits

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.runs.session import make_valuing, prepare, read_dataset
from chgval.training.records import EpochRecord

SAMPLES, EPOCHS, REPETITIONS = 1000, 5, 5


def main() -> None:
    digits = load_digits()
    table = pa.table({"pixels": list(digits.data[:SAMPLES]), "label": digits.target[:SAMPLES]})
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "digits.parquet")
        config = ValueConfig(
            data=DataConfig(source=f"{folder}/digits.parquet", features_column="pixels"),
            train=TrainConfig(epochs=EPOCHS),
        )
        for _ in range(REPETITIONS):
            run = prepare(config.data, config.train, read_dataset(config.data, config.train))
            trainer = make_valuing(run, config)[2]
            epochs = [r.seconds for r in trainer.records() if isinstance(r, EpochRecord)]
            seconds.extend(epochs)
    print(
        f"{SAMPLES} samples, {EPOCHS} epochs, {REPETITIONS} repetitions, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"an epoch: median {statistics.median(seconds):.4f} s, highest {max(seconds):.4f} s  (bar 0.1)")


if __name__ == "__main__":
    main()
