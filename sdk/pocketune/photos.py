"""The photos of a person: found, checked, opened safely, turned upright, in RGB.

A photo is untrusted input. Its size is read from the header before any pixel is decoded, only the JPEG, PNG and WebP decoders
are offered the bytes, and whatever goes wrong inside them becomes one `PhotoError`. Pillow's global settings stay as they are.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pocketune.errors import PhotoError, RunError
from pocketune.units import readable_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"})
"""What makes a file in a folder a photo. A file that is named explicitly may have any name."""
MAX_PIXELS = 100_000_000
MAX_PHOTO_SIDE = 2048
MAX_FILE_BYTES = 500_000_000

PIXEL_BYTES = 4
"""Of an image in memory, as Pillow holds it."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_OTHER_IMAGES = frozenset({".heic", ".heif", ".hif", ".avif", ".jxl", ".gif", ".bmp", ".tif", ".tiff"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo, ready for cropping.

    Attributes:
        name: file name without its folder.
        image: upright RGB pixels; carries no EXIF data, so no place or date leaks into what is written from it.
        sha256: hex digest of the file's bytes.
        duplicates: names of further files with the same bytes, which were left out.
    """

    name: str
    image: Image.Image
    sha256: str
    duplicates: tuple[str, ...] = ()


def load_photos(paths: Path | str | Sequence[Path | str], max_side: int | None = None) -> tuple[Photo, ...]:
    """Load photos from files and folders, sorted by name, each content once.

    Folders are not searched recursively; hidden files and files that are no images are passed over there. A file that is named
    explicitly, or that has the suffix of an image, has to be one. The first frame of an animation counts, transparency is laid
    over white, 16-bit grey is reduced to 8 bits, colour profiles are not applied.

    Args:
        paths: files and folders, or a single one.
        max_side: pixels; photos whose longer side is larger are scaled down to it while they are read, which saves most of the
            memory and time of a large JPEG. Smaller photos are never enlarged.

    Raises:
        PhotoError: nothing was found, or a photo is missing, unreadable, empty, of another format, damaged, or larger than
            `MAX_PIXELS`.
    """
    if max_side is not None and max_side < 1:
        msg = f"max_side must be at least 1 pixel, got {max_side}."
        raise PhotoError(msg)
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not given:
        msg = "no photo was given. Name a folder of JPEG, PNG or WebP files, or the files."
        raise PhotoError(msg)
    files = dict.fromkeys(file.absolute() for path in given for file in _files(path))
    unique: dict[str, tuple[str, Image.Image]] = {}
    duplicates: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        content = _read(file)
        name = os.fsencode(file.name).decode("utf-8", "replace")
        digest = hashlib.sha256(content).hexdigest()
        if digest in unique:
            duplicates[digest].append(name)
        else:
            unique[digest] = name, _decode(content, file, max_side)
            duplicates[digest] = []
    photos = [
        Photo(name=name, image=image, sha256=digest, duplicates=tuple(duplicates[digest]))
        for digest, (name, image) in unique.items()
    ]
    # Equal names from different folders are told apart by content, so that the order does not depend on where photos lie.
    return tuple(sorted(photos, key=lambda photo: (photo.name, photo.sha256)))


def reading_bytes(paths: Sequence[Path | str], *, max_side: int) -> int:
    """Memory that `load_photos` takes at most for one of some photos while it reads it: the file, and pixels as they are there.

    Args:
        paths: files and folders, of photos that can be read.
        max_side: as of `load_photos`.

    Raises:
        PhotoError: a folder cannot be read.
    """
    most = 0
    for file in (file for path in paths for file in _files(Path(path))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as image:
                _draft(image, max_side)
                copies = 5 if image.has_transparency_data else 1 if image.mode == "RGB" else 2
                copies += 4 * image.mode.startswith("I") + 2 * ("progressive" in image.info)  # decoders hold coefficients
                pixels = image.height * (copies * image.width + min(image.width, max_side))  # the last of a half-done resize
        most = max(most, file.stat().st_size + PIXEL_BYTES * pixels)
    return most


def load_made_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Images that a run has made before.

    Raises:
        RunError: one is damaged.
    """
    images = []
    for path in paths:
        try:
            images.append(_decode(_read(path), path, None))
        except PhotoError as error:
            msg = f"the image {path} of this run is damaged. Delete it; the same command with --resume makes it again."
            raise RunError(msg) from error
    return images


def numbered_images(out: Path, count: int, *, suffixes: Collection[str]) -> list[Path]:
    """The files of some made images: `out` itself, or with numbers in the name where there are several.

    Raises:
        RunError: it ends in none of the suffixes.
    """
    if out.suffix.lower() not in suffixes:
        msg = f"cannot write an image named {out.name}: expected --out to end in {', '.join(suffixes)}."
        raise RunError(msg)
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:02d}") for number in range(count)]


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        seen = [entry for entry in path.iterdir() if not entry.name.startswith(".") and not entry.is_dir()]
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}. Check the path and its permissions."
        raise PhotoError(msg) from error
    photos = [entry for entry in seen if entry.suffix.lower() in SUFFIXES | _OTHER_IMAGES]
    if not photos:
        msg = (
            f"no photo in {path}: expected JPEG, PNG or WebP files, found {len(seen)} other file(s). "
            "Subfolders are not searched: name the folder that holds the photos."
        )
        raise PhotoError(msg)
    return photos


def _read(path: Path) -> bytes:
    try:
        if not path.exists():
            msg = f"photo {path} does not exist. Check the path."
            raise PhotoError(msg)
        if not path.is_file():
            msg = f"photo {path} is not a file, expected a JPEG, PNG or WebP file or a folder of them."
            raise PhotoError(msg)
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            msg = f"photo {path} has {readable_size(size)}, the limit is {readable_size(MAX_FILE_BYTES)}. Save it smaller."
            raise PhotoError(msg)
        content = path.read_bytes()
    except OSError as error:
        msg = f"cannot read photo {path}: {error.strerror}. Check the path and its permissions."
        raise PhotoError(msg) from error
    if not content:
        msg = f"photo {path} is empty (0 bytes), expected a JPEG, PNG or WebP image. Copy it again or leave it out."
        raise PhotoError(msg)
    return content


def _decode(content: bytes, path: Path, max_side: int | None) -> Image.Image:
    # Pillow warns about large images and odd metadata; the size has its own limit below and metadata is dropped.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise PhotoError(_not_an_image(content, path)) from error
        except Image.DecompressionBombError as error:
            allowed = 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS) / 1e6  # Pillow's own limit, which the application may have set
            raise PhotoError(_too_large(path, f"its header says more than {allowed:.4g} megapixels")) from error
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly every type of exception on damaged bytes
            raise PhotoError(_damaged(path, error)) from error
        with opened as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PhotoError(_too_large(path, f"its header says {width}x{height} pixels"))
            try:
                return _upright_rgb(image, max_side)
            except MemoryError:
                raise
            except Exception as error:  # as above
                raise PhotoError(_damaged(path, error)) from error


def _upright_rgb(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is not None:
        _draft(image, max_side)
    turn = _UPRIGHT.get(_orientation(image))
    image.load()  # before it is made smaller, which would ask the decoder to draft once more
    rgb = _rgb(image)
    if max_side is not None:
        rgb.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    # A copy knows nothing of the file, and is one of the small image alone.
    rgb = rgb.transpose(turn) if turn is not None else rgb.copy() if rgb is image else rgb
    rgb.info = {}
    return rgb


def _draft(image: Image.Image, max_side: int) -> None:
    """Let a JPEG decoder drop to 1/2, 1/4 or 1/8, for free. Twice the wanted size is kept for a clean final filter."""
    scale = min(1.0, 2 * max_side / max(image.size))
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data around sound pixels: the photo is used as it lies
        return 1
    return value if isinstance(value, int) else 1


def _not_an_image(content: bytes, path: Path) -> str:
    if content.startswith(_SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return _damaged(path, "its header cannot be read")
    if content[4:8] == b"ftyp" or path.suffix.lower() in _OTHER_IMAGES:
        kind = "a HEIC or AVIF image" if content[4:8] == b"ftyp" else f"a {path.suffix.lower()} file"
        return (
            f"photo {path} is {kind}, expected JPEG, PNG or WebP. "
            "Convert it to JPEG (an iPhone does so with Settings > Camera > Formats > Most Compatible) or leave it out."
        )
    return f"photo {path} is not an image: expected JPEG, PNG or WebP, got bytes that begin with {content[:8]!r}. Leave it out."


def _too_large(path: Path, why: str) -> str:
    return (
        f"photo {path} is too large to open safely: {why}; the limit is {MAX_PIXELS // 1_000_000} megapixels. "
        "Save it smaller: training needs a few hundred pixels a side."
    )


def _damaged(path: Path, why: object) -> str:
    return f"photo {path} is damaged or cut off ({why}), expected a whole JPEG, PNG or WebP. Copy it again or leave it out."
