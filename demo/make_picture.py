"""Join a run's photos and its before/after pictures into one image: `python demo/make_picture.py RUN OUT.png`."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE

SIDE, GAP, MARGIN = 192, 8, 76
INK, PAPER = (60, 60, 67), (255, 255, 255)


def main(run: Path, out: Path) -> None:
    """Three rows: the photos, then each prompt before and after training, from the same seed."""
    record = RunRecord.read(run / RECORD_FILE)
    rows = [
        ("photos", [Image.open(path) for path in sorted((run / "photos").iterdir())]),
        ("before", [Image.open(run / pair.before) for pair in record.samples]),
        ("after", [Image.open(run / pair.after) for pair in record.samples]),
    ]
    columns = len(record.samples)
    canvas = Image.new("RGB", (MARGIN + columns * (SIDE + GAP), 3 * (SIDE + GAP) + 28), PAPER)
    brush, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for row, (label, images) in enumerate(rows):
        top = row * (SIDE + GAP)
        brush.text((MARGIN - 12, top + SIDE / 2), label, fill=INK, font=font, anchor="rm")
        for column, image in enumerate(images[:columns]):
            canvas.paste(image.convert("RGB").resize((SIDE, SIDE)), (MARGIN + column * (SIDE + GAP), top))
    for column, pair in enumerate(record.samples):
        middle = MARGIN + column * (SIDE + GAP) + SIDE / 2
        words = pair.prompt.removeprefix("a photo of ")
        brush.text((middle, 3 * (SIDE + GAP) + 10), words, fill=INK, font=font, anchor="mm")
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
