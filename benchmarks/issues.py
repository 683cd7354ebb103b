"""Plant copies and strangers in a dataset, and count which of them `chgval detect-issues` finds.

python benchmarks/issues.py CIFAR10.parquet --work FOLDER

The dataset is Parquet with images in it (a column `image` of {bytes, path}) and a column `label`. Copies are
mirrored, encoded as JPEG of quality 50, cropped to 75 to 95 % of the side, or cropped and mirrored; strangers
are scikit-learn's digits, enlarged, with random labels. The second part trains twice, in default settings.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import chgval
from chgval.config import DataConfig
from chgval.data.formats import format_of
from chgval.detection.duplicates import copies_within
from chgval.runs.issues import thumbnails_of

KINDS = ("mirrored", "encoded", "cropped", "cropped and mirrored")


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def copy_of(picture: bytes, kind: str, rng: np.random.Generator) -> bytes:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    size = image.size
    if "mirrored" in kind:
        image = ImageOps.mirror(image)
    if "cropped" in kind:
        side = image.width * rng.uniform(0.75, 0.95)
        left, top = rng.uniform(0, image.width - side, 2)
        image = image.crop((round(left), round(top), round(left + side), round(top + side)))
        if rng.random() < 0.5:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=50) if kind == "encoded" else encoded(image)


def write(path: Path, pictures: list[bytes], labels: list[int]) -> Path:
    images = [{"bytes": picture, "path": None} for picture in pictures]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def copies(
    pictures: list[bytes], labels: list[int], count: int, work: Path, rng: np.random.Generator
) -> None:
    originals = rng.permutation(len(pictures))[:count]
    planted = [copy_of(pictures[row], KINDS[at % 4], rng) for at, row in enumerate(originals.tolist())]
    path = write(work / "copies.parquet", pictures + planted, labels + [labels[row] for row in originals])
    source = format_of(DataConfig(source=str(path)))
    thumbnails = thumbnails_of(source, len(pictures) + count)
    started = time.perf_counter()
    pairs, least = copies_within(thumbnails)
    seconds = time.perf_counter() - started
    found = set(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True))
    expected = {(int(row), len(pictures) + at): at for at, row in enumerate(originals)}
    print(
        f"{count} copies among {len(pictures):,} images: {seconds:.1f} s, from a similarity of {least:.3f} on"
    )
    for place, kind in enumerate(KINDS):
        pairs_of_kind = [pair for pair, at in expected.items() if at % 4 == place]
        print(f"  {kind}: {np.mean([pair in found for pair in pairs_of_kind]):.1%}")
    print(f"  other pairs: {len(found - set(expected))}")


def strangers(
    pictures: list[bytes], labels: list[int], count: int, work: Path, rng: np.random.Generator
) -> None:
    rows = [(picture, label, False) for picture, label in zip(pictures, labels, strict=True)]
    for digit in load_digits().images[:count]:
        image = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        rows.append((encoded(image.convert("RGB")), int(rng.integers(max(labels) + 1)), True))
    rows = [rows[place] for place in rng.permutation(len(rows))]
    path = write(work / f"strangers-{count}.parquet", [row[0] for row in rows], [row[1] for row in rows])
    values = work / f"strangers-{count}.values.parquet"
    chgval.value(path, output=values, overwrite=True, write_features=work / f"strangers-{count}.npy")
    table = chgval.detect_issues(values).table.to_pandas()
    is_stranger = np.array([row[2] for row in rows])
    is_outlier = table.issues.fillna("").str.contains("outlier").to_numpy()
    print(
        f"{count} strangers among {len(pictures):,}: "
        f"AUROC {roc_auc_score(is_stranger, table.outlier_factor):.3f}, {is_outlier.sum()} flagged, "
        f"recall {is_outlier[is_stranger].mean():.2f}, precision {is_stranger[is_outlier].mean():.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    table = pq.read_table(arguments.dataset, columns=["image", "label"])
    pictures = [row["bytes"] for row in table["image"].to_pylist()]
    labels = table["label"].to_pylist()
    rng = np.random.default_rng(0)
    for size in (4000, 1000):
        copies(pictures[:size], labels[:size], 400, arguments.work, rng)
    for count in (60, 8):
        strangers(pictures[4000:7000], labels[4000:7000], count, arguments.work, rng)


if __name__ == "__main__":
    main()
