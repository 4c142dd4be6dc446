"""Accuracy of a published model on an image folder, with the options of timm's validate.py.

python -m metaformer_jax.validate /path/to/imagenet --model caformer_s18 -b 128 \
        --checkpoint caformer_s18.pth
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from absl import logging
from rich.console import Console

from metaformer_jax.training.exit_codes import INTERRUPTED, USAGE_ERROR


def main(
    arguments: Sequence[str] | None = None, *, prog: str = "python -m metaformer_jax.validate"
) -> int:
    """Prints top-1, top-5 and loss; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="the folder that holds val/<class>/*")
    parser.add_argument("--model", required=True, help="a published name")
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument(
        "--checkpoint",
        default="published",
        help="a .pth or .safetensors file, a converted folder or a run's workdir; by default the "
        "published weights are downloaded",
    )
    parser.add_argument("--img-size", type=int, help="pixels per side; by default the model's")
    parser.add_argument("--crop-pct", type=float, default=1.0)
    parser.add_argument("--interpolation", default="bicubic")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    parser.add_argument("-j", "--workers", type=int, default=-1, help="-1: one for each core")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)

    import jax

    from metaformer_jax import models
    from metaformer_jax.data.loader import DataError
    from metaformer_jax.training import evaluation, recipes
    from metaformer_jax.weights import DownloadError

    try:
        info = models.model_info(options.model)
        config = recipes.base_config()
        config.model.update(
            name=info.name,
            pretrained=options.checkpoint,
            dtype="bfloat16" if options.amp else "float32",
        )
        config.data.update(
            name="folder",
            root=str(pathlib.Path(options.data).expanduser()),
            image_size=info.image_size if options.img_size is None else options.img_size,
            num_workers=options.workers,
        )
        config.update(
            eval_batch_size=options.batch_size,
            eval_crop_fraction=options.crop_pct,
            eval_interpolation=options.interpolation,
        )
        evaluation.evaluate(config, console=Console())
    except (ValueError, OSError, ImportError, DownloadError, DataError) as error:
        return _failed(error)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        return _failed(f"the device failed: {reason} A smaller --batch-size takes less memory.")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _failed(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
