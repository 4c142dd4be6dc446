"""Prints the published models: what they are built of here beside what was published.

python -m metaformer_jax.zoo ["caformer_*"] [--plot accuracy.png]
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaformer_jax import programs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from metaformer_jax import models

_PROG = "python -m metaformer_jax.zoo"
_COLOURS = {
    "identityformer": "#8a8a8a",
    "randformer": "#b07aa1",
    "poolformerv2": "#59a14f",
    "convformer": "#e08214",
    "caformer": "#2166ac",
}
_TITLES = {
    "identityformer": "IdentityFormer",
    "randformer": "RandFormer",
    "poolformerv2": "PoolFormerV2",
    "convformer": "ConvFormer",
    "caformer": "CAFormer",
}
# By the tag of a checkpoint: how it was trained, the line's style, and whether markers are full.
_TRAININGS: dict[str, tuple[str, Any, bool]] = {
    "": ("ImageNet-1K, 224 pixels", "-", True),
    "384": ("fine-tuned at 384 pixels", "--", True),
    "in21ft1k": ("ImageNet-21K first, 224 pixels", "-", False),
    "384_in21ft1k": ("ImageNet-21K first, 384 pixels", "--", False),
}


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the published models; parameters and multiply-adds (MACs) are counted "
        "from the modules, the columns in brackets and the accuracies are the publication's.",
    )
    parser.add_argument("pattern", nargs="?", help='a shell pattern of names, "caformer_*"')
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="FILE",
        help="draw the published accuracies against the counts, as .png, .svg or .pdf",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Prints the table; returns the exit code."""
    args = parse_args(argv, prog)
    return programs.run(lambda: _show(args.pattern, args.plot))


def _show(pattern: str | None, plot: pathlib.Path | None) -> None:
    # --help does not wait for JAX.
    from rich.console import Console
    from rich.progress import track

    from metaformer_jax import models
    from metaformer_jax.paths import local_path

    names = models.list_models(pattern)
    if not names:
        raise ValueError(
            f"no published model matches {pattern!r}. Without a pattern all are listed."
        )
    plot = plot and local_path(plot)
    _check_plot(plot)
    counted = {}
    if plot and not any(models.model_info(name).published_top1 for name in names):
        raise ValueError(
            "`--plot` must have a model with an ImageNet-1K accuracy to show, got "
            f"{', '.join(names)}."
        )
    rows: list[tuple[str, ...]] = []
    progress = Console(stderr=True)
    for name in track(names, "counting", console=progress, transient=True):
        info = models.model_info(name)
        counted[name] = counts = _count(info.architecture, info.image_size, info.num_classes)
        row = (
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
        rows.append(row)
    console = Console()
    table = _table(rows)
    width = Console(width=1000).measure(table).maximum
    if not console.is_terminal:
        # A file or a pipe has no width to fit into.
        console = Console(width=max(width, 160))
    elif console.width < width:
        table = _table([row[:4] + row[5:6] + row[7:8] + row[9:] for row in rows], is_narrow=True)
    console.print(table)
    if plot:
        figure_of(counted).savefig(plot, dpi=100)
        print(f"{plot}: the published accuracies against the counts")


def _table(rows: Sequence[tuple[str, ...]], *, is_narrow: bool = False) -> "Table":
    """The rows as a table; a narrow one leaves out the published sizes, and the lines."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{len(rows)} published models", box=None if is_narrow else box.HEAVY_HEAD)
    sizes = ["params", "frozen", "GMACs"]
    if not is_narrow:
        sizes = ["params", "(publ.)", "frozen", "(publ.)", "GMACs", "(publ.)"]
    table.add_column("name", no_wrap=True)
    for column in ("pixels", "classes", *sizes, "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def figure_of(counted: Mapping[str, "models.Counts"]) -> "Figure":
    """Published ImageNet-1K accuracies against counted multiply-adds and parameters.

    Args:
        counted: by published name; those without an accuracy are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    by_macs, by_params = figure.subplots(1, 2, sharey=True)
    lines = _lines(counted)
    for axes, count_of, title in (
        (by_macs, lambda counts: counts.macs / 1e9, "multiply-adds per image, in billions"),
        (by_params, lambda counts: counts.params / 1e6, "trained parameters, in millions"),
    ):
        for (family, tag), members in lines.items():
            _, style, is_full = _TRAININGS[tag]
            colour = _COLOURS[family]
            points = [(count_of(counts), top1) for _, counts, top1 in members]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                linewidth=1 if tag else 2,
                marker="s" if "384" in tag else "o",
                markersize=5 if tag else 7,
                markerfacecolor=colour if is_full else "white",
                # The plain trainings of all families lie above what only two of them have.
                zorder=2 if tag else 3,
            )
            if not tag:
                _name_sizes(axes, points, [size for size, *_ in members], family)
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.margins(x=0.07)
        lowest, highest = axes.get_xlim()
        marks = [mark for mark in (2, 4, 8, 15, 30, 60, 100) if lowest < mark < highest]
        axes.set_xticks(marks, [str(mark) for mark in marks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    by_macs.set_ylabel("ImageNet-1K top-1 accuracy, in % (published)")
    _add_legends(by_macs, by_params, lines)
    return figure


def _lines(counted: Mapping[str, "models.Counts"]) -> dict[tuple[str, str], list[Any]]:
    """By family and tag: (size, counts, accuracy) of each member, the smallest first."""
    from metaformer_jax.models import model_info

    lines: dict[tuple[str, str], list[Any]] = {}
    for name, counts in counted.items():
        info = model_info(name)
        if info.published_top1 is not None:
            member = info.size, counts, info.published_top1
            lines.setdefault((info.family, info.tag), []).append(member)
    return lines


def _name_sizes(axes: Any, points: list[Any], sizes: list[str], family: str) -> None:
    from matplotlib import patheffects

    below = family in ("convformer", "identityformer")
    for point, size in zip(points, sizes, strict=True):
        axes.annotate(
            size,
            point,
            xytext=(4, -5) if below else (-4, 4),
            textcoords="offset points",
            ha="left" if below else "right",
            va="top" if below else "bottom",
            fontsize=9,
            color=_COLOURS[family],
            path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )


def _add_legends(first: Any, second: Any, lines: Mapping[tuple[str, str], Any]) -> None:
    from matplotlib.lines import Line2D

    families = dict.fromkeys(family for family, _ in lines)
    first.legend(
        handles=[Line2D([], [], color=_COLOURS[f], marker="o", label=_TITLES[f]) for f in families],
        loc="lower right",
    )
    second.legend(
        handles=[
            Line2D(
                [],
                [],
                color="black",
                linestyle=style,
                marker="s" if "384" in tag else "o",
                markerfacecolor="black" if is_full else "white",
                label=label,
            )
            for tag, (label, style, is_full) in _TRAININGS.items()
            if any(tag == drawn for _, drawn in lines)
        ],
        loc="lower right",
    )


def _check_plot(path: pathlib.Path | None) -> None:
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"`--plot` must end in .png, .svg or .pdf, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"`--plot` must lie in a folder that is there, got {path}.")
    from metaformer_jax.weights.outputs import check_can_be_written

    check_can_be_written(path, what="`--plot`")


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
