"""ImageNet from its published archives, prepared by TFDS. This alone takes TensorFlow."""

import dataclasses
import errno
import hashlib
import importlib
import itertools
import os
import pathlib
import shutil
import sys
import tarfile

from rich import progress
from rich.console import Console

from metaformer_jax.data.tfds_metadata import FILE_FORMATS
from metaformer_jax.data.tfds_source import TfdsSource
from metaformer_jax.messages import first_line
from metaformer_jax.paths import check_has_place, local_path

NAME = "imagenet2012:5.1.0"
_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        name: of the file.
        size: in bytes.
        md5: hexadecimal digits.
        split: what TFDS makes of it.
        num_images: in the whole archive.
    """

    name: str
    size: int
    md5: str
    split: str
    num_images: int


ARCHIVES = (
    Archive(
        "ILSVRC2012_img_train.tar",
        147_897_477_120,
        "1d675b47d978889d74fa0da5fadfb00e",
        "train",
        1_281_167,
    ),
    Archive(
        "ILSVRC2012_img_val.tar",
        6_744_924_160,
        "29b22e2961454d5413ddabcf34fc5622",
        "validation",
        50_000,
    ),
)


def prepare_imagenet(
    tars: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    file_format: str = "array_record",
    md5: bool = False,
    any_size: bool = False,
) -> pathlib.Path:
    """Runs TFDS's builder over the two archives; it shuffles, and converts 23 files to RGB JPEG.

    Args:
        tars: the folder with `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`.
        data_dir: where the result goes, to `imagenet2012/5.1.0`.
        file_format: one of `FILE_FORMATS`.
        md5: whether to compare the archives' contents as well, which reads all of them.
        any_size: whether archives of other sizes pass, such as excerpts. Of the validation images
            these must be the first, since TFDS takes their labels in order.

    Returns:
        The folder that was written.

    Raises:
        ValueError: an archive is missing or not the published one, or what came out is not whole.
        FileExistsError: the result is there already.
        OSError: the archives cannot be read, or there is no room or right to write.
        ImportError: TensorFlow is not installed.
    """
    if file_format not in FILE_FORMATS:
        raise ValueError(
            f"`file_format` must be {' or '.join(FILE_FORMATS)}, got {file_format!r}. TFDS loses "
            "records when it writes others."
        )
    # What is soon checked comes first.
    tars = local_path(tars).absolute()
    check_archives(tars, any_size=any_size)
    data_dir = local_path(data_dir).absolute()
    target = data_dir.joinpath(*NAME.split(":"))
    if target.exists():
        raise FileExistsError(
            f"`data_dir` must not hold the result yet, got {target}. Choose another place, or "
            "remove it."
        )
    _check_room(data_dir, sum((tars / archive.name).stat().st_size for archive in ARCHIVES))
    _check_importable("tensorflow", "importlib_resources")
    _check_validation_images(tars / ARCHIVES[1].name, any_size=any_size)
    if md5:
        check_contents(tars)
    for left in sorted(target.parent.glob(f"incomplete.*_{target.name}")):
        print(
            f"note: {left} is of a preparation that was killed, or is still running. Nothing reads "
            "it: remove it once none is.",
            file=sys.stderr,
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(NAME, data_dir=str(data_dir), file_format=file_format)
    options = tfds.download.DownloadConfig(manual_dir=str(tars), try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=options)
    except OSError:
        raise
    # TFDS meets archives of any kind, and answers with errors of any kind.
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(
                f"`data_dir` must have room for the result, got {data_dir}, whose disk is full. "
                "Choose another disk."
            ) from error
        raise ValueError(
            f"`tars` must hold archives that TFDS prepares, got {tars}: {type(error).__name__}: "
            f"{first_line(error)}. Compare them with what was published (--md5)."
        ) from error
    for archive in ARCHIVES:
        # Opening compares the files with the metadata.
        found = len(TfdsSource(NAME, archive.split, data_dir=str(data_dir)))
        if found != archive.num_images and not any_size:
            aside = target.with_name(f"{target.name}.not_whole")
            target.rename(aside)
            raise ValueError(
                f"{archive.name} must have {archive.num_images:,} {archive.split} images, got "
                f"{found:,}. Compare it with what was published (--md5). What was prepared of it "
                f"is in {aside}, where nothing reads it."
            )
    return target


def check_archives(tars: pathlib.Path, *, any_size: bool = False) -> None:
    """Compares names and sizes with what was published.

    Raises:
        ValueError: something is missing or different; all of it is said at once.
    """
    problems = []
    for archive in ARCHIVES:
        path = tars / archive.name
        if not path.is_file():
            problems.append(f"{archive.name} is missing")
        elif path.stat().st_size != archive.size and not any_size:
            problems.append(
                f"{archive.name} has {path.stat().st_size:,} bytes instead of {archive.size:,}"
            )
        else:
            # What may not be read should say so now.
            path.open("rb").close()
    _refuse(tars, problems)


def check_contents(tars: pathlib.Path) -> None:
    """Compares MD5 sums with what was published, and shows how far it is.

    Raises:
        ValueError: contents are different; all of it is said at once.
    """
    problems = []
    for archive in ARCHIVES:
        if (found := _md5(tars / archive.name)) != archive.md5:
            problems.append(f"{archive.name} has the MD5 {found} instead of {archive.md5}")
    _refuse(tars, problems)


def _refuse(tars: pathlib.Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"`tars` must be a folder with the archives of https://image-net.org/download-images, "
            f"got {tars}: {'; '.join(problems)}. Download what is missing or different again."
        )


def _md5(path: pathlib.Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    console = Console(stderr=True)
    with progress.open(
        path,
        "rb",
        description=f"MD5 of {path.name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_validation_images(path: pathlib.Path, *, any_size: bool) -> None:
    """TFDS gives the labels to the images by their order: one left out would shift all others."""
    try:
        with tarfile.open(path) as archive:
            found = [os.path.basename(name) for name in sorted(archive.getnames())]
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} must be a tar archive, got: {first_line(error)}. Download it again."
        ) from error
    number = len(found) if any_size else ARCHIVES[1].num_images
    expected = [f"ILSVRC2012_val_{index:08}.JPEG" for index in range(1, number + 1)]
    if found != expected:
        first = next(pair for pair in itertools.zip_longest(found, expected) if pair[0] != pair[1])
        raise ValueError(
            f"{path.name} must hold the first validation images, all {number:,} by their published "
            f"names, got {first[0] or 'none'} in the place of {first[1] or 'none'}: TFDS would "
            "give the images after it the labels of others."
        )


def _check_room(folder: pathlib.Path, num_bytes: int) -> None:
    """Refuses a folder in which the result would find no room, or that may not be written to."""
    check_has_place(folder, what="`data_dir`")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise OSError(
            f"`data_dir` must have room for about {num_bytes / 1e9:,.1f} GB, got {folder} with "
            f"{free / 1e9:,.1f} GB free. Choose another disk."
        )


def _check_importable(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"TFDS's builder needs {module}, which is not installed: install "
                "metaformer-jax[prepare], best in an environment of its own. Reading what it "
                "prepared works without it."
            ) from error
