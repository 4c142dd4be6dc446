"""Pictures by file, folder and glob, and what to say of those that are unusual or unusable."""

import glob
import io
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from metaformer_jax.data.augment import EvalTransform
from metaformer_jax.data.folder import readable_extensions
from metaformer_jax.data.transforms import BadImageError, has_16_bits, to_channels
from metaformer_jax.messages import first_line
from metaformer_jax.paths import local_path

# What a picture may have, so that no file takes more than about half a gigabyte: Pillow's limit.
MAX_PIXELS = 2 * 89_478_485
_EXIF_ORIENTATION = 0x0112
# What makes a picture of each orientation upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where a PNG keeps it in front of the pixels, by Pillow's names.
_PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}


def find_images(patterns: str | Iterable[str]) -> tuple[list[pathlib.Path], list[str]]:
    """The files that are meant, each once, in order; and a line for each pattern that finds none.

    A single pattern may be given by itself.

    A file is taken whatever its name; of a folder every file whose extension Pillow reads, with
    those of the folders in it, linked ones too, sorted by path, hidden ones left out. `*`, `?`,
    `[...]` and `**` work as in a shell, also where no shell has seen them.
    """
    found: dict[pathlib.Path, None] = {}
    problems = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = local_path(pattern)
        if os.path.lexists(path):
            matches = [path]
        elif glob.has_magic(pattern):
            matches = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
            if not matches:
                problems.append(f"{pattern}: no file matches")
        else:
            matches = []
            problems.append(f"{pattern}: no such file")
        for match in matches:
            if match.is_dir():
                inside, closed = _images_in(match)
                found.update(dict.fromkeys(inside))
                problems.extend(closed)
                if not inside and not closed:
                    problems.append(f"{match}: the folder has no picture with a known extension")
            elif match.is_file():
                found[match] = None
            else:
                problems.append(f"{match}: neither a file nor a folder")
    return list(found), problems


def _images_in(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """The pictures in a folder, and a line for each folder in it that cannot be read."""
    readable = readable_extensions()
    images: list[pathlib.Path] = []
    closed: list[str] = []
    seen = set()

    def tell(error: OSError) -> None:
        closed.append(f"{error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=tell, followlinks=True):
        # A link may lead to where the walk has been.
        if (place := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = pathlib.Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in readable and path.is_file():
                images.append(path)
    return images, closed


def read_image(
    path: str | os.PathLike[str], transform: EvalTransform, *, upright: bool = False
) -> tuple[UInt8[np.ndarray, "h w c"], list[str]]:
    """The pixels that a model is evaluated on, and what a user should know of the picture.

    Args:
        path: the file.
        transform: the evaluation transform.
        upright: turn the picture as its EXIF orientation says, which evaluation does not.

    Raises:
        BadImageError: the file is no image, is damaged, or too large to hold.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        notes, orientation = _examine(file, transform)
        file.seek(0)
        data = file.read()
    opened = Image.open(io.BytesIO(data))
    turn = _TURNS.get(orientation)
    if turn is not None and not upright:
        notes.append("as in evaluation, its EXIF orientation is not applied; --upright applies it")
    if has_16_bits(opened):
        notes.append("16 bits per pixel, of which the upper 8 are taken")
    if turn is None or not upright:
        return transform(data), notes
    try:
        image = to_channels(opened.transpose(turn), transform.channels)
    except BadImageError:
        raise
    # Each format's reader fails in its own way.
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    return transform.of_image(image), notes


def _count_frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    # Those after the first, which is taken, may be cut off.
    except Exception:
        return 1


def why_unreadable(error: Exception) -> str:
    """What to say of an error with which Pillow does not open a file, or decode it."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        most = f"{MAX_PIXELS / 1e6:.0f} million pixels"
        return f"more than {most}, the most that are decoded. Make it smaller"
    return first_line(error)


def _examine(file: io.BufferedReader, transform: EvalTransform) -> tuple[list[str], int]:
    """What the header tells, before anything is decoded; and the orientation, 1 if not told."""
    try:
        image = Image.open(file)
        transform.check_size(*image.size)
        frames = _count_frames(image)
        is_transparent = image.has_transparency_data
    except BadImageError:
        raise
    # Each format's reader fails in its own way.
    except Exception as error:
        raise BadImageError(why_unreadable(error)) from error
    notes = []
    if frames > 1:
        notes.append(f"{frames} frames, of which the first is taken")
    if is_transparent:
        notes.append("transparent: as in evaluation, the colours behind are taken")
    return notes, _orientation(image)


def _orientation(image: Image.Image) -> int:
    # Pillow applies it to TIFF files while it decodes them, in evaluation too.
    if image.format == "TIFF":
        return 1
    # Without one of these in front a PNG would be decoded to look for it behind the pixels.
    if image.format == "PNG" and not image.info.keys() & _PNG_EXIF:
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    # The pixels of a picture with damaged EXIF are as good as any.
    except Exception:
        return 1
