"""Accuracy of a published model on an image folder, with the options of timm's validate.py.

python -m metaformer_jax.validate /path/to/imagenet --model caformer_s18 -b 128 \
        --checkpoint caformer_s18.pth
"""

import argparse
import sys
from collections.abc import Sequence

from metaformer_jax import programs

_PROG = "python -m metaformer_jax.validate"
# From the fields of the evaluation's config to the options that give them.
_OPTIONS = {
    "config.data.root": "data",
    "config.data.image_size": "--img-size",
    "config.data.num_workers": "--workers",
    "config.eval_batch_size": "--batch-size",
    "config.eval_crop_fraction": "--crop-pct",
    "config.eval_interpolation": "--interpolation",
    "config.model.pretrained": "--checkpoint",
}


def parse_args(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="the folder that holds val/<class>/*")
    parser.add_argument("--model", required=True, help="a published name")
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument(
        "--checkpoint",
        default="published",
        help="a .pth or .safetensors file, a converted folder or a run's workdir; if averaged "
        "weights are in it, these are taken; by default the published weights are downloaded",
    )
    parser.add_argument("--img-size", type=int, help="pixels per side; by default the model's")
    parser.add_argument("--crop-pct", type=float, help="by default the model's")
    parser.add_argument("--interpolation", help="by default the model's")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    parser.add_argument("-j", "--workers", type=int, default=-1, help="-1: one for each core")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, prog: str = _PROG) -> int:
    """Prints top-1, top-5 and loss; returns the exit code."""
    args = parse_args(argv, prog)
    return programs.run(
        lambda: _validate(args), if_device_fails="A smaller --batch-size takes less memory."
    )


def _validate(args: argparse.Namespace) -> None:
    # Imported here: --help and a mistyped option are answered at once.
    from absl import logging
    from rich.console import Console

    from metaformer_jax import models
    from metaformer_jax.inference import trained
    from metaformer_jax.paths import local_path
    from metaformer_jax.training import evaluation, recipes
    from metaformer_jax.weights import workdir

    logging.set_verbosity(logging.WARNING)
    info = models.model_info(args.model)
    images = trained.published_settings(info.name, channels=3)
    path = local_path(args.checkpoint)
    if workdir.workdir_of(path) is not None:
        images |= trained.read_settings(path).settings
    asked = {
        "image_size": args.img_size,
        "crop_fraction": args.crop_pct,
        "interpolation": args.interpolation,
    }
    images |= {name: value for name, value in asked.items() if value is not None}
    config = recipes.base_config()
    config.model.update(
        name=info.name,
        pretrained=args.checkpoint,
        dtype="bfloat16" if args.amp else "float32",
    )
    config.data.update(
        name="folder",
        root=str(local_path(args.data)),
        image_size=images["image_size"],
        mean=tuple(images["mean"]),
        std=tuple(images["std"]),
        num_workers=args.workers,
    )
    config.update(
        eval_batch_size=args.batch_size,
        eval_crop_fraction=images["crop_fraction"],
        eval_interpolation=images["interpolation"],
    )
    with programs.naming_options(**_OPTIONS):
        evaluation.evaluate(config, console=Console())


if __name__ == "__main__":
    sys.exit(main())
