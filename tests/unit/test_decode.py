"""Every kind of image that people have, written by Pillow, read back by the decoder."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from chgval.data.decode import UnreadableImageError, decode_centre, decode_random_crop, shorter_side

# A left half of one colour and a right half of another survive any lossy format.
LEFT, RIGHT = (200, 40, 40), (40, 40, 200)


def two_halves(size=(16, 16)):
    image = Image.new("RGB", size, LEFT)
    image.paste(RIGHT, (size[0] // 2, 0, size[0], size[1]))
    return image


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def in_mode(image, mode):
    return image.quantize(8) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "file_format", "tolerance"),
    [
        ("RGB", "PNG", 0), ("RGB", "JPEG", 12), ("RGB", "WEBP", 25), ("RGB", "BMP", 0), ("RGB", "TIFF", 0),
        ("RGBA", "PNG", 0), ("P", "PNG", 0), ("P", "GIF", 0), ("CMYK", "JPEG", 12), ("CMYK", "TIFF", 2),
    ],
)  # fmt: skip
def test_colour_modes_decode_to_the_same_colours(mode, file_format, tolerance):
    pixels = decode_centre(encode(in_mode(two_halves(), mode), file_format, quality=95), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    for column, colour in ((3, LEFT), (12, RIGHT)):
        assert np.abs(pixels[:, 8, column].astype(int) - colour).max() <= tolerance


def test_grayscale_bilevel_and_palette_with_transparency_become_rgb():
    gray = np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))
    for image in (Image.fromarray(gray), Image.fromarray(gray).convert("LA")):
        np.testing.assert_array_equal(decode_centre(encode(image, "PNG"), 16), np.stack([gray] * 3))
    bilevel = decode_centre(encode(Image.fromarray(gray).convert("1"), "PNG"), 16)
    assert set(np.unique(bilevel)) == {0, 255}
    palette = in_mode(two_halves(), "P")
    pixels = decode_centre(encode(palette, "PNG", transparency=bytes([0, 128, 255])), 16)
    assert tuple(pixels[:, 8, 3]) == LEFT


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(file_format):
    samples = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    pixels = decode_centre(encode(Image.fromarray(samples), file_format), 16)
    np.testing.assert_allclose(pixels[0], samples / 257, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    """An image stored with each of the eight orientations, made by undoing it, is shown upright."""
    upright = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3))
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(stored, "PNG", exif=exif)
    assert shorter_side(encoded) == 6
    np.testing.assert_array_equal(decode_centre(encoded, 6), np.asarray(upright)[1:7].transpose(2, 0, 1))


def block(name, contents):
    return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))


@pytest.mark.parametrize(
    "texts",
    [
        block(b"zTXt", b"parameters\0\0" + zlib.compress(b"workflow " * 200_000)),
        block(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
        block(b"iCCP", b"x\0\0" + zlib.compress(bytes(2_000_000))),
        block(b"tEXt", b"comment\0" + b"x" * 100_000_000),
    ],
)
def test_png_with_texts_of_any_size_are_read(texts):
    """Image generators keep prompts and workflows in them, before the pixels or after."""
    plain = encode(two_halves(), "PNG")
    before, after = plain[:33] + texts + plain[33:], plain[:-12] + texts + plain[-12:]
    for encoded in (before, after):
        np.testing.assert_array_equal(decode_centre(encoded, 16), decode_centre(plain, 16))
        assert shorter_side(encoded) == 16


def test_orientation_in_a_text_of_a_png_is_applied():
    """Where other programs keep EXIF in a PNG; Pillow turns the image as it says."""
    exif = Image.Exif()
    exif[0x0112] = 3
    raw = exif.tobytes()
    lines = f"\nexif\n{len(raw):8d}\n{raw.hex()}\n".encode()
    plain = encode(two_halves(), "PNG")
    turned = plain[:33] + block(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines)) + plain[33:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert expected.getpixel((0, 0)) == RIGHT
    np.testing.assert_array_equal(decode_centre(turned, 16), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_an_image_whose_exif_cannot_be_read_is_taken_as_it_lies(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    damaged = encode(two_halves(), file_format, exif=b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", **options)
    plain = encode(two_halves(), file_format, **options)
    np.testing.assert_array_equal(decode_centre(damaged, 16), decode_centre(plain, 16))


def test_the_centre_is_cut_and_scaled_like_pillow_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8))
    expected = image.crop((8, 0, 28, 20)).resize((10, 10), Image.Resampling.BILINEAR)
    pixels = decode_centre(encode(image, "PNG"), 10)
    # At the cut's two sides the filter also sees the pixels beyond it.
    np.testing.assert_array_equal(pixels[:, :, 1:-1], np.asarray(expected).transpose(2, 0, 1)[:, :, 1:-1])


def test_large_jpegs_are_decoded_at_a_fraction_with_nearly_the_same_pixels():
    ramp = np.add.outer(np.linspace(0, 127, 800), np.linspace(0, 127, 800)).astype(np.uint8)
    encoded = encode(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=95)
    expected = Image.fromarray(ramp).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    difference = decode_centre(encoded, 64).astype(int) - np.asarray(expected).transpose(2, 0, 1)
    assert np.abs(difference).max() <= 3


def test_random_crops_depend_on_their_generator_only():
    encoded = encode(two_halves((40, 30)), "PNG")
    first, again, other = (decode_random_crop(encoded, 16, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 16, 16) and not np.array_equal(first, other)


GOOD_JPEG = encode(two_halves((64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image in a known format"),
        (GOOD_JPEG[: len(GOOD_JPEG) // 2], "(?i)truncated"),
        (encode(two_halves(), "PNG")[:60], "truncated"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "half a JPEG", "start of a PNG", "float TIFF"],
)
def test_what_cannot_be_decoded_says_why(encoded, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode_centre(encoded, 16)


@pytest.mark.parametrize("limit", [100, 255])
def test_a_decompression_bomb_is_unreadable_in_every_thread(limit):
    """Pillow only warns up to twice its limit, and filters of warnings do not hold for threads."""
    encoded = encode(two_halves(), "PNG")

    def outcome(_):
        with pytest.raises(UnreadableImageError, match=f"256 pixels, more than --max-pixels {limit}"):
            decode_centre(encoded, 16, limit)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(outcome, range(200)))
