"""Predictions as a table, as CSV and as JSON lines."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import IO

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Guess:
    """One class that a picture may show."""

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, the likeliest first."""

    image: str
    guesses: tuple[Guess, ...]


def likeliest(
    probabilities: Float[np.ndarray, " classes"], class_names: Sequence[str], *, top: int
) -> tuple[Guess, ...]:
    """The `top` classes, or all where there are fewer; of equals the lower number first."""
    order = np.argsort(-probabilities, kind="stable")[:top].tolist()
    return tuple(Guess(index, class_names[index], float(probabilities[index])) for index in order)


def write_csv(predictions: Iterable[Prediction], file: IO[str]) -> None:
    """One row for each guess: image, rank from 1, index, name and probability of the class."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "rank", "index", "name", "probability"])
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses, 1):
            row = [prediction.image, rank, guess.index, guess.name, f"{guess.probability:.6g}"]
            writer.writerow(row)
        file.flush()


def write_jsonl(predictions: Iterable[Prediction], file: IO[str]) -> None:
    """One JSON object on each line: `{"image": ..., "predictions": [{"index": ..., ...}, ...]}`."""
    for prediction in predictions:
        guesses = [
            dataclasses.asdict(guess) | {"probability": float(f"{guess.probability:.6g}")}
            for guess in prediction.guesses
        ]
        line = {"image": prediction.image, "predictions": guesses}
        print(json.dumps(line, ensure_ascii=False), file=file, flush=True)


def write_table(predictions: Iterable[Prediction], file: IO[str]) -> None:
    """A table to read; as wide as the terminal, or as it needs to be elsewhere."""
    table = Table("picture", box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("class")
    table.columns[0].overflow = "fold"
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses):
            picture = "" if rank else prediction.image
            table.add_row(picture, f"{guess.probability:.1%}", guess.name)
        table.add_section()
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        width = Console(width=10_000).measure(table).maximum
        console = Console(file=file, highlight=False, markup=False, emoji=False, width=width)
    console.print(table)


WRITERS: dict[str, Callable[[Iterable[Prediction], IO[str]], None]] = {
    "table": write_table,
    "csv": write_csv,
    "jsonl": write_jsonl,
}
