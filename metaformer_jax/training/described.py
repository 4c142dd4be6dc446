"""Data sets of which only the size is known, for programs that never read an example."""

from typing import NoReturn

import ml_collections

from metaformer_jax import models
from metaformer_jax.data.sources import Source, open_source


class DescribedSource:
    """A `data.sources.Source` without examples."""

    def __init__(self, num_examples: int, num_classes: int, channels: int):
        self.class_names = tuple(map(str, range(num_classes)))
        self.channels = channels
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> NoReturn:
        raise TypeError(f"A described data set must not be read, got index {index}.")

    def describe(self, index: int) -> str:
        """The example's number."""
        return f"example {index}"


# Examples for training and for evaluation, and classes.
_IMAGENET_1K = ("ImageNet-1K", 1_281_167, 50_000, 1000)
# As in the publication (section 3); there is no evaluation set.
_IMAGENET_21K = ("ImageNet-21K", 14_197_122, 50_000, 21841)


def described_sources(
    config: ml_collections.ConfigDict,
) -> tuple[tuple[Source, Source], str]:
    """The config's data sets or, if they cannot be opened, the size of ImageNet-1K or 21K.

    Returns:
        The sources for training and evaluation, and a sentence about what they are.
    """
    data = config.data
    try:
        train, evaluation = (
            open_source(data.name, split, root=data.root) for split in ("train", "eval")
        )
    except (ValueError, OSError, ImportError):
        name = config.model.name
        is_21k = models.is_published(name) and models.model_info(name).num_classes == 21841
        known, num_train, num_eval, num_classes = _IMAGENET_21K if is_21k else _IMAGENET_1K
        channels = len(data.mean)
        text = (
            f"{data.name!r} cannot be opened here: taken as {known}, {num_train:,} examples of "
            f"{num_classes:,} classes"
        )
        described = [DescribedSource(size, num_classes, channels) for size in (num_train, num_eval)]
        return (described[0], described[1]), text
    text = f"{data.name}: {len(train):,} examples of {len(train.class_names):,} classes"
    return (train, evaluation), text
