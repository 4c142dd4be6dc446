"""Prints the published models: what they are built of here beside what was published.

python -m metaformer_jax.zoo ["caformer_*"]
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from metaformer_jax import models


def main(
    arguments: Sequence[str] | None = None, *, prog: str = "python -m metaformer_jax.zoo"
) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the published models; parameters and multiply-adds (MACs) are counted "
        "from the modules, the columns in brackets and the accuracies are the publication's.",
    )
    parser.add_argument("pattern", nargs="?", help='a shell pattern of names, "caformer_*"')
    pattern = parser.parse_args(arguments).pattern
    # --help does not wait for JAX.
    from metaformer_jax import models

    names = models.list_models(pattern)
    if not names:
        print(
            "error: no published model matches. Without a pattern all are listed.", file=sys.stderr
        )
        return 2
    table = Table(title=f"{len(names)} published models")
    table.add_column("name", no_wrap=True)
    for column in ("pixels", "classes", "params", "(publ.)", "frozen", "(publ.)"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("GMACs", "(publ.)", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    progress = Console(stderr=True)
    for name in track(names, "counting", console=progress, transient=True):
        info = models.model_info(name)
        counts = _count(info.architecture, info.image_size, info.num_classes)
        table.add_row(
            name,
            str(info.image_size),
            str(info.num_classes),
            f"{counts.params:,}",
            _figure(info.published_params_millions, "g", "M"),
            f"{counts.frozen_params:,}" if counts.frozen_params else "",
            _figure(info.published_frozen_params_millions, "g", "M"),
            f"{counts.macs / 1e9:.3f}",
            _figure(info.published_gmacs, ".1f", "G"),
            _figure(info.published_top1, ".1f", "%"),
        )
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width to fit into.
        console = Console(width=160)
    console.print(table)
    return 0


@functools.cache
def _count(architecture: str, image_size: int, num_classes: int) -> "models.Counts":
    from flax import nnx

    from metaformer_jax import models

    return models.count(
        lambda: models.create_model(
            architecture, image_size=image_size, num_classes=num_classes, rngs=nnx.Rngs(0)
        )
    )


def _figure(value: float | None, digits: str, unit: str) -> str:
    return "" if value is None else f"{value:{digits}} {unit}"


if __name__ == "__main__":
    sys.exit(main())
