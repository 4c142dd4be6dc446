"""Many pictures through one model: read in threads while the device works, in batches."""

import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Array, Float, UInt8

from metaformer_jax.data.transforms import BadImageError
from metaformer_jax.inference.classifier import Classifier
from metaformer_jax.inference.images import read_image
from metaformer_jax.models.cores import num_cores

# Each may hold a picture of half a gigabyte.
_MAX_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that gave no picture, or a picture without an answer, and why."""

    path: pathlib.Path
    problem: str


@dataclasses.dataclass(frozen=True)
class _Read:
    path: pathlib.Path
    pixels: UInt8[np.ndarray, "h w c"]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Classified(_Read):
    """A picture as the model saw it, what a user should know of it, and its probabilities."""

    probabilities: Float[np.ndarray, " classes"]


def classify(
    classifier: Classifier,
    paths: Sequence[pathlib.Path],
    *,
    batch_size: int = 32,
    upright: bool = False,
) -> Iterator[Classified | Unreadable]:
    """Classifies files, in order, those that cannot be read among them.

    Args:
        classifier: the model.
        paths: the files.
        batch_size: pictures that the model sees at a time.
        upright: see `read_image`.
    """
    batch_size = min(batch_size, len(paths))
    waiting = None
    for files in _read_batches(classifier, paths, batch_size=batch_size, upright=upright):
        images = [file.pixels for file in files if isinstance(file, _Read)]
        probabilities = None
        if images:
            # One size is compiled once: what is missing to a whole batch is filled up.
            missing = [np.zeros_like(images[0])] * (batch_size - len(images))
            probabilities = classifier.probabilities(np.stack(images + missing))
        # Accelerators are at work on these while those before are handed out and the next are read.
        if waiting is not None:
            yield from _with_probabilities(*waiting)
        waiting = files, probabilities
    if waiting is not None:
        yield from _with_probabilities(*waiting)


def _with_probabilities(
    files: list[_Read | Unreadable], probabilities: Float[Array, "b classes"] | None
) -> Iterator[Classified | Unreadable]:
    rows = iter(() if probabilities is None else np.asarray(probabilities))
    for file in files:
        if isinstance(file, Unreadable):
            yield file
        elif np.isfinite(row := next(rows)).all():
            yield Classified(file.path, file.pixels, file.notes, row)
        else:
            yield Unreadable(file.path, "the model's answer is not finite")


def _read_batches(
    classifier: Classifier, paths: Sequence[pathlib.Path], *, batch_size: int, upright: bool
) -> Iterator[list[_Read | Unreadable]]:
    def read(path: pathlib.Path) -> _Read | Unreadable:
        try:
            pixels, notes = read_image(path, classifier.transform, upright=upright)
        except BadImageError as error:
            return Unreadable(path, str(error))
        except OSError as error:
            return Unreadable(path, error.strerror or str(error))
        return _Read(path, pixels, tuple(notes))

    num_threads = min(_MAX_THREADS, num_cores())
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        reading: list[concurrent.futures.Future[_Read | Unreadable]] = []
        remaining = iter(paths)
        while True:
            following = [pool.submit(read, p) for p in itertools.islice(remaining, batch_size)]
            if reading:
                yield [future.result() for future in reading]
            reading = following
            if not reading:
                return
