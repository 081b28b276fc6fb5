"""What is no photo, or damaged, or hostile becomes a PhotoError that says what to do."""

import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from pocketune.errors import PhotoError, RunError
from pocketune.photos import MAX_PIXELS, load_made_images, load_photos
from tests.unit.photo_files import encoded, fault, landscape, load_one, png, with_orientation


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


def test_a_damaged_picture_of_a_run_says_how_it_is_made_again(tmp_path):
    path = tmp_path / "000.png"
    Image.new("RGB", (16, 16), "red").save(path)
    assert [image.getpixel((0, 0)) for image in load_made_images([path])] == [(255, 0, 0)]
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(RunError, match=r"000\.png of this run is damaged\. Delete it"):
        load_made_images([path])


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
