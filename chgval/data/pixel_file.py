"""Decoded images in a file, for more of them than memory should hold."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from chgval.data.decode import Pixels
from chgval.errors import OutputError
from chgval.system import read_at, write_at
from chgval.types import IntArray


class PixelFile:
    """Squares of pixels, uint8, shape (N, 3, S, S), in an unnamed temporary file; zeros at first.

    Read and written by rows, as an array is. A map of the file would count as resident memory, and a full
    disk would kill the process that writes into it.

    Args:
        num_rows: N.
        size: S.
    Raises:
        OutputError: there is no room for it.
    """

    def __init__(self, num_rows: int, size: int) -> None:
        self.shape = (num_rows, 3, size, size)
        self._row_bytes = math.prod(self.shape[1:])
        with spooling():
            self._file = tempfile.TemporaryFile(prefix="chgval-")  # noqa: SIM115 (it goes with the object)
            self._file.truncate(self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.shape[0] * self._row_bytes

    def __setitem__(self, row: int, pixels_3SS: Pixels) -> None:
        with spooling():
            write_at(self._file.fileno(), np.ascontiguousarray(pixels_3SS).data, row * self._row_bytes)

    def __getitem__(self, rows_B: IntArray) -> Pixels:
        pixels_B3SS = np.empty((len(rows_B), *self.shape[1:]), dtype=np.uint8)
        with spooling():
            for pixels_3SS, row in zip(pixels_B3SS, rows_B.tolist(), strict=True):
                read_at(self._file.fileno(), pixels_3SS.data, row * self._row_bytes)
        return pixels_B3SS


@contextmanager
def spooling() -> Iterator[None]:
    """Turn the operating system's errors about the temporary folder into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{tempfile.gettempdir()}: images cannot be kept there while they are used ({error.strerror}); "
            "free some space, or set TMPDIR to a larger folder."
        ) from error
