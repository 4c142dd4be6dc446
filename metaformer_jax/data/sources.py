"""Sources of examples: random access to encoded, labelled images."""

import io
import pathlib
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image


class BadRecordError(ValueError):
    """One record cannot be read; others may be readable."""


class Record(TypedDict):
    """One labelled image as it is stored: the content of an image file, and a class number."""

    image: bytes
    label: int


class Source(Protocol):
    """A finite list of records; the same index always gives the same record, on every host.

    Sources are sent to worker processes, so they must be picklable, and several threads must be
    able to read from one.

    Attributes:
        class_names: in the order of the labels.
        channels: 3, or 1 for grey images.
    """

    class_names: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """The location of a record, for messages: a path, or a shard and a record number."""
        ...


class Digits:
    """1,797 handwritten digits, 8x8 grey pixels, in 10 classes; they come with the package.

    The test set of the Optical Recognition of Handwritten Digits data (E. Alpaydin and C. Kaynak,
    1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0) as scikit-learn distributes it. Every
    fifth example of each class is held out. Given as PNG, which is lossless.

    Args:
        split: "train" (1,442 examples) or "test" (355).

    Raises:
        ValueError: no such split.
    """

    class_names = tuple("0123456789")
    channels = 1

    def __init__(self, split: str):
        if split not in ("train", "test"):
            raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
        with np.load(pathlib.Path(__file__).parent / "digits.npz") as data:
            images, labels = data["images"], data["labels"]
        # Position among the examples of the same class.
        rank = np.zeros(len(labels), int)
        for label in range(10):
            rank[labels == label] = np.arange(np.sum(labels == label))
        chosen = (rank % 5 == 4) == (split == "test")
        # Intensities are whole numbers from 0 to 16.
        pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)
        self._images = [_encode_png(image) for image in pixels]
        self._labels: list[int] = labels[chosen].tolist()
        self._split = split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        return {"image": self._images[index], "label": self._labels[index]}

    def describe(self, index: int) -> str:
        """Which of the digits an index means."""
        return f"example {checked_index(index, len(self))} of the digits' {self._split} split"


def _encode_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def checked_index(index: int, length: int) -> int:
    """The index as a plain int.

    Raises:
        IndexError: it is not in `[0, length)`; counting from the end is not offered.
    """
    index = int(index)
    if not 0 <= index < length:
        raise IndexError(f"`index` must be in [0, {length}), got {index}.")
    return index


def open_source(name: str, split: str, *, root: str | None = None) -> Source:
    """Opens a data set by its name in the config.

    Args:
        name: "digits", "folder" (class folders of images under `root`), or the name of a prepared
            TFDS data set, such as "imagenet2012", "imagenet2012:5.1.0" or "mnist".
        split: "train", "eval" for the data set's evaluation split, or the data set's own name of a
            split ("val"; for TFDS also slices, "train[:90%]").
        root: the image folder, or the TFDS `data_dir`; a `gs://` path for TFDS only.

    Raises:
        ValueError: there is no such data set or split, or its files are not complete.
    """
    if name == "digits":
        return Digits("test" if split == "eval" else split)
    # Imported where they are used: digits need no TFDS, which takes longer to load.
    if name == "folder":
        from metaformer_jax.data.folder import ImageFolder

        if not root:
            raise ValueError(
                "`data.root` must be the folder that holds 'train' and 'val' where `data.name` is "
                f"'folder', got {root!r}."
            )
        return ImageFolder(root, "val" if split == "eval" else split)
    from metaformer_jax.data.tfds_source import TfdsSource

    return TfdsSource(name, split, data_dir=root or None)
