"""Peak resident memory of valuing a dataset that does not fit in it.

    python benchmarks/large_dataset.py --work FOLDER

Writes Parquet files of JPEG images of 224 x 224 pixels, 20 GiB of them if all were decoded, and values them
for one epoch in a process of its own. What is written stays in FOLDER. Memory is that of the process and its
workers together, what they share counted once (the proportional set size that Linux tells), looked at twice a
second; and the peak of the largest of them, as the kernel counts it.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 224
NUM_CLASSES = 10
IMAGES_PER_FILE = 10_000
BAR_GIBIBYTES = 3


def encode(number: int) -> bytes:
    """Blobs on a ground whose colour tells the class."""
    rng = np.random.default_rng(number)
    ground = np.array([number % NUM_CLASSES * 20, 90, 160]) + rng.integers(0, 60, (7, 7, 3))
    image = Image.fromarray(ground.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write(folder: Path, num_images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, num_images, IMAGES_PER_FILE):
        path = folder / f"train-{start:08d}.parquet"
        if path.exists():
            continue
        numbers = range(start, min(num_images, start + IMAGES_PER_FILE))
        table = pa.table(
            {
                "image": [{"bytes": encode(number), "path": f"{number}.jpg"} for number in numbers],
                "label": [number % NUM_CLASSES for number in numbers],
            }
        )
        part = path.with_suffix(".part")
        pq.write_table(table, part, compression="none", row_group_size=1000)
        part.rename(path)


def resident(session: int) -> float:
    """Give GiB of all processes of a session, what they share counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                total += next(
                    int(line.split()[1])
                    for line in (process / "smaps_rollup").read_text().splitlines()
                    if line.startswith("Pss:")
                )
        except (ProcessLookupError, FileNotFoundError, StopIteration):
            continue  # it has ended
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gibibytes", type=float, default=20, help="decoded size")
    parser.add_argument("options", nargs="*", help="of chgval value, behind --")
    options = parser.parse_args()
    num_images = int(np.ceil(options.gibibytes * 2**30 / (3 * SIDE**2)))
    write(options.work / "data", num_images)
    command = [
        *(sys.executable, "-m", "chgval", "value", str(options.work / "data"), "--epochs", "1"),
        *("-o", str(options.work / "values.parquet"), "--overwrite", *options.options),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    together = 0.0
    while process.poll() is None:
        together = max(together, resident(process.pid))
        time.sleep(0.5)
    assert process.returncode == 0, process.returncode
    seconds = time.perf_counter() - started
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    rows = pq.read_table(options.work / "values.parquet", columns=["status"])["status"].to_pylist()
    assert rows == ["valued"] * num_images
    print(
        f"{num_images:,} images of {SIDE} x {SIDE}, {options.gibibytes:g} GiB decoded: peak "
        f"{together:.2f} GiB of all processes, {largest:.2f} GiB of the largest (bar {BAR_GIBIBYTES}), "
        f"{seconds / 60:.0f} min"
    )


if __name__ == "__main__":
    main()
