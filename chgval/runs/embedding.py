"""`chgval embed`, and `--frozen`: what a pretrained network makes of images, in one pass.

Shape legend: N rows, B images of a batch, D last-layer inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from chgval import progress
from chgval.config import EmbedConfig, TrainConfig
from chgval.data.dataset import Dataset, Embeddings
from chgval.data.decode import UnreadableImageError, upright
from chgval.data.formats import Format, format_of
from chgval.data.open import check_all_read, check_not_read, open_dataset
from chgval.errors import DataError, ModelError, SettingsError
from chgval.files import locked
from chgval.interruption import interruptible
from chgval.reports.files import check_output, write_table
from chgval.system import usable_cores
from chgval.training.devices import pick_device
from chgval.training.models import check_names
from chgval.training.pretrained import DEFAULT_WEIGHTS, Backbone, load_backbone
from chgval.training.recipe import largest_image_size
from chgval.types import IntArray

# Images that go through the network at a time.
BATCH_SIZE = 32
FEATURES_COLUMN = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What was made of images.

    Attributes:
        num_rows, num_embedded: of the dataset, and those that could be read.
        num_features: numbers of each.
        arch, image_size: of the network, and what it was fed.
        problems: why rows could not be read, by id.
    """

    num_rows: int
    num_embedded: int
    num_features: int
    arch: str
    image_size: int
    problems: dict[str, str]


def run_embed(config: EmbedConfig) -> Embedded:
    """Write a table of embeddings with the ids and labels of a dataset of images.

    Raises:
        ChgvalError: the dataset or the weights cannot be read, or the output is in the way.
    """
    with locked(*config.outputs):
        source = format_of(config.data)
        check_output(config.output, config.data.source)
        check_not_read(source, config.output)
        check_names(config.train.arch, config.train.weights)
        dataset = open_dataset(source, largest_image_size(config.arch, config.device, frozen=True))
        for note in dataset.notes:
            progress.say(f"note: {note}")
        backbone = _backbone(source, config.train)
        embedded = _embed(source, dataset, backbone, config.train)
        write_table(config.output, _table(embedded, as_names=config.output.resolved_format == "jsonl"))
        return Embedded(
            num_rows=len(dataset),
            num_embedded=len(dataset) - len(embedded.problems),
            num_features=_vectors_of(embedded).shape[1],
            arch=backbone.arch,
            image_size=backbone.size,
            problems={dataset.ids[row]: reason for row, reason in embedded.problems.items()},
        )


def embedded_dataset(source: Format, dataset: Dataset, train: TrainConfig) -> Dataset:
    """Return a dataset whose images are replaced by what a frozen network makes of them.

    Raises:
        ChgvalError: it holds embeddings already, or the weights cannot be had.
    """
    return _embed(source, dataset, _backbone(source, train), train)


def digest_of(dataset: Dataset) -> str:
    """Return what tells embeddings from those of other weights: a run is resumed with its own only."""
    return hashlib.blake2b(_vectors_of(dataset).tobytes(), digest_size=16).hexdigest()


def _vectors_of(dataset: Dataset) -> NDArray[np.float32]:
    if not isinstance(dataset.content, Embeddings):
        raise TypeError("the images were not embedded")
    return dataset.content.vectors_ND


def _backbone(source: Format, train: TrainConfig) -> Backbone:
    data = source.config
    backbone = load_backbone(
        train.arch, train.weights, image_size=data.image_size, mean=data.mean, std=data.std
    )
    backbone.model.to(pick_device(train.device))
    return backbone


def _embed(source: Format, dataset: Dataset, backbone: Backbone, train: TrainConfig) -> Dataset:
    if isinstance(dataset.content, Embeddings):
        raise SettingsError(f"{dataset.source}: holds embeddings already; a frozen network takes images.")
    device = pick_device(train.device)
    vectors_ND = np.zeros((len(dataset), 0), dtype=np.float32)
    problems = dict(dataset.problems)
    with interruptible(), progress.counting("images", len(dataset)) as tell:
        for rows, images in _batches(source, backbone, len(dataset), source.config.max_pixels, problems):
            if images is not None:
                features_BD = backbone.features(images.to(device)).cpu().numpy()
                if not vectors_ND.shape[1]:
                    vectors_ND = np.zeros((len(dataset), features_BD.shape[1]), dtype=np.float32)
                vectors_ND[[row for row in rows if row not in problems]] = features_BD
            tell(rows[-1] + 1)
    bad_N = ~np.isfinite(vectors_ND).all(1)
    if len(problems) < len(dataset) and bad_N.sum() + len(problems) >= len(dataset):
        raise ModelError(
            f"--weights {train.weights or DEFAULT_WEIGHTS}: the network makes no finite numbers of "
            "any image; the weights may be broken."
        )
    problems |= dict.fromkeys(np.flatnonzero(bad_N).tolist(), "the network makes no finite numbers of it")
    vectors_ND[bad_N] = 0
    embedded = dataclasses.replace(dataset, content=Embeddings(vectors_ND), problems=problems)
    embedded.check(least_classes=1)
    check_all_read(embedded, source.config)
    return embedded


def _batches(
    source: Format, backbone: Backbone, num_rows: int, max_pixels: int, problems: dict[int, str]
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Yield rows and the images of those that can be read; add to `problems` why others cannot."""

    def prepared(encoded: bytes | None) -> Tensor | str:
        if encoded is None:
            return "there is no image"
        try:
            return backbone.prepare(upright(encoded, max_pixels))
        except UnreadableImageError as error:
            return str(error)

    pictures = source.pictures(range(num_rows))
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, num_rows, BATCH_SIZE):
            rows = list(range(start, min(start + BATCH_SIZE, num_rows)))
            made = list(pool.map(prepared, islice(pictures, len(rows))))
            images = []
            for row, image in zip(rows, made, strict=True):
                if isinstance(image, str):
                    problems.setdefault(row, image)
                elif row not in problems:
                    images.append(image)
            yield rows, torch.stack(images) if images else None


def _table(dataset: Dataset, *, as_names: bool) -> pa.Table:
    """Return ids, labels and embeddings, with the order of the classes as Hugging Face keeps it.

    Args:
        dataset: of embeddings.
        as_names: whether labels are the names of classes, where no schema could hold these.
    """
    vectors_ND = _vectors_of(dataset)
    is_known = np.ones(len(dataset), dtype=bool)
    is_known[list(dataset.problems)] = False
    values = pa.array(vectors_ND.ravel())
    vectors = pa.FixedSizeListArray.from_arrays(values, vectors_ND.shape[1], mask=pa.array(~is_known))
    names = list(dataset.class_names)
    labels: dict[str, IntArray] = {"label": dataset.labels_N}
    if dataset.annotations is not None:
        labels = dict(zip(dataset.annotations.names, dataset.annotations.labels_NA.T, strict=True))
        for name in {"id", FEATURES_COLUMN} & set(labels):
            raise DataError(
                f"{dataset.source}: an annotator is called '{name}', as a column of the output is; "
                "rename that column."
            )
    columns = {name: pa.array(label_N, mask=label_N < 0) for name, label_N in labels.items()}
    if as_names:
        text = np.array([*names, None], dtype=object)  # index -1 gives None
        columns = {name: pa.array(text[label_N], pa.string()) for name, label_N in labels.items()}
    features: dict[str, object] = {"id": {"dtype": "string", "_type": "Value"}}
    features |= {name: {"names": names, "_type": "ClassLabel"} for name in labels}
    features[FEATURES_COLUMN] = {
        "feature": {"dtype": "float32", "_type": "Value"},
        "length": vectors_ND.shape[1],
        "_type": "List",
    }
    table = pa.table({"id": pa.array(dataset.ids, pa.string()), **columns, FEATURES_COLUMN: vectors})
    described = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": described})
