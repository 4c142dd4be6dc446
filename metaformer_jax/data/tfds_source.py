"""Image classification sets that TFDS prepared, read without TensorFlow."""

from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from metaformer_jax.data import tfds_metadata
from metaformer_jax.data.records import ArrayRecords, Records
from metaformer_jax.data.sources import BadRecordError, Record
from metaformer_jax.data.tfrecord import TfRecords


class TfdsSource:
    """A split of a prepared TFDS data set, in the order of its files.

    ArrayRecord files are read as they are. TFRecord files, which TFDS's own random access refuses,
    are indexed at the first opening (see `tfrecord.TfRecords`).

    Args:
        name: as TFDS writes it, "imagenet2012", "imagenet2012:5.1.0" or "imagenet_resized/64x64".
        split: "train", "validation", "test[:1000]", ...; "eval" is "validation", or "test" where
            there is none.
        data_dir: the folder in which TFDS prepared it, local or remote (`gs://...`); by default
            `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
        ValueError: the set is not prepared, has no such split, is no image classification, or its
            files are not whole.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | None = None):
        folder = tfds_metadata.find_dataset(name, data_dir or tfds_metadata.default_data_dir())
        metadata = tfds_metadata.read_split(folder, split)
        self.class_names = metadata.class_names
        self.channels = metadata.channels
        self._image_key, self._label_key = metadata.image_key, metadata.label_key
        self._records: Records
        if metadata.file_format == "array_record":
            self._records = ArrayRecords(metadata.shards)
        else:
            self._records = TfRecords(metadata.shards)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        try:
            features = tf_example_pb2.Example.FromString(record).features.feature
            # A feature that is missing or of another kind has no values here.
            (image,) = features[self._image_key].bytes_list.value
            (label,) = features[self._label_key].int64_list.value
        except (DecodeError, ValueError) as error:
            raise BadRecordError(
                f"{self.describe(index)} must be an example with one {self._image_key!r} and one "
                f"{self._label_key!r}, got something else ({error}). Prepare the data set again."
            ) from error
        if not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{self._label_key!r} of {self.describe(index)} must be one of the "
                f"{len(self.class_names)} classes, got {label}. A split without labels cannot be "
                "used."
            )
        return {"image": image, "label": label}

    def describe(self, index: int) -> str:
        """The file of a record, and its number there."""
        return self._records.describe(index)
