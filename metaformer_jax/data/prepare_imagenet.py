"""ImageNet from its published archives, prepared by TFDS. This alone takes TensorFlow."""

import dataclasses
import hashlib
import importlib
import os
import pathlib

from metaformer_jax.data.tfds_source import TfdsSource
from metaformer_jax.paths import local_path

NAME = "imagenet2012:5.1.0"
# TFDS can also write parquet, but loses records there without a word.
FILE_FORMATS = ("array_record", "tfrecord")
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
        any_size: whether archives of other sizes pass, such as excerpts.

    Returns:
        The folder that was written.

    Raises:
        ValueError: an archive is missing or not the published one, or what came out is not whole.
        FileExistsError: the result is there already.
        ImportError: TensorFlow is not installed.
    """
    if file_format not in FILE_FORMATS:
        raise ValueError(
            f"`file_format` must be {' or '.join(FILE_FORMATS)}, got {file_format!r}. TFDS loses "
            "records when it writes others."
        )
    tars = local_path(tars).absolute()
    check_archives(tars, md5=md5, any_size=any_size)
    data_dir = local_path(data_dir).absolute()
    target = data_dir.joinpath(*NAME.split(":"))
    if target.exists():
        raise FileExistsError(
            f"`data_dir` must not hold the result yet, got {target}. Choose another place, or "
            "remove it."
        )
    _check_importable("tensorflow", "importlib_resources")
    import tensorflow_datasets as tfds

    builder = tfds.builder(NAME, data_dir=str(data_dir), file_format=file_format)
    options = tfds.download.DownloadConfig(manual_dir=str(tars), try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=options)
    # TFDS meets archives of any kind, and answers with errors of any kind.
    except Exception as error:
        raise ValueError(
            f"`tars` must hold archives that TFDS prepares, got {tars}: {error!r}. Compare them "
            "with what was published (--md5)."
        ) from error
    for archive in ARCHIVES:
        # Opening compares the files with the metadata.
        found = len(TfdsSource(NAME, archive.split, data_dir=str(data_dir)))
        if found != archive.num_images and not any_size:
            raise ValueError(
                f"{target} must have the {archive.num_images:,} {archive.split} images of "
                f"{archive.name}, got {found:,}. Remove it and prepare it again."
            )
    return target


def check_archives(tars: pathlib.Path, *, md5: bool = False, any_size: bool = False) -> None:
    """Compares names, sizes and on request contents with what was published.

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
        elif md5 and (found := _md5(path)) != archive.md5:
            problems.append(f"{archive.name} has the MD5 {found} instead of {archive.md5}")
    if problems:
        raise ValueError(
            f"`tars` must be a folder with the archives of https://image-net.org/download-images, "
            f"got {tars}: {'; '.join(problems)}. Download what is missing or different again."
        )


def _md5(path: pathlib.Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
