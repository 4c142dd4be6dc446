r"""Writes a model with its weights as a file that runs without this package.

Examples:
    python -m metaformer_jax.export --model caformer_s18 --output caformer_s18.stablehlo
    python -m metaformer_jax.export --weights runs/digits --output digits.onnx

A JSON file of the same name beside it tells the input, its normalisation, and the classes.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from metaformer_jax import programs

FORMATS = ("stablehlo", "onnx")
_PROG = "python -m metaformer_jax.export"


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace(_PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="a published name, such as caformer_s18")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="a .pth or .safetensors file, a converted folder or a training run's workdir; by "
        "default the published weights",
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="by default as the suffix of --output says. stablehlo is what jax.export reads, and "
        "takes the extra `export`; onnx takes the extra `onnx`",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="by default the model's own"
    )
    parser.add_argument(
        "--platforms",
        metavar="LIST",
        help="of stablehlo: what the one file runs on (default: cpu,cuda,tpu)",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    args = parser.parse_args(argv)
    args.format = args.format or args.output.suffix[1:]
    if args.format not in FORMATS:
        parser.error(f"--format must be given for {args.output.name}: its suffix does not say it")
    if args.platforms is not None and args.format == "onnx":
        parser.error("--platforms is for stablehlo: an ONNX file runs wherever its runtime does")
    if args.output.suffix == ".json":
        parser.error(f"--output must not end in .json, which is written beside it: {args.output}")
    return args


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Writes the file and its JSON; returns the exit code."""
    args = parse_args(argv, prog)
    return programs.run(lambda: _export(args), if_interrupted="interrupted; nothing was written")


def _export(args: argparse.Namespace) -> None:
    from metaformer_jax.inference import artefacts, load_classifier
    from metaformer_jax.weights.outputs import check_output, whole_output

    beside = args.output.with_suffix(".json")
    for path in (args.output, beside):
        check_output(path, force=args.force, is_folder=False)
    classifier = load_classifier(args.model, weights=args.weights, image_size=args.image_size)
    size = classifier.transform.image_size
    if args.format == "onnx":
        data = artefacts.export_onnx(classifier.model, image_size=size)
    else:
        platforms = args.platforms.split(",") if args.platforms else artefacts.PLATFORMS
        data = artefacts.export_stablehlo(classifier.model, image_size=size, platforms=platforms)
    with (
        whole_output(args.output, force=args.force, is_folder=False) as file,
        whole_output(beside, force=args.force, is_folder=False) as description,
    ):
        file.write_bytes(data)
        described = artefacts.describe(classifier)
        description.write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    for note in classifier.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.output}: {classifier.name}, {len(data) / 1e6:.1f} MB; {beside} describes it")


if __name__ == "__main__":
    sys.exit(main())
