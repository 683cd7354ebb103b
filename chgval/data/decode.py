"""Encoded images to uint8 pixels.

Shape legend: S is the side of the square that a model is fed.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from chgval.config import MAX_PIXELS
from chgval.errors import first_line

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

Pixels = NDArray[np.uint8]

# What Pillow decodes without other programs (as EPS needs), in the formats that datasets come in. Not ICO:
# Pillow decodes it before it tells how large it is.
_KNOWN = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")

# Pixels that the threads of a process decode at a time, unless one image alone has more. A pixel takes up to
# 20 bytes meanwhile, with some formats.
_PIXELS_AT_A_TIME = 2**25

# A 16-bit sample is scaled to 8 bits; 65535 becomes 255.
_SIXTEEN_TO_EIGHT_BITS = 257
LARGEST_SAMPLE = 65_535


# Of 100: what is hardly seen at the size of a thumbnail.
THUMBNAIL_QUALITY = 85

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Of what Pillow says then.
_TOO_LARGE_TEXTS = ("decompressed data too large", "memory used in text chunks")
_MOST_PNG_BLOCKS = 1_000_000


class _Pixels:
    """How many pixels are being decoded, so that threads wait for each other before they fill the memory."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._count or self._count + count <= _PIXELS_AT_A_TIME)
            self._count += count
        try:
            yield
        finally:
            with self._changed:
                self._count -= count
                self._changed.notify_all()


class SharedPixels:
    """The same for processes, which count in units of UNIT pixels.

    Args:
        context: how they are started.
    """

    UNIT = 2**20

    def __init__(self, context: BaseContext) -> None:
        self._most = _PIXELS_AT_A_TIME // self.UNIT
        self._free = context.Semaphore(self._most)
        self._turn = context.Lock()

    @contextmanager
    def taking(self, count: int) -> Iterator[None]:
        """Wait until so many pixels may be decoded, and count them in the block."""
        units = min(self._most, 1 + count // self.UNIT)
        with self._turn:  # two that each hold a part of what they need would wait for each other for ever
            for _ in range(units):
                self._free.acquire()
        try:
            yield
        finally:
            for _ in range(units):
                self._free.release()


_pixels: _Pixels | SharedPixels = _Pixels()


def count_pixels_with(shared: SharedPixels) -> None:
    """Wait for other processes, too, from now on."""
    global _pixels
    _pixels = shared


class UnreadableImageError(Exception):
    """An image cannot be decoded; the reader of the dataset turns it into a status of that row."""


Encoded = bytes | UnreadableImageError


@cache
def formats() -> list[str]:
    """Return the names of the formats that are read, of those that this Pillow can."""
    Image.init()
    return [name for name in _KNOWN if name in Image.OPEN]


def shorter_side(encoded: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Return the shorter side in pixels from the header, without decoding the pixels."""
    with _opened(encoded, max_pixels) as image:
        return min(image.size)


def deepest_sample(encoded: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
    """Return the largest sample of an image of more than 8 bits; None for all others.

    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    with _opened(encoded, max_pixels) as image:
        if not image.mode.startswith("I"):
            return None
        try:
            return int(np.asarray(image).max(initial=0))
        except Exception as error:  # Pillow's format plugins raise errors of any kind on malformed files
            raise UnreadableImageError(_reason(encoded, error)) from error


def decode_centre(encoded: bytes, size: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode, scale the shorter side to `size` and cut the centre: uint8, shape (3, S, S), colours innermost.

    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    with _decoded(encoded, size, max_pixels) as image:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(image, size, (left, top, left + side, top + side))


def thumbnail(encoded: bytes, side: int, small_side: int, max_pixels: int = MAX_PIXELS) -> tuple[bytes, bool]:
    """Return the image, upright, as WebP whose longer side is at most `side`, and whether it is small itself.

    Args:
        encoded: the image.
        side: in pixels; nothing is made larger.
        small_side: the longer side up to which it is small.
        max_pixels: that it may have.
    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    with _decoded(encoded, side, max_pixels) as image:
        is_small = max(image.size) <= small_side
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=THUMBNAIL_QUALITY)
        return file.getvalue(), is_small


def upright(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode in full: RGB, upright.

    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    with _decoded(encoded, max_pixels, max_pixels) as image:
        return image.copy()


def grey_square(encoded: bytes, side: int, max_pixels: int = MAX_PIXELS) -> tuple[NDArray[np.uint8], int]:
    """Return the image, upright and grey, squeezed into a square, and its own shorter side.

    Args:
        encoded: the image.
        side: of the square, in pixels.
        max_pixels: that it may have.
    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    shorter = shorter_side(encoded, max_pixels)
    with _decoded(encoded, side, max_pixels) as image:
        square = image.convert("L").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        return np.asarray(square), shorter


def decode_random_crop(
    encoded: bytes, size: int, rng: np.random.Generator, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Decode, cut a random part and scale it: uint8, shape (3, S, S), colours innermost.

    The part covers 35 to 100 % of the area (the usual 8 % often leaves the object out, and a value must not
    depend on luck) with an aspect ratio of 3/4 to 4/3.

    Raises:
        UnreadableImageError: it cannot be decoded, or has more pixels than that.
    """
    with _decoded(encoded, size, max_pixels) as image:
        width, height = image.size
        area = width * height * rng.uniform(0.35, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = min(width, math.sqrt(area * aspect))
        crop_height = min(height, math.sqrt(area / aspect))
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        return _resized(image, size, (left, top, left + crop_width, top + crop_height))


def _opened(encoded: bytes, max_pixels: int) -> Image.Image:
    try:
        try:
            image = Image.open(io.BytesIO(encoded), formats=formats())
        except ValueError as error:
            image = Image.open(io.BytesIO(_spared(encoded, error)), formats=formats())
    except Exception as error:  # Pillow's format plugins raise errors of any kind on malformed files
        raise UnreadableImageError(_reason(encoded, error)) from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise UnreadableImageError(f"{pixels:,} pixels, more than --max-pixels {max_pixels:,}")
    return image


@contextmanager
def _decoded(encoded: bytes, size: int, max_pixels: int) -> Iterator[Image.Image]:
    """Give the upright RGB image. JPEGs are decoded at a fraction of their size if that is large enough."""
    with ExitStack() as stack:
        try:
            try:
                image = _rgb(encoded, size, max_pixels, stack)
            except ValueError as error:
                spared = _spared(encoded, error)
                stack.close()
                image = _rgb(spared, size, max_pixels, stack)
        except UnreadableImageError:
            raise
        except Exception as error:
            raise UnreadableImageError(_reason(encoded, error)) from error
        # Whoever used it may still hold it when the next thread takes memory for its own.
        stack.callback(image.close)
        yield image


def _rgb(encoded: bytes, size: int, max_pixels: int, stack: ExitStack) -> Image.Image:
    image = _opened(encoded, max_pixels)
    whole = image.width * image.height
    # The factor of two leaves the final scaling something to smooth.
    image.draft("RGB", (2 * size, 2 * size))
    # Of a progressive JPEG, all coefficients are held whatever the scale.
    taken = whole if "progressive" in image.info else image.width * image.height
    stack.enter_context(_pixels.taking(taken))
    return _to_rgb(_upright(image))


def _spared(encoded: bytes, error: ValueError) -> bytes:
    """Return a PNG that Pillow refuses for the size of its texts or colour profile without these.

    Raises:
        ValueError: it is refused for something else.
    """
    if not any(words in str(error).lower() for words in _TOO_LARGE_TEXTS):
        raise error
    kept, start, name = [_PNG_SIGNATURE], len(_PNG_SIGNATURE), b""
    # Of each block: its length, its name, its contents, and a checksum.
    while start + 12 <= len(encoded) and name != b"IEND" and len(kept) < _MOST_PNG_BLOCKS:
        after = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        name = encoded[start + 4 : start + 8]
        if name not in _PNG_TEXTS:
            kept.append(encoded[start:after])
        start = after
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; one whose EXIF cannot be read is taken as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        image.load()  # that is no matter of EXIF
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grayscale, or 32-bit as which some formats store it
        samples = np.asarray(image)
        if samples.dtype != np.uint16:
            samples = samples.clip(0, LARGEST_SAMPLE)
        scaled = np.empty(samples.shape, dtype=np.uint8)
        np.floor_divide(samples, _SIXTEEN_TO_EIGHT_BITS, out=scaled, casting="unsafe")
        image = Image.fromarray(scaled)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns about palettes with transparency
    return image.convert("RGB")


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Pixels:
    if image.size != (size, size) or box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "empty file"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image in a known format"
    return first_line(error)
