"""Draw docs/images/suspects-digits.png: the most suspicious labels of the digits, under their pictures.

chgval value builtin:digits && python benchmarks/suspects_picture.py digits.values.parquet out.png
"""

import io
import sys

from PIL import Image, ImageDraw

import chgval
from chgval.config import DataConfig
from chgval.data.formats import format_of

SHOWN, SIDE, TEXT = 9, 80, 34


def main() -> None:
    """Draw one row of pictures with the given and the suggested label below each."""
    report, target = sys.argv[1:]
    suspects = chgval.detect_noise(report).table.slice(0, SHOWN).to_pylist()
    sheet = Image.new("RGB", (SHOWN * (SIDE + 10) + 10, SIDE + TEXT + 20), "white")
    draw = ImageDraw.Draw(sheet)
    pictures = format_of(DataConfig(source="builtin:digits")).pictures([row["index"] for row in suspects])
    for number, (row, picture) in enumerate(zip(suspects, pictures, strict=True)):
        left = 10 + number * (SIDE + 10)
        image = Image.open(io.BytesIO(picture or b"")).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(image, (left, 10))
        draw.text((left, SIDE + 14), f"label {row['label_name']}", "firebrick", font_size=14)
        draw.text((left, SIDE + 31), f"better {row['suggested_name']}", "darkgreen", font_size=14)
    sheet.save(target)


if __name__ == "__main__":
    main()
