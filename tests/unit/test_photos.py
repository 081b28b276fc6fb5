"""Photos of every mode, orientation and size become upright RGB."""

import hashlib
import os
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketune.photos import load_photos
from tests.unit.photo_files import BLUE, GREEN, RED, encoded, landscape, load_one, png, with_orientation

# EXIF orientation: where the upper left, upper right and lower left corners of the stored picture belong, as (row, column).
CORNERS = {
    1: ((0, 0), (0, -1), (-1, 0)),
    2: ((0, -1), (0, 0), (-1, -1)),
    3: ((-1, -1), (-1, 0), (0, -1)),
    4: ((-1, 0), (-1, -1), (0, 0)),
    5: ((0, 0), (-1, 0), (0, -1)),
    6: ((0, -1), (-1, -1), (0, 0)),
    7: ((-1, -1), (0, -1), (-1, 0)),
    8: ((-1, 0), (0, 0), (-1, -1)),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("max_side", [None, 48])
@pytest.mark.parametrize("orientation", CORNERS)
def test_every_orientation_is_turned_upright(tmp_path, orientation, kind, max_side):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(landscape(), kind, exif=with_orientation(orientation), **options)
    image = load_one(tmp_path, content, max_side=max_side)
    long, short = (96, 64) if max_side is None else (48, 32)
    assert image.size == ((short, long) if orientation >= 5 else (long, short))
    pixels = np.asarray(image).astype(int)
    for (row, column), colour in zip(CORNERS[orientation], (RED, GREEN, BLUE), strict=True):
        assert np.abs(pixels[row, column] - colour).max() < 25


def test_nonsense_orientation_leaves_the_photo_as_it_lies(tmp_path):
    content = encoded(landscape(), "PNG", exif=with_orientation(77))
    assert np.array_equal(np.asarray(load_one(tmp_path, content)), np.asarray(landscape()))


def test_result_carries_no_metadata(tmp_path):
    exif = with_orientation(6)
    exif.get_ifd(0x8825)[1] = "N"  # a place
    content = encoded(landscape(), "JPEG", exif=exif, comment=b"secret", dpi=(300, 300))
    image = load_one(tmp_path, content)
    assert image.info == {}
    assert len(image.getexif()) == 0
    assert b"secret" not in encoded(image, "JPEG")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_mode_becomes_rgb(tmp_path, mode, kind):
    if (kind == "JPEG" and mode in ("P", "LA", "RGBA")) or (kind != "JPEG" and mode == "CMYK"):
        pytest.skip(f"{kind} has no {mode}")
    source = landscape().convert(mode)
    image = load_one(tmp_path, encoded(source, kind, **({"lossless": True} if kind == "WEBP" else {"quality": 95})))
    tolerance = 40 if kind == "JPEG" else 1
    assert np.abs(np.asarray(image).astype(int) - np.asarray(source.convert("RGB"))).mean() < tolerance


def test_transparency_is_laid_over_white(tmp_path):
    source = Image.new("RGBA", (4, 1))
    for column, pixel in enumerate([(0, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 128), (9, 9, 9, 255)]):
        source.putpixel((column, 0), pixel)
    image = load_one(tmp_path, encoded(source, "PNG"))
    assert [image.getpixel((column, 0)) for column in (0, 1, 3)] == [(255, 255, 255), RED, (9, 9, 9)]
    assert image.getpixel((2, 0))[0] == 255
    assert 126 <= image.getpixel((2, 0))[1] <= 128


def test_transparent_palette_entry_is_laid_over_white(tmp_path):
    source = Image.new("P", (2, 1))
    source.putpalette([10, 20, 30, 40, 50, 60])
    source.putpixel((1, 0), 1)
    image = load_one(tmp_path, encoded(source, "PNG", transparency=0))
    assert [image.getpixel((column, 0)) for column in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = (0, 257 * 100, 65535)
    content = png(3, 1, depth=16, colour=0, rows=b"\0" + struct.pack(">3H", *levels))
    image = load_one(tmp_path, content)
    assert [image.getpixel((column, 0)) for column in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


def test_16_bit_colour(tmp_path):
    content = png(1, 1, depth=16, colour=2, rows=b"\0" + struct.pack(">3H", 65535, 257 * 128, 0))
    assert load_one(tmp_path, content).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_first_frame_of_an_animation_counts(tmp_path, kind):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    image = load_one(tmp_path, encoded(first, kind, save_all=True, append_images=[second], duration=100, lossless=True))
    assert image.getpixel((4, 4)) == RED


@pytest.mark.parametrize("max_side", [None, 24])
def test_first_picture_of_a_multi_picture_jpeg_counts(tmp_path, max_side):
    first, second = Image.new("RGB", (64, 48), RED), Image.new("RGB", (32, 32), BLUE)
    image = load_one(tmp_path, encoded(first, "MPO", save_all=True, append_images=[second]), max_side=max_side)
    assert np.abs(np.subtract(image.getpixel((4, 4)), RED)).max() < 8


@pytest.mark.parametrize(
    ("size", "max_side", "expected"), [((1, 1), 512, (1, 1)), ((3000, 2), 100, (100, 1)), ((30, 40), 64, (30, 40))]
)
def test_any_size_and_never_enlarged(tmp_path, size, max_side, expected):
    assert load_one(tmp_path, encoded(Image.new("RGB", size), "PNG"), max_side=max_side).size == expected


def test_large_jpeg_is_decoded_small_and_looks_like_a_full_decode(tmp_path, monkeypatch):
    content = encoded(landscape(1200, 800), "JPEG", quality=92)
    decoded_sizes = []
    thumbnail = Image.Image.thumbnail

    def watch(self, *arguments, **options):
        decoded_sizes.append(self.size)
        return thumbnail(self, *arguments, **options)

    monkeypatch.setattr(Image.Image, "thumbnail", watch)
    image = load_one(tmp_path, content, max_side=128)
    assert decoded_sizes == [(300, 200)]
    assert image.size == (128, 85)
    full = Image.open(BytesIO(content)).resize(image.size, Image.Resampling.LANCZOS)
    error = np.square(np.asarray(image).astype(float) - np.asarray(full)).mean()
    assert 10 * np.log10(255**2 / error) > 35


def test_folder_is_sorted_and_passes_over_what_is_no_photo(tmp_path):
    contents = {name: encoded(landscape(seed=seed), "PNG") for seed, name in enumerate(["b.PNG", "a.webp", "c.jpeg"])}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.jpg").mkdir()
    photos = load_photos([tmp_path])
    assert [photo.name for photo in photos] == ["a.webp", "b.PNG", "c.jpeg"]
    assert [photo.sha256 for photo in photos] == [hashlib.sha256(contents[photo.name]).hexdigest() for photo in photos]
    assert all(
        np.array_equal(np.asarray(photo.image), np.asarray(Image.open(BytesIO(contents[photo.name])))) for photo in photos
    )
    assert load_photos(tmp_path) == photos == load_photos(str(tmp_path))


def test_result_does_not_depend_on_where_photos_lie_or_how_they_are_named(tmp_path):
    results = []
    for seeds in ((1, 2), (2, 1)):
        for side, seed in zip(("left", "right"), seeds, strict=True):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / "same.png").write_bytes(encoded(landscape(seed=seed), "PNG"))
        results += [
            load_photos([tmp_path / "left", tmp_path / "right"]),
            load_photos([tmp_path / "right/same.png", tmp_path / "left"]),
        ]
    assert len(results[0]) == 2
    assert all(result == results[0] for result in results)


def test_duplicates_are_dropped_and_reported(tmp_path):
    content = encoded(landscape(), "PNG")
    for name in ("b.png", "a.png", "c.png"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.png").write_bytes(encoded(landscape(seed=9), "PNG"))
    photos = load_photos([tmp_path, tmp_path / "a.png"])
    assert [(photo.name, photo.duplicates) for photo in photos] == [("a.png", ("b.png", "c.png")), ("d.png", ())]


def test_explicit_file_may_have_any_name(tmp_path):
    content = encoded(landscape(), "PNG")
    assert load_one(tmp_path, content, ".hidden").size == (96, 64)
    assert load_one(tmp_path, content, "no suffix").size == (96, 64)


def test_undecodable_file_name_becomes_printable(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    try:
        path.write_bytes(encoded(landscape(), "PNG"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert load_photos(path)[0].name.encode("utf-8").endswith(b".png")
