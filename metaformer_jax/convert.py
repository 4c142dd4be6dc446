"""Converts PyTorch checkpoints to Flax weights, and back.

Examples:
    python -m metaformer_jax.convert caformer_s18.pth --model caformer_s18 --output s18
    python -m metaformer_jax.convert s18 --reverse --layout timm --output back.pth
"""

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metaformer_jax import programs
from metaformer_jax.paths import local_path

if TYPE_CHECKING:
    from metaformer_jax.models import MetaFormer
    from metaformer_jax.weights import Record

# What a checkpoint of one name may differ in.
_SETTINGS = ("num_classes", "in_channels", "image_size")
_PROG = "python -m metaformer_jax.convert"


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace(_PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input",
        type=pathlib.Path,
        metavar="INPUT",
        help="a .pth or .safetensors checkpoint, in the sail or timm layout (it shows by itself); "
        "with --reverse a converted folder or file; or the workdir of a training run",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the published name; a converted folder knows its own"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="PATH",
        help="a folder (Orbax checkpoint and JSON), or a file by its suffix: .safetensors, and "
        ".pth with --reverse; may be given several times",
    )
    parser.add_argument("--reverse", action="store_true", help="write a PyTorch checkpoint")
    parser.add_argument(
        "--layout",
        choices=["sail", "timm"],
        help="of what --reverse writes: the original code's (default) or timm's",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare with timm on random images before writing"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--entry",
        help="of a training checkpoint, by default the first that it has of state_dict_ema, "
        "model_ema, state_dict and model",
    )
    parser.add_argument("--num-classes", type=int, help="if not as published")
    parser.add_argument("--in-channels", type=int, help="if not 3")
    parser.add_argument("--image-size", type=int, help="RandFormer only: if not as published")
    args = parser.parse_args(argv)
    if args.reverse and args.verify:
        parser.error("--verify compares with a PyTorch file, and so not with --reverse")
    if args.layout and not args.reverse:
        parser.error("--layout is that of a PyTorch checkpoint: give --reverse as well")
    # A conversion needs no accelerator, and must not take one away from a running program.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from metaformer_jax.weights import files, write

    args.input, args.output = local_path(args.input), [*map(local_path, args.output)]
    for path in args.output:
        if args.reverse and not write.is_file_name(path):
            parser.error(f"--reverse writes a file, .pth or .safetensors, not {path}")
        if (
            not args.reverse
            and write.is_file_name(path)
            and files.suffix_of(path) != files.SAFETENSORS
        ):
            parser.error(f"a PyTorch file, {path}, takes --reverse")
    _check_apart(parser, args.input, args.output)
    return args


def _check_apart(
    parser: argparse.ArgumentParser, source: pathlib.Path, outputs: Sequence[pathlib.Path]
) -> None:
    """Refuses outputs that would replace the input or each other, or a folder around them."""
    # Not `resolve`, which raises for links that lead to themselves.
    real = {path: pathlib.Path(os.path.realpath(path)) for path in (source, *outputs)}
    for path in outputs:
        if real[path] in (real[source], *real[source].parents):
            parser.error(f"INPUT and --output must differ, got {path} for {source}")
    for path, other in itertools.permutations(outputs, 2):
        if real[path] in (real[other], *real[other].parents):
            parser.error(f"every --output must be a place of its own, got {path} and {other}")


def convert(args: argparse.Namespace) -> list["Record"]:
    """Reads, checks, converts and writes; nothing is written before all is checked."""
    from metaformer_jax.weights import pretrained, read_record, timm_parity, workdir, write
    from metaformer_jax.weights.converted import is_portable_file

    name = args.model
    asked = {key: getattr(args, key) for key in _SETTINGS if getattr(args, key) is not None}
    settings = asked
    if (folder := workdir.workdir_of(args.input)) is not None:
        name = name or workdir.read_model_name(folder)
        if name is None:
            raise ValueError(
                f"The input must be weights of a published model, got {folder}, the workdir of a "
                "network that has no published name. Load it as it is: where weights are asked "
                "for, this folder may be given."
            )
        settings = asked | workdir.read_sizes(folder)
    elif args.input.is_dir() or is_portable_file(args.input):
        record = read_record(args.input)
        name = name or record.model
        settings = {key: getattr(record, key) for key in _SETTINGS}
    if name is None:
        raise ValueError(
            f"--model must be given for {args.input.name}, which does not name its published "
            "model. `python -m metaformer_jax.zoo` lists them."
        )
    if args.verify and (args.input.is_dir() or is_portable_file(args.input)):
        raise ValueError(
            "--verify must be given with the PyTorch file that timm can read as well, got "
            f"{args.input}."
        )
    layout = (args.layout or "sail") if args.reverse else None
    for path in args.output:
        write.check_destination(path, name=name, layout=layout, force=args.force)
    model, variables, checkpoint = pretrained.read_and_build(
        args.input, name, entry=args.entry, with_hash=True, **settings
    )
    _check_as_asked(model, asked)
    if args.verify:
        pretrained.fill(model, variables)
        error = timm_parity.relative_error_to_timm(args.input, model, name=name, entry=args.entry)
        print(f"relative error to timm: {error:.1e}")
        if not error <= timm_parity.TOLERANCE:
            raise ValueError(
                f"The relative error must be at most {timm_parity.TOLERANCE}, got {error:.1e}. "
                "Nothing was written."
            )
    return [
        write.write_variables(
            variables,
            path,
            name=name,
            model=model,
            layout=layout,
            force=args.force,
            **checkpoint.source,
        )
        for path in args.output
    ]


def _check_as_asked(model: "MetaFormer", asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        found = getattr(model, key)
        if value != found and (value, value) != found:
            flag = "--" + key.replace("_", "-")
            raise ValueError(f"{flag} must be what the checkpoint has, {found}, got {value}.")


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Runs the program: 0 if all was written, 2 and one message if not."""
    # The paths on the command line are checked by modules that take seconds to import.
    return programs.run(
        lambda: _convert(parse_args(argv, prog)),
        if_interrupted="interrupted; an output that was not finished is not there",
    )


def _convert(args: argparse.Namespace) -> None:
    records = convert(args)
    for path, record in zip(args.output, records, strict=True):
        entry = f", {record.source_entry}" if record.source_entry else ""
        source = f" from {record.source_layout} layout{entry}" if record.source_layout else ""
        frozen = f" and {record.frozen_params:,} frozen" if record.frozen_params else ""
        print(f"{path}: {record.model}, {record.params:,}{frozen} parameters{source}")


if __name__ == "__main__":
    sys.exit(main())
