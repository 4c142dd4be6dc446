"""Where examples come from: random access to labelled images."""

import pathlib
from typing import Protocol, TypedDict

import numpy as np
from jaxtyping import UInt8

from metaformer_jax.data.transforms import resize


class Example(TypedDict):
    """One labelled image."""

    image: UInt8[np.ndarray, "h w c"]
    label: int


class Source(Protocol):
    """A finite list of examples; the same index always gives the same example."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Digits:
    """1,797 handwritten digits, 8x8 pixels, in 10 classes; they come with the package.

    The test set of the Optical Recognition of Handwritten Digits data (E. Alpaydin and C. Kaynak,
    1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0) as scikit-learn distributes it. Every
    fifth example of each class is held out.

    Args:
        split: "train" (1,442 examples) or "test" (355).
        image_size: pixels per side to which the images are enlarged, once for all.
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str, *, image_size: int = 8):
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
        pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        self._images = [resize(image, image_size) for image in pixels]
        self._labels = labels[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self._labels[index])}


def open_source(name: str, split: str, *, image_size: int) -> Source:
    """The examples of a data set by its name in the config.

    Raises:
        ValueError: no data set has this name.
    """
    if name != "digits":
        raise ValueError(f"`data.name` must be 'digits', got {name!r}.")
    return Digits(split, image_size=image_size)
