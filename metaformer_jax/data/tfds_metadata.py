"""What a prepared TFDS data set says of itself: where it lies, its features, splits and files.

TFDS reads the metadata; neither this nor the records behind it need TensorFlow.
"""

import contextlib
import dataclasses
import fnmatch
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from metaformer_jax.data import storage
from metaformer_jax.data.records import Shard
from metaformer_jax.messages import first_line
from metaformer_jax.paths import local_path

# Where both forms lie side by side, the first is read: it has its own index.
FILE_FORMATS = ("array_record", "tfrecord")
_INFO, _FEATURES = "dataset_info.json", "features.json"
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>[\d.*]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class SplitMetadata:
    """A split of an image classification set.

    Attributes:
        image_key: the name of the image in each record.
        label_key: the name of the label.
        class_names: in the order of the labels.
        channels: 3, or 1 for grey images.
        file_format: one of `FILE_FORMATS`.
        shards: the files of the split, with absolute paths.
    """

    image_key: str
    label_key: str
    class_names: tuple[str, ...]
    channels: int
    file_format: str
    shards: tuple[Shard, ...]


def default_data_dir() -> str:
    """`$TFDS_DATA_DIR`, or TFDS's own default."""
    return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def find_dataset(name: str, data_dir: str) -> str:
    """The folder of a prepared data set, with its newest version that fits the name.

    Args:
        name: as TFDS writes it, "mnist", "mnist:3.0.1" or "imagenet_resized/64x64:0.1.0".
        data_dir: the folder in which TFDS prepared it.

    Raises:
        ValueError: it is not there; the message tells what is, and how to prepare it.
    """
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        raise ValueError(
            "`data.name` must be 'digits', 'folder' or the name of a TFDS data set, such as "
            f"'imagenet2012' or 'imagenet_resized/64x64:0.1.0', got {name!r}."
        )
    if not storage.is_remote(data_dir):
        data_dir = os.path.abspath(local_path(data_dir))
    dataset = storage.join(data_dir, parsed["name"])
    config, wanted = parsed["config"], parsed["version"] or "*"
    if config is None and not _versions(dataset):
        configs = [
            entry
            for entry in storage.list_folder(dataset)
            if not entry.startswith(".") and _versions(storage.join(dataset, entry))
        ]
        if len(configs) > 1:
            raise ValueError(
                f"`data.name` must say which config of {parsed['name']} is meant, got {name!r}. "
                f"{dataset} holds {', '.join(configs)}: write {parsed['name']}/{configs[0]}."
            )
        config = configs[0] if configs else None
    folder = storage.join(dataset, config) if config else dataset
    fitting = [version for version in _versions(folder) if fnmatch.fnmatch(version, wanted)]
    if not fitting:
        raise _not_prepared(name, parsed["name"], data_dir, folder)
    return storage.join(folder, fitting[-1])


def read_split(folder: str, split: str) -> SplitMetadata:
    """The metadata of a split.

    Args:
        folder: with `dataset_info.json` and `features.json`.
        split: a split's name or a slice of it, as TFDS writes them ("train[:90%]"); "eval" is
            "validation", or "test" where there is none.

    Raises:
        ValueError: there is no such split, the set is no image classification, or its files are
            in a format that cannot be read by position.
    """
    info = load_info(folder)
    image_key, label_key = _keys(info)
    image, label = info.features[image_key], info.features[label_key]
    if image.np_dtype != np.uint8:
        raise ValueError(
            f"The images of {info.full_name} must have 8 bits per channel, got {image.np_dtype}."
        )
    names = label.names or [str(number) for number in range(label.num_classes or 0)]
    if not names:
        raise ValueError(f"{info.full_name} must say how many classes it has, got none.")
    return SplitMetadata(
        image_key=image_key,
        label_key=label_key,
        class_names=tuple(names),
        channels=1 if image.shape[-1] == 1 else 3,
        file_format=stored_format(info),
        shards=split_shards(info, folder, split),
    )


def load_info(folder: str) -> Any:
    """The `tfds.core.DatasetInfo` of a prepared version.

    Raises:
        ValueError: the folder holds no metadata, or such as TFDS does not read.
    """
    with _local_metadata(folder) as local:
        try:
            return tfds.builder_from_directory(local).info
        # TFDS meets files of any kind, and answers with errors of any kind.
        except Exception as error:
            raise ValueError(
                f"{folder} must hold the metadata of a prepared TFDS data set, got files that TFDS "
                f"does not read: {first_line(error)}. Copy or prepare the data set again."
            ) from error


def split_shards(info: Any, folder: str, split: str) -> tuple[Shard, ...]:
    """The files of a split or of a slice of it, in order.

    Raises:
        ValueError: there is no such split, it is empty, or its files are in another format.
    """
    if split == "eval" and split not in info.splits:
        split = next((name for name in ("validation", "test") if name in info.splits), split)
        if split == "eval":
            raise ValueError(
                f"{info.full_name} must have a split 'validation' or 'test', which evaluation "
                f"reads, got {', '.join(info.splits)} alone. Sort its images into folders, with "
                "config.data.name=folder, or prepare a set that has one."
            )
    file_format = stored_format(info)
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`split` must be one of {info.full_name}'s, {', '.join(info.splits)}, or a slice such "
            f"as 'train[:90%]', got {split!r}: {first_line(error)}"
        ) from error
    if not instructions:
        raise ValueError(f"`split` must hold at least one record, got {split!r}, which is empty.")
    shards = []
    for instruction in instructions:
        name = os.path.basename(instruction.filename)
        # Of a set in two forms, TFDS names the files of the first.
        name = name.replace(f".{info.file_format.value}-", f".{file_format}-")
        shards.append(
            Shard(
                path=storage.join(folder, name),
                num_records=instruction.examples_in_shard,
                skip=instruction.skip,
                take=instruction.take,
            )
        )
    return tuple(shards)


def stored_format(info: Any) -> str:
    """In which of `FILE_FORMATS` a data set lies there.

    Raises:
        ValueError: in none.
    """
    available = [form.value for form in (info.file_format, *info.alternative_file_formats) if form]
    for file_format in FILE_FORMATS:
        if file_format in available:
            return file_format
    raise ValueError(
        f"{info.full_name} must be prepared as {' or '.join(FILE_FORMATS)}, got "
        f"{', '.join(available) or 'no format'}. Prepare it again with file_format='array_record'."
    )


def _versions(folder: str) -> list[str]:
    """The whole versions in a folder, oldest first; TFDS marks others as incomplete."""
    versions = [name for name in storage.list_folder(folder) if _VERSION.fullmatch(name)]
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")])


def _not_prepared(name: str, dataset: str, data_dir: str, searched: str) -> ValueError:
    inside = _root_above(dataset, data_dir)
    if inside is not None:
        return ValueError(
            f"`data.root` must be the folder in which TFDS prepared {name!r}, got {data_dir!r}, "
            f"which is inside the data set. Give {inside!r}."
        )
    there = storage.list_folder(searched) or storage.list_folder(data_dir)
    where = searched if storage.list_folder(searched) else data_dir
    if dataset == "imagenet2012":
        command = f"python -m metaformer_jax.data.prepare imagenet --tars TARS --output {data_dir}"
    else:
        # Not `tfds build`, which needs apache_beam as well.
        command = (
            f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
            f"data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
        )
    return ValueError(
        f"`data.root` must be the folder in which TFDS prepared {name!r}, got {data_dir!r}: there "
        f"is no fitting version in {searched} ({where} holds {', '.join(there[:10]) or 'nothing'})."
        f" Prepare it, with the extra metaformer-jax[prepare] installed:\n  {command}"
    )


def _root_above(dataset: str, folder: str) -> str | None:
    """The `data_dir` of a data set whose own folder, or one of a version in it, this is."""
    above, name = folder.rstrip("/").rpartition("/")[::2]
    is_version = _VERSION.fullmatch(name) and _INFO in storage.list_folder(folder)
    if is_version or (name == dataset and _versions(folder)):
        while name and name != dataset:
            above, name = above.rpartition("/")[::2]
        return above if name == dataset else None
    return None


def _version_below(folder: str, names: list[str]) -> str | None:
    """The newest version in a data set's folder, or in that of the first data set in a folder."""
    for inner in (folder, *(storage.join(folder, name) for name in names)):
        if versions := _versions(inner):
            return storage.join(inner, versions[-1])
    return None


@contextlib.contextmanager
def _local_metadata(folder: str) -> Iterator[str]:
    """The folder itself, or for a remote one a copy of its small files."""
    names = storage.list_folder(folder)
    if missing := [name for name in (_INFO, _FEATURES) if name not in names]:
        version = _version_below(folder, names)
        remedy = f"Give {version}" if version else "Copy or prepare the data set again"
        raise ValueError(
            f"{folder} must hold {_INFO} and {_FEATURES}, got no {' and no '.join(missing)}. "
            f"{remedy}."
        )
    if not storage.is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        for name in names:
            if name.endswith((".json", ".txt")):
                content = storage.read_file(storage.join(folder, name))
                (pathlib.Path(local) / name).write_bytes(content)
        yield local


def _keys(info: Any) -> tuple[str, str]:
    """The names of the image and of the label."""
    # Sorted: TFDS gives them in another order at every start.
    features = dict(sorted(info.features.items())) if hasattr(info.features, "items") else {}
    images = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
        and not isinstance(feature, tfds.features.LabeledImage)
    ]
    labels = [
        key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)
    ]
    supervised: tuple[Any, ...] = info.supervised_keys or ()
    image, label, *_ = (*supervised, None, None)
    # Supervised keys may also be nested; such a set counts by its features alone.
    if isinstance(image, str) and image in images and isinstance(label, str) and label in labels:
        return image, label
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
    raise ValueError(
        f"{info.full_name} must be an image classification set, with one Image and one ClassLabel "
        f"or with supervised keys that name them, got {kinds or 'other features'}."
    )
