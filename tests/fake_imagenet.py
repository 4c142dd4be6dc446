"""The same few photographs as class folders, and as TFDS prepares them in either file format."""

import functools
import io
import os
import pathlib
import struct
import tarfile
import warnings

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.core import naming, splits
from tensorflow_datasets.proto import tf_example_pb2

from metaformer_jax.data.tfrecord import masked_crc32c

NAME, VERSION = "imagenet2012", "5.1.0"
CLASSES = ("n01440764", "n01443537", "n02085620")
COUNTS = {"train": 24, "val": 9}
NUM_SHARDS = {"train": 4, "val": 2}
# What TFDS knows the CMYK and the PNG file of the real archive by.
_CORRECTED = {3: "n01739381_1309.JPEG", 7: "n02105855_2933.JPEG"}
TFDS_SPLITS = {"train": "train", "val": "validation"}


@functools.cache
def photographs(split):
    """(file name, image file, label) of every example, in the order of all three forms."""
    rng = np.random.default_rng(list(split.encode()))
    examples = []
    for index in range(COUNTS[split]):
        label = index * len(CLASSES) // COUNTS[split]
        mode, kind = {3: ("CMYK", "JPEG"), 5: ("L", "JPEG"), 7: ("RGB", "PNG")}.get(
            index, ("RGB", "JPEG")
        )
        height, width = rng.integers(24, 64, 2)
        # Low frequencies and a little noise, as photographs have them.
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        # The published files of ImageNet are named like this whatever they hold.
        examples.append((f"{CLASSES[label]}_{index:03}.JPEG", file.getvalue(), label))
    return examples


def write_folder(root):
    for split in COUNTS:
        for name, image, label in photographs(split):
            path = pathlib.Path(root) / split / CLASSES[label] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return str(root)


def example(image, label, **others):
    """A serialised tf.train.Example."""
    message = tf_example_pb2.Example()
    for key, value in {"image": image, "label": label, **others}.items():
        if isinstance(value, int):
            message.features.feature[key].int64_list.value.append(value)
        else:
            message.features.feature[key].bytes_list.value.append(value)
    return message.SerializeToString(deterministic=True)


def examples(split):
    return [
        example(image, label, file_name=name.encode()) for name, image, label in photographs(split)
    ]


def write_tfrecord(path, records):
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(record + struct.pack("<I", masked_crc32c(record)))


def write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_dataset(
    data_dir,
    file_format,
    *,
    name=NAME,
    version=VERSION,
    config=None,
    features=None,
    supervised_keys=("image", "label"),
    records=None,
    num_shards=None,
):
    """A data set as TFDS prepares it, its metadata written by TFDS; returns its folder.

    By default ImageNet with the photographs above, otherwise any `records` by split.
    """
    folder = pathlib.Path(data_dir, name, config or "", version)
    folder.mkdir(parents=True)
    features = features or {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=CLASSES),
        "file_name": tfds.features.Text(),
    }
    if records is None:
        records = {TFDS_SPLITS[split]: examples(split) for split in COUNTS}
        num_shards = {TFDS_SPLITS[split]: number for split, number in NUM_SHARDS.items()}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version(version),
            data_dir=str(folder),
            module_name=__name__,
            config_name=config,
        ),
        features=tfds.features.FeaturesDict(features),
        supervised_keys=supervised_keys,
    )
    info.set_file_format(file_format)
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix=file_format
    )
    write = write_tfrecord if file_format == "tfrecord" else write_array_record
    split_infos = []
    for split, stored in records.items():
        # Of different lengths: a mistake in counting shows.
        parts = [
            part.tolist()
            for part in np.array_split(range(len(stored)), (num_shards or {}).get(split, 1))
        ]
        for shard, part in enumerate(parts):
            path = folder / f"{name}-{split}.{file_format}-{shard:05}-of-{len(parts):05}"
            write(path, [stored[index] for index in part])
        split_infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[len(part) for part in parts],
                num_bytes=sum(map(len, stored)),
                filename_template=template,
            )
        )
    info.set_splits(splits.SplitDict(split_infos))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info.write_to_directory(folder)
    return folder


def write_tars(folder):
    """The two archives of ImageNet with these photographs, under names that TFDS corrects."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, name in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for index, (file_name, image, of) in enumerate(photographs("train")):
                    if of == label:
                        _add(tar, _CORRECTED.get(index, file_name), image)
            _add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        # Not in the order of their names: the labels go by name.
        for index, (_, image, _) in reversed(list(enumerate(photographs("val"), 1))):
            _add(tar, f"ILSVRC2012_val_{index:08}.JPEG", image)
    return folder


def _add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
