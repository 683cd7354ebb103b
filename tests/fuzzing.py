"""Damaged images for the decoder: `python -m tests.fuzzing SEED COUNT` tries many, and prints what came out.

A process of its own, as a crash would end it. Every input comes from its number and the seed alone.
"""

import collections
import faulthandler
import io
import json
import resource
import sys
import time

import numpy as np
from PIL import Image

from chgval.data.decode import UnreadableImageError, decode_centre, decode_random_crop, shorter_side

SECONDS_PER_INPUT = 10
# Far below the default, so that headers that claim many pixels cost no memory in a million inputs.
MAX_PIXELS = 4_000_000
SIZE = 24
# (format, mode, options) of the undamaged images.
KINDS = [
    ("JPEG", "RGB", {"quality": 90}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}),
    ("PNG", "I;16", {}), ("PNG", "1", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "1", {"compression": "group4"}), ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}),
    ("TGA", "RGB", {"compression": "tga_rle"}), ("AVIF", "RGB", {}),
    ("DIB", "RGB", {}), ("MPO", "RGB", {"save_all": True}), ("GIF", "P", {"save_all": True}),
    ("WEBP", "RGB", {"save_all": True}), ("TIFF", "RGB", {"save_all": True}),
]  # fmt: skip
INTERESTING = [0, 1, 0x7F, 0x80, 0xFE, 0xFF]


def undamaged() -> list[bytes]:
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30))
    encoded = []
    for name, mode, options in KINDS:
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16))
        else:
            image = blobs.convert(mode)
        if name == "JPEG" and mode == "RGB":
            exif = Image.Exif()
            exif[0x0112] = 6
            options = {**options, "exif": exif}
        if "save_all" in options:  # several pictures in one file
            options = {**options, "append_images": [image.rotate(180)]}
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        encoded.append(buffer.getvalue())
    return encoded


def damaged(encoded: list[bytes], seed: int, number: int) -> bytes:
    """Flip, overwrite, cut, repeat, insert, and splice; most often near the start, where headers are."""
    rng = np.random.default_rng([seed, number])
    data = bytearray(encoded[int(rng.integers(len(encoded)))])
    for _ in range(int(rng.geometric(0.4))):
        if not data:
            break
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        at = int(rng.integers(reach))
        match int(rng.integers(7)):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at] = int(rng.choice(INTERESTING))
            case 2:
                width = int(rng.choice([2, 4]))
                data[at : at + width] = bytes(rng.choice(INTERESTING, width).astype(np.uint8))
            case 3:
                del data[at : at + int(rng.integers(1, 33))]
            case 4:
                data[at:at] = rng.integers(0, 256, int(rng.integers(1, 33)), dtype=np.uint8).tobytes()
            case 5:
                data[at:at] = data[at : at + int(rng.integers(1, 65))]
            case 6:
                other = encoded[int(rng.integers(len(encoded)))]
                data[at:] = other[int(rng.integers(len(other))) :]
    return bytes(data)


def outcome(encoded: bytes, number: int) -> str:
    """Try an input in all ways; return what the decoder said. Anything but pixels or a reason is a fault."""
    try:
        side = shorter_side(encoded, MAX_PIXELS)
        assert side > 0
        centre = decode_centre(encoded, SIZE, MAX_PIXELS)
        crop = decode_random_crop(encoded, SIZE, np.random.default_rng(number), MAX_PIXELS)
    except UnreadableImageError as error:
        reason = str(error)
        assert reason and "\n" not in reason and len(reason) <= 250, repr(reason)
        return "refused"
    for pixels in (centre, crop):
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == np.uint8
    return "decoded"


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(seed: int, count: int) -> None:
    """Try many inputs; print what became of them, and which were the slowest.

    A thread that is not Python's ends the process when one takes too long, whatever it does then.
    """
    encoded = undamaged()
    found: collections.Counter[str] = collections.Counter()
    peaks = {}
    seconds = []
    for number in range(count):
        data = damaged(encoded, seed, number)
        faulthandler.dump_traceback_later(SECONDS_PER_INPUT, exit=True)
        began = time.perf_counter()
        try:
            found[outcome(data, number)] += 1
        except BaseException:
            sys.stderr.write(f"seed {seed}, number {number}\n")
            raise
        seconds.append(time.perf_counter() - began)
        if number in (count // 5, count - 1):
            peaks[number] = peak_mebibytes()
    faulthandler.cancel_dump_traceback_later()
    first, last = peaks.values()
    memory = {"peak_MiB": round(last), "growth_MiB": round(last - first, 1)}
    slowest = {int(number): round(seconds[number], 3) for number in np.argsort(seconds)[:-4:-1]}
    sys.stdout.write(json.dumps({"inputs": count, **found, **memory, "slowest": slowest}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
