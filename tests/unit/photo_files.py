"""What tests of photos share: pictures, files made of them, and their loading."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketune.errors import PhotoError
from pocketune.photos import load_photos

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


def landscape(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture with structure at several scales and four plain corners."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / width
    waves = [np.sin(rng.uniform(4, 20) * rows + rng.uniform(4, 20) * columns + rng.uniform(0, 6)) for _ in range(3)]
    image = Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))
    corner = max(4, width // 8)
    image.paste(RED, (0, 0, corner, corner))
    image.paste(GREEN, (width - corner, 0, width, corner))
    image.paste(BLUE, (0, height - corner, corner, height))
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def load_one(folder: Path, content: bytes, name: str = "photo.jpg", max_side: int | None = None) -> Image.Image:
    path = folder / name
    path.write_bytes(content)
    (photo,) = load_photos([path], max_side)
    assert photo.image.mode == "RGB"
    return photo.image


def fault(paths: object, max_side: int | None = None) -> str:
    with pytest.raises(PhotoError) as caught:
        load_photos(paths, max_side)
    return str(caught.value)
