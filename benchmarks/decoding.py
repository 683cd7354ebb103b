"""How fast images are decoded on all cores, against one: small ones once, large ones at each use.

    python benchmarks/decoding.py --work FOLDER [--images 24000] [--large 9000]

Writes JPEG images of 32 and 224 pixels as class folders and as Parquet, and reads them with chgval as a run
does. One core is a plain loop over the same decoder, in this process. The last line is an epoch of
torchvision's ImageFolder with a DataLoader of as many workers as there are cores, against chgval's second
epoch, both as batches of tensors. Prints medians of interleaved repetitions, and the bars.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from chgval.config import DataConfig
from chgval.data.decode import decode_centre, decode_random_crop
from chgval.data.loader import make_loader
from chgval.data.open import open_dataset
from chgval.system import usable_cores

NUM_CLASSES = 10
CPU = torch.device("cpu")


def encode(number: int, side: int) -> bytes:
    """Blobs, as smooth as photographs, with some noise."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3)).astype(np.uint8))
    array = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    buffer = io.BytesIO()
    noisy = (array + rng.integers(-12, 12, array.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(work: Path, side: int, count: int) -> tuple[Path, Path]:
    """Return the folder and the Parquet file of so many images."""
    folder, table = work / f"{side}-{count}", work / f"{side}-{count}.parquet"
    if not table.exists():
        encoded = [encode(number, side) for number in range(count)]
        for number, image in enumerate(encoded):
            path = folder / f"class{number % NUM_CLASSES}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        rows = [{"bytes": image, "path": f"{number:06d}.jpg"} for number, image in enumerate(encoded)]
        pq.write_table(pa.table({"image": rows, "label": np.arange(count) % NUM_CLASSES}), table)
    return folder, table


def rate(work: Callable[[], int]) -> float:
    """Return images a second."""
    started = time.perf_counter()
    return work() / (time.perf_counter() - started)


def one_core_small(folder: Path) -> int:
    paths = sorted(folder.rglob("*.jpg"))
    for path in paths:
        decode_centre(path.read_bytes(), 32)
    return len(paths)


def one_core_large(folder: Path) -> int:
    paths = sorted(folder.rglob("*.jpg"))
    for number, path in enumerate(paths):
        decode_random_crop(path.read_bytes(), 224, np.random.default_rng(number))
    return len(paths)


def epoch_of(source: Path, size: int, device: torch.device = CPU) -> Callable[[], int]:
    """Return what makes an epoch of training batches; the meta device stands for a GPU, which scales them."""
    dataset = open_dataset(DataConfig(source=str(source), image_size=size), size)
    loader = make_loader(dataset, batch_size=128, augment="crop-flip", device=device, workers=usable_cores())
    return lambda: sum(
        len(b.indices_B) for b in loader.training_batches(loader.rows, torch.Generator().manual_seed(0))
    )


def read_small(source: Path) -> int:
    return len(open_dataset(DataConfig(source=str(source), image_size=32), 32))


def epoch_of_torchvision(folder: Path) -> int:
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    loader = torch.utils.data.DataLoader(
        ImageFolder(folder, transforms.Compose(steps)), 128, shuffle=True, num_workers=usable_cores()
    )
    return sum(len(labels) for _, labels in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--large", type=int, default=9000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    small_folder, small_table = write(options.work, 32, options.images)
    large_folder, large_table = write(options.work, 224, options.large)
    second_epoch = epoch_of(small_folder, 32)
    runs: dict[str, Callable[[], int]] = {
        "32 px, one core": lambda: one_core_small(small_folder),
        "32 px, folder": lambda: read_small(small_folder),
        "32 px, Parquet": lambda: read_small(small_table),
        "224 px, one core": lambda: one_core_large(large_folder),
        "224 px, folder": epoch_of(large_folder, 224, torch.device("meta")),
        "224 px, Parquet": epoch_of(large_table, 224, torch.device("meta")),
        "32 px, torchvision": lambda: epoch_of_torchvision(small_folder),
        "32 px, second epoch": second_epoch,
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repetitions):
        for name, work in runs.items():
            rates[name].append(rate(work))
    cores = usable_cores()
    print(f"{cores} cores, torch {torch.__version__}")
    for name, found in rates.items():
        side = name.partition(",")[0]
        line = f"{name:<20} {statistics.median(found):>10,.0f} images/s"
        if name.endswith(("folder", "Parquet")):
            ratio = statistics.median(a / b for a, b in zip(found, rates[f"{side}, one core"], strict=True))
            line += f"  {ratio / cores:.2f} x cores x one core (bar 0.80)"
        if name.endswith("second epoch"):
            theirs = rates["32 px, torchvision"]
            ratio = statistics.median(a / b for a, b in zip(found, theirs, strict=True))
            line += f"  {ratio:.1f} x torchvision (bar 5)"
        print(line)


if __name__ == "__main__":
    main()
