"""The console script `metaformer-jax`: one name for all programs."""

import argparse
import difflib
import importlib
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

import metaformer_jax
from metaformer_jax.exit_codes import USAGE_ERROR


class Command(NamedTuple):
    """A program: its module and summary, whether its flags are absl's, and flags set in advance."""

    module: str
    summary: str
    flags_are_absl: bool = False
    before: tuple[str, ...] = ()


COMMANDS = {
    "predict": Command("metaformer_jax.predict", "classify pictures, draw explanations"),
    "demo": Command("metaformer_jax.demo", "the same on a local web page"),
    "zoo": Command("metaformer_jax.zoo", "list the published models"),
    "train": Command("metaformer_jax.main", "train what a config describes", True),
    "eval": Command(
        "metaformer_jax.main", "evaluate a run, or pretrained weights", True, ("--mode=eval",)
    ),
    "validate": Command("metaformer_jax.validate", "accuracy on an image folder, as timm's script"),
    "convert": Command("metaformer_jax.convert", "PyTorch checkpoints to Flax weights, and back"),
    "export": Command("metaformer_jax.export", "a StableHLO or ONNX file that runs on its own"),
    "prepare": Command("metaformer_jax.data.prepare", "make data sets for training"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first, rest = arguments[:1], arguments[1:]
    parser = argparse.ArgumentParser(
        prog="metaformer-jax",
        description="MetaFormer baselines for vision: IdentityFormer, RandFormer, PoolFormerV2, "
        "ConvFormer and CAFormer.",
        epilog="`metaformer-jax COMMAND --help` lists a command's options. Exit codes: 0 if all "
        "was done, 1 if a part was, 2 if nothing was because something is wrong or missing; train "
        "and eval also end with others, see docs/training.md.",
    )
    parser.add_argument(
        "--version", action="version", version=f"metaformer-jax {metaformer_jax.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    if first and not first[0].startswith("-") and first[0] not in COMMANDS:
        close = difflib.get_close_matches(first[0], COMMANDS, n=2, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else "--help lists them."
        print(f"error: {first[0]!r} is not a command. {hint}", file=sys.stderr)
        return USAGE_ERROR
    name = parser.parse_args(first).name
    if name is None:
        parser.error("a COMMAND must be given. --help lists them.")
    command = COMMANDS[name]
    if command.flags_are_absl:
        return _run_absl(command, rest)
    program = importlib.import_module(command.module)
    return program.main(rest, prog=f"metaformer-jax {name}")


def _run_absl(command: Command, arguments: list[str]) -> int:
    # As `python -m` runs it: absl reads sys.argv, and worker processes look for the program that
    # is `__main__`.
    asks_for_help = bool({"-h", "-help", "--help", "--helpfull"} & set(arguments))
    arguments = ["--help" if argument == "-h" else argument for argument in arguments]
    sys.argv = [command.module, *command.before, *arguments]
    try:
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        # absl answers a call for help as if it were a mistake.
        if not asks_for_help:
            raise
        return 0 if exit.code == 1 else int(exit.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
