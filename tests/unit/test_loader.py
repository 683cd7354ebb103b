import itertools
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from chgval.config import DataConfig
from chgval.data import decode_once, images, loader
from chgval.data.loader import make_loader
from chgval.data.open import open_dataset
from chgval.data.pixel_file import PixelFile
from chgval.errors import DataError
from tests.pictures import write_folder

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def loader_for(root, size, **settings):
    dataset = open_dataset(DataConfig(source=str(root), image_size=size), 224)
    options = {"batch_size": 16, "augment": "none", "device": CPU, "workers": 0, **settings}
    return dataset, make_loader(dataset, **options)


def collect(batches):
    """All inputs of an epoch, back in row order."""
    batches = list(batches)
    order = torch.cat([b.indices_B for b in batches])
    inputs = torch.cat([b.inputs_B for b in batches])
    labels = torch.cat([b.labels_B for b in batches])
    assert len(order.unique()) == len(order)
    back = order.argsort()
    return order, inputs[back], labels[back]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("large") / "images", 18, size=90)


@pytest.mark.parametrize("size", [12, 72], ids=["kept in memory", "decoded at each use"])
def test_an_epoch_shows_every_sample_once_in_batches_of_nearly_one_size(image_folder, large_folder, size):
    dataset, loader = loader_for(image_folder if size == 12 else large_folder, size)
    batches = list(loader.training_batches(loader.rows, generator()))
    sizes = [len(b.indices_B) for b in batches]
    assert len(sizes) == loader.num_batches(loader.rows) and max(sizes) - min(sizes) <= 1 and max(sizes) <= 16
    order, _, labels = collect(batches)
    assert sorted(order.tolist()) == list(range(len(dataset))) and order.tolist() != sorted(order.tolist())
    np.testing.assert_array_equal(labels, dataset.labels_N)


@pytest.mark.parametrize("size", [12, 72], ids=["kept in memory", "decoded at each use"])
def test_an_epoch_on_some_of_the_samples_shows_these_and_no_others(image_folder, large_folder, size):
    dataset, loader = loader_for(image_folder if size == 12 else large_folder, size)
    _, all_inputs, _ = collect(loader.plain_batches())
    rows = torch.tensor([1, 2, 5, 8, 13, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 35])
    batches = list(loader.training_batches(rows, generator()))
    assert [len(b.indices_B) for b in batches] == [9, 8] and loader.num_batches(rows) == 2
    order, inputs, labels = collect(batches)
    assert sorted(order.tolist()) == rows.tolist() != order.tolist()
    np.testing.assert_array_equal(labels, dataset.labels_N[rows])
    assert torch.equal(inputs, all_inputs[rows])


def test_no_batch_holds_a_single_sample(tmp_path):
    """Normalisation over a batch of one sample of one pixel is undefined."""
    root = write_folder(tmp_path / "images", 3, size=4)
    (root / "cat/002.png").unlink()
    _, loader = loader_for(root, 4, batch_size=2)
    assert [len(b.indices_B) for b in loader.training_batches(loader.rows, generator())] == [3, 2]


@pytest.mark.parametrize("size", [12, 72])
def test_inputs_are_normalised_pixels(image_folder, large_folder, size):
    dataset, loader = loader_for(image_folder if size == 12 else large_folder, size)
    _, inputs, _ = collect(loader.plain_batches())
    assert inputs.dtype == torch.float32 and inputs.shape == (len(dataset), 3, size, size)
    np.testing.assert_allclose(inputs.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std((0, 2, 3)), 1, atol=1e-4)
    _, unvaried, _ = collect(loader.training_batches(loader.rows, generator()))
    torch.testing.assert_close(unvaried, inputs)

    _, given = loader_for(
        image_folder if size == 12 else large_folder, size, mean=(0.5, 0.25, 0.0), std=(1.0, 2.0, 0.5)
    )
    _, other, _ = collect(given.plain_batches())
    mean, std = loader.statistics.mean, loader.statistics.std
    raw = inputs * std + mean
    expected = (raw - torch.tensor([0.5, 0.25, 0.0])[:, None, None]) / torch.tensor([1.0, 2.0, 0.5])[
        :, None, None
    ]
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-4)


def test_shifts_and_flips_are_those_of_a_plain_version(image_folder):
    """Every augmented image is one of the 2 x 5 x 5 shifted and mirrored versions, and most occur."""
    dataset, loader = loader_for(image_folder, 12, augment="crop-flip")
    _, plain, _ = collect(loader.plain_batches())
    black = (0 - loader.statistics.mean) / loader.statistics.std
    size, shift = 12, 2  # 12 / 8 = 1.5 rounds to 2
    seen = set()
    for seed in range(20):
        _, varied, _ = collect(loader.training_batches(loader.rows, generator(seed)))
        for row in range(0, len(dataset), 7):
            canvas = black.expand(3, size + 2 * shift, size + 2 * shift).clone()
            canvas[:, shift:-shift, shift:-shift] = plain[row]
            matches = []
            for top, left, flip in itertools.product(range(2 * shift + 1), range(2 * shift + 1), (0, 1)):
                window = canvas[:, top : top + size, left : left + size]
                if torch.allclose(varied[row], window.flip(2) if flip else window, atol=1e-5):
                    matches.append((top, left, flip))
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) > 40  # of 50


def test_digits_like_data_are_not_mirrored(image_folder):
    _, loader = loader_for(image_folder, 12, augment="crop")
    _, flipped = loader_for(image_folder, 12, augment="crop-flip")
    _, first, _ = collect(loader.training_batches(loader.rows, generator()))
    _, second, _ = collect(flipped.training_batches(flipped.rows, generator()))
    same = (first == second).flatten(1).all(1)
    mirrored = (first == second.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all() and same.any() and mirrored.any()


@pytest.mark.parametrize("size", [12, 72])
def test_the_generator_decides_everything(image_folder, large_folder, size):
    root = image_folder if size == 12 else large_folder
    _, loader = loader_for(root, size, augment="crop-flip")
    first, again, other = (list(loader.training_batches(loader.rows, generator(seed))) for seed in (3, 3, 4))
    assert all(torch.equal(a.inputs_B, b.inputs_B) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs_B, other[0].inputs_B)


def test_crops_do_not_depend_on_the_number_of_workers(large_folder):
    _, alone = loader_for(large_folder, 72, augment="crop-flip", workers=0)
    _, shared = loader_for(large_folder, 72, augment="crop-flip", workers=2)
    for a, b in zip(
        alone.training_batches(alone.rows, generator()),
        shared.training_batches(shared.rows, generator()),
        strict=True,
    ):
        assert torch.equal(a.indices_B, b.indices_B) and torch.equal(a.inputs_B, b.inputs_B)


def test_large_images_that_break_on_the_way_are_left_out_and_named(tmp_path):
    root = write_folder(tmp_path / "images", 4, size=90)
    whole = (root / "dog/002.png").read_bytes()
    (root / "dog/002.png").write_bytes(whole[: len(whole) // 2])  # the header is fine
    dataset, loader = loader_for(root, 72, workers=2)
    assert list(dataset.problems) in ([], [6])
    order, _, _ = collect(loader.training_batches(loader.rows, generator()))
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4, 5, 7]
    assert "truncated" in dataset.problems[6]
    dataset.problems.clear()
    strict = make_loader(
        dataset,
        batch_size=4,
        augment="none",
        device=CPU,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        workers=0,
        fail_on_error=True,
    )
    with pytest.raises(DataError, match=r"dog/002\.png cannot be read .*truncated"):
        list(strict.training_batches(strict.rows, generator()))


def test_embeddings_are_normalised_and_constants_survive(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = np.random.default_rng(0).normal(5, 3, (50, 4)).astype(np.float32)
    vectors[:, 2] = 7
    pq.write_table(pa.table({"e": list(vectors), "label": [0, 1] * 25}), tmp_path / "e.parquet")
    dataset = open_dataset(DataConfig(source=str(tmp_path / "e.parquet"), features_column="e"), 224)
    loader = make_loader(dataset, batch_size=16, augment="crop-flip", device=CPU)
    _, inputs, _ = collect(loader.training_batches(loader.rows, generator()))
    np.testing.assert_allclose(inputs[:, 2], 0, atol=1e-6)
    varied = vectors[:, [0, 1, 3]]
    expected = (varied - varied.mean(0)) / varied.std(0, ddof=1)
    np.testing.assert_allclose(inputs[:, [0, 1, 3]], expected, atol=1e-4)


def test_images_in_a_file_are_those_in_memory(image_folder, monkeypatch):
    """More than memory should hold: the same batches, bit by bit."""
    _, in_memory = loader_for(image_folder, 12, augment="crop-flip")
    monkeypatch.setattr(decode_once, "MEMORY_BYTES", 0)
    dataset, in_file = loader_for(image_folder, 12, augment="crop-flip")
    assert isinstance(dataset.content.pixels_N3SS, PixelFile)
    expected, found = (
        [*loader.training_batches(loader.rows, generator()), *loader.plain_batches()]
        for loader in (in_memory, in_file)
    )
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.indices_B, b.indices_B) and torch.equal(a.inputs_B, b.inputs_B)


def test_a_file_of_pixels_is_read_as_an_array_is():
    pixels_N3SS = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    file = PixelFile(5, 4)
    for row in (0, 4, 2):
        file[row] = pixels_N3SS[row]
    pixels_N3SS[[1, 3]] = 0
    rows = np.array([4, 1, 0, 4])
    np.testing.assert_array_equal(file[rows], pixels_N3SS[rows])
    assert file.shape == pixels_N3SS.shape and file.nbytes == pixels_N3SS.nbytes


def test_workers_find_no_room_once_and_send_the_same_pixels(monkeypatch):
    """Torch leaves a file open each time that there is no room."""
    asked = []

    def full(_):
        asked.append(1)
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    collate = loader._Collate(shares=True)
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    for row in range(3):
        batch = collate([(row, pixels), (9, "not an image")])
        assert batch.indices_B.tolist() == [row] and np.array_equal(
            batch.pixels_BSS3, pixels.transpose(1, 2, 0)[None]
        )
        assert batch.problems == {9: "not an image"}
    assert len(asked) == 1


def test_memory_is_shared_where_half_of_it_holds_the_batches(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    assert loader._can_share(free // 4) and not loader._can_share(free)
    monkeypatch.setattr(loader, "LONGEST_SOCKET_FOLDER", 1)
    assert not loader._can_share(1)
    monkeypatch.setattr(loader, "LONGEST_SOCKET_FOLDER", 1000)
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path / "absent")
    assert not loader._can_share(1)


def test_too_many_open_files_are_no_fault_of_an_image(large_folder):
    path = next(large_folder.glob("*/*.png"))
    next_free = os.dup(0)
    os.close(next_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard))
    try:
        with pytest.raises(DataError, match=r"Too many open files; raise the limit \(ulimit -n\)"):
            images.open_image_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
