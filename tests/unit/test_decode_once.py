"""Small images decoded on all cores: by processes, by threads, and one by one."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from chgval.data import decode_once as module
from chgval.data.decode import SharedPixels, UnreadableImageError, decode_centre
from chgval.data.decode_once import as_it_is, decode_once
from chgval.data.images import ImageFiles, content_digest
from chgval.data.pixel_file import PixelFile
from chgval.errors import DataError
from chgval.interruption import Interrupted, end_with_parent
from tests.pictures import write_folder

SIZE = 12
MOST = 10**8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """200 files: some are no images, one is not there."""
    root = write_folder(tmp_path_factory.mktemp("images"), 100)
    paths = sorted(map(str, root.rglob("*.png")))
    for number in (3, 77, 130):
        Path(paths[number]).write_bytes(b"no image" if number != 77 else b"")
    Path(paths[150]).unlink()
    return ImageFiles(paths)


def one_by_one(images):
    pixels_N3SS, problems = np.zeros((len(images), 3, SIZE, SIZE), dtype=np.uint8), {}
    for row in range(len(images)):
        encoded = images.read_or_error(row)
        try:
            if isinstance(encoded, UnreadableImageError):
                raise encoded
            pixels_N3SS[row] = decode_centre(encoded, SIZE)
        except UnreadableImageError as error:
            problems[row] = str(error)
    return pixels_N3SS, problems


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("in_file", [False, True], ids=["in memory", "in a file"])
def test_pixels_problems_and_digests_are_those_of_one_core(images, workers, in_file, monkeypatch):
    if in_file:
        monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    expected, problems = one_by_one(images)
    assert sorted(problems) == [3, 77, 130, 150]
    rows = range(len(images))
    files = decode_once(rows, images.read_or_error, 200, SIZE, MOST, workers=workers, digest=len_or_zero)
    stream = map(images.read_or_error, rows)
    streamed = decode_once(stream, as_it_is, 200, SIZE, MOST, workers=workers)
    for loaded in (files, streamed):
        kept = loaded.content.pixels_N3SS
        assert isinstance(kept, PixelFile) == in_file
        np.testing.assert_array_equal(kept[np.arange(200)], expected)
        assert loaded.problems == problems
    assert files.digests == [len_or_zero(images.read_or_error(row)) for row in rows]
    assert streamed.digests is None


def len_or_zero(encoded):
    return len(encoded) if isinstance(encoded, bytes) else 0


def test_digests_of_what_was_read_are_those_of_the_files(tmp_path):
    sizes = [0, 1, 4095, 4096, 4097, 8191, 8192, 20_000]
    for size in sizes:
        (tmp_path / f"{size}").write_bytes(np.random.default_rng(size).bytes(size))
    images = ImageFiles([str(tmp_path / f"{size}") for size in sizes] + ["absent"])
    assert images.digests() == [content_digest(images.read_or_error(row)) for row in range(len(images))]


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_an_error_that_says_so():
    with pytest.raises(DataError, match="a process that decodes images died; often memory ran out"):
        decode_once(range(500), die, 500, SIZE, MOST, workers=2)


def test_processes_end_with_an_interrupted_run():
    def interrupted():
        for row in range(10_000):
            if row == 300:
                raise Interrupted(signal.SIGINT)
            yield row

    with pytest.raises(Interrupted):
        decode_once(interrupted(), lambda _: UnreadableImageError("none"), 10_000, SIZE, MOST, workers=2)
    assert not multiprocessing.active_children()


def test_what_processes_decode_at_a_time_has_a_limit_together():
    """Two large images are decoded one after the other, beside small ones."""
    shared = SharedPixels(multiprocessing.get_context("fork"))
    events = []

    def decode(name, count, seconds):
        with shared.taking(count):
            events.append(f"{name} begins")
            time.sleep(seconds)
            events.append(f"{name} ends")

    jobs = [("first", 30_000_000, 0.2), ("second", 40_000_000, 0), ("small", 1000, 0)]
    threads = [threading.Thread(target=decode, args=job) for job in jobs]
    threads[0].start()
    while not events:
        time.sleep(0.01)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.index("first ends") < events.index("second begins")
    with shared.taking(10**9):  # all units were given back
        pass


class LeftBehind:
    """Garbage in a cycle, that writes down which process frees it."""

    def __init__(self, path):
        self.itself, self.path = self, path

    def __del__(self):
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


def work_and_collect():
    end_with_parent(0)
    gc.collect()


def test_workers_free_nothing_that_their_parent_left(tmp_path):
    """A forked process must not touch what a GPU holds, such as the graphs of a run that was given up."""
    gc.disable()
    try:
        LeftBehind(tmp_path / "freed")
        worker = multiprocessing.get_context("fork").Process(target=work_and_collect)
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "freed").read_text().split() == [str(os.getpid())]
