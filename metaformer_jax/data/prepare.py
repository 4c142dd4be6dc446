r"""Prepares data sets for training.

Examples:
    python -m metaformer_jax.data.prepare imagenet --tars ~/Downloads --output ~/tensorflow_datasets
    python -m metaformer_jax.data.prepare arrayrecord --input ~/tensorflow_datasets/mnist/3.0.1 \
        --output ~/array_record_datasets

The first takes the two archives of ILSVRC 2012 and needs TensorFlow (the extra `prepare`). The
second rewrites a data set that TFDS prepared as TFRecord files, and needs nothing.
Both leave a folder that is the `data.root` of a config, with `data.name` the name of the data set.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from metaformer_jax import programs
from metaformer_jax.paths import local_path

_PROG = "python -m metaformer_jax.data.prepare"


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").replace(_PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="program", required=True)
    imagenet = commands.add_parser(
        "imagenet", help="ImageNet (ILSVRC 2012) from its two archives, through TFDS's builder"
    )
    imagenet.add_argument(
        "--tars",
        type=_local,
        required=True,
        metavar="DIR",
        help="the folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
    )
    _add_output(imagenet, "imagenet2012/5.1.0")
    imagenet.add_argument(
        "--file-format",
        # Not parquet, which TFDS offers as well: it loses records there without a word.
        choices=("array_record", "tfrecord"),
        default="array_record",
        help="of the files (default: %(default)s, which is read without an index)",
    )
    imagenet.add_argument(
        "--md5", action="store_true", help="compare the archives' contents too: reads 155 GB more"
    )
    imagenet.add_argument(
        "--any-size",
        action="store_true",
        help="take archives of other sizes, such as excerpts; of the validation images the first N",
    )
    convert = commands.add_parser(
        "arrayrecord", help="a TFDS data set in TFRecord files as one in ArrayRecord files"
    )
    convert.add_argument(
        "--input",
        type=_local,
        required=True,
        metavar="DIR",
        help="the folder of one version, with dataset_info.json and the TFRecord files",
    )
    _add_output(convert, "<name>/<version>")
    convert.add_argument("--force", action="store_true", help="replace an earlier result")
    convert.add_argument(
        "--num-threads",
        type=int,
        metavar="N",
        help="files converted at a time (default: one for each processor)",
    )
    return parser.parse_args(argv)


def _add_output(parser: argparse.ArgumentParser, inner: str) -> None:
    parser.add_argument(
        "--output",
        type=_local,
        required=True,
        metavar="DATA_DIR",
        help=f"the result goes to {inner} in this folder",
    )


def _local(path: str) -> pathlib.Path:
    if "://" in path:
        raise argparse.ArgumentTypeError(
            f"must be a local folder, got {path}. Copy the data from or to it, with gcloud storage "
            "cp or the like."
        )
    return local_path(path).absolute()


def run(args: argparse.Namespace) -> pathlib.Path:
    """Does what the command line asks for; returns the folder that was written."""
    # Imported here: --help and a mistyped option are answered at once.
    if args.program == "imagenet":
        # TensorFlow is to say nothing of GPUs, which it does not need here.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
        from metaformer_jax.data.prepare_imagenet import prepare_imagenet

        return prepare_imagenet(
            args.tars,
            args.output,
            file_format=args.file_format,
            md5=args.md5,
            any_size=args.any_size,
        )
    from metaformer_jax.data.to_array_record import convert_dataset

    return convert_dataset(args.input, args.output, force=args.force, num_threads=args.num_threads)


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Runs the program: 0 if all was written, 2 and one message if not."""
    args = parse_args(argv, prog)
    return programs.run(lambda: _prepare(args), if_interrupted="interrupted; there is no result")


def _prepare(args: argparse.Namespace) -> None:
    with programs.naming_options(tars="--tars", source="--input", data_dir="--output"):
        folder = run(args)
    name = "/".join(folder.relative_to(args.output).parts[:-1])
    print(f"{folder}\nUse it with data.name={name} and data.root={args.output}")


if __name__ == "__main__":
    sys.exit(main())
