"""Photos: every mode, orientation and size becomes upright RGB; everything else becomes a PhotoError that says what to do."""

import hashlib
import os
import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pocketune.errors import PhotoError
from pocketune.photos import MAX_PIXELS, load_photos

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)

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


def test_nothing_given_or_found(tmp_path):
    assert "no photo was given" in fault([])
    (tmp_path / "notes.txt").write_text("hello")
    message = fault([tmp_path])
    assert str(tmp_path) in message
    assert "JPEG, PNG or WebP" in message
    assert "1 other file" in message
    assert "does not exist" in fault([tmp_path / "none.jpg"])
    assert "does not exist" in fault([tmp_path / "none"])
    assert "max_side" in fault([tmp_path], 0)


@pytest.mark.parametrize("named", [True, False])
def test_text_named_as_a_photo(tmp_path, named):
    path = tmp_path / "letter.jpg"
    path.write_text("Dear friend")
    message = fault([path if named else tmp_path])
    assert "not an image" in message
    assert "letter.jpg" in message
    assert "Dear" in message


def test_explicit_text_file(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear friend")
    assert "not an image" in fault([path])


def test_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    assert "empty (0 bytes)" in fault([tmp_path])


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_says_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    message = fault([tmp_path])
    assert "HEIC" in message
    assert "Convert it to JPEG" in message


def test_other_image_formats_say_to_convert(tmp_path):
    (tmp_path / "a.gif").write_bytes(encoded(landscape().convert("P"), "GIF"))
    assert "Convert it to JPEG" in fault([tmp_path])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("max_side", [None, 32])
def test_truncated_photo(tmp_path, kind, part, max_side):
    content = encoded(landscape(256, 192), kind)
    (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * part)])
    message = fault([tmp_path], max_side)
    assert "damaged or cut off" in message
    assert "Copy it again" in message


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(encoded(landscape(), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60000, 60000)
    webp = bytearray(encoded(landscape().convert("RGBA"), "WEBP", exif=with_orientation(1)))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    return {
        "png": png(60000, 60000, depth=8, colour=2, rows=b""),
        "png that Pillow opens with a warning": png(12000, 10000, depth=8, colour=2, rows=b""),
        "widest png": png(2**31 - 1, 2**31 - 1, depth=16, colour=6, rows=b""),
        "jpeg": bytes(jpeg),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("name", bombs())
def test_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, name):
    def decode(self):
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    (tmp_path / "bomb.png").write_bytes(bombs()[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = fault([tmp_path], 64)
    if name == "webp":  # its decoder compares the canvas with the picture before it says a size
        assert "too large" in message or "damaged" in message
    else:
        assert "too large to open safely" in message
        assert f"{MAX_PIXELS // 10**6} megapixels" in message


def test_text_bomb_in_png(tmp_path):
    data = b"Comment\0\0" + zlib.compress(bytes(5_000_000), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    (tmp_path / "a.png").write_bytes(png(1, 1, depth=8, colour=0, rows=b"\0\0", extra=chunk))
    assert "damaged" in fault([tmp_path])


def test_limits_that_the_application_gave_pillow_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(encoded(landscape(), "PNG"))
    assert "too large" in fault([tmp_path])


def test_global_state_of_pillow_and_warnings_stays(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(landscape(), "PNG"))
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_photos([tmp_path])
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    fault([tmp_path])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_odd_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a file" in fault([tmp_path])
    (tmp_path / "pipe.jpg").unlink()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert "loop.jpg" in fault([tmp_path])
    (tmp_path / "loop.jpg").unlink()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    assert "does not exist" in fault([tmp_path])
    (tmp_path / "dangling.jpg").unlink()
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(10**10)
    assert "limit is 500 MB" in fault([tmp_path])


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded(landscape(), "JPEG"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = fault([tmp_path])
    assert "Permission denied" in message
    assert "permissions" in message


def mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        action = rng.randrange(4)
        if action == 0:
            data[at] = rng.randrange(256)
        elif action == 1:
            data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        elif action == 2:
            del data[at : at + rng.randrange(1, 32)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 32))
        if not data:
            break
    return bytes(data)


def with_right_checksums(content: bytes) -> bytes:
    """Repair the checksum of each PNG chunk, so that damage reaches the decoder."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end])) if end + 4 <= len(data) else data[end : end + 4]
        at = end + 4
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_damaged_bytes_give_a_photo_or_a_photo_error(tmp_path, kind):
    rng = random.Random(0)
    content = encoded(landscape(40, 24), kind, exif=with_orientation(6), compress_level=0)
    outcomes = {"photo": 0, "error": 0}
    for turn in range(250):
        damaged = mutated(content, rng)
        try:
            damaged = with_right_checksums(damaged) if kind == "PNG" else damaged
            image = load_one(tmp_path, damaged, max_side=rng.choice([None, 16]))
        except PhotoError as error:
            assert str(tmp_path) in str(error), turn
            outcomes["error"] += 1
        else:
            assert image.width * image.height <= MAX_PIXELS
            outcomes["photo"] += 1
    assert outcomes["error"] > 10
    assert outcomes["photo"] > (0 if kind == "PNG" else 10)  # checksums inside a PNG's pixels catch nearly everything
